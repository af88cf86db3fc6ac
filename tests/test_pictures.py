"""Pictures of every kind: GIF, WebP, JPEG 2000, NumPy, few bits, palettes, inks, turned cameras."""

import io
import struct
import time
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imaging import formats, writing
from utils import UserError

GREY = np.random.default_rng(0).integers(0, 256, (20, 31), dtype=np.uint8)
SMOOTH = cv2.resize(GREY[:4, :6], (31, 20))
COLOUR = cv2.resize(np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8), (31, 20))
IDS = np.random.default_rng(2).integers(0, 4, (20, 31), dtype=np.uint8)


def encode(picture: Image.Image, kind: str, **more) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def png_of_bits(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of few bits a pixel."""
    planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in planes)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + end


def palette(ids: np.ndarray, colours: list[int]) -> Image.Image:
    picture = Image.fromarray(ids).convert("P")
    picture.putdata(ids.ravel().tolist())
    picture.putpalette(colours)
    return picture


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("picture", [GREY, COLOUR], ids=["grey", "colour"])
def test_gif_webp_and_jpeg_2000_are_read_as_they_are_shown(picture):
    image = Image.fromarray(picture)
    shown = picture if picture.ndim == 3 else picture[..., None]
    for content in (
        encode(image, "WEBP", lossless=True),
        imagecodecs.jpeg2k_encode(picture, level=0, codecformat="jp2"),
        imagecodecs.jpeg2k_encode(picture, level=0, codecformat="j2k"),
    ):
        pixels = formats.decode_scan(content).pixels[0]
        np.testing.assert_array_equal(pixels, np.broadcast_to(shown, pixels.shape))
    content = encode(image, "GIF")
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(formats.decode_scan(content).pixels[0], expected)


def test_jpeg_2000_keeps_16_bits_and_says_what_is_alpha():
    deep = np.random.default_rng(0).integers(0, 65536, (40, 31), dtype=np.uint16)
    scan = formats.decode_scan(imagecodecs.jpeg2k_encode(deep, level=0))
    np.testing.assert_array_equal(scan.pixels[0, ..., 0], deep)
    rgba = np.dstack([COLOUR, GREY])
    scan = formats.decode_scan(encode(Image.fromarray(rgba), "JPEG2000"))
    assert scan.has_alpha and scan.colours.shape[-1] == 3
    five = np.dstack([COLOUR, GREY, GREY])
    scan = formats.decode_scan(imagecodecs.jpeg2k_encode(five, level=0))
    assert scan.separate and not scan.has_alpha
    np.testing.assert_array_equal(scan.pixels[0], five)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken_and_told(kind):
    frames = [Image.fromarray(np.full((20, 31), level, np.uint8)) for level in (9, 99)]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    scan = formats.decode_scan(content)
    assert abs(int(scan.pixels.max()) - 9) < 3 and scan.notes == (
        "animated: its first frame is taken",
    )


def test_inks_become_colours():
    inks = np.zeros((20, 32, 4), np.uint8)
    inks[:10, :, 0], inks[10:, :, 3] = 255, 255  # cyan, black
    content = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=95)
    pixels = formats.decode_scan(content).pixels[0].astype(int)
    assert pixels.shape == (20, 32, 3)
    assert np.abs(pixels[:8] - (0, 255, 255)).max() < 30 and pixels[12:].max() < 30


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32", "bool"])
@pytest.mark.parametrize("shape", [(20, 31), (20, 31, 2)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numpy(kind, shape, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 2, shape).astype(kind), order=order)
    plain, packed = io.BytesIO(), io.BytesIO()
    np.save(plain, array)
    np.savez_compressed(packed, image=array)
    for buffer in (plain, packed):
        scan = formats.decode_scan(buffer.getvalue())
        np.testing.assert_array_equal(scan.pixels[0], array.reshape(20, 31, -1))
        assert scan.separate == (len(shape) == 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((12, 64, 64)), "an array of 12 x 64 x 64; expected height x width"),
        (np.zeros((20, 20, 3, 3)), "expected height x width"),
        (np.zeros(40), "expected height x width"),
        (np.array([[None] * 20] * 20), "an array of object"),
        (np.zeros((20, 20), complex), "an array of complex128"),
    ],
)
def test_other_arrays_are_refused_with_advice(array, message):
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(UserError, match=message):
        formats.decode_scan(buffer.getvalue())


# ------------------------------------------------------------------------------ ids as they are


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_are_ids_in_masks_and_greys_in_images(bits):
    values = IDS & (2**bits - 1)
    content = png_of_bits(values, bits)
    np.testing.assert_array_equal(formats.decode_mask_scan(content).pixels[0, ..., 0], values)
    shown = values * (255 // (2**bits - 1))
    np.testing.assert_array_equal(formats.decode_scan(content).pixels[0, ..., 0], shown)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_the_mask_in_a_palette_is_its_indices(kind):
    colours = [0, 0, 0, 255, 0, 0, 0, 255, 0, 90, 90, 200]
    content = encode(palette(IDS, colours + [7] * 756), kind)
    np.testing.assert_array_equal(formats.decode_mask_scan(content).pixels[0, ..., 0], IDS)
    shown = np.reshape(colours, (4, 3))[IDS]
    np.testing.assert_array_equal(formats.decode_scan(content).pixels[0], shown)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_of_few_bits_is_its_indices(bits):
    ids = IDS & (2**bits - 1)
    content = encode(palette(ids, [0, 0, 0, 128, 0, 0, 0, 128, 0, 9, 9, 9]), "PNG", bits=bits)
    np.testing.assert_array_equal(formats.decode_mask_scan(content).pixels[0, ..., 0], ids)


def test_a_grey_gif_mask_keeps_its_greys():
    content = encode(Image.fromarray(85 * IDS), "GIF")
    pixels = formats.decode_mask_scan(content).pixels[0]
    np.testing.assert_array_equal(pixels, np.repeat(85 * IDS[..., None], 3, axis=-1))


# ----------------------------------------------------------------------------------- orientation


TURNED = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
TURNED |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1)}
TURNED |= {7: lambda a: np.rot90(a[::-1]), 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", TURNED)
def test_how_the_camera_was_held_is_applied_and_told(kind, turn):
    tag = Image.Exif()
    tag[0x0112] = turn
    content = encode(Image.fromarray(COLOUR), kind, exif=tag, quality=95)
    plain = formats.decode_scan(encode(Image.fromarray(COLOUR), kind, quality=95))
    scan = formats.decode_scan(content)
    np.testing.assert_array_equal(scan.pixels[0], TURNED[turn](plain.pixels[0]))
    assert scan.notes == (f"EXIF orientation {turn} applied: it is turned as viewers show it",)
    assert not plain.notes
    mask = formats.decode_mask_scan(content)
    np.testing.assert_array_equal(mask.pixels, scan.pixels)


def test_a_mask_written_for_a_turned_photo_is_upright(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encode(Image.fromarray(COLOUR), "JPEG", exif=tag))
    scan = formats.read_scan(tmp_path / "a.jpg")
    path = writing.write_mask(tmp_path / "mask", scan.pixels[..., 0] > 99, ["x"], scan).path
    assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape == (31, 20)


def test_a_damaged_tag_turns_nothing():
    content = encode(Image.fromarray(COLOUR), "JPEG")
    broken = content[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*\0\0\xff\xff" + content[2:]
    assert formats.decode_scan(broken).pixels.shape == (1, 20, 31, 3)


# ---------------------------------------------------------------------------------------- limits


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once():
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    whole = cv2.imencode(".jpg", np.full((3000, 3000), 90, np.uint8), flags)[1].tobytes()
    assert formats.decode_scan(whole).pixels.shape == (1, 3000, 3000, 1)
    dear = whole[:-2] + bytes.fromhex("ffda0008010100013f00") * 30_000 + b"\xff\xd9"
    start = time.monotonic()
    with pytest.raises(UserError, match="a JPEG of 300.. scans"):
        formats.decode_scan(dear)
    assert time.monotonic() - start < 1


def test_declared_sizes_are_checked_before_decoding():
    gif = bytearray(encode(Image.fromarray(GREY), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    webp = bytearray(encode(Image.fromarray(COLOUR), "WEBP", exif=Image.Exif(), lossless=True))
    extended = encode(Image.fromarray(COLOUR), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    webp = bytearray(extended)
    webp[24:30] = b"\xff\x3f\0\xff\x3f\0"
    jp2 = bytearray(imagecodecs.jpeg2k_encode(GREY, level=0))
    place = jp2.index(b"\xff\x4f\xff\x51") + 8
    jp2[place : place + 8] = struct.pack(">II", 100_000, 100_000)
    for content in (gif, webp, jp2):
        with pytest.raises(UserError, match="declares"):
            formats.decode_scan(bytes(content), max_bytes=2**30)


WHOLE = {
    "gif": encode(Image.fromarray(COLOUR), "GIF"),
    "webp": encode(Image.fromarray(COLOUR), "WEBP"),
    "webp lossless": encode(Image.fromarray(COLOUR), "WEBP", lossless=True),
    "jp2": imagecodecs.jpeg2k_encode(COLOUR, level=0, codecformat="jp2"),
    "j2k": imagecodecs.jpeg2k_encode(COLOUR, level=0, codecformat="j2k"),
    "palette": encode(palette(IDS, list(range(12))), "PNG"),
    "bits": png_of_bits(IDS, 2),
}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_pictures_are_read_or_refused(name, data):
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    for decode in (formats.decode_scan, formats.decode_mask_scan):
        try:
            scan = decode(bytes(content), max_bytes=2**26)
        except UserError:
            continue
        assert scan.pixels.ndim == 4 and scan.pixels.nbytes <= 2**26
