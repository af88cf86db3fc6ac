"""How the benchmarks measure: calls in turn, separate processes, steps per second."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

import train
from dataset.cache import Dataset
from imaging.labels import Classes
from training.sampling import make_sampler
from training.twin import make_twin

REST_S = 0.5  # before each measurement, so that the threads of the previous one sleep


def run_interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Run every call once to warm up, then all in turn, `rounds` times; return the results."""
    results: dict[str, list[Any]] = {name: [] for name in calls}
    for i in tqdm(range(rounds + 1), "measuring", unit="round", disable=None):
        for name, call in calls.items():
            time.sleep(REST_S)
            value = call()
            if i > 0:
                results[name].append(value)
    return results


@contextlib.contextmanager
def isolated_processes(
    calls: dict[str, tuple], library: Callable[[str], str] = str
) -> Iterator[dict[str, Callable[[], Any]]]:
    """Give each library a process of its own, because one library's threads slow another's.

    A call is a function and its arguments. All must be picklable. library: whose process a call
    of this name runs in; by default each has its own.
    """

    def wait_for(pool: ProcessPoolExecutor, call: tuple) -> Any:
        return pool.submit(*call).result()

    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools, isolated = {}, {}
        for name, call in calls.items():
            owner = library(name)
            if owner not in pools:
                pools[owner] = stack.enter_context(ProcessPoolExecutor(1, context))
            isolated[name] = partial(wait_for, pools[owner], call)
        yield isolated


def steps_per_second(step: Callable[[], object], count: int) -> float:
    """Time `count` calls after two calls that wake threads and fill caches."""
    for _ in range(2):
        step()
    start = time.perf_counter()
    for _ in range(count):
        step()
    return count / (time.perf_counter() - start)


# ---------------------------------------------------------------------------------- training steps


def training_model(config: train.Config) -> keras.Model:
    """Build and compile the network as train.py does, for one class of grey images."""
    dataset = Dataset([], make_sampler(config, []), 1, Classes(), pd.DataFrame())
    twin = make_twin(train.build_network(config, dataset))
    train.compile_model(twin, config, steps=10_000)
    return twin


class Repeated(keras.utils.PyDataset):
    """One batch, `count` times."""

    def __init__(self, x: np.ndarray, y: np.ndarray, count: int) -> None:
        super().__init__()
        self.batch, self.count = (x, y), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.batch


class StepClock(keras.callbacks.Callback):
    """Note the time at the end of each step."""

    async_safe = True  # like training's Checkpoint

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.times.append(time.perf_counter())


def fit_seconds(model: keras.Model, batches: keras.utils.PyDataset) -> float:
    """Time an epoch of `fit` as train.py runs it, without what comes before the first step ends."""
    clock = StepClock()
    model.fit(batches, verbose=0, shuffle=False, callbacks=[clock])
    times = sorted(clock.times)
    return (times[-1] - times[0]) * len(times) / (len(times) - 1)
