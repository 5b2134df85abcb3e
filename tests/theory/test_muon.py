"""Muon's theory against simulations of random gradients in NumPy, in float64.

The rule is written anew here, with the exact polar factor and with Newton and Schulz.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax
from normax.theory.orthogonalization import DEGREE, orthogonalized

pytestmark = pytest.mark.few_rows(1)
MUON = normax.UPDATE_RULES["muon"]
STEPS, G = 800, 2.0
# Optax has it from 0.2.7 on.
HAS_RMS = "consistent_rms" in inspect.signature(MUON.make).parameters
RMS = dict(consistent_rms=0.2) if HAS_RMS else {}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Iterations that end at the polar factor itself.
CONVERGENT = dict(ns_coeffs=(15 / 8, -10 / 8, 3 / 8), ns_steps=40)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def length(x):
    return np.sqrt(np.sum(x**2, (-2, -1), keepdims=True))


def polar(x):
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v


def newton_schulz(x, coefficients=COEFFICIENTS, steps=5):
    flat = x.shape[-2] <= x.shape[-1]
    x = (x if flat else np.swapaxes(x, -1, -2)) / length(x)
    a, b, c = coefficients
    for _ in range(steps):
        square = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x if flat else np.swapaxes(x, -1, -2)


ORTHOGONAL = {"newton_schulz": (newton_schulz, {}), "polar": (polar, CONVERGENT)}


def scale_of(shape, consistent_rms):
    rows, columns = shape
    if consistent_rms is None:
        return np.sqrt(max(1, columns / rows))
    return np.sqrt(max(rows, columns)) * consistent_rms


def simulate(
    orthogonal, eta, decay, start, shape, matrices=8, beta=0.95, nesterov=True,
    consistent_rms=None, profile=G,
):  # fmt: skip
    """Return norms before each step and angles, root mean squares over matrices."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((matrices, *shape))
    w *= start / length(w)
    profile = np.broadcast_to(profile, len(eta))
    m, norms, angles = 0.0, [], []
    for t, rate in enumerate(eta, 1):
        norm = length(w)
        g = rng.standard_normal(w.shape)
        g -= np.sum(g * w, (1, 2), keepdims=True) / norm**2 * w
        g *= profile[t - 1] / norm / length(g)
        m = beta * m + (1 - beta) * g
        c = m
        if nesterov:
            c = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        u = -rate * (orthogonal(c) * scale_of(shape, consistent_rms) + decay * w)
        radial = np.sum(u * w, (1, 2), keepdims=True) / norm
        angles.append(np.arctan2(length(u - radial * w / norm), norm + radial).ravel())
        norms.append(norm.ravel())
        w = w + u
    root = lambda x: np.sqrt(np.mean(np.square(x), 1))  # noqa: E731
    return root(norms), root(angles)


def schedule(kind, peak, steps=STEPS):
    t = np.arange(steps) + 1.0
    left = np.clip((steps - t) / (0.9 * steps), 0, 1)
    shape = {
        "constant": np.ones(steps),
        "linear": left,
        "cosine": (1 - np.cos(np.pi * left)) / 2,
        "wsd": np.minimum(left * 5, 1),
    }[kind]
    return peak * np.minimum(10 * t / steps, 1) * np.minimum(shape + 1e-3, 1)


def follow(values):
    return lambda count: jnp.asarray(values)[count]


def mean_errors(how, kind, decay, shape, profile=G, **options):
    orthogonal, hyper = ORTHOGONAL[how]
    eta = schedule(kind, 0.01)
    norm, angle = simulate(
        orthogonal, eta, decay, 3.0, shape, profile=profile, **options
    )
    run = MUON.predict(
        follow(eta), decay, steps=STEPS, initial_norm=3.0, gradient_norm=profile,
        dimension=shape, **options, **hyper,
    )  # fmt: skip
    pairs = (run.weight_norm, norm), (run.angular_update, angle)
    return [np.mean(np.abs(a / b - 1)[50:]) for a, b in pairs]


