"""The formulas of dreamer_v3.py against hand calculation, brute force and numbers of the authors.

Numbers in test names group them by subject (two-hot 1-6, symlog 7, KL 8-11, ...).
"""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import V3_SPEC, near, v3_agent, v3_latents

from common.checkpoint import RunError
from dreamer_v3 import (
    Args,
    BoundedNormal,
    Categoricals,
    DreamerActor,
    DreamerV3ActorLoss,
    LaProp,
    categorical_kl,
    continue_loss,
    exponential_noise,
    kl_losses,
    lambda_return,
    parse_args,
    reconstruction_loss,
    reward_loss,
    sample_one_hot,
    symexp,
    symlog,
    two_hot_bins,
    two_hot_decode,
    two_hot_encode,
    two_hot_loss,
    unimix_probs,
)

BINS = two_hot_bins(255)
LN255 = math.log(255)


agree = functools.partial(near, atol=0.0)  # up to a relative error


def kl(agent, *logits):
    """Dynamics and representation losses with the agent's settings."""
    return kl_losses(*logits, agent.world_model.prior.unimix, agent.model_loss.free_nats)


def continuation(agent, feat, is_terminal):
    """The continuation loss with the agent's horizon."""
    return continue_loss(agent.world_model.cont, feat, is_terminal, agent.model_loss.horizon)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def code(x):
    """Two-hot code of a number by searching all bins, (255,)."""
    bins, out = BINS.double().numpy(), np.zeros(255)
    if x <= bins[0] or x >= bins[-1]:
        out[0 if x <= bins[0] else 254] = 1
        return out
    low = max(i for i in range(255) if bins[i] <= x)
    out[low + 1] = (x - bins[low]) / (bins[low + 1] - bins[low])
    out[low] = 1 - out[low + 1]
    return out


def cross_entropy(logits, target):
    """-sum code(target) log softmax(logits): logits (..., 255), target (...)."""
    logits, target = np.asarray(logits, np.float64), np.asarray(target, np.float64)
    codes = np.stack([code(x) for x in target.ravel()]).reshape(logits.shape)
    return -(codes * np.log(softmax(logits))).sum(-1)


def n_step_mixture(reward, boot, last, terminal, discount, lam):
    """Lambda-returns by their definition: the mixture of all n-step returns, one row."""
    out = []
    for t in range(len(reward) - 1):
        total, alive, collected, discounted = 0.0, 1.0, 0.0, 1.0
        for k in range(t + 1, len(reward)):
            collected += discounted * reward[k]
            discounted *= discount * (1 - terminal[k])
            go_on = lam * (1 - last[k])
            stop = 1.0 if k == len(reward) - 1 else 1 - go_on
            n_step = collected + discounted * boot[k]
            total += alive * stop * n_step
            alive *= go_on
        out.append(total)
    return np.array(out)


# --- symlog and two-hot -------------------------------------------------------------------------


def test_01_two_hot_bins():
    assert BINS.shape == (255,) and BINS.dtype == torch.float32
    agree(BINS[0], -485165184.0, 1e-6)
    assert BINS[127].item() == 0.0
    agree(BINS[128], 0.1705577, 1e-5)
    assert torch.equal(BINS, -BINS.flip(0))
    assert (BINS.diff() > 0).all()
    expected = [math.expm1(20 * k / 127) for k in range(1, 128)]
    agree(BINS[128:], expected, 2e-6)
    for wrong in (254, 1, 2):
        with pytest.raises(ValueError):
            two_hot_bins(wrong)
    assert two_hot_bins(5)[2] == 0 and len(two_hot_bins(5)) == 5


@pytest.mark.parametrize(
    "x, expected",
    [
        (1.0, {131: 0.61733, 132: 0.38267}),
        (0.5, {129: 0.44461, 130: 0.55539}),
        (1000.0, {170: 0.13845, 171: 0.86155}),
        (-3.7, {117: 0.81557, 118: 0.18443}),
        (0.0, {127: 1.0}),
    ],
)
def test_02_two_hot_encode(x, expected):
    encoded = two_hot_encode(torch.tensor(x), BINS)
    dense = torch.zeros(255)
    for i, weight in expected.items():
        dense[i] = weight
    near(encoded, dense, rtol=0, atol=6e-6)


def test_03_two_hot_decode_inverts_encode():
    x = torch.cat([torch.logspace(-3, 6, 200), torch.linspace(-1e6, 1e6, 201), torch.zeros(1)])
    x = torch.cat([x, -x]).reshape(2, -1)
    encoded = two_hot_encode(x, BINS)
    agree(encoded.sum(-1), torch.ones_like(x), 1e-6)
    assert ((encoded > 0).sum(-1) <= 2).all() and (encoded >= 0).all()
    near((encoded.double() * BINS.double()).sum(-1), x.double(), 1e-4, 1e-6)
    # the decoder itself: the logarithm of the code as logits
    near(two_hot_decode((encoded + 1e-45).log(), BINS), x.double(), 1e-4, 1e-6)
    far = two_hot_encode(torch.tensor([1e9, -1e9, BINS[-1], BINS[0]]), BINS)
    assert torch.equal(far, F.one_hot(torch.tensor([254, 0, 254, 0]), 255).float())


