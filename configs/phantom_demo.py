"""Minutes on two CPU cores: a small AD-RegNet on a coarse breathing phantom.

    python train.py --config configs/phantom_demo.py --workdir runs/demo
    python eval.py --config configs/phantom_demo.py --workdir runs/demo

Hardware: two CPU cores, 400 steps in under 8 minutes, 1.5 of them compilation. Measured on 10 held-out pairs:
TRE 9.39 (SD over cases 1.55) mm before, 1.50 (0.45) mm after, no folded voxel; earlier versions, whose sums
round otherwise, came to 1.65 and 1.68.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    InstanceConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    PhantomConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="phantom",
            phantom=PhantomConfig(
                shape=(32, 24, 24),
                spacing_mm=(10.0, 10.0, 12.0),
                train_cases=100,
                validation_cases=4,
                test_cases=10,
            ),
            flip_axes=(0,),
        ),
        model=ModelConfig(channels=(8, 16, 32), global_attention_tokens=512),
        loss=LossConfig(ncc_window=5),
        instance=InstanceConfig(factors=(1,), steps=(40,), strides=(2,), smoothness=0.3),
        optimiser=OptimiserConfig(
            learning_rate=2e-3, warmup_steps=50, halve_every_epochs=2, epochs=8, batch_size=2
        ),
    )
