"""A DICOM series that was sent as one zip file."""

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import IO

from imaging.dicom import dicom_file, dicom_series
from imaging.scan import Scan, check_declared_bytes
from utils import UserError

MAX_MEMBERS = 2**14  # more than any series has
ENCRYPTED = 1  # a bit of a member's flags


@dataclass(frozen=True, order=True)
class Member:
    """A file of a zip, with what is asked of a Path: its name, its bytes and its size."""

    full_name: str
    archive: zipfile.ZipFile = field(compare=False)

    @property
    def name(self) -> str:
        """The name without its folders."""
        return PurePosixPath(self.full_name).name

    @property
    def parent(self) -> PurePosixPath:
        """The folders."""
        return PurePosixPath(self.full_name).parent

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open it; what is read is unpacked in memory."""
        return self.archive.open(self.full_name)

    def stat(self) -> SimpleNamespace:
        """Return its size, unpacked, as st_size."""
        return SimpleNamespace(st_size=self.archive.getinfo(self.full_name).file_size)

    def __str__(self) -> str:
        return self.full_name


def is_zip_of_dicom(content: bytes) -> bool:
    """Say whether this is a zip file in which something is DICOM."""
    if not content.startswith(b"PK\3\4"):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return bool(_dicom_members(archive, most=1))
    except MemoryError:
        raise
    except Exception:  # a damaged zip leads to many
        return False


def decode_zip(content: bytes, max_bytes: int) -> Scan:
    """Decode the only volume, or image, of a zip file. Raises UserError."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = _dicom_members(archive)
        check_declared_bytes(max_bytes, sum(one.stat().st_size for one in members))
        return dicom_series.read_only_volume(members, max_bytes)


def _dicom_members(archive: zipfile.ZipFile, most: int = MAX_MEMBERS) -> list[Member]:
    """List the DICOM files of a zip, `most` of them. Raises UserError."""
    members = []
    files = [info for info in archive.infolist() if not info.is_dir()]
    if len(files) > MAX_MEMBERS:
        raise UserError(f"{len(files)} files in a zip; expected at most {MAX_MEMBERS}")
    for info in files:
        member = Member(info.filename, archive)
        if info.flag_bits & ENCRYPTED:
            raise UserError(f"{member}: encrypted; expected a zip without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{member}: packed in an unusual way; expected a plain zip (deflate)")
        with member.open() as file:
            head = file.read(dicom_file.HEAD_BYTES)
        hidden = member.name.startswith(".") or "__MACOSX" in member.parent.parts
        if not hidden and dicom_file.is_dicom(head) and not dicom_file.is_directory(head):
            members.append(member)
            if len(members) == most:
                break
    return members
