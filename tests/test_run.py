"""dreamer_v3.py as a user runs it: flags, presets, counts, resume, errors, evaluation, reuse."""

import ast
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import running
import torch
import tyro
from running import (
    ENVIRONMENT,
    REPO,
    count_lines,
    leaves,
    lines_of,
    replay_rows,
    same_leaves,
    same_runs,
    until,
    until_it_ends,
)
from tensordict import TensorDict

import common.run
import dreamer
import dreamer_v3
import pilco
from common import checkpoint
from common.checkpoint import EnvError, RunError
from common.envs import Envs, Options, make_envs
from common.replay import Replay, with_previous
from common.run import check_flags, evaluate, film, score
from dreamer_v3 import Agent, parse_args
from tools.benchmark import benchmark
from tools.dreams import open_loop
from tools.peers.table import LINE

SCRIPT = REPO / "dreamer_v3.py"  # what `start` and `inside` run here
TUPLES = tuple[int, ...], tuple[float, ...]
SMALL = (
    "--threads 1 --no-tensorboard --deter 16 --hidden 8 --stoch 4 --classes 4 --depth 2 --units 8"
    " --batch-size 2 --batch-length 8 --imagination-horizon 3 --image-size 16"
)
TINY = (
    f"{SMALL} --num-envs 1 --action-repeat 1 --obs auto --eval-episodes 1"
    " --train-ratio 4 --log-every 20 --save-every 60 --warmup 5 --lr 1e-3"
)
SMALL, TINY = SMALL.split(), TINY.split()


# --- resume -------------------------------------------------------------------------------------

