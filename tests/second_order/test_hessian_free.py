"""Hessian-free optimization against matrices: NumPy, Newton, scales, memory."""

import functools
import itertools

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
INPUTS, LABELS = RNG.normal(size=(40, 6)), RNG.integers(0, 3, 40)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(shape, seed=0, dtype=jnp.float64):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def trajectory(tx, params, loss, steps=1, **extra):
    """Return weights and states after each step."""

    def body(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return jax.lax.scan(body, (params, tx.init(params)), None, steps)[1]


def first(tree):
    return jax.tree.map(lambda x: np.asarray(x[0]), tree)


@functools.partial(jax.jit, static_argnames=("loss", "steps", "functions"))
def solve(loss, params, functions=(None, None), steps=1, diagonal=None, **numbers):
    """Run with conjugate gradients that converge, unless told otherwise."""
    tx = normax.second_order.hessian_free(**({"cg_tolerance": 0.0} | numbers))
    extra = dict(zip(("outputs_fn", "loss_of_outputs"), functions, strict=True))
    return trajectory(tx, params, loss, steps, curvature_diagonal=diagonal, **extra)


def quadratic(params):
    w, _ = ravel_pytree(params)
    matrix, target = (jnp.asarray(x, w.dtype) for x in (FACTOR @ FACTOR.T, TARGET))
    return jnp.vdot(w, matrix @ w + w) / 2 - jnp.vdot(target, w)


def affine(params):
    w, _ = ravel_pytree(params)
    matrix = np.linalg.cholesky(FACTOR @ FACTOR.T + np.eye(7)).T
    offset = np.linalg.solve(matrix.T, TARGET)
    return jnp.asarray(matrix, w.dtype) @ w - jnp.asarray(offset, w.dtype)


def half_square(y):
    return jnp.sum(y**2) / 2


@pytest.mark.parametrize("functions", [(None, None), (affine, half_square)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_one_step_solves_a_quadratic(dtype, functions):
    params = {"a": draw((2, 3), dtype=dtype), "b": draw((1,), dtype=dtype)}
    for decay in (0.0, 0.7):
        after, state = first(
            solve(quadratic, params, functions, damping=0.0, weight_decay=decay)
        )
        matrix = FACTOR @ FACTOR.T + (1 + decay) * np.eye(7)
        tolerance = 1e-4 if dtype == jnp.float32 else 1e-11
        np.testing.assert_allclose(
            ravel_pytree(after)[0], np.linalg.solve(matrix, TARGET), rtol=tolerance
        )
        np.testing.assert_allclose(state.reduction_ratio, 1, rtol=tolerance)
        assert state.damping == 0 and state.iterations <= 12


def quartic(w):
    residual = jnp.asarray(FACTOR) @ w - TARGET
    return jnp.sum(residual**4) / 4 + w @ w / 2


@pytest.mark.slow
def test_direction_is_newtons():
    w = np.asarray(draw(7))
    residual = FACTOR @ w - TARGET
    g = FACTOR.T @ residual**3 + w
    h = 3 * (FACTOR.T * residual**2) @ FACTOR + np.eye(7)

    @jax.jit
    def newton(w, damping, decay):
        return trajectory(normax.second_order.newton(0.5, damping, decay), w, quartic)[
            0
        ][0]

    for damping, decay in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)):
        numbers = dict(damping=damping, weight_decay=decay)
        after, state = first(solve(quartic, w, learning_rate=0.5, **numbers))
        shift = (damping + decay) * np.eye(7)
        expected = np.linalg.solve(h + shift, -g - decay * w)
        np.testing.assert_allclose(state.direction, expected, rtol=1e-9)
        np.testing.assert_allclose(after, newton(w, damping, decay), rtol=1e-9)


def logits(params):
    return jnp.tanh(jnp.asarray(INPUTS) @ params["hidden"]) @ params["head"]


def cross_entropy(y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(y, LABELS))


def classifier_loss(params):
    return cross_entropy(logits(params))


def classifier():
    return {"hidden": draw((6, 3), 1), "head": draw((3, 3), 2)}


def gauss_newton_matrix(outputs_fn, loss_of_outputs, flat):
    """J^T H J of all outputs, dense."""

    @jax.jit
    def factors(flat):
        y, unravel = ravel_pytree(outputs_fn(flat))
        jacobian = jax.jacobian(lambda x: ravel_pytree(outputs_fn(x))[0])(flat)
        return jacobian, jax.hessian(lambda y: loss_of_outputs(unravel(y)))(y)

    jacobian, hessian = map(np.asarray, factors(flat))
    return jacobian.T @ hessian @ jacobian


@pytest.mark.slow
def test_gauss_newton_products_against_the_dense_matrix():
    flat, unravel = ravel_pytree(classifier())
    matrix = gauss_newton_matrix(lambda x: logits(unravel(x)), cross_entropy, flat)
    g = ravel_pytree(jax.jit(jax.grad(classifier_loss))(classifier()))[0]
    assert np.linalg.matrix_rank(matrix) < 27  # logits are not unique
    for damping in (1e-2, 1.0):
        _, state = solve(
            classifier_loss,
            classifier(),
            (logits, cross_entropy),
            damping=damping,
            cg_iterations=200,
        )
        direction = ravel_pytree(first(state).direction)[0]
        expected = np.linalg.solve(matrix + damping * np.eye(27), -g)
        np.testing.assert_allclose(direction, expected, rtol=1e-7, atol=1e-12)


WIDE = np.random.default_rng(3).normal(size=(60, 40)) * np.geomspace(0.3, 1, 40)
GOAL = np.random.default_rng(4).normal(size=60)


def bent(w):
    return jnp.sin(jnp.asarray(WIDE) @ w)


def loss_of_bent(y):
    return jnp.sum((y - GOAL) ** 4 / 4 + (y - GOAL) ** 2 / 2)


def bent_loss(w):
    return loss_of_bent(bent(w))


def numpy_hessian_free(w, steps, eta, mu, decay, tolerance, warm, power, diagonal):
    """Hessian-free optimization, written down with matrices."""

    def value(w):
        y = np.sin(WIDE @ w) - GOAL
        return np.sum(y**4 / 4 + y**2 / 2) + decay / 2 * w @ w

    p = np.zeros_like(w)
    for _ in range(steps):
        y = np.sin(WIDE @ w)
        jacobian = np.cos(WIDE @ w)[:, None] * WIDE
        g = jacobian.T @ ((y - GOAL) ** 3 + (y - GOAL)) + decay * w
        hessian = 3 * (y - GOAL) ** 2 + 1
        b = (jacobian.T * hessian) @ jacobian + decay * np.eye(len(w))
        a = b + mu * np.eye(len(w))
        m = (diagonal + decay + mu) ** power

        def model(p, a=a, g=g):
            return p @ a @ p / 2 + g @ p

        p = warm * p
        if model(p) > 0:
            p = np.zeros_like(w)
        r = -g - a @ p
        d, values = r / m, [model(p)]
        while True:
            square = r @ (r / m)
            step = square / (d @ a @ d)
            p, r = p + step * d, r - step * a @ d
            d = r / m + (r @ (r / m)) / square * d
            values.append(model(p))
            i = len(values) - 1
            k = max(10, i // 10)
            if i > k and values[i] < 0:
                if (values[i] - values[i - k]) / values[i] < k * tolerance:
                    break
        s = eta * p
        change = value(w + s) - value(w)
        rho = change / (g @ s + s @ b @ s / 2)
        mu *= 1.5 if rho < 0.25 else 2 / 3 if rho > 0.75 else 1
        part = 1.0
        while value(w + part * s) > value(w) + 0.01 * part * g @ s:
            part /= 2
        w = w + part * s
        yield w, p, rho, mu, len(values) - 1, part


@pytest.mark.parametrize(
    "numbers",
    [
        dict(eta=1.0, mu=5.0, decay=0.0, warm=0.95, power=0.0),
        dict(eta=0.7, mu=10.0, decay=0.02, warm=0.7, power=0.75),
        dict(eta=1.0, mu=5.0, decay=0.0, warm=2.5, power=0.75),
    ],
)
def test_every_number_of_every_step_against_numpy(numbers):
    w, diagonal = np.asarray(draw(40)), np.sum(WIDE**2, 0)
    tolerance, steps = 5e-3, 12
    names = dict(
        eta="learning_rate",
        mu="damping",
        decay="weight_decay",
        warm="warm_start",
        power="preconditioner_power",
    )
    after, state = solve(
        bent_loss,
        w,
        (bent, loss_of_bent),
        steps,
        diagonal,
        cg_tolerance=tolerance,
        **{names[key]: number for key, number in numbers.items()},
    )
    expected = list(
        numpy_hessian_free(w, steps, tolerance=tolerance, diagonal=diagonal, **numbers)
    )
    *columns, parts = (np.stack(column) for column in zip(*expected, strict=True))
    measured = (
        after,
        state.direction,
        state.reduction_ratio,
        state.damping,
        state.iterations,
    )
    assert min(parts) < 1 == max(parts)
    assert min(np.diff(columns[3])) < 0 < max(np.diff(columns[3]))
    for ours, theirs in zip(measured, columns, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.count, np.arange(1, steps + 1))


@pytest.mark.slow
def test_functions_given_once_or_at_every_step():
    """Those of the step go first: a batch is what they close over."""
    once = normax.second_order.hessian_free(1.0, 0.1, 0.0, logits, cross_entropy)
    params, given = classifier(), dict(outputs_fn=logits, loss_of_outputs=cross_entropy)

    @jax.jit
    def directions():
        runs = [
            trajectory(once, params, classifier_loss),
            trajectory(
                normax.second_order.hessian_free(1.0, 0.1),
                params,
                classifier_loss,
                **given,
            ),
            trajectory(
                normax.second_order.hessian_free(1.0, 0.1), params, classifier_loss
            ),
            trajectory(once, params, classifier_loss, outputs_fn=affine_logits),
        ]
        return [ravel_pytree(state.direction)[0] for _, state in runs]

    one, same, hessian, other = directions()
    np.testing.assert_array_equal(one, same)
    for different in (hessian, other):
        assert jnp.max(jnp.abs(different - one)) > 0.1 * jnp.max(jnp.abs(one))


def affine_logits(params):
    return jnp.asarray(INPUTS) @ (params["hidden"] @ params["head"])


@pytest.mark.slow
def test_mini_batches():
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(2000, 6))
    labels = np.argmax(np.tanh(inputs @ rng.normal(size=(6, 3))), 1)
    tx = normax.second_order.hessian_free(1.0, 1.0)

    @jax.jit
    def train(params):
        def step(carry, index):
            params, state = carry
            x, y = jnp.asarray(inputs)[index], jnp.asarray(labels)[index]

            def outputs_fn(params):
                return jnp.tanh(x @ params["hidden"]) @ params["head"]

            def loss_of_outputs(z):
                z = optax.softmax_cross_entropy_with_integer_labels(z, y)
                return jnp.mean(z)

            def loss(params):
                return loss_of_outputs(outputs_fn(params))

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(
                grads,
                state,
                params,
                value_fn=loss,
                outputs_fn=outputs_fn,
                loss_of_outputs=loss_of_outputs,
            )
            return (optax.apply_updates(params, updates), state), value

        batches = rng.permutation(2000).reshape(20, 100)
        return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

    losses = train(classifier())
    assert losses[0] > 1 and np.mean(losses[-5:]) < 0.25


def saddle(w):
    return w[0] ** 2 - w[1] ** 2 + w[1] ** 4


@pytest.mark.slow
def test_negative_curvature_is_followed_by_its_absolute_value():
    w, g = np.array([0.0, 0.1]), -0.196
    after, state = first(solve(saddle, jnp.asarray(w), damping=0.0))
    np.testing.assert_allclose(state.direction, [0, -g / 1.88], rtol=1e-12)
    assert state.iterations == 1
    # The step ends there: what is orthogonal to the direction is left.
    w = np.array([1.0, 0.1])
    _, state = first(solve(saddle, jnp.asarray(w), damping=0.0))
    g, h = np.array([2.0, -0.196]), np.diag([2.0, -1.88])
    x = g @ g / (g @ h @ g) * -g
    r = -g - h @ x
    d = r - g * (r @ r) / (g @ g)
    assert d @ h @ d < 0
    x = x + r @ r / abs(d @ h @ d) * d
    np.testing.assert_allclose(state.direction, x, rtol=1e-12)
    after, state = solve(saddle, jnp.asarray(w), steps=30, damping=0.1)
    np.testing.assert_allclose(after[-1], [0, 0.5**0.5], atol=1e-5)


@pytest.mark.slow
def test_directions_without_curvature_do_not_move():
    w = draw(7)
    np.testing.assert_array_equal(solve(jnp.sum, w, damping=0.0)[0][0], w)
    slides = solve(jnp.sum, w, damping=2.0, learning_rate=0.1)[0][0]
    np.testing.assert_allclose(slides, w - 0.1 / 2)
    thin = FACTOR[:4]

    def loss(w):
        return jnp.sum(
            (jnp.asarray(thin, w.dtype) @ w - TARGET[:4].astype(w.dtype)) ** 2
        )

    for dtype, tolerance in ((jnp.float32, 1e-3), (jnp.float64, 1e-9)):
        start = w.astype(dtype)
        shortest = w - np.linalg.pinv(thin) @ (thin @ w - TARGET[:4])
        after, _ = solve(loss, start, damping=0.0, cg_iterations=100)
        np.testing.assert_allclose(after[0], shortest, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_slope_without_curvature_is_not_followed_for_ever(dtype):
    """Of 7 dimensions, the loss curves in 4 and falls in one of the others."""
    thin, null = FACTOR[:4], np.linalg.svd(FACTOR[:4])[2][-1]

    def loss(w):
        bowl = jnp.sum((jnp.asarray(thin, dtype) @ w) ** 2)
        return bowl + 1e-2 * jnp.vdot(jnp.asarray(null, dtype), w)

    after, state = solve(loss, draw(7, dtype=dtype), damping=0.0)
    assert jnp.max(jnp.abs(state.direction)) < 100
    np.testing.assert_allclose(thin @ after[0], 0, atol=0.5)


@pytest.mark.slow
def test_at_the_minimum_nothing_moves():
    for dtype in (jnp.float32, jnp.float64):
        w, state = solve(half_square, jnp.zeros(7, dtype), steps=3, damping=0.0)
        np.testing.assert_array_equal(w, 0)
        np.testing.assert_array_equal(state.reduction_ratio, 1)


def test_what_rounding_hides_is_no_failure():
    """Steps go on, and damping stays, where the loss can show no decrease."""

    def loss(w):
        return 1 + 1e-9 * half_square(w)

    w = draw(7, dtype=jnp.float32)
    after, state = solve(loss, w, steps=3, damping=1e-9, warm_start=0.0)
    np.testing.assert_allclose(after[-1], w / 8, rtol=1e-5)
    np.testing.assert_array_equal(state.reduction_ratio, 1)
    np.testing.assert_allclose(state.damping, 1e-9)


def network_outputs(params):
    """Outputs that are invariant to the scale of every column of `hidden`."""
    z = jnp.asarray(INPUTS) @ params["hidden"]
    z = (z - jnp.mean(z, 0, keepdims=True)) / jnp.std(z, 0, keepdims=True)
    return jnp.tanh(z) @ params["head"]


def squared_error(y):
    return jnp.mean((y - jnp.asarray(INPUTS[:, :3]) / 2) ** 2)


def network_loss(params):
    return squared_error(network_outputs(params))


def hidden_outputs(w):
    return network_outputs(classifier() | {"hidden": w})


def hidden_loss(w):
    return squared_error(hidden_outputs(w))


def direction_of(w):
    return w / jnp.linalg.norm(w, axis=-2, keepdims=True)


GAUSS_NEWTON = hidden_outputs, squared_error


@pytest.mark.slow
@pytest.mark.parametrize("functions", [GAUSS_NEWTON, (None, None)])
def test_effective_learning_rate_visits_the_same_functions(functions):
    """Converged or not, without damping; with it, not."""
    rule, w = normax.UPDATE_RULES["hessian_free"], classifier()["hidden"]

    def run(alpha, rate, decay, iterations, damping=0.0):
        numbers = dict(learning_rate=rate, weight_decay=decay, damping=damping)
        arguments = hidden_loss, alpha * w, functions, 8
        return solve(*arguments, cg_iterations=iterations, **numbers)[0]

    rate = rule.effective_learning_rate(0.3, 7.0)
    for iterations, decay in ((3, 0.0), (100, 0.0), (3, 0.3)):
        original = run(7.0, 0.3, decay, iterations)
        effective = run(1.0, rate, decay * 49, iterations)
        np.testing.assert_allclose(original, 7 * effective, rtol=1e-5)
    damped = [direction_of(run(alpha, rate, 0.0, 100, 0.1)) for alpha in (1.0, 7.0)]
    assert jnp.max(jnp.abs(damped[0] - damped[1])) > 0.01


@jax.jit
def regression(x, y, start, diagonal):
    """Return the state after a step on a loss that no length of `start` changes."""

    def outputs(w):
        return x @ (2 * w / jnp.linalg.norm(w))

    def loss_of_outputs(z):
        return jnp.mean((z - y) ** 2)

    return solve(
        lambda w: loss_of_outputs(outputs(w)),
        start,
        (outputs, loss_of_outputs),
        diagonal=diagonal,
        damping=0.0,
        cg_tolerance=5e-4,
        preconditioner_power=0.75,
    )[1]


@pytest.mark.slow
@pytest.mark.parametrize("preconditioned", [False, True])
def test_rounding_is_no_direction(preconditioned):
    """The step is that of the pseudo-inverse, whatever the scale of the weights.

    The loss does not depend on the length of w, so that the matrix has a null space;
    of the solutions, the smallest in the metric of the preconditioner is found.
    It takes conjugate gradients as many iterations as there are other directions; what
    is left of the residual then is rounding, with a part along w.
    """
    for dimension, seed in itertools.product((3, 4, 6), range(3)):
        rng = np.random.default_rng(seed)
        x, w = rng.normal(size=(50, dimension)), rng.normal(size=dimension)
        w /= np.linalg.norm(w)
        y = np.sin(x[:, 0]) + x[:, 1]

        tangent = np.eye(dimension) - np.outer(w, w)
        jacobian = 2 * x @ tangent
        gradient = 2 / 50 * jacobian.T @ (2 * x @ w - y)
        matrix = 2 / 50 * jacobian.T @ jacobian
        root = np.diag(np.diag(matrix) ** (-0.375 if preconditioned else 0))
        inverse = root @ np.linalg.pinv(root @ matrix @ root, rcond=1e-9) @ root
        expected = -inverse @ gradient

        for scale in (1e-15, 1e-9, 0.1, 1.0, 3.0, 1e4, 1e12, 1e15):
            start = (w * scale).astype(np.float32)
            diagonal = (np.diag(matrix) / scale**2).astype(np.float32)
            state = regression(
                *(a.astype(np.float32) for a in (x, y)),
                start,
                diagonal if preconditioned else None,
            )
            direction = first(state.direction).astype(np.float64) / scale
            error = np.linalg.norm(direction - expected) / np.linalg.norm(expected)
            assert error < 1e-3, (dimension, seed, scale)


@pytest.mark.slow
def test_scale_of_some_of_the_arrays():
    """For Gauss-Newton steps that converge, or are preconditioned by the diagonal."""

    def scaled(alpha):
        return classifier() | {"hidden": alpha * classifier()["hidden"]}

    flat, unravel = ravel_pytree(scaled(1.0))
    matrix = gauss_newton_matrix(
        lambda x: network_outputs(unravel(x)), squared_error, flat
    )

    def distance(**numbers):
        runs = []
        for alpha in (1.0, 7.0):
            diagonal = unravel(np.diag(matrix))
            diagonal["hidden"] /= alpha**2
            after, _ = solve(
                network_loss,
                scaled(alpha),
                (network_outputs, squared_error),
                diagonal=diagonal,
                **({"preconditioner_power": 0.0} | numbers),
            )
            runs.append((direction_of(after["hidden"]), after["head"]))
        return max(np.max(np.abs(a - b)) for a, b in zip(*runs, strict=True))

    undamped = functools.partial(distance, damping=0.0)
    assert undamped(cg_iterations=300) < 1e-6
    assert undamped(cg_iterations=3, preconditioner_power=1.0) < 1e-12
    assert undamped(cg_iterations=3, preconditioner_power=0.75) > 1e-3
    assert undamped(cg_iterations=3) > 1e-3
    assert distance(damping=0.1, cg_iterations=300) > 1e-3


@pytest.mark.slow
def test_weight_decay_drives_norms_to_zero():
    """Table 1, last row: by 1 - eta at every step, whatever the decay."""
    for decay in (1e-3, 1e-1):
        w, _ = solve(
            hidden_loss,
            classifier()["hidden"],
            GAUSS_NEWTON,
            learning_rate=0.1,
            damping=0.0,
            weight_decay=decay,
            steps=60,
        )
        square = jnp.sum(w**2, axis=1)
        assert np.all(square[-1] < 1e-4 * square[0])
        # Exactly so radially; what is tangential lengthens.
        radial = jnp.sum(w[1:] * w[:-1], axis=1) / square[:-1]
        np.testing.assert_allclose(radial, 0.9, rtol=1e-6)
    rule = normax.UPDATE_RULES["hessian_free"]
    assert rule.equilibrium_norm(0.1, decay) == 0


@pytest.mark.slow
def test_memory_is_a_multiple_of_the_parameters():
    """A matrix of 60,000 parameters would take 14 GB."""
    params = {"in": jnp.ones((300, 100), jnp.float32)}
    params["out"] = jnp.ones((100, 300), jnp.float32)

    def outputs_fn(params):
        return jnp.tanh(jnp.ones((4, 300), jnp.float32) @ params["in"]) @ params["out"]

    for functions in ((None, None), (outputs_fn, half_square)):
        tx = normax.second_order.hessian_free()
        extra = dict(zip(("outputs_fn", "loss_of_outputs"), functions, strict=True))

        def step(params, state, tx=tx, extra=extra):
            def loss(params):
                return half_square(outputs_fn(params) - 1)

            grads = jax.grad(loss)(params)
            return tx.update(grads, state, params, value_fn=loss, **extra)

        compiled = jax.jit(step).lower(params, tx.init(params)).compile()
        size = 4 * sum(x.size for x in params.values())
        assert compiled.memory_analysis().temp_size_in_bytes < 25 * size


@pytest.mark.slow
def test_constants():
    """An array without a gradient; one of integers; those under a mask."""
    params = {"a": draw((2, 3)), "b": draw((1,)), "count": jnp.arange(3)}

    def loss(params):
        return quadratic({"a": params["a"], "b": params["b"]})

    @jax.jit
    def update(params):
        tx = normax.second_order.hessian_free(damping=0.0, cg_tolerance=0.0)
        grads = jax.grad(loss, allow_int=True)(params) | {"b": None}
        updates, state = tx.update(grads, tx.init(params), params, value_fn=loss)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        return updates["a"], updates["b"], state.direction

    a, b, kept = update(params)
    matrix = FACTOR @ FACTOR.T + np.eye(7)
    rest = TARGET[:6] - matrix[:6, 6:] @ params["b"]
    expected = np.linalg.solve(matrix[:6, :6], rest)
    np.testing.assert_allclose(np.ravel(params["a"] + a), expected)
    assert b is None and kept["count"] is None
    np.testing.assert_array_equal(kept["b"], 0)

    tx = optax.masked(
        normax.second_order.hessian_free(damping=0.0), {"a": True, "b": False}
    )
    params = {"a": params["a"], "b": params["b"]}
    grads = jax.grad(quadratic)(params)

    def value_fn(left):
        return quadratic(params | {"a": left["a"]})

    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    np.testing.assert_allclose(np.ravel(params["a"] + updates["a"]), expected)


@pytest.mark.slow
def test_half_precision_is_computed_in_float32():
    params = {
        "a": draw((2, 3), dtype=jnp.bfloat16),
        "b": draw((1,), dtype=jnp.bfloat16),
    }
    tx = normax.second_order.hessian_free(damping=1.0)

    @jax.jit
    def update(params):
        grads = jax.grad(quadratic)(params)
        return tx.update(grads, tx.init(params), params, value_fn=quadratic)

    updates, state = update(params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype(jnp.bfloat16)}
    floats = jax.tree.leaves((state.direction, state.damping, state.reduction_ratio))
    assert {x.dtype for x in floats} == {np.dtype(np.float32)}
    w = np.asarray(ravel_pytree(params)[0], float)
    matrix = FACTOR @ FACTOR.T + np.eye(7)
    expected = np.linalg.solve(matrix + np.eye(7), TARGET - matrix @ w)
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=0.1, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", [None, 1.0])
@pytest.mark.parametrize("functions", [(None, None), (affine, half_square)])
def test_no_implicit_promotion(functions, diagonal):
    w = draw((7,), dtype=jnp.float32)
    c = None if diagonal is None else jnp.full_like(w, diagonal)
    expected = solve(quadratic, w, functions, diagonal=c)
    with jax.numpy_dtype_promotion("strict"):
        found = solve(quadratic, w, functions, diagonal=c)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_learning_rate_schedule():
    schedule = optax.piecewise_constant_schedule(0.5, {2: 0.1})
    tx = normax.second_order.hessian_free(schedule, damping=0.0, warm_start=0.0)
    w = jax.jit(lambda w: trajectory(tx, w, quadratic, 4)[0])(draw(7))
    minimum = np.linalg.solve(FACTOR @ FACTOR.T + np.eye(7), TARGET)
    gaps = np.linalg.norm(np.stack([draw(7), *w]) - minimum, axis=1)
    np.testing.assert_allclose(gaps[1:] / gaps[:-1], [0.5, 0.5, 0.95, 0.95], rtol=1e-6)


@pytest.mark.slow
def test_derivative_of_the_step():
    """Forward and backward, through parameters, gradient, damping and loss."""

    def moved(x):
        w, shift, damping, scale = x[:7], x[7:14], x[14], x[15]

        def loss(w):
            return quartic(w) * scale

        tx = normax.second_order.hessian_free(0.5, damping, 0.1, cg_tolerance=0.0)
        g = jax.grad(loss)(w) + shift
        return tx.update(g, tx.init(w), w, value_fn=loss)[0]

    x = jnp.concatenate([draw(7), 0.1 * draw(7, 1), jnp.array([2.0, 1.3])])

    @jax.jit
    def difference(d):
        return (moved(x + d) - moved(x - d)) / 2e-5

    expected = np.stack([difference(d) for d in 1e-5 * np.eye(16)], 1)
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(
            jax.jit(jacobian(moved))(x), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_what_is_not_finite_shows():
    w, tx = draw(7), normax.second_order.hessian_free()

    @jax.jit
    def update(g, w, before):
        state = tx.init(w)._replace(direction=before)
        return tx.update(g, state, w, value_fn=quartic)

    g, zeros = jax.grad(quartic)(w), jnp.zeros(7)
    for bad in (jnp.nan, jnp.inf):
        assert not np.any(np.isfinite(update(g.at[2].set(bad), w, zeros)[0]))
        assert not np.any(np.isfinite(update(g, w.at[2].set(bad), zeros)[0]))
    # Once the trouble is over, the last solution is forgotten.
    fine = update(g, w, zeros.at[2].set(jnp.nan))[0]
    np.testing.assert_array_equal(fine, update(g, w, zeros)[0])

    # Nor is a loss hidden that is no number, of a finite gradient.
    after, _ = solve(lambda w: quartic(w) + jnp.nan, w)
    assert np.all(np.isnan(after))

    # A loss that is no number beyond some point is stepped back from.
    def cliff(w):
        return jnp.sum(jnp.log(w)) + jnp.sum(w**2) / 2 * 1e-3

    after, state = solve(cliff, jnp.full(3, 0.5), damping=1e-3)
    assert np.all(after > 0) and np.isnan(state.reduction_ratio[0])
    np.testing.assert_allclose(state.damping[0], 1.5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -0.1}, "damping must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1"),
        ({"cg_tolerance": -1.0}, "cg_tolerance must be at least 0"),
        ({"warm_start": -1.0}, "warm_start must be at least 0"),
        ({"preconditioner_power": -1.0}, "preconditioner_power must be at least 0"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        normax.second_order.hessian_free(**arguments)
    tx, w = normax.second_order.hessian_free(), jnp.ones(3)
    with pytest.raises(ValueError, match="`value_fn` is None; call update"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="give both, or neither"):
        tx.update(w, tx.init(w), w, value_fn=quartic, outputs_fn=quartic)
