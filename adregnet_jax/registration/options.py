"""How a pair is to be registered: the choices of a user, checked against each other."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

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
    config.check(prefix="--set ")
    return config
