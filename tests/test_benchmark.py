"""The benchmark's arithmetic; what it measures is not tested, as machines differ."""

import os
from pathlib import Path

import keras
import pandas as pd
import pytest
from conftest import ROOT

import utils
from benchmarks import figures, gpu, scripts, timing
from benchmarks.accuracy import __main__ as accuracy_main
from benchmarks.speed import __main__ as speed_main
from benchmarks.speed.training import (
    PREDICTION,
    PRODUCT,
    flops,
    library_of,
    memory_rows,
    operation_row,
    rate_rows,
)
from benchmarks.table import TABLE, make_row, write_rows
from benchmarks.timing import isolated_processes, run_interleaved, steps_per_second
from inference.models import BUNDLED_MODEL
from utils import UserError


def test_a_row_has_median_range_and_ratio():
    row = make_row("x", "s", [3.0, 1.0, 2.0], "y", [4.0, 4.0])
    assert (row["median"], row["low"], row["high"], row["repeats"]) == (2, 1, 3, 3)
    assert row["ratio"] == 0.5
    assert pd.isna(make_row("x", "s", [1.0])["ratio"])


def test_calls_alternate_and_the_first_round_warms_up(monkeypatch):
    monkeypatch.setattr(timing, "REST_S", 0)
    made = []

    def call_a():
        made.append("a")
        return len(made)

    def call_b():
        made.append("b")
        return len(made)

    found = run_interleaved({"a": call_a, "b": call_b}, 2)
    assert made == list("ababab") and found == {"a": [3, 5], "b": [4, 6]}


def test_each_call_has_a_process_of_its_own():
    with isolated_processes({"a": (os.getpid,), "b": (os.getpid,)}) as calls:
        a, b = calls["a"](), calls["b"]()
        assert len({a, b, os.getpid()}) == 3 and calls["a"]() == a


def test_the_calls_of_a_library_share_its_process():
    calls = {"Keras": (os.getpid,), "Keras, prediction": (os.getpid,), "PyTorch": (os.getpid,)}
    with isolated_processes(calls, library_of) as isolated:
        keras_pid, again, torch_pid = (call() for call in isolated.values())
    assert keras_pid == again != torch_pid


def test_memory_is_told_where_it_is_known():
    found = {"Keras": [1.0], "Keras, memory of the GPU": [2.0], "PyTorch, memory of the GPU": [0.0]}
    rows = memory_rows("step", found)
    assert [(row["figure"], row["median"]) for row in rows] == [
        ("step: Keras, memory of the GPU", 2.0)
    ]


def test_steps_are_counted_after_two_that_warm_up():
    made = []
    assert steps_per_second(lambda: made.append(1), 3) > 0 and len(made) == 5


def test_operations_are_those_of_the_convolutions():
    """Forward and twice backward, a multiplication and an addition each."""
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(5, 3, padding="same")(x)
    z = keras.layers.Conv2DTranspose(2, 2, strides=2)(keras.layers.BatchNormalization()(y))
    assert flops(keras.Model(x, z)) == 3 * 2 * 8 * 8 * (3 * 3 * 3 * 5 + 2 * 2 * 5 * 2)
    x = keras.Input((4, 8, 8, 3))
    y = keras.layers.Conv3D(5, 3, padding="same")(x)
    assert flops(keras.Model(x, y)) == 3 * 2 * 4 * 8 * 8 * 3**3 * 3 * 5


def test_training_rows_compare_keras_with_each_baseline():
    found = {"Keras": [6.0], "PyTorch": [3.0], "PyTorch compiled": [4.0], PRODUCT: [24e12]}
    found |= {"Keras, prediction": [9.0], "PyTorch, prediction": [3.0]}
    rows = rate_rows("step", ["Keras", "PyTorch", "PyTorch compiled"], found)
    ratios = {row["figure"]: row["ratio"] for row in rows}
    assert ratios["step: Keras, beside PyTorch"] == 2
    assert ratios["step: Keras, beside PyTorch compiled"] == 1.5
    alone = rate_rows("step", ["Keras"], found)
    assert [row["figure"] for row in alone] == ["step: Keras"]
    predicting = rate_rows("images", ["Keras", "PyTorch"], found, PREDICTION)
    assert [row["ratio"] for row in predicting][1:] == [3]
    row = operation_row("step", 2_000_000_000_000, found)
    assert row["median"] == 12 and row["ratio"] == 0.5


