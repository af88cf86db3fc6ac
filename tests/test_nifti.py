"""NIfTI of every kind: versions, two files, units, two affines, channels, NaN."""

import gzip

import nibabel
import numpy as np
import pytest
from conftest import prepare_to_fit
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging import formats, writing
from imaging.alignment import check_alignment
from utils import UserError

AFFINE = np.diag([-0.5, -0.6, 2.0, 1.0])
VOXELS = np.random.default_rng(0).integers(1, 200, (30, 20, 5), dtype=np.int16)

ANALYZE = nibabel.AnalyzeImage


def save(path, voxels=VOXELS, affine=AFFINE, kind=nibabel.Nifti1Image, change=None):
    image = kind(voxels, affine)
    if change:
        change(image)
    nibabel.save(image, path)
    return path


def set_forms(sform, qform):
    def change(image):
        image.set_qform(qform, 0 if qform is None else 1)
        image.set_sform(sform, 0 if sform is None else 4)

    return change


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.nii", nibabel.Nifti1Image),
        ("a.nii", nibabel.Nifti2Image),
        ("a.nii.gz", nibabel.Nifti2Image),
        ("a.hdr", nibabel.Nifti1Pair),
        ("a.hdr", nibabel.Nifti2Pair),
        ("a.img.gz", nibabel.Nifti1Pair),
        ("a.hdr", nibabel.AnalyzeImage),
    ],
)
def test_versions_and_two_files_are_read_alike(tmp_path, name, kind):
    save(tmp_path / name, kind=kind)
    path = next(tmp_path.glob("*.hdr*"), tmp_path / name)
    scan = formats.read_scan(path)
    # Analyze cannot say where y runs: to anterior by custom.
    shown = VOXELS[:, ::-1].T if kind is ANALYZE else VOXELS.T
    np.testing.assert_array_equal(scan.pixels[..., 0], shown)
    np.testing.assert_allclose(scan.spacing_mm, (2.0, 0.6, 0.5), rtol=1e-6)
    written = writing.write_mask(tmp_path / "mask", shown > 100, ["x"], scan)
    mask = nibabel.load(written.path)
    np.testing.assert_array_equal(mask.get_fdata(), VOXELS > 100)
    np.testing.assert_allclose(mask.affine, nibabel.load(path).affine, atol=1e-5)
    check_alignment(scan, formats.read_mask_scan(written.path, scan))


def test_the_voxels_stand_for_their_header_and_lacking_ones_are_named(tmp_path):
    save(tmp_path / "a.hdr", kind=nibabel.Nifti1Pair)
    scan = formats.read_scan(tmp_path / "a.img")
    np.testing.assert_array_equal(scan.pixels[..., 0], VOXELS.T)
    with pytest.raises(UserError, match="header without voxels; expected one file"):
        formats.decode_scan((tmp_path / "a.hdr").read_bytes())
    (tmp_path / "a.img").unlink()
    with pytest.raises(UserError, match=r"expected a\.img beside it"):
        formats.read_scan(tmp_path / "a.hdr")


@pytest.mark.parametrize(
    ("unit", "scale"), [("micron", 1e-3), ("mm", 1), ("meter", 1e3), ("unknown", 1)]
)
def test_lengths_are_in_mm_and_masks_keep_the_units(tmp_path, unit, scale):
    path = save(tmp_path / "a.nii", change=lambda image: image.header.set_xyzt_units(unit))
    scan = formats.read_scan(path)
    np.testing.assert_allclose(scan.spacing_mm, np.multiply((2.0, 0.6, 0.5), scale), rtol=1e-6)
    np.testing.assert_allclose(np.abs(scan.affine[:3, :3]).max(), 2 * scale)
    mask = nibabel.load(writing.write_mask(tmp_path / "mask", VOXELS.T > 9, ["x"], scan).path)
    assert mask.header.get_xyzt_units()[0] == unit
    np.testing.assert_allclose(mask.affine, AFFINE, atol=1e-6)


def test_the_sform_is_used_and_told_where_the_qform_differs(tmp_path):
    moved = AFFINE.copy()
    moved[:3, 3] = 40, -25, 30
    scan = formats.read_scan(save(tmp_path / "a.nii", change=set_forms(moved, AFFINE)))
    assert scan.notes == ("sform and qform differ by up to 55.9 mm: the sform is used",)
    np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [40, -25, 30, 1])
    rounded = AFFINE * [[1.00001], [1], [1], [1]]
    same = formats.read_scan(save(tmp_path / "b.nii", change=set_forms(rounded, AFFINE)))
    assert not same.notes


