"""Run scripts as processes, for test_run.py and the like: environments, fixtures, comparisons."""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from dummy_envs import Base, Nested
from gymnasium import spaces

import common.run
from common import checkpoint
from common.envs import example_rows, make_envs
from common.replay import make_replay
from dreamer_v3 import Agent, parse_args

REPO = Path(__file__).resolve().parents[1]
RANKS = REPO / "tools" / "ranks.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
    "SDL_VIDEODRIVER": "dummy",
}


# --- environments -------------------------------------------------------------------------------


class Long(Base):
    """Twenty steps, each of which takes `slow` seconds."""

    length = 20

    def __init__(self, slow=0.0):
        self.slow = slow

    def step(self, action):
        time.sleep(self.slow)
        return super().step(action)


class Doors(Base):
    """Opens one door after the other: observes its number, two more choices and a vector."""

    length = 20
    observation_space = spaces.Dict(
        {
            "door": spaces.Discrete(5, start=2),
            "keys": spaces.MultiDiscrete([2, 3]),
            "place": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        }
    )

    def observe(self):
        keys = np.array([self.count % 2, self.count % 3])
        return {"door": 2 + self.count % 5, "keys": keys, "place": super().observe()}


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


class Fails(Walk):
    """Raises at step 9 of episode 3 of environment 0 (with --seed 0), until it is mended."""

    mended = False
    bad_seed = int(np.random.SeedSequence(0, spawn_key=(0, 3)).generate_state(1)[0]) >> 1

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        return super().reset(seed=seed)

    def step(self, action):
        if self.seed == self.bad_seed and self.count == 8 and not self.mended:
            raise OSError("the simulator is gone")
        return super().step(action)


class Breaks(Walk):
    """Reward 1 for 20 steps; raises at step 6 of the `bad` episodes, counted in this process."""

    length, episodes = 20, 0
    bad = staticmethod(lambda episode: episode % 2 == 0)

    def reset(self, *, seed=None, options=None):
        type(self).episodes += 1
        return super().reset(seed=seed)

    def step(self, action):
        if self.count == 5 and self.bad(type(self).episodes):
            raise OSError("the simulator is gone")
        obs, _, *ends = super().step(action)
        return obs, 1.0, *ends


class Wanders(Walk):
    """Changes the working directory."""

    def reset(self, *, seed=None, options=None):
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")
        return super().reset(seed=seed)


