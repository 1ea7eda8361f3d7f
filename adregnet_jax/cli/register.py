"""The commands `register` and `batch`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from adregnet_jax.cli.options import (
    AffineOption,
    ApartOption,
    CompositeOption,
    DeviceOption,
    DiffeomorphicOption,
    EffortOption,
    MethodOption,
    ModalityOption,
    OverwriteOption,
    RigidOption,
    SettingsOption,
    SubjectsOption,
    TilesOption,
    WeightsOption,
)
from adregnet_jax.errors import UserError
from adregnet_jax.registration.options import Effort, Method, Modality, Subjects, make_procedure

MaskOption = Annotated[Path | None, typer.Option(metavar="FILE", help="0 where the scan doesn't count.")]
LabelsOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Label map, for Dice.")]
LandmarksOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help=".csv (x,y,z), .fcsv or .mrk.json, for TRE.")
]
MEMORY_ADVICE = (
    "--effort fast takes less, --set search_range_mm=0 does without the search, and scans on a coarser grid "
    "or --device cpu help too"
)


def register(
    fixed: Annotated[Path, typer.Argument(help="The scan that stays: NIfTI, .mha, .nrrd, a DICOM folder.")],
    moving: Annotated[Path, typer.Argument(help="The scan that is warped.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")],
    weights: WeightsOption = None,
    method: MethodOption = Method.both,
    tiles: TilesOption = None,
    modality: ModalityOption = Modality.mono,
    fixed_mask: MaskOption = None,
    moving_mask: MaskOption = None,
    fixed_labels: LabelsOption = None,
    moving_labels: LabelsOption = None,
    fixed_landmarks: LandmarksOption = None,
    moving_landmarks: LandmarksOption = None,
    affine: AffineOption = True,
    rigid: RigidOption = False,
    apart: ApartOption = False,
    diffeomorphic: DiffeomorphicOption = False,
    subjects: SubjectsOption = Subjects.any,
    effort: EffortOption = Effort.default,
    settings: SettingsOption = None,
    device: DeviceOption = None,
    h5: CompositeOption = False,
    preview: Annotated[bool, typer.Option("--preview", help="Write preview.png and nothing else.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Aligns the MOVING scan with the FIXED one; writes images, fields, a report.

    Labels are scored by Dice, landmarks (RAS mm) by their distance; neither has a part in the alignment.
    """
    procedure = make_procedure(
        weights=weights,
        method=method,
        tile=tiles,
        modality=modality,
        affine=affine,
        rigid=rigid,
        apart=apart,
        diffeomorphic=diffeomorphic,
        subjects=subjects,
        effort=effort,
        settings=settings,
        composite=h5,
    )
    from adregnet_jax.cli.execution import (
        interruptible,
        load_network,
        memory_errors_as_user_errors,
        start_jax,
        told_stages,
    )
    from adregnet_jax.registration.files import STAGES, Sources, register_pair
    from adregnet_jax.registration.results import as_text

    sources = Sources(
        fixed=fixed,
        moving=moving,
        fixed_mask=fixed_mask,
        moving_mask=moving_mask,
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
        fixed_landmarks=fixed_landmarks,
        moving_landmarks=moving_landmarks,
    )
    sources.check(lambda name: "--" + name.replace("_", "-"))
    if procedure.method == Method.network and not procedure.affine and (fixed_mask or moving_mask):
        raise UserError("masks are of the affine step and the instance optimisation, and neither is to run")
    chosen = start_jax(device)
    with memory_errors_as_user_errors(MEMORY_ADVICE), told_stages(len(STAGES)) as tell:
        summary = register_pair(
            sources,
            output,
            procedure,
            network=load_network(weights, chosen) if procedure.by_network else None,
            compute=functools.partial(interruptible, device=chosen),
            preview=preview,
            overwrite=overwrite,
            on_stage=tell,
        )
    print(as_text(summary))
    print(f"Written to {output}" + ("/preview.png" if preview else ""))


def batch(
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS.csv", help="One row a pair; paths start there.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="One folder a pair in it.")],
    weights: WeightsOption = None,
    method: MethodOption = Method.both,
    tiles: TilesOption = None,
    modality: ModalityOption = Modality.mono,
    affine: AffineOption = True,
    rigid: RigidOption = False,
    apart: ApartOption = False,
    diffeomorphic: DiffeomorphicOption = False,
    subjects: SubjectsOption = Subjects.any,
    effort: EffortOption = Effort.default,
    settings: SettingsOption = None,
    device: DeviceOption = None,
    h5: CompositeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do the pairs again that are done.")] = False,
) -> None:
    """Registers every pair of a CSV; results.csv has a row each.

    Columns: fixed, moving and, as far as there are any, name, fixed_labels, moving_labels, fixed_landmarks,
    moving_landmarks, fixed_mask, moving_mask. The same command again goes on where it stopped. A pair that
    fails is recorded with its message, the others go on, and the exit status is 1.
    """
    procedure = make_procedure(
        weights=weights,
        method=method,
        tile=tiles,
        modality=modality,
        affine=affine,
        rigid=rigid,
        apart=apart,
        diffeomorphic=diffeomorphic,
        subjects=subjects,
        effort=effort,
        settings=settings,
        composite=h5,
    )
    from adregnet_jax.cli.batch import read_pairs, register_batch
    from adregnet_jax.cli.execution import load_network, start_jax

    rows = read_pairs(pairs)
    chosen = start_jax(device)
    failed = register_batch(
        rows,
        output,
        procedure,
        network=load_network(weights, chosen) if procedure.by_network else None,
        device=chosen,
        overwrite=overwrite,
        memory_advice=MEMORY_ADVICE,
    )
    print(f"{len(rows) - failed} of {len(rows)} pairs registered, see {output / 'results.csv'}")
    if failed:
        raise typer.Exit(1)
