"""How a scan becomes the network's inputs: whole slices, slices with neighbours, patches.

Training draws its inputs by this, and prediction covers a scan with them (windows.py). The model
file keeps it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from imaging.grid import SAME, Grid, Shape, fit_grid, orientation_of, turns_between
from imaging.scan import Scan
from utils import UserError

# Pixels of a side that is left at working resolution.
MIN_SIDE = 8


@dataclass(frozen=True)
class Sampler:
    """What the network takes at once."""

    # (H, W), or (D, H, W) of a 3-D network.
    size: tuple[int, ...]
    # Pieces of that size at working resolution, or every slice scaled to fit.
    patches: bool = False
    # Slices before and after that are further channels.
    neighbours: int = 0
    # Working resolution of volumes: mm between slices, rows and columns. None is the file's own.
    spacing: tuple[float, float, float] | None = None
    # Directions of slices, rows and columns in volumes, see `orientation_of`; "" is the file's.
    orientation: str = ""

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], tile: bool = False) -> "Sampler":
        """Read it from a model's metadata, also from that of earlier versions.

        tile: use a network of whole slices window by window.
        """
        if "sampler" not in metadata:
            neighbours = metadata.get("neighbours", 0)
            return cls(tuple(metadata["image_size"]), tile, neighbours)
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in metadata["sampler"].items()
        }
        sampler = cls(**fields)
        return replace(sampler, patches=sampler.patches or tile)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the model file stores."""
        return {"sampler": asdict(self)}

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.size)

    @property
    def window(self) -> Shape:
        """The size (D, H, W) of a window, one slice in 2-D."""
        return self.size if self.dimensions == 3 else (1, *self.size)

    def input_shape(self, channels: int) -> tuple[int, ...]:
        """Return the network's input, (H, W, C) or (D, H, W, C), for images of so many channels."""
        return (*self.size, channels * (1 + 2 * self.neighbours))

    def grid(self, scan: Scan) -> Grid:
        """Say how a scan lies in the working array. Raises UserError if its spacing is needed."""
        axes, flips = (0, 1, 2), (False, False, False)
        if self.orientation and scan.affine is not None:
            axes, flips = turns_between(orientation_of(scan.affine), self.orientation)
        oriented = tuple(scan.pixels.shape[axis] for axis in axes)
        if self.patches:
            inner = self._at_working_resolution(oriented, axes, scan.spacing_mm)
            return Grid(axes, flips, oriented, inner, inner)
        return replace(fit_grid(oriented, self.size), axes=axes, flips=flips)

    def _at_working_resolution(
        self, shape: Shape, axes: Sequence[int], spacing_mm: Sequence[float] | None
    ) -> Shape:
        """Return the size of a scan at working resolution; in 2-D the slices stay."""
        if self.spacing is None:
            return shape
        if spacing_mm is None:
            wanted = " x ".join(f"{side:g}" for side in self.spacing)
            raise UserError(
                f"it does not say how large its pixels are; the network works at {wanted} mm. "
                "Convert it to a format that tells it, such as NIfTI; in training, leave out "
                "--spacing"
            )
        sides = []
        for number, (length, axis) in enumerate(zip(shape, axes, strict=True)):
            factor = spacing_mm[axis] / self.spacing[number]
            is_same = abs(factor - 1) < SAME or (number == 0 and self.dimensions == 2)
            sides.append(length if is_same else max(1, round(length * factor)))
        if min(sides[1:]) < MIN_SIDE <= min(shape[1:]):
            shown = "x".join(map(str, sides))
            raise UserError(f"{shown} voxels at the network's spacing; expected finer --spacing")
        return tuple(sides)
