"""The page that `data.py check` writes: one HTML file with pictures, without scripts or network."""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.cache import Dataset
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.report import charts, thumbnails, train_command
from dataset.report.oddities import find_oddities
from dataset.report.plan import Proposal
from dataset.report.report_charts import draw_charts
from dataset.report.thumbnails import Thumbnail
from imaging.plots import COLOURS
from utils import ROOT, atomic, counted

if TYPE_CHECKING:
    import pandas as pd

NOTED = ("note", "warning")
MAX_PROBLEMS = 20  # that are shown at once; the others are folded
MAX_FOLDED = 1000
MAX_DAMAGED = 8  # pictures of files with a problem
MAX_ODD = 12  # pictures of odd files


def write_report(
    folder: Path,
    pairs: Sequence[Pair],
    dataset: Dataset,
    preprocessing: Preprocessing,
    lines: Sequence[str],
    problems: Sequence[str],
    given: dict[str, Any],
    proposals: Sequence[Proposal],
) -> Path:
    """Write report.html and report.json into `folder`; return the page.

    lines: what `check` prints; notes and warnings are shown above the others.
    given: fields of `train.Config` that say which data these are: data_dir, classes …
    proposals: further fields, with their reasons.
    """
    fields = given | {name: value for name, value, _ in proposals}
    names, info = preprocessing.classes.names, dataset.info
    title = html.escape(f"Check of {fields['data_dir']}")
    notes, facts = split_notes(lines)
    body = [
        f"<h1>{title}</h1>",
        _problems(problems),
        _list("What you should know", notes, "note"),
        _command(train_command(fields, folder / "report.json"), proposals, bool(problems)),
        f"<h2>What was found</h2><pre>{html.escape(chr(10).join(facts))}</pre>",
    ]
    if pairs:
        body.append(_pictures(pairs, dataset, preprocessing, problems, fields))
    if len(info):
        drawn = draw_charts(info, names, _palette(dataset.channels))
        body.append(f'<h2>In numbers</h2><div class="charts">{drawn}</div>')
    style = (ROOT / "dataset" / "report" / "report.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style><main>{''.join(body)}</main></html>\n"
    )
    with atomic(folder / "report.html") as temporary:
        # A file name may hold bytes that are not UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="replace")
    with atomic(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(fields, indent=2))
    return folder / "report.html"


# ------------------------------------------------------------------------------------------- text