def test_04_two_hot_is_linear_in_raw_space():
    for x in (0.05, 2.345, -17.0, 12345.678):
        i = int(BINS.le(x).sum()) - 1
        low, high = BINS[i].item(), BINS[i + 1].item()
        weight = two_hot_encode(torch.tensor(x), BINS)[i + 1].item()
        agree(weight, (x - low) / (high - low), 1e-4)
        s = [math.copysign(math.log1p(abs(v)), v) for v in (x, low, high)]
        assert abs(weight - (s[0] - s[1]) / (s[2] - s[1])) > 1e-4  # what the 2023 version did


def test_04_two_hot_loss_is_the_dense_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 255) * 3
    targets = [torch.randn(3, 5) * 1000, torch.randn(3, 5) * 0.1]
    targets[0][0, 0], targets[0][1, 1], targets[1][2, 2] = 1e12, -1e12, BINS[140]
    for target in targets:
        agree(two_hot_loss(logits, target, BINS), cross_entropy(logits, target), 1e-5)
    transposed = targets[0].T.contiguous().T  # a view whose memory is not in order
    agree(two_hot_loss(logits, transposed, BINS), cross_entropy(logits, targets[0]), 1e-5)


def test_04_two_hot_loss_gradient():
    """softmax - code of the target."""
    logits = torch.randn(255, requires_grad=True)
    two_hot_loss(logits, torch.tensor(3.3), BINS).backward()
    expected = softmax(logits.detach().double().numpy()) - code(3.3)
    near(logits.grad, expected, 1e-4, 1e-6)


def test_05_zero_logits():
    assert two_hot_decode(torch.zeros(4, 255), BINS).eq(0).all()
    target = torch.tensor([0.0, 1.0, -5e3, 1e12])
    agree(two_hot_loss(torch.zeros(4, 255), target, BINS), [LN255] * 4)
    agree(LN255, 5.54126, 1e-6)


def test_06_uniform_logits_decode_to_exactly_zero():
    for value in (0.0, 3.7, -1e3, 1e-3):
        for shape in ((255,), (7, 255), (3, 5, 255)):
            assert two_hot_decode(torch.full(shape, value), BINS).eq(0.0).all()


def test_06_decode_is_the_expectation():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, 255)
    logits[..., :90] -= 40  # keeps the sum small: the end bins would hide the others
    logits[..., 165:] -= 40
    expected = (softmax(logits.double().numpy()) * BINS.double().numpy()).sum(-1)
    near(two_hot_decode(logits, BINS), expected, 1e-4, 1e-4)
    near(two_hot_decode(logits.flip(-1), BINS), -expected, 1e-4, 1e-4)


def test_06_decode_under_autocast():
    """Predictions and losses are computed in float32, as the authors' are (outs.py)."""
    logits = (two_hot_encode(torch.tensor([100.3, -0.37]), BINS) + 1e-30).log()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = two_hot_decode(logits, BINS)
    assert decoded.dtype == torch.float32
    agree(decoded, [100.3, -0.37], 1e-4)


def test_04_loss_of_bfloat16_logits():
    logits = torch.randn(20, 255).bfloat16()
    loss = two_hot_loss(logits, torch.linspace(-50, 50, 20), BINS)
    agree(loss, cross_entropy(logits.float(), torch.linspace(-50, 50, 20)), 1e-5)


def test_04_nan_target_gives_nan_loss():
    """A NaN reward must show: counted as 4.85e8, it would pass every check for finite losses."""
    assert two_hot_loss(torch.zeros(255), torch.tensor(torch.nan), BINS).isnan()


def test_07_symlog():
    agree(symlog(torch.tensor([10.0, -100.0, 0.0])), [2.397895, -4.615121, 0.0], 1e-6)
    x = torch.tensor([-1e5, -3.0, -1e-3, 0.0, 1e-3, 0.5, 12.0, 1e6], dtype=torch.float64)
    agree(symexp(symlog(x)), x, 1e-12)
    agree(symexp(torch.tensor([1.0, -2.0])), [math.e - 1, 1 - math.e**2], 1e-6)
    tiny = torch.tensor(1e-6)
    agree(symlog(tiny), 1e-6, 1e-5)  # log1p, not log of a rounded sum


def test_07_vector_loss_is_not_halved():
    """Prediction 0, target 10: 2.397895^2 = 5.7499; summed over numbers and keys."""
    agent = v3_agent(random=False)
    for head in agent.world_model.decoder.heads:
        torch.nn.init.zeros_(head.weight)
    td = v3_latents(agent.args, 1, 2)
    td["position"] = torch.tensor([[[10.0, 0, 0], [10.0, 10.0, 0]]])
    td["velocity"] = torch.tensor([[[0.0, 0], [0.0, -10.0]]])
    agree(reconstruction_loss(agent.world_model.decoder, td), [[5.7499, 3 * 5.7499]], 1e-5)


# --- categorical latents ------------------------------------------------------------------------

POST = torch.tensor([2.0, 0, 0, 0])