RUNS = [
    ("newton_schulz", "linear", 1.0, (16, 24), {}),
    ("polar", "wsd", 5.0, (16, 24), {}),
    ("newton_schulz", "cosine", 5.0, (24, 16), dict(nesterov=False)),
    ("newton_schulz", "constant", 0.3, (24, 24), dict(beta=0.9)),
    ("polar", "constant", 1.0, (24, 24), {}),
    ("newton_schulz", "wsd", 1.0, (8, 64), RMS),
    ("polar", "cosine", 0.3, (64, 8), dict(nesterov=False)),
    ("newton_schulz", "constant", 1.0, (1, 64), {}),
    ("newton_schulz", "linear", 1.0, (16, 24), dict(profile=np.geomspace(4, 0.1, 800))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kind", "decay", "shape", "options"), RUNS)
def test_a_whole_run(how, kind, decay, shape, options):
    errors = mean_errors(how, kind, decay, shape, **options)
    assert np.all(np.array(errors) < 0.015), errors


def test_a_short_run():
    eta = np.full(120, 0.02)
    norm, angle = simulate(newton_schulz, eta, 1.0, 1.0, (8, 16))
    run = MUON.predict(
        0.02, 1.0, steps=120, initial_norm=1.0, gradient_norm=G, dimension=(8, 16)
    )
    np.testing.assert_allclose(run.weight_norm, norm, rtol=0.02)
    assert np.mean(np.abs(run.angular_update / angle - 1)) < 0.02


# Shape, share of the norm that decays, Nesterov; bounds for errors of norm and angle.
SETTLED = [
    ((4, 4), 0.05, True, 0.015, 0.015),
    ((8, 8), 0.05, True, 0.015, 0.015),
    ((4, 16), 0.05, True, 0.015, 0.015),
    ((24, 16), 0.05, True, 0.015, 0.015),
    ((4, 4), 0.05, False, 0.025, 0.025),
    ((8, 8), 0.05, False, 0.025, 0.025),
    ((4, 4), 0.3, True, 0.035, 0.035),
    ((8, 8), 0.3, True, 0.035, 0.035),
    ((4, 4), 0.3, False, 0.035, 0.12),
    ((8, 8), 0.3, False, 0.035, 0.12),
    ((24, 16), 0.3, False, 0.035, 0.12),
    ((2, 8), 0.3, False, 0.025, 0.025),
    ((3, 12), 0.05, True, 0.025, 0.025),
    ((3, 3), 0.05, False, 0.05, 0.05),
    ((3, 3), 0.3, False, 0.05, 0.17),
    ((2, 2), 0.05, False, 0.13, 0.13),
    ((2, 2), 0.3, False, 0.13, 0.24),
]


@pytest.mark.slow
@pytest.mark.parametrize("shape, share, nesterov, norm, angle", SETTLED)
def test_where_norm_and_angle_settle(shape, share, nesterov, norm, angle):
    """The accuracy that docs/theory/theory.md states."""
    eta, decay, options = 0.01, share / 0.01, dict(nesterov=nesterov)
    settled = (
        MUON.equilibrium_norm(eta, decay, None, shape, **options),
        MUON.equilibrium_rotation(eta, decay, None, shape, **options),
    )
    found = simulate(
        newton_schulz, np.full(500, eta), decay, float(settled[0]), shape,
        matrices=4000 // (shape[0] * shape[1]), **options,
    )  # fmt: skip
    measured = [np.sqrt(np.mean(values[200:] ** 2)) for values in found]
    errors = np.abs(np.array(settled) / measured - 1)
    assert errors[0] < norm and errors[1] < angle, errors


@pytest.mark.slow
def test_newton_schulz_is_no_constant_times_the_polar_factor():
    """The ranges that docs/theory/theory.md states."""
    k = np.unique(np.round(np.geomspace(1, 16384, 120)))[:, None]
    shape = k, k * np.array([1, 1.5, 2, 4, 8, 16])
    for law, low, high in (
        (MUON.equilibrium_norm, 0.69, 1.09),
        (MUON.equilibrium_rotation, 0.97, 1.08),
    ):
        ratio = law(1e-3, 0.1, None, shape) / law(1e-3, 0.1, None, shape, **CONVERGENT)
        found = np.array([ratio.min(), ratio.max()])
        np.testing.assert_allclose(found, [low, high], atol=0.01)


HYPERS = [
    {},
    dict(nesterov=False, beta=0.9),
    RMS,
    dict(beta=0.0),
    CONVERGENT,
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16.0, 48.0), (64.0, 64.0)])
@pytest.mark.parametrize("hyper", HYPERS)
def test_the_fixed_point_is_the_equilibrium(shape, hyper):
    eta, decay = 0.02, 1.0
    run = MUON.predict(
        eta, decay, steps=1500, initial_norm=1.0, dimension=shape, **hyper
    )
    norm = MUON.equilibrium_norm(eta, decay, None, shape, **hyper)
    angle = MUON.equilibrium_rotation(eta, decay, None, shape, **hyper)
    # Without epsilon, which is 1e-8 beside momenta of some 1e-2.
    np.testing.assert_allclose(run.weight_norm[-1], norm, rtol=2e-6)
    np.testing.assert_allclose(run.angular_update[-1], angle, rtol=2e-6)


