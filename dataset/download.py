"""Fetch a public data set: resumed where it broke off, verified, unpacked into the layout that `train.py` reads."""

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

ATTEMPTS = 5  # in a row that bring nothing
BLOCK_BYTES = 2**20  # bytes
MAX_UNPACKED_BYTES = 2**34  # bytes that an archive may unpack to


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
        "Montgomery County chest X-rays, U.S. National Library of Medicine: free for research and education.\n"
        "Cite Jaeger et al., Quantitative Imaging in Medicine and Surgery 4(6), 2014, and Candemir et al., IEEE "
        "Transactions on Medical Imaging 33(2), 2014.",
    )
}


def download_source(source: Source, folder: Path) -> Path:
    """Fetch and unpack `source` into `folder`, unless it is there; return it. Raises UserError."""
    print(source.terms)
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or name another folder")
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
    """Download `url` to `path`, going on where an earlier attempt stopped. Raises UserError if nothing more comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = path.stat().st_size if path.is_file() else 0
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
        failures = 0 if path.is_file() and path.stat().st_size > before else failures + 1
        if failures == ATTEMPTS:
            raise UserError(
                f"{url}: {reason}; the same command goes on with what is there in {path}"
            )
        time.sleep(min(30, 2**failures - 1))


def fetch_once(url: str, path: Path) -> bool:
    """Ask for the rest of the file, write what comes; tell whether that was all of it."""
    done = path.stat().st_size if path.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # no bytes beyond the end: it was complete, or is another file
            raise
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if total != str(done):
            path.unlink()
        return total == str(done)
    with answer, path.open("ab" if answer.status == 206 else "wb") as file:
        done = done if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length and length.isdecimal() else None
        check_space(path.parent, 3 * ((total or 0) - done))  # the archive, and what is in it
        with tqdm(
            total=total, initial=done, desc=path.stem, unit="B", unit_scale=True, disable=None
        ) as bar:
            while block := answer.read(BLOCK_BYTES):
                file.write(block)
                bar.update(len(block))
        return total is None or file.tell() == total


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError unless so many bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free; expected {needed / 2**30:.1f} for this data set"
        )


def verify(path: Path, sha256: str) -> None:
    """Raise UserError, and remove the file, unless its checksum is the one expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise UserError(
            f"what came has checksum {found}; expected {sha256}. It was removed: try again"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ZIP archive whose files share one top folder into `folder`, whole or not at all.

    Raises UserError if it is damaged, or would write outside of `folder`, or more than LARGEST.
    """
    aside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if wanted(member)]
            size = sum(member.file_size for member in members)
            if size > MAX_UNPACKED_BYTES:
                raise UserError(
                    f"{archive} unpacks to {size / 2**30:.0f} GiB; expected at most {MAX_UNPACKED_BYTES >> 30}"
                )
            check_space(folder.parent, size)
            for member in tqdm(members, "unpacking", unit="file", disable=None):
                target = aside.joinpath(*PurePosixPath(member.filename).parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(
                        source, file, BLOCK_BYTES
                    )  # zipfile gives no more than the size checked above
        aside.rename(folder)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OSError,
    ) as error:
        raise UserError(
            f"{archive} cannot be unpacked ({error}); remove it and try again"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def wanted(member: zipfile.ZipInfo) -> bool:
    """Tell an archive's data from folders and what computers leave. Raises UserError for a path that leads outside."""
    path = PurePosixPath(member.filename)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in member.filename
        or ":" in member.filename
    ):
        raise UserError(
            f"the archive holds {member.filename!r}, a path outside of it; it is not to be trusted"
        )
    hidden = path.parts[0] == "__MACOSX" or path.name.startswith(".") or path.name == "Thumbs.db"
    return not member.is_dir() and not hidden and len(path.parts) > 1
