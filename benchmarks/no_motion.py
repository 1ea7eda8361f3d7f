"""Registers scans with themselves, changed in everything but place, by the default options.

    python benchmarks/no_motion.py FILE [FILE ...] [--changes noise bias ...] [--options NAME=VALUE ...]

The truth is that nothing moves. The changes: "noise" of a standard deviation of 5 % of the range; "bias", a
smooth factor between 0.7 and 1.3; "resolution", voxels larger by half along each axis; "crop", a sixth cut
off along each axis, at alternating ends; "inverted", the foreground's intensities reversed.

Prints one row per scan and change: the mean over the foreground of what the affine step moves in mm; the mean
and the 99th percentile of what the whole field moves, in mm and the mean also in voxels; the contrast and the
smoothness that were found. `--options` are fields of `RegistrationOptions`. `--rounds` is not used.
"""

import dataclasses
from pathlib import Path

import comparison
import numpy as np
import scipy.ndimage

from adregnet_jax.launch import process

process.keep_freed_memory()
process.use_compilation_cache()

from adregnet_jax import load_pretrained  # noqa: E402
from adregnet_jax.data.io.images import Image, read_image  # noqa: E402
from adregnet_jax.data.preprocessing import rescale_percentiles  # noqa: E402
from adregnet_jax.registration.field import field_from_affine  # noqa: E402
from adregnet_jax.registration.options import RegistrationOptions  # noqa: E402
from adregnet_jax.registration.scans import register_scans  # noqa: E402

NOISE = 0.05  # standard deviation, as a share of the range
BIAS = 0.3
COARSER = 1.5
CROPPED = 6  # one part in this many
FOREGROUND = 0.1  # of the range of intensities


def noise(values, affine, rng):
    return values + rng.normal(scale=NOISE, size=values.shape), affine


def bias(values, affine, rng):
    factor = scipy.ndimage.zoom(rng.uniform(-1, 1, (4, 4, 4)), np.array(values.shape) / 4, order=3)
    return values * (1 + BIAS * factor / np.abs(factor).max()), affine


def resolution(values, affine, rng):
    matrix = np.diag([COARSER, COARSER, COARSER, 1.0])
    matrix[:3, 3] = (COARSER - 1) / 2
    shape = np.maximum(np.floor(np.array(values.shape) / COARSER), 2).astype(int)
    smoothed = scipy.ndimage.gaussian_filter(values, COARSER / 4)
    coarse = scipy.ndimage.affine_transform(smoothed, matrix, output_shape=tuple(shape), order=1)
    return coarse, affine @ matrix


def crop(values, affine, rng):
    cut = [n // CROPPED for n in values.shape]
    first = np.array([cut[0], 0, cut[2]])
    kept = values[cut[0] :, : values.shape[1] - cut[1], cut[2] :]
    moved = np.array(affine)
    moved[:3, 3] += affine[:3, :3] @ first
    return kept, moved


def inverted(values, affine, rng):
    return np.where(values > FOREGROUND, 1 + FOREGROUND - values, values), affine


CHANGES = {change.__name__: change for change in (noise, bias, resolution, crop, inverted)}


def moved_mm(field, inside):
    """[n]: lengths of the displacements where `inside` is true."""
    displacement = np.asarray(field.displacement)[inside]
    return np.linalg.norm(displacement @ np.asarray(field.affine)[:3, :3].T, axis=-1)


def row_of(path, change, options, network):
    scan = read_image(path)
    values = rescale_percentiles(scan.values, scan.name)
    changed, affine = CHANGES[change](values, scan.affine, np.random.default_rng(0))
    registered = register_scans(
        dataclasses.replace(scan, values=values),
        Image(changed.astype(np.float32), affine, change),
        affine=options.affine_config,
        instance=options.instance_config,
        network=network,
        modality=options.modality,
        adaptive=options.adaptive,
    )
    inside = values > FOREGROUND
    still = field_from_affine(registered.matrix, shape=scan.shape, affine=scan.affine)
    all_mm = moved_mm(registered.field, inside)
    evidence = registered.evidence
    smoothness = None
    if evidence is not None:
        smoothness = round(evidence.smoothness, 2) if evidence.believable else "no motion"
    return {
        "scan": Path(path).name,
        "change": change,
        "affine mm": round(float(moved_mm(still, inside).mean()), 3),
        "mean mm": round(float(all_mm.mean()), 3),
        "99 % mm": round(float(np.percentile(all_mm, 99)), 3),
        "mean voxels": round(float(all_mm.mean() / scan.spacing_mm.min()), 3),
        "contrast": registered.modality,
        "smoothness": smoothness,
    }


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--options", nargs="+", metavar="NAME=VALUE", default=[])
    arguments = parser.parse_args()
    options = dataclasses.replace(
        RegistrationOptions(), **dict(option.split("=", 1) for option in arguments.options)
    )
    network = load_pretrained() if options.by_network else None
    rows = []
    for path in arguments.files:
        for change in arguments.changes:
            rows.append(row_of(path, change, options, network))
            print(rows[-1], flush=True)
    comparison.report(rows, arguments.json)


if __name__ == "__main__":
    main()
