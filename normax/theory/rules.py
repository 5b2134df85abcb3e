"""The papers' update rules, each an optax call with its hyperparameters and theory.

Weight decay is *coupled*: it is part of the gradient that a rule sees. Only that of
AdamW, Lion, Muon and Adafactor is *decoupled*: it shrinks the weights beside the rule.
Adafactor's is not multiplied by the learning rate. Recurrences: docs/theory/theory.md.
"""

import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import optax
import optax.contrib

from normax._core.checks import nearest
from normax.second_order.hessian_free import hessian_free
from normax.second_order.newton import newton
from normax.spheres.projection import normalized_sgd
from normax.theory import moments
from normax.theory.equilibrium import (
    ADADELTA,
    ADAFACTOR,
    ADAM,
    ADAMW,
    LION,
    MUON,
    NEWTON,
    NORMALIZED_SGD,
    RMSPROP,
    SGD,
)
from normax.theory.recurrence import Hyperparameter
from normax.theory.update_rule import UpdateRule


def _known(name: str, default: object, below: float | None = 1.0) -> Hyperparameter:
    """Return a hyperparameter whose values the equilibrium takes, whatever they are."""
    return Hyperparameter(name, default, below, in_theory=True)


def _of_this_optax(
    call: Callable[..., Any], *hyperparameters: Hyperparameter
) -> tuple[Hyperparameter, ...]:
    """Return those that the installed version of the call has."""
    names = inspect.signature(call).parameters
    return tuple(h for h in hyperparameters if h.name in names)


def _adafactor(learning_rate, weight_decay, **hyperparameters):
    return optax.adafactor(
        learning_rate, weight_decay_rate=weight_decay, **hyperparameters
    )


def _sgd(name: str, momentum: float | None, nesterov: bool) -> UpdateRule:
    hyperparameters = (
        _known("momentum", momentum),
        _known("nesterov", nesterov, below=None),
        Hyperparameter("accumulator_dtype", None, below=None),
    )
    return UpdateRule(
        name=name,
        norm_power=2,
        optimizer=optax.sgd,
        theory=SGD,
        moments=moments.SGD,
        hyperparameters=hyperparameters,
    )


_ADAM = (
    _known("b1", 0.9),
    _known("b2", 0.999),
    _known("eps", 1e-8, below=math.inf),
    Hyperparameter("eps_root", 0.0),
    Hyperparameter("mu_dtype", None, below=None),
)
_NESTEROV = Hyperparameter("nesterov", False, below=None)
_MASK = Hyperparameter("mask", None, below=None)

