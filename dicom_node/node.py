"""What the node does with the spool: has series segmented, and sends what comes of it."""

import io
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import pydicom
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from dicom_node.ask import Service, find_volumes, pack
from dicom_node.errors import AwayError, RefusedError
from dicom_node.spool import Spool
from serving.monitoring import log_event

TICK_S = 0.5  # between two looks into the spool


class Destination(Protocol):
    """Where segmentations go."""

    def send(self, path: Path) -> None:
        """Send a file. Raises AwayError, RefusedError."""


class Node:
    """Works through the spool. The log and the metrics say nothing of a patient."""

    def __init__(self, spool: Spool, service: Service, destination: Destination) -> None:
        self.spool, self.service, self.destination = spool, service, destination
        self.registry = CollectorRegistry()
        self.done = Counter(
            "unet_node_done",
            "Images segmented, segmentations sent, and what was put aside",
            ["what"],
            registry=self.registry,
        )
        self.away = Counter(
            "unet_node_away", "Tries without an answer", ["whose"], registry=self.registry
        )

    def expose(self, port: int) -> None:
        """Show the metrics to Prometheus, on this computer."""
        waiting = Gauge(
            "unet_node_spool", "Series and files in the spool", ["folder"], registry=self.registry
        )
        for name in self.spool.counts():
            waiting.labels(name).set_function(lambda name=name: self.spool.counts()[name])
        start_http_server(port, "127.0.0.1", self.registry)

    # --------------------------------------------------------------------------------- segmenting

    def segment_next(self, quiet_s: float) -> bool:
        """Segment the next complete series, if there is one; say whether. Raises AwayError."""
        series = self.spool.take(quiet_s)
        if series is None:
            return False
        found, refused = [], []
        try:
            for files in find_volumes(series):
                try:
                    found.append(self.service.segment(pack(files)))
                except RefusedError as error:
                    refused.append((files, str(error)))
        except (AwayError, OSError):
            raise
        except Exception as error:  # whatever a malformed series leads to; the others go on
            found, refused = [], [(sorted(series.iterdir()), describe(error))]
        # All results first: a kill in between begins again with the whole series.
        for content in found:
            self.spool.put_out(content, read_uid(content))
        for files, reason in refused:
            self._put_aside(files, series.name, reason)
        shutil.rmtree(series)
        self.done.labels("segmented").inc(len(found))
        log_event(event="series", segmented=len(found), refused=len(refused))
        return True

    def _put_aside(self, files: Sequence[Path], name: str, reason: str) -> None:
        for path in files:
            self.spool.quarantine(path, name, reason)
        self.done.labels("put aside").inc()

    # ------------------------------------------------------------------------------------ sending

    def send_next(self) -> bool:
        """Send the oldest segmentation, if there is one; say whether. Raises AwayError."""
        waiting = sorted(self.spool.outgoing.iterdir(), key=lambda path: path.stat().st_mtime)
        if not waiting:
            return False
        path = waiting[0]
        try:
            self.destination.send(path)
        except (AwayError, OSError):
            raise
        except Exception as error:  # also one that is damaged; the others go on
            self._put_aside([path], path.stem, describe(error))
            log_event(event="a segmentation is not taken", reason=describe(error))
        else:
            path.unlink()
            self.done.labels("sent").inc()
            log_event(event="sent")
        return True

    # -------------------------------------------------------------------------------------- loops

    def segment_all(self, stop: threading.Event, quiet_s: float, retry_s: float) -> None:
        """Segment series as they come, until `stop`."""
        self._repeat(stop, retry_s, "service", lambda: self.segment_next(quiet_s))

    def send_all(self, stop: threading.Event, retry_s: float) -> None:
        """Send segmentations as they come, until `stop`."""
        self._repeat(stop, retry_s, "destination", self.send_next)

    def _repeat(
        self, stop: threading.Event, retry_s: float, whose: str, step: Callable[[], bool]
    ) -> None:
        """Do the next step; wait where there is none, longer where the other side is away."""
        while not stop.is_set():
            try:
                if not step():
                    stop.wait(TICK_S)
            except AwayError as error:
                self.away.labels(whose).inc()
                log_event(event=f"the {whose} is away", reason=str(error), again_in_s=retry_s)
                stop.wait(retry_s)
            except OSError as error:
                self.away.labels("disk").inc()
                log_event(event="the disk fails", reason=error.strerror, again_in_s=retry_s)
                stop.wait(retry_s)


def describe(error: Exception) -> str:
    """Say why something goes no further; of an error that may quote a file, its kind."""
    return str(error) if isinstance(error, RefusedError) else type(error).__name__


def read_uid(content: bytes) -> str:
    """Read the UID of a DICOM object."""
    return str(pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True).SOPInstanceUID)
