"""pilco.py against the authors' MATLAB code, Monte Carlo, finite differences and known answers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from tensordict import TensorDict

import pilco
from common import plants
from pilco import (
    JITTER,
    Agent,
    Args,
    ExponentialQuadraticCost,
    GPWorldModel,
    ImaginedEnv,
    LinearController,
    PenalizedMarginalLikelihood,
    RBFController,
    append_sin_cos,
    exact,
    fitc,
    known,
    moment_matching,
    most_uncertain,
    search,
    sine_moments,
    squash,
)

VECTORS = Path(__file__).parent / "pilco_matlab.npz"
GOLDEN = {key: torch.tensor(value) for key, value in np.load(VECTORS).items()}


def case(name):
    """Inputs and outputs of the authors' code, {field: tensor}."""
    actual = [{}, {}]
    for key, value in GOLDEN.items():
        where, kind, field = key.split("/")
        if where == name:
            actual[kind == "out"][field] = value
    return actual


def error(actual, expected):
    """Relative, Frobenius."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def column(x):
    """(k, 1) or (1, k) -> (k)."""
    return x.flatten()


def unvec(jacobian, output, argument):
    """Columns and rows in MATLAB's order -> (*output, *argument)."""
    return torch.tensor(np.reshape(jacobian.numpy(), (*output, *argument), order="F"))


def symmetrized(x):
    """The part that is symmetric in the last two axes: what a covariance's gradient means."""
    return (x + x.mT) / 2


def hyper(hyp):
    """MATLAB's columns [log l; log sf; log sn] -> lengthscales (E, I), signal (E), noise (E)."""
    return hyp[:-2].T.contiguous(), hyp[-2], hyp[-1]


def moments(name):
    """A case of gp0: function of mean (I) and covariance (I, I), its inputs and outputs."""
    given, out = case(name)
    factors = exact(given["inputs"], given["targets"], hyper(given["hyp"]))

    def function(mean, cov):
        return tuple(x[0] for x in moment_matching(mean[None], cov[None], factors))

    return function, given, out, factors


# --- moment matching ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gp0_basic", "gp0_cartpole", "gp0_zeroS"])
def test_gp_moments(name):
    function, given, out, _ = moments(name)
    mean, cov = column(given["m"]), given["s"]
    actual = function(mean, cov)
    for value, key, limit in zip(actual, "MSV", (1e-11, 1e-8, 1e-11), strict=True):
        assert error(value, column(out[key]) if key == "M" else out[key]) < limit
    jacobians = torch.autograd.functional.jacobian(function, (mean, cov))
    width, outputs = given["hyp"].shape[0] - 2, given["hyp"].shape[1]
    shapes = {"M": (outputs,), "S": (outputs, outputs), "V": (width, outputs)}
    for (key, shape), (by_mean, by_cov) in zip(shapes.items(), jacobians, strict=True):
        assert error(by_mean, unvec(out[f"d{key}dm"], shape, (width,))) < 1e-8
        expected = unvec(out[f"d{key}ds"], shape, (width, width))
        assert error(symmetrized(by_cov), symmetrized(expected)) < 1e-8


def test_fitc():
    given, out = case("gp1_shared")
    logs = hyper(given["hyp"])
    absolute = JITTER * torch.exp(-2 * logs[1])[:, None, None]  # the authors' ridge
    factors = fitc(given["inputs"], given["targets"], given["induce"], logs, absolute)
    actual = moment_matching(column(given["m"])[None], given["s"][None], factors)
    for value, key in zip(actual, ("M", "S", "V"), strict=True):
        assert error(value[0], column(out[key]) if key == "M" else out[key]) < 1e-10
    whole = exact(given["inputs"], given["targets"], hyper(given["hyp"]))
    same = fitc(given["inputs"], given["targets"], given["inputs"], hyper(given["hyp"]))
    expected = moment_matching(column(given["m"])[None], given["s"][None], whole)
    actual = moment_matching(column(given["m"])[None], given["s"][None], same)
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) < 1e-2, "with all points inducing: the GP, except for the ridge"


def test_fitc_in_other_units():
    """Targets 1,000 times smaller: mean 1,000, variance 1,000,000 times smaller."""
    given, _ = case("gp1_shared")
    mean, cov = column(given["m"])[None], given["s"][None]
    parts = []
    for unit in (1.0, 1e-3):
        scale, signal, noise = hyper(given["hyp"])
        logs = scale, signal + math.log(unit), noise + math.log(unit)
        z = most_uncertain(given["inputs"], logs, 20)
        parts.append(
            (
                z,
                *moment_matching(
                    mean, cov, fitc(given["inputs"], unit * given["targets"], z, logs)
                ),
            )
        )
    (z, *moments), (same, *others) = parts
    assert torch.equal(z, same)
    for a, b, unit in zip(moments, others, (1e-3, 1e-6, 1e-3), strict=True):
        assert error(b / unit, a) < 1e-6


def test_a_point_has_the_posterior_of_the_gp():
    """Without input uncertainty: GP regression in numpy; the outputs do not covary."""
    function, given, _, _ = moments("gp0_basic")
    x, y = given["inputs"].numpy(), given["targets"].numpy()
    point, hyp = column(given["m"]).numpy(), given["hyp"].numpy()
    mean, cov, _ = function(column(given["m"]), torch.zeros(3, 3, dtype=torch.float64))
    for a in range(2):
        scale, signal, noise = np.exp(hyp[:3, a]), np.exp(2 * hyp[3, a]), np.exp(2 * hyp[4, a])
        distance = (((x[:, None] - x[None]) / scale) ** 2).sum(-1)
        gram = signal * np.exp(-0.5 * distance) + noise * np.eye(len(x))
        near = signal * np.exp(-0.5 * (((x - point) / scale) ** 2).sum(-1))
        np.testing.assert_allclose(mean[a], near @ np.linalg.solve(gram, y[:, a]), rtol=1e-9)
        variance = signal - near @ np.linalg.solve(gram, near)
        np.testing.assert_allclose(cov[a, a], variance, rtol=1e-7)
    assert abs(cov[0, 1]) < 1e-12


def test_gp_moments_by_monte_carlo():
    function, given, _, factors = moments("gp0_basic")
    mean, cov = column(given["m"]), given["s"]
    generator = torch.Generator().manual_seed(0)
    root, n = torch.linalg.cholesky(cov), 1_000_000
    x = mean + torch.randn(n, 3, generator=generator, dtype=torch.float64) @ root.T
    values, variances = [], []
    for part in x.split(50_000):
        near = pilco.kernel(part, factors.inputs, *hyper(given["hyp"])[:2])  # (E, points, n)
        values.append((near @ factors.beta[..., None])[..., 0].T)
        inner = ((near @ factors.inverse) * near).sum(-1).T
        variances.append(factors.variance - inner)
    values, variances = torch.cat(values), torch.cat(variances)
    actual = function(mean, cov)
    expected = values.T.cov() + torch.diag(variances.mean(0))
    assert error(actual[0], values.mean(0)) < 5e-3
    assert error(actual[1], expected) < 1e-2
    cross = (x - mean).T @ (values - values.mean(0)) / n
    assert error(cov @ actual[2], cross) < 1e-2


