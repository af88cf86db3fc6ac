"""Ask the HTTP service for the segmentations of a series."""

import http.client
import io
import json
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dicom_node.errors import AwayError, RefusedError
from imaging.dicom import dicom_series

TIMEOUT_S = 600  # for a volume
# The image will not be segmented: malformed, too large, too slow, or it meets a fault of ours.
REFUSED = (400, 406, 413, 415, 422, 500, 504)


class Service:
    """A running `serve.py`."""

    def __init__(self, url: str, key: str = "") -> None:
        """key: file with the API key."""
        self.url, self.key = url.rstrip("/"), key

    def segment(self, content: bytes) -> bytes:
        """Return the DICOM segmentation of an image or of a zipped series.

        Raises RefusedError, AwayError.
        """
        headers = {"Accept": "application/dicom", "Content-Type": "application/octet-stream"}
        if self.key:
            try:
                headers["X-API-Key"] = Path(self.key).read_text().strip()
            except OSError as error:
                raise AwayError(f"the key {self.key} cannot be read ({error.strerror})") from None
        request = urllib.request.Request(f"{self.url}/v1/segment", content, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code in REFUSED:
                raise RefusedError(read_detail(error)) from None
            raise AwayError(f"the service answers {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(f"the service does not answer ({type(error).__name__})") from None


def read_detail(error: urllib.error.HTTPError) -> str:
    """Read why the service refused."""
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, OSError):
        return f"the service answered {error.code}"


def find_volumes(folder: Path) -> list[list[Path]]:
    """List the volumes and images of a series' folder, each as its files. Raises RefusedError."""
    files = dicom_series.series_files(folder)
    volumes, notes = dicom_series.group_files(files)
    if not volumes:
        reasons = [note.removeprefix(f"{folder}/") for note in notes]
        raise RefusedError("; ".join(reasons) or "no DICOM files")
    return volumes


def pack(files: Sequence[Path]) -> bytes:
    """Return an image's file, or a volume's in a zip."""
    if len(files) == 1:
        return files[0].read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # not packed: the way is short
        for path in files:
            archive.write(path, path.name)
    return buffer.getvalue()
