"""DICOM files as PACS and CDs hand them over: recognised, sorted into volumes, gaps told."""

import shutil
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import generate_uid
from test_medical import ct_slice

from imaging import formats
from imaging.dicom import dicom_series
from imaging.dicom.dicom_series import group_files, series_files
from imaging.scan import MAX_BYTES
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def write_series(folder: Path, positions=(0, 5, 10, 15), start=0, **elements) -> dict[str, str]:
    """Write CT slices, their pixels the place; elements may be functions of the slice's number."""
    folder.mkdir(exist_ok=True, parents=True)
    uids = {name: elements.pop(name, None) or generate_uid() for name in UIDS}
    for i, position in enumerate(positions, start):
        header = ct_slice(position, i, uids)
        for name, value in elements.items():
            setattr(header, name, value(i) if callable(value) else value)
        header.save_as(folder / f"IM{i:02}", enforce_file_format=True)
    return uids


def names_of(volumes) -> list[list[str]]:
    return [[path.name for path in volume] for volume in volumes]


def test_two_series_are_two_volumes(tmp_path):
    write_series(tmp_path)
    write_series(tmp_path, start=4, positions=(10, 5, 0))
    volumes, notes = group_files(series_files(tmp_path))
    assert names_of(volumes) == [
        ["IM00", "IM01", "IM02", "IM03"],
        ["IM06", "IM05", "IM04"],
    ]
    assert notes == []
    with pytest.raises(UserError, match="2 volumes, of 4, 3 files; expected one volume"):
        formats.read_scan(tmp_path)


def test_a_copy_counts_once(tmp_path):
    write_series(tmp_path)
    shutil.copy(tmp_path / "IM01", tmp_path / "IM01 (2)")
    scan = formats.read_scan(tmp_path)
    assert scan.pixels[:, 0, 0, 0].tolist() == [2 * z - 1024 for z in (0, 5, 10, 15)]
    assert scan.notes == ("IM01 (2): a copy of IM01; left out",)


def test_a_copy_that_is_compressed_counts_once(tmp_path):
    write_series(tmp_path)
    header = pydicom.dcmread(tmp_path / "IM02")
    header.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    header.save_as(tmp_path / "IM02_rle")
    scan = formats.read_scan(tmp_path)
    assert len(scan.pixels) == 4 and scan.notes == ("IM02_rle: a copy of IM02; left out",)


def test_an_anonymiser_that_gives_all_slices_one_uid(tmp_path):
    write_series(tmp_path, SOPInstanceUID="1.2.3")
    assert formats.read_scan(tmp_path).pixels.shape[0] == 4


def test_a_gap_is_told_with_its_place(tmp_path):
    write_series(tmp_path, positions=(0, 5, 10, 25, 30))
    scan = formats.read_scan(tmp_path)
    assert scan.pixels.shape[0] == 5 and scan.spacing_mm == (5, 0.7, 0.8) and scan.affine is None
    assert scan.notes == (
        "a gap: slices are 5 mm apart, but IM02 and IM03 are 15 mm apart, 2 missing",
    )


def test_uneven_steps_are_told(tmp_path):
    write_series(tmp_path, positions=(0, 5, 10, 12.5, 15, 17.5, 20))
    write_series(tmp_path / "x", positions=(0, 5, 10, 15, 18, 23))
    scan = formats.read_scan(tmp_path)
    assert scan.affine is None and "are 5 mm apart, 1 missing" in scan.notes[0]
    scan = formats.read_scan(tmp_path / "x")
    assert scan.affine is None and scan.spacing_mm == (5, 0.7, 0.8)
    assert scan.notes == ("its slices are uneven: 3 to 5 mm apart",)


def test_places_with_noise_are_one(tmp_path):
    uids = write_series(tmp_path, (0, 5.004, 10))
    write_series(tmp_path, (0.02, 5, 10.01), 3, **uids)
    volumes, _ = group_files(series_files(tmp_path))
    assert names_of(volumes) == [["IM00", "IM01", "IM02"], ["IM03", "IM04", "IM05"]]


