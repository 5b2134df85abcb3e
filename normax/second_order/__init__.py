"""Newton's method, by a dense Hessian or by conjugate gradients."""
