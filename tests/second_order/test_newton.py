"""Newton's method: brute force in float64, scales, units, saddles, weight decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]
RNG = np.random.default_rng(0)
FACTOR, TARGET = RNG.normal(size=(7, 7)), RNG.normal(size=7)
INPUTS = RNG.normal(size=(40, 6))
BEND = np.diag([-30.0, 0, 5, -1, 0, 0, 2])
AXES = {"hidden": "unit", "head": "none"}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(shape, seed=0, dtype=jnp.float64):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def trajectory(tx, params, loss, steps):
    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(body, (params, tx.init(params)), None, steps)[1]


@functools.partial(jax.jit, static_argnames=("loss", "steps", "saddle_free", "spheres"))
def newton(
    loss, params, rate=1.0, damping=0.0, decay=0.0, rtol=None, *, steps=1, **static
):
    """Weights after each of `steps` steps; the numbers are traced."""
    axes = AXES if static.pop("spheres", False) else "none"
    tx = normax.second_order.newton(
        rate, damping, decay, axes=axes, rtol=rtol, **static
    )
    return trajectory(tx, params, loss, steps)


def one_step(*args, **kwargs):
    return jax.tree.map(lambda x: np.asarray(x[0]), newton(*args, **kwargs))


def quadratic(params):
    w, _ = ravel_pytree(params)
    matrix, target = (jnp.asarray(x, w.dtype) for x in (FACTOR @ FACTOR.T, TARGET))
    return jnp.vdot(w, matrix @ w + w) / 2 - jnp.vdot(target, w)


def quartic(w):
    """Its Hessian is positive, but for the part of `BEND`."""
    residual = jnp.asarray(FACTOR) @ w - TARGET
    return jnp.sum(residual**4) / 4 + w @ jnp.asarray(BEND) @ w / 2


def derivatives_of_quartic(w):
    residual = FACTOR @ w - TARGET
    gradient = FACTOR.T @ residual**3 + BEND @ w
    return gradient, 3 * (FACTOR.T * residual**2) @ FACTOR + BEND


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_one_step_solves_a_quadratic(dtype):
    params = {"a": draw((2, 3), dtype=dtype), "b": draw((1,), dtype=dtype)}
    for decay in (0.0, 0.7):
        after = one_step(quadratic, params, decay=decay)
        matrix = FACTOR @ FACTOR.T + (1 + decay) * np.eye(7)
        tolerance = 2e-5 if dtype == jnp.float32 else 1e-12
        np.testing.assert_allclose(
            ravel_pytree(after)[0], np.linalg.solve(matrix, TARGET), rtol=tolerance
        )


@pytest.mark.parametrize("saddle_free", [False, True])
def test_step_against_numpy(saddle_free):
    w = draw(7)
    for damping, decay in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)):
        g, h = derivatives_of_quartic(np.asarray(w))
        e, v = np.linalg.eigh(h + decay * np.eye(7))
        assert e[0] < 0 < e[-1]
        h = v @ np.diag(np.abs(e) if saddle_free else e) @ v.T
        change = np.linalg.solve(h + damping * np.eye(7), g + decay * w)
        after = one_step(quartic, w, 0.5, damping, decay, saddle_free=saddle_free)
        np.testing.assert_allclose(after, w - 0.5 * change, rtol=1e-9)


@pytest.mark.slow
def test_directions_without_curvature_do_not_move():
    thin = FACTOR[:4]  # a minimum in every point of a plane

    def loss(w):
        return jnp.sum((jnp.asarray(thin) @ w - TARGET[:4]) ** 2) / 2

    w = draw(7)
    for saddle_free in (False, True):
        after = one_step(loss, w, saddle_free=saddle_free)
        np.testing.assert_allclose(thin @ after, TARGET[:4], rtol=1e-9)
    shortest = w - np.linalg.pinv(thin) @ (thin @ w - TARGET[:4])
    np.testing.assert_allclose(after, shortest, rtol=1e-9)
    np.testing.assert_array_equal(one_step(jnp.sum, w), w)
    slides = one_step(jnp.sum, w, 0.1, damping=2.0)
    np.testing.assert_allclose(slides, w - 0.1 / 2)


def test_rtol_says_what_is_no_curvature():
    def loss(w):
        return ((w[0] + w[1]) ** 2 + 1e-3 * (w[0] - w[1]) ** 2) / 2

    for rtol, expected in ((None, [0, 0]), (1e-4, [0, 0]), (1e-2, [1, -1])):
        after = one_step(loss, jnp.array([2.0, 0.0]), rtol=rtol)
        np.testing.assert_allclose(after, expected, atol=1e-12)


def test_little_curvature_beside_large_is_no_rounding():
    """Newton takes parameters in any units, in float32 too."""

    def loss(w):
        unit = w * jnp.array([1e6, 1.0, 1e-6], w.dtype)
        return jnp.sum((unit - 1) ** 2) + (unit[0] - unit[2]) ** 2

    after = one_step(loss, jnp.zeros(3, jnp.float32))
    np.testing.assert_allclose(after, [1e-6, 1.0, 1e6], rtol=1e-4)


def test_saddle_free_leaves_saddles():
    def loss(w):
        return w[0] ** 2 - w[1] ** 2 + w[1] ** 4

    start = jnp.array([1.0, 0.1])
    to_saddle = newton(loss, start, steps=10)[-1]
    np.testing.assert_allclose(to_saddle, 0, atol=1e-9)
    to_minimum = newton(loss, start, steps=10, saddle_free=True)[-1]
    np.testing.assert_allclose(to_minimum, [0, 0.5**0.5], atol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_the_one_given():
    """Decay that is added before changes the gradient and not the Hessian."""
    w, decay = draw(7), 0.3
    chain = optax.chain(
        optax.add_decayed_weights(decay), normax.second_order.newton(0.5, decay)
    )
    np.testing.assert_allclose(
        trajectory(chain, w, quartic, 1)[0],
        one_step(quartic, w, 0.5, decay=decay),
        rtol=1e-9,
    )


def test_an_array_without_a_gradient_is_a_constant():
    params = {"a": draw((2, 3)), "b": draw((1,))}

    @jax.jit
    def update(params):
        tx = normax.second_order.newton()
        grads = jax.grad(quadratic)(params) | {"b": None}
        return tx.update(grads, tx.init(params), params, value_fn=quadratic)[0]

    updates = update(params)
    matrix = FACTOR @ FACTOR.T + np.eye(7)
    rest = TARGET[:6] - matrix[:6, 6:] @ params["b"]
    assert updates["b"] is None
    np.testing.assert_allclose(
        np.ravel(params["a"] + updates["a"]), np.linalg.solve(matrix[:6, :6], rest)
    )


def outputs(params):
    z = jnp.asarray(INPUTS, params["hidden"].dtype) @ params["hidden"]
    z = (z - jnp.mean(z, 0, keepdims=True)) / jnp.std(z, 0, keepdims=True)
    return jnp.tanh(z) @ params["head"]


def teacher():
    return {"hidden": draw((6, 3), 1), "head": draw((3, 2), 2)}


def batch_norm_loss(params):
    """Invariant to the scale of every column of `hidden`; 0 at the teacher."""
    labels = outputs(teacher()).astype(params["head"].dtype)
    return jnp.mean((outputs(params) - labels) ** 2)


def network(scale=1.0, dtype=jnp.float64):
    """Weights near a minimum, so that trajectories are not chaotic."""
    params = jax.tree.map(lambda w: w + 0.02 * draw(w.shape, 3), teacher())
    params["hidden"] *= scale
    return jax.tree.map(lambda w: w.astype(dtype), params)


def distance_of_functions(one, other):
    """Largest difference, of the directions of `hidden` and of `head`."""
    hidden = (
        tree["hidden"] / jnp.linalg.norm(tree["hidden"], axis=-2, keepdims=True)
        for tree in (one, other)
    )
    pairs = (hidden, (one["head"], other["head"]))
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


def hidden_loss(w):
    return batch_norm_loss(teacher() | {"hidden": w})


@pytest.mark.slow
def test_newton_on_a_scale_invariant_loss_changes_no_function():
    """H w = -g, hence the step on L itself is w."""
    w = network()["hidden"]
    np.testing.assert_allclose(one_step(hidden_loss, w, 0.25), 1.25 * w, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("saddle_free", [False, True])
def test_step_on_spheres_against_numpy(saddle_free):
    params = network(scale=1.7)
    flat, unravel = ravel_pytree(params)  # head, then hidden
    w = np.asarray(flat)

    @jax.jit
    def derivatives(flat):
        loss = jax.grad(lambda x: batch_norm_loss(unravel(x)))
        return loss(flat), jax.jacobian(loss)(flat)

    g, h = map(np.asarray, derivatives(flat))
    # A basis of what is orthogonal to the three columns.
    columns = np.zeros((3, 24))
    for unit in range(3):
        columns[unit, 6:].reshape(6, 3)[:, unit] = params["hidden"][:, unit]
    basis = np.linalg.svd(columns)[2][3:].T
    for damping, decay in ((0.0, 0.0), (0.05, 0.0), (0.0, 0.2), (0.05, 0.2)):
        e, v = np.linalg.eigh(basis.T @ h @ basis + decay * np.eye(21))
        e = (np.abs(e) if saddle_free else e) + damping
        tangential = basis @ v @ (v.T @ basis.T @ (g + decay * w) / e)
        radial = np.sum(columns, 0) * decay / ((decay + damping) or 1)
        arguments = (batch_norm_loss, params, 0.5, damping, decay)
        after = one_step(*arguments, saddle_free=saddle_free, spheres=True)
        expected = w - 0.5 * (tangential + radial)
        np.testing.assert_allclose(ravel_pytree(after)[0], expected, rtol=1e-8)


@pytest.mark.slow
def test_the_scale_of_the_weights_does_not_fool_newton():
    def distance(tx, alpha=7.0, dtype=jnp.float64):
        run = jax.jit(lambda params: trajectory(tx, params, batch_norm_loss, 10))
        return distance_of_functions(run(network(1, dtype)), run(network(alpha, dtype)))

    make = normax.UPDATE_RULES["newton"].make
    assert distance(make(0.2, axes=AXES)) < 1e-9
    assert distance(make(0.2, axes=AXES), 700.0, jnp.float32) < 1e-3
    for name in ("sgd", "momentum", "rmsprop", "adam"):
        assert distance(normax.UPDATE_RULES[name].make(0.1)) > 0.01
    assert distance(optax.lbfgs(0.2, linesearch=None)) > 0.01


@pytest.mark.slow
def test_effective_learning_rate_visits_the_same_functions():
    """L_lambda(alpha w) = L_{lambda alpha^2}(w), and the step has the units of w."""
    rule, decay, w = normax.UPDATE_RULES["newton"], 0.3, network()["hidden"]

    @jax.jit
    def run(w, rate, decay):
        return trajectory(rule.make(rate, decay, axes="unit"), w, hidden_loss, 8)

    for alpha in (1e-2, 7.0):
        rate = rule.effective_learning_rate(0.1, alpha)
        original = run(alpha * w, 0.1, decay)
        effective = run(w, rate, decay * alpha**2)
        np.testing.assert_allclose(original, alpha * effective, rtol=1e-6)


@pytest.mark.slow
def test_weight_decay_drives_norms_to_zero():
    """Table 1, last row: by 1 - eta at every step, whatever the decay."""

    def shrinkage(loss, params, decay, spheres):
        w = newton(loss, params, 0.1, 0.0, decay, steps=100, spheres=spheres)
        size = jnp.linalg.norm(w["hidden"] if spheres else w, axis=1)
        assert jnp.max(size[-1]) < 1e-3
        return size[51:] / size[50:-1]

    for decay in (1e-4, 1e-2):
        measured = shrinkage(batch_norm_loss, network(), decay, True)
        np.testing.assert_allclose(measured, 0.9, rtol=1e-3)
    # Without `axes` only from near a minimum.
    measured = shrinkage(hidden_loss, network()["hidden"], 1e-2, False)
    np.testing.assert_allclose(measured, 0.9, rtol=1e-3)


def ravine(w):
    """Smooth and convex, with coupled coordinates and no quadratic."""
    x, y = w[0] - 0.5, w[1] + 0.3
    return jnp.log(jnp.cosh(x + 0.6 * y)) + 2 * y**2 + 0.3 * x**2


def dependence_on_units(tx, warm=None):
    """Change of the path if the first coordinate is measured in units of 1/10."""
    units = jnp.array([10.0, 1.0])

    @jax.jit
    @jax.vmap
    def path(units):
        def loss(w):
            return ravine(w / units)

        def body(carry, _):
            w, state = carry
            value, grads = jax.value_and_grad(loss)(w)
            extra = dict(value=value, grad=grads, value_fn=loss)
            updates, state = optax.with_extra_args_support(tx).update(
                grads, state, w, **extra
            )
            return (w + updates, state), (w + updates) / units

        state = tx.init(jnp.ones(2) * units)
        if warm is not None:
            state = warm(state, units)
        return jax.lax.scan(body, (jnp.ones(2) * units, state), None, 4)[1]

    one, other = path(jnp.stack([jnp.ones(2), units]))
    return float(jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(one - 1)))


@pytest.mark.slow
def test_units_of_measurement():
    """The lecture's argument: a method is consistent if units do not matter to it."""
    rules = {
        name: rule.make(0.05)
        for name, rule in normax.UPDATE_RULES.items()
        if name != "normalized_sgd"  # it concerns arrays of rank two
    }
    rules["lbfgs"] = optax.lbfgs()
    rules["newton"] = normax.second_order.newton(0.5)
    rules["damped"] = normax.second_order.newton(0.5, damping=0.1)
    rules["saddle_free"] = normax.second_order.newton(0.5, saddle_free=True)
    free = functools.partial(normax.second_order.hessian_free, 0.5)
    rules["hessian_free"] = free(damping=0.0)
    rules["one_iteration"] = free(damping=0.0, cg_iterations=1)
    rules["damped_free"] = free(damping=0.1)
    measured = {name: dependence_on_units(tx) for name, tx in rules.items()}
    assert measured.pop("newton") < 1e-12
    # Convex: all eigenvalues are their own absolute values.
    assert measured.pop("saddle_free") < 1e-12
    # It takes two conjugate gradient iterations to converge in two dimensions.
    assert measured.pop("hessian_free") < 1e-9
    assert min(measured.values()) > 0.05


