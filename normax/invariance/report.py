"""Which weights are scale-invariant: the search, and its report."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax._core.axes import Axes, PyTree
from normax._core.checks import check_range
from normax._core.programs import compiled, full_precision, is_float
from normax.invariance.detection import (
    Loss,
    RadialSums,
    confirm,
    log10_chance,
    radial_products,
    radial_sums,
    sets_of_axes,
    word,
)

# The first evaluation lets these ratios pass. It is at weights of the given size, where
# the epsilon of a normalization hides some of the invariance.
_NEAR = 0.03


class ArrayScaleInvariance(NamedTuple):
    r"""What `scale_invariance_report` found out about one array.

    Attributes:
      name: Path of the array.
      shape: Its shape.
      axes: Its scale-invariant vectors: a word or a tuple of axes, or `"none"`.
      radial: $\big(\sum_w \langle w, \nabla L\rangle^2 / \sum \|w \odot \nabla L\|^2
        \big)^{1/2}$ of these vectors, or else of those that came closest. It is about 1
        by chance, and NaN without a gradient.
      change: Largest change of the loss as the vectors were rescaled, in units of
        $\sum\|w \odot \nabla L\|$; NaN if they were not rescaled.
      log10_chance: Decimal logarithm of the probability of such ratios by chance.
    """

    name: str
    shape: tuple[int, ...]
    axes: str | tuple[int, ...]
    radial: float
    change: float
    log10_chance: float


class ScaleInvarianceReport(NamedTuple):
    """Result of `scale_invariance_report`; prints as a table.

    Attributes:
      axes: What `scale_invariant_axes` returns.
      arrays: What was found out about every array, in the order of `jax.tree.leaves`.
    """

    axes: PyTree
    arrays: tuple[ArrayScaleInvariance, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [ArrayScaleInvariance._fields]
        for name, shape, axes, *numbers in self.arrays:
            formats = (".0e", ".0e", ".0f")
            pairs = zip(numbers, formats, strict=True)
            shown = ("" if math.isnan(x) else format(x, how) for x, how in pairs)
            rows.append((name, str(shape), str(axes), *shown))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def _check_loss(loss_fn: Callable[[PyTree], Any], params: PyTree) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "axes are words, found from the values of the parameters, but these are "
            "traced; look for scale-invariant axes outside jax.jit."
        )
    loss = jax.eval_shape(loss_fn, params)
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(loss)]
    real = isinstance(loss, jax.ShapeDtypeStruct) and jnp.issubdtype(
        loss.dtype, jnp.floating
    )
    if not (real and loss.shape == ()):
        raise ValueError(
            "loss_fn must return one real number, but returns (shape, dtype) "
            f"{', '.join(map(str, shapes)) or loss}; return the loss alone, for "
            "instance the mean over the batch."
        )


@full_precision()
def scale_invariance_report(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    *,
    key: jax.Array,
    rtol: float = 1e-3,
) -> ScaleInvarianceReport:
    r"""Find the scale-invariant weight vectors of every array, with the evidence.

    $$\Big(\frac{\sum_w \langle w, \nabla_w L\rangle^2}
    {\sum_w \|w \odot \nabla_w L\|^2}\Big)^{1/2} \le \text{rtol}$$

    over the vectors $w$ of an array that is called scale-invariant.

    Args:
      loss_fn: As in `scale_invariant_axes`.
      params: Pytree of arrays.
      key: Key for the random perturbations.
      rtol: Largest ratio, at weights eight times as large.

    Returns:
      A report with a line for every array; `str` of it is a table.

    Raises:
      ValueError: As `scale_invariant_axes`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def loss_fn(w):
      ...     return jnp.sum(jnp.sin(w / jnp.linalg.norm(w, axis=0, keepdims=True)))
      >>> w, key = jnp.ones((2, 3)), jax.random.key(0)
      >>> normax.scale_invariance_report(loss_fn, w, key=key).arrays[0].axes
      'unit'

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §3.
    """
    check_range("rtol", rtol, low=0, below=1)
    _check_loss(loss_fn, params)
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    positions = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in paths]
    loss = Loss(compiled(loss_fn), treedef, names, leaves, positions)
    dtypes = [jnp.result_type(leaves[i]) for i in positions]
    strict = max([rtol, *(4 * float(jnp.finfo(dtype).eps) for dtype in dtypes)])
    near = max(_NEAR, 3 * strict)

    first_key, second_key = jax.random.split(key)
    products = radial_products(loss)
    arrays, point = products(first_key)
    sums = {
        i: [radial_sums(array, axes) for axes in sets_of_axes(array.shape)]
        for i, array in arrays.items()
    }
    passed = {i: [s for s in sums[i] if s.radial <= near] for i in sums}
    enlarged = {i for i in passed if passed[i]}
    if enlarged:
        arrays, _ = products(second_key, enlarged)
    strictly = {
        i: [s for s in passed[i] if radial_sums(arrays[i], s.axes).radial <= strict]
        for i in enlarged
    }
    confirmed, changes = confirm(loss, point, strictly, strict)

    nothing = RadialSums((), math.nan, 0.0, 0)
    rows = []
    for i, leaf in enumerate(leaves):
        shown = confirmed.get(i) or min(
            sums.get(i) or [nothing], key=lambda s: (math.isnan(s.radial), s.radial)
        )
        rows.append(
            ArrayScaleInvariance(
                name=names[i],
                shape=jnp.shape(leaf),
                axes=word(shown.axes, jnp.shape(leaf), in_tree=bool(paths[i][0]))
                if i in confirmed
                else "none",
                radial=shown.radial,
                change=changes.get(i, math.nan),
                log10_chance=sum(log10_chance(t, shown.vectors) for t in (near, strict))
                if i in confirmed
                else math.nan,
            )
        )
    axes = treedef.unflatten([row.axes for row in rows])
    return ScaleInvarianceReport(axes, tuple(rows))


def scale_invariant_axes(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    *,
    key: jax.Array,
    rtol: float = 1e-3,
) -> Axes:
    r"""Find, for every array, the weight vectors whose scale the loss does not see.

    $$L(\dots, \alpha w, \dots) = L(\dots, w, \dots) \text{ for all } \alpha > 0
    \quad\Leftrightarrow\quad \langle w, \nabla_w L\rangle = 0 \text{ everywhere}$$

    An array is scale-invariant along the smallest set of its axes over which
    $w \odot \nabla_w L$ sums to 0, at random parameters, if rescaling its vectors
    leaves the loss as it is. Arrays without influence are `"none"`, and so are those
    that are scale-invariant only together: docs/theory/invariance.md.

    Args:
      loss_fn: Called as `loss_fn(params)`; returns a real scalar, as in training: batch
        norm uses the statistics of the batch. It is compiled, and takes products of
        float32 matrices in full, also on a GPU, unless it names a precision.
      params: Pytree of arrays. Only floating-point arrays are perturbed.
      key: Key for the random perturbations.
      rtol: Largest $|\langle w, \nabla_w L\rangle| / \|w \odot \nabla_w L\|$ of
        scale-invariant vectors, in quadratic mean over an array. It is at least 4 units
        in the last place of the coarsest dtype among the parameters.

    Returns:
      Pytree like `params` with a word or a tuple of axes for every array: the `axes`
      argument of all of normax.

    Raises:
      ValueError: The loss is no real scalar, it or its gradient is not finite, `rtol`
        is out of range, or the parameters are traced.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def loss_fn(params):
      ...     z = jnp.sin(jnp.arange(20.0)).reshape(5, 4) @ params["kernel"]
      ...     z = (z - jnp.mean(z, 0, keepdims=True)) / jnp.std(z, 0, keepdims=True)
      ...     return jnp.mean((jax.nn.relu(z) @ params["head"] - 1) ** 2)
      >>> params = {"head": jnp.ones((3, 2)), "kernel": jnp.eye(4, 3)}
      >>> normax.scale_invariant_axes(loss_fn, params, key=jax.random.key(0))
      {'head': 'none', 'kernel': 'unit'}

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §1.
    """
    return scale_invariance_report(loss_fn, params, key=key, rtol=rtol).axes
