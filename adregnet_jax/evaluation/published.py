"""Published results for comparison. DIR-Lab 4DCT: mean TRE in mm of cases 1 to 10.

Protocols differ: the learned methods of the paper's Table I were trained on other cases or on these very
cases; pTVreg and IDIR are optimised on each test pair itself. Methods in `SNAPPED` round mapped points to
voxels before measuring.
"""

from __future__ import annotations

# Table I of the AD-RegNet paper, which names its sources, then methods that it omits.
DIRLAB_TRE_MM: dict[str, tuple[float, ...]] = {
    "De Vos": (1.27, 1.20, 1.48, 2.09, 1.95, 5.16, 3.05, 6.48, 2.10, 2.09),
    "Eppenhof": (1.45, 1.46, 1.57, 1.95, 2.07, 3.04, 3.41, 2.80, 2.18, 1.83),
    "Fang": (1.19, 1.08, 1.35, 1.63, 1.93, 1.94, 1.98, 3.97, 1.92, 1.95),
    "Zhang": (1.54, 1.48, 1.67, 1.63, 2.10, 1.58, 1.91, 2.30, 1.50, 2.68),
    "Hering": (1.33, 1.33, 1.48, 1.85, 1.84, 3.57, 2.61, 2.62, 2.70, 2.63),
    "Jiang": (1.20, 1.13, 1.30, 1.55, 1.72, 2.02, 1.70, 2.64, 1.51, 1.79),
    "AD-RegNet (paper)": (1.23, 1.06, 1.31, 1.47, 1.64, 1.61, 1.58, 2.35, 1.36, 1.49),
    "pTVreg": (0.77, 0.75, 0.93, 1.26, 1.07, 0.83, 0.80, 1.01, 0.91, 0.84),
    "IDIR": (0.76, 0.76, 0.94, 1.32, 1.23, 1.09, 1.12, 1.21, 1.22, 1.01),
}
SNAPPED = frozenset({"pTVreg"})
OPTIMISED = frozenset({"pTVreg", "IDIR"})
ORRN_MEAN_MM = 1.26  # published as a mean only

# Table III of the AD-RegNet paper: Dice over 17 groups of labels x cases, and folded voxels in percent (mean,
# SD); None stands for "< 0.0001".
IXI: dict[str, tuple[float, float, float | None, float | None]] = {
    "SyN": (0.645, 0.152, None, None),
    "nnFormer": (0.740, 0.134, 1.595, 0.358),
    "VoxelMorph-1": (0.723, 0.130, 1.590, 0.339),
    "VoxelMorph-2": (0.726, 0.123, 1.522, 0.336),
    "deedsBCV": (0.733, 0.126, 0.147, 0.050),
    "CycleMorph": (0.730, 0.124, 1.719, 0.382),
    "ViT-V-Net": (0.728, 0.124, 1.609, 0.319),
    "TransMorph": (0.746, 0.128, 1.579, 0.328),
    "LL-Net-Tiny": (0.755, 0.134, 0.101, 0.054),
    "AD-RegNet (paper)": (0.759, 0.121, 0.137, 0.293),
    "LL-Net-Small": (0.764, 0.128, 0.135, 0.072),
    "LL-Net-diff-Small": (0.763, 0.127, None, None),
    "LL-Net-Large": (0.767, 0.126, 0.148, 0.077),
}
