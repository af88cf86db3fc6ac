"""Join images and masks by their names."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dataset.folder import split_name
from dataset.names import CLASS_ENDING, OBJECT_NUMBER, SECOND, strip_image, strip_mask

NUMBERED = (
    "several numbered masks of an image are taken for objects and joined; if they are those of "
    "several readers, keep one of them"
)
Names = dict[str, Path]  # files by their name: the path below the folder, without ending


@dataclass
class Joined:
    """Which masks each image has."""

    masks: dict[str, list[Path]] = field(default_factory=dict)  # by the image's name
    lone: Names = field(default_factory=dict)  # masks without an image
    classes: dict[str, int] = field(default_factory=dict)  # a folder or ending each: its masks
    endings: bool = False  # whether the classes are endings of the masks' names
    objects: bool = False  # whether a mask shows one object, so that an image has many
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many masks found their image."""
        return sum(map(len, self.masks.values()))


def by_name(items: Iterable[tuple[str, Path]], problems: list[str]) -> Names:
    """Map names to files, sorted; names that are there twice and unprintable ones are problems."""
    found: Names = {}
    for name, path in sorted(items):
        # Bytes that are not UTF-8 become surrogates, which tables cannot hold.
        if not str(path).isprintable():
            problems.append(f"{str(path)!a}: its name has unprintable characters; rename it")
        elif name in found:
            problems.append(f"{path}: same stem as {found[name].name}; keep one of them")
        else:
            found[name] = path
    return found


def match(images: Names, masks: Names) -> dict[str, str]:
    """Find each mask's image by name: {mask: image}. The plainest rule that fits is taken."""

    def with_ending(name: str) -> str:
        return name + split_name(images[name].name)[1]

    found: dict[str, str] = {}
    rules: list[tuple[Callable[[str], str], Callable[[str], str]]] = [
        (_same, _same),
        (with_ending, _same),
        (_same, strip_mask),
        (with_ending, strip_mask),
        (str.lower, lambda name: strip_mask(name).lower()),
        (lambda name: strip_image(name).lower(), lambda name: strip_mask(name).lower()),
        (
            lambda name: strip_image(name).lower(),
            lambda name: strip_image(strip_mask(name)).lower(),
        ),
    ]
    ending = _last_word(masks)
    if ending:
        rules.append((_same, lambda name: name.removesuffix(ending)))
    for number, (image_key, mask_key) in enumerate(rules):
        left = [name for name in masks if name not in found]
        if not left:
            break
        taken = set(found.values()) if number > 4 else set()
        lookup: dict[str, list[str]] = defaultdict(list)
        for name in images:
            if name not in taken:
                lookup[image_key(name)].append(name)
        for name in left:
            names = lookup.get(mask_key(name), [])
            if len(names) == 1:
                found[name] = names[0]
    return found


def _same(name: str) -> str:
    return name


def _last_word(masks: Names) -> str:
    """Give the last word, with the sign before it, that all names end in: _vessels; "" if none."""
    ending = _common_affixes(masks)[1] if len(masks) > 1 else ""
    found = re.search(r"[-_ .][A-Za-z][A-Za-z0-9]*$", ending)
    return found[0] if found else ""


def join(images: Names, masks: Names) -> Joined:
    """Join images and masks in the way in which most masks find their image.

    Names alike; else a folder a class, a folder of objects an image, several numbered objects an
    image, other folders.
    """
    masks, notes = drop_second(masks)
    best = join_alike(images, masks)
    ways = (_join_classes, _join_objects, _join_numbered, _join_other_folders, _join_affix)
    for way in (*ways, _join_endings):
        if not best.lone:
            break
        other = way(images, masks)
        if other.count > best.count:
            best = other
    best.notes[:0] = notes
    return best


def drop_second(masks: Names) -> tuple[Names, list[str]]:
    """Leave out the masks of a second observer."""
    second = [name for name in masks if SECOND.search(name)]
    if not second or len(second) == len(masks):
        return masks, []
    kept = {name: path for name, path in masks.items() if name not in second}
    example = masks[second[0]].name
    note = f"{len(second)} masks of a second observer are not used ({example}); the first counts"
    return kept, [note]


def join_alike(images: Names, masks: Names) -> Joined:
    """Join images and masks of equal names, up to what masks add."""
    joined, found = Joined(), match(images, masks)
    for name, path in masks.items():
        image = found.get(name)
        if image is None:
            joined.lone[name] = path
        elif image in joined.masks:
            first = joined.masks[image][0].name
            joined.problems.append(
                f"{path}: a second mask of {images[image].name}, beside {first}; keep one of them"
            )
        else:
            joined.masks[image] = [path]
    return joined


def _join_classes(images: Names, masks: Names) -> Joined:
    """Join masks/CLASS/name to name, and masks/CLASS/folder/name to folder/name."""
    groups: dict[str, Names] = defaultdict(dict)
    for name, path in masks.items():
        folder, _, rest = name.partition("/")
        groups[folder if rest else ""][rest or name] = path
    joined = Joined(lone=groups.pop("", {}))
    for folder, names in sorted(groups.items()):
        one = join_alike(images, names)
        joined.problems += one.problems
        joined.lone |= {f"{folder}/{name}": path for name, path in one.lone.items()}
        if one.masks:
            joined.classes[folder] = len(one.masks)
        for image, paths in one.masks.items():
            joined.masks.setdefault(image, []).extend(paths)
    if len(groups) > 2 and all(map(_has_digit, groups)) and joined.count == len(joined.masks):
        return Joined(lone=masks)  # a folder a patient, not a class
    return joined


