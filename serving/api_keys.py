"""API keys: their names, rights and limits. The service knows only their SHA-256.

A line of the file is `SHA256 name rights limit`, in hex, or `name:SHA256 rights limit`. Without
rights a key may segment. A limit, such as 600/min, is of requests. The service reads the file again
when it changes.
"""

import hashlib
import hmac
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.errors import Problem
from utils import UserError

SEGMENT, METRICS, ADMIN = "segment", "metrics", "admin"
RIGHTS = (SEGMENT, METRICS, ADMIN)
NAME = re.compile(r"[\w.@+-]{0,64}", re.ASCII)  # it is written into the log
LIMIT = re.compile(r"([1-9]\d{0,8})/min", re.ASCII)


@dataclass(frozen=True)
class Key:
    """A key that the service knows."""

    digest: bytes
    name: str
    rights: tuple[str, ...]
    limit: int = 0  # requests a minute; 0 is none


class Keys:
    """The keys of a file. Raises UserError if it is bad, or open to other users."""

    def __init__(self, path: Path) -> None:
        self.known = read_keys(path)
        self.minute, self.used = 0, Counter[bytes]()  # requests of each key in this minute

    def check(self, headers: Mapping[str, str], right: str) -> Key:
        """Return the key of a request. Raises Problem 401 without one, 403 without the right."""
        given = headers.get("x-api-key", "")
        authorization = headers.get("authorization", "")
        if not given and authorization[:7].lower() == "bearer ":
            given = authorization[7:]
        digest = hashlib.sha256(given.encode("latin-1")).digest()
        # All keys are compared, so that the time does not show which one matched.
        matches = [key for key in self.known if hmac.compare_digest(digest, key.digest)]
        if not given or not matches:
            detail = "no known API key; expected the header X-API-Key or Authorization: Bearer"
            raise Problem(401, detail, WWW_Authenticate="Bearer")
        if right not in matches[0].rights:
            raise Problem(403, f"this API key has no right to {right}; see the file of keys")
        return matches[0]

    def count(self, key: Key) -> None:
        """Count a request. Raises Problem 429 if its key has had too many in this minute."""
        minute, second = divmod(int(time.monotonic()), 60)
        if minute != self.minute:
            self.minute, self.used = minute, Counter()
        self.used[key.digest] += 1
        if key.limit and self.used[key.digest] > key.limit:
            detail = f"this API key may make {key.limit} requests a minute"
            raise Problem(429, detail, Retry_After=str(60 - second))


def read_keys(path: Path) -> list[Key]:
    """Read a file of keys. Raises UserError."""
    try:
        mode = path.stat().st_mode
        lines = path.read_text("utf-8-sig").splitlines()
        if os.name == "posix" and mode & 0o007:
            raise UserError(
                f"{path} is open to all users of this machine (mode {mode & 0o777:o}); "
                f"run `chmod o= {path}`"
            )
        keys = [read_key(words) for line in lines if (words := line.split("#")[0].split())]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        expected = "expected lines of a SHA-256 in hex, a name, and rights"
        raise UserError(f"{path} cannot be read as keys ({error}); {expected}") from None
    if not keys:
        raise UserError(f"{path} has no key; make one with `printf KEY | sha256sum`")
    if hashlib.sha256(b"").digest() in [key.digest for key in keys]:
        raise UserError(f"{path} has the hash of an empty key; check how the file was made")
    return keys


def read_key(words: list[str]) -> Key:
    """Read the words of a line. Raises ValueError."""
    name, colon, digest = words[0].partition(":")
    if not colon:
        name, digest = (words.pop(1) if len(words) > 1 else ""), name
    limit = LIMIT.fullmatch(words[-1])
    if limit:
        words.pop()
    rights = tuple(words[1].split(",")) if len(words) > 1 else (SEGMENT,)
    name = "" if name == "-" else name  # sha256sum writes it for what it read from a pipe
    if not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise ValueError("not a SHA-256 in hex")
    if not NAME.fullmatch(name):
        raise ValueError("a name with other characters than letters, digits and .@+-_")
    if len(words) > 2 or not set(rights) <= set(RIGHTS):
        raise ValueError(f"rights other than {', '.join(RIGHTS)}, or a limit other than 600/min")
    return Key(bytes.fromhex(digest), name, rights, int(limit[1]) if limit else 0)
