"""What a script's main needs around its algorithm: flags, run folder, resume, stop, evaluation.

    args = parse_flags(Args, argv, __doc__, lambda chosen: PRESETS[chosen.preset])
    with Run("dreamer", args, agent) as run:     # opens and locks the folder
        latent = run.resume(envs=envs, replay=replay, latent=agent.initial(envs.num_envs))
        while run.training(latent):              # logs, evaluates and saves when it is time
            ...
        run.finish()

An agent has `act(rows, latent)` and, in its state_dict too, `spec` and `args`; optional: `modules`
{name: network}, `fps` of its videos, `device` (for `batches`).
"""

import ctypes
import inspect
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
import tyro
from tensordict import TensorDict
from threadpoolctl import threadpool_limits
from torch import Tensor

from common import checkpoint
from common.checkpoint import DISK_FULL, NO_ACCESS, EnvError, RunError, Stop
from common.envs import make_envs
from common.logger import Logger, plot_curve, say, write_video

MAX_FRAMES, MAX_STEPS = 1000, 30_000  # of a video (200 MB), of an episode in an evaluation
SAVES = "replay/.saves"  # see mark_save; never the name of a replay key
COUNTERS = ("step", "done", "updates", "owed", "reported", "returns", "saves", "evaluated")
TOO_LARGE = "can't allocate|out of memory|bad_alloc|overflowed with size|overflow when unpacking"
FRESH = "Add --fresh to delete that run and start over, or --run OTHER_FOLDER to keep it."


def launch(main: Callable):
    """Call main(); what the user can mend, or Ctrl-C, ends it with one line, not a traceback."""
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if error.name != "tools":
            raise
        sys.exit("error: this needs the folder tools/ beside the script")
    except KeyboardInterrupt:
        sys.exit("stopped: the last checkpoint is kept")
    except OSError as error:
        if error.errno not in NO_ACCESS:
            raise
        why = "disk full" if error.errno in DISK_FULL else error.strerror
        sys.exit(f"error: {why}, the last checkpoint is kept ({error})")
    except Exception as error:
        if not isinstance(error, MemoryError) and not re.search(TOO_LARGE, str(error), re.I):
            raise
        flags, why = shlex.join(sys.argv[1:]) or "the default flags", str(error).partition("\n")[0]
        sys.exit(f"error: out of memory with {flags}: choose smaller sizes ({why})")


# --- flags --------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What `parse_flags` demands of a flag's value."""

    text: str  # --flag must be ...
    holds: Callable[..., bool]


