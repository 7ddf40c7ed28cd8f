"""PILCO (Deisenroth & Rasmussen, 2011): learn a GP model, improve the policy by its gradients.

    python pilco.py                                      # cart-pole swing-up, one rollout per trial
    python pilco.py --preset pendulum
    python pilco.py --preset inverted_pendulum           # gymnasium's, MuJoCo
    python pilco.py --preset debug --run runs/pilco/debug      # everything tiny
    python pilco.py --eval runs/pilco/PILCO-CartPole-v0/seed0    # play and film
    python pilco.py --benchmark                          # time the expected cost and its gradient

After a random rollout, every trial fits the GPs to all transitions so far, improves the policy by
lowering its expected cost under that model, and plays one rollout. Repeat the command to resume the
run after its last trial; --fresh starts over.

The algorithm is the authors' MATLAB code (UCL-SML/pilco-matlab at a0b48b7, v0.9), which propagates
beliefs without observation noise, sums the cost over x_1..x_H, and squashes actions with
(9 sin u + sin 3u) / 8. docs/pilco.md lists the departures. Two matter to a reader: each trial also
improves new random policies and keeps the best of all, and the search measures RBF centers in units
of their lengthscales. Everything is in float64: in float32 half of the variances come out negative.

Shapes: N beliefs or policies side by side, P parameters of a policy, D state variables, A action
dimensions, F features (the state, then sin and cos of its angles), I inputs of a function (the
features without the angles; for the GPs also the actions), E outputs, n data points, H horizon.
Equations are numbered as in the ICML paper.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gpytorch
import gymnasium
import numpy as np
import torch
from botorch.exceptions import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models.gpytorch import GPyTorchModel
from botorch.optim.batched_lbfgs_b import fmin_l_bfgs_b_batched
from tensordict import TensorDict
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common import plants  # noqa: F401  registers PILCO/...
from common.checkpoint import RunError
from common.envs import make_envs
from common.imagination import ModelBasedEnvBase
from common.run import (
    Camera, Count, EnvId, MayChange, Natural, Positive, Rule, Run, Threads, evaluate_run, launch,
    load_agent, parse_flags, prepare,
)  # fmt: skip

SCRIPT = Path(__file__).stem  # names its run folders, so that a renamed fork has folders of its own
JITTER = 1e-6  # the authors' variance of a deterministic GP; here also FITC's relative ridge
Numbers = tuple[float, ...]
Widths = Annotated[Numbers, Rule("positive numbers", lambda x: len(x) > 0 and min(x) > 0)]
Stds = Annotated[Numbers, Rule("numbers that are not negative", lambda x: min(x, default=0) >= 0)]
Preset = Literal[
    "cart_pole", "pendulum", "double_pendulum", "cart_double_pendulum", "inverted_pendulum", "debug"
]


@dataclass
class Args:
    """Flags. The authors' defaults, except --trials, --evaluations, --restarts and --centers."""

    preset: Preset = "cart_pole"  # a scenario; other flags override it
    env_id: EnvId = "PILCO/CartPole-v0"  # any gymnasium id, even my_module:MyEnv-v0
    trials: MayChange[Count] = 8  # each improves the policy, then plays one rollout
    seed: Natural = 0  # seeds policies, random actions, environments

    # the run

    run: MayChange[str] = ""  # folder; empty: runs/<script>/<env>/seed<seed>
    fresh: MayChange[bool] = False  # delete what the run folder holds and start over
    eval: MayChange[str] = ""  # run folder: play its policy, with --eval-episodes
    eval_episodes: MayChange[Count] = 10  # played at the end, and by --eval
    benchmark: bool = False  # time the expected cost and its gradient
    threads: MayChange[Threads] = 1  # for torch and numpy: more do not help; 0: their default
    tensorboard: MayChange[bool] = True  # mirror the metrics to TensorBoard

    # environment

    horizon: Count = 40  # actions in a rollout, real or imagined
    random_rollouts: Count = 1  # before the first trial
    env_kwargs: str = ""  # JSON, to the environment's constructor: '{"map_name": "8x8"}'
    action_repeat: Count = 1  # environment steps per action
    dt: Positive = 0.1  # seconds per environment step, for log and films
    camera: Camera = -1  # of MuJoCo; -1: the default
    render_quality: Literal["fast", "full"] = "fast"  # fast: no shadows, no antialiasing

    # belief

    angles: tuple[int, ...] = ()  # indices of state variables whose sine and cosine are features
    start: tuple[float, ...] = ()  # mean of the first state; empty: the mean of those seen
    start_std: Stds = ()  # its standard deviations; empty: of the first states seen, >= 0.01
    noise: Literal["latent", "observed"] = "latent"  # observed: each step adds the noise variance

    # world model

    max_inducing: Count = 300  # with more data points than this: FITC
    fit_steps: Count = 300  # L-BFGS iterations for the hyperparameters, at most

    # controller

    controller: Literal["rbf", "linear"] = "rbf"  # kernels around centers, or W x + b
    centers: Count = 50  # of the RBF controller
    bound: Literal["gSat", "gSin"] = "gSat"  # squashes actions: (9 sin u + sin 3u) / 8, or sin u

    # cost

    target: tuple[float, ...] = ()  # state; empty: zeros
    weights: tuple[float, ...] = ()  # for the features: a diagonal or the whole matrix; empty: ones
    widths: Widths = (1.0,)  # the cost is a mean over them
    exploration: float = 0.0  # adds this many std of the cost to its mean; below 0 explores
    gamma: Positive = 1.0  # discount per step

    # policy search

    iterations: Count = 150  # line searches of L-BFGS, at most
    evaluations: Count = 150  # of the expected cost, at most; all policies at once count as one
    restarts: Count = 4  # policies that a search begins with: the last one and new ones


def distance_weights(*rows: tuple[float, ...]) -> tuple[float, ...]:
    """R' R, flattened, for a matrix R with these rows: |R x|^2 = x' (R' R) x."""
    matrix = np.array(rows, dtype=float)
    return tuple((matrix.T @ matrix).flatten().tolist())


