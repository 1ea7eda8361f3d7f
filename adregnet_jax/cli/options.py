"""The options that commands share, and what they amount to."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from adregnet_jax.registration.options import Effort, Method, Modality, Subjects


class Format(enum.StrEnum):
    itk = "itk"
    nifti = "nifti"
    learn2reg = "learn2reg"


WeightsOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Workdir of train.py, or packed weights. Default: the shipped ones."),
]
MethodOption = Annotated[
    Method, typer.Option(help="both: instance optimisation goes on from the network's result.")
]
TilesOption = Annotated[
    int | None,
    typer.Option(
        "--tiles", metavar="N", min=16, help="The network gets tiles of N voxels a side, for less memory."
    ),
]
ModalityOption = Annotated[
    Modality,
    typer.Option(help="multi: different contrast, as T1 and T2. MR and CT: also --set similarity=mind."),
]
AffineOption = Annotated[
    bool, typer.Option("--affine/--no-affine", help="Whether an affine registration goes first.")
]
RigidOption = Annotated[bool, typer.Option("--rigid", help="A rigid registration goes first instead.")]
DiffeomorphicOption = Annotated[
    bool, typer.Option("--diffeomorphic", help="Without folds, and with an exact inverse.")
]
SubjectsOption = Annotated[
    Subjects, typer.Option(help="Whose scans: same is smoother, as a breath; different has more detail.")
]
ApartOption = Annotated[
    bool, typer.Option("--apart", help="Scans that don't overlap in the world start from their centres.")
]
EffortOption = Annotated[Effort, typer.Option(help="Of the instance optimisation.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any field of InstanceConfig: --set smoothness=0.5"),
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, gpu or cuda:1. Default: what JAX takes.")
]
CompositeOption = Annotated[
    bool, typer.Option("--h5", help="Also field.h5, an ITK composite of field and affine (needs SimpleITK).")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
