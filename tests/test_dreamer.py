"""dreamer.py: formulas, networks, gradient routing, acting, the update."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from helpers import near
from tensordict import TensorDict
from torch import nn
from torch.distributions import (
    AffineTransform,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

import dreamer
from common.replay import with_previous
from common.run import autocast
from dreamer import (
    Agent,
    Args,
    DreamerActor,
    DreamerActorLoss,
    DreamerDecoder,
    DreamerModelLoss,
    DreamerValueLoss,
    ObsEncoder,
    OneHots,
    RSSMPosterior,
    RSSMPrior,
    RSSMRollout,
    TanhNormal,
    elementwise_loss,
    features,
    gaussian_kl,
    kl_loss,
    lambda_return,
    reconstruction_loss,
)
from tools.dreams import open_loop

TINY = dict(deter=12, hidden=10, stoch=4, depth=2, units=16, imagination_horizon=5)
SPEC = {
    "shapes": {"position": (3,), "velocity": (2,)},
    "categories": {},
    "action_dim": 2,
    "classes": (),
}
DISCRETE = SPEC | {"action_dim": 5, "classes": (2, 3)}
DOORS = {"shapes": SPEC["shapes"] | {"doors": (2,)}, "categories": {"doors": [3, 2]}}


def make_agent(spec=SPEC, seed=0, **changes):
    torch.manual_seed(seed)
    return Agent(spec, Args(**TINY | changes))


def make_batch(spec=SPEC, size=3, length=6, seed=1):
    """Random rows [size, length], each with the row before it: windows inside an episode."""
    return with_previous(make_rows(spec, size, length, seed))


def make_rows(spec=SPEC, size=3, length=6, seed=1):
    """Random rows [size, length + 1]: each window lies inside an episode."""
    torch.manual_seed(seed)
    td = TensorDict(batch_size=[size, length + 1])
    for key, shape in spec["shapes"].items():
        image = len(shape) == 3
        rows = (size, length + 1, *shape)
        td[key] = torch.randint(256, rows, dtype=torch.uint8) if image else torch.randn(rows)
    for key, sizes in spec.get("categories", {}).items():
        td[key] = torch.stack([torch.randint(n, (size, length + 1)) for n in sizes], -1).int()
    td["action"] = torch.rand(size, length + 1, spec["action_dim"]) * 2 - 1
    td["reward"] = torch.randn(size, length + 1)
    for key in ("is_first", "is_last", "is_terminal"):
        td[key] = torch.zeros(size, length + 1, dtype=torch.bool)
    return td


# --- formulas -----------------------------------------------------------------------------------


def test_59_free_nats_of_the_mean():
    """KLs of 1 and 7 nats: the mean is 4, not the mean 5 of max(KL, 3)."""
    moments = {
        "posterior_mean": torch.tensor([[[math.sqrt(2.0)], [math.sqrt(14.0)]]], requires_grad=True),
        "posterior_std": torch.ones(1, 2, 1),
        "prior_mean": torch.zeros(1, 2, 1),
        "prior_std": torch.ones(1, 2, 1),
    }
    model, td = make_agent().world_model, make_batch(size=1, length=2).update(moments)
    td["belief"], td["state"] = torch.zeros(1, 2, 12), torch.zeros(1, 2, 4)
    for options, kl, gradient in (
        ({}, 4.0, [math.sqrt(2.0) / 2, math.sqrt(14.0) / 2]),
        (dict(delayed_clamp=False), 5.0, [0, math.sqrt(14.0) / 2]),
        (dict(free_nats=4.5), 4.5, [0, 0]),
    ):
        loss = DreamerModelLoss(model, **options)
        kls = (
            kl_loss(moments, loss.free_nats, loss.delayed_clamp),
            loss(td)[0]["loss_model_kl"],  # which uses the moments that td already has
        )
        for value in kls:
            near(value, kl)
            (grad,) = torch.autograd.grad(value, moments["posterior_mean"])
            near(grad[0, :, 0], torch.tensor(gradient))


def test_gaussian_kl_against_torch():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 4)[:, ..., None].unbind(0)
    moments = a[..., 0], a[..., 0].exp(), b[..., 0], b[..., 0].exp()
    p, q = Normal(*moments[:2]), Normal(*moments[2:])
    near(gaussian_kl(*moments), kl_divergence(p, q).sum(-1))


def test_60_likelihoods():
    zero, one = torch.zeros(()), torch.ones(())
    near(-elementwise_loss(zero, one, "normal"), -0.5 - 0.918939)
    near(-elementwise_loss(zero, 3 * one, "normal"), Normal(0.0, 1.0).log_prob(3 * one))
    for kind, values in (("l2", (1, 9)), ("l1", (1, 3)), ("smooth_l1", (0.5, 2.5))):
        near(elementwise_loss(zero, one, kind), values[0])
        near(elementwise_loss(zero, 3 * one, kind), values[1])


def test_61_lambda_return():
    """A worked example, and eq. 4-6 of the paper as weighted n-step returns."""
    reward, value = torch.tensor([[1.0, 2, 3, 0]]), torch.tensor([[4.0, 5, 6, 7]])
    returns = lambda_return(reward, value, torch.full((1, 4), 0.99), 0.95)
    near(returns, [[12.19131, 11.63617, 9.93]])
    torch.manual_seed(0)
    n, horizon, lam = 3, 15, 0.8
    reward, value = torch.randn(2, n, horizon, dtype=torch.float64)
    pcont = torch.rand(n, horizon, dtype=torch.float64)
    returns = lambda_return(reward, value, pcont, lam)
    assert returns.shape == (n, 14)
    for i in range(n):
        for t in range(horizon - 1):
            n_step_returns = []  # k rewards from step t, then the value
            for k in range(1, horizon - t):
                discounts = np.cumprod([1, *pcont[i, t : t + k].tolist()])
                terms = [*reward[i, t : t + k].tolist(), value[i, t + k].item()]
                n_step_returns.append(float(np.dot(discounts, terms)))
            weights = [(1 - lam) * lam**k for k in range(len(n_step_returns) - 1)] + [
                lam ** (len(n_step_returns) - 1)
            ]
            near(returns[i, t], np.dot(weights, n_step_returns), 1e-12)


def test_tanh_normal_against_torch():
    torch.manual_seed(0)
    mean, std = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3).double() + 0.1
    noise = torch.randn(4, 3, dtype=torch.float64)
    ours = TanhNormal(mean, std)
    squashed = [AffineTransform(mean, std), TanhTransform()]
    normal = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    theirs = Independent(TransformedDistribution(normal, squashed), 1)
    near(ours.log_prob(noise), theirs.log_prob(ours.sample(noise)), 1e-8)


def test_mode_of_each_element():
    """The mode is each element's likeliest of 100 samples; the authors use the first's for all."""
    torch.manual_seed(0)
    mean = torch.tensor([[-2.0, 0.0], [2.0, 0.3], [0.0, -1.0]])
    mode = TanhNormal(mean, torch.full((3, 2), 0.05)).mode
    assert mode.shape == (3, 2) and (mode - mean.tanh()).abs().max() < 0.05
    wide = TanhNormal(torch.zeros(1, 1), torch.full((1, 1), 5.0)).mode
    assert wide.abs() > 0.99  # a wide tanh-normal has its mass, and its modes, at the borders


@pytest.mark.parametrize("sizes", [(4,), (2, 3)])
def test_one_hots(sizes):
    torch.manual_seed(0)
    actor = DreamerActor(3, sum(sizes), sizes, 8)
    logits = torch.randn(sum(sizes), requires_grad=True)
    policy, noise = OneHots(logits.expand(20000, -1).split(sizes, -1)), actor.draw_noise(20000)
    action = policy.sample(noise)
    pairs = list(zip(action.split(sizes, -1), logits.split(sizes, -1), strict=True))
    assert all(torch.equal(one_hot.sum(-1).round(), torch.ones(20000)) for one_hot, _ in pairs)
    for one_hot, logit in pairs:
        assert (one_hot.mean(0) - logit.softmax(-1)).abs().max() < 0.015
    score = torch.randn(sum(sizes))
    (gradient,) = torch.autograd.grad((action[0] * score).sum(), logits, retain_graph=True)
    probs = torch.cat([logit.softmax(-1) for _, logit in pairs])
    (expected,) = torch.autograd.grad((probs * score).sum(), logits)
    near(gradient, expected)
    log_probs = torch.cat([logit.log_softmax(-1) for _, logit in pairs])
    near(policy.log_prob(noise), (action.detach().round() * log_probs).sum(-1))
    mode = OneHots(logits.split(sizes, -1)).mode.split(sizes, -1)
    assert [one_hot.argmax() for one_hot in mode] == [logit.argmax() for _, logit in pairs]


# --- networks -----------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_65_parameters_of_the_pixel_model():
    agent = Agent(
        {"shapes": {"pixels": (64, 64, 3)}, "categories": {}, "action_dim": 6, "classes": ()},
        Args(),
    )
    model = agent.world_model
    assert count(model.encoder) == 690_144
    assert count(model.prior) + count(model.posterior) == 557_920
    assert count(model.decoder) == 3_795_555 and count(model.reward) == 253_201
    assert count(model) == 5_296_820
    assert count(agent.value) == 413_601 and count(agent.actor) == 578_412
    sides = [64, 31, 14, 6, 2]
    x = torch.zeros(1, 3, 64, 64)
    for layer, side in zip(model.encoder.convs[::2], sides[1:], strict=True):
        assert layer.kernel_size == (4, 4)
        x = layer(x)
        assert x.shape[-2:] == (side, side)
    x = torch.zeros(1, 1024, 1, 1)
    for layer, side in zip(model.decoder.deconvs[::2], [5, 13, 30, 64], strict=True):
        x = layer(x)
        assert x.shape[-2:] == (side, side)


def test_first_transposed_convolution_is_a_matrix_product():
    decoder = make_agent(SPEC | {"shapes": {"eye": (64, 64, 3)}}).world_model.decoder
    nn.init.normal_(decoder.deconvs[0].bias)
    x = torch.randn(3, 32 * TINY["depth"])
    near(decoder.first_deconv(x), decoder.deconvs[0](x[..., None, None]), 1e-5, 1e-6)


def test_65_initialization():
    torch.manual_seed(0)
    agent = Agent(
        {"shapes": {"pixels": (64, 64, 3)}, "categories": {}, "action_dim": 6, "classes": ()},
        Args(),
    )
    cell = agent.world_model.prior.cell
    near(cell.weight_hh.T @ cell.weight_hh, torch.eye(200), 0, 1e-5)
    limit = math.sqrt(6 / (200 + 600))
    assert 0.99 * limit < cell.weight_ih.abs().max() <= limit
    for module in agent.modules.values():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                limit = math.sqrt(6 / sum(layer.weight.shape))
            elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                limit = math.sqrt(6 / (sum(layer.weight.shape[:2]) * layer.kernel_size[0] ** 2))
            else:
                continue
            assert 0.95 * limit < layer.weight.abs().max() <= limit
            assert not layer.bias.any()
    assert not cell.bias_ih.any() and not cell.bias_hh.any()


def test_flags_reach_their_modules():
    values = dict(
        pcont=True, pcont_scale=7.0, gamma=0.8, lam=0.6, init_std=2.0, expl_amount=0.7, clip=11.0,
        kl_scale=0.3, free_nats=0.4, model_lr=1e-2, actor_lr=1e-3, value_lr=1e-4,
    )  # fmt: skip
    agent = make_agent(**values)
    assert agent.world_model.gamma == 0.8 and agent.actor_loss.lam == 0.6
    assert (agent.model_loss.lambda_kl, agent.model_loss.free_nats) == (0.3, 0.4)
    assert agent.model_loss.lambda_continue == 7.0 and agent.actor_loss.imagination_horizon == 5
    rates = [o.param_groups[0]["lr"] for o in agent.optimizers.values()]
    assert rates == [1e-2, 1e-3, 1e-4]
    for parameter in agent.actor.mlp[-1].parameters():
        nn.init.zeros_(parameter)
    near(agent.actor(torch.randn(5, 16)).std, torch.full((5, 2), 2.0), 1e-3)
    actions = agent.explore(torch.zeros(20_000, 2))
    share = (actions.abs() < 0.7).float().mean()  # within one standard deviation
    assert abs(share - 0.683) < 0.01
    model = agent.world_model
    depths = [sum(isinstance(x, nn.Linear) for x in m.modules()) for m in (model.reward,
              model.cont, agent.value, agent.actor.mlp)]  # fmt: skip
    assert depths == [3, 4, 4, 5]


def test_64_initial_policy():
    actor = DreamerActor(7, 3, (), 16)
    with torch.no_grad():
        for parameter in actor.mlp[-1].parameters():
            parameter.zero_()
    policy = actor(torch.randn(5, 7))
    near(policy.mean, torch.zeros(5, 3))
    near(policy.std, torch.full((5, 3), 5.0001))
    actor.mlp[-1].bias.data[:3] = torch.tensor([100.0, -100, 1])
    near(actor(torch.randn(1, 7)).mean, [[5.0, -5.0, 5 * math.tanh(0.2)]])


def test_66_recurrence():
    """One step against the GRU's equations (Cho et al., 2014, with the reset after the product)."""
    torch.manual_seed(0)
    prior = RSSMPrior(2, hidden_dim=5, rnn_hidden_dim=6, state_dim=3).double()
    for p in prior.parameters():
        nn.init.normal_(p)
    belief, state, action = (torch.randn(4, n, dtype=torch.float64) for n in (6, 3, 2))
    x = F.elu(torch.cat([state, action], -1) @ prior.inputs[0].weight.T + prior.inputs[0].bias)
    gi = x @ prior.cell.weight_ih.T + prior.cell.bias_ih
    gh = belief @ prior.cell.weight_hh.T + prior.cell.bias_hh
    (ir, iz, inew), (hr, hz, hnew) = gi.chunk(3, -1), gh.chunk(3, -1)
    reset, update = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    expected = update * belief + (1 - update) * torch.tanh(inew + reset * hnew)
    near(prior.cell(x, belief), expected, 1e-10)
    noise = torch.randn(4, 3)
    prior = prior.float()
    inputs = state.float(), belief.float(), action.float()
    prior_mean, prior_std, next_state, next_belief = prior(*inputs, noise)
    near(next_belief, expected, 1e-5)
    near(prior.recurrence(*inputs), expected, 1e-5)
    hidden = F.elu(next_belief @ prior.head[0].weight.T + prior.head[0].bias)
    mean, std = (hidden @ prior.head[2].weight.T + prior.head[2].bias).chunk(2, -1)
    near(prior_mean, mean)
    near(prior_std, F.softplus(std) + 0.1)
    near(next_state, mean + (F.softplus(std) + 0.1) * noise)


