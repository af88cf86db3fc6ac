"""Masks in every encoding: the classes that they show, and what is said of them."""

import cv2
import numpy as np
import pytest
from PIL import Image

import data
from dataset import loading
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.notes import describe_masks, describe_subsets, summarize_notes
from dataset.reading import read_truth
from imaging.labels import Classes
from imaging.masks.encodings import decode
from imaging.scan import Scan
from inference.sampler import Sampler
from utils import UserError

RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)


@pytest.fixture
def ids():
    """A disc of 1 with a square of 2 beside it."""
    y, x = np.mgrid[:96, :96]
    ids = ((y - 50) ** 2 + (x - 40) ** 2 < 20**2).astype(np.uint8)
    ids[:20, 70:90] = 2
    return ids


def mask_of(values):
    """Make a Scan (1, H, W, C) of a picture."""
    values = np.asarray(values)
    pixels = values.reshape(1, *values.shape[:2], -1)
    return Scan(pixels, has_alpha=pixels.shape[-1] in (2, 4))


def found(values, classes="", ignore="", class_id=0):
    """Decode a picture to ids (H, W), and the notes."""
    decoded = decode(mask_of(values), Classes(classes, ignore), class_id)
    mask = np.zeros(values.shape[:2], np.uint8)
    for number, where in decoded.planes.items():
        mask[where[0]] = number
    return mask, decoded.notes


@pytest.mark.parametrize(
    "value, dtype", [(255, np.uint8), (1, np.uint8), (65535, np.uint16), (1, bool), (1, float)]
)
def test_one_value_is_the_class(ids, value, dtype):
    mask, notes = found((value * (ids == 1).astype(np.uint16)).astype(dtype))
    assert (mask == (ids == 1)).all() and not notes


def test_an_odd_value_is_told(ids):
    mask, notes = found(np.uint8(37) * (ids == 1))
    assert (mask == (ids == 1)).all()
    assert notes == [
        "its only value, 37, is taken for the class; if other values are other classes, name "
        "them: --classes"
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_ids(ids, dtype):
    mask, notes = found(ids.astype(dtype), "disc,square")
    assert (mask == ids).all() and not notes


def test_scaled_floats_are_whole_numbers(ids):
    assert (found(ids * np.float32(0.99999), "disc,square")[0] == ids).all()


def test_values_are_named(ids):
    values = np.array([0, 63, 126], np.uint8)[ids]
    assert (found(values, "disc=63,square=126")[0] == ids).all()
    assert (found(values, "square=126,disc=63")[0] == np.array([0, 2, 1])[ids]).all()
    assert (found(values, "both=63|126")[0] == (ids > 0)).all()
    assert (found(values, "all=1+")[0] == (ids > 0)).all()
    with pytest.raises(UserError, match="values 0, 63, 126; expected 0, 63, as --classes says"):
        found(values, "disc=63")


@pytest.mark.parametrize("sigma, quality", [(1, 0), (2, 0), (0, 70), (0, 40), (1, 80)])
def test_soft_edges_and_ringing_are_cut_at_half(ids, sigma, quality):
    drawn = np.uint8(255) * (ids == 1)
    soft = cv2.GaussianBlur(drawn, (0, 0), sigma) if sigma else drawn
    if quality:
        soft = cv2.imdecode(cv2.imencode(".jpg", soft, [1, quality])[1], cv2.IMREAD_UNCHANGED)
    mask, [(text, count)] = found(soft)
    assert "cut at half" in text and count == np.count_nonzero((soft > 0) & (soft < 255))
    assert (mask == (soft > 127.5)).all()
    assert np.count_nonzero(mask != (ids == 1)) < 40  # of 1245 pixels, at the edge


def test_shares_from_0_to_1_are_cut_at_half(ids):
    soft = cv2.GaussianBlur((ids == 1).astype(np.float32), (0, 0), 1.5)
    mask, [(text, _)] = found(soft)
    assert "cut at half" in text and (mask == (soft > 0.5)).mean() > 0.999


def test_grey_levels_that_mean_something_are_not_cut(ids):
    levels = np.array([0, 100, 255], np.uint8)[ids]
    with pytest.raises(UserError, match=r'name them: --classes "NAME1=100,NAME2=255"'):
        found(levels)
    with pytest.raises(UserError, match=r'--classes "NAME1=1" --ignore 255'):
        found(np.array([0, 1, 255], np.uint8)[ids])
    with pytest.raises(UserError, match="values 0, 1, 2; expected 0 and one other value"):
        found(ids)


def test_a_jpeg_of_several_ids_is_refused(ids):
    levels = np.array([0, 120, 240], np.uint8)[ids]
    blurred = cv2.imdecode(cv2.imencode(".jpg", levels)[1], cv2.IMREAD_UNCHANGED)
    with pytest.raises(UserError, match="is it a JPEG"):
        found(blurred, "disc=120,square=240")


def test_colours_are_named(ids):
    colours = np.array([BLACK, RED, GREEN], np.uint8)[ids]
    mask, notes = found(colours, "disc=#ff0000,square=#00ff00")
    assert (mask == ids).all() and not notes
    assert (found(colours, "both=#ff0000|#00ff00")[0] == (ids > 0)).all()
    share = [np.mean(ids == number) for number in range(3)]
    with pytest.raises(UserError) as caught:
        found(colours)
    assert str(caught.value) == (
        f"colours #000000 ({share[0]:.1%}), #ff0000 ({share[1]:.1%}), #00ff00 ({share[2]:.1%}); "
        'name them: --classes "NAME1=#ff0000,NAME2=#00ff00"'
    )
    with pytest.raises(UserError, match="colours #000000"):
        found(colours, "disc=#ff0000")


def test_a_background_that_is_not_black(ids):
    colours = np.array([WHITE, RED, GREEN], np.uint8)[ids]
    with pytest.raises(UserError, match="NAME1=#ff0000,NAME2=#00ff00,background=#ffffff"):
        found(colours)
    mask, _ = found(colours, "disc=#ff0000,square=#00ff00,background=#ffffff")
    assert (mask == ids).all()
    assert (found(255 - 255 * (ids == 1), "disc=0,background=255")[0] == (ids == 1)).all()


@pytest.mark.parametrize("jpeg", [False, True])
def test_blurred_colours_become_the_nearest(ids, jpeg):
    colours = np.array([BLACK, RED, GREEN], np.uint8)[ids]
    if jpeg:
        coded = cv2.imencode(".jpg", colours[..., ::-1], [1, 90])[1]
        blurred = cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]
    else:
        blurred = cv2.GaussianBlur(colours, (3, 3), 0)
    mask, [(text, count)] = found(blurred, "disc=#ff0000,square=#00ff00")
    assert "nearest" in text and count > 100
    assert np.mean(mask != ids) < 0.01