CASES = {
    "pendulum, the replay wraps around": (
        "--env-id running:ShortPendulum-v0 --num-envs 2 --steps 400 --replay-size 160"
        " --train-ratio 1"
    ),
    "dm_control": "--env-id running:ShortCartpole-v0 --steps 160 --log-every 5",
    "pixels": "--env-id running:Pixels-v0 --steps 130 --log-every 5 --save-every 30",
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_equals_uninterrupted(start, tmp_path, case):
    argv = [*TINY, *CASES[case].split()]
    whole, stopped, killed = (tmp_path / name for name in ("whole", "stopped", "killed"))
    first = start(*argv, "--run", whole)
    second, third = start(*argv, "--run", stopped), start(*argv, "--run", killed)

    until(lambda: count_lines(stopped) > random.randint(4, 15))
    second.signal(signal.SIGTERM)
    assert "saved" in second.done()
    halfway = checkpoint.load(stopped)["step"]
    assert 0 < halfway < parse_args(argv).steps

    until((killed / "checkpoint.pt").exists)
    time.sleep(0.2 * random.random())
    third.signal(signal.SIGKILL)
    assert third.wait() == -signal.SIGKILL
    third = start(*argv, "--run", killed)  # and once more, perhaps before anything was saved
    lines = count_lines(killed)
    until(lambda: count_lines(killed) > lines or third.path(".rc").exists())
    third.signal(signal.SIGKILL)
    third.wait()

    second, third = start(*argv, "--run", stopped), start(*argv, "--run", killed)
    assert f"resumes at step {halfway:,}" in second.done()
    assert "resumes at step" in third.done()
    first.done()
    same_runs(whole, stopped, argv)
    same_runs(whole, killed, argv)


def test_an_extended_run_equals_one_long_run(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Walk-v0", "--save-every", "1000", "--train-ratio", "8"]
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    first = start(*argv, "--steps", 90, "--run", whole)
    start(*argv, "--steps", 50, "--run", longer).done()
    evaluation = lines_of(longer)[-1]
    assert evaluation["step"] == 50 and "eval/return" in evaluation
    start(*argv, "--steps", 90, "--run", longer).done()
    first.done()
    rows = lines_of(longer)
    rows.remove(evaluation)  # it stays; one long run has none there
    (longer / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    same_runs(whole, longer, [*argv, "--steps", "90"])


@pytest.mark.parametrize("stop", [30, 95])
def test_stopped_within_a_burst(inside, monkeypatch, tmp_path, stop):
    """The current update ends, the others follow the resume, and all is as if never stopped.

    25 updates for each row: the first one after row 24, the last burst after row 28.
    """
    argv = [*TINY, "--env-id", "running:Walk-v0", "--train-ratio", 400, "--steps", 28]
    updates, ended, update = [], [], Agent.update
    monkeypatch.setattr(common.run, "score", lambda _: ended.append(0) or {"eval/return_std": 0.0})

    def stopping(agent, batch):
        updates.append(0)
        if len(updates) == 101 + stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(agent, batch)

    monkeypatch.setattr(Agent, "update", stopping)
    inside(*argv)
    (tmp_path / "run").rename(tmp_path / "whole")
    assert len(ended) == 1 and len(updates) == 101
    inside(*argv)
    assert len(ended) == 1 and len(updates) == 101 + stop
    before = checkpoint.load(tmp_path / "run")
    assert before["updates"] == stop and before["owed"] == 25 - (stop - 1) % 25
    assert before["step"] == before["replay"]["total"] == 24 + -(-(stop - 1) // 25)
    inside(*argv)
    assert len(ended) == 2 and len(updates) == 202
    same_runs(tmp_path / "whole", tmp_path / "run", argv)


def test_resume_when_no_update_precedes_a_save_or_a_picture(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Long-v0", "--run", tmp_path / "run", "--save-every", 61]
    start(*argv, "--train-ratio", 0.5, "--steps", 60).done()
    assert checkpoint.load(tmp_path / "run")["updates"] == 2  # at rows 24 and 56; the next is at 88
    start(*argv, "--train-ratio", 0.5, "--steps", 61).done()


def test_the_seed_determines_the_run(start, tmp_path):
    argv = [*TINY, "--env-id", "dummy_envs:EchoDiscrete-v0", "--steps", "110"]
    seeds = {"a": 1, "b": 1, "c": 2}
    runs = [start(*argv, "--run", tmp_path / k, "--seed", seed) for k, seed in seeds.items()]
    for run in runs:
        run.done()
    same_runs(tmp_path / "a", tmp_path / "b", [*argv, "--seed", "1"])
    a, c = checkpoint.load(tmp_path / "a"), checkpoint.load(tmp_path / "c")
    assert lines_of(tmp_path / "a") != lines_of(tmp_path / "c")
    name = "belief_in.0.weight"
    a, c = (state["agent"]["world_model"][f"prior.{name}"] for state in (a, c))
    assert not torch.allclose(a, c)


def test_changed_arguments_need_fresh(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Walk-v0", "--run", tmp_path / "run", "--steps", 40]
    start(*argv).done()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    message = start(*argv, "--lr", 0.5, "--horizon", 10, "--log-every", 7).error()
    assert "lr: 0.001 -> 0.5" in message and "horizon: 100 -> 10" in message
    assert "log_every" not in message and "units" not in message and "--fresh" in message
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    text = start(*argv, "--lr", 0.5, "--fresh").done()
    assert "starts" in text and "resumes" not in text
    start(*argv, "--lr", 0.5, "--run", tmp_path / "other").done()
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "other")


def test_a_finished_run_stays_as_it_is(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Walk-v0", "--run", tmp_path / "run", "--steps", 40]
    start(*argv).done()
    before = lines_of(tmp_path / "run")
    assert "resumes at step 40" in start(*argv).done()
    assert lines_of(tmp_path / "run") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(start, tmp_path, number):
    run = start(*TINY, "--env-id", "running:Slow-v0", "--run", tmp_path / "run")
    until(lambda: count_lines(tmp_path / "run") > 0)
    run.signal(number)
    assert "the same command resumes" in run.done()
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == state["replay"]["total"] >= 20


def test_two_processes_on_one_folder(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Slow-v0", "--run", tmp_path / "run", "--steps", 240]
    first = start(*argv)
    until(lambda: count_lines(tmp_path / "run") > 0)
    assert "another process is running" in start(*argv).error()
    assert "another process is running" in start(*argv, "--fresh").error()
    first.done()
    assert lines_of(tmp_path / "run")[-1]["step"] == 240


# --- flags and presets --------------------------------------------------------------------------

AUTHORS = dict(  # the same in every benchmark
    batch_size=16, batch_length=64, replay_size=5_000_000, stoch=32, blocks=8, unimix=0.01,
    free_nats=1.0, imagination_horizon=15, horizon=333, lam=0.95, entropy_bonus=3e-4,
    slow_rate=0.02, lr=4e-5, warmup=1000, clip=0.3, image_size=64, sticky=False, camera=-1,
    compile="auto", precision="auto", device="", seed=0, eval="", run="", fresh=False,
)  # fmt: skip
SIZES = {
    "1m": (512, 64, 4, 4, 64),
    "12m": (2048, 256, 16, 16, 256),
    "25m": (3072, 384, 24, 24, 384),
    "50m": (4096, 512, 32, 32, 512),
    "100m": (6144, 768, 48, 48, 768),
    "200m": (8192, 1024, 64, 64, 1024),
    "400m": (12288, 1536, 96, 96, 1536),
}
BENCHMARKS = {  # steps are environment steps: 1.1e5 actions of 4 frames in Atari
    "dmc_proprio": dict(
        size="1m", num_envs=16, action_repeat=1, train_ratio=1024, steps=1_100_000, obs="vector",
        env_id="dm_control/walker-walk-v0"),
    "dmc_vision": dict(
        size="200m", num_envs=16, action_repeat=1, train_ratio=256, steps=1_100_000, obs="pixels",
        env_id="dm_control/walker-walk-v0"),
    "atari100k": dict(
        size="200m", num_envs=1, action_repeat=4, train_ratio=256, steps=440_000, obs="auto",
        env_id="ALE/Pong-v5"),
    "crafter": dict(
        size="200m", num_envs=1, action_repeat=1, train_ratio=512, steps=1_100_000, obs="auto",
        env_id="tools.crafter_env:crafter/Reward-v0"),
}  # fmt: skip


def network(args):
    return args.deter, args.hidden, args.classes, args.depth, args.units


@pytest.mark.parametrize("preset", BENCHMARKS)
def test_presets_are_the_authors_recipes(preset):
    args = parse_args(["--preset", preset])
    expected = AUTHORS | BENCHMARKS[preset] | {"preset": preset}
    assert {k: getattr(args, k) for k in expected} == expected
    assert network(args) == SIZES[args.size]


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    for argv in (["--size", size], [f"--size={size}", "--preset", "crafter"]):
        args = parse_args(argv)
        assert network(args) == SIZES[size] and args.size == size and args.stoch == 32
    assert network(parse_args(["--size", size, "--units", "48"])) == (*SIZES[size][:4], 48)


def test_a_flag_beats_the_preset():
    defaults = dreamer_v3.Args()
    argv = "--preset dmc_vision --size 1m --obs auto --env-id CartPole-v1 --num-envs 1 --deter 8192"
    argv = [*argv.split(), "--train-ratio", "1024", "--steps", str(defaults.steps)]
    args = parse_args(argv)  # also where the flag repeats the default of Args
    assert args.preset == "dmc_vision" and args.env_id == "CartPole-v1" and args.obs == "auto"
    assert (args.num_envs, args.train_ratio, args.steps) == (1, 1024, defaults.steps)
    assert network(args) == (8192, 64, 4, 4, 64)
    assert parse_args(["--train-ratio", "7", "--preset", "crafter"]).train_ratio == 7


def test_unknown_flags_and_values(capsys):
    for argv in (["--lerning-rate", "1"], ["--preset", "dmc"], ["--size", "2m"], ["--steps", "x"]):
        with pytest.raises(SystemExit) as stop:
            parse_args(argv)
        assert stop.value.code == 2
        assert argv[0] in capsys.readouterr().err


NUMBERS = ("nan", "inf", "-7", "-3.5", str(2**70))
ANY_SIGN = {  # numbers that may be negative; an index of pilco.py is checked by its Agent
    dreamer_v3: {("entropy_bonus", "-7"), ("entropy_bonus", "-3.5")},
    dreamer: set(),
    pilco: {
        *itertools.product(("start", "target", "weights", "exploration"), ("-7", "-3.5")),
        ("angles", "-7"),
    },
}


@pytest.mark.parametrize(("script", "numbers"), [(dreamer_v3, 33), (dreamer, 34), (pilco, 23)])
def test_each_number_is_accepted_or_its_flag_is_named(script, numbers, capsys):
    """NaN, infinity and 2**70 never pass, a negative number only where it means something."""
    kinds, accepted = typing.get_type_hints(script.Args), set()
    kinds = {k: kind for k, kind in kinds.items() if kind in (int, float, *TUPLES)}
    args = script.parse_args(["--preset", "debug"])
    assert len(kinds) == numbers
    for name, text in itertools.product(kinds, NUMBERS):
        flag, kind = f"--{name.replace('_', '-')}", kinds[name]
        only = dataclasses.make_dataclass("Only", [(name, kind)])  # all of Args takes tyro 20 ms
        try:
            value = getattr(tyro.cli(only, args=[flag, text]), name)
            check_flags(dataclasses.replace(args, **{name: value}))
            accepted.add((name, text))
        except SystemExit:  # tyro's: not a whole number
            assert flag in capsys.readouterr().err
        except checkpoint.RunError as error:
            assert str(error).startswith(f"{flag} must be ") and "\n" not in str(error)
    assert accepted == ANY_SIGN[script]


@pytest.mark.parametrize("script", [dreamer_v3, dreamer, pilco])
def test_bad_flags_leave_no_run_folder(script, tmp_path):
    file, run = tmp_path / "file", tmp_path / "run"
    file.write_text("")
    cases = [
        ("--env-id ..", r"--env-id must be like CartPole-v1.*, not \.\."),
        ("--env-id ..:X-v0", "--env-id must be like"),
        ("--env-id a:b:c", "--env-id must be like"),
        ("--threads 100000", "--threads must be between 0 and 1,024"),
        ("--camera -2", "--camera must be the number of a camera, or -1"),
    ]
    if script is not pilco:
        cases += [
            ("--device meta", "--device meta cannot be used: it is neither cpu nor cuda"),
            ("--device mps", "--device mps cannot be used: it is neither cpu nor cuda"),
            ("--num-envs 100000", "--num-envs must be between 1 and 10,000"),
            ("--imagination-horizon 1000000000", "smaller --batch-size.*--imagination-horizon"),
            ("--replay-size 1000000000000 --steps 1000000000000", "smaller --replay-size"),
        ]
    for flags, words in cases:
        with pytest.raises(checkpoint.RunError, match=words):
            script.main(["--preset", "debug", "--run", str(run), *flags.split()])
    for folder in (file, file / "sub", "/dev/null", tmp_path / ("x" * 300)):
        with pytest.raises(checkpoint.RunError, match=f"--run {folder} cannot be written to"):
            script.main(["--preset", "debug", "--run", str(folder)])
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == ""


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (dreamer_v3, "--units 4611686018427387904"),
        (dreamer, "--deter 2000000000"),
        (pilco, "--centers 9223372036854775807"),
        (pilco, "--restarts 1000000000000"),
    ],
)
def test_networks_too_large_for_the_machine(script, flags, tmp_path, monkeypatch):
    argv = ["--preset", "debug", "--run", str(tmp_path / "run"), *flags.split()]
    monkeypatch.setattr(sys, "argv", [script.__file__, *argv])
    with pytest.raises(SystemExit) as end:
        common.run.launch(script.main)
    assert end.value.code.startswith("error: out of memory with --preset debug")
    assert f"{flags}: choose smaller sizes (" in end.value.code
    assert "\n" not in end.value.code and not any(tmp_path.iterdir())


def test_an_error_of_another_kind_keeps_its_traceback():
    def fail():
        raise RuntimeError("the sizes of two tensors differ")

    with pytest.raises(RuntimeError, match="two tensors"):
        common.run.launch(fail)


@pytest.mark.parametrize("script", [dreamer_v3, dreamer])
def test_every_flag_is_read(script):
    """`args.name` or getattr(args, "name") somewhere in the script or in common/.

    Two kinds are read another way: environment options, and periods by Run.interval_passed.
    """
    read, options = set(), {field.name for field in dataclasses.fields(Options)}
    for path in (Path(script.__file__), *(REPO / "common").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value)
                if owner.split(".")[-1] == "args" or owner in ("chosen", "first"):
                    read.add(node.attr)
                if owner.split(".")[-1] == "options" and path.name == "envs.py":
                    read |= {node.attr} & options
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(args, '"):
                read.add(node.args[1].value)
            if isinstance(node, ast.Call) and ast.unparse(node).startswith(
                "self.interval_passed('"
            ):
                read.add(f"{node.args[0].value}_every")
    assert {field.name for field in dataclasses.fields(script.Args)} - read == set()


@pytest.mark.parametrize("script", [dreamer_v3, dreamer, pilco])
def test_help_lists_presets_and_flags(script, capsys):
    """A line for each flag, in the groups of the source, with its value."""
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--preset", "debug", "--seed", "7", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert text.startswith(script.__doc__) and "\nworld model:\n" in text
    args = script.parse_args(["--preset", "debug", "--seed", "7"])
    lines = [line.split() for line in text.splitlines() if line.startswith("  --")]
    fields = [field.name for field in dataclasses.fields(script.Args)]
    assert [line[0] for line in lines] == [f"--{name.replace('_', '-')}" for name in fields]
    for name, line in zip(fields, lines, strict=True):
        assert len(line) > 2, f"--{name} has no explanation"
        value = str(getattr(args, name))
        assert not value or line[1] == value[:24].split()[0]
    words = set(re.findall(r"[\w-]+", text))
    assert not {*script.PRESETS, *getattr(script, "SIZES", ())} - words


def test_help_of_a_process():
    command = [sys.executable, str(SCRIPT), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=400)
    assert process.returncode == 0 and "DreamerV3 (Hafner" in process.stdout
    assert process.stdout.count("\n") < 100


def test_the_debug_preset_runs(tmp_path):
    """The real command in a bare process: what a newcomer does first."""
    command = [sys.executable, str(SCRIPT), "--preset", "debug", "--threads", "1", "--run", "run"]
    process = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=400
    )
    assert process.returncode == 0, process.stderr
    rows = lines_of(tmp_path / "run")
    assert rows[-1]["step"] == 1000 and np.isfinite(rows[-1]["eval/return"])
    losses = "model_reco model_reward model_continue model_dynamic model_representation actor value"
    last = next(row for row in reversed(rows) if "train/loss_actor" in row)
    assert all(np.isfinite(last[f"train/loss_{k}"]) for k in [*losses.split(), "replay_value"])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"args.json", "checkpoint.pt", "learning_curve.png", "policy.mp4", "tensorboard"}
    assert not expected - names
    for name in ("policy.mp4", "learning_curve.png", "1,000 of 1,000", "eval/return "):
        assert name in process.stdout + process.stderr


@pytest.mark.parametrize("preset", [*BENCHMARKS, "default"])
def test_each_preset_in_its_smallest_form(start, tmp_path, preset):
    """A few updates on the preset's own environment; evaluation would take whole episodes."""
    number = 2 if preset.startswith("dmc") else 1
    argv = ["--preset", preset, *SMALL, "--num-envs", number, "--log-every", 8, "--train-ratio", 16]
    run = start(*argv, "--run", tmp_path / "run")
    updates = lambda: any(row["updates"] >= 4 for row in lines_of(tmp_path / "run"))  # noqa: E731
    until(lambda: run.path(".rc").exists() or (count_lines(tmp_path / "run") and updates()))
    run.signal(signal.SIGTERM)
    run.done()
    state = checkpoint.load(tmp_path / "run")
    assert state["updates"] >= 4 and state["agent"]["optimizer"]["state"][0]["updates"] >= 4
    pixels = preset in ("dmc_vision", "atari100k", "crafter")
    shapes = state["agent"]["spec"]["shapes"].values()
    assert {len(shape) for shape in shapes} == {3 if pixels else 1}


# --- observations and actions -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "flags", "width", "classes"),
    [
        ("running:Long-v0", "--num-envs 3", 2, []),
        ("running:Pixels-v0", "--num-envs 3", 2, []),
        ("running:Both-v0", "--env-workers --num-envs 2", 2, []),
        ("running:Both-v0", "--obs vector", 2, []),
        ("running:Both-v0", "--obs pixels", 2, []),
        ("dummy_envs:EchoDiscrete-v0", "--num-envs 3 --action-repeat 2 --steps 132", 3, [3]),
        ("dummy_envs:EchoMulti-v0", "", 5, [2, 3]),
        ("dummy_envs:EchoBits-v0", "", 6, [2, 2, 2]),
        ("dummy_envs:Terminal-v0", "", 2, []),
        ("CartPole-v1", "--obs both", 2, [2]),
    ],
)
def test_observations_and_actions(start, tmp_path, env_id, flags, width, classes):
    argv = [*TINY, "--env-id", env_id, "--steps", "66", *flags.split()]
    start(*argv, "--run", tmp_path / "run").done()
    state = checkpoint.load(tmp_path / "run")
    spec = state["agent"]["spec"]
    assert (spec["action_dim"], list(spec["classes"])) == (width, classes)
    assert state["updates"] >= 3
    rows = replay_rows(tmp_path / "run", argv)
    action, last = rows["action"], rows["is_last"]
    assert action.shape[1] == width and not action[last].any()
    for part in action[~last].split(classes, -1) if classes else ():
        assert torch.equal(part.sort(-1).values[:, -1], torch.ones(len(part)))
        assert torch.equal(part.sum(-1), torch.ones(len(part)))
    if "Terminal" in env_id:
        assert torch.equal(rows["is_terminal"], last) and last.any()
    elif env_id.startswith(("running", "dummy")):
        assert not rows["is_terminal"].any()


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_envs", "action_repeat", "ratio", "rows", "gate", "period"),
    [
        (1, 1, 1024, 1120, 1088, 1),
        (16, 1, 1024, 2112, 2048, 1),
        (1, 2, 256, 1120, 1088, 4),
        (16, 1, 512, 2112, 2048, 2),
    ],
)
def test_when_updates_happen(
    inside, monkeypatch, num_envs, action_repeat, ratio, rows, gate, period
):
    """None before 1,024 windows, then one per `period` rows of experience."""
    update_rows = []

    def update(agent, batch):
        update_rows.append(replays[0].num_envs * replays[0].total)
        assert batch.shape == batch["previous"].shape == (16, 64)
        return {"train/loss": torch.zeros(())}, batch["previous"].select("belief", "state")

    replays = catch_replay(monkeypatch)
    monkeypatch.setattr(Agent, "update", update)
    argv = [*SMALL, "--batch-size", 16, "--batch-length", 64, "--env-id", "running:Long-v0"]
    argv += ["--num-envs", num_envs, "--action-repeat", action_repeat, "--train-ratio", ratio]
    inside(*argv, "--steps", rows * action_repeat)
    assert update_rows[0] == gate
    after = [row for row in range(gate, rows + 1, num_envs)]
    assert [update_rows.count(row) for row in after] == [
        1 if row == gate else (row - gate) // period - (row - num_envs - gate) // period
        for row in after
    ]


def catch_replay(monkeypatch):
    """Returns a list that will hold the replay that main makes."""
    replays, make = [], dreamer_v3.make_replay
    monkeypatch.setattr(
        dreamer_v3, "make_replay", lambda *a, **k: replays.append(make(*a, **k)) or replays[-1]
    )
    return replays


@pytest.mark.parametrize(("num_envs", "action_repeat", "rows"), [(1, 1, 6), (3, 2, 4)])
def test_returns_and_axis(inside, tmp_path, num_envs, action_repeat, rows):
    """Rewards 1 to 5 make 15; the x-axis is rows times repeat of all environments."""
    argv = [*TINY, "--env-id", "dummy_envs:Base-v0", "--train-ratio", 0, "--log-every", 1000]
    argv += ["--num-envs", num_envs, "--action-repeat", action_repeat, "--seed", 3]
    inside(*argv, "--steps", 3 * rows * num_envs * action_repeat)
    points = [(row["step"], row["episode/return"]) for row in lines_of(tmp_path / "run")[:-1]]
    steps = [k * rows * num_envs * action_repeat for k in (1, 2, 3)]
    assert points == [(step, 15.0) for step in steps for _ in range(num_envs)]


def test_no_action_on_last_rows(inside, monkeypatch):
    """In the replay itself."""
    replays = catch_replay(monkeypatch)
    inside(*TINY, "--env-id", "dummy_envs:Base-v0", "--num-envs", 2, "--steps", 60)
    window = replays[0].draw(200)
    last, action = window["is_last"], window["action"]
    assert 0.1 < last.float().mean() < 0.25
    assert not action[last].any() and (action[~last] != 0).all()


def test_latents_are_written_back(inside, monkeypatch):
    """The next sample has what the last update returned; context rows are unchanged."""
    replays, drawn, calls = catch_replay(monkeypatch), [], []
    draw, update = Replay.draw, Agent.update

    def spy_draw(replay, batch_size):
        drawn.append(draw(replay, batch_size))
        return drawn[-1].clone()

    def spy(agent, batch):
        metrics, latents = update(agent, batch)
        assert torch.equal(batch["index"], drawn[-1]["index"][:, 1:])
        calls.append((drawn[-1]["index"], drawn[-1], latents.clone()))
        return metrics, latents

    monkeypatch.setattr(Replay, "draw", spy_draw)
    monkeypatch.setattr(Agent, "update", spy)
    inside(*TINY, "--env-id", "running:Long-v0", "--steps", 64)
    index, before, after = calls[-1]
    expected = {}
    for i, t in itertools.product(range(2), range(1, 9)):  # in order: the last duplicate counts
        expected[tuple(index[i, t].tolist())] = after[i, t - 1]
    replays[0].queue.clear()
    now, changed, checked = replays[0].draw(2000), 0, set()
    rows = now["index"].flatten(0, 1).tolist()
    now = now.flatten()
    for place, key in enumerate(map(tuple, rows)):
        if key in expected and key not in checked:
            checked.add(key)
            for name in ("belief", "state"):
                assert torch.equal(now[name][place], expected[key][name].to(now[name].dtype)), key
            old = before.flatten()[index.flatten(0, 1).tolist().index(list(key))]["belief"]
            changed += not torch.equal(old, now["belief"][place])
    assert checked == set(expected) and changed > len(checked) // 2
    for i in range(2):  # the context rows, unless another window trained on them
        key = tuple(index[i, 0].tolist())
        if key not in expected:
            place = rows.index(list(key))
            assert torch.equal(before["belief"][i, 0], now["belief"][place])


def test_evaluation_samples():
    """A fresh policy is N(0, 0.89), and evaluation samples from exactly that."""
    args = parse_args([*TINY, "--env-id", "dummy_envs:EchoBox-v0"])
    envs = make_envs(args, num_envs=1, seed=0)
    torch.manual_seed(0)
    agent = Agent(envs.spec, args)
    envs.close()
    state = torch.get_rng_state()
    act, latents = agent.act, []
    agent.act = lambda *inputs: latents.append((inputs[0], act(*inputs))) or latents[-1][1]

    def played(episodes, seed):
        """Returns, frames, and the actions of the first episode."""
        latents.clear()
        results = evaluate(agent, episodes, seed=seed)
        return *results, torch.cat([latent["action"] for _, latent in latents[:101]])

    returns, frames, actions = played(3, 5)
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not use the training's draws"
    assert returns == [5050.0] * 3 and frames == [] and len(latents) == 303
    action, first = actions[:-1], latents[0][0]
    assert abs(action.mean()) < 0.15 and abs(action.std() - 0.8927) < 0.12
    assert (action.abs() > 1).any(), "samples are not clipped"
    assert torch.equal(played(1, 5)[2], actions)
    assert not torch.equal(played(1, 6)[2], actions)
    torch.manual_seed(1)
    mode = [act(first, sample=False)["action"] for _ in range(30)]
    assert torch.stack(mode).abs().max() < 0.2


def test_an_endless_episode_is_cut_with_a_note(monkeypatch, capsys):
    monkeypatch.setattr(common.run, "MAX_STEPS", 10)
    args = parse_args([*TINY, "--env-id", "dummy_envs:EchoBox-v0"])
    envs = make_envs(args, num_envs=1, seed=0)
    envs.close()
    returns, _ = evaluate(Agent(envs.spec, args), 2, seed=5)
    assert returns == [sum(range(10))] * 2, "a new episode after the cut"  # reward n at step n
    assert capsys.readouterr().out.count("cut after 10 steps: it has no max_episode_steps?") == 2


@pytest.mark.parametrize("script", [dreamer_v3, dreamer, pilco])
def test_evaluation_passes_the_constructor_its_arguments(script):
    kwargs = '{"max_episode_steps": 7, "slow": 0.001}'
    args = script.parse_args(["--preset", "debug", "--env-kwargs", kwargs])
    args.env_id, args.angles = "running:Long-v0", ()
    assert common.run.args_dict(args)["env_kwargs"] == kwargs  # as args.json has it
    envs = make_envs(args, num_envs=1)
    assert envs._vector.envs[0].unwrapped.slow == 0.001
    act = lambda *_: TensorDict(action=torch.zeros(1, 2))  # noqa: E731
    agent = SimpleNamespace(args=args, spec=envs.spec, act=act)
    assert evaluate(agent, 2, seed=5)[0] == [28.0] * 2  # 1 + ... + 7, not to 20


def test_evaluation_leaves_the_generators_of_training(breaks):
    """Those of Python and numpy, too, which an environment may use; also where it raises."""
    args = parse_args([*TINY, "--env-id", "running:Breaks-v0"])
    envs = make_envs(args, num_envs=1)
    envs.close()

    def act(*_):
        random.random(), np.random.rand()
        return TensorDict(action=torch.rand(1, envs.action_dim))

    agent, before = SimpleNamespace(args=args, spec=envs.spec, act=act), checkpoint.rng_state()
    for bad in (False, True):
        breaks.bad = staticmethod(lambda episode, bad=bad: bad)
        with pytest.raises(EnvError) if bad else nullcontext():
            evaluate(agent, 1, seed=5)
        after = checkpoint.rng_state()
        assert all(after[name] == before[name] for name in ("python", "numpy"))
        assert torch.equal(after["torch"], before["torch"])


def test_evaluation_needs_the_spaces_of_the_training():
    args = parse_args([*TINY, "--env-id", "dummy_envs:EchoBox-v0"])
    envs = make_envs(args, num_envs=1)
    envs.close()
    agent = SimpleNamespace(args=args, spec=envs.spec | {"action_dim": 7})
    with pytest.raises(RunError, match="EchoBox-v0 has changed: .*'action_dim': 7"):
        evaluate(agent, 1, seed=5)


# --- use ----------------------------------------------------------------------------------------


def test_eval_load_and_act(start, tmp_path):
    """One run with vectors and images, then --eval, then the lines of the README."""
    folder = tmp_path / "run"
    argv = [*TINY, "--env-id", "running:Both-v0", "--steps", 84]
    start(*argv, "--run", folder, prepare="all_pictures").done()
    names = {path.name for path in folder.iterdir()}
    assert "policy.mp4" in names
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "checkpoint.pt")}

    text = start(
        "--eval", folder, "--eval-episodes", 3, "--threads", 1, prepare="all_pictures"
    ).done()
    assert "return 210.0 +- 0.0 over 3 episodes" in text  # 1 + 2 + ... + 20
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert str(folder / "eval.mp4") in text
    import imageio_ffmpeg

    film = imageio_ffmpeg.read_frames(str(folder / "eval.mp4"))
    assert next(film)["size"] == (256, 256) and len(list(film)) == 21

    agent = dreamer_v3.load(folder)
    envs, latent, total = make_envs(agent.args, num_envs=1, seed=0), None, 0.0
    for _ in range(21):
        rows = envs.step(None if latent is None else latent["action"])
        latent = agent.act(rows, latent)
        total += rows["reward"].item()
    envs.close()
    assert total == 210 and rows["is_last"].all()
    saved = checkpoint.load(folder)["agent"]
    same_leaves(saved, agent.state_dict())


