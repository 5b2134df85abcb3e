"""Rotation: the published recurrences in float64; measured over predicted angles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import normax

ETA, DECAY = 0.02, 0.1
RHO, B1, B2 = 0.7, 0.8, 0.95


def trace(g, state, t):
    v = RHO * state[0] + g
    return v, (v,)


def adam(g, state, t, eps=1e-8):
    m, r = state
    m, r = B1 * m + (1 - B1) * g, B2 * r + (1 - B2) * g**2
    return m / (1 - B1**t) / (np.sqrt(r / (1 - B2**t)) + eps), (m, r)


def lion(g, state, t):
    p = np.sign(B1 * state[0] + (1 - B1) * g)
    return p, (B2 * state[0] + (1 - B2) * g,)


RULES = {
    "sgd": (normax.rotational_sgd, dict(momentum=RHO), trace),
    "adamw": (normax.rotational_adamw, dict(b1=B1, b2=B2), adam),
    "lion": (normax.rotational_lion, dict(b1=B1, b2=B2), lion),
}
ORDINARY = {
    "sgd": lambda eta, decay: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(eta, RHO)
    ),
    "adamw": lambda eta, decay: optax.adamw(eta, B1, B2, weight_decay=decay),
    "lion": lambda eta, decay: optax.lion(eta, B1, B2, weight_decay=decay),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def published_angle(rule, eta, decay):
    if rule == "sgd":
        return np.sqrt(2 * eta * decay / (1 + RHO))
    if rule == "adamw":
        return np.sqrt(2 * eta * decay * (1 - B1) / (1 + B1))
    variance = (1 - B1) ** 2 + B1**2 * (1 - B2) / (1 + B2)
    return np.sqrt(np.pi / 2) * np.sqrt(2 * eta * decay) * np.sqrt(variance)


@every_rule
@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_published_recurrence(rule, decay):
    factory, hyper, direction = RULES[rule]
    shapes, axes = {"kernel": (7, 4), "rows": (5, 6), "bias": (4,)}, {"rows": 1}
    with jax.enable_x64(True):
        tx = factory(
            lambda step: jnp.where(step < 5, ETA, ETA / 2),
            DECAY,
            decay=decay,
            axes={"kernel": "unit", "rows": (1,), "bias": "none"},
            **hyper,
        )
        plain = ORDINARY[rule](lambda step: jnp.where(step < 5, ETA, ETA / 2), DECAY)
        rng = np.random.default_rng(0)
        ws = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        radius = {k: np.sqrt(np.sum(ws[k] ** 2, axes.get(k, 0))) for k in ws}
        moments, squares = dict.fromkeys(ws, (0.0, 0.0)), dict.fromkeys(ws, 0.0)
        params = jax.tree.map(jnp.asarray, ws)
        state, update = tx.init(params), jax.jit(tx.update)
        bias, bias_state = params["bias"], plain.init(params["bias"])
        for step in range(10):
            grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            theta = published_angle(rule, ETA if step < 5 else ETA / 2, DECAY)
            for name in ("kernel", "rows"):
                w, axis, t = ws[name], axes.get(name, 0), step + 1
                p, moments[name] = direction(grads[name], moments[name], t)
                unit = w / np.sqrt(np.sum(w**2, axis, keepdims=True))
                p = p - unit * np.sum(unit * p, axis, keepdims=True)
                squares[name] *= decay
                squares[name] += (1 - decay) * np.sum(p**2, axis, keepdims=True)
                n = np.sqrt(squares[name] / (1 - decay**t))
                r = np.expand_dims(radius[name], axis)
                w = w - theta * r * p / n
                ws[name] = w * r / np.sqrt(np.sum(w**2, axis, keepdims=True))
                np.testing.assert_allclose(params[name], ws[name], rtol=1e-9)
            # What is no weight vector takes the ordinary step.
            step_of_bias, bias_state = plain.update(grads["bias"], bias_state, bias)
            bias = bias + step_of_bias
            np.testing.assert_allclose(params["bias"], bias, rtol=1e-12)


def random_stream(tx, w, steps, scale_invariant=False):
    """RMS angle at every step along gradients without an aim, and the weights."""

    def step(carry, key):
        w, state = carry
        g = jax.random.normal(key, w.shape)
        if scale_invariant:
            norm = jnp.linalg.norm(w, axis=0, keepdims=True)
            g = (g - w * jnp.sum(w * g, 0, keepdims=True) / norm**2) / norm
        updates, state = tx.update(g, state, w)
        angle = normax.angular_update(w, updates)
        w = optax.apply_updates(w, updates)
        return (w, state), (jnp.sqrt(jnp.mean(angle**2)), w)

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (w, tx.init(w)), keys)[1]


def start(seed=1, shape=(64, 40)):
    return jax.random.normal(jax.random.key(seed), shape)


@every_rule
def test_ordinary_rules_settle_at_the_angle(rule):
    """The predicted angle is where the ordinary rule's rotation settles."""
    # Not far from equilibrium, which it is to find within 4 time constants.
    begin = {"sgd": 1.3, "adamw": 0.3, "lion": 0.3}[rule] * start()
    angles, _ = random_stream(ORDINARY[rule](ETA, DECAY), begin, 2000, True)
    settled = jnp.sqrt(jnp.mean(angles[-600:] ** 2))
    np.testing.assert_allclose(settled, published_angle(rule, ETA, DECAY), rtol=0.03)


