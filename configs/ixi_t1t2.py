"""T1 to T2 on IXI: full width, the T2 of each subject is registered to its T1; images only.

    python -m adregnet_jax.data.datasets.prepare_ixi IXI-FOLDER PREPARED --masks MASKS
    python train.py --config configs/ixi_t1t2.py --workdir runs/ixi_t1t2 --config.data.ixi.root=PREPARED
    python eval.py  (the same arguments)

IXI-FOLDER holds IXI-T1 and IXI-T2 as IXI distributes them, MASKS their brain masks. Finally, `prepare_ixi`
prints the shapes it wrote: they follow the axes of the files, and data.ixi.shape must be that of the T1
scans. --config.data.ixi.same_subject=False takes the T2 of other subjects, which must be aligned first.
Hardware: one GPU of the A100 class. Result: not yet run (neither the scans nor such a GPU were available).

The paper gives no loss for two contrasts: eq. 17 compares intensities. Here it is the squared difference of
MIND-SSC.
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
        # The T1 scans of IXI are sagittal: front to back, up and down, side to side.
        data=DataConfig(kind="ixi", ixi=IxiConfig(mode="t1t2", shape=(224, 192, 160))),
        model=ModelConfig(channels=(32, 64, 128, 256, 512), region_size=24, dtype="bfloat16", remat=True),
        loss=LossConfig(similarity=1.0, regularisation=0.1, ncc=0.0, mind=1.0),
        optimiser=OptimiserConfig(learning_rate=1e-4, halve_every_epochs=20, epochs=200, batch_size=1),
        run=RunConfig(patience_epochs=20),
    )
