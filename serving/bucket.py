"""A copy of a bucket's model repository on this machine, for `serve.py --model s3://…`."""

import re
import tempfile
from pathlib import Path

from inference.storage import Folder
from utils import UserError, atomic, first_line

ALIASES = "aliases.json"
# NAME/VERSION/FILE, or the aliases.
NAMES = re.compile(
    r"[\w.-]{1,64}/[1-9]\d{0,8}/(unet\.onnx|unet-int8\.onnx|manifest\.json)|aliases\.json", re.ASCII
)


class Mirror:
    """A folder with what the bucket held when it was last looked into."""

    def __init__(self, url: str) -> None:
        """url: s3://bucket/models. Raises UserError."""
        self.folder = Folder(url)
        self.kept = tempfile.TemporaryDirectory(prefix="models-")  # removed when the service ends
        self.place = Path(self.kept.name)

    def update(self) -> Path:
        """Fetch what is new or changed, remove what is gone; return the folder. Raises UserError.

        If the bucket is away, all stays as it was. A file that did not change keeps its time, so
        that its model is not loaded again.
        """
        found = set()
        try:
            for name in self.folder.list_files():
                if NAMES.fullmatch(name) and ".." not in name:
                    found.add(name)
                    self._fetch(name)
            for path in [one for one in self.place.rglob("*") if one.is_file()]:
                if path.relative_to(self.place).as_posix() not in found:
                    path.unlink()
        except (OSError, ValueError) as error:  # the bucket is away, the disk is full
            raise UserError(f"{self.folder.url} cannot be read ({first_line(error)})") from None
        return self.place

    def _fetch(self, name: str) -> None:
        """Copy a file, unless it is there already."""
        content, path = self.folder.read(name), self.place / name
        if path.exists() and path.read_bytes() == content:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_bytes(content)
