"""Training w and training alpha w: the same functions, step by step, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

RNG = np.random.default_rng(0)
INPUTS, PROBES = RNG.normal(size=(2, 20, 6))
LABELS = RNG.normal(size=(20, 2))
HEAD = RNG.normal(size=(5, 2))
START = RNG.normal(size=(6, 5))
ALPHA, STEPS = 3.0, 15


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def batch_norm(x, statistics):
    return (x - jnp.mean(statistics, 0)[None]) / jnp.std(statistics, 0)[None]


def network(w, x):
    """Hidden units behind batch norm with the statistics of the inputs, and a head."""
    return jnp.tanh(batch_norm(x @ w, INPUTS @ w)) @ HEAD


def loss(w):
    return jnp.mean((network(w, INPUTS) - LABELS) ** 2)


@jax.jit
def decayed_loss(w, weight_decay):
    return loss(w) + weight_decay / 2 * jnp.sum(w**2)


@functools.partial(jax.jit, static_argnums=0)
def functions(name, scale, hyper):
    """Return the outputs for new inputs after every step from scale * START."""
    if name == "normalized_sgd":
        # From the second step on, all runs are on the sphere: nothing to correct.
        first, later = hyper["learning_rate"], RULES[name][0]["learning_rate"]
        hyper = {"learning_rate": lambda count: jnp.where(count == 0, first, later)}
    tx = normax.UPDATE_RULES[name].make(**hyper)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        w = optax.apply_updates(w, updates)
        return (w, state), network(w, PROBES)

    w = scale * START
    return jax.lax.scan(step, (w, tx.init(w)), length=STEPS)[1]


# Hyperparameters of the run from w, and the powers of alpha they are multiplied by for
# the run from alpha w. Decay is coupled but for AdamW, Lion and Muon, which keep eta
# lambda, and Adafactor, which keeps lambda.
# Inside the root epsilon has the units of the squared gradient, beside it, of the
# gradient. In AdaDelta's numerator it has those of the squared weights; in the
# denominator, where it has others, it must be negligible. The damping of Newton's
# method has those of the Hessian.
SGD = (
    dict(learning_rate=0.5, weight_decay=0.2),
    dict(learning_rate=2, weight_decay=-2),
)
NEWTON = (
    dict(learning_rate=0.5, weight_decay=0.2, damping=2.0),
    dict(learning_rate=0, weight_decay=-2, damping=-2),
)
RULES = {
    "sgd": SGD,
    "momentum": SGD,
    "nesterov": SGD,
    "adagrad": (
        dict(learning_rate=0.1, weight_decay=0.2, eps=0.01),
        dict(learning_rate=1, weight_decay=-2, eps=-2),
    ),
    "rmsprop": (
        dict(learning_rate=0.1, weight_decay=0.2, eps=0.01),
        dict(learning_rate=1, weight_decay=-2, eps=-2),
    ),
    "adadelta": (
        dict(learning_rate=1e4, weight_decay=0.2, eps=1e-12),
        dict(learning_rate=0, weight_decay=-2, eps=2),
    ),
    "adam": (
        dict(learning_rate=0.1, weight_decay=0.2, eps=0.1),
        dict(learning_rate=1, weight_decay=-2, eps=-1),
    ),
    "adamw": (
        dict(learning_rate=0.1, weight_decay=0.2, eps=0.1),
        dict(learning_rate=1, weight_decay=-1, eps=-1),
    ),
    "lion": (
        dict(learning_rate=0.05, weight_decay=0.2),
        dict(learning_rate=1, weight_decay=-1),
    ),
    "muon": (
        dict(learning_rate=0.1, weight_decay=0.2, eps=0.1),
        dict(learning_rate=1, weight_decay=-1, eps=-1),
    ),
    # Relative steps and decay are the same at all scales.
    "adafactor": (
        dict(learning_rate=0.1, weight_decay=0.02, eps=0.01),
        dict(learning_rate=0, weight_decay=0, eps=-2),
    ),
    "normalized_sgd": (dict(learning_rate=0.3), dict(learning_rate=2)),
    "newton": NEWTON,
    "hessian_free": (NEWTON[0] | dict(damping=50.0), NEWTON[1]),
}


def rescaled(name, forget=None):
    """Return the hyperparameters for alpha w, without the correction to forget."""
    hyper, powers = RULES[name]
    return {
        key: value * ALPHA ** (0.0 if key == forget else powers[key])
        for key, value in hyper.items()
    }


@pytest.mark.parametrize("name", normax.UPDATE_RULES)
def test_rescaled_weights_visit_the_same_functions(name):
    # AdaDelta's epsilon is not 0; conjugate gradients amplify rounding.
    tolerance = 1e-6 if name in ("adadelta", "hessian_free") else 1e-10
    original = functions(name, 1.0, RULES[name][0])
    assert np.max(np.abs(original[-1] - original[0])) > 0.05
    np.testing.assert_allclose(
        functions(name, ALPHA, rescaled(name)), original, rtol=0, atol=tolerance
    )
    # Every single correction is needed.
    for key, power in RULES[name][1].items():
        if power:
            wrong = functions(name, ALPHA, rescaled(name, forget=key))
            assert np.max(np.abs(wrong - original)) > 1e-3, key


def test_scale_of_the_weights_is_a_factor_of_the_penalty():
    gradient = jax.jit(jax.grad(decayed_loss))
    for alpha in (0.1, 7.0):
        np.testing.assert_allclose(
            decayed_loss(alpha * START, 0.3),
            decayed_loss(START, 0.3 * alpha**2),
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            gradient(alpha * START, 0.3),
            gradient(START, 0.3 * alpha**2) / alpha,
            rtol=1e-9,
        )


@pytest.mark.slow
def test_gradient_is_inverse_to_the_scale_and_orthogonal_to_each_unit():
    normax.testing.assert_scale_invariant(loss, START, rtol=1e-12)
    normax.testing.assert_inverse_gradient_scaling(loss, START, rtol=1e-9)
    normax.testing.assert_orthogonal_gradient(loss, START, rtol=1e-12)
    slope = jax.jit(jax.grad(loss))
    hessian = jax.jit(jax.jacfwd(slope))
    gradient = slope(START)
    assert np.min(np.linalg.norm(gradient, axis=0)) > 1e-3
    np.testing.assert_allclose(slope(7 * START), gradient / 7, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        hessian(7 * START), hessian(START) / 49, rtol=1e-8, atol=1e-12
    )
