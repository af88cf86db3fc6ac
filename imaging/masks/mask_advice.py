"""What to do about values in a mask that --classes does not name."""

from collections.abc import Sequence

import cv2
import numpy as np

# More values than this are labels of objects, or grey levels, not classes.
MAX_SUGGESTED_CLASSES = 8
# Larger values beside 255 are grey levels, not ids.
MAX_ID = 32


def advise_one_class(values: np.ndarray, found: set[int]) -> str:
    """Advise what to do about a mask of several values where one class is asked for."""
    if min(found) < 0:
        return ""
    is_of_objects = _are_objects(values, found)
    if len(found) > MAX_SUGGESTED_CLASSES and not is_of_objects:
        return ' (if all of them are one class: --classes "NAME=1+")'
    if len(found) > MAX_SUGGESTED_CLASSES:
        return (
            f" (instance labels: {len(found)} values, each of one object. All of them become one "
            'class with --classes "NAME=1+", such as nucleus=1+)'
        )
    advice = name_values(found)
    if is_of_objects and len(found) > 1:
        advice += ', or if each value is one object of the same class (instance labels), "NAME=1+"'
    return f" (if these are classes, name them: {advice})"


def _are_objects(values: np.ndarray, found: set[int]) -> bool:
    """Say whether nearly each of a mask's values is one connected object, in the first slices."""
    plane = max(values, key=np.count_nonzero)
    labels = sorted(set(np.unique(plane).tolist()) & found)[:64]
    single = [cv2.connectedComponents((plane == one).astype(np.uint8))[0] == 2 for one in labels]
    return bool(labels) and sum(single) >= 0.8 * len(labels)


def advise_classes(found: set[int], others: list[int]) -> str:
    """Advise what to do about values that --classes does not name."""
    if max(others) == 255 and len(others) == 1 and len(found) > 2:
        return " (if 255 means that nobody knows: --ignore 255)"
    if len(found - {0}) > MAX_SUGGESTED_CLASSES:
        return " (many values: is it a JPEG, or smoothed? Save ids, as PNG)"
    if min(found) < 0:
        return ""
    return (
        f" (if these are classes, name them: {name_values(found - {0})}; --ignore leaves a value "
        "out)"
    )


def name_values(found: set[int]) -> str:
    """Write the flags that name values."""
    values = sorted(found)
    ignore = ""
    if values[-1] == 255 and len(values) > 1 and values[-2] <= MAX_ID:
        values, ignore = values[:-1], " --ignore 255"
    named = ",".join(f"NAME{i}={value}" for i, value in enumerate(values, 1))
    return f'--classes "{named}"{ignore}'


def range_text(first: int, last: int) -> str:
    if first == last:
        return f"{first}"
    return f"{first}+" if last >= 2**32 - 1 else f"{first}-{last}"


def list_some(values: Sequence[float]) -> str:
    """List the first values."""
    listed = ", ".join(f"{value:g}" for value in sorted(values)[:6])
    return listed + (", …" if len(values) > 6 else "")
