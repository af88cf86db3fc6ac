"""A loaded model and what it does for requests: segment an image, compute tensors."""

import asyncio
import os
from pathlib import Path

import numpy as np

from imaging import pictures
from inference.exported_model import load_exported
from serving import open_inference, responses, tf_serving
from serving.batching import Batcher
from serving.config import Config
from serving.monitoring import Metrics
from serving.workers import Workers


class Service:
    """The model, the batcher that runs it, and the workers that read and write files.

    Requests and answers are parsed and written in worker processes, because a malformed one may
    take much memory or time.
    """

    def __init__(self, config: Config) -> None:
        """Load the model. Raises UserError."""
        self.config = config
        self.network, run = load_exported(
            Path(config.model), config.threads, config.engine, config.precision
        )
        self.metrics = Metrics(self.network.sha256)
        self.batcher = Batcher(
            run, config.max_batch, config.max_concurrent_requests, self.metrics.record_batch
        )
        max_pixels = int(config.max_megapixels * 2**20)
        self.max_bytes = pictures.BYTES_PER_PIXEL * max_pixels  # of a decoded image
        self.workers = Workers(config.workers, max_pixels)
        self.ready = False

    async def start(self) -> None:
        """Start the workers and run the model once; then the service is ready."""
        self.batcher.start()
        self.workers.start()
        first_calls = [self.workers.run(os.getpid) for _ in range(self.config.workers)]
        await asyncio.gather(*first_calls)
        await self.batcher.predict(np.zeros((1, *self.network.input_shape), np.float32))
        self.ready = True

    async def stop(self) -> None:
        """Finish the running requests, then end the workers."""
        self.ready = False
        await self.batcher.stop()
        self.workers.stop()

    async def segment(self, content: bytes, media_type: str) -> responses.MaskResponse:
        """Segment an image file and write its mask as `media_type`. Raises Problem."""
        prepared = await self.workers.run(self.network.read, content, self.max_bytes)
        probs = await self.batcher.predict(prepared.batch)
        # Only a DICOM segmentation needs the file again, for its header.
        source = content if media_type == "application/dicom" else b""
        answer = await self.workers.run(
            responses.make_response, self.network, probs, prepared, media_type, source
        )
        self.metrics.record_image(
            float(prepared.batch.mean()), answer.foreground_share, answer.confidence
        )
        return answer

    async def infer(self, content: bytes, json_length: str | None) -> tuple[bytes, dict[str, str]]:
        """Answer a request of the Open Inference Protocol: body and headers. Raises Problem."""
        request = await self.workers.run(
            open_inference.read_request, content, json_length, self.network, self.config.max_batch
        )
        probs = await self.batcher.predict(request.batch)
        return await self.workers.run(open_inference.write_answer, probs, request, self.network)

    async def predict(self, content: bytes) -> bytes:
        """Answer a request of TensorFlow Serving's REST. Raises Problem."""
        batch, by_row = await self.workers.run(
            tf_serving.read_instances, content, self.network, self.config.max_batch
        )
        probs = await self.batcher.predict(batch)
        return await self.workers.run(tf_serving.write_predictions, probs, by_row)
