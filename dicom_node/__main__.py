"""A DICOM node beside the service: takes images by C-STORE and sends their segmentations on.

    python -m dicom_node --allow CT1@192.0.2.7 --send-to PACS@192.0.2.1:104

It needs a running `serve.py`, which segments, and requirements-node.txt. What was taken is not
lost: it lies in the spool, also after a kill, until the destination has the segmentation. A
segmentation's UIDs follow from its image and the model: sent twice, it is the same object.
So are those of the report and the pictures that --also sends with it.
What cannot be segmented, or is not wanted, is in quarantine/ in the spool, with the reason.
"""

import signal
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Config:
    """Who sends, who gets the segmentations, and what happens in between."""

    send_to: str  # TITLE@HOST:PORT, or the URL of a DICOMweb server's studies
    # Who may send, separated by commas: TITLE@ADDRESS, or TITLE from any address.
    allow: str = ""
    service: str = "http://127.0.0.1:8080"  # a running serve.py
    key: str = ""  # file with the service's API key itself
    also: str = ""  # "report" of the measurements, "overlay" pictures, or both with a comma
    spool: str = "files/spool"  # folder; on a disk with room for a day's images

    ae_title: str = "UNET"  # of this node
    host: str = "127.0.0.1"  # another address needs --allow and TLS, or --insecure
    port: int = 11112
    tls_cert: str = ""  # PEM file; with --tls-key the node takes TLS only
    tls_key: str = ""  # PEM file
    client_ca: str = ""  # PEM file; callers need a certificate of this authority
    send_ca: str = ""  # PEM file; the destination is spoken to by TLS and must be of this authority
    insecure: bool = False  # without TLS, in a network that nobody else can reach

    complete_after_s: float = 30  # a series is complete if no image has come for so long
    retry_s: float = 30  # until the service or the destination is asked again for the same thing
    metrics_port: int = 0  # for Prometheus; 0 has none
    metrics_host: str = "127.0.0.1"


def check_config(config: Config) -> None:
    """Raise UserError for settings that are unsafe or cannot work."""
    for name in ("complete_after_s", "retry_s"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} is {getattr(config, name)}; expected above 0")
    if not 0 < len(config.ae_title.strip()) <= 16:
        raise UserError(f"ae_title is {config.ae_title!r}; expected 1 to 16 characters")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise UserError("tls_cert and tls_key belong together; expected both or neither")
    if config.client_ca and not config.tls_cert:
        raise UserError("client_ca needs TLS; expected tls_cert and tls_key too")
    if config.host in LOOPBACK:
        return
    if not config.allow:
        raise UserError(f"host is {config.host}; expected --allow, or anybody there may send")
    if not (config.tls_cert or config.insecure):
        raise UserError(
            f"host is {config.host}; expected --tls-cert and --tls-key, or --insecure in a network "
            "that nobody else can reach"
        )


def make_tls(config: Config) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """Make the contexts for callers and for the destination. Raises UserError."""
    incoming = outgoing = None
    try:
        if config.tls_cert:
            incoming = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            incoming.load_cert_chain(config.tls_cert, config.tls_key)
            if config.client_ca:
                incoming.load_verify_locations(config.client_ca)
                incoming.verify_mode = ssl.CERT_REQUIRED
        if config.send_ca:
            outgoing = ssl.create_default_context(cafile=config.send_ca)
            if config.tls_cert:
                outgoing.load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as error:  # an SSLError is one
        raise UserError(f"certificates cannot be read as PEM ({error})") from None
    return incoming, outgoing


def run(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C. Raises UserError."""
    check_config(config)
    utils.require("pynetdicom", "requirements-node.txt")
    from dicom_node.ask import Service, parse_also
    from dicom_node.node import Node
    from dicom_node.receive import Receiver, parse_callers
    from dicom_node.send import parse_destination
    from dicom_node.spool import Spool

    incoming, outgoing = make_tls(config)
    destination = parse_destination(config.send_to, config.ae_title, outgoing)
    callers, spool = parse_callers(config.allow), Spool(Path(config.spool))
    node = Node(
        spool,
        Service(config.service, config.key, parse_also(config.also)),
        destination,
        config.retry_s,
    )
    receiver = Receiver(config.ae_title, spool, callers)
    if config.metrics_port:
        node.expose(config.metrics_host, config.metrics_port)
    server = receiver.start((config.host, config.port), incoming)

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    port = server.socket.getsockname()[1]
    print(f"{config.ae_title}@{config.host}:{port} sends to {config.send_to}", flush=True)
    threads = [
        threading.Thread(target=node.segment_all, args=(stop, config.complete_after_s)),
        threading.Thread(target=node.send_all, args=(stop,)),
    ]
    for thread in threads:
        thread.start()
    stop.wait()
    print("stopping; what came stays in the spool", flush=True)
    server.shutdown()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    utils.run_script(run, Config, description=__doc__)
