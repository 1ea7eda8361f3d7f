"""Every setting of a run, as nested dataclasses. Files in `configs/` return one `Config`.

Nothing of the package is imported here: a config can be read without JAX. Any field can be overridden on
the command line by its path, for instance `--config.optimiser.learning_rate=3e-4`.
"""

import dataclasses
from dataclasses import field
from typing import Any


@dataclasses.dataclass
class PhantomConfig:
    """The built-in breathing phantom (`adregnet_jax.data.datasets.phantom`)."""

    shape: tuple[int, int, int] = (64, 48, 48)  # voxels: left-right, front-back, feet-head
    spacing_mm: tuple[float, float, float] = (5.0, 5.0, 6.0)
    landmarks: int = 300  # pairs a case, the number DIR-Lab gives
    train_cases: int = 400
    validation_cases: int = 8
    test_cases: int = 20
    seed: int = 0


@dataclasses.dataclass
class SyntheticConfig:
    """Random anatomy in random contrast (`adregnet_jax.data.datasets.synthetic`)."""

    shape: tuple[int, int, int] = (64, 64, 64)  # voxels
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    largest_motion_mm: float = 30.0
    same_contrast: float = 0.5  # share of the pairs whose scans have one contrast
    match_contrast: bool = False  # brings moving scans to the contrast of the fixed ones, as `register` does
    curriculum_cases: int = 2000  # until training cases are as hard as this says; 0: at once
    train_cases: int = 100_000
    validation_cases: int = 20
    test_cases: int = 50
    seed: int = 0


@dataclasses.dataclass
class DirLabConfig:
    """DIR-Lab 4DCT case folders (`adregnet_jax.data.datasets.dirlab`)."""

    root: str = ""
    cases: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    test_case: int = 1  # left out of training: its TRE is the one reported
    # "leave-one-out", or "paper": the test case is trained on as well, and every table says so.
    protocol: str = "leave-one-out"
    validation_case: int = 0  # stops the training; 0 takes the case after `test_case`
    preprocessing: str = "isotropic"  # or "native": the paper's two descriptions, section IV-A and IV-B
    spacing_mm: float = 1.0  # of the isotropic grid
    # Common grid, cropped around the body, then padded. The paper says 256 x 256 x 256, but the landmarks of
    # case 2 alone span 256.4 mm from left to right.
    shape: tuple[int, int, int] = (288, 256, 256)


@dataclasses.dataclass
class FilesConfig:
    """Pairs of NIfTI files (`adregnet_jax.data.datasets.files`): a CSV with one row a pair, or a folder."""

    pairs: str = ""  # a folder, or a CSV (columns: split, fixed, moving, and optional labels and landmarks)
    # Of a folder (images/, and labels/ of the same names) only, which is split by subject:
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    partners: int = 10  # moving scans drawn for each training subject
    test_partners: int = 1  # moving scans for each test subject


@dataclasses.dataclass
class IxiConfig:
    """IXI brain scans as TransMorph or IXI distributes them (`data.datasets.ixi`, `.ixi_t1t2`)."""

    root: str = ""  # folder with Train, Val, Test and the atlas; of "t1t2": with the files of IXI
    # The atlas moves to each subject; or "pairs": other subjects of the split do; or "t1t2": a T2 to each T1.
    mode: str = "atlas"
    shape: tuple[int, int, int] = (160, 192, 224)  # of every scan, of "t1t2" of every T1; others are refused
    partners: int = 1  # of pairs of different subjects: moving scans drawn for each subject
    # Of "t1t2" only, whose folders have no splits:
    same_subject: bool = True  # the T2 of the same session; or else those of `partners` other subjects
    validation_fraction: float = 0.1
    test_fraction: float = 0.2  # the paper's 80 % / 20 %


@dataclasses.dataclass
class DataConfig:
    kind: str = "phantom"  # phantom, synthetic, dirlab, files or ixi
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    dirlab: DirLabConfig = field(default_factory=DirLabConfig)
    files: FilesConfig = field(default_factory=FilesConfig)
    ixi: IxiConfig = field(default_factory=IxiConfig)
    flip_axes: tuple[int, ...] = ()  # training augmentation: axes that are mirrored half of the time
    exchange: bool = False  # training augmentation: fixed and moving change places half of the time
    workers: int = 1  # threads that read or make the next training batches
    intensity_jitter: float = 0.0  # training augmentation: SD of a random gain and offset of each image


