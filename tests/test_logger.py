"""Metrics file, mirrors, videos and pictures of common/logger.py."""

import json
import math
import os
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch

from common import logger as module
from common.checkpoint import RunError, load, save
from common.logger import Logger, plot_curve, write_picture, write_video


@pytest.fixture
def log(tmp_path):
    logger = Logger(tmp_path, tensorboard=False)
    yield logger
    logger.close()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: what time.monotonic() says."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_means_extras_and_wall_clock(tmp_path, log):
    log.add(0, {"loss": 1.0, "norm": torch.tensor(2.0, requires_grad=True)})
    log.add(0, {"loss": 2.0, "norm": torch.tensor(5, dtype=torch.int32)})
    log.add(0, {"loss": 6.0, "flag": torch.tensor(True)})
    log.log(16, **{"episode/return": np.float32(0.5), "note": "x", "n": torch.tensor(3)})
    log.log(32)
    first, second = rows(tmp_path)
    assert first.pop("time/wall") >= 0
    expected = {"step": 16, "loss": 3.0, "norm": 3.5, "flag": 1.0, "episode/return": 0.5}
    assert first == {**expected, "note": "x", "n": 3}
    assert second.keys() == {"step", "time/wall"}


def test_a_tensor_overwritten_after_add_does_not_change_the_mean(tmp_path, log):
    buffer = torch.tensor(1.0)  # like the output of a captured CUDA graph
    log.add(0, {"loss": buffer})
    buffer.fill_(100.0)
    log.add(0, {"loss": buffer})
    buffer.fill_(7.0)
    log.log(1)
    assert rows(tmp_path)[0]["loss"] == 50.5


