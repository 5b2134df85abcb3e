"""Path-SGD does not see how a network is scaled (Theorem 4.1); SGD and AdaGrad do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

WIDTHS = (6, 8, 7, 3)


@functools.partial(jax.jit, static_argnums=1)
def draw(key, widths=WIDTHS, gain=1.0):
    params = {}
    for i in range(len(widths) - 1):
        key, first, second = jax.random.split(key, 3)
        kernel = jax.random.normal(first, widths[i : i + 2])
        params[f"Dense_{i}"] = {
            "kernel": gain * kernel / np.sqrt(widths[i]),
            "bias": 0.3 * gain * jax.random.normal(second, widths[i + 1 : i + 2]),
        }
    return params


@jax.jit
def network(params, x):
    for i, layer in enumerate(params.values()):
        x = jnp.dot(x, layer["kernel"], precision="highest") + layer["bias"][None]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, 32)


def loss(params):
    logits = network(params, X)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS))


OPTIMIZERS = {
    "plain": lambda: normax.path_sgd(0.05),
    "momentum, p = 1": lambda: normax.path_sgd(0.05, p=1.0, momentum=0.9),
    "nesterov, p = 1.5, every third step": lambda: normax.path_sgd(
        0.01, network, X, p=1.5, momentum=0.5, nesterov=True, update_every=3
    ),
}


def scaled_by(params, rescaled):
    return jax.tree.map(lambda w, v: v / w, params, rescaled)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_theorem_4_1(optimizer):
    tx = OPTIMIZERS[optimizer]()

    @jax.jit
    @jax.vmap
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=7)[0][0]

    keys = jax.random.split(jax.random.key(0), 6)
    params = jax.vmap(draw)(keys)
    rescaled = jax.vmap(lambda key, w: normax.rescaling.random_rescaling(key, w, 1.0))(
        keys, params
    )
    after, after_rescaled = run(params), run(rescaled)

    def compare(start, start_rescaled, end, end_rescaled):
        # The same factors before and after: each weight's relative change agrees.
        change, change_rescaled = end / start - 1, end_rescaled / start_rescaled - 1
        assert np.median(np.abs(change)) > 1e-3
        size = 1 + np.abs(change)
        assert np.max(np.abs(change_rescaled - change) / size) < 2e-3

    jax.tree.map(compare, params, rescaled, after, after_rescaled)


@pytest.mark.slow
def test_which_optimizers_are_rescaling_invariant():
    params = draw(jax.random.key(3))
    rescaled = normax.rescaling.random_rescaling(jax.random.key(4), params, 1.0)
    fn = functools.partial(network, x=X)
    check = functools.partial(
        normax.testing.assert_rescaling_invariant, steps=5, loss_fn=loss, params=params,
        rescaled=rescaled, fn=fn,
    )  # fmt: skip
    check(normax.path_sgd(0.05, momentum=0.9, nesterov=True, update_every=2))
    for tx in (optax.sgd(0.05), optax.adagrad(0.05)):
        with pytest.raises(AssertionError, match="step 1"):
            check(tx)


# The toy networks of Figure 1: the gradient with respect to every output is -1, the
# step size 1.


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, x):
    grads = jax.grad(lambda params: -jnp.sum(plain_stack(params, x)))(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def plain_stack(params, x):
    for i, kernel in enumerate(params):
        x = jnp.dot(x, kernel, precision="highest")
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def chain(*weights):
    return [np.full((1, 1), weight, np.float32) for weight in weights]


@pytest.mark.slow
def test_figure_1b_weights_explode():
    x = jnp.ones((1, 1))
    balanced, unbalanced = chain(1.0, 1.0, 1.0), chain(100.0, 1e-4, 100.0)
    same = normax.rescaling.rescale_units(balanced, [100.0, 0.01])
    np.testing.assert_allclose(np.stack(same), np.stack(unbalanced), 1e-6)
    exploded = np.stack(step(optax.sgd(1.0), unbalanced, x)).ravel()
    np.testing.assert_allclose(exploded, [100.0, 1e4, 100.0], 1e-3)
    for tx in (normax.path_sgd(1.0), normax.path_sgd(1.0, p=1.0)):
        np.testing.assert_allclose(np.stack(step(tx, balanced, x)).ravel(), 2.0)
        after = np.stack(step(tx, unbalanced, x)).ravel()
        np.testing.assert_allclose(after, [200.0, 2e-4, 200.0], 1e-6)


def test_figure_1c_poor_updates():
    x = jnp.ones((1, 2))
    balanced = [
        jnp.array([[6.0, 1.0], [1.0, 2.0]]),
        jnp.array([[1.0, 1.0], [4.0, 1.0]]),
    ]
    unbalanced = normax.rescaling.rescale_units(balanced, [10.0])
    expected = np.array([[[60, 10], [10, 20]], [[0.1, 0.1], [0.4, 0.1]]])
    np.testing.assert_allclose(np.stack(unbalanced), expected, 1e-6)
    sgd = np.stack(step(optax.sgd(1.0), balanced, x))
    np.testing.assert_allclose(sgd, [[[8, 6], [3, 7]], [[8, 8], [7, 4]]], 1e-6)
    sgd = np.stack(step(optax.sgd(1.0), unbalanced, x))
    expected = [[[60.2, 10.5], [10.2, 20.5]], [[70.1, 70.1], [30.4, 30.1]]]
    np.testing.assert_allclose(sgd, expected, 1e-6)
    tx = normax.path_sgd(1.0)
    after = normax.rescaling.rescale_units(step(tx, balanced, x), [10.0])
    np.testing.assert_allclose(np.stack(step(tx, unbalanced, x)), np.stack(after), 1e-5)
    # By hand: gamma of the first weight is 1 + 1, its gradient -2.
    np.testing.assert_allclose(step(tx, balanced, x)[0][0, 0], 7.0)


@pytest.mark.slow
def test_gauge_freedom():
    # The lecture's z = w4 w3 w2 w1 x with two sets of weights for one function.
    x = jnp.ones((1, 1))
    ones, w = chain(1.0, 1.0, 1.0, 1.0), chain(1.0, 0.01, 100.0, 1.0)
    rescaled = normax.rescaling.rescale_units(ones, [1.0, 0.01, 1.0])
    np.testing.assert_allclose(np.stack(rescaled), np.stack(w), 1e-6)
    np.testing.assert_allclose(np.stack(normax.rescaling.balance(w)), 1.0, 1e-6)
    outputs = [
        [float(plain_stack(step(tx, start, x), x)[0, 0]) for start in (ones, w)]
        for tx in (optax.sgd(0.1), normax.path_sgd(0.1))
    ]
    assert outputs[0][1] > 10 * outputs[0][0]
    np.testing.assert_allclose(outputs[1], 1.1**4, 1e-5)


@pytest.mark.slow
def test_the_unbalanced_start_of_the_paper_trains_as_the_balanced_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 20)).astype(np.float32)
    labels = np.argmax(x @ rng.normal(size=(20, 10)), axis=1)
    params = draw(jax.random.key(0), (20, 64, 64, 10), gain=1.0)
    keys = [0, 94, 96]
    unbalanced = [
        normax.rescaling.random_rescaling(jax.random.key(key), params) for key in keys
    ]
    spread = [float(jnp.max(w["Dense_0"]["kernel"])) for w in unbalanced]
    spread += [float(jnp.max(w["Dense_1"]["kernel"])) for w in unbalanced]
    assert max(spread) > 1e25
    tx = normax.path_sgd(0.05)

    @jax.jit
    @jax.vmap
    def train(params):
        def value(params, batch):
            logits = network(params, jnp.asarray(x)[batch])
            return jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(
                    logits, jnp.asarray(labels)[batch]
                )
            )

        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(value)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), value(params, batch)

        batches = jnp.arange(100)[:, None] * 100 % 1000 + jnp.arange(100)[None]
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        return network(params, x), losses

    all_four = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, *unbalanced)
    outputs, losses = train(all_four)
    before, after = losses[0, 0], losses[0, -1]
    assert after < 0.7 * before, (before, after)
    largest = np.max(np.abs(outputs[0]))
    assert np.max(np.abs(outputs - outputs[:1])) < 1e-4 * largest
