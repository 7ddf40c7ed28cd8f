"""Comparison plots and tables: runs side by side, beside the published curves.

    pip install -r requirements-extra.txt                          # pandas, seaborn
    python -m tools.plot runs --reference v3_dmc_proprio
    python -m tools.plot results/dreamer_v3 results/dreamer        # from the CSV files
    python -m tools.plot small=runs/a big=runs/b --out plots/size  # variants, named

tools/episodes.py says which paths it reads. Writes to --out:

    curves      .png .svg .csv   return against environment steps, one panel per task
    aggregates  .png .svg .csv   IQM, median, mean and optimality gap over tasks
    profile     .png .svg .csv   share of runs above a score
    table       .md .tex         the scores, per task and over tasks

A curve is the return of training episodes. A seed's value at x is the mean of its episodes that
ended in (x - bin, x]; a bin without any, between two with some, repeats the value before. The
line is the mean (or IQM) over seeds, drawn where all of them have a value; the band is a bootstrap
interval over seeds, for a published curve the range over its seeds. The score of a run is
the mean return of the training episodes in the last 10 % of the steps.
"""

from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.ticker import EngFormatter

from common.checkpoint import RunError
from common.run import Natural, Rule, launch, parse_flags
from tools import scoring
from tools.episodes import CURVE, read_all, read_references

THEME = sns.axes_style("ticks", {"axes.grid": True, "grid.color": "0.92"})
THEME |= {"axes.titlesize": "medium", "legend.fontsize": 9, "legend.handlelength": 4}
THEME |= {"svg.fonttype": "none", "svg.hashsalt": "plaindream"}  # text stays text; reproducible
# Okabe and Ito's colors; lines and markers tell them apart in gray. Published curves are gray.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
LINES = "-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1))
STYLES = list(zip(COLORS * 7, LINES * 7, "os^DvPX" * 6, strict=True))  # 42 different ones
PUBLISHED = [("0.3", ":", "x"), ("0.5", (0, (1, 3)), "+"), ("0.1", (0, (1, 1, 3, 1)), "1")]
ABOUT = (
    "Return of the training episodes in the last 10 % of the given environment steps: "
    "{} over seeds, [{:g} % bootstrap interval], (seeds)."
)
ABOUT_PUBLISHED = (
    " Published curves: mean over seeds, [lowest, highest seed at a point], (seeds); with no point "
    "there, the line between two. Without their single seeds there is no interval, IQM or "
    "optimality gap."
)
Confidence = Annotated[float, Rule("above 0 and below 1", lambda x: 0 < x < 1)]


