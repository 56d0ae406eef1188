"""A sweep over any keys of a config with Optuna: pip install optuna

    python examples/sweep.py [CONFIG] [TRIALS]

Trials that fall behind at a knot are pruned. Run it from the root of the repository.
"""

import sys

import optuna

from chainlora import load_config, train
from chainlora.training.events import Evaluated, Event

file = sys.argv[1] if len(sys.argv) > 1 else "examples/dates.yaml"
num_trials = int(sys.argv[2]) if len(sys.argv) > 2 else 20


def objective(trial: optuna.Trial) -> float:
    """Train with keys that the sampler suggests and return the loss of the validation rows."""
    keys = {
        "train.lr": trial.suggest_float("train.lr", 1e-4, 1e-2, log=True),
        "chain.dropout": trial.suggest_float("chain.dropout", 0.0, 0.2),
        "chain.init": trial.suggest_categorical("chain.init", ["kaiming", "gaussian"]),
        "output": f"runs/sweep/{trial.number}",
    }

    def prune(event: Event) -> None:
        if isinstance(event, Evaluated) and event.where != "start":
            trial.report(event.metrics["loss"], event.step)
            if trial.should_prune():
                raise optuna.TrialPruned

    return train(load_config(file, keys), listener=prune)["metrics"]["validation"]["loss"]


study = optuna.create_study(direction="minimize")
study.optimize(objective, n_trials=num_trials)
print(study.best_params, study.best_value)
