"""tools/wandb_run.py: a run that is mirrored to Weights & Biases."""

import json
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
from running import REPO, content, lines_of
from test_run import TINY

import common.run
import dreamer
import dreamer_v3
import pilco
from common.checkpoint import RunError
from tools import wandb_run

SCRIPT = REPO / "dreamer_v3.py"  # what `inside` runs
FLAGS = [*TINY, "--env-id", "running:Long-v0", "--lr", 0.000123]
FLAGS.remove("--no-tensorboard")


@pytest.fixture
def wandb(monkeypatch):
    """A package that only notes its calls: [(function, argument)...]."""
    calls, module = [], ModuleType("wandb")

    def init(**options):
        calls.append(("init", options))
        config = SimpleNamespace(update=lambda row, **_: calls.append(("config", row)))
        log = lambda row: calls.append(("log", row))  # noqa: E731
        name = options["id"] or f"id{len(calls)}"
        return SimpleNamespace(id=name, config=config, log=log, finish=lambda: None)

    module.init, module.Error = init, type("Error", (Exception,), {})
    module.Image, module.Video = str.upper, str.lower
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.fixture
def mirrored(inside, monkeypatch, tmp_path):
    """mirrored(argv...): main() of tools/wandb_run.py with dreamer_v3.py, like `inside`."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])

    def train(*argv):
        monkeypatch.setattr(dreamer_v3, "Run", common.run.Run)  # as in a new process
        wandb_run.main([*map(str, (SCRIPT, "--run", tmp_path / "run", *FLAGS, *argv))])

    return train


def test_it_trains_as_the_script_does(mirrored, inside, wandb, monkeypatch, tmp_path):
    mirrored("--steps", 40)
    command = json.loads((tmp_path / "run" / "args.json").read_text())["origin"][0]["command"]
    flags = shlex.join(map(str, ("--run", tmp_path / "run", *FLAGS, "--steps", 40)))
    assert command == f"python dreamer_v3.py {flags}"
    (tmp_path / "run").rename(tmp_path / "mirrored")
    monkeypatch.setattr(dreamer_v3, "Run", common.run.Run)
    inside(*FLAGS, "--steps", 40)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "mirrored")
    assert not (tmp_path / "run" / "wandb_id").exists()


def test_a_resumed_run_goes_on_in_its_wandb_run(mirrored, wandb, monkeypatch, tmp_path):
    run, pictures = tmp_path / "run", ["learning_curve.png", "policy.mp4"]
    draw = lambda *_: [(run / name).touch() for name in pictures]  # noqa: E731
    monkeypatch.setattr(common.run, "plot_curve", draw)
    ids = []
    for argv in (["--steps", 30], ["--steps", 60], ["--steps", 30, "--fresh"]):
        del wandb[:]
        mirrored(*argv)
        (_, options), (_, config), *logged = wandb
        ids.append((options.pop("id"), (run / "wandb_id").read_text()))
        assert options == {
            "project": "dreamer_v3", "name": str(run), "resume": "allow", "sync_tensorboard": True
        }  # fmt: skip
        assert (config["steps"], config["lr"]) == (argv[1], 0.000123)
        curve, video = (str(run / name) for name in pictures)
        expected = {"learning_curve": curve.upper()}, {"policy": video.lower()}
        assert logged == [("log", row) for row in expected]
    assert ids == [(None, "id1"), ("id1", "id1"), (None, "id1")]


def test_a_run_without_a_checkpoint_starts_a_new_wandb_run(mirrored, wandb, tmp_path):
    mirrored("--steps", 30)
    for name in ("checkpoint.pt", "metrics.jsonl", "replay/.saves"):  # as if killed at the start
        (tmp_path / "run" / name).unlink()
    del wandb[:]
    mirrored("--steps", 30)
    assert wandb[0][1]["id"] is None


def test_if_wandb_does_not_start_fresh_deletes_nothing(
    mirrored, inside, wandb, monkeypatch, tmp_path
):
    inside(*FLAGS, "--steps", 30)
    before, module = content(tmp_path), sys.modules["wandb"]

    def fail(**_):
        raise module.Error("No API key configured")

    monkeypatch.setattr(module, "init", fail)
    with pytest.raises(RunError, match="not start: No API key.*WANDB_MODE=offline needs no acc"):
        mirrored("--fresh")
    for package in (None, ModuleType("wandb")):  # a mere folder of that name is an empty module
        monkeypatch.setitem(sys.modules, "wandb", package)
        with pytest.raises(RunError, match="needs a package: pip install wandb"):
            mirrored("--fresh")
    assert content(tmp_path) == before


@pytest.mark.parametrize("script", [dreamer_v3, dreamer, pilco])
@pytest.mark.parametrize("flags", ["--no-tensorboard", "--eval runs", "--benchmark"])
def test_flags_without_tensorboard_files_are_refused(script, flags, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(RunError, match="leave out --eval, --benchmark and --no-tensorboard"):
        wandb_run.parse_args([script.__file__, *flags.split()])


def test_the_real_package_offline(start, tmp_path):
    """Flags, metrics and curve of two processes belong to one run."""
    pytest.importorskip("wandb")
    argv, folders = [SCRIPT, "--run", tmp_path / "run", *FLAGS], []
    where = dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    program = REPO / "tools" / "wandb_run.py"
    for steps in (30, 60):
        start(*argv, "--steps", steps, program=program, prepare="all_pictures", **where).done()
        (folder,) = set(tmp_path.glob("wandb/offline-run-*")) - set(folders)
        folders.append(folder)
        text = (folder / f"run-{(tmp_path / 'run' / 'wandb_id').read_text()}.wandb").read_bytes()
        assert b"0.000123" in text and re.search(b"episode/return.{1,4}210", text, re.DOTALL)
        assert b"eval/return_std" in text
        media = {path.name.rsplit("_", 2)[0] for path in folder.glob("files/media/*/*")}
        assert media == {"learning_curve"}  # this environment cannot be filmed