def test_zero_weight_points_and_data_order():
    """Points of weight 0 change nothing, nor does the order of the data."""
    function, given, _, factors = moments("gp0_cartpole")
    mean, cov = column(given["m"]), given["s"]
    expected = function(mean, cov)
    pad = torch.nn.functional.pad
    padded = factors._replace(
        inputs=torch.cat([factors.inputs, torch.randn(7, factors.inputs.shape[1]).double()]),
        beta=pad(factors.beta, (0, 7)),
        inverse=pad(factors.inverse, (0, 7, 0, 7)),
        weight=pad(factors.weight, (0, 7, 0, 7)),
    )
    for a, b in zip(moment_matching(mean[None], cov[None], padded), expected, strict=True):
        assert error(a[0], b) < 1e-12
    order = torch.randperm(len(given["inputs"]))
    other = exact(given["inputs"][order], given["targets"][order], hyper(given["hyp"]))
    for a, b in zip(moment_matching(mean[None], cov[None], other), expected, strict=True):
        assert error(a[0], b) < 1e-9


def test_beliefs_far_from_all_data():
    """A hundred lengthscales away Q / (q q) overflows; the mean is 0, the variance JITTER."""
    controller = RBFController(1, 1, centers=3)
    controller.theta.data.copy_(torch.tensor([[0.0, 0.5, 1.0, 1.0, -1.0, 2.0, 0.0]]))
    mean = torch.full((1, 1), 100.0, dtype=torch.float64, requires_grad=True)
    cov = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    value, spread, gain = moment_matching(mean, cov, controller.prepare())
    assert value.abs() < 1e-100 and gain.abs() < 1e-100
    assert spread.item() == pytest.approx(JITTER)
    (value + spread + gain).sum().backward()
    for grad in (mean.grad, cov.grad, controller.theta.grad):
        assert grad.abs().max() < 1e-6


def test_points_far_from_a_belief_add_nothing():
    """Forty lengthscales away log q < -300, where moment_matching masks the offset."""
    near, far = torch.tensor([[0.3], [-0.5]]).double(), torch.tensor([[40.0], [-50.0]]).double()
    beta, log = torch.tensor([[1.0, -2.0]]).double(), torch.zeros(1, 1, dtype=torch.float64)
    results = []
    for points, weights in (
        (near, beta),
        (torch.cat([far, near]), torch.cat([1e3 + beta, beta], 1)),
    ):
        mean = torch.full((1, 1), 0.2, dtype=torch.float64, requires_grad=True)
        cov = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
        actual = moment_matching(mean, cov, pilco.kernel_expansion(points, log, log[0], weights))
        sum(part.sum() for part in actual).backward()
        results.append((*actual, mean.grad, cov.grad))
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("gps", [False, True])
def test_pair_sums_and_their_gradients(gps):
    """Against plain torch, with `cross` made to satisfy cross_ba = cross_ab'."""
    torch.manual_seed(0)
    nu, beta, inverse = torch.randn(3, 2, 5), torch.randn(2, 5), torch.randn(2, 5, 5)
    cross, row, coefs = torch.randn(3, 2, 2, 2, 2), torch.randn(3, 2, 2, 5), torch.randn(3, 2, 2, 5)
    inverse, beta = (inverse + inverse.mT).double(), beta.double()
    f = pilco.kernel_expansion(nu[0].mT, beta[:, :2], beta[:, 0], beta, inverse if gps else None)
    given = [x.double().requires_grad_() for x in (nu, row, cross, coefs)]

    def with_transposes(nu, row, cross, coefs):
        return nu, row, cross + cross.transpose(1, 2).mT, coefs

    def plain(nu, row, cross, coefs):
        nu = nu[:, None, None]
        other_row, other_coefs = row.transpose(1, 2), coefs.transpose(1, 2)
        k = torch.expm1(row[..., None] + nu.mT @ cross @ nu + other_row[..., None, :])
        if gps:
            same = k.diagonal(dim1=1, dim2=2).movedim(-1, 1)  # k of a function with itself
            gp_k = (beta[:, :, None] * beta[:, None] - inverse) * same - inverse
            k = torch.where(torch.eye(2, dtype=torch.bool)[..., None, None], gp_k[:, :, None], k)
        return (coefs[..., None] * k * other_coefs[..., None, :]).sum((-2, -1))

    actual = pilco.PairSums.apply(*with_transposes(*given), f)
    expected, scale = plain(*with_transposes(*given)), torch.randn(3, 2, 2).double()
    assert error(actual, expected) < 1e-12
    grads = [torch.autograd.grad((x * scale).sum(), given) for x in (actual, expected)]
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < 1e-12


def test_batched_beliefs():
    _, given, _, factors = moments("gp0_cartpole")
    mean = column(given["m"]) + 0.3 * torch.randn(5, 6, dtype=torch.float64)
    scale = torch.rand(5, 1, 1, dtype=torch.float64)
    together = moment_matching(mean, given["s"] * scale, factors)
    for i in range(5):
        alone = moment_matching(mean[i : i + 1], given["s"][None] * scale[i], factors)
        for a, b in zip(together, alone, strict=True):
            assert error(a[i], b[0]) < 1e-11


@pytest.mark.parametrize("spread", [1e-8, 1e-2, 1.0])
def test_variances_stay_positive(spread):
    """300 points at a signal-to-noise ratio of 1,000: a plain difference of sums goes below 0."""
    torch.manual_seed(0)
    x = torch.randn(300, 5, dtype=torch.float64)
    y = torch.stack([torch.sin(x @ torch.randn(5).double()) for _ in range(4)], -1)
    scale = torch.log(torch.rand(4, 5, dtype=torch.float64) * 2 + 2)
    signal = torch.zeros(4, dtype=torch.float64)
    factors = exact(x, y, (scale, signal, signal - math.log(1000)))
    mean = torch.randn(20, 5, dtype=torch.float64)
    cov = spread * torch.eye(5, dtype=torch.float64).expand(20, 5, 5)
    sure = pilco.kernel_expansion(x, scale, signal, factors.beta)
    for one in (factors, sure, sure._replace(variance=0 * signal)):
        actual, variance, gain = moment_matching(mean, cov, one)
        assert actual.isfinite().all() and gain.isfinite().all()
        assert torch.equal(variance, variance.mT)
        eigenvalues = torch.linalg.eigvalsh(variance)
        assert (eigenvalues > -1e-12 * eigenvalues[:, -1:]).all()
    if spread == 1e-8:
        near = pilco.kernel(mean, x, scale, signal)
        alone = torch.exp(2 * signal) - ((near @ factors.inverse) * near).sum(-1).T
        actual = moment_matching(mean, 1e-6 * cov, factors)[1].diagonal(dim1=-2, dim2=-1)
        assert ((actual - alone) / alone).abs().max() < 1e-2


