"""The default AdRegNet and its loss in PyTorch, written for speed, for `against_torch.py`.

Modules have the names of the Flax modules, so that `load` finds each parameter by its path. Volumes are
[b, c, x, y, z], contiguous or channels last; displacements are [b, 3, x, y, z] in voxels of their grid. Each
of the following choices was the fastest one when timed on CPU:

- `F.group_norm` with one channel per group, which is the instance norm, does not copy channels-last volumes
  as `F.instance_norm` does;
- the 2x2x2 upsampling as a dense layer and a reshape, not as `F.conv_transpose3d`;
- exact attention by `F.scaled_dot_product_attention`, with positions as additional channels; it doesn't
  return the entropy, which no loss needs;
- neighbourhood attention by 27 shifted views, with custom gradients: autograd pads a view's gradient to the
  whole volume 27 times, and `unfold` copies 27 volumes;
- box sums by products with banded matrices: `F.avg_pool3d` and a convolution with ones are slower.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from adregnet_jax.config import ModelConfig

OFFSETS = list(itertools.product((-1, 0, 1), repeat=3))
SERVED = (  # fields of `ModelConfig` that may differ from their defaults; the last three change no number
    "channels",
    "finest_level",
    "global_attention_tokens",
    "region_size",
    "attention_block",
    "remat",
    "convolution",
)
OUTSIDE = -1e30  # the logit of a neighbour beyond the border


def constant(function):
    """Computes once for the same arguments.

    `functools.cache` won't do: `torch.compile` traces through it and computes again in each call.
    """
    found = {}

    def look_up(*arguments):
        key = (torch.get_default_dtype(), *arguments)
        if key not in found:
            found[key] = function(*arguments)
        return found[key]

    return look_up


def load(module, params):
    """Copies Flax parameters, or gradients of them, into the module of the same name."""
    if hasattr(module, "load"):
        module.load(params)
        return
    for name, below in params.items():
        if isinstance(below, Mapping):
            load(getattr(module, name), below)
        else:
            copy(getattr(module, name), below)


def copy(parameter, array, axes=()):
    values = np.transpose(np.asarray(array), axes) if axes else np.asarray(array)
    with torch.no_grad():
        parameter.copy_(torch.tensor(values).reshape(parameter.shape))


class Conv(nn.Conv3d):
    def __init__(self, inputs, features, bias=True):
        super().__init__(inputs, features, 3, padding=1, bias=bias)

    def load(self, params):
        copy(self.weight, params["kernel"], (4, 3, 0, 1, 2))
        if self.bias is not None:
            copy(self.bias, params["bias"])


class Dense(nn.Linear):
    def load(self, params):
        copy(self.weight, params["kernel"], (1, 0))
        if self.bias is not None:
            copy(self.bias, params["bias"])


class Pointwise(nn.Conv3d):
    """A dense layer on the channels of a volume."""

    def __init__(self, inputs, features, bias=True):
        super().__init__(inputs, features, 1, bias=bias)

    load = Dense.load


class JoinedPointwise(Pointwise):
    """A dense layer on several volumes, as if their channels were concatenated."""

    def forward(self, *volumes):
        return super().forward(torch.cat(volumes, dim=1))


class Norm(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(channels, channels, eps=1e-5)

    def load(self, params):
        copy(self.weight, params["scale"])
        copy(self.bias, params["offset"])


class ConvBlock(nn.Module):
    def __init__(self, inputs, features):
        super().__init__()
        self.conv = Conv(inputs, features, bias=False)
        self.norm = Norm(features)

    def forward(self, volume):
        return F.leaky_relu(self.norm(self.conv(volume)), 0.2, inplace=True)


class Downsample(nn.Conv3d):
    def __init__(self, inputs, features):
        super().__init__(inputs, features, 2, stride=2)

    def load(self, params):
        kernel = np.asarray(params["dense"]["kernel"])
        copy(self.weight, kernel.reshape(2, 2, 2, self.in_channels, self.out_channels), (4, 3, 0, 1, 2))
        copy(self.bias, params["dense"]["bias"])


class Upsample(nn.Module):
    def __init__(self, inputs, features):
        super().__init__()
        self.dense = Dense(inputs, 8 * features)

    def forward(self, volume):
        b, _, nx, ny, nz = volume.shape
        blocks = self.dense(volume.permute(0, 2, 3, 4, 1)).view(b, nx, ny, nz, 2, 2, 2, -1)
        if volume.is_contiguous():
            return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, -1, 2 * nx, 2 * ny, 2 * nz)
        blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, 2 * nx, 2 * ny, 2 * nz, -1)
        return blocks.permute(0, 4, 1, 2, 3)


class Backbone(nn.Module):
    def __init__(self, channels, finest_level):
        super().__init__()
        self.levels, self.finest_level = len(channels), finest_level
        for level, c in enumerate(channels):
            if level:
                self.add_module(f"down_{level}", Downsample(channels[level - 1], c))
            self.add_module(f"encoder_{level}_a", ConvBlock(c if level else 1, c))
            self.add_module(f"encoder_{level}_b", ConvBlock(c, c))
            if finest_level <= level < self.levels - 1:
                self.add_module(f"up_{level}", Upsample(channels[level + 1], c))
                self.add_module(f"decoder_{level}_a", ConvBlock(2 * c, c))
                self.add_module(f"decoder_{level}_b", ConvBlock(c, c))

    def layer(self, name, volume):
        return self.get_submodule(name)(volume)

    def forward(self, image):
        features, encoded = image, []
        for level in range(self.levels):
            if level:
                features = self.layer(f"down_{level}", features)
            features = self.layer(f"encoder_{level}_a", features)
            features = self.layer(f"encoder_{level}_b", features)
            encoded.append(features)
        decoded = [features]
        for level in reversed(range(self.finest_level, self.levels - 1)):
            features = torch.cat([self.layer(f"up_{level}", features), encoded[level]], dim=1)
            features = self.layer(f"decoder_{level}_a", features)
            features = self.layer(f"decoder_{level}_b", features)
            decoded.append(features)
        return decoded


class CrossAttention(nn.Module):
    """Attended features, and the expected offsets of both directions: one head, position-aware."""

    def __init__(self, channels, global_attention_tokens):
        super().__init__()
        self.global_attention_tokens = global_attention_tokens
        self.moving = Pointwise(channels, 3 * channels, bias=False)  # query, key, value
        self.fixed = Pointwise(channels, 3 * channels, bias=False)
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.locality = nn.Parameter(torch.tensor(-2.0))

    def load(self, params):
        for image in ("moving", "fixed"):
            kernels = [params[f"{role}_{image}"]["kernel"] for role in ("query", "key", "value")]
            copy(getattr(self, image).weight, np.concatenate(kernels, axis=1), (1, 0))
        copy(self.alpha, params["alpha"])
        copy(self.locality, params["locality"])

    def forward(self, moving, fixed):
        query_m, key_m, value_m = self.moving(moving).chunk(3, dim=1)
        query_f, key_f, value_f = self.fixed(fixed).chunk(3, dim=1)
        pairs = ((query_m, query_f), (key_f, key_m), (value_f, value_m))
        query, key, value = (torch.cat(pair) for pair in pairs)
        if query[0, 0].numel() <= self.global_attention_tokens:
            attended, offset = attend_globally(query, key, value, F.softplus(self.locality))
        else:
            attended, offset = attend_locally(query, key, value)
        to_fixed, to_moving = attended.chunk(2)
        back, forth = offset.chunk(2)
        return torch.lerp(to_moving, to_fixed, self.alpha), torch.cat([forth, back], dim=1)


def attend_globally(query, key, value, locality):
    b, c, *shape = query.shape
    place, squared = centred_places(tuple(shape))
    place, squared = place.expand(b, -1, -1), squared.expand(b, -1, -1)
    query, key, value = (volume.flatten(2).transpose(1, 2) for volume in (query, key, value))  # [b, n, c]
    # -g |p - q|^2, without the term that is the same for every key, as four more channels.
    query = torch.cat([query, c**0.5 * place, torch.full_like(squared, c**0.5)], dim=-1)
    key = torch.cat([key, 2 * locality * place, -locality * squared], dim=-1)
    # One channel makes values as wide as keys, which the fused kernel requires.
    value = torch.cat([value, place, torch.zeros_like(squared)], dim=-1)
    query, key, value = (tokens.unsqueeze(1) for tokens in (query, key, value))
    result = F.scaled_dot_product_attention(query, key, value, scale=c**-0.5)[:, 0]
    attended, offset = result[..., :c], result[..., c : c + 3] - place
    return (tokens.transpose(1, 2).reshape(b, -1, *shape) for tokens in (attended, offset))


@constant
def centred_places(shape):
    place = identity_grid(shape) - (torch.tensor(shape) - 1) / 2
    place = place.reshape(1, -1, 3)
    return place, (place**2).sum(dim=-1, keepdim=True)


def attend_locally(query, key, value):
    key, value = (F.pad(volume, (1, 1, 1, 1, 1, 1)) for volume in (key, value))
    # [27, b, x, y, z]
    logits = Correlate.apply(query * query.shape[1] ** -0.5, key) + border_bias(tuple(query.shape[2:]))
    weights = logits.softmax(dim=0)
    offset = torch.einsum("nbxyz,nd->bdxyz", weights, torch.tensor(OFFSETS, dtype=torch.get_default_dtype()))
    return Gather.apply(weights, value), offset


def shifted(padded, shape):
    """The 27 views [b, c, x, y, z] of a volume padded by 1."""
    for offset in OFFSETS:
        x, y, z = (slice(1 + o, 1 + o + n) for o, n in zip(offset, shape, strict=True))
        yield padded[:, :, x, y, z]


@constant
def border_bias(shape):
    inside = F.pad(torch.ones(1, 1, *shape), (1, 1, 1, 1, 1, 1))
    return torch.stack([torch.where(view[:, 0] > 0, 0.0, OUTSIDE) for view in shifted(inside, shape)])


class Correlate(torch.autograd.Function):
    """[b, c, x, y, z], and a padded volume -> [27, b, x, y, z]."""

    @staticmethod
    def forward(ctx, query, key):
        ctx.save_for_backward(query, key)
        views = shifted(key, query.shape[2:])
        return torch.stack([(query * view).sum(dim=1) for view in views])

    @staticmethod
    def backward(ctx, gradient):
        query, key = ctx.saved_tensors
        in_query, in_key = torch.zeros_like(query), torch.zeros_like(key)
        shape = query.shape[2:]
        for g, view, sent in zip(gradient, shifted(key, shape), shifted(in_key, shape), strict=True):
            in_query.addcmul_(g[:, None], view)
            sent.addcmul_(g[:, None], query)
        return in_query, in_key


class Gather(torch.autograd.Function):
    """[27, b, x, y, z], and a padded volume -> [b, c, x, y, z]."""

    @staticmethod
    def forward(ctx, weights, value):
        ctx.save_for_backward(weights, value)
        shape = weights.shape[2:]
        # Same memory layout as the inside of the padded volume.
        total = torch.zeros_like(value[:, :, 1:-1, 1:-1, 1:-1])
        for w, view in zip(weights, shifted(value, shape), strict=True):
            total.addcmul_(w[:, None], view)
        return total

    @staticmethod
    def backward(ctx, gradient):
        weights, value = ctx.saved_tensors
        in_value = torch.zeros_like(value)
        in_weights, shape = [], weights.shape[2:]
        for w, view, sent in zip(weights, shifted(value, shape), shifted(in_value, shape), strict=True):
            in_weights.append((gradient * view).sum(dim=1))
            sent.addcmul_(w[:, None], gradient)
        return torch.stack(in_weights), in_value


class RegionalAttention(nn.Module):
    def __init__(self, channels, region):
        super().__init__()
        self.region = region
        self.query, self.key, self.value = (Dense(channels, channels, bias=False) for _ in range(3))
        self.score = Dense(channels, 1)
        self.mask_bias = nn.Parameter(torch.tensor(2.0))

    def forward(self, features):
        region = [min(self.region, n) for n in features.shape[2:]]  # a wider one has the same mean
        means = F.avg_pool3d(features, region, ceil_mode=True, count_include_pad=False)
        b, _, *grid = means.shape
        tokens = means.flatten(2).transpose(1, 2)
        context = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        relative = self.score(context)[..., 0].log_softmax(dim=-1) + math.log(math.prod(grid))
        both = torch.stack([relative.exp(), (relative + self.mask_bias).sigmoid()], dim=1)
        both = both.view(b, 2, *grid)
        if self.region > 1:
            both = upsample(both, [self.region * n for n in grid])
        x, y, z = features.shape[2:]
        weight, mask = both[:, :, :x, :y, :z].chunk(2, dim=1)
        return features * weight, mask


class FieldHead(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block = ConvBlock(channels, channels)
        self.field = Conv(channels, 3)

    def forward(self, features):
        return self.field(self.block(features))


class Fusion(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = Conv(channels + 3, 1)

    def forward(self, candidate, coarser, attended, mask):
        weight = self.weight(torch.cat([attended, coarser], dim=1)).sigmoid() * mask
        return torch.lerp(coarser, candidate, weight)


class Level(nn.Module):
    def __init__(self, channels, region, global_attention_tokens, *, coarsest):
        super().__init__()
        self.cross_attention = CrossAttention(channels, global_attention_tokens)
        self.regional_attention = RegionalAttention(channels, region)
        self.mix = JoinedPointwise(3 * channels + 6, channels)
        self.head = FieldHead(channels)
        if not coarsest:
            self.fusion = Fusion(channels)

    def forward(self, fixed, moving, coarser):
        if coarser is not None:
            coarser, moving = align(moving, coarser)
        attended, offset = self.cross_attention(moving, fixed)
        attended, mask = self.regional_attention(attended)
        candidate = self.head(self.mix(attended, offset, fixed, moving))
        if coarser is None:
            return candidate
        return self.fusion(candidate + coarser, coarser, attended, mask)


class AdRegNet(nn.Module):
    """`config` sets channels, finest_level, global_attention_tokens and region_size; the rest are defaults.

    Sizes must be multiples of 2^(levels - 1).

    Raises:
      ValueError: another field is set, which this network doesn't support.
    """

    def __init__(self, config):
        super().__init__()
        for name, value in dataclasses.asdict(ModelConfig()).items():
            if name not in SERVED and getattr(config, name) != value:
                raise ValueError(f"the network in PyTorch is for {name}={value}, not {getattr(config, name)}")
        self.backbone = Backbone(config.channels, config.finest_level)
        self.levels = list(reversed(range(config.finest_level, len(config.channels))))
        for level in self.levels:
            region = max(1, config.region_size // 2**level)
            coarsest = level == len(config.channels) - 1
            tokens = config.global_attention_tokens
            self.add_module(
                f"level_{level}", Level(config.channels[level], region, tokens, coarsest=coarsest)
            )

    def forward(self, fixed, moving):
        features = self.backbone(torch.cat([fixed, moving]))
        displacement = None
        for level, both in zip(self.levels, features, strict=True):
            displacement = self.get_submodule(f"level_{level}")(*both.chunk(2), displacement)
        return resize_displacement(displacement, fixed.shape[2:])


def upsample(volume, shape):
    return F.interpolate(volume, size=tuple(shape), mode="trilinear", align_corners=False)


def resize_displacement(displacement, shape):
    if displacement.shape[2:] == shape:
        return displacement
    scale = [m / n for n, m in zip(displacement.shape[2:], shape, strict=True)]
    if len(set(scale)) == 1:
        return upsample(displacement, shape) * scale[0]
    return upsample(displacement, shape) * torch.tensor(scale).view(1, 3, 1, 1, 1)


def align(moving, coarser):
    coarser = resize_displacement(coarser, moving.shape[2:])
    return coarser, warp(moving, coarser.detach())


@constant
def identity_grid(shape):
    """[x, y, z, 3]"""
    axes = [torch.arange(n, dtype=torch.get_default_dtype()) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


@constant
def identity_positions(shape):
    """From -1 to 1, in the order z, y, x."""
    return (identity_grid(shape) * position_scale(shape) - 1).flip(-1)


@constant
def position_scale(shape):
    return torch.tensor([2 / max(n - 1, 1) for n in shape])


def warp(volume, displacement):
    shape = tuple(displacement.shape[2:])
    moved = (displacement.permute(0, 2, 3, 4, 1) * position_scale(shape)).flip(-1)
    positions = identity_positions(shape) + moved
    return F.grid_sample(volume, positions, padding_mode="border", align_corners=True)


def total_loss(fixed, warped, displacement, spacing_mm, config):
    """`adregnet_jax.losses.total_loss` with its default terms except landmarks, and without a mask."""
    weighted = (
        (config.similarity * config.ncc, lambda: ncc_loss(fixed, warped, config.ncc_window)),
        (config.regularisation * config.smoothness, lambda: smoothness_loss(displacement, spacing_mm)),
        (config.regularisation * config.jacobian, lambda: jacobian_loss(displacement)),
    )
    return sum(weight * term() for weight, term in weighted if weight)


def ncc_loss(fixed, warped, window):
    fixed, warped = (image - image.mean(dim=(2, 3, 4), keepdim=True) for image in (fixed, warped))
    products = torch.cat([fixed, warped, fixed * warped, fixed**2, warped**2], dim=1)
    shape = tuple(fixed.shape[2:])
    fixed_sum, warped_sum, both, fixed_squared, warped_squared = box_sum(products, window).unbind(dim=1)
    count = window_counts(shape, window)
    covariance = both - fixed_sum * warped_sum / count
    fixed_variance = (fixed_squared - fixed_sum**2 / count).clamp(min=0)
    warped_variance = (warped_squared - warped_sum**2 / count).clamp(min=0)
    return 1 - (covariance**2 / (fixed_variance * warped_variance + 1e-5)).mean()


def box_sum(volume, window):
    along_x, along_y, along_z = (band(n, window) for n in volume.shape[2:])
    volume = volume @ along_z
    volume = torch.einsum("ij,bcxjz->bcxiz", along_y, volume)
    return torch.einsum("ij,bcjyz->bciyz", along_x, volume)


@constant
def band(n, window):
    place = torch.arange(n)
    return ((place[:, None] - place).abs() <= window // 2).to(torch.get_default_dtype())


@constant
def window_counts(shape, window):
    return box_sum(torch.ones(1, 1, *shape), window)[:, 0]


def smoothness_loss(displacement, spacing_mm):
    displacement_mm = displacement * spacing_mm[:, :, None, None, None]
    total = 0
    for axis in range(3):
        squared = displacement_mm.diff(dim=2 + axis).pow(2).sum(dim=1).mean(dim=(1, 2, 3))
        total = total + (squared / spacing_mm[:, axis] ** 2).mean()
    return total


def jacobian_loss(displacement):
    along_x, along_y, along_z = torch.gradient(displacement, dim=(2, 3, 4))
    (xx, yx, zx), (xy, yy, zy), (xz, yz, zz) = (d.unbind(dim=1) for d in (along_x, along_y, along_z))
    xx, yy, zz = 1 + xx, 1 + yy, 1 + zz
    determinant = xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)
    return F.relu(-determinant).mean()
