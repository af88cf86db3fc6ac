"""Write what was found in each image: mask, probabilities, panel, and a row per class."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from imaging import writing
from imaging.labels import Classes
from imaging.plots import draw_panel
from imaging.scan import Scan
from inference.inputs import MEASUREMENTS, Input
from inference.measurements import COLUMNS, measure_classes
from inference.segment import Prediction
from utils import atomic, printable

MAX_NAMED = 3  # files in a note


class Written(NamedTuple):
    """An image whose files are written: its path, the rows of its classes, what is to be told."""

    path: Path
    rows: list[dict[str, Any]]
    notes: list[str]


@dataclass
class Writer:
    """Writes the results of `predict.py --input` to a folder, and remembers what to tell."""

    folder: Path
    metadata: dict[str, Any]  # of the model
    kind: str = ""  # format of the masks; "" is that of the image
    panels: bool = True
    probabilities: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0  # masks written
    noted: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def write(self, item: Input, scan: Scan, found: Prediction) -> Written:
        """Write the files of an image, in any thread; `add` what it returns."""
        classes = Classes.from_metadata(self.metadata)
        names, place = classes.names, self.folder / item.name
        # By this file the folder is known as results, also after a kill.
        table = self.folder / MEASUREMENTS
        table.parent.mkdir(parents=True, exist_ok=True)
        table.touch()
        written = writing.write_masks(self.folder, item.name, found.ids, classes, scan, self.kind)
        judged, rows = found.quality, []
        own = [judged.note] if judged and judged.note else []
        notes = list(dict.fromkeys([*scan.notes, *(one.note for one in written if one.note), *own]))
        shared = {"image": item.path.as_posix(), "notes": "; ".join(notes)}
        if judged:
            shared |= judged.describe()
        for i, row in enumerate(measure_classes(found.ids, names, scan)):
            # Classes that overlap have a file each.
            mask = written[i if classes.overlap else 0].path.relative_to(self.folder)
            rows.append({**shared, "mask": mask.as_posix(), **row})
        if self.probabilities:
            writing.write_probabilities(place, found.probs, names, scan)
        if self.panels:
            panel = self.folder / "panels" / f"{item.name}.png"
            title = printable(item.path.name) + (f"    {judged}" if judged else "")
            window = self.metadata.get("window", "")
            draw_panel(panel, scan, found.ids, names, title, None, found.uncertainty, window)
        # A note on the mask names its file.
        told = [note.replace(written[0].path.name, "another file") for note in notes]
        return Written(item.path, rows, told)

    def add(self, written: Written) -> None:
        """Remember an image that was written; `finish` writes its rows."""
        self.count += 1
        self.rows += written.rows
        for note in written.notes:
            self.noted[note].append(printable(written.path))

    def finish(self) -> None:
        """Write measurements.csv, and print each note once, with the files that it is about."""
        if not self.rows:
            return
        path = self.folder / MEASUREMENTS
        new = {row["mask"] for row in self.rows}
        rows = [row for row in self._old_rows(path) if row["mask"] not in new]
        with (
            atomic(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows + self.rows)
        print_notes(self.noted)

    def _old_rows(self, path: Path) -> list[dict[str, str]]:
        """Read the rows of earlier masks that are still there; none of another table."""
        try:
            with path.open(newline="", encoding="utf-8") as file:
                table = csv.DictReader(file)
                rows = list(table) if tuple(table.fieldnames or ()) == COLUMNS else []
        except (OSError, ValueError, csv.Error):
            return []
        return [row for row in rows if row["mask"] and (self.folder / row["mask"]).is_file()]


def print_notes(noted: dict[str, Sequence[str]]) -> None:
    """Print each note once: `note  FILE: NOTE`, or with the number of files and the first names."""
    for note, names in noted.items():
        if len(names) > 1:
            some = ", ".join(Path(name).name for name in names[:MAX_NAMED])
            rest = ", …" if len(names) > MAX_NAMED else ""
            print(f"note  {len(names)} files: {note} ({some}{rest})")
        else:
            print(f"note  {names[0]}: {note}")
