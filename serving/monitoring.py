"""Metrics for Prometheus and lines of the log. Neither says anything about a patient."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference.quality import Quality
from serving.connections import Listener
from serving.errors import to_json_line

BATCH_SIZES = [1, 2, 4, 8, 16, 32]
DICE = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0]
SHARES = [i / 20 for i in range(1, 21)]  # buckets of numbers from 0 to 1


class Metrics:
    """Traffic, speed, and numbers per image whose change may mean other images (drift)."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.connections = Gauge("unet_connections", "Connections that are open", registry=registry)
        self.dropped = Counter(
            "unet_connections_dropped",
            "Connections that were ended because they kept the service waiting, or were too many",
            registry=registry,
        )
        self.requests = Counter(
            "unet_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "unet_request_seconds", "Time to answer", ["route"], registry=registry
        )
        self.in_flight = Gauge("unet_in_flight", "Requests being answered", registry=registry)
        self.queue = Gauge(
            "unet_queue_length", "Images that wait or are computed", registry=registry
        )
        self.jobs = Gauge("unet_jobs", "Jobs that are kept", ["state"], registry=registry)
        self.batch_size = Histogram(
            "unet_batch_size", "Images in a request", buckets=BATCH_SIZES, registry=registry
        )
        self.network_seconds = Histogram(
            "unet_inference_seconds",
            "Time of the network, a request",
            ["model"],
            registry=registry,
        )
        self.input_mean = Histogram(
            "unet_input_mean",
            "Mean of a prepared image",
            ["model"],
            buckets=SHARES,
            registry=registry,
        )
        self.foreground_share = Histogram(
            "unet_foreground_share",
            "Share of the pixels in the mask",
            ["model"],
            buckets=SHARES,
            registry=registry,
        )
        self.predicted_dice = Histogram(
            "unet_predicted_dice",
            "Dice that is predicted",
            ["model"],
            buckets=DICE,
            registry=registry,
        )
        self.unusual = Counter(
            "unet_unusual_images",
            "Images of another kind than the model knows",
            ["model"],
            registry=registry,
        )
        self.info = Gauge(
            "unet_model_info", "The models served", ["model", "sha256"], registry=registry
        )

    def show_models(self, models: Sequence[tuple[str, str]]) -> None:
        """Show which models are served: name and version, checksum."""
        self.info.clear()
        for title, sha256 in models:
            self.info.labels(title, sha256).set(1)
            # Shown from the start, with 0.
            self.unusual.labels(title)
            for histogram in (
                *(self.network_seconds, self.input_mean),
                *(self.foreground_share, self.predicted_dice),
            ):
                histogram.labels(title)

    def watch(self, listener: Listener) -> None:
        """Show how many connections are open, and count those that are ended."""
        self.connections.set_function(lambda: len(listener.connections))
        listener.on_drop = self.dropped.inc

    def record_computed(self, model: str, size: int, seconds: float) -> None:
        """Record the images of a request that a model computed."""
        self.batch_size.observe(size)
        self.network_seconds.labels(model).observe(seconds)

    def record_image(
        self, model: str, input_mean: float, foreground_share: float, quality: Quality | None
    ) -> None:
        """Record a segmented image: two shares, and what the model says of its mask."""
        self.input_mean.labels(model).observe(input_mean)
        self.foreground_share.labels(model).observe(foreground_share)
        if quality:
            self.predicted_dice.labels(model).observe(quality.dice)
            self.unusual.labels(model).inc(quality.is_unusual)

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record an answered request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def exposition(self, queue_length: int, jobs: dict[str, int]) -> bytes:
        """Write all metrics in Prometheus' text format. jobs: how many by their state."""
        self.queue.set(queue_length)
        for state, count in jobs.items():
            self.jobs.labels(state).set(count)
        return generate_latest(self.registry)


def log_request(
    request_id: str, asked: dict[str, str], status: int, seconds: float, sizes: dict[str, int]
) -> None:
    """Write a line about an answered request.

    asked: name of the key, model, method and route. sizes: bytes received and sent.
    """
    log_event(request_id=request_id, **asked, status=status, ms=round(1000 * seconds), **sizes)


def log_event(**what: Any) -> None:
    """Write a line of the log, with the time."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **what}
    print(to_json_line(line), flush=True)


def log_fault(request_id: str, error: Exception) -> None:
    """Write a line about a fault of ours: the kind of error, as its message may quote a file."""
    line = {"request_id": request_id, "error": type(error).__name__}
    print(to_json_line(line), file=sys.stderr, flush=True)
