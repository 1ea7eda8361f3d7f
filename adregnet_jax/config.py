"""Every setting of a run, as nested dataclasses. Each file in `configs/` returns one `Config`.

Any field can be overridden on the command line by its path, for instance
`--config.optimiser.learning_rate=3e-4`. Every `check` raises a `UserError` that names the first field whose
value can't be used; `prefix` precedes that name in the message. Reading a config doesn't import JAX.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from adregnet_jax.errors import UserError

# Generated cases are numbered from 0, 1,000,000 and 2,000,000 in the training, validation and test split:
# changing the size of one split leaves the others as they are.
CASES_PER_SPLIT = 1_000_000


@dataclasses.dataclass
class PhantomConfig:
    """The built-in breathing phantom (`adregnet_jax.data.datasets.phantom`)."""

    shape: tuple[int, int, int] = (64, 48, 48)  # voxels: left-right, front-back, feet-head
    spacing_mm: tuple[float, float, float] = (5.0, 5.0, 6.0)
    landmarks: int = 300  # pairs per case, as many as DIR-Lab gives
    train_cases: int = 400
    validation_cases: int = 8
    test_cases: int = 20
    seed: int = 0

    def check(self, prefix: str = "data.phantom.") -> None:
        expect = functools.partial(_expect, self, prefix)
        expect("shape", min(self.shape) >= 8, "at least 8 voxels along each axis")
        _expect_at_least(self, prefix, 0, "seed")
        _expect_case_counts(self, prefix)


@dataclasses.dataclass
class SyntheticConfig:
    """Random anatomy in random contrast (`adregnet_jax.data.datasets.synthetic`)."""

    shape: tuple[int, int, int] = (64, 64, 64)  # voxels
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    largest_motion_mm: float = 30.0
    same_contrast: float = 0.5  # share of the pairs whose scans have the same contrast
    match_contrast: bool = False  # matches the moving scan's contrast to the fixed scan's, as `register` does
    curriculum_cases: int = 2000  # training cases before full difficulty is reached; 0: from the first one
    # Draw training pairs in JAX on the devices (`adregnet_jax.synthesis`), not in NumPy on the host: other
    # pairs of the same distribution. Validation and test pairs stay the same.
    on_device: bool = False
    train_cases: int = 100_000
    validation_cases: int = 20
    test_cases: int = 50
    seed: int = 0

    def check(self, prefix: str = "data.synthetic.") -> None:
        expect = functools.partial(_expect, self, prefix)
        expect("shape", min(self.shape) >= 16, "at least 16 voxels along each axis")
        expect("spacing_mm", all(0 < mm < math.inf for mm in self.spacing_mm), "mm above 0")
        expect("largest_motion_mm", 0 < self.largest_motion_mm < math.inf, "mm above 0")
        expect("same_contrast", 0 <= self.same_contrast <= 1, "a share from 0 to 1")
        _expect_at_least(self, prefix, 0, "seed", "curriculum_cases")
        _expect_case_counts(self, prefix)


@dataclasses.dataclass
class DirLabConfig:
    """DIR-Lab 4DCT case folders (`adregnet_jax.data.datasets.dirlab`)."""

    root: str = ""
    cases: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    test_case: int = 1  # held out of training; its TRE is the one reported
    # "leave-one-out", or "paper": the network is trained on the test case as well, and every table says so.
    protocol: str = "leave-one-out"
    validation_case: int = 0  # decides when training stops; 0 takes the case after `test_case`
    preprocessing: str = "isotropic"  # or "native": the paper's two descriptions, section IV-A and IV-B
    spacing_mm: float = 1.0  # of the isotropic grid
    # Common grid, cropped around the body, then padded. The paper says 256 x 256 x 256, but the landmarks of
    # case 2 alone span 256.4 mm from left to right. With "native", a depth of 0 fits the deepest case.
    shape: tuple[int, int, int] = (288, 256, 256)

    def check(self, prefix: str = "data.dirlab.") -> None:
        expect = functools.partial(_expect, self, prefix)
        _expect_one_of(self, prefix, "protocol", ("leave-one-out", "paper"))
        _expect_one_of(self, prefix, "preprocessing", ("isotropic", "native"))
        cases = set(self.cases)
        distinct = len(cases) == len(self.cases) >= 3 and cases <= set(range(1, 11))
        expect("cases", distinct, "three or more different numbers from 1 to 10")
        expect("test_case", self.test_case in cases, f"one of {prefix}cases, {self.cases}")
        expect(
            "validation_case",
            self.validation_case in {0, *cases} - {self.test_case},
            f"0, or one of {self.cases} that isn't the test case {self.test_case}",
        )
        native = self.preprocessing == "native"
        expect("shape", min(self.shape[:2]) >= 1 and self.shape[2] >= (not native), "sizes above 0")
        expect("spacing_mm", native or 0 < self.spacing_mm < math.inf, "mm above 0")


@dataclasses.dataclass
class FilesConfig:
    """Pairs of NIfTI files (`adregnet_jax.data.datasets.files`): a CSV with one row per pair, or a folder."""

    pairs: str = ""  # a folder, or a CSV (columns: split, fixed, moving, and optional labels and landmarks)
    # For a folder only (images/, and labels/ with the same names), which is split by subject:
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    partners: int = 10  # moving scans drawn for each training subject
    test_partners: int = 1  # moving scans for each test subject


@dataclasses.dataclass
class IxiConfig:
    """IXI brain scans as TransMorph or IXI distributes them (`data.datasets.ixi`, `.ixi_t1t2`)."""

    root: str = ""  # folder with Train, Val, Test and the atlas; for "t1t2", with the files of IXI
    # "atlas": the atlas is registered to each subject; "pairs": other subjects of the split are; "t1t2": a T2
    # scan is registered to each T1 scan.
    mode: str = "atlas"
    shape: tuple[int, int, int] = (160, 192, 224)  # of every scan ("t1t2": every T1); others are refused
    partners: int = 1  # moving scans drawn for each subject, where pairs are of different subjects
    # For "t1t2" only, whose folders have no splits:
    same_subject: bool = True  # the T2 of the same session; False: those of `partners` other subjects
    validation_fraction: float = 0.1
    test_fraction: float = 0.2  # the paper's 80 % / 20 %

    def check(self, prefix: str = "data.ixi.") -> None:
        _expect_one_of(self, prefix, "mode", ("atlas", "pairs", "t1t2"))


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

    def check(self, prefix: str = "data.") -> None:
        _expect_one_of(self, prefix, "kind", ("phantom", "synthetic", "dirlab", "files", "ixi"))
        _expect_at_least(self, prefix, 1, "workers")
        if self.kind != "files":  # what those settings allow depends on the files
            getattr(self, self.kind).check(f"{prefix}{self.kind}.")


@dataclasses.dataclass(unsafe_hash=True)  # a module that has it may be a static argument of jax.jit
class ModelConfig:
    """AD-RegNet. The defaults are ours; `paper_model()` returns the equations as written."""

    # Or a baseline, voxelmorph-1 or voxelmorph-2, which uses no other field than `dropout`, `dtype` and
    # `convolution`.
    architecture: str = "adregnet"
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # one entry per level, fine to coarse
    # Edge length, in voxels, of the blocks that enter the first convolution as the channels of one voxel: a
    # power of two. With 2, the finest level has half the resolution of the scans and an eighth of the work.
    # Not in the paper.
    stem_stride: int = 1
    cross_attention: bool = True  # section III-B2; False: features are concatenated and projected
    regional_attention: bool = True  # section III-B3; False: weight 1 everywhere
    multi_resolution: bool = True  # section III-B4; False: one field, at `finest_level`
    finest_level: int = 0  # at which the synthesis ends; the field is upsampled from there
    heads: int = 1
    global_attention_tokens: int = 4096  # exact attention on levels of up to this many voxels, else local
    attention_block: int = 512  # keys per block of the exact attention
    neighbourhood_radius: int = 1  # of the local attention; 1: 3x3x3 neighbours
    region_size: int = 16  # voxels of the input: 16 for lungs, 24 for brains in the paper
    cosine_logits: bool = False  # attention compares directions, with a learned scale; eq. 10: plain products
    shared_projection: bool = False  # one map makes queries and keys of both images: like features match
    match_residual: bool = False  # heads correct the expected offset of the match
    # How often each level but the coarsest refines the displacement, starting from its last estimate, with
    # shared parameters, as in RAFT (Teed and Deng, ECCV 2020). Not in the paper; for use with
    # `align_features`.
    refinements: int = 1
    # Learned steps of ascent on the local NCC of the images, after the finest level: `nn.ascent`. Not in the
    # paper; for scans with the same contrast.
    ascent_steps: int = 0
    ascent_window: int = 5  # of that NCC, in voxels of the scans, an odd number
    align_features: bool = True  # moving features are warped by the coarser field before matching
    position_aware: bool = True  # the expected offset of the match is passed on with the matched features
    feature_residual: bool = True  # the field heads see the features as well as the attention
    scale_region_weights: bool = True  # softmax weights times the number of regions: mean weight 1
    blend_regions: bool = True  # weights change linearly between region centres, not in steps
    dropout: float = 0.0  # share of the decoder's channels dropped in each training step; not in the paper
    # float32, tf32 or bfloat16: how activations are stored and multiplied (`nn.precision`). Parameters,
    # sums, displacements and losses are float32 with all of them. On CPU, tf32 is float32.
    dtype: str = "float32"
    remat: bool = False  # recompute blocks and levels in the backward pass: less memory, more time
    # Implementation of the 3x3x3 convolution: auto, folded, onednn or xla (`ops.convolution`). On CPU, onednn
    # has faster training steps than auto and slower starts. The parameters do not depend on it.
    convolution: str = "auto"

    def check(self, prefix: str = "model.") -> None:
        expect = functools.partial(_expect, self, prefix)
        _expect_one_of(self, prefix, "architecture", ("adregnet", "voxelmorph-1", "voxelmorph-2"))
        _expect_at_least(self, prefix, 1, "refinements", "neighbourhood_radius", "attention_block")
        _expect_at_least(self, prefix, 0, "ascent_steps")
        expect("channels", bool(self.channels) and min(self.channels) >= 1, "a number above 0 for each level")
        levels = len(self.channels)
        expect("finest_level", 0 <= self.finest_level < levels, f"one of {levels} levels, from 0")
        power_of_two = self.stem_stride >= 1 and self.stem_stride & (self.stem_stride - 1) == 0
        expect("stem_stride", power_of_two, "a power of two, from 1")
        divides = self.heads >= 1 and all(c % self.heads == 0 for c in self.channels)
        expect("heads", divides, f"a number that divides all {prefix}channels, {self.channels}")
        expect("ascent_window", _is_window(self.ascent_window), "an odd number from 3")
        expect("dropout", 0 <= self.dropout < 1, "a share from 0 to below 1")
        _expect_one_of(self, prefix, "dtype", ("float32", "tf32", "bfloat16"))
        _expect_one_of(self, prefix, "convolution", ("auto", "folded", "onednn", "xla"))


def paper_model(**changes: Any) -> ModelConfig:
    """The model with the paper's equations as written.

    Args:
      changes: further fields of `ModelConfig`.

    Returns:
      The settings, for `make_model`.
    """
    as_written = {
        "align_features": False,
        "position_aware": False,
        "feature_residual": False,
        "scale_region_weights": False,
        "blend_regions": False,
    }
    return ModelConfig(**(as_written | changes))


def pretrained_model(**changes: Any) -> ModelConfig:
    """The model of the bundled weights, for a run that starts from them; `changes` set further fields."""
    bundled: dict[str, Any] = {
        "channels": (16, 32, 64),
        "stem_stride": 2,
        "global_attention_tokens": 0,
        "region_size": 16,
        "cosine_logits": True,
        "shared_projection": True,
        "match_residual": True,
    }
    return ModelConfig(**(bundled | changes))


@dataclasses.dataclass
class LossConfig:
    """Weights of eq. 16-18. A term with weight zero is not computed."""

    similarity: float = 1.0  # lambda_sim, eq. 16
    regularisation: float = 0.1  # lambda_reg, eq. 16
    landmark: float = 1.0  # lambda_landmark, eq. 16; pairs without landmarks contribute nothing
    ncc: float = 1.0  # lambda_ncc, eq. 17
    ncc_window: int = 9  # 0: global, as eq. 20 is written; else the width of local windows
    ssim: float = 0.0  # lambda_ssim, eq. 17
    ssim_window: int = 0  # 0: global, as eq. 22 is written; else the width of local Gaussian windows
    mind: float = 0.0  # weight of the squared difference of MIND-SSC: for other contrasts, not in the paper
    mutual_information: float = 0.0  # weight of the negative mutual information, likewise
    smoothness: float = 1.0  # lambda_smooth, eq. 18; the penalty is in (mm/mm)^2, mean over voxels
    jacobian: float = 10.0  # lambda_jac, eq. 18
    bending: float = 0.0  # weight of the bending energy, 1/mm^2, not in the paper
    masked: bool = True  # similarity, smoothness and folds leave padding out; False: they include it
    field: float = 0.0  # weight of the distance from the true displacement, mm, not in the paper
    dice: float = 0.0  # weight of the soft Dice of warped labels: weak supervision, not in the paper
    dice_labels: tuple[int, ...] = ()  # labels whose Dice is averaged

    def check(self, prefix: str = "loss.") -> None:
        labelled = self.dice <= 0 or bool(self.dice_labels)
        _expect(self, prefix, "dice_labels", labelled, f"labels for {prefix}dice, as in (1, 2)")


@dataclasses.dataclass(unsafe_hash=True)  # may be a static argument of jax.jit
class InstanceConfig:
    """Registration of a pair from its images alone (`registration.instance`), with or without a network.

    The displacement is given at control points and interpolated linearly between them. `factors`, `steps` and
    `strides` have one entry per level, coarse to fine.
    """

    search_range_mm: float = 30.0  # of the discrete search for a start, where none is given; 0: no search
    factors: tuple[int, ...] = (4, 2)  # voxel size of a level, in multiples of the scan's finest spacing
    steps: tuple[int, ...] = (60, 25)  # of Adam
    strides: tuple[int, ...] = (2, 2)  # voxels of the level between control points
    learning_rate: float = 0.1  # in voxels of the control grid
    similarity: str = "ncc"  # ncc (local, squared), mind (MIND-SSC), mi (mutual information) or ssd
    ncc_window: int = 5  # voxels of the level, an odd number
    ncc_floor: float = 0.05  # contrast of a window, as a share of the scan's, below which its NCC fades
    smoothness: float = 0.1  # weight of the squared gradient, (mm/mm)^2
    bending: float = 0.0  # weight of the bending energy, 1/mm^2
    jacobian: float = 10.0  # weight of the depth of folds
    least_jacobian: float = 0.37  # determinants below it count as folds, by what they lack
    unfold: bool = True  # at the end, smooth the displacement where it folds, and only there
    diffeomorphic: bool = False  # a stationary velocity is optimised: no folds, and an exact inverse
    symmetric: bool = False  # with diffeomorphic: the scans are compared on the moving grid as well
    tolerance: float = 0.0  # a pair stops when ten steps lower its loss by less than this share; 0: all steps

    def check(self, prefix: str = "instance.") -> None:
        expect = functools.partial(_expect, self, prefix)
        expect("factors", bool(self.factors), "one entry per level, and at least one level")
        for name in ("steps", "strides"):
            one_per_level = len(getattr(self, name)) == len(self.factors)
            expect(name, one_per_level, f"one entry per level, as many as {prefix}factors {self.factors}")
        expect("factors", min(self.factors) >= 1, "1 or more for each level")
        expect("strides", min(self.strides) >= 1, "1 or more for each level")
        expect("steps", min(self.steps) >= 0, "0 or more for each level")
        for name in ("search_range_mm", "ncc_floor", "smoothness", "bending", "jacobian", "tolerance"):
            expect(name, 0 <= getattr(self, name) < math.inf, "a number from 0")
        expect("least_jacobian", 0 <= self.least_jacobian < 1, "a number from 0 to below 1")
        _expect_one_of(self, prefix, "similarity", ("ncc", "mind", "mi", "ssd"))
        expect("ncc_window", _is_window(self.ncc_window), "an odd number from 3")
        expect("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0")
        invertible = not self.symmetric or self.diffeomorphic
        expect("symmetric", invertible, f"False, or {prefix}diffeomorphic=True, whose maps have an inverse")


def instance_preset(
    effort: str = "default", subjects: str = "any", *, after_network: bool = False
) -> InstanceConfig:
    """Settings of the instance optimisation.

    Args:
      effort: how much time it may take: "fast", "default" or "thorough".
      subjects: "same": two scans of one person, whose motion, by breathing or over time, is smooth.
        "different": scans of two people, whose anatomy differs in detail. "any": a compromise.
      after_network: it starts from a network's displacement, so the time for the search and the coarse level
        goes to the finer levels.

    Returns:
      The settings, which `dataclasses.replace` varies.

    Raises:
      ValueError: `effort` or `subjects` is unknown.
    """
    levels: dict[str, dict[str, Any]] = {
        "fast": {"factors": (4,), "steps": (60,)},
        "default": {"factors": (4, 2), "steps": (60, 25)},
        "thorough": {"factors": (4, 2, 1), "steps": (80, 50, 20)},
    }
    if after_network:
        levels["default"]["steps"] = (20, 44)
        levels["thorough"]["steps"] = (20, 55, 22)
    motion: dict[str, dict[str, Any]] = {
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

    `voxels` and `steps` have one entry per level, coarse to fine. The first of several levels is rigid, and
    compares the scans as a whole.
    """

    kind: str = "affine"  # affine (12 parameters), similarity (7: rigid and one scale) or rigid (6)
    similarity: str = "ncc"  # ncc (local after the first level) or nmi (normalised mutual information)
    voxels: tuple[int, ...] = (16, 32, 64)  # along the edge of a cube as large as the smaller scan
    steps: tuple[int, ...] = (25, 40, 30)  # of Adam; on the first level, from every start
    rotation_starts_deg: float = 25.0  # further starts, turned by this much in 26 directions; 0: none
    min_overlap: float = 0.5  # of the smaller scan; with less, similarity counts in proportion
    max_stretch: float = 1.5  # by which any length may grow or shrink
    determinants: tuple[float, float] = (0.5, 2.0)  # beyond, the map is refused, and a rigid one is sought

    def check(self, prefix: str = "affine.") -> None:
        expect = functools.partial(_expect, self, prefix)
        _expect_one_of(self, prefix, "kind", ("rigid", "similarity", "affine"))
        _expect_one_of(self, prefix, "similarity", ("ncc", "nmi"))
        expect("voxels", bool(self.voxels), "one entry per level, and at least one level")
        one_per_level = len(self.steps) == len(self.voxels)
        expect("steps", one_per_level, f"one entry per level, as many as {prefix}voxels {self.voxels}")
        expect("voxels", min(self.voxels) >= 4, "4 or more for each level")
        expect("steps", min(self.steps) >= 0, "0 or more for each level")
        expect("rotation_starts_deg", 0 <= self.rotation_starts_deg < 180, "degrees from 0 to below 180")
        expect("min_overlap", 0 < self.min_overlap <= 1, "a share above 0, up to 1")
        expect("max_stretch", 1 <= self.max_stretch <= 4, "a factor from 1 to 4")
        within = len(self.determinants) == 2 and 0 < self.determinants[0] <= 1 <= self.determinants[1]
        expect("determinants", within, "two factors, above 0 to 1 and from 1")


