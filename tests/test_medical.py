"""DICOM, NIfTI and TIFF: known arrays that other libraries wrote are read as they are.

Masks are written in the format of their image.
"""

import io
import itertools
import pickle
import shutil
import warnings
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from nibabel import orientations
from pydicom.data import data_manager

from dataset.layouts import Pair
from dataset.reading import read_pair
from imaging import dicom, formats, pictures, writing
from imaging.dicom import dicom_series
from imaging.labels import Classes
from imaging.scan import MAX_BYTES, Scan, check_declared_bytes
from inference.inputs import list_inputs
from utils import UserError

FILES = Path(data_manager.__file__).parent / "test_files"


def compressed() -> list[str]:
    """Name pydicom's own test files whose pixels are compressed."""
    names = []
    for path in sorted(FILES.glob("*.dcm")):
        header = pydicom.dcmread(path, force=True)
        syntax = header.file_meta.get("TransferSyntaxUID")
        if syntax and syntax.is_compressed and "PixelData" in header:
            names.append(path.name)
    return names


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pydicom's, about values in its own test files
    COMPRESSED = compressed()
TWELVE_BITS = ("JPEG-lossy.dcm", "JPGExtended.dcm")
BROKEN = "JPEG2000-embedded-sequence-delimiter.dcm"  # made to try parsers: its codestream is none
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "name", [name for name in COMPRESSED if "rle" not in name.lower() and name != BROKEN]
)
def test_compressed_pixels_are_what_gdcm_says(name):
    """GDCM is another decoder, written in C++.

    It cannot decode JPEG of 12 bits. Those files are compared with the same image in JPEG 2000.
    """
    header = pydicom.dcmread(FILES / name)
    pixels = dicom.decode_dicom((FILES / name).read_bytes(), MAX_BYTES).pixels.squeeze()
    if name in TWELVE_BITS:
        same = formats.read_scan(FILES / "JPEG2000.dcm").pixels.squeeze()
        assert np.corrcoef(pixels.ravel(), same.ravel())[0, 1] > 0.95
        return
    expected = pydicom.pixels.pixel_array(header, decoding_plugin="gdcm")
    if expected.ndim == 2:
        expected = expected * np.float32(header.get("RescaleSlope", 1)) + np.float32(
            header.get("RescaleIntercept", 0)
        )
    # Padding has another level: that below -1500 HU too, which no tissue has.
    kept = expected.squeeze() >= -1500
    if "PixelPaddingValue" in header:
        kept &= header.pixel_array != header.PixelPaddingValue
    np.testing.assert_array_equal(pixels[kept], expected.squeeze()[kept])


@pytest.mark.parametrize("name", [name for name in COMPRESSED if "rle" in name.lower()])
def test_run_length_pixels_are_those_of_the_uncompressed_file(name):
    """pydicom has some files compressed and not; of the others shape and colours are known."""
    pixels = dicom.decode_dicom((FILES / name).read_bytes(), MAX_BYTES).pixels
    if name == "MR_small_RLE.dcm":
        np.testing.assert_array_equal(pixels, formats.read_scan(FILES / "MR_small.dcm").pixels)
    elif name.startswith("SC_rgb"):
        frames = 2 if "2frame" in name else 1
        assert pixels.shape == (frames, 100, 100, 3)
        top = np.iinfo(pixels.dtype).max
        assert pixels[0, 5, 50].tolist() == [top, 0, 0] and pixels[0, -5, 50].tolist() == [
            top,
            top,
            top,
        ]


def test_all_syntaxes_are_there():
    names = {pydicom.dcmread(FILES / name).file_meta.TransferSyntaxUID.name for name in COMPRESSED}
    assert len(names) == 8
    with pytest.raises(UserError, match="pixels cannot be decoded"):
        formats.read_scan(FILES / BROKEN)


# ----------------------------------------------------------------------- DICOM written by highdicom


