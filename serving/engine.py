"""Run the exported network for requests: gather them into batches, prepare images, decide masks."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import engines
import images
from images import UserError
from serving.problems import Problem

LONGEST = 65_535  # pixels of a side; PNG's writer ends at a million


class Busy(Exception):
    """The queue is full: try again later."""


class Prepared(NamedTuple):
    """What the network and the answer need of an image, whose own pixels may be a hundred times as many."""

    batch: np.ndarray  # (1, h, w, C) float32 in [0, 1]
    shape: tuple[int, int]  # (H, W) of the image
    spacing_mm: tuple[float, float, float] | None


class Found(NamedTuple):
    """What is found in one image."""

    ids: np.ndarray  # (H, W) uint8 class ids, at the image's own size
    confidence: float  # mean probability of what was decided, before cleaning
    spacing_mm: tuple[float, float, float] | None


@dataclass(frozen=True)
class Network:
    """What a user of the exported network must know."""

    facts: dict[str, Any]  # of the model file, see `utils.make_facts`
    sha256: str
    engine: str  # see `engines.choose`
    precision: str
    input_name: str
    input_shape: tuple[int, ...]  # (H, W, C)
    output_name: str
    output_channels: int

    def read(self, content: bytes) -> Prepared:
        """Decode an image file of one slice and prepare it. Raises UserError, Problem 413."""
        most, kinds = images.MAX_BYTES / 16, (b"\x89PNG", b"\xff\xd8", b"BM")
        if content.startswith(kinds) and (pixels := images.promised_pixels(content)) > most:
            raise Problem(413, f"{pixels / 2**20:.1f} megapixels; expected at most {most / 2**20:g} (--max-megapixels)")
        scan = images.decode_scan(content)
        shape, window = scan.pixels.shape[1:3], self.facts.get("window", "")
        if len(scan.pixels) != 1:
            raise UserError(f"{len(scan.pixels)} slices or frames; expected one image")
        if max(shape) > LONGEST:
            raise UserError(f"{shape[0]}x{shape[1]} pixels; expected at most {LONGEST} a side")
        images.check_size(*shape, 4 * max(4, 2 * self.output_channels + 2))  # what its mask takes to make, in float32
        if window == "file" and scan.window is None:
            raise UserError("its header proposes no window, which this model asks for")
        prepared = images.prepare_scan(scan, self.input_shape[:2], self.facts["channels"], window)
        return Prepared(prepared.astype(np.float32) / 255, shape, scan.spacing_mm)

    def decide(self, probs: np.ndarray, prepared: Prepared) -> Found:
        """Decide an image's mask from its probabilities (1, h, w, K)."""
        whole = images.restore(probs[0], prepared.shape)
        ids = images.decide(whole, self.facts)
        own = probs[0][images.fit(prepared.shape, probs.shape[1:3])]  # without padding
        decided = images.to_ids(own, self.facts["threshold"]) > 0
        sure = np.where(decided, own[..., 0], 1 - own[..., 0]) if own.shape[-1] == 1 else own.max(-1)
        return Found(ids, float(sure.mean()), prepared.spacing_mm)


def load(
    path: Path, threads: int = 0, kind: str = "auto", precision: str = "auto"
) -> tuple[Network, Callable[[np.ndarray], np.ndarray]]:
    """Load what `export.py` wrote, see `engines.load`.

    Returns also the function that computes probabilities (N, H, W, K) of prepared images (N, H, W, C) float32.
    """
    opened, facts, found = engines.load(path, kind, precision, threads)
    sides = opened.input_name, opened.input_shape, opened.output_name, opened.output_channels
    return Network(facts, found, opened.engine, opened.precision, *sides), opened.run


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
        self.next: tuple[np.ndarray, asyncio.Future] | None = None  # taken, but too many for the batch before
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
        while (room := self.most - sum(len(batch) for batch, _ in taken)) > 0 and not self.waiting.empty():
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