def test_08_kl_is_summed_over_latents_then_clipped():
    post, prior = POST.expand(1, 2, 32, 4).clone(), torch.zeros(1, 2, 32, 4)
    post[0, 1] = 0.1 * POST  # far below one nat even after the sum: clipped
    agree(categorical_kl(post[:, :1, :1], prior[:, :1, :1], 0.01), [[0.4588375]], 1e-6)
    agree(categorical_kl(post, prior, 0.01)[0, 0], 14.6828, 1e-5)
    agent = v3_agent(random=False)
    assert agent.model_loss.free_nats == 1.0 and agent.world_model.prior.unimix == 0.01
    for loss in kl(agent, post, prior):
        assert loss.shape == (1, 2)
        agree(loss, [[14.6828, 1.0]], 1e-5)
    # each latent alone is below 1: a clip before the sum would give 32
    agree(kl(agent, post * 0.6, prior)[0][0, 0], 32 * kl_by_hand(POST * 0.6), 1e-5)


def kl_by_hand(logits, unimix=0.01):
    """KL to the uniform prior."""
    p = (1 - unimix) * softmax(logits.double().numpy()) + unimix / 4
    return float((p * np.log(p * 4)).sum())


def test_09_unimix_is_inside_the_kl():
    agree(categorical_kl(POST[None], torch.zeros(1, 4), 0.0), 0.468011, 1e-5)
    mixed = categorical_kl(POST[None], torch.zeros(1, 4), 0.01).item()
    agree(mixed, 0.4588375, 1e-6)
    assert abs(mixed - 0.468011) > 5e-3


def test_10_unimix_probs():
    agree(unimix_probs(POST, 0.01), [0.706622, 0.097793, 0.097793, 0.097793], 1e-5)
    peaked = torch.tensor([[1e4, 0.0, 0, 0]])
    agree(unimix_probs(peaked, 0.01), [[0.9925, 0.0025, 0.0025, 0.0025]], 1e-6)
    p, q = unimix_probs(peaked, 0.01), unimix_probs(peaked.flip(-1), 0.01)
    agree((p / q).log().max(), 5.9839, 1e-5)
    kl = categorical_kl(peaked, peaked.flip(-1), 0.01)
    agree(kl, (0.9925 - 0.0025) * 5.9839, 1e-4)
    huge = torch.tensor([3e38, -3e38, 0.0, 88.8], requires_grad=True)
    unimix_probs(huge, 0.01)[0].backward()
    assert torch.isfinite(huge.grad).all()


def test_10_a_little_unimix_keeps_the_kl_finite_and_zero_is_refused():
    torch.set_flush_denormal(True)  # as in training
    p = torch.tensor([[[0.0, 200.0]]], requires_grad=True)
    kl = categorical_kl(p, p.flip(-1), 1e-6)
    kl.backward()
    assert kl.item() == pytest.approx(-math.log(5e-7), rel=1e-3) and p.grad.isfinite().all()
    parse_args(["--unimix", "1e-6"])
    with pytest.raises(RunError, match="--unimix must be above 0"):
        parse_args(["--unimix", "0"])


def test_10_unimix_probs_gradient():
    """The mixture's Jacobian is (1 - u) (diag p - p p'), whatever the implementation's shift."""
    logits = torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: unimix_probs(x, 0.2), logits)
    p = softmax(logits.numpy())
    near(jacobian, 0.8 * (np.diag(p) - np.outer(p, p)), 1e-12, 1e-15)


def test_08_kl_against_torch_distributions():
    torch.manual_seed(0)
    p, q = torch.randn(3, 5, 4, 6) * 2, torch.randn(3, 5, 4, 6) * 2
    mixed = [0.95 * x.softmax(-1) + 0.05 / 6 for x in (p, q)]
    p_dist, q_dist = (torch.distributions.Categorical(probs=x) for x in mixed)
    expected = torch.distributions.kl_divergence(p_dist, q_dist).sum(-1)
    near(categorical_kl(p, q, 0.05), expected.double(), 1e-5, 1e-6)


def test_11_free_nats_gradient():
    """Steps below 1 nat have zero gradient; the others have that of the unclipped KL."""
    agent = v3_agent(random=False)
    scale = torch.tensor([[0.1, 3.0, 0.05]])[..., None, None]
    post = (POST.expand(1, 3, 4, 4) * scale).requires_grad_()
    prior = torch.zeros(1, 3, 4, 4, requires_grad=True)
    dynamic, representation = kl(agent, post, prior)
    agree(dynamic[0, [0, 2]], [1.0, 1.0])
    (dynamic + representation).sum().backward()
    for grad in (post.grad, prior.grad):
        assert grad[0, [0, 2]].eq(0).all() and grad[0, 1].abs().min() > 1e-3
    unclipped = post.detach()[:, 1].requires_grad_()
    categorical_kl(unclipped, torch.zeros(1, 4, 4), 0.01).sum().backward()
    agree(post.grad[:, 1], unclipped.grad.double())


def test_12_kl_stop_gradients():
    """The dynamics loss moves only the prior, the representation loss only the posterior."""
    agent = v3_agent(random=False)
    for index in (0, 1):
        post = torch.randn(2, 3, 8, 4).mul(3).requires_grad_()
        prior = torch.randn(2, 3, 8, 4).mul(3).requires_grad_()
        kl(agent, post, prior)[index].sum().backward()
        moved, frozen = (prior, post) if index == 0 else (post, prior)
        assert frozen.grad is None and moved.grad.abs().min() > 0


