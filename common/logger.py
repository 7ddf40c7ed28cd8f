"""What a run shows: metrics.jsonl, printed lines, TensorBoard, videos, pictures, learning curve."""

import json
import math
import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import RunError, atomic_write

PNG = {"format": "png", "dpi": 150}
PRINTED = ("updates", "episode/return", "eval/return", "eval/return_std")
LOSSES = ("model", "actor", "value")  # of each, a printed line has the sum of train/loss_<each>*


class Logger:
    """Write the metrics of a run to `folder`, one JSON line per `log`. Steps are environment steps.

    With `total_steps` it prints a line for each, at most one a second (but evaluations and the last
    step always), and one every 30 seconds in long bursts of updates. Save and load it with the
    checkpoint: loading cuts off the lines written after the save, which come again.
    """

    def __init__(self, folder, total_steps=None, tensorboard=True):
        self.folder, self.total = Path(folder), total_steps
        self.file = (self.folder / "metrics.jsonl").open("ab")
        self.sums, self.counts, self.notes = {}, {}, set()
        self.step = self.first = 0  # now, and where this process took over
        self.process_start = self.run_start = time.monotonic()
        self.tensorboard, self.board = tensorboard, None
        self.updates, self.first_update = 0, None  # this process: count; (time, step)
        self.printed = self.process_start - 1  # when the last line was

    def add(self, step, metrics):
        """Add an update's metrics to the next line's means; 0-dim tensors stay on their device."""
        self.step, self.updates = step, self.updates + 1
        self.first_update = self.first_update or (time.monotonic(), step)
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                assert value.ndim == 0, f"{name} has shape {tuple(value.shape)}, not ()"
                value = value.detach().float()
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        if self.total and time.monotonic() > self.printed + 30:  # many updates are not a hang
            means = {name: _plain(self.sums[name] / self.counts[name]) for name in metrics}
            self._print({"step": step, **means})

    def log(self, step, last=False, **extra):
        """Append step, means, extra and "time/wall" to metrics.jsonl; nan and inf become null.

        The means go on after the last line of a run, because more --steps may extend it.
        """
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.step = step
        if not last:
            self.sums, self.counts = {}, {}
        row = {"step": step, **means, **extra, "time/wall": time.monotonic() - self.run_start}
        row = {name: _plain(value) for name, value in row.items()}
        self.file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self.file.flush()
        if self.tensorboard:
            self._to_tensorboard(row)
        if self.total:
            self._print(row)

    def note(self, text):
        """Print a line, but not again in this process."""
        if text not in self.notes:
            say(text)
        self.notes.add(text)

    def state_dict(self) -> dict:
        """The means so far, the clock, and how long metrics.jsonl is."""
        os.fsync(self.file.fileno())  # else a power failure could make it shorter than saved here
        wall, size = time.monotonic() - self.run_start, self.file.seek(0, os.SEEK_END)
        means = {"sums": dict(self.sums), "counts": dict(self.counts)}
        return {"step": self.step, "wall": wall, "bytes": size, **means}

    def load_state_dict(self, state):
        """Continue from a saved state; RunError if metrics.jsonl has become shorter since."""
        size = self.file.seek(0, os.SEEK_END)
        if size < state["bytes"]:
            text = f"{self.file.name} has {size} bytes, but {state['bytes']} when the run was saved"
            raise RunError(f"{text}: put the file back, or start over with --fresh")
        self.file.truncate(state["bytes"])
        self.step = self.first = state["step"]
        self.run_start = self.process_start - state["wall"]
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])

    def close(self):
        """Close the file and TensorBoard."""
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _to_tensorboard(self, row):
        """Log the numbers of a row to TensorBoard, if it is installed."""
        if self.board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.tensorboard = False
                return print("no TensorBoard files (pip install tensorboard)")
            # What a killed process logged after its last save comes again: hide its first copy.
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.first + 1)
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, row["step"])

    def _print(self, row):
        """Print progress, time left, speed, and of a row the updates, losses and returns."""
        now, step = time.monotonic(), min(row["step"], self.total)
        if now < self.printed + 1 and step < self.total and "eval/return" not in row:
            return
        words = [f"step {step:,} of {self.total:,} ({step / self.total:.0%})"]
        begun, first = self.first_update or (now, step)
        seconds = now - begun
        if self.updates > 1 and step > first:  # steps before the first update cost next to nothing
            left = round(seconds * (self.total - step) / (step - first))
            words.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
            words.append(f"{(step - first) / seconds:.4g} steps/s")
        if self.updates > 1:
            words.append(f"{(self.updates - 1) / seconds:.4g} updates/s")
        shown = {name: row[name] for name in PRINTED if name in row}
        for label in LOSSES:
            losses = [x for name, x in row.items() if name.startswith(f"train/loss_{label}")]
            if losses and None not in losses:
                shown[label] = sum(losses)
        words += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
        self.printed = now
        say(", ".join(words))


