"""The replay against a plain-list model, and after its process is killed."""

import copy
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import running
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from common.checkpoint import RunError
from common.replay import Replay, check_room, make_replay, with_previous
from tools.dream_env import saved_replay
from tools.offline import copy_rows

EXAMPLE = TensorDict(
    observation=torch.zeros(3),
    pixels=torch.zeros(4, 4, 3, dtype=torch.uint8),
    belief=torch.zeros(2, dtype=torch.float16),
    state=torch.zeros(2, dtype=torch.uint8),
    is_first=torch.zeros((), dtype=torch.bool),
    is_last=torch.zeros((), dtype=torch.bool),
)
PLAIN = EXAMPLE.exclude("belief", "state", "pixels")


def make_row(row, num_envs, first=False, latent=0):
    """The row that the tests append: observation = (env, row, 1), pixels follow the row."""
    env = torch.arange(num_envs)
    number = torch.full_like(env, row)
    observation = torch.stack([env, number, torch.ones_like(env)], -1).float()
    return TensorDict(
        observation=observation,
        pixels=((number + env) % 256).byte()[:, None, None, None].expand(-1, 4, 4, 3),
        belief=torch.full((num_envs, 2), latent, dtype=torch.float32),
        state=torch.full((num_envs, 2), latent % 256),
        is_first=torch.full((num_envs,), first),
        is_last=torch.zeros(num_envs, dtype=torch.bool),
        batch_size=[num_envs],
    )


def fill(replay, rows, **options):
    """Append `rows` rows with the keys of this replay."""
    for _ in range(rows):
        row = make_row(replay.total, replay.num_envs, **options)
        replay.append(row.select(*replay.storage.keys()))


def batch_at(index):
    """The part of a batch that write_back reads: the rows `index` [B, T, 2]."""
    return TensorDict(index=index, batch_size=index.shape[:2])


def latents(index, value):
    """Values for write_back at `index`, in wider dtypes than the stored ones."""
    belief = torch.as_tensor(value).float().expand(index.shape[:2])[..., None].expand(-1, -1, 2)
    return TensorDict(belief=belief, state=belief.long() % 256, batch_size=index.shape[:2])