PRESETS = {
    "cart_pole": dict(  # x, dx, dtheta, theta; the features end with sin and cos of theta
        angles=(3,), start=(0, 0, 0, 0), start_std=(0.1,) * 4, target=(0, 0, 0, math.pi),
        weights=distance_weights((1, 0, 0, 0, 0.5, 0), (0, 0, 0, 0, 0, 0.5)), widths=(0.25,),
        max_inducing=150),
    "pendulum": dict(  # dtheta, theta
        env_id="PILCO/Pendulum-v0", angles=(1,), start=(0, 0), start_std=(0.1, 0.1),
        target=(0, math.pi), weights=distance_weights((0, 0, 1, 0), (0, 0, 0, 1)), widths=(0.5,),
        centers=20, iterations=75),
    "double_pendulum": dict(  # dtheta1, dtheta2, theta1, theta2
        env_id="PILCO/DoublePendulum-v0", trials=20, horizon=30, angles=(2, 3),
        start=(0, 0, math.pi, math.pi), start_std=(0.1, 0.1, 0.01, 0.01), target=(0, 0, 0, 0),
        weights=distance_weights((0, 0, 0, 0, 0.5, 0, 0.5, 0), (0, 0, 0, 0, 0, 0.5, 0, 0.5)),
        widths=(0.5,), centers=100),
    "cart_double_pendulum": dict(  # x, dx, dtheta1, dtheta2, theta1, theta2
        env_id="PILCO/CartDoublePendulum-v0", trials=40, horizon=100, dt=0.05, angles=(4, 5),
        start=(0, 0, 0, 0, math.pi, math.pi), start_std=(0.1,) * 4 + (0.01,) * 2, target=(0,) * 6,
        weights=distance_weights((1, *(0,) * 5, -1, 0, -1, 0), (0, *(0,) * 5, 0, 1, 0, 1)),
        widths=(0.5,), centers=200, max_inducing=400),
    "inverted_pendulum": dict(  # position, angle and their speeds: balance, from near the top
        env_id="InvertedPendulum-v5", dt=0.04, trials=3, random_rollouts=5, iterations=50),
}  # fmt: skip
PRESETS["debug"] = PRESETS["pendulum"] | dict(
    trials=2, horizon=8, widths=(1.0,), centers=4, iterations=3, evaluations=6, eval_episodes=1
)


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags -> Args: a flag beats the preset, which beats the defaults."""
    return parse_flags(Args, argv, __doc__, lambda chosen: PRESETS[chosen.preset])


# --- maths --------------------------------------------------------------------------------------


def kernel(x: Tensor, y: Tensor, log_lengthscale: Tensor, log_signal: Tensor) -> Tensor:
    """Squared exponential kernel, eq. 6: x (..., n, I), y (..., m, I) -> (..., E, n, m)."""
    x, y = (z[..., None, :, :] * torch.exp(-log_lengthscale)[..., None, :] for z in (x, y))
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(2 * log_signal[..., None, None] - 0.5 * distance.square())


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x y': (..., K), (..., K) -> (..., K, K)."""
    return x[..., :, None] * y[..., None, :]


