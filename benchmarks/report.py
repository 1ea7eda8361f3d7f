"""The interactive report of a large pair: time to make the page, its size, and the time to its first picture.

    python benchmarks/report.py [--shape 160 192 224] [--rounds N]

The pair is a smooth body with fine texture and noise, which compresses worse than most scans, with labels of
30 regions and 300 landmarks. "made" is the time for the page alone, without the registration. The times in
Chromium, which draws by the processor here, count from the start of the navigation to the file; "first
picture" is the panel of the fixed scan, "all" are the three panels, each read back from the canvas. Without a
Chromium these are empty. Prints one row per round.
"""

import sys
import tempfile
import time
from pathlib import Path

import comparison
import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1]))

from adregnet_jax.report.page import page
from adregnet_jax.report.viewer import ViewedPair
from tools.chromium import chromium, chromium_path, opened

LABELS = 30
LANDMARKS = 300
NOISE = 0.01  # standard deviation, of the range of intensities


def smooth(rng, shape, blocks):
    """Random values between 0 and 1, linear between `blocks` knots along each axis."""
    coarse = rng.random([blocks] * 3, np.float32)
    values = ndimage.zoom(coarse, np.array(shape) / blocks, order=1)
    return (values - values.min()) / np.ptp(values)


def made_up_pair(shape):
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    body = sum(axis**2 for axis in axes) < 0.8
    texture = body * (0.3 + 0.5 * smooth(rng, shape, 40) * smooth(rng, shape, 10))

    def scan(shift):
        values = np.roll(texture, shift, 0) + NOISE * rng.standard_normal(shape, np.float32)
        return np.clip(values, 0, 1).astype(np.float32)

    displacement = np.stack([4 * smooth(rng, shape, 6) for _ in range(3)], axis=-1).astype(np.float32)
    labels = (body * (1 + (LABELS - 1) * smooth(rng, shape, 12))).astype(np.int32)
    points = rng.uniform(0.25, 0.75, (LANDMARKS, 3)) * shape
    return ViewedPair(
        "",
        affine=np.eye(4),
        fixed=scan(0),
        moving=scan(4),
        warped=scan(1),
        displacement=displacement,
        jacobian=(0.6 + 0.8 * smooth(rng, shape, 8)).astype(np.float32),
        error_mm=(3 * smooth(rng, shape, 8)).astype(np.float32),
        fixed_labels=labels,
        moving_labels=np.roll(labels, 4, 0),
        warped_labels=np.roll(labels, 1, 0),
        fixed_landmarks_mm=points,
        moving_landmarks_mm=points + 4,
        mapped_landmarks_mm=points + 3,
    )


def shown_s(browser, path):
    """Seconds to the first picture, and to all three panels."""
    with opened(browser, path, width=1500, height=950) as opened_page:
        marks = opened_page.evaluate("performance.getEntriesByType('mark').map((m) => [m.name, m.startTime])")
    at_ms = dict(marks)
    return at_ms["fixed drawn"] / 1000, at_ms["compared drawn"] / 1000


def measure(pair, path, browser):
    began = time.perf_counter()
    text = page("Registration of two scans", "", [], pairs=[pair])
    path.write_text(text, encoding="utf-8")
    made = time.perf_counter() - began
    first, everything = shown_s(browser, path) if browser is not None else (None, None)
    return {
        "shape": " x ".join(map(str, pair.fixed.shape)),
        "made, s": round(made, 2),
        "size, MB": round(path.stat().st_size / 1e6, 1),
        "first picture, s": first and round(first, 2),
        "all panels, s": everything and round(everything, 2),
    }


def main() -> None:
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 192, 224])
    options = parser.parse_args()
    pair = made_up_pair(options.shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        if chromium_path() is None:
            rows = [measure(pair, path, None) for _ in range(options.rounds)]
        else:
            with chromium() as browser:
                rows = [measure(pair, path, browser) for _ in range(options.rounds)]
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
