"""The operator's first hour in docs/deployment.md: its commands are run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_serve import free_port

pytestmark = pytest.mark.slow
COPIED = (
    "serve.py",
    "utils.py",
    "files/lungs",
    "imaging",
    "inference",
    "networks",
    "serving",
    "web",
)


def read_commands(port: int) -> str:
    """Collect the blocks of the section, without the installation."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    section = text.partition("## An operator's first hour\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    assert len(blocks) == 6
    commands = "".join(blocks).replace("pip install -r requirements-serve.txt\n", "")
    commands = commands.replace("serve.py ", f"serve.py --port {port} ")
    return commands.replace("127.0.0.1:8080", f"127.0.0.1:{port}")


def test_the_first_hour(tmp_path):
    for name in COPIED:
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", read_commands(free_port())],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("masks are as expected") == 3
    assert re.findall(r'"version":"(\d)"', said) == ["2", "1"]
    assert 'unet_requests_total{route="/v1/segment",status="200"}' in said
    assert '"key":"ward"' in said
