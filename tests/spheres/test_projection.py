"""Projection onto spheres: nearest point, norms to rounding, tangent updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import normax

pytestmark = pytest.mark.few_rows(2)

CASES = [("unit", (64, 10), (0,)), ("layer", (30, 20), (0, 1)), ((1,), (8, 12), (1,))]
TOLERANCE = {jnp.float16: 1e-3, jnp.bfloat16: 3e-3, jnp.float32: 3e-7}


def draw(shape, seed=0, scale=1.0, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jax.device_put(values.astype(dtype))


def norms(x, axes):
    return np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axes))


@pytest.mark.parametrize(("axes", "shape", "reduced"), CASES)
def test_projection_in_float64(axes, shape, reduced):
    w = draw(shape)
    exact = np.asarray(w, np.float64)
    exact = 2.5 * exact / np.sqrt(np.sum(exact**2, axis=reduced, keepdims=True))
    measured = normax.projection_unit_norm(w, axes, radius=2.5)
    np.testing.assert_allclose(measured, exact, rtol=4e-7)


def test_projection_is_the_nearest_point():
    w = draw((4, 1), seed=3)
    projected = np.ravel(normax.projection_unit_norm(w, radius=0.7))
    found = scipy.optimize.minimize(
        lambda v: np.sum((v - np.ravel(w)) ** 2),
        x0=np.full(4, 0.35),
        constraints={"type": "eq", "fun": lambda v: np.sum(v**2) - 0.49},
        tol=1e-12,
    )
    np.testing.assert_allclose(projected, found.x, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("axes", "shape", "reduced"), CASES)
def test_projected_norms_in_every_dtype(axes, shape, reduced, dtype):
    projected = normax.projection_unit_norm(draw(shape, dtype=dtype), axes)
    assert projected.dtype == dtype
    assert np.max(np.abs(norms(projected, reduced) - 1)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_projected_norms_at_every_scale_and_size(size, scale):
    projected = normax.projection_unit_norm(draw((size, 200), seed=size, scale=scale))
    assert np.max(np.abs(norms(projected, 0) - 1)) < 3e-7


@pytest.mark.usefixtures("every_form")
def test_zero_vectors_stay_zero():
    w = draw((6, 3)).at[:, 1].set(0.0)
    projected = normax.projection_unit_norm(w)
    np.testing.assert_array_equal(projected[:, 1], 0)
    np.testing.assert_allclose(norms(projected, 0), [1, 0, 1], rtol=3e-7)
    tx = normax.project_unit_norm()
    updates, _ = tx.update(-w, tx.init(w), w)
    np.testing.assert_array_equal(optax.apply_updates(w, updates), 0)


@pytest.mark.usefixtures("every_form")
def test_a_nan_shows_in_the_whole_vector():
    w = draw((6, 3))
    u = draw((6, 3), seed=1).at[2, 1].set(jnp.nan)
    tx = normax.project_unit_norm()
    updates, _ = tx.update(u, tx.init(w), w)
    for result in (updates, normax.projection_unit_norm(u)):
        np.testing.assert_array_equal(np.isnan(result), [[False, True, False]] * 6)


@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        (3, [3, 3, 3]),
        (np.float32(0.25), [0.25] * 3),
        (jnp.array([1.0, 2.0, 0.0]), [1, 2, 0]),
        (np.array([4.0]), [4, 4, 4]),
        ({"kernel": jnp.array([1.0, 2.0, 3.0]), "bias": None}, [1, 2, 3]),
        ({"kernel": 0.5, "bias": None}, [0.5] * 3),
        ({"kernel": 1.0, "bias": 7.0}, [1.0] * 3),
    ],
)
def test_radius(radius, expected):
    params = {"kernel": draw((9, 3)), "bias": draw((3,))}
    projected = normax.projection_unit_norm(params, radius=radius)
    np.testing.assert_allclose(norms(projected["kernel"], 0), expected, rtol=3e-7)
    np.testing.assert_array_equal(projected["bias"], params["bias"])
    tx = normax.project_unit_norm(radius=radius)
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(norms(after["kernel"], 0), expected, rtol=6e-7)


@pytest.mark.parametrize("radius", [-1.0, np.nan, np.inf, jnp.array([1.0, -2.0, 1.0])])
def test_radius_out_of_range_raises(radius):
    for factory in (
        lambda: normax.project_unit_norm(radius=radius),
        lambda: normax.projection_unit_norm(draw((4, 3)), radius=radius),
    ):
        with pytest.raises(
            ValueError, match="radius must be at least 0 and finite, got"
        ):
            factory()


def test_radius_that_is_no_radius_raises():
    w = draw((4, 3))
    with pytest.raises(ValueError, match=r"radius must be a number.*got 'initial'"):
        normax.projection_unit_norm(w, radius="initial")
    with pytest.raises(ValueError, match=r"radius must be a number.*got 'unit'"):
        normax.project_unit_norm(radius="unit")
    with pytest.raises(
        ValueError, match=r"radius must broadcast.*shape \(4, 3\).*\(3,\)"
    ):
        normax.projection_unit_norm(w, radius=jnp.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "rule", [optax.sgd(0.1, momentum=0.9), optax.adam(0.05, eps=1e-3)]
)
def test_norms_after_many_steps(rule, dtype):
    tx = optax.chain(rule, normax.project_unit_norm(radius=1.0))
    params = normax.projection_unit_norm(draw((128, 6), dtype=dtype))

    def step(carry, key):
        params, state = carry
        grads = jax.random.normal(key, params.shape, params.dtype)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    keys = jax.random.split(jax.random.key(0), 300)
    _, history = jax.lax.scan(step, (params, tx.init(params)), keys)
    assert np.max(np.abs(norms(history, 1) - 1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_initial_radius_is_kept(scale):
    params = {"kernel": draw((20, 4), scale=scale) * jnp.array([[1.0, 2.0, 5.0, 0.0]])}
    tx = optax.chain(optax.sgd(0.3), normax.project_unit_norm(radius="initial"))
    state, start = tx.init(params), norms(params["kernel"], 0)
    for seed in range(5):
        grads = {"kernel": draw((20, 4), seed, scale)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(norms(params["kernel"], 0), start, rtol=6e-7)


def test_projection_of_the_stepped_weights():
    w, u = draw((7, 3)), draw((7, 3), seed=1)
    tx = normax.project_unit_norm(radius=1.5)
    updates, _ = tx.update(u, tx.init(w), w)
    stepped = np.asarray(w, np.float64) + np.asarray(u, np.float64)
    expected = 1.5 * stepped / np.sqrt(np.sum(stepped**2, 0, keepdims=True))
    np.testing.assert_allclose(w + updates, expected, rtol=1e-6)


@pytest.mark.slow
def test_first_step_from_far_away_rounds_as_documented():
    unit, tx = normax.projection_unit_norm(draw((4, 2000))), normax.project_unit_norm()
    for distance, low, high in (
        (10.0, 0.0, 1e-6),
        (100.0, 1e-6, 1e-5),
        (1e8, 1.0, 1.0),
    ):
        w = distance * unit
        updates, _ = tx.update(0.01 * unit, tx.init(w), w)
        error = np.max(np.abs(norms(optax.apply_updates(w, updates), 0) - 1))
        assert low <= error <= high


def test_a_transformation_after_the_projection_undoes_it():
    w, u = draw((7, 3)), draw((7, 3), seed=1)
    for chain, holds in (
        (optax.chain(optax.scale(0.5), normax.project_unit_norm()), True),
        (optax.chain(normax.project_unit_norm(), optax.scale(0.5)), False),
    ):
        updates, _ = chain.update(u, chain.init(w), w)
        error = np.max(np.abs(norms(w + updates, 0) - 1))
        assert (error < 1e-6) == holds


@pytest.mark.usefixtures("every_form")
@pytest.mark.slow
@pytest.mark.parametrize(("axes", "shape", "reduced"), CASES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("u_scale", [1e-30, 1.0, 1e30])
def test_removed_radial_component(axes, shape, reduced, scale, u_scale):
    w = draw(shape, scale=scale)
    u = u_scale * (draw(shape, seed=1) + 0.5 * draw(shape))
    tx = normax.remove_radial_component(axes)
    updates, _ = tx.update(u, tx.init(w), w)
    w64, u64 = np.asarray(w, np.float64), np.asarray(u, np.float64)
    slope = np.sum(w64 * u64, reduced, keepdims=True)
    slope /= np.sum(w64**2, reduced, keepdims=True)
    np.testing.assert_allclose(updates, u64 - slope * w64, atol=2e-6 * u_scale)
    cosine = np.sum(w64 * np.asarray(updates, np.float64), reduced)
    cosine /= norms(w64, reduced) * norms(updates, reduced)
    assert np.max(np.abs(cosine)) < 1e-6


def test_radial_component_of_zero_weights_is_not_removed():
    w, u = jnp.zeros((4, 2)), draw((4, 2))
    tx = normax.remove_radial_component()
    np.testing.assert_array_equal(tx.update(u, tx.init(w), w)[0], u)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_normalized_sgd_against_its_recurrence(momentum, nesterov):
    tx = normax.normalized_sgd(0.2, "unit", 0.1, momentum, nesterov)
    params = {"kernel": normax.projection_unit_norm(draw((9, 4))), "bias": draw((4,))}
    state = tx.init(params)
    kernel, bias = (np.asarray(params[k], np.float64) for k in ("kernel", "bias"))
    velocity = {"kernel": 0.0, "bias": 0.0}
    for seed in range(6):
        grads = {"kernel": draw((9, 4), 10 + seed), "bias": draw((4,), 20 + seed)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        steps = {}
        for name, w in (("kernel", kernel), ("bias", bias)):
            g = np.asarray(grads[name], np.float64) + 0.1 * w
            velocity[name] = (momentum or 0.0) * velocity[name] + g
            ahead = nesterov and momentum
            steps[name] = g + momentum * velocity[name] if ahead else velocity[name]
        kernel, bias = kernel - 0.2 * steps["kernel"], bias - 0.2 * steps["bias"]
        kernel /= np.sqrt(np.sum(kernel**2, axis=0))
        np.testing.assert_allclose(params["kernel"], kernel, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(params["bias"], bias, rtol=2e-5, atol=1e-6)


def test_weight_decay_changes_only_the_rate_on_the_sphere():
    # w - eta (g + lambda w) = (1 - eta lambda) (w - eta / (1 - eta lambda) g)
    w, g = normax.projection_unit_norm(draw((9, 4))), draw((9, 4), seed=1)
    eta, decay = 0.2, 0.5
    after = []
    for tx in (
        normax.normalized_sgd(eta, weight_decay=decay),
        normax.normalized_sgd(eta / (1 - eta * decay)),
    ):
        updates, _ = tx.update(g, tx.init(w), w)
        after.append(optax.apply_updates(w, updates))
    np.testing.assert_allclose(after[0], after[1], atol=3e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_projection_jacobian_is_the_tangent_projector(scale):
    w = draw((5, 1), seed=2, scale=scale)
    jacobian = jax.jacobian(normax.projection_unit_norm)(w)[:, 0, :, 0]
    unit = np.asarray(w[:, 0], np.float64) / norms(w[:, 0], 0)
    expected = (np.eye(5) - np.outer(unit, unit)) / norms(w[:, 0], 0)
    np.testing.assert_allclose(jacobian, expected, atol=1e-6 / scale)


def test_radius_needs_no_entry_of_its_own_for_every_array():
    params = {"a": {"kernel": draw((4, 3)), "bias": draw((3,))}, "b": draw((2, 5))}
    projected = normax.projection_unit_norm(params, radius={"a": 2.0, "b": jnp.ones(5)})
    np.testing.assert_allclose(norms(projected["a"]["kernel"], 0), [2] * 3, rtol=3e-7)
    mask = {"a": False, "b": True}
    tx = optax.masked(normax.project_unit_norm(radius={"a": 2.0, "b": 3.0}), mask)
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(norms(after["b"], 0), [3] * 5, rtol=6e-7)


@pytest.mark.parametrize(
    ("radius", "message"),
    [
        (None, r"must broadcast.*None for params\['a'\]"),
        ({"a": None, "b": 1.0}, r"must broadcast.*None for params\['a'\]"),
        ({"a": 1.0}, r"no entry for params\['b'\]"),
        ({"a": 1.0, "b": "initial"}, "must be a number"),
        (jnp.ones(7), r"must broadcast"),
    ],
)
def test_wrong_radius_raises_at_init(radius, message):
    params = {"a": draw((4, 3)), "b": draw((2, 5))}
    with pytest.raises(ValueError, match=message):
        normax.projection_unit_norm(params, radius=radius)
    with pytest.raises(ValueError, match=message):
        normax.project_unit_norm(radius=radius).init(params)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 32, 100])
def test_bfloat16_norms(size):
    w = draw((size, 4000), seed=size, dtype=jnp.bfloat16)
    projected = normax.projection_unit_norm(w)
    bound = 3e-3 if size >= 32 else 4e-3
    assert np.max(np.abs(norms(projected, 0) - 1)) < bound


def test_coarse_updates_of_fine_weights_do_not_coarsen_the_norm():
    w, u = (
        normax.projection_unit_norm(draw((20, 4))),
        draw((20, 4), 1, 0.1, jnp.bfloat16),
    )
    tx = normax.project_unit_norm()
    updates, _ = tx.update(u, tx.init(w), w)
    after = optax.apply_updates(w, updates)
    np.testing.assert_allclose(norms(after, 0), [1] * 4, rtol=3e-7)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("radius", ["initial", 1.0, 0.3])
def test_a_vector_on_the_sphere_stays_to_the_last_bit(radius):
    """Rounded at every step, it would creep, by 1e-5 radians in 500 steps."""
    w, tx = draw((64, 40)), normax.project_unit_norm(radius=radius)
    state = tx.init(w)

    @jax.jit
    def follow(w):
        def step(w, _):
            updates, _ = tx.update(jnp.zeros_like(w), state, w)
            return w + updates, None

        return jax.lax.scan(step, w, length=20)[0]

    settled = follow(w)
    np.testing.assert_array_equal(follow(settled), settled)
    if radius == "initial":
        np.testing.assert_array_equal(settled, w)


def test_on_the_sphere_the_derivative_is_still_that_of_the_projection():
    w, direction = draw((64, 40)), draw((64, 40), seed=1)
    tx = normax.project_unit_norm(radius="initial")
    state = tx.init(w)
    after = lambda u: w + tx.update(u, state, w)[0]  # noqa: E731
    stays, slope = jax.jvp(after, (jnp.zeros_like(w),), (direction,))
    np.testing.assert_array_equal(stays, w)
    unit = np.asarray(w, np.float64) / norms(w, 0)[None]
    d = np.asarray(direction, np.float64)
    expected = d - unit * np.sum(unit * d, axis=0)[None]
    np.testing.assert_allclose(slope, expected, atol=1e-6)
