"""Registration of unseen kinds of scans, trained on synthetic anatomy on two CPU cores.

    python train.py --config configs/synthetic_cpu.py --workdir runs/synthetic
    adregnet pack runs/synthetic --output weights

No data is read: `adregnet_jax.data.datasets.synthetic` generates new pairs for every step. The same command
continues an interrupted run. The field is synthesised at half the resolution of the grid (`stem_stride`), on
three levels that each match within one voxel: 14 voxels in total.

Because no anatomy occurs twice, the network can only learn to match. With the settings of the other configs,
which learn one anatomy, it learned nothing in 800 steps. Here, similar features match from the start
(`cosine_logits`, `shared_projection`), and the heads correct the field given by the matches
(`match_residual`). The first cases have one contrast and small motions. In pairs with two contrasts, the
moving scan is matched to the contrast of the fixed one, as `register` does.

Hardware: two CPU cores, 0.75 steps per second, two hours in total; the generator keeps up
(`waiting_share` in metrics.jsonl: 0.001). The bundled weights were trained slightly differently:
adregnet_jax/weights/MODEL_CARD.md describes how, and their accuracy.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    OptimiserConfig,
    RunConfig,
    SyntheticConfig,
    pretrained_model,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="synthetic",
            synthetic=SyntheticConfig(
                train_cases=40_000, curriculum_cases=4000, same_contrast=0.6, match_contrast=True
            ),
            flip_axes=(0, 1, 2),
        ),
        model=pretrained_model(),
        # Labels and field are known, so that image terms, of pairs of one contrast, only refine.
        loss=LossConfig(
            ncc_window=5, similarity=0.2, smoothness=0.1, dice=0.5, dice_labels=(1, 2, 3, 4), field=0.3
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            warmup_steps=100,
            halve_every_epochs=4,
            epochs=11,
            steps_per_epoch=500,
            batch_size=2,
            average_decay=0.999,
        ),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps=200),
    )
