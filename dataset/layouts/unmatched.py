"""Explain why images have no mask: names that differ by one ending, empty folders, other files."""

from collections import defaultdict
from pathlib import Path

from imaging.files import SUFFIXES, file_stem

MIN_ALIKE = 2  # names that differ in the same way are one problem, not one each


def explain_none(kind: str, folder: Path) -> str:
    """Say what a folder holds instead of images or masks."""
    names = sorted(path.name for path in folder.iterdir())
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    there = f"but {some}" if names else "it is empty"
    return f"{folder}: no {kind}, {there}; expected files ending in {' '.join(SUFFIXES)}"


def explain_no_masks(folder: Path, is_class: bool = False) -> str:
    """Say what a folder holds instead of masks, and that each image needs one."""
    advice = "each image needs one, all 0 if there is nothing in the image"
    if is_class:
        advice += f". If {folder.name} is not a class, remove the folder"
    return f"{explain_none('mask', folder)}; {advice}"


def explain_unmatched(
    lone_images: dict[str, Path], lone_masks: dict[str, Path], image_dir: Path, mask_dir: Path
) -> list[str]:
    """Say what to do about images without a mask and masks without an image.

    lone_images, lone_masks: files by their names. Names that differ in the same way make one line.
    """
    lone_images, lone_masks = dict(lone_images), dict(lone_masks)
    problems = _explain_affixes("mask", lone_masks, mask_dir, "image", lone_images)
    problems += _explain_affixes("image", lone_images, image_dir, "mask", lone_masks)
    for path in lone_images.values():
        problems.append(f"{path}: no mask of that name in {mask_dir}")
    for path in lone_masks.values():
        problems.append(f"{path}: no image of that name in {image_dir}")
    return problems


def _explain_affixes(
    kind: str, longer: dict[str, Path], folder: Path, other: str, shorter: dict[str, Path]
) -> list[str]:
    """Explain names of `longer` that are one of `shorter` plus a common beginning or ending.

    Removes from both what it has explained.
    """
    problems, matched = [], set()
    renamed: set[str] = set()
    groups = _group_by_affix(set(longer), set(shorter))
    for (place, affix), names in sorted(groups.items(), key=lambda group: -len(group[1])):
        new = {long: short for long, short in names.items() if long in longer}
        if len(new) < MIN_ALIKE:
            continue
        long, short = next(iter(new.items()))
        old_name = longer[long].name
        new_name = short + old_name.removeprefix(file_stem(longer[long]))
        advice = f"rename them, such as {old_name} to {new_name}, or rename the {other}s"
        if renamed & set(new.values()):  # two files cannot have one name
            part = affix.strip("-_ .")
            advice = f"if they are a class, put each class into a folder, such as {part}/{new_name}"
        renamed |= set(new.values())
        problems.append(
            f"{len(new)} {kind}s in {folder} {place} {affix} and have no {other} of that name: "
            f"{advice}"
        )
        matched |= set(new.values())
        for name in new:
            del longer[name]
    for name in matched:
        del shorter[name]
    return problems


def _group_by_affix(longer: set[str], shorter: set[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Group pairs (longer name: shorter name) by what the longer one has in addition."""
    groups: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in sorted(longer):
        for cut in range(1, len(name)):
            if name[:cut] in shorter:
                groups["end in", name[cut:]][name] = name[:cut]
            if name[cut:] in shorter:
                groups["start with", name[:cut]][name] = name[cut:]
    return groups