def test_low_precision_tensors_are_summed_in_float32(tmp_path, log):
    for _ in range(1000):
        log.add(0, {"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    log.log(1)
    assert rows(tmp_path)[0]["loss"] == 1.0


def test_a_nonscalar_is_refused(log):
    with pytest.raises(AssertionError, match=r"loss has shape \(2,\)"):
        log.add(0, {"loss": torch.zeros(2)})


def test_nan_and_inf_become_null(tmp_path, log):
    log.add(0, {"a": float("nan"), "b": torch.tensor(math.inf), "c": 1.0})
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
    log.add(0, {"loss": torch.tensor(1.0), "plain": 1.0})
    save(tmp_path, logger=log)
    log.add(0, {"loss": torch.tensor(100.0)})
    log.log(20, a=2)
    log.file.write(b'{"step": 30, "a"')  # killed in the middle of a line
    log.file.flush()

    resumed = Logger(tmp_path, tensorboard=False)
    state = load(tmp_path)["logger"]
    resumed.load_state_dict(state)
    resumed.add(0, {"loss": torch.tensor(3.0), "plain": 3.0})
    resumed.log(20, a=3)
    resumed.close()
    first, second = rows(tmp_path)
    assert (first["step"], first["a"]) == (10, 1)
    assert (second["step"], second["a"], second["loss"], second["plain"]) == (20, 3, 2.0, 2.0)
    assert second["time/wall"] >= state["wall"] >= first["time/wall"]


def test_later_changes_do_not_reach_a_saved_state(log):
    log.add(0, {"a": torch.tensor(1.0)})
    state = log.state_dict()
    log.add(0, {"a": torch.tensor(1.0), "b": 2.0})
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
    other = Logger(tmp_path, tensorboard=False)
    with pytest.raises(RunError, match=f"has 30 bytes, but {len(text)} when"):
        other.load_state_dict(state)
    other.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == text[:30]


def test_a_line_has_progress_updates_returns_and_sums_of_losses(tmp_path, clock, capsys):
    log = Logger(tmp_path, 1000, tensorboard=False)
    losses = {"train/loss_model_kl": 1.0, "train/loss_model_reco": 2.5, "train/loss_actor": -4.0}
    log.log(10, updates=0)
    log.add(100, losses | {"train/loss_value": 0.5, "train/loss_replay_value": 9.0})
    clock[0] += 4
    for _ in range(10):
        log.add(100, losses | {"train/loss_value": 1.5, "train/grad_norm": 7.0})
    log.log(110, **{"updates": 60, "episode/return": 12.34567})
    clock[0] += 1
    log.log(120, updates=61)
    log.close()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 10 of 1,000 (1%), updates 0"  # no rate before an update
    speeds = "0:05:56 left, 2.5 steps/s, 2.5 updates/s"
    values = "updates 60, episode/return 12.35, model 3.5, actor -4, value 1.409"
    assert second == f"step 110 of 1,000 (11%), {speeds}, {values}"
    speeds = "0:03:40 left, 4 steps/s, 2 updates/s"
    assert third == f"step 120 of 1,000 (12%), {speeds}, updates 61"  # no loss since the last line


def test_a_metric_that_is_not_finite_is_printed_as_in_the_file(tmp_path, capsys):
    log = Logger(tmp_path, 1000, tensorboard=False)
    log.add(10, {"train/loss_model_kl": 1.0, "train/loss_model_reco": math.nan})
    log.log(10, **{"episode/return": math.inf})
    log.close()
    assert capsys.readouterr().out == "step 10 of 1,000 (1%), episode/return None\n"


def test_at_most_one_line_a_second_but_every_evaluation_and_the_last(tmp_path, clock, capsys):
    log = Logger(tmp_path, 1000, tensorboard=False)
    for step in range(0, 1000, 50):  # two seconds
        log.log(step, **{"episode/return": 1.0})
        clock[0] += 0.1
    log.log(999, **{"eval/return": 2.0})
    log.log(999, updates=5)
    log.log(1002, updates=6)  # the environments step together
    log.log(1002, **{"eval/return": 3.0, "eval/return_std": 1.0})
    log.close()
    assert len(rows(tmp_path)) == 24
    assert capsys.readouterr().out.splitlines() == [
        "step 0 of 1,000 (0%), episode/return 1",
        "step 500 of 1,000 (50%), episode/return 1",
        "step 999 of 1,000 (100%), eval/return 2",
        "step 1,000 of 1,000 (100%), updates 6",
        "step 1,000 of 1,000 (100%), eval/return 3, eval/return_std 1",
    ]


def test_a_long_burst_of_updates_prints_a_line_every_30_seconds(tmp_path, clock, capsys):
    log = Logger(tmp_path, 1000, tensorboard=False)
    log.log(100, **{"episode/return": 1.0})
    for update in range(65):
        clock[0] += 1
        log.add(100, {"train/loss_model_reco": torch.tensor(update / 4), "train/grad_norm": 1.0})
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 100 of 1,000 (10%), episode/return 1",
        "step 100 of 1,000 (10%), 1 updates/s, model 3.75",  # the mean so far
        "step 100 of 1,000 (10%), 1 updates/s, model 7.625",
    ]


def test_speed_is_that_of_this_process_since_its_first_update(tmp_path, clock, capsys):
    log = Logger(tmp_path, 1000, tensorboard=False)
    log.load_state_dict({"step": 500, "wall": 9e6, "bytes": 0, "sums": {}, "counts": {}})
    clock[0] += 1
    log.log(550)  # random steps take no time
    assert capsys.readouterr().out == "step 550 of 1,000 (55%)\n"
    log.add(550, {})
    clock[0] += 30
    log.add(600, {})
    log.log(600)
    text = "step 600 of 1,000 (60%), 0:04:00 left, 1.667 steps/s, 0.03333 updates/s\n"
    assert capsys.readouterr().out == text
    log.close()


def test_a_long_time_left(tmp_path, clock, capsys):
    log = Logger(tmp_path, 10**18, tensorboard=False)
    for step in (0, 1):
        log.add(step, {})
        clock[0] += 0.5
    log.log(1)
    log.close()
    assert "(0%), 277777777777777:46:40 left, 1 steps/s, 1 updates/s" in capsys.readouterr().out


def test_a_closed_pipe_does_not_end_the_run(tmp_path, monkeypatch):
    """Ctrl-C also ends the `tee` that reads what is printed."""
    log = Logger(tmp_path, 1000, tensorboard=False)
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        log.log(10, updates=1)
        log.log(1000, updates=2)
    log.close()
    assert [row["updates"] for row in rows(tmp_path)] == [1, 2]


def test_without_a_number_of_steps_nothing_is_printed(log, capsys):
    log.add(1, {"train/loss_actor": 1.0})
    log.log(2, **{"eval/return": 1.0})
    assert capsys.readouterr() == ("", "")


def test_a_note_is_printed_once(log, capsys):
    for text in ("hello", "hello", "world"):
        log.note(text)
    assert capsys.readouterr() == ("hello\nworld\n", "")


def test_tensorboard_mirrors_and_hides_what_a_killed_run_left(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    log = Logger(tmp_path)
    log.log(10, loss=1.0, note="x", bad=math.nan)
    state = log.state_dict()
    log.log(20, loss=2.0)
    log.close()
    log = Logger(tmp_path)
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
    assert capsys.readouterr().out.count("pip install tensorboard") == 1
    assert len(rows(tmp_path)) == 2


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
