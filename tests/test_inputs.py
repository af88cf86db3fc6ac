"""What predict.py --input finds, how results are named, what a bad file costs."""

import csv
import dataclasses
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_medical import ct_slice

import utils
from imaging import formats, pictures, writing
from imaging.channel_files import channel_endings
from imaging.files import file_stem
from imaging.scan import Scan
from inference import inputs, measurements, models, output_names, outputs, segment_files
from inference.inputs import Input, list_inputs, read_input
from inference.output_names import name_outputs
from inference.problems import Problems
from inference.segment import Options, Prediction
from utils import UserError

GREY = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)


def draw(path: Path) -> Path:
    pictures.write_picture(path, GREY)
    return path


def names_of(folder: Path, **more) -> list[str]:
    return [item.name for item in list_inputs(folder, **more).items]


# ---------------------------------------------------------------------------------------- listing


def test_folders_in_folders_are_followed_and_litter_is_not(tmp_path):
    for name in ("a.png", "x/a.png", "x/y/b.jpg"):
        draw(tmp_path / name)
    for name in ("@eaDir/a.png", "__MACOSX/a.png", ".hidden/a.png", "x/._a.png"):
        draw(tmp_path / name)
    for name in (".DS_Store", "Thumbs.db", "x/desktop.ini", "~$table.xlsx"):
        (tmp_path / name).write_text("litter")
    (tmp_path / "x" / "back").symlink_to(tmp_path)
    found = list_inputs(tmp_path)
    assert [item.name for item in found.items] == ["a", "x/a", "x/y/b"]
    assert found.passed_over == [] and found.problems == []


