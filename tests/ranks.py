"""What the processes of test_parallel.py do: updates on a share of fixed batches, with fixed noise.

Every rank takes its rows of the same batches.
"""

import importlib

import torch
from tensordict import TensorDict

from common import parallel

ROWS, LENGTH, UPDATES = 4, 6, 4
# The first KL is 2.09 and 2.40 nats on the two halves: below and above the free nats. The clip is
# reached: gradients are averaged before it.
FLAGS = {
    "dreamer": "--deter 12 --hidden 10 --stoch 5 --units 9 --free-nats 2.2 --pcont --clip 0.5",
    "dreamer_v3": "--deter 16 --hidden 8 --stoch 4 --classes 5 --units 8 --warmup 0 --lr 1e-2",
}


def make_agent(script: str):
    module = importlib.import_module(script)
    flags = f"--preset debug --imagination-horizon 4 --batch-length {LENGTH} {FLAGS[script]}"
    torch.manual_seed(7)
    spec = dict(shapes={"observation": [3]}, action_dim=2, classes=[])
    return module.Agent(spec, module.parse_args(flags.split()))


def make_batch(agent, seed: int) -> tuple[TensorDict, dict]:
    """Rows [B, T + 1] of a replay and the noise of an update, with an end in the middle."""
    generator = torch.Generator().manual_seed(seed)
    size, args = (ROWS, LENGTH + 1), agent.args
    draw = lambda *shape: torch.randn(*size, *shape, generator=generator)  # noqa: E731
    batch = TensorDict(observation=draw(3), reward=3 * draw(), action=draw(2), batch_size=size)
    for name in ("is_first", "is_last", "is_terminal"):
        batch[name] = torch.zeros(size).bool()
    batch["is_first"][:, 0] = batch["is_last"][1, 3] = batch["is_terminal"][1, 3] = True
    batch["is_first"][1, 4] = True
    noise = agent.actor_loss.draw_noise(ROWS * (LENGTH - getattr(args, "pcont", 0)))
    for leaf in noise.values():
        leaf.copy_(torch.rand(leaf.shape, generator=generator) + 0.1)
    shape = (ROWS, LENGTH, args.stoch, *([args.classes] if hasattr(args, "classes") else []))
    posterior = torch.rand(shape, generator=generator) + 0.1
    if hasattr(args, "classes"):
        stoch = torch.randint(args.classes, (*size, args.stoch), generator=generator)
        batch["stoch"], batch["deter"] = stoch.byte(), draw(args.deter).half()
    return batch, dict(posterior=posterior, dream=noise)


def updates(agent, rank: int = 0, ranks: int = 1) -> list[dict]:
    """State after each update on rank's share of the batches."""
    states = []
    for seed in range(UPDATES):
        batch, noise = make_batch(agent, seed)
        batch = batch.chunk(ranks)[rank]
        noise = {name: value.chunk(ranks)[rank] for name, value in noise.items()}
        out = agent.update(agent.unpack(batch), noise)
        metrics = out[0] if isinstance(out, tuple) else out
        params = [p.detach().clone() for m in agent.modules.values() for p in m.parameters()]
        states.append(dict(params=params, metrics={k: float(v) for k, v in metrics.items()}))
    return states


def main(script: str, out: str):
    torch.set_num_threads(1)
    parallel.start()
    agent = make_agent(script)
    if parallel.rank():  # to be replaced by those of rank 0
        for module in agent.modules.values():
            for p in module.parameters():
                p.data.add_(1.0)
    parallel.align(agent, 0)
    states = updates(agent, parallel.rank(), parallel.size())
    torch.save(states, f"{out}/rank{parallel.rank()}.pt")
