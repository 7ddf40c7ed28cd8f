"""What a script does with an agent, whatever its algorithm: play, film, show its dreams, time it.

An agent has `args`, `spec`, `env`, `autocast()`, `act(rows, state)`, `row(rows, state)`,
`unpack(batch)`, `update(batch)`, `filter(batch)` and `decode(states)`; the scripts explain them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from tensordict import TensorDict
from torch.profiler import profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from common import checkpoint
from common.checkpoint import RunError
from common.envs import example_rows, make_envs
from common.logger import Logger, dream_plot, dream_video
from common.replay import Replay

FRAMES, ROWS, LONGEST = 1000, 129, 30_000  # filmed, dreamed, played of an episode, at most


def evaluate(agent, episodes: int, seed: int, side: int = 256):
    """Play whole episodes: returns; of the first one frames and 129 rows [1, L] for dreams.

    The frames are `side` pixels wide and high; 0 for none.
    """
    envs, returns, frames, first = make_envs(agent.args, 1, seed, frames=side), [], [], []
    action = state = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for episode in range(episodes):
            rows, total, length = envs.step(action), 0.0, 0
            while True:
                action, state = agent.act(rows, state)
                total += rows["reward"].item()
                if episode == 0 and len(first) < ROWS:
                    first.append(agent.row(rows, state))
                if episode == 0 and side and envs.can_render and len(frames) < FRAMES:  # 200 MB
                    frames.append(envs.frame())
                length += 1
                if rows["is_last"].item() or length == LONGEST:
                    break
                rows = envs.step(action)
            returns.append(total)
    envs.close()
    return returns, frames, torch.stack(first, 1)


def score(agent, logger: Logger, name: str, fps: int = 30) -> tuple[dict, TensorDict]:
    """Play and film, print where it lies; returns the scores and rows of the first episode."""
    args = agent.args
    returns, frames, rows = evaluate(agent, args.eval_episodes, args.seed + 1_000_000)
    mean, std = float(np.mean(returns)), float(np.std(returns))
    print(f"return {mean:.1f} +- {std:.1f} over {len(returns)} episodes")
    print("returns", *(f"{x:.1f}" for x in returns))
    if frames:
        print(f"video of the first episode: {logger.video(name, np.stack(frames), fps)}")
    else:
        print(f"no video: {args.env_id} has no pictures to give")
    return {"eval/return": mean, "eval/return_std": std}, rows


def finish(agent, logger: Logger, name: str) -> dict:
    """Play, film, dream, and print where it all lies; returns the scores."""
    scores, rows = score(agent, logger, name)
    if rows.shape[1] > 8:
        print(f"dreams: {draw_dreams(agent, logger, rows, f'{name}_dream')}")
    return scores


def show(agent, run: str, episodes: int) -> None:
    """--eval: play that many episodes of a finished or interrupted run, and film the first."""
    agent.args = dataclasses.replace(agent.args, eval_episodes=episodes)
    finish(agent, Logger(run, 0, tensorboard=False), "eval")


def draw_dreams(agent, logger: Logger, batch: TensorDict, name: str):
    """Open-loop predictions of up to six windows: videos of images, a plot of the first's rest."""
    context = max(1, (batch.shape[1] - 1) // 4)
    dream, curves = open_loop(agent, batch[:6], context), {}
    for key, truth in sorted(dream["true"].items(), key=lambda item: item[0] != "reward"):
        if truth.dtype == torch.uint8:
            logger.video(f"{name}_{key}", dream_video(truth, dream[key], context), fps=10)
        elif truth.ndim == 2:
            curves[key] = truth[0], dream[key][0]
        else:
            pairs = zip(truth[0].unbind(-1), dream[key][0].unbind(-1), strict=True)
            curves |= {f"{key} {i}": pair for i, pair in enumerate(pairs)}
    return logger.picture(name, dream_plot(curves, context))


@torch.no_grad()
def open_loop(agent, batch: TensorDict, context: int) -> TensorDict:
    """Filter `context` rows of batch[B, T + 1], then predict the others from the actions alone.

    [B, T]: observations and `reward` as the model has them, and the truth under "true".
    """
    with torch.random.fork_rng(), agent.autocast():
        torch.manual_seed(0)
        td = agent.filter(batch)
        states = list(td[:, :context].select("deter", "stoch").unbind(1))
        for action in td["previous", "action"][:, context:].unbind(1):
            states.append(agent.env.transition(states[-1], action))
        out = agent.decode(torch.stack(states, 1))
    keys = [*agent.spec["shapes"], "reward"]
    return out.select(*keys).set("true", td.select(*keys)).cpu()


def posteriors(agent, run, windows: int = 16) -> Callable[[int], TensorDict]:
    """draw(seed) -> latents [K] of rows of the replay, in some windows, but for episodes' last."""
    example = agent.row(example_rows(agent.spec), agent.initial(1))[0]
    state, folder = checkpoint.load(run)["replay"], Path(run, "replay")
    if not folder.is_dir():
        raise RunError(f"{folder} is gone: put it back")
    layout = state["layout"]
    rows, slack = layout["capacity"] * layout["num_envs"], layout["physical"] - layout["capacity"]
    options = dict(directory=folder, slack=slack, online=False)
    replay = Replay(example, rows, layout["num_envs"], layout["length"], **options)
    replay.load_state_dict(state)
    if not len(replay):
        raise RunError(f"{run} has only {replay.rows} rows, no window of {replay.length} so far")

    def draw(seed: int) -> TensorDict:
        replay.generator.manual_seed(seed)
        with agent.autocast():
            td = agent.filter(replay.sample(windows))
        return td.select("deter", "stoch")[~td["is_last"]].detach()

    return draw


def benchmark(make_agent, args, device: torch.device, phases: tuple[str, ...], updates: float):
    """Print milliseconds per update by phase, steps per second, memory, and the run's time.

    make_agent(spec, args, device) builds the agent; `phases` are the names that its `update` gives
    to record_function, `updates` the number of updates per row of experience.
    """
    envs = make_envs(args, args.num_envs, args.seed, args.env_workers)
    action, state, rows = None, None, []
    agent = make_agent(envs.spec, dataclasses.replace(args, compile=False), device)
    seconds = {"environment": [], "policy": [], "update": []}
    for _ in range(args.batch_length + 101):
        start = time.perf_counter()
        row = envs.step(action)
        middle = time.perf_counter()
        action, state = agent.act(row, state)
        seconds["environment"].append(middle - start)
        seconds["policy"].append(time.perf_counter() - middle)
        rows.append(agent.row(row, state))
    envs.close()
    window = torch.stack(rows[-args.batch_length - 1 :], 1)
    batch = window[torch.arange(args.batch_size) % args.num_envs]
    with FlopCounterMode(display=False) as flops:  # blind to compiled functions
        agent.update(agent.unpack(batch))
    if args.compile:
        del agent  # its memory first
        agent = make_agent(envs.spec, args, device)
    for _ in range(13):
        start = time.perf_counter()
        agent.update(agent.unpack(batch))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds["update"].append(time.perf_counter() - start)
    first = seconds["update"][0]
    environment, policy, update = (statistics.median(values[3:]) for values in seconds.values())
    rate = args.num_envs * args.action_repeat / environment
    print(f"{rate:10.0f} /s      environment steps, {args.num_envs} environments at a time")
    print(f"{args.num_envs / policy:10.0f} /s      policy steps")
    print(f"{1e3 * update:10.1f} ms      update (median of 10; the first took {first:.1f} s)")
    with profile() as profiler:
        getattr(agent.update, "module", agent.update)(agent.unpack(batch))  # a graph has no phases
    for event in profiler.key_averages():
        if event.key in phases:
            phase = (event.device_time_total or event.cpu_time_total) / 1e3
            print(f"{phase:10.1f} ms      {event.key}, while profiled")
    with agent.autocast():
        dtype = (torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)).dtype
    work, rate = flops.get_total_flops() / 1e9, product_rate(device, dtype)
    share = f"{1e3 * work / rate:.1f} ms, {work / rate / update:.0%} of its time"
    print(f"{work:10.1f} GFLOP   products and convolutions of an update: {share}")
    print(f"{'':18}at the {rate:,.0f} GFLOP/s of a 1,024 x 1,024 {str(dtype)[6:]} product")
    per_row = (environment + policy) / args.num_envs + updates * update
    hours = args.steps / args.action_repeat * per_row / 3600
    print(f"{hours:10.2f} h       {args.steps:,} environment steps, {updates:.3g} updates per row,")
    print(f"{'':18}without evaluations")
    print(f"{psutil.Process().memory_info().rss / 1e9:10.2f} GB      memory of the process")
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 1e9:10.2f} GB      memory of the GPU")


def product_rate(device: torch.device, dtype=torch.float32, n: int = 1024) -> float:
    """GFLOP/s of the device in an n x n matrix product, the median."""
    x = torch.rand(n, n, device=device, dtype=dtype)
    timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange().median / 1e9
