"""Schedules against the runs they are equivalent to, in float64 and function space."""

import decimal
import fractions

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]
RNG = np.random.default_rng(0)
START, TARGET = RNG.normal(size=(2, 5, 3))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def unit(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


def directions(tx, steps):
    """Return the directions, that is the functions, that a run visits."""

    @jax.grad
    def gradient(w):
        return jnp.sum((unit(w) - TARGET) ** 3)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(gradient(w), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), unit(w)

    w = jnp.asarray(START)
    return jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=steps)[1])()


def decayed(eta, lam, **hyper):
    return optax.chain(optax.add_decayed_weights(lam), optax.sgd(eta, **hyper))


@pytest.mark.parametrize(
    "eta, lam, rho, steps",
    [(0.05, 0.4, 0.0, 50), (0.02, 0.1, 0.9, 300), (0.1, 0.8, 0.5, 60)],
)
def test_growing_rate_is_weight_decay(eta, lam, rho, steps):
    schedule = normax.theory.exponential_equivalent_schedule(eta, lam, rho)
    expected = directions(decayed(eta, lam, momentum=rho), steps)
    grown = directions(optax.sgd(schedule, momentum=rho), steps)
    np.testing.assert_allclose(grown, expected, rtol=0, atol=1e-9)
    # The constant rate goes elsewhere.
    constant = directions(optax.sgd(eta, momentum=rho), steps)
    assert np.max(np.abs(constant - expected)) > 1e-2
    start = schedule(jnp.arange(2))
    np.testing.assert_allclose(start[0], eta / (1 - eta * lam), rtol=1e-12)


def test_without_momentum_it_is_the_printed_power():
    schedule = normax.theory.exponential_equivalent_schedule(0.5, 0.2)
    t = np.arange(100)
    np.testing.assert_allclose(schedule(t), 0.5 * 0.9 ** -(2.0 * t + 1), rtol=1e-12)


def test_rate_of_momentum_is_that_of_the_decaying_weights():
    eta, lam, rho = 0.01, 0.3, 0.8
    w, v, norms = 1.0, 0.0, [1.0]
    for _ in range(200):
        v = rho * v - eta * lam * w
        w = w + v
        norms.append(w)
    norms = np.array(norms)
    schedule = normax.theory.exponential_equivalent_schedule(eta, lam, rho)
    expected = eta / (norms[:-1] * norms[1:])
    np.testing.assert_allclose(schedule(np.arange(200)), expected, rtol=1e-10)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_float32_at_100_000_steps(rho):
    eta, lam = 0.1, 4e-3 * (1 - rho)
    precise = normax.theory.exponential_equivalent_schedule(eta, lam, rho)(100_000)
    with jax.enable_x64(False):
        schedule = normax.theory.exponential_equivalent_schedule(eta, lam, rho)
        rate = schedule(jnp.asarray(100_000, jnp.int32))
        assert rate.dtype == jnp.float32
        np.testing.assert_allclose(rate, precise, rtol=80 * 3e-7)
        # e^88 is the end of float32: infinite, not NaN, from there on.
        assert schedule(120_000) == jnp.inf
        assert schedule(2**31 - 1) == jnp.inf


def recursion(number, eta, lam, rho, steps):
    """Return the rates from the weights under decay alone, in a type of numbers."""
    eta, lam, rho = (number(x) for x in (eta, lam, rho))
    before, after, rates = number(1), 1 - eta * lam, []
    for _ in range(steps):
        rates.append(eta / (before * after))
        before, after = after, (1 + rho - eta * lam) * after - rho * before
    return rates


