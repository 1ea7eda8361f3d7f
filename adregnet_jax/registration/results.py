"""Results of a registration: of arrays on one grid, and of scans with grids of their own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from adregnet_jax.data.io.images import Image
from adregnet_jax.registration import ladder
from adregnet_jax.registration.assessment.verdict import Assessment
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.registration.measure import Measurement, ScanPair, measure_scans
from adregnet_jax.registration.options import Modality, Report


class Registration(NamedTuple):
    """A registered batch on one grid.

    Attributes:
      displacement: [b, x, y, z, 3] in voxels: warped(p) = moving(p + u(p)).
      warped: [b, x, y, z, 1], the moving images pulled back to the fixed grid.
      pyramid: displacements of the network's levels, coarse to fine, each in voxels of its level.
      match_entropy: [b, x_l, y_l, z_l] in nats, of the network's levels, coarse to fine.
      inverse: [b, x, y, z, 3] in voxels, the inverse map; None unless the registration is diffeomorphic.
    """

    displacement: Float[Array, "b x y z 3"]
    warped: Float[Array, "b x y z 1"]
    pyramid: tuple[Float[Array, "b _x _y _z 3"], ...] = ()
    match_entropy: tuple[Float[Array, "b _x _y _z"], ...] = ()
    inverse: Float[Array, "b x y z 3"] | None = None


class Evidence(NamedTuple):
    """What regions that the field didn't see say about the motion between two scans.

    See `registration.evidence`.
    """

    smoothness: float  # half the weight whose field fits them best: all blocks are twice as many
    seen_gain: float  # of the local squared NCC by that field, in the blocks it was optimised on
    unseen_gain: float  # in the others
    believable: bool  # whether enough of what the field gains where it was optimised is gained elsewhere, too


class StageOutcome(NamedTuple):
    """Whether a stage of a registration was kept. See `registration.harm`."""

    stage: str  # "affine", "network" or "instance"
    similarity_before: float  # mean squared local NCC over the union of the foregrounds
    similarity: float
    taken_back: str | None  # why; None: the stage was kept

    def record(self) -> dict[str, Any]:
        """JSON's types."""
        numbers = {name: round(getattr(self, name), 4) for name in ("similarity_before", "similarity")}
        return {"stage": self.stage, **numbers, "taken_back": self.taken_back}


@dataclasses.dataclass(frozen=True, eq=False)
class RegisteredScans:
    """Two registered scans, and what is needed to measure and to write the result.

    Attributes:
      scans: the scans that were registered, with the masks, labels and landmarks that were given.
      field: on the fixed grid, from the fixed to the moving world, the affine step included.
      inverse: on the moving grid, from the moving to the fixed world.
      matrix: [4, 4] fixed RAS mm -> moving RAS mm, the affine step; the identity without it.
      warped: the moving scan on the fixed grid, float32, with its least value where it doesn't reach.
      modality: how the scans were compared: "mono" or "multi".
      seconds: by stage, compilation included.
      stages: the displacements after the stages that came before the last, by their names, "affine" and
        "network": [x, y, z, 3] in voxels of the fixed grid, before the matrix; None: nothing was displaced.
      evidence: why the deformation is as smooth as it is; None where its smoothness was given, or there is no
        instance optimisation.
      outcomes: of the stages, in their order: whether each was kept.
      measured: the measurement, where it has been made before; otherwise `measurement` makes it.
      assessment: the verdict; None where none was asked for.
      record: "sources", "options" and "network", as summary.json stores them; empty for scans that don't come
        from files.
    """

    scans: ScanPair
    field: DisplacementField
    inverse: DisplacementField
    matrix: Float[np.ndarray, "4 4"]
    warped: Image
    modality: Modality
    seconds: dict[str, float]
    stages: Mapping[str, Float[np.ndarray, "_x _y _z 3"] | None] = dataclasses.field(default_factory=dict)
    evidence: Evidence | None = None
    outcomes: tuple[StageOutcome, ...] = ()
    measured: Measurement | None = None
    assessment: Assessment | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def measurement(self) -> Measurement:
        """Similarity, folding, Dice and landmark distances; computed once.

        Raises:
          UserError: a field that is not finite.
        """
        # One after the other, since each takes as much memory as the result.
        stages = ((name, self.stage_field(name)) for name in self.stages)
        return self.measured or measure_scans(
            self.scans, self.field, self.warped, modality=self.modality, stages=stages
        )

    def stage_field(self, stage: str) -> DisplacementField:
        """The field after one of `stages`, as `field`."""
        field = ladder.zero_field(self.field.shape, self.field.affine)
        displacement = self.stages[stage]
        if displacement is not None:
            field = dataclasses.replace(field, displacement=displacement)
        return ladder.after_field(field, self.matrix)

    def summary(self) -> dict[str, Any]:
        """The record, the measurements, choices and verdict ("results"), evidence and seconds, for JSON."""
        results = self.measurement.row | {"modality": self.modality} | self._evidence_row()
        undone = [f"{outcome.stage}: {outcome.taken_back}" for outcome in self.outcomes if outcome.taken_back]
        results["taken_back"] = "; ".join(undone) or None
        judged = {}
        if self.assessment is not None:
            results |= self.assessment.row()
            judged = {"evidence": self.assessment.record()["evidence"]}
        stages = {"stages": [outcome.record() for outcome in self.outcomes]}
        return {**self.record, "results": results, **stages, **judged, "seconds": dict(self.seconds)}

    def _evidence_row(self) -> dict[str, Any]:
        if self.evidence is None:
            return {}
        return {
            "smoothness": self.evidence.smoothness if self.evidence.believable else None,
            "seen_gain": round(self.evidence.seen_gain, 4),
            "unseen_gain": round(self.evidence.unseen_gain, 4),
        }

    def write(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        composite: bool = False,
        preview: bool = False,
        error: bool = False,
        report: Report = "interactive",
    ) -> None:
        """Writes a folder with images, fields, affine matrix, numbers and report: complete or not at all.

        Args:
          folder: its final name; an empty folder may exist there.
          overwrite: replace the results of an earlier registration. Other files are never replaced.
          composite: also write field.h5, an ITK composite of field and affine; needs SimpleITK.
          preview: write preview.png and nothing else.
          error: also write error.nii.gz, the predicted error in mm, where there is a verdict.
          report: "interactive": report.html shows the scans slice by slice; "static": as pictures.

        Raises:
          UserError: the folder isn't empty, or can't be written.
        """
        from adregnet_jax.atomic import new_folder
        from adregnet_jax.registration.result_files import FILES, write_results  # loads Matplotlib

        with new_folder(Path(folder), own=FILES, overwrite=overwrite) as temporary:
            write_results(temporary, self, composite=composite, preview=preview, error=error, report=report)
