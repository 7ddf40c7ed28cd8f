"""tools/episodes.py, scoring.py and plot.py, and the files of tools/collect.py."""

import csv
import gzip
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dreamer
import dreamer_v3
import pilco
from common.checkpoint import RunError
from common.run import may_change
from tools import collect, plot, scoring, success
from tools import scores as score_lines
from tools.episodes import (
    REFERENCES,
    find_runs,
    join,
    make_run,
    read_file,
    read_references,
    task_name,
)
from tools.plot import Args, bin_returns, bin_width, curve
from tools.scoring import interval

REPO = Path(__file__).parents[1]

STEPS = range(50, 1001, 50)
POINT = ["step", "return", "low", "high", "seeds"]  # of a published curve
NOTHING_PUBLISHED = read_references((), ())[0]
WALKER, CHEETAH, HOPPER = (
    f"dm_control/{task}-v0" for task in ("walker-walk", "cheetah-run", "hopper-stand")
)


def run_folder(path, env_id=WALKER, seed=0, episodes=((100, 1.0),), script="dreamer_v3", **args):
    """A run folder: what plots and exports read."""
    path.mkdir(parents=True)
    origin = [{"command": "python x.py", "commit": "abc", "versions": "v", "hardware": "h"}]
    args = {"env_id": env_id, "seed": seed, "action_repeat": 2, "lr": 0.1, "run": "", **args}
    text = json.dumps({"script": script, **args, "origin": origin})
    (path / "args.json").write_text(text)
    rows = [{"step": s, "episode/return": r, "time/wall": s / 10} for s, r in episodes]
    rows.append({"step": rows[-1]["step"] if rows else 0, "updates": 7.0, "time/wall": 99.6})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(lines + '{"step": 12')  # as a killed run leaves it
    return path


def score_file(path, runs):
    """A file of the authors' format from (task, method, seed, xs, ys)."""
    names = ("task", "method", "seed", "xs", "ys")
    text = json.dumps([dict(zip(names, run, strict=True)) for run in runs]).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def seed_run(steps, returns, seed="0", method="m", task="t"):
    return make_run(method, task, seed, zip(steps, returns, strict=True), f"run {seed}", {})[1]


def key(run):
    """Method, task and seed, the same in all rows of a run."""
    ((method, task, seed),) = set(zip(run["method"], run["task"], run["seed"], strict=True))
    return method, task, seed


def runs_of(spec):
    runs, notes = find_runs(str(spec))
    assert notes == []
    return runs


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", sorted(REFERENCES.glob("*.json")), ids=lambda p: p.stem)
def test_every_published_task_is_a_registered_environment(reference):
    import ale_py
    import gymnasium
    import shimmy

    gymnasium.register_envs(ale_py)
    gymnasium.register_envs(shimmy)
    registered = {task_name(env_id) for env_id in gymnasium.registry}
    tasks = set(json.loads(reference.read_text())["curves"])
    assert len(tasks) in (18, 19, 20, 26)
    assert tasks <= registered


def test_task_names():
    names = {
        "dm_control/walker-walk-v0": "walker_walk",
        "dm_control/finger-turn_hard-v0": "finger_turn_hard",
        "dm_control/ball_in_cup-catch-v0": "cup_catch",
        "dmc_ball_in_cup_catch": "cup_catch",
        "dmc_cup_catch": "cup_catch",
        "ALE/MsPacman-v5": "atari_ms_pacman",
        "ALE/UpNDown-v5": "atari_up_n_down",
        "atari_pong": "atari_pong",
        "Pendulum-v1": "Pendulum-v1",
        "PILCO/CartPole-v0": "PILCO/CartPole-v0",
    }
    assert {env_id: task_name(env_id) for env_id in names} == names


# --- bins and curves ----------------------------------------------------------------------------


def test_a_bin_ends_at_its_right_edge_and_an_empty_one_keeps_the_last_value():
    bins = bin_returns(join([seed_run([5, 10, 11, 35], [1, 3, 10, 7])]), 10)[0]
    assert bins.index.tolist() == [10, 20, 30, 40]  # 10 belongs to (0, 10], 11 to (10, 20]
    assert bins.tolist() == [2.0, 10.0, 10.0, 7.0]


def test_bins_begin_with_the_first_episode():
    bins = bin_returns(join([seed_run([205, 205, 400], [1, 2, 5])]), 100)[0]
    assert bins.index.tolist() == [300, 400]
    assert bins.tolist() == [1.5, 5.0]


@pytest.mark.parametrize(
    ("steps", "width"),
    [
        (range(202, 10_000, 202), 404),  # 49 episodes: two each, not one or two
        ([16_016] * 16, 16_016),  # all environments end together
        (range(40, 201, 40), 40),  # a few trials
        (range(1, 41), 1),
    ],
)
def test_bins_hold_whole_episodes(steps, width):
    assert bin_width(join([seed_run(steps, [0.0] * len(steps))])) == width


def test_bin_width_is_that_of_the_longest_episodes():
    one = seed_run(range(100, 1001, 100), [0.0] * 10)
    many = seed_run([400, 400, 800, 800], [0.0] * 4, "1")
    assert bin_width(join([one, many])) == 400


def test_a_curve_is_drawn_where_all_seeds_have_data():
    args = Args(())
    runs = join([seed_run([10, 20, 30, 40], [1, 2, 3, 4], "0"), seed_run([20, 30], [4, 9], "1")])
    line = curve(runs, 10, args)
    assert line["step"].tolist() == [20, 30]
    assert line["return"].tolist() == [3.0, 6.0]
    assert line["seeds"].tolist() == [2, 2]
    # The mean of two draws from {2, 4} is 2, 3 or 4, with 1/4, 1/2, 1/4.
    assert line["low"].tolist() == [2.0, 3.0]
    assert line["high"].tolist() == [4.0, 9.0]
    notes = plot.make_curves(runs, NOTHING_PUBLISHED, Args((), bin=10))[1]
    assert len(notes) == 1 and "step 30" in notes[0] and "30 and 40" in notes[0]


