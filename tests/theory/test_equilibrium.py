"""Equilibria against simulations of the random-gradient model, in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax.theory import equilibrium

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

G, DIMENSION, CHAINS = 2.0, 256, 8
RULES = normax.UPDATE_RULES


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def unit(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


@functools.cache
def draw(steps, dimension):
    shape = (steps, dimension, CHAINS)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@functools.partial(jax.jit, static_argnums=(0, 5))
def simulate(name, eta, lam, start, noise, hyper=()):
    """Return norms and angles (settings, steps), root mean squares over the chains.

    The rule itself is run: chains are the columns of its parameter.
    """

    def chains(eta, lam, start):
        tx = RULES[name].make(eta, lam, **dict(hyper))

        def step(carry, noise):
            w, state = carry
            g = noise.astype(float)
            g = g - unit(w) * jnp.sum(g * unit(w), 0, keepdims=True)
            g = G * unit(g) / jnp.linalg.norm(w, axis=0, keepdims=True)
            updates, state = tx.update(g, state, w)
            cosine = jnp.sum(unit(w) * unit(w + updates), 0)
            w = w + updates
            squares = jnp.sum(w**2, 0), jnp.arccos(cosine) ** 2
            return (w, state), tuple(jnp.mean(square) for square in squares)

        w = start * unit(noise[-1].astype(float))
        _, squares = jax.lax.scan(step, (w, tx.init(w)), noise)
        return jnp.sqrt(squares[0]), jnp.sqrt(squares[1])

    return jax.vmap(chains)(eta, lam, start)


def errors(name, eta, lam, steps, **hyper):
    """Return the relative errors of the predicted norms and rotations."""
    eta, lam = np.array(eta), np.array(lam)
    rule, model = RULES[name], (G, DIMENSION)
    norm = rule.equilibrium_norm(eta, lam, *model, **hyper)
    rotation = rule.equilibrium_rotation(eta, lam, *model, **hyper)
    start = norm * (1.02 if name != "normalized_sgd" else 1)
    runs = simulate(name, eta, lam, start, draw(steps, DIMENSION), tuple(hyper.items()))
    # The second half: root mean squares over time too.
    norms, angles = (np.sqrt(np.mean(x[:, steps // 2 :] ** 2, 1)) for x in runs)
    return np.stack([norm / norms, rotation / angles]) - 1


EXACT = [
    ("sgd", [0.1, 0.2], [0.05, 0.5], {}),
    ("momentum", [0.1, 0.02], [0.01, 0.2], {}),
    ("sgd", [0.1, 1.0], [1.0, 1.2], {"momentum": 0.5}),
    ("nesterov", [0.1, 1.0], [0.01, 1.0], {}),
    ("sgd", [0.1, 1.0], [1.0, 1.3], {"momentum": 0.5, "nesterov": True}),
    ("normalized_sgd", [0.01, 0.2], [0.5, 1.0], {}),
]
LEADING_ORDER = [
    ("rmsprop", [0.01, 0.02], [0.03, 0.05], {}),
    ("adam", [0.01, 0.02], [0.03, 0.05], {}),
    ("adam", [0.01, 0.02], [0.03, 0.05], {"b1": 0.5, "b2": 0.95}),
    ("adamw", [0.02, 0.1], [1.0, 1.0], {}),
    ("adamw", [0.02, 0.1], [1.0, 1.0], {"b1": 0.5, "b2": 0.9}),
    ("lion", [1e-3, 3e-3], [1.0, 10.0], {}),
    ("lion", [0.01, 0.1], [1.0, 1.0], {"b1": 0.5, "b2": 0.9}),
]


@pytest.mark.parametrize("name, eta, lam, hyper", EXACT)
def test_exact_equilibria(name, eta, lam, hyper):
    np.testing.assert_allclose(errors(name, eta, lam, 1500, **hyper), 0, atol=2.5e-3)


@pytest.mark.parametrize("name, eta, lam, hyper", LEADING_ORDER)
def test_equilibria_of_adaptive_rules(name, eta, lam, hyper):
    np.testing.assert_allclose(errors(name, eta, lam, 1500, **hyper), 0, atol=0.015)


def test_sgd_is_exact_because_its_norm_does_not_fluctuate():
    # The length of the gradient is constant.
    error = errors("sgd", [0.1, 0.2], [0.05, 0.5], 1500)
    np.testing.assert_allclose(error, 0, atol=1e-8)


@pytest.mark.slow
def test_adadelta_settles_where_epsilon_puts_it():
    for hyper, steps in (({}, 1500), ({"rho": 0.95, "eps": 1e-6}, 6000)):
        error = errors("adadelta", [1.0, 3.0], [1.0, 1.0], steps, **hyper)
        np.testing.assert_allclose(error, 0, atol=0.01)


def decay_of(share):
    """Learning rate at which Adam's decay takes this share of the norm, lambda 0.1."""
    return (np.array(share) ** 3 * 2 * G**2 / (0.1 * DIMENSION) ** 2) ** 0.25


