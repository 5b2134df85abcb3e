"""Normalization layers for Flax NNX: Flax's own, and those it lacks or has wrong.

A Linen module uses them through Flax's bridge, see docs/theory/normalizers.md.
"""

from flax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

from normax.nn.batch_renorm import BatchRenorm
from normax.nn.fold.layer import fold_batch_norm, folding_error
from normax.nn.fold.model import FoldedModel, fold_batch_norms
from normax.nn.unit_axes import unit_axes
from normax.nn.weight_norm import WeightNorm, initialize_weight_norm

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "FoldedModel",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "WeightNorm",
    "fold_batch_norm",
    "fold_batch_norms",
    "folding_error",
    "initialize_weight_norm",
    "unit_axes",
]
