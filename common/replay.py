"""Sequences of rows on memory-mapped files, with latents written back and an exact resume."""

import os
import shutil
from collections import deque
from math import ceil
from os.path import isdir  # unlike Path.is_dir, False where a name is too long
from pathlib import Path

import psutil
import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from common.checkpoint import NO_ACCESS, RunError
from common.envs import LATENTS


def _memory_map(path: Path, leaf: Tensor, readonly: bool) -> MemoryMappedTensor:
    """A file that holds `leaf`, created or grown; RunError if the disk cannot hold it."""
    if readonly:
        return MemoryMappedTensor.from_filename(path, leaf.dtype, leaf.shape, mode="r")
    path.touch()  # never truncate: a start with wrong flags must not lose the rows
    with path.open("r+b") as file:
        try:  # a full disk or quota is an error here, not a bus error later
            os.posix_fallocate(file.fileno(), 0, leaf.nbytes)
        except (AttributeError, OSError) as error:  # not on every system: sparse files there
            if getattr(error, "errno", None) in NO_ACCESS:
                text = f"no room for {path} ({error.strerror})"
                raise RunError(f"{text}: choose a smaller --replay-size") from error
    return MemoryMappedTensor.from_filename(path, leaf.dtype, leaf.shape)


def lost_error(keys: list[str]) -> RunError:
    """For a run whose files of these keys are gone or too short."""
    text = f"the run's replay/ lacks {', '.join(keys)}, or a part of it"
    return RunError(f"{text}: put it back, or start over with --fresh")


def with_previous(rows: TensorDict) -> TensorDict:
    """Rows [B, T + 1] -> the last T; their `previous` [B, T] is the action and latents before each.

    The rows lose their own latents: the model computes them again.
    """
    previous = rows[:, :-1].select("action", *LATENTS, strict=False)
    return rows[:, 1:].exclude(*LATENTS).set("previous", previous)


def replay_rows(args) -> tuple[int, int]:
    """(capacity, slack), see Replay: room for `steps` at most; slack 0 if all fit.

    RunError if a window does not fit.
    """
    per_row = args.num_envs * args.action_repeat  # environment steps per row of each environment
    needed = args.num_envs * (ceil(args.steps / per_row) + args.batch_length + 1)  # and a window
    capacity = min(args.replay_size, needed)
    if capacity // args.num_envs < args.batch_length + 1:
        have = f"{capacity // args.num_envs} rows for each of {args.num_envs} environments"
        raise RunError(f"{have} hold no window of --batch-length + 1: raise --replay-size")
    return capacity, ceil(args.save_every / per_row) + 1 if capacity < needed else 0


def row_bytes(example: TensorDict) -> int:
    """The size of a row in the files, which have two slots for each latent."""
    return sum(leaf.nbytes * (1 + (key in LATENTS)) for key, leaf in example.items())


def check_room(args, example: TensorDict, folder: Path):
    """RunError if the disk cannot hold the replay, or the memory a batch; touches no folder."""
    capacity, slack = replay_rows(args)
    row = row_bytes(example)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if isdir(path))
    found = folder.rglob("replay/*") if isdir(folder) else ()
    need = row * (capacity + args.num_envs * slack) - sum(path.stat().st_size for path in found)
    need, free = need / 1e9, shutil.disk_usage(place).free / 1e9
    if need > free:
        text = f"the replay needs {need:.2f} GB more, only {free:.2f} are free in {place}"
        raise RunError(f"{text}: choose a smaller --replay-size, --steps or --save-every")
    need = row * args.batch_size * args.batch_length * (1 + args.imagination_horizon) / 1e9
    most = psutil.virtual_memory().total / 1e9
    if need > most:
        ways = "choose a smaller --batch-size, --batch-length or --imagination-horizon"
        raise RunError(f"a batch with its dreams needs {need:.0f} GB of {most:.0f}: {ways}")


