"""What goes with a DICOM segmentation: a structured report, and pictures with outlines."""

import io
import json
import zipfile
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
from inference.exported_model import ExportedModel
from serving import dicom_objects
from serving.responses import MaskResponse
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
    pictures = [list(dicom_overlay.encode_overlays(mask, xray, "1.2.3")) for _ in range(2)]
    uids = [pydicom.dcmread(io.BytesIO(one[0])).SOPInstanceUID for one in pictures]
    assert uids[0] == uids[1] not in (first.SOPInstanceUID, first.SeriesInstanceUID)
    (other,) = dicom_overlay.encode_overlays(mask, xray, "1.2.4")
    assert pydicom.dcmread(io.BytesIO(other)).SOPInstanceUID != uids[0]


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
        next(dicom_overlay.encode_overlays(mask, xray, "1.2.3"))


def read_overlay(scan):
    content = next(dicom_overlay.encode_overlays(make_mask(scan), scan, "1.2.3"))
    return pydicom.dcmread(io.BytesIO(content))


def test_a_picture_says_how_the_patient_lies_or_nothing(xray, tmp_path):
    assert not read_overlay(xray).PatientOrientation  # nobody knows
    for given in (["A", "FR"], ["L", "F"]):  # of a mammography, of a chest
        xray.header[0].PatientOrientation = given
        assert read_overlay(xray).PatientOrientation == given
    axial, sagittal = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]
    for name, given, expected in (("a", axial, ["L", "P"]), ("s", sagittal, ["P", "F"])):
        write_series(tmp_path / name, ImageOrientationPatient=given, positions=(0,))
        assert read_overlay(formats.read_scan(tmp_path / name)).PatientOrientation == expected


@pytest.mark.parametrize("charset", [["", "ISO 2022 IR 87"], "ISO_IR 999"])
def test_any_character_set_of_the_source_will_do(xray, charset):
    xray.header[0].SpecificCharacterSet = charset
    assert read_overlay(xray).SpecificCharacterSet == "ISO_IR 192"


@pytest.fixture
def network():
    metadata = {"classes": ["left lung", "right lung"]}
    return ExportedModel(metadata, "0" * 64, "", "", "", (), "", 2)


def complete(scan, content, network):
    seg = dicom_seg.encode_mask(make_mask(scan), scan, "model 1")
    answer = MaskResponse(seg, "application/zip", {}, 0.5, None)
    done = dicom_objects.complete(answer, content, network, 2**31)
    with zipfile.ZipFile(io.BytesIO(done.body)) as archive:
        assert archive.read("segmentation.dcm") == seg
        return archive.namelist(), json.loads(done.headers.get("X-Notes", "[]"))


def test_slices_that_lie_unevenly_get_all(tmp_path, network):
    """The node sends a series as a zip."""
    write_series(tmp_path / "in", positions=(0, 5, 11, 30))
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted((tmp_path / "in").iterdir()):
            archive.write(path, path.name)
    content = (tmp_path / "in.zip").read_bytes()
    names, notes = complete(formats.decode_scan(content), content, network)
    assert len(names) == 4 and "report.dcm" in names and not notes


def test_a_picture_that_cannot_be_made_costs_no_segmentation(xray, tmp_path, network, monkeypatch):
    def refuse(*_):
        raise UserError("no DICOM picture can refer to it (a reason)")

    monkeypatch.setattr(dicom_overlay, "_make_capture", refuse)
    names, notes = complete(xray, (tmp_path / "xray.dcm").read_bytes(), network)
    assert names == ["segmentation.dcm", "report.dcm"]
    assert len(notes) == 1 and "no DICOM picture" in notes[0]
