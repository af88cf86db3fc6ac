"""The images of an archive: files, DICOM volumes, files of channels; and their masks' names."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from imaging import formats, partners
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
    """An image: its files' names. The first one is read if there are no channels and no series."""

    name: str  # in problems.csv
    files: tuple[str, ...]  # also voxels that lie beside their header


@dataclass
class Plan:
    """What is segmented."""

    images: dict[str, Item] = field(default_factory=dict)  # by the name of the mask
    problems: dict[str, str] = field(default_factory=dict)  # of images that get no mask
    passed_over: list[PurePosixPath] = field(default_factory=list)  # files that are no images

    def add(self, mask: str, item: Item) -> None:
        """Note an image, unless another one has its mask's name."""
        if mask in self.images:
            self.add_twin(item.name, self.images[mask].name)
        else:
            self.images[mask] = item

    def add_channels(self, mask: str, item: Item, count: int, endings: Sequence[str]) -> None:
        """Note an image of several channels, unless some are missing."""
        if count == len(endings):
            self.add(mask, item)
        else:
            expected = ", ".join(endings)
            self.problems[item.name] = f"channels are missing; this model expects {expected}"

    def add_twin(self, name: str, other: str) -> None:
        """Note a file that another one is taken instead of."""
        self.problems[name] = f"{other} has the same name, and gets the mask"


def plan_masks(names: Sequence[str], metadata: dict[str, Any], root: str) -> Plan:
    """Join the files that are one image, and name each image's mask.

    A network that looks at several slices gets the DICOM files of a folder as one volume.
    root: the name of what lies in no folder, and is named by its folder.
    """
    sampler, endings = Sampler.from_metadata(metadata), metadata.get("channel_endings", ())
    takes_volumes = sampler.dimensions == 3 or sampler.neighbours > 0
    plan, known = Plan(), set(names)
    series: dict[str, list[str]] = defaultdict(list)
    channels: dict[str, dict[int, str]] = defaultdict(dict)
    for name in sorted(names):
        path = PurePosixPath(name)
        if any(map(is_litter, path.parts)):
            continue
        is_dicom = name.lower().endswith(formats.DICOM.suffixes)
        folder = str(path.parent) if path.parent.name else root
        if not is_image(path):
            plan.passed_over.append(path)
        elif is_dicom and takes_volumes:
            series[folder].append(name)
        elif not is_dicom and (found := split_ending(path, endings)):
            stem, number = found
            mask = _mask_name(str(path.parent / stem) if stem else folder, name)
            if channels[mask].setdefault(number, name) != name:
                plan.add_twin(name, channels[mask][number])
        else:
            mask = _mask_name(str(path.parent / name_stem(path.name)), name)
            plan.add(mask, Item(name, (name, *voxels_beside(name, known))))
    for mask, files in channels.items():
        images = [files[number] for number in sorted(files)]
        voxels = [one for image in images for one in voxels_beside(image, known)]
        plan.add_channels(mask, Item(images[0], (*images, *voxels)), len(files), endings)
    for folder, files in series.items():
        plan.add(f"{folder}{formats.DICOM.mask_suffix}", Item(folder, tuple(files)))
    used = {file for item in plan.images.values() for file in item.files}
    plan.passed_over = [path for path in plan.passed_over if str(path) not in used]
    return plan


def _mask_name(stem: str, image: str) -> str:
    """Name a mask by the format of its image: a volume's is in kind, a picture's is PNG."""
    forms = [form for form in VOLUMES if image.lower().endswith(form.suffixes)]
    return f"{stem}{(*forms, formats.PNG)[0].mask_suffix}"


def mask_format(mask: str) -> formats.Format:
    """Return the format of a mask, by its name."""
    forms = (*VOLUMES, formats.DICOM, formats.PNG)
    return next(form for form in forms if mask.endswith(form.mask_suffix))


def voxels_beside(header: str, known: set[str]) -> tuple[str, ...]:
    """Name the file of a volume's voxels, if it is another one than its header's."""
    stem, suffix = partners.split(PurePosixPath(header))
    place = PurePosixPath(header).with_name(stem)
    for ending, headers in partners.HEADERS.items():
        if suffix.lower() in headers:
            for end in (ending, ending.upper(), f"{ending}.gz"):
                if f"{place}{end}" in known:
                    return (f"{place}{end}",)
    return ()


def read_joined(paths: Sequence[Path], is_series: bool, window: str) -> Scan:
    """Read an image of several files, alone in their folder. Raises UserError without its name."""
    folder = paths[0].parent
    try:
        if is_series:
            scan = dicom_series.read_folder(folder, MAX_BYTES)
            return replace(scan, format=formats.DICOM.name)
        return read_channels([path for path in paths if is_image(path)], window)
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from None
