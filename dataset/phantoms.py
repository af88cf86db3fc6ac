"""Make synthetic chest X-rays with exact lung masks: the default data set, offline and in seconds.

    python phantom.py [--count 200] [--seed 0] [--out-dir DIR]

Writes the Montgomery layout (CXR_png/, ManualMask/leftMask/, ManualMask/rightMask/). A phantom is a sum of attenuations
(torso, bones, heart, vessels, lungs taken away) whose shapes and strengths are drawn anew for each image, far beyond
what patients vary: training on randomised appearance carries over to real scans (SynthSeg, Billot et al. 2023).
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from scipy.interpolate import PchipInterpolator
from tqdm import tqdm

from imaging import pictures
from utils import UserError

SIZE = 256  # pixels, height and width
VERSION = 1  # raise it when the drawing changes: data sets of another version are made anew

# Outlines in a lung's own box: (across, down); 0 at the spine and the apex, 1 at the ribs and the outer lower corner.
RIGHT_LUNG = (
    (0.10, 0.90),
    (0.20, 0.72),
    (0.16, 0.50),
    (0.04, 0.26),
    (0.07, 0.08),
    (0.32, 0.0),
    (0.66, 0.08),
)
LEFT_LUNG = (
    (0.52, 0.88),
    (0.38, 0.68),
    (0.12, 0.46),
    (0.06, 0.27),
    (0.08, 0.09),
    (0.30, 0.0),
    (0.66, 0.08),
)
RIBS_SIDE = ((0.86, 0.28), (0.94, 0.55), (0.98, 0.80), (1.0, 1.0))


def draw_phantom(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one synthetic X-ray: uint8 image (SIZE, SIZE) and uint8 masks (SIZE, SIZE, 2) in {0, 1}, left lung first."""
    middle, top, bottom = (
        0.5 + rng.normal(0, 0.02),
        rng.uniform(0.08, 0.22),
        rng.uniform(0.62, 0.85),
    )
    right = _lung(rng, RIGHT_LUNG, middle, top, bottom, side=-1)
    left = _lung(rng, LEFT_LUNG, middle, top, bottom, side=1)
    masks = np.stack([_fill(left), _fill(right) * (1 - _fill(left))], axis=-1)
    torso = _torso(rng, right, left, middle, top)
    film = torso - _air(rng, masks) + _bones(rng, right, left, middle, top, bottom)
    film += np.sqrt(torso) * _soft_tissue(rng, masks, left, right, middle, top, bottom)
    film, masks = _pose(rng, np.clip(film, 0, None), masks)
    picture = _expose(rng, film)
    masks = (masks > 0.5).astype(np.uint8)
    _collimate(rng, picture, masks)
    _markers(rng, picture)
    return picture, masks


def _lung(
    rng: np.random.Generator, medial: tuple, middle: float, top: float, bottom: float, side: int
) -> np.ndarray:
    """Outline one lung: points (P, 2), x and y in [0, 1]; `side` is -1 left of the spine in the image, 1 right."""
    points = np.array(medial + RIBS_SIDE) + rng.normal(0, 0.02, (len(medial) + len(RIBS_SIDE), 2))
    points[:3, 0] += rng.normal(0, 0.06)  # a wider or narrower heart
    steps = np.arange(len(points))
    border = PchipInterpolator(steps, points)(np.linspace(0, steps[-1], 80))
    along = np.linspace(0, 1, 30)[
        1:-1, None
    ]  # the diaphragm's dome, from the outer corner back to the heart
    dome = points[-1] * (1 - along) + points[0] * along
    dome[:, 1] -= rng.uniform(0.0, 0.22) * np.sin(np.pi * along[:, 0] ** rng.uniform(0.5, 0.9))
    across, down = np.concatenate([border, dome]).T
    start, width = rng.uniform(0.03, 0.07), rng.uniform(0.24, 0.38)
    height = (bottom - top) * rng.uniform(0.88, 1.08)
    return np.stack(
        [middle + side * (start + width * across), top + rng.normal(0, 0.012) + height * down],
        axis=1,
    )


def _fill(points: np.ndarray) -> np.ndarray:
    """Fill a polygon of points in [0, 1]: uint8 (SIZE, SIZE) in {0, 1}."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    cv2.fillPoly(canvas, [np.round(points * (SIZE - 1) * 16).astype(np.int32)], 1, shift=4)
    return canvas


def _line(canvas: np.ndarray, points: np.ndarray, value: float, width: float) -> None:
    """Draw an anti-aliased line through points (P, 2) in [0, 1] on float32 `canvas`; `width` is a share of the side."""
    pixels = np.round(points * (SIZE - 1)).astype(np.int32)
    cv2.polylines(canvas, [pixels], False, float(value), max(1, round(width * SIZE)), cv2.LINE_AA)


def _blur(array: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; `sigma` is a share of the side."""
    return cv2.GaussianBlur(array.astype(np.float32), (0, 0), max(0.3, sigma * SIZE))


