"""List the images that are to be segmented, and read them while the network computes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from imaging.files import files_by_stem, holds_one_volume, is_image, is_large, split_by_size
from imaging.formats import SUFFIXES
from imaging.scan import name_in_errors
from utils import UserError

Item = TypeVar("Item")
Content = TypeVar("Content")


def read_chunks(
    items: Sequence[Item],
    paths: Sequence[Path],
    read: Callable[[Item], Content],
    count: int,
    problems: list[str],
) -> Iterator[list[tuple[Item, Content]]]:
    """Read items in parallel, at most `count` at once: chunks of (item, what was read).

    paths: each item's image file. Items that cannot be read are left out and named in `problems`.
    While a chunk is in use, the next one is read. A bar shows the progress.
    """

    def attempt(item: Item) -> Content | UserError:
        try:
            return read(item)
        except UserError as error:
            return error

    chunks = list(split_by_size(paths, count))
    bar = tqdm(total=len(items), desc="predicting", unit="image", disable=None)
    with ThreadPoolExecutor() as pool, bar:
        waiting = None
        for chunk, following in itertools.pairwise([*chunks, slice(0, 0)]):
            results = list(waiting or pool.map(attempt, items[chunk]))
            # A large file is not read ahead, so that two are never in memory at once.
            large = any(is_large(path) for path in paths[following])
            waiting = None if large else pool.map(attempt, items[following])
            yield keep_readable(items[chunk], results, problems)
            bar.update(len(results))


def keep_readable(
    items: Sequence[Item], results: Sequence[Content | UserError], problems: list[str]
) -> list[tuple[Item, Content]]:
    """Pair items with what was read of them; the errors go to `problems`, line by line."""
    readable = []
    for item, result in zip(items, results, strict=True):
        if isinstance(result, UserError):
            problems += str(result).splitlines()
        else:
            readable.append((item, result))
    return readable


def list_inputs(source: Path) -> tuple[list[Path], list[str]]:
    """List the images of a file or folder, one per stem, and the problems.

    A folder that holds one DICOM series is one image. Raises UserError if there are no images.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; --input takes an image file or a folder of them")
    with name_in_errors(source):
        if source.is_file() or holds_one_volume(source):
            return [source], []
    problems: list[str] = []
    paths = list(files_by_stem(source, "", problems).values())
    if not paths:
        below = next((path for path in sorted(source.rglob("*")) if is_image(path)), None)
        elsewhere = f", but {below.parent} has" if below else ""
        raise UserError(
            f"{source} has no image{elsewhere}; expected files ending in {' '.join(SUFFIXES)}"
        )
    return paths, problems
