"""Dreamer (Hafner et al., 2020): learn a world model, improve the policy by gradients through it.

    python dreamer.py                 # Pendulum-v1, 10,000 steps: about -190 (random: -1,233)
    python dreamer.py --preset dmc_vision --env-id dm_control/walker-walk-v0    # the paper's recipe
    python dreamer.py --preset debug                                 # everything tiny
    python dreamer.py --eval runs/dreamer/Pendulum-v1/seed0    # play, film, dream
    python dreamer.py --preset dmc_vision --benchmark                # how long would it take here?

The same command again resumes the run; --fresh starts over. A run folder holds args.json,
metrics.jsonl, checkpoint.pt, replay/, tensorboard/, learning_curve.png, dream pictures and videos.

The algorithm is the authors' TF2 code (danijar/dreamer at 56d4d44). Deviations, all deliberate:
- Vectors are observations too: an MLP of three layers encodes them, another one decodes them.
- The mode of the policy is right for any number of environments; the authors' for one only.
- Steps count the reset row of an episode, as in the other scripts.
- The prefill ends at its step, not with an episode, which then goes on under the policy.
- A window may come from any finished episode at once, not from those of the last rescan.
- With --pcont the last window of an episode is drawn, too: only it holds the terminal row.
- Adam's epsilon is added after the bias correction (torch), not before it (TensorFlow).
- By default everything is float32 on a CPU; on CUDA, matrix products are bfloat16 (autocast), but
  for those of the GRU. Gradients that are not finite end the run; the authors skip that step.
- No update is made before the first burst; the authors' code makes one as it builds the model,
  and plays an evaluation as the prefill ends.
- A dream's context is a quarter of its rows, not five rows. Options that their recipe leaves off
  are left out: balanced sampling, clipped rewards, decaying exploration, noise in evaluations.
- In Atari, losing a life ends nothing and sticky actions are off without --sticky; frames and
  no-ops are gymnasium's AtariPreprocessing.
- Without a GPU, MuJoCo is drawn without shadows and anti-aliasing (--render-quality).

Shapes: B batch, T time, H horizon, N any batch (environments, B, or B * T dreams), A action,
D deter, S stoch, F = S + D features, E embedding. Batch first, time second, everywhere. Equations
are numbered as in arXiv 1912.01603v3.
"""

import contextlib
import dataclasses
import itertools
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
from torch.profiler import record_function

from common import checkpoint, parallel
from common.checkpoint import Every, RunError, Stop
from common.envs import example_rows, make_envs, usual_quality
from common.evaluation import benchmark, draw_dreams, evaluate, finish, posteriors, show
from common.imagination import ModelBasedEnvBase
from common.logger import Logger, check_finite, plot_curve
from common.replay import make_replay

PHASES = ("world model", "dreams", "value", "backward", "optimisers")  # of an update
MAY_CHANGE = ("steps", "log_every", "eval_every", "dream_every", "eval_episodes", "tensorboard")
MAY_CHANGE += ("device", "threads", "compile", "env_workers")


@dataclass
class Args:
    """Flags. What a preset does not set is the authors' setting for DM Control from pixels."""

    preset: Literal["default", "dmc_vision", "debug"] = (
        "default"  # all that a benchmark fixes; other flags override it
    )
    env_id: str = "dm_control/walker-walk-v0"  # any gymnasium id, also my_module:MyEnv-v0
    steps: int = 5_000_000  # environment steps, with action repeat and reset rows
    seed: int = 0  # of networks, noise, replay and environments

    # the run

    run: str = ""  # folder; empty: runs/dreamer/<env>/seed<seed>
    fresh: bool = False  # delete what the run folder holds and start over
    eval: str = ""  # run folder: play its policy, as trained but for --eval-episodes and --device
    eval_episodes: int = 5  # played at the end, and by --eval
    eval_every: int = 10_000  # environment steps between single episodes of the policy's mode
    benchmark: bool = False  # time the updates of these settings instead of training
    device: str = ""  # empty: cuda if there is one, else cpu
    threads: int = 0  # of torch and numpy on the CPU; 0: their choice
    compile: bool = False  # torch.compile: faster after a minute or two; on CUDA one graph as well
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; bf16 on CUDA
    tensorboard: bool = True  # mirror the metrics to TensorBoard
    log_every: int = 1_000  # environment steps between lines in metrics.jsonl
    save_every: int = 10_000  # environment steps between checkpoints
    dream_every: int = 25_000  # environment steps between pictures of dreams

    # environment

    num_envs: int = 1  # stepped together
    env_workers: bool = False  # a process for each environment
    action_repeat: int = 2  # environment steps per action
    obs: Literal["auto", "vector", "pixels", "both"] = "auto"  # pixels: rendered if need be
    sticky: bool = False  # Atari: 25 % repeated actions and all 18 actions
    camera: int = -1  # of MuJoCo; -1: the usual one
    render_quality: Literal["auto", "fast", "full"] = "auto"  # fast: no shadows, no antialiasing

    # replay and schedule

    prefill: int = 5_000  # environment steps of random actions
    batch_size: int = 50  # windows per update
    batch_length: int = 50  # rows per window, all of one episode
    train_every: int = 1_000  # environment steps between bursts of updates, at its multiples
    train_steps: int = 100  # updates in a burst
    pretrain: int = 100  # updates in the first burst, instead of train_steps
    replay_size: int = 5_000_000  # rows; no more than `steps` need is allocated

    # world model

    deter: int = 200  # width of the recurrent state
    hidden: int = 200  # width of the layers around it
    stoch: int = 30  # width of the Gaussian latent
    depth: int = 32  # channels of the convolutions, times 1, 2, 4, 8
    units: int = 400  # width of heads, actor and value, and of the MLPs for vectors
    free_nats: float = 3.0  # a KL below this is not penalised
    kl_scale: float = 1.0  # of the KL in the model loss
    pcont: bool = False  # predict whether the episode goes on; needed where it can end early
    pcont_scale: float = 10.0  # of that prediction's loss

    # behaviour

    imagination_horizon: int = 15  # imagined steps
    gamma: float = 0.99  # discount per action
    lam: float = 0.95  # of the lambda-returns
    init_std: float = 5.0  # of the policy before its tanh, at first
    expl_amount: float = 0.3  # deviation of the noise, or share of random discrete actions

    # optimisers

    model_lr: float = 6e-4
    actor_lr: float = 8e-5
    value_lr: float = 8e-5
    clip: float = 100.0  # gradient norm of each of the three


