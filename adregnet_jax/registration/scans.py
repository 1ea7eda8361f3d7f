"""Registration of two scans with grids of their own, to one displacement field in the world.

Affine registration maps the moving scan to the fixed one, deformable registration runs on the grid of
the fixed scan, and the two become one field, so that the moving scan is interpolated once.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from adregnet_jax.config import AffineConfig, InstanceConfig
from adregnet_jax.data.io.images import Image
from adregnet_jax.data.preprocessing import counted_voxels, rescale_percentiles
from adregnet_jax.errors import UserError
from adregnet_jax.registration import ladder
from adregnet_jax.registration.adapter import predict_displacement
from adregnet_jax.registration.affine import align_affine_on_rungs
from adregnet_jax.registration.evidence import weigh_evidence
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.registration.harm import StageKeeper, coarse_scans
from adregnet_jax.registration.instance import MovingGrid, align_on_rungs, has_own_grid
from adregnet_jax.registration.measure import ScanPair
from adregnet_jax.registration.modality import same_contrast
from adregnet_jax.registration.options import Modality
from adregnet_jax.registration.results import Evidence, RegisteredScans
from adregnet_jax.weights.trained_network import TrainedNetwork

MIN_BACKGROUND = 0.5  # a value is the background if at least this share of the border has it
SEARCH_SHARE = 0.125  # of the edge of a cube as large as the fixed scan: the search goes no further
MASK_TOLERANCE = 0.1  # voxels: greatest distance between the corners of a mask and of its scan
# Presets have lengths in mm, made for voxels like these. Scans with others are registered as if their voxels
# had the preset size: a tissue block and a planet are as many voxels as a person.
PRESET_SPACINGS_MM = (0.25, 10.0)  # the least and the largest, geometric mean of the axes
PRESET_SPACING_MM = 2.0


def register_scans(
    fixed: Image,
    moving: Image,
    *,
    affine: AffineConfig | None = AffineConfig(),  # noqa: B008 -- not changed here
    instance: InstanceConfig | None = InstanceConfig(),  # noqa: B008
    network: TrainedNetwork | None = None,
    tile: int | None = None,
    modality: Modality = "auto",
    adaptive: bool = True,
    fixed_mask: Image | None = None,
    moving_mask: Image | None = None,
    apart: bool = False,
    keep: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> RegisteredScans:
    """Registers a moving scan to a fixed scan; grid, spacing and orientation may differ.

    Args:
      fixed: the scan whose grid the result has.
      moving: the scan that is warped.
      affine: settings of the affine registration to start with; None: start where the headers put the scans.
      instance: settings of the instance optimisation; None: no such optimisation. Its search goes no further
        than an eighth of the scan.
      network: a trained network, as from `load_pretrained`, which gets the scans on a grid like those of its
        training; the instance optimisation starts from its result. None: no network.
      tile: width in voxels of the tiles the network gets; None: the whole volume.
      modality: "mono": intensities of one kind. "multi": of different contrast: the affine step compares by
        normalised mutual information, and the optimisation only where both scans have a foreground, without
        the network. Its squared local NCC is blind to the sign of contrast, as between T1 and T2, but along
        the rim of a stripped brain three tissues meet the background. Where contrasts have less in common,
        as in MR and CT, set `instance.similarity` to "mind". "auto": "mono" unless the aligned scans say
        otherwise (`modality.same_contrast`).
      adaptive: choose the smoothness of the instance optimisation by what the scans agree on, and deform
        nothing where that is no motion (`evidence.weigh_evidence`); for the similarity "ncc" alone. False:
        `instance.smoothness`.
      fixed_mask: on the grid of the fixed scan, 0 where the scan doesn't count.
      moving_mask: on the grid of the moving scan, likewise.
      apart: accept scans that don't overlap in the world; the affine step starts from their centres.
      keep: keep every stage. Otherwise one is taken back if the scans were more alike before it
        (`registration.harm`), and an affine map that changes volumes beyond `affine.determinants` gives way
        to a rigid one; `RegisteredScans.outcomes` says so.
      on_stage: called with the name of each stage when it begins.

    Returns:
      A `RegisteredScans`. If a scan has one value everywhere, it is the identity, with a warning.

    Raises:
      UserError: scans that don't overlap in the world, masks that are empty or on another grid, a scan too
        small for the network, settings that make no sense.
      ValueError: neither a network nor affine nor instance settings.
    """
    if affine is None and instance is None and network is None:
        raise ValueError("expected affine settings, instance settings or a network, got none of them")
    pair = given = (fixed, moving)
    if constant := [scan.name for scan in pair if np.ptp(scan.values) == 0]:
        warnings.warn(
            f"{' and '.join(constant)}: every voxel has the same value: there is nothing to register, and the"
            " result is the identity",
            stacklevel=2,
        )
        affine = instance = network = None
    if not (apart and affine):
        _check_overlap(fixed, moving)
    masks = [_mask(fixed_mask, fixed), _mask(moving_mask, moving)]
    scans = [
        scan.values.astype(np.float32)
        if constant
        else rescale_percentiles(scan.values, scan.name, counted=counted_voxels(scan.values, mask))
        for scan, mask in zip(pair, masks, strict=True)
    ]
    scale = preset_scale(fixed.spacing_mm)
    if scale != 1:
        fixed, moving = pair = (_scaled(fixed, scale), _scaled(moving, scale))
        instance = instance and scale_lengths(instance, scale)
    begin, seconds = _stopwatch(on_stage)

    begin("affine")
    keeper = StageKeeper(coarse_scans(pair, scans, masks), keep=keep)
    matrix, contrast = _aligned(pair, scans, masks, affine, modality)
    if affine is not None:
        refused = None if keep else _implausible(matrix, affine.determinants)
        if refused:
            rigid = dataclasses.replace(affine, kind="rigid")
            matrix, contrast = _aligned(pair, scans, masks, rigid, modality)
        if not keeper.keeps("affine", None, matrix, refused=refused):
            matrix = np.eye(4)

    begin("deformable")
    deformed = _deformed(
        pair,
        scans,
        masks,
        matrix,
        contrast=contrast,
        instance=instance,
        network=network,
        tile=tile,
        adaptive=adaptive,
        keeper=keeper,
    )
    del scans, masks  # of large scans the inverse needs the memory

    begin("inverse")
    still = ladder.zero_field(fixed.shape, fixed.affine)
    field = dataclasses.replace(still, displacement=deformed.displacement)
    inverse = _inverted(field, deformed.reverse, matrix, moving)
    field = ladder.after_field(field, matrix)
    values = moving.values.astype(np.float32)
    warped = ladder.warp_image(field, values - values.min(), moving.affine) + values.min()
    stages: dict[str, np.ndarray | None] = {}
    if affine is not None and not (instance is None and network is None):
        stages["affine"] = None
    if deformed.start is not None:
        stages["network"] = deformed.start
    begin("")
    if scale != 1:
        fixed, moving = given
        field = dataclasses.replace(field, affine=fixed.affine)
        inverse = dataclasses.replace(inverse, affine=moving.affine)
        matrix = np.array(matrix, np.float64)
        matrix[:3, 3] /= scale
    return RegisteredScans(
        ScanPair(fixed, moving, fixed_mask, moving_mask),
        field=field,
        inverse=inverse,
        matrix=matrix,
        warped=Image(warped, fixed.affine, moving.name),
        modality=contrast,
        seconds=seconds,
        stages=stages,
        evidence=deformed.evidence,
        outcomes=tuple(keeper.outcomes),
    )


class _Deformation(NamedTuple):
    """The result of the deformable step, in voxels of the fixed grid before the matrix."""

    displacement: np.ndarray  # [x, y, z, 3]
    reverse: np.ndarray | None  # [x, y, z, 3], its inverse on the same grid, where that is known
    start: np.ndarray | None = None  # [x, y, z, 3], the network's, from which the optimisation started
    evidence: Evidence | None = None


def _deformed(
    pair: tuple[Image, Image],
    scans: list[np.ndarray],
    masks: list[np.ndarray | None],
    matrix: np.ndarray,
    *,
    contrast: Literal["mono", "multi"],
    instance: InstanceConfig | None,
    network: TrainedNetwork | None,
    tile: int | None,
    adaptive: bool,
    keeper: StageKeeper,
) -> _Deformation:
    """Deforms the moving scan, which a matrix has aligned, by network and optimisation."""
    fixed, moving = pair
    still = np.zeros((*fixed.shape, 3), np.float32)
    evidence = None
    if contrast == "multi":
        masks = [_foreground(scan, mask) for scan, mask in zip(pair, masks, strict=True)]
        network = network if instance is None else None
    if instance is None and network is None:
        return _Deformation(still, still)

    moved, moved_mask = _on_grid_of(fixed, moving, scans[1], masks[1], matrix)
    spacing_mm = fixed.spacing_mm.round(4).tolist()
    if instance is not None:
        instance = limit_search(instance, fixed.shape, fixed.spacing_mm.tolist())
        if adaptive and instance.similarity == "ncc":
            evidence = weigh_evidence(
                scans[0],
                moved,
                spacing_mm=spacing_mm,
                fixed_mask=masks[0],
                moving_mask=moved_mask,
                modality=contrast,
                config=instance,
            )
        if evidence is not None and not evidence.believable:
            return _Deformation(still, still, evidence=evidence)
        if evidence is not None:
            instance = dataclasses.replace(instance, smoothness=evidence.smoothness)

    start = None
    if network is not None:
        known = Image(scans[0], fixed.affine, fixed.name)
        # The optimisation finds detail by itself: the first run is enough of a start.
        runs = None if instance is None else 1
        start = predict_displacement(network, known, moved, tile=tile, runs=runs)
        if not keeper.keeps("network", start, matrix):
            start = None
    before = still if start is None else start
    if instance is None:
        return _Deformation(before, None)

    to_moving = None
    if has_own_grid(instance):
        to_voxels = np.linalg.inv(moving.affine)
        to_moving = MovingGrid(to_voxels @ matrix @ fixed.affine, moving.spacing_mm.round(4).tolist())
        moved = scans[1]
        if moved_mask is not None:
            moved_mask = np.ones(moving.shape, np.float32) if masks[1] is None else masks[1]
    displacement, reverse = align_on_rungs(
        scans[0],
        moved,
        start=start,
        fixed_mask=masks[0],
        moving_mask=moved_mask,
        spacing_mm=spacing_mm,
        config=instance,
        to_moving=to_moving,
    )
    if not keeper.keeps("instance", displacement, matrix):
        displacement, reverse = before, None
    return _Deformation(displacement, reverse, start, evidence)


def _inverted(
    field: DisplacementField, reverse: np.ndarray | None, matrix: np.ndarray, moving: Image
) -> DisplacementField:
    """The inverse of a field and a matrix, on the moving grid; `reverse` is that of the field, if known."""
    inverse = ladder.reverse_field(
        ladder.invert_field(field) if reverse is None else dataclasses.replace(field, displacement=reverse),
        matrix,
        shape=moving.shape,
        affine=moving.affine,
    )
    return ladder.refine_inverse(inverse, field, matrix)


def _implausible(matrix: np.ndarray, determinants: tuple[float, float]) -> str | None:
    """Why a linear map is refused; None if it isn't."""
    determinant = float(np.linalg.det(matrix[:3, :3]))
    low, high = determinants
    if low <= determinant <= high:
        return None
    return f"it changed volumes {determinant:.2f}-fold, beyond {low:g} to {high:g}: a rigid map instead"


