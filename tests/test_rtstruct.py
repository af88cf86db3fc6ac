"""RTSTRUCT: contours in mm become the masks of their series."""

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom import Dataset
from test_dicom_series import write_series

from imaging import formats
from imaging.dicom.rtstruct import decode_rtstruct, fill_polygons
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
# Spacing of `write_series`, rows and columns.
ROW_MM, COLUMN_MM = 0.7, 0.8


def contour(corners, z) -> Dataset:
    """Make a contour through pixel corners (row, column)."""
    item = Dataset()
    item.ContourGeometricType = "CLOSED_PLANAR"
    item.NumberOfContourPoints = len(corners)
    item.ContourData = [x for r, c in corners for x in (c * COLUMN_MM, r * ROW_MM, z)]
    return item


def box(top, left, bottom, right, z) -> Dataset:
    """Outline the pixels of rows top..bottom-1 and columns left..right-1."""
    edges = (top - 0.5, left - 0.5, bottom - 0.5, right - 0.5)
    top, left, bottom, right = edges
    return contour([(top, left), (top, right), (bottom, right), (bottom, left)], z)


def write_rtstruct(path, structures, frame_of_reference, **more):
    """Write structures {name: contours}."""
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.RTStructureSetStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.Modality, rois, contours = "RTSTRUCT", [], []
    for number, (name, items) in enumerate(structures.items(), 7):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        roi.ReferencedFrameOfReferenceUID = frame_of_reference
        drawn.ReferencedROINumber, drawn.ContourSequence = number, items
        rois.append(roi)
        contours.append(drawn)
    ds.StructureSetROISequence, ds.ROIContourSequence = rois, contours
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def case(tmp_path):
    """A series, and contours of a liver with a hole, a tumour in it and the body."""
    uids = write_series(tmp_path / "ct")
    structures = {
        "BODY": [box(0, 0, 20, 24, z) for z in (0, 5, 10, 15)],
        "Liver": [box(2, 3, 12, 15, 5), box(2, 3, 12, 15, 10), box(5, 6, 8, 10, 10)],
        "Tumour": [box(3, 4, 5, 6, 5)],
    }
    ids = np.zeros((4, 20, 24), np.uint8)
    ids[1:3, 2:12, 3:15] = 1
    ids[2, 5:8, 6:10] = 0
    ids[1, 3:5, 4:6] = 2
    path = write_rtstruct(tmp_path / "rt.dcm", structures, uids["FrameOfReferenceUID"])
    return formats.read_scan(tmp_path / "ct"), path, ids


def test_structures_are_classes_by_their_names(case):
    scan, path, ids = case
    mask = formats.read_mask_scan(path, scan, ["liver", "tumour"])
    np.testing.assert_array_equal(mask.pixels[..., 0], ids)
    assert mask.notes == (
        "its structures overlap in 4 pixels: the later class stays; --overlap keeps both",
    )
    found = decode_rtstruct(path.read_bytes(), scan, ["tumour"])
    np.testing.assert_array_equal(found, ids == 2)
    structures = {"Lung  R": [box(2, 3, 12, 15, 5)], "GTV, primary": [box(3, 4, 5, 6, 10)]}
    uid = pydicom.dcmread(path).StructureSetROISequence[0].ReferencedFrameOfReferenceUID
    odd = write_rtstruct(path.with_name("odd.dcm"), structures, uid)
    found = decode_rtstruct(odd.read_bytes(), scan, ["Lung R", "GTV primary"])
    assert set(np.unique(found)) == {0, 1, 2}
    # A single class of another name takes all but the body.
    np.testing.assert_array_equal(decode_rtstruct(path.read_bytes(), scan, ["organ"]), ids > 0)
    with pytest.raises(UserError, match="structures BODY, Liver, Tumour; expected the classes sp"):
        formats.read_mask_scan(path, scan, ["spleen", "kidney"])


def test_contours_of_another_series_are_refused(case, tmp_path):
    _, path, _ = case
    write_series(tmp_path / "other")
    with pytest.raises(UserError, match="not contours of its image"):
        formats.read_mask_scan(path, formats.read_scan(tmp_path / "other"), ["liver", "tumour"])


def test_contours_in_a_converted_volume(case, tmp_path):
    scan, path, ids = case
    volume = SimpleITK.GetImageFromArray(scan.pixels[..., 0])
    volume.SetSpacing((COLUMN_MM, ROW_MM, 5))
    SimpleITK.WriteImage(volume, str(tmp_path / "ct.nii.gz"))
    image = formats.read_scan(tmp_path / "ct.nii.gz")
    mask = formats.read_mask_scan(path, image, ["liver", "tumour"])
    # Both stand the same way, because axial slices do.
    np.testing.assert_array_equal(mask.pixels[..., 0], ids)


def test_contours_across_slices_and_outside_are_refused(case, tmp_path):
    scan, _, _ = case
    uid = scan.header[0].FrameOfReferenceUID
    slanted = box(2, 3, 12, 15, 5)
    slanted.ContourData[2] = 15
    path = write_rtstruct(tmp_path / "a.dcm", {"liver": [slanted]}, uid)
    with pytest.raises(UserError, match="contours across the slices"):
        formats.read_mask_scan(path, scan, ["liver"])
    path = write_rtstruct(tmp_path / "a.dcm", {"liver": [box(2, 3, 12, 15, 500)]}, uid)
    with pytest.raises(UserError, match="outside of its image"):
        formats.read_mask_scan(path, scan, ["liver"])


def test_a_pixel_is_inside_if_its_centre_is():
    """A disc's area is that of the polygon; a rectangle has whole pixels; holes are cut."""
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    disc = np.stack([50.3 + 30 * np.sin(angles), 40.7 + 30 * np.cos(angles)], axis=1)
    filled = fill_polygons([disc], (100, 90))
    y, x = np.mgrid[:100, :90]
    inside = (y - 50.3) ** 2 + (x - 40.7) ** 2 < 30**2
    assert np.count_nonzero(filled != inside) <= 2
    hole = fill_polygons([disc, 0.5 * (disc + (50.3, 40.7))], (100, 90))
    assert hole[50, 60] and not hole[50, 41]
    outside = fill_polygons([disc - (40, 40)], (100, 90))
    np.testing.assert_array_equal(outside[:60, :50], filled[40:, 40:])
