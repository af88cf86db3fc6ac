"""The same training in PyTorch, to compare with: it takes the flags of train.py.

    KERAS_BACKEND=torch python -m benchmarks.pytorch_unet [--data-dir DIR] [--epochs 80] ...

The plain U-Net with batch normalization, the loss, the optimizer, the schedule, the batches and the
choice of the epoch are those of train.py. Convolutions run channels-last, and under autocast in
bfloat16 where train.py takes bfloat16. Writes OUT_DIR/model.pt, then prints the test images' Dice;
masks are not post-processed. Needs `pip install torch`; KERAS_BACKEND=torch keeps TensorFlow out.
"""

import itertools
import math
from collections.abc import Callable, Sequence
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
from dataset.cache import Dataset
from dataset.layouts import SUBSETS, Pair
from metrics import SMOOTHING
from networks.levels import Level, plan_levels
from training.optimizer import WARMUP, WEIGHT_DECAY, WarmupCosine
from training.run_folder import best_epoch
from utils import UserError, atomic

# Fields of train.Config that have their default here.
FIXED_FIELDS = (
    "architecture",
    "loss",
    "normalization",
    "classes",
    "init_weights",
    "extra_dir",
)
Step = Callable[[np.ndarray, np.ndarray], float]

# --------------------------------------------------------------------------------------- network


