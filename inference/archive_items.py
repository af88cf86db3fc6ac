"""The images of an archive: files, DICOM volumes, files of channels; and their masks' names."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from imaging import formats
from imaging.channel_files import read_channels
from imaging.dicom import dicom_series
from imaging.files import is_image, is_litter, name_stem
from imaging.scan import MAX_BYTES, Scan
from inference.inputs import split_ending
from inference.sampler import Sampler
from utils import UserError

# Files of these kinds are volumes, and so are their masks.
VOLUMES = (formats.NIFTI, formats.NRRD, formats.METAIMAGE)


@dataclass(frozen=True)
class Item:
    """An image: a file, the DICOM files of a folder, or a file per channel. Names, not paths."""

    name: str  # in problems.csv
    files: tuple[str, ...]


@dataclass
class Plan:
    """What is segmented."""

    images: dict[str, Item] = field(default_factory=dict)  # by the name of the mask
    problems: dict[str, str] = field(default_factory=dict)  # of images that get no mask

    def add(self, mask: str, item: Item) -> None:
        """Note an image, unless another one has its mask's name."""
        if mask in self.images:
            other = self.images[mask].name
            self.problems[item.name] = f"{other} has the same name, and gets the mask"
        else:
            self.images[mask] = item


def plan_masks(names: Sequence[str], metadata: dict[str, Any], root: str) -> Plan:
    """Join the files that are one image, and name each image's mask.

    A network that looks at several slices gets the DICOM files of a folder as one volume.
    root: the name of the mask of DICOM files that lie in no folder.
    """
    sampler, endings = Sampler.from_metadata(metadata), metadata.get("channel_endings", ())
    takes_volumes = sampler.dimensions == 3 or sampler.neighbours > 0
    plan = Plan()
    series: dict[str, list[str]] = defaultdict(list)
    channels: dict[str, dict[int, str]] = defaultdict(dict)
    for name in sorted(names):
        path = PurePosixPath(name)
        if not is_image(path):
            continue
        if takes_volumes and name.lower().endswith(formats.DICOM.suffixes):
            series[str(path.parent)].append(name)
        elif found := split_ending(path, endings):
            stem, number = found
            channels[_mask_name(path.parent / stem, name)][number] = name
        else:
            plan.add(_mask_name(path.parent / name_stem(path.name), name), Item(name, (name,)))
    for mask, files in channels.items():
        item = Item(files[min(files)], tuple(files[number] for number in sorted(files)))
        if len(files) < len(endings):
            missing = ", ".join(endings)
            plan.problems[item.name] = f"channels are missing; this model expects {missing}"
        else:
            plan.add(mask, item)
    for folder, files in series.items():
        place = folder if folder != "." else root
        plan.add(f"{place}{formats.DICOM.mask_suffix}", Item(place, tuple(files)))
    return plan


def _mask_name(stem: PurePosixPath, image: str) -> str:
    volume = volume_format(image)
    return f"{stem}{volume.mask_suffix if volume else formats.PNG.mask_suffix}"


def volume_format(name: str) -> formats.Format | None:
    """Return the format of a file that holds a volume, by its name; None for a picture."""
    return next((form for form in VOLUMES if name.lower().endswith(form.suffixes)), None)


def mask_format(mask: str) -> formats.Format | None:
    """Return the format of a volume's mask, by its name; None for a picture's."""
    forms = (*VOLUMES, formats.DICOM)
    return next((form for form in forms if mask.endswith(form.mask_suffix)), None)


def passed_over(names: Sequence[str]) -> list[PurePosixPath]:
    """List the files that are no images, by their endings, without what systems leave behind."""
    paths = map(PurePosixPath, sorted(names))
    return [path for path in paths if not is_image(path) and not any(map(is_litter, path.parts))]


def read_joined(paths: Sequence[Path], window: str) -> Scan:
    """Read an image of several files, alone in their folder. Raises UserError without its name."""
    folder = paths[0].parent
    try:
        if paths[0].name.lower().endswith(formats.DICOM.suffixes):
            scan = dicom_series.read_folder(folder, MAX_BYTES)
            return replace(scan, format=formats.DICOM.name)
        return read_channels(paths, window)
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from None
