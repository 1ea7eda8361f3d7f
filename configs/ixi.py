"""The paper's setting on IXI: full width, atlas to subject, 160 x 192 x 224 voxels of 1 mm; images only.

    python train.py --config configs/ixi.py --workdir runs/ixi --config.data.ixi.root=IXI-FOLDER
    python eval.py  (the same arguments)

IXI-FOLDER is the preprocessed data that TransMorph distributes: Train, Val, Test and atlas.pkl. Labels are
used only to score the test. Hardware: one GPU of the A100 class. Result: not yet run (no such GPU was
available).

The network is our default. For the paper's equations as written, add `--config.model.align_features=False
--config.model.position_aware=False --config.model.feature_residual=False
--config.model.scale_region_weights=False --config.model.blend_regions=False`.

Where the data differ from the paper's: TransMorph's split as published, 403 / 58 / 115. The paper says
80 % / 20 %.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    IxiConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(kind="ixi", ixi=IxiConfig(mode="atlas", shape=(160, 192, 224))),
        model=ModelConfig(channels=(32, 64, 128, 256, 512), region_size=24, dtype="bfloat16", remat=True),
        # Section IV-C: weights 1 and 0.1; there are no landmarks. Local NCC trains well; the weights inside
        # eq. 17, 18 are ours.
        loss=LossConfig(similarity=1.0, regularisation=0.1, ncc_window=9),
        optimiser=OptimiserConfig(learning_rate=1e-4, halve_every_epochs=20, epochs=200, batch_size=1),
        run=RunConfig(patience_epochs=20),
    )
