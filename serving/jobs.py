"""Jobs: images that take longer than a client wants to wait, in a file of SQLite.

A job is kept until it is deleted or expires, also when the service is killed: what was running then
begins again. Several replicas on one machine may share the file. A job belongs to the name of the
API key that sent it. Images and masks lie in that file, which only the service's user may read;
what is removed is overwritten.
"""

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from serving.errors import Problem
from serving.responses import MaskResponse
from utils import UserError

QUEUED, RUNNING, DONE, FAILED = "queued", "running", "done", "failed"
STATES = (QUEUED, RUNNING, DONE, FAILED)
MAX_TRIES = 3  # of a job whose service was killed each time; perhaps the job was the reason
LEASE_S = 30  # a job whose replica has not been seen for so long begins again
MAX_JOBS, MAX_BYTES = 1000, 2**32  # that are kept at a time
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, state TEXT NOT NULL,
    model TEXT NOT NULL, version TEXT NOT NULL, accepted TEXT NOT NULL,
    created REAL NOT NULL, started REAL, finished REAL,
    runner TEXT, seen REAL, tries INTEGER DEFAULT 0,
    content BLOB, status INTEGER, answer BLOB, media_type TEXT, headers TEXT
)
"""
SHOWN = ("id", "state", "model", "version", "created", "started", "finished")


class Job(NamedTuple):
    """What is to be done."""

    id: str
    model: str
    version: str
    accepted: list[str]
    content: bytes
    tries: int


class Jobs:
    """The jobs in a file. Every method may be called by any thread. Raises UserError."""

    def __init__(self, path: Path, keep_s: float) -> None:
        """Open the file, or make it. keep_s: how long a finished job is kept."""
        self.path, self.keep_s, self.lock = path, keep_s, threading.Lock()
        self.runner = uuid.uuid4().hex  # this replica, until it ends
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            if os.name == "posix" and path.stat().st_mode & 0o077:
                raise UserError(f"{path} is open to other users; run `chmod 600 {path}`")
            with self._open() as database:
                database.execute("PRAGMA journal_mode = DELETE")
                database.execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"jobs cannot be kept in {path} ({error})") from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one change, which is done whole or not at all."""
        with self.lock, closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            database.execute("PRAGMA secure_delete = ON")
            yield database

    # ----------------------------------------------------------------------------- for the clients

    def submit(
        self, owner: str, model: str, version: str, accepted: Sequence[str], content: bytes
    ) -> str:
        """Keep a new job; return its id. Raises Problem 503 if too much is kept."""
        job_id = uuid.uuid4().hex
        with self._open() as database:
            self._expire(database)
            sizes = "COALESCE(LENGTH(content), 0) + COALESCE(LENGTH(answer), 0)"
            query = f"SELECT COUNT(*), COALESCE(SUM({sizes}), 0) FROM jobs"
            count, size = database.execute(query).fetchone()
            if count >= MAX_JOBS or size + len(content) > MAX_BYTES:
                raise Problem(503, "too many jobs are kept; try again later", Retry_After="60")
            row = (job_id, owner, QUEUED, model, version, json.dumps(list(accepted)), time.time())
            columns = "id, owner, state, model, version, accepted, created, content"
            database.execute(
                f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, content)
            )
        return job_id

    def describe(self, job_id: str, owner: str) -> dict[str, Any]:
        """Tell a job's state and times, in seconds since 1970. Raises Problem 404."""
        row = self._read(job_id, owner, SHOWN)
        return dict(zip(SHOWN, row, strict=True))

    def result(self, job_id: str, owner: str) -> tuple[int, bytes, str, dict[str, str]]:
        """Return a finished job's status, body, media type and headers.

        Raises Problem 404, and 409 if it is not finished.
        """
        columns = ("state", "status", "answer", "media_type", "headers")
        state, status, answer, media_type, headers = self._read(job_id, owner, columns)
        if state not in (DONE, FAILED):
            raise Problem(409, f"this job is {state}", Retry_After="5")
        return status, answer, media_type, json.loads(headers)

    def remove(self, job_id: str, owner: str) -> None:
        """Remove a job, whatever its state. Raises Problem 404."""
        with self._open() as database:
            query = "DELETE FROM jobs WHERE id = ? AND owner = ?"
            if not database.execute(query, (job_id, owner)).rowcount:
                raise Problem(404, "there is no such job; it may have expired")

    def counts(self) -> dict[str, int]:
        """Count the jobs by their state."""
        with self._open() as database:
            rows = database.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall()
        return dict.fromkeys(STATES, 0) | dict(rows)

    def _read(self, job_id: str, owner: str, columns: Sequence[str]) -> tuple:
        query = (
            f"SELECT {', '.join(columns)} FROM jobs WHERE id = ? AND owner = ? "
            "AND (finished IS NULL OR finished >= ?)"
        )
        with self._open() as database:
            oldest = time.time() - self.keep_s
            row = database.execute(query, (job_id, owner, oldest)).fetchone()
        if row is None:
            raise Problem(404, "there is no such job; it may have expired")
        return row

    # ----------------------------------------------------------------------------- for the service

    def take(self) -> Job | None:
        """Begin with the job that has waited longest; None if none waits."""
        now = time.time()
        with self._open() as database:
            self._expire(database)
            row = database.execute(
                "UPDATE jobs SET state = ?, started = ?, seen = ?, runner = ?, tries = tries + 1 "
                "WHERE id = (SELECT id FROM jobs WHERE state = ? OR (state = ? AND seen < ?) "
                "ORDER BY created LIMIT 1) "
                "RETURNING id, model, version, accepted, content, tries",
                (RUNNING, now, now, self.runner, QUEUED, RUNNING, now - LEASE_S),
            ).fetchone()
        return Job(*row[:3], json.loads(row[3]), *row[4:]) if row else None

    def hold(self, job_id: str) -> bool:
        """Say that a job still runs here. Returns False if it was removed, or runs elsewhere."""
        return self._update("seen = ?", (time.time(),), job_id)

    def give_back(self, job_id: str) -> None:
        """Let another replica, or the next start, begin with a job again; this was no failure."""
        self._update("state = ?, tries = tries - 1", (QUEUED,), job_id)

    def finish(self, job_id: str, answer: MaskResponse | Problem) -> None:
        """Keep a job's answer instead of its image, unless the job was removed meanwhile."""
        if isinstance(answer, Problem):
            kept = (FAILED, answer.status, answer.body(job_id), "application/problem+json")
            headers: dict[str, str] = {}
        else:
            kept, headers = (DONE, 200, answer.body, answer.media_type), answer.headers
        columns = "state = ?, status = ?, answer = ?, media_type = ?, headers = ?, finished = ?"
        values = (*kept, json.dumps(headers), time.time())
        self._update(f"{columns}, content = NULL", values, job_id)

    def _update(self, columns: str, values: tuple, job_id: str) -> bool:
        """Change a job that runs here; say whether it does."""
        query = f"UPDATE jobs SET {columns} WHERE id = ? AND runner = ? AND state = ?"
        with self._open() as database:
            return database.execute(query, (*values, job_id, self.runner, RUNNING)).rowcount == 1

    def _expire(self, database: sqlite3.Connection) -> None:
        database.execute("DELETE FROM jobs WHERE finished < ?", (time.time() - self.keep_s,))
