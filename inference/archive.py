"""Segment an archive of any number of images on every machine of a Ray cluster.

    python -m inference.archive --input scans --output masks              on this machine
    RAY_ADDRESS=head:6379 python -m inference.archive \\
        --input s3://bucket/scans --output s3://bucket/masks              on a cluster

Run it in the repository's folder. Other machines need the repository at the same path, and all of
them `pip install -r requirements-archive.txt`.

A mask is a PNG (0/255 for one class, else class ids) at the image's place: ward1/a.dcm becomes
ward1/a.png below the output. A mask of a NIfTI, NRRD or MetaImage file is of the same kind and has
all slices: ward1/b.nii.gz. A network that looks at several slices takes the DICOM files of a folder
as one volume, and writes a DICOM segmentation: ward1/ct/1.dcm, 2.dcm … become ward1/ct.dcm.
Channels in files of their own are joined. The same command goes on where it was stopped. If a
worker or a machine dies, others do its images. Images that cannot be segmented are listed in
problems.csv there; the exit code is then 2.
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
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

import utils
from imaging import formats
from imaging.formats import SUFFIXES
from imaging.labels import Classes
from imaging.scan import OVERLAPPING, Mask
from inference import engines
from inference.archive_items import Item, mask_format, plan_masks, read_joined
from inference.exported_model import load_exported
from inference.inputs import describe_passed_over
from inference.storage import Folder
from utils import UserError, counted, first_line

# Files that a worker reads or writes at once: a bucket takes long to answer.
FILES_AT_ONCE = 8
# Note in the output: whose masks these are.
NOTE = "archive.json"
MAX_SLICES = 65_535  # of a volume
# Names that `utils.atomic` gives.
UNFINISHED = re.compile(r"(^|/)\.\d+\.[^/]+$")
# Retries of a task whose worker died. An image that kills its worker must not do so for ever.
MAX_RETRIES = 3


@dataclass(frozen=True)
class Config:
    """What is segmented, with what, where to, and by how many workers."""

    input: str  # a folder, or a bucket's URL such as s3://bucket/scans, with all its folders
    output: str  # where the masks go; masks that are there already are kept
    model: str = "export/unet.onnx"  # what `python export.py` wrote
    engine: str = "auto"  # as in predict.py; chosen here, and the same on every machine
    # As in predict.py. auto is float32 if one machine's kind of processor is not in the manifest.
    precision: str = "auto"
    workers: int = 0  # at most so many; 0 is what the CPUs of all machines allow
    cpus: int = 1  # of a worker
    batch: int = 64  # images in a task; a worker that dies loses at most these


def main(config: Config) -> None:
    """Segment the images that have no mask yet, and list those that could not be segmented.

    Raises UserError, also at the end if there are such images.
    """
    check_config(config)
    source, target = Folder(config.input), Folder(config.output)
    if source.overlaps(target):
        raise UserError(
            f"{config.input} and {config.output} are in one another; name another --output, "
            "without images"
        )
    config = replace(config, model=utils.find_default(config.model))
    network, metadata, sha256 = load_for_all(config)
    print(f"model: {config.model} ({network.engine}, {network.precision})", flush=True)
    if Classes.from_metadata(metadata).overlap:
        raise UserError(f"{OVERLAPPING}; predict.py --input writes a mask for each class")
    names = list(source.list_files())
    plan = plan_masks(names, metadata, source.name)
    images, problems = plan.images, plan.problems
    if others := describe_passed_over(plan.passed_over):
        print(f"note  {others}")
    if not images and not problems:
        raise UserError(
            f"{config.input} has no image; expected files ending in {' '.join(SUFFIXES)}"
        )
    existing = set(target.list_files(missing_ok=True))
    delete_unfinished(target, existing)
    check_model(target, existing, sha256, network)
    missing = {mask: image for mask, image in images.items() if mask not in existing}
    problems |= segment_missing(config, source, target, network, missing, len(images))
    write_problems(target, problems)
    count = sum(image.name not in problems for image in images.values())
    print(f"{count} masks in {config.output}")
    if problems:
        raise UserError(f"{counted(len(problems), 'problem')}, see problems.csv in {config.output}")


def check_config(config: Config) -> None:
    """Raise UserError for a value that cannot work, or if Ray is not installed."""
    if min(config.cpus, config.batch) < 1 or config.workers < 0:
        raise UserError("expected cpus and batch of at least 1, workers of at least 0")
    for package in ("ray", "pyarrow"):
        utils.require(package, "requirements-archive.txt")


def delete_unfinished(target: Folder, existing: set[str]) -> None:
    """Delete the files that killed workers left half-written."""
    for name in existing:
        if UNFINISHED.search(name):
            target.delete(name)


def check_model(target: Folder, existing: set[str], sha256: str, network: engines.Engine) -> None:
    """Note which model the masks are of. Raises UserError if others are there already."""
    note = {"model_sha256": sha256, "engine": network.engine, "precision": network.precision}
    content = json.dumps(note).encode()
    if NOTE not in existing:
        target.write(NOTE, content)
    elif target.read(NOTE) != content:
        raise UserError(
            f"{target.url} holds masks of another model or precision ({NOTE}); "
            "name another --output"
        )


def write_problems(target: Folder, problems: dict[str, str]) -> None:
    """Write problems.csv, a row for each image."""
    table = io.StringIO()
    csv.writer(table).writerows([("image", "problem"), *sorted(problems.items())])
    target.write("problems.csv", table.getvalue().encode())


# ---------------------------------------------------------------------------------------- workers


class Worker:
    """A process somewhere in the cluster that holds the network."""

    def __init__(
        self,
        source: Folder,
        target: Folder,
        model_files: dict[str, bytes],
        cpus: int,
        engine: str,
        precision: str,
    ) -> None:
        cv2.setNumThreads(cpus)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in model_files.items():
                (Path(folder) / name).write_bytes(content)
            path = Path(folder) / next(iter(model_files))
            self.model, self.run = load_exported(path, cpus, engine, precision)
        self.source, self.target = source, target
        self.computing = Lock()
        self.pool = ThreadPoolExecutor(FILES_AT_ONCE)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write the masks of a batch; return the problem of each image, or nothing."""
        problems = self.pool.map(self.attempt, batch["files"], batch["mask"])
        return {"image": batch["image"], "problem": list(problems)}

    def attempt(self, files: Sequence[str], mask: str) -> str:
        """Write one image's mask, or return why that is not possible."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.write_mask(files, mask, Path(folder))
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever it is, the other images are to be done
            return first_line(error)
        return ""

    def write_mask(self, files: Sequence[str], mask: str, folder: Path) -> None:
        """Segment one image. folder: an empty one, for the copies of several files."""
        paths = [folder / PurePosixPath(name).name for name in files]
        if len(files) == 1:
            content = self.source.read(files[0])
        else:
            for path, name in zip(paths, files, strict=True):
                path.write_bytes(self.source.read(name))
        form = mask_format(mask)
        max_slices = 1 if form is formats.PNG else MAX_SLICES
        # Many files are read and written at once, but the CPUs are for one computation.
        with self.computing:
            if len(files) == 1:
                prepared = self.model.read(content, max_slices=max_slices)
            else:
                window = self.model.metadata.get("window", "")
                scan = read_joined(paths, form is formats.DICOM, window)
                prepared = self.model.prepare(scan, max_slices=max_slices)
            ids = self.model.predict(prepared, self.run).ids
            classes = Classes.from_metadata(self.model.metadata)
            found = Mask(ids, classes.names, classes.levels)
            written = form.encode_mask(found, prepared.scan())
        self.target.write(mask, written)


def segment_missing(
    config: Config,
    source: Folder,
    target: Folder,
    network: engines.Engine,
    missing: dict[str, Item],
    total: int,
) -> dict[str, str]:
    """Write the masks of `missing`, by their names; return the problem of each image left out."""
    problems: dict[str, str] = {}
    if not missing:
        return problems
    connect()
    kind = (network.engine, network.precision)
    # The workers get the model's content, so the machines need not share a disk.
    worker = (source, target, read_model_files(config, network), config.cpus, *kind)
    with tqdm(total=total, initial=total - len(missing), unit="image", mininterval=1) as bar:
        # Images whose task was lost are tried again one by one: one may have killed the worker.
        for batch in (config.batch, 1):
            done = set()
            for image, problem in run_tasks(config, worker, missing, batch):
                done.add(image)
                if problem:
                    problems[image] = problem
                bar.update()
            missing = {mask: item for mask, item in missing.items() if item.name not in done}
            if not missing:
                return problems
    for item in missing.values():
        problems[item.name] = f"its worker died, {MAX_RETRIES + 1} times"
    return problems


def read_model_files(config: Config, network: engines.Engine) -> dict[str, bytes]:
    """Read what a worker needs to load the network: the ONNX file first."""
    path = Path(config.model)
    paths = [path, path.with_name("manifest.json")]
    if network.precision == "int8":
        paths.append(engines.int8_path(path))
    return {one.name: one.read_bytes() for one in paths}


def run_tasks(
    config: Config, worker: tuple, missing: dict[str, Item], batch: int
) -> Iterator[tuple[str, str]]:
    """Write the masks of `missing`, `batch` in a task; yield (image, problem) when it is done."""
    import pyarrow as pa
    import ray

    items = missing.values()
    columns = {
        "mask": list(missing),
        "image": [item.name for item in items],
        "files": [item.files for item in items],
    }
    table = pa.table(columns)
    blocks = []
    for start in range(0, len(table), batch):
        blocks.append(table.slice(start, batch).combine_chunks())
    results = ray.data.from_arrow(blocks).map_batches(
        Worker,
        fn_constructor_args=worker,
        batch_size=None,  # a block
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.workers or None),
        num_cpus=config.cpus,
        max_restarts=-1,
        max_task_retries=MAX_RETRIES,
    )
    for rows in results.iter_batches(batch_size=None):
        yield from zip(rows["image"], rows["problem"], strict=True)


# ---------------------------------------------------------------------------------------- cluster


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine's CPUs."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray's own switch; else it reports its use
    is_local = not os.environ.get("RAY_ADDRESS")
    if is_local:
        # Then it listens on 127.0.0.1 alone, and asks for this user's token, which Ray makes.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray.data  # looks at these variables

    if ray.is_initialized():
        return
    # Needed until Ray 2.64: nothing else bounds the retries.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    ray.init("local" if is_local else None, include_dashboard=False, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    context.max_errored_blocks = -1  # a task that fails for good must not stop the others


def kinds_of_cpu() -> set[str]:
    """Ask the cluster's machines that compute for their kinds of processor."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(utils.kind_of_cpu)
    answers = []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers.append(ask.options(scheduling_strategy=place).remote())
    return set(ray.get(answers))


