"""Induces failures of the registration, and measures how well the verdict tells them from good results.

    python benchmarks/assessment.py make ROWS.jsonl [--synthetic 12] [--phantom 4] [--seed 0] [--motion 1 0.6]
        [--real PAIRS.csv] [--voxels 64] [--kinds KIND ...] [--as-registered] [--arrays FOLDER]
    python benchmarks/assessment.py fit ROWS.jsonl ... [--arrays FOLDER]
    python benchmarks/assessment.py report ROWS.jsonl ... [--json FILE]
    python benchmarks/assessment.py errors FOLDER ... [--json FILE]

`make` registers each pair well and in the ways of `KINDS`, some at two strengths, and appends a row of
evidence for each, next to the true error where it is known. Pairs are synthetic (`adregnet_jax.synthesise`,
with the shares --motion of the largest motion in turn), breathing chests (`adregnet sample`), or those of a
CSV with columns name, fixed, moving and perhaps fixed_landmarks and moving_landmarks. Real scans are reduced
to the volume of a cube of --voxels (0: not reduced); their truth is the good result. Synthetic pairs whose
images can't show the truth, because of noise, are left out. --as-registered registers as `adregnet register`
does, with the network and a smoothness that suits the pair. --arrays keeps what the error is predicted from,
with the true errors of synthetic pairs in the foreground, or of landmarks.

`fit` prints the constants of `adregnet_jax/registration/assessment/rule.py` for the rows, and with --arrays
those of the predicted error; its intervals are calibrated on pairs that are held out in turn.

`report` judges the rows by the shipped rule: the area under the ROC curve of the score for each kind against
the good ones, and how often each verdict is given. Results count as good or bad by their true error where it
is known.

`errors` compares the predicted error and other estimates with the true errors kept by `make --arrays`: rank
correlation and area of the sparsification curve within a result, and how many errors lie in the 90 %
intervals, of each place and of the scan. `--rounds` is not used.
"""

import csv
import dataclasses
import functools
import json
import time
from pathlib import Path

import comparison
import numpy as np
from scipy import ndimage, optimize, stats

from adregnet_jax.launch import process

process.keep_freed_memory()
process.use_compilation_cache()

import jax  # noqa: E402

from adregnet_jax import AffineConfig, SyntheticConfig, instance_preset, synthesise  # noqa: E402
from adregnet_jax.cli.sample import SHAPE, SPACING_MM  # noqa: E402
from adregnet_jax.config import PhantomConfig  # noqa: E402
from adregnet_jax.data.datasets.phantom import phantom_pair  # noqa: E402
from adregnet_jax.data.io.images import Image, read_image  # noqa: E402
from adregnet_jax.data.io.points import read_points  # noqa: E402
from adregnet_jax.evaluation.uncertainty import sparsify  # noqa: E402
from adregnet_jax.registration import ladder  # noqa: E402
from adregnet_jax.registration.assessment import rule, verdict  # noqa: E402
from adregnet_jax.registration.assessment.assess import gather  # noqa: E402
from adregnet_jax.registration.assessment.evidence import error_marks, predicted_error  # noqa: E402
from adregnet_jax.registration.field import DisplacementField  # noqa: E402
from adregnet_jax.registration.measure import ScanPair, measure_scans  # noqa: E402
from adregnet_jax.registration.modality import otsu_threshold  # noqa: E402
from adregnet_jax.registration.options import RegistrationOptions  # noqa: E402
from adregnet_jax.registration.scans import register_scans  # noqa: E402
from adregnet_jax.weights.packed import load_pretrained  # noqa: E402
from adregnet_jax.weights.trained_network import TrainedNetwork  # noqa: E402

SETTINGS = instance_preset("default", "any")
AFFINE = AffineConfig()
STRENGTHS = (0, 1)  # weaker and stronger


@dataclasses.dataclass
class Case:
    """Two scans, and the true displacement in voxels of the fixed grid; of real ones, of the good result."""

    name: str
    fixed: Image
    moving: Image
    truth: np.ndarray | None = None
    other: Image | None = None  # a scan of something else
    landmarks: tuple[np.ndarray, np.ndarray] | None = None  # [n, 3] each, RAS mm
    network: TrainedNetwork | None = None  # to register with
    exact: bool = False  # whether the displacement is known, not found


