"""Layers of many positions, with units of any scale beside units on no path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normax import paths

pytestmark = [pytest.mark.usefixtures("quick_compilation")]

RNG = np.random.default_rng(0)
relu = jax.nn.relu


def dense(params, x):
    h = relu(relu(x[0] @ params["first"]) @ params["middle"])
    return jnp.sum(h @ params["last"], 0)


def convolutional(params, x):
    for name in ("first", "middle", "last"):
        x = relu(x)
        x = jax.lax.conv_general_dilated(
            x,
            params[name][None],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
    return jnp.sum(x, (0, 1))


@pytest.mark.parametrize("forward", [dense, convolutional])
@pytest.mark.parametrize("factor", [1e25, 1e-25])
def test_a_unit_on_no_path_hides_no_other(forward, factor):
    # The squares of the weights of some units are out of the range of float32. Others
    # have incoming or outgoing weights alone, and of the usual size.
    shapes = {"first": (3, 4), "middle": (4, 5), "last": (5, 2)}
    params = {k: RNG.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    params["first"][:, 0], params["last"][1] = 0, 0
    squares = {k: np.square(w.astype(np.float64)) for k, w in params.items()}
    into = np.ones(3) @ squares["first"]
    behind = squares["last"] @ np.ones(2)
    rescaled = {k: w.copy() for k, w in params.items()}
    for name, axis, unit in (("first", -1, 1), ("middle", -1, 0)):
        following = {"first": "middle", "middle": "last"}[name]
        np.moveaxis(rescaled[name], axis, 0)[unit] *= np.float32(factor)
        rescaled[following][unit] /= np.float32(factor)
    x = np.ones((1, 4, 3), np.float32)
    norm = jax.jit(functools.partial(paths.path_norm, forward, inputs=x))(rescaled)
    expected = np.sqrt(4 * into @ squares["middle"] @ behind)
    np.testing.assert_allclose(norm, expected, rtol=3e-6)
    saliencies = jax.jit(
        lambda w: paths.path_saliency(forward, w, x),
    )(rescaled)
    sizes = {k: np.sqrt(square) for k, square in squares.items()}
    into, behind = np.ones(3) @ sizes["first"], sizes["last"] @ np.ones(2)
    expected = 4 * np.outer(into, behind) * sizes["middle"]
    np.testing.assert_allclose(saliencies["middle"], expected, rtol=3e-6)
