"""Draw synthetic chest X-rays with exact lung masks: the default data set, without a download.

    python data.py phantoms DIR --count 200 --seed 0

A phantom is a sum of attenuations: torso, bones, heart and vessels, minus the air in the lungs.
Shapes and strengths are drawn anew for each image and vary more than patients do. Training on
randomised appearance carries over to real scans (SynthSeg, Billot et al. 2023).
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from imaging import pictures
from utils import UserError

SIZE = 256  # pixels, height and width
VERSION = 3  # raise it when the drawing changes; phantoms of each version have their own folder

# The inner border of each lung, from the diaphragm up over the apex, as (across, down). Across is
# 0 at the spine and 1 at the ribs; down is 0 at the apex and 1 at the outer lower corner.
RIGHT_LUNG = [(0.10, 0.90), (0.20, 0.72), (0.16, 0.50), (0.04, 0.26), (0.07, 0.08), (0.32, 0.0)]
LEFT_LUNG = [(0.52, 0.88), (0.38, 0.68), (0.12, 0.46), (0.06, 0.27), (0.08, 0.09), (0.30, 0.0)]
# The outer border of both, from the apex down along the ribs.
RIBS_SIDE = [(0.66, 0.08), (0.86, 0.28), (0.94, 0.55), (0.98, 0.80), (1.0, 1.0)]


class Chest(NamedTuple):
    """Where things lie. Lengths are shares of the image's side, x to the right and y down."""

    right: np.ndarray  # outline (P, 2) of the patient's right lung, which is left in the image
    left: np.ndarray
    middle: float  # x of the spine
    top: float  # y of the lungs' apices
    bottom: float  # y of their lower corners


