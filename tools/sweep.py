"""Sweeps: tasks x seeds of a script as tasks of Ray, each retried until it is done.

    python -m tools.sweep dreamer_v3.py --preset dmc_proprio --steps 100000 --seeds 0 1 2 \\
        --env-ids dm_control/walker-walk-v0 dm_control/cheetah-run-v0

Flags that are not the sweep's own go to the script. Ray runs on this machine, or with --address on
a cluster whose nodes see this folder under the same path. A run that dies, or whose worker or node
dies, goes on from its checkpoint. The same command again starts what is missing. What a run prints
is in seed<k>.log beside its folder.
"""

import importlib
import itertools
import json
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
from common.run import args_dict, check_same_args, launch, may_change, run_folder

OURS = ("--run", "--seed", "--env-id", "--fresh", "--eval", "--benchmark")
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
# Becomes the script. If the worker dies, Linux tells it to save and stop (PR_SET_PDEATHSIG is 1).
CHILD = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the worker died first")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass
class Args:
    """Flags of the sweep; all others are the script's."""

    script: tyro.conf.Positional[str]  # dreamer_v3.py, dreamer.py, pilco.py or a fork of them
    env_ids: tuple[str, ...] = ()  # tasks; empty: the script's own, or its preset's
    seeds: tuple[int, ...] = (0,)  # of each task
    address: str = ""  # of a Ray cluster, auto: the one that this node belongs to; empty: start one
    cpus: float = 1.0  # cores of a run, and its threads where --threads leaves them open
    gpus: float = 0.0  # of a run, which sees no other; with 0.25 four of them share one
    retries: int = 3  # of a run that dies
    every: float = 30.0  # seconds between tables


@dataclass
class Job:
    """A run: its command, where it writes, and how it is doing."""

    name: str
    argv: list[str]
    folder: Path
    unit: str  # what the run counts, "step" or "trial"
    total: int  # of them
    mark: str  # begins each try in the log
    state: str = WAITING
    error: str = ""

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def rows(self) -> list[dict]:
        """The last rows of metrics.jsonl, without reading all of it."""
        return list(read_metrics(self.folder / "metrics.jsonl", 2**16))


def main(argv: list[str] | None = None):
    args, flags = tyro.cli(Args, args=argv, description=__doc__, return_unknown_args=True)
    jobs = plan(args, flags)
    stopped = any(job.state != DONE for job in jobs) and work(args, jobs)
    print(table(jobs))
    for job in jobs:
        if job.state == FAILED:
            print(f"{job.name} failed: {job.error}\n    see {job.log}")
    if stopped:
        sys.exit("stopped; the same command goes on")
    if any(job.state == FAILED for job in jobs):
        sys.exit(1)


def plan(args: Args, flags: list[str]) -> list[Job]:
    """The runs of a sweep; RunError, or the script's own, if a flag is wrong."""
    for flag in flags:
        if flag.split("=")[0].replace("_", "-") in OURS:
            raise RunError(f"{flag} is not for a sweep, which sets --env-id, --seed and --run")
    if args.cpus <= 0 or args.gpus < 0 or args.retries < 0 or not args.seeds:
        raise RunError("--cpus must be positive, --gpus and --retries not negative, --seeds given")
    if args.gpus > 1 and args.gpus % 1:
        raise RunError("--gpus above 1 must be a whole number")
    path, jobs, mark = Path(args.script), [], f"--- sweep {time.time():.0f}"
    if not path.is_file() or path.suffix != ".py":
        raise RunError(f"there is no script {path.resolve()}")
    sys.path.insert(0, str(path.resolve().parent))
    script = importlib.import_module(path.stem)  # which knows its flags
    if not hasattr(script, "parse_args"):
        raise RunError(f"{path} cannot be swept: it has no parse_args")
    for env_id, seed in itertools.product(args.env_ids or [""], args.seeds):
        own = [*flags, *(["--env-id", env_id] if env_id else []), "--seed", str(seed)]
        parsed = script.parse_args(own)
        if getattr(parsed, "device", "").startswith("cuda") and not args.gpus:
            raise RunError(f"--device {parsed.device} needs --gpus: without it a run sees none")
        unit = "step" if hasattr(parsed, "steps") else "trial"
        folder = run_folder(path.stem, parsed)
        check_same(folder, parsed)
        argv = [str(path), *own, "--run", str(folder)]  # a fork has another name than its runs
        total = getattr(parsed, f"{unit}s")
        job = Job(f"{parsed.env_id} seed {seed}", argv, folder.resolve(), unit, total, mark)
        job.state = DONE if finished(job) else WAITING
        jobs.append(job)
    if len({job.folder for job in jobs}) < len(jobs):
        raise RunError("--env-ids and --seeds name a run twice")
    return jobs


