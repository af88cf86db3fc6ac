"""What `serve.py` is made of: no file here imports Keras or TensorFlow."""

import logging
import warnings


def quiet() -> None:
    """Silence libraries whose warnings quote what stands in a file."""
    warnings.simplefilter("ignore")
    for name in ("pydicom", "nibabel", "highdicom", "tifffile"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
