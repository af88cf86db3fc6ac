"""DICOM files without ending, preamble, meta information or syntax; floods of elements; damage."""

import io
import struct
import time
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from test_dicom_frames import enhanced
from test_dicom_seg import headers_of, truth, write_seg
from test_dicom_series import write_series
from test_medical import FILES, ct_slice
from test_rtstruct import box, write_rtstruct

from imaging import formats
from imaging.dicom import dicom_file
from imaging.dicom.dicom_series import group_files, series_files
from imaging.files import file_stem, is_series
from imaging.scan import MAX_BYTES
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)


def encode(syntax, **elements) -> bytes:
    header = ct_slice(5, 1, {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4"})
    pixels = np.arange(20 * 24, dtype=np.uint16)
    header.PixelData = (pixels.byteswap() if syntax == ExplicitVRBigEndian else pixels).tobytes()
    for name, value in elements.items():
        setattr(header, name, value)
    header.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def start(content: bytes) -> int:
    """Find where the file meta information ends."""
    return 144 + int.from_bytes(content[140:144], "little")


def table_of_contents() -> bytes:
    """Make a DICOMDIR, as CDs have it."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.FileSetID = "CD"
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


EXPECTED = 2 * np.arange(20 * 24).reshape(20, 24) - 1024


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
@pytest.mark.parametrize("lacks", ["nothing", "preamble", "meta", "syntax"])
def test_files_that_lack_a_part(syntax, lacks):
    content = encode(syntax)
    end = start(content)
    if lacks == "preamble":
        content = content[132:]
    elif lacks == "meta":
        content = content[end:]
    elif lacks == "syntax":
        uid = struct.pack("<HH2sH", 2, 0x10, b"UI", len(syntax) + len(syntax) % 2)
        at = content.index(uid)
        content = content[:at] + content[at + 8 + len(syntax) + len(syntax) % 2 :]
    if syntax == DeflatedExplicitVRLittleEndian and lacks in ("meta", "syntax"):
        # Nothing says that it is compressed.
        with pytest.raises(UserError):
            formats.decode_scan(content)
        return
    scan = formats.decode_scan(content)
    assert scan.format == "DICOM"
    np.testing.assert_array_equal(scan.pixels[0, ..., 0], EXPECTED)


@pytest.mark.parametrize(
    "name", ["JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"]
)
def test_compressed_pixels_without_a_syntax(name):
    header = pydicom.dcmread(FILES / name)
    del header.file_meta.TransferSyntaxUID
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header, implicit_vr=False, little_endian=True)
    found = formats.decode_scan(buffer.getvalue()).pixels
    np.testing.assert_array_equal(found, formats.read_scan(FILES / name).pixels)


def test_files_are_dicom_by_content_whatever_their_names(tmp_path):
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4"}
    names = ("IM0001", "a.ima", "1.2.840.1", "1.2.840.2", "x.dicom", "1.2.840.3.dcm", "y.001")
    for i, name in enumerate(names):
        ct_slice(5 * i, i, uids).save_as(tmp_path / name, enforce_file_format=True)
    (tmp_path / "notes").write_text("\b\0\5\0CS and no more than a text")
    (tmp_path / "zeros").write_bytes(bytes(2000))
    for name in ("DICOMDIR", "toc"):
        (tmp_path / name).write_bytes(table_of_contents())
    assert [path.name for path in series_files(tmp_path)] == sorted(names)
    assert is_series(tmp_path)
    stems = {file_stem(path) for path in series_files(tmp_path)}
    assert stems == {"IM0001", "a", "1.2.840.1", "1.2.840.2", "x", "1.2.840.3", "y.001"}
    with pytest.raises(UserError, match="a DICOMDIR, the table of contents of a CD"):
        formats.read_scan(tmp_path / "DICOMDIR")


def test_stems_of_names_with_dots(tmp_path):
    names = {
        "1.2.840.1": "1.2.840.1",
        "1.2.840.1.dcm": "1.2.840.1",
        "a.b.nii.gz": "a.b",
        "a.ima": "a",
        "IM01": "IM01",
    }
    for name, stem in names.items():
        assert file_stem(tmp_path / name) == stem


# ----------------------------------------------------------------------------------------- limits


def flood(elements: bytes) -> bytes:
    content = encode(ExplicitVRLittleEndian)
    at = content.index(b"\xe0\x7f\x10\x00")
    return content[:at] + elements + content[at:]


def test_a_flood_of_elements_is_refused_at_once():
    tags = np.arange(4_000_000)
    table = np.zeros(len(tags), [("group", "<u2"), ("element", "<u2"), ("vr", "S2"), ("n", "<u2")])
    table["group"], table["element"] = 0x1001 + 2 * (tags // 61440), 0x1000 + tags % 61440
    table["vr"] = b"LO"
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 4_000_000
    sequence = struct.pack("<HH2sHI", 0x1001, 0x1010, b"SQ", 0, len(items)) + items
    undefined = struct.pack("<HH2sHI", 0x1001, 0x1010, b"SQ", 0, 0xFFFFFFFF) + items
    for elements in (table.tobytes(), sequence, undefined):
        begin = time.monotonic()
        with pytest.raises(UserError, match="more than 262144 DICOM elements"):
            formats.decode_scan(flood(elements))
        assert time.monotonic() - begin < 2


def test_too_many_frames_and_a_bomb_are_refused_at_once():
    begin = time.monotonic()
    content = encode(ExplicitVRLittleEndian, NumberOfFrames=10_000_000, Rows=1, Columns=1)
    with pytest.raises(UserError, match="declares 10000000 frames; expected at most 65536"):
        formats.decode_scan(content)
    content = encode(DeflatedExplicitVRLittleEndian)
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = deflate.compress(bytes(2**28)) + deflate.flush()
    with pytest.raises(UserError, match="declares .* GiB"):
        formats.decode_scan(content[: start(content)] + bomb, max_bytes=2**24)
    assert time.monotonic() - begin < 3


def test_slices_that_are_large_or_have_much_before_their_pixels(tmp_path):
    """Only the beginning of a file is read when files are sorted into volumes."""
    pixels = np.random.default_rng(0).integers(0, 3, (1500, 1500), dtype=np.uint16)
    large = {"Rows": 1500, "Columns": 1500, "PixelData": pixels.tobytes()}
    for syntax in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        for z in range(3):
            content = encode(syntax, ImagePositionPatient=[0, 0, z], **large)
            (tmp_path / f"{z}").write_bytes(content)
        volumes, notes = group_files(series_files(tmp_path))
        assert [len(volume) for volume in volumes] == [3] and notes == []
    for z in range(3):
        content = encode(ExplicitVRLittleEndian, ImagePositionPatient=[0, 0, z])
        private = struct.pack("<HH2sHI", 0x0009, 0x1010, b"OB", 0, 2**21) + bytes(2**21)
        at = content.index(b"\x10\x00\x10\x00")
        (tmp_path / f"{z}").write_bytes(content[:at] + private + content[at:])
    volumes, _ = group_files(series_files(tmp_path))
    assert [len(volume) for volume in volumes] == [3]


def test_elements_of_a_real_size_are_read():
    """Enhanced files have dozens of elements for each of hundreds of frames."""
    assert len(formats.decode_scan(enhanced(range(500))).pixels) == 500


@pytest.mark.parametrize("kind", ["bare", "implicit", "deflated", "enhanced"])
def test_damaged_images_are_read_or_refused(kind):
    explicit = encode(ExplicitVRLittleEndian)  # once: its UIDs are random, and so is their length
    whole = {
        "bare": lambda: explicit[start(explicit) :],
        "implicit": lambda: encode(ImplicitVRLittleEndian)[132:],
        "deflated": lambda: encode(DeflatedExplicitVRLittleEndian),
        "enhanced": lambda: enhanced((5, 0, 10)),
    }[kind]()
    refused = fuzz(whole, formats.decode_scan)
    assert refused


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "RTSTRUCT"])
def test_damaged_masks_are_read_or_refused(tmp_path, kind):
    uids = write_series(tmp_path / "ct")
    if kind == "RTSTRUCT":
        items = [box(2, 3, 12, 15, 5)]
        path = write_rtstruct(tmp_path / "m.dcm", {"liver": items}, uids["FrameOfReferenceUID"])
    else:
        path = write_seg(tmp_path / "m/m.dcm", headers_of(tmp_path / "ct"), truth(), kind)
    scan = formats.read_scan(tmp_path / "ct")

    def read(content):
        (tmp_path / "damaged").write_bytes(content)
        return formats.read_mask_scan(tmp_path / "damaged", scan, ["liver", "tumour"])

    assert fuzz(path.read_bytes(), read)


def fuzz(whole: bytes, read, count=150) -> int:
    """Read damaged copies; return how many were refused. Any other error than ours fails."""
    rng, refused = np.random.default_rng(3), 0
    read(whole)
    for i in range(count):
        content = bytearray(whole)
        if i % 4 == 0:
            content = content[: rng.integers(len(content))]
        for _ in range(rng.integers(1, 9) if i % 4 else 0):
            content[int(rng.integers(len(content)))] = rng.integers(256) if i % 3 else 0xFF
        try:
            assert read(bytes(content)).pixels.nbytes <= MAX_BYTES
        except UserError as error:
            refused += 1
            assert str(error)
    return refused


def test_no_other_kind_of_file_is_taken_for_dicom():
    rng = np.random.default_rng(0)
    for name in ("CT_small.dcm", "rtstruct.dcm", "ExplVR_BigEndNoMeta.dcm"):
        assert dicom_file.is_dicom((FILES / name).read_bytes())
    for prefix in (b"", b"\x08\x00", b"\x08\x00\x05\x00", b"\x08\x00\x05\x00CS\n\x00", b"\x02\x00"):
        for _ in range(2000):
            assert not dicom_file.is_dicom(prefix + rng.bytes(600))


def test_damaged_files_are_sorted_into_volumes_or_left_out(tmp_path):
    write_series(tmp_path)
    whole = (tmp_path / "IM01").read_bytes()

    def read(content):
        (tmp_path / "IM01").write_bytes(content)
        volumes, notes = group_files(sorted(tmp_path.iterdir()))
        named = sum(map(len, volumes)) + sum("left out" in note for note in notes)
        assert named == 4, (volumes, notes)
        return formats.read_scan(tmp_path)

    fuzz(whole, read, 100)
