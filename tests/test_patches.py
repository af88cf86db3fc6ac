"""Training on patches: how they are drawn, kept in the cache, and trained on in 2-D and 3-D."""

import dataclasses
import mmap
import subprocess
import sys
import time

import keras
import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import tifffile
from conftest import ROOT, flags
from test_train import eager  # noqa: F401 (a fixture)

import data
import export
import predict
import train
import utils
from dataset import fingerprints, loading
from dataset.batches import Batches
from dataset.cache import MAX_PLACES, Case, Dataset, find_places
from dataset.frame import detect_frame
from dataset.loading import Preprocessing
from imaging import formats, pictures
from imaging.labels import Classes
from inference import engines
from inference.exported_model import load_exported
from inference.sampler import Sampler
from training.checkpoint import Checkpoint
from training.sampling import describe_patches, make_sampler
from utils import UserError


def make_case(shape, where, classes=1):
    """A case of zeros whose class 1 is in one box; each voxel of the image is its own number."""
    image = np.arange(np.prod(shape), dtype=np.uint32).astype(np.uint8).reshape(*shape, 1)
    masks = np.zeros((*shape, classes), np.uint8)
    masks[(*where, 0)] = 255
    return Case(image, masks, find_places(masks))


def make_dataset(cases, sampler, classes="x"):
    return Dataset(cases, sampler, 1, Classes(classes), pd.DataFrame())


@pytest.mark.parametrize(
    ("sampler", "shape"),
    [
        (Sampler((16, 16), patches=True), (1, 200, 150)),
        (Sampler((16, 16), patches=True), (9, 60, 70)),
        (Sampler((4, 16, 16), patches=True), (20, 60, 70)),
    ],
)
def test_a_third_of_the_patches_show_the_object(sampler, shape):
    """By chance hardly any would: the object is 2 x 2 pixels in one slice."""
    where = (slice(0, 1), slice(30, 32), slice(40, 42))
    dataset = make_dataset([make_case(shape, where)], sampler)
    rng = np.random.default_rng(0)
    [example] = dataset.examples([0])
    drawn = np.array([dataset.draw(example, rng) for _ in range(600)])
    shown = dataset.take(drawn)[1].any(axis=tuple(range(1, sampler.dimensions + 2)))
    assert 0.28 < shown.mean() < 0.42
    assert (drawn[:, 1:] >= 0).all()
    assert (drawn[:, 1:] + sampler.window <= shape).all()
    assert len(np.unique(drawn[:, 2])) > 20


def test_the_rare_class_is_shown_as_often():
    case = make_case((1, 200, 200), (slice(0, 1), slice(0, 100), slice(0, 200)), classes=2)
    case.masks[0, 150, 150, 1] = 255
    case = case._replace(places=find_places(case.masks))
    dataset = make_dataset([case], Sampler((16, 16), patches=True), "a,b")
    rng = np.random.default_rng(0)
    drawn = np.array([dataset.draw(dataset.examples([0])[0], rng) for _ in range(600)])
    rare = dataset.take(drawn)[1][..., 1].any((1, 2)).mean()
    assert rare == pytest.approx(1 / 6, abs=0.05)


def test_places_are_pixels_of_the_class():
    masks = np.zeros((2, 50, 60, 2), np.uint8)
    masks[1, 10:40, 20:50, 0] = 255
    places = find_places(masks)
    assert places.shape == (2, MAX_PLACES) and (places[1] == -1).all()
    assert masks[..., 0].ravel()[places[0]].all() and len(set(places[0])) == MAX_PLACES


def test_a_case_smaller_than_a_patch_lies_in_its_middle():
    case = make_case((3, 10, 12), (slice(1, 2), slice(5, 6), slice(5, 6)))
    dataset = make_dataset([case], Sampler((8, 16, 16), patches=True))
    [example] = dataset.examples([0])
    drawn = dataset.draw(example, np.random.default_rng(0))
    image, mask = (array[0] for array in dataset.take([drawn]))
    np.testing.assert_array_equal(image[2:5, 3:13, 2:14], case.image)
    assert mask.sum() == 255 and mask[3, 8, 7] == 255
    np.testing.assert_array_equal(drawn, dataset.cover([0])[0])


def test_validation_windows_cover_a_case_once():
    dataset = make_dataset([make_case((1, 50, 33), ())] * 2, Sampler((16, 16), patches=True))
    windows = dataset.cover([1])
    assert len(windows) == 4 * 3 and set(windows[:, 0]) == {1}
    covered = np.zeros((50, 33), int)
    for _, _, y, x in windows:
        covered[y : y + 16, x : x + 16] += 1
    assert covered.min() == 1