def test_vectors_are_encoded_in_sorted_order():
    torch.manual_seed(0)
    encoder = ObsEncoder({"b": (2,), "a": (3,)}, 2, 8)
    td = TensorDict(a=torch.randn(4, 5, 3), b=torch.randn(4, 5, 2), batch_size=[4, 5])
    x = torch.cat([td["a"], td["b"]], -1)
    linears = [layer for layer in encoder.mlp if isinstance(layer, nn.Linear)]
    assert len(linears) == 3
    for layer in linears:
        x = F.elu(x @ layer.weight.T + layer.bias)
    near(encoder.embed(td), x)
    near(encoder(td)["encoded_obs"], x)


def test_categories_are_encoded_as_one_hots():
    torch.manual_seed(0)
    encoder = ObsEncoder(DOORS["shapes"], 2, 8, DOORS["categories"])
    doors = torch.tensor([[[0, 1], [2, 0], [1, 1]]]).int()
    td = TensorDict(doors=doors, position=torch.randn(1, 3, 3), velocity=torch.randn(1, 3, 2))
    hots = torch.tensor([[[1, 0, 0, 0, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1.0]]])
    td.batch_size = [1, 3]
    near(encoder.embed(td), encoder.mlp(torch.cat([hots, td["position"], td["velocity"]], -1)))


