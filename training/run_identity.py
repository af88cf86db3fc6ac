"""What makes a run this very run: its settings, the source that trained it, and its data.

`config` is a `train.Config` throughout. The same command goes on with a run, or finds it finished,
only if all three are the same.
"""

import ast
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import utils
from dataset.fingerprints import fingerprint
from dataset.layouts import Pair
from dataset.split_table import Row, files_of, make_rows
from networks.own import find_code, is_own
from utils import UserError

# Fields that may change between a run and its continuation.
NON_TRAINING_FIELDS = ("out_dir", "mirror")
# Fields that name the data, whose content is compared.
DATA_FIELDS = {"data_dir", "extra_dir"}
# The source that decides what a network learns, except files that only report or write.
SOURCE = (
    "train.py",
    "model.py",
    "metrics.py",
    "data.py",
    "dataset",
    "imaging",
    "inference/sampler.py",
    "inference/windows.py",
    "networks",
    "training",
)
NOT_DECISIVE = {
    "dataset/download.py",
    "dataset/fingerprints.py",
    "dataset/layouts/passed_over.py",
    "dataset/layouts/unknown.py",
    "dataset/layouts/unmatched.py",
    "dataset/notes.py",
    "dataset/report",
    "dataset/run_split.py",
    "dataset/split_table.py",
    "imaging/plots.py",
    "training/checks.py",
    "training/cross_validation.py",
    "training/run_identity.py",
}
MAX_NAMED = 3  # files in a message


# -------------------------------------------------------------------------------------- settings


def training_fields(config: Any) -> dict[str, Any]:
    """Keep the fields on which the result depends; the optimizer counts as one."""
    fields = dataclasses.asdict(config)
    for name in NON_TRAINING_FIELDS:
        del fields[name]
    for name in ("patch_size", "dimensions", "spacing"):
        fields[name] = str(fields[name])
    fields |= {"optimizer": "Muon", "image_size": list(utils.parse_size(config.image_size))}
    start = Path(config.init_weights)
    return fields | {"init_weights content": fingerprint(start) if start.is_file() else ""}


def changed_fields(config: Any, then: dict[str, Any]) -> list[str]:
    """Name the fields that differ from those of the run; more epochs are the same run."""
    now = training_fields(config)
    if isinstance(then.get("image_size"), int):  # before networks could be rectangular
        then = then | {"image_size": list(utils.parse_size(then["image_size"]))}
    # A field that the run's version did not have, or that is no more, decides nothing.
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    # Weights that are gone by now were those that it started from.
    if not then.get("init_weights content") or not now["init_weights content"]:
        del now["init_weights content"]
    then = defaults | then
    changed = [name for name in now if now[name] != then.get(name)]
    if "epochs" in changed and now["epochs"] > then["epochs"]:
        changed.remove("epochs")
    return changed


# ---------------------------------------------------------------------------------------- source


def source_hashes(root: Path = utils.ROOT, architecture: str = "") -> dict[str, str]:
    """Return a hash of each source file, by its path; comments and docstrings do not count.

    architecture: its file counts, too, if it is the user's own. The defaults in `train.Config` do
    not count: they are settings.
    """
    hashes = {}
    if is_own(architecture):
        code = find_code(architecture)
        hashes[f"architecture {code.name}"] = hashlib.sha256(code.read_bytes()).hexdigest()[:16]
    for path in _source_files(root):
        name = path.relative_to(root).as_posix()
        content = path.read_bytes()
        try:
            tree = _without_docstrings(ast.parse(content))
        except (SyntaxError, ValueError):
            pass  # a draft that nothing imports
        else:
            if name == "train.py":
                tree.body = [node for node in tree.body if getattr(node, "name", "") != "Config"]
            content = ast.unparse(tree).encode()
        hashes[name] = hashlib.sha256(content).hexdigest()[:16]
    return hashes


def _source_files(root: Path) -> Iterator[Path]:
    for name in SOURCE:
        files = [root / name] if name.endswith(".py") else sorted((root / name).rglob("*.py"))
        for path in files:
            name = path.relative_to(root)
            if NOT_DECISIVE.isdisjoint({name.as_posix(), name.parent.as_posix()}):
                yield path


def _without_docstrings(tree: ast.Module) -> ast.Module:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def changed_source(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Name the source files that differ from those of the run; none if the run is an older one."""
    if not then:
        return []
    return [name for name in now | then if now.get(name) != then.get(name)]


# ------------------------------------------------------------------------------------------ data


def changed_data(rows: Sequence[Row], pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """Compare the data with the run's: name the files that changed, and the images that are new.

    Data that were moved are the same. Raises UserError if an image of the run is gone.
    """
    if not all(row.fingerprints for row in rows):  # of version 1
        return [], []
    now = make_rows(pairs, ["train"] * len(pairs))
    keys = {row.key for row in now}
    by_path = {row.pair.image.absolute(): row for row in now}
    changed, known = [], {row.key for row in rows}
    for row in rows:
        if row.key in keys:
            continue
        other = by_path.get(row.pair.image.absolute())
        if other is None:
            raise UserError(gone(row.pair.image))
        changed.append(_first_difference(row, other))
    old_images = {row.pair.image.absolute() for row in rows}
    added = []
    for row in now:
        if row.key not in known and row.pair.image.absolute() not in old_images:
            added.append(str(row.pair.image))
    return changed, added


def is_same_data(rows: Sequence[Row], pairs: Sequence[Pair]) -> bool:
    """Say whether pairs are those of the run, wherever their folder is."""
    known = Counter(row.key for row in rows if row.fingerprints)
    return known == Counter(row.key for row in make_rows(pairs, ["train"] * len(pairs)))


def _first_difference(then: Row, now: Row) -> str:
    """Name the file in which two rows of one image differ."""
    old = dict(zip(files_of(then.pair), then.fingerprints, strict=True))
    new = dict(zip(files_of(now.pair), now.fingerprints, strict=True))
    by_name = {path.absolute(): mark for path, mark in old.items()}
    for path, mark in new.items():
        if by_name.get(path.absolute()) != mark:
            return str(path)
    return str(now.pair.image)


def gone(image: Path) -> str:
    """Say that an image of a run is not there any more, and what to do."""
    return (
        f"split.csv names {image}, which is gone; put it back, name another --out-dir, or remove "
        "the run's folder to start anew"
    )


def shorten(names: Sequence[str]) -> str:
    """Join names, of many the first."""
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
