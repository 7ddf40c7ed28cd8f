"""What can be known about a GPU without one: updates never wait for it; tools/gpu_check.sh."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

import common.run
import dreamer
import dreamer_v3
from common.replay import with_previous

REPO = Path(__file__).resolve().parents[1]
SMALL = dict(deter=16, hidden=8, stoch=4, depth=2, units=8, imagination_horizon=3)
SPECS = [
    dict(shapes={"place": (3,)}, categories={}, action_dim=2, classes=()),
    dict(
        shapes={"eye": (64, 64, 3), "door": (2,)}, categories={"door": [2, 2]},
        action_dim=4, classes=(2, 2),
    ),
]  # fmt: skip


def make_batch(spec):
    """Rows [3, 5] of zeros."""
    td = TensorDict(reward=torch.zeros(3, 6), batch_size=[3, 6])
    for key, shape in spec["shapes"].items():
        kind = torch.uint8 if len(shape) == 3 else torch.int32 if key == "door" else torch.float32
        td[key] = torch.zeros(3, 6, *shape, dtype=kind)
    for key in ("is_first", "is_last", "is_terminal"):
        td[key] = torch.zeros(3, 6, dtype=torch.bool)
    td["action"] = torch.zeros(3, 6, spec["action_dim"])
    td["belief"], td["state"] = torch.zeros(3, 6, 16), torch.zeros(3, 6, 16)
    return with_previous(td)


@pytest.mark.parametrize("spec", SPECS, ids=["vector", "image"])
@pytest.mark.parametrize("script", [dreamer, dreamer_v3], ids=lambda x: x.__name__)
def test_an_update_reads_no_value_and_stays_on_its_device(script, spec, monkeypatch):
    """So a CUDA graph can record it. Tensors on "meta" have no values: to read one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    adam, supported = sys.modules[torch.optim.Adam.__module__], "_get_capturable_supported_devices"
    monkeypatch.setattr(adam, supported, lambda *a, **k: ["meta"])
    args = script.Args(**SMALL, **(dict(pcont=True) if script is dreamer else {}))
    agent = script.Agent(spec, args, "meta")
    for optimizer in getattr(agent, "optimizers", {}).values():
        optimizer.param_groups[0]["capturable"] = True  # as on CUDA
    for _ in range(2):
        metrics = agent.update(make_batch(spec).to("meta"))
    metrics = metrics if script is dreamer else metrics[0]
    assert {x.device.type for x in metrics.values()} == {"meta"} and len(metrics) > 10


def test_the_gpu_of_a_run_is_the_current_device(monkeypatch):
    """Else `--device cuda:1 --compile yes` would record an empty graph on cuda:0."""
    chosen = []
    monkeypatch.setattr(common.run, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda:1", "cpu"):
        common.run.prepare("dreamer", dreamer.Args(device=device, threads=1))
    assert chosen == [torch.device("cuda:1")]


# --- tools/gpu_check.sh -------------------------------------------------------------------------

PYTHON = """#!/bin/sh
case "$*" in
"- "*metrics.jsonl) exec {python} "$@" ;;
"- "*) printf '%s\\n' $KIND "2 cores" "commit 1a2b" "torch 2" ;;
*$BREAK*) echo "error: broken | here"; exit 3 ;;
*pytest*) echo "20 passed in 3.1s" ;;
*"yes --precision"*) echo "   $APART         largest difference of a loss" ;;
*--run*) mkdir -p $5; cp metrics.jsonl $5 ;;
esac
case "$*" in *benchmark*) echo "     185.4 ms      update (median of 10)" ;; esac
"""
METRICS = """{"step": 200, "episode/return": -900, "updates": 0, "time/wall": 1}
{"step": 400, "episode/return": -700, "updates": 10, "time/wall": 2}
{"step": 600, "episode/return": -200, "updates": 60, "time/wall": 6.5}
{"step": 600, "eval/return": -150.2, "time/wall": 9}
"""


def gpu_check(folder: Path, kind="cuda", broken="nothing", apart="1.0e-03"):
    """(exit status, table) of a copy of the script, with a Python that only prints."""
    if not shutil.which("timeout"):
        pytest.skip("needs timeout (Linux)")
    (folder / "tools").mkdir()
    shutil.copy(REPO / "tools" / "gpu_check.sh", folder / "tools")
    (folder / "python").write_text(PYTHON.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    (folder / "metrics.jsonl").write_text(METRICS)
    more = dict(PYTHON=str(folder / "python"), KIND=kind, BREAK=broken, APART=apart)
    command = [folder / "tools" / "gpu_check.sh", folder / "table.md"]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, (folder / "table.md").read_text()


def test_gpu_check_on_a_gpu(tmp_path):
    status, table = gpu_check(tmp_path)
    rows = table.splitlines()[4:]
    assert status == 0 and len(rows) == 9 and "not run" not in table and "FAILED" not in table
    assert "cuda; 2 cores; commit 1a2b; torch 2" in table
    assert all(re.fullmatch(r"\| `python -?[^|]+` \| \d+ \| [^|]+ \|", row) for row in rows)
    assert "20 passed" in rows[0] and "185.4 ms update" in rows[2]
    assert "first 5 -600, last 5 -600<br>evaluation: -150<br>60 updates, 11.1 /s" in rows[5]


def test_gpu_check_without_a_gpu(tmp_path):
    status, table = gpu_check(tmp_path, kind="cpu")
    assert status == 0 and table.count("| | not run: no GPU |") == 4
    assert table.count("--device cpu --preset dmc_proprio") == 5


def test_gpu_check_goes_on_after_a_failure(tmp_path):
    status, table = gpu_check(tmp_path, broken="--compile no")
    assert status == 1 and table.count("185.4 ms") == 3 and len(table.splitlines()) == 13
    assert table.count("FAILED (status 3, limit 60 s): error: broken \\| here<br>") == 2


@pytest.mark.parametrize("apart", ["5.1e-03", "nan"])
def test_gpu_check_compares_losses(tmp_path, apart):
    status, table = gpu_check(tmp_path, apart=apart)
    assert status == 1 and table.count("FAILED") == 1 and f"FAILED: {apart} " in table
