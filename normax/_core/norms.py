r"""Norms and angles of weight vectors, in float32 or better.

Every function here sums one array over `axes`. It keeps these axes with length one,
so the results broadcast against the array.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.scheduling import (
    in_one_pass,
    in_shard_map,
    in_turn,
    on_cpu,
    sums,
)


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


def square_root(x: jax.Array) -> jax.Array:
    """Return the root, and 0 with derivative 0 where rounding left nothing above 0."""
    # The condition is not x > 0, since that would turn a NaN into 0 and hide it.
    return jnp.where(x <= 0, 0, jnp.sqrt(jnp.where(x <= 0, 1, x)))


def hypotenuse(*parts: jax.typing.ArrayLike) -> jax.Array:
    r"""Return $(\sum_i x_i^2)^{1/2}$ of a few arrays, where no square leaves the range.

    The derivative is 0 where all of them are.
    """
    sizes = [jnp.abs(part) for part in parts]
    largest = lax.stop_gradient(functools.reduce(jnp.maximum, sizes))
    # Powers of two round nothing: small additions to a large side are kept as well as
    # in a plain sum of squares.
    unit = 5 * jnp.finfo(largest.dtype).maxexp // 16
    scale = jnp.where(largest > 2.0**unit, 4.0**unit, 1.0)
    scale = jnp.where(largest < 2.0**-unit, 4.0**-unit, scale).astype(largest.dtype)
    squares = [(size / scale) ** 2 for size in sizes]
    return scale * square_root(functools.reduce(jnp.add, squares))


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
    square, of_small, of_large = sums((x * x, small * small, large * large), axes)
    return jnp.where(
        _in_safe_range(square),
        jnp.sqrt(square),
        jnp.where(square >= 1, jnp.sqrt(of_large) * scale, jnp.sqrt(of_small) / scale),
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


@jax.custom_jvp
def on_sphere(
    x: jax.Array, norm: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Return $r\,x / \|x\|$ for every vector, and a number known after its norm.

    A vector whose norm is $r$ stays as it is: rounded at every step, it would creep
    along the sphere.
    """
    stays = norm == radius
    inverse = jnp.where(stays, 1, 1 / nonzero(norm))
    return x * inverse * jnp.where(stays, 1, radius), inverse


@on_sphere.defjvp
def _on_sphere_jvp(primals, tangents):
    (x, norm, radius), (x_dot, norm_dot, radius_dot) = primals, tangents
    inverse = 1 / nonzero(norm)
    unit, slope = x * inverse, -norm_dot * inverse
    projected_dot = (x_dot * inverse + slope * unit) * radius + unit * radius_dot
    return on_sphere(x, norm, radius), (projected_dot, slope * inverse)


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
    rest, square = sums((normal * w_unit, normal * normal), axes)
    sine = jnp.sqrt(jnp.maximum(square - rest**2, 0))
    return w_norm, u_norm, u_norm * (cosine + rest), u_norm * sine


def _direct_polar(w, u, *, axes):
    w_square, u_square, product = sums((w * w, u * u, u * w), axes)
    radial = product / jnp.sqrt(nonzero(w_square))
    # Pythagoras' difference is exact enough if it cancels two bits at most.
    tangential_square = u_square - radial**2
    safe = _in_safe_range(w_square) & _in_safe_range(u_square)
    w_norm, u_norm = jnp.sqrt(w_square), jnp.sqrt(u_square)
    tangential = jnp.sqrt(jnp.maximum(tangential_square, 0))
    safe &= tangential_square > u_square / 4
    return (w_norm, u_norm, radial, tangential), safe


class _Wanted(NamedTuple):
    """What `finish_polar_parts` is to compute, the same in every call."""

    finish: Callable[..., tuple[jax.Array, ...]]
    prepare: Callable[..., tuple[jax.Array, ...]]
    axes: tuple[tuple[int, ...], ...]

    def finished(self, decompose, rows, care=True):
        return [
            self.finish(axes, decompose(*self.prepare(*row[:2]), axes=axes), care, *row)
            for axes, row in zip(self.axes, rows, strict=True)
        ]


def _at_once(wanted, now, rows):
    def direct(rows):
        safe = []

        def decompose(w, u, axes):
            parts, right = _direct_polar(w, u, axes=axes)
            safe.append(right)
            return parts

        results = wanted.finished(decompose, rows, care=False)
        return lambda: results, safe

    def careful(rows):
        return wanted.finished(_rescaled_polar, rows)

    measure = in_one_pass(direct, careful)
    if now is None:
        return measure(rows)

    def measured(rows):
        cast = lambda new, old: new.astype(old.dtype)  # noqa: E731
        return jax.tree.map(cast, measure(rows), [row[2:] for row in rows])

    return lax.cond(now, measured, lambda rows: [row[2:] for row in rows], rows)


def _one_by_one(wanted, now, rows):
    @in_turn
    def measured(axes, *row):
        (result,) = _at_once(wanted._replace(axes=(axes,)), now, [row])
        return (result, row[1]), result[0]

    found = [measured(a, *row) for a, row in zip(wanted.axes, rows, strict=True)]
    return [result for result, _ in found], [u for _, u in found]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _finish_polar_parts(wanted, apart, now, rows):
    one_by_one = functools.partial(_one_by_one, wanted)

    def at_once(now, rows):
        return _at_once(wanted, now, rows), [row[1] for row in rows]

    return (one_by_one if apart else on_cpu(one_by_one, at_once))(now, rows)


@_finish_polar_parts.defjvp
def _finish_polar_parts_jvp(wanted, apart, primals, tangents):
    def plainly(now, rows):
        results = wanted.finished(polar_decomposition, rows)
        if now is not None:
            choose = lambda new, old: jnp.where(now, new.astype(old.dtype), old)  # noqa: E731
            results = jax.tree.map(choose, results, [row[2:] for row in rows])
        return results, [row[1] for row in rows]

    found = _finish_polar_parts(wanted, apart, *primals)
    return found, jax.jvp(plainly, primals, tangents)[1]


def finish_polar_parts(
    finish: Callable[..., tuple[jax.Array, ...]],
    rows: Sequence[tuple[Any, ...]],
    prepare: Callable[..., tuple[jax.Array, ...]] = at_least_float32,
    now: jax.Array | None = None,
) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """Decompose the updates of all arrays, with one condition for the careful pass.

    Args:
      finish: Called as `finish(axes, parts, care, w, u, *others)` with the parts of
        `polar_decomposition`. It returns a tuple whose first array is not negative.
        Without `care`, no radial part is longer than the double of the tangential one.
        It must be the same function in every call.
      rows: For each array the axes, the weights, the updates, and others.
      prepare: Takes weights and updates to what is decomposed.
      now: Whether anything is computed, if that is not known before. If not, the
        results are the others.

    Returns:
      The results, and the updates: to be used in place of the ones given, since on a
      CPU each is computed when the result before is known.
    """
    if not rows:
        return [], []
    wanted = _Wanted(finish, prepare, tuple(row[0] for row in rows))
    # In `jax.shard_map` an array may vary over devices where another must not.
    return _finish_polar_parts(wanted, in_shard_map(), now, [row[1:] for row in rows])


def _all_parts(axes, parts, care, w, u):
    return parts


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
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
    ((w_norm, u_norm, radial, tangential),), _ = finish_polar_parts(
        _all_parts, [(axes, w, u)]
    )
    return w_norm, u_norm, radial, tangential


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
