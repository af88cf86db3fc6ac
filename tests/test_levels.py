"""The levels of a network: what is halved and convolved across, for images and volumes."""

import itertools

import pytest

from networks.levels import plan_levels


@pytest.mark.parametrize(
    ("size", "depth", "spacing", "strides", "kernels"),
    [
        # Images: every axis at every level.
        ((64, 96), 2, None, ["22", "22", "22"], ["33", "33", "33"]),
        ((None, None), 1, None, ["22", "22"], ["33", "33"]),
        # A volume is halved along D until 4 slices, or an odd number of them, are left.
        ((16, 32, 32), 4, None, ["222", "222", "122", "122", "122"], ["333"] * 5),
        ((40, 56, 40), 3, None, ["222", "222", "222", "122"], ["333"] * 4),
        ((4, 32, 32), 2, (1, 1, 1), ["122", "122", "122"], ["333"] * 3),
        ((1, 32, 32), 1, None, ["122", "122"], ["333"] * 2),
        # Thick slices wait for two halvings of the others: 5 mm, 4 mm.
        (
            (24, 128, 128),
            4,
            (5, 1, 1),
            ["122", "122", "222", "222", "122"],
            ["133", "133", "333", "333", "333"],
        ),
        # Thin slices that cannot be halved do not hold the other axes up.
        ((9, 64, 64), 2, (0.4, 1, 1), ["122", "122", "122"], ["333"] * 3),
        # The slices run along another axis.
        ((32, 32, 32), 2, (1, 4, 1), ["212", "222", "222"], ["313", "333", "333"]),
    ],
)
def test_coarse_axes_wait_until_the_others_have_caught_up(size, depth, spacing, strides, kernels):
    levels = plan_levels(size, 8, depth, spacing)
    assert ["".join(map(str, level.stride)) for level in levels] == strides
    assert ["".join(map(str, level.kernel)) for level in levels] == kernels
    assert [level.filters for level in levels] == [8 * 2**number for number in range(depth + 1)]


@pytest.mark.parametrize("slices", [1, 3, 4, 6, 10, 24, 33, 64])
@pytest.mark.parametrize("thickness", [0.3, 1, 2, 3, 7, 20])
def test_a_pooling_never_loses_a_slice(slices, thickness):
    """Each stride divides the size, something is halved at each level, and kernels only grow."""
    sides = [slices, 64, 32]
    levels = plan_levels(sides, 2, 4, (thickness, 1, 1))
    for level, below in itertools.pairwise(levels):
        assert 2 in level.stride and below.kernel >= level.kernel
        assert not any(side % by for side, by in zip(sides, level.stride, strict=True))
        sides = [side // by for side, by in zip(sides, level.stride, strict=True)]
    assert sides[0] >= min(slices, 4)