CONVOLUTIONS = {2: functional.conv2d, 3: functional.conv3d}
UP_CONVOLUTIONS = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
POOLS = {2: functional.max_pool2d, 3: functional.max_pool3d}
NORMALIZATIONS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Convolution(nn.Module):
    """A convolution whose kernel is stored as a matrix, because PyTorch's Muon needs one.

    The channels lie last in memory. He et al. 2015 initialize so (arXiv 1502.01852).
    """

    def __init__(self, channels: int, level: Level) -> None:
        super().__init__()
        self.shape = (level.filters, *level.kernel, channels)
        self.padding = [side // 2 for side in level.kernel]
        inputs = math.prod(level.kernel) * channels
        self.kernel = nn.Parameter(torch.randn(level.filters, inputs) * (2 / inputs) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel.view(self.shape).movedim(-1, 1)
        return CONVOLUTIONS[x.ndim - 2](x, kernel, padding=self.padding)


class UpConvolution(nn.Module):
    """An up-convolution from the level below, stored likewise."""

    def __init__(self, channels: int, level: Level) -> None:
        super().__init__()
        self.shape, self.stride = (channels, *level.stride, level.filters), level.stride
        places = math.prod(level.stride)
        limit = (6 / (places * (channels + level.filters))) ** 0.5
        kernel = torch.rand(channels, places * level.filters)
        self.kernel = nn.Parameter((kernel * 2 - 1) * limit)
        self.bias = nn.Parameter(torch.zeros(level.filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel.view(self.shape).movedim(-1, 1)
        return UP_CONVOLUTIONS[x.ndim - 2](x, kernel, self.bias, self.stride)


class Block(nn.Sequential):
    """Twice: convolution, batch normalization, ReLU."""

    def __init__(self, channels: int, level: Level) -> None:
        parts = []
        for size in (channels, level.filters):
            normalization = NORMALIZATIONS[len(level.kernel)](level.filters, eps=1e-3)
            parts += [Convolution(size, level), normalization, nn.ReLU(inplace=True)]
        super().__init__(*parts)


class UNet(nn.Module):
    """The default of `model.build_unet`: images (N, C, [D,] H, W) → logits (N, 1, [D,] H, W)."""

    def __init__(self, channels: int, levels: Sequence[Level]) -> None:
        super().__init__()
        self.levels = levels
        self.encoder, self.up, self.decoder = (nn.ModuleList() for _ in range(3))
        for level, above in zip(levels, [None, *levels[:-1]], strict=True):
            self.encoder.append(Block(above.filters if above else channels, level))
        for level, below in itertools.pairwise(levels):
            self.up.append(UpConvolution(below.filters, level))
            self.decoder.append(Block(2 * level.filters, level))
        dimensions = len(levels[0].kernel)
        self.head = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(levels[0].filters, 1, 1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=CHANNELS_LAST[dimensions])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block, level in zip(self.encoder[:-1], self.levels, strict=False):
            skips.append(block(x))
            x = POOLS[x.ndim - 2](skips[-1], level.stride)
        x = self.encoder[-1](x)
        for number in reversed(range(len(skips))):
            x = torch.cat([skips[number], self.up[number](x)], 1)
            x = self.decoder[number](x)
        return self.head(x).float()


# -------------------------------------------------------------------------------------- training


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Turn (N, [D,] H, W, C) into a tensor (N, C, [D,] H, W) whose channels lie last in memory."""
    return torch.from_numpy(array).movedim(-1, 1)


def bce_dice_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute `metrics.bce_dice_loss`, averaged over the images."""
    probs = logits.sigmoid()
    overlap, truth = torch.minimum(probs, y).flatten(2).sum(-1), y.flatten(2).sum(-1)
    added = 2 * torch.where(truth > 0, SMOOTHING, 1.0)
    dice = (2 * overlap + added) / (probs.flatten(2).sum(-1) + truth + added)
    return functional.binary_cross_entropy_with_logits(logits, y) + (1 - dice).mean()


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the kernels, which are matrices, and AdamW for the other weights."""
    kernels = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    muon = torch.optim.Muon(
        kernels, learning_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        others, learning_rate, eps=1e-7, weight_decay=WEIGHT_DECAY, fused=True
    )
    return [muon, adamw]


def make_step(
    model: nn.Module,
    precision: str,
    learning_rate: float = 1e-2,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> Step:
    """Return the function that trains on a batch and returns its loss.

    schedule: the factor of the learning rate at each step.
    """
    optimizers = make_optimizers(model, learning_rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, schedule) for one in optimizers]

    device = next(model.parameters()).device

    def step(x: np.ndarray, y: np.ndarray) -> float:
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(to_torch(x).to(device))
        loss = bce_dice_loss(logits, to_torch(y).to(device))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        return loss.item()

    return step


def make_schedule(steps: int) -> Callable[[int], float]:
    """Make the schedule of train.py, with a peak of 1."""
    warmup = int(WARMUP * steps)
    rate = WarmupCosine(1.0, warmup, max(1, steps - warmup))
    return lambda step: float(rate(step))


class Predictor:
    """A trained network with the method that predict.py calls."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model, self.precision = model, precision

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Turn images (N, [D,] H, W, C) in [0, 1] into probabilities (N, [D,] H, W, 1)."""
        device = next(self.model.parameters()).device
        enabled = self.precision == "bfloat16"
        self.model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            probs = self.model(to_torch(images).to(device)).sigmoid()
        return probs.movedim(1, -1).cpu().numpy()


def validation_dice(predictor: Predictor, batches: Batches) -> float:
    """Compute the mean Dice of the images at the network's size; of all patches together."""
    overlaps, totals = [], []
    for number in range(len(batches)):
        images, masks = batches[number]
        found, truth = predictor.predict_on_batch(images) > 0.5, masks > 0.5
        overlaps.append((found & truth).reshape(len(images), -1).sum(1))
        totals.append((found.astype(np.uint8) + truth).reshape(len(images), -1).sum(1))
    overlap, total = np.concatenate(overlaps), np.concatenate(totals)
    if batches.dataset.sampler.patches:
        overlap, total = overlap.sum(), total.sum()
    return float(np.mean((2 * overlap + SMOOTHING) / (total + SMOOTHING)))


# ---------------------------------------------------------------------------------------- script


def check_config(config: train.Config) -> None:
    """Raise UserError for a network or loss that is not the default."""
    for name in FIXED_FIELDS:
        value, default = getattr(config, name), getattr(train.Config, name)
        if value != default:
            raise UserError(f"{name} is {value!r}; expected {default!r} for PyTorch's training")


def split_pairs(
    config: train.Config, pairs: Sequence[Pair]
) -> tuple[dict[str, np.ndarray], list[Pair]]:
    """Split the data as train.py does: the numbers of each subset's pairs, and the test pairs."""
    fold = max(config.fold, 0)
    fractions = config.val_fraction, config.test_fraction
    subsets = data.split(pairs, *fractions, folds=config.folds, fold=fold)
    numbers = {name: np.flatnonzero(np.array(subsets) == name) for name in SUBSETS}
    test = [pair for pair, subset in zip(pairs, subsets, strict=True) if subset == "test"]
    return numbers, test


def fit(
    model: UNet,
    config: train.Config,
    dataset: Dataset,
    numbers: dict[str, np.ndarray],
    precision: str,
) -> Path:
    """Train; return the file of the best epoch, as train.py chooses it."""
    batches, held_out = train.make_batches(config, dataset, numbers)
    schedule = make_schedule(len(batches) * config.epochs)
    step = make_step(model, precision, config.learning_rate, schedule)
    path, history = Path(config.out_dir) / "model.pt", []
    for epoch in range(config.epochs):
        batches.epoch = epoch
        model.train()
        losses = [step(*batches[i]) for i in range(len(batches))]
        print(f"epoch {epoch + 1:3}/{config.epochs}  loss {np.mean(losses):.4f}", flush=True)
        history.append({"epoch": epoch + 1})
        if held_out is not None:
            history[-1]["val_dice"] = validation_dice(Predictor(model, precision), held_out)
        if best_epoch(history) == epoch + 1:
            with atomic(path) as temporary:
                torch.save(model.state_dict(), temporary)
    return path


def main(config: train.Config) -> None:
    """Train, then print the test images' Dice. Raises UserError for what is not the default."""
    check_config(config)
    torch.manual_seed(config.seed)
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if utils.has_amx() else "float32"
    pairs, dataset = train.load_data(config)
    numbers, test = split_pairs(config, pairs)
    *size, channels = dataset.sampler.input_shape(dataset.channels)
    spacing = dataset.sampler.spacing if len(size) == 3 else None
    model = UNet(channels, plan_levels(size, config.filters, config.depth, spacing))
    path = fit(model, config, dataset, numbers, precision)
    print(path, flush=True)
    model.load_state_dict(torch.load(path))
    metadata = train.make_metadata(config, dataset, pairs)
    table, _ = predict.score_pairs([(Predictor(model, precision), metadata)], test)
    print(f"test Dice {table.dice.mean():.4f}")


if __name__ == "__main__":
    utils.run_script(main, train.Config, from_report=True)
