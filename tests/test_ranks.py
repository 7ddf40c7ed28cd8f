"""Two ranks on a CPU: the same update as one process, one run folder, exact resume, errors."""

import json
import os
import signal
import subprocess
import sys

import gymnasium
import pytest
import rank_updates
import torch
from dummy_envs import Base
from running import ENVIRONMENT, REPO, count_lines, lines_of, resumes_exactly_on_two_ranks, until
from tensordict import TensorDict

import common.run
import dreamer
import dreamer_v3
from common import checkpoint
from common.checkpoint import RunError
from tools import ranks

SCRIPT = REPO / "dreamer_v3.py"  # the script that the fixtures `start` and `two` run
FLAGS = "--preset debug --num-envs 4 --save-every 40 --log-every 40 --threads 1"
FLAGS = [*FLAGS.split(), "--no-tensorboard"]


class Uneven(Base):
    """Episodes of 10 steps on rank 0, of 60 on rank 1."""

    def __init__(self):
        self.length = (10, 60)[int(os.environ.get("RANK", 0))]


class ShortAtFirst(Base):
    """Episodes of 10 steps; on rank 1 the first five are too short for a window."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        type(self).episodes += 1
        short = type(self).episodes <= 5 and os.environ.get("RANK") == "1"
        self.length = 3 if short else 10
        return super().reset(seed=seed)


for cls in (Uneven, ShortAtFirst):
    gymnasium.register(f"{cls.__name__}-v0", f"test_ranks:{cls.__name__}")


@pytest.fixture
def use_script(monkeypatch):
    """use_script(path): let `two` run this script in this test."""
    return lambda path: monkeypatch.setitem(globals(), "SCRIPT", path)


@pytest.mark.parametrize("script", ["dreamer", "dreamer_v3"])
def test_two_ranks_make_the_updates_of_one_process(use_script, two, script, tmp_path):
    use_script(REPO / "tests" / "rank_updates.py")
    for process in two(script, tmp_path):
        process.done()
    alone = rank_updates.updates(rank_updates.make_agent(script))
    together = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for states in together:
        for expected, state in zip(alone, states, strict=True):
            for a, b in zip(expected["params"], state["params"], strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)
            expected["metrics"].pop("train/policy_entropy", None)  # each rank draws its own noise
            for name, value in expected["metrics"].items():
                assert state["metrics"][name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
    pairs = zip(together[0][-1]["params"], together[1][-1]["params"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moved = zip(alone[0]["params"], alone[-1]["params"], strict=True)
    assert max((a - b).abs().max() for a, b in moved) > 1e-3


def test_a_run_resumes_exactly_with_the_same_number_of_ranks(two, start, tmp_path):
    folder = resumes_exactly_on_two_ranks(two, tmp_path, FLAGS)
    record = (folder / "args.json").read_bytes()
    assert json.loads(record)["ranks"] == 2
    message = start("--run", folder, *FLAGS, "--steps", 999).error()
    assert "holds a run with other arguments:\n  ranks: 2 -> (none) (saved -> now)" in message
    assert (folder / "args.json").read_bytes() == record  # that command never ran


def test_torchrun_and_a_signal_that_stops_all_ranks(tmp_path):
    folder = tmp_path / "run"
    argv = [*FLAGS, "--steps", 10**6, "--save-every", 10**6, "--run", folder]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "--", "tools.ranks", str(SCRIPT), *map(str, argv)]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=REPO, env=ENVIRONMENT, stdout=out, stderr=out)
    try:
        until(lambda: count_lines(folder) > 2 or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "out").read_text()
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] > 0 and json.loads((folder / "args.json").read_text())["ranks"] == 2
    assert (folder / f"rank1-{saved['step']}-{saved['updates']}.pt").exists()


@pytest.mark.parametrize("signaled", [0, 1])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(two, tmp_path, signaled):
    folder = tmp_path / "run"
    argv = ["--run", folder, *FLAGS, "--save-every", 10**6]
    processes = two(*argv, "--steps", 10**6)
    until(lambda: count_lines(folder) > 3 or any(p.path(".rc").exists() for p in processes))
    assert checkpoint.load(folder)["step"] == 0
    processes[signaled].signal(signal.SIGTERM)
    texts = [process.done() for process in processes]
    assert ["will stop soon" in text for text in texts] == [signaled == 0, signaled == 1]
    assert "saved; the same command resumes" in texts[0]
    saved = checkpoint.load(folder)
    assert saved["step"] > 0 and saved["updates"] > 0
    (path,) = folder.glob("rank1-*.pt")
    assert path.name == f"rank1-{saved['step']}-{saved['updates']}.pt"
    rank1 = checkpoint.load(folder, "dreamer_v3", path.name)
    assert rank1["replay"]["total"] == saved["replay"]["total"] == saved["step"] // 4
    end = (saved["step"] // 40 + 2) * 40
    first, second = two(*argv, "--steps", end)
    second.done()
    assert f"resumes at step {saved['step']:,}\n" in first.done()
    rows = lines_of(folder)
    assert rows[-1]["step"] == end and "eval/return_std" in rows[-1]
    assert checkpoint.load(folder)["updates"] > saved["updates"]


def test_ranks_owe_no_update_before_all_of_them_can_draw(use_script, two, tmp_path):
    """Rank 0 has a whole episode after 22 steps, rank 1 after 122; until then no rank updates."""
    use_script(REPO / "dreamer.py")
    argv = "--preset debug --env-id test_ranks:Uneven-v0 --steps 200 --prefill 20 --train-every 20"
    argv += " --action-repeat 1 --eval-every 0 --log-every 20 --threads 1"
    argv += " --no-tensorboard"
    for process in two("--run", tmp_path / "run", *argv.split()):
        process.done()
    rows = lines_of(tmp_path / "run")
    ends = [row["step"] for row in rows if "episode/return" in row]
    assert min(ends) == 22 and ends.count(122) == 1
    counts = {row["step"]: row["updates"] for row in rows if "train/loss_actor" in row}
    # a burst of 4 at first, and then of 2
    assert counts == {140: 4, 160: 6, 180: 8, 200: 10}
    saved = checkpoint.load(tmp_path / "run")
    assert (saved["updates"], saved["owed"]) == (10, 0)
    assert (tmp_path / "run" / "rank1-200-10.pt").exists() and "eval/return_std" in rows[-1]


def test_ranks_wait_for_one_whose_episodes_are_too_short_so_far(use_script, two, tmp_path):
    """Alone it would report that --batch-length is too long; here the other rank has episodes."""
    use_script(REPO / "dreamer.py")
    argv = "--preset debug --env-id test_ranks:ShortAtFirst-v0 --steps 160 --prefill 20"
    argv += " --train-every 20 --action-repeat 1 --eval-every 0 --log-every 20"
    for process in two("--run", tmp_path / "run", *argv.split(), "--threads", 1):
        process.done()
    rows = lines_of(tmp_path / "run")
    first = next(row["step"] for row in rows if "train/loss_actor" in row)
    assert first > 22 and rows[-1]["step"] == 160 and rows[-1]["eval/return_std"] == 0


def test_the_number_of_ranks_must_divide_environments_and_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = dreamer_v3.parse_args(["--preset", "debug", "--num-envs", "6", "--batch-size", "4"])
    with pytest.raises(RunError, match="--batch-size 4 must be a multiple of 3"):
        ranks.rank_args(args)
    args.num_envs = 2
    with pytest.raises(RunError, match="--num-envs 2 must be a multiple of 3"):
        ranks.rank_args(args)
    args.num_envs, args.batch_size = 6, 9
    third = ranks.rank_args(args)
    assert (third.num_envs, third.batch_size, third.steps) == (2, 3, -(-args.steps // 3))


def test_ranks_draw_different_windows_from_replays_of_the_same_length(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    draws = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        args = dreamer_v3.parse_args(["--preset", "debug"])
        example = TensorDict({key: torch.zeros(()).bool() for key in ("is_first", "is_last")})
        replay = ranks.make_rank_replay(args, example, tmp_path, online=False)
        for _ in range(60):
            replay.append(example.expand(args.num_envs // 2).clone())
        draws.append(replay.sample(8)["index"])
    assert not torch.equal(*draws)
    assert (tmp_path / "replay" / "is_last").exists()
    assert (tmp_path / "rank1" / "replay" / "is_last").exists()


def test_an_error_comes_before_fresh_deletes_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    argv = ["--preset", "debug", "--num-envs", "4", "--run", str(tmp_path), "--fresh"]
    (tmp_path / "args.json").write_text('{"script": "dreamer_v3"}')
    (tmp_path / "checkpoint.pt").write_text("all that was learned")
    with pytest.raises(RunError, match="--num-envs 4 must be a multiple of 3"):
        ranks.RanksRun("dreamer_v3", dreamer_v3.parse_args(argv), agent=None)
    assert (tmp_path / "checkpoint.pt").read_text() == "all that was learned"


def test_more_ranks_than_gpus(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="more than the 1 GPUs"):
        ranks.connect()


@pytest.mark.parametrize("script", [dreamer, dreamer_v3])
@pytest.mark.parametrize("flags", [["--eval", "runs/x"], ["--benchmark"]])
def test_evaluation_and_benchmark_refuse_ranks(monkeypatch, script, flags):
    argv = ["--preset", "debug", *flags]
    script.parse_args(argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="without torchrun"):
        ranks.main([script.__file__, *argv])


def test_pilco_trains_in_one_process(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="without torchrun"):
        ranks.main([str(REPO / "pilco.py"), "--preset", "debug"])


@pytest.mark.parametrize("path", ["nothing.py", str(REPO / "README.md")])
def test_a_missing_script(path):
    with pytest.raises(RunError, match=f"there is no script .*{path}"):
        ranks.main([path, "--preset", "debug"])


def test_one_process_is_not_patched():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert common.run.mean_over_ranks(x) is x and common.run.gather_ranks(x) is x
    common.run.mean_over_ranks_([x])
    assert x.tolist() == [1.0, 2.0]
    assert ranks.world_size() == 1 and ranks.rank() == 0 and ranks.rank_seed(5) == 5
    for script in (dreamer, dreamer_v3):
        assert (
            script.Run is common.run.Run and script.mean_over_ranks_ is common.run.mean_over_ranks_
        )
