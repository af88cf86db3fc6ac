"""Ask the HTTP service for the segmentations of a series, and for what goes with them."""

import contextlib
import http.client
import io
import json
import ssl
import urllib.parse
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from dicom_node.errors import AwayError, FaultError, RefusedError
from imaging.dicom import dicom_series
from utils import UserError

TIMEOUT_S = 600  # for a volume
REFUSED = (400, 406, 413, 415, 422)  # the image will not be segmented: malformed, too large
FAULTS = (500, 504)  # a fault of ours, or too slow: perhaps not another time
ALONE, WITH_MORE = "application/dicom", "application/zip"  # the segmentation; a zip of objects
SEGMENTATION = "segmentation.dcm"
MORE = ("report", "overlay")  # that may go with a segmentation


class Service:
    """A running `serve.py`."""

    def __init__(self, url: str, key: str = "", also: Sequence[str] = ()) -> None:
        """key: file with the API key. also: of MORE. Raises UserError."""
        self.url, self.key, self.also = urllib.parse.urlsplit(url.rstrip("/")), key, also
        if self.url.scheme not in ("http", "https") or not self.url.hostname:
            raise UserError(f"service is {url!r}; expected a URL, such as http://127.0.0.1:8080")
        if key:
            self._read_key()

    def segment(self, file: BinaryIO, num_bytes: int) -> list[bytes]:
        """Return the DICOM objects made of an image file or of a zipped series.

        Raises RefusedError, AwayError.
        """
        try:
            key = {"X-API-Key": self._read_key()} if self.key else {}
        except UserError as error:
            raise AwayError(str(error)) from None
        connection = self._connect()
        headers = {
            "Accept": WITH_MORE if self.also else ALONE,
            "Content-Type": "application/octet-stream",
            "Content-Length": str(num_bytes),
            **key,
        }
        try:
            # A service that refuses a large body answers before it has come, and stops reading.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", f"{self.url.path}/v1/segment", file, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(f"the service does not answer ({type(error).__name__})") from None
        finally:
            connection.close()
        if answer.status == 200:
            return unpack(content, self.also) if self.also else [content]
        if answer.status in REFUSED:
            raise RefusedError(read_detail(content, answer.status))
        if answer.status in FAULTS:
            raise FaultError(read_detail(content, answer.status))
        raise AwayError(f"the service answers {answer.status}")

    def _connect(self) -> http.client.HTTPConnection:
        place = self.url.hostname, self.url.port
        if self.url.scheme == "http":
            return http.client.HTTPConnection(*place, timeout=TIMEOUT_S)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(*place, timeout=TIMEOUT_S, context=context)

    def _read_key(self) -> str:
        try:
            key = Path(self.key).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not ASCII"
            raise UserError(f"the key {self.key} cannot be read ({reason})") from None
        if not key.isprintable():
            raise UserError(f"the key {self.key} has several lines; expected the key alone")
        return key


def parse_also(text: str) -> tuple[str, ...]:
    """Read `--also`. Raises UserError."""
    also = tuple(name.strip() for name in text.split(",")) if text else ()
    unknown = sorted(set(also) - set(MORE))
    if unknown:
        raise UserError(f"also has {', '.join(unknown)}; expected {' or '.join(MORE)}, or both")
    return also


def unpack(content: bytes, also: Sequence[str]) -> list[bytes]:
    """Take the segmentation, and what else is wanted and there, out of a zip. Raises AwayError."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            if SEGMENTATION not in names:
                raise AwayError("the service answers with a zip without a segmentation")
            wanted = (SEGMENTATION, *also)
            return [archive.read(name) for name in names if name.startswith(wanted)]
    except (zipfile.BadZipFile, zlib.error, RuntimeError):
        raise AwayError("the service answers something else than a zip") from None


def read_detail(content: bytes, status: int) -> str:
    """Read why the service refused."""
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the service answered {status}"


def find_volumes(folder: Path) -> tuple[list[list[Path]], int]:
    """List the volumes and images of a series' folder, each as its files.

    Returns also how many files belong to none. Raises RefusedError if there is no volume or image.
    """
    files = dicom_series.series_files(folder)
    volumes, notes = dicom_series.group_files(files)
    if not volumes:
        reasons = [note.removeprefix(f"{folder}/") for note in notes]
        raise RefusedError("; ".join(reasons) or "no DICOM files")
    return volumes, len(files) - sum(map(len, volumes))


def pack(files: Sequence[Path], place: Path) -> Path:
    """Return an image's file, or the zip at `place` with a volume's."""
    if len(files) == 1:
        return files[0]
    with zipfile.ZipFile(place, "w") as archive:  # not packed: the way is short
        for path in files:
            archive.write(path, path.name)
    return place
