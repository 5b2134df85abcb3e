"""Path scales of large dense networks: one pass over the weights, two where it must."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax._core.programs import called_programs
from normax.paths import programs
from normax.paths.feed_forward import dense_stack
from normax.paths.norm import scale_factors

pytestmark = pytest.mark.few_rows(1)

# A factor of one hidden unit, and whether one pass does.
UNITS = pytest.mark.parametrize(("factor", "does"), [(1.0, True), (1e25, False)])


@pytest.fixture(autouse=True)
def all_networks_are_large(monkeypatch):
    monkeypatch.setattr(programs, "LARGE", 1)


def network(factor=1.0, widths=(7, 6, 5, 3), seed=0):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(widths)
    params = [rng.normal(size=shape) * (2 / shape[0]) ** 0.5 for shape in pairs]
    params[0][:, 1] *= factor
    params[1][1] /= factor
    return [jnp.asarray(w, jnp.float32) for w in params]


def numpy_scales(params):
    squares = [np.square(np.asarray(w, np.float64)) for w in params]
    into, out = [np.ones(len(squares[0]))], [np.ones(squares[-1].shape[1])]
    for w in squares:
        into.append(into[-1] @ w)
    for w in reversed(squares):
        out.insert(0, w @ out[0])
    return [np.outer(into[i], out[i + 1]) for i in range(len(squares))]


def one_pass_does(params):
    forward, example = dense_stack(params)
    factors = scale_factors(forward, params, example, 2.0, direct=True)
    return all(bool(jnp.all(x == x)) for x in jax.tree.leaves(factors))


def transformation():
    """Return a transformation whose program is its own."""
    return normax.scale_by_path_sgd(lambda w, x: forward(w, x), jnp.ones((1, 7)))


def forward(params, x):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


@pytest.mark.slow
@UNITS
def test_updates_are_divided_by_the_path_scales(factor, does):
    params, tx = network(factor), transformation()
    assert one_pass_does(params) == does
    scales = numpy_scales(params)
    updates = [jnp.asarray(np.clip(s, 1e-30, 1e30), jnp.float32) for s in scales]
    expected = [
        np.asarray(u, np.float64) / s for u, s in zip(updates, scales, strict=True)
    ]
    got, _ = tx.update(updates, tx.init(params), params)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6)


def test_what_is_not_finite_is_not_hidden():
    params, tx = network(), transformation()
    params[1] = params[1].at[2, 3].set(jnp.nan)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jnp.all(jnp.isnan(updates[0]))


@UNITS
@pytest.mark.slow
def test_derivatives_are_those_of_two_passes(factor, does, monkeypatch):
    params = network(factor)

    def derivative():
        tx = transformation()
        state = tx.init(params)

        def total(params):
            updates, _ = tx.update([jnp.ones_like(w) for w in params], state, params)
            return jnp.log(jnp.sum(updates[2][0]))

        return jax.grad(total)(params)

    got = derivative()
    monkeypatch.setattr(programs, "LARGE", 2**30)
    for a, b in zip(got, derivative(), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7 * np.abs(b).max())


@pytest.mark.slow
def test_one_unusual_network_of_many():
    networks = [network(factor, seed=seed) for seed, factor in enumerate((1, 1e25, 1))]
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *networks)
    tx = transformation()
    state = tx.init(networks[0])
    one = lambda params: tx.update(params, state, params)[0]  # noqa: E731
    together = jax.vmap(one)(stacked)
    # All share one conditional, or else both branches of it would be computed.
    program = jax.make_jaxpr(jax.vmap(one))(stacked)
    assert any(max(sizes) > 50 for sizes in conditionals(program.jaxpr))
    for i, params in enumerate(networks):
        for a, b in zip(one(params), together, strict=True):
            np.testing.assert_allclose(a, b[i], rtol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_one_pass_does_for_deep_networks(scale):
    params = [scale * w for w in network(widths=(8,) * 100)]
    assert one_pass_does(params)


def conditionals(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            yield [len(branch.eqns) for branch in called_programs(eqn)]
        for inner in called_programs(eqn):
            yield from conditionals(inner)


@pytest.mark.parametrize("update_every", [1, 10])
def test_conditionals_stay_on_a_gpu(update_every):
    """One branch of each computes nothing, or else XLA for GPUs computes both."""
    params = network(widths=(9, 8, 7))
    tx = normax.scale_by_path_sgd(update_every=update_every)
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    sizes = list(conditionals(program.jaxpr))
    assert sum(max(pair) > 50 for pair in sizes) == 1
    assert all(min(pair) == 0 for pair in sizes)