def test_a_mask_that_keeps_the_qform_alone_lies_as_its_image(tmp_path):
    """ITK-SNAP saves masks with the scanner's place; the template's may even be turned."""
    turned = AFFINE[[1, 0, 2, 3]]
    image = formats.read_scan(save(tmp_path / "a.nii", change=set_forms(turned, AFFINE)))
    path = save(tmp_path / "m.nii", np.uint8(VOXELS > 100), change=set_forms(None, AFFINE))
    mask = formats.read_mask_scan(path, image)
    check_alignment(image, mask)
    np.testing.assert_array_equal(mask.pixels == 1, image.pixels > 100)
    other = AFFINE.copy()
    other[:3, 3] = 9
    path = save(tmp_path / "n.nii", np.uint8(VOXELS > 100), change=set_forms(None, other))
    with pytest.raises(UserError, match="mm away from its image"):
        check_alignment(image, formats.read_mask_scan(path, image))


@pytest.mark.parametrize("kind", [np.uint32, np.int32])
def test_large_ids_of_a_mask_are_exact(tmp_path, kind):
    ids = np.where(VOXELS > 100, 614454277, 16777217).astype(kind)
    found = formats.read_mask_scan(save(tmp_path / "m.nii", ids), None).pixels
    assert set(np.unique(found)) == {614454277, 16777217}


def test_a_quaternion_that_rounding_made_too_long_is_read(tmp_path):
    def change(header):
        header["qform_code"], header["sform_code"] = 1, 0
        header["quatern_b"] = header["quatern_c"] = 0
        header["quatern_d"] = np.sqrt(1 + 1e-6)

    image = nibabel.Nifti1Image(VOXELS, None)
    change(image.header)
    head = image.header.copy()
    head["vox_offset"] = 352
    content = head.binaryblock + bytes(4) + VOXELS.tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(content)
    scan = formats.read_scan(tmp_path / "a.nii")
    np.testing.assert_array_equal(np.diag(scan.affine[[2, 1, 0]][:, :3]), [1, -1, -1])
    mask = nibabel.load(writing.write_mask(tmp_path / "mask", VOXELS.T > 9, ["x"], scan).path)
    np.testing.assert_allclose(mask.affine, np.diag([-1, -1, 1, 1]))


@pytest.mark.parametrize("shape", [(30, 20, 5, 4), (30, 20, 5, 1, 4)])
def test_a_fourth_dimension_is_the_channels(tmp_path, shape):
    voxels = np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)
    scan = formats.read_scan(save(tmp_path / "a.nii", voxels))
    assert scan.pixels.shape == (5, 20, 30, 4) and scan.separate and not scan.has_alpha
    for i in range(4):
        np.testing.assert_array_equal(scan.pixels[..., i], voxels[..., i].squeeze().T)
    mask = nibabel.load(writing.write_mask(tmp_path / "mask", VOXELS.T > 9, ["x"], scan).path)
    assert mask.shape == (30, 20, 5)
    np.testing.assert_allclose(mask.affine, AFFINE)


def test_colours_are_three_channels(tmp_path):
    colours = np.random.default_rng(1).integers(0, 255, (30, 20, 5, 3), dtype=np.uint8)
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    scan = formats.read_scan(save(tmp_path / "a.nii", colours.view(rgb)[..., 0]))
    np.testing.assert_array_equal(scan.pixels, colours.transpose(2, 1, 0, 3))
    mask = nibabel.load(writing.write_mask(tmp_path / "mask", VOXELS.T > 9, ["x"], scan).path)
    assert mask.shape == (30, 20, 5) and mask.get_data_dtype() == np.uint8


def test_nan_in_one_channel_leaves_its_contrast(tmp_path):
    voxels = np.random.default_rng(1).normal(0, 1, (40, 40, 1, 4)).astype(np.float32)
    voxels[..., 2] = 1500 + 50 * voxels[..., 2]
    whole = prepare_to_fit(formats.read_scan(save(tmp_path / "a.nii", voxels)), (40, 40), 4)
    voxels[:8, ..., 2] = np.nan
    holes = prepare_to_fit(formats.read_scan(save(tmp_path / "b.nii", voxels)), (40, 40), 4)
    assert whole[..., 2].std() > 40 and holes[:, :, 8:, 2].std() > 35
    assert not holes[:, :, :8, 2].any()


