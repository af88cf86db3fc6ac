"""Losses and metrics for training (keras.ops, any backend); evaluation of one predicted mask (NumPy, SciPy).

    python metrics.py compare A/metrics.csv B/metrics.csv      are two runs different? image by image

In training: y_true and y_pred (N, H, W, K) in [0, 1], a true pixel on a border being partly inside; each function gives
one number per image, (N,), computed in float32 whatever the network's precision. With several channels the first is the
background: Dice, Tversky and the metrics leave it out and average the rest.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from keras import KerasTensor, ops
from scipy import ndimage, stats

import utils
from utils import UserError

METRICS = ("dice", "iou", "precision", "recall", "nsd", "hd95", "assd")
NSD_TOLERANCE = 2.0  # pixels by which a border may be off and still counts as right


# ------------------------------------------------------------------------------------------------------------ losses


def _float32(*tensors: KerasTensor) -> list[KerasTensor]:
    return [ops.cast(tensor, "float32") for tensor in tensors]


def _foreground(tensor: KerasTensor) -> KerasTensor:
    return tensor if tensor.shape[-1] == 1 else tensor[..., 1:]


def _with_background(tensor: KerasTensor) -> KerasTensor:
    return tensor if tensor.shape[-1] > 1 else ops.concatenate([1 - tensor, tensor], axis=-1)


def focal_loss(y_true: KerasTensor, y_pred: KerasTensor, gamma: float = 2.0) -> KerasTensor:
    """Cross-entropy that counts easy pixels less: (N,) ≥ 0 (Lin et al. 2017; for shares Li et al. 2020)."""
    y_true, y_pred = map(_with_background, _float32(y_true, y_pred))
    y_pred = ops.clip(
        y_pred, 1e-30, 1.0
    )  # a larger floor would end the gradient where a class is wrongly ruled out
    weight = ops.power(ops.abs(y_true - y_pred), gamma) if gamma else 1.0
    return -ops.mean(ops.sum(y_true * weight * ops.log(y_pred), axis=-1), axis=(1, 2))


def cross_entropy(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Mean cross-entropy of the pixels, binary or categorical: (N,) ≥ 0."""
    return focal_loss(y_true, y_pred, gamma=0.0)


def tversky_loss(
    y_true: KerasTensor, y_pred: KerasTensor, alpha: float = 0.3, beta: float = 0.7
) -> KerasTensor:
    """One minus the Tversky index, alpha weighing false positives, beta misses: (N,) in [0, 1] (Salehi et al. 2017).

    A pixel counts as hit by the smaller of truth and prediction: their product where the truth is 0 or 1, and elsewhere
    the loss is still least where they are equal (Wang et al. 2023). One pixel is added above and below, so that an
    empty image has a gradient and no division by zero.
    """
    y_true, y_pred = map(_foreground, _float32(y_true, y_pred))
    hits = ops.sum(ops.minimum(y_true, y_pred), axis=(1, 2))
    wrong = ops.sum(y_pred, axis=(1, 2)) - hits
    missed = ops.sum(y_true, axis=(1, 2)) - hits
    return 1 - ops.mean((hits + 1) / (hits + alpha * wrong + beta * missed + 1), axis=-1)


