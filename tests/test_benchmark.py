"""The benchmark's arithmetic; what it measures is not tested, as machines differ."""

import keras
import pandas as pd

import benchmark


def test_a_row_has_median_range_and_ratio():
    made = benchmark.row("x", "s", [3.0, 1.0, 2.0], "y", [4.0, 4.0])
    assert (made["median"], made["low"], made["high"], made["ratio"], made["repeats"]) == (2, 1, 3, 0.5, 3)
    assert pd.isna(benchmark.row("x", "s", [1.0])["ratio"])


def test_calls_are_made_in_turn_and_the_first_round_warms_up(monkeypatch):
    monkeypatch.setattr(benchmark, "REST_S", 0)
    made = []
    found = benchmark.in_turn({name: lambda name=name: made.append(name) or len(made) for name in "ab"}, 2)
    assert made == list("ababab") and found == {"a": [3, 5], "b": [4, 6]}


def test_operations_are_those_of_the_convolutions():
    """Forward and twice backward, a multiplication and an addition each."""
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(5, 3, padding="same")(x)
    z = keras.layers.Conv2DTranspose(2, 2, strides=2)(keras.layers.BatchNormalization()(y))
    assert benchmark.flops(keras.Model(x, z)) == 3 * 2 * 8 * 8 * (3 * 3 * 3 * 5 + 2 * 2 * 5 * 2)


def test_the_table_keeps_other_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmark.write([benchmark.row("a", "s", [1.0]), benchmark.row("b", "s", [2.0])])
    benchmark.write([benchmark.row("b", "s", [3.0])])
    benchmark.write([benchmark.row("a", "s", [4.0])], hardware="another machine")
    table = pd.read_csv(benchmark.TABLE)
    assert list(zip(table.figure, table["median"], strict=True)) == [("a", 1), ("b", 3), ("a", 4)]
    assert list(table.hardware == "another machine") == [False, False, True] and table.hardware.notna().all()
