"""The networks of dreamer_v3.py against numpy transcriptions of the published formulas.

Numbers in test names group them by subject. Also here: causality, which loss
moves which network, the two ways to run RSSMRollout, imagination environments, sizes.
"""

import functools
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import V3_SPEC as SPEC
from helpers import near, perturb, v3_agent, v3_latents
from tensordict import TensorDict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dreamer_v3
from common.envs import Envs
from common.imagination import WorldModelEnv
from common.replay import with_previous
from dreamer_v3 import (
    SIZES,
    Agent,
    Args,
    BlockLinear,
    DreamerDecoder,
    DreamerEnv,
    ObsDecoder,
    ObsEncoder,
    RSSMPosterior,
    RSSMPrior,
    RSSMRollout,
    continue_loss,
    exponential_noise,
    features,
    kl_losses,
    mlp,
    reconstruction_loss,
    reward_loss,
    symexp,
)

DISCRETE = {
    "shapes": {"doors": (2,), "pixels": (32, 32, 3), "vector": (2,)},
    "categories": {"doors": [3, 2]},
    "action_dim": 5,
    "classes": (2, 3),
}


def make_batch(agent, batch=3, length=7, seed=1):
    """Rows [B, length] of random data with resets and ends inside, latents unpacked."""
    torch.manual_seed(seed)
    td, spec = v3_latents(agent.args, batch, length), agent.spec
    for key, shape in spec["shapes"].items():
        image = len(shape) == 3
        size = (batch, length, *shape)
        td[key] = torch.randint(256, size).byte() if image else torch.randn(size) * 3
    for key, sizes in spec.get("categories", {}).items():
        td[key] = torch.stack([torch.randint(n, (batch, length)) for n in sizes], -1).int()
    td["reward"] = torch.randn(batch, length)
    ends = torch.zeros(batch, length).bool()
    ends[:1, 3:4] = True
    ends[2:3, -1] = length > 1
    td["is_last"], td["is_terminal"] = ends, ends.clone()
    td["is_first"] = F.pad(ends[:, :-1], (1, 0))
    action = torch.randn(batch, length, spec["action_dim"])
    if spec["classes"]:
        one_hots = [F.one_hot(x.argmax(-1), x.shape[-1]) for x in action.split(spec["classes"], -1)]
        action = torch.cat(one_hots, -1).float()
    td["action"] = action * 1.5 * ~ends[..., None]
    return td


def array(x):
    return x.detach().double().numpy()


def kernel(layer):
    """The weights of a BlockLinear as a view (blocks, inputs per block, outputs per block)."""
    return layer.weight.detach().transpose(0, 1)


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * array(scale)


def dense(x, sequence):
    """Numpy: Linear, RMSNorm, SiLU layers of a Sequential, one by one."""
    for layer in sequence:
        if isinstance(layer, nn.Linear):
            x = x @ array(layer.weight).T + array(layer.bias)
        elif isinstance(layer, nn.RMSNorm):
            x = rms(x, layer.weight)
        else:
            assert isinstance(layer, nn.SiLU)
            x = silu(x)
    return x


# --- RSSM ---------------------------------------------------------------------------------------


def make_prior(deter=32, hidden=6, stoch=4, classes=3, blocks=4, action=2, seed=0):
    torch.manual_seed(seed)
    prior = RSSMPrior(action, hidden, deter, stoch, classes, blocks)
    perturb(prior)
    return prior


def recurrence_by_hand(prior, state, belief, action):
    """The block GRU by its formulas, one block at a time; (N, ...) arrays."""
    action = action / np.maximum(1, np.abs(action))
    width = belief.shape[1] // prior.blocks
    u = [dense(belief, prior.belief_in), dense(state, prior.state_in)]
    u = np.concatenate([*u, dense(action, prior.action_in)], -1)
    slices = [slice(k * width, (k + 1) * width) for k in range(prior.blocks)]
    weight, bias = array(kernel(prior.hidden)), array(prior.hidden.bias)
    x = [np.concatenate([belief[:, s], u], -1) @ weight[k] + bias[s] for k, s in enumerate(slices)]
    x = silu(rms(np.concatenate(x, -1), prior.hidden_norm[0].weight))
    weight, bias, out = array(kernel(prior.gates)), array(prior.gates.bias), []
    for k, s in enumerate(slices):
        gate = x[:, s] @ weight[k] + bias[3 * width * k : 3 * width * (k + 1)]
        r, c, w = gate[:, :width], gate[:, width : 2 * width], gate[:, 2 * width :]
        keep = 1 - sigmoid(w - 1)
        out.append((1 - keep) * np.tanh(sigmoid(r) * c) + keep * belief[:, s])
    return np.concatenate(out, -1)


def random_inputs(n=5, deter=32, stoch=4, classes=3, action=2):
    latents = v3_latents(SimpleNamespace(deter=deter, stoch=stoch, classes=classes), n)
    return latents["state"], latents["belief"], torch.randn(n, action) * 2


@pytest.mark.parametrize("blocks", [1, 4, 8])
def test_14_block_gru_formula(blocks):
    prior, inputs = make_prior(blocks=blocks), random_inputs()
    expected = recurrence_by_hand(prior, *map(array, inputs))
    near(prior.recurrence(*inputs), expected, 1e-5, 1e-6)


def test_14_prior_head_and_imagined_step():
    prior, (state, belief, action) = make_prior(), random_inputs()
    sampled_logits, sample, next_belief = prior(state, belief, action, torch.ones(5, 4, 3))
    expected = recurrence_by_hand(prior, array(state), array(belief), array(action))
    near(next_belief, expected, 1e-5, 1e-6)
    logits = dense(expected, prior.head).reshape(5, 4, 3)
    near(prior.logits(next_belief), logits, 1e-5, 1e-6)
    near(sampled_logits, logits, 1e-5, 1e-6)
    assert sample.shape == (5, 12)
    assert sample.unflatten(-1, (4, 3)).argmax(-1).tolist() == logits.argmax(-1).tolist()
    assert sum(isinstance(x, nn.Linear) for x in prior.head) == 3  # two layers and the logits


def test_15_update_gate_bias():
    """Gates of zero keep 0.73106 of the memory."""
    prior, (state, belief, action) = make_prior(), random_inputs()
    nn.init.zeros_(prior.gates.weight)
    nn.init.zeros_(prior.gates.bias)
    near(prior.recurrence(state, belief, action), 0.73106 * array(belief), 1e-5, 1e-6)