def _aligned(
    pair: tuple[Image, Image],
    scans: list[np.ndarray],
    masks: list[np.ndarray | None],
    config: AffineConfig | None,
    modality: Modality,
) -> tuple[np.ndarray, Literal["mono", "multi"]]:
    """The affine step, and the modality by which the scans are to be compared: "mono" or "multi".

    Scans of unknown modality are aligned as scans of one contrast first. That alignment makes them as
    correlated as they can be; if that isn't much, their contrasts differ, and they are aligned anew.
    """

    def align(similarity: str) -> np.ndarray:
        if config is None:
            return np.eye(4)
        return align_affine_on_rungs(
            *scans,
            *(scan.affine for scan in pair),
            fixed_mask=masks[0],
            moving_mask=masks[1],
            config=dataclasses.replace(config, similarity=similarity),
        )

    if modality == "multi":
        return align("nmi"), "multi"
    matrix = align("ncc" if config is None else config.similarity)
    if modality == "auto":
        moved, moved_mask = _on_grid_of(*pair, scans[1], masks[1], matrix)
        counts = [mask for mask in (masks[0], moved_mask) if mask is not None]
        both = np.min(counts, axis=0) if counts else None
        if not same_contrast(scans[0], moved, spacing_mm=pair[0].spacing_mm.tolist(), mask=both):
            return align("nmi"), "multi"
    return matrix, "mono"


