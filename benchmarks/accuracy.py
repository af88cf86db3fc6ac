"""Regenerate the README's tables of accuracy: each figure by `train.py` and `predict.py` themselves.

    python experiments.py ablation --data-dir DIR       one change from the default at a time, 5 folds each
    python experiments.py folds --data-dir DIR          a cross-validation, several folds at a time
    python experiments.py few --data-dir DIR            5, 10, 20, 40 labelled images, from scratch or from phantoms
    python experiments.py corruptions --run RUN         a cross-validation's models on spoilt test images
    python experiments.py uncertainty --run RUN         does disagreement foretell the error?

Writes results/ablation.csv, few.csv, corruptions-RUN.csv, uncertainty-RUN.csv. A stopped `ablation` or `few` goes on.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

import metrics
import predict
import utils
from benchmarks import corruptions
from dataset.layouts import Pair
from dataset.reading import read_pair
from imaging.scan import Scan
from inference import archive, postprocess, segment
from training.run_folder import NON_TRAINING_FIELDS
from utils import UserError, atomic

ABLATION = {
    "default": [],
    "another seed": ["--seed", "1"],  # what chance alone does
    "dice loss alone": ["--loss", "dice"],
    "residual blocks": ["--architecture", "residual"],
    "attention gates": ["--architecture", "attention"],
    "U-Net++": ["--architecture", "unet++"],
    "U-Net 3+": ["--architecture", "unet3+"],
    "group normalization": ["--normalization", "group"],
    "instance normalization": ["--normalization", "instance"],
    "no normalization": ["--normalization", "none"],
    "no augmentation": ["--augmentation", "none"],
    "strong augmentation": ["--augmentation", "strong"],
}
PREDICTION = {  # these need no training: models of the rows above, and the metadata of their model files to be changed
    "mirrored too": (["default"], {"mirror": True}),
    "not cleaned": (["default"], {"clean": None}),
    "both seeds averaged": (["default", "another seed"], {}),
}
FOLDS = 5
LABELLED = (5, 10, 20, 40)
SEEDS = (0, 1, 2)
FEW_FOLDS = 2  # half of the images are the test set


def run_all(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Run `train.py` with each list of flags, `jobs` at a time, each on its share of the cores (on Linux).

    Where RAY_ADDRESS names a cluster, they run there instead, as many as it has room for, each with `jobs` CPUs.
    Raises UserError with the last lines of what a failed one said.
    """
    if jobs < 1:
        raise UserError(f"jobs is {jobs}; expected at least 1")
    if os.environ.get("RAY_ADDRESS"):
        return run_on_cluster(commands, jobs)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[i::jobs] for i in range(jobs)]

    def run(flags: Sequence[str]) -> None:
        share = shares.pop()
        command = [sys.executable, str(utils.ROOT / "train.py"), *flags]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if share:
            os.sched_setaffinity(process.pid, share)  # before it has threads of its own
        said = process.communicate()[0]
        shares.append(share)
        check_run(flags, process.returncode, said)

    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(run, commands), "training", len(commands), unit="run", disable=None))
    return None


def check_run(flags: Sequence[str], code: int, said: str) -> None:
    """Raise UserError with the last lines of what a training said, if it failed."""
    if code:
        reason = said[
            max(0, said.rfind("\nerror: ")) :
        ].strip()  # a traceback has no such line, and is told whole
        raise UserError(f"python train.py {' '.join(flags)} failed:\n{reason}")


def run_on_cluster(commands: Sequence[Sequence[str]], cpus: int) -> None:
    """Run `train.py` with each list of flags as tasks of the Ray cluster; one whose machine dies goes on elsewhere.

    Every machine needs this repository, the data and the run folders at the same paths.
    """

    archive.connect()
    import ray

    here, environment = str(Path.cwd()), os.environ | {"TF_NUM_INTRAOP_THREADS": str(cpus)}

    @ray.remote(num_cpus=cpus, max_retries=3)
    def run(flags: Sequence[str]) -> tuple[int, str]:
        command = [sys.executable, str(utils.ROOT / "train.py"), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, cwd=here, env=environment, text=True, check=False, **pipes)
        return done.returncode, done.stdout

    waiting = {run.remote(list(flags)): flags for flags in commands}
    with tqdm(total=len(commands), desc="training", unit="run", disable=None) as bar:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            check_run(waiting.pop(done), *ray.get(done))
            bar.update()


def folds(
    data_dir: str,
    *,
    folds: int = FOLDS,
    flags: str = "",
    jobs: int = 1,
    out_dir: Path = Path("files/folds"),
) -> None:
    """Cross-validate as train.py with --folds does, several folds at a time.

    Args:
        data_dir: the data set
        folds: how many
        flags: more flags for every training, as in --flags="--epochs 100 --filters 16"
        jobs: trainings at once, each on its share of the cores; CPUs of each where RAY_ADDRESS names a cluster
        out_dir: where the runs go
    """
    common = [
        "--data-dir",
        data_dir,
        "--folds",
        str(folds),
        "--out-dir",
        str(out_dir),
        *shlex.split(flags),
    ]
    run_all([[*common, "--fold", str(fold)] for fold in range(folds)], jobs)
    subprocess.run([sys.executable, str(utils.ROOT / "train.py"), *common], check=True)


