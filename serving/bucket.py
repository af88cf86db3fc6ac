"""A copy of a bucket's model repository on this machine, for `serve.py --model s3://…`."""

import tempfile
from pathlib import Path

from inference.storage import Folder
from utils import UserError, atomic, first_line

FILES = ("unet.onnx", "unet-int8.onnx", "manifest.json")  # of a version
ALIASES = "aliases.json"


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
        found = {}
        try:
            for name in self.folder.list_files():
                parts = Path(name).parts
                is_model = len(parts) == 3 and parts[2] in FILES and ".." not in parts
                if is_model or name == ALIASES:
                    found[name] = self.folder.read(name)
        except OSError as error:
            raise UserError(f"{self.folder.url} cannot be read ({first_line(error)})") from None
        for path in [one for one in self.place.rglob("*") if one.is_file()]:
            if path.relative_to(self.place).as_posix() not in found:
                path.unlink()
        for name, content in found.items():
            path = self.place / name
            if path.exists() and path.read_bytes() == content:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary:
                temporary.write_bytes(content)
        return self.place