class Model:
    """What the replay promises, with Python lists only (and the same random draws)."""

    def __init__(self, num_envs, capacity, length, seed):
        self.num_envs, self.keep, self.length = num_envs, capacity // num_envs, length
        self.first, self.latent, self.queue = [], {}, []  # is_first of row r; latent of (env, r)
        self.seed, self.random = seed, torch.Generator().manual_seed(seed).get_state()

    @property
    def oldest(self):
        return max(0, len(self.first) - self.keep)

    def pairs(self):
        starts = range(self.oldest, len(self.first) - self.length + 1)
        return [(env, start) for env in range(self.num_envs) for start in starts]

    def append(self, first, latent):
        row = len(self.first)
        self.first.append(first)
        self.latent.update({(env, row): latent for env in range(self.num_envs)})
        if row >= self.length and row % self.length == 0:
            self.queue += [(env, row - self.length + 1) for env in range(self.num_envs)]

    def draw(self, batch_size):
        fresh = [pair for pair in self.queue if pair[1] >= self.oldest]
        self.queue, fresh = fresh[batch_size:], fresh[:batch_size]
        pairs, generator = self.pairs(), torch.Generator()
        generator.set_state(self.random)
        draws = torch.randint(len(pairs), [batch_size - len(fresh)], generator=generator)
        self.random = generator.get_state()
        return fresh + [pairs[i] for i in draws.tolist()]

    def check(self, batch, windows):
        for b, (env, start) in enumerate(windows):
            rows = list(range(start, start + self.length))
            assert batch["index"][b].tolist() == [[env, row] for row in rows]
            assert batch["observation"][b].tolist() == [[env, row, 1] for row in rows]
            assert batch["pixels"][b, :, 3, 1, 2].tolist() == [(env + row) % 256 for row in rows]
            expected = [self.latent[env, row] for row in rows]
            assert batch["belief"][b].tolist() == [[value, value] for value in expected]
            assert batch["state"][b].tolist() == [[value % 256] * 2 for value in expected]
            first = [True] + [self.first[row] for row in rows[1:]]
            assert batch["is_first"][b].tolist() == first
            assert batch["is_last"][b].tolist() == [*first[1:], False]

    def check_sample(self, batch, windows):
        """Rows 1, 2, ... of a window, each with the latents of the row before it."""
        assert set(batch.keys()) == {*PLAIN.keys(), "pixels", "index", "previous"}
        assert batch.shape == batch["previous"].shape == (len(windows), self.length - 1)
        for b, (env, start) in enumerate(windows):
            rows = list(range(start + 1, start + self.length))
            assert batch["index"][b].tolist() == [[env, row] for row in rows]
            assert batch["observation"][b].tolist() == [[env, row, 1] for row in rows]
            before = [self.latent[env, row - 1] for row in rows]
            previous = batch["previous"][b]
            assert previous["belief"].tolist() == [[value, value] for value in before]
            assert previous["state"].tolist() == [[value % 256] * 2 for value in before]
            first = [self.first[row] for row in rows]
            assert batch["is_first"][b].tolist() == first
            assert batch["is_last"][b].tolist() == [*first[1:], False][: len(rows)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.lists(st.sampled_from("aaaasbwwkc"), min_size=8, max_size=60),
)
def test_replay_equals_a_list_model(num_envs, length, extra, slack, seed, actions):
    """Random appends, draws, write-backs, checkpoints and crashes give what lists give."""
    rng = random.Random(seed)
    capacity = num_envs * (length + extra) + rng.randrange(num_envs)
    shape = (EXAMPLE, capacity, num_envs, length)
    with tempfile.TemporaryDirectory() as directory:
        replay, model = (
            Replay(*shape, directory, slack=slack, seed=seed, online=True),
            Model(num_envs, capacity, length, seed),
        )
        checkpoint, latent = None, 0

        def save():
            torch.save(replay.state_dict(), f"{directory}/checkpoint.pt")
            return copy.deepcopy(model)

        for action in actions:
            if action == "a":
                for _ in range(rng.randrange(1, 2 * length + 4)):
                    checkpoint = save() if replay.exhausted else checkpoint
                    latent, first = latent + 1, rng.random() < 0.2
                    fill(replay, 1, first=first, latent=latent)
                    model.append(first, latent)
            elif action == "s" and len(replay):
                batch_size = rng.randrange(1, 7)
                model.check(replay.draw(batch_size), model.draw(batch_size))
            elif action == "b" and len(replay):
                batch_size = rng.randrange(1, 7)
                model.check_sample(replay.sample(batch_size), model.draw(batch_size))
            elif action == "w" and replay.total:
                low = max(0, replay.total - replay.allocated - 2)  # some have left the ring
                index = torch.tensor(
                    [
                        [[rng.randrange(num_envs), rng.randrange(low, replay.total)]] * 2
                        for _ in range(rng.randrange(1, 30))
                    ]
                )
                value = latent + 1 + torch.arange(index[..., 0].numel()).view(index.shape[:2])
                replay.write_back(batch_at(index), latents(index, value))
                latent = int(value.max())
                for (env, row), new in zip(
                    index.flatten(0, 1).tolist(), value.flatten().tolist(), strict=True
                ):
                    if row >= model.oldest:
                        model.latent[env, row] = new
            elif action == "k":
                checkpoint = save()
            elif action == "c":  # crash: only the files and the checkpoint are left
                model = copy.deepcopy(checkpoint) or Model(num_envs, capacity, length, seed)
                replay = Replay(*shape, directory, slack=slack, seed=seed, online=True)
                if checkpoint:
                    state = torch.load(f"{directory}/checkpoint.pt", weights_only=True)
                    replay.load_state_dict(state)
            latent %= 1000  # exact in float16
            assert replay.total == len(model.first)
            assert len(replay) == len(model.pairs())
            assert replay.rows == num_envs * (len(model.first) - model.oldest)
        if len(replay):
            model.check(replay.draw(20), model.draw(20))


