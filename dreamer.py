"""Dreamer (Hafner et al., 2020): learn a world model, improve the policy by gradients through it.

    python dreamer.py                 # Pendulum-v1, 10,000 steps: return -190 (random: -1,233)
    python dreamer.py --preset dmc_vision --env-id dm_control/walker-walk-v0    # the paper's recipe
    python dreamer.py --preset debug --run runs/dreamer/debug        # everything tiny
    python dreamer.py --eval runs/dreamer/Pendulum-v1/seed0    # play and film
    python dreamer.py --preset dmc_vision --benchmark                # how long would it take here?

Repeat the command to resume the run; --fresh starts over.

The algorithm is the authors' TF2 code (danijar/dreamer at 56d4d44); docs/dreamer.md lists where
this file departs from it. Two departures matter to a reader: observations may be vectors, encoded
and decoded by MLPs, and the replay can draw from an episode as soon as it ends. (The authors' code
has to rescan its folder first.)

Names: `belief` is the recurrent state (the authors' deter); `state` is the Gaussian state (stoch);
`encoded_obs` is the embedding of an observation; a latent is a TensorDict of belief and state.
Shapes: B batch, T time, H imagined steps, N any batch size, *B any batch shape, A action, D belief,
S state, F = S + D features, E encoded_obs; td[B, T] is a TensorDict of that batch size. Batch
first, time second, everywhere. Equations are numbered as in arXiv 1912.01603v3.
"""

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn

from common.checkpoint import RunError
from common.envs import action_width, example_rows, make_envs
from common.imagination import ModelBasedEnvBase
from common.replay import check_room, make_replay
from common.run import (
    Camera, Compile, Count, EnvId, Fraction, MayChange, Natural, NotNegative, NumEnvs, Positive,
    Rule, Run, Threads, autocast, evaluate_run, gather_ranks, launch, load_agent, mean_over_ranks,
    mean_over_ranks_, parse_flags, prepare, run_folder,
)  # fmt: skip

SCRIPT = Path(__file__).stem  # names its run folders, so that a renamed fork has folders of its own
Discount = Annotated[float, Rule("above 0 and at most 1", lambda x: 0 < x <= 1)]
Horizon = Annotated[int, Rule("at least 2: the last state has no return", lambda x: x >= 2)]
Preset = Literal["default", "dmc_vision", "debug"]


@dataclass
class Args:
    """Flags. The defaults are the authors' for DM Control from pixels; presets change some."""

    preset: Preset = "default"  # a named set of settings; other flags override them
    env_id: EnvId = "dm_control/walker-walk-v0"  # any gymnasium id, even my_module:MyEnv-v0
    steps: MayChange[Count] = 5_000_000  # environment steps, counting repeats and reset rows
    seed: Natural = 0  # seeds networks, noise, replay, environments

    # the run

    run: MayChange[str] = ""  # folder; empty: runs/<script>/<env>/seed<seed>
    fresh: MayChange[bool] = False  # delete what the run folder holds and start over
    eval: MayChange[str] = ""  # run folder: play its policy, with --eval-episodes and --device
    eval_episodes: MayChange[Count] = 5  # played at the end, and by --eval
    eval_every: MayChange[Natural] = 10_000  # environment steps between test episodes
    benchmark: bool = False  # time updates with these settings instead of training
    device: MayChange[str] = ""  # empty: cuda if there is one, else cpu
    threads: MayChange[Threads] = 0  # of torch and numpy on the CPU; 0: their choice
    compile: MayChange[Compile] = "auto"  # torch.compile; auto: on a CPU, where it saves time
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; auto: bf16 on CUDA
    tensorboard: MayChange[bool] = True  # mirror the metrics to TensorBoard
    log_every: MayChange[Natural] = 1_000  # environment steps between lines in metrics.jsonl
    save_every: Count = 10_000  # environment steps between checkpoints

    # environment

    num_envs: NumEnvs = 1  # stepped together
    env_workers: MayChange[bool] = False  # a process for each environment
    env_kwargs: str = ""  # JSON, to the environment's constructor: '{"map_name": "8x8"}'
    action_repeat: Count = 2  # environment steps per action
    obs: Literal["auto", "vector", "pixels", "both"] = "auto"  # pixels: rendered if need be
    sticky: bool = False  # Atari: sticky actions (25%) and all 18 actions
    camera: Camera = -1  # of MuJoCo; -1: the default
    render_quality: Literal["fast", "full"] = "fast"  # fast: no shadows, no antialiasing

    # replay and schedule

    prefill: Natural = 5_000  # environment steps of random actions
    batch_size: Count = 50  # windows per update
    batch_length: Count = 50  # rows per window, all of one episode
    train_every: Count = 1_000  # environment steps; each multiple brings a burst of updates
    train_steps: Count = 100  # updates in a burst
    pretrain: Count = 100  # updates in the first burst, instead of train_steps
    replay_size: Count = 5_000_000  # rows; allocates only what --steps can fill

    # world model

    deter: Count = 200  # width of the belief
    hidden: Count = 200  # width of the RSSM's other layers
    stoch: Count = 30  # width of the Gaussian state
    depth: Count = 32  # channels of the convolutions, times 1, 2, 4, 8
    units: Count = 400  # width of heads, actor and value, and of the MLPs for vectors
    free_nats: NotNegative = 3.0  # a KL below this is not penalized
    kl_scale: NotNegative = 1.0  # of the KL in the model loss
    pcont: bool = False  # predict continuation; needed where an episode can terminate
    pcont_scale: NotNegative = 10.0  # of that prediction's loss

    # behavior

    imagination_horizon: Horizon = 15  # imagined steps
    gamma: Discount = 0.99  # discount per action
    lam: Fraction = 0.95  # lambda of the returns
    init_std: Positive = 5.0  # initial std, before the policy's tanh
    expl_amount: NotNegative = 0.3  # std of the noise, or rate of random discrete actions

    # optimizers

    model_lr: Positive = 6e-4  # learning rate of the world model
    actor_lr: Positive = 8e-5  # learning rate of the actor
    value_lr: Positive = 8e-5  # learning rate of the value
    clip: Positive = 100.0  # maximal gradient norm of each of the three networks


