"""How two scans are to be registered, and the files they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from adregnet_jax.config import AffineConfig, InstanceConfig, instance_preset
from adregnet_jax.errors import UserError

Method = Literal["network", "instance", "both"]
Modality = Literal["auto", "mono", "multi"]
Subjects = Literal["auto", "same", "different", "any"]
Effort = Literal["fast", "default", "thorough"]
Prefer = Literal["sform", "qform"]  # as data.io.nifti.Prefer, which loads NumPy
Assess = Literal["off", "fast", "full"]
Report = Literal["interactive", "static"]

CHOICES = {"method": Method, "modality": Modality, "subjects": Subjects, "effort": Effort, "assess": Assess}
AFFINE = "affine."  # prefix of the settings of the affine step
COUPLES = (("fixed_labels", "moving_labels"), ("fixed_landmarks", "moving_landmarks"))


@dataclasses.dataclass(frozen=True)
class RegistrationOptions:
    """How two scans are registered. Each field's description is also its help on the command line.

    Raises:
      UserError: options that contradict each other, or settings that don't exist or make no sense.
    """

    weights: Annotated[
        Path | None, "Workdir of train.py, or a folder of packed weights. Default: the bundled network."
    ] = None
    method: Annotated[Method, "both: instance optimisation refines the network's result."] = "both"
    tile: Annotated[int | None, "Run the network on tiles of N voxels a side, to save memory."] = None
    modality: Annotated[
        Modality, "multi: different contrasts, such as T1 and T2. MR and CT: also set similarity=mind."
    ] = "auto"
    affine: Annotated[bool, "Whether to start with an affine registration."] = True
    rigid: Annotated[bool, "Start with a rigid registration instead."] = False
    apart: Annotated[bool, "Start from the centres of scans that don't overlap in the world."] = False
    keep: Annotated[bool, "Keep every stage, even if the scans were more alike before it."] = False
    diffeomorphic: Annotated[bool, "Without folds, and with an exact inverse."] = False
    subjects: Annotated[
        Subjects,
        "Whose scans: same is smoother, as for breathing; different allows detail; auto: as the scans say.",
    ] = "auto"
    effort: Annotated[Effort, "Time to spend on instance optimisation."] = "default"
    prefer: Annotated[
        Prefer | None,
        "Which form places NIfTI files whose sform and qform disagree. Default: as ITK chooses.",
    ] = None
    assess: Annotated[Assess, "The verdict on the result: full looks closer, writes error.nii.gz."] = "fast"
    settings: Annotated[
        Mapping[str, Any],
        "Change a field of InstanceConfig, as in smoothness=0.5, or AffineConfig, as in affine.kind=rigid.",
    ] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prefer not in (None, *get_args(Prefer)):
            raise UserError(f"prefer is {self.prefer!r}: expected one of {', '.join(get_args(Prefer))}")
        for name, kind in CHOICES.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise UserError(f"{name} is {value!r}: expected one of {', '.join(get_args(kind))}")
        if self.method == "instance" and self.weights is not None:
            raise UserError('method="instance" uses no network: drop the weights, or use method="both"')
        if self.method == "instance" and self.tile is not None:
            raise UserError('method="instance" uses no network that could run on tiles: use method="both"')
        if self.rigid and not self.affine:
            raise UserError("rigid=True and affine=False contradict each other: use one of them")
        if self.apart and not self.affine:
            raise UserError(
                "apart=True needs the affine step, which starts at the centres: drop affine=False"
            )
        if self.rigid and AFFINE + "kind" in self.settings:
            raise UserError("rigid=True and settings.affine.kind exclude each other: use one of them")
        if not self.affine and (useless := list(self._changes(AFFINE))):
            raise UserError(f"settings.{AFFINE}{useless[0]} has no effect with affine=False: drop either")
        chosen = self.effort != "default" or self.subjects != "auto"
        if self.method == "network" and (self.diffeomorphic or self._changes() or chosen):
            raise UserError(
                "diffeomorphic, effort, subjects and settings belong to instance optimisation:"
                ' use method="both"'
            )
        for prefix, section in (("", InstanceConfig), (AFFINE, AffineConfig)):
            fields = [field.name for field in dataclasses.fields(section)]
            if unknown := [name for name in self._changes(prefix) if name not in fields]:
                raise UserError(
                    f"settings.{prefix}{unknown[0]} doesn't exist: expected one of {', '.join(fields)}"
                )
        for prefix, config in (("", self.instance_config), (AFFINE, self.affine_config)):
            if config is not None and self._changes(prefix):
                config.check(prefix=f"settings.{prefix}")

    def _changes(self, prefix: str = "") -> dict[str, Any]:
        """The settings of one section by their names in it: those of the optimisation have no prefix."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.settings.items()
            if name.startswith(AFFINE) == bool(prefix)
        }

    @property
    def by_network(self) -> bool:
        """Whether a network takes part."""
        return self.method != "instance"

    @property
    def affine_config(self) -> AffineConfig | None:
        """Settings of the affine or rigid step; None without it."""
        if not self.affine:
            return None
        return AffineConfig(**({"kind": "rigid" if self.rigid else "affine"} | self._changes(AFFINE)))

    @property
    def instance_config(self) -> InstanceConfig | None:
        """Settings of the instance optimisation; None without it."""
        if self.method == "network":
            return None
        subjects = "any" if self.subjects == "auto" else self.subjects
        preset = instance_preset(self.effort, subjects, after_network=self.by_network)
        changes = {"diffeomorphic": True} if self.diffeomorphic else {}
        return dataclasses.replace(preset, **(self._changes() | changes))

    @property
    def adaptive(self) -> bool:
        """Whether the smoothness is chosen for each pair, by what the scans agree on."""
        return self.subjects == "auto" and "smoothness" not in self.settings

    def record(self) -> dict[str, Any]:
        """The options as JSON stores them, presets resolved."""
        choices = {
            "method": self.method,
            "modality": self.modality,
            "subjects": self.subjects,
            "affine": self.affine_config and dataclasses.asdict(self.affine_config),
            "instance": self.instance_config and dataclasses.asdict(self.instance_config),
            "weights": self.weights and str(self.weights),
            "tile": self.tile,
            "apart": self.apart,
            "keep": self.keep,
            "prefer": self.prefer,
        }
        return json.loads(json.dumps(choices))


