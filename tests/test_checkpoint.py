"""Run folders, atomic saves, resume, signals and clocks of common/checkpoint.py."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from common import checkpoint
from common.checkpoint import (
    Every,
    Ratio,
    RunError,
    Stop,
    load,
    open_run,
    prepare,
    restore,
    rng_state,
    save,
)

REPO = Path(__file__).resolve().parents[1]
# Forked processes start fast, since they need not import torch again.
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
forks = pytest.mark.skipif(FORK is None, reason="needs fork")


@dataclass
class Settings:
    env_id: str = "dm_control/walker-walk-v0"
    seed: int = 3
    lr: float = 4e-5
    steps: int = 100
    sizes: tuple = (1, 2)
    quality: str = ""
    run: str = ""
    fresh: bool = False
    eval: str = ""


def start(code, *argv):
    """Run `code` in another process with the repository on its path."""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=REPO, **pipes)


def test_threads_are_those_of_torch_and_of_numpy():
    before = torch.get_num_threads()
    with threadpool_limits(2):  # restores what it finds
        checkpoint.prepare(0, 1)
        pools = {pool["user_api"]: pool["num_threads"] for pool in threadpool_info()}
        torch.set_num_threads(before)
    assert pools["blas"] == 1 and pools.get("openmp", 1) == 1


def test_folder_name_first_start_and_resume(tmp_path):
    folder, state = open_run("dreamer", Settings(), root=tmp_path)
    assert folder == tmp_path / "dreamer" / "dm_control-walker-walk-v0" / "seed3"
    assert state is None
    save(folder, step=7, numbers=[1, 2.5, None, "x"])
    _, state = open_run("dreamer", Settings(), root=tmp_path)
    assert state["step"] == 7 and state["numbers"] == [1, 2.5, None, "x"]
    assert state["header"] == {"format": 1, "script": "dreamer", "torch": torch.__version__}


def test_run_names_the_folder_and_it_may_move(tmp_path):
    folder, _ = open_run("dreamer", Settings(run=str(tmp_path / "a")))
    assert folder == tmp_path / "a"
    save(folder, step=1)
    folder.rename(tmp_path / "b")
    _, state = open_run("dreamer", Settings(run=str(tmp_path / "b")))
    assert state["step"] == 1


def test_other_arguments_are_shown_with_both_ways_out(tmp_path):
    folder, _ = open_run("dreamer", Settings(), root=tmp_path)
    save(folder, step=1)
    with pytest.raises(RunError) as error:
        open_run("dreamer", Settings(lr=3e-4, steps=200), root=tmp_path, may_change=("steps",))
    text = str(error.value)
    assert "  lr: 4e-05 -> 0.0003 (saved -> asked)" in text
    assert "--fresh" in text and "--run OTHER_FOLDER" in text
    assert "steps" not in text and "sizes" not in text
    assert load(folder)["step"] == 1


def test_a_field_that_is_new_or_gone_is_a_difference(tmp_path):
    @dataclass
    class Newer(Settings):
        momentum: float = 0.9

    save(open_run("dreamer", Settings(), root=tmp_path)[0], step=1)
    with pytest.raises(RunError, match=r"momentum: \(none\) -> 0.9"):
        open_run("dreamer", Newer(), root=tmp_path)


def test_may_change_and_control_fields_resume(tmp_path):
    folder, _ = open_run("dreamer", Settings(), root=tmp_path)
    save(folder, step=1)
    changed = Settings(steps=200, eval="x")
    _, state = open_run("dreamer", changed, root=tmp_path, may_change=("steps",))
    assert state["step"] == 1
    assert '"steps": 200' in (folder / "args.json").read_text()


def test_what_auto_means_is_decided_once(tmp_path):
    """A run started without a GPU goes on as it began on a machine that has one."""
    for value, fresh in (("fast", False), ("full", False), ("full", True)):
        args = Settings(quality="auto", fresh=fresh)
        folder, _ = open_run("dreamer", args, decided={"quality": value}, root=tmp_path)
        save(folder, step=1)
        assert args.quality == ("full" if fresh else "fast")
    with pytest.raises(RunError, match="quality: full -> fast"):
        args = Settings(quality="fast")
        open_run("dreamer", args, decided={"quality": "full"}, root=tmp_path)


def test_fresh_starts_over_with_new_arguments(tmp_path):
    folder, _ = open_run("dreamer", Settings(), root=tmp_path)
    save(folder, step=1)
    (folder / "replay").mkdir()
    (folder / "replay" / "rows").write_text("x")
    _, state = open_run("dreamer", Settings(lr=1.0, fresh=True), root=tmp_path)
    assert state is None
    assert {path.name for path in folder.iterdir()} == {"args.json", "lock"}


@pytest.mark.parametrize("content", ["thesis.tex", "args.json"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path, content, fresh):
    (tmp_path / content).write_text('{"precious": 1}')
    with pytest.raises(RunError, match="neither empty nor a run folder"):
        open_run("dreamer", Settings(run=str(tmp_path), fresh=fresh))
    assert [path.name for path in tmp_path.iterdir()] == [content]


def test_fresh_does_not_delete_the_run_of_another_script(tmp_path):
    folder, _ = open_run("pilco", Settings(run=str(tmp_path / "a")))
    save(folder, step=1)
    with pytest.raises(RunError, match="run of pilco.py"):
        open_run("dreamer", Settings(run=str(folder), fresh=True))
    assert load(folder)["step"] == 1


def test_fresh_follows_no_links(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "rows").write_text("x")
    folder, _ = open_run("dreamer", Settings(run=str(tmp_path / "a")))
    (folder / "replay").symlink_to(scratch)
    open_run("dreamer", Settings(run=str(folder), fresh=True))
    assert (scratch / "rows").exists() and not (folder / "replay").exists()


def test_without_a_checkpoint_the_leftovers_go_and_the_notes_stay(tmp_path):
    folder, _ = open_run("dreamer", Settings(), root=tmp_path)
    for name in ("metrics.jsonl", "checkpoint.pt.tmp", "notes.txt"):
        (folder / name).write_text("x")
    _, state = open_run("dreamer", Settings(), root=tmp_path)
    assert state is None
    assert {path.name for path in folder.iterdir()} == {"args.json", "lock", "notes.txt"}


HOLD = """
import sys, time
from dataclasses import dataclass
from common.checkpoint import open_run
@dataclass
class Settings:
    run: str
    env_id: str = ""
    fresh: bool = False
