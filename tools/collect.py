"""Export the raw curves of run folders to results/<script>/<task>[-<tag>].csv

    python -m tools.collect runs/dreamer_v3/Pendulum-v1/seed* [--tag TAG]

The file of a task has the rows of all its seeds. Columns: environment steps, return of the training
episode that ended there, seed, wall-clock seconds; for PILCO also the trial (0: random), mean cost
of all its steps and of the last ten, the cost that the model predicted and how often the search
evaluated it. A seed that is already there is refused, unless --replace says so; the others stay.
Runs with other arguments than those in the file are refused, too: --tag names a variant, whose runs
get a separate file.

manifest.json beside the files records for each seed the commands, commits, versions and hardware
that produced it, its arguments, wall-clock time and evaluations, and what kind of return it has.
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
# Seeds of one result may differ in these: they change at most how long a run learns, or they
# stand for other flags (preset, size).
BOOKKEEPING = ("script", "origin", "run", "fresh", "eval")  # in args.json, not hyperparameters
MAY_DIFFER = (*BOOKKEEPING, "seed", "preset", "size", "steps", "trials", "benchmark", "device",
        "threads", "compile", "env_workers", "tensorboard", "log_every", "save_every",
        "eval_every", "dream_every", "eval_episodes")  # fmt: skip
PILCO = ("trial", "episode/cost", "episode/final_cost", "search/cost", "search/evaluations")
RETURNS = {  # what the returns of a script measure: (in training, in evaluation)
    "dreamer_v3": ("training episodes, sampling policy", "sampling policy"),
    "dreamer": ("training episodes, sampling policy with exploration", "mode of the policy"),
    "pilco": (
        "one rollout per trial, deterministic policy; trial 0: random actions",
        "deterministic policy",
    ),
    "jax": ("training episodes, sampling policy", "not evaluated"),  # tools/peers/jax_train.py
}


def csv_rows(metrics: list[dict], seed: int) -> list[dict]:
    """Rows of the CSV file, as strings, from those of metrics.jsonl."""
    episodes, rows = [row for row in metrics if "episode/return" in row], []
    pilco_keys = [key for key in PILCO if any(key in row for row in episodes)]
    for row in episodes:
        value = row["episode/return"]  # None for nan and inf
        cells = {"step": f"{row['step']}", "return": "nan" if value is None else f"{value:.3f}"}
        cells |= {"seed": f"{seed}", "seconds": f"{row['time/wall']:.1f}"}
        for key in pilco_keys:
            name = key.replace("episode/", "").replace("search/", "search_")
            cells[name] = f"{row[key]:.4g}" if key in row else ""
        rows.append(cells)
    return rows


def manifest_entry(args: dict, metrics: list[dict]) -> dict:
    """What the manifest records about a run."""
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
        "args": {key: value for key, value in args.items() if key not in BOOKKEEPING},
    }  # fmt: skip


def _round(value):
    return None if value is None else round(value, 3)


def differences(one: dict, two: dict) -> list[str]:
    """Differences in arguments that both runs have and seeds of one result must share."""
    shared = [key for key in one if key in two and key not in MAY_DIFFER]
    return [f"{key} {one[key]} and {two[key]}" for key in shared if one[key] != two[key]]


def collect(run: Path, folder: Path, tag: str = "", replace: bool = False) -> Path:
    """Add the run to its CSV file below `folder` and to the manifest; return the file's path."""
    if not (run / "args.json").is_file():
        raise RunError(f"{run} is not a run folder: it has no args.json")
    args = json.loads((run / "args.json").read_text())
    metrics, seed = list(read_metrics(run / "metrics.jsonl")), args["seed"]
    rows = csv_rows(metrics, seed)
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
    listed = files.setdefault(path.name, {"script": args["script"], "tag": tag, "seeds": {}})
    seeds, entry = listed["seeds"], manifest_entry(args, metrics)
    for other, recorded in seeds.items():
        if diffs := differences(recorded.get("args", {}), entry["args"]):
            text = f"{path} has seed {other} with other arguments than {run}: {', '.join(diffs)}"
            raise RunError(f"{text}. Name the variant with --tag, or choose another --into")
    if str(seed) in seeds and not replace:
        commits = ", ".join(origin["commit"][:7] for origin in seeds[str(seed)]["origin"])
        text = f"{path} already has seed {seed} (commit {commits})"
        raise RunError(f"{text}: --replace it, name a variant with --tag, or choose another --into")
    seeds[str(seed)] = entry
    write_rows(path, rows)
    write_manifest(manifest, files)
    return path


def write_rows(path: Path, rows: list[dict]):
    """Write the rows, sorted by seed and step, with every column that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rows = sorted(rows, key=lambda row: (int(row["seed"]), int(row["step"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_manifest(path: Path, files: dict):
    """Write {file: {"script", "tag", "seeds": {seed: entry}}}, one item of an entry per line."""
    texts = []
    for name, file in sorted(files.items()):
        seeds = []
        for seed, entry in sorted(file["seeds"].items(), key=lambda item: int(item[0])):
            items = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items())
            seeds.append(f"  {json.dumps(seed)}: {{\n{items}\n  }}")
        header = f'"script": {json.dumps(file["script"])}, "tag": {json.dumps(file["tag"])}'
        texts.append(f'{json.dumps(name)}: {{{header}, "seeds": {{\n' + ",\n".join(seeds) + "\n }}")
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],  # run folders
    tag: str = "",  # of a variant, for instance pixels; becomes part of the file name
    into: Path = RESULTS,  # the folder that holds <script>/<task>.csv
    replace: bool = False,  # a seed that is already there
):
    if not runs:
        raise RunError("no run folder given")
    for run in runs:
        print(collect(run, into, tag, replace))


if __name__ == "__main__":
    launch(lambda: tyro.cli(main, prog="python -m tools.collect", description=__doc__))