@dataclasses.dataclass
class OptimiserConfig:
    learning_rate: float = 1e-4
    warmup_steps: int = 0  # linear, before the first step at full rate
    halve_every_epochs: int = 20  # 0: constant
    epochs: int = 200
    steps_per_epoch: int = 0  # 0: as many as one pass over the training pairs takes
    batch_size: int = 1  # pairs per optimiser step
    accumulate: int = 1  # parts in which each device processes its pairs: less memory, the same step
    gradient_clip: float = 1.0  # global norm; 0: off
    # Decay of an exponential moving average of the parameters, for instance 0.998; the average is then
    # validated and kept as the network. 0: none.
    average_decay: float = 0.0

    def check(self, prefix: str = "optimiser.") -> None:
        expect = functools.partial(_expect, self, prefix)
        _expect_at_least(self, prefix, 1, "epochs", "batch_size", "accumulate")
        _expect_at_least(self, prefix, 0, "gradient_clip", "halve_every_epochs", "steps_per_epoch")
        expect("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0")
        expect("average_decay", 0 <= self.average_decay < 1, "a number from 0 (no average) to below 1")


@dataclasses.dataclass
class RunConfig:
    patience_epochs: int = 20  # early stopping on the validation metric; 0: off
    validate_every_epochs: int = 1
    checkpoint_every_steps: int = 200
    log_every_steps: int = 10
    # Training steps in one program, where it draws its own pairs (`data.synthetic.on_device`): a GPU then
    # doesn't wait for the host between steps. It divides the steps between logs, checkpoints and epochs.
    steps_per_dispatch: int = 1
    # "check": refuse a training step that does not fit into memory before it runs. "auto": choose
    # model.remat, model.attention_block and model.dtype so that it fits. "off": try.
    memory: str = "check"
    devices: int = 0  # along the `data` mesh axis; 0: the most that divide the batch
    space_devices: int = 1  # devices that share one volume, each with a slab along x

    def check(self, prefix: str = "run.") -> None:
        at_least_one = ("space_devices", "validate_every_epochs", "checkpoint_every_steps", "log_every_steps")
        _expect_at_least(self, prefix, 1, *at_least_one, "steps_per_dispatch")
        _expect_one_of(self, prefix, "memory", ("check", "auto", "off"))


