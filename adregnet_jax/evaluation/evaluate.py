"""Evaluates a trained network on the test split: metrics of each case, tables, figures.

`evaluate` writes to `workdir/eval`, or to `workdir/eval_instance` with instance optimisation:

    cases.csv      one row per case, all metrics at full precision (`registration.measure.measure_pair`)
    landmarks.csv  distance of each landmark before and after, the entropy of its match, and with Monte-Carlo
                   dropout the SD of its displacement
    summary.json   mean and SD over the cases
    tables.md      the printed tables; tables.tex is the same for LaTeX
    report.html    tables, box plots, histograms and overlays on one page, and some cases to look into
    table_3.*      for IXI: Dice averaged as in publications; ixi_*.csv has the Dice of each subject's labels
    figures/       the first cases in three planes and level by level, and the training curves
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from adregnet_jax import metrics, provenance
from adregnet_jax.atomic import write_file
from adregnet_jax.config import Config, DataConfig
from adregnet_jax.data.datasets import ixi
from adregnet_jax.data.pair import Pair
from adregnet_jax.data.splits import LazyPairs, load_splits
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import baselines, ixi_dice
from adregnet_jax.evaluation.figures import case_figures, summary_figures, training_figure, viewed
from adregnet_jax.evaluation.inference import RegisteredPair, abstract_parameters, timed_network
from adregnet_jax.evaluation.uncertainty import landmark_rows, rank_correlations
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.convolution import check_implementation
from adregnet_jax.registration.measure import label_scores, mean_dice, measure_pair
from adregnet_jax.report import page as html
from adregnet_jax.report import tables
from adregnet_jax.report.figures import figure_title, png
from adregnet_jax.report.viewer import ViewedPair
from adregnet_jax.training.checkpoint import check_architecture, restore_parameters
from adregnet_jax.training.record import check_splits, describe_origin

MOST_VIEWED = 6  # cases to look into, if they aren't named: they share the size of one page
SUMMARY = ("tre_before_mm", "tre_mm", "tre_snapped_mm", "folded_percent", "dice_before", "dice")
SUMMARY_AFFINE = ("tre_affine_mm", "dice_affine", "ncc_affine")  # only with the affine alignment


class Results(NamedTuple):
    """The measurements of the test split, and the drawn cases."""

    cases: list[tables.Row]
    landmarks: list[tables.Row]
    dice: list[dict[str, dict[int, float]]]  # by label, of each case (`label_scores`)
    pictures: list[str]  # HTML
    jacobians: dict[str, np.ndarray]  # determinants [n] without padding, of the drawn cases
    views: list[ViewedPair]  # to look into


def evaluate(
    config: Config,
    workdir: Path,
    *,
    figures: int = 3,
    instance: bool = False,
    mc_dropout: int = 0,
    affine: bool = False,
    view: Sequence[int] | None = None,
) -> Path:
    """Registers the test split with the best checkpoint of a run, prints the tables and writes all results.

    Args:
        config: the config of the training run.
        workdir: folder of the training run.
        figures: number of cases to draw, starting with the first.
        instance: refines the network's displacement on each test pair, from its two images alone
            (`adregnet_jax.registration.instance`). This is a different protocol, with its own tables.
        mc_dropout: number of networks to draw by dropout, for the SD of the displacement as a second measure
            of uncertainty; 0 for none.
        affine: also measures an affine alignment of each pair. Off by default, since compiling it takes
            longer than evaluating a small test split.
        view: the cases of which the report shows every slice, by their numbers from 1; None: the drawn ones,
            up to `MOST_VIEWED`.

    Returns:
        The folder with the results.

    Raises:
        UserError: there is no checkpoint, the test split is empty or differs from that of the run, a field is
            not finite, the folder can't be written, a case to view doesn't exist, or dropout samples are
            fewer than 2 or requested from a network without dropout.
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
    if view is None:
        view = range(1, min(figures, len(pairs), MOST_VIEWED) + 1)
    if absent := [number for number in view if not 1 <= number <= len(pairs)]:
        raise UserError(f"--view {absent[0]}: there is no such case; expected 1 to {len(pairs)}")
    model = make_model(config.model)
    params, step = restore_parameters(workdir, abstract_parameters(model, pairs[0]), which="best")
    network = timed_network(model, params, config, instance=instance, mc_dropout=mc_dropout)
    folder = workdir / ("eval_instance" if instance else "eval")
    results = _measure(pairs, network, folder, config, figures=figures, affine=affine, view=view)

    method = "network, then instance optimisation" if instance else "network alone"
    protocol = describe_protocol(results.cases, config.data, method=method, step=step)
    origin = describe_origin(config.init_from, {maker.fixed for maker in pairs.makers})
    protocol += f"{origin.strip()}\n" if origin else ""
    protocol += "".join(f"{line}\n" for line in rank_correlations(results.landmarks))
    printed = _write_tables(folder, results, config.data, protocol)
    _write_report(folder, workdir, results, printed, protocol=protocol, kind=config.data.kind)
    print(protocol)
    for table in printed:
        print(tables.to_text(table.rows, table.columns))
    print(f"Written to {folder}, with figures of {min(figures, len(pairs))} of {len(pairs)} cases.")
    return folder


