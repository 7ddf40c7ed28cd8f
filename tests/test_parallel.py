"""Two ranks on a CPU: the same update as one process, one run folder, exact resume, errors."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tensordict import TensorDict
from test_run import (  # noqa: F401  fixtures: nursery, start, two
    ENVIRONMENT,
    REPO,
    lines_of,
    nursery,
    resumes_exactly_on_two_ranks,
    start,
    two,
    until,
)

import dreamer
import dreamer_v3
import pilco
from common import parallel
from common.checkpoint import RunError
from common.replay import make_replay

SCRIPT = REPO / "dreamer_v3.py"
FLAGS = "--preset debug --num-envs 4 --save-every 40 --log-every 40 --dream-every 80 --threads 1"
FLAGS = [*FLAGS.split(), "--no-tensorboard"]


@pytest.mark.parametrize("script", ["dreamer", "dreamer_v3"])
def test_two_ranks_make_the_updates_of_one_process(two, script, tmp_path):  # noqa: F811
    for run in two(script, tmp_path, prepare="fixed_updates"):
        run.done()
    alone = ranks.updates(ranks.make_agent(script))
    together = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for states in together:
        for wanted, state in zip(alone, states, strict=True):
            for a, b in zip(wanted["params"], state["params"], strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)
            wanted["metrics"].pop("train/policy_entropy", None)  # has noise of its own
            for name, value in wanted["metrics"].items():
                assert state["metrics"][name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
    pairs = zip(together[0][-1]["params"], together[1][-1]["params"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moved = zip(alone[0]["params"], alone[-1]["params"], strict=True)
    assert max((a - b).abs().max() for a, b in moved) > 1e-3


def test_a_run_resumes_exactly_with_the_same_number_of_ranks(two, start, tmp_path):  # noqa: F811
    folder = resumes_exactly_on_two_ranks(two, tmp_path, FLAGS)
    record = (folder / "args.json").read_bytes()
    message = start("--run", folder, *FLAGS, "--steps", 999).error()
    assert "saved by 2 processes, this is one of 1" in message and "--nproc-per-node 2" in message
    assert (folder / "args.json").read_bytes() == record  # that command never ran


def test_torchrun_and_a_signal_that_stops_all_ranks(tmp_path):
    folder = tmp_path / "run"
    argv = [*FLAGS, "--steps", 10**6, "--save-every", 10**6, "--run", folder]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--", str(SCRIPT), *map(str, argv)]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=REPO, env=ENVIRONMENT, stdout=out, stderr=out)
    try:
        metrics = folder / "metrics.jsonl"
        until(
            lambda: (metrics.exists() and metrics.read_bytes().count(b"\n") > 2) or process.poll()
        )
        assert process.poll() is None, (tmp_path / "out").read_text()
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] > 0 and saved["ranks"] == 2
    assert (folder / f"rank1-{saved['step']}-{saved['updates']}.pt").exists()


def test_numbers_that_the_ranks_do_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = dreamer_v3.parse_args(["--preset", "debug", "--num-envs", "6", "--batch-size", "4"])
    with pytest.raises(RunError, match="--batch-size 4 must be a multiple of 3"):
        parallel.share(args)
    args.num_envs = 2
    with pytest.raises(RunError, match="--num-envs 2 must be a multiple of 3"):
        parallel.share(args)
    args.num_envs, args.batch_size = 6, 9
    own = parallel.share(args)
    assert (own.num_envs, own.batch_size, own.steps) == (2, 3, -(-args.steps // 3))


def test_ranks_draw_different_windows_from_replays_of_the_same_length(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    draws = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        args = dreamer_v3.parse_args(["--preset", "debug"])
        own = parallel.share(args)
        example = TensorDict({key: torch.zeros(()).bool() for key in ("is_first", "is_last")})
        replay = make_replay(own, example, tmp_path / rank, online=False)
        for _ in range(60):
            replay.append(example.expand(own.num_envs).clone())
        draws.append(replay.sample(8)["index"])
    assert not torch.equal(*draws)


def test_what_the_ranks_refuse_costs_no_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    argv = ["--preset", "debug", "--num-envs", "4", "--run", str(tmp_path), "--fresh"]
    (tmp_path / "args.json").write_text('{"script": "dreamer_v3"}')
    (tmp_path / "checkpoint.pt").write_text("all that was learned")
    with pytest.raises(RunError, match="--num-envs 4 must be a multiple of 3"):
        parallel.open_run("dreamer_v3", dreamer_v3.parse_args(argv))
    assert (tmp_path / "checkpoint.pt").read_text() == "all that was learned"


def test_more_ranks_than_gpus(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="more than the 1 GPUs"):
        parallel.start()


@pytest.mark.parametrize("script", [dreamer, dreamer_v3])
@pytest.mark.parametrize("flags", [["--eval", "runs/x"], ["--benchmark"]])
def test_one_process_plays_and_times(monkeypatch, script, flags):
    args = script.parse_args(["--preset", "debug", *flags])
    script.check(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="without torchrun"):
        script.check(args)


def test_pilco_trains_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="without torchrun"):
        pilco.check(pilco.parse_args(["--preset", "debug"]))


def test_alone_nothing_is_changed():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert parallel.mean(x) is x and parallel.gather(x) is x
    assert parallel.size() == 1 and parallel.rank() == 0 and not parallel.any_rank(False)
    assert parallel.collect([1, 2]) == [1, 2] and parallel.own_seed(5) == 5
    assert parallel.own_folder(Path("run")) == Path("run")
