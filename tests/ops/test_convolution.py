import contextlib
import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from jax.experimental.compilation_cache import compilation_cache

from adregnet_jax.errors import UserError
from adregnet_jax.ops.convolution import IMPLEMENTATIONS, check_implementation, conv3d
from adregnet_jax.ops.cpu import budget, folded_convolution, onednn

# volume, output channels: odd and even sizes, sizes below the kernel, one channel, a batch.
CASES = [((2, 5, 3, 4, 1), 2), ((2, 1, 2, 1, 3), 1), ((1, 1, 3, 4, 2), 3), ((1, 3, 4, 5, 2), 3)]


def random_case(shape, out):
    rng = np.random.default_rng(0)
    volume = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return volume, jnp.asarray(rng.normal(size=(3, 3, 3, shape[-1], out)), jnp.float32)


def xla_convolution(volume, kernel):
    return jax.lax.conv_general_dilated(
        volume, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@pytest.fixture
def implementation(request):
    if request.param == "onednn":
        request.getfixturevalue("with_onednn")
    return request.param


EVERY = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
OURS = pytest.mark.parametrize("implementation", ["folded", "onednn"], indirect=True)


@EVERY
@pytest.mark.parametrize(("shape", "out"), CASES)
def test_values_are_those_of_scipy(shape, out, implementation):
    volume, kernel = random_case(shape, out)
    expected = np.zeros((*shape[:-1], out))
    for b in range(shape[0]):
        for c in range(shape[-1]):
            padded = np.pad(volume[b, ..., c], 1)
            for n in range(out):
                expected[b, ..., n] += scipy.signal.correlate(
                    padded, kernel[..., c, n], mode="valid", method="direct"
                )
    # Sums of 27 c products of about 1, in another order.
    np.testing.assert_allclose(conv3d(volume, kernel, implementation=implementation), expected, atol=2e-5)


@EVERY
@pytest.mark.parametrize("ends", [[], [1], [1, 3]], ids=["one part", "two parts", "three parts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_of_parts_are_those_of_the_whole(dtype, ends, implementation):
    volume, kernel = (jnp.asarray(array, dtype) for array in random_case((2, 4, 5, 3, 5), 2))
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 5, 3, 2)), dtype)

    @jax.jit
    def found(parts, kernel, cotangent):
        convolve = functools.partial(conv3d, implementation=implementation)
        result, pull_back = jax.vjp(convolve, parts, kernel)
        to_parts, to_kernel = pull_back(cotangent)
        return result, jnp.concatenate(to_parts, axis=-1), to_kernel

    ours = found(jnp.split(volume, ends, axis=-1), kernel, cotangent)
    exact = [array.astype(jnp.float32) for array in (volume, kernel, cotangent)]
    result, pull_back = jax.vjp(xla_convolution, *exact[:2])
    for a, b in zip(ours, (result, *pull_back(exact[2])), strict=True):
        assert a.dtype == dtype
        scale = float(jnp.abs(b).max())
        # Sums in another order; bfloat16 keeps 8 bits, 2^-8, of up to four partial sums.
        tolerance = 1e-6 if dtype == "float32" else 0.02
        np.testing.assert_allclose(a.astype(np.float32) / scale, b / scale, atol=tolerance)


LIMITS = {
    "at once": ("folded", {}),
    "slice by slice": ("folded", {"folded_sum": 0, "folded_group": 0}),
    "by groups": ("folded", {"folded_sum": 1300, "folded_group": 1300}),
    "gradient by all rows": ("folded", {"one_product_voxels": 0}),
    "gradient by two rows": ("folded", {"one_product_voxels": 0, "folded_gradient_rows": 1300}),
    "gradient by chunks of a slice": ("folded", {"folded_gradient": 0}),
    "gradient by chunks of rows": (
        "folded",
        {"folded_gradient": 1000, "one_product_voxels": 0, "folded_gradient_rows": 1},
    ),
    "oneDNN": ("onednn", {}),
    "oneDNN, gradient by chunks of a slice": ("onednn", {"onednn_chunk": 0}),
    "oneDNN, gradient by chunks": ("onednn", {"onednn_chunk": 4 * 9 * 3 * 4 * 2}),
}


@pytest.fixture
def limited(monkeypatch):
    """Sets limits for the rest of a test."""
    with contextlib.ExitStack() as stack:

        def limit(*, one_product_voxels=None, **limits):
            if one_product_voxels is not None:
                monkeypatch.setattr(folded_convolution, "_ONE_PRODUCT_VOXELS", one_product_voxels)
            stack.enter_context(budget.override(**limits))

        yield limit


