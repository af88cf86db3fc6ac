"""What the scripts share: the command line, errors, files, devices and precision, the model file.

A model file is plain HDF5 as Keras writes it: architecture and weights, in float32. One more
attribute, `facts`, holds the metadata as JSON: input size, channels, preprocessing, class names,
threshold, versions, validation Dice. Keras is imported by the functions that need it, because
`serve.py` and `predict.py` on an exported model do without its seconds of start-up.
"""

import ctypes
import difflib
import errno
import importlib.util
import itertools
import json
import logging
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import textwrap
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import numpy as np
import tyro

from networks import own
from networks.errors import UserError

if TYPE_CHECKING:
    import keras

# TensorFlow's own switch, read at its first import: without it, oneDNN's convolutions are left out
# on processors with AVX2 alone. There they make training twice as fast (docs/speed.md).
os.environ["TF_ENABLE_ONEDNN_OPTS"] = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")

T = TypeVar("T")
ROOT = Path(__file__).parent
# Flags of earlier versions.
OLD_FLAGS = {
    "--normalisation": "--normalization",
    "--room": "--max-concurrent-requests",
    "--neighbours 0": "--dimensions 2",
    "--neighbours 1": "--dimensions 2.5",
}
FROM_REPORT = "--from-report"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h
MAX_NAME_BYTES = 255  # of a file's name
MAX_SIBLINGS = 1000  # files of a folder that a misspelt name is compared with
_HIDING = threading.RLock()
RESUMES = "; the same command goes on from here"
MAX_PRETRAINED_DEPTH = 5  # halvings of an ImageNet classifier
MIN_PRETRAINED_SIZE = 64  # pixels, so that a few are left at its coarsest level
THRESHOLD = 0.5  # of a single class's probability
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
# How images become network inputs (imaging/preprocess.py). A model file names it; a model trained
# with another preprocessing is refused.
PREPARATION = "letterbox, percentiles 0.5-99.5"


# ------------------------------------------------------------------------------------ command line


def require(package: str, requirements: str) -> None:
    """End the script with exit code 2 if a package of the file `requirements` is not installed."""
    if importlib.util.find_spec(package) is None:
        print(f"error: {package} is not installed: pip install -r {requirements}", file=sys.stderr)
        sys.exit(2)


def parse_flags(
    config_class: type[T], description: str | None = None, from_report: bool = False
) -> T:
    """Read a script's flags: one per field of its dataclass, the field's comment is the help.

    description: the text above the flags; without it, the docstring of the dataclass's module.
    from_report: whether --from-report names a file whose values are the defaults. Raises UserError
    if it cannot be used.
    """
    hide_backend_logs()
    flags = replace_old_flags(sys.argv[1:])
    if description is None:
        description = sys.modules[config_class.__module__].__doc__
    # These two are taken from the flags before they are parsed, so tyro does not list them.
    if "--verbose" not in description:
        description += "\n--verbose also shows what TensorFlow or JAX says."
    defaults = {}
    if from_report:
        description += (
            f"\n{FROM_REPORT} PATH takes what data.py check wrote, such as "
            "results/check/report.json. Other flags win over it."
        )
        path = _take_value(flags, FROM_REPORT)
        if path is not None:
            defaults = {"default": config_class(**read_report(path, config_class))}
    return tyro.cli(config_class, prog=program(), args=flags, description=description, **defaults)


def _take_value(flags: list[str], name: str) -> str | None:
    """Remove a flag and its value from the list; return the value, None if it is not there."""
    value = None
    for place in reversed(range(len(flags))):
        found, separator, text = flags[place].partition("=")
        if found != name:
            continue
        rest = [] if separator else flags[place + 1 : place + 2]
        if not separator and (not rest or rest[0].startswith("--")):
            raise UserError(f"{name} needs a file, such as results/check/report.json")
        text = text if separator else rest[0]
        value = text if value is None else value  # of several the last counts
        del flags[place : place + 1 + len(rest)]
    return value


