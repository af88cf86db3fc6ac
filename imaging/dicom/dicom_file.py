"""Open DICOM files as scanners, PACS and CDs hand them over.

A file is DICOM by its content: with or without the preamble, the file meta information, a transfer
syntax or an ending in its name (DICOM PS3.5, section 7; PS3.10, section 7).
"""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imaging.scan import check_declared_bytes
from utils import UserError, first_line

MAGIC = ((128, b"DICM"),)
# So much of a file says whether it is DICOM.
HEAD_BYTES = 512
PREAMBLE_BYTES = 132
PIXEL_ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# More than any scanner writes. Each costs some time.
MAX_ELEMENTS = 2**18
MAX_FRAMES = 2**16
# The elements before the pixels seldom take more.
PEEK_BYTES = 2**20
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
VRS = LONG_VRS | {*b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()}
META, IDENTITY, PIXELS, ITEMS = 0x0002, 0x0008, 0x7FE0, 0xFFFE
# Elements with which files begin that have no preamble, of group 0008 or 0002.
FIRST_ELEMENTS = frozenset((0x00, 0x01, 0x02, 0x05, 0x06, 0x08, 0x10, 0x12, 0x13, 0x14, 0x16, 0x18))
UNDEFINED = 0xFFFFFFFF
DEFLATED = "1.2.840.10008.1.2.1.99"
# What is read of every image. pydicom converts an element when it is asked for, and may fail then.
NAMES = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SpacingBetweenSlices",
    "SliceThickness",
    "PixelSpacing",
    "NumberOfFrames",
    "Rows",
    "Columns",
)
# SOP classes (DICOM PS3.4, annex B). Segmentations are bits or fractions, or label maps.
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
DIRECTORY = b"1.2.840.10008.1.3.10"


def is_dicom(head: bytes) -> bool:
    """Say whether a file is DICOM, by its first HEAD_BYTES bytes."""
    return head.startswith(b"DICM", 128) or _begins_with_elements(head[:HEAD_BYTES])


def is_directory(head: bytes) -> bool:
    """Say whether a DICOM file is a DICOMDIR, the table of contents of a CD."""
    return DIRECTORY in head[:HEAD_BYTES]


def _begins_with_elements(head: bytes) -> bool:
    """Say whether bytes begin with two elements, the first with a text that such files have."""
    explicit, order = _encoding(head, 0)
    at, last = 0, (0, -1)
    for number in range(2):
        if at + 12 > len(head):
            return False
        group, element, vr, length, value = _read_element(head, at, explicit, order)
        ascending = (group, element) > last
        known = group in (META, IDENTITY) and element in FIRST_ELEMENTS
        if not ascending or (explicit and vr not in VRS) or (number == 0 and not known):
            return False
        at, last = value + length, (group, element)
        text = head[value:at].rstrip(b"\0")
        if length % 2 or (
            element and number == 0 and not (text.isascii() and text.decode().isprintable())
        ):
            return False
    return group in (META, IDENTITY)


def _encoding(content: bytes, at: int) -> tuple[bool, str]:
    """Find out whether the elements from `at` on tell their kinds, and their byte order."""
    explicit = content[at + 4 : at + 6] in VRS
    # 0008 in the other byte order.
    swapped = content[at : at + 2] == b"\0\x08"
    return explicit, ">" if explicit and swapped else "<"


def _read_element(
    content: bytes, at: int, explicit: bool, order: str
) -> tuple[int, int, bytes, int, int]:
    """Read an element's group, number, kind and length, and where its value begins."""
    group, element, vr, length = struct.unpack_from(f"{order}HH2sH", content, at)
    if explicit and vr in VRS and group != ITEMS:
        if vr not in LONG_VRS:
            return group, element, vr, length, at + 8
        return group, element, vr, *struct.unpack_from(f"{order}I", content, at + 8), at + 12
    return group, element, b"", *struct.unpack_from(f"{order}I", content, at + 4), at + 8


# ------------------------------------------------------------------------------------------ open


def read_header(content: bytes, max_bytes: float) -> Any:
    """Read a DICOM file's elements; the pixels among them are not yet decoded.

    Raises UserError if it is not DICOM, has no image, or declares more than `max_bytes`.
    """
    header = open_dataset(content, max_bytes)
    if not any(name in header for name in PIXEL_ELEMENTS):
        raise UserError(_without_image(header))
    try:
        frames, size = int(header.get("NumberOfFrames") or 1), declared_bytes(header)
    except Exception as error:
        raise UserError(f"unreadable as DICOM ({first_line(error)})") from None
    if frames > MAX_FRAMES:
        raise UserError(f"its header declares {frames} frames; expected at most {MAX_FRAMES}")
    check_declared_bytes(max_bytes, size)
    return header


def _without_image(header: Any) -> str:
    if is_directory(str(header.file_meta.get("MediaStorageSOPClassUID", "")).encode()):
        return "a DICOMDIR, the table of contents of a CD; name the folder with its images instead"
    return "a DICOM file without an image, perhaps a report or a plan; expected one with pixels"


