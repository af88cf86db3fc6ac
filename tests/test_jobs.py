"""Jobs: kept until fetched or expired, also when the service is killed."""

import signal
import sqlite3
import threading
import time

import cv2
import httpx
import numpy as np
import pytest
from conftest import ROOT
from test_serve import Running, write_keys
from test_serve_doors import to_nifti

from dataset.phantoms import draw_phantom
from serving import jobs
from serving.errors import Problem
from serving.jobs import DONE, FAILED, QUEUED, RUNNING, Jobs
from serving.responses import MaskResponse
from utils import UserError

LUNGS = ROOT / "files" / "lungs"
ANSWER = MaskResponse(b"mask", "image/png", {"X-Areas": "[]"}, 0.5, None)


@pytest.fixture
def kept(tmp_path):
    return Jobs(tmp_path / "jobs.db", keep_s=60)


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
    with sqlite3.connect(kept.path) as database:
        return database.execute(text).fetchall()


def test_the_first_that_came_is_the_first_done(kept):
    names = [submit(kept) for _ in range(3)]
    assert [kept.take().id for _ in names] == names


def test_a_job_belongs_to_its_key(kept):
    name = submit(kept, "alice")
    for act in (kept.describe, kept.result, kept.remove):
        with pytest.raises(Problem, match="there is no such job"):
            act(name, "bob")
    kept.remove(name, "alice")
    with pytest.raises(Problem, match="there is no such job"):
        kept.describe(name, "alice")


def test_a_finished_job_expires_and_leaves_nothing(kept):
    secret = b"the patient's pixels" * 99
    name = submit(kept, content=secret)
    assert secret in kept.path.read_bytes()
    kept.take()
    kept.finish(name, ANSWER._replace(body=b"the patient's mask"))
    assert secret not in kept.path.read_bytes()
    kept.keep_s = -1
    with pytest.raises(Problem, match="it may have expired"):
        kept.describe(name, "")
    assert kept.take() is None  # as the service asks every second
    assert b"the patient" not in kept.path.read_bytes()


def test_a_job_of_a_killed_service_begins_again(kept, monkeypatch):
    name = submit(kept)
    kept.take()
    other = Jobs(kept.path, 60)
    assert kept.hold(name) and other.take() is None  # it still runs here
    monkeypatch.setattr(jobs, "LEASE_S", -1)  # here is gone
    assert other.take() == (name, "unet", "1", ["*/*"], b"image", 2)
    # It was not gone: what it found comes too late.
    assert not kept.hold(name)
    kept.finish(name, Problem(400, "late"))
    assert other.describe(name, "")["state"] == RUNNING
    other.finish(name, ANSWER)
    assert other.result(name, "")[1] == b"mask"


def test_an_orderly_stop_is_no_failure(kept):
    name = submit(kept)
    for _ in range(5):
        assert kept.take().tries == 1
        kept.give_back(name)
    assert kept.describe(name, "")["state"] == QUEUED


def test_a_removed_job_is_not_held(kept):
    name = submit(kept)
    kept.take()
    Jobs(kept.path, 60).remove(name, "")  # by another replica
    assert not kept.hold(name)


def test_many_threads_never_take_the_same_job(kept):
    names, taken = {submit(kept) for _ in range(40)}, []
    other = Jobs(kept.path, 60)

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
        Jobs(tmp_path / "no.db", 60)
    (tmp_path / "open.db").touch()
    (tmp_path / "open.db").chmod(0o644)
    with pytest.raises(UserError, match=r"open to other users; run `chmod 600"):
        Jobs(tmp_path / "open.db", 60)
    assert Jobs(tmp_path / "new.db", 60).path.stat().st_mode & 0o077 == 0


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
            assert sent.status_code == 202 and sent.json()["state"] == QUEUED
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
        metrics = client.get("/metrics").text
        assert 'unet_jobs{state="done"} 1.0' in metrics
        assert 'unet_jobs{state="running"} 0.0' in metrics
    finally:
        service.stop()


def test_without_a_file_there_are_no_jobs(png, tmp_path):
    service = Running(LUNGS, tmp_path)
    try:
        answer = service.client.post("/v1/jobs", content=png)
        assert answer.status_code == 404 and "--jobs FILE" in answer.json()["detail"]
    finally:
        service.stop()
