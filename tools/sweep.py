"""Run a script for several tasks and seeds on Ray; runs that die are retried.

    python -m tools.sweep dreamer_v3.py --preset dmc_proprio --steps 100000 --seeds 0 1 2 \\
        --env-ids dm_control/walker-walk-v0 dm_control/cheetah-run-v0

Flags that the sweep does not know go to the script. Ray runs on this machine, or with --address on
a cluster whose nodes have this folder at the same path. A run that dies, or whose worker or node
dies, resumes from its checkpoint. Repeat the command to start what is missing. What a run prints
goes to seed<k>.log beside its folder.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import checkpoint
from common.checkpoint import RunError, Stop
from common.logger import read_metrics
from common.run import (
    args_dict,
    check_flags,
    check_same_args,
    launch,
    may_change,
    run_folder,
    saved_args,
)
from tools import import_script

REFUSED_FLAGS = ("--run", "--seed", "--env-id", "--fresh", "--eval", "--benchmark")
ANSWER_TIME = 10  # seconds that a Ray has to answer
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
# Execs the script. On Linux SIGTERM makes it save if the worker dies (1 is PR_SET_PDEATHSIG).
LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the worker died first")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass
class Args:
    """Flags of the sweep; all others go to the script."""

    script: tyro.conf.Positional[str]  # dreamer_v3.py, dreamer.py, pilco.py or a fork of them
    env_ids: tuple[str, ...] = ()  # tasks; empty: the default of the script or preset
    seeds: tuple[int, ...] = (0,)  # of each task
    address: str = ""  # of a Ray cluster; auto: the one that this node is in; empty: start one
    cpus: float = 1.0  # cores per run, and its threads unless --threads sets them
    gpus: float = 0.0  # per run, which sees no other GPU; with 0.25, four runs share one
    retries: int = 3  # per run that dies
    every: float = 30.0  # seconds between tables


@dataclass
class Job:
    """A run: its command, its folder, its length and its state."""

    name: str
    argv: list[str]
    folder: Path
    unit: str  # "step" or "trial": what --steps or --trials counts
    total: int  # steps or trials
    mark: str  # the log of each try begins with it
    state: str = WAITING
    error: str = ""

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def rows(self) -> list[dict]:
        """The last rows of metrics.jsonl, without reading all of it."""
        return list(read_metrics(self.folder / "metrics.jsonl", 2**16))


def main(argv: list[str] | None = None):
    args, flags = tyro.cli(Args, prog="python -m tools.sweep", args=argv, description=__doc__,
                           return_unknown_args=True)  # fmt: skip
    jobs = plan(args, flags)
    stopped = any(job.state != DONE for job in jobs) and run_all(args, jobs)
    print(table(jobs))
    for job in jobs:
        if job.state == FAILED:
            print(f"{job.name} failed: {job.error}\n    see {job.log}")
    if stopped:
        sys.exit("stopped; the same command resumes")
    if any(job.state == FAILED for job in jobs):
        sys.exit(1)


def plan(args: Args, flags: list[str]) -> list[Job]:
    """The jobs of a sweep; RunError, or the script's error, if a flag is wrong."""
    for flag in flags:
        if flag.split("=")[0].replace("_", "-") in REFUSED_FLAGS:
            raise RunError(f"{flag} is not for a sweep, which sets --env-id, --seed and --run")
    check_flags(args)
    if args.cpus <= 0 or args.gpus < 0 or args.retries < 0 or not args.seeds:
        raise RunError("--cpus must be positive, --gpus and --retries not negative, --seeds given")
    if args.gpus > 1 and args.gpus % 1:
        raise RunError("--gpus above 1 must be a whole number")
    path, jobs, mark = Path(args.script), [], f"--- sweep {time.time():.0f}"
    script = import_script(path)  # to parse its flags
    if not hasattr(script, "parse_args"):
        raise RunError(f"{path} cannot be swept: it has no parse_args")
    for env_id, seed in itertools.product(args.env_ids or [""], args.seeds):
        run_flags = [*flags, *(["--env-id", env_id] if env_id else []), "--seed", str(seed)]
        parsed = script.parse_args(run_flags)
        if getattr(parsed, "device", "").startswith("cuda") and not args.gpus:
            raise RunError(f"--device {parsed.device} needs --gpus: without it a run sees no GPU")
        if hasattr(script, "make_envs") and seed == args.seeds[0]:  # unknown, or lacks a package?
            script.make_envs(parsed, num_envs=1, env_workers=False, obs="auto").close()
        unit = "step" if hasattr(parsed, "steps") else "trial"
        folder = run_folder(path.stem, parsed)
        check_saved_args(folder, parsed)
        argv = [str(path), *run_flags, "--run", str(folder)]  # a fork's SCRIPT may differ
        total = getattr(parsed, f"{unit}s")
        job = Job(f"{parsed.env_id} seed {seed}", argv, folder.resolve(), unit, total, mark)
        job.state = DONE if finished(job) else WAITING
        jobs.append(job)
    if len({job.folder for job in jobs}) < len(jobs):
        raise RunError("--env-ids and --seeds name a run twice")
    return jobs


