"""NRRD and MetaImage: read as SimpleITK reads them, and masks lie where it says the image lies."""

import gzip
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging import formats, writing
from imaging.scan import Scan
from utils import UserError

sitk = pytest.importorskip("SimpleITK")
# Directions of x, y and z in LPS, column by column: axial, turned, sagittal, oblique.
DIRECTIONS = {
    "axial": np.eye(3),
    "mirrored": np.diag([-1.0, 1.0, -1.0]),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0.0]]),
    "oblique": np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]]),
}


def make_image(direction="axial", kind="int16", shape=(5, 20, 30), spacing=(0.5, 0.6, 2.0)):
    voxels = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(DIRECTIONS[direction].ravel())
    return image


def world_of_ids(image, value):
    """The place in LPS of every voxel of a value, sorted."""
    places = np.argwhere(sitk.GetArrayFromImage(image) == value)[:, ::-1]
    points = [image.TransformIndexToPhysicalPoint(place.tolist()) for place in places]
    return np.array(sorted(np.round(points, 3).tolist()))


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd", "nii.gz"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mask_lies_where_simpleitk_says_the_image_lies(tmp_path, ending, direction):
    image = make_image(direction)
    sitk.WriteImage(image, tmp_path / f"a.{ending}")
    scan = formats.read_scan(tmp_path / f"a.{ending}")
    brightest = (scan.pixels[..., 0] == 99).astype(np.uint8)
    written = writing.write_mask(tmp_path / "mask", brightest, ["x"], scan)
    assert not written.note
    mask = sitk.ReadImage(written.path)
    assert mask.GetSize() == image.GetSize()
    for name in ("Origin", "Spacing", "Direction"):
        found, expected = (getattr(one, f"Get{name}")() for one in (mask, image))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(mask) == 1, sitk.GetArrayFromImage(image) == 99
    )


@pytest.mark.parametrize("source", ["nrrd", "mha", "nii.gz"])
@pytest.mark.parametrize("kind", ["nrrd", "nifti"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mask_in_another_format_lies_at_the_same_place(tmp_path, source, kind, direction):
    image = make_image(direction)
    sitk.WriteImage(image, tmp_path / f"a.{source}")
    scan = formats.read_scan(tmp_path / f"a.{source}")
    brightest = (scan.pixels[..., 0] == 99).astype(np.uint8)
    written = writing.write_mask(tmp_path / "mask", brightest, ["x"], scan, kind=kind)
    mask = sitk.ReadImage(written.path)
    expected = world_of_ids(image, 99)
    np.testing.assert_allclose(world_of_ids(mask, 1), expected, atol=2e-3)


def test_volumes_are_the_same_in_every_format(tmp_path):
    scans = []
    for ending in ("nrrd", "mha", "mhd", "nii.gz"):
        sitk.WriteImage(make_image("sagittal"), tmp_path / f"{ending[0]}.{ending}")
        scans.append(formats.read_scan(tmp_path / f"{ending[0]}.{ending}"))
    for scan in scans[1:]:
        np.testing.assert_array_equal(scan.pixels, scans[0].pixels)
        np.testing.assert_allclose(scan.affine, scans[0].affine, atol=1e-5)
        np.testing.assert_allclose(scan.spacing_mm, (2.0, 0.6, 0.5), rtol=1e-6)


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    "kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
)
def test_values_are_as_stored(tmp_path, ending, is_packed, kind):
    image = make_image(kind=kind)
    sitk.WriteImage(image, tmp_path / f"a.{ending}", is_packed)
    scan = formats.read_scan(tmp_path / f"a.{ending}")
    assert scan.pixels.dtype == kind
    np.testing.assert_array_equal(scan.pixels[..., 0], sitk.GetArrayFromImage(image))


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_pictures_and_channels(tmp_path, ending):
    colours = np.random.default_rng(1).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), path)
    scan = formats.read_scan(path)
    np.testing.assert_array_equal(scan.pixels[0], colours)
    ids = (colours[None, ..., 0] > 100).astype(np.uint8)
    mask = sitk.ReadImage(writing.write_mask(tmp_path / "mask", ids, ["x"], scan).path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), ids[0])
    stack = np.random.default_rng(1).normal(0, 1, (4, 20, 30, 5)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(stack, isVector=True), path)
    scan = formats.read_scan(path)
    assert scan.separate and not scan.has_alpha
    np.testing.assert_array_equal(scan.pixels, stack)


