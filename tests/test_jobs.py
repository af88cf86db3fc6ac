"""Jobs: kept until fetched or expired, also when the service is killed."""

import asyncio
import os
import shutil
import signal
import sqlite3
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from conftest import ROOT
from test_serve import Running, free_port, write_keys
from test_serve_doors import to_nifti

from benchmarks.scripts import wait_until
from dataset.phantoms import draw_phantom
from serving import job_store, jobs, service
from serving.errors import Problem
from serving.job_store import open_store
from serving.jobs import DONE, FAILED, QUEUED, RUNNING, STATES, Jobs
from serving.responses import MaskResponse
from utils import UserError

LUNGS = ROOT / "files" / "lungs"
ANSWER = MaskResponse(b"mask", "image/png", {"X-Areas": "[]"}, 0.5, None)


@pytest.fixture(scope="module")
def postgres():
    """The URL of a PostgreSQL of our own. Required in CI, else the tests are skipped."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        why = "no PostgreSQL: apt-get install postgresql"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    # Not below pytest's folder, which is root's alone.
    folder, port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
    user = {}
    if os.getuid() == 0:  # it does not run as root
        user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
    data = folder / "data"
    make = [programs[-1] / "initdb", "-D", data, "-U", "unet", "--auth", "trust", "-N"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
    run = [programs[-1] / "postgres", "-D", data, "-p", str(port), "-k", folder, "-F"]
    server = subprocess.Popen(run, cwd=folder, stderr=subprocess.DEVNULL, **user)
    url = f"postgresql://unet@127.0.0.1:{port}/postgres"
    end = time.monotonic() + 60
    while True:
        try:
            open_store(url)
            break
        except UserError:
            assert time.monotonic() < end
            time.sleep(0.2)
    yield url
    server.send_signal(signal.SIGINT)  # without waiting for its clients
    server.wait(30)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def place(request, tmp_path):
    """Where jobs are kept: a new file, or an empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "jobs.db")
    url = request.getfixturevalue("postgres")
    with open_store(url).change() as execute:
        execute("DELETE FROM jobs")
    return url


@pytest.fixture
def kept(place):
    return open_jobs(place)


@pytest.fixture
def in_file(tmp_path):
    return open_jobs(str(tmp_path / "jobs.db"))


def open_jobs(place: str, keep_s: float = 60) -> Jobs:
    """Open the jobs as a replica does."""
    return Jobs(open_store(place), keep_s)


def submit(kept: Jobs, owner="", content=b"image") -> str:
    return kept.submit(owner, "unet", "1", ["*/*"], content)


def test_a_job_waits_runs_and_is_done(kept):
    name = submit(kept)
    assert kept.describe(name, "")["state"] == QUEUED
    with pytest.raises(Problem, match="this job is queued") as caught:
        kept.result(name, "")
    assert caught.value.status == 409
    job = kept.take()
    assert job == (name, "unet", "1", ["*/*"], b"image", 1)
    assert kept.describe(name, "")["state"] == RUNNING and kept.take() is None
    kept.finish(name, ANSWER)
    shown = kept.describe(name, "")
    assert shown["state"] == DONE and shown["created"] <= shown["started"] <= shown["finished"]
    assert kept.result(name, "") == (200, b"mask", "image/png", {"X-Areas": "[]"})
    assert kept.counts() == {QUEUED: 0, RUNNING: 0, DONE: 1, FAILED: 0}


def test_a_job_that_failed_tells_why(kept):
    submit(kept)
    kept.finish(kept.take().id, Problem(400, "unreadable"))
    ((name, state),) = query(kept, "SELECT id, state FROM jobs")
    status, body, media_type, _ = kept.result(name, "")
    assert (state, status, media_type) == (FAILED, 400, "application/problem+json")
    assert b"unreadable" in body


def query(kept: Jobs, text: str) -> list[tuple]:
    with kept.store.change() as execute:
        return [tuple(row) for row in execute(text).fetchall()]


def test_the_first_that_came_is_the_first_done(kept):
    names = [submit(kept) for _ in range(3)]
    assert [kept.take().id for _ in names] == names


