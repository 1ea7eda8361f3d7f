"""Trouble with devices and their memory, as one line each."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from adregnet_jax.benchmark import __main__ as benchmark
from adregnet_jax.benchmark import measure
from adregnet_jax.errors import UserError
from adregnet_jax.launch.devices import find_device, is_out_of_memory, memory_errors_as_user_errors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken_plugin(monkeypatch):
    """A plugin that does not start, as JAX logs it when it first looks for devices."""
    devices = jax.devices

    def find(platform=None):
        try:
            raise RuntimeError("operation cuInit(0) failed:\nCUDA driver version is insufficient")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Jax plugin configuration error")
        return devices(platform)

    monkeypatch.setattr(jax, "devices", find)


def test_a_plugin_that_does_not_start_is_one_line(broken_plugin, capsys, caplog):
    assert find_device().platform == "cpu"
    said = capsys.readouterr().err
    assert said.startswith("warning: JAX can't use the GPU (operation cuInit(0) failed: CUDA driver")
    assert said.count("\n") == 1 and "cuda12 or cuda13" in said
    assert not caplog.records
    assert find_device("cpu").platform == "cpu"
    assert not capsys.readouterr().err


def test_a_gpu_that_was_asked_for_has_the_reason(broken_plugin):
    with pytest.raises(UserError, match=r"--device gpu: there is no such device; JAX has cpu:0.* \(.*cuInit"):
        find_device("gpu")


def test_without_a_plugin_the_extra_is_named():
    with pytest.raises(UserError, match=r"--device cuda:1: there is no .*adregnet-jax\[cuda12\]"):
        find_device("cuda:1")


def test_a_platform_that_jax_does_not_have_is_one_line():
    command = [sys.executable, "train.py", "--config", "configs/phantom.py", "--workdir", "nowhere"]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 2 and not (ROOT / "nowhere").exists()
    assert done.stderr.startswith("error: JAX_PLATFORMS is cuda, and JAX has no such device (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 9.0GiB"),
        jax.errors.JaxRuntimeError("INTERNAL: Error in a computation: Out of memory allocating 9 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ],
)
def test_lack_of_memory_is_recognised(error):
    assert is_out_of_memory(error)
    with (
        pytest.raises(UserError, match=r"^out of memory: take less$"),
        memory_errors_as_user_errors("take less"),
    ):
        raise error


def test_other_errors_remain():
    with pytest.raises(RuntimeError, match="a mistake"), memory_errors_as_user_errors("take less"):
        raise RuntimeError("a mistake of ours")
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_jax_says_is_recognised():
    with pytest.raises(UserError, match="take less"), memory_errors_as_user_errors("take less"):
        jnp.zeros(2**47).block_until_ready()


@pytest.mark.skipif(sys.platform != "linux", reason="limits on the address space are enforced by Linux")
def test_an_allocation_beyond_a_limit_of_the_system_is_recognised():
    """As with `prlimit --as`."""
    program = """
import resource
import jax.numpy as jnp
from adregnet_jax.launch.devices import memory_errors_as_user_errors

jnp.ones(8).block_until_ready()
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with memory_errors_as_user_errors("take less"):
    jnp.ones(2**29).block_until_ready()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("UserError: out of memory: take less")


def test_the_device_is_named_with_its_memory(monkeypatch):
    class Card:
        platform, device_kind = "gpu", "NVIDIA A2"

        def memory_stats(self):
            return {"bytes_limit": 12 * 2**30}

    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    expected = r"^out of memory on NVIDIA A2, of which JAX may use 12\.0 GiB: take less$"
    with pytest.raises(UserError, match=expected), memory_errors_as_user_errors("take less"):
        raise MemoryError


def test_a_benchmark_beyond_the_memory_is_refused_by_its_plan(monkeypatch, capsys):
    monkeypatch.setattr(measure, "available_bytes", lambda _devices: 2**20)
    monkeypatch.setattr(measure, "matmul_gflops", lambda *_: 1.0)
    options = ["--shape", "32", "32", "32", "--total-only", "--forward-only", "--config.model.channels=(2,)"]
    options += ["--config.model.finest_level=0", "--config.model.cross_attention=False"]
    assert benchmark.main(["--config", str(ROOT / "configs" / "phantom.py"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: total, forward: takes 0.0 GiB by its plan, and 0.0 GiB are free on cpu:")
    assert "--dtype bfloat16" in said and said.count("\n") == 1
