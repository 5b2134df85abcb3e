"""Batch normalizations at inference, merged into the layers of a whole model."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.extend.core import Jaxpr, Var

from normax._core.programs import called_programs
from normax.nn.fold.layer import (
    BATCH_NORMS,
    LAYERS,
    fold_batch_norm,
    folding_error,
    inference,
    misfit,
)
from normax.nn.weight_norm import KeyPath, WeightNorm, path_name, require_nnx

_WRAPPERS = (WeightNorm, nnx.WeightNorm, nnx.SpectralNorm)


class FoldedModel(NamedTuple):
    """What `fold_batch_norms` returns.

    Attributes:
      model: The folded model, in inference mode.
      pairs: Names of each layer and of the batch normalization folded into it.
      left: Names of the batch normalizations that remain.
      max_error: The `folding_error` on the given inputs.
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
    """The name of a module's calls in a jaxpr, and whether the model reads it too."""

    # Marks compare by identity. JAX therefore finds no trace of an earlier fold in its
    # cache, and each fold records its own calls and reads.
    name: str
    read: bool = False


class _Marked(nnx.Module):
    """A module whose calls show in a jaxpr as calls of a named, jitted function."""

    def __init__(self, module: nnx.Module, mark: _Mark):
        self.module = module
        self.mark = mark

    def __getattr__(self, name: str) -> Any:
        # Flax looks attributes up before it has set `module`. Without this check the
        # lookup of `module` would call this method again, without end.
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
    """Return the model with other modules at some paths; variables are shared."""
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
    """Yield a jaxpr and all nested ones, except those inside of marked calls."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") in marks:
            continue
        for program in called_programs(eqn):
            yield from _sub_jaxprs(program, marks)


def _calls_in_a_row(jaxpr: Jaxpr, marks: set[str]) -> list[tuple[str, str]]:
    """Find marked calls whose only use is as input of another marked call.

    A module that is called more than once is in no pair.
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

    The pairs are found in the trace of one call of the model, whatever its code, and
    merged by `fold_batch_norm`. In a pair, a `BatchNorm` or `BatchRenorm` follows a
    `Linear`, `Conv` or `ConvTranspose`, and nothing else uses that layer or its output.
    All others are left as they are. Rules: docs/theory/normalizers.md.

    Args:
      model: A Flax NNX module; it is not changed.
      *args: Inputs of the model.
      **kwargs: Further inputs of the model.

    Returns:
      A `FoldedModel`: the new model, what was folded, what was left, and the error.

    Raises:
      ValueError: The model is no module of Flax NNX.
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
      Zaytsev, Burnaev, Deep learning models and how to train them (lecture).
    """
    fix = "build the model of flax.nnx layers, whose kernels have the same shapes"
    # One that holds a Linen module hides the layers of it.
    require_nnx("fold_batch_norms", model, fix, refused=nnx.bridge.ToNNX)
    original: Any = inference(model)
    modules: dict[str, tuple[KeyPath, Any]] = {}
    nodes = list(nnx.iter_graph(original))
    # A wrapper computes weights from those of its layer, so the layer's own kernel is
    # not what the model applies.
    wrappers = [path for path, module in nodes if isinstance(module, _WRAPPERS)]
    for path, module in nodes:
        if any(path[: len(wrapper)] == wrapper for wrapper in wrappers):
            continue
        if path and type(module) in LAYERS + BATCH_NORMS:
            modules[f"normax_call_{len(modules)}"] = path, module
    marks = {name: _Mark(name) for name in modules}
    marked = _replaced(
        original,
        {
            path: _Marked(module, marks[name])
            for name, (path, module) in modules.items()
        },
    )
    # Transformations of Flax write to the variables they are given, and JAX lets a
    # trace write only to variables that it created. So the model is cloned inside.
    jaxpr = jax.make_jaxpr(lambda: nnx.clone(marked)(*args, **kwargs))().jaxpr
    replacements: dict[KeyPath, nnx.Module] = {}
    pairs = []
    for pair in _calls_in_a_row(jaxpr, set(modules)):
        (layer_path, layer), (norm_path, norm) = (modules[name] for name in pair)
        read = any(marks[name].read for name in pair)
        if not read and misfit(layer, norm) is None:
            replacements[layer_path] = fold_batch_norm(layer, norm)
            replacements[norm_path] = _Identity()
            pairs.append((layer_path, norm_path))
    folded = nnx.clone(_replaced(original, replacements))
    left = (
        path
        for path, module in modules.values()
        if type(module) in BATCH_NORMS and path not in replacements
    )
    return FoldedModel(
        folded,
        tuple((path_name(layer), path_name(norm)) for layer, norm in pairs),
        tuple(map(path_name, left)),
        folding_error(original, folded, *args, **kwargs),
    )
