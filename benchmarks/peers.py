"""Compares instance optimisation with classical registration programs on the same pairs in one run.

    python benchmarks/peers.py --breathing-ct FOLDER [--cases 1 2 3 4 5] [--brains FOLDER] [--efforts default]
        [--methods convexadam greedy demons syn syn_cc] [--diffeomorphic] [--json FILE]

FOLDER of --breathing-ct holds DIR-Lab case folders; FOLDER of --brains holds subject_a and subject_b as
_t1.nii.gz and _labels.nii.gz on one grid, and labels_30.txt, whose first column lists the scored labels.
Every method gets the same two arrays in [0, 1]: CT clipped to -1000..300 HU, brains rescaled by percentiles.
A method that is not installed is reported and skipped: pip install convexAdam picsl_greedy antspyx SimpleITK.

Prints one row per pair and method: mean TRE or mean Dice, the share of folds by central differences and by
tetrahedra, and the seconds of the registration alone. For ours, compilation has its own column (cached on
disk after the first start), and the error of the field composed with its inverse is given for voxels that map
into the grid. Ours uses the presets for one person (CT) and two (brains); "ours, inverted" inverts the
contrast of the moving brain, (1 - v) ** 1.5 in the head, and takes the heads (above 0) as masks, much as
`adregnet register --modality multi` finds them. Settings of the other methods:

- convexAdam: grid_sp 4, disp_hw 4, lambda 0.75, 80 iterations, CT at half the in-plane resolution, as the
  authors do for lungs; its defaults for brains.
- greedy: NCC 4x4x2 for CT, 2x2x2 for brains, 100x60x20 iterations, fields not rounded (-wp 0).
- demons: SimpleITK's diffeomorphic demons at a quarter and half of the resolution, 100 and 50 iterations,
  with histogram matching.
- syn: antspyx SyN with its defaults, mutual information and 40x20x0 iterations. syn_cc: CC of radius 4,
  100x70x20 iterations, half an hour per case. Both run only on request.
"""

import dataclasses
import functools
import importlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import nibabel as nib
import numpy as np

from adregnet_jax.launch import process

process.keep_freed_memory()  # as the command line does, before JAX starts
process.use_compilation_cache()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from adregnet_jax import metrics  # noqa: E402
from adregnet_jax.config import instance_preset  # noqa: E402
from adregnet_jax.data.datasets import dirlab  # noqa: E402
from adregnet_jax.data.io.images import read_image  # noqa: E402
from adregnet_jax.data.preprocessing import rescale_percentiles, rescale_window  # noqa: E402
from adregnet_jax.ops.composition import compose, invert  # noqa: E402
from adregnet_jax.ops.cubic import inside_grid  # noqa: E402
from adregnet_jax.ops.grid import identity_grid  # noqa: E402
from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant  # noqa: E402
from adregnet_jax.ops.sampling import warp_labels  # noqa: E402
from adregnet_jax.registration.instance import align  # noqa: E402

CT_WINDOW_HU = (-1000.0, 300.0)
PACKAGES = {
    "convexadam": "convexAdam",
    "greedy": "picsl_greedy",
    "demons": "SimpleITK",
    "syn": "ants",
    "syn_cc": "ants",
}


class Scans(NamedTuple):
    """A pair on one grid, with landmarks or labels to score it."""

    name: str
    fixed: np.ndarray  # [x, y, z] in [0, 1]
    moving: np.ndarray
    spacing_mm: np.ndarray
    landmarks: tuple | None  # fixed and moving, [n, 3] voxels
    labels: tuple | None  # fixed and moving [x, y, z], and which are scored


def breathing_ct(root, cases):
    found = dirlab.find_cases(root)
    for case in cases:
        fixed, moving = (
            rescale_window(dirlab.read_image(found[case].images[phase], case), *CT_WINDOW_HU)
            for phase in ("T00", "T50")
        )
        spacing_mm = np.array(dirlab.GEOMETRY[case][1])
        landmarks = dirlab.read_landmarks(found[case], case)
        yield Scans(f"CT case {case}", fixed, moving, spacing_mm, landmarks, None)


def brains(folder):
    subjects = [folder / f"subject_{letter}" for letter in "ab"]
    scans = [read_image(f"{subject}_t1.nii.gz") for subject in subjects]
    labels = [read_image(f"{subject}_labels.nii.gz", labels=True).values for subject in subjects]
    lines = (folder / "labels_30.txt").read_text().split("\n")
    scored = [int(line.split()[0]) for line in lines if line.strip()[:1].isdigit()]
    fixed, moving = (rescale_percentiles(scan.values, scan.name) for scan in scans)
    yield Scans("brains", fixed, moving, scans[0].spacing_mm, None, (*labels, scored))


