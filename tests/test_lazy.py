"""Large files: what is decoded region by region is what is decoded whole; bands and samples."""

import io

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from imaging import formats, lazy, tiff_regions
from imaging.lazy import LazyPixels
from inference.components import Components
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