def check_same(folder: Path, parsed):
    """RunError if the run in that folder has other arguments: its numbers are not those asked."""
    path = folder / "args.json"
    if path.exists() and (folder / "checkpoint.pt").exists():
        ways = "Move it away, or sweep in another directory."
        saved = json.loads(path.read_text())
        free = "script", *may_change(type(parsed))
        check_same_args(folder, saved, args_dict(parsed), free, ways)


def work(args: Args, jobs: list[Job]) -> bool:
    """Bring the runs to their ends; True if the user has stopped it.

    A Ray of its own that dies takes waiting runs with it: they go on in another one.
    """
    for attempt in range(1 + args.retries):
        if attempt:
            print("Ray has died and is started again", flush=True)
        stopped = on_ray(args, jobs)
        if args.address or stopped or all(job.state in (DONE, FAILED) for job in jobs):
            break
    for job in jobs:
        if job.state == WAITING and not stopped:
            job.state = FAILED
    return stopped


def on_ray(args: Args, jobs: list[Job]) -> bool:
    """Start what is not done, show how it goes, wait for it; True if the user has stopped it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RunError("a sweep needs Ray: pip install -r requirements-extra.txt") from None
    own = dict(address="local", include_dashboard=False)  # without address: the last one started
    where = dict(address=args.address) if args.address else own
    try:
        ray.init(log_to_driver=False, logging_level="error", **where)
    except ConnectionError as error:
        raise RunError(f"no Ray answers at --address {args.address}: {error}") from None
    try:
        check_room(args, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        options = dict(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries)
        remote = ray.remote(**options, retry_exceptions=True)(run)
        variables = {"OMP_NUM_THREADS": str(max(1, round(args.cpus))), "PYTHONUNBUFFERED": "1"}
        variables |= {} if args.gpus else {"CUDA_VISIBLE_DEVICES": ""}  # Ray leaves it alone
        todo = [job for job in jobs if job.state == WAITING]
        left, shown = {remote.remote(job, variables, os.getcwd()): job for job in todo}, 0.0
        with Stop() as stop:  # here, because ray.init has handlers of its own
            while left and not stop.requested:
                if time.monotonic() - shown > args.every:
                    show(jobs, again=shown > 0)
                    shown = time.monotonic()
                for reference in ray.wait(list(left), timeout=1)[0]:
                    settle(ray, reference, left.pop(reference))
            for reference in left:
                ray.cancel(reference)
            if left:
                ray.wait(list(left), num_returns=len(left))
            for job in left.values():  # ray.wait may not, and at its end Ray kills what is there
                until_free(job.folder)
    finally:
        ray.shutdown()
    return stop.requested


def check_room(args: Args, nodes: list[dict]):
    """RunError if no node has the cores and GPUs of a run: it would wait for ever."""
    cores, gpus = ([node.get(name, 0) for node in nodes] for name in ("CPU", "GPU"))
    if not any(args.cpus <= c and args.gpus <= g for c, g in zip(cores, gpus, strict=True)):
        most = f"at most {max(cores):g} and {max(gpus):g}"
        raise RunError(f"no node of Ray has --cpus {args.cpus:g} and --gpus {args.gpus:g}: {most}")


def settle(ray, reference, job: Job):
    """Note whether a run has ended well, and if not, why; it still waits if Ray itself died."""
    lost = ray.exceptions.LocalRayletDiedError, ray.exceptions.NodeDiedError
    try:
        ray.get(reference)
        job.state = DONE
    except lost as error:
        job.error = str(error).strip().splitlines()[-1]
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)  # what `run` raised
        job.state, job.error = FAILED, str(cause or str(error).strip().splitlines()[-1])


# --- in a worker --------------------------------------------------------------------------------


def run(job: Job, variables: dict[str, str], directory: str):
    """One try: the script as a process of its own, to its end; RuntimeError if it does not come."""
    # Ray cancels by SIGINT, which a Ray that a shell started in the background would ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    until_free(job.folder)
    if finished(job):  # by the process of a worker that has died
        return
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", CHILD, str(os.getpid()), *job.argv]
    with job.log.open("a") as log:
        print(job.mark, *job.argv, file=log, flush=True)
        # In a process group of its own: Ray kills that of a worker that has died, saved or not.
        options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        process = subprocess.Popen(command, cwd=directory, env=os.environ | variables, **options)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)
        finally:  # cancelled: let it save
            process.terminate()
            process.wait()
    if code or not finished(job):
        raise RuntimeError(f"{last_error(job, code)} (exit code {code})")


def last_error(job: Job, code: int) -> str:
    """The end of the log, from where the script names its error if it does."""
    text = job.log.read_text(errors="replace").rpartition(job.mark)[2].strip()
    begin = f"\n{text}".rfind("\nerror: ")
    # libraries write "error: ", too, and go on
    own = code == 1 and begin >= 0 and "\nTraceback (" not in text[begin:]
    return text[begin:] if own else text.splitlines()[-1]


def until_free(folder: Path):
    """Wait until no process is in a run folder: one whose worker died still has to save."""
    while (folder / "lock").exists():
        with (folder / "lock").open("a") as file:
            if checkpoint.lock(file):
                return
        time.sleep(0.5)


# --- how the runs are doing ---------------------------------------------------------------------


def finished(job: Job) -> bool:
    """Whether the run has got all its steps and its evaluation at the end."""
    rows = job.rows()
    return progress(job)[0] == 1 and "eval/return_std" in rows[-1]


def progress(job: Job) -> tuple[float, float | None, float | None]:
    """Share done, return (of the last ten episodes, or the evaluation), seconds left."""
    rows = job.rows()
    done = max((row.get(job.unit, 0) for row in rows), default=0)
    share = min(1.0, done / job.total)
    returns = [row["episode/return"] for row in rows if row.get("episode/return") is not None]
    value = sum(returns[-10:]) / len(returns[-10:]) if returns else None
    value = rows[-1]["eval/return"] if rows and "eval/return_std" in rows[-1] else value
    return share, value, rows[-1]["time/wall"] * (1 / share - 1) if share else None


def table(jobs: list[Job]) -> str:
    """A line for each run."""
    width = max(len(job.name) for job in jobs)
    lines = [f"{'run':{width}}  state             done      return        left"]
    for job in jobs:
        share, value, left = progress(job)
        tries = job.log.read_text(errors="replace").count(job.mark) if job.log.exists() else 0
        state = RUNNING if job.state == WAITING and tries else job.state
        state += f", try {tries}" if tries > 1 else ""
        value = "" if value is None else f"{value:.1f}"
        clock = "" if left is None or job.state in (DONE, FAILED) else f"{left / 3600:.1f} h"
        lines.append(f"{job.name:{width}}  {state:15} {share:6.0%} {value:>11} {clock:>11}")
    return "\n".join(lines)


def show(jobs: list[Job], again: bool):
    """Print the table, on a terminal over the last one."""
    if again and sys.stdout.isatty():
        print(f"\033[{len(jobs) + 1}F\033[J", end="")
    print(table(jobs), flush=True)


if __name__ == "__main__":
    launch(main)
