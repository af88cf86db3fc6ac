"""Measure accuracy: the studies of docs/results.md, each by train.py and predict.py themselves.

    python -m benchmarks.accuracy folds --data-dir DIR       cross-validation, folds in parallel
    python -m benchmarks.accuracy ablation --data-dir DIR    one change of the default at a time
    python -m benchmarks.accuracy few --data-dir DIR         5, 10, 20, 40 labelled images
    python -m benchmarks.accuracy shift --data-dir DIR       trained on one kind, tested on another
    python -m benchmarks.accuracy corruptions --run RUN      a cross-validation on corrupted images
    python -m benchmarks.accuracy predicted --run RUN        does the predicted Dice hold?
    python -m benchmarks.accuracy storage --run RUN          are 8 bits enough for prepared images?

They write results/ablation.csv, few.csv, shift.csv, corruptions-RUN.csv, predicted-RUN.csv and
storage-RUN.csv. After a stop the same command goes on. With RAY_ADDRESS the first four train on
the machines of a Ray cluster.
"""

import utils

if __name__ == "__main__":  # without TensorFlow's messages
    utils.load_keras()

from benchmarks.accuracy.ablation import ablation
from benchmarks.accuracy.few import few
from benchmarks.accuracy.predicted import predicted
from benchmarks.accuracy.robustness import corruptions
from benchmarks.accuracy.shift import shift
from benchmarks.accuracy.storage import storage
from benchmarks.accuracy.trainings import folds

COMMANDS = (folds, ablation, few, shift, corruptions, predicted, storage)

if __name__ == "__main__":
    utils.run_commands({command.__name__: command for command in COMMANDS}, __doc__)
