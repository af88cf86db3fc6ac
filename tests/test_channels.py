"""Grey or colour: how many channels the network gets."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

import data
from dataset.channels import detect_channels
from dataset.layouts import Pair
from imaging import formats


def write_pictures(folder, kinds):
    for i, kind in enumerate(kinds):
        picture = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        if kind != "colour":
            picture[..., 1:] = picture[..., :1]
        if kind == "grey":
            picture = picture[..., :1]
        if kind == "alpha":
            picture = np.concatenate([picture, 255 - picture[..., :1]], axis=-1)
        path = folder / f"{i}.png"
        if kind == "text":
            path.write_text("no picture")
        else:
            cv2.imwrite(str(path), picture)
    return [Pair(folder / f"{i}.png", ()) for i in range(len(kinds))]


@pytest.mark.parametrize(
    ("kinds", "channels"),
    [
        (["grey"] * 3, 1),
        (["equal channels"] * 3, 1),
        (["alpha"] * 3, 1),
        (["colour"] * 3, 3),
        (["colour", "grey", "colour"], 3),
        (["colour", "grey", "grey"], 1),
        (["text", "colour", "text"], 3),
        (["text"], 1),
        ([], 1),
    ],
)
def test_channels_follow_from_what_most_images_show(tmp_path, kinds, channels):
    assert detect_channels(write_pictures(tmp_path, kinds)) == channels


def test_a_grey_jpeg_is_grey_and_few_images_are_read(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(picture).convert("RGB").save(tmp_path / "0.jpg", quality=70)
    reads = []
    decode = formats.decode_scan
    monkeypatch.setattr(formats, "decode_scan", lambda *args: reads.append(1) or decode(*args))
    assert detect_channels([Pair(tmp_path / "0.jpg", ())] * 1000) == 1 and len(reads) == 5


def test_check_reports_the_channels(discs, tmp_path, capsys):
    for path in (discs / "images").iterdir():
        picture = np.repeat(formats.read_image(path), 3, axis=-1)
        picture[..., 0] //= 2
        cv2.imwrite(str(path), picture)
    data.check(discs, output=tmp_path / "page")
    assert "colour     yes, so 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "page" / "report.json").read_text())["channels"] == 3
