"""A fork is one script and common/ in an empty folder: it trains, resumes, plays, films, plots."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
FLAGS = {  # besides --preset debug: (both runs, short run, longer run)
    "dreamer": ("--prefill 100 --num-envs 1", "--steps 210", "--steps 420"),
    "dreamer_v3": ("--num-envs 1", "--steps 60", "--steps 120"),
    "pilco": ("--horizon 5", "--trials 1", "--trials 2"),
}


@pytest.mark.parametrize("script", FLAGS)
def test_a_fork_needs_one_script_and_common(script, tmp_path):
    shutil.copy(REPO / f"{script}.py", tmp_path / "my_agent.py")
    shutil.copytree(REPO / "common", tmp_path / "common")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"SDL_VIDEODRIVER": "dummy"}

    def call(*flags):
        command = [sys.executable, "my_agent.py", *flags]
        options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
        process = subprocess.run(command, timeout=300, **options)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    always, short, long = FLAGS[script]
    argv = ["--preset", "debug", "--no-tensorboard", *always.split()]
    assert "starts" in call(*argv, *short.split())
    (run,) = tmp_path.glob("runs/my_agent/*/seed0")
    first = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert "resumes at step" in call(*argv, *long.split())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert rows[: len(first) - 1] == first[:-1]  # all except the evaluation at the end
    assert rows[-1]["step"] > first[-1]["step"] and "eval/return_std" in rows[-1]
    text = call("--eval", str(run), "--eval-episodes", "1")
    assert "return " in text and "eval.mp4" in text
    for name in ("policy.mp4", "eval.mp4"):
        assert (run / name).stat().st_size > 1000
    with Image.open(run / "learning_curve.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 10
