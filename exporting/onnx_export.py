"""Write a Keras network as ONNX, in float32 and in 8-bit integers."""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from inference import engines
from utils import UserError, atomic

MAX_DIFFERENCE = 0.01  # of a probability
OUTPUTS = ("probabilities", "spread")
MAX_CHANNELS = 16  # of a softmax that is written as simple operations


class NoOnnx(UserError):
    """A network has a part that cannot be written as ONNX."""


def write_onnx(network: Any, metadata: dict[str, Any], path: Path) -> None:
    """Write a Keras network and its metadata; a batch may have any size.

    Raises UserError if the packages for this are not installed or the network is no graph, NoOnnx
    if it cannot be written, or would answer otherwise than in Keras.
    """
    for package in ("onnx", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install -r requirements-export.txt")
    import onnx

    model = convert(network)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    replace_erfc(model.graph)
    replace_softmax(model)
    properties = {name: json.dumps(value) for name, value in metadata.items()}
    onnx.helper.set_model_props(model, properties)
    check_operations(model)
    check_batch(network, model.SerializeToString())
    with atomic(path) as temporary:
        onnx.save(model, temporary)


def convert(network: Any) -> Any:
    """Turn a Keras network into an ONNX model.

    The graph is frozen first: tf2onnx loses constants of attention, such as Swin's, otherwise.
    """
    import tensorflow as tf
    from keras.src.export.tf2onnx_lib import patch_tf2onnx
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    with warnings.catch_warnings():  # about NumPy's old names
        warnings.simplefilter("ignore", FutureWarning)
        patch_tf2onnx()  # as Keras does, for NumPy 2
    import tf2onnx
    from tf2onnx.optimizer import back_to_back_optimizer

    # It joins two Reshapes even if a 0 in the second means a size that only the first makes.
    back_to_back_optimizer._func_map.pop(("Reshape",), None)
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # check_operations says it once
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # tf2onnx calls old functions

    image = tf.TensorSpec(network.input_shape, tf.float32, name="image")
    traced = tf.function(lambda image: network(image, training=False), input_signature=[image])
    try:
        concrete = traced.get_concrete_function()
    except Exception as error:  # of the network's own code
        lines = [line.strip() for line in str(error).splitlines()]
        calls = [line for line in lines if line.startswith("Exception encountered")]
        raise UserError(
            "the network cannot be exported: TensorFlow makes no graph of it "
            f"({type(error).__name__}: {(calls or lines or [''])[0]}). predict.py may still run "
            "the model file"
        ) from error
    frozen = convert_variables_to_constants_v2(concrete)
    graph = frozen.graph.as_graph_def()
    # Keras compiles grouped convolutions by XLA. Without these marks they are plain operations.
    for part in (*graph.node, *graph.library.function):
        for mark in ("_XlaMustCompile", "_noinline"):
            part.attr.pop(mark, None)
    entry, outputs = frozen.inputs[0].name, [output.name for output in frozen.outputs]
    # Clients can guess these names.
    names = {entry: "image", **dict(zip(outputs, OUTPUTS, strict=False))}
    model, _ = tf2onnx.convert.from_graph_def(
        graph, input_names=[entry], output_names=outputs, tensors_to_rename=names
    )
    return model


def check_operations(model: Any) -> None:
    """Raise NoOnnx if a model has operations that ONNX does not have."""
    import onnx

    domains = {entry.domain: entry.version for entry in model.opset_import}
    used = {(node.op_type, node.domain) for node in model.graph.node}
    unknown = {name for name, domain in used if not onnx.defs.has(name, domains[domain], domain)}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise NoOnnx(f"ONNX has no operation for TensorFlow's {names}")
    onnx.checker.check_model(model, full_check=True)


def check_batch(network: Any, content: bytes) -> None:
    """Raise NoOnnx if two images together get other probabilities than in Keras."""
    import onnxruntime

    images = np.random.default_rng(0).random((2, *network.input_shape[1:]), np.float32)
    found = network.predict_on_batch(images)
    expected = engines.join_outputs(found if isinstance(found, list) else [found])
    onnxruntime.set_default_logger_severity(4)  # what goes wrong is told once, below
    try:
        difference = np.abs(engines.open_onnxruntime(content).run(images) - expected).max()
    except Exception as error:  # ONNX Runtime has errors of its own
        reason = str(error).splitlines()[0]
        raise NoOnnx(f"ONNX Runtime does not run it on two images ({reason})") from None
    finally:
        onnxruntime.set_default_logger_severity(2)
    if not difference <= MAX_DIFFERENCE:
        raise NoOnnx(
            f"its probabilities in ONNX Runtime differ by {difference:.2g} from those in Keras; "
            f"expected at most {MAX_DIFFERENCE}"
        )


def replace_erfc(graph: Any) -> None:
    """Write each Erfc as 1 - Erf: TensorFlow's exact GELU has it, and ONNX does not."""
    import onnx

    nodes = []
    for node in graph.node:
        if node.op_type != "Erfc":
            nodes.append(node)
            continue
        one, erf = f"{node.output[0]}_one", f"{node.output[0]}_erf"
        number = onnx.helper.make_tensor(one, onnx.TensorProto.FLOAT, (), [1.0])
        nodes += [
            onnx.helper.make_node("Constant", [], [one], value=number),
            onnx.helper.make_node("Erf", node.input, [erf]),
            onnx.helper.make_node("Sub", [one, erf], node.output),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def replace_softmax(model: Any) -> None:
    """Write each softmax over few channels as simple operations, which ONNX Runtime runs faster."""
    import onnx

    typed = onnx.shape_inference.infer_shapes(model).graph
    sizes = {}
    for value in (*typed.value_info, *typed.input, *typed.output):
        sizes[value.name] = [side.dim_value for side in value.type.tensor_type.shape.dim]
    make, nodes = onnx.helper.make_node, []
    for node in model.graph.node:
        axis = next((one.i for one in node.attribute if one.name == "axis"), -1)
        sides = sizes.get(node.input[0]) if node.op_type == "Softmax" else None
        if not sides or not 0 < sides[axis] <= MAX_CHANNELS:
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        axes = onnx.helper.make_tensor(f"{y}_axes", onnx.TensorProto.INT64, (1,), [axis])
        nodes += [
            make("Constant", [], [f"{y}_axes"], value=axes),
            make("ReduceMax", [x], [f"{y}_highest"], axes=[axis]),
            make("Sub", [x, f"{y}_highest"], [f"{y}_shifted"]),
            make("Exp", [f"{y}_shifted"], [f"{y}_exp"]),
            make("ReduceSum", [f"{y}_exp", f"{y}_axes"], [f"{y}_sum"]),
            make("Div", [f"{y}_exp", f"{y}_sum"], [y]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def write_int8(source: Path, path: Path, images: Iterable[np.ndarray]) -> None:
    """Quantize an ONNX file to 8-bit integers.

    images: calibrate the ranges of the integers, prepared, each (1, …, C) float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    input_name = engines.open_onnxruntime(source.read_bytes()).input_name
    feeds = iter([{input_name: image} for image in images])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    with atomic(path) as temporary, tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused.onnx"
        quant_pre_process(source, fused, skip_symbolic_shape=True)
        # ONNX Runtime's pooling in integers knows images only, not the means of normalizations.
        nodes = onnx.load(fused).graph.node
        means = [node.name for node in nodes if node.op_type == "GlobalAveragePool"]
        quantize_static(
            fused,
            temporary,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            nodes_to_exclude=means,
        )
