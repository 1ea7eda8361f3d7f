"""Measures how the memory of exact attention grows with the number of keys, in blocks and by plain softmax.

    python benchmarks/attention_memory.py [--queries 2048] [--keys 1024 4096 ...] [--channels 32]
        [--json FILE]

Prints the MiB of temporaries in XLA's plan, compiled but not run, for `blocked_attention` of the package and
for softmax(Q K^T / sqrt(d)) V as written, forward and with the gradients of all three inputs. The memory of
the keys and values is given for comparison.
"""

import comparison
import jax
import jax.numpy as jnp

from adregnet_jax.ops.attention import blocked_attention

MIB = 2**20


def plain(query, key, value):
    logits = jnp.einsum("bqd,bkd->bqk", query, key) / query.shape[-1] ** 0.5
    return jax.nn.softmax(logits, axis=-1) @ value


def blocked(query, key, value):
    return blocked_attention(query, key, value)[0]


def temporary_mib(attention, queries, keys, channels, *, gradients):
    function = attention
    if gradients:
        function = jax.grad(lambda *arrays: attention(*arrays).sum(), argnums=(0, 1, 2))
    shapes = [jax.ShapeDtypeStruct((1, n, channels), jnp.float32) for n in (queries, keys, keys)]
    plan = jax.jit(function).lower(*shapes).compile().memory_analysis()
    return round(plan.temp_size_in_bytes / MIB, 1)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--keys", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--channels", type=int, default=32)
    options = parser.parse_args()
    rows = []
    for keys in options.keys:
        row = {"keys": keys, "keys and values": round(2 * 4 * keys * options.channels / MIB, 1)}
        for name, attention in (("blocked", blocked), ("plain", plain)):
            for gradients in (False, True):
                title = f"{name}, {'with gradients' if gradients else 'forward'}"
                row[title] = temporary_mib(
                    attention, options.queries, keys, options.channels, gradients=gradients
                )
        rows.append(row)
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
