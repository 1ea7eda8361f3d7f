"""A breathing chest generated from a seed: training and test data with an exactly known displacement.

The anatomy is a density over continuous positions of the *moving* frame (end of exhale), and the displacement
u(p) is a closed-form function of positions in the *fixed* frame (end of inhale). Then

    moving(q) = anatomy(q)        fixed(p) = anatomy(p + u(p))

so the pull-back law warped(p) = moving(p + u(p)) = fixed(p) holds without inverting anything, neither image
is a resampled copy of the other, and a landmark p_f is p_f + u(p_f) in the moving image exactly. Each image
then gets its own noise, and the fixed one the lower density of lung that has expanded.

Everything is defined in a box of `BOX_MM`, centred at 0, that is stretched over the grid, so that a case on a
finer grid is the same chest. Axis 0 runs from the patient's right to left, axis 1 from front to back,
axis 2 from feet to head. `python -m adregnet_jax.data.datasets.phantom` prints statistics of the cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial.distance import cdist

from adregnet_jax.config import PhantomConfig
from adregnet_jax.data.pair import Pair
from adregnet_jax.errors import UserError

BOX_MM = np.array([320.0, 240.0, 288.0])
WINDOW_HU = (-1000.0, 400.0)  # mapped to [0, 1]
SUPERSAMPLING = 2  # raster points per voxel, along each axis
GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
BRANCHES_PER_LUNG = 1200  # of vessels, about 11 mm apart
SHEAR_LAYER_MM = 14.0  # width over which the lung's sliding fades at the chest wall
LANDMARK_DEPTH_MM = 4.0  # smallest distance of a landmark from the edge of the lung


@dataclasses.dataclass(frozen=True)
class _Anatomy:
    """Sizes in mm of one case, in the moving frame."""

    cavity: tuple[float, float]  # half axes of the inside of the rib cage
    apex: float  # height of the top of the lungs
    shoulder: float  # height above which the cavity narrows
    muscle: float  # thickness of the chest wall, ribs included
    fat: float  # thickness of the layer below the skin
    spine: tuple[float, float, float]  # x, y, radius
    mediastinum: float  # half of its width
    heart: list[list[float]]  # [2, 3] centre, half axes
    domes: list[list[float]]  # [2, 3] x, y, height of the top of each half of the diaphragm; right, left
    dome_drop: float  # from the top of a dome to its rim
    rib_pitch: float
    rib_tilt: float  # descent of the ribs, mm per mm from back to front
    rib_phase: float
    lung_hu: float
    lung_gradient_hu: float  # increase towards the back, per mm
    liver_hu: float


@dataclasses.dataclass(frozen=True)
class _Breath:
    """From inhale to exhale: sizes in mm of one case, in the fixed frame."""

    anatomy: _Anatomy
    scale: float  # of the whole motion
    rise: float  # of the diaphragm
    middle: float  # height at which half of the rise is left
    fade: float  # over which the rise fades
    back: float  # fraction by which the back rises more
    narrowing: tuple[float, float]  # of the chest: each side, front
    waves: list[list[float]]  # [w, 4] wave vectors (1/mm) and phases of the irregular part
    amplitudes: list[list[float]]  # [w, 3]


def phantom_pair(config: PhantomConfig, case: int) -> Pair:
    """Case number `case`: the same seed, case, shape and spacing always give the same pair, bit for bit.

    Args:
      config: grid, number of landmarks and seed.
      case: number of the chest, 0 or more; there is no upper limit.

    Returns:
      A pair with the true `displacement`, in voxels, and with landmarks in the lungs of both scans.
    """
    config.check()
    if case < 0:
        raise UserError(f"phantom cases are numbered from 0, got {case}")
    rng = np.random.default_rng([config.seed, case])
    spacing_mm = np.asarray(config.spacing_mm, dtype=np.float64)
    voxel_mm = BOX_MM / config.shape  # differs from the spacing by the stretch of the box over the grid

    anatomy = _draw_anatomy(rng)
    vessels = np.concatenate([_grow_vessels(rng, anatomy, side) for side in (-1, 1)])
    breath = _draw_breath(rng, anatomy)

    raster_shape = tuple(SUPERSAMPLING * n for n in config.shape)
    vessel_share = _rasterise(*_fill_vessels(vessels, 0.6 * (BOX_MM / raster_shape).min()), raster_shape)
    raster = ndimage.uniform_filter(_density_hu(anatomy, vessel_share), 3)

    x, y, z = np.ix_(*_axes_mm(config.shape))
    displacement = np.stack(_displacement_mm(breath, x, y, z), axis=-1) / voxel_mm
    identity = np.stack(np.meshgrid(*map(np.arange, config.shape), indexing="ij"), axis=-1)
    moving_hu = _scan(raster, identity)
    fixed_hu = _expand_lung(_scan(raster, identity + displacement), _jacobian_determinant(displacement))

    fixed_landmarks, moving_landmarks = _draw_landmarks(rng, config, breath, vessel_share)
    noise_hu = rng.uniform(12.0, 30.0)
    return Pair(
        name=f"phantom_{case:04d}",
        fixed=_to_unit(fixed_hu + noise_hu * rng.standard_normal(config.shape)),
        moving=_to_unit(moving_hu + noise_hu * rng.standard_normal(config.shape)),
        spacing_mm=spacing_mm,
        affine=_affine(config.shape, spacing_mm),
        fixed_landmarks=fixed_landmarks,
        moving_landmarks=moving_landmarks,
        displacement=displacement.astype(np.float32),
    )


def _axes_mm(shape: Sequence[int]) -> list[np.ndarray]:
    """Positions of the voxel centres along each axis; float32, so that large arrays are float32 too."""
    pairs = zip(shape, BOX_MM, strict=True)
    return [(((np.arange(n) + 0.5) / n - 0.5) * mm).astype(np.float32) for n, mm in pairs]


def _to_voxels(points_mm: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return (points_mm / BOX_MM + 0.5) * shape - 0.5


# From here on x, y and z are mm that broadcast; a depth is the distance to an edge in mm, positive inside.


def _ellipse_depth(
    x: np.ndarray, y: np.ndarray, half_axes: Sequence[float], scale: float | np.ndarray = 1.0
) -> np.ndarray:
    """Distance to an ellipse's edge, to first order; `scale` multiplies its half axes."""
    a, b = half_axes
    radius = np.sqrt((x / a) ** 2 + (y / b) ** 2) + 1e-6
    slope = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2) / radius + 1e-6
    return scale / slope - radius / slope