def test_seeds_without_a_common_bin_give_no_curve():
    runs = join([seed_run([10], [1], "0"), seed_run([90], [4], "1")])
    curves, notes = plot.make_curves(runs, NOTHING_PUBLISHED, Args((), bin=10))
    assert curves.empty
    assert "m on t is drawn to step 0" in notes[0] and "10 and 90" in notes[0]
    (axes,) = plot.draw_curves(curves, ["t"], {"m": plot.STYLES[0]}, Args(())).figure.axes
    assert axes.get_title() == "t" and not axes.lines


def test_one_seed_has_no_interval():
    line = curve(join([seed_run([10, 20], [1, 2])]), 10, Args(()))
    assert line["return"].tolist() == [1, 2]
    assert np.isnan(line["low"]).all() and np.isnan(line["high"]).all()


def test_a_curve_of_interquartile_means():
    runs = join([seed_run([10], [value], str(value)) for value in (1, 2, 4, 1000)])
    assert curve(runs, 10, Args((), statistic="iqm"))["return"].tolist() == [3.0]
    assert curve(runs, 10, Args(()))["return"].tolist() == [1007 / 4]


# --- statistics ---------------------------------------------------------------------------------


def test_iqm_is_the_mean_of_the_middle_half_of_all_runs():
    first, second = np.array([0.0, 8.0, 1.0, 7.0]), np.array([2.0, 3.0, 4.0, 100.0])
    assert scoring.iqm(first, second) == (2 + 3 + 4 + 7) / 4  # 0 1 | 2 3 4 7 | 8 100
    assert scoring.iqm(np.array([1.0, 2.0, 6.0])) == 3.0  # less than four: nothing is cut off
    assert scoring.iqm(np.array([5.0, 1.0]), np.array([3.0, 9.0, 4.0])) == 4.0  # 1 | 3 4 5 | 9


def test_median_and_mean_are_of_task_means():
    tasks = np.array([0.0, 0.0, 9.0]), np.array([4.0, 4.0]), np.array([5.0])
    assert scoring.median(*tasks) == 4.0
    assert scoring.mean(*tasks) == 4.0  # each task counts the same: of all runs it would be 22/6
    assert scoring.median(np.array([0.0, 0.0, 9.0])) == 3.0  # of all runs it would be 0


def test_optimality_gap_ignores_what_exceeds_one():
    gap = scoring.optimality_gap(np.array([0.5, 3.0]), np.array([-1.0, 1.0]))
    assert gap == pytest.approx((0.5 + 0 + 2 + 0) / 4)


def test_profile_counts_the_runs_above():
    tasks = [np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.5, 1.2])]
    scores = pd.DataFrame(
        [("m", task, value) for task, values in enumerate(tasks) for value in values],
        columns=["method", "task", "value"],
    )
    rows = scoring.profile(scores, np.array([0.0, 0.3, 0.5, 1.0]), 0.95)
    share, low, high = rows[["share", "low", "high"]].to_numpy().T
    assert share.tolist() == [1.0, (3 / 4 + 1) / 2, (1 / 4 + 1 / 2) / 2, (0 + 1 / 2) / 2]
    assert (low <= share).all() and (share <= high).all()
    assert low[0] == high[0] == 1.0
    assert high[2] - low[2] > 0.4


@pytest.mark.parametrize("statistic", scoring.METRICS.values(), ids=scoring.METRICS)
@pytest.mark.parametrize("confidence", [0.95, 0.6])
def test_interval_agrees_with_all_resamples(statistic, confidence):
    """Two tasks of three runs have 27 x 27 equally likely resamples."""
    tasks = np.array([0.1, 0.42, 0.7]), np.array([0.2, 0.35, 1.3])
    draws = [[np.array(draw) for draw in product(task, repeat=3)] for task in tasks]
    exact = np.array([statistic(first, second) for first, second in product(*draws)])
    low, high = interval(statistic, tasks, confidence)
    tail = (1 - confidence) / 2
    for end, below in ((low, tail), (high, 1 - tail)):
        # The share of resamples below the end, give or take 4 deviations of 10,000 resamples.
        slack = 4 * np.sqrt(below * (1 - below) / 10_000)
        assert (exact < end - 1e-9).mean() <= below + slack
        assert (exact <= end + 1e-9).mean() >= below - slack


def test_interval_resamples_tasks_separately():
    apart = np.full(4, 0.2), np.full(4, 0.8)
    assert interval(scoring.mean, apart, 0.95) == pytest.approx(0.5)  # pooled it would vary
    mirrored = np.array([0.0, 1.0, 2.0]), np.array([2.0, 1.0, 0.0])
    low, high = interval(scoring.mean, mirrored, 0.95)
    assert low < 0.7 and high > 1.3  # paired it would always be 1


def test_interval_covers_the_mean():
    samples = np.random.default_rng(1).standard_normal((400, 20))
    low, high = interval(scoring.mean, [samples], 0.9)
    # The percentile bootstrap is too narrow by sqrt(19/20) and by normal instead of t quantiles:
    # 0.874 for 20 numbers; four deviations of 400 trials are 0.066.
    assert abs(((low < 0) & (high > 0)).mean() - 0.874) < 0.066
    width = 2 * 1.645 * np.sqrt(samples.var(-1) / 20)
    np.testing.assert_allclose((high - low) / width, 1, atol=0.15)


def test_one_run_of_a_task_gives_no_interval():
    assert np.isnan(interval(scoring.mean, [np.array([1.0, 2.0]), np.array([3.0])], 0.95)).all()


# --- scores -------------------------------------------------------------------------------------


def score(run, at):
    scores, notes = scoring.score_runs(join([run]), {"t": at})
    assert notes == []
    return scores["value"].item()


