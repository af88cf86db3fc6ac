"""Answer for a folder of unknown layout: what it holds, what comes nearest, what differs."""

from difflib import get_close_matches

from dataset.folder import Folder, draw_tree
from dataset.names import IMAGES, MASKS, plain, role_of, subset_of

EXPECTED = (
    "images/ + masks/ (or masks/CLASS/), x.png + x_mask.png in one folder, a folder a patient, "
    "train/ val/ test/, nnU-Net, COCO, labelme … (docs/your-data.md)"
)


def explain_unknown(folder: Folder) -> str:
    """Say what a folder holds and what it lacks."""
    tree = "".join(f"\n  {line}" for line in draw_tree(folder))
    return (
        f"{folder.path}: the layout is not known. It holds:{tree}\n"
        f"{_nearest(folder)}\nexpected {EXPECTED}"
    )


def _nearest(folder: Folder) -> str:
    """Name the nearest known layout, and what differs from it."""
    roles = {one.name: role_of(one.name)[0] for one in folder.folders}
    images = [name for name, role in roles.items() if role == "image"]
    masks = [name for name, role in roles.items() if role == "mask"]
    lower = {one.name.lower() for one in folder.folders}
    if {"imagestr", "labelstr"} & lower:
        lacking = "labelsTr" if "imagestr" in lower else "imagesTr"
        return f"nearest: nnU-Net; {lacking}/ lacks"
    if images or masks:
        known = (images or masks)[0]
        other = "masks" if images else "images"
        return f"nearest: images/ + masks/; {known}/ is there, {other}/ lacks{_misspelt(folder)}"
    if any(subset_of(name) for name in roles):
        return "nearest: train/ val/ test/; expected images/ + masks/ in each of them"
    if any(path.suffix.lower() == ".json" for path in folder.files):
        return "nearest: COCO; its JSON has no images, annotations and categories"
    if folder.images:
        return "nearest: one folder; there are images and no masks, such as x_mask.png for x.png"
    return f"nearest: images/ + masks/; both lack{_misspelt(folder)}"


def _misspelt(folder: Folder) -> str:
    """Say which folder has nearly a known name."""
    for one in folder.folders:
        if role_of(one.name)[0]:
            continue
        close = get_close_matches(plain(one.name), IMAGES | MASKS, n=1, cutoff=0.75)
        if close:
            return f" (rename {one.name} to {close[0]})"
    return ""
