"""Recognise how the files of a data set lie: which image has which masks.

To add a layout, write a function that returns a `Layout` if it recognises the folder, else None,
and add it to LAYOUTS. docs/contributing.md has an example.
"""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from dataset.folder import Folder
from dataset.layouts.annotation_layouts import coco, labelme
from dataset.layouts.case_layouts import case_files, group_kind, one_folder
from dataset.layouts.dicom_layout import series
from dataset.layouts.folder_layouts import images_and_masks, merge, montgomery
from dataset.layouts.index_table import apply_index
from dataset.layouts.known_layouts import chase, drive, nnunet
from dataset.layouts.passed_over import note_passed_over
from dataset.layouts.unknown import explain_unknown
from dataset.layouts.voc_layout import voc
from dataset.names import role_of, subset_of
from dataset.pairs import SUBSETS, Layout, Pair  # noqa: F401 (imported from here)
from utils import UserError

MAX_TRIED = 20_000  # folders that are tried as those of patients


def ready_subsets(folder: Folder) -> Layout | None:
    """Recognise train/, val/, test/, each in a layout of its own: the given split is used."""
    found, notes, problems = [], [], []
    for one in folder.folders:
        subset = subset_of(one.name)
        if not subset or role_of(one.name)[0]:
            continue
        layout = _find(one)
        if layout and layout.pairs:
            layout.pairs = [_in_subset(pair, subset) for pair in layout.pairs]
            found.append((one.name, layout))
        elif layout:
            problems += layout.problems
            notes += layout.notes
        elif one.has_images():
            notes.append(f"{one.name}/ has no masks and is passed over")
    if not found:
        return None
    parts = [layout for _, layout in found]
    if not any(pair.subset == "train" for layout in parts for pair in layout.pairs):
        rest = images_and_masks(folder)  # beside test/
        parts += [rest] if rest and rest.pairs else []
    whole = merge(parts)
    whole.name = f"{', '.join(f'{name}/' for name, _ in found)} each with {whole.name}"
    notes += _patients_in_several(whole.pairs)
    whole.notes += notes
    whole.problems += problems
    return whole


def _in_subset(pair: Pair, subset: str) -> Pair:
    """Put a pair into a subset. Patients of equal names in different subsets are different."""
    return replace(pair, subset=subset, patient=pair.patient and f"{subset}/{pair.patient}")


def _patients_in_several(pairs: list[Pair]) -> list[str]:
    """Say if a patient's name is in several subsets."""
    subsets: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        subsets[pair.patient.partition("/")[2]].add(pair.subset)
    shared = sorted(name for name, found in subsets.items() if name and len(found) > 1)
    if not shared:
        return []
    some = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
    return [
        f"{len(shared)} patients have the same name in several subsets ({some}): are they the same "
        "persons? Then scores will be too good"
    ]


def folder_a_case(folder: Folder) -> Layout | None:
    """Recognise a folder a patient, or a folder an image, each in a layout of its own."""
    found, problems = [], []
    for one in folder.folders[:MAX_TRIED]:
        layout = _find(one, CASE_LAYOUTS)
        if layout and layout.pairs:
            found.append((one.name, layout))
        elif layout or one.has_images():
            problems += layout.problems if layout else [f"{one.path}: images and no masks in it"]
        # Other folders are not searched to the end.
        if len(problems) > 20 + len(found):
            return None
    if len(found) < 2 or len(problems) > len(found):
        return None
    whole = merge([layout for _, layout in found])
    single = len(whole.pairs) == len(found)
    if single and "object" in whole.name:
        whole.name = f"a folder an image, with {whole.name} (as Data Science Bowl 2018)"
    else:
        kind = group_kind(folder)
        whole.name = f"a folder a {kind}, each with {whole.name}"
        whole.pairs = []
        for name, layout in found:
            whole.pairs += [replace(pair, **{kind: name}) for pair in layout.pairs]
    whole.problems += problems
    return whole


def folder_in_folder(folder: Folder) -> Layout | None:
    """Recognise a data set that lies in the only folder with images."""
    full = [one for one in folder.folders if one.has_images() or one.file("dataset.json")]
    if len(full) != 1:
        return None
    layout = _find(full[0])
    if layout:
        layout.name += f", in {full[0].name}/"
    return layout


# The first that recognises the folder is taken.
LAYOUTS = (
    montgomery,
    nnunet,
    chase,
    drive,
    coco,
    labelme,
    ready_subsets,
    voc,
    images_and_masks,
    one_folder,
    folder_a_case,
    series,
    folder_in_folder,
)
# Those that the folder of a patient may have.
CASE_LAYOUTS = (
    labelme,
    images_and_masks,
    one_folder,
    case_files,
    series,
    folder_in_folder,
    folder_a_case,
)


def _find(folder: Folder, layouts: tuple = ()) -> Layout | None:
    """Give the first layout that recognises a folder."""
    for recognise in layouts or LAYOUTS:
        layout = recognise(folder)
        if layout is not None:
            return layout
    return None


def find(root: Path) -> Layout:
    """Find a data set's pairs. Raises UserError if its layout is not known."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected one that holds images and masks")
    folder = Folder(root)
    layout = _find(folder)
    if layout is None:
        raise UserError(explain_unknown(folder))
    layout.folder = root
    if not (layout.pairs or layout.problems):
        layout.problems.append(f"{root}: no image with a mask ({layout.name})")
    layout.pairs.sort(key=lambda pair: str(pair.image))
    layout.pairs = _with_labels(layout.pairs)
    apply_index(root, layout)
    note_passed_over(folder, layout)
    return layout


def _with_labels(pairs: list[Pair]) -> list[Pair]:
    """Read the labels at the names' ends: Montgomery's are _0 (normal) and _1 (tuberculosis).

    Names that are numbered, such as x_0, x_1, x_2, have none.
    """
    found = [re.search(r"_([01])$", pair.stem) for pair in pairs]
    if not all(found):
        return pairs
    return [
        replace(pair, label=pair.label or one[1]) for pair, one in zip(pairs, found, strict=True)
    ]


def describe_layout(layout: Layout, names: list[str]) -> list[str]:
    """List what a user may want to know of a layout, and say if its classes become one."""
    own = [part.partition("=")[0] for part in layout.classes.split(",")]
    if len(names) > 1 or len(own) < 2:
        return layout.notes
    return [
        *layout.notes,
        f"the masks of {', '.join(own)} become one class; "
        f'--classes "{layout.classes}" keeps them apart',
    ]
