"""Takes the pictures in docs/report, of the report on the sample pair: python tools/screenshots.py

Needs Chromium; takes a minute on two cores. The outlines are those of the lungs by a threshold.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scipy import ndimage  # noqa: E402

from adregnet_jax.data.io.images import Image, read_image, write_image  # noqa: E402
from tools.chromium import chromium, opened  # noqa: E402

AIR = 0.45  # of the range of intensities, below which a voxel is lung if it is inside of the body
LARGEST_LUNGS = 2
VESSEL = 3  # voxels, half of the widest vessel that the lungs are to include
COLOURS = 256  # of a picture
PLACE = "viewer.view.at = [66, 38, 30];"
# For each picture the changes of the view, and the part of the page; None for all of it.
PICTURES = {
    "overview": ("viewer.view.labels = '';", None),
    "blend": ("viewer.view.blend = 0.5;", "#panel-compared"),
    "checkerboard": ("viewer.view.checkerboard = true;", "#panel-compared"),
    "edges": ("viewer.view.edges = 'fixed';", "#panel-compared"),
    "displacement": ("viewer.view.map = 'displacement';", "#panel-compared"),
    "jacobian": ("viewer.view.map = 'jacobian';", "#panel-compared"),
    "error": ("viewer.view.map = 'error';", "#panel-compared"),
    "outlines": ("viewer.view.labels = 'all';", "#viewer .panels"),
    "landmarks": (
        "Object.assign(viewer.view, {landmarks: true, alone: 'moving', planes: 'coronal'});",
        "#panel-moving",
    ),
}
PLAIN = (
    "Object.assign(viewer.view, {blend: 1, second: 'warped', checkerboard: false, edges: '', map: '',"
    " labels: '', landmarks: false, alone: null, planes: 'all'});"
)


def lungs(scan: Image) -> Image:
    """The largest dark regions that don't touch the border."""
    low, high = np.percentile(scan.values, (0.5, 99.5))
    dark = ndimage.binary_opening(scan.values < low + AIR * (high - low))
    regions, _ = ndimage.label(dark)
    sizes = np.bincount(regions.ravel())
    sizes[[0, *np.unique(regions[[0, -1]]), *np.unique(regions[:, [0, -1]])]] = 0
    found = ndimage.binary_closing(np.isin(regions, np.argsort(sizes)[-LARGEST_LUNGS:]), iterations=VESSEL)
    return Image(found.astype(np.uint8), scan.affine)


def registered(folder: Path) -> Path:
    """The report on the sample pair."""
    command: list[str | Path] = [sys.executable, "-c", "from adregnet_jax.cli.app import main; main()"]
    subprocess.run([*command, "sample", folder / "pair"], check=True)
    files = {name: folder / "pair" / f"{name}.nii.gz" for name in ("fixed", "moving")}
    scored: list[str | Path] = []
    for name, path in files.items():
        write_image(folder / f"{name}_labels.nii.gz", lungs(read_image(path)))
        scored += [f"--{name}-labels", folder / f"{name}_labels.nii.gz"]
        scored += [f"--{name}-landmarks", path.with_name(f"{name}.csv")]
    options: list[str | Path] = ["--subjects", "same", "--output", folder / "out"]
    subprocess.run([*command, "register", *files.values(), *options, *scored], check=True)
    return folder / "out" / "report.html"


def take(page: Any, name: str) -> None:
    """Writes one picture."""
    changes, part = PICTURES[name]
    page.evaluate(f"{PLAIN}{PLACE}{changes}viewer.draw()")
    page.wait_for_timeout(200)
    shot = (page.locator(part) if part else page).screenshot()
    picture = (
        Picture.open(io.BytesIO(shot))
        .convert("RGB")
        .quantize(COLOURS, Picture.Quantize.FASTOCTREE, dither=Picture.Dither.NONE)
    )
    path = ROOT / "docs" / "report" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        chromium() as browser,
        opened(browser, registered(Path(folder)), width=1280, height=900) as page,
    ):
        for name in PICTURES:
            take(page, name)
