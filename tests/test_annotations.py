"""Shapes of COCO and labelme files become masks: the same as pycocotools draws."""

import json
import time

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

import data
from dataset import annotations, shapes
from dataset.reading import read_pair
from imaging.labels import Classes
from utils import UserError

SHAPE = (48, 64)
SQUARE = [[8, 8, 24, 8, 24, 20, 8, 20]]


def picture(path, shape=SHAPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(len(path.name)).integers(0, 255, shape, np.uint8)
    cv2.imwrite(str(path), image)


def write_coco(path, segmentations, names=("organ",), **image):
    """Write a COCO file with an image x.png, and a segmentation of each category 5, 6 …"""
    categories = [{"id": 5 + i, "name": name} for i, name in enumerate(names)]
    entries = []
    for i, segmentation in enumerate(segmentations):
        entry = {"id": i, "image_id": 7, "category_id": 5 + min(i, len(names) - 1), "iscrowd": 0}
        entries.append(entry | {"segmentation": segmentation})
    entry = {"id": 7, "file_name": "x.png", "height": SHAPE[0], "width": SHAPE[1]} | image
    table = {"images": [entry], "annotations": entries, "categories": categories}
    path.write_text(json.dumps(table))


def planes(tmp_path, *names):
    path = tmp_path / "annotations.json"
    return annotations.read_planes(path, tmp_path / "images" / "x.png", SHAPE, names or ["organ"])


# --------------------------------------------------------------------------------- the drawing


def test_polygons_agree_with_pycocotools():
    random = np.random.default_rng(0)
    for _ in range(100):
        angles = np.sort(random.uniform(0, 2 * np.pi, 12))
        radii = random.uniform(8, 40, 12)
        points = np.stack([30 + radii * np.cos(angles), 25 + radii * np.sin(angles)], axis=1)
        polygon = points.ravel().tolist()
        theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], *SHAPE)))
        ours = shapes.fill_polygon(polygon, SHAPE)
        # pycocotools rounds the corners to a fifth of a pixel.
        assert (ours & (theirs > 0)).sum() / (ours | (theirs > 0)).sum() > 0.97


def test_a_polygon_has_the_pixels_whose_centre_is_inside():
    mask = shapes.fill_polygon([2, 3, 10, 3, 10, 7, 2, 7], (20, 20))
    expected = np.zeros((20, 20), bool)
    expected[3:7, 2:10] = True
    np.testing.assert_array_equal(mask, expected)
    beyond = shapes.fill_polygon([-50, -50, 90, -50, 90, 90, -50, 90], (20, 20))
    assert beyond.all()


def test_a_polygon_around_a_hole_leaves_it_out():
    ring = [0, 0, 20, 0, 20, 20, 0, 20, 0, 0, 5, 5, 5, 15, 15, 15, 15, 5, 5, 5]
    mask = shapes.fill_polygon(ring, (20, 20))
    assert mask.sum() == 400 - 100 and not mask[10, 10] and mask[2, 2]


def test_run_lengths_agree_with_pycocotools(tmp_path):
    mask = np.random.default_rng(1).integers(0, 2, SHAPE, np.uint8)
    mask[10:30, 20:50] = 1
    packed = coco_mask.encode(np.asfortranarray(mask))
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    plain = np.diff([0, *edges, flat.size]).tolist()
    if flat[0]:
        plain = [0, *plain]
    for counts in (packed["counts"], packed["counts"].decode(), plain):
        drawn = shapes.decode_runs({"counts": counts, "size": list(SHAPE)}, SHAPE)
        np.testing.assert_array_equal(drawn, mask > 0)
    (tmp_path / "images").mkdir()
    runs = {"counts": packed["counts"].decode(), "size": list(SHAPE)}
    write_coco(tmp_path / "annotations.json", [runs])
    np.testing.assert_array_equal(planes(tmp_path)[0], mask > 0)


@pytest.mark.parametrize(
    ("drawing", "said"),
    [
        ([[1, 2, 3]], "a polygon of 3 numbers"),
        ([[1, 2, "x", 4, 5, 6]], "not a list of numbers"),
        ([[1, 2, float("nan"), 4, 5, 6]], "not finite"),
        ("text", "expected polygons or RLE"),
        ({"counts": "!!!", "size": [48, 64]}, "not numbers"),
        ({"counts": [5], "size": [48, 64]}, "do not add up"),
        ({"counts": [-5, 48 * 64 + 5], "size": [48, 64]}, "do not add up"),
        ({"counts": [10**30], "size": [48, 64]}, "not numbers"),
        ({"counts": [48 * 64], "size": [10**9, 10**9]}, "the image is"),
        ({"size": [48, 64]}, "not numbers|do not add up"),
    ],
)
def test_damaged_shapes_are_refused(drawing, said):
    with pytest.raises(UserError, match=said):
        shapes.draw(drawing, SHAPE)


