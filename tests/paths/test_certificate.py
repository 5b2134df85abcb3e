"""Certificates hold at all inputs, and are attained where all is positive."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normax import paths

pytestmark = [pytest.mark.usefixtures("quick_compilation")]

RNG = np.random.default_rng(0)
relu = jax.nn.relu


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def plain(params, x):
    return relu(x @ params["first"]) @ params["last"]


@functools.cache
def bound_of(forward):
    return jax.jit(lambda *arguments: paths.output_change_bound(forward, *arguments))


@functools.cache
def change_of(forward):
    """Return a program for the change of outputs in float64."""

    def change(params, other, x):
        wide = lambda w: jnp.asarray(w, jnp.float64)  # noqa: E731
        params, other, x = jax.tree.map(wide, (params, other, x))
        return jnp.sum(jnp.abs(forward(params, x) - forward(other, x)), axis=-1)

    return jax.jit(change)


def measured(forward, params, other, x):
    """Return the largest change over examples, summed over outputs."""
    with jax.enable_x64(True):
        return float(np.max(change_of(forward)(params, other, x)))


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_positive_networks_attain_the_bound_at_equal_inputs(size):
    params = {"first": abs(draw(3, 6)), "last": abs(draw(6, 2))}
    other = jax.tree.map(lambda w: w * RNG.random(w.shape).astype(np.float32), params)
    x = np.full((2, 3), size, np.float32)
    change = measured(plain, params, other, x)
    np.testing.assert_allclose(bound_of(plain)(params, other, x), change, rtol=3e-6)
    # Of small inputs the constant input of biases, which is 1, is the largest.
    got = bound_of(plain)(params, other, x / 4)
    np.testing.assert_allclose(got, change / size, rtol=3e-6)


class ConvNet(nn.Module):
    """All that a small network for images has, batch norm at inference included."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2, 2))(x)
        x = nn.leaky_relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)) + nn.avg_pool(x, (2, 2), (2, 2))
        x = relu(nn.Conv(3, (1, 1))(x)) + x
        return nn.Dense(2)(jnp.mean(x, axis=(1, 2)))


def variables():
    shapes = jax.eval_shape(ConvNet().init, jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    drawn = jax.tree.map(lambda w: draw(*w.shape), shapes)
    variances = drawn["batch_stats"]["BatchNorm_0"]
    variances["var"] = np.abs(variances["var"]) + np.float32(0.1)
    return drawn


def nearby(w):
    return w + np.float32(0.01) * draw(*w.shape)


CHANGES = {
    "near": lambda w: jax.tree.map(nearby, w),
    "other": lambda w: variables(),
    "pruned": lambda w: jax.tree.map(
        lambda w: w * (RNG.random(w.shape) < 0.5) if w.ndim > 1 else w, w
    ),
    "opposite": lambda w: jax.tree.map(lambda w: -w if w.ndim > 1 else w, w),
}


NETWORK = ConvNet().apply


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_the_bound_holds_for_networks_of_all_kinds_of_layers(change):
    for _ in range(10):
        params = variables()
        other = CHANGES[change](params)
        # Corners are where a piecewise linear function is largest.
        x = 2 * np.sign(draw(64, 4, 4, 2))
        found = measured(NETWORK, params, other, x)
        assert 0 < found <= bound_of(NETWORK)(params, other, x) * (1 + 1e-5)


def outputs(params, x):
    return np.maximum(x @ params["first"], 0) @ params["last"]


def test_the_bound_holds_where_signs_differ():
    # The path metric alone is no bound there: other paths are active.
    for _ in range(50):
        params, other = ({"first": draw(3, 6), "last": draw(6, 2)} for _ in range(2))
        x = np.sign(draw(64, 3))
        bound = bound_of(plain)(params, other, x)
        found = np.max(np.sum(np.abs(outputs(params, x) - outputs(other, x)), axis=-1))
        assert found <= bound * (1 + 1e-5)
