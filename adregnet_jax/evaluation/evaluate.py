"""A trained network on the test split: metrics of each case, tables, figures.

What `evaluate` leaves in `workdir/eval`:

    cases.csv      one row a case, all metrics at full precision (`case_metrics` names them)
    summary.json   mean and SD over the cases
    figures/       the first cases in three planes, and the training curves
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from adregnet_jax import metrics
from adregnet_jax.config import Config, DataConfig
from adregnet_jax.data.pair import Pair
from adregnet_jax.data.splits import load_splits
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import figures as draw
from adregnet_jax.evaluation import tables
from adregnet_jax.nn.adregnet import AdRegNet
from adregnet_jax.ops.jacobian import jacobian_determinant
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration import register
from adregnet_jax.training.checkpoint import restore_parameters

SUMMARY = ("tre_before_mm", "tre_mm", "tre_snapped_mm", "folded_percent", "dice_before", "dice")


def evaluate(config: Config, workdir: Path, *, figures: int = 3) -> Path:
    """Registers the test split with the best checkpoint of a run, prints the tables and writes everything.

    Args:
        config: as the network was trained with.
        workdir: of the training run.
        figures: how many cases are drawn, from the first on.

    Returns:
        `workdir / "eval"`.

    Raises:
        UserError: no checkpoint, an empty test split, a field that is not finite, or a folder that can't be
            written.
    """
    pairs = load_splits(config.data).test
    if not pairs:
        raise UserError(
            f"no pair to test on: expected at least one in the test split of {config.data.kind} data"
        )
    model = AdRegNet(config.model)
    params, step = restore_parameters(workdir, _abstract_parameters(model, pairs[0]), which="best")
    network = _timed(model, params)
    folder = workdir / "eval"

    rows = []
    console = Console(stderr=True)
    for index, pair in enumerate(track(pairs, "registering", console=console, transient=True)):
        displacement, warped, seconds = network(pair)
        row = case_metrics(pair, displacement, warped) | {"seconds": seconds}
        rows.append(row)
        if index < figures:
            figure = case_figure(pair, displacement, warped, title=_title(row))
            write_figure(folder / "figures" / _file_name(index, pair), figure)
    if records := _logged(workdir / "metrics.jsonl"):
        write_figure(folder / "figures" / "training.png", draw.training_figure(records))

    write_atomically(folder / "cases.csv", tables.to_csv(rows).encode())
    text = json.dumps(summary(rows), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "summary.json", text.encode())
    print(report(rows, config.data, step=step))
    print(f"Written to {folder}, with figures of {min(figures, len(pairs))} of {len(pairs)} cases.")
    return folder


def case_metrics(pair: Pair, displacement: np.ndarray, warped: np.ndarray) -> tables.Row:
    """Everything measured on one registered pair, before ("_before") and after; None where it can't be.

    TRE is `|p + u(p) - q|` of fixed landmarks p and moving landmarks q, in mm: mean and sample SD over the
    landmarks; snapped: with the mapped point rounded to a voxel of the native scan first. NCC, MSE, global
    SSIM and the Jacobian leave out padding. Dice is the mean over the labels that either scan has,
    background aside; the moving labels are warped with nearest neighbour.

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
    }
    return row | _label_metrics(pair, displacement)


def summary(rows: Sequence[tables.Row]) -> dict[str, int | dict[str, float | None] | None]:
    """Number of cases, and mean and sample SD over the cases (of their means) of the main metrics.

    A metric that no case has is None; the SD of a single case is None.
    """
    result: dict[str, int | dict[str, float | None] | None] = {"cases": len(rows)}
    for name in SUMMARY:
        mean, sd = tables.mean_and_sd(row[name] for row in rows)
        result[name] = None if mean is None else {"mean": mean, "sd": sd}
    return result


def report(rows: Sequence[tables.Row], data: DataConfig, *, step: int) -> str:
    """The printed tables, under the protocol they follow."""
    protocol = (
        f"Test split of {data.kind} data, {len(rows)} cases; network alone, best checkpoint (step {step}).\n"
        "TRE: |p + u(p) - q| (pull-back), mean (SD over the landmarks); snapped: p + u(p) rounded to\n"
        "a voxel of the native scan. Dice: labels warped by nearest neighbour. SSIM: one global window.\n"
        "Folded: Jacobian determinant <= 0. The last two rows are mean and SD over the cases; every SD\n"
        "is the sample SD.\n"
    )
    lines = tables.with_mean_and_sd(rows)
    return "\n".join(
        [protocol, *(tables.to_text(lines, columns) for columns in (tables.ALIGNMENT, tables.SIMILARITY))]
    )


def case_figure(pair: Pair, displacement: np.ndarray, warped: np.ndarray, *, title: str) -> Figure:
    """`figures.registration_figure` of one registered pair; arguments as in `case_metrics`."""
    return draw.registration_figure(
        pair.fixed,
        pair.moving,
        warped,
        displacement,
        np.asarray(jacobian_determinant(jnp.asarray(displacement)[None])[0]),
        spacing_mm=pair.spacing_mm,
        affine=pair.affine,
        title=title,
    )


def write_figure(path: Path, figure: Figure) -> None:
    """Saves a figure as PNG, as `write_atomically` does."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it: never half a file under its own name.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"can't write {path}: {error.strerror}; free the disk or take another --workdir"
        ) from error


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


def _label_metrics(pair: Pair, displacement: np.ndarray) -> tables.Row:
    fixed, moving = pair.fixed_labels, pair.moving_labels
    if fixed is None or moving is None:
        return {"dice_before": None, "dice": None}
    labels = [label for label in np.union1d(fixed, moving).tolist() if label != 0]
    volume, field = jnp.asarray(moving)[None, ..., None], jnp.asarray(displacement)[None]
    warped = warp(volume, field, mode="nearest")[0, ..., 0]
    return {
        "dice_before": tables.mean_and_sd(metrics.dice(fixed, moving, labels))[0],
        "dice": tables.mean_and_sd(metrics.dice(fixed, np.asarray(warped), labels))[0],
    }


def _abstract_parameters(model: AdRegNet, pair: Pair):
    """Shapes and dtypes of the network's parameters, without making them."""
    image = jax.ShapeDtypeStruct((1, *pair.fixed.shape, 1), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image, image)["params"]


def _timed(model: AdRegNet, params) -> Callable[[Pair], tuple[np.ndarray, np.ndarray, float]]:
    """The network as a function from a pair to displacement, warped scan and seconds without compilation."""
    network = jax.jit(functools.partial(register, model=model))

    @functools.cache
    def compiled(shape: tuple[int, ...]):
        image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
        return network.lower(params, image, image).compile()

    def registered(pair: Pair) -> tuple[np.ndarray, np.ndarray, float]:
        program = compiled(pair.fixed.shape)
        scans = jax.block_until_ready(
            [jnp.asarray(s, jnp.float32)[None, ..., None] for s in (pair.fixed, pair.moving)]
        )
        start = time.perf_counter()
        registration = jax.block_until_ready(program(params, *scans))
        seconds = time.perf_counter() - start
        displacement = np.asarray(registration.displacement[0])
        if not np.isfinite(displacement).all():
            raise UserError(
                f"the displacement of {pair.name} is not finite: the checkpoint diverged, train again"
            )
        return displacement, np.asarray(registration.warped[0, ..., 0]), seconds

    return registered


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
    return f"{index + 1:02d}_" + re.sub(r"[^\w.-]+", "_", pair.name) + ".png"


def _logged(path: Path) -> list[dict[str, float]]:
    """The records of `metrics.jsonl`, none without the file; a line cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
