"""TIFF: what its pages stand for, levels, alpha, thumbnails, limits."""

import io
import struct
import time

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging import formats
from imaging.scan import NO_DISTANCE
from utils import UserError

STACK = np.random.default_rng(0).integers(0, 200, (2, 4, 3, 20, 31), dtype=np.uint8)  # T, Z, C


def tiff(array, **more) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "minisblack"} | more)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["imagej", "ome", "shaped"])
@pytest.mark.parametrize("axes", ["CYX", "ZYX", "TYX", "ZCYX", "TCYX", "TZYX", "TZCYX"])
def test_channels_are_channels_and_time_and_z_are_slices(kind, axes):
    chosen = tuple(slice(None) if axis in axes else 0 for axis in "TZC")
    flags = {} if kind == "shaped" else {kind: True}
    content = tiff(STACK[chosen], metadata={"axes": axes}, **flags)
    scan = formats.decode_scan(content)
    array = np.moveaxis(STACK[chosen], axes.index("C"), -1) if "C" in axes else STACK[chosen]
    array = array if "C" in axes else array[..., None]
    np.testing.assert_array_equal(scan.pixels, array.reshape(-1, *array.shape[-3:]))
    assert scan.separate == ("C" in axes)
    assert any("2 time points" in note for note in scan.notes) == ("T" in axes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("axes", ["ZYX", "TZYX"])
def test_slices_that_tifffile_stores_as_colours_are_slices(axes, count):
    stack = STACK[0].reshape(12, 20, 31)[: 2 * count].reshape(2, count, 20, 31)
    stack = stack if axes == "TZYX" else stack[0]
    content = tiff(stack, photometric="rgb", planarconfig="separate", metadata={"axes": axes})
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        assert len(file.pages) == stack.size // (count * 20 * 31)
    pixels = formats.decode_scan(content).pixels
    np.testing.assert_array_equal(pixels, stack.reshape(-1, 20, 31, 1))


@pytest.mark.parametrize("config", ["contig", "separate"])
def test_samples_are_channels_interleaved_or_in_planes(config):
    pixels = np.random.default_rng(0).integers(0, 200, (20, 31, 5), dtype=np.uint8)
    stored = pixels if config == "contig" else np.moveaxis(pixels, -1, 0)
    scan = formats.decode_scan(tiff(stored, planarconfig=config))
    np.testing.assert_array_equal(scan.pixels[0], pixels)
    assert scan.separate and not scan.has_alpha


def test_dimensions_in_another_order_of_ome_are_followed():
    planes = STACK[0].reshape(12, 20, 31)
    text = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="31" '
        'SizeY="20" SizeC="3" SizeZ="4" SizeT="1" PhysicalSizeX="250" PhysicalSizeXUnit="nm" '
        'PhysicalSizeY="0.5" PhysicalSizeZ="2"><TiffData/></Pixels></Image></OME>'
    )
    content = tiff(planes, description=text, metadata=None)
    scan = formats.decode_scan(content)
    np.testing.assert_array_equal(scan.pixels, np.moveaxis(planes.reshape(3, 4, 20, 31), 0, -1))
    np.testing.assert_allclose(scan.spacing_mm, (0.002, 0.0005, 0.00025))


