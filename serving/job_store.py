"""Where jobs are kept: a file of SQLite for one machine, PostgreSQL for replicas on several."""

import os
import sqlite3
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pg8000.dbapi

from serving.config import is_loopback
from serving.errors import Problem
from utils import UserError, first_line

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, state TEXT NOT NULL,
    model TEXT NOT NULL, version TEXT NOT NULL, accepted TEXT NOT NULL,
    created DOUBLE PRECISION NOT NULL, started DOUBLE PRECISION, finished DOUBLE PRECISION,
    runner TEXT, seen DOUBLE PRECISION, tries INTEGER DEFAULT 0,
    content {bytes}, status INTEGER, answer {bytes}, media_type TEXT, headers TEXT
)
"""
POSTGRES = ("postgresql://", "postgres://")
EXPECTED = "expected a file, or postgresql://USER@HOST:PORT/DATABASE"
TIMEOUT_S = 30  # for a lock of SQLite
ANSWER_S = 10  # for PostgreSQL to connect, and to go on
SCHEMA_LOCK = 8128  # of ours: replicas that start at once make the table one after the other
# Classes of PostgreSQL's errors that later tries may not meet: connection, rollback, resources,
# operator, system.
PASSING = ("08", "40", "53", "57", "58")


# (text with ? for values, values) → a cursor: fetchone(), fetchall(), rowcount.
Execute = Callable[..., Any]


class Store(Protocol):
    """A database with the table `jobs`."""

    max_bytes: int  # of an image, or of an answer
    one_taker: str  # what keeps two replicas from taking the row that a SELECT finds

    def change(self) -> Any:
        """Give an `Execute` for one change, which is done whole or not at all. Raises Problem."""


def open_store(place: str) -> Store:
    """Open what --jobs names: a file, or PostgreSQL. Raises UserError."""
    if place.startswith(POSTGRES):
        return Postgres(place)
    if "://" in place:
        raise UserError(f"jobs is {hide_password(place)}; {EXPECTED}")
    return SqliteFile(Path(place))


class SqliteFile:
    """A file of SQLite, which only the service's user may read; what is removed is overwritten."""

    max_bytes = 10**9 - 2**20  # of a row; SQLite's own limit
    one_taker = ""  # a change locks the file

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises UserError."""
        self.path, self.lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            if os.name == "posix" and path.stat().st_mode & 0o077:
                raise UserError(f"{path} is open to other users; run `chmod 600 {path}`")
            with self._open() as database:
                database.execute("PRAGMA journal_mode = DELETE")
                database.execute(SCHEMA.format(bytes="BLOB"))
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"jobs cannot be kept in {path} ({error})") from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=TIMEOUT_S)
        with self.lock, closing(connection) as database, database:
            database.execute("PRAGMA secure_delete = ON")
            yield database

    @contextmanager
    def change(self) -> Iterator[Execute]:
        """Give an `Execute`, see `Store`."""
        try:
            with self._open() as database:
                yield database.execute
        except sqlite3.OperationalError:  # a full disk, a lock that another holds
            raise away() from None


class Postgres:
    """A database of PostgreSQL: postgresql://USER@HOST:PORT/DATABASE.

    The password is in the environment variable PGPASSWORD. The connection is by TLS unless the host
    is this machine or the URL ends in ?sslmode=disable; PGSSLROOTCERT names the file of an
    authority of your own.
    """

    max_bytes = 2**29 - 2**20  # sent as hex, in a message of at most 1 GiB
    one_taker = "FOR UPDATE SKIP LOCKED"

    def __init__(self, url: str) -> None:
        """Connect, and make the table. Raises UserError."""
        self.arguments = parse_url(url)
        try:
            with self._open() as execute:
                execute(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})")
                execute(SCHEMA.format(bytes="BYTEA"))
        except (OSError, pg8000.dbapi.Error) as error:
            raise UserError(f"jobs cannot be kept in {url} ({describe(error)})") from None

    @contextmanager
    def _open(self) -> Iterator[Execute]:
        with closing(pg8000.dbapi.connect(**self.arguments)) as database:

            def execute(text: str, values: Sequence[Any] = ()) -> Any:
                cursor = database.cursor()
                cursor.execute(text.replace("?", "%s"), values)
                return cursor

            yield execute
            database.commit()

    @contextmanager
    def change(self) -> Iterator[Execute]:
        """Give an `Execute`, see `Store`."""
        try:
            with self._open() as execute:
                yield execute
        except (OSError, pg8000.dbapi.InterfaceError):
            raise away() from None
        except pg8000.dbapi.DatabaseError as error:
            if not sql_state(error).startswith(PASSING):
                raise
            raise away() from None


def away() -> Problem:
    """Say that later it may work."""
    return Problem(503, "the jobs cannot be reached now", Retry_After="5")


def parse_url(url: str) -> dict[str, Any]:
    """Read the URL of a database as arguments of `connect`. Raises UserError."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or 5432
        options = dict(urllib.parse.parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        parts, port, options = urllib.parse.urlsplit(""), 0, {}
    name = parts.path.removeprefix("/")
    is_known = set(options) <= {"sslmode"} and options.get("sslmode", "disable") == "disable"
    if not (parts.username and parts.hostname and name and is_known):
        raise UserError(
            f"jobs is {hide_password(url)}; {EXPECTED}, at the end perhaps ?sslmode=disable"
        )
    if parts.password is not None:
        raise UserError("jobs has a password, which others can see; put it into PGPASSWORD")
    arguments = {"user": urllib.parse.unquote(parts.username), "host": parts.hostname}
    arguments |= {"port": port, "database": urllib.parse.unquote(name), "timeout": ANSWER_S}
    arguments |= {"password": os.environ.get("PGPASSWORD"), "application_name": "unet"}
    if not (options or is_loopback(parts.hostname)):
        try:
            own = os.environ.get("PGSSLROOTCERT")
            arguments["ssl_context"] = ssl.create_default_context(cafile=own)
        except OSError as error:
            raise UserError(f"PGSSLROOTCERT is {own}, which cannot be read ({error})") from None
    return arguments


def hide_password(url: str) -> str:
    """Leave out of a URL what may be a password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://…@{rest.rpartition('@')[2]}" if "@" in rest else url


def sql_state(error: Exception) -> str:
    """Return the five letters by which PostgreSQL names an error; "" if it named none."""
    first = error.args[0] if error.args else None
    return str(first.get("C", "")) if isinstance(first, dict) else ""


def describe(error: Exception) -> str:
    """Tell what PostgreSQL says of an error, in one line."""
    first = error.args[0] if error.args else None
    return str(first.get("M", "")) if isinstance(first, dict) else first_line(error)
