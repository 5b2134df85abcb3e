"""What each Flax module sums over: the axes of its weight vectors."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen, nnx

from normax._core.axes import Axes

KeyPath = tuple[Any, ...]

_MATRICES = (
    nnx.Linear,
    nnx.Conv,
    nnx.ConvTranspose,
    linen.Dense,
    linen.Conv,
    linen.ConvTranspose,
    linen.recurrent.DenseParams,
)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def vector_axes(
    module: Any, name: str, rank: int, equation: str | None = None
) -> tuple[int, ...] | None:
    """Return the axes that the module sums over, or None where it does not sum.

    Args:
      module: A Flax module, of NNX or Linen.
      name: What the module calls the parameter.
      rank: Rank of the parameter, without axes that stack several modules.
      equation: That of a call, for an `Einsum` without one of its own.
    """
    match module:
        case nnx.Embed() | linen.Embed():
            return (1,) if name == "embedding" else None
        case nnx.LoRA():
            return (0,) if name in ("lora_a", "lora_b") else None
    if name != "kernel":
        return None
    match module:
        case nnx.LinearGeneral():
            return _between(len(module.batch_axis), len(module.out_features), rank)
        case linen.DenseGeneral():
            batch, features = _tuple(module.batch_dims), _tuple(module.features)
            return _between(len(batch), len(features), rank)
        case nnx.Einsum() | linen.Einsum():
            return _contracted(module.einsum_str or equation, rank)
        case (
            nnx.ConvTranspose(transpose_kernel=True)
            | linen.ConvTranspose(transpose_kernel=True)
        ):
            return (*range(rank - 2), rank - 1)
        case linen.ConvLocal():  # it has a kernel for every position
            return (rank - 2,)
    return tuple(range(rank - 1)) if isinstance(module, _MATRICES) else None


def _contracted(equation: str | None, rank: int) -> tuple[int, ...] | None:
    """Return the axes of the second operand that are not in the result."""
    if equation is None:
        return None
    operands, result = equation.replace(" ", "").split("->")
    before, dots, after = operands.split(",")[1].partition("...")
    # The axes of an ellipsis stay in the result.
    kept = "." * (rank - len(before + after)) if dots else ""
    letters = enumerate(before + kept + after)
    return tuple(i for i, letter in letters if letter not in result + ".")


def _between(batch: int, features: int, rank: int) -> tuple[int, ...]:
    return tuple(range(batch, rank - features))


def _shape_of_one(module: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an NNX module's parameter as it was before stacking."""
    match module:
        case nnx.Linear():
            return module.in_features, module.out_features
        case nnx.LinearGeneral():
            batch = module.batch_axis.values()
            return (*batch, *module.in_features, *module.out_features)
        case nnx.Embed():
            return module.num_embeddings, module.features
        case nnx.Conv() | nnx.ConvTranspose() | nnx.Einsum():
            return tuple(module.kernel_shape)
    return shape[-2:]


def within(axes: tuple[int, ...], one: Sequence[int], shape: Sequence[int]) -> Axes:
    """Return the places of some axes of one array in a stack of such arrays."""
    places: list[int] = []
    remaining = list(one)
    # From the last axis on, since those of a stack mostly come first.
    for place in reversed(range(len(shape))):
        if remaining and shape[place] == remaining[-1]:
            remaining.pop()
            places.insert(0, place)
    return "none" if remaining or not axes else tuple(places[axis] for axis in axes)


def nnx_vector_axes(model: nnx.Module) -> dict[KeyPath, Axes]:
    """Return the axes of every `nnx.Param` by its path, `"none"` where left alone."""
    modules = dict(nnx.iter_graph(model))
    found: dict[KeyPath, Axes] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaves = jax.tree.leaves(variable)  # a shape may be all there is of it
        shape = leaves[0].shape if leaves else ()
        module, name = modules.get(path[:-1]), str(path[-1])
        one = _shape_of_one(module, shape)
        axes = vector_axes(module, name, len(one))
        found[path] = "none" if axes is None else within(axes, one, shape)
    return found