# fmt: off
PRESETS = {
    "default": dict(  # teaches in one sitting on two cores; not the authors' recipe
        env_id="Pendulum-v1", steps=10_000, prefill=2000, batch_size=16, batch_length=25,
        train_every=20, train_steps=5, deter=128, hidden=128, units=128, free_nats=1.0,
        kl_scale=0.1, gamma=0.95, init_std=1.0, model_lr=1e-3, actor_lr=1e-4, value_lr=1e-3,
        save_every=2000, eval_every=1000, dream_every=5000, eval_episodes=10, threads=1),
    "dmc_vision": dict(env_id="dm_control/walker-walk-v0", obs="pixels"),
    "debug": dict(
        env_id="Pendulum-v1", steps=1000, num_envs=2, prefill=400, batch_size=4, batch_length=8,
        train_every=50, train_steps=2, pretrain=4, deter=16, hidden=16, stoch=4, depth=2, units=16,
        imagination_horizon=4, eval_episodes=1, log_every=50, save_every=100, eval_every=500,
        dream_every=500),
}
# fmt: on


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags -> Args: a flag beats the preset, which beats the defaults."""
    chosen = tyro.cli(Args, args=argv, description=__doc__)  # for --preset and --help
    default = Args(**PRESETS[chosen.preset] | {"preset": chosen.preset})
    return tyro.cli(Args, default=default, args=argv, description=__doc__)


def check(args: Args) -> torch.device:
    """The device of a run; RunError that names the flag for values that cannot work."""
    if parallel.size() > 1 and (args.eval or args.benchmark):
        raise RunError("--eval and --benchmark run in one process: without torchrun")
    counts = "num_envs steps action_repeat batch_size batch_length eval_episodes save_every depth"
    counts += " train_every train_steps pretrain imagination_horizon deter hidden stoch units"
    for name in counts.split():
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1")
    if args.pcont and args.batch_length < 2:
        raise RunError("--pcont needs a --batch-length of at least 2: no dream starts at the last")
    if args.imagination_horizon < 2:
        raise RunError("--imagination-horizon must be at least 2: the last state has no return")
    rates = args.model_lr, args.actor_lr, args.value_lr
    if not all(value > 0 for value in (*rates, args.clip, args.init_std)):
        raise RunError("--model-lr, --actor-lr, --value-lr, --clip, --init-std must be positive")
    if min(args.kl_scale, args.pcont_scale, args.free_nats) < 0:
        raise RunError("--kl-scale, --pcont-scale and --free-nats must not be negative")
    if not (0 < args.gamma <= 1 and 0 <= args.lam <= 1):
        raise RunError("--gamma must be in (0, 1], --lam in [0, 1]")
    if min(args.seed, args.threads, args.prefill, args.expl_amount) < 0:
        raise RunError("--seed, --threads, --prefill and --expl-amount must not be negative")
    return checkpoint.pick_device(args.device)


# --- maths --------------------------------------------------------------------------------------


def gaussian_kl(p_mean: Tensor, p_std: Tensor, q_mean: Tensor, q_std: Tensor) -> Tensor:
    """KL(p || q) in nats of diagonal Gaussians, summed: (..., S) -> (...)."""
    ratio = (p_std / q_std).square()
    return 0.5 * (ratio + ((p_mean - q_mean) / q_std).square() - 1 - ratio.log()).sum(-1)


def distance(predicted: Tensor, target: Tensor, kind: str) -> Tensor:
    """Loss of each number: "normal" is -log N(target; predicted, 1) in nats, "l2" has no 1/2."""
    if kind == "normal":
        return 0.5 * (predicted - target).square() + 0.5 * math.log(2 * math.pi)
    losses = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
    if kind not in losses:
        raise ValueError(f"no loss {kind!r}: there are normal, {', '.join(losses)}")
    return losses[kind](predicted, target, reduction="none")


def lambda_return(reward: Tensor, value: Tensor, pcont: Tensor, lam: float) -> Tensor:
    """lambda-returns of eq. 6, all inputs (N, H), output (N, H - 1).

    V_t = r_t + pcont_t ((1 - lam) v_t+1 + lam V_t+1) with V_H-1 = v_H-1: unlike in DreamerV3 the
    reward is that of the same state.
    """
    returns = [value[:, -1]]
    for t in reversed(range(reward.shape[1] - 1)):
        mixed = (1 - lam) * value[:, t + 1] + lam * returns[-1]
        returns.append(reward[:, t] + pcont[:, t] * mixed)
    return torch.stack(returns[:0:-1], 1)


# --- networks -----------------------------------------------------------------------------------


def keras_init_(module: nn.Module) -> None:
    """For Module.apply: Glorot-uniform weights, orthogonal recurrent weights, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GRUCell):
        nn.init.xavier_uniform_(module.weight_ih)
        nn.init.orthogonal_(module.weight_hh)
        nn.init.zeros_(module.bias_ih)
        nn.init.zeros_(module.bias_hh)


def mlp(inputs: int, units: int, layers: int, outputs: int) -> nn.Sequential:
    """`layers` x (Linear, ELU), then Linear."""
    modules = []
    for i in range(layers):
        modules += [nn.Linear(units if i else inputs, units), nn.ELU()]
    return nn.Sequential(*modules, nn.Linear(units, outputs))


def mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2 S) -> mean and deviation (..., S) of a latent; the floor keeps the KL finite."""
    mean, std = x.float().chunk(2, -1)
    return mean, F.softplus(std) + 0.1


class RSSMPrior(nn.Module):
    """Transition model p(s' | s, a): deter' = GRU(deter; stoch, action), stoch' ~ N(mean, std)."""

    def __init__(self, action_dim: int, deter: int, hidden: int, stoch: int):
        super().__init__()
        self.stoch = stoch
        self.inputs = nn.Sequential(nn.Linear(stoch + action_dim, hidden), nn.ELU())
        self.cell = nn.GRUCell(hidden, deter)
        self.head = mlp(deter, hidden, 1, 2 * stoch)

    def core(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """(N, D), (N, S), (N, A) -> next deter (N, D)."""
        x = self.inputs(torch.cat([stoch, action], -1))
        with torch.autocast(x.device.type, enabled=False):  # the memory stays float32
            return self.cell(x.float(), deter)

    def moments(self, deter: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> mean, std (..., S) of p(stoch | deter)."""
        return mean_std(self.head(deter))

    def forward(self, deter, stoch, action, noise) -> tuple[Tensor, Tensor]:
        """One imagined step: (N, D), (N, S), (N, A), (N, S) ~ N(0, 1) -> next deter, stoch."""
        deter = self.core(deter, stoch, action)
        mean, std = self.moments(deter)
        return deter, mean + std * noise


class RSSMPosterior(nn.Module):
    """Representation model q(stoch | deter, observation)."""

    def __init__(self, embed: int, deter: int, hidden: int, stoch: int):
        super().__init__()
        self.head = mlp(deter + embed, hidden, 1, 2 * stoch)

    def forward(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D), (N, E) -> mean, std (N, S)."""
        return mean_std(self.head(torch.cat([deter, embed], -1)))


class RSSMRollout(nn.Module):
    """Filters a sequence: posterior latents of every step.

    Three ways to run the same step: a Python loop, `compile_step` (the loop over a compiled step:
    the fastest), `use_scan` (torch's scan operator, one graph whatever the length; Inductor of
    torch 2.13 cannot lower its gradient).
    """

    def __init__(self, prior, posterior, use_scan=False, compile_step=False):
        super().__init__()
        self.prior, self.posterior, self.use_scan = prior, posterior, use_scan
        self.step_fn = torch.compile(self.step) if compile_step else self.step

    def step(self, deter, stoch, action, embed, keep, noise):
        """(N, D), (N, S), (N, A), (N, E), (N), (N, S) -> deter, stoch, posterior mean, std."""
        keep = keep[:, None]
        deter = self.prior.core(deter * keep, stoch * keep, action * keep)
        mean, std = self.posterior(deter, embed)
        return deter, mean + std * noise, mean, std

    def forward(self, embed, action, is_first, deter, stoch, noise):
        """Rows 1..T from the latents before them.

        embed (B, T, E), action (B, T, A) the one *before* each row, is_first (B, T),
        deter (B, D), stoch (B, S), noise (B, T, S) ~ N(0, 1)
        -> deter (B, T, D), stoch, mean, std (B, T, S).
        """
        inputs = (action, embed, (~is_first).float(), noise)
        if self.use_scan:
            return self.scan(deter, stoch, inputs)
        outputs = []
        for step_inputs in zip(*(x.unbind(1) for x in inputs), strict=True):
            outputs.append(self.step_fn(deter, stoch, *step_inputs))
            deter, stoch = outputs[-1][:2]
        return tuple(torch.stack(x, 1) for x in zip(*outputs, strict=True))

    def scan(self, deter, stoch, inputs):
        """The same loop as one operator."""
        from torch._higher_order_ops import scan  # not public yet

        def combine(carry, x):
            deter, stoch, mean, std = self.step(*carry, *x)
            return (deter, stoch), (deter.clone(), stoch.clone(), mean.clone(), std.clone())

        # torch 2.11 wants the time first, and no gradient passes a start that does not need one
        inputs = tuple(x.transpose(0, 1) for x in inputs)
        start = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in (deter, stoch))
        return tuple(x.transpose(0, 1) for x in scan(combine, start, inputs)[1])


class ObsEncoder(nn.Module):
    """Observations -> embedding (..., E): convolutions for 64x64 images, an MLP for vectors.

    `shapes` maps keys to shapes, (D,) for a vector and (64, 64, C) for a uint8 image.
    """

    def __init__(self, shapes: dict, depth: int, units: int):
        super().__init__()
        self.vectors = sorted(k for k, s in shapes.items() if len(s) == 1)
        self.images = sorted(k for k, s in shapes.items() if len(s) == 3)
        self.outputs = units * bool(self.vectors) + 32 * depth * bool(self.images)
        if self.vectors:
            self.mlp = mlp(sum(shapes[k][0] for k in self.vectors), units, 2, units).append(
                nn.ELU()
            )
        if self.images:
            channels = [sum(shapes[k][2] for k in self.images), *(depth * m for m in (1, 2, 4, 8))]
            self.convs = nn.Sequential()
            for inputs, outputs in itertools.pairwise(channels):  # 64, 31, 14, 6, 2
                self.convs.extend([nn.Conv2d(inputs, outputs, 4, stride=2), nn.ReLU()])

    def forward(self, td: TensorDict) -> Tensor:
        embeds = []
        if self.images:
            x = torch.cat([td[k] for k in self.images], -1).flatten(0, -4)  # (N, 64, 64, C)
            x = self.convs((x.float() / 255 - 0.5).permute(0, 3, 1, 2))
            embeds.append(x.flatten(1).unflatten(0, td.shape))
        if self.vectors:
            embeds.append(self.mlp(torch.cat([td[k] for k in self.vectors], -1)))
        return torch.cat(embeds, -1)


class ObsDecoder(nn.Module):
    """Features (..., F) -> one mean per key: vectors (..., D), images (..., 64, 64, C) around 0."""

    def __init__(self, shapes: dict, inputs: int, depth: int, units: int):
        super().__init__()
        self.vectors = sorted(k for k, s in shapes.items() if len(s) == 1)
        self.images = sorted(k for k, s in shapes.items() if len(s) == 3)
        self.widths = [shapes[k][0] for k in self.vectors]
        self.channels = [shapes[k][2] for k in self.images]
        if self.vectors:
            self.mlp = mlp(inputs, units, 3, sum(self.widths))
        if self.images:
            self.inputs = nn.Linear(inputs, 32 * depth)
            channels, self.deconvs = [32 * depth, 4 * depth, 2 * depth, depth], nn.Sequential()
            for i, kernel in enumerate((5, 5, 6)):  # 1 5 13 30, then 64
                sizes = channels[i], channels[i + 1]
                self.deconvs.extend([nn.ConvTranspose2d(*sizes, kernel, stride=2), nn.ReLU()])
            self.deconvs.append(nn.ConvTranspose2d(depth, sum(self.channels), 6, stride=2))

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        outputs = {}
        if self.vectors:
            outputs |= zip(self.vectors, self.mlp(feat).split(self.widths, -1), strict=True)
        if self.images:
            x = self.spread(self.inputs(feat.flatten(0, -2)))
            x = self.deconvs[1:](x).permute(0, 2, 3, 1).unflatten(0, feat.shape[:-1])
            outputs |= zip(self.images, x.split(self.channels, -1), strict=True)
        return outputs

    def spread(self, x: Tensor) -> Tensor:
        """The first of the transposed convolutions, of 1x1 images: (N, C) -> (N, C', 5, 5).

        Written as the product that it is: nine times as fast on a CPU, and channels last.
        """
        layer = self.deconvs[0]
        weight, bias = layer.weight.permute(2, 3, 1, 0).flatten(0, 2), layer.bias.repeat(25)
        return F.linear(x, weight, bias).unflatten(1, (5, 5, -1)).permute(0, 3, 1, 2)


class DreamerActor(nn.Module):
    """Policy on features (..., F): tanh-normal, or one-hots with straight-through gradients.

    `classes` = () means continuous; otherwise the action is the concatenated one-hots of one
    categorical per entry.
    """

    def __init__(self, inputs: int, action_dim: int, classes: tuple[int, ...], units, init_std=5.0):
        super().__init__()
        self.classes, self.action_dim = tuple(classes), action_dim
        self.raw_std = math.log(math.expm1(init_std))
        self.mlp = mlp(inputs, units, 4, action_dim if classes else 2 * action_dim)

    def forward(self, feat: Tensor) -> "TanhNormal | OneHots":
        """The action distribution at feat (..., F)."""
        x = self.mlp(feat).float()
        if self.classes:
            return OneHots(x.split(self.classes, -1))
        mean, std = x.chunk(2, -1)
        return TanhNormal(5 * torch.tanh(mean / 5), F.softplus(std + self.raw_std) + 1e-4)

    def draw_noise(self, *shape: int) -> Tensor:
        """Random numbers (*shape, A) for the distribution's `sample`."""
        device = self.mlp[0].weight.device
        if self.classes:  # argmax(log p + Gumbel noise) is a draw from p
            return -torch.empty(*shape, self.action_dim, device=device).exponential_().log()
        return torch.randn(*shape, self.action_dim, device=device)

    def act(self, td: TensorDict) -> TensorDict:
        """Latents td[N] -> the same with a sampled `action`: the policy of `DreamerEnv.rollout`."""
        return td.set("action", self(features(td)).sample(self.draw_noise(*td.batch_size)))


class TanhNormal:
    """tanh of a diagonal Gaussian over actions (..., A)."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def sample(self, noise: Tensor) -> Tensor:
        """noise (..., A) ~ N(0, 1) -> actions in (-1, 1), differentiable."""
        return torch.tanh(self.mean + self.std * noise)

    def log_prob(self, noise: Tensor) -> Tensor:
        """Log-density (...) of sample(noise)."""
        x = self.mean + self.std * noise
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))  # of tanh
        normal = -0.5 * noise.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return (normal - log_slope).sum(-1)

    @property
    def mode(self) -> Tensor:
        """The likeliest of 100 samples, for each element of the batch."""
        noise = torch.randn(100, *self.mean.shape, device=self.mean.device)
        best = self.log_prob(noise).argmax(0)[None, ..., None].expand_as(noise[:1])
        return self.sample(noise.gather(0, best)[0])


class OneHots:
    """One categorical per discrete action; an action is their one-hots side by side, (..., A)."""

    def __init__(self, logits: tuple[Tensor, ...]):
        self.sizes = [x.shape[-1] for x in logits]
        self.log_probs = [x.log_softmax(-1) for x in logits]

    def sample(self, noise: Tensor) -> Tensor:
        """noise (..., A) ~ Gumbel -> one-hot actions with the gradient of the probabilities."""
        parts = []
        for log_prob, part in zip(self.log_probs, noise.split(self.sizes, -1), strict=True):
            index = (log_prob + part).argmax(-1, keepdim=True)
            one_hot = torch.zeros_like(log_prob).scatter_(-1, index, 1.0)
            parts.append(one_hot + (log_prob.exp() - log_prob.exp().detach()))
        return torch.cat(parts, -1)

    def log_prob(self, noise: Tensor) -> Tensor:
        """Log-probability (...) of sample(noise)."""
        parts = zip(self.log_probs, self.sample(noise).split(self.sizes, -1), strict=True)
        return sum((log_prob * action.detach()).sum(-1) for log_prob, action in parts)

    @property
    def mode(self) -> Tensor:
        return self.sample(torch.zeros(sum(self.sizes), device=self.log_probs[0].device))


def features(td: TensorDict) -> Tensor:
    """(..., S) and (..., D) -> (..., F): what decoder, heads, actor and value see."""
    return torch.cat([td["stoch"], td["deter"]], -1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and, if asked for, continuation head."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        self.feat_size = args.stoch + args.deter
        self.encoder = ObsEncoder(shapes, args.depth, args.units)
        self.prior = RSSMPrior(action_dim, args.deter, args.hidden, args.stoch)
        self.posterior = RSSMPosterior(self.encoder.outputs, args.deter, args.hidden, args.stoch)
        self.rollout = RSSMRollout(self.prior, self.posterior, compile_step=args.compile)
        self.decoder = ObsDecoder(shapes, self.feat_size, args.depth, args.units)
        self.reward = mlp(self.feat_size, args.units, 2, 1)
        self.cont = mlp(self.feat_size, args.units, 3, 1) if args.pcont else None
        self.gamma = args.gamma

    def predict_reward(self, feat: Tensor) -> Tensor:
        """Mode of the reward (...) at feat (..., F)."""
        return self.reward(feat).float().squeeze(-1)

    def predict_continue(self, feat: Tensor) -> Tensor:
        """Discount (...) of what follows feat (..., F): predicted, or gamma without --pcont."""
        if self.cont is None:
            return torch.full(feat.shape[:-1], self.gamma, device=feat.device)
        return self.cont(feat).float().squeeze(-1).sigmoid()


# --- losses -------------------------------------------------------------------------------------


class DreamerModelLoss(nn.Module):
    """World model loss, eq. 10: reconstruction, reward, KL of posterior and prior, continuation.

    `delayed_clamp` takes the mean of the KL before the free nats, as the authors' TF2 code does;
    otherwise every KL is clamped before the mean. `reco_loss` and `reward_loss` are kinds of
    `distance`; "normal" is the authors'. Numbers of a row are summed, rows averaged.
    """

    def __init__(self, world_model: WorldModel, *, lambda_kl=1.0, lambda_reco=1.0,
                 lambda_reward=1.0, lambda_continue=10.0, free_nats=3.0, delayed_clamp=True,
                 reco_loss="normal", reward_loss="normal"):  # fmt: skip
        super().__init__()
        self.world_model, self.free_nats, self.delayed_clamp = world_model, free_nats, delayed_clamp
        self.lambda_kl, self.lambda_reco = lambda_kl, lambda_reco
        self.lambda_reward, self.lambda_continue = lambda_reward, lambda_continue
        self.reco_loss, self.reward_loss = reco_loss, reward_loss

    def forward(self, td: TensorDict, noise: Tensor | None = None):
        """td[B, T]: rows of one episode each, and the `action` before each row under "previous".

        Returns scalar losses and td with the posterior `deter`, `stoch`, `post_mean`, `post_std`
        and `prior_mean`, `prior_std`, gradients attached.
        """
        model = self.world_model
        td["deter"], td["stoch"], td["post_mean"], td["post_std"] = self.posterior(td, noise)
        td["prior_mean"], td["prior_std"] = model.prior.moments(td["deter"])
        feat = features(td)
        losses = {
            "loss_model_kl": self.lambda_kl * self.kl(td),
            "loss_model_reco": self.lambda_reco * self.reconstruction(td, feat).mean(),
            "loss_model_reward": self.lambda_reward * self.reward(td, feat).mean(),
        }
        if model.cont is not None:
            losses["loss_model_continue"] = self.lambda_continue * self.cont(td, feat).mean()
        return TensorDict(losses), td

    def posterior(self, td: TensorDict, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Latents of td[B, T] from the observations: deter, stoch, mean, std; zero before row 1."""
        model, rows = self.world_model, td["reward"]
        if noise is None:
            noise = torch.randn(*rows.shape, model.prior.stoch, device=rows.device)
        deter = rows.new_zeros(len(rows), model.prior.cell.hidden_size)
        stoch, action = rows.new_zeros(len(rows), model.prior.stoch), td["previous", "action"]
        return model.rollout(model.encoder(td), action, td["is_first"], deter, stoch, noise)

    def kl(self, td: TensorDict) -> Tensor:
        """KL(posterior || prior), nats, a scalar that is at least `free_nats`."""
        moments = (td[k] for k in ("post_mean", "post_std", "prior_mean", "prior_std"))
        kl = gaussian_kl(*moments)  # (B, T)
        kl = parallel.mean(kl.mean()) if self.delayed_clamp else kl
        return kl.clamp(min=self.free_nats).mean()

    def reconstruction(self, td: TensorDict, feat: Tensor) -> Tensor:
        """-log p(observation | feat) (B, T), summed over numbers and keys; pixels in +-0.5."""
        loss = 0.0
        for key, predicted in self.world_model.decoder(feat).items():
            image = td[key].dtype == torch.uint8
            target = td[key].float() / 255 - 0.5 if image else td[key]
            loss = loss + distance(predicted.float(), target, self.reco_loss).flatten(2).sum(-1)
        return loss

    def reward(self, td: TensorDict, feat: Tensor) -> Tensor:
        """-log p(reward | feat) (B, T)."""
        return distance(self.world_model.predict_reward(feat), td["reward"], self.reward_loss)

    def cont(self, td: TensorDict, feat: Tensor) -> Tensor:
        """Binary cross entropy (B, T), target gamma, or 0 at a terminal row."""
        target = (~td["is_terminal"]).float() * self.world_model.gamma
        logits = self.world_model.cont(feat).float().squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


@contextlib.contextmanager
def frozen(*modules: nn.Module):
    """Through what is computed inside, no gradient reaches the parameters of `modules`."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for p in params:
            p.requires_grad_(False)
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


class DreamerActorLoss(nn.Module):
    """Imagines, and ascends the lambda-returns by their gradient through the dynamics, eq. 7.

    The policy's input is detached; its action is not. Of all parameters only the actor's get a
    gradient: world model and value are frozen while it dreams.
    """

    def __init__(self, actor_model: DreamerActor, value_model: nn.Module,
                 model_based_env: "DreamerEnv", *, imagination_horizon=15, discount_loss=True,
                 lam=0.95):  # fmt: skip
        super().__init__()
        self.actor, self.value, self.env = actor_model, value_model, model_based_env
        self.imagination_horizon, self.lam = imagination_horizon, lam
        self.discount_loss = discount_loss

    def forward(self, td: TensorDict, noise: TensorDict | None = None):
        """td[N]: latents to start from, `deter` and `stoch`; no gradient reaches them.

        Returns loss_actor and the dream[N, H] of the states after the start: `feat`, `reward`,
        `continue`, `value`, `weight`, `lambda_target`. The last state has no target: its
        `lambda_target` and `weight` are 0.
        """
        noise, model = self.draw_noise(len(td)) if noise is None else noise, self.env.world_model
        with frozen(model, self.value):
            dream = self.imagine(td, noise)
            dream["reward"] = model.predict_reward(dream["feat"])
            dream["continue"] = model.predict_continue(dream["feat"])
            dream["value"] = self.value(dream["feat"]).float().squeeze(-1)
        returns = lambda_return(dream["reward"], dream["value"], dream["continue"], self.lam)
        weight = F.pad(dream["continue"][:, :-2].detach().cumprod(1), (1, 0), value=1.0)
        dream["lambda_target"], dream["weight"] = F.pad(returns, (0, 1)), F.pad(weight, (0, 1))
        objective = weight * returns if self.discount_loss else returns
        return TensorDict(loss_actor=-objective.mean()), dream

    def imagine(self, start: TensorDict, noise: TensorDict) -> TensorDict:
        """start[N] -> [N, H] with `feat`, stepped by the environment's model."""
        deter, stoch, feats = start["deter"].detach(), start["stoch"].detach(), []
        for step in zip(noise["action"].unbind(1), noise["stoch"].unbind(1), strict=True):
            deter, stoch = self.dream_step(deter, stoch, *step)
            feats.append(torch.cat([stoch, deter], -1))
        return TensorDict(feat=torch.stack(feats, 1), batch_size=noise.batch_size)

    def dream_step(self, deter, stoch, action_noise, stoch_noise) -> tuple[Tensor, Tensor]:
        """Act at (N, D), (N, S) and let the model answer: next deter, stoch."""
        action = self.actor(torch.cat([stoch, deter], -1).detach()).sample(action_noise)
        return self.env.world_model.prior(deter, stoch, action, stoch_noise)

    def draw_noise(self, n: int) -> TensorDict:
        """Random numbers for n dreams: action (n, H, A), stoch (n, H, S)."""
        action = self.actor.draw_noise(n, self.imagination_horizon)
        size = n, self.imagination_horizon, self.env.world_model.prior.stoch
        stoch = torch.randn(size, device=action.device)
        return TensorDict(action=action, stoch=stoch, batch_size=size[:2])


class DreamerValueLoss(nn.Module):
    """Regression of the value on the lambda-returns, eq. 8; "normal" has a 1/2 and a constant."""

    def __init__(self, value_model: nn.Module, *, value_loss="normal", discount_loss=True):
        super().__init__()
        self.value, self.value_loss, self.discount_loss = value_model, value_loss, discount_loss

    def forward(self, dream: TensorDict) -> tuple[TensorDict, TensorDict]:
        """dream[N, H] of DreamerActorLoss; its last state, without target, does not count."""
        value = self.value(dream["feat"][:, :-1].detach()).float().squeeze(-1)
        error = distance(value, dream["lambda_target"][:, :-1].detach(), self.value_loss)
        weight = dream["weight"][:, :-1] if self.discount_loss else 1.0
        return TensorDict(loss_value=(weight * error).mean()), dream


# --- imagination environment --------------------------------------------------------------------


class DreamerEnv(ModelBasedEnvBase):
    """Steps inside the world model: latents in, latents, reward and discount out."""

    def transition(self, td: TensorDict, action: Tensor, noise: Tensor | None = None) -> TensorDict:
        """Latents td[N], action (N, A) -> next latents, by RSSMPrior as in training."""
        noise = torch.randn_like(td["stoch"]) if noise is None else noise
        deter, stoch = self.world_model.prior(td["deter"], td["stoch"], action, noise)
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
        """Vectors float32 (*B, D), images uint8 (*B, 64, 64, C); under "next" as well."""
        decoder = self.world_model.decoder
        for key, value in decoder(features(td)).items():
            image = key in decoder.images
            value = value.float()  # bfloat16 under autocast
            td[key] = ((value + 0.5) * 255).clamp(0, 255).round().byte() if image else value
        return td.set("next", self(td["next"])) if "next" in td.keys() else td


# --- acting -------------------------------------------------------------------------------------


def with_context(batch: TensorDict) -> TensorDict:
    """Rows [B, T + 1] of the replay -> rows 1..T, each with the action before it as "previous"."""
    return batch[:, 1:].set("previous", batch[:, :-1].select("action"))


class Agent:
    """World model, actor and value: `act` in an environment, `update` on a batch of replay.

    `spec` holds what the environment fixes: observation `shapes`, `action_dim`, action `classes`.
    """

    def __init__(self, spec: dict, args: Args, device: torch.device | str = "cpu"):
        self.spec, self.args, self.device = spec, args, torch.device(device)
        with self.device:
            self.world_model = WorldModel(spec["shapes"], spec["action_dim"], args)
            size = self.world_model.feat_size
            self.actor = DreamerActor(
                size, spec["action_dim"], spec["classes"], args.units, args.init_std
            )
            self.value = mlp(size, args.units, 3, 1)
        self.env = DreamerEnv(self.world_model, ("deter", "stoch"))
        self.model_loss = DreamerModelLoss(
            self.world_model, lambda_kl=args.kl_scale, lambda_continue=args.pcont_scale,
            free_nats=args.free_nats,
        )  # fmt: skip
        self.actor_loss = DreamerActorLoss(
            self.actor, self.value, self.env, imagination_horizon=args.imagination_horizon,
            lam=args.lam,
        )  # fmt: skip
        self.value_loss = DreamerValueLoss(self.value)
        self.modules = {"world_model": self.world_model, "actor": self.actor, "value": self.value}
        rates = (args.model_lr, args.actor_lr, args.value_lr)
        self.saved, self.optimizers = {**self.modules}, {}
        for (name, module), lr in zip(self.modules.items(), rates, strict=True):
            module.apply(keras_init_)
            adam = dict(lr=lr, eps=1e-7, foreach=True, capturable=self.device.type == "cuda")
            self.optimizers[name] = torch.optim.Adam(module.parameters(), **adam)
            self.saved[f"{name}_optimizer"] = self.optimizers[name]
        if args.compile:
            self.compile()

    def compile(self):
        """Compile the functions in which an update spends its time (RSSMRollout does its own).

        On CUDA the whole update, which never waits for the GPU, is then recorded as one graph.
        """
        hot = [(self.model_loss, name) for name in ("reconstruction", "reward", "cont")]
        for module, name in [(self.actor_loss, "dream_step"), *hot]:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
        if self.device.type == "cuda" and parallel.size() == 1:
            self.update = CudaGraphModule(self.update, warmup=3)

    def initial(self, num_envs: int) -> TensorDict:
        """Latents and action before the first row, [N]; a row with is_first ignores them."""
        sizes = dict(deter=self.args.deter, stoch=self.args.stoch, action=self.spec["action_dim"])
        zeros = {name: torch.zeros(num_envs, n, device=self.device) for name, n in sizes.items()}
        return TensorDict(zeros, [num_envs])

    @torch.no_grad()
    def act(self, rows: TensorDict, state: TensorDict | None = None, training: bool = False,
            random: bool = False):  # fmt: skip
        """Rows[N] and the state after the rows before -> action (N, A) on the CPU, state[N].

        The mode of the policy; with `training` a sample with exploration noise, which is part of
        the state and so of the model's next input; with `random` a uniform action.
        """
        rows, model = rows.to(self.device), self.world_model
        state = self.initial(len(rows)) if state is None else state
        with self.autocast():
            deter, stoch, _, _ = model.rollout.step(
                state["deter"],
                state["stoch"],
                state["action"],
                model.encoder(rows),
                (~rows["is_first"]).float(),
                torch.randn_like(state["stoch"]),
            )
            state = TensorDict(deter=deter, stoch=stoch, batch_size=[len(rows)])
            policy = self.actor(features(state))
        if random:
            action = self.random_action(len(rows))
        elif training:
            action = self.explore(policy.sample(self.actor.draw_noise(len(rows))))
        else:
            action = policy.mode
        state["action"] = action * (~rows["is_last"]).float()[:, None]
        return state["action"].cpu(), state

    def explore(self, action: Tensor) -> Tensor:
        """(N, A) -> with Gaussian noise; if discrete, random with probability --expl-amount."""
        amount = self.args.expl_amount
        if not self.actor.classes:
            return (action + amount * torch.randn_like(action)).clamp(-1, 1)
        swap = torch.rand(len(action), 1, device=self.device) < amount
        return torch.where(swap, self.random_action(len(action)), action)

    def random_action(self, n: int) -> Tensor:
        """Uniform actions (n, A), or one-hots."""
        if not self.actor.classes:
            return torch.rand(n, self.actor.action_dim, device=self.device) * 2 - 1
        draws = [torch.randint(size, (n,), device=self.device) for size in self.actor.classes]
        pairs = zip(draws, self.actor.classes, strict=True)
        return torch.cat([F.one_hot(draw, size).float() for draw, size in pairs], -1)

    def update(self, batch: TensorDict, noise: dict | None = None) -> dict:
        """One step of every network on rows [B, T + 1]; returns metrics (0-dim tensors).

        `noise` replaces the random numbers of the posteriors and of the dreams, for tests.
        """
        noise, td = noise or {}, with_context(batch)
        with self.autocast():
            with record_function("world model"):
                losses, td = self.model_loss(td, noise.get("posterior"))
                totals = {"world_model": sum(losses.values())}
            with record_function("dreams"):
                starts = td.select("deter", "stoch")  # every row starts a dream
                starts = starts[:, :-1] if self.args.pcont else starts  # the last may be terminal
                actor_losses, dream = self.actor_loss(starts.flatten(), noise.get("dream"))
                totals["actor"] = actor_losses["loss_actor"]
            with record_function("value"):
                value_losses, _ = self.value_loss(dream)
                totals["value"] = value_losses["loss_value"]
        losses.update(actor_losses).update(value_losses)
        with record_function("backward"):  # all three before the first step
            grads = {
                name: torch.autograd.grad(totals[name], list(module.parameters()))
                for name, module in self.modules.items()
            }
        with record_function("optimisers"):
            norms = {name: self.descend(name, grads[name]) for name in self.modules}
        return parallel.means(self.metrics(losses, norms, td, dream))

    def descend(self, name: str, grads: tuple[Tensor, ...]) -> Tensor:
        """One Adam step of a module with its gradient clipped; returns the norm before."""
        parallel.mean_(grads)
        params, norm = list(self.modules[name].parameters()), nn.utils.get_total_norm(grads)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        nn.utils.clip_grads_with_norm_(params, self.args.clip, norm)
        self.optimizers[name].step()
        return norm

    @torch.no_grad()
    def metrics(self, losses: TensorDict, norms: dict, td: TensorDict, dream: TensorDict) -> dict:
        """What the README's glossary explains, as 0-dim tensors: no host synchronisation."""
        entropy = (td["prior_std"].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()
        policy, noise = self.actor(features(td)), self.actor.draw_noise(*td.shape)
        return {
            **{f"train/{name}": value.detach() for name, value in losses.items()},
            **{f"train/grad_norm_{name}": value for name, value in norms.items()},
            **{f"dream/{k}": dream[k].mean() for k in ("reward", "value", "continue")},
            "dream/return": dream["lambda_target"][:, :-1].mean(),
            "train/policy_entropy": -policy.log_prob(noise).mean(),  # one sample for each row
            "train/prior_entropy": entropy,
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
        """Rows[N] as the replay stores them: with the action chosen there."""
        return rows.copy().set("action", state["action"].cpu())

    def unpack(self, batch: TensorDict) -> TensorDict:
        """A batch of the replay on the agent's device."""
        return batch.to(self.device)

    def state_dict(self) -> dict:
        state = {name: part.state_dict() for name, part in self.saved.items()}
        return {**state, "spec": self.spec, "args": dataclasses.asdict(self.args)}

    def load_state_dict(self, state: dict):
        for name, part in self.saved.items():
            for group in state[name].get("param_groups", ()):  # Adam's, saved on another device?
                group["capturable"] = self.device.type == "cuda"
            part.load_state_dict(state[name])


def load(run: str | Path, device: str = "cpu") -> Agent:
    """The trained agent of a run folder, ready to `act`; RunError if there is no checkpoint."""
    device = checkpoint.pick_device(device)
    return checkpoint.load_agent(
        run, "dreamer", lambda spec, args: Agent(spec, Args(**args | {"compile": False}), device)
    )


# --- main ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    parallel.start(args.device)
    device = check(args)
    checkpoint.prepare(args.seed, args.threads)
    if args.benchmark:
        updates_per_row = args.train_steps * args.action_repeat / args.train_every
        return benchmark(Agent, args, device, PHASES, updates_per_row)
    if args.eval:
        return show(load(args.eval, device), args.eval, args.eval_episodes)

    decided = {"render_quality": usual_quality()}  # once, so that a run keeps it on another machine
    folder, saved = parallel.open_run("dreamer", args, MAY_CHANGE, decided)
    args.steps = max(args.steps, saved["step"] if saved else 0)  # the replay keeps its size
    own = parallel.share(args)  # of the environments, the batch and the replay
    envs = make_envs(args, own.num_envs, own.seed, args.env_workers)
    agent = Agent(envs.spec, args, device)
    parallel.align(agent, args.seed)
    checkpoint.check_spec(agent.spec, saved, args.env_id)
    for name, module in agent.modules.items():
        print(f"{sum(p.numel() for p in module.parameters()):14,} parameters in {name}")
    example = agent.row(example_rows(agent.spec), agent.initial(1))[0]
    replay = make_replay(own, example, parallel.own_folder(folder), online=False)
    logs = parallel.rank() == 0
    logger = Logger(folder, args.steps, args.tensorboard, silent=not logs)
    due = dict(train=Every(args.train_every), eval=Every(args.eval_every))
    due |= dict(log=Every(args.log_every), save=Every(args.save_every))
    due |= dict(dream=Every(args.dream_every))
    parts = dict(agent=agent, replay=replay, envs=envs, logger=logger, **due)
    step, updates, pending, batch = 0, 0, 0, None  # pending: updates due before the next step
    state, score = agent.initial(own.num_envs), torch.zeros(own.num_envs)
    if saved:
        checkpoint.restore(saved, parts)
        step, updates, score = saved["step"], saved["updates"], saved["score"]
        pending = saved["pending"]
        state = TensorDict(saved["state"], [own.num_envs]).to(device)
    print(f"{folder} on {device}: {f'resumes at step {step:,}' if saved else 'starts'}")

    def save():
        counters = dict(step=step, updates=updates, pending=pending, score=score)
        state_now = dict(state=state.to_dict(), rng=checkpoint.rng_state())
        parallel.save(folder, **parts, **counters, **state_now)

    with Stop() as stop:
        while (step < args.steps or pending) and not parallel.any_rank(stop.requested):
            if not pending:
                with parallel.rescue(save):
                    rows = envs.step(state["action"].cpu() if step else None)
                _, state = agent.act(rows, state, training=True, random=step < args.prefill)
                replay.append(agent.row(rows, state))
                step += args.num_envs * args.action_repeat
                score = parallel.log_returns(logger, step, score, rows, updates, envs.crashes)
                if (bursts := due["train"](step)) and step >= args.prefill:
                    long = len(replay.episodes(args.pcont))
                    found = not parallel.any_rank(not long)
                    if not (found or updates or parallel.any_rank(long)):
                        found = parallel.any_rank(replay.whole)  # all too short: sampling says so
                    pending = bursts * args.train_steps if found else 0
                    pending += args.pretrain - args.train_steps if pending and not updates else 0
                    if not found and step - args.prefill < args.train_every:
                        logger.note("no update before an episode of --batch-length rows has ended")
            while pending and not parallel.any_rank(stop.requested):
                batch = replay.sample_episodes(own.batch_size, last=args.pcont)
                metrics = agent.update(agent.unpack(batch))
                updates, pending = updates + 1, pending - 1
                check_finite(metrics, updates)  # before a save could replace the last good one
                logger.add(metrics)
                logger.advance(step, updates=updates)
            if pending:
                break
            if due["eval"](step) and updates and logs:
                returns, *_ = evaluate(agent, 1, args.seed + 2_000_000 + step, side=0)
                logger.write(step, **{"eval/return": returns[0]})
            if due["dream"](step) and batch is not None and logs:
                draw_dreams(agent, logger, batch, f"dream_{step:09}")
            if due["log"](step):
                logger.write(step, updates=updates)
            if due["save"](step) or replay.exhausted:
                save()
        save()
    over = step >= args.steps and not pending
    if over and not updates:
        print("no updates: no episode of --batch-length rows or more has ended since --prefill")
    if over and logs:
        logger.write(step, **finish(agent, logger, "policy"))
        print(f"learning curve: {plot_curve(folder)}")
    print(f"all of it: {folder}" if over else "saved; the same command resumes")
    logger.close()
    envs.close()


if __name__ == "__main__":
    checkpoint.run(main)
