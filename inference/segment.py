"""Segment decoded images with one model or several: from a `Scan` to class ids on its own grid.

Windows and their Gaussian weights: nnU-Net (Isensee et al. 2021, methods, "inference").
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from imaging import preprocess
from imaging.labels import Classes, mirrored_outputs
from imaging.scan import Scan
from inference import postprocess


@dataclass(frozen=True)
class Options:
    """How to run the network."""

    batch_size: int = 8  # slices at once
    tile: bool = False  # windows at the image's own resolution instead of one scaled image
    uncertainty: bool = False  # also compute where the votes differ
    probabilities: bool = False  # also return the probabilities, which need much memory


DEFAULT_OPTIONS = Options()


class Network(Protocol):
    """What computes probabilities: a Keras model or an `engines.Engine`."""

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Turn images (N, h, w, C) float32 in [0, 1] into probabilities (N, h, w, K)."""


Member = tuple[Network, dict[str, Any]]  # a network and its metadata


class Prediction(NamedTuple):
    """What is found in one scan."""

    ids: np.ndarray  # (S, H, W) uint8 class ids
    uncertainty: np.ndarray | None  # (S, H, W) float32: standard deviation over the votes
    disagreement: float  # 1 - Dice between votes and result, mean over votes and slices, or NaN
    probs: np.ndarray | None  # (S, H, W, K) float32


def segment_scans(
    members: Sequence[Member], scans: Sequence[Scan], options: Options = DEFAULT_OPTIONS
) -> list[Prediction]:
    """Segment scans of any sizes with the mean of all members; slices of several share a batch.

    Only the class ids are kept of all slices: probabilities are at the image's own size, and
    restored one slice at a time.
    """
    metadata = members[0][1]
    if options.tile:
        return [segment_tiled(members, scan, options) for scan in scans]
    size = tuple(metadata["image_size"])
    prepared, shapes = [], []
    for scan in scans:
        prepared += list(prepare_inputs(scan, size, metadata))
        shapes += [scan.pixels.shape[1:3]] * len(scan.pixels)
    slices = []
    for start in range(0, len(prepared), options.batch_size):
        batch = np.stack(prepared[start : start + options.batch_size])
        votes, num_averaged = collect_votes(members, batch, options)
        for i in range(len(batch)):
            result = aggregate(votes[:, i], num_averaged, metadata, options, shapes[start + i])
            slices.append(result)
    remaining = iter(slices)
    return [to_volume(list(itertools.islice(remaining, len(scan.pixels)))) for scan in scans]


def segment_tiled(members: Sequence[Member], scan: Scan, options: Options) -> Prediction:
    """Segment a scan at its own resolution, padded with zeros so that windows cover it."""
    metadata = members[0][1]
    height, width = scan.pixels.shape[1:3]
    canvas = padded_size((height, width), tuple(metadata["image_size"]))
    padding = ((0, canvas[0] - height), (0, canvas[1] - width), (0, 0))
    slices = []
    for prepared in prepare_inputs(scan, (height, width), metadata):
        votes, num_averaged = collect_votes(members, np.pad(prepared, padding)[None], options)
        inside = votes[:, 0, :height, :width]
        slices.append(aggregate(inside, num_averaged, metadata, options, (height, width)))
    return to_volume(slices)


def prepare_inputs(scan: Scan, size: tuple[int, int], metadata: dict[str, Any]) -> np.ndarray:
    """Make the network's inputs (S, h, w, C) uint8 of a scan's slices.

    C counts also the slices before and after, if the model uses them.
    """
    prepared = preprocess.prepare_scan(scan, size, metadata["channels"], metadata.get("window", ""))
    neighbours = metadata.get("neighbours", 0)
    numbers = np.arange(len(prepared))
    shifted = []
    for step in range(-neighbours, neighbours + 1):
        shifted.append(prepared[np.clip(numbers + step, 0, len(prepared) - 1)])
    return np.concatenate(shifted, axis=-1)


# ------------------------------------------------------------------------- running the network


def run_network(network: Network, prepared: np.ndarray) -> np.ndarray:
    """Run the network: prepared images (N, H, W, C) uint8 → probabilities (N, H, W, K) float32."""
    images = prepared.astype(np.float32) / 255
    return np.asarray(network.predict_on_batch(images), np.float32)