def slug(name: str) -> str:
    """Make a folder name of a row's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def read_run(folder: Path) -> tuple[pd.DataFrame, float]:
    """Read one run's table of test images, and how long it trained in seconds."""
    return pd.read_csv(folder / "metrics.csv"), float(pd.read_csv(folder / "log.csv").seconds.sum())


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a result and print it."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)
    print(f"{table.to_string(index=False, float_format='{:.4f}'.format)}\n{path}")


def ablation(
    data_dir: str,
    *,
    rows: str = "",
    flags: str = "",
    jobs: int = 1,
    out_dir: Path = Path("files/ablation"),
) -> None:
    """Train and score every fold for every row of ABLATION: results/ablation.csv.

    Args:
        data_dir: the data set
        rows: only these and the default, separated by commas, into results/ablation-rows.csv
        flags: more flags for every training, as in --flags="--epochs 100 --filters 16"
        jobs: trainings at once, each on its share of the cores; on a Ray cluster, CPUs of each
        out_dir: where the runs go
    """
    wanted = rows.split(",") if rows else [*ABLATION, *PREDICTION]
    unknown = set(wanted) - set(ABLATION) - set(PREDICTION)
    if unknown:
        raise UserError(
            f"rows has {', '.join(sorted(unknown))}; expected {', '.join([*ABLATION, *PREDICTION])}"
        )
    needed = {
        "default",
        *wanted,
        *(member for name in wanted for member in PREDICTION.get(name, [[]])[0]),
    }
    chosen = {name: change for name, change in ABLATION.items() if name in needed}
    common = ["--data-dir", data_dir, "--folds", str(FOLDS), *shlex.split(flags)]
    commands = [
        [*common, *change, "--fold", str(fold), "--out-dir", str(out_dir / slug(name))]
        for name, change in chosen.items()
        for fold in range(FOLDS)
    ]
    run_all(commands, jobs)
    runs = {
        name: [read_run(out_dir / slug(name) / f"fold{fold}") for fold in range(FOLDS)]
        for name in chosen
    }
    tables = {name: pd.concat([scores for scores, _ in folds]) for name, folds in runs.items()}
    for name, (members, metadata) in PREDICTION.items():
        if name in wanted:
            folders = [
                [out_dir / slug(member) / f"fold{fold}" for member in members]
                for fold in range(FOLDS)
            ]
            tables[name] = pd.concat([rescore(some, metadata) for some in folders])
    table = []
    for name, scores in tables.items():
        paired = metrics.compare_tables(tables["default"], scores).loc["dice"]
        row = {"change": name, "flags": " ".join(ABLATION.get(name, []))}
        row |= scores[["dice", "iou", "nsd", "hd95"]].mean().to_dict()
        row |= {
            "gain": paired["B - A"],
            "low": paired["low"],
            "high": paired["high"],
            "p": paired["p"],
        }
        trained = PREDICTION[name][0] if name in PREDICTION else [name]
        seconds = sum(seconds for row_name in trained for _, seconds in runs[row_name]) / FOLDS
        table.append(row | {"seconds a fold": seconds})
    write(
        pd.DataFrame(table), Path("results/ablation-rows.csv" if rows else "results/ablation.csv")
    )


def rescore(folders: Sequence[Path], changes: dict[str, Any]) -> pd.DataFrame:
    """Score a fold's test images again by the mean of several runs, some metadata of their model files changed."""
    config = predict.Config(model=",".join(str(folder / "model.h5") for folder in folders))
    members = [(model, metadata | changes) for model, metadata in predict.load_members(config)]
    return predict.score_pairs(members, predict.pairs_to_score(config)[0], config)[0]