@pytest.mark.slow
def test_powers_and_time_of_the_equilibrium():
    """Norms go as the root of the rate over the decay, and angles as of the product."""
    norm = functools.partial(MUON.equilibrium_norm, gradient_norm=None)
    shape = (32, 64)
    ratio = norm(1e-6, 4e-4, dimension=shape) / norm(4e-6, 1e-4, dimension=shape)
    np.testing.assert_allclose(ratio, 1 / 4, rtol=1e-4)
    settled = MUON.equilibrium_rotation(1e-6, 1e-4, dimension=shape)
    doubled = MUON.equilibrium_rotation(2e-6, 2e-4, dimension=shape)
    np.testing.assert_allclose(doubled / settled, 2, rtol=1e-4)
    assert norm(0.1, 0.0, dimension=shape) == np.inf
    assert MUON.equilibrium_rotation(0.1, 0.0, dimension=shape) == 0
    assert np.shape(norm(0.1, np.ones(3), dimension=(4.0, np.full((2, 1), 8)))) == (
        2,
        3,
    )
    eta, start = 0.01, 0.2 * norm(0.01, 1.0, dimension=shape)
    time = MUON.equilibrium_time(eta, 1.0, None, shape, initial_norm=start)
    run = MUON.predict(eta, 1.0, steps=500, initial_norm=start, dimension=shape)
    arrived = np.argmax(run.weight_norm > 0.9 * norm(eta, 1.0, dimension=shape))
    np.testing.assert_allclose(time, arrived, rtol=0.05, atol=20)


@pytest.mark.parametrize("how", ORTHOGONAL)
def test_moments_of_orthogonalized_matrices(how):
    """Lengths and linear parts, for square and for long matrices, by samples."""
    function, hyper = ORTHOGONAL[how]
    hyper = dict(ns_coeffs=COEFFICIENTS, ns_steps=5) | hyper
    rng = np.random.default_rng(0)
    for rows, columns, atol in ((1, 64, 0.01), (4, 4, 0.06), (32, 32, 0.02),
                                (48, 32, 0.02), (8, 256, 0.01)):  # fmt: skip
        x = rng.standard_normal((6400 // rows, rows, columns))
        o = function(x)
        size2 = np.mean(length(o) ** 2)
        linear2 = np.mean(np.sum(o * x, (1, 2))) ** 2 / np.mean(length(x) ** 2)
        found = orthogonalized((rows * 1.0, columns * 1.0), **hyper)
        scale2, shorter = max(1, columns / rows), min(rows, columns)
        for value, expected in ((found.linear2, linear2),
                                (found.rest2, size2 - linear2)):  # fmt: skip
            np.testing.assert_allclose(value / scale2 / shorter, expected / shorter,
                                       atol=atol)  # fmt: skip


@pytest.mark.parametrize("shape", [(24, 24), (32, 48)])
def test_rests_of_correlated_matrices_overlap_by_a_power(shape):
    """The mean of c^n / c over c is 1/n; that is what the sum over all steps weighs."""
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 400, *shape))
    o = newton_schulz(x)
    rest = o - np.sum(o * x) / np.sum(x * x) * x
    values = []
    for c in np.linspace(0.05, 0.95, 10):
        other = newton_schulz(c * x + np.sqrt(1 - c**2) * z)
        values.append(np.sum(rest * other) / np.sum(rest**2) / c)
    np.testing.assert_allclose(np.mean(values), 1 / DEGREE, atol=0.07)


