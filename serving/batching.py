"""Run the exported network for requests: gather them into batches, prepare images, decide masks."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class Busy(Exception):
    """The queue is full: try again later."""


class Batcher:
    """Run the inputs of several requests together, at most `most`: those that came while the batch before was computed.

    One thread runs the network, so the event loop never waits. `room` inputs may wait; one more raises Busy. What
    nobody waits for any longer (its deadline passed) is not computed.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        most: int = 8,
        room: int = 64,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.run, self.most, self.room, self.observe = run, most, room, observe
        self.waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self.task: asyncio.Task | None = None
        self.next: tuple[np.ndarray, asyncio.Future] | None = (
            None  # taken, but too many for the batch before
        )
        self.pending = 0  # inputs that wait or are computed

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self.task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Finish what waits, then end."""
        while self.pending:
            await asyncio.sleep(0.01)
        if self.task:
            self.task.cancel()
        self.thread.shutdown(wait=False)

    async def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Compute probabilities (N, H, W, K) of prepared images (N, H, W, C). Raises Busy."""
        if self.pending and self.pending + len(batch) > self.room:
            raise Busy
        self.pending += len(batch)
        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._done(len(batch)))
        self.waiting.put_nowait((batch, future))
        return await future

    def _done(self, count: int) -> None:
        self.pending -= count

    async def _gather(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        """Take the first that waits, and what else waits and fits with it."""
        taken, self.next = [self.next or await self.waiting.get()], None
        while (
            room := self.most - sum(len(batch) for batch, _ in taken)
        ) > 0 and not self.waiting.empty():
            more = self.waiting.get_nowait()
            if len(more[0]) > room:
                self.next = more
                break
            taken.append(more)
        return [(batch, future) for batch, future in taken if not future.done()]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = await self._gather()
            if not taken:
                continue
            start = time.monotonic()
            try:
                batch = np.concatenate([batch for batch, _ in taken])
                results = await loop.run_in_executor(self.thread, self.run, batch)
                self.observe(len(batch), time.monotonic() - start)
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for batch, future in taken:
                if not future.done():
                    future.set_result(results[: len(batch)])
                results = results[len(batch) :]
