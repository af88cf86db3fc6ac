"""A folder and what lies in it, read once, without the litter of operating systems."""

import os
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from imaging.files import SUFFIXES, is_dicom, is_litter, is_series, normalize_name
from imaging.formats import DICOM
from utils import UserError

MAX_DEPTH = 8  # folders in folders
# Files of these endings are not opened to see whether they are DICOM.
TEXT_SUFFIXES = ".json .txt .csv .tsv .xml .md .pdf .zip .html .raw .gz .py .yaml .yml .xlsx .npy"
NO_DICOM = (
    *(suffix for suffix in SUFFIXES if suffix not in DICOM.suffixes),
    *TEXT_SUFFIXES.split(),
)


def split_name(name: str) -> tuple[str, str]:
    """Split a file's name into stem and ending; ".nii.gz" is one ending, an unknown one is none."""
    lower = name.lower()
    endings = [suffix for suffix in SUFFIXES if lower.endswith(suffix) and len(name) > len(suffix)]
    length = max(map(len, endings), default=0)
    return (name[:-length], name[-length:]) if length else (name, "")


class Folder:
    """A folder; its files and folders are listed when they are asked for."""

    def __init__(self, path: Path, depth: int = 0) -> None:
        self.path, self.depth = path, depth

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders, sorted."""
        names: tuple[list[str], list[str]] = [], []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if not is_litter(entry.name) and not self._leads_back(entry):
                        names[entry.is_dir()].append(entry.name)
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened ({error.strerror})") from None
        return sorted(names[0]), sorted(names[1])

    def _leads_back(self, entry: os.DirEntry) -> bool:
        """Say whether a link leads to this folder or to one above."""
        if not (entry.is_symlink() and entry.is_dir()):
            return False
        here = self.path.resolve()
        return Path(entry.path).resolve() in (here, *here.parents)

    @cached_property
    def files(self) -> list[Path]:
        """The files, sorted."""
        return [self.path / name for name in self._entries[0]]

    @cached_property
    def folders(self) -> list["Folder"]:
        """The folders, sorted; none where folders lie too deep."""
        if self.depth >= MAX_DEPTH:
            return []
        return [Folder(self.path / name, self.depth + 1) for name in self._entries[1]]

    def file(self, name: str) -> Path | None:
        """Find a file by its name, in any case."""
        for path in self.files:
            if path.name.lower() == name.lower():
                return path
        return None

    def folder(self, *names: str) -> "Folder | None":
        """Find a folder by one of its names, in any case."""
        for one in self.folders:
            if one.name.lower() in names:
                return one
        return None

    @cached_property
    def images(self) -> list[Path]:
        """The image files, by their ending; files of other endings are images if they are DICOM."""
        found = []
        names = {path.name for path in self.files}
        for path in self.files:
            lower = path.name.lower()
            # Of x.hdr and x.img the first is read, and finds the second.
            if lower.endswith(".img") and {path.stem + ".hdr", path.stem + ".HDR"} & names:
                continue
            if lower.endswith(SUFFIXES) or (not lower.endswith(NO_DICOM) and is_dicom(path)):
                found.append(path)
        return found

    @cached_property
    def is_series(self) -> bool:
        """Whether the folder holds a DICOM series: then it is an image itself."""
        if all(path.name.lower().endswith(NO_DICOM) for path in self.files):
            return False
        return is_series(self.path)

    def items(self, series: bool = True) -> Iterator[tuple[str, Path]]:
        """List the images here and in the folders below: (name, path).

        The name is the path from here, without ending. A folder of a DICOM series is one image,
        unless `series` is false.
        """
        for path in self.images:
            yield normalize_name(split_name(path.name)[0]), path
        for folder in self.folders:
            if series and folder.is_series:
                yield normalize_name(folder.name), folder.path
                continue
            for name, path in folder.items(series):
                yield f"{normalize_name(folder.name)}/{name}", path

    def walk(self) -> Iterator[Path]:
        """List all files here and in the folders below."""
        yield from self.files
        for folder in self.folders:
            yield from folder.walk()

    def has_images(self) -> bool:
        """Say whether there is an image here or in a folder below."""
        return next(self.items(), None) is not None

    def summary(self) -> str:
        """Describe the files of the folder in some words."""
        if not self.files:
            folders = f"{len(self.folders)} folders" if len(self.folders) > 1 else "1 folder"
            return folders if self.folders else "empty"
        counts = Counter(_ending(path) for path in self.files)
        kinds = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(3))
        names = ", ".join(path.name for path in self.files[:2])
        return f"{kinds} ({names}{', …' if len(self.files) > 2 else ''})"


def _ending(path: Path) -> str:
    return (split_name(path.name)[1] or path.suffix or "without ending").lower()


def draw_tree(folder: Folder, most: int = 12, depth: int = 3) -> list[str]:
    """Draw a folder and the folders in it, a line each, at most about `most` lines."""
    lines = [f"{folder.name or folder.path}/  {folder.summary()}"]
    _draw_below(folder, lines, most, depth, "  ")
    return lines


def _draw_below(folder: Folder, lines: list[str], most: int, depth: int, indent: str) -> None:
    shown = 4 if len(folder.folders) > 6 else 6
    for one in folder.folders[:shown]:
        if len(lines) >= most or not depth:
            break
        lines.append(f"{indent}{one.name}/  {one.summary()}")
        _draw_below(one, lines, most, depth - 1, indent + "  ")
    if len(folder.folders) > shown:
        lines.append(f"{indent}… {len(folder.folders) - shown} more folders")