def ct_slice(position: float, number: int, uids: dict) -> pydicom.Dataset:
    """Make one file of a CT series, 12 bits in HU: its grey levels tell its place."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = pydicom.uid.CTImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    for name, uid in uids.items():
        setattr(header, name, uid)
    for name in (
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "StudyID",
    ):
        setattr(header, name, "")
    header.AccessionNumber, header.Modality, header.InstanceNumber = "", "CT", number
    header.ImagePositionPatient, header.ImageOrientationPatient = (
        [0, 0, position],
        [1, 0, 0, 0, 1, 0],
    )
    header.PixelSpacing, header.SliceThickness = [0.7, 0.8], 5
    header.Rows, header.Columns, header.SamplesPerPixel, header.PhotometricInterpretation = (
        20,
        24,
        1,
        "MONOCHROME2",
    )
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = (
        16,
        12,
        11,
        0,
    )
    header.RescaleSlope, header.RescaleIntercept = 2, -1024
    header.WindowCenter, header.WindowWidth = [40, 300], [400, 1500]
    header.PixelData = np.full((20, 24), round(position), np.uint16).tobytes()
    return header


@pytest.fixture
def series(tmp_path):
    """A folder of four CT slices, their names and numbers in another order than their places."""
    uids = {
        n: pydicom.uid.generate_uid()
        for n in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    }
    (tmp_path / "series").mkdir()
    for number, position in enumerate((10, 2.5, 5, 7.5)):
        ct_slice(position, number, uids).save_as(
            tmp_path / "series" / f"IM{number}", enforce_file_format=True
        )
    return tmp_path / "series"


def test_a_series_is_a_volume_in_the_order_of_its_places(series):
    (series / "notes.txt").write_text("not DICOM")
    scan = formats.read_scan(series)
    assert scan.pixels.shape == (4, 20, 24, 1)
    assert scan.pixels[:, 0, 0, 0].tolist() == [
        2 * round(z) - 1024 for z in (2.5, 5, 7.5, 10)
    ]  # HU
    assert scan.spacing_mm == (2.5, 0.7, 0.8) and scan.window == (40, 400)


def test_low_is_white_is_inverted():
    header = pydicom.dcmread(FILES / "CT_small.dcm")
    straight = formats.read_scan(FILES / "CT_small.dcm").pixels
    header.PhotometricInterpretation = "MONOCHROME1"
    buffer = io.BytesIO()
    header.save_as(buffer)
    turned = formats.decode_scan(buffer.getvalue()).pixels
    stored = header.pixel_array.astype(int)  # 16 bits with a sign: 5 becomes -6
    expected = header.RescaleSlope * (-1 - stored) + header.RescaleIntercept
    np.testing.assert_array_equal(turned[0, ..., 0], expected)
    assert np.ptp(turned + straight) == 0


def test_a_segmentation_refers_to_its_source_and_reads_back(series, tmp_path):
    ids = np.zeros((4, 20, 24), np.uint8)
    ids[1, 2:9, 3:8], ids[3, 5:7, 5:9] = 1, 2
    path = writing.write_mask(
        tmp_path / "out" / "case", ids, ["liver", "tumour"], formats.read_scan(series)
    ).path
    assert path.name == "case.dcm"
    segmentation = highdicom.seg.segread(path)
    assert [segmentation.get_segment_description(i).segment_label for i in (1, 2)] == [
        "liver",
        "tumour",
    ]
    headers = sorted(
        (pydicom.dcmread(file) for file in series.iterdir()),
        key=lambda h: h.ImagePositionPatient[2],
    )
    uids = [header.SOPInstanceUID for header in headers]
    found = segmentation.get_pixels_by_source_instance(
        uids, combine_segments=True, ignore_spatial_locations=True
    )
    np.testing.assert_array_equal(found, ids)
    writing.write_mask(
        tmp_path / "out" / "empty", 0 * ids, ["liver", "tumour"], formats.read_scan(series)
    )


def test_a_segmentation_serves_as_a_mask(series, tmp_path):
    """A prediction, perhaps corrected in a PACS, can be trained on. Empty slices stay empty."""
    ids = np.zeros((4, 20, 24), np.uint8)
    ids[1, 2:9, 3:8], ids[3, 5:7, 5:9] = 1, 2
    for what in (ids, 0 * ids, np.where(ids == 2, 2, 0)):
        path = writing.write_mask(
            tmp_path / "masks" / "case", what, ["liver", "tumour"], formats.read_scan(series)
        ).path
        _, found = read_pair(Pair(series, (path,)), Classes("liver,tumour"))
        np.testing.assert_array_equal(found.mask, what)
    other = FILES / "CT_small.dcm"
    path = writing.write_mask(
        tmp_path / "masks" / "other",
        np.ones((1, 128, 128), np.uint8),
        ["liver"],
        formats.read_scan(other),
    ).path
    _, found = read_pair(Pair(other, (path,)), Classes("liver"))
    assert found.mask.all()
    with pytest.raises(UserError, match=r"other\.dcm: not a segmentation of its image"):
        read_pair(Pair(series, (path,)), Classes("liver"))


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "SC_rgb_jpeg.dcm", "examples_overlay.dcm"]
)
def test_one_dicom_file_gets_a_segmentation(tmp_path, name):
    shape = formats.read_scan(FILES / name).pixels.shape[:3]
    path = writing.write_mask(
        tmp_path / "mask", np.ones(shape, np.uint8), ["thing"], formats.read_scan(FILES / name)
    ).path
    source, made = pydicom.dcmread(FILES / name), pydicom.dcmread(path)
    assert made.Modality == "SEG" and made.StudyInstanceUID == source.StudyInstanceUID
    assert (
        made.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID
        == source.SOPInstanceUID
    )


def test_segments_are_known_by_their_labels(series, tmp_path):
    ids = np.zeros((4, 20, 24), np.uint8)
    ids[1, 2:9, 3:8], ids[3, 5:7, 5:9] = 1, 2
    path = writing.write_mask(
        tmp_path / "masks" / "case", ids, ["tumour", "liver"], formats.read_scan(series)
    ).path
    _, found = read_pair(Pair(series, (path,)), Classes("liver,tumour"))
    np.testing.assert_array_equal(found.mask, np.array([0, 2, 1])[ids])
    with pytest.raises(
        UserError, match="segments tumour, liver; expected the classes liver, spleen"
    ):
        read_pair(Pair(series, (path,)), Classes("liver,spleen"))


def test_names_in_any_script_are_written(series, tmp_path):
    for path in series.iterdir():
        header = pydicom.dcmread(path)
        header.SpecificCharacterSet, header.PatientName = "ISO_IR 100", "Müller^Jörg"
        header.save_as(path)
    path = writing.write_mask(
        tmp_path / "mask", np.ones((4, 20, 24), np.uint8), ["печень"], formats.read_scan(series)
    ).path
    made = pydicom.dcmread(path)
    assert (
        str(made.PatientName) == "Müller^Jörg" and made.SegmentSequence[0].SegmentLabel == "печень"
    )


def test_where_no_segmentation_can_be_made_the_mask_is_nifti_and_a_note_says_why(tmp_path):
    header = pydicom.dcmread(FILES / "CT_small.dcm")
    del header.StudyInstanceUID
    header.save_as(tmp_path / "a.dcm")
    scan = formats.read_scan(tmp_path / "a.dcm")
    path, note = writing.write_mask(tmp_path / "mask", np.ones((1, 128, 128), bool), ["x"], scan)
    assert path == tmp_path / "mask.nii.gz" and "no DICOM segmentation can refer to it" in note
    assert note.endswith("; its mask is mask.nii.gz instead")
    mask = formats.read_mask_scan(path)
    assert (mask.pixels == 1).all()
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)


def test_frames_have_grey_levels_and_spacing_of_their_own():
    """Enhanced CT keeps slope, intercept, window and spacing in groups per frame."""
    header, one = pydicom.dcmread(FILES / "CT_small.dcm"), pydicom.Dataset
    stored = header.pixel_array
    groups = []
    for i in range(2):
        values, window, measures, group = one(), one(), one(), one()
        values.RescaleSlope, values.RescaleIntercept = 1 + i, -1024
        window.WindowCenter, window.WindowWidth = 40, 400
        measures.PixelSpacing, measures.SliceThickness = [0.5, 0.6], 3
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [values], [window]
        group.PixelMeasuresSequence = [measures]
        groups.append(group)
    for name in (
        "RescaleSlope",
        "RescaleIntercept",
        "PixelSpacing",
        "SliceThickness",
        "SpacingBetweenSlices",
    ):
        delattr(header, name)
    header.PerFrameFunctionalGroupsSequence, header.NumberOfFrames = groups, 2
    header.PixelData = np.stack([stored, stored]).tobytes()
    buffer = io.BytesIO()
    header.save_as(buffer)
    scan = formats.decode_scan(buffer.getvalue())
    for i in range(2):
        np.testing.assert_array_equal(scan.pixels[i, ..., 0], (1.0 + i) * stored - 1024)
    assert scan.window == (40, 400) and scan.spacing_mm == (3, 0.5, 0.6)


def test_other_files_beside_a_series_are_ignored(series, tmp_path):
    (series / "AUTORUN.INF").write_text("[autorun]")
    (series / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for name in ("1.2.840.1.1", "1.2.840.1.2"):
        shutil.copytree(series, tmp_path / "images" / name)
    found = list_inputs(tmp_path / "images", tmp_path / "out").items
    assert [item.name for item in found] == ["1.2.840.1.1", "1.2.840.1.2"]
    assert [len(item.files) for item in found] == [4, 4]
    assert formats.read_scan(tmp_path / "images" / "1.2.840.1.1").pixels.shape == (4, 20, 24, 1)


def test_a_damaged_slice_is_named(series):
    whole = (series / "IM2").read_bytes()
    (series / "IM2").write_bytes(whole[: len(whole) - 500])
    with pytest.raises(UserError, match="IM2: its pixels cannot be decoded"):
        formats.read_scan(series)


def test_masks_have_the_values_that_the_training_masks_had(tmp_path):
    ids = np.zeros((3, 20, 24), np.uint8)
    ids[1, 5:9], ids[2, 3:4] = 1, 2
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 20, 3)), np.eye(4)), tmp_path / "a.nii")
    tifffile.imwrite(tmp_path / "a.tif", ids, photometric="minisblack")
    for source, levels in itertools.product(("a.nii", "a.tif"), ([0, 63, 126], [0, 300, 2])):
        made = writing.write_mask(
            tmp_path / "mask", ids, ["x", "y"], formats.read_scan(tmp_path / source), levels
        ).path
        np.testing.assert_array_equal(
            formats.read_mask_scan(made).pixels[..., 0], np.array(levels)[ids]
        )


def test_a_folder_of_slices_is_one_volume_and_one_of_images_is_not(series, tmp_path):
    (volume,) = list_inputs(series).items
    assert volume.is_volume and volume.path == series and len(volume.files) == 4
    (tmp_path / "images").mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm"):
        shutil.copy(FILES / name, tmp_path / "images" / name)
    assert len(list_inputs(tmp_path / "images").items) == 2


@pytest.mark.parametrize("turned", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [0, 1, 0, 0, 0, -1]])
def test_a_nifti_mask_of_a_series_fits_or_is_refused(tmp_path, turned):
    """Axial slices fit. A prone patient's or sagittal ones lie otherwise in NIfTI: an error."""
    uids = {
        n: pydicom.uid.generate_uid()
        for n in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    }
    (tmp_path / "series").mkdir()
    along, down = np.array(turned[:3]), np.array(turned[3:])
    axis = np.cross(along, down)
    for i in range(4):
        header = ct_slice(i, i, uids)
        header.ImageOrientationPatient, header.ImagePositionPatient = (
            turned,
            (5.0 * i * axis + (10, 20, 30)).tolist(),
        )
        header.save_as(tmp_path / "series" / f"{i}", enforce_file_format=True)
    ids = np.zeros((4, 20, 24), np.uint8)
    ids[1, 3:6, 4:10] = 1
    affine = np.eye(4)  # of columns, rows, slices, as dcm2niix writes it
    affine[:3] = np.stack([0.8 * along, 0.7 * down, 5.0 * axis, (10, 20, 30)], axis=1)
    affine = np.diag((-1, -1, 1, 1)) @ affine
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / "series.nii.gz"
    nibabel.save(nibabel.Nifti1Image(ids.transpose(2, 1, 0), affine), path)
    pair = Pair(tmp_path / "series", (path,))
    if turned[0] == 1:
        np.testing.assert_array_equal(read_pair(pair, Classes("x"))[1].mask, ids)
        affine[0, 0] *= 1.2  # wider pixels
        nibabel.save(nibabel.Nifti1Image(ids.transpose(2, 1, 0), affine), path)
    with pytest.raises(
        UserError, match=r"series\.nii\.gz: (its affine places it|4 slices|\d+ slices)"
    ):
        read_pair(pair, Classes("x"))