def test_a_score_is_the_mean_of_the_last_tenth():
    run = seed_run([100, 900, 901, 1000, 1001], [1, 2, 4, 8, 100])
    assert score(run, 1000) == 6.0  # 900 is not in (900, 1000]
    assert score(run, 1001) == (4 + 8 + 100) / 3
    assert score(run, 500) == 1.0  # the last before
    together = seed_run([400, 400, 800, 800], [1, 3, 5, 9])
    assert score(together, 799) == 2.0
    assert score(together, 850) == 7.0


@pytest.mark.parametrize("at", [99, 1200])
def test_no_score_where_a_run_has_no_episode(at):
    scores, (note,) = scoring.score_runs(join([seed_run([100, 1000], [1, 2])]), {"t": at})
    assert scores.empty
    assert re.search(f"run 0 has no score at step {at:,}: .* 100 to 1,000", note)


def test_the_published_score_is_that_of_the_line_drawn():
    def published_score(points, at):
        rows = scoring.score_published(points.assign(task="t", method="paper"), {"t": at})
        return rows[["value", "low", "high", "seeds"]].to_numpy().tolist()

    rows = [[100, 10, 5, 20, 3], [200, 30, 25, 50, 4], [205, 40, 20, 45, 5]]
    points = pd.DataFrame(rows, columns=POINT)
    assert published_score(points, 205) == [[35.0, 20.0, 50.0, 5]]
    assert published_score(points, 150) == [[20.0, 15.0, 35.0, 3]]
    assert published_score(points, 100) == [[10.0, 5.0, 20.0, 3]]
    assert published_score(points, 99) == []
    assert published_score(points, 228) == []
    points = points[:2].assign(step=[180, 200])  # 180 is not in (180, 200]
    assert published_score(points, 200) == [[30.0, 25.0, 50.0, 4]]


# --- reading ------------------------------------------------------------------------------------


def test_a_file_of_results():
    runs = runs_of(REPO / "results" / "dreamer_v3" / "Pendulum-v1.csv")
    assert [key(run) for run in runs] == [("dreamer_v3", "Pendulum-v1", seed) for seed in "01234"]
    assert runs[0]["step"].tolist()[:2] == [202, 404]
    assert runs[0]["return"].tolist()[:2] == [-880.119, -865.064]


def test_folders_are_searched_and_named(tmp_path):
    run_folder(tmp_path / "a" / "seed0", episodes=[(10, 1.5), (20, 2.5)])
    run_folder(tmp_path / "a" / "seed1", seed=1)
    runs = runs_of(tmp_path)
    assert [key(run) for run in runs] == [
        ("dreamer_v3", "walker_walk", "0"),
        ("dreamer_v3", "walker_walk", "1"),
    ]
    assert runs[0]["step"].tolist() == [10, 20]
    assert runs[0]["return"].tolist() == [1.5, 2.5]
    assert {key(run)[0] for run in runs_of(f"mine={tmp_path}")} == {"mine"}


def test_a_path_may_hold_an_equals_sign(tmp_path):
    run_folder(tmp_path / "lr=1")
    assert key(runs_of(tmp_path / "lr=1")[0])[0] == "dreamer_v3"


def test_a_collected_run_reads_as_its_folder_does(tmp_path):
    folder = run_folder(tmp_path / "run", seed=3, episodes=[(10, 1.5), (20, 2.5)])
    collect.collect(folder, tmp_path / "out")
    collect.collect(folder, tmp_path / "out", "pixels")
    before = runs_of(folder)[0]
    plain, tagged = runs_of(tmp_path / "out")
    for after, method in ((plain, "dreamer_v3"), (tagged, "dreamer_v3-pixels")):
        assert key(after) == (method, key(before)[1], "3")
        assert set(after["env_id"]) == {WALKER}
        assert after["step"].tolist() == before["step"].tolist()
        assert after["return"].tolist() == before["return"].tolist()
        args = after["args"].iloc[0]
        assert args["lr"] == 0.1 and args["action_repeat"] == 2


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_the_authors_score_files(tmp_path, ending):
    rows = [("dmc_walker_walk", "dreamerv3", 0, [10000.0, 20000.0], [3, 4.5]),
            ("atari_pong", "dreamerv3", "1", [5], [-21])]  # fmt: skip
    walker, pong = runs_of(score_file(tmp_path / f"scores.{ending}", rows))
    assert key(walker) == ("dreamerv3", "walker_walk", "0")
    assert walker["step"].tolist() == [10000, 20000] and walker["return"].tolist() == [3, 4.5]
    assert key(pong)[1:] == ("atari_pong", "1")


def test_the_committed_results_can_be_read():
    runs = join(runs_of(REPO / "results")).drop_duplicates("run")
    pendulum, cartpole = (
        runs[runs["task"] == task] for task in ("Pendulum-v1", "PILCO/CartPole-v0")
    )
    assert set(pendulum["method"]) >= {"dreamer_v3", "dreamer", "dreamer-pixels"}
    assert (cartpole["method"] == "pilco").sum() >= 10
    args = pendulum.loc[pendulum["method"] == "dreamer", "args"]
    assert [run["action_repeat"] for run in args] == [2] * 3


# --- a whole comparison -------------------------------------------------------------------------

SCORES = {WALKER: (100, 200, 300), CHEETAH: (400, 500, 800), HOPPER: (900, 900, 900)}


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    """Three tasks of three seeds whose scores are SCORES, a variant 50 below, a reference."""
    root = tmp_path_factory.mktemp("plots")
    for env_id, scores in SCORES.items():
        for seed, value in enumerate(scores):
            for name, shift in (("plain", 0), ("low_lr", -50)):
                last = {900: 5000, 950: value + shift - 10, 1000: value + shift + 10}
                episodes = [(step, last.get(step, step / 10)) for step in STEPS]
                where = root / name / env_id.replace("/", "-") / str(seed)
                run_folder(where, env_id, seed, episodes, lr=0.1 if shift else 0.2)
    curves = {"walker_walk": {"600": [50, 40, 60, 5], "1000": [123.44, 50, 200, 7]},
              "cheetah_run": {"1000": [300, 200, 400, 7], "5000": [700, 600, 800, 7]},
              "hopper_stand": {"500": [600, 550, 650, 7], "1500": [700, 650, 750, 7]}}  # fmt: skip
    (root / "paper.json").write_text(json.dumps({"notes": "Not ours.", "curves": curves}))
    named = [f"{name}={root / name}" for name in ("plain", "low_lr")]
    plot.main([*named, "--reference", str(root / "paper.json"), "--out", str(root / "out"),
               "--bin", "100"])  # fmt: skip
    return root / "out"