@jax.jit
def traced_rates(eta, lam, rho, steps):
    return normax.theory.exponential_equivalent_schedule(eta, lam, rho)(steps)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("below", [0.0, 1e-12, 1e-9, 1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("rho", [0.0, 1e-8, 0.25, 0.9, 0.999])
def test_rates_up_to_the_limit_of_the_decay(rho, below, x64):
    limit = ((1 - rho) / (1 + rho**0.5)) ** 2
    # The largest decay that is still below it, but for rounding.
    lam = min(limit * (1 - below), limit * (1 - 1e-14))
    steps = {0.0: 2, 1e-8: 4, 0.25: 50, 0.9: 500, 0.999: 3000}[rho]
    with decimal.localcontext(prec=100):
        expected = recursion(decimal.Decimal, 1.0, lam, rho, steps)
        with jax.enable_x64(x64):
            make = normax.theory.exponential_equivalent_schedule
            runs = [np.asarray(make(1.0, lam, rho)(np.arange(steps)))]
            if x64:
                runs.append(traced_rates(1.0, lam, rho, np.arange(steps)))
        eps = np.finfo(runs[0].dtype).eps
        for values in runs:
            for rate, precise in zip(values.tolist(), expected, strict=True):
                exponent = float(precise.ln())
                if exponent < (700 if x64 else 87):
                    allowed = eps * (4 + 4 * exponent + 16 * x64 * exponent**2)
                    assert abs(float(decimal.Decimal(rate) / precise - 1)) < allowed


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_derivative_by_momentum_at_none(steps):
    h = fractions.Fraction(1, 10**30)
    start, moved = (
        recursion(fractions.Fraction, 0.5, 0.3, rho, steps + 1)[steps] for rho in (0, h)
    )
    make = normax.theory.exponential_equivalent_schedule
    slope_of = jax.grad(lambda rho, t: make(0.5, 0.3, rho)(t))
    for slope in (slope_of(0.0, steps), jax.jit(slope_of)(0.0, steps)):
        np.testing.assert_allclose(slope, float((moved - start) / h), atol=1e-13)


@pytest.mark.slow
def test_schedules_are_traceable_and_broadcast():
    make = normax.theory.exponential_equivalent_schedule
    rates = jax.jit(lambda eta, t: make(eta, 0.1, 0.5)(t))(0.2, 7)
    np.testing.assert_allclose(rates, make(0.2, 0.1, 0.5)(7))
    slope = jax.grad(lambda eta: make(eta, 0.1)(3))(0.2)
    step = 1e-6
    difference = (make(0.2 + step, 0.1)(3) - make(0.2 - step, 0.1)(3)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    assert make(np.array([0.1, 0.2]), 0.1)(3).shape == (2,)
    momenta = np.array([0.0, 0.3, 0.6])
    np.testing.assert_allclose(
        jax.vmap(lambda rho: make(0.2, 0.1, rho)(7))(momenta),
        make(0.2, 0.1, momenta)(7),
    )


def test_harmonic_schedule():
    schedule = normax.theory.harmonic_schedule(0.001, 50, 10)
    t = np.arange(1000)
    np.testing.assert_allclose(schedule(t), 0.001 / (t / 50 + 10), rtol=1e-12)
    tx = optax.sgd(schedule)
    state = tx.init(jnp.ones(()))
    for t in range(3):
        update, state = tx.update(jnp.ones(()), state)
        np.testing.assert_allclose(update, -0.001 / (t / 50 + 10), rtol=1e-6)


CURVATURES = np.geomspace(0.5, 50, 12)


def convergence_rate(learning_rate, momentum):
    """Factor per step, from two late times; the runs start at ones."""
    tx = optax.sgd(learning_rate, momentum=momentum)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(CURVATURES * w, state)
        w = optax.apply_updates(w, updates)
        return (w, state), jnp.linalg.norm(w)

    w = jnp.ones(len(CURVATURES))
    _, norms = jax.lax.scan(step, (w, tx.init(w)), length=600)
    # A window averages over the phase of oscillations.
    early, late = (jnp.max(norms[t : t + 100]) for t in (200, 500))
    return (late / early) ** (1 / 300)


def test_optimal_momentum_converges_as_the_lecture_says_and_no_neighbour_faster():
    condition = CURVATURES[-1] / CURVATURES[0]
    learning_rate, momentum = normax.theory.optimal_momentum(
        CURVATURES[0], CURVATURES[-1]
    )
    expected = (condition**0.5 - 1) / (condition**0.5 + 1)
    factors = np.array([[1, 1], [1.1, 1], [0.9, 1], [1, 1.05], [1, 0.95], [0.95, 0.95]])
    runs = jax.jit(jax.vmap(convergence_rate))(
        learning_rate * factors[:, 0], momentum * factors[:, 1]
    )
    # At the double root the error falls as t rho^(t/2): the factor t is left.
    polynomial = (500 / 200) ** (1 / 300)
    assert expected < runs[0] < expected * polynomial * 1.002
    np.testing.assert_allclose(momentum**0.5, expected, rtol=1e-12)
    assert np.all(runs[1:] > runs[0] + 1e-3)
    gradient_descent = convergence_rate(2 / (CURVATURES[0] + CURVATURES[-1]), 0.0)
    slow = (condition - 1) / (condition + 1)
    np.testing.assert_allclose(gradient_descent, slow, rtol=1e-3)


def test_optimal_momentum_of_a_sphere_is_one_newton_step():
    learning_rate, momentum = normax.theory.optimal_momentum(4.0, np.array([4.0, 16.0]))
    np.testing.assert_allclose(learning_rate, [0.25, 1 / 9], rtol=1e-12)
    np.testing.assert_allclose(momentum, [0, 1 / 9], rtol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: normax.theory.exponential_equivalent_schedule(0.0, 0.1),
            "learning_rate must",
        ),
        (
            lambda: normax.theory.exponential_equivalent_schedule(0.1, -1.0),
            "weight_decay must",
        ),
        (
            lambda: normax.theory.exponential_equivalent_schedule(2.0, 0.5),
            "below 1, got 1",
        ),
        (
            lambda: normax.theory.exponential_equivalent_schedule(0.1, 0.1, 1.0),
            "momentum must",
        ),
        (
            lambda: normax.theory.exponential_equivalent_schedule(0.1, 0.1, 0.9),
            "below 1, got 3",
        ),
        (
            lambda: normax.theory.harmonic_schedule(0.0, 1, 1),
            "init_value must be positive",
        ),
        (
            lambda: normax.theory.harmonic_schedule(1.0, 0, 1),
            "transition_steps must be",
        ),
        (
            lambda: normax.theory.harmonic_schedule(1.0, 1, -1),
            "offset must be positive",
        ),
        (
            lambda: normax.theory.optimal_momentum(0.0, 1.0),
            "smallest_curvature must be",
        ),
        (
            lambda: normax.theory.optimal_momentum(1.0, np.inf),
            "largest_curvature must be",
        ),
        (
            lambda: normax.theory.optimal_momentum(2.0, 1.0),
            "must be at least 1 and finite",
        ),
    ],
)
def test_arguments_that_cannot_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()
