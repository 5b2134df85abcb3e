r"""The path metric: how far apart two ReLU networks are in the space of their paths.

A network is a point $\Phi(\theta)$ whose coordinates are the products of weights along
paths. No rescaling of hidden units moves it, and the distance of two points bounds by
how much the outputs of the networks differ.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree, parameter_names
from normax._core.modules import refuse_modules
from normax._core.norms import common_dtype
from normax._core.programs import is_float
from normax.paths import pairs
from normax.paths.arithmetic import PathArithmetic
from normax.paths.difference import DifferenceTransform
from normax.paths.network import check_order, check_power, lift, total
from normax.paths.norm import with_automatic_sharding
from normax.paths.numbers import Scaled
from normax.paths.one_example import Forward
from normax.paths.pairs import Comparison, Upper

_ORDER = "forward, params, other, inputs"


class _Compared(NamedTuple):
    """The difference of two sums over paths.

    Attributes:
      difference: The difference.
      comparisons: How the weights of edges differ.
      names: What parameters these are made of.
    """

    difference: Scaled
    comparisons: list[Comparison]
    names: list[frozenset[str]]


def _common(name: str, params: PyTree, other: PyTree) -> tuple[PyTree, PyTree]:
    """Return both networks' parameters, in common dtypes."""
    refuse_modules(params)
    refuse_modules(other)
    structures: Any = jax.tree.structure(params), jax.tree.structure(other)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} compares two sets of parameters of one network, but `params` has "
            f"the structure {structures[0]} and `other` {structures[1]}; pass the same "
            "tree with other numbers."
        )
    leaves = zip(
        parameter_names(params),
        jax.tree.leaves(params),
        jax.tree.leaves(other),
        strict=True,
    )
    for where, a, b in leaves:
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"{name} compares arrays of one shape, but {where} has shape "
                f"{np.shape(a)}, and {np.shape(b)} in `other`; pass the same network "
                "with other numbers."
            )

    def cast(leaf, like):
        if not is_float(leaf) and not is_float(like):
            return leaf
        return jnp.asarray(leaf).astype(common_dtype(leaf, like))

    return jax.tree.map(cast, params, other), jax.tree.map(cast, other, params)


def _compare(
    forward: Forward,
    networks: tuple[PyTree, PyTree],
    inputs: PyTree,
    p: jax.typing.ArrayLike,
    upper: Upper,
) -> _Compared:
    params, other = networks
    leaves = dict(zip(parameter_names(params), jax.tree.leaves(other), strict=True))
    transform = DifferenceTransform(PathArithmetic(p), leaves, upper)
    outputs, _ = lift(transform, forward, params, inputs)
    names = [name for name, _ in transform.compared]
    difference = total(transform.arithmetic, outputs)
    return _Compared(difference, [x for _, x in transform.compared], names)


def _found(comparisons: list[Comparison], kind: int) -> jax.Array:
    """Return whether there are differences of a kind."""
    some = [x.kinds & kind != 0 for x in comparisons]
    return functools.reduce(jnp.logical_or, some, jnp.bool(False))


def _same_choices(
    networks: tuple[PyTree, PyTree], comparisons: list[Comparison]
) -> jax.Array:
    """Return whether integers, and conditions made of weights, agree."""
    both = zip(*map(jax.tree.leaves, networks), strict=True)
    same = [jnp.all(jnp.equal(a, b)) for a, b in both if not is_float(a)]
    return jnp.all(jnp.array([~_found(comparisons, pairs.OTHER_CHOICE), *same]))


def _is_exact(comparisons: list[Comparison], p: jax.typing.ArrayLike) -> jax.Array:
    """Return whether one network has the larger weights, see `path_metric`."""
    kinds = pairs.LARGER, pairs.SMALLER, pairs.OPPOSITE, pairs.PARTLY
    larger, smaller, opposite, partly = (_found(comparisons, kind) for kind in kinds)
    return ~(larger & smaller) & ~opposite & ((jnp.asarray(p) == 1) | ~partly)


def _refuse(
    names: list[frozenset[str]], extremes: list[np.ndarray], p: jax.typing.ArrayLike
) -> None:
    """Raise, and tell which arrays are not in order."""
    findings = (
        "larger in `other` by up to {}",
        "smaller in `other` by up to {}",
        "of opposite signs, of a size up to {}",
        "changed by up to {} to other numbers than 0",
    )
    kinds = 3 if p == 1 else 4
    lines = [
        f"weights of {', '.join(sorted(name))} are {finding.format(f'{size:.3g}')}"
        for name, sizes in zip(names, extremes, strict=True)
        for finding, size in zip(findings[:kinds], sizes, strict=False)
        if size > 0
    ]
    how = (
        "has all weights of edges at least as large as the other, with the same signs"
        if p == 1
        else "is the other with some weights of edges set to 0, since p is not 1"
    )
    raise ValueError(
        f"path_metric is exact where one network {how}, but {'; '.join(lines)}. Use "
        "path_metric_bound, which takes any two."
    )


