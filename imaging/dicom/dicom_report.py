"""Write DICOM structured reports: what was measured in a segmentation (PS3.16, TID 1500)."""

import io
from typing import Any

import numpy as np

from imaging.dicom.dicom_seg import complete_headers, derive_uid
from imaging.labels import plane
from imaging.scan import Mask, Scan
from utils import UserError, first_line

PRIVATE = "99UNET"  # a coding scheme that begins with 99 is private
SERIES_NUMBER = 101
PIXELS, VOXELS = ("{pixels}", "UCUM", "pixels"), ("{voxels}", "UCUM", "voxels")


def encode_report(
    segmentation: bytes, mask: Mask, image: Scan, quality: dict[str, Any] | None
) -> bytes:
    """Encode the size of each segment, and how good the mask probably is, as Comprehensive SR.

    segmentation: what `dicom_seg.encode_mask` made of mask and image. quality: what
    `Quality.describe` lists. Raises UserError if the headers lack what a report needs.
    """
    import highdicom as hd
    import pydicom

    found = hd.seg.Segmentation.from_dataset(pydicom.dcmread(io.BytesIO(segmentation)))
    version = str(found.SoftwareVersions)
    try:
        groups = [
            _measure_segment(found, number, mask, image) for number in range(1, len(mask.names) + 1)
        ]
        groups += [_describe_quality(found, quality)] if quality else []
        content = hd.sr.MeasurementReport(
            hd.sr.ObservationContext(observer_device_context=_describe_software(version)),
            hd.sr.CodedConcept("363679005", "SCT", "Imaging procedure"),
            groups,
        )
        report = hd.sr.ComprehensiveSR(
            [found, *complete_headers(image.header)],
            content,
            series_instance_uid=derive_uid("report series", found.SOPInstanceUID),
            series_number=SERIES_NUMBER,
            sop_instance_uid=derive_uid("report", found.SOPInstanceUID),
            instance_number=1,
            manufacturer="none",
            is_complete=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # a damaged header causes errors of many kinds
        raise UserError(f"no DICOM report can refer to it ({first_line(error)})") from error
    buffer = io.BytesIO()
    report.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _describe_software(version: str) -> Any:
    """Say that this software has measured, not a person."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    device = hd.sr.DeviceObserverIdentifyingAttributes(
        derive_uid("device", version), name="U-Net", model_name=version[:64]
    )
    return hd.sr.ObserverContext(codes.DCM.Device, device)


def _measure_segment(segmentation: Any, number: int, mask: Mask, image: Scan) -> Any:
    """Measure one segment: its area, or its volume if the image has several slices."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    name, is_volume = mask.names[number - 1], len(mask.ids) > 1
    size = float(np.count_nonzero(plane(mask.ids, number)))
    unit = hd.sr.CodedConcept(*(VOXELS if is_volume else PIXELS))
    if image.spacing_mm:
        size *= float(np.prod(image.spacing_mm[0 if is_volume else 1 :]))
        unit = codes.UCUM.CubicMillimeter if is_volume else codes.UCUM.SquareMillimeter
    concept = codes.SCT.Volume if is_volume else codes.SCT.Area
    measurement = hd.sr.Measurement(concept, float(f"{size:.6g}"), unit)
    group = {
        "tracking_identifier": hd.sr.TrackingIdentifier(
            derive_uid(f"segment {number}", segmentation.SOPInstanceUID), name
        ),
        "finding_type": hd.sr.CodedConcept(f"CLASS{number}", PRIVATE, name[:64]),
        "measurements": [measurement],
    }
    if not size:  # the segmentation has no frame of it
        return hd.sr.MeasurementsAndQualitativeEvaluations(**group)
    sources = [
        hd.sr.SourceImageForSegmentation(header.SOPClassUID, header.SOPInstanceUID)
        for header in image.header
    ]
    segment = hd.sr.ReferencedSegment(
        segmentation.SOPClassUID, segmentation.SOPInstanceUID, number, source_images=sources
    )
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=segment, **group
    )


def _describe_quality(segmentation: Any, quality: dict[str, Any]) -> Any:
    """Tell the predicted Dice, its interval, and whether the image is of another kind."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    concepts = {
        "predicted_dice": ("DICE", "Predicted Dice"),
        "predicted_dice_low": ("DICELOW", "Predicted Dice, lower end of the 90 % interval"),
        "predicted_dice_high": ("DICEHIGH", "Predicted Dice, upper end of the 90 % interval"),
    }
    measurements = []
    for key, (code, meaning) in concepts.items():
        concept = hd.sr.CodedConcept(code, PRIVATE, meaning)
        measurements.append(hd.sr.Measurement(concept, quality[key], codes.UCUM.NoUnits))
    unusual = hd.sr.CodedConcept("UNUSUAL", PRIVATE, "Unlike the images of the training")
    answer = codes.SCT.Yes if quality["unusual"] else codes.SCT.No
    uid = derive_uid("quality", segmentation.SOPInstanceUID)
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        hd.sr.TrackingIdentifier(uid, "quality of the segmentation"),
        measurements=measurements,
        qualitative_evaluations=[hd.sr.QualitativeEvaluation(unusual, answer)],
    )
