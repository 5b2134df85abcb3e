r"""A training run, as far as the angles of its weights depend on it, and its inverse.

Weights that turn by $\theta$ per step forget their direction. Under noise

$$\mathbb E\,\langle\hat w_t, \hat w_{t+n}\rangle \propto (1 - \kappa)^n, \qquad
\theta^2 = c^2\kappa,$$

where $c^2$ belongs to the rule: memory makes successive steps alike, so that small
steps lead far. In equilibrium $\kappa$ is the share of the norm that weight decay takes
per step, so $c^2$ follows from `UpdateRule`. It depends on $\kappa$ where that is not
small beside the decay of the memory. On a sphere it follows from the memory.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax._core.checks import (
    check_count,
    check_learning_rate,
    check_positive,
    check_range,
    check_scalar,
    nearest,
)
from normax._core.norms import hypotenuse
from normax.spheres.rotational_rules import adamw_angle, lion_angle, sgd_angle
from normax.theory.equilibrium import Equilibrium
from normax.theory.moments import Moments, Now, Step
from normax.theory.prediction import Run, as_schedule
from normax.theory.recurrence import Dimension
from normax.theory.rules import UPDATE_RULES

# The rules on spheres: the angle as a function of the rate times the decay, and the
# rule in whose equilibrium it is.
ROTATIONAL: dict[str, tuple[Callable[..., jax.Array], str]] = {
    "rotational_sgd": (sgd_angle, "momentum"),
    "rotational_adamw": (adamw_angle, "adamw"),
    "rotational_lion": (lion_angle, "lion"),
}
RULES = (*UPDATE_RULES, "hyperball", *ROTATIONAL)

# Here the equilibrium is that of vanishing decay, where norms and shares are powers.
_SMALL = 1e-4


def _hyperball(averages: Any, now: Now, *, momentum: Any) -> tuple[Any, Step]:
    """Steps of a relative length, along an average of gradients."""
    scale = now.norm / hypotenuse(momentum * now.memory, (1 - momentum) * now.gradient)
    direction = (0.0, scale * momentum, scale * (1 - momentum))
    return averages, Step(direction, (0.0, momentum, 1 - momentum))


HYPERBALL = Moments(
    lambda *, momentum: (), _hyperball, projects=True, needs_dimension=False
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    r"""A training run, as far as the angles of one weight vector depend on it.

    Attributes:
      rule: A key of `UPDATE_RULES`; or `"hyperball"`, around an average of gradients
        such as `optax.scale_by_adam`; or `"rotational_sgd"`, `"rotational_adamw"`,
        `"rotational_lion"`.
      steps: Number of steps.
      learning_rate: Learning rate, a number or a schedule; None in a target.
      weight_decay: Weight decay, a number or a schedule; None in a target, to have it
        chosen. Hyperball has none.
      batch_size: Examples per step. Only the ratio of two settings counts.
      initial_norm: Norm of the weight vector at the start; for Muon of the matrix.
      gradient_norm: $G = (\mathbb E\,\|\nabla L\|^2)^{1/2}$ at $\|w\| = 1$: a number or
        an array of shape (steps,). None in a target means that of the source, times the
        root of the ratio of the batches, as of noise; in a source it means 1.
      dimension: Number of entries of the vector; for Muon (rows, columns). May be None
        where nothing depends on it.
      hyperparameters: Those of the rule by name; `momentum` of hyperball.

    Raises:
      ValueError: The rule is unknown, or a number is out of range.

    Examples:
      >>> import normax
      >>> setting = normax.theory.Setting(
      ...     rule="hyperball", steps=100, learning_rate=0.01
      ... )
      >>> print(f"{setting.angles()[-1]:.5f}")
      0.00995

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """

    rule: str
    steps: int
    learning_rate: optax.ScalarOrSchedule | None = None
    weight_decay: optax.ScalarOrSchedule | None = None
    batch_size: float = 1.0
    initial_norm: float = 1.0
    gradient_norm: jax.typing.ArrayLike | None = None
    dimension: Dimension = None
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(
                f"rule must be one of {', '.join(RULES)}, got {self.rule!r}; "
                f"{nearest(self.rule or '', RULES, 'choose one of these.')}"
            )
        check_count("steps", self.steps, "pass the number of steps of the run")
        for name in ("batch_size", "initial_norm"):
            check_scalar(name, getattr(self, name))
            check_positive(name, getattr(self, name))
        if self.learning_rate is not None:
            check_learning_rate(self.learning_rate)
        if self.weight_decay is not None and not callable(self.weight_decay):
            check_range("weight_decay", self.weight_decay, low=0)
        if self.gradient_norm is not None:
            check_positive("gradient_norm", self.gradient_norm)
            if np.shape(self.gradient_norm) not in ((), (self.steps,)):
                raise ValueError(
                    "gradient_norm must be a number or have shape (steps,) = "
                    f"({self.steps},), got {np.shape(self.gradient_norm)}; transfer "
                    "one vector at a time."
                )
        if self.rule == "hyperball" and self.weight_decay is not None:
            raise ValueError(
                "hyperball keeps norms and has no weight decay, got weight_decay="
                f"{self.weight_decay!r}; leave it out."
            )

    def angles(self) -> np.ndarray:
        """Return the angles of all steps in radians, of shape (steps,)."""
        rate, given = as_schedule(self.rate()), self._given()
        if self.rule in ROTATIONAL:
            decay = sample(rate, self.steps) * sample(self.decay(), self.steps)
            return np.asarray(ROTATIONAL[self.rule][0](decay, **given))
        if self.rule == "hyperball":
            return np.asarray(self._on_sphere().follow(as_schedule(0.0), rate)[1])
        run = UPDATE_RULES[self.rule].predict(
            rate, self.decay(), **self._vector(), **given
        )
        return np.asarray(run.angular_update)

    def rates(self, angles: np.ndarray) -> np.ndarray:
        """Return the learning rates with which the rule turns by given angles."""
        given = self._given()
        if self.rule in ROTATIONAL:
            decay = sample(self.decay(), self.steps)
            check_positive("weight_decay", decay.min())
            square = np.asarray(ROTATIONAL[self.rule][0](1.0, **given)) ** 2
            return angles**2 / (square * decay)
        curve = lambda count: jnp.asarray(angles)[count]  # noqa: E731
        if self.rule == "hyperball":
            found = self._on_sphere().follow(as_schedule(0.0), None, curve)[2]
        else:
            schedule = UPDATE_RULES[self.rule].schedule_for_angle(
                curve, self.decay(), **self._vector(), **given
            )
            found = jax.vmap(schedule)(jnp.arange(self.steps))
        rates = np.asarray(found)
        # The model has no rate for a larger angle, and then gives one below 0.
        possible = np.isfinite(rates) & (rates >= 0)
        if not possible.all():
            step = int(np.argmin(possible))
            raise ValueError(
                f"no learning rate of {self.rule} turns weights by {angles[step]:.3g} "
                f"radians at step {step}, since its memory holds earlier steps; keep "
                "smaller angles, or take a smaller momentum."
            )
        return rates

    def rate(self) -> optax.ScalarOrSchedule:
        """Return the learning rate, or raise where there is none."""
        if self.learning_rate is None:
            raise ValueError(
                "the angles of a setting depend on its learning_rate, but it is None; "
                "pass a number or a schedule."
            )
        return self.learning_rate

    def decay(self) -> optax.ScalarOrSchedule:
        """Return the weight decay, or raise where the rule must have one."""
        if self.weight_decay is None:
            raise ValueError(
                f"{self.rule} needs a weight_decay, but it is None; pass a number or "
                "a schedule, 0 for none."
            )
        return self.weight_decay

    def shares(self, angles: Any) -> np.ndarray:
        r"""Return the shares $\kappa$ that are forgotten at given angles per step."""
        return _between(angles, *self._forgetting())

    def turns(self, shares: Any) -> np.ndarray:
        r"""Return the angles per step at which given shares $\kappa$ are forgotten."""
        return _between(shares, *self._forgetting()[::-1])

    def _forgetting(self) -> tuple[np.ndarray, np.ndarray]:
        r"""Return logarithms of $\theta$ and of $\kappa$ in equilibrium, which rise."""
        given, share = self._given(), np.geomspace(1e-8, 0.3, 500)
        if self.rule in ROTATIONAL:
            base = ROTATIONAL[self.rule][1]
            return dataclasses.replace(self, rule=base)._forgetting()
        if self.rule == "hyperball":
            # As decoupled decay in equilibrium, whose steps on the sphere are the same.
            rho = given.get("momentum", 0.9)
            versine = share * (1 - rho) / (1 + (1 - share) * rho)
            angle = 2 * np.arcsin(np.sqrt(versine / 2))
        else:
            settled = self._settle("rotation_needs", 1.0, share)
            share = np.asarray(settled.decay_rate, np.float64)
            angle = np.asarray(settled.rotation, np.float64)
            angle, share = angle[share < 0.5], share[share < 0.5]
        # Beyond the table the angle goes with the root of the share.
        far = np.array([-2000.0, 20.0])
        logs = []
        for known, slope in ((np.log(angle), 0.5), (np.log(share), 1.0)):
            low, high = known[[0, -1]] + slope * far
            logs.append(np.concatenate([[low], known, [high]]))
        return logs[0], logs[1]

    def powers(self) -> Powers:
        r"""Return how norm and $\kappa$ in equilibrium depend on the rates."""
        rates = np.array([_SMALL, np.e * _SMALL, _SMALL])
        settled = self._settle("norm_needs", rates, rates[[0, 2, 1]])
        logs = np.log(np.array([settled.norm, settled.decay_rate], np.float64))
        return Powers(logs[:, 0], logs[:, 1:] - logs[:, :1])

    def norm(self) -> float:
        r"""Return $G$, of a profile the root mean square."""
        given = 1.0 if self.gradient_norm is None else self.gradient_norm
        return float(np.sqrt(np.mean(np.square(given))))

    def _settle(self, needs: str, learning_rate: Any, weight_decay: Any) -> Equilibrium:
        rule = UPDATE_RULES[self.rule]
        given = learning_rate, weight_decay, self.norm(), self.dimension
        settled = rule._settle(getattr(rule._theory(), needs), given, self._given())
        found = np.array([settled.norm, settled.decay_rate])
        if not ((found > 0) & np.isfinite(found)).all():
            raise ValueError(
                f"UPDATE_RULES[{self.rule!r}] has no equilibrium of noise and decay, "
                "so that nothing says how fast it forgets; choose another rule."
            )
        return settled

    def _given(self) -> dict[str, Any]:
        """Return the hyperparameters; refuse those that a rule on spheres has not."""
        given = dict(self.hyperparameters)
        if self.rule in UPDATE_RULES:
            return given
        known = ["momentum"]
        if self.rule in ROTATIONAL:
            known = list(inspect.signature(ROTATIONAL[self.rule][0]).parameters)[1:]
        for name, value in given.items():
            if name not in known:
                raise TypeError(
                    f"{self.rule} has {', '.join(known)}, got {name}; leave {name} out."
                )
            check_range(name, value, low=0, below=1)
        return given

    def _vector(self) -> dict[str, Any]:
        norm = 1.0 if self.gradient_norm is None else self.gradient_norm
        return dict(
            steps=self.steps, initial_norm=self.initial_norm, gradient_norm=norm
        ) | {"dimension": self.dimension}

    def _on_sphere(self) -> Run:
        momentum = {"momentum": 0.9} | self._given()
        return Run(HYPERBALL, momentum, self.steps, 1.0, 1.0, 1.0)


class Powers(NamedTuple):
    r"""Logarithms of norm and $\kappa$, linear in those of rate and decay."""

    offset: np.ndarray
    matrix: np.ndarray

    def settled(self, learning_rate: float, weight_decay: float) -> np.ndarray:
        r"""Return norm and $\kappa$ in equilibrium."""
        logs = np.log(np.array([learning_rate, weight_decay]) / _SMALL)
        return np.exp(self.offset + self.matrix @ logs)

    def rates(self, norm: float, share: float) -> np.ndarray:
        r"""Return rate and decay with which norm and $\kappa$ are these."""
        logs = np.log([norm, share]) - self.offset
        return _SMALL * np.exp(np.linalg.solve(self.matrix, logs))


def _between(x: Any, known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return values between known ones, on straight lines of logarithms; 0 at 0."""
    logs = np.log(np.maximum(x, np.finfo(np.float64).tiny))
    return np.where(x > 0, np.exp(np.interp(logs, known, wanted)), 0.0)


def sample(value: optax.ScalarOrSchedule, steps: int) -> np.ndarray:
    """Return a number or a schedule at all steps."""
    schedule = as_schedule(value)
    return np.broadcast_to(jax.vmap(schedule)(jnp.arange(steps)), steps)
