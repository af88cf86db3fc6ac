"""The same training in PyTorch, for `benchmark.py` to compare with: `python rival.py` takes the flags of `train.py`.

The plain U-Net with batch normalization, loss, optimizer, schedule, batches and choice of the epoch are those of
`train.py`; convolutions run channels-last, under bfloat16 autocast where train.py would take bfloat16. Writes
OUT_DIR/model.pt, then prints the test images' Dice (of masks as they are, not cleaned). Needs `pip install torch`;
start it with KERAS_BACKEND=torch, so that TensorFlow is not loaded.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import data
import predict
import train
import utils
from dataset.batches import Batches
from dataset.layouts import SUBSETS
from dataset.loading import Preprocessing
from dataset.phantoms import make_phantoms
from imaging.labels import class_names, mask_values
from training.optimizer import WarmupCosine
from utils import UserError, atomic


class Convolution(nn.Module):
    """A 3x3 convolution whose kernel is kept as a matrix, as PyTorch's Muon wants it; its channels lie last."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.shape = filters, 3, 3, channels
        self.kernel = nn.Parameter(
            torch.randn(filters, 9 * channels) * (2 / (9 * channels)) ** 0.5
        )  # He et al. 2015

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.kernel.view(self.shape).permute(0, 3, 1, 2), padding=1)


class UpConvolution(nn.Module):
    """A 2x2 up-convolution, likewise."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.shape = channels, 2, 2, filters
        self.kernel = nn.Parameter(
            (torch.rand(channels, 4 * filters) * 2 - 1) * (6 / (4 * (channels + filters))) ** 0.5
        )
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv_transpose2d(
            x, self.kernel.view(self.shape).permute(0, 3, 1, 2), self.bias, 2
        )


class Block(nn.Sequential):
    """Twice: 3x3 convolution, batch normalization, ReLU."""

    def __init__(self, channels: int, filters: int) -> None:
        parts = []
        for size in (channels, filters):
            parts += [
                Convolution(size, filters),
                nn.BatchNorm2d(filters, eps=1e-3),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*parts)


class UNet(nn.Module):
    """What `model.build_unet` builds by default, for one class: images (N, C, H, W) → logits (N, 1, H, W)."""

    def __init__(self, channels: int = 1, filters: int = 8, depth: int = 4) -> None:
        super().__init__()
        sizes = [filters * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(map(Block, [channels, *sizes[:-1]], sizes))
        self.up = nn.ModuleList(UpConvolution(2 * size, size) for size in sizes[:-1])
        self.decoder = nn.ModuleList(Block(2 * size, size) for size in sizes[:-1])
        self.head = nn.Conv2d(filters, 1, 1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.encoder[:-1]:
            skips.append(block(x))
            x = functional.max_pool2d(skips[-1], 2)
        x = self.encoder[-1](x)
        for up, block, skip in reversed(list(zip(self.up, self.decoder, skips, strict=True))):
            x = block(torch.cat([skip, up(x)], 1))
        return self.head(x).float()


def bce_dice_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute `metrics.bce_dice_loss`, averaged over the images."""
    probs = logits.sigmoid()
    hits = torch.minimum(probs, y).sum((2, 3))
    dice = (2 * hits + 2) / (probs.sum((2, 3)) + y.sum((2, 3)) + 2)
    return functional.binary_cross_entropy_with_logits(logits, y) + (1 - dice).mean()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Turn (N, H, W, C) into a tensor (N, C, H, W) whose channels lie last in memory."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def make_step(
    model: nn.Module,
    precision: str,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-4,
    scale: Callable[[int], float] = lambda step: 1.0,
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Give the function that trains on a batch and returns its loss; `scale` gives the learning rate of each step."""
    parts = [[p for p in model.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False)]
    muon = torch.optim.Muon(
        parts[0], learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        parts[1], learning_rate, eps=1e-7, weight_decay=weight_decay, fused=True
    )
    optimizers = muon, adamw
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]

    def step(x: np.ndarray, y: np.ndarray) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(to_torch(x))
        loss = bce_dice_loss(logits, to_torch(y))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for one in (*optimizers, *schedules):
            one.step()
        return loss.item()

    return step


class Trained:
    """A network as `predict.py` uses one."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model, self.precision = model.eval(), precision

    def predict_on_batch(self, prepared: np.ndarray) -> np.ndarray:
        """Turn images (N, h, w, C) into probabilities (N, h, w, 1)."""
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"),
        ):
            return self.model(to_torch(prepared)).sigmoid().permute(0, 2, 3, 1).numpy()


