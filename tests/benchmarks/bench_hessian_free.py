"""Time and memory of a Hessian-free step, in evaluations of the gradient.

    python -m pytest --noconftest tests/benchmarks/bench_hessian_free.py -s

The network is 784-1000-500-10 with batches of 1,000, in float32. The step is a whole
training step: gradient, k conjugate gradient iterations, loss and model of the step,
backtracking. Steps and gradients run in one process, in alternation; reported is the
ratio of the medians.
"""

import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import normax

WIDTHS, BATCH, ROUNDS = (784, 1000, 500, 10), 1000, 7


def network(params, x):
    for layer, (kernel, bias) in enumerate(params):
        x = x @ kernel + bias[None]
        x = jnp.tanh(x) if layer < len(params) - 1 else x
    return x


def draw():
    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    params = [
        (jax.random.normal(key, shape) / shape[0] ** 0.5, jnp.zeros(shape[1]))
        for key, shape in zip(keys[1:], itertools.pairwise(WIDTHS), strict=True)
    ]
    return params, jax.random.normal(keys[0], (BATCH, WIDTHS[0]))


def functions_of(batch):
    """Return the functions that `update` wants, of one batch."""

    def outputs_fn(params):
        return network(params, batch)

    def loss_of_outputs(y):
        labels = jnp.arange(BATCH) % WIDTHS[-1]
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

    def value_fn(params):
        return loss_of_outputs(outputs_fn(params))

    return value_fn, dict(outputs_fn=outputs_fn, loss_of_outputs=loss_of_outputs)


def seconds(compiled, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


@pytest.mark.parametrize("iterations", [5, 20])
@pytest.mark.parametrize("curvature", ["Gauss-Newton", "Hessian"])
def test_step(curvature, iterations):
    params, batch = draw()
    # Little damping, or few iterations are enough; the Hessian has negative curvature.
    damping = {"Gauss-Newton": 1e-4, "Hessian": 0.3}[curvature]
    tx = normax.second_order.hessian_free(
        1.0, damping, cg_iterations=iterations, cg_tolerance=0.0
    )

    @jax.jit
    def gradient(params, batch):
        return jax.grad(functions_of(batch)[0])(params)

    @jax.jit
    def step(params, state, batch):
        value_fn, functions = functions_of(batch)
        if curvature == "Hessian":
            functions = {}
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, **functions)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    gradient = gradient.lower(params, batch).compile()
    step = step.lower(params, state, batch).compile()
    _, state = step(params, state, batch)
    after, last = step(params, state, batch)
    k = int(last.iterations)
    assert k >= 5
    run = functools.partial(step, params, state, batch)
    pairs = [(seconds(gradient, params, batch), seconds(run)) for _ in range(ROUNDS)]
    gradient_s, step_s = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratio, limit = step_s / gradient_s, 2.5 * (k + 3)
    analysis = step.memory_analysis()
    size = 4 * sum(x.size for x in jax.tree.leaves(params))
    print(
        f"\n{curvature}, k = {k}, {jax.devices()[0].device_kind}: "
        f"{1e3 * step_s:.0f} ms / {1e3 * gradient_s:.0f} ms = {ratio:.1f} "
        f"({ratio / limit:.2f} of {limit:.1f}), temporary memory "
        f"{analysis.temp_size_in_bytes / size:.1f} times the parameters'"
    )
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(after))
    assert ratio < limit
