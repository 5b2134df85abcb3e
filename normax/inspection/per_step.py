r"""From the angle between two checkpoints to the angle of one step."""

import numpy as np

# Below this cosine between checkpoints what is left of it is noise.
_FORGOTTEN = 0.1


def angle_per_step(versine: float, steps: int, correlation: float = 1.0) -> float:
    r"""Return the angle of one step of a random walk on the sphere.

    $$\cos\varphi_n = (\cos\theta)^{D_n}, \qquad
    D_n = \frac{n}{c} - \frac{2\rho\,(1 - \rho^n)}{(1 - \rho)^2}, \qquad
    c = \frac{1 - \rho}{1 + \rho}$$

    for steps with the correlations $\rho^k$ of an exponential average. Independent
    steps have $c = 1$ and $D_n = n$. Steps of a gradient without noise agree instead,
    and have $\varphi_n / n$; those that a steep loss throws back have more. Two
    checkpoints do not tell one from the other.

    Args:
      versine: Mean of $1 - \cos\varphi_n$ over the vectors of an array.
      steps: Number $n$ of steps between the checkpoints.
      correlation: The share $c$.

    Returns:
      The angle $\theta$ in radians; NaN where the vectors have turned so far that the
      checkpoint before is forgotten.
    """
    if not versine < 1 - _FORGOTTEN or steps < 1:
        return np.nan
    rho = (1 - correlation) / (1 + correlation)
    variance = steps / correlation - 2 * rho * (1 - rho**steps) / (1 - rho) ** 2
    return float(np.arccos(np.exp(np.log1p(-versine) / variance)))
