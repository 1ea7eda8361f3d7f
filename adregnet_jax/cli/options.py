"""The options that commands share, and what they amount to."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from adregnet_jax.config import AffineConfig, Config, InstanceConfig, instance_preset
from adregnet_jax.errors import UserError


class Method(enum.StrEnum):
    network = "network"
    instance = "instance"
    both = "both"


class Modality(enum.StrEnum):
    mono = "mono"
    multi = "multi"


class Effort(enum.StrEnum):
    fast = "fast"
    default = "default"
    thorough = "thorough"


class Subjects(enum.StrEnum):
    same = "same"
    different = "different"
    any = "any"


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


@dataclasses.dataclass(frozen=True)
class Procedure:
    """How a pair is registered, once the options are checked against each other."""

    method: Method
    modality: Modality
    affine: AffineConfig | None
    instance: InstanceConfig | None
    weights: Path | None  # None: the shipped ones, where the method has a network
    tile: int | None = None  # voxels; of the network
    apart: bool = False
    composite: bool = False  # field.h5 is written, too

    @property
    def by_network(self) -> bool:
        return self.method != Method.instance

    def record(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def make_procedure(
    *,
    weights: Path | None,
    method: Method,
    tile: int | None = None,
    modality: Modality = Modality.mono,
    affine: bool = True,
    rigid: bool = False,
    diffeomorphic: bool = False,
    apart: bool = False,
    subjects: Subjects = Subjects.any,
    effort: Effort = Effort.default,
    settings: list[str] | None = None,
    composite: bool = False,
) -> Procedure:
    """What the options of `register`, `batch` and `export` amount to.

    Raises:
      UserError: options that contradict each other, or settings that make no sense.
    """
    if weights is not None and method == Method.instance:
        raise UserError("--method instance takes no --weights: drop one of them, or use --method both")
    if tile is not None and method == Method.instance:
        raise UserError("--method instance has no network to give --tiles to: drop one of them")
    if rigid and not affine:
        raise UserError("--rigid and --no-affine contradict each other: give one of them")
    if apart and not affine:
        raise UserError("--apart needs the affine step, which starts from the centres: drop --no-affine")
    instance = None
    if method != Method.network:
        preset = instance_preset(effort.value, subjects.value, after_network=method == Method.both)
        instance = _changed(preset, settings or [], diffeomorphic)
    elif diffeomorphic or settings or effort != Effort.default or subjects != Subjects.any:
        raise UserError(
            "--diffeomorphic, --effort, --subjects and --set are of the instance optimisation: use "
            "--method both"
        )
    return Procedure(
        method=method,
        modality=modality,
        affine=AffineConfig(kind="rigid" if rigid else "affine") if affine else None,
        instance=instance,
        weights=weights,
        tile=tile,
        apart=apart,
        composite=composite,
    )


def _changed(preset: InstanceConfig, settings: list[str], diffeomorphic: bool) -> InstanceConfig:
    config = preset
    if settings:
        from adregnet_jax.launch.config_file import override

        for setting in settings:
            if "=" not in setting:
                raise UserError(f"--set {setting}: expected NAME=VALUE, for instance smoothness=0.5")
        try:
            arguments = [f"--config.instance.{setting}" for setting in settings]
            config = override(Config(instance=config), arguments).instance
        except UserError as error:
            raise UserError(str(error).replace("--config.instance.", "--set ")) from None
    if diffeomorphic:
        config = dataclasses.replace(config, diffeomorphic=True)
    if config != preset:
        from adregnet_jax.registration.instance import what_is_wrong

        if wrong := what_is_wrong(config):
            raise UserError(f"--set: {wrong}")
    return config