@pytest.mark.parametrize("kind", ["normal", "l2"])
def test_categories_have_the_cross_entropy_as_loss_and_the_argmax_as_prediction(kind):
    """-ln softmax of the right class, summed; gradient softmax - one-hot; ln 3 + ln 2 if blind."""
    model, td = make_agent(SPEC | DOORS).world_model, make_batch(SPEC | DOORS)
    td["belief"], td["state"] = torch.randn(3, 6, 12), torch.randn(3, 6, 4)
    decoder, feat = model.decoder, features(td)
    outputs, bias = decoder(feat), decoder.mlp[-1].bias
    parts = outputs["doors"].split([3, 2], -1)
    probs = [x.detach().exp() / x.detach().exp().sum(-1, keepdim=True) for x in parts]
    hots = [torch.eye(n)[td["doors"][..., i]] for i, n in enumerate((3, 2))]
    cross = -sum((p * hot).sum(-1).log() for p, hot in zip(probs, hots, strict=True))
    keys = "position", "velocity"
    others = sum(elementwise_loss(outputs[k], td[k], kind).sum(-1) for k in keys)
    loss = reconstruction_loss(decoder, feat, td, kind)
    near(loss, cross + others, 1e-5)
    loss.sum().backward()
    expected = [(p - hot).sum((0, 1)) for p, hot in zip(probs, hots, strict=True)]
    near(bias.grad[:5], torch.cat(expected), 1e-4, 1e-5)  # sorted keys: the doors come first
    out = DreamerDecoder(model)(td.select("belief", "state"))
    assert out["doors"].dtype == torch.int32 and len(out["doors"].unique()) > 1
    assert torch.equal(out["doors"], torch.stack([p.argmax(-1) for p in probs], -1).int())
    nn.init.zeros_(decoder.mlp[-1].weight)
    blind = reconstruction_loss(decoder, feat, td, kind)
    others = sum(elementwise_loss(torch.zeros_like(td[k]), td[k], kind).sum(-1) for k in keys)
    near(blind - others, torch.full((3, 6), math.log(3) + math.log(2)), 1e-5)