def test_a_polygon_of_endless_crossings_is_refused_before_it_is_drawn():
    zigzag = np.tile([0.0, 0.0, 40_000.0, 1.0], 5_000).tolist()
    start = time.monotonic()
    with pytest.raises(UserError, match="crosses"):
        shapes.fill_polygon(zigzag, (100, 40_000))
    assert time.monotonic() - start < 1


# -------------------------------------------------------------------------------------- COCO


def test_coco_beside_images(tmp_path):
    picture(tmp_path / "images" / "x.png")
    picture(tmp_path / "images" / "unlisted.png")
    write_coco(
        tmp_path / "annotations.json", [SQUARE, [[30, 30, 40, 30, 40, 40]]], ["organ", "cyst"]
    )
    layout = data.find_data(tmp_path)
    assert layout.name == "COCO, 2 classes from annotations.json" and layout.problems == []
    assert layout.classes == "organ,cyst" and [pair.stem for pair in layout.pairs] == ["x"]
    assert "1 file is passed over: images/unlisted.png" in layout.notes
    truth = read_pair(layout.pairs[0], Classes(layout.classes))[1]
    assert (truth.mask[0, 8:20, 8:24] == 1).all()
    assert (truth.mask == 1).sum() == 12 * 16 and 40 < (truth.mask == 2).sum() < 60
    merged = read_pair(layout.pairs[0], Classes("any"))[1]
    assert (merged.mask > 0).sum() == (truth.mask > 0).sum()


def test_ids_of_coco_may_be_numbers_or_text_and_an_image_may_be_listed_twice(tmp_path):
    picture(tmp_path / "images" / "x.png")
    place = tmp_path / "annotations.json"
    write_coco(place, [SQUARE], ["organ"])
    table = json.loads(place.read_text())
    (image,) = [one for one in table["images"] if one["file_name"].endswith("x.png")]
    for change in ("text", "twice"):
        if change == "text":
            for one in table["annotations"]:
                one["image_id"] = str(one["image_id"])
        else:
            table["images"].insert(0, image | {"id": "empty"})
        place.write_text(json.dumps(table))
        (pair,) = data.find_data(tmp_path).pairs
        assert read_pair(pair, Classes("organ"))[1].mask.sum() == 12 * 16
    del image["id"]
    place.write_text(json.dumps(table))
    with pytest.raises(UserError, match="unreadable as COCO .KeyError: 'id'"):
        annotations.find_shapes(place, tmp_path / "x.png")


def test_categories_with_signs_of_their_own(tmp_path):
    picture(tmp_path / "images" / "x.png")
    write_coco(tmp_path / "annotations.json", [SQUARE, SQUARE], ["lobe, upper", "b"])
    layout = data.find_data(tmp_path)
    assert layout.classes == "lobe upper,b"
    read_pair(layout.pairs[0], Classes(layout.classes))


def test_a_small_mask_is_cut_at_all_sides():
    drawing = {"mask": np.ones((10, 10), bool), "at": [-5, -5]}
    assert shapes.draw(drawing, (20, 20)).sum() == 25
    assert shapes.draw(drawing | {"at": [15, 12]}, (20, 20)).sum() == 5 * 8


def test_overlapping_categories_stay_both_where_that_is_asked_for(tmp_path):
    picture(tmp_path / "images" / "x.png")
    inner = [[10, 10, 14, 10, 14, 14, 10, 14]]
    write_coco(tmp_path / "annotations.json", [SQUARE, inner], ["organ", "cyst"])
    pair = data.find_data(tmp_path).pairs[0]
    one = read_pair(pair, Classes("organ,cyst"))[1]
    assert (one.mask == 2).sum() == 16 and (one.mask == 1).sum() == 12 * 16 - 16
    both = read_pair(pair, Classes("organ,cyst", overlap=True))[1]
    assert (both.mask & 1 > 0).sum() == 12 * 16 and (both.mask & 2 > 0).sum() == 16


def test_an_image_without_shapes_is_empty(tmp_path):
    picture(tmp_path / "images" / "x.png")
    picture(tmp_path / "images" / "y.png")
    write_coco(tmp_path / "annotations.json", [SQUARE])
    table = json.loads((tmp_path / "annotations.json").read_text())
    table["images"].append({"id": 8, "file_name": "y.png", "height": 48, "width": 64})
    (tmp_path / "annotations.json").write_text(json.dumps(table))
    pairs = data.find_data(tmp_path).pairs
    assert [read_pair(pair, Classes("organ"))[1].mask.sum() for pair in pairs] == [192, 0]


