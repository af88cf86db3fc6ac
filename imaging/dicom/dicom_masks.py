"""Read masks that DICOM has formats of its own for: segmentations and contours.

Each lies where its image lies: by the files that it refers to, else by its place in the patient.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from imaging import dicom
from imaging.dicom import dicom_codecs, rtstruct
from imaging.dicom.dicom_elements import count_frames, look_up, places
from imaging.dicom.dicom_file import MAX_FRAMES, open_dataset
from imaging.dicom.dicom_geometry import frame_affine, slice_affines, sort_frames
from imaging.labels import BITS, clean_name
from imaging.scan import MAX_BYTES, Scan, check_declared_bytes
from utils import UserError, first_line

# A fraction of at least this share of the most is inside.
HALF = 0.5
# More segments than a mask of 8 bits has classes.
MAX_SEGMENT = 2**16


def decode_mask(
    content: bytes, image: Scan | None, names: Sequence[str], overlap: bool = False
) -> Scan | None:
    """Decode a DICOM segmentation or RTSTRUCT of `image`: ids of the classes `names`, (S, H, W, 1).

    overlap: a pixel may be of several classes, so BITS instead of ids, see `labels`.
    Returns None if the file is another kind of DICOM. Raises UserError if it belongs to other
    images, its segments overlap though they must not, or their labels are not `names`.
    """
    header = open_dataset(content, MAX_BYTES)
    is_contours = rtstruct.is_rtstruct(header)
    if not dicom.is_seg(header) and not is_contours:
        return None
    if image is None:
        raise UserError("a DICOM segmentation; expected its image beside it, to know its slices")
    try:
        if is_contours:
            return rtstruct.to_scan(header, image, names, overlap)
        return _to_scan(header, image, names, overlap)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"not a segmentation of its image ({first_line(error)})") from None


def _to_scan(header: Any, image: Scan, names: Sequence[str], overlap: bool) -> Scan:
    """Draw each frame of a segmentation into its image's grid."""
    class_of = _classes_of_segments(header, names)
    grid = _Grid(image, header)
    fractional = header.get("SegmentationType") == "FRACTIONAL"
    ids = np.zeros(image.pixels.shape[:3], BITS if overlap else np.uint8)
    for frame, drawn in enumerate(_frames_as_classes(header, class_of)):
        grid.draw(ids, drawn, frame)
    notes = ("its fractions are cut at half",) if fractional else ()
    return Scan(ids[..., None], notes=notes)


def _frames_as_classes(header: Any, class_of: dict[int, int]) -> Iterator[np.ndarray]:
    """Decode frame by frame: the class id of each pixel, (H, W) uint8."""
    from pydicom.pixels import iter_pixels

    frames = count_frames(header)
    if frames > MAX_FRAMES:
        raise UserError(f"its header declares {frames} frames; expected at most {MAX_FRAMES}")
    check_declared_bytes(MAX_BYTES, int(header.Rows), int(header.Columns), 2)
    table = np.zeros(MAX_SEGMENT, np.uint8)
    for number, class_id in class_of.items():
        table[number] = class_id
    kind = "LABELMAP" if str(header.SOPClassUID).endswith(".66.7") else header.SegmentationType
    least = HALF * int(header.get("MaximumFractionalValue") or 255) if kind == "FRACTIONAL" else 1
    ours = header.file_meta.TransferSyntaxUID in dicom_codecs.register()
    plugin = dicom_codecs.PLUGIN if ours else ""
    for frame, pixels in enumerate(iter_pixels(header, raw=True, decoding_plugin=plugin)):
        if kind == "LABELMAP":
            yield table[pixels]
        else:
            number = int(look_up(header, "ReferencedSegmentNumber", frame)[0])
            yield (pixels >= least) * table[number]


def _classes_of_segments(header: Any, names: Sequence[str]) -> dict[int, int]:
    """Give each segment's class id, by its label. With a single class all belong to it."""
    known = {name.lower(): i for i, name in enumerate(names, 1)}
    class_of, labels = {}, []
    for segment in header.SegmentSequence:
        # 0 is the background of a label map.
        if segment.SegmentNumber == 0:
            continue
        called = [clean_name(text).lower() for text in _names_of_segment(segment) if text.strip()]
        labels.append(next(iter(called), ""))
        found = next((known[name] for name in called if name in known), None)
        class_of[int(segment.SegmentNumber)] = found if len(names) > 1 else 1
    if None in class_of.values():
        raise UserError(f"segments {', '.join(labels)}; expected the classes {', '.join(names)}")
    return class_of


def _names_of_segment(segment: Any) -> list[str]:
    names = [str(segment.get("SegmentLabel") or "")]
    for code in segment.get("SegmentedPropertyTypeCodeSequence") or []:
        names.append(str(code.get("CodeMeaning") or ""))
    return [name for name in names if name]