def draw_phantom(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one X-ray: uint8 image (SIZE, SIZE), uint8 masks (SIZE, SIZE, 2), left lung first."""
    middle = 0.5 + rng.normal(0, 0.02)
    top, bottom = rng.uniform(0.04, 0.22), rng.uniform(0.6, 0.92)
    right = _lung(rng, RIGHT_LUNG, middle, top, bottom, side=-1)
    left = _lung(rng, LEFT_LUNG, middle, top, bottom, side=1)
    chest = Chest(right, left, middle, top, bottom)
    masks = np.stack([_fill(left), _fill(right) * (1 - _fill(left))], axis=-1)
    torso = _torso(rng, chest)
    film = torso - _air(rng, masks)
    film += np.minimum(1, 3 * torso) * _bones(rng, chest)
    film += np.sqrt(torso) * _soft_tissue(rng, chest, masks.max(axis=-1))
    film, masks = _pose(rng, np.clip(film, 0, None), masks)
    picture = _expose(rng, film)
    masks = (masks > 0.5).astype(np.uint8)
    _collimate(rng, picture, masks)
    _markers(rng, picture)
    return picture, masks


def _lung(
    rng: np.random.Generator, inner: list, middle: float, top: float, bottom: float, side: int
) -> np.ndarray:
    """Outline one lung: points (P, 2). `side` is -1 for the left half of the image, else 1."""
    from scipy.interpolate import PchipInterpolator  # data.py answers without its half second

    points = np.array(inner + RIBS_SIDE)
    # A cone or a barrel: how much narrower the chest is at its top.
    taper = rng.uniform(0.0, 0.35)
    points[:, 0] *= 1 - taper * (1 - np.clip(points[:, 1], 0, 1)) ** rng.uniform(1, 3)
    points += rng.normal(0, 0.02, points.shape)
    points[6:, 0] += rng.normal(0, 0.03)
    points[:3, 0] += rng.normal(0, 0.06)  # a wider or narrower heart
    steps = np.arange(len(points))
    border = PchipInterpolator(steps, points)(np.linspace(0, steps[-1], 80))
    # The dome of the diaphragm, from the outer corner back to the heart.
    along = np.linspace(0, 1, 30)[1:-1, None]
    dome = points[-1] * (1 - along) + points[0] * along
    dome[:, 1] -= rng.uniform(0.02, 0.3) * np.sin(np.pi * along[:, 0] ** rng.uniform(0.5, 0.9))
    across, down = np.concatenate([border, dome]).T
    start, width = rng.uniform(0.02, 0.07), rng.uniform(0.24, 0.42)
    height = (bottom - top) * rng.uniform(0.88, 1.08)
    x = middle + side * (start + width * across)
    return np.stack([x, top + rng.normal(0, 0.012) + height * down], axis=1)


def _fill(points: np.ndarray) -> np.ndarray:
    """Fill a polygon (P, 2): uint8 (SIZE, SIZE) in {0, 1}."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    cv2.fillPoly(canvas, [np.round(points * (SIZE - 1) * 16).astype(np.int32)], 1, shift=4)
    return canvas


def _line(
    points: np.ndarray, width: float, canvas: np.ndarray | None = None, value: float = 1
) -> np.ndarray:
    """Draw a line through points (P, 2) on a float32 canvas (SIZE, SIZE), or on a new one."""
    canvas = np.zeros((SIZE, SIZE), np.float32) if canvas is None else canvas
    pixels = np.round(np.asarray(points) * (SIZE - 1)).astype(np.int32)
    cv2.polylines(canvas, [pixels], False, float(value), max(1, round(width * SIZE)), cv2.LINE_AA)
    return canvas


def _blur(array: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by a Gaussian."""
    return cv2.GaussianBlur(array.astype(np.float32), (0, 0), max(0.3, sigma * SIZE))


def _ellipse(centre: tuple[float, float], axes: tuple[float, float], angle: float) -> np.ndarray:
    """Fill an ellipse, `angle` in degrees: float32 (SIZE, SIZE) in {0, 1}."""
    canvas = np.zeros((SIZE, SIZE), np.float32)
    box = (tuple(SIZE * c for c in centre), tuple(2 * SIZE * a for a in axes), angle)
    cv2.ellipse(canvas, box, 1.0, -1)
    return canvas


def _torso(rng: np.random.Generator, chest: Chest) -> np.ndarray:
    """Draw trunk, neck and arms: thick in the middle, thin at the skin."""
    wall, arm, neck = rng.uniform(0.02, 0.09), rng.uniform(0.05, 0.3), rng.uniform(0.07, 0.13)
    shoulder, waist = chest.top + rng.uniform(-0.06, 0.06), rng.uniform(-0.03, 0.08)
    flanks = {-1: chest.right[:, 0].min() - wall, 1: chest.left[:, 0].max() + wall}
    arms, humeri = np.zeros((2, SIZE, SIZE), np.float32)
    outlines = {}
    for side, x in flanks.items():
        joint = (x + 0.03 * side, shoulder + 0.05)
        elbow = (joint[0] + side * (0.06 + arm), joint[1] + 0.45)
        _line([joint, elbow], 0.14, arms)
        _line([joint, elbow], 0.035, humeri)
        humeri = np.maximum(humeri, _ellipse(joint, (0.03, 0.035), 0))
        nape = chest.middle + side * neck
        above = [(nape, -0.05), (nape, shoulder - 0.15), ((nape + x) / 2, shoulder - 0.06)]
        below = [(joint[0], shoulder - 0.02), (x, chest.top + 0.38), (x - side * waist, 1.05)]
        outlines[side] = above + below
    trunk = _fill(np.array(outlines[-1] + outlines[1][::-1]))
    body = (_blur(np.maximum(trunk, arms), 0.02) > 0.5).astype(np.uint8)
    depth = cv2.distanceTransform(body, cv2.DIST_L2, 5) / SIZE
    film = rng.uniform(0.7, 1.1) * np.sqrt(np.clip(depth / rng.uniform(0.15, 0.35), 0, 1))
    return _blur(film + 0.1 * humeri, 0.008)


def _air(rng: np.random.Generator, masks: np.ndarray) -> np.ndarray:
    """Draw what the lungs take away, not the same in both.

    Rays along the ribs cross little lung, so it fades there. Heart and diaphragm have sharp edges.
    """
    places = np.argwhere(masks.any(-1))[:, ::-1]
    corners = [(places[:, 0].min(), SIZE), (places[:, 0].max(), SIZE)]
    outline = cv2.convexHull(np.concatenate([places, corners]).astype(np.int32))
    chest = cv2.fillConvexPoly(np.zeros((SIZE, SIZE), np.uint8), outline, 1)
    depth = cv2.distanceTransform(chest, cv2.DIST_L2, 5) / SIZE
    thickness = np.clip(depth / rng.uniform(0.02, 0.12), 0, 1) ** rng.uniform(0.3, 0.8)
    film = np.zeros((SIZE, SIZE), np.float32)
    strength = rng.uniform(0.3, 0.7)
    for k in range(2):
        inside = cv2.distanceTransform(masks[..., k], cv2.DIST_L2, 5) / SIZE
        edge = np.clip(inside / rng.uniform(0.004, 0.04), 0, 1) ** rng.uniform(0.2, 0.8)
        film += strength * rng.uniform(0.85, 1.15) * edge * thickness
    return _blur(film, rng.uniform(0.002, 0.006))


def _soft_tissue(rng: np.random.Generator, chest: Chest, lungs: np.ndarray) -> np.ndarray:
    """Draw heart, abdomen with gas, windpipe, breasts, lung vessels, opacities of disease."""
    middle, top, height = chest.middle, chest.top, chest.bottom - chest.top
    heart_at = (middle + rng.uniform(0.01, 0.06), top + rng.uniform(0.6, 0.75) * height)
    axes = (rng.uniform(0.1, 0.2), rng.uniform(0.15, 0.25) * height / 0.6)
    heart_strength = rng.uniform(0.02, 0.3)
    heart = _ellipse(heart_at, axes, rng.uniform(-50, -10)) * (1 - lungs)
    film = heart_strength * _blur(heart, rng.uniform(0.005, 0.04))
    mediastinum = _line([(middle, 0), (middle, 1)], rng.uniform(0.1, 0.2)) * (1 - lungs)
    film += rng.uniform(0, 0.4) * _blur(mediastinum, rng.uniform(0.005, 0.03))
    abdomen = (np.arange(SIZE)[:, None] / SIZE > top + 0.8 * height) * (1 - lungs)
    film += rng.uniform(0.1, 0.4) * _blur(abdomen, 0.02)
    for _ in range(rng.integers(0, 4)):  # stomach and bowel gas: as dark as lung, and not lung
        x, y = rng.uniform(0.03, 0.3), rng.uniform(-0.02, 0.12)
        axes = (rng.uniform(0.02, 0.09), rng.uniform(0.01, 0.04))
        gas = _ellipse((middle + x, chest.left[:, 1].max() + y), axes, rng.uniform(-20, 20))
        film -= rng.uniform(0.1, 0.5) * _blur(gas * (1 - lungs), 0.004)
    windpipe = _line([(middle, 0), (middle, top + 0.35 * height)], 0.03)
    film -= 0.1 * _blur(windpipe * (1 - lungs), 0.008)
    if rng.random() < 0.5:
        strength = rng.uniform(0.03, 0.2)
        for x in (chest.right[:, 0].mean() - 0.02, chest.left[:, 0].mean() + 0.02):
            y, radius = top + rng.uniform(0.65, 0.9) * height, rng.uniform(0.1, 0.19)
            film += strength * _blur(_ellipse((x, y), (radius, radius), 0), 0.004)
    for side in (-1, 1):
        hilum = (middle + side * rng.uniform(0.06, 0.1), top + 0.5 * height)
        film += _vessels(rng, hilum, side) * _blur(lungs, 0.004)
    for _ in range(rng.choice([0, 0, 1, 2, 4])):  # disease: the lung it hides is still lung
        y, x = rng.permutation(np.argwhere(lungs))[0] / SIZE
        axes = (rng.uniform(0.01, 0.1), rng.uniform(0.01, 0.1))
        spot = _ellipse((x, y), axes, rng.uniform(0, 180))
        film += rng.uniform(0.05, 0.4) * _blur(spot, rng.uniform(0.005, 0.04))
    return film


def _vessels(rng: np.random.Generator, hilum: tuple[float, float], side: int) -> np.ndarray:
    """Draw vessels that fan out of one hilum and become thinner and fainter."""
    film = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(rng.integers(6, 14)):
        angle, length = rng.uniform(-1.35, 1.35), rng.uniform(0.08, 0.28)
        bend = np.cumsum(rng.normal(angle, 0.25, 8)) / np.arange(1, 9)
        steps = np.stack([side * np.cos(bend), np.sin(bend)], 1) * length / 8
        path = np.array(hilum) + np.cumsum(steps, axis=0)
        for i in range(7):
            _line(path[i : i + 2], 0.012 * (1 - i / 8), film, 1 - i / 8)
    hilar = _blur(_ellipse(hilum, (0.02, 0.05), side * -15), 0.012)
    return rng.uniform(0.05, 0.25) * _blur(film, 0.003) + rng.uniform(0.05, 0.25) * hilar


def _bones(rng: np.random.Generator, chest: Chest) -> np.ndarray:
    """Draw spine, ribs behind and in front, clavicles, shoulder blades."""
    middle, top = chest.middle, chest.top
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    # Vertebrae are boxes that grow downwards, with thin discs between them.
    width = rng.uniform(0.025, 0.045) * (0.9 + 0.5 * y)
    column = 0.6 * rng.uniform(0.1, 0.35) * np.exp(-(((x - middle) / width) ** 6))
    discs = np.abs(np.sin(np.pi * y * (1.2 - 0.3 * y) / rng.uniform(0.045, 0.07))) ** 0.5
    film = _blur(column * (0.3 + 0.7 * discs), 0.003)
    spacing, slope = (chest.bottom - top) / rng.uniform(8, 11), rng.uniform(0.3, 1.0)
    behind, front = rng.uniform(0.03, 0.16), rng.uniform(0.0, 0.1)
    # Ribs are hardly seen behind the heart and the spine.
    shown = np.clip(np.abs(x - middle) / 0.12, 0.3, 1)
    t = np.linspace(0, 1, 24)
    for side, edge in ((-1, chest.right[:, 0].min()), (1, chest.left[:, 0].max())):
        chest_width = abs(edge - middle)
        for i in range(-1, 11):
            reach = chest_width * (0.6 + 0.45 * np.clip((i + 2) / 5, 0, 1))
            start = top + i * spacing
            rib_x = middle + side * (0.04 + (reach - 0.04) * t)
            rib_y = start + spacing * (-0.5 * np.sin(np.pi * t) + slope * 2.2 * t**2)
            film += behind * shown * _bone(np.stack([rib_x, rib_y], 1), 0.55 * spacing)
            if i > 0:
                rib_x = middle + side * reach * (0.35 + 0.65 * t)
                rib_y = start + spacing * (2.4 - 2.0 * t)
                rib = _line(np.stack([rib_x, rib_y], 1), 0.5 * spacing)
                film += front * shown * _blur(rib, 0.003)
        tilt = rng.uniform(-0.10, 0.04)
        clavicle_x = middle + side * (0.03 + chest_width * t)
        clavicle_y = top + 0.09 + tilt * t - 0.02 * np.sin(2 * np.pi * t)
        film += rng.uniform(0.05, 0.25) * _bone(np.stack([clavicle_x, clavicle_y], 1), 0.025)
        blade_at = (edge + side * rng.uniform(-0.04, 0.05), top + 0.2)
        blade = _ellipse(blade_at, (0.05, 0.16), side * rng.uniform(5, 25))
        film += rng.uniform(0.0, 0.15) * _blur(blade, 0.012)
    return film


def _bone(points: np.ndarray, width: float) -> np.ndarray:
    """Draw a long bone, its cortex brighter than its core."""
    line = _line(points, width)
    return _blur(line, 0.002) - 0.4 * _blur(line, 0.008)


def _pose(
    rng: np.random.Generator, film: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Turn, scale, stretch and shift the patient; the masks alike, as float32 (SIZE, SIZE, 2)."""
    centre = (SIZE / 2, SIZE / 2)
    matrix = cv2.getRotationMatrix2D(centre, rng.normal(0, 4), rng.uniform(0.75, 1.2))
    matrix[:, 2] += rng.normal(0, 0.05 * SIZE, 2)
    stretch = rng.uniform(0.8, 1.2)
    matrix[1] = matrix[1] * stretch + np.array([0, 0, (1 - stretch) * SIZE / 2])
    film = cv2.warpAffine(film, matrix, (SIZE, SIZE), borderMode=cv2.BORDER_REPLICATE)
    return film, cv2.warpAffine(masks.astype(np.float32), matrix, (SIZE, SIZE))


def _expose(rng: np.random.Generator, film: np.ndarray) -> np.ndarray:
    """Take the picture: film curve, uneven field, blur, noise, a tube: uint8 (SIZE, SIZE)."""
    if rng.random() < 0.25:  # a tube or a cable
        path = np.cumsum(rng.normal((0, 0.06), 0.02, (12, 2)), axis=0) + (rng.uniform(0.3, 0.7), 0)
        film = film + _blur(rng.uniform(0.1, 0.5) * _line(path, 0.008), 0.002)
    low, high = np.percentile(film, (1, rng.uniform(75, 100)))
    unit = np.clip((film - low) / (high - low), 0, 1.2) ** rng.uniform(0.5, 2.0)
    field = rng.normal(0, rng.uniform(0, 0.08), (3, 3))
    field = cv2.resize(field, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    unit = _blur(unit + field, rng.uniform(0, 0.004))
    unit += rng.uniform(0, 0.04) * rng.normal(size=unit.shape)
    return np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)


def _collimate(rng: np.random.Generator, picture: np.ndarray, masks: np.ndarray) -> None:
    """Cover the film's edges in black or white, and the masks: covered lung is not asked for."""
    for side in range(4):
        if rng.random() < 0.3:
            depth = int(SIZE * rng.uniform(0, 0.35 if side == 2 else 0.12))
            np.rot90(picture, side)[:depth] = 0 if rng.random() < 0.8 else 255
            np.rot90(masks, side)[:depth] = 0


def _markers(rng: np.random.Generator, picture: np.ndarray) -> None:
    """Write the side letter and the technician's label, sometimes in a white box."""
    for text, left in (("R", 0.02), (rng.choice(["PA", "L", "ERECT", "AP SUPINE"]), 0.72)):
        if rng.random() < 0.6:
            x, y = int(SIZE * (left + rng.uniform(0, 0.12))), int(SIZE * rng.uniform(0.05, 0.16))
            boxed = rng.random() < 0.4
            if boxed:
                cv2.rectangle(picture, (x - 3, y - 12), (x + 9 * len(text), y + 4), 255, -1)
            font, grey = cv2.FONT_HERSHEY_SIMPLEX, 0 if boxed else 255
            cv2.putText(picture, str(text), (x, y), font, 0.4, grey, 1, cv2.LINE_AA)


def make_phantoms(out_dir: str | Path, count: int, seed: int) -> Path:
    """Write `count` phantoms in the Montgomery layout to `out_dir`; return the folder.

    Nothing is done if just these are there already. Image i depends on (seed, i) alone, so a
    larger set holds the smaller one. The folder appears when it is complete. `out_dir` "" is a
    folder in files/. Raises UserError if `out_dir` holds anything else, or for wrong numbers.
    """
    if count < 1 or seed < 0:
        raise UserError(f"count is {count} and seed {seed}; expected at least 1 and 0")
    out_dir = Path(out_dir or f"files/phantoms-{count}-seed{seed}-v{VERSION}")
    made_by = {"version": VERSION, "count": count, "seed": seed}
    note = out_dir / "phantoms.json"
    if note.is_file() and json.loads(note.read_text()) == made_by:
        return out_dir
    if out_dir.exists():
        raise UserError(
            f"{out_dir} holds other files, or phantoms of another count, seed or version; "
            "remove it or name another folder"
        )
    unfinished = out_dir.with_name(f".{out_dir.name}.making")
    shutil.rmtree(unfinished, ignore_errors=True)

    def write_one(i: int) -> None:
        image, masks = draw_phantom(np.random.default_rng((seed, i)))
        name = f"phantom_{i:04d}.png"
        pictures.write_picture(unfinished / "CXR_png" / name, image)
        for k, folder in enumerate(("leftMask", "rightMask")):
            mask = 255 * masks[..., k]
            pictures.write_picture(unfinished / "ManualMask" / folder / name, mask)

    with ThreadPoolExecutor() as pool:
        done = pool.map(write_one, range(count))
        list(tqdm(done, "drawing phantoms", count, unit="image", disable=None))
    (unfinished / note.name).write_text(json.dumps(made_by))
    return unfinished.rename(out_dir)