@pytest.mark.parametrize("name", ["curves", "aggregates", "profile"])
def test_pictures(plots, name):
    pixels = np.asarray(Image.open(plots / f"{name}.png").convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 250
    blue, vermilion = (np.abs(pixels - c).sum(-1) < 30 for c in ((0, 114, 178), (213, 94, 0)))
    assert blue.sum() > 100 and vermilion.sum() > 100  # a line or a bar of each method
    svg = ElementTree.parse(plots / f"{name}.svg")
    text = {"".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")}
    labels = {
        "curves": {"environment steps", "return", "walker_walk", "cheetah_run", "hopper_stand",
                   "plain: 3 seeds, 95 % interval", "paper (published): 5-7 seeds, min-max"},
        "aggregates": {"IQM", "median", "mean", "optimality gap", "(less is better)", "plain",
                       "low_lr", "paper (published)", "normalized score (bar: 95 % interval)"},
        "profile": {"normalized score (band: 95 % interval)", "runs with a higher score, %",
                    "plain", "low_lr"},
    }  # fmt: skip
    assert {label.strip() for label in text} >= labels[name]


def test_the_curves_are_drawn_where_the_numbers_are():
    runs = join([seed_run([10, 20, 27], [1, 2, 3], "0"), seed_run([10, 20, 30], [3, 6, 9], "1")])
    points = pd.DataFrame([[10, 2, 1, 3, 5], [40, 8, 7, 9, 5]], columns=POINT)
    points = points.assign(task="t", method="paper", band="min-max")
    args = Args((), bin=10)
    curves, _ = plot.make_curves(runs, points, args)
    styles = {"m": plot.STYLES[0], "paper": plot.PUBLISHED[0]}
    (axes,) = plot.draw_curves(curves, ["t"], styles, args).figure.axes
    ours, paper = axes.lines
    assert ours.get_xydata().tolist() == [[10, 2], [20, 4], [27, 6]]  # 27: where the first one ends
    assert paper.get_xydata().tolist() == [[10, 2], [40, 8]]
    bands = [band.get_paths()[0].vertices for band in axes.collections]
    for band, low, high in zip(bands, ((1, 2, 3), (1, 7)), ((3, 6, 9), (3, 9)), strict=True):
        for x, ends in zip(np.unique(band[:, 0]), zip(low, high, strict=True), strict=True):
            at = band[band[:, 0] == x, 1]
            assert (at.min(), at.max()) == ends
    labels = {0: "0", 500: "500", 20_000: "20k", 1_500: "1.5k", 1_100_000: "1.1M"}
    assert {x: axes.xaxis.get_major_formatter()(x, 0) for x in labels} == labels
    hatched = [band.get_hatch() is not None for band in axes.collections]
    assert hatched == [False, True]


def test_the_bars_are_as_long_as_the_intervals():
    rows = [
        {"method": name, "metric": metric, "value": 0.5, "low": low, "high": high}
        for metric in scoring.METRICS
        for name, low, high in (("a", 0.4, 0.6), ("b", 0.1, 0.9))
    ]
    styles = {"a": plot.STYLES[0], "b": plot.STYLES[1]}
    figure = plot.draw_aggregates(pd.DataFrame(rows), styles, Args()).figure
    assert len(figure.axes) == 4
    for axes in figure.axes:
        first, at, second, _ = axes.lines
        assert first.get_xydata().tolist() == [[0.4, 0], [0.6, 0]]
        assert second.get_xydata().tolist() == [[0.1, 1], [0.9, 1]]
        assert at.get_xydata().tolist() == [[0.5, 0]]
        assert first.get_solid_capstyle() == "butt"  # nothing beyond the ends


def test_the_profile_has_its_band():
    columns = {"tau": [0, 0.5, 1], "share": [1.0, 0.5, 0.0]}
    band = {"low": [0.9, 0.2, 0.0], "high": [1.0, 0.7, 0.1]}
    rows = pd.DataFrame({"method": "m", **columns, **band})
    (axes,) = plot.draw_profile(rows, {"m": plot.STYLES[0]}, Args()).figure.axes
    assert axes.lines[0].get_ydata().tolist() == [100, 50, 0]
    vertices = axes.collections[0].get_paths()[0].vertices
    middle = vertices[vertices[:, 0] == 0.5, 1]
    assert (middle.min(), middle.max()) == (pytest.approx(20), pytest.approx(70))


def test_no_two_methods_look_alike(plots):
    assert len(set(map(str, plot.STYLES))) == len(plot.STYLES) >= 36
    svg = (plots / "curves.svg").read_text().lower()  # of two methods
    assert [color.lower() in svg for color, _, _ in plot.STYLES[:4]] == [True, True, False, False]


def test_curves_csv(plots):
    rows = {(r["task"], r["method"], r["step"]): r for r in read_csv(plots / "curves.csv")}
    walker = rows["walker_walk", "plain", "1000"]
    # 950 and 1000 in (900, 1000]; one resample in 27 draws the worst seed three times.
    assert [float(walker[key]) for key in ("return", "low", "high")] == [200.0, 100.0, 300.0]
    assert (walker["seeds"], walker["band"]) == ("3", "interval")
    assert float(rows["walker_walk", "plain", "100"]["return"]) == 7.5  # 50 and 100, tenths
    assert float(rows["walker_walk", "plain", "900"]["return"]) == (85 + 5000) / 2
    paper = rows["walker_walk", "paper (published)", "1000"]
    assert [paper[key] for key in ("return", "low", "high")] == ["123.44", "50.0", "200.0"]
    assert (paper["seeds"], paper["band"]) == ("7", "min-max")
    assert rows["walker_walk", "paper (published)", "600"]["seeds"] == "5"
    assert ("hopper_stand", "paper (published)", "1500") in rows  # past the panel's edge
    assert ("cheetah_run", "paper (published)", "5000") not in rows
    steps = [int(step) for task, method, step in rows if (task, method) == ("walker_walk", "plain")]
    assert steps == list(range(100, 1001, 100))


def test_aggregates_csv(plots):
    rows = {(row["method"], row["metric"]): row for row in read_csv(plots / "aggregates.csv")}
    value = {key: float(row["value"]) for key, row in rows.items()}
    # .1 .2 | .3 .4 .5 .8 .9 | .9 .9 and the task means .2, 17/30, .9
    assert value["plain", "IQM"] == pytest.approx(2.9 / 5)
    assert value["plain", "median"] == pytest.approx(17 / 30)
    assert value["plain", "mean"] == pytest.approx(5 / 9)
    assert value["plain", "optimality gap"] == pytest.approx(4 / 9)
    assert value["low_lr", "mean"] == pytest.approx(5 / 9 - 0.05)
    # Percentiles of all 27 x 27 resamples of two tasks; the third is constant.
    draws = [[sum(d) / 3e3 for d in product(SCORES[t], repeat=3)] for t in (WALKER, CHEETAH)]
    means = np.array([(a + b + 0.9) / 3 for a, b in product(*draws)])
    low, high = float(rows["plain", "mean"]["low"]), float(rows["plain", "mean"]["high"])
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.012)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.012)
    assert value["paper (published)", "median"] == pytest.approx(0.3)
    assert value["paper (published)", "mean"] == pytest.approx((0.12344 + 0.3 + 0.65) / 3)
    assert rows["paper (published)", "mean"]["low"] == ""  # its seeds are not known
    assert ("paper (published)", "IQM") not in rows


