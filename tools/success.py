"""How many seeds of PILCO have solved their task after each trial, from results/pilco/*.csv.

    python -m tools.success

A rollout solves its task if its last ten steps cost less than 0.1 on average. Prints a table with
95 % Wilson intervals of the success rates, and writes results/pilco/success.png.
"""

import csv
import json
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from scipy.stats import binomtest

FOLDER, SOLVED_COST = Path(__file__).parents[1] / "results" / "pilco", 0.1
TASKS = {
    "PILCO-Pendulum-v0": ("pendulum", "--"),
    "PILCO-CartPole-v0": ("cart-pole", "-"),
    "PILCO-DoublePendulum-v0": ("double pendulum", "-."),
    "PILCO-CartDoublePendulum-v0": ("cart and double pendulum", ":"),
}
HEAD = (
    "| task | solved | in trial (each seed) | experience, s (median) | wall-clock, s (median) |\n"
    "|---|---|---|---|---|"
)


def read(path: Path) -> dict[str, list[dict]]:
    """{seed: rows} of a CSV file of collect.py."""
    seeds = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        seeds.setdefault(row["seed"], []).append(row)
    return seeds


def first_solved(rows: list[dict]) -> dict | None:
    """The row of the first trial that solves the task."""
    return next((row for row in rows if float(row["final_cost"]) < SOLVED_COST), None)


def rate(solved: int, seeds: int) -> str:
    """'9 of 10 [60-98 %]', with the Wilson interval."""
    low, high = binomtest(solved, seeds).proportion_ci(method="wilson")
    return f"{solved} of {seeds} [{100 * low:.0f}-{100 * high:.0f} %]"


def table_row(name: str, seeds: dict[str, list[dict]], dt: float) -> str:
    """The medians are over the seeds that have solved the task; dt: seconds per step."""
    first = {seed: first_solved(rows) for seed, rows in seeds.items()}
    solved = [row for row in first.values() if row]
    trials = " ".join(row["trial"] if row else "-" for row in first.values())
    experience = f"{median(dt * int(row['step']) for row in solved):.0f}" if solved else "-"
    wall = f"{median(float(row['seconds']) for row in solved):.0f}" if solved else "-"
    return f"| {name} | {rate(len(solved), len(seeds))} | {trials} | {experience} | {wall} |"


def solved_share(seeds: dict[str, list[dict]]) -> list[float]:
    """Per cent of the seeds that have solved the task after 0, 1, 2, ... trials."""
    trials = max(int(rows[-1]["trial"]) for rows in seeds.values())
    solved = [int(row["trial"]) for row in map(first_solved, seeds.values()) if row]
    return [100 * sum(s <= k for s in solved) / len(seeds) for k in range(trials + 1)]


def draw(tasks: dict[str, dict], path: Path):
    """A step curve for each task of {task: seeds}."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for task, seeds in tasks.items():
        name, style = TASKS[task]
        curve, count = solved_share(seeds), len(seeds)
        label = f"{name}, {count} seed{'s' * (count > 1)}"
        axis.step(range(len(curve)), curve, style, where="post", color="black", label=label)
    axis.set_xlabel("trials (policies tried)")
    axis.set_ylabel("seeds that have solved it, %")
    axis.set_ylim(0, 103)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    tasks = {task: read(FOLDER / f"{task}.csv") for task in TASKS if f"{task}.csv" in manifest}
    print(HEAD)
    for task, seeds in tasks.items():
        runs = manifest[f"{task}.csv"]["seeds"]
        print(table_row(TASKS[task][0], seeds, runs[next(iter(seeds))]["args"]["dt"]))
    draw(tasks, FOLDER / "success.png")


if __name__ == "__main__":
    main()
