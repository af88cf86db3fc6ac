"""Damaged and hostile files: each is read, or refused with our error.

A bomb, a small file that declares a huge image, is refused before it is decoded.
"""

import gzip
import io
import resource
import struct
import subprocess
import sys
import zlib

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from conftest import ROOT
from test_medical import FILES

from imaging import dicom, formats
from imaging.scan import MAX_BYTES
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
EACH = 400  # damaged copies of every file


def nifti(array) -> bytes:
    return nibabel.Nifti1Image(array, np.eye(4)).to_bytes()


def tiff(array, **more) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **more)
    return buffer.getvalue()


GREY = np.random.default_rng(0).integers(0, 4000, (6, 24, 20), dtype=np.uint16)
WHOLE = {
    **{
        kind: cv2.imencode(f".{kind}", np.uint8(GREY[0] // 16))[1].tobytes()
        for kind in ("png", "jpg", "bmp")
    },
    "16-bit png": cv2.imencode(".png", GREY[0])[1].tobytes(),
    "tiff": tiff(GREY, photometric="minisblack"),
    "zlib tiff": tiff(GREY, photometric="minisblack", compression="zlib"),
    "nifti": nifti(GREY.T),
    "gzipped nifti": gzip.compress(nifti(GREY.T)),
    **{
        name: (FILES / name).read_bytes()
        for name in ("CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_gdcm.dcm")
    },
    **{
        name: (FILES / name).read_bytes()
        for name in ("JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm")
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_damaged_files_are_read_or_refused(name):
    whole = WHOLE[name]
    assert formats.decode_scan(whole).pixels.size
    rng, before = np.random.default_rng(7), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for i in range(EACH):
        content = bytearray(whole)
        if i % 4 == 0:
            content = content[: rng.integers(len(content))]
        for _ in range(rng.integers(1, 9) if i % 4 else 0):
            place = int(
                rng.integers(min(len(content), 1024) if i % 2 else len(content))
            )  # headers are hit more often
            content[place] = rng.integers(256) if i % 3 else 0xFF
        try:
            pixels = formats.decode_scan(bytes(content)).pixels
        except UserError as error:
            refused += 1
            assert str(error)
        else:
            assert pixels.ndim == 4 and np.isfinite(pixels).all() and pixels.nbytes <= MAX_BYTES
    assert refused
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 3, f"{grown:.1f} GiB"


def png_bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in 4 kB, as its header says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2**22)))
        + chunk(b"IEND", b"")
    )


def nifti_bomb() -> bytes:
    """A NIfTI of 2 TiB, as its header says, most of it compressed away."""
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    struct.pack_into("<4h", content, 40, 3, 16384, 16384, 8192)
    return gzip.compress(bytes(content) + bytes(2**22))


def dicom_bomb() -> bytes:
    header = pydicom.dcmread(FILES / "MR_small_RLE.dcm")
    header.Rows = header.Columns = 65535
    header.NumberOfFrames = 4000
    buffer = io.BytesIO()
    header.save_as(buffer)
    return buffer.getvalue()


def tiff_bomb() -> bytes:
    content = bytearray(
        tiff(np.zeros((32, 32), np.uint8), compression="zlib", photometric="minisblack")
    )
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        for name in ("ImageWidth", "ImageLength"):
            tag = file.pages[0].tags[name]
            struct.pack_into(
                "<HHIHH" if tag.dtype == 3 else "<HHII",
                content,
                tag.offset,
                tag.code,
                4,
                1,
                *((400_000,) if tag.dtype == 4 else (60_000, 0)),
            )
    return bytes(content)


def animated_png() -> bytes:
    """A PNG whose further frames are not in the size that its header tells."""
    content = cv2.imencode(".png", np.zeros((64, 64), np.uint8))[1].tobytes()
    frames = struct.pack(">II", 100_000, 0)
    chunk = (
        struct.pack(">I", 8) + b"acTL" + frames + struct.pack(">I", zlib.crc32(b"acTL" + frames))
    )
    return content[:33] + chunk + content[33:]


def damaged_jpeg() -> bytes:
    """A JPEG of 16000 x 16000 pixels with stray bytes before its size, which decoders skip."""
    content = cv2.imencode(".jpg", np.zeros((64, 64), np.uint8))[1].tobytes()
    frame = content.index(b"\xff\xc0")
    sized = content[: frame + 5] + struct.pack(">HH", 16_000, 16_000) + content[frame + 9 :]
    return sized[:20] + b"abc" + sized[20:]


def jpeg_in_tiff() -> bytes:
    """A TIFF of 64 x 64 pixels whose JPEG claims 40000 x 40000."""
    content = bytearray(
        tiff(np.zeros((64, 64), np.uint8), compression="jpeg", photometric="minisblack")
    )
    frame = content.rindex(b"\xff\xc0")
    struct.pack_into(">HH", content, frame + 5, 40_000, 40_000)
    return bytes(content)


def nifti_extension() -> bytes:
    """A NIfTI whose extension claims 1.6 GB, most of it compressed away."""
    image = nibabel.Nifti1Image(np.zeros((32, 32, 2), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    content[348] = 1
    struct.pack_into("<f", content, 108, 1.6e9 + 352)
    return gzip.compress(
        bytes(content[:352]) + struct.pack("<ii", 1_600_000_000, 6) + bytes(2 * 10**8)
    )


IN_A_PROCESS = """
import resource, sys
from imaging import formats, nifti, tiff
from utils import UserError
content = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    formats.decode_scan(content)
except UserError as error:
    print(error, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, sep="|")
"""


@pytest.mark.parametrize(
    "bomb",
    [
        png_bomb,
        animated_png,
        damaged_jpeg,
        jpeg_in_tiff,
        nifti_bomb,
        nifti_extension,
        dicom_bomb,
        tiff_bomb,
    ],
)
def test_bombs_are_refused_before_they_are_decoded(bomb):
    content = bomb()
    assert len(content) < 10**6
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS],
        input=content,
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    message, grown = done.stdout.decode().split("|")
    assert message and int(grown) < 200, done  # MiB


def test_the_size_of_a_series_is_checked_before_it_is_decoded(tmp_path, monkeypatch):
    for i in range(4):
        header = pydicom.dcmread(FILES / "CT_small.dcm")
        header.ImagePositionPatient = [0, 0, i]
        header.save_as(tmp_path / f"{i}.dcm")
    monkeypatch.setattr(dicom, "decode_header", None)
    with pytest.raises(UserError, match="its header declares .* GiB"):
        formats.read_scan(tmp_path, max_bytes=3 * 4 * 128**2)


def test_a_volume_of_gibibytes_is_named():
    for content in (nifti(GREY), tiff(GREY), (FILES / "CT_small.dcm").read_bytes()):
        with pytest.raises(UserError, match="its header declares .* GiB"):
            formats.decode_scan(content, max_bytes=1000)