def _ellipse(centre: tuple[float, float], axes: tuple[float, float], angle: float) -> np.ndarray:
    """Fill an ellipse, lengths as shares of the side, angle in degrees: float32 (SIZE, SIZE) in {0, 1}."""
    canvas = np.zeros((SIZE, SIZE), np.float32)
    box = (tuple(SIZE * c for c in centre), tuple(2 * SIZE * a for a in axes), angle)
    cv2.ellipse(canvas, box, 1.0, -1)
    return canvas


def _torso(
    rng: np.random.Generator, right: np.ndarray, left: np.ndarray, middle: float, top: float
) -> np.ndarray:
    """Trunk, shoulders and neck: thick in the middle, thin at the skin."""
    wall, arm, neck = rng.uniform(0.02, 0.09), rng.uniform(0.05, 0.3), rng.uniform(0.07, 0.13)
    shoulder, waist = top + rng.uniform(-0.06, 0.06), rng.uniform(-0.03, 0.08)
    x0, x1 = right[:, 0].min() - wall, left[:, 0].max() + wall
    half = [(neck, -0.05), (neck, shoulder - 0.10), (0.28, shoulder - 0.02)]
    side = [(-1, x0), (1, x1)]
    outline = {
        s: [(middle + s * w, y) for w, y in half]
        + [
            (x + s * arm, shoulder + 0.08),
            (x + s * arm * 0.6, top + 0.30),
            (x, top + 0.38),
            (x - s * waist, 1.05),
        ]
        for s, x in side
    }
    body = _fill(np.array(outline[-1] + outline[1][::-1]))
    depth = cv2.distanceTransform(body, cv2.DIST_L2, 5) / SIZE
    return _blur(
        rng.uniform(0.7, 1.1) * np.sqrt(np.clip(depth / rng.uniform(0.15, 0.35), 0, 1)), 0.008
    )


def _air(rng: np.random.Generator, masks: np.ndarray) -> np.ndarray:
    """What the lungs take away: less at their edge, where they are thin, and not the same in both."""
    film = np.zeros((SIZE, SIZE), np.float32)
    strength = rng.uniform(0.3, 0.7)
    for k in range(2):
        depth = cv2.distanceTransform(masks[..., k], cv2.DIST_L2, 5) / SIZE
        rise = np.clip(depth / rng.uniform(0.02, 0.12), 0, 1) ** rng.uniform(0.3, 0.8)
        film += strength * rng.uniform(0.85, 1.15) * rise
    return _blur(film, rng.uniform(0.002, 0.006))


def _soft_tissue(
    rng: np.random.Generator,
    masks: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    middle: float,
    top: float,
    bottom: float,
) -> np.ndarray:
    """Heart and great vessels, abdomen with stomach gas, breasts, hilar vessels, opacities of disease."""
    film = np.zeros((SIZE, SIZE), np.float32)
    lungs = masks.max(axis=-1)
    height = bottom - top
    heart = (middle + rng.uniform(0.02, 0.06), top + 0.68 * height)
    film += rng.uniform(0.1, 0.3) * _blur(
        _ellipse(heart, (0.13, 0.2 * height / 0.6), -30) * (1 - lungs), 0.01
    )
    abdomen = (np.arange(SIZE)[:, None] / SIZE > top + 0.8 * height) * (1 - lungs)
    film += rng.uniform(0.1, 0.4) * _blur(abdomen, 0.02)
    for _ in range(rng.integers(0, 4)):  # stomach and bowel gas: as dark as lung, and not lung
        centre = (middle + rng.uniform(0.03, 0.3), left[:, 1].max() + rng.uniform(-0.02, 0.12))
        gas = _ellipse(
            centre, (rng.uniform(0.02, 0.09), rng.uniform(0.01, 0.04)), rng.uniform(-20, 20)
        )
        film -= rng.uniform(0.1, 0.5) * _blur(gas * (1 - lungs), 0.004)
    if rng.random() < 0.5:
        strength = rng.uniform(0.03, 0.2)
        for x in (right[:, 0].mean() - 0.02, left[:, 0].mean() + 0.02):
            breast = _ellipse(
                (x, top + rng.uniform(0.65, 0.9) * height), (rng.uniform(0.1, 0.19),) * 2, 0
            )
            film += strength * _blur(breast, 0.004)
    for side in (-1, 1):
        film += _vessels(
            rng, (middle + side * rng.uniform(0.06, 0.1), top + 0.5 * height), side
        ) * _blur(lungs, 0.004)
    for _ in range(rng.choice([0, 0, 1, 2, 4])):  # disease: the lung it hides is still lung
        y, x = rng.permutation(np.argwhere(lungs))[0] / SIZE
        spot = _ellipse(
            (x, y), (rng.uniform(0.01, 0.1), rng.uniform(0.01, 0.1)), rng.uniform(0, 180)
        )
        film += rng.uniform(0.05, 0.4) * _blur(spot, rng.uniform(0.005, 0.04))
    return film


