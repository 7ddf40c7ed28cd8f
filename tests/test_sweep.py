"""Sweeps on a real Ray: every run finishes exactly once, whatever dies on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from running import ENVIRONMENT, REPO, lines_of, until

import dreamer_v3
from common.checkpoint import RunError
from common.run import args_dict
from tools import sweep

COUNTING = REPO / "tests" / "counting.py"


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="Ray is not installed (requirements-extra.txt)")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}
    from ray.cluster_utils import Cluster

    # As if a shell had started Ray in the background: all its processes inherit the ignored SIGINT.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    cluster = Cluster(
        initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False)
    )
    signal.signal(signal.SIGINT, handler)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def counting(cluster, tmp_path, monkeypatch, capsys):
    """counting(argv...): sweep counting.py; returns the exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def launch(*argv):
        argv = [str(COUNTING), "--address", cluster.address, "--every", "0.2", *map(str, argv)]
        try:
            sweep.main(argv)
            code = 0
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out

    return launch


def in_background(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def process_of(*words):
    """The process whose command line has all of these words."""
    for process in psutil.process_iter(["cmdline"]):
        if set(words) <= set(process.info["cmdline"] or ()):
            return process
    return None


def steps(folder):
    return [row["step"] for row in lines_of(folder)]


def test_a_run_fails_for_good_and_the_others_go_on(counting, tmp_path):
    code, text = counting("--env-ids", "Good", "Bad", "--retries", 1)
    assert code == 1
    good, bad = (tmp_path / "runs/counting" / name / "seed0" for name in ("Good", "Bad"))
    assert steps(good) == [1, 2, 3, 4, 5] and steps(bad) == [1, 2]
    log = bad.with_name("seed0.log")
    assert log.read_text().count("Traceback") == 2  # the first try and one more
    assert "Bad seed 0 failed: ValueError: three is too many (exit code 1)" in text
    assert str(log) in text
    last = text[text.rindex("run  ") :].splitlines()
    assert [line.split()[3] for line in last[1:3]] == ["done", "failed,"]

    # started again with another seed: only what is missing
    before = {p: p.stat().st_mtime_ns for p in good.parent.rglob("*")}
    code, text = counting("--env-ids", "Good", "--seeds", 0, 1)
    assert code == 0 and text.count("done") >= 2
    after = {p: p.stat().st_mtime_ns for p in good.parent.rglob("*")}
    changed = {p.relative_to(good.parent).parts[0] for p in after if before.get(p) != after[p]}
    assert changed == {"seed1", "seed1.log"}
    assert steps(good.with_name("seed1")) == [1, 2, 3, 4, 5]


def test_a_killed_run_and_the_run_of_a_killed_worker_resume(counting, tmp_path):
    folders = [tmp_path / f"runs/counting/Good/seed{seed}" for seed in (0, 1)]

    def kill():
        for seed, folder in enumerate(folders):
            until(lambda path=folder / "metrics.jsonl": path.exists())
            until(lambda folder=folder: len(lines_of(folder)) > 3)
            process = process_of(str(COUNTING), "--pause", "0.0503", str(seed))
            (process.parent() if seed else process).kill()  # the run, then a worker

    thread = in_background(kill)
    code, text = counting("--steps", 120, "--pause", 0.0503, "--saving", 3, "--seeds", 0, 1)
    thread.join()
    assert code == 0 and text[text.rindex("run  ") :].count("done, try 2") == 2
    for seed, folder in enumerate(folders):
        assert steps(folder) == list(range(1, 121))  # nothing twice, nothing left out
        log = folder.with_name(f"seed{seed}.log").read_text()
        assert log.count("starts at") == 2 and log.count("starts at 0") == 1
        assert ("told to stop" in log) == (seed == 1)


def test_a_node_that_dies(counting, cluster, tmp_path):
    nodes = [cluster.add_node(num_cpus=3) for _ in range(2)]
    folder = tmp_path / "runs/counting/Good/seed0"

    def remove():
        until(lambda: (folder / "metrics.jsonl").exists() and len(lines_of(folder)) > 3)
        above = {
            process.pid for process in process_of(str(COUNTING), "--pause", "0.0504").parents()
        }
        for node in nodes:
            if node.all_processes["raylet"][0].process.pid in above:
                cluster.remove_node(node)

    thread = in_background(remove)
    code, text = counting("--steps", 100, "--pause", 0.0504, "--cpus", 3)
    thread.join()
    assert code == 0 and "done, try 2" in text
    assert steps(folder) == list(range(1, 101))


def test_a_stopped_sweep_lets_its_runs_save_and_goes_on(counting, tmp_path):
    folder = tmp_path / "runs/counting/Good/seed0"

    def stop():
        until(lambda: (folder / "metrics.jsonl").exists() and len(lines_of(folder)) > 3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = in_background(stop)
    code, _ = counting("--steps", 2000, "--pause", 0.0505)
    thread.join()
    assert code == "stopped; the same command resumes"
    assert process_of(str(COUNTING), "--pause", "0.0505") is None
    assert "told to stop" in folder.with_name("seed0.log").read_text()
    assert 3 < (done := len(steps(folder))) < 2000
    assert counting("--steps", done + 5)[0] == 0
    assert steps(folder) == list(range(1, done + 6))


def test_more_cores_or_gpus_than_any_node_has(counting):
    with pytest.raises(RunError, match="no Ray node has --cpus 1 and --gpus 1: at most"):
        counting("--gpus", 1)
    with pytest.raises(RunError, match="--cpus 99"):
        counting("--cpus", 99)
    args, nodes = sweep.Args("", cpus=2, gpus=0.5), [{"CPU": 4}, {"CPU": 1, "GPU": 1}]
    with pytest.raises(RunError, match="at most 4 and 1"):  # not on the same one
        sweep.check_room(args, nodes)
    sweep.check_room(args, [*nodes, {"CPU": 2, "GPU": 1}])


def test_no_ray_at_the_address(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (requirements-extra.txt)")
    monkeypatch.chdir(tmp_path)

    def refuse(**_):  # what ray.init does where `ray start` has not been run
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError, match="no Ray answers at --address auto: Could not find"):
        sweep.main([str(COUNTING), "--address", "auto"])


def test_an_address_that_is_silent_or_senseless(tmp_path, monkeypatch):
    """ray.init would try for two minutes where something listens that is no Ray."""
    pytest.importorskip("ray", reason="Ray is not installed (requirements-extra.txt)")
    monkeypatch.chdir(tmp_path)
    assert sweep.ANSWER_TIME <= 20
    monkeypatch.setattr(sweep, "ANSWER_TIME", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)  # which `auto` means
        for name in (address, f"ray://{address}", "auto"):
            with pytest.raises(RunError, match=f"{address}: nothing came within 1 seconds"):
                sweep.main([str(COUNTING), "--address", name])
    with pytest.raises(RunError, match="--address nonsense: Invalid address format"):
        sweep.main([str(COUNTING), "--address", "nonsense"])


def test_a_local_ray_that_dies(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (requirements-extra.txt)")
    cores, folders = os.cpu_count(), [tmp_path / f"runs/counting/Good/seed{i}" for i in (0, 1)]
    command = [sys.executable, "-m", "tools.sweep", str(COUNTING), "--pause", "0.0506"]
    command += ["--steps", "40", "--seeds", "0", "1", "--cpus", str(cores)]  # one at a time
    options = dict(cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **options) as process:
        until(lambda: (folders[0] / "metrics.jsonl").exists())
        children = psutil.Process(process.pid).children()
        (raylet,) = [child for child in children if child.name() == "raylet"]
        raylet.kill()
        text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert "Ray has died and is started again" in text
    assert text[text.rindex("run  ") :].count("done") == 3  # in the header, too
    assert all(steps(folder) == list(range(1, 41)) for folder in folders)


def test_a_fork_of_dreamer_v3_on_a_local_ray(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (requirements-extra.txt)")
    flags = ["--preset", "debug", "--steps", "150", "--no-tensorboard", "--threads", "1"]
    shutil.copy(REPO / "dreamer_v3.py", tmp_path / "my_dreamer.py")
    command = [sys.executable, "-m", "tools.sweep", "my_dreamer.py", *flags]
    command += ["--env-ids", "CartPole-v1", "--seeds", "3"]
    options = dict(cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    done = subprocess.run(command, **options, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    # CUDA builds of torch print this where there is no GPU
    errors = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert "done" in done.stdout.splitlines()[-1] and not errors
    alone = [sys.executable, str(REPO / "dreamer_v3.py"), *flags, "--seed", "3", "--run", "alone"]
    subprocess.run([*alone, "--env-id", "CartPole-v1"], **options, check=True)
    swept = tmp_path / "runs/my_dreamer/CartPole-v1/seed3"
    assert lines_of(swept) == lines_of(tmp_path / "alone") and len(lines_of(swept)) > 3
    assert (swept / "checkpoint.pt").exists()
    assert "everything is in" in swept.with_name("seed3.log").read_text()


# --- without Ray --------------------------------------------------------------------------------


def plan(*argv):
    args, flags = sweep.tyro.cli(sweep.Args, args=list(argv), return_unknown_args=True)
    return sweep.plan(args, flags)


def test_the_runs_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = plan(str(COUNTING), "--env-ids", "A", "B", "--steps", "7", "--seeds", "0", "2")
    assert [job.name for job in jobs] == ["A seed 0", "A seed 2", "B seed 0", "B seed 2"]
    assert jobs[1].folder == tmp_path / "runs/counting/A/seed2"
    folder = str(tmp_path / "runs/counting/B/seed2")
    flags = ["--steps", "7", "--env-id", "B", "--seed", "2", "--run", folder]
    assert jobs[3].argv == [str(COUNTING), *flags]
    assert {(job.unit, job.total) for job in jobs} == {("step", 7)}
    (job,) = plan(str(REPO / "pilco.py"), "--preset", "pendulum", "--trials", "4")
    assert (job.unit, job.total, job.name) == ("trial", 4, "PILCO/Pendulum-v0 seed 0")
    assert job.folder == tmp_path / "runs/pilco/PILCO-Pendulum-v0/seed0"


def test_the_gpus_of_the_runs_need_not_be_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = str(REPO / "dreamer_v3.py"), "--preset", "debug", "--device", "cuda:7"
    for address in ("", "auto"):
        with pytest.raises(RunError, match="--device cuda:7 needs --gpus"):
            plan(*argv, "--address", address)
    (job,) = plan(*argv, "--address", "auto", "--gpus", "0.5")
    assert job.argv[job.argv.index("--device") + 1] == "cuda:7"
    plan(str(REPO / "pilco.py"), "--address", "auto")


def test_progress_and_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = plan(str(COUNTING), "--steps", "40")
    assert sweep.progress(job) == (0.0, None, None) and not sweep.finished(job)
    job.folder.mkdir(parents=True)
    rows = [{"step": s, "episode/return": float(s), "time/wall": 90.0 * s} for s in range(1, 31)]
    rows.insert(25, {"step": 25, "episode/return": None, "time/wall": 2250.0})  # was NaN
    lines = [json.dumps(row) for row in rows]
    path = job.folder / "metrics.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 31')  # the last line is being written
    # 30 of 40; the mean of 21..30; a quarter of 3,600 s
    assert sweep.progress(job) == (0.75, 25.5, pytest.approx(900.0))
    size = len("\n".join(lines[-5:]) + '\n{"step": 31') - 3  # cuts into the first of five
    assert [row["step"] for row in sweep.read_metrics(path, size)] == [27, 28, 29, 30]
    _, line = sweep.table([job]).splitlines()
    assert line.split() == ["Good", "seed", "0", "waiting", "75%", "25.5", "0.2", "h"]
    end = {"step": 40, "eval/return": 3.0, "time/wall": 3600.0}
    path.write_text("\n".join([*lines, json.dumps(end)]) + "\n")
    assert sweep.progress(job) == (1.0, 25.5, 0.0) and not sweep.finished(job)
    path.write_text(json.dumps(end | {"eval/return_std": 1.0}) + "\n")
    assert sweep.finished(job)
    assert sweep.table(plan(str(COUNTING), "--steps", "40")).split()[8:] == ["done", "100%", "3.0"]


def test_a_saved_run_with_other_arguments_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = str(REPO / "dreamer_v3.py")
    (job,) = plan(script, "--preset", "debug")
    job.folder.mkdir(parents=True)
    saved = args_dict(dreamer_v3.parse_args(["--preset", "debug"]))
    saved |= {"script": "dreamer_v3", "origin": []}
    (job.folder / "args.json").write_text(json.dumps(saved))
    (job.folder / "checkpoint.pt").touch()
    plan(script, "--preset", "debug", "--steps", "2000")
    with pytest.raises(RunError, match=r"lr: 4e-05 -> 0.5 \(saved -> now\)"):
        plan(script, "--preset", "debug", "--lr", "0.5")
    plan(script, "--preset", "debug", "--lr", "0.5", "--seeds", "1")
    (job.folder / "args.json").write_text(json.dumps(saved | {"precision": "bfloat16"}))
    with pytest.raises(RunError, match="precision: bfloat16 -> auto"):
        plan(script, "--preset", "debug")


def test_last_error(tmp_path):
    job = sweep.Job("", [], tmp_path / "run", "step", 1, "--- sweep 7")
    job.log.write_text("--- sweep 7\nerror: of the first try\n--- sweep 7\nerror: lr differs\n 1\n")
    assert sweep.last_error(job, 1) == "error: lr differs\n 1"
    job.log.write_text("--- sweep 7\nTraceback\nKeyError: 'no line before it'\n")
    assert sweep.last_error(job, 1) == "KeyError: 'no line before it'"
    # a library's complaint, after which the run went on
    job.log.write_text("--- sweep 7\nerror: no display\nstep 5 of 9\n")
    assert sweep.last_error(job, -9) == "step 5 of 9"
    trace = "Traceback (most recent call last):\n  File\nKeyError: 3\n"
    job.log.write_text(f"--- sweep 7\nerror: no display\nstep 5 of 9\n{trace}")
    assert sweep.last_error(job, 1) == "KeyError: 3"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((COUNTING, "--seed", "1"), "--seed is not for a sweep"),
        ((COUNTING, "--env_id=A"), "--env_id=A is not for a sweep"),
        ((COUNTING, "--fresh"), "--fresh is not for a sweep"),
        ((COUNTING, "--steps", "0"), "--steps must be at least 1"),
        ((COUNTING, "--seeds", "1", "1"), "name a run twice"),
        ((COUNTING, "--cpus", "0"), "--cpus must be positive"),
        ((COUNTING, "--gpus", "1.5"), "--gpus above 1 must be a whole number"),
        (("nothing.py",), "there is no script .*nothing.py"),
        ((REPO / "README.md",), "there is no script .*README.md"),
        ((REPO / "tools" / "success.py",), "cannot be swept: it has no parse_args"),
        ((REPO / "dreamer_v3.py", "--lr", "0"), "--lr must be a positive number"),
        ((COUNTING, "--cpus", "nan"), "--cpus must be finite and below .*, not nan"),
        ((COUNTING, "--retries", str(2**70)), "--retries must be finite and below"),
        (
            (REPO / "dreamer_v3.py", "--env-ids", "CartPole-v1", "Pendulun-v1"),
            "unknown environment 'Pendulun-v1'.*Pendulum-v1",
        ),
        ((REPO / "pilco.py", "--env-ids", "no_module:A-v0"), "no_module:A-v0 needs a package"),
    ],
)
def test_wrong_flags_are_reported_before_anything_starts(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RunError, ValueError), match=message):
        plan(*map(str, argv))
    assert not list(tmp_path.iterdir())


def test_without_ray_the_message_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install -r requirements-extra\.txt"):
        sweep.main([str(COUNTING)])
