"""Time of path metrics and saliencies beside passes over the paths.

    python -m pytest --noconftest tests/benchmarks/bench_path_metric.py -s

The network of the Path-SGD paper, 784-4000-4000-10, and a ResNet-18 for 32 x 32
images. A pass forward is `path_norm` with p = 1, and its gradient a pass forward and
backward. All run in one process, in alternation; reported are ratios of medians.
"""

import statistics
import time

import bench_path_sgd
import jax
import jax.numpy as jnp
import pytest

import normax
from normax import paths

ROUNDS = 15
NETWORKS = {
    "mlp": (bench_path_sgd.MultiLayerPerceptron(), (1, 784)),
    "resnet": (bench_path_sgd.ResNet18(), (1, 32, 32, 3)),
}
# The largest ratio that is good enough, and what to.
LIMITS = {
    "metric": ("forward", 4.5),
    "bound": ("forward", 9.0),
    "saliency": ("both", 2),
}


def programs(model, shape):
    """Return compiled programs by name."""
    inputs = jnp.ones(shape)
    params = model.init(jax.random.key(0), inputs)["params"]
    other = jax.tree.map(lambda w: w * (jnp.abs(w) > 0.01), params)

    def forward(params, inputs):
        return model.apply({"params": params}, inputs)

    def norm(params, other):
        return normax.path_norm(forward, params, inputs, 1, log=True)

    measured = {
        "forward": norm,
        "both": jax.value_and_grad(norm),
        "metric": lambda w, v: paths.path_metric(forward, w, v, inputs, log=True),
        "bound": lambda w, v: paths.path_metric_bound(forward, w, v, inputs, log=True),
        "saliency": lambda w, v: paths.path_saliency(forward, w, inputs, log=True),
    }
    compiled = {
        name: jax.jit(fn).lower(params, other).compile()
        for name, fn in measured.items()
    }
    return compiled, (params, other)


@pytest.mark.parametrize("network", NETWORKS)
def test_time(network):
    compiled, arguments = programs(*NETWORKS[network])
    times = {name: [] for name in compiled}
    for _ in range(ROUNDS):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    for name, (unit, limit) in LIMITS.items():
        ratio = seconds[name] / seconds[unit]
        print(f"{network}, {name}: {1e3 * seconds[name]:.1f} ms, {ratio:.2f} x {unit}")
        assert ratio < limit
