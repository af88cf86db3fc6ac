"""`train.py --from-report`: what `data.py check` proposes is the default of the other flags."""

import json
import sys

import pytest

import train
import utils
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


def test_help_names_it(script, tmp_path):
    assert "--from-report PATH" in script(tmp_path, "train.py", "--help").stdout
    assert "--from-report" not in script(tmp_path, "predict.py", "--help").stdout
