"""Find image/mask pairs and read them: names, layouts, class ids, and the table of a split.

Layouts, recognised by themselves:

    DIR/CXR_png/*.png with DIR/ManualMask/leftMask/*.png and DIR/ManualMask/rightMask/*.png     (Montgomery)
    DIR/images/* with DIR/masks/*, a mask having its image's stem, with or without `_mask`       (anything else)
    DIR/images/* with DIR/masks/CLASS/*, a folder for each class, named as --classes names it

An optional DIR/index.csv (columns stem and any of patient, label, split) keeps a patient's images in one subset,
stratifies by label, and fixes the test set. Masks are 0/255 or 0/1 for one class, for K classes ids 0..K or the grey
levels that --classes names. An image is a file, or a folder that holds a DICOM series.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from utils import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SUFFIXES = (*PICTURES, ".dcm", ".nii", ".nii.gz")
FORMATS = "PNG, JPEG, TIFF, BMP, DICOM or NIfTI"


def is_image(path: Path) -> bool:
    """Tell an image file by its ending; hidden files (macOS leaves `._scan.png`) do not count."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def file_stem(path: Path) -> str:
    """Give the name that image, mask and prediction share: without a file's ending, `.nii.gz` being one."""
    if path.is_dir():  # a series, named by anything, such as 1.2.840
        return path.name
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem


def is_series(path: Path) -> bool:
    """Tell a folder that holds a DICOM series: one of its files is DICOM."""
    try:
        return (
            path.is_dir()
            and not path.name.startswith(".")
            and any(_shows_dicom(file) for file in path.iterdir())
        )
    except OSError:  # a folder that cannot be opened
        return False


def _shows_dicom(path: Path) -> bool:
    try:
        return path.is_file() and path.suffix.lower() not in PICTURES and is_dicom(path)
    except UserError:
        return False


def is_nifti(path: str | Path) -> bool:
    """Tell a NIfTI file by its ending."""
    return Path(path).name.lower().endswith((".nii", ".nii.gz"))


def is_dicom(path: str | Path) -> bool:
    """Tell a DICOM file by its first bytes. Raises UserError if it cannot be opened."""
    try:
        with Path(path).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror})") from None


def read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})") from error


LARGE_FILE_BYTES = 2**24  # bytes of a file that is decoded alone


# ---------------------------------------------------------------------------------------------------- finding pairs


def normalize_name(name: str) -> str:
    """Compose accents: macOS takes é apart in file names, and the same name would not be found."""
    return unicodedata.normalize("NFC", name)


def files_by_stem(folder: Path, suffix: str, problems: list[str]) -> dict[str, Path]:
    """Map the names (without `suffix`) of a folder's image files to the files, see `files_by_name`."""
    return files_by_name(
        folder.iterdir(), lambda path: file_stem(path).removesuffix(suffix), problems
    )


def files_by_name(
    paths: Iterable[Path], name_of: Callable[[Path], str], problems: list[str]
) -> dict[str, Path]:
    """Map names to the image files among `paths`, sorted; an equal name goes to `problems`."""
    found: dict[str, Path] = {}
    for path in sorted(path for path in paths if is_image(path) or is_series(path)):
        name = normalize_name(name_of(path))
        # Bytes that are not UTF-8 stand as surrogates, which tables cannot hold.
        if not str(path).isprintable():
            problems.append(f"{str(path)!a}: its name has unprintable characters; rename it")
        elif name in found:
            problems.append(f"{path}: same stem as {found[name].name}; keep one of them")
        else:
            found[name] = path
    return found


def name_file_in_errors(path: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """Read a file, its name put before whatever is wrong with it."""
    try:
        return read(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def is_large(path: Path) -> bool:
    """Tell whether a file has many megabytes, or is a folder of slices."""
    return not path.is_file() or path.stat().st_size > LARGE_FILE_BYTES


def split_by_size(paths: Sequence[Path], count: int) -> Iterator[slice]:
    """Part a list of files, at most `count` together; a file of many megabytes, or a folder, stays alone.

    So several volumes, decoded at once, do not fill the memory.
    """
    large = [is_large(path) for path in paths]
    start = 0
    while start < len(paths):
        end = start + (1 if any(large[start : start + count]) else count)
        yield slice(start, end)
        start = end
