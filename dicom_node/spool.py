"""The node's files: what came, what is being segmented, what is to be sent, what was refused.

    receiving/                    files whose bytes still come
    incoming/SERIES/INSTANCE.dcm  images of a series that may not be complete
    working/SERIES/INSTANCE.dcm   a series that is being segmented
    outgoing/INSTANCE.dcm         segmentations that the destination has not taken yet
    quarantine/SERIES/            what cannot be segmented or is not taken, with reason.txt

Each step is one rename, so the process may be killed at any time: the next start goes on.
"""

import itertools
import os
import re
import shutil
import time
from pathlib import Path

from utils import UserError

UID = re.compile(r"[0-9.]{1,64}")
FOLDERS = ("receiving", "incoming", "working", "outgoing", "quarantine")
MIN_FREE_BYTES = 2**28  # of the disk; then nothing more is taken
REASON = "reason.txt"


class Spool:
    """Folders on one disk. Raises UserError if they cannot be made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in FOLDERS:
                (root / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(f"spool {root} cannot be made ({error.strerror})") from None
        self.receiving, self.incoming, self.working, self.outgoing, self.quarantined = (
            root / name for name in FOLDERS
        )
        for path in self.receiving.iterdir():  # of a process that was killed
            path.unlink()
        for series in list(self.working.iterdir()):
            self._put_back(series)

    def has_room(self) -> bool:
        """Say whether the disk has room for more."""
        return shutil.disk_usage(self.root).free >= MIN_FREE_BYTES

    def keep(self, path: Path, series: str, instance: str) -> None:
        """Take over a file that has come. Raises ValueError for names that are no UIDs."""
        if not (UID.fullmatch(series) and UID.fullmatch(instance)) or ".." in series + instance:
            raise ValueError("the series or the instance has no valid UID")
        sync(path)
        place = self.incoming / series / f"{instance}.dcm"
        while True:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                path.replace(place)
            except FileNotFoundError:  # the series was just taken away, to be segmented
                if not path.exists():
                    raise
                continue
            break
        sync(place.parent)

    def take(self, quiet_s: float) -> Path | None:
        """Take a series of which no image has come for so many seconds, to be segmented."""
        for series in sorted(self.working.iterdir()):  # the service was away
            return series
        for series in sorted(self.incoming.iterdir(), key=last_change):
            if time.time() - last_change(series) >= quiet_s:
                return series.rename(self.working / series.name)
        return None

    def put_out(self, content: bytes, instance: str) -> None:
        """Write a segmentation that is to be sent."""
        path = self.receiving / f"{instance}.part"
        path.write_bytes(content)
        sync(path)
        path.replace(self.outgoing / f"{instance}.dcm")
        sync(self.outgoing)

    def quarantine(self, path: Path, name: str, reason: str) -> None:
        """Put a file aside, in the folder of this name, and write down why."""
        place = next(
            folder
            for number in itertools.count()
            if not (folder := self.quarantined / (f"{name}-{number}" if number else name)).exists()
            or not (folder / path.name).exists()
        )
        place.mkdir(mode=0o700, exist_ok=True)
        with (place / REASON).open("a", encoding="utf-8") as file:
            file.write(f"{path.name}: {reason}\n")
        path.replace(place / path.name)

    def counts(self) -> dict[str, int]:
        """Count series that come or are segmented, files to send, and what was put aside."""
        return {name: len(list((self.root / name).iterdir())) for name in FOLDERS[1:]}

    def _put_back(self, series: Path) -> None:
        """Give a series back to those that come; more of it may have come meanwhile."""
        place = self.incoming / series.name
        place.mkdir(mode=0o700, exist_ok=True)
        for path in series.iterdir():
            path.replace(place / path.name)
        series.rmdir()


def last_change(series: Path) -> float:
    """Tell when the last image of a series came."""
    times = [path.stat().st_mtime for path in (series, *series.iterdir())]
    return max(times)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, so that a power cut does not lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