class Huge(Long):
    """Rewards and observations beyond the bins of the two-hot code."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1e30, *rest

    def observe(self):
        return np.array([1e30, -1e38])


def short_cartpole():
    """A task of DM Control whose episodes end after 20 steps."""
    import shimmy  # noqa: F401  registers dm_control/...

    env = gymnasium.make("dm_control/cartpole-swingup-v0", disable_env_checker=True)
    env.unwrapped._env._step_limit = 20
    return env


for cls in (Long, Doors, Both, Walk, Pixels, Spoiled, Fails, Breaks, Wanders, Huge):
    gymnasium.register(f"{cls.__name__}-v0", f"running:{cls.__name__}")
gymnasium.register("Slow-v0", "running:Long", kwargs={"slow": 0.02})
gymnasium.register("ShortCartpole-v0", "running:short_cartpole")
PENDULUM = "gymnasium.envs.classic_control:PendulumEnv"
gymnasium.register("ShortPendulum-v0", PENDULUM, max_episode_steps=40)


# --- sub-processes ------------------------------------------------------------------------------

# Imports take longer than most of these runs, so one process imports, then forks once for each run;
# the fork executes a program as "__main__" and writes down its exit code.
NURSERY = """
import json, os, signal, sys, types
import matplotlib.figure, imageio_ffmpeg, PIL.Image, running
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leave no zombies
for line in sys.stdin:
    name, program, prepare, argv, environment = json.loads(line)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            out = os.open(name + ".out", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = [program, *argv]
            os.environ.update(environment)
            getattr(running, prepare)()
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            main.__file__ = program
            exec(compile(open(program).read(), program, "exec"), main.__dict__)
            sys.exit()
        for ending, text in ("pid", lambda: child), ("rc", lambda: os.waitpid(child, 0)[1]):
            value = str(text())
            with open(name + ".part", "w") as file:
                file.write(value)
            os.rename(name + ".part", name + "." + ending)
        os._exit(0)
"""


def no_pictures():
    """matplotlib would take half of the time of a short run."""
    common.run.plot_curve = lambda folder, title: folder / "learning_curve.png"


def wider_observation():
    no_pictures()
    Long.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    Long.observe = lambda self: np.zeros(3)


def all_pictures():
    """The script as it is."""


def mended():
    no_pictures()
    Fails.mended = True


def full_disk():
    no_pictures()
    usage = shutil.disk_usage("/")._replace(free=1000)
    shutil.disk_usage = lambda _: usage


def disk_fills_up():
    """No space for the third checkpoint; the first is written at the start."""
    no_pictures()
    save, calls = torch.save, itertools.count()

    def fail(state, file):
        if next(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(state, file)

    torch.save = fail


@pytest.fixture(scope="session")
def nursery():
    command = [sys.executable, "-c", NURSERY]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=ENVIRONMENT, cwd=REPO, text=True)
    yield process
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def start(request, nursery, tmp_path):
    """start(argv...) -> a Process of the test module's SCRIPT; killed at the end of the test."""
    processes = []

    def launch(*argv, program=request.module.SCRIPT, prepare="no_pictures", **environment):
        job = [program, prepare, argv, environment]
        processes.append(Process(nursery, tmp_path / f"process{len(processes)}", *job))
        return processes[-1]

    yield launch
    for process in processes:
        if process.code is None and not process.path(".rc").exists():
            process.signal(signal.SIGKILL)


@pytest.fixture
def two(request, start):
    """two(argv...): both ranks of a run of SCRIPT, as torchrun would start them."""

    def launch(*argv, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        ranks = [dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2") for i in range(2)]
        argv = [request.module.SCRIPT, *argv]
        return [start(*argv, program=RANKS, **options, **rank) for rank in ranks]

    return launch


@pytest.fixture
def read_only(monkeypatch):
    """read_only(folder): as on a read-only disk, which stops even root."""

    def protect(folder):
        def guard(owner, name, refuses):
            call = getattr(owner, name)

            def guarded(path, *args, **kwargs):
                below = isinstance(path, (str, Path)) and str(path).startswith(str(folder))
                if below and refuses(*args, **kwargs):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                return call(path, *args, **kwargs)

            monkeypatch.setattr(owner, name, guarded)

        for owner in (io, builtins):
            guard(owner, "open", lambda mode="r", *_, **__: set(mode) & set("wax+"))
        guard(os, "open", lambda flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR))
        for name in ("utime", "unlink", "truncate"):
            guard(os, name, lambda *_, **__: True)
        access = os.access
        refused = lambda path, mode: mode & os.W_OK and str(path).startswith(str(folder))  # noqa: E731
        monkeypatch.setattr(os, "access", lambda *a, **k: not refused(*a[:2]) and access(*a, **k))

    return protect


@pytest.fixture
def breaks(monkeypatch):
    """Breaks, whose episodes count from 0 again."""
    for name in ("length", "episodes", "bad"):
        monkeypatch.setattr(Breaks, name, Breaks.__dict__[name])
    return Breaks


@pytest.fixture
def inside(request, monkeypatch, tmp_path):
    """inside(argv...): main() in this process, without the evaluation and pictures at the end."""
    script = sys.modules[request.module.SCRIPT.stem]
    monkeypatch.setattr(common.run, "score", lambda _: {"eval/return_std": 0.0})
    monkeypatch.setattr(common.run, "film", lambda *_: None)
    monkeypatch.setattr(common.run, "plot_curve", lambda *_: None)
    return lambda *argv: script.main([str(a) for a in ("--run", tmp_path / "run", *argv)])


class Process:
    """A process of a script, forked by the nursery."""

    def __init__(self, nursery, name, program, prepare, argv, environment):
        self.name, self.code = name, None
        job = [str(name), str(program), prepare, [str(a) for a in argv], environment]
        nursery.stdin.write(json.dumps(job) + "\n")
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
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.text
        message = self.text[self.text.index(lines[0]) :]
        assert "Traceback" not in message, self.text  # an environment's may precede it
        return message


def until(check, seconds=120):
    limit = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.01)


def until_it_ends(inside, *argv):
    """Repeat the command until no environment fails; returns how often one did."""
    for failures in range(100):
        with contextlib.suppress(checkpoint.EnvError):
            inside(*argv)
            return failures


def content(folder):
    """{path: bytes} of all files in the folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def lines_of(folder):
    """The rows of metrics.jsonl without their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def resumes_exactly_on_two_ranks(two, tmp_path, flags):
    """A run to step 160 equals one to 80, then to 160. Returns the folder of the first."""
    for name, steps in (("whole", 160), ("split", 80), ("split", 160)):
        if (tmp_path / "split").exists():  # as if rank 1 was killed while it saved
            (tmp_path / "split" / "rank1-120-99.pt").write_bytes(b"half of a file")
        first, second = two("--run", tmp_path / name, *flags, "--steps", steps)
        text = first.done()
        assert "parameters in world_model" in text and "parameters" not in second.done()
    assert "resumes at step 80" in text
    whole, split = (lines_of(tmp_path / name) for name in ("whole", "split"))
    assert [row for row in whole if "updates" in row] == [row for row in split if "updates" in row]
    assert len(whole) > 8 and whole[-1]["step"] == 160 and "eval/return" in whole[-1]
    assert any("train/loss_actor" in row for row in whole if row["step"] > 80)
    for folder in (tmp_path / "split", tmp_path / "whole"):
        updates = checkpoint.load(folder)["updates"]
        assert [path.name for path in folder.glob("rank1-*.pt")] == [f"rank1-160-{updates}.pt"]
    ends = [sum((folder / rank / "replay/is_last").read_bytes()) for rank in (".", "rank1")]
    assert sum("episode/return" in row for row in whole) == sum(ends) and all(ends)  # one log
    heads = [(folder / rank / "replay/observation").read_bytes()[:32] for rank in (".", "rank1")]
    starts = {head[i : i + 16] for head in heads for i in (0, 16)}
    assert len(starts) == 4  # one for each environment, of four float32
    return folder


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
    """All rows of a run's replay as `draw` gives them: {key: values}, and their `index`, sorted."""
    args = parse_args([*map(str, argv), "--run", str(folder)])
    envs = make_envs(args)
    agent = Agent(envs.spec, args)
    example = agent.stored_rows(example_rows(agent.spec), agent.initial(1))[0]
    replay = make_replay(args, example, folder, online=True)
    envs.close()
    replay.load_state_dict(checkpoint.load(folder)["replay"])
    replay.queue.clear()
    batch, rows = replay.draw(40 * len(replay)), {}
    for i, length in itertools.product(range(len(batch)), [replay.length]):
        for t in range(1, length):  # `draw` sets is_first in row 0 of a window
            rows[tuple(batch["index"][i, t].tolist())] = (i, t)
    count = replay.num_envs * (replay.total - replay.oldest - 1)
    assert len(rows) == count, "every row except the oldest ones must be drawn"
    keys = sorted(set(batch.keys()) - {"index"})
    places = torch.tensor([rows[key] for key in sorted(rows)])
    values = {key: batch[key][places[:, 0], places[:, 1]] for key in keys}
    return values | {"index": torch.tensor(sorted(rows))}


def same_runs(a, b, argv):
    """Bit for bit: metrics, parameters, optimizer, counters, generators, envs, replay.

    The line of an evaluation before the run was extended does not count.
    """
    first, second = (
        [row for row in lines[:-1] if "eval/return_std" not in row] + lines[-1:]
        for lines in (lines_of(a), lines_of(b))
    )
    assert first == second
    first, second = checkpoint.load(a), checkpoint.load(b)
    for state in (first, second):
        state["logger"] = {k: v for k, v in state["logger"].items() if k not in ("wall", "bytes")}
        del state["replay"]["current"]  # which of two slots is in use depends on the saves
        del state["saves"]
        del state["agent"]["args"]["run"]
    assert first["updates"] >= 20
    same_leaves(first, second)
    same_leaves(replay_rows(a, argv), replay_rows(b, argv))
