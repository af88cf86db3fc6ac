"""The same training in PyTorch, to compare with: it takes the flags of train.py.

    KERAS_BACKEND=torch python -m benchmarks.pytorch_unet [--data-dir DIR] [--epochs 80] ...

The plain U-Net with batch normalization, the loss, the optimizer, the schedule, the batches and the
choice of the epoch are those of train.py. Convolutions run channels-last, and under autocast in
bfloat16 where train.py takes bfloat16. Writes OUT_DIR/model.pt, then prints the test images' Dice;
masks are not post-processed. Needs `pip install torch`; KERAS_BACKEND=torch keeps TensorFlow out.
"""

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
from dataset.cache import Dataset
from dataset.layouts import SUBSETS, Pair
from metrics import SMOOTHING
from training.optimizer import WARMUP, WEIGHT_DECAY, WarmupCosine
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
    """A convolution of 3 pixels a side, stored as a matrix, because PyTorch's Muon needs one.

    The channels lie last in memory. He et al. 2015 initialize so (arXiv 1502.01852).
    """

    def __init__(self, channels: int, filters: int, dimensions: int) -> None:
        super().__init__()
        self.shape = (filters, *[3] * dimensions, channels)
        inputs = 3**dimensions * channels
        self.kernel = nn.Parameter(torch.randn(filters, inputs) * (2 / inputs) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return CONVOLUTIONS[x.ndim - 2](x, self.kernel.view(self.shape).movedim(-1, 1), padding=1)


class UpConvolution(nn.Module):
    """An up-convolution of 2 pixels a side, stored likewise."""

    def __init__(self, channels: int, filters: int, dimensions: int) -> None:
        super().__init__()
        self.shape = (channels, *[2] * dimensions, filters)
        outputs = 2**dimensions * filters
        limit = (6 / (2**dimensions * (channels + filters))) ** 0.5
        self.kernel = nn.Parameter((torch.rand(channels, outputs) * 2 - 1) * limit)
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel.view(self.shape).movedim(-1, 1)
        return UP_CONVOLUTIONS[x.ndim - 2](x, kernel, self.bias, 2)


class Block(nn.Sequential):
    """Twice: convolution of 3 pixels a side, batch normalization, ReLU."""

    def __init__(self, channels: int, filters: int, dimensions: int) -> None:
        parts = []
        for size in (channels, filters):
            normalization = NORMALIZATIONS[dimensions](filters, eps=1e-3)
            convolution = Convolution(size, filters, dimensions)
            parts += [convolution, normalization, nn.ReLU(inplace=True)]
        super().__init__(*parts)


class UNet(nn.Module):
    """The default of `model.build_unet`: images (N, C, [D,] H, W) → logits (N, 1, [D,] H, W)."""

    def __init__(
        self, channels: int = 1, filters: int = 8, depth: int = 4, dimensions: int = 2
    ) -> None:
        super().__init__()
        sizes = [filters * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList()
        for before, size in zip([channels, *sizes[:-1]], sizes, strict=True):
            self.encoder.append(Block(before, size, dimensions))
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for size in sizes[:-1]:
            self.up.append(UpConvolution(2 * size, size, dimensions))
            self.decoder.append(Block(2 * size, size, dimensions))
        self.head = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(filters, 1, 1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=CHANNELS_LAST[dimensions])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.encoder[:-1]:
            skips.append(block(x))
            x = POOLS[x.ndim - 2](skips[-1], 2)
        x = self.encoder[-1](x)
        for level in reversed(range(len(skips))):
            x = torch.cat([skips[level], self.up[level](x)], 1)
            x = self.decoder[level](x)
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
        self.model, self.precision = model.eval(), precision

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Turn images (N, [D,] H, W, C) in [0, 1] into probabilities (N, [D,] H, W, 1)."""
        enabled = self.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            probs = self.model(to_torch(images)).sigmoid()
        return probs.movedim(1, -1).numpy()


def validation_dice(predictor: Predictor, images: np.ndarray, masks: np.ndarray) -> float:
    """Compute the mean Dice of images (N, [D,] H, W, C) and masks, uint8, at the network's size."""
    predicted = predictor.predict_on_batch(images.astype(np.float32) / 255) > 0.5
    truth = masks > 127
    overlap, total = (truth & predicted), truth.astype(np.uint8) + predicted
    overlap, total = (one.reshape(len(one), -1).sum(1) for one in (overlap, total))
    return float(((2 * overlap + SMOOTHING) / (total + SMOOTHING)).mean())


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
    """Train; return the file of the epoch with the best validation Dice, or of the last epoch."""
    batches, _ = train.make_batches(config, dataset, numbers)
    schedule = make_schedule(len(batches) * config.epochs)
    step = make_step(model, precision, config.learning_rate, schedule)
    path, best = Path(config.out_dir) / "model.pt", -1.0
    for epoch in range(config.epochs):
        batches.epoch = epoch
        model.train()
        losses = [step(*batches[i]) for i in range(len(batches))]
        print(f"epoch {epoch + 1:3}/{config.epochs}  loss {np.mean(losses):.4f}", flush=True)
        dice = float(epoch)
        if len(numbers["val"]):
            held_out = dataset.take(dataset.cover(numbers["val"]))
            dice = validation_dice(Predictor(model, precision), *held_out)
        if dice > best:
            best = dice
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
    model = UNet(channels, config.filters, config.depth, len(size))
    path = fit(model, config, dataset, numbers, precision)
    print(path, flush=True)
    model.load_state_dict(torch.load(path))
    metadata = train.make_metadata(config, dataset, pairs)
    table, _ = predict.score_pairs([(Predictor(model, precision), metadata)], test)
    print(f"test Dice {table.dice.mean():.4f}")


if __name__ == "__main__":
    utils.run_script(main, train.Config, from_report=True)
