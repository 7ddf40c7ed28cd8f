"""DreamerV3 (Hafner et al., 2023, 2025): learn a world model, improve the policy inside it.

    python dreamer_v3.py              # Pendulum-v1, 5,000 steps: return -155 (random: -1,233)
    python dreamer_v3.py --preset dmc_proprio --env-id dm_control/walker-walk-v0
    python dreamer_v3.py --preset debug --run runs/dreamer_v3/debug   # everything tiny
    python dreamer_v3.py --eval runs/dreamer_v3/Pendulum-v1/seed0    # play and film
    python dreamer_v3.py --preset dmc_proprio --benchmark        # how long would it take here?

Repeat the command to resume the run; --fresh starts over.

This file follows the authors' current code (danijar/dreamerv3 at e3f0224). docs/dreamer_v3.md lists
where that code differs from the paper's text, and where this file departs from that code. Two
departures matter: updates run after all environments have stepped, not after each one, and on CUDA
only matrix products are bfloat16 (autocast); beliefs and losses stay float32.

Names: `belief` is the recurrent state (the authors' deter); `state` is S categoricals of C classes
as flat one-hots (stoch); `encoded_obs` is the embedding of an observation; a latent is a TensorDict
of belief and state. Shapes: B batch, T time, H imagined steps, N any batch size, *B any batch
shape, A action, D belief, F = D + S * C features, E encoded_obs; td[B, T] is a TensorDict of that
batch size. Batch first, time second, everywhere. Equations are numbered as in arXiv 2301.04104v2.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from common.checkpoint import RunError
from common.envs import action_width, example_rows, make_envs
from common.imagination import ModelBasedEnvBase
from common.replay import check_room, make_replay
from common.run import (
    Camera, Compile, Count, EnvId, Fraction, MayChange, Natural, NotNegative, NumEnvs, Positive,
    Rule, Run, Threads, autocast, evaluate_run, gather_ranks, launch, load_agent,
    mean_over_ranks_, parse_flags, prepare, run_folder,
)  # fmt: skip

SCRIPT = Path(__file__).stem  # names its run folders, so that a renamed fork has folders of its own
BINS = 255  # of the two-hot reward and value
DEPTH_MULTIPLIERS = (2, 3, 4, 4)  # channels of the convolution stages, in units of args.depth
Unimix = Annotated[float, Rule("above 0, for a finite KL, and below 1", lambda x: 0 < x < 1)]
LastRows = Annotated[int, Rule("at least 2, or 0", lambda x: x == 0 or x >= 2)]
Side = Annotated[int, Rule("a multiple of 16, up to 1,024", lambda x: x in range(16, 1025, 16))]
Preset = Literal["default", "dmc_proprio", "dmc_vision", "atari100k", "crafter", "debug"]
Size = Literal["", "1m", "12m", "25m", "50m", "100m", "200m", "400m"]


@dataclass
class Args:
    """Flags. These are the authors' values for DM Control proprio, except num_envs."""

    preset: Preset = "default"  # a named set of settings; other flags override them
    size: Size = ""  # parameter count; empty: the preset's, else 1m
    env_id: EnvId = "dm_control/walker-walk-v0"  # any gymnasium id, even my_module:MyEnv-v0
    steps: MayChange[Count] = 1_100_000  # environment steps, counting repeats and reset rows
    seed: Natural = 0  # seeds networks, noise, replay, environments

    # the run

    run: MayChange[str] = ""  # folder; empty: runs/<script>/<env>/seed<seed>
    fresh: MayChange[bool] = False  # delete what the run folder holds and start over
    eval: MayChange[str] = ""  # run folder: play its policy, with --eval-episodes and --device
    eval_episodes: MayChange[Count] = 5  # played at the end, and by --eval
    benchmark: bool = False  # time updates with these settings instead of training
    device: MayChange[str] = ""  # empty: cuda if there is one, else cpu
    threads: MayChange[Threads] = 0  # on the CPU; 0: the libraries' choice. Small networks: use 1
    compile: MayChange[Compile] = "auto"  # torch.compile; auto: on a CPU, where it saves time
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; auto: bf16 on CUDA
    tensorboard: MayChange[bool] = True  # mirror the metrics to TensorBoard
    log_every: MayChange[Natural] = 2_000  # environment steps between lines in metrics.jsonl
    save_every: Count = 10_000  # environment steps between checkpoints

    # environment

    num_envs: NumEnvs = 1  # stepped together
    env_workers: MayChange[bool] = False  # a process for each environment
    env_kwargs: str = ""  # JSON, to the environment's constructor: '{"map_name": "8x8"}'
    action_repeat: Count = 1  # environment steps per action
    obs: Literal["auto", "vector", "pixels", "both"] = "auto"  # pixels: rendered if need be
    image_size: Side = 64  # images are resized to this square
    sticky: bool = False  # Atari: sticky actions (25%) and all 18 actions
    camera: Camera = -1  # of MuJoCo; -1: the default
    render_quality: Literal["fast", "full"] = "fast"  # fast: no shadows, no antialiasing

    # replay

    batch_size: Count = 16  # windows per update
    batch_length: Count = 64  # rows per window, plus one of context
    train_ratio: NotNegative = 1024.0  # replayed rows per row of experience
    replay_size: Count = 5_000_000  # rows; allocates only what --steps can fill

    # world model

    deter: Count = 512  # width of the belief
    hidden: Count = 64  # width of the RSSM's other layers
    classes: Count = 4  # per categorical
    depth: Count = 4  # channels of the convolutions, times 2, 3, 4, 4
    units: Count = 64  # width of encoder, decoder, heads, actor and critic
    stoch: Count = 32  # categoricals in the state
    blocks: Count = 8  # of the block-diagonal recurrent weights
    unimix: Unimix = 0.01  # uniform share in the state's categoricals
    free_nats: NotNegative = 1.0  # KL below this is not penalized

    # behavior

    imagination_horizon: Count = 15  # imagined steps
    imag_last: LastRows = 0  # dreams and replayed returns start from these of a window; 0: all
    horizon: Count = 333  # discount 1 - 1/horizon per action
    lam: Fraction = 0.95  # lambda of the returns
    entropy_bonus: float = 3e-4  # per nat of the policy's entropy
    slow_rate: Fraction = 0.02  # EMA rate of the slow critic

    # optimizer

    lr: Positive = 4e-5  # after the warm-up
    warmup: Natural = 1000  # updates
    anneal: Natural = 0  # by this update, lr has fallen linearly to a tenth; 0: never
    clip: Positive = 0.3  # largest gradient norm / weight norm, per tensor


