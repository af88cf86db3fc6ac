"""Describe an ONNX network to NVIDIA's Triton: config.pbtxt and the names of its channels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference.engines import Engine
from utils import atomic

MAX_BATCH = 32
LABELS = "labels.txt"
CONFIG = """\
# NVIDIA Triton Inference Server: tritonserver --model-repository {folder}
name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch}
input [
  {{
    name: "{input_name}"
    data_type: TYPE_FP32
    dims: [ {input_dims} ]
  }}
]
output [
  {{
    name: "{output_name}"
    data_type: TYPE_FP32
    dims: [ {output_dims} ]
    label_filename: "{labels}"
  }}
]
version_policy: {{ latest: {{ num_versions: 1 }} }}
dynamic_batching {{ }}
"""


def write_triton_config(folder: Path, network: Engine, metadata: dict[str, Any]) -> None:
    """Write config.pbtxt and labels.txt to the folder of a model, in which versions lie."""
    *sides, channels = network.input_shape
    outputs = network.output_channels
    text = CONFIG.format(
        folder=folder.parent,
        name=folder.name,
        max_batch=MAX_BATCH,
        input_name=network.input_name,
        input_dims=", ".join(map(str, (*sides, channels))),
        output_name=network.output_name,
        output_dims=", ".join(map(str, (*sides, outputs))),
        labels=LABELS,
    )
    lines = "".join(f"{label}\n" for label in output_labels(metadata["classes"], outputs))
    for name, content in (("config.pbtxt", text), (LABELS, lines)):
        with atomic(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def output_labels(names: Sequence[str], channels: int) -> list[str]:
    """Name the network's output channels; the background is the first if it has one."""
    return [*["background"] * (channels - len(names)), *names]
