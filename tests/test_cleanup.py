"""How masks are cleaned is learned from the training masks, and never at a class's cost."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dataset.cache import Case, Dataset, find_places
from imaging.labels import Classes
from inference.sampler import Sampler
from training import cleanup


@pytest.fixture
def dataset():
    """A volume of slices: two small squares of class a in 3 of 60, a block of class b in all."""
    masks = np.zeros((60, 64, 64, 2), np.uint8)
    masks[:3, 5:15, 5:15, 0] = masks[:3, 5:15, 45:55, 0] = 255
    masks[:, 30:60, 10:50, 1] = 255
    case = Case(masks[..., :1], masks, find_places(masks))
    return Dataset([case], Sampler((64, 64)), 1, Classes("a,b"), pd.DataFrame())


def test_masks_without_a_class_have_no_say_in_its_components(dataset):
    assert cleanup.count_components(dataset, [0]) == [2, 1]


@pytest.mark.parametrize(("count", "accepted"), [(2, True), (1, False)])
def test_a_class_is_not_cleaned_at_another_ones_cost(dataset, monkeypatch, count, accepted):
    found = dataset.cases[0].truth(dataset.classes)[0].copy()
    found[:, 2, 2] = 2  # a speck of class b in each slice, which cleaning removes
    changed = {}
    monkeypatch.setattr(cleanup.utils, "load_model", lambda path: (None, {"threshold": 0.5}))
    monkeypatch.setattr(cleanup.utils, "update_metadata", lambda path, **more: changed.update(more))
    monkeypatch.setattr(cleanup, "segment_case", lambda *args: found.copy())
    monkeypatch.setattr(cleanup, "count_components", lambda *args: [count, 1])
    cleanup.choose_cleanup(Path("model.h5"), dataset, np.array([0]), np.array([0]))
    assert changed == ({"clean": [2, 1]} if accepted else {})
