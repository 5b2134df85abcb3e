"""Path norms, path scales and Path-SGD: ranges, dead edges, gradients, optimizers."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

relu = jax.nn.relu
BATCH = jax.random.normal(jax.random.key(0), (16, 4))


def draw(*shape, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return jax.device_put(rng.normal(size=shape).astype(jnp.float32))


def stack(params, x):
    for name in ("Dense_2", "Dense_10", "Dense_11"):
        x = relu(x) if name != "Dense_2" else x
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
    return x


def stack_params(widths=(4, 5, 3, 2)):
    layers = zip(
        ("Dense_2", "Dense_10", "Dense_11"), widths[:-1], widths[1:], strict=True
    )
    return {
        n: {"kernel": draw(i, o, seed=o), "bias": draw(o, seed=i)} for n, i, o in layers
    }


def chain(params, x):
    return relu(x @ params[0]) @ params[1]


ONE = jax.ShapeDtypeStruct((1, 4), jnp.float32)


@functools.cache
def log_scales_and_norm(forward, inputs, p=2):
    """Return the compiled function from parameters to the logarithms of both."""

    def both(params):
        scales = normax.path_scales(forward, params, inputs, p, log=True)
        return scales, normax.path_norm(forward, params, inputs, p, log=True)

    return jax.jit(both)


# Equation (8), written out in float64 for p = 2.


def numpy_scales(params):
    names = ("Dense_2", "Dense_10", "Dense_11")
    kernels = [np.square(params[name]["kernel"]) for name in names]
    biases = [np.square(params[name]["bias"]) for name in names]
    into, out = [np.ones(len(kernels[0]))], [np.ones(kernels[-1].shape[1])]
    for kernel, bias in zip(kernels, biases, strict=True):
        into.append(into[-1] @ kernel + bias)
    for kernel in reversed(kernels):
        out.insert(0, kernel @ out[0])
    return {
        name: {"kernel": np.outer(into[i], out[i + 1]), "bias": out[i + 1]}
        for i, name in enumerate(names)
    }


def numpy_path_sgd(params, grads, rate, momentum, nesterov, update_every):
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    velocity = jax.tree.map(np.zeros_like, params)
    for step in range(6):
        if step % update_every == 0:
            scales = numpy_scales(params)
        now = jax.tree.map(lambda g, step=step: np.asarray(g[step], np.float64), grads)
        move = jax.tree.map(np.divide, now, scales)
        velocity = jax.tree.map(lambda v, m: momentum * v + m, velocity, move)
        if nesterov:
            move = jax.tree.map(lambda v, m: momentum * v + m, velocity, move)
        else:
            move = velocity
        params = jax.tree.map(lambda w, m: w - rate * m, params, move)
    return params


@pytest.mark.parametrize("forward", [None, stack])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "update_every"),
    [(None, False, 1), (0.9, False, 3), (0.5, True, 4)],
)
def test_path_sgd_is_equation_8(forward, momentum, nesterov, update_every):
    params = stack_params()
    grads = jax.tree.map(lambda w: 0.3 * draw(6, *w.shape, seed=5), params)
    inputs = None if forward is None else ONE
    tx = normax.path_sgd(
        0.01,
        forward,
        inputs,
        momentum=momentum,
        nesterov=nesterov,
        update_every=update_every,
    )

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    expected = numpy_path_sgd(
        params, grads, 0.01, momentum or 0, nesterov, update_every
    )
    chex.assert_trees_all_close(
        after, jax.tree.map(np.float32, expected), rtol=2e-5, atol=2e-6
    )
    assert optax.tree.get(state, "count") == 6


@pytest.mark.slow
@pytest.mark.parametrize("update_every", [1, 10])
def test_parameters_are_updated_in_place(update_every):
    params = stack_params((4, 30, 20, 10))
    tx = normax.path_sgd(0.01, update_every=update_every)

    def step(params, state):
        grads = jax.grad(lambda params: jnp.sum(stack(params, BATCH) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params))
    program = step.compile().as_text()
    assert "f32[4,30]" in program
    assert not re.findall(r"f32\[\d+,\d+\]\S* copy\(", program)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 3.0])
def test_the_walk_over_the_tree_is_the_transform(p):
    params = stack_params()
    updates = jax.tree.map(jnp.ones_like, params)
    walk = normax.scale_by_path_sgd(p=p)
    got, _ = jax.jit(walk.update)(updates, walk.init(params), params)
    scales = normax.path_scales(stack, params, ONE, p)
    chex.assert_trees_all_close(got, jax.tree.map(lambda s: 1 / s, scales), rtol=3e-6)


def test_natural_order_and_shapes_that_do_not_chain():
    layers = {f"layer{i}": draw(i, i + 1) for i in range(8, 12)}
    normax.scale_by_path_sgd().init(layers)
    normax.scale_by_path_sgd().init([draw(2, 3), draw(3), draw(3, 4), draw(4)])
    wrong = [
        {"a": draw(3, 2), "b": draw(3, 2)},
        {"conv": draw(3, 3, 2, 4), "dense": draw(4, 2)},
        {"w": draw(2, 3), "b": draw(4)},
        {"w": draw(2, 3), "b": draw(3), "s": draw(3)},
        {"w": draw(2, 3), "s": jnp.float32(1)},
        {"b": draw(3)},
    ]
    for params in wrong:
        with pytest.raises(
            ValueError, match=r"(?s)params\[.*`forward` and `inputs`|no kernel"
        ):
            normax.scale_by_path_sgd().init(params)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="`inputs`"):
        normax.scale_by_path_sgd(stack)
    with pytest.raises(ValueError, match="`forward`"):
        normax.path_sgd(0.1, inputs=ONE)
    with pytest.raises(ValueError, match="update_every must be at least 1"):
        normax.scale_by_path_sgd(update_every=0)
    with pytest.raises(ValueError, match="p must be at least 1"):
        normax.scale_by_path_sgd(p=0.5)
    tx = normax.scale_by_path_sgd()
    with pytest.raises(ValueError, match="`params` is None"):
        tx.update(stack_params(), tx.init(stack_params()))
    params = stack_params()
    for masked in (
        optax.masked(tx, jax.tree.map(lambda w: w.ndim > 1, params)),
        optax.partition(
            {"a": tx, "b": optax.sgd(0.1)},
            jax.tree.map(lambda w: "ab"[w.ndim > 1], params),
        ),
    ):
        with pytest.raises(
            ValueError, match="needs the parameters of the whole network"
        ):
            masked.init(params)


# Rescaling.


def rescaled(params, factors):
    """Scale what enters each hidden unit by a factor, what leaves it by its inverse."""
    first, second, last = (
        dict(params[name]) for name in ("Dense_2", "Dense_10", "Dense_11")
    )
    a, b = factors
    first = {"kernel": first["kernel"] * a[None], "bias": first["bias"] * a}
    second = {
        "kernel": second["kernel"] / a[:, None] * b[None],
        "bias": second["bias"] * b,
    }
    last = last | {"kernel": last["kernel"] / b[:, None]}
    return {"Dense_2": first, "Dense_10": second, "Dense_11": last}


FACTORS = (
    jnp.array([2.0**40, 2.0**-40, 1, 2.0**-3, 8]),
    jnp.array([2.0**-42, 2.0**20, 1]),
)


@pytest.mark.slow
def test_rescaling_moves_the_path_scales_inversely():
    params = stack_params()
    ones = jax.tree.map(jnp.ones_like, params)
    change = jax.tree.map(jnp.log, rescaled(ones, FACTORS))
    logs = log_scales_and_norm(stack, ONE)
    scales, norm = logs(params)
    expected = jax.tree.map(lambda g, c: g - 2 * c, scales, change)
    got, other_norm = logs(rescaled(params, FACTORS))
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(norm, other_norm, rtol=1e-6)


@pytest.mark.parametrize("forward", [None, stack])
def test_rescaled_networks_train_alike(forward):
    inputs = None if forward is None else ONE
    tx = normax.path_sgd(
        0.003, forward, inputs, momentum=0.9, nesterov=True, update_every=3
    )

    def train(params):
        def step(carry, key):
            params, state = carry
            keep = jax.random.bernoulli(key, 0.8, BATCH.shape)  # dropout in the loss
            loss = lambda w: jnp.mean((stack(w, BATCH * keep) - BATCH[:, :2]) ** 2)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(1), 60)
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
        return stack(params, BATCH), losses

    train = jax.jit(train)
    (outputs, losses), (others, _) = (
        train(stack_params()),
        train(rescaled(stack_params(), FACTORS)),
    )
    assert jnp.mean(losses[-5:]) < 0.8 * jnp.mean(losses[:5])
    np.testing.assert_allclose(outputs, others, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "after",
    [optax.scale_by_rss(), optax.scale_by_adam(), optax.adagrad(0.1), optax.trace(0.9)],
)
def test_chains(after):
    tx = optax.chain(normax.scale_by_path_sgd(), after)
    params = stack_params()
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    scaled = jax.tree.map(lambda s: np.float32(1 / s), numpy_scales(params))
    expected, _ = jax.jit(after.update)(scaled, after.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_training_loops_of_linen_and_nnx():
    model = nn.Sequential([nn.Dense(8), relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), BATCH)["params"]
    network = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    walk, lifted = normax.path_sgd(0.01), normax.path_sgd(0.01, network, ONE)
    loss = lambda w: jnp.mean((network(w, BATCH) - BATCH[:, :2]) ** 2)  # noqa: E731
    losses = []
    for tx in (walk, lifted):
        w, state = params, tx.init(params)
        step = jax.jit(lambda w, state, tx=tx: tx.update(jax.grad(loss)(w), state, w))
        for _ in range(20):
            updates, state = step(w, state)
            w = optax.apply_updates(w, updates)
        losses.append((loss(params), loss(w)))
    assert losses[0][1] < 0.8 * losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)

    network = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
    )
    graphdef, _ = nnx.split(network)
    tx = normax.path_sgd(
        0.01, lambda s, x: nnx.merge(graphdef, s)(x), ONE, update_every=2
    )
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    @nnx.jit
    def nnx_step(network, optimizer):
        loss = lambda network: jnp.mean((network(BATCH) - BATCH[:, :2]) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(network)
        optimizer.update(network, grads)
        return value

    values = [nnx_step(network, optimizer) for _ in range(20)]
    assert values[-1] < 0.8 * values[0]


# Ranges.


def log_scales_of_stack(kernels, p):
    """Return log F and the logs of its derivatives, layer by layer in float64."""
    with np.errstate(divide="ignore"):
        logs = [p * np.log(np.abs(np.asarray(k, np.float64))) for k in kernels]
    into, out = [np.zeros(len(logs[0]))], [np.zeros(logs[-1].shape[1])]
    for log in logs:
        into.append(np.logaddexp.reduce(into[-1][:, None] + log, axis=0))
    for log in reversed(logs):
        out.insert(0, np.logaddexp.reduce(log + out[0], axis=1))
    scales = [i[:, None] + o for i, o in zip(into[:-1], out[1:], strict=True)]
    return np.logaddexp.reduce(into[-1]), scales


def deep(params, x):
    return jax.lax.scan(lambda h, w: (relu(h @ w), None), x, params)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("p", "size"), [(2, 1e-20), (2, 1e20), (1.5, 1.0)])
def test_depth_of_100(p, size):
    params = size * draw(100, 6, 6)
    total, scales = log_scales_of_stack(params, p)
    x = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    got, norm = log_scales_and_norm(deep, x, p)(params)
    np.testing.assert_allclose(norm, total / p, rtol=1e-6)
    np.testing.assert_allclose(got, 2 / p * np.stack(scales), rtol=2e-6, atol=1e-4)


@pytest.mark.slow
def test_tiny_weights_with_biases_of_zero():
    def forward(params, x):
        for kernel, bias in params:
            x = relu(x @ kernel + bias)
        return x

    sizes = jnp.array([1e-20, 1e-22])
    params = [(jnp.diag(sizes), jnp.zeros((1, 2)))] * 6
    norm = lambda w: normax.path_norm(forward, w, jnp.ones((1, 2)), log=True)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(norm))(params)
    np.testing.assert_allclose(value, 6 * np.log(1e-20), rtol=1e-6)
    np.testing.assert_array_equal([bias for _, bias in gradient], 0)
    for kernel, _ in gradient:  # of 6 log w, for the path of the larger unit
        np.testing.assert_allclose(kernel[0, 0] * sizes[0], 1, rtol=1e-5)


def test_width_of_4000():
    params = [draw(4, 4000), draw(4000, 2)]
    total, scales = log_scales_of_stack(params, 2)
    np.testing.assert_allclose(
        normax.path_norm(chain, params, ONE), np.exp(total / 2), rtol=2e-6
    )
    got = normax.path_scales(chain, params, ONE)
    for a, b in zip(got, scales, strict=True):
        np.testing.assert_allclose(a, np.exp(b), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2, 3.0])
@pytest.mark.parametrize("compensated", [True, False])
def test_factors_of_1e25_between_units(p, compensated):
    factors = 10.0 ** np.array([25, -25, 0, 12, -12])
    params = [
        draw(4, 5) * factors[None],
        draw(5, 2) / (factors[:, None] if compensated else 1),
    ]
    params = [jnp.asarray(w, jnp.float32) for w in params]
    total, scales = log_scales_of_stack(params, p)
    logs, norm = log_scales_and_norm(chain, ONE, p)(params)
    np.testing.assert_allclose(norm, total / p, rtol=1e-6)
    tx = normax.scale_by_path_sgd(p=p)
    # An update as large as the weight divided by 1e20 gamma is a float again.
    with np.errstate(over="ignore", under="ignore"):
        sizes = [np.exp(np.clip(s * 2 / p, -80, 80)) for s in scales]
    grads = [jnp.asarray(s, jnp.float32) for s in sizes]
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for log, scale, size, update in zip(logs, scales, sizes, updates, strict=True):
        np.testing.assert_allclose(log, 2 / p * scale, rtol=1e-6, atol=1e-5)
        expected = np.exp(np.log(size) - 2 / p * scale)
        inside = (expected > 1e-37) & (expected < 1e38)
        np.testing.assert_allclose(update[inside], expected[inside], rtol=1e-5)


@pytest.mark.slow
def test_convolutions_with_factors_of_1e25_between_units():
    def forward(params, x):
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        x = relu(convolve(x, params[0], padding="SAME"))
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))[:, :, jnp.array([2, 1, 0])]
        return convolve(x, params[1], padding="VALID")

    x = jax.ShapeDtypeStruct((1, 4, 2), jnp.float32)
    params = [draw(3, 2, 3), draw(3, 3, 2)]
    logs = log_scales_and_norm(forward, x)
    plain, plain_norm = logs(params)
    for factors in (jnp.array([1e25, 1e-25, 1]), jnp.array([1e-19, 1e-15, 1e-17])):
        c = jnp.log(factors)
        unbalanced = [params[0] * factors[None, None], params[1]]
        balanced = [unbalanced[0], params[1] / factors[None, ::-1, None]]
        (first, second), norm = logs(balanced)
        np.testing.assert_allclose(norm, plain_norm, rtol=1e-6)
        np.testing.assert_allclose(
            first, plain[0] - 2 * c[None, None], rtol=1e-6, atol=2e-5
        )
        np.testing.assert_allclose(
            second, plain[1] + 2 * c[None, ::-1, None], rtol=1e-6, atol=2e-5
        )
        first, second = logs(unbalanced)[0]
        np.testing.assert_allclose(first, plain[0], rtol=1e-6, atol=2e-5)
        np.testing.assert_allclose(
            second, plain[1] + 2 * c[None, ::-1, None], rtol=1e-6, atol=2e-5
        )


# Dead edges, and what is not finite.


@pytest.mark.slow
def test_edges_that_no_path_uses():
    # Unit 0 hears nothing, unit 1 reaches nothing, weight (0, 2) is 0 but alive.
    params = [draw(4, 5).at[:, 0].set(0).at[0, 2].set(0), draw(5, 2).at[1].set(0)]
    params += [{"unused": draw(3)}]
    forward = lambda w, x: chain(w[:2], x)  # noqa: E731
    scales = normax.path_scales(forward, params, ONE)
    logs, _ = log_scales_and_norm(forward, ONE)(params)
    into, out = np.square(params[0]).sum(0), np.square(params[1]).sum(1)
    np.testing.assert_allclose(scales[0], np.broadcast_to(out, (4, 5)), rtol=2e-6)
    np.testing.assert_allclose(
        scales[1], np.broadcast_to(into[:, None], (5, 2)), rtol=2e-6
    )
    np.testing.assert_array_equal(scales[2]["unused"], 0)
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.isneginf, logs), jax.tree.map(lambda s: s == 0, scales)
    )
    assert np.all(scales[0][:, 1] == 0) and np.all(scales[1][0] == 0)
    tx = normax.scale_by_path_sgd(forward, ONE)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    expected = jax.tree.map(
        lambda s: jnp.where(s == 0, 0, 1 / jnp.where(s == 0, 1, s)), scales
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    nothing = [params[0], jnp.zeros((5, 2))]
    assert normax.path_norm(chain, nothing, ONE) == 0
    assert np.isneginf(normax.path_norm(chain, nothing, ONE, log=True))


@functools.cache
def first_step_and_scales(walk, update_every):
    """Return the compiled function from three layers' parameters to both."""

    def deep(params, x):
        return chain(params[1:], relu(x @ params[0]))

    inputs = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    network = (None, None) if walk else (deep, inputs)
    tx = normax.scale_by_path_sgd(*network, update_every=update_every)

    def both(params):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return updates, normax.path_scales(deep, params, inputs)

    return jax.jit(both)


