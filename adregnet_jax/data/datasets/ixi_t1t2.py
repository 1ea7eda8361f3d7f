"""T1 and T2 scans of IXI, as its own site distributes them: the T2 is registered to the T1.

The files are called IXI002-Guys-0828-T1.nii.gz and IXI002-Guys-0828-T2.nii.gz, and lie in the folder or in
subfolders such as IXI-T1 and IXI-T2 (https://brain-development.org/ixi-dataset/). `prepare_ixi` strips the
skulls and brings the scans to one size.

The two scans of a subject have different grids and lie in one world: the T2 is read where the voxels of the
T1 are. The T1 is never resampled. There are no labels and no landmarks.

The paper says only that both modalities "undergo the same pipeline to ensure voxelwise correspondence", and
80 % / 20 %. Pairs of different subjects are taken as they lie in the world, too: align them first.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import nibabel as nib
import numpy as np

from adregnet_jax.config import IxiConfig
from adregnet_jax.data.io import nifti
from adregnet_jax.data.pair import Pair, PairMaker
from adregnet_jax.data.preprocessing import resample_to_grid, rescale_percentiles
from adregnet_jax.errors import UserError

FILE_NAME = re.compile(r"(IXI\d+-[A-Za-z]+-\d+)-(T1|T2)\.nii(?:\.gz)?")
LEAST_OVERLAP = 0.25  # of the T1's grid; the T2 of a session covers two thirds of it


def t1t2_splits(config: IxiConfig, seed: int = 0) -> tuple[list[PairMaker], list[PairMaker], list[PairMaker]]:
    """Pairs for training, validation and test, split by subject; each entry reads its pair when called.

    Args:
      config: with `config.same_subject`, each subject is a pair; else its T1 goes with the T2 of
        `config.partners` other subjects of its split.
      seed: of the split and of the choice of partners.

    Raises:
      UserError: no scans, a subject without one of the two, or too few subjects.
    """
    if not config.root:
        raise UserError("data.ixi.root is not set: expected the folder with the T1 and T2 scans of IXI")
    scans = find_scans(Path(config.root))
    subjects = sorted(scans)
    counts = [round(len(subjects) * share) for share in (config.validation_fraction, config.test_fraction)]
    counts = [len(subjects) - sum(counts), *counts]
    partners = 0 if config.same_subject else config.partners
    if min(counts) <= partners or (partners < 1 and not config.same_subject):
        raise UserError(
            f"'{config.root}': {len(subjects)} subjects give {' / '.join(map(str, counts))} to train /"
            f" validate / test, with {partners} partners each from their split: add subjects, or change"
            " data.ixi's fractions or partners"
        )
    random = np.random.default_rng(seed)
    shuffled = [subjects[index] for index in random.permutation(len(subjects))]
    splits: list[list[PairMaker]] = []
    for count in counts:
        members, shuffled = shuffled[:count], shuffled[count:]
        steps = [random.permutation(np.arange(1, count))[:partners] if partners else [0] for _ in members]
        pairs = [(n, (n + step) % count) for n in range(count) for step in steps[n]]
        splits.append([_maker(members[n], members[m], scans, config.shape) for n, m in pairs])
    train, validation, test = splits
    return train, validation, test


def find_scans(root: Path) -> dict[str, dict[str, Path]]:
    """The files T1 and T2 of each subject in a folder or in its folders.

    Raises:
      UserError: no such folder, no such files, one twice, or a subject with one of the two.
    """
    paths = sorted([*root.glob("*.nii*"), *root.glob("*/*.nii*")])
    scans: dict[str, dict[str, Path]] = {}
    for path in paths:
        if found := FILE_NAME.fullmatch(path.name):
            subject, contrast = found.groups()
            other = scans.setdefault(subject, {}).setdefault(contrast, path)
            if other != path:
                raise UserError(f"{path} and {other} are the same scan: leave one of them")
    if not scans:
        raise UserError(
            f"IXI folder '{root}' (data.ixi.root) has no scans: expected files like"
            " IXI002-Guys-0828-T1.nii.gz and IXI002-Guys-0828-T2.nii.gz in it or in its folders"
        )
    if alone := [subject for subject, files in sorted(scans.items()) if len(files) < 2]:
        missing = "T2" if "T1" in scans[alone[0]] else "T1"
        raise UserError(
            f"{root}: {len(alone)} of {len(scans)} subjects have only one of T1 and T2, the first is"
            f" {alone[0]} without {missing}: add the file, or take the subject's other one away"
        )
    return scans


def _maker(fixed: str, moving: str, scans: dict[str, dict[str, Path]], shape: tuple[int, ...]) -> PairMaker:
    name = fixed if fixed == moving else f"{fixed}_{moving}"
    return PairMaker(
        fixed, moving, functools.partial(_pair, name, scans[fixed]["T1"], scans[moving]["T2"], shape)
    )


def _pair(name: str, t1_path: Path, t2_path: Path, shape: tuple[int, ...]) -> Pair:
    t1, affine, _ = nifti.read_volume(t1_path)
    if t1.shape != tuple(shape):
        raise UserError(
            f"{t1_path}: is {t1.shape}, data.ixi.shape is {tuple(shape)}: all T1 scans must have this shape:"
            " prepare them by python -m adregnet_jax.data.datasets.prepare_ixi, or set the shape"
        )
    t2, t2_affine, _ = nifti.read_volume(t2_path)
    # To [0, 1] for the network. For z-scored scans, this changes only scale and offset.
    moving, inside = resample_to_grid(rescale_percentiles(t2, str(t2_path)), t2_affine, t1.shape, affine)
    if inside.mean() < LEAST_OVERLAP:
        raise UserError(
            f"{t2_path}: covers {100 * inside.mean():.0f} % of the grid of {t1_path.name}: they have no"
            " common world; align them first"
        )
    return Pair(
        name=name,
        fixed=rescale_percentiles(t1, str(t1_path)),
        moving=moving,
        spacing_mm=nib.affines.voxel_sizes(affine),
        affine=affine,
        mask=inside,
    )
