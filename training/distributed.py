"""Train with several processes, on one machine or many: each computes its part of every batch.

Every process runs the same `train.py --distributed`. A launcher says who it is: Slurm's srun or
Open MPI's mpirun (JAX reads them), torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
LOCAL_RANK), or by hand KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DISTRIBUTION_NUM_PROCESSES and
KERAS_DISTRIBUTION_PROCESS_ID. Rank 0 is the main process: it alone writes files.

All processes call the same functions of this file in the same order, because each waits for the
others. Without `initialize` there is one process, and nothing waits.
"""

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
HEARTBEAT_TIMEOUT_S = 30  # a process that is silent for longer counts as dead
INIT_TIMEOUT_S = 300  # how long processes wait for each other at the start
PEER_LOST_EXIT_CODE = 3  # another process ended


def initialize() -> None:
    """Meet the other processes. Raises UserError if no launcher says who they are."""
    backend = keras.backend.backend()
    if backend != "jax":
        raise UserError(f"KERAS_BACKEND is {backend}; --distributed needs KERAS_BACKEND=jax")
    import jax

    if jax.distributed.is_initialized():
        return
    try:
        address, world_size, rank = _read_launcher()
        jax.distributed.initialize(
            address,
            world_size,
            rank,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            initialization_timeout=INIT_TIMEOUT_S,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: no launcher says which processes take part ({error}); start it with "
            "srun, mpirun or torchrun, or set KERAS_DISTRIBUTION_JOB_ADDRESSES, "
            "KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID"
        ) from None
    here = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{here}, {jax.device_count()} devices", flush=True)
    if not is_main_process():  # the main process says what all would say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _read_launcher() -> tuple[str | None, int | None, int | None]:
    """Read address, number of processes and rank from the environment; None lets JAX look."""
    env = os.environ
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" in env:
        address = env.get("KERAS_DISTRIBUTION_JOB_ADDRESSES", "").split(",")[0]
        rank = int(env.get("KERAS_DISTRIBUTION_PROCESS_ID", 0))
        return address, int(env["KERAS_DISTRIBUTION_NUM_PROCESSES"]), rank
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(env):
        return None, None, None
    if "LOCAL_RANK" in env:
        env.setdefault("JAX_LOCAL_DEVICE_IDS", env["LOCAL_RANK"])
    port = int(env.get("MASTER_PORT", 29500)) + 1  # torchrun itself listens at MASTER_PORT
    return f"{env['MASTER_ADDR']}:{port}", int(env["WORLD_SIZE"]), int(env["RANK"])


def shard() -> Shard:
    """Return which part of each batch this process computes."""
    if keras.backend.backend() != "jax":
        return Shard()
    import jax

    if jax.process_count() == 1:
        return Shard()
    return Shard(jax.process_index(), jax.process_count(), jax.device_count())


def is_distributed() -> bool:
    """Say whether there are several processes."""
    return shard().world_size > 1


def is_main_process() -> bool:
    """Say whether this is the process that writes files."""
    return shard().rank == 0


def scope() -> AbstractContextManager:
    """Return the context in which all processes build and train one network together.

    Within it even making a variable waits for the other processes.
    """
    if not is_distributed():
        return nullcontext()
    return keras.distribution.DataParallel(auto_shard_dataset=False).scope()


def on_main_process(call: Callable[[], Any]) -> None:
    """Call in the main process alone; it does not wait for the others, even within `scope`."""
    if not is_main_process():
        return
    shared = keras.distribution.distribution()
    # Else even saving waits, because Keras makes an optimizer to see what it is like.
    keras.distribution.set_distribution(None)
    try:
        call()
    finally:
        keras.distribution.set_distribution(shared)


def barrier() -> None:
    """Wait until all processes are here."""
    if is_distributed():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("barrier")


def main_process_first(call: Callable[[], T]) -> T:
    """Call in the main process, then in the others, which find the files that it wrote."""
    if not is_main_process():
        barrier()
    result = call()
    if is_main_process():
        barrier()
    return result


def broadcast_from_main(function: Callable[..., T], *args: Any) -> T:
    """Call in the main process alone; return its result, which JSON can hold, in all."""
    if not is_distributed():
        return function(*args)
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = json.dumps(function(*args)).encode() if is_main_process() else b""
    length = int(broadcast_one_to_all(np.int32(len(text))))
    buffer = np.frombuffer(text or bytes(length), np.uint8)
    return json.loads(broadcast_one_to_all(buffer).tobytes())


@contextmanager
def abort_on_error() -> Iterator[None]:
    """End the process at once when the block fails.

    By itself JAX waits minutes for the other processes, which wait for this one.
    """
    try:
        yield
    except BaseException as error:
        is_success = isinstance(error, SystemExit) and not error.code
        if is_success or not is_distributed():
            raise
        code = _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _report(error: BaseException) -> int:
    """Print why the process ends; return its exit code."""
    import jax

    if isinstance(error, SystemExit):  # the message is printed already
        return error.code
    # Gloo, the transport between processes, at times raises a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        print(
            f"error: process {shard().rank} lost another process, which ended or cannot be "
            "reached; see its messages. The same command for all goes on from the last checkpoint",
            file=sys.stderr,
        )
        return PEER_LOST_EXIT_CODE
    traceback.print_exception(error)
    return 1