def test_13_straight_through():
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64)
    noise = exponential_noise(6).double()

    def draw(x):
        return sample_one_hot(unimix_probs(x, 0.01), noise)

    value = draw(logits)
    assert sorted(value.tolist()) == [0.0] * 5 + [1.0]
    p = softmax(logits.numpy())
    expected = 0.99 * (np.diag(p) - np.outer(p, p))
    near(torch.autograd.functional.jacobian(draw, logits), expected, 1e-10, 1e-14)
    batch = sample_one_hot(unimix_probs(torch.randn(500, 8, 4), 0.01), exponential_noise(500, 8, 4))
    assert batch.sum(-1).eq(1).all() and ((batch == 0) | (batch == 1)).all()


def test_13_frequency_of_draws():
    """Pearson's chi-square of 200,000 draws; its 99.99 % point for 4 degrees of freedom is 23.5."""
    torch.manual_seed(0)
    n = 200_000
    for logits in (torch.tensor([1.0, -1.0, 0.0, 2.5, -4.0]), torch.zeros(5)):
        probs = unimix_probs(logits, 0.01)
        count = sample_one_hot(probs.expand(n, 5), exponential_noise(n, 5)).sum(0)
        assert count.sum() == n
        assert ((count - n * probs) ** 2 / (n * probs)).sum() < 23.5


def test_exponential_noise_is_exponential():
    """Moments and distribution function of Exponential(1); all ones give the mode."""
    torch.manual_seed(0)
    x = exponential_noise(1000, 200).flatten().sort().values
    assert (x > 0).all()
    agree(x.mean(), 1.0, 0.01)
    distance = (1 - (-x.double()).exp() - torch.arange(len(x)) / len(x)).abs().max()
    assert distance < 1.95 / math.sqrt(len(x))  # Kolmogorov-Smirnov, 99.9 %
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    assert sample_one_hot(probs, torch.ones(2, 3)).argmax(-1).tolist() == [1, 0]


# --- returns and behavior losses ----------------------------------------------------------------

REWARD, BOOT = torch.tensor([[9.0, 1, 2, 3]]), torch.tensor([[5.0, 6, 7, 8]])


def test_29_lambda_return_imagination():
    terminal, last = torch.tensor([[0, 0.1, 0.2, 0.3]]), torch.zeros(1, 4)
    returns = lambda_return(REWARD, BOOT, last, terminal, 1.0, 0.95)
    agree(returns, [[8.80768, 8.816, 8.6]], 1e-6)
    other = REWARD.clone()
    other[0, 0] = -1e6  # never read
    assert torch.equal(returns, lambda_return(other, BOOT, last, terminal, 1.0, 0.95))


def test_30_lambda_return_replay():
    last, terminal = torch.tensor([[0, 1, 0, 0]]).bool(), torch.tensor([[0, 0, 0, 1]]).bool()
    returns = lambda_return(REWARD, BOOT, last, terminal, 1 - 1 / 333, 0.95)
    agree(returns, [[6.98198, 5.19039, 3.0]], 1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.7, 0.95, 1.0])
def test_29_lambda_return_is_the_mixture_of_n_step_returns(lam):
    torch.manual_seed(0)
    reward, boot = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    last, terminal = torch.rand(4, 9) < 0.2, torch.rand(4, 9, dtype=torch.float64) * 0.5
    returns = lambda_return(reward, boot, last, terminal, 0.97, lam)
    rows = zip(reward, boot, last.double(), terminal, strict=True)
    expected = [n_step_mixture(*(x.numpy() for x in row), 0.97, lam) for row in rows]
    near(returns, np.stack(expected), 1e-6, 1e-6)


def test_31_weight_includes_the_start():
    agent = v3_agent(imagination_horizon=2)
    agent.world_model.predict_continue = lambda feat: torch.tensor([[0.9, 0.8, 0.7]]).expand(
        feat.shape[:-1]
    )
    _, dream = agent.actor_loss(v3_latents(agent.args, 3))
    agree(dream["weight"], [[0.9, 0.72, 0.504]] * 3, 1e-6)


def test_31_continue_is_the_head_probability():
    agent = v3_agent()
    _, dream = agent.actor_loss(v3_latents(agent.args, 5))
    logits = agent.world_model.cont(dream["feat"])[..., 0].detach().double()
    expected = 1 / (1 + (-logits).exp())
    agree(dream["continue"], expected)  # at the start as well; no factor of 0.997
    agree(dream["weight"], expected.cumprod(1), 1e-5)
    agree(dream["reward"], two_hot_decode(agent.world_model.reward(dream["feat"]), BINS).double())


