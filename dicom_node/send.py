"""Send segmentations on: by C-STORE, or by STOW-RS to a DICOMweb server."""

import http.client
import re
import ssl
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pynetdicom import AE

from dicom_node.errors import AwayError, RefusedError
from utils import UserError, first_line

TIMEOUT_S = 60
PEER = re.compile(r"(?P<title>[^@\s]{1,16})@(?P<host>\[[0-9a-fA-F:]+\]|[^:@\s]+):(?P<port>[0-9]+)")
# The object was taken, or had been taken before (PS3.7, annex C).
TAKEN = (0x0000, 0x0111, *range(0xB000, 0xC000))
# The object will never be taken: it is not understood, or not wanted (PS3.4, table B.2-1).
NEVER = (*range(0xA900, 0xAA00), *range(0xC000, 0xD000), 0x0105, 0x0106, 0x0117, 0x0122)
REFUSED = (400, 409, 413, 415, 422, 501)  # of STOW-RS


@dataclass(frozen=True)
class Store:
    """A peer that takes C-STORE."""

    title: str
    host: str
    port: int
    own_title: str
    tls: ssl.SSLContext | None = None

    def send(self, path: Path) -> None:
        """Send a file. Raises AwayError, RefusedError."""
        dataset = pydicom.dcmread(path)
        entity = AE(self.own_title)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT_S
        entity.connection_timeout = TIMEOUT_S
        entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
        tls_args = (self.tls, self.host) if self.tls else None
        association = entity.associate(self.host, self.port, ae_title=self.title, tls_args=tls_args)
        if not association.is_established:
            if association.rejected_contexts and not association.accepted_contexts:
                raise RefusedError(f"{self.title} takes no {dataset.SOPClassUID.name}")
            how = "rejects this node" if association.is_rejected else "does not answer"
            raise AwayError(f"{self.title} {how}")
        try:
            answer = association.send_c_store(dataset)
        except ValueError as error:  # it cannot be encoded as they agreed
            raise RefusedError(first_line(error)) from None
        except RuntimeError:
            raise AwayError(f"{self.title} has hung up") from None
        finally:
            association.release()
        status = answer.get("Status")
        if status in TAKEN:
            return
        if status in NEVER:
            raise RefusedError(f"{self.title} refuses it with status 0x{status:04X}")
        shown = "nothing" if status is None else f"status 0x{status:04X}"
        raise AwayError(f"{self.title} answers with {shown}")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would turn the POST into a GET, whose answer says nothing."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        """Let a redirect be an error."""


@dataclass(frozen=True)
class Stow:
    """A DICOMweb server, by the URL of its studies."""

    url: str
    tls: ssl.SSLContext | None = None

    def send(self, path: Path) -> None:
        """Send a file. Raises AwayError, RefusedError."""
        mark = uuid.uuid4().hex
        head = f"--{mark}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = head + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        kind = f'multipart/related; type="application/dicom"; boundary={mark}'
        headers = {"Content-Type": kind, "Accept": "application/dicom+json"}
        request = urllib.request.Request(self.url, body, headers)
        https = urllib.request.HTTPSHandler(context=self.tls)
        try:
            urllib.request.build_opener(NoRedirect, https).open(request, timeout=TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            failure = f"the destination answers {error.code}"
            raise (RefusedError if error.code in REFUSED else AwayError)(failure) from None
        except (OSError, http.client.HTTPException) as error:
            name = type(error).__name__
            raise AwayError(f"the destination does not answer ({name})") from None


def parse_destination(text: str, own_title: str, tls: ssl.SSLContext | None) -> Store | Stow:
    """Read `--send-to`: TITLE@HOST:PORT, or the URL of a DICOMweb server. Raises UserError."""
    if text.startswith(("http://", "https://")):
        return Stow(text.rstrip("/"), tls)
    match = PEER.fullmatch(text)
    if not match or not 0 < int(match["port"]) < 2**16:
        raise UserError(
            f"send-to is {text!r}; expected TITLE@HOST:PORT, such as PACS@192.0.2.1:104, or the "
            "URL of a DICOMweb server's studies, such as https://pacs.example/dicom-web/studies"
        )
    return Store(match["title"], match["host"].strip("[]"), int(match["port"]), own_title, tls)
