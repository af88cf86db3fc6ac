"""What a client may want beside a DICOM segmentation: a report, and pictures with outlines."""

import io
import json
import zipfile

import pydicom

from imaging import formats
from imaging.dicom import dicom_masks, dicom_overlay, dicom_report
from imaging.labels import Classes
from imaging.scan import Mask
from inference.exported_model import ExportedModel
from serving import media_types
from serving.errors import to_json_line
from serving.responses import MaskResponse
from utils import UserError


def complete(
    answer: MaskResponse, content: bytes, network: ExportedModel, max_bytes: int
) -> MaskResponse:
    """Put a segmentation, a report and pictures into a zip of DICOM files.

    answer: the segmentation of `content`. A report, or pictures, that its headers do not allow are
    left out and told. Raises UserError.
    """
    image = formats.decode_scan(content, max_bytes)
    classes = Classes.from_metadata(network.metadata)
    found = dicom_masks.decode_mask(answer.body, image, classes.names, classes.overlap)
    if found is None:
        raise UserError("its mask is no DICOM segmentation")
    mask = Mask(found.pixels[..., 0], classes.names)
    uid = pydicom.dcmread(io.BytesIO(answer.body), stop_before_pixels=True).SOPInstanceUID
    quality = answer.quality.describe() if answer.quality else None
    window = network.metadata.get("window", "")
    notes, buffer = [], io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("segmentation.dcm", answer.body)
        try:
            report = dicom_report.encode_report(answer.body, mask, image, quality)
            archive.writestr("report.dcm", report)
        except UserError as error:  # the segmentation is there all the same
            notes.append(str(error))
        try:
            pictures = dicom_overlay.encode_overlays(mask, image, uid, window)
            for number, picture in enumerate(pictures, 1):
                archive.writestr(f"overlay-{number:04d}.dcm", picture)
        except UserError as error:
            notes.append(str(error))
    return add_notes(answer, notes)._replace(
        body=buffer.getvalue(), media_type=media_types.DICOM_ZIP
    )


def add_notes(answer: MaskResponse, notes: list[str]) -> MaskResponse:
    """Tell in the headers what was left out."""
    if not notes:
        return answer
    notes = [*json.loads(answer.headers.get("X-Notes", "[]")), *notes]
    return answer._replace(headers=answer.headers | {"X-Notes": to_json_line(notes)})
