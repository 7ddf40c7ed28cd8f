"""How many seeds of PILCO have solved their task after each trial, from results/pilco/*.csv.

    python -m tools.success

A rollout solves its task if its last ten steps cost less than 0.1 on average. Prints a table and
writes results/pilco/success.png.
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

FOLDER, SOLVED_COST = Path(__file__).parents[1] / "results" / "pilco", 0.1
TASKS = {"PILCO-Pendulum-v0": ("pendulum", "--"), "PILCO-CartPole-v0": ("cart-pole", "-")}


def read(path: Path) -> dict[str, list[dict]]:
    """{seed: rows} of a CSV file of collect.py."""
    seeds = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        seeds.setdefault(row["seed"], []).append(row)
    return seeds


def main():
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    print("| Task | seed | solved in trial | experience until then, s | wall-clock until then, s |")
    print("|---|---|---|---|---|")
    for task, (name, style) in TASKS.items():
        solved, trials, seeds = [], 0, read(FOLDER / f"{task}.csv")
        for seed, rows in seeds.items():
            trials = max(trials, int(rows[-1]["trial"]))
            first = next((row for row in rows if float(row["final_cost"]) < SOLVED_COST), None)
            cells = ["-"] * 3
            if first is not None:
                solved.append(int(first["trial"]))
                seconds = int(first["step"]) / 10  # both tasks have steps of 0.1 s
                cells = [first["trial"], f"{seconds:.0f}", f"{float(first['seconds']):.0f}"]
            print("|", " | ".join(map(str, [name, seed, *cells])), "|")
        curve = [100 * sum(s <= k for s in solved) / max(len(seeds), 1) for k in range(trials + 1)]
        label = f"{name}, {len(seeds)} seeds"
        axis.step(range(trials + 1), curve, style, where="post", color="black", label=label)
    axis.set_xlabel("trials (policies tried, 4 s of experience each)")
    axis.set_ylabel("seeds that have solved it, %")
    axis.set_ylim(0, 103)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(FOLDER / "success.png", dpi=150)


if __name__ == "__main__":
    main()
