"""PyTorch's training, with which the benchmark compares, is the same one."""

# ruff: noqa: E402 (without torch these tests are skipped before the imports)
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import metrics
import train
from benchmarks import pytorch_unet
from model import build_unet
from networks.levels import plan_levels
from utils import UserError


@pytest.mark.parametrize(
    ("size", "spacing"), [((32, 32), None), ((16, 16, 16), None), ((12, 16, 32), (3, 1, 1))]
)
def test_it_is_the_same_network(size, spacing):
    ours = build_unet((*size, 2), filters=4, depth=2, spacing=spacing)
    theirs = pytorch_unet.UNet(2, plan_levels(size, 4, 2, spacing))
    count = sum(int(np.prod(weight.shape)) for weight in ours.trainable_weights)
    assert count == sum(weight.numel() for weight in theirs.parameters())
    images = pytorch_unet.to_torch(np.zeros((2, *size, 2), np.float32))
    assert theirs(images).shape == (2, 1, *size)


def test_it_has_the_same_loss_and_learns():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 8, 8, 1)).astype(np.float32)
    y = np.float32(rng.random((3, 8, 8, 1)) > 0.5)
    ours = np.mean(metrics.bce_dice_loss(y, 1 / (1 + np.exp(-logits))))
    theirs = pytorch_unet.bce_dice_loss(pytorch_unet.to_torch(logits), pytorch_unet.to_torch(y))
    assert float(theirs) == pytest.approx(ours, rel=1e-5)
    x = rng.random((4, 32, 32, 1), np.float32)
    model = pytorch_unet.UNet(1, plan_levels((32, 32), 4, 2))
    step = pytorch_unet.make_step(model, "float32", 2e-2)
    losses = [step(x, np.float32(x > 0.5)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("patch_size", ["", "32"])
def test_a_short_training_prints_its_test_dice(phantoms, tmp_path, capsys, patch_size):
    """The whole script, as `benchmarks.speed cold` runs it."""
    config = train.Config(
        data_dir=str(phantoms),
        image_size=32,
        patch_size=patch_size,
        filters=2,
        depth=2,
        epochs=2,
        epoch_images=0,
        precision="float32",
        out_dir=str(tmp_path),
    )
    pytorch_unet.main(config)
    assert "test Dice 0." in capsys.readouterr().out and (tmp_path / "model.pt").is_file()
    with pytest.raises(UserError, match="architecture is 'residual'; expected 'unet'"):
        pytorch_unet.main(dataclasses.replace(config, architecture="residual"))
