"""The command `adregnet`: scans registered, fields applied, inverted, composed, converted, programs exported.

The modules with commands (`registering`, `transforming`, `exporting`, `packing`) import what computes inside
their functions, so that `adregnet --help` is there at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from adregnet_jax.cli import export as exporting
from adregnet_jax.cli import pack as packing
from adregnet_jax.cli import register as registering
from adregnet_jax.cli import transform as transforming
from adregnet_jax.cli.execution import INTERRUPTED, TERMINATED, termination_as_exit
from adregnet_jax.errors import UserError
from adregnet_jax.provenance import __version__

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, which newer versions of Typer have inside


class OneLineErrors(TyperGroup):
    """Says what the user can mend in one line and exits with 2, whatever way it was found."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, **extra, standalone_mode=False)  # type: ignore[misc]
        try:
            with termination_as_exit():
                status = super().main(*args, **extra, standalone_mode=False)  # type: ignore[misc]
        except UserError as error:
            status = _refuse(str(error))
        except USAGE_ERROR as error:
            status = _refuse(error.format_message())
        except MemoryError:
            status = _refuse("out of memory: scans on a coarser grid take less")
        except OSError as error:
            if not error.filename:
                raise
            status = _refuse(f"{error.filename}: can't be read or written ({error.strerror}): check the name")
        except (typer.Abort, KeyboardInterrupt):
            status = INTERRUPTED
        if status == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        sys.exit(status or 0)


app = typer.Typer(
    cls=OneLineErrors,
    help="Registers 3-D medical images: any two scans, with the weights of a network or without.",
    epilog="Points and fields go from the fixed to the moving scan; images come back.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # in 80 columns, its tables cut the names of options off
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(registering.register)
app.command()(registering.batch)
app.command()(transforming.apply)
app.command()(transforming.invert)
app.command()(transforming.compose)
app.command()(transforming.convert)
app.command()(transforming.info)
app.command()(exporting.export)
app.command()(packing.pack)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"adregnet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say it and stop.")
    ] = False,
) -> None: ...


def main() -> None:
    """The entry point."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app()
    except SystemExit as stop:
        if stop.code in (INTERRUPTED, TERMINATED):
            # XLA may still compute in another thread, which Python would wait for or crash on.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(stop.code))
        raise


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
