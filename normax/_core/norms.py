r"""Norms and angles of weight vectors, in float32 or better.

Every function here sums one array over `axes`. It keeps these axes with length one,
so the results broadcast against the array.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from normax._core.scheduling import in_one_pass, on_cpu


def common_dtype(*arrays: Any) -> Any:
    """Return the common dtype, whatever `jax_numpy_dtype_promotion` says."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def at_least_float32(*arrays: jax.typing.ArrayLike) -> tuple[jax.Array, ...]:
    """Return the arrays in their common dtype, float32 at least."""
    cast = [jnp.asarray(array) for array in arrays]
    dtype = common_dtype(jnp.float32, *(array.dtype for array in cast))
    return tuple(array.astype(dtype) for array in cast)


def nonzero(norm: jax.Array) -> jax.Array:
    """Return `norm` with every 0 replaced by 1, to be divided by."""
    # The condition is not norm > 0, since that would turn a NaN into 1 and hide it.
    return jnp.where(norm == 0, 1, norm)


def inner_product(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    r"""Return $\langle x, y\rangle = \sum_i x_i y_i$ of every pair of vectors."""
    return jnp.sum(x * y, axis=axes, keepdims=True)


def _in_safe_range(square: jax.Array) -> jax.Array:
    info = jnp.finfo(square.dtype)
    return (square > info.tiny / info.eps**2) & (square < info.max)


def _direct_norm(x, *, axes):
    square = inner_product(x, x, axes)
    return lambda: jnp.sqrt(square), _in_safe_range(square)


def _rescaled_norm(x: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    # One pass over memory gives all three sums. Powers of two round nothing.
    scale = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2)
    small, large = x * scale, x / scale
    square = inner_product(x, x, axes)
    return jnp.where(
        _in_safe_range(square),
        jnp.sqrt(square),
        jnp.where(
            square >= 1,
            jnp.sqrt(inner_product(large, large, axes)) * scale,
            jnp.sqrt(inner_product(small, small, axes)) / scale,
        ),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def vector_norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    r"""Return the Euclidean norm of every weight vector.

    $$\|x\| = s^{-1} \Big(\sum_i (s\,x_i)^2\Big)^{1/2}$$

    where $s$ is one of three powers of two, such that no square overflows or
    underflows. The derivative is $\langle \hat x, \dot x\rangle$, and 0 at $x = 0$.
    """
    direct = functools.partial(_direct_norm, axes=axes)
    rescaled = functools.partial(_rescaled_norm, axes=axes)
    return on_cpu(in_one_pass(direct, rescaled), rescaled)(x)


@vector_norm.defjvp
def _vector_norm_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    norm = vector_norm(x, axes)
    return norm, inner_product(x / nonzero(norm), x_dot, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_vector(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    r"""Return the direction of every weight vector, and the inverse of its norm.

    $$\hat x = x / \|x\|, \qquad
    \dot{\hat x} = (\dot x - \langle \hat x, \dot x\rangle\,\hat x) / \|x\|$$

    For $x = 0$ the direction is 0 and the norm counts as 1.
    """
    inverse = 1 / nonzero(vector_norm(x, axes))
    return x * inverse, inverse


@unit_vector.defjvp
def _unit_vector_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    unit, inverse = unit_vector(x, axes)
    radial, relative = inner_product(unit, x_dot, axes), x_dot * inverse
    slope = -radial * inverse
    return (unit, inverse), (relative + slope * unit, slope * inverse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def on_sphere(
    x: jax.Array, radius: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    r"""Return $r\,\hat x$ for every vector, and a number known after its norm.

    A vector whose norm is $r$ stays as it is: rounded at every step, it would creep
    along the sphere.
    """
    norm = vector_norm(x, axes)
    stays = norm == radius
    inverse = jnp.where(stays, 1, 1 / nonzero(norm))
    return x * inverse * jnp.where(stays, 1, radius), inverse


@on_sphere.defjvp
def _on_sphere_jvp(axes, primals, tangents):
    (x, radius), (x_dot, radius_dot) = primals, tangents
    (unit, _), (unit_dot, inverse_dot) = jax.jvp(
        lambda x: unit_vector(x, axes), (x,), (x_dot,)
    )
    projected_dot = unit_dot * radius + unit * radius_dot
    return on_sphere(x, radius, axes), (projected_dot, inverse_dot)


@jax.custom_jvp
def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a / b` for b that is not 0; the derivative does not square b."""
    return a / b


@ratio.defjvp
def _ratio_jvp(primals, tangents):
    (a, b), (a_dot, b_dot) = primals, tangents
    quotient = ratio(a, b)
    return quotient, ratio(a_dot, b) - quotient * ratio(b_dot, b)


def _rescaled_polar(w, u, *, axes):
    w_norm, u_norm = _rescaled_norm(w, axes=axes), _rescaled_norm(u, axes=axes)
    w_unit, u_unit = w / nonzero(w_norm), u / nonzero(u_norm)
    cosine = inner_product(u_unit, w_unit, axes)
    normal = u_unit - cosine * w_unit
    # The cosine is a long sum, whose rounding leaves a radial rest.
    rest = inner_product(normal, w_unit, axes)
    sine = jnp.sqrt(jnp.maximum(inner_product(normal, normal, axes) - rest**2, 0))
    return w_norm, u_norm, u_norm * (cosine + rest), u_norm * sine


def _direct_polar(w, u, *, axes):
    w_square, u_square = inner_product(w, w, axes), inner_product(u, u, axes)
    radial = inner_product(u, w, axes) / jnp.sqrt(nonzero(w_square))
    # Pythagoras' difference is exact enough if it cancels two bits at most.
    tangential_square = u_square - radial**2
    safe = _in_safe_range(w_square) & _in_safe_range(u_square)

    def finish():
        w_norm, u_norm = jnp.sqrt(w_square), jnp.sqrt(u_square)
        return w_norm, u_norm, radial, jnp.sqrt(tangential_square)

    return finish, safe & (tangential_square > u_square / 4)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
def polar_decomposition(
    w: jax.Array, u: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Return the lengths of weights and updates, and the updates' two parts.

    $$\|w\|, \qquad \|u\|, \qquad r = \langle u, \hat w\rangle, \qquad
    t = \|u_\perp\| = \|u - r\,\hat w\|$$

    with $\hat w = 0$ for $w = 0$. The parts have the derivatives

    $$\dot r = \langle \hat w, \dot u\rangle + \langle u_\perp, \dot w\rangle / \|w\|,
    \qquad
    \dot t = \langle \hat u_\perp, \dot u - (r / \|w\|)\, \dot w\rangle.$$
    """
    direct = functools.partial(_direct_polar, axes=axes)
    rescaled = functools.partial(_rescaled_polar, axes=axes)
    return on_cpu(in_one_pass(direct, rescaled), rescaled)(w, u)


@polar_decomposition.defjvp
def _polar_decomposition_jvp(axes, primals, tangents):
    (w, u), (w_dot, u_dot) = primals, tangents
    w_norm, u_norm, radial, tangential = polar_decomposition(w, u, axes)
    w_unit, u_unit = w / nonzero(w_norm), u / nonzero(u_norm)
    slope = radial / nonzero(w_norm)
    u_perp = u - radial * w_unit
    return (w_norm, u_norm, radial, tangential), (
        inner_product(w_unit, w_dot, axes),
        inner_product(u_unit, u_dot, axes),
        inner_product(w_unit, u_dot, axes)
        + inner_product(u_perp / nonzero(w_norm), w_dot, axes),
        inner_product(u_perp / nonzero(tangential), u_dot - slope * w_dot, axes),
    )
