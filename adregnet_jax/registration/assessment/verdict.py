"""From evidence to a verdict: marks, a score, and reasons in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from adregnet_jax.registration.assessment import rule

Verdict = Literal["pass", "check", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "check", "fail")
WORTH_SAYING = 0.2  # the least penalty that is a reason
# Marks that compare what is seen. Across contrasts they alone fail nothing: what is aligned can look unlike,
# and a smaller field of view shows a part of the other scan.
OF_IMAGES = ("residual", "unlike", "worse", "opposite", "disjoint", "departed", "outside")
SHARPNESS = 6.0  # of the bend at a mark's threshold, in inverse penalties


class Mark(NamedTuple):
    """One kind of evidence against a registration.

    Attributes:
      value: what is measured, from the numbers of the evidence; more is worse.
      words: what it means, with the numbers.
    """

    value: Callable[[Mapping[str, float]], float]
    words: Callable[[Mapping[str, float]], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Assessment:
    """What speaks for and against a registration.

    Attributes:
      verdict: "pass", "check" or "fail"; None where the scans are too small, or too flat, for one.
      score: 0 to 1; None without a verdict.
      reasons: in words, with their numbers, the strongest first.
      evidence: the numbers that were found, by name.
      error_mm: [x, y, z], predicted distance by which the field misses, on the fixed grid; None without a
        verdict. It is smooth.
    """

    verdict: Verdict | None
    score: float | None
    reasons: tuple[str, ...]
    evidence: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error_mm: Float[np.ndarray, "x y z"] | None = None

    def error_90_mm(self) -> tuple[Float[np.ndarray, "x y z"], Float[np.ndarray, "x y z"]] | None:
        """Two maps, [x, y, z] each, between which nine errors in ten lie; None without a verdict.

        Conformal for scans and fields like those that the rule was calibrated on, which were synthetic.
        """
        if self.error_mm is None:
            return None
        low, high = rule.PLACES_90
        return low * self.error_mm, high * self.error_mm

    def row(self) -> dict[str, Any]:
        """The columns of a table of results, with JSON's types."""
        predicted = self.evidence.get("predicted_error_mm")
        interval = None if predicted is None else [_significant(ratio * predicted) for ratio in rule.SCAN_90]
        return {
            "verdict": self.verdict,
            "score": None if self.score is None else round(self.score, 3),
            "predicted_error_mm": None if predicted is None else _significant(predicted),
            "predicted_error_90_mm": interval,
            "reasons": list(self.reasons),
        }

    def record(self) -> dict[str, Any]:
        """`row` with the evidence, for JSON."""
        return self.row() | {"evidence": {name: _rounded(n, 4) for name, n in self.evidence.items()}}

    def fails(self, level: Literal["check", "fail"]) -> bool:
        """Whether the verdict is this one or worse; a registration without a verdict has not passed."""
        if self.verdict is None:
            return level == "check"
        return VERDICTS.index(self.verdict) >= VERDICTS.index(level)


