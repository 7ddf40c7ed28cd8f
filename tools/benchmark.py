"""How long a run would take on this machine: what the scripts print for --benchmark."""

import dataclasses
import os
import statistics
import time
from collections import defaultdict

import psutil
import torch
from torch.profiler import profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from common.envs import make_envs
from common.replay import with_previous
from common.run import autocast

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints when it starts and stops


def benchmark(make_agent, args, device: torch.device, updates_per_row: float):
    """Print steps per second, time per update and per operation, the run's hours, and memory.

    make_agent(spec, args, device) builds the agent. If it compiles, also print its losses beside
    those of an agent that does not.
    """
    seconds = {"environment": [], "policy": []}
    envs, rows, latent = make_envs(args), [], None
    eager = dataclasses.replace(args, compile="no")
    agent = make_agent(envs.spec, eager, device)
    for _ in range(args.batch_length + 101):
        start = now(device)
        row = envs.step(None if latent is None else latent["action"])
        middle = now(device)
        latent = agent.act(row, latent)
        seconds["environment"].append(middle - start)
        seconds["policy"].append(now(device) - middle)
        rows.append(agent.stored_rows(row, latent))
    envs.close()
    window = with_previous(torch.stack(rows[-args.batch_length - 1 :], 1))
    batch = window[torch.arange(args.batch_size) % args.num_envs].to(device)
    with FlopCounterMode(display=False) as flops:  # cannot count in compiled functions
        agent.update(batch)
    del agent  # frees its memory
    if args.compile == "yes":  # last: it compiles functions for the whole process
        eager_losses = first_updates(make_agent, envs.spec, eager, device, batch, 6)[-1]
    updates = first_updates(make_agent, envs.spec, args, device, batch, 13)
    agent, seconds["update"], losses = updates
    environment, policy, update = (statistics.median(values[3:]) for values in seconds.values())
    first = seconds["update"][0]
    print(f"{args.num_envs * args.action_repeat / environment:10.0f} /s      environment steps")
    print(f"{args.num_envs / policy:10.0f} /s      policy steps")
    print(f"{1e3 * update:10.1f} ms      update (median of 10; the first took {first:.1f} s)")
    if args.compile == "yes":
        print_losses(losses[:6], eager_losses)
    print_operations(agent, batch, device)
    with autocast(agent):
        dtype = (torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)).dtype
    gflop, rate = flops.get_total_flops() / 1e9, matmul_rate(device, dtype)
    share = f"{1e3 * gflop / rate:.1f} ms, {gflop / rate / update:.0%} of its time"
    print(f"{gflop:10.1f} GFLOP   products and convolutions of an update: {share}")
    print(f"{'':18}at the {rate:,.0f} GFLOP/s of a 1,024 x 1,024 {str(dtype)[6:]} product")
    per_row = (environment + policy) / args.num_envs + updates_per_row * update
    hours = args.steps / args.action_repeat * per_row / 3600
    print(f"{psutil.Process().memory_info().rss / 1e9:10.2f} GB      memory of the process")
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 1e9:10.2f} GB      memory of the GPU")
    print(f"{hours:10.2f} h       {args.steps:,} environment steps without evaluations,")
    print(f"{'':18}{updates_per_row:.3g} updates per row")


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def first_updates(make_agent, spec: dict, args, device: torch.device, batch, count: int):
    """A new agent, seconds [count] and losses [count, K] of its first updates, all on `batch`.

    The same seed gives the same weights and random numbers.
    """
    torch.manual_seed(args.seed)
    agent, seconds, losses = make_agent(spec, args, device), [], []
    for _ in range(count):
        start = now(device)
        metrics = agent.update(batch)
        seconds.append(now(device) - start)
        metrics = metrics if isinstance(metrics, dict) else metrics[0]
        losses.append(torch.stack([x for k, x in metrics.items() if k.startswith("train/loss")]))
    return agent, seconds, torch.stack(losses)


def print_losses(compiled: torch.Tensor, eager: torch.Tensor):
    """Print how far the losses [count, K] of compiled updates are from eager ones."""
    apart = ((compiled - eager).abs() / eager.abs().clamp(min=1)).max()
    print(f"{apart:10.1e}         largest difference of a loss from eager, relative if above 1")
    for name, losses in (("compiled", compiled), ("eager", eager)):
        print(f"{'':18}{name} sums:", *(f"{x:.6g}" for x in losses.sum(1)))


def print_operations(agent, batch, device: torch.device, count: int = 8):
    """Print the operations in which an update spends most of its time, from torch's profiler."""
    with profile() as profiler:
        agent.update(batch)
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = defaultdict(float)
    for event in profiler.key_averages():
        times[event.key] += getattr(event, column) / 1e3
    for name, time_ms in sorted(times.items(), key=lambda item: -item[1])[:count]:
        print(f"{time_ms:10.1f} ms      {name}, while profiled")


def matmul_rate(device: torch.device, dtype=torch.float32, n: int = 1024) -> float:
    """Median GFLOP/s of the device in a product of n x n matrices."""
    x = torch.rand(n, n, device=device, dtype=dtype)
    timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange().median / 1e9


def benchmark_policy(make_agent, args, repeats: int = 10):
    """Print the median milliseconds for a policy's expected cost and its gradient.

    4 states, 1 action, 40 steps, one policy with 10 centers: as other PILCO code was measured.
    make_agent(spec, args) builds the agent of pilco.py.
    """
    import resource  # not on Windows

    spec = dict(shapes={"observation": [4]}, categories={}, action_dim=1, classes=[])
    for points in (100, 300):
        agent, seconds = make_agent(spec, args), []
        x, weights = torch.randn(points, 5).double(), torch.randn(5, 4).double()
        y = 0.1 * torch.sin(x @ weights) + 0.002 * torch.randn(points, 4)
        log_hyper = (torch.rand(4, 5) + 1.5).log(), torch.full((4,), -1.6), torch.full((4,), -5.3)
        agent.world_model.hyper = tuple(value.double() for value in log_hyper)
        agent.world_model.factorize(x, y)
        agent.first_states = [torch.zeros(4).double()]
        agent.draw_controller()
        for _ in range(repeats):
            start = time.perf_counter()
            agent.objective(agent.controller.theta.data)
            seconds.append(time.perf_counter() - start)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        median = 1e3 * sorted(seconds)[repeats // 2]
        print(f"{median:10.1f} ms      {points} points, {memory:.2f} GB at peak")