def nrrd(fields: str, data: bytes) -> bytes:
    return f"NRRD0004\n{fields}\n\n".encode() + data


BASE = "type: uchar\ndimension: 3\nsizes: 30 20 3\nencoding: raw"


def test_spaces_units_and_encodings_of_nrrd():
    voxels = np.random.default_rng(0).integers(0, 99, (3, 20, 30), dtype=np.uint8)
    plain = formats.decode_scan(nrrd(f"{BASE}\nspacings: 0.5 0.6 2", voxels.tobytes()))
    np.testing.assert_array_equal(plain.pixels[..., 0], voxels)
    assert plain.spacing_mm == (2.0, 0.6, 0.5)
    steps = "space directions: (0.5,0,0) (0,0.6,0) (0,0,2)\nspace origin: (1,2,3)"
    lps = formats.decode_scan(nrrd(f"{BASE}\nspace: LPS\n{steps}", voxels.tobytes()))
    np.testing.assert_array_equal(lps.affine @ [0, 0, 0, 1], [-1, -2, 3, 1])
    ras = nrrd(f"{BASE}\nspace: right-anterior-superior\n{steps}", voxels.tobytes())
    turned = formats.decode_scan(ras)
    np.testing.assert_array_equal(turned.pixels[..., 0], voxels[:, ::-1, ::-1])
    np.testing.assert_allclose(turned.affine @ [0, 19, 29, 1], [1, 2, 3, 1])
    for name in ("right-anterior-superior-time", "RAST"):
        timed = nrrd(f"{BASE}\nspace: {name}\n{steps}", voxels.tobytes())
        np.testing.assert_array_equal(formats.decode_scan(timed).affine, turned.affine)
    microns = f'{BASE}\nspace: LPS\n{steps}\nspace units: "um" "um" "um"'
    small = formats.decode_scan(nrrd(microns, voxels.tobytes()))
    np.testing.assert_allclose(small.spacing_mm, (0.002, 0.0006, 0.0005))
    for name, packed in {
        "gzip": gzip.compress(voxels.tobytes()),
        "ascii": " ".join(map(str, voxels.ravel())).encode(),
    }.items():
        scan = formats.decode_scan(nrrd(BASE.replace("raw", name), packed))
        np.testing.assert_array_equal(scan.pixels, plain.pixels)


def test_a_mask_of_microns_keeps_its_units(tmp_path):
    steps = 'space: LPS\nspace directions: (2,0,0) (0,2,0) (0,0,5)\nspace units: "um" "um" "um"'
    image = formats.decode_scan(nrrd(f"{BASE}\n{steps}", bytes(1800)))
    path = writing.write_mask(tmp_path / "mask", np.ones((3, 20, 30), bool), ["x"], image).path
    assert sitk.ReadImage(path).GetSpacing() == (2.0, 2.0, 5.0)
    np.testing.assert_allclose(formats.read_scan(path).affine, image.affine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (BASE.replace("uchar", "block"), "its type is block"),
        (BASE.replace("raw", "hex"), "its encoding is hex"),
        (BASE.replace("3\nsizes", "5\nsizes"), "expected 5 numbers"),
        (f"{BASE}\nspace directions: (1,0,0) (2,0,0) (0,0,1)", "cannot be inverted"),
        (f"{BASE}\ndata file: ../../etc/passwd", "a header without voxels"),
        (BASE.replace("30 20 3", "99999 99999 99"), "declares"),
        (BASE.replace("30 20 3", "30 20 4"), "unreadable as NRRD"),
    ],
)
def test_odd_headers_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        formats.decode_scan(nrrd(fields, bytes(1800)))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.raw", "C:\\secret.raw", "a/../../secret.raw", "none.raw"]
)
def test_a_header_reads_no_file_elsewhere(tmp_path, name):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (tmp_path / "in" / "secret.raw").write_bytes(bytes(1800))
    (folder / "x.nhdr").write_bytes(f"NRRD0004\n{BASE}\ndata file: {name}\n".encode())
    fields = "NDims = 3\nDimSize = 30 20 3\nElementType = MET_UCHAR\nElementDataFile = "
    (folder / "y.mhd").write_bytes(f"{fields}{name}\n".encode())
    for path in folder.iterdir():
        with pytest.raises(UserError, match="beside it"):
            formats.read_scan(path)


