"""Comparison plots and tables: runs side by side, beside the published curves.

    python -m tools.plot runs --reference v3_dmc_proprio
    python -m tools.plot results/dreamer_v3 results/dreamer        # from the CSV files
    python -m tools.plot small=runs/a big=runs/b --out plots/size  # variants, named

Paths are run folders, folders that contain some, CSV files of results/ (with their manifest.json),
folders of them, or score files of the Dreamer authors (.json, .json.gz). Writes to --out:

    curves      .png .svg .csv   return against environment steps, one panel per task
    aggregates  .png .svg .csv   IQM, median, mean and optimality gap over tasks
    profile     .png .svg .csv   share of runs above a score
    table       .md .tex         the scores, per task and over tasks

A curve is the return of training episodes. A seed's value at x is the mean of its episodes that
ended in (x - bin, x]; where none did, it keeps the last one, between its first and its last. The
line is the mean (or IQM) over seeds, drawn where all of them have a value; the band is a bootstrap
interval over seeds, for a published curve the least and the greatest seed. The score of a run is
the mean return of the training episodes in the last 10 % of the steps.
"""

import csv
import gzip
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

from common.checkpoint import RunError
from common.logger import read_metrics
from common.run import launch

REFERENCES = Path(__file__).parents[1] / "results" / "reference"
ENDINGS = "png", "svg", "csv"
# Runs of one method may differ in these: they do not change what is learned, or only how long, or
# other flags say the same (preset, size).
CONTROL = ("script", "origin", "run", "fresh", "eval")  # what args.json says of no algorithm
FREE = (*CONTROL, "seed", "preset", "size", "steps", "trials", "benchmark", "device",
        "threads", "compile", "env_workers", "tensorboard", "log_every", "save_every", "eval_every",
        "dream_every", "eval_episodes")  # fmt: skip
# Okabe and Ito's colours; lines and markers tell them apart in grey. Published curves are grey.
STYLES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"),
          ("#CC79A7", (0, (6, 1, 1, 1, 1, 1)), "D"), ("#E69F00", (0, (8, 2)), "v"),
          ("#56B4E9", (0, (3, 1)), "P")]  # fmt: skip
PUBLISHED = [("0.3", ":", "x"), ("0.5", (0, (1, 3)), "+"), ("0.1", (0, (1, 1, 3, 1)), "1")]


@dataclass
class Args:
    """Flags."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # paths, or NAME=PATH to name the method
    reference: tuple[str, ...] = ()  # published curves: names in results/reference, or files
    out: Path = Path("plots")  # folder for the plots and tables
    tasks: tuple[str, ...] = ()  # only these, named as in the plots; empty: all
    statistic: Literal["mean", "iqm"] = "mean"  # over seeds, of curves and of scores per task
    interval: float = 0.95  # confidence of the bootstrap intervals
    bin: int = 0  # environment steps per point; 0: whole episodes, about 40 points
    at: int = 0  # steps at which runs are scored; 0: per task, where its shortest run ends
    normalise: str = ""  # file {task: [low, high]}; DM Control's suite has [0, 1000]


@dataclass
class Run:
    """The training episodes of one run, sorted: environment steps and returns, both [episodes]."""

    method: str
    task: str
    seed: str
    steps: np.ndarray
    returns: np.ndarray
    where: str  # for messages
    env_id: str
    args: dict  # as far as they are known


@dataclass
class Line:
    """One line of a panel, all but its name [points]; low and high are nan without an interval."""

    name: str
    seeds: np.ndarray  # how many
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    published: bool = False


# --- reading ------------------------------------------------------------------------------------


def task_name(env_id: str) -> str:
    """The authors' name of a task: walker_walk, cup_catch, atari_ms_pacman; else the id itself."""
    if match := re.fullmatch(r"dm_control/(\w+)-(\w+)-v\d+", env_id):
        name = "_".join(match.groups())
    elif match := re.fullmatch(r"ALE/(\w+)-v\d+", env_id):
        name = "atari" + re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", match[1])
    else:
        name = env_id.removeprefix("dmc_")
    return name.replace("ball_in_cup_", "cup_")