def check_saved_args(folder: Path, parsed):
    """RunError if the run in that folder was started with other arguments."""
    if (folder / "checkpoint.pt").exists():
        ways = "Move it away, or sweep in another directory."
        free = "script", *may_change(type(parsed))
        check_same_args(folder, saved_args(folder), args_dict(parsed), free, ways)


def run_all(args: Args, jobs: list[Job]) -> bool:
    """Run all jobs to their end; True if the user stopped the sweep.

    If the Ray that this process started dies, the runs resume on a new one.
    """
    for attempt in range(1 + args.retries):
        if attempt:
            print("Ray has died and is started again", flush=True)
        stopped = run_on_ray(args, jobs)
        if args.address or stopped or all(job.state in (DONE, FAILED) for job in jobs):
            break
    for job in jobs:
        if job.state == WAITING and not stopped:
            job.state = FAILED
    return stopped


def run_on_ray(args: Args, jobs: list[Job]) -> bool:
    """Start the waiting jobs, show their progress, wait; True if the user stopped the sweep."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import grpc
        import ray
    except ImportError:
        raise RunError("a sweep needs Ray: pip install -r requirements-extra.txt") from None
    local = dict(address="local", include_dashboard=False)  # by default it joins a running Ray
    address = os.environ.get("RAY_ADDRESS") or "auto" if args.address == "auto" else args.address
    where = dict(address=address) if address else local
    try:
        if ":" in address and "RAY_USE_TLS" not in os.environ:  # ray.init waits for minutes
            with grpc.insecure_channel(address.removeprefix("ray://")) as channel:
                grpc.channel_ready_future(channel).result(ANSWER_TIME)
        ray.init(log_to_driver=False, logging_level="error", **where)
    except (ConnectionError, ValueError, grpc.FutureTimeoutError) as error:
        why = str(error) or f"nothing came within {ANSWER_TIME} seconds"
        raise RunError(f"no Ray answers at --address {address}: {why}") from None
    try:
        check_room(args, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        options = dict(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries)
        remote = ray.remote(**options, retry_exceptions=True)(run)
        variables = {"OMP_NUM_THREADS": str(max(1, round(args.cpus))), "PYTHONUNBUFFERED": "1"}
        variables |= {} if args.gpus else {"CUDA_VISIBLE_DEVICES": ""}  # Ray would not hide them
        todo = [job for job in jobs if job.state == WAITING]
        pending = {remote.remote(job, variables, os.getcwd()): job for job in todo}
        last_shown = 0.0
        with Stop() as stop:  # after ray.init, which sets its own signal handlers
            while pending and not stop.requested:
                if time.monotonic() - last_shown > args.every:
                    show(jobs, again=last_shown > 0)
                    last_shown = time.monotonic()
                for reference in ray.wait(list(pending), timeout=1)[0]:
                    record_end(ray, reference, pending.pop(reference))
            for reference in pending:
                ray.cancel(reference)
            if pending:
                ray.wait(list(pending), num_returns=len(pending))
            for job in pending.values():  # may still be saving; ray.shutdown would kill it
                wait_until_free(job.folder)
    finally:
        ray.shutdown()
    return stop.requested


def check_room(args: Args, nodes: list[dict]):
    """RunError if no node has the cores and GPUs of a run: it would wait forever."""
    cores, gpus = ([node.get(name, 0) for node in nodes] for name in ("CPU", "GPU"))
    if not any(args.cpus <= c and args.gpus <= g for c, g in zip(cores, gpus, strict=True)):
        most = f"at most {max(cores):g} and {max(gpus):g}"
        raise RunError(f"no Ray node has --cpus {args.cpus:g} and --gpus {args.gpus:g}: {most}")


def record_end(ray, reference, job: Job):
    """Record that a job is done, or failed and why. It stays waiting if Ray itself died."""
    ray_died = ray.exceptions.LocalRayletDiedError, ray.exceptions.NodeDiedError
    try:
        ray.get(reference)
        job.state = DONE
    except ray_died as error:
        job.error = str(error).strip().splitlines()[-1]
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)  # what `run` raised
        job.state, job.error = FAILED, str(cause or str(error).strip().splitlines()[-1])


# --- in a worker --------------------------------------------------------------------------------


def run(job: Job, variables: dict[str, str], directory: str):
    """One try: run the script as a process; RuntimeError if the run is not finished after it."""
    # Ray cancels with SIGINT, which is ignored where a shell started Ray in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wait_until_free(job.folder)
    if finished(job):  # by the process of an earlier worker, which died
        return
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", LAUNCHER, str(os.getpid()), *job.argv]
    with job.log.open("a") as log:
        print(job.mark, *job.argv, file=log, flush=True)
        # Its own process group: Ray kills the one of a dead worker before the run can save.
        options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        process = subprocess.Popen(command, cwd=directory, env=os.environ | variables, **options)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)
        finally:  # if cancelled, let it save
            process.terminate()
            process.wait()
    if code or not finished(job):
        raise RuntimeError(f"{last_error(job, code)} (exit code {code})")


def last_error(job: Job, code: int) -> str:
    """The script's last error message in the log of this try, or else the last line."""
    text = "\n" + job.log.read_text(errors="replace").rpartition(job.mark)[2].strip()
    start = text.rfind("\nerror: ") + 1  # 0: none
    # Libraries print "error: " too, without ending the run.
    from_script = code == 1 and start > 0 and "\nTraceback (" not in text[start:]
    return text[start:] if from_script else text.splitlines()[-1]