def variants(scans, efforts, diffeomorphic):
    """Names and settings of our variants."""
    subjects = "same" if scans.landmarks else "different"
    presets = {effort: instance_preset(effort, subjects) for effort in efforts}
    found = {f"ours, {effort}": config for effort, config in presets.items()}
    if diffeomorphic:
        found |= {
            f"ours, {effort}, diffeomorphic": dataclasses.replace(config, diffeomorphic=True)
            for effort, config in presets.items()
        }
    if scans.labels:
        found |= {f"ours, {effort}, inverted": config for effort, config in presets.items()}
    return found


def ours(scans, name, config):
    """Displacement [x, y, z, 3] in voxels, and the columns that only ours has."""
    moving, masks = scans.moving, {}
    if name.endswith("inverted"):
        head = moving > 0
        moving = np.where(head, (1 - moving) ** 1.5, 0).astype(np.float32)
        heads = {"fixed_mask": scans.fixed > 0, "moving_mask": head}
        masks = {which: jnp.asarray(head, jnp.float32)[None, ..., None] for which, head in heads.items()}
    images = [jnp.asarray(scan)[None, ..., None] for scan in (scans.fixed, moving)]
    spacing_mm = tuple(scans.spacing_mm.tolist())
    began = time.perf_counter()

    @jax.jit
    def run(fixed, moving, **masks):
        found = align(fixed, moving, spacing_mm=spacing_mm, config=config, **masks)
        return found.displacement, found.inverse

    program = run.lower(*images, **masks).compile()
    compiled = time.perf_counter()
    field, inverse = jax.block_until_ready(program(*images, **masks))
    seconds = time.perf_counter() - compiled
    inverse = jax.jit(invert)(field) if inverse is None else inverse
    # Where the inverse points outside the grid, the field is extrapolated from its border.
    target = identity_grid(field.shape[1:4]) + inverse
    inside = np.asarray(inside_grid(target, field.shape[1:4]))
    error = np.linalg.norm(np.asarray(jax.jit(compose)(field, inverse)), axis=-1)[inside]
    return np.asarray(field[0]), {
        "s": round(seconds, 1),
        "compilation s": round(compiled - began, 1),
        "inverse median": round(float(np.median(error)), 4),
        "inverse 99 %": round(float(np.percentile(error, 99)), 4),
    }


def convexadam(scans, device="cpu"):
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    settings = {"grid_sp": 4, "disp_hw": 4, "lambda_weight": 0.75} if scans.landmarks else {}
    step = 2 if scans.landmarks else 1
    images = [
        torch.nn.functional.avg_pool3d(torch.from_numpy(scan)[None, None], (step, step, 1))[0, 0]
        for scan in (scans.fixed, scans.moving)
    ]
    coarse = convex_adam_pt(
        *images, selected_niter=80, dtype=torch.float32, device=torch.device(device), **settings
    )
    field = torch.from_numpy(np.asarray(coarse, np.float32)).permute(3, 0, 1, 2)[None]
    field = torch.nn.functional.interpolate(field, scans.fixed.shape, mode="trilinear", align_corners=False)
    return field[0].permute(1, 2, 3, 0).numpy() * np.array([step, step, 1], np.float32)


def _itk_images(scans):
    import SimpleITK

    images = [SimpleITK.GetImageFromArray(scan.transpose(2, 1, 0)) for scan in (scans.fixed, scans.moving)]
    for image in images:
        image.SetSpacing(scans.spacing_mm.tolist())
    return images


def _from_itk(field, spacing_mm):
    import SimpleITK

    return SimpleITK.GetArrayFromImage(field).transpose(2, 1, 0, 3) / spacing_mm


def greedy(scans):
    from picsl_greedy import Greedy3D

    program = Greedy3D()
    radius = "4x4x2" if scans.landmarks else "2x2x2"
    fixed, moving = _itk_images(scans)
    program.execute(
        f"-d 3 -threads {os.cpu_count()} -i fixed moving -m NCC {radius} -n 100x60x20 -wp 0 -o field -V 0",
        fixed=fixed,
        moving=moving,
        field=None,
    )
    return _from_itk(program["field"], scans.spacing_mm)