@pytest.mark.slow
@pytest.mark.parametrize("update_every", [1, 2])
@pytest.mark.parametrize("walk", [True, False])
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_where_a_layer_is_dead_there_is_no_step(dead, walk, update_every):
    # Path values of one layer, 1e-2 to 1e2, beside those that are all 0.
    unequal = np.logspace(-2, 2, 5, dtype=np.float32)
    params = [unequal[None], np.ones((5, 5), np.float32), unequal[:, None]]
    params[dead] = np.zeros_like(params[dead])
    updates, scales = first_step_and_scales(walk, update_every)(params)
    for layer, (update, scale) in enumerate(zip(updates, scales, strict=True)):
        assert np.all(np.isfinite(update)) and np.all((update == 0) == (scale == 0))
        assert np.any(update) == (layer == dead)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_are_not_hidden(bad):
    params = [draw(4, 5).at[1, 2].set(bad), draw(5, 2)]
    assert not np.isfinite(normax.path_norm(chain, params, ONE))
    assert not np.isfinite(normax.path_norm(chain, params, ONE, log=True))
    assert not np.any(np.isfinite(normax.path_scales(chain, params, ONE)[1][2]))
    tx = normax.scale_by_path_sgd()
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert np.all(np.isnan(updates[1][2]))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_gradients_that_are_not_finite_stay_where_they_are(bad):
    params = [draw(4, 5), draw(5, 2)]
    grads = jax.tree.map(jnp.ones_like, params)
    tx = normax.scale_by_path_sgd()
    update = jax.jit(tx.update)
    expected, _ = update(grads, tx.init(params), params)
    expected[0] = expected[0].at[0, 0].set(bad)
    grads[0] = grads[0].at[0, 0].set(bad)
    updates, _ = update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates, expected)