@pytest.mark.parametrize("slices", [13, 14, 15])
def test_validation_windows_of_thin_volumes_are_the_same_in_each_epoch(slices):
    """What is smaller than a window begins before the volume, at -1 for example."""
    case = make_case((slices, 64, 64), (slice(5, 9), slice(40, 60), slice(40, 60)))
    dataset = make_dataset([case], Sampler((16, 32, 32), patches=True))
    batches = Batches(dataset, dataset.cover([0]), 4)
    shown = []
    for epoch in range(3):
        batches.epoch = epoch
        shown.append(batches[0][1])
        assert shown[-1].sum() == 4 * 20 * 20
    np.testing.assert_array_equal(shown[0], shown[2])


@pytest.mark.parametrize("count", [3, 5, 6, 12])
def test_some_validation_windows_stand_for_all(count):
    case = make_case((64, 256, 256), ())
    dataset = make_dataset([case] * (count + 1), Sampler((16, 64, 64), patches=True))
    config = train.Config(patch_size="16,64,64", dimensions="3")
    numbers = {"train": np.array([count]), "val": np.arange(count)}
    shown = train.make_batches(config, dataset, numbers)[1].listed
    assert len(shown) == 96 and set(shown[:, 0]) == set(range(count))
    for axis in (1, 2, 3):
        assert len(set(shown[:, axis])) == 4


def test_patches_follow_from_seed_and_epoch_alone():
    case = make_case((4, 60, 60), (slice(0, 1), slice(0, 9), slice(0, 9)))
    dataset = make_dataset([case] * 3, Sampler((16, 16), patches=True))
    one, two = (
        Batches(dataset, dataset.examples(range(3)), 4, "mild", seed=3, at_least=10)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one[1][0], two[1][0])
    assert not np.array_equal(one[0][0], one[1][0])


# ----------------------------------------------------------------------------------------- cache


@pytest.fixture
def volumes(tmp_path):
    """Ten NIfTI volumes of several spacings with a ball of the same size in mm."""
    folder = tmp_path / "volumes"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(10):
        rng = np.random.default_rng(i)
        spacing = np.array([1.0, 1.0, 2.0]) if i % 5 else np.array([1.25, 1.0, 2.5])
        shape = tuple(np.round(np.array([44, 48, 40]) / spacing).astype(int))
        middle = np.array(shape) * rng.uniform(0.4, 0.6, 3)
        places = np.stack(np.mgrid[tuple(slice(side) for side in shape)], axis=-1)
        ball = (((places - middle) * spacing) ** 2).sum(-1) < 12**2
        image = (rng.normal(100, 20, shape) + 80 * ball).astype(np.float32)
        affine = np.diag([*spacing, 1.0])
        for kind, voxels in (("images", image), ("masks", ball.astype(np.uint8))):
            path = folder / kind / f"v{i}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return folder


def test_the_frame_is_what_most_volumes_have(volumes, discs):
    frame = detect_frame(data.find_pairs(volumes)[0])
    assert frame.spacing == (2.0, 1.0, 1.0) and frame.orientation == "SPL"
    assert detect_frame(data.find_pairs(discs)[0]) == (None, "")


def test_stacks_of_a_microscope_have_a_spacing_and_no_orientation(tmp_path):
    rng = np.random.default_rng(0)
    for number, step in enumerate((0.12, 0.24, 0.3)):
        stack = rng.integers(0, 255, (6, 16, 20), dtype=np.uint8)
        for name in ("images", "masks"):
            (tmp_path / name).mkdir(exist_ok=True)
            tifffile.imwrite(
                tmp_path / name / f"{number}.tif",
                stack if name == "images" else np.uint8(stack > 128),
                imagej=True,
                resolution=(10, 10),
                metadata={"axes": "ZYX", "unit": "um", "spacing": step},
            )
    spacing, orientation = detect_frame(data.find_pairs(tmp_path)[0])
    assert spacing == pytest.approx((0.00024, 0.0001, 0.0001)) and orientation == ""


