"""Write a Keras network as ONNX, in float32 and in 8-bit integers."""

import importlib.util
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from inference import engines
from utils import UserError, atomic


def write_onnx(network: Any, metadata: dict[str, Any], path: Path) -> None:
    """Write a Keras network and its metadata; a batch may have any size.

    Raises UserError if the packages for this are not installed.
    """
    for package in ("onnx", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install -r requirements-export.txt")
    import onnx

    with atomic(path) as temporary:
        network.export(temporary, format="onnx", verbose=False)
        model = onnx.load(temporary)
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        rename_output(model.graph, "probabilities")
        replace_erfc(model.graph)
        properties = {name: json.dumps(value) for name, value in metadata.items()}
        onnx.helper.set_model_props(model, properties)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, temporary)


def rename_output(graph: Any, name: str) -> None:
    """Rename the network's only output, so that clients can guess it."""
    old = graph.output[0].name
    graph.output[0].name = name
    for node in graph.node:
        node.output[:] = [name if output == old else output for output in node.output]


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


def write_int8(source: Path, path: Path, images: Iterable[np.ndarray]) -> None:
    """Quantize an ONNX file to 8-bit integers.

    images: calibrate the ranges of the integers, prepared, each (1, …, C) float32.
    """
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
        quantize_static(fused, temporary, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
