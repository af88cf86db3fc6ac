"""Segment an archive, a folder or a bucket of any number of images, on every machine of a Ray cluster.

    python archive.py --input scans --output masks                 on this machine
    RAY_ADDRESS=head:6379 python archive.py --input s3://bucket/scans --output s3://bucket/masks

A mask is a PNG (0/255 for one class, else ids) at the image's place below the output: ward1/a.dcm → ward1/a.png. It
appears whole or not at all, so the same command goes on where it was stopped. A worker or a machine that dies is made
up for; what cannot be segmented is listed in problems.csv there, and the exit code is then 2.

Needs `pip install -r requirements-archive.txt`, on every machine, and there this repository at the same path.
"""

import csv
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from pyarrow import fs
from tqdm import tqdm

import utils
from imaging import pictures
from imaging.files import SUFFIXES, is_image
from inference import engines
from inference.exported_model import load_exported
from utils import UserError, atomic, first_line

if __name__ == "__main__":
    utils.require("ray", "requirements-archive.txt")

READERS = (
    8  # files that a worker reads or writes at once, so that a bucket's answers are not waited for
)
NOTE = "archive.json"  # in the output
UNFINISHED = re.compile(r"(^|/)\.\d+\.[^/]+$")  # names that `images.atomic` gives
RETRIES = 3  # of a task whose worker died; an image that kills its worker must not do so for ever


@dataclass(frozen=True)
class Config:
    """What is segmented, with what, where to, by how many."""

    input: str  # a folder, or a bucket's URL such as s3://bucket/scans; folders in it are searched
    output: str  # where the masks go; what is there already is not made again
    model: str = "export/unet.onnx"  # what `python export.py` wrote
    engine: str = "auto"  # as in predict.py, chosen here and the same on every machine
    precision: str = (
        "auto"  # likewise; auto is float32 where the manifest lacks a machine's kind of processor
    )
    workers: int = (
        0  # at most; 0 is what the machines' CPUs allow, also those of machines that join later
    )
    cpus: int = 1  # of a worker
    batch: int = 64  # images in a task; a worker that dies loses at most these


class Place:
    """A folder on a disk or in a bucket."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, self.root = fs.FileSystem.from_uri(
                url if "://" in url else Path(url).resolve()
            )
        except (pa.ArrowException, ValueError, ImportError) as error:
            raise UserError(
                f"{url} cannot be opened ({first_line(error)}); expected a folder or a URL"
            ) from None
        self.root = self.root.rstrip("/")

    def names(self, missing_ok: bool = False) -> Iterator[str]:
        """List the files in it and its folders, by their paths below it."""
        try:
            there = self.files.get_file_info(fs.FileSelector(self.root, missing_ok, recursive=True))
        except OSError as error:
            raise UserError(
                f"{self.url} cannot be listed ({first_line(error)}); expected a folder"
            ) from None
        for found in there:
            if found.type == fs.FileType.File:
                try:
                    path = found.path
                except (
                    UnicodeDecodeError
                ) as error:  # by this name it will not be found, but be a problem
                    path = error.object.decode(errors="backslashreplace")
                yield path[len(self.root) + 1 :]

    def read(self, name: str) -> bytes:
        """Read a file."""
        with self.files.open_input_stream(f"{self.root}/{name}") as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, as buckets do anyway."""
        path = f"{self.root}/{name}"
        if isinstance(self.files, fs.LocalFileSystem):
            with atomic(path) as temporary:
                temporary.write_bytes(content)
        else:
            with self.files.open_output_stream(path) as stream:
                stream.write(content)


class Worker:
    """A process somewhere in the cluster that holds the network."""

    def __init__(
        self,
        source: Place,
        target: Place,
        model: dict[str, bytes],
        cpus: int,
        kind: tuple[str, str],
    ) -> None:
        cv2.setNumThreads(cpus)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in model.items():
                (Path(folder) / name).write_bytes(content)
            self.network, self.run = load_exported(Path(folder) / next(iter(model)), cpus, *kind)
        self.source, self.target = source, target
        self.computing, self.pool = Lock(), ThreadPoolExecutor(READERS)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write the masks of images: what went wrong with each, or nothing."""
        return {
            "image": batch["image"],
            "problem": list(self.pool.map(self.attempt, batch["image"], batch["mask"])),
        }

    def attempt(self, image: str, mask: str) -> str:
        """Write one image's mask, or tell why not."""
        try:
            content = self.source.read(image)
            with self.computing:  # by one thread, which the worker has the CPUs for
                prepared = self.network.read(content)
                found = self.network.decide(self.run(prepared.batch), prepared)
                png = pictures.mask_to_png(found.ids, self.network.metadata["classes"])
            self.target.write(mask, png)
        except UserError as error:
            return str(error.args[-1])
        except Exception as error:  # whatever it is: the other images are to be done
            return first_line(error)
        return ""


