"""pilco.py as its users run it: trials, resume, evaluation, kinds of environments, errors."""

import signal

import numpy as np
import pytest
import torch
from test_run import (  # noqa: F401  fixtures: nursery, start
    REPO,
    count_lines,
    lines_of,
    nursery,
    same_leaves,
    start,
    until,
)

import pilco
from common import checkpoint
from common.envs import make_envs

SCRIPT = REPO / "pilco.py"  # what `start` runs here
DEBUG = ["--preset", "debug", "--no-tensorboard"]


def test_debug_as_it_is(start, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    text = start("--preset", "debug", "--run", folder, prepare="all_pictures").done()
    assert "rollout 1, 0.8 s: cost" in text and "rollout 3, 2.4 s" in text
    rows = lines_of(folder)
    assert [row["step"] for row in rows] == [8, 16, 24, 24]
    assert all(0 <= row["episode/cost"] <= 1 for row in rows[:3])
    assert all(1 < row["search/evaluations"] <= 6 for row in rows[1:3])
    names = {path.name for path in folder.iterdir()}
    wanted = {"policy.mp4", "learning_curve.png", "trial_002.png", "trial_003.png", "tensorboard"}
    assert wanted < names
    state = checkpoint.load(folder)
    assert state["agent"]["data"]["observation"].shape == (24, 2)


def test_resume_is_exact(start, tmp_path):  # noqa: F811
    argv = [*DEBUG, "--trials", 4, "--restarts", 2, "--max-inducing", 20]
    start(*argv, "--run", tmp_path / "a").done()

    def wait(run, lines):
        until(lambda: count_lines(tmp_path / "b") >= lines or run.path(".rc").exists())

    for lines, number in ((2, signal.SIGKILL), (3, signal.SIGTERM)):
        run = start(*argv, "--run", tmp_path / "b")
        wait(run, lines)
        run.signal(number)
        run.wait()
    text = start(*argv, "--run", tmp_path / "b").done()
    assert "resumes after" in text
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    states = [checkpoint.load(tmp_path / name) for name in "ab"]
    for state in states:
        del state["logger"], state["agent"]["args"]["run"]
    same_leaves(*states)


def test_the_seed_decides(start, tmp_path):  # noqa: F811
    seeds = {"a": 1, "b": 1, "c": 2}
    runs = [start(*DEBUG, "--run", tmp_path / k, "--seed", seed) for k, seed in seeds.items()]
    for run in runs:
        run.done()
    a, b, c = (lines_of(tmp_path / k) for k in "abc")
    assert a == b and a != c


def test_eval_load_and_act(start, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    start(*DEBUG, "--run", folder).done()
    text = start("--eval", folder, "--eval-episodes", 2, prepare="all_pictures").done()
    assert "over 2 episodes" in text and (folder / "eval.mp4").exists()
    agent, state = pilco.load(folder), None
    same_leaves(checkpoint.load(folder)["agent"], agent.state_dict())
    value = agent.objective(agent.controller.theta.data)[0]
    saved = lines_of(folder)[2]["search/cost"] * 8
    assert torch.isfinite(value).all() and np.isfinite(saved)
    envs = make_envs(agent.args, num_envs=1, seed=1)
    rows = envs.step(None)
    while not rows["is_last"].all():
        action, state = agent.act(rows, state)
        rows = envs.step(action)
    assert action.abs().max() <= 1
    envs.close()


@pytest.mark.parametrize(
    "env_id, width", [("Pendulum-v1", 3), ("dm_control/cartpole-swingup-v0", 5)]
)
def test_other_environments(start, tmp_path, env_id, width):  # noqa: F811
    argv = [*DEBUG, "--env-id", env_id, "--run", tmp_path / "run", "--trials", 1]
    argv += ["--angles", "--start", "--start-std", "--target", *["0"] * width, "--weights"]
    start(*argv).done()
    assert checkpoint.load(tmp_path / "run")["agent"]["data"]["observation"].shape == (16, width)


def test_wrong_flags_and_environments(start, tmp_path):  # noqa: F811
    for flags, words in (
        ("--horizon 0", "--horizon must be at least 1"),
        ("--target 1 2 3", "--target needs 2 numbers, not 3"),
        ("--weights 1 2 3", "--weights needs 4 numbers, not 3"),
        ("--angles 5", "--angles must be indices of the 2 numbers observed"),
        ("--env-id CartPole-v1", "PILCO needs at most 20 numbers and Box actions"),
        ("--widths 0", "--widths"),
        ("--start-std 0 0 0", "--start-std needs 2 numbers, not 3"),
        ("--weights 1 0 0 -1", "weights must be symmetric and positive semi-definite"),
    ):
        assert words in start(*DEBUG, *flags.split(), "--run", tmp_path / words[:12]).error()
    run = tmp_path / "run"
    start(*DEBUG, "--run", run).done()
    assert "centres: 4 -> 5" in start(*DEBUG, "--run", run, "--centres", 5).error()
