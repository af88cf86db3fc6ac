"""Download a public data set, check it and unpack it. A broken download is resumed.

python data.py download montgomery
"""

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from utils import UserError

ATTEMPTS = 5  # in a row that fetch nothing
BLOCK_BYTES = 2**20
MAX_UNPACKED_BYTES = 2**34


@dataclass(frozen=True)
class Source:
    """A data set's archive."""

    url: str
    sha256: str
    terms: str  # licence and citation


SOURCES = {
    "montgomery": Source(
        "https://openi.nlm.nih.gov/imgs/collections/NLM-MontgomeryCXRSet.zip",
        "54601e952315d8f67383e9202a6e145997ade429f54f7e0af44b4e158714f424",
        "Montgomery County chest X-rays, U.S. National Library of Medicine: free for research and "
        "education.\nCite Jaeger et al., Quantitative Imaging in Medicine and Surgery 4(6), 2014, "
        "and Candemir et al., IEEE Transactions on Medical Imaging 33(2), 2014.",
    )
}


def download_source(source: Source, folder: Path) -> Path:
    """Download `source` and unpack it into `folder`; return it. Raises UserError if it exists."""
    print(source.terms)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it, or name another folder")
    archive = folder.with_name(f"{folder.name}.zip")
    if not archive.is_file():
        partial = archive.with_name(f"{archive.name}.part")
        fetch(source.url, partial)
        partial.replace(archive)
    verify(archive, source.sha256)
    unpack(archive, folder)
    archive.unlink()
    return folder


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path`, after the bytes that an earlier attempt left there.

    Raises UserError if several attempts in a row fetch nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(path)
        try:
            if fetch_once(url, path):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(
                    f"{url} answers {error.code} {error.reason}; has it moved?"
                ) from None
            reason = f"{error.code} {error.reason}"
        except (http.client.HTTPException, OSError) as error:  # URLError, broken TLS, a full disk
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(path) > before else failures + 1
        if failures == ATTEMPTS:
            raise UserError(f"{url}: {reason}; the same command goes on with what is in {path}")
        time.sleep(min(30, 2**failures - 1))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def fetch_once(url: str, path: Path) -> bool:
    """Ask once for the rest of the file and write what comes; return whether it is complete."""
    done = _size(path)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # There are no bytes beyond the end: the file is complete, or it is another one.
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if total != str(done):
            path.unlink()
        return total == str(done)
    is_rest = answer.status == 206
    done = done if is_rest else 0
    with answer, path.open("ab" if is_rest else "wb") as file:
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length and length.isdecimal() else None
        check_space(path.parent, 3 * ((total or 0) - done))  # the archive and what it unpacks to
        bar = tqdm(
            desc=path.stem, total=total, initial=done, unit="B", unit_scale=True, disable=None
        )
        with bar:
            while block := answer.read(BLOCK_BYTES):
                file.write(block)
                bar.update(len(block))
        return total is None or file.tell() == total


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError unless so many bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free; expected {needed / 2**30:.1f} for this "
            "data set"
        )


def verify(path: Path, sha256: str) -> None:
    """Raise UserError, and remove the file, unless its checksum is the one expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise UserError(
            f"{path}: checksum {found}; expected {sha256}. The file was removed: try again"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ZIP archive whose files share one top folder into `folder`, whole or not at all.

    Raises UserError if it is damaged, would write outside of `folder`, or is too large.
    """
    unfinished = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(unfinished, ignore_errors=True)
    damaged = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if is_wanted(member)]
            size = sum(member.file_size for member in members)
            if size > MAX_UNPACKED_BYTES:
                raise UserError(
                    f"{archive} unpacks to {size / 2**30:.0f} GiB; expected at most "
                    f"{MAX_UNPACKED_BYTES >> 30}"
                )
            check_space(folder.parent, size)
            for member in tqdm(members, "unpacking", unit="file", disable=None):
                target = unfinished.joinpath(*PurePosixPath(member.filename).parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                # zipfile gives no more bytes than the size that is checked above.
                with content.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, BLOCK_BYTES)
        unfinished.rename(folder)
    except damaged as error:
        raise UserError(
            f"{archive} cannot be unpacked ({error}); remove it and try again"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_wanted(member: zipfile.ZipInfo) -> bool:
    """Say whether an archive's entry is data: no folder, nothing that operating systems leave.

    Raises UserError for a path that leaves the archive's folder.
    """
    name = member.filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise UserError(f"the archive has the path {name!r}, which is outside of it; do not use it")
    hidden = path.parts[0] == "__MACOSX" or path.name.startswith(".") or path.name == "Thumbs.db"
    return not member.is_dir() and not hidden and len(path.parts) > 1
