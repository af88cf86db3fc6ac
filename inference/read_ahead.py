"""Read images in chunks while the network computes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from imaging.files import is_large, split_by_size
from inference.problems import Problems

Item = TypeVar("Item")
Content = TypeVar("Content")


def read_chunks(
    items: Sequence[Item],
    paths: Sequence[Path],
    read: Callable[[Item], Content],
    count: int,
    problems: Problems,
) -> Iterator[list[tuple[Item, Content]]]:
    """Read items in parallel, at most `count` at once: chunks of (item, what was read).

    paths: each item's image file. Items that cannot be read are left out and named in `problems`.
    While a chunk is in use, the next one is read. A bar shows the progress.
    """

    def attempt(item: Item) -> Content | Exception:
        try:
            return read(item)
        except Exception as error:
            # Of any kind: the other files are done.
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
            readable = []
            for item, path, result in zip(items[chunk], paths[chunk], results, strict=True):
                if isinstance(result, Exception):
                    problems.add(path, result)
                else:
                    readable.append((item, result))
            yield readable
            bar.update(len(results))
