from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig, paper_model
from adregnet_jax.nn.cross_attention import CrossAttention
from tests.oracles import network as oracle
from tests.random_parameters import random_parameters

SHAPE = (2, 3, 4, 2, 4)


def random_features(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize(
    "config",
    [
        paper_model(attention_block=5),  # global: 24 voxels in five blocks
        paper_model(global_attention_tokens=23),  # one voxel too many: local
        paper_model(heads=2),
        paper_model(heads=2, global_attention_tokens=0),
        ModelConfig(),  # position-aware
        ModelConfig(global_attention_tokens=0, neighbourhood_radius=2),
        ModelConfig(cosine_logits=True, heads=2),
        ModelConfig(cosine_logits=True, global_attention_tokens=0),
        ModelConfig(shared_projection=True, heads=2),
    ],
    ids=[
        "global",
        "local",
        "global_heads",
        "local_heads",
        "global_position",
        "local_radius",
        "global_cosine",
        "local_cosine",
        "global_shared",
    ],
)
def test_cross_attention_equals_the_oracle(config):
    moving, fixed = random_features(1), random_features(2)
    module = CrossAttention(config)
    params = random_parameters(module, moving, fixed)
    match = jax.jit(module.apply)({"params": params}, moving, fixed)
    for b in range(2):
        expected = oracle.cross_attention(
            params, moving[b].astype(np.float64), fixed[b].astype(np.float64), config
        )
        for ours, slow in zip(match, expected, strict=True):
            np.testing.assert_allclose(ours[b], slow, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 4096], ids=["local", "global"])
def test_bfloat16_keeps_offsets_and_the_gradients_of_scalars(tokens):
    """Both are sums in float32: in bfloat16 offsets are rounded with places, and long sums stand still."""
    moving, fixed = jnp.float32(np.random.default_rng(0).normal(1, 1, (2, 1, 16, 12, 10, 4)))

    def outputs(dtype):
        options = {"global_attention_tokens": tokens, "cosine_logits": True, "shared_projection": True}
        module = CrossAttention(ModelConfig(**options, dtype=dtype))
        params = random_parameters(module, moving, fixed)

        def loss(params):
            match: Any = module.apply({"params": params}, moving, fixed)
            return match.features.astype(np.float32).sum() + match.entropy.sum(), match.offset

        gradient, offset = jax.jit(jax.grad(loss, has_aux=True))(params)
        return gradient, offset

    (exact, offset), (gradient, rounded) = outputs("float32"), outputs("bfloat16")
    for name in ("alpha", "scale"):
        np.testing.assert_allclose(gradient[name], exact[name], rtol=0.05)
    # Queries and keys are rounded to 8 bits; so would be places of up to 8 voxels, by 0.03.
    assert np.sqrt(np.mean((rounded - offset) ** 2)) < 0.01


def test_a_shift_is_found_in_both_directions():
    """Anatomy lies one voxel further on in the moving image: fixed voxels look ahead, moving ones back."""
    config = ModelConfig()
    fixed = random_features(0)
    moving = np.roll(fixed, 1, axis=2)
    module = CrossAttention(config)
    params = random_parameters(module, moving, fixed)
    for name in ("query_moving", "query_fixed", "key_moving", "key_fixed"):
        params[name]["kernel"] = 8 * np.eye(4, dtype=np.float32)
    params["locality"] = np.float32(-20)  # none
    unit = [f / np.linalg.norm(f, axis=-1, keepdims=True) for f in (moving, fixed)]
    match = jax.jit(module.apply)({"params": params}, *unit)
    # The last row of the fixed image left the field of view: it is found at the other end.
    np.testing.assert_allclose(np.median(match.offset, axis=(0, 1, 2, 3)), [0, 1, 0, 0, -1, 0], atol=0.1)


@pytest.mark.parametrize("tokens", [0, 24], ids=["local", "global"])
def test_like_features_match_from_the_start(tokens):
    """One map for queries and keys: whatever it is, a voxel is most like its own image."""
    config = ModelConfig(
        cosine_logits=True, shared_projection=True, position_aware=False, global_attention_tokens=tokens
    )
    fixed = np.random.default_rng(0).normal(size=(*SHAPE[:-1], 32)).astype(np.float32)
    moving = np.roll(fixed, 1, axis=2)
    module = CrossAttention(config)
    params = jax.jit(module.init)(jax.random.key(0), moving, fixed)["params"]
    match = jax.jit(module.apply)({"params": params}, moving, fixed)
    np.testing.assert_allclose(np.median(match.offset, axis=(0, 1, 2, 3)), [0, 1, 0, 0, -1, 0], atol=0.15)


def test_locality_keeps_matches_near():
    config = ModelConfig()
    moving, fixed = random_features(1), random_features(2)
    module = CrossAttention(config)
    params = random_parameters(module, moving, fixed)
    near = jax.jit(module.apply)({"params": params | {"locality": np.float32(20)}}, moving, fixed)
    np.testing.assert_allclose(near.offset, np.zeros((*SHAPE[:-1], 6)), atol=1e-3)
    np.testing.assert_allclose(near.entropy, np.zeros(SHAPE[:-1]), atol=1e-3)