def test_16_block_layout():
    """A block sees its slice first, then the 3 * hidden shared numbers, and no other slice."""
    prior, (state, belief, action) = make_prior(), random_inputs()
    assert kernel(prior.hidden).shape == (4, 32 // 4 + 3 * 6, 8)
    before = prior.recurrence(state, belief, action)
    kernel(prior.gates)[2] = 0
    prior.gates.bias.data[48:72] = 0  # 3 * 8 gates per block
    changed = (
        (prior.recurrence(state, belief, action) != before).any(0).unflatten(0, (4, 8)).all(-1)
    )
    assert changed.tolist() == [False, False, True, False]
    prior = make_prior()
    kernel(prior.hidden)[:, 8:] = 0  # only the slices are left
    kernel(prior.hidden)[[0, 1, 3]] = 0  # only block 2's is left: the norm would couple the others
    prior.hidden.bias.data.zero_()
    belief.requires_grad_()
    prior.recurrence(state, belief, action)[:, 16:24].sum().backward()
    moved = belief.grad.ne(0).any(0).unflatten(0, (4, 8)).any(-1)
    assert moved.tolist() == [False, False, True, False]


def test_17_gates_are_split_inside_each_block():
    prior, (state, belief, action) = make_prior(), random_inputs()
    nn.init.zeros_(prior.gates.weight)
    bias = torch.zeros(4, 3, 8)  # block, (reset, candidate, update), unit
    bias[1, 0], bias[1, 1], bias[1, 2] = 0.3, 0.7, 50.0  # block 1 forgets its memory
    bias[3, 2] = -50.0  # block 3 keeps all of it
    prior.gates.bias.data = bias.flatten()
    new = prior.recurrence(state, belief, action).unflatten(-1, (4, 8))
    old = belief.unflatten(-1, (4, 8))
    near(new[:, 1], np.full((5, 8), math.tanh(0.7 / (1 + math.exp(-0.3)))))
    near(new[:, 3], old[:, 3])
    near(new[:, [0, 2]], 0.73106 * old[:, [0, 2]], 1e-5)


def test_18_action_normalization():
    """[2, -0.5] -> [1, -0.5]; the gradient of a large action is divided, not canceled."""
    prior, (state, belief, _) = make_prior(), random_inputs(1)
    actions = [torch.tensor([[a, -0.5]]).requires_grad_() for a in (2.0, 1.0)]
    beliefs = [prior.recurrence(state, belief, a) for a in actions]
    near(beliefs[0], beliefs[1], 1e-6, 1e-6)
    for x in beliefs:
        x.sum().backward()
    assert actions[1].grad.abs().min() > 0
    near(actions[0].grad, actions[1].grad / torch.tensor([2.0, 1.0]), 1e-5, 1e-6)


def test_19_block_linear_init():
    """Standard deviation 1 / sqrt(width of all blocks together), truncated at 2 sigma."""
    torch.manual_seed(0)
    size = SIZES["1m"]
    prior = RSSMPrior(6, size["hidden"], size["deter"], state_dim=32, classes=size["classes"])
    for weight, fan, std in ((prior.hidden, 2048, 0.0221), (prior.gates, 512, 0.0442)):
        weight = weight.weight
        near(weight.std(), std, 0.01)
        border = 2 * 1.1368 / math.sqrt(fan)
        assert 0.98 * border < weight.abs().max() <= border * (1 + 1e-6)
        near(weight.mean(), 0.0, 0, 5 * std / math.sqrt(weight.numel()))
    agent = v3_agent(DISCRETE, random=False)
    near(agent.world_model.decoder.belief_in.weight.std(), 1 / math.sqrt(32), 0.15)


def test_19_linear_and_convolution_init():
    torch.manual_seed(0)
    encoder = ObsEncoder({"pixels": (64, 64, 3), "v": (400,)}, 16, 300)
    layers = [(encoder.mlp[0], 400), (encoder.mlp[3], 300), (encoder.convs[1], 32 * 25)]
    layers += [(encoder.convs[0], 75)]
    for layer, fan in layers:
        near(layer.weight.std(), 1 / math.sqrt(fan), 0.02)
        assert layer.weight.abs().max() <= 2 * 1.1368 / math.sqrt(fan) * (1 + 1e-6)


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_20_every_layer_has_a_zero_bias(spec):
    agent, count = v3_agent(spec, random=False), 0
    for module in agent.modules.values():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | BlockLinear):
                assert layer.bias is not None and layer.bias.eq(0).all()
                count += 1
            elif isinstance(layer, nn.RMSNorm):
                assert layer.eps == 1e-4 and layer.weight.eq(1).all()
                assert [n for n, _ in layer.named_parameters()] == ["weight"]  # no shift
    assert count == (31 if spec is SPEC else 41)


def test_21_rms_norm():
    norm = mlp(3, 3, 1)[1]
    x = torch.tensor([[1.0, 2.0, 3.0]])
    near(norm(x), x / math.sqrt(14 / 3 + 1e-4), 1e-6)
    near(norm(x * 1e-3), x * 1e-3 / math.sqrt(14e-6 / 3 + 1e-4), 1e-6)  # where eps matters
    half, scale = torch.randn(50, 64).bfloat16(), torch.rand(64)
    norm = mlp(64, 64, 1)[1]
    norm.weight.data.copy_(scale)
    wide = half.double()  # rounded once, at the end
    expected = scale * wide / (wide.square().mean(-1, keepdim=True) + 1e-4).sqrt()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            normed = norm(half)
        assert normed.dtype == torch.bfloat16
        assert (normed == expected.bfloat16()).float().mean() > 0.99  # except for ties in rounding


# (proprio walker, vision walker, crafter, Atari 96x96 gray)
COUNTS = {
    "1m": (640_867, 686_846, 687_875, 769_762),
    "12m": (9_738_019, 10_494_158, 10_498_259, 11_808_850),
    "25m": (21_782_947, 23_489_326, 23_495_475, 26_444_402),
    "200m": (153_769_507, 165_948_686, 165_965_075, 186_936_082),
    "400m": (345_473_059, 372_896_398, 372_920_979, 420_106_130),
}
WALKER = {"orientations": (14,), "height": (1,), "velocity": (9,)}
DOMAINS = (
    dict(shapes=WALKER, categories={}, action_dim=6, classes=()),
    dict(shapes={"pixels": (64, 64, 3)}, categories={}, action_dim=6, classes=()),
    dict(shapes={"image": (64, 64, 3)}, categories={}, action_dim=17, classes=(17,)),
    dict(shapes={"image": (96, 96, 1)}, categories={}, action_dim=18, classes=(18,)),
)


def parameter_count(spec, size):
    with torch.device("meta"):  # counts without memory
        agent = Agent(spec, Args(**SIZES[size]), "meta")
    return sum(p.numel() for m in agent.modules.values() for p in m.parameters())


@pytest.mark.parametrize("size", COUNTS)
def test_22_parameter_counts(size):
    assert tuple(parameter_count(spec, size) for spec in DOMAINS) == COUNTS[size]


@pytest.mark.parametrize(
    "shapes, action_dim, count",
    [
        ({"position": (3,), "velocity": (2,)}, 1, 637_446),  # cartpole
        ({"position": (8,), "velocity": (9,)}, 6, 639_964),  # cheetah
        ({"position": (2,), "to_target": (2,), "velocity": (2,)}, 2, 637_769),  # reacher
        ({"position": (4,), "touch": (2,), "velocity": (3,)}, 2, 638_156),  # finger_spin
        ({"position": (4,), "velocity": (4,)}, 2, 638_027),  # cup_catch
        ({"position": (6,), "touch": (2,), "velocity": (7,)}, 4, 639_318),  # hopper
        ({"orientation": (2,), "velocity": (1,)}, 1, 637_188),  # pendulum
    ],
)
def test_22_parameter_counts_of_other_tasks(shapes, action_dim, count):
    spec = dict(shapes=shapes, categories={}, action_dim=action_dim, classes=())
    assert parameter_count(spec, "1m") == count


def test_22_default_sizes_are_1m():
    assert all(getattr(Args(), k) == v for k, v in SIZES["1m"].items())


def test_23_output_scales():
    agent = v3_agent(random=False, units=256)
    near(agent.actor.head.weight.std(), 0.01 / 16, 0.12)
    near(agent.actor.std_head.weight.std(), 0.01 / 16, 0.12)
    assert agent.world_model.reward[-1].weight.eq(0).all() and agent.value[-1].weight.eq(0).all()
    near(agent.world_model.cont[-1].weight.std(), 1 / 16, 0.15)
    discrete = v3_agent(DISCRETE, random=False, units=256)
    near(discrete.actor.head.weight.std(), 0.01 / 16, 0.12)


