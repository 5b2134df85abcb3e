"""Update rules against the printed recurrences, and their scaling laws, in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

pytestmark = pytest.mark.few_rows(1)

ETA, STEPS = 0.05, 12
TARGET = np.random.default_rng(1).normal(size=(6, 3))
START = np.random.default_rng(0).normal(size=(6, 3))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gradient(w):
    """Gradient of a loss that is no quadratic, sum of (w - target)^4 / 4 + w^2 / 2."""
    return (w - TARGET) ** 3 + w


def sgd(w, grad):
    while True:
        w = w - ETA * grad(w)
        yield w


def momentum(w, grad, rho=0.9):
    v = 0.0
    while True:
        v = rho * v - ETA * grad(w)
        w = w + v
        yield w


def nesterov(w, grad, rho=0.9):
    v = 0.0
    while True:
        v = rho * v - ETA * grad(w + rho * v)
        w = w + v
        yield w + rho * v


def adagrad(w, grad, eps=1e-7):
    r = 0.0
    while True:
        g = grad(w)
        r = r + g**2
        w = w - ETA / np.sqrt(r + eps) * g
        yield w


def rmsprop(w, grad, rho=0.9, eps=1e-8):
    r = 0.0
    while True:
        g = grad(w)
        r = rho * r + (1 - rho) * g**2
        w = w - ETA * g / np.sqrt(r + eps)
        yield w


def adadelta(w, grad, rho=0.9, eps=1e-6, eta=ETA):
    r = d = 0.0
    while True:
        g = grad(w)
        r = rho * r + (1 - rho) * g**2
        u = np.sqrt(d + eps) / np.sqrt(r + eps) * g
        d = rho * d + (1 - rho) * u**2
        w = w - eta * u
        yield w


def adam(w, grad, b1=0.9, b2=0.999, eps=1e-8, decoupled=0.0):
    m = r = 0.0
    t = 0
    while True:
        t, g = t + 1, grad(w)
        m, r = b1 * m + (1 - b1) * g, b2 * r + (1 - b2) * g**2
        step = m / (1 - b1**t) / (np.sqrt(r / (1 - b2**t)) + eps)
        w = w - ETA * (step + decoupled * w)
        yield w


def lion(w, grad, b1=0.9, b2=0.99, decoupled=0.0):
    m = 0.0
    while True:
        g = grad(w)
        w = w - ETA * (np.sign(b1 * m + (1 - b1) * g) + decoupled * w)
        m = b2 * m + (1 - b2) * g
        yield w


def muon(w, grad, beta=0.95, decoupled=0.0, nesterov=True, rms=None):
    m, t, (rows, columns) = 0.0, 0, w.shape
    scale = np.sqrt(max(1, columns / rows))
    if rms is not None:
        scale = rms * np.sqrt(max(rows, columns))
    while True:
        t, g = t + 1, np.asarray(grad(w))
        m = beta * m + (1 - beta) * g
        c = m / (1 - beta**t)
        if nesterov:
            c = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        # Newton and Schulz act on each singular value by itself.
        u, s, v = np.linalg.svd(c / (np.linalg.norm(c) + 1e-8), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = w - ETA * (scale * (u * s) @ v + decoupled * w)
        yield w


def adafactor(
    w, grad, decoupled=0.0, power=0.8, threshold=1.0, rho=0.0, relative=True, eps=1e-30,
    factored=False,
):  # fmt: skip
    r = rows = columns = v = 0.0
    t = 0
    while True:
        t, g = t + 1, np.asarray(grad(w))
        kept = 1 - t**-power
        square = g**2 + eps
        r = kept * r + (1 - kept) * square
        rows = kept * rows + (1 - kept) * square.mean(1, keepdims=True)
        columns = kept * columns + (1 - kept) * square.mean(0, keepdims=True)
        u = g / np.sqrt(rows * columns / rows.mean() if factored else r)
        u = u / max(1, np.sqrt(np.mean(u**2)) / threshold)
        u = ETA * u * (max(np.sqrt(np.mean(w**2)), 1e-3) if relative else 1)
        v = rho * v + (1 - rho) * u
        w = w - v - decoupled * w
        yield w


def normalized_sgd(w, grad):
    while True:
        w = w - ETA * grad(w)
        w = w / np.sqrt(np.sum(w**2, axis=0))
        yield w


PRINTED = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adadelta": adadelta,
    "adam": adam,
    "normalized_sgd": normalized_sgd,
}
# Not the defaults: a hyperparameter that is dropped or misnamed must show.
OTHERS = {
    "momentum": ({"momentum": 0.6}, {"rho": 0.6}),
    "nesterov": ({"momentum": 0.6}, {"rho": 0.6}),
    "adagrad": ({"eps": 0.1}, {"eps": 0.1}),
    "rmsprop": ({"decay": 0.5, "eps": 0.1}, {"rho": 0.5, "eps": 0.1}),
    "adadelta": ({"rho": 0.5, "eps": 0.1}, {"rho": 0.5, "eps": 0.1}),
    "adam": (dict(b1=0.5, b2=0.8, eps=0.1), dict(b1=0.5, b2=0.8, eps=0.1)),
}


def trajectory(tx, w, grad, steps=STEPS):
    w = jnp.asarray(w)
    state = tx.init(w)
    for _ in range(steps):
        updates, state = tx.update(grad(w), state, w)
        w = optax.apply_updates(w, updates)
        yield w


def assert_same(tx, expected, grad=gradient, start=START):
    for measured, w in zip(trajectory(tx, start, grad), expected, strict=False):
        np.testing.assert_allclose(measured, w, rtol=1e-10)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", PRINTED)
def test_rule_is_the_printed_recurrence(name, weight_decay):
    def decayed(w):
        return gradient(w) + weight_decay * w

    rule = normax.UPDATE_RULES[name]
    assert_same(rule.make(ETA, weight_decay), PRINTED[name](START, decayed))
    ours, printed = OTHERS.get(name, ({}, {}))
    assert_same(
        rule.make(ETA, weight_decay, **ours), PRINTED[name](START, decayed, **printed)
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("name", "written"), [("adamw", adam), ("lion", lion)])
def test_some_rules_decay_beside_the_rule(name, written, weight_decay):
    rule = normax.UPDATE_RULES[name]
    expected = written(START, gradient, decoupled=weight_decay)
    assert_same(rule.make(ETA, weight_decay), expected)
    expected = written(START, gradient, b1=0.5, b2=0.8, decoupled=weight_decay)
    assert_same(rule.make(ETA, weight_decay, b1=0.5, b2=0.8), expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("columns", [3, 9])
@pytest.mark.slow
def test_muon_on_matrices_of_both_kinds(weight_decay, columns):
    rule, start = normax.UPDATE_RULES["muon"], np.tile(START, 3)[:, :columns]
    target = np.tile(TARGET, 3)[:, :columns] + np.arange(columns)

    def grad(w):
        return (w - target) ** 3 + w

    for ours, written in (
        ({}, {}),
        (dict(beta=0.5, nesterov=False), dict(beta=0.5, nesterov=False)),
        (dict(consistent_rms=0.2), dict(rms=0.2)),
    ):
        if set(ours) <= {h.name for h in rule.hyperparameters}:
            expected = muon(start, grad, decoupled=weight_decay, **written)
            tx = rule.make(ETA, weight_decay, **ours)
            assert_same(tx, expected, grad=grad, start=start)


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_adafactor_decays_by_the_weight_decay_alone(weight_decay):
    """The learning rate is no factor of the decay, as in optax."""
    rule = normax.UPDATE_RULES["adafactor"]
    for ours, written in (
        ({}, {}),
        (dict(min_dim_size_to_factor=3), dict(factored=True)),
        (
            dict(multiply_by_parameter_scale=False, momentum=0.8, decay_rate=0.5),
            dict(relative=False, rho=0.8, power=0.5),
        ),
        (
            dict(clipping_threshold=0.5, eps=0.1, factored=False),
            dict(threshold=0.5, eps=0.1),
        ),
    ):
        expected = adafactor(START, gradient, decoupled=weight_decay, **written)
        tx = rule.make(ETA, weight_decay, **ours)
        for measured, w in zip(trajectory(tx, START, gradient), expected, strict=False):
            # Optax computes the decay of its averages in float32.
            np.testing.assert_allclose(measured, w, rtol=1e-5, atol=1e-6)


def test_adadelta_of_the_paper_has_rate_one():
    tx = normax.UPDATE_RULES["adadelta"].make(1.0)
    assert_same(tx, adadelta(START, gradient, eta=1.0))


def test_weight_decay_is_the_gradient_of_half_the_squared_norm():
    penalty = jax.grad(lambda w: 0.3 / 2 * jnp.sum(w**2))
    tx = normax.UPDATE_RULES["momentum"].make(ETA, 0.3)
    plain = normax.UPDATE_RULES["momentum"].make(ETA)
    expected = trajectory(plain, START, lambda w: gradient(w) + penalty(w))
    assert_same(tx, expected)


def test_learning_rate_schedule():
    schedule = optax.piecewise_constant_schedule(0.1, {3: 0.1})
    tx = normax.UPDATE_RULES["sgd"].make(schedule)
    ws = [START, *trajectory(tx, START, gradient, 5)]
    for step, rate in enumerate([0.1, 0.1, 0.1, 0.01, 0.01]):
        expected = ws[step] - rate * gradient(ws[step])
        np.testing.assert_allclose(ws[step + 1], expected, rtol=1e-6)


def direction(w):
    return w / jnp.sqrt(jnp.sum(w**2, axis=0, keepdims=True))


@jax.grad
def invariant_gradient(w):
    """Gradient of a function of the directions of the columns of w alone."""
    return jnp.sum((direction(w) - TARGET) ** 3)


TINY = {
    "adagrad": 1e-60,
    "rmsprop": 1e-60,
    "adam": 1e-30,
    "adamw": 1e-30,
    "muon": 1e-30,
    "adafactor": 1e-60,
}
SCALED = ("sgd", "momentum", "nesterov", "lion", *TINY)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [1e-2, 7.0])
@pytest.mark.parametrize(
    "name, relative", [*((name, True) for name in SCALED), ("adafactor", False)]
)
def test_effective_learning_rate_visits_the_same_functions(
    name, relative, alpha, weight_decay
):
    rule = normax.UPDATE_RULES[name]
    hyper = {"eps": TINY[name]} if name in TINY else {}
    if name == "adafactor":
        hyper |= {"multiply_by_parameter_scale": relative}
        weight_decay *= ETA  # Weights stay above the floor of Adafactor's scale.
    rate = rule.effective_learning_rate(ETA, alpha, **hyper)
    # L_lambda(alpha w) = L_{lambda alpha^2}(w); decoupled decay keeps eta lambda.
    power = {"adamw": 1, "lion": 1, "muon": 1, "adafactor": 0}.get(name, 2)
    decay = weight_decay * alpha**power
    unit = direction(START)
    original = trajectory(
        rule.make(ETA, weight_decay, **hyper), alpha * unit, invariant_gradient
    )
    effective = trajectory(rule.make(rate, decay, **hyper), unit, invariant_gradient)
    for w, w_unit in zip(original, effective, strict=True):
        np.testing.assert_allclose(w, alpha * w_unit, rtol=1e-8)


def test_adadelta_step_has_the_units_of_the_weights():
    alpha, w, rng = 7.0, direction(START), np.random.default_rng(2)
    squares, steps = rng.uniform(0.1, 1.0, (2, *w.shape))
    tx = normax.UPDATE_RULES["adadelta"].make(ETA, eps=1e-30)
    state = optax.tree.set(tx.init(w), e_g=squares, e_x=steps)
    scaled = optax.tree.set(state, e_g=squares / alpha**2, e_x=steps * alpha**2)
    update, _ = tx.update(invariant_gradient(w), state, w)
    scaled_update, _ = tx.update(invariant_gradient(alpha * w), scaled, alpha * w)
    rate = normax.UPDATE_RULES["adadelta"].effective_learning_rate(ETA, alpha)
    np.testing.assert_allclose(scaled_update, alpha * (rate / ETA) * update, rtol=1e-8)


@pytest.mark.parametrize("name", normax.UPDATE_RULES)
def test_effective_learning_rate_of_table_1(name):
    column = {
        "sgd": 2,
        "momentum": 2,
        "nesterov": 2,
        "normalized_sgd": 0,
        "adadelta": 0,
        "adafactor": 0,
        "newton": 0,
        "hessian_free": 0,
    }
    rule = normax.UPDATE_RULES[name]
    norms = {"kernel": jnp.array([0.5, 2.0]), "bias": None}
    rates = rule.effective_learning_rate(0.1, norms)
    expected = 0.1 / np.array([0.5, 2.0]) ** column.get(name, 1)
    np.testing.assert_allclose(rates["kernel"], expected)
    assert rates["bias"] is None


def test_unknown_names():
    with pytest.raises(KeyError):
        normax.UPDATE_RULES["adan"]
    with pytest.raises(TypeError, match="b1"):
        normax.UPDATE_RULES["sgd"].make(0.1, b1=0.9)
    with pytest.raises(TypeError):
        normax.UPDATE_RULES["sgd"] = normax.UPDATE_RULES["adam"]  # type: ignore[index]


def test_signatures_name_the_hyperparameters():
    parameters = inspect.signature(normax.UPDATE_RULES["momentum"].make).parameters
    assert list(parameters)[:2] == ["learning_rate", "weight_decay"]
    assert parameters["momentum"].default == 0.9
