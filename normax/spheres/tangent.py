"""SGDP and AdamP: momentum kept tangent to the sphere of scale-invariant weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import Axes, check_axes, map_vectors
from normax._core.checks import check_learning_rate, check_range, requiring_params
from normax._core.norms import at_least_float32, finish_polar_parts, nonzero
from normax.spheres.projection import (
    radial_parts,
    remove_radial_component,
    without_radial,
)


def _is_orthogonal(u_norm, radial, size, delta):
    """Guess whether gradients whose radial parts are so small never have one."""
    cosine = jnp.abs(radial) / nonzero(u_norm)
    entries = size / max(cosine.size, 1)
    return jnp.max(cosine, initial=0.0) < delta / max(entries, 1) ** 0.5


def _project_tangent(
    name: str,
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    delta: jax.typing.ArrayLike,
    wd_ratio: jax.typing.ArrayLike,
    axes: Axes | None,
) -> optax.GradientTransformationExtraArgs:
    """Project the directions of `inner`, decay, and scale by the learning rate."""
    check_learning_rate(learning_rate)
    check_range("delta", delta, low=0)
    check_range("wd_ratio", wd_ratio, low=0)
    if axes is not None:
        check_axes(axes)

    def decay(w, u, ratio=1.0):
        w, x = at_least_float32(w, u)
        return (x + weight_decay * ratio * w).astype(jnp.result_type(u))

    def exact(updates, params):
        projection = remove_radial_component(axes)
        tangential, _ = projection.update(updates, projection.init(params), params)
        return map_vectors(
            lambda vector_axes, w, u: decay(w, u, wd_ratio),
            axes,
            params,
            tangential,
            otherwise=lambda w, u: None if u is None else decay(w, u),
        )

    def guess(rows):
        """Project per unit or as a layer, where gradients are orthogonal so."""
        views = [(a, tuple(range(w.ndim))) for a, w, *_ in rows]
        pairs = [
            (view, w, x)
            for both, (_, w, *updates) in zip(views, rows, strict=True)
            for view in both
            for x in updates
        ]
        found = iter(finish_polar_parts(radial_parts, pairs)[0])
        results = []
        for _, w, u, _ in rows:
            chosen, ratio = u, 1.0
            # The units' view comes last, since it has precedence.
            for (w_norm, _, radial), (_, g_norm, g_radial) in [
                (next(found), next(found)) for _ in range(2)
            ][::-1]:
                fires = _is_orthogonal(g_norm, g_radial, w.size, delta)
                chosen = jnp.where(fires, without_radial(w, u, w_norm, radial), chosen)
                ratio = jnp.where(fires, wd_ratio, ratio)
            results.append(decay(w, chosen, ratio))
        return results

    def by_rule(grads, updates, params):
        return map_vectors(
            guess,
            "unit",
            params,
            updates,
            grads,
            otherwise=lambda w, u, g: None if u is None else decay(w, u),
            together=True,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        directions, state = inner.update(updates, state, params)
        if axes is None:
            return by_rule(updates, directions, params), state
        return exact(directions, params), state

    def init_fn(params):
        if axes is not None:
            remove_radial_component(axes).init(params)
        return inner.init(params)

    chain = optax.chain(
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )
    return requiring_params(name, chain)


def _momentum(
    momentum: jax.typing.ArrayLike, dampening: jax.typing.ArrayLike, nesterov: bool
) -> optax.GradientTransformation:
    trace = optax.trace(momentum)

    def update_fn(updates, state, params=None):
        damped = jax.tree.map(lambda g: (1 - dampening) * g, updates)
        velocity, state = trace.update(damped, state, params)
        if nesterov:
            velocity = jax.tree.map(lambda g, v: g + momentum * v, updates, velocity)
        return velocity, state

    return optax.GradientTransformation(trace.init, update_fn)


def _adam(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    nesterov: bool,
) -> optax.GradientTransformation:
    # scale_by_adam(nesterov=True) corrects the momentum by the next step's
    # 1 - b1^(t+1). The published rule corrects it by this step's 1 - b1^t.
    adam = optax.scale_by_adam(b1, b2, eps)

    def update_fn(updates, state, params=None):
        directions, state = adam.update(updates, state, params)
        if nesterov:
            grads = optax.tree.bias_correction(updates, b1, state.count)
            squares = optax.tree.bias_correction(state.nu, b2, state.count)
            directions = jax.tree.map(
                lambda g, r, d: (
                    None if g is None else b1 * d + (1 - b1) * g / (jnp.sqrt(r) + eps)
                ),
                grads,
                squares,
                directions,
                is_leaf=lambda node: node is None,
            )
        return directions, state

    return optax.GradientTransformation(adam.init, update_fn)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.0,
    dampening: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum whose steps are tangent where weights are scale-invariant.

    $$v \leftarrow \rho v + (1 - \tau) g, \qquad
    w \leftarrow w - \eta\,\Big(\Pi_w(p) + \frac{\lambda s}{1 - \rho}\,w\Big)$$

    with $p = v$, or $p = g + \rho v$ for Nesterov's momentum. `adamp` describes $\Pi_w$
    and $s$.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      momentum: Decay $\rho$ of the velocity, at least 0 and below 1.
      dampening: Part $\tau$ of the gradient that the velocity leaves out.
      weight_decay: Weight decay $\lambda$ of all parameters.
      nesterov: Whether the momentum is Nesterov's.
      delta: As in `adamp`.
      wd_ratio: As in `adamp`.
      axes: As in `adamp`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, grads = jnp.array([[2.0], [0.0]]), jnp.array([[3.0], [1.0]])
      >>> tx = normax.sgdp(learning_rate=0.5, axes="unit")
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates.ravel() + 0
      Array([ 0. , -0.5], dtype=float32)

    References:
      Heo et al., AdamP, 2021, arXiv:2006.08217.
    """
    check_range("momentum", momentum, low=0, below=1)
    check_range("dampening", dampening, low=0, below=1)
    check_range("weight_decay", weight_decay, low=0)
    return _project_tangent(
        "sgdp",
        _momentum(momentum, dampening, nesterov),
        learning_rate,
        weight_decay / (1 - momentum),
        delta,
        wd_ratio,
        axes,
    )


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose steps are tangent where the weights are scale-invariant.

    $$p = \frac{\hat m}{\sqrt{\hat r} + \epsilon}, \qquad
    w \leftarrow w - \eta\,\big(\Pi_w(p) + \lambda s\,w\big)$$

    where $\Pi_w$ removes the radial part, and $s$ is `wd_ratio`, for scale-invariant
    arrays; for others $\Pi_w(p) = p$ and $s = 1$. The published *cosine rule* guesses
    from the gradient which is which; `axes` knows. More: docs/theory/spheres.md.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      b1: Decay of the average of gradients.
      b2: Decay of the average of squared gradients.
      eps: Added to the root, outside of it.
      weight_decay: Weight decay $\lambda$ of all parameters, decoupled.
      nesterov: Whether the momentum is Nesterov's.
      delta: Threshold $\delta$ of the cosine rule.
      wd_ratio: Factor of the weight decay of scale-invariant arrays.
      axes: None for the cosine rule; or which entries form one scale-invariant vector.
        `jax.shard_map` wants the latter, because the rule would see local units only.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, grads = jnp.array([[2.0], [0.0]]), jnp.array([[3.0], [1.0]])
      >>> tx = normax.adamp(learning_rate=0.5, axes="unit")
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates.ravel().round(3) + 0
      Array([ 0. , -0.5], dtype=float32)

    References:
      Heo et al., AdamP, 2021, arXiv:2006.08217.
    """
    check_range("b1", b1, low=0, below=1)
    check_range("b2", b2, low=0, below=1)
    check_range("eps", eps, low=0)
    check_range("weight_decay", weight_decay, low=0)
    return _project_tangent(
        "adamp",
        _adam(b1, b2, eps, nesterov),
        learning_rate,
        weight_decay,
        delta,
        wd_ratio,
        axes,
    )
