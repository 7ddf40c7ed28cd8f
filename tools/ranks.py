"""Train one agent on several devices: a process on each, with gradients averaged over all.

    torchrun --nproc-per-node 2 -m -- tools.ranks dreamer_v3.py --preset dmc_vision --run runs/pair

torchrun starts N processes (ranks). Each has its share of the environments and of the replay,
updates a copy of the agent with its share of the batch, and averages its gradients with the others.
Together they take the step that one process would take with the whole batch. Rank 0 logs and
evaluates. The script stays as it is: this file replaces the functions of common/run.py that only
matter on several devices, and the methods of Run in which the ranks must agree.
"""

import atexit
import dataclasses
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
from common.run import Run, args_dict, launch, mark_save, open_folder, run_folder
from tools import import_script

DIVIDED_FLAGS = ("num_envs", "batch_size", "steps", "replay_size", "save_every")
PER_RANK = ("replay", "envs", "latent", "returns", "rng")  # checkpoint entries that differ by rank


def world_size() -> int:
    """The number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this rank, from 0."""
    return int(os.environ.get("RANK", 0))


def connect(device: str = ""):
    """Join the other ranks, each on its own GPU unless `device` is cpu. Only rank 0 keeps printing.

    RunError if this machine has fewer GPUs than ranks.
    """
    if world_size() > 1 and not dist.is_initialized():
        on_gpu, gpu = torch.cuda.is_available() and device != "cpu", int(os.environ["LOCAL_RANK"])
        if on_gpu and gpu >= (gpus := torch.cuda.device_count()):
            text = f"--nproc-per-node is more than the {gpus} GPUs here"
            raise RunError(f"{text}: start fewer processes, or use --device cpu")
        if on_gpu:
            torch.cuda.set_device(gpu)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends


