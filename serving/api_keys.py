"""API keys: the service knows only their SHA-256."""

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from serving.errors import Problem
from utils import UserError


def read_keys(path: Path) -> list[bytes]:
    """Read the SHA-256 of each API key, one per line in hex. Raises UserError."""
    try:
        keys = []
        for line in path.read_text("utf-8-sig").splitlines():
            words = line.split("#")[0].split()
            if words:
                keys.append(bytes.fromhex(words[0]))  # sha256sum writes a file name after it
    except (OSError, ValueError) as error:
        expected = "expected a SHA-256 in hex per line"
        raise UserError(f"{path} cannot be read as keys ({error}); {expected}") from None
    if not keys or any(len(key) != 32 for key in keys):
        cure = "make one with `printf KEY | sha256sum`"
        raise UserError(f"{path} has no key, or one that is not a SHA-256 in hex; {cure}")
    if hashlib.sha256(b"").digest() in keys:
        raise UserError(f"{path} has the hash of an empty key; check how the file was made")
    return keys


def check_key(headers: Mapping[str, str], keys: list[bytes]) -> None:
    """Raise Problem 401 unless the request has a known key."""
    given = headers.get("x-api-key", "")
    authorization = headers.get("authorization", "")
    if not given and authorization[:7].lower() == "bearer ":
        given = authorization[7:]
    digest = hashlib.sha256(given.encode("latin-1")).digest()
    # All keys are compared, so that the time does not show which one matched.
    matches = [hmac.compare_digest(digest, key) for key in keys]
    if not given or not any(matches):
        detail = "no known API key; expected the header X-API-Key or Authorization: Bearer"
        raise Problem(401, detail, WWW_Authenticate="Bearer")