def scale_matrices(precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Elementwise factors for matrices X, from Lambda_a^-1 (E, I); see `log_expectations`.

    D is Lambda_a for each of the E functions, then (Lambda_a^-1 + Lambda_b^-1)^-1 for each of the
    E^2 pairs. The factors turn X into D^-1/2 X D^-1/2; Lambda_a^-1 D^1/2 X D^1/2 Lambda_a^-1;
    and, for the pairs only, Lambda_a^-1 D^1/2 X D^1/2 Lambda_b^-1.
    """
    a, b = torch.broadcast_tensors(precision[..., :, None, :], precision[..., None, :, :])
    a, b = a.flatten(-3, -2), b.flatten(-3, -2)  # (..., E^2, I)
    root = torch.cat([precision, a + b], -2).sqrt()  # D^-1/2
    left = torch.cat([precision, a], -2) / root  # Lambda_a^-1 D^1/2
    count = precision.shape[-2]  # functions; the pairs come after them
    cross = outer(left[..., count:, :], b / root[..., count:, :])
    return outer(root, root), outer(left, left), cross


class KernelExpansion(NamedTuple):
    """E functions f_a(x) = sum_i beta_ai k_a(x_i, x), with what moment matching needs of them."""

    inputs: Tensor  # (n, I)
    beta: Tensor  # (E, n)
    precision: Tensor  # (E, I): the diagonal of Lambda_a^-1
    log_signal: Tensor  # (E): log alpha
    variance: Tensor  # (E): of f_a(x) far from all x_i: alpha^2; JITTER if f_a has no uncertainty
    scales: tuple[Tensor, Tensor, Tensor]  # of `scale_matrices`
    inverse: Tensor | None = None  # (E, n, n), GPs only: inverse of the kernel matrix
    weight: Tensor | None = None  # (E, n, n), GPs only: beta beta' - inverse


def kernel_expansion(inputs: Tensor, log_lengthscale: Tensor, log_signal: Tensor, beta: Tensor,
                     inverse: Tensor | None = None) -> KernelExpansion:  # fmt: skip
    """From (n, I), (E, I), (E), (E, n), or batches of them; of GPs if `inverse` is given."""
    precision = torch.exp(-2 * log_lengthscale)
    variance, weight = torch.full_like(log_signal, JITTER), None
    if inverse is not None:
        variance, weight = torch.exp(2 * log_signal), outer(beta, beta) - inverse
    scales = scale_matrices(precision)
    return KernelExpansion(inputs, beta, precision, log_signal, variance, scales, inverse, weight)


def invert(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Positive definite (..., K, K) -> inverse and half the log-determinant; NaN if it is not."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        root = root.masked_fill(failed[..., None, None] > 0, math.nan)
    return torch.cholesky_inverse(root), root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def log_expectations(nu: Tensor, cov: Tensor, f: KernelExpansion) -> tuple[Tensor, ...]:
    """Logs of q_i, eq. 15, and of Q_ij / (q_i q_j), eq. 22; nu (N, I, n): x_i - mean.

    For functions a and b the second is offset_ab,i + nu_i' cross_ab nu_j + offset_ba,j. Returns
    log q (N, E, n), (cov + Lambda_a)^-1 (N, E, I, I), offset (N, E, E, n), cross (N, E, E, I, I).

    With the D of `scale_matrices` and W = (I + D^-1/2 cov D^-1/2)^-1, eq. 22 has |R| = 1 / |W| and
    R^-1 cov = D^1/2 (I - W) D^1/2. With D = Lambda_a the same gives eq. 15, where
    (cov + Lambda_a)^-1 = Lambda_a^-1 - Lambda_a^-1 D^1/2 (I - W) D^1/2 Lambda_a^-1.
    """
    count, eye = f.beta.shape[-2], torch.eye(nu.shape[1], dtype=nu.dtype)
    whitening, form_scale, cross_scale = f.scales
    w, half_logdet = invert(eye + whitening * cov[:, None])  # of functions, then of pairs
    forms = form_scale * (eye - w)  # Lambda_a^-1 R^-1 cov Lambda_a^-1
    cross = cross_scale * (eye - w[:, count:])  # Lambda_a^-1 R^-1 cov Lambda_b^-1
    precision = f.precision.expand(len(nu), -1, -1)
    squares = (nu[:, :, None] * nu[:, None]).flatten(1, 2)  # nu_i nu_i'
    logdets = torch.cat([half_logdet[:, :count], 0.5 * half_logdet[:, count:]], 1)[..., None]
    # log(q_i / k_a(x_i, mean)); for pairs, i's part of log(Q_ij / (k_a(x_i, mean) k_b(x_j, mean)))
    terms = torch.baddbmm(logdets, forms.flatten(-2), squares, beta=-1, alpha=0.5)
    single, pair = terms.split([count, count**2], 1)
    log_kernel = torch.baddbmm(2 * f.log_signal[..., None], precision, nu.square(), alpha=-0.5)
    offset = pair.unflatten(1, (count, count)) - single[:, :, None]
    total_precision = torch.diag_embed(precision) - forms[:, :count]  # (cov + Lambda_a)^-1
    return log_kernel + single, total_precision, offset, cross.unflatten(1, (count, count))


class PairSums(torch.autograd.Function):
    """sum_ij coef_ab,i k_ij coef_ba,j for all functions a and b: (N, E, E).

    k_ij = exp(offset_ab,i + nu_i' cross_ab nu_j + offset_ba,j) - 1; for GPs with a = b, it is
    weight * that - inverse. nu (N, I, n), offset and coef (N, E, E, n), cross (N, E, E, I, I) with
    cross_ba = cross_ab'. f gets no gradient. In numpy, with no n x n array kept for the backward
    pass, this takes a third of torch's time.
    """

    @staticmethod
    @np.errstate(all="ignore")  # overflow gives inf or NaN: `search` rejects it
    def forward(ctx, nu, offset, cross, coef, f):
        nu, offset, cross, coef = (x.detach().numpy() for x in (nu, offset, cross, coef))
        (batch, count, _, n), width = offset.shape, nu.shape[1]
        nu_and_one = np.concatenate([nu, np.ones((batch, 1, n))], 1)
        # [cross' nu, 1, offset_ab] and [nu, offset_ba, 1]: their inner products are exponents
        left, right = np.ones((2, batch, width + 2, n))
        right[:, :width] = nu
        sums, total = np.empty((batch, count, count, width + 1, n)), np.empty(offset.shape[:3])
        k = np.empty((batch, n, n))
        for a in range(count):
            for b in range(a, count):
                np.matmul(cross[:, a, b].mT, nu, out=left[:, :width])
                left[:, -1], right[:, width] = offset[:, a, b], offset[:, b, a]
                np.matmul(left.mT, right, out=k)
                np.expm1(k, out=k)
                if a == b and f.inverse is not None:
                    k *= f.weight[a].numpy()
                    k -= f.inverse[a].numpy()
                np.matmul(coef[:, b, a, None] * nu_and_one, k.mT, out=sums[:, a, b])  # over j
                if a != b:
                    np.matmul(coef[:, a, b, None] * nu_and_one, k, out=sums[:, b, a])  # over i
                total[:, a, b] = total[:, b, a] = (coef[:, a, b] * sums[:, a, b, -1]).sum(-1)
        ctx.saved = nu_and_one, cross, coef, sums, f
        return torch.from_numpy(total)

    @staticmethod
    @once_differentiable
    @np.errstate(all="ignore")
    def backward(ctx, grad):
        nu_and_one, cross, coef, sums, f = ctx.saved
        nu, count = nu_and_one[:, None, None, :-1], len(cross[0])
        grad = (grad + grad.mT).numpy()[..., None]  # ab and ba: one sum; aa has coef twice
        by_coef = grad * sums[..., -1, :]
        # the derivative of k by its exponent is k + r r': r = beta for a GP with itself, because
        # weight + inverse = beta beta', and r = 1 otherwise
        r = np.ones(coef.shape[1:])
        if f.inverse is not None:
            r[range(count), range(count)] = f.beta.numpy()
        slopes = ((r * coef) @ nu_and_one[:, None].mT).swapaxes(1, 2)[..., None] * r[:, :, None]
        slopes += sums
        slopes *= (grad * coef)[:, :, :, None]  # sum_j (nu_j, 1) times the gradient by exponent ij
        by_nu = (cross @ slopes[..., :-1, :]).sum((1, 2))
        by_cross = 0.5 * (nu @ slopes[..., :-1, :].mT)  # the other half goes to cross_ba
        return *map(torch.from_numpy, (by_nu, slopes[..., -1, :], by_cross, by_coef)), None


def moment_matching(mean: Tensor, cov: Tensor, f: KernelExpansion) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of f(x) for x ~ N(mean, cov), eq. 14-23: mean (N, I), cov (N, I, I).

    Returns the mean (N, E), the covariance (N, E, E) and the gain (N, I, E): the covariance of x
    and f(x) is cov @ gain. The covariance of posterior means is sum_ij p_i p_j (Q_ij / (q_i q_j)
    - 1) with p = beta q, where the paper subtracts two sums that are almost equal.
    """
    nu = f.inputs.mT - mean[..., None]  # (N, I, n), eq. 16
    log_q, total_precision, offset, cross = log_expectations(nu, cov, f)
    # Q / (q q) may overflow where q is as good as 0
    offset = offset.masked_fill((log_q < -300)[:, :, None], -1e30)
    q = torch.exp(log_q)  # eq. 15
    p = f.beta * q
    f_mean = p.sum(-1)  # eq. 14
    gain = (total_precision * p.bmm(nu.mT)[:, :, None]).sum(-1).mT
    coef = p[:, :, None].expand_as(offset)
    if f.inverse is not None:
        same = torch.eye(offset.shape[1], dtype=torch.bool)[..., None]
        coef = torch.where(same, q[:, :, None], coef)  # f.weight already holds beta beta'
    f_cov = PairSums.apply(nu, offset, cross, coef, f) + torch.diag_embed(f.variance)
    return f_mean, f_cov, gain  # eq. 17-19


def sine_moments(mean, cov, frequency, phase) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of K waves sin(frequency' x + phase), x ~ N(mean (N, D), cov (N, D, D)).

    frequency (D, K), phase (K). Returns mean (N, K), covariance (N, K, K) and gain (N, D, K): the
    covariance of x and the waves is cov @ gain. With V the covariance of frequency' x, s = E sin
    and c = E cos, the covariance is, element by element, sinh(V) c c' + (cosh(V) - 1) s s'.
    """
    mean, frequency = mean @ frequency + phase, frequency.expand(len(mean), -1, -1)
    cov = frequency.mT.bmm(cov).bmm(frequency)
    half = 0.5 * cov.diagonal(dim1=-2, dim2=-1)
    sin, cos, decay = torch.sin(mean), torch.cos(mean), torch.exp(-half)
    # cosh and sinh of cov, times both decays: alone they overflow. cosh - 1 = sinh tanh(cov / 2)
    exponents = half[..., :, None] + half[..., None, :]
    cosh = 0.5 * (torch.exp(cov - exponents) + torch.exp(-cov - exponents))
    sinh = cosh * torch.tanh(cov)
    sine_cov = sinh * (outer(cos, cos) + torch.tanh(0.5 * cov) * outer(sin, sin))
    return decay * sin, sine_cov, frequency * (decay * cos)[:, None]


def select(mean: Tensor, cov: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of x[index]: (N, D), (N, D, D) -> (N, K), (N, K, K)."""
    return mean.index_select(-1, index), cov.index_select(-1, index).index_select(-2, index)


def join(x_mean, x_cov, y_mean, y_cov, cross) -> tuple[Tensor, Tensor]:
    """The joint Gaussian of x and y with cross-covariance cross (N, D, K): (N, D + K), ..."""
    rows = torch.cat([x_cov, cross], -1), torch.cat([cross.mT, y_cov], -1)
    return torch.cat([x_mean, y_mean], -1), torch.cat(rows, -2)


def known(state: Tensor) -> tuple[Tensor, Tensor]:
    """A state (N, D) that is known exactly, as mean and covariance."""
    return state, state.new_zeros(*state.shape, state.shape[-1])


def append_sin_cos(mean: Tensor, cov: Tensor, angles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Append sin and cos of each angle to x: (N, D), (N, D, D) -> (N, D + 2K), ..."""
    if not angles:
        return mean, cov
    frequency = torch.eye(mean.shape[-1]).to(mean)[:, list(angles)].repeat_interleave(2, 1)
    phase = mean.new_tensor([0, math.pi / 2] * len(angles))  # cos x = sin(x + pi / 2)
    sine, sine_cov, gain = sine_moments(mean, cov, frequency, phase)
    return join(mean, cov, sine, sine_cov, cov.bmm(gain))


def squash(mean, cov, gain, bound: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bound actions u ~ N(mean, cov) to [-1, 1]; gain (N, I, A): from the state to the actions."""
    frequencies, amplitudes = {"gSat": ((1, 3), (9 / 8, 1 / 8)), "gSin": ((1,), (1,))}[bound]
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype)
    frequency = torch.cat([factor * eye for factor in frequencies], 1)
    amplitude = torch.cat([factor * eye for factor in amplitudes])
    mean, cov, slope = sine_moments(mean, cov, frequency, torch.zeros_like(frequency[0]))
    each = amplitude.expand(len(mean), -1, -1)
    return mean @ amplitude, each.mT.bmm(cov).bmm(each), gain.bmm(slope).bmm(each)


# --- networks -----------------------------------------------------------------------------------


class IndependentGPs(gpytorch.models.ExactGP, GPyTorchModel):
    """Zero-mean GPs, one for each row of targets: inputs (E, n, I), targets (E, n)."""

    def __init__(self, inputs, targets, likelihood, covar_module):
        super().__init__(inputs, targets, likelihood)
        self.covar_module = covar_module

    def forward(self, x):
        mean = x.new_zeros(x.shape[:-1])
        return gpytorch.distributions.MultivariateNormal(mean, self.covar_module(x))

    def log_hyperparameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logs of lengthscales (E, I) and of the std of signal (E) and noise (E)."""
        scale, signal = self.covar_module.base_kernel.lengthscale, self.covar_module.outputscale
        return scale[:, 0].log(), signal.log() / 2, self.likelihood.noise[:, 0].log() / 2


class PenalizedMarginalLikelihood(gpytorch.mlls.ExactMarginalLogLikelihood):
    """Log marginal likelihood (E) minus the authors' penalty, per data point.

    sum_d (ln(lengthscale_d / std_d) / ln 100)^30 + (ln(signal / noise) / ln 1000)^30: a wall at
    lengthscales of 100 standard deviations of their input and at a signal-to-noise ratio of 1,000.
    """

    def __init__(self, model: IndependentGPs, std: Tensor):
        super().__init__(model.likelihood, model)
        self.std = std

    def forward(self, distribution, target, *args, **kwargs) -> Tensor:
        value = super().forward(distribution, target, *args, **kwargs)
        scale, signal, noise = self.model.log_hyperparameters()
        penalty = ((scale - self.std.log()) / math.log(100)).pow(30).sum(-1)
        penalty = penalty + ((signal - noise) / math.log(1000)).pow(30)
        return value - penalty / target.shape[-1]


def exact(x: Tensor, y: Tensor, hyper: tuple[Tensor, Tensor, Tensor]) -> KernelExpansion:
    """The posterior of GPs with data x (n, I), y (n, E); hyper: see `log_hyperparameters`."""
    gram = kernel(x, x, *hyper[:2])
    gram.diagonal(dim1=-2, dim2=-1).add_(torch.exp(2 * hyper[2])[:, None])
    root = torch.linalg.cholesky(gram)
    beta = torch.cholesky_solve(y.T[..., None], root)[..., 0]
    return kernel_expansion(x, *hyper[:2], beta, torch.cholesky_inverse(root))


def fitc(x: Tensor, y: Tensor, z: Tensor, hyper: tuple, ridge: float = JITTER) -> KernelExpansion:
    """The posterior of GPs with data x (n, I), y (n, E) through inducing inputs z (m, I): FITC.

    Snelson & Ghahramani (2006). Here `inverse` is K_zz^-1 - (K_zz + K_zx noise^-1 K_xz)^-1. `ridge`
    is relative to the signal variance; the authors' 1e-6 is absolute.
    """
    eye, ridge = torch.eye(len(z)).to(z), ridge * torch.exp(2 * hyper[1])[:, None, None]
    root = torch.linalg.cholesky(kernel(z, z, *hyper[:2]) + ridge * eye)  # (E, m, m)
    v = torch.linalg.solve_triangular(root, kernel(z, x, *hyper[:2]), upper=False)
    noise = (torch.exp(2 * hyper[1]) + torch.exp(2 * hyper[2]))[:, None] - v.square().sum(-2)
    scaled = v / noise[:, None]
    posterior_root = root @ torch.linalg.cholesky(eye + scaled @ v.mT)
    beta = torch.cholesky_solve(root @ (scaled @ y.T[..., None]), posterior_root)[..., 0]
    inverse = torch.cholesky_inverse(root) - torch.cholesky_inverse(posterior_root)
    return kernel_expansion(z, *hyper[:2], beta, inverse)


def most_uncertain(x: Tensor, hyper: tuple[Tensor, Tensor, Tensor], count: int) -> Tensor:
    """Choose rows of x (n, I) as inducing inputs (count, I): always the one known least so far.

    The greedy rule of Burt et al. (2020): the largest posterior variance given the rows chosen
    before, summed over outputs, in units of their noise variance.
    """
    prior = torch.exp(2 * hyper[1])[:, None]
    variance = prior.expand(-1, len(x)).clone()  # (E, n)
    root, chosen = x.new_zeros(len(variance), count, len(x)), []  # a pivoted Cholesky factor
    for i in range(count):
        best = (variance * torch.exp(-2 * hyper[2])[:, None]).sum(0).argmax()
        row = kernel(x[best, None], x, *hyper[:2])[:, 0]
        row = row - (root[:, :i, best, None] * root[:, :i]).sum(1)
        root[:, i] = row / (variance[:, best, None] + JITTER * prior).sqrt()
        variance = (variance - root[:, i].square()).clamp(min=0)
        variance[:, best] = 0
        chosen.append(best)
    return x[torch.stack(chosen)]


def check_data(td: TensorDict):
    """RunError unless a GP can be fitted to transitions td[n]; see GPWorldModel.fit."""
    if len(td) < 2:
        text = f"a Gaussian process needs at least two transitions, not {len(td)}"
        raise RunError(f"{text}: raise --random-rollouts, or --horizon if it is 1")
    for name in ("observation", "action", "next observation"):
        if bad := (~td[tuple(name.split())].isfinite()).any(0).nonzero()[:, 0].tolist():
            raise RunError(f"NaN or infinity in {name}, at indices {bad}")
    if constant(td["next", "observation"] - td["observation"]).all():
        raise RunError("all numbers of --env-id always change by the same amount: nothing to learn")


def constant(x: Tensor) -> Tensor:
    """Whether each column of x (n, K) holds a single number: (K)."""
    return (x == x[0]).all(0)


def spread(x: Tensor) -> Tensor:
    """The standard deviation of each column of x (n, K), 1 for one that is constant: (K)."""
    return x.std(0).clamp(min=1e-6).where(~constant(x), 1.0)


class GPWorldModel(nn.Module):
    """p(x' | x, u): a GP for each state variable's difference, eq. 3-8, in the units of the data.

    Angles enter as sine and cosine. With more than `max_inducing` points the GPs are still
    fitted to all data but predict through inducing inputs (FITC). A variable that always changes
    by the same amount (0, if it is constant) is not fitted: its GP hardly varies. `state_dict`
    holds neither `hyper` nor `posterior`; `factorize` computes `posterior` from `hyper` and the
    data.
    """

    def __init__(self, obs_dim: int, action_dim: int, *, angles: Sequence[int] = (),
                 max_inducing: int = 300, fit_steps: int = 300):  # fmt: skip
        super().__init__()
        self.obs_dim, self.action_dim, self.angles = obs_dim, action_dim, tuple(angles)
        self.max_inducing, self.fit_steps = max_inducing, fit_steps
        state_inputs = sorted(set(range(obs_dim + 2 * len(self.angles))) - set(self.angles))
        self.register_buffer("state_inputs", torch.tensor(state_inputs))
        self.hyper = self.posterior = None

    def dataset(self, td: TensorDict) -> tuple[Tensor, Tensor]:
        """Transitions td[n] -> inputs (n, I), targets (n, E); ValueError for other widths."""
        x, action, after = td["observation"], td["action"], td["next", "observation"]
        if not x.dtype == action.dtype == after.dtype == torch.float64:
            warnings.warn("PILCO computes in float64: the transitions are converted", stacklevel=3)
            x, action, after = x.double(), action.double(), after.double()
        if (x.shape[-1], action.shape[-1]) != (self.obs_dim, self.action_dim):
            made = f"made for {self.obs_dim} state variables and {self.action_dim} actions"
            raise ValueError(f"{made}, not {x.shape[-1]} and {action.shape[-1]}")
        inputs = append_sin_cos(*known(x), self.angles)[0][:, self.state_inputs]
        return torch.cat([inputs, action], -1), after - x

    def fit(self, td: TensorDict) -> "GPWorldModel":
        """Fit to td[n]: `observation`, `action`, ("next", "observation"); RunError if it fails."""
        check_data(td)
        x, y = self.dataset(td)
        std, still = spread(x), constant(y)
        signal = y.std(0).where(~still, y[0].abs()).clamp(min=1e-6).log()
        flat = still * math.log(100)  # what is not fitted: smoother, with less noise
        hyper = std.log() + flat[:, None], signal, signal - math.log(10) - flat
        if self.hyper is not None:  # start from the last fit, unless there was none of a variable
            # A variable without a fit has a signal of 10 * 100 times its noise, see above.
            again = ~still & ((self.hyper[1] - self.hyper[2] - math.log(1000)).abs() > 1e-6)
            for new, last in zip(hyper, self.hyper, strict=True):
                new[again] = last[again]
        elif still.any():
            index = still.nonzero()[:, 0].tolist()
            print(f"observation indices {index} never change, or always alike: no GP is fitted")
        self.hyper = hyper
        mll = PenalizedMarginalLikelihood(self.build(x, y), std)
        try:
            with warnings.catch_warnings(action="ignore"):  # about stopping at maxiter
                fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": self.fit_steps}})
        except ModelFittingError as error:
            raise RunError(f"the Gaussian processes could not be fitted: {error}") from None
        for value, new in zip(hyper, mll.model.log_hyperparameters(), strict=True):
            value[~still] = new.detach()
        return self.factorize(x, y)

    def build(self, x: Tensor, y: Tensor) -> IndependentGPs:
        """GPyTorch's model of what is not constant in y, at the current hyperparameters."""
        chosen = ~constant(y)
        y, hyper = y[:, chosen], [value[chosen] for value in self.hyper]
        batch = {"batch_shape": y.shape[1:]}
        positive = gpytorch.constraints.Positive(torch.exp, torch.log)  # so the fit is in logs
        base = gpytorch.kernels.RBFKernel(x.shape[-1], lengthscale_constraint=positive, **batch)
        covar = gpytorch.kernels.ScaleKernel(base, outputscale_constraint=positive, **batch)
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=positive, **batch)
        model = IndependentGPs(x.expand(y.shape[1], *x.shape), y.mT, likelihood, covar).to(x)
        lengthscale, signal, noise = (value.exp() for value in hyper)
        base.lengthscale, covar.outputscale = lengthscale[:, None], signal.square()
        likelihood.noise = noise.square()[:, None]
        return model

    def factorize(self, x: Tensor, y: Tensor) -> "GPWorldModel":
        """Compute once what every prediction needs."""
        if len(x) <= self.max_inducing:
            self.posterior = exact(x, y, self.hyper)
        else:
            inducing = most_uncertain(x, self.hyper, self.max_inducing)
            self.posterior = fitc(x, y, inducing, self.hyper)
        return self

    def forward(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`moment_matching` of the differences, for inputs N(mean (N, I), cov (N, I, I))."""
        if self.posterior is None:
            raise RunError("the world model has no data yet: fit it first")
        return moment_matching(mean, cov, self.posterior)


class LinearController(nn.Module):
    """u = squash(W x + b) for N policies side by side; `theta` (N, P) holds their parameters."""

    def __init__(self, inputs: int, action_dim: int, *, bound: str = "gSat", restarts: int = 1):
        super().__init__()
        self.bound = bound
        self.sizes = {"weight": (action_dim, inputs), "bias": (action_dim,)}
        count = sum(map(math.prod, self.sizes.values()))
        self.theta = nn.Parameter(torch.zeros(restarts, count, dtype=torch.float64))

    def draw(self, points: Tensor, lengthscale: Tensor, target_std: float) -> Tensor:
        """Random parameters (N, P) as the authors draw them: small weights, no bias."""
        theta = torch.zeros_like(self.theta)
        unpack(theta, self.sizes)["weight"].normal_(0, 0.01)
        return theta

    def scale(self, theta: Tensor) -> Tensor:
        """Natural units of the parameters (N, P), for the search."""
        return torch.ones_like(theta)

    def prepare(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        """Compute once what every step needs."""
        return unpack(self.theta if theta is None else theta, self.sizes)

    def forward(self, mean: Tensor, cov: Tensor, prepared=None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, I), (N, I, I) -> mean (N, A), covariance (N, A, A), gain (N, I, A) of actions."""
        parameters = self.prepare() if prepared is None else prepared
        weight = parameters["weight"].expand(len(mean), -1, -1)
        action = (weight @ mean[..., None])[..., 0] + parameters["bias"]
        return squash(action, weight @ cov @ weight.mT, weight.mT, self.bound)


class RBFController(nn.Module):
    """u = squash(f(x)), f the mean of a GP with `centers` points: signal 1, noise 0.01.

    All actions share the centers; each has its own targets and lengthscales. See LinearController
    for `theta`, `prepare` and the shapes.
    """

    def __init__(self, inputs: int, action_dim: int, *, centers: int = 50, bound: str = "gSat",
                 restarts: int = 1):  # fmt: skip
        super().__init__()
        self.bound = bound
        self.sizes = dict(centers=(centers, inputs), targets=(centers, action_dim))
        self.sizes["log_lengthscale"] = (action_dim, inputs)
        count = sum(map(math.prod, self.sizes.values()))
        self.theta = nn.Parameter(torch.zeros(restarts, count, dtype=torch.float64))

    def draw(self, points: Tensor, lengthscale: Tensor, target_std: float) -> Tensor:
        """Random parameters (N, P): centers among points (n, I), targets of std `target_std`."""
        theta = torch.zeros_like(self.theta)
        new = unpack(theta, self.sizes)
        for centers in new["centers"]:
            times = math.ceil(len(centers) / len(points))  # few points: some repeat
            centers.copy_(points[torch.randperm(len(points)).repeat(times)[: len(centers)]])
        new["targets"].normal_(0, target_std)
        new["log_lengthscale"].copy_(lengthscale.log())
        return theta

    def scale(self, theta: Tensor) -> Tensor:
        """Natural units of the parameters (N, P), for the search: lengthscales for centers."""
        scale = torch.ones_like(theta)
        unit = unpack(theta, self.sizes)["log_lengthscale"].mean(1, keepdim=True).exp()
        unpack(scale, self.sizes)["centers"].copy_(unit)
        return scale

    def prepare(self, theta: Tensor | None = None) -> KernelExpansion:
        theta = self.theta if theta is None else theta
        centers, targets, log_lengthscale = unpack(theta, self.sizes).values()
        log_signal, eye = torch.zeros_like(log_lengthscale[..., 0]), torch.eye(centers.shape[-2])
        gram = kernel(centers, centers, log_lengthscale, log_signal) + 0.01**2 * eye.double()
        beta = torch.linalg.solve(gram, targets.mT[..., None])[..., 0]
        return kernel_expansion(centers, log_lengthscale, log_signal, beta)

    def forward(self, mean: Tensor, cov: Tensor, prepared=None) -> tuple[Tensor, Tensor, Tensor]:
        prepared = self.prepare() if prepared is None else prepared
        return squash(*moment_matching(mean, cov, prepared), self.bound)


def unpack(theta: Tensor, sizes: dict) -> dict[str, Tensor]:
    """Rows of parameters (N, P) -> {name: (N, *size)}, views of them."""
    values = theta.split([math.prod(size) for size in sizes.values()], -1)
    return {name: x.unflatten(-1, sizes[name]) for name, x in zip(sizes, values, strict=True)}


# --- losses -------------------------------------------------------------------------------------


def gaussian_integral(z: Tensor, cov: Tensor, scales: Tensor) -> Tensor:
    """E exp(-s |x|^2 / 2), x ~ N(z, cov): |I + s cov|^-1/2 exp(-s z' (I + s cov)^-1 z / 2), eq. 24.

    z (..., r), cov (..., r, r), each s of scales (K) -> (..., K).
    """
    scales, z = scales[:, None, None], z[..., None, :, None]
    eye = torch.eye(z.shape[-2], dtype=z.dtype)
    inverse, half_logdet = invert(eye + scales * cov[..., None, :, :])
    return torch.exp(-0.5 * (z * (scales * inverse @ z)).sum((-2, -1)) - half_logdet)


class ExponentialQuadraticCost(nn.Module):
    """1 - exp(-(x - target)' weights (x - target) / (2 width^2)), mean over `widths`, eq. 24-25.

    target (D) is a state, weights (F, F) are those of its features: the state, then the sine and
    cosine of each of `angles`. `exploration` times the cost's standard deviation is added for each
    width: below 0 it favors uncertain states.
    """

    def __init__(self, target, weights, *, widths: Sequence[float] = (1.0,),
                 angles: Sequence[int] = (), exploration: float = 0.0):  # fmt: skip
        super().__init__()
        self.angles, self.exploration = tuple(angles), exploration
        target = torch.as_tensor(target, dtype=torch.float64)[None]
        self.register_buffer("target", append_sin_cos(*known(target), self.angles)[0][0])
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if weights.shape != (len(self.target),) * 2:
            raise ValueError(f"weights must be a square matrix for {len(self.target)} features")
        values, vectors = torch.linalg.eigh(weights)
        if values[0] < -1e-12 * values[-1] or not torch.equal(weights, weights.T):
            raise ValueError("weights must be symmetric and positive semi-definite")
        root = (vectors * values.clamp(min=0).sqrt())[:, values > 1e-12 * values[-1]]
        self.register_buffer("root", root.T.contiguous())  # (r, F): weights = root' root
        scale = 1 / torch.as_tensor(widths, dtype=torch.float64).square()
        self.register_buffer("scales", torch.cat([scale, 2 * scale]))  # for 1 - cost and its square

    def forward(self, mean: Tensor, cov: Tensor, explore: bool = True) -> tuple[Tensor, Tensor]:
        """Features N(mean (..., F), cov (..., F, F)) -> expected cost, variance of cost (...)."""
        z, cov = (mean - self.target) @ self.root.T, self.root @ cov @ self.root.T
        first, second = gaussian_integral(z, cov, self.scales).chunk(2, -1)  # moments of 1 - cost
        variance = (second - first.square()).clamp(min=0)
        cost = 1 - first
        if explore and self.exploration:
            cost = cost + self.exploration * variance.clamp(min=1e-12).sqrt()
        return cost.mean(-1), variance.mean(-1)  # mean variance, as the authors have it

    def at(self, observation: Tensor) -> Tensor:
        """The cost (...) of states (..., D) that are known."""
        belief = append_sin_cos(*known(observation.double().flatten(0, -2)), self.angles)
        return self(*belief, explore=False)[0].view(observation.shape[:-1])


# --- imagination environment --------------------------------------------------------------------


class ImaginedEnv(ModelBasedEnvBase):
    """Carries a Gaussian belief through the GPs: `mean` (N, F) and `covariance` (N, F, F).

    The belief is over the features, so that policy, model and cost share the sines and cosines.
    An action is a Gaussian, too: `action` (N, A), `action_covariance` (N, A, A) and `action_gain`.
    """

    dtype = torch.float64

    def __init__(self, world_model: GPWorldModel, cost=None, *, noise: str = "latent"):
        width = world_model.obs_dim + 2 * len(world_model.angles)
        super().__init__(world_model, {"mean": (width,), "covariance": (width, width)})
        if noise not in ("latent", "observed"):
            raise ValueError(f"noise is latent or observed, not {noise}")
        self.cost, self.noise, actions = cost, noise, torch.arange(world_model.action_dim)
        self.register_buffer("inputs", torch.cat([world_model.state_inputs, width + actions]))

    def belief(self, mean: Tensor, cov: Tensor) -> TensorDict:
        """The start N(mean (N, D), cov (N, D, D)) of a rollout; ValueError for a bad covariance."""
        values = torch.linalg.eigvalsh(cov)
        largest = values.abs().amax(-1, keepdim=True)
        if not torch.equal(cov, cov.mT) or (values < -1e-9 * largest).any():
            raise ValueError("a covariance must be symmetric and positive semi-definite")
        mean, cov = append_sin_cos(mean, cov, self.world_model.angles)
        return TensorDict(mean=mean, covariance=cov, batch_size=len(mean))

    def policy(self, controller: nn.Module, prepared=None) -> Callable[[TensorDict], TensorDict]:
        """The controller as a policy for `rollout`."""
        names, index = ("action", "action_covariance", "action_gain"), self.world_model.state_inputs

        def act(td: TensorDict) -> TensorDict:
            state = select(td["mean"], td["covariance"], index)
            return td.update(dict(zip(names, controller(*state, prepared), strict=True)))

        return act

    def _step(self, td: TensorDict) -> TensorDict:
        """The next belief and, if there is a cost, its `cost`, `cost_variance` and `reward`."""
        model, d = self.world_model, self.world_model.obs_dim
        state_action = td["covariance"].index_select(-1, model.state_inputs).bmm(td["action_gain"])
        action, action_cov = td["action"], td["action_covariance"]
        mean, cov = join(td["mean"], td["covariance"], action, action_cov, state_action)
        change, change_cov, gain = model(*select(mean, cov, self.inputs))
        state_change = cov[:, :d].index_select(-1, self.inputs).bmm(gain)  # cov(x, change)
        cov = cov[:, :d, :d] + change_cov + (state_change + state_change.mT)  # eq. 10-11
        if self.noise == "observed":
            cov = cov + torch.diag(torch.exp(2 * model.hyper[2]))
        mean, cov = append_sin_cos(mean[:, :d] + change, cov, model.angles)
        after = TensorDict(mean=mean, covariance=cov, batch_size=len(mean))
        if self.cost is not None:
            cost, variance = self.cost(mean, cov)
            after.update(dict(cost=cost, cost_variance=variance, reward=-cost))
        return after


# --- acting and updating ------------------------------------------------------------------------


def search(objective: Callable, theta: Tensor, scale: Tensor, iterations: int, evaluations: int,
           stop: Callable = lambda: False):  # fmt: skip
    """Improve each row of theta (N, P) by L-BFGS -> best parameters (P), their value, evaluations.

    objective: (N, P) -> values (N) and gradients (N, P); scale (N, P): natural units of theta. All
    rows are evaluated in one batch, at most `evaluations` times; each has its own line search and
    ends by itself. After each third of the evaluations only the better half goes on. A result that
    is not finite becomes gradient zero and a value just above the row's last: the search backs off.
    """
    lowest_value, best, used, cutoff = math.inf, None, 0, math.inf
    row_last, row_lowest = torch.zeros_like(theta[:, 0]), torch.full_like(theta[:, 0], math.inf)

    def evaluate(z: np.ndarray, batch_indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal lowest_value, best, used, cutoff
        if used == evaluations or stop():
            raise StopIteration
        points = torch.from_numpy(z) * scale[batch_indices]
        values, grads = objective(points)
        used += 1
        row = values.nan_to_num(math.inf).argmin()
        if values[row] < lowest_value:  # not if it is NaN
            lowest_value, best = values[row].item(), points[row].clone()
        finite = (values.abs() < 1e100) & (grads.abs() < 1e100).all(-1)
        previous = row_last[batch_indices]
        row_last[batch_indices] = torch.where(finite, values, previous)
        values = torch.where(finite, values, previous + 0.01 * (1 + previous.abs()))
        row_lowest[batch_indices] = torch.minimum(row_lowest[batch_indices], values)
        if used % math.ceil(evaluations / 3) == 0:
            cutoff = row_lowest[batch_indices].sort()[0][(len(z) - 1) // 2].item()
        return values.numpy(), (grads * scale[batch_indices]).where(finite[:, None], 0.0).numpy()

    def end_worse_row(intermediate_result):  # SciPy requires this name
        if intermediate_result.fun > cutoff:
            raise StopIteration

    options = dict(maxiter=iterations, maxcor=50, factr=10, pgtol=1e-9, pass_batch_indices=True)
    with contextlib.suppress(StopIteration):
        fmin_l_bfgs_b_batched(evaluate, (theta / scale).numpy(), callback=end_worse_row, **options)
    return best, lowest_value, used


class Agent:
    """World model, controller, cost, data. spec: shapes, categories, action_dim, classes."""

    def __init__(self, spec: dict, args: Args):
        self.spec, self.args = spec, args
        self.keys = sorted(spec["shapes"])
        width, actions = sum(map(math.prod, spec["shapes"].values())), spec["action_dim"]
        if spec["categories"]:
            text = f"those of --env-id are categories: {', '.join(spec['categories'])}"
            raise RunError(f"PILCO needs numbers to observe (a Box); {text}")
        if spec["classes"]:
            raise RunError("PILCO needs Box actions: those of --env-id are discrete")
        if width > 20:
            why = "it fits a Gaussian process to each, and a step's cost grows with their square"
            raise RunError(f"PILCO takes at most 20 numbers, --env-id observes {width}: {why}")
        if not set(args.angles) <= set(range(width)) or len(set(args.angles)) < len(args.angles):
            text = f"--angles must be different indices of the {width} numbers observed"
            raise RunError(f"{text}; without that flag they are those of --preset {args.preset}")
        options = dict(max_inducing=args.max_inducing, fit_steps=args.fit_steps)
        self.world_model = GPWorldModel(width, actions, angles=args.angles, **options)
        inputs, size = len(self.world_model.state_inputs), width + 2 * len(args.angles)
        options = dict(bound=args.bound, restarts=args.restarts)
        if args.controller == "linear":
            self.controller = LinearController(inputs, actions, **options)
        else:
            self.controller = RBFController(inputs, actions, centers=args.centers, **options)
        for name in ("start", "start_std"):  # a wrong count shows now, not after the first rollout
            self.flag_vector(name, torch.zeros(width))
        target = self.flag_vector("target", torch.zeros(width))
        whole = len(args.weights) == size**2
        weights = self.flag_vector("weights", torch.ones(size**2 if whole else size))
        weights = weights.view(size, size) if whole else torch.diag(weights)
        options = dict(widths=args.widths, angles=args.angles, exploration=args.exploration)
        try:
            self.cost = ExponentialQuadraticCost(target, weights, **options)
        except ValueError as error:
            raise RunError(f"--weights: {error}") from None
        self.env = ImaginedEnv(self.world_model, noise=args.noise)
        self.data, self.first_states, self.drawn = None, [], False
        self.fps = max(1, round(1 / (args.dt * args.action_repeat)))

    def flag_vector(self, name: str, default: Tensor) -> Tensor:
        """A flag's numbers, or `default`; RunError if the count is wrong."""
        values = getattr(self.args, name) or default.tolist()
        flag, preset = f"--{name.replace('_', '-')}", self.args.preset
        if len(values) != len(default):
            given = f", those of --preset {preset}" if values == PRESETS[preset].get(name) else ""
            raise RunError(f"{flag} needs {len(default)} numbers, not {len(values)}{given}")
        return torch.tensor(values, dtype=torch.float64)

    def state(self, rows: TensorDict) -> Tensor:
        """Rows [*B] -> states (*B, D): the observed vectors, in the order of their keys."""
        return torch.cat([rows[key] for key in self.keys], -1).double()

    @torch.no_grad()
    def act(self, rows: TensorDict, latent=None, random: bool = False):
        """Rows[N] -> `action` (N, A); this policy remembers nothing."""
        if random:
            action = torch.rand(len(rows), self.spec["action_dim"]) * 2 - 1
            return TensorDict(action=action, batch_size=[len(rows)])
        features = append_sin_cos(*known(self.state(rows)), self.args.angles)
        belief = select(*features, self.world_model.state_inputs)
        prepared = self.controller.prepare(self.controller.theta[:1])  # row 0: the best policy
        action = self.controller(*belief, prepared)[0].float()
        return TensorDict(action=action, batch_size=[len(rows)])

    def add(self, rows: TensorDict, actions: Tensor):
        """Keep a rollout: rows [T + 1], actions (T, A)."""
        states = self.state(rows)
        new = TensorDict(observation=states[:-1], action=actions.double(), batch_size=len(actions))
        new["next", "observation"] = states[1:]
        self.data = new if self.data is None else torch.cat([self.data, new])
        self.first_states.append(states[0])

    def start(self) -> tuple[Tensor, Tensor]:
        """N(mean (1, D), cov (1, D, D)) of the first state: from flags, else from all rollouts."""
        seen = torch.stack(self.first_states)
        mean = self.flag_vector("start", seen.mean(0))
        std = self.flag_vector("start_std", seen.std(0, correction=0).clamp(min=0.01))
        return mean[None], torch.diag(std.square())[None]

    def imagine(self, prepared, number: int = 1, explore: bool = True) -> TensorDict:
        """Simulate `number` prepared policies: beliefs [number, horizon] and expected costs."""
        start = self.env.belief(*self.start()).expand(number).clone()
        policy = self.env.policy(self.controller, prepared)
        dream = self.env.rollout(self.args.horizon, policy, start, auto_reset=False)
        after = dream["next"]  # all costs at once take a tenth less time than in `_step`
        costs = self.cost(after["mean"], after["covariance"], explore)
        after["cost"], after["cost_variance"] = costs
        return dream

    @torch.no_grad()
    def predict(self) -> TensorDict:
        """The beliefs [1, horizon] that the policy leads to; their cost without exploration."""
        return self.imagine(self.controller.prepare(self.controller.theta[:1]), explore=False)

    def objective(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Discounted expected cost (N) of x_1..x_H, eq. 2, at theta (N, P), and its gradient."""
        theta = theta.detach().requires_grad_()
        dream = self.imagine(self.controller.prepare(theta), len(theta))
        steps = torch.arange(1, self.args.horizon + 1, dtype=torch.float64)
        total = (self.args.gamma**steps * dream["next", "cost"]).sum(-1)
        return total.detach(), torch.autograd.grad(total.sum(), theta)[0]

    def draw_controller(self):
        """Draw parameters as the authors do: centers like first states, lengthscales 1 and 0.7."""
        index = self.world_model.state_inputs
        mean, cov = select(*append_sin_cos(*self.start(), self.args.angles), index)
        values, vectors = torch.linalg.eigh(cov[0])
        noise = torch.randn(1000, len(index), dtype=torch.float64)
        points = mean + noise @ (vectors * values.clamp(min=0).sqrt()).T
        scale = torch.where(index < self.world_model.obs_dim, 1.0, 0.7).double()  # 0.7: sin, cos
        self.controller.theta.data = self.controller.draw(points, scale, target_std=0.1)

    def learn(self, stop: Callable = lambda: False) -> dict:
        """Fit the GPs to all data and improve the policy -> metrics; {} if stop() came first."""
        started = time.monotonic()
        self.world_model.fit(self.data)
        fitted, args = time.monotonic(), self.args
        if not self.drawn:
            self.draw_controller()
        elif args.restarts > 1:  # unlike the authors: new policies, centers among all states seen
            states = self.world_model.dataset(self.data)[0][:, : len(self.world_model.state_inputs)]
            theta = self.controller.draw(states, spread(states), 0.5)
            self.controller.theta.data[1:] = theta[1:]
        self.drawn = True
        theta, scale = self.controller.theta.data, self.controller.scale(self.controller.theta.data)
        budget = args.iterations, args.evaluations
        best, _, used = search(self.objective, theta, scale, *budget, stop)
        if best is None:
            if stop():
                return {}
            raise RunError("the expected cost is not a number: look at the scale of observations")
        self.controller.theta.data[:1] = best
        _, signal, noise = self.world_model.hyper
        ratios = (signal - noise).exp().tolist()
        return {
            "search/evaluations": used,
            **{f"model/snr_{i}": ratio for i, ratio in enumerate(ratios)},
            "time/fit": fitted - started, "time/search": time.monotonic() - fitted,
        }  # fmt: skip

    def state_dict(self) -> dict:
        return {
            "spec": self.spec, "args": asdict(self.args), "drawn": self.drawn,
            "data": None if self.data is None else self.data.to_dict(), "firsts": self.first_states,
            "theta": self.controller.theta.detach(), "hyper": self.world_model.hyper,
        }  # fmt: skip

    def load_state_dict(self, state: dict):
        model, self.drawn = self.world_model, state["drawn"]
        self.first_states = list(state["firsts"])
        model.hyper = state["hyper"]
        self.controller.theta.data.copy_(state["theta"])
        if state["data"] is not None:
            self.data = TensorDict(state["data"]).auto_batch_size_(1)
        if model.hyper is not None:
            model.factorize(*model.dataset(self.data))


def play(agent: Agent, number: int, random: bool = False) -> tuple[TensorDict, Tensor]:
    """One rollout: rows [T + 1] and actions (T, A), T = horizon or less if the episode ends."""
    envs = make_envs(agent.args, num_envs=1, seed=agent.args.seed * 1000 + number)
    rows, actions = [envs.step(None)], []
    while len(actions) < agent.args.horizon and not rows[-1]["is_last"].item():
        actions.append(agent.act(rows[-1], random=random)["action"])
        rows.append(envs.step(actions[-1]))
    envs.close()
    return torch.cat(rows), torch.cat(actions)


def check_horizon(args: Args):
    """RunError if the environment's time limit ends an episode before the horizon."""
    limit = getattr(gymnasium.registry.get(args.env_id.split(":")[-1]), "max_episode_steps", None)
    if limit and args.horizon * args.action_repeat > limit:
        repeat = f" x --action-repeat {args.action_repeat}" if args.action_repeat > 1 else ""
        ends = f"an episode of {args.env_id} ends after {limit} steps"
        raise RunError(f"--horizon {args.horizon}{repeat} is too long: {ends}")


def assess(agent: Agent, rows: TensorDict, actions: Tensor, trial: int) -> dict:
    """Metrics of a rollout; for a trial, also the predicted cost."""
    costs = agent.cost.at(agent.state(rows)[1:])
    predicted = {"search/cost": agent.predict()["next", "cost"].mean().item()} if trial else {}
    return predicted | {
        "episode/return": rows["reward"].sum().item(), "trial": trial,
        "episode/length": len(actions), "episode/cost": costs.mean().item(),
        "episode/final_cost": costs[-10:].mean().item(),
    }  # fmt: skip


def report(metrics: dict, horizon: int):
    """Print one line about a rollout."""
    name = f"trial {metrics['trial']}" if metrics["trial"] else "random rollout"
    text = f"{name}, {metrics['seconds']:.1f} s: cost {metrics['episode/cost']:.3f}"
    text += f", at the end {metrics['episode/final_cost']:.3f}"
    if metrics["episode/length"] < horizon:
        text += f" (ended after {metrics['episode/length']} of {horizon} steps)"
    if metrics["trial"]:
        ratios = " ".join(f"{value:.0f}" for key, value in metrics.items() if "snr" in key)
        used = metrics["search/evaluations"]
        text += f"; predicted {metrics['search/cost']:.3f} ({used} evaluations)"
        text += f", signal-to-noise {ratios}"
        text += f", fit {metrics['time/fit']:.1f} s, search {metrics['time/search']:.1f} s"
        if used == 1:
            text += "; NO GRADIENT: the cost is flat where the policies begin, try larger --widths"
    print(text, flush=True)


def load(run: str | Path) -> Agent:
    """The trained agent of a run folder, ready to `act`; RunError if it has no policy yet."""
    agent = load_agent(run, SCRIPT, Args, Agent)
    if not agent.drawn:
        raise RunError(f"{run} has no policy yet: its first trial is not finished")
    return agent


# --- main ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    prepare(SCRIPT, args)
    if args.benchmark:
        from tools.benchmark import benchmark_policy  # only --benchmark needs it

        return benchmark_policy(Agent, Args(restarts=1, centers=10))
    if args.eval:
        return evaluate_run(load(args.eval), args)

    envs = make_envs(args, num_envs=1)
    print(*envs.notes, sep="\n")
    agent = Agent(envs.spec, args)
    envs.close()
    check_horizon(args)
    with Run(SCRIPT, args, agent, total=args.random_rollouts + args.trials) as run:
        run.resume()
        while run.training():
            trial = max(0, run.done + 1 - args.random_rollouts)  # 0: random
            metrics = agent.learn(run.stopping) if trial else {}
            if run.stopping():  # an interrupted search is repeated
                break
            rows, actions = play(agent, run.done, random=not trial)
            metrics |= assess(agent, rows, actions, trial)
            agent.add(rows, actions)
            run.done, run.step = run.done + 1, run.step + len(actions) * args.action_repeat
            metrics["seconds"] = run.step * args.dt
            report(metrics, args.horizon)
            run.logger.log(run.step, **metrics)
            run.save()
        run.finish()


if __name__ == "__main__":
    launch(main)
