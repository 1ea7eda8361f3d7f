"""Registration of unseen kinds of scans, trained on synthetic anatomy: 128^3 voxels, more channels, on an
A100.

    python train.py --config configs/synthetic.py --workdir runs/synthetic
    adregnet pack runs/synthetic --output weights

`configs/synthetic_cpu.py` at a size for GPUs. The GPU draws the eight pairs of a step itself
(`data.synthetic.on_device`); the field is synthesised at full resolution.

Hardware: meant for one or more A100s, whose number divides batch_size. Never run: time and memory were not
measured; `python -m adregnet_jax.benchmark --config configs/synthetic.py --memory-only` plans the memory.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SyntheticConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="synthetic",
            synthetic=SyntheticConfig(
                shape=(128, 128, 128),
                spacing_mm=(2.0, 2.0, 2.0),
                train_cases=800_000,
                curriculum_cases=40_000,
                on_device=True,
            ),
            flip_axes=(0, 1, 2),
        ),
        # Matches within one voxel at each level: 15 voxels in all.
        model=ModelConfig(
            channels=(32, 64, 128, 256),
            global_attention_tokens=0,
            cosine_logits=True,
            shared_projection=True,
            match_residual=True,
            dtype="bfloat16",
            remat=True,
        ),
        loss=LossConfig(
            ncc_window=9, similarity=0.2, smoothness=0.1, dice=0.5, dice_labels=(1, 2, 3, 4), field=0.3
        ),
        optimiser=OptimiserConfig(
            learning_rate=5e-4,
            warmup_steps=1000,
            halve_every_epochs=20,
            epochs=100,
            steps_per_epoch=1000,
            batch_size=8,
            average_decay=0.9995,
        ),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps=1000),
    )