def wait_until_free(folder: Path):
    """Wait until no process holds the folder's lock: after a worker died, its run still saves."""
    while (folder / "lock").exists():
        with (folder / "lock").open("a") as file:
            if checkpoint.lock(file):
                return
        time.sleep(0.5)


# --- progress -----------------------------------------------------------------------------------


def finished(job: Job) -> bool:
    """Whether the run has all its steps and its final evaluation."""
    rows = job.rows()
    return progress(job)[0] == 1 and "eval/return_std" in rows[-1]


def progress(job: Job) -> tuple[float, float | None, float | None]:
    """Fraction done, return (last ten episodes, or the final evaluation), seconds left."""
    rows = job.rows()
    done = max((row.get(job.unit, 0) for row in rows), default=0)
    fraction = min(1.0, done / job.total)
    returns = [row["episode/return"] for row in rows if row.get("episode/return") is not None]
    score = sum(returns[-10:]) / len(returns[-10:]) if returns else None
    score = rows[-1]["eval/return"] if rows and "eval/return_std" in rows[-1] else score
    return fraction, score, rows[-1]["time/wall"] * (1 / fraction - 1) if fraction else None


def table(jobs: list[Job]) -> str:
    """One line for each run, below a header."""
    width = max(len(job.name) for job in jobs)
    lines = [f"{'run':{width}}  state             done      return        left"]
    for job in jobs:
        fraction, score, seconds = progress(job)
        tries = job.log.read_text(errors="replace").count(job.mark) if job.log.exists() else 0
        state = RUNNING if job.state == WAITING and tries else job.state
        state += f", try {tries}" if tries > 1 else ""
        score = "" if score is None else f"{score:.1f}"
        left = "" if seconds is None or job.state in (DONE, FAILED) else f"{seconds / 3600:.1f} h"
        lines.append(f"{job.name:{width}}  {state:15} {fraction:6.0%} {score:>11} {left:>11}")
    return "\n".join(lines)


def show(jobs: list[Job], again: bool):
    """Print the table; on a terminal it replaces the last one."""
    if again and sys.stdout.isatty():
        print(f"\033[{len(jobs) + 1}F\033[J", end="")
    print(table(jobs), flush=True)


if __name__ == "__main__":
    launch(main)
