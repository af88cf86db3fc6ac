"""Measure the peak memory of predicting whole slides and long volumes, beside their masks."""

import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import utils
from benchmarks.scripts import python_command, run_script
from benchmarks.table import make_row, write_rows
from imaging import pictures
from utils import UserError

TILE, ROWS = 256, 32
# Runs a script, and prints the peak memory of that process alone.
SCRIPT = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def large(*, side: int = 20_000, slices: int = 600) -> None:
    """Predict TIFFs of side x side pixels and volumes of 512x512 x slices; measure the peak memory.

    The networks are tiny; a large one needs more. A gigabyte is 2**30 bytes.

    Args:
        side: rows and columns of the TIFFs; 0 leaves them out
        slices: of the volumes; 0 leaves them out
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for channels in (1, 3) if side else ():
            draw_pictures(folder / f"pictures{channels}", channels)
            model = train(folder / f"pictures{channels}", "--patch-size", str(TILE))
            for path in draw_slides(folder, side, channels):
                rows += measure(path, model, f"{side}x{side}", side**2)
                path.unlink()
        if slices:
            draw_volume(folder / "volumes", 40)
            model = train(folder / "volumes", "--dimensions", "3", "--patch-size", "32,64,64")
            for path in draw_long_volumes(folder, slices):
                rows += measure(path, model, f"512x512x{slices}", slices * 512**2)
    write_rows(rows)


def train(data: Path, *flags: str) -> Path:
    """Train a tiny network for an epoch, and return its file."""
    tiny = ["--filters", "4", "--depth", "2", "--epochs", "1", "--batch-size", "2"]
    run = data.with_name(f"{data.name}_run")
    run_script("train.py", "--data-dir", str(data), "--out-dir", str(run), *tiny, *flags)
    return run / "model.h5"


def measure(path: Path, model: Path, size: str, mask_bytes: int) -> list[dict]:
    """Predict a file, and return rows: peak memory beside the mask, and seconds."""
    flags = ["--model", str(model), "--input", str(path), "--output", f"{path}_masks"]
    command = python_command("-c", SCRIPT, *python_command("predict.py", *flags))
    start = time.perf_counter()
    done = subprocess.run(command, cwd=utils.ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the prediction failed:\n{done.stderr[-500:]}")
    seconds, peak = time.perf_counter() - start, int(done.stdout) * 2**10
    what = f"predict.py on {path.name}, {size}"
    print(f"{what}: peak {peak / 2**30:.2f} GB, {seconds:.0f} s", flush=True)
    return [
        make_row(f"{what}: peak beside the mask", "GB", [(peak - mask_bytes) / 2**30]),
        make_row(what, "s", [seconds]),
    ]


# ---------------------------------------------------------------------------------------- drawing


def draw_region(y: int, x: int, height: int, width: int, channels: int) -> np.ndarray:
    """Draw a part of an endless picture: (height, width, channels)."""
    rows, columns = np.mgrid[y : y + height, x : x + width]
    grey = np.uint8(128 + 90 * np.sin(columns / 90) * np.cos(rows / 110))
    return np.stack([grey, 255 - grey, grey // 2][:channels], axis=-1)


def draw_pictures(folder: Path, channels: int) -> None:
    """Draw pairs to train on: parts of the endless picture, and where it is bright."""
    for number in range(10):
        picture = draw_region(700 * number, 900 * number, 512, 512, channels)
        mask = np.uint8(255) * (picture[..., 0] > 150)
        pictures.write_picture(folder / "images" / f"{number}.png", picture)
        pictures.write_picture(folder / "masks" / f"{number}.png", mask)


def draw_slides(folder: Path, side: int, channels: int) -> Iterator[Path]:
    """Draw large TIFFs: striped if they are grey, tiled if they are in colour."""
    import tifffile

    def tiles() -> Iterator[np.ndarray]:
        for y in range(0, side, TILE):
            for x in range(0, side, TILE):
                yield draw_region(y, x, TILE, TILE, channels)

    def strips() -> Iterator[bytes]:
        for y in range(0, side, ROWS):
            strip = draw_region(y, 0, min(ROWS, side - y), side, channels).tobytes()
            yield zlib.compress(strip, 1) if kind == "zlib" else strip

    shape = (side, side, channels) if channels > 1 else (side, side)
    for kind in ("jpeg", "zlib") if channels > 1 else (None, "zlib"):
        path = folder / f"{'tiles' if channels > 1 else 'strips'}_{kind or 'plain'}.tif"
        more = {"tile": (TILE, TILE)} if channels > 1 else {"rowsperstrip": ROWS}
        more |= {"photometric": "rgb" if channels > 1 else "minisblack", "compression": kind}
        parts = tiles() if channels > 1 else strips()
        tifffile.imwrite(path, parts, shape=shape, dtype=np.uint8, maxworkers=1, **more)
        yield path


def draw_slice(number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a slice of a CT (side, side), a bright disc in noise, and its mask."""
    rows, columns = np.ogrid[:side, :side]
    radius = side * (0.25 + 0.1 * np.sin(number / 20))
    mask = np.hypot(rows - side / 2, columns - side / 2) < radius
    noise = np.random.default_rng(number).integers(-60, 60, (side, side))
    return np.int16(np.where(mask, 200, -300) + noise), np.uint8(mask)


def draw_volume(folder: Path, slices: int) -> None:
    """Draw pairs of volumes to train on."""
    for number in range(6):
        parts = [draw_slice(10 * number + i, 96) for i in range(slices)]
        for name, part in zip(("images", "masks"), zip(*parts, strict=True), strict=True):
            save_nifti(folder / name / f"{number}.nii.gz", np.stack(part, axis=-1))


def save_nifti(path: Path, voxels: np.ndarray) -> None:
    """Save voxels (x, y, z)."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-0.7, -0.7, 1, 1])), path)


def draw_long_volumes(folder: Path, slices: int) -> Iterator[Path]:
    """Draw a volume of 512x512 as NIfTI, plain and packed, and as a DICOM series."""
    voxels = np.stack([draw_slice(number, 512)[0] for number in range(slices)], axis=-1)
    for name in ("volume.nii", "volume.nii.gz"):
        save_nifti(folder / name, voxels)
        yield folder / name
    series = folder / "series"
    series.mkdir()
    for number in range(slices):
        save_dicom(series / f"IM{number}", voxels[..., number].T, number)
    yield series


def save_dicom(path: Path, pixels: np.ndarray, number: int) -> None:
    """Save a slice (H, W) of a CT, in pydicom's example file."""
    import pydicom
    from pydicom.data import get_testdata_file

    header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
    header.SeriesInstanceUID, header.InstanceNumber = "1.2.3", number + 1
    header.Rows, header.Columns = pixels.shape
    header.PixelSpacing, header.SliceThickness = [0.7, 0.7], 1
    header.ImagePositionPatient = [0, 0, number]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelRepresentation, header.BitsStored, header.HighBit = 1, 16, 15
    header.PixelData = np.int16(pixels).tobytes()
    header.save_as(path)
