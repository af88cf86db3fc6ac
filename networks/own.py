"""A network of one's own: `--architecture my_net.py:build`, or `package.module:function`.

The function takes the input shape, (H, W, C) or (D, H, W, C), and the number of outputs, and
returns a Keras model of one input and one output. It is called again when a model file is loaded
that Keras cannot read by itself, because of layers or operations that are not Keras's layers.
Keras is imported by the functions that need it.
"""

import importlib
import importlib.machinery
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from networks.errors import UserError

if TYPE_CHECKING:
    import keras

PROBABILITIES = ("sigmoid", "softmax")
# Layers at a network's end that leave probabilities what they are.
PASSING = ("Identity", "UpSampling2D", "UpSampling3D", "Resizing", "Cropping2D", "Cropping3D")
CODE_ENDING = "_network.py"  # model_network.py lies beside model.h5
_sources: dict[Path, bytes] = {}  # the files of code that were run, as they were
FORM = "expected file.py:function or package.module:function"


def is_own(architecture: str) -> bool:
    """Say whether an architecture names a function of the user's."""
    return ":" in architecture


def split(architecture: str) -> tuple[str, str]:
    """Split an architecture into file or module, and function. Raises UserError."""
    code, _, function = architecture.rpartition(":")
    if not code or not function.isidentifier():
        raise UserError(f"architecture is {architecture!r}; {FORM}")
    return code, function


def last_activation(outputs: int, overlap: bool) -> str:
    """Name the activation that turns a network's outputs into probabilities."""
    return "sigmoid" if outputs == 1 or overlap else "softmax"


def find_code(architecture: str, folder: Path = Path()) -> Path:
    """Return the file of a network's code without running it; a path is relative to `folder`.

    Raises UserError if there is none.
    """
    code, _ = split(architecture)
    if code.endswith(".py"):
        path = folder / code
        if not path.is_file():
            raise UserError(f"architecture {architecture}: {path} is not a file; {FORM}")
        return path
    places, spec = None, None
    parts = code.split(".")
    for number in range(len(parts)):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: number + 1]), places)
        if spec is None:
            break
        places = spec.submodule_search_locations
    if spec is None or not spec.origin:
        raise UserError(
            f"architecture {architecture}: Python finds no module {code}; {FORM}, where the "
            "package is installed or PYTHONPATH names its folder"
        )
    return Path(spec.origin)


