"""A trained network on the test split: metrics of each case, tables, figures.

What `evaluate` leaves in `workdir/eval`, or `workdir/eval_instance` with instance optimisation:

    cases.csv      one row a case, all metrics at full precision (`case_metrics` names them)
    landmarks.csv  every landmark's distance before and after, the entropy of its match, and with Monte-Carlo
                   dropout the SD of its displacement
    summary.json   mean and SD over the cases
    tables.md      the printed tables; tables.tex the same for LaTeX
    report.html    tables, box plots, histograms and overlays on one page
    table_3.*      for IXI: Dice as it is published, and ixi_*.csv with each subject's labels
    figures/       the first cases in three planes and level by level, and the training curves
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from scipy import stats

from adregnet_jax import metrics, provenance
from adregnet_jax.atomic import write_file
from adregnet_jax.config import Config, DataConfig
from adregnet_jax.data.datasets import ixi
from adregnet_jax.data.pair import Pair
from adregnet_jax.data.splits import LazyPairs, load_splits
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import baselines
from adregnet_jax.evaluation import ixi_dice as ixi_scores
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.convolution import check_implementation
from adregnet_jax.ops.jacobian import jacobian_determinant
from adregnet_jax.ops.sampling import warp, warp_labels
from adregnet_jax.registration.network import dropout_sd_mm, register
from adregnet_jax.report import figures as draw
from adregnet_jax.report import page as html
from adregnet_jax.report import tables
from adregnet_jax.training.checkpoint import check_architecture, restore_parameters
from adregnet_jax.training.record import check_splits, describe_origin

# Column of landmarks.csv, its name and unit, and the figure that tells what it is worth.
UNCERTAINTIES = (
    ("match_entropy", "entropy of the match, nats", "calibration_of_the_uncertainty"),
    ("dropout_sd_mm", "SD by dropout, mm", "calibration_of_the_dropout_uncertainty"),
)
SUMMARY = ("tre_before_mm", "tre_mm", "tre_snapped_mm", "folded_percent", "dice_before", "dice")
SUMMARY_AFFINE = ("tre_affine_mm", "dice_affine", "ncc_affine")  # where it was asked for
# How the labels of each score were warped, for Table III; the first two fold nothing.
WARPINGS = (
    ("dice_before", "before"),
    ("dice_affine", "affine"),
    ("dice", "nearest"),
    ("dice_onehot", "one-hot trilinear"),
)


_warp_nearest = jax.jit(functools.partial(warp, mode="nearest"))
_warp_labels = jax.jit(warp_labels)
_determinant = jax.jit(jacobian_determinant)


class Registered(NamedTuple):
    """What the network made of one pair, as NumPy arrays without the batch axis."""

    displacement: np.ndarray  # [x, y, z, 3] voxels
    warped: np.ndarray  # [x, y, z]
    pyramid: tuple[np.ndarray, ...]  # [x_l, y_l, z_l, 3] voxels of the level, coarse to fine
    match_entropy: tuple[np.ndarray, ...]  # [x_l, y_l, z_l] nats, coarse to fine
    seconds: float  # of the network, without compilation
    dropout_sd_mm: np.ndarray | None = None  # [x, y, z], of the network's displacement


class Measured(NamedTuple):
    """What was measured on the test split."""

    rows: list[tables.Row]  # a case each
    landmarks: list[tables.Row]
    scores: list[dict[str, dict[int, float]]]  # of each case, as `label_scores` returns them
    pictures: list[str]  # HTML
    determinants: dict[str, np.ndarray]  # [n], of the cases that are drawn


class Part(NamedTuple):
    """A table of the printed text and of the report."""

    name: str
    lines: list[tables.Row]
    columns: Sequence[tables.Column]


def evaluate(
    config: Config,
    workdir: Path,
    *,
    figures: int = 3,
    instance: bool = False,
    mc_dropout: int = 0,
    affine: bool = False,
) -> Path:
    """Registers the test split with the best checkpoint of a run, prints the tables and writes everything.

    Args:
        config: as the network was trained with.
        workdir: of the training run.
        figures: how many cases are drawn, from the first on.
        instance: the network's displacement is refined on each test pair, by its images alone
            (`adregnet_jax.registration.instance`): another protocol, with tables of its own.
        mc_dropout: how many networks are drawn by dropout, for the SD of the network's displacement as a
            second uncertainty; 0: none.
        affine: what an affine alignment of each pair by its images comes to, beside before and after. Not
            always, since compiling it takes longer than a small test split.

    Returns:
        The folder that was written.

    Raises:
        UserError: no checkpoint, an empty test split or another one than that of the run, a field that is not
            finite, a folder that can't be written, or dropout samples of a network without dropout or fewer
            than 2 of them.
    """
    check_options(config, workdir, instance=instance, mc_dropout=mc_dropout, affine=affine)
    check_implementation(config.model.convolution)
    splits = load_splits(config.data)
    check_splits(workdir, config.data.kind, splits)
    pairs = splits.test
    if not pairs:
        raise UserError(
            f"no pair to test on: expected at least one in the test split of {config.data.kind} data"
        )
    model = make_model(config.model)
    params, step = restore_parameters(workdir, _abstract_parameters(model, pairs[0]), which="best")
    network = _timed(model, params, config, instance=instance, mc_dropout=mc_dropout)
    folder = workdir / ("eval_instance" if instance else "eval")
    found = _measure(pairs, network, folder, config, figures=figures, affine=affine)

    method = "network, then instance optimisation" if instance else "network alone"
    protocol = describe_protocol(found.rows, config.data, method=method, step=step)
    origin = describe_origin(config.init_from, {maker.fixed for maker in pairs.makers})
    protocol += f"{origin.strip()}\n" if origin else ""
    protocol += "".join(f"{text}\n" for text in rank_correlations(found.landmarks))
    parts = _write_tables(folder, found, config.data, protocol)
    _write_report(folder, workdir, found, parts, protocol=protocol, kind=config.data.kind)
    print(protocol)
    for _, lines, columns in parts:
        print(tables.to_text(lines, columns))
    print(f"Written to {folder}, with figures of {min(figures, len(pairs))} of {len(pairs)} cases.")
    return folder


def _measure(
    pairs: LazyPairs,
    network: Callable[[Pair], Registered],
    folder: Path,
    config: Config,
    *,
    figures: int,
    affine: bool,
) -> Measured:
    """Registers and measures all pairs, and draws the first ones of them."""
    found = Measured([], [], [], [], {})
    console = Console(stderr=True)
    for index, pair in enumerate(track(pairs, "registering", console=console, transient=True)):
        registered = network(pair)
        scores = label_scores(pair, registered.displacement)
        row = case_metrics(pair, registered.displacement, registered.warped)
        if affine:
            aligned = baselines.affine_scores(pair, config.affine)
            row |= aligned.row
            scores["dice_affine"] = aligned.dice
        row |= mean_dice(scores, _published_labels(config.data))
        found.scores.append(scores)
        maker = pairs.makers[index]
        subjects = {"fixed": maker.fixed, "moving": maker.moving}
        found.rows.append(row | {"seconds": registered.seconds} | subjects)
        found.landmarks.extend(
            landmark_rows(pair, registered.displacement, registered.match_entropy, registered.dropout_sd_mm)
        )
        if index < figures:
            determinant = _jacobian(registered.displacement)
            found.determinants[pair.name] = determinant[... if pair.mask is None else pair.mask].ravel()
            for name, figure in case_figures(pair, registered, determinant, title=_title(row)).items():
                png = write_figure(folder / "figures" / f"{_file_name(index, pair)}{name}.png", figure)
                found.pictures.append(html.picture(png, _title(row)))
    return found


def _write_tables(folder: Path, found: Measured, data: DataConfig, protocol: str) -> list[Part]:
    """Writes everything but the report and its figures; returns the tables to print."""
    write_file(folder / "cases.csv", tables.to_csv(found.rows))
    if found.landmarks:
        write_file(folder / "landmarks.csv", tables.to_csv(found.landmarks))
    record = summary(found.rows) | {"origin": provenance.origin()}
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_file(folder / "summary.json", text)
    lines = tables.with_mean_and_sd(found.rows)
    parts = [
        Part("Alignment", lines, tables.ALIGNMENT),
        Part("Similarity and deformation", lines, tables.SIMILARITY),
    ]
    comment = "".join(f"% {line}\n" for line in protocol.splitlines())
    for suffix, above, render in (
        ("md", f"{protocol}\n", tables.to_markdown),
        ("tex", comment, tables.to_latex),
    ):
        text = above + "\n".join(render(part.lines, part.columns) for part in parts)
        write_file(folder / f"tables.{suffix}", text)
    if data.kind == "ixi" and data.ixi.mode == "atlas":  # what the published rows are of
        table_3 = write_ixi(folder, found.rows, found.scores)
        parts.append(Part("Dice as published", table_3, ixi_scores.TABLE_3))
    return parts


def _write_report(
    folder: Path, workdir: Path, found: Measured, parts: Sequence[Part], *, protocol: str, kind: str
) -> None:
    """Draws the figures over the cases and puts everything on one page."""
    sections = [html.Section(name, tables.to_html(lines, columns)) for name, lines, columns in parts]
    for name, figure in summary_figures(found.landmarks, found.determinants).items():
        png = write_figure(folder / "figures" / f"{name}.png", figure)
        sections.append(html.Section(name.replace("_", " ").capitalize(), html.picture(png, "")))
    if records := _logged(workdir / "metrics.jsonl"):
        png = write_figure(folder / "figures" / "training.png", draw.training_figure(records))
        sections.append(html.Section("Training", html.picture(png, "metrics over the steps")))
    sections.append(html.Section("Cases", "\n".join(found.pictures)))
    page = html.page(f"Registration of {kind} data", protocol, sections)
    write_file(folder / "report.html", page)


def _published_labels(data: DataConfig) -> tuple[int, ...] | None:
    """The labels that published scores are of; None: all that there are. T1 to T2 has none."""
    return ixi.SCORED_LABELS if data.kind == "ixi" and data.ixi.mode != "t1t2" else None


def check_options(config: Config, workdir: Path, *, instance: bool, mc_dropout: int, affine: bool) -> None:
    """Raises UserError for options that the config or the run can't serve."""
    if affine:
        config.affine.check()
    if instance:
        config.instance.check()
    if not mc_dropout:
        return
    if mc_dropout < 2:
        raise UserError(f"--mc-dropout is {mc_dropout}: an SD takes 2 samples or more, for instance 20")
    if not config.model.dropout:
        raise UserError(
            "--mc-dropout draws networks by dropout, and model.dropout is 0: train with a rate above 0, for"
            " instance --config.model.dropout=0.1"
        )
    check_architecture(workdir, config.model)  # a rate that the network was not trained with says nothing