_RULES = (
    _sgd("sgd", momentum=None, nesterov=False),
    _sgd("momentum", momentum=0.9, nesterov=False),
    _sgd("nesterov", momentum=0.9, nesterov=True),
    UpdateRule(
        name="adagrad",
        norm_power=1,
        optimizer=optax.adagrad,
        theory=None,
        moments=moments.ADAGRAD,
        hyperparameters=(
            Hyperparameter("initial_accumulator_value", 0.0),
            Hyperparameter("eps", 1e-7),
        ),
    ),
    UpdateRule(
        name="rmsprop",
        norm_power=1,
        optimizer=optax.rmsprop,
        theory=RMSPROP,
        moments=moments.RMSPROP,
        hyperparameters=(
            _known("decay", 0.9),
            _known("eps", 1e-8, below=math.inf),
            Hyperparameter("initial_scale", 0.0),
            Hyperparameter("eps_in_sqrt", True, below=None),
            Hyperparameter("centered", False, below=None),
            Hyperparameter("momentum", None, below=1.0),
            _NESTEROV,
            Hyperparameter("bias_correction", False, below=None),
        ),
    ),
    UpdateRule(
        name="adadelta",
        norm_power=0,
        optimizer=optax.adadelta,
        theory=ADADELTA,
        moments=moments.ADADELTA,
        hyperparameters=(_known("rho", 0.9), _known("eps", 1e-6, below=math.inf)),
    ),
    UpdateRule(
        name="adam",
        norm_power=1,
        optimizer=optax.adam,
        theory=ADAM,
        moments=moments.ADAM,
        hyperparameters=(*_ADAM, _NESTEROV),
    ),
    UpdateRule(
        name="adamw",
        norm_power=1,
        optimizer=optax.adamw,
        theory=ADAMW,
        moments=moments.ADAMW,
        hyperparameters=(*_ADAM, _MASK, _NESTEROV),
        decays_itself=True,
    ),
    UpdateRule(
        name="lion",
        norm_power=1,
        optimizer=optax.lion,
        theory=LION,
        moments=moments.LION,
        hyperparameters=(
            _known("b1", 0.9),
            _known("b2", 0.99),
            Hyperparameter("mu_dtype", None, below=None),
            _MASK,
        ),
        decays_itself=True,
    ),
    UpdateRule(
        name="muon",
        norm_power=1,
        flipped_power=("adaptive", 2),
        of_matrices=True,
        optimizer=optax.contrib.muon,
        theory=MUON,
        moments=moments.MUON,
        hyperparameters=_of_this_optax(
            optax.contrib.muon,
            _known("ns_coeffs", (3.4445, -4.7750, 2.0315), below=None),
            _known("ns_steps", 5, below=None),
            _known("beta", 0.95),
            _known("eps", 1e-8, below=math.inf),
            Hyperparameter("weight_decay_mask", None, below=None),
            Hyperparameter("mu_dtype", None, below=None),
            _known("nesterov", True, below=None),
            Hyperparameter("adaptive", False, below=None),
            Hyperparameter("preconditioning", "frobenius", below=None),
            Hyperparameter("adam_b1", 0.9, below=1.0, aside=True),
            Hyperparameter("adam_b2", 0.999, below=1.0, aside=True),
            Hyperparameter("adam_eps_root", 0.0, aside=True),
            Hyperparameter("adam_weight_decay", 0.0, aside=True),
            Hyperparameter("adam_learning_rate", None, below=None, aside=True),
            Hyperparameter(
                "muon_weight_dimension_numbers", None, below=None, aside=True
            ),
            _known("consistent_rms", None, below=None)._replace(positive=True),
        ),
        decays_itself=True,
    ),
    UpdateRule(
        name="adafactor",
        norm_power=0,
        flipped_power=("multiply_by_parameter_scale", 1),
        optimizer=_adafactor,
        theory=ADAFACTOR,
        moments=moments.ADAFACTOR,
        hyperparameters=(
            _known("min_dim_size_to_factor", 128, below=None),
            _known("decay_rate", 0.8, below=math.inf),
            Hyperparameter("decay_offset", 0, below=None),
            _known("multiply_by_parameter_scale", True, below=None),
            _known("clipping_threshold", 1.0, below=None)._replace(positive=True),
            _known("momentum", None),
            Hyperparameter("dtype_momentum", "float32", below=None),
            _known("eps", 1e-30, below=math.inf),
            _known("factored", True, below=None),
            Hyperparameter("weight_decay_mask", None, below=None),
        ),
        decays_itself=True,
    ),
    UpdateRule(
        name="normalized_sgd",
        norm_power=0,
        optimizer=normalized_sgd,
        theory=NORMALIZED_SGD,
        moments=moments.NORMALIZED_SGD,
        hyperparameters=(
            _known("axes", "unit", below=None),
            Hyperparameter("momentum", None, below=1.0),
            _NESTEROV,
        ),
        decays_itself=True,
    ),
    UpdateRule(
        name="newton",
        norm_power=0,
        optimizer=newton,
        theory=NEWTON,
        moments=moments.NEWTON,
        hyperparameters=(
            Hyperparameter("damping", 0.0),
            Hyperparameter("saddle_free", False, below=None),
            Hyperparameter("axes", "none", below=None),
            Hyperparameter("rtol", None, below=None),
            Hyperparameter("max_parameters", 2000),
        ),
        decays_itself=True,
    ),
    UpdateRule(
        name="hessian_free",
        norm_power=0,
        optimizer=hessian_free,
        theory=NEWTON,
        moments=moments.NEWTON,
        hyperparameters=(
            Hyperparameter("damping", 0.0),
            Hyperparameter("outputs_fn", None, below=None),
            Hyperparameter("loss_of_outputs", None, below=None),
            Hyperparameter("cg_iterations", 250),
            Hyperparameter("cg_tolerance", 5e-4),
            Hyperparameter("warm_start", 0.95),
            Hyperparameter("preconditioner_power", 0.75),
        ),
        decays_itself=True,
    ),
)


class _Rules(dict[str, UpdateRule]):
    def __missing__(self, name: Any) -> UpdateRule:
        raise KeyError(
            f"UPDATE_RULES has {', '.join(self)}, got {name!r}; "
            f"{nearest(name, self, 'choose one of these.')}"
        )


UPDATE_RULES: Mapping[str, UpdateRule] = types.MappingProxyType(
    _Rules((rule.name, rule) for rule in _RULES)
)
