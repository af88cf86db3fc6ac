"""The settings of the service. Each field of `Config` is a flag of `serve.py`."""

import ipaddress
import re
from dataclasses import dataclass

from utils import UserError

# Under these a single model is served.
MODEL = "unet"
VERSION = "1"

# As a browser sends it: no path, no slash at the end.
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]+)?|https?://\[[0-9a-f:]+\](:[0-9]+)?")

POSITIVE = (
    "max_body_mb",
    "max_megapixels",
    "max_slices",
    "workers",
    "max_batch",
    "max_concurrent_requests",
    "timeout_s",
    "volume_timeout_s",
    "job_keep_s",
)


@dataclass(frozen=True)
class Config:
    """How the service runs."""

    # The exported model; manifest.json lies beside it. Or a folder of models and their versions:
    # NAME/VERSION/unet.onnx, and aliases.json; also in a bucket, s3://bucket/models.
    model: str = "export/unet.onnx"
    merge: str = ""  # shows all classes of the model as one of this name: lungs

    # ---- address and access
    host: str = "127.0.0.1"  # another address needs --keys and TLS, or --insecure
    port: int = 8080
    # File of API keys, a line each: SHA-256 in hex, name, and rights (segment, metrics; without any
    # it may segment).
    keys: str = ""
    tls_cert: str = ""  # PEM file; with --tls-key the service speaks HTTPS
    tls_key: str = ""  # PEM file
    client_ca: str = ""  # PEM file; only clients with a certificate of this authority may connect
    insecure: bool = False  # needs neither keys nor TLS; only behind a proxy that has both
    # Web pages of these origins may call the service (CORS), separated by commas, such as
    # https://viewer.example. "*" allows all.
    cors_origin: str = ""

    # ---- limits
    max_body_mb: float = 64  # size of a request, in MiB
    # Size of an image, in 2**20 pixels. A model with several classes takes fewer.
    max_megapixels: float = 32
    max_slices: int = 512  # of a volume
    # Processes that decode images and write masks. Each uses up to 32 bytes per pixel.
    workers: int = 2
    max_batch: int = 8  # images in one tensor request
    # Further requests are answered with status 503; one client may have three quarters of them.
    max_concurrent_requests: int = 64
    timeout_s: float = 30  # time for one request; then it is answered with status 504
    volume_timeout_s: float = 300  # time for a volume

    # Of jobs (/v1/jobs), images and masks until they expire: a file, or the URL of a PostgreSQL for
    # replicas on several machines, postgresql://USER@HOST/DATABASE; "" has no jobs.
    jobs: str = ""
    job_keep_s: float = 3600  # time for which a finished job is kept

    drain_s: float = 5  # seconds from SIGTERM until connections are refused; /readyz says 503

    # ---- inference
    threads: int = 0  # of the network; 0 uses all cores
    # auto, onnxruntime, openvino or cuda. auto is openvino if it may compute in bfloat16.
    engine: str = "auto"
    # auto, float32, bfloat16 or int8. auto is bfloat16 if OpenVINO, the CPU and the manifest allow.
    precision: str = "auto"


def check_config(config: Config) -> None:
    """Raise UserError for settings that are unsafe or cannot work."""
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            raise UserError(f"{name} is {getattr(config, name)}; expected above 0")
    for name in ("threads", "drain_s"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} is {getattr(config, name)}; expected 0 or more")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise UserError("one of --tls-cert and --tls-key is missing; give both")
    if config.client_ca and not config.tls_cert:
        raise UserError("--client-ca needs TLS; give --tls-cert and --tls-key too")
    parse_origins(config.cors_origin)
    is_protected = config.keys and config.tls_cert
    if not (is_loopback(config.host) or is_protected or config.insecure):
        cure = "give --keys and --tls-cert, or --insecure behind a proxy"
        raise UserError(f"host {config.host} is open to other machines; {cure}")


def parse_origins(text: str) -> list[str]:
    """Read the origins that --cors-origin lists. Raises UserError."""
    origins = [origin.strip() for origin in text.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            found = f"cors_origin has {origin!r}"
            raise UserError(f"{found}; expected a scheme and a host: https://viewer.example")
    return origins


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
