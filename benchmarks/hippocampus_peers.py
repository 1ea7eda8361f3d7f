"""Measures classical methods on the hippocampus test pairs, given exactly the arrays that the network gets.

    python benchmarks/hippocampus_peers.py FOLDER [--limit 0] [--json FILE] [--csv FILE]

FOLDER holds images/ and labels/, as for configs/hippocampus.py. The pairs are those of its test split: the
same subjects and partners, with intensities in [0, 1], padded to one shape. Prints the mean Dice of both
labels before and, if picsl_greedy is installed (pip install picsl_greedy SimpleITK), after running it with
NCC of radius 2, 100x60x20 iterations and its default smoothing. Labels are warped by nearest neighbour; for
"one-hot", each label is warped as a binary image (trilinear) and the largest value wins. Folded: voxels
inside the scans with a Jacobian determinant <= 0. --limit N takes N evenly spaced pairs. --csv writes one row
per pair, which `python -m adregnet_jax.evaluation.collect RUN --against FILE` compares with a run.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import comparison
import numpy as np
from rich.progress import track

from adregnet_jax import metrics
from adregnet_jax.data.io import itk
from adregnet_jax.data.splits import load_splits
from adregnet_jax.errors import UserError
from adregnet_jax.launch.config_file import load_config
from adregnet_jax.registration.measure import label_scores, mean_dice
from adregnet_jax.report import tables

CONFIG = Path(__file__).parents[1] / "configs" / "hippocampus.py"
# -wp 0: otherwise its fields are rounded to a tenth of a voxel in the output.
GREEDY = "-V 0 -i fixed moving -m NCC 2x2x2 -n 100x60x20 -wp 0 -o warp"


def test_pairs(folder, limit):
    config = load_config(CONFIG)
    config.data.files.pairs = str(folder)
    pairs = load_splits(config.data).test
    count = min(limit, len(pairs)) if limit else len(pairs)
    return [pairs[n] for n in np.linspace(0, len(pairs) - 1, count).round().astype(int)]


def greedy():
    """A function from a pair to greedy's displacement [x, y, z, 3] in voxels, or None and a line."""
    try:
        import SimpleITK  # noqa: F401, greedy hands its field over as an image of it
        from picsl_greedy import Greedy3D
    except ImportError:
        print("picsl_greedy is not installed: left out (pip install picsl_greedy SimpleITK).\n")
        return None

    def displacement(pair):
        scans = {
            name: itk.to_itk(Path(name), values, pair.affine)
            for name, values in (("fixed", pair.fixed), ("moving", pair.moving))
        }
        tool = Greedy3D()
        tool.execute(GREEDY, **scans, warp=None)
        # [x, y, z, 3] mm, components towards left, posterior, superior, as in ITK.
        field_lps_mm, _ = itk.from_itk(Path("warp"), tool["warp"])
        to_lps = (itk.LPS_TO_RAS @ pair.affine)[:3, :3]
        return np.asarray(field_lps_mm @ np.linalg.inv(to_lps).T, np.float32)

    return displacement


def measured(pair, displacement, seconds):
    scores = mean_dice(label_scores(pair, displacement))
    folded = metrics.jacobian_statistics(displacement, mask=pair.mask)["folded_percent"]
    return {"name": pair.name} | scores | {"folded_percent": folded, "seconds": seconds}


def summary(route, rows, dice, one_hot):
    mean, sd = tables.mean_and_sd(row[dice] for row in rows)
    return {
        "route": route,
        "pairs": len(rows),
        "Dice": round(mean, 4),
        "SD over pairs": sd and round(sd, 4),
        "Dice, one-hot": round(tables.mean_and_sd(row[one_hot] for row in rows)[0], 4),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="number of evenly spaced pairs (0: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one row per pair to FILE")
    options = parser.parse_args()
    try:
        pairs = test_pairs(options.folder, options.limit)
    except UserError as error:
        sys.exit(f"error: {error}")
    method = greedy()

    rows = []
    for pair in track(pairs, "registering", transient=True):
        start = time.perf_counter()
        displacement = np.zeros((*pair.fixed.shape, 3), np.float32)
        if method:
            displacement = method(pair)
        rows.append(measured(pair, displacement, time.perf_counter() - start))

    table = [summary("before", rows, "dice_before", "dice_before") | {"folded, %": 0.0, "median s": 0.0}]
    if method:
        folded = round(statistics.mean(row["folded_percent"] for row in rows), 4)
        seconds = round(statistics.median(row["seconds"] for row in rows), 2)
        after = summary("picsl_greedy", rows, "dice", "dice_onehot")
        table.append(after | {"folded, %": folded, "median s": seconds})
        if options.csv:
            options.csv.write_text(tables.to_csv(rows))
    comparison.report(table, options.json)


if __name__ == "__main__":
    main()
