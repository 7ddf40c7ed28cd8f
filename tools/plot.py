"""Comparison plots and tables: runs side by side, beside the published curves.

    pip install -r requirements-extra.txt                          # pandas, seaborn
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

import gzip
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.ticker import EngFormatter
from scipy import stats

from common.checkpoint import RunError
from common.logger import read_metrics
from common.run import launch
from tools.collect import differences

REFERENCES = Path(__file__).parents[1] / "results" / "reference"
THEME = sns.axes_style("ticks", {"axes.grid": True, "grid.color": "0.92"})
THEME |= {"axes.titlesize": "medium", "legend.fontsize": 9}
THEME |= {"svg.fonttype": "none", "svg.hashsalt": "plaindream"}  # text as text, the same each time
# Okabe and Ito's colors; lines and markers tell them apart in gray. Published curves are gray.
STYLES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"),
          ("#CC79A7", (0, (6, 1, 1, 1, 1, 1)), "D"), ("#E69F00", (0, (8, 2)), "v"),
          ("#56B4E9", (0, (3, 1)), "P")]  # fmt: skip
PUBLISHED = [("0.3", ":", "x"), ("0.5", (0, (1, 3)), "+"), ("0.1", (0, (1, 1, 3, 1)), "1")]
POINT = ["step", "return", "low", "high", "seeds"]  # of a published curve
SCORE = ["task", "method", "value", "low", "high", "seeds"]
ABOUT = (
    "Return of the training episodes in the last 10 % of the given environment steps: "
    "{} over seeds, [{:g} % bootstrap interval], (seeds)."
)
ABOUT_PUBLISHED = (
    " Published curves: mean over seeds, [least, greatest seed in a point], (seeds); with no point "
    "there, the line between two. Without their single seeds there is no interval, IQM or "
    "optimality gap."
)


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


def make_run(method, env_id, seed, episodes, where, args=None) -> tuple[str, pd.DataFrame]:
    """Where the run is, and its episodes, sorted; RunError if a return is no number."""
    run = pd.DataFrame(list(episodes), columns=["step", "return"]).astype(float)
    if wrong := int((~np.isfinite(run["return"])).sum()):  # null stands for nan and inf
        raise RunError(f"{where}: {wrong} of {len(run)} returns are not finite numbers")
    run = run.astype({"step": int}).sort_values("step", kind="stable")
    run = run.assign(method=method, task=task_name(env_id), seed=str(seed), where=where)
    return where, run.assign(env_id=env_id, args=[args or {}] * len(run))


def read(path: Path, name: str):
    """Yield make_run(...) of each run in an args.json, a manifest.json, a CSV or a score file."""
    if path.name == "args.json":
        with _layout(path.parent, "a run folder"):
            args, key, where = _json(path), "episode/return", str(path.parent)
            rows = read_metrics(path.with_name("metrics.jsonl"))
            episodes = [(row["step"], row[key]) for row in rows if key in row]
            method = name or args["script"]
            yield make_run(method, args["env_id"], args["seed"], episodes, where, args)
    elif path.name == "manifest.json":
        with _layout(path, "a manifest of tools/collect.py"):
            tables = sorted(map(path.with_name, _json(path)), key=lambda table: table.stem)
        for table in tables:
            yield from read(table, name)
    elif path.suffix == ".csv":
        with _layout(path, "a CSV file of tools/collect.py with its manifest.json"):
            file = _json(path.with_name("manifest.json"))[path.name]
            method = name or "-".join(filter(None, (file["script"], file["tag"])))
            rows = pd.read_csv(path, dtype={"seed": str})
            for seed, episodes in rows.groupby("seed", sort=False)[["step", "return"]]:
                entry, where = file["seeds"][seed], f"{path} {seed}"
                args = {"action_repeat": entry["action_repeat"], **entry.get("args", {})}
                yield make_run(method, entry["env_id"], seed, episodes.values, where, args)
    else:
        with _layout(path, 'a list of {"task", "method", "seed", "xs", "ys"}'):
            for run in _json(path):
                episodes = zip(run["xs"], run["ys"], strict=True)
                method, where = name or run["method"], f"{path} {run['task']} {run['seed']}"
                yield make_run(method, run["task"], run["seed"], episodes, where)


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


def find_runs(spec: str) -> tuple[list[pd.DataFrame], list[str]]:
    """All runs below a PATH or NAME=PATH, and notes on those that have nothing to show so far."""
    name, path = "", Path(spec)
    if not path.exists() and "=" in spec:
        name, path = spec.partition("=")[0], Path(spec.partition("=")[2])
    if not path.exists():
        raise RunError(f"{path} does not exist")
    folder = [*below(path, "args.json"), *below(path, "manifest.json")]
    found = [run for file in ([path] if path.is_file() else folder) for run in read(file, name)]
    early = [where for where, run in found if run.empty]
    notes = [f"Left out: {where}: no finished training episode so far." for where in early]
    if len(early) == len(found):
        why = " ".join(notes) or "no args.json, no CSV file with a manifest.json, no scores"
        raise RunError(f"no runs found in {path}: {why}")
    return [run for _, run in found if len(run)], notes


def join(runs: list[pd.DataFrame]) -> pd.DataFrame:
    """All episodes, numbered by run; RunError where runs of a method are not seeds of one thing."""
    episodes = pd.concat([run.assign(run=i) for i, run in enumerate(runs)], ignore_index=True)
    for (task, method), same in episodes.drop_duplicates("run").groupby(["task", "method"]):
        for one, two in combinations(same.itertuples(), 2):
            same_seed = [f"seed {one.seed} twice"] if one.seed == two.seed else []
            if reasons := same_seed or differences(one.args, two.args):
                text = f"runs of {method} on {task} do not go together: {', '.join(reasons)}"
                raise RunError(f"{text} ({one.where}, {two.where}). Name variants: NAME=PATH")
    # groupby keeps the order of the categories
    return episodes.astype({"method": pd.CategoricalDtype(episodes["method"].unique())})


def read_all(args) -> tuple[pd.DataFrame, list[str]]:
    """The episodes of all runs, and notes; RunError for flags that cannot be."""
    if not args.runs:
        raise RunError("no runs given: name run folders, or folders that contain some")
    if not 0 < args.interval < 1 or args.bin < 0 or args.at < 0:
        raise RunError("--interval must be between 0 and 1, --bin and --at must not be negative")
    found = [find_runs(spec) for spec in args.runs]
    runs = [(run["task"].iloc[0], run) for some, _ in found for run in some]
    tasks = {task for task, _ in runs}
    if unknown := set(args.tasks) - tasks:
        text = f"no run of {', '.join(sorted(unknown))}"
        raise RunError(f"{text}: there are runs of {', '.join(sorted(tasks))}")
    chosen = [run for task, run in runs if task in (args.tasks or tasks)]
    return join(chosen), [note for _, notes in found for note in notes]


def read_reference(name: str) -> tuple[str, pd.DataFrame, str]:
    """Name, rows of curves.csv and notes of published curves."""
    path = Path(name) if Path(name).is_file() else REFERENCES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in REFERENCES.glob("*.json")))
        raise RunError(f"no reference {name}: there are {known}, or give a file")
    with _layout(path, "laid out as results/reference/*.json"):
        data, curves, title = _json(path), [], f"{path.stem} (published)"
        for task, points in data["curves"].items():
            rows = [(float(step), *point) for step, point in points.items()]
            curve = pd.DataFrame(rows, columns=POINT).astype(float).sort_values("step")
            if curve.empty or not np.isfinite(curve).all(axis=None):
                raise ValueError(f"{task} has no points, or one that is no number")
            curves.append(curve.assign(task=task, method=title, band="min-max"))
        return title, pd.concat(curves).astype({"step": int, "seeds": int}), data["notes"]


# --- statistics: Agarwal et al. (2021), Deep RL at the edge of the statistical precipice --------
# Of scores as one array [..., runs] per task. Where tasks have different numbers of runs each task
# counts the same, but the IQM pools the runs. With equal numbers all agree with rliable (1.2.0).


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


def bin_width(episodes, points=40) -> int:
    """Whole episodes, so that bins hold equally many, and about `points` bins."""
    steps = [run.unique() for _, run in episodes.groupby("run")["step"]]
    gap = max(1, round(max(np.median(np.diff(run, prepend=0)) for run in steps)))
    return int(gap * np.ceil(episodes["step"].max() / (points * gap)))


def bin_returns(episodes, width) -> pd.DataFrame:
    """Mean return in the bins (x - width, x], [bins, runs]; nan outside a run's first and last.

    A bin without an episode, as when all environments end theirs together, keeps the last value.
    """
    edges = -(-episodes["step"] // width) * width
    returns = episodes.assign(step=edges).groupby(["step", "run"])["return"]
    # groupby's mean() compensates for rounding, and so changes the last digits of results/.
    bins = returns.agg(lambda returns: sum(returns) / len(returns)).unstack()
    every = range(bins.index[0], bins.index[-1] + 1, width)
    return bins.reindex(every).ffill(limit_area="inside")


def curve(episodes, width, args) -> pd.DataFrame:
    """Rows of curves.csv: the statistic over seeds in the bins where every seed has a value.

    The last bin ends where the first seed does.
    """
    bins = bin_returns(episodes, width).dropna()
    values, statistic = np.ascontiguousarray(bins), SEEDS[args.statistic]
    low, high = interval(statistic, [values], args.interval) if len(bins) else ([], [])
    step = np.minimum(bins.index, episodes.groupby("run")["step"].max().min())
    columns = {"step": step, "return": statistic(values), "low": low, "high": high}
    return pd.DataFrame({**columns, "seeds": values.shape[1], "band": "interval"})


def make_curves(episodes, references, args) -> tuple[pd.DataFrame, list[str]]:
    """Rows of curves.csv, and notes on what was cut or has to be known."""
    curves, notes = [], []
    for task, runs in episodes.groupby("task"):
        first = runs.drop_duplicates("run")
        repeats = {run.method: run.args.get("action_repeat") for run in first.itertuples()}
        if len(set(repeats.values()) - {None}) > 1:
            each = ", ".join(f"{repeat} in {name}" for name, repeat in repeats.items() if repeat)
            notes.append(f"{task}: the action repeat is {each}; steps count it.")
        width = args.bin or bin_width(runs)
        for method, seeds in runs.groupby("method"):
            line, ends = curve(seeds, width, args), seeds.groupby("run")["step"].max()
            curves.append(line.assign(task=task, method=method))
            drawn = line["step"].max() if len(line) else 0
            if drawn + width <= ends.max():
                text = f"{method} on {task} is drawn to step {drawn:,}, where all seeds have data"
                notes.append(f"{text}: they end between {ends.min():,} and {ends.max():,}.")
        for reference in references.values():  # up to the first point after the runs' end
            points = reference[reference["task"] == task]
            curves.append(points[points["step"].shift(fill_value=0) < runs["step"].max()])
    columns = ["task", "method", "seeds", "step", "return", "low", "high", "band"]
    return pd.concat(curves, ignore_index=True)[columns], notes


def score(run, at: int) -> float:
    """Mean return of the training episodes in the steps (0.9 at, at], else of the last before."""
    first, last = run["step"].iloc[[0, -1]]
    if last <= 0.9 * at or first > at:
        text = f"{run['where'].iloc[0]} has no score at step {at:,}: its episodes end at steps"
        raise RunError(f"{text} {first:,} to {last:,}; choose another --at")
    before = run[run["step"] <= at]
    # Environments that end together leave long gaps.
    chosen = before["step"] > min(0.9 * at, before["step"].iloc[-1] - 1)
    return before.loc[chosen, "return"].mean()


def all_scores(episodes, steps, args) -> tuple[pd.DataFrame, list[str]]:
    """The scores of the runs, and notes on methods that have none; with --at that is an error."""
    scores, notes = [], []
    for (task, method), runs in episodes.groupby(["task", "method"]):
        try:
            values = [score(run, steps[task]) for _, run in runs.groupby("run")]
            scores += [(task, method, value) for value in values]
        except RunError as error:
            if args.at:
                raise
            notes.append(f"{method} is not scored on {task}: {error}.")
    return pd.DataFrame(scores, columns=["task", "method", "value"]), notes


def published_score(points, at) -> pd.Series:
    """Mean, least and greatest seed, number of seeds of a published curve in (0.9 at, at].

    Without a point there: on the line between two; nan before the first and after the last.
    """
    rows = points[(points["step"] > 0.9 * at) & (points["step"] <= at)]
    if rows.empty:
        line = {key: np.interp(at, points["step"], points[key], np.nan, np.nan) for key in POINT}
        rows = pd.DataFrame([line]).assign(seeds=np.floor(line["seeds"]))
    return rows.agg({"return": "mean", "low": "min", "high": "max", "seeds": "max"})


def published_scores(references, steps) -> tuple[pd.DataFrame, list[str]]:
    """published_score of each task and reference, and notes; RunError if one has no task."""
    scores, notes = [pd.DataFrame(columns=SCORE, dtype=float)], []
    for name, curves in references.items():
        known = {task: points for task, points in curves.groupby("task") if task in steps}
        if not known:
            text = f"{name} has no curve for {', '.join(steps)}"
            raise RunError(f"{text}: it has {', '.join(sorted(set(curves['task'])))}")
        found = pd.DataFrame({task: published_score(known[task], steps[task]) for task in known})
        found = found.T.dropna().rename(columns={"return": "value"})
        if lacking := [task for task in steps if task not in found.index]:
            notes.append(f"{name} has nothing at these steps for {', '.join(lacking)}.")
        scores.append(found.reset_index(names="task").assign(method=name))
    return pd.concat(scores), notes


def ranges(episodes, path: str) -> dict[str, tuple[float, float]]:
    """The returns that count as 0 and as 1, for the tasks where they are known."""
    suite = re.compile(r"dmc_|dm_control/(?!lqr)\w+-\w+-v")  # lqr's returns have no bound
    env_ids = episodes.groupby("task")["env_id"].first()
    known = {task: (0.0, 1000.0) for task, env_id in env_ids.items() if suite.match(env_id)}
    with _layout(path, "a JSON file {task: [low, high]} with low < high"):
        for task, (low, high) in _json(Path(path)).items() if path else ():
            known[task] = float(low), float(high)
            if not low < high:
                raise ValueError(f"{task}: {low}, {high}")
    return known


def why_no_aggregates(scores, tasks, methods, known) -> str:
    """Empty if every method has scores of all tasks and their ranges are known."""
    for method in methods:
        scored = set(scores.loc[scores["method"] == method, "task"])
        if lacking := [task for task in tasks if task not in scored]:
            text = f"No aggregates: {method} has no score on {', '.join(lacking)}"
            return f"{text}. --tasks chooses those that all methods have."
    if unknown := [task for task in tasks if task not in known]:
        text = f"No aggregates: the returns that count as 0 and 1 are not known for {unknown[0]}"
        return f"{text}{' and others' * (len(unknown) > 1)}. --normalise FILE.json names them."
    return ""


def normalize(scores, known) -> dict[str, list[np.ndarray]]:
    """{method: scores of each task [runs]}; 0 is the low of the task's range, 1 its high."""
    low = scores["task"].map({task: low for task, (low, _) in known.items()})
    high = scores["task"].map({task: high for task, (_, high) in known.items()})
    scores = scores.assign(value=(scores["value"] - low) / (high - low))
    return {
        method: [values.to_numpy() for _, values in tasks.groupby("task")["value"]]
        for method, tasks in scores.groupby("method", sort=False)
    }