def preset_scale(spacing_mm: Sequence[float] | np.ndarray) -> float:
    """The factor by which the world grows so that voxels get the size of `PRESET_SPACING_MM`; mostly 1."""
    size_mm = float(np.exp(np.mean(np.log(spacing_mm))))
    low, high = PRESET_SPACINGS_MM
    return 1.0 if low <= size_mm <= high else PRESET_SPACING_MM / size_mm


def scale_lengths(config: InstanceConfig, scale: float) -> InstanceConfig:
    """The settings for scans in a magnified world: lengths that aren't presets grow with it."""
    search_mm = config.search_range_mm
    if search_mm != InstanceConfig.search_range_mm:
        search_mm *= scale
    return dataclasses.replace(config, search_range_mm=search_mm, bending=config.bending * scale**2)


def _scaled(scan: Image, scale: float) -> Image:
    """The scan in a magnified world."""
    return dataclasses.replace(scan, affine=np.diag([scale, scale, scale, 1.0]) @ scan.affine)


def limit_search(config: InstanceConfig, shape: Sequence[int], spacing_mm: Sequence[float]) -> InstanceConfig:
    """The settings with a search that goes no further than an eighth of a scan of this size.

    Presets are made for people; a mouse moves by less.
    """
    extent_mm = float(np.prod(np.multiply(ladder.rungs(shape), spacing_mm))) ** (1 / 3)
    return dataclasses.replace(config, search_range_mm=min(config.search_range_mm, SEARCH_SHARE * extent_mm))


