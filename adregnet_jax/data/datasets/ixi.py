"""IXI brain scans as TransMorph distributes them: 403 to train, 58 to validate, 115 to test, and an atlas.

The folder contains Train, Val and Test with one pickle per subject, and atlas.pkl, in any letter case; see
`SOURCE`. NIfTI files are accepted as well: images/ and labels/ with the same file names in each of the three
folders, and atlas_image.nii.gz and atlas_labels.nii.gz next to them. All scans are aligned to the atlas,
on one grid of 1 mm, with intensities from 0 to 1.

Pickles hold no affine: voxel axes stay as they are, and their anatomical directions are unknown.

Labels run from 0 to 45, in the order of `LABEL_NAMES`. A scan with a label above 45 is taken to have
FreeSurfer's own numbers; these are renumbered, and labels without a name here become 0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adregnet_jax.config import IxiConfig
from adregnet_jax.data.datasets.ixi_t1t2 import t1t2_splits
from adregnet_jax.data.io import nifti
from adregnet_jax.data.io.pickles import read_pickle
from adregnet_jax.data.pair import Pair, PairMaker
from adregnet_jax.errors import UserError

SOURCE = (
    "https://github.com/junyuchen245/TransMorph_Transformer_for_Medical_Image_Registration"
    "/blob/main/IXI/TransMorph_on_IXI.md"
)
SPLIT_FOLDERS = ("train", "val", "test")
INTENSITY_TOLERANCE = 0.05  # interpolation overshoots a little, and is clipped
SPACING_TOLERANCE_MM = 0.01

# fmt: off
FREESURFER_NUMBERS = (
    0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 30, 31, 41, 42, 43, 44, 46, 47, 49,
    50, 51, 52, 53, 54, 58, 60, 62, 63, 72, 77, 80, 85, 251, 252, 253, 254, 255,
)
LABEL_NAMES = (
    "Unknown", "Left-Cerebral-White-Matter", "Left-Cerebral-Cortex", "Left-Lateral-Ventricle",
    "Left-Inf-Lat-Vent", "Left-Cerebellum-White-Matter", "Left-Cerebellum-Cortex", "Left-Thalamus-Proper*",
    "Left-Caudate", "Left-Putamen", "Left-Pallidum", "3rd-Ventricle", "4th-Ventricle", "Brain-Stem",
    "Left-Hippocampus", "Left-Amygdala", "CSF", "Left-Accumbens-area", "Left-VentralDC", "Left-vessel",
    "Left-choroid-plexus", "Right-Cerebral-White-Matter", "Right-Cerebral-Cortex", "Right-Lateral-Ventricle",
    "Right-Inf-Lat-Vent", "Right-Cerebellum-White-Matter", "Right-Cerebellum-Cortex",
    "Right-Thalamus-Proper*", "Right-Caudate", "Right-Putamen", "Right-Pallidum", "Right-Hippocampus",
    "Right-Amygdala", "Right-Accumbens-area", "Right-VentralDC", "Right-vessel", "Right-choroid-plexus",
    "5th-Ventricle", "WM-hypointensities", "non-WM-hypointensities", "Optic-Chiasm", "CC_Posterior",
    "CC_Mid_Posterior", "CC_Central", "CC_Mid_Anterior", "CC_Anterior",
)
SCORED_LABELS = (
    1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 21, 22, 23, 25, 26, 27, 28, 29, 30, 31, 32,
    34, 36,
)
# fmt: on


def _groups() -> dict[str, tuple[int, ...]]:
    groups: dict[str, tuple[int, ...]] = {}
    for label in SCORED_LABELS:
        name = re.sub(r"^(Left|Right)-|\*$", "", LABEL_NAMES[label])
        groups[name] = (*groups.get(name, ()), label)
    return groups


GROUPS = _groups()  # the 17 structures of the published scores: left and right are one


class Scan(NamedTuple):
    """The files of a subject; without a file of labels, the image is a pickle that holds them too."""

    image: Path
    labels: Path | None

    @property
    def name(self) -> str:
        return self.image.name.split(".")[0]


def ixi_splits(config: IxiConfig, seed: int = 0) -> tuple[list[PairMaker], list[PairMaker], list[PairMaker]]:
    """Pairs for training, validation and test; each entry reads its pair when called.

    Args:
      config: with `config.mode` "atlas", the atlas is the moving scan and each subject is fixed once. With
        "pairs", each subject is fixed with `config.partners` other subjects of its split. For "t1t2", see
        `ixi_t1t2`.
      seed: for the choice of partners, and for the split of "t1t2".
    """
    config.check()
    if config.mode == "t1t2":
        return t1t2_splits(config, seed)
    root = Path(config.root)
    if not config.root or not root.is_dir():
        raise UserError(_expected(config, "doesn't exist"))
    entries = {path.name.lower(): path for path in sorted(root.iterdir()) if not path.name.startswith(".")}
    splits = [_scans(entries.get(folder)) for folder in SPLIT_FOLDERS]
    if empty := [folder for folder, scans in zip(SPLIT_FOLDERS, splits, strict=True) if not scans]:
        raise UserError(_expected(config, f"has no scans in {', '.join(empty)}"))
    if config.mode == "pairs":
        train, validation, test = _subject_pairs(config, splits, seed)
    else:
        if (atlas := _atlas(entries)) is None:
            raise UserError(_expected(config, "has no atlas"))
        train, validation, test = _atlas_pairs(config, splits, atlas)
    return train, validation, test


def _expected(config: IxiConfig, problem: str) -> str:
    return (
        f"IXI folder '{config.root}' (data.ixi.root) {problem}: expected Train, Val and Test with one .pkl "
        f"per subject, and atlas.pkl, as TransMorph distributes them: {SOURCE}"
    )


def _scans(folder: Path | None) -> list[Scan]:
    if folder is None or not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if pickles := [path for path in files if path.suffix.lower() == ".pkl"]:
        return [Scan(path, None) for path in pickles]
    images = [path for path in sorted(folder.glob("images/*.nii*")) if not path.name.startswith(".")]
    scans = [Scan(path, folder / "labels" / path.name) for path in images]
    if missing := [scan.labels for scan in scans if scan.labels and not scan.labels.is_file()]:
        raise UserError(f"{folder}: {len(missing)} images have no labels, the first is {missing[0]}")
    return scans


def _atlas(entries: dict[str, Path]) -> Scan | None:
    """The atlas among the files in the root folder, given by lower-case names."""
    for name, path in entries.items():
        if re.fullmatch(r"atlas.*\.pkl", name):
            return Scan(path, None)
    image, labels = entries.get("atlas_image.nii.gz"), entries.get("atlas_labels.nii.gz")
    return Scan(image, labels) if image and labels else None


def _atlas_pairs(config: IxiConfig, splits: list[list[Scan]], atlas: Scan) -> list[list[PairMaker]]:
    read_atlas = functools.cache(functools.partial(_read, atlas, config.shape))
    return [
        [
            PairMaker(
                scan.name,
                atlas.name,
                functools.partial(_pair, scan.name, functools.partial(_read, scan, config.shape), read_atlas),
            )
            for scan in scans
        ]
        for scans in splits
    ]


def _subject_pairs(config: IxiConfig, splits: list[list[Scan]], seed: int) -> list[list[PairMaker]]:
    random = np.random.default_rng(seed)
    loaders: list[list[PairMaker]] = []
    for folder, scans in zip(SPLIT_FOLDERS, splits, strict=True):
        if not 1 <= config.partners < len(scans):
            raise UserError(
                f"data.ixi.partners is {config.partners}, {folder} has {len(scans)} scans: "
                "expected at least 1 partner, and fewer than there are scans"
            )
        readers = [functools.partial(_read, scan, config.shape) for scan in scans]
        loaders.append([])
        for fixed in range(len(scans)):
            for step in random.permutation(np.arange(1, len(scans)))[: config.partners]:
                moving = (fixed + step) % len(scans)
                names = (scans[fixed].name, scans[moving].name)
                make = functools.partial(_pair, "_".join(names), readers[fixed], readers[moving])
                loaders[-1].append(PairMaker(*names, make))
    return loaders


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # image, labels, affine


def _pair(name: str, read_fixed: Callable[[], Arrays], read_moving: Callable[[], Arrays]) -> Pair:
    fixed, fixed_labels, affine = read_fixed()
    moving, moving_labels, moving_affine = read_moving()
    if not np.allclose(affine[:3, :3], moving_affine[:3, :3], atol=SPACING_TOLERANCE_MM):
        raise UserError(f"{name}: the axes of fixed and moving scan differ: save them in one orientation")
    return Pair(
        name=name,
        fixed=fixed,
        moving=moving,
        spacing_mm=np.ones(3),
        affine=affine,
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
    )


def _read(scan: Scan, shape: tuple[int, int, int]) -> Arrays:
    """Image [x, y, z] float32 in [0, 1], labels [x, y, z] uint8 from 0 to 45, affine [4, 4]."""
    if scan.labels is None:
        image, labels = read_pickle(scan.image)
        affine = np.eye(4)
    else:
        image, affine, spacing_mm = nifti.read_volume(scan.image)
        labels, _, _ = nifti.read_labels(scan.labels)
        if not np.allclose(spacing_mm, 1, atol=SPACING_TOLERANCE_MM):
            raise UserError(f"{scan.image}: spacing is {spacing_mm} mm; expected 1 mm: resample it")
    for path, values in ((scan.image, image), (scan.labels, labels)):
        if values.shape != tuple(shape):
            raise UserError(
                f"{path}: is {values.shape}, data.ixi.shape is {tuple(shape)}: all scans must have this shape"
            )
    low, high = image.min(), image.max()
    if low < -INTENSITY_TOLERANCE or high > 1 + INTENSITY_TOLERANCE:
        raise UserError(
            f"{scan.image}: intensities run from {low:g} to {high:g}; expected 0 to 1: rescale the scan"
        )
    return np.clip(image, 0, 1), _renumbered(labels, scan.labels or scan.image), affine


def _renumbered(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.min() < 0:
        raise UserError(f"{path}: has label {labels.min()}; expected 0 to 45, or FreeSurfer's numbers")
    if labels.max() < len(LABEL_NAMES):
        return labels.astype(np.uint8)
    numbers = np.zeros(max(FREESURFER_NUMBERS) + 2, np.uint8)  # the last entry is for all numbers above
    numbers[list(FREESURFER_NUMBERS)] = np.arange(len(FREESURFER_NUMBERS))
    return numbers[np.minimum(labels, len(numbers) - 1)]
