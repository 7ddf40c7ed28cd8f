"""tools/dreams.py: pictures of what the world model of a run imagines."""

import json
import sys

import gymnasium
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from running import content, lines_of, same_leaves  # which also registers Both-v0
from tensordict import TensorDict

import common.run
import dreamer
import dreamer_v3
import pilco
from common.checkpoint import RunError
from tools import dreams
from tools.dream_env import dream_env

FLAGS = {
    dreamer: "--action-repeat 1 --steps 120 --prefill 60 --train-every 30 --pretrain 1",
    dreamer_v3: "--steps 84 --batch-size 2 --image-size 16",
}


def run_of(script, folder, env_id):
    flags = f"--preset debug --num-envs 1 --no-tensorboard --env-id {env_id} {FLAGS[script]}"
    script.main([*flags.split(), "--run", str(folder)])
    return script.load(folder)


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["dreams", *map(str, argv)])
    dreams.main()


@pytest.mark.parametrize("script", FLAGS)
def test_pictures_of_a_run(tmp_path, monkeypatch, capsys, script):
    """Images become videos, reward and numbers become a plot, and the run stays as it was."""
    side = run_of(script, tmp_path, "running:Both-v0").spec["shapes"]["eye"][0] + 4
    kept = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "checkpoint.pt")}
    capsys.readouterr()
    command(monkeypatch, tmp_path, "--episodes", 3, "--script", script.__file__)
    names = {"dream.png", "dream_eye.mp4", "dream_depth.mp4"}
    assert set(capsys.readouterr().out.split()) == {str(tmp_path / name) for name in names}
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    with Image.open(tmp_path / "dream.png") as picture:
        assert min(picture.size) > 200 and len(picture.convert("L").getcolors()) > 10
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "dream_eye.mp4"))
    width, height = next(frames)["size"]  # three episodes by three pictures, with their borders
    assert (width, height) == (3 * side, 3 * side)
    pictures = [np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in frames]
    assert len(pictures) == 20  # of an episode's 21 rows the first is only `previous`
    red, green = (np.array([p[:2, :, channel].mean() for p in pictures]) for channel in (0, 1))
    assert (green[:5] > 100).all() and (red[:5] < 50).all()  # the model sees a quarter
    assert (green[5:] < 50).all() and (red[5:] > 100).all()


@pytest.mark.parametrize("script", FLAGS)
def test_categories_from_the_environment_to_the_pictures(tmp_path, monkeypatch, capsys, script):
    """A run on categories learns, resumes exactly, stores whole numbers and can be dreamed."""
    monkeypatch.setattr(common.run, "plot_curve", lambda *_: None)
    whole, split = tmp_path / "whole", tmp_path / "split"
    argv = f"--preset debug --num-envs 1 --no-tensorboard --env-id running:Doors-v0 {FLAGS[script]}"
    for folder, steps in ((whole, 160), (split, 120), (split, 160)):
        script.main([*argv.split(), "--steps", str(steps), "--run", str(folder)])
    first, second = ([row for row in lines_of(f) if "updates" in row] for f in (whole, split))
    assert first == second and first[-1]["updates"] >= 4
    assert any(row.get("train/loss_model_reco", 0) > 0 for row in first if row["step"] > 120)
    agent, other = script.load(whole), script.load(split)
    assert agent.spec["categories"] == {"door": [5], "keys": [2, 3]}
    same_leaves(*(one.world_model.state_dict() for one in (agent, other)))
    rows = (np.fromfile(whole / "replay" / key, np.int32) for key in ("door", "keys"))
    door, keys = (x[: 160 * n].reshape(160, n) for x, n in zip(rows, (1, 2), strict=True))
    count = np.arange(160) % 21  # steps of the episode
    assert (door[:, 0] == count % 5).all()
    assert (keys == np.stack([count % 2, count % 3], -1)).all()
    capsys.readouterr()
    command(monkeypatch, whole, "--script", script.__file__)
    assert capsys.readouterr().out.split() == [str(whole / "dream.png")]
    envs = dream_env(agent, 3, horizon=2)
    observation, _ = envs.reset(seed=0)
    assert envs.single_observation_space["door"] == gymnasium.spaces.Discrete(5)
    for _ in range(4):
        assert envs.observation_space.contains(observation)
        observation, *_ = envs.step(envs.action_space.sample())


def test_the_batch_is_what_was_played(tmp_path):
    agent = run_of(dreamer_v3, tmp_path, "running:Both-v0")
    batch, again = (dreams.play(agent, 2, rows, seed=1) for rows in (100, 12))
    assert batch.shape == (2, 20) and again.shape == (2, 12)
    assert torch.equal(batch["reward"][:, :12], again["reward"])
    assert batch["reward"].tolist() == [[float(t) for t in range(1, 21)]] * 2
    assert torch.equal(batch["previous", "action"][:, 1:], batch["action"][:, :-1])