def observe(agent, td, noise=None, state=None, belief=None, action=None):
    """RSSMRollout on rows of `with_previous`, with some inputs replaced."""
    model, previous = agent.world_model, td["previous"]
    if noise is None:
        noise = torch.ones(*td.shape, agent.args.stoch, agent.args.classes)
    action = previous["action"] if action is None else action
    return model.rollout.unroll(
        previous["state"][:, 0] if state is None else state,
        previous["belief"][:, 0] if belief is None else belief,
        (action, model.encoder.embed(td), (~td["is_first"]).float(), noise),
    )


def test_24_reset_ignores_carry_and_action():
    """After is_first anywhere, outputs equal a fresh start, whatever came before."""
    agent = v3_agent()
    td = with_previous(make_batch(agent))
    noise = exponential_noise(*td.shape, 4, 4)
    td["is_first"][:] = False
    td["is_first"][0, 0] = td["is_first"][1, 3] = True
    whole = observe(agent, td, noise)
    other = {k: torch.randn_like(td["previous", k][:, 0]) for k in ("belief", "state")}
    action = td["previous", "action"].clone()
    action[0, 0] += 5
    action[1, :4] += 5
    changed = observe(agent, td, noise, **other, action=action)
    for x, y in zip(whole, changed, strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1, 3:], y[1, 3:])
    assert not torch.equal(whole[1][2], changed[1][2])  # no reset there: the carry matters
    zeros = {k: torch.zeros_like(v) for k, v in other.items()}
    start = td[:, 3:].clone()
    start["is_first"][:] = False
    action = (
        start["previous", "action"] * torch.tensor([0, 1, 1, 1.0]).unsqueeze(-1)[: start.shape[1]]
    )
    action[:, 0] = 0
    fresh = observe(agent, start, noise[:, 3:], **zeros, action=action)
    near(whole[1][1, 3], fresh[1][1, 0])
    near(whole[2][1, 3], fresh[2][1, 0])


def test_50_reset_inside_a_window_equals_a_fresh_run():
    """Rows after a reset, run on their own from zero latents, give the same latents."""
    agent = v3_agent()
    td = with_previous(make_batch(agent))
    noise = exponential_noise(*td.shape, 4, 4)
    whole = observe(agent, td, noise)
    start = td["is_first"][0].nonzero().item()
    rest = td[:1, start:].clone()
    rest["is_first"][:] = False
    rest["previous", "action"][:, 0] = 0
    zeros = {k: torch.zeros_like(rest["previous", k][:, 0]) for k in ("belief", "state")}
    fresh = observe(agent, rest, noise[:1, start:], **zeros)
    for x, y in zip(whole, fresh, strict=True):
        near(x[:1, start:], y)


def test_causality():
    """Belief and z at t + 1 depend on the observation and action at t, and not on the future."""
    agent = v3_agent()
    td = with_previous(make_batch(agent, batch=1, length=7))
    td["is_first"][:] = False
    td["position"].requires_grad_()
    td["previous", "action"].requires_grad_()
    noise = exponential_noise(*td.shape, 4, 4)
    _, belief, logits = observe(agent, td, noise)
    for t in range(6):
        for name, x in (("belief", belief[:, t]), ("logits", logits[:, t])):
            inputs = (td["position"], td["previous", "action"])
            grads = torch.autograd.grad(x.square().sum(), inputs, retain_graph=True)
            reached = grads[0][0].ne(0).any(-1).tolist()
            assert reached == [i < t or (i == t and name == "logits") for i in range(6)]
            assert grads[1][0].ne(0).any(-1).tolist() == [i <= t for i in range(6)]


def test_causality_of_values():
    """Changing one observation leaves z before it untouched and can change z after it."""
    agent = v3_agent()
    td = with_previous(make_batch(agent, batch=20, length=6))
    td["is_first"][:] = False
    noise = exponential_noise(*td.shape, 4, 4)
    before = observe(agent, td, noise)
    td["velocity"] = td["velocity"].clone()
    td["velocity"][:, 2] += 50
    after = observe(agent, td, noise)
    pairs = list(zip(before, after, strict=True))
    same = [[torch.equal(x[:, t], y[:, t]) for t in range(5)] for x, y in pairs]
    assert same[1] == [True, True, True, False, False]  # belief
    assert same[2] == [True, True, False, False, False]  # logits
    assert same[0][:2] == [True, True] and not all(same[0][2:])  # state


def test_posterior_formula():
    torch.manual_seed(0)
    posterior = RSSMPosterior(6, 4, 3, rnn_hidden_dim=32, obs_dim=7)
    perturb(posterior)
    belief, encoded_obs = torch.randn(5, 32), torch.randn(5, 7)
    expected = dense(np.concatenate([array(belief), array(encoded_obs)], -1), posterior.head)
    expected = expected.reshape(5, 4, 3)
    near(posterior(belief, encoded_obs)[0], expected, 1e-5, 1e-6)
    logits, sample = posterior(belief, encoded_obs, torch.ones(5, 4, 3))
    near(logits, expected, 1e-5, 1e-6)
    assert sample.shape == (5, 12)
    assert sample.unflatten(-1, (4, 3)).argmax(-1).tolist() == expected.argmax(-1).tolist()


def test_13_posterior_and_prior_draws_have_unimix():
    """Where one class is certain, 1 % of the draws are uniform over the 4 classes."""
    torch.manual_seed(0)
    agent, n = v3_agent(random=False), 4000
    prior, posterior = agent.world_model.prior, agent.world_model.posterior
    for layer in (prior.head[-1], posterior.head[-1]):
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor([1e3, 0, 0, 0]).repeat(4)
    latents, action = v3_latents(agent.args, n), torch.zeros(n, 2)
    state, belief = latents["state"], latents["belief"]
    imagined = prior(state, belief, action, exponential_noise(n, 4, 4))[1]
    inputs = action[:, None], torch.zeros(n, 1, 16), torch.ones(n, 1), exponential_noise(n, 1, 4, 4)
    filtered = agent.world_model.rollout.unroll(state, belief, inputs)[0]
    inferred = posterior(belief, torch.zeros(n, 16))[1]
    for draws in (imagined, filtered, inferred):
        others = draws.reshape(-1, 4)[:, 1:].sum().item()
        expected = 4 * n * 0.0075
        assert abs(others - expected) < 4.5 * math.sqrt(expected)


# --- RSSMRollout --------------------------------------------------------------------------------


def test_rollout_loop_by_hand():
    """Each step masks by is_first, then runs recurrence, posterior and draw; here in numpy."""
    agent = v3_agent()
    model = agent.world_model
    td = with_previous(make_batch(agent))
    outputs = observe(agent, td)
    encoded_obs = array(model.encoder.embed(td))
    state, belief = array(td["previous", "state"][:, 0]), array(td["previous", "belief"][:, 0])
    for t in range(td.shape[1]):
        keep = array(~td["is_first"][:, t])[:, None]
        action = array(td["previous", "action"][:, t]) * keep
        belief = recurrence_by_hand(model.prior, state * keep, belief * keep, action)
        posterior = model.posterior
        x = dense(np.concatenate([belief, encoded_obs[:, t]], -1), posterior.head)
        logits = x.reshape(-1, 4, 4)
        state = np.eye(4)[logits.argmax(-1)].reshape(-1, 16)  # noise of ones: the mode
        for a, b in zip(outputs, (state, belief, logits), strict=True):
            near(a[:, t], b, 1e-5, 1e-5)