def synthetic_cases(count, seed, voxels, motion):
    config = SyntheticConfig(shape=(voxels,) * 3, spacing_mm=(192 / voxels,) * 3, same_contrast=1.0)
    draw = jax.jit(functools.partial(synthesise, config=config))
    keys = jax.random.split(jax.random.key(seed), count + 1)
    pairs = [draw(key, share=motion[n % len(motion)]) for n, key in enumerate(keys)]
    affine = np.diag([*config.spacing_mm, 1.0])
    for n, pair in enumerate(pairs[:count]):
        fixed, moving = (Image(np.asarray(scan), affine, "scan") for scan in (pair.fixed, pair.moving))
        other = Image(np.asarray(pairs[n + 1].moving), affine, "other")
        yield Case(f"synthetic{seed}-{n}", fixed, moving, np.asarray(pair.displacement), other, exact=True)


def phantom_cases(count, seed):
    config = PhantomConfig(shape=SHAPE, spacing_mm=SPACING_MM, seed=seed)
    pairs = [phantom_pair(config, n) for n in range(count + 1)]
    for n, pair in enumerate(pairs[:count]):
        fixed, moving, other = (
            Image(scan, pair.affine, "scan") for scan in (pair.fixed, pair.moving, pairs[n + 1].moving)
        )
        yield Case(f"phantom{seed}-{n}", fixed, moving, pair.displacement, other, exact=True)


