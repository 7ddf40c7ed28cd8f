"""Turn a run folder into one raw curve: results/<script>/<task>[-<tag>]-seed<k>.csv

    python results/collect.py runs/dreamer_v3/Pendulum-v1/seed0 [tag]

Columns: environment steps, return of the training episode that ended there, wall-clock seconds; for
PILCO also the trial (0: random), mean cost of all its steps and of the last ten, what the model
predicted and the evaluations of the search.
The header names the command, commit, hardware and wall-clock that made them, and the evaluations
(of the sampling policy in DreamerV3, of its mode in Dreamer).
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.logger import read_metrics

PILCO = ("trial", "episode/cost", "episode/final_cost", "search/cost", "search/evaluations")


def main(run: str, tag: str = ""):
    args = json.loads(Path(run, "args.json").read_text())
    rows = list(read_metrics(Path(run, "metrics.jsonl")))
    name = re.sub("[/:]", "-", args["env_id"]) + (f"-{tag}" if tag else "")
    path = Path(__file__).parent / args["script"] / f"{name}-seed{args['seed']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [f"{k}: {v}" for origin in args["origin"] for k, v in origin.items()]
    header.append(f"wall-clock: {rows[-1]['time/wall']:.0f} s")
    if any("updates" in row for row in rows):
        header[-1] += f", updates: {max(row.get('updates', 0) for row in rows):.0f}"
    for row in rows:
        if "eval/return" in row:
            spread = f" +- {row['eval/return_std']:.1f}" if "eval/return_std" in row else ""
            header.append(f"evaluation at step {row['step']}: {row['eval/return']:.1f}{spread}")
    episodes = [row for row in rows if "episode/return" in row]
    more = [key for key in PILCO if any(key in row for row in episodes)]
    names = [key.replace("episode/", "").replace("search/", "search_") for key in more]
    lines = [f"# {line}" for line in header] + [",".join(["step", "return", "seconds", *names])]
    for row in episodes:
        cells = [row["step"], f"{row['episode/return']:.3f}", f"{row['time/wall']:.1f}"]
        cells += [f"{row[key]:.4g}" if key in row else "" for key in more]
        lines.append(",".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
