"""tools/offline.py: training on the replay of another run."""

import json
import shutil
import sys

import pytest
import torch
from running import REPO, content, lines_of, replay_rows, same_leaves, same_runs
from test_dreamer_run import SMALL
from test_run import TINY

import dreamer
import dreamer_v3
from common import checkpoint
from common.checkpoint import RunError
from common.envs import Envs
from tools import offline

SCRIPT = REPO / "dreamer_v3.py"  # what `start` and `inside` run here
LONG = ["--env-id", "running:Long-v0"]
WALK = ["--env-id", "running:Walk-v0"]


@pytest.fixture
def train(inside, monkeypatch, tmp_path):
    """train(source, script, argv...): main() of tools/offline.py, like `inside`.

    The folders are tmp_path / "source" and, unless argv say otherwise, tmp_path / "run".
    """
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = "--run", tmp_path / "run"
    return lambda source, script, *argv: offline.main([*map(str, (source, script, *run, *argv))])


def collect(script, folder, *argv):
    """A run that collects rows in `folder`."""
    script.main([*map(str, argv), "--run", str(folder)])
    return folder


def no_steps(*_):
    raise AssertionError("an environment was stepped")


def test_dreamer_v3_on_the_rows_of_another_run(train, monkeypatch, tmp_path):
    """Only reads them; resumes exactly; a step brings the updates of the script."""
    argv = [*TINY, "--env-id", "running:ShortPendulum-v0", "--train-ratio", 8, "--save-every", 25]
    source = collect(dreamer_v3, tmp_path / "source", *argv, "--steps", 50)
    before = content(source)
    times = [path.stat().st_mtime_ns for path in before]
    monkeypatch.setattr(Envs, "step", no_steps)
    train(source, SCRIPT, *argv, "--steps", 30)
    train(source, SCRIPT, *argv, "--steps", 60)
    (tmp_path / "run").rename(tmp_path / "split")
    train(source, SCRIPT, *argv, "--steps", 60)
    assert content(source) == before
    assert [path.stat().st_mtime_ns for path in before] == times
    rows = lines_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [20, 40, 60, 60] and "episode/return" not in str(rows)
    same_runs(tmp_path / "run", tmp_path / "split", argv)
    state = checkpoint.load(tmp_path / "run")
    assert (state["step"], state["updates"]) == (60, 1 + 59 * 8 // 16)  # one at once
    ours, theirs = (replay_rows(folder, argv) for folder in (tmp_path / "run", source))
    for key in ("observation", "action", "reward", "is_first", "is_last", "is_terminal"):
        assert torch.equal(ours[key], theirs[key]), key
    assert len(ours["reward"]) == 49 and ours["action"].std() > 0.1


def test_dreamer_on_the_rows_of_another_run(train, monkeypatch, tmp_path):
    """As many updates as with environments, on the episodes of the other run."""
    argv = [*SMALL, *LONG, "--num-envs", 2, "--prefill", 90]
    argv += ["--train-every", 20, "--train-steps", 2, "--pretrain", 3, "--steps", 130]
    source = collect(dreamer, tmp_path / "source", *argv)
    monkeypatch.setattr(Envs, "step", no_steps)
    script = REPO / "dreamer.py"
    train(source, script, *argv, "--steps", 110)
    train(source, script, *argv)
    (tmp_path / "run").rename(tmp_path / "split")
    train(source, script, *argv)
    run, split, online = (checkpoint.load(tmp_path / name) for name in ("run", "split", "source"))
    assert run["updates"] == online["updates"] == 5 and run["step"] == 130
    assert run["replay"]["total"] == 65
    assert torch.equal(run["replay"]["finished"], online["replay"]["finished"])
    for path in (source / "replay").iterdir():
        rows = 130 * path.stat().st_size // (source / "replay" / "is_last").stat().st_size
        assert path.read_bytes()[:rows] == (tmp_path / "run/replay" / path.name).read_bytes()[:rows]
    same_leaves(run["agent"]["world_model"], split["agent"]["world_model"])
    changed = [
        not torch.equal(x, online["agent"]["actor"][key])
        for key, x in run["agent"]["actor"].items()
    ]
    assert any(changed)  # it is another agent


def test_a_run_of_its_own(start, tmp_path):
    """DreamerV3 on the rows of Dreamer, to the evaluation at the end; args.json names their run."""
    flags = [*TINY, *LONG, "--steps", 40]
    source = tmp_path / "source"
    start(*SMALL, *LONG, "--steps", 60, "--prefill", 60, "--run", source,
          program=REPO / "dreamer.py").done()  # fmt: skip
    argv = source, SCRIPT, *flags, "--run", tmp_path / "run"
    text = start(*argv, program=REPO / "tools" / "offline.py").done()
    assert f"            60 rows from {source}/replay\n" in text and "everything is in" in text
    assert lines_of(tmp_path / "run")[-1]["eval/return"] == 210.0  # 1 + 2 + ... + 20
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    command = f"python -m tools.offline {source} {SCRIPT} --threads 1"
    assert saved["offline"] == str(source)
    assert saved["origin"][0]["command"].startswith(command)
    message = start(*flags, "--run", tmp_path / "run").error()  # with environments, into it
    assert f"offline: {source} -> (none) (saved -> now)" in message
    text = start("--eval", tmp_path / "run", "--eval-episodes", 1).done()
    assert "returns 210.0" in text


def test_the_other_run_must_fit(train, tmp_path):
    argv = [*TINY, *WALK, "--steps", 40]
    source, run = collect(dreamer_v3, tmp_path / "source", *argv), tmp_path / "run"
    for flags in ([], ["--fresh"]):
        with pytest.raises(RunError, match="this run's own folder: choose another --run"):
            train(source, SCRIPT, *argv, *flags, "--run", source)
    for flags, words in [
        (["--num-envs", 2], "num_envs: 1 -> 2"),
        (["--action-repeat", 2, "--steps", 80], "action_repeat: 1 -> 2 .*\ntools.offline needs"),
        (LONG, "env_id: running:Walk-v0 -> running:Long-v0"),
    ]:
        with pytest.raises(RunError, match=words):
            train(source, SCRIPT, *argv, *flags)
        assert not run.exists()
    with pytest.raises(RunError, match="these rows are too few"):
        train(source, SCRIPT, *argv, "--batch-size", 20, "--steps", 200)
    assert not (run / "checkpoint.pt").exists()
    shutil.rmtree(source / "replay")
    with pytest.raises(RunError, match=f"there is no replay in {source}"):
        train(source, SCRIPT, *argv)
    with pytest.raises(RunError, match="no checkpoint in .*nothing: there is no such folder"):
        train(tmp_path / "nothing", SCRIPT, *argv)


def test_what_it_cannot_train(train, tmp_path):
    for script, *flags in (
        (SCRIPT, "--benchmark"),
        (REPO / "dreamer.py", "--eval", "x"),
        (REPO / "pilco.py",),
    ):
        with pytest.raises(RunError, match="start the script itself"):
            offline.main(["source", str(script), *flags])
    with pytest.raises(SystemExit, match="python -m tools.offline runs/"):
        offline.main(["runs/a"])