def test_coco_of_two_subsets_with_images_of_equal_names(tmp_path):
    """The places of COCO itself, and those of Roboflow."""
    for subset, polygon in (("train", SQUARE), ("val", [[0, 0, 9, 0, 9, 9, 0, 9]])):
        picture(tmp_path / "a" / "images" / f"{subset}2017" / "x.png")
        (tmp_path / "a" / "annotations").mkdir(exist_ok=True)
        write_coco(
            tmp_path / "a" / "annotations" / f"instances_{subset}2017.json", polygon and [polygon]
        )
        folder = {"train": "train", "val": "valid"}[subset]
        picture(tmp_path / "b" / folder / "x.png")
        write_coco(tmp_path / "b" / folder / "_annotations.coco.json", [polygon])
    for name in ("a", "b"):
        layout = data.find_data(tmp_path / name)
        assert sorted(pair.subset for pair in layout.pairs) == ["train", "val"], layout
        assert layout.problems == [] and layout.classes == "organ"
        sizes = {p.subset: read_pair(p, Classes("organ"))[1].mask.sum() for p in layout.pairs}
        assert sizes == {"train": 192, "val": 81}


def test_images_that_lack_and_other_sizes_are_named(tmp_path):
    picture(tmp_path / "images" / "x.png")
    write_coco(tmp_path / "annotations.json", [SQUARE], height=10)
    pair = data.find_data(tmp_path).pairs[0]
    with pytest.raises(
        UserError, match=r"annotations.json: its x.png has 10x64 pixels; the image h"
    ):
        read_pair(pair, Classes("organ"))
    (tmp_path / "images" / "x.png").rename(tmp_path / "images" / "z.png")
    (problem,) = data.find_data(tmp_path).problems
    assert "1 of its images are not there: x.png" in problem


def test_a_large_coco_file_is_parsed_once(tmp_path, monkeypatch):
    for i in range(20):
        picture(tmp_path / "images" / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in range(20)]
    entries = [
        {"id": i, "image_id": i, "category_id": 1, "segmentation": SQUARE} for i in range(20)
    ]
    table = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(table))
    reads = []
    read = annotations.read_json
    monkeypatch.setattr(annotations, "read_json", lambda path: reads.append(path) or read(path))
    for pair in data.find_data(tmp_path).pairs:
        assert read_pair(pair, Classes("a"))[1].mask.sum() == 192
    assert len(reads) == 1


# ------------------------------------------------------------------------------------ labelme


def write_labelme(path, *shapes):
    table = {"version": "5.5.0", "imagePath": path.name, "imageHeight": 48, "imageWidth": 64}
    path.write_text(json.dumps(table | {"shapes": list(shapes)}))


def test_labelme_beside_images(tmp_path):
    picture(tmp_path / "x.png")
    picture(tmp_path / "y.png")
    polygon = {"label": "organ", "points": [[8, 8], [24, 8], [24, 20], [8, 20]]}
    box = {"label": "cyst", "shape_type": "rectangle", "points": [[40, 30], [30, 20]]}
    circle = {"label": "cyst", "shape_type": "circle", "points": [[50, 12], [50, 20]]}
    line = {"label": "organ", "shape_type": "line", "points": [[1, 1], [5, 5]]}
    write_labelme(tmp_path / "x.json", polygon, box, circle, line)
    layout = data.find_data(tmp_path)
    assert layout.name == "labelme, 2 classes from its labels" and layout.problems == []
    assert layout.classes == "cyst,organ" and len(layout.pairs) == 1
    assert "1 image has no JSON file and cannot be used: y.png" in layout.notes
    assert "1 points and lines are no areas and are not used" in layout.notes
    mask = read_pair(layout.pairs[0], Classes(layout.classes))[1].mask[0]
    assert (mask == 2).sum() == 192 and mask[8, 8] == 2 and mask[20, 24] == 0
    assert (mask[20:30, 30:40] == 1).all()
    assert abs((mask == 1).sum() - 100 - np.pi * 64) < 8


def test_labelme_agrees_with_its_own_program(tmp_path):
    utils = pytest.importorskip("labelme.utils")
    points = [[8.3, 8.1], [24.2, 9.7], [20.5, 30.4], [12.0, 25.0]]
    theirs = utils.shape_to_mask(SHAPE, points, "polygon")
    ours = shapes.fill_polygon(np.ravel(points).tolist(), SHAPE)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.85  # theirs has the edge too


@pytest.mark.parametrize("text", ["{", "[]", '{"shapes": 3}', '{"shapes": [{}]}', "\xff"])
def test_a_damaged_labelme_file_is_named(tmp_path, text):
    picture(tmp_path / "x.png")
    write_labelme(tmp_path / "x.json", {"label": "a", "points": [[1, 1], [9, 1], [9, 9]]})
    pair = data.find_data(tmp_path).pairs[0]
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"x\.json: "):
        read_pair(pair, Classes("a"))


def test_labels_that_classes_do_not_name_are_told(tmp_path):
    picture(tmp_path / "x.png")
    write_labelme(tmp_path / "x.json", {"label": "organ", "points": [[1, 1], [9, 1], [9, 9]]})
    pair = data.find_data(tmp_path).pairs[0]
    with pytest.raises(UserError, match="labels organ; --classes names liver, cyst"):
        read_pair(pair, Classes("liver,cyst"))