@pytest.mark.parametrize(("num_envs", "gate"), [(1, 1088), (16, 128)])
def test_first_batch_is_the_queue(tmp_path, num_envs, gate):
    """1,024 windows take 1,088 rows, or 128 rows of 16 environments."""
    replay = Replay(PLAIN, 100_000, num_envs, 65, tmp_path, batch_size=16, online=True)
    while not replay.ready:
        assert len(replay) < 1024
        fill(replay, 1)
    assert replay.total == gate and len(replay) == 1024
    windows = replay.draw(16)["index"][:, 0].tolist()
    if num_envs == 1:
        assert windows == [[0, 1 + 65 * i] for i in range(16)]
    else:
        assert windows == [[env, 1] for env in range(16)]
    assert not replay.queue
    second = replay.draw(16)["index"][:, 0].tolist()
    assert second != windows and len(second) == 16


def test_online_can_be_switched_off(tmp_path):
    replay = Replay(PLAIN, 1000, 2, 5, tmp_path, online=False)
    fill(replay, 100)
    assert not replay.queue and replay.draw(4).shape == (4, 5)


@pytest.mark.parametrize("rows", [30, 57, 100])  # before, just after and long after wrapping
def test_starts_are_uniform_and_never_cross_the_write_head(tmp_path, rows):
    """By chi-square over every (environment, start)."""
    replay = Replay(PLAIN, 150, 3, 7, tmp_path, slack=4, seed=5, online=False)
    fill(replay, rows)
    oldest = max(0, rows - 50)
    starts = rows - oldest - 7 + 1
    assert len(replay) == 3 * starts
    batch = replay.draw(60_000)
    index = batch["index"]
    assert (batch["observation"][..., :2] == index).all()
    assert (index[:, 1:, 1] - index[:, :-1, 1] == 1).all() and (
        index[..., 0] == index[:, :1, 0]
    ).all()
    assert index[..., 1].min() == oldest and index[..., 1].max() == rows - 1
    counts = torch.bincount(index[:, 0, 0] * starts + index[:, 0, 1] - oldest, minlength=3 * starts)
    expected = 60_000 / len(replay)
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = len(replay) - 1
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


def append_episodes(lengths, replay):
    """Append episodes of these lengths, a list for each environment, in lockstep."""
    flags = [[(t == 0, t == n - 1) for n in lines for t in range(n)] for lines in lengths]
    for flag in zip(*flags, strict=False):
        row = make_row(replay.total, replay.num_envs)
        row["is_first"], row["is_last"] = torch.tensor(flag).unbind(-1)
        replay.append(row.select(*replay.storage.keys()))


@pytest.mark.parametrize("reopened", [False, True])
def test_windows_of_episodes(tmp_path, reopened):
    """Uniform over long enough episodes; starts in [0, rows - T), so never the last window."""
    length = 5  # the row before the window and T = 4
    lengths = [[3, 9, 5, 4, 6, 12, 2, 11], [20, 4, 5, 7, 16]]
    replay = Replay(PLAIN, 80, 2, length, tmp_path, slack=4, seed=5, online=False)
    append_episodes(lengths, replay)
    if reopened:
        state = replay.state_dict()
        replay = Replay(PLAIN, 80, 2, length, tmp_path, slack=4, seed=5, online=False)
        replay.load_state_dict(state)
    oldest, expected = replay.total - 40, {}
    for env, lines in enumerate(lengths):
        first = 0
        for n in lines:
            if n > 4 and first >= oldest and first + n <= replay.total:
                expected |= {(env, first + k): 1 / (n - 4) for k in range(n - 4)}
            first += n
    whole = round(sum(expected.values()))  # of 13; the others are too short or overwritten
    assert whole == 7 and oldest > 0
    draws = 40_000
    index = replay.draw_in_episodes(draws)["index"]
    assert index.shape == (draws, 5, 2) and (index.diff(dim=1)[..., 1] == 1).all()
    starts = torch.unique(index[:, 1], dim=0, return_counts=True)
    counts = {
        tuple(place): n for place, n in zip(starts[0].tolist(), starts[1].tolist(), strict=True)
    }
    assert counts.keys() == expected.keys()
    chi = sum(
        (counts[k] - draws * p / whole) ** 2 / (draws * p / whole) for k, p in expected.items()
    )
    assert abs(chi - len(counts)) < 4 * (2 * len(counts)) ** 0.5
    ends = {(env, first + n - 1) for env, first, n in replay.long_episodes().tolist()}
    options = dict(slack=4, seed=5, last_window=True)
    with_ends = Replay(PLAIN, 80, 2, length, tmp_path, **options)
    with_ends.load_state_dict(replay.state_dict())
    index = with_ends.draw_in_episodes(4000)["index"]
    assert {tuple(place) for place in index[:, -1].tolist()} >= ends
    batch = replay.draw_in_episodes(50)
    assert (batch["observation"][:, 1:, :2] == batch["index"][:, 1:]).all()
    assert not batch["is_first"][:, 2:].any() and not batch["is_last"][:, 1:-1].any()