def test_one_colour_is_the_only_class(ids):
    colours = np.array([BLACK, RED, BLACK], np.uint8)[ids]
    mask, notes = found(colours)
    assert (mask == (ids == 1)).all() and not notes


@pytest.mark.parametrize("quality", [95, 70])
def test_one_colour_in_a_jpeg(ids, quality):
    colours = np.array([BLACK, RED, BLACK], np.uint8)[ids]
    coded = cv2.imencode(".jpg", colours[..., ::-1], [1, quality])[1]
    mask, [(text, _)] = found(cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1])
    assert "nearest" in text and np.count_nonzero(mask != (ids == 1)) < 80


def test_a_photograph_is_no_mask():
    photograph = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for classes in ("", "a,b", "a=#ff0000"):
        with pytest.raises(UserError, match=r"a picture of \d+ colours; expected a mask$"):
            found(photograph, classes)


def test_greys_and_ids_where_colours_are_named(ids):
    """White is a colour too; and masks that predict.py writes hold ids."""
    white = np.array([BLACK, WHITE, BLACK], np.uint8)[ids]
    assert (found(white, "disc=#ffffff,square=#00ff00")[0] == (ids == 1)).all()
    assert (found(white[..., 0], "disc=#ffffff,square=#00ff00")[0] == (ids == 1)).all()
    assert (found(ids, "disc=#ff0000,square=#00ff00")[0] == ids).all()


def test_masks_in_the_alpha_channel(ids):
    disc = ids == 1
    alpha = np.dstack([np.full((96, 96, 3), 255, np.uint8), np.uint8(255) * disc])
    mask, [note] = found(alpha)
    assert (mask == disc).all() and note == "the mask is in its alpha channel"
    layer = np.zeros((96, 96, 4), np.uint8)
    layer[..., :3] = 255  # white where nothing is drawn
    layer[disc] = (*RED, 255)
    mask, [note] = found(layer)
    assert (mask == disc).all() and note == "transparent pixels are background"
    opaque = np.dstack([np.repeat(np.uint8(255) * disc[..., None], 3, -1), np.full((96, 96), 255)])
    mask, notes = found(opaque.astype(np.uint8))
    assert (mask == disc).all() and not notes


