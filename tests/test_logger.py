"""Metrics file, mirrors, videos and pictures of common/logger.py."""

import json
import math
import sys
import time

import numpy as np
import pytest
import torch

from common import logger as module
from common.checkpoint import RunError, load, save
from common.logger import Logger, plot_curve, write_picture, write_video


@pytest.fixture
def log(tmp_path):
    logger = Logger(tmp_path, 1000, tensorboard=False, quiet=True)
    yield logger
    logger.close()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_means_extras_and_wall_clock(tmp_path, log):
    log.add({"loss": 1.0, "norm": torch.tensor(2.0, requires_grad=True)})
    log.add({"loss": 2.0, "norm": torch.tensor(5, dtype=torch.int32)})
    log.add({"loss": 6.0, "flag": torch.tensor(True)})
    log.log(16, **{"episode/return": np.float32(0.5), "note": "x", "n": torch.tensor(3)})
    log.log(32)
    first, second = rows(tmp_path)
    assert first.pop("time/wall") >= 0
    expected = {"step": 16, "loss": 3.0, "norm": 3.5, "flag": 1.0, "episode/return": 0.5}
    assert first == {**expected, "note": "x", "n": 3}
    assert second.keys() == {"step", "time/wall"}


def test_a_tensor_overwritten_after_add_does_not_change_the_mean(tmp_path, log):
    buffer = torch.tensor(1.0)  # like the output of a captured CUDA graph
    log.add({"loss": buffer})
    buffer.fill_(100.0)
    log.add({"loss": buffer})
    buffer.fill_(7.0)
    log.log(1)
    assert rows(tmp_path)[0]["loss"] == 50.5


def test_low_precision_tensors_are_summed_in_float32(tmp_path, log):
    for _ in range(1000):
        log.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    log.log(1)
    assert rows(tmp_path)[0]["loss"] == 1.0


def test_a_nonscalar_is_refused(log):
    with pytest.raises(AssertionError, match=r"loss has shape \(2,\)"):
        log.add({"loss": torch.zeros(2)})


