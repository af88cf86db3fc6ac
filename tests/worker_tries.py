"""What test_withstands.py has a worker process try: a module that needs none of the repository."""

import importlib
import socket
import subprocess
from pathlib import Path


def try_all(path: Path, beside_the_code: Path, port: int) -> dict[str, str]:
    """Try what a worker may not do; name the errors."""
    found = {}
    for name, act in (
        ("read", path.read_bytes),
        ("write", lambda: path.with_name("new").write_bytes(b"x")),
        ("list", lambda: list(path.parent.iterdir())),
        ("keys beside the code", beside_the_code.read_bytes),
        ("connect", lambda: socket.create_connection(("127.0.0.1", port), 2)),
        ("send", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
        ("run", lambda: subprocess.run(["/bin/true"], check=False)),
        ("import", lambda: importlib.import_module("sndhdr")),
    ):
        try:
            act()
            found[name] = ""
        except Exception as error:
            found[name] = type(error).__name__
    return found
