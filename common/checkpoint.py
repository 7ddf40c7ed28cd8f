"""Run folder, atomic checkpoints, exact resume, seeding, and the clocks of a training loop."""

import errno
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

FORMAT = 1  # of checkpoint.pt
RUN_CONTROL = ("fresh", "eval", "run", "origin")  # not what is learned, so free to differ
LEFTOVERS = ("metrics.jsonl", "replay", "tensorboard", "checkpoint.pt.tmp")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FRESH = "Add --fresh to delete that run and start over, or --run OTHER_FOLDER to keep it."
LOCKS = {}  # inode -> open lock file, held until the process ends


class RunError(RuntimeError, ValueError):
    """A message for the user; scripts print it without a traceback and exit with code 1."""


class EnvError(RunError):
    """The environment failed, not the run: what was learned is sound and worth saving."""


def run(main):
    """Call main(); what the user can mend, and Ctrl-C, end it with one line and no traceback."""
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the last checkpoint is kept")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        sys.exit(f"error: disk full, the last checkpoint is kept ({error})")


def run_folder(script, args, root="runs") -> Path:
    """Where the run of `args` lies: `args.run`, or root/script/env_id/seed."""
    name = re.sub("[/:]", "-", args.env_id)
    return Path(args.run or Path(root, script, name, f"seed{args.seed}"))


def open_run(
    script, args, may_change=(), decided=None, root="runs", ranks=1
) -> tuple[Path, dict | None]:
    """Create or reopen the run folder of `args` (a dataclass) and lock it for this process.

    The folder is that of `run_folder`; `args.fresh` empties it first. Returns it with the state to
    resume from, None at the beginning. A field of `decided` that is "auto" is set to its saved
    value, at the beginning to that in `decided`. Raises RunError if a field outside `may_change`
    differs from the saved args, another number of `ranks` saved it, another process runs there, or
    it is no run folder of `script`.
    """
    folder = run_folder(script, args, root)
    folder.mkdir(parents=True, exist_ok=True)
    saved = _saved_args(folder)  # before the lock, to leave nothing behind in a foreign folder
    _lock(folder)
    if saved and saved["script"] != script:
        raise RunError(f"{folder} is a run of {saved['script']}.py: choose another --run")
    for field, value in (decided or {}).items():
        if getattr(args, field) == "auto":
            setattr(args, field, saved.get(field, value) if saved and not args.fresh else value)
    asked = {"script": script, **plain(args)}
    if args.fresh:  # args.json stays until it is replaced: without it the folder would be foreign
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # first: it refers to the others
        _remove(path for path in folder.iterdir() if path.name not in ("lock", "args.json"))
    elif (folder / "checkpoint.pt").exists():  # else there is nothing to protect
        compare(folder, saved, asked, may_change)
    state = load(folder, script) if (folder / "checkpoint.pt").exists() else None
    if state and (before := state.get("ranks", 1)) != ranks:
        text = f"{folder} was saved by {before} processes, this is one of {ranks}"
        raise RunError(f"{text}: resume it with torchrun --nproc-per-node {before}")
    if state is None:
        _remove(folder / leftover for leftover in LEFTOVERS)
    past, now = saved["origin"] if state else [], _origin()
    asked["origin"] = past if now in past else [*past, now]  # more than one where it was resumed
    text = json.dumps(asked, indent=2) + "\n"
    write(folder / "args.json", lambda file: file.write(text.encode()))
    return folder, state


def _origin():
    """What a published figure has to name: command, commit, versions, hardware.

    args.json holds a list of them, one for each way in which the run was started or resumed.
    """
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    commit = ""
    with suppress(OSError):
        ask = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = subprocess.run(git, **ask).stdout.strip().replace("-dirty", " with changes")
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall("model name\\s*: (.*)", cpu) or [platform.processor()])[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "hardware": f"{os.cpu_count()} cores of {cpu}, {gpu}",
    }


def _saved_args(folder):
    if all(path.name in ("lock", "args.json.tmp") for path in folder.iterdir()):
        return None
    path = folder / "args.json"
    with suppress(ValueError, TypeError):
        saved = json.loads(path.read_text()) if path.exists() else {}
        if "script" in saved:
            return saved
    raise RunError(f"{folder} is neither empty nor a run folder: choose another --run")


def compare(folder, saved: dict, asked: dict, may_change, ways: str = FRESH):
    """RunError that names the arguments in which a saved run is not the one asked for."""
    lines = [
        f"  {name}: {saved.get(name, '(none)')} -> {asked.get(name, '(none)')} (saved -> asked)"
        for name in {**saved, **asked}
        if name not in (*RUN_CONTROL, *may_change) and saved.get(name, {}) != asked.get(name, {})
    ]
    if lines:
        raise RunError("\n".join([f"{folder} holds a run with other arguments:", *lines, ways]))


def plain(args) -> dict:
    """A dataclass of arguments as args.json has them."""
    return json.loads(json.dumps(asdict(args), default=str))


def _lock(folder):
    file = (folder / "lock").open("a")
    key = os.fstat(file.fileno()).st_ino
    if key not in LOCKS and not lock(file):
        raise RunError(f"another process is running in {folder}: wait for it or stop it")
    LOCKS.setdefault(key, file)


