"""The command `sample`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from adregnet_jax.cli.options import OverwriteOption

SCANS = ("fixed", "moving")
SHAPE, SPACING_MM = (96, 72, 72), (3.4, 3.4, 4.0)  # of a whole chest


def sample(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the synthetic chest.")] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Writes two synthetic scans of a breathing chest, with landmarks, to try `register` on.

    fixed.nii.gz is at inhale, moving.nii.gz at exhale; fixed.csv and moving.csv hold points in the lungs, in
    mm.
    """
    import nibabel as nib

    from adregnet_jax.atomic import new_folder
    from adregnet_jax.config import PhantomConfig
    from adregnet_jax.data.datasets.phantom import phantom_pair
    from adregnet_jax.data.io.images import Image, write_image
    from adregnet_jax.data.io.points import write_points

    pair = phantom_pair(PhantomConfig(shape=SHAPE, spacing_mm=SPACING_MM, seed=seed), 0)
    names = [f"{scan}{suffix}" for scan in SCANS for suffix in (".nii.gz", ".csv")]
    with new_folder(folder, own=names, overwrite=overwrite) as temporary:
        for scan in SCANS:
            write_image(temporary / f"{scan}.nii.gz", Image(getattr(pair, scan), pair.affine))
            points_mm = nib.affines.apply_affine(pair.affine, getattr(pair, f"{scan}_landmarks"))
            write_points(temporary / f"{scan}.csv", points_mm)
    fixed, fixed_points, moving, moving_points = (shlex.quote(str(folder / name)) for name in names)
    print(f"Written to {folder}. Register the scans with:\n")
    print(f"adregnet register {fixed} {moving} --subjects same \\")
    print(f"    --fixed-landmarks {fixed_points} --moving-landmarks {moving_points} \\")
    print(f"    --output {shlex.quote(str(folder / 'registered'))}")
