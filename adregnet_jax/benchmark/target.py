"""Programs for an NVIDIA card that isn't there: XLA's compiler for GPUs needs a description of it, no more.

The compiler comes with the extra `cuda12` or `cuda13`. Autotuning and Triton's matrix products are off, since
they are tried out on the card while compiling. So the programs are close to those of a card, not equal to
them, and compiling takes longer there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import resource
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from adregnet_jax.benchmark.timing import Row
from adregnet_jax.errors import UserError, one_line
from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.slabs import SPACE

COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


class Card(NamedTuple):
    """Public figures of a card."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    float32_units: int  # a multiprocessor
    clock_ghz: float  # boost
    memory_gib: int
    bandwidth_gb_s: int
    l2_mib: int
    shared_kib: int  # a multiprocessor; one block can have all but one


# Whitepapers "NVIDIA A100 Tensor Core GPU Architecture" and "NVIDIA H100 Tensor Core GPU Architecture", and
# the data sheets of A100 80GB SXM and H100 SXM; shared memory: CUDA C++ Programming Guide, "Compute
# Capabilities".
CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 80, 2039, 40, 164),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 80, 3352, 50, 228),
}


def description(card: Card) -> str:
    """A card as the text of XLA's GpuTargetConfigProto.

    The limits of threads, blocks and registers are the same for both compute capabilities (CUDA C++
    Programming Guide). The versions are those of CUDA and cuDNN that programs are compiled for.
    """
    major, minor = card.compute_capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {card.multiprocessors}
  fpus_per_core: {card.float32_units}
  clock_rate_ghz: {card.clock_ghz}
  device_memory_size: {card.memory_gib * 2**30}
  memory_bandwidth: {card.bandwidth_gb_s * 10**9}
  l2_cache_size: {card.l2_mib * 2**20}
  shared_memory_per_core: {card.shared_kib * 2**10}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {(card.shared_kib - 1) * 2**10}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  runtime_version: "12.8.0"
  driver_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{card.name}"
"""


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[Mesh]:
    """A mesh of one card that isn't there, for which functions are traced and compiled in the `with` block.

    Args:
      name: a key of `CARDS`.

    Raises:
      UserError: an unknown card, or no compiler for it.
    """
    if name not in CARDS:
        raise UserError(f"--target is {name!r}: expected one of {', '.join(CARDS)}")
    if not any(map(_is_installed, PLUGINS)):
        raise UserError(
            f"--target {name} needs XLA's compiler for NVIDIA GPUs, which is not installed:"
            " pip install 'adregnet-jax[cuda12]', which needs no GPU"
        )
    jax.config.update("jax_platforms", "cpu")  # without a card, the plugin can't start as a device
    try:
        topology = topologies.get_topology_desc(
            name, platform="cuda", target_config=description(CARDS[name]), topology="1x1x1"
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--target {name}: XLA's compiler for NVIDIA GPUs does not start ({one_line(error)});"
            " reinstall the extra cuda12 for this version of JAX"
        ) from error
    with budget.override(platform="gpu"):
        yield Mesh(np.array(topology.devices[:1]).reshape(1, 1), ("data", SPACE), (AxisType.Auto,) * 2)


def plan(lowered: jax.stages.Lowered) -> tuple[Row, jax.stages.Compiled]:
    """Compiles a program for the card, and counts what it consists of.

    Args:
      lowered: a program that was traced within `compiling_for`.

    Returns:
      Columns of a table, and the compiled program. A kernel is a fusion or a call of a library; one in the
      body of a loop counts once.
    """
    began = cpu_seconds()
    compiled = lowered.compile(COMPILER_OPTIONS)
    seconds = cpu_seconds() - began
    program = compiled.as_text() or ""
    kinds = Counter(re.findall(r"[\])}] (fusion|custom-call|while)\(", program))
    row: Row = {
        "kernels": kinds["fusion"] + kinds["custom-call"],
        "permuting": permuting_kernels(program),
        "loops": kinds["while"],
        "StableHLO lines": lowered.as_text().count("\n"),
        "compile CPU s": round(seconds, 2),
    }
    return row, compiled


def permuting_kernels(program: str) -> int:
    """How many fusions of an optimised program only permute or convert an array, as between two layouts."""
    found = 0
    permuting: set[str] = set()
    for computation in re.split(r"\n(?=\S)", program):  # those that are called come first
        operations = set(re.findall(r"[\])}] ([a-z\-]+)\(", computation))
        only_moves = operations <= {"parameter", "bitcast", "convert", "copy", "transpose"}
        if only_moves and operations & {"copy", "transpose"}:
            permuting.add(computation.split(maxsplit=1)[0])
        found += sum(name in permuting for name in re.findall(r" fusion\(.*calls=(%[\w.\-]+)", computation))
    return found


def cpu_seconds() -> float:
    """Time of all processors that this process and its finished children, such as ptxas, have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of the package `jax_plugins` itself
        return importlib.util.find_spec(module) is not None
    return False