PRESETS = {
    "default": dict(  # learns in one sitting on two cores; not the authors' recipe
        env_id="Pendulum-v1", steps=10_000, prefill=2000, batch_size=16, batch_length=25,
        train_every=20, train_steps=5, deter=128, hidden=128, units=128, free_nats=1.0,
        kl_scale=0.1, gamma=0.95, init_std=1.0, model_lr=1e-3, actor_lr=1e-4, value_lr=1e-3,
        save_every=2000, eval_every=1000, eval_episodes=10, threads=1),
    "dmc_vision": dict(env_id="dm_control/walker-walk-v0", obs="pixels"),
    "debug": dict(env_id="Pendulum-v1", steps=1000, num_envs=2, prefill=400, batch_size=4,
        batch_length=8, train_every=50, train_steps=2, pretrain=4, deter=16, hidden=16, stoch=4,
        depth=2, units=16, imagination_horizon=4, eval_episodes=1, log_every=50, save_every=100,
        eval_every=500),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags -> Args: a flag beats the preset, which beats the defaults."""
    args = parse_flags(Args, argv, __doc__, lambda chosen: PRESETS[chosen.preset])
    if args.pcont and args.batch_length < 2:
        raise RunError("--pcont needs --batch-length of at least 2: the last row starts no dream")
    if args.steps < args.prefill and not (args.benchmark or args.eval):
        text = f"--steps {args.steps} are below --prefill {args.prefill}"
        raise RunError(f"{text}: nothing would be learned")
    return args


# --- maths --------------------------------------------------------------------------------------


def gaussian_kl(p_mean: Tensor, p_std: Tensor, q_mean: Tensor, q_std: Tensor) -> Tensor:
    """KL(p || q) in nats of diagonal Gaussians, summed: (..., S) -> (...)."""
    ratio = (p_std / q_std).square()
    return 0.5 * (ratio + ((p_mean - q_mean) / q_std).square() - 1 - ratio.log()).sum(-1)


def elementwise_loss(predicted: Tensor, target: Tensor, kind: str) -> Tensor:
    """Elementwise loss: "normal" is -log N(target; predicted, 1) in nats, "l2" has no 1/2."""
    if kind == "normal":
        return 0.5 * (predicted - target).square() + 0.5 * math.log(2 * math.pi)
    losses = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
    if kind not in losses:
        raise ValueError(f"unknown loss {kind!r}: choose normal, {', '.join(losses)}")
    return losses[kind](predicted, target, reduction="none")


def one_hots(x: Tensor, sizes: list[int]) -> Tensor:
    """Integers (..., K), number k below sizes[k] -> one-hots side by side (..., sum(sizes))."""
    pairs = zip(x.split(1, -1), sizes, strict=True)
    return torch.cat([part == torch.arange(n, device=x.device) for part, n in pairs], -1).float()


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lam: float) -> Tensor:
    """lambda-returns (N, H - 1) of eq. 6 from reward, value and discount (N, H).

    V_t = r_t + discount_t ((1 - lam) v_{t+1} + lam V_{t+1}), starting from V_{H-1} = v_{H-1}.
    r_t is the reward of state t; DreamerV3 takes that of state t + 1.
    """
    returns = [value[:, -1]]
    for t in reversed(range(reward.shape[1] - 1)):
        mixed = (1 - lam) * value[:, t + 1] + lam * returns[-1]
        returns.append(reward[:, t] + discount[:, t] * mixed)
    return torch.stack(returns[:0:-1], 1)


# --- networks -----------------------------------------------------------------------------------


def keras_init_(module: nn.Module) -> None:
    """For Module.apply: Glorot-uniform weights, orthogonal recurrent weights, zero biases."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
        elif name == "weight_hh":
            nn.init.orthogonal_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)


def mlp(inputs: int | None, units: int, layers: int, outputs: int) -> nn.Sequential:
    """`layers` x (Linear, ELU), then Linear; with `inputs=None` the first call sets the width."""
    modules = [nn.Linear(inputs, units) if inputs else nn.LazyLinear(units), nn.ELU()]
    for _ in range(layers - 1):
        modules += [nn.Linear(units, units), nn.ELU()]
    return nn.Sequential(*modules, nn.Linear(units, outputs))


def mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2 S) -> mean and std (..., S) of a state; the floor of 0.1 keeps the KL finite."""
    mean, raw_std = x.float().chunk(2, -1)
    return mean, F.softplus(raw_std) + 0.1


class RSSMPrior(nn.Module):
    """Transition model: belief' = GRU(belief; state, action), state' ~ N(mean, std)."""

    def __init__(self, action_spec, hidden_dim=200, rnn_hidden_dim=200, state_dim=30):
        super().__init__()
        self.latent_sizes = state_dim, rnn_hidden_dim  # of state, belief
        width = state_dim + action_width(action_spec)
        self.inputs = nn.Sequential(nn.Linear(width, hidden_dim), nn.ELU())
        self.cell = nn.GRUCell(hidden_dim, rnn_hidden_dim)
        self.head = mlp(rnn_hidden_dim, hidden_dim, 1, 2 * state_dim)

    def recurrence(self, state: Tensor, belief: Tensor, action: Tensor) -> Tensor:
        """(N, S), (N, D), (N, A) -> next belief (N, D)."""
        x = self.inputs(torch.cat([state, action], -1))
        with torch.autocast(x.device.type, enabled=False):  # the belief stays float32
            return self.cell(x.float(), belief)

    def moments(self, belief: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> mean, std (..., S) of p(state | belief)."""
        return mean_std(self.head(belief))

    def draw_noise(self, *shape: int) -> Tensor:
        """Standard normal numbers (*shape, S) for a sampled state."""
        return torch.randn(*shape, self.latent_sizes[0], device=self.cell.weight_hh.device)

    def forward(self, state, belief, action, noise=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One imagined step: (N, S), (N, D), (N, A) -> prior mean, std, next state, belief."""
        belief = self.recurrence(state, belief, action)
        mean, std = self.moments(belief)
        noise = torch.randn_like(mean) if noise is None else noise
        return mean, std, mean + std * noise, belief


class RSSMPosterior(nn.Module):
    """Representation model q(state | belief, observation); input widths may be left out."""

    def __init__(self, hidden_dim=200, state_dim=30, *, rnn_hidden_dim=None, obs_dim=None):
        super().__init__()
        inputs = rnn_hidden_dim + obs_dim if rnn_hidden_dim and obs_dim else None
        self.head = mlp(inputs, hidden_dim, 1, 2 * state_dim)

    def forward(self, belief, encoded_obs, noise=None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D), (N, E) -> posterior mean, std, state (N, S)."""
        mean, std = mean_std(self.head(torch.cat([belief, encoded_obs], -1)))
        noise = torch.randn_like(mean) if noise is None else noise
        return mean, std, mean + std * noise


def rssm_step(prior, posterior, state, belief, action, encoded_obs, keep, noise):
    """One step of the filter; where `keep` is 0 an episode begins.

    (N, S), (N, D), (N, A), (N, E), (N), (N, S) -> state, belief, posterior mean, std.
    """
    keep = keep[:, None]
    belief = prior.recurrence(state * keep, belief * keep, action * keep)
    mean, std, state = posterior(belief, encoded_obs, noise)
    return state, belief, mean, std


class RSSMRollout(nn.Module):
    """Filters a sequence: the posterior latents of every step.

    `compile_step` compiles the step; that is fastest. `use_scan` uses torch's scan operator: one
    graph for any length, but Inductor (torch 2.13) cannot lower its gradient.
    """

    def __init__(self, rssm_prior, rssm_posterior, use_scan=False, compile_step=False):
        super().__init__()
        self.prior = getattr(rssm_prior, "module", rssm_prior)  # unwrap a TensorDictModule
        self.posterior = getattr(rssm_posterior, "module", rssm_posterior)
        self.loop = self.scan if use_scan else self.unroll
        self.step = torch.compile(rssm_step) if compile_step else rssm_step

    def forward(self, td: TensorDictBase, noise: Tensor | None = None) -> TensorDictBase:
        """Adds state, belief, prior and posterior moments to td[B, T] with encoded_obs and action.

        Latents are zero at the start and at `is_first`. `previous` holds the action before each
        row; without it, td's own actions are shifted by one row.
        """
        action, is_first = td.get(("previous", "action"), None), td.get("is_first", None)
        if action is None:
            action = F.pad(td["action"][:, :-1], (0, 0, 1, 0))
        state, belief = (action.new_zeros(len(td), size) for size in self.prior.latent_sizes)
        keep = torch.ones_like(action[..., 0]) if is_first is None else (~is_first).float()
        noise = self.prior.draw_noise(*td.shape) if noise is None else noise
        inputs = action, td["encoded_obs"], keep, noise
        td["state"], td["belief"], *moments = self.loop(state, belief, inputs)
        td["posterior_mean"], td["posterior_std"] = moments
        td["prior_mean"], td["prior_std"] = self.prior.moments(td["belief"])
        return td

    def unroll(self, state, belief, inputs) -> tuple[Tensor, ...]:
        """Inputs (B, T, ...) of `rssm_step` -> state, belief, posterior mean, std (B, T, ...)."""
        outputs = []
        for step_inputs in zip(*(x.unbind(1) for x in inputs), strict=True):
            outputs.append(self.step(self.prior, self.posterior, state, belief, *step_inputs))
            state, belief, *_ = outputs[-1]
        return tuple(torch.stack(x, 1) for x in zip(*outputs, strict=True))

    def scan(self, state, belief, inputs) -> tuple[Tensor, ...]:
        """The same loop as one operator."""
        from torch._higher_order_ops import scan  # not public yet

        def combine(carry, x):
            outputs = rssm_step(self.prior, self.posterior, *carry, *x)
            return outputs[:2], tuple(y.clone() for y in outputs)  # scan's outputs may not alias

        # scan wants time first; torch 2.11 also needs a start that requires grad
        inputs = tuple(x.transpose(0, 1) for x in inputs)
        start = state.clone().requires_grad_(), belief.clone().requires_grad_()
        return tuple(x.transpose(0, 1) for x in scan(combine, start, inputs)[1])


class ObsEncoder(nn.Module):
    """Observations -> encoded_obs (..., E): convolutions for 64x64 images, an MLP for vectors.

    `shapes` maps keys to shapes, (width,) for a vector and (64, 64, channels) for a uint8 image.
    `categories` {key: sizes} are the vectors of integers; the MLP sees them as one-hots.
    """

    def __init__(self, shapes: dict, depth: int, units: int, categories: dict | None = None):
        super().__init__()
        sizes = self.categories = categories or {}
        self.vectors = {k: sum(sizes.get(k, s)) for k, s in sorted(shapes.items()) if len(s) == 1}
        self.images = {k: s[2] for k, s in sorted(shapes.items()) if len(s) == 3}  # channels
        self.encoded_size = units * bool(self.vectors) + 32 * depth * bool(self.images)
        if self.vectors:
            self.mlp = mlp(sum(self.vectors.values()), units, 2, units).append(nn.ELU())
        if self.images:
            channels = [sum(self.images.values()), *(depth * m for m in (1, 2, 4, 8))]
            self.convs = nn.Sequential()
            for i in range(4):  # sides 64, 31, 14, 6, 2
                self.convs.extend([nn.Conv2d(*channels[i : i + 2], 4, stride=2), nn.ReLU()])

    def embed(self, td: TensorDictBase) -> Tensor:
        """Observations td[*B] -> (*B, E)."""
        embeds = []
        if self.images:
            x = torch.cat([td[k] for k in self.images], -1).flatten(0, -4)  # (N, 64, 64, C)
            x = self.convs((x.float() / 255 - 0.5).permute(0, 3, 1, 2))
            embeds.append(x.flatten(1).unflatten(0, td.shape))
        if self.vectors:
            sizes = self.categories
            x = [one_hots(td[k], sizes[k]) if k in sizes else td[k] for k in self.vectors]
            embeds.append(self.mlp(torch.cat(x, -1)))
        return torch.cat(embeds, -1)

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Adds `encoded_obs` to td[*B]."""
        return td.set("encoded_obs", self.embed(td))


class ObsDecoder(nn.Module):
    """Features (..., F) -> {key: mean}: vectors, 64x64 pixels in +-0.5; of categories, logits."""

    def __init__(self, shapes: dict, inputs: int, depth: int, units: int, categories=None):
        super().__init__()
        sizes = self.categories = categories or {}
        self.vectors = {k: sum(sizes.get(k, s)) for k, s in sorted(shapes.items()) if len(s) == 1}
        self.images = {k: s[2] for k, s in sorted(shapes.items()) if len(s) == 3}  # channels
        if self.vectors:
            self.mlp = mlp(inputs, units, 3, sum(self.vectors.values()))
        if self.images:
            self.inputs = nn.Linear(inputs, 32 * depth)
            channels = [*(depth * m for m in (32, 4, 2, 1)), sum(self.images.values())]
            self.deconvs = nn.Sequential()
            for i, kernel in enumerate((5, 5, 6, 6)):  # sides 1, 5, 13, 30, 64
                layer = nn.ConvTranspose2d(*channels[i : i + 2], kernel, stride=2)
                self.deconvs.extend([layer, nn.ReLU()] if i < 3 else [layer])

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        means = []
        if self.vectors:
            means += self.mlp(feat).split([*self.vectors.values()], -1)
        if self.images:
            x = self.first_deconv(self.inputs(feat.flatten(0, -2)))
            x = self.deconvs[1:](x).permute(0, 2, 3, 1).unflatten(0, feat.shape[:-1])
            means += x.split([*self.images.values()], -1)
        return {k: x.float() for k, x in zip(self.vectors | self.images, means, strict=True)}

    def first_deconv(self, x: Tensor) -> Tensor:
        """The first transposed convolution, of 1x1 images: (N, C) -> (N, C', 5, 5)."""
        layer = self.deconvs[0]  # as a matrix product: channels last, nine times as fast on a CPU
        weight, bias = layer.weight.permute(2, 3, 1, 0).flatten(0, 2), layer.bias.repeat(25)
        return F.linear(x, weight, bias).unflatten(1, (5, 5, -1)).permute(0, 3, 1, 2)


class DreamerActor(nn.Module):
    """Policy on features (..., F): TanhNormal, or one categorical per entry of `classes`."""

    def __init__(self, inputs: int, action_spec, classes=(), units=400, init_std=5.0):
        super().__init__()
        self.classes, self.action_dim = tuple(classes), action_width(action_spec)
        self.raw_init_std = math.log(math.expm1(init_std))  # softplus gives init_std
        self.mlp = mlp(inputs, units, 4, self.action_dim * (1 if classes else 2))

    def forward(self, feat: "Tensor | TensorDictBase"):
        """Features (..., F) -> action distribution; latents td[*B] -> td with sampled `action`."""
        if isinstance(feat, TensorDictBase):
            distribution = self(features(feat))
            return feat.set("action", distribution.sample(self.draw_noise(*feat.batch_size)))
        x = self.mlp(feat).float()
        if self.classes:
            return OneHots(x.split(self.classes, -1))
        mean, raw_std = x.chunk(2, -1)
        return TanhNormal(5 * torch.tanh(mean / 5), F.softplus(raw_std + self.raw_init_std) + 1e-4)

    def draw_noise(self, *shape: int) -> Tensor:
        """Random numbers (*shape, A) for the distribution's `sample`: normal or Gumbel."""
        noise = torch.empty(*shape, self.action_dim, device=self.mlp[0].weight.device)
        return -noise.exponential_().log() if self.classes else noise.normal_()


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
        best = self.log_prob(noise).argmax(0, keepdim=True)[..., None]  # (1, ..., 1)
        return self.sample(noise.take_along_dim(best, 0)[0])


class OneHots:
    """One categorical per discrete action; an action is their one-hots side by side, (..., A)."""

    def __init__(self, logits: tuple[Tensor, ...]):
        self.sizes = [x.shape[-1] for x in logits]
        self.log_probs = [x.log_softmax(-1) for x in logits]

    def sample(self, noise: Tensor) -> Tensor:
        """noise (..., A) ~ Gumbel -> one-hot actions with straight-through gradients."""
        actions = []
        for log_prob, gumbel in zip(self.log_probs, noise.split(self.sizes, -1), strict=True):
            index = (log_prob + gumbel).argmax(-1, keepdim=True)  # a draw: the Gumbel-max trick
            one_hot = torch.zeros_like(log_prob).scatter_(-1, index, 1.0)
            actions.append(one_hot + (log_prob.exp() - log_prob.exp().detach()))
        return torch.cat(actions, -1)

    def log_prob(self, noise: Tensor) -> Tensor:
        """Log-probability (...) of sample(noise)."""
        pairs = zip(self.log_probs, self.sample(noise).split(self.sizes, -1), strict=True)
        return sum((log_prob * action.detach()).sum(-1) for log_prob, action in pairs)

    @property
    def mode(self) -> Tensor:
        """The likeliest action: without noise, a sample is the argmax."""
        return self.sample(torch.zeros(sum(self.sizes), device=self.log_probs[0].device))


def features(latent: TensorDictBase) -> Tensor:
    """(..., S) and (..., D) -> (..., F): what decoder, heads, actor and value see."""
    return torch.cat([latent["state"], latent["belief"]], -1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and, if asked for, continuation head."""

    def __init__(self, shapes: dict, action_spec, args: Args, categories: dict | None = None):
        super().__init__()
        self.feat_size, self.gamma = args.stoch + args.deter, args.gamma
        sizes = dict(hidden_dim=args.hidden, rnn_hidden_dim=args.deter, state_dim=args.stoch)
        self.encoder = ObsEncoder(shapes, args.depth, args.units, categories)
        self.prior = RSSMPrior(action_spec, **sizes)
        self.posterior = RSSMPosterior(obs_dim=self.encoder.encoded_size, **sizes)
        self.rollout = RSSMRollout(self.prior, self.posterior, compile_step=args.compile == "yes")
        self.decoder = ObsDecoder(shapes, self.feat_size, args.depth, args.units, categories)
        self.reward = mlp(self.feat_size, args.units, 2, 1)
        self.cont = mlp(self.feat_size, args.units, 3, 1) if args.pcont else None

    def forward(self, td: TensorDictBase, noise: Tensor | None = None) -> TensorDictBase:
        """Adds latents and moments to rows td[B, T]; see RSSMRollout."""
        return self.rollout(self.encoder(td), noise)

    def predict_reward(self, feat: Tensor) -> Tensor:
        """Predicted reward (...) at feat (..., F)."""
        return self.reward(feat).float().squeeze(-1)

    def predict_continue(self, feat: Tensor) -> Tensor:
        """Discount (...) of what follows feat (..., F): predicted, or gamma without --pcont."""
        if self.cont is None:
            return torch.full(feat.shape[:-1], self.gamma, device=feat.device)
        return self.cont(feat).float().squeeze(-1).sigmoid()


# --- losses -------------------------------------------------------------------------------------


def kl_loss(td: TensorDictBase, free_nats: float, delayed_clamp: bool) -> Tensor:
    """Mean KL(posterior || prior) in nats; with `delayed_clamp`, clamped last."""
    kl = gaussian_kl(td["posterior_mean"], td["posterior_std"], td["prior_mean"], td["prior_std"])
    kl = mean_over_ranks(kl.mean()) if delayed_clamp else kl
    return kl.clamp(min=free_nats).mean()


def reconstruction_loss(decoder: nn.Module, feat: Tensor, td: TensorDictBase, kind: str) -> Tensor:
    """Loss (B, T) of the decoded observations, summed over elements and keys; pixels in +-0.5.

    `kind` is that of `elementwise_loss`; of categories it is the cross entropy.
    """
    loss = 0.0
    for key, predicted in decoder(feat).items():
        if sizes := decoder.categories.get(key):
            log_probs = torch.cat(OneHots(predicted.split(sizes, -1)).log_probs, -1)
            loss = loss - (log_probs * one_hots(td[key], sizes)).sum(-1)
            continue
        target = td[key].float() / 255 - 0.5 if td[key].dtype == torch.uint8 else td[key]
        loss = loss + elementwise_loss(predicted, target, kind).flatten(2).sum(-1)
    return loss


def reward_loss(world_model: WorldModel, feat: Tensor, reward: Tensor, kind: str) -> Tensor:
    """Loss (B, T) of the predicted reward."""
    return elementwise_loss(world_model.predict_reward(feat), reward, kind)


def continue_loss(head: nn.Module, feat: Tensor, is_terminal: Tensor, gamma: float) -> Tensor:
    """Binary cross entropy (B, T), target gamma, or 0 at a terminal row."""
    target = (~is_terminal).float() * gamma
    logits = head(feat).float().squeeze(-1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class DreamerModelLoss(nn.Module):
    """World model loss: eq. 10 (reconstruction, reward, KL of posterior and prior), continuation.

    `delayed_clamp` clamps the mean KL at free_nats, as the authors' TF2 code does;
    otherwise every KL is clamped before the mean. `reco_loss` and `reward_loss` are kinds of
    `elementwise_loss`; "normal" is the authors'. Elements of a row are summed, rows averaged.
    """

    def __init__(self, world_model: WorldModel, *, lambda_kl=1.0, lambda_reco=1.0,
                 lambda_reward=1.0, lambda_continue=10.0, free_nats=3.0, delayed_clamp=True,
                 reco_loss="normal", reward_loss="normal"):  # fmt: skip
        super().__init__()
        self.world_model, self.free_nats, self.delayed_clamp = world_model, free_nats, delayed_clamp
        self.lambda_kl, self.lambda_reco = lambda_kl, lambda_reco
        self.lambda_reward, self.lambda_continue = lambda_reward, lambda_continue
        self.reco_kind, self.reward_kind = reco_loss, reward_loss

    def forward(self, td: TensorDictBase, noise: Tensor | None = None):
        """td[B, T]: sequences of rows, or rows that already have their posteriors.

        Returns scalar losses, and td with `state`, `belief`, `posterior_mean`, `posterior_std`,
        `prior_mean` and `prior_std`, not detached.
        """
        model = self.world_model
        td = td if "posterior_mean" in td.keys() else model(td, noise)
        feat, losses = features(td), TensorDict()
        losses["loss_model_kl"] = self.lambda_kl * kl_loss(td, self.free_nats, self.delayed_clamp)
        reco = reconstruction_loss(model.decoder, feat, td, self.reco_kind)
        losses["loss_model_reco"] = self.lambda_reco * reco.mean()
        reward = reward_loss(model, feat, td["reward"], self.reward_kind)
        losses["loss_model_reward"] = self.lambda_reward * reward.mean()
        if model.cont is not None:
            cont = continue_loss(model.cont, feat, td["is_terminal"], model.gamma)
            losses["loss_model_continue"] = self.lambda_continue * cont.mean()
        return losses, td


@contextlib.contextmanager
def frozen(*modules: nn.Module):
    """Gives the parameters of `modules` no gradient; gradients still flow through the modules."""
    params = nn.ParameterList(p for m in modules for p in m.parameters() if p.requires_grad)
    params.requires_grad_(False)
    try:
        yield
    finally:
        params.requires_grad_(True)


def dream_step(actor, prior, state, belief, action_noise, state_noise) -> tuple[Tensor, Tensor]:
    """Act at (N, S), (N, D) and imagine the next state (N, S), belief (N, D)."""
    action = actor(torch.cat([state, belief], -1).detach()).sample(action_noise)
    return prior(state, belief, action, state_noise)[2:]


class DreamerActorLoss(nn.Module):
    """Actor loss, eq. 7: maximizes imagined lambda-returns by gradients through the dynamics.

    The policy's input is detached; its action is not. World model and value are frozen in dreams.
    `discount_loss` weights each state by the product of the discounts before it.
    """

    def __init__(self, actor_model: DreamerActor, value_model: nn.Module, model_based_env, *,
                 imagination_horizon=15, discount_loss=True, lam=0.95):  # fmt: skip
        super().__init__()
        self.actor, self.value, self.env = actor_model, value_model, model_based_env
        self.imagination_horizon, self.lam = imagination_horizon, lam
        self.discount_loss = discount_loss

    def forward(self, td: TensorDictBase, noise: TensorDictBase | None = None):
        """td[*B]: latents to start from, N of them in all; no gradient reaches them.

        Returns loss_actor and the dream[N, H] of the states after the start: `feat`, `reward`,
        `continue`, `value`, `weight`, `lambda_target`. The last state has no target: its
        `lambda_target` and `weight` are 0.
        """
        model, feats = self.env.world_model, []
        state, belief = (td[key].flatten(0, -2).detach() for key in ("state", "belief"))
        noise = self.draw_noise(len(state)) if noise is None else noise
        with frozen(model, self.value):
            for step_noise in zip(noise["action"].unbind(1), noise["state"].unbind(1), strict=True):
                state, belief = dream_step(self.actor, model.prior, state, belief, *step_noise)
                feats.append(torch.cat([state, belief], -1))
            dream = TensorDict(feat=torch.stack(feats, 1), batch_size=noise.batch_size)
            dream["reward"] = model.predict_reward(dream["feat"])
            dream["continue"] = model.predict_continue(dream["feat"])
            dream["value"] = self.value(dream["feat"]).float().squeeze(-1)
        returns = lambda_return(dream["reward"], dream["value"], dream["continue"], self.lam)
        weight = F.pad(dream["continue"][:, :-2].detach().cumprod(1), (1, 0), value=1.0)  # (N, H-1)
        dream["lambda_target"], dream["weight"] = F.pad(returns, (0, 1)), F.pad(weight, (0, 1))
        objective = weight * returns if self.discount_loss else returns
        return TensorDict(loss_actor=-objective.mean()), dream

    def draw_noise(self, n: int) -> TensorDict:
        """Random numbers for n dreams: action (n, H, A), state (n, H, S)."""
        size = n, self.imagination_horizon
        action, state = self.actor.draw_noise(*size), self.env.world_model.prior.draw_noise(*size)
        return TensorDict(action=action, state=state, batch_size=size)


class DreamerValueLoss(nn.Module):
    """Value loss, eq. 8: regression on the lambda-returns by `elementwise_loss`."""

    def __init__(self, value_model: nn.Module, *, value_loss="normal", discount_loss=True):
        super().__init__()
        self.value, self.value_loss, self.discount_loss = value_model, value_loss, discount_loss

    def forward(self, dream: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        """dream[N, H] of DreamerActorLoss; its last state has no target and does not count."""
        value = self.value(dream["feat"][:, :-1].detach()).float().squeeze(-1)
        error = elementwise_loss(value, dream["lambda_target"][:, :-1].detach(), self.value_loss)
        weight = dream["weight"][:, :-1] if self.discount_loss else 1.0
        return TensorDict(loss_value=(weight * error).mean()), dream


COMPILED = reconstruction_loss, reward_loss, continue_loss, dream_step  # by --compile

# --- imagination environment --------------------------------------------------------------------


class DreamerEnv(ModelBasedEnvBase):
    """Steps inside the world model: latents and action -> next latents, reward and discount."""

    def __init__(self, world_model, prior_shape, belief_shape, device=None, batch_size=()):
        shapes = {"belief": tuple(belief_shape), "state": tuple(prior_shape)}
        super().__init__(world_model, shapes, device, batch_size)

    def _step(self, td: TensorDictBase) -> TensorDict:
        """Latents and `action` [N] -> next latents with `reward` and `continue`, a discount."""
        *_, state, belief = self.world_model.prior(td["state"], td["belief"], td["action"])
        latent = TensorDict(belief=belief, state=state, batch_size=td.batch_size)
        latent["reward"] = self.world_model.predict_reward(features(latent))
        latent["continue"] = self.world_model.predict_continue(features(latent))
        return latent


class DreamerDecoder(nn.Module):
    """Adds decoded observations to latents td[*B] or to a rollout, in the environment's units."""

    def __init__(self, world_model: WorldModel):
        super().__init__()
        self.world_model = world_model

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Vectors (*B, n), uint8 images, the likeliest categories (*B, K); under "next" as well."""
        decoder = self.world_model.decoder
        for key, value in decoder(features(td)).items():
            if sizes := decoder.categories.get(key):
                td[key] = torch.stack([x.argmax(-1) for x in value.split(sizes, -1)], -1).int()
                continue
            image = key in decoder.images
            td[key] = ((value + 0.5) * 255).clamp(0, 255).round().byte() if image else value
        return td.set("next", self(td["next"])) if "next" in td.keys() else td


# --- acting and updating ------------------------------------------------------------------------


class Agent:
    """World model, actor, value. spec: `shapes`, `categories`, `action_dim`, action `classes`."""

    def __init__(self, spec: dict, args: Args, device: torch.device | str = "cpu"):
        self.spec, self.args, self.device = spec, args, torch.device(device)
        with self.device:
            inputs = spec["shapes"], spec["action_dim"], args, spec["categories"]
            self.world_model = model = WorldModel(*inputs)
            options = spec["action_dim"], spec["classes"], args.units, args.init_std
            self.actor = DreamerActor(model.feat_size, *options)
            self.value = mlp(model.feat_size, args.units, 3, 1)
        self.env = DreamerEnv(model, prior_shape=(args.stoch,), belief_shape=(args.deter,))
        scales = dict(lambda_kl=args.kl_scale, lambda_continue=args.pcont_scale)
        self.model_loss = DreamerModelLoss(model, free_nats=args.free_nats, **scales)
        options = dict(imagination_horizon=args.imagination_horizon, lam=args.lam)
        self.actor_loss = DreamerActorLoss(self.actor, self.value, self.env, **options)
        self.value_loss = DreamerValueLoss(self.value)
        self.modules = {"world_model": model, "actor": self.actor, "value": self.value}
        rates = (args.model_lr, args.actor_lr, args.value_lr)
        self.optimizers, self.stateful = {}, dict(self.modules)  # stateful: in a checkpoint
        for (name, module), lr in zip(self.modules.items(), rates, strict=True):
            module.apply(keras_init_)
            adam = dict(lr=lr, eps=1e-7, foreach=True, capturable=self.device.type == "cuda")
            self.optimizers[name] = torch.optim.Adam(module.parameters(), **adam)
            self.stateful[f"{name}_optimizer"] = self.optimizers[name]
        if args.compile == "yes":  # for the whole process; RSSMRollout compiles its own step
            globals().update({f.__name__: torch.compile(f, dynamic=False) for f in COMPILED})
        if args.compile == "yes" and self.device.type == "cuda":
            self.update = CudaGraphModule(self.update, warmup=3)  # possible: update never syncs

    def initial(self, num_envs: int) -> TensorDict:
        """Latents and action before the first row, [N]; a row with is_first ignores them."""
        sizes = dict(belief=self.args.deter, state=self.args.stoch, action=self.spec["action_dim"])
        zeros = {name: torch.zeros(num_envs, n, device=self.device) for name, n in sizes.items()}
        return TensorDict(zeros, [num_envs])

    @torch.no_grad()
    def act(self, rows: TensorDict, latent: TensorDict | None = None, training=False, random=False):
        """Rows[N] and the previous latent[N] -> latent[N] with its `action` (N, A).

        The action is the policy's mode; with `training`, a sample plus exploration noise; with
        `random`, uniform. The model's next input is this action, noise included.
        """
        rows, model = rows.to(self.device), self.world_model
        latent = self.initial(len(rows)) if latent is None else latent
        keep = (~rows["is_first"]).float()
        with autocast(self):
            before = latent["state"], latent["belief"], latent["action"]
            inputs = model.encoder.embed(rows), keep, model.prior.draw_noise(len(rows))
            state, belief, *_ = rssm_step(model.prior, model.posterior, *before, *inputs)
            latent = TensorDict(belief=belief, state=state, batch_size=rows.batch_size)
            policy = self.actor(features(latent))
        if random:
            action = self.random_action(len(rows))
        elif training:
            action = self.explore(policy.sample(self.actor.draw_noise(len(rows))))
        else:
            action = policy.mode
        return latent.set("action", action * (~rows["is_last"]).float()[:, None])  # 0 at the end

    def explore(self, action: Tensor) -> Tensor:
        """Adds noise to (N, A); discrete actions turn random with probability --expl-amount."""
        if not self.actor.classes:
            return (action + self.args.expl_amount * torch.randn_like(action)).clamp(-1, 1)
        swap = torch.rand(len(action), 1, device=self.device) < self.args.expl_amount
        return torch.where(swap, self.random_action(len(action)), action)

    def random_action(self, n: int) -> Tensor:
        """Uniformly random actions (n, A), one-hot if discrete."""
        if not self.actor.classes:
            return torch.rand(n, self.actor.action_dim, device=self.device) * 2 - 1
        draws = [torch.randint(size, (n,), device=self.device) for size in self.actor.classes]
        return torch.cat(list(map(F.one_hot, draws, self.actor.classes)), -1).float()

    def update(self, batch: TensorDict, noise: dict | None = None) -> dict:
        """One update of all networks: batch [B, T] on the agent's device -> 0-dim metrics."""
        noise, losses = noise or {}, {}  # with noise, tests replace the random numbers
        with autocast(self):
            losses["world_model"], td = self.model_loss(batch.copy(), noise.get("posterior"))
            starts = td[:, :-1] if self.args.pcont else td  # pcont: last may be terminal
            losses["actor"], dream = self.actor_loss(starts, noise.get("dream"))
            losses["value"], _ = self.value_loss(dream)
        params = {name: list(module.parameters()) for name, module in self.modules.items()}
        grads = {k: torch.autograd.grad(sum(losses[k].values()), params[k]) for k in losses}
        metrics = {k: loss for part in losses.values() for k, loss in part.items()}
        for name, optimizer in self.optimizers.items():  # no step before all gradients are computed
            mean_over_ranks_(grads[name])
            for p, grad in zip(params[name], grads[name], strict=True):
                p.grad = grad
            metrics[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(params[name], self.args.clip)
            optimizer.step()
        return self.metrics(metrics, td, dream)

    @torch.no_grad()
    def metrics(self, scalars: dict, td: TensorDict, dream: TensorDict) -> dict:
        """Metrics as 0-dim tensors (no host synchronization), explained in docs/dreamer.md."""
        entropy = (td["prior_std"].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()
        policy, noise = self.actor(features(td)), self.actor.draw_noise(*td.shape)
        return {
            **{f"train/{name}": value.detach() for name, value in scalars.items()},
            **{f"dream/{k}": dream[k].mean() for k in ("reward", "value", "continue")},
            "dream/return": dream["lambda_target"][:, :-1].mean(),
            "train/policy_entropy": -policy.log_prob(noise).mean(),  # one sample for each row
            "train/prior_entropy": entropy,
        }

    def stored_rows(self, rows: TensorDict, latent: TensorDict) -> TensorDict:
        """Rows[N] as the replay stores them: with the chosen action."""
        return rows.copy().set("action", latent["action"].cpu())

    def state_dict(self) -> dict:
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        return {**state, "spec": self.spec, "args": asdict(self.args)}

    def load_state_dict(self, state: dict):
        for name, part in self.stateful.items():
            for group in state[name].get("param_groups", ()):  # of Adam, maybe from another device
                group["capturable"] = self.device.type == "cuda"
            part.load_state_dict(state[name])


def load(run: str | Path, device: torch.device | str = "cpu") -> Agent:
    """The trained agent of a run folder, ready to `act`; RunError if there is no checkpoint."""
    return load_agent(run, SCRIPT, Args, Agent, device)


# --- main ---------------------------------------------------------------------------------------


def updates_owed(args: Args, run: Run, replay) -> int:
    """Updates owed at this step: a burst at each multiple of --train-every, after the prefill.

    0 until the replay is ready, unless all finished episodes are too short: `sample` raises.
    """
    previous_step = run.step - args.num_envs * args.action_repeat
    multiples = run.step // args.train_every - previous_step // args.train_every
    if run.step < args.prefill or not multiples:
        return 0
    ready = gather_ranks(torch.tensor([float(replay.ready)]))
    too_short = not run.updates and not ready.any() and len(replay.finished())  # `sample` raises
    if not ready.all() and not too_short:
        run.logger.note("no update before an episode of --batch-length rows has ended")
        return 0
    if not run.updates:
        run.logger.note(f"{args.pretrain} updates before the next step (--pretrain)")
    first = args.train_steps if run.updates else args.pretrain
    return first + (multiples - 1) * args.train_steps


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    updates_per_row = args.train_steps * args.action_repeat / args.train_every
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
        # the last window of an episode has its terminal row
        replay = make_replay(args, example, run.folder, episodes=True, last_window=args.pcont)
        latent = run.resume(agent.initial(envs.num_envs), envs=envs, replay=replay)

        while run.training(latent):
            if not run.owed:  # resumed runs first do owed updates
                rows = envs.step(latent["action"])
                latent = agent.act(rows, latent, training=True, random=run.step < args.prefill)
                replay.append(agent.stored_rows(rows, latent))
                run.count(rows)
                if rows["is_terminal"].any() and not args.pcont:
                    run.logger.note("an episode terminated: dreams do so only with --pcont")
                run.owe(updates_owed(args, run, replay))
            for batch in run.batches(replay):
                run.add(agent.update(batch))
        if run.complete and not run.updates:
            print("no updates: raise --steps, or lower --prefill, --train-every or --batch-length")
        run.finish()


if __name__ == "__main__":
    launch(main)
