"""The angles of hyperball, by simulation that shares no code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import normax
from normax.theory import (
    hyperball_angle,
    hyperball_correlation,
    hyperball_learning_rate,
)

pytestmark = pytest.mark.few_rows(2)

DIMENSION = 2000
RATES = [1e-3, 0.01, 0.05, 0.3, 2.0]
MOMENTA = [0.0, 0.5, 0.9, 0.97]


def angle_between(a, b):
    """Return the angle of unit vectors, right for small ones too."""
    return 2 * np.arcsin(np.linalg.norm(a - b, axis=-1) / 2)


@pytest.mark.parametrize("correlation", [-1.0, -0.7, 0.0, 0.3, 0.999])
@pytest.mark.parametrize("rate", [0.0, *RATES, 1e6])
def test_the_angle_of_one_step(rate, correlation):
    w = np.array([1.0, 0.0])
    u = np.array([correlation, np.sqrt(1 - correlation**2)])
    after = w - rate * u
    expected = angle_between(w, after / np.linalg.norm(after))
    found = hyperball_angle(rate, correlation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def walk(step, steps, start=200, lag=50):
    """Follow `step` under noise orthogonal to w; return angles of 1 and `lag` steps."""
    rng = np.random.default_rng(0)
    w, state = rng.normal(size=DIMENSION), None
    directions, weights = [], []
    for _ in range(start + steps):
        g, unit = rng.normal(size=DIMENSION), w / np.linalg.norm(w)
        after, u, state = step(w, g - unit * (unit @ g), state)
        weights.append(unit)
        directions.append(u @ unit)
        w = after
    kept = np.array(weights[start:])
    one, many = (angle_between(kept[n:], kept[:-n]).mean() for n in (1, lag))
    return np.mean(directions[start:]), one, many


def on_the_ball(rate, momentum):
    def step(w, g, mean):
        mean = momentum * (0 if mean is None else mean) + (1 - momentum) * g
        u = mean / np.linalg.norm(mean)
        w = w / np.linalg.norm(w) - rate * u
        return w, u, mean

    return step


def with_decay(rate, decay, momentum):
    """AdamW, whose root of mean squares is one number in this noise."""

    def step(w, g, mean):
        mean = momentum * (0 if mean is None else mean) + (1 - momentum) * g
        return (1 - rate * decay) * w - rate * mean, mean / np.linalg.norm(mean), mean

    return step


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("rate", RATES)
def test_momentum_correlates_steps_and_weights(rate, momentum):
    correlation, angle, _ = walk(on_the_ball(rate, momentum), 500)
    expected = float(hyperball_correlation(rate, momentum))
    assert correlation == pytest.approx(expected, abs=0.01)
    assert angle == pytest.approx(float(hyperball_angle(rate, expected)), rel=0.01)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_correlation_solves_its_equation(momentum):
    rates = np.geomspace(1e-6, 1e4, 11)

    def residual(c, rate):
        return c * np.sqrt((rate - c) ** 2 + 1 - c**2) - momentum * (c - rate)

    expected = [
        scipy.optimize.brentq(residual, -1, 0, rate, 1e-300, 1e-14) if momentum else 0
        for rate in rates
    ]
    with jax.enable_x64(True):
        found = hyperball_correlation(rates, momentum)
        np.testing.assert_allclose(found, expected, rtol=1e-11)
    assert hyperball_correlation(0.0, momentum) == 0
    found = hyperball_correlation(jnp.float32(1e30), momentum)
    np.testing.assert_allclose(found, -momentum, rtol=1e-6)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_rate_for_an_angle_is_the_inverse(momentum):
    rates = np.geomspace(1e-5, 10, 13).astype(np.float32)
    angles = hyperball_angle(rates, hyperball_correlation(rates, momentum))
    back = hyperball_learning_rate(angles, momentum)
    np.testing.assert_allclose(back, rates, rtol=2e-4)
    limit = np.arccos(momentum)
    assert hyperball_learning_rate(0.999 * limit, momentum) > 10
    with pytest.raises(
        ValueError, match=r"^angle / arccos\(momentum\) must .* below 1"
    ):
        hyperball_learning_rate(1.001 * limit, momentum)


def test_the_rate_that_takes_the_place_of_adamw():
    rate, decay, momentum = 0.01, 1.0, 0.9
    angle = normax.UPDATE_RULES["adamw"].equilibrium_rotation(rate, decay, b1=momentum)
    matching = float(hyperball_learning_rate(angle, momentum))
    _, one, many = walk(on_the_ball(matching, momentum), 1500)
    _, theirs, many_theirs = walk(with_decay(rate, decay, momentum), 1500, start=700)
    assert one == pytest.approx(theirs, rel=0.02)
    assert many == pytest.approx(many_theirs, rel=0.05)
    assert np.sqrt(rate * decay) > 2.9 * matching


def test_the_rate_is_not_the_root_of_rate_times_decay():
    """Levanter's documentation says so, and turns weights 3.1 times too far."""
    angle = normax.UPDATE_RULES["adamw"].equilibrium_rotation(1e-3, 0.1, b1=0.9)
    matching = float(hyperball_learning_rate(angle, 0.9))
    assert matching == pytest.approx(np.sqrt(2e-4 * 0.1 / 1.9), rel=2e-3)
    assert np.sqrt(1e-4) / matching == pytest.approx(3.08, abs=0.01)


@pytest.mark.slow
def test_hyperball_itself_turns_by_its_angle():
    rate, axes = 0.05, "unit"
    params = jax.random.normal(jax.random.key(0), (DIMENSION, 4))
    tx = normax.hyperball(optax.scale_by_adam(), rate, axes)

    def step(carry, key):
        params, state = carry
        grads = jax.random.normal(key, params.shape)
        updates, state = tx.update(grads, state, params)
        angle = normax.angular_update(params, updates)
        return (optax.apply_updates(params, updates), state), angle

    keys = jax.random.split(jax.random.key(1), 400)
    _, angles = jax.lax.scan(step, (params, tx.init(params)), keys)
    expected = float(hyperball_angle(rate, hyperball_correlation(rate, 0.9)))
    assert angles[:3].mean() == pytest.approx(rate, rel=0.01)
    assert angles[100:].mean() == pytest.approx(expected, rel=0.005)


def test_what_is_out_of_range_raises():
    for call in (hyperball_correlation, hyperball_learning_rate):
        for momentum in (-0.1, 1.0, np.nan):
            with pytest.raises(
                ValueError, match=r"^momentum must be at least 0 and bel"
            ):
                call(0.1, momentum)
    with pytest.raises(ValueError, match=r"^learning_rate must be at least 0"):
        hyperball_angle(-0.1)
    with pytest.raises(ValueError, match=r"^angle must be at least 0"):
        hyperball_learning_rate(-0.1)
    with pytest.raises(ValueError, match=r"^correlation must be .*got 1\.5"):
        hyperball_angle(0.1, 1.5)
    jax.jit(hyperball_angle)(0.1, 1.5)  # is not known
