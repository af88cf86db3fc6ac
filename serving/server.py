"""The web server around the application: its address, TLS, and an orderly stop."""

import asyncio
import signal
import socket
import ssl
from typing import Any

import fastapi
import uvicorn

from serving.config import Config
from serving.service import Service
from utils import UserError

# Longer than a proxy keeps its connections; else a proxy may use one that was just closed.
KEEP_ALIVE_S = 75


class Server(uvicorn.Server):
    """Uvicorn that answers "not ready" for a while before it refuses connections."""

    def __init__(self, settings: uvicorn.Config, service: Service) -> None:
        super().__init__(settings)
        self.service = service
        self.is_ctrl_c = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note whether a person stops the service."""
        self.is_ctrl_c = sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop. Load balancers see it at /readyz first; running requests are finished."""
        print("stopping; running requests are finished first", flush=True)
        self.service.ready = False
        if not self.is_ctrl_c:
            await asyncio.sleep(self.service.config.drain_s)
        await super().shutdown(sockets)


def server_settings(app: fastapi.FastAPI, config: Config) -> uvicorn.Config:
    """Make uvicorn's settings and load the TLS files. Raises UserError."""
    settings = uvicorn.Config(
        app,
        config.host,
        config.port,
        access_log=False,
        server_header=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
        ssl_ca_certs=config.client_ca or None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if config.client_ca else ssl.CERT_NONE,
    )
    try:
        settings.load()
    except OSError as error:  # an SSLError is one
        names = "--tls-cert, --tls-key or --client-ca"
        raise UserError(f"{names} cannot be read as PEM ({error})") from None
    return settings


def open_socket(host: str, port: int) -> socket.socket:
    """Listen at an address. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        found = f"cannot listen on {host} port {port} ({error})"
        raise UserError(f"{found}; stop the program there, or give another --port") from None
    # Connections inherit this. Without it, a body waits 40 ms for the receipt of its header.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(config: Config, listener: socket.socket) -> str:
    """Write the service's URL. The port is the listener's, as --port 0 takes any free one."""
    scheme = "https" if config.tls_cert else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