def plan(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Give each mask its image, and the images without one their problem."""
    wanted: dict[str, str] = {}
    problems: dict[str, str] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if not is_image(path):
            continue
        mask = name[: -len(".nii.gz" if name.lower().endswith(".nii.gz") else path.suffix)] + ".png"
        if wanted.setdefault(mask, name) != name:
            problems[name] = f"{wanted[mask]} has the same name, and the mask"
    return wanted, problems


def segment(
    config: Config,
    places: tuple[Place, Place],
    model: dict[str, bytes],
    kind: tuple[str, str],
    todo: dict[str, str],
    batch: int,
) -> Iterator[tuple[str, str]]:
    """Write the masks of `todo`, {mask: image}, `batch` to a task: (image, what went wrong), as they end."""
    import ray

    paths = pa.table({"mask": list(todo), "image": list(todo.values())})
    blocks = [paths.slice(start, batch).combine_chunks() for start in range(0, len(paths), batch)]
    results = ray.data.from_arrow(blocks).map_batches(
        Worker,
        fn_constructor_args=(*places, model, config.cpus, kind),
        batch_size=None,  # a block
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.workers or None),
        num_cpus=config.cpus,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    for rows in results.iter_batches(batch_size=None):
        yield from zip(rows["image"], rows["problem"], strict=True)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine's CPUs. Raises UserError without Ray."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # or it tells its makers
    alone = not os.environ.get("RAY_ADDRESS")
    if alone:
        # As where clusters are not supported, it then listens on 127.0.0.1 alone; and wants this user's token.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    try:
        import ray.data
    except ImportError:
        raise UserError("Ray is not installed: pip install -r requirements-archive.txt") from None
    if ray.is_initialized():
        return
    warnings.filterwarnings(
        "ignore", "`ray_remote_args` is deprecated"
    )  # until 2.64; nothing else bounds RETRIES
    ray.init("local" if alone else None, include_dashboard=False, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    context.max_errored_blocks = -1  # a task that is given up shall not stop the others


def kinds_of_cpu() -> set[str]:
    """Ask the cluster's machines that compute for their kinds of processor."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(utils.kind_of_cpu)
    nodes = [
        node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")
    ]
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    return set(ray.get([ask.options(scheduling_strategy=place).remote() for place in places]))


def load_for_all(config: Config) -> tuple[engines.Engine, str]:
    """Load the network in a precision that all machines of the cluster may use; also its checksum. Raises UserError."""
    path = Path(config.model)
    opened, _, sha256 = engines.load_engine(path, config.engine, config.precision, 1)
    if opened.precision == "float32" or not os.environ.get("RAY_ADDRESS"):
        return opened, sha256
    connect()
    name, known = (
        f"{opened.engine} {opened.precision}",
        json.loads(path.with_name("manifest.json").read_text()),
    )
    lacking = [
        kind
        for kind in sorted(kinds_of_cpu())
        if known["precisions"].get(kind, {}).get(name, 0) < engines.MIN_DICE_VS_FLOAT32
    ]
    if not lacking:
        return opened, sha256
    told = f"{name} may not be used on {', '.join(lacking)}, by {path.with_name('manifest.json')}"
    if config.precision != "auto":
        raise UserError(
            f"{told}; take --precision float32, or run gate.py there and add what it notes to this file"
        )
    print(f"{told}; float32 instead")
    opened, _, sha256 = engines.load_engine(path, config.engine, "float32", 1)
    return opened, sha256


def check_places(source: Place, target: Place) -> None:
    """Raise UserError if masks would come to lie among the images."""
    inner, outer = sorted((f"{source.root}/", f"{target.root}/"), key=len, reverse=True)
    if source.files.type_name == target.files.type_name and inner.startswith(outer):
        raise UserError(f"{inner} is in {outer}; name another --output, where no images are")


def check_model(target: Place, there: set[str], sha256: str, kind: tuple[str, str]) -> None:
    """Raise UserError if the masks there are another model's, or of another precision; note whose they will be."""
    note = json.dumps({"model_sha256": sha256, "engine": kind[0], "precision": kind[1]}).encode()
    if NOTE not in there:
        target.write(NOTE, note)
    elif target.read(NOTE) != note:
        raise UserError(
            f"{target.root} holds masks of another model or precision ({NOTE}); name another --output"
        )


def main(config: Config) -> None:
    """Segment what has no mask yet; list what could not be. Raises UserError at the end if there is any."""
    if min(config.cpus, config.batch) < 1 or config.workers < 0:
        raise UserError("expected cpus and batch of at least 1, workers of at least 0")
    path, source, target = Path(config.model), Place(config.input), Place(config.output)
    opened, sha256 = load_for_all(config)  # what is wrong is told before all else
    kind = opened.engine, opened.precision
    print(f"{path}: {', '.join(kind)}")
    check_places(source, target)
    wanted, problems = plan(list(source.names()))
    if not wanted:
        raise UserError(
            f"{config.input} has no image; expected files ending in {' '.join(SUFFIXES)}"
        )
    there = set(target.names(missing_ok=True))
    for name in filter(UNFINISHED.search, there):  # of workers that were killed
        target.files.delete_file(f"{target.root}/{name}")
    check_model(target, there, sha256, kind)
    todo = {mask: image for mask, image in wanted.items() if mask not in there}
    names = [path.name, "manifest.json", *([f"{path.stem}-int8.onnx"] if kind[1] == "int8" else [])]
    model = {name: path.with_name(name).read_bytes() for name in names}  # so no disk need be shared
    if todo:
        connect()
    with tqdm(
        total=len(wanted), initial=len(wanted) - len(todo), unit="image", mininterval=1
    ) as bar:
        for batch in (
            config.batch,
            1,
        ):  # again one by one what was lost with workers that a single image killed
            if not todo:
                break
            ended = set()
            for image, problem in segment(config, (source, target), model, kind, todo, batch):
                ended.add(image)
                problems |= {image: problem} if problem else {}
                bar.update()
            todo = {mask: image for mask, image in todo.items() if image not in ended}
    problems |= dict.fromkeys(todo.values(), f"its worker died, {RETRIES + 1} times")
    table = io.StringIO()
    csv.writer(table).writerows([("image", "problem"), *sorted(problems.items())])
    target.write("problems.csv", table.getvalue().encode())
    print(f"{sum(image not in problems for image in wanted.values())} masks in {config.output}")
    if problems:
        raise UserError(f"{len(problems)} file(s) left out, see problems.csv in {config.output}")


if __name__ == "__main__":
    utils.run_script(main, Config, utils.RESUMES)
