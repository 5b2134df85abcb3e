r"""The layers of a plain feed-forward network, read off its parameters.

Without the function that a network computes, only a stack of layers can be
understood: kernels whose shapes chain, each with at most one bias.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import PyTree, names_of
from normax._core.modules import refuse_modules


class Layer(NamedTuple):
    """One layer of a stack.

    Attributes:
      name: What to call it in errors.
      kernel: Position of its kernel among the leaves of the parameters.
      bias: Position of its bias, or None.
    """

    name: str
    kernel: int
    bias: int | None


def require_whole_network(name: str, params: PyTree) -> None:
    """Raise if `optax.masked` or `optax.partition` has taken parameters away.

    A Flax module in their place raises, too.
    """
    refuse_modules(params)
    masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    if any(map(masked, jax.tree.leaves(params, is_leaf=masked))):
        raise ValueError(
            f"normax.{name} needs the parameters of the whole network, since every "
            "path goes through all layers, but some are masked; apply it outside of "
            "optax.masked and optax.partition, and mask what comes after it."
        )


def _natural(names: tuple[str, ...]) -> list[list[tuple[int, int | str]]]:
    """Return a sort key that puts Dense_2 before Dense_10."""
    parts = ([part for part in re.split(r"(\d+)", name) if part] for name in names)
    return [
        [(0, int(part)) if part.isdigit() else (1, part) for part in name]
        for name in parts
    ]


def feed_forward_layers(
    params: PyTree,
    fix: str = "pass `forward` and `inputs`, which describe any network",
    order: Mapping[int, int] | None = None,
) -> list[Layer]:
    """Find the layers of a stack, by default in natural order of their names.

    Args:
      params: Pytree of kernels, of rank two and more with the outputs last, and
        biases, of rank one; integers and arrays without entries are left alone. A
        bias stands beside its kernel: in a subtree of their own, or both in the order
        of the layers.
      fix: What the user is told to do if they are no such stack.
      order: Where each array comes instead, by its position among the leaves; see
        `order_of_use`.

    Returns:
      The layers, from the inputs to the outputs.

    Raises:
      ValueError: The parameters are no such stack.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    groups: dict[tuple[str, ...], list[tuple[Any, int, Any]]] = {}
    for position, (path, leaf) in enumerate(leaves):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or not jnp.size(leaf):
            continue
        names = names_of(path)
        key = _natural(names) if order is None else order.get(position, len(leaves))
        groups.setdefault(names[:-1], []).append((key, position, leaf))
    layers = []
    for group in groups.values():
        group.sort(key=lambda entry: entry[0])
        kernels = [entry for entry in group if entry[2].ndim >= 2]
        biases = [entry for entry in group if entry[2].ndim == 1]
        fits = len(kernels) + len(biases) == len(group) and all(
            kernel[2].shape[-1:] == bias[2].shape
            for kernel, bias in zip(kernels, biases, strict=False)
        )
        if not (fits and len(biases) in (0, len(kernels))):
            found = [f"params{jax.tree_util.keystr(leaves[i][0])}" for _, i, _ in group]
            shapes = [leaf.shape for _, _, leaf in group]
            raise ValueError(
                "a plain stack of layers holds kernels, each with at most one bias of "
                f"as many entries as the kernel has outputs, but {', '.join(found)} "
                f"have shapes {shapes}; {fix}."
            )
        places: list[int | None] = [None] * len(kernels)
        places[: len(biases)] = [entry[1] for entry in biases]
        for (key, position, _), bias in zip(kernels, places, strict=True):
            name = f"params{jax.tree_util.keystr(leaves[position][0])}"
            layers.append((key, Layer(name, position, bias)))
    layers.sort(key=lambda entry: entry[0])
    return [layer for _, layer in layers]


def dense_stack(
    params: PyTree,
) -> tuple[Callable[[PyTree, jax.Array], jax.Array], jax.ShapeDtypeStruct]:
    """Return the network of dense layers and ReLUs that has these parameters.

    Args:
      params: See `feed_forward_layers`.

    Returns:
      The function `forward(params, inputs)`, and the shape of one example.

    Raises:
      ValueError: The kernels are not matrices that chain.
    """
    layers = feed_forward_layers(params)
    kernels = [jax.tree.leaves(params)[layer.kernel] for layer in layers]
    shapes = [kernel.shape for kernel in kernels]
    pairs = itertools.pairwise(shapes)
    if not (
        shapes
        and all(len(shape) == 2 for shape in shapes)
        and all(before[1] == after[0] for before, after in pairs)
    ):
        found = ", ".join(
            f"{layer.name} {shape}" for layer, shape in zip(layers, shapes, strict=True)
        )
        raise ValueError(
            "the kernels of a plain stack of dense layers, in natural order of their "
            "names, are matrices (inputs, outputs) that chain, but the parameters "
            f"hold {found or 'no kernel'}; name the layers in their order, or pass "
            "`forward` and `inputs`, which describe any network."
        )

    def forward(params, x):
        leaves = jax.tree.leaves(params)
        for layer in layers:
            x = x @ leaves[layer.kernel]
            if layer.bias is not None:
                x = x + leaves[layer.bias][None]
            if layer is not layers[-1]:
                x = jax.nn.relu(x)
        return x

    return forward, jax.ShapeDtypeStruct((1, shapes[0][0]), kernels[0].dtype)
