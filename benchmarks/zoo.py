"""Registers every pair of a folder of many kinds of scans with the default options, and scores each.

    python benchmarks/zoo.py FOLDER [--pairs NAME ...] [--options NAME=VALUE ...] [--json FILE]

FOLDER holds pairs.csv with the columns name, fixed, moving, measure, fixed_truth, moving_truth: files in the
folder, "points" (CSV files of x,y,z in RAS mm, row by row) or "labels" (label maps), and the truth of either
scan. Other columns are ignored. If there is a peers.csv with the columns pair and best, the best result of
other programs, it is printed next to ours. Make such a folder of your own pairs to try the defaults on them.

Prints one row per pair: mean distance in mm or mean Dice over all labels before registration, after the
affine step alone and after all; the share of folded voxels, the SD of the logarithm of the Jacobian
determinant and its 1st and 99th percentiles; the contrast and the smoothness that were found, and the gain
in similarity in regions that a field didn't see over that in those it saw; the verdict; mean and 99th
percentile of the distance, in voxels, by which the field and the written inverse together miss the identity,
where the determinant is above 0.3 and the point stays inside; and the seconds of the whole registration, the
first time with compilation (cached on disk) and again. `--options` are fields of `RegistrationOptions`, for
instance `effort=thorough`. `--sheet FILE` draws a row per pair: a slice of the fixed scan, of the moving one
where its header puts it, and of the warped one, the last two with outlines of the fixed scan.
`--rounds` is not used.
"""

import csv
import dataclasses
import time
from pathlib import Path

import comparison
import numpy as np
import scipy.ndimage

from adregnet_jax.launch import process

process.keep_freed_memory()
process.use_compilation_cache()

from adregnet_jax import load_pretrained, metrics  # noqa: E402
from adregnet_jax.ops.cubic import inside_grid  # noqa: E402
from adregnet_jax.registration.field import DisplacementField, field_from_affine, warp_points  # noqa: E402
from adregnet_jax.registration.files import register_files  # noqa: E402
from adregnet_jax.registration.measure import measure_scans  # noqa: E402
from adregnet_jax.registration.options import RegistrationOptions, ScanFiles  # noqa: E402

LEAST_DETERMINANT = 0.3
POINTS = 100_000  # voxels of the fixed grid at which the inverse is checked
SHEET_INCHES, SHEET_DPI = 2.0, 90  # of one picture of the sheet
OUTLINES = (0.25, 0.6)  # of the range of a smoothed fixed scan


def read_pairs(folder):
    with (folder / "pairs.csv").open() as file:
        return list(csv.DictReader(file))


def best_of_peers(folder):
    path = folder / "peers.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        return {row["pair"]: float(row["best"]) for row in csv.DictReader(file) if row["best"]}


def files_of(folder, pair):
    kind = {"points": "landmarks", "labels": "labels"}[pair["measure"]]
    truth = {f"{scan}_{kind}": folder / pair[f"{scan}_truth"] for scan in ("fixed", "moving")}
    return ScanFiles(fixed=folder / pair["fixed"], moving=folder / pair["moving"], **truth)


def score(row, when=""):
    """Mean distance in mm or mean Dice of a measured row, `when` "" or "_before"."""
    if row[f"tre{when}_mm"] is not None:
        return row[f"tre{when}_mm"]
    return row[f"dice{when}"]


def inverse_errors(registered):
    """Distances in voxels of the fixed grid by which field and inverse together miss the identity."""
    measurement, scans = registered.measurement, registered.scans
    believed = np.argwhere(measurement.jacobian > LEAST_DETERMINANT)
    chosen = believed[np.random.default_rng(0).permutation(len(believed))[:POINTS]]
    affine = scans.fixed.affine
    points_mm = chosen @ affine[:3, :3].T + affine[:3, 3]
    there_mm = np.asarray(warp_points(registered.field, points_mm))
    back_mm = np.asarray(warp_points(registered.inverse, there_mm))
    voxels = (there_mm - scans.moving.affine[:3, 3]) @ np.linalg.inv(scans.moving.affine[:3, :3]).T
    inside = np.asarray(inside_grid(voxels, scans.moving.shape))
    missed = (back_mm - points_mm) @ np.linalg.inv(affine[:3, :3]).T
    return np.linalg.norm(missed[inside], axis=1)


