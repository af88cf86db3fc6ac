"""Files of several frames: sorted by their positions, and masks of them in the same order."""

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from test_dicom_grey import encode

from imaging import formats
from imaging.dicom import dicom_seg
from imaging.scan import NO_DISTANCE
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
MIXED = (4, 0, 5, 2, 1, 3)


def group(position, **more) -> Dataset:
    """Make the functional groups of a frame at a position along the body, or at a place."""
    item, place, measures, turn, content = (Dataset() for _ in range(5))
    place.ImagePositionPatient = [10, 20, position]
    measures.PixelSpacing, measures.SliceThickness = [0.7, 0.8], 3
    turn.ImageOrientationPatient = more.pop("directions", [1, 0, 0, 0, 1, 0])
    for name, value in more.items():
        setattr(content, name, value)
    item.PlanePositionSequence, item.PixelMeasuresSequence = [place], [measures]
    item.PlaneOrientationSequence, item.FrameContentSequence = [turn], [content]
    return item


def enhanced(positions, groups=None, **more) -> bytes:
    """Encode an enhanced CT; the pixels of a frame are its position."""
    pixels = np.stack([np.full((64, 64), position, np.int16) for position in positions])
    elements = {
        "SOPClassUID": pydicom.uid.EnhancedCTImageStorage,
        "FrameOfReferenceUID": "1.2.3",
        "PerFrameFunctionalGroupsSequence": groups or [group(position) for position in positions],
    }
    removed = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
    return encode(pixels, **dict.fromkeys(removed) | elements | more)


def read(tmp_path, content):
    (tmp_path / "a.dcm").write_bytes(content)
    return formats.read_scan(tmp_path / "a.dcm")


def test_frames_are_sorted_by_their_positions(tmp_path):
    scan = read(tmp_path, enhanced([5 * i for i in MIXED]))
    assert scan.pixels[:, 0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25]
    assert scan.spacing_mm == (5, 0.7, 0.8)
    assert scan.notes == ("its frames are sorted by their positions",)
    expected = read(tmp_path, enhanced([5 * i for i in range(6)]))
    np.testing.assert_allclose(scan.affine, expected.affine)
    np.testing.assert_allclose(scan.affine @ (2, 3, 4, 1), (-10 - 4 * 0.8, -20 - 3 * 0.7, 10, 1))
    assert expected.notes == ()


def test_masks_of_sorted_frames_lie_right(tmp_path):
    scan = read(tmp_path, enhanced([5 * i for i in MIXED]))
    ids = np.zeros((6, 64, 64), np.uint8)
    for i in range(6):
        ids[i, : 4 + i, : 8 + i] = 1 + i % 2
    path = tmp_path / "seg.dcm"
    path.write_bytes(dicom_seg.encode_seg(ids, ["x", "y"], scan.header))
    mask = formats.read_mask_scan(path, scan, ["x", "y"])
    np.testing.assert_array_equal(mask.pixels[..., 0], ids)
    made = pydicom.dcmread(path)
    frames = zip(made.pixel_array, made.PerFrameFunctionalGroupsSequence, strict=True)
    for frame, groups in frames:
        z = round(groups.PlanePositionSequence[0].ImagePositionPatient[2] / 5)
        np.testing.assert_array_equal(frame > 0, ids[z] > 0)
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert MIXED[source.ReferencedFrameNumber - 1] == z
    affine = scan.affine[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(ids.transpose(2, 1, 0), affine), tmp_path / "mask.nii")
    np.testing.assert_array_equal(formats.read_mask_scan(tmp_path / "mask.nii").pixels[..., 0], ids)


def test_a_gap_between_frames_is_told(tmp_path):
    scan = read(tmp_path, enhanced((0, 5, 10, 25, 30)))
    assert scan.affine is None and scan.spacing_mm[0] == 5
    assert scan.notes == (
        "a gap: slices are 5 mm apart, but frame 3 and frame 4 are 15 mm apart, 2 missing",
    )


@pytest.mark.parametrize("order", [(0, 1, 2, 0, 1, 2), (0, 0, 1, 1, 2, 2)])
def test_time_points_and_echoes_are_never_mixed(tmp_path, order):
    groups = []
    for number, i in enumerate(order):
        groups.append(group(5 * i, TemporalPositionIndex=number, StackID="1"))
    with pytest.raises(UserError, match="6 frames at 3 positions: several time points"):
        read(tmp_path, enhanced([5 * i for i in order], groups))


def test_stacks_of_two_directions_are_refused(tmp_path):
    groups = [group(i) for i in range(3)]
    groups += [group(i, directions=[0, 1, 0, 0, 0, -1]) for i in range(3)]
    with pytest.raises(UserError, match="frames of 2 directions"):
        read(tmp_path, enhanced(range(6), groups))


def test_a_film_of_one_place_stays_as_stored(tmp_path):
    scan = read(tmp_path, enhanced((3, 1, 2), [group(7) for _ in range(3)]))
    assert scan.pixels[:, 0, 0, 0].tolist() == [3, 1, 2] and scan.affine is None
    assert scan.notes == (NO_DISTANCE,)
    plain = encode(np.zeros((3, 64, 64), np.uint8), SliceThickness=None)
    assert read(tmp_path, plain).notes == (NO_DISTANCE,)


def test_frames_without_positions_stay_as_stored(tmp_path):
    content = enhanced((3, 1, 2), PerFrameFunctionalGroupsSequence=None)
    assert read(tmp_path, content).pixels[:, 0, 0, 0].tolist() == [3, 1, 2]
