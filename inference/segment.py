"""Segment decoded images with one model or several: from a `Scan` to class ids on its own grid."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from imaging import preprocess
from imaging.grid import Grid
from imaging.labels import Classes, mirrored_outputs
from imaging.lazy import part_of
from imaging.scan import Scan
from inference import postprocess, quality
from inference.sampler import Sampler
from inference.windows import Band, Windows
from utils import UserError


@dataclass(frozen=True)
class Options:
    """How to run the network."""

    batch_size: int = 8  # windows at once
    tile: bool = False  # windows at the image's own resolution instead of one scaled image
    uncertainty: bool = False  # also compute where the votes differ
    probabilities: bool = False  # also return the probabilities, which need much memory


DEFAULT_OPTIONS = Options()


class Network(Protocol):
    """What computes probabilities: a Keras model or an `engines.Engine`."""

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Turn images (N, [d,] h, w, C) float32 in [0, 1] into probabilities (N, [d,] h, w, K)."""


Member = tuple[Network, dict[str, Any]]  # a network and its metadata


class Prediction(NamedTuple):
    """What is found in one scan."""

    ids: np.ndarray  # (S, H, W) uint8 class ids
    uncertainty: np.ndarray | None  # (S, H, W) float32: standard deviation over the votes
    disagreement: float  # 1 - Dice between votes and result, mean over votes and slices, or NaN
    quality: quality.Quality | None  # None if the model file does not say how to judge
    probs: np.ndarray | None  # (S, H, W, K) float32


def segment_scans(
    members: Sequence[Member], scans: Sequence[Scan], options: Options = DEFAULT_OPTIONS
) -> list[Prediction]:
    """Segment scans of any sizes with the mean of all members; windows of several share a batch.

    Only the class ids are kept of all slices, unless options ask for more.
    """
    metadata = members[0][1]
    prepared = [prepare(scan, metadata, options.tile) for scan in scans]
    votes, num_averaged = start_votes(members, [windows for _, windows in prepared], options)
    found = []
    for grid, windows in prepared:
        bands = zip(*(windows.blend(vote) for vote in votes), strict=False)
        found.append(decide_scan(bands, num_averaged, grid, metadata, options, windows.case))
    return found


def prepare(scan: Scan, metadata: dict[str, Any], tile: bool = False) -> tuple[Grid, Windows]:
    """Prepare a scan for a network: how it lies in the working array, and that array's windows."""
    sampler = Sampler.from_metadata(metadata, tile)
    check_scan(scan, metadata)
    grid = sampler.grid(scan)
    case = preprocess.prepare_scan(scan, grid, metadata["channels"], metadata.get("window", ""))
    return grid, Windows(case, sampler)


def check_scan(scan: Scan, metadata: dict[str, Any]) -> None:
    """Raise UserError for a single slice or channel where the network takes several.

    What is in files of its own is not shown three times, as grey is where colour is expected.
    """
    if len(scan.pixels) == 1 and Sampler.from_metadata(metadata).dimensions == 3:
        raise UserError("one slice; this network takes volumes")
    if metadata.get("channel_endings"):
        preprocess.check_channels(scan.colours.shape[-1], metadata["channels"])


def prepare_inputs(scan: Scan, metadata: dict[str, Any]) -> np.ndarray:
    """Make all network inputs of a scan: its windows (N, …, C), uint8."""
    return np.stack(list(prepare(scan, metadata)[1]))


def take_middle(
    scan: Scan, metadata: dict[str, Any], max_windows: int, max_slices: int | None = None
) -> Scan:
    """Take what is in the middle of a scan, where checks need no more.

    max_windows: along each side, of a network of patches. max_slices: of a network of slices.
    """
    sampler = Sampler.from_metadata(metadata)
    grid = sampler.grid(scan)
    chosen = [slice(None)] * 3
    for number, axis in enumerate(grid.axes):
        length = grid.oriented[number]
        most = None
        if number == 0 and sampler.dimensions == 2:
            most = max_slices
        elif sampler.patches:
            voxels = sampler.window[number] * length / grid.inner[number]
            most = math.ceil(max_windows * voxels)
        if most and most < length:
            start = (length - most) // 2
            chosen[axis] = slice(start, start + most)
    padding = None if scan.padding is None else scan.padding[tuple(chosen)]
    return replace(scan, pixels=part_of(scan.pixels, tuple(chosen)), padding=padding)


# ------------------------------------------------------------------------- running the network


def run_network(network: Network, prepared: np.ndarray) -> np.ndarray:
    """Run the network: windows (N, …, C) uint8 → probabilities (N, …, K) float32."""
    images = prepared.astype(np.float32) / 255
    return np.asarray(network.predict_on_batch(images), np.float32)


