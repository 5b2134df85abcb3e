"""Pruning by paths, against sums over all paths and under rescaling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax
from normax import paths

pytestmark = [pytest.mark.usefixtures("quick_compilation")]

RNG = np.random.default_rng(0)
relu = jax.nn.relu


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X = np.ones(3, np.float32)


def rescaled(params, factors):
    """Rescale the hidden units of a plain network of two layers."""
    into = {name: params[name] * factors for name in ("b", "first")}
    return params | into | {"last": params["last"] / factors[:, None]}


def plain(params, x):
    return relu(x @ params["first"] + params["b"]) @ params["last"]


def wide(width=64):
    shapes = {"b": (width,), "first": (3, width), "last": (width, 2)}
    return {name: draw(*shape) for name, shape in shapes.items()}


@functools.cache
def program(fraction):
    """Return saliencies and the two masks; one program compiles faster than three."""
    saliency = functools.partial(paths.path_saliency, plain)
    mask = functools.partial(paths.path_mask, plain)
    return jax.jit(
        lambda params: (
            saliency(params, X),
            mask(params, X, fraction),
            mask(params, X, fraction, per="layer"),
        )
    )


def mask_of(params, fraction=0.7):
    return program(fraction)(params)[1]


def pruned_entries(mask):
    return np.concatenate([~np.ravel(mask[name]) for name in sorted(mask)])


@pytest.mark.slow
def test_saliency_is_what_the_path_norm_loses():
    # Units are conserved: what enters a unit leaves it. So layers share one sum.
    params = wide()
    got, _, _ = program(0.7)(params)
    norm = normax.path_norm(plain, params, X, p=1)
    into = np.sum(got["first"], 0) + got["b"]
    np.testing.assert_allclose(into, np.sum(got["last"], 1), rtol=3e-6)
    np.testing.assert_allclose(np.sum(got["last"]), norm, rtol=3e-6)
    without = params | {"last": params["last"].copy()}
    without["last"][3, 1] = 0
    lost = paths.path_metric(plain, params, without, X)
    np.testing.assert_allclose(lost, got["last"][3, 1], rtol=3e-6)


def test_the_mask_is_the_same_after_rescaling():
    params = wide()
    mask = mask_of(params)
    powers = np.exp2(RNG.integers(-20, 21, size=64)).astype(np.float32)
    factors = (10.0 ** RNG.uniform(-6, 6, size=64)).astype(np.float32)
    for chosen in (powers, factors):
        again = mask_of(rescaled(params, chosen))
        jax.tree.map(np.testing.assert_array_equal, again, mask)

    def smallest(params):
        sizes = [np.ravel(np.abs(params[name])) for name in ("first", "last")]
        return set(np.argsort(np.concatenate(sizes))[:224].tolist())

    moved = smallest(params) - smallest(rescaled(params, factors))
    assert len(moved) > 40  # magnitude would prune others


def test_the_mask_takes_the_least_salient_of_network_or_layer():
    params = wide()
    saliency, mask, of_layers = program(0.7)(params)
    names = ("first", "last")
    flat = np.concatenate([np.ravel(saliency[name]) for name in names])
    keep = np.concatenate([np.ravel(mask[name]) for name in names])
    assert np.sum(~keep) == round(0.7 * flat.size)
    assert np.max(flat[~keep]) < np.min(flat[keep])
    assert np.all(mask["b"])
    for name in names:
        keep, values = np.asarray(of_layers[name]), np.asarray(saliency[name])
        assert np.sum(~keep) == round(0.7 * keep.size)
        assert np.max(values[~keep]) < np.min(values[keep])


def test_the_mask_orders_kernels_and_matrices_together():
    def network(params, x):
        h = jax.lax.conv_general_dilated(
            x, params["first"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.sum(relu(h), 1) @ params["last"]

    params = {"first": np.float32(1e-3) * draw(2, 3, 4), "last": draw(4, 2)}
    x = np.ones((1, 4, 3), np.float32)
    sizes = {name: np.abs(w.astype(np.float64)) for name, w in params.items()}
    # The kernel of 2 goes over 3 positions, a common factor.
    first = sizes["first"] * sizes["last"].sum(1)
    last = sizes["first"].sum((0, 1))[:, None] * sizes["last"]
    middle = np.median(np.concatenate([first.ravel(), last.ravel()]))
    mask = paths.path_mask(network, params, x, 0.5)
    np.testing.assert_array_equal(mask["first"], first > middle)
    np.testing.assert_array_equal(mask["last"], last > middle)


def test_equal_saliencies_are_pruned_in_the_order_of_the_tree():
    params = {"b": np.zeros(64, np.float32), "first": np.ones((3, 64), np.float32)}
    params["last"] = np.full((64, 2), 1.5, np.float32)  # every one is on 3 paths, not 2
    found = pruned_entries(mask_of(params) | {"b": np.ones(64, bool)})
    expected = np.arange(64 + 5 * 64) < 64 + round(0.7 * 5 * 64)
    expected[:64] = False
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_what_is_pruned_stays_pruned():
    params = wide()
    params["first"][:, 5] = 0  # a unit with a bias alone
    params["b"][5] = 0
    before, weights = np.zeros(384, bool), params
    for fraction in (0.3, 0.7, 0.98):
        mask = mask_of(weights, fraction)
        pruned = pruned_entries(mask)
        assert np.all(pruned >= before) and np.sum(pruned) == round(fraction * 320)
        # Training moves the weights that are left.
        weights = jax.tree.map(lambda w, m: (w + draw(*w.shape)) * m, weights, mask)
        before = pruned


@pytest.mark.slow
def test_an_optimizer_keeps_the_zeros():
    params, mask = wide(), mask_of(wide())
    weights = jax.tree.map(lambda w, m: w * np.asarray(m), params, mask)
    hold = optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, mask))
    optimizer = optax.chain(optax.adamw(0.1), hold)
    state = optimizer.init(weights)
    gradients = jax.tree.map(lambda w: draw(*w.shape), params)
    updates, _ = optimizer.update(gradients, state, weights)
    trained = optax.apply_updates(weights, updates)
    for name, w in trained.items():
        np.testing.assert_array_equal(w != 0, mask[name])


@pytest.mark.few_rows(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_pruned_weights_keep_their_dtype_and_numbers(dtype):
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), wide(8))
    pruned = paths.path_prune(plain, params, X, 0.5, where={"b": True} | NOT_KERNELS)
    assert all(w.dtype == dtype for w in pruned.values())
    assert np.sum(pruned["b"] == 0) == 4
    kept = pruned["b"] != 0
    np.testing.assert_array_equal(pruned["b"][kept], params["b"][kept])
    np.testing.assert_array_equal(pruned["first"], params["first"])


NOT_KERNELS = {"first": False, "last": False}


@pytest.mark.slow
def test_zeros_are_pruned_before_weights_on_no_path():
    params = wide()
    params["first"][:, 5], params["b"][5] = 0, 0  # so no path leads to last[5]
    params["last"][7], params["last"][60, 1] = 0, 0
    keep = mask_of(params, 5 / 320)  # three zeros of first come, and two of last
    np.testing.assert_array_equal(np.flatnonzero(~np.any(keep["first"], 0)), [5])
    np.testing.assert_array_equal(np.argwhere(~keep["last"]), [[7, 0], [7, 1]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(value):
    params = wide()
    params["first"][0, 0] = value
    message = r"params\['first'\] holds 1 that are NaN or infinite; mend them"
    with pytest.raises(ValueError, match=message):
        paths.path_prune(plain, params, X, 0.5)
    pruned = jax.jit(lambda params: paths.path_prune(plain, params, X, 0.5))(params)
    np.testing.assert_array_equal(pruned["first"], params["first"])
    np.testing.assert_array_equal(pruned["last"], params["last"])
