"""Rotation: the published recurrences in float64; measured over predicted angles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]
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


def ordinary_sgd(eta, weight_decay, momentum):
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(eta, momentum))


def ordinary_adamw(eta, weight_decay, b1, b2):
    return optax.adamw(eta, b1, b2, weight_decay=weight_decay)


def ordinary_lion(eta, weight_decay, b1, b2):
    return optax.lion(eta, b1, b2, weight_decay=weight_decay)


BETAS = dict(b1=B1, b2=B2)
# The rotational rule, the rule it stands in for, their hyperparameters, the direction.
RULES = {
    "sgd": (normax.rotational_sgd, ordinary_sgd, dict(momentum=RHO), trace),
    "adamw": (normax.rotational_adamw, ordinary_adamw, BETAS, adam),
    "lion": (normax.rotational_lion, ordinary_lion, BETAS, lion),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def published_angle(rule, eta, decay):
    if rule == "sgd":
        return np.sqrt(2 * eta * decay / (1 + RHO))
    if rule == "adamw":
        return np.sqrt(2 * eta * decay * (1 - B1) / (1 + B1))
    variance = (1 - B1) ** 2 + B1**2 * (1 - B2) / (1 + B2)
    return np.sqrt(np.pi / 2) * np.sqrt(2 * eta * decay) * np.sqrt(variance)


def test_angles_are_those_of_the_exact_equilibrium():
    """To leading order in eta lambda, and in 1 - b2."""
    eta, decay = 1e-3, 1e-2
    for rule, name, hyper in (
        ("sgd", "momentum", dict(momentum=RHO)),
        ("adamw", "adamw", dict(b1=B1, b2=0.9999)),
    ):
        exact = normax.UPDATE_RULES[name].equilibrium_rotation(eta, decay, **hyper)
        np.testing.assert_allclose(published_angle(rule, eta, decay), exact, rtol=2e-4)


def rotational_and_ordinary(rule, decay):
    """Return the rule with a schedule, and the ordinary rule for the bias."""
    factory, ordinary, hyper, _ = RULES[rule]
    axes = {"kernel": "unit", "rows": (1,), "bias": "none"}
    tx = factory(halved, DECAY, decay=decay, axes=axes, **hyper)
    return tx, ordinary(halved, DECAY, **hyper)


@functools.partial(jax.jit, static_argnums=0)
def begin(rule, params):
    tx, plain = rotational_and_ordinary(rule, 0.0)
    return tx.init(params), plain.init(params["bias"])


@functools.partial(jax.jit, static_argnums=0)
def update(rule, decay, bias, grads, state, params):
    """One step of both."""
    tx, plain = rotational_and_ordinary(rule, decay)
    updates, rotational = tx.update(grads, state[0], params)
    step, ordinary = plain.update(grads["bias"], state[1], bias)
    return bias + step, (rotational, ordinary), optax.apply_updates(params, updates)


def halved(step):
    return jnp.where(step < 3, ETA, ETA / 2)


@every_rule
@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_published_recurrence(rule, decay):
    direction = RULES[rule][-1]
    shapes, axes = {"kernel": (7, 4), "rows": (5, 6), "bias": (4,)}, {"rows": 1}
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        ws = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        radius = {k: np.sqrt(np.sum(ws[k] ** 2, axes.get(k, 0))) for k in ws}
        moments, squares = dict.fromkeys(ws, (0.0, 0.0)), dict.fromkeys(ws, 0.0)
        params, state = ws, begin(rule, ws)
        bias = ws["bias"]
        for step in range(7):
            grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
            bias, state, params = update(rule, decay, bias, grads, state, params)
            # What is no weight vector takes the ordinary step.
            np.testing.assert_allclose(params["bias"], bias, rtol=1e-12)
            theta = published_angle(rule, ETA if step < 3 else ETA / 2, DECAY)
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


def mask_of_one(params):
    return {name: name != "head" for name in params}


MASKS = {
    "none": ({"first": False, "head": False, "bias": False}, set()),
    "prefix": ({"first": True, "head": False, "bias": True}, {"first"}),
    "function": (mask_of_one, {"first"}),
    "all": (True, {"first", "head"}),
}


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("masked", MASKS)
def test_a_mask_leaves_arrays_to_the_plain_rule(rule, masked):
    factory, ordinary, hyper, _ = RULES[rule]
    mask, turned = MASKS[masked]
    shapes = {"first": (7, 4), "head": (4, 5), "bias": (4,)}
    axes = {"first": "unit", "head": (1,), "bias": "none"}
    params = {name: start(1, shape) for name, shape in shapes.items()}
    transformations = {
        "masked": factory(ETA, DECAY, axes=axes, mask=mask, **hyper),
        "rotational": factory(ETA, DECAY, axes=axes, **hyper),
        "plain": ordinary(ETA, DECAY, **hyper),
    }

    results = {}
    for name, tx in transformations.items():
        w, state, results[name] = params, tx.init(params), []
        for seed in (2, 3):
            grads = {key: start(seed, shape) for key, shape in shapes.items()}
            updates, state = tx.update(grads, state, w)
            w = optax.apply_updates(w, updates)
            results[name].append(updates)
    for step in range(2):
        for name in shapes:
            like = "rotational" if name in turned else "plain"
            # Programs of other sets of arrays may round otherwise. Updates that turn
            # are differences of weights, which are below 4.
            np.testing.assert_allclose(
                results["masked"][step][name],
                results[like][step][name],
                rtol=0,
                atol=5e-7 if turned else 0,
            )
    difference = results["rotational"][0]["head"] - results["plain"][0]["head"]
    assert np.max(np.abs(difference)) > 1e-3


@pytest.mark.slow
def test_masks_with_injected_hyperparameters():
    params = {"first": start(1, (7, 4)), "head": start(2, (4, 5))}
    grads = jax.tree.map(jnp.ones_like, params)

    def first_updates(make, **kwargs):
        tx = make(ETA, weight_decay=DECAY, **kwargs)
        return tx.update(grads, tx.init(params), params)[0]

    for mask in (None, {"first": True, "head": False}, mask_of_one):
        static = ["mask"] if callable(mask) else []
        injected = optax.inject_hyperparams(normax.rotational_sgd, static)
        expected = first_updates(normax.rotational_sgd, mask=mask)
        for name, update in first_updates(injected, mask=mask).items():
            # It is a difference of weights, which are below 4.
            np.testing.assert_allclose(update, expected[name], rtol=1e-6, atol=5e-7)


@functools.partial(jax.jit, static_argnames=("factory", "steps", "scale_invariant"))
def random_stream(factory, w, hyper, *, steps=160, scale_invariant=False):
    """RMS angle at every step along gradients without an aim, and the weights."""
    tx = factory(ETA, DECAY, **hyper)

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
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@every_rule
def test_ordinary_rules_settle_at_the_angle(rule):
    """The predicted angle is where the ordinary rule's rotation settles."""
    _, ordinary, hyper, _ = RULES[rule]
    # Not far from equilibrium, which it is to find within 4 time constants.
    w = {"sgd": 1.3, "adamw": 0.3, "lion": 0.3}[rule] * start(shape=(64, 30))
    angles, _ = random_stream(ordinary, w, hyper, steps=2000, scale_invariant=True)
    settled = jnp.sqrt(jnp.mean(angles[-600:] ** 2))
    np.testing.assert_allclose(settled, published_angle(rule, ETA, DECAY), rtol=0.03)


