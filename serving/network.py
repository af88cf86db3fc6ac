"""Run the network for several requests side by side."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serving.errors import Problem


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
        on_computed: Callable[[int, float], None] | None = None,
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
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.pool, self._compute, images)
        finally:
            self.pending -= len(images)

    async def predict_with_room(self, images: np.ndarray) -> np.ndarray:
        """Compute as `predict` does, but wait until there is room, instead of being refused."""
        while self.pending and self.pending + len(images) > self.max_pending:
            await asyncio.sleep(0.01)
        return await self.predict(images)

    def _compute(self, images: np.ndarray) -> np.ndarray:
        start = time.monotonic()
        probs = self.run(images)
        if self.on_computed:
            self.on_computed(len(images), time.monotonic() - start)
        return probs