def read_report(path: str | Path, config_class: type) -> dict[str, Any]:
    """Read fields of a script's dataclass from a JSON file. Raises UserError."""
    cure = "run `python data.py check DIR`, which writes it"
    path = Path(path)
    if not path.is_file():
        inside = path / "report.json"
        near = inside if inside.is_file() else nearest_path(path)
        hint = f"did you mean {near}? Else " if near else ""
        raise UserError(f"no report at {path}; {hint}{cure}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if path.suffix == ".html":
            raise UserError(f"{path} is for people; expected report.json beside it") from None
        raise UserError(f"{path} is damaged, or no report ({first_line(error)}); {cure}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds no settings; {cure}")
    types = get_type_hints(config_class)
    for name, value in fields.items():
        if name not in types:
            expected = or_expected(nearest(name, types))
            raise UserError(f"{path}: unknown setting {name}{expected} those of --help; {cure}")
        allowed = get_args(types[name]) or (types[name],)
        if type(value) is int and float in allowed:
            continue
        if type(value) not in allowed:
            expected = " or ".join(one.__name__ for one in allowed)
            raise UserError(f"{path}: {name} is {value!r}; expected {expected}; {cure}")
    return fields


def replace_old_flags(flags: Sequence[str]) -> list[str]:
    """Replace flags of earlier versions, --name, --name=value or --name value, by today's."""
    replaced: list[str] = []
    for flag in flags:
        name, separator, value = flag.partition("=")
        both = f"{name} {value}" if separator else f"{replaced[-1]} {flag}" if replaced else ""
        if both in OLD_FLAGS:
            replaced = replaced[: None if separator else -1] + OLD_FLAGS[both].split()
        else:
            replaced.append(OLD_FLAGS.get(name, name) + separator + value)
    return replaced


def program() -> str:
    """Return how this script is called: `python train.py`, or `python -m benchmarks.speed`."""
    path = Path(sys.argv[0]).resolve()
    if path.parent == ROOT or ROOT not in path.parents:
        return f"python {path.name}"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "python -m " + ".".join(part for part in parts if part != "__main__")


def hide_backend_logs() -> None:
    """Hide what TensorFlow says at the start, unless --verbose is among the flags."""
    if take_word("--verbose"):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Keras advises against HDF5


def take_word(word: str) -> bool:
    """Take a word such as --verbose, which is no field of a Config, from the command line.

    Returns whether it was there.
    """
    is_there = word in sys.argv
    if is_there:
        sys.argv.remove(word)
    return is_there


@contextmanager
def hidden(packages: Iterable[str]) -> Iterator[None]:
    """Let imports of packages fail that are not loaded yet."""
    with _HIDING:  # another thread must not bring them back meanwhile
        names = [name for name in packages if name not in sys.modules]
        sys.modules.update(dict.fromkeys(names))
        try:
            yield
        finally:
            for name in names:
                del sys.modules[name]


def load_keras() -> None:
    """Import Keras; what its backend says at the start is shown only if that fails.

    TensorFlow writes a dozen lines, one of which looks like a crash where there is no GPU. Packages
    that Keras and TensorFlow take along where they are installed are left out: that saves a third
    of the time.
    """
    hide_backend_logs()
    unused = ["matplotlib", "pandas", "sklearn"]
    if os.environ.get("KERAS_BACKEND") == "tensorflow":  # unset may mean jax, by keras.json
        unused.append("jax")
    keep_what_jax_compiles()
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as log, hidden(unused):
        os.dup2(log.fileno(), 2)
        try:
            import keras

            # TensorFlow complains again when it looks for devices. JAX must not look yet:
            # several processes meet first.
            if keras.backend.backend() == "tensorflow":
                gpus()
        except BaseException:
            log.seek(0)
            os.write(stderr, log.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def cache_folder() -> str:
    """Return where decoded images are kept: UNET_CACHE, else files/cache; "" keeps none."""
    return os.environ.get("UNET_CACHE", "files/cache")


def keep_what_jax_compiles() -> None:
    """Let JAX keep its machine code beside the decoded images; later runs start in half the time.

    JAX's own variables, if they are set, decide. Another processor gets a folder of its own.
    """
    if cache_folder() and os.environ.get("KERAS_BACKEND") == "jax":
        processor = zlib.crc32(cpu_info().get("flags", platform.machine()).encode())
        folder = Path(cache_folder()).absolute() / f"jax-{processor:08x}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # JAX would complain of every piece
            return
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and Keras's random numbers. JAX does without loading TensorFlow."""
    import keras

    with hidden([] if keras.backend.backend() == "tensorflow" else ["tensorflow"]):
        keras.utils.set_random_seed(seed)


DISK_IS_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def run_cli(call: Callable[[], T], on_stop: str = "") -> T:
    """Run a script: exit code 0 when done, 2 on the user's mistake, 130 on Ctrl-C, 1 on our fault.

    on_stop: what to add to "stopped". Returns what `call` returns.
    """
    try:
        return call()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # h5py tells the number in its text alone.
        is_full = error.errno in DISK_IS_FULL or os.strerror(errno.ENOSPC) in str(error)
        if error.filename is None and not is_full:
            raise
        cure = "check the path, its permissions and the disk"
        what = f"{error.filename}: {error.strerror}" if error.filename else "the disk is full"
        print(f"error: {what}; {cure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nstopped{on_stop}", file=sys.stderr)
        sys.exit(130)


def run_script(
    main: Callable[[T], Any],
    config_class: type[T],
    on_stop: str = "",
    description: str | None = None,
    from_report: bool = False,
) -> None:
    """Run `main` with the flags of the command line; see `parse_flags` and `run_cli`."""
    run_cli(lambda: main(parse_flags(config_class, description, from_report)), on_stop)


def run_commands(commands: dict[str, Callable[..., Any]], description: str) -> None:
    """Run the one of several functions that the command line names."""
    hide_backend_logs()

    def run() -> None:
        name = next(iter(sys.argv[1:]), "--help")
        if not name.startswith("-") and name not in commands:
            expected = or_expected(nearest(name, commands))
            raise UserError(f"unknown command {name}{expected} one of {', '.join(commands)}")
        tyro.extras.subcommand_cli_from_dict(commands, prog=program(), description=description)

    run_cli(run)


def check_size(
    sides: Sequence[int | None], depth: int, pretrained: bool = False, name: str = "image size"
) -> None:
    """Raise UserError for sides that cannot be halved `depth` times.

    sides: (H, W) or (D, H, W); any D will do. name: what the size is called in the message.
    pretrained: the encoder is an ImageNet classifier.
    """
    if pretrained and depth > MAX_PRETRAINED_DEPTH:
        raise UserError(
            f"depth is {depth}; a pretrained encoder halves the image {MAX_PRETRAINED_DEPTH} times "
            "at most"
        )
    step = 2**depth
    smallest = max(step, MIN_PRETRAINED_SIZE if pretrained else 0)
    wanted = f"a multiple of {step} (2**depth)"
    if pretrained:
        wanted += f" and at least {smallest}, as a pretrained encoder needs"
    for side in sides[-2:]:
        if side is None and pretrained:
            raise UserError(f"{name} is open; a pretrained encoder needs a fixed one")
        if side is None or (side >= smallest and side % step == 0):
            continue
        nearest = max(smallest, round(side / step) * step)
        raise UserError(f"{name} {side} is not {wanted}; take {nearest}, or another depth")


# ------------------------------------------------------------------------------- errors and files


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like one that is not known; "" if none is."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else ""


def nearest_path(path: str | Path) -> str:
    """Return the path that is most like one that does not exist; "" if none is."""
    path = Path(path)
    for missing in [*reversed(path.parents), path]:
        if missing.exists():
            continue
        # The first part that is missing is the one that is misspelt.
        try:
            siblings = [
                one.name for one in itertools.islice(missing.parent.iterdir(), MAX_SIBLINGS)
            ]
        except OSError:
            return ""
        near = nearest(missing.name, siblings)
        found = missing.parent / near / path.relative_to(missing)
        return str(found) if near and found.exists() else ""
    return ""


def check_folder(path: str | Path) -> None:
    """Raise UserError unless there is such a folder of a data set."""
    if not Path(path).is_dir():
        expected = or_expected(nearest_path(path))
        raise UserError(f"{path} is not a folder{expected} one with images and masks")


def or_expected(near: str) -> str:
    """Write "; did you mean …? Expected", or "; expected" where nothing is near."""
    return f"; did you mean {near}? Expected" if near else "; expected"


def counted(number: int, word: str) -> str:
    """Write "1 problem" or "2 problems"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Shorten another library's error to its first line."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return textwrap.shorten(line, 160, placeholder=" …")


@contextmanager
def atomic(path: str | Path, is_lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends well.

    So no reader sees half a file, and a crash leaves the old one. is_lasting: a power cut does,
    too; that takes some milliseconds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two containers that share a folder may have the same process id.
    mark = f".{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.with_name(f"{mark}.{path.name}")
    if len(os.fsencode(temporary.name)) > MAX_NAME_BYTES:
        temporary = path.with_name(f"{mark}{path.suffix[:16]}")
    try:
        yield temporary
        if is_lasting:
            with temporary.open("rb+") as file:
                # Without fsync a power cut could leave the new name with none of the bytes.
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_size(
    value: int | str | Sequence[int], name: str = "image_size", count: int = 2
) -> tuple[int, ...]:
    """Read a size: (height, width) of 128, "128", "192,256" or "192x256"; of 3 numbers a volume's.

    name: of the field. count: 2 or 3 numbers are expected, or one for all. Raises UserError.
    """
    parts = value if isinstance(value, (list, tuple)) else re.split("[,x ]+", str(value).strip())
    sides = [int(part) if str(part).isdecimal() else 0 for part in parts]
    if len(sides) not in (1, count) or min(sides) < 1:
        several = (
            "height and width such as 192,256"
            if count == 2
            else ("slices, rows and columns such as 16,64,64")
        )
        raise UserError(f"{name} is {value!r}; expected pixels such as 128, or {several}")
    return tuple(sides) if len(sides) == count else tuple(sides * count)


def printable(name: str | Path) -> str:
    """Return a file's name for a message: a line break, or bytes that are no text, are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(name)
    )


def find_default(path: str) -> str:
    """Return where a file of the default places is: below this folder, else in the repository."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


# ---------------------------------------------------------------------------- devices, precision


def free_memory_bytes() -> float:
    """Return how much memory this computer, or this container, has left."""
    free = [8 * 2.0**30] if not Path("/proc/meminfo").is_file() else []
    if not free:
        meminfo = Path("/proc/meminfo").read_text()
        free.append(1024 * float(re.search(r"MemAvailable:\s*(\d+)", meminfo)[1]))
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        try:
            # Files that were read count as used until the memory is needed.
            cached = re.search(r"inactive_file (\d+)", limit.with_name("memory.stat").read_text())
            free.append(float(limit.read_text()) - int(used.read_text()) + int(cached[1]))
        except (OSError, TypeError, ValueError):
            pass  # no container, or no limit: "max"
    return max(0.0, min(free))


def cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@cache
def cpu_info() -> dict[str, str]:
    """Describe the first core as /proc/cpuinfo does: vendor_id, flags … Empty except on Linux."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    pairs = {}
    for line in path.read_text().partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        pairs[name.strip()] = value.strip()
    return pairs


def kind_of_cpu() -> str:
    """Name the vendor and the best instruction set for reduced precision.

    Between such kinds the masks of reduced precision differ.
    """
    info = cpu_info()
    flags = info.get("flags", "").split()
    for name in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2"):
        if name in flags:
            return f"{info['vendor_id']} {name}"
    if flags:
        return info["vendor_id"]
    # Arm, Windows, macOS
    parts = (
        platform.machine(),
        platform.processor(),
        info.get("CPU implementer"),
        info.get("CPU part"),
    )
    return " ".join(part for part in parts if part)


def has_amx() -> bool:
    """Say whether the processor multiplies bfloat16 matrices in hardware.

    AVX512-BF16 alone does not pay: a training step takes longer than in float32 (docs/speed.md).
    """
    return "amx_bf16" in cpu_info().get("flags", "").split()


def gpus() -> list[str]:
    """List the GPUs that Keras computes on."""
    import keras

    try:
        return keras.distribution.list_devices("gpu")
    except RuntimeError:  # JAX without a GPU
        return []


def device_name() -> str:
    """Name what Keras computes on."""
    return ", ".join(gpus()) or counted(cores(), "CPU core")


def _has_fast_bfloat16() -> bool:
    """Say whether Keras's device multiplies bfloat16 matrices in hardware."""
    import keras

    if not gpus():
        return has_amx()
    if keras.backend.backend() == "jax":
        import jax

        return float(jax.devices()[0].compute_capability) >= 8
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return details.get("compute_capability", (0, 0)) >= (8, 0)


def set_precision(name: str) -> str:
    """Set Keras's dtype policy; return the precision that was set.

    name: float32, bfloat16, float16 or auto, which is bfloat16 where the hardware multiplies it
    (GPUs since Ampere, processors with AMX), else float32. Raises UserError for another name.
    """
    import keras

    if name not in ("auto", *PRECISIONS):
        raise UserError(f"precision is {name!r}; expected auto, {', '.join(PRECISIONS)}")
    if name == "auto":
        name = "bfloat16" if _has_fast_bfloat16() else "float32"
    keras.config.set_dtype_policy(PRECISIONS[name])
    return name


def keep_freed_memory(largest: int = 0) -> None:
    """Let the C library keep the memory that arrays free, on Linux.

    By default it returns each large piece to the system, which then clears it again for the next
    array, page by page. docs/speed.md says what this gains.

    largest: bytes of a piece that is kept, up to 32 MiB; 0 keeps all.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        library.mallopt(*((M_MMAP_THRESHOLD, largest) if largest else (M_MMAP_MAX, 0)))
        library.mallopt(M_TRIM_THRESHOLD, 2 * largest or 2**31 - 1)


def jit_compile() -> bool | str:
    """Choose XLA for Keras's `compile`.

    Its convolutions are slow on TensorFlow's CPU device and fast elsewhere.
    """
    import keras

    return "auto" if gpus() or keras.backend.backend() != "tensorflow" else False


# ------------------------------------------------------------------------------------- model file


def make_metadata(
    names: list[str], image_size: tuple[int, int], channels: int, **more: Any
) -> dict[str, Any]:
    """Collect what a user of the model must know; `more` is added as it is (validation Dice …)."""
    import cv2
    import h5py
    import keras

    versions = {module.__name__: module.__version__ for module in (keras, np, cv2, h5py)}
    versions |= {"python": platform.python_version(), "backend": keras.backend.backend()}
    return {
        "image_size": list(image_size),
        "channels": channels,
        "preparation": PREPARATION,
        "classes": names,
        "threshold": THRESHOLD,
        "versions": versions,
        **more,
    }


def save_model(
    model: "keras.Model", path: str | Path, metadata: dict[str, Any], code_folder: Path = Path()
) -> None:
    """Write model and metadata to one HDF5 file, whole or not at all.

    A model of mixed precision is written as float32. metadata: with "architecture" for a network
    of the user's own. Unless Keras can read that by itself, its weights are written and its code
    is copied beside the file. code_folder: that of the code, if the architecture does not say it.
    """
    import h5py

    metadata = dict(metadata)
    architecture = metadata.pop("architecture", "")
    is_self_contained = not architecture or not own.needs_code(model)
    if not is_self_contained:
        metadata |= own.keep_code(architecture, model, Path(path), code_folder)
    with atomic(path) as temporary:
        if is_self_contained:
            model.save(temporary, include_optimizer=False)
        else:
            own.write_weights(model, temporary)
        with h5py.File(temporary, "r+") as file:
            if is_self_contained:
                config = file.attrs["model_config"]
                for policy in ("mixed_bfloat16", "mixed_float16"):
                    config = config.replace(policy, "float32")
                file.attrs["model_config"] = config
            file.attrs["facts"] = json.dumps(metadata)


def is_model_file(path: str | Path) -> bool:
    """Say whether a file is a model written by train.py."""
    try:
        load_metadata(path)
    except UserError:
        return False
    return True


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata of a model file. Raises UserError if it is not one."""
    import h5py

    if not Path(path).is_file():
        inside = Path(path) / "model.h5"  # of a run folder
        near = inside if inside.is_file() else nearest_path(path)
        hint = f"did you mean {near}? Else " if near else ""
        raise UserError(
            f"no model at {path}; {hint}run `python train.py` first, or name one with --model"
        )
    try:
        with h5py.File(path) as file:
            return json.loads(file.attrs["facts"])
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is not a model written by train.py ({error})") from None


def update_metadata(path: str | Path, **more: Any) -> None:
    """Add metadata to a model file, or change it; a file that has it already stays untouched."""
    import h5py

    old = load_metadata(path)
    new = old | more
    if new == old:
        return
    with atomic(path) as temporary:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+") as file:
            file.attrs["facts"] = json.dumps(new)


def load_model(path: str | Path) -> tuple["keras.Model", dict[str, Any]]:
    """Read a model file: the model, in float32 and not compiled, and its metadata.

    Raises UserError if it is not one, or was trained with another preprocessing, or if it needs
    code (networks/own.py) that is not there.
    """
    metadata = load_metadata(path)
    check_preparation(path, metadata)
    load_keras()
    import keras

    if "architecture" in metadata:
        return own.rebuild(Path(path), metadata), metadata
    return keras.models.load_model(path, compile=False), metadata


def check_preparation(path: str | Path, metadata: dict[str, Any]) -> None:
    """Raise UserError unless the model expects images as this version prepares them."""
    found = metadata.get("preparation")
    if found != PREPARATION:
        raise UserError(f"{path} expects images prepared by {found!r}, not {PREPARATION!r}")


def copy_weights(path: str | Path, model: "keras.Model") -> None:
    """Copy the weights of a model file into `model`, layer by layer, where name and shapes agree.

    Prints which layers start anew. Raises UserError if nothing fits.
    """
    source = {layer.name: layer for layer in load_model(path)[0].layers}
    copied, other, kernels = [], [], 0
    for layer in model.layers:
        if not layer.weights:
            continue
        known = source[layer.name].get_weights() if layer.name in source else []
        if [weight.shape for weight in known] == [tuple(weight.shape) for weight in layer.weights]:
            layer.set_weights(known)
            copied.append(layer.name)
            kernels += any(weight.ndim > 1 for weight in known)
        else:
            other.append(layer.name)
    if not kernels:  # a normalization alone fits any network of as many channels
        raise UserError(
            f"{path}: none of its weights fit {model.name}; give the architecture, filters and "
            "dimensions it was made with"
        )
    rest = f", new: {', '.join(other)}" if other else ""
    print(f"{path}: weights of {len(copied)} layers loaded{rest}")