def _vessels(rng: np.random.Generator, hilum: tuple[float, float], side: int) -> np.ndarray:
    """Vessels fanning out of one hilum, thinner and fainter on the way."""
    film = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(rng.integers(6, 14)):
        angle, length = rng.uniform(-1.35, 1.35), rng.uniform(0.08, 0.28)
        bend = np.cumsum(rng.normal(angle, 0.25, 8)) / np.arange(1, 9)
        path = np.array(hilum) + np.cumsum(
            np.stack([side * np.cos(bend), np.sin(bend)], 1) * length / 8, axis=0
        )
        for i in range(7):
            _line(film, path[i : i + 2], 1 - i / 8, 0.012 * (1 - i / 8))
    hilar = _blur(_ellipse(hilum, (0.02, 0.05), side * -15), 0.012)
    return rng.uniform(0.05, 0.25) * _blur(film, 0.003) + rng.uniform(0.05, 0.25) * hilar


def _bones(
    rng: np.random.Generator,
    right: np.ndarray,
    left: np.ndarray,
    middle: float,
    top: float,
    bottom: float,
) -> np.ndarray:
    """Spine, ribs behind and in front, clavicles, shoulder blades."""
    film = np.zeros((SIZE, SIZE), np.float32)
    y = np.arange(SIZE)[:, None] / SIZE
    column = np.exp(-(((np.arange(SIZE)[None] / SIZE - middle) / rng.uniform(0.025, 0.045)) ** 4))
    film += column * (
        rng.uniform(0.1, 0.35) + 0.05 * np.sin(2 * np.pi * y / rng.uniform(0.045, 0.07))
    )
    spacing, slope = (bottom - top) / rng.uniform(8, 11), rng.uniform(0.3, 1.0)
    behind, front = rng.uniform(0.03, 0.16), rng.uniform(0.0, 0.1)
    for side, edge in ((-1, right[:, 0].min()), (1, left[:, 0].max())):
        t = np.linspace(0, 1, 24)
        for i in range(-1, 11):
            reach = abs(edge - middle) * (0.6 + 0.45 * np.clip((i + 2) / 5, 0, 1))
            start = top + i * spacing
            rise = spacing * (-0.5 * np.sin(np.pi * t) + slope * 2.2 * t**2)
            rib = np.zeros_like(film)
            _line(rib, np.stack([middle + side * reach * t, start + rise], 1), 1, 0.55 * spacing)
            film += behind * (
                _blur(rib, 0.002) - 0.4 * _blur(rib, 0.008)
            )  # the cortex is brighter than the core
            if i > 0:
                rib = np.zeros_like(film)
                path = np.stack(
                    [middle + side * reach * (0.35 + 0.65 * t), start + spacing * (2.4 - 2.0 * t)],
                    1,
                )
                _line(rib, path, 1, 0.5 * spacing)
                film += front * _blur(rib, 0.003)
        clavicle = np.zeros_like(film)
        tilt = rng.uniform(-0.10, 0.04)
        path = np.stack(
            [
                middle + side * (0.03 + 0.36 * t),
                top + 0.09 + tilt * t - 0.03 * np.sin(2 * np.pi * t),
            ],
            1,
        )
        _line(clavicle, path, 1, 0.025)
        film += rng.uniform(0.05, 0.25) * _blur(clavicle, 0.002)
        blade = _ellipse(
            (edge + side * rng.uniform(-0.01, 0.08), top + 0.2),
            (0.05, 0.16),
            side * rng.uniform(5, 25),
        )
        film += rng.uniform(0.0, 0.15) * _blur(blade, 0.005)
    return film


