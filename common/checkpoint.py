"""What keeps a run safe: readable errors, atomic checkpoints, locks, random states, signals."""

import errno
import json
import os
import random
import signal
import threading
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

FORMAT = 5  # of checkpoint.pt
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (*DISK_FULL, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)  # the user's to mend
LOCKS = {}  # (device, inode) -> open lock file, held until the process ends


class RunError(Exception):
    """A message for the user; scripts print it without a traceback and exit with code 1."""


class EnvError(RunError):
    """The environment failed, not the run: what was learned is sound and worth saving."""


def atomic_write(path, write) -> Path:
    """Write `path` with write(file); a crash at any time leaves the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):  # there is none on a read-only disk
            temporary.unlink(missing_ok=True)
        while error and getattr(error, "errno", None) not in NO_ACCESS:
            error = error.__context__  # torch.save raises its own error over the OSError
        if error:
            why = "disk full" if error.errno in DISK_FULL else error.strerror
            text = f"{why}: {path} was not written; the last good one is kept, if there is one"
            raise RunError(text) from None
        raise
    temporary.replace(path)
    if os.name == "posix":  # makes the rename survive a power loss
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return path


def save(folder, name="checkpoint.pt", /, **contents):
    """Write folder/name atomically: each of `contents`, or its state_dict() if it has one.

    Tensors, numbers, strings, lists, tuples and dicts are allowed; others raise TypeError, since
    `load` would refuse them. On a full disk it raises RunError; the old file stays.
    """
    args = Path(folder, "args.json")
    script = json.loads(args.read_text())["script"] if args.exists() else None
    state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in contents.items()}
    state["header"] = {"format": FORMAT, "script": script, "torch": str(torch.__version__)}

    def write(file):
        torch.save(state, file)
        file.flush()
        if refused := torch.serialization.get_unsafe_globals_in_checkpoint(file.name):
            raise TypeError(f"a checkpoint cannot hold {', '.join(refused)}")

    Stop.saving = True  # a second Ctrl-C has no effect now
    try:
        atomic_write(Path(folder, name), write)
    finally:
        Stop.saving = False


def load(folder, script=None, name="checkpoint.pt") -> dict:
    """Read a checkpoint in a run folder onto the CPU.

    RunError if it is missing, damaged, of another format, or not written by `script`.
    """
    file = Path(folder, name)
    if not file.is_file():
        gone = f"{name} has not been saved yet, or is gone"
        why = gone if Path(folder).is_dir() else "there is no such folder"
        why = "it is a file; name its folder" if Path(folder).is_file() else why
        raise RunError(f"no checkpoint in {folder}: {why}")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load ignores the checksums
        assert not damaged, damaged
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        version, owner = state["header"]["format"], state["header"]["script"]
    except Exception as error:  # which kind depends on the bytes that are wrong
        if getattr(error, "errno", None) in NO_ACCESS:
            raise
        text = f"{file} is damaged, or not a checkpoint of this project"
        raise RunError(f"{text}: restore a copy, or start with --fresh ({error!r})") from None
    if version != FORMAT:
        ways = "use the code that saved it, or start over with --fresh"
        raise RunError(f"{file} has format {version}, this code reads format {FORMAT}: {ways}")
    if script and owner and owner != script:
        text = f"{file} was written by {owner}.py, not by {script}.py"
        raise RunError(f"{text} (programs in tools/: --script {owner}.py)")
    return state


def lock_folder(folder: Path):
    """Lock the folder until this process ends; RunError if another process holds it."""
    file = (folder / "lock").open("a")
    status = os.fstat(file.fileno())
    inode = status.st_dev, status.st_ino
    if inode not in LOCKS and not lock(file):
        raise RunError(f"another process is running in {folder}: wait for it or stop it")
    LOCKS.setdefault(inode, file)


def lock(file) -> bool:
    """Lock an open file, until it is closed; False if another process has locked it."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # some network file systems cannot lock: better no lock than no run
    return True


def seed_all(seed: int):
    """Seed the generators of Python, numpy and torch (of every GPU, too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The states of the generators that `seed_all` seeds, as numbers, lists and tensors."""
    name, keys, *rest = np.random.get_state()
    # Before its first use CUDA has no generators, and asking for them would start it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    return state | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict):
    """Continue the generators from what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(value, device)


@contextmanager
def kept_rng():
    """Afterwards the generators are as before; also a decorator."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


class Stop:
    """`with Stop() as stop`: the first SIGINT or SIGTERM only sets `stop.requested`.

    A second Ctrl-C raises KeyboardInterrupt, except while a checkpoint is written. Does nothing
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
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python
        self.previous = {}

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT and not self.saving:
            raise KeyboardInterrupt
        if not self.requested:  # os.write, because print is not safe inside a signal handler
            os.write(2, b"\nwill stop soon, to be resumed (Ctrl-C again: now, without saving)\n")
        self.requested = True
