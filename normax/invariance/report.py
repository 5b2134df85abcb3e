"""Which weights are scale-invariant: the search, and its report."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.errors import TraceContextError

from normax._core.axes import Axes, PyTree, parameter_names
from normax._core.checks import check_range
from normax._core.modules import refuse_modules
from normax._core.programs import compiled, full_precision, is_float
from normax.invariance.comparison import differences
from normax.invariance.detection import (
    Loss,
    RadialSums,
    Trial,
    confirm,
    log10_chance,
    radial_products,
    radial_sums,
    sets_of_axes,
    word,
)
from normax.invariance.groups import (
    MOST_ARRAYS,
    JointScaleInvariance,
    joint_invariances,
)

# The first evaluation lets these ratios pass. It is at weights of the given size, where
# the epsilon of a normalization hides some of the invariance.
_NEAR = 0.03

_NO_SUMS = RadialSums((), math.nan, 0.0, 0.0)
_NO_TRIAL = Trial(_NO_SUMS, math.nan, math.nan)


class ArrayScaleInvariance(NamedTuple):
    r"""What `scale_invariance_report` found out about one array.

    An array is scale-invariant if its numbers are within all three limits.

    Attributes:
      name: Path of the array.
      shape: Its shape.
      axes: Its scale-invariant vectors: a word or a tuple of axes, or `"none"`.
      tried: The vectors that the numbers are of: those of `axes`, or if there are none,
        those that came closest. It is `"none"` without a gradient.
      near: $\big(\sum_w \langle w, \nabla L\rangle^2 / \sum \|w \odot \nabla L\|^2
        \big)^{1/2}$ of these vectors, about 1 by chance; NaN without a gradient. The
        limit is `ScaleInvarianceReport.near`.
      radial: The same at weights eight times as large, NaN if it was not needed. The
        limit is `ScaleInvarianceReport.rtol`.
      change: Largest change of the loss as the vectors were rescaled, in units of
        $\sum\|w \odot \nabla L\|$; NaN if they were not rescaled.
      allowed: The limit of `change`: 4 times the larger of `rtol` and `near`, and 16
        units in the last place of the loss.
      log10_chance: Decimal logarithm of the probability of such ratios by chance.
      difference: How it differs from `compare`; empty if it does not.
    """

    name: str
    shape: tuple[int, ...]
    axes: str | tuple[int, ...]
    tried: str | tuple[int, ...]
    near: float
    radial: float
    change: float
    allowed: float
    log10_chance: float
    difference: str = ""


class ScaleInvarianceReport(NamedTuple):
    """Result of `scale_invariance_report`; prints as a table.

    Attributes:
      axes: What `scale_invariant_axes` returns.
      arrays: What was found out about every array, in the order of `jax.tree.leaves`.
      near: The limit of every array's `near`.
      rtol: The limit of every array's `radial`.
      groups: Arrays that are scale-invariant only together; None if there are too many
        arrays to look for them.
    """

    axes: PyTree
    arrays: tuple[ArrayScaleInvariance, ...]
    near: float
    rtol: float
    groups: tuple[JointScaleInvariance, ...] | None

    def __str__(self) -> str:
        limits = f"{self.near:.0e}", f"{self.rtol:.0e}", "allowed"
        rows: list[tuple[str, ...]] = [
            ArrayScaleInvariance._fields[:-1],
            ("at most", "", "", "", *limits, "", ""),
        ]
        for name, shape, axes, tried, *numbers, difference in self.arrays:
            formats = (".0e", ".0e", ".0e", ".0e", ".0f")
            pairs = zip(numbers, formats, strict=True)
            shown = ("" if math.isnan(x) else format(x, how) for x, how in pairs)
            mark = f"  <- {difference}" if difference else ""
            rows.append((name, str(shape), str(axes), str(tried), *shown, mark))
        columns = zip(*(row[:9] for row in rows), strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = ["  ".join(map(str.ljust, row, [*widths, 0])).rstrip() for row in rows]
        if self.groups is None:
            few = f"among more than {MOST_ARRAYS} arrays no groups are looked for"
            return "\n".join([*lines, few])
        return "\n".join([*lines, *map(str, self.groups)])


def _check_loss(loss_fn: Callable[[PyTree], Any], params: PyTree) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "axes are words, found from the values of the parameters, but these are "
            "traced; look for scale-invariant axes outside jax.jit."
        )
    try:
        loss = jax.eval_shape(loss_fn, params)
    except TraceContextError as error:
        raise ValueError(
            "loss_fn must change nothing outside of itself, but it updates a variable "
            "of a Flax model that it closes over, as BatchNorm does with its running "
            "statistics in training; split the model outside, graphdef, params, rest = "
            "nnx.split(model, nnx.Param, ...), and have loss_fn(params) use "
            "nnx.merge(graphdef, params, rest, copy=True)."
        ) from error
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


class _Search(NamedTuple):
    """What was found about the arrays one by one, with what it was found from."""

    loss: Loss
    products: Callable[..., Any]
    axes: PyTree
    arrays: tuple[ArrayScaleInvariance, ...]
    near: float
    rtol: float


def _search(
    loss_fn: Callable[[PyTree], Any], params: PyTree, key: jax.Array, rtol: float
) -> _Search:
    """Look for the scale-invariant vectors of every array."""
    check_range("rtol", rtol, low=0, below=1)
    refuse_modules(params)
    _check_loss(loss_fn, params)
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    positions = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    names = parameter_names(params)
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
    radials = {
        i: {s.axes: radial_sums(arrays[i], s.axes).radial for s in passed[i]}
        for i in enlarged
    }
    strictly = {
        i: [s for s in passed[i] if radials[i][s.axes] <= strict] for i in enlarged
    }
    trials = confirm(loss, point, strictly, strict)

    rows = []
    for i, leaf in enumerate(leaves):
        trial, shape = trials.get(i, _NO_TRIAL), jnp.shape(leaf)
        radial = radials.get(i, {})
        closest = min(
            sums.get(i) or [_NO_SUMS], key=lambda s: (s.radial != s.radial, s.radial)
        )
        if radial:
            closest = min(passed[i], key=lambda s: radial[s.axes])
        shown = trial.sums if i in trials else closest
        in_tree = bool(paths[i][0])
        tried = word(shown.axes, shape, in_tree) if shown.size else "none"
        chances = (log10_chance(limit, shown.vectors) for limit in (near, strict))
        rows.append(
            ArrayScaleInvariance(
                name=names[i],
                shape=shape,
                axes=tried if trial.passed else "none",
                tried=tried,
                near=shown.radial,
                radial=radial.get(shown.axes, math.nan),
                change=trial.change,
                allowed=trial.allowed,
                log10_chance=sum(chances) if trial.passed else math.nan,
            )
        )
    axes = treedef.unflatten([row.axes for row in rows])
    return _Search(loss, products, axes, tuple(rows), near, strict)


@full_precision()
def scale_invariance_report(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    *,
    key: jax.Array,
    rtol: float = 1e-3,
    compare: Axes | None = None,
) -> ScaleInvarianceReport:
    r"""Find the scale-invariant weight vectors of every array, with the evidence.

    $$\Big(\frac{\sum_w \langle w, \nabla_w L\rangle^2}
    {\sum_w \|w \odot \nabla_w L\|^2}\Big)^{1/2} \le \text{rtol}$$

    over the vectors $w$ of an array that is called scale-invariant. Groups of arrays
    that are scale-invariant only together are looked for among up to 128 others, which
    takes one gradient for each.

    Args:
      loss_fn: As in `scale_invariant_axes`.
      params: Pytree of arrays.
      key: Key for the random perturbations.
      rtol: Largest ratio, at weights eight times as large.
      compare: Axes, or a mask of bools for weight decay, that the table compares with
        what was found; a pytree prefix of `params`.

    Returns:
      A report with a line for every array; `str` of it is a table.

    Raises:
      ValueError: As `scale_invariant_axes`; or `compare` does not fit `params`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def loss_fn(w):
      ...     return jnp.sum(jnp.sin(w / jnp.linalg.norm(w, axis=0, keepdims=True)))
      >>> w, key = jnp.ones((2, 3)), jax.random.key(0)
      >>> report = normax.scale_invariance_report(loss_fn, w, key=key, compare=False)
      >>> report.arrays[0].axes, report.arrays[0].difference
      ('unit', 'yours leaves it alone, but it is scale-invariant')

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §3.
    """
    found = _search(loss_fn, params, key, rtol)
    arrays = found.arrays
    if compare is not None:
        texts = differences(compare, params, found.axes)
        pairs = zip(arrays, texts, strict=True)
        arrays = tuple(row._replace(difference=text) for row, text in pairs)
    others = [i for i in found.loss.positions if arrays[i].axes == "none"]
    groups = None
    if len(others) <= MOST_ARRAYS:
        limits, group_key = (found.near, found.rtol), jax.random.fold_in(key, 1)
        groups = joint_invariances(
            found.loss, found.products, group_key, others, limits
        )
    return ScaleInvarianceReport(found.axes, arrays, found.near, found.rtol, groups)


@full_precision()
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
    return _search(loss_fn, params, key, rtol).axes