def make_run(method, env_id, seed, episodes, where, args=None) -> Run:
    """A Run from pairs of step and return; RunError if a return is no number."""
    rows = np.array(list(episodes), float).reshape(-1, 2)  # null, which stands for nan and inf: nan
    rows = rows[rows[:, 0].argsort(kind="stable")]
    steps, returns = rows[:, 0].astype(int), rows[:, 1]
    if wrong := int((~np.isfinite(returns)).sum()):
        raise RunError(f"{where}: {wrong} of {len(returns)} returns are not finite numbers")
    return Run(method, task_name(env_id), str(seed), steps, returns, where, env_id, args or {})


@contextmanager
def _layout(path, expected):
    try:
        yield
    except RunError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError) as error:
        raise RunError(f"{path} is not {expected}: {error!r}") from None


def _json(path: Path):
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def read_folder(folder: Path, name: str) -> Run:
    """The run in a run folder."""
    with _layout(folder, "a run folder"):
        args, key = _json(folder / "args.json"), "episode/return"
        rows = read_metrics(folder / "metrics.jsonl")
        episodes = [(row["step"], row[key]) for row in rows if key in row]
        method = name or args["script"]
        return make_run(method, args["env_id"], args["seed"], episodes, str(folder), args)


def read_csv(path: Path, name: str) -> list[Run]:
    """The runs in a CSV file of tools/collect.py; a tag becomes part of the method's name."""
    manifest, runs, episodes = path.with_name("manifest.json"), [], {}
    with _layout(path, "a CSV file of tools/collect.py with its manifest.json"):
        file = _json(manifest)[path.name]
        method = name or "-".join(filter(None, (file["script"], file["tag"])))
        for row in csv.DictReader(path.read_text().splitlines()):
            episodes.setdefault(row["seed"], []).append((row["step"], row["return"]))
        for seed, pairs in episodes.items():
            entry = file["seeds"][seed]
            args = {"action_repeat": entry["action_repeat"], **entry.get("args", {})}
            runs.append(make_run(method, entry["env_id"], seed, pairs, f"{path} {seed}", args))
    return runs


def read_scores(path: Path, name: str) -> list[Run]:
    """The runs in a score file of danijar/dreamer or danijar/dreamerv3."""
    runs = []
    with _layout(path, 'a list of {"task", "method", "seed", "xs", "ys"}'):
        for run in _json(path):
            pairs = zip(run["xs"], run["ys"], strict=True)
            where = f"{path} {run['task']} {run['seed']}"
            runs.append(make_run(name or run["method"], run["task"], run["seed"], pairs, where))
    return runs


def below(path: Path, name: str) -> list[Path]:
    """The files of that name below a folder, sorted; links are followed, each folder read once."""
    found, seen = [], set()
    for folder, inner, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inner.clear()
        elif name in files:
            found.append(Path(folder, name))
        seen.add(real)
    return sorted(found)


def find_runs(spec: str) -> tuple[list[Run], list[str]]:
    """All runs below a PATH or NAME=PATH, and notes on those that have nothing to show so far."""
    name, path = "", Path(spec)
    if not path.exists() and "=" in spec:
        name, path = spec.partition("=")[0], Path(spec.partition("=")[2])
    if not path.exists():
        raise RunError(f"{path} does not exist")
    if path.is_file():
        found = (read_csv if path.suffix == ".csv" else read_scores)(path, name)
    else:
        found = [read_folder(file.parent, name) for file in below(path, "args.json")]
        for manifest in below(path, "manifest.json"):
            with _layout(manifest, "a manifest of tools/collect.py"):
                tables = sorted(map(manifest.with_name, _json(manifest)), key=lambda t: t.stem)
            found += [run for table in tables for run in read_csv(table, name)]
    early = [run.where for run in found if not len(run.steps)]
    notes = [f"Left out: {where}: no finished training episode so far." for where in early]
    if len(early) == len(found):
        why = " ".join(notes) or "no args.json, no CSV file with a manifest.json, no scores"
        raise RunError(f"no runs found in {path}: {why}")
    return [run for run in found if len(run.steps)], notes