# --- sines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gSin", "gSat"])
def test_squash(name):
    given, out = case(name)
    index = [int(i) - 1 for i in column(given["i"])]
    mean, cov, amplitude = (
        column(given["m"])[index],
        given["v"][index][:, index],
        column(given["e"]),
    )
    gain = torch.eye(4, dtype=torch.float64)[:, index]
    actual = squash(mean[None], cov[None], gain[None], name)
    assert error(amplitude * actual[0][0], column(out["M"])) < 1e-13
    assert error(amplitude[:, None] * actual[1][0] * amplitude, out["V"]) < 1e-13
    assert error(actual[2][0] * amplitude, out["C"]) < 1e-13
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1_000_000, 2, generator=generator, dtype=torch.float64)
    u = mean + noise @ torch.linalg.cholesky(cov).T
    action = torch.sin(u) if name == "gSin" else (9 * torch.sin(u) + torch.sin(3 * u)) / 8
    assert action.abs().max() <= 1 + 1e-12 and actual[0].abs().max() <= 1
    assert (actual[0][0] - action.mean(0)).abs().max() < 5e-3
    assert (actual[1][0] - action.T.cov()).abs().max() < 5e-3


def test_angles():
    given, out = case("gTrig")
    angles = [int(i) - 1 for i in column(given["i"])]
    mean, cov = append_sin_cos(column(given["m"])[None], given["v"][None], angles)
    assert error(mean[0, 4:], column(out["M"])) < 1e-13
    assert error(cov[0, 4:, 4:], out["V"]) < 1e-13
    assert error(cov[0, :4, 4:], given["v"] @ out["C"]) < 1e-13
    assert torch.equal(mean[0, :4], column(given["m"])) and torch.equal(cov[0, :4, :4], given["v"])
    sure, none = append_sin_cos(*known(column(given["m"])[None]), angles)
    theta = column(given["m"])[angles]
    near = torch.stack([theta.sin(), theta.cos()], -1).flatten()
    assert error(sure[0, 4:], near) < 1e-14 and none.abs().max() < 1e-15


def test_sine_moments_of_known_numbers():
    zero = torch.zeros(1, 1, dtype=torch.float64)
    mean, cov, slope = sine_moments(zero, zero[None] + 0.5, zero + 1, zero[0])
    assert mean == 0 and slope.item() == pytest.approx(math.exp(-0.25))
    assert cov.item() == pytest.approx((1 - math.exp(-1)) / 2)  # E sin^2 = (1 - E cos 2x) / 2


def test_sines_of_a_very_uncertain_angle():
    """A variance of 800: sinh(800) overflows, the moments do not."""
    mean = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    cov = torch.tensor([[[800, 799.5], [799.5, 800]]], dtype=torch.float64, requires_grad=True)
    eye = torch.eye(2, dtype=torch.float64)
    _, spread, _ = sine_moments(mean, cov, eye, torch.zeros(2, dtype=torch.float64))
    cross = math.exp(-0.5) / 2  # 2 sin x sin y = cos(x - y) - cos(x + y), and x - y has variance 1
    expected = torch.tensor([[0.5, cross], [cross, 0.5]], dtype=torch.float64)
    assert error(spread[0], expected) < 1e-12
    spread[0, 0, 1].backward()
    assert mean.grad.abs().max() < 1e-12
    expected = torch.tensor([[-cross / 2, cross], [0, -cross / 2]], dtype=torch.float64)
    assert error(cov.grad[0], expected) < 1e-12


# --- controllers --------------------------------------------------------------------------------


def rbf_of(given, bound="gSat"):
    """The authors' policy as an RBFController."""
    centers, actions = given["inputs"].shape[0], given["targets"].shape[1]
    controller = RBFController(given["inputs"].shape[1], actions, centers=centers, bound=bound)
    parts = pilco.unpack(controller.theta.data, controller.sizes)
    parts["centers"].copy_(given["inputs"])
    parts["targets"].copy_(given["targets"])
    parts["log_lengthscale"].copy_(given["hyp"][:-2].T)
    return controller


def matlab_columns(sizes, hyp_rows):
    """Where each of our parameters is in MATLAB's [vec(hyp), vec(inputs), vec(targets)]."""
    (points, inputs), (_, actions) = sizes["centers"], sizes["targets"]
    whole = torch.arange(hyp_rows * actions + points * (inputs + actions))
    hyp, centers, targets = whole.split([hyp_rows * actions, points * inputs, points * actions])
    scale = hyp.view(actions, hyp_rows)[:, :inputs]  # (A, I)
    parts = centers.view(inputs, points).T, targets.view(actions, points).T, scale
    return torch.cat([part.flatten() for part in parts])


def test_rbf_controller():
    given, out = case("congp")
    controller = rbf_of(given)
    state = column(given["m"])[None], given["s"][None]

    def function(theta):
        actual = moment_matching(*state, controller.prepare(theta[None]))
        return tuple(x[0] for x in actual)

    theta = controller.theta.data[0]
    keys = {"M": (2,), "S": (2, 2), "C": (4, 2)}
    index = matlab_columns(controller.sizes, 6)
    jacobians = torch.autograd.functional.jacobian(function, theta)
    for value, jacobian, (key, shape) in zip(function(theta), jacobians, keys.items(), strict=True):
        assert error(value, out[key].view(shape)) < 1e-11
        assert error(jacobian, unvec(out[f"d{key}dp"], shape, (72,))[..., index]) < 1e-8
    given, out = case("conCat_congp_gSat")
    controller, most = rbf_of(given), column(given["maxU"])
    mean, cov, gain = controller(column(given["m"])[None], given["s"][None])
    assert error(most * mean[0], column(out["M"])) < 1e-12
    assert error(most[:, None] * cov[0] * most, out["S"]) < 1e-12
    assert error(gain[0] * most, out["C"]) < 1e-12
    given, out = case("policy_deterministic")
    controller, most = rbf_of(given), column(given["maxU"])
    action, _, _ = controller(*known(column(given["m"])[None]))
    assert error(most * action[0], column(out["u"])) < 1e-12


def test_linear_controller():
    given, out = case("conlin")
    controller = LinearController(4, 2, bound="none")
    parts = pilco.unpack(controller.theta.data, controller.sizes)
    parts["weight"].copy_(given["w"])
    parts["bias"].copy_(column(given["b"]))
    squashed, pilco.squash = pilco.squash, lambda mean, cov, gain, bound: (mean, cov, gain)
    try:
        actual = controller(column(given["m"])[None], given["s"][None])
    finally:
        pilco.squash = squashed
    for value, key in zip(actual, ("M", "S", "C"), strict=True):
        assert error(value[0], out[key].view(value[0].shape)) < 1e-13