def check_options(config: Config, workdir: Path, *, instance: bool, mc_dropout: int, affine: bool) -> None:
    """Raises UserError for options that the config or the run doesn't support."""
    if affine:
        config.affine.check()
    if instance:
        config.instance.check()
    if not mc_dropout:
        return
    if mc_dropout < 2:
        raise UserError(f"--mc-dropout is {mc_dropout}: an SD needs 2 samples or more, for instance 20")
    if not config.model.dropout:
        raise UserError(
            "--mc-dropout draws networks by dropout, and model.dropout is 0: train with a rate above 0, for"
            " instance --config.model.dropout=0.1"
        )
    # With a different dropout rate than in training, the samples would be meaningless.
    check_architecture(workdir, config.model)


def summary(cases: Sequence[tables.Row]) -> dict[str, int | dict[str, float | None] | None]:
    """Number of cases, and mean and sample SD over the cases of the main metrics.

    A metric that no case has is None; so is the SD of a single case.
    """
    result: dict[str, int | dict[str, float | None] | None] = {"cases": len(cases)}
    for name in (*SUMMARY, *(name for name in SUMMARY_AFFINE if name in cases[0])):
        mean, sd = tables.mean_and_sd(case[name] for case in cases)
        result[name] = None if mean is None else {"mean": mean, "sd": sd}
    return result


def describe_protocol(cases: Sequence[tables.Row], data: DataConfig, *, method: str, step: int) -> str:
    """The text above the tables: the data, the method and how it was measured."""
    return (
        f"Test split of {data.kind} data, {len(cases)} cases; {method}, best checkpoint (step {step}).\n"
        "TRE: |p + u(p) - q| (pull-back), mean (SD over the landmarks); snapped: p + u(p) rounded to\n"
        "a voxel of the native scan. Dice: labels warped by nearest neighbour; one-hot: by one trilinear\n"
        "image a label, the largest wins. SSIM: one global window. Folded: Jacobian determinant <= 0 by\n"
        "central differences; folded volume: by tetrahedra. SDlogJ: as in Learn2Reg, of det + 3. The last\n"
        "two rows are mean and sample SD over the cases.\n"
    )


