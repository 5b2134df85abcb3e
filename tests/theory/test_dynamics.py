"""dynamics_table and dynamics_scalars, against NumPy and simulated equilibria."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax
from normax.theory import DynamicsTable

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (256, 64)  # 64 vectors


def walk(rule, learning_rate, weight_decay, steps, start=1.0, **hyperparameters):
    """Train with random gradients, orthogonal to the weights, of length 1 / norm."""
    tx = optax.chain(
        normax.UPDATE_RULES[rule].make(learning_rate, weight_decay, **hyperparameters),
        normax.monitor_weight_dynamics(decay=0.8),
    )

    def step(carry, key):
        w, state = carry
        noise = jax.random.normal(key, SHAPE)
        unit = w / jnp.linalg.norm(w, axis=0, keepdims=True)
        noise = noise - unit * jnp.sum(noise * unit, 0, keepdims=True)
        gradient = noise / 16 / jnp.linalg.norm(w, axis=0, keepdims=True)
        updates, state = tx.update(gradient, state, w)
        w = w + updates
        return (w, state), jnp.mean(jnp.linalg.norm(w, axis=0))

    w = jax.random.normal(jax.random.key(1), SHAPE)
    w = start * w / jnp.linalg.norm(w, axis=0, keepdims=True)
    keys = jax.random.split(jax.random.key(2), steps)
    (_, state), norms = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), keys))(w)
    return state, np.asarray(norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "rates", "hyperparameters"),
    [
        ("adamw", (1e-2, 0.2), {"b2": 0.95}),
        ("momentum", (0.1, 6e-4), {"momentum": 0.9}),
        ("sgd", (0.3, 1e-2), {}),
    ],
)
@pytest.mark.parametrize("ratio", [0.4, 2.5])
def test_the_table_tells_how_far_equilibrium_is(rule, rates, hyperparameters, ratio):
    law = normax.UPDATE_RULES[rule]
    settled = float(law.equilibrium_norm(*rates, 1.0, 256, **hyperparameters))
    start = ratio * settled
    _, norms = walk(rule, *rates, 3000, start, **hyperparameters)
    within = np.abs(norms / settled - 1) < 0.1
    arrived = int(np.argmax(within))
    assert 50 < arrived < 2500
    # After a few steps, in which averages of gradients fill, the angle is known.
    seen = 30
    state, _ = walk(rule, *rates, seen, start, **hyperparameters)
    (row,) = normax.dynamics_table(state, rule, *rates, **hyperparameters).arrays
    np.testing.assert_allclose(row.steps_left, arrived - seen, rtol=0.2, atol=20)
    assert ("too slow" if ratio > 1 else "too fast") in row.verdict
    state, _ = walk(rule, *rates, 3000, start, **hyperparameters)
    (row,) = normax.dynamics_table(state, rule, *rates, **hyperparameters).arrays
    assert row.steps_left == 0 and row.verdict == "in equilibrium"
    np.testing.assert_allclose(row.angular_update, row.equilibrium_rotation, rtol=0.05)
    np.testing.assert_allclose(row.weight_norm, settled, rtol=0.05)


def measured(params, updates, **kwargs):
    tx = normax.monitor_weight_dynamics(**kwargs)
    return tx.update(updates, tx.init(params), params)[1]


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


PARAMS = {"dense": {"kernel": draw((6, 4)), "bias": draw((4,))}, "conv": draw((2, 3))}
UPDATES = jax.tree.map(lambda w: 0.1 * jnp.sin(7 * w), PARAMS)


@pytest.mark.slow
def test_scalars_are_root_mean_squares():
    state = measured(PARAMS, UPDATES)
    scalars = normax.dynamics_scalars((optax.EmptyState(), state))
    kernel, update = (np.asarray(x["dense"]["kernel"]) for x in (PARAMS, UPDATES))
    expected = {
        "weight_norm": np.linalg.norm(kernel) / 2,
        "relative_update": np.sqrt(
            np.mean(np.sum(update**2, 0) / np.sum(kernel**2, 0))
        ),
    }
    for measure, value in expected.items():
        np.testing.assert_allclose(
            scalars[f"dynamics/dense/kernel/{measure}"], value, rtol=1e-6
        )
    arrays = {"dynamics/dense/kernel", "dynamics/conv"}
    assert {name.rpartition("/")[0] for name in scalars} == arrays
    assert len(scalars) == 6
    compiled = jax.jit(normax.dynamics_scalars, static_argnums=1)(state, "x/")
    assert compiled.keys() == {n.replace("dynamics/", "x/") for n in scalars}
    for name, value in scalars.items():
        shown = compiled[name.replace("dynamics/", "x/")]
        np.testing.assert_allclose(shown, value, rtol=1e-6)
        assert shown.shape == () and shown.dtype == jnp.float32


@pytest.mark.slow
def test_optimizers_of_nnx_and_partitions():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    labels = {"layers": {0: "first", 1: "second"}}
    tx = optax.partition(
        {
            "first": optax.chain(optax.sgd(0.1), normax.monitor_weight_dynamics()),
            "second": optax.chain(optax.adam(0.1), normax.monitor_weight_dynamics()),
        },
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, leaf: labels["layers"][path[1].key], params
        ),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 3)))))(model)
    optimizer.update(model, grads)
    table = normax.dynamics_table(optimizer.opt_state)
    assert {row.name for row in table.arrays} == {
        "layers/0/kernel",
        "layers/1/kernel",
    }
    assert all(row.axes == (0,) for row in table.arrays)
    assert all(np.isnan(row.equilibrium_rotation) for row in table.arrays)


def test_the_table_prints():
    table = normax.dynamics_table(measured(PARAMS, UPDATES), "adamw", 1e-3, 0.1)
    assert isinstance(table, DynamicsTable) and table.steps == 1
    text = str(table)
    predicted = normax.UPDATE_RULES["adamw"].equilibrium_rotation(1e-3, 0.1)
    for shown in ("dense/kernel", "norm", "steps left", f"{predicted:.3g}", "too fast"):
        assert shown in text
    assert "\x1b" not in text
    schedule = optax.piecewise_constant_schedule(1e-3, {1: 0.1})
    again = normax.dynamics_table(measured(PARAMS, UPDATES), "adamw", schedule, 0.1)
    assert again.arrays == table.arrays


@pytest.mark.slow
def test_rounding_that_stalls_training_is_a_warning():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    updates = jax.tree.map(lambda w: 1e-4 * w, params)
    with pytest.warns(UserWarning, match="undoes most .*param_dtype=jnp.float32"):
        table = normax.dynamics_table(measured(params, updates))
    assert "keep float32 parameters" in table.arrays[0].verdict
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normax.dynamics_table(measured(PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)))


@pytest.mark.parametrize(
    ("params", "updates", "verdict"),
    [
        (jnp.zeros((3, 2)), jnp.ones((3, 2)), "all weights are 0"),
        (jnp.full((3, 2), jnp.nan), jnp.ones((3, 2)), "not finite"),
        (jnp.ones((3, 2)), jnp.full((3, 2), jnp.nan), "not finite"),
        (jnp.ones((3, 2)), jnp.zeros((3, 2)), "does not turn"),
    ],
)
def test_what_is_wrong_is_said(params, updates, verdict):
    table = normax.dynamics_table(measured(params, updates), "sgd", 0.1, 0.1)
    assert table.arrays[0].verdict == verdict


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="must hold the state of normax"):
        normax.dynamics_scalars(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"is 0\.1 and weight_decay None"):
        normax.dynamics_table(measured(PARAMS, UPDATES), "adamw", 0.1)


@pytest.mark.slow
def test_master_weights_in_float32_move_where_bfloat16_does_not():
    x = draw((32, 16), seed=3)

    def train(param_dtype):
        model = nnx.Linear(
            16, 8, param_dtype=param_dtype, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
        tx = optax.chain(optax.adam(1e-5), normax.monitor_weight_dynamics())
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        start = np.asarray(model.kernel[...], np.float64)
        for _ in range(3):
            grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
            optimizer.update(model, grads)
        moved = np.asarray(model.kernel[...], np.float64) != start
        return np.mean(moved), normax.dynamics_scalars(optimizer.opt_state)

    moved, scalars = train(jnp.float32)
    assert moved == 1 and scalars["dynamics/kernel/relative_update"] > 1e-5
    moved, scalars = train(jnp.bfloat16)
    assert moved < 0.1 and scalars["dynamics/kernel/rounded_away"] > 0.9


def test_measures_of_any_size_and_of_nothing():
    params = {
        "a": draw((4, 3)) * 1e25,
        "b": draw((4, 3)) * 1e-30,
        "c": jnp.zeros((0, 3)),
    }
    state = normax.monitor_weight_dynamics().init(params | {"d": jnp.zeros((3, 0))})
    scalars = normax.dynamics_scalars(state, prefix="")
    for name in ("a", "b"):
        expected = np.linalg.norm(np.asarray(params[name], np.float64)) / 3**0.5
        np.testing.assert_allclose(scalars[f"{name}/weight_norm"], expected, rtol=1e-6)
    verdicts = {row.name: row.verdict for row in normax.dynamics_table(state).arrays}
    assert verdicts == dict.fromkeys("abc", "not measured yet")


def test_the_schedule_is_taken_where_the_angle_was_measured():
    schedule = optax.linear_schedule(1e-2, 1e-4, 100)
    tx = normax.monitor_weight_dynamics(every=10)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(19):  # measured before steps 0 and 10
        _, state = update(UPDATES, state, PARAMS)
    row = normax.dynamics_table(state, "sgd", schedule, 0.1).arrays[0]
    predicted = normax.UPDATE_RULES["sgd"].equilibrium_rotation(schedule(10), 0.1)
    np.testing.assert_allclose(row.equilibrium_rotation, predicted, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "rate", "verdict"),
    [
        ("adamw", 0.0, "the learning rate is 0"),
        ("adamw", optax.linear_schedule(0.0, 1e-2, 10), "the learning rate is 0"),
        ("adagrad", 0.1, "adagrad has no equilibrium"),
        ("adam", 0.1, "depends on the gradient norm"),
    ],
)
def test_why_nothing_is_predicted_is_said(rule, rate, verdict):
    for row in normax.dynamics_table(measured(PARAMS, UPDATES), rule, rate, 0.1).arrays:
        assert row.verdict == verdict and np.isnan(row.equilibrium_rotation)


def test_names_are_no_markup_and_long_ones_stand_whole():
    name = "block[red]" * 12 + "[/y]"
    text = str(
        normax.dynamics_table(measured({name: draw((3, 2))}, {name: draw((3, 2), 1)}))
    )
    assert name in text and "verdict" in text


def test_arguments_that_do_not_fit():
    state = measured(PARAMS, UPDATES)
    two = (state, state)
    runs = jax.vmap(normax.monitor_weight_dynamics().init)(
        jax.tree.map(lambda w: jnp.stack([w, w]), PARAMS)
    )
    table = normax.dynamics_table
    for call, message in [
        (lambda: table(state, "AdamW", 0.1, 0.1), "did you mean adamw"),
        (lambda: table(state, optax.adamw, 0.1, 0.1), "rule must be one of sgd"),
        (lambda: table(state, "adamw", 0.1, 0.0), "weight_decay must be positive"),
        (lambda: table(state, None, 0.1), "rule is None and learning_rate"),
        (lambda: table(state, foo=3), "rule is None"),
        (lambda: table(runs), "must be that of one run"),
        (lambda: jax.jit(lambda s: table(s) and 1)(state), "outside of jax.jit"),
        (lambda: normax.dynamics_scalars(two), "stands twice"),
    ]:
        with pytest.raises((ValueError, KeyError), match=message):
            call()
    with pytest.raises(TypeError, match="got b3"):
        table(state, "adadelta", 0.1, 0.1, b3=0.9)
    first, second = table(two).arrays[0], table(two).arrays[-1]
    assert first.weight_norm != second.weight_norm