class Product:
    """An agent whose update is one product, forward and backward: 3 x 2 x 1000 x 1000 x 500.

    Its loss is 2 or, "compiled", 2.5.
    """

    def __init__(self, spec, args, device):
        assert spec["shapes"] == {"observation": [3]}
        self.loss = torch.tensor(2.5 if args.compile == "yes" else 2.0)
        self.args, self.device = args, device
        self.weight = torch.randn(1000, 500, requires_grad=True)

    def act(self, rows, latent):
        return TensorDict(action=torch.zeros(len(rows), 1), batch_size=[len(rows)])

    def stored_rows(self, rows, latent):
        return rows.set("action", latent["action"])

    def update(self, batch):
        assert batch.shape == batch["previous"].shape == (4, 8)
        assert set(batch.keys()) >= {"observation", "action"}
        assert "action" in batch["previous"].keys()
        x = torch.ones(1000, 1000, requires_grad=True)
        (x @ self.weight).sum().backward()
        return {"train/loss_model": self.loss, "train/grad_norm": torch.rand(())}, None


@pytest.mark.parametrize("compiled", ["no", "yes"])
def test_benchmark_of_a_known_update(compiled, capsys):
    argv = ["--preset", "debug", "--env-id", "Pendulum-v1", "--steps", "100_000_000"]
    argv += ["--compile", compiled]
    benchmark(Product, parse_args(argv), torch.device("cpu"), 0.125)
    text = capsys.readouterr().out

    def number(unit):
        return float(re.search(rf"([\d.]+) +{unit}", text)[1])

    assert number("GFLOP ") == 3.0
    assert number("ms +aten::mm, while profiled") > 0 and number("GB +memory of the process") > 0.1
    assert ("largest difference" in text) == (compiled == "yes")
    if compiled == "yes":
        assert "2.5e-01         largest difference" in text, "0.5 of 2"
        assert f"compiled sums:{6 * ' 2.5'}\n" in text and f"eager sums:{6 * ' 2'}\n" in text
    seconds = 1 / number("/s +environment steps") + 1 / number("/s +policy steps")
    [(ms, work, notes)] = re.findall(LINE, text)  # as the table of peers reads it
    assert float(ms) == number("ms +update") and work == "update" and "took" in notes
    seconds += float(ms) / 1e3 * 0.125  # updates per row
    assert number("h ") == pytest.approx(1e8 * seconds / 3600, rel=0.02)


