"""pilco.py as its users run it: trials, resume, evaluation, kinds of environments, errors."""

import functools
import os
import re
import shutil
import signal

import gymnasium
import numpy as np
import pytest
import torch
from running import REPO, count_lines, lines_of, same_leaves, until, until_it_ends

import pilco
from common import checkpoint
from common.envs import make_envs
from tools import benchmark
from tools.peers.table import LINE, POLICY

SCRIPT = REPO / "pilco.py"  # what `start` and `inside` run here
DEBUG = ["--preset", "debug", "--no-tensorboard"]


def test_debug_preset(start, tmp_path):
    folder = tmp_path / "run"
    text = start("--preset", "debug", "--run", folder, prepare="all_pictures").done()
    assert "random rollout, 0.8 s: cost" in text and "trial 2, 2.4 s" in text
    rows = lines_of(folder)
    assert [row["step"] for row in rows] == [8, 16, 24, 24]
    assert all(0 <= row["episode/cost"] <= 1 for row in rows[:3])
    assert all(1 < row["search/evaluations"] <= 6 for row in rows[1:3])
    names = {path.name for path in folder.iterdir()}
    assert {"policy.mp4", "learning_curve.png", "tensorboard"} < names
    state = checkpoint.load(folder)
    assert state["agent"]["data"]["observation"].shape == (24, 2)


def test_resume_is_exact(start, tmp_path):
    argv = [*DEBUG, "--trials", 3, "--restarts", 2, "--max-inducing", 12]
    start(*argv, "--run", tmp_path / "a").done()

    def wait(run, lines):
        until(lambda: count_lines(tmp_path / "b") >= lines or run.path(".rc").exists())

    for lines, number in ((2, signal.SIGKILL), (3, signal.SIGTERM)):
        run = start(*argv, "--run", tmp_path / "b")
        wait(run, lines)
        run.signal(number)
        run.wait()
    text = start(*argv, "--run", tmp_path / "b").done()
    assert "resumes at step" in text
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    states = [checkpoint.load(tmp_path / name) for name in "ab"]
    for state in states:
        del state["logger"], state["agent"]["args"]["run"], state["saves"]
    same_leaves(*states)