@dataclass
class Args:
    """Flags."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # paths, or NAME=PATH to name the method
    reference: tuple[str, ...] = ()  # published curves: names in results/reference, or files
    out: Path = Path("plots")  # folder for the plots and tables
    tasks: tuple[str, ...] = ()  # only these, named as in the plots; empty: all
    statistic: Literal["mean", "iqm"] = "mean"  # over seeds, of curves and of scores per task
    interval: Confidence = 0.95  # confidence of the bootstrap intervals
    bin: Natural = 0  # environment steps per point; 0: whole episodes, about 40 points
    at: Natural = 0  # steps at which runs are scored; 0: per task, where its shortest run ends
    normalize: str = ""  # file {task: [low, high]}; DM Control's suite has [0, 1000]


# --- curves -------------------------------------------------------------------------------------


def bin_width(episodes, points=40) -> int:
    """A multiple of the steps per episode that gives about `points` bins."""
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
    """The statistic over seeds in the bins where all have a value, to the end of the shortest."""
    bins, statistic = bin_returns(episodes, width).dropna(), scoring.OVER_SEEDS[args.statistic]
    values = np.ascontiguousarray(bins)
    low, high = scoring.interval(statistic, [values], args.interval)
    step = np.minimum(bins.index, episodes.groupby("run")["step"].max().min())
    columns = {"step": step, "return": statistic(values), "low": low, "high": high}
    return pd.DataFrame({**columns, "seeds": values.shape[1], "band": "interval"})


def make_curves(episodes, published, args) -> tuple[pd.DataFrame, list[str]]:
    """Rows of curves.csv, and notes on cut curves and action repeats."""
    curves, notes = [], []
    for task, runs in episodes.groupby("task"):
        first = runs.drop_duplicates("run")
        repeats = {run.method: run.args.get("action_repeat") for run in first.itertuples()}
        if len(set(repeats.values()) - {None}) > 1:
            each = ", ".join(f"{repeat} in {name}" for name, repeat in repeats.items() if repeat)
            notes.append(f"{task}: the action repeat is {each}; steps include it.")
        width = args.bin or bin_width(runs)
        for method, seeds in runs.groupby("method"):
            line, ends = curve(seeds, width, args), seeds.groupby("run")["step"].max()
            curves.append(line.assign(task=task, method=method))
            drawn = line["step"].max() if len(line) else 0
            if drawn + width <= ends.max():
                text = f"{method} on {task} is drawn to step {drawn:,}, where all seeds have data"
                notes.append(f"{text}: they end between {ends.min():,} and {ends.max():,}.")
    # Published curves go on to the first point after the end of all runs.
    previous = published.groupby(["task", "method"])["step"].shift(fill_value=0)
    ends = published["task"].map(episodes.groupby("task")["step"].max())
    curves = pd.concat([*curves, published[previous < ends]])[CURVE]
    return curves.sort_values("task", kind="stable", ignore_index=True), notes


# --- figures ------------------------------------------------------------------------------------


def panels(rows, styles, **options) -> sns.FacetGrid:
    """Panels whose `map` draws each method with its color, line and marker."""
    names = rows["method"].unique()
    keywords = pd.DataFrame([styles[name] for name in names], columns=["color", "ls", "marker"])
    options |= {"hue_order": names, "hue_kws": keywords.to_dict("list"), "legend_out": False}
    return sns.FacetGrid(rows, hue="method", **options)


def draw_line(x, y, low, high, band=(), **style):
    """A line with markers and its band; in gray only hatching tells published bands apart."""
    plt.plot(x, y, ms=4, markevery=max(1, len(x) // 8), **style)
    hatch = {"facecolor": "none", "hatch": "////"} if "min-max" in set(band) else {}
    plt.fill_between(x, low, high, color=style["color"], ls=style["ls"], alpha=0.2, lw=0.7, **hatch)


def draw_bar(method, value, low, high, color, marker, **_):
    """The interval as a bar, the value as a marker."""
    bar = {"lw": 7, "alpha": 0.35, "solid_capstyle": "butt"}
    plt.plot([*low, *high], [*method, *method], color=color, **bar)
    plt.plot(value, method, color=color, marker=marker, ms=7)


def draw_curves(curves, tasks, styles, args) -> sns.FacetGrid:
    """The curves, a panel per task."""
    labels = {}
    for (method, band), seeds in curves.groupby(["method", "band"])["seeds"]:
        count = "-".join(map(str, sorted({seeds.min(), seeds.max()})))
        band = band if band == "min-max" else f"{100 * args.interval:g} % interval"
        labels[method] = f"{method}: {count} seeds, {band}" if count != "1" else f"{method}: 1 seed"
    curves = curves.assign(method=curves["method"].map(labels))
    styles = {label: styles[method] for method, label in labels.items()}
    options = {"sharex": False, "sharey": False, "aspect": 1.3}
    options["col_wrap"] = min(len(tasks), 3 if len(tasks) <= 12 else 5)
    grid = panels(curves, styles, col="task", col_order=tasks, **options)
    grid.map(draw_line, "step", "return", "low", "high", "band").set_titles("{col_name}")
    ends = curves[curves["band"] == "interval"].groupby("task")["step"].max()
    for task, axes in grid.axes_dict.items():
        axes.set(xlim=(0, 1.04 * ends.get(task, 1)), xlabel="environment steps", ylabel="return")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return grid.add_legend(title="")


def draw_aggregates(rows, styles, args) -> sns.FacetGrid:
    """A panel per metric, a line per method."""
    count = rows["method"].nunique()
    height = 1.2 + 0.4 * count
    grid = panels(rows, styles, col="metric", sharex=False, height=height, aspect=2.75 / height)
    grid.map(draw_bar, "method", "value", "low", "high").set_titles("{col_name}")
    grid.axes_dict["optimality gap"].set_title("optimality gap\n(less is better)")
    grid.set(ylim=(count - 0.4, -0.6), xmargin=0.15).set_axis_labels("", "")
    grid.figure.supxlabel(f"normalized score (bar: {100 * args.interval:g} % interval)", size=10)
    return grid


def draw_profile(rows, styles, args) -> sns.FacetGrid:
    """Share of runs above a score, a line per method."""
    shares = ["share", "low", "high"]
    grid = panels(rows.assign(**100 * rows[shares]), styles, height=4.2, aspect=1.5)
    grid.map(draw_line, "tau", *shares).set(ylim=(-2, 103))
    label = f"normalized score (band: {100 * args.interval:g} % interval)"
    return grid.set_axis_labels(label, "runs with a higher score, %").add_legend(title="")


# --- files --------------------------------------------------------------------------------------


def write(path: Path, grid, rows):
    """Write path.png, path.svg and path.csv; a legend goes below the panels."""
    grid.tight_layout()
    if grid.legend:
        sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    grid.savefig(path.with_suffix(".png"), dpi=150)
    grid.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(grid.figure)
    rows.to_csv(path.with_suffix(".csv"), index=False, lineterminator="\n")


def table(rows, key, order, methods, digits) -> pd.DataFrame:
    """A row per task or metric, a column per method: value [low, high] (seeds)."""
    cells = pd.DataFrame("", order, methods)
    for row in rows.to_dict("records"):
        text = f"{row['value']:.{digits}f}"
        if not np.isnan(row["low"]):
            text += f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        cells.loc[row[key], row["method"]] = text + (
            f" ({row['seeds']:.0f})" if "seeds" in row else ""
        )
    return cells


def write_tables(folder: Path, tables, notes):
    """Write table.md, and table.tex with the rules of the package booktabs."""
    markdown, latex = [], ["% " + "\n% ".join(["needs the package booktabs", *notes])]
    for table in tables:
        rows = [table.columns, *table.to_numpy()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        markdown.append("\n".join([lines[0], "|" + "---|" * len(table.columns), *lines[1:]]))
        columns = "l" + "r" * (len(table.columns) - 1)
        latex.append(table.to_latex(index=False, escape=True, column_format=columns).strip())
    (folder / "table.md").write_text("\n\n".join([*markdown, *notes]) + "\n")
    (folder / "table.tex").write_text("\n\n".join(latex) + "\n")


def write_over_tasks(scores, means, styles, args) -> pd.DataFrame:
    """Write aggregates and profile of normalized scores; returns the table of the aggregates."""
    rows = scoring.aggregate(pd.concat([scores, means]), scoring.METRICS, args.interval)
    # The other metrics need single seeds, which published curves do not have.
    known = rows["metric"].isin(["median", "mean"]) | ~rows["method"].isin(set(means["method"]))
    rows = rows[known].drop(columns="seeds")
    write(args.out / "aggregates", draw_aggregates(rows, styles, args), rows)
    taus = np.linspace(min(0, scores["value"].min()), max(1, scores["value"].max()), 101)
    shares = scoring.profile(scores, taus, args.interval)
    write(args.out / "profile", draw_profile(shares, styles, args), shares)
    return table(rows, "metric", list(scoring.METRICS), rows["method"].unique(), 3)


@plt.rc_context(THEME)
def main(argv=None):
    args = parse_flags(Args, argv, __doc__, lambda _: {})
    episodes, left_out = read_all(args.runs, args.tasks)
    ends = episodes.groupby(["task", "run"])["step"].max().groupby("task").min()
    steps = {task: args.at or end for task, end in ends.items()}
    published, about_published = read_references(args.reference, steps)
    methods, references = episodes["method"].cat.categories, published["method"].unique()
    curves, cut = make_curves(episodes, published, args)
    ranges = scoring.score_ranges(episodes, args.normalize)
    scores, unscored = scoring.score_runs(episodes, steps)
    if args.at and unscored:
        raise RunError(unscored[0])
    try:  # before this nothing is written
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {args.out} cannot be made: {error}") from None

    styles = dict(zip(methods, cycle(STYLES))) | dict(zip(references, cycle(PUBLISHED)))
    write(args.out / "curves", draw_curves(curves, list(steps), styles, args), curves)
    over_seeds = {args.statistic: scoring.OVER_SEEDS[args.statistic]}
    means = scoring.score_published(published, steps)
    rows = [means]
    for task, runs in scores.groupby("task"):
        rows.append(scoring.aggregate(runs, over_seeds, args.interval).assign(task=task))
    by_task = table(pd.concat(rows), "task", list(steps), list(styles), 1)
    missing = {name: ", ".join(cells.index[cells == ""]) for name, cells in by_task.items()}
    by_task.insert(0, "steps", [f"{step:,}" for step in steps.values()])
    tables = [by_task.reset_index(names="task")]
    incomplete = [name for name in references if missing[name]]
    notes = [ABOUT.format(args.statistic, 100 * args.interval), *about_published]
    notes[0] += ABOUT_PUBLISHED * bool(args.reference)
    notes += [f"{name} has nothing at these steps for {missing[name]}." for name in incomplete]
    notes += [*left_out, *unscored, *cut]

    advice = "--tasks chooses those that all methods have."
    reasons = [f"{m} has no score on {missing[m]}. {advice}" for m in methods if missing[m]]
    if unknown := ", ".join(task for task in steps if task not in ranges.index):
        text = f"the returns that count as 0 and 1 are not known for {unknown}"
        reasons.append(f"{text}. --normalize FILE.json names them.")
    if reasons:
        notes.append(f"No aggregates: {reasons[0]}")
        for name, suffix in product(("aggregates", "profile"), (".png", ".svg", ".csv")):
            # A stale one must not stay beside the new files.
            (args.out / f"{name}{suffix}").unlink(missing_ok=True)
    else:
        # A published mean over tasks needs all of them.
        means = means[~means["method"].isin(incomplete)]
        scores, means = scoring.normalize(scores, ranges), scoring.normalize(means, ranges)
        over_tasks = write_over_tasks(scores, means, styles, args)
        tables.append(over_tasks.reset_index(names="over tasks"))
    write_tables(args.out, tables, notes)
    print((args.out / "table.md").read_text() + f"\nwritten to {args.out}")


if __name__ == "__main__":
    launch(main)
