"""The memory planner: needed and free memory, its choices, and its messages if nothing fits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from adregnet_jax.config import ModelConfig
from adregnet_jax.errors import UserError
from adregnet_jax.training import memory
from adregnet_jax.training.memory import available_bytes, fitting_step, needed_bytes, recorded_choices

GIB = 2**30


def plan(available, *, choose=False, needs=None, model=None):
    """The chosen model, the printed lines, and the compiled models."""
    needs = needs or {(False, "float32"): 30, (True, "float32"): 20, (True, "bfloat16"): 10}
    said: list[str] = []
    compiled: list[ModelConfig] = []

    def compile_step(model):
        compiled.append(model)
        return GIB * needs[model.remat, model.dtype]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "needed_bytes", lambda step: step)
        found, step = fitting_step(
            model or ModelConfig(), compile_step, available, choose=choose, say=said.append
        )
    assert step == GIB * needs[found.remat, found.dtype]
    return found, said, compiled


@pytest.mark.usefixtures("unchecked_types")  # numbers stand for compiled steps
def test_a_model_that_fits_is_unchanged():
    for available in (None, 30 * GIB):
        model, said, compiled = plan(available, choose=True)
        assert model == ModelConfig() and len(compiled) == 1
        assert "30.0 GiB" in said[0]


@pytest.mark.usefixtures("unchecked_types")
def test_the_first_setting_that_fits_is_chosen():
    model, said, _ = plan(25 * GIB, choose=True)
    assert model == ModelConfig(remat=True)
    assert "30.0 GiB as configured; 20.0 GiB with model.remat=True, 25.0 GiB are free" in said[0]
    model, _, compiled = plan(10 * GIB, choose=True, model=ModelConfig(remat=True))
    assert model == ModelConfig(remat=True, attention_block=128, dtype="bfloat16")
    assert len(compiled) == 3  # what the model has already is not compiled again


def test_a_model_that_does_not_fit_is_refused_with_settings_that_would():
    with pytest.raises(UserError, match=r"takes 30\.0 GiB as configured, 25\.0 GiB are free: it would"):
        plan(25 * GIB)
    with pytest.raises(UserError, match=r"10\.0 GiB with .*bfloat16, and 5\.0 GiB are free: use smaller"):
        plan(5 * GIB, choose=True)


def test_a_resumed_run_keeps_its_choices(tmp_path):
    assert recorded_choices(ModelConfig(heads=2), tmp_path) == ModelConfig(heads=2)
    record = {"config": {"model": dataclasses.asdict(ModelConfig(remat=True, attention_block=7, heads=4))}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    expected = ModelConfig(heads=2, remat=True, attention_block=7)
    assert recorded_choices(ModelConfig(heads=2), tmp_path) == expected


def test_needed_memory_is_that_of_xlas_plan():
    """The result, and a matrix product before it that is too large to be fused."""
    n = 256
    program = jax.jit(lambda x: jnp.sin(x @ x) @ x)
    found = needed_bytes(program.lower(jax.ShapeDtypeStruct((n, n), jnp.float32)).compile())
    assert 2 * 4 * n**2 <= found <= 4 * 4 * n**2
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert needed_bytes(in_place.lower(jax.ShapeDtypeStruct((n, n), jnp.float32)).compile()) < 4 * n**2


def test_free_memory_of_machine_and_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:   3000 kB\n")
    assert memory._available_on_host(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._available_on_host(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory._available_on_host(meminfo, tmp_path) == 4000
    assert memory._available_on_host(tmp_path / "none", tmp_path / "none") is None
    one, four = (available_bytes([jax.devices()[0]] * n) for n in (1, 4))
    assert 0 < four < one
