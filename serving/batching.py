"""Run the model for several requests together."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from serving.errors import Problem


class Waiting(NamedTuple):
    """Images that wait for the model, and the future of their probabilities."""

    images: np.ndarray  # (N, …, C) float32
    result: asyncio.Future


class Batcher:
    """Compute the images of several requests in one batch of at most `max_batch` images.

    A batch holds the requests that came while the batch before was computed. One thread runs the
    model, so the event loop never waits. Requests whose client gave up are not computed.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        max_batch: int = 8,
        max_pending: int = 64,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        """Keep the settings.

        run: computes probabilities (N, …, K) of images (N, …, C).
        max_pending: images that may wait or be computed; more are refused.
        on_batch: is called with the size and the seconds of every batch.
        """
        self.run = run
        self.max_batch = max_batch
        self.max_pending = max_pending
        self.on_batch = on_batch
        self.pending = 0  # images that wait or are computed
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()
        # Taken from the queue, but too large for the batch before.
        self.left_over: Waiting | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self.task: asyncio.Task | None = None

    def start(self) -> None:
        """Start to compute batches in the running event loop."""
        self.task = asyncio.create_task(self._compute_batches())

    async def stop(self) -> None:
        """Finish what waits, then end."""
        while self.pending:
            await asyncio.sleep(0.01)
        if self.task:
            self.task.cancel()
        self.thread.shutdown(wait=False)

    async def predict(self, images: np.ndarray) -> np.ndarray:
        """Compute probabilities (N, …, K) of images (N, …, C). Raises Problem 503."""
        if self.pending and self.pending + len(images) > self.max_pending:
            raise Problem(503, "too many images are waiting; try again", Retry_After="1")
        waiting = Waiting(images, asyncio.get_running_loop().create_future())
        self.pending += len(images)
        try:
            self.queue.put_nowait(waiting)
            return await waiting.result
        finally:
            self.pending -= len(images)

    async def predict_with_room(self, images: np.ndarray) -> np.ndarray:
        """Compute as `predict` does, but wait until there is room, instead of being refused."""
        while self.pending and self.pending + len(images) > self.max_pending:
            await asyncio.sleep(0.01)
        return await self.predict(images)

    async def _compute_batches(self) -> None:
        while True:
            requests = await self._next_requests()
            if requests:
                await self._compute(requests)

    async def _next_requests(self) -> list[Waiting]:
        """Wait for a request, then take all that wait and fit into one batch with it."""
        first = self.left_over or await self.queue.get()
        self.left_over = None
        requests = [first]
        size = len(first.images)
        while size < self.max_batch and not self.queue.empty():
            request = self.queue.get_nowait()
            size += len(request.images)
            if size > self.max_batch:
                self.left_over = request
                break
            requests.append(request)
        return [request for request in requests if not request.result.done()]

    async def _compute(self, requests: list[Waiting]) -> None:
        """Run the model and give each request its part of the result, or the error."""
        loop = asyncio.get_running_loop()
        start = time.monotonic()
        try:
            batch = np.concatenate([request.images for request in requests])
            probs = await loop.run_in_executor(self.thread, self.run, batch)
        except Exception as error:
            for request in requests:
                if not request.result.done():
                    request.result.set_exception(error)
            return
        if self.on_batch:
            self.on_batch(len(batch), time.monotonic() - start)
        for request in requests:
            if not request.result.done():
                request.result.set_result(probs[: len(request.images)])
            probs = probs[len(request.images) :]
