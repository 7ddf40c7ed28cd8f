"""DreamerV3 (Hafner et al., 2023, 2025): learn a world model, improve the policy inside it.

    python dreamer_v3.py              # Pendulum-v1, 10,000 steps: -130 to -340 (random: -1,233)
    python dreamer_v3.py --preset dmc_proprio --env-id dm_control/walker-walk-v0
    python dreamer_v3.py --preset debug                          # everything tiny
    python dreamer_v3.py --eval runs/dreamer_v3/Pendulum-v1/seed0    # play, film, dream
    python dreamer_v3.py --preset dmc_proprio --benchmark        # how long would it take here?

The same command again resumes the run; --fresh starts over. A run folder holds args.json,
metrics.jsonl, checkpoint.pt, replay/, tensorboard/, learning_curve.png, dream pictures and videos.

The algorithm is the authors' current code (danijar/dreamerv3 at e3f0224), which differs from the
paper's text in places: a beta2 of 0.999, symlog errors without 1/2, max-pooled convolutions, no
uniform mixture in the discrete actor. Deviations from that code, all deliberate:
- Stored latents are compact: deter in half precision, stoch as class indices.
- Updates follow a step of all environments, not of each, and the policy is never stale.
- A time limit in Atari is not a terminal state; frames shrink by area, not bilinearly, and an
  episode starts with 1-30 no-ops, not 0-30 (gymnasium's AtariPreprocessing).
- Without a GPU, MuJoCo is drawn without shadows and anti-aliasing (--render-quality).
- Latents are written back at once, and batches are not fetched ahead.
- By default everything is float32 on a CPU; on CUDA, matrix products are bfloat16 (autocast), the
  recurrent state float32.

Shapes: B batch, T time, H horizon, N any batch (environments, B, or B * T dreams), A action,
D deter, S latents of C classes, F = D + S * C features, E tokens. Batch first, time second,
everywhere. Equations are numbered as in arXiv 2301.04104v2.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.distributions import Normal
from torch.profiler import record_function

from common import checkpoint, parallel
from common.checkpoint import Every, Ratio, RunError, Stop
from common.envs import example_rows, make_envs, usual_quality
from common.evaluation import benchmark, draw_dreams, finish, posteriors, show
from common.imagination import ModelBasedEnvBase
from common.logger import Logger, check_finite, plot_curve
from common.replay import make_replay

BINS = 255  # of the two-hot reward and value
DEPTH_MULTIPLIERS = (2, 3, 4, 4)  # channels of the convolution stages, in units of args.depth
PHASES = ("world model", "dreams and actor", "critic", "backward", "optimiser")  # of an update
MAY_CHANGE = ("steps", "log_every", "dream_every", "eval_episodes", "tensorboard", "device")
MAY_CHANGE += ("threads", "compile", "env_workers")


@dataclass
class Args:
    """Flags. What no preset sets is the authors' for DM Control proprio, but steps and num_envs."""

    preset: Literal["default", "dmc_proprio", "dmc_vision", "atari100k", "crafter", "debug"] = (
        "default"  # all that a benchmark fixes; other flags override it
    )
    size: Literal["", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = (
        ""  # number of parameters; empty: 1m, or the preset's
    )
    env_id: str = "dm_control/walker-walk-v0"  # any gymnasium id, also my_module:MyEnv-v0
    steps: int = 100_000  # environment steps, with action repeat and reset rows
    seed: int = 0  # of networks, noise, replay and environments

    # the run

    run: str = ""  # folder; empty: runs/dreamer_v3/<env>/seed<seed>
    fresh: bool = False  # delete what the run folder holds and start over
    eval: str = ""  # run folder: play its policy, as trained but for --eval-episodes and --device
    eval_episodes: int = 5  # played at the end, and by --eval
    benchmark: bool = False  # time the updates of these settings instead of training
    device: str = ""  # empty: cuda if there is one, else cpu
    threads: int = 0  # on the CPU; 0: torch's choice. Small networks gain nothing from two
    compile: bool = False  # torch.compile: faster after a minute or two; on CUDA one graph as well
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; bf16 on CUDA
    tensorboard: bool = True  # mirror the metrics to TensorBoard
    log_every: int = 2_000  # environment steps between lines in metrics.jsonl
    save_every: int = 10_000  # environment steps between checkpoints
    dream_every: int = 25_000  # environment steps between pictures of dreams

    # environment

    num_envs: int = 1  # stepped together
    env_workers: bool = False  # a process for each environment
    action_repeat: int = 1  # environment steps per action
    obs: Literal["auto", "vector", "pixels", "both"] = "auto"  # pixels: rendered if need be
    image_size: int = 64  # images are resized to this square, a multiple of 16
    sticky: bool = False  # Atari: 25 % repeated actions and all 18 actions
    camera: int = -1  # of MuJoCo; -1: the usual one
    render_quality: Literal["auto", "fast", "full"] = "auto"  # fast: no shadows, no antialiasing

    # replay

    batch_size: int = 16  # windows per update
    batch_length: int = 64  # rows per window, plus one of context
    train_ratio: float = 1024.0  # replayed rows per row of experience
    replay_size: int = 5_000_000  # rows; no more than `steps` need is allocated

    # world model

    deter: int = 512  # width of the recurrent state
    hidden: int = 64  # width of the layers around it
    classes: int = 4  # per latent
    depth: int = 4  # channels of the convolutions, times 2, 3, 4, 4
    units: int = 64  # width of encoder, decoder, heads, actor and critic
    stoch: int = 32  # number of latents
    blocks: int = 8  # of the block-diagonal recurrent weights
    unimix: float = 0.01  # uniform share in the latents' distributions
    free_nats: float = 1.0  # KL below this is not penalised

    # behaviour

    imagination_horizon: int = 15  # imagined steps
    horizon: int = 333  # discount 1 - 1/horizon per action
    lam: float = 0.95  # of the lambda-returns
    entropy_bonus: float = 3e-4  # per nat of the policy's entropy
    slow_rate: float = 0.02  # of the slow critic, per update

    # optimiser

    lr: float = 4e-5  # after the warm-up
    warmup: int = 1000  # updates
    clip: float = 0.3  # gradient norm per weight norm, each tensor on its own


WIDTHS = {"1m": 4, "12m": 16, "25m": 24, "50m": 32, "100m": 48, "200m": 64, "400m": 96}
SIZES = {
    name: dict(deter=128 * n, hidden=16 * n, classes=n, depth=n, units=16 * n)
    for name, n in WIDTHS.items()
}

# fmt: off
PRESETS = {
    "default": dict(  # teaches in one sitting on two cores; not the authors' recipe
        env_id="Pendulum-v1", action_repeat=2, steps=10_000, batch_length=16, train_ratio=128.0,
        deter=256, lr=1e-3, warmup=200, log_every=1000, save_every=2000, dream_every=2500,
        eval_episodes=10, threads=1),
    "dmc_proprio": dict(
        env_id="dm_control/walker-walk-v0", obs="vector", num_envs=16, steps=1_100_000,
        log_every=250, save_every=1000, dream_every=5000),  # an update a step: half a second each
    "dmc_vision": dict(
        env_id="dm_control/walker-walk-v0", obs="pixels", num_envs=16, steps=1_100_000,
        size="200m", train_ratio=256.0),
    "atari100k": dict(
        env_id="ALE/Pong-v5", action_repeat=4, steps=440_000, size="200m", train_ratio=256.0),
    "crafter": dict(
        env_id="crafter/Reward-v0", steps=1_100_000, size="200m", train_ratio=512.0),
    "debug": dict(
        env_id="CartPole-v1", steps=1000, num_envs=2, batch_size=4, batch_length=8, train_ratio=4.0,
        imagination_horizon=4, deter=16, hidden=8, stoch=4, depth=2, units=8, eval_episodes=1,
        log_every=50, save_every=100, dream_every=500),
}
# fmt: on


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags -> Args: a flag beats --size, which beats the preset, which beats the defaults."""
    chosen = tyro.cli(Args, args=argv, description=__doc__)  # for --preset, --size and --help
    preset = {"size": "1m", **PRESETS[chosen.preset]}
    values = {**SIZES[preset["size"]], **preset, **SIZES.get(chosen.size, {})}
    default = Args(**values | {"preset": chosen.preset, "size": chosen.size or preset["size"]})
    return tyro.cli(Args, default=default, args=argv, description=__doc__)


def check(args: Args) -> torch.device:
    """The device of a run; RunError that names the flag for values that cannot work."""
    if parallel.size() > 1 and (args.eval or args.benchmark):
        raise RunError("--eval and --benchmark run in one process: without torchrun")
    counts = "num_envs steps action_repeat batch_size batch_length eval_episodes save_every horizon"
    widths = "imagination_horizon deter hidden stoch classes depth units blocks"
    for name in (*counts.split(), *widths.split()):
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1")
    if not (args.lr > 0 and args.clip > 0):
        raise RunError("--lr and --clip must be positive")
    if min(args.train_ratio, args.warmup, args.seed, args.threads) < 0:
        raise RunError("--train-ratio, --warmup, --seed and --threads must not be negative")
    if not (0 <= args.lam <= 1 and 0 <= args.slow_rate <= 1):
        raise RunError("--lam and --slow-rate must be between 0 and 1")
    if not 0 < args.unimix < 1:
        raise RunError("--unimix must be above 0, for a finite KL (1e-6 is next to none), below 1")
    if args.image_size % 16 or args.image_size < 16:
        raise RunError("--image-size must be a multiple of 16")
    if args.classes > 256:
        raise RunError("--classes must be at most 256: the replay stores them as bytes")
    if args.deter % args.blocks or 4 * args.depth % args.blocks:
        raise RunError("--deter and 4 times --depth must be multiples of --blocks")
    rows = math.ceil(args.steps / (args.num_envs * args.action_repeat))
    rows = min(rows, args.replay_size // args.num_envs)  # of each environment
    windows = args.num_envs * (rows - args.batch_length)
    needed = args.batch_size * args.batch_length
    if args.train_ratio and windows < needed and not (args.benchmark or args.eval):
        text = f"the first update waits for {needed:,} windows, --batch-size x --batch-length; "
        text += f"--steps and --replay-size give {max(0, windows):,}"
        raise RunError(f"{text}: there would never be one")
    return checkpoint.pick_device(args.device)


# --- maths --------------------------------------------------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|), eq. 9: compresses large magnitudes, keeps signs and small values."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp|x| - 1), the inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def two_hot_bins(num_bins: int = 255) -> Tensor:
    """(num_bins,) bins, eq. 10: exponentially spaced, exactly antisymmetric, the middle one 0."""
    if num_bins < 3 or num_bins % 2 == 0:
        raise ValueError(f"num_bins must be odd and at least 3, so that a bin is 0; got {num_bins}")
    half = symexp(torch.linspace(-20, 0, num_bins // 2 + 1))
    return torch.cat([half, -half[:-1].flip(0)])


def two_hot_encode(x: Tensor, bins: Tensor) -> Tensor:
    """Two-hot encoding (..., num_bins) of x (...), eq. 11: weights of the two bins around x.

    The interpolation is linear in raw space (the 2023 version did it in symlog space).
    Outside the support all weight is on the end bin; NaN and infinities give NaN.
    """
    above = torch.bucketize(x.contiguous(), bins, right=True)
    index = torch.stack([above - 1, above], -1).clamp(0, len(bins) - 1)
    low, high = bins[index].unbind(-1)
    upper = torch.where(low < high, (x - low) / (high - low), 0.0 * x)  # 0 x: NaN stays NaN
    weight = torch.stack([1 - upper, upper], -1)
    return torch.zeros(*x.shape, len(bins), device=x.device).scatter_add_(-1, index, weight)


def two_hot_decode(logits: Tensor, bins: Tensor) -> Tensor:
    """Expectation (...) over bins of softmax(logits), logits (..., num_bins).

    Mirrored bins are paired before the sum, so that uniform logits give exactly 0.
    """
    probs = logits.float().softmax(-1)
    middle = len(bins) // 2
    pairs = probs[..., middle + 1 :] - probs[..., :middle].flip(-1)
    return (pairs * bins[middle + 1 :]).sum(-1)


def two_hot_loss(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy (...) of softmax(logits) with the two-hot code of target (...)."""
    return -(two_hot_encode(target, bins) * logits.float().log_softmax(-1)).sum(-1)


def unimix_probs(logits: Tensor, unimix: float) -> Tensor:
    """Class probabilities (..., C) with a share `unimix` of the uniform distribution mixed in."""
    return (1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]


def race_noise(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Exponential(1) numbers: argmax(probs / noise) is a draw from probs, ones give the mode."""
    return torch.rand(shape, device=device).log_().neg_()


def sample_one_hot(probs: Tensor, noise: Tensor) -> Tensor:
    """One-hot draw (..., C) from probs (..., C) with the straight-through gradient of probs."""
    index = (probs.detach() / noise).argmax(-1, keepdim=True)
    one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    return one_hot + (probs - probs.detach())


def categorical_kl(p_logits: Tensor, q_logits: Tensor, unimix: float) -> Tensor:
    """KL(p || q) in nats, summed over the S latents: logits (..., S, C) -> (...)."""
    p, q = unimix_probs(p_logits, unimix), unimix_probs(q_logits, unimix)
    return (p * (p.log() - q.log())).sum((-2, -1))


def lambda_return(
    reward: Tensor, boot: Tensor, last: Tensor, terminal: Tensor, discount: float, lam: float
) -> Tensor:
    """lambda-returns of eq. 5, all inputs (N, T), output (N, T - 1).

    R_t = r_t+1 + live_t+1 ((1 - trace_t+1) v_t+1 + trace_t+1 R_t+1) and R_T-1 = v_T-1, with
    live = discount (1 - terminal) and trace = lam (1 - last). reward[:, 0] is never read.
    The paper prints v_t for v_t+1 (danijar/dreamerv3#181).
    """
    live = (1 - terminal.float()) * discount
    trace = (1 - last.float()) * lam
    step = reward + live * (1 - trace) * boot
    returns = [boot[:, -1]]
    for t in reversed(range(1, reward.shape[1])):
        returns.append(step[:, t] + live[:, t] * trace[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)


# --- networks -----------------------------------------------------------------------------------


def scaled_init_(weight: Tensor, fan_in: int, outscale: float = 1.0) -> None:
    """Truncated normal with standard deviation outscale / sqrt(fan_in)."""
    nn.init.trunc_normal_(weight, a=-2.0, b=2.0)
    weight.data.mul_(1.1368 * outscale / math.sqrt(fan_in))  # truncated at 2: std 1 / 1.1368


class Linear(nn.Linear):
    """Linear layer with the authors' initialisation and a zero bias."""

    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0):
        super().__init__(inputs, outputs)
        scaled_init_(self.weight, inputs, outscale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # A product with bias copies the bias first; torch.compile adds it in the next operation.
        x = F.linear(x, self.weight)
        return x + self.bias.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-4) times a scale, in float32 even where products are bfloat16."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """5 x 5 convolution of stride 1 that keeps the size."""
    layer = nn.Conv2d(inputs, outputs, 5, padding="same")
    scaled_init_(layer.weight, inputs * 25)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, units: int, layers: int) -> nn.Sequential:
    """`layers` x (Linear, RMSNorm, SiLU)."""
    modules = []
    for i in range(layers):
        modules += [Linear(units if i else inputs, units), RMSNorm(units), nn.SiLU()]
    return nn.Sequential(*modules)


class BlockLinear(nn.Module):
    """Independent linear maps, one per slice of the input, each also seeing `shared` numbers.

    The fan-in of the initialisation is that of all blocks together, as in the authors' code.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, shared: int = 0):
        super().__init__()
        width = inputs // blocks + shared  # of a block's input, its slice first
        self.blocks, self.slice = blocks, inputs // blocks
        self.weight = nn.Parameter(torch.empty(width, blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        scaled_init_(self.weight, blocks * width)

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """(N, inputs), (N, shared) -> (N, blocks, outputs / blocks)."""
        x = x.unflatten(-1, (self.blocks, -1)).transpose(0, 1)
        x = torch.bmm(x, self.weight[: self.slice].transpose(0, 1)).transpose(0, 1)
        if shared is not None:
            dense = shared @ self.weight[self.slice :].flatten(1)
            x = x + dense.unflatten(-1, (self.blocks, -1))
        return x + self.bias.view(self.blocks, -1).to(x.dtype)


class RSSMPrior(nn.Module):
    """Sequence model h' = f(h, z, a) and dynamics predictor p(z' | h'), eq. 1.

    f is a GRU whose weights are block-diagonal over `blocks` slices of h; every block also sees a
    dense embedding of the whole h, z and a.
    """

    def __init__(self, action_dim, deter, hidden, stoch, classes, blocks=8, unimix=0.01):
        super().__init__()
        self.stoch, self.classes, self.blocks, self.unimix = stoch, classes, blocks, unimix
        self.deter_in = mlp(deter, hidden, 1)
        self.stoch_in = mlp(stoch * classes, hidden, 1)
        self.action_in = mlp(action_dim, hidden, 1)
        self.hidden = BlockLinear(deter, deter, blocks, shared=3 * hidden)
        self.hidden_norm = nn.Sequential(RMSNorm(deter), nn.SiLU())
        self.gates = BlockLinear(deter, 3 * deter, blocks)
        self.head = mlp(deter, hidden, 2).append(Linear(hidden, stoch * classes))

    def embed(self, action: Tensor) -> Tensor:
        """(..., A) -> (..., hidden); actions beyond [-1, 1] are scaled back to the border."""
        return self.action_in(action / action.detach().abs().clamp(min=1))

    def core(self, deter: Tensor, stoch: Tensor, action_embed: Tensor) -> Tensor:
        """(N, D), (N, S, C), (N, hidden) -> next deter (N, D)."""
        shared = [self.deter_in(deter), self.stoch_in(stoch.flatten(-2)), action_embed]
        x = self.hidden(deter, torch.cat(shared, -1)).flatten(-2)
        gates = self.gates(self.hidden_norm(x)).float()  # (N, blocks, 3 D / blocks)
        reset, candidate, update = gates.chunk(3, -1)  # split inside each block
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)  # the offset keeps the memory at first
        blocks = deter.unflatten(-1, (self.blocks, -1))
        return torch.lerp(blocks, candidate, update).flatten(-2)

    def split(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Features (..., F) -> deter (..., D), stoch (..., S, C)."""
        stoch = feat[..., -self.stoch * self.classes :].unflatten(-1, (self.stoch, self.classes))
        return feat[..., : -self.stoch * self.classes], stoch

    def logits(self, deter: Tensor) -> Tensor:
        """(..., D) -> logits (..., S, C) of p(z | h)."""
        return self.head(deter).float().unflatten(-1, (self.stoch, self.classes))

    def forward(self, deter, stoch, action, noise) -> tuple[Tensor, Tensor]:
        """One imagined step: (N, D), (N, S, C), (N, A), (N, S, C) -> next deter, stoch."""
        deter = self.core(deter, stoch, self.embed(action))
        return deter, sample_one_hot(unimix_probs(self.logits(deter), self.unimix), noise)


class RSSMPosterior(nn.Module):
    """Encoder q(z | h, x), eq. 1, on tokens of the observation x."""

    def __init__(self, tokens, deter, hidden, stoch, classes):
        super().__init__()
        self.deter, self.stoch, self.classes = deter, stoch, classes
        self.layer = Linear(deter + tokens, hidden)
        self.norm = nn.Sequential(RMSNorm(hidden), nn.SiLU())
        self.head = Linear(hidden, stoch * classes)

    def embed(self, tokens: Tensor) -> Tensor:
        """(..., E) -> (..., hidden): the tokens' half of the first layer, for all steps at once."""
        return F.linear(tokens, self.layer.weight[:, self.deter :], self.layer.bias)

    def forward(self, deter: Tensor, embed: Tensor) -> Tensor:
        """(N, D), (N, hidden) from `embed` -> logits (N, S, C)."""
        x = self.norm(F.linear(deter, self.layer.weight[:, : self.deter]) + embed)
        return self.head(x).float().unflatten(-1, (self.stoch, self.classes))


class RSSMRollout(nn.Module):
    """Filters a sequence: posterior latents of every step, resets inside the sequence included.

    Three ways to run the same step: a Python loop, `compile_step` (the loop over a compiled step:
    the fastest), `use_scan` (torch's scan operator, one graph whatever the length; Inductor of
    torch 2.13 cannot lower its gradient).
    """

    def __init__(self, prior, posterior, use_scan=False, compile_step=False):
        super().__init__()
        self.prior, self.posterior, self.use_scan = prior, posterior, use_scan
        self.step_fn = torch.compile(self.step) if compile_step else self.step

    def step(self, deter, stoch, action_embed, token_embed, keep, noise):
        """(N, D), (N, S, C), 2 x (N, hidden), (N), (N, S, C) -> deter, stoch, posterior logits."""
        deter = self.prior.core(deter * keep[:, None], stoch * keep[:, None, None], action_embed)
        logits = self.posterior(deter, token_embed)
        return deter, sample_one_hot(unimix_probs(logits, self.prior.unimix), noise), logits

    def forward(self, tokens, action, is_first, deter, stoch, noise):
        """Rows 1..T from the latents before them.

        tokens (B, T, E), action (B, T, A) the one *before* each row, is_first (B, T),
        deter (B, D), stoch (B, S, C), noise (B, T, S, C)
        -> deter (B, T, D), stoch (B, T, S, C), logits (B, T, S, C).
        """
        keep = (~is_first).float()
        action_embed = self.prior.embed(action * keep[..., None])
        inputs = (action_embed, self.posterior.embed(tokens), keep, noise)
        if self.use_scan:
            return self.scan(deter, stoch, inputs)
        outputs = []
        for step_inputs in zip(*(x.unbind(1) for x in inputs), strict=True):
            deter, stoch, logits = self.step_fn(deter, stoch, *step_inputs)
            outputs.append((deter, stoch, logits))
        return tuple(torch.stack(x, 1) for x in zip(*outputs, strict=True))

    def scan(self, deter, stoch, inputs):
        """The same loop as one operator."""
        from torch._higher_order_ops import scan  # not public yet

        def combine(carry, x):
            deter, stoch, logits = self.step(*carry, *x)
            return (deter, stoch), (deter.clone(), stoch.clone(), logits)

        # torch 2.11 wants the time first, and no gradient passes a start that does not need one
        inputs = tuple(x.transpose(0, 1) for x in inputs)
        start = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in (deter, stoch))
        return tuple(x.transpose(0, 1) for x in scan(combine, start, inputs)[1])


class ObsEncoder(nn.Module):
    """Observations -> tokens (..., E): symlog and an MLP for vectors, convolutions for images.

    `shapes` maps keys to shapes, (D,) for a vector and (H, W, C) for a uint8 image.
    """

    def __init__(self, shapes: dict, depth: int, units: int, layers: int = 3):
        super().__init__()
        self.vectors = sorted(k for k, s in shapes.items() if len(s) == 1)
        self.images = sorted(k for k, s in shapes.items() if len(s) == 3)
        self.outputs = 0
        if self.vectors:
            self.mlp = mlp(sum(shapes[k][0] for k in self.vectors), units, layers)
            self.outputs += units
        if self.images:
            depths = [depth * m for m in DEPTH_MULTIPLIERS]
            channels = sum(shapes[k][2] for k in self.images)
            self.convs = nn.ModuleList(map(conv, [channels, *depths], depths))
            self.norms = nn.ModuleList(RMSNorm(d) for d in depths)
            height, width = shapes[self.images[0]][:2]
            self.outputs += (height // 16) * (width // 16) * depths[-1]

    def forward(self, td: TensorDict) -> Tensor:
        tokens = []
        if self.vectors:
            tokens.append(self.mlp(symlog(torch.cat([td[k] for k in self.vectors], -1))))
        if self.images:
            x = torch.cat([td[k] for k in self.images], -1).flatten(0, -4)  # (N, H, W, C)
            x = (x.float() / 255 - 0.5).permute(0, 3, 1, 2)  # (N, C, H, W), channels last in memory
            for layer, norm in zip(self.convs, self.norms, strict=True):
                x = F.max_pool2d(layer(x), 2)
                x = F.silu(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            tokens.append(x.permute(0, 2, 3, 1).flatten(1).unflatten(0, td.shape))
        return torch.cat(tokens, -1)


class ObsDecoder(nn.Module):
    """Latents -> one prediction per observation key: symlog vectors (..., D), images in [0, 1]."""

    def __init__(self, shapes, deter, stoch_size, depth, units, layers=3, blocks=8):
        super().__init__()
        self.vectors = sorted(k for k, s in shapes.items() if len(s) == 1)
        self.images = sorted(k for k, s in shapes.items() if len(s) == 3)
        if self.vectors:
            self.mlp = mlp(stoch_size + deter, units, layers)
            self.heads = nn.ModuleList(Linear(units, shapes[k][0]) for k in self.vectors)
        if self.images:
            depths = [depth * m for m in DEPTH_MULTIPLIERS]
            height, width = (n // 16 for n in shapes[self.images[0]][:2])
            self.blocks, self.grid = blocks, (height, width, depths[-1])
            self.channels = [shapes[k][2] for k in self.images]
            self.deter_in = BlockLinear(deter, math.prod(self.grid), blocks)
            self.stoch_in = mlp(stoch_size, 2 * units, 1).append(
                Linear(2 * units, math.prod(self.grid))
            )
            self.norms = nn.ModuleList(RMSNorm(d) for d in reversed(depths))
            outputs = [*reversed(depths[:-1]), sum(self.channels)]
            self.convs = nn.ModuleList(map(conv, reversed(depths), outputs))

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """(..., D), (..., S, C) -> {key: prediction}."""
        stoch, outputs = stoch.flatten(-2), {}
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            outputs |= {k: head(x) for k, head in zip(self.vectors, self.heads, strict=True)}
        if self.images:
            image = self.image(deter.flatten(0, -2), stoch.flatten(0, -2))
            image = image.unflatten(0, deter.shape[:-1]).split(self.channels, -1)
            outputs |= dict(zip(self.images, image, strict=True))
        return outputs

    def image(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """(N, D), (N, S * C) -> (N, H, W, channels) in [0, 1]."""
        height, width, _ = self.grid
        x = self.deter_in(deter).unflatten(-1, (height, width, -1))  # (N, blocks, h, w, c)
        x = x.permute(0, 2, 3, 1, 4).flatten(-2)
        x = x + self.stoch_in(stoch).unflatten(-1, self.grid)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = F.silu(norm(x)).permute(0, 3, 1, 2)
            x = layer(F.interpolate(x, scale_factor=2, mode="nearest")).permute(0, 2, 3, 1)
        return torch.sigmoid(x.float())


class DreamerActor(nn.Module):
    """Policy on features (..., D + S * C): continuous, discrete or multi-discrete actions.

    Continuous: a normal distribution with mean tanh(m) and deviation in [0.1, 1]; samples are
    not squashed, the environment clips them. `classes` = () means continuous; otherwise the
    action is the concatenated one-hots of one categorical per entry, with a share `unimix` of the
    uniform distribution (the paper has 0.01, the authors' current code none).
    """

    def __init__(self, inputs: int, action_dim: int, classes: tuple[int, ...], units, layers=3,
                 unimix=0.0):  # fmt: skip
        super().__init__()
        self.classes, self.action_dim, self.unimix = tuple(classes), action_dim, unimix
        self.mlp = mlp(inputs, units, layers)
        self.head = Linear(units, action_dim, outscale=0.01)
        if not self.classes:
            self.std_head = Linear(units, action_dim, outscale=0.01)

    def forward(self, feat: Tensor) -> "BoundedNormal | Categoricals":
        """The action distribution at feat (..., F)."""
        x = self.mlp(feat)
        if self.classes:
            logits = self.head(x).float().split(self.classes, -1)
            if self.unimix:
                logits = [unimix_probs(part, self.unimix).log() for part in logits]
            return Categoricals(logits)
        std = (1.0 - 0.1) * torch.sigmoid(self.std_head(x).float() + 2.0) + 0.1
        return BoundedNormal(torch.tanh(self.head(x).float()), std)

    def draw_noise(self, *shape: int) -> Tensor:
        """Random numbers (*shape, A) for the distribution's `sample`."""
        draw = race_noise if self.classes else torch.randn
        return draw(*shape, self.action_dim, device=self.head.weight.device)

    def act(self, td: TensorDict) -> TensorDict:
        """Latents td[N] -> the same with a sampled `action`: the policy of `DreamerEnv.rollout`."""
        return td.set("action", self(features(td)).sample(self.draw_noise(*td.batch_size)))


class BoundedNormal:
    """Diagonal normal over actions (..., A)."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mode, self.dist = mean, Normal(mean, std, validate_args=False)

    def sample(self, noise: Tensor) -> Tensor:
        """noise (..., A) ~ N(0, 1) -> actions, beyond [-1, 1] now and then."""
        return (self.mode + self.dist.stddev * noise).detach()

    def log_prob(self, action: Tensor) -> Tensor:
        return self.dist.log_prob(action).sum(-1)

    def entropy(self) -> Tensor:
        return self.dist.entropy().sum(-1)


class Categoricals:
    """One categorical per discrete action; an action is their one-hots side by side, (..., A)."""

    def __init__(self, logits: tuple[Tensor, ...]):
        self.sizes = [x.shape[-1] for x in logits]
        self.log_probs = [x.log_softmax(-1) for x in logits]

    @property
    def mode(self) -> Tensor:
        return self.sample(torch.ones(sum(self.sizes), device=self.log_probs[0].device))

    def sample(self, noise: Tensor) -> Tensor:
        """noise (..., A) from `race_noise` -> one-hot actions."""
        pairs = zip(self.log_probs, noise.split(self.sizes, -1), strict=True)
        return torch.cat([sample_one_hot(p.exp().detach(), n) for p, n in pairs], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        pairs = zip(self.log_probs, action.split(self.sizes, -1), strict=True)
        return sum((log_prob * part).sum(-1) for log_prob, part in pairs)

    def entropy(self) -> Tensor:
        return -sum((log_prob.exp() * log_prob).sum(-1) for log_prob in self.log_probs)


def features(td: TensorDict) -> Tensor:
    """(..., D) and (..., S, C) -> (..., D + S * C): what heads, actor and critic see."""
    return torch.cat([td["deter"], td["stoch"].flatten(-2)], -1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continuation heads; see Args for the sizes."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        stoch_size = args.stoch * args.classes
        sizes = args.deter, args.hidden, args.stoch, args.classes
        self.encoder = ObsEncoder(shapes, args.depth, args.units)
        self.prior = RSSMPrior(action_dim, *sizes, args.blocks, args.unimix)
        self.posterior = RSSMPosterior(self.encoder.outputs, *sizes)
        self.rollout = RSSMRollout(self.prior, self.posterior, compile_step=args.compile)
        self.decoder = ObsDecoder(
            shapes, args.deter, stoch_size, args.depth, args.units, blocks=args.blocks
        )
        self.feat_size = args.deter + stoch_size
        self.reward = mlp(self.feat_size, args.units, 1).append(Linear(args.units, BINS, 0.0))
        self.cont = mlp(self.feat_size, args.units, 1).append(Linear(args.units, 1))
        self.register_buffer("bins", two_hot_bins(BINS), persistent=False)

    def predict_reward(self, feat: Tensor) -> Tensor:
        """Expected reward (...) at feat (..., F)."""
        return two_hot_decode(self.reward(feat), self.bins)

    def predict_continue(self, feat: Tensor) -> Tensor:
        """Probability (...) that the episode goes on after feat (..., F), discount included."""
        return self.cont(feat).float().squeeze(-1).sigmoid()


# --- losses -------------------------------------------------------------------------------------


class DreamerV3ModelLoss(nn.Module):
    """World model loss, eq. 2-3: reconstruction, reward, continuation, dynamics, representation.

    The continuation target is 1 - 1/horizon instead of 1, so the head carries the discount.
    """

    def __init__(self, world_model: WorldModel, *, lambda_reco=1.0, lambda_reward=1.0,
                 lambda_continue=1.0, lambda_dynamic=1.0, lambda_representation=0.1,
                 free_nats=1.0, horizon=333):  # fmt: skip
        super().__init__()
        self.world_model, self.free_nats, self.horizon = world_model, free_nats, horizon
        self.lambda_reco, self.lambda_reward = lambda_reco, lambda_reward
        self.lambda_continue, self.lambda_dynamic = lambda_continue, lambda_dynamic
        self.lambda_representation = lambda_representation

    def forward(self, td: TensorDict, noise: Tensor | None = None):
        """td[B, T]: rows, and under "previous" the rows before them (action, deter, stoch).

        Only the first previous latents are read. Returns scalar losses and td with the posterior
        `deter`, `stoch`, `post_logits` and `prior_logits`, gradients attached.
        """
        model = self.world_model
        td["deter"], td["stoch"], td["post_logits"] = self.posterior(td, noise)
        td["prior_logits"] = model.prior.logits(td["deter"])
        feat = features(td)
        losses = {
            "loss_model_reco": self.lambda_reco * self.reconstruction(td).mean(),
            "loss_model_reward": self.lambda_reward * self.reward(feat, td["reward"]).mean(),
            "loss_model_continue": self.lambda_continue * self.cont(feat, td["is_terminal"]).mean(),
        }
        dynamic, representation = self.kl(td["post_logits"], td["prior_logits"])
        losses["loss_model_dynamic"] = self.lambda_dynamic * dynamic.mean()
        losses["loss_model_representation"] = self.lambda_representation * representation.mean()
        return TensorDict(losses), td

    def posterior(self, td: TensorDict, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Latents of td[B, T] from the observations: deter, stoch and posterior logits."""
        model, previous = self.world_model, td["previous"]
        if noise is None:
            shape = (*td.shape, model.prior.stoch, model.prior.classes)
            noise = race_noise(*shape, device=td["reward"].device)
        start = previous["deter"][:, 0], previous["stoch"][:, 0]
        return model.rollout(model.encoder(td), previous["action"], td["is_first"], *start, noise)

    def kl(self, post_logits: Tensor, prior_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Dynamics and representation loss (B, T) in nats: free nats after the sum over latents."""
        unimix = self.world_model.prior.unimix
        dynamic = categorical_kl(post_logits.detach(), prior_logits, unimix)
        representation = categorical_kl(post_logits, prior_logits.detach(), unimix)
        return dynamic.clamp(min=self.free_nats), representation.clamp(min=self.free_nats)

    def reconstruction(self, td: TensorDict) -> Tensor:
        """Squared error (B, T), no 1/2, summed over numbers and keys: symlog or pixels / 255."""
        loss = 0.0
        for key, predicted in self.world_model.decoder(td["deter"], td["stoch"]).items():
            image = td[key].dtype == torch.uint8
            target = td[key].float() / 255 if image else symlog(td[key])
            loss = loss + (predicted.float() - target).square().flatten(2).sum(-1)
        return loss

    def reward(self, feat: Tensor, reward: Tensor) -> Tensor:
        """Two-hot cross entropy (B, T)."""
        return two_hot_loss(self.world_model.reward(feat), reward, self.world_model.bins)

    def cont(self, feat: Tensor, is_terminal: Tensor) -> Tensor:
        """Binary cross entropy (B, T), target 1 - 1/horizon, or 0 at a terminal row."""
        target = (~is_terminal).float() * (1 - 1 / self.horizon)
        logits = self.world_model.cont(feat).float().squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class DreamerV3ActorLoss(nn.Module):
    """Imagines, scores with lambda-returns, and improves the actor by REINFORCE, eq. 6-7.

    Advantages are divided by max(1, S): S is a slow average of the returns' 5-95 % range, whose
    bounds `low` and `high` are buffers, updated before use in training mode. The small methods are
    what `Agent.compile` compiles.
    """

    def __init__(self, actor_model: DreamerActor, value_model: nn.Module,
                 model_based_env: "DreamerEnv", *, imagination_horizon=15, discount_loss=True,
                 lam=0.95, entropy_bonus=3e-4, normalization_rate=0.01):  # fmt: skip
        super().__init__()
        self.actor, self.value, self.env = actor_model, value_model, model_based_env
        self.imagination_horizon, self.lam = imagination_horizon, lam
        self.discount_loss, self.entropy_bonus = discount_loss, entropy_bonus
        self.normalization_rate = normalization_rate
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("quantiles", torch.tensor([0.05, 0.95]))

    def forward(self, td: TensorDict, noise: TensorDict | None = None):
        """td[N]: latents to start from, `deter` and `stoch`; no gradient reaches them.

        Returns loss_actor and the dream[N, H + 1], its first entry the start: `feat`, `action`,
        `reward`, `continue`, `weight`, `value_logits`, `value`, `lambda_target`, `entropy`. The
        last state has no action and no target: zeros.
        """
        with torch.no_grad():
            dream = self.imagine(td, noise)
            dream["reward"], dream["continue"] = self.predict(dream["feat"])
            weight = dream["continue"].cumprod(1)
            dream["weight"] = weight if self.discount_loss else torch.ones_like(weight)
        dream["value_logits"], dream["value"] = self.predict_value(dream["feat"])
        returns = lambda_return(
            dream["reward"],
            dream["value"],
            last=torch.zeros_like(dream["reward"]),
            terminal=1 - dream["continue"],
            discount=1.0,  # it is in the continuation head
            lam=self.lam,
        )
        advantage = (returns - dream["value"][:, :-1]) / self.return_scale(returns)
        log_prob, entropy = self.policy(dream["feat"], dream["action"])
        objective = log_prob[:, :-1] * advantage + self.entropy_bonus * entropy[:, :-1]
        dream["lambda_target"] = F.pad(returns, (0, 1))
        dream["entropy"] = entropy.detach()
        return TensorDict(loss_actor=-(dream["weight"][:, :-1] * objective).mean()), dream

    def imagine(self, start: TensorDict, noise: TensorDict | None = None) -> TensorDict:
        """start[N] -> [N, H + 1] with `feat` and `action`, stepped by the environment's model."""
        noise = self.draw_noise(len(start)) if noise is None else noise
        feats, actions = [features(start).detach()], []
        for step in zip(noise["action"].unbind(1), noise["stoch"].unbind(1), strict=True):
            action, feat = self.dream_step(feats[-1], *step)
            feats.append(feat)
            actions.append(action)
        action = F.pad(torch.stack(actions, 1), (0, 0, 0, 1))
        return TensorDict(feat=torch.stack(feats, 1), action=action, batch_size=action.shape[:2])

    def dream_step(self, feat, action_noise, stoch_noise) -> tuple[Tensor, Tensor]:
        """Act at feat (N, F) and let the model answer: action (N, A), next feat (N, F)."""
        prior = self.env.world_model.prior
        action = self.actor(feat).sample(action_noise)
        deter, stoch = prior(*prior.split(feat), action, stoch_noise)
        return action, torch.cat([deter, stoch.flatten(-2)], -1)

    def predict(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Imagined reward and continuation probability (...) at feat (..., F)."""
        model = self.env.world_model
        return model.predict_reward(feat), model.predict_continue(feat)

    def predict_value(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's logits (..., num_bins) and, without gradient, its value (...)."""
        logits = self.value(feat)
        return logits, two_hot_decode(logits.detach(), self.env.world_model.bins)

    def policy(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of the action and entropy (...), in nats."""
        distribution = self.actor(feat)
        return distribution.log_prob(action), distribution.entropy()

    def draw_noise(self, n: int) -> TensorDict:
        """Random numbers for n dreams: action (n, H, A), stoch (n, H, S, C)."""
        prior, horizon = self.env.world_model.prior, self.imagination_horizon
        action = self.actor.draw_noise(n, horizon)
        stoch = race_noise(n, horizon, prior.stoch, prior.classes, device=action.device)
        return TensorDict(action=action, stoch=stoch, batch_size=[n, horizon])

    def return_scale(self, returns: Tensor) -> Tensor:
        """max(1, S) after one step of the average (only in training mode)."""
        if self.training:
            low, high = torch.quantile(parallel.gather(returns.flatten()), self.quantiles)
            self.low.lerp_(low, self.normalization_rate)
            self.high.lerp_(high, self.normalization_rate)
        return (self.high - self.low).clamp(min=1.0)


class DreamerV3ValueLoss(nn.Module):
    """Two-hot critic on imagined returns and, through `replay`, on returns along real rows.

    A slow copy of the critic (moving average, no gradient) regularises it: the loss also holds
    the cross entropy with the slow critic's own prediction.
    """

    def __init__(self, value_model: nn.Module, slow_value_model: nn.Module, *, lam=0.95,
                 lambda_replay=0.3, slow_regularization=1.0, horizon=333):  # fmt: skip
        super().__init__()
        self.value, self.slow_value = value_model, slow_value_model
        self.lam, self.horizon, self.lambda_replay = lam, horizon, lambda_replay
        self.slow_regularization = slow_regularization
        self.register_buffer("bins", two_hot_bins(BINS))

    def error(self, logits: Tensor, target: Tensor, feat: Tensor) -> Tensor:
        """Cross entropy (...) with the target (...) and with the slow critic at feat (..., F)."""
        with torch.no_grad():
            slow = two_hot_decode(self.slow_value(feat), self.bins)
        regularization = self.slow_regularization * two_hot_loss(logits, slow, self.bins)
        return two_hot_loss(logits, target.detach(), self.bins) + regularization

    def forward(self, dream: TensorDict) -> tuple[TensorDict, TensorDict]:
        """dream[N, H + 1] of DreamerV3ActorLoss; its last state, without target, does not count."""
        error = self.error(dream["value_logits"], dream["lambda_target"], dream["feat"])
        return TensorDict(loss_value=(dream["weight"] * error)[:, :-1].mean()), dream

    def replay(self, td: TensorDict, boot: Tensor) -> tuple[TensorDict, TensorDict]:
        """td[B, T] of DreamerV3ModelLoss, boot (B, T) the imagined return from each row.

        The gradient reaches the world model through the latents.
        """
        returns = lambda_return(
            td["reward"], boot, td["is_last"], td["is_terminal"], 1 - 1 / self.horizon, self.lam
        )
        feat = features(td)[:, :-1]
        error = self.error(self.value(feat), returns, feat.detach())
        weight = (~td["is_last"][:, :-1]).float()
        return TensorDict(loss_replay_value=self.lambda_replay * (weight * error).mean()), td


# --- optimiser ----------------------------------------------------------------------------------


class LaProp(torch.optim.Optimizer):
    """Adaptive gradient clipping, RMS normalisation, then momentum; linear warm-up from 0.

    AGC limits each tensor's gradient norm to `clip` times its weight norm. Unlike Adam, momentum
    averages gradients that are already normalised (LaProp, Ziyin et al., 2020).
    """

    def __init__(self, params, lr=4e-5, clip=0.3, beta1=0.9, beta2=0.999, eps=1e-20, warmup=1000):
        super().__init__(params, dict(lr=lr))
        self.clip, self.beta1, self.beta2, self.eps, self.warmup = clip, beta1, beta2, eps, warmup
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"rms": torch.zeros_like(p), "momentum": torch.zeros_like(p)}
        device = self.param_groups[0]["params"][0].device
        self.param_groups[0]["step"] = torch.zeros((), device=device)  # for CUDA graphs

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)  # which moves all but the groups to the parameters' device
        group = self.param_groups[0]
        group["step"] = group["step"].to(group["params"][0].device)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        params, step = group["params"], group["step"]
        rms = [self.state[p]["rms"] for p in params]
        momentum = [self.state[p]["momentum"] for p in params]
        lr = group["lr"] * (step / self.warmup).clamp(max=1.0) if self.warmup else group["lr"]
        step.add_(1)
        grads = self.clipped(params)
        torch._foreach_mul_(rms, self.beta2)
        torch._foreach_addcmul_(rms, grads, grads, 1 - self.beta2)
        scale = torch._foreach_div(rms, 1 - self.beta2**step)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, self.eps)
        torch._foreach_div_(grads, scale)
        torch._foreach_lerp_(momentum, grads, 1 - self.beta1)
        update = torch._foreach_mul(momentum, -lr / (1 - self.beta1**step))
        torch._foreach_add_(params, update)

    def clipped(self, params: list[Tensor]) -> list[Tensor]:
        """Gradients after AGC."""
        grads = [p.grad for p in params]
        limit = torch._foreach_norm(params)
        torch._foreach_clamp_min_(limit, 1e-3)
        ratio = torch._foreach_norm(grads)
        torch._foreach_mul_(limit, self.clip)
        torch._foreach_div_(ratio, limit)
        torch._foreach_clamp_min_(ratio, 1.0)
        return torch._foreach_div(grads, ratio)


# --- imagination environment --------------------------------------------------------------------


class DreamerEnv(ModelBasedEnvBase):
    """Steps inside the world model: latents in, latents, reward and continuation out."""

    def transition(self, td: TensorDict, action: Tensor, noise: Tensor | None = None) -> TensorDict:
        """Latents td[N], action (N, A) -> next latents, by RSSMPrior as in training."""
        prior = self.world_model.prior
        if noise is None:
            noise = race_noise(*td["stoch"].shape, device=action.device)
        deter, stoch = prior(td["deter"], td["stoch"], action, noise)
        return TensorDict(deter=deter, stoch=stoch, batch_size=td.batch_size)

    def _step(self, td: TensorDict) -> TensorDict:
        state = self.transition(td, td["action"])
        feat = features(state)
        state["reward"] = self.world_model.predict_reward(feat)
        state["continue"] = self.world_model.predict_continue(feat)
        return state


class DreamerDecoder(nn.Module):
    """Adds decoded observations to latents td[*B] or to a rollout, in the environment's units."""

    def __init__(self, world_model: WorldModel):
        super().__init__()
        self.world_model = world_model

    def forward(self, td: TensorDict) -> TensorDict:
        """Vectors float32 (*B, D), images uint8 (*B, H, W, C); under "next" as well."""
        decoder = self.world_model.decoder
        for key, value in decoder(td["deter"], td["stoch"]).items():
            image = key in decoder.images
            td[key] = (value * 255).round().byte() if image else symexp(value.float())
        return td.set("next", self(td["next"])) if "next" in td.keys() else td


# --- acting -------------------------------------------------------------------------------------


def with_context(batch: TensorDict) -> TensorDict:
    """Rows [B, T + 1] of the replay -> rows 1..T, each with the row before it as "previous"."""
    previous = batch[:, :-1].select("action", "deter", "stoch")
    return batch[:, 1:].exclude("deter", "stoch").set("previous", previous)


class Agent:
    """World model, actor and critic: `act` in an environment, `update` on a batch of replay.

    `spec` holds what the environment fixes: observation `shapes`, `action_dim`, action `classes`.
    """

    def __init__(self, spec: dict, args: Args, device: torch.device | str = "cpu"):
        self.spec, self.args, self.device = spec, args, torch.device(device)
        with self.device:
            self.world_model = WorldModel(spec["shapes"], spec["action_dim"], args)
            size = self.world_model.feat_size
            self.actor = DreamerActor(size, spec["action_dim"], spec["classes"], args.units)
            self.value = mlp(size, args.units, 3).append(Linear(args.units, BINS, 0.0))
            self.slow_value = copy.deepcopy(self.value).requires_grad_(False)
            self.env = DreamerEnv(self.world_model, ("deter", "stoch"))
            self.model_loss = DreamerV3ModelLoss(
                self.world_model, free_nats=args.free_nats, horizon=args.horizon
            )
            self.actor_loss = DreamerV3ActorLoss(
                self.actor, self.value, self.env, entropy_bonus=args.entropy_bonus,
                imagination_horizon=args.imagination_horizon, lam=args.lam,
            )  # fmt: skip
            self.value_loss = DreamerV3ValueLoss(
                self.value, self.slow_value, lam=args.lam, horizon=args.horizon
            )
        self.modules = {"world_model": self.world_model, "actor": self.actor, "value": self.value}
        params = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = LaProp(params, lr=args.lr, clip=args.clip, warmup=args.warmup)
        self.saved = {**self.modules, "slow_value": self.slow_value, "optimizer": self.optimizer}
        if args.compile:
            self.compile()

    def compile(self):
        """Compile the functions in which an update spends its time (RSSMRollout does its own).

        On CUDA the whole update, which never waits for the GPU, is then recorded as one graph.
        """
        names = ("dream_step", "predict", "predict_value", "policy")
        hot = [(self.actor_loss, name) for name in names]
        hot += [(self.model_loss, name) for name in ("kl", "reward", "cont", "reconstruction")]
        for module, name in [*hot, (self.value_loss, "error")]:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
        if self.device.type == "cuda" and parallel.size() == 1:
            self.update = CudaGraphModule(self.update, warmup=3)

    def initial(self, num_envs: int) -> TensorDict:
        """Latents and action before the first row, [N]; a row with is_first ignores them."""
        args, sizes = self.args, (num_envs, self.spec["action_dim"])
        with self.device:
            stoch = torch.zeros(num_envs, args.stoch, args.classes)
            deter, action = torch.zeros(num_envs, args.deter), torch.zeros(sizes)
        return TensorDict(deter=deter, stoch=stoch, action=action, batch_size=[num_envs])

    @torch.no_grad()
    def act(self, rows: TensorDict, state: TensorDict | None = None, sample: bool = True):
        """Rows[N] and the state after the rows before -> action (N, A) on the CPU, state[N].

        `sample=False` takes the policy's mode; the published scores are of the sampling policy.
        """
        rows, model = rows.to(self.device), self.world_model
        state = self.initial(len(rows)) if state is None else state
        keep = (~rows["is_first"]).float()
        with self.autocast():
            deter, stoch, _ = model.rollout.step(
                state["deter"],
                state["stoch"],
                model.prior.embed(state["action"] * keep[:, None]),
                model.posterior.embed(model.encoder(rows)),
                keep,
                race_noise(*state["stoch"].shape, device=self.device),
            )
            state = TensorDict(deter=deter, stoch=stoch, batch_size=[len(rows)])
            policy = self.actor(features(state))
        action = policy.sample(self.actor.draw_noise(len(rows))) if sample else policy.mode
        state["action"] = action * (~rows["is_last"]).float()[:, None]
        return state["action"].cpu(), state

    def update(self, batch: TensorDict, noise: dict | None = None):
        """One step of every network on rows [B, T + 1] with unpacked latents.

        Returns metrics (0-dim tensors) and the new latents[B, T] of rows 1..T for the replay.
        `noise` replaces the random numbers of the posteriors and of the dreams, for tests.
        """
        noise, td = noise or {}, with_context(batch)
        with self.autocast():
            with record_function("world model"):
                losses, td = self.model_loss(td, noise.get("posterior"))
            with record_function("dreams and actor"):
                starts = td.select("deter", "stoch").flatten()  # every row starts a dream
                actor_losses, dream = self.actor_loss(starts, noise.get("dream"))
            with record_function("critic"):
                value_losses, _ = self.value_loss(dream)
                boot = dream["lambda_target"][:, 0].unflatten(0, td.shape)
                replay_losses, _ = self.value_loss.replay(td, boot)
        losses.update(actor_losses).update(value_losses).update(replay_losses)
        with record_function("backward"):
            self.optimizer.zero_grad()
            sum(losses.values()).backward()
        with record_function("optimiser"):
            grads = [p.grad for p in self.optimizer.param_groups[0]["params"]]
            parallel.mean_(grads)
            losses["grad_norm"] = nn.utils.get_total_norm(grads)
            self.optimizer.step()
            with torch.no_grad():
                slow, fast = list(self.slow_value.parameters()), list(self.value.parameters())
                torch._foreach_lerp_(slow, fast, self.args.slow_rate)
        metrics = parallel.means(self.metrics(losses, td, dream))
        return metrics, td.select("deter", "stoch").detach()

    @torch.no_grad()
    def metrics(self, losses: TensorDict, td: TensorDict, dream: TensorDict) -> dict:
        """What the README's glossary explains, as 0-dim tensors: no host synchronisation."""
        prior = unimix_probs(td["prior_logits"], self.args.unimix)
        means = {k: dream[k].mean() for k in ("reward", "value", "continue", "entropy")}
        return {
            **{f"train/{name}": value.detach() for name, value in losses.items()},
            **{f"dream/{name}": value for name, value in means.items()},
            "dream/return": dream["lambda_target"][:, :-1].mean(),
            "dream/return_range": self.actor_loss.high - self.actor_loss.low,
            "train/prior_entropy": -(prior * prior.log()).sum((-2, -1)).mean(),
        }

    def autocast(self):
        """bfloat16 matrix products where asked for; parameters and losses stay float32."""
        return checkpoint.autocast(self.device, self.args.precision)

    @torch.no_grad()
    def filter(self, batch: TensorDict) -> TensorDict:
        """Rows [B, T + 1] of the replay -> rows 1..T with the posterior's `deter` and `stoch`."""
        td = with_context(self.unpack(batch))
        td["deter"], td["stoch"], *_ = self.model_loss.posterior(td)
        return td

    @torch.no_grad()
    def decode(self, states: TensorDict) -> TensorDict:
        """Latents [*B] -> with the observations and the `reward` that the model sees in them."""
        states["reward"] = self.world_model.predict_reward(features(states))
        return DreamerDecoder(self.world_model)(states)

    def dreams(self, run: str | Path) -> tuple[DreamerEnv, Callable]:
        """For `dream_env`: what steps, and draw(seed) -> latents of the run's replay."""
        return self.env, posteriors(self, run)

    def row(self, rows: TensorDict, state: TensorDict) -> TensorDict:
        """Rows[N] as the replay stores them: with the action chosen there and the latents."""
        return rows.copy().update(self.pack(state).cpu()).set("action", state["action"].cpu())

    def pack(self, state: TensorDict) -> TensorDict:
        """Latents as the replay stores them: deter in half precision, class indices (..., S)."""
        stoch = state["stoch"].argmax(-1).to(torch.uint8)
        return TensorDict(deter=state["deter"].half(), stoch=stoch, batch_size=state.batch_size)

    def unpack(self, batch: TensorDict) -> TensorDict:
        """The inverse of `pack` for a batch of the replay, on the agent's device."""
        batch = batch.to(self.device)
        batch["deter"] = batch["deter"].float()
        batch["stoch"] = F.one_hot(batch["stoch"].long(), self.args.classes).float()
        return batch

    def state_dict(self) -> dict:
        state = {name: part.state_dict() for name, part in self.saved.items()}
        state |= {"low": self.actor_loss.low, "high": self.actor_loss.high}
        return {**state, "spec": self.spec, "args": dataclasses.asdict(self.args)}

    def load_state_dict(self, state: dict):
        for name, module in self.saved.items():
            module.load_state_dict(state[name])
        self.actor_loss.low.copy_(state["low"])
        self.actor_loss.high.copy_(state["high"])


def load(run: str | Path, device: str = "cpu") -> Agent:
    """The trained agent of a run folder, ready to `act`; RunError if there is no checkpoint."""
    device = checkpoint.pick_device(device)
    return checkpoint.load_agent(
        run, "dreamer_v3", lambda spec, args: Agent(spec, Args(**args | {"compile": False}), device)
    )


# --- main ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    parallel.start(args.device)
    device = check(args)
    checkpoint.prepare(args.seed, args.threads)
    updates_per_row = args.train_ratio / (args.batch_size * args.batch_length)
    if args.benchmark:
        return benchmark(Agent, args, device, PHASES, updates_per_row)
    if args.eval:
        return show(load(args.eval, device), args.eval, args.eval_episodes)

    decided = {"render_quality": usual_quality()}  # once, so that a run keeps it on another machine
    folder, saved = parallel.open_run("dreamer_v3", args, MAY_CHANGE, decided)
    args.steps = max(args.steps, saved["step"] if saved else 0)  # the replay keeps its size
    own = parallel.share(args)  # of the environments, the batch and the replay
    envs = make_envs(args, own.num_envs, own.seed, args.env_workers)
    agent = Agent(envs.spec, args, device)
    parallel.align(agent, args.seed)
    checkpoint.check_spec(agent.spec, saved, args.env_id)
    for name, module in agent.modules.items():
        print(f"{sum(p.numel() for p in module.parameters()):14,} parameters in {name}")
    example = agent.row(example_rows(agent.spec), agent.initial(1))[0]
    replay = make_replay(own, example, parallel.own_folder(folder))
    logs = parallel.rank() == 0
    logger = Logger(folder, args.steps, args.tensorboard, silent=not logs)
    ratio = Ratio(updates_per_row)
    due = dict(log=Every(args.log_every), save=Every(args.save_every))
    due |= dict(dream=Every(args.dream_every))
    parts = dict(agent=agent, replay=replay, envs=envs, logger=logger, ratio=ratio, **due)
    step, updates, batch = 0, 0, None
    state, score = agent.initial(own.num_envs), torch.zeros(own.num_envs)
    if saved:
        checkpoint.restore(saved, parts)
        step, updates, score = saved["step"], saved["updates"], saved["score"]
        state = TensorDict(saved["state"], [own.num_envs]).to(device)
    print(f"{folder} on {device}: {f'resumes at step {step:,}' if saved else 'starts'}")

    def save():
        counters = dict(step=step, updates=updates, score=score, state=state.to_dict())
        parallel.save(folder, **parts, **counters, rng=checkpoint.rng_state())

    with Stop() as stop:
        while step < args.steps and not parallel.any_rank(stop.requested):
            with parallel.rescue(save):
                rows = envs.step(state["action"].cpu() if step else None)
            _, state = agent.act(rows, state)
            replay.append(agent.row(rows, state))
            step += args.num_envs * args.action_repeat
            score = parallel.log_returns(logger, step, score, rows, updates, envs.crashes)

            enough = len(replay) >= own.batch_size * args.batch_length  # windows, to begin with
            for _ in range(ratio(step // args.action_repeat) if enough else 0):
                batch = replay.sample(own.batch_size)
                metrics, latents = agent.update(agent.unpack(batch))
                replay.write_back(batch["index"][:, 1:], agent.pack(latents))
                updates += 1
                check_finite(metrics, updates)  # before a save could replace the last good one
                logger.add(metrics)
                logger.advance(step, updates=updates)

            if due["dream"](step) and batch is not None and logs:
                draw_dreams(agent, logger, batch, f"dream_{step:09}")
            if due["log"](step):
                logger.write(step, updates=updates)
            if due["save"](step) or replay.exhausted:
                save()
        save()
    if step >= args.steps and logs:
        logger.write(step, **finish(agent, logger, "policy"))
        print(f"learning curve: {plot_curve(folder)}")
    print(f"all of it: {folder}" if step >= args.steps else "saved; the same command resumes")
    logger.close()
    envs.close()


if __name__ == "__main__":
    checkpoint.run(main)
