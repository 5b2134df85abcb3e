"""Measures of weight dynamics against float64, and the monitor against them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

CASES = [("unit", (256, 10), (0,)), ("layer", (30, 20), (0, 1)), ((1,), (8, 64), (1,))]


def draw(shape, seed=0):
    return jax.device_put(
        np.random.default_rng(seed).normal(size=shape).astype(jnp.float32)
    )


def exact(w, u, axes):
    w, u = np.asarray(w, np.float64), np.asarray(u, np.float64)
    w_norm, u_norm = (np.sqrt(np.sum(x**2, axis=axes)) for x in (w, u))
    # Kahan's angle, 2 atan2(|a - b|, |a + b|) of unit vectors, in float64.
    a = w / np.sqrt(np.sum(w**2, axis=axes, keepdims=True))
    b = (w + u) / np.sqrt(np.sum((w + u) ** 2, axis=axes, keepdims=True))
    angle = 2 * np.arctan2(
        np.sqrt(np.sum((a - b) ** 2, axis=axes)),
        np.sqrt(np.sum((a + b) ** 2, axis=axes)),
    )
    return w_norm, u_norm / w_norm, angle


@pytest.mark.usefixtures("every_form")
@pytest.mark.slow
@pytest.mark.parametrize("size", [10.0, 1.0, 1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize(("axes", "shape", "reduced"), CASES)
def test_measures_in_float64(axes, shape, reduced, size):
    w = draw(shape)
    u = size * (draw(shape, seed=1) + 0.1 * w)
    w_norm, relative, angle = exact(w, u, reduced)
    np.testing.assert_allclose(normax.weight_norm(w, axes), w_norm, rtol=3e-7)
    measured = normax.relative_update(w, u, axes)
    np.testing.assert_allclose(measured, relative, rtol=5e-7)
    measured = normax.angular_update(w, u, axes)
    # Below 1e-6 radians the float64 oracle's own a - b has lost its digits.
    np.testing.assert_allclose(measured, angle, rtol=1e-6 if size > 1e-6 else 1e-5)
    assert measured.dtype == jnp.float32


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("angle", [1e-7, 1e-5, 1e-3, 0.5, 1.5, 3.0, 3.14159])
def test_angle_of_a_rotation_by_a_known_angle(angle):
    rng = np.random.default_rng(5)
    w, v = np.linalg.qr(rng.normal(size=(400, 2)))[0].T * 3.0
    u = (np.cos(angle) - 1) * w + np.sin(angle) * v
    w, u = (jnp.asarray(x[:, None], jnp.float32) for x in (w, u))
    (measured,) = normax.angular_update(w, u)
    np.testing.assert_allclose(measured, angle, rtol=2e-6)


@pytest.mark.usefixtures("every_form")
def test_angle_is_blind_to_the_scale_and_to_radial_updates():
    w, u = draw((50, 4)), 0.1 * draw((50, 4), seed=1)
    angle = normax.angular_update(w, u)
    for scale in (1e-25, 1e-3, 1e3, 1e25):
        scaled = normax.angular_update(scale * w, scale * u)
        np.testing.assert_allclose(scaled, angle, rtol=1e-6)
    np.testing.assert_allclose(normax.angular_update(w, -1e-4 * w), 0, atol=1e-10)
    np.testing.assert_allclose(normax.angular_update(w, -2 * w), np.pi, rtol=1e-6)


@pytest.mark.usefixtures("every_form")
@pytest.mark.slow
def test_zero_vectors():
    w, u = draw((5, 3)).at[:, 0].set(0).at[:, 1].set(0), draw((5, 3)).at[:, 1].set(0)
    np.testing.assert_array_equal(normax.relative_update(w, u)[:2], [0, 0])
    np.testing.assert_allclose(normax.angular_update(w, u)[:2], [np.pi / 2, 0])
    for measure in (normax.relative_update, normax.angular_update):
        total = lambda w, u, measure=measure: jnp.sum(measure(w, u))  # noqa: E731
        for gradient in jax.grad(total, argnums=(0, 1))(w, u):
            assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("measure", "index"), [(normax.relative_update, 1), (normax.angular_update, 2)]
)
def test_derivatives_against_finite_differences(measure, index):
    with jax.enable_x64(True):
        w, u, w_dot, u_dot = (
            jnp.asarray(draw((9, 4), s), jnp.float64) for s in range(4)
        )
        _, slope = jax.jvp(measure, (w, u), (w_dot, u_dot))
        h = 1e-6
        ahead = exact(w + h * w_dot, u + h * u_dot, 0)[index]
        behind = exact(w - h * w_dot, u - h * u_dot, 0)[index]
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_derivatives_at_every_scale(scale):
    w, u = draw((9, 4)), 0.3 * draw((9, 4), seed=1)
    for measure in (normax.relative_update, normax.angular_update):
        total = lambda w, u, measure=measure: jnp.sum(measure(w, u))  # noqa: E731
        expected = jax.grad(total, argnums=(0, 1))(w, u)
        measured = jax.grad(total, argnums=(0, 1))(scale * w, scale * u)
        for got, want in zip(measured, expected, strict=True):
            np.testing.assert_allclose(scale * got, want, rtol=1e-4, atol=1e-6)


def test_a_nan_update_of_zero_weights_shows():
    measured = normax.relative_update(jnp.zeros((3, 1)), jnp.full((3, 1), jnp.nan))
    assert np.isnan(measured[0])


@pytest.mark.usefixtures("every_form")
def test_nan_and_inf_are_not_hidden():
    w, u = (
        draw((5, 3)),
        draw((5, 3), seed=1).at[2, 0].set(jnp.nan).at[1, 1].set(jnp.inf),
    )
    for measure in (normax.relative_update, normax.angular_update):
        measured = measure(w, u)
        assert not np.isfinite(measured[0]) and np.isfinite(measured[2])
    assert not np.isfinite(normax.relative_update(w, u)[1])


@pytest.mark.slow
def test_monitor_keeps_the_dtype_of_its_state():
    with jax.enable_x64(True):
        w = draw((6, 2))
        tx = normax.monitor_weight_dynamics(decay=0.5)
        _, state = tx.update(jnp.asarray(w, jnp.float64), tx.init(w), w)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
        assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_monitor_averages_the_measures(decay):
    params = {"kernel": draw((12, 3)), "bias": draw((3,))}
    tx = optax.chain(optax.sgd(0.1), normax.monitor_weight_dynamics(decay=decay))
    state, history = tx.init(params), []
    np.testing.assert_allclose(
        optax.tree.get(state, "weight_norm")["kernel"],
        np.linalg.norm(params["kernel"], axis=0),
        rtol=1e-6,
    )
    for seed in range(8):
        grads = {"kernel": draw((12, 3), seed + 1), "bias": draw((3,), seed)}
        updates, state = tx.update(grads, state, params)
        plain, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params))
        jax.tree.map(np.testing.assert_array_equal, updates, plain)
        history.append(exact(params["kernel"], updates["kernel"], (0,)))
        params = optax.apply_updates(params, updates)
        weights = np.array([decay**age for age in reversed(range(len(history)))])
        for index, name in enumerate(
            ("weight_norm", "relative_update", "angular_update")
        ):
            values = np.array([measures[index] for measures in history])
            expected = np.average(values, axis=0, weights=weights)
            measured = optax.tree.get(state, name)
            assert measured["bias"] is None
            np.testing.assert_allclose(measured["kernel"], expected, rtol=1e-5)


def test_monitor_forgets_a_nan_without_averaging():
    w, good = draw((6, 2)), draw((6, 2), seed=1)
    tx = normax.monitor_weight_dynamics()
    _, state = tx.update(jnp.full_like(w, jnp.nan), tx.init(w), w)
    assert np.all(np.isnan(state.angular_update))
    _, state = tx.update(good, state, w)
    np.testing.assert_allclose(state.angular_update, exact(w, good, 0)[2], rtol=1e-6)


def test_monitor_keeps_the_measures_of_what_has_no_gradient():
    params = {"a": draw((6, 2)), "b": draw((4, 3))}
    tx = normax.monitor_weight_dynamics()
    updates = {"a": draw((6, 2), seed=1), "b": None}
    passed, state = tx.update(updates, tx.init(params), params)
    assert passed["b"] is None
    np.testing.assert_allclose(
        state.weight_norm["b"], np.linalg.norm(params["b"], axis=0), rtol=1e-6
    )


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_decay_out_of_range_raises(decay):
    with pytest.raises(
        ValueError, match=r"decay must be at least 0 and below 1\.?0?, got"
    ):
        normax.monitor_weight_dynamics(decay=decay)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_every_third_step_is_measured(decay, dtype):
    w = draw((12, 3)).astype(dtype)
    rare = normax.monitor_weight_dynamics(decay=decay, every=3)
    always = normax.monitor_weight_dynamics(decay=decay)
    state, expected = rare.init(w), always.init(w)
    step = jax.jit(rare.update)
    for count in range(8):
        u = draw((12, 3), seed=count + 1).astype(dtype) / 64
        passed, state = step(u, state, w)
        np.testing.assert_array_equal(passed, u)
        if count % 3 == 0:
            _, expected = always.update(u, expected, w)
        assert state.steps == count + 1
        for name in normax.spheres.monitor.AVERAGED:
            # Two programs fuse the average differently, so the last place may differ.
            measured, wanted = getattr(state, name), getattr(expected, name)
            if wanted is not None:
                np.testing.assert_allclose(measured, wanted, rtol=3e-7)
        w = w + u


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("update_dtype", ["same", jnp.float32])
@pytest.mark.parametrize("size", [0.3, 3e-3, 1e-5])
def test_what_is_reported_is_what_apply_updates_does(dtype, update_dtype, size):
    w = draw((64, 5)).astype(dtype)
    u = size * draw((64, 5), seed=1)
    u = u.astype(dtype if update_dtype == "same" else update_dtype)
    tx = normax.monitor_weight_dynamics()
    _, state = jax.jit(tx.update)(u, tx.init(w), w)
    after = np.asarray(optax.apply_updates(w, u), np.float64)
    before = np.asarray(w, np.float64)
    _, relative, angle = exact(before, after - before, (0,))
    np.testing.assert_allclose(state.relative_update, relative, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(state.angular_update, angle, rtol=1e-4, atol=1e-7)
    lost = np.mean((after == before)[np.asarray(u) != 0])
    np.testing.assert_allclose(state.rounded_away, lost, rtol=1e-5)


@pytest.mark.slow
def test_weights_that_do_not_move_are_not_said_to_move():
    w = 1 + draw((64, 5)).astype(jnp.bfloat16) ** 2
    tx = normax.monitor_weight_dynamics()
    _, state = tx.update(jnp.full((64, 5), 1e-4, jnp.bfloat16), tx.init(w), w)
    assert np.all(state.relative_update == 0) and state.rounded_away == 1
    full = w.astype(jnp.float32)
    _, state = tx.update(jnp.full((64, 5), 1e-4), tx.init(full), full)
    assert np.all(state.relative_update > 1e-6) and state.rounded_away is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 3e-5, 3e-7])
@pytest.mark.parametrize("step", [0.0, 0.1, 0.01])
def test_float16_has_subnormal_numbers(size, step):
    w = (size * draw((64, 2))).astype(jnp.float16)
    u = (step * size * draw((64, 2), seed=1)).astype(jnp.float16)
    tx = normax.monitor_weight_dynamics()
    _, state = tx.update(u, tx.init(w), w)
    before, after = (np.asarray(x, np.float64) for x in (w, optax.apply_updates(w, u)))
    _, relative, _ = exact(before, after - before, (0,))
    np.testing.assert_allclose(state.relative_update, relative, rtol=1e-5, atol=1e-9)


def test_the_state_says_which_axes_were_measured():
    params = {"a": draw((4, 3)), "b": draw((2, 3, 4, 5)), "c": draw((3,))}
    state = normax.monitor_weight_dynamics({"a": (1,), "b": "unit", "c": "none"}).init(
        params
    )
    assert state.axes["a"].tolist() == [1] and state.axes["b"].tolist() == [0, 1, 2]
    assert state.axes["c"] is None


@pytest.mark.parametrize("every", [0, -1, float("nan")])
def test_every_below_one_raises(every):
    with pytest.raises(ValueError, match="every must be at least 1 and finite, got"):
        normax.monitor_weight_dynamics(every=every)
    with pytest.raises(ValueError, match="whole number of steps, got 2"):
        normax.monitor_weight_dynamics(every=2.5)
