"""Buckets of S3, by moto's server: archives in and out, and a repository of models."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_repository import LUNGS, make_repository, titles, write_aliases
from test_serve import Running, free_port

from dataset.phantoms import make_phantoms
from imaging import formats
from inference.exported_model import load_exported
from inference.storage import Folder
from utils import UserError

boto3 = pytest.importorskip("boto3")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3():
    """A server of S3 of our own, named by the environment as for any client."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        client = boto3.client("s3")
        for _ in range(100):
            try:
                client.list_buckets()
                break
            except Exception:
                time.sleep(0.1)
        yield client
    server.terminate()
    server.wait(30)


@pytest.fixture
def bucket(s3, request) -> str:
    """An empty bucket."""
    name = f"b{abs(hash(request.node.name)) % 10**12}"
    place = {"LocationConstraint": "eu-central-1"}
    s3.create_bucket(Bucket=name, CreateBucketConfiguration=place)
    return name


def put(s3, bucket: str, key: str, path) -> None:
    s3.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


def run_archive(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "inference.archive", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_archive_goes_from_bucket_to_bucket(s3, bucket, tmp_path):
    """A damaged file costs no other; the same command goes on; masks are those of a folder."""
    phantoms = make_phantoms(str(tmp_path / "phantoms"), 6, seed=3)
    files = sorted((phantoms / "CXR_png").iterdir())
    for i, path in enumerate(files):
        put(s3, bucket, f"scans/ward{i % 2}/{path.name}", path)
    s3.put_object(Bucket=bucket, Key="scans/ward0/bad.png", Body=files[0].read_bytes()[:999])
    flags = ("--model", LUNGS / "unet.onnx", "--engine", "onnxruntime")
    places = ("--input", f"s3://{bucket}/scans", "--output", f"s3://{bucket}/masks")
    first = run_archive(*places, *flags)
    assert first.returncode == 2 and "6 masks" in first.stdout, first.stdout + first.stderr
    masks = Folder(f"s3://{bucket}/masks")
    assert "ward0/bad.png,unreadable" in masks.read("problems.csv").decode()
    network, run = load_exported(LUNGS / "unet.onnx", engine="onnxruntime")
    for i, path in enumerate(files):
        found = formats.decode_image(masks.read(f"ward{i % 2}/{path.stem}.png"))[..., 0] > 0
        expected = network.predict(network.read(path.read_bytes()), run).ids[0] > 0
        assert (found == expected).mean() > 0.9999
    masks.delete(f"ward0/{files[0].stem}.png")
    s3.delete_object(Bucket=bucket, Key="scans/ward0/bad.png")
    second = run_archive(*places, *flags)
    assert second.returncode == 0 and "6 masks" in second.stdout, second.stdout + second.stderr
    assert "5/6" in second.stderr  # the others were there already


def test_a_bucket_that_is_not_there(s3):
    done = run_archive(
        *("--input", "s3://nobody/x", "--output", "s3://nobody/y", "--model", LUNGS / "unet.onnx")
    )
    assert done.returncode == 2 and "s3://nobody/x cannot be listed" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="s3://nobody/models cannot be listed"):
        make_repository("s3://nobody/models")


def add_version(s3, bucket: str, title: str) -> None:
    for name in ("unet.onnx", "manifest.json"):
        put(s3, bucket, f"models/{title}/{name}", LUNGS / name)


def test_models_are_served_from_a_bucket(s3, bucket, tmp_path):
    """New versions and aliases come at a reload; a bucket that is away changes nothing."""
    add_version(s3, bucket, "lungs/1")
    s3.put_object(Bucket=bucket, Key="models/lungs/1/notes.txt", Body=b"not a model's file")
    repository = make_repository(f"s3://{bucket}/models")
    assert titles(repository) == ["lungs/1"]
    before = repository.find()
    assert not list(repository.mirror.place.rglob("notes.txt"))
    add_version(s3, bucket, "lungs/2")
    write_aliases(tmp_path, default="lungs/1")
    put(s3, bucket, "models/aliases.json", tmp_path / "aliases.json")
    repository.reload()
    assert titles(repository) == ["lungs/1", "lungs/2"]
    assert repository.find() is before  # it was not loaded again
    s3.delete_object(Bucket=bucket, Key="models/lungs/2/unet.onnx")
    repository.reload()
    assert titles(repository) == ["lungs/1"]
    repository.mirror.folder = Folder("s3://nobody/models")
    with pytest.raises(UserError, match="cannot be listed"):
        repository.reload()
    assert repository.find() is before


def test_the_service_takes_a_new_version_from_a_bucket(s3, bucket, tmp_path):
    add_version(s3, bucket, "lungs/1")
    service = Running(LUNGS, tmp_path, "--model", f"s3://{bucket}/models")
    try:
        assert service.client.get("/v1/model").json()["version"] == "1"
        add_version(s3, bucket, "lungs/2")
        os.kill(service.process.pid, signal.SIGHUP)
        end = time.monotonic() + 30
        while service.client.get("/v1/model").json()["version"] != "2":
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        service.stop()
