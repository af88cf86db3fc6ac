"""What a layout finds: pairs of an image and its masks, the classes, what was noticed."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dataset.names import CLASS_ENDING, role_of, strip_mask
from imaging.files import file_stem
from imaging.labels import clean_name

SUBSETS = ("train", "val", "test")
KEPT_APART = "none"  # the subset of images that take no part in a run, such as those of folds


@dataclass(frozen=True)
class Pair:
    """An image and its masks: one file, or a file per class, side or object."""

    image: Path
    masks: tuple[Path, ...]  # none: nothing is in the image
    patient: str = ""  # images of one patient stay in one subset; "" is a patient of its own
    label: str = ""  # subsets get equal shares of each label
    subset: str = ""  # set by the data set's author, or ""
    more_channels: tuple[Path, ...] = ()  # further channels of the image, in files of their own

    @cached_property
    def stem(self) -> str:
        """The name that image, mask and prediction share."""
        return file_stem(self.image)

    @cached_property
    def group(self) -> str:
        """What stays in one subset: the patient, or the image alone."""
        return self.patient or str(self.image.with_name(self.stem))


def class_folder(pair: Pair, mask: Path) -> str:
    """Name the folder of a class in which a mask lies, such as masks/CLASS/; "" if it is none.

    Folders of masks, of the image itself, and those that its image is in too are no class.
    """
    folder = mask.parent
    if folder.name in ("leftMask", "rightMask"):
        return folder.name
    if folder in (pair.image.parent, pair.image) or role_of(folder.name)[0] == "mask":
        return ""
    for parent in folder.parents:
        if parent in pair.image.parents:
            break
        if role_of(parent.name)[0] == "mask":
            name = folder.relative_to(parent).parts[0]
            return "" if name in (*pair.image.parts, pair.stem) else name
    return ""


def class_ending(pair: Pair, mask: Path) -> str:
    """Give what a mask's name adds to its image's, such as liver in scan7_liver.png; else ""."""
    image, own = pair.stem.lower(), strip_mask(file_stem(mask)).lower()
    found = CLASS_ENDING.fullmatch(own.removeprefix(image)) if own.startswith(image) else None
    return found[1] if found else ""


@dataclass
class Layout:
    """A data set as it lies: its pairs and what its files say of them."""

    name: str
    pairs: list[Pair] = field(default_factory=list)
    classes: str = ""  # as `--classes` takes them; "" where the layout names none
    ignore: str = ""  # the value of pixels that do not count, as `--ignore` takes it
    notes: list[str] = field(default_factory=list)  # what a user may want to know
    problems: list[str] = field(default_factory=list)  # what a user must repair
    other: list[Path] = field(default_factory=list)  # files that belong to it and are no pair
    folder: Path = Path()  # the data set's


def classes_text(values: dict[str, str]) -> str:
    """Write names and values as `--classes` takes them; signs that mean something are left out."""
    parts: dict[str, str] = {}
    for name, value in values.items():
        name = clean_name(name)
        while name in parts:
            name += "_"
        parts[name] = f"{name}={value}" if value else name
    return ",".join(parts.values())