def test_owners_come_in_turn_and_leave_room_for_others(kept, monkeypatch):
    many = [submit(kept, "alice") for _ in range(3)]
    late = submit(kept, "bob")
    assert [kept.take().id for _ in range(4)] == [many[0], late, *many[1:]]
    monkeypatch.setattr(jobs, "MAX_JOBS", 8)
    for _ in range(3):
        submit(kept, "alice")
    with pytest.raises(Problem, match="too many jobs are kept"):
        submit(kept, "alice")
    assert submit(kept, "bob")


def test_a_job_belongs_to_its_key(kept):
    name = submit(kept, "alice")
    for act in (kept.describe, kept.result, kept.remove):
        with pytest.raises(Problem, match="there is no such job"):
            act(name, "bob")
    kept.remove(name, "alice")
    with pytest.raises(Problem, match="there is no such job"):
        kept.describe(name, "alice")


def test_a_finished_job_expires_and_leaves_nothing(in_file):
    kept, path = in_file, in_file.store.path
    secret = b"the patient's pixels" * 99
    name = submit(kept, content=secret)
    assert secret in path.read_bytes()
    kept.take()
    kept.finish(name, ANSWER._replace(body=b"the patient's mask"))
    assert secret not in path.read_bytes()
    kept.keep_s = -1
    with pytest.raises(Problem, match="it may have expired"):
        kept.describe(name, "")
    assert kept.take() is None  # as the service asks every second
    assert b"the patient" not in path.read_bytes()


def test_a_job_of_a_killed_service_begins_again(kept, place, monkeypatch):
    name = submit(kept)
    kept.take()
    other = open_jobs(place)
    assert kept.hold(name) and other.take() is None  # it still runs here
    monkeypatch.setattr(jobs, "LEASE_S", -1)  # here is gone
    assert other.take() == (name, "unet", "1", ["*/*"], b"image", 2)
    # It was not gone: what it found comes too late.
    assert not kept.hold(name)
    kept.finish(name, Problem(400, "late"))
    assert other.describe(name, "")["state"] == RUNNING
    other.finish(name, ANSWER)
    assert other.result(name, "")[1] == b"mask"


@pytest.mark.parametrize("name", ["\0", "x" * 32, "1" * 31])
def test_what_is_no_id_is_no_job(kept, name):
    for act in (kept.describe, kept.result, kept.remove):
        with pytest.raises(Problem, match="there is no such job") as caught:
            act(name, "")
        assert caught.value.status == 404


def test_a_store_that_is_away_for_a_moment_costs_no_result(monkeypatch):
    """A change is tried again for as long as the job is held."""
    monkeypatch.setattr(service, "JOB_TICK_S", 0.01)
    answers = [Problem(503, "away"), Problem(503, "away"), True]

    def hold(name: str) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Problem):
            raise answer
        return answer

    assert asyncio.run(service.retried(hold, "1"))
    monkeypatch.setattr(service, "LEASE_S", -1)
    answers.append(Problem(503, "away"))
    with pytest.raises(Problem, match="away"):
        asyncio.run(service.retried(hold, "1"))


def test_an_orderly_stop_is_no_failure(kept):
    name = submit(kept)
    for _ in range(5):
        assert kept.take().tries == 1
        kept.give_back(name)
    assert kept.describe(name, "")["state"] == QUEUED


def test_a_removed_job_is_not_held(kept, place):
    name = submit(kept)
    kept.take()
    open_jobs(place).remove(name, "")  # by another replica
    assert not kept.hold(name)


