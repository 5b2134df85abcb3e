r"""Sums of $w \odot \nabla L$, which show the scale-invariant vectors of an array.

Derivation: docs/theory/invariance.md.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree
from normax.invariance.rescalings import rescalings

# Arrays that are nearly scale-invariant are enlarged by this factor.
LARGER = 8.0


class RadialSums(NamedTuple):
    r"""Sums over a set of axes, compared with what they would be by chance.

    Attributes:
      axes: The axes $S$ that are summed over.
      radial: As in `ArrayScaleInvariance`, over vectors along these axes.
      size: $\sum_v (\sum_S P^2)^{1/2}$ over all vectors $v$, with
        $P = w \odot \nabla L$.
      vectors: Number of vectors. Those of small products count less.
    """

    axes: tuple[int, ...]
    radial: float
    size: float
    vectors: float


def radial_sums(products: np.ndarray, axes: tuple[int, ...]) -> RadialSums:
    """Sum the products over `axes`, and their squares."""
    largest = np.max(np.abs(products), initial=0.0)
    if largest == 0:
        return RadialSums(axes, math.nan, 0.0, 0.0)
    products = products / largest
    squares = np.sum(products**2, axis=axes)
    total = np.sum(squares)
    radial = np.sqrt(np.sum(np.sum(products, axis=axes) ** 2) / total)
    size = largest * np.sum(np.sqrt(squares))
    vectors = total**2 / np.sum(squares**2)
    return RadialSums(axes, float(radial), float(size), float(vectors))


def log10_chance(radial: float, vectors: float) -> float:
    """Decimal logarithm of the probability of so small a ratio with random signs."""
    # P(chi_n^2 <= n t^2) is about (n t^2 / 2)^(n/2) / Gamma(n/2 + 1).
    half = vectors / 2
    natural = half * math.log(half * radial**2) - math.lgamma(half + 1)
    return min(natural / math.log(10), 0.0)


def sets_of_axes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    # Small sets come first, and `"unit"` before sets of its size. Axes of length 1 are
    # left out: a vector of a single number is nothing but its scale.
    long = [axis for axis, length in enumerate(shape) if length > 1]
    unit = tuple(axis for axis in long if axis < len(shape) - 1)
    sets = (
        axes
        for length in range(1, len(long) + 1)
        for axes in itertools.combinations(long, length)
    )
    return sorted(sets, key=lambda axes: (len(axes), axes != unit))


def word(
    axes: tuple[int, ...], shape: tuple[int, ...], in_tree: bool
) -> str | tuple[int, ...]:
    long = tuple(axis for axis, length in enumerate(shape) if length > 1)
    if axes == tuple(axis for axis in long if axis < len(shape) - 1):
        return "unit"
    # If the parameters are one array of rank one, `"layer"` leaves it alone.
    return "layer" if axes == long and (in_tree or len(shape) > 1) else axes


def perturb(w: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Multiply by random positive numbers, and draw anew what is 0; then scale."""
    noise = rng.normal(size=w.shape)
    size = (
        np.sqrt(np.mean(w**2))
        if np.any(w)
        else 0.5 / math.sqrt(math.prod(w.shape[:-1]) or 1)
    )
    return scale * np.where(w == 0, size * noise, w * np.exp(0.5 * noise))


class Loss(NamedTuple):
    """A loss as a function of the floating-point arrays among its parameters."""

    compiled: Callable[[PyTree], Any]
    treedef: Any
    names: list[str]
    leaves: list[Any]
    positions: list[int]

    def merge(self, floats: Sequence[Any]) -> PyTree:
        merged = dict(enumerate(self.leaves)) | dict(
            zip(self.positions, floats, strict=True)
        )
        return self.treedef.unflatten(merged.values())


Products: TypeAlias = dict[int, np.ndarray]  # w * gradient, by position


def radial_products(loss: Loss) -> Callable[..., tuple[Products, PyTree]]:
    """Return the function that takes the gradient at random parameters."""
    # The user may have compiled the loss already. So it is compiled, and not its
    # gradient.
    value_and_grad = jax.value_and_grad(lambda w: loss.compiled(loss.merge(w)))

    def products(key, enlarged=frozenset()):
        rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
        floats = []
        for i in loss.positions:
            w = jnp.asarray(loss.leaves[i])
            scale = LARGER if i in enlarged else 1.0
            perturbed = perturb(np.asarray(w, np.float64), scale, rng)
            perturbed = perturbed.astype(w.dtype)
            # An array that the user has not placed stays so. If it were placed, the
            # loss would be compiled again for the others.
            device = w.sharding if w.committed else None
            floats.append(jax.device_put(perturbed, device))
        value, gradients = value_and_grad(floats)
        found = {
            i: np.asarray(w, np.float64) * np.asarray(g, np.float64)
            for i, w, g in zip(loss.positions, floats, gradients, strict=True)
        }
        wrong = [loss.names[i] for i in found if not np.isfinite(found[i]).all()]
        if wrong or not np.isfinite(value):
            raise ValueError(
                "the loss and its gradient must be finite at randomly perturbed "
                f"parameters, but the loss is {value}, and the gradient is not finite "
                f"at {wrong}; pass as params only what is trained, and a loss that is "
                "finite around it."
            )
        return found, loss.merge(floats)

    return products


class Trial(NamedTuple):
    """What a rescaling of the vectors of one array did to the loss.

    Attributes:
      sums: The vectors.
      change: Largest change of the loss, in units of their size.
      allowed: The largest change that counts as rounding, or as that of an epsilon.
    """

    sums: RadialSums
    change: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the vectors are scale-invariant."""
        return self.change <= self.allowed


def rounding_of(value: jax.Array) -> float:
    """Return the change of a loss that rounding may make."""
    return 16 * float(jnp.finfo(value.dtype).eps * jnp.abs(value))


def confirm(
    loss: Loss, point: PyTree, candidates: dict[int, list[RadialSums]], rtol: float
) -> dict[int, Trial]:
    """Find the first candidate of every array whose rescaling does not change the loss.

    Returns:
      The trial of this candidate, or of the first one if there is none.
    """
    if not any(candidates.values()):
        return {}
    value = loss.compiled(point)
    trials: dict[int, Trial] = {}
    rounds = max(map(len, candidates.values()))
    for index in range(rounds):
        trial = {
            i: found[index]
            for i, found in candidates.items()
            if index < len(found) and not (i in trials and trials[i].passed)
        }
        axes = [
            trial[i].axes if i in trial else "none" for i in range(len(loss.leaves))
        ]
        measured: dict[int, list[float]] = {i: [] for i in trial}
        for rescaling in rescalings(point, loss.treedef.unflatten(axes)):
            change = abs(float(loss.compiled(rescaling.params)) - float(value))
            measured[rescaling.position].append(change)
        for i, found in trial.items():
            # Where an epsilon breaks the invariance, the sum falls as the square of the
            # scale. Division by 2 then changes the loss by 1.5 sums, and multiplication
            # by less.
            allowed = 4 * max(rtol, found.radial) + rounding_of(value) / found.size
            change = float(np.max(measured[i])) / found.size
            tried = Trial(found, change, allowed)
            if tried.passed or i not in trials:
                trials[i] = tried
    return trials
