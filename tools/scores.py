"""Write results/scores.csv, one line per seed and kind of return, for a paper's table.

    python -m tools.scores

A training score at step x is the mean return of the episodes that ended in (x - w, x], where w is
10,000 steps, or x / 5 below 50,000: at the end of the run and every 50,000 steps. The evaluation
is that of the final policy. From the files of tools.collect.
"""

import csv
import json
import re
from pathlib import Path

from tools.collect import RESULTS
from tools.episodes import task_name

EVERY, WINDOW = 50_000, 10_000
COLUMNS = "script", "task", "recipe", "seed", "step", "return", "kind", "commit", "command"


def marks(end: int) -> list[tuple[int, float]]:
    """(step, window) of a run's training scores."""
    steps = {*range(EVERY, end + 1, EVERY), end}
    return [(step, min(WINDOW, step / 5)) for step in sorted(steps)]


def training_score(episodes: list[tuple[int, float]], step: int, window: float) -> float | None:
    """The mean return of the episodes (step, return) in the window; None if it has none."""
    returns = [value for end, value in episodes if step - window < end <= step]
    return sum(returns) / len(returns) if returns else None


def scores_of_file(script: str, path: Path, file: dict) -> list[dict]:
    """The lines for all seeds of one CSV file; `file` is what the manifest says of it."""
    lines, episodes = [], {}
    for row in csv.DictReader(path.read_text().splitlines()):
        episodes.setdefault(row["seed"], []).append((int(row["step"]), float(row["return"])))
    for seed, run in file["seeds"].items():
        last, preset = run["origin"][-1], run["args"].get("preset", "")
        line = dict(script=script, task=task_name(run["env_id"]), seed=seed)
        line |= dict(
            recipe="-".join(filter(None, (preset, file["tag"]))),
            commit=re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", last["commit"]),
        )
        line["command"] = last["command"]
        found = [
            (step, training_score(episodes[seed], step, window), run["returns"])
            for step, window in marks(run["steps"])
        ]
        for final in run["evaluations"][-1:]:
            found.append((final["step"], final["return"], "evaluation, " + run["evaluated"]))
        for step, value, kind in found:
            if value is not None:
                lines.append(line | {"step": step, "return": f"{value:.1f}", "kind": kind})
    return lines


def all_scores(folder: Path) -> list[dict]:
    """The lines for every manifest below the folder."""
    lines = []
    for manifest in sorted(folder.glob("*/manifest.json")):
        for name, file in json.loads(manifest.read_text()).items():
            lines += scores_of_file(manifest.parent.name, manifest.with_name(name), file)
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