def _pose(
    rng: np.random.Generator, film: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Turn, scale and shift the patient; the same for the masks, as float32 (SIZE, SIZE, 2)."""
    centre = (SIZE / 2, SIZE / 2)
    matrix = cv2.getRotationMatrix2D(centre, rng.normal(0, 4), rng.uniform(0.85, 1.15))
    matrix[:, 2] += rng.normal(0, 0.03 * SIZE, 2)
    film = cv2.warpAffine(film, matrix, (SIZE, SIZE), borderMode=cv2.BORDER_REPLICATE)
    return film, cv2.warpAffine(masks.astype(np.float32), matrix, (SIZE, SIZE))


def _expose(rng: np.random.Generator, film: np.ndarray) -> np.ndarray:
    """Take the picture: film curve, uneven field, blur, noise, a tube: uint8 (SIZE, SIZE)."""
    if rng.random() < 0.25:  # a tube or a cable
        path = np.cumsum(rng.normal((0, 0.06), 0.02, (12, 2)), axis=0) + (rng.uniform(0.3, 0.7), 0)
        tube = np.zeros_like(film)
        _line(tube, path, rng.uniform(0.1, 0.5), 0.008)
        film = film + _blur(tube, 0.002)
    low, high = np.percentile(film, (1, 99))
    unit = np.clip((film - low) / (high - low), 0, 1.2) ** rng.uniform(0.6, 1.6)
    field = cv2.resize(
        rng.normal(0, rng.uniform(0, 0.08), (3, 3)), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC
    )
    unit = _blur(unit + field, rng.uniform(0, 0.004))
    unit += rng.uniform(0, 0.04) * rng.normal(size=unit.shape)
    return np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)


def _collimate(rng: np.random.Generator, picture: np.ndarray, masks: np.ndarray) -> None:
    """Cover the film's edges, black or now and then white; lung that is not to be seen is not lung to be found."""
    for side in range(4):
        if rng.random() < 0.3:
            depth = int(SIZE * rng.uniform(0, 0.12))
            np.rot90(picture, side)[:depth] = 0 if rng.random() < 0.8 else 255
            np.rot90(masks, side)[:depth] = 0


def _markers(rng: np.random.Generator, picture: np.ndarray) -> None:
    """Write the side letter and the technician's label, now and then in a white box."""
    for text, left in (("R", 0.02), (rng.choice(["PA", "L", "ERECT", "AP SUPINE"]), 0.72)):
        if rng.random() < 0.6:
            x, y = int(SIZE * (left + rng.uniform(0, 0.12))), int(SIZE * rng.uniform(0.05, 0.16))
            if rng.random() < 0.4:
                cv2.rectangle(picture, (x - 3, y - 12), (x + 9 * len(text), y + 4), 255, -1)
                cv2.putText(
                    picture, str(text), (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 0, 1, cv2.LINE_AA
                )
            else:
                cv2.putText(
                    picture, str(text), (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1, cv2.LINE_AA
                )


def make_phantoms(out_dir: str | Path, count: int, seed: int) -> Path:
    """Write `count` phantoms in the Montgomery layout to `out_dir`, unless just these are there already; return it.

    Image i depends on (seed, i) alone, so a larger set holds the smaller one. The folder appears when it is complete.
    Raises UserError if it holds anything else, or for a negative seed or count.
    """
    if count < 1 or seed < 0:
        raise UserError(f"count is {count} and seed {seed}; expected at least 1 and 0")
    out_dir = Path(out_dir or f"files/phantoms-{count}-seed{seed}")
    recipe = {"version": VERSION, "count": count, "seed": seed}
    note = out_dir / "phantoms.json"
    if note.is_file() and json.loads(note.read_text()) == recipe:
        return out_dir
    if out_dir.exists():
        raise UserError(
            f"{out_dir} holds other files or phantoms of another version; remove it or name another"
        )
    aside = out_dir.with_name(f".{out_dir.name}.making")
    shutil.rmtree(aside, ignore_errors=True)

    def write_one(i: int) -> None:
        image, masks = draw_phantom(np.random.default_rng((seed, i)))
        name = f"phantom_{i:04d}.png"
        pictures.write_picture(aside / "CXR_png" / name, image)
        pictures.write_picture(aside / "ManualMask" / "leftMask" / name, 255 * masks[..., 0])
        pictures.write_picture(aside / "ManualMask" / "rightMask" / name, 255 * masks[..., 1])

    with ThreadPoolExecutor() as pool:
        done = pool.map(write_one, range(count))
        list(tqdm(done, total=count, desc="making phantoms", unit="image", disable=None))
    (aside / note.name).write_text(json.dumps(recipe))
    return aside.rename(out_dir)
