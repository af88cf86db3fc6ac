"""Write DICOM segmentations: masks that refer to the DICOM files of their image, by highdicom."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from imaging.dicom.dicom_elements import count_frames, look_up, read_numbers
from imaging.dicom.dicom_geometry import positions_mm, slice_affines, sort_frames, usual_step_mm
from imaging.labels import BITS, plane
from imaging.scan import Mask, Scan
from utils import UserError, first_line

# Version of this software in the files that it writes.
VERSION = "1"
# DICOM's longest code meaning.
MAX_NAME_LENGTH = 64
# A segmentation refers to its source by these.
SOURCE_UIDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
# Every object has these, empty if their value is not known (type 2). Anonymisers remove some.
EMPTY_IF_MISSING = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)


def encode_mask(mask: Mask, image: Scan, version: str = VERSION) -> bytes:
    """Encode a mask as DICOM segmentation, one segment per class, that refers to its image's files.

    version: of the algorithm, at most 64 characters. Raises UserError if the image's headers lack
    what a segmentation needs.
    """
    return encode_seg(mask.ids, mask.names, image.header, version)


def encode_seg(
    ids: np.ndarray, names: Sequence[str], headers: Sequence[Any], version: str = VERSION
) -> bytes:
    """Encode class ids as in `encode_mask`; headers: of the image's files, sorted.

    ids: (S, H, W), of BITS where classes overlap. The same input gives the same
    UIDs, so that an archive keeps one object.
    """
    import highdicom as hd

    _check_uids(headers)
    if ids.dtype == BITS:
        ids = np.stack([plane(ids, i) for i in range(1, len(names) + 1)], axis=-1)
    ids = ids.astype(np.uint8, copy=False)
    sources = [str(header.SOPInstanceUID) for header in headers]
    content = np.ascontiguousarray(ids)
    uids = [
        derive_uid(kind, version, *names, *sources, repr(ids.shape), content=content)
        for kind in ("series", "instance")
    ]
    try:
        segmentation = hd.seg.Segmentation(
            complete_headers(headers),
            _as_stored(ids, headers),
            hd.seg.SegmentationTypeValues.BINARY,
            _describe_segments(names, version),
            series_instance_uid=uids[0],
            series_number=100,
            sop_instance_uid=uids[1],
            instance_number=1,
            manufacturer="none",
            manufacturer_model_name="U-Net",
            software_versions=version,
            device_serial_number="none",
            # DICOM allows no segmentation without frames.
            omit_empty_frames=bool(ids.any()),
            # The source's may lack letters of the class names, or be none that exists.
            specific_character_set="ISO_IR 192",
        )
        if slice_affines(headers) is None:  # DICOM wants it then, empty if it is not known
            segmentation.PatientOrientation = headers[0].get("PatientOrientation")
        buffer = io.BytesIO()
        segmentation.save_as(buffer)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"no DICOM segmentation can refer to it (its SOP class {error} is not known)"
        ) from None
    except Exception as error:
        # A damaged header causes errors of many kinds.
        raise UserError(f"no DICOM segmentation can refer to it ({first_line(error)})") from error
    return buffer.getvalue()


def _check_uids(headers: Sequence[Any]) -> None:
    """Raise UserError unless each file has the UIDs by which a segmentation refers to it."""
    missing = [name for name in SOURCE_UIDS if not all(header.get(name) for header in headers)]
    if missing:
        raise UserError(
            f"no DICOM segmentation can refer to it (its files lack {', '.join(missing)})"
        )
    if len({header.SOPInstanceUID for header in headers}) < len(headers):
        raise UserError(
            "no DICOM segmentation can refer to it (several of its files have one SOPInstanceUID)"
        )


def derive_uid(*texts: str, content: np.ndarray | bytes = b"") -> str:
    """Make a UID that follows from these: what an object is made of."""
    digest = hashlib.sha256("\0".join(texts).encode())
    digest.update(content)
    # 2.25 is the root of UIDs that are numbers of 128 bits (DICOM PS3.5, B.2).
    return f"2.25.{int.from_bytes(digest.digest()[:16])}"


def _as_stored(ids: np.ndarray, headers: Sequence[Any]) -> np.ndarray:
    """Put the slices of a file of several frames into the order in which it stores them."""
    if len(headers) > 1 or count_frames(headers[0]) == 1:
        return ids
    return ids[np.argsort(sort_frames(headers[0]))]


def complete_headers(headers: Sequence[Any]) -> list[Any]:
    """Copy headers, with what a segmentation needs of them although the files lack it."""
    import pydicom

    positions = positions_mm(headers)
    if slice_affines(headers) is None:
        # A single image needs no place.
        if len(headers) > 1 or count_frames(headers[0]) > 1:
            raise UserError(
                "no DICOM segmentation can refer to it (its slices lack a position, direction or "
                "PixelSpacing)"
            )
        positions = None
    step_mm = usual_step_mm(sorted(positions)) if positions else None
    completed = []
    for header in headers:
        copy = pydicom.Dataset(header)
        copy.file_meta = header.file_meta
        _complete_patient(copy)
        if positions is None:
            copy.pop("ImagePositionPatient", None)
        if not copy.get("Modality"):
            copy.Modality = "OT"
        if positions and not copy.get("FrameOfReferenceUID"):
            digest = hashlib.sha256(str(copy.SeriesInstanceUID).encode()).digest()
            copy.FrameOfReferenceUID = f"2.25.{int.from_bytes(digest[:16])}"
        _complete_thickness(copy, step_mm)
        if positions and "PerFrameFunctionalGroupsSequence" in copy:
            copy.SharedFunctionalGroupsSequence = [_complete_groups(copy, step_mm)]
        completed.append(copy)
    return completed


def _complete_patient(header: Any) -> None:
    """Write empty what is missing of patient and study, or what no reader would understand."""
    from pydicom.valuerep import DA, TM, PersonName

    # Texts are decoded before the character set changes.
    header.decode()
    for name in EMPTY_IF_MISSING:
        value = header.get(name)
        try:
            kind = {"Date": DA, "Time": TM, "Name": PersonName}.get(name[-4:], str)
            kind(str(value))
        except ValueError:
            value = None
        if value is None:
            setattr(header, name, "")
        elif name.endswith("Name") and not isinstance(value, PersonName):
            setattr(header, name, str(value[0]))
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""


def _complete_groups(header: Any, step_mm: float | None) -> Any:
    """Give all frames the direction and spacing of the first, where it has them for itself."""
    import pydicom

    shared = header.get("SharedFunctionalGroupsSequence")
    groups = pydicom.Dataset(shared[0]) if shared else pydicom.Dataset()
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if name not in groups and name in header.PerFrameFunctionalGroupsSequence[0]:
            item = pydicom.Dataset(header.PerFrameFunctionalGroupsSequence[0][name][0])
            setattr(groups, name, [item])
    for measures in groups.get("PixelMeasuresSequence") or []:
        _complete_thickness(measures, step_mm)
    return groups


def _complete_thickness(header: Any, step_mm: float | None) -> None:
    """Give a slice a thickness; its distance to the next is left out if it is empty."""
    if not read_numbers(header, "SpacingBetweenSlices") and "SpacingBetweenSlices" in header:
        del header.SpacingBetweenSlices
    if count_frames(header) == 1 and not read_numbers(header, "SliceThickness"):
        between = look_up(header, "SpacingBetweenSlices")
        header.SliceThickness = f"{between[0] if between else step_mm or 1:.6g}"


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
