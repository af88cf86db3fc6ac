"""Read, prepare, restore and draw one image or mask: the only preprocessing, shared by training, prediction, serving.

Preparing keeps the aspect ratio: an image is scaled to fit the network's input, its intensities are stretched between
two percentiles (so 8-bit, 16-bit, dark and bright files look alike), and the rest of the input is padded with zeros.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from imaging import dicom, dicom_seg, nifti, pictures, tiff
from imaging.alignment import check_affines
from imaging.files import is_dicom, is_nifti, is_series, name_file_in_errors, read_bytes
from imaging.scan import MIN_SIDE, Scan
from utils import UserError


def decode_scan(data: bytes) -> Scan:
    """Decode an image file of any supported format, told by its content, not by its name.

    Raises UserError for anything unreadable, truncated, not finite, smaller than MIN_SIDE or larger than MAX_BYTES.
    """
    if (
        data[:2] in (b"II", b"MM")
        or data[128:132] == b"DICM"
        or data[:2] == b"\x1f\x8b"
        or data[344:348] == b"n+1\0"
    ):
        scan = decode_medical(data)
    else:
        scan = Scan(pictures.decode_picture(data)[None])
    height, width, channels = scan.pixels.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{height}x{width} pixels; expected at least {MIN_SIDE}x{MIN_SIDE}")
    if channels not in (1, 3, 4):
        raise UserError(f"{channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    kind = scan.pixels.dtype.kind
    if kind not in "buif" or (kind == "f" and not np.isfinite(scan.pixels).all()):
        raise UserError("NaN or infinite pixels; expected finite numbers")
    return scan


def decode_image(data: bytes) -> np.ndarray:
    """Decode a file that holds one image: (H, W, C) as stored, see `decode_scan`. Raises UserError."""
    pixels = decode_scan(data).pixels
    if len(pixels) > 1:
        raise UserError(f"{len(pixels)} pages or slices; expected one image")
    return pixels[0]


def read_image(path: str | Path) -> np.ndarray:
    """Read a file of one image, see `decode`. Raises UserError, its message without the path."""
    return decode_image(read_bytes(path))


def read_scan(path: str | Path, window: str = "") -> Scan:
    """Read an image file, or a folder that holds a DICOM series, for `window`, see `prepare_scan`.

    Raises UserError, its message without the path.
    """
    if Path(path).is_dir():
        files = dicom.series_files(path)
        scan = dicom.decode_series(
            [read_bytes(file) for file in files], [file.name for file in files]
        )
    else:
        scan = decode_scan(read_bytes(path))
    if window == "file" and scan.window is None:
        raise UserError(
            "its header proposes no window; expected one, or --window centre,width or percentiles"
        )
    return scan


def source_bytes(path: str | Path) -> list[bytes]:
    """Read the file, or the files of a folder that holds a DICOM series."""

    return [
        read_bytes(file) for file in (dicom.series_files(path) if Path(path).is_dir() else [path])
    ]


def holds_one_volume(folder: Path) -> bool:
    """Tell a folder whose DICOM files are the slices of one series, not images of their own. Raises UserError."""

    return is_series(folder) and dicom.is_one_volume(dicom.series_files(folder))


def check_alignment(image: str | Path, mask: str | Path) -> None:
    """Raise UserError if a NIfTI mask lies elsewhere in the patient than its image, NIfTI or DICOM."""
    if is_nifti(mask) and (Path(image).is_dir() or is_nifti(image) or is_dicom(image)):
        check_affines(source_bytes(image), read_bytes(mask))


def read_mask_scan(
    path: str | Path, source: str | Path = "", names: Sequence[str] = ()
) -> np.ndarray:
    """Read a mask file: (S, H, W), its values as stored. A colour file needs equal channels, else UserError.

    source, names: the image and the classes, which a DICOM segmentation refers to; it gives class ids.
    """
    if source and Path(path).suffix.lower() == ".dcm":
        content = read_bytes(path)
        if dicom_seg.is_seg(content):
            return dicom_seg.decode_seg(content, source_bytes(source), names)
    mask = read_scan(path).pixels
    if mask.shape[-1] == 4 and np.ptp(mask[..., 3]) > 0:
        raise UserError(
            "its alpha channel varies; expected a mask without one, its values in the picture itself"
        )
    mask = mask[..., :3]
    if mask.shape[-1] == 3 and not (mask == mask[..., :1]).all():
        raise UserError("a colour picture; expected a mask with one value per pixel")
    return mask[..., 0]


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask file of one image: (H, W), see `read_mask_scan`. Raises UserError."""
    mask = read_mask_scan(path)
    if len(mask) > 1:
        raise UserError(f"{len(mask)} pages or slices; expected one mask")
    return mask[0]


def write_mask(
    path: str | Path,
    ids: np.ndarray,
    names: Sequence[str],
    source: str | Path,
    levels: Sequence[int] = (),
) -> Path:
    """Write class ids (S, H, W) of `source` (see `read_scan`) in its own kind; return the file.

    path: without an ending; NIfTI gets NIfTI with the same affine, DICOM a segmentation object that refers to it, TIFF
    TIFF, anything else PNG. levels: each class's value there, if not 1, 2 …; pictures of one class have 255. Raises
    UserError where a DICOM header lacks what a segmentation must tell; the mask is then a TIFF.
    """
    levels = list(levels) or list(range(1, len(names) + 1))
    valued = np.array([0, *levels], np.uint8 if max(levels) < 256 else np.uint16)[ids.astype(int)]
    pages = list(np.uint8(255) * ids.astype(np.uint8) if levels == [1] else valued)
    if Path(source).is_dir() or is_dicom(source):
        try:
            dicom_seg.write_seg(Path(f"{path}.dcm"), ids, names, source_bytes(source))
        except UserError as error:
            pictures.write_pages(Path(f"{path}.tif"), pages)
            raise UserError(f"{error}; its mask is {path}.tif instead") from None
        return Path(f"{path}.dcm")
    if is_nifti(source):
        nifti.write_nifti(Path(f"{path}.nii.gz"), valued, read_bytes(source))
        return Path(f"{path}.nii.gz")
    return pictures.write_pages(
        Path(f"{path}.tif" if Path(source).suffix.lower() in (".tif", ".tiff") else f"{path}.png"),
        pages,
    )


def decode_medical(content: bytes) -> Scan:
    """Decode a DICOM, NIfTI or TIFF file. Raises UserError."""
    if content[128:132] == b"DICM":
        return dicom.decode_dicom(content)
    return (
        tiff.decode_tiff(content) if content[:2] in (b"II", b"MM") else nifti.decode_nifti(content)
    )


def read_named_scan(path: Path, window: str = "") -> Scan:
    """Read an image for `window`, see `images.prepare_scan`. Raises UserError naming the file."""
    return name_file_in_errors(path, lambda path: read_scan(path, window))
