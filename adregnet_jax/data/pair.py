"""A pair of scans on one grid, with masks, landmarks, labels and the true displacement. NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Integer, Real


@dataclasses.dataclass(frozen=True)
class Pair:
    """One registration problem, ready for the network.

    Arrays keep the index order of the file (NIfTI i, j, k). Landmarks are 0-based voxel coordinates of this
    grid: `fixed_landmarks[n]` and `moving_landmarks[n]` are the same anatomical point.

    The scans may have been cropped and resampled. `native_scale` and `native_offset` undo it for points:
    `native_voxel = native_scale * voxel + native_offset`, on a grid of spacing `native_spacing_mm`.
    """

    name: str
    fixed: Float[np.ndarray, "x y z"]  # in [0, 1]
    moving: Float[np.ndarray, "x y z"]  # in [0, 1]
    spacing_mm: Float[np.ndarray, " 3"]
    affine: Float[np.ndarray, "4 4"] = dataclasses.field(default_factory=lambda: np.eye(4))  # voxel -> RAS mm
    mask: Bool[np.ndarray, "x y z"] | None = None  # False in padding; None: no padding
    fixed_landmarks: Float[np.ndarray, "n 3"] | None = None  # voxels
    moving_landmarks: Float[np.ndarray, "n 3"] | None = None
    fixed_labels: Integer[np.ndarray, "x y z"] | None = None
    moving_labels: Integer[np.ndarray, "x y z"] | None = None
    displacement: Float[np.ndarray, "x y z 3"] | None = None  # voxels, the true one if it is known
    same_contrast: bool = True  # whether equal intensities mean equal tissue in both scans
    native_scale: Float[np.ndarray, " 3"] = dataclasses.field(default_factory=lambda: np.ones(3))
    native_offset: Real[np.ndarray, " 3"] = dataclasses.field(default_factory=lambda: np.zeros(3))
    native_spacing_mm: Float[np.ndarray, " 3"] | None = None  # None: the same as spacing_mm

    def to_native(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Converts points [n, 3] from voxels of this grid to voxels of the scan on disk."""
        return points * self.native_scale + self.native_offset


@dataclasses.dataclass(frozen=True)
class PairMaker:
    """Reads or generates a pair when it is called; the subjects are known before.

    Attributes:
      fixed, moving: names of the subjects, which identify a split.
      make: reads or generates the pair.
    """

    fixed: str
    moving: str
    make: Callable[[], Pair]

    def __call__(self) -> Pair:
        return self.make()