def test_replaced_voxels_beside_a_header_are_seen(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        voxels = np.zeros((2, 16, 20), np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), tmp_path / name / "a.mhd")
    [pair] = data.find_pairs(tmp_path)[0]
    before = loading._fingerprint(pair), fingerprints.fingerprint(pair.image)
    assert fingerprints.fingerprint(pair.image) == before[1]
    pair.image.with_suffix(".raw").write_bytes(bytes([1]) * 640)
    after = loading._fingerprint(pair), fingerprints.fingerprint(pair.image)
    assert before[0] != after[0] and before[1] != after[1]


def test_cases_are_decoded_again_after_an_edit_of_the_source(volumes, tmp_path, monkeypatch):
    pairs, _ = data.find_pairs(volumes)
    preprocessing = Preprocessing(Classes("ball"), Sampler((16, 16)))
    loading.load_pairs(pairs, preprocessing, tmp_path / "cache")
    monkeypatch.setattr(loading, "source_mark", lambda: "edited")
    count, read = [], loading.read_pair
    monkeypatch.setattr(loading, "read_pair", lambda *args: count.append(1) or read(*args))
    loading.load_pairs(pairs, preprocessing, tmp_path / "cache")
    loading.load_pairs(pairs, preprocessing, tmp_path / "cache")
    assert len(count) == 10 and len(list((tmp_path / "cache").glob("*.cases"))) == 1


