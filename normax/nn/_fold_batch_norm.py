"""Batch normalization at inference, merged into the layer before it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import Jaxpr, Var

from normax._norms import at_least_float32
from normax._programs import called_programs
from normax.nn._batch_renorm import BatchRenorm
from normax.nn._weight_norm import KeyPath, WeightNorm, output_axes

# Not their subclasses, which may compute something else.
_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_BATCH_NORMS = (nnx.BatchNorm, BatchRenorm)
_WRAPPERS = (WeightNorm, nnx.WeightNorm, nnx.SpectralNorm)


def _misfit(layer: Any, batch_norm: Any) -> str | None:
    """Say why a pair cannot be one layer; None if it can."""
    if type(layer) not in _LAYERS:
        names = ", ".join(kind.__name__ for kind in _LAYERS)
        return f"the layer must be one of {names}, got {type(layer).__name__}"
    if type(batch_norm) not in _BATCH_NORMS:
        names = ", ".join(kind.__name__ for kind in _BATCH_NORMS)
        return f"batch_norm must be one of {names}, got {type(batch_norm).__name__}"
    if batch_norm.num_features != layer.out_features:
        return (
            f"batch_norm must have the features that the layer puts out, but has "
            f"{batch_norm.num_features} and the layer {layer.out_features}"
        )
    spatial = len(getattr(layer, "kernel_size", ()))
    if layer.kernel.ndim != spatial + 2 or batch_norm.mean.ndim != 1:
        return (
            "neither may be a stack of several, but the kernel has shape "
            f"{layer.kernel.shape} and the mean {batch_norm.mean.shape}"
        )
    if batch_norm.axis not in (-1, layer.kernel.ndim - 1):
        return (
            "batch_norm must normalize the layer's last axis, but its axis is "
            f"{batch_norm.axis}"
        )
    return None


def fold_batch_norm(layer: Any, batch_norm: nnx.BatchNorm) -> Any:
    r"""Merge batch normalization at inference into the layer before it.

    $$\gamma\, \frac{(w * x + b) - \mu}{\sigma} + \beta = w' * x + b', \qquad
    w' = \frac{\gamma}{\sigma}\, w, \quad
    b' = \frac{\gamma}{\sigma}\, (b - \mu) + \beta, \quad
    \sigma = (\text{var} + \varepsilon)^{1/2}$$

    with the running statistics $\mu$ and var. The result computes in the layer's dtype
    and keeps those of its parameters; in float32 it differs from the pair by rounding,
    which `folding_error` measures.

    Args:
      layer: A `Linear`, `Conv` or `ConvTranspose` of Flax NNX.
      batch_norm: The `BatchNorm` or `BatchRenorm` that is called on its output.

    Returns:
      A new layer of the same kind, with a bias. The arguments are not changed.

    Raises:
      ValueError: The layer is of another kind, or `batch_norm` does not normalize its
        output features.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> from flax import nnx
      >>> linear = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> linear.kernel[...] = jnp.array([[1.0], [2.0]])
      >>> norm = nnx.BatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> norm.mean[...], norm.var[...] = jnp.array([3.0]), jnp.array([4.0])
      >>> folded = normax.nn.fold_batch_norm(linear, norm)
      >>> folded.kernel[...], folded.bias[...]
      (Array([[0.5], [1. ]], dtype=float32), Array([-1.5], dtype=float32))

    References:
      Zaytsev, Burnaev, Deep learning models and how to train them (lecture), "Batch
      normalization layer". Ioffe, Szegedy, Batch Normalization, 2015.
    """
    misfit = _misfit(layer, batch_norm)
    if misfit is not None:
        raise ValueError(f"{misfit}; call it where it stands instead.")
    kernel, bias, mean, var, scale, shift = at_least_float32(
        layer.kernel[...],
        0.0 if layer.bias is None else layer.bias[...],
        batch_norm.mean[...],
        batch_norm.var[...],
        1.0 if batch_norm.scale is None else batch_norm.scale[...],
        0.0 if batch_norm.bias is None else batch_norm.bias[...],
    )
    factor = scale * lax.rsqrt(var + batch_norm.epsilon)
    bias = (bias - mean) * factor + shift
    features = output_axes(layer, kernel.ndim)
    others = [axis for axis in range(kernel.ndim) if axis not in features]
    weight = kernel * jnp.expand_dims(factor, others)
    folded = nnx.clone(layer)
    dtype = layer.kernel.dtype
    folded.kernel = layer.kernel.replace(weight.astype(dtype))
    if layer.bias is None:
        folded.bias, folded.use_bias = nnx.Param(bias.astype(dtype)), True
    else:
        folded.bias = layer.bias.replace(bias.astype(layer.bias.dtype))
    return folded


def _inference(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a module in inference mode; other functions as they are."""
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
    return model


