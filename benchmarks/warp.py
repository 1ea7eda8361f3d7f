"""Compares the speed of the warp and the gradient of its displacement with PyTorch's grid_sample.

    python benchmarks/warp.py [--sizes 64 128] [--rounds 5] [--json FILE]

Prints a row for each volume of n^3 voxels and one channel, for the forward pass alone and with the gradient
of the displacement, and for each route: `adregnet_jax.warp` and, if installed, PyTorch with as many threads
as cores. `grid_sample` gets a precomputed normalised grid, which flatters it; `grid_sample, from
displacement` makes the grid in the same call, as `warp` does. "times ours" is the time of the route divided
by that of `adregnet_jax`. float32, batch 1, border padding, align_corners=True. The results of the routes are
checked against each other first.
"""

import comparison
import numpy as np

from adregnet_jax import warp


def smooth_displacement(n):
    """Up to 5 voxels, [1, n, n, n, 3]; no sample lies within 0.1 voxels of a boundary between cells.

    The gradient jumps there, and rounding would decide on which side a sample falls.
    """
    x, y, z = np.ogrid[:n, :n, :n]
    displacement = np.stack(
        [4 * np.sin(6 * (x + y) / n + k) * np.cos(5 * z / n + 2 * k) for k in range(3)], axis=-1
    )
    whole = np.floor(displacement)
    return (whole + np.clip(displacement - whole, 0.1, 0.9))[None].astype(np.float32)


def torch_routes(torch, volume, displacement, cotangent):
    """Like `comparison.jax_routes`, for grid_sample with a precomputed grid and from the displacement."""
    n = volume.shape[1]
    volume, gradient = (torch.from_numpy(array)[..., 0][:, None] for array in (volume, cotangent))
    displacement = torch.from_numpy(displacement)
    axis = torch.arange(n, dtype=torch.float32)
    identity = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)

    def to_grid(displacement):
        # Positions from -1 to 1, in the order z, y, x.
        return ((identity + displacement) * (2 / (n - 1)) - 1).flip(-1)

    def routes(leaf, grid_of):
        def sample():
            return torch.nn.functional.grid_sample(
                volume, grid_of(leaf), padding_mode="border", align_corners=True
            )

        def forward():
            with torch.no_grad():
                return sample()[:, 0, ..., None]

        def with_gradient():
            result = sample()
            return result.detach()[:, 0, ..., None], *torch.autograd.grad(result, leaf, gradient)

        return forward, with_gradient

    grid = to_grid(displacement)
    return {
        "grid_sample": routes(grid.requires_grad_(), lambda grid: grid),
        "grid_sample, from displacement": routes(displacement.requires_grad_(), to_grid),
    }


def check(routes, n):
    """Checks that the routes agree; the gradient of the precomputed grid is first converted to voxels."""
    ours, ready_made, theirs = (with_gradient() for _, with_gradient in routes.values())
    result, in_grid = ready_made
    comparison.check_equal(ours, (result, in_grid.flip(-1) * (2 / (n - 1))), theirs)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=(64, 128), metavar="N")
    options = parser.parse_args()
    torch = comparison.torch_on_cpu()
    rng = np.random.default_rng(0)
    rows = []
    for n in options.sizes:
        volume, cotangent = rng.standard_normal((2, 1, n, n, n, 1), np.float32)
        displacement = smooth_displacement(n)
        routes = {
            "adregnet_jax": comparison.jax_routes(warp, (displacement,), cotangent, constants=(volume,))
        }
        if torch:
            routes |= torch_routes(torch, volume, displacement, cotangent)
            check(routes, n)
        rows += comparison.compare({"size": f"{n}^3"}, routes, options.rounds)
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