def test_32_continue_target():
    """1 - 1/333 for a row that goes on, 0 for a terminal one: soft binary cross entropy."""
    agent = v3_agent(random=False)
    feat = torch.randn(1, 2, agent.world_model.feat_size)
    logits = agent.world_model.cont(feat)[..., 0].detach().double().numpy()
    p = 1 / (1 + np.exp(-logits))
    target = np.array([[0.996997, 0.0]])
    expected = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    agree(continuation(agent, feat, torch.tensor([[False, True]])), expected, 1e-5)
    agree(agent.model_loss.horizon, 333)
    longer = v3_agent(random=False, horizon=10)
    loss = continuation(longer, feat, torch.tensor([[False, True]]))
    p = 1 / (1 + np.exp(-longer.world_model.cont(feat)[..., 0].detach().double().numpy()))
    agree(loss, [[-0.9 * np.log(p[0, 0]) - 0.1 * np.log(1 - p[0, 0]), -np.log(1 - p[0, 1])]])


def test_33_return_normalizer():
    loss = v3_agent(random=False).actor_loss
    assert loss.low == 0 and loss.high == 0
    returns = torch.linspace(0, 100, 101)[torch.randperm(100 + 1)]
    assert loss.return_scale(returns).item() == 1.0
    agree(loss.low, 0.05, 1e-6)
    agree(loss.high, 0.95, 1e-6)
    for _ in range(9):
        scale = loss.return_scale(returns)
    agree(scale, 8.60561, 1e-6)
    loss.eval()
    agree(loss.return_scale(returns * 50), 8.60561, 1e-6)  # frozen in eval mode


def test_33_percentiles_are_interpolated_and_updated_before_use():
    loss = v3_agent(random=False).actor_loss
    agree(loss.return_scale(torch.tensor([[3000.0, 1000.0], [0.0, 2000.0]])), 27.0, 1e-5)
    agree(loss.low, 1.5, 1e-5)  # percentiles 150 and 2850, rate 0.01
    agree(loss.high, 28.5, 1e-5)