def read_reference(name: str) -> tuple[str, dict[str, np.ndarray], str]:
    """Name, {task: [bins, 5]} of step, mean, least, greatest, number of seeds, and notes."""
    path = Path(name) if Path(name).is_file() else REFERENCES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in REFERENCES.glob("*.json")))
        raise RunError(f"no reference {name}: there are {known}, or give a file")
    with _layout(path, "laid out as results/reference/*.json"):
        data, curves = _json(path), {}
        for task, curve in data["curves"].items():
            rows = sorted((float(step), *row) for step, row in curve.items())
            curves[task] = np.array(rows, float).reshape(-1, 5)
            if not rows or not np.isfinite(curves[task]).all():
                raise ValueError(f"{task} has no points, or one that is no number")
        return f"{path.stem} (published)", curves, data["notes"]


def differences(one: dict, two: dict) -> list[str]:
    """What keeps runs with these arguments from being seeds of one thing, as far as both know."""
    shared = [key for key in one if key in two and key not in FREE]
    return [f"{key} {one[key]} and {two[key]}" for key in shared if one[key] != two[key]]


def group(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """{task: {method: runs}}; RunError where runs under one name are not seeds of one thing."""
    methods, table = list(dict.fromkeys(run.method for run in runs)), {}
    for run in sorted(runs, key=lambda run: methods.index(run.method)):
        table.setdefault(run.task, {}).setdefault(run.method, []).append(run)
    for same in (same for by_method in table.values() for same in by_method.values()):
        for one, two in combinations(same, 2):
            same_seed = [f"seed {one.seed} twice"] if one.seed == two.seed else []
            if what := same_seed or differences(one.args, two.args):
                text = f"runs of {one.method} on {one.task} do not go together: {', '.join(what)}"
                raise RunError(f"{text} ({one.where}, {two.where}). Name variants: NAME=PATH")
    return dict(sorted(table.items()))


# --- statistics: Agarwal et al. (2021), Deep RL at the edge of the statistical precipice --------
# Of scores as one array [..., runs] per task. Where tasks have different numbers of runs each task
# counts the same, but the IQM pools the runs. With equal numbers all agree with rliable's (1.2.0,
# which needs pandas < 3 and equal numbers).


def iqm(*tasks, axis=-1):
    """Interquartile mean: mean of the middle half of all runs of all tasks (section 4.3).

    A quarter of the runs, rounded down, is cut off at each end: of less than four none.
    """
    return stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def mean(*tasks, axis=-1):
    """Mean over tasks of the mean over runs."""
    return np.mean([task.mean(axis) for task in tasks], 0)


def median(*tasks, axis=-1):
    """Median over tasks of the mean over runs (not of all runs)."""
    return np.median([task.mean(axis) for task in tasks], 0)


def optimality_gap(*tasks, axis=-1):
    """How far runs stay below a score of 1, on average; what exceeds it counts as 1 (4.3)."""
    return np.mean([(1 - np.minimum(task, 1)).mean(axis) for task in tasks], 0)


SEEDS = {"mean": mean, "iqm": iqm}  # over the seeds of one task
METRICS = {"IQM": iqm, "median": median, "mean": mean, "optimality gap": optimality_gap}


def interval(statistic, tasks, confidence):
    """Percentile bootstrap interval, low and high; nan if a task has a single run.

    Stratified: runs are drawn with replacement within each task (section 4.1).
    """
    if min(task.shape[-1] for task in tasks) < 2:
        return np.full((2, *tasks[0].shape[:-1]), np.nan)
    batch = max(1, min(1000, 10**6 // tasks[0].size))  # many narrow bins must fit the memory
    options = {"n_resamples": 10_000, "batch": batch, "vectorized": True, "axis": -1}
    options |= {"confidence_level": confidence, "rng": np.random.default_rng(0)}
    result = stats.bootstrap(tasks, statistic, method="percentile", **options)
    return np.stack(result.confidence_interval)


def profile(tasks, taus, confidence):
    """Share of runs with a score above tau, [taus], and its interval, [2, taus] (section 4.2)."""
    above = [(task > taus[:, None]).astype(float) for task in tasks]  # [taus, runs]
    return mean(*above), interval(mean, above, confidence)


# --- curves and scores --------------------------------------------------------------------------


def bin_width(runs: list[Run], points=40) -> int:
    """Whole episodes, so that bins hold equally many, and about `points` bins."""
    gaps = [np.median(np.diff(np.unique(run.steps), prepend=0)) for run in runs]
    gap, last = max(1, round(max(gaps))), max(run.steps[-1] for run in runs)
    return int(gap * np.ceil(last / (points * gap)))


def bin_returns(steps, returns, width):
    """Right edges of the bins (x - width, x] from a run's first to its last episode, mean returns.

    A bin without an episode, as when all environments end theirs together, keeps the last value.
    """
    index = -(-steps // width)
    count = np.bincount(index - index[0])
    total = np.bincount(index - index[0], returns)
    filled = np.maximum.accumulate(np.where(count > 0, np.arange(len(count)), 0))
    return np.arange(index[0], index[-1] + 1) * width, total[filled] / count[filled]


def curve(runs: list[Run], width, args) -> Line:
    """The statistic over seeds with its interval, in the bins where every seed has a value.

    The last bin ends where the first seed does.
    """
    binned = [bin_returns(run.steps, run.returns, width) for run in runs]
    first, last = max(x[0] for x, _ in binned), min(x[-1] for x, _ in binned)
    if first > last:  # the seeds do not overlap
        return Line(runs[0].method, *np.empty((5, 0)))
    values = np.stack([y[(x >= first) & (x <= last)] for x, y in binned], -1)  # [bins, seeds]
    statistic = SEEDS[args.statistic]
    band = interval(statistic, [values], args.interval)
    x = np.arange(first, last + 1, width)
    x[-1] = min(last, *(run.steps[-1] for run in runs))
    return Line(runs[0].method, np.full(len(x), len(runs)), x, statistic(values), *band)


def make_panels(table, references, args) -> tuple[dict[str, list[Line]], list[str]]:
    """The lines of each task, and notes on what was cut or has to be known."""
    panels, notes = {}, []
    for task, by_method in table.items():
        runs = [run for same in by_method.values() for run in same]
        repeats = {run.method: run.args.get("action_repeat") for run in runs}
        if len(set(repeats.values()) - {None}) > 1:
            each = ", ".join(
                f"{repeat} in {method}" for method, repeat in repeats.items() if repeat
            )
            notes.append(f"{task}: the action repeat is {each}; steps count it.")
        width = args.bin or bin_width(runs)
        panels[task] = [curve(same, width, args) for same in by_method.values()]
        for line, same in zip(panels[task], by_method.values(), strict=True):
            ends = [int(run.steps[-1]) for run in same]
            drawn = int(line.x[-1]) if len(line.x) else 0
            if drawn + width <= max(ends):
                text = f"{line.name} on {task} is drawn to step {drawn:,}, where all seeds have"
                notes.append(f"{text} data: they end between {min(ends):,} and {max(ends):,}.")
        end = max(run.steps[-1] for run in runs)
        for name, curves in references.items():
            if task in curves:  # up to the first bin after the runs' end
                rows = curves[task][: np.searchsorted(curves[task][:, 0], end) + 1]
                panels[task].append(Line(name, rows[:, 4], *rows.T[:4], published=True))
    return panels, notes


def score(run: Run, at: int) -> float:
    """Mean return of the training episodes in the steps (0.9 at, at], else of the last before."""
    if run.steps[-1] <= 0.9 * at or run.steps[0] > at:
        ends = f"its episodes end at steps {run.steps[0]:,} to {run.steps[-1]:,}"
        raise RunError(f"{run.where} has no score at step {at:,}: {ends}; choose another --at")
    before = run.steps[run.steps <= at]
    chosen = before > min(0.9 * at, before[-1] - 1)  # long gaps: environments that end together
    return run.returns[: len(before)][chosen].mean()


def published_score(curve, at):
    """Mean, least and greatest seed, number of seeds of a published curve in (0.9 at, at].

    Without a point there: on the line between two; None before the first and after the last.
    """
    rows = curve[(curve[:, 0] > 0.9 * at) & (curve[:, 0] <= at)]
    if not len(rows) and curve[0, 0] <= at <= curve[-1, 0]:
        rows = np.array([[np.interp(at, curve[:, 0], column) for column in curve.T]])
    if not len(rows):
        return None
    return rows[:, 1].mean(), rows[:, 2].min(), rows[:, 3].max(), int(rows[:, 4].max())


def published_scores(references, steps):
    """{reference: {task: published_score}} and notes; RunError if one has none of the tasks."""
    found, notes = {}, []
    for name, curves in references.items():
        lacking = [task for task in steps if task not in curves]
        if len(lacking) == len(steps):
            text = f"{name} has no curve for {', '.join(lacking)}"
            raise RunError(f"{text}: it has {', '.join(sorted(curves))}")
        scores = {t: published_score(curves[t], at) for t, at in steps.items() if t in curves}
        found[name] = {task: value for task, value in scores.items() if value}
        if lacking := [task for task in steps if task not in found[name]]:
            notes.append(f"{name} has nothing at these steps for {', '.join(lacking)}.")
    return found, notes


def ranges(table, path: str) -> dict[str, tuple[float, float]]:
    """The returns that count as 0 and as 1, for the tasks where they are known."""
    env_ids = {task: next(iter(runs.values()))[0].env_id for task, runs in table.items()}
    suite = re.compile(r"dmc_|dm_control/(?!lqr)\w+-\w+-v")  # lqr's returns have no bound
    known = {task: (0.0, 1000.0) for task, env_id in env_ids.items() if suite.match(env_id)}
    with _layout(path, "a JSON file {task: [low, high]} with low < high"):
        for task, (low, high) in _json(Path(path)).items() if path else ():
            known[task] = float(low), float(high)
            if not low < high:
                raise ValueError(f"{task}: {low}, {high}")
    return known


def all_scores(table, steps, args) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """{task: {method: scores [runs]}}, and notes on methods that have none at the task's step.

    With --at that is an error.
    """
    scores, notes = {task: {} for task in table}, []
    for task, by_method in table.items():
        for method, runs in by_method.items():
            try:
                scores[task][method] = np.array([score(run, steps[task]) for run in runs])
            except RunError as error:
                if args.at:
                    raise
                notes.append(f"{method} is not scored on {task}: {error}.")
    return scores, notes


def why_no_aggregates(scores, methods, known) -> str:
    """Empty if every method has scores of all tasks and their ranges are known."""
    for method in methods:
        if lacking := [task for task in scores if method not in scores[task]]:
            text = f"No aggregates: {method} has no score on {', '.join(lacking)}"
            return f"{text}. --tasks chooses those that all methods have."
    if unknown := [task for task in scores if task not in known]:
        text = f"No aggregates: the returns that count as 0 and 1 are not known for {unknown[0]}"
        return f"{text}{' and others' * (len(unknown) > 1)}. --normalise FILE.json names them."
    return ""


# --- figures ------------------------------------------------------------------------------------


def assign(styles, names) -> dict:
    """A colour, a line and a marker for each name; the second time round with other markers."""
    markers, count = [marker for _, _, marker in styles], len(styles)
    return {
        name: (*styles[i % count][:2], markers[(i + i // count) % count])
        for i, name in enumerate(names)
    }


def draw_curves(panels, styles, args) -> Figure:
    """A panel per task, the legend below them."""
    columns = min(len(panels), 3 if len(panels) <= 12 else 5)
    rows, entries = -(-len(panels) // columns), {}
    height = 3 * rows + 0.3 * -(-len(styles) // min(columns, 2))
    figure = Figure(figsize=(max(6.4, 3.9 * columns), height + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for (task, lines), axes in zip(panels.items(), grid, strict=False):
        for line in lines:
            color, dashes, marker = styles[line.name]
            options = {"color": color, "ls": dashes, "marker": marker, "ms": 4}
            handle = axes.plot(line.x, line.y, markevery=max(1, len(line.x) // 8), **options)[0]
            # In grey only edges and hatching tell the bands apart.
            band = {"facecolor": "none", "hatch": "////"} if line.published else {}
            edge = {"color": color, "alpha": 0.2, "ls": dashes, "lw": 0.7}
            axes.fill_between(line.x, line.low, line.high, **edge, **band)
            entries.setdefault(line.name, (handle, line.published, []))[2].extend(line.seeds)
        own = [line.x[-1] for line in lines if len(line.x) and not line.published]
        axes.set(xlim=(0, 1.04 * max(own, default=1)), ylabel="return", xlabel="environment steps")
        axes.set_title(task, fontsize=10)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _tidy(axes)
    for axes in grid:  # those that are left over
        axes.remove()
    labels = []
    for name, (_, published, seeds) in entries.items():
        seeds = [int(count) for count in seeds] or [0]
        count = "-".join(map(str, sorted({min(seeds), max(seeds)})))
        band = "min-max" if published else f"{100 * args.interval:g} % interval"
        label = f"{name}: {count} seed{'s' if max(seeds) > 1 else ''}"
        labels.append(f"{label}, {band}" if max(seeds) > 1 else label)
    _legend(figure, [handle for handle, _, _ in entries.values()], labels, min(columns, 2))
    return figure


def draw_aggregates(rows, styles, confidence) -> Figure:
    """A panel per metric, a line per method: the value and its interval."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(11, 1.2 + 0.4 * len(names)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for row in (row for row in rows if row["metric"] == metric):
            color, _, marker = styles[row["method"]]
            at = names.index(row["method"])
            bar = {"color": color, "lw": 7, "alpha": 0.35, "solid_capstyle": "butt"}
            axes.plot([row["low"], row["high"]], [at, at], **bar)
            axes.plot(row["value"], at, marker=marker, color=color, ms=7)
        less = "\n(less is better)" if metric == "optimality gap" else ""
        axes.set_title(metric + less, fontsize=10)
        axes.set(yticks=range(len(names)), yticklabels=names)
        axes.set(ylim=(len(names) - 0.4, -0.6))
        axes.margins(x=0.15)
        _tidy(axes)
        axes.locator_params(axis="x", nbins=3)  # four narrow panels: labels would touch
    figure.supxlabel(f"normalised score (bar: {100 * confidence:g} % interval)", fontsize=10)
    return figure


def draw_profiles(profiles, taus, styles, confidence) -> Figure:
    """Share of runs above a score, a line per method."""
    figure, handles = Figure(figsize=(6.4, 4.2), layout="constrained"), []
    axes = figure.subplots()
    for name, (share, (low, high)) in profiles.items():
        color, dashes, marker = styles[name]
        options = {"color": color, "ls": dashes, "marker": marker, "ms": 4, "markevery": 10}
        handles += axes.plot(taus, 100 * share, **options)
        axes.fill_between(taus, 100 * low, 100 * high, color=color, alpha=0.18, lw=0)
    axes.set(xlabel=f"normalised score (band: {100 * confidence:g} % interval)")
    axes.set(ylabel="runs with a higher score, %", ylim=(-2, 103))
    _tidy(axes)
    _legend(figure, handles, list(profiles), 2)
    return figure


def _tidy(axes):
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", nbins=5)


def _legend(figure, handles, labels, columns):
    options = {"frameon": False, "fontsize": 9, "handlelength": 4}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)


# --- files --------------------------------------------------------------------------------------


def curve_rows(panels):
    """Rows of curves.csv."""
    for task, lines in panels.items():
        for line in lines:
            columns = line.x, line.y, line.low, line.high, line.seeds
            for x, y, low, high, seeds in zip(*columns, strict=True):
                yield {"task": task, "method": line.name, "seeds": int(seeds), "step": int(x),
                       "return": y, "low": low, "high": high,
                       "band": "min-max" if line.published else "interval"}  # fmt: skip


def aggregate_rows(scores, published, confidence):
    """Rows of aggregates.csv; published means give median and mean over tasks, no interval."""
    for method, tasks in scores.items():
        for metric, statistic in METRICS.items():
            low, high = interval(statistic, tasks, confidence)
            row = {"method": method, "metric": metric, "value": statistic(*tasks)}
            yield {**row, "low": low, "high": high, "tasks": len(tasks)}
    for name, means in published.items():
        for metric, value in (("median", np.median(means)), ("mean", np.mean(means))):
            row = {"method": name, "metric": metric, "value": value}
            yield {**row, "low": np.nan, "high": np.nan, "tasks": len(means)}


def task_table(scores, methods, steps, published, args) -> list[list[str]]:
    """Header and a row per task: the score at that step, per method and published."""
    statistic, rows = SEEDS[args.statistic], []
    for task, by_method in scores.items():
        cells = dict.fromkeys((*methods, *published), "")
        for method, values in by_method.items():
            band = interval(statistic, [values], args.interval)
            cells[method] = f"{_cell(statistic(values), band)} ({len(values)})"
        for name in (name for name, found in published.items() if task in found):
            value, low, high, seeds = published[name][task]
            cells[name] = f"{_cell(value, (low, high))} ({seeds})"
        rows.append([task, f"{steps[task]:,}", *cells.values()])
    return [["task", "steps", *methods, *published], *rows]


def aggregate_table(rows) -> list[list[str]]:
    """Header and a row per metric, from the rows of aggregates.csv."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["metric"], row["method"]): _cell(row["value"], (row["low"], row["high"]), 3)
             for row in rows}  # fmt: skip
    body = [
        [metric, *(cells.get((metric, method), "") for method in methods)] for metric in METRICS
    ]
    return [["over tasks", *methods], *body]


def _cell(value, band, digits=1):
    low, high = band
    text = f"{value:.{digits}f}"
    return text if np.isnan(low) else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(rows) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def latex(rows) -> str:
    """A LaTeX tabular, with the rules of the package booktabs."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes = str.maketrans({character: f"\\{character}" for character in "_%&#${}"} | named)
    lines = [" & ".join(cell.translate(escapes) for cell in row) + r" \\" for row in rows]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}", r"\toprule", lines[0],
             r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]  # fmt: skip
    return "\n".join(lines)


def describe(references, args) -> str:
    """What the numbers in the tables are."""
    text = (
        "Return of the training episodes in the last 10 % of the given environment steps: "
        f"{args.statistic} over seeds, [{100 * args.interval:g} % bootstrap interval], (seeds)."
    )
    published = (
        " Published curves: mean over seeds, [least, greatest seed in a point], (seeds); with no "
        "point there, the line between two. Without their single seeds there is no interval, IQM "
        "or optimality gap."
    )
    return text + (published if references else "")


def write(path: Path, figure, rows):
    """Write path.png, path.svg (its text as text) and path.csv (nan as an empty cell)."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plaindream"}):
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)


# --- main ---------------------------------------------------------------------------------------


def read_all(args) -> tuple[list[Run], list[str]]:
    """All runs that the flags name, and notes; RunError for flags that cannot be."""
    if not args.runs:
        raise RunError("no runs given: name run folders, or folders that contain some")
    if not 0 < args.interval < 1 or args.bin < 0 or args.at < 0:
        raise RunError("--interval must be between 0 and 1, --bin and --at must not be negative")
    found = [find_runs(spec) for spec in args.runs]
    runs = [run for some, _ in found for run in some]
    tasks = {run.task for run in runs}
    if unknown := set(args.tasks) - tasks:
        text = f"no run of {', '.join(sorted(unknown))}"
        raise RunError(f"{text}: there are runs of {', '.join(sorted(tasks))}")
    runs = [run for run in runs if not args.tasks or run.task in args.tasks]
    return runs, [note for _, notes in found for note in notes]


def aggregate(scores, published, known, styles, args):
    """Write aggregates and profile; returns the rows of the former."""
    own, means = {}, {}
    for task, by_method in scores.items():
        low, high = known[task]
        for method, values in by_method.items():
            own.setdefault(method, []).append((values - low) / (high - low))
        for name, found in published.items():
            if len(found) == len(scores):  # else it has no mean over these tasks
                means.setdefault(name, []).append((found[task][0] - low) / (high - low))
    rows = list(aggregate_rows(own, means, args.interval))
    write(args.out / "aggregates", draw_aggregates(rows, styles, args.interval), rows)
    every = np.concatenate([values for tasks in own.values() for values in tasks])
    taus = np.linspace(min(0, every.min()), max(1, every.max()), 101)
    profiles = {method: profile(tasks, taus, args.interval) for method, tasks in own.items()}
    shares = [
        {"method": method, "tau": tau, "share": share, "low": low, "high": high}
        for method, (line, band) in profiles.items()
        for tau, share, low, high in zip(taus, line, *band, strict=True)
    ]
    write(args.out / "profile", draw_profiles(profiles, taus, styles, args.interval), shares)
    return rows


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    runs, left_out = read_all(args)
    table, methods = group(runs), list(dict.fromkeys(run.method for run in runs))
    sources = [read_reference(name) for name in args.reference]
    references = {name: curves for name, curves, _ in sources}
    last = {task: min(run.steps[-1] for runs in by_method.values() for run in runs)
            for task, by_method in table.items()}  # fmt: skip
    steps = {task: args.at or int(step) for task, step in last.items()}
    published, lacking = published_scores(references, steps)
    panels, notes = make_panels(table, references, args)
    known = ranges(table, args.normalise)
    styles = assign(STYLES, methods) | assign(PUBLISHED, references)
    scores, unscored = all_scores(table, steps, args)

    tables = [task_table(scores, methods, steps, published, args)]  # before anything is written
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {args.out} cannot be made: {error}") from None
    write(args.out / "curves", draw_curves(panels, styles, args), list(curve_rows(panels)))
    if why := why_no_aggregates(scores, methods, known):
        notes.append(why)
        for old in (f"{name}.{end}" for name in ("aggregates", "profile") for end in ENDINGS):
            (args.out / old).unlink(missing_ok=True)  # of other runs: not to stay beside the rest
    else:
        tables.append(aggregate_table(aggregate(scores, published, known, styles, args)))
    about = [f"{name}: {text}" for name, _, text in sources]
    notes = [describe(references, args), *about, *lacking, *left_out, *unscored, *notes]
    (args.out / "table.md").write_text("\n\n".join([*map(markdown, tables), *notes]) + "\n")
    comments = [f"% {note}" for note in ("needs the package booktabs", *notes)]
    (args.out / "table.tex").write_text(
        "\n\n".join(["\n".join(comments), *map(latex, tables)]) + "\n"
    )
    print((args.out / "table.md").read_text() + f"\nwritten to {args.out}")


if __name__ == "__main__":
    launch(main)