open_run("dreamer", Settings(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_share_a_folder(tmp_path):
    other = start(HOLD, tmp_path / "a")
    assert other.stdout.readline() == "held\n"
    before = (tmp_path / "a" / "args.json").read_text()
    with pytest.raises(RunError, match="another process is running"):
        open_run("dreamer", Settings(run=str(tmp_path / "a"), fresh=True))
    assert (tmp_path / "a" / "args.json").read_text() == before
    other.kill()
    other.communicate()
    open_run("dreamer", Settings(run=str(tmp_path / "a"), fresh=True))
    open_run("dreamer", Settings(run=str(tmp_path / "a")))  # this process may open it again


def test_missing_checkpoint_names_the_folder(tmp_path):
    for path in (tmp_path, tmp_path / "checkpoint.pt", tmp_path / "nowhere"):
        with pytest.raises(RunError, match="no checkpoint in") as error:
            load(path)
        assert str(tmp_path) in str(error.value)


def damage(file, kind):
    data = bytearray(file.read_bytes())
    if kind == "bit":
        data[data.find(b"\x07" * 100) + 50] ^= 1
    elif kind == "empty":
        data = b""
    elif kind == "head":
        data = data[: len(data) // 2]
    elif kind == "tail":
        data = data[:-10]
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["bit", "empty", "head", "tail"])
def test_damaged_checkpoint(tmp_path, kind):
    save(tmp_path, weights=torch.full((1000,), 7, dtype=torch.uint8))
    damage(tmp_path / "checkpoint.pt", kind)
    with pytest.raises(RunError, match="damaged, or not a checkpoint"):
        load(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], 5, {"header": 3}, {"x": Evil()}])
