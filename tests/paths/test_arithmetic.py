"""Carried-scale numbers against logarithms in float64, far outside of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normax.paths import numbers
from normax.paths.arithmetic import PathArithmetic, divide_by_path_scale
from normax.paths.contraction import contract
from normax.paths.numbers import Scaled

RNG = np.random.default_rng(0)
P = pytest.mark.parametrize("p", [1, 2, 1.5, 3.0, 32.0])


def draw(arithmetic, *shape, spread=60):
    """Return random scaled numbers, zeros among them, and their logarithms."""
    weights = jnp.asarray(np.exp2(RNG.uniform(0, 2, shape)), jnp.float32)
    x = arithmetic.of_weight(weights)
    shift = RNG.integers(-spread, spread, shape)
    x = Scaled(x.root, x.exponent + jnp.asarray(shift, jnp.int32))
    log = arithmetic.p * (np.log(np.asarray(weights, np.float64)) + shift * np.log(4))
    dead = RNG.random(shape) < 0.2
    zero = numbers.zeros(shape, jnp.float32)
    x = jax.tree.map(lambda a, b: jnp.where(dead, a, b), zero, x)
    return x, np.where(dead, -np.inf, log)


def assert_log(arithmetic, x, expected):
    # An ulp of a root is 2p of its power, and three roots are rounded, to half an ulp;
    # large logarithms have an error of their own.
    atol = 3e-6 + 4e-7 * arithmetic.p
    x = Scaled(x.root.astype(jnp.float32), x.exponent)
    assert np.all((x.root == 0) == np.isneginf(expected))
    live = np.isfinite(expected)
    with np.errstate(divide="ignore"):
        got = np.log(np.asarray(x.root, np.float64))
    got = (got + np.asarray(x.exponent) * np.log(2)) * 2 * float(arithmetic.p)
    np.testing.assert_allclose(got[live], expected[live], rtol=0, atol=atol)
    np.testing.assert_allclose(arithmetic.log(x), expected, rtol=3e-7, atol=atol)


def logsum(log, axis, keepdims=False):
    return np.logaddexp.reduce(log, axis=axis, keepdims=keepdims)


@pytest.mark.slow
@P
def test_sums_and_products(p):
    arithmetic = PathArithmetic(p)
    (x, log_x), (y, log_y) = (draw(arithmetic, 20, 30) for _ in range(2))
    assert_log(arithmetic, x, log_x)
    assert_log(arithmetic, arithmetic.add(x, y), np.logaddexp(log_x, log_y))
    assert_log(arithmetic, numbers.multiply(x, y), log_x + log_y)
    assert_log(arithmetic, arithmetic.sum(x, (0,)), logsum(log_x, 0))
    kept = arithmetic.sum(x, (1,), keepdims=True)
    assert_log(arithmetic, kept, logsum(log_x, 1, True))


@pytest.mark.slow
@P
def test_contractions_with_weights_of_any_size(p):
    arithmetic = PathArithmetic(p)
    x, log_x = draw(arithmetic, 40, 1)
    sizes = 10.0 ** RNG.uniform(-30, 30, (40, 30)) * RNG.choice([-1, 1], (40, 30))
    weights = jnp.asarray(np.where(RNG.random((40, 30)) < 0.2, 0, sizes), jnp.float32)
    with np.errstate(divide="ignore"):
        log_w = p * np.log(np.abs(np.asarray(weights, np.float64)))
    got = contract(arithmetic, weights, x, (0,))
    assert_log(arithmetic, got, logsum(log_w + log_x, 0, True))


@pytest.mark.slow
def test_large_contractions_take_one_pass_only_where_it_is_safe():
    arithmetic = PathArithmetic(2)
    weights = RNG.normal(size=(600, 500))
    for spread, factor in ((5, 1.0), (60, 1.0), (5, 1e-25), (5, 1e25), (5, 0.0)):
        x, log_x = draw(arithmetic, 600, 1, spread=spread)
        w = jnp.asarray(weights * factor, jnp.float32)
        with np.errstate(divide="ignore"):
            log_w = 2 * np.log(np.abs(np.asarray(w, np.float64)))
        got = contract(arithmetic, w, x, (0,))
        assert_log(arithmetic, got, logsum(log_w + log_x, 0, True))


@P
def test_roots_and_quotients(p):
    arithmetic = PathArithmetic(p)
    x, log_x = draw(arithmetic, 50, spread=7)
    with np.errstate(over="ignore"):
        root, gamma = np.exp(log_x / p), np.exp(2 * log_x / p)
    np.testing.assert_allclose(arithmetic.pth_root(x), root, rtol=2e-6)
    np.testing.assert_allclose(arithmetic.path_scale(x), gamma, rtol=2e-6)
    update = jax.device_put(RNG.normal(size=50).astype(jnp.float32))
    quotient = divide_by_path_scale(update, *arithmetic.inverse_roots((x,)))
    expected = np.where(gamma == 0, 0, np.asarray(update) / np.where(gamma, gamma, 1))
    np.testing.assert_allclose(quotient, expected, rtol=3e-6)


@pytest.mark.slow
def test_quotients_of_factors_far_apart():
    arithmetic = PathArithmetic(2)
    (x, log_x), (y, log_y) = (draw(arithmetic, 8, 1, spread=13) for _ in range(2))
    y, log_y = Scaled(y.root.T, y.exponent.T), log_y.T
    update = jnp.ones((8, 8))
    with np.errstate(over="ignore"):
        expected = np.exp(-(log_x + log_y))
    expected = np.where(np.isinf(log_x + log_y), 0, expected)
    quotient = divide_by_path_scale(update, *arithmetic.inverse_roots((x, y)))
    representable = (expected == 0) | ((expected > 1e-37) & (expected < 1e38))
    assert np.count_nonzero(representable & (expected != 0)) > 8
    np.testing.assert_allclose(
        np.where(representable, quotient, 0),
        np.where(representable, expected, 0),
        rtol=3e-6,
    )


@pytest.mark.slow
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_a_traced_power_gives_the_same(p):
    arithmetic = PathArithmetic(p)
    (x, _), (y, _) = (draw(arithmetic, 9) for _ in range(2))
    traced = jax.jit(lambda p: PathArithmetic(p).log(PathArithmetic(p).add(x, y)))(p)
    expected = arithmetic.log(arithmetic.add(x, y))
    np.testing.assert_allclose(traced, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    arithmetic = PathArithmetic(2)
    one = numbers.ones((3,), jnp.float32)
    x = arithmetic.of_weight(jnp.array([1.0, bad, 0.0]))
    for result in (
        arithmetic.add(x, one),
        numbers.multiply(x, one),
        arithmetic.sum(x, (0,), keepdims=True),
    ):
        finite = np.isfinite(arithmetic.log(result))
        assert not finite[1 if len(finite) > 1 else 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_number_beside_one_that_is_not_finite_is_wrong(bad):
    arithmetic = PathArithmetic(2)
    got = arithmetic.log(numbers.normalize(arithmetic.of_weight(jnp.array([3.0, bad]))))
    assert not np.isfinite(got[1])
    assert not np.isfinite(got[0]) or np.isclose(got[0], 2 * np.log(3))


@pytest.mark.slow
@pytest.mark.parametrize("p", [3, 4.0, 31.0])
def test_large_contractions_of_high_powers_lose_no_summands(p):
    # Next to the smallest normal number most powers would be rounded to 0.
    small = 2.0 ** (-123 / p)
    weights = np.full((600, 500), small / 4)
    weights[0] = small
    arithmetic = PathArithmetic(p)
    ones = numbers.ones((600, 1), jnp.float32)
    got = contract(arithmetic, jnp.asarray(weights, jnp.float32), ones, (0,))
    log_w = p * np.log(np.asarray(weights, np.float32).astype(np.float64))
    assert_log(arithmetic, got, logsum(log_w, 0, True))


@P
def test_large_contractions_with_roots_whose_squares_are_no_floats(p):
    weights = np.full((600, 500), 1e-4, np.float32)
    roots = np.ones((600, 1), np.float32)
    weights[3], roots[3] = 1e38, 1e-20  # most of the sum: 0.01 each
    weights[5] = 1e-38
    arithmetic = PathArithmetic(p)
    x = Scaled(jnp.asarray(roots), jnp.zeros((1, 1), jnp.int32))
    got = jax.jit(lambda w: contract(arithmetic, w, x, (0,)))(jnp.asarray(weights))
    log = p * np.log(weights.astype(np.float64) * roots.astype(np.float64) ** 2)
    assert_log(arithmetic, got, logsum(log, 0, True))


@pytest.mark.parametrize("p", [1, 2.0])
def test_plain_powers_are_products_in_large_contractions(p):
    arithmetic = PathArithmetic(p)
    ones = numbers.ones((600, 1), jnp.float32)
    program = jax.make_jaxpr(lambda w: contract(arithmetic, w, ones, (0,)))
    assert " pow" not in str(program(jnp.ones((600, 500))))


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True])
def test_derivatives_of_large_contractions_of_any_size(mapped):
    arithmetic = PathArithmetic(2)
    sizes = RNG.normal(size=(600, 500))
    sizes[:, 0] *= 1e25
    weights = jnp.asarray(sizes, jnp.float32)
    roots = np.ones((600, 1))
    roots[7] = 1e-25
    x = Scaled(jnp.asarray(roots, jnp.float32), jnp.zeros((1, 1), jnp.int32))

    def log(weights):
        return jnp.sum(arithmetic.log(contract(arithmetic, weights, x, (0,))))

    slope = jax.grad(log)
    slope = jax.vmap(slope)(weights[None])[0] if mapped else slope(weights)
    w = np.asarray(weights, np.float64)
    values = w**2 * roots**4
    expected = 2 * values / w / values.sum(0)
    np.testing.assert_allclose(slope, expected, 2e-5, 1e-37)
    _, change = jax.jvp(log, (weights,), (weights,))
    np.testing.assert_allclose(change, 2 * 500, 1e-5)


def test_exponents_of_factors_are_added_before_they_are_applied():
    arithmetic = PathArithmetic(2)
    one = jnp.ones((1, 1))
    for exponent in (130, 300, -250):
        factors = (
            Scaled(one, jnp.full((1, 1), exponent, jnp.int32)),
            Scaled(one, jnp.full((1, 1), 3 - exponent, jnp.int32)),
        )
        got = divide_by_path_scale(one, *arithmetic.inverse_roots(factors))
        np.testing.assert_allclose(got, 2.0**-12)
