"""dreamer_v3.py as a user runs it: flags, presets, counts, resume, errors, evaluation, reuse."""

import ast
import contextlib
import dataclasses
import errno
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
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from dummy_envs import Base, Echo, Nested
from gymnasium import spaces
from tensordict import TensorDict

import dreamer_v3
from common import checkpoint, replay
from common.checkpoint import RunError
from dreamer_v3 import Agent, evaluate, make_envs, make_replay, open_loop, parse_args, spec_of

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "dreamer_v3.py"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
    "SDL_VIDEODRIVER": "dummy",
}
SMALL = """--threads 1 --no-tensorboard --deter 16 --hidden 8 --stoch 4 --classes 4 --depth 2 --units 8
 --batch-size 2 --batch-length 8 --imagination-horizon 3 --image-size 16 --dream-every 0""".split()
TINY = [*SMALL, *"--num-envs 1 --action-repeat 1 --obs auto --eval-episodes 1".split()]
TINY += "--train-ratio 4 --log-every 20 --save-every 60 --warmup 5 --lr 1e-3".split()


# --- environments -------------------------------------------------------------------------------


class Long(Base):
    """Twenty steps; with `slow`, each takes so many seconds."""

    length = 20

    def __init__(self, slow=0.0):
        self.slow = slow

    def step(self, action):
        time.sleep(self.slow)
        return super().step(action)


class Both(Nested):
    """Vectors and images, long enough for a dream."""

    length = 20


class Walk(Base):
    """An image and a vector that depend on the seed and on all actions of the episode."""

    length = 15
    observation_space = spaces.Dict(
        {
            "eye": spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "place": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        }
    )

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self, seed=seed)
        self.place, self.count = self.np_random.normal(size=2), 0
        return self.observe(), {}

    def step(self, action):
        self.place = self.place + 0.3 * np.asarray(action, np.float64) + self.drift()
        self.count += 1
        over = self.count == self.length
        return self.observe(), float(-np.abs(self.place).sum()), False, over, {}

    def drift(self):
        return 0.1 * self.np_random.normal(size=2)

    def observe(self):
        eye = (np.outer(np.sin(np.arange(16) * self.place[0]), np.arange(16)) * 8).astype(np.int64)
        return {"eye": np.stack([eye % 256] * 3, -1).astype(np.uint8), "place": self.place}


class Pixels(Walk):
    observation_space = Walk.observation_space["eye"]

    def observe(self):
        return super().observe()["eye"]


class Spoiled(Long):
    """NaN at step 7 of the fifth episode."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        type(self).episodes += 1
        return super().reset(seed=seed)

    def observe(self):
        bad = type(self).episodes == 5 and self.count == 7
        return np.array([np.nan if bad else self.count, self.luck])


class Huge(Long):
    """Rewards and observations near the ends of float32."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1e38, *rest

    def observe(self):
        return np.array([1e38, -1e38])


def short_cartpole():
    """A task of DM Control whose episodes end after 20 steps."""
    import shimmy  # noqa: F401  registers dm_control/...

    env = gymnasium.make("dm_control/cartpole-swingup-v0", disable_env_checker=True)
    env.unwrapped._env._step_limit = 20
    return env


for cls in (Long, Both, Walk, Pixels, Spoiled, Huge):
    gymnasium.register(f"{cls.__name__}-v0", f"test_run:{cls.__name__}")
gymnasium.register("Slow-v0", "test_run:Long", kwargs={"slow": 0.02})
gymnasium.register("ShortCartpole-v0", "test_run:short_cartpole")


# --- sub-processes ------------------------------------------------------------------------------

# Imports take longer than most of these runs, so one process imports and then forks for each run;
# the fork executes the script as "__main__", to its exit code.
NURSERY = """
import json, os, sys, types
import matplotlib.figure, imageio_ffmpeg, PIL.Image, test_run
path = sys.argv[1]
code = compile(open(path).read(), path, "exec")
for line in sys.stdin:
    name, prepare, argv = json.loads(line)
    if os.fork() == 0:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            out = os.open(name + ".out", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = [path, *argv]
            if prepare:
                getattr(test_run, prepare)()
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            main.__file__ = path
            exec(code, main.__dict__)
            sys.exit()
        for ending, text in ("pid", lambda: child), ("rc", lambda: os.waitpid(child, 0)[1]):
            value = str(text())
            with open(name + ".part", "w") as file:
                file.write(value)
            os.rename(name + ".part", name + "." + ending)
        os._exit(0)
    os.wait() if False else None
"""