def test_profile_csv(plots):
    rows = read_csv(plots / "profile.csv")
    share = {(r["method"], round(float(r["tau"]), 2)): float(r["share"]) for r in rows}
    assert share["plain", 0.0] == 1.0
    assert share["plain", 0.25] == pytest.approx(7 / 9)
    assert share["plain", 0.6] == pytest.approx(4 / 9)
    assert share["low_lr", 0.6] == pytest.approx(4 / 9)
    assert share["low_lr", 0.25] == pytest.approx(6 / 9)
    assert share["plain", 1.0] == 0.0
    assert all(float(row["low"]) <= float(row["share"]) <= float(row["high"]) for row in rows)


def test_table_md(plots):
    lines = (plots / "table.md").read_text().splitlines()
    assert lines[0] == "| task | steps | plain | low_lr | paper (published) |"
    assert lines[1] == "|---|---|---|---|---|"
    walker = "| 200.0 [100.0, 300.0] (3) | 150.0 [50.0, 250.0] (3) | 123.4 [50.0, 200.0] (7) |"
    assert f"| walker_walk | 1,000 {walker}" in lines
    hopper = "| 900.0 [900.0, 900.0] (3) | 850.0 [850.0, 850.0] (3) | 650.0 [600.0, 700.0] (7) |"
    assert f"| hopper_stand | 1,000 {hopper}" in lines
    assert any(line.startswith("| IQM | 0.580 [") and line.endswith("|  |") for line in lines)
    assert any(line.startswith("| mean | 0.556 [") and line.endswith("| 0.358 |") for line in lines)
    assert any("last 10 %" in line and "no interval" in line for line in lines)
    assert "paper (published): Not ours." in lines


def test_table_tex(plots):
    lines = (plots / "table.tex").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("%")]
    assert code[0] == r"\begin{tabular}{lrrrr}"
    walker = "200.0 [100.0, 300.0] (3) & 150.0 [50.0, 250.0] (3) & 123.4 [50.0, 200.0] (7)"
    assert rf"walker\_walk & 1,000 & {walker} \\" in code
    assert r"task & steps & plain & low\_lr & paper (published) \\" in code
    assert code.count(r"\end{tabular}") == 2
    assert not any("_" in line.replace(r"\_", "") for line in code)


def test_latex_escapes(tmp_path):
    table = pd.DataFrame([["x_y", ""]], columns=["a_b & 50 %", r"c\d~e^f#g$h{i}"])
    plot.write_tables(tmp_path, [table], [])
    rows = [line for line in (tmp_path / "table.tex").read_text().splitlines() if "&" in line]
    escaped = r"c\textbackslash d\textasciitilde e\textasciicircum f\#g\$h\{i\}"
    assert rows[0] == rf"a\_b \& 50 \% & {escaped} \\"
    assert rows[1] == r"x\_y &  \\"


