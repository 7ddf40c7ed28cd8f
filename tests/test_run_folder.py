"""Run folders, arguments, clocks and errors of common/run.py."""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import content
from tensordict import TensorDict
from threadpoolctl import threadpool_info, threadpool_limits
from torch._inductor.exc import InductorError

import common.run
import dreamer
import dreamer_v3
import pilco
from common import checkpoint
from common.checkpoint import EnvError, RunError, load, save
from common.run import (
    Count,
    MayChange,
    Run,
    args_dict,
    check_finite,
    launch,
    may_change,
    open_folder,
    prepare,
)

REPO = Path(__file__).resolve().parents[1]


@dataclass
class Settings:
    env_id: str = "dm_control/walker-walk-v0"
    seed: int = 3
    lr: float = 4e-5
    steps: MayChange[Count] = 100
    sizes: tuple = (1, 2)
    run: MayChange[str] = ""
    fresh: MayChange[bool] = False
    eval: MayChange[str] = ""


@dataclass
class Clocks(Settings):
    log_every: int = 10
    save_every: int = 0
    tensorboard: bool = False


def open_run(script, args):
    """open_folder as a script calls it."""
    return open_folder(script, args, {"script": script, **args_dict(args)})


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Without --run, folders lie below the working directory."""
    monkeypatch.chdir(tmp_path)


def test_threads_apply_to_torch_and_numpy():
    before = torch.get_num_threads()
    with threadpool_limits(2):  # restores what it finds
        prepare("dreamer", SimpleNamespace(seed=0, threads=1, env_id="", run="here"))
        pools = {pool["user_api"]: pool["num_threads"] for pool in threadpool_info()}
        torch.set_num_threads(before)
    assert pools["blas"] == 1 and pools.get("openmp", 1) == 1


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a C++ compiler and Python's headers: {path of each}."""
    paths = dict(compiler=tmp_path / "bin" / "g++", headers=tmp_path / "include" / "Python.h")
    for path in paths.values():
        path.parent.mkdir()
        path.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(common.run.sysconfig, "get_path", lambda _: tmp_path / "include")
    return paths


