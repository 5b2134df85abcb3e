"""Solutions of symmetric systems that may be singular or indefinite."""

import functools

import jax
import jax.numpy as jnp

from normax._core.norms import nonzero
from normax._core.programs import full_precision


def _equilibrate(matrix: jax.Array) -> jax.Array:
    """Return factors of rows and columns that make their largest entries nearly 1."""
    scale = jnp.ones_like(matrix[0])
    for _ in range(3):
        largest = jnp.max(jnp.abs(scale[:, None] * matrix * scale[None]), axis=1)
        scale = scale / jnp.sqrt(nonzero(largest))
    return scale


def _decompose(matrix, damping, rtol, saddle_free):
    if saddle_free:
        eigenvalues, vectors = jnp.linalg.eigh(matrix)
        curvatures = jnp.abs(eigenvalues) + damping
    else:
        # Parameters may differ in units. The curvature of one may then be as little as
        # the rounding of another's, but it is no rounding. In units in which all
        # curvatures are alike, the comparison below tells the two apart.
        matrix = matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype)
        scale = _equilibrate(matrix)
        scaled = scale[:, None] * matrix * scale[None]
        eigenvalues, vectors = jnp.linalg.eigh(scaled)
        curvatures, vectors = eigenvalues, scale[:, None] * vectors
    size = jnp.abs(curvatures)
    kept = size > rtol * jnp.max(size)
    inverses = jnp.where(kept, 1 / jnp.where(kept, curvatures, 1), 0)
    return eigenvalues, vectors, inverses


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def solve(
    matrix: jax.Array,
    vector: jax.Array,
    damping: jax.Array,
    rtol: jax.Array,
    saddle_free: bool,
) -> jax.Array:
    r"""Return $(A + \mu I)^{-1} x$, or $(|A| + \mu I)^{-1} x$, of a symmetric matrix.

    Eigenvalues count as 0 up to `rtol` times the largest. The derivative is finite also
    where eigenvalues meet. Derivation: docs/theory/second_order.md.
    """
    _, vectors, inverses = _decompose(matrix, damping, rtol, saddle_free)
    return vectors @ (inverses * (vectors.T @ vector))


@solve.defjvp
@full_precision()
def _solve_jvp(saddle_free, primals, tangents):
    matrix, vector, damping, rtol = primals
    matrix_dot, vector_dot, damping_dot, _ = tangents
    eigenvalues, vectors, inverses = _decompose(matrix, damping, rtol, saddle_free)
    solution = inverses * (vectors.T @ vector)
    change = vectors.T @ matrix_dot @ vectors
    if saddle_free:
        e = eigenvalues
        size = jnp.abs(e)
        change *= (e[:, None] + e[None]) / nonzero(size[:, None] + size[None])
        shift = damping_dot * solution
    else:
        shift = vectors.T @ (damping_dot * (vectors @ solution))
    change = vectors.T @ vector_dot - change @ solution - shift
    return vectors @ solution, vectors @ (inverses * change)
