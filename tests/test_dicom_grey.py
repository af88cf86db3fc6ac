"""Grey levels and spacing of DICOM: padding kept out, windows, curves, what a pixel measures."""

import io

import numpy as np
import pydicom
import pytest
from conftest import prepare_to_fit
from pydicom import Dataset
from pydicom.uid import generate_uid
from test_dicom_series import write_series
from test_medical import ct_slice

from imaging import formats
from imaging.dicom import dicom_series
from imaging.dicom.dicom_elements import AT_DETECTOR

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = (64, 64)


def encode(pixels, bits=None, **elements) -> bytes:
    """Encode a file of one frame, (H, W), or of several, (F, H, W); None removes an element."""
    uids = {n: generate_uid() for n in ("StudyInstanceUID", "SeriesInstanceUID")}
    header = ct_slice(0, 1, uids)
    pixels = np.ascontiguousarray(pixels)
    bits = bits or 8 * pixels.dtype.itemsize
    given = {
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "WindowCenter": None,
        "WindowWidth": None,
        "PixelData": pixels.tobytes(),
    }
    if pixels.ndim == 3:
        given["NumberOfFrames"] = len(pixels)
    for name, value in (given | elements).items():
        if value is None:
            header.pop(name, None)
        else:
            setattr(header, name, value)
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def scene(seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Draw tissue of many levels in HU, and the round field of a scanner."""
    y, x = np.ogrid[:64, :64]
    inside = (y - 32) ** 2 + (x - 32) ** 2 < 30**2
    levels = np.random.default_rng(seed).normal(40, 60, SIZE).astype(np.int16)
    return levels, inside


# ---------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(
    ("fill", "elements"),
    [
        (-2000, {"PixelPaddingValue": -2000}),
        (-32768, {"PixelPaddingValue": -32768}),
        (3071, {"PixelPaddingValue": 3071}),
        (-1990, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1980}),
        (-1990, {"PixelPaddingValue": -1980, "PixelPaddingRangeLimit": -2000}),
        (5, {"PixelPaddingValue": 5, "PhotometricInterpretation": "MONOCHROME1"}),
    ],
)
def test_padding_has_no_say_in_the_grey_levels(fill, elements):
    levels, inside = scene()
    levels = np.where(inside, levels + 300 * (fill == 5), fill)
    scan = formats.decode_scan(encode(levels, **elements))
    assert scan.notes == ("its padding (PixelPaddingValue) is kept out of the grey levels",)
    kept = np.float32(levels[inside])
    if "PhotometricInterpretation" in elements:
        kept = -1 - kept
    np.testing.assert_array_equal(scan.pixels[0, ..., 0][inside], kept)
    low, high = np.percentile(kept, (0.5, 99.5))
    found = np.percentile(scan.pixels, (0.5, 99.5))
    np.testing.assert_allclose(found, (low, high), atol=0.04 * (high - low))
    assert scan.pixels[0, 0, 0, 0] == pytest.approx(low, abs=0.03 * (high - low))


def test_padding_that_a_ct_does_not_declare():
    levels, inside = scene()
    scan = formats.decode_scan(encode(np.where(inside, levels, -2000)))
    assert scan.notes == ("levels below -1500 HU are taken for padding: air has -1000",)
    low, high = np.percentile(levels[inside], (0.5, 99.5))
    found = np.percentile(scan.pixels, (0.5, 99.5))
    np.testing.assert_allclose(found, (low, high), atol=0.04 * (high - low))
    # In MRI a level of -2000 is one as any other.
    scan = formats.decode_scan(encode(np.where(inside, levels, -2000), Modality="MR"))
    assert scan.notes == () and scan.pixels.min() == -2000


def test_a_padding_value_that_is_written_without_its_sign():
    levels, inside = scene()
    content = encode(np.where(inside, levels, -2000), PixelPaddingValue=-2000)
    header = pydicom.dcmread(io.BytesIO(content))
    del header.PixelPaddingValue
    header.add_new("PixelPaddingValue", "US", 2**16 - 2000)
    buffer = io.BytesIO()
    header.save_as(buffer)
    assert formats.decode_scan(buffer.getvalue()).pixels.min() > -1000


def test_a_slice_of_nothing_but_padding(tmp_path):
    write_series(tmp_path / "ct", (0, 5, 10), PixelPaddingValue=0)
    pixels = formats.read_scan(tmp_path / "ct").pixels[:, 0, 0, 0]
    assert pixels.tolist() == [2 * 5 - 1024, 2 * 5 - 1024, 2 * 10 - 1024]
    alone = formats.decode_scan(encode(np.full(SIZE, 7, np.int16), PixelPaddingValue=7))
    assert (alone.pixels == 0).all()


# ----------------------------------------------------------------------------- windows and curves


def lut(outputs, first=0, bits=16, data=None) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(outputs) % 2**16, first, bits])
    item.add_new("LUTData", "OW", data or np.asarray(outputs, "<u2").tobytes())
    return item


def test_a_voi_lut_is_what_the_file_proposes():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    curve = 65535 / (1 + np.exp(-(np.arange(4096) - 1600) / 300))
    scan = formats.decode_scan(encode(ramp, 12, VOILUTSequence=[lut(curve)]))
    shown = prepare_to_fit(scan, SIZE, 1, "file")[0, ..., 0]
    np.testing.assert_allclose(shown.ravel(), 255 * curve / curve.max(), atol=1)
    centre, width = scan.window
    assert abs(centre - 1600) < 120 and 2500 < width < 3500


def test_a_voi_lut_of_8_bits_and_of_levels_below_zero():
    ramp = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    outputs = np.linspace(0, 255, 256).astype(np.uint8)
    item = lut(outputs, first=2**16 - 128, bits=8, data=outputs.tobytes())
    scan = formats.decode_scan(encode(ramp, VOILUTSequence=[item]))
    shown = prepare_to_fit(scan, SIZE, 1, "file")[0, ..., 0].ravel()
    expected = np.clip(np.arange(-2048, 2048) + 128, 0, 255)
    np.testing.assert_allclose(shown, expected, atol=1)


def test_a_sigmoid_window():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    elements = {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"}
    scan = formats.decode_scan(encode(ramp, 12, **elements))
    shown = prepare_to_fit(scan, SIZE, 1, "file")[0, ..., 0].ravel()
    expected = 255 / (1 + np.exp(-4 * (np.arange(4096) - 2000) / 1000))
    np.testing.assert_allclose(shown, expected, atol=1)
    inverted = encode(ramp, 12, PhotometricInterpretation="MONOCHROME1", **elements)
    shown = prepare_to_fit(formats.decode_scan(inverted), SIZE, 1, "file")[0, ..., 0].ravel()
    np.testing.assert_allclose(shown, 255 - expected, atol=1)


def test_a_modality_lut():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    item = lut(np.arange(4096)[::-1] * 2)
    item.ModalityLUTType = "US"
    scan = formats.decode_scan(encode(ramp, 12, ModalityLUTSequence=[item]))
    np.testing.assert_array_equal(scan.pixels.ravel(), 2.0 * np.arange(4096)[::-1])


def test_an_inverse_presentation_is_inverted_once():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        content = encode(ramp, 12, PhotometricInterpretation=kind, PresentationLUTShape="INVERSE")
        np.testing.assert_array_equal(
            formats.decode_scan(content).pixels.ravel(), 4095 - ramp.ravel()
        )


# ---------------------------------------------------------------------------------------- spacing


def region(delta, kind=1, units=3) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = kind, 1, 0
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = units
    item.PhysicalDeltaX, item.PhysicalDeltaY = delta
    return item


@pytest.mark.parametrize(
    ("elements", "spacing", "note"),
    [
        ({"PixelSpacing": [0.5, 0.4]}, (0.5, 0.4), ""),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1), AT_DETECTOR),
        ({"PixelSpacing": [0.5, 0.4], "ImagerPixelSpacing": [0.2, 0.1]}, (0.5, 0.4), ""),
        ({"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1), AT_DETECTOR),
        ({"NominalScannedPixelSpacing": [0.3, 0.3]}, (0.3, 0.3), "on the film"),
        ({"SequenceOfUltrasoundRegions": [region((0.02, 0.03))]}, (0.3, 0.2), ""),
        ({"SequenceOfUltrasoundRegions": [region((0.02, -0.02))] * 2}, (0.2, 0.2), ""),
        (
            {"SequenceOfUltrasoundRegions": [region((0.02, 0.02)), region((5.0, 3.0), 3, 4)]},
            (0.2, 0.2),
            "",
        ),
        (
            {"SequenceOfUltrasoundRegions": [region((0.02, 0.02)), region((0.03, 0.03))]},
            None,
            "2 ultrasound regions of different spacing",
        ),
        ({"SequenceOfUltrasoundRegions": [region((0.02, 0.02), units=4)]}, None, ""),
        ({"PixelSpacing": ""}, None, ""),
        ({}, None, ""),
    ],
)
def test_spacing_and_what_must_be_known_of_it(elements, spacing, note):
    scan = formats.decode_scan(
        encode(np.zeros(SIZE, np.uint16), **{"PixelSpacing": None} | elements)
    )
    assert (scan.spacing_mm and scan.spacing_mm[1:]) == spacing
    assert len(scan.notes) == bool(note)
    assert not note or note in scan.notes[0]


# ----------------------------------------------------------------------------------- stored values


@pytest.mark.parametrize("kind", ["uint16", "int16"])
def test_bits_may_start_above_the_lowest(kind):
    levels = np.random.default_rng(0).integers(0, 2000, SIZE)
    levels -= 1000 * (kind == "int16")
    content = encode((levels << 4).astype(kind), bits=12, HighBit=15)
    np.testing.assert_array_equal(formats.decode_scan(content).pixels[0, ..., 0], levels)


def test_slices_of_different_slopes_are_inverted_alike(tmp_path):
    """As in PET: each slice is stored with a slope of its own."""
    levels = np.random.default_rng(0).integers(0, 200, (3, *SIZE)) * 4
    uids = {n: generate_uid() for n in ("StudyInstanceUID", "SeriesInstanceUID")}
    for i, (slope, one) in enumerate(zip((1, 2, 4), levels, strict=True)):
        elements = uids | {
            "PhotometricInterpretation": "MONOCHROME1",
            "RescaleSlope": slope,
            "ImagePositionPatient": [0, 0, 5 * i],
        }
        content = encode((one // slope).astype(np.uint16), **elements)
        (tmp_path / f"{i}.dcm").write_bytes(content)
    sums = dicom_series.read_folder(tmp_path, 2**30).pixels[..., 0] + levels
    assert (sums == sums[0, 0, 0]).all()


def test_a_negative_distance_between_slices_is_a_distance():
    """Nuclear medicine: the sign only says which way the slices run."""
    frames = np.ones((3, *SIZE), np.uint16)
    content = encode(frames, SpacingBetweenSlices=-5, SliceThickness=6, ImagePositionPatient=None)
    assert formats.decode_scan(content).spacing_mm[0] == 5
