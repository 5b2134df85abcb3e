"""Which entries of a parameter array form one weight vector: the `axes` argument.

A parameter array holds many weight vectors. Every function of normax that speaks of
them takes the argument `axes`. It names the array axes that a norm is summed over; the
other axes count the vectors.

=========== ===================================================================
value       one weight vector is
=========== ===================================================================
`"unit"`    all axes but the last: the weights into one output unit of a Flax
            kernel, `(in, out)` or `(height, width, in, out)`
`"layer"`   the whole array
tuple       exactly these axes: `(1,)` for embedding rows or for a stack of
            kernels `(layers, in, out)`
`"none"`    nothing: the array is left alone
=========== ===================================================================

A pytree *prefix* of the parameters with such values at its leaves is allowed, too. A
word that stands for several arrays leaves those of rank one alone, since they are
biases and gains; stacks of them need a `"none"`. A `"layer"` that stands for one array
inside a tree means that array, whatever its rank.
"""

import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.modules import refuse_modules

Axes: TypeAlias = Any  # a word, a tuple of ints, or a pytree prefix of them
PyTree: TypeAlias = Any
Mask: TypeAlias = Any  # None, a pytree prefix of bools, or a function that returns it
VectorAxes: TypeAlias = tuple[int, ...] | None  # of one array; None: left alone

_WORDS = ("unit", "layer", "none")


def _is_axes_leaf(node: Any) -> bool:
    return type(node) is tuple and all(
        isinstance(axis, numbers.Integral) for axis in node
    )


def _has_no_leaves(node: Any) -> bool:
    return not jax.tree.leaves(node)


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names on the way to a leaf, the same for all kinds of nodes."""
    # Names are compared, not key objects, so a plain dict of axes fits the attributes
    # of a dataclass. An NNX variable is a node whose only child, the array, is called
    # "value"; an optimizer sees the array without that node.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def parameter_names(params: PyTree) -> list[str]:
    """Return what messages call the arrays of the parameters."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return [f"params{jax.tree_util.keystr(path)}" for path, _ in flat]


class _Match(NamedTuple):
    name: str
    array: Any
    value: Any
    explicit: bool


def _match_prefix(
    what: str, prefix: PyTree, params: PyTree, is_leaf: Callable[[Any], bool]
) -> list[_Match]:
    """Find, for every array, the leaf of a pytree prefix that stands for it.

    Parts of `params` without arrays, such as None and optax's `MaskedNode`, are passed
    over, whatever the prefix says of them.

    Args:
      what: What the user calls the prefix.
      prefix: Pytree prefix of `params`.
      params: Pytree of arrays.
      is_leaf: Tells which nodes are leaves of the prefix.

    Returns:
      A match for each array, in the order of `jax.tree.leaves`. It is explicit if the
      prefix's leaf stands for this array alone.
    """
    refuse_modules(params)
    flat = jax.tree_util.tree_leaves_with_path(prefix, is_leaf=is_leaf)
    values = {names_of(path): value for path, value in flat}
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_has_no_leaves)
    used: set[Any] = set()
    matches = []
    for path, node in nodes:
        names = names_of(path)
        prefixes = (names[:n] for n in range(len(names), -1, -1))
        key = next((key for key in prefixes if key in values), None)
        used.add(key)
        if _has_no_leaves(node):
            used.update(deeper for deeper in values if deeper[: len(names)] == names)
            continue
        name = f"params{jax.tree_util.keystr(path)}"
        if key is None and not names:
            raise ValueError(
                f"{what} must be a prefix of the parameters, but params is one array "
                f"and {what} a {type(prefix).__name__}; pass what holds for the array."
            )
        if key is None:
            raise ValueError(
                f"{what} must be a prefix of the parameters, but has no entry for "
                f"{name}; add one."
            )
        explicit = key == names and key != ()
        matches.append(_Match(name, node, values[key], explicit))
    unused = [list(key) for key in values if key not in used]
    if unused:
        raise ValueError(
            f"{what} must be a prefix of the parameters, but the parameters have "
            f"nothing at {', '.join(map(str, unused))}; remove these entries."
        )
    return matches