def test_where_leading_order_breaks_down():
    # Decay is then no small part of the gradient that the denominator measures.
    for name in ("rmsprop", "adam"):
        small, large = errors(name, decay_of([0.1, 1.0]), [0.1] * 2, 1500).T
        assert np.max(np.abs(small)) < 0.02
        assert np.max(np.abs(large)) > 0.05
    # RMSProp with a short memory divides by noise.
    error = errors("rmsprop", decay_of([0.01, 0.1]), [0.1] * 2, 1500, decay=0.5)
    assert 0.04 < np.max(np.abs(error)) < 0.08


def test_adagrad_never_settles():
    start = np.ones(1)
    norms, angles = simulate("adagrad", 0.1 * start, start, start, draw(30000, 16))
    early, late = slice(900, 1100), slice(27000, 30000)
    ratio = np.log(np.arange(30000)[late].mean() / 1000)

    def exponent(x):
        return np.log(x[0, late].mean() / x[0, early].mean()) / ratio

    np.testing.assert_allclose(exponent(norms), -1 / 6, atol=0.02)
    np.testing.assert_allclose(exponent(angles), -1 / 3, atol=0.02)
    for method in (
        RULES["adagrad"].equilibrium_norm,
        RULES["adagrad"].equilibrium_rotation,
    ):
        with pytest.raises(ValueError, match=r"'adagrad'.*no equilibrium.*rmsprop"):
            method(0.1, 0.1, G, DIMENSION)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, eta, lam, hyper, delay",
    [
        ("sgd", 0.1, 0.05, {}, 1),
        ("momentum", 0.05, 0.01, {}, 10),
        ("nesterov", 0.05, 0.01, {}, 10),
        ("rmsprop", 0.01, 0.05, {}, 25),
        ("adam", 0.01, 0.05, {"b1": 0.5, "b2": 0.95}, 20),
        ("adamw", 0.02, 0.25, {"b1": 0.5, "b2": 0.9}, 10),
    ],
)
def test_time_to_equilibrium(name, eta, lam, hyper, delay):
    rule, model = RULES[name], (G, DIMENSION)
    norm = rule.equilibrium_norm(eta, lam, *model, **hyper)
    starts = norm * np.array([0.5, 3.0])
    predicted = rule.equilibrium_time(eta, lam, *model, initial_norm=starts, **hyper)
    noise, ones = draw(1500, DIMENSION), np.ones(2)
    runs = simulate(name, eta * ones, lam * ones, starts, noise, tuple(hyper.items()))
    assert rule.equilibrium_time(eta, lam, *model, initial_norm=norm, **hyper) == 0
    measured = np.argmax(np.abs(runs[0] / norm - 1) < 0.1, 1)
    # Averages over past gradients delay the norm, or hurry it before they are full.
    np.testing.assert_allclose(measured, predicted, rtol=0.05, atol=delay)


