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

# The predicted error in voxels of the fine level: scale times the product of (mark + floor)**power.
ERROR: dict[str, float] = {"distance": 0.175, "offset": 0.58, "strain": 0.499}
ERROR_FLOOR = 0.1
ERROR_SCALE = 2.21
# True by predicted error, 90 % of the places lie between: by their own predictions, and by the scan's mean.
PLACES_90 = (0.282, 2.41)
SCAN_90 = (0.249, 2.57)
