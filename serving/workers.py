"""Processes that do what clients' files and numbers ask for: bounded in memory, ended when a request's time is over."""

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import cv2

import serving
from inference.exported_model import TooLarge
from serving.errors import Problem
from utils import UserError, first_line

T = TypeVar("T")
BYTES = 32  # of memory for a pixel of the largest image
TOO_MUCH = (
    "more memory than the service gives one request; expected a smaller image, or fewer numbers"
)


def bound_memory(more: int) -> None:
    """Let this process have so many bytes more than it has now. Only Linux can tell; elsewhere nothing is done."""
    try:
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
    except (ImportError, OSError):
        return
    now = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, now + more))


def call_safely(call: Callable[..., T], *args: Any) -> T:
    """Call, in a worker. What another library said of an error may quote the file; it does not leave the worker."""
    try:
        return call(*args)
    except TooLarge as error:
        raise Problem(413, str(error)) from None
    except UserError as error:
        said = error.__context__
        raise Problem(
            400, str(error).replace(f" ({first_line(said)})", "") if said else str(error)
        ) from None
    except MemoryError:
        raise Problem(413, TOO_MUCH) from None


def work(pipe: Connection, pixels: int) -> None:
    """Do what comes through the pipe until it is closed; images have at most so many pixels."""
    serving.quiet()
    cv2.setNumThreads(1)
    bound_memory(BYTES * pixels)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            call, args = pipe.recv()
            try:
                answer = call_safely(call, *args)
            except Exception as error:
                answer = error
            pipe.send(answer)


class Worker:
    """A process that does one thing at a time."""

    def __init__(self, pixels: int) -> None:
        context = multiprocessing.get_context(
            "spawn"
        )  # with nothing of ours: no connection, no key, no thread
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, pixels), daemon=True)
        before = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # which it inherits: Ctrl-C is for the service
        self.process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()
        self.thread = ThreadPoolExecutor(1)

    async def ask(self, call: Callable[..., T], *args: Any) -> T:
        """Let it call, without holding up the event loop. Raises EOFError or ConnectionError if the process ends."""

        def wait() -> Any:
            self.pipe.send((call, args))
            return self.pipe.recv()

        answer = await asyncio.get_running_loop().run_in_executor(self.thread, wait)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.thread.shutdown(wait=False)


class Workers:
    """A number of them."""

    def __init__(self, count: int, pixels: int) -> None:
        self.count, self.pixels = count, pixels
        self.all: set[Worker] = set()
        self.free: asyncio.Queue[Worker] = asyncio.Queue()

    def start(self) -> None:
        """Start them."""
        for _ in range(self.count):
            self.free.put_nowait(self._hire())

    def _hire(self) -> Worker:
        worker = Worker(self.pixels)
        self.all.add(worker)
        return worker

    def _replace(self, worker: Worker) -> Worker:
        worker.end()
        self.all.discard(worker)
        return self._hire()

    async def __call__(self, call: Callable[..., T], *args: Any) -> T:
        """Do something that takes a while. Raises Problem 413 if it takes too much memory, and what `call` raises."""
        worker = await self.free.get()
        if not worker.process.is_alive():  # killed while it had nothing to do
            worker = self._replace(worker)
        try:
            return await worker.ask(call, *args)
        except (
            asyncio.CancelledError,
            EOFError,
            ConnectionError,
        ) as error:  # its time is over; or it died
            worker = self._replace(worker)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise Problem(413, TOO_MUCH) from None
        finally:
            self.free.put_nowait(worker)

    def stop(self) -> None:
        """End them."""
        for worker in self.all:
            worker.end()