def open_dataset(content: bytes, max_bytes: float, names: Sequence[str] = ()) -> Any:
    """Read a DICOM file's elements, and complete its file meta information.

    names: read only these elements, and none after the pixels. Raises UserError.
    """
    import pydicom

    # Odd values are no reason to warn: what is made of them counts.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        content = _inflate(content, max_bytes, is_whole=not names)
        _check_elements(content)
        header = pydicom.dcmread(
            io.BytesIO(content),
            force=True,
            stop_before_pixels=bool(names),
            specific_tags=list(names) or None,
        )
        _complete_meta(header)
        for name in names or NAMES:
            header.get(name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"unreadable as DICOM ({first_line(error)})") from None
    # pydicom would keep the whole file in memory as long as the header.
    header.buffer = None
    return header


def peek_header(path: Path, names: Sequence[str]) -> Any:
    """Read some of a file's elements, as a rule without reading its pixels. Raises UserError."""
    try:
        with path.open("rb") as file:
            content = file.read(PEEK_BYTES)
            header = open_dataset(content, PEEK_BYTES, names)
            if "Rows" not in header and len(content) == PEEK_BYTES:
                header = open_dataset(content + file.read(), float("inf"), names)
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})") from None
    return header


def declared_bytes(header: Any) -> int:
    """Count the bytes that a file's pixels will take. Grey levels become float32."""
    frames = int(header.get("NumberOfFrames") or 1)
    rows, columns = int(header.get("Rows") or 1), int(header.get("Columns") or 1)
    samples = int(header.get("SamplesPerPixel") or 1)
    bytes_per_sample = -(-int(header.get("BitsAllocated") or 1) // 8)
    # A pixel of a palette becomes three colours of 16 bits.
    is_palette = str(header.get("PhotometricInterpretation") or "").startswith("PALETTE")
    return frames * rows * columns * max(6 if is_palette else 4, bytes_per_sample * samples)


def _start(content: bytes) -> tuple[int, str]:
    """Find where the elements after the file meta information begin, and the transfer syntax."""
    at = PREAMBLE_BYTES if content.startswith(b"DICM", 128) else 0
    syntax = ""
    while at + 8 <= len(content) and content[at : at + 2] == b"\2\0":
        _, element, _, length, value = _read_element(content, at, True, "<")
        at = value + length
        if element == 0x10:
            syntax = content[value:at].decode("ascii", "replace").rstrip("\0 ")
    return at, syntax


def _inflate(content: bytes, max_bytes: float, is_whole: bool) -> bytes:
    """Undo the compression of a file, or of its beginning, if it is of that kind."""
    start, syntax = _start(content)
    if syntax != DEFLATED:
        return content
    limit = 2**40 if max_bytes == float("inf") else int(max_bytes) + PEEK_BYTES
    # A few bytes can claim to be gigabytes.
    elements = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[start:], limit + 1)
    if is_whole:
        check_declared_bytes(limit, len(elements))
    return elements


def _check_elements(content: bytes) -> None:
    """Raise UserError if a file has more elements than MAX_ELEMENTS, before they are read.

    Sequences are entered; pixels are stepped over.
    """
    at, _ = _start(content)
    explicit, order = _encoding(content, at)
    fragments, size = False, len(content)
    for _ in range(MAX_ELEMENTS):
        if at + 12 > size:
            return
        group, element, vr, length, value = _read_element(content, at, explicit, order)
        if group == ITEMS:
            fragments = fragments and element != 0xE0DD
            at = value + length if fragments else value
        elif length == UNDEFINED:
            fragments, at = group == PIXELS, value
        elif vr == b"SQ" or content[value : value + 4] == b"\xfe\xff\x00\xe0":
            at = value
        else:
            at = value + length
    raise UserError(f"more than {MAX_ELEMENTS} DICOM elements; expected an image")


def _complete_meta(header: Any) -> None:
    """Name the transfer syntax of a file that does not, by what its bytes are."""
    from pydicom import uid

    if header.file_meta.get("TransferSyntaxUID"):
        return
    implicit, little = header.original_encoding
    syntax = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
    if not little:
        syntax = uid.ExplicitVRBigEndian
    if "PixelData" in header and header["PixelData"].is_undefined_length:
        syntax = _compression(header.PixelData)
    header.file_meta.TransferSyntaxUID = syntax


def _compression(fragments: bytes) -> str:
    """Tell the transfer syntax of compressed pixels by their first marks."""
    from pydicom import uid

    marks = (
        (b"\xff\x4f\xff\x51", uid.JPEG2000),
        (b"\xff\xd8\xff\xf7", uid.JPEGLSLossless),
        (b"\xff\xc3", uid.JPEGLosslessSV1),
        (b"\xff\xc1", uid.JPEGExtended12Bit),
        (b"\xff\xd8", uid.JPEGBaseline8Bit),
    )
    for mark, syntax in marks:
        if mark in fragments[:4096]:
            return syntax
    return uid.RLELossless
