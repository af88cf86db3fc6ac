"""Take rights from a worker process: no network, no other programs, no files but those of Python.

By Landlock (https://docs.kernel.org/userspace-api/landlock.html) and seccomp, where the Linux
kernel allows them; elsewhere the process keeps the rights of its user. A file that misuses a fault
in a decoder then finds neither keys nor images, and nowhere to send them.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from pathlib import Path

from utils import ROOT

# Numbers of Landlock's calls, the same on every processor.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# All rights to files, to TCP and to signals that version i of Landlock knows.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # and 16 from 5 on
TCP_SINCE, SCOPE_SINCE = 4, 6
PATH_BENEATH = 1
NO_NEW_PRIVILEGES = 38  # of prctl
# Of seccomp: its own number, its architecture's, and the calls that are refused.
SYSTEMS = {
    "x86_64": (
        317,
        0xC000003E,
        {
            "socket": 41,
            "execve": 59,
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "execveat": 322,
            "io_uring_setup": 425,
        },
    ),
    "aarch64": (
        277,
        0xC00000B7,
        {
            "ptrace": 117,
            "socket": 198,
            "execve": 221,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "execveat": 281,
            "io_uring_setup": 425,
        },
    ),
}
X32 = 0x40000000  # numbers from here on are those of another interface of x86_64
SET_FILTER, ALL_THREADS = 1, 1
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
# The code that the workers run; the folder around it may hold keys and images.
CODE = ("imaging", "inference", "networks", "serving", "utils.py", "serve.py")
SYSTEM_FILES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null")


def drop_rights() -> list[str]:
    """Take rights from this process for good. Returns what the system has done of it."""
    if not sys.platform.startswith("linux"):
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return []
    done = {"landlock": restrict_files(libc), "seccomp": refuse_calls(libc)}
    return [name for name, is_done in done.items() if is_done]


def restrict_files(libc: ctypes.CDLL) -> bool:
    """Allow this thread and those that it starts to read Python's files, and no TCP."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << FILE_RIGHTS.get(version, 16)) - 1
    tcp = 0b11 if version >= TCP_SINCE else 0  # bind and connect
    scope = 0b11 if version >= SCOPE_SINCE else 0  # sockets without a file, signals
    rules = struct.pack("QQQ", rights, tcp, scope)[: 8 + 8 * bool(tcp) + 8 * bool(scope)]
    ruleset = libc.syscall(CREATE_RULESET, rules, len(rules), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable_paths():
            allow_reading(libc, ruleset, path)
        return libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def readable_paths() -> list[Path]:
    """List what Python may still read when it imports something: code and libraries."""
    paths = [ROOT / name for name in CODE] + [Path(name) for name in SYSTEM_FILES]
    paths += [Path(sys.prefix), Path(sys.base_prefix)]
    for name in sys.path:
        path = Path(name).resolve()
        if name and path not in (ROOT.resolve(), Path.cwd()):
            paths.append(path)
    return [path for path in paths if path.exists()]


def allow_reading(libc: ctypes.CDLL, ruleset: int, path: Path) -> None:
    """Allow to read a file, or a folder and what is in it."""
    rights = READ_FILE | READ_DIR if path.is_dir() else READ_FILE
    opened = os.open(path, os.O_PATH)
    try:
        libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights, opened), 0)
    finally:
        os.close(opened)


def refuse_calls(libc: ctypes.CDLL) -> bool:
    """Let no thread open a socket, start a program or look into another process."""
    if platform.machine() not in SYSTEMS:
        return False
    number, architecture, calls = SYSTEMS[platform.machine()]
    program = filter_program(architecture, list(calls.values()))
    buffer = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return libc.syscall(number, SET_FILTER, ALL_THREADS, described) == 0


def filter_program(architecture: int, refused: list[int]) -> bytes:
    """Write a program of seccomp, instructions of 8 bytes, that refuses some calls."""
    load, jump_if_equal, jump_from, end = 0x20, 0x15, 0x35, 0x06  # the Berkeley packet filter's
    count = len(refused)
    program = [
        (load, 0, 0, 4),  # the architecture
        (jump_if_equal, 1, 0, architecture),
        (end, 0, 0, REFUSE),  # calls of another architecture have other numbers
        (load, 0, 0, 0),  # the call
        (jump_from, count + 1, 0, X32),
        *((jump_if_equal, count - i, 0, call) for i, call in enumerate(refused)),
        (end, 0, 0, ALLOW),
        (end, 0, 0, REFUSE),
    ]
    return b"".join(struct.pack("HBBI", *one) for one in program)
