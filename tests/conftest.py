"""Shared fixtures: small synthetic data sets, a small training config, the real data where there
is some.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import data
import utils
from dataset.loading import Preprocessing
from dataset.phantoms import make_phantoms
from dataset.reading import read_truth
from imaging import pictures, preprocess
from imaging.grid import fit_grid
from imaging.labels import Classes
from inference.sampler import Sampler

ROOT = Path(__file__).parents[1]
_MANIFEST = json.loads((ROOT / "files" / "lungs" / "manifest.json").read_text())
HEIGHT, WIDTH = _MANIFEST["facts"]["image_size"]  # of the pretrained model's input, one channel
os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # said aloud, it starts without JAX
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["UNET_CACHE"] = ""  # tests keep no decoded images, unless they say where
# Without VNNI the sums of products of 8 bits are cut off. Such masks are refused there.
HAS_EXACT_INT8 = not utils.kind_of_cpu().endswith((" avx2", " avx512f"))


@pytest.fixture(autouse=True)
def float32_again():
    """Undo what a test that trains sets for the whole process: Keras's precision."""
    yield
    if keras := sys.modules.get("keras"):
        keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen phantoms in the Montgomery layout; read only."""
    return make_phantoms(tmp_path_factory.mktemp("data") / "phantoms", 16, seed=1)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """The folder of the bundled model's export, both lungs as one."""
    import export  # loads TensorFlow

    folder = tmp_path_factory.mktemp("served") / "export"
    model, images = ROOT / "files" / "lungs.h5", phantoms / "CXR_png"
    places = {"model": str(model), "out_dir": str(folder), "images": str(images)}
    export.export(export.Config(**places, merge="lungs", checked=1))
    return folder


@pytest.fixture(scope="session")
def xray(phantoms: Path) -> tuple[Path, np.ndarray]:
    """A phantom's file and its lungs (H, W)."""
    pair = data.find_pairs(phantoms)[0][0]
    return pair.image, read_truth(pair, Classes("lungs")).mask[0]


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Twelve grey images with a bright disc, in the images/ + masks/ layout, of various sizes;
    free to be damaged.
    """
    for i in range(12):
        rng = np.random.default_rng(i)
        height, width = 40 + 3 * i, 60 - i
        y, x = np.mgrid[:height, :width]
        disc = (y - height / 2) ** 2 + (x - rng.uniform(20, 30)) ** 2 < 12**2
        image = np.clip(60 + 120 * disc + rng.normal(0, 10, disc.shape), 0, 255).astype(np.uint8)
        pictures.write_picture(tmp_path / "discs" / "images" / f"disc{i:02d}.png", image)
        pictures.write_picture(
            tmp_path / "discs" / "masks" / f"disc{i:02d}_mask.png", 255 * disc.astype(np.uint8)
        )
    return tmp_path / "discs"


@pytest.fixture
def script():
    """Run one of the repository's scripts in a folder, as a user does."""

    def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
        name, *flags = map(str, command)
        target = ROOT / name if name.endswith(".py") else name  # or -m, and a module
        return subprocess.run(
            [sys.executable, target, *flags],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder named by UNET_DATA, holding montgomery/ and sunnybrook/; required in CI, else the
    test is skipped.
    """
    folder = Path(os.environ.get("UNET_DATA", "no UNET_DATA"))
    if not (folder / "montgomery").is_dir():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "UNET_DATA names no folder with montgomery/ in it"
        )
    return folder


def images_of(dataset):
    """All windows of a data set: (N, H, W, C)."""
    return dataset.take(dataset.cover(range(len(dataset.cases))))[0]


def masks_of(dataset):
    """The masks of all windows of a data set: (N, H, W, K)."""
    return dataset.take(dataset.cover(range(len(dataset.cases))))[1]


def load(folder, classes="x", **more):
    """Load a data set as small whole images: its pairs and cases."""
    preprocessing = Preprocessing(Classes(classes), Sampler((32, 32)), **more)
    return data.load_dataset(data.find_data(folder), preprocessing)


def flags(config):
    """Turn a config into the command line that gives it."""
    changed = [
        (f.name, getattr(config, f.name))
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    ]
    return [part for name, value in changed for part in (f"--{name.replace('_', '-')}", str(value))]


def prepare_to_fit(scan, size, channels, window=""):
    """Prepare a scan whose slices are scaled to fit."""
    grid = fit_grid(scan.pixels.shape[:3], size)
    return preprocess.prepare_scan(scan, grid, channels, window)


PLUGINS = Path("/usr/share/orthanc/plugins")  # where Debian's packages put them


@pytest.fixture(scope="session")
def pacs(tmp_path_factory):
    """The address of Orthanc with its DICOMweb plugin. Required in CI, else the test is skipped."""
    if not shutil.which("Orthanc") or not list(PLUGINS.glob("libOrthancDicomWeb*")):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Orthanc: apt-get install orthanc orthanc-dicomweb"
        )
    folder = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as http, socket.socket() as dicom:
        for one in (http, dicom):
            one.bind(("127.0.0.1", 0))
        ports = http.getsockname()[1], dicom.getsockname()[1]
    settings = {
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "HttpPort": ports[0],
        "HttpBindAddresses": ["127.0.0.1"],
        "DicomPort": ports[1],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(path) for path in PLUGINS.glob("libOrthancDicomWeb*.so*")][:1],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["Orthanc", folder / "orthanc.json"], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{ports[0]}"
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{address}/system", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)
