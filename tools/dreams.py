"""What a trained world model imagines, beside what really happened.

    python -m tools.dreams runs/dreamer_v3/Pendulum-v1/seed0
    python -m tools.dreams runs/pilco/PILCO-CartPole-v0/seed0 --script pilco.py

The run's policy plays a few episodes. The model sees their first quarter and imagines the rest
from the actions alone. The pictures go to the run folder, or, if that is read-only, to a folder in
runs/ that is named like it; the run may still be training:

    dream.png      rewards and vector observations of the first episode
    dream_KEY.mp4  image observations, if any: truth, model and error, one above the other

Of pilco.py: the cost and the states that its Gaussian processes predicted for the last trial.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tensordict import TensorDict
from torch import Tensor

from common.checkpoint import RunError
from common.envs import make_envs
from common.logger import write_picture, write_video
from common.replay import with_previous
from common.run import (
    Count,
    Natural,
    autocast,
    check_flags,
    check_same_spec,
    launch,
    output_folder,
)
from tools.dream_env import DEFAULT_SCRIPT, decode, load_run

ORANGE = "#e07b1a"  # what is imagined


@dataclass
class Args:
    """Flags."""

    run: tyro.conf.Positional[Path]  # folder of a run
    script: Path = DEFAULT_SCRIPT  # that trained it
    episodes: Count = 6  # played in parallel
    rows: Count = 128  # at most, of each episode; the model sees a quarter of them
    seed: Natural = 0  # of environments and noise


def play(agent, episodes: int, rows: int, seed: int) -> TensorDict:
    """Let the agent play: a batch [episodes, at most `rows`] of the first rows of each episode.

    It ends with the shortest episode. RunError if that has fewer than eight actions.
    """
    envs = make_envs(agent.args, num_envs=episodes, seed=seed, env_workers=False)
    check_same_spec(agent.args.env_id, agent.spec, envs.spec)
    played, latent = [], None
    torch.manual_seed(seed)
    while len(played) <= rows and not (played and played[-1]["is_last"].any()):
        env_rows = envs.step(None if latent is None else latent["action"])
        latent = agent.act(env_rows, latent)
        played.append(agent.stored_rows(env_rows, latent))
    envs.close()
    if len(played) <= 8:
        raise RunError(f"an episode ends after {len(played) - 1} actions: too short for a dream")
    return with_previous(torch.stack(played, 1)).to(agent.device)


@torch.no_grad()
def open_loop(agent, batch: TensorDict, context: int) -> TensorDict:
    """Infer `context` rows of batch [B, T] from observations, the others from actions alone.

    Returns [B, T]: observations and `reward` of the model, and the true ones under "true".
    """
    with torch.random.fork_rng(), autocast(agent):
        torch.manual_seed(0)
        td, keys = agent.world_model(batch.copy()), agent.env.shapes
        latents = list(td[:, :context].select(*keys).unbind(1))
        for action in td["previous", "action"][:, context:].unbind(1):
            step = agent.env.step(latents[-1].copy().set("action", action))
            latents.append(step["next"].select(*keys))
        out = decode(agent, torch.stack(latents, 1))
    keys = [*agent.spec["shapes"], "reward"]
    return out.select(*keys).set("true", td.select(*keys)).cpu()


def draw(dream: TensorDict, context: int, folder: Path) -> list[Path]:
    """Draw a dream that `open_loop` returned; return the paths of its pictures."""
    paths, curves = [], {}
    for key, true in sorted(dream["true"].items(), key=lambda item: item[0] != "reward"):
        if true.dtype == torch.uint8:
            frames = film(true, dream[key], context)
            paths.append(write_video(folder, f"dream_{key}", frames, fps=10))
        elif true.ndim == 2:
            curves[key] = true[0], dream[key][0]
        else:
            pairs = zip(true[0].unbind(-1), dream[key][0].unbind(-1), strict=True)
            curves |= {f"{key} {i}": pair for i, pair in enumerate(pairs)}
    return [write_picture(folder, "dream", plot(curves, context)), *paths]


def film(true: Tensor, model: Tensor, context: int):
    """Truth, model and error in a column for each episode: uint8 [T, h, w, 3].

    true, model: uint8 (B, T, H, W, C). The borders are green for the first `context` images, which
    the model sees, and red for the others, which it imagines.
    """
    error = (model.int() - true.int() + 255) // 2
    tiles = torch.stack([true.int(), model.int(), error], 2)  # (B, T, 3, H, W, C)
    tiles = tiles[..., [min(channel, tiles.shape[-1] - 1) for channel in range(3)]]
    batch, steps, _, height, width, _ = tiles.shape
    frames = torch.zeros(steps, 3, height + 4, batch, width + 4, 3, dtype=torch.uint8)
    frames[:context, ..., 1] = 255
    frames[context:, ..., 0] = 255
    frames[:, :, 2:-2, :, 2:-2] = tiles.permute(1, 2, 3, 0, 4, 5).byte()
    return frames.flatten(3, 4).flatten(1, 2).numpy()


def plot(curves: dict[str, tuple[Tensor, Tensor]], context: int) -> Figure:
    """Plot true and imagined numbers, the first eight of {label: (true (T), model (T))}.

    The model sees the first `context` rows and imagines the others.
    """
    shown = list(curves.items())[:8]
    figure = Figure(figsize=(8, 1 + 1.1 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (label, (true, model)) in zip(panels, shown, strict=True):
        axes.plot(true, color="black", lw=1.5, label="true")
        axes.plot(model, color=ORANGE, lw=1.5, ls="--", label="model")
        axes.axvspan(-0.5, context - 0.5, color="0.92", lw=0)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    panels[0].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    panels[0].set_title("gray: the model sees the truth; then it imagines", loc="left", fontsize=9)
    panels[-1].set_xlabel("rows (one per action)")
    return figure


def plot_beliefs(predicted: TensorDict, costs: Tensor, states: Tensor) -> Figure:
    """Figure: predicted cost and states with two deviations, and what really happened.

    predicted [H]: `cost`, `cost_variance`, `mean`, `covariance`; costs (T), states (T, D).
    """
    variances = predicted["covariance"].diagonal(dim1=-2, dim2=-1)
    panels = {"cost": (predicted["cost"], predicted["cost_variance"], costs)}
    for i, real in enumerate(states.mT):
        panels[f"state {i}"] = predicted["mean"][:, i], variances[:, i], real
    figure = Figure(figsize=(7, 1 + 1.3 * len(panels)), layout="constrained")
    axes, steps = figure.subplots(len(panels), sharex=True), np.arange(1, len(variances) + 1)
    for ax, (label, panel) in zip(axes, panels.items(), strict=True):
        draw_belief(ax, steps, *panel)
        ax.set(ylabel=label, xlabel="" if ax is not axes[-1] else "steps")
    axes[0].legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def draw_belief(axes, steps, mean: Tensor, variance: Tensor, real: Tensor):
    """A predicted number (H) with two standard deviations, and what happened (T)."""
    spread = 2 * variance.clamp(min=0).sqrt()
    band = dict(color=ORANGE, alpha=0.3, lw=0, label="two standard deviations")
    axes.fill_between(steps, mean - spread, mean + spread, **band)
    axes.plot(steps, mean, color=ORANGE, lw=2, label="predicted")
    axes.plot(steps[: len(real)], real, color="black", lw=1.2, label="what happened")
    axes.spines[["top", "right"]].set_visible(False)


def last_trial(agent) -> tuple[TensorDict, Tensor]:
    """Drop pilco.py's last trial; return beliefs [H] predicted before it, its states (T, D)."""
    start = (agent.data["observation"] == agent.first_states[-1]).all(-1).nonzero()[-1].item()
    states = agent.data["next", "observation"][start:]
    agent.data, agent.first_states = agent.data[:start], agent.first_states[:-1]
    agent.world_model.factorize(*agent.world_model.dataset(agent.data))
    return agent.predict()["next"][0], states


def main():
    args = tyro.cli(Args, prog="python -m tools.dreams", description=__doc__)
    check_flags(args)
    agent = load_run(args.run, args.script)
    folder = output_folder(agent)
    if hasattr(agent, "actor"):
        batch = play(agent, args.episodes, args.rows, args.seed)
        context = batch.shape[1] // 4
        paths = draw(open_loop(agent, batch, context), context, folder)
    else:
        predicted, states = last_trial(agent)
        figure = plot_beliefs(predicted, agent.cost.at(states), states)
        paths = [write_picture(folder, "dream", figure)]
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    launch(main)
