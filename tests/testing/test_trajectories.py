"""Assertions about two networks or runs: they pass what is right, name what is not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]
INPUTS = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
STEPS = 6


def draw(seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"in": (5, 6), "bias": (6,), "out": (6, 2)}
    return {
        k: jax.device_put(rng.normal(size=s).astype(jnp.float32))
        for k, s in shapes.items()
    }


def network(params):
    hidden = jax.nn.relu(INPUTS @ params["in"] + params["bias"][None])
    return {"y": hidden @ params["out"]}


def loss(params):
    return jnp.mean((network(params)["y"] - 1) ** 2)


def rescale(params, factors):
    return {
        "in": params["in"] * factors[None],
        "bias": params["bias"] * factors,
        "out": params["out"] / factors[:, None],
    }


FACTORS = jnp.array([0.1, 2.0, 30.0, 1.0, 0.5, 7.0])


def second_order(learning_rate):
    """Newton's method on the outer weights alone, which no rescaling changes."""

    def update_fn(updates, state, params, *, value_fn, **extra_args):
        del extra_args
        hessian = jax.hessian(lambda out: value_fn(params | {"out": out}))(
            params["out"]
        )
        n = params["out"].size
        step = jnp.linalg.solve(hessian.reshape(n, n), updates["out"].ravel())
        step = -learning_rate * step.reshape(params["out"].shape)
        return optax.tree.zeros_like(updates) | {"out": step}, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


def test_rescaled_networks_are_equivalent():
    params = draw()
    normax.testing.assert_rescaling_equivalent(params, params, network)
    normax.testing.assert_rescaling_equivalent(
        params, rescale(params, FACTORS), network
    )
    other = rescale(params, FACTORS) | {"bias": params["bias"]}
    message = (
        r"(?s)assert_rescaling_equivalent: fn must be the same.*outputs\['y'\]: .* of "
        r"24 values are off.*measured.*expected.*\[unbalanced\]"
    )
    with pytest.raises(AssertionError, match=message):
        normax.testing.assert_rescaling_equivalent(
            params, other, network, custom_message="unbalanced"
        )
    normax.testing.assert_rescaling_equivalent(params, other, network, rtol=1e3)
    nan = params | {"bias": params["bias"].at[0].set(jnp.nan)}
    with pytest.raises(AssertionError, match="nan"):
        normax.testing.assert_rescaling_equivalent(nan, nan, network)


def test_the_same_function_is_not_yet_a_rescaling():
    def even(params):
        return jnp.abs(INPUTS @ params["in"])

    params = {"in": draw()["in"]}
    with pytest.raises(AssertionError, match=r"keep the signs.*params\['in'\]"):
        normax.testing.assert_rescaling_equivalent(params, {"in": -params["in"]}, even)
    for other in ({"in": params["in"][:, :3]}, params | {"out": jnp.ones(2)}):
        with pytest.raises(
            AssertionError, match=r"structure and the shapes.*params\['(in|out)'\]"
        ):
            normax.testing.assert_rescaling_equivalent(params, other, even)


def test_gradient_descent_is_not_rescaling_invariant():
    params, rescaled = draw(), rescale(draw(), FACTORS)
    message = r"(?s)assert_rescaling_invariant.*step 1, outputs\['y'\].*\[by SGD\]"
    for rate in (1e-5, 1e-2):
        with pytest.raises(AssertionError, match=message):
            normax.testing.assert_rescaling_invariant(
                *(optax.sgd(rate), loss, params, rescaled, network),
                steps=STEPS,
                custom_message="by SGD",
            )
    with pytest.raises(AssertionError, match="assert_rescaling_equivalent"):
        normax.testing.assert_rescaling_invariant(
            optax.sgd(1e-2), loss, params, draw(2), network, steps=STEPS
        )


def test_a_rescaling_invariant_optimizer():
    # It also needs `value_fn`, which the loop must hand over.
    tx, params = second_order(0.3), draw()
    for factors in (FACTORS, FACTORS**-2):
        rescaled = rescale(params, factors)
        normax.testing.assert_rescaling_invariant(
            tx, loss, params, rescaled, network, steps=STEPS
        )


@pytest.mark.slow
def test_optimizers_that_want_the_value():
    tx = optax.lbfgs(0.1)
    normax.testing.assert_equivalent_trajectories(
        (tx, loss, draw()), (tx, loss, draw()), network, steps=2
    )


def invariant(params):
    return params / jnp.linalg.norm(params, axis=0, keepdims=True)


def invariant_loss(params):
    return jnp.sum((INPUTS[:5, :1] - invariant(params)) ** 3)


