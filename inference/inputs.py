"""List what is to be segmented: files, folders in folders, DICOM volumes, files of channels."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from imaging import formats, partners
from imaging.channel_files import read_channels
from imaging.dicom import dicom_series
from imaging.files import file_stem, is_dicom, is_image, is_litter, name_stem
from imaging.scan import MAX_BYTES, Scan, name_in_errors
from inference.output_names import name_outputs
from utils import UserError, nearest_path, printable

# Written into the output folder. A folder that holds it has results, not images.
# In a folder of its own, so that the output folder holds masks alone.
MEASUREMENTS = "tables/measurements.csv"
HEAD_BYTES = 1024
ZIP_MAGIC = b"PK\3\4"  # of NPZ and zipped DICOM, but of .xlsx, too
MAX_NAMED = 5  # files in a message


@dataclass(frozen=True)
class Input:
    """One image: a file, the slices of a DICOM volume, or a file per channel."""

    name: str  # of its mask: below the output folder, without ending
    files: tuple[Path, ...]
    is_volume: bool = False  # the files are DICOM slices

    @property
    def path(self) -> Path:
        """What a message names: the file, or the folder of the slices."""
        return self.files[0].parent if self.is_volume and len(self.files) > 1 else self.files[0]


@dataclass
class Inputs:
    """What was found in a file or folder."""

    items: list[Input] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)  # files that are no images
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of what could not be listed


def list_inputs(source: Path, output: Path | None = None, endings: Sequence[str] = ()) -> Inputs:
    """List the images of a file, or of a folder and the folders in it.

    output: a folder of results, which is passed over if it lies in `source`. endings: of the files
    that hold an image's channels, such as _0000 and _0001. Raises UserError if there are no images.
    """
    if not source.exists():
        near = nearest_path(source)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(
            f"{source} does not exist; {hint}--input takes an image file or a folder of them"
        )
    found = Inputs()
    if source.is_file():
        groups = [(Path(), [source])]
        if split_ending(source, endings):
            groups = [(Path(), _other_channels(source, endings))]
    else:
        groups = [
            (folder.relative_to(source), files) for folder, files in _walk(source, output, found)
        ]
    named: list[tuple[str, Input]] = []
    for folder, files in groups:
        for stem, item in _list_folder(source, folder, files, endings, found):
            named.append(((folder / stem).as_posix(), item))
    names = name_outputs([(name, item.files[0].name) for name, item in named])
    found.items = [replace(item, name=name) for name, (_, item) in zip(names, named, strict=True)]
    if not found.items:
        there = describe_passed_over(found.passed_over) or "it is empty"
        raise UserError(
            f"{source} has no image, {there}; expected files ending in {' '.join(formats.SUFFIXES)}"
        )
    return found


def describe_passed_over(paths: Sequence[PurePath]) -> str:
    """Say how many files are no images, and name the first; "" for none."""
    if not paths:
        return ""
    names = ", ".join(printable(path.name) for path in paths[:MAX_NAMED])
    rest = ", …" if len(paths) > MAX_NAMED else ""
    return f"passed over {len(paths)} file(s) that are no images: {names}{rest}"


def _walk(source: Path, output: Path | None, found: Inputs) -> Iterator[tuple[Path, list[Path]]]:
    """List a folder and those in it, each with its files; links that lead back are not followed.

    Folders below that hold results are left out; those of another output are noted.
    """

    def complain(error: OSError) -> None:
        found.problems.append(f"{error.filename}: cannot be opened ({error.strerror})")

    seen = set()
    for name, folders, files in os.walk(source, onerror=complain, followlinks=True):
        place = Path(name)
        is_result = place != source and (place / MEASUREMENTS).is_file()
        if is_result and (output is None or place.resolve() != output.resolve()):
            found.notes.append(f"{printable(place)} holds earlier results, so it is left out")
        if place.resolve() in seen or is_result:
            folders.clear()
            continue
        seen.add(place.resolve())
        folders[:] = sorted(folder for folder in folders if not is_litter(folder))
        yield place, [place / file for file in sorted(files) if not is_litter(file)]


def _list_folder(
    source: Path, folder: Path, files: Sequence[Path], endings: Sequence[str], found: Inputs
) -> list[tuple[str, Input]]:
    """List the images among the files of one folder: stem and image."""
    items, slices, pictures = [], [], []
    for path in files:
        kind = kind_of_file(path, is_named=path == source)
        if _is_no_text(path.name):
            found.problems.append(f"{printable(path)}: its name is not UTF-8; rename it")
        elif kind == "dicom":
            slices.append(path)
        elif kind == "image":
            pictures.append(path)
        elif kind and not partners.header_of(path):
            found.passed_over.append(path)
    volumes, notes = dicom_series.group_files(slices) if slices else ([], [])
    found.notes += notes
    stacks = [volume for volume in volumes if len(volume) > 1]
    for number, volume in enumerate(stacks, 1):
        # The slices of a volume are named by their folder.
        stem = f"../{folder.name}" if folder.name else source.resolve().name
        stem += f"_{number}" if len(stacks) > 1 else ""
        items.append((stem, Input("", tuple(volume), is_volume=True)))
    for volume in volumes:
        if len(volume) == 1:
            items.append((file_stem(volume[0]), Input("", tuple(volume))))
    for stem, group in _group_channels(pictures, endings, found.problems):
        # Channels that are named t1, t2 … alone are named by their folder.
        items.append((stem or f"../{(source / folder).resolve().name}", Input("", group)))
    return items


def _is_no_text(name: str) -> bool:
    """Say whether a name has bytes that are no text: Python makes surrogates of them."""
    return any("\ud800" <= char <= "\udfff" for char in name)


def kind_of_file(path: Path, is_named: bool = False) -> str:
    """Tell a file by its ending, else by its content: image, dicom, other; "" for no file.

    is_named: the user names this very file; a zip beside images is a table or a text.
    """
    if not path.is_file():
        is_dead_link = path.is_symlink() and not path.exists()
        return "image" if is_dead_link and is_image(path) else ""
    if is_image(path) and not path.name.lower().endswith(formats.DICOM.suffixes):
        return "image"
    if is_dicom(path):
        return "dicom"
    if is_image(path):  # what is wrong with it is told when it is read
        return "image"
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return "other"
    is_zip = head.startswith(ZIP_MAGIC) and not is_named
    return "image" if _is_known(head) and not is_zip else "other"


def _is_known(head: bytes) -> bool:
    """Say whether a file begins like an image; marks of two bytes are too common to tell."""
    marks = [mark for kind in formats.FORMATS for mark in kind.magic]
    marks += [(0, mark) for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")]  # TIFF
    return any(len(mark) > 2 and head.startswith(mark, offset) for offset, mark in marks)


def _group_channels(
    paths: Sequence[Path], endings: Sequence[str], problems: list[str]
) -> list[tuple[str, tuple[Path, ...]]]:
    """Join the files of an image's channels, x_0000 and x_0001; other files are images."""
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    items = []
    for path in paths:
        if found := split_ending(path, endings):
            first = groups[found[0]].setdefault(found[1], path)
            if first != path:
                problems.append(f"{path}: {first.name} has the same name, and is taken")
        else:
            items.append((file_stem(path), (path,)))
    for stem, group in groups.items():
        files = tuple(group[number] for number in sorted(group))
        if len(files) == len(endings):
            items.append((stem, files))
        else:
            expected = ", ".join(f"{stem}{ending}" for ending in endings)
            problems.append(f"{files[0]}: channels are missing; this model expects {expected}")
    return items


