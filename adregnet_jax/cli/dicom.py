"""The commands on DICOM objects of radiotherapy: `contours` and `dose`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from adregnet_jax.cli.options import (
    AnonymizeOption,
    FixedSeriesOption,
    MovingSeriesOption,
    OverwriteOption,
)
from adregnet_jax.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])


def _shared(
    field: Annotated[
        Path,
        typer.Argument(help="From the fixed to the moving series: .nii.gz, .nii, .npz or .h5."),
    ],
    fixed: Annotated[
        Path, typer.Option("--fixed", metavar="DIR", help="The series to carry to, on which the field lies.")
    ],
    moving: Annotated[Path, typer.Option("--moving", metavar="DIR", help="The series to carry from.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="A structure; repeat for more. Default: all."),
    ] = None,
    fixed_series: FixedSeriesOption = None,
    moving_series: MovingSeriesOption = None,
    anonymize: AnonymizeOption = False,
    overwrite: OverwriteOption = False,
) -> tuple[Any, Path, dict[str, Any]]:
    """The field between the series, the folder to write, and the choices of what is written."""
    from adregnet_jax.registration.series_field import read_series_field

    between = read_series_field(
        field, fixed=fixed, moving=moving, fixed_series=fixed_series, moving_series=moving_series
    )
    return between, output, {"only": only or (), "anonymize": anonymize, "overwrite": overwrite}


def _takes_shared(command: Command) -> Command:
    """Replaces the `**shared` of a command with the arguments of `_shared`."""
    own, shared = (inspect.signature(function, eval_str=True) for function in (command, _shared))
    parameters = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters += shared.parameters.values()
    parameters.sort(key=lambda one: one.default is not one.empty)  # those without a default come first
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


@_takes_shared
def contours(
    rtstruct: Annotated[Path, typer.Argument(help="Structures drawn on the moving series.")], **shared: Any
) -> None:
    """Carries structures from the moving series to the slices of the fixed one.

    Writes structures.dcm, and each structure's volume before and after to volumes.csv.
    """
    from adregnet_jax.registration.carried_structures import VOLUMES, write_carried_structures
    from adregnet_jax.report.tables import to_text

    between, output, choices = _shared(**shared)
    rows = write_carried_structures(rtstruct, between, output, **choices)
    print(to_text(rows, VOLUMES))
    print(f"Written to {output}")


@_takes_shared
def dose(
    rtdose: Annotated[Path, typer.Argument(help="A dose on the moving series.")],
    structures: Annotated[
        Path | None,
        typer.Option(metavar="RTSTRUCT", help="Drawn on the moving series, for dose-volume histograms."),
    ] = None,
    **shared: Any,
) -> None:
    """Carries a dose from the moving series to the anatomy of the fixed one.

    Writes dose.dcm, and the doses of structures before and after: dvh.png, dvh.csv and means.csv.
    """
    if shared["only"] and structures is None:
        raise UserError("--only chooses among structures: add --structures RTSTRUCT, or drop it")
    from adregnet_jax.registration.carried_dose import MEANS, write_carried_dose
    from adregnet_jax.report.tables import to_text

    between, output, choices = _shared(**shared)
    means = write_carried_dose(rtdose, between, output, drawn=structures, **choices)
    if means:
        print(to_text(means, MEANS))
    print(
        "note: each point has the dose of the point it corresponds to; energy and mass are not conserved "
        "where tissue is compressed or stretched",
        file=sys.stderr,
    )
    print(f"Written to {output}")