def say(text):
    """Print a line. Ctrl-C ends `| tee`, too, when the run has yet to be saved."""
    with suppress(BrokenPipeError):
        print(text, flush=True)


def _plain(value):
    """A python value that JSON can hold."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_video(folder, name, frames, fps=30) -> Path:
    """Save uint8 frames [T, H, W, 3] as folder/name.mp4, or as gif where there is no ffmpeg."""
    from imageio.v3 import imwrite

    frames = np.asarray(frames)
    # H.264 halves the color planes, so both sides must be even. -f: the name is *.tmp.
    output = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-f", "mp4"]
    mp4 = dict(plugin="FFMPEG", extension=".mp4", macro_block_size=1, output_params=output)
    try:
        return atomic_write(
            Path(folder, f"{name}.mp4"),
            lambda file: imwrite(file.name, frames, fps=fps, quality=5, **mp4),
        )
    except (ImportError, OSError, RuntimeError) as error:
        print(f"saving a gif, because mp4 failed (pip install imageio-ffmpeg): {error}")
        gif = partial(imwrite, image=frames, extension=".gif", duration=1000 / fps, loop=0)
        return atomic_write(Path(folder, f"{name}.gif"), gif)


def write_picture(folder, name, figure) -> Path:
    """Save a matplotlib Figure as folder/name.png and clear it."""
    path = atomic_write(Path(folder, f"{name}.png"), partial(figure.savefig, **PNG))
    figure.clear()
    return path


def plot_curve(folder, title: str) -> Path:
    """Draw the returns in metrics.jsonl against environment steps: learning_curve.png.

    Raises RunError while there is nothing to draw.
    """
    from matplotlib.figure import Figure

    rows = list(read_metrics(Path(folder, "metrics.jsonl")))
    episodes, evaluations = (
        np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None]).T
        for name in ("episode/return", "eval/return")
    )
    if not episodes.size and not evaluations.size:
        raise RunError(f"no episode/return in {folder}/metrics.jsonl so far")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if episodes.size:
        n = max(1, min(50, episodes.shape[1] // 20))
        mean = [episodes[1, max(0, i - n) : i].mean() for i in range(1, episodes.shape[1] + 1)]
        axes.plot(*episodes, ".", color="#9dbfe0", ms=4 if n > 1 else 8, mew=0, label="training")
        if n > 1:
            axes.plot(episodes[0], mean, color="#0b3c6f", lw=2, label=f"mean of the last {n}")
    if evaluations.size:
        axes.plot(*evaluations, "D-", color="#c8641a", lw=1, ms=5, label="evaluation")
    axes.set(xlabel="environment steps", ylabel="return (sum of rewards per episode)")
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return atomic_write(Path(folder, "learning_curve.png"), partial(figure.savefig, **PNG))


def read_metrics(path, size=0):
    """The rows of a metrics.jsonl, as dicts; with `size`, only those in its last `size` bytes."""
    lines = []
    if path.exists():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size) if size else 0)
            lines = file.read().splitlines()
    for line in lines:
        with suppress(ValueError):  # the first may be cut, the last one unfinished
            yield json.loads(line)