def case_metrics(pair: Pair, displacement: np.ndarray, warped: np.ndarray) -> tables.Row:
    """Everything measured on one registered pair, before ("_before") and after; None where it can't be.

    TRE is `|p + u(p) - q|` of fixed landmarks p and moving landmarks q, in mm: mean and sample SD over the
    landmarks; snapped: with the mapped point rounded to a voxel of the native scan first. NCC, MSE, global
    SSIM and the Jacobian leave out padding.

    Args:
        pair: the scans and what is known about them.
        displacement: [x, y, z, 3] in voxels.
        warped: [x, y, z], the moving scan pulled back by it.
    """
    row: tables.Row = {"name": pair.name}
    row |= _landmark_metrics(pair, displacement)
    for name, measure in (("ncc", metrics.ncc), ("mse", metrics.mse), ("ssim", metrics.ssim)):
        row[f"{name}_before"] = tables.finite(measure(pair.fixed, pair.moving, mask=pair.mask))
        row[name] = tables.finite(measure(pair.fixed, warped, mask=pair.mask))
    jacobian = metrics.jacobian_statistics(displacement, mask=pair.mask)
    row |= {
        "jacobian_mean": tables.finite(jacobian["mean"]),
        "jacobian_sd": tables.finite(jacobian["sd"]),
        "jacobian_min": tables.finite(jacobian["minimum"]),
        "folded_percent": tables.finite(jacobian["folded_percent"]),
        "folded_volume_percent": tables.finite(metrics.folded_volume_percent(displacement, pair.mask)),
        "sd_log_jacobian": None,
    }
    with contextlib.suppress(ValueError):  # too few voxels
        row["sd_log_jacobian"] = tables.finite(metrics.sd_log_jacobian(displacement, pair.mask))
    return row


