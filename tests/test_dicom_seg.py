"""DICOM segmentations: written for any source that can be referred to, read by their labels."""

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from test_dicom_series import write_series
from test_medical import ct_slice

import data
from imaging import formats
from imaging.dicom import dicom_seg
from imaging.scan import Scan
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["liver", "tumour"]


def truth() -> np.ndarray:
    """Class ids of four slices: liver and tumour, none of them in the first."""
    ids = np.zeros((4, 20, 24), np.uint8)
    ids[1:, 2:9, 3:8], ids[3, 5:7, 5:9], ids[2, 15, 20] = 1, 2, 2
    return ids


def read_ids(path, image, names) -> np.ndarray:
    """Read a mask as `check` and training do: class ids (S, H, W)."""
    return formats.read_mask_scan(path, image, names).pixels[..., 0]


def headers_of(folder) -> list:
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda h: h.ImagePositionPatient[2])


def write_seg(path, headers, mask, kind="BINARY", labels=NAMES, **more):
    """Write a segmentation with highdicom, as other software does."""
    path.parent.mkdir(exist_ok=True)
    segments = []
    for number, label in enumerate(labels, 1):
        segments.append(
            hd.seg.SegmentDescription(number, label, codes.SCT.Organ, codes.SCT.Organ, "MANUAL")
        )
    uids = hd.UID(), 1, hd.UID(), 1, "x", "x", "x", "x"
    hd.seg.Segmentation(headers, mask, kind, segments, *uids, **more).save_as(path)
    return path


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segments_are_classes_by_their_labels(tmp_path, kind):
    write_series(tmp_path / "ct")
    path = write_seg(tmp_path / "masks/ct.dcm", headers_of(tmp_path / "ct"), truth(), kind)
    ids = read_ids(path, formats.read_scan(tmp_path / "ct"), NAMES[::-1])
    np.testing.assert_array_equal(ids, np.array([0, 2, 1])[truth()])
    ids = read_ids(path, formats.read_scan(tmp_path / "ct"), ["organ"])
    np.testing.assert_array_equal(ids, truth() > 0)
    with pytest.raises(UserError, match="segments liver, tumour; expected the classes liver, s"):
        read_ids(path, formats.read_scan(tmp_path / "ct"), ["liver", "spleen"])


def test_a_label_map_of_16_bits(tmp_path):
    write_series(tmp_path / "ct")
    labels = [f"part {i}" for i in range(1, 301)]
    mask = np.where(truth() == 2, 300, truth()).astype(np.uint16)
    headers = headers_of(tmp_path / "ct")
    path = write_seg(tmp_path / "masks/ct.dcm", headers, mask, "LABELMAP", labels)
    assert pydicom.dcmread(path).BitsAllocated == 16
    ids = read_ids(path, formats.read_scan(tmp_path / "ct"), ["organ"])
    np.testing.assert_array_equal(ids, truth() > 0)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless"])
def test_a_compressed_label_map(tmp_path, syntax):
    write_series(tmp_path / "ct")
    headers = headers_of(tmp_path / "ct")
    more = {"transfer_syntax_uid": getattr(pydicom.uid, syntax)}
    path = write_seg(tmp_path / "masks/ct.dcm", headers, truth(), "LABELMAP", **more)
    ids = read_ids(path, formats.read_scan(tmp_path / "ct"), NAMES)
    np.testing.assert_array_equal(ids, truth())


def test_fractions_are_cut_at_half(tmp_path):
    write_series(tmp_path / "ct")
    share = np.linspace(0, 1, 4 * 20 * 24).reshape(4, 20, 24)
    headers = headers_of(tmp_path / "ct")
    path = write_seg(tmp_path / "masks/ct.dcm", headers, share, "FRACTIONAL", ["liver"])
    scan = formats.read_scan(tmp_path / "ct")
    mask = formats.read_mask_scan(path, scan, ["liver"])
    np.testing.assert_array_equal(mask.pixels[..., 0], np.round(255 * share) >= 127.5)
    assert mask.notes == ("its fractions are cut at half",)


def test_a_segmentation_is_never_read_as_a_picture(tmp_path):
    write_series(tmp_path / "ct")
    for kind in ("BINARY", "LABELMAP"):
        path = write_seg(tmp_path / f"masks/{kind}.dcm", headers_of(tmp_path / "ct"), truth(), kind)
        with pytest.raises(UserError, match="a DICOM segmentation"):
            formats.read_scan(path)
        with pytest.raises(UserError, match="a DICOM segmentation"):
            formats.read_mask_scan(path)