def test_benchmark(start):
    argv = [*TINY, "--env-id", "running:Long-v0", "--benchmark", "--action-repeat", 2]
    argv += ["--units", 512]  # so that products are among the slowest operations
    text = start(*argv).done()
    assert "0.25 updates per row" in text and "float32 product" in text
    operations = re.findall(r"([\d.]+) ms      (.+), while profiled", text)
    times = [float(time) for time, _ in operations]
    assert len(times) == 8 and times == sorted(times, reverse=True) and times[0] > 0
    assert "aten::mm" in dict(map(reversed, operations))


def make_batch(spec, args, size=2, seed=0):
    """Random rows [size, batch_length + 1] as the replay draws them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, args.batch_length + 1)
    td = TensorDict({}, shape)
    for key, form in spec["shapes"].items():
        image = torch.randint(256, (*shape, *form), generator=generator).byte()
        td[key] = image if len(form) == 3 else torch.randn(*shape, *form, generator=generator)
    td["action"] = torch.rand(*shape, spec["action_dim"], generator=generator) * 2 - 1
    td["reward"] = torch.randn(shape, generator=generator)
    for key in ("is_first", "is_last", "is_terminal"):
        td[key] = torch.zeros(shape, dtype=torch.bool)
    td["is_first"][:, 0] = True
    td["belief"] = torch.randn(*shape, args.deter, generator=generator).tanh().half()
    state = torch.randint(args.classes, (*shape, args.stoch), generator=generator)
    td["state"] = torch.nn.functional.one_hot(state, args.classes).flatten(-2).byte()
    return td


SPEC = {
    "shapes": {"eye": [16, 16, 3], "place": [3]},
    "categories": {},
    "action_dim": 2,
    "classes": [],
}


def test_open_loop():
    """Filtered rows depend on observations, imagined ones on the context and the actions only."""
    args, context = parse_args([*TINY, "--batch-length", "12", "--stoch", "32"]), 5
    torch.manual_seed(0)
    agent, rows = Agent(SPEC, args), make_batch(SPEC, args, size=6)
    batch = with_previous(rows)
    untouched, state = batch.clone(), torch.get_rng_state()
    dream = open_loop(agent, batch, context)
    assert torch.equal(torch.get_rng_state(), state) and (batch == untouched).all()
    assert dream.shape == (6, 12) and dream["eye"].dtype == torch.uint8
    for key in ("eye", "place", "reward"):
        assert torch.equal(dream["true", key], rows[key][:, 1:])

    def changed(**shifted):
        """Times at which the prediction differs when the rows `shifted[key]` are shifted."""
        other = rows.clone()
        for key, row in shifted.items():
            other[key][:, row] += 100 if key == "eye" else 1
        place = open_loop(agent, with_previous(other), context)["place"]
        return [t for t in range(12) if not torch.equal(place[:, t], dream["place"][:, t])]

    later = slice(context + 1, None)  # time t of the dream is that of row t + 1
    assert changed(place=later, eye=later, reward=later) == []
    assert changed(reward=slice(None)) == []
    for row in (1, 2, context):  # the last row of the context is filtered, too
        assert changed(place=row)[0] == changed(eye=row)[0] == row - 1
    for row in (0, 3, context, 8, 11):
        assert changed(action=row) == list(range(row, 12))
    assert changed(action=12) == []
    reset = rows.clone()
    reset["is_first"][:, 4] = True
    place = open_loop(agent, with_previous(reset), context)["place"]
    assert torch.equal(place[:, :3], dream["place"][:, :3])


def test_bfloat16_is_close_to_float32():
    """The same weights, rows and random numbers under autocast."""
    argv = "--deter 64 --hidden 32 --stoch 8 --classes 4 --depth 2 --units 32 --batch-length 16"
    args = parse_args([*TINY, *argv.split(), "--horizon", "20"])
    assert args.precision == "auto"
    losses, agents = [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(3)
        agent = Agent(SPEC, dataclasses.replace(args, precision=precision))
        for head in (agent.world_model.reward, agent.value, agent.slow_value, agent.actor):
            last = [m for m in head.modules() if isinstance(m, torch.nn.Linear)][-1]
            torch.nn.init.normal_(last.weight, std=0.05)  # zeros would always agree
        batch = with_previous(make_batch(SPEC, args, size=8, seed=1))
        noise = {"posterior": torch.rand(8, 16, 8, 4).add_(0.01), "dream": None}
        noise["dream"] = agent.actor_loss.draw_noise(8 * 16)
        metrics, latents = agent.update(batch, noise)
        losses.append({k: v.item() for k, v in metrics.items() if "loss" in k})
        agents.append(agent)
        assert latents["belief"].dtype == torch.float32
    assert losses[0] != losses[1], "autocast must change something"
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    for module in agents[1].modules.values():
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    states = agents[1].optimizer.state.values()
    assert {x.dtype for state in states for x in state.values()} == {torch.float32}


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Pendulun-v1", "unknown environment 'Pendulun-v1' Pendulum-v1"),
        ("--env-id dm_control/walker-wlak-v0", "unknown environment dm_control/walker-walk-v0"),
        ("--env-id a_module_that_is_not_here:Env-v0", "needs a package a_module_that_is_not_here"),
        ("--env-id dummy_envs:Varying-v0", "seen Sequence not supported"),
        ("--env-id dummy_envs:EchoTuple-v0", "not supported"),
        ("--env-id dummy_envs:NotFinite-v0", "velocity not finite step 3"),
        ("--env-id dummy_envs:NotFinite-v0 --env-workers", "velocity not finite step 3"),
        ("--env-id dummy_envs:NotFiniteReward-v0", "reward not finite step 3"),
        ("--env-id dummy_envs:Raises-v0", "OSError the simulator is gone step 3"),
        ("--env-id dummy_envs:Raises-v0 --env-workers", "OSError the simulator is gone step 3"),
        ("--env-id dummy_envs:RaisesInResetLater-v0", "OSError no simulator step 0 episode 1"),
        ("--env-id dummy_envs:NoRender-v0 --obs pixels", "cannot be rendered"),
        ("--env-id dummy_envs:Picture-v0 --image-size 20", "image-size 16"),
        ("--env-id dummy_envs:Base-v0 --deter 20", "deter blocks"),
        ("--env-id dummy_envs:Base-v0 --device cuda:9", "cuda"),
        ("--env-id dummy_envs:Base-v0 --steps 23", "--steps --replay-size never"),
        ("--env-id dummy_envs:Base-v0 --replay-size 23", "--steps --replay-size never"),
        ("--env-id dummy_envs:Base-v0 --clip 0", "--clip positive"),
        ("--env-id dummy_envs:Base-v0 --lr nan", "--lr positive"),
        ("--env-id dummy_envs:Base-v0 --warmup -5", "--warmup negative"),
        ("--eval nothing_here", "no checkpoint in nothing_here"),
    ],
)
def test_one_line_errors(start, tmp_path, flags, words):
    message = start(*TINY, "--steps", 60, "--run", tmp_path / "run", *flags.split()).error()
    for word in words.split():
        assert word in message, message
    assert len(message.strip().splitlines()) <= 4, message


@pytest.mark.parametrize("env_id", ["Pendulun-v1", "a_module_that_is_not_here:Env-v0"])
def test_a_wrong_env_id_leaves_no_run_folder(start, tmp_path, env_id):
    assert env_id.split(":")[0] in start("--env-id", env_id, "--run", tmp_path / "run").error()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [dreamer_v3, dreamer, pilco])
@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--env-kwargs [8]", r"--env-kwargs \[8\] must be a JSON object"),
        ("--camera 0", "--camera 0: InvertedPendulum-v5 has no such camera"),
    ],
)
def test_what_an_environment_refuses_leaves_no_run_folder(script, flags, error, tmp_path):
    flags = ["--env-id", "InvertedPendulum-v5", "--run", str(tmp_path / "run"), *flags.split()]
    with pytest.raises(RunError, match=error):
        script.main(["--preset", "debug", *flags])
    assert not (tmp_path / "run").exists()


def test_nan_observation_keeps_the_run(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Spoiled-v0", "--steps", 200, "--save-every", 30]
    message = start(*argv, "--run", tmp_path / "run").error()
    for word in ("observation", "not finite", "step 7", "episode 4"):
        assert word in message
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == 91 and state["updates"] > 0  # it happens at row 4 * 21 + 8 = 92
    assert state["step"] == state["replay"]["total"]
    assert "step 7" in start(*argv, "--run", tmp_path / "run").error()  # it returns to that row


def test_a_killed_worker_loses_nothing(start, tmp_path):
    """What was learned since the last checkpoint is saved when an environment's process dies."""
    argv = [*TINY, "--env-id", "running:Slow-v0", "--env-workers", "--num-envs", 2, "--steps", 400]
    run = start(*argv, "--run", tmp_path / "run", "--save-every", 1000)
    until(lambda: count_lines(tmp_path / "run") > 1)
    parent = psutil.Process(int(run.path(".pid").read_text()))
    workers = [p for p in parent.children(recursive=True) if "multiprocessing" in str(p.cmdline())]
    max(workers, key=lambda process: process.create_time()).kill()
    assert "was killed" in run.error()
    assert checkpoint.load(tmp_path / "run")["step"] >= 20


