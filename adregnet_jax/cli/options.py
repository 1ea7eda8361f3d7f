"""Command-line options shared by several commands, and their translation to the library's options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer

from adregnet_jax.errors import UserError
from adregnet_jax.registration.options import AFFINE, Prefer, RegistrationOptions, Report

DeviceOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, gpu or cuda:1. Default: JAX's default device.")
]
CompositeOption = Annotated[
    bool,
    typer.Option("--h5", help="Also write field.h5, an ITK composite of field and affine (needs SimpleITK)."),
]
AnonymizeOption = Annotated[
    bool, typer.Option("--anonymize", help="Keep nothing in the DICOM objects that identifies a person.")
]
PreferOption = Annotated[
    Prefer | None,
    typer.Option(
        help="Which form places a NIfTI file whose sform and qform disagree. Default: as ITK chooses.",
        show_default=False,
    ),
]
FixedSeriesOption = Annotated[
    str | None,
    typer.Option("--fixed-series", metavar="UID", help="Which series of a DICOM folder that holds several."),
]
MovingSeriesOption = Annotated[str | None, typer.Option("--moving-series", metavar="UID", help="Likewise.")]
SeriesOption = Annotated[
    str | None,
    typer.Option("--series", metavar="UID", help="Which series of a DICOM folder that holds several."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]

FailOnOption = Annotated[
    Literal["check", "fail"] | None,
    typer.Option(help="Exit with status 3 if the verdict is this or worse.", show_default=False),
]
ReportOption = Annotated[
    Report,
    typer.Option(help="report.html: slices to look into, up to 25 MB, or pictures as in papers."),
]
VERDICT_STATUS = 3  # of a command whose result --fail-on doesn't accept

# Fields of RegistrationOptions that `register` and `batch` offer.
REGISTRATION_FIELDS = tuple(RegistrationOptions.__dataclass_fields__)
# Names and settings of command-line options that don't follow from the names of their fields.
NAMES = {"tile": "--tiles", "affine": "--affine/--no-affine", "settings": "--set"}
DETAILS: dict[str, dict[str, Any]] = {
    "weights": {"metavar": "DIR"},
    "tile": {"metavar": "N", "min": 16},
    "settings": {"metavar": "NAME=VALUE"},
}

Command = TypeVar("Command", bound=Callable[..., Any])


def takes_registration_options(*names: str) -> Callable[[Command], Command]:
    """Replaces the `**choices` of a command with options for fields of `RegistrationOptions`."""

    def extend(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        required = [p for p in own if p.default is p.empty]
        parameters = [*required, *map(_option, names), *own[len(required) :]]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return extend


def registration_options(choices: dict[str, Any], **more: Any) -> RegistrationOptions:
    """The options given to a command with `takes_registration_options`.

    Raises:
      UserError: see `RegistrationOptions`; the message names command-line options.
    """
    settings = _parse_settings(choices["settings"] or [])
    try:
        return RegistrationOptions(**choices | more | {"settings": settings})
    except UserError as error:
        raise UserError(str(error).replace("settings.", "--set ")) from None


def in_option_words(message: str) -> str:
    """Replaces arguments with options in a message of the library: apart=True becomes --apart."""
    message = re.sub(r"\b(affine|apart|rigid)=(True|False)", _flag, message)
    message = message.replace("(reference=GRID)", "(--reference GRID)")
    message = message.replace(
        "(series=UID)", "(--series UID; of two scans, --fixed-series UID and --moving-series UID)"
    )
    return re.sub(r'\b(method|mode|prefer)="(\w+)"', r"--\1 \2", message)


def _flag(found: re.Match[str]) -> str:
    name, value = found.groups()
    return f"--{name}" if value == "True" else f"--no-{name}"


def _option(name: str) -> inspect.Parameter:
    """The parameter of a command for a field of `RegistrationOptions`."""
    kind, help_text = get_args(get_type_hints(RegistrationOptions, include_extras=True)[name])
    field = RegistrationOptions.__dataclass_fields__[name]
    default: Any = field.default
    if name == "settings":
        kind, default = list[str] | None, None
    option = typer.Option(NAMES.get(name, f"--{name}"), help=help_text, **DETAILS.get(name, {}))
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, option]
    )


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    """Fields of `InstanceConfig`, and of `AffineConfig` with their prefix, each parsed as its type."""
    if not settings:
        return {}
    from adregnet_jax.config import Config
    from adregnet_jax.launch.config_file import override

    for setting in settings:
        if "=" not in setting:
            raise UserError(f"--set {setting}: expected NAME=VALUE, for instance smoothness=0.5")
    parsed: dict[str, Any] = {}
    for setting in settings:
        name = setting.split("=")[0]
        section, prefix, field = "instance", "", name
        if name.startswith(AFFINE):
            section, prefix, field = "affine", AFFINE, name.removeprefix(AFFINE)
        argument = f"--config.{section}.{setting.removeprefix(prefix)}"
        try:
            changed = override(Config(), [argument])
        except UserError as error:
            message = str(error).replace(f"--config.{section}.", f"--set {prefix}")
            raise UserError(message) from None
        parsed[name] = getattr(getattr(changed, section), field)
    return parsed
