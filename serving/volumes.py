"""Describe a volume's mask for a client: its classes' volumes, the run lengths of its slices."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from imaging.labels import plane
from inference.exported_model import Prepared
from serving.errors import Problem
from serving.run_lengths import run_lengths
from serving.tensors import MAX_NUMBERS

MM3_PER_ML = 1000


def class_volumes(
    ids: np.ndarray, names: Sequence[str], prepared: Prepared
) -> list[dict[str, Any]]:
    """Measure each class in voxels, and in ml where the voxels' size is known.

    ids: (S, H, W) class ids; class i is called names[i - 1].
    """
    voxel_ml = None
    if prepared.spacing_mm is not None:
        voxel_ml = math.prod(prepared.spacing_mm) / MM3_PER_ML
        # JSON has no infinity.
        if not math.isfinite(voxel_ml * ids.size):
            voxel_ml = None
    volumes = []
    for number, name in enumerate(names, 1):
        voxels = int(np.count_nonzero(plane(ids, number)))
        ml = None if voxel_ml is None else voxels * voxel_ml
        volumes.append({"class": name, "voxels": voxels, "volume_ml": ml})
    return volumes


def to_json(ids: np.ndarray, names: Sequence[str], prepared: Prepared) -> dict[str, Any]:
    """Describe a mask (S, H, W) by each class's volume and its run lengths, slice by slice.

    Raises Problem 413 if that takes too many numbers.
    """
    classes = class_volumes(ids, names, prepared)
    numbers = 0
    for number, one in enumerate(classes, 1):
        one["rle"] = []
        for slice_ids in ids:
            one["rle"].append(run_lengths(plane(slice_ids, number)))
            numbers += len(one["rle"][-1]["counts"])
            if numbers > MAX_NUMBERS:
                cure = "ask for the volume as NIfTI or TIFF"
                raise Problem(413, f"the answer would be too long as JSON; {cure}")
    return {"size": list(ids.shape), "classes": classes}