def test_a_cache_of_patches_serves_every_patch_size(volumes, tmp_path, monkeypatch):
    pairs, _ = data.find_pairs(volumes)
    config = train.Config(data_dir=str(volumes), dimensions="3", patch_size="8,16,16", depth=2)
    cases = {}
    for size in ("8,16,16", "16,32,32"):
        sampler = make_sampler(dataclasses.replace(config, patch_size=size), pairs)
        preprocessing = Preprocessing(Classes("ball"), sampler)
        dataset, problems = loading.load_pairs(pairs, preprocessing, tmp_path / "cache")
        assert not problems
        cases[size] = dataset.cases
        monkeypatch.setattr(loading, "read_pair", None)  # nothing is decoded again
    assert len(list((tmp_path / "cache").glob("*.cases"))) == 1
    for one, other in zip(*cases.values(), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    # All at the median spacing: 40 mm in slices of 2 mm.
    assert {case.image.shape[:3] for case in cases["8,16,16"]} == {(20, 48, 44)}
    assert is_mapped(cases["8,16,16"][0].image)
    assert is_mapped(cases["8,16,16"][0].thinned(4, 8).masks)
    assert cases["8,16,16"][0].thinned(4, 8).image.shape == (4, 8, 8, 1)


def is_mapped(array) -> bool:
    """Say whether an array lies in a file, of which only what is used is read."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_what_a_sampler_cannot_be(volumes):
    config = train.Config(data_dir=str(volumes))
    for change, message in [
        ({"dimensions": "3"}, "dimensions is 3 and patch_size is empty; expected --patch-size"),
        ({"dimensions": "4"}, "dimensions is '4'; expected 2, 2.5, 3"),
        ({"patch_size": "1,2,3"}, "patch_size is '1,2,3', three sides, and dimensions is 2"),
        ({"patch_size": "8,8", "dimensions": "3"}, "expected .* slices, rows and columns"),
        ({"patch_size": "100"}, "patch size 100 is not a multiple of 16"),
        ({"spacing": "1"}, "spacing is '1'; expected none without --patch-size"),
        ({"spacing": "0", "patch_size": "32"}, "spacing is '0'; expected mm"),
    ]:
        with pytest.raises(UserError, match=message):
            train.train(dataclasses.replace(config, **change))


# -------------------------------------------------------------------------------------- training


def test_sizes_that_are_not_used_or_mostly_padding_are_told(volumes):
    config = train.Config(data_dir=str(volumes), patch_size="160", image_size=64)
    config = train.with_classes(config)
    _, dataset = train.load_data(config)
    unused, large = describe_patches(config, dataset)
    assert "image_size 64 is not used, because patch_size is 160" in unused
    assert "patch_size 160 is much larger than all images (" in large
    assert describe_patches(train.Config(patch_size="32"), dataset)[1:] == []
    coarse = dataclasses.replace(config, spacing="100")
    with pytest.raises(UserError, match="voxels at the network's spacing; expected finer"):
        train.load_data(coarse)


def tiny(folder, tmp_path, **more):
    return train.Config(
        data_dir=str(folder),
        out_dir=str(tmp_path / "run"),
        filters=4,
        depth=2,
        epochs=6,
        epoch_images=32,
        batch_size=4,
        **more,
    )


@pytest.mark.slow
@pytest.mark.compiled
def test_volumes_are_trained_and_predicted_in_three_dimensions(volumes, tmp_path):
    train.train(tiny(volumes, tmp_path, dimensions="3", patch_size="16,32,32"))
    metadata = utils.load_metadata(tmp_path / "run" / "model.h5")
    assert metadata["sampler"] == {
        "size": [16, 32, 32],
        "patches": True,
        "neighbours": 0,
        "spacing": [2.0, 1.0, 1.0],
        "orientation": "SPL",
    }
    table = predict.score_run(tmp_path / "run")
    assert table.dice.min() > 0.8
    config = predict.Config(
        model=str(tmp_path / "run" / "model.h5"),
        input=str(volumes / "images" / "v0.nii.gz"),
        output=str(tmp_path / "out"),
    )
    predict.main(config)
    found, image = (
        nibabel.load(path)
        for path in (tmp_path / "out" / "v0.nii.gz", volumes / "images" / "v0.nii.gz")
    )
    np.testing.assert_array_equal(found.affine, image.affine)
    assert found.shape == image.shape


@pytest.fixture
def sequences(tmp_path):
    """Ten volumes of two sequences and two classes; each class is seen in one of them alone."""
    for i in range(10):
        rng = np.random.default_rng(i)
        mask, voxels = np.zeros((40, 44, 18), np.uint8), rng.normal(100, 10, (40, 44, 18, 2))
        for class_id, (x, y, z) in enumerate(rng.integers((2, 2, 2), (26, 30, 9), (2, 3)), 1):
            mask[x : x + 11, y : y + 11, z : z + 7] = class_id
            voxels[..., class_id - 1] += 90 * (mask == class_id)
        affine = np.diag((1.0, 1.0, 2.0, 1.0))
        for kind, array in (("images", voxels.astype(np.float32)), ("masks", mask)):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            path = tmp_path / "set" / kind / f"v{i}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return tmp_path / "set"


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow writes SavedModels")
@pytest.mark.parametrize(
    "sampler",
    [
        {"dimensions": "2.5", "image_size": 48},
        {"dimensions": "3", "patch_size": "16,32,32", "architecture": "residual"},
    ],
)
def test_several_sequences_and_classes_from_training_to_export(sequences, tmp_path, sampler):
    more = {"classes": "ball,box", "batch_size": 8, "epoch_images": 96, "epochs": 8, **sampler}
    train.train(dataclasses.replace(tiny(sequences, tmp_path), **more))
    table = predict.score_run(tmp_path / "run")
    assert min(table["dice: ball"].mean(), table["dice: box"].mean()) > 0.7
    model = str(tmp_path / "run" / "model.h5")
    image = sequences / "images" / "v0.nii.gz"
    predict.main(predict.Config(model=model, input=str(image), output=str(tmp_path / "keras")))
    written = tmp_path / "keras" / "v0.nii.gz"
    np.testing.assert_array_equal(nibabel.load(written).affine, nibabel.load(image).affine)
    expected = formats.read_scan(written).pixels[..., 0]
    manifest = export.export(
        export.Config(model, str(tmp_path / "export"), images=str(sequences / "images"), checked=3)
    )
    assert min(manifest["agreement"]["saved_model"], manifest["agreement"]["onnx"]) > 0.9999
    for engine in ("onnxruntime", "openvino"):
        if engine == "openvino" and not engines.has_openvino():
            continue
        exported, run = load_exported(tmp_path / "export" / "unet.onnx", 1, engine, "float32")
        prepared = exported.read(image.read_bytes(), max_slices=99)
        assert (exported.predict(prepared, run).ids == expected).mean() > 0.9999


@pytest.mark.slow
@pytest.mark.compiled
def test_small_objects_in_large_images_are_found_by_patches(tmp_path):
    for i in range(8):
        rng = np.random.default_rng(i)
        mask = np.zeros((320, 256), bool)
        for y, x in rng.integers(6, 250, (12, 2)):
            mask[y - 4 : y + 4, x - 4 : x + 4] = True
        image = np.clip(rng.normal(80, 10, mask.shape) + 100 * mask, 0, 255).astype(np.uint8)
        pictures.write_picture(tmp_path / "set" / "images" / f"{i}.png", image)
        pictures.write_picture(tmp_path / "set" / "masks" / f"{i}.png", 255 * np.uint8(mask))
    config = tiny(tmp_path / "set", tmp_path, patch_size="64")
    log = train.train(config)
    assert log.val_dice.max() > 0.8
    table = predict.score_run(tmp_path / "run")
    assert table.dice.mean() > 0.8
    # The same command finds it finished; a stopped one goes on.
    again = train.train(dataclasses.replace(config, epochs=7))
    assert again.epoch.tolist() == list(range(1, 8))
    scan = formats.read_scan(tmp_path / "set" / "images" / "0.png")
    assert scan.pixels.shape[1:3] == (320, 256)


SAMPLERS = {
    "2-D patches": {"patch_size": "16"},
    "2.5-D patches": {"patch_size": "16", "dimensions": "2.5"},
    "3-D patches": {"patch_size": "8,16,16", "dimensions": "3"},
}


def short(folder, tmp_path, **more):
    fields = {"filters": 2, "epochs": 3, "epoch_images": 8, "precision": "float32", **more}
    return dataclasses.replace(tiny(folder, tmp_path), **fields)


def without_time(log):
    return log.drop(columns="seconds")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(volumes, tmp_path, monkeypatch, name):
    config = short(volumes, tmp_path, **SAMPLERS[name])
    whole = train.train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    end = train.Checkpoint.on_epoch_end

    def crash(self, epoch, logs=None):
        end(self, epoch, logs)
        if epoch == 1:
            raise ConnectionAbortedError

    with monkeypatch.context() as patch, pytest.raises(ConnectionAbortedError):
        patch.setattr(train.Checkpoint, "on_epoch_end", crash)
        train.train(config)
    pd.testing.assert_frame_equal(without_time(train.train(config)), without_time(whole), rtol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_keeps_its_spacing_when_volumes_are_added(volumes, tmp_path, monkeypatch):
    config = short(volumes, tmp_path, dimensions="3", patch_size="8,16,16")
    begin = Checkpoint.on_epoch_begin

    def stop(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt
        begin(self, epoch, logs)

    monkeypatch.setattr(Checkpoint, "on_epoch_begin", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    monkeypatch.undo()
    for number in range(20):
        for name in ("images", "masks"):
            voxels = np.asarray(nibabel.load(volumes / name / "v1.nii.gz").dataobj)
            path = volumes / name / f"w{number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag((3.0, 3, 3, 1))), path)
    assert detect_frame(data.find_pairs(volumes)[0]).spacing == (3.0, 3.0, 3.0)
    train.train(config)
    metadata = utils.load_metadata(tmp_path / "run" / "model.h5")
    assert metadata["sampler"]["spacing"] == [2.0, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_folds_of_volumes_score_each_volume_once(volumes, tmp_path, name):
    config = short(volumes, tmp_path, folds=3, epochs=1, **SAMPLERS[name])
    summary = train.train(config)
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert len(table) == 10 and table.image.nunique() == 10 and set(table.unit) == {"mm"}
    assert summary.loc["dice", "mean"] == pytest.approx(table.dice.mean())


@pytest.mark.slow
def test_a_killed_run_goes_on(volumes, tmp_path):
    """Killed in the middle of an epoch: the model loads, and in the end every epoch stands once."""
    config = short(volumes, tmp_path, epochs=12, epoch_images=64, **SAMPLERS["3-D patches"])
    command = [sys.executable, ROOT / "train.py", *flags(config)]
    model, log = tmp_path / "run" / "model.h5", tmp_path / "run" / "log.csv"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not log.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    utils.load_model(model)
    assert len(pd.read_csv(log)) < 12
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pd.read_csv(log).epoch.tolist() == list(range(1, 13))


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_volumes_are_all_named(volumes, tmp_path, name):
    for number in (2, 5):
        path = volumes / "images" / f"v{number}.nii.gz"
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        train.train(short(volumes, tmp_path, **SAMPLERS[name]))
    assert all(f"v{number}.nii.gz" in str(caught.value) for number in (2, 5))


@pytest.mark.slow
def test_volumes_are_trained_with_jax(volumes, tmp_path, script, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    flags = ["--dimensions", 3, "--patch-size", "16,32,32", "--depth", 2]
    done = script(
        tmp_path, "train.py", "--data-dir", volumes, "--epochs", 6, "--epoch-images", 32, *flags
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert pd.read_csv(tmp_path / "files" / "log.csv").val_dice.max() > 0.5
    done = script(tmp_path, "predict.py", "--no-panels")
    assert done.returncode == 0, done.stderr[-2000:]