@pytest.mark.parametrize(
    ("implementation", "limits"), LIMITS.values(), ids=LIMITS, indirect=["implementation"]
)
@pytest.mark.parametrize(("shape", "out"), [*CASES, ((2, 6, 3, 4, 4), 3)])
def test_values_and_both_gradients_are_those_of_xla(shape, out, implementation, limits, limited):
    limited(**limits)
    volume, kernel = random_case(shape, out)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(*shape[:-1], out)), jnp.float32)

    def value_and_gradients(function):
        result, pullback = jax.vjp(function, volume, kernel)
        return result, *pullback(cotangent)

    convolve = functools.partial(conv3d, implementation=implementation)
    ours = jax.jit(lambda: value_and_gradients(convolve))()
    theirs = jax.jit(lambda: value_and_gradients(xla_convolution))()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("groups", "dtype"), [(0, "float32"), (2, "float32"), (4, "float32"), (4, "bfloat16")]
)
def test_parts_by_groups_are_the_whole_at_once(groups, dtype, limited):
    volume, kernel = random_case((2, 8, 3, 4, 5), 3)
    volume, kernel = jnp.asarray(volume, dtype), jnp.asarray(kernel, dtype)
    expected = xla_convolution(volume.astype(jnp.float32), kernel.astype(jnp.float32))

    columns = 3 * 3 + (5 if dtype == "bfloat16" else 0)
    limit = 2**24 if not groups else 8 // groups * 4 * 3 * 4 * columns
    limited(folded_sum=limit, folded_group=limit)
    folded = functools.partial(conv3d, kernel=kernel, implementation="folded")
    program = jax.jit(jax.vmap(lambda v: folded((v[..., :2], v[..., 2:])))).lower(volume[:, None])
    assert program.as_text().count("stablehlo.while") == (groups > 0)
    # bfloat16 keeps 8 bits: 2^-8 of results of about 10, in three partial sums.
    result = program.compile()(volume[:, None])[:, 0].astype(jnp.float32)
    np.testing.assert_allclose(result, expected, atol=0.15 if dtype == "bfloat16" else 2e-5)


@pytest.mark.parametrize(
    ("dtype", "whole_bytes", "calls"),
    # Of each part its gradient and that of its taps; the parts one by one, or joined.
    [("float32", 2**20, 2 + 4), ("float32", 0, 1 + 4), ("bfloat16", 2**20, 1 + 4)],
)
@pytest.mark.parametrize("chunk_bytes", [0, 2**20], ids=["slice by slice", "at once"])
def test_parts_by_onednn_are_the_whole_also_under_vmap(
    chunk_bytes, dtype, whole_bytes, calls, with_onednn, limited
):
    limited(onednn_chunk=chunk_bytes, onednn_sum=whole_bytes)
    volume, kernel = random_case((2, 8, 3, 4, 5), 3)
    volume, kernel = jnp.asarray(volume, dtype), jnp.asarray(kernel, dtype)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 3, 4, 3)), dtype)

    def both(convolve, volume, cotangent):
        result, pull_back = jax.vjp(convolve, volume, kernel)
        return result, *pull_back(cotangent)

    def of_parts(volume, kernel):
        return conv3d((volume[..., :2], volume[..., 2:]), kernel, implementation="onednn")

    mapped = jax.jit(jax.vmap(lambda v, t: both(of_parts, v[None], t[None])))
    program = mapped.lower(volume, cotangent)
    assert program.as_text().count("@__onednn$convolution") == calls
    result, to_volume, to_kernel = program.compile()(volume, cotangent)
    ours = result[:, 0], to_volume[:, 0], to_kernel.astype(jnp.float32).sum(axis=0)
    exact = [array.astype(jnp.float32) for array in (volume, kernel, cotangent)]
    theirs = jax.vjp(xla_convolution, *exact[:2])
    expected = theirs[0], *theirs[1](exact[2])
    # Rounded to bfloat16 once, at the end: by half of its last bit, at most 2^-8 of the result. The gradient
    # in the kernel is two such, added up.
    for a, b in zip(ours, expected, strict=True):
        scale = float(jnp.abs(b).max())
        rounding = 2**-8 if dtype == "bfloat16" else 0
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=rounding, atol=scale * (rounding + 1e-6))


@OURS
def test_second_derivatives_are_those_of_xla(implementation):
    volume, kernel = random_case((1, 3, 4, 3, 2), 2)

    def gradient_norm(convolve):
        def loss(volume, kernel):
            return jnp.sum(jnp.sin(convolve(volume, kernel)))

        def squares(volume, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(volume, kernel))

        return jax.jit(jax.grad(squares, (0, 1)))(volume, kernel)

    found = gradient_norm(functools.partial(conv3d, implementation=implementation))
    for ours, theirs in zip(found, gradient_norm(xla_convolution), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64")
    or not (0, 8, 2) <= tuple(jax.version.__version_info__[:3]) <= (0, 10, 2),
    reason="jaxlib 0.8.2 to 0.10.2 for Linux on x86_64 have oneDNN",
)
def test_onednn_is_there_where_it_should_be():
    assert onednn.what_is_wrong() is None


@pytest.fixture
def asked_anew():
    """oneDNN is tried again, before and after; JAX's cache on disk is as it was."""
    before = jax.config.values["jax_enable_compilation_cache"]
    onednn._what_is_wrong_with_jaxlib.cache_clear()
    yield
    onednn._what_is_wrong_with_jaxlib.cache_clear()
    assert jax.config.values["jax_enable_compilation_cache"] == before


