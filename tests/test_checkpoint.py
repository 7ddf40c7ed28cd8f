"""Atomic saves, resume, generators and signals of common/checkpoint.py; the ratio of updates."""

import errno
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import FORMAT, RunError, Stop, load, rng_state, save, seed_all, set_rng_state
from dreamer_v3 import Ratio

# Forked processes start fast, since they need not import torch again.
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
forks = pytest.mark.skipif(FORK is None, reason="needs fork")


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
def test_a_damaged_checkpoint_is_refused(tmp_path, kind):
    save(tmp_path, weights=torch.full((1000,), 7, dtype=torch.uint8))
    damage(tmp_path / "checkpoint.pt", kind)
    with pytest.raises(RunError, match="damaged, or not a checkpoint"):
        load(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], 5, {"header": 3}, {"x": Evil()}])
def test_a_foreign_file_is_refused(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="or not a checkpoint of this project"):
        load(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(RunError, match="or not a checkpoint of this project"):
        load(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_another_script_or_format_is_refused(tmp_path, monkeypatch):
    (tmp_path / "args.json").write_text('{"script": "pilco"}')
    save(tmp_path, step=1)
    assert load(tmp_path, "pilco")["step"] == load(tmp_path)["step"] == 1
    with pytest.raises(RunError, match=r"written by pilco.py, not by dreamer.py"):
        load(tmp_path, "dreamer")
    monkeypatch.setattr("common.checkpoint.FORMAT", FORMAT + 1)
    with pytest.raises(RunError, match=f"has format {FORMAT}, this code reads format {FORMAT + 1}"):
        load(tmp_path)


def test_modules_and_optimizers_are_saved_by_state_dict(tmp_path):
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


def test_save_refuses_what_load_would_refuse(tmp_path):
    save(tmp_path, step=1)
    with pytest.raises(TypeError, match="cannot hold .*numpy"):
        save(tmp_path, step=np.float64(2.0))
    assert load(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, wrapped):
    save(tmp_path, step=1)

    def full(state, file):
        file.write(b"PK half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if wrapped:
                raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save does
            raise

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunError, match="disk full.*last good one is kept"):
            save(tmp_path, step=2)
    assert load(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EFBIG])
def test_a_disk_that_refuses_is_one_line(tmp_path, monkeypatch, number):
    """Whether the file cannot be written or not even be made, and for a file that is unreadable."""
    save(tmp_path, step=1)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    text = f"{os.strerror(number)}: {tmp_path / 'checkpoint.pt'} was not written; the last good"
    for owner, name in ((torch, "save"), (Path, "open")):
        with monkeypatch.context() as patch, pytest.raises(RunError, match=text):
            patch.setattr(owner, name, refuse)
            patch.setattr(Path, "unlink", refuse)  # as on a read-only disk
            save(tmp_path, step=2)
    assert load(tmp_path)["step"] == 1
    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):  # not "damaged": launch() names it
        load(tmp_path)


def save_forever(folder, steps):
    step = load(folder)["step"] if (folder / "checkpoint.pt").exists() else 0
    while True:
        step += 1
        save(folder, step=step, weights=torch.full((20_000,), float(step)))
        steps.value = step


@forks
def test_a_kill_at_any_time_leaves_a_valid_checkpoint(tmp_path):
    rng, torn = random.Random(0), 0
    steps = FORK.Value("l", 0, lock=False)
    for _ in range(40):
        process = FORK.Process(target=save_forever, args=(tmp_path, steps))
        before = steps.value
        process.start()
        while steps.value == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.02))
        process.kill()
        process.join()
        state = load(tmp_path)
        assert steps.value <= state["step"] <= steps.value + 1
        assert (state["weights"] == state["step"]).all()
        torn += (tmp_path / "checkpoint.pt.tmp").exists()
    assert torn > 0  # some kills came in the middle of a save


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
    message = (tmp_path / "stderr").read_text().strip()
    assert message.startswith("will stop soon") and message.count("\n") == 0


@forks
def test_the_second_interrupt_stops_at_once(tmp_path):
    process = FORK.Process(target=loop, args=(tmp_path, True))
    process.start()
    wait_for((tmp_path / "ready").exists)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "will stop soon" in (tmp_path / "stderr").read_text())
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1 and not (tmp_path / "checkpoint.pt").exists()


def test_handlers_are_restored_and_threads_are_left_alone():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    requested = []

    def work():
        with Stop() as stop:
            requested.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [False]


def draws():
    return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.randn(3).tolist()]


def test_generators_continue_after_a_round_trip(tmp_path):
    seed_all(5)
    draws()  # leaves half a pair of normal numbers in Python's and NumPy's generators
    save(tmp_path, rng=rng_state())
    expected = [draws() for _ in range(3)]
    seed_all(6)
    set_rng_state(load(tmp_path)["rng"])
    assert [draws() for _ in range(3)] == expected


def test_a_seed_repeats_its_draws():
    seed_all(2**40 + 1)
    first = draws()
    seed_all(2**40 + 1)
    assert draws() == first


def test_an_impatient_user_does_not_break_a_save(tmp_path, monkeypatch):
    """Two Ctrl-C during torch.save do no harm; a third one, after it, stops at once."""
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


def test_ratio_against_hand_counts():
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


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    save(tmp_path, step=1)
    with pytest.raises(RunError, match=r"no checkpoint in .*checkpoint.pt: it is a file; name its"):
        load(tmp_path / "checkpoint.pt")
