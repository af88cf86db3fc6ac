"""A round trip through a real PACS: Orthanc stores an X-ray and our segmentation and lists both."""

import io
import json
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import ROOT

import data
import metrics
from dataset.reading import read_truth
from imaging import formats
from imaging.labels import Classes

pytestmark = pytest.mark.slow


def store(address: str, content: bytes) -> dict:
    """Send a DICOM file (STOW-RS); the answer."""
    mark = uuid.uuid4().hex
    body = (
        f"--{mark}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        + content
        + f"\r\n--{mark}--\r\n".encode()
    )
    kind = f'multipart/related; type="application/dicom"; boundary={mark}'
    request = urllib.request.Request(
        f"{address}/dicom-web/studies",
        body,
        {"Content-Type": kind, "Accept": "application/dicom+json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def ask(address: str, path: str) -> list[dict]:
    """Search (QIDO-RS)."""
    request = urllib.request.Request(
        f"{address}/dicom-web/{path}", headers={"Accept": "application/dicom+json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def write_xray(path: Path, picture: np.ndarray) -> None:
    """Write a picture (H, W) uint8 as a radiograph: 12 bits, low values white, known spacing."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = (
        pydicom.uid.ComputedRadiographyImageStorage
    )
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header.StudyInstanceUID = pydicom.uid.generate_uid()
    header.SeriesInstanceUID = pydicom.uid.generate_uid()
    header.PatientID, header.PatientName = "7", "Phantom^One"
    header.PatientBirthDate, header.PatientSex = "", "O"
    header.StudyDate, header.StudyTime = time.strftime("%Y%m%d"), "120000"
    header.StudyID, header.AccessionNumber = "1", ""
    header.Modality, header.SeriesNumber, header.InstanceNumber = "CR", 1, 1
    header.Rows, header.Columns, header.SamplesPerPixel = *picture.shape, 1
    header.PhotometricInterpretation, header.ImagerPixelSpacing = "MONOCHROME1", [0.7, 0.7]
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.PixelRepresentation = 0
    header.PixelData = (4095 - 16 * picture.astype(np.uint16)).tobytes()
    header.save_as(path, enforce_file_format=True)


def test_an_xray_and_its_segmentation_go_through_a_pacs(pacs, phantoms, script, tmp_path):
    """The bundled model segments a phantom in DICOM; both files are stored, listed and fetched."""
    pair = data.find_pairs(phantoms)[0][0]
    write_xray(tmp_path / "xray.dcm", formats.read_image(pair.image)[..., 0])
    done = script(
        ROOT, "predict.py", "--input", tmp_path / "xray.dcm", "--output", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    source, made = (pydicom.dcmread(tmp_path / name) for name in ("xray.dcm", "out/xray.dcm"))
    for name in ("xray.dcm", "out/xray.dcm"):
        answer = store(pacs, (tmp_path / name).read_bytes())
        assert answer["00081199"]["Value"] and not answer.get("00081198", {}).get(
            "Value"
        )  # taken, none failed
    listed = ask(pacs, f"studies/{source.StudyInstanceUID}/series")
    assert sorted(series["00080060"]["Value"][0] for series in listed) == ["CR", "SEG"]
    series = f"studies/{made.StudyInstanceUID}/series/{made.SeriesInstanceUID}"
    request = urllib.request.Request(
        f"{pacs}/dicom-web/{series}/instances/{made.SOPInstanceUID}",
        headers={"Accept": 'multipart/related; type="application/dicom"'},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        body = answer.read()
    back = pydicom.dcmread(io.BytesIO(body[body.index(b"\r\n\r\n") + 4 : body.rindex(b"\r\n--")]))
    referred = back.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
    assert referred.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert back.PatientID == "7" and back.SegmentSequence[0].SegmentLabel == "lungs"
    truth = read_truth(pair, Classes("lungs")).mask[0]
    assert metrics.score_mask(truth, back.pixel_array.squeeze())["dice"] > 0.9