def test_rollout_of_a_tensordict():
    """Rows get the latents and both logits; `previous` and `is_first` may be left out."""
    agent = v3_agent()
    model, td = agent.world_model, with_previous(make_batch(agent))
    noise = exponential_noise(*td.shape, 4, 4)
    state, belief, logits = observe(agent, td, noise)
    out = model(td.clone(), noise)
    for key, expected in (("state", state), ("belief", belief), ("posterior_logits", logits)):
        assert torch.equal(out[key], expected)
    assert torch.equal(out["prior_logits"], model.prior.logits(belief))
    assert torch.equal(out["encoded_obs"], model.encoder.embed(td))
    # A whole sequence: no latents and no action come before it.
    td["is_first"][:] = False
    action = F.pad(td["action"][:, :-1], (0, 0, 1, 0))
    zeros = {k: torch.zeros_like(td["previous", k][:, 0]) for k in ("belief", "state")}
    expected = observe(agent, td, noise, **zeros, action=action)
    out = model(td.exclude("previous", "is_first"), noise)
    for key, x in zip(("state", "belief", "posterior_logits"), expected, strict=True):
        assert torch.equal(out[key], x)


def cpp_compiler():
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.mark.parametrize("mode", ["compile_step", "inductor"])
def test_rollout_modes_agree(mode, monkeypatch):
    """Loop and compiled step: same outputs and gradients with the same noise.

    The compiled step is traced, forward and backward, but not translated to C++ unless SLOW=1:
    that takes a minute the first time.
    """
    if mode == "compile_step":
        fast = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", fast)
    if mode == "inductor":
        if not os.environ.get("SLOW") or not cpp_compiler():
            pytest.skip("the C++ backend takes a minute: set SLOW=1, with a C++ compiler installed")
        mode = "compile_step"
    torch.manual_seed(0)
    prior = RSSMPrior(2, 8, 16, 4, 4)
    posterior = RSSMPosterior(8, 4, 4, rnn_hidden_dim=16, obs_dim=5)
    perturb(prior, posterior)
    is_first = torch.zeros(3, 6).bool()
    is_first[0, 0] = is_first[1, 3] = True
    latents = v3_latents(SimpleNamespace(deter=16, stoch=4, classes=4), 3)
    action, keep = torch.randn(3, 6, 2), (~is_first).float()
    noise, weights = (
        exponential_noise(3, 6, 4, 4),
        [torch.randn(3, 6, *s) for s in ((16,), (16,), (4, 4))],
    )
    encoded_obs = torch.randn(3, 6, 5)
    for count in (3, 1):  # with gradients of the start, or without, as in training
        results = []
        for kw in ({}, {mode: True}):
            rollout = RSSMRollout(prior, posterior, **kw)
            leaves = [encoded_obs.clone(), latents["state"].clone(), latents["belief"].clone()]
            for leaf in leaves[:count]:
                leaf.requires_grad_()
            out = rollout.unroll(*leaves[1:], (action, leaves[0], keep, noise))
            params = [p for n, p in rollout.named_parameters() if not n.startswith("prior.head")]
            loss = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
            results.append([*out, *torch.autograd.grad(loss, leaves[:count] + params)])
        for x, y in zip(*results, strict=True):
            assert x.shape == y.shape
            near(x, y, 1e-4, 2e-5)
        assert results[0][0].requires_grad and results[0][3].abs().sum() > 0


# --- observations -------------------------------------------------------------------------------


def test_25_feature_order():
    latents = v3_latents(SimpleNamespace(deter=3, stoch=2, classes=2), 4)
    expected = torch.cat([latents["belief"], latents["state"]], 1)
    assert torch.equal(features(latents), expected)


def test_25_decoder_takes_the_state_first():
    torch.manual_seed(0)
    decoder = ObsDecoder({"b": (2,), "a": (3,)}, 32, 16, 2, 16)
    perturb(decoder)
    state, belief, _ = random_inputs(classes=4)
    x = dense(np.concatenate([array(state), array(belief)], -1), decoder.mlp)
    out = decoder(state, belief)
    assert list(out) == ["a", "b"] and sum(isinstance(m, nn.Linear) for m in decoder.mlp) == 3
    for key, head in zip(("a", "b"), decoder.heads, strict=True):
        near(out[key], x @ array(head.weight).T + array(head.bias), 1e-5, 1e-6)


def test_26_vector_encoder():
    """Keys in sorted order, symlog, three layers of Linear, RMSNorm, SiLU."""
    torch.manual_seed(0)
    encoder = ObsEncoder({"zeta": (2,), "alpha": (3,)}, 2, 16).double()
    perturb(encoder)
    td = TensorDict(zeta=torch.randn(4, 6, 2) * 50, alpha=torch.randn(4, 6, 3), batch_size=[4, 6])
    td["reward"] = torch.full((4, 6), torch.nan)  # never read
    x = np.concatenate([array(td["alpha"]), array(td["zeta"])], -1)
    x = np.sign(x) * np.log1p(np.abs(x))
    assert sum(isinstance(m, nn.Linear) for m in encoder.mlp) == 3
    near(encoder.embed(td.double()), dense(x, encoder.mlp), 1e-6, 1e-6)
    assert torch.equal(encoder(td.double())["encoded_obs"], encoder.embed(td.double()))


def test_categories_are_encoded_as_one_hots_without_symlog():
    torch.manual_seed(0)
    shapes, sizes = {"zeta": (2,), "doors": (2,), "alpha": (3,)}, {"doors": [3, 2]}
    encoder = ObsEncoder(shapes, 2, 16, sizes)
    perturb(encoder)
    doors = torch.tensor([[[0, 1], [2, 0], [1, 1]]]).int()
    td = TensorDict(doors=doors, alpha=torch.randn(1, 3, 3), zeta=torch.randn(1, 3, 2) * 50)
    symlogs = [np.sign(x) * np.log1p(np.abs(x)) for x in (array(td["alpha"]), array(td["zeta"]))]
    hots = [[[1, 0, 0, 0, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]]
    x = np.concatenate([symlogs[0], hots, symlogs[1]], -1)
    td.batch_size = [1, 3]
    near(encoder.embed(td), dense(x, encoder.mlp), 1e-5, 1e-6)


def test_categories_have_the_cross_entropy_as_loss_and_the_argmax_as_prediction():
    """-ln softmax of the right class, summed; gradient softmax - one-hot; ln 3 + ln 2 if blind."""
    spec = SPEC | {"shapes": {"doors": (2,)}, "categories": {"doors": [3, 2]}}
    agent = v3_agent(spec)
    decoder, td = agent.world_model.decoder, v3_latents(agent.args, 4, 5)
    td["doors"] = torch.stack([torch.randint(n, (4, 5)) for n in (3, 2)], -1).int()
    (head,) = decoder.heads
    assert head.weight.shape == (5, 16)
    parts = np.split(array(decoder(td["state"], td["belief"])["doors"]), [3], -1)
    probs = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in parts]
    hots = [np.eye(n)[td["doors"][..., i]] for i, n in enumerate((3, 2))]
    expected = -sum(np.log((p * hot).sum(-1)) for p, hot in zip(probs, hots, strict=True))
    loss = reconstruction_loss(decoder, td)
    near(loss, expected, 1e-5)
    loss.sum().backward()
    gradient = [(p - hot).sum((0, 1)) for p, hot in zip(probs, hots, strict=True)]
    near(head.bias.grad, np.concatenate(gradient), 1e-4, 1e-5)
    td["next"] = td.select("state", "belief").flip(1)
    out = DreamerDecoder(agent.world_model)(td)
    assert out["doors"].dtype == torch.int32 and out["doors"].shape == (4, 5, 2)
    assert out["doors"].tolist() == np.stack([p.argmax(-1) for p in probs], -1).tolist()
    assert (
        torch.equal(out["next", "doors"], out["doors"].flip(1)) and len(out["doors"].unique()) > 1
    )
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    near(reconstruction_loss(decoder, td), np.full((4, 5), math.log(3) + math.log(2)))


