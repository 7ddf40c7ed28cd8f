"""Read the training episodes of runs, and published curves, into pandas tables.

    from tools.episodes import read_all
    episodes, notes = read_all(["runs/dreamer_v3", "small=results/dreamer_v3/Pendulum-v1.csv"])
    episodes.groupby(["task", "method", "seed"])["return"].max()

A path is a run folder, a CSV file of results/, a score file of the Dreamer authors (.json or .gz),
or a folder that contains some; NAME=PATH names the method. A row is a finished training episode:

    step, return    environment steps at its end, and the sum of its rewards
    task, method    walker_walk, ...; the script with its tag, or NAME
    seed, run       of the run: its seed as text, and a number that no other run has
    source          the run folder, or the file and the seed
    env_id, args    as in args.json; a CSV file or a score file knows only some args, or none
"""

import gzip
import json
import os
import re
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from common.checkpoint import RunError
from common.logger import read_metrics
from tools.collect import differences

REFERENCES = Path(__file__).parents[1] / "results" / "reference"
CURVE = ["task", "method", "seeds", "step", "return", "low", "high", "band"]  # columns of a curve


def read_all(paths, tasks=()) -> tuple[pd.DataFrame, list[str]]:
    """The episodes of all runs, or those of some tasks, and notes on runs that have none so far."""
    if not paths:
        raise RunError("no runs given: name run folders, or folders that contain some")
    found = [find_runs(path) for path in paths]
    runs = [(run["task"].iloc[0], run) for runs, _ in found for run in runs]
    found_tasks = {task for task, _ in runs}
    if missing := ", ".join(sorted(set(tasks) - found_tasks)):
        raise RunError(f"no run of {missing}: there are runs of {', '.join(sorted(found_tasks))}")
    chosen = [run for task, run in runs if task in (tasks or found_tasks)]
    return join(chosen), [note for _, notes in found for note in notes]


def find_runs(spec: str) -> tuple[list[pd.DataFrame], list[str]]:
    """The episodes of each run below a PATH or NAME=PATH; notes on runs without any."""
    name, path = "", Path(spec)
    if not path.exists() and "=" in spec:
        name, path = spec.partition("=")[0], Path(spec.partition("=")[2])
    if not path.exists():
        raise RunError(f"{path} does not exist")
    files = [path] if path.is_file() else []
    files += files_below(path, "args.json") + files_below(path, "manifest.json")
    runs = [run for file in files for run in read_file(file, name)]
    early = [source for source, episodes in runs if episodes.empty]
    notes = [f"Left out: {source}: no finished training episode so far." for source in early]
    if len(early) == len(runs):
        why = " ".join(notes) or "no args.json, no CSV file with a manifest.json, no scores"
        raise RunError(f"no runs found in {path}: {why}")
    return [episodes for _, episodes in runs if len(episodes)], notes


def files_below(folder: Path, name: str) -> list[Path]:
    """The files of that name, sorted; links are followed, each folder is read once."""
    files, visited = [], set()
    for path, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in visited:
            subfolders.clear()
        elif name in names:
            files.append(Path(path, name))
        visited.add(real)
    return sorted(files)


def read_file(path: Path, name: str):
    """Yield make_run(...) of each run in an args.json, a manifest.json, a CSV or a score file."""
    if path.name == "args.json":
        with reading(path.parent, "a run folder"):
            args, rows = read_json(path), read_metrics(path.with_name("metrics.jsonl"))
            key, method, folder = "episode/return", name or args["script"], str(path.parent)
            episodes = [(row["step"], row[key]) for row in rows if key in row]
            yield make_run(method, args["env_id"], args["seed"], episodes, folder, args)
    elif path.name == "manifest.json":
        with reading(path, "a manifest of tools/collect.py"):
            for table in sorted(map(path.with_name, read_json(path)), key=lambda table: table.stem):
                yield from read_file(table, name)
    elif path.suffix == ".csv":
        with reading(path, "a CSV file of tools/collect.py with its manifest.json"):
            file = read_json(path.with_name("manifest.json"))[path.name]
            method = name or "-".join(filter(None, (file["script"], file["tag"])))
            rows = pd.read_csv(path, dtype={"seed": str})
            for seed, episodes in rows.groupby("seed", sort=False)[["step", "return"]]:
                entry, source = file["seeds"][seed], f"{path} {seed}"
                args = {"action_repeat": entry["action_repeat"], **entry.get("args", {})}
                yield make_run(method, entry["env_id"], seed, episodes.values, source, args)
    else:
        with reading(path, 'a list of {"task", "method", "seed", "xs", "ys"}'):
            for run in read_json(path):
                episodes = zip(run["xs"], run["ys"], strict=True)
                method, source = name or run["method"], f"{path} {run['task']} {run['seed']}"
                yield make_run(method, run["task"], run["seed"], episodes, source, {})


