"""Jobs: images that take longer than a client wants to wait.

A job is kept until it is deleted or expires, also when the service is killed: what was running then
begins again. Replicas may share the store. A job belongs to the name of the API key that sent it.
"""

import json
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from serving.errors import Problem
from serving.job_store import Execute, Store
from serving.responses import MaskResponse

QUEUED, RUNNING, DONE, FAILED = "queued", "running", "done", "failed"
STATES = (QUEUED, RUNNING, DONE, FAILED)
MAX_TRIES = 3  # of a job whose service was killed each time; perhaps the job was the reason
LEASE_S = 30  # a job whose replica has not been seen for so long begins again
MAX_JOBS, MAX_BYTES = 1000, 2**32  # that are kept at a time
OWN_SHARE = 0.75  # of them, that one owner may have
ID = re.compile("[0-9a-f]{32}")
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
    """The jobs in a store. Every method may be called by any thread. Raises Problem 503."""

    def __init__(self, store: Store, keep_s: float) -> None:
        """keep_s: how long a finished job is kept."""
        self.store, self.keep_s = store, keep_s
        self.runner = uuid.uuid4().hex  # this replica, until it ends

    # ----------------------------------------------------------------------------- for the clients

    def submit(
        self, owner: str, model: str, version: str, accepted: Sequence[str], content: bytes
    ) -> str:
        """Keep a new job; return its id. Raises Problem 413, and 503 if too much is kept."""
        if len(content) > self.store.max_bytes:
            raise too_large()
        job_id = uuid.uuid4().hex
        with self.store.change() as execute:
            self._expire(execute)
            sizes = "COALESCE(LENGTH(content), 0) + COALESCE(LENGTH(answer), 0)"
            query = f"SELECT COUNT(*), COALESCE(SUM({sizes}), 0) FROM jobs"
            for where, share in (("", 1), ("WHERE owner = ?", OWN_SHARE)):
                args = (owner,) if where else ()
                count, size = execute(f"{query} {where}", args).fetchone()
                if count >= share * MAX_JOBS or size + len(content) > share * MAX_BYTES:
                    raise Problem(503, "too many jobs are kept; try again later", Retry_After="60")
            row = (job_id, owner, QUEUED, model, version, json.dumps(list(accepted)), time.time())
            columns = "id, owner, state, model, version, accepted, created, content"
            execute(
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
        check_id(job_id)
        with self.store.change() as execute:
            query = "DELETE FROM jobs WHERE id = ? AND owner = ?"
            if not execute(query, (job_id, owner)).rowcount:
                raise no_such_job()

    def counts(self) -> dict[str, int]:
        """Count the jobs by their state."""
        with self.store.change() as execute:
            rows = execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall()
        return dict.fromkeys(STATES, 0) | dict(rows)

    def _read(self, job_id: str, owner: str, columns: Sequence[str]) -> tuple:
        check_id(job_id)
        query = (
            f"SELECT {', '.join(columns)} FROM jobs WHERE id = ? AND owner = ? "
            "AND (finished IS NULL OR finished >= ?)"
        )
        with self.store.change() as execute:
            oldest = time.time() - self.keep_s
            row = execute(query, (job_id, owner, oldest)).fetchone()
        if row is None:
            raise no_such_job()
        return row

    # ----------------------------------------------------------------------------- for the service

    def take(self) -> Job | None:
        """Begin with a job; None if none waits.

        It is the oldest of the owner who was served longest ago.
        """
        now = time.time()
        with self.store.change() as execute:
            self._expire(execute)
            waits = (QUEUED, RUNNING, now - LEASE_S)
            owner = execute(
                "SELECT owner FROM jobs GROUP BY owner "
                "HAVING SUM(CASE WHEN state = ? OR (state = ? AND seen < ?) THEN 1 ELSE 0 END) > 0 "
                "ORDER BY COALESCE(MAX(started), 0), MIN(created) LIMIT 1",
                waits,
            ).fetchone()
            if owner is None:
                return None
            row = execute(
                "UPDATE jobs SET state = ?, started = ?, seen = ?, runner = ?, tries = tries + 1 "
                "WHERE id = (SELECT id FROM jobs "
                "WHERE (state = ? OR (state = ? AND seen < ?)) AND owner = ? "
                f"ORDER BY created LIMIT 1 {self.store.one_taker}) "
                "RETURNING id, model, version, accepted, content, tries",
                (RUNNING, now, now, self.runner, *waits, *owner),
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
        if isinstance(answer, MaskResponse) and len(answer.body) > self.store.max_bytes:
            answer = too_large()
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
        with self.store.change() as execute:
            return execute(query, (*values, job_id, self.runner, RUNNING)).rowcount == 1

    def _expire(self, execute: Execute) -> None:
        execute("DELETE FROM jobs WHERE finished < ?", (time.time() - self.keep_s,))


def check_id(job_id: str) -> None:
    """Raise Problem 404 for what is no id of a job."""
    if not ID.fullmatch(job_id):
        raise no_such_job()


def no_such_job() -> Problem:
    """Say that there is no job of this id, or none of this client."""
    return Problem(404, "there is no such job; it may have expired")


def too_large() -> Problem:
    """Say that an image or an answer is larger than the store takes."""
    return Problem(413, "too large to be kept as a job; send it to /v1/segment")
