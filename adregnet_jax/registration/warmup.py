"""Compiles the programs of a registration ahead, for scans of about one size."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from scipy import ndimage

from adregnet_jax.config import InstanceConfig
from adregnet_jax.data.io.images import Image
from adregnet_jax.registration import ladder
from adregnet_jax.registration.assessment.assess import assess_measured
from adregnet_jax.registration.evidence import weigh_evidence
from adregnet_jax.registration.instance import compile_on_rungs
from adregnet_jax.registration.options import RegistrationOptions
from adregnet_jax.registration.scans import limit_search, preset_scale, register_scans, scale_lengths
from adregnet_jax.weights.trained_network import TrainedNetwork

COMPILED = "/jax/core/compile/backend_compile_duration"
FROM_CACHE = "/jax/compilation_cache/cache_hits"
STAGES = ("affine", "deformable", "inverse", "scoring", "optimisation")
# Stands in for the optimisation where only the programs around it are wanted.
NO_STEPS = InstanceConfig(search_range_mm=0.0, factors=(8,), steps=(0,), strides=(2,), unfold=False)


@dataclasses.dataclass
class Compilations:
    """Programs that were made ready within a time."""

    programs: int = 0
    from_cache: int = 0  # of these, those that were found in the cache on disk
    seconds: float = 0.0  # of the whole time


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts the programs that JAX compiles, or reads from its cache on disk, inside the block."""
    found = Compilations()

    def add_program(event: str, duration_secs: float, **_: str | int) -> None:
        found.programs += event == COMPILED

    def add_hit(event: str, **_: str | int) -> None:
        found.from_cache += event == FROM_CACHE

    began = time.perf_counter()
    jax.monitoring.register_event_duration_secs_listener(add_program)
    jax.monitoring.register_event_listener(add_hit)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(add_program)
        jax.monitoring.unregister_event_listener(add_hit)
        found.seconds = time.perf_counter() - began


def compile_ahead(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    options: RegistrationOptions,
    network: TrainedNetwork | None = None,
    masks: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Compilations:
    """Compiles what `register_scans` needs for two scans of this size, or of another on the same rungs.

    Args:
      shape: (x, y, z) of both scans.
      spacing_mm: of both scans.
      options: how they will be registered.
      network: the trained network, where the method uses one.
      masks: whether they will come with masks.
      on_stage: called with the name of each stage when it begins.

    Returns:
      The number of programs and the seconds.

    Raises:
      UserError: a shape that the network can't take.
    """
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).random(shape, np.float32), 2)
    affine = np.diag([*spacing_mm, 1.0])
    fixed = Image(blobs, affine, "scan")
    moving = Image(np.roll(blobs, 1, axis=0), affine, "scan")
    mask = Image(np.ones(shape, np.float32), affine, "mask") if masks else None
    instance = options.instance_config
    with count_compilations() as found:
        registered = register_scans(
            fixed,
            moving,
            affine=options.affine_config,
            instance=instance and NO_STEPS,
            network=network if options.by_network else None,
            tile=options.tile,
            modality=options.modality,
            adaptive=False,
            keep=True,
            fixed_mask=mask,
            moving_mask=mask,
            on_stage=on_stage,
        )
        if on_stage:
            on_stage("scoring")
        registered.measurement  # noqa: B018 -- for its programs
        if options.assess != "off":
            assess_measured(
                registered.scans,
                registered.field,
                registered.measurement,
                modality=registered.modality,
                effort=options.assess,
            )
        if instance is not None:
            if on_stage:
                on_stage("optimisation")
            started = options.by_network
            # Across contrasts a foreground takes the place of a mask. The moving scan has a mask of its own
            # unless it covers all of the fixed one.
            fixed_masked = masks or options.modality == "multi"
            scale = preset_scale(spacing_mm)
            spacing_mm = [round(size * scale, 4) for size in spacing_mm]
            instance = limit_search(scale_lengths(instance, scale), shape, spacing_mm)
            for moving_masked in (True,) if masks else (True, False):
                if options.adaptive and instance.similarity == "ncc":
                    weigh_evidence(
                        blobs,
                        moving.values,
                        spacing_mm=spacing_mm,
                        fixed_mask=None,
                        moving_mask=np.ones(shape, np.float32) if moving_masked else None,
                        modality="mono",
                        config=instance,
                    )
                compile_on_rungs(
                    shape,
                    spacing_mm,
                    started=started,
                    fixed_masked=fixed_masked,
                    moving_masked=moving_masked,
                    config=instance,
                )
    return found


def describe_rungs(shape: Sequence[int]) -> str:
    """The sizes along each axis that share their programs with a shape: "153-160 x 177-192 x 209-224"."""
    return " x ".join(f"{_least(ladder.rung(n))}-{ladder.rung(n)}" for n in shape)


def _least(rung: int) -> int:
    """The least size with this rung."""
    least = rung
    while ladder.rung(least - 1) == rung:
        least -= 1
    return least
