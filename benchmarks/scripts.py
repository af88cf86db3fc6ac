"""How the benchmarks run our scripts and wait for them."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable

import utils
from utils import UserError


def run_script(*command: str, **environment: str) -> tuple[str, float]:
    """Run one of our scripts: `"predict.py", "--help"` or `"-m", "benchmarks.pytorch_unet"`.

    Returns what it printed and its seconds. Raises UserError if it fails.
    """
    start = time.perf_counter()
    done = subprocess.run(
        python_command(*command),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(utils.ROOT)} | environment,
    )
    if done.returncode:
        raise UserError(f"python {' '.join(command)} failed:\n{done.stderr[-500:]}")
    return done.stdout, time.perf_counter() - start


def python_command(script: str, *flags: str) -> list[str]:
    """Name the interpreter, a script of the repository by its full path, and its flags."""
    if script.endswith(".py"):
        script = str(utils.ROOT / script)
    return [sys.executable, script, *flags]


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until `condition` holds. Raises UserError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise UserError(f"nothing happened in {seconds:g} s; is the machine busy?")
        time.sleep(0.05)


def is_installed(name: str) -> bool:
    """Check whether an optional package is installed; print a line if it is not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed, so it is not measured: pip install {name}")
    return found
