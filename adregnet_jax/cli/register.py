"""The command `register`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adregnet_jax.cli.options import (
    REGISTRATION_FIELDS,
    VERDICT_STATUS,
    AnonymizeOption,
    CompositeOption,
    DeviceOption,
    FailOnOption,
    FixedSeriesOption,
    MovingSeriesOption,
    OverwriteOption,
    ReportOption,
    registration_options,
    takes_registration_options,
)
from adregnet_jax.config import InstanceConfig
from adregnet_jax.errors import UserError
from adregnet_jax.registration.options import RegistrationOptions, Report, ScanFiles

if TYPE_CHECKING:
    from adregnet_jax.registration.dicom import DicomPair
    from adregnet_jax.weights.trained_network import TrainedNetwork

MaskOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Image on the grid of its scan, 0 in regions to ignore.")
]
LabelsOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Label map or RTSTRUCT, for Dice.")]
LandmarksOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help=".csv (x,y,z), .fcsv, .mrk.json or DICOM points, for TRE.")
]
GIB = 2**30
OPTIMISATIONS = ("affine", "deformable")  # stages that run one program many times
MEMORY_ADVICE = (
    "--effort fast takes less, --set search_range_mm=0 skips the search, and scans on a coarser grid "
    "or --device cpu help too"
)


@takes_registration_options(*REGISTRATION_FIELDS)
def register(
    fixed: Annotated[Path, typer.Argument(help="The reference scan: NIfTI, .mha, .nrrd or a DICOM folder.")],
    moving: Annotated[Path, typer.Argument(help="The scan to warp.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")],
    fixed_mask: MaskOption = None,
    moving_mask: MaskOption = None,
    fixed_labels: LabelsOption = None,
    moving_labels: LabelsOption = None,
    fixed_landmarks: LandmarksOption = None,
    moving_landmarks: LandmarksOption = None,
    fixed_series: FixedSeriesOption = None,
    moving_series: MovingSeriesOption = None,
    device: DeviceOption = None,
    h5: CompositeOption = False,
    dicom: Annotated[
        bool,
        typer.Option("--dicom", help="Two DICOM folders: also write the warped series and the registration."),
    ] = False,
    anonymize: AnonymizeOption = False,
    preview: Annotated[bool, typer.Option("--preview", help="Write preview.png and nothing else.")] = False,
    report: ReportOption = "interactive",
    fail_on: FailOnOption = None,
    overwrite: OverwriteOption = False,
    **choices: Any,
) -> None:
    """Registers the MOVING scan to the FIXED one; writes images, fields and a report.

    Labels are scored by Dice, landmarks (RAS mm) by their distance; neither is used in the registration.
    """
    options = registration_options(choices)
    if anonymize and not dicom:
        raise UserError("--anonymize applies to DICOM objects: add --dicom, or drop it")
    if preview and dicom:
        raise UserError("--preview writes one picture and no DICOM objects: drop it or --dicom")
    check_fail_on(fail_on, options)
    try:
        files = ScanFiles(
            fixed=fixed,
            moving=moving,
            fixed_mask=fixed_mask,
            moving_mask=moving_mask,
            fixed_labels=fixed_labels,
            moving_labels=moving_labels,
            fixed_landmarks=fixed_landmarks,
            moving_landmarks=moving_landmarks,
            fixed_series=fixed_series,
            moving_series=moving_series,
        )
    except UserError as error:  # it names fields: fixed_labels is the option --fixed-labels
        raise UserError(re.sub(r"\b(fixed|moving)_(\w+)", r"--\1-\2", str(error))) from None
    from adregnet_jax.cli.execution import (
        load_network,
        show_stages,
        start_jax,
    )
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.dicom import read_dicom_pair
    from adregnet_jax.registration.files import STAGES
    from adregnet_jax.registration.result_files import as_text

    pair = read_dicom_pair(files, anonymize=anonymize) if dicom else None
    chosen = start_jax(device)
    network = load_network(options.weights, chosen) if options.by_network else None
    advice = functools.partial(memory_advice, files, options, chosen)
    with memory_errors_as_user_errors(advice), show_stages(len(STAGES) + 1) as on_stage:
        summary = register_to_folder(
            files,
            output,
            options,
            network=network,
            device=chosen,
            composite=h5,
            preview=preview,
            report=report,
            dicom=pair,
            overwrite=overwrite,
            on_stage=on_stage,
        )
    print(as_text(summary["results"]))
    print(f"Written to {output}" + ("/preview.png" if preview else ""))
    if fail_on and not accepted(summary, fail_on):
        raise typer.Exit(VERDICT_STATUS)


def check_fail_on(fail_on: str | None, options: RegistrationOptions) -> None:
    if fail_on and options.assess == "off":
        raise UserError(f"--fail-on {fail_on} needs a verdict: drop --assess off")


def accepted(summary: dict[str, Any], fail_on: str) -> bool:
    """Whether the verdict in a summary is better than `fail_on`; no verdict counts as "check"."""
    verdict = summary["results"].get("verdict") or "check"
    return verdict == "pass" or (verdict == "check" and fail_on == "fail")


def memory_advice(files: ScanFiles, options: RegistrationOptions, device: Any) -> str:
    """Names options that fit into memory by the plans of their programs, if the plans explain the failure."""
    from adregnet_jax.data.io.images import read_image
    from adregnet_jax.training.memory import available_bytes

    free = available_bytes([device])
    if free is None or options.instance_config is None:
        return MEMORY_ADVICE
    try:
        scan = read_image(files.fixed, series=files.fixed_series)
        spacing_mm = scan.spacing_mm.round(4).tolist()
        needed = planned_bytes(scan.shape, spacing_mm, options)
        if needed <= free:  # another stage took the memory
            return MEMORY_ADVICE
        fast = dataclasses.replace(options, effort="fast")
        coarse = [-(-n // 2) for n in scan.shape]
        smaller = (
            ("--effort fast takes", planned_bytes(scan.shape, spacing_mm, fast)),
            (
                "scans with voxels of twice the size take",
                planned_bytes(coarse, [2 * size for size in spacing_mm], options),
            ),
        )
    except (UserError, MemoryError, RuntimeError):  # the advice must not hide the lack of memory
        return MEMORY_ADVICE
    plans = f"the optimisation takes {needed / GIB:.1f} GiB by its plan, and {free / GIB:.1f} GiB are free"
    fitting = [f"{way} {size / GIB:.1f} GiB" for way, size in smaller if size <= free]
    return f"{plans}: {'; '.join(fitting) or MEMORY_ADVICE}"


def planned_bytes(shape: Sequence[int], spacing_mm: Sequence[float], options: RegistrationOptions) -> int:
    """Memory that the instance optimisation of scans takes, by the plan of its compiled program."""
    from adregnet_jax.registration.instance import compile_on_rungs
    from adregnet_jax.training.memory import needed_bytes

    program = compile_on_rungs(
        shape,
        spacing_mm,
        started=options.by_network,
        fixed_masked=options.modality == "multi",
        moving_masked=True,  # unless the moving scan covers all of the fixed one
        config=options.instance_config or InstanceConfig(),
    )
    memory = program.memory_analysis()
    return (needed_bytes(program) or 0) + (memory.argument_size_in_bytes if memory else 0)


def register_to_folder(
    files: ScanFiles,
    output: Path,
    options: RegistrationOptions,
    *,
    network: TrainedNetwork | None,
    device: Any,
    composite: bool,
    preview: bool = False,
    report: Report,
    dicom: DicomPair | None = None,
    overwrite: bool,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    """Registers two scans and writes the results, interruptible at any time; returns the summary.

    The output folder is checked before the registration, which can take minutes.
    """
    from adregnet_jax.atomic import new_folder
    from adregnet_jax.cli.execution import interruptible
    from adregnet_jax.data.io.itk import simpleitk
    from adregnet_jax.launch.process import hand_back_freed_memory, keep_freed_memory
    from adregnet_jax.registration.files import register_files
    from adregnet_jax.registration.result_files import FILES, write_results

    if composite:
        simpleitk(output / "field.h5")

    def begin(stage: str) -> None:
        hand_back_freed_memory()
        if stage in OPTIMISATIONS:
            keep_freed_memory()
        on_stage(stage)

    with new_folder(output, own=FILES, overwrite=overwrite) as temporary:
        registered = interruptible(
            lambda: register_files(
                **files.given(),
                fixed_series=files.fixed_series,
                moving_series=files.moving_series,
                options=options,
                network=network,
                on_stage=begin,
            ),
            device,
        )
        begin("writing")
        interruptible(
            lambda: write_results(
                temporary,
                registered,
                composite=composite,
                preview=preview,
                error=options.assess == "full",
                report=report,
                dicom=dicom,
            ),
            device,
        )
    return registered.summary()
