"""Path geometry of ReLU networks: norms, distances, pruning and Path-SGD.

Rescaling a hidden unit, its incoming weights by c and its outgoing ones by 1/c, keeps
the function of a ReLU network. Products of weights along paths do not see it either.
A path norm is a norm of all these products; Path-SGD divides each gradient by the
curvature of that norm. The distance of two networks in their space bounds how far the
outputs are apart, and pruning by them is blind to rescaling. The network is any JAX
function: it is traced, and its primitives are interpreted one by one (`lifting`,
`primitives`), in an arithmetic of sums over paths that neither overflows nor underflows
(`arithmetic`).
"""

from normax.paths.certificate import output_change_bound
from normax.paths.metric import path_metric, path_metric_bound
from normax.paths.norm import path_norm, path_scales
from normax.paths.pruning import path_mask, path_prune
from normax.paths.saliency import path_saliency
from normax.paths.sgd import ScaleByPathSGDState, path_sgd, scale_by_path_sgd

__all__ = [
    "ScaleByPathSGDState",
    "output_change_bound",
    "path_mask",
    "path_metric",
    "path_metric_bound",
    "path_norm",
    "path_prune",
    "path_saliency",
    "path_scales",
    "path_sgd",
    "scale_by_path_sgd",
]
