"""The profile of gradient norms against NumPy, and as what predicts a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax
from normax.spheres import gradient_norm_profile

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def monitored(w, gradients, axes="unit", **kwargs):
    """Return the state after steps that change nothing, with these gradients."""
    tx = normax.monitor_weight_dynamics(axes, **kwargs)

    def step(state, grad):
        return tx.update(jax.tree.map(jnp.zeros_like, w), state, w, grad=grad)[1], None

    return jax.jit(lambda state, xs: jax.lax.scan(step, state, xs)[0])(
        tx.init(w), gradients
    )


def exact(w, gradients, axes):
    """Return the norm times the orthogonal part of every gradient, in float64."""
    w, g = np.asarray(w, np.float64), np.asarray(gradients, np.float64)
    norm = np.sqrt(np.sum(w**2, axes, keepdims=True))
    behind = tuple(axis + 1 for axis in axes)
    along = np.sum(w / norm * g, behind, keepdims=True)
    tangent = np.sqrt(np.sum((g - along * w / norm) ** 2, behind))
    return tangent * np.squeeze(norm, axes)


def blocks_of(values, length):
    """Return root mean squares of every so many values, in full for each of them."""
    means = [
        np.sqrt(np.mean(values[i : i + length] ** 2, 0))
        for i in range(0, len(values), length)
    ]
    return np.repeat(means, length, 0)[: len(values)]


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize(
    ("steps", "length"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 4), (41, 16)]
)
def test_a_profile_holds_root_mean_squares_of_blocks(steps, length):
    w, gradients = draw(6, 3), draw(steps, 6, 3) * jnp.exp(draw(steps, 1, 3))
    state = monitored(w, gradients, gradient_blocks=4)
    assert state.profile.length == length and state.profile.measurements == steps
    expected = blocks_of(exact(w, gradients, (0,)), length)
    found = gradient_norm_profile(state, steps)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert found.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "shape", "reduced"),
    [("layer", (5, 4), (0, 1)), ((1,), (3, 4, 2), (1,)), ((-1,), (3, 4), (1,))],
)
def test_vectors_are_those_of_axes(axes, shape, reduced):
    w, gradients = draw(*shape), draw(3, *shape)
    found = gradient_norm_profile(monitored(w, gradients, axes, gradient_blocks=4), 3)
    np.testing.assert_allclose(found, exact(w, gradients, reduced), rtol=2e-6)


@pytest.mark.slow
def test_a_profile_is_stretched_to_another_run():
    w, gradients = draw(6, 3), draw(8, 6, 3)
    state = monitored(w, gradients, gradient_blocks=4)
    blocks = blocks_of(exact(w, gradients, (0,)), 2)[::2]
    for steps in (1, 2, 4, 7, 8, 12, 1000):
        at = [int((t + 0.5) / steps * 4) for t in range(steps)]
        found = jax.jit(gradient_norm_profile, static_argnums=1)(state, steps)
        np.testing.assert_allclose(found, blocks[at], rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_steps_between_measurements_take_the_last_one(every):
    w, gradients = draw(6, 3), draw(12, 6, 3)
    state = monitored(w, gradients, gradient_blocks=12, every=every)
    measured = np.repeat(exact(w, gradients[::every], (0,)), every, 0)
    np.testing.assert_allclose(gradient_norm_profile(state, 12), measured, rtol=2e-6)


@pytest.mark.slow
def test_long_blocks_round_little():
    w, n = draw(4, 2), 2**18 - 1000
    gradients = jnp.asarray(RNG.normal(size=(n, 4, 2)), jnp.float32)
    state = monitored(w, gradients, gradient_blocks=2)
    found = gradient_norm_profile(state, 2)
    values = exact(w, gradients, (0,)) ** 2
    expected = np.sqrt([np.mean(values[: 2**17], 0), np.mean(values[2**17 :], 0)])
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.slow
def test_only_what_is_orthogonal_counts_and_no_scale():
    w, gradients = draw(6, 3), draw(4, 6, 3)
    plain = gradient_norm_profile(monitored(w, gradients, gradient_blocks=4), 4)
    for scale in (1e-25, 1.0, 1e25):
        other = monitored(
            scale * w, (gradients + 3 * w[None]) / scale, gradient_blocks=4
        )
        np.testing.assert_allclose(gradient_norm_profile(other, 4), plain, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_no_square_leaves_the_range(scale):
    w, gradients = scale * draw(6, 3), scale * draw(5, 6, 3)
    found = gradient_norm_profile(monitored(w, gradients, gradient_blocks=4), 5)
    expected = blocks_of(exact(w, gradients, (0,)), 2)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        w, gradients = draw(6, 3).astype(dtype), draw(3, 6, 3).astype(dtype)
        state = monitored(w, gradients, gradient_blocks=4)
        found = gradient_norm_profile(state, 3)
        assert found.dtype == ("float64" if dtype == "float64" else "float32")
        expected = exact(w.astype("float32"), gradients.astype("float32"), (0,))
        np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_zero_vectors_and_gradients_and_nans():
    w = draw(6, 3).at[:, 0].set(0)
    gradients = draw(3, 6, 3).at[:, :, 1].set(0).at[1, 0, 2].set(jnp.nan)
    found = gradient_norm_profile(monitored(w, gradients, gradient_blocks=4), 3)
    np.testing.assert_array_equal(found[:, :2], 0)
    np.testing.assert_array_equal(np.isnan(found[:, 2]), [False, True, False])


def test_nothing_is_kept_unless_asked():
    params = {"kernel": draw(6, 3), "bias": draw(3)}
    tx = normax.monitor_weight_dynamics()
    state = tx.init(params)
    assert state.profile is None
    assert tx.update(params, state, params, grad=params)[1].profile is None


NETWORK = {"a": {"kernel": draw(6, 3), "bias": draw(3)}, "b": draw(4, 2)}


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_gpu")
def test_all_arrays_share_the_conditions():
    tx = normax.monitor_weight_dynamics(gradient_blocks=2)
    lowered = jax.jit(tx.update).lower(NETWORK, tx.init(NETWORK), NETWORK, grad=NETWORK)
    # The measures, the gradients, and the joining of blocks.
    assert lowered.as_text().count("stablehlo.case") == 3


def test_most_steps_do_not_compute_what_is_measured_rarely():
    w = draw(12, 3)
    tx = normax.monitor_weight_dynamics(every=10, gradient_blocks=2)
    text = jax.jit(tx.update).lower(w, tx.init(w), w, grad=w).as_text()
    before, _, inside = text.partition("stablehlo.case")
    assert "stablehlo.sqrt" not in before and "stablehlo.reduce" not in before
    assert inside


@pytest.mark.slow
def test_arrays_that_are_left_alone_masked_or_without_gradient():
    grads = jax.tree.map(lambda w: jnp.sin(7 * w), NETWORK)
    monitor = normax.monitor_weight_dynamics(gradient_blocks=2)
    whole = {"a": True, "b": True}
    for mask in (whole, whole | {"a": False}, whole | {"b": False}):
        tx = optax.chain(optax.sgd(0.1), optax.masked(monitor, mask))
        _, state = tx.update(grads, tx.init(NETWORK), NETWORK, grad=grads)
        (*_, profile) = jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, normax.spheres.GradientProfile)
        )
        found = jax.tree.leaves(profile.joint_norm)
        kept = [k for k, keep in (("a", mask["a"]), ("b", mask["b"])) if keep]
        assert len(found) == len(kept)
        for name, rows in zip(kept, found, strict=True):
            w, g = (
                x["a"]["kernel"] if name == "a" else x["b"] for x in (NETWORK, grads)
            )
            np.testing.assert_allclose(rows[0], exact(w, g[None], (0,))[0], rtol=2e-6)
    _, state = monitor.update(
        grads | {"b": None}, monitor.init(NETWORK), NETWORK, grad=grads | {"b": None}
    )
    profile = gradient_norm_profile(state, 2)
    assert profile["a"]["bias"] is None and np.all(profile["a"]["kernel"] > 0)
    np.testing.assert_array_equal(profile["b"], np.zeros((2, 2)))


@pytest.mark.slow
def test_partition_multi_steps_and_nnx():
    grads = jax.tree.map(lambda w: jnp.sin(7 * w), NETWORK)
    tx = optax.partition(
        {
            "kept": normax.monitor_weight_dynamics(gradient_blocks=2),
            "not": optax.identity(),
        },
        {"a": "kept", "b": "not"},
    )
    _, state = tx.update(grads, tx.init(NETWORK), NETWORK, grad=grads)
    kept = gradient_norm_profile(state, 1)
    expected = exact(NETWORK["a"]["kernel"], grads["a"]["kernel"][None], (0,))
    np.testing.assert_allclose(kept["a"]["kernel"], expected, rtol=2e-6)

    monitor = normax.monitor_weight_dynamics(gradient_blocks=2)
    every_two = optax.MultiSteps(monitor, 2)
    state = every_two.init(NETWORK)
    for factor in (1.0, 2.0, 3.0, 4.0):
        scaled = jax.tree.map(lambda g, factor=factor: factor * g, grads)
        _, state = every_two.update(scaled, state, NETWORK, grad=scaled)
    # That of the last of each two.
    found = gradient_norm_profile(state, 2)["a"]["kernel"]
    np.testing.assert_allclose(found, expected * [[2.0], [4.0]], rtol=2e-6)

    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, monitor, wrt=nnx.Param)
    w, g = (
        model.kernel[...],
        nnx.grad(lambda model: jnp.sum(model(draw(2, 6)) ** 2))(model),
    )
    optimizer.update(model, g, grad=g)
    found = gradient_norm_profile(optimizer.opt_state, 1)["kernel"]
    np.testing.assert_allclose(found, exact(w, g["kernel"][...][None], (0,)), rtol=2e-6)


@pytest.mark.slow
def test_injected_hyperparameters():
    make = optax.inject_hyperparams(
        normax.monitor_weight_dynamics, static_args="gradient_blocks"
    )
    tx, w, g = make(gradient_blocks=4, decay=0.5), draw(6, 3), draw(6, 3)
    _, state = jax.jit(tx.update)(g, tx.init(w), w, grad=g)
    found = gradient_norm_profile(state, 1)
    np.testing.assert_allclose(found, exact(w, g[None], (0,)), rtol=2e-6)
    make = optax.inject_hyperparams(normax.monitor_weight_dynamics)
    with pytest.raises(ValueError, match=r"even integer.*got Array\(4.*static_args"):
        make(gradient_blocks=4).init(w)
    plain = make()
    plain.update(g, plain.init(w), w)


def test_the_gradients_must_be_there_and_fit():
    monitor = normax.monitor_weight_dynamics(gradient_blocks=2)
    state = monitor.init(NETWORK)
    for grad, message in [
        (None, r"`grad` is missing; call update\(grads, state, params, grad=grads\)"),
        (NETWORK | {"b": draw(4, 3)}, r"params\['b'\] has shape \(4, 2\) and its grad"),
        ({"b": NETWORK["b"]}, r"grad must be a prefix .* no entry for params\['a'\]"),
        (NETWORK | {"c": draw(2, 2)}, r"nothing at \['c'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            monitor.update(NETWORK, state, NETWORK, grad=grad)


@pytest.mark.parametrize("blocks", [0, 1, -2, 5, 2.0, True, "many", np.nan])
def test_the_number_of_blocks_is_even(blocks):
    with pytest.raises(ValueError, match=r"even integer from 2 on, got .*; pass 100"):
        normax.monitor_weight_dynamics(gradient_blocks=blocks)


def test_what_cannot_be_read_is_said():
    monitor = normax.monitor_weight_dynamics(gradient_blocks=2)
    w = draw(6, 3)
    state = monitor.update(w, monitor.init(w), w, grad=w)[1]
    for opt_state, steps, message in [
        (normax.monitor_weight_dynamics().init(w), 3, "holds 0; pass the state of one"),
        ((state, state), 3, "holds 2; pass"),
        (monitor.init(w), 3, "has seen no step"),
        (state, 0, "steps must be a positive integer, got 0"),
        (state, 2.0, "steps must be a positive integer"),
        (state, True, "steps must be a positive integer, got True; pass the number"),
    ]:
        with pytest.raises(ValueError, match=message):
            gradient_norm_profile(opt_state, steps)
    several = gradient_norm_profile(state, np.int64(3))
    np.testing.assert_array_equal(several, gradient_norm_profile(state, 3))


@pytest.mark.slow
def test_the_runs_of_vmap_have_a_profile_each():
    monitor = normax.monitor_weight_dynamics(gradient_blocks=2)
    w, grads = draw(6, 3), draw(4, 6, 3)

    def run(scale):
        state = monitor.init(w)
        for g in grads:
            state = monitor.update(g, state, w, grad=scale * g)[1]
        return state

    states = jax.vmap(run)(jnp.array([1.0, 3.0]))
    with pytest.raises(ValueError, match=r"have shape \(2,\); map over the runs: jax"):
        gradient_norm_profile(states, 5)
    found = jax.vmap(lambda state: gradient_norm_profile(state, 5))(states)
    for rows, scale in zip(found, (1.0, 3.0), strict=True):
        expected = gradient_norm_profile(run(scale), 5)
        np.testing.assert_allclose(rows, expected, rtol=1e-6)


def noisy_loss(w, key):
    """A loss that does not depend on the norms of the columns of w."""
    x, y = jnp.split(jax.random.normal(key, (8, 1 + w.shape[0])), [1], 1)[::-1]
    unit = w / jnp.linalg.norm(w, axis=0, keepdims=True)
    return jnp.sum(jnp.mean((x @ unit - y) ** 2, 0))


def train(rule, rate, decay, steps, blocks, seed=0):
    tx = optax.chain(
        normax.UPDATE_RULES[rule].make(rate, decay),
        normax.monitor_weight_dynamics(gradient_blocks=blocks),
    )

    def step(carry, key):
        w, state = carry
        grads = jax.grad(noisy_loss)(w, key)
        updates, state = tx.update(grads, state, w, grad=grads)
        norm = optax.tree.get(state, "weight_norm")
        return (optax.apply_updates(w, updates), state), norm

    w = jnp.asarray(np.random.default_rng(seed).normal(size=(32, 4)), jnp.float32)
    keys = jax.random.split(jax.random.key(seed), steps)
    (_, state), norms = jax.jit(lambda *xs: jax.lax.scan(step, *xs))(
        (w, tx.init(w)), keys
    )
    return state, norms


@pytest.mark.slow
def test_norms_of_sgd_follow_from_its_profile():
    state, norms = train("sgd", 0.3, 0.05, 200, 200)
    run = normax.UPDATE_RULES["sgd"].predict(
        0.3,
        0.05,
        steps=200,
        initial_norm=norms[0],
        gradient_norm=gradient_norm_profile(state, 200),
    )
    np.testing.assert_allclose(run.weight_norm, norms, rtol=1e-5)


@pytest.mark.slow
def test_a_short_run_predicts_a_long_one_of_another_schedule():
    state, _ = train("sgd", 0.3, 0.05, 400, 20)
    rate = optax.cosine_decay_schedule(0.3, 2000)
    _, longer = train("sgd", rate, 0.02, 2000, 20, seed=1)
    run = normax.UPDATE_RULES["sgd"].predict(
        rate,
        0.02,
        steps=2000,
        initial_norm=longer[0],
        gradient_norm=gradient_norm_profile(state, 2000),
    )
    error = jnp.abs(run.weight_norm / longer - 1)
    assert jnp.mean(error) < 0.05
    constant = normax.UPDATE_RULES["sgd"].predict(
        rate, 0.02, steps=2000, initial_norm=longer[0]
    )
    assert jnp.mean(jnp.abs(constant.weight_norm / longer - 1)) > 0.1
