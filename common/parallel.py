"""One training on several devices: torchrun --nproc-per-node N -- dreamer_v3.py ...

torchrun starts N processes (ranks) of a script. Each has its own environments and its shard of the
replay, updates a copy of the agent with its share of the batch, and averages the gradients with the
others, so that together they take the step of one process with the whole batch. Rank 0 logs and
evaluates. Without torchrun there is one rank, and nothing here does anything.
"""

import atexit
import dataclasses
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import checkpoint
from common.checkpoint import EnvError, RunError

DIVIDED = ("num_envs", "batch_size", "steps", "replay_size", "save_every")
OWN = ("replay", "envs", "state", "score", "rng")  # parts of a checkpoint that differ between ranks


def size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", 0))


def start(device: str = ""):
    """Find the other ranks, each with a GPU unless `device` is cpu. Only rank 0 prints from now on.

    RunError if there are fewer GPUs than ranks on this machine.
    """
    if size() > 1 and not dist.is_initialized():
        cuda, local = torch.cuda.is_available() and device != "cpu", int(os.environ["LOCAL_RANK"])
        if cuda and local >= (gpus := torch.cuda.device_count()):
            raise RunError(f"--nproc-per-node is more than the {gpus} GPUs here; or --device cpu")
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def wait():
    """Until all ranks are here."""
    if size() > 1:
        dist.barrier()


def share(args):
    """The flags of a process that has this rank's part of environments, batch and replay.

    RunError if the ranks do not divide the environments or the batch.
    """
    for name in ("num_envs", "batch_size"):
        if getattr(args, name) % size():
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise RunError(f"{flag} must be a multiple of {size()}, the number of ranks")
    parts = {k: -(-getattr(args, k) // size()) for k in DIVIDED}
    return dataclasses.replace(args, seed=own_seed(args.seed), **parts)


def own_seed(seed: int) -> int:
    """A seed for what differs between ranks: environments, replay, noise."""
    return seed + 10_000_000 * rank()


def own_folder(folder: Path) -> Path:
    """Where this rank's replay lies."""
    return folder / f"rank{rank()}" if rank() else folder


def align(agent, seed: int):
    """Give the agent the networks of rank 0, and this rank its own random numbers."""
    if size() > 1:
        for part in agent.saved.values():
            for x in part.state_dict().values() if isinstance(part, nn.Module) else ():
                dist.broadcast(x, 0)
        torch.manual_seed(own_seed(seed))


# --- numbers of all ranks -----------------------------------------------------------------------


def mean_(tensors: list[Tensor]):
    """Replace each tensor by its mean over all ranks, in one message."""
    if size() > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        parts = (flat / size()).split([x.numel() for x in tensors])
        for x, part in zip(tensors, parts, strict=True):
            x.copy_(part.view_as(x))


def mean(x: Tensor) -> Tensor:
    """The mean of x over all ranks; its gradient is that of x alone, for `mean_` to average."""
    if size() == 1:
        return x
    total = x.detach().clone()
    mean_([total])
    return x + (total - x.detach())


def means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics (0-dim tensors), averaged over all ranks."""
    if size() == 1:
        return metrics
    values = torch.stack([value.float() for value in metrics.values()])
    mean_([values])
    return dict(zip(metrics, values, strict=True))


def gather(x: Tensor) -> Tensor:
    """x (N, ...) of all ranks, one after the other, without gradient."""
    if size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def any_rank(flag) -> bool:
    """Whether the flag is true on any rank."""
    if size() == 1:
        return bool(flag)
    total = torch.tensor(float(bool(flag)))
    dist.all_reduce(total)
    return total.item() > 0


def collect(values: list) -> list:
    """The lists of all ranks, of any length, as one."""
    if size() == 1:
        return values
    lists = [None] * size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def log_returns(logger, step: int, score: Tensor, rows, updates: int, crashes: int) -> Tensor:
    """Returns so far (N) of the episodes under way; logs those that end in `rows`, of all ranks."""
    score = score * ~rows["is_first"] + rows["reward"]
    for value in collect(score[rows["is_last"]].tolist()):
        counts = {"updates": updates, "crashes": sum(collect([crashes]))}
        logger.write(step, **{"episode/return": value}, **counts)
        logger.advance(step, **{"return": value})
    return score


# --- the run folder -----------------------------------------------------------------------------


def open_run(script, args, may_change=(), decided=None) -> tuple[Path, dict | None]:
    """checkpoint.open_run for all ranks; RunError if another number of them saved the run."""
    share(args)  # what it refuses must not cost a run that --fresh would delete
    if rank() == 0:
        folder, saved = checkpoint.open_run(script, args, may_change, decided, ranks=size())
        wait()
        return folder, saved
    wait()
    folder = checkpoint.run_folder(script, args)
    settled = json.loads((folder / "args.json").read_text())
    for field in decided or {}:
        setattr(args, field, settled[field])
    if not (folder / "checkpoint.pt").exists():
        return folder, None
    saved = checkpoint.load(folder, script)
    return folder, saved | checkpoint.load(folder, script, own_name(saved))


def own_name(counters: dict) -> str:
    """File of this rank that goes with the checkpoint of these counters."""
    return f"rank{rank()}-{counters['step']}-{counters['updates']}.pt"


def save(folder: Path, **parts):
    """checkpoint.save by all ranks at once. The file of rank 0, written last, makes all valid."""
    if rank():
        own = {name: parts[name] for name in OWN}
        checkpoint.save(folder, own_name(parts), **own)
    wait()
    if rank() == 0:
        checkpoint.save(folder, **parts, ranks=size())
    wait()
    if rank():
        for path in folder.glob(f"rank{rank()}-*"):  # a killed one leaves a .tmp
            if path.name != own_name(parts):
                path.unlink()


@contextmanager
def rescue(save):
    """Call save() before an EnvError ends the run, where it is the only process."""
    try:
        yield
    except EnvError:
        if size() == 1:  # ranks that did not fail cannot save with this one
            save()
        raise