def _stopwatch(
    on_stage: Callable[[str], None] | None,
) -> tuple[Callable[[str], None], dict[str, float]]:
    """A function that ends a stage and begins the next, and the seconds of the finished stages."""
    seconds: dict[str, float] = {}
    running: list[tuple[str, float]] = []

    def begin(stage: str) -> None:
        now = time.perf_counter()
        if running:
            name, since = running.pop()
            seconds[name] = now - since
        if stage:
            running.append((stage, now))
            if on_stage:
                on_stage(stage)

    return begin, seconds


def _on_grid_of(
    fixed: Image, moving: Image, values: np.ndarray, mask: np.ndarray | None, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """The moving scan on the fixed grid, [x, y, z], and where it counts, [x, y, z] or None."""
    grid = ladder.after_field(ladder.zero_field(fixed.shape, fixed.affine), matrix)
    # A finer moving grid is smoothed first, as `preprocessing.resample` does, against aliasing.
    ratio = fixed.spacing_mm.min() / moving.spacing_mm
    smooth = np.maximum(ratio - 1, 0) / 2
    if (smooth > 0.25).any():
        values = ndimage.gaussian_filter(values, smooth, mode="nearest")
    moved = ladder.warp_image(grid, values, moving.affine, padding="border")
    inside = np.ones(moving.shape, np.float32) if mask is None else mask
    counts = ladder.warp_image(grid, inside, moving.affine)
    if mask is None and counts.min() > 0.5:
        return moved, None
    return moved, (counts > 0.5).astype(np.float32)


def _mask(mask: Image | None, scan: Image) -> np.ndarray | None:
    """[x, y, z] of 0 and 1, or None."""
    if mask is None:
        return None
    tolerance_mm = MASK_TOLERANCE * scan.spacing_mm.min()
    if mask.shape != scan.shape or not np.allclose(
        _corners_mm(mask), _corners_mm(scan), rtol=0, atol=tolerance_mm
    ):
        raise UserError(
            f"{mask.name}: the mask has {mask.shape} voxels of {mask.spacing_mm.round(3)} mm, its scan "
            f"{scan.shape} of {scan.spacing_mm.round(3)} mm: expected one grid, resample the mask"
        )
    if not (mask.values > 0).any():
        raise UserError(f"{mask.name}: the mask is empty; expected voxels above 0 where the scan counts")
    return (mask.values > 0).astype(np.float32)


def _foreground(scan: Image, mask: np.ndarray | None) -> np.ndarray | None:
    """[x, y, z] of 0 and 1: the mask without a constant background; the mask itself if there is none."""
    border = np.ones(scan.shape, bool)
    border[1:-1, 1:-1, 1:-1] = False
    values, counts = np.unique(scan.values[border], return_counts=True)
    background = values[counts.argmax()]
    if counts.max() < MIN_BACKGROUND * counts.sum():
        return mask
    inside = ndimage.binary_fill_holes(scan.values != background).astype(np.float32)
    return inside if mask is None else inside * mask


def _corners_mm(image: Image) -> np.ndarray:
    corners = np.array(list(itertools.product(*((0, n - 1) for n in image.shape))))
    return nib.affines.apply_affine(image.affine, corners)


def _check_overlap(fixed: Image, moving: Image) -> None:
    """Refuses scans whose boxes in the world lie apart."""
    (low, high), (other_low, other_high) = (
        (corners.min(axis=0), corners.max(axis=0)) for corners in map(_corners_mm, (fixed, moving))
    )
    gap_mm = np.maximum(low - other_high, other_low - high)
    if (gap_mm >= 0).any():
        axis = "right-left", "front-back", "feet-head"
        worst = int(np.argmax(gap_mm))
        raise UserError(
            f"{fixed.name} and {moving.name} do not overlap in the world, they are {gap_mm[worst]:.4g} mm "
            f"apart ({axis[worst]}): check the files, or start from their centres (apart=True)"
        )