def make_run(method, env_id, seed, episodes, source, args) -> tuple[str, pd.DataFrame]:
    """The source of a run and its episodes, sorted; RunError for a non-finite return."""
    run = pd.DataFrame(list(episodes), columns=["step", "return"]).astype(float)
    if wrong := int((~np.isfinite(run["return"])).sum()):  # null stands for nan and inf
        raise RunError(f"{source}: {wrong} of {len(run)} returns are not finite numbers")
    run = run.astype({"step": int}).sort_values("step", kind="stable")
    run = run.assign(method=method, task=task_name(env_id), env_id=env_id, seed=str(seed))
    return source, run.assign(source=source, args=[args] * len(run))


def task_name(env_id: str) -> str:
    """The authors' name of a task: walker_walk, cup_catch, atari_ms_pacman; else the id itself."""
    name = re.sub(r"^dm_control/(\w+)-(\w+)-v\d+$", r"\1_\2", env_id.removeprefix("dmc_"))
    if match := re.fullmatch(r"ALE/(\w+)-v\d+", env_id):
        name = "atari" + re.sub("([A-Z])", r"_\1", match[1]).lower()
    return name.replace("ball_in_cup_", "cup_")


def join(runs: list[pd.DataFrame]) -> pd.DataFrame:
    """All episodes, numbered by run; RunError where a method's runs are not seeds of one setup."""
    episodes = pd.concat([run.assign(run=i) for i, run in enumerate(runs)], ignore_index=True)
    for (task, method), same in episodes.drop_duplicates("run").groupby(["task", "method"]):
        for one, two in combinations(same.itertuples(), 2):
            same_seed = [f"seed {one.seed} twice"] if one.seed == two.seed else []
            if reasons := same_seed or differences(one.args, two.args):
                text = f"runs of {method} on {task} do not go together: {', '.join(reasons)}"
                raise RunError(f"{text} ({one.source}, {two.source}). Name variants: NAME=PATH")
    order = pd.CategoricalDtype(episodes["method"].unique())  # groupby keeps it
    return episodes.astype({"method": order})


def read_references(names, tasks) -> tuple[pd.DataFrame, list[str]]:
    """Published curves of the tasks, and notes; RunError for a name with none of the tasks."""
    curves, notes = {}, []
    for name in names:
        path = Path(name) if Path(name).is_file() else REFERENCES / f"{name}.json"
        if not path.is_file():
            available = ", ".join(sorted(file.stem for file in REFERENCES.glob("*.json")))
            raise RunError(f"no reference {name}: there are {available}, or give a file")
        with reading(path, "laid out as results/reference/*.json"):
            data, method = read_json(path), f"{path.stem} (published)"
            shared = [task for task in tasks if task in data["curves"]]
            for task in shared:
                rows = [(float(step), *point) for step, point in data["curves"][task].items()]
                curve = pd.DataFrame(rows, columns=["step", "return", "low", "high", "seeds"])
                curve = curve.astype(float).sort_values("step")
                if curve.empty or not np.isfinite(curve).all(axis=None):
                    raise ValueError(f"{task} has no points, or one that is not finite")
                curves[method, task] = curve.assign(task=task, method=method, band="min-max")
            notes.append(f"{method}: {data['notes']}")
        if not shared:
            available = ", ".join(sorted(data["curves"]))
            raise RunError(f"{method} has no curve for {', '.join(tasks)}: it has {available}")
    kinds = {"step": int, "seeds": int, "return": float, "low": float, "high": float}
    published = pd.concat([pd.DataFrame(columns=CURVE), *curves.values()], ignore_index=True)
    return published.astype(kinds), notes


@contextmanager
def reading(path, expected):
    """RunError "path is not `expected`" for what goes wrong inside, except for a RunError."""
    try:
        yield
    except RunError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError) as error:
        raise RunError(f"{path} is not {expected}: {error!r}") from None


def read_json(path: Path):
    """The contents of a .json or .json.gz."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
