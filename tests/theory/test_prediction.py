"""Whole runs against simulations of random gradients in NumPy, in float64.

The rules are written anew here, from their recurrences, and share no code with normax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

pytestmark = [pytest.mark.few_rows(1)]
RULES = normax.UPDATE_RULES
VECTORS, DIMENSION, STEPS, G = 64, 256, 2000, 2.0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sgd(momentum=None, nesterov=False):
    def step(g, w, state, t, eta, decay):
        rho = momentum or 0.0
        g = g + decay * w
        v = rho * state.get("v", 0.0) + g
        return -eta * (g + rho * v if nesterov else v), {"v": v}

    return step


def adam(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False, decoupled=False):
    def step(g, w, state, t, eta, decay):
        g = g if decoupled else g + decay * w
        m = b1 * state.get("m", 0.0) + (1 - b1) * g
        r = b2 * state.get("r", 0.0) + (1 - b2) * g**2
        mean = m / (1 - b1**t)
        if nesterov:
            mean = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        root = np.sqrt(r / (1 - b2**t) + eps_root) + eps
        u = mean / root + (decay * w if decoupled else 0)
        return -eta * u, {"m": m, "r": r}

    return step


def rmsprop(
    decay=0.9,
    eps=1e-8,
    momentum=None,
    centered=False,
    nesterov=False,
    bias_correction=False,
    initial_scale=0.0,
    eps_in_sqrt=True,
):
    rate = decay

    def step(g, w, state, t, eta, decay):
        g = g + decay * w
        r = rate * state.get("r", initial_scale) + (1 - rate) * g**2
        mean = rate * state.get("mean", 0.0) + (1 - rate) * g
        spread = r / (1 - rate**t if bias_correction else 1)
        spread = spread - (mean**2 if centered else 0)
        root = np.sqrt(spread + eps) if eps_in_sqrt else np.sqrt(spread) + eps
        u = -eta * g / root
        v = (momentum or 0.0) * state.get("v", 0.0) + u
        state = {"r": r, "mean": mean, "v": v}
        return (u + momentum * v if nesterov else v), state

    return step


def adagrad(eps=1e-7, initial_accumulator_value=0.0):
    def step(g, w, state, t, eta, decay):
        g = g + decay * w
        r = state.get("r", initial_accumulator_value) + g**2
        return -eta * g / np.sqrt(r + eps), {"r": r}

    return step


def adadelta(rho=0.9, eps=1e-6):
    def step(g, w, state, t, eta, decay):
        g = g + decay * w
        r = rho * state.get("r", 0.0) + (1 - rho) * g**2
        u = g * np.sqrt(state.get("d", 0.0) + eps) / np.sqrt(r + eps)
        return -eta * u, {
            "r": r,
            "d": rho * state.get("d", 0.0) + (1 - rho) * u**2,
        }

    return step


def lion(b1=0.9, b2=0.99):
    def step(g, w, state, t, eta, decay):
        m = state.get("m", 0.0)
        u = np.sign(b1 * m + (1 - b1) * g) + decay * w
        return -eta * u, {"m": b2 * m + (1 - b2) * g}

    return step


def adafactor(
    multiply_by_parameter_scale=True,
    clipping_threshold=1.0,
    decay_rate=0.8,
    momentum=None,
    eps=1e-30,
    factored=False,
    min_dim_size_to_factor=16,
):
    def root_mean_square(x):
        return np.sqrt(np.mean(x**2, -1, keepdims=True))

    def step(g, w, state, t, eta, decay):
        kept, square = 1 - t**-decay_rate, g**2 + eps
        if factored:
            matrix = square.reshape(len(w), 16, 16)
            rows = kept * state.get("rows", 0.0) + (1 - kept) * matrix.mean(2)
            columns = kept * state.get("columns", 0.0) + (1 - kept) * matrix.mean(1)
            r = rows[:, :, None] * columns[:, None] / rows.mean(1)[:, None, None]
            u = g / np.sqrt(r.reshape(w.shape))
            state = {"rows": rows, "columns": columns, "v": state.get("v", 0.0)}
        else:
            r = kept * state.get("r", 0.0) + (1 - kept) * square
            u, state = g / np.sqrt(r), {"r": r, "v": state.get("v", 0.0)}
        if clipping_threshold is not None:
            u = u / np.maximum(1, root_mean_square(u) / clipping_threshold)
        if multiply_by_parameter_scale:
            u = u * np.maximum(root_mean_square(w), 1e-3)
        rho = momentum or 0.0
        v = rho * state["v"] + (1 - rho) * eta * u
        return -v - decay * w, state | {"v": v}

    return step


def normalized_sgd(momentum=None, nesterov=False):
    inner = sgd(momentum, nesterov)

    def step(*args):
        u, state = inner(*args)
        w = args[1] + u
        return w / np.linalg.norm(w, axis=-1, keepdims=True) - args[1], state

    return step


def newton():
    def step(g, w, state, t, eta, decay):
        # The gradient is G / |w| long, and the Newton step G |w|.
        return -eta * (g * np.sum(w**2, -1, keepdims=True) + decay * w), state

    return step


WRITTEN = {
    "sgd": sgd,
    "momentum": functools.partial(sgd, 0.9),
    "nesterov": functools.partial(sgd, 0.9, True),
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adadelta": adadelta,
    "adam": adam,
    "adamw": functools.partial(adam, decoupled=True),
    "lion": lion,
    "adafactor": adafactor,
    "normalized_sgd": normalized_sgd,
    "newton": newton,
}


def schedule(kind, peak, steps=STEPS):
    """Return the rates of a run: warm-up over a tenth, then the named decay."""
    t = np.arange(steps) + 1.0
    warm, left = (
        np.minimum(t / (steps / 10), 1),
        np.clip((steps - t) / (0.9 * steps), 0, 1),
    )
    shape = {
        "constant": np.ones(steps),
        "linear": left,
        "cosine": (1 - np.cos(np.pi * left)) / 2,
        "wsd": np.minimum(left * 5, 1),
    }[kind]
    return peak * warm * np.minimum(shape + 1e-3, 1)


def simulate(name, eta, weight_decay, start, profile=G, seed=0, **hyper):
    """Return norms before each step and angles, root mean squares over the vectors."""
    rng, rule = np.random.default_rng(seed), WRITTEN[name](**hyper)
    w = rng.standard_normal((VECTORS, DIMENSION))
    w *= start / np.linalg.norm(w, axis=1, keepdims=True)
    profile, decay = (np.broadcast_to(x, len(eta)) for x in (profile, weight_decay))
    state, norms, angles = {}, [], []
    for t, rate in enumerate(eta):
        norm = np.linalg.norm(w, axis=1, keepdims=True)
        g = rng.standard_normal(w.shape)
        g -= np.sum(g * w, 1, keepdims=True) / norm**2 * w
        g *= profile[t] / norm / np.linalg.norm(g, axis=1, keepdims=True)
        u, state = rule(g, w, state, t + 1, rate, decay[t])
        tangent = u - np.sum(u * w, 1, keepdims=True) / norm**2 * w
        along = norm[:, 0] + np.sum(u * w, 1) / norm[:, 0]
        angles.append(np.arctan2(np.linalg.norm(tangent, axis=1), along))
        norms.append(norm[:, 0])
        w = w + u
    root = lambda x: np.sqrt(np.mean(np.square(x), 1))  # noqa: E731
    return root(norms), root(angles)


def follow(values):
    return lambda count: jnp.asarray(values)[count]


def predict(name, eta, weight_decay, start, profile=G, **hyper):
    decay = follow(weight_decay) if np.ndim(weight_decay) else weight_decay
    run = RULES[name].predict(
        follow(eta), decay, steps=len(eta), initial_norm=start, gradient_norm=profile,
        dimension=DIMENSION, **hyper,
    )  # fmt: skip
    return np.asarray(run.weight_norm), np.asarray(run.angular_update)


def mean_errors(name, eta, weight_decay, start, **options):
    """Return the mean relative errors of norm and angle after 50 steps."""
    pairs = zip(
        predict(name, eta, weight_decay, start, **options),
        simulate(name, eta, weight_decay, start, **options),
        strict=True,
    )
    return [np.mean(np.abs(a / b - 1)[50:]) for a, b in pairs]


KINDS = ("linear", "constant", "cosine", "wsd")
# Peak rate; small and large decay; norm at the start.
SETTINGS = {
    "adamw": (3e-3, (0.1, 1.0), 1.0),
    "momentum": (0.05, (5e-3, 0.1), 1.0),
    "lion": (1e-3, (0.1, 3.0), 1.0),
    "sgd": (0.1, (0.01, 0.3), 1.0),
    "nesterov": (0.05, (5e-3, 0.1), 1.0),
    "adam": (3e-3, (1e-2, 0.1), 1.0),
    "rmsprop": (3e-3, (1e-2, 0.1), 1.0),
    "adagrad": (0.03, (1e-2, 0.3), 1.0),
    "adadelta": (1.0, (1e-2, 0.1), 1.0),
    "normalized_sgd": (0.05, (0.1, 1.0), 1.0),
    "newton": (0.01, (0.1, 1.0), 1.0),
    "adafactor": (0.02, (1e-5, 1e-3), 1.0),
}
BOUNDS = {"lion": (0.012, 0.012)}
RUNS = [(name, kind, i) for kind in KINDS for i in (1, 0) for name in SETTINGS]


@pytest.mark.parametrize(("name", "kind", "size"), RUNS)
def test_a_whole_run(name, kind, size):
    peak, decays, start = SETTINGS[name]
    errors = mean_errors(name, schedule(kind, peak), decays[size], start)
    assert np.all(np.array(errors) < BOUNDS.get(name, (0.004, 0.012))), errors


OTHERS = [
    ("adamw", 3e-3, 0.3, dict(b1=0.5, b2=0.9, eps=0.1, nesterov=True)),
    ("adam", 3e-3, 0.03, dict(b1=0.95, b2=0.95)),
    ("adam", 3e-3, 0.03, dict(eps_root=0.1)),
    ("rmsprop", 3e-4, 0.1, dict(decay=0.95, momentum=0.9)),
    ("rmsprop", 3e-4, 0.1, dict(decay=0.95, momentum=0.8, nesterov=True)),
    ("rmsprop", 3e-3, 0.03, dict(decay=0.95, centered=True)),
    ("rmsprop", 3e-3, 0.03, dict(decay=0.999, bias_correction=True)),
    ("rmsprop", 3e-3, 0.03, dict(decay=0.999, initial_scale=0.1)),
    ("rmsprop", 3e-3, 0.03, dict(decay=0.99, eps=0.3, eps_in_sqrt=False)),
    ("adagrad", 0.03, 0.03, dict(initial_accumulator_value=3.0, eps=0.1)),
    ("normalized_sgd", 0.02, 0.1, dict(momentum=0.8)),
    ("normalized_sgd", 0.02, 0.1, dict(momentum=0.8, nesterov=True)),
    ("adadelta", 1.0, 0.03, dict(rho=0.95, eps=1e-4)),
    ("lion", 3e-3, 1.0, dict(b1=0.5, b2=0.9)),
    ("adafactor", 3e-3, 1e-3, dict(multiply_by_parameter_scale=False)),
    ("adafactor", 0.02, 1e-3, dict(momentum=0.9)),
    ("adafactor", 0.02, 1e-3, dict(clipping_threshold=0.5, decay_rate=0.6)),
    ("adafactor", 0.02, 1e-4, dict(clipping_threshold=None, eps=0.03)),
    ("adafactor", 0.02, 1e-3, dict(factored=True, min_dim_size_to_factor=16)),
    ("adafactor", 0.01, 5e-3, dict(multiply_by_parameter_scale=True)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "peak", "decay", "hyper"), OTHERS)
def test_hyperparameters(name, peak, decay, hyper):
    # Without warm-up the first steps count, and what corrects them.
    eta = np.maximum(schedule("cosine", peak), peak * (np.arange(STEPS) < STEPS / 10))
    errors = mean_errors(name, eta, decay, 1.0, **hyper)
    assert np.all(np.array(errors) < (0.005, 0.012)), errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_gradient_norms_and_decay_of_a_run(name):
    peak, decays, start = SETTINGS[name]
    eta = schedule("linear", peak)
    profile = G * np.exp(-np.arange(STEPS) / 500)
    errors = mean_errors(name, eta, decays[1] * eta / peak, start, profile=profile)
    assert np.all(np.array(errors) < (0.004, 0.012)), errors


# How exact the equilibrium of a rule is.
SETTLED = {
    "sgd": (0.1, 0.1, 1e-9),
    "momentum": (0.1, 0.05, 1e-9),
    "nesterov": (0.1, 0.05, 1e-9),
    "rmsprop": (0.01, 0.03, 0.01),
    "adadelta": (1.0, 0.3, 0.01),
    "adam": (0.01, 0.03, 0.015),
    "adamw": (0.02, 1.0, 0.005),
    "lion": (0.02, 1.0, 1e-9),
    "normalized_sgd": (0.05, 0.5, 1e-9),
}


@pytest.mark.parametrize("name", SETTLED)
def test_the_fixed_point_is_the_equilibrium(name):
    eta, decay, rtol = SETTLED[name]
    given = (eta, decay, G, DIMENSION)
    run = RULES[name].predict(
        eta, decay, steps=6000, initial_norm=1.0, gradient_norm=G, dimension=DIMENSION
    )
    norm = RULES[name].equilibrium_norm(*given)
    angle = RULES[name].equilibrium_rotation(*given)
    np.testing.assert_allclose(run.weight_norm[-1], norm, rtol=rtol)
    np.testing.assert_allclose(run.angular_update[-1], angle, rtol=rtol)
    rate = RULES[name].effective_learning_rate(eta, norm)
    np.testing.assert_allclose(run.effective_learning_rate[-1], rate, rtol=2 * rtol)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("threshold", [1.0, 0.5, None])
def test_adafactor_settles_where_its_steps_are_absolute(momentum, threshold):
    eta, decay = 0.02, 0.01
    hyper = dict(momentum=momentum, clipping_threshold=threshold)
    hyper |= dict(multiply_by_parameter_scale=False)
    rule, given = RULES["adafactor"], (eta, decay, None, DIMENSION)
    norm = rule.equilibrium_norm(*given, **hyper)
    angle = rule.equilibrium_rotation(*given, **hyper)
    run = rule.predict(
        eta, decay, steps=6000, initial_norm=1.0, dimension=DIMENSION, **hyper
    )
    # The window of its averages grows for ever, and their noise falls as t^-0.8.
    np.testing.assert_allclose(run.weight_norm[-1], norm, rtol=1e-3)
    np.testing.assert_allclose(run.angular_update[-1], angle, rtol=1e-3)
    norms, angles = simulate("adafactor", np.full(STEPS, eta), decay, norm, **hyper)
    np.testing.assert_allclose(np.mean(norms[1000:]), norm, rtol=0.01)
    np.testing.assert_allclose(np.mean(angles[1000:]), angle, rtol=0.01)
    # Without its averages, which lag behind the norm, the time is exact.
    hyper |= dict(decay_rate=0.0)
    time = rule.equilibrium_time(*given, initial_norm=norm / 10, **hyper)
    late = simulate("adafactor", np.full(500, eta), decay, norm / 10, **hyper)[0]
    np.testing.assert_allclose(np.argmax(late > 0.9 * norm), time, rtol=0.05, atol=20)
    rate = rule.effective_learning_rate(eta, norm, multiply_by_parameter_scale=False)
    np.testing.assert_allclose(rate, eta / norm)


def test_adafactor_with_relative_steps_has_no_equilibrium_but_a_floor():
    rule, given = RULES["adafactor"], (0.02, 0.01, None, DIMENSION)
    with pytest.raises(ValueError, match=r"only with multiply_by_parameter_scale=Fal"):
        rule.equilibrium_norm(*given)
    # Where decay wins, the norm falls to where all steps are those of the floor.
    decay, eta = 0.01, 0.02
    run = rule.predict(eta, decay, steps=3000, initial_norm=1.0, dimension=DIMENSION)
    floor = 1e-3 * rule.equilibrium_norm(
        eta, decay, dimension=DIMENSION, multiply_by_parameter_scale=False
    )
    assert floor < 1e-3 * DIMENSION**0.5
    np.testing.assert_allclose(run.weight_norm[-1], floor, rtol=5e-3)
    # Where the steps win, it grows for ever, by one factor if no averages lag behind.
    factor = np.sqrt((1 - decay) ** 2 + 0.2**2)
    for rate, low in ((0.0, factor * (1 - 1e-12)), (0.8, 1.0)):
        norm = rule.predict(
            0.2, decay, steps=2000, initial_norm=1.0, dimension=DIMENSION,
            decay_rate=rate,
        ).weight_norm  # fmt: skip
        growth = norm[1:] / norm[:-1]
        assert np.all((growth > low) & (growth < factor * (1 + 1e-12)))


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "adagrad"])
def test_the_schedule_of_an_angle_gives_the_angle(name):
    _, decays, start = SETTINGS[name]
    angle = 0.01 + 0.04 * (1 + np.cos(np.arange(STEPS) / STEPS * np.pi)) / 2
    angle /= 5 if name == "lion" else 1  # its steps of 100 times are alike
    options = dict(gradient_norm=G, dimension=DIMENSION)
    rate = RULES[name].schedule_for_angle(
        follow(angle), decays[0], steps=STEPS, initial_norm=start, **options
    )
    eta = np.asarray(jax.vmap(rate)(jnp.arange(STEPS)))
    _, measured = simulate(name, eta, decays[0], start)
    assert np.mean(np.abs(measured / angle - 1)[50:]) < 0.02
    assert rate(STEPS + 7) == eta[-1]
    _, planned = predict(name, eta, decays[0], start)
    np.testing.assert_allclose(planned, angle, rtol=1e-9)


def test_adamc_keeps_the_angle_in_proportion_to_the_rate():
    r"""With constant decay it goes as $\sqrt{\eta}$ and lags; with AdamC as $\eta$."""
    eta = schedule("cosine", 3e-3, 8000)
    options = dict(steps=8000, initial_norm=0.6, dimension=DIMENSION)
    late = slice(2000, 7900)

    def angles(decay):
        run = RULES["adamw"].predict(follow(eta), follow(decay), **options)
        return np.asarray(run.angular_update)[late]

    settled = RULES["adamw"].equilibrium_rotation(3e-3, 1.0)
    corrected = angles(eta / eta.max())
    np.testing.assert_allclose(corrected, settled * (eta / eta.max())[late], rtol=0.03)
    ratio = angles(np.ones(8000)) / (settled * np.sqrt(eta / eta.max())[late])
    assert np.min(ratio) < 0.5


@pytest.mark.slow
def test_decay_as_a_growing_rate():
    """The schedule that replaces decay has the same angles at every step."""
    eta, decay, steps = 0.05, 0.02, 1500
    options = dict(steps=steps, initial_norm=1.0, gradient_norm=G)
    growing = normax.theory.exponential_equivalent_schedule(eta, decay, 0.9)
    decayed = RULES["momentum"].predict(eta, decay, **options)
    grown = RULES["momentum"].predict(growing, 0.0, **options)
    np.testing.assert_allclose(grown.angular_update, decayed.angular_update, rtol=1e-9)
    rate = RULES["momentum"].schedule_for_angle(
        follow(decayed.angular_update), 0.0, **options
    )
    steps = jnp.arange(steps)
    np.testing.assert_allclose(jax.vmap(rate)(steps), growing(steps), rtol=1e-7)


# By how much losses differ on average. Momentum is exact, as decay is for it a growing
# rate. The memory of the others holds what does not scale with the weights.
SAME_LOSS = {
    "sgd": (0.05, 0.1, 1.0, 1e-13),
    "momentum": (0.01, 0.1, 1.0, 1e-13),
    "nesterov": (0.01, 0.1, 1.0, 2e-3),
    "adamw": (3e-3, 0.1, 3.0, 0.02),
    "lion": (5e-4, 0.1, 3.0, 0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_LOSS)
def test_two_decays_with_schedules_for_one_curve_have_one_loss(name):
    eta, small, large, bound = SAME_LOSS[name]
    steps, rule = 600, RULES[name]
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.standard_normal(DIMENSION) / DIMENSION**0.5)
    teacher = rng.standard_normal(DIMENSION) / DIMENSION**0.5

    def loss(w, key):
        key, noise = jax.random.split(key)
        x = jax.random.normal(key, (16, DIMENSION))
        y = x @ teacher + jax.random.normal(noise, (16,)) / 2
        return jnp.mean((x @ (w / jnp.linalg.norm(w)) - y) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def train(rate, decay):
        tx = rule.make(rate, decay)

        def step(carry, key):
            w, state = carry
            value, g = jax.value_and_grad(loss)(w, key)
            u, state = tx.update(g, state, w)
            return (w + u, state), (value, jnp.linalg.norm(g) * jnp.linalg.norm(w))

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (start, tx.init(start)), keys)[1]

    rate = optax.linear_schedule(eta, eta / 10, steps)
    losses, profile = train(rate, small)
    run = dict(
        steps=steps,
        initial_norm=jnp.linalg.norm(start),
        gradient_norm=profile,
        dimension=DIMENSION,
    )
    angle = rule.predict(rate, small, **run).angular_update
    other = rule.schedule_for_angle(lambda count: angle[count], large, **run)

    def difference(others):
        return np.mean(np.abs(others / losses - 1))

    assert difference(train(other, large)[0]) < bound
    assert difference(train(rate, large)[0]) > 0.05


@pytest.mark.slow
def test_vectors_at_once_and_derivatives():
    """Arrays are a run for each vector; derivatives are those of differences."""
    predict = functools.partial(
        RULES["adamw"].predict, optax.linear_schedule(3e-3, 0.0, 100), steps=100
    )
    norms, dims = jnp.array([0.5, 1.0, 2.0]), jnp.array([16.0, 64.0, 256.0])
    together = predict(0.1, initial_norm=norms, dimension=dims)
    assert together.weight_norm.shape == (100, 3)
    for i in range(3):
        one = predict(0.1, initial_norm=norms[i], dimension=dims[i])
        np.testing.assert_allclose(together.angular_update[:, i], one.angular_update)
    mapped = jax.vmap(lambda n, d: predict(0.1, initial_norm=n, dimension=d))
    np.testing.assert_allclose(mapped(norms, dims).weight_norm.T, together.weight_norm)

    def last(decay):
        return predict(decay, initial_norm=1.0, dimension=64.0).weight_norm[-1]

    difference = (last(0.1 + 1e-5) - last(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(last)(0.1), difference, rtol=1e-6)


def test_in_float32_and_at_any_scale():
    """Angles of 1e-5 keep their digits; so do norms far from one."""
    options = dict(steps=500, gradient_norm=1.0, dimension=256)
    for eta, start in ((1e-5, 1.0), (1e-3, 1e8), (1e-3, 1e-6)):
        exact = RULES["adamw"].predict(eta, 0.1, initial_norm=start, **options)
        with jax.enable_x64(False):
            run = RULES["adamw"].predict(eta, 0.1, initial_norm=start, **options)
        assert run.angular_update.dtype == jnp.float32
        np.testing.assert_allclose(run.angular_update, exact.angular_update, rtol=1e-4)
        np.testing.assert_allclose(run.weight_norm, exact.weight_norm, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", dict(dimension=None), "depends on the dimension"),
        ("adamw", dict(steps=0), "steps must be a positive integer"),
        ("adamw", dict(gradient_norm=np.ones(3)), r"\(steps, ...\), and steps is 10"),
        ("adam", dict(gradient_norm=0.0), "got 0: its decay is divided .*; leave out"),
        ("adamw", dict(gradient_norm=-1.0), "gradient_norm must be at least 0 and fin"),
        ("adamw", dict(initial_norm=-1.0), "initial_norm must be positive"),
        ("adamw", dict(mask=True), "not known for mask=True"),
        ("newton", dict(damping=1.0), "not known for damping=1.0"),
        ("rmsprop", dict(momentum=1.5), "momentum must be at least 0 and below"),
    ],
)
def test_arguments_that_cannot_be_right(name, options, message):
    given = dict(steps=10, initial_norm=1.0, dimension=8) | options
    with pytest.raises(ValueError, match=message):
        RULES[name].predict(0.1, 0.1, **given)


def test_angles_that_no_rate_gives():
    given = dict(steps=10, initial_norm=1.0, dimension=8)
    with pytest.raises(ValueError, match="angle must be at least 0 and below"):
        RULES["adamw"].schedule_for_angle(2.0, 0.1, **given)
    for name, hyper in (
        ("rmsprop", {"momentum": 0.9}),
        ("rmsprop", {"centered": True}),
        ("adafactor", {"momentum": 0.9}),
    ):
        with pytest.raises(ValueError, match="holds past learning rates"):
            RULES[name].schedule_for_angle(0.1, 0.1, **hyper, **given)
    with pytest.raises(ValueError, match=r"centered=True with momentum=0\.5"):
        RULES["rmsprop"].predict(0.1, 0.1, momentum=0.5, centered=True, **given)
    with pytest.raises(ValueError, match="one schedule is for one vector"):
        given["initial_norm"] = jnp.ones(3)
        RULES["adamw"].schedule_for_angle(0.1, 0.1, **given)


NO_EPS = dict(eps=0.0)
# How learning rate, decay, gradient norm, start, and epsilon grow where weights are
# measured in a smaller unit: the powers of that unit.
UNITS = {
    "sgd": (0, 0, 2, 1, 0),
    "nesterov": (0, 0, 2, 1, 0),
    "adagrad": (1, 0, 2, 1, 2),
    "rmsprop": (1, 0, 2, 1, 2),
    "adadelta": (0, 0, 2, 1, 2),
    "adam": (1, 0, 2, 1, 1),
    "adamw": (1, -1, 2, 1, 1),
    "lion": (1, -1, 2, 1, 0),
    "muon": (1, -1, 2, 1, 1),
    "adafactor": (1, 0, 2, 1, 2),
    "normalized_sgd": (0, 0, 0, 0, 0),
    "newton": (0, 0, 0, 1, 0),
}
ABSOLUTE = {"adafactor": dict(multiply_by_parameter_scale=False)}


@pytest.mark.parametrize("unit", [1e-10, 1e10])
@pytest.mark.parametrize("name", UNITS)
def test_no_unit_of_the_weights_leaves_float32(name, unit):
    """Gradients of 1e-20 and 1e20, whose squares float32 does not hold."""
    rate, decay, gradient, start, epsilon = UNITS[name]
    hyper = dict(ABSOLUTE.get(name, {}))
    has_eps = "eps" in [h.name for h in RULES[name].hyperparameters]

    def run(unit):
        eps = {"eps": 1e-4 * unit**epsilon} if has_eps else {}
        weight_decay = 1e-3 if name == "adafactor" else 0.3
        return RULES[name].predict(
            0.01 * unit**rate, weight_decay * unit**decay, steps=200,
            initial_norm=unit**start, gradient_norm=0.5 * unit**gradient,
            dimension=(8, 16) if name == "muon" else 128, **hyper, **eps,
        )  # fmt: skip

    with jax.enable_x64(False):
        found, plain = run(unit), run(1.0)
    assert found.weight_norm.dtype == jnp.float32
    norms = np.asarray(found.weight_norm, float) / unit**start
    np.testing.assert_allclose(norms, plain.weight_norm, rtol=1e-4)
    np.testing.assert_allclose(found.angular_update, plain.angular_update, rtol=2e-4)


@pytest.mark.parametrize("gradient_norm", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_decoupled_rules_do_not_see_the_size_of_the_gradient(name, gradient_norm):
    hyper = dict(ABSOLUTE.get(name, {})) | ({} if name == "lion" else NO_EPS)
    dimension = (8, 16) if name == "muon" else 128
    run = functools.partial(
        RULES[name].predict, 0.01, 1e-3, steps=200, initial_norm=1.0,
        dimension=dimension, **hyper,
    )  # fmt: skip
    with jax.enable_x64(False):
        found, plain = run(gradient_norm=gradient_norm), run(gradient_norm=1.0)
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4)


@pytest.mark.parametrize("eps", [NO_EPS, {}])
@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "nesterov", "adamw", "lion", "muon", "adafactor"]
)
def test_without_a_gradient_weights_only_decay(name, eps):
    """As the optimizer does to a unit that gets none."""
    hyper = eps if "eps" in [h.name for h in RULES[name].hyperparameters] else {}
    shape, decay = (8, 16), 0.1
    run = RULES[name].predict(
        0.02, decay, steps=20, initial_norm=2.0, gradient_norm=0.0,
        dimension=shape if name == "muon" else 128, **hyper,
    )  # fmt: skip
    w = jnp.full(shape, 2 / 128**0.5)
    tx = RULES[name].make(0.02, decay)
    state = tx.init(w)
    for norm in run.weight_norm:
        np.testing.assert_allclose(norm, jnp.linalg.norm(w), rtol=1e-12)
        updates, state = tx.update(jnp.zeros(shape), state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_array_equal(run.angular_update, np.zeros(20))


def test_a_dead_unit_of_a_profile_is_predicted_beside_the_others():
    profile = np.ones((50, 2)) * [1, 0]
    run = functools.partial(RULES["adamw"].predict, 0.01, 0.1, steps=50, dimension=64)
    both = run(initial_norm=1.0, gradient_norm=profile)
    np.testing.assert_allclose(both.weight_norm[:, 1], 0.999 ** np.arange(50))
    alone = run(initial_norm=1.0, gradient_norm=1.0)
    np.testing.assert_allclose(both.angular_update[:, 0], alone.angular_update)
    with pytest.raises(
        ValueError, match=r"got 0: no learning rate turns .*; leave out"
    ):
        RULES["adamw"].schedule_for_angle(
            0.1, 0.1, steps=3, initial_norm=1.0, gradient_norm=0.0, dimension=64
        )


def test_decay_that_takes_all_of_the_weights():
    message = "weight_decay must be at least 0 and below 1, got 1.0; choose weight"
    with pytest.raises(ValueError, match=message):
        RULES["adafactor"].schedule_for_angle(
            0.1, 1.0, steps=3, initial_norm=1.0, dimension=64
        )
    run = RULES["sgd"].predict(10.0, 0.1, steps=3, initial_norm=1.0, gradient_norm=0.0)
    np.testing.assert_array_equal(run.weight_norm, [1, 0, 0])
    np.testing.assert_array_equal(run.angular_update, [0, 0, 0])
