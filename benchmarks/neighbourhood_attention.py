"""Compares the speed of neighbourhood attention over 27 voxels with padded slices under autodiff.

    python benchmarks/neighbourhood_attention.py [--shape 48 64 48] [--channels 8] [--rounds 5] [--json FILE]

Prints a row for each set of results (the attended values alone, or also the mean offsets and the entropies),
for the forward pass alone and with the gradients of query, key and value, and for each route:
`adregnet_jax.neighbourhood_attention`, and one padded slice per neighbour, differentiated by JAX. "times
ours" is the time of the route divided by that of `adregnet_jax`. float32, batch 1. The results of the routes
are checked against each other first.
"""

import itertools

import comparison
import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax import neighbourhood_attention

OFFSETS = list(itertools.product((-1, 0, 1), repeat=3))
RESULTS = ("attended", "offset", "entropy")


def padded_slices(query, key, value):
    """`neighbourhood_attention`, written the obvious way."""
    # [27, b, x, y, z]
    logits = jnp.stack([jnp.sum(query * k, axis=-1) for k in neighbours(key)]) * query.shape[-1] ** -0.5
    inside = jnp.stack(neighbours(jnp.ones((*query.shape[:-1], 1), bool)))[..., 0]
    logits = jnp.where(inside, logits, -1e30)
    weights = jax.nn.softmax(logits, axis=0)
    attended = sum(w[..., None] * v for w, v in zip(weights, neighbours(value), strict=True))
    offset = jnp.einsum("nbxyz,nd->bxyzd", weights, jnp.asarray(OFFSETS, jnp.float32))
    entropy = jax.nn.logsumexp(logits, axis=0) - jnp.sum(weights * logits, axis=0)
    return attended, offset, entropy


def neighbours(features):
    """features(p + o) for each offset o, 0 outside the grid."""
    nx, ny, nz = features.shape[1:4]
    padded = jnp.pad(features, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    return [padded[:, 1 + i : 1 + i + nx, 1 + j : 1 + j + ny, 1 + k : 1 + k + nz] for i, j, k in OFFSETS]


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 64, 48), metavar=("X", "Y", "Z"))
    parser.add_argument("--channels", type=int, nargs="+", default=(8,))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    for channels, count in itertools.product(options.channels, (1, 3)):
        features = tuple(rng.standard_normal((3, 1, *options.shape, channels), np.float32))
        cotangents = tuple(
            rng.standard_normal((1, *options.shape, *last), np.float32) for last in ((channels,), (3,), ())
        )

        def routes_of(attention, count=count, features=features, cotangents=cotangents):
            # jit removes computations that only unused results need.
            return comparison.jax_routes(lambda *qkv: attention(*qkv)[:count], features, cotangents[:count])

        routes = {
            "adregnet_jax": routes_of(neighbourhood_attention),
            "padded slices": routes_of(padded_slices),
        }
        comparison.check_equal(*(with_gradients() for _, with_gradients in routes.values()))
        case = {"channels": channels, "results": ", ".join(RESULTS[:count])}
        rows += comparison.compare(case, routes, options.rounds)
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
