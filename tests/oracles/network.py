"""AD-RegNet from its equations, one image at a time, in float64. Everything takes the network's parameters.

Volumes are [x, y, z, c]. What the paper leaves open follows the settings of `ModelConfig`.
"""

import itertools

import numpy as np
import scipy.ndimage

from tests.oracles.attention import attend, global_attention, neighbourhood_attention
from tests.oracles.losses import local_squared_ncc_by_warped


def dense(p, features):
    return features @ p["kernel"] + p.get("bias", 0.0)


def convolution(p, volume):
    """3x3x3, zero padding: the sum over taps."""
    padded = np.pad(volume, [(1, 1), (1, 1), (1, 1), (0, 0)])
    x, y, z = volume.shape[:3]
    total = np.zeros((x, y, z, p["kernel"].shape[-1])) + p.get("bias", 0.0)
    for i, j, k in itertools.product(range(3), repeat=3):
        total += padded[i : i + x, j : j + y, k : k + z] @ p["kernel"][i, j, k]
    return total


def instance_norm(p, volume):
    mean, variance = volume.mean(axis=(0, 1, 2)), volume.var(axis=(0, 1, 2))
    return p["scale"] * (volume - mean) / np.sqrt(variance + 1e-5) + p["offset"]


def conv_block(p, volume):
    normalised = instance_norm(p["norm"], convolution(p["conv"], volume))
    return np.where(normalised > 0, normalised, 0.2 * normalised)


def downsample(p, volume):
    """2x2x2 convolution, stride 2; its kernel [2, 2, 2, c, c'] is kept as a matrix."""
    kernel = p["dense"]["kernel"].reshape(2, 2, 2, volume.shape[-1], -1)
    taps = itertools.product(range(2), repeat=3)
    return sum(volume[i::2, j::2, k::2] @ kernel[i, j, k] for i, j, k in taps) + p["dense"]["bias"]


def upsample(p, volume):
    """2x2x2 transposed convolution, stride 2, with a bias for each of the eight places: [c, 2, 2, 2, c']."""
    x, y, z, c = volume.shape
    kernel = p["dense"]["kernel"].reshape(c, 2, 2, 2, -1)
    bias = p["dense"]["bias"].reshape(2, 2, 2, -1)
    result = np.zeros((2 * x, 2 * y, 2 * z, bias.shape[-1]))
    for i, j, k in itertools.product(range(2), repeat=3):
        result[i::2, j::2, k::2] = volume @ kernel[:, i, j, k] + bias[i, j, k]
    return result


def backbone(p, image, config):
    """Eq. 4-7: decoder features, coarse to fine."""
    encoded, features = [], image
    for level in range(len(config.channels)):
        if level > 0:
            features = downsample(p[f"down_{level}"], features)
        features = conv_block(p[f"encoder_{level}_a"], features)
        features = conv_block(p[f"encoder_{level}_b"], features)
        encoded.append(features)
    decoded = [features]
    for level in range(len(config.channels) - 2, config.finest_level - 1, -1):
        features = upsample(p[f"up_{level}"], features)
        features = np.concatenate([features, encoded[level]], axis=-1)
        features = conv_block(p[f"decoder_{level}_a"], features)
        features = conv_block(p[f"decoder_{level}_b"], features)
        decoded.append(features)
    return decoded


def cross_attention(p, moving, fixed, config):
    """Eq. 8-12: A^l, the expected offsets (fixed to moving, and back), the entropy at fixed voxels."""

    def direction(query_of, key_of, query_name, key_name):
        shared = config.shared_projection
        query = query_of @ p["match" if shared else f"query_{query_name}"]["kernel"]
        key = key_of @ p["match" if shared else f"key_{key_name}"]["kernel"]
        value = key_of @ p[f"value_{key_name}"]["kernel"]
        heads = [np.split(features, config.heads, axis=-1) for features in (query, key, value)]
        results = []
        if config.cosine_logits:
            # The logits are the scale times the cosine: attention divides by the root of the channels.
            heads[0], heads[1] = ([x / length(x) for x in features] for features in heads[:2])
            heads[0] = [q * p["scale"] * np.sqrt(q.shape[-1]) for q in heads[0]]
        for q, k, v in zip(*heads, strict=True):
            if np.prod(fixed.shape[:3]) > config.global_attention_tokens:
                results.append(neighbourhood_attention(q, k, v, config.neighbourhood_radius))
            else:
                locality = np.log1p(np.exp(p["locality"])) if config.position_aware else 0.0
                results.append(global_attention(q, k, v, locality))
        attended, offsets, entropies = zip(*results, strict=True)
        return np.concatenate(attended, axis=-1), np.mean(offsets, axis=0), np.mean(entropies, axis=0)

    to_fixed, back, _ = direction(moving, fixed, "moving", "fixed")  # eq. 10
    to_moving, forth, entropy = direction(fixed, moving, "fixed", "moving")  # eq. 11
    attended = p["alpha"] * to_fixed + (1 - p["alpha"]) * to_moving  # eq. 12
    return attended, np.concatenate([forth, back], axis=-1), entropy


def length(features):
    return np.sqrt((features**2).sum(axis=-1, keepdims=True) + 1e-6)


