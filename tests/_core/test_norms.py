"""Norms and polar decompositions against float64, at every scale.

Tests with `every_form` run the forms of a CPU, and those of other devices.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normax
from normax._core import norms
from normax._core.norms import (
    hypotenuse,
    polar_decomposition,
    square_root,
    unit_vector,
    vector_norm,
)

pytestmark = pytest.mark.few_rows(1)

CASES = [((50, 6), (0,)), ((3, 3, 4, 5), (0, 1, 2)), ((40, 30), (0, 1)), ((4, 9), (1,))]
SCALES = [1e-33, 1e-30, 1e-19, 1e-3, 1.0, 1e8, 1e19, 1e30, 1e37]


def draw(shape, scale, seed=0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jax.device_put(values.astype(np.float32))


def polar_in_float64(w, u, axes):
    w, u = np.asarray(w, np.float64), np.asarray(u, np.float64)
    w_norm = np.sqrt(np.sum(w**2, axes, keepdims=True))
    direction = np.divide(w, w_norm, where=w_norm > 0, out=np.zeros_like(w))
    radial = np.sum(u * direction, axes, keepdims=True)
    tangential = np.sqrt(np.sum((u - radial * direction) ** 2, axes, keepdims=True))
    return w_norm, np.sqrt(np.sum(u**2, axes, keepdims=True)), radial, tangential


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_norm_at_every_scale(shape, axes):
    for scale in SCALES:
        x = draw(shape, scale)
        expected = polar_in_float64(x, x, axes)[0]
        measured = np.asarray(vector_norm(x, axes), np.float64)
        np.testing.assert_allclose(measured, expected, rtol=3e-7)


@pytest.mark.usefixtures("every_form")
def test_norm_of_vectors_of_different_scales():
    scales = jnp.array([[1e-30, 0.0, 1.0, 1e30, 1e-12]])
    x = draw((64, 5), 1.0) * scales
    expected = polar_in_float64(x, x, (0,))[0]
    np.testing.assert_allclose(vector_norm(x, (0,)), expected, rtol=3e-7)


@pytest.mark.usefixtures("every_form")
def test_norm_shows_what_is_not_finite():
    x = draw((4, 3), 1.0)
    x = x.at[1, 0].set(jnp.inf).at[2, 1].set(jnp.nan)
    norm = np.ravel(vector_norm(x, (0,)))
    assert np.isinf(norm[0]) and np.isnan(norm[1]) and np.isfinite(norm[2])


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_norm_derivative_against_finite_differences(scale):
    with jax.enable_x64(True):
        x = jnp.asarray(draw((6, 3), 1.0), jnp.float64) * scale
        gradient = jax.grad(lambda x: jnp.sum(vector_norm(x, (0,))))(x)
        for index in [(0, 0), (3, 1), (5, 2)]:
            step = 1e-6 * scale
            ahead, behind = x.at[index].add(step), x.at[index].add(-step)
            slope = jnp.sum(vector_norm(ahead, (0,)) - vector_norm(behind, (0,)))
            np.testing.assert_allclose(gradient[index], slope / (2 * step), rtol=1e-7)


def test_unit_vector_derivative_against_finite_differences():
    with jax.enable_x64(True):
        x, x_dot = (
            jnp.asarray(draw((6, 3), 1.0, seed), jnp.float64) for seed in (0, 1)
        )
        _, slopes = jax.jvp(lambda x: unit_vector(x, (0,)), (x,), (x_dot,))
        norms = [np.linalg.norm(x + h * x_dot, axis=0) for h in (1e-6, -1e-6)]
        ahead, behind = x + 1e-6 * x_dot, x - 1e-6 * x_dot
        units = [ahead / norms[0][None], behind / norms[1][None]]
        expected = (units[0] - units[1]) / 2e-6
        np.testing.assert_allclose(slopes[0], expected, rtol=1e-7, atol=1e-9)
        expected = (1 / norms[0] - 1 / norms[1]) / 2e-6
        np.testing.assert_allclose(slopes[1][0], expected, rtol=1e-7)


@pytest.mark.slow
def test_norm_derivatives_are_finite_at_zero():
    def total(x):
        return jnp.sum(vector_norm(x, (0,)))

    zero = jnp.zeros((3, 2))
    np.testing.assert_array_equal(jax.grad(total)(zero), 0)
    np.testing.assert_array_equal(jax.vmap(jax.grad(total))(zero[None]), 0)
    hessian = jax.hessian(lambda x: total(x) ** 2)(zero)
    assert np.all(np.isfinite(hessian))


@pytest.mark.usefixtures("every_form")
@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_polar_decomposition_at_every_scale(shape, axes):
    for w_scale, u_scale in itertools.product([1e-30, 1.0, 1e30], [1e-30, 1e-3, 1e30]):
        w, u = draw(shape, w_scale), draw(shape, u_scale, seed=1)
        parts = polar_decomposition(w, u, axes)
        got = [np.asarray(part, np.float64) for part in parts]
        w_norm, u_norm, radial, tangential = polar_in_float64(w, u, axes)
        np.testing.assert_allclose(got[0], w_norm, rtol=3e-7)
        np.testing.assert_allclose(got[1], u_norm, rtol=3e-7)
        np.testing.assert_allclose(got[3], tangential, rtol=1e-6)
        # A sum of terms of both signs is right relative to its largest terms.
        np.testing.assert_array_less(np.abs(got[2] - radial) / u_norm, 3e-7)


@pytest.mark.usefixtures("every_form")
@pytest.mark.slow
@pytest.mark.parametrize("tilt", [0.0, 1e-7, 1e-4, 1e-2, 1.0])
def test_polar_decomposition_of_almost_radial_updates(tilt):
    w = draw((100, 4), 1.0)
    normal = draw((100, 4), 1.0, seed=1)
    u = 0.3 * w + tilt * normal
    expected = polar_in_float64(w, u, (0,))
    measured = polar_decomposition(w, u, axes=(0,))[3]
    # The error of u - r w/|w| is that of rounding u, whatever is left of it.
    assert np.max(np.abs(measured - expected[3]) / expected[1]) < 2e-7


def test_polar_decomposition_derivative_against_finite_differences():
    with jax.enable_x64(True):
        w, u = (jnp.asarray(draw((5, 2), 1.0, seed), jnp.float64) for seed in (0, 1))
        w_dot, u_dot = (
            jnp.asarray(draw((5, 2), 1.0, seed), w.dtype) for seed in (2, 3)
        )
        _, slopes = jax.jvp(
            lambda w, u: polar_decomposition(w, u, (0,)), (w, u), (w_dot, u_dot)
        )
        h = 1e-6
        ahead = polar_in_float64(w + h * w_dot, u + h * u_dot, (0,))
        behind = polar_in_float64(w - h * w_dot, u - h * u_dot, (0,))
        for slope, a, b in zip(slopes, ahead, behind, strict=True):
            np.testing.assert_allclose(slope, (a - b) / (2 * h), rtol=1e-7)


@pytest.mark.usefixtures("every_form")
@pytest.mark.slow
@pytest.mark.parametrize(("w_scale", "u_scale"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_polar_decomposition_is_finite_at_zero(w_scale, u_scale):
    w, u = draw((4, 3), w_scale), draw((4, 3), u_scale, seed=1)

    def total(w, u):
        return sum(jnp.sum(part) for part in polar_decomposition(w, u, (0,)))

    for function in (total, jax.grad(total), jax.grad(total, argnums=1)):
        assert np.all(np.isfinite(function(w, u)))
        assert np.all(np.isfinite(jax.vmap(function)(w[None], u[None])))


def usual_and(unusual):
    """Weights and updates of four arrays; the second may be unusual."""
    shapes = (80, 3), (80, 3), (80, 3), (40, 6)
    ws = [draw(shape, 1.0, seed) for seed, shape in enumerate(shapes)]
    us = [draw(shape, 1e-3, seed) for seed, shape in enumerate(shapes, 4)]
    return ws, [us[0], unusual(ws[1], us[1]), *us[2:]]


UNUSUAL = {
    "large": lambda w, u: 1e30 * u,
    "small": lambda w, u: 1e-30 * u,
    "almost radial": lambda w, u: w + u,
    "zero": lambda w, u: 0 * u,
}


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("last", UNUSUAL)
def test_one_array_out_of_range_costs_no_digit_of_the_others(last):
    ws, us = usual_and(UNUSUAL[last])
    for w, u, angle in zip(ws, us, normax.angular_update(ws, us), strict=True):
        w_norm, _, radial, tangential = polar_in_float64(w, u, (0,))
        expected = np.arctan2(tangential, w_norm + radial)[0]
        np.testing.assert_allclose(angle, expected, rtol=1e-6, atol=2e-7)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_usual_updates_take_no_careful_pass(monkeypatch):
    monkeypatch.setattr(
        norms, "_rescaled_polar", lambda w, u, axes: [jnp.nan * w[:1]] * 4
    )
    measured = normax.angular_update(*usual_and(lambda w, u: u))
    assert all(np.all(np.isfinite(angle)) for angle in measured)
    for last in UNUSUAL.values():
        measured = normax.angular_update(*usual_and(last))
        assert all(np.all(np.isnan(angle)) for angle in measured)


def projected_update(w, u):
    tx = normax.project_unit_norm()
    return tx.update([w, u], tx.init([w, w]), [w, w])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [normax.angular_update, normax.relative_update, projected_update]
)
def test_no_nan_arises_inside(function):
    w = draw((5, 3), 1.0)
    updates = jnp.stack([draw((5, 3), 1.0, 1), w, -w, 0 * w])
    with jax.debug_nans(True), jax.disable_jit():
        for update in updates:
            function(w, update)
    checked = checkify.checkify(
        jax.vmap(function, in_axes=(None, 0)), errors=checkify.float_checks
    )
    error, _ = jax.jit(checked)(w, updates)
    error.throw()


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("spec", [P(None, "x", "y"), P(None, None, "y"), P("y", "x")])
def test_batches_on_an_explicit_mesh(spec):
    # Of a condition for each of a batch JAX makes a `select`, whose cases must be
    # sharded alike: there must be one condition.
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), (AxisType.Explicit,) * 2, devices=jax.devices()[:8]
    )
    w, u = (draw((2, 8, 4), 1.0, seed) for seed in range(2))
    w = w.at[0].multiply(1e-30)  # repeated with care

    def measures(w, u):
        norm, gradient = jax.value_and_grad(lambda w: normax.weight_norm(w).sum())(w)
        parts = polar_decomposition(w, u, (0,))
        updates, _ = normax.project_unit_norm().update(u, optax.EmptyState(), w)
        return norm, gradient, parts, normax.angular_update(w, u), updates

    expected = jax.vmap(measures)(w, u)
    with jax.set_mesh(mesh):
        batch = jax.device_put((w, u), jax.NamedSharding(mesh, spec))
        measured = jax.jit(jax.vmap(measures))(*batch)
    for x, y in zip(*map(jax.tree.leaves, (measured, expected)), strict=True):
        for one, wanted in zip(jax.device_get(x), np.asarray(y), strict=True):
            # A radial part is a sum, whose rounding is that of its largest terms.
            atol = 3e-7 * np.max(np.abs(wanted))
            np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=atol)


@pytest.mark.slow
@pytest.mark.devices(2)
def test_newton_of_tangent_steps_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:2])
    tx, w = normax.second_order.newton(axes="unit"), draw((4, 2), 1.0)

    def step(w):
        loss = lambda w: jnp.sum(jnp.cosh(w))  # noqa: E731
        return tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)[0]

    with jax.set_mesh(mesh):
        measured = jax.jit(step)(
            jax.device_put(w, jax.NamedSharding(mesh, P(None, "x")))
        )
    np.testing.assert_allclose(jax.device_get(measured), step(w), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-34, 1e-20, 1.0, 1e20, 1e36])
def test_a_hypotenuse_is_in_the_range_of_its_sides(size):
    sides = [draw((50,), size, seed) for seed in range(4)]
    expected = np.sqrt(sum(np.asarray(side, float) ** 2 for side in sides))
    np.testing.assert_allclose(hypotenuse(*sides), expected, rtol=1e-6)
    # Its derivative by a side is the side over it.
    slopes = jax.grad(lambda x: hypotenuse(x, *sides[1:]).sum())(sides[0])
    expected = np.asarray(sides[0], float) / expected
    np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-7)


def test_a_hypotenuse_of_zeros_has_no_slope_and_nan_is_kept():
    value, slope = jax.value_and_grad(lambda x: hypotenuse(x, 0.0))(0.0)
    assert value == slope == 0
    assert jnp.isnan(hypotenuse(jnp.nan, 1.0))
    assert jax.grad(square_root)(0.0) == 0 and jnp.isnan(square_root(jnp.nan))
