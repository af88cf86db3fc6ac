import numpy as np
import pytest
from scipy import ndimage

from dataset.phantoms import SIZE, draw_phantom, make_phantoms
from imaging import formats, pictures
from utils import UserError


def test_the_same_seed_draws_the_same_patient_and_another_does_not():
    image, masks = draw_phantom(np.random.default_rng((3, 4)))
    again, again_masks = draw_phantom(np.random.default_rng((3, 4)))
    other, _ = draw_phantom(np.random.default_rng((3, 5)))
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(masks, again_masks)
    assert (image != other).mean() > 0.5


@pytest.mark.parametrize("seed", range(12))
def test_anatomy(seed):
    """Two lungs, each in one piece, the left one on the image's right, darker than around them."""
    image, masks = draw_phantom(np.random.default_rng(seed))
    assert image.shape == (SIZE, SIZE) and image.dtype == np.uint8
    left, right = masks[..., 0].astype(bool), masks[..., 1].astype(bool)
    assert not (left & right).any()
    assert 0.03 < left.mean() < 0.3 and 0.03 < right.mean() < 0.3
    for lung in (left, right):
        labels, _ = ndimage.label(lung)
        assert np.bincount(labels[lung]).max() > 0.95 * lung.sum()
    assert ndimage.center_of_mass(left)[1] > ndimage.center_of_mass(right)[1]
    between = ndimage.binary_dilation(left | right, iterations=25) & ~(left | right)
    middle = slice(SIZE // 4, 3 * SIZE // 4)
    assert np.median(image[:, middle][between[:, middle]]) > np.median(image[left | right])


def test_a_set_is_made_once_and_a_larger_one_holds_it(tmp_path):
    folder = make_phantoms(tmp_path / "set", 3, seed=0)
    first = folder / "CXR_png" / "phantom_0000.png"
    stamp, pixels = first.stat().st_mtime_ns, formats.read_image(first)
    make_phantoms(folder, 3, seed=0)
    assert first.stat().st_mtime_ns == stamp
    larger = make_phantoms(tmp_path / "larger", 4, seed=0)
    assert len(list((larger / "ManualMask" / "rightMask").iterdir())) == 4
    np.testing.assert_array_equal(formats.read_image(larger / "CXR_png" / first.name), pixels)
    assert set(np.unique(formats.read_image(folder / "ManualMask" / "leftMask" / first.name))) == {
        0,
        255,
    }


def test_other_peoples_files_are_not_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        make_phantoms(tmp_path, 3, seed=0)
    assert (tmp_path / "thesis.txt").exists()


def test_an_interrupted_making_is_made_anew(tmp_path, monkeypatch):
    write, calls = pictures.write_picture, []

    def power_cut(path, image):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        write(path, image)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pictures, "write_picture", power_cut)
        make_phantoms(tmp_path / "set", 4, seed=0)
    assert not (tmp_path / "set").exists()
    make_phantoms(tmp_path / "set", 4, seed=0)
    assert len(list((tmp_path / "set" / "CXR_png").iterdir())) == 4
