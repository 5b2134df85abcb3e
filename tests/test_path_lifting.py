r"""The path transform on real networks, against the networks themselves in float64.

With ones as inputs and $|w|^p$ as weights every ReLU is the identity, so that the
network itself is $F$, and its gradient is that of $F$. Where a network has a
maximum, a mean or a fixed number, its twin says what these are in $F$.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax

RNG = np.random.default_rng(0)


def draw(*shape, seed=None):
    rng = RNG if seed is None else np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def randomize(params, seed=0):
    """Redraw all arrays, biases (which Flax starts at 0) included."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(rng.normal(size=x.shape) * 0.7, x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, drawn)


def oracle(twin, params, inputs, p):
    """Return log phi and the gammas, in float64."""
    with jax.enable_x64(True):
        v = jax.tree.map(lambda w: jnp.abs(jnp.asarray(w, jnp.float64)) ** p, params)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), inputs)

        def total(v):
            return sum(jnp.sum(y) for y in jax.tree.leaves(twin(v, ones)))

        value, gradient = jax.jit(jax.value_and_grad(total))(v)
        gammas = jax.tree.map(lambda g: np.asarray(g) ** (2 / p), gradient)
        return np.log(float(value)) / p, gammas


def check(forward, params, inputs, p=2.0, twin=None, rtol=3e-6):
    log_norm, gammas = oracle(twin or forward, params, inputs, p)

    def values(params):
        scales = normax.path_scales(forward, params, inputs, p)
        return normax.log_path_norm(forward, params, inputs, p), scales

    got_log, got = jax.jit(values)(params)
    np.testing.assert_allclose(got_log, log_norm, rtol=rtol, atol=rtol)
    assert jax.tree.structure(got) == jax.tree.structure(gammas)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(gammas), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=0, err_msg=name)


def linen(module, shape, seed=0, **kwargs):
    """Return `forward`, random parameters and an input of a Linen module."""
    x = draw(*shape, seed=1)
    variables = module.init(jax.random.key(0), x, **kwargs)
    params = randomize(variables["params"], seed)
    rest = {k: v for k, v in variables.items() if k != "params"}
    return lambda p, x: module.apply({"params": p, **rest}, x, **kwargs), params, x


class MLP(nn.Module):
    widths: tuple[int, ...] = (5, 4, 3)
    activation: object = jax.nn.relu

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


@pytest.mark.parametrize("p", [1.0, 1.5, 2, 2.0, 3, 7.3])
def test_mlp(p):
    check(*linen(MLP(), (1, 6)), p)


ACTIVATIONS = {
    "leaky": jax.nn.leaky_relu,
    "leaky_half": lambda x: jax.nn.leaky_relu(x, 0.5),
    "maximum": lambda x: jnp.maximum(x, 0),
    "maximum_zeros": lambda x: jnp.maximum(jnp.zeros_like(x), x),
    "where": lambda x: jnp.where(x > 0, x, 0),
    "where_less": lambda x: jnp.where(x <= 0, 0, x),
    "where_zeros": lambda x: jnp.where(0 < x, x, jnp.zeros_like(x)),
    "where_leaky": lambda x: jnp.where(x >= 0, x, 0.1 * x),
    "clip": lambda x: jnp.clip(x, 0),
    "clip_inf": lambda x: jnp.clip(x, 0, jnp.inf),
    "abs": jnp.abs,
    "relu_of_both_signs": lambda x: jax.nn.relu(x) - 0.0 * x,
    "times_sign": lambda x: x * (x > 0),
    "sign_times": lambda x: (x > 0).astype(x.dtype) * x,
    "minus_min": lambda x: -jnp.minimum(-x, 0),
    "max_of_multiples": lambda x: jnp.maximum(x, 0.2 * x),
    "jit": jax.jit(lambda x: jnp.where(x > 0, x, 0)),
    "clamp": lambda x: jax.lax.clamp(jnp.float32(0), x, jnp.float32(jnp.inf)),
}


@jax.custom_vjp
def _custom_relu(x):
    return jnp.maximum(x, 0)


_custom_relu.defvjp(lambda x: (jnp.maximum(x, 0), x), lambda x, g: (g * (x > 0),))
ACTIVATIONS["custom_vjp"] = _custom_relu


@jax.custom_jvp
def _custom_jvp_relu(x):
    return jnp.where(x > 0, x, 0)


_custom_jvp_relu.defjvps(lambda g, y, x: g * (x > 0))
ACTIVATIONS["custom_jvp"] = _custom_jvp_relu


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_relu_in_every_way(name):
    def network(activation, params, x):
        for w, b in params[:-1]:
            x = activation(x @ w + b)
        w, b = params[-1]
        return x @ w + b

    params = [(draw(4, 5), draw(1, 5)), (draw(5, 3), draw(1, 3)), (draw(3, 2), draw(1, 2))]
    forward = functools.partial(network, ACTIVATIONS[name])
    twin = functools.partial(network, lambda x: x)
    check(forward, params, draw(1, 4), 2.0, twin)


class CNN(nn.Module):
    pool: str = "avg"
    kwargs: tuple = ()
    mean: object = lambda self_unused, x: jnp.mean(x, axis=(1, 2))