def check_axes(axes: Axes) -> Axes:
    """Return `axes`, or raise unless its leaves are known words or tuples of ints."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(axes, _is_axes_leaf):
        known = leaf in _WORDS if isinstance(leaf, str) else _is_axes_leaf(leaf)
        # True is an integer for Python, and would name axis 1.
        if not known or any(isinstance(axis, bool) for axis in leaf):
            raise ValueError(
                f"axes{jax.tree_util.keystr(path)} must be one of "
                f"{', '.join(map(repr, _WORDS))} or a tuple of ints, got {leaf!r}; "
                "choose one of these; a single axis is written as a tuple, (0,)."
            )
    return axes


def _axes_of_array(
    value: str | tuple[int, ...], array: Any, explicit: bool, name: str
) -> VectorAxes:
    if value == "none":
        return None
    shape, dtype = jnp.shape(array), jax.dtypes.result_type(array)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"weight vectors must be real, but {name} has dtype {dtype}; leave it "
            'alone with axes "none", or hold its real and imaginary parts as two '
            "arrays."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    rank = len(shape)
    if isinstance(value, str):
        if value == "unit":
            return tuple(range(rank - 1)) if rank >= 2 else None
        return tuple(range(rank)) if rank >= 2 or (explicit and rank) else None
    axes = [operator.index(axis) for axis in value]
    if not axes:
        raise ValueError(
            f"a weight vector spans at least one axis, but axes is () for {name} of "
            f'shape {shape}; leave the array alone with "none".'
        )
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(
            f"axes must lie within the array's rank, but axes is {value} for {name} "
            f"of shape {shape}, whose axes are 0 to {rank - 1}; give the arrays of "
            "other rank their own entry in a pytree of axes."
        )
    axes = sorted(axis % rank for axis in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"axes must be distinct, but axes {value} for {name} of shape {shape} "
            "name one axis twice."
        )
    return tuple(axes)


def resolve_axes(axes: Axes, params: PyTree) -> list[VectorAxes]:
    """Find the axes of the weight vectors of every array.

    Returns:
      For each array, in the order of `jax.tree.leaves`, the sorted axes that one weight
      vector spans. It is None if the array holds no weight vectors.

    Raises:
      ValueError: `axes` is malformed, is no prefix of `params`, or does not fit
        the shape of an array; or an array is complex.
    """
    check_axes(axes)
    return [
        _axes_of_array(match.value, match.array, match.explicit, match.name)
        for match in _match_prefix("axes", axes, params, _is_axes_leaf)
    ]


def broadcast_radius(radius: PyTree, axes: Axes, params: PyTree) -> PyTree:
    """Find the radius of every weight vector.

    Args:
      radius: A number, an array, or a pytree prefix of `params` with such leaves;
        None for arrays that `axes` leaves alone.
      axes: Which entries form one weight vector.
      params: Pytree of arrays.

    Returns:
      Pytree of arrays that broadcast against the arrays of `params`, with None for
      those left alone.

    Raises:
      ValueError: `radius` is no prefix of `params`, or does not broadcast to one
        number per weight vector.
    """
    radii: list[jax.Array | None] = []
    matches = _match_prefix("radius", radius, params, lambda node: node is None)
    for match, vector_axes in zip(matches, resolve_axes(axes, params), strict=True):
        if vector_axes is None:
            radii.append(None)
            continue
        shape = jnp.shape(match.array)
        vectors = tuple(n for i, n in enumerate(shape) if i not in vector_axes)
        try:
            value = jnp.broadcast_to(jnp.asarray(match.value), vectors)
        except (TypeError, ValueError):
            raise ValueError(
                f"radius must broadcast to one number per weight vector, but is "
                f"{match.value!r} for {match.name} of shape {shape}, whose vectors "
                f"over axes {vector_axes} are counted by {vectors}; pass a number, or "
                "a pytree like weight_norm(params, axes)."
            ) from None
        radii.append(jnp.expand_dims(value, vector_axes))
    return jax.tree.unflatten(jax.tree.structure(params), radii)


def check_mask(mask: Mask) -> Mask:
    """Return `mask`, or raise unless its leaves are bools."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(
                f"mask{jax.tree_util.keystr(path)} must be True or False, got {leaf!r};"
                " pass a pytree of bools, or a function of the parameters that returns "
                "one."
            )
    return mask