def folding_error(
    model: Callable[..., Any], folded: Callable[..., Any], *args: Any, **kwargs: Any
) -> jax.Array:
    r"""Largest difference that folding made to the outputs at inference.

    $$\max_i |f(x)_i - f'(x)_i|$$

    Args:
      model: What was folded: a module, such as `nnx.Sequential(layer, batch_norm)`, or
        any function.
      folded: The module or function that takes its place.
      *args: Inputs of both.
      **kwargs: Further inputs of both.

    Returns:
      The largest absolute difference of all outputs, float32 or better, of shape ().

    Raises:
      ValueError: The two put out pytrees of different structure.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> from flax import nnx
      >>> linear = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
      >>> norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> folded = normax.nn.fold_batch_norm(linear, norm)
      >>> pair = nnx.Sequential(linear, norm)
      >>> bool(normax.nn.folding_error(pair, folded, jnp.ones((1, 2))) < 1e-6)
      True

    References:
      Zaytsev, Burnaev, Deep learning models and how to train them (lecture), "Batch
      normalization layer".
    """
    expected, found = (_inference(f)(*args, **kwargs) for f in (model, folded))

    def largest(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = at_least_float32(x, y)
        return jnp.max(jnp.abs(x - y), initial=0.0)

    errors = jax.tree.leaves(jax.tree.map(largest, expected, found))
    return jnp.max(jnp.stack([jnp.zeros([]), *errors]))


class FoldedModel(NamedTuple):
    """What `fold_batch_norms` returns.

    Attributes:
      model: The folded model, in inference mode.
      pairs: Names of the layers, and of the batch normalizations folded into them.
      left: Names of the batch normalizations that remain.
      max_error: Largest difference between the outputs of the two models on the
        inputs, as in `folding_error`.
    """

    model: Any
    pairs: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    max_error: jax.Array


class _Identity(nnx.Module):
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return x


@dataclasses.dataclass(eq=False)
class _Mark:
    """The name of a module's calls, and whether anything else was asked of it.

    No two are equal, so that a program that was traced before is traced again.
    """

    name: str
    read: bool = False


class _Marked(nnx.Module):
    """A module whose calls show in a jaxpr, as those of a jitted function."""

    def __init__(self, module: nnx.Module, mark: _Mark):
        self.module = module
        self.mark = mark

    def __getattr__(self, name: str) -> Any:
        # An object that Flax has not filled in yet has no module either.
        if name in ("module", "mark") or name.startswith("_"):
            raise AttributeError(name)
        self.mark.read = True
        return getattr(self.module, name)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        def call(x):
            return self.module(x, *args, **kwargs)  # type: ignore[operator]

        call.__name__ = self.mark.name
        return jax.jit(call)(x)


def _replaced(model: nnx.Module, replacements: dict[KeyPath, nnx.Module]) -> Any:
    """Return a model that shares the variables, with other modules at some paths."""
    model = nnx.clone(model, variables=False)
    nodes = dict(nnx.iter_graph(model))
    for (*path, key), module in replacements.items():
        parent = nodes[tuple(path)]
        if isinstance(parent, nnx.Module) and isinstance(key, str):
            setattr(parent, key, module)
        else:
            parent[key] = module
    return model


def _sub_jaxprs(jaxpr: Jaxpr, marks: set[str]) -> Iterator[Jaxpr]:
    """Yield a jaxpr and all in its equations but those of marked calls."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") in marks:
            continue
        for program in called_programs(eqn):
            yield from _sub_jaxprs(program.jaxpr, marks)


def _calls_in_a_row(jaxpr: Jaxpr, marks: set[str]) -> list[tuple[str, str]]:
    """Find marked calls whose output goes to one other marked call and nowhere else.

    A mark that is called more than once is in none of the pairs.
    """
    calls: dict[str, int] = dict.fromkeys(marks, 0)
    pairs = []
    for part in _sub_jaxprs(jaxpr, marks):
        users: dict[Var, list[str | None]] = {}
        for eqn in part.eqns:
            mark = eqn.params.get("name")
            if mark in marks:
                calls[mark] += 1
            for atom in eqn.invars:
                if isinstance(atom, Var):
                    users.setdefault(atom, []).append(mark)
        for atom in part.outvars:
            if isinstance(atom, Var):
                users.setdefault(atom, []).append(None)
        for eqn in part.eqns:
            mark = eqn.params.get("name")
            if mark in marks and len(eqn.outvars) == 1:
                match users.get(eqn.outvars[0], []):
                    case [user] if user in marks:
                        pairs.append((mark, user))
    return [pair for pair in pairs if all(calls[mark] == 1 for mark in pair)]


def fold_batch_norms(model: nnx.Module, *args: Any, **kwargs: Any) -> FoldedModel:
    r"""Fold every batch normalization of a model into the layer before it.

    $$\text{BN}(w * x + b) \to w' * x + b'$$

    wherever the input of a `BatchNorm` or `BatchRenorm` is the output of a `Linear`,
    `Conv` or `ConvTranspose` that goes nowhere else, both are called once, and the
    model reads no attribute of them, such as `layer.kernel`. Layers stacked by
    `nnx.vmap` are left, and those in `WeightNorm` or Flax's `SpectralNorm`. The pairs
    are found in the trace of one call of the model, whatever its code, and merged by
    `fold_batch_norm`.

    Args:
      model: A Flax NNX module; it is not changed.
      *args: Inputs of the model.
      **kwargs: Further inputs of the model.

    Returns:
      A `FoldedModel`: the new model in inference mode, the names of what was folded and
      of what was left, and the largest error on the inputs.

    Raises:
      TraceContextError: The model normalizes with the statistics of the batch though it
        is in inference mode.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> conv, norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
      >>> model = nnx.Sequential(conv, norm, nnx.relu)
      >>> folded = normax.nn.fold_batch_norms(model, jnp.ones((1, 4, 4, 3)))
      >>> folded.pairs
      (('layers/0', 'layers/1'),)
      >>> bool(folded.max_error < 1e-6)
      True

    References:
      Zaytsev, Burnaev, Deep learning models and how to train them (lecture), "Batch
      normalization layer".
    """
    inference: Any = _inference(model)
    modules: dict[str, tuple[KeyPath, Any]] = {}
    nodes = list(nnx.iter_graph(inference))
    # They compute the weights that they look up in their layers.
    wrappers = [path for path, module in nodes if isinstance(module, _WRAPPERS)]
    for path, module in nodes:
        if any(path[: len(wrapper)] == wrapper for wrapper in wrappers):
            continue
        if path and type(module) in _LAYERS + _BATCH_NORMS:
            modules[f"normax_call_{len(modules)}"] = path, module
    marks = {name: _Mark(name) for name in modules}
    marked = _replaced(
        inference,
        {
            path: _Marked(module, marks[name])
            for name, (path, module) in modules.items()
        },
    )
    # Cloned inside: transformations of Flax write to the variables that they are
    # given, which must be of the trace they are used in.
    jaxpr = jax.make_jaxpr(lambda: nnx.clone(marked)(*args, **kwargs))().jaxpr
    replacements: dict[KeyPath, nnx.Module] = {}
    pairs = []
    for pair in _calls_in_a_row(jaxpr, set(modules)):
        (layer_path, layer), (norm_path, norm) = (modules[name] for name in pair)
        read = any(marks[name].read for name in pair)
        if not read and _misfit(layer, norm) is None:
            replacements[layer_path] = fold_batch_norm(layer, norm)
            replacements[norm_path] = _Identity()
            pairs.append((layer_path, norm_path))
    folded = nnx.clone(_replaced(inference, replacements))
    left = (
        path
        for path, module in modules.values()
        if type(module) in _BATCH_NORMS and path not in replacements
    )

    def name(path: KeyPath) -> str:
        return "/".join(map(str, path))

    return FoldedModel(
        folded,
        tuple((name(layer), name(norm)) for layer, norm in pairs),
        tuple(map(name, left)),
        folding_error(inference, folded, *args, **kwargs),
    )
