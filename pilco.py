"""PILCO (Deisenroth & Rasmussen, 2011): a Gaussian process model, a policy by analytic gradients.

    python pilco.py                                      # cart-pole swing-up, one rollout per trial
    python pilco.py --preset pendulum
    python pilco.py --preset inverted_pendulum           # gymnasium's, MuJoCo
    python pilco.py --preset debug                       # everything tiny
    python pilco.py --eval runs/pilco/PILCO-CartPole-v0/seed0    # play and film
    python pilco.py --benchmark                          # value and gradient of the policy

Trials: a random rollout; then, again and again, fit the GPs to all transitions, improve the policy
against its expected cost under the model, play one rollout with it. The same command again resumes
the run after its last trial; --fresh starts over. A run folder holds args.json, metrics.jsonl,
checkpoint.pt, tensorboard/, a picture trial_*.png of each trial's prediction, policy.mp4,
learning_curve.png.

The algorithm is the authors' MATLAB code (UCL-SML/pilco-matlab at a0b48b7, v0.9), which propagates
beliefs without observation noise, costs x_1..x_H, and squashes with (9 sin u + sin 3u) / 8.
docs/pilco.md lists where this file departs from it. Two departures matter to a reader: every trial
also improves new policies and keeps the best of all, and the search measures centres in
lengthscales.
Everything is in float64: single precision makes half of the variances negative.

Shapes: N policies side by side, D state variables, A action numbers, F features (the state with sin
and cos of its angles), I = inputs of a GP (features without angles, and actions), E outputs, n data
points, H horizon. Equations are numbered as in the ICML paper.
"""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gpytorch
import gymnasium
import numpy as np
import torch
from botorch.exceptions import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models.gpytorch import GPyTorchModel
from tensordict import TensorDict
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common import plants  # noqa: F401  registers PILCO/...
from common.checkpoint import RunError
from common.envs import make_envs
from common.imagination import ModelBasedEnvBase
from common.run import (
    Count, MayChange, Natural, Positive, Rule, Run, load_agent, parse_flags, prepare, show_run,
    launch,
)  # fmt: skip

BLOCK = 2**17  # numbers of kernels worked on at a time, to stay in a core's cache, or one kernel
JITTER = 1e-6  # variance of a deterministic GP, as the authors', and ridge of inducing inputs
MIN_LOG_DENSITY = -300.0  # of a data point under the belief
Number = Annotated[float, Rule("a finite number", math.isfinite)]
Widths = Annotated[tuple[float, ...], Rule("positive numbers", lambda x: len(x) > 0 and min(x) > 0)]
Deviations = Annotated[
    tuple[float, ...], Rule("numbers that are not negative", lambda x: min(x, default=0) >= 0)
]


@dataclass
class Args:
    """Flags: the authors' settings, but for fewer trials and evaluations, and for --restarts."""

    preset: Literal["cart_pole", "pendulum", "double_pendulum", "inverted_pendulum", "debug"] = (
        "cart_pole"  # a scenario; other flags override it
    )
    env_id: str = "PILCO/CartPole-v0"  # any gymnasium id, also my_module:MyEnv-v0
    trials: MayChange[Count] = 8  # rollouts of a policy, each improved before it
    seed: Natural = 0  # of networks, noise and environments

    # the run

    run: MayChange[str] = ""  # folder; empty: runs/pilco/<env>/seed<seed>
    fresh: MayChange[bool] = False  # delete what the run folder holds and start over
    eval: MayChange[str] = ""  # run folder: play its policy, with --eval-episodes
    eval_episodes: MayChange[Count] = 10  # played at the end, and by --eval
    benchmark: bool = False  # time the value and its gradient at 100 and 300 points
    threads: MayChange[Natural] = (
        1  # of torch and numpy; 0: their choice; the matrices are too small for more
    )
    tensorboard: MayChange[bool] = True  # mirror the metrics to TensorBoard

    # environment

    horizon: Count = 40  # actions in a rollout, real or imagined
    random_rollouts: Count = 1  # before the first trial
    action_repeat: Count = 1  # environment steps per action
    dt: Positive = 0.1  # seconds that an environment step lasts, for the log
    camera: int = -1  # of MuJoCo; -1: the usual one
    render_quality: Literal["fast", "full"] = "fast"  # fast: no shadows, no antialiasing

    # belief

    angles: tuple[int, ...] = ()  # state variables that enter as sine and cosine
    start: tuple[float, ...] = ()  # mean of the first state; empty: of those seen
    start_std: Deviations = ()  # its deviations; empty: of those seen, at least 0.01
    noise: Literal["latent", "observed"] = "latent"  # observed: noise is added at every step

    # world model

    max_inducing: Count = 300  # with more points than these: FITC
    fit_steps: Count = 300  # of L-BFGS at most, for the hyperparameters

    # controller

    controller: Literal["rbf", "linear"] = "rbf"
    centres: Count = 50  # of the RBF controller
    bound: Literal["gSat", "gSin"] = "gSat"  # squashes actions: (9 sin u + sin 3u) / 8, or sin u

    # cost

    target: tuple[float, ...] = ()  # state; empty: zeros
    weights: tuple[float, ...] = ()  # features' diagonal or whole matrix; empty: ones
    widths: Widths = (1.0,)  # the cost is a mean over them
    exploration: Number = 0.0  # times the cost's deviation, added; below 0 explores
    gamma: Positive = 1.0  # discount per step

    # policy search

    iterations: Count = 150  # line searches of BFGS, at most
    evaluations: Count = 150  # of the expected cost and its gradient, at most, of all side by side
    restarts: Count = 4  # policies that a search begins with: the last one and new ones


def tip(width: int, *rows: dict[int, float]) -> tuple[float, ...]:
    """Weights (flat) of a squared distance: each row makes a coordinate, {feature: factor}."""
    matrix = np.zeros((len(rows), width))
    for row, entries in zip(matrix, rows, strict=True):
        row[list(entries)] = list(entries.values())
    return tuple((matrix.T @ matrix).flatten().tolist())


# fmt: off
PRESETS = {
    "cart_pole": dict(  # x, dx, dtheta, theta; the features end with sin and cos of theta
        angles=(3,), start=(0, 0, 0, 0), start_std=(0.1,) * 4, target=(0, 0, 0, math.pi),
        weights=tip(6, {0: 1, 4: 0.5}, {5: 0.5}), widths=(0.25,), max_inducing=150),
    "pendulum": dict(  # dtheta, theta
        env_id="PILCO/Pendulum-v0", angles=(1,), start=(0, 0), start_std=(0.1, 0.1),
        target=(0, math.pi), weights=tip(4, {2: 1}, {3: 1}), widths=(0.5,), centres=20,
        iterations=75),
    "double_pendulum": dict(  # dtheta1, dtheta2, theta1, theta2
        env_id="PILCO/DoublePendulum-v0", trials=20, horizon=30, angles=(2, 3),
        start=(0, 0, math.pi, math.pi), start_std=(0.1, 0.1, 0.01, 0.01), target=(0, 0, 0, 0),
        weights=tip(8, {4: 0.5, 6: 0.5}, {5: 0.5, 7: 0.5}), widths=(0.5,), centres=100),
    "inverted_pendulum": dict(  # position, angle and their speeds: balance, from near the top
        env_id="InvertedPendulum-v5", dt=0.04, trials=3, random_rollouts=5, iterations=50),
    "debug": dict(
        env_id="PILCO/Pendulum-v0", trials=2, horizon=8, angles=(1,), start=(0, 0),
        start_std=(0.1, 0.1), target=(0, math.pi), weights=tip(4, {2: 1}, {3: 1}), centres=4,
        iterations=3, evaluations=6, eval_episodes=1),
}
# fmt: on


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags -> Args: a flag beats the preset, which beats the defaults."""
    return parse_flags(Args, argv, __doc__, lambda chosen: PRESETS[chosen.preset])


# --- maths --------------------------------------------------------------------------------------

# The moments are many small products. In numpy, with gradients written out, they take a third less
# time than in torch at 100 data points.


def arrays(tensors: Sequence[Tensor | None]) -> list[np.ndarray | None]:
    """The same numbers for numpy."""
    return [None if x is None else x.detach().numpy() for x in tensors]


def tensors(*results: np.ndarray) -> tuple[Tensor, ...]:
    """The same numbers for torch."""
    return tuple(map(torch.from_numpy, results))


def invert(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive definite (..., K, K) -> inverse and half the log-determinant; NaN if it is not."""
    try:
        root = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:  # of one or more: torch tells which
        root, failed = arrays(torch.linalg.cholesky_ex(torch.from_numpy(matrix)))
        root[failed > 0] = np.nan
    half = np.linalg.inv(root)
    return half.mT @ half, np.log(root.diagonal(axis1=-2, axis2=-1)).sum(-1)


