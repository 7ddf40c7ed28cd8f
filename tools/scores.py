"""Write results/scores.csv, one line per seed and kind of return, for a paper's table.

    python -m tools.scores

A training score at step x is the mean return of the episodes that ended in (x - w, x], where w is
10,000 steps, or x / 5 below 50,000: at the end of the run and every 50,000 steps. The evaluation
is that of the final policy. From the files of tools.collect.
"""

import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd

from tools.collect import RESULTS
from tools.episodes import read_file, read_json

EVERY, WINDOW = 50_000, 10_000
COLUMNS = "script", "task", "recipe", "seed", "step", "return", "kind", "commit", "command"


def scored_steps(end: int) -> list[tuple[int, float]]:
    """(step, window) of a run's training scores."""
    steps = {*range(EVERY, end + 1, EVERY), end}
    return [(step, min(WINDOW, step / 5)) for step in sorted(steps)]


def scores_of_run(script: str, file: dict, episodes: pd.DataFrame) -> list[dict]:
    """The lines of one run; `file` is what the manifest says of its CSV file.

    A window without the end of an episode has none.
    """
    task, seed = episodes[["task", "seed"]].iloc[0]
    run, scores = file["seeds"][seed], []
    for step, window in scored_steps(run["steps"]):
        ended = episodes["step"].between(step - window, step, inclusive="right")
        scores.append((step, episodes.loc[ended, "return"].mean(), run["returns"]))
    for final in run["evaluations"][-1:]:
        scores.append((final["step"], final["return"], f"evaluation, {run['evaluated']}"))
    origin = run["origin"][-1]
    line = {
        "script": script,
        "task": task,
        "recipe": "-".join(filter(None, (run["args"].get("preset"), file["tag"]))),
        "seed": seed,
        "commit": re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", origin["commit"]),
        "command": origin["command"],
    }
    return [
        {**line, "step": step, "return": f"{value:.1f}", "kind": kind}
        for step, value, kind in scores
        if not np.isnan(value)
    ]


def all_scores(folder: Path) -> list[dict]:
    """The lines for every manifest below the folder."""
    lines = []
    for manifest in sorted(folder.glob("*/manifest.json")):
        for name, file in read_json(manifest).items():
            for _, episodes in read_file(manifest.with_name(name), ""):
                lines += scores_of_run(manifest.parent.name, file, episodes)
    return lines


def main():
    path = RESULTS / "scores.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(all_scores(RESULTS))
    print(path)


if __name__ == "__main__":
    main()