def lock(file) -> bool:
    """Lock an open file, until it is closed; False if another process has locked it."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # nor on some network file systems: better no lock than no run
    return True


def _remove(paths):
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write(path, fill) -> Path:
    """Call fill(file), so that a crash at any time leaves the old or the new content in `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        while error and getattr(error, "errno", None) not in DISK_FULL:
            error = error.__context__  # torch.save covers the first error with one of its own
        if error:
            text = f"disk full: {path} was not written, the last good one is kept if there was one"
            raise RunError(text) from None
        raise
    temporary.replace(path)
    if os.name == "posix":  # only this makes the new name durable
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return path


def save(folder, name="checkpoint.pt", /, **parts):
    """Write that file atomically: every part, or its state_dict() where it has one.

    Parts are tensors, numbers, strings, lists, tuples and dicts; others raise TypeError, since
    `load` would refuse them. A full disk raises RunError and the old file stays.
    """
    args = Path(folder, "args.json")
    script = json.loads(args.read_text())["script"] if args.exists() else None
    state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
    state["header"] = {"format": FORMAT, "script": script, "torch": str(torch.__version__)}

    def fill(file):
        torch.save(state, file)
        file.flush()
        if refused := torch.serialization.get_unsafe_globals_in_checkpoint(file.name):
            raise TypeError(f"a checkpoint cannot hold {', '.join(refused)}")

    Stop.saving = True
    try:
        write(Path(folder, name), fill)
    finally:
        Stop.saving = False


def load(path, script=None, name="checkpoint.pt") -> dict:
    """Read a checkpoint in a run folder onto the CPU.

    Raises RunError where there is none, it is damaged, or `script` did not write it.
    """
    file = Path(path, name)
    if not file.is_file():
        gone = f"{name} has not been saved yet, or is gone"
        why = gone if Path(path).is_dir() else "there is no such folder"
        raise RunError(f"no checkpoint in {path}: {why}")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load ignores the checksums
        assert not damaged, damaged
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        version, owner = state["header"]["format"], state["header"]["script"]
    except Exception as error:  # of many kinds, whichever bytes are wrong
        text = f"{file} is damaged, or not a checkpoint of this project"
        raise RunError(f"{text}: restore a copy, or start with --fresh ({error!r})") from None
    if version != FORMAT:
        raise RunError(f"{file} has format {version}, this code reads format {FORMAT}")
    if script and owner and owner != script:
        raise RunError(f"{file} was written by {owner}.py, not by {script}.py")
    return state


def load_agent(run, script, make):
    """The agent that a run saved, built by make(spec, args); RunError if that fails."""
    state = load(run, script)["agent"]
    try:
        agent = make(state["spec"], state["args"])
        agent.load_state_dict(state)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        text = f"the checkpoint in {run} does not fit this code"
        raise RunError(f"{text}: {type(error).__name__}, {error}") from error
    return agent


def restore(saved, parts):
    """Load every part of a run, {name: part}, and then what `rng_state` gave of the generators."""
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    state = saved["rng"]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(value, device)


def pick_device(name="") -> torch.device:
    """The device of that name; empty: CUDA if there is a GPU, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RunError(f"--device {name} cannot be used: {error}") from error


def autocast(device, precision) -> torch.autocast:
    """Context of bfloat16 matrix products: with "bfloat16" anywhere, with "auto" on CUDA."""
    auto = device.type == "cuda" and precision == "auto"
    return torch.autocast(device.type, torch.bfloat16, enabled=auto or precision == "bfloat16")


def prepare(seed, threads=0):
    """What a script sets for its process: seeds, threads on the CPU (0: the libraries' choice)."""
    if threads:
        torch.set_num_threads(threads)
        threadpool_limits(threads)  # numpy's, which else wait for each other where a core is busy
    torch.set_flush_denormal(True)  # as XLA does; numbers below 1e-38 are slow on a CPU
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of every GPU, too


def check_spec(spec, saved, env_id):
    """RunError if the environment of a saved run had other observations or actions than now."""
    if saved and saved["agent"]["spec"] != spec:
        text = f"{env_id} has changed: {saved['agent']['spec']} -> {spec} (saved -> now)"
        raise RunError(f"{text}. --fresh starts over")


def rng_state() -> dict:
    """The generators that `prepare` seeds, as numbers, lists and tensors."""
    name, keys, *rest = np.random.get_state()
    # A GPU not used so far has no generator yet, and asking for it would start CUDA.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numbers = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    return {**numbers, "torch": torch.get_rng_state(), "cuda": cuda}


class Stop:
    """`with Stop() as stop`: the first SIGINT or SIGTERM only sets `stop.requested`.

    A second Ctrl-C raises KeyboardInterrupt, but not while a checkpoint is written. Does nothing
    outside the main thread.
    """

    requested = saving = False

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT and not self.saving:
            raise KeyboardInterrupt
        if not self.requested:  # os.write, because print is not safe inside a signal handler
            os.write(2, b"\nwill save and stop soon (Ctrl-C again: stop now, without saving)\n")
        self.requested = True


class Every:
    """`every(now)`: how many multiples of `period` were passed since the last call (0: never)."""

    def __init__(self, period):
        self.period, self.last = period, 0

    def __call__(self, now) -> int:
        due = now // self.period - self.last // self.period if self.period > 0 else 0
        self.last = now
        return due

    def state_dict(self) -> dict:
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = state["last"]


class Ratio:
    """`ratio(step)` is the number of updates due, as the DreamerV3 authors count them.

    The first call returns 1; then `ratio` for each step since, fractions carried over.
    """

    def __init__(self, ratio):
        self.ratio, self.last = ratio, None

    def __call__(self, step) -> int:
        if not self.ratio:
            return 0
        if self.last is None:
            self.last = step
            return 1
        updates = int((step - self.last) * self.ratio)
        self.last += updates / self.ratio
        return updates

    def state_dict(self) -> dict:
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = state["last"]
