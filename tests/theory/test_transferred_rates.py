"""Transferred rates against simulations of random gradients in NumPy, in float64.

The rules are written anew here, from their recurrences, and share no code with normax.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax
from normax.theory import Setting, transfer

RULES = normax.UPDATE_RULES
VECTORS, DIMENSION, STEPS, START = 32, 128, 400, 1.0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def length(x):
    return np.linalg.norm(x, axis=-1, keepdims=True)


def adamw(g, w, state, t, eta, decay, b1=0.9, b2=0.999):
    m = b1 * state.get("m", 0.0) + (1 - b1) * g
    r = b2 * state.get("r", 0.0) + (1 - b2) * g**2
    mean = m / (1 - b1**t) / np.sqrt(r / (1 - b2**t))
    return w - eta * (mean + decay * w), {"m": m, "r": r}


def lion(g, w, state, t, eta, decay, b1=0.9, b2=0.99):
    m = state.get("m", 0.0)
    u = np.sign(b1 * m + (1 - b1) * g)
    return w - eta * (u + decay * w), {"m": b2 * m + (1 - b2) * g}


def momentum(g, w, state, t, eta, decay, momentum=0.9):
    v = momentum * state.get("v", 0.0) + g + decay * w
    return w - eta * v, {"v": v}


def hyperball(g, w, state, t, eta, decay, momentum=0.9):
    m = momentum * state.get("m", 0.0) + (1 - momentum) * g
    w = w / length(w) - eta * m / length(m)
    return START * w / length(w), {"m": m}


def rotational_adamw(g, w, state, t, eta, decay, b1=0.9):
    m = b1 * state.get("m", 0.0) + (1 - b1) * g
    across = m - np.sum(m * w, -1, keepdims=True) / length(w) ** 2 * w
    angle = np.sqrt(2 * eta * decay * (1 - b1) / (1 + b1))
    turned = np.cos(angle) * w - np.sin(angle) * length(w) * across / length(across)
    return turned, {"m": m}


def orthogonal(x):
    """Return optax's five iterations of Newton and Schulz."""
    x = x / np.linalg.norm(x, axis=(1, 2), keepdims=True)
    for _ in range(5):
        a = x @ np.swapaxes(x, 1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon(g, w, state, t, eta, decay, beta=0.95, shape=(8, 16)):
    m = beta * state.get("m", 0.0) + (1 - beta) * g
    c = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    u = orthogonal(c.reshape(-1, *shape)) * np.sqrt(max(1, shape[1] / shape[0]))
    return w - eta * (u.reshape(w.shape) + decay * w), {"m": m}


WRITTEN = dict(
    adamw=adamw, lion=lion, momentum=momentum, hyperball=hyperball,
    rotational_adamw=rotational_adamw, muon=muon,
)  # fmt: skip


def values(rate, steps):
    """Return a number or a schedule at all steps."""
    if callable(rate):
        rate = jax.vmap(rate)(jnp.arange(steps))
    return np.broadcast_to(rate, steps)


def simulate(setting, rate, decay, seed=0):
    """Return root mean squares of the angles, and all directions."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((VECTORS, DIMENSION))
    w *= setting.initial_norm / length(w)
    norm = 1.0 if setting.gradient_norm is None else setting.gradient_norm
    profile = np.broadcast_to(norm, setting.steps)
    etas, decays = (values(x, setting.steps) for x in (rate, decay or 0.0))
    state, directions = {}, [w / length(w)]
    for t in range(setting.steps):
        g = rng.standard_normal(w.shape)
        g -= np.sum(g * w, -1, keepdims=True) / length(w) ** 2 * w
        g *= profile[t] / length(w) / length(g)
        w, state = WRITTEN[setting.rule](
            g, w, state, t + 1, etas[t], decays[t], **setting.hyperparameters
        )
        directions.append(w / length(w))
    directions = np.array(directions)
    half = np.linalg.norm(directions[1:] - directions[:-1], axis=-1) / 2
    return np.sqrt(np.mean(4 * np.arcsin(half) ** 2, 1)), directions


def stretched(x, steps):
    new, old = ((np.arange(n) + 0.5) / n for n in (steps, len(x)))
    return np.interp(new, old, x)


def rate(peak, steps):
    return optax.warmup_cosine_decay_schedule(
        0.1 * peak, peak, steps // 10, steps, 0.1 * peak
    )


def source(rule="adamw", **changed):
    known = {
        "adamw": (0.02, 0.5), "lion": (5e-3, 2.0), "momentum": (0.03, 0.03),
        "hyperball": (0.02, None), "rotational_adamw": (0.02, 0.5),
    }  # fmt: skip
    peak, decay = known.get(rule, (0.02, 0.5))
    given = dict(
        rule=rule, steps=STEPS, learning_rate=rate(peak, STEPS), weight_decay=decay,
        dimension=DIMENSION, initial_norm=START, batch_size=16,
    )  # fmt: skip
    return Setting(**given | changed)


def target(rule="adamw", **changed):
    given = source(rule="adamw") if rule == "muon" else source(rule)
    none = dict(learning_rate=None, weight_decay=None)
    if rule == "muon":
        none |= dict(dimension=(8, 16))
    return dataclasses.replace(given, **none | {"rule": rule} | changed)


CONVERSIONS = [
    ("adamw", "momentum", "run", {}),
    ("adamw", "adamw", "run", dict(steps=100, batch_size=64)),
    ("adamw", "lion", "run", {}),
    ("adamw", "hyperball", "angle", {}),
    ("adamw", "muon", "run", {}),
    ("adamw", "rotational_adamw", "run", {}),
    ("lion", "adamw", "run", {}),
    ("lion", "adamw", "angle", {}),
    ("momentum", "adamw", "run", {}),
    ("momentum", "momentum", "run", dict(steps=100, batch_size=64)),
    ("hyperball", "adamw", "run", {}),
    ("hyperball", "lion", "run", {}),
    ("rotational_adamw", "momentum", "run", {}),
    ("adamw", "adamw", "examples", dict(steps=800)),
    ("adamw", "adamw", "run", dict(steps=800)),
    ("adamw", "adamw", "run", dict(hyperparameters=dict(b1=0.5))),
    ("adamw", "muon", "angle", {}),
    ("lion", "momentum", "examples", dict(steps=200, batch_size=32)),
]


@pytest.mark.few_rows(1)
@pytest.mark.parametrize(("rule", "other", "keep", "changed"), CONVERSIONS)
def test_the_target_turns_as_the_source_does(rule, other, keep, changed):
    a, b = source(rule), target(other, **changed)
    found = transfer(a, b, keep)
    b = dataclasses.replace(b, gradient_norm=(a.batch_size / b.batch_size) ** 0.5)
    theirs, _ = simulate(a, a.learning_rate, a.weight_decay)
    ours, _ = simulate(b, found.learning_rate, found.weight_decay, seed=1)
    planned = found.angles / stretched(a.angles(), b.steps)
    expected = planned * stretched(theirs, b.steps)
    assert np.mean(np.abs(ours / expected - 1)[50:]) < 0.03
    if keep == "angle":
        np.testing.assert_allclose(planned, 1, rtol=1e-6)


# Constant rates in equilibrium, and the share of the norm that decay takes.
SETTLED = {
    "adamw": (0.01, 0.2, 2e-3),
    "lion": (1e-3, 0.5, 5e-4),
    "momentum": (0.02, 0.01, 2e-3),
    "muon": (0.01, 0.2, 2e-3),
    "nesterov": (0.02, 0.01, 2e-3),
    "adam": (1e-3, 0.03, None),
}


@pytest.mark.few_rows(1)
@pytest.mark.parametrize("other", ["momentum", "lion", "adamw", "muon", "nesterov"])
@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum", "muon"])
def test_settled_weights_forget_what_decay_takes(rule, other):
    """The product of both rates says it, where neither model of forgetting is used."""
    eta, decay, share = SETTLED[rule]
    given = [target(name, steps=steps) for name, steps in ((rule, 3000), (other, 6000))]
    a = dataclasses.replace(given[0], learning_rate=eta, weight_decay=decay)
    start = [
        RULES[x.rule].equilibrium_norm(*SETTLED[x.rule][:2], 1.0, x.dimension)
        for x in given
    ]
    a = dataclasses.replace(a, initial_norm=float(start[0]))
    b = dataclasses.replace(given[1], initial_norm=float(start[1]))
    found = transfer(a, dataclasses.replace(b, gradient_norm=1.0))
    product = float(found.learning_rate(5900)) * found.weight_decay
    if other in ("momentum", "nesterov"):
        product /= 1 - 0.9
    assert product == pytest.approx(share / 2, rel=0.02)


@pytest.mark.few_rows(1)
@pytest.mark.parametrize("rule", ["hyperball", "lion", "adamw", "momentum", "muon"])
def test_weights_forget_in_the_timescale(rule):
    r"""The correlation of directions falls as $e^{-n/\tau}$, whatever the memory."""
    setting = target(rule, weight_decay=None if rule == "hyperball" else 0.5)
    setting = dataclasses.replace(setting, steps=2000)
    angle = 0.02 if rule != "lion" else 0.012
    rates = setting.rates(np.full(2000, angle))
    _, directions = simulate(setting, rates, setting.weight_decay, seed=2)
    kept = directions[500:]
    lags = np.arange(200, 801, 200)
    alike = [np.mean(np.sum(kept[n:] * kept[:-n], -1)) for n in lags]
    # The slope leaves out the first steps, which memory makes more alike.
    slope = np.polyfit(lags, np.log(alike), 1)[0]
    share = setting.shares(np.array([angle]))[0]
    assert -slope == pytest.approx(share, rel=0.08)


@pytest.mark.slow
def test_forgetting_is_kept_between_rules_and_the_angle_is_not():
    a = source()
    _, ours = simulate(a, a.learning_rate, a.weight_decay)
    lag = 200

    def alike(directions):
        return np.mean(np.sum(directions[100 + lag :] * directions[100:-lag], -1))

    # The memory of Lion's default, 100 steps, is as long as that of these weights.
    b = target("lion", hyperparameters=dict(b2=0.9))
    found = {
        keep: simulate(b, moved.learning_rate, moved.weight_decay, seed=1)[1]
        for keep in ("run", "angle")
        for moved in [transfer(a, b, keep)]
    }
    logs = {keep: np.log(alike(d)) / np.log(alike(ours)) for keep, d in found.items()}
    assert logs["run"] == pytest.approx(1, rel=0.05)
    # c^2 of AdamW is 2 (1 - b1) / (1 + b1), that of Lion pi times the mean square.
    ratio = 0.2 / 1.9 / (np.pi * (0.01 + 0.81 * 0.1 / 1.9))
    assert logs["angle"] == pytest.approx(ratio, rel=0.08)
    text = "".join(transfer(a, b, "angle").statements)
    assert "fraction of the run in which weights forget is 1.5" in text


@pytest.mark.few_rows(2)
@pytest.mark.parametrize("rule", ["adamw", "hyperball", "lion", "rotational_adamw"])
def test_the_same_setting_gives_the_same_rates(rule):
    a = source(rule)
    found = transfer(a, target(rule))
    np.testing.assert_allclose(
        values(found.learning_rate, STEPS), values(a.learning_rate, STEPS), rtol=1e-5
    )
    if rule != "hyperball":
        assert found.weight_decay == pytest.approx(a.weight_decay, rel=1e-6)
    assert (
        found.statements[0] == "kept: the fraction of the run in which weights forget"
    )
    assert all(line.startswith("kept") for line in found.statements)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["run", "angle", "examples"])
@pytest.mark.parametrize("other", ["lion", "momentum", "muon", "hyperball"])
def test_there_and_back(other, keep):
    a = source()
    there = transfer(a, target(other), keep)
    b = dataclasses.replace(
        target(other),
        learning_rate=there.learning_rate,
        weight_decay=there.weight_decay,
    )
    # Hyperball forgets the decay, which moves norms alone.
    decay = a.weight_decay if other == "hyperball" else None
    back = transfer(b, target(weight_decay=decay), keep)
    np.testing.assert_allclose(back.angles, a.angles(), rtol=1e-6)
    rates = [values(x.learning_rate, STEPS) for x in (a, back)]
    if other == "momentum":  # whose norm, and so whose decay, takes another course
        decay = back.weight_decay
        back = transfer(b, target(weight_decay=a.weight_decay), keep)
        rates[1] = values(back.learning_rate, STEPS)
        assert decay == pytest.approx(a.weight_decay, rel=0.5)
    else:
        assert back.weight_decay == pytest.approx(a.weight_decay, rel=1e-5)
    np.testing.assert_allclose(*rates, rtol=1e-4)


@pytest.mark.slow
def test_weight_decay_moves_norms_alone():
    a, b = source("momentum"), target()
    curves = []
    for decay in (0.1, 2.0):
        given = dataclasses.replace(b, weight_decay=decay)
        found = transfer(a, given)
        assert found.weight_decay == decay
        curves.append(simulate(given, found.learning_rate, decay)[0])
    assert np.mean(np.abs(curves[0] / curves[1] - 1)[50:]) < 0.02


@pytest.mark.slow
def test_width_scales_rate_and_decay_by_its_root():
    a = source()
    found = transfer(a, target(dimension=4 * DIMENSION))
    np.testing.assert_allclose(
        values(found.learning_rate, STEPS),
        values(a.learning_rate, STEPS) / 2,
        rtol=1e-5,
    )
    assert found.weight_decay == pytest.approx(2 * a.weight_decay, rel=1e-5)
    # A start twice as long takes it back.
    found = transfer(a, target(dimension=4 * DIMENSION, initial_norm=2 * START))
    assert float(found.learning_rate(200)) == pytest.approx(
        float(a.learning_rate(200)), rel=1e-5
    )


def settle(rule, peak, decay, **changed):
    """Return a source of small constant rates, where formulas are exact."""
    return source(rule, learning_rate=peak, weight_decay=decay, **changed)


@pytest.mark.slow
def test_the_batch_rules_are_the_root_and_the_linear_one():
    batch = dict(steps=STEPS // 4, batch_size=64)
    small = dict(steps=4000, initial_norm=2.0)
    a = settle("adamw", 1e-3, 0.01, **small)
    found = transfer(a, target(**batch | dict(steps=1000, initial_norm=2.0)))
    assert float(found.learning_rate(900)) == pytest.approx(2e-3, rel=0.01)
    assert found.weight_decay == pytest.approx(0.02, rel=1e-4)
    # Under SGD the noise of the gradient falls too, and the decay stays.
    a = settle("momentum", 1e-3, 0.01, **small)
    given = batch | dict(steps=1000, initial_norm=2.0)
    found = transfer(a, target("momentum", **given))
    assert float(found.learning_rate(900)) == pytest.approx(4e-3, rel=0.02)
    assert found.weight_decay == pytest.approx(0.01, rel=1e-4)
    assert "gradient norm of 0.5" in found.statements[-1]


@pytest.mark.slow
def test_the_timescale_in_epochs_is_kept():
    """Wang and Aitchison's B / (rate decay D), where rates are constant and small."""
    a = source(learning_rate=0.01, weight_decay=0.2)
    b = target(steps=1600, batch_size=4)  # as many examples
    for keep in ("run", "examples"):
        found = transfer(a, b, keep)
        share = float(found.learning_rate(1500)) * found.weight_decay
        assert 4 / share == pytest.approx(16 / (0.01 * 0.2), rel=0.03)
        assert sum(line.startswith("kept") for line in found.statements) == 2


@pytest.mark.slow
def test_schedules_of_the_decay_keep_their_course():
    steps = np.linspace(1, 0, STEPS) * 0.5
    a = source(weight_decay=lambda count: jnp.asarray(steps)[count])
    found = transfer(a, target(steps=200, dimension=4 * DIMENSION))
    assert callable(found.weight_decay)
    ratio = values(found.weight_decay, 200) / stretched(steps, 200)
    np.testing.assert_allclose(ratio, 2 * 2**0.5, rtol=1e-4)
    none = transfer(source(weight_decay=0.0), target("lion"))
    assert none.weight_decay == 0.0


UNKNOWN: Any = "angles"
BAD: Any = [
    (lambda: source(rule="adamv"), r"^rule must be one of .*mean adam\?"),
    (lambda: target(steps=0), r"^steps must be a positive integer, got 0"),
    (lambda: target(steps=1.5), r"^steps must be a positive integer, got 1.5"),
    (lambda: source(initial_norm=np.ones(2)), r"^initial_norm must be one number"),
    (
        lambda: source(gradient_norm=np.ones(7)),
        r"\(steps,\) = .*, got \(7,\); transfer",
    ),
    (lambda: source(rule=None), r"^rule must be one of .* got None; choose one"),
    (
        lambda: transfer(source(learning_rate=0.0), target()),
        r"largest one is 0, at learning_rate=0.0; pass a positive rate",
    ),
    (
        lambda: transfer(source(learning_rate=lambda count: jnp.nan), target()),
        r"largest one is nan, at learning_rate=<function.*; pass a positive rate",
    ),
    (lambda: target("hyperball", weight_decay=0.1), r"^hyperball keeps norms .*0.1;"),
    (
        lambda: transfer(target(weight_decay=0.1), target()),
        r"learning_rate, but .*None",
    ),
    (lambda: transfer(source(weight_decay=None), target()), r"needs a weight_decay"),
    (lambda: transfer(source(), source()), r"^the learning rate of the target"),
    (lambda: transfer(source(), target(), UNKNOWN), r"'angles'; did you mean angle\?"),
    (lambda: transfer(source(), target(dimension=None)), r"depends on the dimension"),
    (
        lambda: transfer(source("hyperball"), target("rotational_adamw")),
        r"^rotational_adamw turns by its weight_decay",
    ),
    (
        lambda: transfer(source(), target("newton")),
        r"UPDATE_RULES\['newton'\] has no equilibrium of noise",
    ),
    (
        lambda: transfer(
            source("hyperball", learning_rate=1.0),
            target("hyperball", steps=60),
        ),
        r"^no learning rate of hyperball turns weights by",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_cannot_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_rule_on_a_sphere_has_its_own_hyperparameters():
    for rule, known in ("hyperball", "momentum"), ("rotational_lion", "b1, b2"):
        a = Setting(
            rule=rule, steps=9, learning_rate=0.1, hyperparameters={"eps": 1.0},
            weight_decay=None if rule == "hyperball" else 0.1,
        )  # fmt: skip
        with pytest.raises(TypeError, match=f"^{rule} has {known}, got eps"):
            a.angles()
