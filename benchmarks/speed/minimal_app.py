"""The least that serves a network by FastAPI and ONNX Runtime: what serve.py is measured beside.

No keys, no limits, no other formats, nothing is checked. MODEL names the ONNX file, THREADS says
how many compute an image (all cores).
"""

import os

import cv2
import fastapi
import numpy as np
import onnxruntime
from starlette.concurrency import run_in_threadpool

app = fastapi.FastAPI()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("THREADS", "0"))
session = onnxruntime.InferenceSession(os.environ["MODEL"], options, ["CPUExecutionProvider"])
name, (_, height, width, _) = session.get_inputs()[0].name, session.get_inputs()[0].shape


def segment(content: bytes) -> bytes:
    """Segment a grey picture of one class: PNG to PNG."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    low, high = np.percentile(small, (0.5, 99.5))
    prepared = np.clip((small - low) / (high - low), 0, 1).astype(np.float32)
    probs = session.run(["probabilities"], {name: prepared[None, ..., None]})[0][0, ..., 0]
    mask = np.uint8(255) * (cv2.resize(probs, image.shape[::-1]) >= 0.5)
    return cv2.imencode(".png", mask)[1].tobytes()


@app.get("/readyz")
def ready() -> dict[str, bool]:
    """Say that it answers."""
    return {"ready": True}


@app.post("/v1/segment")
async def answer(request: fastapi.Request) -> fastapi.Response:
    """Return the mask of a picture."""
    mask = await run_in_threadpool(segment, await request.body())
    return fastapi.Response(mask, media_type="image/png")
