"""Settings, source and data together tell whether a command is the same run."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

import data
import utils
from dataset import fingerprints, split_table
from dataset.layouts import Pair
from dataset.split_table import mark_split, read_rows, read_split, write_split
from training import run_folder, run_identity
from utils import UserError


@pytest.fixture
def source(tmp_path):
    """A copy of the source, free to be edited."""
    for name in run_identity.SOURCE:
        copy = shutil.copyfile if name.endswith(".py") else shutil.copytree
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "counts"),
    [
        ("model.py", "def build_unet(", "def build_unet (  # a comment\n    ", False),
        ("model.py", '"""', '"""Another docstring. ', False),
        ("model.py", "relu", "gelu", True),
        ("metrics.py", "1e-", "2e-", True),
        ("dataset/augmentation.py", "import ", "import math\nimport ", True),
        ("imaging/preprocess.py", "99.5", "99.9", True),
        ("train.py", "epochs: int = 80", "epochs: int = 90", False),  # a setting
        ("train.py", "shuffle=False", "shuffle=True", True),
        ("dataset/report/__init__.py", "import ", "import math\nimport ", False),  # decides nothing
    ],
)
def test_a_change_of_the_source_is_told_from_a_comment(source, name, old, new, counts):
    before = run_identity.source_hashes(source)
    assert before == run_identity.source_hashes(ROOT)
    edit(source / name, old, new)
    after = run_identity.source_hashes(source)
    changed = [file for file in after if after[file] != before[file]]
    assert changed == ([name] if counts else [])


def test_a_file_that_is_no_python_is_hashed_as_it_is(source):
    (source / "dataset" / "draft.py").write_text("def (")
    before = run_identity.source_hashes(source)
    (source / "dataset" / "draft.py").write_text("def (:")
    after = run_identity.source_hashes(source)
    assert [name for name in after if after[name] != before[name]] == ["dataset/draft.py"]


def test_new_and_removed_files_are_changes(source):
    then = run_identity.source_hashes(source)
    (source / "dataset" / "extra.py").write_text("x = 1")
    (source / "dataset" / "channels.py").unlink()
    now = run_identity.source_hashes(source)
    changed = run_identity.changed_source(then, now)
    assert changed == ["dataset/extra.py", "dataset/channels.py"]
    assert run_identity.changed_source({}, now) == []  # a run of an earlier version


@dataclass(frozen=True)
class Config:
    """As many fields of train.Config as count here."""

    data_dir: str = ""
    out_dir: str = "files"
    mirror: bool = False
    image_size: int | str = 128
    patch_size: str = ""
    dimensions: str = "2"
    spacing: str = ""
    epochs: int = 3
    ignore: str = ""
    init_weights: str = ""


def test_settings_are_compared_by_their_meaning():
    then = run_identity.training_fields(Config())
    changes = [
        ({}, []),
        ({"out_dir": "x", "mirror": True}, []),
        ({"image_size": "128"}, []),
        ({"image_size": "128,128"}, []),
        ({"image_size": "128,192"}, ["image_size"]),
        ({"epochs": 4}, []),
        ({"epochs": 2}, ["epochs"]),
        ({"epochs": 4, "ignore": "255"}, ["ignore"]),
    ]
    for change, expected in changes:
        config = dataclasses.replace(Config(), **change)
        assert run_identity.changed_fields(config, then) == expected
    old = {name: value for name, value in then.items() if name != "ignore"}
    old |= {"image_size": 128, "memory_gb": 4.0, "cache_dir": "x", "distributed": True}
    assert run_identity.changed_fields(Config(), old) == []


def test_other_weights_to_start_from_are_another_run(tmp_path):
    weights = tmp_path / "start.h5"
    weights.write_bytes(b"one")
    config = Config(init_weights=str(weights))
    then = run_identity.training_fields(config)
    assert run_identity.changed_fields(config, then) == []
    weights.write_bytes(b"other")
    assert run_identity.changed_fields(config, then) == ["init_weights content"]
    weights.unlink()
    assert run_identity.changed_fields(config, then) == []


def test_a_network_of_ones_own_counts_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets").mkdir()
    hashes = []
    for text in ("def build(shape, outputs): ...", "def build(shape, outputs): return 1"):
        Path("nets/model.py").write_text(text)
        hashes.append(run_identity.source_hashes(architecture="nets/model.py:build"))
    assert run_identity.changed_source(*hashes) == ["architecture model.py"]


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with run_folder.locked(tmp_path / "run"):
        with (
            pytest.raises(UserError, match="another training writes to"),
            run_folder.locked(tmp_path / "run"),
        ):
            pass
        with run_folder.locked(tmp_path / "other"):
            pass
    with run_folder.locked(tmp_path / "run"):
        pass


# ------------------------------------------------------------------------------------------- data


@pytest.fixture
def split(discs):
    """The discs, and the split.csv of a run beside them."""
    pairs, _ = data.find_pairs(discs)
    write_split(discs.parent / "run" / "split.csv", pairs, data.split(pairs, 0.2, 0.2))
    return discs.parent / "run" / "split.csv"


def changes(discs, split):
    return run_identity.changed_data(read_rows(split), data.find_pairs(discs)[0])


def test_unchanged_data_are_the_same(discs, split):
    assert changes(discs, split) == ([], [])
    for path in discs.rglob("*.png"):
        path.touch()  # only the time
    assert changes(discs, split) == ([], [])


def test_replaced_images_and_masks_are_named(discs, split):
    shutil.copy(discs / "images" / "disc03.png", discs / "images" / "disc04.png")
    shutil.copy(discs / "masks" / "disc03_mask.png", discs / "masks" / "disc05_mask.png")
    changed, added = changes(discs, split)
    assert [Path(name).name for name in changed] == ["disc04.png", "disc05_mask.png"]
    assert added == []


def test_added_and_removed_images_are_named(discs, split):
    for folder, name in (("images", "disc{}.png"), ("masks", "disc{}_mask.png")):
        shutil.copy(discs / folder / name.format("03"), discs / folder / name.format("99"))
    changed, added = changes(discs, split)
    assert changed == [] and [Path(name).name for name in added] == ["disc99.png"]
    (discs / "images" / "disc02.png").unlink()
    with pytest.raises(UserError, match=r"disc02.png, which is gone; put it back, name another"):
        changes(discs, split)


def test_moved_data_are_the_same_and_renumbered_data_are_not(discs, split):
    rows = read_rows(split)
    moved = discs.rename(discs.with_name("elsewhere"))
    assert run_identity.is_same_data(rows, data.find_pairs(moved)[0])
    first, second = moved / "images" / "disc00.png", moved / "images" / "disc01.png"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert not run_identity.is_same_data(rows, data.find_pairs(moved)[0])


def test_a_project_that_moved_as_a_whole_finds_its_images(discs, split, tmp_path, monkeypatch):
    before = read_rows(split)
    (tmp_path / "new").mkdir()
    discs.rename(tmp_path / "new" / "discs")
    split.parent.rename(tmp_path / "new" / "run")
    after = read_rows(tmp_path / "new" / "run" / "split.csv")
    assert [row.pair.image.name for row in after] == [row.pair.image.name for row in before]
    for row in after:
        assert all(path.is_file() for path in split_table.files_of(row.pair))
    # A table of version 1 with paths relative to the folder that train.py ran in.
    image, mask = "discs/images/disc00.png", "discs/masks/disc00_mask.png"
    (tmp_path / "new" / "run" / "split.csv").write_text(f"image,mask,subset\n{image},{mask},test\n")
    monkeypatch.chdir("/")
    pairs, _ = read_split(tmp_path / "new" / "run" / "split.csv")
    assert pairs == [Pair(tmp_path / "new" / image, (tmp_path / "new" / mask,))]


def test_a_table_of_version_1_names_the_first_mask_alone(phantoms, tmp_path):
    pairs, _ = data.find_pairs(phantoms)
    lines = [f"{pair.image},{pair.masks[0]},test\n" for pair in pairs]
    (tmp_path / "split.csv").write_text("image,mask,subset\n" + "".join(lines))
    reread, _ = read_split(tmp_path / "split.csv")
    assert [pair.masks for pair in reread] == [pair.masks for pair in pairs]
    assert run_identity.changed_data(read_rows(tmp_path / "split.csv"), pairs) == ([], [])


@pytest.mark.parametrize("name", ['a|b\\|c, "d"', "two\nlines", " spaces ", "心脏", "\\"])
def test_any_name_comes_back(tmp_path, name):
    folder = tmp_path / name
    masks = (folder / "m.png", folder / "n.png")
    pair = Pair(folder / "i.png", masks, patient=name, more_channels=(folder,))
    write_split(tmp_path / "split.csv", [pair, pair], ["train", ""])
    assert read_split(tmp_path / "split.csv") == ([pair], ["train"])


def test_a_split_is_known_by_its_content_wherever_it_is(discs, split):
    rows = split_table.read_rows(split)
    moved = [row._replace(pair=dataclasses.replace(row.pair, image=Path("x.png"))) for row in rows]
    assert split_table.mark_split(rows) == split_table.mark_split(moved[::-1])
    assert split_table.mark_split(rows) != split_table.mark_split(rows[1:])


def test_a_table_of_something_else_is_refused(tmp_path):
    for content in ("a,b\n1,2\n", "image,mask,subset\na,b,holdout\n", "image,mask,subset\na,b\n"):
        (tmp_path / "split.csv").write_text(content)
        with pytest.raises(UserError, match=r"has (columns|subsets)"):
            read_split(tmp_path / "split.csv")
    (tmp_path / "split.csv").write_text("image,mask,subset\n,m.png,test\n")
    with pytest.raises(UserError, match="has a row without an image"):
        read_split(tmp_path / "split.csv")


def test_a_change_anywhere_in_a_file_is_seen(tmp_path):
    path = tmp_path / "large"
    content = bytearray(2**23)
    seen = set()
    for place in (None, 0, 2**22, -1):
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        seen.add(fingerprints.fingerprint(path))
        content = bytearray(len(content))
    assert len(seen) == 4 and fingerprints.fingerprint(tmp_path / "nothing") == ""


def test_a_file_is_read_again_only_after_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    first = fingerprints.fingerprints(paths)
    kept = tmp_path / "cache" / fingerprints.NAME
    fingerprints._read_known.cache_clear()  # as another process
    read = []
    digest = fingerprints.hashlib.file_digest

    def counted(file, name):
        read.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(fingerprints.hashlib, "file_digest", counted)
    assert fingerprints.fingerprints(paths) == first and not read
    paths[1].write_bytes(b"x")
    assert fingerprints.fingerprints(paths)[paths[1]] != first[paths[1]] and read == ["b"]
    kept.write_text("damaged")
    fingerprints._read_known.cache_clear()
    assert fingerprints.fingerprints(paths[:1]) == {paths[0]: first[paths[0]]}
    assert read == ["b", "a"]


def test_images_that_are_kept_for_testing_are_not_new(discs, tmp_path):
    """With --folds they take no part; the same command must find its run again."""
    pairs = data.find_pairs(discs)[0]
    pairs[:3] = [dataclasses.replace(pair, subset="test") for pair in pairs[:3]]
    subsets = data.split(pairs, 0.2, 0.2, folds=3)
    assert subsets[:3] == [""] * 3
    run_folder.start(tmp_path, Config(), pairs, subsets)
    rows = read_rows(tmp_path / "split.csv")
    assert run_identity.changed_data(rows, pairs) == ([], [])
    assert run_identity.is_same_data(rows, pairs)


def test_images_that_came_while_it_was_stopped_are_not_new_afterwards(discs, tmp_path):
    pairs = data.find_pairs(discs)[0]
    run_folder.start(tmp_path, Config(), pairs[:9], ["train", "val", "test"] * 3)
    before = run_folder.go_on(tmp_path)
    assert run_folder.resume(tmp_path, Config(), pairs) == ["train", "val", "test"] * 3 + [""] * 3
    rows = read_rows(tmp_path / "split.csv")
    assert run_identity.changed_data(rows, pairs) == ([], [])
    assert run_folder.go_on(tmp_path) == mark_split(rows) != before


def test_equal_images_of_two_patients_keep_their_subsets(discs, tmp_path):
    pairs = data.find_pairs(discs)[0][:1]
    other = tmp_path / "other"
    for path in (pairs[0].image, *pairs[0].masks):
        copy = other / path.parent.name / path.name
        copy.parent.mkdir(parents=True)
        shutil.copy(path, copy)
    pairs += data.find_pairs(other)[0]
    run_folder.start(tmp_path / "run", Config(), pairs, ["train", "test"])
    assert run_folder.resume(tmp_path / "run", Config(), pairs) == ["train", "test"]


def test_a_run_that_goes_on_is_not_finished_before_its_curves_are_drawn(discs, tmp_path):
    pairs = data.find_pairs(discs)[0]
    run_folder.start(tmp_path, Config(), pairs, ["train"] * len(pairs))
    (tmp_path / "curves.png").touch()
    run_folder.go_on(tmp_path)
    (tmp_path / "model.h5").touch()
    assert not run_folder.is_complete(tmp_path, Config(epochs=1), [{}])


def test_a_series_changes_with_each_of_its_files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}").write_bytes(bytes([i]))
    before = fingerprints.fingerprint(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert fingerprints.fingerprint(tmp_path) == before
    (tmp_path / "1").write_bytes(b"x")
    assert fingerprints.fingerprint(tmp_path) != before


def test_sizes():
    for value in (192, "192", (192, 192), "192,192", "192x192", [192, 192]):
        assert utils.parse_size(value) == (192, 192)
    assert utils.parse_size("192, 256") == utils.parse_size("192 256") == (192, 256)
    for value in ("", "0", "-1", "a", "1,2,3", 0, "1.5"):
        with pytest.raises(UserError, match="image_size is"):
            utils.parse_size(value)