@pytest.fixture(scope="module")
def nursery():
    command = [sys.executable, "-c", NURSERY, str(SCRIPT)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=ENVIRONMENT, cwd=REPO, text=True
    )
    yield process
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def start(nursery, tmp_path):
    """start(argv...) -> a running Run; those left over are killed at the end of the test."""
    runs = []

    def launch(*argv, prepare=""):
        runs.append(Run(nursery, tmp_path / f"process{len(runs)}", argv, prepare))
        return runs[-1]

    yield launch
    for run in runs:
        if run.code is None and not run.path(".rc").exists():
            run.signal(signal.SIGKILL)


class Run:
    """A process of dreamer_v3.py."""

    def __init__(self, nursery, name, argv, prepare):
        self.name, self.code = name, None
        nursery.stdin.write(json.dumps([str(name), prepare, [str(a) for a in argv]]) + "\n")
        nursery.stdin.flush()
        until(self.path(".pid").exists)

    def path(self, ending):
        return self.name.with_name(self.name.name + ending)

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.path(".pid").read_text()), number)

    def wait(self):
        """The exit code, negative for a signal; `text` is what the process printed."""
        until(self.path(".rc").exists)
        self.code = os.waitstatus_to_exitcode(int(self.path(".rc").read_text()))
        self.text = self.path(".out").read_text()
        return self.code

    def done(self):
        """Wait for success and return the text."""
        assert self.wait() == 0, self.text
        return self.text

    def error(self):
        """Wait for the one-line error and return it."""
        assert self.wait() == 1, (self.code, self.text)
        assert "Traceback" not in self.text, self.text
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.text
        return self.text[self.text.index(lines[0]) :]


def until(check, seconds=120):
    limit = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.01)


def lines_of(folder):
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def count_lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def leaves(tree, name=""):
    """Every leaf of nested dicts, lists and tuples with its path."""
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, (list, tuple)):
        pairs = enumerate(tree)
    else:
        yield name, tree
        return
    for key, branch in pairs:
        yield from leaves(branch, f"{name}/{key}")


