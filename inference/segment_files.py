"""Segment image files: read, predict, write. What goes wrong with a file costs that file only."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import utils
from imaging.files import file_stem
from imaging.scan import Scan
from inference.inputs import Input, read_input
from inference.output_names import name_outputs
from inference.outputs import Writer
from inference.problems import Problems
from inference.read_ahead import read_chunks
from inference.segment import DEFAULT_OPTIONS, Member, Options, Prediction, segment_scans
from utils import UserError

Result = TypeVar("Result")


def segment_files(
    members: Sequence[Member],
    items: Sequence[Input | Path],
    output: str | Path,
    options: Options = DEFAULT_OPTIONS,
    panels: bool = True,
    kind: str = "",
) -> tuple[int, list[str]]:
    """Write masks and measurements to `output`, and panels to the folder panels in it.

    items: image files, or what `list_inputs` found. kind: format of the masks, see
    `writing.write_mask`. Returns how many masks, and the problems, a line per file that was left
    out.
    """
    metadata = members[0][1]
    items = name_inputs(items)
    problems = Problems(output)
    writer = Writer(Path(output), metadata, kind, panels, options.probabilities)
    chunks = read_chunks(
        items,
        [item.path for item in items],
        lambda item: read_input(item, metadata.get("window", "")),
        options.batch_size,
        problems,
    )
    try:
        for chunk in chunks:
            paths, scans = [item.path for item, _ in chunk], [scan for _, scan in chunk]
            results = list(segment_each(members, scans, options, paths, problems))
            jobs = [partial(writer.write, *chunk[i], found) for i, found in results]
            for (i, _), written in zip(results, side_by_side(jobs), strict=True):
                if isinstance(written, Exception):
                    problems.add(paths[i], written)
                else:
                    writer.add(written)
    finally:
        writer.finish()
    return writer.count, problems.lines


def side_by_side(jobs: Sequence[Callable[[], Result]]) -> list[Result | Exception]:
    """Do jobs in a thread for each core; return what each returns, or the error that it raises."""

    def attempt(job: Callable[[], Result]) -> Result | Exception:
        try:
            return job()
        except Exception as error:  # of any kind: the other files are done
            return error

    with ThreadPoolExecutor(utils.cores()) as pool:
        return list(pool.map(attempt, jobs))


def name_inputs(items: Sequence[Input | Path]) -> list[Input]:
    """Make inputs of image files."""
    if all(isinstance(item, Input) for item in items):
        return list(items)
    names = name_outputs([(file_stem(path), path.name) for path in items])
    return [Input(name, (path,)) for name, path in zip(names, items, strict=True)]


def segment_each(
    members: Sequence[Member],
    scans: Sequence[Scan],
    options: Options,
    paths: Sequence[Path],
    problems: Problems,
) -> Iterator[tuple[int, Prediction]]:
    """Segment scans; if that fails, one by one. Gives the number of each, and what was found."""
    try:
        yield from enumerate(segment_scans(members, scans, options))
        return
    except Exception as error:
        if len(scans) < 2:
            for path in paths:
                problems.add(path, _named(path, error))
            return
    for i, scan in enumerate(scans):
        for _, found in segment_each(members, [scan], options, [paths[i]], problems):
            yield i, found


def _named(path: Path, error: Exception) -> Exception:
    """Name the file in an error about a scan: the network knows no files."""
    return UserError(f"{path}: {error}") if isinstance(error, UserError) else error
