"""The command `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adregnet_jax.cli.options import PreferOption, SeriesOption


def info(
    file: Annotated[Path, typer.Argument(help="An image, a field, a matrix, points, or a workdir.")],
    prefer: PreferOption = None,
    series: SeriesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Describes a FILE: grid, orientation and range of an image; motion and folding of a field.

    For a workdir of train.py, it shows the model, the data and the commands that trained it.
    """
    import json

    from adregnet_jax.cli.description import as_text, describe

    description = describe(file, prefer=prefer, series=series)
    print(json.dumps(description, indent=2) if as_json else as_text(description))
