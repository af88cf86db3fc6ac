"""The web server around the application: its address, TLS, and an orderly stop."""

import asyncio
import signal
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import Any

import fastapi
import uvicorn

from serving.api_keys import read_keys
from serving.config import Config
from serving.connections import KEEP_ALIVE_S, Listener, Protocol
from serving.monitoring import log_event
from serving.service import Service
from utils import UserError

QUEUE = 2048  # connections that the kernel holds until they are accepted
ACCEPTED_AT_ONCE = 16  # then those that are open get their turn
RELOAD_TICKS = 50  # between two looks at keys and certificate; uvicorn's tick takes 0.1 s


class Server(uvicorn.Server):
    """Uvicorn that answers "not ready" for a while before it refuses connections."""

    def __init__(self, settings: uvicorn.Config, service: Service) -> None:
        super().__init__(settings)
        self.service = service
        self.is_ctrl_c = False
        self.stamps = self._read_stamps()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note whether a person stops the service."""
        self.is_ctrl_c = sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        """Start. The event loop has made the kernel's queue as short as its own turns."""
        await super().startup(sockets)
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        for listener in sockets or []:
            listener.listen(QUEUE)

    async def on_tick(self, counter: int) -> bool:
        """Look from time to time whether keys or certificates have changed."""
        if counter % RELOAD_TICKS == 0 and self._read_stamps() != self.stamps:
            self.reload()
        return await super().on_tick(counter)

    def reload(self) -> None:
        """Read keys, certificate and models again. What is bad is told, and changes nothing."""
        config, self.stamps = self.service.config, self._read_stamps()
        try:
            known = read_keys(Path(config.keys)) if config.keys else []
            if self.config.ssl:
                pair = config.tls_cert, config.tls_key
                ssl.create_default_context().load_cert_chain(*pair)  # raises for what does not fit
                self.config.ssl.load_cert_chain(*pair)
            if self.service.keys:
                self.service.keys.known = known
        except (OSError, UserError) as error:
            log_event(event="keys and certificate stay as they were", error=str(error))
        else:
            log_event(event="keys and certificate were read again")
        asyncio.get_running_loop().run_in_executor(None, self.reload_models)

    def reload_models(self) -> None:
        """Look into the folder of models again. What is bad is told, and changes nothing."""
        repository = self.service.repository
        try:
            repository.reload()
        except Exception as error:  # of any kind: those that are served go on
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
            log_event(event="models stay as they were", error=reason)
        else:
            titles = [one.title for one in repository.served.values()]
            log_event(event="models were looked at again", models=titles)

    def _read_stamps(self) -> list[float]:
        """Read when keys and certificate were last changed; 0 for what is missing."""
        config, stamps = self.service.config, []
        for name in filter(None, (config.keys, config.tls_cert, config.tls_key)):
            try:
                stamps.append(Path(name).stat().st_mtime)
            except OSError:
                stamps.append(0.0)
        return stamps

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop. Load balancers see it at /readyz first; running requests are finished."""
        print("stopping; running requests are finished first", flush=True)
        self.service.ready = False
        await self.service.stop_jobs()
        if not self.is_ctrl_c:
            await asyncio.sleep(self.service.config.drain_s)
        await super().shutdown(sockets)


def server_settings(app: fastapi.FastAPI, config: Config, listener: Listener) -> uvicorn.Config:
    """Make uvicorn's settings and load the TLS files. Raises UserError."""
    settings = uvicorn.Config(
        app,
        http=partial(Protocol, listener),
        loop="asyncio",  # others accept connections without asking the listener
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        access_log=False,
        proxy_headers=False,  # a client could choose its address
        server_header=False,
        log_level="error",
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


def open_socket(host: str, port: int) -> Listener:
    """Listen at an address. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        plain = socket.create_server((host, port), family=family, backlog=QUEUE)
    except (OSError, OverflowError) as error:
        found = f"cannot listen on {host} port {port} ({error})"
        raise UserError(f"{found}; stop the program there, or give another --port") from None
    # Connections inherit this. Without it, a body waits 40 ms for the receipt of its header.
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Listener(family, plain.detach())


def address(config: Config, listener: socket.socket) -> str:
    """Write the service's URL. The port is the listener's, as --port 0 takes any free one."""
    scheme = "https" if config.tls_cert else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