def label_scores(pair: Pair, displacement: np.ndarray) -> dict[str, dict[int, float]]:
    """Dice by label of every label that either scan has, background aside; empty without labels.

    Returns:
        `dice_before`; `dice`, the moving labels warped by nearest neighbour; `dice_onehot`, warped as one
        trilinear image a label, of which the largest wins.
    """
    fixed, moving = pair.fixed_labels, pair.moving_labels
    if fixed is None or moving is None:
        return {"dice_before": {}, "dice": {}, "dice_onehot": {}}
    labels = [label for label in np.union1d(fixed, moving).tolist() if label != 0]
    volume, field = jnp.asarray(moving)[None, ..., None], jnp.asarray(displacement)[None]
    warped = {
        "dice_before": volume,
        "dice": _warp_nearest(volume, field),
        "dice_onehot": _warp_labels(volume, field, np.array([0, *labels])),
    }
    return {
        name: dict(zip(labels, metrics.dice(fixed, np.asarray(v)[0, ..., 0], labels).tolist(), strict=True))
        for name, v in warped.items()
    }


def mean_dice(scores: Mapping[str, Mapping[int, float]], scored: Sequence[int] | None) -> tables.Row:
    """Means of `label_scores` over the labels that count, or over all; None without any."""
    return {
        name: tables.mean_and_sd(
            by_label.values() if scored is None else (by_label.get(label) for label in scored)
        )[0]
        for name, by_label in scores.items()
    }


