"""Layouts of known programs and data sets: nnU-Net, Decathlon, CHASE_DB1, DRIVE."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from dataset.annotations import read_json
from dataset.folder import Folder
from dataset.layouts.folder_layouts import images_and_masks
from dataset.layouts.pairing import Names, by_name, match
from dataset.layouts.unmatched import explain_no_masks, explain_unmatched
from dataset.pairs import Layout, Pair, classes_text
from utils import UserError

CHANNEL = re.compile(r"_(\d{4})$")
EYE = re.compile(r"(?:^|[-_ ])(\d+)[-_ ]?(?:L|R|OD|OS|left|right)$", re.IGNORECASE)
DRIVE = re.compile(r"^\d+_(training|test)$")


# ------------------------------------------------------------------------ nnU-Net and Decathlon


def nnunet(folder: Folder) -> Layout | None:
    """Recognise imagesTr/ + labelsTr/ of nnU-Net and of the Medical Segmentation Decathlon."""
    images, masks = folder.folder("imagestr"), folder.folder("labelstr")
    if not (images and masks):
        return None
    layout = Layout("nnU-Net")
    channels = _add_cases(layout, images, masks, "")
    for ending, subset in (("ts", "test"), ("va", "val")):
        own_images, own_masks = folder.folder(f"images{ending}"), folder.folder(f"labels{ending}")
        if own_images and own_masks and own_masks.has_images():
            layout.pairs = [replace(one, subset=one.subset or "train") for one in layout.pairs]
            _add_cases(layout, own_images, own_masks, subset)
        elif own_images and own_images.has_images():
            layout.notes.append(f"{own_images.name}/ has no masks and is passed over")
    table = folder.file("dataset.json")
    if not channels:
        layout.name = "Medical Segmentation Decathlon"
    layout.name += f", {max(1, channels)} channels" if channels > 1 else ", 1 channel"
    if table:
        layout.other.append(table)
        _read_dataset_json(layout, table)
    return layout


def _add_cases(layout: Layout, images: Folder, masks: Folder, subset: str) -> int:
    """Pair the cases of two folders; return the number of channel files, 0 without numbers."""
    image_names = by_name(images.items(), layout.problems)
    mask_names = by_name(masks.items(), layout.problems)
    if not mask_names:
        layout.problems.append(explain_no_masks(masks.path))
        return 0
    cases: dict[str, dict[int, Path]] = {}
    numbered = False
    for name, path in image_names.items():
        number = CHANNEL.search(name)
        if number and name not in mask_names:
            cases.setdefault(CHANNEL.sub("", name), {})[int(number[1])] = path
            numbered = True
        else:
            cases.setdefault(name, {})[0] = path
    expected = set().union(*cases.values()) if cases else set()
    firsts = {name: min(channels.items())[1] for name, channels in cases.items()}
    matched = match(firsts, mask_names)
    lone_masks = {name: path for name, path in mask_names.items() if name not in matched}
    mask_of = {image: mask_names[mask] for mask, image in matched.items()}
    for name, channels in cases.items():
        missing = sorted(expected - set(channels))
        if name not in mask_of:
            continue
        if missing:
            layout.problems.append(
                f"{firsts[name]}: channel _{missing[0]:04d} is missing; others have it"
            )
            continue
        first, *more = [path for _, path in sorted(channels.items())]
        layout.pairs.append(Pair(first, (mask_of[name],), "", "", subset, tuple(more)))
    lone = {name: path for name, path in firsts.items() if name not in mask_of}
    layout.problems += explain_unmatched(lone, lone_masks, images.path, masks.path)
    return len(expected) if numbered else 0


def _read_dataset_json(layout: Layout, path: Path) -> None:
    """Take the classes, and the label that does not count, from dataset.json."""
    try:
        table = read_json(path)
    except UserError as error:
        layout.problems.append(f"{path}: {error}")
        return
    labels = table.get("labels") if isinstance(table, dict) else None
    if not isinstance(labels, dict):
        layout.notes.append(f"{path.name} names no labels; name the classes with --classes")
        return
    try:
        ids = _ids_by_name(labels)
    except (TypeError, ValueError):
        layout.problems.append(f"{path}: labels are {str(labels)[:80]}; expected names and numbers")
        return
    ignored = ids.pop("ignore", [])
    layout.ignore = "|".join(map(str, ignored))
    if layout.ignore:
        layout.notes.append(f"label {layout.ignore} does not count, says {path.name}")
    own, nested = _own_ids(ids)
    crossing = _crossing(ids)
    if crossing:
        one, other, shared = crossing
        owner = next(name for name, numbers in own.items() if shared in numbers)
        layout.notes.append(
            f"regions {one} and {other} of {path.name} share label {shared}, and none lies within "
            f"the other: these pixels are of {owner} alone"
        )
    elif nested:
        layout.notes.append(
            f"the regions of {path.name} lie within each other: a pixel is of the smallest"
        )
    layout.classes = classes_text({name: "|".join(map(str, ids)) for name, ids in own.items()})
    layout.name += f", classes from {path.name}" if layout.classes else ""


def _ids_by_name(labels: dict[str, Any]) -> dict[str, list[int]]:
    """Read labels as name: id, name: [ids] or id: name; without the background."""
    found = {}
    for key, value in labels.items():
        if isinstance(value, str) and key.strip().isdecimal() and not value.strip().isdecimal():
            key, value = value, int(key)
        ids = [int(one) for one in (value if isinstance(value, list) else [value])]
        if key.strip().lower() != "background" and ids != [0]:
            found[key.strip()] = [number for number in ids if number > 0]
    return found


def _own_ids(regions: dict[str, list[int]]) -> tuple[dict[str, list[int]], bool]:
    """Give each id to the smallest region that has it; say whether regions share ids."""
    owner: dict[int, str] = {}
    nested = False
    for name, ids in sorted(regions.items(), key=lambda region: -len(region[1])):
        nested |= any(number in owner for number in ids)
        owner |= dict.fromkeys(ids, name)
    own: dict[str, list[int]] = {name: [] for name in regions}
    for number in sorted(owner):
        own[owner[number]].append(number)
    return {name: ids for name, ids in own.items() if ids}, nested


def _crossing(regions: dict[str, list[int]]) -> tuple[str, str, int] | None:
    """Find two regions that share an id though none lies within the other, and that id."""
    for (one, ids), (other, others) in combinations(regions.items(), 2):
        shared = set(ids) & set(others)
        if shared and shared not in (set(ids), set(others)):
            return one, other, min(shared)
    return None


# ------------------------------------------------------------------------------- retinal vessels


def chase(folder: Folder) -> Layout | None:
    """Recognise CHASE_DB1: Image_01L.jpg + Image_01L_1stHO.png; _2ndHO is a second observer."""
    if not any(path.stem.lower().endswith("_1stho") for path in folder.images):
        return None
    layout = Layout("CHASE_DB1, the first observer's masks")
    images: Names = {}
    masks: Names = {}
    for path in folder.images:
        name, observer = re.fullmatch(r"(.*?)(_(?:1st|2nd)HO)?", path.stem, re.I).groups()
        if not observer:
            images[name] = path
        elif observer.lower() == "_1stho":
            masks[name] = path
        else:
            layout.other.append(path)
    if layout.other:
        layout.notes.append(
            f"{len(layout.other)} masks of the second observer (_2ndHO) are not used"
        )
    for name in sorted(images.keys() & masks.keys()):
        child = EYE.search(name)
        patient = child[1] if child else ""
        layout.pairs.append(Pair(images[name], (masks[name],), patient))
    lone_images = {name: path for name, path in images.items() if name not in masks}
    lone_masks = {name: path for name, path in masks.items() if name not in images}
    layout.problems += explain_unmatched(lone_images, lone_masks, folder.path, folder.path)
    return layout


def drive(folder: Folder) -> Layout | None:
    """Recognise training/ or test/ of DRIVE: images/21_training.tif + 1st_manual/21_manual1.gif.

    mask/ is the field of view, not the truth.
    """
    images = folder.folder("images")
    if not images or not any(DRIVE.match(path.stem) for path in images.images):
        return None
    manual, field = folder.folder("1st_manual"), folder.folder("mask")
    if not manual and not (field and all(path.stem.endswith("_mask") for path in field.images)):
        return None
    if not manual:
        return Layout(
            "DRIVE", notes=[f"{folder.name}/ has no 1st_manual/ (the truth) and is passed over"]
        )
    chosen = Folder(folder.path)
    chosen.folders = [images, manual]
    layout = images_and_masks(chosen)
    if layout:
        layout.name = "DRIVE, images/ + 1st_manual/"
        for one in folder.folders:
            if one.name.lower() in ("mask", "2nd_manual"):
                what = "the field of view" if one.name.lower() == "mask" else "a second observer's"
                layout.notes.append(f"{one.name}/ is {what} and is not used")
                layout.other += one.files
    return layout
