"""Rooms: one job per file, imports point one way."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "archive": {"cli", "engines", "images"},
    "cli": {"images"},
    "serve": {"cli", "images"},
    "images": {"medical"},  # to decode; what is decoded to is defined in images
    "medical": {"images"},
    "phantom": {"images"},
    "augment": set(),
    "cache": {"images"},
    "pairing": {"images"},
    "engines": {"images"},
    "gate": {"cli", "engines", "images"},
    "cluster": {"images"},
    "data": {"augment", "cache", "cluster", "download", "images", "pairing", "report"},
    "download": {"images"},
    "report": {"cache", "images"},
    "model": {"draw", "images"},
    "metrics": {"images"},
    "utils": {"engines", "images"},
    "draw": {"images"},
    "predict": {"augment", "cli", "draw", "engines", "images", "metrics", "pairing", "utils"},
    "export": {"augment", "cli", "engines", "gate", "images", "phantom", "predict", "utils"},
    "on_device": {"augment", "cache", "cluster", "data"},
    "optimizer": set(),
    "recorder": {"cluster", "images", "utils"},
    "corruptions": {"images"},
    "benchmark": {
        "data",
        "engines",
        "images",
        "pairing",
        "phantom",
        "predict",
        "rival",
        "train",
        "utils",
    },
    "rival": {
        "cli",
        "data",
        "images",
        "optimizer",
        "pairing",
        "phantom",
        "predict",
        "train",
        "utils",
    },
    "experiments": {
        "archive",
        "corruptions",
        "images",
        "metrics",
        "pairing",
        "predict",
        "recorder",
    },
    "train": {
        "augment",
        "cli",
        "cluster",
        "data",
        "draw",
        "images",
        "metrics",
        "model",
        "on_device",
        "optimizer",
        "pairing",
        "phantom",
        "predict",
        "recorder",
        "utils",
    },
}


def is_main_guard(node):
    """What an import does not run."""
    return isinstance(node, ast.If) and any(
        name in ast.unparse(node.test) for name in ("__main__", "TYPE_CHECKING")
    )


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    imported = set()
    for node in tree.body:
        if is_main_guard(node):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                imported |= {alias.name for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                imported.add(inner.module)
    assert imported & set(MAY_IMPORT) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_nothing_is_done_at_import(name):
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    rest = [
        node for node in tree.body[1:] if not isinstance(node, allowed) and not is_main_guard(node)
    ]
    assert not rest, ast.unparse(rest[0])


def test_every_script_is_in_the_table():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


def test_images_and_phantoms_load_no_keras():
    code = "import sys, images, phantom; sys.exit(any(m in sys.modules for m in ('keras', 'tensorflow', 'jax')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", ["train", "predict"])
@pytest.mark.parametrize("flag", ["--help", "--no-such-flag"])
def test_help_and_wrong_flags_are_answered_before_keras_is_loaded(name, flag):
    code = f"""import runpy, sys
sys.argv = ["{name}.py", "{flag}"]
try:
    runpy.run_path("{name}.py", run_name="__main__")
except SystemExit as end:
    print("loaded:", sorted({{"keras", "tensorflow", "pandas", "sklearn"}} & set(sys.modules)), end.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"loaded: [] {0 if flag == '--help' else 2}" in done.stdout, done.stdout + done.stderr
