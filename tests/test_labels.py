"""What --classes, --ignore and --overlap mean."""

import numpy as np
import pytest

from dataset.augmentation import mirrored_planes
from imaging.labels import BITS, Classes, highest_class, join_planes, mirrored_outputs, plane
from utils import UserError


@pytest.mark.parametrize(
    "text, names, ranges",
    [
        ("", ["foreground"], [((1, 1),)]),
        ("liver, tumour", ["liver", "tumour"], [((1, 1),), ((2, 2),)]),
        ("liver=63,tumour=126", ["liver", "tumour"], [((63, 63),), ((126, 126),)]),
        ("nucleus=1+", ["nucleus"], [((1, 2**32 - 1),)]),
        ("nucleus=1-57", ["nucleus"], [((1, 57),)]),
        ("lung=2|3,heart=1", ["lung", "heart"], [((2, 2), (3, 3)), ((1, 1),)]),
        ("lung=2;3", ["lung"], [((2, 2), (3, 3))]),
        ("a=#ff0000,b=#00FF00", ["a", "b"], [((0xFF0000,) * 2,), ((0x00FF00,) * 2,)]),
        ("background,liver,tumour", ["liver", "tumour"], [((1, 1),), ((2, 2),)]),
        ("organ=0,background=255", ["organ"], [((0, 0),)]),
    ],
)
def test_classes(text, names, ranges):
    found = Classes(text)
    assert found.names == names and found.ranges == ranges


@pytest.mark.parametrize(
    "text, ignore",
    [
        ("a=x", ""),
        ("a=0", ""),
        ("a=3,b=3", ""),
        ("a=1-5,b=3", ""),
        ("a=5-1", ""),
        ("a=1.5", ""),
        ("a=-1", ""),
        ("a=#ff00", ""),
        ("a=#ff0000,b=2", ""),
        ("a=#ff0000,b", ""),
        ("a=1+", "255"),
        ("a,b", "2"),
        ("a,b", "0"),
        ("a", "x"),
        ("a=#ff0000", "255"),
    ],
)
def test_values_that_contradict_each_other_are_refused(text, ignore):
    with pytest.raises(UserError, match=r"classes is .*expected different grey levels above 0"):
        Classes(text, ignore)


@pytest.mark.parametrize("text", [",", "a,,b", "a,a", "a\\b", "background"])
def test_names_must_be_names(text):
    with pytest.raises(UserError, match="expected 1 to 255 different names"):
        Classes(text)
    if text == "a,a":
        with pytest.raises(UserError, match="expected 1 to 32 different names"):
            Classes(",".join(map(str, range(33))), overlap=True)
        with pytest.raises(UserError, match="without /"):
            Classes("a/b", overlap=True)


@pytest.mark.parametrize(
    "classes, planes, channels",
    [
        (Classes("a"), 1, 1),
        (Classes("a,b"), 2, 3),
        (Classes("a", "255"), 2, 1),
        (Classes("a,b", "254|255"), 3, 3),
        (Classes("a,b", overlap=True), 2, 2),
        (Classes("a", overlap=True), 1, 1),
    ],
)
def test_planes_and_channels(classes, planes, channels):
    assert (classes.num_planes, classes.num_channels) == (planes, channels)
    assert Classes.from_metadata(classes.metadata) == classes


def test_models_of_earlier_versions():
    assert Classes.from_metadata({"classes": ["lungs"]}) == Classes("lungs")
    assert Classes.from_metadata({"classes": ["a", "b"], "mask_values": [1, 2]}) == Classes("a,b")
    old = {"classes": ["a", "b"], "mask_values": [63, 126]}
    assert Classes.from_metadata(old) == Classes("a=63,b=126")


def test_levels_of_written_masks():
    assert Classes("a=63,b=126").levels == [0, 63, 126]
    assert Classes("a=#ff0000,b=#00ff00").levels == [0, 1, 2]
    assert Classes("cell=1+").levels == [0, 1]
    assert Classes("organ=0,background=255").levels == [255, 0]


def test_planes_of_ids_and_of_overlapping_classes():
    one, two = np.array([0, 1, 1, 0], bool), np.array([0, 0, 1, 1], bool)
    ids, bits = join_planes([one, two]), join_planes([one, two], BITS)
    assert ids.tolist() == [0, 1, 2, 2] and ids.dtype == np.uint8
    assert bits.tolist() == [0, 1, 3, 2] and bits.dtype == BITS
    assert plane(ids, 1).tolist() == [False, True, False, False]
    assert plane(bits, 1).tolist() == one.tolist() and plane(bits, 2).tolist() == two.tolist()
    assert highest_class(ids) == highest_class(bits) == 2
    assert highest_class(join_planes([one] * 32, BITS)) == 32


@pytest.mark.parametrize(
    "classes, order",
    [
        (Classes("a"), [0]),
        (Classes("left lung,right lung"), [0, 2, 1]),
        (Classes("left lung,right lung", overlap=True), [1, 0]),
    ],
)
def test_mirrored_outputs(classes, order):
    assert mirrored_outputs(classes.metadata).tolist() == order


def test_what_does_not_count_stays_where_it_is_in_a_mirrored_image():
    assert mirrored_planes(Classes("left lung,right lung", "255")).tolist() == [1, 0, 2]
    assert mirrored_planes(Classes("left lung,right lung,heart")).tolist() == [1, 0, 2]
    assert mirrored_planes(Classes("lung", "255")).tolist() == [0, 1]
    assert mirrored_planes(Classes("left lung")) is None