def rank_args(args):
    """`args` for this rank's environments and replay: DIVIDED_FLAGS shared out, its own seed.

    RunError if the number of ranks does not divide the environments and the batch.
    """
    for name in ("num_envs", "batch_size"):
        if getattr(args, name) % world_size():
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise RunError(f"{flag} must be a multiple of {world_size()}, the number of ranks")
    shares = {name: -(-getattr(args, name) // world_size()) for name in DIVIDED_FLAGS}
    return dataclasses.replace(args, seed=rank_seed(args.seed), **shares)


def rank_seed(seed: int) -> int:
    """This rank's seed for environments, replay and noise."""
    return seed + 10_000_000 * rank()


# --- communication ------------------------------------------------------------------------------


def mean_over_ranks_(tensors: list[Tensor]):
    """Replace each tensor by its mean over all ranks, with one all-reduce."""
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    averages = (flat / world_size()).split([x.numel() for x in tensors])
    for x, average in zip(tensors, averages, strict=True):
        x.copy_(average.view_as(x))


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of x over all ranks. Its gradient is this rank's; all are averaged later."""
    average = x.detach().clone()
    mean_over_ranks_([average])
    return x + (average - x.detach())


def gather_ranks(x: Tensor) -> Tensor:
    """x (N, ...) of all ranks, concatenated, without gradient."""
    gathered = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(gathered, x.detach().contiguous())
    return torch.cat(gathered)


def means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics (0-dim tensors), averaged over all ranks."""
    values = torch.stack([value.float() for value in metrics.values()])
    mean_over_ranks_([values])
    return dict(zip(metrics, values, strict=True))


def agree(number, op=dist.ReduceOp.MIN) -> int:
    """The smallest `number`, an int or bool, of all ranks; the largest if `op` is MAX."""
    value = torch.tensor(int(number))
    dist.all_reduce(value, op)
    return int(value)


# --- the run ------------------------------------------------------------------------------------


class SilentLogger(Logger):
    """Writes and prints nothing: rank 0 does."""

    def __init__(self, folder, *_):
        super().__init__(folder, tensorboard=False)

    def log(self, step, **_):
        self.sums, self.counts = {}, {}

    def load_state_dict(self, state):
        """Nothing to restore: the file is rank 0's."""


class RanksRun(Run):
    """A Run whose ranks stop together, owe the same updates and save at the same step."""

    def __init__(self, script, args, agent, **options):
        rank_args(args)  # raises its errors before --fresh deletes a run
        super().__init__(script, args, agent, **options)
        agent.update = getattr(agent.update, "module", agent.update)  # without its CUDA graph
        for part in agent.stateful.values():  # all start from the networks of rank 0
            for x in part.state_dict().values() if isinstance(part, nn.Module) else ():
                dist.broadcast(x, 0)
        torch.manual_seed(rank_seed(args.seed))

    def open(self):
        """Rank 0 opens the folder; then the others read its checkpoint and their own files."""
        if rank() == 0:
            # args.json has the number of ranks, so only that many can resume the run
            requested = {"script": self.script, **args_dict(self.args), "ranks": world_size()}
            opened = open_folder(self.script, self.args, requested)
            dist.barrier()
            return opened
        dist.barrier()
        folder = run_folder(self.script, self.args)
        if not (folder / "checkpoint.pt").exists():
            return folder, None
        saved = checkpoint.load(folder, self.script)
        return folder, saved | checkpoint.load(folder, self.script, rank_file(saved))

    def stopping(self):
        return agree(self.stop.requested, dist.ReduceOp.MAX) > 0

    def owe(self, updates):
        super().owe(agree(updates))  # 0 while any rank's replay has no window

    def ended(self, rows):
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, super().ended(rows))
        return [value for returns in gathered for value in returns]

    def add(self, metrics):
        super().add(means(metrics))

    def save(self):
        """All ranks save. Rank 0 writes its file last, which makes the others' valid."""
        state = self.state()
        name = rank_file(state)
        if rank():
            checkpoint.save(self.folder, name, **{key: state[key] for key in PER_RANK})
        dist.barrier()
        if rank() == 0:
            checkpoint.save(self.folder, **state)
            mark_save(self.folder, self.saves)
        dist.barrier()
        for path in self.folder.glob(f"rank{rank()}-*"):  # also a killed rank's .tmp
            if path.name != name:
                path.unlink()

    def interval_passed(self, name):
        return super().interval_passed(name) and (rank() == 0 or name == "save")

    def finish(self):
        return super().finish() if rank() == 0 else None

    def __exit__(self, kind, error, trace):
        self.latent = None if error else self.latent  # no save, which would wait for all ranks
        super().__exit__(kind, error, trace)


def rank_file(counters: dict) -> str:
    """The name of this rank's file for the checkpoint with these counters."""
    return f"rank{rank()}-{counters['step']}-{counters['updates']}.pt"


def make_rank_replay(args, example, folder: Path, **options):
    """The replay of this rank; each rank except 0 has a subfolder for it."""
    folder = folder / f"rank{rank()}" if rank() else folder
    return make_replay(rank_args(args), example, folder, **options)


def patch(script):
    """Replace in a script's module what differs on several devices."""
    functions = mean_over_ranks, mean_over_ranks_, gather_ranks
    patches = {f.__name__: f for f in functions} | {"Run": RanksRun}
    patches |= dict(make_envs=lambda args: make_envs(rank_args(args)), make_replay=make_rank_replay)
    for name in patches.keys() & vars(script).keys():
        setattr(script, name, patches[name])
    if rank():
        common.run.Logger = SilentLogger


def main(argv: list[str] | None = None):
    path, *flags = argv or sys.argv[1:] or [""]
    script = import_script(path)
    args = script.parse_args(flags)
    if args.eval or args.benchmark:
        raise RunError("--eval and --benchmark run in one process, without torchrun")
    if not hasattr(args, "num_envs"):
        raise RunError(f"{path} trains in one process: start it without torchrun")
    sys.argv = [path, *flags]  # the command that args.json records
    if world_size() > 1:
        connect(args.device)
        patch(script)
    script.main(flags)


if __name__ == "__main__":
    launch(main)
