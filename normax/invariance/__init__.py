"""Which weights are scale-invariant, and what follows for weight decay.

A weight vector is scale-invariant if the loss does not see its length. Then its
gradient is orthogonal to it, and weight decay does not regularize: it sets the
effective learning rate. Here such vectors are found from the loss alone, with the
evidence, and made into a mask for weight decay. A table says what each kind of
normalization layer is invariant to.
"""

from normax.invariance.masks import weight_decay_mask
from normax.invariance.normalizers import INVARIANCES, Invariances, invariance_table
from normax.invariance.report import (
    ArrayScaleInvariance,
    ScaleInvarianceReport,
    scale_invariance_report,
    scale_invariant_axes,
)

__all__ = [
    "INVARIANCES",
    "ArrayScaleInvariance",
    "Invariances",
    "ScaleInvarianceReport",
    "invariance_table",
    "scale_invariance_report",
    "scale_invariant_axes",
    "weight_decay_mask",
]
