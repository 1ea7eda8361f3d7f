"""Model FLOPs compared with counts by hand."""

import jax
import jax.numpy as jnp

from adregnet_jax.benchmark.flops import model_flops, module_calls
from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.models import make_model


def images(batch, *shape):
    return [jax.ShapeDtypeStruct((batch, *shape, 1), jnp.float32)] * 2


def by_path(config, batch, *shape):
    calls = module_calls(make_model(config), *images(batch, *shape))
    return {"/".join(call.path): call.flops for call in calls if call.flops}


def test_every_product_of_a_small_network():
    """Two levels of 4x4x2 and 2x2x1 voxels, 2 and 4 channels, one pair; one region."""
    config = ModelConfig(channels=(2, 4), region_size=4, global_attention_tokens=4)
    fine, coarse = 4 * 4 * 2, 2 * 2 * 1
    both = 2  # images, or directions
    assert by_path(config, 1, 4, 4, 2) == {
        "backbone/encoder_0_a/conv": 2 * both * fine * 27 * 1 * 2,
        "backbone/encoder_0_b/conv": 2 * both * fine * 27 * 2 * 2,
        "backbone/down_1": 2 * both * coarse * (8 * 2) * 4,
        "backbone/encoder_1_a/conv": 2 * both * coarse * 27 * 4 * 4,
        "backbone/encoder_1_b/conv": 2 * both * coarse * 27 * 4 * 4,
        "backbone/up_0": 2 * both * coarse * 4 * (8 * 2),
        "backbone/decoder_0_a/conv": 2 * both * fine * 27 * (2 + 2) * 2,
        "backbone/decoder_0_b/conv": 2 * both * fine * 27 * 2 * 2,
        # Queries, keys and values of both images. Exact: every voxel with every one. Local: with 27.
        "level_1/cross_attention": 3 * both * 2 * coarse * 4 * 4 + both * coarse * coarse * 2 * (4 + 4),
        "level_0/cross_attention": 3 * both * 2 * fine * 2 * 2 + both * fine * 27 * 2 * (2 + 2),
        # One region holds all of a level: its query, key and value, and its match with itself.
        "level_0/regional_attention": 3 * 2 * 2 * 2 + 1 * 1 * 2 * (2 + 2),
        "level_1/regional_attention": 3 * 2 * 4 * 4 + 1 * 1 * 2 * (4 + 4),
        "level_0/regional_attention/score": 2 * 1 * 2,
        "level_1/regional_attention/score": 2 * 1 * 4,
        # Attention, six numbers of offset, and the features of both images.
        "level_0/mix": 2 * fine * (2 + 6 + 2 + 2) * 2,
        "level_1/mix": 2 * coarse * (4 + 6 + 4 + 4) * 4,
        "level_0/head/block/conv": 2 * fine * 27 * 2 * 2,
        "level_1/head/block/conv": 2 * coarse * 27 * 4 * 4,
        "level_0/head/field": 2 * fine * 27 * 2 * 3,
        "level_1/head/field": 2 * coarse * 27 * 4 * 3,
        "level_0/fusion/weight": 2 * fine * 27 * (2 + 3) * 1,
    }


def test_pairs_add_up_and_heads_do_not_count():
    config = ModelConfig(channels=(2, 4), region_size=2)
    counts = by_path(config, 1, 8, 6, 4)
    assert {name: 3 * count for name, count in counts.items()} == by_path(config, 3, 8, 6, 4)
    config.heads = 2
    assert counts == by_path(config, 1, 8, 6, 4)
    assert sum(counts.values()) == model_flops(make_model(config), *images(1, 8, 6, 4))


def test_one_map_for_queries_and_keys_takes_two_products_less():
    counts = [
        by_path(ModelConfig(channels=(2,), shared_projection=shared), 1, 8, 6, 4)["level_0/cross_attention"]
        for shared in (False, True)
    ]
    assert counts[0] - counts[1] == 2 * 2 * (8 * 6 * 4) * 2 * 2


def test_regions_attend_to_each_other():
    config = ModelConfig(channels=(2,), region_size=4)
    regions = 3 * 2 * 1  # the last one along an axis may be partial
    projected, attended = 3 * 2 * regions * 2 * 2, regions**2 * 2 * (2 + 2)
    assert by_path(config, 1, 9, 8, 4)["level_0/regional_attention"] == projected + attended


def test_a_network_without_levels():
    counts = by_path(ModelConfig(architecture="voxelmorph-2"), 1, 16, 16, 16)
    assert counts["flow"] == 2 * 16**3 * 27 * 16 * 3
    # Every voxel is convolved, then every second one kept: that is what a stride of 2 costs here.
    assert counts["encoder_0/conv"] == 2 * 16**3 * 27 * 2 * 16
