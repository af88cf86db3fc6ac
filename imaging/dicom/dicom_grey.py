"""Grey levels of DICOM files: rescaled, padding kept out, the window or curve that is proposed.

DICOM PS3.3: C.7.5.1.1.2 (padding), C.11.1 (modality LUT), C.11.2 (VOI LUT and windows).
"""

from typing import Any, NamedTuple

import numpy as np

from imaging.dicom.dicom_elements import look_up, places, read_numbers

# Padding takes the place of this percentile of the other pixels, that of `preprocess.PERCENTILES`:
# so it does not move the grey levels that become 0 and 1.
PADDING_PERCENTILE = 0.5
# Less than air has, by far. A few such pixels are artefacts of metal.
LEAST_HU = -1500
MIN_SHARE = 0.001
# A curve is used from and to these shares of its height.
CURVE_ENDS = (0.005, 0.995)
SIGMOID_POINTS = np.linspace(-2.5, 2.5, 201)


class Proposal(NamedTuple):
    """How a file proposes to show its grey levels."""

    # Centre and width.
    window: tuple[float, float] | None = None
    # Grey levels (N,), ascending, and their brightness (N,) from 0 to 1.
    curve: tuple[np.ndarray, np.ndarray] | None = None

    def mirrored(self, total: float) -> "Proposal":
        """Turn it for grey levels that are inverted: each becomes `total` less itself."""
        window, curve = self.window, self.curve
        if window:
            window = (total - window[0], window[1])
        if curve:
            curve = (total - curve[0][::-1], 1 - curve[1][::-1])
        return Proposal(window, curve)


def to_grey(
    stored: np.ndarray, header: Any, first: Any = None
) -> tuple[np.ndarray, Proposal, tuple[str, ...]]:
    """Turn stored values (F, H, W, 1) into grey levels, more is brighter, float32.

    first: header of the series' first slice. Slices may have slopes of their own, as in PET, and
    all are inverted like the first. Returns also what the file proposes to show, and notes.
    """
    padding, notes = _find_padding(stored, header)
    levels = rescale(stored, header)
    if padding is None:
        padding, notes = _find_nothing(levels, header)
    proposal = _propose(header)
    if is_inverted(header):
        # Low is white, as on film: lowest and highest level change places.
        total = _sum_of_extremes(header if first is None else first)
        np.subtract(total, levels, out=levels)
        proposal = proposal.mirrored(total)
    if padding is not None:
        valid = levels[~padding]
        # A slice of nothing but padding takes its level from the others of its series.
        fill = np.percentile(valid, PADDING_PERCENTILE, method="nearest") if valid.size else np.nan
        levels[padding] = fill
    return levels, proposal, notes


def fill_empty_slices(pixels: np.ndarray) -> None:
    """Give slices (S, H, W, 1) of nothing but padding the lowest level of the others, or 0."""
    if pixels.dtype.kind != "f":
        return
    empty = np.isnan(pixels[:, 0, 0, 0])
    empty[empty] = [np.isnan(one).all() for one in pixels[empty]]
    if empty.any():
        pixels[empty] = 0 if empty.all() else pixels[~empty].min()


def is_inverted(header: Any) -> bool:
    """Say whether low levels are to be shown white."""
    shape = str(header.get("PresentationLUTShape") or "")
    return header.get("PhotometricInterpretation") == "MONOCHROME1" or shape == "INVERSE"


def _find_padding(stored: np.ndarray, header: Any) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Find the pixels outside of what was scanned; None if there are none."""
    prefix = {"f4": "Float", "f8": "DoubleFloat"}.get(stored.dtype.str[1:], "")
    values = read_numbers(header, f"{prefix}PixelPaddingValue")
    if not values:
        return None, ()
    limits = read_numbers(header, f"{prefix}PixelPaddingRangeLimit") or values
    ends = sorted(_as_stored(value, stored.dtype) for value in (values[0], limits[0]))
    padding = (stored >= ends[0]) & (stored <= ends[1])
    if not padding.any():
        return None, ()
    return padding, ("its padding (PixelPaddingValue) is kept out of the grey levels",)


def _find_nothing(levels: np.ndarray, header: Any) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Find padding that a CT does not declare: much that is thinner than air."""
    if header.get("Modality") != "CT" or str(header.get("RescaleType") or "HU") != "HU":
        return None, ()
    nothing = levels < LEAST_HU
    if nothing.mean() < MIN_SHARE:
        return None, ()
    return nothing, (f"levels below {LEAST_HU} HU are taken for padding: air has -1000",)