def test_a_file_of_someone_else(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="or not a checkpoint of this project"):
        load(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(RunError, match="or not a checkpoint of this project"):
        load(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_checkpoint_of_another_script_or_format(tmp_path, monkeypatch):
    folder, _ = open_run("pilco", Settings(), root=tmp_path)
    save(folder, step=1)
    assert load(folder, "pilco")["step"] == load(folder)["step"] == 1
    with pytest.raises(RunError, match=r"written by pilco.py, not by dreamer.py"):
        load(folder, "dreamer")
    monkeypatch.setattr("common.checkpoint.FORMAT", 2)
    with pytest.raises(RunError, match="has format 1, this code reads format 2"):
        load(folder)


def test_modules_and_optimisers_are_saved_by_state_dict(tmp_path):
    net = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    adam.step()
    save(tmp_path, net=net, adam=adam, ratio=Ratio(0.5))
    state = load(tmp_path)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(state["net"])
    torch.testing.assert_close(other.weight, net.weight, rtol=0, atol=0)
    torch.optim.Adam(other.parameters()).load_state_dict(state["adam"])


def test_what_load_would_refuse_is_refused_by_save(tmp_path):
    save(tmp_path, step=1)
    with pytest.raises(TypeError, match="cannot hold .*numpy"):
        save(tmp_path, step=np.float64(2.0))
    assert load(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("covered", [False, True])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, covered):
    save(tmp_path, step=1)

    def full(state, file):
        file.write(b"PK half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if covered:
                raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save does
            raise

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunError, match="disk full.*last good one is kept"):
            save(tmp_path, step=2)
    assert load(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def save_for_ever(folder, steps):
    step = load(folder)["step"] if (folder / "checkpoint.pt").exists() else 0
    while True:
        step += 1
        save(folder, step=step, weights=torch.full((20_000,), float(step)))
        steps.value = step


@forks
def test_a_kill_at_any_time_leaves_a_valid_checkpoint(tmp_path):
    draw, torn = random.Random(0), 0
    steps = FORK.Value("l", 0, lock=False)
    for _ in range(40):
        process = FORK.Process(target=save_for_ever, args=(tmp_path, steps))
        before = steps.value
        process.start()
        while steps.value == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.02))
        process.kill()
        process.join()
        state = load(tmp_path)
        assert steps.value <= state["step"] <= steps.value + 1
        assert (state["weights"] == state["step"]).all()
        torn += (tmp_path / "checkpoint.pt.tmp").exists()
    assert torn > 0  # some kills did come in the middle of a save


def loop(folder, stubborn):
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    with Stop() as stop:
        step = 0
        (folder / "ready").touch()
        while not stop.requested or stubborn:
            step += 1
            time.sleep(0.01)
    save(folder, step=step)


def wait_for(check):
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end
        time.sleep(0.005)


@forks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number):
    process = FORK.Process(target=loop, args=(tmp_path, False))
    process.start()
    wait_for((tmp_path / "ready").exists)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 0 and load(tmp_path)["step"] >= 0
    said = (tmp_path / "stderr").read_text().strip()
    assert said.startswith("will save and stop") and said.count("\n") == 0


@forks
def test_the_second_interrupt_stops_at_once(tmp_path):
    process = FORK.Process(target=loop, args=(tmp_path, True))
    process.start()
    wait_for((tmp_path / "ready").exists)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "will save and stop" in (tmp_path / "stderr").read_text())
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1 and not (tmp_path / "checkpoint.pt").exists()