def brute_actor_loss(agent, dream, low, high, discount_loss=True):
    """The policy loss of a continuous actor and the new bounds, from the dream alone."""
    reward, value, cont = (dream[k].double().numpy() for k in ("reward", "value", "continue"))
    zero = np.zeros(reward.shape[1])
    rows = range(len(reward))
    returns = np.stack(
        [n_step_mixture(reward[i], value[i], zero, 1 - cont[i], 1.0, 0.95) for i in rows]
    )
    low = 0.99 * low + 0.01 * np.percentile(returns, 5)
    high = 0.99 * high + 0.01 * np.percentile(returns, 95)
    advantage = (returns - value[:, :-1]) / max(1.0, high - low)
    with torch.no_grad():
        x = agent.actor.mlp(dream["feat"][:, :-1])
        mean = np.tanh(agent.actor.head(x).double().numpy())
        std = 0.9 / (1 + np.exp(-agent.actor.std_head(x).double().numpy() - 2)) + 0.1
    action = dream["action"][:, :-1].double().numpy()
    log_prob = -0.5 * ((action - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    entropy = (0.5 * np.log(2 * np.pi * std**2) + 0.5).sum(-1)
    weight = np.cumprod(cont, 1)[:, :-1] if discount_loss else 1.0
    objective = log_prob.sum(-1) * advantage + agent.args.entropy_bonus * entropy
    return -(weight * objective).mean(), returns, low, high


@pytest.mark.parametrize("discount_loss", [True, False])
def test_34_36_actor_loss_from_its_definition(discount_loss):
    """Returns of the fast critic, advantage / max(1, S) without offset, log-prob + entropy."""
    agent = v3_agent(seed=3, entropy_bonus=0.5)
    loss = DreamerV3ActorLoss(
        agent.actor,
        agent.value,
        agent.env,
        imagination_horizon=6,
        discount_loss=discount_loss,
        entropy_bonus=0.5,
    )
    loss.low.fill_(-40.0)
    loss.high.fill_(20.0)
    losses, dream = loss(v3_latents(agent.args, 12))
    assert dream.batch_size == (12, 7) and set(losses.keys()) == {"loss_actor"}
    agree(dream["value"], two_hot_decode(agent.value(dream["feat"]), BINS).double(), 1e-4)
    near(dream["value_logits"], agent.value(dream["feat"]).double(), 1e-4, 1e-5)
    expected, returns, low, high = brute_actor_loss(agent, dream, -40.0, 20.0, discount_loss)
    agree(losses["loss_actor"], expected, 1e-4)
    near(dream["lambda_target"][:, :-1], returns, 1e-4, 1e-4)
    agree(loss.low, low, 1e-5)
    agree(loss.high, high, 1e-5)
    if not discount_loss:
        assert dream["weight"].eq(1).all()


def test_34_actor_gradient_is_reinforce():
    """d loss / d parameters = -mean(weight (advantage d log-prob + bonus d entropy)).

    Checked by finite differences of that surrogate in the heads' biases, at fixed advantages.
    """
    agent = v3_agent(seed=4, entropy_bonus=0.1)
    losses, dream = agent.actor_loss(v3_latents(agent.args, 8))
    losses["loss_actor"].backward()
    low, high = agent.actor_loss.low.item() / 0.99, agent.actor_loss.high.item() / 0.99

    def surrogate():
        scale = max(1.0, (agent.actor_loss.high - agent.actor_loss.low).item())
        adv = (dream["lambda_target"] - dream["value"])[:, :-1].double() / scale
        with torch.no_grad():
            policy = agent.actor.double()(dream["feat"][:, :-1].double())
            agent.actor.float()
        normal = torch.distributions.Normal(policy.base_dist.mean, policy.base_dist.stddev)
        gain = normal.log_prob(dream["action"][:, :-1].double()).sum(-1) * adv
        gain = gain + 0.1 * normal.entropy().sum(-1)
        return -(dream["weight"][:, :-1].double() * gain).mean().item()

    assert np.isfinite([low, high]).all()
    for head in (agent.actor.head, agent.actor.std_head):
        for i in range(2):
            original, values = head.bias.data[i].item(), []
            for step in (2**-8, -(2**-8)):
                head.bias.data[i] = original + step
                values.append(surrogate())
            head.bias.data[i] = original
            near(head.bias.grad[i], (values[0] - values[1]) / 2**-7, 5e-3, 1e-4)


def test_36_entropy():
    """A weight of 3e-4 by default; zero logits give 1.30545 nats per action number, summed."""
    assert Args().entropy_bonus == 3e-4
    agent = v3_agent(random=False)
    for head in (agent.actor.head, agent.actor.std_head):
        torch.nn.init.zeros_(head.weight)
    feat = torch.randn(5, agent.world_model.feat_size)
    agree(agent.actor(feat).entropy(), [2 * 1.30545] * 5, 1e-5)


def test_37_bounded_normal():
    agent = v3_agent(random=False)
    actor, feat = agent.actor, torch.randn(5, agent.world_model.feat_size)
    for head in (actor.head, actor.std_head):
        torch.nn.init.zeros_(head.weight)
    agree(actor(feat).mode, torch.zeros(5, 2))
    agree(actor(feat).base_dist.stddev, torch.full((5, 2), 0.892717), 1e-6)
    for raw, std, entropy in ((-1e4, 0.1, -0.88365), (1e4, 1.0, 1.41894)):
        torch.nn.init.constant_(actor.std_head.bias, raw)
        agree(actor(feat).base_dist.stddev, torch.full((5, 2), std), 1e-6)
        agree(actor(feat).entropy(), [2 * entropy] * 5, 1e-5)
    actor.head.bias.data = torch.tensor([0.5, -100.0])
    agree(actor(feat).mode, [[math.tanh(0.5), -1.0]] * 5, 1e-6)


def test_38_sample_is_not_clipped():
    """mean + std * noise, and the log-probability of exactly that."""
    policy = BoundedNormal(torch.tensor([0.9, -0.5]), torch.tensor([0.5, 1.0]))
    action = policy.sample(torch.tensor([2.0, -1.5]))
    agree(action, [1.9, -2.0], 1e-6)
    by_hand = -0.5 * 2.0**2 - math.log(0.5) - 0.5 * 1.5**2 - math.log(2 * math.pi)
    agree(policy.log_prob(action), by_hand, 1e-6)
    agent = v3_agent()
    agent.actor.draw_noise = lambda *shape: torch.full((*shape, 2), 4.0)
    _, dream = agent.actor_loss(v3_latents(agent.args, 6))
    assert (dream["action"][:, :-1] > 1).any()


def test_37_bounded_normal_by_monte_carlo():
    torch.manual_seed(0)
    policy = BoundedNormal(torch.tensor([0.3, -0.8]), torch.tensor([0.2, 0.9]))
    actions = policy.sample(torch.randn(200_000, 2))
    near(actions.mean(0), [0.3, -0.8], 0, 0.01)
    agree(actions.std(0), [0.2, 0.9], 0.01)
    near(-policy.log_prob(actions).mean(), policy.entropy().item(), 0, 0.01)


def test_39_discrete_actor_has_no_unimix():
    agent = v3_agent({**V3_SPEC, "action_dim": 3, "classes": (3,)}, random=False)
    torch.nn.init.zeros_(agent.actor.head.weight)
    agent.actor.head.bias.data = torch.tensor([50.0, 0.0, 0.0])
    policy = agent.actor(torch.randn(1, agent.world_model.feat_size))
    rare = policy.log_prob(torch.tensor([[0.0, 1.0, 0.0]]))
    assert rare.exp() < 1e-20
    agree(rare, [-50.0], 1e-6)
    agent.actor.unimix = 0.01  # as in the paper
    policy = agent.actor(torch.randn(1, agent.world_model.feat_size))
    agree(policy.log_prob(torch.tensor([[0.0, 1.0, 0.0]])).exp(), [0.01 / 3], 1e-5)
    agree(policy.log_prob(torch.tensor([[1.0, 0.0, 0.0]])).exp(), [0.99 + 0.01 / 3], 1e-5)


def test_39_discrete_actor_by_hand():
    logits = torch.tensor([[1.0, 0.0, -2.0]])
    policy = Categoricals((logits,))
    p = softmax(logits.double().numpy())[0]
    for i in range(3):
        agree(policy.log_prob(F.one_hot(torch.tensor([i]), 3).float()), [math.log(p[i])], 1e-6)
    agree(policy.entropy(), [-(p * np.log(p)).sum()], 1e-6)
    assert policy.mode.tolist() == [[1.0, 0.0, 0.0]]


def test_39_multi_discrete_actor():
    """Two categoricals of 3 and 4 classes: sums of their log-probabilities and entropies."""
    torch.manual_seed(0)
    actor = DreamerActor(6, 7, (3, 4), 16)
    torch.nn.init.normal_(actor.head.bias)
    feat = torch.randn(1, 6)
    logits = actor.head(actor.mlp(feat)).detach().double().numpy()[0]
    p, q = softmax(logits[:3]), softmax(logits[3:])
    policy = actor(feat)
    action = torch.tensor([[0.0, 1, 0, 0, 0, 0, 1]])
    agree(policy.log_prob(action), [math.log(p[1]) + math.log(q[3])], 1e-5)
    agree(policy.entropy(), [-(p * np.log(p)).sum() - (q * np.log(q)).sum()], 1e-5)
    mode = policy.mode[0]
    assert mode[:3].argmax() == p.argmax() and mode[3:].argmax() == q.argmax() and mode.sum() == 2
    n = 100_000
    draws = actor(feat.expand(n, 6)).sample(actor.draw_noise(n))
    assert draws.shape == (n, 7) and not draws.requires_grad
    assert draws[:, :3].sum(-1).eq(1).all() and draws[:, 3:].sum(-1).eq(1).all()
    joint = torch.einsum("ni,nj->ij", draws[:, :3], draws[:, 3:]).double().numpy()
    expected = n * np.outer(p, q)
    assert ((joint - expected) ** 2 / expected).sum() < 37.4  # chi-square, 11 d.o.f., 99.99 %
    agree(-actor(feat.expand(n, 6)).log_prob(draws).mean(), policy.entropy().item(), 0.01)


def test_40_value_loss_from_its_definition():
    """weight (CE(return) + CE(slow critic's prediction)), averaged without the last step."""
    agent = v3_agent(seed=5)
    _, dream = agent.actor_loss(v3_latents(agent.args, 6))
    losses, _ = agent.value_loss(dream)
    logits = agent.value(dream["feat"]).detach().double().numpy()[:, :-1]
    slow = softmax(agent.slow_value(dream["feat"]).detach().double().numpy()[:, :-1])
    slow = (slow * BINS.double().numpy()).sum(-1)
    error = cross_entropy(logits, dream["lambda_target"][:, :-1]) + cross_entropy(logits, slow)
    agree(losses["loss_value"], (dream["weight"][:, :-1].double().numpy() * error).mean(), 1e-4)


def make_replay_rows(agent, batch, length):
    """Latents, rewards and flags of replayed rows, with ends inside the sequences."""
    td = v3_latents(agent.args, batch, length)
    td["reward"] = torch.randn(batch, length) * 3
    td["is_last"] = torch.zeros(batch, length).bool()
    td["is_last"][0, 2] = td["is_last"][1, -2] = td["is_last"][2, -1] = td["is_last"][3, 1] = True
    td["is_terminal"] = torch.zeros(batch, length).bool()
    td["is_terminal"][0, 2] = td["is_terminal"][2, -1] = True
    return td


def test_41_replay_value_loss_from_its_definition():
    """Imagined returns as bootstrap, discount 1 - 1/333, no weight on last rows, T - 1 used."""
    agent = v3_agent(seed=6)
    td, boot = make_replay_rows(agent, 4, 7), torch.randn(4, 7) * 5
    losses, _ = agent.value_loss.replay(td, boot)
    columns = [td[k].double().numpy() for k in ("reward", "is_last", "is_terminal")]
    reward, last, terminal = columns
    returns = np.stack(
        [
            n_step_mixture(reward[i], boot[i].numpy(), last[i], terminal[i], 1 - 1 / 333, 0.95)
            for i in range(4)
        ]
    )
    feat = torch.cat([td["belief"], td["state"]], -1)[:, :-1]
    logits = agent.value(feat).detach().double().numpy()
    slow = softmax(agent.slow_value(feat).detach().double().numpy())
    slow = (slow * BINS.double().numpy()).sum(-1)
    error = cross_entropy(logits, returns) + cross_entropy(logits, slow)
    expected = 0.3 * ((1 - last[:, :-1]) * error).mean()
    agree(losses["loss_replay_value"], expected, 1e-4)


def test_05_first_losses_of_a_fresh_agent():
    """Zero heads: reward loss ln 255, value losses 2 ln 255 times their mean weights."""
    agent = v3_agent(random=False)
    td = make_replay_rows(agent, 4, 7)
    feat = torch.cat([td["belief"], td["state"]], -1)
    assert agent.world_model.predict_reward(feat).eq(0).all()
    agree(
        reward_loss(agent.world_model.reward, feat, td["reward"], agent.world_model.bins),
        np.full((4, 7), LN255),
        1e-6,
    )
    _, dream = agent.actor_loss(td.flatten())
    assert dream["value"].eq(0).all() and dream["lambda_target"].eq(0).all()
    losses, _ = agent.value_loss(dream)
    agree(losses["loss_value"], 11.08253 * dream["weight"][:, :-1].double().mean().item(), 1e-6)
    losses, _ = agent.value_loss.replay(td, torch.zeros(4, 7))
    agree(losses["loss_replay_value"], 0.3 * 11.08253 * (1 - 3 / 24), 1e-6)  # 3 of 24 are last


# --- optimizer ----------------------------------------------------------------------------------


def parameter(values, grad=None):
    p = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
    p.grad = None if grad is None else torch.tensor(grad, dtype=torch.float64)
    return p


def test_43_adaptive_gradient_clipping():
    params = [
        parameter([3.0, 4.0], [6.0, 8.0]),
        parameter([0.0, 0.0], [3.0, -4.0]),
        parameter([3.0, 4.0], [0.6, -0.8]),  # below the limit of 1.5: untouched
        parameter([-2.0], [100.0]),  # a bias is limited like any other tensor
    ]
    clipped = LaProp(params).clipped_grads(params)
    expected = [[0.9, 1.2], [3e-4 * 0.6, -3e-4 * 0.8], [0.6, -0.8], [0.6]]
    for grad, numbers in zip(clipped, expected, strict=True):
        agree(grad, numbers, 1e-9)


def test_44_laprop_numbers():
    p = parameter([0.0])
    optimizer = LaProp([p], lr=1.0, clip=1e9, warmup=0)
    for grad, expected in ((1.0, -1.0), (-2.0, -0.808041), (0.5, -0.826397)):
        p.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        agree(p, [expected], 1e-4)


def test_44_laprop_against_its_formulas():
    """Five tensors, twenty steps, clipping active in some: AGC, RMS, momentum, warm-up."""
    torch.manual_seed(0)
    shapes = [(3, 4), (4,), (1,), (2, 3, 2), (5,)]
    params = [parameter(torch.randn(s).tolist()) for s in shapes]
    params[4].data.zero_()
    mirror = [p.detach().numpy().copy() for p in params]
    rms, momentum = ([np.zeros(s) for s in shapes] for _ in range(2))
    optimizer = LaProp(params, lr=0.01, clip=0.3, warmup=8)
    clipped = 0
    for step in range(20):
        for i, p in enumerate(params):
            g = torch.randn(shapes[i], dtype=torch.float64) * (0.02 if step % 2 else 2.0)
            g.view(-1)[0] = 0.0  # an entry that never has a gradient must stay put
            p.grad, g = g, g.numpy().copy()
            limit = 0.3 * max(1e-3, np.linalg.norm(mirror[i]))
            clipped += np.linalg.norm(g) > limit
            g *= 1 / max(1.0, np.linalg.norm(g) / limit)
            rms[i] = 0.999 * rms[i] + 0.001 * g**2
            g = g / (np.sqrt(rms[i] / (1 - 0.999 ** (step + 1))) + 1e-20)
            momentum[i] = 0.9 * momentum[i] + 0.1 * g
            mirror[i] = mirror[i] - 0.01 * min(1, step / 8) * momentum[i] / (1 - 0.9 ** (step + 1))
        optimizer.step()
        for p, expected in zip(params, mirror, strict=True):
            near(p, expected, 1e-4, 1e-7)
    assert 20 < clipped < 90  # both cases occurred


def test_44_laprop_epsilon_is_outside_the_root():
    """A gradient of 1e-15 still moves its parameter by lr: eps 1e-20 is added after the root."""
    p = parameter([1.0])
    optimizer = LaProp([p], lr=0.1, warmup=0)
    p.grad = torch.tensor([1e-15], dtype=torch.float64)
    optimizer.step()
    agree(p, [0.9], 1e-4)


def test_45_warmup():
    """Rates 0, 4e-8, 2e-5, 4e-5 at updates 0, 1, 500, 1000: a constant gradient moves by lr."""
    p = parameter([1.0])
    optimizer, moves = LaProp([p]), []
    for _ in range(1003):
        before = p.item()
        p.grad = torch.tensor([0.01], dtype=torch.float64)
        optimizer.step()
        moves.append(before - p.item())
    assert moves[0] == 0.0  # the first update is a no-op
    agree([moves[i] for i in (1, 500, 1000, 1002)], [4e-8, 2e-5, 4e-5, 4e-5], 2e-4)
    assert Args().lr == 4e-5 and Args().warmup == 1000 and Args().clip == 0.3


def test_annealing():
    """As optax joins linear_schedule(0, lr, 4) and linear_schedule(lr, lr / 10, 10 - 4) at 4."""
    p = parameter([1.0])
    optimizer, moves = LaProp([p], lr=1e-3, warmup=4, anneal=10), []
    for _ in range(14):
        before = p.item()
        p.grad = torch.tensor([0.01], dtype=torch.float64)
        optimizer.step()
        moves.append(before - p.item())
    rising, falling = [0, 0.25, 0.5, 0.75], [1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1]
    agree(moves, [1e-3 * x for x in (*rising, *falling, 0.1, 0.1, 0.1)], 2e-4)
    with pytest.raises(RunError, match="--imag-last must be at least 2, or 0"):
        parse_args(["--imag-last", "1"])
    assert parse_args(["--anneal", "1001", "--warmup", "1000"]).anneal == 1001
    with pytest.raises(RunError, match="--anneal must be above --warmup, which is 1000, or 0"):
        parse_args(["--anneal", "1000", "--warmup", "1000"])
