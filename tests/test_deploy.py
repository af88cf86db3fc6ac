"""The files in deploy/ with the real tools: nginx before two replicas, Prometheus, alerts."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import jsonpatch
import pytest
import yaml
from conftest import ROOT
from prometheus_client import generate_latest
from test_serve import Running, free_port, write_keys

from benchmarks.scripts import wait_until
from dicom_node.__main__ import Config as NodeConfig
from dicom_node.node import Node
from dicom_node.spool import Spool
from inference.engines import ENGINES
from serving.config import Config as ServeConfig

DEPLOY = ROOT / "deploy"


HSTS = "Strict-Transport-Security"


def tool(name: str, package: str) -> str:
    """Find a program; required in CI, else the test is skipped."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if not path:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"no {name}: apt-get install {package}"
        )
    return path


def test_alerts_fire_only_when_they_should():
    promtool = tool("promtool", "prometheus")
    for command in (
        ["check", "config", "--syntax-only", "prometheus.yaml"],
        ["test", "rules", "alerts_test.yaml"],
    ):
        done = subprocess.run(
            [promtool, *command], cwd=DEPLOY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_metrics_of_dashboard_and_alerts_exist(exported, tmp_path, xray):
    running = Running(exported, tmp_path, "--jobs", str(tmp_path / "jobs.db"))
    try:
        running.client.post("/v1/segment", content=xray[0].read_bytes())
        wait_until(lambda: "unet_jobs{" in running.client.get("/metrics").text)
        shown = running.client.get("/metrics").text
    finally:
        running.stop()
    node = Node(Spool(tmp_path / "spool"), None, None, 1)
    for counter, name in ((node.done, "sent"), (node.away, "service")):
        counter.labels(name)
    node.expose("127.0.0.1", free_port())
    shown += generate_latest(node.registry).decode()
    panels = json.loads((DEPLOY / "grafana" / "unet.json").read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    queries += (DEPLOY / "alerts.yaml").read_text()
    for name in set(re.findall(r"\bunet_[a-z_]+", queries)):
        assert f"\n{name}" in shown, name


def test_compose_names_what_exists():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0].removeprefix("./")
            if source in compose["volumes"]:
                continue
            assert (DEPLOY / source).exists() or source in ("tls", "metrics_key"), (
                source
            )  # the user's own


def render(folder: Path) -> list[dict]:
    """Build the objects of a folder as kustomize does, as far as these folders use it."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    objects = []
    for resource in listed["resources"]:
        path = folder / resource
        objects += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in listed.get("patches", ()):
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        (i,) = [
            i
            for i, one in enumerate(objects)
            if (one["kind"], one["metadata"]["name"]) == (kind, name)
        ]
        objects[i] = jsonpatch.apply_patch(objects[i], yaml.safe_load(patch["patch"]))
    for image in listed.get("images", ()):
        for container in containers(objects):
            found, tag = container["image"].rsplit(":", 1)
            if found == image["name"]:
                new_name = image.get("newName", found)
                container["image"] = f"{new_name}:{image.get('newTag', tag)}"
    return objects


def containers(objects: list[dict]) -> list[dict]:
    found = []
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            found += one["spec"]["template"]["spec"]["containers"]
    return found


def test_the_overlay_for_gpus_asks_for_one():
    (container,) = containers(render(DEPLOY / "kubernetes" / "gpu"))
    assert container["image"] == "registry.example/unet:2.0-cuda"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    flag, engine = container["args"][-1].removeprefix("--").split("=")
    assert flag in ServeConfig.__dataclass_fields__ and engine in ENGINES
    lock = (DEPLOY / "requirements-cuda.lock").read_text()
    assert "onnxruntime-gpu==" in lock and "\nonnxruntime==" not in lock


def test_the_monitored_overlay_scales_by_the_queue():
    (scaler,) = [
        one
        for one in render(DEPLOY / "kubernetes" / "monitored")
        if one["kind"] == "HorizontalPodAutoscaler"
    ]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "unet_queue_length"


@pytest.mark.parametrize("name", ["base", "monitored", "node"])
def test_kustomize_names_what_exists(name):
    folder = DEPLOY / "kubernetes" / name
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    resources = set(listed["resources"])
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == {one for one in resources if one.endswith(".yaml")}
    assert all((folder / one).exists() for one in resources)
    objects = []
    for file in files:
        objects += yaml.safe_load_all((folder / file).read_text())
    assert all(one["metadata"]["namespace"] == "unet" for one in objects)
    images = [image["name"] for image in listed.get("images", ())]
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            (container,) = one["spec"]["template"]["spec"]["containers"]
            assert container["image"].split(":")[0] in images
            if "command" in container:
                given = {flag.split("=")[0][2:].replace("-", "_") for flag in container["args"]}
                assert given <= {field.name for field in dataclasses.fields(NodeConfig)}
    targets = [patch["target"]["kind"] for patch in listed.get("patches", ())]
    assert targets in ([], ["HorizontalPodAutoscaler"])


@pytest.fixture
def proxy(exported, tmp_path):
    """Two replicas behind nginx with deploy/nginx.conf: the replicas and a client."""
    import trustme

    nginx = tool("nginx", "nginx-light")
    replicas = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        keys = write_keys(tmp_path / name / "keys", key="client segment,metrics")
        replicas.append(Running(exported, tmp_path / name, "--threads", "1", "--keys", keys))
    authority, port = trustme.CA(), free_port()
    (tmp_path / "tls").mkdir()
    cert = authority.issue_cert("127.0.0.1")
    cert.private_key_pem.write_to_path(tmp_path / "tls" / "key.pem")
    cert.cert_chain_pems[0].write_to_path(tmp_path / "tls" / "cert.pem")
    text = (DEPLOY / "nginx.conf").read_text()
    for old, new in (
        ("unet1:8080", f"127.0.0.1:{replicas[0].port}"),
        ("unet2:8080", f"127.0.0.1:{replicas[1].port}"),
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("/tmp/nginx.pid", f"{tmp_path}/nginx.pid"),
        ("error_log /dev/stderr crit", f"daemon off; error_log {tmp_path}/error.log"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "nginx.conf").write_text(text)
    command = [nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    client = httpx.Client(
        base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=60, headers={"X-API-Key": "key"}
    )
    for _ in range(100):
        try:
            client.get("/livez")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    yield replicas, client
    client.close()
    process.terminate()
    process.wait(20)
    for replica in replicas:
        if replica.process.poll() is None:
            replica.stop()


@pytest.mark.slow
def test_no_client_notices_when_a_replica_dies_or_is_stopped(proxy, exported, tmp_path, xray):
    (one, two), client = proxy
    assert client.get("/metrics").status_code == 404
    for headers, status in (({"X-API-Key": "no"}, 401), ({}, 200)):
        answer = client.get("/v1/model", headers=headers)
        assert answer.status_code == status and "max-age" in answer.headers[HSTS]
        assert answer.headers.get_list("WWW-Authenticate") == ["Bearer"] * (status == 401)
    raw = socket.create_connection(("127.0.0.1", client.base_url.port))
    with ssl._create_unverified_context().wrap_socket(raw) as secure:  # the body never comes
        secure.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert secure.recv(100).startswith(b"HTTP/1.1 401")
    assert client.get("/livez", headers={"X-API-Key": ""}).status_code == 200
    script = f'''wrk.headers["X-API-Key"] = "key"
wrk.method = "POST"
wrk.body = io.open("{xray[0]}", "rb"):read("*a")'''
    (tmp_path / "post.lua").write_text(script)
    load = [tool("wrk", "wrk"), "-t1", "-c4", "-d15s", "--timeout=30s", "-s", tmp_path / "post.lua"]
    with subprocess.Popen(
        [*load, str(client.base_url.join("/v1/segment"))], stdout=subprocess.PIPE, text=True
    ) as wrk:
        time.sleep(1)
        one.process.kill()
        one.process.wait()
        time.sleep(2)
        one.process = subprocess.Popen(
            one.process.args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
        )
        for _ in range(100):
            try:
                if one.client.get("/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        time.sleep(3)
        two.process.terminate()  # what it has begun is finished
        assert two.process.wait(30) in (0, -signal.SIGTERM) and wrk.poll() is None
        report = wrk.communicate(timeout=60)[0]
    assert int(re.search(r"(\d+) requests in", report)[1]) > 100, report
    assert "Non-2xx" not in report and "Socket errors" not in report, report
    large = client.post("/v1/segment", content=bytes(65 * 2**20))
    assert large.status_code == 413 and large.headers["content-type"] == "application/problem+json"
    one.process.terminate()
    one.process.wait(30)
    away = client.post("/v1/segment", content=xray[0].read_bytes())
    assert (
        away.status_code == 503
        and away.headers["retry-after"] == "1"
        and away.json()["status"] == 503
    )


@pytest.mark.slow
def test_prometheus_scrapes_the_service(exported, tmp_path, xray):
    prometheus = tool("prometheus", "prometheus")
    running, port = Running(exported, tmp_path), free_port()
    running.client.post("/v1/segment", content=xray[0].read_bytes())
    settings = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    settings["global"]["scrape_interval"] = "1s"
    settings["rule_files"] = [str(DEPLOY / "alerts.yaml")]
    settings["scrape_configs"][0].pop("authorization")
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{running.port}"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        found = []
        for _ in range(100):
            time.sleep(0.3)
            try:
                query = {"query": 'unet_requests_total{route="/v1/segment",status="200"}'}
                found = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=query).json()[
                    "data"
                ]["result"]
            except (httpx.TransportError, KeyError):
                continue
            if found:
                break
        assert found and float(found[0]["value"][1]) == 1
        groups = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(groups) == 3 and {rule["health"] for rule in rules} <= {"ok", "unknown"}
    finally:
        process.terminate()
        process.wait(30)
        running.stop()