def _measure(
    pairs: LazyPairs,
    network: Callable[[Pair], RegisteredPair],
    folder: Path,
    config: Config,
    *,
    figures: int,
    affine: bool,
    view: Sequence[int],
) -> Results:
    """Registers and measures all pairs, and draws the first ones."""
    results = Results([], [], [], [], {}, [])
    console = Console(stderr=True)
    for index, pair in enumerate(track(pairs, "registering", console=console, transient=True)):
        registered = network(pair)
        scores = label_scores(pair, registered.displacement)
        row = measure_pair(pair, registered.displacement, registered.warped)
        if affine:
            aligned = baselines.affine_scores(pair, config=config.affine)
            row |= aligned.row
            scores["dice_affine"] = aligned.dice
        row |= mean_dice(scores, labels=_published_labels(config.data))
        maker = pairs.makers[index]
        row |= {"seconds": registered.seconds, "fixed": maker.fixed, "moving": maker.moving}
        results.cases.append(row)
        results.dice.append(scores)
        results.landmarks.extend(
            landmark_rows(
                pair,
                registered.displacement,
                match_entropy=registered.match_entropy,
                dropout_sd_mm=registered.dropout_sd_mm,
            )
        )
        jacobian = metrics.jacobian(registered.displacement) if index < figures or index + 1 in view else None
        if index + 1 in view and jacobian is not None:
            results.views.append(viewed(pair, registered, jacobian=jacobian))
        if index < figures and jacobian is not None:
            results.jacobians[pair.name] = jacobian[... if pair.mask is None else pair.mask].ravel()
            title = f"{pair.name}: {figure_title(row)}"
            stem = folder / "figures" / _file_name(index, pair)
            for name, figure in case_figures(pair, registered, jacobian=jacobian, title=title).items():
                results.pictures.append(_write_figure(Path(f"{stem}{name}.png"), figure, title))
    return results


def _write_tables(folder: Path, results: Results, data: DataConfig, protocol: str) -> list[tables.Table]:
    """Writes everything but the report and its figures; returns the tables to print."""
    write_file(folder / "cases.csv", tables.to_csv(results.cases))
    if results.landmarks:
        write_file(folder / "landmarks.csv", tables.to_csv(results.landmarks))
    record = summary(results.cases) | {"origin": provenance.origin()}
    write_file(folder / "summary.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    rows = tables.with_mean_and_sd(results.cases)
    printed = [
        tables.Table("Alignment", rows, tables.ALIGNMENT),
        tables.Table("Similarity and deformation", rows, tables.SIMILARITY),
    ]
    comment = "".join(f"% {line}\n" for line in protocol.splitlines())
    for suffix, above, render in (
        ("md", f"{protocol}\n", tables.to_markdown),
        ("tex", comment, tables.to_latex),
    ):
        text = above + "\n".join(render(table.rows, table.columns) for table in printed)
        write_file(folder / f"tables.{suffix}", text)
    if data.kind == "ixi" and data.ixi.mode == "atlas":  # the published rows are for the atlas
        printed.append(ixi_dice.write_tables(folder, results.cases, results.dice))
    return printed


def _write_report(
    folder: Path,
    workdir: Path,
    results: Results,
    printed: Iterable[tables.Table],
    *,
    protocol: str,
    kind: str,
) -> None:
    """Draws the figures over the cases and puts everything on one page."""
    sections = [html.Section(table.caption, tables.to_html(table.rows, table.columns)) for table in printed]
    for name, figure in summary_figures(results.landmarks, results.jacobians).items():
        picture = _write_figure(folder / "figures" / f"{name}.png", figure, "")
        sections.append(html.Section(name.replace("_", " ").capitalize(), picture))
    if training := training_figure(workdir / "metrics.jsonl"):
        picture = _write_figure(folder / "figures" / "training.png", training, "metrics over the steps")
        sections.append(html.Section("Training", picture))
    sections.append(html.Section("Cases", "\n".join(results.pictures)))
    write_file(
        folder / "report.html",
        html.page(f"Registration of {kind} data", protocol, sections, pairs=results.views),
    )


def _write_figure(path: Path, figure: Figure, caption: str) -> str:
    """Writes a figure as PNG and returns it as HTML."""
    content = png(figure)
    write_file(path, content)
    return html.picture(content, caption)


def _published_labels(data: DataConfig) -> tuple[int, ...] | None:
    """The labels that published scores cover, or None for all labels. None are published for T1 to T2."""
    return ixi.SCORED_LABELS if data.kind == "ixi" and data.ixi.mode != "t1t2" else None


def _file_name(index: int, pair: Pair) -> str:
    """A numbered name, since several pairs may share one; only characters that all file systems allow."""
    return f"{index + 1:02d}_" + re.sub(r"[^\w.-]+", "_", pair.name)