def test_shortest_episodes_and_abandoned_ones(tmp_path):
    """An episode of T rows has one window, the last; rows without an end are never drawn."""
    replay = Replay(PLAIN, 80, 1, 5, tmp_path, seed=5, online=False)
    append_episodes([[4, 3]], replay)
    assert not len(replay.long_episodes())
    with_ends = Replay(PLAIN, 80, 1, 5, tmp_path, seed=5, last_window=True)
    with_ends.load_state_dict(replay.state_dict())
    index = with_ends.draw_in_episodes(20)["index"]
    assert (index[:, 1:, 1] == torch.arange(4)).all()
    replay = Replay(PLAIN, 80, 1, 5, tmp_path / "crash", seed=5, last_window=True)
    for first, last in [(1, 0)] + [(0, 0)] * 7 + [(1, 0)] + [(0, 0)] * 5 + [(0, 1)]:
        row = make_row(replay.total, 1)  # eight rows, a crash, an episode of seven
        row["is_first"], row["is_last"] = torch.tensor([[first], [last]]).bool()
        replay.append(row.select(*replay.storage.keys()))
    starts = replay.draw_in_episodes(200)["index"][:, 1, 1]
    assert set(starts.tolist()) == {8, 9, 10, 11}


def test_finished_episodes_do_not_depend_on_when_they_are_listed(tmp_path):
    """All that end in the ring, in the order of their ends, whoever asks and however often."""
    lengths = [[3, 9, 5, 4, 6, 12, 2], [20, 4, 5, 7, 16]]
    flags = [[(t == 0, t == n - 1) for n in line for t in range(n)] for line in lengths]
    replays = [Replay(PLAIN, 40, 2, 5, tmp_path / str(k)) for k in range(3)]
    for number, flag in enumerate(zip(*flags, strict=False)):
        row = make_row(number, 2).select(*PLAIN.keys())
        row["is_first"], row["is_last"] = torch.tensor(flag).unbind(-1)
        for replay in replays:
            replay.append(row)
        replays[1].finished()
        if number == 25:  # a resume
            state = replays[2].state_dict()
            replays[2] = Replay(PLAIN, 40, 2, 5, tmp_path / "2")
            replays[2].load_state_dict(state)
    expected = [[1, 20, 4], [0, 21, 6], [1, 24, 5], [1, 29, 7], [0, 27, 12], [0, 39, 2]]
    for replay in replays:
        assert replay.oldest == 21 and replay.finished().tolist() == expected
        assert replay.state_dict()["finished"].tolist() == expected


def test_no_episode_to_draw(tmp_path):
    replay = Replay(PLAIN, 80, 2, 5, tmp_path, online=False)
    append_episodes([[4, 4, 4, 4], [40]], replay)  # no episode of five rows is over
    with pytest.raises(RunError, match="no whole episode of 5 rows"):
        replay.draw_in_episodes(3)