def test_normalized_sgd_is_normalized_at_once():
    assert RULES["normalized_sgd"].equilibrium_time(0.1, 0.1, initial_norm=3.0) == 0


@pytest.mark.parametrize("norm", [0.1, 5.0])
def test_newton(norm):
    # Relative steps of length eta G, orthogonal to w, and relative decay.
    eta, lam, rng = 0.05, 0.2, np.random.default_rng(0)
    w = norm * unit(rng.normal(size=(DIMENSION, 1)))
    settled = equilibrium.NEWTON.settle(*(jnp.array(x) for x in (eta, lam, G, 1.0)))
    for _ in range(3):
        n = rng.normal(size=w.shape)
        n -= unit(w) * np.sum(n * unit(w))
        step = -eta * G * np.linalg.norm(w) * unit(n)
        angle = np.arccos(np.sum(unit(w) * unit(w + step)))
        np.testing.assert_allclose(angle, settled.rotation, rtol=1e-12)
        w = (1 - eta * lam) * w + step
    assert settled.norm == 0
    ratio = norm / settled.norm
    time = equilibrium.steps_to_equilibrium(
        equilibrium.NEWTON, ratio, settled.decay_rate
    )
    assert time == np.inf


def test_newton_at_a_minimum_shrinks_the_norm_whatever_the_decay():
    # The penalty is the only curvature along w there, so that the step is eta w.
    matrix = jnp.diag(jnp.arange(1.0, 6.0))

    @jax.jit
    def step(w, lam):
        def loss(w):
            return w @ matrix @ w / (w @ w) + lam / 2 * w @ w

        return w - 0.5 * jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w))

    for lam in (1e-3, 1.0):
        w = jnp.eye(5)[0]
        for t in range(1, 10):
            w = step(w, lam)
            np.testing.assert_allclose(w, 0.5**t * jnp.eye(5)[0], atol=1e-12)


EXPONENTS = {"rmsprop": 3, "adam": 3, "adadelta": 3, "adamw": 2, "lion": 2}
NOT_SETTLING = (None, equilibrium.NEWTON)
# Muon's dimension is a pair, and Adafactor settles by another hyperparameter: theirs
# are in test_muon and test_prediction.
OWN_TESTS = ("muon", "adafactor")
SETTLING = [
    name
    for name in RULES
    if RULES[name].theory not in NOT_SETTLING and name not in OWN_TESTS
]


