"""tools/bsuite_envs.py and tools/bsuite_score.py: episodes and scores are as bsuite counts them."""

import pytest
import torch
from bsuite import sweep

import dreamer_v3
from common.checkpoint import RunError
from common.envs import Envs
from common.logger import read_metrics
from tools import bsuite_score
from tools.bsuite_envs import EXPERIMENTS

MODULE = "tools.bsuite_envs:bsuite/"


@pytest.fixture(autouse=True)
def quiet(capsys):
    yield
    capsys.readouterr()  # bsuite prints each id that it loads


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
def test_summary_is_what_bsuite_counts(name):
    inner, rows = play(name, 20)
    rewards, ends = rows["reward"].double(), rows["is_last"].nonzero()[:, 0]
    returns = torch.stack([x.sum() for x in rewards.tensor_split(ends + 1)[:-1]])
    row = bsuite_score.summary(name.replace("-", "/"), returns, rewards[ends])
    assert row["episode"] == 20
    assert row["total_return"] == pytest.approx(rewards.sum().item())
    counted = inner.bsuite_info()  # a chain's score needs only the return
    assert counted or "discounting_chain" in name
    for key, value in counted.items():
        assert row[key] == pytest.approx(value), key


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