@dataclasses.dataclass(unsafe_hash=True)  # a module that has it may be a static argument of jax.jit
class ModelConfig:
    """AD-RegNet. The defaults are ours; `paper_model()` returns the equations as written."""

    # Or a baseline, voxelmorph-1 or voxelmorph-2: of the other fields `dropout` and `dtype` apply to these.
    architecture: str = "adregnet"
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # one entry a level, fine to coarse
    # Voxels a side of the blocks that the first convolution sees as the channels of one voxel: with 2 the
    # finest level is half the resolution of the scans, and an eighth of the work. A power of two. Not in the
    # paper.
    stem_stride: int = 1
    cross_attention: bool = True  # section III-B2; False: features are concatenated and projected
    regional_attention: bool = True  # section III-B3; False: weight 1 everywhere
    multi_resolution: bool = True  # section III-B4; False: one field, at `finest_level`
    finest_level: int = 0  # of the synthesis; from there the field is upsampled
    heads: int = 1
    global_attention_tokens: int = 4096  # exact attention up to this many voxels a level, else local
    attention_block: int = 512  # keys a block of the exact attention
    neighbourhood_radius: int = 1  # 1: 3x3x3 neighbours
    region_size: int = 16  # voxels of the input: 16 for lungs, 24 for brains in the paper
    cosine_logits: bool = False  # attention compares directions, with a learned scale; eq. 10: plain products
    shared_projection: bool = False  # one map makes queries and keys of both images: like features match
    match_residual: bool = False  # heads correct the expected offset of the match
    # Times that a level but the coarsest refines the displacement, each from where it last ended, by the same
    # parameters: as in RAFT (Teed and Deng, ECCV 2020). Not in the paper; of use with `align_features`.
    refinements: int = 1
    # Learned steps that the finest level goes on, uphill on the local NCC of the images: `nn.ascent`. Not in
    # the paper; for scans of one contrast.
    ascent_steps: int = 0
    ascent_window: int = 5  # of that NCC, in voxels of the scans, an odd number
    align_features: bool = True  # moving features are warped by the coarser field before matching
    position_aware: bool = True  # the expected offset of the match goes along with the matched features
    feature_residual: bool = True  # the field heads see the features as well as the attention
    scale_region_weights: bool = True  # softmax weights times their number: mean weight 1
    blend_regions: bool = True  # weights change linearly between region centres, not in steps
    dropout: float = 0.0  # share of the decoder's channels left out of each training step; not in the paper
    dtype: str = "float32"  # of activations: float32 or bfloat16; parameters stay float32
    remat: bool = False  # recompute blocks and levels in the backward pass: less memory, more time


def paper_model(**changes) -> ModelConfig:
    """The model with the paper's equations as written; `changes` set further fields."""
    as_written = {
        "align_features": False,
        "position_aware": False,
        "feature_residual": False,
        "scale_region_weights": False,
        "blend_regions": False,
    }
    return ModelConfig(**(as_written | changes))


def pretrained_model(**changes) -> ModelConfig:
    """The model of the shipped weights, for a run that starts from them; `changes` set further fields."""
    shipped: dict[str, Any] = {
        "channels": (16, 32, 64),
        "stem_stride": 2,
        "global_attention_tokens": 0,
        "region_size": 16,
        "cosine_logits": True,
        "shared_projection": True,
        "match_residual": True,
    }
    return ModelConfig(**(shipped | changes))


@dataclasses.dataclass
class LossConfig:
    """Weights of eq. 16-18. A term of weight zero is not computed."""

    similarity: float = 1.0  # lambda_sim, eq. 16
    regularisation: float = 0.1  # lambda_reg, eq. 16
    landmark: float = 1.0  # lambda_landmark, eq. 16; pairs without landmarks contribute nothing
    ncc: float = 1.0  # lambda_ncc, eq. 17
    ncc_window: int = 9  # 0: global, as eq. 20 is written; else the width of local windows
    ssim: float = 0.0  # lambda_ssim, eq. 17
    ssim_window: int = 0  # 0: global, as eq. 22 is written; else the width of local Gaussian windows
    mind: float = 0.0  # weight of the squared difference of MIND-SSC: other contrasts, not in the paper
    mutual_information: float = 0.0  # weight of minus the mutual information, likewise
    smoothness: float = 1.0  # lambda_smooth, eq. 18; the penalty is in (mm/mm)^2, mean over voxels
    jacobian: float = 10.0  # lambda_jac, eq. 18
    bending: float = 0.0  # weight of the bending energy, 1/mm^2, not in the paper
    masked: bool = True  # padding has no part in similarity, smoothness and folds; False: it counts
    field: float = 0.0  # weight of the distance from the true displacement, mm, not in the paper
    dice: float = 0.0  # soft Dice of warped labels, not in the paper: weak supervision, in training only
    dice_labels: tuple[int, ...] = ()  # the labels it is the mean over


