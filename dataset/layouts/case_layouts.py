"""Layouts with image and mask in one folder: x.png + x_mask.png, or image.png + mask.png."""

from pathlib import Path

from dataset.folder import Folder, split_name
from dataset.layouts.pairing import Names, by_name, join
from dataset.layouts.unmatched import explain_unmatched
from dataset.names import is_mask_name, role_of
from dataset.pairs import Layout, Pair


def one_folder(folder: Folder) -> Layout | None:
    """Recognise x.png + x_mask.png in one folder, or in the folders in it."""
    problems: list[str] = []
    if not folder.images and len(folder.folders) == 1:
        return None  # the data set is in that folder
    names = by_name(folder.items(), problems)
    masks = {name: path for name, path in names.items() if is_mask_name(name)}
    images = {name: path for name, path in names.items() if name not in masks}
    # Of x_mask_1 and x_mask_2 both are masks of x.
    for name in list(images):
        if is_mask_name(name.rstrip("0123456789").rstrip("_- ")) and name not in masks:
            masks[name] = images.pop(name)
    if not masks or not images:
        return None
    joined = join(images, masks)
    if 2 * len(joined.lone) > len(masks) or joined.classes:
        return None
    ending = joined.masks and next(iter(joined.masks.items()))
    layout = Layout(f"x + {_sample(*ending, images)} in one folder", problems=problems)
    layout.problems += joined.problems + explain_unmatched(
        {name: path for name, path in images.items() if name not in joined.masks},
        joined.lone,
        folder.path,
        folder.path,
    )
    layout.notes += joined.notes
    kind = group_kind(folder)
    for name, paths in joined.masks.items():
        top, _, rest = name.partition("/")
        group = {kind: top} if kind and rest else {}
        layout.pairs.append(Pair(images[name], tuple(paths), **group))
    return layout


def _sample(image: str, masks: list[Path], images: Names) -> str:
    """Write a mask's name with x for its image's: x_mask."""
    own, mask = split_name(images[image].name)[0], split_name(masks[0].name)[0]
    return mask.replace(own, "x") if own in mask else mask


def group_kind(folder: Folder) -> str:
    """Say what the folders of images are: "patient"; "label" where a few have no numbers."""
    names = [one.name for one in folder.folders]
    numbered = sum(any(sign.isdigit() for sign in name) for name in names)
    if len(names) < 2:
        return ""
    return "patient" if 2 * numbered > len(names) or len(names) > 6 else "label"


def case_files(folder: Folder) -> Layout | None:
    """Recognise the folder of one case: image.png + mask.png, or x_t1, x_t2, x_flair + x_seg."""
    if len(folder.images) not in range(2, 10):
        return None
    masks, images = [], []
    for path in folder.images:
        name = split_name(path.name)[0]
        is_mask = is_mask_name(name) or role_of(name)[0] == "mask"
        (masks if is_mask else images).append(path)
    if len(masks) != 1 or not images:
        return None
    kinds = ", ".join(split_name(path.name)[0] for path in images)
    more = tuple(images[1:])
    name = f"{kinds} + {split_name(masks[0].name)[0]}" if not more else f"{len(images)} channels"
    return Layout(name, [Pair(images[0], (masks[0],), more_channels=more)])