# --- cost ---------------------------------------------------------------------------------------


def test_saturating_cost():
    given, out = case("lossSat")
    cost = ExponentialQuadraticCost(column(given["z"]), given["W"])
    mean, cov = column(given["m"]), given["s"]

    def function(mean, cov):
        return tuple(x[0] for x in cost(mean[None], cov[None]))

    value, variance = function(mean, cov)
    assert error(value, out["L"].squeeze()) < 1e-12 and error(variance, out["S"].squeeze()) < 1e-12
    (by_mean, by_cov), (var_mean, var_cov) = torch.autograd.functional.jacobian(
        function, (mean, cov)
    )
    assert error(by_mean, column(out["dLdm"])) < 1e-12
    assert error(symmetrized(by_cov), symmetrized(out["dLds"])) < 1e-12
    assert error(var_mean, column(out["dSdm"])) < 1e-10
    assert error(symmetrized(var_cov), symmetrized(out["dSds"])) < 1e-10
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1_000_000, 4, generator=generator, dtype=torch.float64)
    actual = cost.at(mean + noise @ torch.linalg.cholesky(cov).T)
    assert ((actual >= 0) & (actual <= 1)).all()
    assert abs(actual.mean() - value) < 3e-3 and abs(actual.var() - variance) < 3e-3


@pytest.mark.parametrize("name", ["loss_pendulum_1", "loss_cp_2"])
def test_cost_of_the_scenarios(name):
    given, out = case(name)
    preset = pilco.PRESETS["pendulum" if "pendulum" in name else "cart_pole"]
    size = len(given["m"]) + 2
    cost = ExponentialQuadraticCost(
        preset["target"],
        torch.tensor(preset["weights"], dtype=torch.float64).view(size, size),
        widths=preset["widths"],
        angles=preset["angles"],
    )
    assert preset["widths"] == (given["width"].item(),)
    state = append_sin_cos(column(given["m"])[None], given["s"][None], preset["angles"])
    value, variance = cost(*state)
    assert error(value[0], out["L"].squeeze()) < 1e-12
    assert error(variance[0], out["S2"].squeeze()) < 1e-12


def test_widths_and_exploration():
    given, _ = case("lossSat")
    state = column(given["m"])[None], given["s"][None]
    one, two = (
        ExponentialQuadraticCost(column(given["z"]), given["W"], widths=[w])(*state)
        for w in (0.5, 2.0)
    )
    cost = ExponentialQuadraticCost(
        column(given["z"]), given["W"], widths=[0.5, 2.0], exploration=-0.3
    )
    expected = (one[0] + two[0] - 0.3 * (one[1].sqrt() + two[1].sqrt())) / 2
    assert error(cost(*state)[0], expected) < 1e-12
    assert error(cost(*state)[1], (one[1] + two[1]) / 2) < 1e-12
    assert ExponentialQuadraticCost(target=torch.zeros(4), weights=torch.eye(4)).at(
        torch.zeros(2, 4)
    ).tolist() == [0, 0]
    with pytest.raises(ValueError, match="weights must be a square matrix for 6 features"):
        ExponentialQuadraticCost(torch.zeros(4), torch.eye(4), angles=[1])


# --- world model --------------------------------------------------------------------------------


def model_of(given, names=("inputs", "targets", "hyp")):
    x, y, hyp = (given[name] for name in names)
    model = GPWorldModel(y.shape[1], 0)
    model.hyper = hyper(hyp)
    return model, x, y


def test_likelihood_and_penalty():
    given, out = case("train_hyp")
    for k in "12":
        model, x, y = model_of(given, ("inputs", "targets", f"lh{k}"))
        mll = PenalizedMarginalLikelihood(model.build(x, y), column(given["std"]))
        gps = mll.model.train()
        value = -len(x) * mll(gps(*gps.train_inputs), gps.train_targets).sum()
        assert error(value.detach(), out[f"curb{k}"].squeeze()) < 1e-12
        value.backward()
        covar, noise = gps.covar_module, gps.likelihood.noise_covar.raw_noise
        grads = (
            covar.base_kernel.raw_lengthscale.grad.flatten(),
            2 * covar.raw_outputscale.grad,  # of log variances
            2 * noise.grad.flatten(),
        )
        assert error(torch.cat(grads), column(out[f"dcurb{k}"])) < 1e-12
    assert (out["curb2"] - out["nlml2"]).abs() > 1e3, "the second one is penalized"


def test_hyperparameters_are_those_of_the_authors():
    given, out = case("train_hyp")
    model, x, y = model_of(given | {"lh0": out["lh0"]}, ("inputs", "targets", "lh0"))
    mll = PenalizedMarginalLikelihood(model.build(x, y), column(given["std"]))
    fit_gpytorch_mll(mll)
    gps = mll.model.train()
    value = -len(x) * mll(gps(*gps.train_inputs), gps.train_targets).sum()
    assert value.item() == pytest.approx(out["trained_fX"][-1].item(), abs=1e-3)
    actual = torch.cat([part.flatten() for part in gps.log_hyperparameters()])
    assert error(actual, column(out["trained_hyp"])) < 1e-3


def transitions(n=60, seed=0):
    """Transitions of an undamped pendulum [angle, speed]: td[n], noise 0.01."""
    torch.manual_seed(seed)
    x, u = torch.randn(n, 2, dtype=torch.float64), torch.rand(n, 1, dtype=torch.float64) * 2 - 1
    speed = x[:, 1] - 0.3 * torch.sin(x[:, 0]) + 0.4 * u[:, 0]
    after = torch.stack([x[:, 0] + 0.3 * x[:, 1], speed], -1)
    after = after + 0.01 * torch.randn(n, 2, dtype=torch.float64)
    td = TensorDict(observation=x, action=u, batch_size=[n])
    td["next", "observation"] = after
    return td


def test_fit_from_tensordicts():
    model = GPWorldModel(obs_dim=2, action_dim=1, angles=[0]).fit(transitions())
    test = transitions(200, seed=1)
    inputs, targets = model.dataset(test)
    mean, cov, _ = model(*known(inputs))
    assert (mean - targets).square().mean().sqrt() < 0.02
    assert (model.hyper[2].exp() - 0.01).abs().max() < 0.005
    small = 1e-10 * torch.eye(4, dtype=torch.float64).expand(200, 4, 4)
    for a, b in zip(model(inputs, small)[:2], (mean, cov), strict=True):
        assert error(a, b) < 1e-5, "certain and almost certain inputs agree"
    spread = ((mean - targets) / (cov.diagonal(dim1=-2, dim2=-1) + 0.01**2).sqrt()).std()
    assert 0.8 < spread < 1.25, "the errors are as large as the model says"
    before = model.hyper
    model.fit(transitions())
    assert all((a - b).abs().max() < 0.1 for a, b in zip(model.hyper, before, strict=True))
    with pytest.raises(ValueError, match="made for 3 state variables"):
        GPWorldModel(obs_dim=3, action_dim=1).fit(transitions())