class Pairs:
    """Indices and constants of the P pairs a <= b of E functions, those with a = b first.

    The Gaussians of `Moments` have 2I variables each: nu_i alone, filled up with an independent
    standard normal, for every function; then nu_i and nu_j for every pair.
    """

    def __init__(self, outputs: int):
        own, upper = np.arange(outputs), np.triu_indices(outputs, 1)
        self.a, self.b = (np.concatenate([own, more]) for more in upper)
        self.count = count = len(self.a)
        self.ends, self.others = np.concatenate([self.a, self.b]), np.concatenate([self.b, self.a])
        self.number = self.a * outputs + self.b  # in a flat matrix
        self.matrix = np.empty((outputs, outputs), int)
        self.matrix[self.a, self.b] = self.matrix[self.b, self.a] = np.arange(count)
        self.matrix = self.matrix.flatten()
        self.once = np.where(self.a == self.b, 0.5, 1.0)
        self.weights = self.ends + outputs * (self.ends != self.others)  # of a GP, in [q; p]
        self.at_end = np.eye(outputs)[:, self.ends]  # (E, 2P)
        self.blocks = np.ones((outputs + count, 2, 1, 2, 1))  # those that hold the covariance
        self.blocks[:outputs, 1], self.blocks[:outputs, :, :, 1] = 0, 0
        # half log-determinants (E + P) -> constants of log q (E) and of d_ij (2P, half of them 0)
        eye = np.eye(outputs)
        self.constants = np.zeros((outputs + count, outputs + 2 * count))
        self.constants[:outputs, :outputs] = -eye
        self.constants[:outputs, outputs : outputs + count] = (eye[self.a] + eye[self.b]).T
        self.constants[outputs:, outputs : outputs + count] = -np.eye(count)


pairs = functools.cache(Pairs)


class Factors(NamedTuple):
    """What the moments of E functions f_a(x) = sum_i beta_ai k_a(x_i, x) depend on; `factors`.

    For GPs, whose functions are uncertain, also their prior `variance` (E), the `inverse` (E, n, n)
    of the kernel matrix and weight = beta beta' - inverse.
    """

    inputs: Tensor  # (n, I)
    lambdas: Tensor  # (E + P, 2I, 2I): squared lengthscales, the diagonals of Moments' Gaussians
    log_scale: Tensor  # (E + 2P): log signal^2 sqrt(det Lambda), and zeros
    beta: Tensor  # (E, n)
    variance: Tensor  # (E): the prior's, or a ridge
    inverse: Tensor | None = None
    weight: Tensor | None = None


def factors(inputs: Tensor, log_lengthscale: Tensor, log_signal: Tensor, beta: Tensor) -> Factors:
    """Factors of functions that are certain: (n, I), (E, I), (E), (E, n), or batches of them."""
    pair, scale = pairs(log_lengthscale.shape[-2]), torch.exp(2 * log_lengthscale)
    alone = torch.cat([scale, torch.ones_like(scale)], -1)
    both = torch.cat([scale[..., pair.a, :], scale[..., pair.b, :]], -1)
    log_scale = F.pad(2 * log_signal + log_lengthscale.sum(-1), (0, 2 * pair.count))
    lambdas = torch.diag_embed(torch.cat([alone, both], -2))
    return Factors(inputs, lambdas, log_scale, beta, torch.full_like(log_signal, JITTER))


def gp_factors(inputs: Tensor, hyper: tuple, beta: Tensor, inverse: Tensor) -> Factors:
    """Factors of GPs with these hyperparameters."""
    known, weight = factors(inputs, *hyper[:2], beta), beta[:, :, None] * beta[:, None] - inverse
    return known._replace(variance=torch.exp(2 * hyper[1]), inverse=inverse, weight=weight)


def kernel(x: Tensor, y: Tensor, log_lengthscale: Tensor, log_signal: Tensor) -> Tensor:
    """Squared exponential kernel, eq. 6: x (..., n, I), y (..., m, I) -> (..., E, n, m)."""
    x, y = (z[..., None, :, :] * torch.exp(-log_lengthscale)[..., None, :] for z in (x, y))
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(2 * log_signal[..., None, None] - 0.5 * distance.square())