def test_planes_that_follow_one_page_are_found():
    stack = np.random.default_rng(0).integers(0, 60000, (12, 20, 31), dtype=np.uint16)
    content = tiff(stack, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    np.testing.assert_array_equal(formats.decode_scan(content).pixels[..., 0], stack)
    channels = tiff(stack[:3], imagej=True, truncate=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(
        formats.decode_scan(channels).pixels[0], np.moveaxis(stack[:3], 0, -1)
    )
    with pytest.raises(UserError, match="1 page of the 12 that its metadata declare"):
        formats.decode_scan(content[:-5000])


def test_metadata_that_do_not_fit_the_pages_are_told():
    text = 'x<Pixels DimensionOrder="XYCZT" SizeC="3" SizeZ="4" SizeT="1" ></Pixels></OME>'
    content = tiff(STACK[0, :, 0], description=f'<?xml version="1.0"?><OME {text}', metadata=None)
    scan = formats.decode_scan(content)
    assert scan.pixels.shape == (4, 20, 31, 1)
    assert any("pages are taken as slices" in note for note in scan.notes)


@pytest.mark.parametrize(
    ("kind", "has_alpha"), [("unspecified", False), ("unassalpha", True), ("assocalpha", True)]
)
def test_a_fourth_channel_is_alpha_only_if_the_file_says_so(kind, has_alpha):
    pixels = np.random.default_rng(0).integers(0, 200, (20, 31, 4), dtype=np.uint8)
    scan = formats.decode_scan(tiff(pixels, photometric="rgb", extrasamples=[kind]))
    assert scan.has_alpha == has_alpha
    np.testing.assert_array_equal(scan.colours[0], pixels[..., :3] if has_alpha else pixels)
    pixels[..., 3] = 255  # opaque: no measurement
    scan = formats.decode_scan(tiff(pixels, photometric="rgb", extrasamples=[kind]))
    assert scan.has_alpha


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
def test_low_is_white_images_are_inverted_and_masks_kept(kind):
    grey = np.random.default_rng(0).integers(0, 200, (20, 31)).astype(kind)
    content = tiff(grey, photometric="miniswhite")
    scan = formats.decode_scan(content)
    most = np.iinfo(kind).max if kind.startswith("u") else grey.max() + grey.min()
    np.testing.assert_array_equal(scan.pixels[0, ..., 0], most - grey)
    assert "inverted" in scan.notes[0]
    mask = formats.decode_mask_scan(content)
    np.testing.assert_array_equal(mask.pixels[0, ..., 0], grey)
    assert "taken as stored" in mask.notes[0]


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
def test_one_bit_is_black_and_white_as_shown(photometric):
    bits = np.random.default_rng(0).integers(0, 2, (20, 31)).astype(bool)
    content = tiff(bits, photometric=photometric, software="scanner")
    shown = ~bits if photometric == "miniswhite" else bits
    for decode in (formats.decode_scan, formats.decode_mask_scan):
        np.testing.assert_array_equal(decode(content).pixels[0, ..., 0] == 255, shown)


def test_masks_of_bool_are_as_numpy_saved_them():
    bits = np.random.default_rng(0).integers(0, 2, (20, 31)).astype(bool)
    # tifffile gives them this tag by itself.
    mask = formats.decode_mask_scan(tiff(bits, photometric="miniswhite"))
    np.testing.assert_array_equal(mask.pixels[0, ..., 0] == 255, bits)
    assert "taken as stored" in mask.notes[0]


def test_the_mask_in_a_palette_is_its_indices():
    ids = np.random.default_rng(0).integers(0, 4, (20, 31), dtype=np.uint8)
    table = np.zeros((3, 256), np.uint16)
    table[:, :4] = [[0, 65535, 0, 100], [0, 0, 65535, 100], [0, 0, 0, 100]]
    content = tiff(ids, photometric="palette", colormap=table)
    np.testing.assert_array_equal(formats.decode_mask_scan(content).pixels[0, ..., 0], ids)
    np.testing.assert_array_equal(
        formats.decode_scan(content).pixels[0], np.moveaxis(table[:, ids], 0, -1)
    )


def test_inks_become_colours():
    inks = np.zeros((20, 31, 4), np.uint8)
    inks[:10, :, 0], inks[10:, :, 3] = 255, 255
    pixels = formats.decode_scan(tiff(inks, photometric="separated")).pixels[0]
    assert (pixels[:10] == (0, 255, 255)).all() and (pixels[10:] == 0).all()


@pytest.mark.parametrize("first", ["image", "thumbnail"])
def test_a_thumbnail_is_left_out_and_told(first):
    image = np.random.default_rng(0).integers(0, 200, (64, 80), dtype=np.uint8)
    pages = {"image": image, "thumbnail": image[::4, ::4]}
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for name in sorted(pages, key=lambda name: name != first):
            file.write(pages[name], photometric="minisblack", metadata=None)
    scan = formats.decode_scan(buffer.getvalue())
    np.testing.assert_array_equal(scan.pixels[0, ..., 0], image)
    assert scan.notes == ("1 page(s) of 16x20 pixels left out: no slice of 64x80",)


@pytest.mark.parametrize(
    ("turn", "shown"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))],
)
def test_the_orientation_tag_is_applied_and_told(turn, shown):
    grey = np.random.default_rng(0).integers(0, 200, (20, 31), dtype=np.uint8)
    scan = formats.decode_scan(tiff(grey, extratags=[(274, "H", 1, turn, True)]))
    np.testing.assert_array_equal(scan.pixels[0, ..., 0], shown(grey))
    assert any(f"orientation {turn} applied" in note for note in scan.notes) == (turn != 1)


