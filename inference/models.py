"""Choose and load models for predictions: the user's own, the pretrained one, or an ensemble."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path

import utils
from imaging.labels import Classes, mirrored_channels
from inference.engines import Engine, load_engine
from inference.sampler import Sampler
from inference.segment import Member
from utils import UserError

OWN_MODEL = "files/model.h5"
# The pretrained lung model, exported, and the model file that it was made from.
BUNDLED_MODEL = "files/lungs/unet.onnx"
BUNDLED_MODEL_FILE = "files/lungs.h5"


def choose_model(uncertainty: bool = False) -> tuple[str, str]:
    """Choose the model for a user's own images: its path, and the reason.

    The user's own model, unless it has seen phantoms only; else the pretrained lung model, in
    Keras for the uncertainty. Raises UserError if there is none.
    """
    own = utils.find_default(OWN_MODEL)
    if not Path(own).exists():
        reason = f"no {OWN_MODEL} yet"
    elif knows_phantoms_only(Path(own)):
        reason = f"{own} knows synthetic images only; name it with --model to use it"
    else:
        return own, "trained on your own images"
    path = utils.find_default(BUNDLED_MODEL_FILE if uncertainty else BUNDLED_MODEL)
    if not Path(path).exists():
        raise UserError(f"no pretrained model at {path} ({reason}); name a model with --model")
    return path, f"pretrained on chest X-rays ({reason})"


def knows_phantoms_only(path: Path) -> bool:
    """Return whether a model file was trained on phantoms alone.

    Its metadata says so; for an older file config.json beside it does. Raises UserError.
    """
    metadata = utils.load_metadata(path)
    if "phantoms" in metadata:
        return metadata["phantoms"]
    place = path.with_name("config.json")
    if not place.is_file():
        return False
    try:
        config = json.loads(place.read_text())
        folders = [config["data_dir"], config.get("extra_dir", "")]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{place} cannot be read ({error}); name a model with --model") from None
    return all(not folder or (Path(folder) / "phantoms.json").is_file() for folder in folders)


def expand_paths(names: str) -> list[str]:
    """List model files: one, or several separated by commas; a pattern names all that match.

    What is there is taken by its name, even with a comma, a bracket or a * in it. The default
    places are looked for in the repository, too.
    """
    parts = names.split(",")
    paths: list[str] = []
    while parts:
        # The longest first: a comma may be part of a name.
        for count in range(len(parts), 0, -1):
            name = ",".join(parts[:count])
            found = match_paths(name)
            if found or count == 1:
                paths += found or [utils.find_default(name)]
                parts = parts[count:]
                break
    return paths


def match_paths(pattern: str) -> list[str]:
    """List the files that a pattern matches; folders that are there are taken by their names."""
    found = [Path()]
    for part in Path(pattern).parts:
        nearer = []
        for folder in found:
            if part == ".." or (folder / part).exists():
                nearer.append(folder / part)
            elif glob.has_magic(part):
                nearer += sorted(folder.glob(part)) or sorted(folder.glob(part.replace("[", "[[]")))
        found = nearer
    return [str(path) for path in found if path.is_file()]


def load_members(
    paths: Sequence[str],
    engine: str = "auto",
    precision: str = "auto",
    uncertainty: bool = False,
    clean: bool = True,
) -> list[Member]:
    """Load one model, or the members of an ensemble.

    engine, precision: of exported models. uncertainty: must be computable with them. clean: masks
    are cleaned if all members ask for the same cleaning. Raises UserError if a model is missing,
    or if the members do not fit together.
    """
    if len({path.endswith(".onnx") for path in paths}) > 1:
        raise UserError("an ensemble needs models of one kind; name .h5 files or .onnx files")
    if paths[0].endswith(".onnx"):
        members = [load_onnx_model(path, engine, precision, uncertainty) for path in paths]
    else:
        members = [load_keras_model(path, engine, precision) for path in paths]
    metadata = [one for _, one in members]
    described = [one | Sampler.from_metadata(one).metadata for one in metadata]
    for name in ("classes", "channels", "image_size", "window", "sampler"):
        # Older files lack some of these.
        values = {json.dumps(one.get(name) or None) for one in described}
        if len(values) > 1:
            found = " and ".join(sorted(values))
            raise UserError(f"the models' {name} are {found}; an ensemble needs the same")
    if len({Classes.from_metadata(one).overlap for one in metadata}) > 1:
        raise UserError("the classes of some models overlap; an ensemble needs the same in all")
    one_sided = mirrored_channels(metadata[0]["classes"]) is None
    if uncertainty and len(members) == 1 and one_sided:
        raise UserError(
            "--uncertainty needs several models, because a class with one side cannot be mirrored"
        )
    wanted = [one.get("clean") for one in metadata]
    agreed = wanted[0] if clean and all(parts == wanted[0] for parts in wanted) else None
    return [(network, one | {"clean": agreed}) for network, one in members]


def load_onnx_model(path: str, engine: str, precision: str, uncertainty: bool) -> Member:
    """Load what `export.py` wrote, without Keras. Raises UserError."""
    network, metadata, _ = load_engine(Path(path), engine, precision)
    if uncertainty and metadata.get("mirror"):
        raise UserError(
            f"{path} averages with the mirrored image itself; --uncertainty needs its .h5 file"
        )
    return network, metadata | {"mirror": False}


def load_keras_model(path: str, engine: str, precision: str) -> Member:
    """Load a model file with Keras. Raises UserError."""
    if engine != "auto" or precision not in ("auto", "float32"):
        raise UserError(
            f"{path} runs in Keras and float32; `python export.py --model {path}` makes it ready "
            "for engines"
        )
    utils.load_metadata(path)  # a wrong file is refused before Keras is loaded
    utils.load_keras()
    return utils.load_model(path)


def describe_network(members: Sequence[Member]) -> str:
    """Name what computes: Keras, or the engine and its precision."""
    network = members[0][0]
    if isinstance(network, Engine):
        return f"{network.engine}, {network.precision}"
    return "Keras, float32"
