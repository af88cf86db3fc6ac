"""Layouts of annotation programs: COCO and labelme files, CVAT and Pascal VOC with colours."""

from collections import defaultdict
from pathlib import Path

from dataset.annotations import COCO_KEYS, Coco, read_shapes
from dataset.folder import Folder
from dataset.folder_layouts import images_and_masks
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
        return None
    found = _files_by_name(folder)
    names: dict[str, str] = {}
    taken: set[Path] = set()
    for path in files:
        table = read_shapes(path)
        if not table.annotations:
            layout.notes.append(f"{path.name} has no polygons or run lengths and is not used")
            layout.other.append(path)
            continue
        subset = _subset_of_file(path) if len(files) > 1 else ""
        names |= dict.fromkeys(table.used_names, "")
        _add_images(layout, path, table, found, taken, subset)
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
    tables = {path.stem: path for path in _json_files(folder) if is_labelme(path)}
    if not tables:
        return None
    layout = Layout("labelme")
    names: dict[str, str] = {}
    images = {path.stem: path for _, path in folder.items(series=False)}
    for stem, image in sorted(images.items()):
        if stem in tables:
            layout.pairs.append(Pair(image, (tables[stem],)))
    for stem, path in sorted(tables.items()):
        try:
            table = read_shapes(path)
        except UserError as error:
            layout.problems.append(f"{path}: {error}")
            continue
        if isinstance(table, tuple):
            names |= {label: "" for label, _ in table[1]}
        if stem not in images:
            layout.problems.append(f"{path}: no image of that name")
    unlabelled = sorted(images.keys() - tables.keys())
    if unlabelled:
        some = ", ".join(images[stem].name for stem in unlabelled[:MAX_LISTED])
        layout.notes.append(
            f"{len(unlabelled)} images have no JSON file and are passed over: {some}"
        )
    layout.classes = classes_text(dict.fromkeys(sorted(names), ""))
    layout.name += f", {_classes(names)} from its labels"
    layout.notes.append(CONVERTED)
    return layout


def _classes(names: dict[str, str]) -> str:
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


# ----------------------------------------------------------------------------------- CVAT and VOC


def voc(folder: Folder) -> Layout | None:
    """Recognise JPEGImages/ + SegmentationClass/ of Pascal VOC and CVAT, and labelmap.txt.

    Images without a mask are passed over: most of Pascal VOC have none.
    """
    if not folder.folder("segmentationclass"):
        return None
    layout = images_and_masks(folder)
    if layout is None:
        return None
    table = folder.file("labelmap.txt")
    if table:
        layout.other.append(table)
        layout.classes, layout.ignore = read_labelmap(table)
        layout.name += ", classes from labelmap.txt"
    lacking = [problem for problem in layout.problems if ": no mask of that name" in problem]
    if lacking and layout.pairs:
        layout.problems = [one for one in layout.problems if one not in lacking]
        layout.notes.append(f"{len(lacking)} images have no mask and are passed over")
    return layout


def read_labelmap(path: Path) -> tuple[str, str]:
    """Read CVAT's lines name:r,g,b:parts:actions: the classes, and the colour that is ignored."""
    colours, ignored = {}, ""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for line in lines:
        name, _, rest = line.partition(":")
        numbers = rest.partition(":")[0].split(",")
        if line.lstrip().startswith("#") or not line.strip():
            continue
        if len(numbers) != 3 or not all(one.strip().isdecimal() for one in numbers):
            raise UserError(f"{path}: line {line[:60]!r}; expected name:red,green,blue::")
        colour = "#" + "".join(f"{min(int(one), 255):02x}" for one in numbers)
        if name.strip().lower() in ("ignore", "void", "unlabeled", "unlabelled"):
            ignored = colour
        elif colour != "#000000" and name.strip().lower() != "background":
            colours[name.strip()] = colour
    return classes_text(colours), ignored