@dataclasses.dataclass(frozen=True)
class ScanFiles:
    """The files of two scans: images, and optionally masks, label maps and landmarks.

    `fixed_series` and `moving_series` are UIDs, which choose a series in a DICOM folder that holds several.

    Raises:
      UserError: labels or landmarks of one scan alone.
    """

    fixed: Path
    moving: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None
    fixed_series: str | None = None
    moving_series: str | None = None

    def __post_init__(self) -> None:
        for couple in COUPLES:
            if len({getattr(self, name) is None for name in couple}) == 2:
                raise UserError(f"{' and '.join(couple)} belong together: give both or none")

    def given(self) -> dict[str, Path]:
        """The files by name, without those that aren't there."""
        return {name: path for name, path in vars(self).items() if isinstance(path, Path)}

    def series(self, scan: str) -> str | None:
        """The UID of the series of the "fixed" or the "moving" scan; None for other files, and by default."""
        return {"fixed": self.fixed_series, "moving": self.moving_series}.get(scan)

    def record(self) -> dict[str, dict[str, str]]:
        """Path, SHA-256 and chosen series of each file.

        The sum of a folder covers the names and sums of its files.
        """
        found = {name: {"path": str(path), "sha256": _sha256(path)} for name, path in self.given().items()}
        for name in found:
            if (series := self.series(name)) is not None:
                found[name]["series"] = series
        return found


def _sha256(path: Path) -> str:
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for entry in sorted(entry for entry in path.iterdir() if entry.is_file()):
        total.update(f"{entry.name} {_sha256(entry)}\n".encode())
    return total.hexdigest()
