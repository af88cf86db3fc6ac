"""Contours of radiotherapy (RTSTRUCT), drawn into the slices of their image.

DICOM PS3.3, C.8.8.5 and C.8.8.6. A pixel is inside if its centre is; contours of one structure in
one plane cut holes into each other.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from imaging.dicom.dicom_file import open_dataset
from imaging.dicom.dicom_geometry import LPS_TO_RAS, slice_affines
from imaging.labels import BITS, add_class, clean_name
from imaging.scan import MAX_BYTES, Scan
from utils import UserError

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
# The outline of the whole body is no organ.
BODY = ("body", "external", "skin", "outer contour")
# A contour lies in a slice if its plane is at most so many slices away.
REACH = 0.5 + 1e-3


def is_rtstruct(header: Any) -> bool:
    """Say whether a DICOM file holds contours."""
    return header.get("SOPClassUID") == RTSTRUCT or header.get("Modality") == "RTSTRUCT"


def decode_rtstruct(content: bytes, image: Scan, names: Sequence[str]) -> np.ndarray:
    """Draw the structures that are called as the classes: ids (S, H, W). Raises UserError."""
    return to_scan(open_dataset(content, MAX_BYTES), image, names).pixels[..., 0]


def to_scan(header: Any, image: Scan, names: Sequence[str], overlap: bool = False) -> Scan:
    """Draw the structures of a file that is open: ids (S, H, W, 1), see `decode_rtstruct`."""
    affines = _slices_of(image)
    _check_reference(header, image)
    class_of = _classes_of(header, names)
    ids = np.zeros(image.pixels.shape[:3], BITS if overlap else np.uint8)
    twice = 0
    items = sorted(header.get("ROIContourSequence") or [], key=lambda item: _class(item, class_of))
    for item in items:
        class_id = _class(item, class_of)
        if class_id == 0:
            continue
        for number, polygons in _by_slice(item, affines).items():
            inside = fill_polygons(polygons, ids.shape[1:])
            twice += int((inside & (ids[number] > 0) & (ids[number] != class_id)).sum())
            add_class(ids[number], class_id, inside)
    notes = (
        f"its structures overlap in {twice} pixels: the later class stays; --overlap keeps both",
    )
    return Scan(ids[..., None], notes=notes if twice and not overlap else ())


def _class(item: Any, class_of: dict[int, int]) -> int:
    return class_of.get(int(item.get("ReferencedROINumber", -1)), 0)


def _structures(header: Any) -> dict[int, str]:
    """Name the structures by their numbers."""
    names = {}
    for item in header.get("StructureSetROISequence") or []:
        names[int(item.ROINumber)] = str(item.get("ROIName") or "").strip()
    return names


def _classes_of(header: Any, names: Sequence[str]) -> dict[int, int]:
    """Give the class id of each structure that belongs to a class.

    A single class of another name takes all structures but the body's outline.
    """
    structures = _structures(header)
    known = {name.lower(): i for i, name in enumerate(names, 1)}
    class_of = {}
    for number, name in structures.items():
        if clean_name(name).lower() in known:
            class_of[number] = known[clean_name(name).lower()]
    if not class_of and len(names) == 1:
        class_of = {n: 1 for n, name in structures.items() if name.lower() not in BODY}
    if not class_of:
        found = ", ".join(structures.values()) or "none"
        raise UserError(f"structures {found}; expected the classes {', '.join(names)}")
    return class_of


def _slices_of(image: Scan) -> list[np.ndarray]:
    """Give each slice's affine (4, 4) to RAS in mm. Raises UserError if the image has none."""
    affines = None
    if "DICOM" in image.format:  # also in a zip
        affines = slice_affines(image.header)
    elif image.affine is not None:
        affines = []
        for number in range(len(image.pixels)):
            moved = image.affine.copy()
            moved[:, 3] += number * image.affine[:, 0]
            affines.append(moved)
    if affines is None:
        raise UserError(
            "contours (RTSTRUCT) of an image that does not say where it lies in the patient; "
            "expected the DICOM series that they were drawn on"
        )
    return affines


def _check_reference(header: Any, image: Scan) -> None:
    """Raise UserError if contours and image have different coordinate systems."""
    ours = str(image.header[0].get("FrameOfReferenceUID") or "") if "DICOM" in image.format else ""
    theirs = {
        str(item.get(name) or "")
        for sequence, name in (
            ("ReferencedFrameOfReferenceSequence", "FrameOfReferenceUID"),
            ("StructureSetROISequence", "ReferencedFrameOfReferenceUID"),
        )
        for item in header.get(sequence) or []
    } - {""}
    if ours and theirs and ours not in theirs:
        raise UserError("not contours of its image (another frame of reference)")


def _by_slice(item: Any, affines: Sequence[np.ndarray]) -> dict[int, list[np.ndarray]]:
    """Sort a structure's contours by slice: polygons (N, 2) of rows and columns.

    Of several planes in one slice the nearest is taken.
    """
    inverses = np.linalg.inv(np.stack(affines))
    found: dict[int, dict[float, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    outside = 0
    for contour in item.get("ContourSequence") or []:
        if not str(contour.get("ContourGeometricType") or "").startswith("CLOSED"):
            continue
        points = np.float64(contour.ContourData).reshape(-1, 3)
        points = np.c_[points, np.ones(len(points))] @ LPS_TO_RAS.T
        number = int(np.abs(inverses[:, 0] @ points[0]).argmin())
        indices = points @ inverses[number].T
        if np.ptp(indices[:, 0]) > REACH:
            raise UserError("contours across the slices of its image; expected them in slices")
        distance = abs(float(indices[:, 0].mean()))
        if distance > REACH:
            outside += 1
            continue
        found[number][round(distance, 2)].append(indices[:, 1:3])
    if outside and not found:
        raise UserError("its contours lie outside of its image; expected the image drawn on")
    return {number: planes[min(planes)] for number, planes in found.items()}


def fill_polygons(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Fill polygons, each (N, 2) of rows and columns, by the even-odd rule: bool (H, W).

    A pixel is inside if its centre, a whole number, is.
    """
    crossings = np.zeros((shape[0], shape[1] + 1), np.int32)
    for polygon in polygons:
        start, end = polygon, np.roll(polygon, -1, axis=0)
        # Rows between the ends of each edge; the lower end counts, the upper does not.
        first = np.ceil(np.minimum(start[:, 0], end[:, 0])).clip(0, shape[0]).astype(int)
        last = np.ceil(np.maximum(start[:, 0], end[:, 0])).clip(0, shape[0]).astype(int)
        counts = last - first
        edge = np.repeat(np.arange(len(polygon)), counts)
        rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        height = end[edge, 0] - start[edge, 0]
        share = (rows - start[edge, 0]) / height
        columns = start[edge, 1] + share * (end[edge, 1] - start[edge, 1])
        columns = np.ceil(columns).clip(0, shape[1]).astype(int)
        np.add.at(crossings, (rows, columns), 1)
    return np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
