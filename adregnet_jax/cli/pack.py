"""The command `pack`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from adregnet_jax.atomic import new_folder
from adregnet_jax.cli.options import OverwriteOption
from adregnet_jax.errors import UserError

CARD = "MODEL_CARD.md"  # written by hand, kept when weights are packed again


def pack(
    workdir: Annotated[Path, typer.Argument(help="Workdir of train.py; its best parameters are packed.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Packs a trained network into a folder to share: float16 arrays, settings, training record, checksum.

    The options --weights and --config.init_from accept this folder.
    """
    from adregnet_jax.launch.process import check_jax_version

    check_jax_version()
    from adregnet_jax.training.checkpoint import restore_network
    from adregnet_jax.weights.packed import ARRAYS, RECORD, pack_weights

    network = restore_network(workdir)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"]
    with new_folder(output, own=(ARRAYS, RECORD, CARD), overwrite=overwrite) as temporary:
        if (output / CARD).is_file():
            (temporary / CARD).write_bytes((output / CARD).read_bytes())
        checksum = pack_weights(
            temporary, network.params, config=config, scans=network.scans, training=_training(workdir)
        )
    print(f"Written to {output}, checksum {checksum}")


def _training(workdir: Path) -> dict[str, Any]:
    """The starts of a run and its validation curve, from its logs."""
    try:
        starts = [
            {name: start.get(name) for name in ("date", "step", "commit", "devices")}
            for start in _lines(workdir / "starts.jsonl")
        ]
        curve = [
            {name: value for name, value in line.items() if name == "step" or name.startswith("validation/")}
            for line in _lines(workdir / "metrics.jsonl")
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{workdir}: the log of the run can't be read ({error}): restore a copy") from None
    return {"starts": starts, "validation": [point for point in curve if len(point) > 1]}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a log; none if the run was made by an older version without that log."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]
