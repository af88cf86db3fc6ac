"""Collect what went wrong with which file, so that the others are done."""

import traceback
from datetime import datetime
from pathlib import Path

from utils import UserError, first_line, printable


class Problems:
    """Lines that name files, and a log for errors that nobody foresaw."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.lines: list[str] = []
        self.log = Path(folder or ".") / "errors.log"

    def add(self, name: str | Path, error: Exception) -> None:
        """Add the error of a file, or of a part of its results.

        The message of a UserError names its file already.
        """
        if isinstance(error, UserError):
            self.lines += [printable(line) for line in str(error).split("\n")]
            return
        if isinstance(error, OSError) and error.strerror:
            what = f"{error.filename or name}: {error.strerror}"
            self.lines.append(f"{printable(name)}: {printable(what)}; check permissions and disk")
            return
        self.lines.append(
            f"{printable(name)}: an error of this program ({printable(first_line(error))}); "
            f"{self._write(name, error)}"
        )

    def _write(self, name: str | Path, error: Exception) -> str:
        """Append the traceback to the log; return what to do with it."""
        text = "".join(traceback.format_exception(error))
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {printable(name)}\n{text}\n")
        except OSError:
            return "its details cannot be written"
        return f"please report it with {self.log}"
