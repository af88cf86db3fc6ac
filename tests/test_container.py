"""The image of the service: linted, and built without Docker by Debian's buildah."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from conftest import ROOT
from test_deploy import DEPLOY, tool
from test_fuzz import GREY, WHOLE, tiff
from test_serve import free_port, service, write_keys  # noqa: F401 (a fixture)

import metrics
from imaging import formats

LINTERS = (
    "hadolint --failure-threshold=style Dockerfile",
    "check-jsonschema --builtin-schema=vendor.compose-spec compose.yaml",
)
ADDED_MB = 370  # the official base has about 130, and 500 is the limit


class Image(NamedTuple):
    """What was built, and a container of it."""

    buildah: Callable[..., str]
    command: list[str]  # the same, to be run by the test
    config: dict[str, Any]
    root: Path  # the container's files
    base_bytes: int


def size_of(folder: Path) -> int:
    return sum(
        path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or path.is_file()
    )


@pytest.fixture(scope="module")
def image(exported, tmp_path_factory) -> Iterator[Image]:
    """The image of deploy/Dockerfile on Debian's Python, as Docker Hub may not be reachable."""
    program, debootstrap = tool("buildah", "buildah crun"), tool("debootstrap", "debootstrap")
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "only root builds an image without Docker"
        )
    folder = tmp_path_factory.mktemp("image")
    context, wheels, settings = folder / "context", folder / "wheels", folder / "pip.conf"
    command = [program, f"--root={folder}/root", f"--runroot={folder}/run", "--storage-driver=vfs"]

    def run(*words: object) -> str:
        start, environment = time.monotonic(), os.environ | {"TMPDIR": str(folder)}
        done = subprocess.run(
            [*map(str, words)], capture_output=True, text=True, check=False, env=environment
        )
        print(f"{time.monotonic() - start:5.1f} s:", *words)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()

    buildah = functools.partial(run, *command)
    try:
        buildah("from", "--name=base", "scratch")
        base = buildah("mount", "base")
        run(
            debootstrap,
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            "bookworm",
            base,
        )
        base_bytes = size_of(Path(base))
        buildah("config", "--env=PATH=/usr/local/bin:/usr/bin:/bin", "base")
        buildah("commit", "--quiet", "--rm", "base", "base")
        context.mkdir()
        for name in {
            ".dockerignore",
            *re.findall(r"^!([^/\s]+)", (ROOT / ".dockerignore").read_text(), re.M),
        }:
            source = exported if name == "export" else ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, context / name)
        (context / "serving" / "key.pem").touch()  # a secret that lies about
        for path in context.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)  # a checkout under umask 077
        # Packages come by this machine's pip, which knows its mirrors and certificates.
        flags = ["--quiet", "--only-binary=:all:", "--python-version=3.11", f"--dest={wheels}"]
        for name, more in (("requirements", []), ("requirements-openvino", ["--no-deps"])):
            lock = ["-r", DEPLOY / f"{name}.lock", *more]
            run(sys.executable, "-m", "pip", "download", "--require-hashes", *flags, *lock)
        settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        flags = [
            "--isolation=chroot",
            "--format=docker",
            "--pull-never",
            "--build-arg=PYTHON=localhost/base",
        ]
        flags += [f"--volume={settings}:/etc/pip.conf:ro", f"--volume={wheels}:/wheels:ro"]
        flags += [f"--file={DEPLOY}/Dockerfile", context]
        buildah("bud", "--tag=unet", *flags)
        buildah("bud", "--tag=unet-openvino", "--build-arg=ENGINE=openvino", *flags)
        config = json.loads(buildah("inspect", "--type=image", "unet"))["Docker"]["config"]
        buildah("from", "--name=unet", "--pull-never", "localhost/unet")
        yield Image(buildah, command, config, Path(buildah("mount", "unet")), base_bytes)
    finally:
        buildah("rm", "--all")
        assert (
            str(folder) not in Path("/proc/self/mounts").read_text()
        )  # or what is mounted would be removed
        shutil.rmtree(folder)


def test_the_lock_file_holds_what_the_requirements_ask_for():
    from packaging.requirements import Requirement

    lines = (DEPLOY / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line.split(" \\")[0]) for line in lines if re.match(r"\w", line)]
    locked = {pin.name: pin.specifier for pin in pins if not pin.marker or pin.marker.evaluate()}
    names = ("requirements-serve.txt", "requirements-node.txt")
    lines = "\n".join((ROOT / name).read_text() for name in names).splitlines()
    for line in lines:
        if not re.match(r"\w", line):  # a comment, or another file
            continue
        asked = Requirement(line)
        assert asked.specifier.contains(str(locked[asked.name]).removeprefix("==")), line