@pytest.mark.parametrize(
    "options", [{}, {"online": True}, {"episodes": True}, {"episodes": True, "last_window": True}]
)
def test_a_sample_has_rows_and_what_precedes_them(tmp_path, options):
    """A sample has rows 1, 2, ... of a window, and in `previous` action and latents of 0, 1, ..."""
    example = EXAMPLE.clone().set("action", torch.zeros(2))
    options = options | dict(batch_size=6, seed=7)
    first, second = (Replay(example, 200, 2, 5, tmp_path / n, **options) for n in "ab")
    for row in range(90):
        rows = make_row(row, 2, first=row % 8 == 0, latent=row)
        rows["is_last"][:] = row % 8 == 7
        rows["action"] = rows["observation"][:, :2] + 0.5
        first.append(rows)
        second.append(rows)
    batch, window = first.sample(), (second.draw_in_episodes if first.episodes else second.draw)(6)
    assert batch.shape == (6, 4) and window.shape == (6, 5)
    assert set(batch.keys()) == {*example.keys(), "index", "previous"} - {"belief", "state"}
    assert set(batch["previous"].keys()) == {"action", "belief", "state"}
    for key in batch.exclude("previous").keys():
        assert torch.equal(batch[key], window[key][:, 1:]), key
    for key, value in batch["previous"].items():
        assert torch.equal(value, window[key][:, :-1]) and value.dtype == example[key].dtype, key
    number = batch["index"] - torch.tensor([0, 1])  # of the row before
    assert torch.equal(batch["previous", "action"], number + 0.5)
    assert (batch["previous", "belief"] == number[..., 1:]).all()
    expected = with_previous(window)
    assert all(torch.equal(batch[key], expected[key]) for key in batch.exclude("previous").keys())
    assert (batch["previous"] == expected["previous"]).all()
    assert first.sample(3).shape == (3, 4)
    first.write_back(batch, latents(batch["index"], 1234.0))
    env, row = batch["index"].flatten(0, 1).unbind(-1)
    where = row * 2 + env
    stored = first.storage["belief"][where * 2 + first.current[where].long()]
    assert (stored == 1234).all() and (first.storage["observation"][where, 1] == row).all()


@pytest.mark.parametrize(("last", "rows"), [(False, 5), (True, 4)])
def test_ready_for_episodes(tmp_path, last, rows):
    """Ready once an episode that holds a window is over, however few windows there are."""
    replay = Replay(PLAIN, 80, 1, 5, tmp_path, batch_size=16, episodes=True, last_window=last)
    append_episodes([[rows - 1]], replay)
    assert not replay.ready
    fill(replay, 1, first=True)
    fill(replay, rows - 2)
    assert not replay.ready
    row = make_row(replay.total, 1)
    row["is_last"][:] = True
    replay.append(row.select(*replay.storage.keys()))
    assert replay.ready and len(replay) < 16
    assert replay.sample()["index"][0, :, 1].tolist() == [rows - 1 + k for k in range(4)]


def test_the_size_of_a_runs_replay(tmp_path, capsys):
    """No larger than its steps can fill; if smaller, with room for a save interval."""
    flags = dict(num_envs=2, action_repeat=2, steps=90, batch_length=4, batch_size=3, seed=5)
    flags |= dict(replay_size=1000, save_every=10)
    replay = make_replay(SimpleNamespace(**flags), PLAIN, tmp_path / "a", last_window=True)
    # 23 rows of each environment hold 90 steps, 5 are a window
    assert (replay.capacity, replay.allocated, replay.length) == (28, 28, 5)
    assert (replay.batch_size, replay.online, replay.episodes, replay.last_window) == (
        3,
        False,
        False,
        True,
    )
    assert (tmp_path / "a" / "replay" / "observation").stat().st_size == 56 * 12
    assert capsys.readouterr().out == "         0.000 GB for a replay of 56 rows\n"
    flags |= dict(replay_size=40)  # 10 steps are 3 rows, and one more
    replay = make_replay(SimpleNamespace(**flags), PLAIN, tmp_path / "b", online=True)
    assert (replay.capacity, replay.allocated, replay.online) == (20, 24, True)
    other = Replay(PLAIN, 40, 2, 5, tmp_path / "c", slack=4, seed=5, online=True)
    for each in (replay, other):
        fill(each, 20)
    assert (replay.draw(30) == other.draw(30)).all()  # the seed is that of the run


