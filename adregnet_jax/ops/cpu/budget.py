"""Byte limits above which operations process a volume in chunks or blocks: one table for all of them.

An operation reads its limit while it is traced. The limits change memory and time; results change by rounding
at most, because sums are taken in another order.

Two sizes recur. A block of a few MiB is still in the cache when it is read again. Chunks of tens to hundreds
of MiB are small next to one volume of features of a large scan (840 MiB for 160 x 192 x 224 voxels with 32
channels in float32), so they contribute little to the peak of memory.

On accelerators each turn of a loop is a launch, so volumes are divided only where a part of them would take
gigabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

MIB = 2**20
GIB = 2**30


class Limit(NamedTuple):
    """A row of the table: bytes on CPU and on accelerators, their meaning, and the reason for their value."""

    cpu: int
    accelerator: int
    bounds: str
    reason: str


LIMITS = {
    "attention": Limit(
        256 * MIB,
        4 * GIB,
        "logits, weights, queries, keys and values of one chunk of neighbourhood attention, as float32",
        "small next to the features; a quarter of it would save 0.2 of 3.3 GB on each of eight devices that"
        " share a volume of 256 x 192 x 160",
    ),
    "exact_attention": Limit(
        0,
        GIB,
        "logits of exact attention that are in memory at once; more are made block by block",
        "on CPU, blocks are faster whatever their number; on a GPU, a loop waits for the launch of each step",
    ),
    "warp": Limit(
        256 * MIB,
        4 * GIB,
        "values at the eight corners of one chunk of linear samples of features, as float32",
        "small next to the features",
    ),
    "dense": Limit(
        64 * MIB,
        4 * GIB,
        "inputs and outputs of one chunk of a dense layer, of down- or of upsampling, as float32",
        "small next to the features, several of which are inputs at once",
    ),
    "instance_norm": Limit(
        64 * MIB,
        16 * GIB,
        "terms of one chunk of the sums over voxels in instance normalisation, as float32",
        "small next to the features",
    ),
    "recomputed_argument": Limit(
        64 * MIB,
        4 * GIB,
        "an argument, as float32, that a recomputed module copies to delay it until the gradient is there",
        "most layers read larger ones chunk by chunk, so a copy would be one more whole volume",
    ),
    # The convolutions below run on CPU only: they have one value on all platforms.
    "folded_sum": Limit(
        16 * MIB,
        16 * MIB,
        "what the slices of a folded convolution add to each other; more is added up group by group",
        "chosen together with `folded_group`, not measured by itself",
    ),
    "folded_group": Limit(
        4 * MIB,
        4 * MIB,
        "what one group of slices adds; at most as much as `folded_sum`",
        "in the cache when it is read again: 26.7 ms, not 33.5, for 64^3 voxels, 16 channels, two cores",
    ),
    "folded_gradient": Limit(
        256 * MIB,
        256 * MIB,
        "one chunk of the volume and of the output's gradient, as float32, in a kernel gradient",
        "small next to the features",
    ),
    "folded_gradient_rows": Limit(
        4 * MIB,
        4 * MIB,
        "about the shifted copies of a few rows in one product of a kernel gradient",
        "products of 1, 2, 4 and 16 MiB: 154, 141, 130 and 130 ms for 64^3 voxels of 32 channels, two cores",
    ),
    "onednn_chunk": Limit(
        16 * MIB,
        16 * MIB,
        "what is converted to float32, joined or shifted at once for a convolution by oneDNN",
        "about what the shared cache of the cores holds",
    ),
    "onednn_sum": Limit(
        256 * MIB,
        256 * MIB,
        "a result to which oneDNN adds the convolution of a further part; it exists twice meanwhile",
        "twice this is small next to the features; larger parts are joined chunk by chunk",
    ),
}

_overrides: dict[str, int] = {}
_platform: str | None = None


def limit_bytes(name: str) -> int:
    """Bytes of the limit `name` on the platform that programs are traced for."""
    if name in _overrides:
        return _overrides[name]
    limit = LIMITS[name]
    return limit.cpu if traces_for_cpu() else limit.accelerator


def traces_for_cpu() -> bool:
    """Whether programs are traced for CPU: where operations have two forms, it chooses between them."""
    return (_platform or default_platform()) == "cpu"


def default_platform() -> str:
    """The platform of JAX's default device: "cpu", "gpu" or "tpu"."""
    device = jax.config.values["jax_default_device"]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


@contextlib.contextmanager
def override(*, platform: str | None = None, **limits: int) -> Iterator[None]:
    """Sets other limits for programs that are traced inside the `with` block.

    JAX's caches are cleared at both ends of the block, because their keys do not include the limits.

    Args:
      platform: take the table's values for this platform, for instance "gpu" to compile for one from here.
      limits: bytes by the names of the table.

    Raises:
      KeyError: a name that is not in the table.
    """
    global _overrides, _platform
    if unknown := limits.keys() - LIMITS.keys():
        raise KeyError(f"no limit {', '.join(sorted(unknown))}: the table has {', '.join(LIMITS)}")
    before = _overrides, _platform
    _overrides, _platform = _overrides | limits, platform or _platform
    jax.clear_caches()
    try:
        yield
    finally:
        _overrides, _platform = before
        jax.clear_caches()