def validate(trained: Trained, pictures: np.ndarray, shares: np.ndarray) -> float:
    """Compute the mean Dice of images (N, H, W, C) uint8 at the network's size."""
    found, truth = trained.predict_on_batch(pictures.astype(np.float32) / 255) > 0.5, shares > 127
    hits, both = (truth & found).sum((1, 2, 3)), truth.sum((1, 2, 3)) + found.sum((1, 2, 3))
    return float((2 * hits / both).mean())


def main(config: train.Config) -> None:
    """Train, keep the epoch with the best validation Dice (or the last), print the test images' Dice.

    Raises UserError for a network or loss that is not the default.
    """
    for name in (
        "architecture",
        "loss",
        "normalization",
        "classes",
        "init_weights",
        "extra_dir",
        "neighbours",
    ):
        if getattr(config, name) != getattr(train.Config, name):
            raise UserError(
                f"{name} is {getattr(config, name)!r}; PyTorch's training has {name} of the default only"
            )
    torch.manual_seed(config.seed)
    precision = "bfloat16" if config.precision == "auto" and utils.has_amx() else config.precision
    names, size = class_names(config.classes), (config.image_size, config.image_size)
    recipe = Preprocessing(names, size, config.channels, config.window, mask_values(config.classes))
    data_dir = config.data_dir or make_phantoms("", config.phantoms, seed=0)
    pairs, dataset = data.load_dataset(data_dir, recipe, config.cache_dir, config.memory_gb)
    fractions = config.val_fraction, config.test_fraction
    subsets = np.array(
        data.split(pairs, *fractions, config.split_seed, config.folds, max(config.fold, 0))
    )
    rows = {subset: dataset.slices_of(np.flatnonzero(subsets == subset)) for subset in SUBSETS}
    common = names, config.batch_size
    batches = Batches(
        dataset,
        rows["train"],
        *common,
        config.augmentation,
        seed=config.seed,
        at_least=config.epoch_images,
    )
    model = UNet(config.channels, config.filters, config.depth).to(
        memory_format=torch.channels_last
    )
    steps = len(batches) * config.epochs
    warmup = int(config.warmup * steps)
    rate = WarmupCosine(1.0, warmup, max(1, steps - warmup))
    step = make_step(
        model,
        precision,
        config.learning_rate,
        config.weight_decay,
        lambda number: float(rate(number)),
    )
    path, best = Path(config.out_dir) / "model.pt", -1.0
    for epoch in range(config.epochs):
        batches.epoch = epoch
        model.train()
        losses = [step(*batches[i]) for i in range(len(batches))]
        dice = (
            validate(Trained(model, precision), *dataset.take(rows["val"]))
            if len(rows["val"])
            else float(epoch)
        )
        print(f"epoch {epoch + 1:3}/{config.epochs}  loss {np.mean(losses):.4f}", flush=True)
        if dice > best:
            best = dice
            with atomic(path) as temporary:
                torch.save(model.state_dict(), temporary)
    print(path, flush=True)
    model.load_state_dict(torch.load(path))
    metadata = utils.make_metadata(names, size, config.channels, mirror=config.mirror)
    test = [pair for pair, subset in zip(pairs, subsets, strict=True) if subset == "test"]
    table, _ = predict.score_pairs([(Trained(model, precision), metadata)], test)
    print(f"test Dice {table.dice.mean():.4f}")


if __name__ == "__main__":
    utils.run_script(main, train.Config)
