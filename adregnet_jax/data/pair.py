"""A pair of scans on one grid, with masks, landmarks, labels and the true displacement. NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pair:
    """One registration problem, ready for the network.

    Arrays keep the index order of the file (NIfTI i, j, k). Landmarks are 0-based voxel coordinates of this
    grid: `fixed_landmarks[n]` and `moving_landmarks[n]` are the same anatomical point.

    The scans may have been cropped and resampled. `native_scale` and `native_offset` undo it for points:
    `native_voxel = native_scale * voxel + native_offset`, on a grid of spacing `native_spacing_mm`.
    """

    name: str
    fixed: np.ndarray  # [x, y, z] float32, in [0, 1]
    moving: np.ndarray  # [x, y, z] float32, in [0, 1]
    spacing_mm: np.ndarray  # [3]
    affine: np.ndarray = dataclasses.field(default_factory=lambda: np.eye(4))  # [4, 4] voxel -> RAS mm
    mask: np.ndarray | None = None  # [x, y, z] bool, False in padding; None: no padding
    fixed_landmarks: np.ndarray | None = None  # [n, 3]
    moving_landmarks: np.ndarray | None = None  # [n, 3]
    fixed_labels: np.ndarray | None = None  # [x, y, z] int
    moving_labels: np.ndarray | None = None  # [x, y, z] int
    displacement: np.ndarray | None = None  # [x, y, z, 3] voxels, the true one if it is known
    same_contrast: bool = True  # whether equal intensities mean equal tissue in both scans
    native_scale: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(3))
    native_offset: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    native_spacing_mm: np.ndarray | None = None  # [3]; None: the same as spacing_mm

    def to_native(self, points: np.ndarray) -> np.ndarray:
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
