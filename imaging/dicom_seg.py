"""DICOM segmentations: masks that refer to the DICOM files of their image, by highdicom."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from imaging import dicom
from imaging.scan import MAX_BYTES, Mask, Scan
from utils import UserError, first_line

# Version of this software in the files that it writes.
VERSION = "1"
# DICOM's longest code meaning.
MAX_NAME_LENGTH = 64


def encode_mask(mask: Mask, image: Scan, version: str = VERSION) -> bytes:
    """Encode a mask as DICOM segmentation, one segment per class, that refers to its image's files.

    version: of the algorithm, at most 64 characters. Raises UserError if the image's headers lack
    what a segmentation needs.
    """
    return encode_seg(mask.ids, mask.names, image.header, version)


def encode_seg(
    ids: np.ndarray, names: Sequence[str], headers: Sequence[Any], version: str = VERSION
) -> bytes:
    """Encode class ids (S, H, W) as in `encode_mask`; headers: of the image's files, sorted."""
    import highdicom as hd

    try:
        segmentation = hd.seg.Segmentation(
            headers,
            ids.astype(np.uint8),
            hd.seg.SegmentationTypeValues.BINARY,
            _describe_segments(names, version),
            series_instance_uid=hd.UID(),
            series_number=100,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="none",
            manufacturer_model_name="U-Net",
            software_versions=version,
            device_serial_number="none",
            # DICOM allows no segmentation without frames.
            omit_empty_frames=bool(ids.any()),
        )
        # The source's character set may lack letters of the class names. Its texts are decoded
        # before the set changes.
        segmentation.decode()
        segmentation.SpecificCharacterSet = "ISO_IR 192"
        buffer = io.BytesIO()
        segmentation.save_as(buffer)
    except Exception as error:
        # A damaged header causes errors of many kinds.
        raise UserError(f"no DICOM segmentation can refer to it ({first_line(error)})") from error
    return buffer.getvalue()


def _describe_segments(names: Sequence[str], version: str) -> list[Any]:
    """Describe each class as a segment that this software found."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        "U-Net", codes.DCM.ArtificialIntelligence, version
    )
    segments = []
    for number, name in enumerate(names, 1):
        # A coding scheme that begins with 99 is private.
        code = hd.sr.CodedConcept(f"CLASS{number}", "99UNET", name[:MAX_NAME_LENGTH])
        segments.append(
            hd.seg.SegmentDescription(
                number,
                name,
                codes.SCT.AnatomicalStructure,
                code,
                hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm,
            )
        )
    return segments


def decode_seg(content: bytes, image: Scan, names: Sequence[str]) -> np.ndarray | None:
    """Decode a DICOM segmentation of `image`: class ids (S, H, W), by the segments' labels.

    Returns None if the file is another kind of DICOM. Raises UserError if it refers to other
    images, its segments overlap, or their labels are not `names`.
    """
    header = dicom.read_header(content, MAX_BYTES)
    if not dicom.is_seg(header):
        return None
    try:
        numbers, labels = _read_segments(header, image.header)
    except Exception as error:
        raise UserError(f"not a segmentation of its image ({first_line(error)})") from None
    return _to_class_ids(numbers, labels, names)


def _read_segments(header: Any, sources: Sequence[Any]) -> tuple[np.ndarray, dict[int, str]]:
    """Read the segment number of every pixel (S, H, W), and the label of each number.

    Raises an error of any kind if the segmentation does not fit the source's headers.
    """
    import highdicom as hd

    segmentation = hd.seg.Segmentation.from_dataset(header)
    uids = [source.SOPInstanceUID for source in sources]
    referred = {uid for _, _, uid in segmentation.get_source_image_uids()}
    if not referred or not referred <= set(uids):
        raise ValueError("it refers to other images")
    options = {
        "combine_segments": True,
        "ignore_spatial_locations": True,
        "assert_missing_frames_are_empty": True,
    }
    frames = int(sources[0].get("NumberOfFrames") or 1)
    if frames > 1:
        every = range(1, frames + 1)
        numbers = segmentation.get_pixels_by_source_frame(uids[0], every, **options)
    else:
        numbers = segmentation.get_pixels_by_source_instance(uids, **options)
    labels = {
        item.SegmentNumber: item.SegmentLabel.strip().lower()
        for item in segmentation.SegmentSequence
    }
    return numbers, labels


def _to_class_ids(numbers: np.ndarray, labels: dict[int, str], names: Sequence[str]) -> np.ndarray:
    """Replace segment numbers by class ids. With a single class every segment belongs to it."""
    known = {name.lower(): i for i, name in enumerate(names, 1)}
    if len(names) > 1 and not set(labels.values()) <= set(known):
        raise UserError(
            f"segments {', '.join(labels.values())}; expected the classes {', '.join(names)}"
        )
    ids = np.zeros(numbers.shape, np.uint8)
    for number, label in labels.items():
        ids[numbers == number] = known[label] if len(names) > 1 else 1
    return ids
