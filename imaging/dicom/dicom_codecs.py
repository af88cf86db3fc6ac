"""Decode compressed DICOM frames with imagecodecs, as a plugin of pydicom.

pydicom asks this module for `DECODER_DEPENDENCIES`, `is_available` and `decode_frame`, see
https://pydicom.github.io/pydicom/stable/guides/plugin_table.html.
"""

from functools import cache
from typing import Any

import numpy as np

PLUGIN = "imagecodecs"
JPEG_COLOURS = {"RGB": "RGB", "YBR_FULL": "YCBCR", "YBR_FULL_422": "YCBCR"}
# A JPEG 2000 codestream begins with these two markers. Some files wrap it in a JP2 file.
JPEG2000_START = b"\xff\x4f\xff\x51"

DECODER_DEPENDENCIES: dict[str, tuple[str, ...]] = {}


def is_available(uid: str) -> bool:
    """Say that the plugin can be used: imagecodecs is always installed."""
    return True


@cache
def register() -> tuple[str, ...]:
    """Add the plugin to pydicom; return the transfer syntaxes that it decodes."""
    from pydicom import uid
    from pydicom.pixels import get_decoder

    syntaxes = (
        *uid.JPEGTransferSyntaxes,
        *uid.JPEGLSTransferSyntaxes,
        uid.JPEG2000Lossless,
        uid.JPEG2000,
    )
    for syntax in syntaxes:
        decoder = get_decoder(syntax)
        if PLUGIN not in decoder.available_plugins:
            decoder.add_plugin(PLUGIN, (__name__, "decode_frame"))
    return syntaxes


def decode_frame(src: bytes, runner: Any) -> bytearray:
    """Decode one frame that is JPEG, JPEG-LS or JPEG 2000; `runner` has the file's metadata."""
    import imagecodecs
    from pydicom import uid

    samples = runner.samples_per_pixel
    shape = (runner.rows, runner.columns) + ((samples,) if samples > 1 else ())
    out = np.empty(shape, f"u{max(1, runner.bits_allocated // 8)}")
    if runner.transfer_syntax in uid.JPEGLSTransferSyntaxes:
        imagecodecs.jpegls_decode(src, out=out)
    elif runner.transfer_syntax in uid.JPEG2000TransferSyntaxes:
        check_jpeg2000(src, out.shape[:2], samples)
        out[...] = imagecodecs.jpeg2k_decode(src)
    else:
        colours = JPEG_COLOURS.get(runner.photometric_interpretation) if samples > 1 else None
        decoded = "RGB" if colours else None
        imagecodecs.jpeg_decode(src, colorspace=colours, outcolorspace=decoded, out=out)
    if samples > 1:
        runner.set_option("photometric_interpretation", "RGB")
        runner.set_option("planar_configuration", 0)
    return bytearray(out.tobytes())


def check_jpeg2000(src: bytes, shape: tuple[int, int], samples: int) -> None:
    """Raise ValueError if a codestream declares another size or number of colours than its file."""
    start = max(0, src.find(JPEG2000_START))

    def read_int(offset: int, length: int) -> int:
        return int.from_bytes(src[start + offset : start + offset + length])

    # Offsets of the SIZ marker (ISO/IEC 15444-1, A.5.1): width, height, components.
    size = read_int(12, 4), read_int(8, 4)
    components = read_int(40, 2)
    if size != shape or components != samples:
        raise ValueError(
            f"a frame of {size} pixels and {components} colours in a file of {shape} pixels "
            f"and {samples} colours"
        )