def regional_attention(p, features, region, config):
    """Section III-B3, a region after the other: F' and M^l. Without blending of regions."""
    shape = features.shape[:3]
    corners = list(itertools.product(*(range(0, n, region) for n in shape)))
    boxes = [tuple(slice(corner, corner + region) for corner in position) for position in corners]
    tokens = np.array([features[box].mean(axis=(0, 1, 2)) for box in boxes])
    query, key, value = (tokens @ p[name]["kernel"] for name in ("query", "key", "value"))
    score = np.array([dense(p["score"], attend(q, key, value)[0])[0] for q in query])
    weights = np.exp(score - score.max())
    weights /= weights.sum()

    weighted, mask = np.zeros(features.shape), np.zeros((*shape, 1))
    for box, weight in zip(boxes, weights, strict=True):
        scale = len(boxes) if config.scale_region_weights else 1
        weighted[box] = scale * weight * features[box]
        mask[box] = sigmoid(np.log(len(boxes) * weight) + p["mask_bias"])
    return weighted, mask


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def field_head(p, features):
    """Eq. 13."""
    return convolution(p["field"], conv_block(p["block"], features))


def fusion(p, candidate, coarser, attended, mask):
    """Eq. 14 and 15."""
    logit = convolution(p["weight"], np.concatenate([attended, coarser], axis=-1))
    weight = sigmoid(logit) * mask
    return weight * candidate + (1 - weight) * coarser


def resize_displacement(displacement, shape):
    """Voxel centres aligned, components scaled as the grid is."""
    old = displacement.shape[:3]
    axes = [(np.arange(m) + 0.5) * n / m - 0.5 for m, n in zip(shape, old, strict=True)]
    coordinates = np.meshgrid(*axes, indexing="ij")
    return interpolate(displacement, coordinates) * (np.array(shape) / old)


def warp(volume, displacement):
    identity = np.meshgrid(*map(np.arange, volume.shape[:3]), indexing="ij")
    return interpolate(volume, identity + np.moveaxis(displacement, -1, 0))


def interpolate(volume, coordinates):
    channels = np.moveaxis(volume, -1, 0)
    return np.stack(
        [scipy.ndimage.map_coordinates(c, coordinates, order=1, mode="nearest") for c in channels], axis=-1
    )


def ascent(fixed, moving, displacement, window):
    """The gradient of the sum of the squared local NCCs by the displacement [x, y, z, 3]."""
    by_warped = local_squared_ncc_by_warped(fixed[..., 0], warp(moving, displacement)[..., 0], window)
    step = 1e-6 * np.eye(3)  # within a cell of voxels the interpolated image is linear along each axis
    slopes = [warp(moving, displacement + s) - warp(moving, displacement - s) for s in step]
    return by_warped[..., None] * np.concatenate(slopes, axis=-1) / 2e-6


def ascent_step(p, images, displacement, before, context, window):
    """From the mean gradient over the voxels of the images that each voxel of the level covers."""
    fixed, moving = images
    by_voxel = ascent(fixed, moving, resize_displacement(displacement, fixed.shape[:3]), window)
    sides = np.array(fixed.shape[:3]) // displacement.shape[:3]
    of_level = np.zeros(displacement.shape)
    for position in np.ndindex(displacement.shape[:3]):
        block = tuple(slice(i * n, (i + 1) * n) for i, n in zip(position, sides, strict=True))
        of_level[position] = by_voxel[block].mean((0, 1, 2))
    state = np.concatenate([of_level, displacement, before], axis=-1)
    hidden = convolution(p["hidden"], state) + context
    return convolution(p, state) + convolution(p["correction"], np.where(hidden > 0, hidden, 0.2 * hidden))


def level(p, fixed, moving, coarser, number, config):
    """The displacement of a level, and the entropy of the match."""
    if coarser is not None:
        coarser = resize_displacement(coarser, fixed.shape[:3])
        if config.align_features:
            moving = warp(moving, coarser)
    attended, offset, entropy = cross_attention(p["cross_attention"], moving, fixed, config)
    region = max(1, config.region_size // 2**number)
    attended, mask = regional_attention(p["regional_attention"], attended, region, config)
    inputs = [attended] + [offset] * config.position_aware + [fixed, moving] * config.feature_residual
    features = attended if len(inputs) == 1 else dense(p["mix"], np.concatenate(inputs, axis=-1))
    candidate = field_head(p["head"], features)
    if config.match_residual:
        candidate = 0.1 * candidate + (offset[..., :3] - offset[..., 3:]) / 2
    if coarser is None:
        return candidate, entropy
    if config.align_features:
        candidate = candidate + coarser
    return fusion(p["fusion"], candidate, coarser, attended, mask), entropy


def network(p, fixed, moving, config):
    """Displacement, pyramid and entropies of one pair whose size the levels divide."""
    displacement, pyramid, entropies = None, [], []
    features = zip(
        backbone(p["backbone"], fixed, config), backbone(p["backbone"], moving, config), strict=True
    )
    for number, (of_fixed, of_moving) in zip(reversed(range(len(config.channels))), features, strict=False):
        for _ in range(1 if displacement is None else config.refinements):
            given = (of_fixed, of_moving, displacement, number, config)
            displacement, entropy = level(p[f"level_{number}"], *given)
        pyramid.append(displacement)
        entropies.append(entropy)
    step = np.zeros(displacement.shape)
    for _ in range(config.ascent_steps):
        context = convolution(p["ascent_context"], of_fixed)
        step = ascent_step(p["ascent"], (fixed, moving), displacement, step, context, config.ascent_window)
        pyramid[-1] = displacement = displacement + step
    return resize_displacement(displacement, fixed.shape[:3]), pyramid, entropies
