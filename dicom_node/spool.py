"""The node's files: what came, what is being segmented, what is to be sent, what was refused.

    receiving/                    files whose bytes still come, and what is being removed
    incoming/SERIES/INSTANCE.dcm  images of a series that may not be complete
    working/SERIES/INSTANCE.dcm   a series that is being segmented, or waits for the service
    outgoing/INSTANCE.dcm         segmentations that the destination has not taken yet
    quarantine/NAME/              what cannot be segmented or is not taken, with reason.txt

Each step is one rename, so the process may be killed at any time: the next start goes on.
"""

import contextlib
import itertools
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection
from pathlib import Path

from utils import UserError

UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
FOLDERS = ("receiving", "incoming", "working", "outgoing", "quarantine")
MIN_FREE_BYTES = 2**28  # of the disk; then nothing more is taken
ABANDONED_S = 120  # since a caller sent the last bytes of a file
REASON = "reason.txt"


class Spool:
    """Folders on one disk. Raises UserError if they cannot be made, or another node has them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in FOLDERS:
                (root / name).mkdir(mode=0o700, exist_ok=True)
            (root / "lock").touch(mode=0o600)
            self.lock = (root / "lock").open("w")
        except OSError as error:
            raise UserError(f"spool {root} cannot be made ({error.strerror})") from None
        self.receiving, self.incoming, self.working, self.outgoing, self.quarantined = (
            root / name for name in FOLDERS
        )
        self._lock()
        # What a process left that was killed.
        for path in self.receiving.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for series in folders_in(self.working):
            self._put_back(series)

    def _lock(self) -> None:
        """Keep other nodes away until this process ends. Raises UserError if there is one."""
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another node works with the spool {self.root}; stop it first"
            ) from None

    def has_room(self) -> bool:
        """Say whether the disk has room for more."""
        return shutil.disk_usage(self.root).free >= MIN_FREE_BYTES

    # ------------------------------------------------------------------------------- coming images

    def keep(self, path: Path, series: str, instance: str) -> None:
        """Take over a file that has come. Raises ValueError for names that are no UIDs."""
        if not (UID.fullmatch(series) and UID.fullmatch(instance)):
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
        with contextlib.suppress(FileNotFoundError):  # likewise
            sync(place.parent)
        sync(self.incoming)

    def sweep(self) -> None:
        """Remove files whose sender went away in the middle."""
        for path in self.receiving.iterdir():
            with contextlib.suppress(OSError):  # it was just kept, or removed
                if path.is_file() and time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()

    # ------------------------------------------------------------------------------------- series

    def take(self, quiet_s: float, later: Collection[str] = ()) -> Path | None:
        """Take a series of which no image has come for so many seconds, to be segmented.

        later: those that are left where they are, because the service is away.
        """
        for series in sorted(folders_in(self.working)):
            if series.name not in later:
                return series
        for series in sorted(folders_in(self.incoming), key=last_change):
            is_free = series.name not in later and not (self.working / series.name).exists()
            if is_free and time.time() - last_change(series) >= quiet_s:
                return series.rename(self.working / series.name)
        return None

    def put_out(self, content: bytes, instance: str) -> None:
        """Write a segmentation that is to be sent."""
        path = self.receiving / f"{instance}.part"
        path.write_bytes(content)
        sync(path)
        path.replace(self.outgoing / f"{instance}.dcm")
        sync(self.outgoing)

    def remove(self, series: Path) -> None:
        """Remove a series that is done."""
        gone = series.rename(self.receiving / f"{uuid.uuid4().hex}.done")
        shutil.rmtree(gone)

    def quarantine(self, path: Path, reason: str) -> None:
        """Put a series, or a file in a folder of its own, aside, and write down why."""
        folder = path
        if not path.is_dir():
            folder = self.receiving / f"{uuid.uuid4().hex}.aside"
            folder.mkdir(mode=0o700)
        (folder / REASON).write_text(f"{reason}\n", encoding="utf-8")
        sync(folder / REASON)
        name = path.name.removesuffix(".dcm")
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(1)))
        place = next(place for one in names if not (place := self.quarantined / one).exists())
        folder.rename(place)
        if folder is not path:
            path.replace(place / path.name)
        sync(self.quarantined)

    def counts(self) -> dict[str, int]:
        """Count series that come or are segmented, files to send, and what was put aside."""
        return {name: len(list((self.root / name).iterdir())) for name in FOLDERS[1:]}

    def _put_back(self, series: Path) -> None:
        """Give a series back to those that come; more of it may have come meanwhile."""
        place = self.incoming / series.name
        if not place.exists():
            series.rename(place)
            return
        for path in series.iterdir():
            path.replace(place / path.name)
        series.rmdir()


def folders_in(place: Path) -> list[Path]:
    """List the folders in one; what else an operator may have put there is left alone."""
    return [path for path in place.iterdir() if path.is_dir()]


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