@pytest.mark.slow
def test_the_length_of_a_step_is_that_of_optax():
    """All scalings, coefficients and steps, on one large matrix of noise."""
    shape = (40, 120)
    g = jax.random.normal(jax.random.key(0), shape)
    table = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377))
    for hyper in ({}, dict(ns_steps=3), dict(ns_coeffs=table, ns_steps=2),
                  CONVERGENT, dict(beta=0.5, nesterov=False), dict(eps=20.0),
                  RMS):  # fmt: skip
        w = jnp.ones(shape) / 40**0.5 / 120**0.5
        tx = MUON.make(0.01, **hyper)
        updates, _ = tx.update(g, tx.init(w), w)
        run = MUON.predict(
            0.01, 0.0, steps=1, initial_norm=1.0, dimension=shape,
            gradient_norm=jnp.linalg.norm(g), **hyper,
        )  # fmt: skip
        across = updates - jnp.sum(updates * w) * w
        expected = jnp.arctan2(jnp.linalg.norm(across), 1 + jnp.sum(updates * w))
        np.testing.assert_allclose(run.angular_update[0], expected, rtol=0.02)


@pytest.mark.slow
def test_the_schedule_of_an_angle_gives_the_angle():
    angle = 0.02 + 0.03 * (1 + np.cos(np.arange(STEPS) / STEPS * np.pi)) / 2
    run = dict(steps=STEPS, initial_norm=3.0, gradient_norm=G, dimension=(16, 24))
    rate = MUON.schedule_for_angle(follow(angle), 0.5, **run)
    eta = np.asarray(jax.vmap(rate)(jnp.arange(STEPS)))
    np.testing.assert_allclose(
        MUON.predict(follow(eta), 0.5, **run).angular_update, angle, rtol=1e-9
    )
    _, measured = simulate(newton_schulz, eta, 0.5, 3.0, (16, 24))
    assert np.mean(np.abs(measured / angle - 1)[50:]) < 0.02