def load_for_all(config: Config) -> tuple[engines.Engine, dict[str, Any], str]:
    """Load the network in a precision that is allowed on all machines; its metadata and checksum.

    Raises UserError.
    """
    path = Path(config.model)
    network, metadata, sha256 = engines.load_engine(path, config.engine, config.precision, 1)
    if network.precision == "float32" or not os.environ.get("RAY_ADDRESS"):
        return network, metadata, sha256
    connect()
    place = path.with_name("manifest.json")
    measured = json.loads(place.read_text())["precisions"]
    refusing = []
    for kind in sorted(kinds_of_cpu()):
        if not engines.is_allowed(network.engine, network.precision, measured.get(kind, {})):
            refusing.append(kind)
    if not refusing:
        return network, metadata, sha256
    name = f"{network.engine} {network.precision}"
    reason = f"{name} is not allowed on {', '.join(refusing)}, according to {place}"
    if config.precision != "auto":
        raise UserError(
            f"{reason}; use --precision float32, or run python -m inference.precision_check there "
            "and add its result to this file"
        )
    print(f"{reason}; float32 instead")
    network, metadata, sha256 = engines.load_engine(path, config.engine, "float32", 1)
    return network, metadata, sha256


if __name__ == "__main__":
    utils.run_script(main, Config, utils.RESUMES)
