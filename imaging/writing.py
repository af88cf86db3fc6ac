"""Write masks and probabilities: in the format of their image, or in another."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imaging import formats
from imaging.formats import DICOM, NIFTI, PNG, TIFF, ZIPPED_DICOM, Format
from imaging.labels import Classes, plane
from imaging.scan import Mask, Scan
from utils import UserError, atomic


class Written(NamedTuple):
    """A mask's file, and why it is of another format than was asked for."""

    path: Path
    note: str = ""


def write_mask(
    path: str | Path,
    ids: np.ndarray,
    names: Sequence[str],
    image: Scan,
    levels: Sequence[int] = (),
    kind: str = "",
) -> Written:
    """Write a mask in the format of its image, or as `kind` says, one of formats.KINDS.

    path: without an ending. ids: class ids (S, H, W). levels: the values of background and classes
    in the file; none means 0, 1, 2 …, and 255 for a single class in a picture. Where a format
    cannot be made, the mask is NIfTI if the image's place is known, else PNG, else TIFF, and a note
    says why.
    """
    mask = Mask(ids, names, levels)
    wanted = formats.KINDS[kind] if kind else _own_format(image, len(ids))
    note = ""
    for form in (wanted, _plain_format(image, len(ids)), TIFF):
        try:
            content = _encode_mask(form, mask, image)
        except UserError as error:
            note = str(error)
            continue
        place = _write(f"{path}{form.mask_suffix}", content)
        return Written(place, f"{note}; its mask is {place.name} instead" if note else "")
    raise UserError(note)


def write_masks(
    folder: Path, name: str, mask: np.ndarray, classes: Classes, image: Scan, kind: str = ""
) -> list[Written]:
    """Write a mask (S, H, W) as `write_mask` does; classes that overlap get a folder each.

    The folders are those of the layout masks/CLASS/. name: without an ending. Raises UserError.
    """
    if not classes.overlap:
        return [write_mask(folder / name, mask, classes.names, image, classes.levels, kind)]
    places = []
    for class_id, one in enumerate(classes.names, 1):
        ids = plane(mask, class_id).astype(np.uint8)
        places.append(write_mask(folder / one / name, ids, [one], image, (), kind))
    return places


def write_probabilities(
    path: str | Path, probs: np.ndarray, names: Sequence[str], image: Scan
) -> list[Path]:
    """Write a float32 file per class: `path`_prob_CLASS, in kind, NIfTI or TIFF; return the files.

    path: without an ending. probs: (S, H, W, K) in [0, 1]; K may have the background first.
    """
    form = _own_format(image, len(probs))
    if form.encode_floats is None:
        form = NIFTI if image.affine is not None else TIFF
    places: list[Path] = []
    words: list[str] = []
    for name, shares in zip(names, np.moveaxis(probs[..., -len(names) :], -1, 0), strict=True):
        word = re.sub(r"[^\w-]+", "_", name)
        # "a b" and "a/b" must not overwrite each other.
        words.append(f"{word}_{len(words) + 1}" if word in words else word)
        word = words[-1]
        content = form.encode_floats(np.float32(shares), image)
        places.append(_write(f"{path}_prob_{word}{form.mask_suffix}", content))
    return places


def _encode_mask(form: Format, mask: Mask, image: Scan) -> bytes:
    """Encode a mask in a format. Raises UserError where that cannot be."""
    if form is DICOM and image.format not in (DICOM.name, ZIPPED_DICOM.name):
        raise UserError("not DICOM, so no DICOM segmentation can refer to it")
    if form is PNG and len(mask.ids) > 1:
        raise UserError(f"{len(mask.ids)} slices, and a PNG holds one")
    return form.encode_mask(mask, image)


def _own_format(image: Scan, num_slices: int) -> Format:
    """Choose the format of an image's mask: its own, else a plain one."""
    for form in formats.FORMATS:
        if form.name == image.format and form.encode_mask:
            return form
    return TIFF if num_slices > 1 else PNG


def _plain_format(image: Scan, num_slices: int) -> Format:
    """Choose a format that any image's mask can be written in."""
    if image.affine is not None:
        return NIFTI
    return TIFF if num_slices > 1 else PNG


def _write(path: str, content: bytes) -> Path:
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)
