"""Layouts of annotation programs whose masks are shapes in JSON files: COCO and labelme."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from dataset.annotations import COCO_KEYS, Coco, find_shapes, read_shapes
from dataset.folder import Folder
from dataset.names import subset_of
from dataset.pairs import Layout, Pair, classes_text
from utils import UserError

HEAD_BYTES = 2**16  # of a JSON file, in which one of its keys is expected
MAX_LISTED = 5
CONVERTED = "shapes are converted to masks when they are read: pixels whose centre is inside"


def coco(folder: Folder) -> Layout | None:
    """Recognise COCO files beside images/, in annotations/, or among the images."""
    places = [folder, *(one for one in folder.folders if not one.is_series)]
    files = [path for place in places for path in place.files if is_coco(path)]
    if not files:
        return None
    layout = Layout("COCO")
    files = [path for path in files if _read(path, layout)]
    if not files:
        return layout if layout.problems else None
    found = _files_by_name(folder)
    names: dict[str, str] = {}
    taken: set[Path] = set()
    for path in files:
        table = read_shapes(path)
        if not table.annotations:
            layout.notes.append(f"{path.name} has no polygons or run lengths and is not used")
            layout.other.append(path)
            continue
        if table.without_shape:
            layout.notes.append(
                f"{table.without_shape} annotations of {path.name} are boxes without a shape and "
                "are not used"
            )
        subset = _subset_of_file(path) if len(files) > 1 else ""
        names |= dict.fromkeys(table.used_names, "")
        _add_images(layout, path, table, found, taken, subset)
    if not names:
        layout.problems.append(f"{files[0]}: no polygons or run lengths; expected some to draw")
    layout.classes = classes_text(names)
    layout.name += f", {_classes(names)} from {', '.join(path.name for path in files[:3])}"
    layout.notes.append(CONVERTED)
    return layout


def _read(path: Path, layout: Layout) -> bool:
    """Say whether a file is COCO; a damaged one is a problem."""
    try:
        return isinstance(read_shapes(path), Coco)
    except UserError as error:
        layout.problems.append(f"{path}: {error}")
        return False


def is_coco(path: Path) -> bool:
    """Say whether a file looks like COCO, by its first bytes."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return b'"shapes"' not in head and any(f'"{key}"'.encode() in head for key in COCO_KEYS)


def _files_by_name(folder: Folder) -> dict[str, list[Path]]:
    """List the image files below a folder by their own names."""
    found: dict[str, list[Path]] = defaultdict(list)
    for _, path in folder.items(series=False):
        found[path.name].append(path)
    return found


def _subset_of_file(path: Path) -> str:
    """Say which subset instances_train2017.json means, or a file in train/."""
    words = [*path.stem.replace("-", "_").split("_"), path.parent.name]
    return next((subset_of(word) for word in words if subset_of(word)), "")


def _add_images(
    layout: Layout,
    path: Path,
    table: Coco,
    found: dict[str, list[Path]],
    taken: set[Path],
    subset: str,
) -> None:
    """Pair the images that a COCO file names with it."""
    missing = []
    for name, entries in table.entries.items():
        for entry in entries:
            image = _choose(found.get(name, []), str(entry["file_name"]), path)
            if image is None:
                missing.append(name)
            elif image not in taken:
                taken.add(image)
                layout.pairs.append(Pair(image, (path,), subset=subset))
    if missing:
        some = ", ".join(missing[:MAX_LISTED]) + (", …" if len(missing) > MAX_LISTED else "")
        layout.problems.append(f"{path}: {len(missing)} of its images are not there: {some}")


def _choose(paths: list[Path], name: str, table: Path) -> Path | None:
    """Choose the file of that name whose folders agree most with the name and the table."""
    if len(paths) < 2:
        return paths[0] if paths else None
    wanted = {*name.replace("\\", "/").split("/"), *table.parts, *table.stem.split("_")}
    return max(paths, key=lambda path: len(wanted & set(path.parts)))


def labelme(folder: Folder) -> Layout | None:
    """Recognise labelme's x.json beside x.png, or in another folder."""
    tables = [path for path in _json_files(folder) if is_labelme(path)]
    if not tables:
        return None
    layout = Layout("labelme")
    names: set[str] = set()
    undrawn = 0
    images = [path for _, path in folder.items(series=False)]
    beside = {(path.parent, path.stem): path for path in images}
    named: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        named[path.stem].append(path)
    for path in sorted(tables):
        image = beside.get((path.parent, path.stem))
        if image is None and len(named[path.stem]) == 1:
            image = named[path.stem][0]
        try:
            shapes = find_shapes(path, path)[1]
        except UserError as error:
            layout.problems.append(f"{path}: {error}")
            continue
        names |= {label for label, drawing in shapes if drawing is not None}
        undrawn += sum(drawing is None for _, drawing in shapes)
        if image is None:
            layout.problems.append(f"{path}: no image of that name")
        else:
            layout.pairs.append(Pair(image, (path,)))
    _note_labelme(layout, images, undrawn)
    layout.classes = classes_text(dict.fromkeys(sorted(names), ""))
    layout.name += f", {_classes(names)} from its labels"
    return layout


def _note_labelme(layout: Layout, images: list[Path], undrawn: int) -> None:
    """Count the images without a file and the shapes that are no areas."""
    unlabelled = sorted(set(images) - {pair.image for pair in layout.pairs})
    if unlabelled and layout.pairs:
        some = ", ".join(path.name for path in unlabelled[:MAX_LISTED])
        count = "1 image has" if len(unlabelled) == 1 else f"{len(unlabelled)} images have"
        layout.notes.append(f"{count} no JSON file and cannot be used: {some}")
        layout.other += unlabelled
    if undrawn:
        layout.notes.append(f"{undrawn} points and lines are no areas and are not used")
    layout.notes.append(CONVERTED)


def _classes(names: Collection[str]) -> str:
    return "1 class" if len(names) == 1 else f"{len(names)} classes"


def _json_files(folder: Folder) -> list[Path]:
    """List the JSON files here, and in the folders in it."""
    places = [folder, *folder.folders]
    return [p for place in places for p in place.files if p.suffix.lower() == ".json"]


def is_labelme(path: Path) -> bool:
    """Say whether a JSON file is labelme's: it names shapes."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return b'"shapes"' in head