def affine_alone(registered):
    """The score after the affine step."""
    scans = registered.scans
    field = field_from_affine(registered.matrix, shape=scans.fixed.shape, affine=scans.fixed.affine)
    field = DisplacementField(np.asarray(field.displacement), scans.fixed.affine)
    return score(measure_scans(scans, field, registered.warped, modality=registered.modality).row)


def slices_of(measurement, spacing_mm):
    """The middle slice along the axis with the fewest voxels, and the aspect ratio of its pixels."""
    axis = int(np.argmin(measurement.fixed.shape))
    images = (measurement.fixed, measurement.moving, measurement.warped)
    height, width = np.delete(spacing_mm, axis)[::-1]
    return [np.take(image, image.shape[axis] // 2, axis=axis).T for image in images], height / width


def draw_sheet(path, pictures):
    """`pictures`: by the name of each pair, what `slices_of` returns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3 * SHEET_INCHES, len(pictures) * SHEET_INCHES)
    figure, axes = pyplot.subplots(len(pictures), 3, figsize=size, squeeze=False, layout="compressed")
    for row, (name, (images, aspect)) in zip(axes, pictures.items(), strict=True):
        outlines = scipy.ndimage.gaussian_filter(images[0], 1)
        for place, image, title in zip(row, images, ("fixed", "moving", "warped"), strict=True):
            place.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, origin="lower")
            if title != "fixed":
                place.contour(outlines, levels=OUTLINES, colors="tab:orange", linewidths=0.4)
            place.set_title(f"{name}: {title}" if title == "fixed" else title, fontsize=7)
            place.axis("off")
    figure.savefig(path, dpi=SHEET_DPI)
    pyplot.close(figure)


def row_of(folder, pair, options, network, best):
    """The row of a pair, and its slices for the sheet."""
    files = files_of(folder, pair)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        registered = register_files(**files.given(), options=options, network=network)
        seconds.append(time.perf_counter() - began)
    measured = registered.measurement.row
    low, high = np.percentile(registered.measurement.jacobian, (1, 99))
    errors = inverse_errors(registered)
    evidence = registered.evidence
    smoothness = None
    if evidence is not None:
        smoothness = round(evidence.smoothness, 2) if evidence.believable else "no motion"
    row = {
        "pair": pair["name"],
        "measure": "mm" if pair["measure"] == "points" else "Dice",
        "before": round(score(measured, "_before"), 3),
        "affine": round(affine_alone(registered), 3),
        "after": round(score(measured), 3),
        "peers": best,
        "folded %": round(measured["folded_percent"], 4),
        "SDlogJ": round(float(metrics.sd_log_jacobian(registered.measurement.displacement)), 3),
        "J 1 %": round(float(low), 2),
        "J 99 %": round(float(high), 2),
        "contrast": registered.modality,
        "smoothness": smoothness,
        "unseen/seen": None if evidence is None else round(evidence.unseen_gain / evidence.seen_gain, 2),
        "verdict": registered.assessment.verdict if registered.assessment else None,
        "inverse mean": round(float(errors.mean()), 3),
        "inverse 99 %": round(float(np.percentile(errors, 99)), 3),
        "first s": round(seconds[0], 1),
        "again s": round(seconds[1], 1),
    }
    return row, slices_of(registered.measurement, registered.scans.fixed.spacing_mm)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--options", nargs="+", metavar="NAME=VALUE", default=[])
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw the pairs into this PNG file")
    arguments = parser.parse_args()
    options = dataclasses.replace(
        RegistrationOptions(), **dict(option.split("=", 1) for option in arguments.options)
    )
    network = load_pretrained() if options.by_network else None
    best = best_of_peers(arguments.folder)
    rows, pictures = [], {}
    for pair in read_pairs(arguments.folder):
        if arguments.pairs and pair["name"] not in arguments.pairs:
            continue
        row, pictures[pair["name"]] = row_of(arguments.folder, pair, options, network, best.get(pair["name"]))
        rows.append(row)
        print(row, flush=True)
    if arguments.sheet:
        draw_sheet(arguments.sheet, pictures)
    comparison.report(rows, arguments.json)


if __name__ == "__main__":
    main()
