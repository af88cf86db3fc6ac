"""What the models do for requests: segment an image, compute tensors."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from imaging import pictures
from inference.exported_model import Prepared
from serving import dicom_objects, media_types, open_inference, responses, tf_serving, view
from serving.api_keys import Keys
from serving.config import Config
from serving.errors import Problem
from serving.job_store import open_store
from serving.jobs import LEASE_S, MAX_TRIES, Job, Jobs
from serving.monitoring import Metrics, log_fault
from serving.repository import Repository, Served
from serving.turns import Turns
from serving.workers import Workers
from utils import cores

T = TypeVar("T")

# Bytes of a file, or pixels of a picture, that may take seconds to decode and to write.
LARGE_BODY, LARGE_PIXELS = 2**24, 2**22
HEADER_BYTES = 2**16  # of a picture, in which its size is looked for
# Reading a file takes less, unless it was made to take longer. A worker is ended then.
READ_S, READ_LARGE_S = 10, 25
WRITE_S = 120  # for all slices of a volume as pictures
JOB_TICK_S = 1  # until the next look for a job
JOBS = "(jobs)"  # take turns with the clients; no key has this name
GIVE_BACK_S = 5  # when the service stops
MAX_VOLUMES = 2  # or large pictures, that are segmented at a time; others wait


class Service:
    """The models, the threads that run them, and the workers that read and write files.

    Requests and answers are parsed and written in worker processes, because a malformed one may
    take much memory or time.
    """

    def __init__(self, config: Config) -> None:
        """Load keys and models. Raises UserError."""
        self.config = config
        self.keys = Keys(Path(config.keys)) if config.keys else None
        self.metrics = Metrics()
        self.repository = Repository(config, self.metrics)
        max_pixels = int(config.max_megapixels * 2**20)
        self.max_bytes = pictures.BYTES_PER_PIXEL * max_pixels  # of a decoded image
        self.workers = Workers(config.workers, max_pixels)
        # Enough that each worker and each thread of the network has the next request at hand.
        places = 4 * (config.workers + (config.threads or cores()))
        self.turns = Turns(places, places // 2)
        # One worker stays free for the images of others.
        large_places = max(1, config.workers - 1)
        self.large_turns = Turns(large_places, large_places)
        self.volume_turns = Turns(MAX_VOLUMES, MAX_VOLUMES)
        self.ready = False
        self.jobs = None
        if config.jobs:
            self.jobs = Jobs(open_store(config.jobs), config.job_keep_s)
        self.job_came = asyncio.Event()
        self.job_counts: dict[str, int] = {}  # by state, when they were counted last
        self.runner: asyncio.Task | None = None

    async def start(self) -> None:
        """Start the workers; then the service is ready."""
        self.workers.start()
        await self.workers.ready()
        if self.jobs:
            self.runner = asyncio.create_task(self._run_jobs(self.jobs))
        self.ready = True

    async def stop(self) -> None:
        """Finish the running requests, then end the workers."""
        self.ready = False
        await self.stop_jobs()
        await self.repository.stop()
        self.workers.stop()

    async def stop_jobs(self) -> None:
        """Begin with no more jobs. One that runs begins again, elsewhere or at the next start."""
        if self.runner:
            self.runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.runner

    @property
    def queue_length(self) -> int:
        """How many images wait or are computed."""
        return self.repository.pending + self.turns.length + self.volume_turns.length

    async def segment(
        self,
        model: Served,
        content: bytes,
        accepted: list[str],
        deadline: asyncio.Timeout,
        caller: str,
    ) -> responses.MaskResponse:
        """Segment an image file and write its mask. Raises Problem.

        accepted: what `media_types.read_accept` read. deadline: is moved for a volume. caller: the
        client, which takes turns with the others.
        """
        pixels = pictures.declared_pixels(content[:HEADER_BYTES])
        is_large = len(content) > LARGE_BODY or pixels > LARGE_PIXELS
        async with self.turns.take(caller):
            async with self._turn(is_large, caller):
                prepared = await self._read(model, content, is_large)
            chosen = media_types.choose(accepted, prepared)
            is_volume = len(prepared.windows) > 1
            if chosen == [media_types.VIEW]:
                view.check_size(prepared.grid.shape)
            if not is_volume:
                answer = await self._segment_image(model, prepared, chosen, caller)
                answer = await self._add_image(answer, content, model, is_large, caller)
        if is_volume:
            now = asyncio.get_running_loop().time()
            deadline.reschedule(now + self.config.volume_timeout_s)
            # Several of the largest masks would fill the memory.
            async with self.volume_turns.take(caller):
                answer = await self._segment_windows(model, prepared, chosen, caller)
                answer = await self._add_image(answer, content, model, True, caller)
        input_mean = float(prepared.windows.case.mean()) / 255
        self.metrics.record_image(model.title, input_mean, answer.foreground_share, answer.quality)
        return answer

    async def _read(self, model: Served, content: bytes, is_large: bool) -> Prepared:
        """Decode and prepare an image file. Raises Problem."""
        seconds = READ_LARGE_S if is_large else READ_S
        sizes = self.max_bytes, self.config.max_slices
        return await self.workers.run(model.network.read, content, *sizes, seconds=seconds)

    async def _segment_image(
        self, model: Served, prepared: Prepared, chosen: list[str], caller: str
    ) -> responses.MaskResponse:
        """Segment an image of one window."""
        probs = await model.computing.predict(prepared.batch())
        async with self._turn(math.prod(prepared.grid.shape) > LARGE_PIXELS, caller):
            return await self.workers.run(
                responses.respond_to_image, model.network, probs, prepared, chosen
            )

    async def _add_image(
        self,
        answer: responses.MaskResponse,
        content: bytes,
        model: Served,
        is_large: bool,
        caller: str,
    ) -> responses.MaskResponse:
        """Complete an answer that needs the image's own pixels, if it does. Raises Problem."""
        network = model.network
        if answer.media_type not in media_types.WITH_IMAGE:
            return answer
        async with self._turn(is_large, caller):
            if answer.media_type == media_types.DICOM_ZIP:
                complete, args = dicom_objects.complete, (answer, content, network, self.max_bytes)
                return await self.workers.run(complete, *args, seconds=WRITE_S)
            window, boundary = network.metadata.get("window", ""), view.read_boundary(answer.body)
            args = content, self.max_bytes, window, boundary
            shown = await self.workers.run(view.encode_image, *args, seconds=WRITE_S)
            media_type = f"{media_types.VIEW}; boundary={boundary}"
            return answer._replace(body=answer.body + shown, media_type=media_type)

    async def _segment_windows(
        self, model: Served, prepared: Prepared, chosen: list[str], caller: str
    ) -> responses.MaskResponse:
        """Segment a volume, or a large picture, a few windows at a time.

        So the images of others come in between.
        """
        with self._computed(model, prepared) as probs:
            found = await asyncio.to_thread(model.network.decide, probs, prepared)
        async with self._turn(True, caller):
            return await self.workers.run(
                responses.respond,
                model.network,
                found.ids,
                found.quality,
                prepared.without_pixels(),
                chosen,
            )

    @contextlib.contextmanager
    def _computed(self, model: Served, prepared: Prepared) -> Iterator[Iterator[np.ndarray]]:
        """Yield the probabilities of all windows, for another thread, which waits for the network.

        When the block ends early, because the request's time is over, so does that thread.
        """
        loop, is_over = asyncio.get_running_loop(), threading.Event()
        step = max(1, self.config.max_batch // 2)

        def compute() -> Iterator[np.ndarray]:
            for start in range(0, len(prepared.windows), step):
                if is_over.is_set():
                    raise TimeoutError
                batch = prepared.batch(start, start + step)
                yield from asyncio.run_coroutine_threadsafe(
                    model.computing.predict_with_room(batch), loop
                ).result()

        try:
            yield compute()
        finally:
            is_over.set()

    def _turn(self, is_large: bool, caller: str) -> contextlib.AbstractAsyncContextManager:
        """Wait for a turn if a job is large: one worker stays free for the images of others."""
        return self.large_turns.take(caller) if is_large else contextlib.nullcontext()

    # ----------------------------------------------------------------------------------------- jobs

    async def _run_jobs(self, jobs: Jobs) -> None:
        """Do one job after the other."""
        while True:
            self.job_came.clear()
            try:
                self.job_counts = await asyncio.to_thread(jobs.counts)
                job = await asyncio.to_thread(jobs.take)
                if job:
                    await self._run_job(jobs, job)
                    continue
            except Exception as error:  # a full disk, a locked file: later it may work
                log_fault("jobs", error)
            with contextlib.suppress(TimeoutError):
                # Also jobs that other replicas have taken, or left, are seen in time.
                await asyncio.wait_for(self.job_came.wait(), JOB_TICK_S)

    async def _run_job(self, jobs: Jobs, job: Job) -> None:
        """Do a job, and stop if it is removed meanwhile, by this replica or another."""
        task = asyncio.create_task(self._segment_job(job))
        try:
            while not task.done():
                if not await retried(jobs.hold, job.id):
                    return
                await asyncio.wait([task], timeout=JOB_TICK_S)
            await retried(jobs.finish, job.id, task.result())
        except asyncio.CancelledError:  # the service stops
            with contextlib.suppress(Problem, TimeoutError):  # else the lease ends
                await asyncio.wait_for(asyncio.to_thread(jobs.give_back, job.id), GIVE_BACK_S)
            raise
        finally:
            task.cancel()

    async def _segment_job(self, job: Job) -> responses.MaskResponse | Problem:
        """Segment a job's image; return its mask or why there is none."""
        if job.tries > MAX_TRIES:
            return Problem(500, f"the service was stopped {MAX_TRIES} times while this job ran")
        seconds = self.config.volume_timeout_s
        try:
            model = self.repository.find(job.model, job.version)
            async with asyncio.timeout(seconds) as deadline:
                while True:
                    try:
                        return await self.segment(model, job.content, job.accepted, deadline, JOBS)
                    except Problem as problem:
                        if problem.status != 503:
                            return problem
                    await asyncio.sleep(JOB_TICK_S)  # others are served first
        except TimeoutError:
            return Problem(504, f"not done within {seconds:g} s")
        except Problem as problem:
            return problem
        except Exception as error:
            log_fault(job.id, error)
            return Problem(500, "an internal error of the service")

    async def infer(
        self, model: Served, content: bytes, json_length: str | None
    ) -> tuple[bytes, dict[str, str]]:
        """Answer a request of the Open Inference Protocol: body and headers. Raises Problem."""
        request = await self.workers.run(
            open_inference.read_request, content, json_length, model.network, self.config.max_batch
        )
        probs = await model.computing.predict(request.batch)
        names = model.name, model.version
        return await self.workers.run(
            open_inference.write_answer, without_spread(probs, model), request, names, model.network
        )

    async def predict(self, model: Served, content: bytes) -> bytes:
        """Answer a request of TensorFlow Serving's REST. Raises Problem."""
        batch, by_row = await self.workers.run(
            tf_serving.read_instances, content, model.network, self.config.max_batch
        )
        probs = await model.computing.predict(batch)
        return await self.workers.run(
            tf_serving.write_predictions, without_spread(probs, model), by_row
        )


async def retried(change: Callable[..., T], *args: Any) -> T:
    """Change a job; while the store is away, try again for as long as the job is held."""
    end = time.monotonic() + LEASE_S
    while True:
        try:
            return await asyncio.to_thread(change, *args)
        except Problem:
            if time.monotonic() > end:
                raise
        await asyncio.sleep(JOB_TICK_S)


def without_spread(probs: np.ndarray, model: Served) -> np.ndarray:
    """Leave out the channel that says how much an image and its mirror image differ."""
    return np.ascontiguousarray(probs[..., : model.network.output_channels])
