"""Losses and metrics of training (keras.ops, any backend), and scores of a predicted mask.

    python metrics.py compare A/metrics.csv B/metrics.csv      are two runs different?

In training y_true and y_pred are (N, H, W, K), or (N, D, H, W, K) for volumes, in [0, 1]; a true
pixel on a border is partly inside. Each function returns one number per image, (N,), computed in
float32 whatever the network's precision. With several channels the first is the background: Dice,
Tversky and the metrics leave it out and average the others. Classes that overlap are scored each
for itself.
y_true may have a further channel: the share of a pixel that does not count (--ignore).

To add a loss, write a function (y_true, y_pred) → (N,) and name it in LOSSES. Begin it with
`split_valid`.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.load_keras()

import keras
import numpy as np
import pandas as pd
from keras import KerasTensor, ops
from scipy import ndimage

from imaging.labels import plane
from utils import UserError

# A loss or metric: (y_true, y_pred) → (N,).
Score = Callable[[KerasTensor, KerasTensor], KerasTensor]

OVERLAPS = ("dice", "iou", "precision", "recall")  # in [0, 1]
DISTANCES = ("nsd", "hd95", "assd")  # they depend on the unit, pixels or mm
METRICS = (*OVERLAPS, *DISTANCES)
# How much there is, was found, and is both: what the scores of a patient's images are made of.
PIXELS = ("true pixels", "found pixels", "shared pixels")
SMOOTHING = 0.01  # pixels, of Dice and Tversky
NSD_TOLERANCE = 2.0  # by so many pixels, or mm, a border may be off and still counts as right


# ----------------------------------------------------------------------------------------- losses


def _float32(*tensors: KerasTensor) -> list[KerasTensor]:
    return [ops.cast(tensor, "float32") for tensor in tensors]


def split_valid(
    y_true: KerasTensor, y_pred: KerasTensor
) -> tuple[KerasTensor, KerasTensor, KerasTensor | None]:
    """Split truth from what does not count: y_true, y_pred, and each pixel's weight, float32.

    The weight, (N, …, 1) in [0, 1], is None if all pixels count.
    """
    y_true, y_pred = _float32(y_true, y_pred)
    if y_true.shape[-1] == y_pred.shape[-1]:
        return y_true, y_pred, None
    return y_true[..., :-1], y_pred, 1 - y_true[..., -1:]


def per_class(function: Score) -> Score:
    """Make a loss or metric of overlapping classes: the mean of each class's, as if it were alone.

    y_pred (N, H, W, K) has no background.
    """

    @wraps(function)
    def average(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
        classes = y_pred.shape[-1]
        values = []
        for k in range(classes):
            one = ops.concatenate([y_true[..., k : k + 1], y_true[..., classes:]], axis=-1)
            values.append(function(one, y_pred[..., k : k + 1]))
        return ops.mean(ops.stack(values, axis=-1), axis=-1)

    return average


def _foreground(tensor: KerasTensor) -> KerasTensor:
    return tensor if tensor.shape[-1] == 1 else tensor[..., 1:]


def _with_background(tensor: KerasTensor) -> KerasTensor:
    return tensor if tensor.shape[-1] > 1 else ops.concatenate([1 - tensor, tensor], axis=-1)


def _sum_pixels(tensor: KerasTensor) -> KerasTensor:
    """Sum over the pixels, or voxels, of each image: (N, …, K) → (N, K)."""
    return ops.sum(tensor, axis=tuple(range(1, len(tensor.shape) - 1)))


def focal_loss(y_true: KerasTensor, y_pred: KerasTensor, gamma: float = 2.0) -> KerasTensor:
    """Cross-entropy that counts easy pixels less: (N,) ≥ 0.

    Lin et al. 2017; for partly covered pixels Li et al. 2020.
    """
    y_true, y_pred, counts = split_valid(y_true, y_pred)
    y_true, y_pred = _with_background(y_true), _with_background(y_pred)
    # A larger floor would end the gradient where a class is wrongly ruled out.
    y_pred = ops.clip(y_pred, 1e-30, 1.0)
    weight = ops.power(ops.abs(y_true - y_pred), gamma) if gamma else 1.0
    pixels = -ops.sum(y_true * weight * ops.log(y_pred), axis=-1, keepdims=True)  # (N, …, 1)
    if counts is None:
        return ops.mean(pixels, axis=tuple(range(1, len(pixels.shape))))
    total = ops.maximum(_sum_pixels(counts), 1.0)
    return (_sum_pixels(pixels * counts) / total)[:, 0]


def cross_entropy(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Mean cross-entropy of the pixels, binary or categorical: (N,) ≥ 0."""
    return focal_loss(y_true, y_pred, gamma=0.0)


