"""Write a mask for a client: PNG, COCO run lengths, GeoJSON polygons, DICOM segmentation; its areas."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from imaging import dicom, dicom_seg, pictures
from inference.exported_model import ExportedModel, Prepared
from serving.errors import Problem, to_json_line


def make_response(
    network: ExportedModel, probs: np.ndarray, prepared: Prepared, kind: str, source: bytes
) -> tuple[bytes, dict[str, str], float, float]:
    """Decide an image's mask and write it as `kind`: the body, headers, its share of the pixels, the confidence.

    Raises Problem 406, UserError.
    """
    found = network.decide(probs, prepared)
    ids, names, headers = found.ids, network.metadata["classes"], {"X-Model-SHA256": network.sha256}
    if kind == "image/png":
        areas = to_json_line(describe(ids, names, found.spacing_mm))
        body = pictures.mask_to_png(ids, names)
        headers |= {"X-Areas": areas, "X-Confidence": f"{found.confidence:.4f}"}
    elif kind == "application/dicom":
        body = to_seg(ids, names, source, network.sha256)
    else:
        write = to_json if kind == "application/json" else to_geojson
        body = to_json_line(write(ids, names, found.spacing_mm, found.confidence)).encode()
    return body, headers, float((ids > 0).mean()), found.confidence


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) in {0, 1} as COCO's uncompressed RLE: counts down the columns, zeros first."""
    flat = mask.ravel(order="F").astype(bool)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat.size and flat[0] else counts}


def polygons(mask: np.ndarray) -> dict[str, Any]:
    """Outline a mask (H, W) in {0, 1} as a GeoJSON MultiPolygon with holes, joining pixels' centres (x, y)."""
    outlines, tree = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    )
    rings = [
        [*outline[::-1, 0].tolist(), outline[-1, 0].tolist()] for outline in outlines
    ]  # RFC 7946's direction
    parts = {i: [ring] for i, ring in enumerate(rings) if tree[0, i, 3] < 0}
    for i, ring in enumerate(rings):
        if tree[0, i, 3] >= 0:
            parts[tree[0, i, 3]].append(ring)
    whole = [[_closed(ring) for ring in part] for part in parts.values()]
    return {"type": "MultiPolygon", "coordinates": whole}


def _closed(ring: list[list[int]]) -> list[list[int]]:
    """Repeat points until there are four, the least that GeoJSON allows."""
    return ring + ring[-1:] * (4 - len(ring))


def describe(
    ids: np.ndarray, names: Sequence[str], spacing_mm: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Tell each class's area in pixels, and in mm² where the rows' and columns' spacing is known."""
    areas = [int(np.count_nonzero(ids == number)) for number in range(1, len(names) + 1)]
    unit = None if spacing_mm is None else float(spacing_mm[-1] * spacing_mm[-2])
    unit = unit if unit is None or math.isfinite(unit * ids.size) else None  # JSON has no infinity
    return [
        {"class": name, "area_pixels": area, "area_mm2": None if unit is None else area * unit}
        for name, area in zip(names, areas, strict=True)
    ]


def to_json(
    ids: np.ndarray, names: Sequence[str], spacing_mm: Sequence[float] | None, confidence: float
) -> dict[str, Any]:
    """Describe a mask with its run lengths."""
    classes = describe(ids, names, spacing_mm)
    for number, one in enumerate(classes, 1):
        one["rle"] = run_lengths(ids == number)
    return {"size": list(ids.shape), "confidence": confidence, "classes": classes}


def to_geojson(
    ids: np.ndarray, names: Sequence[str], spacing_mm: Sequence[float] | None, confidence: float
) -> dict[str, Any]:
    """Make a FeatureCollection, a feature per class."""
    features = [
        {"type": "Feature", "geometry": polygons(ids == number), "properties": one}
        for number, one in enumerate(describe(ids, names, spacing_mm), 1)
    ]
    return {"type": "FeatureCollection", "features": features, "confidence": confidence}


def to_seg(ids: np.ndarray, names: Sequence[str], source: bytes, version: str) -> bytes:
    """Encode a DICOM segmentation of the DICOM file `source`, by a model of this version.

    Raises Problem 406, UserError.
    """
    if not dicom.is_dicom(source):
        raise Problem(406, "a DICOM segmentation needs a DICOM image")
    # The limit was checked when the image was decoded.
    header = dicom.read_header(source, max_bytes=math.inf)
    return dicom_seg.encode_seg(ids[None], names, [header], version)
