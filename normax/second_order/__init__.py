"""Newton's method: with a dense Hessian, or by conjugate gradients without a matrix.

A Newton step has the units of the weights. So w and a multiple of it visit the same
functions, and the effective learning rate is the learning rate.
"""

from normax.second_order.hessian_free import HessianFreeState, hessian_free
from normax.second_order.newton import newton

__all__ = [
    "HessianFreeState",
    "hessian_free",
    "newton",
]
