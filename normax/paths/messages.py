"""What users are told of a network without paths, with the line that is at fault."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import flax
import flax.linen
import jax
import jaxlib
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn

from normax.paths.values import Origin, Unsupported


def _folder(file: str | None) -> str:
    return os.path.join(os.path.dirname(file or ""), "")  # ends with the separator


_LIBRARIES = (
    *(_folder(module.__file__) for module in (jax, jaxlib, flax)),
    contextlib.__file__,
    functools.__file__,
)
_NORMAX = _folder(os.path.dirname(__file__))


_IN_BATCH_NORM = ", in its BatchNorm"


@functools.cache
def _lines_of_batch_norms() -> dict[str | None, range]:
    """Return the lines of Flax's two classes, by their files."""
    lines = {}
    for layer in (flax.linen.BatchNorm, nnx.BatchNorm):
        source, start = inspect.getsourcelines(layer)
        lines[inspect.getsourcefile(layer)] = range(start, start + len(source))
    return lines


def users_line(eqn: JaxprEqn) -> str | None:
    """Return the line of the user's code that an equation comes from."""
    traceback = eqn.source_info.traceback
    frames: Sequence[Any] = traceback.frames if traceback is not None else ()
    layer = ""
    for frame in frames:
        if frame.file_name.startswith(_NORMAX):
            return None
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name}){layer}"
        if frame.line_num in _lines_of_batch_norms().get(frame.file_name, ()):
            layer = _IN_BATCH_NORM
    return None


def is_of_a_library(jaxpr: Jaxpr) -> bool:
    """Return whether a program is a library's function.

    Such a function is traced once, and its traceback is that of its first call.
    """
    return (jaxpr.debug_info.func_filename or "").startswith(_LIBRARIES)


def unsupported(name: str, line: str | None, reason: str) -> Unsupported:
    """Return what stands for the results of a primitive without paths."""
    place = f" at {line}" if line else ""
    fix = (
        "Leave it out of `forward`, or end `forward` before it (at the logits, without "
        "the softmax and the loss)."
    )
    if line and line.endswith(_IN_BATCH_NORM):
        fix = (
            "A BatchNorm in training divides by statistics of the batch; call "
            "model.eval() first, or in Linen pass use_running_average=True."
        )
    return Unsupported(
        "a path norm is defined for positively homogeneous networks (linear "
        "layers, ReLU, leaky ReLU, pooling, sums, and batch norm with stopped "
        f"statistics), but the network applies `{name}`{place}: {reason}. {fix}"
    )


def no_edge_weight(name: str, line: str | None, origins: Iterable[Origin]) -> str:
    """Return why a parameter has no path scale."""
    place = f" at {line}" if line else ""
    names = sorted(frozenset[str]().union(*(origin.names for origin in origins)))
    return (
        "path_scales is defined for parameters that are edge weights, up to "
        "reshaping, sums and factors without the same parameter, but "
        f"`{name}`{place} computes edge weights from {', '.join(names)}. path_norm is "
        "defined here; for path_scales, make the effective weights the "
        "parameters, or close over these."
    )
