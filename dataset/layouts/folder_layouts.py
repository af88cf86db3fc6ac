"""Layouts of plain folders: images in one, masks in another."""

from dataset.folder import Folder
from dataset.layouts.pairing import Joined, Names, by_name, join, match
from dataset.layouts.unmatched import explain_no_masks, explain_none, explain_unmatched
from dataset.names import NO_MASKS, SUBSET_OF, best_masks, plain, role_of, subset_of
from dataset.pairs import Layout, Pair, classes_text

MAX_FOLDERS = 40  # that are looked through for those of images and masks


def montgomery(folder: Folder) -> Layout | None:
    """Recognise the Montgomery County chest X-rays, as they are distributed."""
    images, masks = folder.folder("cxr_png"), folder.folder("manualmask")
    if not (images and masks):
        return None
    layout = Layout("Montgomery")
    found = by_name(images.items(), layout.problems)
    sides: list[Names] = []
    for name in ("leftmask", "rightmask"):
        side = masks.folder(name)
        if not side:
            there = ", ".join(one.name for one in masks.folders) or "no folder"
            layout.problems.append(f"{masks.path}: {there}; expected leftMask and rightMask")
            return layout
        named = by_name(side.items(), layout.problems)
        matched = match(found, named)
        sides.append({matched.get(name, name): path for name, path in named.items()})
        lone = {name: path for name, path in found.items() if name not in sides[-1]}
        unknown = {name: path for name, path in sides[-1].items() if name not in found}
        layout.problems += explain_unmatched(lone, unknown, images.path, side.path)
    for name, image in found.items():
        if all(name in side for side in sides):
            layout.pairs.append(Pair(image, tuple(side[name] for side in sides)))
    return layout


def images_and_masks(folder: Folder) -> Layout | None:
    """Recognise a folder of images beside one of masks, with any usual names; also a pair a subset.

    Masks may lie in a folder a class.
    """
    roles = [(one, *role_of(one.name)) for one in folder.folders[:MAX_FOLDERS]]
    masks = [one for one, role, _ in roles if role == "mask" and one.has_images()]
    if not masks:
        return _without_masks(roles)
    subsets = _subset_folders(roles, masks)
    if subsets:
        layouts = []
        for subset, image_folder, mask_folder in subsets:
            layouts.append(_join_folders(image_folder, mask_folder, subset))
        return merge(layouts)
    return _best_folders(folder, roles, masks)


def _without_masks(roles: list[tuple[Folder, str, str]]) -> Layout | None:
    """Say that images or masks lack, where both of their folders are there."""
    images = [one for one, role, _ in roles if role == "image"]
    masks = [one for one, role, _ in roles if role == "mask"]
    if not (images and masks):
        return None
    layout = Layout(f"{images[0].name}/ + {masks[0].name}/")
    if not images[0].has_images():
        layout.problems.append(explain_none("image", images[0].path))
    else:
        layout.problems.append(explain_no_masks(masks[0].path))
    return layout


def _subset_folders(
    roles: list[tuple[Folder, str, str]], masks: list[Folder]
) -> list[tuple[str, Folder, Folder]]:
    """Find train_images + train_masks, val_images + val_masks: (subset, images, masks)."""
    found = {}
    for mask in masks:
        rest = role_of(mask.name)[1]
        for image, role, image_rest in roles:
            if role != "mask" and rest in SUBSET_OF and image_rest == rest and image.has_images():
                found[SUBSET_OF[rest]] = (image, mask)
    return [(subset, *found[subset]) for subset in found] if len(found) > 1 else []


def _best_folders(
    folder: Folder, roles: list[tuple[Folder, str, str]], masks: list[Folder]
) -> Layout | None:
    """Join the folders of images and masks in which most names agree."""
    images = [one for one, role, _ in roles if role == "image" and one.has_images()]
    if not images:
        images = [one for one, role, _ in roles if not role and one.has_images()]
        images += [Here(folder.path, folder.depth)] if folder.images else []
    if not images:
        layout = Layout("images/ + masks/")
        empty = [one for one, role, _ in roles if role == "image"]
        layout.problems += [explain_none("image", one.path) for one in empty[:1]]
        return layout if empty else None
    best, most = None, (-1, 0, 0, 0)
    ranked = best_masks(masks)
    for rank, mask in enumerate(ranked):
        if plain(mask.name) in NO_MASKS and len(masks) > 1:
            continue
        for image in images:
            layout = _join_folders(image, mask)
            alike = role_of(image.name)[1] == role_of(mask.name)[1]
            is_manual = "manual" in plain(mask.name)  # in DRIVE mask/ is the field of view
            score = (is_manual and bool(layout.pairs), len(layout.pairs), alike, -rank)
            if score > most:
                best, most = layout, score
    if best and len(ranked) > 1:
        used = {path.parent for pair in best.pairs for path in pair.masks}
        others = [mask for mask in ranked if not any(mask.path in (p, *p.parents) for p in used)]
        if others and used:
            names = ", ".join(f"{mask.name}/" for mask in others)
            best.notes.append(f"{names} not used: the masks are those of {best.name}")
    return best