def test_the_orientation_tag_turns_the_spacing_too():
    more = {"imagej": True, "resolution": (20, 10), "metadata": {"unit": "mm"}}
    grey = np.zeros((20, 31), np.uint8)
    for turn, spacing in ((1, (1, 0.1, 0.05)), (6, (1, 0.05, 0.1))):
        content = tiff(grey, extratags=[(274, "H", 1, turn, True)], **more)
        assert formats.decode_scan(content).spacing_mm == pytest.approx(spacing)


@pytest.mark.parametrize(("written", "slices"), [(-2.0, 2.0), (0, 0), ("wide", 0)])
def test_the_distance_of_slices_is_positive_and_told_if_it_is_not_known(written, slices):
    more = {"imagej": True, "resolution": (20, 10)}
    content = tiff(
        np.zeros((5, 20, 31), np.uint8),
        metadata={"axes": "ZYX", "unit": "mm", "spacing": written},
        **more,
    )
    scan = formats.decode_scan(content)
    assert scan.spacing_mm[0] == (slices or 1.0)
    assert (NO_DISTANCE in scan.notes) == (not slices)


def many_pages(count: int) -> bytes:
    """A TIFF of pages of 16 x 16 pixels that share their pixels."""
    tags = (256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)
    tags += (273, 4, 1, 8), (278, 3, 1, 16), (279, 4, 1, 256)
    entries = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    size, start = len(entries) + 4, 8 + 256
    pages = []
    for i in range(count):
        pages.append(entries + struct.pack("<I", start + size * (i + 1) if i + 1 < count else 0))
    return struct.pack("<2sHI", b"II", 42, start) + bytes(256) + b"".join(pages)


def test_too_many_pages_are_refused_at_once():
    content, start = many_pages(180_000), time.monotonic()
    with pytest.raises(UserError, match="more than 10000 pages"):
        formats.decode_scan(content)
    assert time.monotonic() - start < 1
    assert len(formats.decode_scan(many_pages(500)).pixels) == 500
    circle = bytearray(many_pages(3))
    circle[-4:] = struct.pack("<I", 8 + 256)
    with pytest.raises(UserError):
        formats.decode_scan(bytes(circle))


@pytest.mark.parametrize("kind", ["imagej", "ome"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_metadata_are_read_or_refused(kind, data):
    content = bytearray(tiff(STACK[0], metadata={"axes": "ZCYX"}, **{kind: True}))
    text = content.index(b"ImageJ=" if kind == "imagej" else b"<Pixels")
    for _ in range(data.draw(st.integers(1, 4))):
        place = text + data.draw(st.integers(0, 200))
        word = data.draw(st.sampled_from([b"9", b"99999999", b"-1", b"nan", b'"', b"\n", b"\0"]))
        content[place : place + len(word)] = word
    try:
        scan = formats.decode_scan(bytes(content))
    except UserError:
        return
    assert scan.pixels.ndim == 4 and scan.pixels.nbytes <= 10 * STACK.nbytes


@pytest.mark.parametrize("compression", ["zstd", "lzma"])
def test_pages_packed_without_loss_are_read(compression):
    content = tiff(STACK[0, 0, 0], compression=compression)
    np.testing.assert_array_equal(formats.decode_scan(content).pixels[0, ..., 0], STACK[0, 0, 0])


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_masks_of_one_bit_packed_as_faxes_are_read(compression):
    from PIL import Image

    mask = np.uint8(255) * (STACK[0, 0, 0] > 100)
    buffer = io.BytesIO()
    Image.fromarray(mask).convert("1").save(buffer, "TIFF", compression=compression)
    found = formats.decode_mask_scan(buffer.getvalue()).pixels[0, ..., 0]
    np.testing.assert_array_equal(found > 0, mask > 0)
