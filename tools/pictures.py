"""The pictures of the README, drawn from saved runs.

    python -m tools.pictures runs/pixels --script dreamer.py --out docs/dream.png
    python -m tools.pictures runs/cart_pole --script pilco.py --out docs/trial.png
    python -m tools.pictures results --out docs/curves.png

For a pixel agent: frames of a new episode, above what the world model predicts from the
actions alone, after --context frames. For PILCO's cart-pole: the rollout of the last trial, above
what the Gaussian processes predicted of it. For the results folder: learning curves.
"""

import csv
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from common.checkpoint import RunError
from common.logger import PNG
from common.run import evaluate, launch
from tools.dream_env import DEFAULT_SCRIPT, load_run
from tools.dreams import ORANGE, draw_belief, last_trial, open_loop, play

GREEN, BLUE = "#2f8f4e", "#1f5fa8"


def dream_picture(agent, seed, context, stride, margin, columns: int = 13) -> Figure:
    """Frames of an episode, every `stride` rows, above the model's; see `main`."""
    images = [key for key, shape in agent.spec["shapes"].items() if len(shape) == 3]
    if not images:
        raise RunError("this agent sees no images: train with --obs pixels")
    first = (context - 1) % stride  # the last frame that the model sees is shown
    rows = play(agent, 1, first + stride * columns, seed)
    dream, shown = open_loop(agent, rows, context), range(first, rows.shape[1], stride)
    figure = Figure(figsize=(0.75 * len(shown) + 0.3, 1.75), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, gridspec_kw=dict(wspace=0.04, hspace=0))
    for column, t in enumerate(shown):
        for row, frames in enumerate((dream["true", images[0]], dream[images[0]])):
            axes, side = panels[row, column], frames.shape[2]
            axes.imshow(frames[0, t, margin : side - margin, margin : side - margin].numpy())
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=ORANGE if row and t >= context else GREEN, linewidth=2)
    for axes, t in zip(panels[0], shown, strict=True):
        axes.set_title(f"{t - context + 1:+}" if t >= context else "seen", fontsize=8)
    for axes, label in zip(panels[:, 0], ("real", "dream"), strict=True):
        axes.set_ylabel(label, fontsize=10)
    return figure


@torch.no_grad()
def trial_picture(agent, every: int = 4) -> Figure:
    """The last trial of cart-pole, played again: frames, and the belief beside what happened."""
    steps, trial = np.arange(1, agent.args.horizon + 1), len(agent.first_states) - 1
    predicted, states = last_trial(agent)
    frames = evaluate(agent, 1, agent.args.seed * 1000 + trial, video_size=256)[1]
    angle = predicted["mean"][:, 3], predicted["covariance"][:, 3, 3], states[:, 3]
    cost = predicted["cost"], predicted["cost_variance"], agent.cost.at(states)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    film, *panels = figure.subplots(3, sharex=True, height_ratios=(0.62, 1.2, 1))
    for step in range(every // 2, len(steps), every):
        extent = (step - every / 2, step + every / 2, 0, 1)
        film.imshow(frames[step][70:182, 72:184], extent=extent, aspect="auto")
    film.axis("off")
    labels = "pole angle, rad", "cost"
    for axes, label, panel in zip(panels, labels, (angle, cost), strict=True):
        draw_belief(axes, steps, *panel)
        axes.set_ylabel(label)
    panels[1].legend(frameon=False, loc="upper right")
    panels[1].set(xlabel="steps of 0.1 s", xlim=(0, len(steps)))
    return figure


def curves_picture(results: Path, window: int = 5) -> Figure:
    """Training episodes, a line for each seed: the Dreamers' returns and the costs of PILCO."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    pendulum, cart_pole = figure.subplots(1, 2)
    for script, color in (("dreamer_v3", BLUE), ("dreamer", GREEN)):
        for number, episodes in enumerate(seeds_of(results / script / "Pendulum-v1.csv")):
            ends = range(1, len(episodes["step"]) + 1)
            mean = [episodes["return"][max(0, end - window) : end].mean() for end in ends]
            label = "" if number else f"{script}.py"
            pendulum.plot(episodes["step"] / 1000, mean, color=color, lw=1.5, label=label)
    for trials in seeds_of(results / "pilco" / "PILCO-CartPole-v0.csv"):
        cart_pole.plot(trials["step"] / 10, trials["final_cost"], color=ORANGE, lw=1.5, alpha=0.6)
    pendulum.set(title="Pendulum-v1", xlabel="environment steps, thousands", ylabel="return")
    pendulum.legend(frameon=False, loc="lower right", fontsize=9, handlelength=1)
    cart_pole.set(title="cart-pole, pilco.py", xlabel="seconds of experience")
    cart_pole.set(ylabel="cost of a rollout's last ten steps", xlim=(0, None))
    for axes in (pendulum, cart_pole):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def seeds_of(path: Path) -> list[dict[str, np.ndarray]]:
    """{column: numbers} of each seed in a file of results/, in order."""
    seeds = {}
    with path.open() as file:
        reader = csv.DictReader(file)
        for row in reader:
            seeds.setdefault(row["seed"], []).append([float(x or "nan") for x in row.values()])
    tables = [np.array(sorted(rows)).T for rows in seeds.values()]  # the step comes first
    return [dict(zip(reader.fieldnames, table, strict=True)) for table in tables]


def main(
    run: tyro.conf.Positional[Path],  # folder of a run, or of the results
    out: Path,  # the picture
    script: Path = DEFAULT_SCRIPT,  # that trained the run
    seed: int = 0,  # of the episode dreamed of
    context: int = 5,  # frames that the model sees before it dreams
    stride: int = 3,  # rows from one frame shown to the next
    margin: int = 0,  # pixels to cut off on each side
):
    if (run / "pilco").is_dir():
        curves_picture(run).savefig(out, **PNG)
        return
    agent, out = load_run(run, script), out.absolute()  # environments may change the directory
    if hasattr(agent, "actor"):
        figure = dream_picture(agent, seed, context, stride, margin)
    elif agent.args.env_id == "PILCO/CartPole-v0":
        figure = trial_picture(agent)
    else:
        raise RunError(f"pilco.py runs must be PILCO/CartPole-v0, not {agent.args.env_id}")
    figure.savefig(out, **PNG)


if __name__ == "__main__":
    launch(lambda: tyro.cli(main, prog="python -m tools.pictures", description=__doc__))
