"""Use a trained model: score the test images and draw panels, or segment any file or folder.

    python predict.py                                  the run's test images: results/<stem>.png, results/metrics.csv
    python predict.py --data-dir DIR                   every pair of another data set, likewise
    python predict.py --model "files/run/fold*/model.h5" …             several models, averaged
    python predict.py --input PATH --output DIR        masks DIR/<stem>.png, panels DIR/panels/<stem>.png

Masks have the image's own size and kind: PNG or TIFF (0/255 for one class), NIfTI, DICOM SEG, with the
training masks' values. A bad file is reported and the others are done; the exit code is then 2.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    pass
from imaging.files import files_by_stem, holds_one_volume, is_image, is_large, split_by_size
from imaging.formats import SUFFIXES
from imaging.scan import name_in_errors
from utils import UserError

T = TypeVar("T")


def read_ahead(
    items: Sequence[T], path_of: Callable[[T], Path], read: Callable[[T], Any], count: int
) -> Iterator[list[tuple[T, Any]]]:
    """Read items in parallel, at most `count` at a time: chunks of (item, what was read, or its UserError).

    While a chunk is in use the next one is read, unless that is a large file.
    """

    def attempt(item: T) -> Any:
        try:
            return read(item)
        except UserError as error:
            return error

    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(items), desc="predicting", unit="image", disable=None) as bar,
    ):
        paths = [path_of(item) for item in items]
        ahead: Iterator[Any] = iter(())
        for part, after in itertools.pairwise([*split_by_size(paths, count), slice(0, 0)]):
            done = list(ahead) or list(pool.map(attempt, items[part]))
            ahead = (
                iter(()) if any(map(is_large, paths[after])) else pool.map(attempt, items[after])
            )
            yield list(zip(items[part], done, strict=True))
            bar.update(len(items[part]))


def split_errors(chunk: list[tuple[T, Any]], problems: list[str]) -> list[tuple[T, Any]]:
    """Keep what was read; append the errors to `problems`."""
    problems += [
        line for _, what in chunk if isinstance(what, UserError) for line in str(what).splitlines()
    ]
    return [(item, what) for item, what in chunk if not isinstance(what, UserError)]


def list_inputs(source: Path) -> tuple[list[Path], list[str]]:
    """List the images of a file or folder, one per stem, and the problems. Raises UserError if there are none."""
    if not source.exists():
        raise UserError(f"{source} does not exist; --input takes an image file or a folder of them")
    with name_in_errors(source):
        if source.is_file() or holds_one_volume(source):
            return [source], []
    problems: list[str] = []
    paths = list(files_by_stem(source, "", problems).values())
    if not paths:
        below = next(
            (f", but {path.parent} has" for path in sorted(source.rglob("*")) if is_image(path)), ""
        )
        raise UserError(
            f"{source} has no image{below}; expected files ending in {' '.join(SUFFIXES)}"
        )
    return paths, problems