def test_the_seed_decides(inside, tmp_path):
    rows = []
    for seed in (1, 1, 2):
        inside(*DEBUG, "--seed", seed)
        rows.append(lines_of(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")
    assert rows[0] == rows[1] != rows[2]


def test_eval_load_and_act(start, tmp_path):
    folder = tmp_path / "run"
    start(*DEBUG, "--run", folder).done()
    text = start("--eval", folder, "--eval-episodes", 2, prepare="all_pictures").done()
    assert "over 2 episodes" in text and (folder / "eval.mp4").exists()
    agent, latent = pilco.load(folder), None
    same_leaves(checkpoint.load(folder)["agent"], agent.state_dict())
    theta = agent.controller.theta.data
    assert torch.equal(agent.objective(theta)[0], pilco.load(folder).objective(theta)[0])
    envs = make_envs(agent.args, num_envs=1, seed=1)
    rows = envs.step(None)
    while not rows["is_last"].all():
        latent = agent.act(rows, latent)
        rows = envs.step(latent["action"])
    assert latent["action"].abs().max() <= 1
    envs.close()


@pytest.mark.parametrize(
    ("env_id", "width"), [("Pendulum-v1", 3), ("dm_control/cartpole-swingup-v0", 5)]
)
def test_other_environments(inside, tmp_path, env_id, width):
    inside(*DEBUG, "--env-id", env_id, "--trials", 1, *plain(width))
    assert checkpoint.load(tmp_path / "run")["agent"]["data"]["observation"].shape == (16, width)


def plain(width):
    """Undo the preset's scenario: no angles, start from the data, all targets zero."""
    return ["--angles", "--start", "--start-std", "--target", *["0"] * width, "--weights"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--horizon 0", "--horizon must be at least 1"),
        ("--horizon 41", "--horizon 41 is too long: an episode .* ends after 40 steps"),
        ("--horizon 21 --action-repeat 2", "--horizon 21 x --action-repeat 2 is too long"),
        ("--target 0 nan", r"--target must be finite and below 2\*\*63, not 0.0 nan"),
        ("--start-std 0.1 nan", "--start-std must be finite"),
        ("--weights 1 1 nan 1", "--weights must be finite"),
        ("--horizon 1 --env-id running:Long-v0", "two transitions, not 1: raise --random-rollouts"),
        ("--env-id dummy_envs:Picture-v0", "observes nothing but images or text: observation"),
        ("--start 0 0 0", "--start needs 2 numbers, not 3"),
        ("--target 1 2 3", "--target needs 2 numbers, not 3"),
        ("--start-std 0 0 0", "--start-std needs 2 numbers, not 3"),
        ("--weights 1 2 3", "--weights needs 4 numbers, not 3"),
        ("--angles 5", "--angles must be different indices of the 2 numbers observed"),
        ("--angles 1 1", "--angles must be different indices"),
        ("--start-std 1 -1", "--start-std must be numbers that are not negative"),
        ("--gamma 0", "--gamma must be a positive number"),
        ("--env-id CartPole-v1", "PILCO needs Box actions"),
        ("--env-id FrozenLake-v1", "PILCO needs numbers to observe.* categories: observation"),
        ("--widths 0", "--widths"),
        ("--angles --target 0 0 --weights 1 0 0 -1", "--weights: weights must be symmetric"),
    ],
)
def test_wrong_flags_and_environments(inside, flags, words):
    with pytest.raises(checkpoint.RunError, match=words):
        inside(*DEBUG, *flags.split())


def test_a_wrong_flag_can_be_put_right(inside, tmp_path):
    """Without a checkpoint the folder holds nothing that other arguments could spoil."""
    with pytest.raises(checkpoint.RunError, match="--angles"):
        inside(*DEBUG, "--angles", 5)
    inside(*DEBUG)
    assert checkpoint.load(tmp_path / "run")["done"] == 3


def test_trials_are_counted_after_the_random_rollouts(inside, tmp_path):
    inside(*DEBUG, "--random-rollouts", 2)
    numbers = [row["trial"] for row in lines_of(tmp_path / "run") if "trial" in row]
    assert numbers == [0, 0, 1, 2]


def test_a_flat_cost_is_reported(inside, capsys):
    """A target a hundred widths away: no gradient, and the line says so."""
    inside(*DEBUG, "--target", 1e4, 0, "--weights", 1, 0, 0, 0, "--trials", 1)
    assert "NO GRADIENT" in capsys.readouterr().out


def test_what_searches_are_given(inside, monkeypatch):
    """Natural units; the first start is the last policy, others new."""
    calls, search = [], pilco.search

    def watched(objective, theta, scale, *args):
        calls.append((objective.__self__.controller, theta.clone(), scale))
        actual = search(objective, theta, scale, *args)
        calls[-1] += (actual[0],)
        return actual

    monkeypatch.setattr(pilco, "search", watched)
    inside(*DEBUG)
    for controller, theta, scale, _ in calls:
        assert torch.equal(scale, controller.scale(theta)) and not scale.eq(1).all()
    assert torch.equal(calls[1][1][0], calls[0][3]) and len(calls[1][1]) == 4


@pytest.mark.parametrize(
    "flags",
    [
        "--preset cart_pole --controller linear --bound gSin --noise observed",
        "--preset pendulum --widths 0.5 1 --exploration -0.2 --gamma 0.98 --restarts 3",
        "--preset double_pendulum",
        "--preset cart_double_pendulum --centers 20 --widths 4",
        "--preset inverted_pendulum",
    ],
)
def test_presets_begin(inside, tmp_path, capsys, flags):
    tiny = ["--trials", 2, "--horizon", 6, "--evaluations", 3, "--no-tensorboard"]
    inside(*flags.split(), *tiny)
    text = capsys.readouterr().out
    assert "predicted" in text and "signal-to-noise" in text
    rows = [row for row in lines_of(tmp_path / "run") if "search/cost" in row]
    assert rows[0]["search/evaluations"] == 3 and 0 <= rows[0]["episode/cost"] <= 1


def test_presets_are_the_authors_scenarios():
    """But for 150 inducing inputs instead of 300; 50 centers are the paper's, 10 MATLAB's."""
    args = pilco.parse_args([])
    expected = dict(
        preset="cart_pole", horizon=40, random_rollouts=1, controller="rbf", centers=50,
        bound="gSat", widths=(0.25,), gamma=1.0, exploration=0.0, max_inducing=150, iterations=150,
        noise="latent", angles=(3,), target=(0, 0, 0, np.pi), start_std=(0.1,) * 4,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    args = pilco.parse_args(["--preset", "pendulum", "--centers", "7"])
    assert (args.centers, args.iterations, args.horizon, args.widths) == (7, 75, 40, (0.5,))
    args = pilco.parse_args(["--preset", "double_pendulum"])
    assert (args.centers, args.horizon, args.trials) == (100, 30, 20)
    args = pilco.parse_args(["--preset", "cart_double_pendulum"])
    expected = dict(
        horizon=100, dt=0.05, trials=40, random_rollouts=1, centers=200, max_inducing=400,
        widths=(0.5,), gamma=1.0, exploration=0.0, iterations=150, fit_steps=300, angles=(4, 5),
        start_std=(0.1,) * 4 + (0.01,) * 2, start=(0,) * 4 + (np.pi,) * 2, target=(0,) * 6,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_benchmark(inside, capsys, monkeypatch):
    short = functools.partial(benchmark.benchmark_policy, repeats=2)
    monkeypatch.setattr(benchmark, "benchmark_policy", short)
    inside("--benchmark")
    text = capsys.readouterr().out
    works = {work: notes for _, work, notes in re.findall(LINE, text)}  # as the table reads it
    assert works.keys() == {*POLICY} and all("GB" in notes for notes in works.values())


def test_a_longer_run_equals_one_in_one_go(inside, tmp_path):
    inside(*DEBUG, "--trials", 3)
    (tmp_path / "run").rename(tmp_path / "whole")
    inside(*DEBUG, "--trials", 1)
    inside(*DEBUG, "--trials", 3)
    rows = [[row for row in lines_of(tmp_path / x) if "trial" in row] for x in ("run", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    same_leaves(*(checkpoint.load(tmp_path / x)["agent"]["theta"] for x in ("run", "whole")))


def test_nothing_is_lost(inside, tmp_path, capsys):
    run = tmp_path / "run"
    inside(*DEBUG)
    before = lines_of(run)
    inside(*DEBUG)
    assert "resumes at step 24" in capsys.readouterr().out
    assert lines_of(run) == before and checkpoint.load(run)["done"] == 3
    saved = (run / "checkpoint.pt").read_bytes()
    for flags, words in (
        ("--centers 5", "centers: 4 -> 5"),
        ("--env-id running:Long-v0", "env_id: PILCO/Pendulum-v0 -> running:Long-v0"),
        ("--env-id A-v0", "unknown environment 'A-v0'"),
    ):
        with pytest.raises(checkpoint.RunError, match=words):
            inside(*DEBUG, *flags.split())
    with pytest.raises(checkpoint.RunError, match=r"was written by pilco\.py"):
        checkpoint.load(run, "dreamer")
    assert (run / "checkpoint.pt").read_bytes() == saved
    inside(*DEBUG, "--fresh")
    assert "resumes" not in capsys.readouterr().out and lines_of(run) == before


def test_data_that_cannot_be_used(inside, tmp_path):
    """The rollouts before it stay in the run folder."""
    argv = [*DEBUG, "--horizon", 15, *plain(2)]
    with pytest.raises(checkpoint.RunError, match="not finite"):
        inside(*argv, "--env-id", "running:Spoiled-v0", "--random-rollouts", 9)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(checkpoint.RunError, match="all numbers .* change by the same amount"):
        inside(*argv, "--env-id", "running:Long-v0")
    assert checkpoint.load(tmp_path / "run")["done"] == 1


def with_constant():
    """The pendulum, observed with a number that is always 7."""
    env = gymnasium.make("PILCO/Pendulum-v0")
    space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    return gymnasium.wrappers.TransformObservation(env, lambda x: np.append(x, 7.0), space)


def test_a_number_that_never_changes(inside, tmp_path, capsys):
    gymnasium.register("WithConstant-v0", with_constant)
    flags = "--start 0 0 7 --start-std 0.1 0.1 0 --target 0 3.14 7 --weights 0 0 1 1 1"
    inside(*DEBUG, "--env-id", "WithConstant-v0", "--angles", 1, *flags.split())
    text = capsys.readouterr().out
    assert text.count("observation indices [2] never change, or always alike: no GP") == 1
    agent = pilco.load(tmp_path / "run")
    assert agent.data["observation"].shape == (24, 3)
    belief = agent.predict()["next"]
    assert (belief["mean"][..., 2] - 7).abs().max() < 1e-6
    assert belief["covariance"][..., 2, 2].max() < 1e-9 < belief["covariance"][..., 0, 0].min()


def test_a_crash_costs_only_its_rollout(inside, breaks, tmp_path, capsys):
    """The trials before it are saved, the one that failed comes again; no returns are joined."""
    argv = [*DEBUG, "--env-id", "running:Breaks-v0", *plain(2)]
    assert until_it_ends(inside, *argv) == 2
    assert "stopped; the same command resumes, and tries again" in capsys.readouterr().out
    rows = [row for row in lines_of(tmp_path / "run") if "trial" in row]
    assert [(row["trial"], row["episode/return"]) for row in rows] == [(0, 8), (1, 8), (2, 8)]


def test_a_search_without_a_value_is_an_error(inside, monkeypatch):
    def broken(agent, theta):
        return theta[:, 0] * np.nan, theta * np.nan

    monkeypatch.setattr(pilco.Agent, "objective", broken)
    with pytest.raises(checkpoint.RunError, match="expected cost is not a number"):
        inside(*DEBUG)


def test_a_signal_during_the_fit(inside, tmp_path, monkeypatch, capsys):
    fit = pilco.GPWorldModel.fit

    def signaled(model, td):
        os.kill(os.getpid(), signal.SIGTERM)
        return fit(model, td)

    monkeypatch.setattr(pilco.GPWorldModel, "fit", signaled)
    inside(*DEBUG)
    assert "stopped; the same command resumes" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run")["done"] == 1


def test_the_pendulum_is_learned(inside, tmp_path):
    """Hanging costs 1 per step; three short searches leave less than half in the last second."""
    flags = "--preset pendulum --seed 2 --trials 3 --horizon 25 --evaluations 30 --centers 10"
    inside(*flags.split(), "--restarts", 1, "--no-tensorboard")
    costs = [row["episode/final_cost"] for row in lines_of(tmp_path / "run") if "trial" in row]
    assert costs[0] > 0.9 and min(costs) < 0.5
