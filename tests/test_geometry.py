"""A network of volumes answers in the file's own geometry: every voxel stays where it was.

The network marks bright voxels. Each corner of the volume, and of a box within it, is one.
"""

import itertools

import highdicom
import keras
import nibabel
import numpy as np
import pydicom
import pytest
from test_dicom_series import write_series

import predict
import utils
from imaging import formats
from inference.sampler import Sampler

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = (17, 20, 24)
# How axes x, y, z of a file may run: each order of the patient's axes, each direction.
TURNS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file: bright is inside. Its patches are smaller than the volume."""
    inputs = keras.Input((8, 16, 16, 1))
    layer = keras.layers.Conv3D(1, 1, activation="sigmoid", name="probabilities")
    network = keras.Model(inputs, layer(inputs))
    layer.set_weights([np.full((1, 1, 1, 1, 1), 100.0), np.full(1, -50.0)])
    path = tmp_path_factory.mktemp("model") / "model.h5"
    sampler = Sampler((8, 16, 16), patches=True, orientation="SPL")
    metadata = utils.make_metadata(["x"], (16, 16), 1, window="500,1000", **sampler.metadata)
    utils.save_model(network, path, metadata)
    return path


def labelled_volume():
    """Grey levels 0 to 400, and bright corners."""
    volume = np.random.default_rng(0).integers(0, 400, SHAPE).astype(np.int16)
    for place in itertools.product(*[(0, side - 1) for side in SHAPE]):
        volume[place] = 1000
    for place in itertools.product(*[(3, side // 2) for side in SHAPE]):
        volume[place] = 900
    volume[1, 2, 5] = 800  # so that no mirror image is the same
    return volume


def sorted_places(affine, inside):
    """Where the voxels lie that are inside, mm."""
    indices = np.argwhere(inside)
    places = indices @ affine[:3, :3].T + affine[:3, 3]
    return sorted(map(tuple, places.round(3) + 0.0))


def segment(model, source, output):
    predict.main(predict.Config(str(model), str(source), str(output), panels=False))


def test_nifti_in_all_48_orientations(model, tmp_path):
    volume = labelled_volume()
    assert len(TURNS) == 48
    for number, (order, signs) in enumerate(TURNS):
        affine = np.zeros((4, 4))
        for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
            affine[world, axis] = sign * (1.0, 1.1, 1.2)[world]
        affine[:, 3] = [5, -7, 11, 1]
        stored = volume.transpose(order)[
            tuple(slice(None, None, sign) for sign in signs)
        ]  # the same patient
        path = tmp_path / "in" / f"{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(stored, affine), path)
    segment(model, tmp_path / "in", tmp_path / "out")
    names = set()
    for path in (tmp_path / "in").iterdir():
        image, mask = nibabel.load(path), nibabel.load(tmp_path / "out" / path.name)
        np.testing.assert_array_equal(mask.affine, image.affine)
        np.testing.assert_array_equal(mask.get_fdata() > 0, image.get_fdata() > 500)
        names.add(nibabel.aff2axcodes(image.affine))
    assert len(names) == 48


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_formats(model, tmp_path, suffix):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(labelled_volume())
    image.SetSpacing((1.0, 1.5, 2.0))
    image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
    image.SetOrigin((3, 5, 7))
    (tmp_path / "in").mkdir()
    sitk.WriteImage(image, str(tmp_path / "in" / f"a{suffix}"))
    segment(model, tmp_path / "in", tmp_path / "out")
    [path] = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    found = sitk.ReadImage(str(path))
    for name in ("GetSpacing", "GetDirection", "GetOrigin"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(image, name)())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found) > 0, labelled_volume() > 500)


@pytest.mark.parametrize(
    "direction", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [0, 1, 0, 0, 0, -1]]
)
def test_dicom_series(model, tmp_path, direction):
    """Axial, turned around, and sagittal slices, in files of no order."""
    volume = labelled_volume()
    normal = np.cross(direction[:3], direction[3:])

    def place(number):
        return list(2.5 * number * normal)

    def pixels(number):
        return np.uint16(volume[number] + 1024).tobytes()

    write_series(
        tmp_path / "in",
        positions=range(SHAPE[0]),
        ImageOrientationPatient=list(direction),
        ImagePositionPatient=place,
        Rows=SHAPE[1],
        Columns=SHAPE[2],
        PixelSpacing=[1.0, 1.0],
        RescaleSlope=1,
        PixelData=pixels,
    )
    segment(model, tmp_path / "in", tmp_path / "out")
    scan = formats.read_scan(tmp_path / "in")
    [path] = (tmp_path / "out").glob("*.dcm")
    mask = formats.read_mask_scan(path, scan, ["x"])
    np.testing.assert_array_equal(mask.pixels > 0, scan.pixels > 500)
    assert (scan.pixels > 500).sum() == 17
    # highdicom's own reader finds the voxels at the places that the slices' headers say.
    seg = highdicom.seg.segread(path).get_volume(combine_segments=True)
    found = sorted_places(seg.affine, seg.array > 0)
    steps = np.array(direction, float).reshape(2, 3)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([2.5 * normal, steps[1], steps[0]], axis=1)
    np.testing.assert_allclose(found, sorted_places(affine, volume > 500), atol=1e-6)
    source = pydicom.dcmread(tmp_path / "in" / "IM00")
    assert pydicom.dcmread(path).FrameOfReferenceUID == source.FrameOfReferenceUID