class Here(Folder):
    """A folder without the folders in it."""

    folders = ()


def _join_folders(images: Folder, masks: Folder, subset: str = "") -> Layout:
    """Pair the images of one folder with the masks of another."""
    problems: list[str] = []
    image_names = by_name(images.items(), problems)
    mask_names = by_name(masks.items(), problems)
    image_names, mask_names = _open_series(images, image_names, mask_names)
    joined = join(image_names, mask_names)
    own = "" if isinstance(images, Here) else f"{images.name}/"
    layout = Layout(f"{own or 'images'} + {masks.name}/", problems=problems + joined.problems)
    layout.notes += joined.notes
    if joined.classes:
        layout.name += "x_CLASS" if joined.endings else "CLASS/"
        layout.classes = _name_classes(layout, masks, joined, image_names)
    elif joined.objects:
        layout.name += ", a file an object"
    missing = _explain_lone(images, masks, image_names, joined)
    layout.problems += missing
    keep_empty = joined.classes and not joined.lone
    for name, image in image_names.items():
        paths = joined.masks.get(name, [])
        if paths or keep_empty:
            layout.pairs.append(Pair(image, tuple(paths), subset=subset or _subset_in(name)))
    return layout


def _open_series(images: Folder, image_names: Names, mask_names: Names) -> tuple[Names, Names]:
    """Take the files of a DICOM folder one by one, where there is a mask for each file."""
    folders = {name for name, path in image_names.items() if path.is_dir()}
    inner = {name.rpartition("/")[0] for name in mask_names} & folders
    if not inner:
        return image_names, mask_names
    files = by_name(images.items(series=False), [])
    kept = {name: path for name, path in image_names.items() if name not in inner}
    opened = {name: path for name, path in files.items() if name.rpartition("/")[0] in inner}
    return kept | opened, mask_names


def _name_classes(layout: Layout, masks: Folder, joined: Joined, images: Names) -> str:
    """Name the classes after their folders or endings; count the images that lack one."""
    for name, count in joined.classes.items():
        if count < len(images) and not joined.lone:
            place = f"class {name}" if joined.endings else f"{masks.name}/{name}"
            layout.notes.append(
                f"{place} has no file for {len(images) - count} of {len(images)} images: "
                "the class is absent there"
            )
    for one in masks.folders:
        if not joined.endings and one.name not in joined.classes and not one.has_images():
            layout.problems.append(explain_no_masks(one.path, is_class=True))
    return classes_text(dict.fromkeys(joined.classes, ""))


def _explain_lone(images: Folder, masks: Folder, names: Names, joined: Joined) -> list[str]:
    """Name the images without a mask and the masks without an image."""
    lone_images = {name: path for name, path in names.items() if name not in joined.masks}
    if joined.classes and not joined.lone:
        return []
    if not names:
        return [explain_none("image", images.path)]
    return explain_unmatched(lone_images, joined.lone, images.path, masks.path)


def _subset_in(name: str) -> str:
    """Say which subset a folder in an image's name means: train/x → train."""
    first, _, rest = name.partition("/")
    return subset_of(first) if rest else ""


def merge(layouts: list[Layout]) -> Layout:
    """Make one layout of several, named as the first."""
    whole = Layout(layouts[0].name, classes=layouts[0].classes, ignore=layouts[0].ignore)
    for one in layouts:
        whole.pairs += one.pairs
        whole.notes += [note for note in one.notes if note not in whole.notes]
        whole.problems += one.problems
        whole.other += one.other
        if one.classes != whole.classes:
            whole.classes = _join_classes(whole.classes, one.classes)
    return whole


def _join_classes(one: str, other: str) -> str:
    """Join the classes of two parts of a data set."""
    return ",".join(dict.fromkeys([*filter(None, one.split(",")), *filter(None, other.split(","))]))
