"""Worker processes for files and numbers of clients: memory is limited, and a late one is ended."""

import asyncio
import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import cv2

from inference.exported_model import ImageTooLargeError
from serving.errors import Problem
from serving.sandbox import drop_rights
from utils import UserError, first_line, keep_freed_memory

T = TypeVar("T")
START_S, RETRY_S = 60, 1  # for a process to import what it needs; until another is tried
# What the answers of workers are made of.
ANSWERED = {
    ("builtins", "slice"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("imaging.grid", "Grid"),
    ("inference.exported_model", "Prepared"),
    ("inference.quality", "Quality"),
    ("inference.sampler", "Sampler"),
    ("inference.windows", "Windows"),
    ("serving.errors", "Problem"),
    ("serving.open_inference", "InferenceRequest"),
    ("serving.responses", "MaskResponse"),
    ("serving.workers", "WorkerError"),
}
KEPT_BYTES = 2**25  # of a piece of memory that a worker keeps for the next image
BYTES_PER_PIXEL = 32  # memory for each pixel of the largest image
TOO_MUCH_MEMORY = (
    "more memory than the service gives to one request; expected a smaller image or fewer numbers"
)


# --------------------------------------------------------------------------- in the worker process


def work(pipe: Connection, max_pixels: int) -> None:
    """Answer calls that come through the pipe, until it is closed."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is for the service alone
    hide_output()
    cv2.setNumThreads(1)
    keep_freed_memory(KEPT_BYTES)
    limit_memory(BYTES_PER_PIXEL * max_pixels)
    drop_rights()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            function, args = pipe.recv()
            try:
                answer = call_safely(function, *args)
            except Problem as problem:
                answer = problem
            except Exception as error:
                answer = WorkerError(type(error).__name__)
            pipe.send(answer)


class WorkerError(Exception):
    """A fault of ours in a worker: the kind of error alone, as its message may quote a file."""


def hide_output() -> None:
    """Close stdout and stderr: libraries' messages may quote a patient's file, or forge a line."""
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def limit_memory(num_bytes: int) -> None:
    """Let this process use at most `num_bytes` more than now. Works on Linux only."""
    try:
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
    except (ImportError, OSError):
        return
    used_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
    limit = 1024 * used_kib + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def call_safely(function: Callable[..., T], *args: Any) -> T:
    """Call a function. Its error becomes a Problem that quotes nothing of a file."""
    try:
        return function(*args)
    except ImageTooLargeError as error:
        raise Problem(413, str(error)) from None
    except UserError as error:
        message = str(error)
        # Another library's error, which ours quotes in brackets, may quote the file.
        if error.__context__:
            message = message.replace(f" ({first_line(error.__context__)})", "")
        raise Problem(400, message) from None
    except MemoryError:
        raise Problem(413, TOO_MUCH_MEMORY) from None


# ------------------------------------------------------------------------- in the service's process


class AnswerUnpickler(pickle.Unpickler):
    """Unpickle what a worker answers: plain values, arrays and classes of ours.

    A worker that a file has taken over could send a pickle that calls anything.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that answers are made of. Raises UnpicklingError for another."""
        if (module, name) not in ANSWERED:
            raise pickle.UnpicklingError(f"a worker answered with {module}.{name}")
        return super().find_class(module, name)


class Worker:
    """One process that answers one call at a time."""

    def __init__(self, max_pixels: int) -> None:
        # A spawned process inherits no connection, no key and no thread.
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=work, args=(far_end, max_pixels), daemon=True)
        # The threads of the library's own would keep the rights that the process gives up.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # The process inherits this handler: Ctrl-C is for the service alone.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
            far_end.close()
        self.thread = ThreadPoolExecutor(1)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the process. Raises what it raises.

        Raises EOFError or ConnectionError if the process dies, UnpicklingError for an answer that
        is none of ours.
        """
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self.thread, self._send_and_receive, function, args)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send_and_receive(self, function: Callable[..., T], args: tuple) -> Any:
        self.pipe.send((function, args))
        content = self.pipe.recv_bytes()
        try:
            return AnswerUnpickler(io.BytesIO(content)).load()
        except Exception as error:  # whatever bytes the process has sent
            raise pickle.UnpicklingError(str(error)) from None

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.thread.shutdown(wait=False)


class Workers:
    """A fixed number of workers. One that dies or takes too long is replaced."""

    def __init__(self, count: int, max_pixels: int) -> None:
        self.count = count
        self.max_pixels = max_pixels
        self.all: set[Worker] = set()
        # The one that worked last has its code and memory in the caches.
        self.free: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()
        self.starting: set[asyncio.Task] = set()

    def start(self) -> None:
        """Start the processes; `ready` waits for them."""
        for _ in range(self.count):
            self._spawn()

    async def ready(self) -> None:
        """Wait until all processes that were started can answer."""
        await asyncio.gather(*self.starting)

    def stop(self) -> None:
        """End the processes."""
        for task in self.starting:
            task.cancel()
        for worker in self.all:
            worker.kill()

    async def run(self, function: Callable[..., T], *args: Any, seconds: float | None = None) -> T:
        """Call a function in the next free worker, for at most so many seconds.

        Raises Problem 413 if the call takes too much time or memory, and what the function raises.
        """
        worker = await self.free.get()
        while not worker.process.is_alive():  # it was killed while it was idle
            self._replace(worker)
            worker = await self.free.get()
        try:
            async with asyncio.timeout(seconds) as deadline:
                answer = await worker.run(function, *args)
        except (EOFError, ConnectionError):  # the process died
            self._replace(worker)
            raise Problem(413, TOO_MUCH_MEMORY) from None
        except TimeoutError:
            if not deadline.expired():
                self.free.put_nowait(worker)
                raise
            self._replace(worker)
            raise Problem(413, f"it takes more than {seconds:g} s to read") from None
        # The request's time is over, or the process is no longer ours.
        except (asyncio.CancelledError, pickle.UnpicklingError):
            self._replace(worker)
            raise
        except BaseException:
            self.free.put_nowait(worker)
            raise
        self.free.put_nowait(worker)
        return answer

    def _spawn(self) -> None:
        """Start a process, which is free when it has imported what it needs."""
        try:
            worker = Worker(self.max_pixels)
        except OSError:  # too many processes, or no memory: perhaps there is room later
            asyncio.get_running_loop().call_later(RETRY_S, self._spawn)
            return
        self.all.add(worker)
        task = asyncio.get_running_loop().create_task(self._add(worker))
        self.starting.add(task)
        task.add_done_callback(self.starting.discard)

    async def _add(self, worker: Worker) -> None:
        try:
            async with asyncio.timeout(START_S):
                await worker.run(os.getpid)
        except TimeoutError:
            worker.kill()
        except (EOFError, ConnectionError):
            pass
        self.free.put_nowait(worker)  # `run` finds out if it is dead

    def _replace(self, worker: Worker) -> None:
        worker.kill()
        self.all.discard(worker)
        self._spawn()