def test_nan_is_background_without_a_say_in_grey_levels(tmp_path):
    voxels = np.random.default_rng(1).normal(100, 20, (40, 40, 3)).astype(np.float32)
    holes = voxels.copy()
    holes[:20] = np.nan
    whole = formats.read_scan(save(tmp_path / "a.nii", voxels[20:]))
    scan = formats.read_scan(save(tmp_path / "b.nii", holes))
    assert scan.notes == ("NaN pixels are taken as background",)
    assert scan.pixels.min() == np.nanmin(holes)
    prepared = prepare_to_fit(scan, (40, 40), 1)
    assert not prepared[:, :, :19].any()
    expected = prepare_to_fit(whole, (40, 20), 1)
    np.testing.assert_array_equal(prepared[:, :, 20:], expected)
    mask = np.where(np.isnan(holes), np.nan, 1).astype(np.float32)
    ids = formats.read_mask_scan(save(tmp_path / "m.nii", mask)).pixels[..., 0]
    np.testing.assert_array_equal(ids, np.nan_to_num(mask).T)


@pytest.mark.parametrize("fill", [-np.inf, np.inf, np.finfo(np.float32).min])
def test_fill_values_are_background_like_nan(tmp_path, fill):
    voxels = np.random.default_rng(1).normal(100, 20, (40, 40, 3)).astype(np.float32)
    pixels = []
    for value in (np.nan, fill):
        voxels[:20] = value
        scan = formats.read_scan(save(tmp_path / "a.nii", voxels))
        assert "are taken as background" in scan.notes[0]
        pixels.append(prepare_to_fit(scan, (40, 40), 1))
    np.testing.assert_array_equal(*pixels)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((20, 20, 3, 2, 2), "expected x, y, z, and perhaps"), ((20, 20, 3, 80), "time points")],
)
def test_other_dimensions_are_refused_with_advice(tmp_path, shape, message):
    with pytest.raises(UserError, match=message):
        formats.read_scan(save(tmp_path / "a.nii", np.zeros(shape, np.uint8)))


def test_complex_numbers_and_all_nan_are_refused(tmp_path):
    with pytest.raises(UserError, match="complex"):
        formats.read_scan(save(tmp_path / "a.nii", VOXELS.astype(np.complex64)))
    with pytest.raises(UserError, match="NaN or infinite numbers in all pixels"):
        formats.read_scan(save(tmp_path / "a.nii", np.full((20, 20, 2), np.nan, np.float32)))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_headers_are_read_or_refused(kind, data):
    content = bytearray(kind(VOXELS, AFFINE).to_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 560))] = data.draw(st.integers(0, 255))
    packed = bytes(content)
    if data.draw(st.booleans()):
        packed = gzip.compress(packed, 1)[: data.draw(st.integers(20, 10**5))]
    try:
        scan = formats.decode_scan(packed)
    except UserError:
        return
    assert scan.pixels.ndim == 4 and np.isfinite(scan.pixels).all()


def test_probabilities_lie_where_the_image_lies(tmp_path):
    scan = formats.read_scan(save(tmp_path / "a.nii"))
    probs = np.random.default_rng(0).uniform(0, 1, (5, 20, 30, 3)).astype(np.float32)
    places = writing.write_probabilities(tmp_path / "a", probs, ["left/x", "left x"], scan)
    expected = ["a_prob_left_x.nii.gz", "a_prob_left_x_2.nii.gz"]
    assert [place.name for place in places] == expected
    for i, place in enumerate(places, 1):
        stored = nibabel.load(place)
        np.testing.assert_array_equal(stored.get_fdata(dtype=np.float32), probs[..., i].T)
        np.testing.assert_allclose(stored.affine, AFFINE)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers_of_two_files_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    nibabel.save(nibabel.Nifti1Pair(VOXELS, AFFINE), folder / "a.hdr")
    content = bytearray((folder / "a.hdr").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 347))] = data.draw(st.integers(0, 255))
    (folder / "a.hdr").write_bytes(content)
    try:
        scan = formats.read_scan(folder / "a.hdr")
    except UserError:
        return
    assert scan.pixels.ndim == 4