def test_nan_and_inf_become_null(tmp_path, log):
    log.add({"a": float("nan"), "b": torch.tensor(math.inf), "c": 1.0})
    log.log(1, d=np.float32("nan"))
    row = rows(tmp_path)[0]
    assert [row[name] for name in "abcd"] == [None, None, 1.0, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_every_write_is_in_the_file_at_once(tmp_path, log):
    for step in range(3):
        log.log(step)
        assert len(rows(tmp_path)) == step + 1


def test_resume_cuts_what_came_after_the_save(tmp_path, log):
    log.log(10, a=1)
    log.add({"loss": torch.tensor(1.0), "plain": 1.0})
    save(tmp_path, logger=log)
    log.add({"loss": torch.tensor(100.0)})
    log.log(20, a=2)
    log.file.write(b'{"step": 30, "a"')  # killed in the middle of a line
    log.file.flush()

    resumed = Logger(tmp_path, 1000, tensorboard=False, quiet=True)
    state = load(tmp_path)["logger"]
    resumed.load_state_dict(state)
    resumed.add({"loss": torch.tensor(3.0), "plain": 3.0})
    resumed.log(20, a=3)
    resumed.close()
    first, second = rows(tmp_path)
    assert (first["step"], first["a"]) == (10, 1)
    assert (second["step"], second["a"], second["loss"], second["plain"]) == (20, 3, 2.0, 2.0)
    assert second["time/wall"] >= state["wall"] >= first["time/wall"]


def test_later_changes_do_not_reach_a_saved_state(log):
    log.add({"a": torch.tensor(1.0)})
    state = log.state_dict()
    log.add({"a": torch.tensor(1.0), "b": 2.0})
    assert state["sums"] == {"a": torch.tensor(1.0)} and state["counts"] == {"a": 1}


def test_wall_clock_adds_up_over_resumes(tmp_path, log):
    log.load_state_dict({**log.state_dict(), "wall": 5000.0})
    log.log(1)
    assert 5000 <= rows(tmp_path)[0]["time/wall"] < 5010


def test_a_shortened_metrics_file_is_reported_and_kept(tmp_path, log):
    log.log(10, a=1)
    log.log(20, a=2)
    state = log.state_dict()
    text = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(text[:30])
    other = Logger(tmp_path, 1000, tensorboard=False, quiet=True)
    with pytest.raises(RunError, match=f"has 30 bytes, but {len(text)} when"):
        other.load_state_dict(state)
    other.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == text[:30]


def test_without_a_terminal_each_write_is_one_plain_line(tmp_path, capsys):
    log = Logger(tmp_path, 1000, tensorboard=False)
    log.advance(100, loss=torch.tensor(0.123456), fps=math.inf)
    log.log(250, **{"episode/return": 12.5, "model/kl": 3.0})
    log.note("hello")
    log.log(2000)
    log.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 3 and "\r" not in err
    assert lines[0].startswith("step 250 of 1,000 (25 %), ")
    assert lines[0].endswith(" left, loss 0.1235, fps None, episode/return 12.5")
    assert "%), ? steps/s, ? left" in lines[0]  # no update so far
    assert lines[1] == "hello"


def test_progress_shows_losses_and_rates(tmp_path, capsys, monkeypatch):
    log, now = Logger(tmp_path, 1000, tensorboard=False), time.monotonic()
    losses = {"train/loss_model_kl": 1.0, "train/loss_model_reco": 2.5, "train/loss_actor": -4.0}
    log.add(losses | {"train/loss_value": 0.5, "train/loss_replay_value": 9.0})
    log.add(losses | {"train/loss_value": 1.5, "train/loss_replay_value": 9.0})
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log.advance(100, updates=50)
    monkeypatch.setattr(time, "monotonic", lambda: now + 4)
    log.advance(110, updates=60)
    log.log(110)
    log.close()
    line = capsys.readouterr().err
    assert line.endswith("updates 60, model 3.5, actor -4, value 1, updates/s 2.5\n")


def test_speed_is_that_of_this_process_since_its_first_update(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = Logger(tmp_path, 1000, tensorboard=False)
    log.load_state_dict({"step": 500, "wall": 9e6, "bytes": 0, "sums": {}, "counts": {}})
    now[0] += 1
    log.advance(550)  # random steps take no time
    log.log(550)
    assert "(55 %), ? steps/s, ? left" in capsys.readouterr().err
    log.advance(550, updates=7)
    now[0] += 30
    log.log(600)
    assert "(60 %),  1.67 steps/s, 04:00 left" in capsys.readouterr().err
    log.close()


def test_the_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    log = Logger(tmp_path, 1000, tensorboard=False)
    log.load_state_dict({"step": 400, "wall": 0.0, "bytes": 0, "sums": {}, "counts": {}})
    log.advance(410, loss=torch.tensor(0.25))
    log.note("a note")
    text = screen.text
    assert "410/1000" in text and "41%" in text and "loss=0.25" in text and "a note\n" in text
    for _ in range(1000):
        log.advance(411)  # a long burst of updates
    assert screen.text.count("411/1000") <= 1 and log.bar.n == 410
    log.advance(412, updates=1)
    assert log.bar.initial == 412  # its rate is that since the first update
    log.log(500, **{"episode/return": 1.0})
    log.close()
    assert "step 500 of" not in screen.text
    assert "500/1000" in screen.text.splitlines()[-1]


def test_quiet_prints_nothing(tmp_path, capsys):
    log = Logger(tmp_path, 1000, tensorboard=False, quiet=True)
    log.advance(1, loss=1.0)
    log.note("hello")
    log.log(2)
    log.close()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_mirrors_and_hides_what_a_killed_run_left(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    log = Logger(tmp_path, 1000, quiet=True)
    log.log(10, loss=1.0, note="x", bad=math.nan)
    state = log.state_dict()
    log.log(20, loss=2.0)
    log.close()
    log = Logger(tmp_path, 1000, quiet=True)
    log.load_state_dict(state)
    log.log(20, loss=3.0)
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.0), (20, 3.0)]
    assert set(events.Tags()["scalars"]) == {"loss", "time/wall"}


def test_missing_tensorboard_is_noted_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = Logger(tmp_path, 1000)
    log.log(10, loss=1.0)
    log.log(20, loss=1.0)
    log.close()
    assert capsys.readouterr().err.count("pip install tensorboard") == 1
    assert len(rows(tmp_path)) == 2


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """With the real package: rows, video and curve, and both processes belong to one run."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (10, 20):
        log = Logger(tmp_path, 1000, False, True, wandb=dict(project="dreamer", config={"lr": 1}))
        log.log(step, **{"episode/return": step + 0.25, "eval/return": math.nan})
        log.video("policy", clip())
        log.upload(plot_curve(tmp_path))
        log.close()
    wandb.teardown()  # at the end of a process: writes all
    name = (tmp_path / "wandb" / "id").read_text()
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"))
    for folder, value in (first, b"10.25"), (second, b"20.25"):
        assert value in (folder / f"run-{name}.wandb").read_bytes()
        media = {path.name.rsplit("_", 2)[0] for path in folder.glob("files/media/*/*")}
        assert media == {"policy", "learning_curve"}


def clip(length=7, height=33, width=50):
    frames = np.zeros((length, height, width, 3), np.uint8)
    frames[np.arange(length), :, np.arange(length) * 7] = 255
    return frames


def test_video_reads_back(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_video(tmp_path, "video/step10", torch.from_numpy(clip()), fps=10)
    assert path == tmp_path / "video" / "step10.mp4" and path.parent.is_dir()
    assert [p.name for p in path.parent.iterdir()] == ["step10.mp4"]
    reader = ffmpeg.read_frames(str(path))
    meta = next(reader)
    frames = [np.frombuffer(f, np.uint8).reshape(34, 50, 3) for f in reader]
    assert len(frames) == 7 and meta["fps"] == 10
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
    assert frames[3][16, 21].mean() > frames[3][16, 40].mean() + 100


def test_video_without_ffmpeg_is_a_gif(tmp_path, monkeypatch, capsys):
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.delitem(sys.modules, "imageio.plugins.ffmpeg", raising=False)
    path = write_video(tmp_path, "eval.10", clip(), fps=10)
    assert "pip install imageio-ffmpeg" in capsys.readouterr().out
    assert path.name == "eval.10.gif"
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (7, (50, 33), 100)
    assert [p.name for p in tmp_path.iterdir()] == ["eval.10.gif"]


def test_picture_uses_no_global_state(tmp_path):
    figure_module = pytest.importorskip("matplotlib.figure")
    before = "matplotlib.pyplot" in sys.modules
    figure = figure_module.Figure()
    figure.add_subplot().plot([1, 2])
    path = write_picture(tmp_path, "plots/dream", figure)
    assert path.read_bytes()[:4] == b"\x89PNG" and not figure.axes
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that are saved while the test runs."""
    figure_module = pytest.importorskip("matplotlib.figure")
    axes, savefig = [], figure_module.Figure.savefig

    def keep(self, *args, **kwargs):
        axes.extend(self.axes)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(figure_module.Figure, "savefig", keep)
    return axes


def test_learning_curve(tmp_path, log, drawn):
    for step in range(0, 1000, 10):
        log.log(step, **{"episode/return": float(step)})
    log.log(500, **{"eval/return": 450.0})
    log.log(1000, **{"eval/return": math.nan})
    log.file.write(b'{"step": 1010, "episode/ret')
    log.file.flush()
    path = plot_curve(tmp_path, "dreamer  Pendulum-v1  seed 0")
    assert path == tmp_path / "learning_curve.png" and path.stat().st_size > 5000
    (axes,) = drawn
    assert axes.get_xlabel() == "environment steps"
    assert axes.get_ylabel() == "return (sum of rewards per episode)"
    assert axes.get_title(loc="left") == "dreamer  Pendulum-v1  seed 0"
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert [len(data) for data in lines.values()] == [100, 100, 1]
    assert list(lines) == ["training", "mean of the last 5", "evaluation"]
    assert lines["mean of the last 5"][[0, 1, 50]].tolist() == [[0, 0], [10, 5], [500, 480]]
    assert lines["evaluation"].tolist() == [[500, 450]]


def test_a_learning_curve_needs_returns(tmp_path, log):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match="no episode/return in"):
            plot_curve(folder, "")
