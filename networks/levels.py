"""The levels of a U-Net: filters, kernels and strides that fit an image or a volume.

Loads no Keras.
"""

from collections.abc import Sequence
from typing import NamedTuple

MIN_DEPTH = 4  # slices of a volume at its coarsest level, unless it has fewer


class Level(NamedTuple):
    """A size of feature maps, and how they are convolved and made coarser."""

    filters: int
    kernel: tuple[int, ...]  # of the convolutions: 3 per axis, or 1 along an axis that is coarse
    stride: tuple[int, ...]  # to the next coarser level: 2 per axis, or 1 where it stays


def plan_levels(
    size: Sequence[int | None],
    filters: int,
    depth: int,
    spacing: Sequence[float] | None = None,
) -> tuple[Level, ...]:
    """Choose filters, kernel and stride of the depth + 1 levels of a network.

    size: (H, W) or (D, H, W), None where it is open. spacing: mm along the axes of a volume; by
    default they are alike.

    Of a volume, an axis that is more than twice as coarse as the finest one is neither halved nor
    convolved across, until the halvings of the others have caught up. The axis D is halved while
    it is even and at least MIN_DEPTH is left.
    """
    sides, steps = list(size), list(spacing or [1.0] * len(size))
    kernel = [1] * len(sides)
    levels = []
    for level in range(depth + 1):
        for axis in _fine_axes(sides, steps):
            kernel[axis] = 3  # and so it stays at the levels below
        halved = [axis for axis in _fine_axes(sides, steps) if _can_halve(sides, axis)]
        stride = tuple(2 if axis in halved else 1 for axis in range(len(sides)))
        levels.append(Level(filters * 2**level, tuple(kernel), stride))
        sides = [side and side // by for side, by in zip(sides, stride, strict=True)]
        steps = [step * by for step, by in zip(steps, stride, strict=True)]
    return tuple(levels)


def _fine_axes(sides: list[int | None], steps: list[float]) -> list[int]:
    """Name the axes that are not much coarser than the finest one that can be halved."""
    finest = min(steps[axis] for axis in range(len(sides)) if _can_halve(sides, axis))
    return [axis for axis in range(len(sides)) if steps[axis] <= 2 * finest]


def _can_halve(sides: list[int | None], axis: int) -> bool:
    """Say whether pooling can halve an axis; H and W can be halved as often as is needed."""
    depth = sides[0]
    if axis or len(sides) == 2 or depth is None:
        return True
    return depth % 2 == 0 and depth // 2 >= MIN_DEPTH
