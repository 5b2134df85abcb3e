"""The backward pass: what is to be done, in the opposite order of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from normax.paths import numbers
from normax.paths.arithmetic import PathArithmetic
from normax.paths.numbers import Scaled
from normax.paths.values import Factors, Path, Weight


class Tape:
    """Nodes of the forward pass, and how cotangents go back through each.

    Attributes:
      arithmetic: Arithmetic of path values.
    """

    def __init__(self, arithmetic: PathArithmetic):
        self.arithmetic = arithmetic
        self._steps: list[Callable[[], None]] = []

    def record(
        self, results: Sequence[Path | Weight], pull: Callable[..., None]
    ) -> None:
        """Have `pull(*cotangents of the results)` called in the backward pass."""

        def step():
            cotangents = [node.cotangent for node in results]
            if any(cotangent is not None for cotangent in cotangents):
                pull(*cotangents)

        self._steps.append(step)

    def new(self, value: Scaled, pull: Callable[[Factors], None]) -> Path:
        """Return a node of path values with its rule of the backward pass."""
        path = Path(value)
        self.record([path], pull)
        return path

    def accumulate(self, node: Path | Weight, factors: Factors) -> None:
        """Add to the cotangent of a node."""
        if isinstance(node, Weight) and not node.params:
            return
        if node.cotangent is None:
            node.cotangent = factors
        else:
            both = (numbers.broadcast(x, node.shape) for x in (node.cotangent, factors))
            node.cotangent = (self.arithmetic.add(*both),)

    def run_backward(self) -> None:
        """Propagate cotangents from the results to the parameters."""
        for step in reversed(self._steps):
            step()