def test_several_images_and_vectors():
    shapes = {"eye": (64, 64, 3), "place": (3,), "depth": (64, 64, 1)}
    spec = SPEC | {"shapes": shapes}
    agent = make_agent(spec)
    assert agent.world_model.encoder.encoded_size == 16 + 64
    metrics = agent.update(make_batch(spec, 2, 3))
    assert all(torch.isfinite(value) for value in metrics.values())
    td = TensorDict(belief=torch.randn(2, 12), state=torch.randn(2, 4), batch_size=[2])
    out = DreamerDecoder(agent.world_model)(td)
    assert out["eye"].shape == (2, 64, 64, 3) and out["depth"].shape == (2, 64, 64, 1)
    assert out["eye"].dtype == torch.uint8 and out["place"].shape == (2, 3)


def test_decoder_in_the_environments_units():
    """A mean of 0 is gray, 127 or 128; from 0.5 up it is white, from -0.5 down black."""
    model = make_agent(SPEC | {"shapes": {"eye": (64, 64, 3)}}).world_model
    td = TensorDict(belief=torch.randn(3, 12), state=torch.randn(3, 4), batch_size=[3])
    for level, value in ((-0.7, 0), (-0.5, 0), (0.0, 128), (0.25, 191), (0.5, 255), (9.0, 255)):
        for parameter in model.decoder.deconvs[-1].parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(model.decoder.deconvs[-1].bias, level)
        assert (DreamerDecoder(model)(td)["eye"].int() - value).abs().max() <= 1


def make_rollout(seed=0, **mode):
    torch.manual_seed(seed)
    sizes = dict(hidden_dim=10, rnn_hidden_dim=12, state_dim=4)
    return RSSMRollout(RSSMPrior(2, **sizes), RSSMPosterior(obs_dim=7, **sizes), **mode)


def rollout_inputs(batch=3, length=6):
    """The first latents and the inputs of each step."""
    torch.manual_seed(5)
    is_first = torch.zeros(batch, length, dtype=torch.bool)
    is_first[1, 3] = is_first[2, 0] = True
    sizes = dict(encoded_obs=7, action=2, belief=12, state=4, noise=4)
    inputs = {
        k: torch.randn(batch, n) if k in ("belief", "state") else torch.randn(batch, length, n)
        for k, n in sizes.items()
    }
    return inputs | {"is_first": is_first}


def roll(rollout, inputs):
    """State, belief, posterior mean and std, each (batch, length, ...)."""
    keep = (~inputs["is_first"]).float()
    steps = inputs["action"], inputs["encoded_obs"], keep, inputs["noise"]
    return rollout.loop(inputs["state"], inputs["belief"], steps)


@pytest.mark.parametrize("mode", ["use_scan", "compile_step"])
def test_rollout_modes_agree(mode, monkeypatch):
    if mode == "compile_step":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="aot_eager"))
    results = []
    for options in ({}, {mode: True}):
        rollout, inputs = make_rollout(**options), rollout_inputs()
        inputs["encoded_obs"].requires_grad_()
        outputs = roll(rollout, inputs)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs).backward()
        grads = [
            inputs["encoded_obs"].grad,
            *(p.grad for p in rollout.parameters() if p.grad is not None),
        ]
        results.append((*outputs, *grads))
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs, 1e-5, 1e-5)


