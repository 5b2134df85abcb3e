"""Values that training changes: handed to Path-SGD, and seen, at every step."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype(np.float32)
PARAMS = [
    jax.device_put(RNG.normal(size=shape).astype(np.float32))
    for shape in [(3, 4), (4, 2)]
]


def normalized(params, x, stats):
    hidden = (x @ params[0] - stats["mean"][None]) * jax.lax.rsqrt(stats["var"])[None]
    return jax.nn.relu(hidden) @ params[1]


def stats_at(step):
    rng = np.random.default_rng(step)
    draw = rng.normal(size=(2, 4)).astype(np.float32)
    return {"mean": jnp.asarray(draw[0]), "var": jnp.exp(draw[1])}


def scales_in_float64(params, stats):
    """Return gamma for p = 2, written out."""
    first, last = (np.square(np.asarray(w, np.float64)) for w in params)
    mean, var = (np.asarray(stats[name], np.float64) for name in ("mean", "var"))
    out = last.sum(1)
    into = (first.sum(0) + mean**2) / var
    return [
        np.broadcast_to(out / var, first.shape),
        np.broadcast_to(into[:, None], last.shape),
    ]


@pytest.mark.parametrize("update_every", [1, 3])
def test_each_step_has_the_statistics_of_that_step(update_every):
    calls = []

    def forward(params, x, stats):
        calls.append(1)
        return normalized(params, x, stats)

    tx = normax.scale_by_path_sgd(forward, X, update_every=update_every)
    params, state = PARAMS, tx.init(PARAMS)
    start, traced = jax.tree.map(jnp.shape, state), None
    for step in range(7):
        stats = stats_at(step)
        grads = jax.tree.map(lambda w, s=step: jnp.cos(w + s), params)
        if step % update_every == 0:
            known = params, stats
        updates, state = tx.update(grads, state, params, forward_args=(stats,))
        expected = jax.tree.map(
            lambda g, s: np.float32(g / s), grads, scales_in_float64(*known)
        )
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
        if step == 4:
            # A new transformation whose network closes over the statistics of the step.
            fresh = normax.scale_by_path_sgd(
                lambda params, x: normalized(params, x, known[1]),  # noqa: B023
                X,
            )
            again, _ = fresh.update(grads, fresh.init(known[0]), known[0])
            chex.assert_trees_all_close(updates, again, rtol=1e-5)
        assert jax.tree.map(jnp.shape, state) == start
        chex.assert_trees_all_equal_dtypes(state, tx.init(params))
        traced = traced or len(calls)
        params = optax.apply_updates(params, jax.tree.map(lambda u: 0.1 * u, updates))
    assert len(calls) == traced  # It was compiled once for all steps.


def test_a_scan_over_training_carries_the_state():
    tx = normax.path_sgd(0.1, normalized, X, momentum=0.9, update_every=2)
    stats = jax.tree.map(lambda *s: jnp.stack(s), *map(stats_at, range(6)))

    def step(carry, stats):
        params, state = carry
        updates, state = tx.update(params, state, params, forward_args=(stats,))
        return (optax.apply_updates(params, updates), state), updates

    (_, state), moves = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), stats)
    assert optax.tree.get(state, "count") == 6
    first = jax.tree.map(np.divide, PARAMS, scales_in_float64(PARAMS, stats_at(0)))
    for move, expected in zip(moves, first, strict=True):
        np.testing.assert_allclose(move[0], -0.1 * expected, rtol=1e-5)


def test_what_a_network_closes_over_is_off_by_1e4_when_a_variance_falls():
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

    def closing(params, x):
        return normalized(params, x, stats)

    grads = jax.tree.map(jnp.ones_like, PARAMS)
    old = normax.scale_by_path_sgd(closing, X)
    before, state = old.update(grads, old.init(PARAMS), PARAMS)
    stats["var"] = jnp.full(4, 1e-4)
    after, _ = old.update(grads, state, PARAMS)
    chex.assert_trees_all_equal(before, after)  # It has not seen the change.
    handed = normax.scale_by_path_sgd(normalized, X)
    right, _ = handed.update(grads, handed.init(PARAMS), PARAMS, forward_args=(stats,))
    for wrong, step in zip(after, right, strict=True):
        np.testing.assert_allclose(wrong / step, 1e4, rtol=1e-4)


def test_arguments_that_do_not_fit():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    tx = normax.path_sgd(0.1, normalized, X)
    with pytest.raises(ValueError, match=r"forward_args is \(\); hand them over"):
        tx.update(grads, tx.init(PARAMS), PARAMS)
    plain = normax.path_sgd(0.1)
    with pytest.raises(ValueError, match="there is no `forward`"):
        plain.update(grads, plain.init(PARAMS), PARAMS, forward_args=(stats_at(0),))
    # A network that can do without is still looked at when training begins.
    optional = lambda params, x, stats=None: jnp.tanh(x @ params[0])  # noqa: E731
    with pytest.raises(ValueError, match="applies `tanh`"):
        normax.path_sgd(0.1, optional, X).init(PARAMS)
    later = normax.path_sgd(0.1, lambda w, x, stats: jnp.tanh(x @ w[0]), X)
    state = later.init(PARAMS)
    with pytest.raises(ValueError, match="applies `tanh`"):
        later.update(grads, state, PARAMS, forward_args=(stats_at(0),))


@pytest.mark.slow
@pytest.mark.parametrize("update_every", [1, 2])
def test_optional_statistics(update_every):
    def forward(params, x, stats=None):
        return normalized(
            params, x, stats or {"mean": jnp.zeros(4), "var": jnp.ones(4)}
        )

    tx, grads = (
        normax.scale_by_path_sgd(forward, X, update_every=update_every),
        jax.tree.map(jnp.ones_like, PARAMS),
    )
    stats = stats_at(1)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, forward_args=(stats,))
    expected = [np.float32(1 / s) for s in scales_in_float64(PARAMS, stats)]
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


pure = getattr(nnx, "as_pure", None) or nnx.pure  # by its name since Flax 0.12.8


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@pytest.mark.slow
def test_nnx_optimizer_with_running_statistics():
    model = Network()
    model.eval()
    graphdef, _, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    model.train()

    def forward(params, x, stats):
        return nnx.merge(graphdef, params, stats)(x)

    tx = normax.scale_by_path_sgd(forward, X)
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.scale(-0.01)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(X) - X[:, :2]) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        stats = nnx.state(model, nnx.BatchStat)
        optimizer.update(model, grads, forward_args=(stats,))
        return value, grads

    for _ in range(3):
        before = pure(nnx.state(model, nnx.Param))
        _, grads = step(model, optimizer)
    # The last step is that of a new transformation at the statistics as they are.
    stats = pure(nnx.state(model, nnx.BatchStat))
    assert not np.allclose(jax.tree.leaves(stats)[1], 1)
    fresh = normax.scale_by_path_sgd(lambda w, x: forward(w, x, stats), X)
    grads = pure(grads)
    updates, _ = fresh.update(grads, fresh.init(before), before)
    moved = jax.tree.map(
        lambda new, old: (new - old) / -0.01,
        pure(nnx.state(model, nnx.Param)),
        before,
    )
    chex.assert_trees_all_close(moved, updates, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_linen_with_running_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dense(2)(nn.relu(x))

    model = Model()
    variables = model.init(jax.random.key(0), X, False)
    params, stats = variables["params"], variables["batch_stats"]

    def forward(params, x, stats):
        return model.apply({"params": params, "batch_stats": stats}, x, False)

    tx = normax.scale_by_path_sgd(forward, X)
    grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    for factor in (1.0, 4.0):
        now = jax.tree.map(lambda s: s * factor, stats)  # noqa: B023
        updates, state = tx.update(grads, state, params, forward_args=(now,))
        scales = normax.path_scales(lambda w, x: forward(w, x, now), params, X)  # noqa: B023
        expected = jax.tree.map(lambda s: 1 / s, scales)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def training_nnx(params, x):
    graphdef, _, rest = nnx.split(Network(), nnx.Param, ...)
    return nnx.merge(graphdef, params, rest, copy=True)(x)


def training_linen(params, x):
    norm = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    return norm.apply({"batch_stats": stats}, x @ params[0], mutable="batch_stats")[0]


def training_layer_norm(params, x):
    return nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x @ params[0])


def test_batch_norms_in_training_say_what_to_call():
    state = nnx.state(Network(), nnx.Param)
    jnp.square(X)  # fills a cache of JAX from this line
    for forward, params in ((training_nnx, state), (training_linen, PARAMS)):
        for call in (
            lambda: normax.path_norm(forward, params, X),  # noqa: B023
            lambda: normax.path_sgd(0.1, forward, X).init(params),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"call model\.eval\(\)") as error:
                call()
            assert f"{__file__}:" in str(error.value)
    with pytest.raises(ValueError, match="Leave it out") as error:
        normax.path_norm(training_layer_norm, PARAMS, X)
    assert "model.eval" not in str(error.value)
