"""Rare objects: a network begins with the classes' frequencies, and its best epoch is chosen."""

import numpy as np
import pandas as pd
import pytest

from model import build_unet
from training.prior import LEAST, class_shares, start_at_shares
from training.run_folder import best_epoch

BLANK = np.zeros((1, 16, 16, 1), np.float32)  # its features are 0, so that the bias alone counts


@pytest.mark.parametrize(
    ("channels", "overlap", "shares", "expected"),
    [
        (1, False, [0.001], [0.001]),
        (3, False, [0.2, 0.001], [0.799, 0.2, 0.001]),
        (2, True, [0.7, 0.6], [0.7, 0.6]),
        (1, False, [0.0], [LEAST]),
        (1, False, [1.0], [1 - LEAST]),
        (2, False, [1.0], [LEAST, 1 - LEAST]),
    ],
)
def test_outputs_begin_at_the_shares(channels, overlap, shares, expected):
    model = build_unet((16, 16, 1), channels, 2, 2, overlap=overlap)
    start_at_shares(model, np.array(shares))
    found = model.predict_on_batch(BLANK)[0, 8, 8]
    np.testing.assert_allclose(found, expected, rtol=2e-2)


def test_shares_are_those_of_the_pairs():
    info = pd.DataFrame({"share: a": [0.1, 0.3], "share: b": [0.0, 0.01], "other": [1, 2]})
    np.testing.assert_allclose(class_shares(info, ["a", "b"]), [0.2, 0.005])


def test_among_epochs_without_a_hit_the_one_with_the_lowest_loss_is_best():
    history = [
        {"epoch": number, "val_dice": dice, "val_loss": loss}
        for number, dice, loss in ((1, 0.0, 0.9), (2, 0.0, 0.4), (3, 0.0, 0.5))
    ]
    assert best_epoch(history) == 2
    assert best_epoch([*history, {"epoch": 4, "val_dice": 0.1, "val_loss": 2.0}]) == 4
    assert best_epoch([{"epoch": 1}, {"epoch": 2}]) == 2


def test_an_untrained_network_that_is_right_on_empty_masks_is_not_the_best():
    dice = [0.8, 0.3, 0.5, 0.62, 0.7, 0.77]
    assert best_epoch([{"epoch": i, "val_dice": one} for i, one in enumerate(dice, 1)]) == 6


def test_a_lucky_epoch_is_not_the_best_and_a_long_fall_is_seen():
    rising = [0.5, 0.7, 0.8, 0.95, 0.83, 0.84, 0.85, 0.86, 0.86, 0.86, 0.86, 0.86]
    history = [{"epoch": i, "val_dice": dice} for i, dice in enumerate(rising, 1)]
    assert best_epoch(history) == 12
    history += [{"epoch": i, "val_dice": 0.5} for i in range(13, 30)]
    assert best_epoch(history) == 12