@dataclasses.dataclass(unsafe_hash=True)  # may be a static argument of jax.jit
class InstanceConfig:
    """Registration of a pair by its images alone (`registration.instance`), with or without a network.

    The displacement lives on control points, between which it is linear along each axis. `factors`, `steps`
    and `strides` have one entry a level, coarse to fine.
    """

    search_range_mm: float = 30.0  # of the discrete search for a start, where none is given; 0: no search
    factors: tuple[int, ...] = (4, 2)  # voxels of a level, in the finest spacing of the scan
    steps: tuple[int, ...] = (60, 25)  # of Adam
    strides: tuple[int, ...] = (2, 2)  # voxels of the level between control points
    learning_rate: float = 0.1  # in voxels of the control grid
    similarity: str = "ncc"  # ncc (local, squared), mind (MIND-SSC), mi (mutual information) or ssd
    ncc_window: int = 5  # voxels of the level, an odd number
    smoothness: float = 0.1  # weight of the squared gradient, (mm/mm)^2
    bending: float = 0.0  # weight of the bending energy, 1/mm^2
    jacobian: float = 10.0  # weight of the depth of folds
    unfold: bool = True  # at the end, smooth the displacement where it folds; the rest keeps its values
    diffeomorphic: bool = False  # a stationary velocity is optimised: no folds, and an exact inverse
    symmetric: bool = False  # with diffeomorphic: the fixed scan is compared on the moving grid as well
    tolerance: float = 0.0  # a pair stops when ten steps lower its loss by less than this share; 0: all steps


def instance_preset(
    effort: str = "default", subjects: str = "any", *, after_network: bool = False
) -> InstanceConfig:
    """Settings of the instance optimisation.

    Args:
      effort: how much time it may take: "fast", "default" or "thorough".
      subjects: what is between the scans. "same": a breath, or time, in one person, whose motion is smooth.
        "different": two people, whose anatomy differs in detail. "any": a compromise.
      after_network: it starts from a network's displacement, so that the time that the search and the coarse
        level would take goes to the finer ones.

    Raises:
      ValueError: another word.
    """
    levels: dict[str, dict] = {
        "fast": {"factors": (4,), "steps": (60,)},
        "default": {"factors": (4, 2), "steps": (60, 25)},
        "thorough": {"factors": (4, 2, 1), "steps": (80, 50, 20)},
    }
    if after_network:
        levels["default"]["steps"] = (20, 44)
        levels["thorough"]["steps"] = (20, 55, 22)
    motion: dict[str, dict] = {
        "same": {"strides": (2, 3, 4), "smoothness": 0.3, "jacobian": 0.0},
        "different": {"strides": (2, 2, 3), "smoothness": 0.05},
        "any": {"strides": (2, 2, 3), "smoothness": 0.1},
    }
    if effort not in levels:
        raise ValueError(f"effort is one of {', '.join(levels)}, not {effort!r}")
    if subjects not in motion:
        raise ValueError(f"subjects is one of {', '.join(motion)}, not {subjects!r}")
    settings = levels[effort] | motion[subjects]
    settings["strides"] = settings["strides"][: len(settings["factors"])]
    return InstanceConfig(**settings)


@dataclasses.dataclass(unsafe_hash=True)
class AffineConfig:
    """Rigid or affine registration of two scans (`adregnet_jax.registration.affine`).

    `spacings_mm` and `steps` have one entry a level, coarse to fine.
    """

    kind: str = "affine"  # affine (12 parameters) or rigid (6)
    similarity: str = "ncc"  # ncc (global) or mi (mutual information)
    spacings_mm: tuple[float, ...] = (12.0, 6.0, 4.0)  # of the grids that are compared
    steps: tuple[int, ...] = (25, 40, 30)  # of Adam; those of the first level from every start
    rotation_starts_deg: float = 25.0  # beside no rotation, turns by this much in 26 directions; 0: none
    min_overlap: float = 0.5  # of the smaller scan, below which similarity counts in proportion


@dataclasses.dataclass
class OptimiserConfig:
    learning_rate: float = 1e-4
    warmup_steps: int = 0  # linear, before the first step at full rate
    halve_every_epochs: int = 20  # 0: constant
    epochs: int = 200
    steps_per_epoch: int = 0  # 0: as many as go through the training pairs once
    batch_size: int = 1  # pairs of an optimiser step
    accumulate: int = 1  # parts in which each device goes through its pairs: less memory, the same step
    gradient_clip: float = 1.0  # global norm; 0: off
    # Of an exponential moving average of the parameters, which is then what is validated and kept as the
    # network; for instance 0.998. 0: none.
    average_decay: float = 0.0


@dataclasses.dataclass
class RunConfig:
    patience_epochs: int = 20  # early stopping on the validation metric; 0: off
    validate_every_epochs: int = 1
    checkpoint_every_steps: int = 200
    log_every_steps: int = 10
    # "check": refuse a training step that does not fit into memory before it runs. "auto": choose
    # model.remat, model.attention_block and model.dtype so that it fits. "off": try.
    memory: str = "check"
    devices: int = 0  # along the `data` mesh axis; 0: the most that divide the batch
    space_devices: int = 1  # that share one volume, a slab along x each
    onednn: bool = False  # on CPU, convolve by oneDNN: faster steps, slower starts (`ops.cpu.onednn`)


@dataclasses.dataclass
class Config:
    seed: int = 0
    # What this run starts from: the best parameters of the run in a workdir, packed weights in a folder, or
    # "pretrained", the shipped weights; of the same model.
    init_from: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    instance: InstanceConfig = field(default_factory=InstanceConfig)
    affine: AffineConfig = field(default_factory=AffineConfig)  # of the affine row of the evaluation
    run: RunConfig = field(default_factory=RunConfig)
