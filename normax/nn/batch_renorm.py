"""Batch renormalization: Flax's batch normalization with two corrections."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from normax._core.checks import check_range


def _at(step: jax.Array, value: float | Callable[[jax.Array], Any]) -> Any:
    return value(step) if callable(value) else value


class BatchRenorm(nnx.BatchNorm):
    r"""Batch renormalization: training that sees what inference will compute.

    $$y = \gamma \Big(\frac{x - \mu_B}{\sigma_B}\, r + d\Big) + \beta, \qquad
    r = \operatorname{clip}_{[1/r_{\max},\, r_{\max}]} \frac{\sigma_B}{\sigma}, \quad
    d = \operatorname{clip}_{[-d_{\max},\, d_{\max}]} \frac{\mu_B - \mu}{\sigma}$$

    The batch has mean $\mu_B$ and deviation $\sigma_B = (\text{var}_B +
    \varepsilon)^{1/2}$; the running statistics before it are $\mu$ and $\sigma$. No
    gradient flows through $r$ and $d$. Derivation: docs/theory/normalizers.md.

    With $r_{\max} = 1$ and $d_{\max} = 0$ the outputs equal those of `BatchNorm` to
    the last bit. Training starts there while the running statistics settle, so the
    limits are usually schedules such as `optax.linear_schedule(1, 3, 35_000, 5_000)`.

    Args:
      num_features: Number of features.
      r_max: Largest correction of the standard deviation, at least 1: a number, or a
        schedule of `step`.
      d_max: Largest correction of the mean, at least 0, in standard deviations: a
        number or a schedule.
      **batch_norm: Further arguments of `flax.nnx.BatchNorm`, with the same meaning.

    Raises:
      ValueError: `r_max` is below 1 or `d_max` below 0, or a schedule starts there.

    Attributes:
      step: `nnx.BatchStat` that counts the calls in training mode, int32 of shape ().

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> from flax import nnx
      >>> layer = normax.nn.BatchRenorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[1.0], [3.0]])
      >>> for _ in range(20):
      ...     y = layer(x)
      >>> bool(jnp.allclose(y, layer(x, use_running_average=True), atol=1e-5))
      True

    References:
      Ioffe, Batch Renormalization, 2017.
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float | Callable[[jax.Array], Any] = 3.0,
        d_max: float | Callable[[jax.Array], Any] = 5.0,
        **batch_norm: Any,
    ):
        super().__init__(num_features, **batch_norm)
        self.step = nnx.BatchStat(jnp.zeros([], jnp.int32))
        check_range("r_max", _at(self.step[...], r_max), low=1)
        check_range("d_max", _at(self.step[...], d_max), low=0)
        self.r_max = r_max
        self.d_max = d_max

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize; in training mode, also update the running statistics."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None or use_running_average:
            return super().__call__(x, use_running_average, mask=mask)
        r, d = self._corrections(x, mask)
        # (z r + d) gamma + beta = z (r gamma) + (d gamma + beta). So a BatchNorm with
        # another scale and bias applies the corrections. It shares our statistics.
        graphdef, state = nnx.split(self)
        corrected = nnx.merge(graphdef, state)
        scale = 1 if self.scale is None else self.scale[...]
        bias = 0 if self.bias is None else self.bias[...]
        corrected.scale = nnx.Param(r * scale)
        corrected.bias = nnx.Param(d * scale + bias)
        self.step[...] = optax.safe_increment(self.step[...])
        return nnx.BatchNorm.__call__(corrected, x, False, mask=mask)

    def _corrections(
        self, x: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        # With momentum 0 a BatchNorm stores the statistics of the batch alone.
        batch = nnx.clone(self)
        batch.momentum = 0.0
        nnx.BatchNorm.__call__(batch, x, False, mask=mask)
        mean, deviation = self.mean[...], jnp.sqrt(self.var[...] + self.epsilon)
        batch_deviation = jnp.sqrt(batch.var[...] + self.epsilon)
        r_max, d_max = (
            _at(self.step[...], limit) for limit in (self.r_max, self.d_max)
        )
        r = jnp.clip(batch_deviation / deviation, 1 / r_max, r_max)
        d = jnp.clip((batch.mean[...] - mean) / deviation, -d_max, d_max)
        return jax.lax.stop_gradient((r, d))
