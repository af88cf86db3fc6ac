"""Serve an ONNX file with NVIDIA's Triton until stdin ends: real_triton.py MODEL.onnx PORT.

It runs in a Python of its own, because Triton needs an older numpy.
"""

import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

answer, sys.stdout = sys.stdout, sys.stderr  # Triton logs to stdout
model, port = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
# Of the outputs the first alone, as in the config.pbtxt that export.py writes: not the spread.
sides = (session.get_inputs(), session.get_outputs()[:1])
tensors = [  # without the batch's axis, which Triton adds
    [Tensor(name=one.name, dtype=np.float32, shape=one.shape[1:]) for one in side] for side in sides
]
# This version has known vulnerabilities: loopback only.
here = {
    "http_address": "127.0.0.1",
    "allow_grpc": False,
    "allow_metrics": False,
    "exit_timeout_secs": 5,
}


@batch
def compute(**inputs: np.ndarray) -> list[np.ndarray]:
    """Run the network."""
    return session.run([tensors[1][0].name], inputs)


with Triton(config=TritonConfig(http_port=int(port), **here), workspace="triton") as triton:
    triton.bind("unet", compute, *tensors, config=ModelConfig(max_batch_size=8))
    triton.run()
    print("ready", file=answer, flush=True)
    sys.stdin.read()  # ends with the test, even if that is killed