def _join_objects(images: Names, masks: Names) -> Joined:
    """Join masks/name/… to the image name: a file an object. Of a single image all are objects."""
    if len(images) == 1:
        numbered = len({name.rstrip("0123456789") for name in masks}) == 1 < len(masks)
        notes = [NUMBERED] if numbered else []
        return Joined({next(iter(images)): list(masks.values())}, objects=True, notes=notes)
    joined = Joined(objects=True)
    folders = {name.rpartition("/")[0]: masks[name] for name in masks}
    found = match(images, folders)
    for name, path in masks.items():
        image = found.get(name.rpartition("/")[0])
        if image is None:
            joined.lone[name] = path
        else:
            joined.masks.setdefault(image, []).append(path)
    return joined


def _join_numbered(images: Names, masks: Names) -> Joined:
    """Join name_1, name_2, name_mask_1 to name: a file an object."""
    joined, alike = Joined(objects=True), match(images, masks)
    shorter = {name: OBJECT_NUMBER.sub("", name) for name in masks}
    found = match(images, {short: masks[name] for name, short in shorter.items()})
    for name, path in masks.items():
        image = alike.get(name) or found.get(shorter[name])
        if image is None:
            joined.lone[name] = path
        else:
            joined.masks.setdefault(image, []).append(path)
    joined.notes += [NUMBERED] if any(len(paths) > 1 for paths in joined.masks.values()) else []
    return joined


def _join_endings(images: Names, masks: Names) -> Joined:
    """Join name_liver and name_tumour to name: an ending a class."""
    groups: dict[str, Names] = defaultdict(dict)
    for name, path in masks.items():
        found = CLASS_ENDING.search(strip_mask(name))
        if found:
            groups[found[1]][strip_mask(name)[: found.start()]] = path
    joined = Joined(endings=True)
    for ending, names in sorted(groups.items()):
        image_of = match(images, names)
        if image_of:
            joined.classes[ending] = len(image_of)
        for name, image in image_of.items():
            joined.masks.setdefault(image, []).append(names[name])
    used = {path for paths in joined.masks.values() for path in paths}
    joined.lone = {name: path for name, path in masks.items() if path not in used}
    return joined if len(joined.classes) > 1 else Joined(lone=masks)


def _join_other_folders(images: Names, masks: Names) -> Joined:
    """Join files of equal names in folders of other names, where no name is there twice."""
    flat_images = {name.rpartition("/")[2]: name for name in images}
    flat_masks = {name.rpartition("/")[2]: path for name, path in masks.items()}
    if len(flat_images) < len(images) or len(flat_masks) < len(masks):
        return Joined(lone=masks)
    joined = join_alike({flat: images[name] for flat, name in flat_images.items()}, flat_masks)
    joined.masks = {flat_images[flat]: paths for flat, paths in joined.masks.items()}
    return joined


def _join_affix(images: Names, masks: Names) -> Joined:
    """Join names that differ in one and the same beginning or ending, if that fits all masks."""
    if len(masks) < 2 or len(masks) != len(images):
        return Joined(lone=masks)
    joined = _join_without(images, masks, _common_affixes(images), _common_affixes(masks))
    return joined or Joined(lone=masks)


def _common_affixes(names: Names) -> tuple[str, str]:
    """Give what all names begin with, and what all end in."""
    own = sorted(name.rpartition("/")[2] for name in names)
    first, last = own[0], own[-1]
    start = 0
    while start < min(len(first), len(last)) and first[start] == last[start]:
        start += 1
    ends = sorted(name[::-1] for name in own)
    end = 0
    while end < min(len(ends[0]), len(ends[-1])) and ends[0][end] == ends[-1][end]:
        end += 1
    return first[:start].rstrip("0123456789"), ends[0][:end][::-1].lstrip("0123456789")


def _join_without(
    images: Names, masks: Names, image_affixes: tuple[str, str], mask_affixes: tuple[str, str]
) -> Joined | None:
    """Join what is left of the names without their common beginnings and endings."""
    short_images = {_without(name, *image_affixes): name for name in images}
    short_masks = {_without(name, *mask_affixes): path for name, path in masks.items()}
    if short_images.keys() != short_masks.keys() or len(short_images) < len(images):
        return None
    joined = Joined()
    for short, name in short_images.items():
        joined.masks[name] = [short_masks[short]]
    name, paths = next(iter(joined.masks.items()))
    joined.notes.append(f"masks are matched as {images[name].name} with {paths[0].name}")
    return joined


def _without(name: str, beginning: str, ending: str) -> str:
    folder, _, own = name.rpartition("/")
    return f"{folder}/{own.removeprefix(beginning).removesuffix(ending)}"


def _has_digit(name: str) -> bool:
    return any(sign.isdigit() for sign in name)
