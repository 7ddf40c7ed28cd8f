"""README and docs: links lead somewhere, code runs, commands are accepted, metrics explained."""

import csv
import functools
import importlib
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import gymnasium
import numpy as np
import pytest
import tyro

import dreamer
import dreamer_v3
import pilco
from common.envs import make_envs
from tools import pictures
from tools.dreams import play

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), REPO / "results" / "README.md"]
NAMES = [str(page.relative_to(REPO)) for page in PAGES]
TEXTS = dict(zip(NAMES, (page.read_text() for page in PAGES), strict=True))
NOT_OURS = ("venv", "pip", "pytest")  # modules after `python -m`
RUN = "runs/dreamer_v3/Pendulum-v1/seed0"  # of the examples
FLAGS = {  # the smallest run of each script
    "dreamer_v3": "--preset debug --deter 8 --blocks 2 --units 4 --hidden 4 --stoch 2 --num-envs 1",
    "dreamer": "--preset debug --deter 8 --units 4 --hidden 4 --stoch 2 --prefill 100",
    "pilco": "--preset debug --trials 1 --horizon 5",
}


def run(script, folder: Path, flags: str = "") -> Path:
    """Train here; returns the run folder."""
    flags = f"{FLAGS[script.__name__]} --threads 1 --no-tensorboard {flags}"
    script.main([*flags.split(), "--run", str(folder)])
    return folder


# --- links --------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    """GitHub's anchors for the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(name: str) -> list[str]:
    text = prose(TEXTS[name])
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    bad = []
    for link in links(name):
        if "://" in link:  # only its form: tests do not use the internet
            good = re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w.~%/#?=&+-]*)?", link)
        else:
            path, _, anchor = link.partition("#")
            target = (REPO / name).parent / path if path else REPO / name
            good = target.exists() and (not anchor or anchor in anchors(target))
        bad += [] if good else [link]
    assert not bad


def test_every_page_can_be_reached_from_the_readme():
    found, todo = set(), ["README.md"]
    while todo:
        name = todo.pop()
        found.add(name)
        for link in links(name):
            path = ((REPO / name).parent / link.partition("#")[0]).resolve()
            if path in PAGES and str(path.relative_to(REPO)) not in found:
                todo.append(str(path.relative_to(REPO)))
    assert found == set(NAMES)


def test_the_readme_is_short_and_its_pictures_are_small():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 160
    paths = [link for link in links("README.md") if link.endswith((".png", ".svg", ".gif"))]
    assert sum((REPO / path).stat().st_size for path in paths) < 1e6
    first_screen = "\n".join(lines[:30])
    assert sum(path in first_screen for path in paths) >= 3


# --- commands -----------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Every command line that starts python or torchrun, in blocks and within sentences."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", inline)]
    lines = [part.strip() for line in lines for part in line.split("&&")]
    return [line for line in lines if re.match(r"(\S*/)?(python3?|torchrun) ", line)]


def accept(command: str):
    """Raise unless the program of a command line exists and takes these arguments."""
    program, *argv = shlex.split(command, comments=True)
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(argv)
        assert options.module and options.training_script == "tools.ranks"
        script, *flags = options.training_script_args
        return parse(script, flags)
    if argv[0] != "-m":
        beside = str((REPO / argv[0]).parent)  # where Python looks first
        with patch.object(sys, "path", [beside, *sys.path]):
            return parse(argv[0], argv[1:])
    if argv[1] in NOT_OURS:
        return None
    assert argv[1].startswith("tools."), f"{argv[1]} is not a program of this repository"
    return parse(argv[1].replace(".", "/") + ".py", argv[2:])