@pytest.mark.parametrize("missing", [None, "compiler", "headers"])
def test_long_runs_compile_where_there_is_a_compiler(machine, missing, capsys):
    if missing:
        machine[missing].unlink()
    assert not common.run.can_compile(torch.device("cuda"))
    args = SimpleNamespace(seed=0, threads=0, env_id="", run="here", fresh=False, eval="")
    args.precision, args.compile = "bfloat16", "auto"
    prepare("dreamer", args, 12_345)
    assert args.compile == "no", "torch cannot compile it on a CPU"
    args.precision = "auto"
    for updates in (9_999, 12_345):
        args.compile = "auto"
        prepare("dreamer", args, updates)
        assert args.compile == ("yes" if updates > 10_000 and not missing else "no")
    assert (
        f"torch.compile: {args.compile} (auto: about 12,345 updates on cpu)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("saved", ["yes", "no"])
def test_a_resumed_run_compiles_as_before(machine, saved, tmp_path):
    """Also with another number of updates, but not without a compiler."""
    (tmp_path / "args.json").write_text(json.dumps({"script": "dreamer", "compile": saved}))
    args = SimpleNamespace(seed=0, threads=0, env_id="", run=str(tmp_path), fresh=False, eval="")
    args.precision = "float32"
    for updates in (0, 1e6):
        args.compile = "auto"
        prepare("dreamer", args, updates)
        assert args.compile == saved
    for chosen in ("yes", "no"):
        args.compile = chosen
        prepare("dreamer", args, 0)
        assert args.compile == chosen
    args.fresh, args.compile = True, "auto"
    prepare("dreamer", args, 1e6)
    assert args.compile == "yes"
    machine["compiler"].unlink()
    args.fresh, args.compile = False, "auto"
    prepare("dreamer", args, 1e6)
    assert args.compile == "no"


def test_eval_ignores_the_folder_that_training_would_use(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    args = SimpleNamespace(seed=0, threads=0, env_id="", run=str(tmp_path), fresh=False, eval="run")
    args.compile = "auto"
    prepare("dreamer", args, 1e6)
    assert args.compile == "auto"


def test_folder_name_first_start_and_resume(tmp_path):
    folder, state = open_run("dreamer", Settings())
    assert folder == tmp_path / "runs" / "dreamer" / "dm_control-walker-walk-v0" / "seed3"
    assert state is None
    save(folder, saves=0, step=7, numbers=[1, 2.5, None, "x"])
    _, state = open_run("dreamer", Settings())
    assert state["step"] == 7 and state["numbers"] == [1, 2.5, None, "x"]
    assert state["header"] == {
        "format": checkpoint.FORMAT,
        "script": "dreamer",
        "torch": torch.__version__,
    }


def test_run_names_the_folder_and_it_may_move(tmp_path):
    folder, _ = open_run("dreamer", Settings(run=str(tmp_path / "a")))
    assert folder == tmp_path / "a"
    save(folder, saves=0, step=1)
    folder.rename(tmp_path / "b")
    _, state = open_run("dreamer", Settings(run=str(tmp_path / "b")))
    assert state["step"] == 1


def test_changed_arguments_are_shown_with_both_ways_out(tmp_path):
    folder, _ = open_run("dreamer", Settings())
    save(folder, saves=0, step=1)
    with pytest.raises(RunError) as error:
        open_run("dreamer", Settings(lr=3e-4, steps=200))
    text = str(error.value)
    assert "  lr: 4e-05 -> 0.0003 (saved -> now)" in text
    assert "--fresh" in text and "--run OTHER_FOLDER" in text
    assert "steps" not in text and "sizes" not in text
    assert load(folder)["step"] == 1


def test_a_field_that_is_new_or_gone_is_a_difference(tmp_path):
    @dataclass
    class Newer(Settings):
        momentum: float = 0.9

    save(open_run("dreamer", Settings())[0], saves=0, step=1)
    with pytest.raises(RunError, match=r"momentum: \(none\) -> 0.9"):
        open_run("dreamer", Newer())


def test_fields_that_may_change_resume(tmp_path):
    folder, _ = open_run("dreamer", Settings())
    save(folder, saves=0, step=1)
    changed = Settings(steps=200, eval="x")
    _, state = open_run("dreamer", changed)
    assert state["step"] == 1
    assert '"steps": 200' in (folder / "args.json").read_text()


@pytest.mark.parametrize("script", [dreamer, dreamer_v3, pilco])
def test_what_may_change(script):
    """Where a run lies, how long it is and what it shows, but nothing that it learns from."""
    free = set(may_change(script.Args))
    assert {"run", "fresh", "eval", "eval_episodes", "threads", "tensorboard"} < free
    assert len({"steps", "trials"} & free) == 1
    assert not {"env_id", "seed", "action_repeat", "save_every", "preset", "horizon"} & free
    assert may_change(Settings) == ["steps", "run", "fresh", "eval"]


def test_a_checkpoint_of_an_older_format_names_both_ways_out(tmp_path, monkeypatch):
    """The message is about the format, even if arguments differ as well."""
    with monkeypatch.context() as patch:
        patch.setattr("common.checkpoint.FORMAT", 2)
        folder, _ = open_run("dreamer", Settings())
        save(folder, saves=0, step=1)
    names = sorted(path.name for path in folder.iterdir())
    for args in (Settings(), Settings(lr=3e-4)):
        with pytest.raises(RunError) as error:
            open_run("dreamer", args)
        text = str(error.value)
        assert "checkpoint.pt has format 2, this code reads format" in text
        assert "use the code that saved it" in text and "--fresh" in text
        assert "lr" not in text and "\n" not in text
    assert sorted(path.name for path in folder.iterdir()) == names
    assert open_run("dreamer", Settings(lr=3e-4, fresh=True))[1] is None
    save(folder, saves=0, step=2)
    assert open_run("dreamer", Settings(lr=3e-4))[1]["step"] == 2


def test_fresh_starts_over_with_new_arguments(tmp_path):
    folder, _ = open_run("dreamer", Settings())
    save(folder, saves=0, step=1)
    (folder / "replay").mkdir()
    (folder / "replay" / "rows").write_text("x")
    _, state = open_run("dreamer", Settings(lr=1.0, fresh=True))
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
    save(folder, saves=0, step=1)
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


def test_a_start_that_wrote_nothing_deletes_nothing(tmp_path):
    folder, _ = open_run("dreamer", Settings())
    (folder / "metrics.jsonl").touch()
    (folder / "notes.txt").write_text("x")
    (folder / "replay").mkdir()  # allocated before the first save, perhaps for more --steps
    assert open_run("dreamer", Settings())[1] is None
    names = {path.name for path in folder.iterdir()}
    assert names == {"args.json", "lock", "metrics.jsonl", "notes.txt"}


@pytest.fixture
def saved(tmp_path):
    """A run folder with a replay, after its second save, and the first checkpoint.pt."""
    run = Run("dreamer", Clocks(), SimpleNamespace(spec={}))
    (run.folder / "replay").mkdir()
    (run.folder / "replay" / "reward").write_bytes(b"rows")
    run.stateful["agent"] = {"spec": {}, "args": asdict(run.args)}
    run.logger.log(10, **{"episode/return": 1.0})
    run.save()
    older = (run.folder / "checkpoint.pt").read_bytes()
    run.logger.log(20, **{"episode/return": 2.0})
    run.save()
    run.logger.close()
    return run.folder, older


def test_a_lost_checkpoint_deletes_no_history(saved):
    """Neither with its replay nor without; --fresh does."""
    folder, _ = saved
    (folder / "checkpoint.pt").unlink()
    metrics = (folder / "metrics.jsonl").read_bytes()
    for gone in (None, folder / "metrics.jsonl", folder / "replay"):
        (folder / "metrics.jsonl").write_bytes(metrics)
        if gone:
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        before = content(folder)
        with pytest.raises(RunError, match=r"checkpoint.pt is gone, but not the rest.*--fresh"):
            open_run("dreamer", Clocks())
        assert content(folder) == before
    assert open_run("dreamer", Clocks(fresh=True))[1] is None
    assert {path.name for path in folder.iterdir()} == {"args.json", "lock"}
    assert open_run("dreamer", Clocks())[1] is None


def test_an_older_checkpoint_is_refused_beside_a_newer_replay(saved):
    folder, older = saved
    newer = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(older)
    before = content(folder)
    with pytest.raises(RunError, match=r"checkpoint.pt is older than the replay.*--fresh"):
        open_run("dreamer", Clocks())
    assert content(folder) == before
    (folder / "checkpoint.pt").write_bytes(newer)
    assert open_run("dreamer", Clocks())[1]["saves"] == 2


def test_a_kill_between_checkpoint_and_counter_is_no_fault(saved):
    folder, _ = saved
    counter = folder / "replay" / ".saves"
    assert counter.read_text() == "2"
    for text in ("1", ""):  # damaged: the checkpoint decides
        counter.write_text(text)
        assert open_run("dreamer", Clocks())[1]["saves"] == 2


@pytest.mark.parametrize("damage", ["", "{", '["script"]', "3", "{}", '{"script": ', None])
def test_the_checkpoint_replaces_a_damaged_args_json(saved, damage, capsys):
    """It knows the script and its flags, which still may not change."""
    folder, _ = saved
    whole = json.loads((folder / "args.json").read_text())
    for args, differs in ((Clocks(lr=1.0), "lr: 4e-05 -> 1.0"), (Clocks(), None)):
        (folder / "args.json").unlink(missing_ok=True)
        if damage is not None:
            (folder / "args.json").write_text(damage)
        if differs:
            with pytest.raises(RunError, match=differs):
                open_run("dreamer", args)
    with pytest.raises(RunError, match="a run of dreamer.py: choose another --run"):
        open_run("pilco", Clocks(run=str(folder), fresh=True))
    assert open_run("dreamer", Clocks())[1]["saves"] == 2
    assert "args.json is damaged or gone: its flags are taken from" in capsys.readouterr().out
    again = json.loads((folder / "args.json").read_text())
    assert again | {"origin": 0} == whole | {"origin": 0} and len(again["origin"]) == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
    def fail(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    for owner, name in ((Path, "mkdir"), (checkpoint, "lock_folder")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(RunError) as error:
                open_run("dreamer", Settings(run=str(tmp_path / "a")))
        text = f"--run {tmp_path / 'a'} cannot be written to: "
        message = str(error.value)
        assert message.startswith(text) and os.strerror(number) in message and "\n" not in message


@pytest.mark.parametrize("script", [dreamer, dreamer_v3, pilco])
def test_an_environment_may_change_the_working_directory(tmp_path, script):
    """Relative folders are those of the start, of a run and of --eval."""
    flags = {
        dreamer: "--steps 120 --prefill 60 --train-every 60 --pretrain 1 --obs vector",
        dreamer_v3: "--steps 84 --batch-size 2 --obs vector",
        pilco: "--trials 1 --angles --start --start-std --target 0 0 --weights",
    }
    argv = (
        f"--preset debug --no-tensorboard --threads 1 --env-id running:Wanders-v0 {flags[script]}"
    )
    for where in ((), ("--run", "mine")):
        script.main([*argv.split(), *where])
        os.chdir(tmp_path)
    for folder in ("mine", f"runs/{script.SCRIPT}/running-Wanders-v0/seed0"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert {"args.json", "checkpoint.pt", "metrics.jsonl", "learning_curve.png"} <= names
        assert "elsewhere" not in names
    assert not [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()]

    def evaluate(*_, **__):
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")
        return [1.0], [np.zeros((16, 16, 3), np.uint8)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "evaluate", evaluate)
        script.main(["--eval", "mine"])
    assert (tmp_path / "mine" / "eval.mp4").is_file()


LOCK = """
import sys, time
from dataclasses import dataclass
from common.run import open_folder, args_dict
@dataclass
class Settings:
    run: str
    env_id: str = ""
    fresh: bool = False
args = Settings(sys.argv[1])
open_folder("dreamer", args, {"script": "dreamer", **args_dict(args)})
print("locked", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_share_a_folder(tmp_path):
    command, env = [sys.executable, "-c", LOCK, tmp_path / "a"], {**os.environ, "PYTHONPATH": REPO}
    other = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    before = (tmp_path / "a" / "args.json").read_text()
    with pytest.raises(RunError, match="another process is running"):
        open_run("dreamer", Settings(run=str(tmp_path / "a"), fresh=True))
    assert (tmp_path / "a" / "args.json").read_text() == before
    other.kill()
    other.communicate()
    open_run("dreamer", Settings(run=str(tmp_path / "a"), fresh=True))
    open_run("dreamer", Settings(run=str(tmp_path / "a")))  # this process may open it again


@pytest.fixture
def make_run():
    """Make runs without an environment, whose step a test sets."""
    agent = SimpleNamespace(spec={})
    with ExitStack() as stack:

        def make(**periods):
            run = Run("dreamer", Clocks(**{"fresh": True} | periods), agent)
            stack.callback(run.logger.close)
            return run

        yield make


def passed_at(run, name, steps):
    """The steps at which the interval has passed; every step is reported."""
    passed = []
    for run.step in steps:
        passed += [run.step] if run.interval_passed(name) else []
        run.reported = run.step
    return passed


def test_intervals_keep_to_multiples(make_run):
    run = make_run()
    assert passed_at(run, "log", (0, 4, 9, 13, 19, 20, 45, 46, 50)) == [13, 20, 45, 50]
    for name in ("save", "dream"):  # switched off; not a flag of the script
        run = make_run()
        assert not passed_at(run, name, range(5))


def test_intervals_resume_with_another_period(make_run):
    for before in (10, 0):  # 0: it had been switched off
        old, new = make_run(log_every=before), make_run(log_every=25)
        passed_at(old, "log", [33])
        new.step, new.reported = old.step, old.reported
        assert passed_at(new, "log", range(34, 80)) == [50, 75]


def test_an_error_before_anything_is_loaded_keeps_its_message():
    """A replay too large for the disk, say: there is nothing to save or close yet."""
    for kind in (RunError, EnvError):
        run = Run("dreamer", Clocks(fresh=True), SimpleNamespace(spec={}))
        with pytest.raises(kind, match="no room"), run:
            raise kind("no room")
        assert run.logger.file.closed and not (run.folder / "checkpoint.pt").exists()


@pytest.fixture
def make_training_run():
    """Make runs in the middle of training, as `resume` and `training` leave them."""

    def make(**counters):
        run = Run("dreamer", Clocks(fresh=True), SimpleNamespace(spec={}))
        run.latent = TensorDict(action=torch.zeros(1, 1), batch_size=[1])
        vars(run).update(counters)
        return run

    return make


def test_a_signal_while_a_failed_run_is_saved_costs_nothing(make_training_run, monkeypatch, capfd):
    writes, write = [], checkpoint.atomic_write
    run = make_training_run(step=7)
    (run.folder / "replay").mkdir()

    def interrupted(path, fill):
        writes.append(path.name)
        if path.name == "checkpoint.pt":
            os.kill(os.getpid(), signal.SIGINT)
        return write(path, fill)

    monkeypatch.setattr(checkpoint, "atomic_write", interrupted)
    with pytest.raises(EnvError, match="fell over"), run:
        raise EnvError("the robot fell over")
    assert writes == ["checkpoint.pt", ".saves"] and load(run.folder)["step"] == 7
    out, err = capfd.readouterr()
    assert "saved; the same command resumes" in out and "will stop soon" in err
    assert (run.folder / "replay" / ".saves").read_text() == "1" and load(run.folder)["saves"] == 1


def test_only_a_run_without_an_error_is_called_complete(make_training_run, capsys):
    for error, words in (
        (RunError("NaN"), ""),
        (KeyboardInterrupt(), ""),
        (EnvError("evaluation"), "saved; the same command resumes, and tries again what failed\n"),
        (None, "everything is in "),
    ):
        run = make_training_run()
        run.done = run.total
        with suppress(BaseException), run:
            if error is not None:
                raise error
        assert capsys.readouterr().out.startswith(words) and run.logger.file.closed
        assert (run.folder / "checkpoint.pt").exists() == isinstance(error, EnvError)


@pytest.mark.parametrize("stopped", [True, False])
def test_ctrl_c_while_torch_compiles_is_no_error(make_training_run, stopped):
    """It kills the C++ compiler, too, as the terminal sends it to all processes."""
    run = make_training_run()
    with pytest.raises(KeyboardInterrupt if stopped else InductorError), run:
        run.stop.requested = stopped
        raise InductorError(RuntimeError("g++ was killed"), None)
    assert run.logger.file.closed


def test_a_complete_run_is_evaluated_once_and_always_drawn(make_training_run, monkeypatch, capsys):
    scores, drawn = [], []
    monkeypatch.setattr(common.run, "score", lambda _: scores.append(0) or {"eval/return": 1.0})
    monkeypatch.setattr(common.run, "film", lambda *_: drawn.append("film"))
    monkeypatch.setattr(common.run, "plot_curve", lambda *_: drawn.append("curve"))
    run = make_training_run(step=100)
    run.finish()
    assert not drawn, "it is not complete"
    run.done = run.total
    for _ in range(2):
        run.finish()
    assert len(scores) == 1 and drawn == ["film", "curve", "curve"]
    assert load(run.folder)["evaluated"] == 100
    assert "already complete and evaluated" in capsys.readouterr().out


def test_metrics_that_are_not_finite_are_named():
    good = {"train/loss_model": torch.tensor(1.0), "train/grad_norm": torch.tensor(1e38)}
    check_finite(good, 12)
    bad = {"train/loss_actor": torch.tensor(torch.nan), "dream/return": torch.tensor(-torch.inf)}
    message = "train/loss_actor, dream/return not finite at update 1,234. The last checkpoint is"
    with pytest.raises(RunError, match=message):
        check_finite({**good, **bad}, 1234)


def test_origins_of_a_run(tmp_path):
    """A resumed run names every commit and command that made it, each once."""
    for argv in (["a.py"], ["a.py", "--steps", "9"], ["a.py", "--steps", "9"]):
        sys.argv, before = argv, sys.argv
        folder, _ = open_run("dreamer", Settings())
        sys.argv = before
        save(folder, saves=0, step=1)
    origins = json.loads((folder / "args.json").read_text())["origin"]
    assert [origin["command"] for origin in origins] == ["python a.py", "python a.py --steps 9"]
    assert all(len(origin["commit"]) >= 7 and origin["hardware"] for origin in origins)


def test_a_full_disk_and_other_errors_of_a_run():
    """One line for what the user can fix, a traceback for the rest."""
    for error, text in (
        (OSError(errno.ENOSPC, "No space left"), "disk full"),
        (
            OSError(errno.EROFS, "Read-only file system", "/x"),
            "error: Read-only file system, .*'/x'",
        ),
        (OSError(errno.EACCES, "Permission denied", "/x"), "error: Permission denied, .*'/x'"),
        (OSError(errno.EFBIG, "File too large"), "error: File too large, the last checkpoint is"),
        (KeyboardInterrupt(), "stopped"),
        (RunError("--lr"), "error: --lr"),
    ):
        with pytest.raises(SystemExit, match=text) as stop:
            launch(lambda error=error: (_ for _ in ()).throw(error))
        assert "\n" not in str(stop.value)
    with pytest.raises(ConnectionError):
        launch(lambda: (_ for _ in ()).throw(ConnectionError(errno.ECONNREFUSED, "no")))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    """So large tensors cost page faults only at first."""
    code = """
import resource, torch, dreamer_v3
from common.run import prepare
prepare("dreamer_v3", dreamer_v3.parse_args(["--preset", "debug"]))
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[0], sum(faults[5:]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    first, others = map(int, done.stdout.split()[-2:])
    assert others < 100 < first, done.stderr