def test_nan_loss_keeps_the_checkpoint(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Long-v0", "--run", tmp_path / "run"]
    start(*argv, "--steps", 60).done()
    state = checkpoint.load(tmp_path / "run")
    del state["header"]
    state["agent"]["world_model"]["decoder.heads.0.bias"][0] = torch.nan
    checkpoint.save(tmp_path / "run", **state)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    message = start(*argv, "--steps", 90).error()
    assert "loss_model_reco" in message and "not finite at update" in message
    assert "loss_model_reward" not in message, "only what is broken may be named"
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_huge_numbers_keep_the_agent_finite(start, tmp_path):
    start(*TINY, "--env-id", "running:Huge-v0", "--steps", 60, "--run", tmp_path / "run").done()
    agent = checkpoint.load(tmp_path / "run")["agent"]
    assert all(x.isfinite().all() for _, x in leaves(agent) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "another script", "no args"])
def test_bad_checkpoints(start, tmp_path, damage):
    folder = tmp_path / "run"
    argv = [*TINY, "--env-id", "running:Long-v0", "--run", folder, "--steps", 30]
    start(*argv).done()
    file, args = folder / "checkpoint.pt", folder / "args.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, file)
    elif damage == "another script":
        args.write_text(args.read_text().replace("dreamer_v3", "pilco"))
        state = checkpoint.load(folder)
        checkpoint.save(folder, **{k: v for k, v in state.items() if k != "header"})
    else:  # nor a checkpoint that has the flags
        args.unlink()
        file.write_bytes(b"")
    words = {"truncated": "damaged", "foreign": "not a checkpoint", "another script": "pilco"}
    for command in (argv, ["--eval", folder]) if args.exists() else (argv,):
        assert words.get(damage, "run folder") in start(*command).error()