@pytest.mark.slow
def test_adadelta_is_consistent_once_its_averages_are():
    """As epsilon goes to 0, from averages with units; the zeros of `init` have none."""

    def warm(state, units):
        squares, steps = 0.4 / units**2, 0.01 * units**2
        return optax.tree.set(state, e_g=squares, e_x=steps)

    make = normax.UPDATE_RULES["adadelta"].make
    assert dependence_on_units(make(1.0, eps=1e-30), warm) < 1e-12
    assert dependence_on_units(make(1.0, eps=1e-3), warm) > 0.01
    assert dependence_on_units(make(1.0, eps=1e-30)) > 0.5


@pytest.mark.slow
def test_hessian_free_is_consistent_before_it_converges():
    """If preconditioned by the diagonal of the curvature itself."""

    def preconditioned(power):
        tx = normax.second_order.hessian_free(
            0.5, damping=0.0, cg_iterations=1, preconditioner_power=power
        )

        def update(grads, state, w, value_fn, **extra):
            diagonal = jnp.diag(jax.hessian(value_fn)(w))
            return tx.update(
                grads, state, w, value_fn=value_fn, curvature_diagonal=diagonal, **extra
            )

        return optax.GradientTransformationExtraArgs(tx.init, update)

    assert dependence_on_units(preconditioned(1.0)) < 1e-12
    assert dependence_on_units(preconditioned(0.75)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("saddle_free", [False, True])
def test_derivative_of_the_step(saddle_free):
    """Also where eigenvalues meet, are negative, and vanish."""

    def moved(x):
        (a, b, c, d), w, damping = x[:4], x[4:9], x[9]

        def loss(w):
            squares = a * w[0] ** 2 + b * w[1] ** 2 - 2 * w[2] ** 2
            return squares / 2 + c * w[0] * w[1] + d * w[0] * w[2]

        tx = normax.second_order.newton(0.5, damping, saddle_free=saddle_free)
        g = jax.grad(loss)(w) + 1
        return tx.update(g, tx.init(w), w, value_fn=loss)[0]

    x = jnp.array([3.0, 3.0, 0.0, 0.0, 0.3, -0.2, 0.5, 1.0, 2.0, 0.1])

    @jax.jit
    def difference(d):
        return (moved(x + d) - moved(x - d)) / 2e-5

    expected = np.stack([difference(d) for d in 1e-5 * np.eye(10)], 1)
    jacobian = jax.jit(jax.jacfwd(moved))(x)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6, atol=1e-6)


def test_what_is_not_finite_shows():
    w = draw(7)
    bad = w.at[2].set(jnp.nan)
    assert np.all(np.isnan(one_step(quartic, bad)))
    tx = normax.second_order.newton()
    update = jax.jit(lambda g: tx.update(g, tx.init(w), w, value_fn=quartic)[0])
    assert np.any(np.isnan(update(bad))) and not np.any(np.isnan(update(w)))


def test_more_parameters_than_fit_raise():
    params = {"a": jnp.ones((30, 30)), "b": jnp.ones(101)}
    tx = normax.second_order.newton(max_parameters=1000)
    fix = r"raise max_parameters .* use normax\.second_order\.hessian_free"
    message = rf"at most max_parameters=1000 .* there are 1001; {fix}"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init({"b": params["b"]}), params, value_fn=quadratic)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -0.1}, "damping must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"rtol": -1.0}, "rtol must be at least 0"),
        ({"axes": "units"}, "must be one of"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        normax.second_order.newton(**arguments)
    tx, w = normax.second_order.newton(), jnp.ones(3)
    with pytest.raises(ValueError, match="`value_fn` is None; call update"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="lie within the array's rank"):
        normax.second_order.newton(axes=(3,)).init(jnp.ones((2, 2)))