def dice_loss(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """One minus soft Dice of each image: (N,) in [0, 1] (Milletari et al. 2016, without the squares)."""
    return tversky_loss(y_true, y_pred, alpha=0.5, beta=0.5)


def bce_dice_loss(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Cross-entropy plus Dice loss: (N,) ≥ 0. Dice for the overlap, cross-entropy for its steady gradient (nnU-Net)."""
    return cross_entropy(y_true, y_pred) + dice_loss(y_true, y_pred)


LOSSES: dict[str, Callable] = {
    "bce_dice": bce_dice_loss,
    "dice": dice_loss,
    "focal": focal_loss,
    "tversky": tversky_loss,
}


# ----------------------------------------------------------------------------------------------- metrics in training


def _decide(tensor: KerasTensor) -> KerasTensor:
    """Make {0, 1} of [0, 1]: one channel at 0.5, of several the largest."""
    channels = tensor.shape[-1]
    decided = tensor >= 0.5 if channels == 1 else ops.one_hot(ops.argmax(tensor, axis=-1), channels)
    return ops.cast(decided, "float32")


def _counts(
    y_true: KerasTensor, y_pred: KerasTensor
) -> tuple[KerasTensor, KerasTensor, KerasTensor]:
    """Count (N, K) pixels of the decided masks: both, truth, prediction."""
    truth, decided = (_foreground(_decide(tensor)) for tensor in _float32(y_true, y_pred))
    return tuple(ops.sum(masks, axis=(1, 2)) for masks in (truth * decided, truth, decided))


def _ratio(part: KerasTensor, whole: KerasTensor, both: KerasTensor) -> KerasTensor:
    """Divide, (N, K) → (N,): 1 where truth and prediction are both empty, 0 where the denominator alone is."""
    ratio = ops.where(both == 0, 1.0, part / ops.maximum(whole, 1.0))
    return ops.mean(ratio, axis=-1)


def dice(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Dice of each image's decided masks: (N,) in [0, 1]; two empty masks score 1, one empty scores 0."""
    hits, truth, found = _counts(y_true, y_pred)
    return _ratio(2 * hits, truth + found, truth + found)


def iou(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Intersection over union (Jaccard) of each image: (N,) in [0, 1], empty masks as in `dice`."""
    hits, truth, found = _counts(y_true, y_pred)
    return _ratio(hits, truth + found - hits, truth + found)


def precision(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Share of the found pixels that are right, per image: (N,) in [0, 1], empty masks as in `dice`."""
    hits, truth, found = _counts(y_true, y_pred)
    return _ratio(hits, found, truth + found)


def recall(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Share of the true pixels that are found, per image: (N,) in [0, 1], empty masks as in `dice`."""
    hits, truth, found = _counts(y_true, y_pred)
    return _ratio(hits, truth, truth + found)


# ------------------------------------------------------------------------------------------ evaluation of one mask


def surface_distances(
    truth: np.ndarray, found: np.ndarray, spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (pixels or mm) of the border pixels of one mask (bool, not empty) to the other's border, both ways."""
    box = ndimage.find_objects((truth | found).astype(np.uint8))[
        0
    ]  # the rest has no border, but would cost time
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
    borders = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (truth, found)]
    away = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    return away[1][borders[0]], away[0][borders[1]]


def score_mask(
    truth: np.ndarray, found: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Compare two masks (H, W) or (S, H, W) in {0, 1}: dice, iou, precision, recall, nsd in [0, 1]; hd95 and assd.

    The latter two are in pixels, or in mm where their `spacing` is given, a number per axis, and so is the tolerance.

    nsd: share of both borders' pixels within NSD_TOLERANCE of the other (Nikolov et al. 2021); hd95: the larger of the
    two directed 95th percentiles; assd: mean over both borders' pixels. Two empty masks score 1 and 0 pixels; one empty
    scores 0 and the image's diagonal, the worst there is. Raises ValueError if shapes differ.
    """
    if truth.shape != found.shape:
        raise ValueError(f"masks of shape {truth.shape} and {found.shape} cannot be compared")
    truth, found = truth.astype(bool), found.astype(bool)
    if not truth.any() or not found.any():
        equal = not truth.any() and not found.any()
        distance = 0.0 if equal else float(np.linalg.norm(np.multiply(truth.shape, spacing or 1)))
        return dict.fromkeys(METRICS[:5], float(equal)) | {"hd95": distance, "assd": distance}
    hits, union = int((truth & found).sum()), int((truth | found).sum())
    there, back = surface_distances(truth, found, spacing)
    both = np.concatenate([there, back])
    return {
        "dice": 2 * hits / (hits + union),
        "iou": hits / union,
        "precision": hits / int(found.sum()),
        "recall": hits / int(truth.sum()),
        "nsd": float((both <= NSD_TOLERANCE).mean()),
        "hd95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float(both.mean()),
    }


def score_classes(
    truth: np.ndarray,
    found: np.ndarray,
    names: Sequence[str],
    spacing: Sequence[float] | None = None,
) -> dict[str, float]:
    """Compare class ids (S, H, W) or (H, W): each metric's mean over the classes, and `dice: name` … where several.

    spacing: between slices, rows and columns in mm, if known. A single slice is compared as a plane.
    """
    if len(truth) == 1 and truth.ndim == 3:
        truth, found, spacing = truth[0], found[0], spacing and spacing[1:]
    scores = {name: score_mask(truth == i, found == i, spacing) for i, name in enumerate(names, 1)}
    row = {
        metric: float(np.mean([score[metric] for score in scores.values()])) for metric in METRICS
    }
    if len(names) > 1:
        row |= {
            f"{metric}: {name}": score[metric]
            for name, score in scores.items()
            for metric in METRICS
        }
    return row


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Average a table with a row per image: per metric the mean and its 95 % bootstrap interval (low, high; seeded).

    Where some rows are in mm and others in pixels (column unit), distances and NSD are left out.
    """
    rows, mixed = {}, len(set(table.get("unit", ()))) > 1
    for column in table.select_dtypes("number"):
        if mixed and column.partition(":")[0] in METRICS[4:]:
            continue
        values = table[column].to_numpy(float)
        low = high = values.mean()
        if np.ptp(values) > 0:
            interval = stats.bootstrap(
                (values,), np.mean, method="percentile", n_resamples=9999, batch=100, rng=0
            )
            low, high = interval.confidence_interval
        rows[column] = {"mean": values.mean(), "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index")


# ------------------------------------------------------------------------------------------------- comparing two runs


def compare(one: Path, other: Path, /) -> pd.DataFrame:
    """Compare two metrics.csv image by image: means, mean difference with its 95 % interval, Wilcoxon's p.

    Args:
        one: a table that predict.py or train.py --folds wrote
        other: another one of the same images, in any order

    Prints and returns a row per metric. Raises UserError unless both hold the same images.
    """
    tables = [_read_metrics(path) for path in (one, other)]
    result = compare_tables(*tables)
    print(
        f"{len(tables[0])} images; A is {one}, B is {other}\n{result.to_string(float_format='{:.4f}'.format)}"
    )
    return result


def compare_tables(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Compare two tables with a row per image, a row per metric: A, B, B - A, its 95 % interval, Wilcoxon's p.

    Raises UserError unless both hold the same images.
    """
    lacking = set(one.image) ^ set(other.image)
    if lacking:
        raise UserError(
            f"{len(lacking)} image(s) are in one table only, such as {min(lacking)}; expected the same ones"
        )
    one, other = one.set_index("image"), other.set_index("image").reindex(one.image)
    rows = {}
    for metric in [name for name in METRICS if name in one and name in other]:
        first, second = one[metric].to_numpy(float), other[metric].to_numpy(float)
        difference = pd.DataFrame({metric: second - first})
        p = stats.wilcoxon(first, second).pvalue if difference[metric].any() else 1.0
        mean, low, high = summarize(difference).loc[metric]
        rows[metric] = {
            "A": first.mean(),
            "B": second.mean(),
            "B - A": mean,
            "low": low,
            "high": high,
            "p": p,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _read_metrics(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a metrics.csv") from None
    if not {"image", "dice"} <= set(table) or not table.image.is_unique or not len(table):
        raise UserError(
            f"{path} is no metrics.csv; expected columns image, dice … and each image once"
        )
    for name in set(METRICS) & set(table):
        if not np.issubdtype(table[name].dtype, np.number) or not np.isfinite(table[name]).all():
            raise UserError(
                f"{path}: column {name} has other things than numbers; expected one for each image"
            )
    return table


if __name__ == "__main__":
    import tyro

    utils.run_cli(
        lambda: tyro.extras.subcommand_cli_from_dict({"compare": compare}, description=__doc__)
    )
