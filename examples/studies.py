"""Optuna studies that are asked for batches of trials and shared by processes.

Processes and machines have Optuna's storage in common. Each asks it for trials and
tells it their values. The storage numbers the trials, so that none is run beyond the
budget. If a process is killed, its trials are lost.
"""

import argparse
import itertools
import os
import platform
import time
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

Space = dict[str, tuple[float, float]]

SAMPLERS = ("grid", "random", "tpe")


class Grid(optuna.samplers.BaseSampler):
    """A grid in random order; Optuna's own does not work with ask and tell."""

    def __init__(self, space: Space, size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        # The result depends on where the grid lies within its cells, so that is drawn.
        axes = [(np.arange(size) + rng.random()) / size for _ in space]
        points = rng.permutation(list(itertools.product(*axes)))
        self.columns = dict(zip(space, points.T, strict=True))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Any
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: Any,
    ) -> float:
        # Processes share the grid by the numbers of the trials. A trial beyond the grid
        # will not be run, but Optuna needs a point for it too.
        units = self.columns[param_name]
        low, high = param_distribution.low, param_distribution.high
        return float(low * (high / low) ** units[trial.number % len(units)])


def make_sampler(
    name: str, space: Space, size: int, seed: int, shared: bool
) -> optuna.samplers.BaseSampler:
    """Return a sampler by name."""
    if name == "grid":
        return Grid(space, size, seed)
    samplers = optuna.samplers
    make: Any = {"random": samplers.RandomSampler, "tpe": samplers.TPESampler}[name]
    # Processes that draw with the same seed would draw the same points.
    return make(seed=None if shared else seed)


def open_storage(
    parser: argparse.ArgumentParser, url: str | None
) -> optuna.storages.BaseStorage | None:
    """Return the database, with tables, that several processes may open at once."""
    if url is None:
        return None
    waits = [0.1, 0.3, 1.0, 3.0]
    while True:
        try:
            # A pool would keep its connections open after the last use.
            kwargs = {"poolclass": sqlalchemy.pool.NullPool}
            return optuna.storages.RDBStorage(url, engine_kwargs=kwargs)
        except (ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
            # If two processes make the same table, one fails. Later it finds the table.
            if not waits or not isinstance(error, sqlalchemy.exc.DBAPIError):
                parser.error(f"--storage {url} cannot be used: {error}")
        time.sleep(waits.pop(0))


def open_study(
    parser: argparse.ArgumentParser,
    storage: optuna.storages.BaseStorage | None,
    name: str,
    setting: str,
    sampler: str,
    space: Space,
    size: int,
    seed: int,
) -> optuna.Study:
    """Return the study of this name, new or from the storage."""
    study = optuna.create_study(
        storage=storage,
        sampler=make_sampler(sampler, space, size, seed, storage is not None),
        study_name=name,
        load_if_exists=True,
    )
    if study.user_attrs.get("setting", setting) != setting:
        parser.error(
            "processes that share a study need the same options, but the storage holds "
            f"{name!r} with others; choose another --study."
        )
    study.set_user_attr("setting", setting)
    return study


def ask(study: optuna.Study, space: Space, count: int, budget: int) -> list[Trial]:
    """Return new trials, as many as the budget leaves."""
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(*interval, log=True) for name, interval in space.items()
    }
    trials: list[Trial] = []
    while len(trials) < count and len(study.get_trials(deepcopy=False)) < budget:
        trial = study.ask(distributions)
        if trial.number >= budget:  # Another process was faster.
            study.tell(trial, state=TrialState.FAIL)
            break
        trial.set_user_attr("process", f"{platform.node()}:{os.getpid()}")
        trials.append(trial)
    return trials


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that have a value, in the order of their numbers."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