@pytest.mark.slow
def test_equivalent_rates():
    w, alpha = draw()["in"], 3.0
    first = (optax.sgd(0.1 * alpha**2), invariant_loss, alpha * w)
    normax.testing.assert_equivalent_trajectories(
        first, (optax.sgd(0.1), invariant_loss, w), invariant
    )
    message = r"(?s)assert_equivalent_trajectories.*; step 1, outputs: .* values"
    for rate in (0.0, 0.099, 0.1 * alpha):
        with pytest.raises(AssertionError, match=message):
            normax.testing.assert_equivalent_trajectories(
                first, (optax.sgd(rate), invariant_loss, w), invariant
            )


@pytest.mark.slow
def test_the_first_step_that_differs_is_named():
    w = draw()["in"]
    rates = [optax.piecewise_constant_schedule(0.1, {s: 0.5}) for s in (4, 50)]
    runs = [(optax.sgd(rate), invariant_loss, w) for rate in rates]
    with pytest.raises(
        AssertionError, match=r"step 5, outputs.*(?s:.*)and 4 more: step 6"
    ):
        normax.testing.assert_equivalent_trajectories(*runs, invariant, steps=9)
    normax.testing.assert_equivalent_trajectories(*runs, invariant, steps=4)
    start = (optax.sgd(0.1), invariant_loss, draw(2)["in"])
    with pytest.raises(AssertionError, match="step 0, outputs"):
        normax.testing.assert_equivalent_trajectories(
            start, runs[0], invariant, steps=1
        )


def test_batches():
    def batch_loss(params, batch):
        return jnp.sum(batch[:, None] * invariant(params))

    w, batches = draw()["in"], jnp.asarray(INPUTS[:STEPS])
    runs = [
        (optax.sgd(0.1 * a**2, momentum=0.9), batch_loss, a * w) for a in (1.0, 0.2)
    ]
    kwargs = dict(steps=STEPS, batches=batches)
    normax.testing.assert_equivalent_trajectories(*runs, invariant, **kwargs)

    # The batches must be used, each in its own step.
    def shuffled_loss(params, batch):
        return batch_loss(params, batch + (batch == batches[3]) * 0.1)

    other = (runs[1][0], shuffled_loss, runs[1][2])
    with pytest.raises(AssertionError, match="step 4"):
        normax.testing.assert_equivalent_trajectories(
            runs[0], other, invariant, **kwargs
        )


def test_runs_that_prove_nothing_fail():
    w = draw()["in"]
    for rate in (0.0, 1e-12):
        run = (optax.sgd(rate), invariant_loss, w)
        with pytest.raises(AssertionError, match=r"and change them.*largest change"):
            normax.testing.assert_equivalent_trajectories(run, run, invariant)
    run = (optax.sgd(jnp.nan), invariant_loss, w)
    with pytest.raises(AssertionError, match=r"step 1.*nan"):
        normax.testing.assert_equivalent_trajectories(run, run, invariant)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        normax.testing.assert_equivalent_trajectories(run, run, invariant, steps=0)


def own_rate():
    """Gradient descent at the rate that stands beside the weights, to compile once."""

    def update(gradients, state, params):
        return (-params[1] * gradients[0], jnp.zeros(())), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.0, 5e-4])
def test_no_learning_rate_hides_a_wrong_one(epsilon):
    """Four times the rate suits twice the weights, at any rate; others do not.

    With the epsilon of batch norm, twice the weights are a slightly other function.
    """

    def fn(params):
        z = INPUTS @ params[0]
        return z / jnp.sqrt(z.var(0, keepdims=True) + epsilon)

    def loss_fn(params):
        return jnp.mean(jnp.sin(fn(params)) ** 3)

    w, tx = draw()["in"], own_rate()

    def compare(rate, factor):
        normax.testing.assert_equivalent_trajectories(
            (tx, loss_fn, (2 * w, factor * rate)), (tx, loss_fn, (w, rate)), fn
        )

    for rate in np.geomspace(1e-7, 1e-1, 7):
        for factor in (2.0, 3.5, 4.4):
            with pytest.raises(AssertionError, match="assert_equivalent_traj"):
                compare(rate, factor)
    for rate in (3e-3, 1e-2, 1e-1):
        compare(rate, 4.0)
    with pytest.raises(AssertionError, match="and change them"):
        compare(1e-7, 4.0)


@pytest.mark.slow
def test_under_jit():
    tx = optax.sgd(0.1)

    def check(params):
        run = (tx, invariant_loss, params)
        other = (optax.sgd(0.4), invariant_loss, 2 * params)
        normax.testing.assert_equivalent_trajectories(run, other, invariant)
        return params

    w = draw()["in"]
    with pytest.raises(RuntimeError, match=r"chex\.chexify"):
        jax.jit(check)(w)
    chex.chexify(jax.jit(check), async_check=False)(w)
