"""Time of path metrics and saliencies beside passes over the paths.

    python -m pytest --noconftest tests/benchmarks/bench_path_metric.py -s

A pass forward is `path_norm` with p = 1, and its gradient a pass forward and backward.
All run in one process, in alternation, and each twice: the second call is timed, which
finds in the caches what the first left there. Reported are ratios of medians. Large
arrays are made anew at each call: glibc gives them back to the system each time, unless
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are above their size.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import pytest

import normax
from normax import paths

ROUNDS = 21


def dense(kernels, x):
    """Dense layers with ReLUs."""
    for kernel in kernels:
        x = jax.nn.relu(x @ kernel)
    return x


def convolutional(kernels, x):
    """Convolutions of stride 2 with ReLUs, a mean, a dense layer."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    for kernel in kernels[:-1]:
        x = jax.nn.relu(convolve(x, kernel))
    return x.mean((1, 2)) @ kernels[-1]


# Networks, shapes, and the largest ratio that is good enough.
WIDE = [(784, 2000), (2000, 2000), (2000, 10)]
NARROW = [(64, 256), (256, 256), (256, 10)]
KERNELS = [(3, 3, 3, 64), (3, 3, 64, 128), (3, 3, 128, 256), (256, 10)]
NETWORKS = {
    "wide": (dense, WIDE, (1, 784), {"metric": 2.5, "bound": 4.5, "saliency": 0.6}),
    "narrow": (dense, NARROW, (1, 64), {"metric": 2, "bound": 3.5, "saliency": 1.1}),
    "convolutional": (
        convolutional,
        KERNELS,
        (1, 32, 32, 3),
        {"metric": 2.5, "bound": 5, "saliency": 1.1},
    ),
}
UNITS = {"metric": "forward", "bound": "forward", "saliency": "both"}


def draw_networks(network):
    """Return the weights of a network, and what pruning leaves of them."""
    shapes = NETWORKS[network][1]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [
        0.05 * jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)
    ]
    return params, [w * (jnp.abs(w) > 0.02) for w in params]


def measures(network):
    """Return what is timed, as functions of the weights of both."""
    forward, _, shape, _ = NETWORKS[network]
    x = jnp.ones(shape)

    def norm(w, v):
        del v
        return normax.path_norm(forward, w, x, 1)

    return {
        "forward": norm,
        "both": jax.value_and_grad(norm),
        "metric": lambda w, v: paths.path_metric(forward, w, v, x),
        "bound": lambda w, v: paths.path_metric_bound(forward, w, v, x),
        "saliency": lambda w, v: paths.path_saliency(forward, w, x),
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_time(network):
    params, other = draw_networks(network)
    limits = NETWORKS[network][3]
    compiled = {
        name: jax.jit(fn).lower(params, other).compile()
        for name, fn in measures(network).items()
    }
    times = {name: [] for name in compiled}
    for _ in range(ROUNDS):
        for name, program in compiled.items():
            jax.block_until_ready(program(params, other))
            start = time.perf_counter()
            jax.block_until_ready(program(params, other))
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    for name, limit in limits.items():
        ratio = seconds[name] / seconds[UNITS[name]]
        print(f"{network}, {name}: {ratio:.2f} x {UNITS[name]}")
        assert ratio < limit