def parse(script: str, flags: list[str]):
    """Let the script's own parser read the flags."""
    assert (REPO / script).is_file(), f"there is no {script}"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "parse_args"):
        return module.parse_args(flags)
    if script == "tools/sweep.py":
        return module.plan(*tyro.cli(module.Args, args=flags, return_unknown_args=True))
    if hasattr(module, "Args"):
        return tyro.cli(module.Args, args=flags)
    if "tyro.cli(main" in inspect.getsource(module):  # its own parser, without running it
        return tyro.cli(functools.wraps(module.main)(lambda *a, **k: None), args=flags)
    return inspect.signature(module.main).bind(*flags)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory with the scripts, but without what the user has trained."""
    for script in FLAGS:
        (tmp_path / f"{script}.py").symlink_to(REPO / f"{script}.py")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_accepted(name, elsewhere):
    found, bad = commands(TEXTS[name]), []
    for command in found:
        try:
            accept(command)
        except (Exception, SystemExit) as error:
            if getattr(error, "code", 1) == 0:  # --help
                continue
            bad.append(f"{command}: {error!r}")
    assert found and not bad, "\n".join(bad)


def test_a_wrong_command_is_not_accepted(elsewhere):
    for command in (
        "python dreamer_v4.py", "python dreamer_v3.py --wrong 1", "python -m tools.nothing",
        "python -m tools.sweep dreamer.py --stepz 1", "python -m tools.plot runs --statistic best",
        "python -m tools.random_policy", "python -m tools.dream_ppo run --seed 1",
        "python -m tools.collect run --tagg x", "torchrun -m -- tools.ranks dreamer.py --wrong",
    ):  # fmt: skip
        with pytest.raises((Exception, SystemExit)):
            accept(command)


# --- code ---------------------------------------------------------------------------------------


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of dreamer_v3.py on the README's own environment, which its block registers."""
    folder = tmp_path_factory.mktemp("docs")
    _, block = python_blocks("README.md")
    (folder / "my_module.py").write_text(block)
    sys.path.insert(0, str(folder))
    try:
        with patch.dict(gymnasium.registry):  # test_learning has a Reach-v0 of its own
            yield run(dreamer_v3, folder / "run", "--env-id my_module:Reach-v0 --steps 120")
    finally:
        sys.path.remove(str(folder))


def test_python_blocks_run(trained):
    """All of them, in the order in which a reader meets them; every other page has none."""
    act, own_environment = python_blocks("README.md")
    dream, gym = python_blocks("docs/running.md")
    assert sum(len(python_blocks(name)) for name in NAMES) == 4
    act, gym = (block.replace(RUN, str(trained)) for block in (act, gym))
    assert len(act.strip().splitlines()) <= 10, "loading and playing takes a few lines"
    assert "class Reach" in own_environment, "the run was trained on it"
    names = {}
    exec(act, names)
    assert names["rows"]["is_last"].all() and names["total"] != 0
    *lines, reward_and_picture = dream.strip().splitlines()
    exec("\n".join(lines), names)
    reward, observation = eval(reward_and_picture, names)
    assert reward.shape == (1, 15) and observation.shape == (1, 15, 2)
    exec(gym, names)
    assert names["observations"].shape == (16, 2) and names["rewards"].shape == (16,)


# --- what the pages say about the code ----------------------------------------------------------


