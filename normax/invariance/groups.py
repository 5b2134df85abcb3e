r"""Arrays that are scale-invariant only together: powers of one factor on each.

Differentiate $L(\alpha^{k_1} w_1, \dots, \alpha^{k_m} w_m)$ with respect to $\alpha$ at
1: the loss does not change exactly if $\sum_i k_i \langle w_i, \nabla_i L\rangle = 0$
everywhere. So the powers are in the null space of the matrix of these inner products,
random points by arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax.invariance.detection import Loss, rounding_of

# The gradient is taken at more points than there are arrays.
MOST_ARRAYS = 128
_SMALLEST = 1e-5  # what has less influence than this share of the largest has none
_LARGEST_POWER = 4


class JointScaleInvariance(NamedTuple):
    r"""Arrays whose scales the loss does not see if they change together.

    $$L(\alpha^{k_1} w_1, \dots, \alpha^{k_m} w_m) = L(w_1, \dots, w_m)$$

    Powers of 1 are one weight vector that is kept as several arrays, such as a kernel
    and its bias in front of layer norm. Powers of 1 and -1 are a product.

    Attributes:
      names: Paths of the arrays.
      powers: Their powers $k$, integers.
      radial: $|\sum_i k_i \langle w_i, \nabla L\rangle|$ in units of
        $(\sum_i k_i^2 \|w_i \odot \nabla L\|^2)^{1/2}$, in quadratic mean.
      change: Largest change of the loss as they were rescaled, in units of
        $\sum_i |k_i| \|w_i \odot \nabla L\|$.
      allowed: The largest such change that counts as rounding.
    """

    names: tuple[str, ...]
    powers: tuple[int, ...]
    radial: float
    change: float
    allowed: float

    def __str__(self) -> str:
        terms = (
            name if power == 1 else f"{name} ** {power}"
            for name, power in zip(self.names, self.powers, strict=True)
        )
        how = "together" if set(self.powers) == {1} else "as powers of one factor"
        return (
            f"scale-invariant only {how}: {', '.join(terms)} "
            f"(radial {self.radial:.0e}, change {self.change:.0e} <= "
            f"{self.allowed:.0e})"
        )


def _pivots(rows: np.ndarray) -> list[int]:
    """Choose as many columns as there are rows, far from dependent."""
    chosen: list[int] = []
    for _ in rows:
        sizes = np.linalg.norm(rows, axis=0)
        chosen.append(int(np.argmax(sizes)))
        direction = rows[:, chosen[-1]] / sizes[chosen[-1]]
        rows = rows - np.outer(direction, direction @ rows)
    return chosen


def _powers(sums: np.ndarray, rtol: float) -> list[np.ndarray]:
    """Find small integers for which combinations of columns vanish in all rows."""
    scales = np.sqrt(np.mean(sums**2, 0))
    _, sizes, directions = np.linalg.svd(sums / scales)
    null = directions[sizes <= rtol * sizes[0]]
    if not len(null):
        return []
    # Each row of the reduced form has one column for itself, where it is 1.
    pivots = _pivots(null)
    rows = np.linalg.solve(null[:, pivots], null) / scales * scales[pivots][:, None]
    found = []
    for row in rows:
        row = np.where(np.abs(row) < 0.1, 0, row)
        row = row / np.min(np.abs(row[row != 0]))
        powers = np.round(row).astype(int)
        if np.sum(powers) < 0 or (np.sum(powers) == 0 and powers[powers != 0][0] < 0):
            row, powers = -row, -powers
        exact = np.all(np.abs(row - powers) <= 0.1 * np.abs(powers))
        if exact and np.max(powers) <= _LARGEST_POWER and np.sum(powers != 0) > 1:
            found.append(powers)
    return found


def joint_invariances(
    loss: Loss,
    products: Callable[..., tuple[dict[int, np.ndarray], Any]],
    key: jax.Array,
    positions: list[int],
    limits: tuple[float, float],
) -> tuple[JointScaleInvariance, ...]:
    """Find groups among the arrays that are not scale-invariant by themselves.

    Args:
      loss: The loss.
      products: As `radial_products` returns it.
      key: Key for the random parameters.
      positions: The arrays, by their positions among the leaves.
      limits: Largest ratio of a candidate, and of one that is not rounded.

    Returns:
      The groups whose rescaling does not change the loss.
    """
    near, strict = limits
    if len(positions) < 2:
        return ()
    rows = []
    for point_key in jax.random.split(key, len(positions) + 4):
        arrays, point = products(point_key)
        rows.append([(np.sum(arrays[i]), np.linalg.norm(arrays[i])) for i in positions])
    table = np.array(rows)
    table /= np.linalg.norm(table[..., 1], axis=1)[:, None, None]
    sums, sizes = np.sqrt(np.mean(table**2, 0)).T
    alone = sums <= near * sizes
    kept = np.flatnonzero(~alone & (sizes > _SMALLEST * np.max(sizes)))
    if len(kept) < 2:
        return ()
    found = []
    for powers in _powers(table[:, kept, 0], strict):
        total = table[:, kept, 0] @ powers
        size = np.sqrt(table[:, kept, 1] ** 2 @ powers**2)
        radial = float(np.sqrt(np.mean((total / size) ** 2)))
        pairs = zip(kept, powers, strict=True)
        members = {positions[j]: int(k) for j, k in pairs if k}
        unit = sum(abs(k) * np.linalg.norm(arrays[i]) for i, k in members.items())
        change, rounding = _change(loss, point, members)
        group = JointScaleInvariance(
            names=tuple(loss.names[i] for i in members),
            powers=tuple(members.values()),
            radial=radial,
            change=change / float(unit),
            allowed=4 * max(strict, radial) + rounding / float(unit),
        )
        if radial <= near and group.change <= group.allowed:
            found.append(group)
    return tuple(found)


def _change(loss: Loss, point: Any, powers: dict[int, int]) -> tuple[float, float]:
    """Return the largest change of the loss, and what rounding makes of it."""
    leaves = loss.treedef.flatten_up_to(point)
    value = loss.compiled(point)
    changes = []
    for base in (0.5, 2.0, 4.0):
        rescaled = [
            leaf * jnp.asarray(base ** powers[i], leaf.dtype) if i in powers else leaf
            for i, leaf in enumerate(leaves)
        ]
        other = loss.compiled(loss.treedef.unflatten(rescaled))
        changes.append(abs(float(other) - float(value)))
    return float(np.max(changes)), rounding_of(value)