@every_rule
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_angles_and_norms_from_the_first_step_on(rule, decay):
    factory, _, hyper, _ = RULES[rule]
    w = start() * np.logspace(-3, 3, 40, dtype=np.float32)
    angles, history = random_stream(factory, w, hyper | {"decay": decay})
    ratio = angles / published_angle(rule, ETA, DECAY)
    np.testing.assert_allclose(ratio if decay == 0 else ratio[0], 1, rtol=0.002)
    np.testing.assert_allclose(ratio[60:], 1, rtol=0.03)
    norms = np.sqrt(np.sum(np.asarray(history, np.float64) ** 2, axis=1))
    before = np.sqrt(np.sum(np.asarray(w, np.float64) ** 2, axis=0))
    # 3e-7 by default. Code generators that sum entries in sequence round a bit more.
    assert np.max(np.abs(norms / before - 1)) < 3.5e-7


@pytest.mark.slow
def test_first_angles_with_the_published_decay():
    """While momentum settles, the average lags behind it, as documented."""
    ratios = {}
    for factory, hyper, angle in (
        (normax.rotational_sgd, {"momentum": 0.9}, np.sqrt(2 * ETA * DECAY / 1.9)),
        (
            normax.rotational_adamw,
            {"b1": 0.9, "b2": 0.999},
            np.sqrt(2 * ETA * DECAY * 0.1 / 1.9),
        ),
    ):
        angles, _ = random_stream(factory, start(), hyper | {"decay": 0.9})
        ratios[factory] = angles[:40] / angle
    assert 1.15 < jnp.max(ratios[normax.rotational_sgd]) < 1.2
    assert 0.66 < jnp.min(ratios[normax.rotational_adamw]) < 0.7


