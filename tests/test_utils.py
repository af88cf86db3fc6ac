import errno
import json
import os
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
from conftest import ROOT

import utils
from model import build_unet
from utils import UserError


def test_a_model_file_describes_itself_and_loads_without_our_code(tmp_path):
    model = build_unet((32, 32, 1), filters=2, depth=2)
    utils.save_model(
        model, tmp_path / "model.h5", utils.make_metadata(["lung"], (32, 32), 1, val_dice=0.5)
    )
    loaded = keras.models.load_model(tmp_path / "model.h5", compile=False)
    x = np.random.default_rng(0).random((2, 32, 32, 1), np.float32)
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)
    _, facts = utils.load_model(tmp_path / "model.h5")
    assert (
        facts["image_size"] == [32, 32]
        and facts["classes"] == ["lung"]
        and facts["val_dice"] == 0.5
    )
    assert facts["versions"]["keras"] == keras.__version__ and 0 < facts["threshold"] < 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_saved_as_float32(tmp_path, precision):
    assert utils.set_precision(precision) == precision
    try:
        model = build_unet((16, 16, 1), filters=2, depth=1)
    finally:
        utils.set_precision("float32")
    utils.save_model(model, tmp_path / "model.h5", utils.make_metadata(["x"], (16, 16), 1))
    loaded, _ = utils.load_model(tmp_path / "model.h5")
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"}
    x = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    np.testing.assert_allclose(loaded(x), model(x), atol=0.03)


def test_a_deep_network_fits_the_files_attributes(tmp_path):
    """HDF5 keeps small attributes in a 64 KiB header; the architecture of a deep network is
    larger.
    """
    utils.save_model(
        build_unet((64, 64, 1), filters=1, depth=6),
        tmp_path / "model.h5",
        utils.make_metadata(["x"], (64, 64), 1),
    )
    with h5py.File(tmp_path / "model.h5") as file:
        assert len(file.attrs["model_config"]) > 65536
    assert utils.load_model(tmp_path / "model.h5")[0].count_params() > 0


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model at .* run `python train.py` first"):
        utils.load_model(tmp_path / "model.h5")
    (tmp_path / "model.h5").write_text("text")
    with pytest.raises(UserError, match="is not a model written by train.py"):
        utils.load_model(tmp_path / "model.h5")
    keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]).save(tmp_path / "other.h5")
    with pytest.raises(UserError, match="is not a model written by train.py"):
        utils.load_model(tmp_path / "other.h5")


def test_a_model_of_another_preparation_is_refused(tmp_path):
    model = build_unet((16, 16, 1), filters=2, depth=1)
    facts = utils.make_metadata(["x"], (16, 16), 1) | {"preparation": "divide by 255"}
    utils.save_model(model, tmp_path / "model.h5", facts)
    with pytest.raises(UserError, match="expects images prepared by 'divide by 255'"):
        utils.load_model(tmp_path / "model.h5")


def test_facts_are_json(tmp_path):
    json.dumps(utils.make_metadata(["a"], (1, 2), 3, epoch=4))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError("write failed: No space left on device")]
)
def test_a_full_disk_is_told(capsys, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        utils.run_cli(fail)
    assert end.value.code == 2 and "the disk is full" in capsys.readouterr().err


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision is 'int3'; expected auto, float32"):
        utils.set_precision("int3")
    assert utils.set_precision("auto") in utils.PRECISIONS
    utils.set_precision("float32")


def run_python(code, given, without=()):
    """Run a line of Python in a new process with more or fewer variables; return what it says."""
    environment = {k: v for k, v in os.environ.items() if k not in without} | given
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, "0")])
def test_tensorflow_takes_onednns_kernels_unless_told_otherwise(given, expected):
    code = "import utils, os; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    assert run_python(code, given, without=["TF_ENABLE_ONEDNN_OPTS"]) == expected


def test_a_hidden_package_is_missing_for_a_while():
    with pytest.raises(ZeroDivisionError), utils.hidden(["this", "json"]):
        import json as known

        assert known is json  # loaded before
        with pytest.raises(ImportError):
            import this  # noqa: F401
        1 / 0  # noqa: B018
    assert "this" not in sys.modules and sys.modules["json"] is json


@pytest.mark.parametrize(
    ("backend", "left_out"), [("tensorflow", {"jax"}), ("jax", {"tensorflow", "torch"})]
)
def test_keras_starts_without_what_it_does_not_need(backend, left_out):
    pytest.importorskip("jax")
    code = (
        "import utils, sys; utils.load_keras(); utils.set_seed(3); print(*sys.modules);"
        "import matplotlib, pandas, sklearn, keras, numpy; print(numpy.random.rand() > 0)"
    )
    loaded, later = run_python(code, {"KERAS_BACKEND": backend}).splitlines()
    assert {backend, "keras"} <= set(loaded.split()) and later == "True"
    assert not {"matplotlib", "pandas", "sklearn", *left_out} & set(loaded.split())


@pytest.mark.slow
def test_jax_keeps_its_machine_code_beside_the_images(tmp_path):
    code = (
        "import utils; utils.load_keras(); import keras;"
        "keras.random.truncated_normal((3, 5), seed=1)"
    )
    pytest.importorskip("jax")
    ours = {"KERAS_BACKEND": "jax", "UNET_CACHE": str(tmp_path)}
    jaxs = ["JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]
    run_python(code, ours, without=jaxs)
    assert [path.name[:4] for path in tmp_path.iterdir()] == ["jax-"]
    assert list(tmp_path.rglob("*truncated_normal*"))
    run_python(code, ours | {jaxs[0]: str(tmp_path / "mine")})
    assert list((tmp_path / "mine").rglob("*truncated_normal*"))