def test_26_reward_and_flags_are_not_inputs():
    shapes = {"body.alone": [1], "body.place": [4], "bytes": [7]}
    shapes |= {"depth": [16, 16, 1], "eye": [16, 16, 3]}
    spec = Envs("dummy_envs:Nested-v0", image_size=16).spec
    assert spec == {"shapes": shapes, "categories": {}, "action_dim": 2, "classes": []}
    assert Envs("dummy_envs:EchoMulti-v0").spec["classes"] == [2, 3]


def convolve(x, layer):
    """Numpy: 5 x 5 convolution that keeps the size; (N, H, W, C) -> (N, H, W, C')."""
    weight, (_, h, w, _) = array(layer.weight), x.shape
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    out = sum(
        padded[:, i : i + h, j : j + w] @ weight[:, :, i, j].T for i in range(5) for j in range(5)
    )
    return out + array(layer.bias)


def test_26_28_image_encoder():
    """Keys sorted, / 255 - 0.5; convolution, 2 x 2 maximum, RMSNorm, SiLU; flat (h, w, c)."""
    torch.manual_seed(0)
    encoder = ObsEncoder({"right": (32, 48, 1), "left": (32, 48, 3), "v": (2,)}, 2, 16).double()
    perturb(encoder, scale=0.1)
    td = TensorDict(
        right=torch.randint(256, (2, 3, 32, 48, 1)).byte(),
        left=torch.randint(256, (2, 3, 32, 48, 3)).byte(),
        v=torch.randn(2, 3, 2).double(),
        batch_size=[2, 3],
    )
    x = np.concatenate([array(td["left"]), array(td["right"])], -1).reshape(6, 32, 48, 4)
    x = x / 255 - 0.5
    for layer, norm in zip(encoder.convs, encoder.norms, strict=True):
        x = convolve(x, layer)
        n, h, w, c = x.shape
        x = silu(rms(x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4)), norm.weight))
    assert x.shape == (6, 2, 3, 8)
    td["v"] = td["v"].float()
    encoded = encoder.float().embed(td)
    assert encoded.shape == (2, 3, encoder.encoded_size) == (2, 3, 16 + 2 * 3 * 8)
    near(encoded[..., 16:], x.reshape(2, 3, -1), 1e-3, 1e-4)


def test_28_encoder_size():
    encoder = ObsEncoder({"pixels": (64, 64, 3)}, 4, 16)
    assert encoder.encoded_size == 4 * 4 * 16
    assert [c.weight.shape[0] for c in encoder.convs] == [8, 12, 16, 16]
    td = TensorDict(pixels=torch.zeros(1, 2, 64, 64, 3).byte(), batch_size=[1, 2])
    assert encoder.embed(td).shape == (1, 2, 256)