def logits(params, x):
    for hidden in ("first", "second"):
        h = x @ params[hidden]
        h = (h - jnp.mean(h, 0, keepdims=True)) / jnp.std(h, 0, keepdims=True)
        x = jax.nn.relu(h + params["bias"][None])
    return x @ params["head"]


@pytest.mark.slow
def test_angles_in_a_network():
    (images, labels), eta, decay = load_digits(return_X_y=True), 1e-2, 0.1
    images, labels = jax.device_put(((images / 16).astype("f"), labels))
    axes = {"first": "unit", "second": "unit", "bias": "none", "head": "none"}
    tx = normax.rotational_adamw(eta, decay, B1, B2, axes=axes)
    shapes = {"first": (64, 48), "second": (48, 48), "bias": (48,), "head": (48, 10)}
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype("f") / 8 for k, s in shapes.items()}

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

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(0), 100)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    losses, rms = run(params)
    np.testing.assert_allclose(rms, published_angle("adamw", eta, decay), rtol=0.03)
    assert jnp.mean(losses[-10:]) < 0.25 * losses[0]


@pytest.mark.slow
def test_the_length_of_the_updates_does_not_matter():
    w, grads = start(shape=(9, 3)), start(2, (4, 9, 3))

    @jax.jit
    def run(scale):
        tx = normax.rotate_by_angle(0.2, decay=0.9)

        def step(state, g):
            u, state = tx.update(scale * g, state, w)
            return state, u

        return jax.lax.scan(step, tx.init(w), grads)[1]

    expected = run(1.0)
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        np.testing.assert_allclose(run(scale), expected, rtol=2e-5, atol=1e-6)


@jax.jit
def rotate(decay, w, g, state):
    """One step of `rotate_by_angle`; its numbers are traced."""
    tx = normax.rotate_by_angle(0.2, decay)
    return tx.update(g, tx.init(w) if state is None else state, w)


@pytest.mark.slow
def test_vectors_that_cannot_turn_stay():
    w = np.stack([np.zeros(6), np.ones(6), np.ones(6)], axis=1, dtype="f")
    g = np.stack([np.ones(6), np.zeros(6), np.arange(6.0)], axis=1, dtype="f")
    state = None
    for _ in range(3):
        updates, state = rotate(0.5, w, g, state)
        np.testing.assert_array_equal((w + updates == w).all(0), [True, True, False])