def test_float_pixels_are_read():
    header = pydicom.dcmread(FILES / "CT_small.dcm")
    values = np.random.default_rng(0).normal(size=(128, 128)).astype(np.float32)
    del header.PixelData, header.PixelRepresentation, header.BitsStored, header.HighBit
    header.BitsAllocated, header.FloatPixelData = 32, values.tobytes()
    del header.RescaleSlope, header.RescaleIntercept
    buffer = io.BytesIO()
    header.save_as(buffer)
    np.testing.assert_array_equal(formats.decode_scan(buffer.getvalue()).pixels[0, ..., 0], values)


# --------------------------------------------------------------------------------- NIfTI by nibabel


def ball(shape=(24, 30, 20)) -> np.ndarray:
    """An off-centre ellipsoid in a volume (x, y, z)."""
    x, y, z = np.ogrid[tuple(map(slice, shape))]
    return ((x - 8) / 5) ** 2 + ((y - 18) / 8) ** 2 + ((z - 6) / 4) ** 2 < 1


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_values_and_spacing_of_nifti(tmp_path, ending):
    voxels = np.random.default_rng(0).normal(0, 300, (24, 30, 20)).astype(np.float32)
    affine = np.diag([0.7, 0.8, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / f"a{ending}")
    scan = formats.read_scan(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(
        scan.pixels[..., 0], voxels[::-1, ::-1].transpose(2, 1, 0)
    )  # to left, posterior
    assert scan.spacing_mm == pytest.approx((3.0, 0.8, 0.7))


def test_a_mask_keeps_both_affines_of_its_image(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((24, 30, 20), np.int16), None)
    image.set_sform(np.diag((1, 1, 3, 1)), 2)
    shifted = np.diag((1.0, 1, 3, 1))
    shifted[:3, 3] = 10
    image.set_qform(shifted, 1)
    nibabel.save(image, tmp_path / "a.nii")
    path = writing.write_mask(
        tmp_path / "mask",
        np.ones((20, 30, 24), np.uint8),
        ["x"],
        formats.read_scan(tmp_path / "a.nii"),
    ).path
    mask = nibabel.load(path)
    for name in ("sform", "qform"):
        ours, theirs = (getattr(one, f"get_{name}")(coded=True) for one in (mask, image))
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
    assert mask.get_data_dtype() == np.uint8 and (np.asarray(mask.dataobj) == 1).all()


ALL_WAYS = [  # 48 ways to store a volume
    "".join(axes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for axes in itertools.product(*order)
]


@pytest.mark.parametrize(
    "spacing", [(0.8, 0.8, 3.0), (3.0, 0.8, 0.8), (0.8, 3.0, 0.8), (1.0, 1.0, 1.0)]
)
def test_a_volume_is_the_same_however_it_is_stored(tmp_path, spacing):
    """Slices are those of the acquisition; the mask is written where the object lies."""
    voxels = nibabel.Nifti1Image(ball().astype(np.float32), np.diag([*spacing, 1.0]))
    reference = None
    for codes in ALL_WAYS:
        turn = orientations.ornt_transform(
            orientations.io_orientation(voxels.affine), orientations.axcodes2ornt(codes)
        )
        stored = voxels.as_reoriented(turn)
        nibabel.save(stored, tmp_path / "a.nii")
        scan = formats.read_scan(tmp_path / "a.nii")
        reference = reference or scan
        np.testing.assert_array_equal(scan.pixels, reference.pixels)
        assert scan.spacing_mm == pytest.approx(reference.spacing_mm)
        assert scan.spacing_mm[0] == max(spacing)
        path = writing.write_mask(
            tmp_path / "mask",
            scan.pixels[..., 0] > 0,
            ["ball"],
            formats.read_scan(tmp_path / "a.nii"),
        ).path
        mask = nibabel.load(path)
        assert mask.affine.tolist() == nibabel.load(tmp_path / "a.nii").affine.tolist()
        np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(stored.dataobj))


@pytest.mark.parametrize("shape", [(20, 20), (20, 20, 1), (20, 20, 3, 1)])
def test_odd_dimensions_of_nifti(tmp_path, shape):
    nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.uint8), np.eye(4)), tmp_path / "a.nii")
    scan = formats.read_scan(tmp_path / "a.nii")
    path = writing.write_mask(tmp_path / "mask", scan.pixels[..., 0], ["x"], scan).path
    assert nibabel.load(path).shape == shape


