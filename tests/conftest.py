"""Settings of all tests, made before JAX is loaded."""

import functools
import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest

from tests.xla_flags import QUICK_TO_COMPILE

# Flags that are already set are left alone, so that a run with optimisations is one variable away.
flags = os.environ.get("XLA_FLAGS", QUICK_TO_COMPILE)
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=4"  # for what is divided among devices
os.environ["XLA_FLAGS"] = flags
# Every worker would take most of a GPU's memory. What is marked gpu starts processes of its own.
os.environ["JAX_PLATFORMS"] = "cpu"

# Most of the time goes into tracing, which allocates millions of small objects. Both settings together save
# a quarter of it: rarer collections of garbage, and no line numbers in what is traced.
gc.set_threshold(200_000, 20, 20)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Every call is checked against the annotations of its function; where they say float, an int will do.
jaxtyping.install_import_hook(
    "adregnet_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)


@pytest.fixture(autouse=True)
def explicit_axes(request):
    """In the tests of these folders, a missing axis is an error. Scalars broadcast as ever."""
    import jax  # after the settings above

    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    with jax.numpy_rank_promotion("raise" if folder in ("ops", "losses", "nn") else "allow"):
        yield


@pytest.fixture
def unchecked_types():
    """Turns run-time checks of types off, for arguments that the package itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def why_no_gpu() -> str | None:
    """Why tests marked gpu can't run here; None if they can."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        return "needs a GPU and the extra cuda12 or cuda13"
    ask = "import jax; jax.devices('gpu')"
    asked = subprocess.run(
        [sys.executable, "-c", ask],
        env=without_platform(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return f"needs a GPU; JAX says: {asked.stderr.strip().splitlines()[-1]}" if asked.returncode else None


def without_platform() -> dict[str, str]:
    """The environment without what keeps JAX on the CPU here."""
    return {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}


@pytest.fixture(scope="session")
def gpu_environment():
    """The environment of a process that runs on a GPU."""
    return without_platform()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch: pip install torch --index-url https://download.pytorch.org/whl/cpu")


@pytest.fixture
def real_data():
    """`real_data("hippocampus")`: that folder of the real data, or a skip that says how to provide it."""

    def folder(name: str) -> Path:
        root = os.environ.get("ADREGNET_TEST_DATA")
        if not (root and (Path(root) / name).is_dir()):
            pytest.skip(
                f"needs {name}/ in the folder that ADREGNET_TEST_DATA names, which is {root or 'not set'}"
            )
        return Path(root) / name

    return folder


@pytest.fixture(params=["cpu", "gpu"])
def both_forms(request):
    """Runs a test with the operations in the form for CPU, and in that for accelerators, here on CPU."""
    from adregnet_jax.ops.cpu import budget  # after the settings above

    with budget.override(platform=request.param):
        yield request.param


@pytest.fixture
def with_onednn():
    """A machine on which oneDNN convolves, or a skip that says why not; it restores the cache on disk."""
    import jax  # after the settings above
    from jax.experimental.compilation_cache import compilation_cache

    from adregnet_jax.ops.cpu import onednn

    if wrong := onednn.what_is_wrong():
        pytest.skip(wrong)
    before = jax.config.values["jax_enable_compilation_cache"]
    yield
    jax.clear_caches()  # what was traced with it would be compiled for the disk
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