@pytest.mark.parametrize("script", [dreamer, dreamer_v3, pilco], ids=lambda x: x.__name__)
def test_equations_name_functions_that_exist(script):
    text = TEXTS[f"docs/{script.__name__}.md"]
    section = re.search(r"^## Equations\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    names = re.findall(r"`([A-Za-z_][\w.]*)`", re.sub(r"```.*?```", "", section, flags=re.DOTALL))
    assert len(names) >= 8
    for name in names:
        functools.reduce(getattr, name.split("."), script)  # AttributeError if missing


@pytest.mark.parametrize("script", [dreamer, dreamer_v3, pilco], ids=lambda x: x.__name__)
def test_flags_on_the_page_of_a_script_exist(script):
    inline = re.sub(r"```.*?```", "", TEXTS[f"docs/{script.__name__}.md"], flags=re.DOTALL)
    spans = [span for span in re.findall(r"`([^`]+)`", inline) if span.startswith("--")]
    flags = {span.split()[0][2:].replace("-", "_") for span in spans}
    assert flags and not {flag for flag in flags if not hasattr(script.Args(), flag)}


def glossary(script: str) -> set[str]:
    """The keys in the first column of the metrics table."""
    text = TEXTS[f"docs/{script}.md"]
    section = re.search(r"^## Metrics\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def logged(folder: Path) -> set[str]:
    return {key for line in (folder / "metrics.jsonl").open() for key in json.loads(line)}


def test_dreamer_v3_metrics_are_explained(trained):
    assert logged(trained) == glossary("dreamer_v3")


def test_dreamer_metrics_are_explained(tmp_path):
    flags = "--env-id CartPole-v1 --steps 240 --pcont --batch-length 4 --eval-every 120"
    assert logged(run(dreamer, tmp_path / "run", flags)) == glossary("dreamer")


def test_pilco_metrics_are_explained(tmp_path):
    assert logged(run(pilco, tmp_path / "run")) == glossary("pilco") - {"..."}


def test_readme_line_counts_and_scores_match_scripts_and_manifests():
    pattern = r"^\| \[(\w+)\.py\].* \| ([\d,]+) \| [^|]+ \| (-?[\d.]+)[^|]*\| [^|]+\|$"
    rows = re.findall(pattern, TEXTS["README.md"], re.M)
    tasks = {"dreamer_v3": "Pendulum-v1", "dreamer": "Pendulum-v1", "pilco": "PILCO-CartPole-v0"}
    assert [name for name, _, _ in rows] == list(tasks)
    for script, lines, score in rows:
        source = (REPO / f"{script}.py").read_text()
        assert int(lines.replace(",", "")) == source.count("\n"), script
        manifest = json.loads((REPO / "results" / script / "manifest.json").read_text())
        seeds = manifest[f"{tasks[script]}.csv"]["seeds"].values()
        returns = [seed["evaluations"][-1]["return"] for seed in seeds]
        assert len(returns) == {"dreamer_v3": 5, "dreamer": 3, "pilco": 10}[script]
        assert abs(float(score) - np.mean(returns)) <= (0.05 if "." in score else 0.5)


# --- pictures -----------------------------------------------------------------------------------


def test_dream_picture():
    flags = f"{FLAGS['dreamer_v3']} --env-id CartPole-v1 --obs pixels --image-size 16"
    args = dreamer_v3.parse_args(flags.split())
    agent = make_agent(dreamer_v3, args)
    figure = pictures.dream_picture(agent, seed=0, context=3, stride=2, margin=1, columns=4)
    real, dream = figure.axes[:4], figure.axes[4:]
    assert [axes.get_title() for axes in real] == ["seen", "seen", "+2", "+4"]
    frames = play(agent, 1, 8, 0)["pixels"][0, ::2, 1:-1, 1:-1].numpy()
    for above, below, frame in zip(real, dream, frames, strict=True):
        (truth,), (model,) = above.images, below.images
        assert (truth.get_array() == frame).all() and (model.get_array() != frame).any()
    colors = [axes.spines["top"].get_edgecolor() for axes in figure.axes]
    assert colors[:6] == colors[:1] * 6 and colors[0] not in colors[6:], "the last two are imagined"


def test_trial_picture():
    flags = "--horizon 8 --centers 4 --evaluations 2 --restarts 1 --fit-steps 5"
    args = pilco.parse_args(flags.split())
    agent = make_agent(pilco, args)
    for number in range(2):
        agent.add(*pilco.play(agent, number, random=True))
    agent.learn()
    prediction = agent.predict()["next"][0]
    agent.add(*pilco.play(agent, 2))
    states = agent.data["next", "observation"][-8:]
    film, angle, cost = pictures.trial_picture(agent, every=2).axes
    assert len(film.images) == 4
    for axes, predicted, real in (
        (angle, prediction["mean"][:, 3], states[:, 3]),
        (cost, prediction["cost"], agent.cost.at(states)),
    ):
        for line, values in zip(axes.lines, (predicted, real), strict=True):
            assert np.allclose(line.get_ydata(), values.detach().numpy())


def test_curves_picture():
    pendulum, cart_pole = pictures.curves_picture(REPO / "results").axes
    assert len(pendulum.lines) == 8 and len(cart_pole.lines) == 10
    with (REPO / "results" / "dreamer_v3" / "Pendulum-v1.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "0"]
    steps, returns = (np.array([float(row[key]) for row in rows]) for key in ("step", "return"))
    x, y = pendulum.lines[0].get_data()
    assert np.allclose(x, steps / 1000)
    assert np.isclose(y[0], returns[0]) and np.isclose(y[-1], returns[-5:].mean())


def make_agent(script, args):
    """An untrained agent."""
    envs = make_envs(args, num_envs=1)
    envs.close()
    return script.Agent(envs.spec, args)