def test_rows_of_another_run(tmp_path, capsys):
    """All that it could draw, oldest first; of a ring that has wrapped, the first one is cut."""
    filled = Replay(EXAMPLE, 20, 2, 4, tmp_path / "a" / "replay", slack=3)
    fill(filled, 17, latent=7)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path in before:
        path.chmod(0o400)
    times = [path.stat().st_mtime_ns for path in before]
    source = saved_replay(tmp_path / "a", filled.layout, EXAMPLE.exclude("belief", "state"))
    source.total = filled.total
    replay = Replay(EXAMPLE, 24, 2, 6, tmp_path / "b", batch_size=1)
    copy_rows(source, replay)
    assert "            20 rows from" in capsys.readouterr().out
    assert replay.total == 10
    td = replay.windows(torch.tensor([[0, 0], [1, 4]]))
    assert td["observation"][..., :2].tolist() == [
        [[0, row] for row in range(7, 13)],
        [[1, row] for row in range(11, 17)],
    ]
    assert td["pixels"][1, :, 0, 0, 0].tolist() == [row + 1 for row in range(11, 17)]
    assert not td["belief"].any() and not td["state"].any()
    assert replay.storage["is_first"].nonzero().tolist() == [[0], [1]]
    assert {path: path.read_bytes() for path in before} == before
    assert [path.stat().st_mtime_ns for path in before] == times

    # 3 x 5 windows, of which each environment has 5
    replay = Replay(EXAMPLE, 24, 2, 6, tmp_path / "c", batch_size=3)
    with pytest.raises(RunError, match="too few, or their episodes too short: choose a smaller"):
        copy_rows(source, replay)


def test_a_draw_changes_flags_only_in_its_copy(tmp_path):
    replay = Replay(PLAIN, 12, 1, 12, tmp_path, online=True)
    for row in range(12):
        fill(replay, 1, first=row in (0, 5, 9))
    for _ in range(2):  # the second draw shows that the first did not change the files
        batch = replay.draw(1)
        assert batch["is_first"][0].nonzero()[:, 0].tolist() == [0, 5, 9]
        assert batch["is_last"][0].nonzero()[:, 0].tolist() == [4, 8]
    assert not replay.storage["is_last"].any()
    fill(replay, 1)
    assert replay.draw(1)["is_first"][0].nonzero()[:, 0].tolist() == [0, 4, 8]


def test_dtypes_and_write_back(tmp_path):
    """The next draw has the latents, in the stored dtypes."""
    replay = Replay(EXAMPLE, 10, 1, 10, tmp_path, online=True)
    fill(replay, 10, latent=3)
    batch = replay.draw(2)
    assert {key: batch[key].dtype for key in EXAMPLE.keys()} == {
        key: EXAMPLE[key].dtype for key in EXAMPLE.keys()
    }
    assert batch["pixels"].shape == (2, 10, 4, 4, 3) and batch["index"].dtype == torch.int64
    rows = batch[:, 1:]
    values = latents(rows["index"], 0.1).apply(
        lambda leaf: leaf.clone().requires_grad_(leaf.is_floating_point())
    )
    values["state"] += 200
    replay.write_back(rows, values)
    after = replay.draw(1)
    assert (after["belief"][0, 1:] == torch.tensor(0.1).half()).all() and (
        after["belief"][0, 0] == 3
    ).all()
    assert (after["state"][0, 1:] == 200).all() and not after["belief"].requires_grad


def test_last_duplicate_wins(tmp_path):
    replay = Replay(EXAMPLE, 100, 1, 2, tmp_path)
    fill(replay, 100)
    index = torch.zeros(32, 64, 2, dtype=torch.int64)
    index[..., 1] = torch.arange(64) % 2 + 10
    for trial in range(20):
        value = torch.arange(32 * 64).view(32, 64) % 1999 + trial
        replay.write_back(batch_at(index), latents(index, value))
        live = torch.tensor([10, 11]) * 2 + replay.current[10:12].long()
        assert replay.storage["belief"][live][:, 0].tolist() == value[-1, -2:].tolist()


def test_same_seed_same_samples(tmp_path):
    batches = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        replay = Replay(EXAMPLE, 200, 2, 5, tmp_path / name, seed=seed, online=True)
        fill(replay, 150)
        torch.rand(7)  # the draws do not use the global generator
        batches.append(torch.cat([replay.draw(8) for _ in range(20)]))
    assert (batches[0] == batches[1]).all()
    assert (batches[0]["index"] != batches[2]["index"]).any()