def test_inducing_inputs():
    torch.manual_seed(0)
    whole = GPWorldModel(2, 1).fit(transitions(120))
    sparse = GPWorldModel(2, 1, max_inducing=40).fit(transitions(120))
    assert sparse.posterior.inputs.shape == (40, 3) and whole.posterior.inputs.shape == (120, 3)
    inputs, _ = whole.dataset(transitions(50, seed=1))
    assert error(sparse(*known(inputs))[0], whole(*known(inputs))[0]) < 0.05


def test_inducing_inputs_are_the_most_uncertain_ones():
    """Each has the largest variance given those before it; random ones predict worse."""
    model = GPWorldModel(2, 1).fit(transitions(120))
    x, y = model.dataset(transitions(120))
    chosen = most_uncertain(x, model.hyper, 30)
    noise = torch.exp(2 * model.hyper[2])
    for i in (1, 2, 10, 20):
        gram = pilco.kernel(chosen[:i], chosen[:i], *model.hyper[:2]) + 1e-6 * torch.eye(i)
        near = pilco.kernel(chosen[:i], x, *model.hyper[:2])
        explained = (near * torch.linalg.solve(gram, near)).sum(-2)
        left = (torch.exp(2 * model.hyper[1])[:, None] - explained) / noise[:, None]
        assert (x[left.sum(0).argmax()] == chosen[i]).all()
    test = known(model.dataset(transitions(100, seed=1))[0])
    expected = moment_matching(*test, exact(x, y, model.hyper))[0]
    errors = [
        error(moment_matching(*test, fitc(x, y, z, model.hyper))[0], expected)
        for z in (chosen, *(x[torch.randperm(120)[:30]] for _ in range(5)))
    ]
    assert errors[0] < min(errors[1:])


def test_what_always_changes_by_the_same_amount_is_not_fitted(capsys):
    """A number that never changes and a clock: known exactly, and no part of the others' fit."""
    td, plain = transitions(), GPWorldModel(2, 1).fit(transitions())
    clock = 0.25 * torch.arange(60, dtype=torch.float64)
    x, after = td["observation"], td["next", "observation"]
    td["observation"] = torch.stack([torch.full_like(clock, 7), *x.unbind(1), clock], 1)
    td["next", "observation"] = torch.stack(
        [torch.full_like(clock, 7), *after.unbind(1), clock + 0.25], 1
    )
    model = GPWorldModel(4, 1).fit(td)
    assert capsys.readouterr().out.startswith("observation indices [0, 3] never change, or")
    inputs, targets = model.dataset(td)
    mean, cov, _ = model(*known(inputs))
    assert error(mean[:, [0, 3]], targets[:, [0, 3]]) < 2e-4
    assert cov[:, 0, 0].max() < 1e-11 and cov[:, 3, 3].max() < 1e-6
    assert (mean - targets)[:, 1:3].square().mean().sqrt() < 0.02
    still = td.clone()  # without the clock the fit is that of the other two, to the last digits
    for key in ("observation", ("next", "observation")):
        still[key] = still[key][:, :3]
    model = GPWorldModel(3, 1).fit(still)
    assert error(model.hyper[0][1:, 1:], plain.hyper[0]) < 1e-6
    assert error(model.hyper[1][1:], plain.hyper[1]) < 1e-6
    wide = known(torch.cat([torch.full((60, 1), 7.5).double(), plain.dataset(transitions())[0]], 1))
    expected = plain(*known(plain.dataset(transitions())[0]))[0]
    assert error(model(*wide)[0][:, 1:], expected) < 0.2, "a little off: the model does not vanish"
    moves = transitions(80, seed=3)  # one that begins to move is fitted like any other
    for key in ("observation", ("next", "observation")):
        still[key] = torch.cat([still[key][:, 1:], still[key][:, :1]], 1)
        noise = 0.1 * torch.arange(80.0).double()[:, None].sin() + 7
        moves[key] = torch.cat([moves[key], noise if key == "observation" else 0.5 * noise], 1)
    model = GPWorldModel(3, 1).fit(still).fit(torch.cat([still[:0], moves]))
    inputs, targets = model.dataset(moves)
    assert error(model(*known(inputs))[0][:, 2], targets[:, 2]) < 1e-2
    for key in ("observation", ("next", "observation")):  # so does a clock that is adjusted later
        td[key], moves[key] = td[key][:, 1:], torch.cat([moves[key][:, :2], noise * 1e-3], 1)
    both = torch.cat([td, moves])
    again, new = GPWorldModel(3, 1).fit(td).fit(both), GPWorldModel(3, 1).fit(both)
    assert error(again.hyper[1][2], new.hyper[1][2]) < 1e-3


def test_a_fit_starts_from_the_last_one(monkeypatch):
    """Also where that had more signal than the penalty wants: 1,463 times the noise."""
    model, td = GPWorldModel(2, 1).fit(transitions()), transitions()
    lengthscale, signal, _ = model.hyper
    noise = signal - torch.tensor([1463.0, 495.0]).double().log()
    model.hyper = lengthscale, signal, noise
    expected = [value.clone() for value in model.hyper]
    monkeypatch.setattr(pilco, "fit_gpytorch_mll", lambda *_, **__: None)
    model.fit(td)
    assert all(error(*pair) < 1e-12 for pair in zip(model.hyper, expected, strict=True))


def test_data_that_cannot_be_fitted():
    def changed(field, value):
        td = transitions(20)
        td[field] = value(td[field].clone())
        return td

    def spoil(x):
        x[3, 1] = math.nan
        return x

    cases = [
        (transitions(1), "at least two transitions, not 1"),
        (changed("observation", spoil), r"NaN or infinity in observation, at indices \[1\]"),
        (
            changed(("next", "observation"), spoil),
            r"NaN or infinity in next observation, at indices \[1\]",
        ),
    ]
    still = transitions(20)
    still["next", "observation"] = still["observation"].clone()
    cases.append((still, "all numbers of --env-id always change by the same amount"))
    for td, words in cases:
        with pytest.raises(pilco.RunError, match=words):
            GPWorldModel(2, 1).fit(td)
    with pytest.warns(UserWarning, match="float64: the transitions are converted"):
        GPWorldModel(2, 1, fit_steps=3).fit(transitions(20).float())
    with pytest.raises(pilco.RunError, match="fit it first"):
        GPWorldModel(2, 1)(torch.zeros(1, 3).double(), torch.eye(3).double()[None])


