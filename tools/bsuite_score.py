"""Score finished runs on bsuite by bsuite's own analysis: a table, one experiment per line.

    python -m tools.bsuite_score runs/dreamer_v3/tools.bsuite_envs*/seed*

bsuite scores what an experiment has lost by its last episode. That follows from the rewards of all
episodes, which the replay of a run holds; a run with fewer episodes than bsuite asks for, or
with a --replay-size that has forgotten some, is refused.
"""

import importlib
from pathlib import Path

import pandas as pd
import torch
import tyro
from bsuite import sweep
from tensordict import TensorDict

from common import checkpoint
from common.checkpoint import RunError
from common.run import launch, saved_args
from tools.dream_env import saved_replay

ROW = {"reward": torch.zeros(()), "is_last": torch.tensor(True)}  # what a score needs of one


def episodes(folder: Path, state: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return and last reward of each episode in a run's replay, in order."""
    replay = saved_replay(folder, state["layout"], TensorDict(ROW))
    rows = {key: leaf[: state["total"]] for key, leaf in replay.storage.items()}
    ends = rows["is_last"].nonzero()[:, 0]
    total = rows["reward"].double().cumsum(0)[ends]
    return total.diff(prepend=total.new_zeros(1)), rows["reward"][ends]


def summary(bsuite_id: str, returns, last) -> dict:
    """What bsuite logs at the last of these episodes, as far as a score needs it."""
    count = len(returns)
    return {
        "bsuite_id": bsuite_id,
        "episode": count,
        "total_return": returns.sum().item(),
        # 1 is the best last reward, except in discounting_chain, which is scored by its return.
        "total_regret": (1 - last).sum().item(),
        "total_perfect": (last == 1).sum().item(),
        **sweep.SETTINGS[bsuite_id],
    }


def read(folder: Path) -> dict:
    """The `summary` of a run; RunError if it is not a whole one."""
    state, args = checkpoint.load(folder, "dreamer_v3"), saved_args(folder)
    name = args["env_id"].rpartition("bsuite/")[2]
    experiment, _, number = name.rpartition("-")
    bsuite_id = f"{experiment}/{number}"
    if bsuite_id not in sweep.SETTINGS:
        raise RunError(f"{folder} is not a run on bsuite")
    if {"exported", "offline"} & args.keys():
        raise RunError(f"{folder} cannot be scored: it holds no episodes of its own")
    replay = state["replay"]
    forgotten = replay["total"] > replay["layout"]["capacity"]
    if args["action_repeat"] != 1 or args["num_envs"] != 1 or forgotten:
        needed = "--action-repeat 1, --num-envs 1 and a --replay-size that holds all rows"
        raise RunError(f"{folder} cannot be scored: that needs {needed}")
    returns, last = episodes(folder, replay)
    asked = sweep.EPISODES[bsuite_id]
    if len(returns) < asked:
        raise RunError(f"{folder} has {len(returns)} episodes of {bsuite_id}, bsuite {asked}")
    return summary(bsuite_id, returns[:asked], last[:asked])


def score(rows: list[dict]) -> float:
    """bsuite's score in [0, 1] of one experiment's runs."""
    experiment = rows[0]["bsuite_id"].split("/")[0]
    analysis = importlib.import_module(f"bsuite.experiments.{experiment}.analysis")
    return float(analysis.score(pd.DataFrame(rows)))


def main(runs: tyro.conf.Positional[tuple[Path, ...]]):  # run folders
    if not runs:
        raise RunError("no run folder given")
    experiments = {}
    for row in map(read, runs):
        experiments.setdefault(row["bsuite_id"].split("/")[0], []).append(row)
    print("| experiment | score | configurations | score of each |\n|---|---|---|---|")
    for name, rows in sorted(experiments.items()):
        each = ", ".join(f"{score([row]):.2f}" for row in rows)
        numbers = ", ".join(row["bsuite_id"].split("/")[1] for row in rows)
        print(f"| {name} | {score(rows):.2f} | {numbers} | {each} |")


if __name__ == "__main__":
    launch(lambda: tyro.cli(main, prog="python -m tools.bsuite_score", description=__doc__))