T = TypeVar("T")
MayChange = Annotated[T, "may change when a run is resumed"]
Count = Annotated[int, Rule("at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Rule("a whole number, not negative", lambda x: x >= 0)]
Positive = Annotated[float, Rule("a positive number", lambda x: 1e-300 < x < inf)]  # 1 / x, too
NotNegative = Annotated[float, Rule("a number that is not negative", lambda x: 0 <= x < inf)]
Fraction = Annotated[float, Rule("between 0 and 1", lambda x: 0 <= x <= 1)]
Threads = Annotated[int, Rule("between 0 and 1,024", lambda x: 0 <= x <= 1024)]
NumEnvs = Annotated[int, Rule("between 1 and 10,000", lambda x: 1 <= x <= 10_000)]
Compile = Literal["auto", "yes", "no"]
Camera = Annotated[int, Rule("the number of a camera, or -1", lambda x: x >= -1)]
EnvId = Annotated[str, Rule("like CartPole-v1, dm_control/walker-walk-v0 or my_module:MyEnv-v0",
                            re.compile(r"(\w[\w.-]*:)?\w[^:]*").fullmatch)]  # fmt: skip


def parse_flags(args_type: type[T], argv, doc: str, defaults: Callable[[T], dict]) -> T:
    """Flags -> args_type, a dataclass; RunError that names a flag whose value breaks its rule.

    `defaults(chosen)` gives the values that the chosen preset stands for; other flags beat them.
    `doc` is what --help begins with.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = [word for word in argv if word not in ("-h", "--help")]
    chosen, _ = tyro.cli(args_type, args=flags, return_unknown_args=True)  # for its preset
    args = tyro.cli(args_type, args=flags, default=args_type(**defaults(chosen)))
    if len(flags) < len(argv):
        print_help(args, doc)
        sys.exit(0)
    check_flags(args)
    return args


def check_flags(args):
    """RunError that names a flag whose value breaks its rule, or has a number beyond 64 bits."""
    for name, marks in annotations(type(args)).items():
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else (value,)
        broken = [mark.text for mark in marks if isinstance(mark, Rule) and not mark.holds(value)]
        if any(isinstance(x, int | float) and not abs(x) < 2**63 for x in values):  # also NaN
            broken.append("finite and below 2**63")
        if broken:
            given = " ".join(map(str, values)) or "empty"
            raise RunError(f"--{name.replace('_', '-')} must be {broken[0]}, not {given}")


def print_help(args, doc: str):
    """`doc`, then a line for each flag as in the source of its dataclass, with its value now."""
    print(doc)
    kinds = get_type_hints(type(args))
    for line in inspect.getsource(type(args)).splitlines():
        if flag := re.match(r"    (\w+): .*?  # (.*)", line):
            name, text = flag.groups()
            if get_origin(kinds[name]) is Literal:
                text += f" ({', '.join(filter(None, get_args(kinds[name])))})"
            value = str(getattr(args, name))
            value = value if len(value) <= 24 else value[:21] + "..."
            print(f"  --{name.replace('_', '-'):20} {value:14} {text}")
        elif line.startswith("    # "):
            print(f"\n{line[6:]}:")


def annotations(args_type: type) -> dict[str, tuple]:
    """{field: what `Annotated` adds to its type}."""
    kinds = get_type_hints(args_type, include_extras=True)
    return {name: getattr(kind, "__metadata__", ()) for name, kind in kinds.items()}


def may_change(args_type: type) -> list[str]:
    """The fields that may differ when a run is resumed."""
    (mark,) = MayChange.__metadata__
    return [name for name, marks in annotations(args_type).items() if mark in marks]


def prepare(script: str, args, updates: float = 0) -> torch.device:
    """Set seeds, threads (0: the libraries' choice) and allocator; return the run's device.

    `args.run` becomes an absolute path, as environments may change the working directory, and
    --compile auto becomes yes or no; `updates`: about how many the run takes.
    """
    args.run = str(run_folder(script, args))
    if args.threads:
        torch.set_num_threads(args.threads)
        threadpool_limits(args.threads)  # numpy's, too: threads stall each other on busy cores
    torch.set_flush_denormal(True)  # as XLA does; numbers below 1e-38 are slow on a CPU
    with suppress(AttributeError, TypeError):  # glibc only: keep freed memory for the next tensors
        mallopt = ctypes.CDLL(None).mallopt  # else page faults take a quarter of a pixel update
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, in bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    checkpoint.seed_all(args.seed)
    device = pick_device(getattr(args, "device", "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the only one that a CUDA graph records
        torch.backends.cudnn.allow_tf32 = False  # --precision float32 is float32
    if getattr(args, "compile", "") == "auto" and not args.eval:
        resumes = os.path.isdir(args.run) and not args.fresh
        saved = saved_args(Path(args.run)).get("compile") if resumes else None
        pays = "yes" if updates >= 10_000 else "no"
        able = can_compile(device) and args.precision != "bfloat16"  # torch 2.13: invalid C++
        args.compile = (saved or pays) if able else "no"
        print(f"torch.compile: {args.compile} (auto: about {updates:,.0f} updates on {device})")
    return device


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs to make C++ code for a CPU."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return device.type == "cpu" and bool(compiler) and headers.exists()


def pick_device(name="") -> torch.device:
    """The device of that name; empty: CUDA if there is a GPU, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        assert device.type in ("cpu", "cuda"), "it is neither cpu nor cuda"
        return torch.zeros(0, device=device).device  # "cuda" -> "cuda:0"; raises if unusable
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RunError(f"--device {name} cannot be used: {error}") from error


def autocast(agent) -> torch.autocast:
    """Run matrix products in bfloat16 if --precision says so or, with "auto", on CUDA.

    Parameters and losses stay float32.
    """
    kind, precision = agent.device.type, agent.args.precision
    enabled = precision == "bfloat16" or (precision == "auto" and kind == "cuda")
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


# --- ranks (one per device): tools/ranks.py replaces these --------------------------------------


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of x over all ranks, for losses that need the whole batch's mean."""
    return x


def mean_over_ranks_(tensors: list[Tensor]):
    """Replace each tensor by its mean over all ranks."""


def gather_ranks(x: Tensor) -> Tensor:
    """x (N, ...) of all ranks, one after the other."""
    return x


# --- the run folder -----------------------------------------------------------------------------


def run_folder(script: str, args) -> Path:
    """Where the run of `args` lies: `args.run`, or runs/script/env_id/seed; absolute."""
    name = re.sub("[/:]", "-", args.env_id)
    return Path(args.run or Path("runs", script, name, f"seed{args.seed}")).absolute()


def open_folder(script: str, args, requested: dict) -> tuple[Path, dict | None]:
    """Create or reopen the run folder of `args`, lock it, and load its checkpoint, if there is one.

    `args.fresh` empties it. `requested` is what args.json will say. Raises RunError if the saved
    arguments differ where they may not change, if another process runs there, if it is not a run
    folder of `script`, or if its checkpoint is gone or older than the rest.
    """
    folder = run_folder(script, args)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved = saved_args(folder)  # before the lock, to leave nothing behind in a foreign folder
        if "exported" in saved:
            raise RunError(f"{folder} is an exported agent, which only plays: --eval {folder}")
        checkpoint.lock_folder(folder)
    except (OSError, ValueError) as error:  # read-only, a file, a device, a null byte
        raise RunError(f"--run {folder} cannot be written to: {error}") from None
    if saved.get("script", script) != script:
        raise RunError(f"{folder} is a run of {saved['script']}.py: choose another --run")
    file, metrics, state = folder / "checkpoint.pt", folder / "metrics.jsonl", None
    if args.fresh:
        file.unlink(missing_ok=True)  # first: it refers to the others
        for path in folder.iterdir():
            if path.name not in ("lock", "args.json"):  # args.json marks a run
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif file.exists():
        state = checkpoint.load(folder, script)
        if last_save(folder) > state["saves"]:
            raise RunError(f"{file} is older than the replay: put back the newer. {FRESH}")
        check_same_args(folder, saved, requested, may_change(type(args)))
    elif last_save(folder) or (metrics.exists() and metrics.stat().st_size):
        raise RunError(f"{file} is gone, but not the rest of the run: put it back. {FRESH}")
    else:  # a start that was killed before its first save
        shutil.rmtree(folder / "replay", ignore_errors=True)
    origins, now = (saved.get("origin", []) if state else []), origin()
    requested["origin"] = origins if now in origins else [*origins, now]  # all distinct origins
    text = json.dumps(requested, indent=2) + "\n"
    checkpoint.atomic_write(folder / "args.json", lambda file: file.write(text.encode()))
    return folder, state


def mark_save(folder: Path, number: int):
    """Write the number of a save to the replay, too: this exposes an old checkpoint.pt.

    After checkpoint.pt, so a kill between the two does no harm.
    """
    if (folder / "replay").is_dir():
        checkpoint.atomic_write(folder / SAVES, lambda file: file.write(str(number).encode()))


def last_save(folder: Path) -> int:
    """The number of the last save; 0 if it is damaged, or if there is none."""
    with suppress(ValueError, OSError):
        return int((folder / SAVES).read_text())
    return 0


def saved_args(folder: Path) -> dict:
    """What args.json says or, if that is damaged, checkpoint.pt; {} for an empty folder.

    RunError if it is not a run folder.
    """
    if all(path.name in ("lock", "args.json.tmp") for path in folder.iterdir()):
        return {}
    with suppress(ValueError, TypeError, FileNotFoundError):
        saved = json.loads((folder / "args.json").read_text())
        if isinstance(saved, dict) and "script" in saved:
            return saved
    with suppress(RunError, KeyError):
        state = checkpoint.load(folder)
        print(f"{folder}/args.json is damaged or gone: its flags are taken from checkpoint.pt")
        return {"script": state["header"]["script"], **as_json(state["agent"]["args"])}
    raise RunError(f"{folder} is neither empty nor a run folder: choose another --run")


def args_dict(args) -> dict:
    """Args as a dict, equal to what args.json gives back."""
    return as_json(asdict(args))


def as_json(values: dict) -> dict:
    """What JSON gives back: lists for tuples, strings for paths."""
    return json.loads(json.dumps(values, default=str))


def check_same_args(folder, saved: dict, requested: dict, free, hint: str = FRESH):
    """RunError naming what differs in saved and requested arguments, except `free`."""
    lines = [
        f"  {name}: {saved.get(name, '(none)')} -> {requested.get(name, '(none)')} (saved -> now)"
        for name in {**saved, **requested}
        if name not in ("origin", *free) and saved.get(name, {}) != requested.get(name, {})
    ]
    if lines:
        raise RunError("\n".join([f"{folder} holds a run with other arguments:", *lines, hint]))


def check_same_spec(env_id: str, saved: dict, now: dict):
    """RunError if an environment no longer has the spaces that an agent was made for."""
    if saved != now:
        raise RunError(
            f"{env_id} has changed: {saved} -> {now} (saved -> now). --fresh starts over"
        )


def origin() -> dict:
    """Where a result comes from: command, commit, versions, hardware."""
    git, commit = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"], ""
    with suppress(OSError):  # no git
        options = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = subprocess.run(git, **options).stdout.strip().replace("-dirty", " with changes")
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall("model name\\s*: (.*)", cpus) or [platform.processor()])[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "hardware": f"{os.cpu_count()} cores of {cpu}, {gpu}",
    }


def only_trains(name: str) -> bool:
    """Whether this part of an agent's state is not needed to play, so that exports lack it."""
    return name.endswith("optimizer") or name == "slow_value"


def load_agent(folder, script: str, args_type: type, agent_type: type, *device):
    """The agent that a run saved, agent_type(spec, args[, device]); RunError if that fails."""
    saved = checkpoint.load(folder, script)
    state = saved["agent"]
    try:
        args = args_type(**state["args"])
        if hasattr(args, "compile"):
            args.compile = "no"
        agent = agent_type(state["spec"], args, *map(pick_device, device))
        if exported := "exported" in saved:
            state = {k: x for k, x in agent.state_dict().items() if only_trains(k)} | state
        agent.load_state_dict(state)
        agent.folder, agent.step, agent.exported = Path(folder).absolute(), saved["step"], exported
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        text = f"the checkpoint in {folder} does not fit this code"
        raise RunError(f"{text}: {type(error).__name__}, {error}") from error
    return agent


# --- a run --------------------------------------------------------------------------------------


class Run:
    """One training in its folder: counters, checkpoints, log, and requests to stop.

    step: environment steps so far; updates: of the networks; owed: updates that come before the
    next step; reported: the step up to which all is logged; returns: of the episodes under way;
    evaluated: the step at which `finish` evaluated. A run is over when `done` (steps, unless the
    script counts something else) reaches `total`.
    Leaving the `with` block saves if an environment has failed; any other error leaves the last
    checkpoint as it is.
    """

    def __init__(self, script: str, args, agent, total: int | None = None):
        self.script, self.args, self.agent = script, args, agent
        self.step = self.done = self.updates = self.owed = self.reported = self.saves = 0
        self.evaluated = -1
        self.returns, self.latent = torch.zeros(()), None
        self.stateful, self.stop = {}, Stop()
        self.folder, self.saved = self.open()
        if self.saved:
            check_same_spec(args.env_id, self.saved["agent"]["spec"], agent.spec)
        if total is None:  # a smaller --steps must not shrink the replay of a longer run
            total = args.steps = max(args.steps, self.saved["step"] if self.saved else 0)
        self.total = total
        steps = getattr(args, "steps", None)  # pilco.py: no progress lines
        self.logger = Logger(self.folder, steps, args.tensorboard)

    def open(self) -> tuple[Path, dict | None]:
        """The run folder and its checkpoint, if there is one."""
        return open_folder(self.script, self.args, {"script": self.script, **args_dict(self.args)})

    def __enter__(self) -> "Run":
        self.stop.__enter__()
        return self

    def __exit__(self, kind, error, _):
        savable, failed = self.latent is not None, isinstance(error, EnvError)
        try:
            if savable and failed:
                self.save()
        finally:
            self.stop.__exit__()
            self.logger.close()
            if "envs" in self.stateful:
                self.stateful["envs"].close()
        if error is None and self.complete:
            say(f"everything is in {self.folder}")
        elif error is None or failed:
            again = ", and tries again what failed" if failed else ""
            say(f"{'saved' if savable else 'stopped'}; the same command resumes{again}")
        elif self.stop.requested and kind.__name__ == "InductorError":
            raise KeyboardInterrupt  # Ctrl-C has killed torch.compile's C++ compiler, too

    def resume(self, latent: TensorDict | None = None, **stateful) -> TensorDict | None:
        """Continue from the checkpoint, or write the first; returns the latent to go on from.

        stateful: what else to save and load, each with a state_dict. latent: the initial one.
        """
        # The logger last: if another part fails to load, metrics.jsonl is not cut off.
        self.stateful = {"agent": self.agent, **stateful, "logger": self.logger}
        for name, module in getattr(self.agent, "modules", {}).items():
            print(f"{sum(p.numel() for p in module.parameters()):14,} parameters in {name}")
        if self.saved:
            for name, part in self.stateful.items():
                part.load_state_dict(self.saved[name])
            for name in COUNTERS:
                setattr(self, name, self.saved[name])
            if latent is not None:
                latent = latent.copy_(TensorDict(self.saved["latent"], latent.batch_size))
            checkpoint.set_rng_state(self.saved["rng"])
        self.latent = latent
        if not self.saved:
            self.save()  # so metrics or replay without checkpoint.pt mean it was lost
        how = f"resumes at step {self.step:,}" if self.saved else "starts"
        print(f"{self.folder} on {getattr(self.agent, 'device', 'cpu')}: {how}")
        return latent

    def training(self, latent: TensorDict | None = None) -> bool:
        """Evaluate, log and save if it is time; False when the run is complete or has to stop.

        latent: what the agent goes on from; without one, the end or a stop saves nothing.
        """
        self.latent = latent
        if not self.owed:  # else later, after the updates still owed
            self.report()
        if not self.complete and not self.stopping():
            return True
        if latent is not None:
            self.save()
        self.stop.__exit__()  # from here on Ctrl-C ends the process at once
        return False

    @property
    def complete(self) -> bool:
        """Whether all steps and their updates are done."""
        return self.done >= self.total and not self.owed

    def stopping(self) -> bool:
        """Whether the user has asked to stop."""
        return self.stop.requested

    def report(self):
        """Evaluate, log and save, where a multiple of --...-every was passed."""
        if self.interval_passed("eval") and self.updates:
            seed = self.args.seed + 2_000_000 + self.step
            returns, _ = evaluate(self.agent, 1, seed)
            self.logger.log(self.step, **{"eval/return": returns[0]})
        if self.interval_passed("log"):
            self.logger.log(self.step, updates=self.updates)
        save = self.interval_passed("save")
        self.reported = self.step  # before save(), which stores it
        if save or ("replay" in self.stateful and self.stateful["replay"].exhausted):
            self.save()  # exhausted: the next rows could overwrite what the checkpoint needs

    def interval_passed(self, name: str) -> bool:
        """Whether a multiple of --{name}-every was passed since the last report (0: never)."""
        period = getattr(self.args, f"{name}_every", 0)
        return period > 0 and self.step // period > self.reported // period

    def count(self, rows: TensorDict):
        """Count a row of each environment, and log the return of every episode that ends there."""
        self.step += self.args.num_envs * self.args.action_repeat
        self.done = self.step
        self.returns = self.returns * ~rows["is_first"] + rows["reward"]
        for value in self.ended(rows):
            self.logger.log(self.step, **{"episode/return": value, "updates": self.updates})

    def ended(self, rows: TensorDict) -> list[float]:
        """The returns of the episodes that end in these rows."""
        return self.returns[rows["is_last"]].tolist()

    def owe(self, updates: int):
        """Note how many updates come before the next step."""
        self.owed = updates

    def batches(self, replay) -> Iterator[TensorDict]:
        """A batch for each update owed; none after a stop. Call `add` after each update."""
        while self.owed and not self.stopping():
            yield replay.sample().to(self.agent.device)

    def add(self, metrics: dict[str, Tensor]):
        """Count an update and log its metrics; RunError where one of them is not finite."""
        check_finite(metrics, self.updates + 1)  # before a save could replace the last good one
        self.updates, self.owed = self.updates + 1, self.owed - 1
        self.logger.add(self.step, metrics)

    def save(self):
        """Write the checkpoint."""
        checkpoint.save(self.folder, **self.state())
        mark_save(self.folder, self.saves)

    def state(self) -> dict:
        """Count a save and return what it holds."""
        self.saves += 1
        latent = {} if self.latent is None else self.latent.to_dict()
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {**self.stateful, **counters, "latent": latent, "rng": checkpoint.rng_state()}

    def finish(self):
        """If the run is complete: evaluate and film it once, and draw the learning curve."""
        if not self.complete:
            return
        if self.evaluated == self.step:
            print("already complete and evaluated: --eval plays more episodes")
        else:
            self.logger.log(self.step, last=True, **score(self.agent))
            self.evaluated = self.step
            Run.save(self)  # as film() may crash; self.save() waits for other ranks
            film(self.agent, self.folder, "policy")
        title = f"{self.script}  {self.args.env_id}  seed {self.args.seed}"
        print(f"learning curve: {plot_curve(self.folder, title)}")


def check_finite(metrics: dict[str, Tensor], updates: int):
    """RunError that names the losses, gradient norm or other metrics which are NaN or infinite."""
    if not torch.stack(list(metrics.values())).isfinite().all():  # one wait for a GPU, not twenty
        bad = [name for name, value in metrics.items() if not value.isfinite()]
        raise RunError(
            f"{', '.join(bad)} not finite at update {updates:,}. The last checkpoint is kept. "
            "Look at the scale of rewards and observations, or try a smaller learning rate"
        )


# --- evaluation ---------------------------------------------------------------------------------


@checkpoint.kept_rng()
def evaluate(agent, episodes: int, seed: int, video_size: int = 0):
    """Returns of episodes (cut after MAX_STEPS); with a video_size, frames [size, size, 3], too."""
    options = dict(num_envs=1, seed=seed, env_workers=False, video_size=video_size)
    try:
        envs = make_envs(agent.args, **options)
    except RunError as error:  # an EnvError makes Run save
        raise EnvError(f"no environment for the evaluation: {error}") from error
    returns, frames, filming = [], [], video_size > 0 and envs.can_render
    latent, total, length = None, 0.0, 0
    with closing(envs):
        check_same_spec(agent.args.env_id, agent.spec, envs.spec)
        torch.manual_seed(seed)
        while len(returns) < episodes:
            rows = envs.step(None if latent is None else latent["action"])
            latent = agent.act(rows, latent)
            total, length = total + rows["reward"].item(), length + 1
            if filming and len(frames) < MAX_FRAMES:
                try:
                    frames.append(envs.frame())
                except RunError as error:
                    print(f"the video ends after {len(frames)} frames: {error}")
                    filming = False
            cut = length == MAX_STEPS and not rows["is_last"].item()
            if cut:
                print(f"an episode was cut after {length:,} steps: it has no max_episode_steps?")
                envs.end_episodes()
            if cut or rows["is_last"].item():
                returns.append(total)
                total, length = 0.0, 0
    return returns, frames


def score(agent) -> dict[str, float]:
    """Play `eval_episodes` episodes; print their returns, and return the mean and the spread."""
    returns, _ = evaluate(agent, agent.args.eval_episodes, agent.args.seed + 1_000_000)
    mean, std = float(np.mean(returns)), float(np.std(returns))
    print(f"return {mean:.1f} +- {std:.1f} over {len(returns)} episodes")
    print("returns", *(f"{x:.1f}" for x in returns), flush=True)
    return {"eval/return": mean, "eval/return_std": std}


def film(agent, folder: Path, name: str):
    """Play the first episode of `score` again and write its video, or print why not."""
    try:
        _, frames = evaluate(agent, 1, agent.args.seed + 1_000_000, video_size=256)
        if not frames:
            raise RunError(f"{agent.args.env_id} cannot be rendered")
        path = write_video(folder, name, np.stack(frames), getattr(agent, "fps", 30))
        print(f"video of the first episode: {path}")
    except (Exception, SystemExit) as error:
        print(f"no video: {error}")


def evaluate_run(agent, args):
    """--eval: play --eval-episodes episodes with a run's last checkpoint, and film the first."""
    agent.args = replace(agent.args, eval_episodes=args.eval_episodes)
    print(f"the policy at step {agent.step:,}")
    score(agent)
    film(agent, output_folder(agent), "eval")


def output_folder(agent) -> Path:
    """Where to put pictures of a run: its folder or, if that must stay as it is, one in runs/."""
    folder, writable = agent.folder, os.access(agent.folder, os.W_OK)
    if writable and not agent.exported:
        return folder
    other = Path("runs", "-".join(folder.parts[1:][-3:])).absolute()  # dreamer_v3-Pendulum-v1-seed0
    why = "an exported agent" if writable else "read-only"
    print(f"{folder} is {why}: what is drawn goes to {other}")
    return other
