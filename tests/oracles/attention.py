"""Attention, one query after the other. Features are [n, c] or [x, y, z, c], in float64."""

import itertools

import numpy as np


def attend(query, keys, values, bias=0.0):
    """One query [d] over keys [k, d] and values [k, c]: the weighted mean [c] and the weights [k]."""
    logits = keys @ query / np.sqrt(len(query)) + bias
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights @ values, weights


def entropy(weights):
    """In nats."""
    present = weights[weights > 0]
    return -(present * np.log(present)).sum()


def neighbourhood_attention(query, key, value, radius):
    """Attended values [x, y, z, c], expected offsets [x, y, z, 3] and entropies [x, y, z]."""
    shape = query.shape[:3]
    attended, offset, entropies = np.zeros(value.shape), np.zeros((*shape, 3)), np.zeros(shape)
    for position in itertools.product(*map(range, shape)):
        around = itertools.product(*(range(p - radius, p + radius + 1) for p in position))
        neighbours = [p for p in around if all(0 <= i < n for i, n in zip(p, shape, strict=True))]
        keys, values = (np.array([features[p] for p in neighbours]) for features in (key, value))
        attended[position], weights = attend(query[position], keys, values)
        offset[position] = weights @ (np.array(neighbours) - position)
        entropies[position] = entropy(weights)
    return attended, offset, entropies


def global_attention(query, key, value, locality=0.0):
    """As `neighbourhood_attention`, over all voxels; logits fall by `locality` times the squared distance."""
    shape = query.shape[:3]
    voxels = list(itertools.product(*map(range, shape)))
    keys, values = (features.reshape(len(voxels), -1) for features in (key, value))
    attended, offset, entropies = np.zeros(value.shape), np.zeros((*shape, 3)), np.zeros(shape)
    for position in voxels:
        offsets = np.array(voxels) - position
        bias = -locality * (offsets**2).sum(axis=-1)
        attended[position], weights = attend(query[position], keys, values, bias)
        offset[position] = weights @ offsets
        entropies[position] = entropy(weights)
    return attended, offset, entropies
