"""The layout of radiotherapy: an RTSTRUCT or SEG object beside its DICOM series."""

from pathlib import Path

from dataset.folder import Folder
from dataset.pairs import Layout, Pair, classes_text
from imaging.dicom.rtstruct import BODY

OBJECTS = ("RTSTRUCT", "SEG")  # masks
NO_IMAGES = {*OBJECTS, "RTDOSE", "RTPLAN", "SR", "PR", "REG", "KO", "DOC", ""}
MAX_FOLDERS = 50  # of a patient


def series(folder: Folder) -> Layout | None:
    """Recognise a DICOM series with an RTSTRUCT or SEG object, in its folder or one beside it."""
    groups = [one for one in (folder, *folder.folders[:MAX_FOLDERS]) if one.is_series]
    images: dict[str, Path] = {}
    objects: list[tuple[str, Path]] = []
    for group in groups:
        for path in group.images:
            modality, uid = _read_header(path)
            if modality in OBJECTS:
                objects.append((modality, path))
            elif modality not in NO_IMAGES:
                images[uid] = group.path
    if not (images and objects):
        return None
    kind = objects[0][0]
    layout = Layout(f"{kind} beside its DICOM series")
    masks = [path for modality, path in objects if modality == kind]
    for path in masks:
        uid = _referenced_series(path)
        image = images.get(uid) or (next(iter(images.values())) if len(images) == 1 else None)
        if image is None:
            layout.problems.append(f"{path}: its DICOM series {uid or ''} is not in {folder.path}")
        else:
            layout.pairs.append(Pair(image, (path,)))
    if len({pair.image for pair in layout.pairs}) < len(layout.pairs):
        names = ", ".join(path.name for path in masks)
        layout.problems.append(f"{folder.path}: several {kind} files ({names}); keep one of them")
        layout.pairs = []
    names = [name for pair in layout.pairs for name in structure_names(pair.masks[0])]
    names = [name for name in names if name.lower() not in BODY]
    layout.classes = classes_text(dict.fromkeys(names, ""))
    layout.name += f", classes from the {kind}"
    return layout


def _read_header(path: Path) -> tuple[str, str]:
    """Read a file's modality and the UID of its series."""
    import pydicom

    tags = ["Modality", "SeriesInstanceUID"]
    try:
        header = pydicom.dcmread(path, specific_tags=tags, stop_before_pixels=True, force=True)
        return str(header.get("Modality", "")), str(header.get("SeriesInstanceUID", ""))
    except Exception:
        return "", ""


def _referenced_series(path: Path) -> str:
    """Find the UID of the series that an RTSTRUCT or SEG object is drawn on; "" if it says none."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        for one in header.iterall():
            if one.keyword == "SeriesInstanceUID" and one.value != header.get("SeriesInstanceUID"):
                return str(one.value)
    except Exception:
        return ""
    return ""


def structure_names(path: Path) -> list[str]:
    """List the structures of an RTSTRUCT or the segments of a SEG."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        rois = header.get("StructureSetROISequence") or []
        segments = header.get("SegmentSequence") or []
        names = [str(roi.ROIName).strip() for roi in rois]
        return names + [str(segment.SegmentLabel).strip() for segment in segments]
    except Exception:
        return []