def test_a_series_of_volumes_in_time_is_refused(tmp_path):
    nibabel.save(
        nibabel.Nifti1Image(np.ones((20, 20, 3, 50), np.uint8), np.eye(4)), tmp_path / "a.nii"
    )
    with pytest.raises(UserError, match="50 volumes, probably time points; expected"):
        formats.read_scan(tmp_path / "a.nii")


# --------------------------------------------------------------------------------- TIFF by tifffile


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_pages_of_a_tiff_are_slices(tmp_path, kind, compression):
    pages = np.random.default_rng(0).integers(0, 120, (5, 20, 31)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", pages, compression=compression, photometric="minisblack")
    scan = formats.read_scan(tmp_path / "a.tif")
    assert scan.pixels.dtype == kind and scan.spacing_mm is None
    np.testing.assert_array_equal(scan.pixels[..., 0], pages)
    path = writing.write_mask(
        tmp_path / "mask", pages > 60, ["x"], formats.read_scan(tmp_path / "a.tif")
    ).path
    np.testing.assert_array_equal(tifffile.imread(path), 255 * (pages > 60))


def test_spacing_of_a_tiff(tmp_path):
    pages = np.zeros((3, 20, 31), np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif",
        pages,
        imagej=True,
        resolution=(5, 4),
        metadata={"unit": "mm", "spacing": 2.5},
    )
    assert formats.read_scan(tmp_path / "a.tif").spacing_mm == (2.5, 0.25, 0.2)
    tifffile.imwrite(tmp_path / "b.tif", pages[0], resolution=(50, 40), resolutionunit="CENTIMETER")
    assert formats.read_scan(tmp_path / "b.tif").spacing_mm is None  # for a printer


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_a_tiff_is_read_as_viewers_show_it(tmp_path, kind):
    rng, most = np.random.default_rng(0), np.iinfo(kind).max
    grey, colour = (
        rng.integers(0, 200, (20, 31)).astype(kind),
        rng.integers(0, 200, (20, 31, 3)).astype(kind),
    )
    tags = [(274, "H", 1, 3, True)]  # upside down, say viewers
    tifffile.imwrite(tmp_path / "turned.tif", grey, photometric="minisblack", extratags=tags)
    tifffile.imwrite(tmp_path / "white.tif", most - grey, photometric="miniswhite")
    tifffile.imwrite(
        tmp_path / "planes.tif",
        np.moveaxis(colour, -1, 0),
        photometric="rgb",
        planarconfig="separate",
    )
    tifffile.imwrite(tmp_path / "rgb.tif", colour, photometric="rgb")
    turned = grey[::-1, ::-1]
    for name, expected in (
        ("turned", turned),
        ("white", grey),
        ("planes", colour),
        ("rgb", colour),
    ):
        pixels = formats.read_scan(tmp_path / f"{name}.tif").pixels[0]
        np.testing.assert_array_equal(pixels.squeeze(), expected)


def test_a_tiff_pyramid_is_its_largest_picture(tmp_path):
    picture = np.random.default_rng(0).integers(0, 200, (64, 64), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(picture, photometric="minisblack")
        file.write(picture[::2, ::2], photometric="minisblack", subfiletype=1)
    np.testing.assert_array_equal(formats.read_scan(tmp_path / "a.tif").pixels[0, ..., 0], picture)


# ----------------------------------------------------------------------------- the table of formats


def write_sources(folder: Path) -> list[Path]:
    """Write an image of each kind that gets masks of its own."""
    pixels = np.random.default_rng(0).integers(0, 200, (3, 20, 24), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(pixels.T, np.eye(4)), folder / "volume.nii.gz")
    tifffile.imwrite(folder / "pages.tif", pixels, photometric="minisblack")
    pictures.write_picture(folder / "picture.png", pixels[0])
    pictures.write_picture(folder / "photo.jpg", pixels[0])
    shutil.copy(FILES / "CT_small.dcm", folder / "slice.dcm")
    return sorted(folder.iterdir())


def test_a_mask_is_written_without_reading_the_image_again(series, tmp_path):
    (tmp_path / "images").mkdir()
    suffixes = {}
    for source in [*write_sources(tmp_path / "images"), series]:
        scan = formats.read_scan(source)
        shutil.rmtree(source) if source.is_dir() else source.unlink()
        ids = np.zeros(scan.pixels.shape[:3], np.uint8)
        ids[-1, 3:9, 4:12] = 1
        path = writing.write_mask(tmp_path / f"mask_{source.name}", ids, ["thing"], scan).path
        np.testing.assert_array_equal(
            formats.read_mask_scan(path, scan, ["thing"]).pixels[..., 0] > 0, ids > 0
        )
        suffixes[source.name] = path.name.removeprefix(f"mask_{source.name}")
    assert suffixes == {
        "volume.nii.gz": ".nii.gz",
        "pages.tif": ".tif",
        "picture.png": ".png",
        "photo.jpg": ".png",
        "slice.dcm": ".dcm",
        "series": ".dcm",
    }


def test_every_file_of_a_pair_is_read_once(series, tmp_path, monkeypatch):
    """Decoding a large volume takes seconds, and so did the second reading that checked affines."""
    scan = formats.read_scan(series)
    affine = scan.affine[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 4), np.uint8), affine), tmp_path / "a.nii")
    opened = []
    for module in (formats, dicom_series):
        monkeypatch.setattr(
            module, "read_bytes", lambda path: opened.append(path) or Path(path).read_bytes()
        )
    _, truth = read_pair(Pair(series, (tmp_path / "a.nii",)), Classes("all"))
    assert truth.mask.all()
    assert sorted(opened) == sorted([*series.iterdir(), tmp_path / "a.nii"])