def aggregates(scores, published, confidence) -> pd.DataFrame:
    """Rows of aggregates.csv; published means give median and mean over tasks, no interval."""
    rows = []
    for method, tasks in (scores | published).items():
        for metric in METRICS if method in scores else ("median", "mean"):
            band = interval(METRICS[metric], tasks, confidence)
            rows.append((method, metric, METRICS[metric](*tasks), *band, len(tasks)))
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "tasks"])


def profiles(scores, confidence) -> pd.DataFrame:
    """Rows of profile.csv."""
    every = np.concatenate([task for tasks in scores.values() for task in tasks])
    taus, tables = np.linspace(min(0, every.min()), max(1, every.max()), 101), []
    for method, tasks in scores.items():
        share, (low, high) = profile(tasks, taus, confidence)
        rows = {"method": method, "tau": taus, "share": share, "low": low, "high": high}
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables)


# --- figures ------------------------------------------------------------------------------------


def assign(styles, names) -> dict:
    """A color, a line and a marker for each name; the second time round with other markers."""
    markers, n = [marker for _, _, marker in styles], len(styles)
    return {name: (*styles[i % n][:2], markers[(i + i // n) % n]) for i, name in enumerate(names)}


def panels(table, styles, **options) -> sns.FacetGrid:
    """Panels that call what they `map` for each method, with its color, line and marker."""
    looks = dict(zip(("color", "ls", "marker"), zip(*styles.values(), strict=True), strict=True))
    return sns.FacetGrid(table, hue="method", hue_order=styles, hue_kws=looks, **options)


def draw_line(x, y, low, high, band=(), **look):
    """A line with markers and its band; in gray only hatching tells published bands apart."""
    plt.plot(x, y, ms=4, markevery=max(1, len(x) // 8), **look)
    hatch = {"facecolor": "none", "hatch": "////"} if "min-max" in set(band) else {}
    plt.fill_between(x, low, high, color=look["color"], ls=look["ls"], alpha=0.2, lw=0.7, **hatch)


def draw_bar(method, value, low, high, **look):
    """The interval as a bar, the value as a marker."""
    bar = {"lw": 7, "alpha": 0.35, "solid_capstyle": "butt"}
    plt.plot([*low, *high], [*method, *method], color=look["color"], **bar)
    plt.plot(value, method, color=look["color"], marker=look["marker"], ms=7)


def finish(grid, width, height, labels=(), columns=2, ticks=5):
    """Set size and ticks, and put a legend with these {name: label} below the panels."""
    handles = {}
    for axes in grid.axes.flat:
        axes.locator_params(axis="x", nbins=ticks)
        lines, names = axes.get_legend_handles_labels()
        handles |= {name: line for name, line in zip(names, lines, strict=True) if name in labels}
    if labels:
        grid.figure.legend(handles.values(), [labels[name] for name in handles], frameon=False,
                           loc="outside lower center", ncols=columns, handlelength=4)  # fmt: skip
    grid.figure.set(layout_engine="constrained", size_inches=(width, height))
    return grid.figure


def draw_curves(curves, tasks, styles, args):
    """A panel per task."""
    columns = min(len(tasks), 3 if len(tasks) <= 12 else 5)
    options = {"col_order": tasks, "col_wrap": columns, "sharex": False, "sharey": False}
    grid = panels(curves, styles, col="task", **options)
    grid.map(draw_line, "step", "return", "low", "high", "band")
    ends = curves[curves["band"] == "interval"].groupby("task")["step"].max()
    for task, axes in grid.axes_dict.items():
        axes.set(title=task, xlim=(0, 1.04 * ends.get(task, 1)))
        axes.set(xlabel="environment steps", ylabel="return")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    labels = {}
    for (name, band), seeds in curves.groupby(["method", "band"])["seeds"]:
        count = "-".join(map(str, sorted({seeds.min(), seeds.max()})))
        band = band if band == "min-max" else f"{100 * args.interval:g} % interval"
        single = seeds.max() == 1
        labels[name] = f"{name}: {count} seed" if single else f"{name}: {count} seeds, {band}"
    rows, entries = -(-len(tasks) // columns), -(-len(styles) // min(columns, 2))
    size = max(6.4, 3.9 * columns), 3 * rows + 0.3 * entries + 0.4
    return finish(grid, *size, labels, min(columns, 2))


def draw_aggregates(rows, styles, confidence):
    """A panel per metric, a line per method."""
    names = list(rows["method"].unique())
    grid = panels(rows, styles, col="metric", col_order=METRICS, sharex=False)
    grid.map(draw_bar, "method", "value", "low", "high").set_titles("{col_name}")
    grid.axes_dict["optimality gap"].set_title("optimality gap\n(less is better)")
    grid.set(ylim=(len(names) - 0.4, -0.6), xmargin=0.15).set_axis_labels("", "")
    grid.figure.supxlabel(f"normalised score (bar: {100 * confidence:g} % interval)", fontsize=10)
    return finish(grid, 11, 1.2 + 0.4 * len(names), ticks=3)  # narrow: labels would touch


def draw_profiles(profiles, styles, confidence):
    """Share of runs above a score, a line per method."""
    shares = ["share", "low", "high"]
    grid = panels(profiles.assign(**100 * profiles[shares]), styles)
    grid.map(draw_line, "tau", *shares).set(ylim=(-2, 103))
    label = f"normalised score (band: {100 * confidence:g} % interval)"
    grid.set_axis_labels(label, "runs with a higher score, %")
    return finish(grid, 6.4, 4.2, {name: name for name in profiles["method"]})


# --- tables and files ---------------------------------------------------------------------------


def summary(scores, args) -> pd.DataFrame:
    """The statistic over seeds of each method on each task, with its interval."""
    rows, statistic = [], SEEDS[args.statistic]
    for by, runs in scores.groupby(["task", "method"])["value"]:
        seeds = runs.to_numpy()
        band = interval(statistic, [seeds], args.interval)
        rows.append((*by, statistic(seeds), *band, len(seeds)))
    return pd.DataFrame(rows, columns=SCORE)


def table(rows, key, order, methods, digits) -> pd.DataFrame:
    """A row per task or metric, a column per method: value [low, high] (seeds)."""
    cells = {}
    for row in rows.to_dict("records"):
        text = f"{row['value']:.{digits}f}"
        if not np.isnan(row["low"]):
            text += f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        cells[row[key], row["method"]] = text + (f" ({row['seeds']:.0f})" if "seeds" in row else "")
    body = [[cells.get((name, method), "") for method in methods] for name in order]
    return pd.DataFrame(body, pd.Index(order), columns=methods)


def markdown(table) -> str:
    """A Markdown table."""
    rows = [table.columns, *table.to_numpy()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * table.shape[1], *lines[1:]])


def latex(table) -> str:
    """A LaTeX tabular, with the rules of the package booktabs."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes = str.maketrans({character: f"\\{character}" for character in "_%&#${}"} | named)
    table = table.map(lambda cell: cell.translate(escapes))
    table.columns = [name.translate(escapes) for name in table.columns]
    return table.to_latex(index=False, column_format="l" + "r" * (table.shape[1] - 1)).strip()


def write(path: Path, figure, table):
    """Write path.png, path.svg and path.csv."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    table.to_csv(path.with_suffix(".csv"), index=False, lineterminator="\n")


# --- main ---------------------------------------------------------------------------------------


@plt.rc_context(THEME)
def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    episodes, left_out = read_all(args)
    methods = list(episodes["method"].cat.categories)
    sources = [read_reference(name) for name in args.reference]
    references = {name: curves for name, curves, _ in sources}
    ends = episodes.groupby(["task", "run"])["step"].max().groupby("task").min()
    steps = {task: args.at or end for task, end in ends.items()}
    published, lacking = published_scores(references, steps)
    curves, notes = make_curves(episodes, references, args)
    known = ranges(episodes, args.normalise)
    scores, unscored = all_scores(episodes, steps, args)
    reason = why_no_aggregates(scores, steps, methods, known)

    try:  # before this nothing is written
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {args.out} cannot be made: {error}") from None
    styles = assign(STYLES, methods) | assign(PUBLISHED, references)
    write(args.out / "curves", draw_curves(curves, list(steps), styles, args), curves)
    rows = pd.concat([summary(scores, args), published])
    by_task = table(rows, "task", list(steps), list(styles), 1)
    by_task.insert(0, "steps", [f"{step:,}" for step in steps.values()])
    tables = [by_task.reset_index(names="task")]
    if reason:
        for name, end in product(("aggregates", "profile"), ("png", "svg", "csv")):
            # One of other runs must not stay beside the rest.
            (args.out / f"{name}.{end}").unlink(missing_ok=True)
    else:
        # A published mean over tasks needs all of them.
        whole = published[published.groupby("method")["task"].transform("size") == len(steps)]
        own, means = normalize(scores, known), normalize(whole, known)
        rows, shares = aggregates(own, means, args.interval), profiles(own, args.interval)
        write(args.out / "aggregates", draw_aggregates(rows, styles, args.interval), rows)
        write(args.out / "profile", draw_profiles(shares, styles, args.interval), shares)
        over_tasks = table(rows, "metric", list(METRICS), rows["method"].unique(), 3)
        tables.append(over_tasks.reset_index(names="over tasks"))
    about = ABOUT.format(args.statistic, 100 * args.interval) + ABOUT_PUBLISHED * bool(references)
    notes = [*lacking, *left_out, *unscored, *notes, *filter(None, [reason])]
    notes = [about, *(f"{name}: {text}" for name, _, text in sources), *notes]
    text = "\n\n".join([*map(markdown, tables), *notes]) + "\n"
    (args.out / "table.md").write_text(text)
    comments = "\n".join(f"% {note}" for note in ("needs the package booktabs", *notes))
    (args.out / "table.tex").write_text("\n\n".join([comments, *map(latex, tables)]) + "\n")
    print(f"{text}\nwritten to {args.out}")


if __name__ == "__main__":
    launch(main)