def summary(rows: Sequence[tables.Row]) -> dict[str, int | dict[str, float | None] | None]:
    """Number of cases, and mean and sample SD over the cases (of their means) of the main metrics.

    A metric that no case has is None; the SD of a single case is None.
    """
    result: dict[str, int | dict[str, float | None] | None] = {"cases": len(rows)}
    for name in (*SUMMARY, *(name for name in SUMMARY_AFFINE if name in rows[0])):
        mean, sd = tables.mean_and_sd(row[name] for row in rows)
        result[name] = None if mean is None else {"mean": mean, "sd": sd}
    return result


def describe_protocol(rows: Sequence[tables.Row], data: DataConfig, *, method: str, step: int) -> str:
    """What stands above the tables: what was registered by what, and how it was measured."""
    return (
        f"Test split of {data.kind} data, {len(rows)} cases; {method}, best checkpoint (step {step}).\n"
        "TRE: |p + u(p) - q| (pull-back), mean (SD over the landmarks); snapped: p + u(p) rounded to\n"
        "a voxel of the native scan. Dice: labels warped by nearest neighbour; one-hot: by one trilinear\n"
        "image a label, the largest wins. SSIM: one global window. Folded: Jacobian determinant <= 0 by\n"
        "central differences; folded volume: by tetrahedra. SDlogJ: as Learn2Reg, of det + 3. The last two\n"
        "rows are mean and sample SD over the cases.\n"
    )


def case_figures(
    pair: Pair, registered: Registered, determinant: np.ndarray, *, title: str
) -> dict[str, Figure]:
    """The figures of a registered pair, of determinant [x, y, z], by the end of their file names."""
    return {
        "": draw.registration_figure(
            pair.fixed,
            pair.moving,
            registered.warped,
            registered.displacement,
            determinant,
            spacing_mm=pair.spacing_mm,
            affine=pair.affine,
            title=title,
        ),
        "_levels": draw.levels_figure(
            pair.fixed,
            pair.moving,
            registered.warped,
            registered.match_entropy,
            [_jacobian(displacement) for displacement in registered.pyramid],
            spacing_mm=pair.spacing_mm,
            affine=pair.affine,
            dropout_sd_mm=registered.dropout_sd_mm,
            title=title,
        ),
    }


def summary_figures(
    landmarks: Sequence[tables.Row], determinants: Mapping[str, np.ndarray]
) -> dict[str, Figure]:
    """The figures over the cases, by name: landmark distances, uncertainty against error, the Jacobian."""
    figures = {}
    if landmarks:
        figures["landmark_distances"] = landmark_figure(landmarks)
    for column, measure, name in UNCERTAINTIES:
        if (calibration := _calibration(landmarks, column)) is not None:
            figures[name] = draw.calibration_figure(*calibration, measure=measure)
    if determinants:
        figures["jacobian"] = draw.jacobian_figure(list(determinants), list(determinants.values()))
    return figures


def rank_correlations(landmarks: Sequence[tables.Row]) -> list[str]:
    """A line for each uncertainty that `landmark_rows` knows: how it goes along with the error."""
    lines = []
    for column, measure, _ in UNCERTAINTIES:
        if (found := _calibration(landmarks, column)) is None:
            continue
        cases = [
            _calibration([row for row in landmarks if row["name"] == name], column)
            for name in dict.fromkeys(row["name"] for row in landmarks)
        ]
        rho = [of_case[2] for of_case in cases if of_case is not None]
        within = f"; within a case {np.mean(rho):+.2f} ({min(rho):+.2f} to {max(rho):+.2f})" if rho else ""
        lines.append(
            f"Spearman's rank correlation of {measure}, with the error: {found[2]:+.2f} over all landmarks"
            f"{within}."
        )
    return lines