def test_beliefs_must_have_covariances():
    env, _, given, _ = scenario()
    mean = column(given["mu0"])[None]
    cov = given["S0"][None].clone()
    env.belief(mean, 0 * cov)
    cov[0, 0, 0] = -1e-3
    with pytest.raises(ValueError, match="positive semi-definite"):
        env.belief(mean, cov)
    lopsided = given["S0"][None].clone()
    lopsided[0, 0, 1] += 1e-3
    with pytest.raises(ValueError, match="symmetric"):
        env.belief(mean, lopsided)


# --- imagination --------------------------------------------------------------------------------


def scenario():
    """The authors' cart-pole belief: environment, controller, its inputs and outputs."""
    given, out = case("propagate_cartpole")
    most, (scale, signal, noise) = given["maxU"].item(), hyper(given["dyn_hyp"])
    model = GPWorldModel(4, 1, angles=[3])
    assert [i + 1 for i in model.state_inputs] == column(given["dyni"]).int().tolist()
    inputs = torch.cat([given["dyn_inputs"][:, :-1], given["dyn_inputs"][:, -1:] / most], -1)
    scale[:, -1] -= math.log(most)  # actions are within [-1, 1] here
    model.hyper = scale, signal, noise
    model.factorize(inputs, given["dyn_targets"])
    controller = rbf_of({key[4:]: value for key, value in given.items() if key.startswith("pol_")})
    preset = pilco.PRESETS["cart_pole"]
    weights = torch.tensor(preset["weights"], dtype=torch.float64).view(6, 6)
    cost = ExponentialQuadraticCost(preset["target"], weights, widths=[0.25], angles=[3])
    return ImaginedEnv(model, cost), controller, given, out


def test_one_step_of_the_belief():
    env, controller, given, out = scenario()

    def function(mean, cov, theta):
        start = env.belief(mean[None], cov[None])
        policy = env.policy(controller, controller.prepare(theta[None]))
        after = env.rollout(1, policy, start, auto_reset=False)["next"][0, 0]
        return after["mean"][:4], after["covariance"][:4, :4]

    arguments = column(given["m"]), given["s"], controller.theta.data[0]
    actual = function(*arguments)
    jacobians = torch.autograd.functional.jacobian(function, arguments)
    index = matlab_columns(controller.sizes, 7)
    for value, by, key, shape in zip(actual, jacobians, ("M", "S"), ((4,), (4, 4)), strict=True):
        assert error(value, out[f"{key}next"].view(shape)) < 1e-10
        assert error(by[0], unvec(out[f"d{key}dm"], shape, (4,))) < 1e-7
        assert error(symmetrized(by[1]), symmetrized(unvec(out[f"d{key}ds"], shape, (4, 4)))) < 1e-7
        assert error(by[2], unvec(out[f"d{key}dp"], shape, (67,))[..., index]) < 1e-7
    assert torch.equal(actual[1], actual[1].T)


def test_rollout_and_noise():
    env, controller, given, _ = scenario()
    start = env.belief(column(given["mu0"])[None], given["S0"][None])
    policy = env.policy(controller, controller.prepare())
    dream = env.rollout(12, policy, start, auto_reset=False)
    assert dream.shape == (1, 12) and torch.equal(dream["next", "reward"], -dream["next", "cost"])
    assert torch.equal(dream["next", "mean"][:, :-1], dream["mean"][:, 1:])
    assert torch.equal(dream["mean"][:, 0], start["mean"]), "x_0 has no cost"
    costs, variance = env.cost(dream["next", "mean"][0], dream["next", "covariance"][0])
    assert error(dream["next", "cost"][0], costs) < 1e-12
    assert error(dream["next", "cost_variance"][0], variance) < 1e-12
    assert (torch.linalg.eigvalsh(dream["next", "covariance"][0, :, :4, :4]) > -1e-10).all()
    with pytest.raises(ValueError, match="latent or observed"):
        ImaginedEnv(env.world_model, env.cost, noise="none")
    noisy = ImaginedEnv(env.world_model, env.cost, noise="observed")
    one = noisy.rollout(1, policy, start, auto_reset=False)["next", "covariance"][0, 0, :4, :4]
    added = one - dream["next", "covariance"][0, 0, :4, :4]
    assert error(added, torch.diag(torch.exp(2 * env.world_model.hyper[2]))) < 1e-8


def tiny_agent(actions=1, **changes):
    options = pilco.PRESETS["debug"] | {"preset": "debug", "horizon": 5} | changes
    spec = {"shapes": {"observation": [2]}, "action_dim": actions, "classes": [], "categories": {}}
    agent = Agent(spec, Args(**options))
    torch.manual_seed(0)
    agent.data, agent.first_states = transitions(30), [torch.zeros(2, dtype=torch.float64)]
    more = torch.rand(30, actions - 1, dtype=torch.float64)
    agent.data["action"] = torch.cat([agent.data["action"], more], -1)
    agent.world_model.fit(agent.data)
    agent.draw_controller()
    return agent


@pytest.mark.parametrize(
    "changes",
    [{}, {"controller": "linear"}, {"widths": (0.5, 1.0), "exploration": 0.5}, {"actions": 2}],
)
def test_gradient_of_the_expected_cost(changes):
    agent = tiny_agent(restarts=2, gamma=0.9, **changes)
    theta = agent.controller.theta.data + 0.3 * torch.randn_like(agent.controller.theta)
    value, grad = agent.objective(theta)
    dream = agent.imagine(agent.controller.prepare(theta), 2)["next", "cost"]
    expected = sum(0.9 ** (t + 1) * dream[:, t] for t in range(5))
    assert error(value, expected.detach()) < 1e-12
    for i in torch.randperm(theta.shape[1])[:8].tolist():
        step = torch.zeros_like(theta)
        step[:, i] = 1e-4
        slope = (agent.objective(theta + step)[0] - agent.objective(theta - step)[0]) / 2e-4
        assert (slope - grad[:, i]).abs().max() < 5e-6 * grad.abs().max()
    alone = agent.objective(theta[1:])
    assert error(alone[0], value[1:]) < 1e-10 and error(alone[1], grad[1:]) < 1e-8


def test_predictions_are_without_exploration_and_discount():
    agent = tiny_agent(exploration=-0.5, gamma=0.9, restarts=1)
    after = agent.predict()["next"][0]
    cost, variance = agent.cost(after["mean"], after["covariance"], explore=False)
    assert error(after["cost"], cost) < 1e-12 and error(after["cost_variance"], variance) < 1e-12
    steps = torch.arange(1, 6, dtype=torch.float64)
    total = (0.9**steps * (cost - 0.5 * variance.sqrt())).sum()
    assert error(agent.objective(agent.controller.theta.data)[0][0], total) < 1e-9


