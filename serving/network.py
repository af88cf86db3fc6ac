"""Run the network for several requests side by side."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from serving.errors import Problem


@dataclass
class Statistics:
    """What the network has computed since the start; times are sums over the requests, in ns."""

    requests: int = 0
    images: int = 0
    failed: int = 0
    waiting_ns: int = 0
    computing_ns: int = 0
    last_ms: int = 0  # time of day of the last one, in ms since 1970


class NetworkThreads:
    """Compute the images of several requests at a time, each request's in a thread.

    The event loop never waits for the network. Requests whose client gave up while they waited are
    not computed. A batch of the images of several requests would not be faster on a processor.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        threads: int,
        max_pending: int = 64,
        on_computed: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """Keep the settings.

        run: computes probabilities (N, …, K) of images (N, …, C), in several threads at a time.
        max_pending: images that may wait or be computed; more are refused.
        on_computed: is called with the number of images and the seconds of every run.
        """
        self.run = run
        self.max_pending = max_pending
        self.on_computed = on_computed
        self.pending = 0  # images that wait or are computed
        self.statistics = Statistics()
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="network")

    async def stop(self) -> None:
        """Finish what waits, then end."""
        while self.pending:
            await asyncio.sleep(0.01)
        self.pool.shutdown(wait=False)

    async def predict(self, images: np.ndarray) -> np.ndarray:
        """Compute probabilities (N, …, K) of images (N, …, C). Raises Problem 503."""
        if self.pending and self.pending + len(images) > self.max_pending:
            raise Problem(503, "too many images are waiting; try again", Retry_After="1")
        self.pending += len(images)
        asked = time.monotonic_ns()
        try:
            loop = asyncio.get_running_loop()
            probs, began, ended = await loop.run_in_executor(self.pool, self._compute, images)
        except Exception:
            self.statistics.failed += 1
            raise
        finally:
            self.pending -= len(images)
        self._count(len(images), began - asked, ended - began)
        return probs

    def _count(self, size: int, waiting_ns: int, computing_ns: int) -> None:
        counted = self.statistics
        counted.requests += 1
        counted.images += size
        counted.waiting_ns += waiting_ns
        counted.computing_ns += computing_ns
        counted.last_ms = time.time_ns() // 1_000_000
        self.on_computed(size, computing_ns / 1e9)

    async def predict_with_room(self, images: np.ndarray) -> np.ndarray:
        """Compute as `predict` does, but wait until there is room, instead of being refused."""
        while self.pending and self.pending + len(images) > self.max_pending:
            await asyncio.sleep(0.01)
        return await self.predict(images)

    def _compute(self, images: np.ndarray) -> tuple[np.ndarray, int, int]:
        """Return probabilities, and when they were begun and ended, in ns."""
        start = time.monotonic_ns()
        return self.run(images), start, time.monotonic_ns()