def few(
    data_dir: str, *, flags: str = "", jobs: int = 1, out_dir: Path = Path("files/few")
) -> None:
    """Train on 5, 10, 20, 40 images, from scratch and from a model of phantoms, 3 seeds: results/few.csv.

    Args:
        data_dir: the data set
        flags: more flags for every training, as in --flags="--epochs 100 --filters 16"
        jobs: trainings at once, each on its share of the cores; on a Ray cluster, CPUs of each
        out_dir: where the runs go
    """
    run_all(
        [["--augmentation", "strong", "--out-dir", str(out_dir / "phantoms"), *shlex.split(flags)]],
        1,
    )
    starts = {"scratch": [], "phantoms": ["--init-weights", str(out_dir / "phantoms" / "model.h5")]}
    commands, places = [], {}
    for count, seed, start in itertools.product(LABELLED, SEEDS, starts):
        folder = out_dir / f"{start}-{count}-seed{seed}"
        places[count, seed, start] = folder / "fold0"
        split = [
            "--folds",
            str(FEW_FOLDS),
            "--fold",
            "0",
            "--val-fraction",
            "0",
            "--labelled",
            str(count),
        ]
        seeds = ["--seed", str(seed), "--split-seed", str(seed)]
        commands.append(
            [
                "--data-dir",
                data_dir,
                *split,
                *seeds,
                *starts[start],
                "--out-dir",
                str(folder),
                *shlex.split(flags),
            ]
        )
    run_all(commands, jobs)
    table = []
    for count in LABELLED:
        means, runs = {}, {}
        for start in starts:
            runs[start] = pd.concat(
                [read_run(places[count, seed, start])[0].assign(seed=seed) for seed in SEEDS]
            )
            means[start] = (
                runs[start].groupby("image", as_index=False).dice.mean()
            )  # one image, one vote
        paired = metrics.compare_tables(means["scratch"], means["phantoms"]).loc["dice"]
        row = {
            "labelled": count,
            "scratch": paired["A"],
            "phantoms": paired["B"],
            "gain": paired["B - A"],
        }
        row |= {"low": paired["low"], "high": paired["high"], "p": paired["p"]}
        for start, scores in runs.items():
            row[f"seeds, {start}"] = " ".join(
                f"{dice:.4f}" for dice in scores.groupby("seed").dice.mean()
            )
        table.append(row)
    write(pd.DataFrame(table), Path("results/few.csv"))


def read_folds(
    run: Path, uncertainty: bool = False
) -> Iterator[tuple[predict.Config, list[Any], list[Pair]]]:
    """Give each fold of a cross-validation: how to predict, its model, its test images."""
    folds = sorted(run.glob("fold*/model.h5"))
    if not folds:
        raise UserError(
            f"{run} holds no fold0/model.h5; train it with `python train.py --folds 5 --out-dir {run}`"
        )
    configs = [json.loads((path.parent / "config.json").read_text()) for path in folds]
    recipes = [
        {name: config[name] for name in config if name not in (*NON_TRAINING_FIELDS, "fold")}
        for config in configs
    ]
    if any(recipe != recipes[0] for recipe in recipes) or len(folds) != recipes[0]["folds"]:
        raise UserError(
            f"{run} does not hold all folds of one cross-validation; train it into a folder of its own"
        )
    for path in folds:
        config = predict.Config(model=str(path), uncertainty=uncertainty)
        yield config, predict.load_members(config), predict.pairs_to_score(config)[0]


def corrupted(run: Path) -> None:
    """Score every fold's model on its test images, spoilt in each of the ways: results/corruptions-RUN.csv.

    Args:
        run: the folder of a cross-validation, which holds fold0, fold1 …
    """
    rows = []
    for config, members, pairs in read_folds(run):
        metadata = members[0][1]
        for number, pair in enumerate(
            tqdm(pairs, f"spoiling for {config.model}", unit="image", disable=None)
        ):
            scan, ids = read_pair(pair, metadata["classes"], metadata.get("mask_values", ()))
            spoilt = [
                corruptions.corrupt(name, scan.pixels[0], ids[0], number)
                for name in corruptions.CORRUPTIONS
            ]
            found = segment.segment_scans(
                members, [Scan(picture[None]) for picture, _ in spoilt], config
            )
            for name, (_, truth), result in zip(
                corruptions.CORRUPTIONS, spoilt, found, strict=True
            ):
                scores = metrics.score_classes(
                    truth, postprocess.decide(result.probs, metadata), metadata["classes"]
                )
                rows.append({"corruption": name, "image": pair.image.as_posix(), **scores})
    table = (
        pd.DataFrame(rows)
        .groupby("corruption", sort=False)[["dice", "iou", "nsd", "hd95"]]
        .mean()
        .reset_index()
    )
    table["loss"] = table.dice[0] - table.dice
    mean = {"corruption": "mean, without clean", **table.iloc[1:].mean(numeric_only=True)}
    write(
        pd.concat([table, pd.DataFrame([mean])]),
        Path(f"results/corruptions-{run.absolute().name}.csv"),
    )


def uncertainty(run: Path) -> None:
    """Tell how well the disagreement of image and mirrored image foretells the error: results/uncertainty-RUN.csv.

    Args:
        run: the folder of a cross-validation, which holds fold0, fold1 …
    """
    folds = [
        predict.score_pairs(members, pairs, config)[0]
        for config, members, pairs in read_folds(run, True)
    ]
    table = pd.concat(folds)[["image", "dice", "disagreement"]]
    path = Path(f"results/uncertainty-{run.absolute().name}.csv")
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)
    rank = table.disagreement.corr(1 - table.dice, method="spearman")
    print(f"{len(table)} images: rank correlation of disagreement with 1 - Dice {rank:.2f}; {path}")


if __name__ == "__main__":
    import tyro

    commands = {
        "folds": folds,
        "ablation": ablation,
        "few": few,
        "corruptions": corrupted,
        "uncertainty": uncertainty,
    }
    utils.run_cli(
        lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__), utils.RESUMES
    )