def test_natural_units_of_a_policy():
    controller = RBFController(3, 2, centers=4, restarts=2)
    torch.nn.init.normal_(controller.theta)
    units = pilco.unpack(controller.scale(controller.theta.data), controller.sizes)
    logs = pilco.unpack(controller.theta.data, controller.sizes)["log_lengthscale"]
    geometric = (logs[:, 0].exp() * logs[:, 1].exp()).sqrt()
    assert error(units["centers"], geometric[:, None].expand(2, 4, 3)) < 1e-12
    assert units["targets"].eq(1).all() and units["log_lengthscale"].eq(1).all()


def test_acting_is_the_mean_of_the_imagined_action():
    agent = tiny_agent()
    rows = TensorDict(observation=3 * torch.randn(50, 2), batch_size=[50])
    action = agent.act(rows)["action"]
    index = agent.world_model.state_inputs
    mean, cov = append_sin_cos(*known(rows["observation"].double()), agent.args.angles)
    prepared = agent.controller.prepare(agent.controller.theta[:1])
    expected, _, _ = agent.controller(mean[:, index], cov[:, index][..., index], prepared)
    assert error(action.double(), expected.detach()) < 1e-6 and action.abs().max() <= 1


# --- policy search ------------------------------------------------------------------------------


def rosenbrock(points):
    x, y = points.unbind(-1)
    points = torch.stack([x, y], -1).requires_grad_()
    a, b = points.unbind(-1)
    value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
    return value.detach(), torch.autograd.grad(value.sum(), points)[0]


def improve(objective, start, *args):
    """A search whose parameters have unit scale."""
    return search(objective, start, torch.ones_like(start), *args)


def test_search_in_other_units():
    """The scale of the parameters is a change of variables."""
    scale = torch.tensor([[0.1, 3.0]], dtype=torch.float64)
    start, library_points, our_points = torch.tensor([[-1.2, 1.0]], dtype=torch.float64), [], []

    def other(z):
        library_points.append(z * scale)
        values, grads = rosenbrock(z * scale)
        return values, grads * scale

    improve(other, start / scale, 100, 40)
    search(lambda x: our_points.append(x) or rosenbrock(x), start, scale, 100, 40)
    assert error(torch.cat(our_points), torch.cat(library_points)) < 1e-6 and len(our_points) == 40


