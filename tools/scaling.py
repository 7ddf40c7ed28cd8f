"""How time and memory grow: an update of dreamer_v3.py with its size, a replay with its rows.

    python -m tools.scaling
    python -m tools.scaling --sizes 1m --kinds vector --rows 10000 1000000

Prints the tables of docs/dreamer_v3.md, which explains the columns. Linux, on the CPU, not
compiled; other flags as in --preset dmc_proprio, for a replay with --size 1m. Each measurement has
a process of its own, so that its memory is its own.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from re import search
from resource import RUSAGE_SELF, getrusage
from shutil import disk_usage
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal

import torch
import tyro
from tensordict import TensorDict

import dreamer_v3
from common.checkpoint import RunError
from common.envs import LATENTS, example_rows
from common.replay import Replay, row_bytes, with_previous
from common.run import launch, origin, prepare

SHAPES = {  # of observations: those of walker-walk, and an image
    "vector": {"orientations": (14,), "height": (1,), "velocity": (9,)},
    "pixels": {"pixels": (64, 64, 3)},
}
EPISODE = 101  # rows, as in Pendulum-v1 with action repeat 2
UPDATE = {"parameters": ",", "update, s": ".2f", "peak memory, GB": ".2f"}  # column: format
REPLAY = {
    "files, GB": ".3f", "append, ms": ".2f", "batch, ms": ".1f", "read for it, MB": ".2f",
    "write_back, ms": ".1f", "batch in episodes, ms": ".1f", "save, ms": ".1f",
    "checkpoint, MB": ".2f", "memory, GB": ".2f", "load, ms": ".1f", "batch from disk, ms": ".1f",
}  # fmt: skip


def memory(name: str) -> float:
    """GB of this process. VmHWM: its peak; RssAnon: without the files in the page cache."""
    return int(search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def timed(function, repeats: int = 1) -> tuple:
    """(median milliseconds of a call, what the last one returned)."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        result = function()
        times.append(1e3 * (perf_counter() - start))
    return median(times), result


def make_agent(kind: str, args) -> tuple[dreamer_v3.Agent, TensorDict]:
    """An agent for observations of this kind, and a row of its replay."""
    prepare("scaling", args)
    spec = dict(shapes=SHAPES[kind], categories={}, action_dim=6, classes=[])
    agent = dreamer_v3.Agent(spec, args)
    return agent, agent.stored_rows(example_rows(spec), agent.initial(1))[0]


def noise(example: TensorDict, *shape: int) -> TensorDict:
    """Rows [*shape] of numbers from 0 to 255, which no disk can compress; flags are False."""

    def draw(x):
        return (torch.rand(*shape, *x.shape) * 255 * (x.dtype != torch.bool)).to(x.dtype)

    return example.apply(draw, batch_size=shape)


def measure_update(kind: str, args, updates: int) -> tuple:
    """The columns of UPDATE."""
    agent, example = make_agent(kind, args)
    batch = with_previous(noise(example, args.batch_size, args.batch_length + 1))
    agent.update(batch)
    ms, _ = timed(lambda: agent.update(batch), updates)
    params = agent.optimizer.param_groups[0]["params"]
    return sum(p.numel() for p in params), ms / 1e3, memory("VmHWM")


def open_replay(kind: str, args, rows: int, folder: Path) -> tuple[Replay, TensorDict]:
    """A replay and one of its rows."""
    example, path = make_agent(kind, args)[1], folder / "replay"
    need = rows * row_bytes(example) / 1e9
    if need > (free := disk_usage(folder).free / 1e9) and not path.exists():
        raise RunError(f"needs {need:.1f} GB of disk, {free:.1f} are free")
    options = dict(batch_size=args.batch_size, online=True)
    length = args.batch_length + 1
    return Replay(example, rows, args.num_envs, length, path, **options), example


