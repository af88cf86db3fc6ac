"""Take images from known callers by C-STORE, into the spool."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.sop_class import Verification

from dicom_node.spool import Spool
from serving.monitoring import log_event
from utils import UserError

SUCCESS, NO_RESOURCES, NOT_UNDERSTOOD, NOT_AUTHORISED = 0x0000, 0xA700, 0xC000, 0x0124
MAX_ASSOCIATIONS = 20
SILENCE_S = 30  # of a caller; then it is cut off
# Not the deflated one: its header cannot be read without unpacking everything.
SYNTAXES = (
    pydicom.uid.ExplicitVRLittleEndian,
    pydicom.uid.ImplicitVRLittleEndian,
    pydicom.uid.ExplicitVRBigEndian,
    pydicom.uid.RLELossless,
    *pydicom.uid.JPEGTransferSyntaxes,
    *pydicom.uid.JPEGLSTransferSyntaxes,
    pydicom.uid.JPEG2000Lossless,
    pydicom.uid.JPEG2000,
)


class Caller(NamedTuple):
    """Who may send: an AE title, and an address or "" for any."""

    title: str
    address: str


def parse_callers(text: str) -> list[Caller]:
    """Read `--allow`: titles, each with @ADDRESS or without. Raises UserError."""
    callers = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        title, _, address = part.partition("@")
        if not 0 < len(title) <= 16:
            raise UserError(f"allow has {part!r}; expected TITLE@ADDRESS, such as CT1@192.0.2.7")
        callers.append(Caller(title, address))
    return callers


class Receiver:
    """Answers C-ECHO and C-STORE."""

    def __init__(self, title: str, spool: Spool, callers: Sequence[Caller]) -> None:
        self.spool, self.callers = spool, callers
        # The bytes go to a file as they come, on the spool's disk.
        _config.STORE_RECV_CHUNKED_DATASET = True
        tempfile.tempdir = str(spool.receiving)
        self.entity = AE(title)
        self.entity.maximum_associations = MAX_ASSOCIATIONS
        self.entity.acse_timeout = self.entity.dimse_timeout = SILENCE_S
        self.entity.network_timeout = SILENCE_S
        self.entity.require_called_aet = True
        self.entity.require_calling_aet = sorted({caller.title for caller in callers})
        self.entity.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            self.entity.add_supported_context(context.abstract_syntax, SYNTAXES)

    def start(self, address: tuple[str, int], tls: Any = None) -> Any:
        """Listen, in threads of its own; return the server. Raises UserError."""
        # Its own messages may quote what was sent.
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
        handlers = [
            (evt.EVT_C_ECHO, self.on_echo),
            (evt.EVT_C_STORE, self.on_store),
            (evt.EVT_ACCEPTED, self.on_accepted),
            (evt.EVT_REJECTED, self.on_rejected),
        ]
        try:
            return self.entity.start_server(
                address, block=False, evt_handlers=handlers, ssl_context=tls
            )
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {address[0]} port {address[1]} ({error}); stop the program "
                "there, or give another --port"
            ) from None

    def is_allowed(self, event: Any) -> bool:
        """Say whether a caller comes from its address. Its title was looked at before."""
        caller = event.assoc.requestor
        found = caller.ae_title.strip(), caller.address
        return not self.callers or any(
            title == found[0] and address in ("", found[1]) for title, address in self.callers
        )

    def on_accepted(self, event: Any) -> None:
        """Cut off who may not send, or when there is no room, before anything is sent."""
        if not self.is_allowed(event) or not self.spool.has_room():
            caller = event.assoc.requestor
            log_event(event="a caller is cut off", title=caller.ae_title, address=caller.address)
            event.assoc.abort()

    def on_rejected(self, event: Any) -> None:
        """Note a caller whose title is not known."""
        caller = event.assoc.requestor
        log_event(event="a caller is rejected", title=caller.ae_title, address=caller.address)

    def on_echo(self, event: Any) -> int:
        """Answer C-ECHO."""
        return SUCCESS if self.is_allowed(event) else NOT_AUTHORISED

    def on_store(self, event: Any) -> int:
        """Take an image. Returns the status; success only when it is on the disk."""
        if not self.is_allowed(event):
            return NOT_AUTHORISED
        if not self.spool.has_room():
            log_event(event="no room on the disk")
            return NO_RESOURCES
        path = Path(event.dataset_path)
        try:
            tags = ["SeriesInstanceUID", "SOPInstanceUID"]
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            self.spool.keep(path, str(header.SeriesInstanceUID), str(header.SOPInstanceUID))
        except OSError as error:
            log_event(event="an image cannot be kept", error=str(error.strerror))
            return NO_RESOURCES
        except Exception as error:  # pydicom raises many for a damaged file
            log_event(event="an image is not understood", error=type(error).__name__)
            return NOT_UNDERSTOOD
        return SUCCESS