def pair_sums(left, right, first, second, inverse, weight) -> tuple[np.ndarray, np.ndarray]:
    """k second (N, P, n, I + 1) and first' k (N, P, I + 1, n), k_ij = exp(left_i . right_j) - 1.

    The first pairs' k is weight * k - inverse where those are given. A few pairs at a time: what is
    of size n x n stays in the cache and is not kept.
    """
    batch, count, n, width = second.shape
    over_j, over_i = np.empty_like(second), np.empty((batch, count, width, n))
    size = min(count, max(1, BLOCK // (batch * n**2)))
    room = np.empty((batch, size, n, n))
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        k = np.matmul(left[:, part], right[:, part].mT, out=room[:, : part.stop - start])
        np.expm1(k, out=k)
        if inverse is not None and start < len(inverse):
            own = slice(start, min(part.stop, len(inverse)))
            gp = k[:, : own.stop - start]
            gp *= weight[own]
            gp -= inverse[own]
        np.matmul(k, second[:, part], out=over_j[:, part])
        np.matmul(first[:, part].mT, k, out=over_i[:, part])
    return over_j, over_i


class Moments(torch.autograd.Function):
    """Mean (N, E), covariance (N, E, E), slope (N, E, I) of moment_matching, and their gradients.

    The integrals of eq. 14-23 are Gaussian densities: q_ai that of nu_i = x_i - mean, with the
    covariance cov + Lambda_a, Q_ij that of (nu_i, nu_j), with [[cov + Lambda_a, cov], [cov, cov +
    Lambda_b]]. One rule makes all gradients: by its covariance C the logarithm of a density at z
    has the derivative (u u' - C^-1) / 2, u = C^-1 z, and by z it has -u.
    """

    @staticmethod
    @np.errstate(all="ignore")
    def forward(ctx, *args):
        mean, cov, inputs, lambdas, log_scale, beta, variance, inverse, weight = arrays(args)
        (batch, width), (outputs, n) = mean.shape, beta.shape[-2:]
        ctx.pair = pair = pairs(outputs)
        count, last = pair.count, outputs + pair.count
        covs = (pair.blocks * cov[:, None, None, :, None]).reshape(batch, last, 2 * width, -1)
        precision, logdet = invert(lambdas + covs)
        alone, both = precision[:, :outputs, :width, :width], precision[:, outputs:]
        phi = np.ones((batch, n, width + 1))  # nu and 1
        np.subtract(inputs, mean[:, None], out=phi[..., :width])
        design = (phi[..., None] * phi[..., None, :]).reshape(batch, n, -1)
        # log q_a (E) and the parts of d_ij = log Q_ij - log q_i - log q_j of i (P) and of j (P)
        forms = np.zeros((batch, last + count, width + 1, width + 1))
        forms[:, :outputs, :-1, :-1] = alone
        forms[:, outputs:last, :-1, :-1] = both[..., :width, :width] - alone[:, pair.a]
        forms[:, last:, :-1, :-1] = both[..., width:, width:] - alone[:, pair.b]
        rows = -0.5 * forms.reshape(batch, last + count, -1) @ design.mT  # (N, E + 2P, n)
        rows += (log_scale + logdet @ pair.constants)[..., None]
        low = np.minimum(rows[:, :outputs] - MIN_LOG_DENSITY, 0)
        if low.any():  # d would overflow: lift q to e^-300, which is nothing, and lower d as much
            rows[:, :outputs] -= low
            rows[:, outputs:] += low[:, pair.ends]
        q = np.exp(rows[:, :outputs])
        p = beta * q
        total = p @ phi  # (N, E, I + 1): sums of p nu and of p

        weights = p[:, pair.ends] if inverse is None else np.hstack([q, p])[:, pair.weights]
        left, right = np.empty((2, batch, count, n, width + 2))
        np.matmul(phi[:, None, :, :width], -both[..., :width, width:], out=left[..., :width])
        left[..., width], left[..., width + 1] = rows[:, outputs:last], 1
        right[..., : width + 1], right[..., width + 1] = phi[:, None], rows[:, last:]
        ends = weights[..., None] * phi[:, None]  # (N, 2P, n, I + 1)
        over_j, over_i = pair_sums(left, right, ends[:, :count], ends[:, count:], inverse, weight)
        spread = (weights[:, :count] * over_j[..., width]).sum(-1)
        spread[:, :outputs] += variance
        spread = spread[:, pair.matrix].reshape(batch, outputs, outputs)
        slope = alone @ total[..., :width, None]  # (N, E, I, 1)
        ctx.precision, ctx.phi, ctx.design, ctx.slope = precision, phi, design, slope
        ctx.q, ctx.p, ctx.total, ctx.beta, ctx.weights = q, p, total, beta, weights
        ctx.ends, ctx.points = ends, np.hstack([over_j, over_i.mT])  # sums over the other end
        return tensors(total[..., width].copy(), spread, slope[..., 0].copy())

    @staticmethod
    @once_differentiable
    @np.errstate(all="ignore")
    def backward(ctx, *grads):
        by_value, by_spread, by_slope = arrays(grads)
        pair, p, total, (batch, _, size) = ctx.pair, ctx.p, ctx.total, ctx.phi.shape
        outputs, width, value = p.shape[1], size - 1, total[..., size - 1 :]
        alone = ctx.precision[:, :outputs, :width, :width]
        by_spread = by_spread + by_spread.mT
        scale = (by_spread.reshape(batch, -1)[:, pair.number] * pair.once)[..., None, None]
        # spread is sum_ij p_i p_j exp(d_ij) - value value': of the last term the gradient by value
        drop = by_spread @ value  # (N, E, 1)
        raised = alone @ by_slope[..., None]  # (N, E, I, 1)
        w = np.concatenate([raised[..., 0], by_value[..., None] - drop], -1) @ ctx.phi.mT  # by p

        sums = second_moments(ctx, w)
        sums[:, outputs:] *= scale
        lift = np.zeros((*sums.shape[:2], 2 * width, 2, size))  # z -> u
        lift[..., :width] = ctx.precision.reshape(*lift.shape[:-1], width)
        lift = lift.reshape(*lift.shape[:-2], -1)
        u = lift @ sums
        by_lambdas = 0.5 * (u @ lift.mT - ctx.precision * sums[..., width, width, None, None])
        turn = 0.5 * ctx.slope @ raised.mT
        by_lambdas[:, :outputs, :width, :width] -= turn + turn.mT
        by_cov = by_lambdas.reshape(batch, -1, 2, width, 2, width) * pair.blocks
        by_mean = u[..., width].reshape(batch, -1, width).sum(1)
        by_mean -= (raised * value[..., None]).sum(1)[..., 0]
        by_belief = tensors(by_mean, by_cov.sum((1, 2, 4)))
        if not any(ctx.needs_input_grad[2:]):  # a GP, which is given
            return *by_belief, *[None] * 7
        by_inputs = p.mT @ raised[..., 0] + by_nu(ctx, w, scale, lift[:, outputs:])
        by_ends = np.hstack([scale, scale])[..., 0] * ctx.points[..., width]
        by_beta = ctx.q * (w + drop + pair.at_end @ by_ends)
        by_scale = np.zeros((batch, outputs + 2 * pair.count))
        by_scale[:, :outputs] = (by_beta * ctx.beta).sum(-1)
        return *by_belief, *tensors(by_inputs, by_lambdas, by_scale, by_beta), *[None] * 3


def second_moments(ctx, w: np.ndarray) -> np.ndarray:
    """Weighted sums of z z': z = (nu_i, 1, nu_j, 1), (nu_i, 1, 0, 0) for the functions.

    (N, E + P, 2I + 2, 2I + 2); the weights are p w and p_i p_j exp(d_ij).
    """
    pair, p, total, (batch, _, size) = ctx.pair, ctx.p, ctx.total, ctx.phi.shape
    outputs, count = p.shape[1], pair.count
    rows = np.hstack([p * w, p, ctx.weights * ctx.points[..., size - 1]]) @ ctx.design
    rows = rows.reshape(batch, -1, size, size)
    # exp = (exp - 1) + 1: the sums of the 1 are products
    product = total[:, pair.others, size - 1, None, None]
    own = rows[:, 2 * outputs :] + rows[:, outputs + pair.ends] * product
    cross = ctx.ends[:, :count].mT @ ctx.points[:, :count]
    cross += total[:, pair.a, :, None] * total[:, pair.b, None, :]
    sums = np.zeros((batch, outputs + count, 2 * size, 2 * size))
    sums[:, :outputs, :size, :size] = rows[:, :outputs]
    both = sums[:, outputs:]
    both[..., :size, :size], both[..., :size, size:] = own[:, :count], cross
    both[..., size:, :size], both[..., size:, size:] = cross.mT, own[:, count:]
    return sums


def by_nu(ctx, w: np.ndarray, scale: np.ndarray, lift: np.ndarray) -> np.ndarray:
    """The gradient by each nu_i (N, n, I) through its densities: the sum of -u."""
    pair, p, (batch, n, size) = ctx.pair, ctx.p, ctx.phi.shape
    count, width = pair.count, size - 1
    there = ctx.weights[..., None] * (ctx.points + ctx.total[:, pair.others, None])
    z = np.empty((batch, 2, count, n, 2, size))  # its sums over j, then over i
    for end, part in enumerate((there[:, :count], there[:, count:])):
        z[:, end, :, :, end] = part[..., width:] * ctx.phi[:, None]
        z[:, end, :, :, 1 - end] = part
    lift = lift.reshape(batch, count, 2, width, -1).swapaxes(1, 2) * scale[:, None]
    u = (z.reshape(batch, 2, count, n, -1) @ lift.mT).sum((1, 2))
    alone = (p * w)[..., None] * ctx.phi[:, None, :, :width]
    return -u - (alone @ ctx.precision[:, : p.shape[1], :width, :width]).sum(1)


def prediction(x: Tensor, f: Factors, hyper: tuple) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, E) of GPs at inputs that are known, x (N, I): eq. 7-8."""
    k = kernel(x, f.inputs, *hyper[:2])  # (E, N, n)
    variance = f.variance[:, None] - ((k @ f.inverse) * k).sum(-1)
    return (k @ f.beta[..., None])[..., 0].mT, variance.clamp(min=0).mT


def moment_matching(mean: Tensor, cov: Tensor, f: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of f(x) for x ~ N(mean, cov), eq. 14-23: mean (N, I), cov (N, I, I).

    Returns the mean (N, E), the covariance (N, E, E) and the gain (N, I, E): the covariance of x
    and f(x) is cov @ gain. With d_ij = log Q_ij - log q_i - log q_j, the covariance of posterior
    means is sum_ij p_i p_j (exp(d_ij) - 1), where the paper subtracts two sums of nearly that size.
    """
    value, spread, slope = Moments.apply(mean, cov, *f)
    return value, spread, slope.mT


class Waves(NamedTuple):
    """f(x) = amplitude' sin(frequency' x + phase): D numbers, K waves, M results."""

    frequency: np.ndarray  # (D, K)
    phase: np.ndarray  # (K)
    amplitude: np.ndarray  # (K, M)


def outer(x: np.ndarray) -> np.ndarray:
    """x x': (N, K) -> (N, K, K)."""
    return x[..., :, None] * x[..., None, :]


class Sines(torch.autograd.Function):
    """Mean (N, M), covariance (N, M, M) and gain (N, D, M) of sine_moments, and their gradients."""

    @staticmethod
    @np.errstate(all="ignore")
    def forward(ctx, mean, cov, waves):
        (mean, cov), (frequency, phase, amplitude) = arrays([mean, cov]), waves
        mean, cov = mean @ frequency + phase, frequency.T @ cov @ frequency
        sin, cos, decay = np.sin(mean), np.cos(mean), -0.5 * cov.diagonal(axis1=-2, axis2=-1)
        # sinh and cosh - 1 of cov, times both decays: cov is at most what they subtract
        decays, size = decay[..., :, None] + decay[..., None, :], np.abs(cov)
        most, decay = np.exp(decays + size), np.exp(decay)
        odd = -0.5 * np.sign(cov) * most * np.expm1(-2 * size)
        even = 0.5 * most * np.expm1(-size) ** 2
        spread = odd * outer(cos) + even * outer(sin)
        ctx.saved = waves, sin, cos, decay, odd, even, np.exp(decays), spread
        mean, spread = (decay * sin) @ amplitude, amplitude.T @ spread @ amplitude
        return tensors(mean, spread, (frequency * (decay * cos)[:, None]) @ amplitude)

    @staticmethod
    @once_differentiable
    @np.errstate(all="ignore")
    def backward(ctx, *grads):
        by_mean, by_cov, by_gain = arrays(grads)
        (frequency, _, amplitude), sin, cos, decay, odd, even, decays, spread = ctx.saved
        by_cov = amplitude @ by_cov @ amplitude.T
        by_sine = decay * (by_mean @ amplitude.T)
        by_cosine = decay * ((frequency.T @ by_gain) * amplitude).sum(-1)
        both, index = by_cov + by_cov.mT, np.arange(len(amplitude))
        by_decay = by_sine * sin + by_cosine * cos + (both * spread).sum(-1)
        by_sine = by_sine + ((both * even) @ sin[..., None])[..., 0]
        by_cosine = by_cosine + ((both * odd) @ cos[..., None])[..., 0]
        by_mean = by_sine * cos - by_cosine * sin
        by_cov = by_cov * ((even + decays) * outer(cos) + odd * outer(sin))
        by_cov[:, index, index] -= 0.5 * by_decay
        return *tensors(by_mean @ frequency.T, frequency @ by_cov @ frequency.T), None


def sine_moments(mean: Tensor, cov: Tensor, waves: Waves) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of f(x), a sum of sines, for x ~ N(mean, cov): (N, D), (N, D, D).

    Returns mean (N, M), covariance (N, M, M) and gain (N, D, M): the covariance of x and f(x) is
    cov @ gain. For single waves with E sin = s and E cos = c, the covariance is, element by
    element, sinh(cov) c c' + (cosh(cov) - 1) s s'.
    """
    return Sines.apply(mean, cov, waves)


def select(mean: Tensor, cov: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of x[index]: (N, D), (N, D, D) -> (N, K), (N, K, K)."""
    return mean.index_select(-1, index), cov.index_select(-1, index).index_select(-2, index)


def join(mean, cov, more_mean, more_cov, cross) -> tuple[Tensor, Tensor]:
    """The joint Gaussian of x and y, whose covariance is cross (N, D, K): (N, D + K), ..."""
    rows = torch.cat([cov, cross], -1), torch.cat([cross.mT, more_cov], -1)
    return torch.cat([mean, more_mean], -1), torch.cat(rows, -2)


@functools.cache
def angle_waves(angles: tuple[int, ...], width: int) -> Waves:
    """Sine and cosine of each angle: cos x = sin(x + pi / 2)."""
    frequency = np.eye(width)[:, [i for i in angles for _ in range(2)]]
    return Waves(frequency, np.array([0, math.pi / 2] * len(angles)), np.eye(2 * len(angles)))


def with_angles(mean: Tensor, cov: Tensor, angles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Append sin and cos of each angle to x: (N, D), (N, D, D) -> (N, D + 2K), ..."""
    if not angles:
        return mean, cov
    sine, sine_cov, gain = sine_moments(mean, cov, angle_waves(tuple(angles), mean.shape[-1]))
    return join(mean, cov, sine, sine_cov, cov.bmm(gain))


@functools.cache
def bounding_waves(kind: str, actions: int) -> Waves:
    """What bounds actions to [-1, 1]: "gSat" is (9 sin u + sin 3u) / 8, "gSin" sin u."""
    frequencies, amplitudes = {"gSat": ((1, 3), (9 / 8, 1 / 8)), "gSin": ((1,), (1,))}[kind]
    frequency = np.hstack([factor * np.eye(actions) for factor in frequencies])
    amplitude = np.vstack([factor * np.eye(actions) for factor in amplitudes])
    return Waves(frequency, np.zeros(len(amplitude)), amplitude)


def squash(mean, cov, gain, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bound actions u ~ N(mean, cov) to [-1, 1]; their gain (N, I, A) is from the state."""
    mean, cov, slope = sine_moments(mean, cov, bounding_waves(kind, mean.shape[-1]))
    return mean, cov, gain.bmm(slope)


def certain(mean: Tensor) -> tuple[Tensor, Tensor]:
    """A state (N, D) known exactly, as the moments of a belief."""
    return mean, mean.new_zeros(*mean.shape, mean.shape[-1])


# --- GP world model -----------------------------------------------------------------------------


class IndependentGPs(gpytorch.models.ExactGP, GPyTorchModel):
    """Zero-mean GPs, one for each row of targets: inputs (E, n, I), targets (E, n)."""

    def __init__(self, inputs, targets, likelihood, covar_module):
        super().__init__(inputs, targets, likelihood)
        self.covar_module = covar_module

    def forward(self, x):
        covariance = self.covar_module(x)
        return gpytorch.distributions.MultivariateNormal(x.new_zeros(x.shape[:-1]), covariance)

    def log_hyperparameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of lengthscales (E, I), signal deviations (E) and noise deviations (E)."""
        covar, noise = self.covar_module, self.likelihood.noise
        scale = covar.base_kernel.lengthscale[:, 0]
        return scale.log(), covar.outputscale.log() / 2, noise[:, 0].log() / 2


class PenalisedMarginalLikelihood(gpytorch.mlls.ExactMarginalLogLikelihood):
    """Log marginal likelihood (E) per data point, minus the authors' penalty.

    sum_d (ln(lengthscale_d / std_d) / ln 100)^30 + (ln(signal / noise) / ln 1000)^30: a wall at
    lengthscales of 100 deviations of their input and at a signal-to-noise ratio of 1,000.
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


def exact(x: Tensor, y: Tensor, hyper: tuple[Tensor, Tensor, Tensor]) -> Factors:
    """Factors of the GPs with data x (n, I), y (n, E)."""
    gram = kernel(x, x, *hyper[:2])
    gram.diagonal(dim1=-2, dim2=-1).add_(torch.exp(2 * hyper[2])[:, None])
    root = torch.linalg.cholesky(gram)
    beta = torch.cholesky_solve(y.T[..., None], root)[..., 0]
    return gp_factors(x, hyper, beta, torch.cholesky_inverse(root))


def fitc(x: Tensor, y: Tensor, z: Tensor, hyper: tuple, ridge: float = JITTER) -> Factors:
    """Factors of the GPs with data x (n, I), y (n, E) through inducing inputs z (m, I): FITC.

    Snelson & Ghahramani (2006). Here `inverse` is the inverse kernel matrix of z minus that of the
    posterior. `ridge` is in units of the signal's variance; the authors', 1e-6, is not.
    """
    eye, ridge = torch.eye(len(z)).to(z), ridge * torch.exp(2 * hyper[1])[:, None, None]
    root = torch.linalg.cholesky(kernel(z, z, *hyper[:2]) + ridge * eye)  # (E, m, m)
    v = torch.linalg.solve_triangular(root, kernel(z, x, *hyper[:2]), upper=False)
    noise = (torch.exp(2 * hyper[1]) + torch.exp(2 * hyper[2]))[:, None] - v.square().sum(-2)
    v, both = v / noise[:, None], root @ torch.linalg.cholesky(eye + v / noise[:, None] @ v.mT)
    beta = torch.cholesky_solve(root @ (v @ y.T[..., None]), both)[..., 0]
    return gp_factors(z, hyper, beta, torch.cholesky_inverse(root) - torch.cholesky_inverse(both))


def most_uncertain(x: Tensor, hyper: tuple[Tensor, Tensor, Tensor], count: int) -> Tensor:
    """Rows of x (n, I) as inducing inputs (count, I): always the one least known from the others.

    The greedy choice of Burt et al. (2020), by the variances of all outputs given the inputs
    chosen before, each in units of its noise.
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


def check_data(observation: Tensor, action: Tensor, after: Tensor):
    """RunError unless a GP can be fitted to transitions: (n, D), (n, A), (n, D)."""
    if len(observation) < 2:
        raise RunError(f"a Gaussian process needs at least two transitions, not {len(observation)}")
    parts = {"observation": observation, "action": action, "next observation": after}
    for name, values in parts.items():
        if not values.isfinite().all():
            bad = (~values.isfinite()).any(0).nonzero()[:, 0].tolist()
            raise RunError(f"NaN or infinity in {name}, numbers {bad}")
    still = (after - observation == (after - observation)[0]).all(0).nonzero()[:, 0].tolist()
    if still:
        raise RunError(f"numbers {still} of the observation always change alike: leave them out")


class GPWorldModel(nn.Module):
    """p(x' | x, u): a GP for each state variable's difference, eq. 2-8, in the units of the data.

    Angles enter as sine and cosine. With more than `max_inducing` points the GPs keep the
    hyperparameters of all data and predict through inducing inputs (FITC). What `fit` learns is
    not in `state_dict`: data and hyperparameters, `hyper`, give it again (`factorise`).
    """

    def __init__(self, obs_dim: int, action_dim: int, *, angles: Sequence[int] = (),
                 max_inducing: int = 300, fit_steps: int = 300):  # fmt: skip
        super().__init__()
        self.obs_dim, self.action_dim, self.angles = obs_dim, action_dim, tuple(angles)
        self.max_inducing, self.fit_steps = max_inducing, fit_steps
        straight = [i for i in range(obs_dim) if i not in self.angles]
        features = straight + [obs_dim + i for i in range(2 * len(self.angles))]
        self.register_buffer("features", torch.tensor(features))
        self.hyper = self.factors = None

    def dataset(self, td: TensorDict) -> tuple[Tensor, Tensor]:
        """Transitions td[n] -> inputs (n, I), targets (n, E); ValueError for other widths."""
        parts = td["observation"], td["next", "observation"], td["action"]
        if any(part.dtype != torch.float64 for part in parts):
            warnings.warn("PILCO computes in float64: the transitions are converted", stacklevel=3)
        x, after, action = (part.double() for part in parts)
        if (x.shape[-1], action.shape[-1]) != (self.obs_dim, self.action_dim):
            have = f"made for {self.obs_dim} state variables and {self.action_dim} actions"
            raise ValueError(f"{have}, not {x.shape[-1]} and {action.shape[-1]}")
        inputs = with_angles(*certain(x), self.angles)[0][:, self.features]
        return torch.cat([inputs, action], -1), after - x

    def fit(self, td: TensorDict) -> "GPWorldModel":
        """Learn from transitions td[n] with `observation`, `action` and ("next", "observation").

        Hyperparameters start from those of the last fit. RunError for data that no GP can be
        fitted to.
        """
        check_data(td["observation"], td["action"], td["next", "observation"])
        x, y = self.dataset(td)
        std = x.std(0).clamp(min=1e-6)
        if self.hyper is None:
            signal = y.std(0).clamp(min=1e-6).log()
            self.hyper = std.log().expand(self.obs_dim, -1).clone(), signal, signal - math.log(10)
        mll = PenalisedMarginalLikelihood(self.build(x, y), std)
        options = {"options": {"maxiter": self.fit_steps}}
        try:
            with warnings.catch_warnings():  # that it stopped at maxiter
                warnings.simplefilter("ignore")
                fit_gpytorch_mll(mll, optimizer_kwargs=options)
        except ModelFittingError as error:
            raise RunError(f"the Gaussian processes could not be fitted: {error}") from None
        self.hyper = tuple(value.detach() for value in mll.model.log_hyperparameters())
        self.factorise(x, y)
        return self

    def build(self, x: Tensor, y: Tensor) -> IndependentGPs:
        """GPyTorch's model of the data at the present hyperparameters."""
        batch = {"batch_shape": torch.Size([self.obs_dim])}
        logs = gpytorch.constraints.Positive(torch.exp, torch.log)  # what the fit moves
        base = gpytorch.kernels.RBFKernel(x.shape[-1], lengthscale_constraint=logs, **batch)
        covar = gpytorch.kernels.ScaleKernel(base, outputscale_constraint=logs, **batch)
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=logs, **batch)
        model = IndependentGPs(x.expand(self.obs_dim, *x.shape), y.mT, likelihood, covar).to(x)
        lengthscale, signal, noise = (value.exp() for value in self.hyper)
        base.lengthscale, covar.outputscale = lengthscale[:, None], signal.square()
        likelihood.noise = noise.square()[:, None]
        return model

    def factorise(self, x: Tensor, y: Tensor):
        """Compute once what every prediction needs."""
        if len(x) <= self.max_inducing:
            self.factors = exact(x, y, self.hyper)
        else:
            inducing = most_uncertain(x, self.hyper, self.max_inducing)
            self.factors = fitc(x, y, inducing, self.hyper)

    def forward(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs N(mean (N, I), cov (N, I, I)) -> moments of the difference, as moment_matching.

        RunError before the first `fit`.
        """
        if self.factors is None:
            raise RunError("the world model has no data yet: fit it first")
        return moment_matching(mean, cov, self.factors)


# --- controllers --------------------------------------------------------------------------------


class LinearController(nn.Module):
    """u = squash(W x + b): the features' moments -> the action's, for R policies side by side.

    `theta` (R, P) holds all parameters of each policy; `prepare` does what is needed once for many
    steps, `forward` takes what it returns.
    """

    def __init__(self, inputs: int, action_dim: int, *, bound: str = "gSat", restarts: int = 1):
        super().__init__()
        self.bound, self.action_dim = bound, action_dim
        self.sizes = {"weight": (action_dim, inputs), "bias": (action_dim,)}
        self.theta = parameters(self.sizes, restarts)

    def draw(self, points: Tensor, lengthscale: Tensor, targets: float) -> Tensor:
        """Random parameters (R, P), as the authors': small weights, no bias, whatever the data."""
        theta = torch.zeros_like(self.theta)
        unpack(theta, self.sizes)["weight"].normal_(0, 0.01)
        return theta

    def scale(self, theta: Tensor) -> Tensor:
        """Natural units of the parameters (R, P), for the search."""
        return torch.ones_like(theta)

    def prepare(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        return unpack(self.theta if theta is None else theta, self.sizes)

    def forward(self, mean: Tensor, cov: Tensor, prepared=None) -> tuple[Tensor, Tensor, Tensor]:
        """(R, F), (R, F, F) -> mean (R, A), covariance (R, A, A), gain (R, F, A) of actions."""
        parts = self.prepare() if prepared is None else prepared
        weight = parts["weight"].expand(len(mean), -1, -1)
        action = (weight @ mean[..., None])[..., 0] + parts["bias"]
        return squash(action, weight @ cov @ weight.mT, weight.mT, self.bound)


class RBFController(nn.Module):
    """u = squash(f(x)), f the mean of a GP with `centres` points: signal 1, noise 0.01, eq. 11.

    Centres are shared by all actions, targets and lengthscales are not. See LinearController for
    `theta`, `prepare` and the shapes.
    """

    def __init__(self, inputs: int, action_dim: int, *, centres: int = 50, bound: str = "gSat",
                 restarts: int = 1):  # fmt: skip
        super().__init__()
        self.bound, self.action_dim = bound, action_dim
        self.sizes = {"centres": (centres, inputs), "targets": (centres, action_dim)}
        self.sizes |= {"log_lengthscale": (action_dim, inputs)}
        self.theta = parameters(self.sizes, restarts)

    def draw(self, points: Tensor, lengthscale: Tensor, targets: float) -> Tensor:
        """Random parameters (R, P): centres among points (n, F), targets of this deviation."""
        theta = torch.zeros_like(self.theta)
        parts = unpack(theta, self.sizes)
        for centres in parts["centres"]:
            times = math.ceil(len(centres) / len(points))  # more centres than points: some twice
            centres.copy_(points[torch.randperm(len(points)).repeat(times)[: len(centres)]])
        parts["targets"].normal_(0, targets)
        parts["log_lengthscale"].copy_(lengthscale.log().expand_as(parts["log_lengthscale"]))
        return theta

    def scale(self, theta: Tensor) -> Tensor:
        """Natural units of the parameters (R, P), for the search: of centres, the lengthscales."""
        scale = torch.ones_like(theta)
        unit = unpack(theta, self.sizes)["log_lengthscale"].mean(1, keepdim=True).exp()
        parts = unpack(scale, self.sizes)["centres"]
        parts.copy_(unit.expand_as(parts))
        return scale

    def prepare(self, theta: Tensor | None = None) -> Factors:
        parts = unpack(self.theta if theta is None else theta, self.sizes)
        centres, scale = parts["centres"], parts["log_lengthscale"]
        signal = torch.zeros_like(scale[..., 0])
        gram = kernel(centres, centres, scale, signal)
        gram = gram + 0.01**2 * torch.eye(gram.shape[-1]).to(gram)
        beta = torch.linalg.solve(gram, parts["targets"].mT[..., None])[..., 0]
        return factors(centres, scale, signal, beta)

    def forward(self, mean: Tensor, cov: Tensor, prepared=None) -> tuple[Tensor, Tensor, Tensor]:
        prepared = self.prepare() if prepared is None else prepared
        return squash(*moment_matching(mean, cov, prepared), self.bound)


def parameters(sizes: dict, restarts: int) -> nn.Parameter:
    """Room for the parameters of these sizes: (R, P)."""
    count = sum(map(math.prod, sizes.values()))
    return nn.Parameter(torch.zeros(restarts, count, dtype=torch.float64))


def unpack(theta: Tensor, sizes: dict) -> dict[str, Tensor]:
    """Rows of parameters (R, P) -> {name: (R, *size)}, views of them."""
    parts = theta.split([math.prod(size) for size in sizes.values()], -1)
    named = zip(parts, sizes.items(), strict=True)
    return {name: part.unflatten(-1, size) for part, (name, size) in named}


# --- cost ---------------------------------------------------------------------------------------


class ExpectedCost(torch.autograd.Function):
    """Mean and variance (N) of the saturating cost of a Gaussian, eq. 24-25, and their gradients.

    The offset from the target is N(mean (N, F), cov (N, F, F)); weights are root' root, root (r,
    F). With z = root x, E exp(-s |z|^2 / 2) is a Gaussian integral; scales (2K) are s for each of K
    widths, then 2 s, for the square.
    """

    @staticmethod
    @np.errstate(all="ignore")
    def forward(ctx, mean, cov, root, scales, exploration):
        mean, cov, root, scales = arrays([mean, cov, root, scales[:, None, None]])
        z, spread = (mean @ root.T)[:, None, :, None], (root @ cov @ root.T)[:, None]
        inner = np.eye(len(root)) + scales * spread  # (N, 2K, r, r)
        inverse, logdet = invert(inner)
        inverse = scales * inverse
        u = inverse @ z  # (N, 2K, r, 1)
        value = np.exp(-0.5 * (u * z).sum((-2, -1)) - logdet)
        count = value.shape[-1] // 2
        once, twice = value[:, :count], value[:, count:]
        variance = np.maximum(twice - once**2, 0)
        deviation = np.sqrt(np.maximum(variance, 1e-12))
        ctx.saved = root, exploration, inverse, u, value, variance, deviation
        cost = 1 - once + exploration * deviation
        return tensors(cost.sum(-1) / count, variance.sum(-1) / count)

    @staticmethod
    @once_differentiable
    @np.errstate(all="ignore")
    def backward(ctx, *grads):
        by_cost, by_variance = (grad[:, None] for grad in arrays(grads))
        root, exploration, inverse, u, value, variance, deviation = ctx.saved
        count = variance.shape[-1]
        by_deviation = exploration * by_cost * (variance > 1e-12)
        by_variance = (by_variance + 0.5 * by_deviation / deviation) * (variance > 0)
        by_once = -by_cost - 2 * value[:, :count] * by_variance
        by_value = (np.hstack([by_once, by_variance]) * value / count)[..., None, None]
        by_spread = 0.5 * (by_value * (u @ u.mT - inverse)).sum(1)
        by_z = -(by_value * u).sum(1)[..., 0]
        return *tensors(by_z @ root, root.T @ by_spread @ root), None, None, None


class ExponentialQuadraticCost(nn.Module):
    """1 - exp(-(x - target)' weights (x - target) / (2 width^2)), mean over `widths`, eq. 24-25.

    target (D) is a state; weights (F, F) are those of its features, sine and cosine of `angles`
    appended. `exploration` times the deviation is added to the expectation of each width: below 0
    it favours what is uncertain.
    """

    def __init__(self, target, weights, *, widths: Sequence[float] = (1.0,),
                 angles: Sequence[int] = (), exploration: float = 0.0):  # fmt: skip
        super().__init__()
        self.angles, self.exploration = tuple(angles), exploration
        target = torch.as_tensor(target, dtype=torch.float64)[None]
        self.register_buffer("target", with_angles(*certain(target), self.angles)[0][0])
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if weights.shape != (len(self.target),) * 2:
            raise ValueError(f"weights must be square, of {len(self.target)} features")
        values, vectors = torch.linalg.eigh(weights)
        if values[0] < -1e-12 * values[-1] or not torch.equal(weights, weights.T):
            raise ValueError("weights must be symmetric and positive semi-definite")
        root = (vectors * values.clamp(min=0).sqrt())[:, values > 1e-12 * values[-1]]
        self.register_buffer("root", root.T.contiguous())  # (r, F): weights = root' root
        once = 1 / torch.as_tensor(widths, dtype=torch.float64).square()
        self.register_buffer("scales", torch.cat([once, 2 * once]))  # of 1 - cost and its square

    def moments(self, mean: Tensor, cov: Tensor, exploration=0.0) -> tuple[Tensor, Tensor]:
        """Features N(mean (N, F), cov (N, F, F)) -> expected cost and its variance (N).

        The variance is the mean over the widths, as the authors', not that of the mean cost.
        """
        offset = mean - self.target
        return ExpectedCost.apply(offset, cov, self.root, self.scales, exploration)

    def forward(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """As `moments`, the cost with its exploration term."""
        return self.moments(mean, cov, self.exploration)

    def of(self, observation: Tensor) -> Tensor:
        """The cost (...) of states (..., D) that are known."""
        state = with_angles(*certain(observation.double().flatten(0, -2)), self.angles)
        off = (state[0] - self.target) @ self.root.T
        once = torch.exp(-0.5 * self.scales.chunk(2)[0] * off.square().sum(-1, keepdim=True))
        return (1 - once).mean(-1).view(observation.shape[:-1])


# --- imagination environment --------------------------------------------------------------------


class ImaginedEnv(ModelBasedEnvBase):
    """Carries a Gaussian belief through the GPs: `mean` (N, F) and `covariance` (N, F, F).

    The belief is over the features, so that policy, model and cost share the sines and cosines.
    An action is a belief, too: `action` (N, A), `action_covariance` (N, A, A) and `action_gain`.
    """

    dtype = torch.float64

    def __init__(self, world_model: GPWorldModel, cost: nn.Module, *, noise: str = "latent"):
        width = world_model.obs_dim + 2 * len(world_model.angles)
        super().__init__(world_model, {"mean": (width,), "covariance": (width, width)})
        if noise not in ("latent", "observed"):
            raise ValueError(f"noise is latent or observed, not {noise}")
        self.cost, self.noise = cost, noise
        actions = (
            world_model.obs_dim + 2 * len(world_model.angles) + torch.arange(world_model.action_dim)
        )
        self.register_buffer("inputs", torch.cat([world_model.features, actions]))

    def belief(self, mean: Tensor, cov: Tensor) -> TensorDict:
        """The start N(mean (N, D), cov (N, D, D)) of a rollout; ValueError if cov is not one."""
        values = torch.linalg.eigvalsh(cov)
        most = values.abs().amax(-1, keepdim=True)
        if not torch.equal(cov, cov.mT) or (values < -1e-9 * most).any():
            raise ValueError("a covariance must be symmetric and positive semi-definite")
        return self._belief(mean, cov)

    def _belief(self, mean: Tensor, cov: Tensor) -> TensorDict:
        mean, cov = with_angles(mean, cov, self.world_model.angles)
        return TensorDict(mean=mean, covariance=cov, batch_size=mean.shape[:1])

    def policy(self, controller: nn.Module, prepared=None) -> Callable[[TensorDict], TensorDict]:
        """The controller as a policy for `rollout`."""
        names, index = ("action", "action_covariance", "action_gain"), self.world_model.features

        def act(td: TensorDict) -> TensorDict:
            state = select(td["mean"], td["covariance"], index)
            return td.update(dict(zip(names, controller(*state, prepared), strict=True)))

        return act

    def _step(self, td: TensorDict) -> TensorDict:
        """One step of the belief, `cost` and `cost_variance` there; reward = -cost."""
        model, d = self.world_model, self.world_model.obs_dim
        action, spread, gain = td["action"], td["action_covariance"], td["action_gain"]
        cross = td["covariance"].index_select(-1, model.features).bmm(gain)
        mean, cov = join(td["mean"], td["covariance"], action, spread, cross)
        change, spread, gain = model(*select(mean, cov, self.inputs))
        cross = cov[..., :d, :].index_select(-1, self.inputs).bmm(gain)
        cov = cov[..., :d, :d] + spread + (cross + cross.mT)
        if self.noise == "observed":
            cov = cov + torch.diag(torch.exp(2 * model.hyper[2]))
        after = self._belief(mean[..., :d] + change, cov)
        cost, variance = self.cost(after["mean"], after["covariance"])
        return after.update(dict(cost=cost, cost_variance=variance, reward=-cost))


# --- policy search ------------------------------------------------------------------------------


def cubic(a, b) -> float:
    """Where the cubic through two points (step, value, slope) is least, or NaN."""
    (x, f, df), (y, g, dg) = a, b
    if not math.isfinite(g):
        return math.nan
    bend = df + dg - 3 * (g - f) / (y - x)
    root = math.sqrt(max(bend * bend - df * dg, 0.0)) * math.copysign(1, y - x)
    return y - (y - x) * (dg + root - bend) / ((dg - df + 2 * root) or math.nan)


def next_step(last, low, high) -> float:
    """The step to try: within the bracket (low, high), or beyond low if there is no high yet."""
    if high is None:
        guess, least, most = cubic(last, low), 1.5 * low[0], 5 * low[0]
        return min(max(guess, least), most) if guess > low[0] else most
    guess, margin = cubic(low, high), 0.1 * (high[0] - low[0])
    middle = (low[0] + high[0]) / 2
    return min(max(guess, low[0] + margin), high[0] - margin) if math.isfinite(guess) else middle


def updated_inverse(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The inverse Hessian after a step s turned the gradient by y: Nocedal & Wright, eq. 6.17.

    s' y is positive, by the second of the Wolfe conditions.
    """
    curvature, w = s @ y, inverse @ y
    inverse = inverse - (torch.outer(w, s) + torch.outer(s, w)) / curvature
    return inverse + (1 + y @ w / curvature) / curvature * torch.outer(s, s)


def bfgs(x: Tensor, scale: Tensor, iterations: int, tries=30) -> Generator[Tensor, tuple, None]:
    """BFGS that yields points (P) and is sent the value and gradient (P) there.

    It starts from the inverse Hessian diag(scale^2): scale (P) holds the parameters' natural units.
    The line search brackets a step that satisfies the weak Wolfe conditions, by cubic
    interpolation. A value that is not a number is a step too long, and the bracket is halved: a
    failed factorisation costs one evaluation.
    """
    value, grad = yield x
    fresh = True  # the inverse Hessian is the first one
    for _ in range(iterations):
        if fresh:
            inverse = torch.diag(scale.square())
        direction = -(inverse @ grad)
        slope, reached = (grad @ direction).item(), None
        if not slope < 0:  # no gradient, or not a number
            return
        last = low = (0.0, value.item(), slope)  # step, value, slope
        high, step = None, min(1.0, 1 / (scale * grad).norm().item()) if fresh else 1.0
        for _ in range(tries):
            new_value, new_grad = yield x + step * direction
            tried = (step, new_value.item(), (new_grad @ direction).item())
            if not (tried[1] <= value + 1e-4 * step * slope and math.isfinite(tried[2])):
                high = tried
            elif tried[2] < 0.9 * slope:
                last, low = low, tried
                reached = x + step * direction, new_value, new_grad
            else:
                break
            step = next_step(last, low, high)
        else:
            if reached is not None:
                x, value, grad = reached
            elif fresh:
                return  # not even the gradient leads down
            fresh = True
            continue
        change, turn = step * direction, new_grad - grad
        if fresh:
            inverse = inverse * (change @ turn) / (turn @ inverse @ turn)
        inverse, fresh = updated_inverse(inverse, change, turn), False
        x, value, grad = x + change, new_value, new_grad


def search(
    objective: Callable, theta: Tensor, scale: Tensor, iterations: int, evaluations: int,
    stop: Callable = lambda: False,
):  # fmt: skip
    """Improve every row of theta (R, P) in one batch: best row (P), its value, evaluations used.

    objective: (R, P) -> values (R) and gradients (R, P); scale (R, P): see `bfgs`. After each third
    of the evaluations only the better half of the rows goes on. A row ends by itself; `stop` ends
    all.
    """
    searches = [bfgs(*row, iterations) for row in zip(theta, scale, strict=True)]
    points, best, found, used = {s: next(s) for s in searches}, math.inf, None, 0
    lowest = dict.fromkeys(searches, math.inf)
    while points and used < evaluations and not stop():
        values, grads = objective(torch.stack(list(points.values())))
        used += 1
        for one, value, grad in zip(list(points), values, grads, strict=True):
            if value < best:
                best, found = value.item(), points[one].clone()
            lowest[one] = min(lowest[one], value.nan_to_num(math.inf).item())
            try:
                points[one] = one.send((value, grad))
            except StopIteration:
                del points[one]
        if used % math.ceil(evaluations / 3) == 0:
            kept = sorted(points, key=lowest.get)[: math.ceil(len(points) / 2)]
            points = {one: points[one] for one in kept}
    return found, best, used


# --- acting -------------------------------------------------------------------------------------


class Agent:
    """World model, controller, cost and the transitions seen: `act`, `learn`.

    `spec` holds what the environment fixes: observation `shapes`, `action_dim`, action `classes`.
    The state is its vectors side by side, in the order of their keys.
    """

    def __init__(self, spec: dict, args: Args):
        self.spec, self.args = spec, args
        self.keys = sorted(spec["shapes"])
        shapes = list(spec["shapes"].values())
        width, actions = sum(map(math.prod, shapes)), spec["action_dim"]
        if spec["classes"]:
            raise RunError("PILCO needs Box actions: those of --env-id are discrete")
        if width > 20:
            why = "it has a Gaussian process for each, and the cost of a step grows with its square"
            raise RunError(f"PILCO needs at most 20 numbers, --env-id observes {width}: {why}")
        if not set(args.angles) <= set(range(width)) or len(set(args.angles)) < len(args.angles):
            raise RunError(f"--angles must be different indices of the {width} numbers observed")
        self.world_model = GPWorldModel(
            width, actions, angles=args.angles, max_inducing=args.max_inducing,
            fit_steps=args.fit_steps,
        )  # fmt: skip
        features, size = len(self.world_model.features), width + 2 * len(args.angles)
        options = dict(bound=args.bound, restarts=args.restarts)
        if args.controller == "linear":
            self.controller = LinearController(features, actions, **options)
        else:
            self.controller = RBFController(features, actions, centres=args.centres, **options)
        target, options = self.numbers("target", width, 0.0), dict(angles=args.angles)
        options |= dict(widths=args.widths, exploration=args.exploration)
        try:
            self.cost = ExponentialQuadraticCost(target, self.weights(size), **options)
        except ValueError as error:
            raise RunError(f"--weights: {error}") from None
        self.env = ImaginedEnv(self.world_model, self.cost, noise=args.noise)
        self.data, self.firsts, self.drawn = None, [], False
        self.fps = max(1, round(1 / (args.dt * args.action_repeat)))

    def numbers(self, name: str, count: int, empty: float) -> Tensor:
        """A flag of `count` numbers; RunError for another count."""
        values = getattr(self.args, name) or (empty,) * count
        flag, preset = f"--{name.replace('_', '-')}", self.args.preset
        if len(values) != count:
            given = f", those of --preset {preset}" if values == PRESETS[preset].get(name) else ""
            raise RunError(f"{flag} needs {count} numbers, not {len(values)}{given}")
        if not all(map(math.isfinite, values)):
            raise RunError(f"{flag} needs finite numbers")
        return torch.tensor(values, dtype=torch.float64)

    def weights(self, size: int) -> Tensor:
        if len(self.args.weights) == size**2:
            return self.numbers("weights", size**2, 0.0).view(size, size)
        return torch.diag(self.numbers("weights", size, 1.0))

    def state(self, rows: TensorDict) -> Tensor:
        """Rows [*B] -> states (*B, D)."""
        return torch.cat([rows[key] for key in self.keys], -1).double()

    @torch.no_grad()
    def act(self, rows: TensorDict, latent=None, random: bool = False):
        """Rows[N] -> `action` (N, A); this policy remembers nothing."""
        if random:
            action = torch.rand(len(rows), self.spec["action_dim"]) * 2 - 1
            return TensorDict(action=action, batch_size=[len(rows)])
        features = with_angles(*certain(self.state(rows)), self.args.angles)
        belief = select(*features, self.world_model.features)
        action = self.controller(*belief, self.best())[0].float()
        return TensorDict(action=action, batch_size=[len(rows)])

    def best(self):
        """The policy that acts, prepared: the first of those side by side."""
        return self.controller.prepare(self.controller.theta[:1])

    def row(self, rows: TensorDict, latent=None) -> TensorDict:
        """Rows[N] as `evaluate` keeps them."""
        return rows

    def add(self, rows: TensorDict, actions: Tensor):
        """Keep a rollout: rows [T + 1], actions (T, A)."""
        states = self.state(rows)
        new = TensorDict(
            observation=states[:-1], action=actions.double(), batch_size=[len(actions)]
        )
        new["next", "observation"] = states[1:]
        self.data = new if self.data is None else torch.cat([self.data, new])
        self.firsts.append(states[0])

    def start(self) -> tuple[Tensor, Tensor]:
        """Moments (1, D), (1, D, D) of the first state: the flags', else those of all seen."""
        seen = torch.stack(self.firsts)
        mean, std = seen.mean(0), seen.std(0, correction=0).clamp(min=0.01)
        if self.args.start:
            mean = self.numbers("start", len(mean), 0.0)
        if self.args.start_std:
            std = self.numbers("start_std", len(std), 0.0)
        return mean[None], torch.diag(std.square())[None]

    def imagine(self, prepared, number: int = 1) -> TensorDict:
        """The beliefs [number, horizon] of policies that `prepare` returned."""
        start = self.env.belief(*self.start()).expand(number).clone()
        policy = self.env.policy(self.controller, prepared)
        return self.env.rollout(self.args.horizon, policy, start, auto_reset=False)

    @torch.no_grad()
    def predict(self) -> TensorDict:
        """The beliefs [1, horizon] that the acting policy is expected to lead to.

        Their cost is what a rollout will be charged: without the exploration term.
        """
        dream = self.imagine(self.best())
        after = dream["next"][0]
        cost, variance = self.cost.moments(after["mean"], after["covariance"])
        dream["next"].update(dict(cost=cost[None], cost_variance=variance[None]))
        return dream

    def objective(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Discounted expected cost (R) of x_1..x_H for parameters (R, P), and its gradient."""
        theta = theta.detach().requires_grad_()
        dream = self.imagine(self.controller.prepare(theta), len(theta))
        steps = torch.arange(1, self.args.horizon + 1, dtype=torch.float64)
        total = (self.args.gamma**steps * dream["next", "cost"]).sum(-1)
        return total.detach(), torch.autograd.grad(total.sum(), theta)[0]

    def draw_controller(self):
        """First parameters, as the authors': centres like first states, lengthscales 1 and 0.7."""
        index = self.world_model.features
        mean, cov = select(*with_angles(*self.start(), self.args.angles), index)
        values, vectors = torch.linalg.eigh(cov[0])
        root = vectors * values.clamp(min=0).sqrt()
        points = mean + torch.randn(1000, len(root), dtype=torch.float64) @ root.T
        scale = torch.where(index < self.world_model.obs_dim, 1.0, 0.7).double()  # sine and cosine
        self.controller.theta.data = self.controller.draw(points, scale, 0.1)

    def learn(self, stop: Callable = lambda: False) -> dict:
        """Fit the GPs to all data, then improve the policy; returns metrics of both.

        No metrics if stop() came before the search began.
        """
        started = time.monotonic()
        self.world_model.fit(self.data)
        fitted = time.monotonic()
        if stop():
            return {}
        args = self.args
        if not self.drawn:
            self.draw_controller()
        elif args.restarts > 1:  # the authors have none; centres near the start find little now
            states = self.world_model.dataset(self.data)[0][:, : len(self.world_model.features)]
            theta = self.controller.draw(states, states.std(0).clamp(min=1e-6), 0.5)
            self.controller.theta.data[1:] = theta[1:]
        self.drawn = True
        theta = self.controller.theta.data
        theta, _, used = search(
            self.objective, theta, self.controller.scale(theta), args.iterations,
            args.evaluations, stop,
        )  # fmt: skip
        if theta is None and stop():
            return {}
        if theta is None:
            raise RunError("the expected cost is not a number: look at the scale of observations")
        self.controller.theta.data[:1] = theta
        _, signal, noise = (value.exp() for value in self.world_model.hyper)
        ratios = (signal / noise).tolist()
        return {
            "search/evaluations": used,
            **{f"model/snr_{i}": ratio for i, ratio in enumerate(ratios)},
            "time/fit": fitted - started, "time/search": time.monotonic() - fitted,
        }  # fmt: skip

    def state_dict(self) -> dict:
        model = self.world_model
        return {
            "spec": self.spec, "args": dataclasses.asdict(self.args), "drawn": self.drawn,
            "theta": self.controller.theta.detach(), "hyper": model.hyper, "firsts": self.firsts,
            "data": None if self.data is None else self.data.to_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict):
        model = self.world_model
        model.hyper = state["hyper"]
        self.firsts, self.drawn = list(state["firsts"]), state["drawn"]
        self.controller.theta.data.copy_(state["theta"])
        if state["data"] is not None:
            self.data = TensorDict(state["data"]).auto_batch_size_(1)
            if model.hyper is not None:
                model.factorise(*model.dataset(self.data))


def load(run: str | Path) -> Agent:
    """The trained agent of a run folder, ready to `act`; RunError if it has no policy so far."""
    agent = load_agent(run, "pilco", Args, Agent)
    if not agent.drawn:
        raise RunError(f"{run} has no policy so far: its first trial is not over")
    return agent


# --- evaluate -----------------------------------------------------------------------------------


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
    known = gymnasium.registry.get(args.env_id.split(":")[-1])
    limit = known.max_episode_steps if known else None
    if limit and args.horizon * args.action_repeat > limit:
        repeat = f" x --action-repeat {args.action_repeat}" if args.action_repeat > 1 else ""
        ends = f"an episode of {args.env_id} ends after {limit} steps"
        raise RunError(f"--horizon {args.horizon}{repeat} is too long: {ends}")


def trial_plot(dream: TensorDict, costs: Tensor, states: Tensor):
    """Figure: predicted cost and states with two deviations against the real rollout.

    dream[1, H]; costs (T) and states (T + 1, D) of the rollout.
    """
    from matplotlib.figure import Figure

    width, after = states.shape[-1], dream["next"][0]
    panels = [("cost", after["cost"], after["cost_variance"], costs)]
    for i in range(width):
        moments = after["mean"][:, i], after["covariance"][:, i, i]
        panels.append((f"state {i}", *moments, states[1:, i]))
    figure = Figure(figsize=(7, 1 + 1.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, (label, mean, variance, real) in zip(axes, panels, strict=True):
        steps, spread = np.arange(1, len(mean) + 1), 2 * variance.clamp(min=0).sqrt()
        ax.fill_between(steps, mean - spread, mean + spread, color="#e07b1a", alpha=0.25, lw=0)
        ax.plot(steps, mean, color="#e07b1a", label="predicted, two deviations")
        ax.plot(np.arange(1, len(real) + 1), real, color="black", lw=1.2, label="real")
        ax.set_ylabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1].set_xlabel("steps")
    return figure


def assess(agent: Agent, rows: TensorDict, actions: Tensor, trial: int, run: Run) -> dict:
    """Metrics of a rollout; of a trial, also what was predicted, and a picture of both."""
    states = agent.state(rows)
    costs, metrics = agent.cost.of(states[1:]), {}
    if trial:
        dream = agent.predict()
        metrics["search/cost"] = dream["next", "cost"].mean().item()
        run.logger.picture(f"trial_{trial:03}", trial_plot(dream, costs, states))
    return metrics | {
        "episode/return": rows["reward"].sum().item(), "trial": trial,
        "episode/length": len(actions), "episode/cost": costs.mean().item(),
        "episode/final_cost": costs[-10:].mean().item(),
    }  # fmt: skip


def report(metrics: dict, horizon: int):
    """One line for each trial."""
    cost = f"cost {metrics['episode/cost']:.3f}, at the end {metrics['episode/final_cost']:.3f}"
    name = f"trial {metrics['trial']}" if metrics["trial"] else "random rollout"
    text = f"{name}, {metrics['seconds']:.1f} s: {cost}"
    if metrics["episode/length"] < horizon:
        text += f" (ended after {metrics['episode/length']} of {horizon} steps)"
    if "search/cost" in metrics:
        ratios = " ".join(f"{v:.0f}" for k, v in metrics.items() if k.startswith("model/snr"))
        text += (
            f"; predicted {metrics['search/cost']:.3f} "
            f"({metrics['search/evaluations']} evaluations), "
            f"SNR {ratios}, fit {metrics['time/fit']:.1f} s, search {metrics['time/search']:.1f} s"
        )
        if metrics["search/evaluations"] == 1:
            text += "; NO GRADIENT: the cost is flat where the policies begin, try larger --widths"
    print(text, flush=True)


def benchmark(repeats: int = 10):
    """Milliseconds of a policy's expected cost and its gradient, the median.

    4 states, 1 action, 40 steps, one policy of 10 centres: what others have been measured with.
    """
    import resource  # not on Windows

    for points in (100, 300):
        agent = Agent(
            {"shapes": {"observation": [4]}, "action_dim": 1, "classes": []},
            Args(restarts=1, centres=10),
        )
        x, model = torch.randn(points, 5, dtype=torch.float64), agent.world_model
        y = 0.1 * torch.sin(x @ torch.randn(5, 4, dtype=torch.float64)) + 0.002 * torch.randn(
            points, 4
        )
        model.hyper = (
            torch.rand(4, 5, dtype=torch.float64).add(1.5).log(),
            torch.full((4,), -1.6).double(),
            torch.full((4,), -5.3).double(),
        )
        model.factors = exact(x, y, model.hyper)
        agent.firsts = [torch.zeros(4, dtype=torch.float64)]
        agent.draw_controller()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            agent.objective(agent.controller.theta.data)
            seconds.append(time.perf_counter() - start)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        median = 1e3 * sorted(seconds)[repeats // 2]
        print(f"{median:10.1f} ms      {points} points, {memory:.2f} GB at most")


# --- main ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    prepare(args)
    if args.benchmark:
        return benchmark()
    if args.eval:
        return show_run(load(args.eval), args)

    envs = make_envs(args, num_envs=1)
    agent = Agent(envs.spec, args)
    envs.close()
    check_horizon(args)
    with Run("pilco", args, agent, total=args.random_rollouts + args.trials) as run:
        run.resume()
        while run.training():
            trial = max(0, run.done + 1 - args.random_rollouts)  # 0: random
            metrics = agent.learn(run.stopping) if trial else {}
            if run.stopping():  # an interrupted search is repeated
                break
            rows, actions = play(agent, run.done, random=not trial)
            metrics |= assess(agent, rows, actions, trial, run)
            agent.add(rows, actions)
            run.done, run.step = run.done + 1, run.step + len(actions) * args.action_repeat
            metrics["seconds"] = run.step * args.dt
            report(metrics, args.horizon)
            run.logger.write(run.step, **metrics)
            run.save()
        run.finish()


if __name__ == "__main__":
    launch(main)