def test_handlers_are_put_back_and_threads_are_left_alone():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    seen = []

    def work():
        with Stop() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def draws():
    return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.randn(3).tolist()]


def test_generators_continue_after_a_round_trip(tmp_path):
    prepare(5)
    draws()  # leaves half a pair of normal numbers in python's and numpy's generator
    save(tmp_path, rng=rng_state())
    expected = [draws() for _ in range(3)]
    prepare(6)
    restore(load(tmp_path), {})
    assert [draws() for _ in range(3)] == expected


def test_a_seed_repeats():
    prepare(2**40 + 1)
    first = draws()
    prepare(2**40 + 1)
    assert draws() == first


def test_an_impatient_user_does_not_break_a_save(tmp_path, monkeypatch):
    """Two Ctrl-C in the middle of torch.save; a third one, after it, stops at once."""
    write = torch.save

    def interrupted(state, file):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        write(state, file)

    monkeypatch.setattr(torch, "save", interrupted)
    with Stop() as stop:
        save(tmp_path, step=7)
        assert stop.requested and load(tmp_path)["step"] == 7
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_every_keeps_to_multiples():
    every = Every(10)
    assert [n for n in (0, 4, 9, 13, 19, 20, 45, 46, 50) if every(n)] == [13, 20, 45, 50]
    assert not any(Every(0)(n) for n in range(5))


def test_every_resumes_also_with_another_period():
    for before in (10, 0):  # 0: it had been switched off
        old, new = Every(before), Every(25)
        old(33)
        new.load_state_dict(old.state_dict())
        assert [n for n in range(34, 80) if new(n)] == [50, 75]


def test_origins_of_a_run(tmp_path):
    """A resumed run names every commit and command that made it, each once."""
    for argv in (["a.py"], ["a.py", "--steps", "9"], ["a.py", "--steps", "9"]):
        sys.argv, before = argv, sys.argv
        folder, _ = open_run("dreamer", Settings(), root=tmp_path)
        sys.argv = before
        save(folder, step=1)
    origins = json.loads((folder / "args.json").read_text())["origin"]
    assert [origin["command"] for origin in origins] == ["python a.py", "python a.py --steps 9"]
    assert all(len(origin["commit"]) >= 7 and origin["hardware"] for origin in origins)


def test_a_full_disk_and_other_errors_of_a_run():
    """One line for what the user can mend, a traceback for the rest."""
    for error, text in (
        (OSError(errno.ENOSPC, "No space left"), "disk full"),
        (KeyboardInterrupt(), "stopped"),
        (RunError("--lr"), "error: --lr"),
    ):
        with pytest.raises(SystemExit, match=text):
            checkpoint.run(lambda error=error: (_ for _ in ()).throw(error))
    with pytest.raises(PermissionError):
        checkpoint.run(lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))


def test_ratio_counts_by_hand():
    assert [Ratio(1)(0), Ratio(0)(0), Ratio(0.1)(500)] == [1, 0, 1]
    one = Ratio(1)  # 16 environments: 16 steps at a time
    assert [one(n) for n in (1024, 1040, 1056, 1072)] == [1, 16, 16, 16]
    quarter = Ratio(0.25)
    assert [quarter(n) for n in range(9)] == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    carried = Ratio(0.3)  # by 16: 4.8, 9.6 and 14.4 in all
    assert [carried(n) for n in (0, 16, 32, 48)] == [1, 4, 5, 5]


@pytest.mark.parametrize("ratio", [0.5, 1 / 3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("stride", [1, 4, 16])
def test_ratio_does_not_drift_and_resumes(ratio, stride):
    counter, total = Ratio(ratio), 0
    for step in range(0, 4000, stride):
        total += counter(step)
        resumed = Ratio(ratio)
        resumed.load_state_dict(counter.state_dict())
        counter = resumed
    assert abs(total - (1 + step * ratio)) <= 1
