"""A DICOM series in a zip is read as its folder is; others are refused before they cost much."""

import io
import zipfile

import numpy as np
import pydicom
import pytest
from test_dicom_series import write_capture, write_series

from imaging import formats, writing
from imaging.dicom import dicom_zip
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def zip_folder(folder, under="", method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{under}{path.relative_to(folder)}")
    return buffer.getvalue()


def test_it_is_read_as_its_folder(tmp_path):
    """Folders in it, a screenshot, a copy, and what is no DICOM do not matter."""
    write_series(tmp_path / "series")
    (tmp_path / "series" / "IM03 (2)").write_bytes((tmp_path / "series" / "IM03").read_bytes())
    write_capture(tmp_path / "series" / "SC")
    (tmp_path / "series" / "README.txt").write_text("from a CD")
    (tmp_path / "series" / "DICOMDIR").write_text("no table of contents")
    expected = formats.read_scan(tmp_path / "series")
    scan = formats.decode_scan(zip_folder(tmp_path / "series", "study/1/"))
    np.testing.assert_array_equal(scan.pixels, expected.pixels)
    np.testing.assert_array_equal(scan.affine, expected.affine)
    assert scan.spacing_mm == expected.spacing_mm and len(scan.notes) == len(expected.notes) == 2
    assert "IM03 (2): a copy of IM03; left out" in scan.notes[0]


def test_its_mask_refers_to_the_files_in_it(tmp_path):
    write_series(tmp_path)
    (tmp_path / "series.zip").write_bytes(zip_folder(tmp_path))
    scan = formats.read_scan(tmp_path / "series.zip")
    ids = np.zeros(scan.pixels.shape[:3], np.uint8)
    ids[1, 2:5, 2:5] = 1
    _, note = writing.write_mask(tmp_path / "mask", ids, ["organ"], scan, kind="seg")
    assert not note
    written = pydicom.dcmread(tmp_path / "mask.dcm")
    referred = written.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {one.ReferencedSOPInstanceUID for one in referred} == {
        pydicom.dcmread(path).SOPInstanceUID for path in tmp_path.glob("IM*")
    }


def test_one_image_in_a_zip(tmp_path):
    write_series(tmp_path, positions=(0,))
    assert len(formats.decode_scan(zip_folder(tmp_path)).pixels) == 1


def test_two_volumes_are_refused(tmp_path):
    write_series(tmp_path / "a")
    write_series(tmp_path / "b")
    with pytest.raises(UserError, match="2 volumes, of 4, 4 files; expected one volume"):
        formats.decode_scan(zip_folder(tmp_path))


def test_an_array_in_a_zip_is_still_an_array(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert formats.decode_scan(buffer.getvalue()).format == "NPZ"


def test_it_is_refused_before_much_is_unpacked(tmp_path, monkeypatch):
    write_series(tmp_path)
    content = zip_folder(tmp_path)
    with pytest.raises(UserError, match="its header declares .* expected at most"):
        formats.decode_scan(content, max_bytes=1000)
    with pytest.raises(UserError, match="packed in an unusual way; expected a plain zip"):
        dicom_zip.decode_zip(zip_folder(tmp_path, method=zipfile.ZIP_LZMA), 10**9)
    encrypted = bytearray(content)
    at = encrypted.index(b"PK\1\2")  # the first entry of the table at the end
    encrypted[at + 8] |= dicom_zip.ENCRYPTED
    with pytest.raises(UserError, match="IM00: encrypted; expected a zip without a password"):
        dicom_zip.decode_zip(bytes(encrypted), 10**9)
    monkeypatch.setattr(dicom_zip, "MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="4 files in a zip; expected at most 3"):
        dicom_zip.decode_zip(content, 10**9)


@pytest.mark.parametrize(("offset", "value"), [(6, 99), (10, 99), (46, 255)])
def test_a_damaged_array_is_an_error_of_the_file(offset, value):
    """A version and a way of packing that nobody knows, a name in no alphabet."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, np.arange(256, dtype=np.uint8).reshape(16, 16))
    content = bytearray(buffer.getvalue())
    content[content.index(b"PK\1\2") + offset] = value
    with pytest.raises(UserError, match="unreadable as NPZ|expected one array"):
        formats.decode_scan(bytes(content))


def test_a_damaged_zip_is_an_error_of_the_file(tmp_path):
    write_series(tmp_path)
    content = bytearray(zip_folder(tmp_path, method=zipfile.ZIP_STORED))
    content[len(content) // 3] ^= 255
    with pytest.raises(UserError, match="unreadable as zipped DICOM series"):
        formats.decode_scan(bytes(content))
    with pytest.raises(UserError, match="unreadable as NPZ"):
        formats.decode_scan(bytes(content[:-30]))