def test_many_threads_never_take_the_same_job(kept, place):
    names, taken = {submit(kept) for _ in range(40)}, []
    other = open_jobs(place)

    def work(one: Jobs) -> None:
        while job := one.take():
            taken.append(job.id)

    threads = [threading.Thread(target=work, args=(one,)) for one in (kept, kept, other, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 40 and set(taken) == names


def test_only_so_much_is_kept(kept, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_JOBS", 1)
    submit(kept)
    with pytest.raises(Problem, match="too many jobs are kept") as caught:
        submit(kept)
    assert caught.value.status == 503
    monkeypatch.setattr(jobs, "MAX_JOBS", 9)
    monkeypatch.setattr(jobs, "MAX_BYTES", 20)
    with pytest.raises(Problem, match="too many jobs are kept"):
        submit(kept, content=b"x" * 20)


def test_a_file_that_is_none_or_open_to_others(tmp_path):
    (tmp_path / "no.db").write_bytes(b"no database" * 99)
    (tmp_path / "no.db").chmod(0o600)
    with pytest.raises(UserError, match=r"jobs cannot be kept in .*no.db"):
        open_store(str(tmp_path / "no.db"))
    (tmp_path / "open.db").touch()
    (tmp_path / "open.db").chmod(0o644)
    with pytest.raises(UserError, match=r"open to other users; run `chmod 600"):
        open_store(str(tmp_path / "open.db"))
    assert open_store(str(tmp_path / "new.db")).path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://unet@db", "expected a file, or postgresql://USER@HOST"),
        ("postgresql://unet:s3cret@db", r"jobs is postgresql://…@db; expected a file"),
        ("postgresql://db/unet", "expected a file, or postgresql://USER@HOST"),
        ("postgresql://unet@db:port/unet", "expected a file, or postgresql://USER@HOST"),
        ("postgresql://unet@db/unet?sslmode=maybe", "perhaps .sslmode=disable"),
        ("postgresql://unet:s3cret@db/unet", "others can see; put it into PGPASSWORD"),
        ("postgresql://unet@127.0.0.1:1/unet", "jobs cannot be kept in postgresql://unet@127"),
        ("postgres://unet@127.0.0.1:1/unet", "jobs cannot be kept in postgres://unet@127"),
        ("sqlite:///jobs.db", "jobs is sqlite:///jobs.db; expected a file, or postgresql://"),
        ("mysql://u:s3cret@db/unet", "jobs is mysql://…@db/unet; expected a file"),
    ],
)
def test_a_database_that_is_none(url, message):
    with pytest.raises(UserError, match=message) as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)


def test_a_database_elsewhere_is_spoken_to_by_tls(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    found = job_store.parse_url("postgresql://unet@db.example/unet")
    assert found["ssl_context"].verify_mode == ssl.CERT_REQUIRED
    assert (found["port"], found["password"]) == (5432, "s3cret")
    for url in ("postgresql://unet@127.0.0.1/unet", "postgresql://unet@db/unet?sslmode=disable"):
        assert "ssl_context" not in job_store.parse_url(url)


def test_a_store_that_is_away_is_no_fault_of_ours(in_file, monkeypatch):
    """The client may try again."""
    monkeypatch.setattr(job_store, "TIMEOUT_S", 0.1)
    with sqlite3.connect(in_file.store.path) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Problem, match="cannot be reached now") as caught:
            submit(in_file)
    assert caught.value.status == 503 and submit(in_file)


@pytest.mark.slow
def test_a_database_that_goes_away_and_comes_back(postgres, monkeypatch):
    kept = open_jobs(postgres)
    monkeypatch.setitem(kept.store.arguments, "port", free_port())
    with pytest.raises(Problem, match="cannot be reached now"):
        submit(kept)
    monkeypatch.undo()
    assert submit(kept)


def test_only_what_is_not_too_large_is_kept(kept):
    """An answer likewise."""
    most = kept.store.max_bytes = 1000  # the stores' own limits take a minute to reach
    with pytest.raises(Problem, match="too large to be kept") as caught:
        submit(kept, content=bytes(most + 1))
    assert caught.value.status == 413
    name = submit(kept, content=bytes(most))
    assert len(kept.take().content) == most
    kept.finish(name, ANSWER._replace(body=bytes(most + 1)))
    assert kept.result(name, "")[0] == 413


# ------------------------------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def png() -> bytes:
    picture, _ = draw_phantom(np.random.default_rng(0))
    return cv2.imencode(".png", picture)[1].tobytes()


def wait_for(client: httpx.Client, place: str, states=(DONE, FAILED), **more) -> dict:
    end = time.monotonic() + 120
    while (shown := client.get(place, **more).json())["state"] not in states:
        assert time.monotonic() < end
        time.sleep(0.05)
    return shown


