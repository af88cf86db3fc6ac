"""Read masks drawn as shapes in JSON files: COCO (polygons and run lengths) and labelme."""

import base64
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dataset.shapes import draw
from imaging import pictures
from imaging.labels import clean_name
from utils import UserError

MAX_JSON_BYTES = 2**30
CIRCLE_POINTS = 360
COCO_KEYS = {"images", "annotations", "categories"}

LOCK = Lock()

# A shape: the class's name, and what is drawn: polygons or run lengths; None for points and lines.
Shape = tuple[str, Any]
# The image's size (H, W), where the file gives it, and its shapes.
Labelme = tuple[tuple[int, int] | None, list[Shape]]


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError without the path."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{size / 2**30:.1f} GiB; expected at most 1 GiB of JSON")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"unreadable as JSON ({error})") from None


def is_annotation(path: Path) -> bool:
    """Say whether a pair's mask is a file of shapes."""
    return path.suffix.lower() == ".json"


def read_planes(
    path: Path, image: Path, shape: tuple[int, int], names: Sequence[str]
) -> list[np.ndarray]:
    """Draw an image's shapes of each class: one bool (H, W) for each of `names`.

    path: the JSON file. shape: (H, W) of the image. If there is one name, and no label has it, all
    shapes are of it. Raises UserError, its message without the path.
    """
    size, shapes = find_shapes(path, image)
    if size and size != shape:
        raise UserError(
            f"its {image.name} has {size[0]}x{size[1]} pixels; the image has {shape[0]}x{shape[1]}"
        )
    shapes = [(clean_name(label).lower(), drawing) for label, drawing in shapes]
    labels = {label for label, drawing in shapes if drawing is not None}
    known = [name.lower() for name in names]
    if len(names) > 1 and not labels <= set(known):
        unknown = ", ".join(sorted(labels - set(known)))
        raise UserError(f"labels {unknown}; --classes names {', '.join(names)}")
    planes = [np.zeros(shape, bool) for _ in names]
    for label, drawing in shapes:
        if drawing is None:
            continue
        class_index = known.index(label) if len(names) > 1 else 0
        planes[class_index] |= draw(drawing, shape)
    return planes


def read_shapes(path: Path) -> "Coco | Labelme | None":
    """Read a COCO or labelme file, once as long as it stays the same; None if it is neither.

    Raises UserError without the path.
    """
    with LOCK:  # a large file is not parsed by two threads
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"cannot be opened ({error.strerror})") from None
        return _parse(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _parse(path: Path, _size: int, _time_ns: int) -> "Coco | Labelme | None":
    table = read_json(path)
    if isinstance(table, dict) and table.keys() >= COCO_KEYS:
        return Coco(table)
    return read_labelme(table) if isinstance(table, dict) and "shapes" in table else None


def forget_files() -> None:
    """Free the memory of the files that were read: a large COCO file takes a gigabyte."""
    _parse.cache_clear()


def find_shapes(path: Path, image: Path) -> Labelme:
    """Find the shapes of one image in a JSON file, and the size (H, W) that it gives the image."""
    table = read_shapes(path)
    if table is None:
        raise UserError("neither COCO nor labelme; expected images, annotations, categories")
    if not isinstance(table, Coco):
        return table
    entries = table.entries.get(image.name, [])
    if len(entries) > 1:  # equal names in several folders: the one with most folders in common
        entries = sorted(entries, key=lambda entry: -_common_parts(entry["file_name"], image))
    if not entries:
        raise UserError(f"no image {image.name} in it")
    entry = entries[0]
    size = (entry.get("height"), entry.get("width"))
    shapes = []
    for other in entries:
        if other["file_name"] != entry["file_name"]:
            continue
        for annotation in table.annotations.get(str(other["id"]), []):
            shapes.append((table.names[annotation["category_id"]], annotation.get("segmentation")))
    return (size if all(isinstance(side, int) for side in size) else None), shapes


def _common_parts(name: str, path: Path) -> int:
    """Count the folders that a name and a path have in common, from the end."""
    count = 0
    for one, other in zip(
        reversed(name.replace("\\", "/").split("/")), reversed(path.parts), strict=False
    ):
        if one != other:
            break
        count += 1
    return count


# ------------------------------------------------------------------------------------------ COCO


class Coco:
    """A COCO file: images by file name, annotations by image."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.entries: dict[str, list[dict]] = defaultdict(list)
        self.annotations: dict[str, list[dict]] = defaultdict(list)
        self.names: dict[Any, str] = {}
        self.without_shape = 0  # annotations that are boxes or points alone
        try:
            for category in table["categories"]:
                self.names[category["id"]] = str(category["name"]).strip()
            for image in table["images"]:
                name = str(image["file_name"]).replace("\\", "/").rpartition("/")[2]
                image["id"]
                self.entries[name].append(image)
            for one in table["annotations"]:
                if one.get("segmentation"):
                    self.names[one["category_id"]]
                    # Some write the id as a number here and as text there.
                    self.annotations[str(one["image_id"])].append(one)
                else:
                    self.without_shape += 1
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"unreadable as COCO ({type(error).__name__}: {error}); expected images "
                "with id and file_name, categories with id and name, annotations of them"
            ) from None

    @property
    def used_names(self) -> list[str]:
        """The names of the categories that have a shape, in the order of the file."""
        used = {one["category_id"] for found in self.annotations.values() for one in found}
        return [name for key, name in self.names.items() if key in used]


# --------------------------------------------------------------------------------------- labelme


def read_labelme(table: dict[str, Any]) -> Labelme:
    """Read a labelme file. Raises UserError without the path."""
    try:
        shapes = []
        for shape in table["shapes"]:
            shapes.append((str(shape["label"]).strip(), _labelme_drawing(shape)))
        size = (table.get("imageHeight"), table.get("imageWidth"))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"unreadable as labelme ({type(error).__name__}: {error}); expected shapes with label "
            "and points"
        ) from None
    return (size if all(isinstance(side, int) for side in size) else None), shapes


def _labelme_drawing(shape: dict[str, Any]) -> Any:
    """Make a polygon, or a mask at a place, of a labelme shape; None for points and lines."""
    kind = shape.get("shape_type") or "polygon"
    points = np.array(shape["points"], float).reshape(-1, 2)
    if kind == "polygon":
        return [points.ravel().tolist()]
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]
    if kind == "circle":
        radius = np.hypot(*(points[1] - points[0]))
        angles = np.linspace(0, 2 * np.pi, CIRCLE_POINTS, endpoint=False)
        circle = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
        return [circle.ravel().tolist()]
    if kind == "mask":
        picture = pictures.decode_picture(base64.b64decode(shape["mask"]), 2**28).pixels
        return {"at": points[0].round().astype(int).tolist(), "mask": picture[0, :, :, 0] > 0}
    return None