DEPTHS = {"1m": 4, "12m": 16, "25m": 24, "50m": 32, "100m": 48, "200m": 64, "400m": 96}
SIZES = {
    name: dict(deter=128 * n, hidden=16 * n, classes=n, depth=n, units=16 * n)
    for name, n in DEPTHS.items()
}
PRESETS = {
    "default": dict(  # learns in a few minutes on one core; not the authors' recipe
        env_id="Pendulum-v1", action_repeat=2, steps=5_000, batch_length=8, train_ratio=128.0,
        deter=256, horizon=100, entropy_bonus=1e-3, lr=4e-4, warmup=200,
        log_every=1000, save_every=2000, eval_episodes=30, threads=1),
    "dmc_proprio": dict(obs="vector", num_envs=16, log_every=250, save_every=1000),
    "dmc_vision": dict(obs="pixels", num_envs=16, size="200m", train_ratio=256.0),
    "atari100k": dict(
        env_id="ALE/Pong-v5", action_repeat=4, steps=440_000, size="200m", train_ratio=256.0),
    "crafter": dict(env_id="tools.crafter_env:crafter/Reward-v0", size="200m", train_ratio=512.0),
    "debug": dict(env_id="CartPole-v1", steps=1000, num_envs=2, batch_size=4, batch_length=8,
        train_ratio=4.0, imagination_horizon=4, deter=16, hidden=8, stoch=4, depth=2, units=8,
        eval_episodes=1, log_every=50, save_every=100),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags -> Args: a flag beats --size, which beats the preset, which beats the defaults."""

    def defaults(chosen: Args) -> dict:
        preset = {"size": "1m", **PRESETS[chosen.preset]}
        return SIZES[preset["size"]] | preset | SIZES.get(chosen.size, {})

    args = parse_flags(Args, argv, __doc__, defaults)
    if args.deter % args.blocks or 4 * args.depth % args.blocks:
        raise RunError("--deter and 4 times --depth must be multiples of --blocks")
    if 0 < args.anneal <= args.warmup:
        raise RunError(f"--anneal must be above --warmup, which is {args.warmup}, or 0")
    rows = math.ceil(args.steps / (args.num_envs * args.action_repeat))  # of each environment
    windows = args.num_envs * (min(rows, args.replay_size // args.num_envs) - args.batch_length)
    training = args.train_ratio and not (args.benchmark or args.eval)
    if training and windows < args.batch_size * args.batch_length:
        text = "--steps and --replay-size give fewer windows than --batch-size x --batch-length"
        text += f", with --num-envs {args.num_envs} and --action-repeat {args.action_repeat}"
        raise RunError(f"{text}: training would never start")
    return args


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
    upper = torch.where(low < high, (x - low) / (high - low), 0.0 * x)  # 0.0 * x keeps NaN
    weight = torch.stack([1 - upper, upper], -1)
    return torch.zeros(*x.shape, len(bins), device=x.device).scatter_add_(-1, index, weight)


def two_hot_decode(logits: Tensor, bins: Tensor) -> Tensor:
    """Mean (...) of the bins under softmax(logits), eq. 10; logits (..., num_bins)."""
    probs = logits.float().softmax(-1)
    middle = len(bins) // 2
    # Mirrored bins are paired before the sum, so that uniform logits give exactly 0.
    pairs = probs[..., middle + 1 :] - probs[..., :middle].flip(-1)
    return (pairs * bins[middle + 1 :]).sum(-1)


def two_hot_loss(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy (...) of softmax(logits) with the two-hot encoded target (...), eq. 11."""
    return -(two_hot_encode(target, bins) * logits.float().log_softmax(-1)).sum(-1)


def one_hots(x: Tensor, sizes: list[int]) -> Tensor:
    """Integers (..., K), number k below sizes[k] -> one-hots side by side (..., sum(sizes))."""
    pairs = zip(x.split(1, -1), sizes, strict=True)
    return torch.cat([part == torch.arange(n, device=x.device) for part, n in pairs], -1).float()


def unimix_probs(logits: Tensor, unimix: float) -> Tensor:
    """Class probabilities (..., C) with a share `unimix` of the uniform distribution mixed in."""
    if logits.shape[-1] > 8:
        probs = logits.softmax(-1)
    else:  # softmax(-1) is slow on a CPU if there are few classes
        probs = logits.movedim(-1, 0).softmax(0).movedim(0, -1).contiguous()
    return (1 - unimix) * probs + unimix / logits.shape[-1]


def exponential_noise(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Exponential(1) noise: argmax(probs / noise) samples from probs; all ones give the mode."""
    return torch.rand(shape, device=device).log_().neg_()


def sample_one_hot(probs: Tensor, noise: Tensor) -> Tensor:
    """One-hot draw (..., C) from probs (..., C) with the straight-through gradient of probs."""
    index = (probs.detach() / noise).argmax(-1, keepdim=True)
    one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    return one_hot + (probs - probs.detach())


def sample_state(logits: Tensor, unimix: float, noise: Tensor | None = None) -> Tensor:
    """Flat one-hots (..., S * C) drawn from logits (..., S, C) by `sample_one_hot`."""
    noise = exponential_noise(*logits.shape, device=logits.device) if noise is None else noise
    return sample_one_hot(unimix_probs(logits, unimix), noise).flatten(-2)


def categorical_kl(p_logits: Tensor, q_logits: Tensor, unimix: float) -> Tensor:
    """KL(p || q) in nats, summed over the S categoricals: logits (..., S, C) -> (...)."""
    p, q = unimix_probs(p_logits, unimix), unimix_probs(q_logits, unimix)
    return (p * (p.log() - q.log())).sum((-2, -1))


def lambda_return(reward, boot, last, terminal, discount: float, lam: float) -> Tensor:
    """lambda-returns of eq. 5, all tensors (N, T), output (N, T - 1).

    R[t] = r[t+1] + live[t+1] ((1 - trace[t+1]) v[t+1] + trace[t+1] R[t+1]), R[T-1] = v[T-1], with
    v = boot, live = discount (1 - terminal), trace = lam (1 - last). Nothing at t = 0 is read.
    The paper prints v_t for v_t+1 (danijar/dreamerv3#181).
    """
    live = (1 - terminal.float()) * discount
    trace = (1 - last.float()) * lam
    one_step = reward + live * (1 - trace) * boot
    returns = [boot[:, -1]]
    for t in reversed(range(1, reward.shape[1])):
        returns.append(one_step[:, t] + live[:, t] * trace[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)


# --- networks -----------------------------------------------------------------------------------


def initialize(layer: nn.Module, fan_in: int, outscale: float = 1.0) -> nn.Module:
    """Weights: truncated normal of standard deviation outscale / sqrt(fan_in); zero bias."""
    nn.init.trunc_normal_(layer.weight, a=-2.0, b=2.0)
    layer.weight.data.mul_(1.1368 * outscale / math.sqrt(fan_in))  # truncated at 2: std 1 / 1.1368
    nn.init.zeros_(layer.bias)
    return layer


class Linear(nn.Linear):
    """Linear layer with the authors' initialization."""

    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0):
        super().__init__(inputs, outputs)
        initialize(self, inputs, outscale)

    def forward(self, x: Tensor) -> Tensor:
        # F.linear with a bias first copies the bias; torch.compile fuses a separate addition.
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
    return initialize(nn.Conv2d(inputs, outputs, 5, padding="same"), inputs * 25)


def mlp(inputs: int, units: int, layers: int, outputs=0, outscale=1.0) -> nn.Sequential:
    """`layers` x (Linear, RMSNorm, SiLU), then, if there are `outputs`, Linear."""
    modules = []
    for i in range(layers):
        modules += [Linear(units if i else inputs, units), RMSNorm(units), nn.SiLU()]
    if outputs:
        modules.append(Linear(units, outputs, outscale))
    return nn.Sequential(*modules)


class BlockLinear(nn.Module):
    """One linear map per slice of the input; each map also reads all `shared` inputs."""

    def __init__(self, inputs: int, outputs: int, blocks: int, shared: int = 0):
        super().__init__()
        self.blocks, self.slice_width = blocks, inputs // blocks
        width = self.slice_width + shared  # of a block's input: its slice, then `shared`
        self.weight = nn.Parameter(torch.empty(width, blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.empty(outputs))
        initialize(self, blocks * width)  # fan-in of all blocks together, as in the authors' code

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """(N, inputs), (N, shared) -> (N, blocks, outputs / blocks)."""
        x = x.unflatten(-1, (self.blocks, -1)).transpose(0, 1)  # (blocks, N, inputs / blocks)
        x = torch.bmm(x, self.weight[: self.slice_width].transpose(0, 1)).transpose(0, 1)
        if shared is not None:
            dense = shared @ self.weight[self.slice_width :].flatten(1)
            x = x + dense.unflatten(-1, (self.blocks, -1))
        return x + self.bias.view(self.blocks, -1).to(x.dtype)


class RSSMPrior(nn.Module):
    """Sequence model h' = f(h, z, a) and dynamics predictor p(z' | h'), eq. 1.

    f is a GRU whose weights are block-diagonal over `blocks` slices of h; every block also sees a
    dense embedding of the whole h, z and a.
    """

    def __init__(self, action_spec, hidden_dim=64, rnn_hidden_dim=512, state_dim=32, classes=4,
                 blocks=8, unimix=0.01):  # fmt: skip
        super().__init__()
        self.state_dim, self.classes, self.blocks, self.unimix = state_dim, classes, blocks, unimix
        self.latent_sizes = rnn_hidden_dim, state_dim * classes  # of belief, state
        self.belief_in = mlp(rnn_hidden_dim, hidden_dim, 1)
        self.state_in = mlp(state_dim * classes, hidden_dim, 1)
        self.action_in = mlp(action_width(action_spec), hidden_dim, 1)
        self.hidden = BlockLinear(rnn_hidden_dim, rnn_hidden_dim, blocks, shared=3 * hidden_dim)
        self.hidden_norm = nn.Sequential(RMSNorm(rnn_hidden_dim), nn.SiLU())
        self.gates = BlockLinear(rnn_hidden_dim, 3 * rnn_hidden_dim, blocks)
        self.head = mlp(rnn_hidden_dim, hidden_dim, 2, state_dim * classes)

    def recurrence(self, state: Tensor, belief: Tensor, action: Tensor) -> Tensor:
        """(N, S * C), (N, D), (N, A) -> next belief (N, D)."""
        action = action / action.detach().abs().clamp(min=1)  # clips to [-1, 1], keeps a gradient
        shared = [self.belief_in(belief), self.state_in(state), self.action_in(action)]
        x = self.hidden(belief, torch.cat(shared, -1)).flatten(-2)
        gates = self.gates(self.hidden_norm(x)).float()  # (N, blocks, 3 D / blocks)
        reset, candidate, update = gates.chunk(3, -1)  # split inside each block
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)  # at first, -1 favors the old belief
        belief = belief.unflatten(-1, (self.blocks, -1))
        return torch.lerp(belief, candidate, update).flatten(-2)

    def logits(self, belief: Tensor) -> Tensor:
        """(..., D) -> logits (..., S, C) of p(z | h)."""
        return self.head(belief).float().unflatten(-1, (self.state_dim, self.classes))

    def draw_noise(self, *shape: int) -> Tensor:
        """Random numbers (*shape, S, C) for `sample_state`."""
        device = self.gates.bias.device
        return exponential_noise(*shape, self.state_dim, self.classes, device=device)

    def forward(self, state, belief, action, noise=None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, S * C), (N, D), (N, A) -> prior logits (N, S, C), next state and belief."""
        belief = self.recurrence(state, belief, action)
        logits = self.logits(belief)
        return logits, sample_state(logits, self.unimix, noise), belief


class RSSMPosterior(nn.Module):
    """Encoder q(z | h, x), eq. 1, on the embedding of the observation x."""

    def __init__(self, hidden_dim, state_dim, classes=4, *, rnn_hidden_dim, obs_dim, unimix=0.01):
        super().__init__()
        self.state_dim, self.classes, self.unimix = state_dim, classes, unimix
        self.head = mlp(rnn_hidden_dim + obs_dim, hidden_dim, 1, state_dim * classes)

    def forward(self, belief: Tensor, encoded_obs: Tensor, noise=None) -> tuple[Tensor, Tensor]:
        """(N, D), (N, E) -> posterior logits (N, S, C), state (N, S * C)."""
        x = self.head(torch.cat([belief, encoded_obs], -1)).float()
        logits = x.unflatten(-1, (self.state_dim, self.classes))
        return logits, sample_state(logits, self.unimix, noise)


def rssm_step(prior, posterior, state, belief, action, encoded_obs, keep, noise=None):
    """One filtering step; an episode begins where `keep` is 0.

    (N, S * C), (N, D), (N, A), (N, E), (N), (N, S, C) -> state, belief, posterior logits.
    """
    keep = keep[:, None]
    belief = prior.recurrence(state * keep, belief * keep, action * keep)
    logits, state = posterior(belief, encoded_obs, noise)
    return state, belief, logits


class RSSMRollout(nn.Module):
    """Filters a sequence: posterior latents of every step, with resets at `is_first`."""

    def __init__(self, rssm_prior, rssm_posterior, compile_step=False):
        super().__init__()
        self.prior = getattr(rssm_prior, "module", rssm_prior)  # unwrap a TensorDictModule
        self.posterior = getattr(rssm_posterior, "module", rssm_posterior)
        self.step = torch.compile(rssm_step) if compile_step else rssm_step

    def forward(self, td: TensorDictBase, noise: Tensor | None = None) -> TensorDictBase:
        """Adds state, belief and both logits to td[B, T] with encoded_obs and action.

        `previous` holds action and latents before each row; latents count at t = 0 only. Without
        it the actions of td shift by one row and the latents start at zero, as at `is_first`.
        """
        previous, is_first = td.get("previous", None), td.get("is_first", None)
        if previous is None:
            action = F.pad(td["action"][:, :-1], (0, 0, 1, 0))
            belief, state = (action.new_zeros(len(td), size) for size in self.prior.latent_sizes)
        else:
            action = previous["action"]
            belief, state = (previous[k][:, 0].float() for k in ("belief", "state"))
        keep = torch.ones_like(action[..., 0]) if is_first is None else (~is_first).float()
        noise = self.prior.draw_noise(*td.shape) if noise is None else noise
        inputs = action, td["encoded_obs"], keep, noise
        td["state"], td["belief"], td["posterior_logits"] = self.unroll(state, belief, inputs)
        return td.set("prior_logits", self.prior.logits(td["belief"]))

    def unroll(self, state, belief, inputs) -> tuple[Tensor, ...]:
        """Inputs (B, T, ...) of `rssm_step` -> state, belief, posterior logits (B, T, ...)."""
        outputs = []
        for step_inputs in zip(*(x.unbind(1) for x in inputs), strict=True):
            outputs.append(self.step(self.prior, self.posterior, state, belief, *step_inputs))
            state, belief, _ = outputs[-1]
        return tuple(torch.stack(x, 1) for x in zip(*outputs, strict=True))


class ObsEncoder(nn.Module):
    """Observations -> encoded_obs: an MLP for vectors, convolutions for uint8 images (h, w, c).

    `categories` {key: sizes} are the vectors of integers; the MLP sees them as one-hots.
    """

    def __init__(self, shapes: dict, depth: int, units: int, categories: dict | None = None):
        super().__init__()
        sizes = self.categories = categories or {}
        self.vectors = {k: sum(sizes.get(k, s)) for k, s in sorted(shapes.items()) if len(s) == 1}
        self.images = sorted(k for k, s in shapes.items() if len(s) == 3)
        self.encoded_size = units if self.vectors else 0
        if self.vectors:
            self.mlp = mlp(sum(self.vectors.values()), units, 3)
        if self.images:
            depths = [depth * m for m in DEPTH_MULTIPLIERS]
            channels = sum(shapes[k][2] for k in self.images)
            self.convs = nn.ModuleList(map(conv, [channels, *depths[:-1]], depths))
            self.norms = nn.ModuleList(RMSNorm(d) for d in depths)
            height, width = shapes[self.images[0]][:2]
            self.encoded_size += (height // 16) * (width // 16) * depths[-1]

    def embed(self, td: TensorDictBase) -> Tensor:
        """Observations td[*B] -> (*B, E)."""
        embeds = []
        if self.vectors:
            sizes = self.categories
            x = [one_hots(td[k], sizes[k]) if k in sizes else symlog(td[k]) for k in self.vectors]
            embeds.append(self.mlp(torch.cat(x, -1)))
        if self.images:
            x = torch.cat([td[k] for k in self.images], -1).flatten(0, -4)  # (N, h, w, c)
            x = (x.float() / 255 - 0.5).permute(0, 3, 1, 2)  # (N, c, h, w), channels last in memory
            for layer, norm in zip(self.convs, self.norms, strict=True):
                x = F.max_pool2d(layer(x), 2)
                x = F.silu(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            embeds.append(x.permute(0, 2, 3, 1).flatten(1).unflatten(0, td.shape))
        return torch.cat(embeds, -1)

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Adds `encoded_obs` to td[*B]."""
        return td.set("encoded_obs", self.embed(td))


class ObsDecoder(nn.Module):
    """Latents -> {key: prediction}: symlog vectors, images in [0, 1], logits of categories."""

    def __init__(self, shapes, belief_dim, state_size, depth, units, blocks=8, categories=None):
        super().__init__()
        sizes = self.categories = categories or {}
        self.vectors = {k: sum(sizes.get(k, s)) for k, s in sorted(shapes.items()) if len(s) == 1}
        self.images = sorted(k for k, s in shapes.items() if len(s) == 3)
        if self.vectors:
            self.mlp = mlp(state_size + belief_dim, units, 3)
            self.heads = nn.ModuleList(Linear(units, width) for width in self.vectors.values())
        if self.images:
            depths = [depth * m for m in reversed(DEPTH_MULTIPLIERS)]
            height, width = (n // 16 for n in shapes[self.images[0]][:2])
            self.grid = height, width, depths[0]
            self.channels = [shapes[k][2] for k in self.images]
            self.belief_in = BlockLinear(belief_dim, math.prod(self.grid), blocks)
            self.state_in = mlp(state_size, 2 * units, 1, math.prod(self.grid))
            self.norms = nn.ModuleList(RMSNorm(d) for d in depths)
            self.convs = nn.ModuleList(map(conv, depths, [*depths[1:], sum(self.channels)]))

    def forward(self, state: Tensor, belief: Tensor) -> dict[str, Tensor]:
        """(..., S * C), (..., D) -> {key: prediction}."""
        outputs = {}
        if self.vectors:
            x = self.mlp(torch.cat([state, belief], -1))
            outputs |= {k: head(x) for k, head in zip(self.vectors, self.heads, strict=True)}
        if self.images:
            x = self.belief_in(belief.flatten(0, -2)).unflatten(-1, (*self.grid[:2], -1))
            x = x.permute(0, 2, 3, 1, 4).flatten(-2)  # (N, h, w, c)
            x = x + self.state_in(state.flatten(0, -2)).unflatten(-1, self.grid)
            for norm, layer in zip(self.norms, self.convs, strict=True):
                x = F.silu(norm(x)).permute(0, 3, 1, 2)
                x = layer(F.interpolate(x, scale_factor=2, mode="nearest")).permute(0, 2, 3, 1)
            x = torch.sigmoid(x.float()).unflatten(0, belief.shape[:-1])
            outputs.update(zip(self.images, x.split(self.channels, -1), strict=True))
        return outputs


class DreamerActor(nn.Module):
    """Policy on features (..., F): a normal, or one categorical per entry of `classes`.

    Samples are not squashed; the environment clips them. `unimix` is the share of the uniform
    distribution in the categoricals (the paper has 0.01, the authors' current code none).
    """

    def __init__(self, inputs, action_spec, classes: tuple[int, ...] = (), units=64, unimix=0.0):
        super().__init__()
        self.classes, self.unimix = tuple(classes), unimix
        self.action_dim = action_width(action_spec)
        self.mlp = mlp(inputs, units, 3)
        self.head = Linear(units, self.action_dim, outscale=0.01)
        if not self.classes:
            self.std_head = Linear(units, self.action_dim, outscale=0.01)

    def forward(self, feat: "Tensor | TensorDictBase"):
        """Features (..., F) -> action distribution; latents td[*B] -> td with sampled `action`."""
        if isinstance(feat, TensorDictBase):
            distribution = self(features(feat))
            return feat.set("action", distribution.sample(self.draw_noise(*feat.batch_size)))
        x = self.mlp(feat)
        if self.classes:
            logits = self.head(x).float().split(self.classes, -1)
            if self.unimix:
                logits = tuple(unimix_probs(x, self.unimix).log() for x in logits)
            return Categoricals(logits)
        std = 0.1 + 0.9 * torch.sigmoid(self.std_head(x).float() + 2.0)  # between 0.1 and 1
        return BoundedNormal(torch.tanh(self.head(x).float()), std)

    def draw_noise(self, *shape: int) -> Tensor:
        """Random numbers (*shape, A) for the distribution's `sample`."""
        draw = exponential_noise if self.classes else torch.randn
        return draw(*shape, self.action_dim, device=self.head.weight.device)


class BoundedNormal(Independent):
    """Diagonal normal (..., A) whose mean and std are bounded."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__(Normal(mean, std, validate_args=False), 1, validate_args=False)

    def sample(self, noise: Tensor) -> Tensor:
        """noise (..., A) ~ N(0, 1) -> actions, which may leave [-1, 1]."""
        return (self.base_dist.mean + self.base_dist.stddev * noise).detach()


class Categoricals:
    """One categorical per discrete action; an action (..., A) concatenates their one-hots."""

    def __init__(self, logits: tuple[Tensor, ...]):
        self.sizes = [x.shape[-1] for x in logits]
        self.log_probs = torch.cat([x.log_softmax(-1) for x in logits], -1)

    @property
    def mode(self) -> Tensor:
        return self.sample(torch.ones_like(self.log_probs))

    def sample(self, noise: Tensor) -> Tensor:
        """noise (..., A) from `exponential_noise` -> one-hot actions."""
        probs = self.log_probs.detach().exp().split(self.sizes, -1)
        pairs = zip(probs, noise.split(self.sizes, -1), strict=True)
        return torch.cat([sample_one_hot(*pair) for pair in pairs], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        return (self.log_probs * action).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


def features(latent: TensorDictBase) -> Tensor:
    """Latents td[*B] -> (*B, F), the input of heads, actor and critic."""
    return torch.cat([latent["belief"], latent["state"]], -1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continuation heads; action_spec: spec or A."""

    def __init__(self, shapes: dict, action_spec, args: Args, categories: dict | None = None):
        super().__init__()
        sizes = dict(hidden_dim=args.hidden, rnn_hidden_dim=args.deter, state_dim=args.stoch)
        sizes |= dict(classes=args.classes, unimix=args.unimix)
        self.encoder = ObsEncoder(shapes, args.depth, args.units, categories)
        self.prior = RSSMPrior(action_spec, blocks=args.blocks, **sizes)
        self.posterior = RSSMPosterior(obs_dim=self.encoder.encoded_size, **sizes)
        self.rollout = RSSMRollout(self.prior, self.posterior, compile_step=args.compile == "yes")
        rest = args.depth, args.units, args.blocks, categories
        self.decoder = ObsDecoder(shapes, *self.prior.latent_sizes, *rest)
        self.feat_size = sum(self.prior.latent_sizes)
        self.reward = mlp(self.feat_size, args.units, 1, BINS, outscale=0.0)
        self.cont = mlp(self.feat_size, args.units, 1, outputs=1)
        self.register_buffer("bins", two_hot_bins(BINS), persistent=False)

    def forward(self, td: TensorDictBase, noise: Tensor | None = None) -> TensorDictBase:
        """Adds latents and logits to rows td[B, T]; see RSSMRollout."""
        return self.rollout(self.encoder(td), noise)

    def predict_reward(self, feat: Tensor) -> Tensor:
        """Expected reward (...) at feat (..., F)."""
        return two_hot_decode(self.reward(feat), self.bins)

    def predict_continue(self, feat: Tensor) -> Tensor:
        """Probability (...) that the episode goes on after feat (..., F), discount included."""
        return self.cont(feat).float().squeeze(-1).sigmoid()


# --- losses -------------------------------------------------------------------------------------


def kl_losses(posterior_logits, prior_logits, unimix: float, free_nats: float):
    """Dynamics and representation losses (B, T), eq. 3, clamped after the sum over S."""
    dynamic = categorical_kl(posterior_logits.detach(), prior_logits, unimix)
    representation = categorical_kl(posterior_logits, prior_logits.detach(), unimix)
    return dynamic.clamp(min=free_nats), representation.clamp(min=free_nats)


def reconstruction_loss(decoder: ObsDecoder, td: TensorDictBase) -> Tensor:
    """Summed squared error (B, T) of symlog vectors and pixels / 255: eq. 8 without its 1/2.

    Of categories it is the cross entropy.
    """
    loss = 0.0
    for key, predicted in decoder(td["state"], td["belief"]).items():
        if sizes := decoder.categories.get(key):
            categoricals = Categoricals(predicted.float().split(sizes, -1))
            loss = loss - categoricals.log_prob(one_hots(td[key], sizes))
            continue
        target = td[key].float() / 255 if td[key].dtype == torch.uint8 else symlog(td[key])
        loss = loss + (predicted.float() - target).square().flatten(2).sum(-1)
    return loss


def reward_loss(head: nn.Module, feat: Tensor, reward: Tensor, bins: Tensor) -> Tensor:
    """Two-hot cross entropy (B, T)."""
    return two_hot_loss(head(feat), reward, bins)


def continue_loss(head: nn.Module, feat: Tensor, is_terminal: Tensor, horizon: int) -> Tensor:
    """Binary cross entropy (B, T); the target is the discount 1 - 1/horizon, 0 at terminals."""
    target = (~is_terminal).float() * (1 - 1 / horizon)
    logits = head(feat).float().squeeze(-1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class DreamerV3ModelLoss(nn.Module):
    """World model loss, eq. 2-3: reconstruction, reward, continuation, dynamics, representation."""

    def __init__(self, world_model: WorldModel, *, lambda_reco=1.0, lambda_reward=1.0,
                 lambda_continue=1.0, lambda_dynamic=1.0, lambda_representation=0.1,
                 free_nats=1.0, horizon=333):  # fmt: skip
        super().__init__()
        self.world_model, self.free_nats, self.horizon = world_model, free_nats, horizon
        self.lambda_reco, self.lambda_reward = lambda_reco, lambda_reward
        self.lambda_continue, self.lambda_dynamic = lambda_continue, lambda_dynamic
        self.lambda_representation = lambda_representation

    def forward(self, td: TensorDictBase, noise: Tensor | None = None):
        """Rows td[B, T], with or without latents -> scalar losses, td with latents and logits."""
        model = self.world_model
        td = td if "posterior_logits" in td.keys() else model(td, noise)
        feat, posterior, prior = features(td), td["posterior_logits"], td["prior_logits"]
        reco = reconstruction_loss(model.decoder, td)
        reward = reward_loss(model.reward, feat, td["reward"], model.bins)
        cont = continue_loss(model.cont, feat, td["is_terminal"], self.horizon)
        dynamic, representation = kl_losses(posterior, prior, model.prior.unimix, self.free_nats)
        losses = TensorDict(
            loss_model_reco=self.lambda_reco * reco.mean(),
            loss_model_reward=self.lambda_reward * reward.mean(),
            loss_model_continue=self.lambda_continue * cont.mean(),
            loss_model_dynamic=self.lambda_dynamic * dynamic.mean(),
            loss_model_representation=self.lambda_representation * representation.mean(),
        )
        return losses, td


def dream_step(actor, prior, feat, action_noise, state_noise) -> tuple[Tensor, Tensor]:
    """One imagined step from feat (N, F): action (N, A), next feat (N, F)."""
    belief, state = feat.split(prior.latent_sizes, -1)
    action = actor(feat).sample(action_noise)
    _, state, belief = prior(state, belief, action, state_noise)
    return action, torch.cat([belief, state], -1)


def predict_outcome(world_model: WorldModel, feat: Tensor) -> tuple[Tensor, Tensor]:
    """Imagined reward and continuation probability (...) at feat (..., F)."""
    return world_model.predict_reward(feat), world_model.predict_continue(feat)


def predict_value(value: nn.Module, feat: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's logits (..., num_bins) and, without gradient, its value (...)."""
    logits = value(feat)
    return logits, two_hot_decode(logits.detach(), bins)


def log_prob_and_entropy(actor, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the action and entropy of the policy (...), in nats."""
    distribution = actor(feat)
    return distribution.log_prob(action), distribution.entropy()


class DreamerV3ActorLoss(nn.Module):
    """Trains the actor by REINFORCE on the lambda-returns of dreams, eq. 6-7.

    Advantages are divided by max(1, high - low), where low and high are moving averages of the
    returns' 5th and 95th percentiles, updated before use in training mode.
    """

    def __init__(self, actor_model: DreamerActor, value_model: nn.Module,
                 model_based_env: "DreamerEnv", *, imagination_horizon=15, discount_loss=True,
                 lam=0.95, entropy_bonus=3e-4):  # fmt: skip
        super().__init__()
        self.actor, self.value, self.env = actor_model, value_model, model_based_env
        self.imagination_horizon, self.lam = imagination_horizon, lam
        self.discount_loss, self.entropy_bonus = discount_loss, entropy_bonus
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("quantiles", torch.tensor([0.05, 0.95]))

    def forward(self, td: TensorDictBase, noise: TensorDictBase | None = None):
        """N latents td[*B] -> loss_actor, and the dream[N, H + 1] from them; td gets no gradient.

        The dream has `feat`, `action`, `reward`, `continue`, `weight`, `value_logits`, `value`,
        `entropy`, `lambda_target`. At its last step, action and target are zeros.
        """
        model = self.env.world_model
        with torch.no_grad():
            dream = self.imagine(features(td).flatten(0, -2), noise)
            dream["reward"], dream["continue"] = predict_outcome(model, dream["feat"])
            weight = dream["continue"].cumprod(1)
            dream["weight"] = weight if self.discount_loss else torch.ones_like(weight)
        dream["value_logits"], value = predict_value(self.value, dream["feat"], model.bins)
        last, terminal = torch.zeros_like(value), 1 - dream["continue"]  # discount is in continue
        returns = lambda_return(dream["reward"], value, last, terminal, 1.0, self.lam)
        advantage = (returns - value[:, :-1]) / self.return_scale(returns)
        log_prob, entropy = log_prob_and_entropy(self.actor, dream["feat"], dream["action"])
        objective = log_prob[:, :-1] * advantage + self.entropy_bonus * entropy[:, :-1]
        dream["lambda_target"] = F.pad(returns, (0, 1))
        dream["value"], dream["entropy"] = value, entropy.detach()
        return TensorDict(loss_actor=-(dream["weight"][:, :-1] * objective).mean()), dream

    def imagine(self, feat: Tensor, noise: TensorDictBase | None = None) -> TensorDict:
        """Start feat (N, F) -> dream[N, H + 1] with `feat` and `action`."""
        noise = self.draw_noise(len(feat)) if noise is None else noise
        feats, actions, prior = [feat], [], self.env.world_model.prior
        for step_noise in zip(noise["action"].unbind(1), noise["state"].unbind(1), strict=True):
            action, feat = dream_step(self.actor, prior, feat, *step_noise)
            feats.append(feat)
            actions.append(action)
        action = F.pad(torch.stack(actions, 1), (0, 0, 0, 1))
        return TensorDict(feat=torch.stack(feats, 1), action=action, batch_size=action.shape[:2])

    def draw_noise(self, n: int) -> TensorDict:
        """Random numbers for n dreams: action (n, H, A), state (n, H, S, C)."""
        size = n, self.imagination_horizon
        action, state = self.actor.draw_noise(*size), self.env.world_model.prior.draw_noise(*size)
        return TensorDict(action=action, state=state, batch_size=size)

    def return_scale(self, returns: Tensor) -> Tensor:
        """max(1, high - low); training mode first updates both averages."""
        if self.training:
            low, high = torch.quantile(gather_ranks(returns.flatten()), self.quantiles)
            self.low.lerp_(low, 0.01)
            self.high.lerp_(high, 0.01)
        return (self.high - self.low).clamp(min=1.0)


def critic_loss(logits, target, feat, slow_value: nn.Module, bins: Tensor) -> Tensor:
    """Cross entropy (...) of logits with target, plus that with the slow critic's value."""
    with torch.no_grad():
        slow = two_hot_decode(slow_value(feat), bins)  # keeps the critic near its moving average
    return two_hot_loss(logits, target.detach(), bins) + two_hot_loss(logits, slow, bins)


class DreamerV3ValueLoss(nn.Module):
    """Critic loss, eq. 5, on imagined returns and, in `replay`, on returns of replayed rows."""

    def __init__(self, value_model, slow_value_model, *, lam=0.95, lambda_replay=0.3, horizon=333):
        super().__init__()
        self.value, self.slow_value = value_model, slow_value_model
        self.lam, self.horizon, self.lambda_replay = lam, horizon, lambda_replay
        self.register_buffer("bins", two_hot_bins(BINS), persistent=False)

    def forward(self, dream: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        """dream[N, H + 1] of DreamerV3ActorLoss; its last state, without target, does not count."""
        logits, target = dream["value_logits"], dream["lambda_target"]
        error = critic_loss(logits, target, dream["feat"], self.slow_value, self.bins)
        return TensorDict(loss_value=(dream["weight"] * error)[:, :-1].mean()), dream

    def replay(self, td: TensorDictBase, boot: Tensor) -> tuple[TensorDict, TensorDictBase]:
        """td[B, T] of DreamerV3ModelLoss, boot (B, T) the imagined return from each row."""
        last, terminal, discount = td["is_last"], td["is_terminal"], 1 - 1 / self.horizon
        returns = lambda_return(td["reward"], boot, last, terminal, discount, self.lam)
        feat = features(td)[:, :-1]  # its gradient reaches the world model
        weight = (~last[:, :-1]).float()
        error = critic_loss(self.value(feat), returns, feat.detach(), self.slow_value, self.bins)
        return TensorDict(loss_replay_value=self.lambda_replay * (weight * error).mean()), td


COMPILED = (kl_losses, reconstruction_loss, reward_loss, continue_loss, dream_step,
            predict_outcome, predict_value, log_prob_and_entropy, critic_loss)  # fmt: skip

# --- imagination environment --------------------------------------------------------------------


class DreamerEnv(ModelBasedEnvBase):
    """Steps inside the world model: latents and action -> next latents, reward, continuation."""

    def __init__(self, world_model, prior_shape, belief_shape, device=None, batch_size=()):
        shapes = {"belief": tuple(belief_shape), "state": tuple(prior_shape)}
        super().__init__(world_model, shapes, device, batch_size)

    def _step(self, td: TensorDictBase) -> TensorDict:
        """Latents and `action` [N] -> next latents with `reward` and `continue`."""
        _, state, belief = self.world_model.prior(td["state"], td["belief"], td["action"])
        latent = TensorDict(belief=belief, state=state, batch_size=td.batch_size)
        latent["reward"], latent["continue"] = predict_outcome(self.world_model, features(latent))
        return latent


class DreamerDecoder(nn.Module):
    """Adds decoded observations to latents td[*B] or to a rollout, in the environment's units."""

    def __init__(self, world_model: WorldModel):
        super().__init__()
        self.world_model = world_model

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Vectors (*B, n), uint8 images, the likeliest categories (*B, K); under "next" as well."""
        decoder = self.world_model.decoder
        for key, value in decoder(td["state"], td["belief"]).items():
            if sizes := decoder.categories.get(key):
                td[key] = torch.stack([x.argmax(-1) for x in value.split(sizes, -1)], -1).int()
                continue
            image = key in decoder.images
            td[key] = (value * 255).round().byte() if image else symexp(value.float())
        return td.set("next", self(td["next"])) if "next" in td.keys() else td


# --- acting and updating ------------------------------------------------------------------------


class LaProp(torch.optim.Optimizer):
    """Adaptive gradient clipping (AGC), RMS normalization, then momentum.

    Over `warmup` updates the rate rises linearly from 0 to lr; by update `anneal`, if that is not
    0, it has fallen linearly to lr / 10.

    AGC limits each tensor's gradient norm to `clip` times its weight norm. Unlike in Adam, momentum
    averages gradients that are already normalized (LaProp, Ziyin et al., 2020).
    """

    def __init__(self, params, lr=4e-5, clip=0.3, beta1=0.9, beta2=0.999, eps=1e-20, warmup=1000,
                 anneal=0):  # fmt: skip
        super().__init__(params, dict(lr=lr))
        self.clip, self.beta1, self.beta2, self.eps = clip, beta1, beta2, eps
        self.warmup, self.anneal = warmup, anneal
        params = self.param_groups[0]["params"]
        for p in params:
            self.state[p] = {"rms": torch.zeros_like(p), "momentum": torch.zeros_like(p)}
        self.state[params[0]]["updates"] = params[0].new_zeros(())  # a tensor, for CUDA graphs

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        params, lr = group["params"], group["lr"]
        updates = self.state[params[0]]["updates"]
        rms = [self.state[p]["rms"] for p in params]
        momentum = [self.state[p]["momentum"] for p in params]
        if self.warmup:
            lr = lr * (updates / self.warmup).clamp(max=1.0)
        if self.anneal:
            share = (updates - self.warmup) / (self.anneal - self.warmup)
            lr = lr * (1 - 0.9 * share.clamp(0.0, 1.0))
        updates.add_(1)
        grads = self.clipped_grads(params)
        torch._foreach_mul_(rms, self.beta2)
        torch._foreach_addcmul_(rms, grads, grads, 1 - self.beta2)
        scale = torch._foreach_div(rms, 1 - self.beta2**updates)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, self.eps)
        torch._foreach_div_(grads, scale)
        torch._foreach_lerp_(momentum, grads, 1 - self.beta1)
        update = torch._foreach_mul(momentum, -lr / (1 - self.beta1**updates))
        torch._foreach_add_(params, update)

    def clipped_grads(self, params: list[Tensor]) -> list[Tensor]:
        """Gradients after AGC."""
        grads = [p.grad for p in params]
        weight_norms = torch._foreach_clamp_min(torch._foreach_norm(params), 1e-3)
        limits = torch._foreach_mul(weight_norms, self.clip)
        ratios = torch._foreach_div(torch._foreach_norm(grads), limits)
        return torch._foreach_div(grads, torch._foreach_clamp_min(ratios, 1.0))


class Ratio:
    """ratio(step) -> updates owed: 1 at first, then `ratio` per step, fractions carried over."""

    def __init__(self, ratio: float):
        self.ratio, self.last = ratio, None

    def __call__(self, step: int) -> int:
        if not self.ratio:
            return 0
        first = self.last is None
        updates = 1 if first else int((step - self.last) * self.ratio)
        self.last = step if first else self.last + updates / self.ratio
        return updates

    def state_dict(self) -> dict:
        return {"last": self.last}

    def load_state_dict(self, state: dict):
        self.last = state["last"]


class Agent:
    """World model, actor, critic. spec: `shapes`, `categories`, `action_dim`, action `classes`."""

    def __init__(self, spec: dict, args: Args, device: torch.device | str = "cpu"):
        self.spec, self.args, self.device = spec, args, torch.device(device)
        with self.device:
            action_dim, classes = spec["action_dim"], spec["classes"]
            inputs = spec["shapes"], action_dim, args, spec["categories"]
            self.world_model = model = WorldModel(*inputs)
            self.actor = DreamerActor(model.feat_size, action_dim, classes, args.units)
            self.value = mlp(model.feat_size, args.units, 3, BINS, outscale=0.0)
            self.slow_value = copy.deepcopy(self.value).requires_grad_(False)
            belief_dim, state_size = model.prior.latent_sizes
            self.env = DreamerEnv(model, prior_shape=(state_size,), belief_shape=(belief_dim,))
            self.actor_loss = DreamerV3ActorLoss(
                self.actor, self.value, self.env, imagination_horizon=args.imagination_horizon,
                lam=args.lam, entropy_bonus=args.entropy_bonus,
            )  # fmt: skip
            options = dict(lam=args.lam, horizon=args.horizon)
            self.value_loss = DreamerV3ValueLoss(self.value, self.slow_value, **options)
        self.model_loss = DreamerV3ModelLoss(model, free_nats=args.free_nats, horizon=args.horizon)
        self.modules = {"world_model": model, "actor": self.actor, "value": self.value}
        params = [p for module in self.modules.values() for p in module.parameters()]
        options = dict(lr=args.lr, clip=args.clip, warmup=args.warmup, anneal=args.anneal)
        self.optimizer = LaProp(params, **options)
        self.stateful = {**self.modules, "slow_value": self.slow_value, "optimizer": self.optimizer}
        if args.compile == "yes":  # for the whole process; RSSMRollout compiles its own step
            globals().update({f.__name__: torch.compile(f, dynamic=False) for f in COMPILED})
        if args.compile == "yes" and self.device.type == "cuda":
            self.update = CudaGraphModule(self.update, warmup=3)  # possible: update never syncs

    def initial(self, num_envs: int) -> TensorDict:
        """Latents and action before the first row, [N]; a row with is_first ignores them."""
        shapes = self.env.shapes | {"action": (self.spec["action_dim"],)}
        zeros = {k: torch.zeros(num_envs, *s, device=self.device) for k, s in shapes.items()}
        return TensorDict(zeros, [num_envs])

    @torch.no_grad()
    def act(self, rows: TensorDict, latent: TensorDict | None = None, sample: bool = True):
        """Rows[N] and the previous latent[N] -> latent[N] with its `action` (N, A).

        `sample=False` takes the policy's mode; the authors' scores use sampling.
        """
        rows, model = rows.to(self.device), self.world_model
        latent = self.initial(len(rows)) if latent is None else latent
        with autocast(self):
            before = latent["state"], latent["belief"], latent["action"]
            encoded_obs, keep = model.encoder.embed(rows), (~rows["is_first"]).float()
            state, belief, _ = rssm_step(model.prior, model.posterior, *before, encoded_obs, keep)
            latent = TensorDict(belief=belief, state=state, batch_size=rows.batch_size)
            policy = self.actor(features(latent))
        action = policy.sample(self.actor.draw_noise(len(rows))) if sample else policy.mode
        return latent.set("action", action * (~rows["is_last"]).float()[:, None])

    def update(self, batch: TensorDict, noise: dict | None = None) -> tuple[dict, TensorDict]:
        """One update of all networks: batch [B, T] -> 0-dim metrics, latents [B, T] for replay."""
        noise = noise or {}  # with it, tests replace the random numbers
        with autocast(self):
            losses, td = self.model_loss(batch.copy(), noise.get("posterior"))
            starts = td[:, -self.args.imag_last :]
            actor_losses, dream = self.actor_loss(starts, noise.get("dream"))
            value_losses, _ = self.value_loss(dream)
            boot = dream["lambda_target"][:, 0].unflatten(0, starts.shape)
            replay_losses, _ = self.value_loss.replay(starts, boot)
        losses.update(actor_losses).update(value_losses).update(replay_losses)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        grads = [p.grad for p in self.optimizer.param_groups[0]["params"]]
        mean_over_ranks_(grads)
        losses["grad_norm"] = nn.utils.get_total_norm(grads)
        self.optimizer.step()
        with torch.no_grad():
            slow, fast = list(self.slow_value.parameters()), list(self.value.parameters())
            torch._foreach_lerp_(slow, fast, self.args.slow_rate)
        return self.metrics(losses, td, dream), td.select("belief", "state").detach()

    @torch.no_grad()
    def metrics(self, losses: TensorDict, td: TensorDict, dream: TensorDict) -> dict:
        """Metrics as 0-dim tensors (no host synchronization), explained in docs/dreamer_v3.md."""
        prior = unimix_probs(td["prior_logits"], self.args.unimix)
        return {
            **{f"train/{name}": value.detach() for name, value in losses.items()},
            **{f"dream/{k}": dream[k].mean() for k in ("reward", "value", "continue", "entropy")},
            "dream/return": dream["lambda_target"][:, :-1].mean(),
            "dream/return_range": self.actor_loss.high - self.actor_loss.low,
            "train/prior_entropy": -(prior * prior.log()).sum((-2, -1)).mean(),
        }

    def stored_rows(self, rows: TensorDict, latent: TensorDict) -> TensorDict:
        """Rows[N] as the replay stores them: with the chosen action and compact latents."""
        stored = dict(belief=latent["belief"].half(), state=latent["state"].byte())
        return rows.copy().update({**stored, "action": latent["action"]}).cpu()

    def state_dict(self) -> dict:
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        state |= {"low": self.actor_loss.low, "high": self.actor_loss.high}
        return {**state, "spec": self.spec, "args": asdict(self.args)}

    def load_state_dict(self, state: dict):
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])
        self.actor_loss.low.copy_(state["low"])
        self.actor_loss.high.copy_(state["high"])


def load(run: str | Path, device: torch.device | str = "cpu") -> Agent:
    """The trained agent of a run folder, ready to `act`; RunError if there is no checkpoint."""
    return load_agent(run, SCRIPT, Args, Agent, device)


# --- main ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    updates_per_row = args.train_ratio / (args.batch_size * args.batch_length)
    device = prepare(SCRIPT, args, args.steps / args.action_repeat * updates_per_row)
    if args.benchmark:
        from tools.benchmark import benchmark  # only --benchmark needs it

        return benchmark(Agent, args, device, updates_per_row)
    if args.eval:
        return evaluate_run(load(args.eval, device), args)

    envs = make_envs(args)
    print(*envs.notes, sep="\n")
    agent = Agent(envs.spec, args, device)
    example = agent.stored_rows(example_rows(agent.spec), agent.initial(1))[0]
    check_room(args, example, run_folder(SCRIPT, args))
    with Run(SCRIPT, args, agent) as run:
        replay = make_replay(args, example, run.folder, online=True)
        ratio = Ratio(updates_per_row)
        latent = run.resume(agent.initial(envs.num_envs), envs=envs, replay=replay, ratio=ratio)

        while run.training(latent):
            if not run.owed:  # resumed runs first do owed updates
                rows = envs.step(latent["action"])
                latent = agent.act(rows, latent)
                replay.append(agent.stored_rows(rows, latent))
                run.count(rows)
                run.owe(ratio(run.step // args.action_repeat) if replay.ready else 0)
            for batch in run.batches(replay):
                metrics, latents = agent.update(batch)
                replay.write_back(batch, latents)
                run.add(metrics)
        run.finish()


if __name__ == "__main__":
    launch(main)