@pytest.mark.parametrize("axes", [(2, 1, 0), (0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_segmentation_of_a_nifti_image_is_found_by_its_place(tmp_path, axes, flip):
    """The image was converted from DICOM, and stored along other axes."""
    write_series(tmp_path / "ct")
    scan = formats.read_scan(tmp_path / "ct")
    path = write_seg(tmp_path / "masks/ct.dcm", headers_of(tmp_path / "ct"), truth())
    values = np.random.default_rng(0).permutation(truth().size).reshape(truth().shape)
    turn = np.eye(4)[:, [*axes, 3]]
    voxels, affine = values.transpose(axes), scan.affine @ turn
    if flip:
        move = np.diag([-1.0, 1, 1, 1])
        move[0, 3] = voxels.shape[0] - 1
        voxels, affine = voxels[::-1], affine @ move
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), affine), tmp_path / "ct.nii")
    image = formats.read_scan(tmp_path / "ct.nii")
    ids = read_ids(path, image, NAMES)
    for class_id in (1, 2):
        inside = set(image.pixels[ids == class_id].ravel())
        assert inside == set(values[truth() == class_id])


def test_a_segmentation_of_another_grid_is_refused(tmp_path):
    write_series(tmp_path / "ct")
    scan = formats.read_scan(tmp_path / "ct")
    path = write_seg(tmp_path / "masks/ct.dcm", headers_of(tmp_path / "ct"), truth())
    for change in (np.diag([1, 0.5, 0.5, 1]), np.diag([1, 1.1, 1, 1]), np.eye(4, k=1) + np.eye(4)):
        affine = scan.affine @ change
        voxels = np.zeros((24, 20, 4), np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, affine[:, [2, 1, 0, 3]]), tmp_path / "ct.nii")
        with pytest.raises(UserError, match="same grid|beyond its image|cannot be inverted"):
            read_ids(path, formats.read_scan(tmp_path / "ct.nii"), NAMES)


def test_a_segmentation_of_a_picture(tmp_path):
    """An X-ray that was converted: one slice and one frame belong together."""
    header = ct_slice(
        0, 1, {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    )
    del header.ImagePositionPatient, header.ImageOrientationPatient
    header.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    path = write_seg(tmp_path / "masks/x.dcm", [header], truth()[3:])
    image = Scan(np.zeros((1, 20, 24, 1), np.uint8))
    mask = formats.read_mask_scan(path, image, NAMES)
    np.testing.assert_array_equal(mask.pixels[..., 0], truth()[3:])
    with pytest.raises(UserError, match="does not say where it lies"):
        formats.read_mask_scan(path, Scan(np.zeros((4, 20, 24, 1), np.uint8)), NAMES)


def test_segments_that_overlap_are_refused_when_they_are_read(tmp_path):
    write_series(tmp_path / "ct")
    masks = np.stack([truth() > 0, truth() == 2], axis=-1).astype(np.uint8)
    scan = formats.read_scan(tmp_path / "ct")
    (tmp_path / "a.dcm").write_bytes(dicom_seg.encode_seg(masks, NAMES, scan.header))
    seg = hd.seg.segread(tmp_path / "a.dcm")
    assert seg.SegmentsOverlap == "YES"
    uids = [header.SOPInstanceUID for header in scan.header]
    found = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=True)
    np.testing.assert_array_equal(found, masks)
    with pytest.raises(UserError, match="its segments overlap"):
        formats.read_mask_scan(tmp_path / "a.dcm", scan, NAMES)


# ---------------------------------------------------------------------------------------- written


@pytest.mark.parametrize("name", dicom_seg.EMPTY_IF_MISSING + ("FrameOfReferenceUID", "Modality"))
def test_what_anonymisers_remove_is_written_empty(tmp_path, name):
    write_series(tmp_path / "ct")
    for path in (tmp_path / "ct").iterdir():
        header = pydicom.dcmread(path)
        header.pop(name, None)
        header.save_as(path)
    scan = formats.read_scan(tmp_path / "ct")
    (tmp_path / "a.dcm").write_bytes(dicom_seg.encode_seg(truth(), NAMES, scan.header))
    mask = formats.read_mask_scan(tmp_path / "a.dcm", scan, NAMES)
    np.testing.assert_array_equal(mask.pixels[..., 0], truth())
    assert name in pydicom.dcmread(tmp_path / "a.dcm")


@pytest.mark.parametrize("name", ["SliceThickness", "SpacingBetweenSlices"])
@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_thickness_breaks_nothing(tmp_path, name, value):
    write_series(tmp_path / "ct", **{name: value})
    scan = formats.read_scan(tmp_path / "ct")
    assert scan.spacing_mm == (5, 0.7, 0.8)
    (tmp_path / "a.dcm").write_bytes(dicom_seg.encode_seg(truth(), NAMES, scan.header))
    ids = read_ids(tmp_path / "a.dcm", formats.read_scan(tmp_path / "ct"), NAMES)
    np.testing.assert_array_equal(ids, truth())


