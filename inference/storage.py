"""Read and write files in a folder on a disk or in a bucket (S3 and others, by pyarrow)."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from utils import UserError, atomic, first_line


class Folder:
    """A folder, named by a path or by a URL such as s3://bucket/scans. Files have paths below."""

    def __init__(self, url: str) -> None:
        import pyarrow as pa
        from pyarrow import fs

        self.url = url
        try:
            place = url if "://" in url else Path(url).resolve()
            self.files, root = fs.FileSystem.from_uri(place)
        except (pa.ArrowException, ValueError, ImportError) as error:
            raise UserError(
                f"{url} cannot be opened ({first_line(error)}); expected a folder or a URL"
            ) from None
        self.root = root.rstrip("/")
        self.name = PurePosixPath(self.root).name

    def list_files(self, missing_ok: bool = False) -> Iterator[str]:
        """List the files in it and in its folders. Raises UserError."""
        from pyarrow import fs

        selector = fs.FileSelector(self.root, missing_ok, recursive=True)
        try:
            found = self.files.get_file_info(selector)
        except OSError as error:
            raise UserError(
                f"{self.url} cannot be listed ({first_line(error)}); expected a folder"
            ) from None
        for info in found:
            if info.type == fs.FileType.File:
                try:
                    path = info.path
                except UnicodeDecodeError as error:
                    # Reading a file of this name will fail, and be reported as its problem.
                    path = error.object.decode(errors="backslashreplace")
                yield path[len(self.root) + 1 :]

    def read(self, name: str) -> bytes:
        """Read a file."""
        with self.files.open_input_stream(f"{self.root}/{name}") as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all. Buckets do so anyway."""
        path = f"{self.root}/{name}"
        if self.files.type_name == "local":
            with atomic(path) as temporary:
                temporary.write_bytes(content)
        else:
            with self.files.open_output_stream(path) as stream:
                stream.write(content)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self.files.delete_file(f"{self.root}/{name}")

    def overlaps(self, other: "Folder") -> bool:
        """Return whether one of the two folders is in the other."""
        inner, outer = sorted((f"{self.root}/", f"{other.root}/"), key=len, reverse=True)
        return self.files.type_name == other.files.type_name and inner.startswith(outer)