def test_exhausted_says_when_to_save(tmp_path):
    replay = Replay(PLAIN, 10, 1, 3, tmp_path, slack=4)
    fill(replay, 40)
    assert not replay.exhausted  # there is no checkpoint to protect
    replay.state_dict()
    fill(replay, 3)
    assert not replay.exhausted
    fill(replay, 1)
    assert replay.exhausted
    replay.state_dict()
    assert not replay.exhausted
    replay = Replay(PLAIN, 10, 1, 3, tmp_path)
    fill(replay, 40)
    replay.state_dict()
    assert not replay.exhausted  # without slack a save would not help


def test_reopening_neither_zeroes_nor_copies(tmp_path):
    replay = Replay(PLAIN, 20, 1, 4, tmp_path, online=True)
    fill(replay, 9)
    state = replay.state_dict()
    inodes = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    other = Replay(PLAIN, 20, 1, 4, tmp_path, online=True)
    other.load_state_dict(state)
    assert inodes == {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert other.storage["observation"][:9, 1].tolist() == list(range(9))
    assert other.rows == 9 and (other.draw(30) == replay.draw(30)).all()


def test_lost_files_are_noticed(tmp_path):
    replay = Replay(PLAIN, 10, 1, 4, tmp_path)
    fill(replay, 9)
    state = replay.state_dict()
    path = tmp_path / "observation"
    whole = path.read_bytes()
    for content in (whole[:-4], whole[:1], None):
        path.unlink() if content is None else path.write_bytes(content)
        for _ in range(2):
            with pytest.raises(RunError, match="lacks observation"):
                Replay(PLAIN, 10, 1, 4, tmp_path).load_state_dict(state)
        assert path.read_bytes() == (content or b"")  # not filled up with zeros
    path.write_bytes(whole)
    reopened = Replay(PLAIN, 10, 1, 4, tmp_path)
    reopened.load_state_dict(state)
    assert reopened.storage["observation"][:9, 1].tolist() == list(range(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(capacity=60), "capacity is 20 in the checkpoint, 30 here"),
        (dict(num_envs=4), "num_envs is 2 in the checkpoint, 4 here"),
        (dict(length=6), "length is 5 in the checkpoint, 6 here"),
        (dict(slack=1), "allocated is 20 in the checkpoint, 21 here"),
        (dict(updatable=()), "updatable is belief, state in the checkpoint,  here"),
        (
            dict(example=EXAMPLE.exclude("pixels")),
            r"pixels is torch.uint8 \[4, 4, 3\] .* None here",
        ),
    ],
)
def test_another_layout_is_refused_and_leaves_the_rows(tmp_path, change, message):
    same = dict(example=EXAMPLE, capacity=40, num_envs=2, length=5, directory=tmp_path, online=True)
    replay = Replay(**same)
    fill(replay, 30)
    state = replay.state_dict()
    expected = replay.draw(9)
    with pytest.raises(RunError, match=message):
        Replay(**same | change).load_state_dict(state)
    reopened = Replay(**same)
    reopened.load_state_dict(state)
    assert (reopened.draw(9) == expected).all()