@pytest.mark.parametrize("name", dicom_seg.SOURCE_UIDS)
def test_without_a_uid_nothing_can_refer_to_it(tmp_path, name):
    write_series(tmp_path / "ct")
    headers = headers_of(tmp_path / "ct")
    for header in headers:
        delattr(header, name)
    with pytest.raises(UserError, match=f"no DICOM segmentation can refer .*lack {name}"):
        dicom_seg.encode_seg(truth(), NAMES, headers)


def test_the_same_mask_has_the_same_uids(tmp_path):
    write_series(tmp_path / "ct")
    headers = headers_of(tmp_path / "ct")

    def uids(ids, version="1"):
        (tmp_path / "a.dcm").write_bytes(dicom_seg.encode_seg(ids, NAMES, headers, version))
        made = pydicom.dcmread(tmp_path / "a.dcm")
        assert made.SOPInstanceUID.is_valid and made.SOPInstanceUID != made.SeriesInstanceUID
        return made.SOPInstanceUID, made.SeriesInstanceUID

    first = uids(truth())
    assert uids(truth()) == first
    for other in (uids(0 * truth()), uids(truth(), "2")):
        assert not set(other) & set(first)


def test_highdicom_and_simpleitk_read_the_same_mask(tmp_path):
    """SimpleITK reads the frames, and their places; they are those of the source."""
    write_series(tmp_path / "ct")
    scan = formats.read_scan(tmp_path / "ct")
    (tmp_path / "a.dcm").write_bytes(dicom_seg.encode_seg(truth(), NAMES, scan.header))
    seg = hd.seg.segread(tmp_path / "a.dcm")
    uids = [header.SOPInstanceUID for header in scan.header]
    options = {"combine_segments": True, "ignore_spatial_locations": True}
    np.testing.assert_array_equal(seg.get_pixels_by_source_instance(uids, **options), truth())
    frames = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.dcm")))
    made = pydicom.dcmread(tmp_path / "a.dcm")
    found = np.zeros_like(truth())
    for frame, group in zip(frames, made.PerFrameFunctionalGroupsSequence, strict=True):
        z = round(group.PlanePositionSequence[0].ImagePositionPatient[2] / 5)
        found[z][frame > 0] = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    np.testing.assert_array_equal(found, truth())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("StudyDate", "19"),
        ("StudyTime", "25:61"),
        ("PatientBirthDate", "unknown"),
        ("PatientSex", "U"),
        ("PatientName", "Doe^Ann\\Roe^Bob"),
        ("SpecificCharacterSet", "ISO 2022 IR 87"),
        ("SpecificCharacterSet", "nonsense"),
        ("StudyDate", "2020.01.01"),
        ("SliceThickness", "0"),
    ],
)
def test_odd_values_of_the_source_break_nothing(tmp_path, name, value):
    write_series(tmp_path / "ct", **{name: value})
    scan = formats.read_scan(tmp_path / "ct")
    (tmp_path / "a.dcm").write_bytes(dicom_seg.encode_seg(truth(), NAMES, scan.header))
    np.testing.assert_array_equal(read_ids(tmp_path / "a.dcm", scan, NAMES), truth())


def test_check_measures_segmentations_and_counts_the_patients_of_headers(tmp_path, capsys):
    """Thin lines, in two series of each patient; file names tell the series alone."""
    rows, columns = np.indices((512, 512))
    lines = np.uint8((rows + columns) % 40 < 3)
    for name in ("images", "masks"):
        (tmp_path / "set" / name).mkdir(parents=True)
    for number in range(8):
        write_series(
            tmp_path / str(number),
            positions=(0,),
            PatientID=f"patient {number // 2}",
            Rows=512,
            Columns=512,
            PixelData=np.uint16(1000 + 200.0 * lines + 9 * number).tobytes(),
        )
        [image] = (tmp_path / str(number)).iterdir()
        seg = tmp_path / "set" / "masks" / f"IM-{number // 2:04}-{number % 2:04}.dcm"
        seg.write_bytes(dicom_seg.encode_seg(lines[None], ["line"], [pydicom.dcmread(image)]))
        image.rename(tmp_path / "set" / "images" / seg.name)
    data.check(tmp_path / "set", classes="line", output=tmp_path / "page")
    said = capsys.readouterr().out
    assert "half of it is thinner than 3 pixels" in said and "patients   4: " in said
    assert "index.csv" not in said
