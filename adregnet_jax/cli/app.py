"""The Typer application behind `adregnet`: its commands, its errors as one line, its exit status."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from adregnet_jax.cli.assess import assess
from adregnet_jax.cli.batch import batch
from adregnet_jax.cli.dicom import contours, dose
from adregnet_jax.cli.execution import INTERRUPTED, TERMINATED, termination_as_exit
from adregnet_jax.cli.export import export
from adregnet_jax.cli.fields import apply, compose, convert, invert
from adregnet_jax.cli.info import info
from adregnet_jax.cli.options import in_option_words
from adregnet_jax.cli.pack import pack
from adregnet_jax.cli.register import register
from adregnet_jax.cli.sample import sample
from adregnet_jax.cli.warmup import warmup
from adregnet_jax.errors import UserError
from adregnet_jax.provenance import __version__

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, which newer versions of Typer bundle


class OneLineErrors(TyperGroup):
    """Prints errors that the user can fix as one line and exits with 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, **extra, standalone_mode=False)  # type: ignore[misc]
        try:
            with termination_as_exit():
                status = super().main(*args, **extra, standalone_mode=False)  # type: ignore[misc]
        except UserError as error:
            status = _refuse(in_option_words(str(error)))
        except USAGE_ERROR as error:
            status = _refuse(error.format_message())
        except MemoryError:
            status = _refuse("out of memory: use scans on a coarser grid")
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
    help="Registers 3-D medical images: any two scans, with a trained network or without.",
    epilog="Points and fields map the fixed scan to the moving one; images are warped the other way.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut off the names of options in 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(register, batch, assess, apply, invert, compose, convert, contours, dose, info),
    *(sample, warmup, export, pack),
):
    app.command()(command)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"adregnet {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print it and exit."),
    ] = False,
) -> None: ...


def main() -> None:
    """Runs the command line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {in_option_words(str(message))}\n"
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
