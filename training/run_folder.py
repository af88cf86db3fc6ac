"""The run folder: what a run writes, and how a stopped run goes on.

`config` is a `train.Config` throughout. `state.weights.h5` holds weights, optimizer and the
finished epochs; everything else follows from it. It is written first, so a run that is killed at
any moment goes on from it.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

import utils
from dataset.layouts import Pair
from dataset.pairs import KEPT_APART
from dataset.split_table import make_rows, mark_split, read_rows, write_split
from inference.sampler import Sampler
from training import run_identity
from utils import UserError, atomic

STATE = "state.weights.h5"
SMOOTHING = 0.9  # of the validation Dice: the share of the earlier epochs
RUN_FILES = (
    STATE,
    "model.h5",
    "model_network.py",
    "config.json",
    "split.csv",
    "log.csv",
    "curves.png",
    "metrics.csv",
)
Epoch = dict[str, float]  # a row of log.csv


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other trainings away from a run folder. Raises UserError if one writes to it."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another training writes to {folder}; wait for it, or name another --out-dir"
            ) from None
        except OSError:
            pass  # a network's file system without locks
        yield
    finally:
        os.close(descriptor)


def read_history(
    folder: Path, config: Any, find_pairs: Callable[[], Sequence[Pair]]
) -> list[Epoch]:
    """Read the finished epochs of the run in `folder`.

    find_pairs: lists the data, and is called if settings and source are those of the run. Returns
    no epochs if there is no run, or if its settings, source or data were others. Raises UserError
    if the state is damaged, or the best epoch's model or an image is gone.
    """
    path, model = folder / STATE, folder / "model.h5"
    if not path.is_file():
        return []
    try:
        with h5py.File(path) as file:
            progress = json.loads(file.attrs["progress"])
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start anew") from None
    history = progress["history"]
    is_finished = len(history) >= config.epochs
    changed = run_identity.changed_fields(config, progress["config"])
    if set(changed) <= run_identity.DATA_FIELDS:
        now = run_identity.source_hashes(architecture=config.architecture)
        changed += run_identity.changed_source(progress.get("source", {}), now)
    if set(changed) <= run_identity.DATA_FIELDS:
        changed = _changed_data(folder, find_pairs, changed, is_finished)
    if changed:
        names = run_identity.shorten(changed)
        print(f"{folder}: {names} changed; a new run starts, the old one is kept")
        return []
    if not model.is_file() and best_epoch(history) < len(history):
        raise UserError(
            f"{model}, the model of the best epoch, is gone; put it back, or remove {folder} to "
            "start anew"
        )
    return history


def _changed_data(
    folder: Path, find_pairs: Callable[[], Sequence[Pair]], renamed: list[str], is_finished: bool
) -> list[str]:
    """Name the data that changed since the run; `renamed` fields name another folder for them.

    Images that are added to a run that is not finished take no part in it.
    """
    if not (folder / "split.csv").is_file():
        return renamed
    rows, pairs = read_rows(folder / "split.csv"), find_pairs()
    if renamed:
        return [] if run_identity.is_same_data(rows, pairs) else renamed
    changed, added = run_identity.changed_data(rows, pairs)
    if is_finished:
        changed += [f"{name} (new)" for name in added]
    elif added and not changed:
        print(f"{folder}: {run_identity.shorten(added)} came later and take no part in this run")
    return changed


def is_complete(folder: Path, config: Any, history: list[Epoch]) -> bool:
    """Say whether nothing is left to do in `folder`; else remove what a crash left half-written."""
    for leftover in folder.glob(".[0-9]*.h5"):
        leftover.unlink()
    written = all((folder / name).is_file() for name in ("model.h5", "curves.png"))
    if len(history) < config.epochs or not written:
        return False
    utils.update_metadata(folder / "model.h5", mirror=config.mirror)
    write_config(folder, config)
    print(
        f"{folder} holds this run, finished; another run starts after a change of settings, "
        "code or data, or with another --out-dir"
    )
    return True


def start(folder: Path, config: Any, pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Start a run: put an earlier one aside, write its split and config."""
    archive_previous_run(folder)
    # Images that take no part are no new ones when the command comes again.
    write_split(folder / "split.csv", pairs, [subset or KEPT_APART for subset in subsets])
    write_config(folder, config)


def resume(folder: Path, config: Any, pairs: Sequence[Pair]) -> list[str]:
    """Go on with a run: return the subset of each pair, "" for pairs that are new.

    Raises UserError if an image of the run is gone.
    """
    rows = read_rows(folder / "split.csv")
    keys = [row.key for row in make_rows(pairs, ["train"] * len(pairs))]
    subset_of: dict[Any, str] = {}
    for row in rows:
        subset_of[row.key if row.fingerprints else row.pair.image.absolute()] = row.subset
    # Black slices of two patients may have one key; where they lie tells them apart.
    unmoved = {(row.key, row.pair.image.absolute()): row.subset for row in rows}
    subsets = []
    for pair, key in zip(pairs, keys, strict=True):
        image = pair.image.absolute()
        subsets.append(unmoved.get((key, image), subset_of.get(key, subset_of.get(image, ""))))
    gone = set(subset_of) - set(keys) - {pair.image.absolute() for pair in pairs}
    for row in rows:
        if row.key in gone or row.pair.image.absolute() in gone:
            raise UserError(run_identity.gone(row.pair.image))
    if any(row.fingerprints for row in rows):
        # The data may have been moved.
        write_split(folder / "split.csv", pairs, [subset or KEPT_APART for subset in subsets])
    write_config(folder, config)
    return subsets


def go_on(folder: Path) -> str:
    """Take a run for unfinished from now on; return by what its model file knows its split."""
    (folder / "curves.png").unlink(missing_ok=True)  # drawn when all else is done
    mark = mark_split(read_rows(folder / "split.csv"))
    if (folder / "model.h5").is_file():
        utils.update_metadata(folder / "model.h5", split=mark)
    return mark


def read_input(folder: Path | None) -> tuple[Sampler | None, int]:
    """Read what the network of a run takes: sampler and channels; None and 0 for no model."""
    path = folder / "model.h5" if folder else None
    if path is None or not utils.is_model_file(path):
        return None, 0
    metadata = utils.load_metadata(path)
    return Sampler.from_metadata(metadata), metadata["channels"]


def write_config(folder: Path, config: Any) -> None:
    """Write config.json, which says what the folder holds."""
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2))


def archive_previous_run(folder: Path) -> None:
    """Move an earlier run's files to `folder`/previous1 (2, 3 …): no trained model is lost."""
    if not (folder / "model.h5").is_file():
        return
    number = next(i for i in itertools.count(1) if not (folder / f"previous{i}").exists())
    previous = folder / f"previous{number}"
    previous.mkdir()
    print(f"{folder}: the files of the earlier run are now in {previous}")
    for name in RUN_FILES:
        if (folder / name).is_file():
            (folder / name).replace(previous / name)


def best_epoch(history: list[Epoch]) -> int:
    """Number of the epoch with the highest smoothed validation Dice, from 1; the last without any.

    Smoothed as by nnU-Net (Isensee et al. 2021): the Dice of a single epoch on few images is partly
    chance. It starts from 0, because a network that finds nothing yet is right on empty masks.
    Among equals it is the epoch with the lowest loss: while all masks are empty, each Dice is 0.
    """
    smoothed, merits = 0.0, []
    for epoch in history:
        dice = epoch.get("val_dice", epoch["epoch"])
        smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * dice
        merits.append((smoothed, -epoch.get("val_loss", 0.0), epoch["epoch"]))
    return max(merits)[-1]