def run_windows(
    network: Network, windows: Sequence[Windows], batch_size: int, mirror: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Give the probabilities (…, K) of all windows of several scans, in order, batch by batch.

    mirror: see `mirrored_outputs`; with it the windows are mirrored, and what is found mirrored
    back.
    """
    images = itertools.chain.from_iterable(windows)
    while batch := list(itertools.islice(images, batch_size)):
        if mirror is None:
            yield from run_network(network, np.stack(batch))
        else:
            flipped = np.stack([image[..., ::-1, :] for image in batch])
            yield from run_network(network, flipped)[..., ::-1, :][..., mirror]


# ---------------------------------------------------------------------------- votes and result


def start_votes(
    members: Sequence[Member], windows: Sequence[Windows], options: Options
) -> tuple[list[Iterator[np.ndarray]], int]:
    """Run every member, and again on the mirrored windows if its metadata asks for that.

    Returns the votes and how many of them, the first ones, are averaged. The uncertainty of a
    single model needs a mirrored vote in any case, which is not averaged then.
    """
    averaged, others = [], []
    for network, metadata in members:
        averaged.append(run_windows(network, windows, options.batch_size))
        if metadata.get("mirror") or (options.uncertainty and len(members) == 1):
            mirror = mirrored_outputs(metadata)
            vote = run_windows(network, windows, options.batch_size, mirror)
            (averaged if metadata.get("mirror") else others).append(vote)
    return averaged + others, len(averaged)


def decide_scan(
    bands: Iterator[tuple[Band, ...]],
    num_averaged: int,
    grid: Grid,
    metadata: dict[str, Any],
    options: Options = DEFAULT_OPTIONS,
    case: np.ndarray | None = None,
) -> Prediction:
    """Decide a scan by its votes, each in bands: class ids on the file's own grid.

    num_averaged: how many votes, the first ones, are averaged. case: the prepared scan, by which
    the mask's quality is judged.
    """
    classes, threshold = Classes.from_metadata(metadata), metadata["threshold"]
    count = classes.num_channels
    counter = Disagreement(threshold, classes.overlap) if options.uncertainty else None
    ids = np.zeros(grid.oriented, classes.dtype)
    spread = np.zeros(grid.oriented, np.float32) if options.uncertainty else None
    kept = np.zeros((*grid.oriented, count), np.float32) if options.probabilities else None
    means = average(bands, num_averaged, counter)
    evidence = quality.collect(case, metadata)
    if evidence:
        means = evidence.watch(means)
    channels = count + bool(options.uncertainty)
    means = (band._replace(probs=band.probs[..., :channels]) for band in means)
    for number, row, values in restore(means, grid):
        rows = slice(row, row + len(values))
        ids[number, rows] = postprocess.to_ids(values[..., :count], threshold, classes.overlap)
        if spread is not None:
            spread[number, rows] = values[..., count]
        if kept is not None:
            kept[number, rows] = values[..., :count]
    ids, spread, kept = (
        array if array is None else grid.restore_orientation(array) for array in (ids, spread, kept)
    )
    clean(ids, grid, metadata)
    judged = quality.judge(evidence, metadata) if evidence else None
    return Prediction(ids, spread, counter.mean if counter else float("nan"), judged, kept)


def clean(ids: np.ndarray, grid: Grid, metadata: dict[str, Any]) -> None:
    """Clean class ids (S, H, W) on the file's own grid, in place, as the model file says.

    The network's slices one by one, or the volume if the network is 3-D.
    """
    if metadata.get("clean"):
        is_volume = Sampler.from_metadata(metadata).dimensions == 3
        postprocess.clean(grid.orient(ids), metadata["clean"], is_volume)


def average(
    bands: Iterator[tuple[Band, ...]], num_averaged: int, counter: "Disagreement | None"
) -> Iterator[Band]:
    """Average the first votes of each band. Of several the last channel is their spread."""
    for votes in bands:
        if len(votes) == 1 and not counter:
            yield votes[0]
            continue
        probs = np.stack([vote.probs for vote in votes])
        mean = probs[0] if num_averaged == 1 else probs[:num_averaged].mean(0)
        if counter:
            counter.add(votes[0].slice, probs, mean)
        if len(votes) > 1:
            mean = np.concatenate([mean, probs.std(0).max(-1)[..., None]], axis=-1)
        yield Band(votes[0].slice, votes[0].row, mean)


def restore(bands: Iterator[Band], grid: Grid) -> Iterator[Band]:
    """Bring bands of the working array to the file's own voxels: bands, or whole slices."""
    if grid.is_native:
        yield from bands
        return
    for band in grid.restore_bands(join_bands(bands)):
        yield Band(*band)


def join_bands(bands: Iterator[Band]) -> Iterator[np.ndarray]:
    """Join the bands of each slice: (H, W, K)."""
    for _, parts in itertools.groupby(bands, lambda band: band.slice):
        rows = [band.probs for band in parts]
        yield rows[0] if len(rows) == 1 else np.concatenate(rows)


class Disagreement:
    """Average 1 - Dice between the mask of each vote and the decided one, over votes and slices."""

    def __init__(self, threshold: float | list[float], overlap: bool) -> None:
        self.threshold, self.overlap = threshold, overlap
        # Of each slice: pixels in both masks, and in one or the other, by vote.
        self.hits: dict[int, np.ndarray] = {}
        self.totals: dict[int, np.ndarray] = {}

    def add(self, number: int, votes: np.ndarray, mean: np.ndarray) -> None:
        """Count some rows of a slice: votes (V, rows, W, K), and what is decided by their mean."""
        decided = postprocess.to_ids(mean, self.threshold, self.overlap)
        hits, totals = [], []
        for vote in votes:
            ids = postprocess.to_ids(vote, self.threshold, self.overlap)
            hits.append(int(((ids == decided) & (ids > 0)).sum()))
            totals.append(int((ids > 0).sum() + (decided > 0).sum()))
        self.hits[number] = self.hits.get(number, 0) + np.array(hits)
        self.totals[number] = self.totals.get(number, 0) + np.array(totals)

    @property
    def mean(self) -> float:
        """The average; two empty masks agree."""
        hits, totals = (np.stack(list(one.values())) for one in (self.hits, self.totals))
        return float(np.mean(np.where(totals > 0, 1 - 2 * hits / np.maximum(totals, 1), 0.0)))