def demons(scans):
    import SimpleITK

    fixed, moving = _itk_images(scans)
    moving = SimpleITK.HistogramMatching(moving, fixed, 256, 10, True)
    field = None
    for factor, iterations in ((4, 100), (2, 50)):
        pooled = [SimpleITK.BinShrink(image, _factors(scans.spacing_mm, factor)) for image in (fixed, moving)]
        method = SimpleITK.DiffeomorphicDemonsRegistrationFilter()
        method.SetNumberOfIterations(iterations)
        method.SetStandardDeviations(1.5)
        if field is None:
            field = method.Execute(*pooled)
        else:
            field = method.Execute(*pooled, _resampled(field, pooled[0]))
    return _from_itk(_resampled(field, fixed), scans.spacing_mm)


def _factors(spacing_mm, factor):
    """Factors for nearly isotropic voxels: smaller along a coarse axis."""
    return [max(1, round(float(factor * min(spacing_mm) / size))) for size in spacing_mm]


def _resampled(field, like):
    import SimpleITK

    zero = SimpleITK.Transform()
    extrapolate = True
    return SimpleITK.Resample(
        field, like, zero, SimpleITK.sitkLinear, 0.0, SimpleITK.sitkVectorFloat64, extrapolate
    )


def syn_cc(scans):
    return syn(scans, syn_metric="CC", syn_sampling=4, reg_iterations=(100, 70, 20))


def syn(scans, **settings):
    import ants

    spacing = tuple(scans.spacing_mm.tolist())
    fixed, moving = (ants.from_numpy(scan, spacing=spacing) for scan in (scans.fixed, scans.moving))
    done = ants.registration(
        fixed,
        moving,
        type_of_transform="SyNOnly",
        initial_transform="Identity",
        **settings,
    )
    return (
        np.asarray(nib.Nifti1Image.from_filename(done["fwdtransforms"][0]).dataobj)[..., 0, :]
        / scans.spacing_mm
    )


def score(scans, displacement):
    """TRE or Dice of a displacement, and its folds."""
    field = jnp.asarray(displacement, jnp.float32)[None]
    row: dict[str, float | None] = {"TRE mm": None, "Dice": None}
    if scans.landmarks:
        fixed, moving = scans.landmarks
        distances_mm = metrics.tre_mm(displacement, fixed, moving, scans.spacing_mm)
        row["TRE mm"] = round(float(np.mean(distances_mm)), 3)
    if scans.labels:
        fixed, moving, scored = scans.labels
        warped = jax.jit(warp_labels)(jnp.asarray(moving)[None, ..., None], field, np.array([0, *scored]))
        row["Dice"] = round(float(np.nanmean(metrics.dice(fixed, np.asarray(warped)[0, ..., 0], scored))), 4)
    folded = np.mean(np.asarray(jacobian_determinant(field)) <= 0)
    return row | {
        "folded %": round(100 * float(folded), 4),
        "folded volume %": round(100 * float(folded_volume(field)[0]), 4),
    }


def _add(rows, scans, method, displacement, columns):
    none = dict.fromkeys(("s", "compilation s", "inverse median", "inverse 99 %"))
    row = {"pair": scans.name, "method": method} | score(scans, displacement) | none | columns
    print(", ".join(f"{name} {value}" for name, value in row.items() if value is not None), flush=True)
    rows.append(row)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--breathing-ct", type=Path, metavar="FOLDER")
    parser.add_argument("--cases", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--brains", type=Path, metavar="FOLDER")
    parser.add_argument("--efforts", nargs="*", default=["default"], help="presets of ours")
    parser.add_argument("--methods", nargs="*", choices=PACKAGES, default=["convexadam", "greedy", "demons"])
    parser.add_argument("--diffeomorphic", action="store_true", help="ours as a diffeomorphism, too")
    options = parser.parse_args()
    peers = {}
    for name in options.methods:
        try:
            importlib.import_module(PACKAGES[name])
            peers[name] = globals()[name]
        except ImportError:
            print(f"{PACKAGES[name]} is not installed: {name} is skipped.")

    rows: list[dict[str, Any]] = []
    pairs = list(breathing_ct(options.breathing_ct, options.cases)) if options.breathing_ct else []
    pairs += list(brains(options.brains)) if options.brains else []
    for scans in pairs:
        add = functools.partial(_add, rows, scans)
        add("before", np.zeros((*scans.fixed.shape, 3), np.float32), {"s": 0.0})
        for name, config in variants(scans, options.efforts, options.diffeomorphic).items():
            add(name, *ours(scans, name, config))
        for name, method in peers.items():
            began = time.perf_counter()
            displacement = np.asarray(method(scans), np.float32)
            add(name, displacement, {"s": round(time.perf_counter() - began, 1)})
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
