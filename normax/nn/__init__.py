"""Normalization layers for Flax NNX: Flax's own, and those it lacks or has wrong.

A Linen module takes ours through Flax's bridge, given a function that builds the layer:

    def dense(inputs, outputs, *, rngs):
        return normax.nn.WeightNorm(nnx.Linear(inputs, outputs, rngs=rngs))

    x = nnx.bridge.to_linen(dense, 784, 128)(x)
    norm = nnx.bridge.to_linen(normax.nn.BatchRenorm, 128)
    x = norm(x, use_running_average=not train)
"""

from flax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

from normax.nn.batch_renorm import BatchRenorm
from normax.nn.fold.layer import fold_batch_norm, folding_error
from normax.nn.fold.model import FoldedModel, fold_batch_norms
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
]