@pytest.mark.parametrize("name", SETTLING)
def test_exponents_of_table_1(name):
    """Logarithmic derivatives: under jit and grad, of norm, rate and rotation."""
    rule = RULES[name]

    def logarithms(log_eta, log_lam):
        eta, lam = jnp.exp(log_eta), jnp.exp(log_lam)
        norm = rule.equilibrium_norm(eta, lam, G, DIMENSION)
        rate = rule.effective_learning_rate(eta, norm)
        rotation = rule.equilibrium_rotation(eta, lam, G, DIMENSION)
        return jnp.log(jnp.stack([norm, rate, rotation]))

    point = jnp.log(1e-4), jnp.log(1e-4)
    by_eta, by_lam = jax.jit(jax.jacfwd(logarithms, (0, 1)))(*point)
    if name == "normalized_sgd":
        np.testing.assert_allclose(by_eta, [0, 1, 1], atol=1e-6)
        np.testing.assert_allclose(by_lam, [0, 0, 0], atol=1e-6)
        return
    n = EXPONENTS.get(name, 4)
    p = 1 if name == "adadelta" else rule.norm_power
    power = rule.norm_power
    np.testing.assert_allclose(by_eta, [1 / n, 1 - power / n, 1 - p / n], atol=1e-5)
    np.testing.assert_allclose(by_lam, [-1 / n, power / n, p / n], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov", "rmsprop", "adamw"])
def test_arguments_broadcast_and_settle_the_dtype(name):
    rule = RULES[name]
    with jax.enable_x64(False):
        eta = np.array([[0.01], [0.02]], np.float32)
        lam = np.array([0.1, 0.2, 0.3], np.float32)
        methods = (
            rule.equilibrium_norm,
            rule.equilibrium_rotation,
            functools.partial(rule.equilibrium_time, initial_norm=np.float32(7)),
        )
        for method in methods:
            values = method(eta, lam, 2, 64)
            assert (values.shape, values.dtype) == ((2, 3), jnp.float32)
            alone = method(np.float32(0.02), np.float32(0.3), 2, 64)
            np.testing.assert_allclose(values[1, 2], alone, rtol=1e-6)
            half = method(jnp.bfloat16(0.5), 0.5, jnp.bfloat16(2), 64)
            assert half.dtype == jnp.float32
        assert rule.equilibrium_norm(0.01, 0.1, np.ones(5), 64).shape == (5,)


@pytest.mark.parametrize("name", SETTLING)
def test_without_decay_the_norm_grows_for_ever(name):
    rule = RULES[name]
    if name == "normalized_sgd":
        return
    assert rule.equilibrium_norm(0.1, 0.0, G, DIMENSION) == np.inf
    assert rule.equilibrium_rotation(0.1, 0.0, G, DIMENSION) == 0
    time = rule.equilibrium_time(0.1, 0.0, G, DIMENSION, initial_norm=1.0)
    assert time == np.inf


def test_only_what_matters_is_asked_for():
    assert RULES["sgd"].equilibrium_norm(0.1, 0.1, 1.0) > 0
    assert RULES["sgd"].equilibrium_rotation(0.1, 0.1) > 0
    assert RULES["adamw"].equilibrium_rotation(0.1, 0.1) > 0
    assert RULES["normalized_sgd"].equilibrium_norm(0.1, 0.1) == 1
    with pytest.raises(ValueError, match=r"'sgd'.*depends on the gradient_norm.*pass"):
        RULES["sgd"].equilibrium_norm(0.1, 0.1)
    with pytest.raises(ValueError, match=r"'adamw'.*depends on the dimension"):
        RULES["adamw"].equilibrium_norm(0.1, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"'adam'.*depends on the gradient_norm"):
        RULES["adam"].equilibrium_rotation(0.1, 0.1)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("sgd", dict(learning_rate=0.0), "learning_rate must be positive.*got 0"),
        ("sgd", dict(weight_decay=-0.1), "weight_decay must be at least 0"),
        ("sgd", dict(gradient_norm=np.nan), "gradient_norm must be positive.*nan"),
        ("adam", dict(dimension=0), "dimension must be positive.*got 0"),
        ("adam", dict(b1=1.0), "b1 must be at least 0 and below 1"),
        ("rmsprop", dict(decay=-0.1), "decay must be at least 0"),
        ("sgd", dict(learning_rate=20.0), "learning_rate \\* weight_decay.*below 2"),
        ("adamw", dict(learning_rate=20.0), "learning_rate \\* weight_decay.*below 2"),
        ("nesterov", dict(learning_rate=14.0), "weight_decay.*below 2"),
        ("rmsprop", dict(momentum=0.5), "not known for momentum=0.5; leave"),
        ("adam", dict(nesterov=True), "not known for nesterov=True; leave"),
        ("normalized_sgd", dict(momentum=0.5), "not known for momentum=0.5; leave"),
        ("rmsprop", dict(centered=np.True_), "not known for centered=True; leave"),
        ("newton", dict(damping=10.0), "not known for damping=10.0; leave"),
        ("hessian_free", dict(damping=np.ones(())), "not known for damping=1.0; leave"),
    ],
)
def test_arguments_that_cannot_be_right(name, arguments, message):
    good = dict(learning_rate=0.1, weight_decay=0.1, gradient_norm=1.0, dimension=9)
    with pytest.raises(ValueError, match=message):
        RULES[name].equilibrium_norm(**good | arguments)