def measure_replay(kind: str, args, rows: int, folder: Path) -> tuple:
    """A full ring that this process has written: the page cache holds what it can."""
    replay, row = open_replay(kind, args, rows, folder)
    some, new = noise(row, min(rows, 5000)), noise(row, args.num_envs)
    for key, leaf in replay.storage.items():
        for part in leaf.split(len(some)):
            part.copy_(some[key][: len(part)])
    os.sync()  # else what is measured waits for these writes
    for leaf in replay.storage.values():  # touches each page, as some may have left the cache
        leaf.flatten()[:: 4096 // leaf.itemsize].sum()
    replay.current.random_(2)  # as after many calls of write_back
    replay.total = replay.saved_total = replay.capacity
    append = timed(lambda: [replay.append(new) for _ in range(20)], 50)[0] / 20
    replay.queue.clear()  # else batches begin with the newest windows
    for first in range(replay.oldest, replay.total - EPISODE + 1, EPISODE):
        replay.ended += [(env, first, EPISODE) for env in range(args.num_envs)]
    before = getrusage(RUSAGE_SELF).ru_inblock  # read from the disk, in units of 512 bytes
    sample, batch = timed(replay.sample, 50)
    read = (getrusage(RUSAGE_SELF).ru_inblock - before) / 50 * 512 / 1e6
    index = iter([replay.sample()["index"] for _ in range(50)])
    latents = noise(row.select(*LATENTS), *batch.shape).float()
    write_back, _ = timed(lambda: replay.write_back({"index": next(index)}, latents), 50)
    replay.episodes = True  # as for dreamer.py, which lists the episodes after an append
    in_episodes, _ = timed(lambda: (replay.append(new), replay.sample()), 50)
    checkpoint = folder / "checkpoint.pt"
    save, _ = timed(lambda: torch.save(replay.state_dict(), checkpoint))
    size = sum(path.stat().st_size for path in replay.directory.iterdir()) / 1e9
    values = size, append, sample, read, write_back, in_episodes, save
    return *values, checkpoint.stat().st_size / 1e6, memory("RssAnon")


def measure_reopened(kind: str, args, rows: int, folder: Path) -> tuple:
    """The same ring after a restart of the machine: nothing is in the page cache."""
    os.sync()
    for path in (folder / "replay").iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    replay, _ = open_replay(kind, args, rows, folder)
    read = dict(f=folder / "checkpoint.pt", weights_only=True)
    load, _ = timed(lambda: replay.load_state_dict(torch.load(**read)))
    return load, timed(replay.sample, 20)[0]


def replay_lines(kind: str, args, rows: Iterable[int], folder: Path) -> Iterable[tuple]:
    """For print_table; the files of a line are deleted before the next one."""
    for count in rows:
        with TemporaryDirectory(dir=folder) as place:
            inputs = kind, args, count, Path(place)
            yield f"{count:,}", (measure_replay, *inputs), (measure_reopened, *inputs)


def print_table(title: str, columns: dict, lines: Iterable[tuple]):
    """A line is (label, call, ...); each call (function, argument, ...) runs in a new process."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}", flush=True)
    for label, *calls in lines:
        values = []
        try:
            for call in calls:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    values += pool.submit(*call).result()
            text = " | ".join(map(format, values, columns.values()))
        except (RunError, RuntimeError, MemoryError) as error:  # of torch, or the process died
            text = f"not run: {error}".partition("\n")[0]
        print(f"| {label} | {text} |", flush=True)


def main(
    sizes: tuple[Literal[*dreamer_v3.SIZES], ...] = ("1m", "12m", "25m"),
    rows: tuple[int, ...] = (10_000, 1_000_000, 5_000_000),
    kinds: tuple[Literal[*SHAPES], ...] = ("vector", "pixels"),
    updates: int = 3,  # timed, after one that is not
    folder: Path = Path("runs"),  # on the disk that holds one replay at a time
):
    flags = "--preset", "dmc_proprio", "--compile", "no", "--device", "cpu", "--size"
    args = {size: dreamer_v3.parse_args([*flags, size]) for size in {*sizes, "1m"}}
    if updates < 1 or min(rows, default=10_000) < 10_000:
        raise RunError("--updates must be at least 1, --rows at least 10000")
    if not Path("/proc/self/status").exists():
        raise RunError("tools.scaling measures memory as only Linux does")
    folder.mkdir(parents=True, exist_ok=True)
    print(*(f"{key}: {value}" for key, value in origin().items()), sep="\n")
    for kind in kinds:
        lines = [(size, (measure_update, kind, args[size], updates)) for size in sizes]
        print_table(f"{kind}: size", UPDATE, lines)
    for kind in kinds:
        print_table(f"{kind}: rows", REPLAY, replay_lines(kind, args["1m"], rows, folder))


if __name__ == "__main__":
    launch(lambda: tyro.cli(main, prog="python -m tools.scaling", description=__doc__))
