"""The benchmark's arithmetic; what it measures is not tested, as machines differ."""

import keras
import pandas as pd

from benchmarks import speed, timing
from benchmarks.timing import TABLE, make_row, run_interleaved, write_rows


def test_a_row_has_median_range_and_ratio():
    made = make_row("x", "s", [3.0, 1.0, 2.0], "y", [4.0, 4.0])
    assert (made["median"], made["low"], made["high"], made["ratio"], made["repeats"]) == (
        2,
        1,
        3,
        0.5,
        3,
    )
    assert pd.isna(make_row("x", "s", [1.0])["ratio"])


def test_calls_are_made_in_turn_and_the_first_round_warms_up(monkeypatch):
    monkeypatch.setattr(timing, "REST_S", 0)
    made = []
    found = run_interleaved(
        {name: lambda name=name: made.append(name) or len(made) for name in "ab"}, 2
    )
    assert made == list("ababab") and found == {"a": [3, 5], "b": [4, 6]}


def test_operations_are_those_of_the_convolutions():
    """Forward and twice backward, a multiplication and an addition each."""
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(5, 3, padding="same")(x)
    z = keras.layers.Conv2DTranspose(2, 2, strides=2)(keras.layers.BatchNormalization()(y))
    assert speed.flops(keras.Model(x, z)) == 3 * 2 * 8 * 8 * (3 * 3 * 3 * 5 + 2 * 2 * 5 * 2)


def test_the_table_keeps_other_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows([make_row("a", "s", [1.0]), make_row("b", "s", [2.0])])
    write_rows([make_row("b", "s", [3.0])])
    write_rows([make_row("a", "s", [4.0])], hardware="another machine")
    table = pd.read_csv(TABLE)
    assert list(zip(table.figure, table["median"], strict=True)) == [("a", 1), ("b", 3), ("a", 4)]
    assert (
        list(table.hardware == "another machine") == [False, False, True]
        and table.hardware.notna().all()
    )
