"""Ask a running service for masks whose result is known: `python -m serving.smoke URL`.

Sends the phantoms of files/lungs/reference/ and compares the answers with the masks there. Says
which model answers, how fast, and ends with exit code 1 if a mask is another one. SSL_CERT_FILE
names the certificate of a service that signed its own.
"""

import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro

import utils
from utils import UserError

MASK = "_mask.png"


@dataclass(frozen=True)
class Config:
    """What is asked, and how."""

    url: tyro.conf.Positional[str] = "http://127.0.0.1:8080"  # of the service
    key: str = ""  # file with the API key itself
    # Images, and beside each its mask as this model finds it: a.png and a_mask.png.
    reference: str = "files/lungs/reference"
    min_dice: float = 0.99  # between the mask that comes and the one that is expected
    timeout_s: float = 30  # for one answer


def smoke(config: Config) -> int:
    """Ask for every mask and print a table. Returns the exit code. Raises UserError."""
    images = find_images(Path(utils.find_default(config.reference)))
    headers = {}
    if config.key:
        headers["X-API-Key"] = Path(config.key).read_text().strip()
    _, answer = ask(config, "/v1/model", headers)
    model = json.loads(answer)
    print(
        f"{config.url} serves {model['name']} {model['version']}, {model['sha256'][:12]}…, ", end=""
    )
    print(f"by {model['engine']} in {model['precision']}")
    bad = 0
    for path in images:
        expected = cv2.imread(str(path.with_name(path.stem + MASK)), cv2.IMREAD_UNCHANGED)
        seconds, answer = ask(config, "/v1/segment", headers, path.read_bytes())
        found = cv2.imdecode(np.frombuffer(answer, np.uint8), cv2.IMREAD_UNCHANGED)
        dice = mask_dice(found, expected)
        is_good = dice >= config.min_dice
        bad += not is_good
        word = "" if is_good else f", expected at least {config.min_dice}"
        print(f"{path.name:24} Dice {dice:.4f}{word}  {1000 * seconds:.0f} ms")
    print(f"{len(images) - bad} of {len(images)} masks are as expected")
    return int(bad > 0)


def find_images(folder: Path) -> list[Path]:
    """List the images that have a mask beside them. Raises UserError if there is none."""
    masks = sorted(folder.glob("*" + MASK))
    images = [mask.with_name(mask.name.removesuffix(MASK) + ".png") for mask in masks]
    images = [image for image in images if image.exists()]
    if not images:
        raise UserError(f"{folder} has no image with its mask; expected a.png and a{MASK}")
    return images


def ask(
    config: Config, path: str, headers: dict[str, str], content: bytes | None = None
) -> tuple[float, bytes]:
    """Send a request: seconds and the answer. Raises UserError for another answer than 200."""
    url = config.url.rstrip("/") + path
    headers = headers | ({"Content-Type": "image/png", "Accept": "image/png"} if content else {})
    request, start = urllib.request.Request(url, content, headers), time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=config.timeout_s) as answer:
            return time.monotonic() - start, answer.read()
    except urllib.error.HTTPError as error:
        detail = problem_detail(error.read())
        raise UserError(f"{url} answered {error.code}: {detail}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url} does not answer ({error}); is the service running?") from None


def problem_detail(body: bytes) -> str:
    """Read what went wrong from an answer."""
    try:
        problem: Any = json.loads(body)
        return str(problem.get("detail", problem))
    except (ValueError, AttributeError):
        return body[:100].decode("latin-1")


def mask_dice(found: np.ndarray | None, expected: np.ndarray) -> float:
    """Compute the Dice of two masks, over all classes; 0 if the answer is no such mask."""
    if found is None or found.shape != expected.shape:
        return 0.0
    either = (found > 0).sum() + (expected > 0).sum()
    return float(2 * ((found == expected) & (found > 0)).sum() / either) if either else 1.0


if __name__ == "__main__":
    utils.run_script(lambda config: sys.exit(smoke(config)), Config, description=__doc__)