def _ellipsoid_depth(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, centre: Sequence[float], half_axes: Sequence[float]
) -> np.ndarray:
    a, b, c = half_axes
    radius = np.sqrt(((x - centre[0]) / a) ** 2 + ((y - centre[1]) / b) ** 2 + ((z - centre[2]) / c) ** 2)
    return (1 - radius) * min(half_axes)


def _cavity_depth(anatomy: _Anatomy, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Depth in the rib cage, an elliptical tube that closes at the apex of the lungs."""
    above = np.clip((z - anatomy.shoulder) / (anatomy.apex - anatomy.shoulder), 0, 1)
    return _ellipse_depth(x, y, anatomy.cavity, (1 - above**2.5) ** 0.4)


def _spine_depth(anatomy: _Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x0, y0, radius = anatomy.spine
    return radius - np.hypot(x - x0, y - y0)


def _diaphragm_height(anatomy: _Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    heights = [
        top - anatomy.dome_drop * (((x - x0) / 62) ** 2 + ((y - y0) / 85) ** 2)
        for x0, y0, top in anatomy.domes
    ]
    return 6 * np.logaddexp(heights[0] / 6, heights[1] / 6)  # a smooth maximum


def _lung_depth(anatomy: _Anatomy, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    depth = np.minimum(_cavity_depth(anatomy, x, y, z), 0.8 * (z - _diaphragm_height(anatomy, x, y)))
    mediastinum = _ellipse_depth(x, y - 10, (anatomy.mediastinum, 105))
    depth = np.minimum(depth, -np.maximum(mediastinum, _spine_depth(anatomy, x, y)))
    return np.minimum(depth, -_ellipsoid_depth(x, y, z, *anatomy.heart))


def _draw_anatomy(rng: np.random.Generator) -> _Anatomy:
    cavity = (rng.uniform(104, 120), rng.uniform(70, 84))
    dome = rng.uniform(-52, -28)
    return _Anatomy(
        cavity=cavity,
        apex=rng.uniform(116, 132),
        shoulder=rng.uniform(-25, 15),
        muscle=rng.uniform(15, 19),
        fat=rng.uniform(4, 15),
        spine=(rng.uniform(-3, 3), cavity[1] - rng.uniform(6, 12), rng.uniform(17, 21)),
        mediastinum=rng.uniform(22, 30),
        heart=[
            [rng.uniform(14, 26), rng.uniform(-28, -12), dome + rng.uniform(8, 22)],
            [rng.uniform(42, 54), rng.uniform(34, 44), rng.uniform(38, 48)],
        ],
        domes=[
            [-rng.uniform(50, 64), rng.uniform(-8, 12), dome],
            [rng.uniform(50, 64), rng.uniform(-8, 12), dome - rng.uniform(4, 16)],
        ],
        dome_drop=rng.uniform(40, 60),
        rib_pitch=rng.uniform(23, 29),
        rib_tilt=rng.uniform(0.25, 0.5),
        rib_phase=rng.uniform(0, 1),
        lung_hu=rng.uniform(-820, -740),
        lung_gradient_hu=rng.uniform(0.1, 0.6),
        liver_hu=rng.uniform(40, 80),
    )


def _grow_vessels(rng: np.random.Generator, anatomy: _Anatomy, side: int) -> np.ndarray:
    """A tree from the hilum that fills one lung; returns [n, 8]: start, end (mm), start and end radius.

    Points of the lung are added in shells, from the hilum outwards. Each joins the node with the smallest
    weighted sum of its distance and its own path to the hilum. Branches that feed more twigs are thicker.
    """
    hilum = np.array([side * (anatomy.mediastinum + 6), rng.uniform(2, 18), rng.uniform(10, 30)])
    candidates = rng.uniform(-0.5, 0.5, (16 * BRANCHES_PER_LUNG, 3)) * BOX_MM
    inside = (_lung_depth(anatomy, *candidates.T) > 2) & (candidates[:, 0] * side > 0)
    points = candidates[inside][:BRANCHES_PER_LUNG]
    nodes = np.concatenate([hilum[None], points[np.argsort(np.linalg.norm(points - hilum, axis=1))]])

    parent, way_back = np.zeros(len(nodes), int), np.zeros(len(nodes))
    done = 1
    while done < len(nodes):
        shell = slice(done, done + 1 + done // 8)
        distance = cdist(nodes[shell], nodes[:done])
        nearest = np.argmin(distance + 0.3 * way_back[:done], axis=1)
        parent[shell] = nearest
        way_back[shell] = way_back[nearest] + distance[np.arange(len(nearest)), nearest]
        done += len(nearest)

    twigs = [0] * len(nodes)
    for n in range(len(nodes) - 1, 0, -1):
        twigs[n] = max(twigs[n], 1)
        twigs[parent[n]] += twigs[n]
    radius = rng.uniform(1.2, 1.7) * np.array(twigs) ** 0.28
    start, end = parent[1:], np.arange(1, len(nodes))
    start_radius = np.minimum(radius[start], 1.4 * radius[end])  # a twig of a trunk starts as a twig
    return np.column_stack([nodes[start], nodes[end], start_radius, radius[end]])


def _fill_vessels(vessels: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 3] about `spacing` apart that fill the branches evenly, and the volume of each [n] (mm3)."""
    start, along = vessels[:, :3], vessels[:, 3:6] - vessels[:, :3]
    length = np.linalg.norm(along, axis=1)
    slices = np.ceil(length / spacing).astype(int)
    branch = np.repeat(np.arange(len(vessels)), slices)
    t = (_count_up(slices) + 0.5) / slices[branch]
    radius = (1 - t) * vessels[branch, 6] + t * vessels[branch, 7]

    # A slice is filled along a sunflower's spiral, in the plane of two vectors across the branch.
    count = np.ceil(np.pi * (radius / spacing) ** 2).astype(int)
    piece = np.repeat(np.arange(len(branch)), count)  # per point, like everything below
    turn = _count_up(count)
    reach = radius[piece] * np.sqrt((turn + 0.5) / count[piece])
    angle = GOLDEN_ANGLE * (turn + piece)
    across = np.cross(along, np.eye(3)[np.argmin(np.abs(along), axis=1)])
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    upwards = np.cross(along, across) / length[:, None]
    of = branch[piece]
    points = start[of] + t[piece, None] * along[of]
    points += (reach * np.cos(angle))[:, None] * across[of] + (reach * np.sin(angle))[:, None] * upwards[of]
    return points, (np.pi * radius**2 * (length / slices)[branch] / count)[piece]


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, and so on."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _rasterise(points: np.ndarray, volumes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Filled fraction of each raster cell [x, y, z]; a point is distributed over the 8 cells around it."""
    position = _to_voxels(points, shape)
    low = np.clip(np.floor(position).astype(int), 0, np.array(shape) - 2)
    upper = np.clip(position - low, 0, 1)
    share = np.zeros(np.prod(shape))
    for corner in np.ndindex(2, 2, 2):
        weight = volumes * np.where(corner, upper, 1 - upper).prod(axis=1)
        share += np.bincount(np.ravel_multi_index((low + corner).T, shape), weight, len(share))
    share /= np.prod(BOX_MM / shape)
    return np.minimum(share, 1).reshape(shape).astype(np.float32)


def _density_hu(anatomy: _Anatomy, vessel_share: np.ndarray) -> np.ndarray:
    """The chest on the raster of `vessel_share`, painted from the outside in."""
    shape = vessel_share.shape
    x, y, z = np.ix_(*_axes_mm(shape))
    edge = np.float32((BOX_MM / shape).mean())
    hu = np.full(shape, -1000, np.float32)

    def paint(value: float | np.ndarray, depth: np.ndarray) -> None:
        nonlocal hu
        hu += np.clip(depth / edge + 0.5, 0, 1) * (value - hu)

    cavity = _cavity_depth(anatomy, x, y, z)
    skin = [half_axis + anatomy.muscle + anatomy.fat for half_axis in anatomy.cavity]
    paint(-100, _ellipse_depth(x, y, skin))
    paint(50, _ellipse_depth(x, y, skin) - anatomy.fat)
    paint(-60, cavity)  # fat between the organs
    paint(45, _ellipse_depth(x, y - 10, (anatomy.mediastinum - 8, 70)))
    paint(50, _ellipsoid_depth(x, y, z, *anatomy.heart) - 3)
    below = np.minimum(_diaphragm_height(anatomy, x, y) - z, cavity)
    paint(anatomy.liver_hu, np.minimum(below, 25 - x))
    paint(30, np.minimum(below - 4, x - 32))  # stomach and spleen
    paint(-900, np.minimum(9 - np.hypot(x, y - 12), z - 32))  # trachea

    lung = anatomy.lung_hu + anatomy.lung_gradient_hu * y
    paint(lung + vessel_share * (45 - lung), _lung_depth(anatomy, x, y, z))

    height = (z - anatomy.rib_tilt * y) / anatomy.rib_pitch + anatomy.rib_phase
    across = (height - np.round(height)) * anatomy.rib_pitch
    ribs = 5 - np.sqrt((cavity + anatomy.muscle / 2) ** 2 + across**2)
    paint(450, np.minimum(ribs, np.maximum(np.abs(x) - 22, y)))  # none in front, where the sternum is
    sternum = np.minimum(np.minimum(16 - np.abs(x), 6 - np.abs(y + anatomy.cavity[1] + 8)), z + 45)
    paint(300, sternum)
    disc = np.abs(np.mod(z + 40 * anatomy.rib_phase, 26) - 13) - 10  # positive between two vertebrae
    paint(80, _spine_depth(anatomy, x, y))
    paint(350, np.minimum(_spine_depth(anatomy, x, y), -disc))
    return hu


def _draw_breath(rng: np.random.Generator, anatomy: _Anatomy) -> _Breath:
    vectors = rng.standard_normal((8, 3))
    wavelength_mm = rng.uniform(65, 150, (8, 1))
    vectors *= 2 * np.pi / (wavelength_mm * np.linalg.norm(vectors, axis=1, keepdims=True))
    breath = _Breath(
        anatomy=anatomy,
        scale=1.0,
        rise=18.0,
        middle=rng.uniform(-25, 15),
        fade=rng.uniform(65, 85),
        back=rng.uniform(0.0, 0.35),
        narrowing=(rng.uniform(1, 3), rng.uniform(2, 5)),
        waves=np.column_stack([vectors, rng.uniform(0, 2 * np.pi, 8)]).tolist(),
        amplitudes=rng.normal(0, rng.uniform(0.3, 0.6), (8, 3)).tolist(),
    )
    # Landmarks should move by 4 to 15 mm, 8.5 on average over cases, as in DIR-Lab. The motion scaled here,
    # of the whole lung, is a bit larger than that of landmarks on vessels. The scale determines which points
    # of the fixed frame lie in the lung, hence the iterations.
    wanted_mm = 4.2 + 10.8 * rng.beta(1.8, 2.6)
    points = rng.uniform(-0.5, 0.5, (4000, 3)) * BOX_MM
    for _ in range(4):
        displacement = np.stack(_displacement_mm(breath, *points.T), axis=-1)
        inside = _lung_depth(anatomy, *(points + displacement).T) > LANDMARK_DEPTH_MM
        motion_mm = np.linalg.norm(displacement[inside], axis=1).mean()
        breath = dataclasses.replace(breath, scale=float(breath.scale * wanted_mm / motion_mm))
    return breath


def _displacement_mm(
    breath: _Breath, x: np.ndarray, y: np.ndarray, z: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u at points of the fixed frame: three arrays, in mm."""
    low = 0.5 - 0.5 * np.tanh((z - breath.middle) / breath.fade)  # 1 at the feet, 0 at the head
    narrowing = breath.scale * (0.6 + 0.6 * low)
    u_x = -narrowing * breath.narrowing[0] * np.tanh(x / 80)
    u_y = narrowing * breath.narrowing[1] * (0.5 - 0.5 * np.tanh(y / 50))

    # The content of the rib cage slides along ribs and spine, up to a thin layer, but does not press into
    # them: its irregular motion sideways fades over a wider layer, because it would fold otherwise.
    anatomy = breath.anatomy
    wall = np.minimum(_cavity_depth(anatomy, x + u_x, y + u_y, z), -_spine_depth(anatomy, x, y + u_y))
    sliding = breath.scale * _smooth_step(wall / SHEAR_LAYER_MM + 0.65)
    across = breath.scale * _smooth_step(wall / (3 * SHEAR_LAYER_MM) + 0.25)
    rise = breath.rise * low * (1 + breath.back * np.tanh(y / 60)) * (1 - 0.35 * np.exp(-((x / 40) ** 2)))
    irregular: list[float | np.ndarray] = [0.0, 0.0, 0.0]
    for (*wave_vector, phase), amplitude in zip(breath.waves, breath.amplitudes, strict=True):
        wave = np.sin(wave_vector[0] * x + wave_vector[1] * y + (wave_vector[2] * z + phase))
        irregular = [total + size * wave for total, size in zip(irregular, amplitude, strict=True)]
    v_x, v_y, v_z = ((0.3 + 0.7 * low) * total for total in irregular)  # the apex is held from all sides
    return u_x + across * v_x, u_y + across * v_y, sliding * (rise + v_z)


def _smooth_step(t: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, smooth between."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _scan(raster: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """HU at voxel positions [..., 3]. The unfiltered spline acts as the scanner's blur, equal everywhere."""
    coordinates = np.moveaxis((positions + 0.5) * SUPERSAMPLING - 0.5, -1, 0)
    return ndimage.map_coordinates(raster, coordinates, order=2, mode="nearest", prefilter=False)


def _jacobian_determinant(displacement: np.ndarray) -> np.ndarray:
    """det(I + du) of a field [x, y, z, 3] in voxels, by central differences; returns [x, y, z]."""
    (a, b, c), (d, e, f), (g, h, i) = (np.gradient(displacement[..., k]) for k in range(3))
    a, e, i = a + 1, e + 1, i + 1
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _expand_lung(hu: np.ndarray, jacobian: np.ndarray) -> np.ndarray:
    """Conserves the mass of lung tissue: its density at inhale is that at exhale times det(I + du)."""
    lung = np.clip((-450 - hu) / 200, 0, 1)
    return (hu + 1000) * (1 + lung * (jacobian - 1)) - 1000


def _to_unit(hu: np.ndarray) -> np.ndarray:
    low, high = WINDOW_HU
    return np.clip((hu - low) / (high - low), 0, 1).astype(np.float32)


def _draw_landmarks(
    rng: np.random.Generator, config: PhantomConfig, breath: _Breath, vessel_share: np.ndarray
) -> list[np.ndarray]:
    """Random points in both lungs, preferably on vessels: fixed [n, 3], moving [n, 3]."""
    fixed_mm = rng.uniform(-0.5, 0.5, (2000 + 80 * config.landmarks, 3)) * BOX_MM
    moving_mm = fixed_mm + np.stack(_displacement_mm(breath, *fixed_mm.T), axis=-1)
    inside = _lung_depth(breath.anatomy, *moving_mm.T) > LANDMARK_DEPTH_MM
    fixed_mm, moving_mm = fixed_mm[inside], moving_mm[inside]
    positions = _to_voxels(moving_mm, vessel_share.shape)
    weight = 0.02 + ndimage.map_coordinates(vessel_share, positions.T, order=1, mode="nearest")
    chosen = rng.choice(len(weight), config.landmarks, replace=False, p=weight / weight.sum())
    return [_to_voxels(points[chosen], config.shape) for points in (fixed_mm, moving_mm)]


def _affine(shape: Sequence[int], spacing_mm: np.ndarray) -> np.ndarray:
    """Voxel -> RAS mm, with the centre of the grid at 0."""
    affine = np.diag([*(np.array([-1, -1, 1]) * spacing_mm), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def main() -> None:
    parser = argparse.ArgumentParser(description="Statistics of the phantom's cases.")
    parser.add_argument("--cases", type=int, default=40)
    config = PhantomConfig()
    means = []
    print("case  landmark distance (mm)  Jacobian min  max   seconds")
    for case in range(parser.parse_args().cases):
        start = time.perf_counter()
        pair = phantom_pair(config, case)
        seconds = time.perf_counter() - start
        assert pair.moving_landmarks is not None and pair.displacement is not None
        distance = np.linalg.norm((pair.moving_landmarks - pair.fixed_landmarks) * pair.spacing_mm, axis=1)
        jacobian = _jacobian_determinant(pair.displacement)
        means.append(distance.mean())
        print(
            f"{case:4d}  {distance.mean():9.2f} ({distance.std():.2f})"
            f"{jacobian.min():18.3f}{jacobian.max():7.3f}{seconds:8.2f}"
        )
    print(f"mean over cases {np.mean(means):.2f} mm, from {min(means):.2f} to {max(means):.2f}")


if __name__ == "__main__":
    main()