def test_without_ranges_there_are_curves_but_no_aggregates(tmp_path):
    for seed in range(2):
        episodes = [(100, -seed), (200, 5.0), *[(300, 9.0)] * seed]  # scored where seed 0 ends
        run_folder(tmp_path / "runs" / str(seed), "Pendulum-v1", seed, episodes)
    out = tmp_path / "out"
    (tmp_path / "ranges.json").write_text('{"Pendulum-v1": [-10, 10]}')
    known = ["--normalize", str(tmp_path / "ranges.json")]
    plot.main([str(tmp_path / "runs"), "--out", str(out), *known])
    rows = {row["metric"]: float(row["value"]) for row in read_csv(out / "aggregates.csv")}
    assert rows["mean"] == 0.75
    plot.main([str(tmp_path / "runs"), "--out", str(out)])  # the old aggregates must not stay
    names = ["curves.csv", "curves.png", "curves.svg", "table.md", "table.tex"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "not known for Pendulum-v1. --normalize" in (out / "table.md").read_text()


def test_methods_with_different_tasks(tmp_path, capsys):
    run_folder(tmp_path / "a" / "walker", WALKER)
    run_folder(tmp_path / "a" / "hopper", HOPPER)
    run_folder(tmp_path / "b", WALKER, script="dreamer")
    out = ["--out", str(tmp_path / "out")]
    plot.main([str(tmp_path), *out, "--reference", "v3_dmc_proprio"])
    text = capsys.readouterr().out
    assert "No aggregates: dreamer has no score on hopper_stand" in text
    assert {row["task"] for row in read_csv(tmp_path / "out" / "curves.csv")} == {
        "walker_walk", "hopper_stand"}  # fmt: skip
    plot.main([str(tmp_path), *out, "--tasks", "walker_walk"])
    assert "No aggregates" not in capsys.readouterr().out
    assert {row["method"] for row in read_csv(tmp_path / "out" / "aggregates.csv")} == {
        "dreamer_v3", "dreamer"}  # fmt: skip


def test_a_method_whose_first_episode_ends_after_the_last_of_another(tmp_path, capsys):
    run_folder(tmp_path / "early", WALKER, episodes=[(100, 1.0), (500, 2.0)])
    run_folder(tmp_path / "late", WALKER, script="dreamer", episodes=[(1000, 3.0)])
    run_folder(tmp_path / "other", HOPPER)
    plot.main([str(tmp_path), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| walker_walk | 500 | 2.0 (1) |  |" in text
    assert "dreamer is not scored on walker_walk" in text and "end at steps 1,000 to 1,000" in text
    with pytest.raises(RunError, match="no score at step 900"):
        plot.main([str(tmp_path), "--at", "900", "--out", str(tmp_path / "out")])


# --- errors -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "run")


def refuse(*argv):
    with pytest.raises(RunError) as error:
        plot.main([str(word) for word in argv])
    return str(error.value)


def test_no_runs(tmp_path):
    assert "no runs given" in refuse()
    assert f"no runs found in {tmp_path}" in refuse(tmp_path)
    assert "nothing does not exist" in refuse("mine=nothing")


def test_a_run_that_has_not_begun(tmp_path, run):
    (run / "metrics.jsonl").unlink()
    assert f"{run}: no finished training episode" in refuse(run)
    folder = run_folder(tmp_path / "early", episodes=())
    assert f"{folder}: no finished training episode" in refuse(folder)


def test_a_run_under_way_is_left_out_with_a_note(tmp_path, run):
    run_folder(tmp_path / "more" / "early", seed=1, episodes=())
    message = refuse(tmp_path / "more")
    assert message.startswith(f"no runs found in {tmp_path / 'more'}: Left out: ")
    run.rename(tmp_path / "more" / "run")
    plot.main([str(tmp_path / "more"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"Left out: {tmp_path / 'more' / 'early'}: no finished training episode so far." in text


def test_links_are_followed_once(tmp_path, run):
    run_folder(tmp_path / "far" / "seed1", seed=1)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name, target in {"a": run, "b": tmp_path / "far", "c": run, "round": linked}.items():
        (linked / name).symlink_to(target)
    assert sorted(key(run)[2] for run in runs_of(linked)) == ["0", "1"]


def test_returns_that_are_not_finite(tmp_path, run):
    folder = run_folder(tmp_path / "nan", episodes=[(10, 1.0), (20, None), (30, 2.0)])
    wrong = "1 of 3 returns are not finite numbers"
    assert f"{folder}: {wrong}" in refuse(folder)
    table = collect.collect(folder, tmp_path / "out")
    assert table.read_text().splitlines()[2] == "20,nan,0,2.0"
    assert wrong in refuse(table)
    xs, ys = [1, 2, 3], [1.0, float("inf"), 2.0]
    assert wrong in refuse(score_file(tmp_path / "x.json", [("t", "m", 0, xs, ys)]))


@pytest.mark.parametrize("field", ["action_repeat", "lr"])
def test_runs_that_do_not_go_together(tmp_path, run, field):
    other = run_folder(tmp_path / "other", seed=1, **{field: 4})
    message = refuse(run, other)
    assert f"runs of dreamer_v3 on walker_walk do not go together: {field} " in message
    assert "and 4" in message and str(other) in message and "NAME=PATH" in message
    assert join([*runs_of(f"a={run}"), *runs_of(f"b={other}")])["method"].nunique() == 2


def test_arguments_that_may_differ(tmp_path, run):
    more = {"steps": 9, "device": "cuda", "log_every": 3, "run": "elsewhere"}
    other = run_folder(tmp_path / "other", seed=1, **more)
    assert join([*runs_of(run), *runs_of(other)])["run"].nunique() == 2
    for script in (dreamer, dreamer_v3, pilco):
        assert set(may_change(script.Args)) <= set(collect.MAY_DIFFER)


def test_action_repeats_are_noted(tmp_path):
    for repeat in (1, 2):
        run_folder(tmp_path / f"repeat{repeat}", WALKER, action_repeat=repeat)
    named = [f"{name}={tmp_path / name}" for name in ("repeat1", "repeat2")]
    plot.main([*named, "--out", str(tmp_path / "out")])
    note = "walker_walk: the action repeat is 1 in repeat1, 2 in repeat2; steps include it."
    assert note in (tmp_path / "out" / "table.md").read_text()


def test_a_seed_twice(tmp_path, run):
    other = run_folder(tmp_path / "other")
    message = refuse(run, other)
    assert "seed 0 twice" in message and str(run) in message and str(other) in message


def test_references(tmp_path, run):
    message = refuse(run, "--reference", "v9")
    assert "no reference v9" in message and "v1_dmc_vision, v3_atari100k" in message
    message = refuse(run, "--reference", "v3_atari100k")
    assert "no curve for walker_walk" in message and "atari_pong" in message
    broken = tmp_path / "broken.json"
    broken.write_text('{"curves": {"walker_walk": {"1": [1, 2]}}}')
    assert f"{broken} is not laid out as" in refuse(run, "--reference", broken)
    for points in ("{}", '{"1": [1, null, 2, 5]}'):
        broken.write_text(f'{{"notes": "", "curves": {{"walker_walk": {points}}}}}')
        assert "walker_walk has no points, or one that is not finite" in refuse(
            run, "--reference", broken)  # fmt: skip


def test_a_reference_in_any_order(tmp_path):
    path, points = tmp_path / "paper.json", {"300": [3, 3, 3, 5], "100": [1, 1, 1, 5]}
    path.write_text(json.dumps({"notes": "", "curves": {"t": points}}))
    curves, _ = read_references([str(path)], ["t"])
    assert curves[["step", "return"]].to_numpy().tolist() == [[100, 1], [300, 3]]


def test_a_reference_that_has_some_of_the_tasks(tmp_path, run):
    quadruped = run_folder(tmp_path / "other", "dm_control/quadruped-run-v0")
    plot.main([str(run), str(quadruped), "--reference", "v3_dmc_proprio", "--out",
               str(tmp_path / "out")])  # fmt: skip
    text = (tmp_path / "out" / "table.md").read_text()
    assert "v3_dmc_proprio (published) has nothing at these steps for quadruped_run" in text


def test_files_of_another_kind(tmp_path, run):
    table = tmp_path / "x.csv"
    table.write_text("step,return\n1,2\n")
    assert f"{table} is not a CSV file of tools/collect.py" in refuse(table)
    scores = tmp_path / "x.json"
    scores.write_text("[]")
    assert f"no runs found in {scores}" in refuse(scores)
    for text in ("{", '{"a": 1}', '[{"task": "t"}]'):
        scores.write_text(text)
        assert f'{scores} is not a list of {{"task"' in refuse(scores)
    (tmp_path / "web").mkdir()
    for text in ("{", "3"):
        (tmp_path / "web" / "manifest.json").write_text(text)
        assert "manifest.json is not a manifest of tools/collect.py" in refuse(tmp_path / "web")
    for text in ('{"a": [1, 0]}', '{"a": 3}', "[1]"):
        scores.write_text(text)
        assert f"{scores} is not a JSON file {{task: [low, high]}}" in refuse(
            run, "--normalize", scores)  # fmt: skip


def test_invalid_flags(run):
    for confidence in ("1.5", "0", "1"):
        assert "--interval must be above 0" in refuse(run, "--interval", confidence)
    assert "--bin" in refuse(run, "--bin", "-1")
    assert "no run of hopper_hop: there are runs of walker_walk" in refuse(
        run, "--tasks", "hopper_hop")  # fmt: skip
    out = run.parent / "out"
    assert "no score at step 5,000" in refuse(run, "--at", "5000", "--out", out)
    assert not out.exists()
    assert f"--out {run / 'args.json'} cannot be made" in refuse(run, "--out", run / "args.json")


def test_an_error_is_one_line(tmp_path):
    command = [sys.executable, "-m", "tools.plot", str(tmp_path)]
    found = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(f"error: no runs found in {tmp_path}")
    assert "Traceback" not in found.stderr


# --- tools/collect.py -------------------------------------------------------------------------


def test_a_collected_run(tmp_path):
    run = run_folder(tmp_path / "run", seed=4, episodes=[(10, 1.23456), (20, -2.5)])
    with (run / "metrics.jsonl").open("a") as file:
        row = {"step": 24, "eval/return": 5.55555, "eval/return_std": 0.25, "time/wall": 120.4}
        file.write("\n" + json.dumps(row) + "\n")
    path = collect.collect(run, tmp_path / "out")
    assert path == tmp_path / "out" / "dreamer_v3" / "dm_control-walker-walk-v0.csv"
    assert path.read_text() == ("step,return,seed,seconds\n10,1.235,4,1.0\n20,-2.500,4,2.0\n")
    manifest = json.loads((path.parent / "manifest.json").read_text())
    file = manifest["dm_control-walker-walk-v0.csv"]
    assert (file["script"], file["tag"]) == ("dreamer_v3", "")
    entry = file["seeds"]["4"]
    origin = {"command": "python x.py", "commit": "abc", "versions": "v", "hardware": "h"}
    assert entry["origin"] == [origin]
    assert (entry["env_id"], entry["action_repeat"]) == (WALKER, 2)
    assert (entry["steps"], entry["wall_clock_seconds"], entry["updates"]) == (24, 120, 7)
    assert entry["evaluations"] == [{"step": 24, "return": 5.556, "std": 0.25}]
    assert "training episodes" in entry["returns"] and "sampling" in entry["evaluated"]
    assert entry["args"]["lr"] == 0.1 and "run" not in entry["args"]


def test_a_seed_is_replaced_and_the_others_stay(tmp_path):
    for seed in (10, 2, 3):
        run = run_folder(tmp_path / f"old{seed}", seed=seed, episodes=[(10, seed), (20, seed)])
        path = collect.collect(run, tmp_path / "out")
    kept = [line for line in path.read_text().splitlines() if line.split(",")[2] in ("2", "10")]
    entries = json.loads((path.parent / "manifest.json").read_text())[path.name]["seeds"]
    new, before = run_folder(tmp_path / "new", seed=3, episodes=[(5, 0.5)]), path.read_text()
    with pytest.raises(RunError, match=r"csv already has seed 3 .commit abc.: --replace it, "):
        collect.collect(new, tmp_path / "out")
    assert path.read_text() == before
    collect.collect(new, tmp_path / "out", replace=True)
    lines = path.read_text().splitlines()
    assert lines == ["step,return,seed,seconds", *kept[:2], "5,0.500,3,0.5", *kept[2:]]
    assert kept[0] == "10,2.000,2,1.0" and kept[2] == "10,10.000,10,1.0"
    after = json.loads((path.parent / "manifest.json").read_text())[path.name]["seeds"]
    assert list(after) == ["2", "3", "10"]
    assert {seed: after[seed] for seed in ("2", "10")} == {s: entries[s] for s in ("2", "10")}
    assert (entries["3"]["steps"], after["3"]["steps"]) == (20, 5)


def test_a_run_with_other_arguments_needs_a_tag(tmp_path):
    first = run_folder(tmp_path / "first", seed=0, steps=100)
    path = collect.collect(first, tmp_path / "out")
    before = path.read_text(), path.with_name("manifest.json").read_text()
    for seed in (0, 1):
        other = run_folder(tmp_path / f"other{seed}", seed=seed, steps=200, lr=0.5)
        with pytest.raises(RunError, match=r"has seed 0 with other.*: lr 0.1 and 0.5. .*--tag"):
            collect.collect(other, tmp_path / "out")
    assert before == (path.read_text(), path.with_name("manifest.json").read_text())
    assert collect.collect(other, tmp_path / "out", "fast") != path
    longer = run_folder(tmp_path / "longer", seed=0, steps=300)
    assert collect.collect(longer, tmp_path / "out", replace=True) == path


def test_the_columns_of_pilco(tmp_path):
    run = run_folder(tmp_path / "run", "PILCO/CartPole-v0", script="pilco", episodes=())
    # fmt: off
    rows = [{"step": 40, "episode/return": -39.5, "trial": 0, "episode/cost": 0.98765,
             "episode/final_cost": 1.0, "time/wall": 0.1},
            {"step": 80, "episode/return": -7, "trial": 1, "episode/cost": 0.2, "time/wall": 30,
             "episode/final_cost": 0.01, "search/cost": 0.5, "search/evaluations": 150}]
    # fmt: on
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = collect.collect(run, tmp_path / "out")
    assert path.read_text().splitlines() == [
        "step,return,seed,seconds,trial,cost,final_cost,search_cost,search_evaluations",
        "40,-39.500,0,0.1,0,0.9877,1,,",
        "80,-7.000,0,30.0,1,0.2,0.01,0.5,150",
    ]
    seeds = success.read(path)
    assert seeds["0"][1]["final_cost"] == "0.01"
    assert success.first_solved(seeds["0"])["trial"] == "1"
    two = {**seeds, "1": seeds["0"][:1]}
    assert success.solved_share(two) == [0, 50]
    solved = success.table_row("cart-pole", two, dt=0.1)
    assert solved == "| cart-pole | 1 of 2 [9-91 %] | 1 - | 8 | 30 |"


def test_success_rates_have_wilson_intervals():
    """The bounds solve |rate - p| = 1.96 sqrt(p (1 - p) / n) for p."""
    assert success.rate(9, 10) == "9 of 10 [60-98 %]"
    for bound in (0.59585, 0.98212):
        assert abs(0.9 - bound) == pytest.approx(1.96 * (bound * (1 - bound) / 10) ** 0.5, rel=1e-3)


def test_scores_of_a_long_run(tmp_path):
    """10,000 steps at 50,000 and at the end; the end of the window counts, its beginning not."""
    episodes = [(40_000, 1.0), (40_001, 2.0), (50_000, 4.0), (50_001, 8.0), (72_000, 16.0)]
    run = run_folder(tmp_path / "run", "dm_control/walker-walk-v0", 3, episodes=episodes)
    collect.collect(run, tmp_path / "out", "tag")
    lines = score_lines.all_scores(tmp_path / "out")
    assert [(x["step"], x["return"]) for x in lines if "training" in x["kind"]] == [
        (50_000, "3.0"),
        (72_000, "16.0"),
    ]
    assert {x["task"] for x in lines} == {"walker_walk"} and {x["seed"] for x in lines} == {"3"}
    assert all(x["recipe"].endswith("tag") and x["commit"] == "abc" for x in lines)
    manifest = json.loads((tmp_path / "out/dreamer_v3/manifest.json").read_text())
    ((name, file),) = manifest.items()
    for text, kept in ((40 * "a" + " with changes", "aaaaaaa with changes"), ("x/y e3f0224",) * 2):
        file["seeds"]["3"]["origin"][-1]["commit"] = text
        ((_, run),) = read_file(tmp_path / "out/dreamer_v3" / name, "")
        lines = score_lines.scores_of_run("x", file, run)
        assert {line["commit"] for line in lines} == {kept}
    assert score_lines.scored_steps(5_000) == [(5_000, 1_000)]


def test_the_committed_scores_are_those_of_the_committed_curves():
    with (REPO / "results" / "scores.csv").open(newline="") as file:
        committed = list(csv.DictReader(file))
    expected = score_lines.all_scores(REPO / "results")
    assert [{k: str(v) for k, v in line.items()} for line in expected] == committed


def test_collect_from_the_command_line(tmp_path):
    runs = [run_folder(tmp_path / str(seed), "Pendulum-v1", seed) for seed in (0, 1)]
    command = [sys.executable, "-m", "tools.collect", *map(str, runs), "--tag", "small", "--into",
               str(tmp_path / "out")]  # fmt: skip
    options = {"cwd": REPO, "capture_output": True, "text": True, "timeout": 120}
    found = subprocess.run(command, **options)
    assert found.returncode == 0, found.stderr
    rows = read_csv(tmp_path / "out" / "dreamer_v3" / "Pendulum-v1-small.csv")
    assert [(row["seed"], row["return"]) for row in rows] == [("0", "1.000"), ("1", "1.000")]


def test_what_cannot_be_collected(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        collect.collect(tmp_path, tmp_path)
    early = run_folder(tmp_path / "early", episodes=())
    with pytest.raises(RunError, match="no finished training episode"):
        collect.collect(early, tmp_path)
    with pytest.raises(RunError, match="no run folder given"):
        collect.main(())
