import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, flags

import data
import predict
import train
import utils
from dataset import loading
from dataset.batches import Batches
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.split_table import read_rows, read_split
from imaging import formats, pictures
from imaging.labels import Classes
from inference import postprocess
from inference.sampler import Sampler
from training import checkpoint, cross_validation, run_folder, run_identity
from utils import UserError


@pytest.fixture
def small(discs, tmp_path, monkeypatch):
    """A config that trains in seconds."""
    monkeypatch.setenv("UNET_CACHE", str(tmp_path / "cache"))
    return train.Config(
        data_dir=str(discs),
        image_size=32,
        filters=4,
        depth=2,
        epochs=3,
        batch_size=4,
        precision="float32",
        epoch_images=0,
        out_dir=str(tmp_path / "run"),
    )


@pytest.fixture(autouse=True)
def eager(request, monkeypatch):
    """Spare most trainings the seconds in which TensorFlow compiles the step."""
    if "compiled" not in request.keywords:
        compile_ = keras.Model.compile
        now = {"run_eagerly": True, "jit_compile": False}
        monkeypatch.setattr(
            keras.Model, "compile", lambda self, *args, **more: compile_(self, *args, **more | now)
        )


def without_time(log):
    return log.drop(columns="seconds")


def test_a_run_folder_holds_everything(small, tmp_path):
    log = train.train(small)
    folder = tmp_path / "run"
    saved = pd.read_csv(folder / "log.csv")
    assert saved.epoch.tolist() == log.epoch.tolist() == [1, 2, 3]
    assert {
        "loss",
        "val_loss",
        "val_dice",
        "val_iou",
        "val_precision",
        "val_recall",
        "seconds",
    } <= set(saved)
    config = dataclasses.asdict(small) | {"classes": "foreground"}  # those of the data
    assert json.loads((folder / "config.json").read_text()) == config
    split = pd.read_csv(folder / "split.csv")
    assert set(split.subset) == {"train", "val", "test"} and len(split) == 12
    _, facts = utils.load_model(folder / "model.h5")
    best = run_folder.best_epoch(saved.to_dict("records"))
    assert facts["epoch"] == best
    assert facts["val_dice"] == pytest.approx(saved.val_dice[best - 1])
    assert (folder / "curves.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_best_epoch_is_kept_not_the_last(small, tmp_path, monkeypatch):
    """The model file's Dice, computed again on the validation images, is the best epoch's."""
    monkeypatch.setattr(run_folder, "SMOOTHING", 0.0)
    config = dataclasses.replace(small, epochs=6, learning_rate=0.05)
    log = train.train(config)
    model, facts = utils.load_model(tmp_path / "run" / "model.h5")
    pairs, subsets = read_split(tmp_path / "run" / "split.csv")
    dataset, _ = loading.load_pairs(pairs, Preprocessing(Classes("foreground"), Sampler((32, 32))))
    rows = np.flatnonzero(np.array(subsets) == "val")
    x, y = Batches(dataset, dataset.cover(rows), 4)[0]
    dice = float(np.mean(train.metrics.dice(y, model(x))))
    assert (
        dice
        == pytest.approx(log.val_dice.max(), abs=1e-4)
        == pytest.approx(facts["val_dice"], abs=1e-4)
    )


@pytest.mark.slow
@pytest.mark.compiled
def test_a_few_images_are_learned_by_heart(small):
    """Twelve discs, no trick: if the network, the loss, the pairing or the order were wrong, this
    would not rise.
    """
    log = train.train(dataclasses.replace(small, epochs=40, filters=8, learning_rate=5e-3))
    assert log.val_dice.max() > 0.9
    assert log.loss.iloc[-1] < log.loss.iloc[0] / 3


@pytest.mark.slow
@pytest.mark.compiled
def test_one_seed_gives_one_result(small, tmp_path):
    logs = [train.train(dataclasses.replace(small, out_dir=str(tmp_path / name))) for name in "ab"]
    pd.testing.assert_frame_equal(*map(without_time, logs))


class Crash(keras.callbacks.Callback):
    """Stand in for a power cut after a number of training steps."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise ConnectionAbortedError


@pytest.mark.slow
@pytest.mark.compiled
def test_a_crashed_run_goes_on_as_if_nothing_had_been(small, tmp_path, monkeypatch):
    """Weights, optimizer, learning rate, order and augmentation: the log is that of a run without
    a crash.
    """
    config = dataclasses.replace(small, epochs=5)
    expected = train.train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    fit = keras.Model.fit
    with monkeypatch.context() as patch, pytest.raises(ConnectionAbortedError):
        patch.setattr(
            keras.Model,
            "fit",
            lambda self, *a, callbacks, **k: fit(self, *a, callbacks=[*callbacks, Crash(6)], **k),
        )
        train.train(config)
    assert 0 < len(pd.read_csv(tmp_path / "run" / "log.csv")) < 5
    log = train.train(config)
    pd.testing.assert_frame_equal(without_time(log), without_time(expected), rtol=1e-4)
    assert pd.read_csv(tmp_path / "run" / "log.csv").epoch.tolist() == [1, 2, 3, 4, 5]


def test_a_finished_run_is_not_run_again(small, tmp_path, capsys):
    first = train.train(small)
    stamp = (tmp_path / "run" / "model.h5").stat().st_mtime_ns
    pd.testing.assert_frame_equal(train.train(small), first)
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.h5").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_more_epochs_go_on_with_the_run(small, tmp_path):
    train.train(small)
    log = train.train(dataclasses.replace(small, epochs=5))
    assert log.epoch.tolist() == [1, 2, 3, 4, 5] and not (tmp_path / "run" / "previous1").exists()


class CtrlC(keras.callbacks.Callback):
    """Stand in for a user who presses Ctrl-C in an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if len(self.params_of_run.history) == self.epoch:
            raise KeyboardInterrupt


def test_ctrl_c_loses_no_finished_epoch(small, tmp_path, monkeypatch):
    """Epochs that are finished and not yet written are written then, and the run goes on as if
    nothing had been.
    """
    config = dataclasses.replace(small, epochs=6, val_fraction=0.0)  # no epoch counts as better
    expected = train.train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    fit = keras.Model.fit

    def fit_until_ctrl_c(self, *args, callbacks, **options):
        stop = CtrlC(4)
        stop.params_of_run = callbacks[0]
        return fit(self, *args, callbacks=[*callbacks, stop], **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(keras.Model, "fit", fit_until_ctrl_c)
        train.train(config)
    assert pd.read_csv(tmp_path / "run" / "log.csv").epoch.tolist() == [1, 2, 3, 4]
    log = train.train(config)
    pd.testing.assert_frame_equal(without_time(log), without_time(expected), rtol=1e-4)


@pytest.mark.slow
def test_ctrl_c_while_an_epoch_is_written(small, tmp_path, monkeypatch):
    """The weights are those of the last epoch, not of an earlier one that was kept in memory."""
    config = dataclasses.replace(small, val_fraction=0.0)
    expected = train.train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    save, interrupted = checkpoint.Checkpoint.save, []

    def save_after_ctrl_c(self):
        if self.epoch == 3 and not interrupted:
            interrupted.append(self.snapshot[0])
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "CHECKPOINT_INTERVAL_S", 1e9)
        patch.setattr(checkpoint.Checkpoint, "save", save_after_ctrl_c)
        train.train(config)
    assert interrupted == [2]  # an earlier epoch was kept
    log = train.train(config)
    pd.testing.assert_frame_equal(without_time(log), without_time(expected), rtol=1e-4)
    models = [utils.load_model(tmp_path / name / "model.h5")[0] for name in ("whole", "run")]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_ctrl_c_in_a_terminal(small, tmp_path, backend):
    config = dataclasses.replace(small, epochs=500, val_fraction=0.0)
    command = [sys.executable, "-u", ROOT / "train.py", *flags(config)]
    environment = os.environ | {"KERAS_BACKEND": backend}

    def run_until(text):
        """Press Ctrl-C when the text is printed; return all that was printed."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen(command, env=environment, **pipes)
        said = ""
        for line in process.stdout:
            said += line
            if text in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        return said

    said = run_until("epoch   4/500")
    done = pd.read_csv(tmp_path / "run" / "log.csv").epoch.tolist()
    assert len(done) >= 4 and f"{len(done)} of 500 epochs are saved" in said
    assert f"epoch {len(done) + 1} of 500" in run_until(f"epoch {len(done) + 2:3}/500")


@pytest.mark.slow
def test_a_changed_config_starts_anew_and_keeps_the_old_model(small, tmp_path, capsys):
    train.train(small)
    old = (tmp_path / "run" / "model.h5").read_bytes()
    log = train.train(dataclasses.replace(small, epochs=2))
    assert "epochs changed" in capsys.readouterr().out and log.epoch.tolist() == [1, 2]
    assert (tmp_path / "run" / "previous1" / "model.h5").read_bytes() == old


def test_a_changed_source_starts_anew_and_names_the_file(small, tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(small, epochs=1)
    train.train(config)
    hashes = run_identity.source_hashes()
    changed = hashes | {"model.py": "edited"}
    monkeypatch.setattr(run_identity, "source_hashes", lambda **_: changed)
    train.train(dataclasses.replace(config, epochs=2))  # more epochs do not hide it
    out = capsys.readouterr().out
    assert "model.py changed; a new run starts, the old one is kept" in out
    assert (tmp_path / "run" / "previous1" / "model.h5").is_file()
    train.train(dataclasses.replace(config, epochs=2))
    assert "holds this run, finished" in capsys.readouterr().out


@pytest.mark.slow
def test_changed_data_start_anew_and_moved_data_do_not(small, tmp_path, capsys):
    config = dataclasses.replace(small, epochs=1)
    train.train(config)
    moved = Path(small.data_dir).rename(tmp_path / "elsewhere")
    config = dataclasses.replace(config, data_dir=str(moved))
    train.train(config)
    assert "holds this run, finished" in capsys.readouterr().out
    train.train(dataclasses.replace(config, epochs=2))
    out = capsys.readouterr().out
    assert "epoch 2 of 2" in out and not (tmp_path / "run" / "previous1").exists()
    assert all(row.pair.image.parent == moved / "images" for row in rows_of(tmp_path / "run"))
    shutil.copy(moved / "images" / "disc03.png", moved / "images" / "disc99.png")
    shutil.copy(moved / "masks" / "disc03_mask.png", moved / "masks" / "disc99_mask.png")
    flipped = formats.read_image(moved / "images" / "disc99.png")[::-1, :, 0]
    pictures.write_picture(moved / "images" / "disc99.png", np.ascontiguousarray(flipped))
    train.train(dataclasses.replace(config, epochs=2))
    out = capsys.readouterr().out
    assert "disc99.png (new) changed; a new run starts, the old one is kept" in out
    assert (tmp_path / "run" / "previous1" / "split.csv").is_file()


def rows_of(folder):
    return read_rows(folder / "split.csv")


@pytest.mark.slow
def test_rectangular_networks_train_and_predict(small, discs, tmp_path):
    config = dataclasses.replace(small, image_size="32,48", epochs=1)
    train.train(config)
    model, metadata = utils.load_model(tmp_path / "run" / "model.h5")
    assert model.input_shape == (None, 32, 48, 1) and metadata["image_size"] == [32, 48]
    pairs, _ = data.find_pairs(discs)
    table, problems = predict.score_pairs([(model, metadata)], pairs[:2])
    assert len(table) == 2 and problems == []


@pytest.mark.slow
def test_a_run_of_the_earlier_optimizer_is_not_gone_on_with(small, tmp_path, capsys):
    train.train(small)
    with h5py.File(tmp_path / "run" / "state.weights.h5", "r+") as file:
        progress = json.loads(file.attrs["progress"])
        del progress["config"]["optimizer"]  # as AdamW's runs have it
        file.attrs["progress"] = json.dumps(progress)
    train.train(small)
    assert (
        "optimizer changed" in capsys.readouterr().out and (tmp_path / "run" / "previous1").is_dir()
    )


def test_a_typo_leaves_the_finished_run_where_it_is(small, tmp_path):
    train.train(small)
    with pytest.raises(UserError, match="is not a folder"):
        train.train(dataclasses.replace(small, data_dir=small.data_dir + "typo"))
    assert (tmp_path / "run" / "model.h5").is_file()
    assert not (tmp_path / "run" / "previous1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", [["model.h5", "log.csv", "curves.png"], ["log.csv", "curves.png"], ["curves.png"]]
)
def test_a_kill_between_the_last_epochs_files(small, tmp_path, lost):
    """The state is written first; the same command makes from it what was not written any more."""
    config = dataclasses.replace(small, epochs=1)
    expected = train.train(config)
    for name in lost:
        (tmp_path / "run" / name).unlink()
    pd.testing.assert_frame_equal(train.train(config), expected)
    assert (
        len(pd.read_csv(tmp_path / "run" / "log.csv")) == 1
        and (tmp_path / "run" / "curves.png").is_file()
    )
    assert utils.load_model(tmp_path / "run" / "model.h5")[1]["val_dice"] == pytest.approx(
        expected.val_dice.max()
    )


def test_a_damaged_state_is_named(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.weights.h5").write_bytes(b"half")
    with pytest.raises(UserError, match="state.weights.h5 is damaged"):
        train.train(small)


def test_the_split_of_a_run_is_reread(small, tmp_path):
    """An image added between crash and resume joins no subset; one that is gone is named."""
    train.train(small)
    pairs, _ = data.find_pairs(small.data_dir)
    subsets = run_folder.resume(tmp_path / "run", small, [*pairs, Pair(tmp_path / "new.png", ())])
    assert [*subsets[:-1], "none"] == read_split(tmp_path / "run" / "split.csv")[1]
    assert subsets[-1] == ""
    with pytest.raises(UserError, match="disc00.png, which is gone"):
        run_folder.resume(tmp_path / "run", small, pairs[1:])


@pytest.mark.slow
def test_kill_minus_nine_at_random_moments(small, tmp_path):
    """Each time the same command goes on, the model loads, and in the end every epoch stands once.
    Three kills in CI.
    """
    config = dataclasses.replace(small, epochs=30)
    command = [sys.executable, ROOT / "train.py", *flags(config)]
    model, log = tmp_path / "run" / "model.h5", tmp_path / "run" / "log.csv"
    rng = random.Random(0)
    epochs = 0
    for _ in range(3 if os.environ.get("CI") else 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while time.time() < deadline and (not log.exists() or len(pd.read_csv(log)) <= epochs):
            assert process.poll() is None or len(pd.read_csv(log)) == 30, (
                "ended by itself, unfinished"
            )
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        utils.load_model(model)
        epochs = len(pd.read_csv(log))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pd.read_csv(log).epoch.tolist() == list(range(1, 31))
    utils.load_model(model)


def test_folds_are_trained_scored_and_summarised(small, tmp_path, capsys):
    config = dataclasses.replace(small, folds=3, epochs=1)
    summary = train.train(config)
    folder = tmp_path / "run"
    table = pd.read_csv(folder / "metrics.csv")
    assert len(table) == 12 and table.image.nunique() == 12 and set(table.fold) == {0, 1, 2}
    assert summary.loc["dice", "mean"] == pytest.approx(table.dice.mean())
    assert pd.read_csv(folder / "summary.csv").metric.tolist()[:3] == ["dice", "iou", "precision"]
    assert all(
        (folder / f"fold{i}" / name).is_file()
        for i in range(3)
        for name in ("model.h5", "split.csv", "metrics.csv")
    )
    train.train(dataclasses.replace(config, fold=1, out_dir=str(tmp_path / "one")))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["fold1"]
    assert "12 test images in 3 fold(s)" in capsys.readouterr().out


def test_the_environment_names_the_cache(small, tmp_path, monkeypatch):
    train.load_data(small)
    assert any((tmp_path / "cache").iterdir())
    monkeypatch.setenv("UNET_CACHE", "")
    monkeypatch.chdir(tmp_path / "discs")
    train.load_data(small)
    assert not (tmp_path / "discs" / "files").exists()
    monkeypatch.delenv("UNET_CACHE")
    train.load_data(small)
    assert (tmp_path / "discs" / "files" / "cache").is_dir()


@pytest.mark.slow
def test_two_classes(phantoms, small):
    config = dataclasses.replace(
        small, data_dir=str(phantoms), classes="left lung,right lung", epochs=1
    )
    train.train(config)
    model, facts = utils.load_model(f"{config.out_dir}/model.h5")
    assert model.output.shape[-1] == 3 and facts["classes"] == ["left lung", "right lung"]


def test_bfloat16_trains(small):
    log = train.train(dataclasses.replace(small, precision="bfloat16", epochs=1))
    assert np.isfinite(log.loss).all()
    keras.config.set_dtype_policy("float32")


def test_nan_stops_with_advice(small, monkeypatch):
    monkeypatch.setitem(
        train.metrics.LOSSES, "dice", lambda y_true, y_pred: y_pred[:, 0, 0, 0] * float("nan")
    )
    with pytest.raises(
        UserError, match=r"the loss became nan in epoch 1, step 1; try --learning-rate 0.0025 or"
    ):
        train.train(dataclasses.replace(small, loss="dice"))


@pytest.mark.slow
@pytest.mark.compiled
def test_nan_stops_where_the_loss_is_read_beside_the_steps(discs, tmp_path, script, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    flags = "--image-size 32 --filters 2 --depth 2 --epochs 2 --learning-rate 1e30"
    done = script(tmp_path, "train.py", "--data-dir", discs, *flags.split())
    assert done.returncode == 2 and "the loss became nan in epoch 1" in done.stderr, done.stderr
    assert not (tmp_path / "files" / "model.h5").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, r"image size 30 is not a multiple of 4 \(2\*\*depth\); take 32"),
        ({"loss": "hinge"}, "loss is 'hinge'; expected one of bce_dice, dice, focal, tversky"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"folds": 1}, "folds is 1; expected 0 or at least 2"),
        ({"fold": 5, "folds": 5}, "fold is 5; expected -1, or 0 to 4"),
        ({"fold": 2}, "fold is 2; expected -1; one of several folds needs --folds"),
        ({"architecture": "my_net.py"}, "expected my_net.py:FUNCTION"),
        ({"dimensions": "3", "patch_size": "8,16,16"}, "dimensions is 3; expected 2: the images"),
        ({"dimensions": "2.5"}, "dimensions is 2.5; expected 2: the images have one slice each"),
        ({"patch_size": "16", "spacing": "1"}, r"\.png: it does not say how large its pixels are"),
        ({"channels": -1}, "channels is -1; expected 0"),
        ({"test_fraction": 0.6}, "test_fraction is 0.6; expected 0 to 0.5"),
        ({"architecture": "vnet"}, "architecture is 'vnet'.*xpected one of unet, residual"),
        ({"augmentation": "wild"}, "augmentation is 'wild'.*xpected one of none, mild, strong"),
        (
            {"mirror": True, "classes": "left lung"},
            "mirror is True; expected false, because a class has one side only",
        ),
        ({"data_dir": "/nowhere"}, "/nowhere is not a folder"),
        ({"classes": "a,a"}, "expected 1 to 255 different names"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"seed": -1}, "seed is -1; expected 0 to"),
    ],
)
def test_bad_values_are_named(small, change, message):
    with pytest.raises(UserError, match=message):
        train.train(dataclasses.replace(small, **change))


def test_the_command_line(small, tmp_path, script):
    done = script(tmp_path, "train.py", *flags(dataclasses.replace(small, epochs=1)))
    assert done.returncode == 0, done.stderr
    assert "epoch   1/1" in done.stdout and "best epoch 1" in done.stdout
    wrong = script(tmp_path, "train.py", "--loss", "hinge")
    assert (
        wrong.returncode == 2
        and "Traceback" not in wrong.stderr
        and "error: loss is 'hinge'" in wrong.stderr
    )


def test_help_and_unknown_flags(monkeypatch, capsys):
    for argument, code in (("--help", 0), ("--epoch-count", 2)):
        monkeypatch.setattr(sys, "argv", ["train.py", argument])
        with pytest.raises(SystemExit) as caught:
            utils.run_script(train.train, train.Config)
        assert caught.value.code == code
    said = capsys.readouterr()
    assert "--learning-rate" in said.out and "cosine" in said.out and "--epoch-count" in said.err


def test_an_old_flag_still_works(monkeypatch):
    for given in (["--normalisation", "group"], ["--normalisation=group"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *given])
        assert utils.parse_flags(train.Config).normalization == "group"


def test_a_missing_package_is_named(capsys):
    utils.require("keras", "requirements.txt")
    with pytest.raises(SystemExit) as caught:
        utils.require("nosuch", "requirements-x.txt")
    assert caught.value.code == 2 and "pip install -r requirements-x.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_no_data_dir_means_phantoms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "PHANTOMS", 12)
    log = train.train(
        train.Config(image_size=32, filters=2, depth=2, epochs=1, precision="float32")
    )
    assert len(log) == 1 and (tmp_path / "files" / "model.h5").is_file()
    assert pd.read_csv(tmp_path / "files" / "split.csv").image.map(os.path.exists).all()


# ------------------------------------------------------------------------------------------
# phases, other ways to start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "epochs_done"),
    [
        ({"extra_dir": "phantoms"}, 5),
        ({"architecture": "mobilenetv3", "image_size": 64, "val_fraction": 0.0}, 3),
    ],
)
def test_a_run_in_several_parts_is_a_run_in_one(
    small, phantoms, tmp_path, monkeypatch, change, epochs_done
):
    """Whatever the recipe, a crash between or in the phases changes nothing."""
    if "extra_dir" in change:
        change = {"extra_dir": str(phantoms)}
    config = dataclasses.replace(small, epochs=4, **change)
    expected = train.train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    fit = keras.Model.fit
    crash = Crash(2 * epochs_done)  # an epoch has two steps, three, or six
    with monkeypatch.context() as patch, pytest.raises(ConnectionAbortedError):
        patch.setattr(
            keras.Model,
            "fit",
            lambda self, *a, callbacks, **k: fit(self, *a, callbacks=[*callbacks, crash], **k),
        )
        train.train(config)
    assert 0 < len(pd.read_csv(tmp_path / "run" / "log.csv")) < 4
    log = train.train(config)
    pd.testing.assert_frame_equal(without_time(log), without_time(expected), rtol=1e-4)
    whole, again = (utils.load_model(tmp_path / name / "model.h5") for name in ("whole", "run"))
    for one, other in zip(whole[0].get_weights(), again[0].get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert whole[1]["epoch"] == again[1]["epoch"] and whole[1].get("clean") == again[1].get("clean")


@pytest.mark.slow
def test_without_validation_images_the_last_epoch_is_kept(small, tmp_path):
    log = train.train(dataclasses.replace(small, val_fraction=0.0, test_fraction=0.0))
    assert "val_dice" not in log
    _, facts = utils.load_model(tmp_path / "run" / "model.h5")
    assert facts["epoch"] == 3 and facts["val_dice"] is None
    assert set(pd.read_csv(tmp_path / "run" / "split.csv").subset) == {"train"}
    with pytest.raises(UserError, match="no image is test in"):
        predict.main(predict.Config(model=str(tmp_path / "run" / "model.h5")))


@pytest.mark.slow
def test_an_extra_data_set_trains_and_nothing_else(small, phantoms, tmp_path):
    train.train(dataclasses.replace(small, extra_dir=str(phantoms), epochs=1))
    pairs, subsets = read_split(tmp_path / "run" / "split.csv")
    assert {
        subset
        for pair, subset in zip(pairs, subsets, strict=True)
        if phantoms in pair.image.parents
    } == {"train"}
    assert len(pairs) == 12 + 16 and {"val", "test"} < set(subsets)
    with pytest.raises(UserError, match=r"12 problem(?s:.*)disc00.png: the same image as"):
        train.train(
            dataclasses.replace(small, extra_dir=small.data_dir, out_dir=str(tmp_path / "other"))
        )


@pytest.mark.slow
def test_training_starts_from_another_model(small, tmp_path, capsys):
    train.train(small)
    start = str(tmp_path / "run" / "model.h5")
    config = dataclasses.replace(
        small,
        epochs=2,
        learning_rate=1e-7,
        init_weights=start,
        out_dir=str(tmp_path / "next"),
    )
    log = train.train(config)
    assert "layers loaded" in capsys.readouterr().out
    assert log.val_dice.iloc[0] == pytest.approx(utils.load_metadata(start)["val_dice"], abs=0.05)


@pytest.mark.slow
def test_masks_are_cleaned_unless_that_harms(small, tmp_path, monkeypatch):
    train.train(small)
    path = tmp_path / "run" / "model.h5"
    assert utils.load_model(path)[1]["clean"] == [1]  # a disc is one part
    monkeypatch.setattr(postprocess, "clean_mask", lambda ids, parts: np.zeros_like(ids))
    train.train(dataclasses.replace(small, epochs=16))
    assert "clean" not in utils.load_model(path)[1]


def test_a_run_that_would_move_its_own_start_is_refused(small, tmp_path):
    train.train(dataclasses.replace(small, epochs=1))
    with pytest.raises(UserError, match="is in the run folder; name another --out-dir"):
        train.train(dataclasses.replace(small, init_weights=str(tmp_path / "run" / "model.h5")))


@pytest.mark.slow
def test_mirroring_is_switched_on_without_training_again(small, tmp_path):
    log = train.train(small)
    pd.testing.assert_frame_equal(train.train(dataclasses.replace(small, mirror=True)), log)
    assert utils.load_metadata(tmp_path / "run" / "model.h5")["mirror"] is True


@pytest.mark.slow
def test_mirroring_is_switched_on_when_a_run_goes_on(small, tmp_path):
    """The model that is best already keeps its weights and learns of the mirror."""
    path = tmp_path / "run" / "model.h5"
    train.train(small)
    (tmp_path / "run" / "curves.png").unlink()  # the run is not finished then
    train.train(dataclasses.replace(small, mirror=True))
    assert utils.load_metadata(path)["mirror"] is True
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mirror"] is True


@pytest.mark.slow
def test_a_missing_best_model_is_named(small, tmp_path):
    log = train.train(dataclasses.replace(small, epochs=4))
    state = tmp_path / "run" / "state.weights.h5"
    with h5py.File(state, "r+") as file:
        progress = json.loads(file.attrs["progress"])
        progress["history"][0]["val_dice"] = 1.0  # as if the first epoch had been the best
        file.attrs["progress"] = json.dumps(progress)
    (tmp_path / "run" / "model.h5").unlink()
    with pytest.raises(UserError, match="is gone; put it back, or remove"):
        train.train(dataclasses.replace(small, epochs=4))
    assert len(log) == 4


@pytest.mark.slow
def test_float16_trains(small):
    log = train.train(dataclasses.replace(small, precision="float16"))
    keras.config.set_dtype_policy("float32")
    assert np.isfinite(log.val_loss).all() and len(log) == 3


def test_folds_of_an_earlier_run_of_more_folds_are_put_aside(tmp_path):
    for number in range(3):
        (tmp_path / f"fold{number}").mkdir()
        (tmp_path / f"fold{number}" / "model.h5").write_bytes(b"x")
    cross_validation._put_aside(tmp_path, 2)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("model.h5")]
    assert sorted(found) == ["fold0/model.h5", "fold1/model.h5", "fold2/previous1/model.h5"]
