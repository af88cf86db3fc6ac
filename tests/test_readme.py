"""The documentation is part of the product: what README.md and docs/ name exists."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import data
import export
import metrics
import model
import predict
import serve
import train
import utils
from benchmarks import figures, gpu
from benchmarks.accuracy.__main__ import COMMANDS as STUDIES
from benchmarks.speed.__main__ import COMMANDS as SPEEDS
from dicom_node import __main__ as dicom_node
from imaging import formats, scan
from inference import archive, precision_check
from serving import smoke

README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
CONFIGS = (
    train.Config,
    predict.Config,
    export.Config,
    serve.Config,
    model.Config,
    archive.Config,
    precision_check.Config,
    figures.Config,
    smoke.Config,
    gpu.Config,
    dicom_node.Config,
)
COMMANDS = (data.check, data.download, data.phantoms, metrics.compare, *STUDIES, *SPEEDS)
# Flags of every script of ours, of pip, of torchrun, and of Triton.
OTHER_FLAGS = {
    "--from-report",
    "--help",
    "--verbose",
    "--distributed",
    "--dry-run",
    "--nproc-per-node",
    "--model-repository",
    "--xla",
    "--build-arg",  # of Docker
    # Of pip-audit and uv.
    "--require-hashes",
    "--disable-pip",
    "--universal",
    "--generate-hashes",
    "--profile",  # of Docker Compose
}

pages = pytest.mark.parametrize("name", [path.name for path in PAGES])


def headings(text: str) -> set[str]:
    """List the anchors of a page's headings, as GitHub names them."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> list[str]:
    """List the targets of a page's links and pictures that are no web addresses."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", text)


@pages
def test_links_and_pictures_exist(name):
    page = next(path for path in PAGES if path.name == name)
    for link in links(TEXTS[name]):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), link
        if anchor:
            assert anchor in headings(file.read_text(encoding="utf-8")), link


def test_every_page_is_linked_from_the_readme():
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.name}" in links(TEXTS["README.md"]), path.name


def test_the_readme_names_every_script_and_folder():
    folders = [path.parent.name for path in ROOT.glob("*/*.py")]
    for name in [*(path.name for path in ROOT.glob("*.py")), *(f"{name}/" for name in folders)]:
        assert f"`{name}`" in TEXTS["README.md"] or name == "tests/", name


@pages
def test_nothing_is_left_to_fill_in(name):
    assert "@@" not in TEXTS[name]


@pages
def test_lines_are_short(name):
    for line in TEXTS[name].splitlines():
        assert len(line) <= 120 or line.startswith("|") or "](" in line, line


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].split()) <= 950


def known_flags() -> set[str]:
    """List the flags of all scripts, --no-… of the switches included."""
    fields = [field for config in CONFIGS for field in dataclasses.fields(config)]
    switches = {field.name for field in fields if field.type in (bool, "bool")}
    names = {field.name for field in fields}
    for command in COMMANDS:
        names |= set(inspect.signature(command).parameters)
    names |= {f"no_{name}" for name in switches}
    return {"--" + name.replace("_", "-") for name in names} | OTHER_FLAGS


@pages
def test_every_flag_exists(name):
    if name == "CHANGELOG.md":  # names old flags
        return
    flags = known_flags()
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[name]):
        assert flag in flags, flag


@pages
def test_every_script_and_module_exists(name):
    if name == "CHANGELOG.md":  # names old files
        return
    text = TEXTS[name]
    for path in re.findall(r"`([\w/]+\.(?:py|yaml|txt|h5|onnx|json))`", text):
        folders = (ROOT, ROOT / "deploy", ROOT / "files" / "lungs")
        written = ("export", "results/", "config.json", "manifest.json", "labels.txt")
        written += ("reason.txt", "aliases.json")  # by the DICOM node, by an operator
        made = any(word in path for word in written)
        # Files of data sets.
        made |= Path(path).stem in ("dataset", "annotations", "scan7", "labelmap", "labels")
        made |= path.startswith("annotations/")
        made |= Path(path).suffix in (".h5", ".onnx")  # a run or an export makes it
        assert made or any((folder / path).exists() for folder in folders), path
    for module in re.findall(r"python -m ([a-z_]+\.[a-z_]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_three_values_to_change_are_settings():
    for name in ("image_size", "filters", "batch_size"):
        assert f"`{name} = " in TEXTS["README.md"]
        assert name in {field.name for field in dataclasses.fields(train.Config)}


def test_every_setting_is_documented_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| .+ \|$", TEXTS["training.md"], re.MULTILINE)
    documented = {name: ast.literal_eval(default) for name, default in rows}
    assert documented == dataclasses.asdict(train.Config())


def test_every_architecture_and_loss_is_documented():
    for name in model.ARCHITECTURES:
        assert f"`{name}`" in TEXTS["models.md"], name
    for name in metrics.LOSSES:
        assert f"`{name}`" in TEXTS["training.md"].replace('"', ""), name


def test_the_extensions_of_the_contributing_page_work():
    """The architecture and the loss that docs/contributing.md adds can be computed."""
    code = re.findall(r"```python\n(def .*?)```", TEXTS["contributing.md"], re.DOTALL)
    names = {}
    for block in code:
        if "KerasTensor" in block:
            exec(block, vars(model) | vars(metrics), names)
    image = model.keras.Input((16, 16, 1))
    features = names["dropout_unet"](
        image, model.Settings(model.plan_levels((16, 16), 4, 2), "batch")
    )
    assert features.shape == (None, 16, 16, 4)
    half = metrics.ops.full((2, 8, 8, 1), 0.5)
    assert metrics.ops.all(names["log_cosh_dice_loss"](half, half) < 1e-6)


def test_the_format_of_the_contributing_page_works(tmp_path, monkeypatch):
    """The file and the line that docs/contributing.md adds are enough to read the format."""
    code = re.search(r"```python\n(MAGIC = .*?)```", TEXTS["contributing.md"], re.DOTALL)[1]
    names = vars(scan) | {"np": np}
    exec(code, names)
    added = formats.Format("PGM", (".pgm",), names["MAGIC"], names["decode_pgm"])
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, added))
    image = np.arange(400).reshape(20, 20).astype(np.uint8)
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5\n20 20\n255\n" + image.tobytes())
    assert np.array_equal(formats.read_image(path)[..., 0], image)
    with pytest.raises(utils.UserError, match="expected at most"):
        formats.read_scan(path, max_bytes=100)


def test_gpu_requirements_have_the_bounds_of_the_others():
    bounds = {}
    for name in ("requirements.txt", "requirements-gpu.txt"):
        text = (ROOT / name).read_text()
        bounds[name] = re.search(r"^tensorflow(?:\[and-cuda\])?(.+)$", text, re.MULTILINE)[1]
    assert bounds["requirements.txt"] == bounds["requirements-gpu.txt"]


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-workflows", ".github/workflows/test.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_workflow_and_citation_are_valid(schema, path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    result = subprocess.run([*command, ROOT / path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