@pytest.mark.parametrize("command", LINTERS)
def test_linters_find_nothing(command):
    name, *flags = command.split()
    program = Path(sys.executable).with_name(name)
    done = subprocess.run(
        [program, *flags], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_image_segments_as_its_own_user(image, service, xray, tmp_path):  # noqa: F811
    path, truth = xray
    content, port, keys, log = (
        path.read_bytes(),
        str(free_port()),
        tmp_path / "keys",
        tmp_path / "log",
    )
    write_keys(keys, key="client")
    os.chown(keys, 10001, 10001)  # the image's user
    run = ["run", "--isolation=chroot", f"--volume={keys}:/run/secrets/api_keys:ro", "unet", "--"]
    flags = [
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--drain-s",
        "0",
    ]  # the network is this machine's
    command = [*image.command, *run, *image.config["Entrypoint"], *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(300):
                assert process.poll() is None, log.read_text()
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            assert client.post("/v1/segment", content=content).status_code == 401
            answer = client.post("/v1/segment", content=content, headers={"X-API-Key": "key"})
            files = [
                *WHOLE.values(),
                *(tiff(GREY[0], compression=kind) for kind in ("lzw", "deflate", "packbits")),
            ]
            for number, file in enumerate(
                files
            ):  # whose codecs are not among those that trim.sh takes out
                inside = client.post("/v1/segment", content=file, headers={"X-API-Key": "key"})
                same = service.client.post("/v1/segment", content=file)
                assert inside.status_code == same.status_code, (number, inside.text)
                if same.status_code == 200:
                    assert inside.content == same.content, number
                else:
                    assert inside.json()["detail"] == same.json()["detail"], number
            dicom = {"X-API-Key": "key", "Accept": "application/dicom"}
            assert (
                client.post("/v1/segment", content=WHOLE["JPEG2000.dcm"], headers=dicom).status_code
                == 200
            )
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        listening = f"0100007F:{int(port):04X}", "0A"
        assert [words[7] for words in sockets if (words[1], words[3]) == listening] == [
            "10001"
        ]  # its user
        image.buildah(*run, "python3", "-m", "dicom_node", "--help")
        image.buildah(
            *run, *(word.replace("8080", port) for word in image.config["Healthcheck"]["Test"][1:])
        )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    mask = formats.decode_image(answer.content)[..., 0] > 0
    outside = (
        formats.decode_image(service.client.post("/v1/segment", content=content).content)[..., 0]
        > 0
    )
    assert (mask == outside).mean() > 0.9999 and metrics.score_mask(truth, mask)["dice"] > 0.9
    assert "telemetry" not in log.read_text()  # ONNX Runtime's is on by default
    owned = [path for path in image.root.rglob("*") if path.lstat().st_uid == 10001]
    assert owned == [image.root / "spool"]  # so a read-only file system will do, and a volume there


@pytest.mark.slow
def test_the_other_image_has_openvino(image):
    code = (
        "from pathlib import Path; import numpy as np; from inference import exported_model as m;"
        "net, run = m.load_exported(Path('export/unet.onnx'), engine='openvino');"
        "print(net.engine, run(np.zeros((1, *net.input_shape), np.float32)).shape[0])"
    )
    run = ("run", "--isolation=chroot", "--user=10001:10001")
    for name, expected in (("unet", "is not installed"), ("unet-openvino", "openvino 1")):
        container = f"{name}-asked"
        image.buildah("from", f"--name={container}", "--pull-never", f"localhost/{name}")
        shown = image.buildah(
            *run,
            container,
            "python3",
            "-c",
            f"import sys\ntry:\n {code}\nexcept Exception as error: print(error)",
        )
        assert expected in shown
        image.buildah("rm", container)


@pytest.mark.slow
def test_the_image_holds_what_it_needs_and_little_more(image):
    added = size_of(image.root) - image.base_bytes
    print(
        f"{added / 1e6:.0f} MB on a base of {image.base_bytes / 1e6:.0f} MB;"
        " the official base has about 130 MB"
    )
    assert added < ADDED_MB * 1e6
    packages = next(image.root.glob("venv/lib/python3*/site-packages"))
    unwanted = re.compile("tensorflow|keras|tf2onnx|torch|pip|setuptools")
    assert not [path.name for path in packages.iterdir() if unwanted.match(path.name.lower())]
    assert sorted(path.name for path in (image.root / "app" / "export").iterdir()) == [
        "manifest.json",
        "unet-int8.onnx",
        "unet.onnx",
    ]
    assert not (image.root / "app" / "serving" / "key.pem").exists()