def _calibration(landmarks: Sequence[tables.Row], column: str) -> tuple[np.ndarray, np.ndarray, float] | None:
    """An uncertainty [n], the error [n] in mm and their rank correlation; None where there is none."""
    known = [row for row in landmarks if row[column] is not None]
    uncertainty, error_mm = (np.array([row[name] for row in known]) for name in (column, "after_mm"))
    if not known or np.ptp(uncertainty) == 0 or np.ptp(error_mm) == 0:
        return None
    return uncertainty, error_mm, float(stats.spearmanr(uncertainty, error_mm).statistic)


def landmark_figure(rows: Sequence[tables.Row]) -> Figure:
    """`figures.tre_figure` of rows from `landmark_rows`, or of the lines of a landmarks.csv."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    before, after = (
        [np.array([float(row[column]) for row in rows if row["name"] == name]) for name in names]
        for column in ("before_mm", "after_mm")
    )
    return draw.tre_figure(names, before, after)


def landmark_rows(
    pair: Pair,
    displacement: np.ndarray,
    match_entropy: Sequence[np.ndarray] = (),
    dropout_sd_mm: np.ndarray | None = None,
) -> list[tables.Row]:
    """A row a landmark: its number from 0, its distance in mm before and after, and its uncertainty.

    The uncertainties are taken at the voxel of the fixed landmark: the entropy of the match in nats, of the
    finest level, None without attention; and `dropout_sd_mm` [x, y, z], None without dropout samples.
    """
    if pair.fixed_landmarks is None or pair.moving_landmarks is None:
        return []
    points = (pair.fixed_landmarks, pair.moving_landmarks)
    before = metrics.tre_mm(np.zeros_like(displacement), *points, pair.spacing_mm)
    after = metrics.tre_mm(displacement, *points, pair.spacing_mm)
    shape = pair.fixed.shape
    voxels = np.clip(np.rint(pair.fixed_landmarks).astype(int), 0, np.array(shape) - 1)
    entropy, scatter_mm = (
        [None] * len(before) if volume is None else volume[tuple(voxels.T)]
        for volume in (draw.enlarged(match_entropy[-1], shape) if match_entropy else None, dropout_sd_mm)
    )
    return [
        {
            "name": pair.name,
            "landmark": n,
            "before_mm": float(b),
            "after_mm": float(a),
            "match_entropy": tables.finite(e),
            "dropout_sd_mm": tables.finite(s),
        }
        for n, (b, a, e, s) in enumerate(zip(before, after, entropy, scatter_mm, strict=True))
    ]


def write_figure(path: Path, figure: Figure) -> bytes:
    """Saves a figure as PNG and returns the bytes."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_file(path, png.getvalue())
    return png.getvalue()


def _landmark_metrics(pair: Pair, displacement: np.ndarray) -> tables.Row:
    if pair.fixed_landmarks is None or pair.moving_landmarks is None:
        names = ("landmarks", "tre_before_mm", "tre_before_sd_mm", "tre_mm", "tre_sd_mm", "tre_snapped_mm")
        return dict.fromkeys(names)
    points = (pair.fixed_landmarks, pair.moving_landmarks)
    before_mm = metrics.tre_mm(np.zeros_like(displacement), *points, pair.spacing_mm)
    after_mm = metrics.tre_mm(displacement, *points, pair.spacing_mm)
    native_spacing_mm = pair.spacing_mm if pair.native_spacing_mm is None else pair.native_spacing_mm
    snapped_mm = metrics.tre_snapped_mm(
        displacement, *points, to_native=pair.to_native, native_spacing_mm=native_spacing_mm
    )
    row: tables.Row = {"landmarks": len(pair.fixed_landmarks)}
    row["tre_before_mm"], row["tre_before_sd_mm"] = tables.mean_and_sd(before_mm)
    row["tre_mm"], row["tre_sd_mm"] = tables.mean_and_sd(after_mm)
    row["tre_snapped_mm"], _ = tables.mean_and_sd(snapped_mm)
    return row


