"""AD-RegNet on the breathing phantom."""

from adregnet_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    PhantomConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(kind="phantom", phantom=PhantomConfig(train_cases=400), flip_axes=(0,)),
        model=ModelConfig(channels=(8, 16, 32, 64), finest_level=1, global_attention_tokens=1024),
        loss=LossConfig(ncc_window=7),
        optimiser=OptimiserConfig(
            learning_rate=2e-3, warmup_steps=50, halve_every_epochs=1, epochs=3, batch_size=2
        ),
    )
