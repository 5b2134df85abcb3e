"""The assertion that two networks are near at all inputs."""

import jax
import jax.numpy as jnp
import pytest

from normax.testing import assert_outputs_near

X = jnp.array([[1.0, -2.0], [0.0, 0.5]])
PARAMS = jnp.array([[0.75], [0.25]])
ROUNDED = jnp.array([[0.5], [0.125]])  # far apart by 2 * 0.375, at these inputs less


def linear(w, x):
    return x @ w


def test_what_is_proven_passes_and_what_is_not_fails():
    assert_outputs_near(linear, PARAMS, ROUNDED, X, atol=0.7501)
    with pytest.raises(
        AssertionError, match=r"atol = 0.74, but the .* is 0.75 for .* 0.0625"
    ):
        assert_outputs_near(linear, PARAMS, ROUNDED, X, 0.74, custom_message="mine")


def test_what_is_no_number_fails():
    with pytest.raises(AssertionError, match="nan"):
        assert_outputs_near(linear, PARAMS, ROUNDED * jnp.nan, X, atol=1.0)


def test_values_are_needed():
    with pytest.raises(RuntimeError, match="call it outside"):
        jax.jit(lambda w: assert_outputs_near(linear, w, ROUNDED, X, 1.0))(PARAMS)
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    with pytest.raises(ValueError, match="shapes without values; pass arrays"):
        assert_outputs_near(linear, PARAMS, ROUNDED, shapes, 1.0)
    with pytest.raises(ValueError, match="atol must be at least 0"):
        assert_outputs_near(linear, PARAMS, ROUNDED, X, -1.0)