def path_metric(
    forward: Forward,
    params: PyTree,
    other: PyTree,
    inputs: PyTree,
    p: jax.typing.ArrayLike = 1.0,
    log: bool = False,
) -> jax.Array:
    r"""Distance of two ReLU networks in path space, where one is the larger.

    $$\|\Phi(\theta) - \Phi(\theta')\|_p = \Big(\sum_{\text{paths}} \Big|
      \prod_{e \in \text{path}} w_e - \prod_{e \in \text{path}} w'_e\Big|^p\Big)^{1/p}$$

    It is exact for two kinds of pairs. For p = 1, the weights of one network are at
    most as large as those of the other, and have their signs or are 0. Rounding towards
    zero, shrinkage and pruning give such pairs. Then the metric is the difference of
    two sums over paths. It is computed without cancellation, to the digits of a path
    norm, however close the two are. For other p, one network is the other with some
    weights set to 0. Weights are those of edges, as the network computes them: of a
    batch norm with its biases, the sum of all constants is one. `path_metric_bound`
    takes all pairs.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters $\theta$, a pytree.
      other: Other parameters $\theta'$, of the same structure and shapes. Arrays are
        compared in the wider of both dtypes.
      inputs: An example or a batch of its inputs; only shapes matter.
      p: The power, at least 1 and below 32.
      log: Whether to return the logarithm, which is finite at any depth and scale, and
        $-\infty$ where the networks have the same paths.

    Returns:
      A scalar, in float32 or wider. Where the parameters are traced, as under
      `jax.jit`, it is NaN for a pair of no such kind.

    Raises:
      ValueError: As `path_norm`; the two differ in structure, shapes or integers; or
        the pair is of no such kind (the message names the arrays).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from normax import paths
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> pruned = {"hidden": hidden, "output": jnp.array([[0.0], [-2.0]])}
      >>> distance = paths.path_metric(forward, params, pruned, jnp.ones((1, 1)))
      >>> round(float(distance), 5)
      3.0

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, A path-norm toolkit for modern networks,
      2024; A rescaling-invariant Lipschitz bound based on path-metrics, 2025.
    """
    check_order("path_metric", forward, _ORDER)
    check_power(p)
    networks = _common("path_metric", params, other)
    names: list[frozenset[str]] = []

    def evaluate(networks):
        compared = _compare(forward, networks, inputs, p, pairs.JOIN)
        names[:] = compared.names
        arithmetic, difference = PathArithmetic(p), compared.difference
        if log:
            distance = arithmetic.log(difference) / p
        else:
            distance = arithmetic.pth_root(difference)
        same = _same_choices(networks, compared.comparisons)
        return distance, same, _is_exact(compared.comparisons, p), compared.comparisons

    def measure(networks):
        return evaluate(networks)[:3]

    distance, same, exact = jax.jit(with_automatic_sharding(measure))(networks)
    if isinstance(exact, jax.core.Tracer):
        return jnp.where(same & exact, distance, jnp.nan)
    _check_choices("path_metric", same)
    if not exact:
        comparisons = jax.jit(with_automatic_sharding(lambda n: evaluate(n)[3]))(
            networks
        )
        _refuse(names, [np.asarray(x.extremes) for x in comparisons], p)
    return distance


def _check_choices(name: str, same: jax.Array) -> None:
    if not same:
        raise ValueError(
            f"{name} compares the weights of one network. Integers among the "
            "parameters, and conditions and indices that are computed from weights, "
            "say which paths it has, but `params` and `other` hold different ones; "
            "pass the same."
        )


def path_metric_bound(
    forward: Forward,
    params: PyTree,
    other: PyTree,
    inputs: PyTree,
    p: jax.typing.ArrayLike = 1.0,
    log: bool = False,
) -> jax.Array:
    r"""Upper bound on the distance of any two ReLU networks in path space.

    $$\|\Phi(\theta) - \Phi(\theta')\|_p \le
      \Big(\sum |\Phi(\theta)|^p - |\Phi(\mu)|^p\Big)^{1/p} +
      \Big(\sum |\Phi(\theta')|^p - |\Phi(\mu)|^p\Big)^{1/p}$$

    The meet $\mu$ of the two has the smaller weight of each edge where signs agree,
    else 0. This is the triangle inequality through $\mu$. It is `path_metric` where
    that is exact.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters $\theta$, a pytree.
      other: Other parameters $\theta'$, of the same structure and shapes.
      inputs: An example or a batch of its inputs; only shapes matter.
      p: The power, at least 1 and below 32.
      log: Whether to return the logarithm, as in `path_metric`.

    Returns:
      A scalar, in float32 or wider.

    Raises:
      ValueError: As `path_norm`; or the two differ in structure, shapes or integers.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from normax import paths
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> other = {"hidden": 2 * hidden, "output": jnp.array([[1.0], [-1.0]])}
      >>> bound = paths.path_metric_bound(forward, params, other, jnp.ones((1, 1)))
      >>> round(float(bound), 5)  # paths 3 and -4, 2 and -4: the meet has 1 and -2
      7.0

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, A rescaling-invariant Lipschitz bound
      based on path-metrics, 2025.
    """
    check_order("path_metric_bound", forward, _ORDER)
    check_power(p)
    networks = _common("path_metric_bound", params, other)

    def measure(networks):
        arithmetic = PathArithmetic(p)
        both = [
            _compare(forward, pair, inputs, p, pairs.FIRST)
            for pair in (networks, networks[::-1])
        ]
        parts = [compared.difference for compared in both]
        same = _same_choices(networks, both[0].comparisons)
        if log:
            return jnp.logaddexp(*(arithmetic.log(part) / p for part in parts)), same
        return sum(map(arithmetic.pth_root, parts)), same

    bound, same = jax.jit(with_automatic_sharding(measure))(networks)
    if isinstance(same, jax.core.Tracer):
        return jnp.where(same, bound, jnp.nan)
    _check_choices("path_metric_bound", same)
    return bound
