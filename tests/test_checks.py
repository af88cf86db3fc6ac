"""What is refused before Keras is loaded, and what is proposed instead of a misspelt name."""

import pytest
from conftest import ROOT

import train
import utils
from training import checks
from utils import UserError


def test_names_in_the_source_are_those_of_the_modules():
    import metrics
    import model

    backbones = checks.keys_in_source(ROOT / "model.py", "BACKBONES")
    assert backbones == list(model.BACKBONES)
    parts = {"BACKBONES": backbones}
    found = checks.keys_in_source(ROOT / "model.py", "ARCHITECTURES", parts)
    assert found == list(model.ARCHITECTURES)
    assert checks.keys_in_source(ROOT / "metrics.py", "LOSSES") == list(metrics.LOSSES)


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ('LOSSES = {"a": 1, "b": 2}', ["a", "b"]),
        ('LOSSES: dict[str, int] = {"a": 1}', ["a"]),
        # Names that only running the file would tell: nothing is refused early.
        ("LOSSES = make()", []),
        ('LOSSES = {"a": 1, **others}', []),
        ('LOSSES = {"a": 1}\nLOSSES |= {"b": 2}', []),
        ("", []),
    ],
)
def test_a_dictionary_of_another_form_refuses_nothing(tmp_path, source, keys):
    (tmp_path / "metrics.py").write_text(source)
    assert checks.keys_in_source(tmp_path / "metrics.py", "LOSSES") == keys
    if not keys:
        checks.check_name("loss", "anything", keys)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(UserError, match="loss is 'bce-dise'; did you mean bce_dice. Expected one"):
        checks.check_name("loss", "bce-dise", ["bce_dice", "dice"])
    with pytest.raises(UserError, match="loss is 'hinge'; expected one of bce_dice, dice"):
        checks.check_name("loss", "hinge", ["bce_dice", "dice"])


def test_a_misspelt_path_gets_the_nearest_that_exists(tmp_path):
    (tmp_path / "Heart scans" / "images").mkdir(parents=True)
    (tmp_path / "model.h5").touch()
    near = utils.nearest_path
    assert near(tmp_path / "heart-scans") == str(tmp_path / "Heart scans")
    assert near(tmp_path / "heart-scans" / "images") == str(tmp_path / "Heart scans" / "images")
    assert near(tmp_path / "heart-scans" / "masks") == ""
    assert near(tmp_path / "mdoel.h5") == str(tmp_path / "model.h5")
    assert near(tmp_path / "xyz") == "" and near(tmp_path) == ""
    with pytest.raises(
        UserError, match="no model at .*mdoel.h5; did you mean .*model.h5. Else run"
    ):
        utils.load_metadata(tmp_path / "mdoel.h5")
    with pytest.raises(UserError, match="no model at .*; did you mean .*model.h5. Else run"):
        utils.load_metadata(tmp_path)


def test_a_mistyped_command_gets_the_nearest(script, tmp_path):
    for name, said in (("chek", "did you mean check? Expected"), ("x", "expected one of check, d")):
        done = script(tmp_path, "data.py", name, "folder")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: unknown command {name}; {said}")
    done = script(tmp_path, "data.py")
    assert done.returncode == 2 and "check" in done.stdout + done.stderr


def test_verbose_is_named_by_help(script, tmp_path):
    for name in ("train.py", "predict.py", "model.py", "export.py"):
        printed = script(tmp_path, name, "--help").stdout
        assert printed.count("--verbose") == 1
        assert printed.count("--distributed") == (name == "train.py")


def test_words_that_are_no_settings_are_taken_from_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "3", "--distributed"])
    assert utils.take_word("--distributed") and not utils.take_word("--distributed")
    assert utils.parse_flags(train.Config) == train.Config(epochs=3)


def test_sizes_are_checked_for_the_depth():
    utils.check_size((64, 128), 4)
    utils.check_size((5, 64, 128), 4)  # slices are halved as often as they can be
    with pytest.raises(UserError, match="image size 100 is not a multiple of 16"):
        utils.check_size((64, 100), 4)
    with pytest.raises(UserError, match="patch size 8 is not a multiple of 16 .*; take 16"):
        utils.check_size((16, 8, 32), 4, name="patch size")