class _Grid:
    """The pixels of an image, into which the frames of a segmentation are drawn."""

    def __init__(self, image: Scan, header: Any) -> None:
        self.image, self.header = image, header
        self.headers = image.header if "DICOM" in image.format else ()  # also in a zip
        self.slice_of = _slices_by_reference(self.headers)
        self.is_other = _is_elsewhere(self.headers, header)
        self.slice_affines = slice_affines(self.headers) if self.headers else None
        self.has_one_plane = _count_planes(header) == 1

    def draw(self, ids: np.ndarray, drawn: np.ndarray, frame: int) -> None:
        """Draw a frame's classes (H, W) into the image's (S, H, W)."""
        if not drawn.any():
            return
        number = self._find_slice(frame)
        if number is not None:
            if drawn.shape != ids.shape[1:]:
                raise UserError(
                    f"frames of {drawn.shape[0]}x{drawn.shape[1]} pixels; its image has "
                    f"{ids.shape[1]}x{ids.shape[2]}"
                )
            place, values = np.s_[number], drawn
        else:
            inside = np.nonzero(drawn)
            place, values = self._find_pixels(frame, inside), drawn[inside]
        old = ids[place]
        if ids.dtype == BITS:
            bits = np.left_shift(BITS(1), np.maximum(values, 1).astype(BITS) - BITS(1))
            ids[place] = np.where(values > 0, old | bits, old)
            return
        if ((old > 0) & (values > 0) & (old != values)).any():
            raise UserError(
                "its segments overlap; expected each pixel in one of them, or --overlap"
            )
        ids[place] = np.where(values > 0, values, old)

    def _find_slice(self, frame: int) -> int | None:
        """Find the slice that a frame refers to; None if it must be found by its place."""
        references = _references(self.header, frame)
        referred = {self.slice_of.get(key) for key in references}
        if len(referred) == 1 and None not in referred:
            number = referred.pop()
            return number if self._lies_on(number, frame) else None
        if len(self.image.pixels) > 1 or not self.has_one_plane:
            return None
        # One slice and one plane: they belong together, unless it is known that they do not.
        return None if self.headers and references else 0

    def _lies_on(self, number: int, frame: int) -> bool:
        """Say whether a frame has the pixels of a slice, as far as their places are known."""
        affine = frame_affine(self.header, frame)
        if self.slice_affines is None or affine is None or self.is_other:
            return True
        turn = np.linalg.inv(self.slice_affines[number]) @ affine
        ends = [(0, row, column, 1) for row in (0, 1) for column in (0, 1)]
        size = np.array([1, *self.image.pixels.shape[1:3], 1])
        corners = (np.array(ends) * size).T
        return bool(np.abs((turn @ corners - corners)[:3]).max() < 0.5)

    def _find_pixels(self, frame: int, inside: tuple) -> tuple:
        """Find the image's pixels (slices, rows, columns) of a frame's (rows, columns)."""
        affine = frame_affine(self.header, frame)
        if self.image.affine is None and not self.slice_affines and not self.headers:
            raise UserError(
                "a DICOM segmentation of an image that does not say where it lies in the patient; "
                "expected the DICOM or NIfTI files that it was drawn on"
            )
        number, target = 0, self.image.affine
        if self.is_other or affine is None or (target is None and not self.slice_affines):
            raise UserError("not a segmentation of its image (it refers to other images)")
        if target is None:
            inverses = np.linalg.inv(np.stack(self.slice_affines))
            number = int(np.abs(inverses[:, 0] @ affine[:, 3]).argmin())
            target = self.slice_affines[number]
        turn = np.linalg.inv(target) @ affine
        rows, columns = inside
        corners = np.abs(turn[:3, 1:3] - np.round(turn[:3, 1:3])).sum(1)
        shift = np.abs(turn[:3, 3] - np.round(turn[:3, 3]))
        units = np.abs(np.round(turn[:3, 1:3])).sum(0)
        size = max(self.image.pixels.shape[1:3])
        if (corners * size > 0.5).any() or (shift > 0.5).any() or (units != 1).any():
            raise UserError("it lies between the pixels of its image; expected the same grid")
        steps, start = np.round(turn[:3, 1:3]).astype(int), np.round(turn[:3, 3]).astype(int)
        place = steps @ np.stack([rows, columns]) + start[:, None]
        place[0] += number
        if (place < 0).any() or (self.image.pixels.shape[:3] <= place.T).any():
            raise UserError("it reaches beyond its image; expected the image that it was drawn on")
        return tuple(place)


def _slices_by_reference(headers: Sequence[Any]) -> dict[tuple[str, int], int]:
    """Number the slices of an image by their file's UID and the frame in it, from 1 on."""
    if not headers:
        return {}
    if len(headers) == 1:
        order = sort_frames(headers[0])
        uid = str(headers[0].get("SOPInstanceUID"))
        numbers = {(uid, frame + 1): i for i, frame in enumerate(order)}
        return numbers | ({(uid, 0): 0} if len(order) == 1 else {})
    numbers = {}
    for i, header in enumerate(headers):
        for frame in (0, 1):
            numbers[str(header.get("SOPInstanceUID")), frame] = i
    return numbers


def _references(header: Any, frame: int) -> list[tuple[str, int]]:
    """List the images (UID, frame from 1 on; 0 if none is named) that a frame was drawn on."""
    found = []
    for place in places(header, frame):
        for source in place.get("SourceImageSequence") or []:
            uid = str(source.get("ReferencedSOPInstanceUID"))
            numbers = np.atleast_1d(source.get("ReferencedFrameNumber") or 0)
            found += [(uid, int(number)) for number in numbers]
        if found:
            break
    return found


def _is_elsewhere(headers: Sequence[Any], header: Any) -> bool:
    """Say whether image and segmentation have different coordinate systems."""
    ours = str(headers[0].get("FrameOfReferenceUID") or "") if headers else ""
    theirs = str(header.get("FrameOfReferenceUID") or "")
    return bool(ours and theirs) and ours != theirs


def _count_planes(header: Any) -> int:
    """Count the places at which a segmentation has frames; unknown ones are one."""
    frames = range(min(count_frames(header), MAX_FRAMES))
    return len({look_up(header, "ImagePositionPatient", i) for i in frames})