def test_what_changed_under_a_run_is_reported(start, tmp_path):
    """New observations or lost rows: one-line errors; --steps below the saved: no error."""
    folder = tmp_path / "run"
    argv = [*TINY, "--run", folder, "--env-id", "running:Long-v0"]
    start(*argv, "--steps", 60).done()
    start(*argv, "--steps", 40).done()
    assert checkpoint.load(folder)["step"] == 60
    message = start(*argv, "--steps", 80, prepare="wider_observation").error()
    assert "'observation': [2]" in message and "'observation': [3]" in message
    shutil.rmtree(folder / "replay")
    for _ in range(2):  # the second must not mistake the first one's new files for rows
        assert "replay/ lacks" in start(*argv, "--steps", 80).error()


def test_a_replay_that_does_not_fit(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Long-v0", "--run", tmp_path / "run"]
    message = start(*argv, "--steps", 60, prepare="full_disk").error()
    assert "GB" in message and "--replay-size" in message and not any(tmp_path.glob("run"))
    start(*argv, "--steps", 60).done()
    start(*argv, "--steps", 100, "--fresh", prepare="full_disk").error()
    assert checkpoint.load(tmp_path / "run")["step"] == 60  # not deleted for one that cannot start


def test_a_disk_that_fills_up(start, tmp_path):
    argv = [*TINY, "--env-id", "running:Long-v0", "--run", tmp_path / "run", "--steps", 150]
    assert "disk full" in start(*argv, prepare="disk_fills_up").error()
    assert checkpoint.load(tmp_path / "run")["step"] == 60
    assert "resumes at step 60" in start(*argv).done()


def test_an_environment_that_raises(start, tmp_path):
    """It is saved before the row that failed, every time; once mended, it goes on from there.

    Bit for bit as if nothing had happened: no row is lost and none comes twice.
    """
    argv = [*TINY, "--env-id", "running:Fails-v0", "--steps", 110]
    whole, run = tmp_path / "whole", tmp_path / "run"
    first = start(*argv, "--run", whole, prepare="mended")
    for _ in range(2):  # the second one fails at the same row
        process = start(*argv, "--run", run)
        message = process.error()
        assert "OSError('the simulator is gone')" in message
        assert "at step 9 of environment 0 (episode 3)" in message
        traceback = process.text[: process.text.index("error: ")]
        assert "Traceback" in traceback and 'raise OSError("the simulator is gone")' in traceback
        assert "saved; the same command resumes" in process.text
        state = checkpoint.load(run)
        assert state["step"] == state["replay"]["total"] == 3 * 16 + 9  # row 9 of the episode
        assert state["updates"] > 0 and state["owed"] == 0
    assert f"resumes at step {state['step']}" in process.text
    rows = replay_rows(run, argv)
    assert rows["index"][:, 1].tolist() == list(range(1, 57))
    assert rows["is_first"].nonzero()[:, 0].tolist() == [15, 31, 47]  # row 0 is not in it
    assert "resumes at step 57" in start(*argv, "--run", run, prepare="mended").done()
    first.done()
    same_runs(whole, run, argv)


BREAKS = [*TINY, "--env-id", "running:Breaks-v0", "--obs", "vector", "--save-every", 1000]


def test_a_crash_joins_no_returns(inside, breaks, tmp_path):
    """A resumed episode goes on where it was, and its return is that of one episode."""
    assert (
        until_it_ends(inside, *BREAKS, "--steps", 147) == 6
    )  # before the rows 21 + 6, 42 + 6, ...
    rows = [row for row in lines_of(tmp_path / "run") if "episode/return" in row]
    assert [(row["step"], row["episode/return"]) for row in rows] == [
        (21 * k, 20.0) for k in range(1, 8)
    ]


def test_a_resume_joins_no_returns(inside, breaks, tmp_path):
    """Three steps now end the episode whose first five are replayed: it counts for nothing."""
    with pytest.raises(EnvError, match="at step 6 of environment 0 .episode 1"):
        inside(*BREAKS, "--steps", 43)
    assert checkpoint.load(tmp_path / "run")["returns"].item() == 5
    breaks.length = 3
    with pytest.warns(UserWarning, match="not deterministic"):
        inside(*BREAKS, "--steps", 43)
    rows = [row for row in lines_of(tmp_path / "run") if "episode/return" in row]
    returns = [(row["step"], row["episode/return"]) for row in rows]
    assert returns == [(21, 20.0), *((27 + 4 * k, 3.0) for k in range(1, 5))]


def test_an_evaluation_that_raises(inside, breaks, monkeypatch, tmp_path, capsys):
    """The run is saved, and its command tries the evaluation again; so for --eval."""
    monkeypatch.setattr(common.run, "score", score)
    breaks.bad = staticmethod(lambda episode: episode > 2)
    with pytest.raises(EnvError, match="at step 6"):
        inside(*BREAKS, "--steps", 42)
    text = capsys.readouterr()
    assert "saved; the same command resumes, and tries again what failed" in text.out
    assert 'raise OSError("the simulator is gone")' in text.err
    before = lines_of(tmp_path / "run")
    assert checkpoint.load(tmp_path / "run")["step"] == before[-1]["step"] == 42
    breaks.bad = staticmethod(lambda episode: False)
    inside(*BREAKS, "--steps", 42)
    evaluation = {"step": 42, "eval/return": 20.0, "eval/return_std": 0.0}
    assert lines_of(tmp_path / "run") == [*before, evaluation]
    breaks.bad = staticmethod(lambda episode: True)
    with pytest.raises(EnvError, match="at step 6"):
        dreamer_v3.main(["--eval", str(tmp_path / "run")])


def test_an_environment_that_exits_or_cannot_be_closed(inside, monkeypatch, tmp_path):
    """sys.exit in step() is an error of the environment; one of close() costs nothing."""
    argv = [*TINY, "--env-id", "running:Long-v0", "--steps", 30, "--save-every", 1000]
    monkeypatch.setattr(running.Long, "close", lambda _: 1 / 0)
    with pytest.warns(UserWarning, match="running:Long-v0 cannot be closed: ZeroDivisionError"):
        inside(*argv)
    monkeypatch.setattr(running.Long, "step", lambda *_: sys.exit(3))
    with pytest.warns(UserWarning, match="cannot be closed"), pytest.raises(EnvError, match="Exit"):
        inside(*argv[:-4], "--steps", 40, "--save-every", 1000)
    assert checkpoint.load(tmp_path / "run")["step"] == 30


# --- evaluation without a film ------------------------------------------------------------------


def film_of(monkeypatch, tmp_path, frame=Envs.frame, write_video=common.run.write_video):
    """Evaluate an agent on Both-v0, and film it: whether a video was written, after the score."""
    args = parse_args([*TINY, "--env-id", "running:Both-v0", "--obs", "vector"])
    envs = make_envs(args, num_envs=1)
    envs.close()
    written, agent = [], Agent(envs.spec, args)
    monkeypatch.setattr(Envs, "frame", frame)
    write = lambda *a: written.append(0) or write_video(*a)  # noqa: E731
    monkeypatch.setattr(common.run, "write_video", write)
    assert score(agent) == {"eval/return": 210.0, "eval/return_std": 0.0}
    film(agent, tmp_path, "eval")
    return len(written) == 1


def test_frames_that_fail_cost_no_score(monkeypatch, tmp_path, capsys):
    """The film is what there was before; without any there is none."""
    for good in (3, 0):
        frames = itertools.count()

        def frame(envs, frames=frames, good=good):
            if next(frames) >= good:
                raise RunError("Both-v0 cannot be rendered: out of film")
            return np.zeros((256, 256, 3), np.uint8)

        assert film_of(monkeypatch, tmp_path, frame) == (good > 0)
        assert next(frames) == good + 1, "the others are not tried"
        text = capsys.readouterr().out
        assert text.count(f"the video ends after {good} frames: Both-v0 cannot be rendered") == 1
        assert "return 210.0 +- 0.0" in text and ("no video" in text) == (good == 0)
    import imageio_ffmpeg

    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "eval.mp4"))[0] == 3


def test_rendering_that_ends_the_process_costs_no_score(monkeypatch, tmp_path, capsys):
    def frame(envs):
        raise SystemExit(3)

    assert not film_of(monkeypatch, tmp_path, frame), "it is logged, and no film is written"
    assert "return 210.0 +- 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RunError("disk full: eval.mp4"), ValueError("odd frames")])
def test_a_film_that_fails_costs_no_score(monkeypatch, tmp_path, capsys, error):
    def full(*_):
        raise error

    assert film_of(monkeypatch, tmp_path, write_video=full), "logged before the film"
    text = capsys.readouterr().out
    assert text.index("return 210.0 +- 0.0") < text.index(f"no video: {error}")