@pytest.mark.slow
@pytest.mark.devices(2)
def test_gradients_on_several_devices_do_not_vary_together():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])
    params, tx = [draw(4, 5), draw(5, 2)], normax.scale_by_path_sgd()
    grads = [draw(8, 5, seed=1), draw(5, 2, seed=1)]  # the first for each device

    def update(*grads):
        return tx.update(list(grads), tx.init(params), params)[0]

    mapped = jax.shard_map(
        update, mesh=mesh, in_specs=(P("x"), P()), out_specs=[P("x"), P()]
    )
    first, second = (update(part, grads[1]) for part in jnp.split(grads[0], 2))
    expected = [jnp.concatenate([first[0], second[0]]), first[1]]
    chex.assert_trees_all_close(jax.jit(mapped)(*grads), expected, rtol=1e-6)


# Derivatives.


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_gradient_of_the_log_path_norm_is_the_share_of_each_edge(p):
    params = stack_params()
    params["Dense_2"]["bias"] = jnp.zeros(5)
    params["Dense_10"]["kernel"] = params["Dense_10"]["kernel"].at[0, 0].set(0)

    @jax.jit
    def values(w):
        gradient = jax.grad(lambda w: normax.path_norm(stack, w, ONE, p, log=True))(w)
        scales = normax.path_scales(stack, w, ONE, p)
        return gradient, scales, normax.path_norm(stack, w, ONE, p) ** p

    gradient, scales, total = jax.device_get(values(params))

    def share(w, scale):
        return np.sign(w) * np.abs(w) ** (p - 1) * scale ** (p / 2) / total

    expected = jax.tree.map(share, jax.device_get(params), scales)
    chex.assert_trees_all_close(gradient, expected, rtol=2e-5)