def make_replay(args, example: TensorDict, folder: Path, **options) -> "Replay":
    """The replay of a run. args: the script's flags; example, options: see Replay.

    Prints the size.
    """
    capacity, slack = replay_rows(args)
    length, directory = args.batch_length + 1, folder / "replay"
    options |= dict(batch_size=args.batch_size, slack=slack, seed=args.seed)
    replay = Replay(example, capacity, args.num_envs, length, directory, **options)
    size = sum(leaf.nbytes for leaf in replay.storage.values()) / 1e9
    print(f"{size:14.3f} GB for a replay of {capacity:,} rows")
    return replay


class Replay:
    """A ring of the last capacity // N rows of each of N = `num_envs` environments in lockstep.

    Row r of environment e, counted from 0, lies at (r % allocated) * N + e, so a resumed run may
    enlarge the ring until it first wraps around. A process killed at any moment resumes exactly at
    its checkpoint. For that, the files keep `slack` more rows of each environment than can be
    drawn, and `write_back` fills, of a row's two slots, the one no checkpoint uses. Save when
    `exhausted`; slack=0: exact only until the ring is full. Nothing is flushed: a power
    failure can lose what the system had not written to the disk.

    example: one row without a batch dimension, with `is_first`, `is_last` and all other keys.
    updatable: the keys for `write_back`, if in `example`. online: draw new windows first, once.
    episodes: draw a finished episode, then a window in it, with `last_window` also the one at its
    end. readonly: the files stay as they are, what is written is not kept.
    RunError if the disk is full.
    """

    def __init__(self, example: TensorDict, capacity: int, num_envs: int, length: int, directory,
                 *, batch_size=16, updatable=LATENTS, slack=0, seed=0,
                 online=False, episodes=False, last_window=False, readonly=False):  # fmt: skip
        self.num_envs, self.length, self.batch_size = num_envs, length, batch_size
        self.online, self.episodes, self.last_window = online, episodes, last_window
        self.capacity = capacity // num_envs  # rows of one environment
        self.allocated = self.capacity + slack  # rows of one environment in the files
        self.updatable = [key for key in example.keys() if key in updatable]
        self.layout = dict(num_envs=num_envs, capacity=self.capacity, allocated=self.allocated)
        self.layout |= dict(length=length, updatable=", ".join(self.updatable))
        self.layout |= {key: f"{leaf.dtype} {list(leaf.shape)}" for key, leaf in example.items()}
        rows = num_envs * self.allocated
        leaves = {  # two slots for each row of what is updatable
            key: leaf.expand(rows * (1 + (key in updatable)), *leaf.shape)
            for key, leaf in example.items()
        }
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        sizes = {path.name: path.stat().st_size for path in self.directory.iterdir()}
        self.found = {key: sizes.get(key, 0) for key in leaves}  # bytes
        if readonly and (lost := [k for k, leaf in leaves.items() if self.found[k] < leaf.nbytes]):
            raise lost_error(lost)
        self.storage = {k: _memory_map(self.directory / k, x, readonly) for k, x in leaves.items()}
        self.current = torch.zeros(rows, dtype=torch.uint8)  # slot in use
        self.saved = self.current.clone()  # slot that the last checkpoint refers to
        self.total = self.saved_total = 0  # rows of each environment: now, at the last save
        self.queue = deque()  # (environment, first row) of the new windows, oldest first
        self.listed = torch.empty(0, 3, dtype=torch.int64)  # what `finished` returned last
        self.ended = []  # (environment, first row, rows) of the episodes finished since then
        self.begun = [0] * num_envs  # first row of the episodes under way
        self.long_known_at = None  # `total` when `long_episodes` was computed
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def oldest(self) -> int:
        """The first row of each environment that can be drawn."""
        return max(0, self.total - self.capacity)

    @property
    def rows(self) -> int:
        """Rows that can be drawn, of all environments together."""
        return self.num_envs * (self.total - self.oldest)

    @property
    def exhausted(self) -> bool:
        """Whether the next append overwrites a row of the last checkpoint."""
        row, first = self.total - self.allocated, max(0, self.saved_total - self.capacity)
        return self.saved_total > 0 and self.allocated > self.capacity and row >= first

    def __len__(self) -> int:
        """Number of windows that can be drawn."""
        return self.num_envs * max(0, self.total - self.oldest - self.length + 1)

    @property
    def ready(self) -> bool:
        """Whether there is enough to draw: a long episode, or batch_size * (length - 1) windows."""
        if self.episodes:
            return len(self.long_episodes()) > 0
        return len(self) >= self.batch_size * (self.length - 1)

    def append(self, row: TensorDict):
        """Add one row of each environment: TensorDict[N] with the keys of `example`."""
        assert set(row.keys()) == set(self.storage.keys()), (row, self.layout)
        where = self.total % self.allocated * self.num_envs + torch.arange(self.num_envs)
        for key, leaf in self.storage.items():
            slot = where * 2 if key in self.updatable else where
            leaf.index_copy_(0, slot, row[key].detach().to(leaf))
        # The last checkpoint does not refer to the row that was here (see slack): slot 0 is free.
        self.current[where] = self.saved[where] = 0
        if self.online and self.total and self.total % self.length == 0:
            first = self.total - self.length + 1
            self.queue.extend((env, first) for env in range(self.num_envs))
        for env in row["is_first"].nonzero()[:, 0].tolist():
            self.begun[env] = self.total
        for env in row["is_last"].nonzero()[:, 0].tolist():
            self.ended.append((env, self.begun[env], self.total + 1 - self.begun[env]))
        self.total += 1
        while self.queue and self.queue[0][1] < self.oldest:
            self.queue.popleft()

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A batch of rows TensorDict[B, length - 1], each with the row before it: `with_previous`.

        "index" [B, length - 1, 2] has (environment, row), for `write_back`.
        """
        size = batch_size or self.batch_size
        return with_previous(self.draw_in_episodes(size) if self.episodes else self.draw(size))

    def draw(self, batch_size: int) -> TensorDict:
        """Windows [B, length]: new ones first, in order (`online`), then uniform draws.

        A window may cross episodes. ValueError if there is none.
        """
        if not len(self):
            raise ValueError(f"no window of {self.length} rows in {self.rows} rows")
        fresh = [self.queue.popleft() for _ in range(min(batch_size, len(self.queue)))]
        per_env = len(self) // self.num_envs
        number = torch.randint(len(self), [batch_size - len(fresh)], generator=self.generator)
        drawn = torch.stack([number // per_env, self.oldest + number % per_env], -1)
        starts = torch.cat([torch.tensor(fresh, dtype=torch.int64).view(-1, 2), drawn])  # [B, 2]
        return self.windows(starts)

    def finished(self) -> Tensor:
        """(environment, first row, rows) [K, 3] of the finished episodes in the ring."""
        ended = torch.tensor(self.ended, dtype=torch.int64).view(-1, 3)
        episodes, self.ended = torch.cat([self.listed, ended]), []
        _, first, rows = episodes.unbind(-1)
        self.listed = episodes[first + rows > self.oldest]
        return self.listed

    def long_episodes(self) -> Tensor:
        """Those of the `finished` episodes that hold a window."""
        if self.long_known_at != self.total:
            episodes = self.finished()
            _, first, rows = episodes.unbind(-1)
            self.long = episodes[(first >= self.oldest) & (rows >= self.length - self.last_window)]
            self.long_known_at = self.total
        return self.long

    def draw_in_episodes(self, batch_size: int) -> TensorDict:
        """Draw an episode, then length - 1 rows of it, as Dreamer (2020) does: [B, length].

        Row 0 is the row before them: of another episode, or empty, if they begin one.
        RunError if no episode is long enough.
        """
        episodes = self.long_episodes()
        if not len(episodes):
            least = self.length - self.last_window
            text = f"the replay holds no whole episode of {least} rows or more"
            ways = "a larger --prefill or --replay-size, or a smaller --batch-length (with --fresh)"
            raise RunError(f"{text}: try {ways}")
        draw = torch.randint(len(episodes), [batch_size], generator=self.generator)
        env, first, rows = episodes[draw].unbind(-1)
        choices = rows - (self.length - 1) + self.last_window
        offset = (torch.rand(batch_size, generator=self.generator) * choices).long()
        return self.windows(torch.stack([env, first + offset - 1], -1))

    def windows(self, starts: Tensor) -> TensorDict:
        """Copies of the windows that begin at (environment, row) [B, 2], with their "index".

        is_first is set on row 0, is_last before an is_first.
        """
        index = starts[:, None].repeat(1, self.length, 1)  # [B, length, 2]
        index[..., 1] += torch.arange(self.length)
        where = (index[..., 1] % self.allocated * self.num_envs + index[..., 0]).flatten()
        live = where * 2 + self.current[where].long()
        # index_select copies whole rows: six times as fast as indexing where rows are pictures.
        batch = TensorDict({}, [len(where)])
        for key, leaf in self.storage.items():
            batch[key] = leaf.index_select(0, live if key in self.updatable else where)
        batch = batch.view(len(starts), self.length)
        batch["is_first"][:, 0] = True
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]  # an abandoned episode ends here
        return batch.set("index", index)

    def write_back(self, batch: TensorDict, latents: TensorDict):
        """Replace the updatable keys of a batch's rows by those of `latents`, both [B, T].

        Rows that have left the ring are skipped; of a row that occurs twice, the last one counts.
        """
        env, row = batch["index"].flatten(0, 1).cpu().unbind(-1)
        kept = (row >= self.oldest).nonzero()[:, 0]
        where = (row % self.allocated * self.num_envs + env)[kept]
        # Two writes to one row have no fixed order in torch: keep the last one of each row.
        where, group = where.unique(return_inverse=True)
        latest = torch.zeros_like(where).scatter_reduce_(0, group, kept, "amax")
        spare = 1 - self.saved[where]
        for key in self.updatable:
            leaf, value = self.storage[key], latents[key].detach().flatten(0, 1)[latest]
            leaf.index_copy_(0, where * 2 + spare.long(), value.to(leaf))
        self.current[where] = spare

    def state_dict(self) -> dict:
        """What the files do not hold. From now on the files keep the rows that it refers to.

        So call it only for a checkpoint that is written before the next append or write_back.
        """
        self.saved_total = self.total
        self.saved.copy_(self.current)
        return {
            "layout": self.layout,
            "total": self.total,
            "queue": torch.tensor(self.queue, dtype=torch.int64).view(-1, 2),
            "finished": self.finished(),
            "begun": list(self.begun),
            "current": self.current[: self.total * self.num_envs].clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict):
        """Continue from a checkpoint; RunError if its files are gone or of another layout.

        A larger capacity is accepted until the smaller ring has wrapped around.
        """
        saved, lost = state["layout"], []
        for key, size in self.found.items():
            if size < self.storage[key].nbytes * saved["allocated"] // self.allocated:
                os.truncate(self.directory / key, size)  # undo growth, so the next start notices
                lost.append(key)
        may_grow = state["total"] <= min(saved["allocated"], self.capacity)
        for name in self.layout | saved:
            theirs, ours = saved.get(name), self.layout.get(name)
            if theirs != ours and not (may_grow and name in ("capacity", "allocated")):
                raise RunError(f"replay: {name} is {theirs} in the checkpoint, {ours} here")
        if lost:
            raise lost_error(lost)
        self.total = self.saved_total = state["total"]
        self.queue = deque(map(tuple, state["queue"].tolist() if self.online else ()))
        self.listed, self.ended = state["finished"], []
        self.begun, self.long_known_at = list(state["begun"]), None
        self.current[: len(state["current"])] = state["current"]
        self.saved.copy_(self.current)
        self.generator.set_state(state["generator"])
