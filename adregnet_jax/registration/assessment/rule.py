"""Constants of the verdict and of the predicted error, fitted on synthetic pairs, never on real ones.

`python benchmarks/assessment.py fit` prints them.
"""

# Of each mark: the value from which on it counts, and the penalty per unit beyond it.
MARKS: dict[str, tuple[float, float]] = {
    "residual": (1.3, 1.3),
    "unlike": (0.1, 2.23),
    "worse": (0.02, 10),
    "opposite": (0.05, 2.44),
    "disjoint": (0.2, 2.54),
    "departed": (0.03, 5.88),
    "outside": (0.15, 5.76),
    "bend": (0.5, 4.81),
    "folds": (0.002, 55.6),
    "scale": (0.35, 3),
    "stretch": (0.25, 4.83),
}
PASS = 0.6  # the least score that passes
CHECK = 0.3  # below, the registration fails
MOST_OUTSIDE = 1.1  # penalty of "outside": a scan that shows a part of the other can be aligned, but check it
MOST_ACROSS_CONTRASTS = 1.1  # penalty of all that compares intensities, for scans of different contrast

# The error of a block by the distance that its matches expect, all in voxels of the fine level: mean, and
# 90th percentile. Linear in between.
ERROR = (
    (0.3, 0.22, 0.63),
    (0.4, 0.35, 0.89),
    (0.55, 0.48, 1.17),
    (0.73, 0.64, 1.42),
    (0.95, 0.77, 1.57),
    (1.2, 0.89, 1.8),
    (1.45, 1.01, 2.09),
    (1.7, 1.08, 2.37),
    (2.0, 1.08, 2.66),
    (2.35, 1.08, 3.13),
    (2.75, 1.32, 3.93),
    (3.5, 1.55, 4.62),
)
