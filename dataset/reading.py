"""Read image/mask pairs: the image as stored, its masks as class ids."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset import annotations
from dataset.annotations import is_annotation
from dataset.pairs import Pair, class_folder
from imaging import formats
from imaging.alignment import check_alignment
from imaging.scan import Scan, name_in_errors
from utils import UserError

# The class id of a mask file that holds the ids of all classes.
ALL_CLASSES = 0
# More values than this are grey levels, not classes.
MAX_SUGGESTED_CLASSES = 8


def read_pair(
    pair: Pair, names: Sequence[str], levels: Sequence[int] = (), window: str = ""
) -> tuple[Scan, np.ndarray]:
    """Read a pair as stored: the image, and its class ids (S, H, W), uint8 in 0..len(names).

    levels: the value of each class in the masks; none means 1, 2 … window: as in `prepare_scan`.
    Raises UserError with a line per fault, each naming its file.
    """
    problems: list[str] = []
    image, masks = None, []
    with collect_errors(problems):
        image = read_channels(pair, window)
    with collect_errors(problems):
        masks = read_masks(pair, names, image)
        ids = merge_masks(pair, masks, names, levels)
    if image is not None and not pair.masks:  # its classes are absent
        ids = np.zeros(image.pixels.shape[:3], np.uint8)
    if problems:
        raise UserError("\n".join(problems))
    if image.pixels.shape[:3] != ids.shape:
        sizes = f"{_size(ids)}; its image {pair.image.name} is {_size(image.pixels)}"
        raise UserError(f"{pair.masks[0]}: {sizes}")
    for path, mask in zip(pair.masks, masks, strict=True):
        with name_in_errors(path):
            check_alignment(image, mask)
    return image, ids


def read_channels(pair: Pair, window: str = "") -> Scan:
    """Read a pair's image, its further channels stacked behind the first. Raises UserError."""
    first = formats.read_named_scan(pair.image, window)
    if not pair.more_channels:
        return first
    channels = [first.pixels]
    for path in pair.more_channels:
        more = formats.read_named_scan(path, window).pixels
        if more.shape[:3] != first.pixels.shape[:3]:
            sizes = f"{_size(more)}; {pair.image.name} is {_size(first.pixels)}"
            raise UserError(f"{path}: {sizes}")
        channels.append(more)
    return replace(first, pixels=np.concatenate(channels, axis=-1))


def read_ids(pair: Pair, names: Sequence[str], levels: Sequence[int] = ()) -> np.ndarray:
    """Read a pair's masks alone as class ids (S, H, W). Raises UserError, see `read_pair`."""
    if not pair.masks or any(is_annotation(path) for path in pair.masks):
        return read_pair(pair, names, levels)[1]  # the image says how large they are
    return merge_masks(pair, read_masks(pair, names), names, levels)


def read_masks(pair: Pair, names: Sequence[str], image: Scan | None = None) -> list[Scan]:
    """Read each mask file of a pair, with its values as stored.

    image: what a DICOM segmentation refers to. Raises UserError with a line per unreadable file.
    """
    # A wrong --classes is found before anything is read.
    class_of_each_file(pair, names)
    masks, problems = [], []
    for path in pair.masks:
        with collect_errors(problems), name_in_errors(path):
            if is_annotation(path):
                masks.append(_draw_mask(path, pair.image, image, names))
            else:
                masks.append(formats.read_mask_scan(path, image, names))
    if problems:
        raise UserError("\n".join(problems))
    return masks


def _draw_mask(path: Path, file: Path, image: Scan | None, names: Sequence[str]) -> Scan:
    """Draw the shapes that a JSON file has for an image, as class ids. Raises UserError."""
    if image is None:
        raise UserError(f"its image {file.name} cannot be read")
    if len(image.pixels) > 1:
        raise UserError(f"{_size(image.pixels)}; expected an image of one slice")
    ids = np.zeros(image.pixels.shape[1:3], np.uint8)
    for class_id, plane in enumerate(annotations.read_planes(path, file, ids.shape, names), 1):
        ids[plane] = class_id
    return Scan(ids[None, :, :, None])


