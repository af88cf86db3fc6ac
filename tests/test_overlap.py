"""--overlap: a pixel may be of several classes, a sigmoid for each."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import masks_of
from pydicom.data import data_manager

import data
import metrics
import predict
from dataset import loading
from dataset.batches import Batches
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.reading import read_pair, read_truth
from imaging import formats, pictures, tiff, writing
from imaging.dicom import dicom_seg
from imaging.labels import BITS, Classes, join_planes, plane
from imaging.plots import draw_contours
from imaging.scan import Mask, Scan
from inference import postprocess
from inference.inputs import Input, Inputs
from inference.outputs import Writer
from inference.sampler import Sampler
from inference.segment import Prediction
from metrics import LOSSES, TRAINING_METRICS
from model import build_unet
from serving import responses
from utils import UserError

CLASSES = Classes("organ,lesion", overlap=True)
FUNCTIONS = (*LOSSES.values(), *TRAINING_METRICS)


@pytest.fixture
def organs(tmp_path):
    """Twelve discs; a lesion lies inside each."""
    y, x = np.mgrid[:64, :64]
    for i in range(12):
        rng = np.random.default_rng(i)
        cy, cx = rng.uniform(26, 38, 2)
        organ, lesion = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2 for radius in (20, 8))
        image = np.clip(60 + 80 * organ + 60 * lesion + rng.normal(0, 8, organ.shape), 0, 255)
        files = {"images": image, "masks/organ": 255 * organ, "masks/lesion": 255 * lesion}
        for folder, picture in files.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / f"{i:02}.png"), picture.astype(np.uint8))
    return tmp_path


def test_both_classes_keep_their_pixels(organs):
    pairs, _ = data.find_pairs(organs)
    truth = read_truth(pairs[0], CLASSES)
    for class_id, name in enumerate(CLASSES.names, 1):
        drawn = cv2.imread(str(organs / "masks" / name / "00.png"), 0) > 0
        assert (plane(truth.mask, class_id)[0] == drawn).all()
    dataset, problems = loading.load_pairs(pairs, Preprocessing(CLASSES, Sampler((32, 32))))
    assert not problems and masks_of(dataset).shape == (12, 32, 32, 2)
    assert (masks_of(dataset)[..., 0] >= masks_of(dataset)[..., 1]).all()
    assert dataset.info["share: organ"].mean() == pytest.approx(np.pi * 20**2 / 64**2, rel=0.02)
    assert dataset.cases[0].truth(dataset.classes)[0].dtype == BITS
    _, targets = Batches(dataset, dataset.cover(np.arange(12)), 12)[0]
    assert targets.shape == (12, 32, 32, 2) and targets.sum(-1).max() == 2


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("ignored", [0, 1])
def test_each_class_is_scored_for_itself(function, ignored):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (2, 8, 8, 2 + ignored)).astype(np.float32)
    probs = rng.random((2, 8, 8, 2)).astype(np.float32)
    found = np.asarray(metrics.per_class(function)(truth, probs))
    each = []
    for k in (0, 1):
        one = np.concatenate([truth[..., k : k + 1], truth[..., 2:]], axis=-1)
        each.append(np.asarray(function(one, probs[..., k : k + 1])))
    np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-6)
    assert metrics.per_class(function).__name__ == function.__name__


def test_the_network_has_a_sigmoid_for_each():
    model = build_unet((16, 16, 1), CLASSES.num_channels, 2, 1, overlap=True)
    assert model.output_shape[-1] == 2
    assert model.get_layer("probabilities").activation.__name__ == "sigmoid"


def test_each_class_is_decided_and_cleaned_for_itself():
    probs = np.zeros((32, 32, 2), np.float32)
    probs[4:24, 4:24, 0], probs[8:16, 8:16, 1] = 0.9, 0.8
    probs[28:30, 28:30] = 0.7  # a small part
    probs[10, 10, 0] = 0.1  # a hole in the organ where the lesion is
    metadata = {"threshold": 0.5, **CLASSES.metadata}
    mask = postprocess.decide(probs, metadata)
    assert (plane(mask, 1) == (probs[..., 0] > 0.5)).all()
    assert (plane(mask, 2) == (probs[..., 1] > 0.5)).all()
    cleaned = postprocess.decide(probs, metadata | {"clean": [1, 1]})
    assert plane(cleaned, 1).sum() == 20 * 20 and plane(cleaned, 2).sum() == 8 * 8
    higher = postprocess.decide(probs, metadata | {"threshold": [0.85, 0.5]})
    assert plane(higher, 1).sum() == 20 * 20 - 1 and plane(higher, 2).sum() == 8 * 8 + 4


def test_scores_and_contours():
    organ, lesion = np.zeros((1, 32, 32), bool), np.zeros((1, 32, 32), bool)
    organ[0, 4:24, 4:24], lesion[0, 8:16, 8:16] = True, True
    truth = join_planes([organ, lesion], BITS)
    found = join_planes([organ, np.zeros_like(lesion)], BITS)
    scores = metrics.score_classes(truth, found, CLASSES.names)
    assert scores["dice: organ"] == 1 and scores["dice: lesion"] == 0 and scores["dice"] == 0.5
    picture = np.zeros((32, 32, 3), np.uint8)
    drawn, alone = draw_contours(picture, truth[0]), draw_contours(picture, found[0])
    assert drawn[4, 10].any() and drawn[8, 10].any() and not alone[8, 10].any()


@pytest.mark.parametrize("slices", [1, 3])
def test_masks_are_written_as_they_are_read(tmp_path, slices):
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 2, (slices, 20, 24)).astype(bool) for _ in CLASSES.names]
    mask = join_planes(planes, BITS)
    image = Scan(np.zeros((slices, 20, 24, 1), np.uint8))
    written = writing.write_masks(tmp_path / "masks", "case", mask, CLASSES, image)
    files = [one.path for one in written]
    assert [path.parent.name for path in files] == CLASSES.names
    truth = read_truth(Pair(tmp_path / "case", tuple(files)), CLASSES)
    assert truth.mask.dtype == BITS and (truth.mask == mask).all()


def test_the_folders_of_the_classes_are_written_to(tmp_path):
    config = predict.Config(input=str(tmp_path), output=str(tmp_path), panels=False)
    found = Inputs([Input("a/case", (tmp_path / "organ" / "a" / "case.png",))])
    folders = predict.output_folders(config, found, CLASSES)
    assert tmp_path / "organ" / "a" in folders and tmp_path / "a" in folders
    with pytest.raises(UserError, match="holds the images"):
        predict.check_output(folders, found.items[0].files)


@pytest.mark.parametrize("kind", ["png", "tiff", "nifti", "nrrd"])
def test_large_class_values_are_kept(tmp_path, kind):
    ids = np.zeros((1, 20, 24), np.uint8)
    ids[0, 3:9] = 1
    classes = Classes("organ=70000")
    image = Scan(np.zeros((1, 20, 24, 1), np.uint8))
    (written,) = writing.write_masks(tmp_path, "case", ids, classes, image, kind)
    assert ("a PNG holds 65535 at most" in written.note) == (kind == "png")
    found = formats.read_mask_scan(written.path, image).pixels
    np.testing.assert_array_equal(found.reshape(ids.shape), 70000 * ids.astype(int))


def test_a_dicom_segmentation_holds_both(tmp_path):
    source = Path(data_manager.__file__).parent / "test_files" / "CT_small.dcm"
    image = formats.read_scan(source)
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 2, (1, 128, 128)).astype(bool) for _ in CLASSES.names]
    mask = join_planes(planes, BITS)
    content = dicom_seg.encode_mask(Mask(mask, CLASSES.names), image)
    (tmp_path / "mask.dcm").write_bytes(content)
    pair = Pair(source, (tmp_path / "mask.dcm",))
    _, truth = read_pair(pair, CLASSES)
    assert truth.mask.dtype == BITS and (truth.mask == mask).all()
    with pytest.raises(UserError, match=r"its segments overlap; expected .* or --overlap"):
        read_pair(pair, Classes("organ,lesion"))


def test_files_of_one_class_a_pixel_are_refused():
    mask = Mask(np.zeros((1, 20, 20), BITS), CLASSES.names)
    image = Scan(np.zeros((1, 20, 20, 1), np.uint8))
    for encode in (lambda: mask.values, lambda: pictures.mask_to_png(mask.ids[0], mask.names)):
        with pytest.raises(UserError, match="classes overlap"):
            encode()
    with pytest.raises(UserError, match="classes overlap"):
        tiff.encode_mask(mask, image)


def test_measurements_and_run_lengths(tmp_path):
    """What predict.py and the service say of each class."""
    organ, lesion = np.zeros((1, 32, 32), bool), np.zeros((1, 32, 32), bool)
    organ[0, 4:24, 4:24], lesion[0, 8:16, 8:16] = True, True
    mask = join_planes([organ, lesion], BITS)
    writer = Writer(tmp_path, {"classes": CLASSES.names, **CLASSES.metadata}, panels=False)
    found = Prediction(mask, None, float("nan"), None, None)
    writer.add(
        writer.write(
            Input("a/case", (tmp_path / "case.png",)), Scan(np.zeros((1, 32, 32, 1))), found
        )
    )
    assert [(row["mask"], row["area_pixels"]) for row in writer.rows] == [
        ("organ/a/case.png", 400),
        ("lesion/a/case.png", 64),
    ]
    areas = responses.class_areas(mask[0], CLASSES.names, None)
    assert [area["area_pixels"] for area in areas] == [400, 64]


@pytest.mark.slow
def test_a_training_from_end_to_end(organs, tmp_path, script):
    flags = ["--classes", "organ,lesion", "--overlap", "--image-size", 32, "--filters", 4]
    flags += ["--depth", 2, "--epochs", 40, "--epoch-images", 64]
    done = script(tmp_path, "train.py", "--data-dir", organs, *flags)
    assert done.returncode == 0, done.stderr
    done = script(tmp_path, "predict.py")
    assert done.returncode == 0 and "dice: lesion" in done.stdout, done.stderr
    model = ["--model", "files/model.h5", "--output", "out", "--input", organs / "images"]
    done = script(tmp_path, "predict.py", *model)
    assert done.returncode == 0, done.stderr
    scores = []
    for path in sorted((organs / "masks" / "organ").iterdir()):
        for name in CLASSES.names:
            truth = cv2.imread(str(organs / "masks" / name / path.name), 0) > 0
            found = cv2.imread(str(tmp_path / "out" / name / path.name), 0) > 0
            scores.append(metrics.score_mask(truth, found)["dice"])
    assert np.mean(scores) > 0.85, scores
    done = script(tmp_path, "export.py", "--model", "files/model.h5", "--out-dir", "export")
    assert done.returncode == 0, done.stderr
    model = ["--model", "export/unet.onnx", "--output", "again", "--input", organs / "images"]
    done = script(tmp_path, "predict.py", *model, "--no-panels", "--precision", "float32")
    assert done.returncode == 0, done.stderr
    for name in CLASSES.names:
        one, other = (
            cv2.imread(str(tmp_path / folder / name / "03.png"), 0) for folder in ("out", "again")
        )
        assert np.mean(one == other) > 0.995