def tversky_loss(
    y_true: KerasTensor, y_pred: KerasTensor, alpha: float = 0.3, beta: float = 0.7
) -> KerasTensor:
    """One minus the Tversky index: (N,) in [0, 1] (Salehi et al. 2017).

    alpha weights false positives, beta false negatives. A pixel's hit is the smaller of truth and
    prediction: their product where the truth is 0 or 1, and elsewhere the loss is still least
    where they are equal (Wang et al. 2023). Where a class is absent, one pixel is added to both
    sides of the fraction: it has a gradient and no division by zero. Elsewhere that would reward
    an empty mask, by a third of the Dice if the object has 4 pixels.
    """
    y_true, y_pred, counts = split_valid(y_true, y_pred)
    y_true, y_pred = _foreground(y_true), _foreground(y_pred)
    if counts is not None:
        y_true, y_pred = y_true * counts, y_pred * counts
    hits = _sum_pixels(ops.minimum(y_true, y_pred))
    extra = _sum_pixels(y_pred) - hits
    missed = _sum_pixels(y_true) - hits
    added = ops.where(hits + missed > 0, SMOOTHING, 1.0)
    index = (hits + added) / (hits + alpha * extra + beta * missed + added)
    return 1 - ops.mean(index, axis=-1)


def dice_loss(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """One minus soft Dice: (N,) in [0, 1] (Milletari et al. 2016, without the squares)."""
    return tversky_loss(y_true, y_pred, alpha=0.5, beta=0.5)


def bce_dice_loss(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Cross-entropy plus Dice loss: (N,) ≥ 0 (nnU-Net, Isensee et al. 2021).

    Dice rewards overlap, cross-entropy has a steady gradient.
    """
    return cross_entropy(y_true, y_pred) + dice_loss(y_true, y_pred)


LOSSES: dict[str, Score] = {
    "bce_dice": bce_dice_loss,
    "dice": dice_loss,
    "focal": focal_loss,
    "tversky": tversky_loss,
}


# ---------------------------------------------------------------------------- metrics of training


def _decide(tensor: KerasTensor) -> KerasTensor:
    """Round [0, 1] to {0, 1}: one channel at 0.5, of several channels the largest is 1."""
    channels = tensor.shape[-1]
    if channels == 1:
        return ops.cast(tensor >= 0.5, "float32")
    return ops.cast(ops.one_hot(ops.argmax(tensor, axis=-1), channels), "float32")


def _counts(
    y_true: KerasTensor, y_pred: KerasTensor, overlap: bool = False
) -> tuple[KerasTensor, KerasTensor, KerasTensor]:
    """Count the pixels of the decided masks, (N, K) each: in both, in truth, in prediction."""
    y_true, y_pred, counts = split_valid(y_true, y_pred)
    if overlap:  # each channel is a class of its own
        truth, found = (ops.cast(one >= 0.5, "float32") for one in (y_true, y_pred))
    else:
        truth, found = _foreground(_decide(y_true)), _foreground(_decide(y_pred))
    if counts is not None:
        counts = ops.cast(counts >= 0.5, "float32")
        truth, found = truth * counts, found * counts
    return tuple(_sum_pixels(mask) for mask in (truth * found, truth, found))


def _ratio(part: KerasTensor, whole: KerasTensor, both: KerasTensor) -> KerasTensor:
    """Divide, (…, K) → (…): 1 where `both` masks are empty, 0 where only `whole` is 0."""
    return ops.mean(ops.where(both == 0, 1.0, part / ops.maximum(whole, 1.0)), axis=-1)


def _dice(hits: KerasTensor, truth: KerasTensor, found: KerasTensor) -> KerasTensor:
    return _ratio(2 * hits, truth + found, truth + found)


def _iou(hits: KerasTensor, truth: KerasTensor, found: KerasTensor) -> KerasTensor:
    return _ratio(hits, truth + found - hits, truth + found)


def _precision(hits: KerasTensor, truth: KerasTensor, found: KerasTensor) -> KerasTensor:
    return _ratio(hits, found, truth + found)


def _recall(hits: KerasTensor, truth: KerasTensor, found: KerasTensor) -> KerasTensor:
    return _ratio(hits, truth, truth + found)


def dice(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Dice of each image's decided masks: (N,) in [0, 1]; two empty masks score 1, one scores 0."""
    return _dice(*_counts(y_true, y_pred))


def iou(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Intersection over union (Jaccard) of each image: (N,) in [0, 1]; empty as in `dice`."""
    return _iou(*_counts(y_true, y_pred))


def precision(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Share of the predicted pixels that are right: (N,) in [0, 1]; empty as in `dice`."""
    return _precision(*_counts(y_true, y_pred))


def recall(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Share of the true pixels that are predicted: (N,) in [0, 1]; empty as in `dice`."""
    return _recall(*_counts(y_true, y_pred))


TRAINING_METRICS: tuple[Score, ...] = (dice, iou, precision, recall)


class PooledMetric(keras.metrics.Metric):
    """A metric of all pixels since the epoch's start, per class, averaged over the classes.

    For patches: one without foreground says little, and a mean over patches would count it like
    any other. score: (hits, truth, found) → score, (…, K) → (…).
    """

    def __init__(self, name: str, score: Score, overlap: bool) -> None:
        super().__init__(name=name, dtype="float32")
        self.score, self.overlap = score, overlap
        self.counts: keras.Variable | None = None

    def update_state(
        self, y_true: KerasTensor, y_pred: KerasTensor, sample_weight: KerasTensor | None = None
    ) -> None:
        """Count a batch; an image of weight 0 does not count."""
        counts = ops.stack(_counts(y_true, y_pred, self.overlap))  # (3, N, K)
        if sample_weight is not None:
            weight = ops.reshape(ops.cast(sample_weight, "float32"), (1, -1, 1))
            counts = counts * weight
        if self.counts is None:
            shape = (3, counts.shape[-1])
            self.counts = self.add_variable(shape, "zeros", name="counts")
        self.counts.assign_add(ops.sum(counts, axis=1))

    def result(self) -> KerasTensor:
        """Return the score of all pixels that were counted."""
        if self.counts is None:
            return 0.0
        counts = ops.convert_to_tensor(self.counts)
        return self.score(counts[0], counts[1], counts[2])


def pooled_metrics(overlap: bool) -> list[keras.metrics.Metric]:
    """Make dice, iou, precision and recall for `Model.compile(weighted_metrics=…)`, pooled.

    overlap: whether each channel of y_pred is a class of its own.
    """
    scores = {"dice": _dice, "iou": _iou, "precision": _precision, "recall": _recall}
    return [PooledMetric(name, score, overlap) for name, score in scores.items()]


# ---------------------------------------------------------------------- scores of a predicted mask


def surface_distances(
    truth: np.ndarray, found: np.ndarray, spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the distance of each mask's border pixels to the other's border, both ways.

    truth, found: bool, not empty. The result is in pixels, or in mm if `spacing` is given.
    """
    # Only the box around both masks: the rest has no border, but would cost time.
    box = ndimage.find_objects((truth | found).astype(np.uint8))[0]
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
    borders = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (truth, found)]
    away = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    return away[1][borders[0]], away[0][borders[1]]


def score_mask(
    truth: np.ndarray, found: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Compare two masks (H, W) or (S, H, W) in {0, 1}; return each of METRICS.

    spacing: mm per axis, if known; then hd95, assd and the tolerance of nsd are in mm.

    nsd: share of both borders' pixels within NSD_TOLERANCE of the other (Nikolov et al. 2021).
    hd95: the larger of the two directed 95th percentiles. assd: mean over both borders. Two empty
    masks score 1 and distance 0; one empty mask scores 0 and the image's diagonal, the worst
    there is. Raises ValueError if the shapes differ.
    """
    if truth.shape != found.shape:
        raise ValueError(f"masks of shape {truth.shape} and {found.shape} cannot be compared")
    truth, found = truth.astype(bool), found.astype(bool)
    if not truth.any() or not found.any():
        both_empty = not truth.any() and not found.any()
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing or 1)))
        distance = 0.0 if both_empty else diagonal
        scores = dict.fromkeys((*OVERLAPS, "nsd"), float(both_empty))
        return scores | {"hd95": distance, "assd": distance}
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
    ignored: np.ndarray | None = None,
) -> dict[str, float]:
    """Compare masks (S, H, W) or (H, W), ids or BITS: each metric's mean over the classes.

    With several classes also `dice: name` … of each. PIXELS are counted per class. spacing: mm
    between slices, rows and columns, if known. A volume of one slice is compared as a plane.
    ignored: bool, of the masks' shape; these pixels are background in both.
    """
    if ignored is not None:
        truth, found = (np.where(ignored, mask.dtype.type(0), mask) for mask in (truth, found))
    if len(truth) == 1 and truth.ndim == 3:
        truth, found, spacing = truth[0], found[0], spacing and spacing[1:]
    scores, counts = {}, {}
    for class_id, name in enumerate(names, 1):
        true, seen = plane(truth, class_id).astype(bool), plane(found, class_id).astype(bool)
        scores[name] = score_mask(true, seen, spacing)
        ending = f": {name}" if len(names) > 1 else ""
        for column, mask in zip(PIXELS, (true, seen, true & seen), strict=True):
            counts[column + ending] = int(np.count_nonzero(mask))
    row = {}
    for metric in METRICS:
        row[metric] = float(np.mean([score[metric] for score in scores.values()]))
    if len(names) > 1:
        for name, score in scores.items():
            row |= {f"{metric}: {name}": score[metric] for metric in METRICS}
    return row | counts


# ------------------------------------------------------------------------- the mean over a data set


def number_patients(table: pd.DataFrame) -> np.ndarray:
    """Number the patient of each row: (N,) from 0. A row that names none is one of its own."""
    numbers: dict[str | int, int] = {}
    names = table["patient"] if "patient" in table else [""] * len(table)
    keys = [i if pd.isna(name) or name == "" else str(name) for i, name in enumerate(names)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def score_patients(table: pd.DataFrame) -> pd.DataFrame:
    """Score each patient's images as one stack: Dice and IoU of their PIXELS, a row per patient.

    The columns are `dice per patient`, `iou per patient` and, with several classes, those of each.
    There are none if each patient has one row, or if some rows have no PIXELS.
    """
    patients, column = number_patients(table), PIXELS[0]
    endings = [name.removeprefix(column) for name in table if name.startswith(column)]
    is_alone = np.bincount(patients) == 1
    # In a cross-validation only some folds may have patients, and so the PIXELS.
    if is_alone.all() or not endings or table[column + endings[0]].isna().any():
        return pd.DataFrame(index=range(len(is_alone)))
    by_patient = table.groupby(patients)
    scores = {}
    for ending in endings:
        true, found, shared = (by_patient[name + ending].sum().to_numpy(float) for name in PIXELS)
        both = true + found
        scores["dice", ending] = np.where(both > 0, 2 * shared / np.maximum(both, 1), 1)
        scores["iou", ending] = np.where(both > 0, shared / np.maximum(both - shared, 1), 1)
    result = {}
    for ending in dict.fromkeys(("", *endings)):
        for metric in ("dice", "iou"):
            pooled = scores.get((metric, ending))
            if pooled is None:
                pooled = np.mean([scores[metric, name] for name in endings], axis=0)
            result[f"{metric} per patient{ending}"] = pooled
    return pd.DataFrame(result)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Average a table with a row per image: mean, low and high of each metric.

    low, high: the 95 % bootstrap interval of the mean, seeded. Patients are drawn, with all of
    their rows (column patient); NaN if there is only one. Patients with several rows are also
    scored as a whole, see `score_patients`. If some rows are in mm and others in pixels (column
    unit), the metrics that depend on it are left out.
    """
    is_mixed = len(set(table.get("unit", ()))) > 1
    patients = number_patients(table)
    rows = {}
    for column in table.select_dtypes("number"):
        name = column.partition(":")[0]
        is_prediction = name.startswith("predicted")
        if name in ("patient", *PIXELS) or is_prediction or (is_mixed and name in DISTANCES):
            continue
        rows[column] = _mean_and_interval(table[column].to_numpy(float), patients)
    by_patient = score_patients(table)
    for column in by_patient:
        rows[column] = _mean_and_interval(by_patient[column].to_numpy(), by_patient.index)
    return pd.DataFrame.from_dict(rows, orient="index")


def _mean_and_interval(values: np.ndarray, patients: np.ndarray) -> dict[str, float]:
    """Average values (N,); draw patients (N,), their numbers from 0, for the interval."""
    sums, counts = np.bincount(patients, values), np.bincount(patients)
    low = high = values.mean()
    if len(sums) < 2:
        low = high = np.nan
    elif np.ptp(values) > 0:
        from scipy import stats  # trainings do without its second

        low, high = stats.bootstrap(
            (sums, counts),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            paired=True,
            method="percentile",
            n_resamples=9999,
            batch=100,
            rng=0,
        ).confidence_interval
    return {"mean": values.mean(), "low": low, "high": high}


def format_summary(table: pd.DataFrame) -> str:
    """Lay out the means of a table with a row per image for the terminal."""
    units = " and ".join(sorted(set(table.unit)))
    count = len(set(number_patients(table)))
    over = f" over {count} patient(s)" if count < len(table) else ""
    lines = [f"{'':24} {'mean':>8}   95 % interval{over} (hd95, assd in {units})"]
    for name, row in summarize(table).iterrows():
        is_distance = "hd95" in name or "assd" in name
        digits = 2 if is_distance or row["mean"] > 1 else 4
        interval = f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"
        interval = "–" if np.isnan(row["low"]) else interval
        lines.append(f"{name:24} {row['mean']:8.{digits}f}   {interval}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ comparing two runs


def format_predictions(table: pd.DataFrame) -> str:
    """Say in a line how the predicted Dice of a table compares with the true one."""
    table = table.dropna(subset=["predicted_dice"])  # very large images are not judged
    low, high = table.predicted_dice_low, table.predicted_dice_high
    error = (table.predicted_dice - table.dice).abs().mean()
    line = f"predicted Dice: off by {error:.4f} on average"
    if len(table) > 2:
        line += f", rank correlation {table.predicted_dice.corr(table.dice, 'spearman'):.2f}"
    inside = table.dice.between(low, high).mean()
    return f"{line}; {inside:.0%} within their intervals; {table.unusual.sum()} unusual image(s)"


def compare(one: Path, other: Path, /) -> pd.DataFrame:
    """Compare two metrics.csv image by image: means, mean difference, its interval, Wilcoxon's p.

    Args:
        one: a table that predict.py or train.py --folds wrote
        other: another one of the same images, in any order

    Prints and returns a row per metric. Intervals and p are over patients where the tables name
    them. Raises UserError unless both hold the same images.
    """
    tables = [_read_metrics(path) for path in (one, other)]
    result = compare_tables(*tables)
    shown = result.to_string(float_format="{:.4f}".format)
    count = len(set(number_patients(_share_patients(*tables)[0])))
    images = f"{len(tables[0])} images" + f" of {count} patients" * (count < len(tables[0]))
    print(f"{images}; A is {one}, B is {other}\n{shown}")
    return result


def compare_tables(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Compare two tables with a row per image: A, B, B - A, low, high, p for each metric.

    low, high: the 95 % bootstrap interval of the mean difference, which draws patients; p:
    Wilcoxon's signed-rank test of the patients' mean differences. Without a column patient, each
    image is one of its own. Where some distances are in mm and others in pixels they are left out.
    Raises UserError unless both hold the same images.
    """
    unpaired = set(one.image) ^ set(other.image)
    if unpaired:
        raise UserError(
            f"{len(unpaired)} image(s) are in one table only, such as {min(unpaired)}; expected "
            "the same images in both"
        )
    one, other = _share_patients(one, other)
    patients = number_patients(one)
    by_patient = [score_patients(table) for table in (one, other)]
    rows = {}
    in_one_unit = one.get("unit", pd.Series()).equals(other.get("unit", pd.Series()))
    in_one_unit = in_one_unit and len(set(one.get("unit", ()))) < 2
    for metric in METRICS if in_one_unit else OVERLAPS:
        if metric in one and metric in other:
            rows[metric] = _compare_values(one[metric], other[metric], patients)
    for metric in by_patient[0]:
        if metric in by_patient[1]:
            rows[metric] = _compare_values(
                *(table[metric] for table in by_patient), by_patient[0].index
            )
    return pd.DataFrame.from_dict(rows, orient="index")


def _share_patients(one: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bring two tables of the same images into one order, and give both the patients of either."""
    other = other.set_index("image").reindex(one.image).reset_index()
    known = next((table["patient"].tolist() for table in (one, other) if "patient" in table), "")
    return one.assign(patient=known), other.assign(patient=known)


def _compare_values(one: pd.Series, other: pd.Series, patients: np.ndarray) -> dict[str, float]:
    """Compare two columns (N,): A, B, B - A, low, high, p."""
    from scipy import stats

    first, second = one.to_numpy(float), other.to_numpy(float)
    change = np.bincount(patients, second - first) / np.bincount(patients)
    p = stats.wilcoxon(change).pvalue if change.any() else 1.0
    interval = _mean_and_interval(second - first, patients)
    means = {"A": first.mean(), "B": second.mean(), "B - A": interval.pop("mean")}
    return {**means, **interval, "p": p}


def _read_metrics(path: Path) -> pd.DataFrame:
    """Read a metrics.csv. Raises UserError if it is none."""
    try:
        # As text: to pandas, patient 007 would be 7.
        table = pd.read_csv(path, converters={"patient": str})
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a metrics.csv") from None
    if not {"image", "dice"} <= set(table) or not table.image.is_unique or not len(table):
        raise UserError(
            f"{path} is not a metrics.csv; expected columns image, dice … and each image once"
        )
    for name in set(METRICS) & set(table):
        if not pd.api.types.is_numeric_dtype(table[name]) or not np.isfinite(table[name]).all():
            raise UserError(
                f"{path}: column {name} holds other things than numbers; expected one per image"
            )
    return table


if __name__ == "__main__":
    utils.run_commands({"compare": compare}, __doc__)