@pytest.mark.parametrize(
    "name, hyper",
    [
        ("normalized_sgd", dict(momentum=0.0, nesterov=np.False_)),
        ("rmsprop", dict(centered=np.bool_(False), momentum=None, nesterov=0)),
        ("newton", dict(damping=0)),
        ("hessian_free", dict(damping=jnp.zeros(()))),
    ],
)
def test_hyperparameters_that_change_nothing_may_be_given(name, hyper):
    norm = RULES[name].equilibrium_norm
    assert norm(0.1, 0.1, 1.0, 9, **hyper) == norm(0.1, 0.1, 1.0, 9)
    # What is traced may be anything.
    with pytest.raises(ValueError, match="not known for"):
        jax.jit(lambda hyper: norm(0.1, 0.1, 1.0, 9, **hyper))(hyper)


# Beyond the squares, fourth powers and products that float32 can hold.
WIDE = [
    ("sgd", 0.1, 1e-3, 1e25),
    ("sgd", 0.1, 1e-3, 1e-25),
    ("momentum", 1e-4, 1e-8, 1e-21),
    ("nesterov", 1e-4, 1e-8, 1e22),
    ("rmsprop", 1e-5, 1e-8, 1e4),
    ("rmsprop", 1e-5, 1e-14, 1e-20),
    ("adam", 1e-5, 1e-8, 1e4),
    ("adam", 1e3, 1e-10, 1e20),
    ("adam", 1e-12, 1e-6, 1e-6),
    ("adadelta", 1e-2, 1e-8, 1e4),
    ("adamw", 1e-5, 1e-8, 1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, eta, lam, gradient_norm", WIDE)
def test_range_of_float32(name, eta, lam, gradient_norm):
    rule = RULES[name]
    arguments = eta, lam, gradient_norm, 64.0
    precise = rule.equilibrium_norm(*arguments)
    methods = [rule.equilibrium_norm, rule.equilibrium_rotation]
    for factor in (1e-15, 0.3, 2.0, 1e5, 1e12, 1e22):
        start = float(precise * factor)
        if 1e-30 < start < 1e30:
            methods.append(
                functools.partial(rule.equilibrium_time, initial_norm=np.float32(start))
            )

    def results():
        return [
            np.array(
                [method(*arguments), *jax.grad(method, (0, 1, 2, 3))(*arguments)],
                np.float64,
            )
            for method in methods
        ]

    expected = results()
    with jax.enable_x64(False):
        found = results()
    for value, known in zip(found, expected, strict=True):
        assert np.all(np.isfinite(value))
        # In units of the value: a derivative may be nothing but what cancels.
        scale = np.abs(known[0]) / np.array([1.0, *arguments])
        np.testing.assert_allclose(value / scale, known / scale, rtol=1e-4, atol=1e-4)


def test_hyperparameters_are_those_of_the_rule():
    with pytest.raises(TypeError, match="b1"):
        RULES["sgd"].equilibrium_norm(0.1, 0.1, 1.0, b1=0.9)
    defaults = RULES["adam"].equilibrium_rotation(0.1, 0.1, 1.0, 9)
    named = RULES["adam"].equilibrium_rotation(
        0.1, 0.1, 1.0, 9, b1=0.9, b2=0.999, eps=1e-8, nesterov=False
    )
    assert defaults == named
    with pytest.raises(ValueError, match="initial_norm must be positive"):
        RULES["sgd"].equilibrium_time(0.1, 0.1, 1.0, initial_norm=-1.0)


@pytest.mark.parametrize("name", [*SETTLING, *OWN_TESTS])
def test_every_settling_rule_has_a_theory_in_its_own_names(name):
    parameters = inspect.signature(RULES[name].theory.settle).parameters
    assert set(parameters) - {"gradient_norm", "dimension"} <= set(
        inspect.signature(RULES[name].make).parameters
    )
