"""Turn run folders into raw curves for others: results/<script>/<task>[-<tag>].csv

    python -m tools.collect runs/dreamer_v3/Pendulum-v1/seed* [--tag TAG]

One file per task, with the rows of all its seeds. Columns: environment steps, return of the
training episode that ended there, seed, wall-clock seconds; for PILCO also the trial (0: random),
mean cost of all its steps and of the last ten, what the model predicted and the evaluations of the
search. A seed that is there already is replaced, the others stay. Runs with other arguments than
those in the file are refused: --tag names a variant, whose runs get a file of their own.

manifest.json beside the files says for each seed of each file which commands, commits, versions and
hardware made it, with which arguments, how long it took, how its policy was evaluated and what the
returns are.
"""

import csv
import json
import re
from pathlib import Path

import tyro

from common.checkpoint import RunError
from common.logger import read_metrics
from common.run import launch

RESULTS = Path(__file__).parents[1] / "results"
# Runs of one method may differ in these: they do not change what is learned, or only how long, or
# other flags say the same (preset, size).
CONTROL = ("script", "origin", "run", "fresh", "eval")  # what args.json says of no algorithm
FREE = (*CONTROL, "seed", "preset", "size", "steps", "trials", "benchmark", "device",
        "threads", "compile", "env_workers", "tensorboard", "log_every", "save_every", "eval_every",
        "dream_every", "eval_episodes")  # fmt: skip
PILCO = ("trial", "episode/cost", "episode/final_cost", "search/cost", "search/evaluations")
RETURNS = {  # what a reader has to know before comparing them: (returns, evaluations)
    "dreamer_v3": ("training episodes, sampling policy", "sampling policy"),
    "dreamer": ("training episodes, sampling policy with exploration", "mode of the policy"),
    "pilco": (
        "one rollout per trial, deterministic policy; trial 0: random actions",
        "deterministic policy",
    ),
    "jax": ("training episodes, sampling policy", "not evaluated"),  # tools/peers/jax_train.py
}


def rows_of(metrics: list[dict], seed: int) -> list[dict]:
    """Rows of the CSV, as strings, from those of metrics.jsonl."""
    episodes, rows = [row for row in metrics if "episode/return" in row], []
    more = [key for key in PILCO if any(key in row for row in episodes)]
    for row in episodes:
        value = row["episode/return"]  # null is nan or inf
        cells = {"step": f"{row['step']}", "return": "nan" if value is None else f"{value:.3f}"}
        cells |= {"seed": f"{seed}", "seconds": f"{row['time/wall']:.1f}"}
        for key in more:
            name = key.replace("episode/", "").replace("search/", "search_")
            cells[name] = f"{row[key]:.4g}" if key in row else ""
        rows.append(cells)
    return rows


def entry_of(args: dict, metrics: list[dict]) -> dict:
    """What the manifest says about a run."""
    updates = [row["updates"] for row in metrics if "updates" in row]
    returns, evaluations = RETURNS.get(args["script"], ("training episodes", "unknown"))
    return {
        "env_id": args["env_id"],
        "action_repeat": args["action_repeat"],
        "origin": args["origin"],
        "steps": metrics[-1]["step"],
        "wall_clock_seconds": round(metrics[-1]["time/wall"]),
        "updates": round(max(updates)) if updates else None,
        "returns": returns,
        "evaluated": evaluations,
        "evaluations": [
            {"step": row["step"], "return": _round(row["eval/return"]),
             "std": _round(row.get("eval/return_std"))}
            for row in metrics if row.get("eval/return") is not None
        ],
        "args": {key: value for key, value in args.items() if key not in CONTROL},
    }  # fmt: skip


def _round(value):
    return None if value is None else round(value, 3)


def differences(one: dict, two: dict) -> list[str]:
    """What keeps runs with these arguments from being seeds of one thing, as far as both know."""
    shared = [key for key in one if key in two and key not in FREE]
    return [f"{key} {one[key]} and {two[key]}" for key in shared if one[key] != two[key]]


def collect(run: Path, folder: Path, tag: str = "") -> Path:
    """Add the run to its file below `folder`, and to the manifest; returns the file's path."""
    if not (run / "args.json").is_file():
        raise RunError(f"{run} is no run folder: it has no args.json")
    args = json.loads((run / "args.json").read_text())
    metrics, seed = list(read_metrics(run / "metrics.jsonl")), args["seed"]
    rows = rows_of(metrics, seed)
    if not rows:
        raise RunError(f"no finished training episode in {run}/metrics.jsonl so far")
    name = re.sub("[/:]", "-", args["env_id"]) + (f"-{tag}" if tag else "")
    path = folder / args["script"] / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["seed"] != str(seed)]
    manifest = path.with_name("manifest.json")
    files = json.loads(manifest.read_text()) if manifest.exists() else {}
    file = files.setdefault(path.name, {"script": args["script"], "tag": tag, "seeds": {}})
    entry = entry_of(args, metrics)
    for other, known in file["seeds"].items():
        if what := differences(known.get("args", {}), entry["args"]):
            text = f"{path} has seed {other} with other arguments than {run}: {', '.join(what)}"
            raise RunError(f"{text}. Name the variant with --tag, or choose another --into")
    if str(seed) in file["seeds"]:
        commits = [origin["commit"][:7] for origin in file["seeds"][str(seed)]["origin"]]
        print(f"replaces seed {seed} of commit {', '.join(commits)}")
    file["seeds"][str(seed)] = entry
    write_rows(path, rows)
    write_manifest(manifest, files)
    return path


def write_rows(path: Path, rows: list[dict]):
    """Write the rows, sorted by seed and step, with all the columns that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rows = sorted(rows, key=lambda row: (int(row["seed"]), int(row["step"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_manifest(path: Path, files: dict):
    """Write {file: {"script", "tag", "seeds": {seed: entry}}}, an item of an entry per line."""
    text = []
    for name, file in sorted(files.items()):
        seeds = []
        for seed, entry in sorted(file["seeds"].items(), key=lambda item: int(item[0])):
            items = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items())
            seeds.append(f"  {json.dumps(seed)}: {{\n{items}\n  }}")
        head = f'"script": {json.dumps(file["script"])}, "tag": {json.dumps(file["tag"])}'
        text.append(f'{json.dumps(name)}: {{{head}, "seeds": {{\n' + ",\n".join(seeds) + "\n }}")
    path.write_text("{\n" + ",\n".join(text) + "\n}\n")


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],  # run folders
    tag: str = "",  # of a variant, for instance pixels; a part of the file's name
    into: Path = RESULTS,  # the folder that holds <script>/<task>.csv
):
    if not runs:
        raise RunError("no run folder given")
    for run in runs:
        print(collect(run, into, tag))


if __name__ == "__main__":
    launch(lambda: tyro.cli(main, description=__doc__))
