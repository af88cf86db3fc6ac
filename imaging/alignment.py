"""Decode DICOM, NIfTI and TIFF stacks, and write masks back in kind. `images.py` comes here for such files.

A NIfTI volume is turned so that its slices are those of the acquisition (across its coarsest axis, else axial) and
stand as radiologists look at them; its mask is turned back. A DICOM series is a folder of files, a slice each.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from imaging import dicom, nifti
from utils import UserError


def check_affines(image: Sequence[bytes], mask: bytes) -> None:
    """Raise UserError if a NIfTI mask lies elsewhere in the patient than its image, a NIfTI file or DICOM files."""
    opened = nifti.open_nifti(mask)
    if image[0][128:132] == b"DICM":
        headers = [dicom.read_header(content) for content in image]
        place = dicom.dicom_affine(
            [headers[i] for i in dicom.sort_series(headers)[0]] if len(headers) > 1 else headers
        )
    else:
        place = nifti.nifti_affine(nifti.open_nifti(image[0]))
    if place is None:
        return
    axis = nifti.reorientation(opened)[0]
    shape = np.array((*opened.shape, 1)[:3])[np.argsort(nifti.reorientation(opened)[1][:, 0])][
        list(nifti.SLICE_AXES[axis])
    ]
    corners = np.array(
        [(*corner, 1) for corner in itertools.product(*((0, side - 1) for side in shape))]
    ).T
    apart = np.linalg.norm(
        (place @ corners - nifti.nifti_affine(opened) @ corners)[:3], axis=0
    ).max()
    if apart > 0.5 * np.linalg.norm(place[:3, :3], axis=0).min():
        raise UserError(
            f"its affine puts it elsewhere than its image, up to {apart:.3g} mm off; expected the same place"
        )
