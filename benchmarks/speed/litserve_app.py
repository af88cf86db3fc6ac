"""The same network behind LitServe: what serve.py is measured beside, too.

    MODEL=files/lungs/unet.onnx THREADS=1 python -m benchmarks.speed.litserve_app --port 8000

It needs `pip install litserve`. There is a worker process for each core, so one thread suits each.
"""

import argparse
import os

import fastapi
import litserve

from benchmarks.speed.minimal_app import segment


class Segmentation(litserve.LitAPI):
    """Segment a grey picture of one class: the field "image" of a form, to PNG."""

    def setup(self, device: str) -> None:
        """Load nothing: `minimal_app` opens the network when it is imported."""

    def decode_request(self, request: fastapi.Request) -> bytes:
        """Take the file out of the form."""
        return request["image"].file.read()

    def predict(self, content: bytes) -> bytes:
        """Return the mask of a picture."""
        return segment(content)

    def encode_response(self, mask: bytes) -> fastapi.Response:
        """Send it as it is."""
        return fastapi.Response(mask, media_type="image/png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    server = litserve.LitServer(
        Segmentation(api_path="/v1/segment"),
        accelerator="cpu",
        workers_per_device=os.cpu_count(),
        healthcheck_path="/readyz",
    )
    port = parser.parse_args().port
    server.run(port=port, host="127.0.0.1", log_level="error", generate_client_file=False)