def resolve_mask(mask: Mask, params: PyTree) -> list[bool]:
    """Find for every array, in the order of `jax.tree.leaves`, what a mask says.

    A function that returns the mask is called with updates, too, as optax does it.
    """
    prefix = mask(params) if callable(mask) else mask
    prefix = True if prefix is None else check_mask(prefix)
    matches = _match_prefix("mask", prefix, params, lambda node: False)
    return [bool(match.value) for match in matches]


def match_gradients(grad: PyTree, params: PyTree) -> PyTree:
    """Find the gradient of every array, also where a mask has left arrays out.

    Optax masks parameters and updates, but not what else is given to an update.

    Args:
      grad: Pytree of gradients, or of None for those that have none.
      params: Pytree of arrays.

    Returns:
      Pytree with the structure of `params`.

    Raises:
      ValueError: A gradient is missing or superfluous, or has another shape.
    """
    matches = _match_prefix("grad", grad, params, lambda node: node is None)
    for match in matches:
        shape, found = jnp.shape(match.array), match.value
        if found is not None and jnp.shape(found) != shape:
            raise ValueError(
                f"grad must have the shapes of the parameters, but {match.name} has "
                f"shape {shape} and its gradient {jnp.shape(found)}; pass the "
                "gradients of these parameters."
            )
    return jax.tree.unflatten(
        jax.tree.structure(params), [match.value for match in matches]
    )


def check_shapes(params: PyTree, updates: PyTree) -> None:
    """Raise unless every update has the shape of its array; None means no update."""
    refuse_modules(params)
    treedef: Any
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    for (path, w), u in zip(named, treedef.flatten_up_to(updates), strict=True):
        if _has_no_leaves(u):
            continue
        is_array = jax.tree_util.all_leaves([u])
        found = jnp.shape(u) if is_array else f"is a {type(u).__name__}"
        if found != jnp.shape(w):
            raise ValueError(
                "updates must have the shapes of the parameters, but params"
                f"{jax.tree_util.keystr(path)} has shape {jnp.shape(w)} and its update "
                f"{found}; pass the updates of these parameters."
            )


def map_vectors(
    fn: Callable[..., Any],
    axes: Axes,
    params: PyTree,
    *trees: PyTree,
    otherwise: Callable[..., Any] = lambda *leaves: None,
    updates: bool = True,
    together: bool = False,
) -> PyTree:
    """Map a function over the arrays that hold weight vectors.

    Args:
      fn: Called as `fn(vector_axes, array, *others)`.
      axes: Which entries form one weight vector.
      params: Pytree of arrays.
      *trees: Pytrees with the structure of `params`.
      otherwise: Called as `otherwise(array, *others)` for arrays left alone.
      updates: Whether the first of the trees holds updates. They have the shapes of
        `params`. Optax writes None for "no gradient"; the result then is None, too.
      together: Whether `fn` is called once for all arrays instead, with a list of the
        arguments of each, and returns a list of the results.

    Returns:
      Pytree with the structure of `params`.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    updates = updates and bool(trees)
    if updates:
        check_shapes(params, trees[0])
    results: list[Any] = [None] * len(leaves)
    rows = {}
    for index, (vector_axes, *row) in enumerate(
        zip(resolve_axes(axes, params), leaves, *columns, strict=True)
    ):
        if vector_axes is None:
            results[index] = otherwise(*row)
        elif not updates or row[1] is not None:
            rows[index] = (vector_axes, *row)
    chosen = [*rows.values()]
    found = fn(chosen) if together else [fn(*row) for row in chosen]
    for index, result in zip(rows, found, strict=True):
        results[index] = result
    return treedef.unflatten(results)
