"""The layout of Pascal VOC and CVAT: JPEGImages/ + SegmentationClass/, classes in a text file."""

from dataclasses import replace
from pathlib import Path, PurePath

from dataset.folder import Folder, split_name
from dataset.layouts.folder_layouts import images_and_masks
from dataset.names import subset_of
from dataset.pairs import Layout, classes_text
from utils import UserError

VOID_NAMES = ("ignore", "void", "unlabeled", "unlabelled", "__ignore__")
VOID_ID, VOID_COLOUR = 255, (224, 224, 192)  # the borders of objects in Pascal VOC's palette
MASK_FOLDERS = ("segmentationclass", "segmentationclasspng")


def voc(folder: Folder) -> Layout | None:
    """Recognise JPEGImages/ + SegmentationClass/, with labelmap.txt or class_names.txt.

    Images without a mask are passed over: most of Pascal VOC have none.
    """
    masks = folder.folder(*MASK_FOLDERS)
    if not masks:
        return None
    layout = images_and_masks(folder)
    if layout is None:
        return None
    labelmap, names = folder.file("labelmap.txt"), folder.file("class_names.txt")
    if labelmap:
        layout.classes, layout.ignore = read_labelmap(labelmap)
    elif names:
        layout.classes = read_class_names(names)
    if labelmap or names:
        layout.other.append(labelmap or names)
        layout.name += f", classes from {(labelmap or names).name}"
    if not labelmap and masks.images and _has_void(masks.images[0]):
        layout.ignore = str(VOID_ID)
        layout.notes.append(f"the borders of objects, {VOID_ID}, do not count")
    lacking = [problem for problem in layout.problems if ": no mask of that name" in problem]
    if lacking and layout.pairs:
        layout.problems = [one for one in layout.problems if one not in lacking]
        layout.notes.append(f"{len(lacking)} images have no mask and are passed over")
    _use_lists(folder, layout)
    return layout


def read_labelmap(path: Path) -> tuple[str, str]:
    """Read CVAT's lines name:r,g,b:parts:actions: the classes, and the colour that is ignored."""
    colours, ignored = {}, ""
    for line in _read_lines(path):
        name, _, rest = line.partition(":")
        numbers = rest.partition(":")[0].split(",")
        if len(numbers) != 3 or not all(one.strip().isdecimal() for one in numbers):
            raise UserError(f"{path}: line {line[:60]!r}; expected name:red,green,blue::")
        colour = "#" + "".join(f"{min(int(one), 255):02x}" for one in numbers)
        if name.strip().lower() in VOID_NAMES:
            ignored = colour
        elif colour != "#000000" and name.strip().lower() != "background":
            colours[name.strip()] = colour
    return classes_text(colours), ignored


def read_class_names(path: Path) -> str:
    """Read labelme's list of names: the background is 0, the classes are 1, 2 …"""
    names = [name for name in _read_lines(path) if name.lower() not in VOID_NAMES]
    if names and names[0].strip("_").lower() == "background":
        names = names[1:]
    return classes_text({name: str(i) for i, name in enumerate(names, 1)})


def _read_lines(path: Path) -> list[str]:
    """Read the lines of a text file that say something."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected UTF-8 text") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _has_void(path: Path) -> bool:
    """Say whether a mask has Pascal VOC's palette, in which 255 is the border of objects."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            palette = picture.getpalette() if picture.mode == "P" else None
    except (OSError, ValueError, Image.DecompressionBombError):
        return False  # told when it is read
    return palette is not None and tuple(palette[3 * VOID_ID :][:3]) == VOID_COLOUR


def _use_lists(folder: Folder, layout: Layout) -> None:
    """Use the subsets that ImageSets/Segmentation/train.txt, val.txt … list."""
    sets = folder.folder("imagesets")
    sets = sets and (sets.folder("segmentation") or sets)
    if not sets:
        return
    subset_by_stem = {}
    for path in sets.files:
        if path.suffix.lower() == ".txt" and subset_of(path.stem):
            for line in _read_lines(path):
                # A line is a name, perhaps with an ending, or a name and a number.
                for name in (line, split_name(line)[0], line.split()[0]):
                    subset_by_stem.setdefault(PurePath(name).name, subset_of(path.stem))
            layout.other.append(path)
    layout.pairs = [
        replace(pair, subset=subset_by_stem.get(pair.stem, "")) for pair in layout.pairs
    ]
    without = sum(not pair.subset for pair in layout.pairs)
    if subset_by_stem and without:
        layout.notes.append(f"{without} of {len(layout.pairs)} images are in none of the lists")