def angles_between(v, w):
    """Return the angles of columns, in float64."""
    v, w = (np.asarray(x, np.float64) for x in (v, w))
    v, w = (x / np.sqrt(np.sum(x**2, axis=0)) for x in (v, w))
    return 2 * np.arcsin(np.sqrt(np.sum((v - w) ** 2, axis=0)) / 2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def follow(w, radial, steps):
    """Weights after some steps along updates that are multiples of the weights."""
    tx = optax.chain(radial, normax.rotate_by_angle(0.01))

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (w, tx.init(w)), length=steps)[0][0]


RADIAL = {
    "decay": optax.chain(optax.add_decayed_weights(0.1), optax.scale(-0.3)),
    "momentum": optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("radial", RADIAL)
@pytest.mark.parametrize(
    "shape, steps", [((64, 40), 500), ((2, 900), 500), ((20_000, 3), 50)]
)
def test_radial_updates_turn_nothing(shape, steps, radial):
    for dtype in (jnp.float32, jnp.bfloat16):
        w = start(shape=shape).astype(dtype)
        turned = angles_between(w, follow(w, RADIAL[radial], steps))
        assert np.max(turned) < 2 * jnp.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("updates", [jnp.float32, jnp.bfloat16])
def test_radial_updates_of_mixed_dtypes_turn_nothing(updates):
    """A coarse number stays coarse in a finer dtype."""
    coarse, fine = start().astype(jnp.bfloat16), start()
    w = coarse if updates == jnp.float32 else fine
    u = (-jnp.bfloat16(0.3) * w.astype(jnp.bfloat16)).astype(updates)
    tx = normax.rotate_by_angle(0.2)
    step, state = tx.update(u, tx.init(w), w)
    assert np.max(angles_between(w, np.float64(w) + np.float64(step))) < 0.004
    np.testing.assert_array_equal(state.update_norm, 0)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize(
    "dtype, part", [("float32", 1e-5), ("float32", 1e-3), ("bfloat16", 0.1)]
)
@pytest.mark.parametrize("shape", [(2, 300), (64, 40), (20_000, 3)])
def test_small_tangential_parts_turn_by_the_whole_angle(dtype, part, shape):
    w, v = (start(seed, shape).astype(dtype).astype(np.float64) for seed in (1, 2))
    w_norm = np.sqrt(np.sum(w**2, axis=0))
    v -= w * (np.sum(v * w, axis=0) / w_norm**2)
    v /= np.sqrt(np.sum(v**2, axis=0))
    u = (-w / w_norm + part * v).astype(dtype)
    w = w.astype(dtype)
    tx = normax.rotate_by_angle(0.2)
    step, _ = jax.jit(tx.update)(u, tx.init(w), w)
    turned = angles_between(w, np.float64(w) + np.float64(step))
    # Rounding changes the tangential part by the rounding of u over `part`.
    np.testing.assert_allclose(turned, np.arctan(0.2), rtol=0.01)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("part", [2e-6, 1e-4, 1e-2, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_norms_are_kept(decay, part):
    """Where the step is orthogonal, its length tells the norm; else it is measured."""
    w = start(1, (300, 40))

    @jax.jit
    def run(w, keys):
        tx = normax.rotate_by_angle(0.5, decay)

        def step(carry, key):
            w, state = carry
            radial = 1.0 - 2.0 * (part < 1)
            u = radial * (part < 1) * w + part * jax.random.normal(key, w.shape)
            updates, state = tx.update(u, state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), keys)[0][0]

    after = run(w, jax.random.split(jax.random.key(0), 20))
    norms = [np.linalg.norm(np.asarray(x, np.float64), axis=0) for x in (w, after)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=6e-7)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_how_long_a_nan_lives(decay):
    w, g = start(shape=(6, 3)), start(2, (6, 3))
    bad = g.copy()
    bad[2, 1] = np.nan
    updates, state = rotate(decay, w, bad, None)
    np.testing.assert_array_equal(np.isnan(updates), [[False, True, False]] * 6)
    updates, _ = rotate(decay, w, g, state)
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
