"""The manners of every script's command line: flags from a dataclass, messages instead of tracebacks, exit codes."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from images import UserError

T = TypeVar("T")
GOES_ON = "; the same command goes on from here"


def require(package: str, requirements: str) -> None:
    """End the script, exit code 2, if a package is not installed that the file `requirements` has."""
    if importlib.util.find_spec(package) is None:
        print(f"error: {package} is not installed: pip install -r {requirements}", file=sys.stderr)
        sys.exit(2)


def run_cli(call: Callable[[], Any], on_stop: str = "") -> None:
    """Run a script: exit 0 when done, 2 with a message on the user's mistake, 130 on Ctrl-C; our faults trace back.

    on_stop: what to say more after "stopped".
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Keras would have us give up HDF5
    try:
        call()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; check the path, its rights and the disk", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nstopped{on_stop}", file=sys.stderr)
        sys.exit(130)


def parse(config_class: type[T]) -> T:
    """Make a dataclass the command line of the script that it stands in: a flag per field, its comment as help."""
    return tyro.cli(config_class, description=sys.modules[config_class.__module__].__doc__)


def run(main: Callable[[T], Any], config_class: type[T], on_stop: str = "") -> None:
    """Run `main` by its command line; see `parse` and `run_cli`."""
    run_cli(lambda: main(parse(config_class)), on_stop)
