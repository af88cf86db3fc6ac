"""Use a trained model: score the test images and draw panels, or segment any file or folder.

    python predict.py                                  the run's test images: results/<stem>.png, results/metrics.csv
    python predict.py --data-dir DIR                   every pair of another data set, likewise
    python predict.py --model "files/run/fold*/model.h5" …             several models, averaged
    python predict.py --input PATH --output DIR        masks DIR/<stem>.png, panels DIR/panels/<stem>.png

Masks have the image's own size and kind: PNG or TIFF (0/255 for one class), NIfTI, DICOM SEG, with the
training masks' values. A bad file is reported and the others are done; the exit code is then 2.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    pass
from imaging import preprocess
from imaging.labels import mirrored_channels
from imaging.scan import Scan
from inference import postprocess


@dataclass(frozen=True)
class Options:
    """How to run the network; `predict.Config` has these fields too."""

    batch_size: int = 8
    tile: bool = False
    uncertainty: bool = False


class Network(Protocol):
    """What computes probabilities: a Keras model or an `engines.Engine`."""

    def predict_on_batch(self, prepared: np.ndarray) -> np.ndarray:
        """Turn images (N, h, w, C) float32 in [0, 1] into probabilities (N, h, w, K)."""


Member = tuple[Network, dict[str, Any]]  # a network and its metadata


class Segmentation(NamedTuple):
    """What is found in one image."""

    probs: np.ndarray  # (H, W, K) float32, at the image's own size
    uncertainty: (
        np.ndarray | None
    )  # (H, W) float32, standard deviation over the votes, if asked for
    disagreement: float  # mean over the votes of 1 - Dice(vote, decision), if asked for, else NaN


def run_network(model: Network, prepared: np.ndarray) -> np.ndarray:
    """Run the network: prepared images (N, H, W, C) uint8 → probabilities (N, H, W, K) float32."""
    return np.asarray(model.predict_on_batch(prepared.astype(np.float32) / 255), np.float32)


def padded_size(shape: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Give the smallest size (H, W) that holds `shape` and that windows overlapping by half cover exactly."""
    return tuple(
        side + max(0, -(-(whole - side) // (side // 2))) * (side // 2)
        for whole, side in zip(shape, window, strict=True)
    )


def sliding_window(
    model: Network, prepared: np.ndarray, window: tuple[int, int], batch_size: int = 8
) -> np.ndarray:
    """Do as `infer` for images of a `tiled_size`: windows (h, w) that overlap by half, their middles counting most.

    A Gaussian of an eighth of the window weighs them (nnU-Net, Isensee et al. 2021).
    """
    bell = [
        np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2) for side in window
    ]
    weight = np.maximum(np.outer(*bell), 1e-4).astype(np.float32)[
        ..., None
    ]  # (h, w, 1); corners must count a little
    sizes = zip(prepared.shape[1:3], window, strict=True)
    starts = list(
        itertools.product(*(range(0, whole - side + 1, side // 2) for whole, side in sizes))
    )
    places = [
        (n, np.s_[y : y + window[0], x : x + window[1]])
        for n in range(len(prepared))
        for y, x in starts
    ]
    total, seen = None, np.zeros((*prepared.shape[:3], 1), np.float32)
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        probs = run_network(model, np.stack([prepared[n][place] for n, place in some]))
        total = (
            np.zeros((*prepared.shape[:3], probs.shape[-1]), np.float32) if total is None else total
        )
        for (n, place), prob in zip(some, probs, strict=True):
            total[n][place] += weight * prob
            seen[n][place] += weight
    return total / seen


def collect_votes(
    members: Sequence[Member], prepared: np.ndarray, config: Options
) -> tuple[np.ndarray, int]:
    """Ask every model, and again in the mirror where its file says so: votes (V, N, H, W, K), how many of them count.

    For the uncertainty of a single model the mirror is asked in any case; its vote then does not count.
    """
    votes, extra = [], []
    for model, metadata in members:
        window = tuple(metadata["image_size"])
        run = (
            partial(sliding_window, window=window, batch_size=config.batch_size)
            if config.tile
            else run_network
        )
        votes.append(run(model, prepared))
        swapped = mirrored_channels(metadata["classes"])
        if metadata.get("mirror") or (config.uncertainty and len(members) == 1):
            mirrored = run(model, np.ascontiguousarray(prepared[:, :, ::-1]))[:, :, ::-1]
            mirrored = mirrored if len(swapped) == 2 else mirrored[..., swapped]
            (votes if metadata.get("mirror") else extra).append(mirrored)
    return np.stack(votes + extra), len(votes)


def disagreement(votes: np.ndarray, decided: np.ndarray, threshold: float) -> float:
    """Average 1 - Dice between the foreground of each vote (V, H, W, K) and the decided class ids (H, W)."""
    found = [postprocess.to_ids(vote, threshold) for vote in votes]
    sums = [int((ids > 0).sum() + (decided > 0).sum()) for ids in found]
    hits = [int(((ids == decided) & (ids > 0)).sum()) for ids in found]
    return float(
        np.mean(
            [1 - 2 * hit / total if total else 0.0 for hit, total in zip(hits, sums, strict=True)]
        )
    )


def prepare_inputs(scan: Scan, size: tuple[int, int], metadata: dict[str, Any]) -> np.ndarray:
    """Make the network's inputs of a scan's slices, with their neighbours where the model wants them: (S, h, w, C)."""
    prepared = preprocess.prepare_scan(scan, size, metadata["channels"], metadata.get("window", ""))
    count, last = metadata.get("neighbours", 0), len(prepared) - 1
    near = [
        prepared[np.clip(np.arange(last + 1) + step, 0, last)] for step in range(-count, count + 1)
    ]
    return np.concatenate(near, axis=-1)


def segment_scans(
    members: Sequence[Member], scans: Sequence[Scan], config: Options = Options()
) -> Iterator[Segmentation]:
    """Segment decoded scans of any sizes, slice after slice, each at its own size."""
    metadata = members[0][1]
    if config.tile:
        for scan in scans:
            for prepared in prepare_inputs(scan, scan.pixels.shape[1:3], metadata):
                yield segment_tiled(members, prepared, config)
        return
    size = tuple(metadata["image_size"])
    shapes = [scan.pixels.shape[1:3] for scan in scans for _ in scan.pixels]
    prepared = np.concatenate(
        [prepare_inputs(scan, size, metadata) for scan in scans] or [np.zeros(0)]
    )
    for start in range(0, len(prepared), config.batch_size):
        votes, counted = collect_votes(members, prepared[start : start + config.batch_size], config)
        for i, shape in enumerate(
            shapes[start : start + config.batch_size]
        ):  # one by one: they may be large
            probs, spread, apart = aggregate(votes[:, i], counted, config, metadata)
            spread = (
                None if spread is None else preprocess.restore(spread[..., None], shape)[..., 0]
            )
            yield Segmentation(preprocess.restore(probs, shape), spread, apart)


def segment_tiled(members: Sequence[Member], prepared: np.ndarray, config: Options) -> Segmentation:
    """Segment a prepared slice (H, W, C) at its own resolution, padded with zeros so that windows cover it."""
    metadata, (height, width) = members[0][1], prepared.shape[:2]
    canvas = padded_size((height, width), tuple(metadata["image_size"]))
    padded = np.pad(prepared, ((0, canvas[0] - height), (0, canvas[1] - width), (0, 0)))
    votes, counted = collect_votes(members, padded[None], config)
    return Segmentation(*aggregate(votes[:, 0, :height, :width], counted, config, metadata))


def aggregate(
    votes: np.ndarray, counted: int, config: Options, metadata: dict[str, Any]
) -> Segmentation:
    """Average the first `counted` votes (V, H, W, K) of an image; where asked for, tell how far all votes are apart."""
    probs = votes[:counted].mean(0)
    if not config.uncertainty:
        return Segmentation(probs, None, float("nan"))
    apart = disagreement(
        votes, postprocess.to_ids(probs, metadata["threshold"]), metadata["threshold"]
    )
    return Segmentation(probs, votes.std(0).max(-1), apart)


class Prediction(NamedTuple):
    """What is found in one scan."""

    ids: np.ndarray  # (S, H, W) class ids
    uncertainty: np.ndarray | None  # (S, H, W), if asked for
    disagreement: float  # mean over the slices


def to_volume(results: Iterator[Segmentation], count: int, metadata: dict[str, Any]) -> Prediction:
    """Take the next `count` slices of `segment`, decided and put together."""
    ids, spreads, apart = [], [], []
    for result in itertools.islice(results, count):
        ids.append(postprocess.decide(result.probs, metadata))
        spreads.append(result.uncertainty)
        apart.append(result.disagreement)
    return Prediction(
        np.stack(ids), None if spreads[0] is None else np.stack(spreads), float(np.mean(apart))
    )
