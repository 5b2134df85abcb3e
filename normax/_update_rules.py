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
                    `normax.newton(η)`, whose update takes the loss, `value_fn`
=================== ============================================================

Like optax's own, the rules want floating-point parameters; `optax.masked` keeps
others from them.

Under a schedule the papers' velocity holds past rates, while optax multiplies the
whole velocity by the rate of today; for a constant rate they are the same. Two
slips of the papers are mended: the sign of the momentum step, and Adam's
corrections $1 - b^t$, printed as $1 - b$.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from normax._axes import PyTree
from normax._checks import requiring_params
from normax._second_order import newton
from normax._unit_norm import normalized_sgd


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


def _rule(
    name: str,
    norm_power: int,
    optimizer: Callable[..., optax.GradientTransformation],
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
    return UpdateRule(name, norm_power, make)


UPDATE_RULES: Mapping[str, UpdateRule] = types.MappingProxyType(
    {
        rule.name: rule
        for rule in (
            _rule("sgd", 2, optax.sgd),
            _rule("momentum", 2, optax.sgd, momentum=0.9),
            _rule("nesterov", 2, optax.sgd, momentum=0.9, nesterov=True),
            _rule("adagrad", 1, optax.adagrad, initial_accumulator_value=0.0),
            _rule("rmsprop", 1, optax.rmsprop),
            _rule("adadelta", 0, optax.adadelta),
            _rule("adam", 1, optax.adam),
            _rule("adamw", 1, optax.adamw, decays_itself=True),
            _rule("normalized_sgd", 0, normalized_sgd, decays_itself=True),
            _rule("newton", 0, newton, decays_itself=True),
        )
    }
)
