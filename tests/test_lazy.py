"""Large files: what is decoded region by region is what is decoded whole; bands and samples."""

import csv
import io
import tracemalloc

import cv2
import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_dicom_series import write_series

from imaging import formats, grid, labels, lazy, nifti, plots, preprocess, tiff_regions, writing
from imaging.lazy import LazyPixels
from imaging.scan import Scan
from inference import inputs, postprocess
from inference.components import Components
from inference.measurements import measure_classes
from inference.sampler import Sampler
from inference.segment import Options
from inference.segment_files import segment_files
from utils import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 200, (90, 131), dtype=np.uint8)
RGB = RNG.integers(0, 200, (90, 131, 3), dtype=np.uint8)
SMOOTH = np.uint8(np.add.outer(np.arange(90), np.arange(131)))
TABLE = RNG.integers(0, 2**16, (3, 256), dtype=np.uint16)
TILES, STRIPS = {"tile": (32, 48)}, {"rowsperstrip": 7}

FILES = {
    "plain": (GREY, {}),
    "strips": (GREY, STRIPS),
    "tiles": (GREY, TILES),
    "rgb tiles": (RGB, TILES | {"photometric": "rgb"}),
    "rgb jpeg": (RGB, {"tile": (32, 48), "photometric": "rgb", "compression": "jpeg"}),
    "ycbcr jpeg": (
        RGB,
        {"tile": (32, 32), "compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)},
    ),
    "grey jpeg strips": (SMOOTH, {"rowsperstrip": 16, "compression": "jpeg"}),
    "lzw": (RGB, STRIPS | {"photometric": "rgb", "compression": "lzw", "predictor": 2}),
    "deflate": (RGB, TILES | {"photometric": "rgb", "compression": "deflate"}),
    "zstd": (GREY, STRIPS | {"compression": "zstd"}),
    "packbits": (GREY, STRIPS | {"compression": "packbits"}),
    "16 bit big-endian": (GREY.astype(np.uint16) * 300, {"byteorder": ">"}),
    "16 bit tiles big-endian": (GREY.astype(np.uint16) * 300, TILES | {"byteorder": ">"}),
    "signed": (GREY.astype(np.int16) - 50, STRIPS),
    "bits": (GREY > 100, STRIPS | {"photometric": "miniswhite"}),
    "white": (GREY, STRIPS | {"photometric": "miniswhite"}),
    "palette": (GREY, STRIPS | {"photometric": "palette", "colormap": TABLE}),
    "inks": (RNG.integers(0, 255, (90, 131, 4), dtype=np.uint8), {"photometric": "separated"}),
    "planes": (
        np.moveaxis(RGB, -1, 0),
        TILES | {"photometric": "rgb", "planarconfig": "separate", "compression": "lzw"},
    ),
    "plain planes": (np.moveaxis(RGB, -1, 0), {"photometric": "rgb", "planarconfig": "separate"}),
    "alpha": (np.dstack([RGB, GREY]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "fourth": (np.dstack([RGB, GREY]), {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "opaque": (
        np.dstack([RGB, 0 * GREY + 255]),
        STRIPS | {"photometric": "rgb", "extrasamples": ["unspecified"]},
    ),
    "five": (RNG.integers(0, 200, (90, 131, 5), dtype=np.uint8), {"planarconfig": "contig"}),
    "pages": (RNG.integers(0, 200, (4, 90, 131), dtype=np.uint8), STRIPS),
    "imagej": (
        RNG.integers(0, 200, (2, 4, 3, 90, 131), dtype=np.uint8),
        {"imagej": True, "metadata": {"axes": "TZCYX"}},
    ),
    "one entry": (
        RNG.integers(0, 60000, (6, 90, 131), dtype=np.uint16),
        {"imagej": True, "truncate": True, "metadata": {"axes": "ZYX"}},
    ),
    "ome": (
        RNG.integers(0, 200, (3, 4, 90, 131), dtype=np.uint8),
        TILES | {"ome": True, "metadata": {"axes": "CZYX"}, "compression": "zlib"},
    ),
}
for turn in range(2, 9):
    FILES[f"turn {turn}"] = (
        RGB,
        TILES
        | {
            "photometric": "rgb",
            "extratags": [(274, "H", 1, turn, True)],
        },
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(lazy, "LARGE_BYTES", 1)
    monkeypatch.setattr(tiff_regions, "ROWS", 8)


def read_both(folder, name):
    array, flags = FILES[name]
    path = folder / "a.tif"
    tifffile.imwrite(path, array, **{"photometric": "minisblack"} | flags)
    return formats.read_scan(path), formats.read_scan(path, is_lazy=True)


@pytest.mark.parametrize("name", FILES)
def test_a_file_read_by_regions_is_that_read_whole(tmp_path, name):
    whole, parts = read_both(tmp_path, name)
    assert isinstance(whole.pixels, np.ndarray) and isinstance(parts.pixels, LazyPixels)
    assert parts.pixels.shape == whole.pixels.shape and parts.pixels.dtype == whole.pixels.dtype
    np.testing.assert_array_equal(np.asarray(parts.pixels), whole.pixels)
    np.testing.assert_array_equal(parts.colours[0], whole.colours[0])
    np.testing.assert_array_equal(parts.slice(0).pixels[:, 5:9, ::-2], whole.pixels[:1, 5:9, ::-2])
    for field in ("spacing_mm", "has_alpha", "separate", "notes", "format"):
        assert getattr(parts, field) == getattr(whole, field)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "LARGE_BYTES", 1)
        names = ("imagej", "turn 7", "planes", "fourth")
        return [read_both(tmp_path_factory.mktemp("files"), name) for name in names]


def parts(length: int):
    places = st.integers(-length - 3, length + 3)
    steps = st.sampled_from([None, 1, 2, -1, -3])
    cut = st.builds(slice, st.none() | places, st.none() | places, steps)
    return cut | st.integers(-length, length - 1)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_region_is_that_of_the_array(scans, data):
    whole, lazily = data.draw(st.sampled_from(scans))
    count = data.draw(st.integers(0, 4))
    key = tuple(data.draw(parts(length)) for length in whole.pixels.shape[:count])
    if data.draw(st.booleans()):
        key = (*key, ...)
    np.testing.assert_array_equal(lazily.pixels[key], whole.pixels[key])


def test_a_damaged_strip_is_told_when_it_is_read(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", compression="deflate", tile=(32, 32))
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        start = file.pages[0].dataoffsets[4]
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    pixels = formats.read_scan(path, is_lazy=True).pixels
    np.testing.assert_array_equal(pixels[0, :30, :30], RGB[:30, :30])
    with pytest.raises(UserError, match="unreadable as TIFF"):
        np.asarray(pixels)


def test_a_jpeg_larger_than_its_tile_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    large = io.BytesIO()
    tifffile.imwrite(large, np.zeros((512, 512), np.uint8), compression="jpeg", tile=(512, 512))
    large.seek(0)
    with tifffile.TiffFile(large) as file:
        start, count = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    jpeg = large.getvalue()[start : start + count]

    def tiles():
        yield from (jpeg,) * 4

    tifffile.imwrite(path, tiles(), shape=(64, 64), dtype="u1", tile=(32, 32), compression="jpeg")
    with pytest.raises(UserError, match="larger than its page"):
        formats.read_scan(path)
    with pytest.raises(UserError, match="larger than its page"):
        np.asarray(formats.read_scan(path, is_lazy=True).pixels)


def test_a_mask_that_would_be_too_large_is_told(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY, compression="deflate")
    with pytest.raises(UserError, match="expected at most"):
        formats.read_scan(path, max_bytes=GREY.size - 1, is_lazy=True)


def test_floats_are_decoded_whole(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(np.float32))
    assert isinstance(formats.read_scan(tmp_path / "a.tif", is_lazy=True).pixels, np.ndarray)


# ------------------------------------------------------------------------------------------ bands


@pytest.mark.parametrize("shape", [(1, 90, 131), (5, 20, 31), (40, 20, 10), (1, 2, 50), (2, 3, 1)])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("band", [1, 50, 400, 10**6])
def test_components_by_bands_are_those_of_the_whole(monkeypatch, shape, corners, band):
    monkeypatch.setattr(lazy, "BAND_PIXELS", band)
    for share in (0.0, 0.3, 0.5, 0.7, 1.0):
        mask = RNG.random(shape) < share
        structure = ndimage.generate_binary_structure(3, 3 if corners else 1)
        labels, count = ndimage.label(mask, structure)
        found = Components(lambda key, mask=mask: mask[key], shape, corners)
        joined = np.zeros(shape, int)
        for key, part in found:
            joined[key] = part
        assert len(found) == count
        # The numbers may be in another order.
        pairs = np.unique(np.stack([labels.ravel(), joined.ravel()]), axis=1)
        assert pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
        np.testing.assert_array_equal(found.sizes, np.bincount(joined.ravel())[1:][:count])
        sides = [axis for axis in range(3) if shape[axis] > 1]
        ends = [np.take(joined, end, axis).ravel() for axis in sides for end in (0, -1)]
        numbers = np.unique(np.concatenate(ends))
        np.testing.assert_array_equal(np.flatnonzero(found.at_border) + 1, numbers[numbers > 0])


def test_samples_of_few_pixels_are_all_of_them(monkeypatch):
    pixels = RNG.integers(0, 255, (3, 200, 300, 2), dtype=np.uint8)
    assert lazy.sample(pixels) is pixels
    monkeypatch.setattr(lazy, "SAMPLED", 10_000)
    monkeypatch.setattr(lazy, "DECODED", 60_000)
    region = LazyPixels(pixels.shape, pixels.dtype, lambda box: pixels[box])
    for source in (pixels, region):
        part = lazy.sample(source)
        assert 2 < pixels.size / part.size < 50
        np.testing.assert_allclose(np.percentile(part, [0.5, 50, 99.5]), [1, 127, 253], atol=6)


@pytest.mark.parametrize("slices", [10, 256, 300, 600])
def test_the_middle_of_a_long_volume_decides_on_its_grey_levels(slices):
    """The corners of a scan are air."""
    y, x = np.mgrid[:512, :512] - 256
    one = np.where(np.hypot(y, x) < 200, 40 + x % 50, -1000).astype(np.int16)[None, ..., None]
    shape = (slices, *one.shape[1:])

    def read(box):
        return np.broadcast_to(one, shape)[box]

    low, high = np.percentile(lazy.sample(LazyPixels(shape, np.int16, read)), [0.5, 99.5])
    assert low == -1000 and high == pytest.approx(np.percentile(one, 99.5), abs=2)


# ------------------------------------------------------------------------------ on the whole way


def lazily(array: np.ndarray) -> LazyPixels:
    return LazyPixels(array.shape, array.dtype, lambda box: array[box].copy())


SMALL = cv2.GaussianBlur(RNG.integers(0, 255, (180, 262, 3)).astype(np.float32), (0, 0), 4)
LARGE = np.uint8(np.clip(3 * (SMALL - 100), 0, 255))[None]


@pytest.fixture
def in_bands(monkeypatch):
    monkeypatch.setattr(lazy, "LARGE_SLICE", 100)
    monkeypatch.setattr(postprocess, "LARGE_SLICE", 100)
    monkeypatch.setattr(lazy, "BAND_PIXELS", 2000)


@pytest.mark.parametrize(
    "size", [(64, 64), (60, 90), (17, 23), (180, 262), (300, 400), (300, 100), (90, 300)]
)
@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_resizing_by_bands_is_resizing(in_bands, size, kind):
    image = LARGE[0].astype(kind)
    parts = list(grid.resize_bands(image.__getitem__, image.shape[:2], size))
    assert len(parts) > 3
    joined = np.concatenate([rows for _, rows in parts])
    assert [row for row, _ in parts] == np.cumsum([0, *map(len, dict(parts).values())])[
        :-1
    ].tolist()
    most = 1 if kind == np.uint8 else 1e-3
    np.testing.assert_allclose(joined, grid.resize(image, size), atol=most)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sampler", [Sampler((64, 80)), Sampler((64, 80), patches=True)])
def test_a_lazy_scan_is_prepared_as_an_array(monkeypatch, channels, sampler):
    scan = Scan(LARGE)
    place = sampler.grid(scan)
    expected = preprocess.prepare_scan(scan, place, channels)
    for name in ("LARGE_SLICE", "LARGE_ARRAY"):
        monkeypatch.setattr(lazy, name, 100)
    monkeypatch.setattr(lazy, "BAND_PIXELS", 2000)
    for pixels in (LARGE, lazily(LARGE)):
        found = preprocess.prepare_scan(Scan(pixels), place, channels)
        assert isinstance(found, LazyPixels) == sampler.patches
        assert found.shape == expected.shape and found.dtype == np.uint8
        # Samples are some of the pixels.
        most = 6 if sampler.patches else 1
        np.testing.assert_allclose(np.int32(np.asarray(found)), expected, atol=most)


@pytest.mark.parametrize(
    ("shape", "is_volume"), [((1, 40, 53), False), ((3, 30, 24), False), ((9, 30, 24), True)]
)
@pytest.mark.parametrize("kind", [np.uint8, labels.BITS])
def test_masks_are_cleaned_by_bands_as_whole(in_bands, shape, is_volume, kind):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = ndimage.gaussian_filter(rng.random(shape), (0, 1.5, 1.5))
        ids = np.digitize(noise, np.quantile(noise, [0.5, 0.8])).astype(kind)
        found = ids.copy()
        postprocess.clean(found, [3, 2], is_volume)
        if is_volume:
            expected = clean_whole(ids, [3, 2])
        else:
            expected = np.stack([postprocess.clean_mask(one, [3, 2]) for one in ids])
        # Which of two components of the same size stays is not said.
        if are_sizes_unique(ids, is_volume):
            np.testing.assert_array_equal(found, expected)


def clean_whole(ids, components):
    cleaned = ids.copy()
    for class_id, count in enumerate(components, 1):
        parts, _ = ndimage.label(labels.plane(ids, class_id))
        sizes = np.bincount(parts.ravel())[1:]
        small = 1 + np.argsort(-sizes, kind="stable")[count:]
        labels.remove_class(cleaned, class_id, np.isin(parts, small))
    for class_id in range(1, len(components) + 1):
        filled = ndimage.binary_fill_holes(labels.plane(cleaned, class_id))
        if ids.dtype != labels.BITS:
            filled &= cleaned == 0
        labels.add_class(cleaned, class_id, filled)
    return cleaned


def are_sizes_unique(ids, is_volume):
    corners = np.pad(np.ones((1, 3, 3)), ((1, 1), (0, 0), (0, 0)))
    for class_id in (1, 2):
        for part in [ids] if is_volume else np.split(ids, len(ids)):
            inside = labels.plane(part, class_id)
            parts = ndimage.label(inside, None if is_volume else corners)[0]
            sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1][:4].tolist()
            if len(set(sizes)) < len(sizes):
                return False
    return True


class Threshold:
    """A network that looks at each pixel: bright ones are of the class."""

    def predict_on_batch(self, images):
        return images.mean(-1, keepdims=True)


METADATA = {"classes": ["a"], "channels": 3, "threshold": 0.5, "image_size": [64, 64]}
# The levels of percentiles would be those of a sample.
METADATA["window"] = "85,120"


@pytest.mark.parametrize("clean", [None, [2]])
@pytest.mark.parametrize("tile", [False, True])
def test_a_large_file_is_segmented_as_a_small_one(tmp_path, monkeypatch, tile, clean):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, LARGE[0], photometric="rgb", tile=(64, 64), compression="deflate")
    members = [(Threshold(), METADATA | {"clean": clean})]
    options = Options(tile=tile)
    monkeypatch.setattr(lazy, "LARGE_BYTES", 2**28)
    assert segment_files(members, [path], tmp_path / "small", options) == (1, [])
    monkeypatch.setattr(lazy, "LARGE_BYTES", 1)
    monkeypatch.setattr(lazy, "LARGE_SLICE", 100)
    monkeypatch.setattr(postprocess, "LARGE_SLICE", 100)
    monkeypatch.setattr(lazy, "BAND_PIXELS", 2000)
    assert segment_files(members, [path], tmp_path / "large", options) == (1, [])
    masks = [tifffile.imread(tmp_path / name / "a.tif") for name in ("small", "large")]
    assert 0.03 < (masks[0] > 0).mean() < 0.8 and masks[0].shape == LARGE.shape[1:3]
    assert (masks[0] == masks[1]).mean() > (0.9999 if tile else 0.99)
    panels = [cv2.imread(tmp_path / name / "panels" / "a.png") for name in ("small", "large")]
    assert np.abs(np.int32(panels[0]) - panels[1]).mean() < 3
    rows = []
    for name in ("small", "large"):
        with (tmp_path / name / inputs.MEASUREMENTS).open() as file:
            rows.append(next(csv.DictReader(file)))
    assert float(rows[0]["mean_grey"]) == pytest.approx(float(rows[1]["mean_grey"]), abs=2)
    if clean:
        assert rows[0]["components"] == rows[1]["components"]


# ----------------------------------------------------------------------------------------- memory


def peak_bytes(work) -> int:
    """The peak of what NumPy and Python allocate."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_mask_is_measured_cleaned_and_written_without_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "LARGE_SLICE", 2**20)
    monkeypatch.setattr(postprocess, "LARGE_SLICE", 2**20)
    monkeypatch.setattr(lazy, "BAND_PIXELS", 2**18)
    side = 6000
    ids = np.zeros((1, side, side), np.uint8)
    for y in range(100, side, 500):
        cv2.circle(ids[0], (y, y), 200, 1, cv2.FILLED)
        cv2.circle(ids[0], (y, y), 20, 0, cv2.FILLED)

    def read(box):
        return np.full([part.stop - part.start for part in box], 7, np.uint8)

    scan = Scan(LazyPixels((1, side, side, 3), np.uint8, read), format="TIFF")
    rows = []
    size = peak_bytes(lambda: rows.extend(measure_classes(ids, ["a"], scan)))
    assert size < ids.nbytes / 2 and rows[0]["components"] == 12 and rows[0]["mean_grey"] == 7
    assert peak_bytes(lambda: writing.write_mask(tmp_path / "a", ids, ["a"], scan)) < ids.nbytes / 4
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), 255 * ids[0])
    panel = tmp_path / "a.png"
    assert peak_bytes(lambda: plots.draw_panel(panel, scan, ids, ["a"], "a")) < ids.nbytes / 2
    assert peak_bytes(lambda: postprocess.clean(ids, [20])) < ids.nbytes


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_volume_is_read_without_a_copy(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(nifti, "PIECE", 2**16)
    voxels = np.arange(128 * 128 * 150, dtype=np.int16).reshape(128, 128, 150)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"a.{ending}")
    scans = []
    size = peak_bytes(
        lambda: scans.append(formats.read_scan(tmp_path / f"a.{ending}", is_lazy=True))
    )
    assert size < 1.2 * scans[0].pixels.nbytes
    whole = formats.read_scan(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(scans[0].pixels, whole.pixels)


def test_scaled_voxels_are_those_of_nibabel(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti, "PIECE", 1000)
    for kind in (np.uint8, np.int16, np.int32, np.float32, np.float64):
        voxels = RNG.integers(0, 200, (20, 30, 16)).astype(kind)
        image = nibabel.Nifti1Image(voxels, np.diag([-1, -1, 1, 1]))
        image.header.set_slope_inter(0.3, -7)
        nibabel.save(image, tmp_path / "a.nii")
        expected = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj, np.float32)
        scan = formats.read_scan(tmp_path / "a.nii", is_lazy=True)
        np.testing.assert_array_equal(scan.pixels[..., 0], expected.transpose(2, 1, 0))


def test_a_large_series_is_read_like_a_small_one(tmp_path, monkeypatch):
    write_series(tmp_path)
    monkeypatch.setattr(lazy, "LARGE_BYTES", 2**28)
    small = formats.read_scan(tmp_path)
    monkeypatch.setattr(lazy, "LARGE_BYTES", 1)
    large = formats.read_scan(tmp_path)
    np.testing.assert_array_equal(small.pixels, large.pixels)
    assert small.spacing_mm == large.spacing_mm and small.notes == large.notes
    assert not any("PixelData" in header for header in large.header)