def split_ending(path: PurePath, endings: Sequence[str]) -> tuple[str, int] | None:
    """Split a file's name into the image's name and the number of the channel."""
    stem = name_stem(path.name)
    for number in sorted(range(len(endings)), key=lambda i: -len(endings[i])):
        if stem.endswith(endings[number]):
            return stem.removesuffix(endings[number]), number
    return None


def _other_channels(path: Path, endings: Sequence[str]) -> list[Path]:
    """List the files of all channels of an image, by one of them."""
    stem = split_ending(path, endings)[0]
    files = []
    for other in sorted(path.parent.iterdir()):
        found = split_ending(other, endings)
        if found and found[0] == stem and is_image(other):
            files.append(other)
    return files


# ---------------------------------------------------------------------------------------- reading


def read_input(item: Input, window: str = "") -> Scan:
    """Read an image, see `formats.read_scan`. Raises UserError that names the file."""
    if len(item.files) == 1:
        return formats.read_named_scan(item.files[0], window, is_lazy=True)
    if item.is_volume:
        with name_in_errors(item.path):
            scan = dicom_series.read_series(item.files, MAX_BYTES)
            return formats.check_window(replace(scan, format=formats.DICOM.name), window)
    return read_channels(item.files, window)


def read_one(path: Path, metadata: dict[str, Any]) -> Scan:
    """Read the image of a model: a file, a folder of DICOM slices, or one of its channels' files.

    Raises UserError.
    """
    found = list_inputs(path, endings=metadata.get("channel_endings", ()))
    return read_input(found.items[0], metadata.get("window", ""))
