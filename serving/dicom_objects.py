"""What a client may want beside a DICOM segmentation: a report, and pictures with outlines."""

import io
import zipfile

import pydicom

from imaging import formats
from imaging.dicom import dicom_masks, dicom_overlay, dicom_report
from imaging.labels import Classes
from imaging.scan import Mask
from inference.exported_model import ExportedModel
from serving import media_types
from serving.responses import MaskResponse
from utils import UserError


def complete(
    answer: MaskResponse, content: bytes, network: ExportedModel, max_bytes: int
) -> MaskResponse:
    """Put a segmentation, a report and pictures into a zip of DICOM files.

    answer: the segmentation of `content`. Raises UserError if its headers lack what they need.
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
    files = {
        "segmentation.dcm": answer.body,
        "report.dcm": dicom_report.encode_report(answer.body, mask, image, quality),
    }
    for number, one in enumerate(dicom_overlay.encode_overlays(mask, image, uid, window), 1):
        files[f"overlay-{number:04d}.dcm"] = one
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, one in files.items():
            archive.writestr(name, one)
    return answer._replace(body=buffer.getvalue(), media_type=media_types.DICOM_ZIP)
