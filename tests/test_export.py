"""tools/export.py: a few files that load, play and are never trained or written to."""

from pathlib import Path

import pytest
import torch

import dreamer
import dreamer_v3
import pilco
from common.checkpoint import RunError
from common.envs import example_rows
from tools import export

SCRIPTS = {
    dreamer_v3: "--num-envs 1 --steps 60",
    dreamer: "--prefill 100 --num-envs 1 --steps 210",
    pilco: "--horizon 5 --trials 1",
}


def first_action(agent) -> torch.Tensor:
    torch.manual_seed(0)
    return agent.act(example_rows(agent.spec).apply(torch.ones_like))["action"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
def test_an_exported_agent_plays_and_is_left_alone(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "debug", "--no-tensorboard", *SCRIPTS[script].split()]
    script.main([*flags, "--run", "run"])
    export.main(Path("run"), Path("agents/one"))
    out = tmp_path / "agents" / "one"
    saved = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(saved) == {"args.json", "checkpoint.pt"}
    parts = torch.load(out / "checkpoint.pt", weights_only=True)["agent"]
    assert not [name for name in parts if "optimizer" in name or "slow" in name]

    run, agent = script.load("run"), script.load(out)
    torch.testing.assert_close(first_action(agent), first_action(run), rtol=0, atol=2e-3)
    assert agent.step == run.step
    capsys.readouterr()
    script.main(["--eval", "agents/one", "--eval-episodes", "1"])
    elsewhere = tmp_path / "runs" / "-".join(out.parts[-3:])
    assert f"{out} is an exported agent: what is drawn goes to {elsewhere}\n" in (
        capsys.readouterr().out
    )
    with pytest.raises(RunError, match="agents/one is an exported agent, which only plays"):
        script.main([*flags, "--run", "agents/one"])
    with pytest.raises(RunError, match="agents/one exists: remove it"):
        export.main(Path("run"), Path("agents/one"))
    with pytest.raises(RunError, match="agents/one is an exported agent, which only plays"):
        script.main([*flags, "--run", "agents/one", "--fresh"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == saved


def test_only_what_training_needs_may_be_missing(tmp_path, monkeypatch):
    """A checkpoint without an actor is not exported; it is damaged."""
    monkeypatch.chdir(tmp_path)
    dreamer_v3.main(["--preset", "debug", "--num-envs", "1", "--steps", "60", "--run", "run"])
    export.main(Path("run"), Path("one"))
    state = torch.load("one/checkpoint.pt", weights_only=True)
    for name in ("actor", "slow_value", "exported"):
        broken = {**state, "agent": dict(state["agent"])}
        (broken if name == "exported" else broken["agent"]).pop(name, None)
        torch.save(broken, "one/checkpoint.pt")
        if name == "slow_value":
            dreamer_v3.load("one")
        else:
            with pytest.raises(RunError, match="does not fit this code: KeyError"):
                dreamer_v3.load("one")
