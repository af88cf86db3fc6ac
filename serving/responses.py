"""Write a mask for a client: PNG, COCO run lengths, GeoJSON polygons, or in its image's format."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from imaging import formats, pictures
from imaging.dicom import dicom_seg
from imaging.labels import Classes, plane
from imaging.scan import Mask
from inference.exported_model import ExportedModel, Prepared
from inference.quality import Quality
from serving import media_types, view, volumes
from serving.errors import to_json_line
from serving.run_lengths import run_lengths
from utils import UserError

MAX_NOTES_LENGTH = 2000  # characters of the header X-Notes


class MaskResponse(NamedTuple):
    """A written mask, and what the metrics record of it."""

    body: bytes
    media_type: str
    headers: dict[str, str]
    foreground_share: float  # of the pixels, from 0 to 1
    quality: Quality | None


def respond_to_image(
    network: ExportedModel, probs: np.ndarray, prepared: Prepared, accepted: Sequence[str]
) -> MaskResponse:
    """Decide an image's mask from the probabilities (1, …, K) of its only window, and write it.

    accepted: media types, the best first. Raises Problem 406, UserError.
    """
    found = network.decide(probs, prepared)
    return respond(network, found.ids, found.quality, prepared, accepted)


def respond(
    network: ExportedModel,
    ids: np.ndarray,
    quality: Quality | None,
    prepared: Prepared,
    accepted: Sequence[str],
) -> MaskResponse:
    """Clean class ids (S, H, W) and write them, in the first media type in which that is possible.

    Raises Problem 413, UserError.
    """
    network.clean(ids, prepared)
    notes = [*prepared.notes, *([quality.note] if quality and quality.note else [])]
    for media_type in accepted:
        try:
            body = write_mask(network, ids, quality, prepared, media_type, notes)
            break
        except UserError:
            if media_type == accepted[-1]:
                raise
            notes.append(f"the mask cannot be written as {media_type}; it is of another type")
    headers = {"X-Model-SHA256": network.sha256}
    if quality:
        headers["X-Quality"] = to_json_line(quality.describe())
    if media_type not in (media_types.JSON, media_types.GEOJSON, media_types.VIEW):
        headers |= describe_in_headers(network, ids, prepared, notes)
    return MaskResponse(body, media_type, headers, float((ids > 0).mean()), quality)


def describe_in_headers(
    network: ExportedModel, ids: np.ndarray, prepared: Prepared, notes: Sequence[str]
) -> dict[str, str]:
    """Write into headers what a mask without JSON has no place for: sizes and notes."""
    names = network.metadata["classes"]
    if len(ids) == 1:
        headers = {"X-Areas": to_json_line(class_areas(ids[0], names, prepared.spacing_mm))}
    else:
        headers = {"X-Volumes": to_json_line(volumes.class_volumes(ids, names, prepared))}
    shown = [
        note for i, note in enumerate(notes) if len("".join(notes[: i + 1])) < MAX_NOTES_LENGTH
    ]
    return headers | ({"X-Notes": to_json_line(shown)} if shown else {})


def write_mask(
    network: ExportedModel,
    ids: np.ndarray,
    quality: Quality | None,
    prepared: Prepared,
    media_type: str,
    notes: Sequence[str],
) -> bytes:
    """Write class ids (S, H, W) as a media type that fits them. Raises Problem 413, UserError."""
    names = network.metadata["classes"]
    if media_type == media_types.VIEW:
        return write_view(network, ids, quality, prepared, notes)
    more = {"quality": quality.describe() if quality else None, "notes": list(notes)}
    if media_type in (media_types.JSON, media_types.GEOJSON) and len(ids) == 1:
        describe = to_json if media_type == media_types.JSON else to_geojson
        described = describe(ids[0], names, prepared.spacing_mm)
        return to_json_line(described | more).encode()
    if media_type == media_types.JSON:
        return to_json_line(volumes.to_json(ids, names, prepared) | more).encode()
    if media_type == media_types.PNG:
        return pictures.mask_to_png(ids[0], names)
    mask = Mask(ids, names, Classes.from_metadata(network.metadata).levels)
    if media_type in (media_types.DICOM, media_types.DICOM_ZIP):  # `dicom_objects` adds the others
        return dicom_seg.encode_mask(mask, prepared.scan(), network.sha256)
    for form in formats.FORMATS:
        if media_type == media_types.FORMATS.get(form.name):
            return form.encode_mask(mask, prepared.scan())
    raise UserError(f"no mask is written as {media_type}")


def write_view(
    network: ExportedModel,
    ids: np.ndarray,
    quality: Quality | None,
    prepared: Prepared,
    notes: Sequence[str],
) -> bytes:
    """Write what the web page shows of a mask, and a file of it; the image is added later."""
    names, notes = network.metadata["classes"], list(notes)
    if len(ids) == 1:
        classes = class_areas(ids[0], names, prepared.spacing_mm)
    else:
        classes = volumes.class_volumes(ids, names, prepared)
    kinds = media_types.file_types(prepared)
    for kind in kinds:
        try:
            file = write_mask(network, ids, quality, prepared, kind, notes)
            break
        except UserError:  # a format that has no overlapping classes, a header that lacks a UID
            if kind == kinds[-1]:
                raise
    shown = {"classes": classes, "notes": notes}
    shown["quality"] = quality.describe() if quality else None
    name, boundary = f"mask{media_types.SUFFIXES[kind]}", view.make_boundary()
    return view.encode_mask(boundary, ids, shown) + (
        view.encode_part(boundary, "file", file, kind, name)
    )


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
        pixels = int(np.count_nonzero(plane(ids, number)))
        mm2 = None if pixel_mm2 is None else pixels * pixel_mm2
        areas.append({"class": name, "area_pixels": pixels, "area_mm2": mm2})
    return areas


# -------------------------------------------------------------------------------------------- JSON


def to_json(
    ids: np.ndarray, names: Sequence[str], spacing_mm: Sequence[float] | None
) -> dict[str, Any]:
    """Describe a mask (H, W) by the run lengths and the area of each class."""
    classes = class_areas(ids, names, spacing_mm)
    for number, one in enumerate(classes, 1):
        one["rle"] = run_lengths(plane(ids, number))
    return {"size": list(ids.shape), "classes": classes}


# ----------------------------------------------------------------------------------------- GeoJSON


def to_geojson(
    ids: np.ndarray, names: Sequence[str], spacing_mm: Sequence[float] | None
) -> dict[str, Any]:
    """Describe a mask (H, W) as a FeatureCollection (RFC 7946) with one feature per class."""
    features = []
    for number, properties in enumerate(class_areas(ids, names, spacing_mm), 1):
        geometry = outline(plane(ids, number))
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


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
