"""The models that are served: one file, or a folder of models with their versions.

    models/lungs/1/unet.onnx      what `python export.py --out-dir models/lungs/1` writes
    models/lungs/2/unet.onnx      the highest version answers
    models/aliases.json           {"default": "lungs", "lungs": "lungs/1"} takes version 1 instead

An alias is a name for a model or for one of its versions. "default" answers where no model is
named; without it the only model does.
"""

import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import utils
from inference.exported_model import ExportedModel, load_exported
from serving.bucket import ALIASES, Mirror
from serving.config import MODEL, VERSION, Config
from serving.errors import Problem
from serving.monitoring import Metrics, log_event
from serving.network import NetworkThreads
from utils import UserError, first_line

BUCKET = "s3://"
DEFAULT, FILE = "default", "unet.onnx"
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
NUMBER = re.compile(r"[1-9]\d{0,8}", re.ASCII)
READY, UNAVAILABLE = "READY", "UNAVAILABLE"

Key = tuple[str, str]  # name and version


@dataclass(eq=False)
class Served:
    """A version of a model, ready to run."""

    name: str
    version: str
    network: ExportedModel
    computing: NetworkThreads
    stamp: tuple  # of its files, which tells whether they are still the same

    @property
    def title(self) -> str:
        """Name and version, as in logs and metrics."""
        return f"{self.name}/{self.version}"


@dataclass
class Found:
    """What lies in the folder now."""

    paths: dict[Key, Path] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


class Repository:
    """Loads models, and finds the one that a request means."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        """Load all models. Raises UserError if there is none, or none is the default."""
        self.config, self.metrics, self.lock = config, metrics, threading.Lock()
        self.mirror = None
        if config.model.startswith(BUCKET):
            utils.require("pyarrow", "requirements-archive.txt")
            self.mirror = Mirror(config.model)
        self.served: dict[Key, Served] = {}
        self.failed: dict[Key, str] = {}  # why a version is not served
        self.unloaded: set[str] = set()  # names, until they are loaded again
        self.aliases: dict[str, str] = {}
        self.reload(is_start=True)

    # ------------------------------------------------------------------------------------ loading

    def reload(self, is_start: bool = False) -> None:
        """Load what is new or changed in the folder, and drop what is gone.

        What cannot be loaded is told, and what was served in its place stays. Raises UserError if
        nothing would answer by default; then nothing changes.
        """
        with self.lock:
            found = self._look()
            served, failed = {}, {}
            for key, path in found.paths.items():
                if key[0] in self.unloaded:
                    continue
                before = self.served.get(key)
                try:
                    served[key] = self._load(key, path, before)
                except Exception as error:  # of the engine, too: the other models go on
                    if is_start and len(found.paths) == 1:
                        raise
                    failed[key] = str(error) if isinstance(error, UserError) else first_line(error)
                    log_event(
                        event="a model cannot be loaded", model="/".join(key), reason=failed[key]
                    )
                    if before:
                        served[key] = before
            if not served and failed:
                raise UserError(f"no model can be loaded: {'; '.join(failed.values())}")
            resolve("", "", served, found.aliases)  # raises
            # A request that holds a model that is gone is finished with it.
            self.served, self.failed, self.aliases = served, failed, found.aliases
            self._show()

    def _show(self) -> None:
        models = [(one.title, one.network.sha256) for one in self.served.values()]
        self.metrics.show_models(models)

    def _look(self) -> Found:
        """List models, versions and aliases. Raises UserError."""
        root = self.mirror.update() if self.mirror else Path(self.config.model)
        if not (self.mirror or root.is_dir()):
            return Found({(MODEL, VERSION): root}, {DEFAULT: MODEL})
        found = Found()
        for path in sorted(root.glob(f"*/*/{FILE}")):
            name, version = path.parent.parent.name, path.parent.name
            if NAME.fullmatch(name) and NUMBER.fullmatch(version):
                found.paths[name, version] = path
        if not found.paths:
            place = self.config.model
            raise UserError(f"{place} has no model; expected {place}/NAME/1/{FILE}")
        place = root / ALIASES
        if place.exists():
            found.aliases = read_aliases(place)
        return found

    def _load(self, key: Key, path: Path, before: Served | None) -> Served:
        """Load a version and run it once, unless it is served already. Raises UserError."""
        try:
            stamp = tuple(one.stat().st_mtime_ns for one in sorted(path.parent.glob("*.*")))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        if before and before.stamp == stamp:
            return before
        config = self.config
        network, run = load_exported(
            path, config.threads, config.engine, config.precision, config.merge
        )
        for count in (1, 2):  # alone, and side by side
            run(np.zeros((count, *network.input_shape), np.float32))
        title = "/".join(key)
        computing = NetworkThreads(
            run,
            config.threads or utils.cores(),
            config.max_concurrent_requests,
            lambda size, seconds: self.metrics.record_computed(title, size, seconds),
        )
        return Served(*key, network, computing, stamp)

    def load(self, name: str) -> None:
        """Load a model's versions, also after `unload`. Raises Problem 400.

        Those that can be loaded are served, also if another one cannot.
        """
        was_unloaded = name in self.unloaded
        self.unloaded.discard(name)
        try:
            self.reload()
        except UserError as error:
            if was_unloaded:
                self.unloaded.add(name)
            raise Problem(400, str(error)) from None
        reasons = [reason for key, reason in self.failed.items() if key[0] == name]
        if reasons or not any(key[0] == name for key in self.served):
            raise Problem(400, "; ".join(reasons) or f"the repository has no model {name}")

    def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded again. Raises Problem 400 for the default."""
        with self.lock:
            left = {key: one for key, one in self.served.items() if key[0] != name}
            if len(left) == len(self.served):
                raise Problem(400, f"no model {name} is served")
            try:
                resolve("", "", left, self.aliases)
            except UserError as error:
                raise Problem(400, f"{name} answers by default ({error})") from None
            self.unloaded.add(name)
            self.served = left
            self.failed = {key: why for key, why in self.failed.items() if key[0] != name}
            self._show()

    # ------------------------------------------------------------------------------------ finding

    def find(self, name: str = "", version: str = "") -> Served:
        """Return the model that a request means; without a name the default. Raises Problem 404."""
        try:
            return resolve(name, version, self.served, self.aliases)
        except UserError as error:
            raise Problem(404, str(error)) from None

    def versions(self, name: str) -> list[Served]:
        """List the versions of a model that are served, the highest first. Raises Problem 404."""
        chosen = self.find(name)
        ours = [one for one in self.served.values() if one.name == chosen.name]
        return sorted(ours, key=lambda one: -int(one.version))

    def index(self) -> list[dict[str, str]]:
        """List all versions, as Triton's extension "model_repository" does."""
        rows = []
        for name, version in sorted({*self.served, *self.failed}):
            reason = self.failed.get((name, version), "")
            state = READY if (name, version) in self.served else UNAVAILABLE
            rows.append({"name": name, "version": version, "state": state, "reason": reason})
        return rows

    @property
    def pending(self) -> int:
        """How many images wait or are computed."""
        return sum(one.computing.pending for one in self.served.values())

    async def stop(self) -> None:
        """Finish what the models compute."""
        for one in list(self.served.values()):
            await one.computing.stop()


