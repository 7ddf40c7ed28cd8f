"""Scores of runs, and their statistics over seeds and tasks with bootstrap intervals.

    from tools.scoring import METRICS, aggregate, score_runs
    scores, notes = score_runs(episodes, {"walker_walk": 100_000})  # of tools/episodes.py
    aggregate(scores, METRICS, confidence=0.95)

The statistics are those of Agarwal et al. (2021), Deep RL at the edge of the statistical precipice.
They take scores as one array [..., runs] per task. Where tasks have different numbers of runs each
task counts the same, but the IQM pools the runs. With equal numbers all agree with rliable (1.2.0).
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tools.episodes import read_json, reading


def iqm(*tasks, axis=-1):
    """Mean of the middle half of all runs of all tasks (4.3), or of all if under four."""
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


OVER_SEEDS = {"mean": mean, "iqm": iqm}  # of one task
METRICS = {"IQM": iqm, "median": median, "mean": mean, "optimality gap": optimality_gap}


def interval(statistic, tasks, confidence):
    """Percentile bootstrap interval, low and high; nan if a task has a single run.

    Stratified: runs are drawn with replacement within each task (section 4.1).
    """
    if min(task.shape[-1] for task in tasks) < 2 or not tasks[0].size:
        return np.full((2, *tasks[0].shape[:-1]), np.nan)
    batch = max(1, min(1000, 10**6 // tasks[0].size))  # many narrow bins must fit in memory
    options = {"n_resamples": 10_000, "batch": batch, "vectorized": True, "axis": -1}
    options |= {"confidence_level": confidence, "rng": np.random.default_rng(0)}
    result = stats.bootstrap(tasks, statistic, method="percentile", **options)
    return np.stack(result.confidence_interval)


def score_runs(episodes, steps) -> tuple[pd.DataFrame, list[str]]:
    """The mean return of each run in the last 10 % of its task's steps; notes on missing ones.

    Environments that end together leave long gaps: with no episode there, the last ones count.
    """
    scores, notes = [], []
    for (task, method), runs in episodes.groupby(["task", "method"]):
        start, end = 0.9 * steps[task], steps[task]
        ends = runs.groupby("source")["step"].agg(["min", "max"])
        unscored = ends[(ends["max"] <= start) | (ends["min"] > end)]
        if len(unscored):
            source, first, last = next(unscored.itertuples())
            text = f"{method} is not scored on {task}: {source} has no score at step {end:,}"
            text += f": its episodes end at steps {first:,} to {last:,}; choose another --at."
            notes.append(text)
            continue
        for _, run in runs[runs["step"] <= end].groupby("run"):
            chosen = run["step"] > min(start, run["step"].iloc[-1] - 1)
            scores.append((task, method, run.loc[chosen, "return"].mean()))
    return pd.DataFrame(scores, columns=["task", "method", "value"]), notes


def score_published(published, steps) -> pd.DataFrame:
    """Scores of published curves: the mean of their points in the last 10 % of the steps.

    With no point there, the line between two counts; before and after all points there is no score.
    """
    rows = []
    for (method, task), points in published.groupby(["method", "task"], sort=False):
        at, points = steps[task], points.set_index("step")[["return", "low", "high", "seeds"]]
        late = points[(points.index > 0.9 * at) & (points.index <= at)]
        if late.empty:
            line = points.reindex(sorted([*points.index, at]))
            late = line.interpolate("index", limit_area="inside").loc[[at]]
        seeds = np.floor(late["seeds"].max())
        score = late["return"].mean(), late["low"].min(), late["high"].max(), seeds
        rows.append((task, method, *score))
    return pd.DataFrame(rows, columns=["task", "method", "value", "low", "high", "seeds"]).dropna()


def score_ranges(episodes, path: str) -> pd.DataFrame:
    """The returns that count as 0 (low) and as 1 (high), of the tasks where they are known."""
    suite = r"dmc_|dm_control/(?!lqr)\w+-\w+-v"  # lqr's returns have no bound
    tasks = episodes.loc[episodes["env_id"].str.match(suite), "task"]
    with reading(path, "a JSON file {task: [low, high]} with low < high"):
        given = read_json(Path(path)) if path else {}
        given = {task: (float(low), float(high)) for task, (low, high) in given.items()}
        if not all(low < high for low, high in given.values()):
            raise ValueError("a low is not below its high")
    ranges = dict.fromkeys(tasks, (0.0, 1000.0)) | given
    return pd.DataFrame.from_dict(ranges, "index", columns=["low", "high"])


def normalize(scores, ranges) -> pd.DataFrame:
    """Scores with 0 for the low and 1 for the high of the task's range."""
    low, high = ranges.loc[scores["task"]].to_numpy().T
    return scores.assign(value=(scores["value"] - low) / (high - low))


def aggregate(scores, statistics, confidence) -> pd.DataFrame:
    """The statistics {metric: function} of each method, over its tasks and runs, with intervals."""
    rows = []
    for method, runs in scores.groupby("method", sort=False):
        tasks = [values.to_numpy(float) for _, values in runs.groupby("task")["value"]]
        for metric, statistic in statistics.items():
            band = interval(statistic, tasks, confidence)
            rows.append((method, metric, statistic(*tasks), *band, len(tasks), len(runs)))
    columns = ["method", "metric", "value", "low", "high", "tasks", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def profile(scores, taus, confidence) -> pd.DataFrame:
    """Rows of profile.csv: the share of runs with a score above tau (section 4.2)."""
    tables = []
    for method, runs in scores.groupby("method", sort=False):
        tasks = runs.groupby("task")["value"]
        above = [(values.to_numpy() > taus[:, None]).astype(float) for _, values in tasks]
        low, high = interval(mean, above, confidence)
        rows = {"method": method, "tau": taus, "share": mean(*above), "low": low, "high": high}
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables)
