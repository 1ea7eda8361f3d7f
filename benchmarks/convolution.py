"""Compares the speed of the 3x3x3 convolution with XLA's own and PyTorch's.

    python benchmarks/convolution.py [--shape 64 64 64] [--channels 8 16 32] [--rounds 5]
        [--onednn] [--json FILE]

Prints a row for each number of channels (as many in as out), for the forward pass alone and with the
gradients of the volume and the kernel, and for each route: `adregnet_jax.conv3d`, `lax.conv_general_dilated`,
and, if installed, PyTorch's conv3d on channels-last arrays, with as many threads as cores. "times ours" is
the time of the route divided by that of `adregnet_jax`. float32, batch 1. With --onednn, ours is oneDNN's
(`ops.cpu.onednn`). The results of the routes are checked against each other first.
"""

import functools

import comparison
import jax
import numpy as np

from adregnet_jax import conv3d


def lax_convolution(volume, kernel):
    return jax.lax.conv_general_dilated(
        volume, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def torch_routes(torch, volume, kernel, cotangent):
    """Like `comparison.jax_routes`; the results are views in the axis order of ours."""

    def channels_last(array, axes):
        return torch.from_numpy(array).permute(axes).contiguous(memory_format=torch.channels_last_3d)

    x, gradient = (channels_last(array, (0, 4, 1, 2, 3)) for array in (volume, cotangent))
    weights = channels_last(kernel, (4, 3, 0, 1, 2))
    x.requires_grad_()
    weights.requires_grad_()

    def forward():
        with torch.no_grad():
            return torch.nn.functional.conv3d(x, weights, padding=1).permute(0, 2, 3, 4, 1)

    def with_gradients():
        result = torch.nn.functional.conv3d(x, weights, padding=1)
        in_volume, in_kernel = torch.autograd.grad(result, (x, weights), gradient)
        result = result.detach().permute(0, 2, 3, 4, 1)
        return result, in_volume.permute(0, 2, 3, 4, 1), in_kernel.permute(2, 3, 4, 1, 0)

    return forward, with_gradients


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 64, 64), metavar=("X", "Y", "Z"))
    parser.add_argument("--channels", type=int, nargs="+", default=(8, 16, 32))
    parser.add_argument("--onednn", action="store_true", help="ours with the convolution of oneDNN")
    options = parser.parse_args()
    ours = functools.partial(conv3d, implementation="onednn" if options.onednn else "auto")
    torch = comparison.torch_on_cpu()
    rng = np.random.default_rng(0)
    rows = []
    for channels in options.channels:
        volume, cotangent = rng.standard_normal((2, 1, *options.shape, channels), np.float32)
        kernel = rng.standard_normal((3, 3, 3, channels, channels), np.float32)
        routes = {
            "adregnet_jax": comparison.jax_routes(ours, (volume, kernel), cotangent),
            "lax": comparison.jax_routes(lax_convolution, (volume, kernel), cotangent),
        }
        if torch:
            routes["PyTorch"] = torch_routes(torch, volume, kernel, cotangent)
        comparison.check_equal(*(with_gradients() for _, with_gradients in routes.values()))
        rows += comparison.compare({"channels": channels}, routes, options.rounds)
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
