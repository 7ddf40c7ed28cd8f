"""tools/bsuite_envs.py and tools/bsuite_score.py: episodes and scores are as bsuite counts them."""

import bsuite
import pytest
import torch
from bsuite import sweep
from bsuite.utils.wrappers import Logging

import dreamer_v3
from common.checkpoint import RunError
from common.envs import Envs
from common.logger import read_metrics
from common.replay import Replay
from tools import bsuite_score
from tools.bsuite_envs import EXPERIMENTS

MODULE = "tools.bsuite_envs:bsuite/"


@pytest.fixture(autouse=True)
def quiet(capsys):
    yield
    capsys.readouterr()  # bsuite prints each id that it loads


class Recorder:
    """What bsuite logs."""

    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)


def recorded(logger: Recorder):
    """bsuite.load_from_id, with a row for every episode."""
    load = bsuite.load_from_id
    return lambda name: Logging(load(name), logger, log_every=True)


def play(name: str, episodes: int):
    """The environment after that many episodes of random actions, and the rows."""
    envs, rows = Envs(MODULE + name, seed=3), []
    generator, ended = torch.Generator().manual_seed(0), 0
    while ended < episodes:
        action = torch.randint(envs.action_dim, [1], generator=generator)
        rows.append(envs.step(torch.eye(envs.action_dim)[action]))
        ended += rows[-1]["is_last"].item()
        assert torch.equal(rows[-1]["is_last"], rows[-1]["is_terminal"])
    return envs._vector.envs[0].env.unwrapped.inner, torch.cat(rows)


@pytest.mark.parametrize("name", [f"{x}-{i}" for x in EXPERIMENTS for i in (0, 4)])
def test_summary_is_what_bsuite_counts(name, tmp_path, monkeypatch):
    """The rows go through a replay; bsuite's own logging sees the same actions."""
    logger = Recorder()
    monkeypatch.setattr(bsuite, "load_from_id", recorded(logger))
    _, rows = play(name, 20)
    replay = Replay(rows[0], len(rows), 1, 2, tmp_path / "replay")
    for row in rows.split(1):
        replay.append(row)
    returns, last = bsuite_score.episodes(tmp_path, replay.state_dict())
    row, counted = bsuite_score.summary(name.replace("-", "/"), returns, last), logger.rows[-1]
    keys = {"episode", "total_return", "total_regret", "total_perfect"} & counted.keys()
    assert len(keys) >= (2 if "discounting_chain" in name else 3)
    for key in keys - ({"total_regret"} if "discounting_chain" in name else set()):
        assert row[key] == pytest.approx(counted[key], abs=1e-4), key
    assert row["episode"] == 20


def test_episodes_are_seeded():
    """The same seed gives the same episodes, another episode other ones."""
    one, two = (play("umbrella_length-6", 4)[1]["observation"] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one[:8], one[8:16])


def test_score_of_a_run(tmp_path, monkeypatch, capsys):
    """A whole run of the script, scored; one with too few episodes is refused."""
    folder = tmp_path / "run"
    flags = ["--env-id", MODULE + "bandit-2", "--run", str(folder), "--num-envs", "1"]
    dreamer_v3.main(["--preset", "debug", "--steps", "120", "--obs", "vector", *flags])
    returns = [
        row["episode/return"]
        for row in read_metrics(folder / "metrics.jsonl")
        if "episode/return" in row
    ]
    with pytest.raises(RunError, match=r"has 60 episodes of bandit/2, bsuite 10000"):
        bsuite_score.main((folder,))
    monkeypatch.setattr(sweep, "EPISODES", {"bandit/2": 50})
    assert bsuite_score.read(folder)["total_regret"] == pytest.approx(50 - sum(returns[:50]))
    capsys.readouterr()
    bsuite_score.main((folder,))
    value = max(0, 1 - (50 - sum(returns[:50])) / 50 / 0.5)  # random actions lose 0.5 on average
    assert f"| bandit | {value:.2f} | 2 | {value:.2f} |" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--action-repeat 2", "--num-envs 2", "--replay-size 60"])
def test_runs_that_bsuite_would_not_play_are_refused(flag, tmp_path):
    folder = tmp_path / "run"
    flags = ["--env-id", MODULE + "bandit-2", "--run", str(folder), "--num-envs", "1"]
    flags += ["--preset", "debug", "--steps", "120", "--obs", "vector", *flag.split()]
    dreamer_v3.main(flags)
    with pytest.raises(RunError, match=f"cannot be scored: that needs .*{flag.split()[0]}"):
        bsuite_score.main((folder,))