def merge_masks(
    pair: Pair, masks: Sequence[Scan], names: Sequence[str], levels: Sequence[int] = ()
) -> np.ndarray:
    """Make class ids (S, H, W) of a pair's masks. Where classes overlap the later one stays.

    Raises UserError naming the file whose size or values are not those of a mask.
    """
    files = zip(class_of_each_file(pair, names), pair.masks, masks, strict=True)
    class_levels = levels or range(1, len(names) + 1)
    ids = np.zeros(masks[0].pixels.shape[:3] if masks else (), np.uint8)
    for class_id, path, mask in sorted(files, key=_class_id):
        values = mask.pixels[..., 0]
        with name_in_errors(path):
            if values.shape != ids.shape:
                raise UserError(f"{_size(values)}; its image's other mask is {_size(ids)}")
            if class_id == ALL_CLASSES:
                _check_levels(path, values, class_levels)
                for i, level in enumerate(class_levels, 1):
                    ids[values == level] = i
            else:
                _check_binary(path, values, levels if len(names) == 1 else ())
                ids[values > 0] = class_id
    return ids


def _class_id(file: tuple[int, Path, Scan]) -> int:
    return file[0]


def class_of_each_file(pair: Pair, names: Sequence[str]) -> list[int]:
    """Give the class id that each mask file of a pair shows, or ALL_CLASSES.

    Raises UserError if the folders of masks are not those of the classes.
    """
    if len(names) == 1:
        return [1] * len(pair.masks)
    known = [name.lower() for name in names]
    folders = [class_folder(pair, path) for path in pair.masks]
    if folders == ["leftMask", "rightMask"]:
        folders = [_name_with(side, known) for side in ("left", "right")]
    if not {folder.lower() for folder in folders} <= {"", *known}:
        raise UserError(
            f"{pair.masks[0].parents[1]}: folders of masks for {', '.join(folders)}; "
            f"--classes names {', '.join(known)}, or one for all"
        )
    return [1 + known.index(folder.lower()) if folder else ALL_CLASSES for folder in folders]


def _name_with(side: str, names: Sequence[str]) -> str:
    """Find the class of a side, such as "left lung"."""
    for name in names:
        if side in name:
            return name
    return side


def _check_binary(path: Path, mask: np.ndarray, levels: Sequence[int]) -> None:
    """Raise UserError unless a mask of one class has its value, or 255 or 1."""
    values = _values(mask)
    if levels and list(levels) != [1]:
        if not values <= {0, *levels}:
            expected = f"0 and {levels[0]}, as --classes says"
            raise UserError(f"values {_list_some(values)}; expected {expected}")
    elif not (values <= {0, 255} or values <= {0, 1}):
        advice = _advice(path, values)
        raise UserError(f"values {_list_some(values)}; expected 0/255 or 0/1{advice}")


def _check_levels(path: Path, mask: np.ndarray, levels: Sequence[int]) -> None:
    """Raise UserError unless a mask of several classes has their values only."""
    values = _values(mask)
    if not values <= {0, *levels}:
        expected = f"{_list_some({0, *levels})}, the values of --classes"
        advice = _advice(path, values)
        raise UserError(f"values {_list_some(values)}; expected {expected}{advice}")


def _values(mask: np.ndarray) -> set[float]:
    """List the values in a mask."""
    extremes = {mask.min().item(), mask.max().item()}
    # Most masks have two values. np.unique is much slower.
    if sum(np.count_nonzero(mask == value) for value in extremes) == mask.size:
        return extremes
    return set(np.unique(mask).tolist())


def _advice(path: Path, values: set[float]) -> str:
    """Advise what to do about mask values that are not expected."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return " (JPEG blurs masks: save them as PNG)"
    classes = sorted(values - {0})
    if len(classes) > MAX_SUGGESTED_CLASSES:
        return ""
    if any(value < 1 or value != int(value) for value in classes):
        return ""
    named = ",".join(f"NAME{i}={value:.0f}" for i, value in enumerate(classes, 1))
    return f' (if these are classes, name them: --classes "{named}")'


@contextmanager
def collect_errors(problems: list[str]) -> Iterator[None]:
    """Append the message of a UserError that is raised in the block, and go on after it."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def _size(array: np.ndarray) -> str:
    slices = f"{array.shape[0]} slices of " if len(array) > 1 else ""
    return f"{slices}{array.shape[1]}x{array.shape[2]} pixels"


def _list_some(values: set[float]) -> str:
    """List the first values."""
    listed = ", ".join(f"{value:g}" for value in sorted(values)[:6])
    return listed + (", …" if len(values) > 6 else "")
