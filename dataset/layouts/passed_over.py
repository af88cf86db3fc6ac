"""Name the files of a data set's folder that are not used."""

from dataset.folder import Folder
from dataset.pairs import Layout
from imaging.partners import HEADERS, header_of

KNOWN = {"index.csv", "dataset.json", "phantoms.json"}
MAX_LISTED = 4


def note_passed_over(folder: Folder, layout: Layout) -> None:
    """Add a note that counts the files that belong to no pair, and names the first."""
    used = set(layout.other)
    for pair in layout.pairs:
        for path in (pair.image, *pair.more_channels, *pair.masks):
            used.add(path)
    told = {problem.partition(": ")[0] for problem in layout.problems}
    other = []
    for path in folder.walk():
        known = path in used or path.parent in used or path.name in KNOWN
        if path.suffix.lower() in HEADERS:  # voxels whose header is used
            known = known or header_of(path) in used
        if not known and str(path) not in told:
            other.append(path)
    if other:
        some = ", ".join(str(path.relative_to(folder.path)) for path in other[:MAX_LISTED])
        more = ", …" if len(other) > MAX_LISTED else ""
        files = "1 file is" if len(other) == 1 else f"{len(other)} files are"
        layout.notes.append(f"{files} passed over: {some}{more}")