def test_the_table_keeps_other_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows([make_row("a", "s", [1.0]), make_row("b", "s", [2.0])])
    write_rows([make_row("b", "s", [3.0])])
    write_rows([make_row("a", "s", [4.0])], hardware="another machine")
    table = pd.read_csv(TABLE)
    assert list(zip(table.figure, table["median"], strict=True)) == [("a", 1), ("b", 3), ("a", 4)]
    assert list(table.hardware == "another machine") == [False, False, True]
    assert table.hardware.notna().all()


def test_a_script_that_fails_is_reported():
    printed, seconds = scripts.run_script("predict.py", "--help")
    assert "--input" in printed and seconds > 0
    with pytest.raises(UserError, match=r"python predict.py --no-such-flag failed:"):
        scripts.run_script("predict.py", "--no-such-flag")
    with pytest.raises(UserError, match="nothing happened in 0 s"):
        scripts.wait_until(lambda: False, 0)


@pytest.mark.parametrize("module", [speed_main, accuracy_main])
def test_help_lists_every_command(module):
    name = module.__name__.removesuffix(".__main__")
    for command in module.COMMANDS:
        assert f"python -m {name} {command.__name__}" in module.__doc__


def test_a_panel_for_the_documentation(phantoms, tmp_path):
    pair = figures.find_pair(phantoms, "phantom_0003")
    figures.draw_panel(str(ROOT / BUNDLED_MODEL), pair, tmp_path / "img" / "panel.png")
    assert (tmp_path / "img" / "panel.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="has no image phantom_9999"):
        figures.find_pair(phantoms, "phantom_9999")


def test_the_benchmark_of_a_gpu_names_what_it_needs():
    packages = list(gpu.list_packages(["keras"]))
    names = [package.split("==")[0] for package in packages]
    assert f"keras=={keras.__version__}" in packages and len(names) == len(set(names))
    assert {"h5py", "rich", "pygments"} <= set(names)  # also what a need needs
    assert "colorama" not in names  # of Windows


def test_the_benchmark_of_a_gpu_names_what_it_left_out(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="Keras finds no GPU"):
        gpu.main(gpu.Config())
    monkeypatch.setattr(utils, "gpus", lambda: ["gpu:0"])
    monkeypatch.setattr(gpu, "python_command", lambda *command: ["sleep", "60"])
    with pytest.raises(UserError, match=r"left out: steps in bfloat16: .* timed out[^$]*float32"):
        gpu.main(gpu.Config(minutes=0.02))


def test_the_benchmark_of_a_gpu_trains_a_fold(monkeypatch, tmp_path):
    """Its rows come from what the training writes."""

    def write_run(command, **_):
        folder = Path(command[-1]) / "fold0"
        folder.mkdir(parents=True)
        pd.DataFrame({"seconds": [9.0, 1.0, 2.0]}).to_csv(folder / "log.csv")
        pd.DataFrame({"dice": [0.5, 1.0]}).to_csv(folder / "metrics.csv")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu.subprocess, "run", write_run)
    monkeypatch.setattr(gpu, "write_rows", lambda rows: write_rows(rows, "a GPU"))
    _, (name, command), _ = gpu.list_parts(gpu.Config(data_dir="xrays"))
    gpu.run_part(name, command, 60)
    medians = pd.read_csv(TABLE).set_index("figure")["median"]
    assert medians["fold of images: test Dice of 2"] == 0.75
    assert medians["fold of images: an epoch"] == 1.5
    assert medians["fold of images: until the first epoch's end"] == 9