def test_a_job_is_answered_as_a_request_is(png, tmp_path):
    keys = write_keys(tmp_path / "keys", a="alice", b="bob")
    flags = ("--jobs", str(tmp_path / "jobs.db"), "--keys", keys)
    service = Running(LUNGS, tmp_path, *flags, headers={"X-API-Key": "a"})
    client, bob = service.client, {"X-API-Key": "b"}
    try:
        for content, accept in ((png, "image/png"), (png, "application/json"), (b"?", "*/*")):
            expected = client.post("/v1/segment", content=content, headers={"Accept": accept})
            sent = client.post("/v1/jobs", content=content, headers={"Accept": accept})
            assert sent.status_code == 202 and sent.json()["state"] in STATES  # it may run by now
            place = sent.headers["location"]
            assert client.get(place, headers=bob).status_code == 404
            assert client.get(f"{place}/result", headers=bob).status_code == 404
            shown = wait_for(client, place)
            assert shown["state"] == (DONE if expected.status_code == 200 else FAILED)
            found = client.get(f"{place}/result")
            assert found.status_code == expected.status_code
            assert found.headers["content-type"] == expected.headers["content-type"]
            if found.status_code == 200:
                assert found.content == expected.content
                assert found.headers.get("x-areas") == expected.headers.get("x-areas")
            assert client.delete(place, headers=bob).status_code == 404
            assert client.delete(place).status_code == 204
            assert client.get(place).status_code == 404
        assert client.post("/v1/jobs", content=png, headers={"Accept": "a/b"}).status_code == 406
        assert client.post("/v1/models/none/jobs", content=png).status_code == 404
        assert client.post("/v1/models/unet/jobs", content=png).status_code == 202
    finally:
        service.stop()


@pytest.mark.slow
def test_two_replicas_share_a_database(png, postgres, tmp_path):
    """One takes the jobs of the other; either tells of all."""
    with open_store(postgres).change() as execute:
        execute("DELETE FROM jobs")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    replicas = [Running(LUNGS, tmp_path / name, "--jobs", postgres) for name in ("a", "b")]
    first, second = (one.client for one in replicas)
    try:
        places = [first.post("/v1/jobs", content=png).headers["location"] for _ in range(8)]
        assert [wait_for(second, one)["state"] for one in places] == [DONE] * 8
        expected = first.post("/v1/segment", content=png).content
        assert all(second.get(f"{one}/result").content == expected for one in places)
        with open_store(postgres).change() as execute:
            runners = execute("SELECT DISTINCT runner FROM jobs").fetchall()
        assert len(runners) == 2
        assert second.delete(places[0]).status_code == 204
        assert first.get(places[0]).status_code == 404
    finally:
        for one in replicas:
            one.stop()


def test_a_volume_survives_a_kill_and_can_be_stopped(tmp_path):
    drawn = np.stack([draw_phantom(np.random.default_rng(seed))[0] for seed in range(4)])
    content = to_nifti(np.tile(drawn, (40, 1, 1))).to_bytes()  # seconds of work
    flags = ("--jobs", str(tmp_path / "jobs.db"), "--max-body-mb", "200")
    service = Running(LUNGS, tmp_path, *flags)
    place = service.client.post("/v1/jobs", content=content).headers["location"]
    wait_for(service.client, place, states=(RUNNING,))
    service.process.send_signal(signal.SIGKILL)
    service.process.wait()
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        database.execute("UPDATE jobs SET seen = 0")  # as if half a minute had gone by
    service = Running(LUNGS, tmp_path, *flags)
    try:
        client = service.client
        assert wait_for(client, place)["state"] == DONE
        assert client.get(f"{place}/result").headers["content-type"] == "application/x-nifti"
        other = client.post("/v1/jobs", content=content).headers["location"]
        wait_for(client, other, states=(RUNNING,))
        assert client.delete(other).status_code == 204
        # The next job does not wait for what was stopped.
        last = client.post("/v1/jobs", content=b"?").headers["location"]
        start = time.monotonic()
        assert wait_for(client, last)["state"] == FAILED and time.monotonic() - start < 10
        expected = ('unet_jobs{state="done"} 1.0', 'unet_jobs{state="running"} 0.0')
        wait_until(lambda: all(line in client.get("/metrics").text for line in expected))
    finally:
        service.stop()


def test_without_a_file_there_are_no_jobs(png, tmp_path):
    service = Running(LUNGS, tmp_path)
    try:
        answer = service.client.post("/v1/jobs", content=png)
        assert answer.status_code == 404 and "--jobs FILE" in answer.json()["detail"]
    finally:
        service.stop()
