"""Read image/mask pairs: the image as stored, and what its masks say."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dataset import annotations
from dataset.annotations import is_annotation
from dataset.pairs import Pair, class_ending, class_folder
from imaging import formats
from imaging.alignment import check_alignment
from imaging.channel_files import read_channels
from imaging.labels import Classes, add_class, clean_name
from imaging.masks import encodings
from imaging.masks.encodings import Decoded, Note, Truth
from imaging.scan import Scan, name_in_errors
from utils import UserError

# The class id of a mask file whose values tell the classes.
ALL_CLASSES = 0
# `Scan.format` of a mask drawn from shapes: its channels are the classes.
SHAPES = "shapes"


def read_pair(pair: Pair, classes: Classes, window: str = "") -> tuple[Scan, Truth]:
    """Read a pair as stored: the image, and its masks.

    window: as in `prepare_scan`. Raises UserError with a line per fault, each naming its file.
    """
    problems: list[str] = []
    image, masks = None, []
    with collect_errors(problems):
        image = read_channels((pair.image, *pair.more_channels), window)
    with collect_errors(problems):
        masks = read_masks(pair, classes, image)
        if masks or image is not None:
            truth = merge_masks(pair, masks, classes, image)
    if problems:
        raise UserError("\n".join(problems))
    if image.pixels.shape[:3] != truth.mask.shape:
        sizes = f"{_size(truth.mask)}; its image {pair.image.name} is {_size(image.pixels)}"
        how = f" ({'; '.join(image.notes)})" if image.notes else ""
        raise UserError(f"{pair.masks[0]}: {sizes}{how}")
    for path, mask in zip(pair.masks, masks, strict=True):
        with name_in_errors(path):
            check_alignment(image, mask)
    return image, truth


def read_truth(pair: Pair, classes: Classes) -> Truth:
    """Read a pair's masks, without the image if they do not depend on it.

    Raises UserError, see `read_pair`.
    """
    if not pair.masks or not all(map(_is_picture, pair.masks)):
        return read_pair(pair, classes)[1]
    return merge_masks(pair, read_masks(pair, classes), classes)


def _is_picture(mask: Path) -> bool:
    """Say whether a mask is as large as its image: drawn shapes and volumes need not be."""
    placed = [suffix for form in formats.PLACED for suffix in form.suffixes]
    name = mask.name.lower()
    return name.endswith(formats.SUFFIXES) and not name.endswith(tuple(placed))


def read_masks(pair: Pair, classes: Classes, image: Scan | None = None) -> list[Scan]:
    """Read each mask file of a pair, with its values as stored.

    image: what a DICOM segmentation refers to. Raises UserError with a line per unreadable file.
    """
    # A wrong --classes is found before anything is read.
    class_of_each_file(pair, classes.names)
    masks, problems = [], []
    for path in pair.masks:
        with collect_errors(problems), name_in_errors(path):
            if is_annotation(path):
                masks.append(_draw_shapes(path, pair.image, image, classes.names))
            else:
                mask = formats.read_mask_scan(
                    path, image, classes.names, classes.overlap, classes.in_colour
                )
                masks.append(mask)
    if problems:
        raise UserError("\n".join(problems))
    return masks


def _draw_shapes(path: Path, file: Path, image: Scan | None, names: Sequence[str]) -> Scan:
    """Draw the shapes that a JSON file has for an image: a plane for each class (1, H, W, K)."""
    if image is None:
        raise UserError(f"its image {file.name} cannot be read")
    if len(image.pixels) > 1:
        raise UserError(f"{_size(image.pixels)}; expected an image of one slice")
    planes = annotations.read_planes(path, file, image.pixels.shape[1:3], names)
    return Scan(np.stack(planes, axis=-1)[None], format=SHAPES)


def merge_masks(
    pair: Pair, masks: Sequence[Scan], classes: Classes, image: Scan | None = None
) -> Truth:
    """Make one mask of a pair's files. Where classes overlap the later stays, or both do.

    image: says how large the mask is where there is no file: the image shows none of the classes.
    Raises UserError naming the file whose size or values are not those of a mask.
    """
    class_ids = class_of_each_file(pair, classes.names)
    shape = (masks[0] if masks else image).pixels.shape[:3]
    merged = np.zeros(shape, classes.dtype)
    ignored = np.zeros(shape, bool) if classes.ignored else None
    notes: list[Note] = []
    files = zip(class_ids, pair.masks, masks, strict=True)
    for class_id, path, mask in sorted(files, key=_class_id):
        with name_in_errors(path):
            if mask.pixels.shape[:3] != shape:
                raise UserError(f"{_size(mask.pixels)}; its image's other mask is {_size(merged)}")
            found = _decode(mask, classes, class_id if len(classes.names) > 1 else 0)
        notes += found.notes
        for one, where in found.planes.items():
            if (class_id != ALL_CLASSES or mask.format == SHAPES) and not classes.overlap:
                notes += _count_overlaps(merged[where], one, classes.names)
            add_class(merged, one, where)
        if ignored is not None:
            ignored |= found.ignored
    return Truth(merged, ignored, notes)


def _decode(mask: Scan, classes: Classes, class_id: int) -> Decoded:
    """Find the classes in a mask file, see `encodings.decode`, or in the planes of its shapes."""
    if mask.format != SHAPES:
        return encodings.decode(mask, classes, class_id)
    planes = {i: mask.pixels[..., i - 1] for i in range(1, len(classes.names) + 1)}
    ignored = np.zeros(mask.pixels.shape[:3], bool) if classes.ignored else None
    return Decoded(planes, ignored, [])


def _class_id(file: tuple[int, Path, Scan]) -> int:
    return file[0]


def _count_overlaps(before: np.ndarray, class_id: int, names: Sequence[str]) -> list[Note]:
    """Note how many pixels a class takes from others; before: their ids."""
    notes = []
    for other, count in enumerate(np.bincount(before, minlength=len(names) + 1)):
        if count and other not in (0, class_id):
            taker, giver = names[class_id - 1], names[other - 1]
            text = f"classes overlap: pixels of {giver} and {taker} are taken for {taker}"
            notes.append((f"{text}, the later name; --overlap keeps both", int(count)))
    return notes


def class_of_each_file(pair: Pair, names: Sequence[str]) -> list[int]:
    """Give the class id that each mask file of a pair shows, or ALL_CLASSES.

    Raises UserError if the folders of masks are not those of the classes.
    """
    if len(names) == 1:
        return [1] * len(pair.masks)
    known = [name.lower() for name in names]
    folders = []
    for path in pair.masks:
        ending = class_ending(pair, path)
        # Of one mask an ending may be no class: scan7_vessels.png.
        is_class = len(pair.masks) > 1 or ending in known
        folders.append(class_folder(pair, path) or (ending if is_class else ""))
    if folders == ["leftMask", "rightMask"]:
        folders = [_name_with(side, known) for side in ("left", "right")]
    folders = [clean_name(folder).lower() if folder else "" for folder in folders]
    if not set(folders) <= {"", *known}:
        raise UserError(
            f"{pair.masks[0].parents[1]}: folders of masks for {', '.join(folders)}; "
            f"--classes names {', '.join(known)}, or one for all"
        )
    return [1 + known.index(folder) if folder else ALL_CLASSES for folder in folders]


def _name_with(side: str, names: Sequence[str]) -> str:
    """Find the class of a side, such as "left lung"."""
    for name in names:
        if side in name:
            return name
    return side


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
