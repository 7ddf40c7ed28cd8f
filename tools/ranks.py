"""One training on several devices: a script started on each, that averages with the others.

    torchrun --nproc-per-node 2 -m -- tools.ranks dreamer_v3.py --preset dmc_vision --run runs/pair

torchrun starts N processes (ranks). Each has its own environments and its share of the replay,
updates a copy of the agent with its share of the batch, and averages the gradients with the others,
so that together they take the step of one process with the whole batch. Rank 0 logs and evaluates.
The script is not changed: this file replaces the functions of common/run.py that mean something on
several devices, and the methods of Run in which ranks have to agree.
"""

import atexit
import dataclasses
import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import common.run
from common import checkpoint
from common.checkpoint import RunError
from common.envs import make_envs
from common.logger import Logger
from common.replay import make_replay
from common.run import Run, args_dict, launch, open_folder, run_folder

DIVIDED = ("num_envs", "batch_size", "steps", "replay_size", "save_every")
PER_RANK = (
    "replay",
    "envs",
    "latent",
    "returns",
    "rng",
)  # parts of a checkpoint that ranks differ in


def size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", 0))


def connect(device: str = ""):
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


def share(args):
    """The flags of a process that has this rank's part of environments, batch and replay.

    RunError if the ranks do not divide the environments or the batch.
    """
    for name in ("num_envs", "batch_size"):
        if getattr(args, name) % size():
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise RunError(f"{flag} must be a multiple of {size()}, the number of ranks")
    parts = {name: -(-getattr(args, name) // size()) for name in DIVIDED}
    return dataclasses.replace(args, seed=own_seed(args.seed), **parts)


def own_seed(seed: int) -> int:
    """A seed for what differs between ranks: environments, replay, noise."""
    return seed + 10_000_000 * rank()


# --- numbers of all ranks -----------------------------------------------------------------------


def mean_(tensors: list[Tensor]):
    """Replace each tensor by its mean over all ranks, in one message."""
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    parts = (flat / size()).split([x.numel() for x in tensors])
    for x, part in zip(tensors, parts, strict=True):
        x.copy_(part.view_as(x))


def mean(x: Tensor) -> Tensor:
    """The mean of x over all ranks; its gradient is that of x alone, for `mean_` to average."""
    total = x.detach().clone()
    mean_([total])
    return x + (total - x.detach())


def gather(x: Tensor) -> Tensor:
    """x (N, ...) of all ranks, one after the other, without gradient."""
    parts = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics (0-dim tensors), averaged over all ranks."""
    values = torch.stack([value.float() for value in metrics.values()])
    mean_([values])
    return dict(zip(metrics, values, strict=True))


def agree(number, how=dist.ReduceOp.MIN) -> int:
    """The least of a whole number, or with another `how` the greatest, over all ranks."""
    value = torch.tensor(int(number))
    dist.all_reduce(value, how)
    return int(value)


# --- the run ------------------------------------------------------------------------------------


class SilentLogger(Logger):
    """Keeps everything to itself: rank 0 writes."""

    def __init__(self, folder, total, *_, **__):
        super().__init__(folder, total, tensorboard=False, quiet=True)

    def log(self, step, **extra):
        self.sums, self.counts = {}, {}

    def load_state_dict(self, state):
        """The file and its length are rank 0's."""


class RanksRun(Run):
    """A Run whose ranks stop together, owe the same updates and save at the same step."""

    def __init__(self, script, args, agent, **options):
        share(args)  # what it refuses must not cost a run that --fresh would delete
        super().__init__(script, args, agent, **options)
        agent.update = getattr(agent.update, "module", agent.update)  # not a CUDA graph
        for part in agent.stateful.values():  # the networks of rank 0
            for x in part.state_dict().values() if isinstance(part, nn.Module) else ():
                dist.broadcast(x, 0)
        torch.manual_seed(own_seed(args.seed))

    def open(self):
        """Rank 0 opens the folder, the others read what it holds."""
        if rank() == 0:
            # args.json names the number of ranks: another one cannot resume this run
            requested = {"script": self.script, **args_dict(self.args), "ranks": size()}
            opened = open_folder(self.script, self.args, requested)
            dist.barrier()
            return opened
        dist.barrier()
        folder = run_folder(self.script, self.args)
        if not (folder / "checkpoint.pt").exists():
            return folder, None
        saved = checkpoint.load(folder, self.script)
        return folder, saved | checkpoint.load(folder, self.script, file_name(saved))

    def stopping(self):
        return agree(self.stop.requested, dist.ReduceOp.MAX) > 0

    def owe(self, updates):
        super().owe(agree(updates))  # none where one rank has nothing to draw

    def ended(self, rows):
        lists = [None] * size()
        dist.all_gather_object(lists, super().ended(rows))
        return [value for part in lists for value in part]

    def add(self, metrics):
        super().add(means(metrics))

    def save(self):
        """All ranks at once. The file of rank 0, written last, makes all valid."""
        state = self.state()
        name = file_name(state)
        if rank():
            checkpoint.save(self.folder, name, **{key: state[key] for key in PER_RANK})
        dist.barrier()
        if rank() == 0:
            checkpoint.save(self.folder, **state)
        dist.barrier()
        for path in self.folder.glob(f"rank{rank()}-*"):  # a killed one leaves a .tmp
            if path.name != name:
                path.unlink()

    def interval_passed(self, name):
        return super().interval_passed(name) and (rank() == 0 or name == "save")

    def finish(self):
        return super().finish() if rank() == 0 else None

    def __exit__(self, kind, error, trace):
        self.latent = None if error else self.latent  # ranks that did not fail cannot save with it
        super().__exit__(kind, error, trace)


def file_name(counters: dict) -> str:
    """File of this rank that goes with the checkpoint of these counters."""
    return f"rank{rank()}-{counters['step']}-{counters['updates']}.pt"


def make_own_replay(args, example, folder: Path, **options):
    """The replay of this rank, in a folder of its own."""
    folder = folder / f"rank{rank()}" if rank() else folder
    return make_replay(share(args), example, folder, **options)


def several(script):
    """Replace, in a script's module, what is different on several devices."""
    replaced = dict(mean=mean, mean_=mean_, gather=gather, Run=RanksRun)
    replaced |= dict(make_envs=lambda args: make_envs(share(args)), make_replay=make_own_replay)
    for name in replaced.keys() & vars(script).keys():
        setattr(script, name, replaced[name])
    if rank():
        common.run.Logger = SilentLogger


def main(argv: list[str] | None = None):
    path, *flags = argv or sys.argv[1:] or [""]
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise RunError(f"there is no script {Path(path).resolve()}")
    sys.path.insert(0, str(Path(path).resolve().parent))
    script = importlib.import_module(Path(path).stem)
    args = script.parse_args(flags)
    if args.eval or args.benchmark:
        raise RunError("--eval and --benchmark run in one process: without torchrun")
    if not hasattr(args, "num_envs"):
        raise RunError(f"{path} trains in one process: start it without torchrun")
    sys.argv = [path, *flags]  # the command that args.json records
    if size() > 1:
        connect(args.device)
        several(script)
    script.main(flags)


if __name__ == "__main__":
    launch(main)
