"""What the normalizers are invariant to, as a table whose every cell is tested."""

from typing import NamedTuple


class Invariances(NamedTuple):
    r"""What leaves the output of a normalized layer $y(x; W)$ as it is.

    Factors are positive; gains and biases after the normalization are fixed.

    Attributes:
      unit: A factor on the weight vector of each output unit.
      layer: One factor on all weights of the layer.
      input_scale: One factor on all inputs of the batch.
      input_shift: One vector added to all inputs of the batch, a number per channel.
      example_scale: A factor on each example.
      orthogonal_gradient: The weight vectors that are orthogonal to their gradient, in
        the words of `axes`: `"unit"`, `"layer"` or `"none"`.
    """

    unit: bool
    layer: bool
    input_scale: bool
    input_shift: bool
    example_scale: bool
    orthogonal_gradient: str


# BatchRenorm is meant with limits that do not bind, and with the running statistics as
# they are. After some steps they follow the weights: then the function is invariant.
INVARIANCES = {
    "BatchNorm": Invariances(True, True, True, True, False, "unit"),
    "BatchNorm, stopped": Invariances(True, True, True, True, False, "none"),
    "BatchNorm, inference": Invariances(False, False, False, False, False, "none"),
    "BatchRenorm": Invariances(False, False, False, False, False, "unit"),
    "LayerNorm": Invariances(False, True, True, False, True, "layer"),
    "RMSNorm": Invariances(False, True, True, False, True, "layer"),
    "GroupNorm": Invariances(False, True, True, False, True, "layer"),
    "InstanceNorm": Invariances(True, True, True, True, True, "unit"),
    "WeightNorm": Invariances(True, True, False, False, False, "unit"),
}


def invariance_table() -> str:
    r"""Table of what each normalizer is invariant to.

    $$y(x; \alpha w) = y(x; w) \quad\Rightarrow\quad
    \langle w, \nabla_w L\rangle = 0, \quad
    \nabla_w L(\alpha w) = \nabla_w L(w) / \alpha$$

    The rows are `normax.invariance.INVARIANCES`, whose fields say what the columns
    mean. The converse does not hold: docs/theory/invariance.md says for which rows, and
    why.

    Returns:
      The table as text.

    Examples:
      >>> import normax
      >>> print(normax.invariance.invariance_table())
                                         input  input  example  orthogonal
                            unit  layer  scale  shift  scale    gradient
      BatchNorm             yes   yes    yes    yes    -        unit
      BatchNorm, stopped    yes   yes    yes    yes    -        none
      BatchNorm, inference  -     -      -      -      -        none
      BatchRenorm           -     -      -      -      -        unit
      LayerNorm             -     yes    yes    -      yes      layer
      RMSNorm               -     yes    yes    -      yes      layer
      GroupNorm             -     yes    yes    -      yes      layer
      InstanceNorm          yes   yes    yes    yes    yes      unit
      WeightNorm            yes   yes    -      -      -        unit

    References:
      Ba, Kiros, Hinton, Layer Normalization, 2016.
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §3.
    """
    fields = Invariances._fields
    heads = [("", ""), *(f.replace("_", " ").rpartition(" ")[::2] for f in fields)]
    rows = [
        [name, *("yes" if cell else "-" for cell in row[:-1]), row.orthogonal_gradient]
        for name, row in INVARIANCES.items()
    ]
    lines = [*map(list, zip(*heads, strict=True)), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