def _as_stored(value: float, dtype: np.dtype) -> float:
    """Read a number as the pixels are stored: many files write -2000 as 63536."""
    if dtype.kind not in "iu":
        return value
    bits = 8 * dtype.itemsize
    value = int(value) % (1 << bits)
    return value - (1 << bits) if dtype.kind == "i" and value >= 1 << bits - 1 else value


def rescale(stored: np.ndarray, header: Any) -> np.ndarray:
    """Turn stored grey levels (F, H, W, 1) into those of the modality, float32: of CT into HU."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return np.array(apply_modality_lut(stored, header), np.float32)
    frames = range(len(stored))
    slopes = [(look_up(header, "RescaleSlope", i) or (1,))[0] for i in frames]
    intercepts = [(look_up(header, "RescaleIntercept", i) or (0,))[0] for i in frames]
    levels = stored.astype(np.float32)
    # In place, because volumes are large.
    levels *= np.float32(slopes)[:, None, None, None]
    levels += np.float32(intercepts)[:, None, None, None]
    return levels


def _sum_of_extremes(header: Any) -> float:
    """Add the lowest and the highest grey level that the file can store, rescaled."""
    bits = int(header.BitsStored)
    lowest = -int(header.PixelRepresentation) << bits - 1
    extremes = np.array([lowest, lowest + (1 << bits) - 1]).reshape(1, 1, 2, 1)
    return float(rescale(extremes, header).sum())


# ---------------------------------------------------------------------------------------- proposal


def _propose(header: Any) -> Proposal:
    """Read the first window that the file proposes, else the first VOI LUT."""
    centre, width = look_up(header, "WindowCenter"), look_up(header, "WindowWidth")
    if centre and width and width[0] > 0:
        window = (centre[0], width[0])
        function = next((p.VOILUTFunction for p in places(header, 0) if "VOILUTFunction" in p), "")
        if function != "SIGMOID":
            return Proposal(window)
        # C.11.2.1.3.1
        levels = centre[0] + width[0] * SIGMOID_POINTS
        return Proposal(window, (levels, 1 / (1 + np.exp(-4 * SIGMOID_POINTS))))
    curve = _read_lut(header)
    return Proposal(_window_of(curve), curve) if curve else Proposal()


def _read_lut(header: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Read the first VOI LUT as a curve; None if there is none that can be used."""
    luts = next((p.VOILUTSequence for p in places(header, 0) if p.get("VOILUTSequence")), None)
    if not luts:
        return None
    descriptor = read_numbers(luts[0], "LUTDescriptor")
    outputs = _lut_outputs(luts[0], header)
    if len(descriptor) != 3 or len(outputs) < 2 or np.ptp(outputs) == 0:
        return None
    count, first = int(descriptor[0]) or 2**16, int(descriptor[1])
    if int(header.get("PixelRepresentation") or 0) and first >= 2**15:
        first -= 2**16
    outputs = outputs[:count]
    return first + np.arange(len(outputs), dtype=np.float64), outputs / outputs.max()


def _lut_outputs(lut: Any, header: Any) -> np.ndarray:
    """Read a table's outputs: float64 (N,), at least 0."""
    data, descriptor = lut.get("LUTData"), read_numbers(lut, "LUTDescriptor")
    if isinstance(data, bytes):
        one_byte = descriptor and len(data) <= (int(descriptor[0]) or 2**16) + 1
        order = "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"
        return np.frombuffer(data, np.uint8 if one_byte else f"{order}u2").astype(np.float64)
    return np.atleast_1d(np.float64(data if data is not None else [])) % 2**16


def _window_of(curve: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Give the window in which a curve rises."""
    levels, brightness = curve
    low, high = brightness.min() + np.array(CURVE_ENDS) * np.ptp(brightness)
    inside = levels[(brightness > low) & (brightness < high)]
    if len(inside) < 2:
        inside = levels
    return (float(inside[0] + inside[-1]) / 2, float(np.ptp(inside)) or 1.0)