def test_room(tmp_path, monkeypatch):
    """A disk or memory that is too small is refused at once; the files take what was asked for."""
    run, usage = tmp_path / "deep" / "run", namedtuple("usage", "total used free")
    row = 2 * (2 * 2 + 2 * 1) + 3 * 4 + 4 * 4 * 3 + 1 + 1  # bytes, the latents twice
    size = row * 2 * (30_000 + 501) / 1e9
    args = dict(num_envs=2, action_repeat=1, steps=80_000, save_every=1000, replay_size=60_000)
    args = SimpleNamespace(**args, batch_size=10, batch_length=4, imagination_horizon=14, seed=0)
    free = int(size * 1e9) - 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))
    with pytest.raises(RunError, match=rf"needs 0.0\d GB more, .* in {tmp_path}: .*--replay-size"):
        check_room(args, EXAMPLE, run)
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    check_room(args, EXAMPLE, run)
    make_replay(args, EXAMPLE, run)
    files = (run / "replay").iterdir()
    assert sum(path.stat().st_size for path in files) == round(size * 1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    check_room(args, EXAMPLE, run)  # its files already hold the blocks
    memory = namedtuple("memory", "total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(row * 10 * 4 * 15))
    check_room(args, EXAMPLE, run)
    args.batch_size = 11
    with pytest.raises(RunError, match="choose a smaller --batch-size, --batch-length or --imag"):
        check_room(args, EXAMPLE, run)
    args.replay_size, args.batch_size = 9, 10
    with pytest.raises(RunError, match="4 rows for each of 2 env.* no window of .*--replay-size"):
        check_room(args, EXAMPLE, run)
    args.replay_size = 10
    check_room(args, EXAMPLE, run)


def test_a_file_too_large_for_the_disk_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(RunError, match=r"no room for .*\(File too large\): choose a smaller"):
        Replay(PLAIN, 64, 4, 5, tmp_path)


def test_a_readonly_replay_leaves_the_files(tmp_path, read_only):
    replay = Replay(PLAIN, 64, 4, 5, tmp_path)
    fill(replay, 10)
    state, before = replay.state_dict(), running.content(tmp_path)
    read_only(tmp_path)
    other = Replay(PLAIN, 64, 4, 5, tmp_path, readonly=True)
    other.load_state_dict(state)
    assert (other.draw(9) == replay.draw(9)).all()
    fill(other, 1)
    assert other.total == 11 and running.content(tmp_path) == before
    with pytest.raises(RunError, match="lacks observation, is_first, is_last, or a part of it"):
        Replay(PLAIN, 128, 4, 5, tmp_path, readonly=True)


def test_an_empty_replay_gives_no_batch(tmp_path):
    replay = Replay(PLAIN, 64, 4, 5, tmp_path)
    fill(replay, 4)
    assert len(replay) == 0
    with pytest.raises(ValueError, match="no window of 5 rows in 16 rows"):
        replay.draw(1)
    with pytest.raises(AssertionError):
        replay.append(make_row(0, 4))  # keys that the replay does not have


KILLED = """
import os, sys, torch
sys.path.insert(0, "tests")
from test_replay import EXAMPLE, Replay, batch_at, fill, latents
folder = sys.argv[1]
replay = Replay(EXAMPLE, 100, 2, 5, folder + "/replay", slack=7, online=True)
for cycle in range(1, 10**9):
    for _ in range(7):
        assert not replay.exhausted
        fill(replay, 1, latent=cycle % 1000)
        rows = range(max(0, replay.total - 50), replay.total)
        index = torch.tensor([[(env, row) for row in rows] for env in range(2)])
        replay.write_back(batch_at(index), latents(index, 1999))  # must never be seen after a kill
    replay.write_back(batch_at(index), latents(index, cycle % 1000))
    torch.save({"cycle": cycle, "replay": replay.state_dict()}, folder + "/tmp")
    os.replace(folder + "/tmp", folder + "/checkpoint.pt")
    print(cycle, flush=True)
"""


def test_a_killed_process_resumes_at_its_checkpoint(tmp_path):
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    for trial in range(2):
        folder = tmp_path / str(trial)
        command = [sys.executable, "-c", KILLED, str(folder)]
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE)
        for _ in range(30):
            assert process.stdout.readline()
        time.sleep(0.0137 * (trial + 1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        cycle = state["cycle"]
        replay = Replay(EXAMPLE, 100, 2, 5, folder / "replay", slack=7, online=True)
        replay.load_state_dict(state["replay"])
        assert replay.total == 7 * cycle >= 210
        batch = replay.draw(500)
        assert (batch["observation"][..., :2] == batch["index"]).all()
        assert len(batch["index"].flatten(0, 1).unique(dim=0)) == replay.rows == 100
        assert (batch["belief"] == cycle % 1000).all()
        assert (batch["state"] == cycle % 1000 % 256).all()


def test_a_longer_run_may_ask_for_a_larger_ring(tmp_path):
    small = Replay(EXAMPLE, 60, 2, 5, tmp_path, slack=3, online=True)
    fill(small, 25)
    state = small.state_dict()
    large = Replay(EXAMPLE, 200, 2, 5, tmp_path, slack=7, online=True)
    large.load_state_dict(state)
    assert (large.total, len(large)) == (25, len(small))
    ours, theirs = large.draw(40), small.draw(40)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys())
    fill(small, 20)  # once the small ring wraps around, its rows lie elsewhere in a larger one
    with pytest.raises(RunError, match="capacity is 30"):
        Replay(EXAMPLE, 200, 2, 5, tmp_path, slack=7).load_state_dict(small.state_dict())
