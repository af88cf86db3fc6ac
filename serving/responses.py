"""Write a mask for a client: PNG, COCO run lengths, GeoJSON polygons, DICOM segmentation."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from imaging import dicom, dicom_seg, pictures
from inference.exported_model import ExportedModel, Prediction, Prepared
from serving.errors import Problem, to_json_line


class MaskResponse(NamedTuple):
    """A written mask, and what the metrics record of it."""

    body: bytes
    headers: dict[str, str]
    foreground_share: float  # of the pixels, from 0 to 1
    confidence: float


def make_response(
    network: ExportedModel, probs: np.ndarray, prepared: Prepared, media_type: str, source: bytes
) -> MaskResponse:
    """Decide an image's mask from its probabilities (1, h, w, K) and write it as `media_type`.

    source: the image file; only a DICOM segmentation needs it.
    Raises Problem 406, UserError.
    """
    prediction = network.decide(probs, prepared)
    names = network.metadata["classes"]
    headers = {"X-Model-SHA256": network.sha256}
    if media_type == "image/png":
        body = pictures.mask_to_png(prediction.ids, names)
        areas = class_areas(prediction.ids, names, prediction.spacing_mm)
        headers["X-Areas"] = to_json_line(areas)
        headers["X-Confidence"] = f"{prediction.confidence:.4f}"
    elif media_type == "application/dicom":
        body = to_seg(prediction.ids, names, source, network.sha256)
    elif media_type == "application/geo+json":
        body = to_json_line(to_geojson(prediction, names)).encode()
    else:
        body = to_json_line(to_json(prediction, names)).encode()
    foreground_share = float((prediction.ids > 0).mean())
    return MaskResponse(body, headers, foreground_share, prediction.confidence)


def class_areas(
    ids: np.ndarray, names: Sequence[str], spacing_mm: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Measure each class's area in pixels, and in mm² where the pixels' size is known.

    ids: (H, W) class ids; class i is called names[i - 1].
    spacing_mm: (slices, rows, columns).
    """
    pixel_mm2 = None
    if spacing_mm is not None:
        pixel_mm2 = float(spacing_mm[-1] * spacing_mm[-2])
        # JSON has no infinity.
        if not math.isfinite(pixel_mm2 * ids.size):
            pixel_mm2 = None
    areas = []
    for number, name in enumerate(names, 1):
        pixels = int(np.count_nonzero(ids == number))
        mm2 = None if pixel_mm2 is None else pixels * pixel_mm2
        areas.append({"class": name, "area_pixels": pixels, "area_mm2": mm2})
    return areas


# -------------------------------------------------------------------------------------------- JSON


def to_json(prediction: Prediction, names: Sequence[str]) -> dict[str, Any]:
    """Describe a mask by the run lengths and the area of each class."""
    ids = prediction.ids
    classes = class_areas(ids, names, prediction.spacing_mm)
    for number, one in enumerate(classes, 1):
        one["rle"] = run_lengths(ids == number)
    return {"size": list(ids.shape), "confidence": prediction.confidence, "classes": classes}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) of bool as COCO's uncompressed RLE.

    The counts run down the columns and start with the zeros.
    """
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": counts}


# ----------------------------------------------------------------------------------------- GeoJSON


def to_geojson(prediction: Prediction, names: Sequence[str]) -> dict[str, Any]:
    """Describe a mask as a FeatureCollection (RFC 7946) with one feature per class."""
    features = []
    areas = class_areas(prediction.ids, names, prediction.spacing_mm)
    for number, properties in enumerate(areas, 1):
        geometry = outline(prediction.ids == number)
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {
        "type": "FeatureCollection",
        "features": features,
        "confidence": prediction.confidence,
    }


def outline(mask: np.ndarray) -> dict[str, Any]:
    """Outline a mask (H, W) of bool as a MultiPolygon with holes.

    The corners are the centres (x, y) of pixels on the border.
    """
    contours, hierarchy = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    )
    outer_rings, holes = {}, []
    for i, contour in enumerate(contours):
        parent = hierarchy[0, i, 3]
        if parent < 0:
            outer_rings[i] = [to_ring(contour)]
        else:
            holes.append((parent, to_ring(contour)))
    for parent, hole in holes:
        outer_rings[parent].append(hole)
    return {"type": "MultiPolygon", "coordinates": list(outer_rings.values())}


def to_ring(contour: np.ndarray) -> list[list[int]]:
    """Turn OpenCV's contour (N, 1, 2) into a closed ring in RFC 7946's direction."""
    points = contour[::-1, 0].tolist()
    ring = [*points, points[0]]
    # A ring has at least four points: repeat the last one.
    return ring + ring[-1:] * (4 - len(ring))


# ------------------------------------------------------------------------------------------- DICOM


def to_seg(ids: np.ndarray, names: Sequence[str], source: bytes, version: str) -> bytes:
    """Encode a DICOM segmentation of the DICOM file `source`, by a model of this version.

    Raises Problem 406, UserError.
    """
    if not dicom.is_dicom(source):
        raise Problem(406, "a DICOM segmentation needs a DICOM image")
    # The limit was checked when the image was decoded.
    header = dicom.read_header(source, max_bytes=math.inf)
    return dicom_seg.encode_seg(ids[None], names, [header], version)