def test_lists_of_files_are_refused_with_advice(tmp_path):
    (tmp_path / "x.nhdr").write_bytes(f"NRRD0004\n{BASE}\ndata file: LIST\na\nb\n".encode())
    with pytest.raises(UserError, match="several files; expected one"):
        formats.read_scan(tmp_path / "x.nhdr")


WHOLE = {}


def whole_file(ending, tmp_path_factory):
    if ending not in WHOLE:
        path = tmp_path_factory.mktemp("whole") / f"a.{ending}"
        sitk.WriteImage(make_image(), path, ending == "mha")
        WHOLE[ending] = path.read_bytes()
    return WHOLE[ending]


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers_are_read_or_refused(ending, tmp_path_factory, data):
    content = bytearray(whole_file(ending, tmp_path_factory))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(8, 500))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            word = data.draw(st.sampled_from([b"-1", b"nan", b"1e99", b"9999999", b"\n", b"none"]))
            content[place : place + len(word)] = word
    try:
        scan = formats.decode_scan(bytes(content))
    except UserError:
        return
    assert isinstance(scan, Scan) and scan.pixels.ndim == 4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_cropped_mask_of_slicer_is_put_into_its_image(tmp_path, direction):
    image = make_image(direction)
    ids = sitk.GetImageFromArray(np.uint8(sitk.GetArrayFromImage(image) > 50))
    ids.CopyInformation(image)
    sitk.WriteImage(image, tmp_path / "a.nrrd")
    sitk.WriteImage(sitk.RegionOfInterest(ids, (17, 18, 3), (5, 1, 2)), tmp_path / "a.seg.nrrd")
    scan = formats.read_scan(tmp_path / "a.nrrd")
    mask = formats.read_mask_scan(tmp_path / "a.seg.nrrd", scan)
    assert mask.pixels.shape == scan.pixels.shape and "part of its image" in mask.notes[0]
    expected = np.zeros_like(sitk.GetArrayFromImage(ids))
    expected[2:5, 1:19, 5:22] = sitk.GetArrayFromImage(ids)[2:5, 1:19, 5:22]
    whole = sitk.GetImageFromArray(expected)
    whole.CopyInformation(image)
    sitk.WriteImage(whole, tmp_path / "whole.nrrd")
    other = formats.read_mask_scan(tmp_path / "whole.nrrd", scan)
    np.testing.assert_array_equal(mask.pixels, other.pixels)
    ids.SetOrigin((99.0, 0.0, 0.0))
    sitk.WriteImage(sitk.RegionOfInterest(ids, (17, 18, 3), (5, 1, 2)), tmp_path / "b.seg.nrrd")
    assert formats.read_mask_scan(tmp_path / "b.seg.nrrd", scan).pixels.shape != scan.pixels.shape


def test_all_endings_name_one_format():
    for one, other in itertools.combinations(formats.FORMATS, 2):
        assert not {*one.suffixes} & {*other.suffixes}


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_a_series_of_volumes_has_channels(tmp_path, ending):
    image = make_image("sagittal")
    sitk.WriteImage(image, tmp_path / f"one.{ending}")
    sitk.WriteImage(sitk.JoinSeries([image, image + 1]), tmp_path / f"two.{ending}")
    one = formats.read_scan(tmp_path / f"one.{ending}")
    two = formats.read_scan(tmp_path / f"two.{ending}")
    expected = np.concatenate([one.pixels, one.pixels + 1], -1)
    np.testing.assert_array_equal(two.pixels, expected)
    np.testing.assert_allclose(two.affine, one.affine, atol=1e-6)


def test_the_names_of_nrrd_fields_may_have_capitals(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "a.raw").write_bytes(pixels.tobytes())
    head = "NRRD0004\nType: uchar\nDimension: 2\nSizes: 16 16\nEncoding: raw\nData File: a.raw\n"
    (tmp_path / "a.nhdr").write_text(head)
    found = formats.read_scan(tmp_path / "a.nhdr").pixels
    np.testing.assert_array_equal(found[0, ..., 0], pixels)


def test_long_of_metaimage_has_4_bytes(tmp_path):
    head = "NDims = 2\nDimSize = 16 16\nElementType = MET_LONG\nElementDataFile = LOCAL\n"
    content = head.encode() + np.arange(256, dtype="<i4").tobytes()
    (tmp_path / "a.mha").write_bytes(content)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "a.mha"))
    np.testing.assert_array_equal(formats.decode_scan(content).pixels[0, ..., 0], expected)
    np.testing.assert_array_equal(expected.ravel(), range(256))
