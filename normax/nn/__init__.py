"""Normalization layers for Flax NNX: Flax's own, and those it lacks or has wrong.

A Linen module takes ours through Flax's bridge, given a function that builds the layer:

    def dense(inputs, outputs, *, rngs):
        return normax.nn.WeightNorm(nnx.Linear(inputs, outputs, rngs=rngs))

    x = nnx.bridge.to_linen(dense, 784, 128)(x)
    norm = nnx.bridge.to_linen(normax.nn.BatchRenorm, 128)
    x = norm(x, use_running_average=not train)
"""

from flax.nnx import BatchNorm as BatchNorm
from flax.nnx import GroupNorm as GroupNorm
from flax.nnx import InstanceNorm as InstanceNorm
from flax.nnx import LayerNorm as LayerNorm
from flax.nnx import RMSNorm as RMSNorm

from normax.invariance.normalizers import INVARIANCES as INVARIANCES
from normax.invariance.normalizers import Invariances as Invariances
from normax.invariance.normalizers import invariance_table as invariance_table
from normax.nn.batch_renorm import BatchRenorm as BatchRenorm
from normax.nn.fold.layer import fold_batch_norm as fold_batch_norm
from normax.nn.fold.layer import folding_error as folding_error
from normax.nn.fold.model import FoldedModel as FoldedModel
from normax.nn.fold.model import fold_batch_norms as fold_batch_norms
from normax.nn.weight_norm import WeightNorm as WeightNorm
from normax.nn.weight_norm import initialize_weight_norm as initialize_weight_norm
