"""Measures a network on unseen kinds of scans, alone and as a start for instance optimisation.

    python benchmarks/unseen.py [--breathing-ct FOLDER [--cases 1 2 3 4 5]] [--brains FOLDER]
        [--hippocampus FOLDER [--limit 0]] [--weights DIR] [--effort default] [--methods affine network ...]
        [--figures DIR] [--json FILE]

The folders and pairs are those of peers.py and hippocampus_peers.py (for the hippocampus, the test split of
configs/hippocampus.py). DIR is the workdir of a run or packed weights; by default, the bundled weights are
used. All methods run through `adregnet_jax.register_scans`, as in `adregnet register`. The methods:

- affine: the affine step alone.
- network, affine + network: the network alone, without and after the affine step.
- instance, both: instance optimisation without the network, and starting from its result; no affine step.
  Subjects are "same" for CT, "different" for brains, "any" for the hippocampus.
- inverted (brains): the network alone on a moving brain with inverted contrast, (1 - v) ** 1.5.

Prints one row per method and data set: mean (SD over pairs) of TRE or Dice, the number of pairs in which it
beats no registration and, for both, instance alone; the share of folds; and the median seconds of the stages
affine and deformable in a second call, which excludes compilation. --figures draws the pairs on which the
network alone does worst: the six hippocampus pairs with the lowest Dice, the three CT pairs with the largest
TRE, and the brains.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import comparison
import hippocampus_peers
import numpy as np
import peers

from adregnet_jax.cli.execution import load_network
from adregnet_jax.config import AffineConfig, instance_preset
from adregnet_jax.data.io.images import Image
from adregnet_jax.ops.jacobian import jacobian_determinant
from adregnet_jax.registration.scans import register_scans
from adregnet_jax.report.figures import registration_figure

METHODS = ("affine", "network", "affine + network", "instance", "both", "inverted")
SUBJECTS = {"breathing CT": "same", "brains": "different", "hippocampus": "any"}
DRAWN = {"breathing CT": 3, "brains": 1, "hippocampus": 6}


def data_sets(options):
    """Yields the name and the pairs (`peers.Scans`) of each data set."""
    if options.breathing_ct:
        yield "breathing CT", list(peers.breathing_ct(options.breathing_ct, options.cases))
    if options.brains:
        yield "brains", list(peers.brains(options.brains))
    if options.hippocampus:
        pairs = hippocampus_peers.test_pairs(options.hippocampus, options.limit)
        yield "hippocampus", [of_hippocampus(pair) for pair in pairs]


def of_hippocampus(pair):
    labels = (pair.fixed_labels, pair.moving_labels, [1, 2])
    return peers.Scans(pair.name, pair.fixed, pair.moving, pair.spacing_mm, None, labels)


def settings(method, data_set, network, effort, steps):
    """Settings of `register_scans`; `steps` are those of instance optimisation, None for the preset's."""
    chosen: dict[str, Any] = {"affine": None, "instance": None, "network": None}
    if "affine" in method:
        chosen["affine"] = AffineConfig()
    if method not in ("affine", "instance"):
        chosen["network"] = network
    if method in ("instance", "both"):
        preset = instance_preset(effort, SUBJECTS[data_set], after_network=method == "both")
        if method == "instance" and steps:
            preset = dataclasses.replace(preset, steps=tuple(steps))
        chosen["instance"] = preset
    return chosen


def registered(scans, method, chosen, *, again):
    """Displacement [x, y, z, 3] in voxels, the warped scan, and the seconds, of a second call if `again`."""
    moving = scans.moving
    if method == "inverted":
        moving = np.where(moving > 0, (1 - moving) ** 1.5, 0).astype(np.float32)
    affine = np.diag([*scans.spacing_mm, 1.0])
    images = [
        Image(scans.fixed, affine, f"{scans.name}, fixed"),
        Image(moving, affine, f"{scans.name}, moving"),
    ]
    for _ in range(1 + again):
        found = register_scans(*images, **chosen)
    seconds = found.seconds["affine"] + found.seconds["deformable"]
    return np.asarray(found.field.displacement), found.warped.values, seconds


def measure_of(row):
    return "Dice" if row["TRE mm"] is None else "TRE mm"


def summary(data_set, method, rows, others):
    measure = measure_of(rows[0])
    values = [row[measure] for row in rows]
    sign = -1 if measure == "TRE mm" else 1

    def better(other):
        if other not in others or method in ("before", other):
            return None
        against = [row[measure] for row in others[other]]
        return sum(sign * (a - b) > 0 for a, b in zip(values, against, strict=True))

    return {
        "data": data_set,
        "method": method,
        "pairs": len(rows),
        measure: f"{statistics.mean(values):.3f} ({statistics.pstdev(values):.3f})",
        "better than nothing": better("before"),
        "better than instance": better("instance") if method == "both" else None,
        "folded %": round(statistics.mean(row["folded %"] for row in rows), 4),
        "s, median": round(statistics.median(row["s"] for row in rows), 2),
    }


def draw(folder, data_set, ranked):
    for number, (scans, row, displacement, warped) in enumerate(ranked[: DRAWN[data_set]], 1):
        measure = measure_of(row)
        figure = registration_figure(
            scans.fixed,
            scans.moving,
            warped,
            displacement,
            np.asarray(jacobian_determinant(displacement[None]))[0],
            spacing_mm=scans.spacing_mm,
            affine=np.diag([*scans.spacing_mm, 1.0]),
            title=f"{scans.name}, network alone: {measure} {row['before']:.3f}, then {row[measure]:.3f}",
        )
        figure.savefig(folder / f"{data_set.replace(' ', '_').lower()}_{number}.png", dpi=60)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--breathing-ct", type=Path, metavar="FOLDER")
    parser.add_argument("--cases", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--brains", type=Path, metavar="FOLDER")
    parser.add_argument("--hippocampus", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--limit", type=int, default=0, help="number of evenly spaced hippocampus pairs; 0: all"
    )
    parser.add_argument("--weights", type=Path, metavar="DIR")
    parser.add_argument("--effort", default="default", help="preset of the instance optimisation")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="steps of instance optimisation alone, coarse to fine"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--figures", type=Path, metavar="DIR")
    options = parser.parse_args()
    network = load_network(options.weights, None)
    print(network.name)

    rows = []
    for data_set, pairs in data_sets(options):
        still = [np.zeros((*scans.fixed.shape, 3), np.float32) for scans in pairs]
        found = {"before": [peers.score(*pair) | {"s": 0.0} for pair in zip(pairs, still, strict=True)]}
        for method in options.methods:
            if method == "inverted" and data_set != "brains":
                continue
            chosen = settings(method, data_set, network, options.effort, options.steps)
            found[method], drawn = [], []
            for n, scans in enumerate(pairs):
                again = n == 0 or scans.fixed.shape != pairs[n - 1].fixed.shape
                displacement, warped, seconds = registered(scans, method, chosen, again=again)
                row = {"pair": scans.name} | peers.score(scans, displacement) | {"s": seconds}
                found[method].append(row)
                measure = measure_of(row)
                row["before"] = found["before"][n][measure]
                print(data_set, method, row, flush=True)
                if method == "network" and options.figures:
                    drawn.append((scans, row, displacement, warped))
                    drawn.sort(key=lambda entry: (entry[1]["Dice"] or 0) - (entry[1]["TRE mm"] or 0))
                    del drawn[DRAWN[data_set] :]
            if drawn:
                options.figures.mkdir(parents=True, exist_ok=True)
                draw(options.figures, data_set, drawn)
        rows += [summary(data_set, method, of_method, found) for method, of_method in found.items()]
    print()
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
