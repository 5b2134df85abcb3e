"""Which weights are scale-invariant, and what follows for weight decay.

A weight vector is scale-invariant if the loss does not see its length. Then its
gradient is orthogonal to it, and weight decay sets its effective learning rate. Such
vectors are found from the loss alone. Derivation: docs/theory/invariance.md.
"""

from normax.invariance.groups import JointScaleInvariance
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
    "JointScaleInvariance",
    "ScaleInvarianceReport",
    "invariance_table",
    "scale_invariance_report",
    "scale_invariant_axes",
    "weight_decay_mask",
]
