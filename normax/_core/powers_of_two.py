"""Exponents of floats and powers of two, exact and cheap to compile."""

import jax
import jax.numpy as jnp
from jax import lax


def _layout(dtype) -> tuple[type, int, int]:
    info = jnp.finfo(dtype)
    return (jnp.int32 if info.bits == 32 else jnp.int64), info.nmant, info.maxexp - 1


def exponent_of(x: jax.Array) -> jax.Array:
    """Return the exponent of the largest power of two that is at most x > 0."""
    integer, mantissa_bits, bias = _layout(x.dtype)
    # The bits are read, since `jnp.frexp` has many operations, which compile slowly.
    field = lax.shift_right_logical(
        lax.bitcast_convert_type(x, integer), jnp.asarray(mantissa_bits, integer)
    )
    return field.astype(jnp.int32) - bias


def exp2(n: jax.Array, dtype) -> jax.Array:
    """Return $2^n$ exactly, or the nearest power of two that is a normal number.

    `jnp.exp2` rounds.
    """
    integer, mantissa_bits, bias = _layout(dtype)
    field = (lax.clamp(jnp.int32(1 - bias), n, jnp.int32(bias)) + bias).astype(integer)
    return lax.bitcast_convert_type(
        lax.shift_left(field, jnp.asarray(mantissa_bits, integer)), dtype
    )


def halves(n: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Return two numbers whose product is $2^n$, which may be out of range itself."""
    half = lax.shift_right_arithmetic(n, jnp.ones_like(n))
    return exp2(half, dtype), exp2(n - half, dtype)