def test_a_scan_keeps_no_second_copy_of_its_pixels(series, tmp_path):
    (tmp_path / "images").mkdir()
    for source in [*write_sources(tmp_path / "images"), series]:
        scan = formats.read_scan(source)
        assert len(pickle.dumps(scan.header)) < 20_000, source
        # pydicom holds the file that it read.
        for header in scan.header if source.suffix in ("", ".dcm") else ():
            assert header.buffer is None and "PixelData" not in header


def test_a_format_is_added_by_one_line(tmp_path, monkeypatch):
    """A made-up format of 16 x 16 pixels: recognised by content, its masks are PNG or TIFF."""

    def decode_raw(content: bytes, max_bytes: int) -> Scan:
        pixels = np.frombuffer(content[4:], np.uint8)
        check_declared_bytes(max_bytes, len(pixels))
        return Scan(pixels.reshape(-1, 16, 16, 1))

    made_up = formats.Format("Raw", (".raw",), ((0, b"RAW!"),), decode_raw)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, made_up))
    for slices, suffix in ((1, ".png"), (3, ".tif")):
        (tmp_path / "a.raw").write_bytes(b"RAW!" + bytes(range(256)) * slices)
        scan = formats.read_scan(tmp_path / "a.raw")
        assert scan.format == "Raw" and scan.pixels.shape == (slices, 16, 16, 1)
        path = writing.write_mask(tmp_path / "mask", scan.pixels[..., 0] > 100, ["x"], scan).path
        assert path == tmp_path / f"mask{suffix}"
    with pytest.raises(UserError, match="declares"):
        formats.read_scan(tmp_path / "a.raw", max_bytes=700)


def test_endings_belong_to_one_format_each():
    assert len(set(formats.SUFFIXES)) == len(formats.SUFFIXES)
    assert all(suffix == suffix.lower() for suffix in formats.SUFFIXES)


def test_a_segmentation_of_another_file_name_is_one(series, tmp_path):
    scan = formats.read_scan(series)
    ids = np.zeros((4, 20, 24), np.uint8)
    ids[1, 2:9] = 1
    path = writing.write_mask(tmp_path / "mask", ids, ["x"], scan).path
    path = path.rename(tmp_path / "without_ending")
    np.testing.assert_array_equal(formats.read_mask_scan(path, scan, ["x"]).pixels[..., 0], ids)


def test_faults_of_image_and_mask_are_both_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"text")
    (tmp_path / "mask.png").write_bytes(b"text")
    with pytest.raises(UserError) as raised:
        read_pair(Pair(tmp_path / "image.png", (tmp_path / "mask.png",)), Classes("x"))
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(tmp_path / "image.png"),
        str(tmp_path / "mask.png"),
    ]