def resolve(name: str, version: str, served: dict[Key, Served], aliases: dict[str, str]) -> Served:
    """Find a model by name or alias, and by version or the highest one. Raises UserError."""
    names = {key[0] for key in served}
    if not name:
        name = DEFAULT if DEFAULT in aliases else min(names) if len(names) == 1 else ""
        if not name:
            raise UserError(f'{ALIASES} names no "{DEFAULT}" among {", ".join(sorted(names))}')
    if not version and name in aliases:
        name, _, version = aliases[name].partition("/")
        if not version and name in aliases:  # of the name itself
            name, _, version = aliases[name].partition("/")
    elif name in aliases and name not in names:
        target, _, pinned = aliases[name].partition("/")
        name = target if pinned in ("", version) else name
    numbers = [int(key[1]) for key in served if key[0] == name]
    version = version or str(max(numbers, default=""))
    if (name, version) not in served:
        what = f"model {name}" + (f" of version {version}" if version else "")
        raise UserError(f"no {what} is served")
    return served[name, version]


def read_aliases(path: Path) -> dict[str, str]:
    """Read a file of aliases: {"alias": "model" or "model/version"}. Raises UserError."""
    try:
        aliases: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None
    is_good = isinstance(aliases, dict) and all(
        NAME.fullmatch(alias)
        and isinstance(target, str)
        and NAME.fullmatch(target.partition("/")[0])
        and NUMBER.fullmatch(target.partition("/")[2] or "1")
        for alias, target in aliases.items()
    )
    if not is_good:
        raise UserError(
            f'{path} holds other things than aliases; expected {{"default": "lungs/2"}}'
        )
    return aliases