def test_27_image_decoder():
    """Block-linear of the belief + MLP of the state, then x2 nearest, convolution, ...; sigmoid."""
    torch.manual_seed(0)
    shapes = {"right": (32, 48, 1), "left": (32, 48, 3)}
    decoder = ObsDecoder(shapes, 32, 16, 4, 12, blocks=4)
    perturb(decoder, scale=0.1)
    state, belief, _ = random_inputs(3, classes=4)
    h, w, c = 2, 3, 16
    weight, bias = array(kernel(decoder.belief_in)), array(decoder.belief_in.bias)
    x = np.concatenate([array(belief)[:, 8 * k : 8 * k + 8] @ weight[k] for k in range(4)], -1)
    x = (x + bias).reshape(3, 4, h, w, c // 4).transpose(0, 2, 3, 1, 4).reshape(3, h, w, c)
    assert [m.out_features for m in decoder.state_in if isinstance(m, nn.Linear)] == [24, h * w * c]
    x = x + dense(array(state), decoder.state_in).reshape(3, h, w, c)
    for norm, layer in zip(decoder.norms, decoder.convs, strict=True):
        x = silu(rms(x, norm.weight))
        x = convolve(x.repeat(2, 1).repeat(2, 2), layer)
    assert [m.out_channels for m in decoder.convs] == [16, 12, 8, 4]
    out = decoder(state.unflatten(0, (1, 3)), belief.unflatten(0, (1, 3)))
    images = torch.cat([out["left"], out["right"]], -1)
    near(images, sigmoid(x)[None], 1e-5, 1e-6)
    assert out["left"].shape == (1, 3, 32, 48, 3) and out["right"].shape == (1, 3, 32, 48, 1)


def test_27_image_loss():
    """Prediction 0.5 of a black or white 64 x 64 x 3 image: loss 3072, summed, not halved."""
    spec = dict(SPEC, shapes={"pixels": (64, 64, 3)})
    agent = v3_agent(spec, random=False)
    last = agent.world_model.decoder.convs[-1]
    nn.init.zeros_(last.weight)
    td = v3_latents(agent.args, 1, 3)
    td["pixels"] = torch.zeros(1, 3, 64, 64, 3).byte()
    td["pixels"][0, 1] = 255
    td["pixels"][0, 2] = 51  # 0.2
    expected = 12288 * np.array([[0.25, 0.25, 0.09]])
    near(reconstruction_loss(agent.world_model.decoder, td), expected, 1e-5)
    assert expected[0, 0] == 3072


# --- gradients: which loss moves which network ---------------------------------------------------


def gradients(module):
    """Names of a module's parameters with a gradient that is not all zero."""
    pairs = module.named_parameters()
    return {n for n, p in pairs if p.grad is not None and p.grad.ne(0).any()}


def clear(agent):
    for module in (*agent.modules.values(), agent.slow_value):
        module.zero_grad()


def losses_of(agent, seed=0):
    """All losses of one update, not yet summed, and the rows with latents."""
    torch.manual_seed(seed)
    losses, td = agent.model_loss(with_previous(make_batch(agent)))
    actor, dream = agent.actor_loss(td)
    value, _ = agent.value_loss(dream)
    boot = dream["lambda_target"][:, 0].unflatten(0, td.shape)
    replay, _ = agent.value_loss.replay(td, boot)
    return {**losses, **actor, **value, **replay}, td


def prefixes(names):
    return {n.split(".")[0] for n in names}


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_35_reinforce_only(spec):
    """The actor's loss moves neither world model nor critics, the value loss only the critic."""
    agent = v3_agent(spec)
    losses, _ = losses_of(agent)
    names = {n for n, _ in agent.actor.named_parameters()}
    losses["loss_actor"].backward(retain_graph=True)
    assert gradients(agent.actor) == names
    assert not gradients(agent.world_model) | gradients(agent.value) | gradients(agent.slow_value)
    clear(agent)
    losses["loss_value"].backward()
    assert gradients(agent.value) == {n for n, _ in agent.value.named_parameters()}
    assert not gradients(agent.world_model) | gradients(agent.actor) | gradients(agent.slow_value)


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_41_replay_value_gradient_reaches_the_encoder(spec):
    agent = v3_agent(spec)
    losses, _ = losses_of(agent)
    losses["loss_replay_value"].backward()
    moved = gradients(agent.world_model)
    assert {n for n, _ in agent.world_model.encoder.named_parameters()} <= {
        n.removeprefix("encoder.") for n in moved
    }
    assert prefixes(moved) == {"encoder", "prior", "posterior"}
    assert not any(n.startswith("prior.head") for n in moved)
    assert gradients(agent.value) == {n for n, _ in agent.value.named_parameters()}
    assert not gradients(agent.actor) | gradients(agent.slow_value)


def test_40_value_targets_carry_no_gradient():
    """The critic's gradient is that of its logits alone: returns and slow critic are constants."""
    agent = v3_agent()
    _, dream = agent.actor_loss(v3_latents(agent.args, 6))
    assert not dream["lambda_target"].requires_grad and not dream["feat"].requires_grad
    agent.value_loss(dream)[0]["loss_value"].backward()
    gradient = agent.value[-1].bias.grad.clone()
    logits = agent.value(dream["feat"])[:, :-1].detach().requires_grad_()
    slow = dreamer_v3.two_hot_decode(agent.slow_value(dream["feat"]), agent.world_model.bins)
    codes = sum(
        dreamer_v3.two_hot_encode(x[:, :-1].detach(), agent.world_model.bins)
        for x in (dream["lambda_target"], slow)
    )
    loss = -(codes * logits.log_softmax(-1)).sum(-1) * dream["weight"][:, :-1]
    loss.mean().backward()
    near(gradient, logits.grad.sum((0, 1)), 1e-3, 1e-6)


def test_12_dynamics_and_representation_gradients():
    """Representation loss moves no prior head; at T = 1, dynamics loss moves no posterior."""
    for length in (2, 6):
        agent = v3_agent(SPEC, free_nats=0.0)
        losses, _ = agent.model_loss(with_previous(make_batch(agent, length=length)))
        losses["loss_model_representation"].backward(retain_graph=True)
        moved = gradients(agent.world_model)
        assert not any(n.startswith("prior.head") for n in moved)
        assert any(n.startswith("posterior") for n in moved)
        assert any(n.startswith("encoder") for n in moved)
        clear(agent)
        losses["loss_model_dynamic"].backward()
        moved = gradients(agent.world_model)
        assert any(n.startswith("prior.head") for n in moved)
        # with more rows the gradient runs back through the sampled latents
        assert any(n.startswith("posterior") for n in moved) == (length > 2)
        assert any(n.startswith("encoder") for n in moved) == (length > 2)


def test_07_reward_and_continue_reach_the_encoder():
    for key, head in (("reward", "reward"), ("continue", "cont"), ("reco", "decoder")):
        agent = v3_agent()
        losses, _ = losses_of(agent)
        losses[f"loss_model_{key}"].backward()
        moved = gradients(agent.world_model)
        assert {"encoder", "posterior", "prior", head} == prefixes(moved)


def test_imagination_starts_carry_no_gradient():
    agent = v3_agent()
    start = v3_latents(agent.args, 4)
    start["belief"].requires_grad_()
    losses, dream = agent.actor_loss(start)
    value, _ = agent.value_loss(dream)
    (losses["loss_actor"] + value["loss_value"]).backward()
    assert start["belief"].grad is None
    assert dream["feat"].shape == (4, 5, 48) and torch.equal(dream["feat"][:, 0], features(start))


def test_imagination_by_hand():
    """Each step: the actor at the latents, then the prior, each with its noise."""
    agent = v3_agent()
    start = v3_latents(agent.args, 3)
    noise = agent.actor_loss.draw_noise(3)
    dream = agent.actor_loss.imagine(features(start), noise)
    state, belief = start["state"], start["belief"]
    for t in range(4):
        policy = agent.actor(torch.cat([belief, state], -1))
        action = policy.mode + policy.base_dist.stddev * noise["action"][:, t]
        near(dream["action"][:, t], action)
        _, state, belief = agent.world_model.prior(state, belief, action, noise["state"][:, t])
        near(dream["feat"][:, t + 1], torch.cat([belief, state], -1))
    assert dream["action"].shape == (3, 5, 2)


# --- the update ---------------------------------------------------------------------------------


def fixed_noise(agent, batch, length, seed=5):
    torch.manual_seed(seed)
    return {
        "posterior": exponential_noise(batch, length, agent.args.stoch, agent.args.classes),
        "dream": agent.actor_loss.draw_noise(batch * length),
    }


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_42_loss_scales(spec):
    """The gradient of rec + rew + con + dyn + 0.1 rep + policy + value + 0.3 repval."""
    agent, twin = v3_agent(spec), v3_agent(spec)
    batch = make_batch(agent)
    noise = fixed_noise(agent, 3, 6)
    metrics, _ = agent.update(with_previous(batch.clone()), noise)
    model, loss = twin.world_model, twin.model_loss
    _, td = loss(with_previous(batch.clone()), noise["posterior"])
    feat = features(td)
    dynamic, representation = kl_losses(td["posterior_logits"], td["prior_logits"], 0.01, 1.0)
    starts = td.select("belief", "state").flatten()
    actor, dream = twin.actor_loss(starts, noise["dream"])
    value = twin.value_loss(dream)[0]["loss_value"]
    twin.value_loss.lambda_replay = 1.0
    boot = dream["lambda_target"][:, 0].unflatten(0, td.shape)
    replay = twin.value_loss.replay(td, boot)[0]["loss_replay_value"]
    terms = {
        "loss_model_reco": reconstruction_loss(model.decoder, td).mean(),
        "loss_model_reward": reward_loss(model.reward, feat, td["reward"], model.bins).mean(),
        "loss_model_continue": continue_loss(model.cont, feat, td["is_terminal"], 333).mean(),
        "loss_model_dynamic": dynamic.mean(),
        "loss_model_representation": 0.1 * representation.mean(),
        "loss_actor": actor["loss_actor"],
        "loss_value": value,
        "loss_replay_value": 0.3 * replay,
    }
    losses = {k: v for k, v in metrics.items() if "loss" in k}
    assert {k.removeprefix("train/") for k in losses} == terms.keys()
    for key, term in terms.items():
        near(losses[f"train/{key}"], term, 1e-6, 1e-7)
    near(sum(losses.values()), sum(terms.values()), 1e-6)
    near(terms["loss_model_representation"], 0.1 * terms["loss_model_dynamic"])  # same KL
    sum(terms.values()).backward()
    for name, module in agent.modules.items():
        pairs = zip(module.named_parameters(), twin.modules[name].parameters(), strict=True)
        for (key, p), q in pairs:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def test_46_slow_critic():
    """A copy at first; after an update 0.02 of the *new* critic and 0.98 of the old copy."""
    agent = v3_agent(random=False)
    for p, q in zip(agent.value.parameters(), agent.slow_value.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    agent = v3_agent(lr=1e-2, warmup=0)
    fast = [p.detach().clone() for p in agent.value.parameters()]
    slow = [p.detach().clone() for p in agent.slow_value.parameters()]
    agent.update(with_previous(make_batch(agent)))
    for f, s, p, q in zip(
        fast, slow, agent.value.parameters(), agent.slow_value.parameters(), strict=True
    ):
        assert (p - f).abs().max() > 1e-3  # so that old and new differ
        near(q, 0.02 * p.detach() + 0.98 * s, 1e-5, 1e-6)


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_47_single_optimizer(spec):
    """One group with every parameter of the networks once; none of the slow critic."""
    agent = v3_agent(spec)
    assert len(agent.optimizer.param_groups) == 1
    params = [id(p) for p in agent.optimizer.param_groups[0]["params"]]
    model = agent.world_model
    networks = [model.encoder, model.prior, model.posterior, model.decoder, model.reward]
    networks += [model.cont, agent.actor, agent.value]
    expected = [id(p) for module in networks for p in module.parameters()]
    assert len(params) == len(set(params)) and set(params) == set(expected)
    agent.update(with_previous(make_batch(agent)))
    assert not gradients(agent.slow_value)
    assert not any(p.requires_grad for p in agent.slow_value.parameters())
    for name, module in agent.modules.items():
        assert gradients(module) == {n for n, _ in module.named_parameters()}, name


def test_45_first_update_is_a_no_op():
    agent = v3_agent()
    before = [p.detach().clone() for m in agent.modules.values() for p in m.parameters()]
    batch = make_batch(agent)
    agent.update(with_previous(batch.clone()))
    after = [p for m in agent.modules.values() for p in m.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    # The second one moves by at most 4e-8, so some do not move.
    agent.update(with_previous(batch.clone()))
    assert any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert max((x - y).abs().max() for x, y in zip(before, after, strict=True)) < 3e-7


def test_47_clipping_is_per_tensor():
    """A huge gradient in one network leaves the update of the others as it was."""
    updates = []
    for factor in (1.0, 1e4):
        agent = v3_agent(lr=1e-2, warmup=0)
        before = agent.actor.head.weight.detach().clone()
        for _ in range(2):
            batch = make_batch(agent)
            agent.model_loss.lambda_reco = factor
            agent.update(with_previous(batch), fixed_noise(agent, 3, 6))
            factor = 1.0
            with torch.no_grad():  # keeps all but the actor's head in place
                twin = v3_agent(lr=1e-2, warmup=0)
                for name, module in agent.modules.items():
                    for (key, p), q in zip(
                        module.named_parameters(), twin.modules[name].parameters(), strict=True
                    ):
                        if (name, key) != ("actor", "head.weight"):
                            p.copy_(q)
                agent.slow_value.load_state_dict(twin.slow_value.state_dict())
        updates.append(agent.actor.head.weight.detach() - before)
    assert updates[0].abs().max() > 1e-3
    near(updates[0], updates[1], 1e-4, 1e-6)


def test_48_window():
    """Row 0 gives the first latents and the first previous action, and no loss."""
    agent = v3_agent()
    batch = make_batch(agent)
    batch["is_first"][1:, 1] = False
    noise = fixed_noise(agent, 3, 6)["posterior"]
    td = agent.model_loss(with_previous(batch.clone()), noise)[1]
    assert td.shape == (3, 6)
    assert torch.equal(td["reward"], batch["reward"][:, 1:])
    later = batch.clone()
    later["belief"][:, 1:] = torch.randn(3, 6, 32)  # stored latents of later rows are unused
    later["state"][:, 1:] = torch.randn(3, 6, 16)
    later["action"][:, -1] += 1  # leads beyond the window
    for key, shape in agent.spec["shapes"].items():
        later[key][:, 0] = torch.randn(3, *shape)  # row 0 is never encoded
    assert torch.equal(td["belief"], agent.model_loss(with_previous(later), noise)[1]["belief"])
    for key in ("belief", "state", "action"):
        other = batch.clone()
        other[key][:, 0] += 0.3
        changed = agent.model_loss(with_previous(other), noise)[1]["belief"]
        assert (changed != td["belief"])[:, 0].any(-1).all()
    other = batch.clone()
    other["action"][1, 3] += 0.3
    changed = agent.model_loss(with_previous(other), noise)[1]["belief"]
    assert (changed != td["belief"]).any(-1)[1].tolist() == [False] * 3 + [True] * 3
    assert torch.equal(changed[[0, 2]], td["belief"][[0, 2]])


def test_49_update_returns_the_posterior_latents():
    agent = v3_agent()
    batch, noise = with_previous(make_batch(agent)), fixed_noise(agent, 3, 6)
    expected = agent.model_loss(batch.clone(), noise["posterior"])[1]
    before = batch.clone()
    _, latents = agent.update(batch, noise)
    assert latents.shape == (3, 6) and set(latents.keys()) == {"belief", "state"}
    for key in ("belief", "state"):
        near(latents[key], expected[key])
        assert not latents[key].requires_grad
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    for key in before.keys(True, True):  # the batch itself is left alone
        assert torch.equal(batch[key], before[key])


def test_49_stored_latents():
    """Rows store half precision and bytes; a batch has the latents of the row before each."""
    agent = v3_agent()
    latents = v3_latents(agent.args, 3, 5).set("action", torch.randn(3, 5, 2))
    rows = make_batch(agent, 3, 5).exclude("belief", "state", "action")
    stored = torch.stack([agent.stored_rows(rows[:, t], latents[:, t]) for t in range(5)], 1)
    assert stored["belief"].dtype == torch.float16 and stored["state"].dtype == torch.uint8
    assert {*rows.keys(), "belief", "state", "action"} == set(stored.keys())
    batch = with_previous(stored)
    previous, expected = batch["previous"], latents[:, :-1]
    assert all(x.dtype == stored[key].dtype for key, x in previous.items())
    near(previous["belief"].float(), expected["belief"], 1e-3, 1e-6)
    assert torch.equal(previous["state"].float(), expected["state"])
    assert torch.equal(previous["action"], expected["action"])
    assert all(torch.equal(batch[key], rows[key][:, 1:]) for key in rows.keys())
    assert torch.equal(batch["action"], latents["action"][:, 1:])
    # An update's latents are stored in the same way; only rounding loses anything.
    _, updated = agent.update(batch)
    assert torch.equal(updated["state"].byte().float(), updated["state"])
    assert updated["state"].unflatten(-1, (4, 4)).sum(-1).eq(1).all()


def test_update_in_bfloat16():
    """With autocast on a CPU, all is finite, and losses and gradients are close to float32's."""
    totals, norms = [], []
    for precision in ("float32", "bfloat16"):
        agent = v3_agent(DISCRETE, lr=1e-3, warmup=0, precision=precision)
        metrics, latents = agent.update(with_previous(make_batch(agent)), fixed_noise(agent, 3, 6))
        totals.append({k: v.float() for k, v in metrics.items() if "loss_model" in k})
        assert latents["belief"].isfinite().all()
        params = [p for module in agent.modules.values() for p in module.parameters()]
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in params)
        # Autocast caches casts of weights, even those made without gradient.
        norms.append(torch.stack([p.grad.norm() for p in params]))
    for key, value in totals[0].items():
        near(totals[1][key], value, 0.1, 0.05)
    assert (norms[1] > 0.5 * norms[0]).all() and (norms[1] < 2 * norms[0]).all()


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_compiled_update_is_the_same(spec, monkeypatch):
    """--compile, with a backend that traces as Inductor does but generates no code."""
    compiler = functools.partial(torch.compile, backend="aot_eager")
    for function in dreamer_v3.COMPILED:  # --compile replaces them; monkeypatch restores them
        monkeypatch.setattr(dreamer_v3, function.__name__, function)
    results = []
    for compile in ("no", "yes"):
        monkeypatch.setattr(torch, "compile", compiler)
        agent = v3_agent(spec, compile=compile, lr=1e-3, warmup=0)
        for _ in range(2):
            metrics, _ = agent.update(with_previous(make_batch(agent)), fixed_noise(agent, 3, 6))
        results.append((metrics, [p for m in agent.modules.values() for p in m.parameters()]))
    for function in dreamer_v3.COMPILED:
        assert getattr(dreamer_v3, function.__name__) is not function
    for key, value in results[0][0].items():
        near(results[1][0][key], value, 1e-4, 1e-5)
    for x, y in zip(results[0][1], results[1][1], strict=True):
        near(x.detach(), y.detach(), 1e-3, 1e-5)


class NoHostReads(TorchDispatchMode):
    """Raises on operations that would wait for a GPU or copy from pageable memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"):
            raise AssertionError(f"{name} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_an_update_never_waits_for_the_device(spec):
    """A CUDA graph records what runs between reading the batch and returning the metrics."""
    agent = v3_agent(spec)
    batch = make_batch(agent)
    agent.update(with_previous(batch.clone()))
    td = with_previous(batch)
    with NoHostReads():
        agent.update(td)
    with NoHostReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        batch["reward"].sum().item()


# --- acting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_acting_filters_as_training_does(spec, monkeypatch):
    """Row by row with `act`, or at once with the model loss: the same latents."""
    monkeypatch.setattr(dreamer_v3, "exponential_noise", lambda *s, device="cpu": torch.ones(s))
    agent = v3_agent(spec)
    batch, latent, latents = make_batch(agent), None, []
    batch["is_first"][:, 0] = True
    for t in range(7):
        rows = batch[:, t].exclude("belief", "state", "action")
        latent = agent.act(rows, latent)
        action = latent["action"]
        assert action.shape == (3, spec["action_dim"])
        assert action[rows["is_last"]].eq(0).all() and action[~rows["is_last"]].ne(0).any()
        for key in ("action", "belief", "state"):
            batch[key][:, t] = latent[key]
        latents.append(latent)
    _, td = agent.model_loss(with_previous(batch))
    near(td["belief"], torch.stack([x["belief"] for x in latents[1:]], 1), 1e-4, 1e-5)
    near(td["state"], torch.stack([x["state"] for x in latents[1:]], 1), 1e-4, 1e-5)


def test_38_57_act_samples_unclipped():
    agent = v3_agent()
    agent.actor.draw_noise = lambda *shape: torch.full((*shape, 2), 6.0)
    rows = make_batch(agent, batch=4, length=1)[:, 0].exclude("belief", "state", "action")
    rows["is_last"][:] = False
    torch.manual_seed(0)
    action = agent.act(rows)["action"]
    torch.manual_seed(0)
    latent = agent.act(rows, sample=False)
    mode, policy = latent["action"], agent.actor(features(latent))
    near(mode, policy.mode)
    near(action, policy.mode + 6 * policy.base_dist.stddev)
    assert (action > 1).any()


def test_24_act_forgets_at_a_reset():
    agent = v3_agent()
    rows = make_batch(agent, batch=4, length=1)[:, 0].exclude("belief", "state", "action")
    rows["is_first"] = torch.tensor([True, True, False, False])
    beliefs = []
    for latent in (None, v3_latents(agent.args, 4).set("action", torch.randn(4, 2))):
        torch.manual_seed(0)
        beliefs.append(agent.act(rows, latent)["belief"])
    assert torch.equal(beliefs[0][:2], beliefs[1][:2])
    assert (beliefs[0][2:] != beliefs[1][2:]).any(-1).all()


# --- imagination environments -------------------------------------------------------------------


def test_dreamer_env_rollout_equals_manual_steps():
    agent = v3_agent()
    env = DreamerEnv(agent.world_model, (16,), (32,))
    assert {id(p) for p in env.parameters()} == {id(p) for p in agent.world_model.parameters()}
    start = v3_latents(agent.args, 3)

    def policy(td):
        noise = agent.actor.draw_noise(len(td))
        return td.set("action", agent.actor(features(td)).sample(noise))

    with torch.no_grad():
        torch.manual_seed(7)
        rollout = env.rollout(5, policy, start, auto_reset=False)
        torch.manual_seed(7)
        state, belief = start["state"], start["belief"]
        for t in range(5):
            action = agent.actor(torch.cat([belief, state], -1)).sample(agent.actor.draw_noise(3))
            near(rollout["belief"][:, t], belief)
            near(rollout["state"][:, t], state)
            near(rollout["action"][:, t], action)
            noise = exponential_noise(3, 4, 4)
            _, state, belief = agent.world_model.prior(state, belief, action, noise)
            after = torch.cat([belief, state], -1)
            near(rollout["next", "belief"][:, t], belief)
            near(rollout["next", "state"][:, t], state)
            near(rollout["next", "reward"][:, t], agent.world_model.predict_reward(after))
            logit = agent.world_model.cont(after)[:, 0]
            near(rollout["next", "continue"][:, t], 1 / (1 + (-logit).exp()))
    assert rollout.batch_size == (3, 5)
    with torch.no_grad():  # the actor itself is a policy
        torch.manual_seed(7)
        again = env.rollout(5, agent.actor, start)
    assert torch.equal(again["next", "belief"], rollout["next", "belief"])


def test_dreamer_env_reset():
    """Resets to the given latents, which must be complete, or to zeros."""
    agent = v3_agent()
    env = DreamerEnv(agent.world_model, (16,), (32,), batch_size=[3])
    start = env.reset()
    assert start.shape == (3,) and {k: v.shape for k, v in start.items()} == {
        "belief": (3, 32),
        "state": (3, 16),
    }
    assert all(x.eq(0).all() for x in start.values())
    given = v3_latents(agent.args, 5)
    assert torch.equal(
        env.reset(given.clone().set("reward", torch.ones(5)))["state"], given["state"]
    )
    for missing in ("belief", "state"):
        with pytest.raises(ValueError, match=missing):
            env.reset(given.exclude(missing))
        with pytest.raises(ValueError, match=missing):
            env.rollout(5, agent.actor, given.exclude(missing))


def test_dreamer_env_step_trains_the_world_model():
    agent = v3_agent()
    td = v3_latents(agent.args, 3).set("action", torch.randn(3, 2))
    agent.env.step(td)["next", "reward"].sum().backward()
    assert prefixes(gradients(agent.world_model)) == {"prior", "reward"}


def test_world_model_env_follows_its_model():
    """x' = 0.9 x + 0.5 u with u = -0.4 x: x_t = 0.7^t x_0, reward -x^2, done below 0.2."""

    def model(td):
        x = 0.9 * td["x"] + 0.5 * td["action"]
        reward, done = -x.square().squeeze(-1), x.squeeze(-1).abs() < 0.2
        return TensorDict(x=x, reward=reward, done=done, batch_size=td.batch_size)

    env = WorldModelEnv(model, {"x": 1})
    start = TensorDict(x=torch.tensor([[1.0], [4.0]]), batch_size=[2])

    def policy(td):
        return td.set("action", -0.4 * td["x"])

    rollout = env.rollout(50, policy, start, auto_reset=False)
    assert rollout.batch_size == (2, 9)  # 4 * 0.7^9 is the first below 0.2
    expected = torch.tensor([[1.0], [4.0]]) * 0.7 ** torch.arange(10)
    near(rollout["x"][..., 0], expected[:, :-1])
    near(rollout["next", "x"][..., 0], expected[:, 1:])
    near(rollout["action"][..., 0], -0.4 * expected[:, :-1])
    near(rollout["next", "reward"], -(expected[:, 1:] ** 2))
    assert set(start.keys()) == {"x"}  # the caller's TensorDict is left alone


def test_world_model_env_defaults():
    env = WorldModelEnv(lambda td: td.set("x", td["x"] + td["action"]), {"x": 1})
    start = TensorDict(x=torch.zeros(2, 1), batch_size=[2])
    rollout = env.rollout(4, lambda td: td.set("action", torch.ones(2, 1)), start)
    assert rollout["next", "x"][..., 0].tolist() == [[1, 2, 3, 4]] * 2
    assert rollout["next", "reward"].tolist() == [[0.0] * 4] * 2
    assert rollout["next", "done"].dtype == torch.bool and not rollout["next", "done"].any()


def test_dreamer_decoder():
    """Vectors in the environment's units, images uint8; under "next" as well."""
    agent = v3_agent(DISCRETE)
    td = v3_latents(agent.args, 2, 3)
    td["next"] = v3_latents(agent.args, 2, 3)
    out = DreamerDecoder(agent.world_model)(td.clone())
    for part, latents in ((out, td), (out["next"], td["next"])):
        raw = agent.world_model.decoder(latents["state"], latents["belief"])
        near(part["vector"], symexp(raw["vector"]))
        assert part["pixels"].dtype == torch.uint8 and part["pixels"].shape == (2, 3, 32, 32, 3)
        near(part["pixels"], raw["pixels"] * 255, 0, 0.51)
    assert not torch.equal(out["pixels"], out["next", "pixels"])