def test_search_from_several_starts():
    starts = torch.tensor([[-1.2, 1.0], [2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    best, value, used = improve(rosenbrock, starts, 200, 200)
    assert value < 1e-12 and (best - 1).abs().max() < 1e-5 and used < 100
    alone = improve(rosenbrock, starts[:1], 200, 200)
    assert alone[1] < 1e-12


def test_search_survives_nan_values():
    """A step to a NaN counts as too long; the best finite point seen is kept."""
    seen = []

    def cliff(points):
        value, grad = rosenbrock(points)
        bad = points[:, 0] > 0.5
        value[bad] = torch.nan
        grad[bad] = torch.nan
        seen.extend(zip(value.tolist(), points.tolist(), strict=True))
        return value, grad

    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    best, value, _ = improve(cliff, start, 100, 300)
    finite = [pair for pair in seen if not math.isnan(pair[0])]
    assert len(finite) < len(seen), "it met NaN"
    assert value == min(finite)[0] and best.tolist() == min(finite)[1]
    assert 0.25 < value < 0.3, "the best finite value: (1 - 0.5)^2"


def test_search_survives_nan_gradients():
    """A finite value with a NaN gradient is not a point to search from."""

    def objective(points):
        value, grad = (points[:, 0] - 3).square(), 2 * (points - 3)
        grad[(points[:, 0] > 0.5) & (points[:, 0] < 1.5)] = torch.nan
        return value, grad

    best, _, used = improve(objective, torch.zeros(1, 1, dtype=torch.float64), 100, 200)
    assert abs(best.item() - 3) < 1e-6 and used < 30
    tiny = improve(lambda x: (x[:, 0] * 0, x * 0 + 1e-200), torch.ones(1, 1).double(), 9, 9)
    assert tiny[2] == 1, "nothing to go down"
    falls = improve(lambda x: (-x[:, 0], x * 0 - 1), torch.zeros(1, 1).double(), 5, 200)
    assert falls[1] < -1e9, "it keeps going down"


def test_a_failed_factorization_gives_nan():
    bad = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    bad[1, 2, 2] = 0
    inverse, logdet = pilco.invert(bad)
    assert torch.equal(inverse[0], torch.eye(3).double()) and logdet[0] == 0
    assert logdet[1].isnan()


def test_search_survives_huge_values():
    """A step to 1e300 counts as too long, like NaN."""

    def cliff(x):
        value, grad = (x[:, 0] - 1).square(), 2 * (x - 1)
        over = x > 0.5
        return torch.where(over[:, 0], 1e300, value), torch.where(over, 1e300, grad)

    actual, best, _ = improve(cliff, torch.zeros(1, 1).double(), 50, 60)
    assert 0.25 < best < 0.3 and best == (actual.item() - 1) ** 2


def test_rows_go_on_untouched_by_one_that_fails():
    """A row that is never finite ends; the others see the points that they see alone."""
    seen = []

    def objective(points):
        seen.append(points[points[:, 1] < 50])
        value, grad = rosenbrock(points)
        bad = points[:, 1] >= 50
        value[bad], grad[bad] = torch.nan, torch.nan
        return value, grad

    start = torch.tensor([[-1.2, 1.0], [0.0, 99.0]], dtype=torch.float64)
    best, value, used = improve(objective, start, 200, 200)
    together, seen = seen, []
    alone = improve(objective, start[:1], 200, 200)
    assert torch.equal(best, alone[0]) and (value, used) == alone[1:] and value < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(together, seen, strict=True))


def labeled(values):
    """Searches with a label in the last column, which has no gradient: objective, labels seen."""
    seen = []

    def objective(points):
        seen.append(points[:, -1].long().tolist())
        value, grad = values(points[:, :-1], points[:, -1].long(), len(seen))
        return value, torch.nn.functional.pad(grad, (0, 1))

    return objective, seen


def test_search_goes_on_with_the_better_half():
    starts = torch.tensor([[-1.2, 1], [-2, 4.5], [2, -1], [3, 9.5], [-3, 2]], dtype=torch.float64)
    lowest = [math.inf] * 5

    def values(points, labels, _):
        value, grad = rosenbrock(points)
        for label, one in zip(labels, value, strict=True):
            lowest[label] = min(lowest[label], one.item())
        if len(seen) in (6, 12):
            best.append(sorted(seen[-1], key=lowest.__getitem__)[: math.ceil(len(seen[-1]) / 2)])
        return value, grad

    objective, seen = labeled(values)
    best = []
    start = torch.cat([starts, torch.arange(5.0).double()[:, None]], 1)
    assert improve(objective, start, 100, 18)[2] == 18
    assert seen[:6] == [[0, 1, 2, 3, 4]] * 6
    assert set(seen[11]) == set(best[0]) and len(best[0]) == 3, "worse rows have ended"
    assert set(seen[17]) == set(best[1]) and len(best[1]) == 2


def test_the_better_half_has_the_lowest_values_found():
    """A row that got worse is judged by its best value."""

    def values(points, labels, number):
        value, grad = rosenbrock(points)
        first = labels == 0  # best at once, then always worse
        value[first], grad[first] = -1.0 if number == 1 else 9e3, 1e-3
        return value, grad

    objective, seen = labeled(values)
    start = torch.tensor([[0.0, 0.0, 0.0], [-1.2, 1.0, 1.0]], dtype=torch.float64)
    improve(objective, start, 100, 9)
    assert seen[:3] == [[0, 1]] * 3 and [0] in seen and [1] not in seen


def test_a_stop_ends_the_search():
    calls = []
    actual, value, used = search(
        lambda x: calls.append(0) or rosenbrock(x), torch.zeros(2, 2).double(),
        torch.ones(2, 2).double(), 100, 100, lambda: len(calls) == 7,
    )  # fmt: skip
    assert used == len(calls) == 7 and value == rosenbrock(actual[None])[0].item()
    assert search(rosenbrock, torch.zeros(1, 2).double(), 1, 9, 9, lambda: True)[0] is None


def test_search_keeps_to_its_budget():
    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    calls = []
    improve(lambda x: calls.append(0) or rosenbrock(x), start, 1000, 17)
    assert len(calls) == 17
    values = [improve(rosenbrock, start, 1000, n)[1] for n in range(1, 30)]
    assert values == sorted(values, reverse=True)


# --- scenarios ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rate", [("pendulum", plants.pendulum), ("cp", plants.cart_pole)])
def test_equations_of_motion(name, rate):
    given, out = case(f"dynamics_{name}")
    z, u = given["z"].numpy(), given["u"].numpy()
    np.testing.assert_allclose(rate(z, u), out["dz"].numpy(), rtol=1e-13, atol=1e-14)
    after = plants.runge_kutta(rate, z, u, given["dt"].item())
    np.testing.assert_allclose(after, out["znext"].numpy(), atol=1e-6)


def test_double_pendulum_keeps_its_energy():
    def energy(z, m=0.5, length=0.5, g=9.82):
        d1, d2, t1, t2 = z
        speed2 = (length * d1) ** 2 + (length * d2 / 2) ** 2
        speed2 += length**2 * d1 * d2 * np.cos(t1 - t2)
        moving = 0.5 * m * ((length * d1 / 2) ** 2 + speed2)
        moving += m * length**2 / 24 * (d1**2 + d2**2)
        return moving + m * g * length * (1.5 * np.cos(t1) + 0.5 * np.cos(t2))

    z, rng = np.array([1.0, -2.0, 2.0, 2.5]), np.random.default_rng(0)
    later = plants.runge_kutta(plants.double_pendulum, z, np.zeros(2), 0.5, steps=2000)
    assert energy(later) == pytest.approx(energy(z), abs=1e-9) and abs(later - z).max() > 0.5
    for _ in range(5):  # the power of the torques is what energy changes by
        z, u = rng.normal(size=4), rng.normal(size=2)
        rate, h = plants.double_pendulum(z, u), 1e-6
        change = (energy(z + h * rate) - energy(z - h * rate)) / (2 * h)
        assert change == pytest.approx(z[0] * u[0] + z[1] * u[1], rel=1e-6)


def test_cart_double_pendulum_is_that_of_the_authors():
    """Numbers of their dynamics_cdp and loss_cdp (Octave; ode45 to 1e-12)."""
    rate, state = plants.cart_double_pendulum, np.array([0.3, -1.2, 2.1, -0.7, 2.4, -1.1])
    ddx, ddtheta1, ddtheta2 = -1.21173215990088, 10.2543705607614, -11.1695034321449
    np.testing.assert_allclose(rate(state, [3.5]), [-1.2, ddx, ddtheta1, ddtheta2, 2.1, -0.7])
    after = [0.238611338798231, -1.25088062788608, 2.49756304577248, -1.49307508160446]
    after += [2.51594299933413, -1.15282413396658]
    np.testing.assert_allclose(plants.runge_kutta(rate, state, [3.5], 0.05), after, atol=1e-7)
    state = np.array([-0.6, 0.8, -3.2, 1.9, 0.4, 3.6])
    accelerations = [-13.8863329874072, -20.4072051884085, -9.39414458589086]
    np.testing.assert_allclose(rate(state, [-12.0])[1:4], accelerations)

    args = pilco.parse_args(["--preset", "cart_double_pendulum"])
    spec = {"shapes": {"observation": [6]}, "categories": {}, "action_dim": 1, "classes": []}
    mean = torch.tensor([[0.2, -0.3, 0.5, 0.1, 0.4, -0.3]], dtype=torch.float64)
    root = torch.sin(1.7 * torch.arange(1, 37).double()).view(6, 6).T
    value, variance = Agent(spec, args).cost(
        *append_sin_cos(mean, 0.02 * root @ root.T[None], args.angles)
    )
    assert value.item() == pytest.approx(0.274025505055054, rel=1e-12)
    assert variance.item() == pytest.approx(0.0513642480147247, rel=1e-10)


@pytest.mark.parametrize(
    "preset", ["pendulum", "cart_pole", "double_pendulum", "cart_double_pendulum"]
)
def test_plants_agree_with_their_costs(preset):
    """The reward is minus the preset's cost of the true state; noise and start match too."""
    args = pilco.parse_args(["--preset", preset])
    _, kwargs = plants.PLANTS[args.env_id.split("/")[1].removesuffix("-v0")]
    width = len(kwargs["start"])
    spec = {
        "shapes": {"observation": [width]},
        "action_dim": len(kwargs["limit"]),
        "classes": [],
        "categories": {},
    }
    agent, env = Agent(spec, args), pilco.gymnasium.make(args.env_id).unwrapped
    assert kwargs["start"] == tuple(args.start) and kwargs["std"] == tuple(args.start_std)
    assert env.dt == args.dt
    rng, noise = np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(200):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, len(kwargs["limit"])))
        assert reward == pytest.approx(-agent.cost.at(torch.tensor(env.z)[None]).item(), abs=1e-9)
        noise.append(obs - env.z)
    np.testing.assert_allclose(np.std(noise, 0), kwargs["noise"], rtol=0.2)
    assert (agent.cost.at(torch.tensor([args.target], dtype=torch.float64)) < 1e-12).all()
    starts = [env.reset(seed=i) and env.z for i in range(500)]
    np.testing.assert_allclose(np.std(starts, 0), kwargs["std"], rtol=0.15)
