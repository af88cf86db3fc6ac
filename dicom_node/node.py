"""What the node does with the spool: has series segmented, and sends what comes of it."""

import io
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import prometheus_client as prometheus
import pydicom

from dicom_node.ask import find_volumes, pack
from dicom_node.errors import AwayError, FaultError, RefusedError
from dicom_node.spool import Spool
from serving.monitoring import log_event

TICK_S = 0.5  # between two looks into the spool
MAX_FAULTS = 3  # of the service with a series; then the series is put aside


class Service(Protocol):
    """What segments."""

    def segment(self, file: BinaryIO, num_bytes: int) -> list[bytes]:
        """Return the objects that are made of a file. Raises RefusedError, AwayError."""


class Destination(Protocol):
    """Where segmentations go."""

    def send(self, path: Path) -> None:
        """Send a file. Raises AwayError, RefusedError."""


class Node:
    """Works through the spool. The log and the metrics say nothing of a patient.

    What finds no answer is tried again after `retry_s` seconds; the others go on meanwhile.
    """

    def __init__(
        self, spool: Spool, service: Service, destination: Destination, retry_s: float
    ) -> None:
        self.spool, self.service, self.destination = spool, service, destination
        self.retry_s = retry_s
        self.tried: dict[str, float] = {}  # when a series or a file found no answer
        self.faults = Counter[str]()  # of the service, by series
        self.registry = prometheus.CollectorRegistry()
        self.done = prometheus.Counter(
            "unet_node_done",
            "Images segmented, segmentations sent, and what was put aside",
            ["what"],
            registry=self.registry,
        )
        self.away = prometheus.Counter(
            "unet_node_away", "Tries without an answer", ["whose"], registry=self.registry
        )

    def expose(self, host: str, port: int) -> None:
        """Show the metrics to Prometheus."""
        waiting = prometheus.Gauge(
            "unet_node_spool", "Series and files in the spool", ["folder"], registry=self.registry
        )
        for name in self.spool.counts():
            waiting.labels(name).set_function(lambda name=name: self.spool.counts()[name])
        prometheus.start_http_server(port, host, self.registry)

    # --------------------------------------------------------------------------------- segmenting

    def segment_next(self, quiet_s: float) -> bool:
        """Segment the next complete series, if there is one; say whether. Raises OSError."""
        self.spool.sweep()
        series = self.spool.take(quiet_s, self._waiting())
        if series is None:
            return False
        found, refused, left_out = [], [], 0
        try:
            volumes, left_out = find_volumes(series)
            for files in volumes:
                try:
                    found.append(self._segment(files))
                except RefusedError as error:
                    more = f" and {len(files) - 1} more" if files[1:] else ""
                    refused.append(f"{files[0].name}{more}: {error}")
        except AwayError as error:
            if isinstance(error, FaultError):
                self.faults[series.name] += 1
            if self.faults[series.name] < MAX_FAULTS:
                self._wait(series.name, "service", error)
                return True
            refused.append(str(error))
        except OSError:
            self.tried[series.name] = time.monotonic()  # the others go on meanwhile
            raise
        except Exception as error:  # whatever a malformed series leads to; the others go on
            refused.append(describe(error))
        # All results first: a kill in between begins again with the whole series.
        for objects in found:
            for uid, content in objects.items():
                self.spool.put_out(content, uid)
        if refused:
            self._put_aside(series, "\n".join(refused))
        else:
            self.spool.remove(series)
        self.faults.pop(series.name, None)
        self.done.labels("segmented").inc(len(found))
        # Left out: pictures of the screen, copies, slices of another size.
        told = {"segmented": len(found), "refused": len(refused), "left_out": left_out}
        log_event(event="series", **told)
        return True

    def _segment(self, files: Sequence[Path]) -> dict[str, bytes]:
        """Segment an image or a volume; return the objects made of it, by their UIDs."""
        packed = pack(files, self.spool.receiving / f"{uuid.uuid4().hex}.zip")
        try:
            with packed.open("rb") as file:
                objects = self.service.segment(file, packed.stat().st_size)
        finally:
            if packed.parent == self.spool.receiving:
                packed.unlink()
        try:
            return {read_uid(content): content for content in objects}
        except Exception:  # pydicom raises many
            raise AwayError("the service answers something else than DICOM") from None

    def _put_aside(self, path: Path, reason: str) -> None:
        self.spool.quarantine(path, reason)
        self.done.labels("put aside").inc()

    # ------------------------------------------------------------------------------------ sending

    def send_next(self) -> bool:
        """Send the oldest segmentation, if there is one; say whether. Raises OSError."""
        later = self._waiting()
        waiting = [path for path in self.spool.outgoing.iterdir() if path.name not in later]
        if not waiting:
            return False
        path = min(waiting, key=lambda path: path.stat().st_mtime)
        try:
            self.destination.send(path)
        except AwayError as error:
            self._wait(path.name, "destination", error)
        except OSError:
            self.tried[path.name] = time.monotonic()
            raise
        except Exception as error:  # also one that is damaged; the others go on
            self._put_aside(path, describe(error))
            log_event(event="a segmentation is not taken", reason=describe(error))
        else:
            path.unlink()
            self.done.labels("sent").inc()
            log_event(event="sent")
        return True

    # -------------------------------------------------------------------------------------- loops

    def _wait(self, name: str, whose: str, error: AwayError) -> None:
        """Leave a series or a file for later."""
        self.tried[name] = time.monotonic()
        self.away.labels(whose).inc()
        log_event(event=f"the {whose} is away", reason=str(error), again_in_s=self.retry_s)

    def _waiting(self) -> set[str]:
        """Name what was tried just now."""
        recent = time.monotonic() - self.retry_s
        for name in [name for name, when in self.tried.copy().items() if when <= recent]:
            self.tried.pop(name, None)
        return set(self.tried)

    def segment_all(self, stop: threading.Event, quiet_s: float) -> None:
        """Segment series as they come, until `stop`."""
        self._repeat(stop, lambda: self.segment_next(quiet_s))

    def send_all(self, stop: threading.Event) -> None:
        """Send segmentations as they come, until `stop`."""
        self._repeat(stop, self.send_next)

    def _repeat(self, stop: threading.Event, step: Callable[[], bool]) -> None:
        """Do the next step; wait where there is none, longer after a fault."""
        while not stop.is_set():
            try:
                if not step():
                    stop.wait(TICK_S)
            except Exception as error:  # a full disk, a fault of ours: the node goes on
                self.away.labels("disk").inc()
                log_event(event="fault", error=type(error).__name__, again_in_s=self.retry_s)
                stop.wait(self.retry_s)


def describe(error: Exception) -> str:
    """Say why something goes no further; of an error that may quote a file, its kind."""
    return str(error) if isinstance(error, RefusedError) else type(error).__name__


def read_uid(content: bytes) -> str:
    """Read the UID of a DICOM object."""
    return str(pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True).SOPInstanceUID)