def write_capture(path: Path, **elements) -> None:
    """Write a screenshot: pixels, but no place in the patient."""
    header = ct_slice(0, 99, {name: generate_uid() for name in UIDS})
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    header.Modality = "OT"
    for name in ("ImagePositionPatient", "ImageOrientationPatient"):
        delattr(header, name)
    for name, value in elements.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


def test_odd_files_beside_a_volume_are_named(tmp_path):
    uids = write_series(tmp_path)
    write_capture(tmp_path / "screenshot")
    write_capture(tmp_path / "in_series", **uids | {"SOPClassUID": pydicom.uid.CTImageStorage})
    report = ct_slice(0, 50, uids | {"SOPInstanceUID": generate_uid(), "Modality": "SR"})
    for name in ("PixelData", "Rows", "Columns"):
        delattr(report, name)
    report.Modality = "SR"
    report.save_as(tmp_path / "report", enforce_file_format=True)
    across = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    write_series(tmp_path, (3,), 60, **uids | across)
    write_series(tmp_path, (3,), 61, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path, (3,), 62, **across | {"StudyInstanceUID": uids["StudyInstanceUID"]})
    volumes, notes = group_files(series_files(tmp_path))
    assert names_of(volumes) == [["IM00", "IM01", "IM02", "IM03"]]
    expected = {
        "screenshot": "secondary capture",
        "in_series": "without a position",
        "report": "without pixels (SR)",
        "IM60": "its size or direction is another",
        "IM61": "localizer",
        "IM62": "across the others",
    }
    assert len(notes) == len(expected)
    for name, reason in expected.items():
        assert sum(f"{name}: " in note and reason in note for note in notes) == 1, (name, notes)
    scan = formats.read_scan(tmp_path)
    assert scan.pixels.shape[0] == 4 and len(scan.notes) == len(expected)


def test_captures_and_scouts_alone_are_images(tmp_path):
    for i in range(3):
        write_capture(tmp_path / f"IM{i}", **dict.fromkeys(UIDS, "1.2.3"))
    volumes, notes = group_files(series_files(tmp_path))
    assert names_of(volumes) == [["IM0"], ["IM1"], ["IM2"]] and notes == []


@pytest.mark.parametrize(
    ("element", "values"),
    [
        ("AcquisitionNumber", (1, 2)),
        ("TemporalPositionIdentifier", (1, 2)),
        ("EchoTime", (2.3, 4.6)),
        ("ImageType", (["ORIGINAL", "PRIMARY", "WATER"], ["ORIGINAL", "PRIMARY", "FAT"])),
        ("ContentTime", ("100000", "100030")),
        ("ProtocolName", ("a", "a")),  # nothing tells them apart: by their numbers
    ],
)
def test_phases_and_echoes_are_volumes(tmp_path, element, values):
    uids = write_series(tmp_path, **{element: values[0]})
    write_series(tmp_path, start=4, **uids | {element: values[1]})
    volumes, notes = group_files(series_files(tmp_path))
    assert names_of(volumes) == [[f"IM{i:02}" for i in range(k, k + 4)] for k in (0, 4)]
    named = "in the order of their numbers" if element == "ProtocolName" else element
    assert len(notes) == 1 and "it is 2 volumes" in notes[0] and named in notes[0]


def test_numbers_that_differ_within_a_volume_do_not_split_it(tmp_path):
    write_series(tmp_path, AcquisitionNumber=lambda i: i // 2, EchoNumbers=lambda i: i)
    volumes, notes = group_files(series_files(tmp_path))
    assert len(volumes) == 1 and notes == []


def test_a_damaged_file_is_an_image_of_its_own_that_tells_why(tmp_path):
    write_series(tmp_path)
    (tmp_path / "bad").write_bytes(bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0" + bytes(40))
    volumes, notes = group_files(series_files(tmp_path))
    assert sorted(map(len, volumes)) == [1, 4] and notes == []
    with pytest.raises(UserError, match="bad: a DICOM file without an image"):
        dicom_series.read_series([tmp_path / "bad"], MAX_BYTES)
