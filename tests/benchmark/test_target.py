"""Programs for cards that aren't there; the compiler itself is tested where it is installed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adregnet_jax.benchmark import target
from adregnet_jax.errors import UserError
from adregnet_jax.ops.cpu import budget

ROOT = Path(__file__).parents[2]
INSTALLED = any(map(target._is_installed, target.PLUGINS))


@pytest.mark.parametrize(("name", "teraflops"), [("a100", 19.5), ("h100", 67)])
def test_units_and_clock_give_the_float32_rate_of_the_data_sheet(name, teraflops):
    card = target.CARDS[name]
    rate = 2 * card.multiprocessors * card.float32_units * card.clock_ghz / 1000
    assert rate == pytest.approx(teraflops, rel=0.005)


@pytest.mark.parametrize("name", target.CARDS)
def test_a_description_has_each_field_once(name):
    text = target.description(target.CARDS[name])
    assert text.count("{") == text.count("}")
    (of_device,) = re.findall(r"gpu_device_info \{(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    fields = re.findall(r"^  (\w+)", of_device, re.MULTILINE)
    assert len(fields) == len(set(fields)) == 24
    assert f"core_count: {target.CARDS[name].multiprocessors}\n" in text


def test_a_missing_compiler_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(target, "_is_installed", lambda _: False)
    with (
        pytest.raises(UserError, match=r"--target a100 .*adregnet-jax\[cuda12\]"),
        target.compiling_for("a100"),
    ):
        pass
    assert budget.default_platform() == "cpu"


def test_a_plugin_that_does_not_start_is_one_line(monkeypatch):
    def fails(*_args, **_options):
        raise RuntimeError("no such\nlibrary")

    monkeypatch.setattr(target, "_is_installed", lambda _: True)
    monkeypatch.setattr(target.topologies, "get_topology_desc", fails)
    with pytest.raises(UserError, match=r"does not start .no such library."), target.compiling_for("h100"):
        pass


def test_kernels_that_only_permute_are_counted():
    program = """HloModule jit_f
%moves (p: f32[2,3]) -> bf16[3,2] {
  %p = f32[2,3]{1,0} parameter(0)
  %t = f32[3,2]{1,0} transpose(%p), dimensions={1,0}
  ROOT %c = bf16[3,2]{1,0} convert(%t)
}

%adds (p: f32[2,3]) -> f32[3,2] {
  %p = f32[2,3]{1,0} parameter(0)
  %t = f32[3,2]{1,0} transpose(%p), dimensions={1,0}
  ROOT %a = f32[3,2]{1,0} add(%t, %t)
}

ENTRY %main (x: f32[2,3]) -> bf16[3,2] {
  %x = f32[2,3]{1,0} parameter(0)
  %a = f32[3,2]{1,0} fusion(%x), kind=kLoop, calls=%adds
  ROOT %m = bf16[3,2]{1,0} fusion(%x), kind=kInput, calls=%moves, metadata={op_name="f/transpose"}
}
"""
    assert target.permuting_kernels(program) == 1


@pytest.mark.program
@pytest.mark.skipif(not INSTALLED, reason="needs the extra cuda12 or cuda13")
@pytest.mark.parametrize("name", target.CARDS)
def test_a_small_network_is_compiled_for_a_card(name, tmp_path):
    command = [sys.executable, "-m", "adregnet_jax.benchmark", "--config", "configs/ixi.py", "--target", name]
    command += ["--shape", "16", "16", "16", "--config.model.channels=(4,8)", "--total-only"]
    command += ["--json", str(tmp_path / "table.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["machine"]["target"] == target.CARDS[name].name
    kernels = {row["pass"]: row["kernels"] for row in table["rows"]}
    assert 10 < kernels["forward"] < kernels["training step"]