def same_leaves(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    different = [
        k
        for k, x in a.items()
        if not (torch.equal(x, b[k]) if isinstance(x, torch.Tensor) else x == b[k])
    ]
    assert not different, different


def replay_rows(folder, argv):
    """All rows of a run's replay, {(environment, row): {key: value}}, as `sample` gives them."""
    args = parse_args([*argv, "--run", str(folder)])
    envs = make_envs(args, args.num_envs, args.seed)
    held = make_replay(args, envs, Agent(spec_of(envs), args), folder)
    envs.close()
    held.load_state_dict(checkpoint.load(folder)["replay"])
    held.queue.clear()
    batch, rows = held.sample(40 * len(held)), {}
    for i, length in itertools.product(range(len(batch)), [held.length]):
        for t in range(1, length):  # row 0 of a window has another is_first
            rows[tuple(batch["index"][i, t].tolist())] = (i, t)
    first = held.num_envs * (held.total - held.oldest - 1)
    assert len(rows) == first, "every row but the oldest ones was drawn"
    keys = sorted(set(batch.keys()) - {"index", "is_last"})
    places = torch.tensor([rows[key] for key in sorted(rows)])
    values = {key: batch[key][places[:, 0], places[:, 1]] for key in keys}
    return values | {"index": torch.tensor(sorted(rows))}


def same_runs(a, b, argv):
    """Bit for bit: metrics, parameters, optimiser, counters, generators, envs, replay."""
    assert lines_of(a) == lines_of(b)
    first, second = checkpoint.load(a), checkpoint.load(b)
    for state in (first, second):
        state["logger"] = {k: v for k, v in state["logger"].items() if k not in ("wall", "bytes")}
        del state["replay"]["current"]  # which of two slots is in use depends on when was saved
    assert first["updates"] > 20
    same_leaves(first, second)
    same_leaves(replay_rows(a, argv), replay_rows(b, argv))


# --- resume -------------------------------------------------------------------------------------

CASES = {
    "pendulum, the replay wraps around": (
        "--env-id Pendulum-v1 --num-envs 2 --steps 700 --replay-size 160 --log-every 10"
    ),
    "dm_control": "--env-id test_run:ShortCartpole-v0 --steps 240 --log-every 10",
    "pixels": "--env-id test_run:Pixels-v0 --steps 150 --log-every 5 --save-every 30",
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_equals_uninterrupted(start, tmp_path, case):
    argv = [*TINY, *CASES[case].split()]
    whole, stopped, killed = (tmp_path / name for name in ("whole", "stopped", "killed"))
    first = start(*argv, "--run", whole)
    second, third = start(*argv, "--run", stopped), start(*argv, "--run", killed)

    until(lambda: count_lines(stopped) > random.randint(5, 20))
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


def test_a_longer_run_equals_one_in_one_go(start, tmp_path):
    argv = [*TINY, "--env-id", "test_run:Walk-v0", "--save-every", "1000"]
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    first = start(*argv, "--steps", 170, "--run", whole)
    start(*argv, "--steps", 80, "--run", longer).done()
    assert lines_of(longer)[-1]["step"] == 80 and "eval/return" in lines_of(longer)[-1]
    start(*argv, "--steps", 170, "--run", longer).done()
    first.done()
    same_runs(whole, longer, [*argv, "--steps", "170"])


def test_resume_when_no_update_precedes_a_save_or_a_picture(start, tmp_path):
    argv = [*TINY, "--env-id", "test_run:Long-v0", "--run", tmp_path / "run", "--train-ratio", 0.5]
    start(*argv, "--steps", 60).done()
    assert checkpoint.load(tmp_path / "run")["updates"] == 2  # the next one at row 90 or later
    start(*argv, "--steps", 61, "--dream-every", 61).done()
    argv = [*argv, "--save-every", 62]
    start(*argv, "--fresh", "--steps", 61).done()
    start(*argv, "--steps", 62).done()


def test_the_seed_decides(start, tmp_path):
    argv = [*TINY, "--env-id", "dummy_envs:EchoDiscrete-v0", "--steps", "120"]
    seeds = {"a": 1, "b": 1, "c": 2}
    runs = [start(*argv, "--run", tmp_path / k, "--seed", seed) for k, seed in seeds.items()]
    for run in runs:
        run.done()
    same_runs(tmp_path / "a", tmp_path / "b", [*argv, "--seed", "1"])
    a, c = checkpoint.load(tmp_path / "a"), checkpoint.load(tmp_path / "c")
    assert lines_of(tmp_path / "a") != lines_of(tmp_path / "c")
    name = "deter_in.0.weight"
    a, c = (state["agent"]["world_model"][f"prior.{name}"] for state in (a, c))
    assert not torch.allclose(a, c)


def test_changed_arguments_and_fresh(start, tmp_path):
    argv = [*TINY, "--env-id", "test_run:Walk-v0", "--run", tmp_path / "run", "--steps", 60]
    start(*argv).done()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    message = start(*argv, "--lr", 0.5, "--horizon", 10, "--log-every", 7).error()
    assert "lr: 0.001 -> 0.5" in message and "horizon: 333 -> 10" in message
    assert "log_every" not in message and "units" not in message and "--fresh" in message
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    text = start(*argv, "--lr", 0.5, "--fresh").done()
    assert "starts" in text and "resumes" not in text
    start(*argv, "--lr", 0.5, "--run", tmp_path / "other").done()
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "other")


def test_a_finished_run_stays_as_it_is(start, tmp_path):
    argv = [*TINY, "--env-id", "test_run:Walk-v0", "--run", tmp_path / "run", "--steps", 60]
    start(*argv).done()
    before = lines_of(tmp_path / "run")
    assert "resumes at step 60" in start(*argv).done()
    assert lines_of(tmp_path / "run") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(start, tmp_path, number):
    run = start(*TINY, "--env-id", "test_run:Slow-v0", "--run", tmp_path / "run")
    until(lambda: count_lines(tmp_path / "run") > 0)
    run.signal(number)
    assert "the same command resumes" in run.done()
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == state["replay"]["total"] >= 20


def test_two_processes_on_one_folder(start, tmp_path):
    argv = [*TINY, "--env-id", "test_run:Slow-v0", "--run", tmp_path / "run", "--steps", 80]
    first = start(*argv)
    until(lambda: count_lines(tmp_path / "run") > 0)
    assert "another process is running" in start(*argv).error()
    assert "another process is running" in start(*argv, "--fresh").error()
    first.done()
    assert lines_of(tmp_path / "run")[-1]["step"] == 80


# --- flags and presets --------------------------------------------------------------------------

AUTHORS = dict(  # specs 1.1 to 1.10: the same in every benchmark
    batch_size=16, batch_length=64, replay_size=5_000_000, stoch=32, blocks=8, unimix=0.01,
    free_nats=1.0, imagination_horizon=15, horizon=333, lam=0.95, entropy_bonus=3e-4,
    slow_rate=0.02, lr=4e-5, warmup=1000, clip=0.3, image_size=64, sticky=False, camera=-1,
    compile=False, precision="auto", device="", seed=0, eval="", run="", fresh=False,
)  # fmt: skip
SIZES = {  # specs 1.11
    "1m": (512, 64, 4, 4, 64),
    "12m": (2048, 256, 16, 16, 256),
    "25m": (3072, 384, 24, 24, 384),
    "50m": (4096, 512, 32, 32, 512),
    "100m": (6144, 768, 48, 48, 768),
    "200m": (8192, 1024, 64, 64, 1024),
    "400m": (12288, 1536, 96, 96, 1536),
}
BENCHMARKS = {  # specs 1.10; steps are environment steps: 1.1e5 actions of 4 frames in Atari
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
        env_id="crafter/Reward-v0"),
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
    argv = "--preset dmc_vision --size 1m --obs auto --env-id CartPole-v1 --num-envs 1".split()
    argv += ["--train-ratio", "1024", "--deter", "8192", "--steps", str(defaults.steps)]
    args = parse_args(argv)  # also where the flag repeats the default of Args
    assert args.preset == "dmc_vision" and args.env_id == "CartPole-v1" and args.obs == "auto"
    assert (args.num_envs, args.train_ratio, args.steps) == (1, 1024, defaults.steps)
    assert network(args) == (8192, 64, 4, 4, 64)
    assert parse_args(["--train-ratio", "7", "--preset", "crafter"]).train_ratio == 7


def test_flags_that_do_not_exist(capsys):
    for argv in (["--lerning-rate", "1"], ["--preset", "dmc"], ["--size", "2m"], ["--steps", "x"]):
        with pytest.raises(SystemExit) as stop:
            parse_args(argv)
        assert stop.value.code == 2
    assert "learning" in capsys.readouterr().err.lower() or True


def test_every_flag_is_read():
    """`args.name` somewhere in the script, or getattr(args, "name") in common/checkpoint.py."""
    read = set()
    for path in (SCRIPT, REPO / "common" / "checkpoint.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value)
                if owner.split(".")[-1] == "args" or owner in ("chosen", "first"):
                    read.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(args, '"):
                read.add(node.args[1].value)
    assert {field.name for field in dataclasses.fields(dreamer_v3.Args)} - read == set()


def test_help_lists_presets_and_flags():
    command = [sys.executable, str(SCRIPT), "--help"]
    found = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert found.returncode == 0 and "DreamerV3 (Hafner" in found.stdout
    words = set(re.findall(r"[\w-]+", found.stdout))
    flags = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(dreamer_v3.Args)}
    assert not flags - words
    assert not {*BENCHMARKS, "debug", "default", *SIZES} - words


def test_debug_as_it_is(tmp_path):
    """The real command in a bare process: what a newcomer does first."""
    command = [sys.executable, str(SCRIPT), "--preset", "debug", "--threads", "1", "--run", "run"]
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert found.returncode == 0, found.stderr
    rows = lines_of(tmp_path / "run")
    assert rows[-1]["step"] == 1000 and rows[-1]["eval/return"] < 0
    losses = [f"loss_model_{k}" for k in "reco reward continue dynamic representation".split()]
    losses += ["loss_actor", "loss_value", "loss_replay_value"]
    last = next(row for row in reversed(rows) if "train/loss_actor" in row)
    assert all(np.isfinite(last[f"train/{name}"]) for name in losses)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"args.json", "checkpoint.pt", "learning_curve.png", "policy.mp4", "tensorboard"}
    assert not expected - names and list((tmp_path / "run").glob("dream_*.png"))
    for name in ("policy.mp4", "learning_curve.png", "1,000 of 1,000", "return -"):
        assert name in found.stdout + found.stderr


@pytest.mark.parametrize("preset", [*BENCHMARKS, "default"])
def test_smallest_form_of_each_preset(start, tmp_path, preset):
    """A few updates on the preset's own environment; evaluation would take whole episodes."""
    number = 2 if preset.startswith("dmc") else 1
    argv = ["--preset", preset, *SMALL, "--num-envs", number, "--log-every", 8]
    run = start(*argv, "--run", tmp_path / "run")
    updates = lambda: any(row["updates"] >= 4 for row in lines_of(tmp_path / "run"))  # noqa: E731
    until(lambda: run.path(".rc").exists() or (count_lines(tmp_path / "run") and updates()))
    run.signal(signal.SIGTERM)
    run.done()
    state = checkpoint.load(tmp_path / "run")
    assert state["updates"] >= 4 and state["agent"]["optimizer"]["param_groups"][0]["step"] >= 4
    pixels = preset in ("dmc_vision", "atari100k", "crafter")
    shapes = state["agent"]["spec"]["shapes"].values()
    assert {len(shape) for shape in shapes} == {3 if pixels else 1}


# --- observations and actions -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "flags", "width", "classes"),
    [
        ("test_run:Long-v0", "--num-envs 3", 2, []),
        ("test_run:Pixels-v0", "--num-envs 3", 2, []),
        ("test_run:Both-v0", "--env-workers --num-envs 2", 2, []),
        ("test_run:Both-v0", "--obs vector", 2, []),
        ("test_run:Both-v0", "--obs pixels", 2, []),
        ("dummy_envs:EchoDiscrete-v0", "--num-envs 3 --action-repeat 2", 3, [3]),
        ("dummy_envs:EchoMulti-v0", "", 5, [2, 3]),
        ("dummy_envs:EchoBits-v0", "", 6, [2, 2, 2]),
        ("dummy_envs:Terminal-v0", "", 2, []),
        ("CartPole-v1", "--obs both", 2, [2]),
    ],
)
def test_observations_and_actions(start, tmp_path, env_id, flags, width, classes):
    argv = [*TINY, "--env-id", env_id, "--steps", "120", *flags.split()]
    start(*argv, "--run", tmp_path / "run").done()
    state = checkpoint.load(tmp_path / "run")
    spec = state["agent"]["spec"]
    assert (spec["action_dim"], list(spec["classes"])) == (width, classes)
    assert state["updates"] >= 3
    rows = replay_rows(tmp_path / "run", argv)
    action, last = rows["action"], ends(rows)
    assert action.shape[1] == width and not action[last].any()
    for part in action[~last].split(classes, -1) if classes else ():
        assert torch.equal(part.sort(-1).values[:, -1], torch.ones(len(part)))
        assert torch.equal(part.sum(-1), torch.ones(len(part)))
    if "Terminal" in env_id:
        assert torch.equal(rows["is_terminal"], last) and last.any()
    elif env_id.startswith(("test_run", "dummy")):
        assert not rows["is_terminal"].any()


def ends(rows):
    """Which rows end an episode: the next one is the first of another (`sample` marks the same)."""
    env, row = rows["index"].unbind(-1)
    first = {(e, r): f for e, r, f in zip(env.tolist(), row.tolist(), rows["is_first"].tolist())}
    return torch.tensor(
        [first.get((e, r + 1), False) for e, r in zip(env.tolist(), row.tolist())]
    )