@every_rule
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_angles_and_norms_from_the_first_step_on(rule, decay):
    factory, hyper, _ = RULES[rule]
    w = start() * jnp.logspace(-3, 3, 40)[None]
    angles, history = random_stream(factory(ETA, DECAY, decay=decay, **hyper), w, 200)
    ratio = angles / published_angle(rule, ETA, DECAY)
    np.testing.assert_allclose(ratio if decay == 0 else ratio[0], 1, rtol=0.002)
    np.testing.assert_allclose(ratio[60:], 1, rtol=0.03)
    norms = np.sqrt(np.sum(np.asarray(history, np.float64) ** 2, axis=1))
    before = np.sqrt(np.sum(np.asarray(w, np.float64) ** 2, axis=0))
    assert np.max(np.abs(norms / before - 1)) < 3e-7


def test_first_angles_with_the_published_decay():
    """While momentum settles, the average lags behind it, as documented."""
    ratios = {}
    for factory, angle in (
        (normax.rotational_sgd, np.sqrt(2 * ETA * DECAY / 1.9)),
        (normax.rotational_adamw, np.sqrt(2 * ETA * DECAY * 0.1 / 1.9)),
    ):
        angles, _ = random_stream(factory(ETA, DECAY, decay=0.9), start(), 40)
        ratios[factory] = angles / angle
    assert 1.15 < jnp.max(ratios[normax.rotational_sgd]) < 1.2
    assert 0.66 < jnp.min(ratios[normax.rotational_adamw]) < 0.7


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)


def logits(params, x):
    for hidden in ("first", "second"):
        h = x @ params[hidden]
        h = (h - jnp.mean(h, 0, keepdims=True)) / jnp.std(h, 0, keepdims=True)
        x = jax.nn.relu(h + params["bias"][None])
    return x @ params["head"]


@every_rule
def test_angles_in_a_network(rule, digits):
    factory, hyper, _ = RULES[rule]
    eta = {"sgd": 0.1, "adamw": 1e-2, "lion": 1e-3}[rule]
    decay = {"sgd": 0.01, "adamw": 0.1, "lion": 1.0}[rule]
    axes = {"first": "unit", "second": "unit", "bias": "none", "head": "none"}
    tx = factory(eta, decay, axes=axes, **hyper)
    shapes = {"first": (64, 48), "second": (48, 48), "bias": (48,), "head": (48, 10)}
    rng, (images, labels) = np.random.default_rng(0), digits
    params = {k: jnp.asarray(rng.normal(size=s) / 8) for k, s in shapes.items()}

    def loss(params, batch):
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(cross_entropy(logits(params, images[batch]), labels[batch]))

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (64,), 0, len(images))
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        angles = normax.angular_update(params, updates, axes)
        after = optax.apply_updates(params, updates)
        rms = [jnp.sqrt(jnp.mean(angles[k] ** 2)) for k in ("first", "second")]
        return (after, state), (value, jnp.stack(rms))

    keys = jax.random.split(jax.random.key(0), 100)
    _, (losses, rms) = jax.lax.scan(step, (params, tx.init(params)), keys)
    np.testing.assert_allclose(rms, published_angle(rule, eta, decay), rtol=0.03)
    assert jnp.mean(losses[-10:]) < 0.25 * losses[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_length_of_the_updates_does_not_matter(scale):
    tx, w = normax.rotate_by_angle(0.2, decay=0.9), start(shape=(9, 3))
    g = start(2, (4, 9, 3))
    expected, measured = tx.init(w), tx.init(w)
    for step in range(4):
        u, expected = tx.update(g[step], expected, w)
        v, measured = tx.update(scale * g[step], measured, w)
        np.testing.assert_allclose(v, u, rtol=2e-5, atol=1e-6)


def test_vectors_that_cannot_turn_stay():
    tx = normax.rotate_by_angle(0.2, decay=0.5)
    w = jnp.stack([jnp.zeros(6), jnp.ones(6), jnp.ones(6)], axis=1)
    g = jnp.stack([jnp.ones(6), jnp.zeros(6), jnp.arange(6.0)], axis=1)
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(g, state, w)
        np.testing.assert_array_equal(updates[:, :2], 0)
        assert np.all(updates[:, 2] != 0)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_how_long_a_nan_lives(decay):
    tx, w, g = normax.rotate_by_angle(0.2, decay), start(shape=(6, 3)), start(2, (6, 3))
    updates, state = tx.update(g.at[2, 1].set(jnp.nan), tx.init(w), w)
    np.testing.assert_array_equal(np.isnan(updates), [[False, True, False]] * 6)
    updates, _ = tx.update(g, state, w)
    np.testing.assert_array_equal(np.isnan(updates), [[False, decay > 0, False]] * 6)


@pytest.mark.parametrize("weight_decay", [0.0, -0.1, float("nan")])
@every_rule
def test_no_weight_decay_means_no_angle(rule, weight_decay):
    message = f"rotational_{rule}.*weight_decay.*greater than 0, got {weight_decay}"
    with pytest.raises(ValueError, match=message):
        RULES[rule][0](0.1, weight_decay)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"angle": -0.1}, "angle must be at least 0"),
        ({"angle": 0.1, "decay": 1.0}, "decay must be at least 0 and below 1"),
        ({"angle": 0.1, "axes": "units"}, "must be one of"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        normax.rotate_by_angle(**arguments)
    with pytest.raises(ValueError, match="lie within the array's rank"):
        normax.rotational_adamw(0.1, 0.1, axes=(3,)).init(jnp.ones((2, 2)))