MARKS: dict[str, Mark] = {
    "residual": Mark(
        lambda n: n["expected_fine"],
        lambda n: (
            f"{1 - n['held_fine']:.0%} of the textured blocks fit better elsewhere, by 1.5 voxels of "
            f"{n['voxel_mm']:.3g} mm or more"
        ),
    ),
    "unlike": Mark(
        lambda n: 1 - n["similarity_coarse"],
        lambda n: f"the correlation in textured blocks is {n['similarity_coarse']:.2f}",
    ),
    "worse": Mark(
        lambda n: max(0.0, n["similarity_before_fine"] - n["similarity_fine"]),
        lambda n: (
            f"the correlation in textured blocks fell from {n['similarity_before_fine']:.2f} to "
            f"{n['similarity_fine']:.2f}"
        ),
    ),
    "opposite": Mark(
        lambda n: n["opposite_fine"],
        lambda n: (
            f"{n['opposite_fine']:.0%} of the textured blocks have the opposite contrast: if the scans have "
            "different contrasts, register with modality multi"
        ),
    ),
    "disjoint": Mark(
        lambda n: 1 - n["overlap"],
        lambda n: f"the foregrounds share {n['overlap']:.2f} of their union",
    ),
    "departed": Mark(
        lambda n: max(0.0, n["overlap_before"] - n["overlap"]),
        lambda n: f"overlap of the foregrounds fell from {n['overlap_before']:.2f} to {n['overlap']:.2f}",
    ),
    "outside": Mark(
        lambda n: n["outside"],
        lambda n: f"{n['outside']:.0%} of the foreground lies outside of the moving scan",
    ),
    "bend": Mark(
        lambda n: n["sd_log_jacobian"],
        lambda n: (
            f"volumes change unevenly: Jacobian {n['jacobian_1_percent']:.2f} to "
            f"{n['jacobian_99_percent']:.2f} (1st to 99th percentile)"
        ),
    ),
    "folds": Mark(
        lambda n: n["folded"],
        lambda n: f"the field folds in {n['folded']:.1%} of the foreground",
    ),
    "scale": Mark(
        lambda n: abs(math.log(max(n["linear_determinant"], 1e-3))),
        lambda n: (
            f"the linear part of the field changes volumes by a factor of {n['linear_determinant']:.2f}"
        ),
    ),
    "stretch": Mark(
        lambda n: max(math.log(max(n["stretch_max"], 1e-3)), -math.log(max(n["stretch_min"], 1e-3))),
        lambda n: (
            f"the linear part of the field stretches lengths by {n['stretch_min']:.2f} to "
            f"{n['stretch_max']:.2f}"
        ),
    ),
}


def judge(numbers: Mapping[str, float], *, error_mm: Float[np.ndarray, "x y z"] | None = None) -> Assessment:
    """The verdict on the numbers of `evidence.gather_evidence`.

    The score is `exp(-sum of penalties)`: each mark counts from about a threshold on, in proportion to what
    exceeds it. No mark can make up for another.

    Args:
      numbers: by name.
      error_mm: becomes that of the assessment.
    """
    penalties = penalties_of(numbers)
    score = math.exp(-sum(penalties.values()))
    verdict: Verdict = "pass" if score >= rule.PASS else "check" if score >= rule.CHECK else "fail"
    worst = sorted(
        (name for name in penalties if penalties[name] >= WORTH_SAYING), key=lambda n: -penalties[n]
    )
    reasons = [MARKS[name].words(numbers) for name in worst]
    if verdict == "pass":
        reasons.append(
            f"{numbers['held_fine']:.0%} of the textured blocks fit best within 1.5 voxels of "
            f"{numbers['voxel_mm']:.3g} mm of where the field puts them"
        )
    return Assessment(verdict, score, tuple(reasons), dict(numbers), error_mm)


def penalties_of(numbers: Mapping[str, float]) -> dict[str, float]:
    """How much each of `MARKS` counts against a registration, 0 or more."""
    penalties = {}
    for name, mark in MARKS.items():
        threshold, weight = rule.MARKS[name]
        bend = SHARPNESS * weight
        without = np.logaddexp(0, -bend * threshold)  # a value of 0 costs nothing
        penalties[name] = (
            float(np.logaddexp(0, bend * (mark.value(numbers) - threshold)) - without) / SHARPNESS
        )
    penalties["outside"] = min(penalties["outside"], rule.MOST_OUTSIDE)
    of_images = sum(penalties[name] for name in OF_IMAGES)
    if numbers["across_contrasts"] and of_images > rule.MOST_ACROSS_CONTRASTS:
        for name in OF_IMAGES:
            penalties[name] *= rule.MOST_ACROSS_CONTRASTS / of_images
    return penalties


def too_little(voxels: int, fewest: int) -> Assessment:
    """The assessment of scans without enough to look at."""
    reason = f"too small or too flat for a verdict: {voxels} voxels have texture, {fewest} are needed"
    return Assessment(None, None, (reason,))


def _significant(value: float) -> float:
    return float(f"{value:.3g}")


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), digits)