def test_onednn_is_refused_where_it_was_not_tried(asked_anew, monkeypatch):
    monkeypatch.setattr(onednn, "_TRIED", ((0, 1, 0), (0, 1, 2)))
    with pytest.raises(UserError, match=r"jaxlib 0\.1\.0 to 0\.1\.2 for .*: set model\.convolution=auto"):
        conv3d(*random_case((1, 3, 4, 3, 2), 2), implementation="onednn")


def test_onednn_is_refused_where_it_convolves_wrongly(with_onednn, asked_anew, monkeypatch):
    convolve = onednn.convolve
    monkeypatch.setattr(onednn, "convolve", lambda volume, kernel, *rest: convolve(volume, -kernel, *rest))
    with pytest.raises(UserError, match=r"no oneDNN that convolves: set model\.convolution=auto"):
        conv3d(*random_case((1, 3, 4, 3, 2), 2), implementation="onednn")


def test_onednn_is_refused_on_another_platform(monkeypatch):
    monkeypatch.setattr(onednn, "default_platform", lambda: "gpu")
    with pytest.raises(UserError, match=r"convolves on CPU, and JAX computes on gpu here: set"):
        check_implementation("onednn")


def test_onednn_is_tried_first_also_while_a_function_is_traced(with_onednn):
    onednn._what_is_wrong_with_jaxlib.cache_clear()
    volume, kernel = random_case((1, 3, 4, 3, 2), 2)
    result = jax.jit(jax.vmap(lambda v: conv3d(v, kernel, implementation="onednn")))(volume[None])
    np.testing.assert_allclose(result[0], xla_convolution(volume, kernel), atol=2e-5)


def test_onednn_refuses_what_it_does_not_convolve(with_onednn):
    volume, kernel = random_case((1, 3, 4, 3, 2), 2)
    with pytest.raises(ValueError, match="float32 or bfloat16 alone, got bfloat16, float32"):
        conv3d(jnp.asarray(volume, jnp.bfloat16), kernel, implementation="onednn")


def test_an_implementation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'fast': expected one of auto, folded, onednn, xla"):
        conv3d(*random_case((1, 3, 4, 3, 2), 2), implementation="fast")


def test_programs_with_onednn_stay_out_of_the_cache_on_disk(with_onednn, tmp_path):
    """XLA would write something else than the program."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    volume, kernel = random_case((1, 3, 4, 3, 2), 2)
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        jax.jit(conv3d)(volume, kernel)
        written = len(list(tmp_path.iterdir()))
        assert written
        jax.jit(lambda v, k: 2 * conv3d(v, k, implementation="onednn"))(volume, kernel)
        jax.jit(lambda v, k: 3 * conv3d(v, k, implementation="onednn"))(volume, kernel)
        assert len(list(tmp_path.iterdir())) == written
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@EVERY
def test_the_centre_tap_is_the_identity(implementation):
    volume, _ = random_case((1, 3, 4, 5, 2), 2)
    kernel = jnp.zeros((3, 3, 3, 2, 2)).at[1, 1, 1].set(jnp.eye(2))
    np.testing.assert_array_equal(conv3d(volume, kernel, implementation=implementation), volume)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("volume", "kernel"),
    [((3, 3, 3, 1), (3, 3, 3, 1, 1)), ((1, 3, 3, 3, 2), (3, 3, 3, 1, 1)), ((1, 3, 3, 3, 1), (5, 3, 3, 1, 1))],
)
def test_wrong_shapes_are_refused(volume, kernel):
    with pytest.raises(ValueError, match="kernel"):
        conv3d(jnp.zeros(volume), jnp.zeros(kernel))


@pytest.mark.parametrize(
    ("implementation", "limits"),
    [("folded", {}), ("folded", {"folded_sum": 2**17, "folded_group": 2**17}), ("onednn", {})],
    ids=["at once", "by groups", "oneDNN"],
    indirect=["implementation"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_keep_one_volume_a_layer(dtype, implementation, limits, limited):
    """What the convolution is made of isn't kept from the forward pass on, only what it was given."""
    limited(**limits)
    volume = jax.ShapeDtypeStruct((1, 16, 16, 16, 8), dtype)

    def planned_bytes(layers):
        def loss(kernels, volume):
            for kernel in kernels:
                volume = jnp.tanh(conv3d(volume, kernel, implementation=implementation))
            return jnp.sum(volume.astype(jnp.float32))

        kernels = [jax.ShapeDtypeStruct((3, 3, 3, 8, 8), dtype)] * layers
        memory = jax.jit(jax.grad(loss)).lower(kernels, volume).compile().memory_analysis()
        return memory.temp_size_in_bytes

    a_layer = (planned_bytes(9) - planned_bytes(3)) / 6
    one_volume = volume.size * volume.dtype.itemsize
    # The kernel and its gradient come to 0.05 volumes.
    assert one_volume <= a_layer < 1.2 * one_volume
