"""Export a trained agent: a folder of a few MB that `load` and --eval accept, to share or commit.

    python -m tools.export runs/dreamer_v3/Pendulum-v1/seed0 results/agents/pendulum

It holds args.json and checkpoint.pt with the weights as float16, but neither optimizer nor replay,
so it cannot be trained further. Of pilco.py it holds all data, as float64: the policy needs them.
"""

import json
from pathlib import Path

import torch
import tyro

from common import checkpoint
from common.checkpoint import RunError
from common.run import launch, only_trains, saved_args


def halved(value):
    """The same, with every float32 tensor as float16."""
    if isinstance(value, dict):
        return {key: halved(x) for key, x in value.items()}
    single = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.half() if single else value


def main(
    run: tyro.conf.Positional[Path],  # folder of a run
    out: tyro.conf.Positional[Path],  # folder to write, which must not exist
):
    state = checkpoint.load(run)
    if out.exists():
        raise RunError(f"{out} exists: remove it, or choose another folder")
    agent = {key: x for key, x in state["agent"].items() if not only_trains(key)}
    args = saved_args(run) | {"exported": True}
    out.mkdir(parents=True)
    (out / "args.json").write_text(json.dumps(args, indent=2) + "\n")
    checkpoint.save(out, agent=halved(agent), step=state["step"], exported=True)
    size = (out / "checkpoint.pt").stat().st_size / 1e6
    print(f"{size:.1f} MB: python {args['script']}.py --eval {out}")


if __name__ == "__main__":
    launch(lambda: tyro.cli(main, prog="python -m tools.export", description=__doc__))
