"""What a run shows: metrics.jsonl, progress bar, TensorBoard, videos, pictures, learning curve."""

import json
import math
import os
import secrets
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import RunError, atomic_write

PNG = {"format": "png", "dpi": 150}
LOSSES = ("model", "actor", "value")  # the progress bar shows the sums of train/loss_<each>*


class Logger:
    """Write the metrics of a run to `folder`, one JSON line per `log`. Steps are environment steps.

    Save and load it with the checkpoint: loading cuts off the lines written after the save, which
    come again. wandb: arguments of `wandb.init`, to mirror the run to
    Weights & Biases.
    """

    def __init__(self, folder, total_steps, tensorboard=True, quiet=False, wandb=None):
        self.folder, self.total, self.quiet = Path(folder), total_steps, quiet
        self.file = (self.folder / "metrics.jsonl").open("ab")
        self.sums, self.counts, self.shown, self.notes = {}, {}, {}, set()
        self.step = self.first = 0  # now, and where this process took over
        self.process_start = self.run_start = time.monotonic()
        self.tensorboard, self.board, self.bar, self.bar_time = tensorboard, None, None, 0.0
        self.wandb = wandb and start_wandb(self.folder, wandb)
        self.first_update = None  # of this process: time, number, step

    def add(self, metrics):
        """Add to the means of the next line; a 0-dim tensor stays on its device until then."""
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                assert value.ndim == 0, f"{name} has shape {tuple(value.shape)}, not ()"
                value = value.detach().float()
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def log(self, step, last=False, **extra):
        """Append step, means, extra and "time/wall" to metrics.jsonl; nan and inf become null.

        The means go on after the last line of a run, because more --steps may extend it.
        """
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        if not last:
            self.sums, self.counts = {}, {}
        row = {"step": step, **means, **extra, "time/wall": time.monotonic() - self.run_start}
        row = {name: _plain(value) for name, value in row.items()}
        self.file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self.file.flush()
        if self.tensorboard:
            self._to_tensorboard(row)
        if self.wandb:
            self.wandb.log(row, step=step)  # ignores a step that comes again after a kill
        for label in LOSSES:
            losses = [x for name, x in means.items() if name.startswith(f"train/loss_{label}")]
            if losses:
                self.shown[label] = _plain(sum(losses))
        if self.first_update and self.shown["updates"] > self.first_update[1]:
            seconds = time.monotonic() - self.first_update[0]
            self.shown["updates/s"] = (self.shown["updates"] - self.first_update[1]) / seconds
        self.advance(step)
        if not self.quiet and not sys.stderr.isatty():
            self._print(row)

    def advance(self, step, **postfix):
        """Move the progress bar, at most 5 times a second, and show `postfix` (numbers) on it.

        It also shows the losses of the last line of metrics.jsonl and the updates/s until then.
        """
        self.step, now = step, time.monotonic()
        self.shown |= {name: _plain(value) for name, value in postfix.items()}
        if self.first_update is None and "updates" in postfix:
            self.first_update = now, postfix["updates"], step
            if self.bar is not None:
                self.bar.start_t = self.bar.last_print_t = time.time()
                self.bar.initial = step
        if self.quiet or now - self.bar_time < 0.2 or not sys.stderr.isatty():
            return
        if self.bar is None:
            self.bar = tqdm(total=self.total, initial=self.first, unit=" steps", smoothing=0)
        self.bar_time, self.bar.n = now, step
        self.bar.set_postfix(self.shown)

    def note(self, text, once=False):
        """Print a line above the progress bar; with `once`, not again in this process."""
        if not self.quiet and not (once and text in self.notes):
            tqdm.write(text, file=sys.stderr)
        self.notes.add(text)

    def upload(self, path):
        """Show a picture or video at Weights & Biases, too, if the run is mirrored there."""
        if self.wandb:
            from wandb import Image, Video

            kind = Image if path.suffix == ".png" else Video
            self.wandb.log({path.stem: kind(str(path))}, step=self.step)

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
        """Close the file, the bar and TensorBoard."""
        if self.bar is not None:
            self.bar.n = self.step
        for part in (self.file, self.bar, self.board):
            if part is not None:
                part.close()
        if self.wandb:
            self.wandb.finish()

    def _to_tensorboard(self, row):
        """Log the numbers of a row to TensorBoard, if it is installed."""
        if self.board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.tensorboard = False
                return self.note("no TensorBoard files (pip install tensorboard)")
            # What a killed process logged after its last save comes again: hide its first copy.
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.first + 1)
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, row["step"])

    def _print(self, row):
        """A line for a log file: progress, what the bar would show, and the returns."""
        values = self.shown | {k: v for k, v in row.items() if k.startswith(("episode/", "eval/"))}
        if "episode/return" in values:
            values.pop("return", None)  # of the episode before
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        form = "step {n:,} of {total:,} ({percentage:.0f} %), {rate_fmt}, {remaining} left{postfix}"
        # Steps before the first update cost next to nothing: no rate is known until then.
        begun, _, first = self.first_update or (time.monotonic(), 0, self.step)
        options = dict(initial=first, unit=" steps", bar_format=form, postfix=", ".join(words))
        seconds = time.monotonic() - begun
        self.note(tqdm.format_meter(min(self.step, self.total), self.total, seconds, **options))


def start_wandb(folder: Path, options: dict):
    """A run at Weights & Biases. Its id lies in the run folder: a resumed run goes on there."""
    import wandb

    file = folder / "wandb" / "id"
    name = file.read_text() if file.exists() else secrets.token_hex(4)
    try:
        run = wandb.init(id=name, resume="allow", dir=folder, allow_val_change=True, **options)
    except wandb.Error as error:
        raise RunError(f"--wandb: {error} WANDB_MODE=offline needs no account") from error
    atomic_write(file, lambda file: file.write(name.encode()))
    return run


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
        axes.plot(*episodes, ".", color="#9dbfe0", ms=4, mew=0, label="training")
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
