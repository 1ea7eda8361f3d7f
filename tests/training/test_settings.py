"""Settings that can't be trained are refused before anything is built."""

import pytest

from adregnet_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimiserConfig
from adregnet_jax.errors import UserError
from adregnet_jax.training.loop import check_settings


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (Config(model=ModelConfig(channels=(8, 16), finest_level=2)), "finest_level is 2, .* has 2 levels"),
        (Config(model=ModelConfig(channels=(8, 12), heads=8)), "heads is 8, which does not divide"),
        (
            Config(model=ModelConfig(architecture="voxelmorph")),
            "is 'voxelmorph': it must be adregnet, voxelmorph-1 or voxelmorph-2",
        ),
        (Config(model=ModelConfig(dropout=1.0)), "dropout is 1.0: it must be a share from 0 to below 1"),
        (Config(model=ModelConfig(dtype="float16")), "must be float32 or bfloat16"),
        (Config(model=ModelConfig(stem_stride=0)), "stem_stride is 0: it must be a power of two"),
        (Config(model=ModelConfig(stem_stride=3)), "stem_stride is 3: it must be a power of two"),
        (Config(optimiser=OptimiserConfig(steps_per_epoch=-1)), "steps_per_epoch is -1: from 0"),
        (Config(loss=LossConfig(field=1.0), data=DataConfig(exchange=True)), "exclude each other"),
        (Config(model=ModelConfig(refinements=0)), "model.refinements must be at least 1, it is 0"),
        (Config(model=ModelConfig(ascent_steps=-1)), r"ascent_steps is -1: from 0 \(none\)"),
        (Config(model=ModelConfig(ascent_window=4)), "ascent_window is 4: it must be an odd number from 3"),
        (Config(data=DataConfig(workers=0)), "data.workers must be at least 1, it is 0"),
        (Config(model=ModelConfig(neighbourhood_radius=0)), "model.neighbourhood_radius must be at least 1"),
        (Config(model=ModelConfig(attention_block=0)), "model.attention_block must be at least 1"),
        (Config(optimiser=OptimiserConfig(gradient_clip=-1.0)), "optimiser.gradient_clip is -1.0: from 0"),
        (Config(optimiser=OptimiserConfig(halve_every_epochs=-1)), "halve_every_epochs is -1: from 0"),
        (Config(optimiser=OptimiserConfig(epochs=0)), "optimiser.epochs must be at least 1, it is 0"),
    ],
)
def test_unusable_settings_are_one_line(config, told):
    with pytest.raises(UserError, match=told) as raised:
        check_settings(config)
    assert "\n" not in str(raised.value)


def test_the_defaults_are_usable():
    check_settings(Config())
