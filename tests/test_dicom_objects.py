"""What goes with a DICOM segmentation: a structured report, and pictures with outlines."""

import io
from dataclasses import replace

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.uid import ComprehensiveSRStorage, SecondaryCaptureImageStorage
from test_dicom_series import write_series
from test_pacs import write_xray

from imaging import formats
from imaging.dicom import dicom_overlay, dicom_report, dicom_seg
from imaging.scan import Mask
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
QUALITY = {
    "predicted_dice": 0.97,
    "predicted_dice_low": 0.95,
    "predicted_dice_high": 0.98,
    "unusual": True,
}


@pytest.fixture
def xray(tmp_path):
    """A radiograph of 100x80 pixels of 0.7 mm."""
    path = tmp_path / "xray.dcm"
    write_xray(path, np.random.default_rng(0).integers(0, 200, (100, 80)).astype(np.uint8))
    return formats.read_scan(path)


@pytest.fixture
def volume(tmp_path):
    """Four slices."""
    write_series(tmp_path / "series")
    return formats.read_scan(tmp_path / "series")


def make_mask(scan, names=("left lung", "right lung")) -> Mask:
    """A rectangle of class 1 in the first slices; class 2 is nowhere."""
    ids = np.zeros(scan.pixels.shape[:3], np.uint8)
    ids[: max(1, len(ids) // 2), 4:10, 2:12] = 1
    return Mask(ids, names)


def read_report(scan, mask, quality=None):
    """Write a report and read its groups of measurements."""
    seg = dicom_seg.encode_mask(mask, scan, "model 1")
    header = pydicom.dcmread(io.BytesIO(dicom_report.encode_report(seg, mask, scan, quality)))
    report = hd.sr.ComprehensiveSR.from_dataset(header)
    rows = {}
    for name in ("get_volumetric_roi_measurement_groups", "get_image_measurement_groups"):
        for group in getattr(report.content, name)():
            sizes = [
                (one.name.meaning, one.value, one.unit.value) for one in group.get_measurements()
            ]
            rows[group.tracking_identifier] = sizes
    return pydicom.dcmread(io.BytesIO(seg)), header, rows, report


def test_a_report_measures_each_class_of_an_image(xray):
    seg, header, rows, report = read_report(xray, make_mask(xray), QUALITY)
    assert header.SOPClassUID == ComprehensiveSRStorage
    assert header.StudyInstanceUID == seg.StudyInstanceUID and header.PatientID == "7"
    assert rows["left lung"] == [("Area", pytest.approx(60 * 0.49), "mm2")]
    assert rows["right lung"] == [("Area", 0, "mm2")]
    assert [value for _, value, _ in rows["quality of the segmentation"]] == [0.97, 0.95, 0.98]
    (group,) = report.content.get_volumetric_roi_measurement_groups()
    assert group.referenced_segment.referenced_sop_instance_uid == seg.SOPInstanceUID
    (quality,) = [
        one
        for one in report.content.get_image_measurement_groups()
        if one.tracking_identifier == "quality of the segmentation"
    ]
    assert quality.get_qualitative_evaluations()[0].value.meaning == "Yes"


def test_a_report_measures_volumes_and_counts_where_no_size_is_known(volume, xray):
    spacing = volume.spacing_mm
    _, _, rows, _ = read_report(volume, make_mask(volume))
    assert rows["left lung"] == [("Volume", pytest.approx(120 * np.prod(spacing)), "mm3")]
    assert "quality of the segmentation" not in rows
    _, _, rows, _ = read_report(replace(xray, spacing_mm=None), make_mask(xray, ("lungs",)))
    assert rows == {"lungs": [("Area", 60, "{pixels}")]}


def test_the_same_mask_makes_the_same_objects(xray):
    mask = make_mask(xray)
    first, second = (read_report(xray, mask)[1] for _ in range(2))
    assert first.SOPInstanceUID == second.SOPInstanceUID
    assert first.SeriesInstanceUID == second.SeriesInstanceUID
    pictures = [dicom_overlay.encode_overlays(mask, xray, "1.2.3") for _ in range(2)]
    uids = [pydicom.dcmread(io.BytesIO(one[0])).SOPInstanceUID for one in pictures]
    assert uids[0] == uids[1] not in (first.SOPInstanceUID, first.SeriesInstanceUID)
    other = dicom_overlay.encode_overlays(mask, xray, "1.2.4")
    assert pydicom.dcmread(io.BytesIO(other[0])).SOPInstanceUID != uids[0]


def test_a_picture_shows_the_outline_in_the_image(xray):
    mask = make_mask(xray)
    (content,) = dicom_overlay.encode_overlays(mask, xray, "1.2.3")
    header = pydicom.dcmread(io.BytesIO(content))
    assert header.SOPClassUID == SecondaryCaptureImageStorage and header.PatientID == "7"
    pixels = header.pixel_array
    picture = pixels[:512]
    assert picture.shape[1] == round(512 * 80 / 100)  # enlarged, its shape kept
    is_red = (picture == dicom_overlay.COLOURS[0]).all(-1)
    rows, columns = np.nonzero(is_red)
    scale = 512 / 100
    assert abs(rows.min() - 4 * scale) < 6 and abs(rows.max() - 10 * scale) < 6
    assert abs(columns.min() - 2 * scale) < 6 and abs(columns.max() - 12 * scale) < 6
    assert (picture[..., 0] == picture[..., 1])[~is_red].all()  # the image is grey


def test_a_volume_has_a_picture_of_each_slice_with_a_mask(volume):
    mask = make_mask(volume)
    pictures = dicom_overlay.encode_overlays(mask, volume, "1.2.3")
    numbers = [pydicom.dcmread(io.BytesIO(one)).InstanceNumber for one in pictures]
    assert numbers == [1, 2]
    nothing = Mask(np.zeros_like(mask.ids), mask.names)
    (middle,) = dicom_overlay.encode_overlays(nothing, volume, "1.2.3")
    assert pydicom.dcmread(io.BytesIO(middle)).InstanceNumber == 3


def test_letters_that_the_font_lacks_are_replaced():
    legend = dicom_overlay.draw_legend(["Lunge, größer", "肺"], 300)
    assert legend.shape == (3 * 22 + 16, 300, 3) and legend.any()


def test_a_header_that_lacks_what_is_needed_is_told(xray):
    mask = make_mask(xray)
    seg = dicom_seg.encode_mask(mask, xray)
    del xray.header[0].StudyInstanceUID
    with pytest.raises(UserError, match="no DICOM report can refer to it"):
        dicom_report.encode_report(seg, mask, xray, None)
    with pytest.raises(UserError, match="no DICOM picture can refer to it"):
        dicom_overlay.encode_overlays(mask, xray, "1.2.3")