@pytest.mark.slow
def test_matrices_at_once_derivatives_and_float32():
    rows, columns = jnp.array([8.0, 16.0, 64.0]), jnp.array([8.0, 64.0, 16.0])
    predict = functools.partial(
        MUON.predict, optax.linear_schedule(0.02, 0.0, 60), steps=60, initial_norm=1.0
    )
    together = predict(0.1, dimension=(rows, columns))
    assert together.weight_norm.shape == (60, 3)
    mapped = jax.vmap(lambda r, c: predict(0.1, dimension=(r, c)).angular_update)
    np.testing.assert_allclose(mapped(rows, columns).T, together.angular_update)

    def last(decay):
        return predict(decay, dimension=(8, 16)).weight_norm[-1]

    difference = (last(0.1 + 1e-5) - last(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(last)(0.1), difference, rtol=1e-6)
    with jax.enable_x64(False):
        run = predict(0.1, dimension=(jnp.float32(8), 16))
    assert run.angular_update.dtype == jnp.float32
    exact = predict(0.1, dimension=(8, 16))
    np.testing.assert_allclose(run.angular_update, exact.angular_update, rtol=1e-4)


@pytest.mark.parametrize("dimension", [512, 512.0, (3, 4, 5), jnp.ones(2)])
def test_a_dimension_that_is_no_pair(dimension):
    message = r"'muon'.*must be a pair, got.*dimension=\(rows, columns\), the inputs"
    for call in (
        functools.partial(MUON.equilibrium_norm, 0.1, 0.1, None, dimension),
        functools.partial(MUON.equilibrium_rotation, 0.1, 0.1, None, dimension),
        functools.partial(
            MUON.predict, 0.1, 0.1, steps=3, initial_norm=1.0, dimension=dimension
        ),
        functools.partial(
            MUON.schedule_for_angle, 0.1, 0.1, steps=3, initial_norm=1.0,
            dimension=dimension,
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_a_pair_where_a_number_is_due():
    message = r"'adamw'.*number of entries.*got \(8, 16\); pass dimension=rows \* col"
    with pytest.raises(ValueError, match=message):
        normax.UPDATE_RULES["adamw"].equilibrium_norm(0.1, 0.1, dimension=(8, 16))
    with pytest.raises(ValueError, match=message):
        normax.UPDATE_RULES["adamw"].predict(
            0.1, 0.1, steps=3, initial_norm=1.0, dimension=(8, 16)
        )


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        (dict(dimension=None), r"depends on the dimension.*pass.*dimension"),
        (dict(dimension=(8, 0)), r"dimension\[1\] must be positive"),
        (dict(adaptive=True), "not known for adaptive=True"),
        (dict(ns_coeffs="standard"), "ns_coeffs is 'standard'; pass them as a tuple"),
        (dict(beta=1.0), "beta must be at least 0 and below 1"),
    ],
)
def test_arguments_that_cannot_be_right(hyper, message):
    given = dict(dimension=(8, 16)) | hyper
    with pytest.raises(ValueError, match=message):
        MUON.equilibrium_norm(0.1, 0.1, **given)
    with pytest.raises(ValueError, match=message):
        MUON.predict(0.1, 0.1, steps=3, initial_norm=1.0, **given)


def test_hyperparameters_of_its_adam_change_nothing():
    given = dict(dimension=(8, 16), adam_b1=0.5, adam_weight_decay=0.1)
    assert MUON.equilibrium_norm(0.1, 0.1, **given) == MUON.equilibrium_norm(
        0.1, 0.1, dimension=(8, 16)
    )
    MUON.predict(0.1, 0.1, steps=3, initial_norm=1.0, **given)


@pytest.mark.slow
def test_the_table_needs_no_dimension():
    """Angles are within a tenth of the table's where the rates are small.

    Here the product of the rates is 0.002, and both sides are 4 at least.
    """
    params = {"kernel": jnp.ones((8, 16))}
    tx = normax.monitor_weight_dynamics(axes="layer")
    updates = {"kernel": 0.01 * jax.random.normal(jax.random.key(0), (8, 16))}
    _, state = tx.update(updates, tx.init(params), params)
    row = normax.dynamics_table(state, "muon", 0.02, 0.1).arrays[0]
    for shape in (
        (4, 4),
        (8, 8),
        (64, 64),
        (512, 64),
        (64, 512),
        (2048, 2048),
        (8, 4096),
    ):
        exact = MUON.equilibrium_rotation(0.02, 0.1, dimension=shape)
        np.testing.assert_allclose(row.equilibrium_rotation, exact, rtol=0.1)
    assert "too slow" in row.verdict or "too fast" in row.verdict
    assert np.isfinite(row.steps_left)
    absolute = dict(multiply_by_parameter_scale=False)
    row = normax.dynamics_table(state, "adafactor", 0.02, 0.1, **absolute).arrays[0]
    assert np.isfinite(row.steps_left)
    row = normax.dynamics_table(state, "adafactor", 0.02, 0.1).arrays[0]
    assert row.verdict == "adafactor has no equilibrium: steps scale with the norm"
    assert np.isnan(row.equilibrium_rotation) and np.isnan(row.steps_left)
