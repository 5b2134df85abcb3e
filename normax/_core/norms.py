r"""Norms and angles of weight vectors, in float32 or better.

Every function here works on one array, over `axes`, and keeps these axes with
length one, so that its results broadcast against the array.

On GPU and TPU the formulas run as they stand. A CPU gains from two changes that
leave the results as they are: sums of squares are taken directly, in one pass
over memory, and repeated with care only if they left the safe range (a branch
costs nothing there, while a GPU would wait for its condition); and the arrays of
a tree are worked on one after the other (`in_turn`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType


def common_dtype(*arrays: Any) -> Any:
    """Return the common dtype, also to users who forbid to imply one."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def at_least_float32(*arrays: jax.typing.ArrayLike) -> tuple[jax.Array, ...]:
    """Return the arrays in their common dtype, float32 at least."""
    cast = [jnp.asarray(array) for array in arrays]
    dtype = common_dtype(jnp.float32, *(array.dtype for array in cast))
    return tuple(array.astype(dtype) for array in cast)


def nonzero(norm: jax.Array) -> jax.Array:
    """Return `norm` with every 0 replaced by 1, to be divided by."""
    # Not where(norm > 0, norm, 1), which would turn a NaN into 1 and so hide it.
    return jnp.where(norm == 0, 1, norm)


def inner_product(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    r"""Return $\langle x, y\rangle = \sum_i x_i y_i$ of every pair of vectors."""
    return jnp.sum(x * y, axis=axes, keepdims=True)


def _in_safe_range(square: jax.Array) -> jax.Array:
    info = jnp.finfo(square.dtype)
    return (square > info.tiny / info.eps**2) & (square < info.max)


@jax.custom_batching.custom_vmap
def _everywhere(condition: jax.Array) -> jax.Array:
    return jnp.all(condition)


@_everywhere.def_vmap
def _everywhere_vmap(axis_size, in_batched, condition):
    # One branch for a whole batch: of one condition for each, `jax.vmap` would make a
    # `select` of both branches, which needs them to be sharded alike.
    del axis_size, in_batched
    return _everywhere(condition), False


def _rescaled_norm(x: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    # All three sums in one pass over memory; powers of two round nothing.
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


def _direct_norm(x: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    square = inner_product(x, x, axes)
    return lax.cond(
        _everywhere(_in_safe_range(square)),
        lambda x, square: jnp.sqrt(square),
        lambda x, square: _rescaled_norm(x, axes=axes),
        x,
        square,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def vector_norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    r"""Return the Euclidean norm of every weight vector.

    $$\|x\| = s^{-1} \Big(\sum_i (s\,x_i)^2\Big)^{1/2}$$

    with the one of three powers of two $s$ that lets no square overflow or
    underflow. Its derivative is $\langle \hat x, \dot x\rangle$, and 0 at
    $x = 0$.
    """
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_direct_norm, axes=axes),
        default=functools.partial(_rescaled_norm, axes=axes),
    )


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


@jax.custom_jvp
def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a / b`, whose derivative does not square `b`; b is not 0."""
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
    sine = jnp.sqrt(inner_product(normal, normal, axes))
    return w_norm, u_norm, u_norm * cosine, u_norm * sine


def _direct_polar(w, u, *, axes):
    w_square, u_square = inner_product(w, w, axes), inner_product(u, u, axes)
    radial = inner_product(u, w, axes) / jnp.sqrt(nonzero(w_square))
    # Pythagoras, unless the difference would cancel more than two bits.
    tangential_square = u_square - radial**2
    safe = _in_safe_range(w_square) & _in_safe_range(u_square)
    return lax.cond(
        _everywhere(safe & (tangential_square > u_square / 4)),
        lambda w, u, squares: (
            jnp.sqrt(squares[0]),
            jnp.sqrt(squares[1]),
            radial,
            jnp.sqrt(squares[2]),
        ),
        lambda w, u, squares: _rescaled_polar(w, u, axes=axes),
        w,
        u,
        (w_square, u_square, tangential_square),
    )


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
    return lax.platform_dependent(
        w,
        u,
        cpu=functools.partial(_direct_polar, axes=axes),
        default=functools.partial(_rescaled_polar, axes=axes),
    )


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


@jax.custom_batching.custom_vmap
def _wait(array: jax.Array, event: jax.Array) -> jax.Array:
    # The condition never holds (no event is negative; a NaN compares false), but
    # XLA cannot know, so `array` is computed after `event`; the square root it
    # holds to be too dear to be computed twice. It drops
    # `lax.optimization_barrier` before it schedules.
    never = jnp.max(event) < 0
    return jnp.where(never, jnp.sqrt(array), array)


@_wait.def_vmap
def _wait_vmap(axis_size, in_batched, array, event):
    # One condition for the whole batch, so that `array` is batched only if it was.
    del axis_size
    return _wait(array, event), in_batched[0]


@jax.custom_jvp
@jax.jit
def _wait_on_cpu(array: jax.Array, event: jax.Array) -> jax.Array:
    return lax.platform_dependent(
        array, event, cpu=_wait, default=lambda array, event: array
    )


_wait_on_cpu.defjvp(
    lambda primals, tangents: (_wait_on_cpu(*primals), tangents[0]),
)


def wait(array: jax.Array, event: jax.Array) -> jax.Array:
    """Return `array`, on a CPU not before `event` is known.

    Args:
      array: Any array.
      event: An array of non-negative numbers.

    Returns:
      `array`, unchanged. Inside `jax.shard_map` nothing waits: an array that is the
      same on all devices must not depend on an event that is not.
    """
    in_shard_map = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if in_shard_map or event.size == 0:
        return array
    return _wait_on_cpu(array, event)


def in_turn(fn: Callable[..., tuple[Any, jax.Array]]) -> Callable[..., Any]:
    """Make the calls of a function over several arrays wait for each other.

    XLA:CPU schedules independent work breadth first. It would write the updates
    of all arrays to fresh memory, which costs more than the arithmetic, before it
    reduces the first; in turn, one array's worth of memory serves all.

    Args:
      fn: Called as `fn(vector_axes, w, u, *others)`; returns a result and the
        event, as in `wait`, after which the next array's update is computed.

    Returns:
      The function that returns the result alone.
    """
    done: list[jax.Array] = []

    def call(vector_axes, w, u, *others):
        u = wait(u, done[-1] if done else inner_product(w, w, vector_axes))
        result, event = fn(vector_axes, w, u, *others)
        done.append(event)
        return result

    return call
