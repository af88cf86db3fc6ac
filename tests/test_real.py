"""On real images: the folder named by UNET_DATA (skipped without it, required in CI)."""

import numpy as np
import pandas as pd
import pytest
from conftest import masks_of

import data
import train
from dataset.loading import Preprocessing
from imaging import preprocess
from imaging.labels import Classes
from inference.sampler import Sampler


def test_montgomery_is_read_whole(real):
    preprocessing = Preprocessing(Classes("left lung,right lung"), Sampler((64, 64)))
    pairs, dataset = data.load_dataset(data.find_data(real / "montgomery"), preprocessing)
    assert len(pairs) == 138
    assert pd.Series([pair.label for pair in pairs]).value_counts().to_dict() == {"0": 80, "1": 58}
    columns = np.arange(64)
    for ids in preprocess.shares_to_ids(masks_of(dataset)):
        left, right = (((ids == i).sum(0) * columns).sum() / (ids == i).sum() for i in (1, 2))
        assert left > right  # the patient's left is the image's right


def test_sunnybrook_is_split_by_its_index(real):
    pairs, problems = data.find_pairs(real / "sunnybrook")
    assert problems == [] and len(pairs) == 805
    subsets = data.split(pairs, 0.15, 0.2, seed=0)
    table = pd.DataFrame({"patient": [pair.patient for pair in pairs], "subset": subsets})
    assert table.groupby("patient").subset.nunique().max() == 1
    assert (
        table[table.subset == "test"].patient.nunique() == 15
        and (table.subset == "test").sum() == 279
    )


@pytest.mark.parametrize(
    ("name", "layout", "classes", "count"),
    [
        ("montgomery", "Montgomery", "", 138),
        ("sunnybrook", "images/ + masks/", "", 805),
        ("hippocampus", "Medical Segmentation Decathlon", "Anterior=1,Posterior=2", 200),
        ("nuclei", "a folder an image", "", 100),
        ("chase", "CHASE_DB1", "", 20),
    ],
)
def test_data_sets_are_recognised_as_they_are_distributed(real, name, layout, classes, count):
    if not (real / name).is_dir():
        pytest.skip(f"no {name} in UNET_DATA")
    found = data.find_data(real / name)
    assert found.name.startswith(layout) and found.classes == classes and found.problems == []
    assert len(found.pairs) == count
    if name == "nuclei":
        assert sum(len(pair.masks) for pair in found.pairs) > 1000
    if name == "chase":
        assert len({pair.patient for pair in found.pairs}) == 10


@pytest.mark.slow
def test_a_short_training_on_montgomery(real, tmp_path):
    """Eight epochs at 64x64 find lungs; the README's figure takes the full command."""
    config = train.Config(
        data_dir=str(real / "montgomery"),
        image_size=64,
        filters=8,
        epochs=8,
        batch_size=4,
        folds=5,
        fold=0,
        precision="float32",
        out_dir=str(tmp_path / "run"),
    )
    summary = train.train(config)
    assert summary.loc["dice", "mean"] > 0.85
