"""`train.py --from-report`: what `data.py check` proposes is the default of the other flags."""

import json
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest
from test_train import eager  # noqa: F401 (a fixture)

import data
import train
import utils
from imaging import pictures
from utils import UserError


def parse(monkeypatch, *flags: str) -> train.Config:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    return utils.parse_flags(train.Config, from_report=True)


@pytest.fixture
def report(tmp_path):
    fields = {"data_dir": "scans", "image_size": 192, "learning_rate": 1, "overlap": True}
    (tmp_path / "report.json").write_text(json.dumps(fields))
    return str(tmp_path / "report.json")


def test_a_report_gives_the_defaults_and_flags_win(monkeypatch, report):
    config = parse(monkeypatch, "--from-report", report, "--image-size", "64", "--no-overlap")
    assert config.data_dir == "scans" and config.image_size == 64 and config.learning_rate == 1
    assert not config.overlap and config.epochs == train.Config.epochs
    config = parse(monkeypatch, "--seed", "3", f"--from-report={report}")
    assert config.image_size == 192 and config.overlap and config.seed == 3
    assert parse(monkeypatch) == train.Config()


def test_the_settings_of_a_run_can_be_taken_too(monkeypatch, tmp_path):
    import dataclasses

    config = train.Config(loss="dice", image_size="96,128")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert parse(monkeypatch, "--from-report", str(tmp_path / "config.json")) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged, or no report"),
        (b"\xff\xfe\x00", "is damaged, or no report"),
        ("[1]", "holds no settings"),
        ('{"image_sise": 3}', "unknown setting image_sise; did you mean image_size"),
        ('{"image_size": [3]}', r"image_size is \[3\]; expected int or str"),
        ('{"batch_size": true}', "batch_size is True; expected int"),
        ('{"epochs": 1.5}', "epochs is 1.5; expected int"),
        ('{"loss": null}', "loss is None; expected str"),
    ],
)
def test_a_report_that_cannot_be_used_is_refused(monkeypatch, tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        parse(monkeypatch, "--from-report", str(path))


def test_a_report_that_is_not_there_is_refused_before_keras(script, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    for flags, said in (
        (["--from-report", "repart.json"], "no report at repart.json; did you mean report.json"),
        (["--from-report"], "--from-report needs a file"),
        (["--from-report", "--epochs", "3"], "--from-report needs a file"),
        (["--from-report="], "no report at"),
    ):
        done = script(tmp_path, "train.py", *flags)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
        assert "loading Keras" not in done.stdout


def write_volumes(folder, shape, spacing, channels):
    """Ten volumes with a bright box, and its masks."""
    for i in range(10):
        mask, rng = np.zeros(shape, np.uint8), np.random.default_rng(i)
        x, y, z = rng.integers(2, np.array(shape) // 2)
        mask[x : x + shape[0] // 3, y : y + shape[1] // 3, z : z + shape[2] // 3] = 1
        image = rng.normal(100, 10, (*shape, channels)) + 80 * mask[..., None]
        image = image.astype(np.float32)[..., 0 if channels == 1 else slice(None)]
        for kind, voxels in (("images", image), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            volume = nibabel.Nifti1Image(voxels, np.diag((*spacing, 1.0)))
            nibabel.save(volume, folder / kind / f"{i}.nii.gz")


def write_specks(folder):
    """Eight images of 600x600 with small squares."""
    for i in range(8):
        mask, rng = np.zeros((600, 600), np.uint8), np.random.default_rng(i)
        for y, x in rng.integers(10, 580, (12, 2)):
            mask[y : y + 6, x : x + 6] = 255
        image = np.clip(rng.normal(80, 10, mask.shape) + mask / 3, 0, 255)
        pictures.write_picture(folder / "images" / f"{i}.png", np.uint8(image))
        pictures.write_picture(folder / "masks" / f"{i}.png", mask)


PROPOSALS = {
    "patches": (write_specks, {"patch_size": "128"}),
    "2.5-D, two channels": (
        lambda folder: write_volumes(folder, (40, 44, 8), (1, 1, 5), 2),
        {"dimensions": "2.5", "channels": 2},
    ),
    "3-D, two channels": (
        lambda folder: write_volumes(folder, (32, 40, 24), (1, 1, 1.2), 2),
        {"dimensions": "3", "channels": 2, "depth": 3},
    ),
    "3-D": (
        lambda folder: write_volumes(folder, (32, 40, 24), (1, 1, 1.2), 1),
        {"dimensions": "3", "channels": 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROPOSALS)
def test_what_check_proposes_can_be_trained(monkeypatch, tmp_path, kind):
    write, expected = PROPOSALS[kind]
    write(tmp_path / "set")
    data.check(tmp_path / "set", output=tmp_path / "check")
    less = ["--epochs", "1", "--filters", "2", "--epoch-images", "8", "--folds", "2"]
    report = str(tmp_path / "check" / "report.json")
    config = parse(monkeypatch, "--from-report", report, "--out-dir", str(tmp_path / "run"), *less)
    assert expected.items() <= vars(config).items()
    train.train(config)
    count = len(list((tmp_path / "set" / "images").iterdir()))
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == count


def test_help_names_it(script, tmp_path):
    assert "--from-report PATH" in script(tmp_path, "train.py", "--help").stdout
    assert "--from-report" not in script(tmp_path, "predict.py", "--help").stdout
