"""The paper's setting on DIR-Lab 4DCT: full width, 1 mm, leave-one-case-out.

    python -m adregnet_jax.data.datasets.dirlab DIR-LAB-FOLDER        (are the cases complete?)
    python train.py --config configs/dirlab.py --workdir runs/dirlab_case1 \
        --config.data.dirlab.root=DIR-LAB-FOLDER --config.data.dirlab.test_case=1
    python eval.py  (the same arguments)

One run per left-out case. Hardware: one GPU of the A100 class. Result: not yet run (the original images
can't be redistributed, and no such GPU was available).

The network is our default. For the paper's equations as written, add `--config.model.align_features=False
--config.model.position_aware=False --config.model.feature_residual=False
--config.model.scale_region_weights=False --config.model.blend_regions=False`.

Where the data differ from the paper's: the test case is never trained on; the grid is 288 voxels wide, since
the paper's 256 mm cut landmarks of case 2 off; `DirLabConfig` has the paper's other preprocessing, `native`.
"""

from adregnet_jax.config import (
    Config,
    DataConfig,
    DirLabConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            kind="dirlab",
            dirlab=DirLabConfig(preprocessing="isotropic", spacing_mm=1.0, shape=(288, 256, 256)),
        ),
        model=ModelConfig(channels=(32, 64, 128, 256, 512), region_size=16, dtype="bfloat16", remat=True),
        # Section IV-C: weights 1, 0.1 and 1. Local NCC trains well; the weights inside eq. 17, 18 are ours.
        loss=LossConfig(similarity=1.0, regularisation=0.1, landmark=1.0, ncc_window=9),
        optimiser=OptimiserConfig(learning_rate=1e-4, halve_every_epochs=20, epochs=200, batch_size=1),
        run=RunConfig(patience_epochs=20),
    )
