"""Decode DICOM, NIfTI and TIFF stacks, and write masks back in kind. `images.py` comes here for such files.

A NIfTI volume is turned so that its slices are those of the acquisition (across its coarsest axis, else axial) and
stand as radiologists look at them; its mask is turned back. A DICOM series is a folder of files, a slice each.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imaging import dicom
from utils import UserError, atomic, first_line

VERSION = "1"  # of this software, in the files that it writes


# ---------------------------------------------------------------------------------------------- DICOM segmentation


def write_seg(path: Path, ids: np.ndarray, names: Sequence[str], contents: Sequence[bytes]) -> None:
    """Write `encode_seg`'s file."""
    content = encode_seg(ids, names, contents)
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def encode_seg(
    ids: np.ndarray, names: Sequence[str], contents: Sequence[bytes], version: str = VERSION
) -> bytes:
    """Make of class ids (S, H, W) a DICOM segmentation (one segment per class) that refers to its source's files.

    version: of the algorithm, at most 64 characters. Raises UserError if the source lacks what DICOM wants of it.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    headers = [dicom.read_header(content) for content in contents]
    headers = [headers[i] for i in dicom.sort_series(headers)[0]] if len(headers) > 1 else headers
    algorithm = hd.AlgorithmIdentificationSequence(
        "U-Net", codes.DCM.ArtificialIntelligence, version
    )
    segments = [
        hd.seg.SegmentDescription(
            number,
            name,
            codes.SCT.AnatomicalStructure,
            hd.sr.CodedConcept(
                f"CLASS{number}", "99UNET", name[:64]
            ),  # "99…" marks codes of our own
            hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm,
        )
        for number, name in enumerate(names, 1)
    ]
    try:
        segmentation = hd.seg.Segmentation(
            headers,
            ids.astype(np.uint8),
            hd.seg.SegmentationTypeValues.BINARY,
            segments,
            series_instance_uid=hd.UID(),
            series_number=100,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="none",
            manufacturer_model_name="U-Net",
            software_versions=version,
            device_serial_number="none",
            omit_empty_frames=bool(ids.any()),  # one frame must stay
        )
        segmentation.decode()  # the source's names, before
        segmentation.SpecificCharacterSet = "ISO_IR 192"  # which has the classes' names too
        buffer = io.BytesIO()
        segmentation.save_as(buffer)
        return buffer.getvalue()
    except Exception as error:  # of many kinds, where a header is damaged
        raise UserError(f"no DICOM segmentation can refer to it ({first_line(error)})") from error


def is_seg(content: bytes) -> bool:
    """Tell a DICOM segmentation."""
    from pydicom import uid

    return (
        content[128:132] == b"DICM"
        and dicom.read_header(content).get("SOPClassUID") == uid.SegmentationStorage
    )


def decode_seg(content: bytes, sources: Sequence[bytes], names: Sequence[str]) -> np.ndarray:
    """Decode a segmentation of `sources`, the files of an image: class ids (S, H, W) by the segments' labels.

    Raises UserError if it refers to other files, segments overlap, or their labels are other classes than `names`.
    """
    import highdicom as hd

    headers = [dicom.read_header(source) for source in sources]
    headers = [headers[i] for i in dicom.sort_series(headers)[0]] if len(headers) > 1 else headers
    uids, frames = (
        [header.SOPInstanceUID for header in headers],
        int(headers[0].get("NumberOfFrames") or 1),
    )
    more = {
        "combine_segments": True,
        "ignore_spatial_locations": True,
        "assert_missing_frames_are_empty": True,
    }
    try:
        segmentation = hd.seg.Segmentation.from_dataset(dicom.read_header(content))
        referred = {uid for _, _, uid in segmentation.get_source_image_uids()}
        if not referred or not referred <= set(uids):
            raise ValueError("it refers to other images")
        if frames > 1:
            numbers = segmentation.get_pixels_by_source_frame(uids[0], range(1, frames + 1), **more)
        else:
            numbers = segmentation.get_pixels_by_source_instance(uids, **more)
        labels = {
            item.SegmentNumber: item.SegmentLabel.strip().lower()
            for item in segmentation.SegmentSequence
        }
    except Exception as error:
        raise UserError(f"not a segmentation of its image ({first_line(error)})") from None
    known = {name.lower(): i for i, name in enumerate(names, 1)}
    if len(names) > 1 and not set(labels.values()) <= set(known):
        raise UserError(
            f"segments {', '.join(labels.values())}; expected the classes {', '.join(names)}"
        )
    ids = np.zeros(numbers.shape, np.uint8)
    for number, label in labels.items():
        ids[numbers == number] = known[label] if len(names) > 1 else 1
    return ids