def write_ixi(
    folder: Path, rows: Sequence[tables.Row], scores: Sequence[Mapping[str, Mapping[int, float]]]
) -> list[tables.Row]:
    """Writes each subject's Dice in the published layout, and Table III; returns the rows of the latter."""
    folded = np.array([row["folded_percent"] for row in rows])
    ours = {}
    for name, warping in WARPINGS:
        if name not in scores[0]:
            continue
        dice = np.array([[s[name].get(k, np.nan) for k in range(len(ixi.LABEL_NAMES))] for s in scores])
        folds = np.zeros_like(folded) if name in ("dice_before", "dice_affine") else folded
        ours[f"this run, {warping}"] = (dice, folds)
        content = ixi_scores.results_csv("adregnet_jax", dice, folds)
        write_file(folder / f"ixi_{name}.csv", content)
    table_3 = ixi_scores.table_3(ours)
    for suffix, render in (("md", tables.to_markdown), ("tex", tables.to_latex)):
        write_file(folder / f"table_3.{suffix}", render(table_3, ixi_scores.TABLE_3))
    write_file(folder / "table_3.csv", tables.to_csv(table_3))
    return table_3


def _jacobian(displacement: np.ndarray) -> np.ndarray:
    return np.asarray(_determinant(jnp.asarray(displacement)[None])[0])


def _abstract_parameters(model: nn.Module, pair: Pair):
    """Shapes and dtypes of the network's parameters, without making them."""
    image = jax.ShapeDtypeStruct((1, *pair.fixed.shape, 1), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image, image)["params"]


def _timed(
    model: nn.Module, params, config: Config, *, instance: bool, mc_dropout: int
) -> Callable[[Pair], Registered]:
    """The network as a function of a pair, with instance optimisation and dropout samples or without."""
    scatter = _scatter(model, params, config, samples=mc_dropout) if mc_dropout else None

    @functools.cache
    def compiled(shape: tuple[int, ...], spacing_mm: tuple[float, ...]):
        @jax.jit
        def network(params, fixed, moving, mask):
            return register(
                params,
                fixed,
                moving,
                model=model,
                instance=config.instance if instance else None,
                spacing_mm=spacing_mm,
                fixed_mask=mask,
            )

        image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
        return network.lower(params, image, image, image).compile()

    def registered(pair: Pair) -> Registered:
        spacing_mm = tuple(np.round(pair.spacing_mm, 4).tolist()) if instance else (1.0, 1.0, 1.0)
        program = compiled(pair.fixed.shape, spacing_mm)
        mask = np.ones(pair.fixed.shape) if pair.mask is None else pair.mask
        scans = [jnp.asarray(s, jnp.float32)[None, ..., None] for s in (pair.fixed, pair.moving, mask)]
        scans = jax.block_until_ready(scans)
        start = time.perf_counter()
        registration = jax.block_until_ready(program(params, *scans))
        seconds = time.perf_counter() - start
        one = jax.tree.map(lambda x: np.asarray(x[0]), registration)
        if not np.isfinite(one.displacement).all():
            raise UserError(
                f"the displacement of {pair.name} is not finite: the checkpoint diverged, train again"
            )
        fields = (one.displacement, one.warped[..., 0], one.pyramid, one.match_entropy)
        return Registered(*fields, seconds, scatter(pair) if scatter else None)

    return registered


def _scatter(model: nn.Module, params, config: Config, *, samples: int) -> Callable[[Pair], np.ndarray]:
    """`dropout_sd_mm` [x, y, z] as a function of a pair: the same drawn networks for all pairs."""
    key = jax.random.key(config.seed)

    @jax.jit
    def scatter(params, fixed, moving, spacing_mm):
        return dropout_sd_mm(params, fixed, moving, key, model=model, samples=samples, spacing_mm=spacing_mm)

    def of_pair(pair: Pair) -> np.ndarray:
        scans = [jnp.asarray(scan, jnp.float32)[None, ..., None] for scan in (pair.fixed, pair.moving)]
        return np.asarray(scatter(params, *scans, jnp.asarray(pair.spacing_mm, jnp.float32))[0])

    return of_pair


def _title(row: tables.Row) -> str:
    """What one reads above a figure: the case, and what was gained at what price."""
    gains = (
        tables.Column("", "TRE {tre_before_mm:.2f} mm before, {tre_mm:.2f} mm after"),
        tables.Column("", "Dice {dice_before:.3f} before, {dice:.3f} after"),
        tables.Column("", "{folded_percent:.3f} % folded"),
    )
    return f"{row['name']}: " + ", ".join(text for gain in gains if (text := gain.text(row)) != "-")


def _file_name(index: int, pair: Pair) -> str:
    """Numbered, since names need not differ; nothing in it that a file system could refuse."""
    return f"{index + 1:02d}_" + re.sub(r"[^\w.-]+", "_", pair.name)


def _logged(path: Path) -> list[dict[str, float]]:
    """The records of `metrics.jsonl`, none without the file; a line cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
