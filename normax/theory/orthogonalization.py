r"""Moments of orthogonalized Gaussian matrices, as Muon's steps are.

A Gaussian matrix has singular values of the Marchenko-Pastur law, and orthogonalization
maps each of them by itself. So the length of the result, and how far it is linear in
the matrix, are integrals over that law.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.checks import check_count

# The degree of what is not linear: the rests of matrices of correlation c overlap by
# c^n. Measured for optax's iterations, n is 4 to 7 for all shapes where c < 0.9.
DEGREE = 5
_NODES = 256


class Orthogonalized(NamedTuple):
    r"""Mean squares of the parts of $O(X) = sX + e$, which are uncorrelated."""

    linear2: jax.Array  # E |s X|^2
    rest2: jax.Array  # E |e|^2


def _iterate(x: jax.Array, coefficients: Any, steps: int) -> jax.Array:
    """Return what optax's Newton-Schulz iterations make of singular values."""
    if isinstance(coefficients, str):
        raise ValueError(
            "the theory of Muon needs the coefficients of Newton and Schulz, but "
            f"ns_coeffs is {coefficients!r}; pass them as a tuple."
        )
    shape = np.shape(coefficients)
    if not 1 <= len(shape) <= 2 or shape[-1] != 3:
        raise ValueError(
            "ns_coeffs must be three numbers, or three for each step, got "
            f"{coefficients!r}; pass (3.4445, -4.7750, 2.0315) for instance."
        )
    steps = check_count("ns_steps", steps, "pass the number of iterations, such as 5")
    table = jnp.asarray(coefficients, x.dtype)
    table = table[-steps:] if table.ndim == 2 else jnp.tile(table, (steps, 1))
    for a, b, c in table:
        x = x * (a + x**2 * (b + x**2 * c))
    return x


def orthogonalized(
    dimension: tuple[jax.Array, jax.Array],
    ns_coeffs: Any,
    ns_steps: int,
    consistent_rms: Any = None,
    share: jax.Array | float = 1.0,
) -> Orthogonalized:
    r"""Return the moments of optax's orthogonalized, scaled Gaussian matrices.

    With $k$ the smaller and $l$ the larger dimension, and singular values $\sqrt{x/k}$
    of matrices of norm one,

    $$\mathbb E\,h(x) = \frac2\pi \int_0^\pi
    \frac{h(x)\,\sin^2\varphi}{x}\,d\varphi, \qquad
    x = 1 + y + 2\sqrt y \cos\varphi, \qquad y = \frac{(k-1)(k+2)}{kl + 2}.$$

    This $y$, at most 1, is the exact variance of $x$; it is $k/l$ in the limit of large
    matrices. `share` is $\|X\|/(\|X\| + \epsilon)$.
    """
    sides = jnp.broadcast_arrays(*(jnp.asarray(x) for x in (*dimension, share)))
    rows, columns, share = (side[..., None] for side in sides)
    smaller, larger = jnp.minimum(rows, columns), jnp.maximum(rows, columns)
    spread = (smaller - 1) * (smaller + 2) / (smaller * larger + 2)
    root = jnp.sqrt(jnp.clip(spread, 0, 1))
    angle = jnp.pi * (jnp.arange(_NODES, dtype=root.dtype) + 0.5) / _NODES
    angle = angle.reshape((1,) * (root.ndim - 1) + (_NODES,))
    x = (1 - root) ** 2 + 4 * root * jnp.cos(angle / 2) ** 2
    weight = 2 / _NODES * jnp.sin(angle) ** 2 / x
    # No singular value is longer than the matrix, where the iterations would diverge.
    singular = jnp.sqrt(jnp.minimum(x / smaller, 1))
    value = _iterate(share * singular, ns_coeffs, ns_steps)
    if consistent_rms is None:
        scale2 = jnp.maximum(1.0, columns / rows)
    else:
        scale2 = larger * consistent_rms**2
    slope = jnp.sum(weight * value * jnp.sqrt(x), -1)
    # A sum of squares: nothing cancels where all singular values are alike.
    rest = jnp.sum(weight * (value - slope[..., None] * jnp.sqrt(x)) ** 2, -1)
    length2 = (smaller * scale2)[..., 0]
    return Orthogonalized(length2 * slope**2, length2 * rest)