def test_film_shows_truth_model_and_error():
    true = torch.randint(256, (2, 5, 8, 8, 3), dtype=torch.uint8)
    model = torch.randint(256, (2, 5, 8, 8, 3), dtype=torch.uint8)
    frames = dreams.film(true, model, context=2)
    assert frames.shape == (5, 3 * 12, 2 * 12, 3) and frames.dtype == np.uint8
    for i in range(2):
        column = frames[:, :, 12 * i + 2 : 12 * i + 10]
        assert (column[:, 2:10] == true[i].numpy()).all()
        assert (column[:, 14:22] == model[i].numpy()).all()
        error = column[:, 26:34].astype(int)
        assert (error == (model[i].int() - true[i].int() + 255).numpy() // 2).all()
    assert (frames[:2, :2] == (0, 255, 0)).all() and (frames[2:, :2] == (255, 0, 0)).all()
    gray = dreams.film(true[..., :1], model[..., :1], context=2)
    assert (gray[:, 2:10, 2:10] == true[0, ..., :1].numpy()).all()


def test_the_plot_begins_with_the_reward_and_has_eight_curves(tmp_path, monkeypatch):
    plotted = {}
    monkeypatch.setattr(dreams, "plot", lambda curves, context: plotted.update(curves) or figure())
    rows = dict(place=torch.rand(2, 6, 9), reward=torch.rand(2, 6))
    true = TensorDict({k: v + 1 for k, v in rows.items()}, [2, 6])
    dreams.draw(TensorDict(rows, [2, 6]).set("true", true), 2, tmp_path)
    assert list(plotted) == ["reward", *(f"place {i}" for i in range(9))]
    for i in range(9):
        truth, model = plotted[f"place {i}"]
        assert torch.equal(model, rows["place"][0, :, i]) and torch.equal(truth, model + 1)
    monkeypatch.undo()
    plot = dreams.plot(plotted, 2)
    labels = [axes.get_ylabel() for axes in plot.axes]
    assert labels == ["reward", *(f"place {i}" for i in range(7))]
    truth, model = (line.get_ydata() for line in plot.axes[3].lines)
    assert list(truth) == plotted["place 2"][0].tolist()
    assert list(model) == plotted["place 2"][1].tolist()


def figure():
    return dreams.Figure()


def test_the_last_trial_of_pilco(tmp_path, monkeypatch, capsys):
    """The prediction is the one that the run logged before the trial; the states came after it."""
    pilco.main(f"--preset debug --trials 2 --no-tensorboard --run {tmp_path}".split())
    (*_, logged), _ = lines_of(tmp_path)[1:3], capsys.readouterr()
    agent = pilco.load(tmp_path)
    data = agent.data.clone()
    predicted, states = dreams.last_trial(agent)
    assert predicted["cost"].mean().item() == pytest.approx(logged["search/cost"], abs=1e-9)
    assert torch.equal(states, data["next", "observation"][-8:]) and len(agent.data) == 16
    costs = agent.cost.at(states)
    assert costs.mean().item() == pytest.approx(logged["episode/cost"], abs=1e-9)
    plots = dreams.plot_beliefs(predicted, costs, states).axes
    real = [costs, *states.mT]
    means = [predicted["cost"], *predicted["mean"].mT]
    for axes, *values in zip(plots, means, real, strict=False):
        for line, numbers in zip(axes.lines, values, strict=True):
            assert np.allclose(line.get_ydata(), numbers)
    assert [axes.get_ylabel() for axes in plots] == ["cost", "state 0", "state 1"]
    command(monkeypatch, tmp_path, "--script", pilco.__file__)
    assert capsys.readouterr().out.split() == [str(tmp_path / "dream.png")]


def test_a_read_only_run_is_drawn_elsewhere(tmp_path, monkeypatch, capsys, read_only):
    """tools.dreams and --eval write to runs/ below the working directory, and say so."""
    run, elsewhere = tmp_path / "seed7", tmp_path / "runs"
    elsewhere /= "-".join(run.parts[-3:])
    run_of(dreamer_v3, run, "running:Both-v0")
    before = content(run)
    monkeypatch.chdir(tmp_path)
    read_only(run)
    with pytest.raises(OSError, match="Read-only file system"):
        (run / "metrics.jsonl").open("ab")
    capsys.readouterr()
    command(monkeypatch, run, "--episodes", 2)
    text = capsys.readouterr().out
    assert f"{run} is read-only: what is drawn goes to {elsewhere}\n" in text
    dreamer_v3.main(["--eval", str(run), "--eval-episodes", "2"])
    text = capsys.readouterr().out
    assert "return 210.0 +- 0.0 over 2 episodes" in text and f"{elsewhere}/eval.mp4" in text
    names = {"dream.png", "dream_eye.mp4", "dream_depth.mp4", "eval.mp4"}
    assert {path.name for path in elsewhere.iterdir()} == names
    assert content(run) == before
    with pytest.raises(RunError, match="cannot be written to: .*Read-only file"):
        dreamer_v3.main(["--run", str(run), "--env-id", "running:Both-v0"])


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="there is no such folder"):
        command(monkeypatch, tmp_path / "nothing")
    agent = run_of(dreamer_v3, tmp_path / "v3", "dummy_envs:Base-v0")
    assert gymnasium.make("dummy_envs:Base-v0").unwrapped.length == 5
    with pytest.raises(RunError, match="an episode ends after 5 actions"):
        dreams.play(agent, 2, 100, seed=0)
    assert json.loads((tmp_path / "v3/args.json").read_text())["script"] == "dreamer_v3"