def split_notes(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide what `check` prints into notes and warnings, without these words, and plain facts.

    A line that begins with a space goes on with the line before.
    """
    notes, facts = [], []
    in_note = False
    for line in lines:
        goes_on = line.startswith(" ")
        in_note = in_note if goes_on else line.startswith(NOTED)
        if in_note and goes_on:
            notes[-1] += f"; {line.strip()}"
        elif in_note:
            notes.append(line.partition(" ")[2].strip())
        else:
            facts.append(line)
    return notes, facts


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return '<p class="fine">No problems.</p>'
    return _list(f"{counted(len(problems), 'problem')} to repair first", problems, "problem")


def _list(title: str, lines: Sequence[str], kind: str) -> str:
    """List lines under a title, the first ones openly; "" without lines."""
    if not lines:
        return ""
    items = [f"<li>{html.escape(line)}" for line in lines[:MAX_FOLDED]]
    shown, rest = items[:MAX_PROBLEMS], items[MAX_PROBLEMS:]
    folded = ""
    if rest:
        more = len(lines) - MAX_PROBLEMS
        if len(lines) > MAX_FOLDED:
            rest.append("<li>… data.py check prints the others")
        folded = f"<details><summary>{more} more</summary><ul>{''.join(rest)}</ul></details>"
    return f'<section class="{kind}"><h2>{title}</h2><ul>{"".join(shown)}</ul>{folded}</section>'


def _command(command: str, proposals: Sequence[Proposal], is_blocked: bool) -> str:
    """Show the command to copy, and why it has these hyperparameters."""
    rows = ""
    for name, value, reason in proposals:
        why = html.escape(reason)
        rows += f"<tr><th scope=row>{name}<td>{html.escape(str(value))}<td>{why}"
    when = "Then train with" if is_blocked else "Next: train with"
    return (
        f"<h2>{when}</h2><p>A click selects the whole line. Further flags win over it.</p>"
        f'<pre class="command">{html.escape(command)}</pre>'
        f"<table><tr><th>setting<th>proposed<th>why{rows}</table>"
    )


# --------------------------------------------------------------------------------------- pictures


def choose_pairs(
    pairs: Sequence[Pair], info: "pd.DataFrame", names: Sequence[str], problems: Sequence[str]
) -> list[tuple[Pair, str]]:
    """Choose the pairs to show, and say why: those with problems, odd ones, some of the others."""
    # A problem begins with the file that it is about.
    about = dict(problem.partition(": ")[::2] for problem in problems)
    chosen = {}
    for pair in pairs:
        found = [about[str(pair.image)]] if str(pair.image) in about else []
        found += [f"its mask: {about[str(path)]}" for path in pair.masks if str(path) in about]
        if found and len(chosen) < MAX_DAMAGED:
            chosen[pair] = found[0]
    by_image = {str(pair.image): pair for pair in pairs}
    readable = [by_image[image] for image in info["image"]] if len(info) else []
    odd = {readable[row]: reason for row, reason in find_oddities(info, names).items()}
    for pair, reason in list(odd.items())[:MAX_ODD]:
        chosen.setdefault(pair, reason)
    others = [pair for pair in readable if pair not in chosen]
    room = min(thumbnails.MOST - len(chosen), len(others))
    for place in np.linspace(0, len(others) - 1, room).round().astype(int):
        chosen[others[place]] = ""
    return list(chosen.items())


def _pictures(
    pairs: Sequence[Pair],
    dataset: Dataset,
    preprocessing: Preprocessing,
    problems: Sequence[str],
    fields: dict[str, Any],
) -> str:
    """Show the chosen pairs: odd ones first."""
    names = preprocessing.classes.names
    chosen = choose_pairs(pairs, dataset.info, names, problems)
    drawn = thumbnails.draw_all(chosen, preprocessing, fields.get("window", ""))
    root = Path(os.path.commonpath([pair.image.parent for pair in pairs]))
    palette = _palette(dataset.channels)
    odd = [_tile(one, root, palette) for one in drawn if one.reason]
    others = [_tile(one, root, palette) for one in drawn if not one.reason]
    shown = f"{len(drawn)} of {len(pairs)} are shown"
    if len(drawn) == len(pairs):
        shown = f"all {len(pairs)} are shown"
    chips = [charts.chip(name, palette[i % len(palette)]) for i, name in enumerate(names)]
    parts = [
        f"<h2>Images and masks: {shown}</h2>",
        f'<p class="legend">Outlines: {" ".join(chips)}. A click enlarges a picture.</p>',
        '<label><input type="checkbox" id="outlines" checked> show the outlines</label>',
    ]
    if odd:
        parts.append(f'<h3>Look at these first</h3><div class="tiles">{"".join(odd)}</div>')
    if others:
        parts.append(f'<h3>Some of the others</h3><div class="tiles">{"".join(others)}</div>')
    return "".join(parts)


def _tile(one: Thumbnail, root: Path, palette: Sequence[str]) -> str:
    """Show a picture with its file name and the reason why it is shown."""
    image = one.pair.image
    name = str(image.relative_to(root)) if image.is_relative_to(root) else image.name
    name = html.escape(name)
    under = f'<b title="{name}"><bdi>{name}</bdi></b>'
    for text in (one.note, one.reason):
        under += f"<span>{html.escape(text)}</span>" if text else ""
    caption = f"<figcaption>{under}</figcaption>"
    if not one.webp:
        return f'<figure class="tile"><div class="none">cannot be read</div>{caption}</figure>'
    height, width = one.size
    paths = ""
    for i, path in enumerate(one.outlines):
        colour = palette[i % len(palette)]
        paths += f'<path d="{path}" fill="{colour}" stroke="{colour}"/>' if path else ""
    # <details> opens and closes without a script, by mouse and by keyboard.
    return (
        f'<figure class="tile"><details name="zoom"><summary title="enlarge">'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name} and its mask">'
        f'<image width="{width}" height="{height}" href="data:image/webp;base64,{one.webp}"/>'
        f'<g class="outlines">{paths}</g></svg></summary></details>{caption}</figure>'
    )


def _palette(channels: int) -> list[str]:
    """Give each class a CSS colour. On colour images, which are often red, red comes last."""
    colours = COLOURS if channels == 1 else COLOURS[::-1]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours]