def test_instance_labels_are_known():
    labels = np.zeros((96, 96), np.uint16)
    for n in range(36):
        cv2.circle(labels, (8 + 16 * (n % 6), 8 + 16 * (n // 6)), 5, n + 1, -1)
    with pytest.raises(UserError, match=r'instance labels: 36 values.*--classes "NAME=1\+"'):
        found(labels)
    assert (found(labels, "nucleus=1+")[0] == (labels > 0)).all()
    noise = np.random.default_rng(0).integers(0, 30, (96, 96)).astype(np.uint8)
    with pytest.raises(UserError, match="expected 0 and one other value") as caught:
        found(noise)
    assert "instance" not in str(caught.value)


# --------------------------------------------------------------------------------------- data sets


def write(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), mask)
    return path


@pytest.fixture
def folder(tmp_path, ids):
    """Three images of noise; their masks are missing."""
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 255, ids.shape).astype(np.uint8)
        write(tmp_path / "images" / f"{i}.png", image)
    return tmp_path


def notes_of(folder, classes):
    """Read a folder; return its notes."""
    pairs, _ = data.find_pairs(folder)
    dataset, problems = loading.load_pairs(pairs, Preprocessing(classes, Sampler((32, 32))))
    assert not problems
    return [*summarize_notes(dataset.info.to_dict("records")), *describe_masks(dataset)]


def test_overlaps_are_counted(folder, ids):
    inner = cv2.erode((ids == 1).astype(np.uint8), np.ones((9, 9)))
    for i in range(3):
        write(folder / "masks" / "liver" / f"{i}.png", np.uint8(255) * (ids == 1))
        write(folder / "masks" / "tumour" / f"{i}.png", np.uint8(255) * inner)
    [note] = notes_of(folder, Classes("liver,tumour"))
    assert note == (
        "3 files (0.png, 1.png, 2.png): classes overlap: pixels of liver and tumour are taken for "
        f"tumour, the later name; --overlap keeps both ({3 * inner.sum()} pixels)"
    )
    [note, absent] = notes_of(folder, Classes("tumour,liver"))
    assert "taken for liver" in note and "class tumour never occurs in 3 masks" in absent
    assert notes_of(folder, Classes("liver,tumour", overlap=True)) == []


def test_masks_without_background_are_told(folder, ids):
    for i in range(3):
        write(folder / "masks" / f"{i}.png", np.full_like(ids, 255, np.uint8))
    [note] = notes_of(folder, Classes("organ"))
    assert note.startswith("class organ covers every pixel of all 3 masks")


def test_inverted_masks_and_absent_classes_are_told(folder, ids):
    for i in range(3):
        write(folder / "masks" / f"{i}.png", np.uint8(255) * (ids != 1))
    [note] = notes_of(folder, Classes("organ"))
    assert "inverted?" in note and '--classes "organ=0,background=255"' in note
    assert notes_of(folder, Classes("organ=0,background=255")) == []
    for i in range(3):
        write(folder / "masks" / f"{i}.png", (ids == 1).astype(np.uint8))
    [note] = notes_of(folder, Classes("organ,lesion"))
    assert note == "class lesion never occurs in 3 masks; check --classes"


def test_notes_of_many_files_are_one_line():
    rows = [{"image": f"a/{i}.png", "notes": ["turned", ("cut", 10 * i)]} for i in range(5)]
    rows.append({"image": "b/9.png", "notes": ["alone"]})
    assert summarize_notes([*rows, {"image": "c.png", "notes": None}]) == [
        "5 files (0.png, 1.png, 2.png, …): turned",
        "5 files (0.png, 1.png, 2.png, …): cut (100 pixels)",
        "b/9.png: alone",
    ]


def test_several_files_of_one_class_are_joined(folder, ids):
    files = []
    for number in (1, 2):
        files.append(write(folder / f"masks{number}" / "0.png", np.uint8(255) * (ids == number)))
    truth = read_truth(Pair(folder / "images" / "0.png", tuple(files)), Classes("cell"))
    assert (truth.mask[0] == (ids > 0)).all() and truth.ignored is None and not truth.notes


def test_palettes_are_indices_or_colours_as_classes_say(tmp_path, ids):
    picture = Image.fromarray(ids, mode="P")
    picture.putpalette([0, 0, 0, *GREEN, *RED] + [0] * 759)
    for ending in ("png", "gif", "bmp", "tif"):
        path = tmp_path / f"mask.{ending}"
        picture.save(path)
        pair = Pair(tmp_path / "image.png", (path,))
        assert (read_truth(pair, Classes("disc,square")).mask[0] == ids).all(), ending
        by_colour = read_truth(pair, Classes("square=#ff0000,disc=#00ff00")).mask[0]
        assert (by_colour == np.array([0, 2, 1])[ids]).all(), ending


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_ids(tmp_path, ids, bits):
    mask = np.minimum(ids, 2**bits - 1)
    picture = Image.fromarray(mask, mode="P")
    picture.putpalette([0, 0, 0, 90, 90, 90, 180, 180, 180] + [255] * 759)
    picture.save(tmp_path / "mask.png", bits=bits)
    pair = Pair(tmp_path / "image.png", (tmp_path / "mask.png",))
    assert (read_truth(pair, Classes("a,b")).mask[0] == mask).all()


def test_objects_in_a_colour_each():
    labels = np.zeros((96, 96, 3), np.uint8)
    for n in range(36):
        colour = (7 * n, 255 - 5 * n, 40 + n)
        cv2.circle(labels, (8 + 16 * (n % 6), 8 + 16 * (n // 6)), 5, colour, -1)
    with pytest.raises(UserError, match=r"37 colours; expected a mask .*instance labels.*NAME=1\+"):
        found(labels)
    assert (found(labels, "cell=1+")[0] == labels.any(-1)).all()


@pytest.mark.parametrize("seed", range(60))
def test_any_pixels_are_read_or_refused(seed):
    """Random arrays of every type: never another error, always a mask of their size."""
    rng = np.random.default_rng(seed)
    dtype = rng.choice(["?", "u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8"])
    channels = int(rng.choice([1, 2, 3, 4, 5]))
    highest = int(rng.choice([1, 2, 5, 100, 255, 300]))
    low = -3 if dtype[0] in "if" and rng.random() < 0.2 else 0
    pixels = rng.integers(low, highest + 1, (2, 20, 20, channels)).astype(dtype)
    if dtype[0] == "f" and rng.random() < 0.5:
        pixels = pixels / highest
    scan = Scan(pixels, has_alpha=channels in (2, 4) and bool(rng.random() < 0.7))
    flags = [("",), ("a,b",), ("a=1+",), ("a=#ff0000,b=#00ff00", "#0000ff"), ("a,b", "255")]
    for classes in (Classes(*one) for one in flags):
        try:
            decoded = decode(scan, classes)
        except UserError:
            continue
        assert all(
            one.shape == (2, 20, 20) and one.dtype == bool for one in decoded.planes.values()
        )
        assert (decoded.ignored is None) == (not classes.ignored)


def test_crowded_instance_labels_are_no_soft_edges():
    """Cells that touch, with the labels 1 to 225."""
    y, x = np.mgrid[:120, :120]
    labels = (1 + y // 8 + 15 * (x // 8)).astype(np.uint8)
    labels[::8] = labels[:, ::8] = 0
    for order in (labels, np.random.default_rng(0).permutation(256).astype(np.uint8)[labels]):
        with pytest.raises(UserError, match="instance labels"):
            found(order)


@pytest.mark.parametrize("quality", [95, 70, 50, 30])
def test_jpeg_of_any_quality(quality):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drawn = np.zeros((96, 96), np.uint8)
        axes = [int(one) for one in rng.integers(10, 26, 2)]
        centre = [int(one) for one in rng.integers(34, 62, 2)]
        cv2.ellipse(drawn, centre, axes, int(rng.integers(180)), 0, 360, 255, -1)
        coded = cv2.imencode(".jpg", drawn, [1, quality])[1]
        mask, _ = found(cv2.imdecode(coded, cv2.IMREAD_UNCHANGED))
        assert np.count_nonzero(mask != (drawn > 0)) < 60


def test_empty_validation_masks_are_told(folder, ids):
    for i in range(3):
        write(folder / "masks" / f"{i}.png", ids * (i != 2))
    pairs, _ = data.find_pairs(folder)
    dataset, _ = loading.load_pairs(pairs, Preprocessing(Classes("disc,square"), Sampler((32, 32))))
    [note] = describe_subsets(dataset, np.array([2]))
    assert note.startswith("all 1 val masks are empty")
    assert describe_subsets(dataset, np.array([0, 2])) == []
    assert describe_subsets(dataset, np.array([], int)) == []
    write(folder / "masks" / "1.png", np.uint8(2) * (ids == 2))
    dataset, _ = loading.load_pairs(pairs, Preprocessing(Classes("disc,square"), Sampler((32, 32))))
    [note] = describe_subsets(dataset, np.array([1, 2]))
    assert note == "class disc is empty in all 2 val masks"
