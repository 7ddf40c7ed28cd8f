"""dreamer.py as its users run it: schedule, resume, evaluation, kinds of environments, errors."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from running import (
    REPO,
    count_lines,
    lines_of,
    resumes_exactly_on_two_ranks,
    same_leaves,
    until,
    until_it_ends,
)

import common.run
import dreamer
from common import checkpoint
from common.envs import make_envs
from common.replay import Replay
from dreamer import Agent, parse_args

SCRIPT = REPO / "dreamer.py"  # what `start`, `two` and `inside` run here
SMALL = str.split(
    "--threads 1 --no-tensorboard --deter 8 --hidden 8 --stoch 3 --depth 1 --units 8 --batch-size 2"
    " --batch-length 6 --imagination-horizon 3 --action-repeat 1 --eval-every 0"
    " --eval-episodes 1 --log-every 20 --save-every 60"
)


@pytest.mark.parametrize(("num_envs", "repeat"), [(1, 2), (4, 1)])
def test_68_schedule(inside, monkeypatch, num_envs, repeat):
    """No update before step 5,000, 100 there, 100 more every 1,000 steps; one batch each."""
    replays, update_steps, make = [], [], dreamer.make_replay

    def update(agent, batch):
        update_steps.append(replays[0].num_envs * replays[0].total * repeat)
        assert batch.shape == batch["previous"].shape == (50, 50)
        return {"train/loss": torch.zeros(())}

    monkeypatch.setattr(
        dreamer, "make_replay", lambda *a, **k: replays.append(make(*a, **k)) or replays[-1]
    )
    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(Agent, "act", quick_act)
    argv = [
        *SMALL,
        "--preset",
        "dmc_vision",
        "--obs",
        "vector",
        "--env-id",
        "dummy_envs:EchoBox-v0",
    ]
    argv += ["--num-envs", num_envs, "--action-repeat", repeat, "--save-every", 100_000]
    inside(*argv, "--batch-size", 50, "--batch-length", 50, "--steps", 9000)
    counts = [(step, update_steps.count(step)) for step in sorted(set(update_steps))]
    assert counts == [(step, 100) for step in (5000, 6000, 7000, 8000, 9000)]
    assert sum(n for _, n in counts) == 100 * (1 + (9000 - 5000) // 1000)


def quick_act(agent, rows, latent=None, training=False, random=False):
    """No network: the schedule does not depend on it."""
    return agent.initial(len(rows)) if latent is None else latent


def test_bursts_of_several_environments(inside, monkeypatch):
    """The number of updates follows the environment steps, however many steps one row takes;
    there are none before an episode has ended.
    """
    updates = []
    monkeypatch.setattr(Agent, "act", quick_act)
    monkeypatch.setattr(
        Agent, "update", lambda *_: updates.append(0) or {"train/loss": torch.zeros(())}
    )
    argv = [*SMALL, "--env-id", "running:Long-v0", "--num-envs", 16, "--train-every", 5]
    inside(*argv, "--train-steps", 2, "--pretrain", 4, "--prefill", 0, "--steps", 800)
    first_burst = 21 * 16 // 5 - 20 * 16 // 5  # multiples of 5 in the row that ends the episodes
    assert first_burst == 3 and len(updates) == 4 + 2 * (first_burst - 1) + 2 * (160 - 21 * 16 // 5)


def test_stopped_within_the_last_burst(inside, monkeypatch, tmp_path):
    """The rest of the burst comes after the resume; until then, the run is not over."""
    argv = [*SMALL, "--env-id", "running:Long-v0", "--prefill", 60, "--steps", 60, "--seed", 4]
    argv += ["--train-every", 60, "--train-steps", 7, "--pretrain", 90]
    ended, updates, update = [], [], Agent.update
    monkeypatch.setattr(common.run, "score", lambda _: ended.append(0) or {"eval/return_std": 0.0})

    def stopping(agent, batch):
        updates.append(0)
        if len(updates) == 90 + 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(agent, batch)

    monkeypatch.setattr(Agent, "update", stopping)
    inside(*argv)
    (tmp_path / "run").rename(tmp_path / "whole")
    assert len(ended) == 1 and len(updates) == 90
    inside(*argv)
    before = checkpoint.load(tmp_path / "run")
    assert (before["step"], before["updates"], before["owed"]) == (60, 50, 40)
    assert len(ended) == 1
    inside(*argv)
    assert len(ended) == 2 and lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    states = [checkpoint.load(tmp_path / name) for name in ("run", "whole")]
    assert states[0]["updates"] == states[1]["updates"] == 90
    same_leaves(*(state["agent"]["world_model"] for state in states))


def test_an_extended_run_equals_one_long_run(start, tmp_path):
    argv = [*SMALL, "--env-id", "running:Long-v0", "--prefill", 40, "--save-every", 1000]
    argv += ["--train-every", 20, "--train-steps", 2, "--pretrain", 3, "--eval-every", 30]
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    first = start(*argv, "--steps", 100, "--run", whole)
    start(*argv, "--steps", 60, "--run", longer).done()
    assert sum("eval/return" in row for row in lines_of(longer)) == 2  # by --eval-every, at the end
    start(*argv, "--steps", 100, "--run", longer).done()
    first.done()
    rows = lines_of(longer)
    rows.remove(next(row for row in rows if "eval/return_std" in row))  # at step 60
    assert lines_of(whole) == rows and "eval/return_std" in rows[-1]
    same_leaves(*(checkpoint.load(run)["agent"]["actor"] for run in (whole, longer)))


def test_the_seed_determines_the_run(start, tmp_path):
    argv = [*SMALL, "--env-id", "CartPole-v1", "--steps", 200, "--prefill", 120]
    argv += ["--train-every", 20, "--train-steps", 1, "--pretrain", 1]
    seeds = {"a": 1, "b": 1, "c": 2}
    runs = [start(*argv, "--run", tmp_path / k, "--seed", seed) for k, seed in seeds.items()]
    for run in runs:
        run.done()
    a, b, c = (lines_of(tmp_path / k) for k in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("pcont", [False, True])
def test_the_last_window_is_drawn_with_pcont(inside, monkeypatch, pcont):
    last_windows, draw = [], Replay.draw_in_episodes

    def spy(replay, batch_size):
        last_windows.append(replay.last_window)
        return draw(replay, batch_size)

    monkeypatch.setattr(Replay, "draw_in_episodes", spy)
    argv = [*SMALL, "--env-id", "running:Long-v0", "--prefill", 60, "--steps", 60]
    argv += ["--train-every", 20, "--pretrain", 2]
    inside(*argv, *["--pcont"] * pcont)
    assert last_windows == [pcont] * 2


def test_the_debug_preset_runs(start, tmp_path):
    folder = tmp_path / "run"
    start("--preset", "debug", "--threads", 1, "--run", folder, prepare="all_pictures").done()
    rows, state = lines_of(folder), checkpoint.load(folder)
    assert state["step"] == 1000 and state["updates"] >= 20
    evaluations = [row["step"] for row in rows if "eval/return" in row]
    assert evaluations == [500, 1000, 1000] and np.isfinite(rows[-1]["eval/return"])
    names = {path.name for path in folder.iterdir()}
    assert {"policy.mp4", "learning_curve.png", "tensorboard"} < names


@pytest.mark.parametrize("flags", ["--preset default", "--preset dmc_vision --batch-length 5"])
def test_presets_start_to_train(start, tmp_path, flags):
    argv = [*SMALL, *flags.split(), "--prefill", 500, "--train-every", 500, "--pretrain", 4]
    argv += ["--train-steps", 4, "--steps", 2100, "--log-every", 500, "--action-repeat", 2]
    folder = tmp_path / "run"
    run = start(*argv, "--run", folder)
    until(lambda: run.path(".rc").exists() or lines_of_updates(folder))
    run.signal(signal.SIGTERM)
    run.done()
    shapes = checkpoint.load(folder)["agent"]["spec"]["shapes"].values()
    assert {len(shape) for shape in shapes} == {3 if "vision" in flags else 1}


def lines_of_updates(folder):
    """Lines of metrics.jsonl written after the first update."""
    return count_lines(folder) and [row for row in lines_of(folder) if row.get("updates")]


def test_benchmark(start):
    argv = [*SMALL, "--env-id", "running:Long-v0", "--train-every", 10, "--train-steps", 3]
    text = start(*argv, "--benchmark", "--action-repeat", 2).done()
    assert "0.6 updates per row" in text and "float32 product" in text
    operations = re.findall(r"([\d.]+) ms      (.+), while profiled", text)
    times = [float(time) for time, _ in operations]
    assert len(times) == 8 and times == sorted(times, reverse=True) and times[0] > 0
    assert {"aten::mm", "aten::addmm"} & {name for _, name in operations}


def test_prefill_is_random(inside, monkeypatch):
    calls, act = [], Agent.act

    def spy(agent, rows, latent=None, training=False, random=False):
        calls.append((training, random))
        return act(agent, rows, latent, training, random)

    monkeypatch.setattr(Agent, "act", spy)
    short = ["--batch-length", 4]  # its episodes have six rows
    inside(*SMALL, "--env-id", "dummy_envs:Base-v0", "--prefill", 12, "--steps", 30, *short)
    assert calls == [(True, True)] * 12 + [(True, False)] * 18


def test_what_observations_are_taken_for_is_printed_once(inside, capsys):
    """By the parent of both workers, not again by the evaluations."""
    short = ["--env-workers", "--num-envs", 2, "--batch-length", 4, "--eval-every", 20]
    inside(*SMALL, "--env-id", "dummy_envs:Mission-v0", "--prefill", 12, "--steps", 60, *short)
    lines = capsys.readouterr().out.splitlines()
    expected = ["eye: picture 64 x 64 x 3", "mission: text, left out"]
    assert [line for line in lines if line.startswith(("eye", "mission"))] == expected


CASES = {
    "two pendulums": "--env-id running:ShortPendulum-v0 --num-envs 2 --steps 400 --prefill 100",
    "discrete, the replay wraps around": (
        "--env-id CartPole-v1 --steps 400 --prefill 60 --replay-size 120 --pcont --pcont-scale 3"
        " --eval-every 70"
    ),
    "pixels": "--env-id running:Pixels-v0 --steps 240 --prefill 60",
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(start, tmp_path, case):
    """Killed (SIGKILL), stopped (SIGTERM), and restarted: bit for bit as if never stopped."""
    argv = [*SMALL, *CASES[case].split(), "--train-every", 10, "--train-steps", 1, "--pretrain", 2]
    start(*argv, "--run", tmp_path / "a").done()
    total = count_lines(tmp_path / "a")

    def wait(run, lines):
        until(lambda: count_lines(tmp_path / "b") > lines or run.path(".rc").exists())

    for fraction, number in ((0.4, signal.SIGKILL), (0.7, signal.SIGTERM)):
        run = start(*argv, "--run", tmp_path / "b")
        wait(run, fraction * total)
        run.signal(number)
        run.wait()
    start(*argv, "--run", tmp_path / "b").done()
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    states = [checkpoint.load(tmp_path / name) for name in "ab"]
    for state in states:
        state["logger"] = {k: v for k, v in state["logger"].items() if k not in ("wall", "bytes")}
        del state["agent"]["args"]["run"], state["replay"]["current"], state["saves"]
    assert states[0]["updates"] >= 20
    same_leaves(*states)
    for path in (tmp_path / "a" / "replay").iterdir():
        if path.name == ".saves":
            continue
        other = tmp_path / "b" / "replay" / path.name
        assert path.read_bytes() == other.read_bytes(), path.name


@pytest.mark.parametrize(
    ("env_id", "flags", "classes"),
    [
        ("running:Both-v0", "", []),
        ("dummy_envs:EchoMulti-v0", "--pcont", [2, 3]),
        ("CartPole-v1", "--obs pixels --batch-length 4", [2]),
    ],
)
def test_observations_and_actions(start, tmp_path, env_id, flags, classes):
    argv = [*SMALL, "--env-id", env_id, "--steps", 180, "--prefill", 120, *flags.split()]
    argv += ["--train-every", 20, "--train-steps", 1, "--pretrain", 1]
    start(*argv, "--run", tmp_path / "run").done()
    state = checkpoint.load(tmp_path / "run")
    assert state["updates"] >= 3 and list(state["agent"]["spec"]["classes"]) == classes


def test_eval_load_and_act(start, tmp_path):
    folder = tmp_path / "run"
    argv = [*SMALL, "--env-id", "running:Both-v0", "--steps", 120, "--prefill", 60]
    argv += ["--train-every", 20, "--train-steps", 1, "--pretrain", 1, "--eval-every", 100]
    start(*argv, "--run", folder, prepare="all_pictures").done()
    assert (folder / "policy.mp4").exists()
    returns = [row["eval/return"] for row in lines_of(folder) if "eval/return" in row]
    assert returns == [210.0, 210.0]  # 1 + 2 + ... + 20: one at step 100, one at the end
    text = start("--eval", folder, "--eval-episodes", 2, "--threads", 1).done()
    assert "return 210.0 +- 0.0 over 2 episodes" in text
    agent = dreamer.load(folder)
    envs, latent = make_envs(agent.args, num_envs=1, seed=0), None
    for _ in range(21):
        rows = envs.step(None if latent is None else latent["action"])
        latent = agent.act(rows, latent)
    envs.close()
    assert rows["is_last"].all()
    same_leaves(checkpoint.load(folder)["agent"], agent.state_dict())


def test_wrong_flags_and_foreign_runs(start, tmp_path):
    for flags, words in (
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--imagination-horizon 1", "--imagination-horizon must be at least 2"),
        ("--actor-lr 0", "--actor-lr"),
        ("--prefill -1", "--prefill"),
        ("--prefill 60 --steps 59", "--steps 59 are below --prefill 60: nothing would be learned"),
        ("--device nowhere", "--device nowhere"),
    ):
        assert words in start(*SMALL, *flags.split()).error()
    run = tmp_path / "run"
    argv = [*SMALL, "--env-id", "dummy_envs:Base-v0", "--prefill", 10, "--steps", 30, "--run", run]
    argv += ["--batch-length", 4]
    start(*argv).done()
    assert "--gamma" in start(*argv, "--gamma", 0.9).error().replace("gamma:", "--gamma")
    with pytest.raises(checkpoint.RunError, match=r"was written by dreamer\.py"):
        checkpoint.load(run, "dreamer_v3")


def test_nothing_is_lost(start, tmp_path):
    """As in test_run.py for dreamer_v3.py, because each script has its own main."""
    short = ["--prefill", 30, "--train-every", 10, "--train-steps", 1, "--pretrain", 1]
    argv, run = [*SMALL, *short, "--save-every", 1000], tmp_path / "spoiled"
    spoiled = [*argv, "--env-id", "running:Spoiled-v0", "--steps", 200, "--run", run]
    message = start(*spoiled).error()
    assert "not finite" in message and "episode 4" in message
    state = checkpoint.load(run)
    assert state["step"] == state["replay"]["total"] == 91 and state["updates"] > 0
    run = tmp_path / "run"
    argv += ["--env-id", "running:Long-v0", "--run", run]
    start(*argv, "--steps", 60).done()
    before = lines_of(run)
    assert "resumes at step 60" in start(*argv, "--steps", 60).done()
    assert lines_of(run) == before and checkpoint.load(run)["step"] == 60
    start(*argv, "--steps", 40).done()
    assert checkpoint.load(run)["step"] == 60
    message = start(*argv, "--steps", 80, prepare="wider_observation").error()
    assert "'observation': [2]" in message and "'observation': [3]" in message
    shutil.rmtree(run / "replay")
    for _ in range(2):  # the second must not mistake the first one's new files for rows
        assert "replay/ lacks" in start(*argv, "--steps", 80).error()
    text = start(*argv, "--steps", 60, "--fresh").done()
    assert "resumes" not in text and lines_of(run) == before


def test_a_nan_metric_is_named(inside, monkeypatch):
    update = Agent.update

    def broken(agent, batch):
        return update(agent, batch) | {"train/loss_actor": torch.tensor(np.nan)}

    monkeypatch.setattr(Agent, "update", broken)
    with pytest.raises(checkpoint.RunError, match="train/loss_actor not finite at update 1"):
        inside(*SMALL, "--env-id", "running:Long-v0", "--prefill", 60, "--steps", 120)


def no_environment(*_, **__):
    raise checkpoint.RunError("gone")


def test_crashes(inside, breaks, monkeypatch, tmp_path, capsys):
    """No return is joined; an evaluation without an environment is tried again."""
    argv = [*SMALL, "--env-id", "running:Breaks-v0", "--obs", "vector", "--save-every", 1000]
    argv += ["--prefill", 42, "--pretrain", 1, "--train-every", 42, "--eval-every", 63]
    with monkeypatch.context() as patch:
        patch.setattr(common.run, "make_envs", no_environment)
        breaks.bad = staticmethod(lambda episode: False)
        with pytest.raises(checkpoint.EnvError, match="no environment for the evaluation: gone"):
            inside(*argv, "--steps", 105)
    assert "saved; the same command resumes" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run")["step"] == 63
    breaks.bad = staticmethod(lambda episode: episode % 3 == 0)
    assert until_it_ends(inside, *argv, "--steps", 105)
    rows = lines_of(tmp_path / "run")
    returns = [(row["step"], row["episode/return"]) for row in rows if "episode/return" in row]
    assert returns == [(21 * k, 20.0) for k in range(1, 6)]
    assert [(r["step"], r["eval/return"]) for r in rows if "eval/return" in r] == [(63, 20.0)]


def test_presets():
    paper = parse_args(["--preset", "dmc_vision"])
    expected = dict(
        obs="pixels", action_repeat=2, prefill=5000, batch_size=50, batch_length=50,
        train_every=1000, train_steps=100, pretrain=100, deter=200, hidden=200, stoch=30, depth=32,
        units=400, free_nats=3.0, kl_scale=1.0, pcont=False, pcont_scale=10.0,
        imagination_horizon=15, gamma=0.99, lam=0.95, init_std=5.0, expl_amount=0.3,
        model_lr=6e-4, actor_lr=8e-5, value_lr=8e-5, clip=100.0, num_envs=1, steps=5_000_000,
    )  # fmt: skip
    assert {name: getattr(paper, name) for name in expected} == expected
    assert parse_args(["--preset", "debug", "--units", "7"]).units == 7


def test_no_episode_is_long_enough(inside):
    with pytest.raises(checkpoint.RunError, match="no whole episode of 31 rows or more.*--prefill"):
        inside(*SMALL, "--env-id", "running:Long-v0", "--batch-length", 30, "--prefill", 50)


def test_a_run_without_updates_says_so(start, tmp_path):
    argv = [*SMALL, "--env-id", "running:Long-v0", "--prefill", 10, "--train-every", 5]
    text = start(
        *argv, "--steps", 15, "--run", tmp_path / "run"
    ).done()  # its first episode ends with row 21
    assert text.count("no update before an episode of --batch-length rows has ended") == 1
    assert "no updates: raise --steps, or lower --prefill" in text


@pytest.mark.parametrize(
    ("env_id", "flags", "times"), [("Terminal", "", 1), ("Terminal", "--pcont", 0), ("Base", "", 0)]
)
def test_episodes_that_terminate_without_pcont(inside, capsys, env_id, flags, times):
    argv = [*SMALL, "--prefill", 10, "--steps", 30, "--batch-length", 4, *flags.split()]
    inside(*argv, "--env-id", f"dummy_envs:{env_id}-v0")
    assert capsys.readouterr().out.count("terminated: dreams do so only with --pcont") == times


def test_two_ranks_resume_exactly(two, tmp_path):
    flags = "--preset debug --env-id CartPole-v1 --num-envs 4 --action-repeat 1 --pcont --threads 1"
    flags += " --prefill 40 --train-every 20 --train-steps 2 --pretrain 3 --log-every 20"
    flags += " --batch-length 5 --eval-every 40 --save-every 40 --no-tensorboard"
    resumes_exactly_on_two_ranks(two, tmp_path, flags.split())