@pytest.mark.slow
def test_gradient_of_the_path_norm_by_finite_differences():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), stack_params())
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        norm = jax.jit(lambda w: normax.path_norm(stack, unravel(w), ONE, 2))
        gradient = jax.grad(norm)(flat)
        steps = 1e-6 * np.eye(flat.size)
        above, below = jax.jit(jax.vmap(jax.vmap(norm)))(
            np.asarray(flat) + np.stack([steps, -steps])
        )
        differences = (above - below) / 2e-6
        np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
def test_second_derivatives_at_biases_of_zero(size):
    def forward(b, x):
        h = relu(x @ jnp.array([[3.0], [4.0]]) * size + size * b[:1][None])
        return h * jnp.array([[2.0]]) + size * b[1:][None]

    def norm(b):  # of 2 * (5, b_0) and b_1, in units of `size`
        return normax.path_norm(forward, b, jnp.ones((1, 2))) / size

    @jax.jit
    def derivatives(b):
        return norm(b), jax.grad(norm)(b), jax.hessian(norm)(b)

    value, gradient, hessian = derivatives(jnp.zeros(2))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    np.testing.assert_allclose(hessian, [[0.4, 0], [0, 0.1]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(value, 10, rtol=1e-6)


def norm_where_nothing_arrives(w, p):
    forward = lambda w, x: jnp.pad(x, ((0, 0), (0, 1))) @ w  # noqa: E731
    return normax.path_norm(forward, w[:, None], jnp.ones((1, 2)), p)


HESSIANS = {
    "traced": jax.jit(jax.hessian(norm_where_nothing_arrives)),
    "known": jax.jit(jax.hessian(norm_where_nothing_arrives), static_argnums=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("power", HESSIANS)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_second_derivatives_where_nothing_arrives(p, power):
    hessian = HESSIANS[power](np.array([3, 4, 1], np.float32), p)
    # Of the p-norm of the weights that are reached.
    live = np.array([3.0, 4.0])
    size = np.sum(live**p) ** (1 / p)
    expected = np.zeros((3, 3))
    expected[:2, :2] = np.diag(live ** (p - 2)) - np.outer(live, live) ** (
        p - 1
    ) / np.sum(live**p)
    expected *= (p - 1) * size ** (1 - p)
    np.testing.assert_allclose(hessian, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_ensembles_and_traced_powers():
    runs = [[draw(4, 5, seed=s), draw(5, 2, seed=s)] for s in range(3)]

    def values(params, p):
        return normax.path_norm(chain, params, ONE, p, log=True), normax.path_scales(
            chain, params, ONE, p
        )

    stacked = jax.tree.map(lambda *ws: jnp.stack(ws), *runs)
    batched = jax.jit(jax.vmap(values, in_axes=(0, None)))(stacked, 1.5)
    one_run = jax.jit(values, static_argnums=1)
    for index, params in enumerate(runs):
        expected = one_run(params, 1.5)
        one = jax.tree.map(lambda x: x[index], batched)  # noqa: B023
        chex.assert_trees_all_close(one, expected, rtol=5e-6)
    chex.assert_trees_all_equal(values(runs[0], 2), values(runs[0], 2.0))