def import_code(architecture: str, folder: Path = Path()) -> ModuleType:
    """Run a network's code. Raises UserError with file and line if it fails."""
    path = find_code(architecture, folder)
    code, _ = split(architecture)
    try:
        if not code.endswith(".py"):
            return importlib.import_module(code)
        source = _sources[path.absolute()] = path.read_bytes()
        module = ModuleType(f"own_network_{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses look there
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        raise UserError(f"architecture {architecture}: {_describe(error, path)}") from error
    return module


def _describe(error: Exception, path: Path) -> str:
    """Say what went wrong in a file, and in which of its lines."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path.absolute() or Path(frame.filename) == path
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        lines = [error.lineno]
    place = f"{path}, line {lines[-1]}" if lines else str(path)
    text = str(error).strip().splitlines()
    text = text[0] if text else ""
    if isinstance(error, ModuleNotFoundError):
        text += f"; install the package of {error.name}"
    return f"{place}: {type(error).__name__}: {text}"


def build_own(
    architecture: str,
    input_shape: tuple[int | None, ...],
    outputs: int,
    activation: str,
    folder: Path = Path(),
) -> "keras.Model":
    """Build a network of the user's: images (N, …, C) in [0, 1] → probabilities (N, …, outputs).

    activation: sigmoid or softmax; it is appended unless the network has it. folder: that of a
    relative path. Raises UserError with file and line if the code fails, or returns something
    else than a network of these shapes.
    """
    module = import_code(architecture, folder)
    _, name = split(architecture)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"architecture {architecture}: {module.__file__} has no function {name}")
    try:
        network = function(input_shape, outputs)
    except Exception as error:
        what = _describe(error, Path(module.__file__))
        raise UserError(f"architecture {architecture}: {what}") from error
    _check_network(architecture, network, input_shape, outputs)
    return _as_probabilities(architecture, network, activation)


def _check_network(
    architecture: str, network: Any, input_shape: tuple[int | None, ...], outputs: int
) -> None:
    import keras

    if not isinstance(network, keras.Model):
        found = type(network).__name__
        raise UserError(f"architecture {architecture} returned {found}; expected a keras.Model")
    if not hasattr(network, "inputs") or not network.built or not network.inputs:
        raise UserError(
            f"architecture {architecture} returned a model without inputs; expected one made by "
            "keras.Model(inputs, outputs) or keras.Sequential with a keras.Input"
        )
    expected = [(None, *input_shape)], [(None, *input_shape[:-1], outputs)]
    found = [tensor.shape for tensor in network.inputs], [one.shape for one in network.outputs]
    for kind, here, wanted in zip(("input", "output"), found, expected, strict=True):
        if here != wanted:
            shapes = ", ".join(str(shape) for shape in here)
            raise UserError(
                f"architecture {architecture} returned a model of {kind} {shapes}; expected "
                f"{wanted[0]}"
            )


def _as_probabilities(architecture: str, network: "keras.Model", activation: str) -> "keras.Model":
    """End a network in float32 probabilities, in a layer named "probabilities".

    Raises UserError if it ends in the wrong one of sigmoid and softmax.
    """
    import keras

    found = _ending(network)
    if found in PROBABILITIES and found != activation:
        raise UserError(
            f"architecture {architecture} ends in {found}; expected {activation}, or no activation "
            "at all"
        )
    last = keras.layers.Activation(
        "linear" if found == activation else activation, dtype="float32", name="probabilities"
    )
    for layer in network.layers:
        if layer.name == last.name:
            raise UserError(
                f"architecture {architecture} has a layer named {last.name}; expected another "
                "name, because the last layer is called so"
            )
    _, name = split(architecture)
    return keras.Model(network.inputs[0], last(network.outputs[0]), name=name)


def _ending(network: "keras.Model") -> str:
    """Name the activation that a network ends in; "linear" if it has none."""
    layer = network.outputs[0]._keras_history.operation
    while type(layer).__name__ in PASSING:
        layer = layer.input._keras_history.operation
    if hasattr(layer, "layers") and getattr(layer, "outputs", None):  # a network in the network
        return _ending(layer)
    if type(layer).__name__ in ("Softmax", "Sigmoid"):  # as a layer, or from keras.ops
        return type(layer).__name__.lower()
    return getattr(getattr(layer, "activation", None), "__name__", "linear")


# ------------------------------------------------------------------------------------- model file


def needs_code(model: "keras.Model") -> bool:
    """Say whether Keras alone cannot read a model from a file: not all its steps are its layers."""
    try:
        return bool(foreign_parts(model.get_config()))
    except (NotImplementedError, TypeError, ValueError):
        return True  # a layer without a configuration


def foreign_parts(config: Any) -> set[str]:
    """Name the parts of a network's configuration that an HDF5 file cannot hold."""
    if isinstance(config, list | tuple):
        return {name for one in config for name in foreign_parts(one)}
    if not isinstance(config, dict):
        return set()
    names = foreign_parts(list(config.values()))
    name, module = config.get("class_name"), str(config.get("module"))
    is_layer = module.startswith("keras.") and not module.startswith("keras.src.ops")
    is_plain = "registered_name" not in config  # a tensor, not a part
    if name == "Lambda" or not (is_plain or is_layer or module == "keras"):
        names.add(str(name))
    return names


def write_weights(model: "keras.Model", path: Path) -> None:
    """Write a network's weights alone to an HDF5 file, in their order."""
    import h5py

    with h5py.File(path, "w") as file:
        group = file.create_group("weights")
        for number, weight in enumerate(model.get_weights()):
            group[str(number)] = weight


def keep_code(
    architecture: str, model: "keras.Model", path: Path, folder: Path = Path()
) -> dict[str, Any]:
    """Copy a network's file beside its model file; return metadata with which it is built again.

    The copy is the code that was run, even if its file was edited since. A package stays where it
    is installed. folder: that of a relative path.
    """
    code, function = split(architecture)
    if code.endswith(".py"):
        copy = path.with_name(path.stem + CODE_ENDING)
        copy.parent.mkdir(parents=True, exist_ok=True)
        temporary = copy.with_name(f".{copy.name}")
        temporary.write_bytes(_sources[(folder / code).absolute()])
        temporary.replace(copy)  # no reader sees half a file
        architecture = f"{copy.name}:{function}"
    return {
        "architecture": architecture,
        "input_shape": model.input_shape[1:],
        "outputs": model.output_shape[-1],
    }


def rebuild(path: Path, metadata: dict[str, Any]) -> "keras.Model":
    """Build the network of a model file by its code, and set its weights.

    A file of code lies beside the model file. Raises UserError if it does not fit the weights.
    """
    import h5py

    architecture = metadata["architecture"]
    code, function = split(architecture)
    if code.endswith(".py"):  # never a file elsewhere, whatever the metadata say
        architecture = f"{Path(code).name}:{function}"
    shape, outputs = tuple(metadata["input_shape"]), metadata["outputs"]
    activation = last_activation(outputs, metadata.get("masks", {}).get("overlap", False))
    try:
        model = build_own(architecture, shape, outputs, activation, path.parent)
    except UserError as error:
        raise UserError(f"{path} needs the code of its network. {error}") from error
    with h5py.File(path) as file:
        group = file["weights"]
        weights = [group[str(number)][()] for number in range(len(group))]
    expected = [weight.shape for weight in model.get_weights()]
    if [weight.shape for weight in weights] != expected:
        raise UserError(
            f"{path}: its weights do not fit the network that {architecture} builds now; expected "
            "the code that it was trained with"
        )
    model.set_weights(weights)
    return model
