"""The table of byte limits, read for a platform and overridden."""

import jax
import jax.numpy as jnp
import pytest

from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.cpu.budget import LIMITS, Limit, limit_bytes
from adregnet_jax.ops.cpu.chunks import delayed


def test_limits_are_those_of_the_platform_of_the_program(monkeypatch):
    monkeypatch.setitem(LIMITS, "warp", Limit(1, 2, "values", "reason"))
    assert limit_bytes("warp") == 1
    with budget.override(platform="gpu"):
        assert limit_bytes("warp") == 2
        with budget.override(platform="cpu"):
            assert limit_bytes("warp") == 1
        assert limit_bytes("warp") == 2
    with jax.default_device(jax.devices()[1]):
        assert limit_bytes("warp") == 1


def test_overrides_end_with_their_block_also_by_an_error():
    before = limit_bytes("warp"), limit_bytes("dense")
    with pytest.raises(ZeroDivisionError), budget.override(warp=5), budget.override(dense=7):
        assert (limit_bytes("warp"), limit_bytes("dense")) == (5, 7)
        raise ZeroDivisionError
    assert (limit_bytes("warp"), limit_bytes("dense")) == before


def test_a_limit_that_does_not_exist_is_refused():
    with (
        pytest.raises(KeyError, match="no limit warps: the table has attention, exact_attention"),
        budget.override(warps=1),
    ):
        pass


def test_a_traced_function_is_traced_again_with_other_limits():
    function = jax.jit(lambda x: x + limit_bytes("warp") % 1000)
    inside = 7
    outside = limit_bytes("warp") % 1000
    assert int(function(jnp.int32(0))) == outside
    with budget.override(warp=inside):
        assert int(function(jnp.int32(0))) == inside
    assert int(function(jnp.int32(0))) == outside


def test_groups_are_no_larger_than_the_sum_that_makes_them_necessary():
    """Else a convolution just above `folded_sum` would be one group with the cost of a loop."""
    assert LIMITS["folded_group"].cpu <= LIMITS["folded_sum"].cpu


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_delayed_value_is_the_value_and_is_not_made_before_the_input(platform):
    value, later = jnp.asarray([1.0, -2.0]), jnp.asarray([jnp.nan, jnp.inf])
    with budget.override(platform=platform):
        function = jax.jit(delayed)
        assert function(value, later).tolist() == [1.0, -2.0]
        barrier = "optimization_barrier" in function.lower(value, later).as_text()
    assert barrier == (platform == "gpu")
