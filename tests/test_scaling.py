"""tools.scaling: what it measures, on a tiny agent and a tiny ring."""

import os
from types import SimpleNamespace

import pytest
import torch

import dreamer_v3
from common.checkpoint import RunError
from tools import scaling

FLAGS = ["--preset", "debug", "--compile", "no", "--device", "cpu", "--threads", "1"]


def test_an_update():
    args = dreamer_v3.parse_args(FLAGS)
    params, seconds, peak = scaling.measure_update("vector", args, 1)
    agent, _ = scaling.make_agent("vector", args)
    assert params == sum(p.numel() for x in agent.modules.values() for p in x.parameters())
    assert 0 < seconds < 60 and scaling.memory("RssAnon") < peak < 30


@pytest.mark.parametrize("kind, observed", [("vector", 24 * 4), ("pixels", 12_288)])
def test_a_replay(tmp_path, kind, observed):
    args = dreamer_v3.parse_args(FLAGS)
    inputs = kind, args, 3000, tmp_path
    values = scaling.measure_replay(*inputs) + scaling.measure_reopened(*inputs)
    values = dict(zip(scaling.REPLAY, values, strict=True))
    latents = 2 * (2 * args.deter + args.stoch * args.classes)  # two slots; float16 and bytes
    row_bytes = observed + latents + 4 * 6 + 4 + 3  # 6 actions, a reward, three flags
    assert values["files, GB"] == pytest.approx(3000 * row_bytes / 1e9)
    assert all(value > 0 for name, value in values.items() if "read" not in name), values
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert values["checkpoint, MB"] == (tmp_path / "checkpoint.pt").stat().st_size / 1e6
    assert len(state["current"]) == 3000 and state["total"] == 1500 + 1000 + 50  # of each of two
    assert (state["finished"][:, 2] == scaling.EPISODE).all() and len(state["finished"]) == 2 * 14
    actions = torch.from_file(str(tmp_path / "replay" / "action"), size=3000 * 6)
    assert actions[2 * 1050 * 6 :].unique().numel() > 5000  # noise where nothing was appended


def test_a_table_says_what_was_not_run(capsys):
    lines = [("a", (divmod, 17, 5)), ("b", (os._exit, 1))]
    scaling.print_table("size", {"x": ".1f", "y": ","}, lines)
    _, head, rule, a, b = capsys.readouterr().out.splitlines()
    assert (head, rule, a) == ("| size | x | y |", "|---|---|---|", "| a | 3.0 | 2 |")
    assert b.startswith("| b | not run: A process in the process pool was terminated")


def test_what_cannot_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "disk_usage", lambda folder: SimpleNamespace(free=2e9))
    with pytest.raises(RunError, match="needs 12415.0 GB of disk, 2.0 are free"):
        scaling.open_replay("pixels", dreamer_v3.parse_args(FLAGS), 10**9, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="--rows at least 10000"):
        scaling.main(rows=(100,))
