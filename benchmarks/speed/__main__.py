"""Measure speed and memory: every figure of docs/speed.md.

    python -m benchmarks.speed training               training steps, Keras and PyTorch
    python -m benchmarks.speed profile                where the time of a training step goes
    python -m benchmarks.speed pipeline               reading and augmenting images beside the steps
    python -m benchmarks.speed prediction             engines, OpenVINO's benchmark_app, predict.py
    python -m benchmarks.speed start                  seconds until a script answers
    python -m benchmarks.speed cold --data-dir DIR    a whole training, train.py and PyTorch
    python -m benchmarks.speed service                serve.py: latency and images per second
    python -m benchmarks.speed archive                a Ray cluster of two nodes on this machine
    python -m benchmarks.speed resume                 an archive of 100,000 images, nearly done
    python -m benchmarks.speed memory                 peak memory of a training on 10,000 images
    python -m benchmarks.speed large                  peak memory of predicting slides and volumes

What is compared runs in turn. Each figure is a row of results/benchmark.csv with its median, range,
date and hardware. PyTorch and OpenVINO are optional: pip install torch openvino.
"""

import os

import utils

if __name__ == "__main__":
    # JAX would reserve most of a GPU's memory for one process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    utils.load_keras()

from benchmarks.speed.archive import archive
from benchmarks.speed.cold import cold
from benchmarks.speed.large import large
from benchmarks.speed.memory import memory
from benchmarks.speed.pipeline import pipeline
from benchmarks.speed.prediction import prediction
from benchmarks.speed.profile import profile
from benchmarks.speed.resume import resume
from benchmarks.speed.service import service
from benchmarks.speed.start import start
from benchmarks.speed.training import training

COMMANDS = (
    *(training, profile, pipeline, prediction, start, cold),
    *(service, archive, resume, memory, large),
)

if __name__ == "__main__":
    utils.run_commands({command.__name__: command for command in COMMANDS}, __doc__)
