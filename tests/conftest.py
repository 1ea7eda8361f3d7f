"""Settings of all tests, made before JAX is loaded."""

import os
from pathlib import Path

import pytest

# Tests compile many small programs and run each once: without LLVM's optimisations and XLA's fusion
# emitters they take a fraction of the time. Flags that are already set are left alone, so that a run with
# optimisations is one variable away.
flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=4"  # for what is divided among devices
os.environ["XLA_FLAGS"] = flags


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


@pytest.fixture
def with_onednn():
    """Convolutions by oneDNN in what is traced, or a skip that says why not."""
    from adregnet_jax.errors import UserError  # after the settings above
    from adregnet_jax.ops.cpu.onednn import use_onednn

    try:
        use_onednn()
    except UserError as error:
        pytest.skip(str(error))
    yield
    use_onednn(False)
