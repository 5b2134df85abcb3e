"""Path scales of large dense networks: one pass over the weights, two where it must.

On an NVIDIA GPU sums are taken in float64, which needs no second pass. These tests take
both ways on a CPU.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax._core.programs import called_programs
from normax.paths import contraction, programs
from normax.paths.arithmetic import PathArithmetic
from normax.paths.feed_forward import dense_stack
from normax.paths.norm import scale_factors
from normax.paths.numbers import Scaled

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
def test_updates_are_divided_by_the_path_scales(factor, does, every_form):
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(value, every_form):
    params, tx = network(), transformation()
    params[1] = params[1].at[2, 3].set(value)
    updates, _ = tx.update([jnp.ones_like(w) for w in params], tx.init(params), params)
    for update, scale in zip(updates, numpy_scales(params), strict=True):
        assert np.all(np.isnan(update[~np.isfinite(scale)]))
        assert np.any(np.isnan(update)) == np.any(~np.isfinite(scale))


@UNITS
@pytest.mark.slow
def test_derivatives_are_those_of_two_passes(factor, does, every_form, monkeypatch):
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


def conditionals(jaxpr, device="cpu"):
    """Return the sizes of the branches of each conditional in a device's program."""
    for eqn in jaxpr.eqns:
        inner = list(called_programs(eqn))
        if eqn.primitive.name == "cond":
            platforms = eqn.params.get("branches_platforms")
            if platforms:
                named = [device in (names or ()) for names in platforms]
                inner = [inner[named.index(True) if any(named) else -1]]
            else:
                yield [len(branch.eqns) for branch in inner]
        for program in inner:
            yield from conditionals(program, device)


@pytest.mark.parametrize("update_every", [1, 10])
@pytest.mark.parametrize(("p", "device"), [(2, "cpu"), (2, "cuda"), (3, "cuda")])
def test_conditionals_stay_on_a_gpu(update_every, p, device):
    """One branch of each computes nothing, or else XLA for GPUs computes both."""
    params = network(widths=(9, 8, 7))
    tx = normax.scale_by_path_sgd(p=p, update_every=update_every)
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    sizes = list(conditionals(program.jaxpr, device))
    assert all(min(pair) == 0 for pair in sizes)
    in_float64 = (p, device) == (2, "cuda")
    assert sum(max(pair) > 50 for pair in sizes) == (not in_float64)
    assert len(sizes) == (not in_float64) + (update_every > 1)


# Weights and path values of sizes up to the ends of the range of float32.
EXTREME = [1.0, 1e37, 1e-36]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("of_weights", EXTREME)
@pytest.mark.parametrize("spread", [0, 30, 60])
def test_sums_of_any_size(p, of_weights, spread, every_form):
    rng = np.random.default_rng(spread)
    w = rng.choice([-1, 1], (50, 7)) * of_weights
    # Units differ by a factor of up to 10 ** spread, and weights by half as much.
    w *= 10.0 ** -rng.uniform(0, 1 if of_weights < 1 else spread / 2, size=w.shape)
    w = w.astype(np.float32)
    root = 10.0 ** -rng.uniform(0, spread / 2, size=(50, 1)).astype(np.float32)
    arithmetic = PathArithmetic(p)
    x = Scaled(jnp.asarray(root), jnp.full((1, 1), 1000, jnp.int32))
    got = contraction.contract(arithmetic, jnp.asarray(w), x, (0,))
    assert got.root.dtype == jnp.float32
    terms = np.log2(np.abs(w.astype(np.longdouble))) * p
    terms += 2 * p * np.log2(root.astype(np.longdouble))
    expected = np.log2(np.sum(np.exp2(terms), axis=0)) + 2 * p * 1000
    logarithm = np.log2(np.longdouble(got.root)) + np.longdouble(got.exponent)
    np.testing.assert_allclose(2 * p * logarithm[0], expected, atol=2e-6, rtol=0)
