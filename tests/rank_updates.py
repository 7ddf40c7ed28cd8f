"""A script for test_ranks.py: updates on this rank's share of fixed batches, with fixed noise.

    torchrun --nproc-per-node 2 -m -- tools.ranks tests/rank_updates.py dreamer OUT

Every rank takes its rows of the same batches and writes rank<k>.pt into the folder OUT.
"""

import importlib

import torch
from tensordict import TensorDict
from torch.nn import functional as F

from common.replay import with_previous
from tools import ranks

ROWS, LENGTH, UPDATES = 4, 6, 4
# The first KL is 2.09 nats on one half and 2.40 on the other, below and above the free nats. The
# gradients exceed the clip, so a rank that clips before averaging takes another step.
FLAGS = {
    "dreamer": "--deter 12 --hidden 10 --stoch 5 --units 9 --free-nats 2.2 --pcont --clip 0.5",
    "dreamer_v3": "--deter 16 --hidden 8 --stoch 4 --classes 5 --units 8 --warmup 0 --lr 1e-2",
}


def flags_of(script: str) -> list[str]:
    return f"--preset debug --imagination-horizon 4 --batch-length {LENGTH} {FLAGS[script]}".split()


def make_agent(script: str):
    module = importlib.import_module(script)
    torch.manual_seed(7)
    spec = dict(shapes={"observation": [3]}, categories={}, action_dim=2, classes=[])
    return module.Agent(spec, module.parse_args(flags_of(script)))


def make_batch(agent, seed: int) -> tuple[TensorDict, dict]:
    """A replay batch [B, T] in which an episode ends midway, and the noise of an update."""
    generator = torch.Generator().manual_seed(seed)
    size, args = (ROWS, LENGTH + 1), agent.args
    draw = lambda *shape: torch.randn(*size, *shape, generator=generator)  # noqa: E731
    rows = TensorDict(observation=draw(3), reward=3 * draw(), action=draw(2), batch_size=size)
    for name in ("is_first", "is_last", "is_terminal"):
        rows[name] = torch.zeros(size).bool()
    rows["is_first"][:, 0] = rows["is_last"][1, 3] = rows["is_terminal"][1, 3] = True
    rows["is_first"][1, 4] = True
    noise = agent.actor_loss.draw_noise(ROWS * (LENGTH - getattr(args, "pcont", 0)))
    for leaf in noise.values():
        leaf.copy_(torch.rand(leaf.shape, generator=generator) + 0.1)
    shape = (ROWS, LENGTH, args.stoch, *([args.classes] if hasattr(args, "classes") else []))
    posterior = torch.rand(shape, generator=generator) + 0.1
    if hasattr(args, "classes"):
        state = torch.randint(args.classes, (*size, args.stoch), generator=generator)
        rows["state"] = F.one_hot(state, args.classes).flatten(-2).byte()
        rows["belief"] = draw(args.deter).half()
    return with_previous(rows), dict(posterior=posterior, dream=noise)


def updates(agent, rank: int = 0, size: int = 1) -> list[dict]:
    """Parameters and metrics after each update on the rank's share of the batches."""
    states = []
    for seed in range(UPDATES):
        batch, noise = make_batch(agent, seed)
        batch = batch.chunk(size)[rank]
        noise = {name: value.chunk(size)[rank] for name, value in noise.items()}
        out = agent.update(batch, noise)
        metrics = out[0] if isinstance(out, tuple) else out
        metrics = ranks.means(metrics) if size > 1 else metrics  # as RanksRun.add does
        params = [p.detach().clone() for m in agent.modules.values() for p in m.parameters()]
        states.append(dict(params=params, metrics={k: float(v) for k, v in metrics.items()}))
    return states


def parse_args(argv: list[str]):
    """The flags of the script that is updated; its run folder is in OUT."""
    script, out = argv
    args = importlib.import_module(script).parse_args(flags_of(script))
    args.device, args.run = "cpu", f"{out}/run"
    return args


def main(argv: list[str]):
    torch.set_num_threads(1)
    (script, out), args = argv, parse_args(argv)
    module = importlib.import_module(script)
    ranks.patch(module)
    agent = make_agent(script)
    if ranks.rank():  # RanksRun must replace these by rank 0's
        for network in agent.modules.values():
            for p in network.parameters():
                p.data.add_(1.0)
    module.Run(script, args, agent)
    states = updates(agent, ranks.rank(), ranks.world_size())
    torch.save(states, f"{out}/rank{ranks.rank()}.pt")
