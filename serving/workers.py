"""Processes that do what clients' files and numbers ask for: bounded in memory, ended when a request's time is over."""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2

import images
from images import UserError
from serving import quiet
from serving.problems import Problem

T = TypeVar("T")
BYTES = 32  # of memory for a pixel of the largest image
TOO_MUCH = "more memory than the service gives one request; expected a smaller image, or fewer numbers"


def begin(pixels: int) -> int:
    """Prepare this process for files of strangers, of at most so many pixels; return its id."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which finishes what has begun
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(0)), daemon=True).start()  # it must not stay behind
    quiet()
    cv2.setNumThreads(1)
    images.MAX_BYTES = 16 * pixels
    try:
        import resource
        from pathlib import Path

        lines = Path("/proc/self/status").read_text().splitlines()
        now = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (now + BYTES * pixels, now + BYTES * pixels))
    except (ImportError, OSError):  # no Linux: the sizes that headers promise are the only bound
        pass
    return os.getpid()


def do(call: Callable[..., T], *args: Any) -> T:
    """Call, in a worker. What another library said of an error may quote the file; it does not leave the worker."""
    try:
        return call(*args)
    except UserError as error:
        said = error.__context__
        raise Problem(400, str(error).replace(f" ({images.brief(said)})", "") if said else str(error)) from None
    except MemoryError:
        raise Problem(413, TOO_MUCH) from None


class Workers:
    """A number of processes, each of which does one thing at a time."""

    def __init__(self, count: int, pixels: int) -> None:
        self.count, self.pixels = count, pixels
        self.free: asyncio.Queue[tuple[ProcessPoolExecutor, int]] = asyncio.Queue()
        self.hiring: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Start them."""
        await asyncio.gather(*(self._hire() for _ in range(self.count)))

    async def _hire(self) -> None:
        while True:
            process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                number = await asyncio.get_running_loop().run_in_executor(process, begin, self.pixels)
            except BrokenProcessPool:  # the machine is short of memory, perhaps
                await asyncio.sleep(1)
                continue
            self.free.put_nowait((process, number))
            return

    async def __call__(self, call: Callable[..., T], *args: Any) -> T:
        """Do something that takes a while. Raises Problem 413 if it takes too much memory, and what `call` raises."""
        process, number = await self.free.get()
        try:
            result = await asyncio.get_running_loop().run_in_executor(process, do, call, *args)
        except (asyncio.CancelledError, BrokenProcessPool) as error:  # its time is over; or it died
            if isinstance(error, asyncio.CancelledError):
                os.kill(number, signal.SIGKILL)
            process.shutdown(wait=False)
            task = asyncio.create_task(self._hire())
            self.hiring.add(task)
            task.add_done_callback(self.hiring.discard)
            if isinstance(error, BrokenProcessPool):
                raise Problem(413, TOO_MUCH) from None
            raise
        except BaseException:
            self.free.put_nowait((process, number))
            raise
        self.free.put_nowait((process, number))
        return result

    async def stop(self) -> None:
        """End them, once nothing is asked any longer."""
        for task in self.hiring:
            task.cancel()
        while not self.free.empty():
            await asyncio.to_thread(self.free.get_nowait()[0].shutdown)