def real_cases(path, voxels):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for n, row in enumerate(rows):
        other = rows[(n + len(rows) // 2) % len(rows)]
        fixed, moving, other = (
            reduced(read_image(path.parent / name), voxels)
            for name in (row["fixed"], row["moving"], other["moving"])
        )
        affine = np.diag([*moving.spacing_mm, 1.0])  # the other scan, centred on the moving one
        centre = moving.affine @ [*((n - 1) / 2 for n in moving.shape), 1]
        affine = moving.affine.copy()
        affine[:3, :3] *= (other.spacing_mm / moving.spacing_mm)[None]
        affine[:3, 3] = centre[:3] - affine[:3, :3] @ [(n - 1) / 2 for n in other.shape]
        other = dataclasses.replace(other, affine=affine)
        points = [row.get(f"{scan}_landmarks") for scan in ("fixed", "moving")]
        landmarks = None
        if all(points):
            landmarks = (read_points(path.parent / points[0]), read_points(path.parent / points[1]))
        yield Case(row["name"], fixed, moving, None, other, landmarks)


def reduced(image, voxels):
    """A scan on voxels of equal size, as many as in a cube; never finer than it was."""
    if not voxels:
        return image
    extent = image.spacing_mm * image.shape
    wanted = np.prod(extent) ** (1 / 3) / voxels
    factor = np.maximum(1, wanted / image.spacing_mm)
    values = ndimage.gaussian_filter(
        image.values.astype(np.float32), np.maximum(factor - 1, 0) / 2, mode="nearest"
    )
    shape = tuple(np.maximum(1, np.floor(np.array(image.shape) / factor)).astype(int).tolist())
    values = ndimage.affine_transform(values, factor, (factor - 1) / 2, shape, order=1, mode="nearest")
    affine = image.affine.copy()
    affine[:3, 3] = affine[:3, 3] + affine[:3, :3] @ ((factor - 1) / 2)
    affine[:3, :3] = affine[:3, :3] * factor[None]
    return Image(values, affine, image.name)


def registered(case, *, moving=None, fixed=None, affine=AFFINE, instance=SETTINGS, modality="auto"):
    network = case.network if instance is SETTINGS else None
    return register_scans(
        fixed or case.fixed,
        moving or case.moving,
        affine=affine,
        instance=RegistrationOptions().instance_config if network else instance,
        network=network,
        modality=modality,
        adaptive=network is not None,
    )


def with_values(image, values):
    return dataclasses.replace(image, values=np.ascontiguousarray(values))


def done_well(case, strength, random):
    return registered(case)


def true_field(case, strength, random):
    """The truth, with a smooth error of half a voxel if `strength` is 1."""
    if case.truth is None:
        return None
    start = registered(
        case, affine=None, instance=dataclasses.replace(SETTINGS, steps=(0, 0), search_range_mm=0.0)
    )
    noise = ndimage.gaussian_filter(random.normal(size=case.truth.shape), (4, 4, 4, 0))
    return with_field(start, case.truth + 0.3 * strength * noise / noise.std())


def other_scan(case, strength, random):
    return registered(case, moving=case.other)


def flipped(case, strength, random):
    return registered(case, moving=with_values(case.moving, case.moving.values[::-1]))


def slices_reversed(case, strength, random):
    return registered(case, moving=with_values(case.moving, case.moving.values[..., ::-1]))


def far_off(case, strength, random):
    share = (0.12, 0.21)[strength]  # of the scan's edge: 40 mm of a head
    angle = np.deg2rad((35, 60)[strength])
    centre = (case.moving.affine @ [*((n - 1) / 2 for n in case.moving.shape), 1])[:3]
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    extent = float(np.prod(case.moving.spacing_mm * case.moving.shape)) ** (1 / 3)
    turn[:3, 3] = centre - turn[:3, :3] @ centre + share * extent / np.sqrt(3) * random.choice([-1, 1], 3)
    return registered(
        case, moving=dataclasses.replace(case.moving, affine=turn @ case.moving.affine), affine=None
    )


def half_seen(case, strength, random):
    values = case.moving.values
    axis = int(np.argmax(values.shape))
    keep = int(values.shape[axis] * (0.6, 0.45)[strength])
    index = [slice(None)] * 3
    index[axis] = slice(0, keep)
    return registered(case, moving=with_values(case.moving, values[tuple(index)]))


def inverted(case, strength, random):
    values = case.moving.values
    return registered(case, moving=with_values(case.moving, values.max() - values), modality="mono")


def noisy(case, strength, random):
    def noise(image):
        sd = (1.0, 2.0)[strength] * image.values.std()
        return with_values(image, (image.values + random.normal(0, sd, image.shape)).astype(np.float32))

    return registered(case, fixed=noise(case.fixed), moving=noise(case.moving))


def block(case, strength, random):
    values = case.moving.values.copy()
    share = (0.5, 0.7)[strength]
    index = tuple(slice(int(n * (0.5 - share / 2)), int(n * (0.5 + share / 2))) for n in values.shape)
    values[index] = values[index].mean()
    return registered(case, moving=with_values(case.moving, values))


def wrong_spacing(case, strength, random):
    affine = case.moving.affine.copy()
    scale = np.ones(3)
    scale[[2] if strength == 0 else [0, 1, 2]] = 2
    centre = [(n - 1) / 2 for n in case.moving.shape]
    place = affine[:3, :3] @ centre + affine[:3, 3]
    affine[:3, :3] = affine[:3, :3] * scale[None]
    affine[:3, 3] = place - affine[:3, :3] @ centre
    return registered(case, moving=dataclasses.replace(case.moving, affine=affine))


def folded(case, strength, random):
    good = registered(case)
    noise = ndimage.gaussian_filter(random.normal(size=(*case.fixed.shape, 3)), (2, 2, 2, 0))
    field = good.field.displacement + (2.5, 5.0)[strength] * noise / noise.std()
    return with_field(good, field)


def affine_alone(case, strength, random):
    return registered(case, instance=None)


def stopped(case, strength, random):
    early = dataclasses.replace(SETTINGS, steps=(5, 0) if strength == 0 else (2, 0), search_range_mm=0.0)
    return registered(case, instance=early)


def with_field(good, displacement):
    field = DisplacementField(displacement.astype(np.float32), good.field.affine)
    values = good.scans.moving.values.astype(np.float32)
    low = values.min()
    warped = ladder.warp_image(field, values - low, good.scans.moving.affine) + low
    return dataclasses.replace(good, field=field, warped=dataclasses.replace(good.warped, values=warped))


KINDS = {
    "truth": true_field,
    "good": done_well,
    "other scan": other_scan,
    "flipped": flipped,
    "far off": far_off,
    "half seen": half_seen,
    "inverted": inverted,
    "noise": noisy,
    "constant block": block,
    "wrong spacing": wrong_spacing,
    "slices reversed": slices_reversed,
    "folds": folded,
    "affine alone": affine_alone,
    "stopped": stopped,
}
ONE_STRENGTH = ("good", "other scan", "flipped", "inverted", "slices reversed", "affine alone")
# Those whose moving scan is the pair's, somewhere else in the world perhaps.
KNOWN = (
    "truth",
    "good",
    "noise",
    "folds",
    "affine alone",
    "stopped",
    "constant block",
    "far off",
    "half seen",
    "wrong spacing",
)


def make(options):
    cases = (
        list(synthetic_cases(options.synthetic, options.seed, options.voxels, options.motion))
        if options.synthetic
        else []
    )
    if options.phantom:
        cases += phantom_cases(options.phantom, options.seed)
    if options.real:
        cases += real_cases(options.real, options.voxels)
    network = load_pretrained(None) if options.as_registered else None
    if options.arrays:
        options.arrays.mkdir(parents=True, exist_ok=True)
    with options.rows[0].open("a") as file:
        for case in cases:
            case.network = network
            shown = True
            for kind in options.kinds or KINDS:
                if not shown:
                    break
                for strength in STRENGTHS[: 1 if kind in ONE_STRENGTH else None]:
                    began = time.perf_counter()
                    row = row_of(case, kind, strength, options.arrays)
                    if row is None:
                        continue
                    held = row["numbers"].get("held_fine", 0)
                    if kind == "truth" and strength == 0 and held < LEAST_HELD:
                        shown = False
                        break
                    row["seconds"] = round(time.perf_counter() - began, 1)
                    file.write(json.dumps(row) + "\n")
                    file.flush()


def row_of(case, kind, strength, arrays):
    random = np.random.default_rng(strength)
    result = KINDS[kind](case, strength, random)
    if result is None:
        return None
    measurement = measure_scans(result.scans, result.field, result.warped, modality=result.modality)
    evidence = gather(result.scans, result.field, measurement, modality=result.modality)
    row = {"case": case.name, "kind": kind, "strength": strength, "modality": result.modality}
    row["numbers"] = evidence.numbers
    if kind == "good" and case.truth is None:
        case.truth = measurement.displacement  # of a real pair, as near to the truth as one comes
    elif case.truth is not None and kind in KNOWN:
        grid = np.moveaxis(np.indices(case.fixed.shape), 0, -1)
        moved = result.scans.moving.affine @ np.linalg.inv(case.moving.affine)
        move = np.linalg.inv(case.fixed.affine) @ moved @ case.fixed.affine
        truth = (grid + case.truth) @ move[:3, :3].T + move[:3, 3] - grid
        error = np.linalg.norm((measurement.displacement - truth) * case.fixed.spacing_mm, axis=-1)
        inside = case.fixed.values > otsu_threshold(case.fixed.values) / 2
        row |= {
            "error_mm": float(error[inside].mean()),
            "before_mm": float(np.linalg.norm(case.truth * case.fixed.spacing_mm, axis=-1)[inside].mean()),
        }
        if arrays and case.exact:
            save_places(arrays / f"{case.name}-{kind}-{strength}.npz", evidence, result, error)
    if arrays and case.landmarks:
        save_landmarks(arrays / f"{case.name}-{kind}-{strength}.npz", evidence, result, case.landmarks)
    return row


def estimates_of(evidence, result):
    """What the error of each block can be estimated from, by name [i, j, k]; more is worse."""
    fine = evidence.levels[0]
    blocks = fine.blocks
    estimates = error_marks(evidence) | {
        "residual": np.linalg.norm(blocks.residual, axis=-1),
        "flatness": -blocks.curvature,
        "no texture": -blocks.texture,
        "unlikeness": -blocks.correlation,
    }
    if "network" in result.stages:
        moved = np.asarray(result.field.displacement) - np.asarray(result.stage_field("network").displacement)
        moved_mm = np.linalg.norm(moved * result.scans.fixed.spacing_mm, axis=-1)
        estimates["change since the network"] = of_cells(moved_mm, fine)
    return estimates


def of_cells(values, level):
    """[x, y, z] averaged over the cells of a level."""
    shape = level.weights.shape
    missing = [(0, n * c - size) for n, c, size in zip(shape, level.cell_voxels, values.shape, strict=True)]
    padded = np.pad(values, missing, mode="edge")
    split = [size for n, c in zip(shape, level.cell_voxels, strict=True) for size in (n, c)]
    return padded.reshape(split).mean(axis=(1, 3, 5))


def save_places(path, evidence, result, error_mm):
    """Of cells in the foreground: the estimates, the mean true error, and that of one voxel, in voxels."""
    fine = evidence.levels[0]
    random = np.random.default_rng(0)
    voxels = [
        np.minimum(np.arange(n) * c + random.integers(0, c, n), size - 1)
        for n, c, size in zip(fine.weights.shape, fine.cell_voxels, error_mm.shape, strict=True)
    ]
    inside = evidence.foreground > 0.5
    np.savez_compressed(
        path,
        error=of_cells(error_mm, fine)[inside] / fine.voxel_mm,
        point=error_mm[np.ix_(*voxels)][inside] / fine.voxel_mm,
        voxel_mm=fine.voxel_mm,
        **{name: values[inside] for name, values in estimates_of(evidence, result).items()},
    )


def save_landmarks(path, evidence, result, landmarks):
    """Of landmarks: the estimates there, and the distance by which they are missed, in voxels."""
    fine, scans = evidence.levels[0], result.scans
    scored = ScanPair(scans.fixed, scans.moving, fixed_landmarks=landmarks[0], moving_landmarks=landmarks[1])
    mapped = measure_scans(scored, result.field, result.warped, modality=result.modality).mapped_landmarks
    error = np.linalg.norm(mapped - landmarks[1], axis=-1) / fine.voxel_mm
    voxels = np.c_[landmarks[0], np.ones(len(error))] @ np.linalg.inv(scans.fixed.affine)[:3].T
    cells = (voxels + 0.5) / fine.cell_voxels - 0.5
    inside = evidence.foreground > 0.5
    np.savez_compressed(
        path,
        error=error,
        point=error,
        voxel_mm=fine.voxel_mm,
        **{f"scan's {name}": values[inside] for name, values in error_marks(evidence).items()},
        **{
            name: ndimage.map_coordinates(values, cells.T, order=1, mode="nearest")
            for name, values in estimates_of(evidence, result).items()
        },
    )


GOOD_VOXELS, BAD_VOXELS = 1.2, 1.7  # mean error, in voxels of the fine level, of good and bad results
LEAST_HELD = 0.6  # share of blocks that the truth itself must hold; else the images of a pair can't show it
# Of each mark the value from which on it counts, which anatomy and its change alone explain, and one that no
# good result has, where it takes two thirds off the score. Weights are fitted around these.
TOLERATED = {
    "residual": (1.3, 2.6),
    "unlike": (0.1, 0.6),
    "worse": (0.02, 0.12),
    "opposite": (0.05, 0.4),
    "disjoint": (0.2, 0.6),
    "departed": (0.03, 0.2),
    "outside": (0.15, 0.4),
    "bend": (0.5, 0.9),
    "folds": (0.002, 0.02),
    "scale": (0.35, 0.7),
    "stretch": (0.25, 0.5),
}
NEARLY_RIGHT = ("good", "stopped", "affine alone")  # kinds whose errors the blocks can see
LEAST_ERROR = 0.05  # voxels, added to errors before their logarithms are taken
RIDGE = 0.02  # of the logarithms of the weights


def is_good(row):
    """Whether a result is good by what is known of it; None if it is neither good nor bad."""
    if row["kind"] in ("good", "truth"):
        return row.get("error_mm", 0) < GOOD_VOXELS * row["voxel_mm"] or None
    if row["kind"] == "half seen" or "error_mm" not in row:
        return False
    return False if row["error_mm"] > BAD_VOXELS * row["voxel_mm"] else None


def read_rows(paths):
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    for row in rows:
        row["voxel_mm"] = (row["numbers"] or {}).get("voxel_mm", 1.0)
        row["judged"] = "score" in judge_row(row)
    hidden = {
        row["case"]
        for row in rows
        if row["kind"] == "truth" and row["judged"] and row["numbers"]["held_fine"] < LEAST_HELD
    }
    return [row for row in rows if row["judged"] and row["case"] not in hidden]


def judge_row(row):
    if not row["numbers"] or "held_fine" not in row["numbers"]:
        return {}
    found = verdict.judge(row["numbers"])
    return {"score": found.score, "verdict": found.verdict}


def fit(options):
    """Prints the thresholds and weights of the marks, fitted to the rows."""
    rows = read_rows(options.rows)
    rows = [row for row in rows if is_good(row) is not None]
    good = np.array([is_good(row) for row in rows])
    values = np.array([[mark.value(row["numbers"]) for mark in verdict.MARKS.values()] for row in rows])
    thresholds, limits = np.array([TOLERATED[name] for name in verdict.MARKS]).T
    beyond = np.maximum(0, values - thresholds)
    scale = limits - thresholds
    kinds = np.array([row["kind"] for row in rows])
    share = np.where(good, 0.5 / good.sum(), 0.0)
    bad_kinds = sorted(set(kinds[~good]))
    for kind in bad_kinds:
        share[(kinds == kind) & ~good] = 0.5 / len(bad_kinds) / ((kinds == kind) & ~good).sum()

    def loss(logarithms):
        weights = np.exp(logarithms)
        penalty = beyond / scale @ weights
        probability = np.clip(np.exp(-penalty), 1e-6, 1 - 1e-6)
        missed = np.where(good, -np.log(probability), -np.log1p(-probability))
        return (share * missed).sum() + RIDGE * (logarithms**2).sum()

    best = optimize.minimize(loss, np.zeros(len(scale)), method="L-BFGS-B", bounds=[(-2, 2)] * len(scale))
    weights = np.exp(best.x) / scale
    for name, threshold, weight in zip(verdict.MARKS, thresholds, weights, strict=True):
        print(f'    "{name}": ({threshold:.3g}, {weight:.3g}),')
    scores = np.exp(-beyond @ weights)
    print(
        f"good: {good.sum()} of {len(good)}; score quantiles 1, 2, 5, 10 %:",
        np.quantile(scores[good], (0.01, 0.02, 0.05, 0.1)).round(3),
    )
    print(
        "bad: score quantiles 50, 75, 90, 95 %:", np.quantile(scores[~good], (0.5, 0.75, 0.9, 0.95)).round(3)
    )
    if options.arrays:
        fit_error(options.arrays)


def read_places(folders):
    """What `make --arrays` kept of results that are nearly right: (case, kind, arrays) of each."""
    paths = [path for folder in folders for path in sorted(folder.glob("*.npz"))]
    split = [(*path.stem.rsplit("-", 2)[:2], dict(np.load(path))) for path in paths]
    return [found for found in split if found[1] in NEARLY_RIGHT]


def fit_error(folder):
    """Prints how errors are predicted, and intervals calibrated on pairs that are held out in turn."""
    results = read_places([folder])
    cases = sorted({case for case, *_ in results})
    powers, scale = fit_powers([places for *_, places in results])
    print("ERROR =", {name: round(power, 3) for name, power in zip(rule.ERROR, powers, strict=True)})
    print(f"ERROR_SCALE = {scale:.3g}")
    of_places, of_scans = [], []
    for held_out in cases:
        fitted = fit_powers([places for case, _, places in results if case != held_out])
        for places in (places for case, _, places in results if case == held_out):
            error = product(places, *fitted)
            point = np.maximum(places["point"], 1e-3)
            of_places.append(np.log(point / error))
            of_scans.append(np.log(point / error.mean()))
    for name, ratios in (("PLACES_90", of_places), ("SCAN_90", of_scans)):
        low, high = conformal(ratios)
        print(f"{name} = ({low:.3g}, {high:.3g})")
    print(f"# {len(cases)} pairs, {len(results)} results")


def fit_powers(results):
    """The powers of the marks, none negative, and the scale that is right for a scan on the average."""
    rows, targets = [], []
    for places in results:
        marks = [np.log(places[name] + rule.ERROR_FLOOR) for name in rule.ERROR]
        weight = len(marks[0]) ** -0.5  # each result counts alike
        rows.append(weight * np.stack([*marks, np.ones_like(marks[0])], axis=1))
        targets.append(weight * np.log(places["error"] + LEAST_ERROR))
    bounds = ([*np.zeros(len(rule.ERROR)), -np.inf], np.inf)
    powers = optimize.lsq_linear(np.concatenate(rows), np.concatenate(targets), bounds).x[:-1]
    missed = [np.log(places["error"].mean() / product(places, powers, 1.0).mean()) for places in results]
    return powers, float(np.exp(np.mean(missed)))


def product(places, powers, scale):
    """The predicted error for other powers than the shipped ones."""
    logarithm = sum(
        power * np.log(places[name] + rule.ERROR_FLOOR)
        for name, power in zip(rule.ERROR, powers, strict=True)
    )
    return scale * np.exp(logarithm)


def conformal(ratios):
    """The interval that holds 90 % of these ratios, given as logarithms by result; each result counts alike.

    Its shape is that of their quantiles. This is split conformal prediction for groups without its allowance
    for the number of pairs, which with 18 of them would hold 95 %.
    """

    def quantiles(values, levels):
        values = np.concatenate(values)
        order = np.argsort(values)
        reached = np.searchsorted(np.cumsum(weights[order]), levels)
        return values[order][np.minimum(reached, len(order) - 1)]

    weights = np.concatenate([np.full(len(ratio), 1 / len(ratio) / len(ratios)) for ratio in ratios])
    low, middle, high = quantiles(ratios, [0.05, 0.5, 0.95])
    scores = [
        np.maximum((middle - ratio) / (middle - low), (ratio - middle) / (high - middle)) for ratio in ratios
    ]
    (width,) = quantiles(scores, [0.9])
    return np.exp(middle - width * (middle - low)), np.exp(middle + width * (high - middle))


def errors(options):
    """Prints how estimates of the error compare with the true one."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for case, kind, places in read_places(options.rows):
        if len(places["error"]) >= FEWEST_PLACES:
            groups.setdefault((case.rstrip("0123456789").rstrip("-0123456789"), kind), []).append(places)
    table = []
    for (source, kind), results in groups.items():
        names = [n for n in results[0] if n not in ("error", "point", "voxel_mm") and "scan's" not in n]
        for places in results:
            places["predicted error"] = predicted_error(places)
            scan = {name: places.get(f"scan's {name}", places[name]) for name in rule.ERROR}
            places["mean"] = predicted_error(scan).mean()
        for name in ["predicted error", *names]:
            known = [places for places in results if name in places]
            rho = [rank_correlation(places[name], places["error"]) for places in known]
            area = [sparsify(places[name], places["error"]).area for places in known]
            row = {"pairs": source, "result": kind, "estimate": name, "results": len(known)}
            row |= {"Spearman": f"{np.mean(rho):.2f} ({min(rho):.2f} to {max(rho):.2f})"}
            row |= {"AUSE": f"{np.mean(area):.3f}"}
            table.append(row | intervals(known if name == "predicted error" else []))
    comparison.report(table, options.json)


FEWEST_PLACES = 50


def rank_correlation(estimate, error):
    """Spearman's; 0 for an estimate that doesn't vary."""
    return float(stats.spearmanr(estimate, error).statistic) if np.ptp(estimate) else 0.0


def intervals(results):
    """Predicted and true error, and shares of the places in their intervals; empty without results."""
    if not results:
        return dict.fromkeys(("predicted, mm", "true, mm", "in place's 90 %", "in scan's 90 %"))

    def held(places, predicted, interval):
        ratio = places["point"] / predicted
        return np.mean((interval[0] <= ratio) & (ratio <= interval[1]))

    by_place = np.mean([held(p, p["predicted error"], rule.PLACES_90) for p in results])
    by_scan = np.mean([held(p, p["mean"], rule.SCAN_90) for p in results])
    predicted, true = (
        np.mean([p[name].mean() * p["voxel_mm"] for p in results]) for name in ("predicted error", "error")
    )
    return {
        "predicted, mm": f"{predicted:.2f}",
        "true, mm": f"{true:.2f}",
        "in place's 90 %": f"{100 * by_place:.0f}",
        "in scan's 90 %": f"{100 * by_scan:.0f}",
    }


def auc(good, bad):
    """Area under the ROC curve: how often a good score is above a bad one."""
    good, bad = np.asarray(good)[:, None], np.asarray(bad)[None]
    return float(np.mean((good > bad) + 0.5 * (good == bad)))


def report(options):
    rows = [row | judge_row(row) for row in read_rows(options.rows)]
    good = [row["score"] for row in rows if is_good(row)]
    table = []
    for kind in ["all good", *KINDS]:
        chosen = [
            row
            for row in rows
            if (is_good(row) if kind == "all good" else row["kind"] == kind and is_good(row) is False)
        ]
        if not chosen:
            continue
        verdicts = [row["verdict"] for row in chosen]
        table.append(
            {"kind": kind, "results": len(chosen)}
            | {name: f"{100 * verdicts.count(name) / len(verdicts):.0f} %" for name in verdict.VERDICTS}
            | {"AUC": None if kind == "all good" else round(auc(good, [row["score"] for row in chosen]), 3)}
        )
    comparison.report(table, options.json)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("what", choices=("make", "fit", "report", "errors"))
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--synthetic", type=int, default=0)
    parser.add_argument("--phantom", type=int, default=0)
    parser.add_argument("--motion", type=float, nargs="+", default=[1.0])
    parser.add_argument("--as-registered", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--voxels", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--arrays", type=Path)
    options = parser.parse_args()
    {"make": make, "fit": fit, "report": report, "errors": errors}[options.what](options)


if __name__ == "__main__":
    main()