@dataclasses.dataclass
class Config:
    seed: int = 0
    # Start of this run: the best parameters of another run (its workdir), packed weights (their folder), or
    # "pretrained", the bundled weights. The model must be the same.
    init_from: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    instance: InstanceConfig = field(default_factory=InstanceConfig)
    affine: AffineConfig = field(default_factory=AffineConfig)  # for the affine row of the evaluation
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Checks what a training uses: all but `instance` and `affine`."""
        for section in (self.data, self.model, self.loss, self.optimiser, self.run):
            section.check()
        if self.loss.field > 0 and self.data.exchange:
            raise UserError(
                "loss.field and data.exchange exclude each other: the true displacement of scans that have"
                " changed places is unknown; turn one of them off"
            )
        if self.run.steps_per_dispatch > 1:
            self._check_dispatches()

    @property
    def draws_on_device(self) -> bool:
        """Whether the program of a training step draws its own pairs."""
        return self.data.kind == "synthetic" and self.data.synthetic.on_device

    def _check_dispatches(self) -> None:
        steps = self.run.steps_per_dispatch
        if not self.draws_on_device:
            raise UserError(
                f"run.steps_per_dispatch is {steps}: expected 1, unless pairs are drawn on the device"
                " (data.kind=synthetic with data.synthetic.on_device=True)"
            )
        epoch = self.optimiser.steps_per_epoch or math.ceil(
            self.data.synthetic.train_cases / self.optimiser.batch_size
        )
        intervals = {
            "the steps of an epoch": epoch,
            "run.log_every_steps": self.run.log_every_steps,
            "run.checkpoint_every_steps": self.run.checkpoint_every_steps,
        }
        for name, interval in intervals.items():
            if interval % steps:
                raise UserError(
                    f"run.steps_per_dispatch is {steps}: expected a number that divides {name}, {interval}"
                )


def _expect(config: Any, prefix: str, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{prefix}{name} is {getattr(config, name)!r}: expected {expected}")


def _expect_at_least(config: Any, prefix: str, least: int, *names: str) -> None:
    for name in names:
        _expect(config, prefix, name, getattr(config, name) >= least, f"{least} or more")


def _expect_one_of(config: Any, prefix: str, name: str, choices: Sequence[str]) -> None:
    expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
    _expect(config, prefix, name, getattr(config, name) in choices, expected)


def _expect_case_counts(config: PhantomConfig | SyntheticConfig, prefix: str) -> None:
    for name in ("train_cases", "validation_cases", "test_cases"):
        within = 0 <= getattr(config, name) <= CASES_PER_SPLIT
        # With more, a split would contain cases of the next one.
        _expect(config, prefix, name, within, f"a number from 0 to {CASES_PER_SPLIT}")


def _is_window(width: int) -> bool:
    return width >= 3 and width % 2 == 1
