"""Train with several processes, on one machine or many: each computes its share of every batch (data parallelism).

Every process runs the same `train.py --distributed`; who it is, it reads from what its launcher sets: Slurm's srun or
Open MPI's mpirun (as JAX does), torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK), or by hand
KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID. The first process
leads: it alone writes. All call the same functions of this file in the same order, as each waits for the others.

Without `join` there is one process, which leads, and nothing waits.
"""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import keras
import numpy as np

from dataset.batches import Shard
from utils import UserError

T = TypeVar("T")
HEARTBEAT_TIMEOUT_S = 30  # seconds without a sign of life after which a process counts as dead
INIT_TIMEOUT_S = 300  # seconds that processes wait for each other at the start
PEER_LOST_EXIT_CODE = 3  # exit code where another process ended

_joined = False


def initialize() -> None:
    """Meet the other processes. Raises UserError where there are none to be found."""
    global _joined
    if _joined:
        return
    if keras.backend.backend() != "jax":
        raise UserError(
            f"distributed training needs KERAS_BACKEND=jax, not {keras.backend.backend()}"
        )
    import jax

    address, count, rank = _torchrun()
    wait = {
        "heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT_S,
        "initialization_timeout": INIT_TIMEOUT_S,
    }  # which Keras does not pass on
    jax.distributed.initialize = functools.partial(jax.distributed.initialize, **wait)
    try:
        keras.distribution.initialize(address, count, rank)
    except ValueError as error:
        raise UserError(
            f"distributed: nobody says who takes part ({error}); start this by srun, mpirun or torchrun, or set "
            "KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID"
        ) from None
    _joined = jax.process_count() > 1
    print(
        f"process {jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices",
        flush=True,
    )
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (what all would say, the first process says)


def _torchrun() -> tuple[str | None, int | None, int | None]:
    """Read address, number of processes and own number as torchrun gives them; None where Keras or JAX look."""
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ or not {
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
    } <= set(os.environ):
        return None, None, None
    port = int(os.environ.get("MASTER_PORT", 29500)) + 1  # torchrun itself listens at MASTER_PORT
    if "LOCAL_RANK" in os.environ:
        os.environ.setdefault("JAX_LOCAL_DEVICE_IDS", os.environ["LOCAL_RANK"])
    return (
        f"{os.environ['MASTER_ADDR']}:{port}",
        int(os.environ["WORLD_SIZE"]),
        int(os.environ["RANK"]),
    )


def shard() -> Shard:
    """Tell this process's share of the work."""
    if not _joined:
        return Shard()
    import jax

    return Shard(jax.process_index(), jax.process_count(), jax.device_count())


def is_main_process() -> bool:
    """Tell whether this is the process that writes."""
    return shard().rank == 0


def scope() -> AbstractContextManager:
    """Make the context in which a network is built and trained by all processes together.

    Any other network is the process's own: in this context, even making a variable waits for the others.
    """
    return (
        keras.distribution.DataParallel(auto_shard_dataset=False).scope()
        if _joined
        else nullcontext()
    )


def on_main_process(call: Callable[[], Any]) -> None:
    """Call in the first process alone, where it need not wait for the others even within `scope`."""
    if not is_main_process():
        return
    shared = keras.distribution.distribution()
    keras.distribution.set_distribution(
        None
    )  # or even saving waits: Keras makes an optimizer to see what it is like
    try:
        call()
    finally:
        keras.distribution.set_distribution(shared)


def barrier() -> None:
    """Wait until all processes are here."""
    if _joined:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("cluster.wait")


def main_process_first(call: Callable[[], T]) -> T:
    """Call in the first process, then in the others, which find the files that it wrote."""
    if not is_main_process():
        barrier()
    result = call()
    if is_main_process():
        barrier()
    return result


def broadcast_from_main(call: Callable[[], T]) -> T:
    """Call in the first process alone and tell the result, which JSON can hold, to all."""
    if not _joined:
        return call()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = json.dumps(call()).encode() if is_main_process() else b""
    length = int(broadcast_one_to_all(np.int32(len(text))))
    return json.loads(
        broadcast_one_to_all(np.frombuffer(text or bytes(length), np.uint8)).tobytes()
    )


@contextmanager
def abort_on_error() -> Iterator[None]:
    """End the process where the block fails: by itself JAX waits minutes for the others, which wait for this one."""
    try:
        yield
    except BaseException as error:
        if not _joined or (isinstance(error, SystemExit) and not error.code):
            raise
        code = _explain(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _explain(error: BaseException) -> int:
    """Print why the process ends; return its exit code."""
    import jax

    if isinstance(error, SystemExit):  # explained
        return error.code
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(
        error
    ):  # which is a ValueError at times
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        print(
            f"error: process {shard().rank} lost another one, which ended or cannot be reached; see its messages. "
            "The same command for all goes on from what was written",
            file=sys.stderr,
        )
        return PEER_LOST_EXIT_CODE
    traceback.print_exception(error)
    return 1