def test_rollout_is_causal_and_resets():
    rollout, inputs = make_rollout(), rollout_inputs()
    inputs["encoded_obs"].requires_grad_()
    inputs["action"].requires_grad_()
    inputs["belief"].requires_grad_()
    state, belief, mean, _ = roll(rollout, inputs)
    for t in range(6):
        (obs,) = torch.autograd.grad(mean[0, t].sum(), inputs["encoded_obs"], retain_graph=True)
        assert obs[0, t].any() and not obs[0, t + 1 :].any() and not obs[1:].any()
        assert obs[0, : t + 1].any(-1).all()
        gradients = torch.autograd.grad(
            belief[0, t].sum(), [inputs["encoded_obs"], inputs["action"]], retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        assert not gradients[0][0, t:].any(), "a belief knows earlier observations only"
        assert gradients[1][0, t].any() and not gradients[1][0, t + 1 :].any()
    leaves = [inputs[k] for k in ("encoded_obs", "action", "belief")]
    obs, action, start = torch.autograd.grad(state[1, 3:].sum(), leaves, retain_graph=True)
    assert not obs[1, :3].any() and not action[1, :4].any() and not start.any()
    _, action, start = torch.autograd.grad(state[2].sum(), leaves)
    assert not action[2, 0].any() and not start[2].any()


def test_rollout_of_a_tensordict():
    """The rollout starts from zeros and adds the latents and the moments of both distributions.

    The action before each row comes from `previous`, or else from the row before.
    """
    inputs = rollout_inputs()
    inputs["belief"].zero_()
    inputs["state"].zero_()
    for mode in ({}, {"use_scan": True}):
        rollout = make_rollout(**mode)
        expected = roll(rollout, inputs)
        td = TensorDict(
            {k: inputs[k] for k in ("encoded_obs", "is_first")}
            | {"previous": TensorDict(action=inputs["action"], batch_size=[3, 6])},
            [3, 6],
        )
        out = rollout(td.clone(), inputs["noise"])
        for name, x in zip(("state", "belief", "posterior_mean", "posterior_std"), expected,
                           strict=True):  # fmt: skip
            near(out[name], x)
        mean, std = rollout.prior.moments(out["belief"])
        near(out["prior_mean"], mean)
        near(out["prior_std"], std)
        inputs["action"][:, 0] = 0  # nothing comes before the first row
        shifted = td.exclude("previous", "is_first")
        shifted["action"] = F.pad(inputs["action"][:, 1:], (0, 0, 0, 1))
        plain = roll(rollout, inputs | {"is_first": torch.zeros(3, 6, dtype=torch.bool)})
        near(rollout(shifted, inputs["noise"])["posterior_mean"], plain[2])
        assert (plain[2] - expected[2])[1, 3:].any()  # the reset there matters


def test_modules_find_their_widths():
    """The action's width comes from its space, the observation's from the first call."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=10, rnn_hidden_dim=12, state_dim=4)
    prior = RSSMPrior(spaces.Box(-1, 1, (2,)), **sizes)
    posterior = RSSMPosterior(hidden_dim=10, state_dim=4)
    belief, obs, noise = torch.randn(3, 12), torch.randn(3, 7), torch.randn(3, 4)
    mean, std, state = posterior(belief, obs, noise)
    raw_mean, raw_std = posterior.head(torch.cat([belief, obs], -1)).chunk(2, -1)
    near(raw_mean, mean)
    near(F.softplus(raw_std) + 0.1, std)
    near(state, mean + std * noise)
    assert prior.recurrence(state, belief, torch.zeros(3, 2)).shape == (3, 12)
    assert prior.draw_noise(5, 2).shape == (5, 2, 4)
    assert DreamerActor(16, spaces.Discrete(3), (3,), 8).action_dim == 3


# --- losses -------------------------------------------------------------------------------------


def test_model_loss_by_hand():
    agent, td = make_agent(pcont=True, free_nats=0.0, kl_scale=2.0), make_batch()
    td["is_terminal"][1, 4] = True
    noise = torch.randn(3, 6, 4)
    losses, td = agent.model_loss(td, noise)
    feat = torch.cat([td["state"], td["belief"]], -1)
    near(features(td), feat)
    p, q = (Normal(td[f"{k}_mean"], td[f"{k}_std"]) for k in ("posterior", "prior"))
    near(losses["loss_model_kl"], 2 * kl_divergence(p, q).sum(-1).mean())
    model, likelihood = agent.world_model, 0.0
    for key, mean in model.decoder(feat).items():
        likelihood = likelihood + Normal(mean, 1.0).log_prob(td[key]).sum(-1)
    near(losses["loss_model_reco"], -likelihood.mean())
    reward = Normal(model.reward(feat)[..., 0], 1.0).log_prob(td["reward"])
    near(losses["loss_model_reward"], -reward.mean())
    target = torch.full((3, 6), 0.99)
    target[1, 4] = 0
    logits = model.cont(feat)[..., 0]
    expected = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()
    near(losses["loss_model_continue"], 10 * expected)
    other_loss = DreamerModelLoss(
        model, lambda_kl=0.5, lambda_reco=3.0, lambda_reward=7.0, lambda_continue=1.0,
        free_nats=0.0, reco_loss="l2", reward_loss="l1",
    )  # fmt: skip
    others, _ = other_loss(make_batch().set("is_terminal", td["is_terminal"]), noise)
    square = sum(((m - td[k]) ** 2).sum(-1) for k, m in model.decoder(feat).items())
    near(others["loss_model_reco"], 3 * square.mean())
    near(others["loss_model_reward"], 7 * (model.reward(feat)[..., 0] - td["reward"]).abs().mean())
    near(others["loss_model_kl"], losses["loss_model_kl"] / 4)
    near(others["loss_model_continue"], expected)


def make_start(agent, n=4, seed=3):
    torch.manual_seed(seed)
    args = agent.args
    latents = dict(belief=torch.randn(n, args.deter), state=torch.randn(n, args.stoch))
    return TensorDict(latents, [n])


@pytest.mark.parametrize("pcont", [False, True])
def test_62_discount_weights(pcont):
    agent = make_agent(pcont=pcont, imagination_horizon=15)
    _, dream = agent.actor_loss(make_start(agent))
    assert dream.shape == (4, 15)
    weight, cont = dream["weight"], dream["continue"]
    assert not weight.requires_grad
    if pcont:
        near(cont, agent.world_model.cont(dream["feat"])[..., 0].sigmoid())
    else:
        near(weight[:, :-1], (0.99 ** torch.arange(14)).expand(4, 14))
    returns = lambda_return(dream["reward"], dream["value"], cont, 0.95)
    near(dream["lambda_target"][:, :-1], returns)
    for t in range(14):
        near(weight[:, t], cont[:, :t].prod(1))
    assert not weight[:, -1].any() and not dream["lambda_target"][:, -1].any()
    plain = DreamerActorLoss(agent.actor, agent.value, agent.env, discount_loss=False)
    torch.manual_seed(0)
    loss, dream = plain(make_start(agent))
    for t in range(14):
        near(dream["weight"][:, t], dream["continue"][:, :t].prod(1))
    near(loss["loss_actor"], -dream["lambda_target"][:, :-1].mean())


def test_value_loss_by_hand():
    agent = make_agent()
    _, dream = agent.actor_loss(make_start(agent))
    value = agent.value(dream["feat"])[:, :-1, 0]
    target, weight = dream["lambda_target"][:, :-1], 0.99 ** torch.arange(4)
    expected = -(weight * Normal(value, 1.0).log_prob(target)).mean()
    near(agent.value_loss(dream)[0]["loss_value"], expected)
    other = DreamerValueLoss(agent.value, value_loss="l2", discount_loss=False)
    near(other(dream)[0]["loss_value"], ((value - target) ** 2).mean())


def test_dreams_leave_out_the_start():
    """Entry t is the state after t + 1 steps; its reward and value are predicted there."""
    agent, start = make_agent(), make_start(make_agent())
    noise = agent.actor_loss.draw_noise(4)
    _, dream = agent.actor_loss(start, noise)
    belief, state = start["belief"], start["state"]
    for t in range(5):
        action = agent.actor(torch.cat([state, belief], -1)).sample(noise["action"][:, t])
        *_, state, belief = agent.world_model.prior(state, belief, action, noise["state"][:, t])
        feat = torch.cat([state, belief], -1)
        near(dream["feat"][:, t], feat)
        near(dream["reward"][:, t], agent.world_model.reward(feat)[:, 0])
        near(dream["value"][:, t], agent.value(feat)[:, 0])


def test_63_gradient_through_the_dynamics():
    """The actor's gradient equals finite differences with the policy's inputs fixed."""
    agent = make_agent()
    start, noise = make_start(agent), agent.actor_loss.draw_noise(4)
    loss, dream = agent.actor_loss(start, noise)
    params = list(agent.actor.parameters())
    grads = torch.autograd.grad(loss["loss_actor"], params, retain_graph=True)
    assert all(grad.any() for grad in grads)
    # The policy's fixed inputs: the start, then the states of the dream.
    first = torch.cat([start["state"], start["belief"]], -1)[:, None]
    inputs = torch.cat([first, dream["feat"][:, :-1]], 1).detach()

    def objective():
        belief, state, feats = start["belief"], start["state"], []
        for t in range(5):
            action = agent.actor(inputs[:, t]).sample(noise["action"][:, t])
            *_, state, belief = agent.world_model.prior(state, belief, action, noise["state"][:, t])
            feats.append(torch.cat([state, belief], -1))
        feat = torch.stack(feats, 1)
        reward, value = agent.world_model.reward(feat)[..., 0], agent.value(feat)[..., 0]
        returns = lambda_return(reward, value, torch.full_like(reward, 0.99), 0.95)
        return -(0.99 ** torch.arange(4) * returns).mean()

    near(objective(), loss["loss_actor"])
    for grad, expected in zip(grads, torch.autograd.grad(objective(), params), strict=True):
        near(grad, expected, 1e-4, 1e-6)
    with torch.no_grad():  # along the gradient, the loss changes by its norm
        norm, values = math.sqrt(sum(grad.square().sum().item() for grad in grads)), []
        for step in (0.02, -0.04):
            for p, grad in zip(params, grads, strict=True):
                p.add_(grad / norm, alpha=step)
            values.append(objective().item())
    near((values[0] - values[1]) / 0.04, norm, 0.02)


def test_the_losses_reach_only_their_own_parameters():
    """With backward(), because Agent.update asks only for the gradients that it needs."""
    for spec in (SPEC, DISCRETE):
        agent = make_agent(spec, pcont=True)
        losses, dream = agent.actor_loss(make_start(agent))
        losses["loss_actor"].backward()
        others = [*agent.world_model.parameters(), *agent.value.parameters()]
        assert all(p.grad is None and p.requires_grad for p in others)
        assert all(p.grad.abs().sum() > 0 for p in agent.actor.parameters())
        before = [p.grad.clone() for p in agent.actor.parameters()]
        agent.value_loss(dream)[0]["loss_value"].backward()
        assert all(p.grad is None for p in agent.world_model.parameters())
        assert all(p.grad is not None for p in agent.value.parameters())
        assert all(map(torch.equal, before, (p.grad for p in agent.actor.parameters())))


def test_gradient_routing_of_the_update():
    """Each optimizer moves only its module: with a rate of 0, the others do not touch it."""
    for frozen in ("world_model", "actor", "value"):
        agent = make_agent(free_nats=0.0)
        agent.optimizers[frozen].param_groups[0]["lr"] = 0.0
        before = {k: [p.clone() for p in m.parameters()] for k, m in agent.modules.items()}
        agent.update(make_batch())
        for name, module in agent.modules.items():
            same = [
                torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True)
            ]
            assert all(same) if name == frozen else not any(same), name
    agent = make_agent()
    _, td = agent.model_loss(make_batch())
    starts = td.select("belief", "state").flatten()
    loss, dream = agent.actor_loss(starts)
    with pytest.raises(RuntimeError, match="not require grad|unused|appears to not"):
        torch.autograd.grad(loss["loss_actor"], starts["belief"])
    value = agent.value_loss(dream)[0]["loss_value"]
    grads = torch.autograd.grad(value, list(agent.actor.parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)


def test_70_optimizers():
    agent = make_agent(clip=0.01)
    rates = {name: o.param_groups[0] for name, o in agent.optimizers.items()}
    assert {k: g["lr"] for k, g in rates.items()} == dict(world_model=6e-4, actor=8e-5, value=8e-5)
    assert all(g["eps"] == 1e-7 and g["betas"] == (0.9, 0.999) for g in rates.values())
    metrics = agent.update(make_batch())
    for name, module in agent.modules.items():
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))
        assert metrics[f"train/grad_norm_{name}"] > 0.01
        near(norm, 0.01, 1e-3)
    assert Args().clip == 100.0


def test_an_update_leaves_its_batch_unchanged():
    """A batch that kept the posteriors of one update would hand them to the next."""
    agent, batch, before = make_agent(), make_batch(), make_batch()
    agent.update(batch)
    open_loop(agent, batch, 2)
    assert set(batch.keys(True)) == set(before.keys(True))
    assert all(torch.equal(batch[key], before[key]) for key in before.keys(True, True))


@pytest.mark.parametrize(("pcont", "rows"), [(False, 6), (True, 5)])
def test_pcont_starts_leave_out_the_last_row(monkeypatch, pcont, rows):
    agent = make_agent(pcont=pcont)
    starts, forward = [], agent.actor_loss.forward
    monkeypatch.setattr(
        agent.actor_loss, "forward", lambda td, noise: starts.append(td) or forward(td, noise)
    )
    noise_sizes, draw = [], agent.actor_loss.draw_noise
    monkeypatch.setattr(agent.actor_loss, "draw_noise", lambda n: noise_sizes.append(n) or draw(n))
    agent.update(make_batch())
    assert starts[0].shape == (3, rows)
    assert noise_sizes == [3 * rows]  # a dream from each of them


# --- acting -------------------------------------------------------------------------------------


def rows_of(agent, n=2, **flags):
    td = make_rows(agent.spec, n, 1)[:, 1].exclude("action")
    for key, value in flags.items():
        td[key] = torch.full((n,), value)
    return td


def test_67_exploration():
    agent = make_agent()
    with torch.no_grad():
        agent.actor.mlp[-1].weight.zero_()
        agent.actor.mlp[-1].bias[2:] = -30.0  # standard deviation 1e-4: the rest is added noise
    rows, actions = rows_of(agent, 2000), {}
    for training in (False, True):
        actions[training] = agent.act(rows, None, training)["action"]
    assert actions[False].abs().max() < 1e-3
    assert abs(actions[True].std() - 0.3) < 0.01 and abs(actions[True].mean()) < 0.02
    agent.actor.mlp[-1].bias.data[:2] = 100.0  # tanh(5) = 0.9999
    action = agent.act(rows, None, True)["action"]
    assert action.max() == 1.0 and 0.4 < (action == 1.0).float().mean() < 0.6
    action = agent.act(rows, None, True, random=True)["action"]
    assert abs(action.mean()) < 0.03 and abs(action.std() - 3**-0.5) < 0.02
    assert not agent.act(rows_of(agent, 4, is_last=True), None, True)["action"].any()


def test_67_epsilon_greedy():
    agent = make_agent(DISCRETE)
    with torch.no_grad():
        agent.actor.mlp[-1].weight.zero_()
        agent.actor.mlp[-1].bias.copy_(torch.tensor([30.0, 0, 0, 30, 0]))
    rows = rows_of(agent, 5000)
    action = agent.act(rows)["action"]
    assert torch.equal(action, torch.tensor([1.0, 0, 0, 1, 0]).expand(5000, 5))
    action = agent.act(rows, None, True)["action"]
    greedy = (action[:, 0] == 1) & (action[:, 3] == 1)
    assert abs(greedy.float().mean() - (0.7 + 0.3 / 6)) < 0.02
    random = agent.act(rows, None, True, random=True)["action"]
    expected = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    assert (random.mean(0) - expected).abs().max() < 0.03
    for drawn in (action, random):
        assert all(torch.equal(p.sum(-1), torch.ones(5000)) for p in drawn.split((2, 3), -1))


def test_the_noisy_action_is_the_models_input():
    """The next latents depend on the action in the latent, which is the one that was played."""
    agent = make_agent()
    rows = rows_of(agent, 2)
    latent = agent.act(rows, None, True)
    torch.manual_seed(0)
    after = agent.act(rows, latent)
    inputs = (latent[k] for k in ("state", "belief", "action"))
    near(after["belief"], agent.world_model.prior.recurrence(*inputs))
    assert torch.equal(
        agent.stored_rows(rows, latent)["action"], latent["action"]
    )  # in the replay, too
    first = rows_of(agent, 2, is_first=True)
    near(agent.act(first, latent)["belief"], agent.act(first, None)["belief"])


def test_acting_filters_like_training():
    """Row by row with `act`, or a window at once with the world model: the same belief."""
    agent, rows = make_agent(), make_rows()
    rows["is_first"][:, 1] = True
    td = with_previous(rows)
    torch.manual_seed(0)
    out = agent.world_model(td.copy(), torch.zeros(3, 6, 4))
    belief, mean = out["belief"], out["posterior_mean"]
    latent = None
    for t in range(6):
        rows = td[:, t].exclude("previous", "action")
        if latent is not None:
            latent["action"] = td["previous", "action"][:, t]
        latent = agent.act(rows, latent)
        near(latent["belief"], belief[:, t])
        embed = agent.world_model.encoder.embed(rows)
        near(agent.world_model.posterior(latent["belief"], embed)[0], mean[:, t])
        latent["state"] = mean[:, t]


def test_imagination_environment():
    agent, start = make_agent(pcont=True), make_start(make_agent())
    torch.manual_seed(0)
    out = agent.env.rollout(7, agent.actor, start, auto_reset=False)
    assert out.shape == (4, 7)
    near(out["belief"][:, 0], start["belief"])
    near(out["next", "belief"][:, :-1], out["belief"][:, 1:])
    feat = torch.cat([out["next", "state"], out["next", "belief"]], -1)
    near(out["next", "reward"], agent.world_model.reward(feat)[..., 0])
    near(out["next", "continue"], agent.world_model.cont(feat)[..., 0].sigmoid())
    for t in range(7):
        inputs = (out[k][:, t] for k in ("state", "belief", "action"))
        near(out["next", "belief"][:, t], agent.world_model.prior.recurrence(*inputs))
    decoded = DreamerDecoder(agent.world_model)(out)
    near(decoded["next", "position"], agent.world_model.decoder(feat)["position"])


def test_open_loop_sees_the_context_only():
    agent, rows = make_agent(), make_rows(length=9)

    def predict(rows):
        return open_loop(agent, with_previous(rows.clone()), 3)

    dream = predict(rows)
    other = rows.clone()
    other["position"][:, 4:] += 5.0  # rows 4.. of the window are imagined
    other["reward"] += 1.0
    changed = predict(other)
    near(changed["position"], dream["position"])
    near(changed["true", "reward"], dream["true", "reward"] + 1)
    other["position"][:, 3] += 5.0
    assert not torch.equal(predict(other)["position"][:, 3:], dream["position"][:, 3:])
    rows["action"][:, 6] += 1.0  # the action after row 6 of the window [B, T + 1]
    moved = predict(rows)["position"] != dream["position"]
    assert not moved[:, :6].any() and moved[:, 6:].all()


def test_bfloat16_losses_are_close():
    torch.manual_seed(0)
    noise = {"posterior": torch.randn(3, 6, 4)}
    metrics = {}
    for precision in ("float32", "bfloat16"):
        agent = make_agent(precision=precision)
        noise["dream"] = TensorDict(
            action=torch.full((18, 5, 2), 0.3), state=torch.full((18, 5, 4), -0.2),
            batch_size=[18, 5],
        )  # fmt: skip
        metrics[precision] = agent.update(make_batch(), noise)
    for name, value in metrics["float32"].items():
        if "loss" in name:
            assert abs(metrics["bfloat16"][name] - value) < 0.03 * abs(value) + 0.02, name


def test_the_belief_is_float32_under_bfloat16():
    agent = make_agent(precision="bfloat16")
    prior, (belief, state, action) = agent.world_model.prior, torch.randn(3, 7, 12).unbind(0)
    state, action = state[:, :4], action[:, :2]
    calls, cell = [], prior.cell.forward
    prior.cell.forward = lambda x, h: calls.append((x, h)) or cell(x, h)
    with autocast(agent):
        after = prior.recurrence(state, belief, action)
    ((inputs, memory),) = calls
    assert after.dtype == inputs.dtype == torch.float32 and memory is belief
    assert torch.equal(after, cell(inputs, belief))  # outside of autocast


def test_pictures_under_bfloat16():
    """What goes to matplotlib and into videos is float32, int32 and uint8."""
    spec = SPEC | DOORS | {"shapes": {"eye": (64, 64, 3), "place": (3,), "doors": (2,)}}
    dream = open_loop(make_agent(spec, precision="bfloat16"), make_batch(spec), 2)
    assert dream["place"].dtype == dream["reward"].dtype == torch.float32
    assert dream["eye"].dtype == torch.uint8 and dream["doors"].dtype == torch.int32


def test_adam_moves_between_devices():
    """A checkpoint from a GPU has capturable=True, which a CPU refuses."""
    agent = make_agent()
    agent.update(make_batch())
    state = agent.state_dict()
    for name in agent.modules:
        state[f"{name}_optimizer"]["param_groups"][0]["capturable"] = True
    other = make_agent(seed=1)
    other.load_state_dict(state)
    noise = {"posterior": torch.zeros(3, 6, 4), "dream": agent.actor_loss.draw_noise(18)}
    losses = [each.update(make_batch(), noise)["train/loss_actor"] for each in (agent, other)]
    assert losses[0] == losses[1]
    assert not any(o.param_groups[0]["capturable"] for o in other.optimizers.values())


@pytest.mark.parametrize("spec", [SPEC, DISCRETE | DOORS])
def test_compiled_update_is_the_same(spec, monkeypatch):
    compiled, compile_ = [], torch.compile
    for function in dreamer.COMPILED:  # --compile replaces them for the whole process
        assert getattr(dreamer, function.__name__) is function
        monkeypatch.setattr(dreamer, function.__name__, function)
    monkeypatch.setattr(
        dreamer.torch, "compile",
        lambda f, **kw: compiled.append(f) or compile_(f, backend="aot_eager", **kw),
    )  # fmt: skip
    results = []
    for options in ({}, {"compile": "yes"}):  # in this order: the functions stay compiled
        assert not compiled
        agent = make_agent(spec, **options)
        results.append([])
        for _ in range(2):
            torch.manual_seed(7)
            results[-1].append(agent.update(make_batch(spec)))
    assert {f.__name__ for f in compiled} == {
        "rssm_step", "dream_step", "reconstruction_loss", "reward_loss", "continue_loss",
    }  # fmt: skip
    assert all(getattr(dreamer, f.__name__) is not f for f in dreamer.COMPILED)
    for plain, fast in zip(*results, strict=True):
        for name, value in plain.items():
            near(fast[name], value, 1e-4, 1e-5)
