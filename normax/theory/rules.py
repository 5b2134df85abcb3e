r"""The papers' update rules as optax transformations, and their effective rates.

Every rule minimizes $L_\lambda(w) = L(w) + \tfrac{\lambda}{2}\|w\|^2$, whose
gradient is $g = \nabla L(w) + \lambda w$: weight decay is *coupled*, the rule sees
it as part of the gradient. The exception is AdamW, which is *decoupled*: it
shrinks the weights by $\eta\lambda w$ beside the rule. (Van Laarhoven prints the
penalty as $\lambda\|w\|^2$ but computes with the one above.)

=================== ============================================================
rule                recurrence, with the optax call that is it
=================== ============================================================
`"sgd"`             $w \leftarrow w - \eta g$; `optax.sgd(η)`
`"momentum"`        $v \leftarrow \rho v - \eta g,\; w \leftarrow w + v$;
                    `optax.sgd(η, momentum=ρ)`
`"nesterov"`        as momentum, with $g$ taken at $w + \rho v$;
                    `optax.sgd(η, momentum=ρ, nesterov=True)`, whose parameters
                    are the shifted $w + \rho v$
`"adagrad"`         $r \leftarrow r + g^2,\; w \leftarrow w - \eta g/\sqrt{r + ε}$;
                    `optax.adagrad(η, initial_accumulator_value=0, eps=ε)`
`"rmsprop"`         $r \leftarrow \rho r + (1-\rho) g^2,\;
                    w \leftarrow w - \eta g/\sqrt{r + ε}$;
                    `optax.rmsprop(η, decay=ρ, eps=ε)`
`"adadelta"`        $r$ as in RMSProp, $u = g\sqrt{d + ε}/\sqrt{r + ε},\;
                    d \leftarrow \rho d + (1-\rho) u^2,\; w \leftarrow w - \eta u$;
                    `optax.adadelta(η, rho=ρ, eps=ε)`; the paper has $\eta = 1$
`"adam"`            $m \leftarrow b_1 m + (1-b_1) g,\;
                    r \leftarrow b_2 r + (1-b_2) g^2,\;
                    w \leftarrow w - \eta \hat m/(\sqrt{\hat r} + ε)$ with
                    $\hat m = m/(1-b_1^t),\; \hat r = r/(1-b_2^t)$;
                    `optax.adam(η, b1, b2, eps=ε)`
`"adamw"`           $w \leftarrow w - \eta\,(\hat m/(\sqrt{\hat r} + ε) + \lambda w)$,
                    with $g = \nabla L(w)$; `optax.adamw(η, b1, b2, eps=ε)`
`"normalized_sgd"`  $\tilde w = w - \eta g,\; w \leftarrow \tilde w/\|\tilde w\|$;
                    `normax.normalized_sgd(η)`
`"newton"`          $w \leftarrow w - \eta\,(\nabla^2 L(w) + \lambda I)^{-1} g$;
                    `normax.second_order.newton(η)`, whose update takes the loss,
                    `value_fn`
`"hessian_free"`    as Newton's, by conjugate gradients that may stop early, and
                    halved until the loss decreases;
                    `normax.second_order.hessian_free(η, damping=0)`
=================== ============================================================

Like optax's own, the rules want floating-point parameters; `optax.masked` keeps
others from them. L-BFGS (`optax.lbfgs`) is not among them: its steps have the units of
the weights, as AdaDelta's, but the first, without memory, is $\eta\min(1, \|g\|)$
long, so that $\eta_\mathrm{eff}$ is of no one form.

Under a schedule the papers' velocity holds past rates, while optax multiplies the
whole velocity by the rate of today; for a constant rate they are the same. Two
slips of the papers are mended: the sign of the momentum step, and Adam's
corrections $1 - b^t$, printed as $1 - b$.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax._core.axes import PyTree
from normax._core.checks import check_positive, check_range, requiring_params
from normax._core.norms import at_least_float32
from normax.second_order.hessian_free import hessian_free
from normax.second_order.newton import newton
from normax.spheres.projection import normalized_sgd
from normax.theory.equilibrium import (
    ADADELTA,
    ADAM,
    ADAMW,
    NEWTON,
    NORMALIZED_SGD,
    RMSPROP,
    SGD,
    Equilibrium,
    Theory,
    steps_to_equilibrium,
)

# Hyperparameters that change a rule unless they are None, False or 0.
_CHANGING = {"momentum", "nesterov", "centered", "damping"}


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    r"""An update rule: how to make it, and the rate it really trains with.

    Attributes:
      name: Key of the rule in `UPDATE_RULES`.
      norm_power: The exponent $p$ of $\eta_\mathrm{eff} = \eta / \|w\|^p$.
      make: Called as `make(learning_rate, weight_decay=0.0, **hyperparameters)`;
        returns the transformation, which needs `params`. The learning rate is a
        number or a schedule; the decay is that of all parameters (wrap the rule
        in `optax.partition` to decay some of them); the hyperparameters are those
        of the optax call that is the rule, by optax's names, and `momentum` is 0.9
        where it is not given.
      theory: Where the rule's norm settles; None where it does not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> tx = normax.UPDATE_RULES["sgd"].make(0.5, weight_decay=0.1)
      >>> params = jnp.array([2.0])
      >>> tx.update(jnp.array([1.0]), tx.init(params), params)[0]
      Array([-0.6], dtype=float32)
    """

    name: str
    norm_power: int
    make: Callable[..., optax.GradientTransformationExtraArgs] = dataclasses.field(
        repr=False
    )
    theory: Theory | None = dataclasses.field(repr=False)

    def effective_learning_rate(
        self, learning_rate: jax.typing.ArrayLike, weight_norm: PyTree
    ) -> PyTree:
        r"""Learning rate of the rule on weights of norm one.

        $$\eta_\mathrm{eff} = \eta / \|w\|^p$$

        A step of the rule at rate $\eta$ from scale-invariant weights $w$ arrives
        at the same function as a step at rate $\eta_\mathrm{eff}$ from
        $w / \|w\|$. Rules that follow the gradient have $p = 2$, since it is
        itself inverse to $\|w\|$; those that divide by its size have $p = 1$;
        those whose step has the units of the weights have $p = 0$. For the
        adaptive rules this holds as $\epsilon \to 0$.

        Args:
          learning_rate: Learning rate $\eta$.
          weight_norm: Norms of the weight vectors: a number, an array, or a pytree
            as `normax.weight_norm` returns it.

        Returns:
          Effective learning rates, in the structure of `weight_norm`.

        Examples:
          >>> import normax
          >>> normax.UPDATE_RULES["momentum"].effective_learning_rate(0.1, 2.0)
          0.025
          >>> normax.UPDATE_RULES["adam"].effective_learning_rate(0.1, 2.0)
          0.05

        References:
          van Laarhoven, L2 Regularization versus Batch and Weight Normalization,
          2017, sections 3.1 and 5, Table 1, first column.
        """
        return jax.tree.map(
            lambda norm: learning_rate / norm**self.norm_power, weight_norm
        )

    def equilibrium_norm(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_decay: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike | None = None,
        dimension: jax.typing.ArrayLike | None = None,
        **hyperparameters: Any,
    ) -> jax.Array:
        r"""Norm at which the rule and weight decay hold a scale-invariant vector.

        For SGD this is exact,

        $$\|w\|^4 = \frac{\eta G^2}{2\lambda - \eta\lambda^2}.$$

        To leading order in $\eta\lambda$, the others have

        $$\|w\|^4 = \frac{\eta G^2}{2\lambda\,(1-\rho)}, \qquad
        \|w\|^3 = \frac{\eta\sqrt d\,G}{2\lambda}, \qquad
        \|w\|^2 = \frac{\eta d}{2\lambda}$$

        for momentum of either kind; for RMSProp and Adam, whose decay is coupled; and
        for AdamW. What is computed goes further: momentum is exact too, AdamW is
        exact but for the noise of its denominator, RMSProp and Adam account for
        this noise. AdaDelta's $\eta$ is first multiplied by the length of its step,
        which $\epsilon$ sets. The norm of normalized SGD is 1. AdaGrad's falls for
        ever. Measured errors are below 1% for $\kappa \le 0.1$, the share of the norm
        that decay takes per step, with RMSProp's $\rho \ge 0.9$ and Adam's
        $b_2 \ge 0.95$; AdaDelta's is 3%. At $\kappa = 0.3$, where decay is no small
        part of the adaptive denominator, it is 3% for RMSProp and 2% for Adam. All
        hold where gradients are noise, orthogonal to $w$, of many independent
        entries, of the size $G / (\sqrt d\,\|w\|)$, that are large beside Adam's
        $\epsilon$ or the root of RMSProp's and AdaDelta's: only in AdaDelta's step does
        the value of `eps` count.

        Args:
          learning_rate: Learning rate $\eta$, positive.
          weight_decay: Weight decay $\lambda$; where it is 0, the norm is infinite.
          gradient_norm: $G = (\mathbb E\,\|\nabla L\|^2)^{1/2}$ of one weight vector
            at $\|w\| = 1$. May be None for AdamW and normalized SGD.
          dimension: Number $d$ of entries of the weight vector. May be None for SGD,
            momentum, Nesterov momentum and normalized SGD.
          **hyperparameters: Those of the rule by optax's names, with its defaults.

        Returns:
          Norms, in the common shape of all arguments, in float32 or better.

        Raises:
          TypeError: The rule has no such hyperparameter.
          ValueError: The rule has no equilibrium, training would diverge, an argument
            is missing or out of range, or a hyperparameter changes the rule beyond
            the theory.

        Examples:
          >>> import normax
          >>> rule = normax.UPDATE_RULES["sgd"]
          >>> print(f"{rule.equilibrium_norm(0.1, 1e-3, gradient_norm=2.0):.3f}")
          3.761
          >>> normax.UPDATE_RULES["adamw"].equilibrium_norm(1e-3, 0.1, dimension=64)
          Array(0.56515354, dtype=float32)

        References:
          van Laarhoven, L2 Regularization versus Batch and Weight Normalization,
          2017, section 4 and Table 1. Kosson, Messmer, Jaggi, Rotational
          Equilibrium, 2024.
        """
        theory = self._theory()
        given = (learning_rate, weight_decay, gradient_norm, dimension)
        return self._settle(theory, theory.norm_needs, given, hyperparameters).norm

    def equilibrium_rotation(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_decay: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike | None = None,
        dimension: jax.typing.ArrayLike | None = None,
        **hyperparameters: Any,
    ) -> jax.Array:
        r"""Angle by which the rule turns a scale-invariant vector that has settled.

        For SGD with momentum and for AdamW it depends on $\eta\lambda$ alone,

        $$\cos\theta = 1 - \frac{\eta\lambda}{1+\rho}, \qquad
        \theta \approx \Big(2\eta\lambda\,\frac{1-b_1}{1+b_1}\Big)^{1/2},$$

        the first exactly, the second to leading order in $\eta\lambda$. Adam and
        RMSProp ($b_1 = 0$) have the second with the share $\kappa$ of the norm
        that their decay takes,
        $\kappa^3 = \eta^4 \lambda^2 d^2 / (2 G^2)$, for $\eta\lambda$. For
        normalized SGD $\tan\theta = \eta G / (1 - \eta\lambda)$. How good it is:
        as `equilibrium_norm`, but 1.5% for Adam at $\kappa = 0.1$ and 4% at 0.3,
        and 5% for AdaDelta.

        Args:
          learning_rate: Learning rate $\eta$, positive.
          weight_decay: Weight decay $\lambda$.
          gradient_norm: As in `equilibrium_norm`. May be None for SGD, momentum,
            Nesterov momentum and AdamW.
          dimension: As in `equilibrium_norm`. May be None for all but RMSProp,
            AdaDelta and Adam.
          **hyperparameters: Those of the rule by optax's names, with its defaults.

        Returns:
          Angles in radians per step, root mean squares, in the common shape of
          all arguments, in float32 or better.

        Raises:
          TypeError: The rule has no such hyperparameter.
          ValueError: As in `equilibrium_norm`.

        Examples:
          >>> import normax
          >>> normax.UPDATE_RULES["adamw"].equilibrium_rotation(1e-3, 0.1).round(6)
          Array(0.003244, dtype=float32)

        References:
          Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024.
        """
        theory = self._theory()
        given = (learning_rate, weight_decay, gradient_norm, dimension)
        return self._settle(
            theory, theory.rotation_needs, given, hyperparameters
        ).rotation

    def equilibrium_time(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_decay: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike | None = None,
        dimension: jax.typing.ArrayLike | None = None,
        *,
        initial_norm: jax.typing.ArrayLike,
        **hyperparameters: Any,
    ) -> jax.Array:
        r"""Steps until the norm is within 10% of `equilibrium_norm`.

        With $x = \|w\| / \|w\|_\mathrm{eq}$ it is the time, to leading order in
        $\kappa$, in which

        $$\frac{dx}{dt} = \kappa\,(x^{1-2p} - x^{3-p})$$

        comes from $x_0$ to 0.9 or 1.1, where $p$ is `norm_power` (1 for AdaDelta); for
        AdamW the bracket is $x^{-1} - x$. Within 5% in simulations, give or take the
        memory of averages over past gradients, $1/(1-\rho)$ steps or twice that. Not
        counted: where $\kappa$ is not small beside $1 - b_2$, the denominator lags
        behind the norm, which settles only with it, in some $2/(1-b_2)$ steps; and
        a start so near 0 that the first step overshoots.

        Args:
          learning_rate: Learning rate $\eta$, positive.
          weight_decay: Weight decay $\lambda$.
          gradient_norm: As in `equilibrium_norm`.
          dimension: As in `equilibrium_norm`.
          initial_norm: Norm of the weight vector at the start, positive.
          **hyperparameters: Those of the rule by optax's names, with its defaults.

        Returns:
          Numbers of steps, not rounded, in the common shape of all arguments, in
          float32 or better; 0 where the start is within 10%.

        Raises:
          TypeError: The rule has no such hyperparameter.
          ValueError: As in `equilibrium_norm`.

        Examples:
          >>> import normax
          >>> rule = normax.UPDATE_RULES["adamw"]
          >>> rule.equilibrium_time(1e-3, 0.1, dimension=64, initial_norm=1.0).round()
          Array(11586., dtype=float32)

        References:
          van Laarhoven, L2 Regularization versus Batch and Weight Normalization,
          2017, section 4.
        """
        check_positive("initial_norm", initial_norm)
        theory = self._theory()
        given = (learning_rate, weight_decay, gradient_norm, dimension)
        settled = self._settle(theory, theory.norm_needs, given, hyperparameters)
        (start,) = at_least_float32(initial_norm)
        start, norm, rate = jnp.broadcast_arrays(
            start, settled.norm, settled.decay_rate
        )
        return steps_to_equilibrium(theory, start / norm, rate)

    def _theory(self) -> Theory:
        if self.theory is None:
            raise ValueError(
                f"UPDATE_RULES[{self.name!r}] has no equilibrium: its norm and "
                "rotation fall for ever; choose another rule, such as 'rmsprop'."
            )
        return self.theory

    def _settle(
        self,
        theory: Theory,
        needs: tuple[str, ...],
        given: tuple[jax.typing.ArrayLike | None, ...],
        hyperparameters: dict[str, Any],
    ) -> Equilibrium:
        signature = inspect.signature(self.make)
        bound = signature.bind(*given[:2], **hyperparameters)
        bound.apply_defaults()
        arguments = bound.arguments | dict(
            zip(("gradient_norm", "dimension"), given[2:], strict=True)
        )
        known = inspect.signature(theory.settle).parameters
        for name in _CHANGING & (arguments.keys() - known):
            value = arguments[name]
            if isinstance(value, jax.core.Tracer) or np.any(value):
                raise ValueError(
                    f"the equilibrium of UPDATE_RULES[{self.name!r}] is not known for "
                    f"{name}={value}; leave {name} at its default."
                )
        for name in needs:
            if arguments[name] is None:
                raise ValueError(
                    f"the equilibrium of UPDATE_RULES[{self.name!r}] depends on the "
                    f"{name}, but it is None; pass {name}."
                )
        arguments = {name: arguments[name] for name in known}
        nesterov = (
            {"nesterov": arguments.pop("nesterov")} if "nesterov" in known else {}
        )
        for name, value in arguments.items():
            if name in ("learning_rate", "gradient_norm", "dimension"):
                check_positive(name, value)
            else:
                below = math.inf if name in ("weight_decay", "eps") else 1.0
                check_range(name, value, low=0, below=below)
        absent = {"gradient_norm": 1.0, "dimension": 1.0, "momentum": 0.0}
        values = [
            absent[name] if value is None else value
            for name, value in arguments.items()
        ]
        arrays = jnp.broadcast_arrays(*at_least_float32(*values))
        return theory.settle(**dict(zip(arguments, arrays, strict=True)), **nesterov)


def _rule(
    name: str,
    norm_power: int,
    optimizer: Callable[..., optax.GradientTransformation],
    theory: Theory | None,
    decays_itself: bool = False,
    **defaults: Any,
) -> UpdateRule:
    def make(learning_rate, weight_decay=0.0, **hyperparameters):
        hyperparameters = defaults | hyperparameters
        if decays_itself:
            transformation = optimizer(
                learning_rate, weight_decay=weight_decay, **hyperparameters
            )
        else:
            transformation = optax.chain(
                optax.add_decayed_weights(weight_decay),
                optimizer(learning_rate, **hyperparameters),
            )
        return requiring_params(f"UPDATE_RULES[{name!r}]", transformation)

    # `optax.inject_hyperparams` and `help` read the hyperparameters from here.
    signature = inspect.signature(make)
    first = list(signature.parameters.values())[:2]
    rest = [
        parameter.replace(
            kind=parameter.KEYWORD_ONLY,
            default=defaults.get(parameter.name, parameter.default),
        )
        for parameter in inspect.signature(optimizer).parameters.values()
        if not parameter.name.startswith(("learning_rate", "weight_decay"))
    ]
    make.__signature__ = signature.replace(parameters=first + rest)  # type: ignore[attr-defined]
    return UpdateRule(name, norm_power, make, theory)


UPDATE_RULES: Mapping[str, UpdateRule] = types.MappingProxyType(
    {
        rule.name: rule
        for rule in (
            _rule("sgd", 2, optax.sgd, SGD),
            _rule("momentum", 2, optax.sgd, SGD, momentum=0.9),
            _rule("nesterov", 2, optax.sgd, SGD, momentum=0.9, nesterov=True),
            _rule("adagrad", 1, optax.adagrad, None, initial_accumulator_value=0.0),
            _rule("rmsprop", 1, optax.rmsprop, RMSPROP),
            _rule("adadelta", 0, optax.adadelta, ADADELTA),
            _rule("adam", 1, optax.adam, ADAM),
            _rule("adamw", 1, optax.adamw, ADAMW, decays_itself=True),
            _rule(
                "normalized_sgd", 0, normalized_sgd, NORMALIZED_SGD, decays_itself=True
            ),
            _rule("newton", 0, newton, NEWTON, decays_itself=True),
            _rule(
                "hessian_free",
                0,
                hessian_free,
                NEWTON,
                decays_itself=True,
                damping=0.0,
            ),
        )
    }
)