def padded_size(shape: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (H, W) that holds `shape` and that half-overlapping windows cover."""
    size = []
    for length, side in zip(shape, window, strict=True):
        step = side // 2
        num_steps = -(-max(0, length - side) // step)  # rounded up
        size.append(side + num_steps * step)
    return size[0], size[1]


def sliding_window(
    network: Network, prepared: np.ndarray, window: tuple[int, int], batch_size: int = 8
) -> np.ndarray:
    """Run the network window by window: images (N, H, W, C) uint8 → (N, H, W, K) float32.

    H and W are those of `padded_size`. Windows (h, w) overlap by half; where they overlap, the
    pixels in their middle count most.
    """
    weight = gaussian_weight(window)
    rows = range(0, prepared.shape[1] - window[0] + 1, window[0] // 2)
    columns = range(0, prepared.shape[2] - window[1] + 1, window[1] // 2)
    places = []
    for number, y, x in itertools.product(range(len(prepared)), rows, columns):
        places.append((number, slice(y, y + window[0]), slice(x, x + window[1])))
    total = None
    weights = np.zeros((*prepared.shape[:3], 1), np.float32)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        probs = run_network(network, np.stack([prepared[place] for place in batch]))
        if total is None:
            total = np.zeros((*prepared.shape[:3], probs.shape[-1]), np.float32)
        for place, window_probs in zip(batch, probs, strict=True):
            total[place] += weight * window_probs
            weights[place] += weight
    return total / weights


def gaussian_weight(window: tuple[int, int]) -> np.ndarray:
    """Return a window's weights (h, w, 1): a Gaussian, its sigma an eighth of each side."""
    bells = []
    for side in window:
        distance = np.arange(side) - (side - 1) / 2
        bells.append(np.exp(-0.5 * (distance / (side / 8)) ** 2))
    # Corners must count a little: an image's own corner lies in one window only.
    return np.maximum(np.outer(*bells), 1e-4).astype(np.float32)[..., None]


# ---------------------------------------------------------------------------- votes and result


def collect_votes(
    members: Sequence[Member], prepared: np.ndarray, options: Options
) -> tuple[np.ndarray, int]:
    """Run every member, and again on the mirrored images if its metadata asks for that.

    Returns votes (V, N, H, W, K) and how many of them, the first ones, are averaged. The
    uncertainty of a single model needs a mirrored vote in any case, which is not averaged then.
    """
    averaged, others = [], []
    for network, metadata in members:
        averaged.append(run_member(network, metadata, prepared, options))
        if metadata.get("mirror"):
            averaged.append(run_mirrored(network, metadata, prepared, options))
        elif options.uncertainty and len(members) == 1:
            others.append(run_mirrored(network, metadata, prepared, options))
    return np.stack(averaged + others), len(averaged)


def run_member(
    network: Network, metadata: dict[str, Any], prepared: np.ndarray, options: Options
) -> np.ndarray:
    """Compute the probabilities of whole images, or window by window with `options.tile`."""
    if not options.tile:
        return run_network(network, prepared)
    return sliding_window(network, prepared, tuple(metadata["image_size"]), options.batch_size)


def run_mirrored(
    network: Network, metadata: dict[str, Any], prepared: np.ndarray, options: Options
) -> np.ndarray:
    """Compute the probabilities of mirrored images, mirrored back, left and right exchanged."""
    mirrored = np.ascontiguousarray(prepared[:, :, ::-1])
    probs = run_member(network, metadata, mirrored, options)[:, :, ::-1]
    return probs[..., mirrored_outputs(metadata)]


def aggregate(
    votes: np.ndarray,
    num_averaged: int,
    metadata: dict[str, Any],
    options: Options,
    shape: tuple[int, int],
) -> Prediction:
    """Decide one slice of size `shape` (H, W) by the mean of its first votes (V, h, w, K)."""
    mean = votes[:num_averaged].mean(0)
    probs = preprocess.restore(mean, shape)
    ids = postprocess.decide(probs, metadata)
    spread, apart = None, float("nan")
    if options.uncertainty:
        spread = preprocess.restore(votes.std(0).max(-1)[..., None], shape)[..., 0]
        threshold, overlap = metadata["threshold"], Classes.from_metadata(metadata).overlap
        decided = postprocess.to_ids(mean, threshold, overlap)
        apart = disagreement(votes, decided, threshold, overlap)
    return Prediction(ids, spread, apart, probs if options.probabilities else None)


def disagreement(
    votes: np.ndarray, decided: np.ndarray, threshold: float, overlap: bool = False
) -> float:
    """Average 1 - Dice between the mask of each vote (V, H, W, K) and the decided one (H, W)."""
    values = []
    for vote in votes:
        ids = postprocess.to_ids(vote, threshold, overlap)
        total = int((ids > 0).sum() + (decided > 0).sum())
        hits = int(((ids == decided) & (ids > 0)).sum())
        values.append(1 - 2 * hits / total if total else 0.0)
    return float(np.mean(values))


def to_volume(slices: Sequence[Prediction]) -> Prediction:
    """Join the predictions of a scan's slices."""

    def stack(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        return None if arrays[0] is None else np.stack(arrays)

    return Prediction(
        np.stack([one.ids for one in slices]),
        stack([one.uncertainty for one in slices]),
        float(np.mean([one.disagreement for one in slices])),
        stack([one.probs for one in slices]),
    )