def test_files_that_are_no_images_are_named_and_others_told_by_their_content(tmp_path):
    draw(tmp_path / "a.png").rename(tmp_path / "picture.scan")
    draw(tmp_path / "b.tif").rename(tmp_path / "plain")
    ct_slice(0, 0, {}).save_as(tmp_path / "c.ima", enforce_file_format=True)
    (tmp_path / "notes.xyz").write_text("BM is how a bitmap begins")
    (tmp_path / "raw.bin").write_bytes(bytes(2000))
    with zipfile.ZipFile(tmp_path / "patients.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    found = list_inputs(tmp_path)
    assert sorted(item.name for item in found.items) == ["c", "picture", "plain"]
    assert inputs.describe_passed_over(found.passed_over) == (
        "passed over 3 file(s) that are no images: notes.xyz, patients.xlsx, raw.bin"
    )
    for item in found.items:
        assert read_input(item).pixels.size


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.txt").write_text("?")
    with pytest.raises(UserError, match=r"no image, passed over 1 file\(s\).*: a.txt; expected"):
        list_inputs(tmp_path)
    with pytest.raises(UserError, match="does not exist; --input takes"):
        list_inputs(tmp_path / "nowhere")


def test_the_results_of_an_earlier_call_are_no_input(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "out" / "a.png")
    assert names_of(tmp_path, output=tmp_path / "out") == ["a", "out/a"]  # perhaps images
    table = tmp_path / "out" / inputs.MEASUREMENTS
    table.parent.mkdir()
    table.write_text("")
    assert names_of(tmp_path, output=tmp_path / "out") == ["a"]
    found = inputs.list_inputs(tmp_path, tmp_path / "elsewhere")
    assert [item.name for item in found.items] == ["a"]
    assert found.notes == [f"{tmp_path / 'out'} holds earlier results, so it is left out"]


def test_the_results_of_a_killed_call_are_no_input(tmp_path):
    draw(tmp_path / "a.png")
    (item,) = list_inputs(tmp_path).items
    scan = read_input(item)
    found = Prediction(np.zeros(scan.pixels.shape[:3], np.uint8), None, 0.0, None, None)
    writer = outputs.Writer(tmp_path / "out", utils.make_metadata(["x"], (16, 16), 1))
    writer.write(item, scan, found)  # and no more
    assert (tmp_path / "out" / "a.png").is_file()
    assert names_of(tmp_path, output=tmp_path / "out") == ["a"]


def test_headers_that_cannot_be_read_stop_nothing(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "b.mhd").mkdir()
    assert names_of(tmp_path) == ["a"]


def test_series_are_named_by_their_folders(tmp_path):
    for name in ("", "one", "two/1.2.840.1"):
        (tmp_path / "ct" / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            ct_slice(i, 5 * i, {}).save_as(
                tmp_path / "ct" / name / f"IM{i}", enforce_file_format=True
            )
    found = list_inputs(tmp_path / "ct")
    assert [item.name for item in found.items] == ["ct", "one", "two/1.2.840.1"]
    for item in found.items:
        assert item.is_volume and len(item.files) == 3
        assert read_input(item).pixels.shape[0] == 3


def test_the_files_of_channels_are_one_image(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "c"):
        draw(tmp_path / f"{name}.png")
    assert names_of(tmp_path) == ["a_0000", "a_0001", "b_0000", "c"]
    endings = channel_endings([tmp_path / "a_0000.png", tmp_path / "a_0001.png"])
    found = list_inputs(tmp_path, endings=endings)
    assert sorted(item.name for item in found.items) == ["a", "c"]
    assert (
        "b_0000.png: channels are missing; this model expects b_0000, b_0001" in found.problems[0]
    )
    (item,) = (item for item in found.items if item.name == "a")
    assert read_input(item).pixels.shape == (1, 40, 50, 2)
    (alone,) = list_inputs(tmp_path / "a_0001.png", endings=endings).items
    assert alone.files == item.files


@pytest.mark.parametrize(
    ("names", "endings"),
    [
        (["p1_t1.nii.gz", "p1_flair.nii.gz"], ("_t1", "_flair")),
        (["x_0000.png", "x_0001.png"], ("_0000", "_0001")),
        (["p-1-ch0.tif", "p-1-ch1.tif"], ("-ch0", "-ch1")),
        (["t1.png", "t2.png"], ("t1", "t2")),
        (["x.png"], ()),
        (["a/x.png", "b/x.png"], ()),
    ],
)
def test_channels_are_known_by_how_their_names_end(names, endings):
    assert channel_endings([Path(name) for name in names]) == endings


def test_channels_without_a_name_of_their_own_are_named_by_their_folder(tmp_path):
    for name in ("p1/t1.png", "p1/t2.png", "p2/t1.png", "p2/t2.png"):
        draw(tmp_path / name)
    assert names_of(tmp_path, endings=("t1", "t2")) == ["p1", "p2"]


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("1.2.840.1.0", "1.2.840.1.0"),
        ("1.2.840.1.0.dcm", "1.2.840.1.0"),
        ("a.nii.gz", "a"),
        ("A.NII.GZ", "A"),
        ("v1.2.png", "v1.2"),
        ("x.ima", "x"),
        ("IM0001", "IM0001"),
        (".png", ".png"),
    ],
)
def test_stems(name, stem):
    assert file_stem(Path("nowhere") / name) == stem


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["x.png", "x.jpg"], ["x", "x_jpg"]),
        (["x.jpg", "x.png"], ["x_jpg", "x"]),
        (["x.jpg", "x.png", "x_jpg.png"], ["x_2", "x", "x_jpg"]),
        (["x.jpg", "x.jpeg", "x.bmp"], ["x", "x_jpeg", "x_bmp"]),
        (["Scan.png", "scan.png"], ["Scan", "scan_png"]),
        (["e\u0301.png", "\u00e9.jpg"], ["e\u0301", "\u00e9_jpg"]),
        (["a/x.png", "b/x.png"], ["a/x", "b/x"]),
        (["panels/x.png", "x.png"], ["panels_/x", "x"]),
        (["1.2.3", "1.2.4"], ["1.2.3", "1.2.4"]),
    ],
)
def test_no_result_replaces_another(files, names):
    paths = [Path(file) for file in files]
    stems = [path.with_name(file_stem(path)).as_posix() for path in paths]
    found = name_outputs([(stem, path.name) for stem, path in zip(stems, paths, strict=True)])
    assert found == names


@pytest.mark.parametrize("letter", ["b", "é", "心", "\U0001f600"])
def test_long_names_fit_and_stay_apart(letter):
    size = len(os.fsencode(letter))
    long = [letter * (250 // size) + end for end in "12"]
    found = name_outputs([(name, f"{name}.png") for name in long])
    assert len(set(found)) == 2 and all(
        len(os.fsencode(name)) <= output_names.MAX_BYTES for name in found
    )
    fits = letter * (output_names.MAX_BYTES // size)
    assert name_outputs([(fits, f"{fits}.png")]) == [fits]


def test_names_of_any_kind_are_written(tmp_path):
    names = ["b" * 245, "心" * 80, "two\nlines", "quote'\"", " spaces ", "100%", "-dash", "a,b;c"]
    for name in names:
        draw(tmp_path / "in" / f"{name}.png")
    done = segment(tmp_path)
    assert done == (len(names), [])
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(names)
    assert {path.stem for path in (tmp_path / "out" / "panels").glob("*.png")} == set(names)
    with (tmp_path / "out" / inputs.MEASUREMENTS).open(newline="", encoding="utf-8") as file:
        assert {Path(row["image"]).stem for row in csv.DictReader(file)} == set(names)


def test_a_name_that_is_no_text_is_a_problem(tmp_path):
    draw(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    found = list_inputs(tmp_path)
    assert [item.name for item in found.items] == ["a"]
    assert "\\udcff.png: its name is not UTF-8; rename it" in found.problems[0]


# ------------------------------------------------------------------------------- what a file costs


class Bright:
    """A network whose one class is what is bright; it fails for black images."""

    def predict_on_batch(self, images):
        if not images.reshape(len(images), -1).any(1).all():
            raise ZeroDivisionError("a black image")
        return np.float32(images[..., :1])


METADATA = {"classes": ["bright"], "channels": 1, "image_size": [32, 32], "threshold": 0.5}


def segment(tmp_path, kind="", **options):
    found = list_inputs(tmp_path / "in")
    members = [(Bright(), METADATA)]
    output = tmp_path / "out"
    return segment_files.segment_files(members, found.items, output, Options(**options), kind=kind)


def test_an_image_of_other_channels_than_the_network_is_named(tmp_path):
    draw(tmp_path / "in" / "a.png")
    np.save(tmp_path / "in" / "two.npy", np.stack([GREY, GREY], -1))
    count, problems = segment(tmp_path)
    name = tmp_path / "in" / "two.npy"
    assert (count, problems) == (
        1,
        [f"{name}: an image of 2 channels; the network takes 1 channel"],
    )


def test_an_unforeseen_error_costs_one_file(tmp_path, monkeypatch):
    for name in "abcdef":
        draw(tmp_path / "in" / f"{name}.png")
    pictures.write_picture(tmp_path / "in" / "black.png", 0 * GREY)
    write_mask, read = writing.write_mask, formats.read_named_scan

    def failing_read(path, *rest, **more):
        if path.stem == "b":
            raise RecursionError("deep")
        return read(path, *rest, **more)

    def failing_write(path, *rest):
        if path.name == "c":
            raise KeyError("lost")
        return write_mask(path, *rest)

    monkeypatch.setattr(formats, "read_named_scan", failing_read)
    monkeypatch.setattr(writing, "write_mask", failing_write)
    count, problems = segment(tmp_path)
    assert count == 4
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == list("adef")
    assert sorted(line.split(":")[0].rpartition("/")[2] for line in problems) == [
        "b.png",
        "black.png",
        "c.png",
    ]
    log = (tmp_path / "out" / "errors.log").read_text()
    assert "RecursionError" in log and "ZeroDivisionError" in log and "KeyError" in log
    assert all("errors.log" in line for line in problems)


def test_an_error_of_the_user_needs_no_log(tmp_path):
    problems = Problems(tmp_path)
    problems.add("x", UserError("a.png: wrong\nb.png: wrong"))
    problems.add("x.png", OSError(28, "No space left on device", "out/x.png"))
    assert problems.lines[:2] == ["a.png: wrong", "b.png: wrong"]
    assert "No space left" in problems.lines[2] and not problems.log.exists()


# ------------------------------------------------------------------------------------ measurements


def test_measurements_are_right(tmp_path):
    pixels = np.arange(2 * 30 * 40, dtype=np.int16).reshape(2, 30, 40, 1)
    plane = np.zeros((2, 30, 40), bool)
    plane[0, 3:7, 10:15] = plane[1, 20, 39] = True
    scan = Scan(pixels, spacing_mm=(5.0, 0.5, 2.0))
    (row, empty) = measurements.measure_classes(np.uint8(plane), ["a", "b"], scan)
    assert row == {
        "class": "a",
        "area_pixels": 21,
        "volume_ml": 0.105,
        "components": 2,
        "first_slice": 0,
        "last_slice": 1,
        "top": 3,
        "bottom": 20,
        "left": 10,
        "right": 39,
        "mean_grey": pytest.approx(pixels[plane].mean(), rel=1e-5),
    }
    assert empty == {"class": "b", "area_pixels": 0, "volume_ml": 0.0, "components": 0}
    flat = Scan(pixels[:1], spacing_mm=(1.0, 0.5, 2.0))
    assert measurements.measure_classes(plane[:1], ["a"], flat)[0]["area_mm2"] == 20
    assert "area_mm2" not in measurements.measure_classes(plane[:1], ["a"], Scan(pixels[:1]))[0]


def test_measurements_of_earlier_calls_stay_while_their_masks_do(tmp_path):
    for name in "ab":
        draw(tmp_path / "in" / f"{name}.png")
        segment(tmp_path)
        (tmp_path / "in" / f"{name}.png").unlink()
    with (tmp_path / "out" / inputs.MEASUREMENTS).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mask"] for row in rows] == ["a.png", "b.png"]
    mask = formats.read_image(tmp_path / "out" / "a.png")
    assert int(rows[0]["area_pixels"]) == np.count_nonzero(mask) > 0
    (tmp_path / "out" / "a.png").unlink()
    draw(tmp_path / "in" / "c.png")
    segment(tmp_path)
    with (tmp_path / "out" / inputs.MEASUREMENTS).open() as file:
        assert [row["mask"] for row in csv.DictReader(file)] == ["b.png", "c.png"]


def test_notes_are_printed_once(tmp_path, capsys, monkeypatch):
    read = formats.read_named_scan

    def noting(path, *rest, **more):
        return dataclasses.replace(read(path, *rest, **more), notes=("turned by its tag",))

    monkeypatch.setattr(formats, "read_named_scan", noting)
    for name in "abcd":
        draw(tmp_path / "in" / f"{name}.png")
    segment(tmp_path)
    out = capsys.readouterr().out
    assert out == "note  4 files: turned by its tag (a.png, b.png, c.png, …)\n"


# ---------------------------------------------------------------------------------- paths of models


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("m [1], x/m.h5", ["m [1], x/m.h5"]),
        ("runs [old]/fold*/m.h5", ["runs [old]/fold0/m.h5", "runs [old]/fold1/m.h5"]),
        ("runs, old/fold*/m.h5", ["runs, old/fold0/m.h5", "runs, old/fold1/m.h5"]),
        ("runs [old]/fold0/m.h5,plain/m.h5", ["runs [old]/fold0/m.h5", "plain/m.h5"]),
        (
            "runs, old/fold[01]/m.h5,plain/*.h5",
            ["runs, old/fold0/m.h5", "runs, old/fold1/m.h5", "plain/m.h5"],
        ),
        ("plain/../plain/m.h5", ["plain/../plain/m.h5"]),
        ("gone.h5,plain/m.h5", ["gone.h5", "plain/m.h5"]),
        ("**/fold0/m.h5", ["runs [old]/fold0/m.h5", "runs, old/fold0/m.h5"]),
    ],
)
def test_models_are_found_by_name_first_then_by_pattern(tmp_path, monkeypatch, pattern, expected):
    for name in (
        "m [1], x",
        "runs [old]/fold0",
        "runs [old]/fold1",
        "runs, old/fold0",
        "runs, old/fold1",
        "plain",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "m.h5").touch()
    monkeypatch.chdir(tmp_path)
    assert models.expand_paths(pattern) == expected
    if not pattern.startswith(("gone", "**")) and ",plain" not in pattern:
        absolute = [str(tmp_path / path) for path in expected]
        assert models.expand_paths(f"{tmp_path}/{pattern}") == absolute


def test_a_long_name_is_written_whole_or_not_at_all(tmp_path):
    with utils.atomic(tmp_path / ("b" * 251 + ".png")) as temporary:
        assert len(temporary.name) < 255 and temporary.suffix == ".png"
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["b" * 251 + ".png"]


def test_inputs_are_told_by_their_path():
    assert Input("a", (Path("x/1"), Path("x/2")), is_volume=True).path == Path("x")
    assert Input("a", (Path("x/1"),), is_volume=True).path == Path("x/1")
