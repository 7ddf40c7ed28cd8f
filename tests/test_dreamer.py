"""dreamer.py, details 59-70: formulas, networks, gradient routing, acting, the update."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from common.evaluation import open_loop
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
    distance,
    features,
    gaussian_kl,
    lambda_return,
    with_context,
)

TINY = dict(deter=12, hidden=10, stoch=4, depth=2, units=16, imagination_horizon=5)
SPEC = {"shapes": {"position": (3,), "velocity": (2,)}, "action_dim": 2, "classes": ()}
DISCRETE = SPEC | {"action_dim": 5, "classes": (2, 3)}


def make_agent(spec=SPEC, seed=0, **changes):
    torch.manual_seed(seed)
    return Agent(spec, Args(**TINY | changes))


def make_batch(spec=SPEC, size=3, length=6, seed=1):
    """Random rows [size, length + 1]: each window lies inside an episode."""
    torch.manual_seed(seed)
    td = TensorDict(batch_size=[size, length + 1])
    for key, shape in spec["shapes"].items():
        image = len(shape) == 3
        rows = (size, length + 1, *shape)
        td[key] = torch.randint(256, rows, dtype=torch.uint8) if image else torch.randn(rows)
    td["action"] = torch.rand(size, length + 1, spec["action_dim"]) * 2 - 1
    td["reward"] = torch.randn(size, length + 1)
    for key in ("is_first", "is_last", "is_terminal"):
        td[key] = torch.zeros(size, length + 1, dtype=torch.bool)
    return td


def near(found, expected, relative=1e-5, absolute=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(),
        rtol=relative, atol=absolute,
    )  # fmt: skip


# --- formulas -----------------------------------------------------------------------------------


def test_59_free_nats_of_the_mean():
    """KLs of 1 and 7 nats: the mean is 4, not the mean 5 of max(KL, 3)."""
    moments = {
        "post_mean": torch.tensor([[[math.sqrt(2.0)], [math.sqrt(14.0)]]], requires_grad=True),
        "post_std": torch.ones(1, 2, 1),
        "prior_mean": torch.zeros(1, 2, 1),
        "prior_std": torch.ones(1, 2, 1),
    }
    model = make_agent().world_model
    near(DreamerModelLoss(model).kl(moments), 4.0)
    near(DreamerModelLoss(model, delayed_clamp=False).kl(moments), 5.0)
    near(DreamerModelLoss(model, free_nats=4.5).kl(moments), 4.5)
    for loss, expected in (
        (DreamerModelLoss(model), [math.sqrt(2.0) / 2, math.sqrt(14.0) / 2]),
        (DreamerModelLoss(model, delayed_clamp=False), [0, math.sqrt(14.0) / 2]),
        (DreamerModelLoss(model, free_nats=4.5), [0, 0]),
    ):
        (gradient,) = torch.autograd.grad(loss.kl(moments), moments["post_mean"])
        near(gradient[0, :, 0], torch.tensor(expected))


def test_gaussian_kl_is_that_of_torch():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 4)[:, ..., None].unbind(0)
    moments = a[..., 0], a[..., 0].exp(), b[..., 0], b[..., 0].exp()
    p, q = Normal(*moments[:2]), Normal(*moments[2:])
    near(gaussian_kl(*moments), kl_divergence(p, q).sum(-1))


def test_60_likelihoods():
    zero, one = torch.zeros(()), torch.ones(())
    near(-distance(zero, one, "normal"), -0.5 - 0.918939)
    near(-distance(zero, 3 * one, "normal"), Normal(0.0, 1.0).log_prob(3 * one))
    for kind, values in (("l2", (1, 9)), ("l1", (1, 3)), ("smooth_l1", (0.5, 2.5))):
        near(distance(zero, one, kind), values[0])
        near(distance(zero, 3 * one, kind), values[1])


def test_61_lambda_return():
    """The specification's example, and eq. 4-6 of the paper as weighted n-step returns."""
    reward, value = torch.tensor([[1.0, 2, 3, 0]]), torch.tensor([[4.0, 5, 6, 7]])
    found = lambda_return(reward, value, torch.full((1, 4), 0.99), 0.95)
    near(found, [[12.19131, 11.63617, 9.93]])
    torch.manual_seed(0)
    n, horizon, lam = 3, 15, 0.8
    reward, value = torch.randn(2, n, horizon, dtype=torch.float64)
    pcont = torch.rand(n, horizon, dtype=torch.float64)
    found = lambda_return(reward, value, pcont, lam)
    assert found.shape == (n, 14)
    for i in range(n):
        for t in range(horizon - 1):
            steps = []  # k rewards from t on, then the value
            for k in range(1, horizon - t):
                discounts = np.cumprod([1, *pcont[i, t : t + k].tolist()])
                parts = [*reward[i, t : t + k].tolist(), value[i, t + k].item()]
                steps.append(float(np.dot(discounts, parts)))
            weights = [(1 - lam) * lam**k for k in range(len(steps) - 1)] + [
                lam ** (len(steps) - 1)
            ]
            near(found[i, t], np.dot(weights, steps), 1e-12)


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
    """Likeliest of 100 samples for its own element; the authors' code takes the first one's."""
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
    parts = list(zip(action.split(sizes, -1), logits.split(sizes, -1), strict=True))
    assert all(torch.equal(part.sum(-1).round(), torch.ones(20000)) for part, _ in parts)
    for part, logit in parts:
        assert (part.mean(0) - logit.softmax(-1)).abs().max() < 0.015
    score = torch.randn(sum(sizes))
    (straight,) = torch.autograd.grad((action[0] * score).sum(), logits, retain_graph=True)
    probs = torch.cat([logit.softmax(-1) for _, logit in parts])
    (expected,) = torch.autograd.grad((probs * score).sum(), logits)
    near(straight, expected)
    chosen = torch.cat([logit.log_softmax(-1) for _, logit in parts])
    near(policy.log_prob(noise), (action.detach().round() * chosen).sum(-1))
    mode = OneHots(logits.split(sizes, -1)).mode.split(sizes, -1)
    assert [part.argmax() for part in mode] == [logit.argmax() for _, logit in parts]


# --- networks -----------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_65_parameters_of_the_pixel_model():
    agent = Agent({"shapes": {"pixels": (64, 64, 3)}, "action_dim": 6, "classes": ()}, Args())
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


def test_first_transposed_convolution_is_a_product():
    decoder = make_agent(SPEC | {"shapes": {"eye": (64, 64, 3)}}).world_model.decoder
    nn.init.normal_(decoder.deconvs[0].bias)
    x = torch.randn(3, 32 * TINY["depth"])
    near(decoder.spread(x), decoder.deconvs[0](x[..., None, None]), 1e-5, 1e-6)


def test_65_initialisation():
    torch.manual_seed(0)
    agent = Agent({"shapes": {"pixels": (64, 64, 3)}, "action_dim": 6, "classes": ()}, Args())
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


def test_flags_reach_their_parts():
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
    moved = agent.explore(torch.zeros(20_000, 2))
    share = (moved.abs() < 0.7).float().mean()  # within one deviation
    assert abs(share - 0.683) < 0.01
    model = agent.world_model
    depths = [sum(isinstance(x, nn.Linear) for x in m.modules()) for m in (model.reward,
              model.cont, agent.value, agent.actor.mlp)]  # fmt: skip
    assert depths == [3, 4, 4, 5]


def test_64_policy_at_first():
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
    prior = RSSMPrior(2, 6, 5, 3).double()
    for p in prior.parameters():
        nn.init.normal_(p)
    deter, stoch, action = (torch.randn(4, n, dtype=torch.float64) for n in (6, 3, 2))
    x = F.elu(torch.cat([stoch, action], -1) @ prior.inputs[0].weight.T + prior.inputs[0].bias)
    gi = x @ prior.cell.weight_ih.T + prior.cell.bias_ih
    gh = deter @ prior.cell.weight_hh.T + prior.cell.bias_hh
    (ir, iz, inew), (hr, hz, hnew) = gi.chunk(3, -1), gh.chunk(3, -1)
    reset, update = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    expected = update * deter + (1 - update) * torch.tanh(inew + reset * hnew)
    next_deter, next_stoch = prior.cell(x, deter), None
    near(next_deter, expected, 1e-10)
    noise = torch.randn(4, 3)
    prior = prior.float()
    next_deter, next_stoch = prior(deter.float(), stoch.float(), action.float(), noise)
    near(next_deter, expected, 1e-5)
    hidden = F.elu(next_deter @ prior.head[0].weight.T + prior.head[0].bias)
    mean, std = (hidden @ prior.head[2].weight.T + prior.head[2].bias).chunk(2, -1)
    near(next_stoch, mean + (F.softplus(std) + 0.1) * noise)


def test_vectors_are_encoded_in_sorted_order():
    torch.manual_seed(0)
    encoder = ObsEncoder({"b": (2,), "a": (3,)}, 2, 8)
    td = TensorDict(a=torch.randn(4, 5, 3), b=torch.randn(4, 5, 2), batch_size=[4, 5])
    x = torch.cat([td["a"], td["b"]], -1)
    linears = [layer for layer in encoder.mlp if isinstance(layer, nn.Linear)]
    assert len(linears) == 3
    for layer in linears:
        x = F.elu(x @ layer.weight.T + layer.bias)
    near(encoder(td), x)


def test_several_images_and_vectors():
    shapes = {"eye": (64, 64, 3), "place": (3,), "depth": (64, 64, 1)}
    spec = SPEC | {"shapes": shapes}
    agent = make_agent(spec)
    assert agent.world_model.encoder.outputs == 16 + 64
    metrics = agent.update(make_batch(spec, 2, 3))
    assert all(torch.isfinite(value) for value in metrics.values())
    td = TensorDict(deter=torch.randn(2, 12), stoch=torch.randn(2, 4), batch_size=[2])
    out = DreamerDecoder(agent.world_model)(td)
    assert out["eye"].shape == (2, 64, 64, 3) and out["depth"].shape == (2, 64, 64, 1)
    assert out["eye"].dtype == torch.uint8 and out["place"].shape == (2, 3)


def test_decoder_in_the_environments_units():
    """A mean of 0 is grey, 127.5 or 128; +-0.5 and beyond are white and black."""
    model = make_agent(SPEC | {"shapes": {"eye": (64, 64, 3)}}).world_model
    td = TensorDict(deter=torch.randn(3, 12), stoch=torch.randn(3, 4), batch_size=[3])
    for level, value in ((-0.7, 0), (-0.5, 0), (0.0, 128), (0.25, 191), (0.5, 255), (9.0, 255)):
        for parameter in model.decoder.deconvs[-1].parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(model.decoder.deconvs[-1].bias, level)
        assert (DreamerDecoder(model)(td)["eye"].int() - value).abs().max() <= 1


def make_rollout(seed=0, **mode):
    torch.manual_seed(seed)
    prior, posterior = RSSMPrior(2, 12, 10, 4), RSSMPosterior(7, 12, 10, 4)
    return RSSMRollout(prior, posterior, **mode)


def rollout_inputs(batch=3, length=6):
    torch.manual_seed(5)
    is_first = torch.zeros(batch, length, dtype=torch.bool)
    is_first[1, 3] = is_first[2, 0] = True
    sizes = dict(embed=7, action=2, deter=12, stoch=4, noise=4)
    inputs = {
        k: torch.randn(batch, n) if k in ("deter", "stoch") else torch.randn(batch, length, n)
        for k, n in sizes.items()
    }
    return inputs | {"is_first": is_first}


@pytest.mark.parametrize("mode", ["use_scan", "compile_step"])
def test_rollout_modes_agree(mode, monkeypatch):
    if mode == "compile_step":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="aot_eager"))
    results = []
    for options in ({}, {mode: True}):
        rollout, inputs = make_rollout(**options), rollout_inputs()
        inputs["embed"].requires_grad_()
        outputs = rollout(**inputs)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs).backward()
        grads = [
            inputs["embed"].grad,
            *(p.grad for p in rollout.parameters() if p.grad is not None),
        ]
        results.append((*outputs, *grads))
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs, 1e-5, 1e-5)


def test_rollout_is_causal_and_resets():
    rollout, inputs = make_rollout(), rollout_inputs()
    inputs["embed"].requires_grad_()
    inputs["action"].requires_grad_()
    inputs["deter"].requires_grad_()
    deter, stoch, mean, _ = rollout(**inputs)
    for t in range(6):
        (embed,) = torch.autograd.grad(mean[0, t].sum(), inputs["embed"], retain_graph=True)
        assert embed[0, t].any() and not embed[0, t + 1 :].any() and not embed[1:].any()
        assert embed[0, : t + 1].any(-1).all()
        gradients = torch.autograd.grad(
            deter[0, t].sum(), [inputs["embed"], inputs["action"]], retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        assert not gradients[0][0, t:].any(), "deter knows the rows before, not its own"
        assert gradients[1][0, t].any() and not gradients[1][0, t + 1 :].any()
    wanted = [inputs[k] for k in ("embed", "action", "deter")]
    embed, action, start = torch.autograd.grad(stoch[1, 3:].sum(), wanted, retain_graph=True)
    assert not embed[1, :3].any() and not action[1, :4].any() and not start.any()
    _, action, start = torch.autograd.grad(stoch[2].sum(), wanted)
    assert not action[2, 0].any() and not start[2].any()


# --- losses -------------------------------------------------------------------------------------


def test_model_loss_by_hand():
    agent, td = make_agent(pcont=True, free_nats=0.0, kl_scale=2.0), with_context(make_batch())
    td["is_terminal"][1, 4] = True
    noise = torch.randn(3, 6, 4)
    losses, td = agent.model_loss(td, noise)
    feat = torch.cat([td["stoch"], td["deter"]], -1)
    near(features(td), feat)
    p, q = (Normal(td[f"{k}_mean"], td[f"{k}_std"]) for k in ("post", "prior"))
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
    others = DreamerModelLoss(
        model, lambda_kl=0.5, lambda_reco=3.0, lambda_reward=7.0, lambda_continue=1.0,
        free_nats=0.0, reco_loss="l2", reward_loss="l1",
    )  # fmt: skip
    found, _ = others(with_context(make_batch()).set("is_terminal", td["is_terminal"]), noise)
    square = sum(((m - td[k]) ** 2).sum(-1) for k, m in model.decoder(feat).items())
    near(found["loss_model_reco"], 3 * square.mean())
    near(found["loss_model_reward"], 7 * (model.reward(feat)[..., 0] - td["reward"]).abs().mean())
    near(found["loss_model_kl"], losses["loss_model_kl"] / 4)
    near(found["loss_model_continue"], expected)


def start_of(agent, n=4, seed=3):
    torch.manual_seed(seed)
    args = agent.args
    latents = dict(deter=torch.randn(n, args.deter), stoch=torch.randn(n, args.stoch))
    return TensorDict(latents, [n])


@pytest.mark.parametrize("pcont", [False, True])
def test_62_discount_weights(pcont):
    agent = make_agent(pcont=pcont, imagination_horizon=15)
    _, dream = agent.actor_loss(start_of(agent))
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
    loss, dream = plain(start_of(agent))
    for t in range(14):
        near(dream["weight"][:, t], dream["continue"][:, :t].prod(1))
    near(loss["loss_actor"], -dream["lambda_target"][:, :-1].mean())


def test_value_loss_by_hand():
    agent = make_agent()
    _, dream = agent.actor_loss(start_of(agent))
    value = agent.value(dream["feat"])[:, :-1, 0]
    target, weight = dream["lambda_target"][:, :-1], 0.99 ** torch.arange(4)
    expected = -(weight * Normal(value, 1.0).log_prob(target)).mean()
    near(agent.value_loss(dream)[0]["loss_value"], expected)
    other = DreamerValueLoss(agent.value, value_loss="l2", discount_loss=False)
    near(other(dream)[0]["loss_value"], ((value - target) ** 2).mean())


def test_dreams_leave_out_the_start():
    """Entry t is the state after t + 1 steps; its reward and value are predicted there."""
    agent, start = make_agent(), start_of(make_agent())
    noise = agent.actor_loss.draw_noise(4)
    _, dream = agent.actor_loss(start, noise)
    deter, stoch = start["deter"], start["stoch"]
    for t in range(5):
        action = agent.actor(torch.cat([stoch, deter], -1)).sample(noise["action"][:, t])
        deter, stoch = agent.world_model.prior(deter, stoch, action, noise["stoch"][:, t])
        feat = torch.cat([stoch, deter], -1)
        near(dream["feat"][:, t], feat)
        near(dream["reward"][:, t], agent.world_model.reward(feat)[:, 0])
        near(dream["value"][:, t], agent.value(feat)[:, 0])


def test_63_gradient_through_the_dynamics():
    """The actor's gradient, and finite differences, with the policy's input held fixed."""
    agent = make_agent()
    start, noise = start_of(agent), agent.actor_loss.draw_noise(4)
    loss, dream = agent.actor_loss(start, noise)
    params = list(agent.actor.parameters())
    grads = torch.autograd.grad(loss["loss_actor"], params, retain_graph=True)
    assert all(grad.any() for grad in grads)
    # Inputs of the policy, fixed: the start, then the dream's own states.
    first = torch.cat([start["stoch"], start["deter"]], -1)[:, None]
    inputs = torch.cat([first, dream["feat"][:, :-1]], 1).detach()

    def objective():
        deter, stoch, feats = start["deter"], start["stoch"], []
        for t in range(5):
            action = agent.actor(inputs[:, t]).sample(noise["action"][:, t])
            deter, stoch = agent.world_model.prior(deter, stoch, action, noise["stoch"][:, t])
            feats.append(torch.cat([stoch, deter], -1))
        feat = torch.stack(feats, 1)
        reward, value = agent.world_model.reward(feat)[..., 0], agent.value(feat)[..., 0]
        returns = lambda_return(reward, value, torch.full_like(reward, 0.99), 0.95)
        return -(0.99 ** torch.arange(4) * returns).mean()

    near(objective(), loss["loss_actor"])
    for grad, expected in zip(grads, torch.autograd.grad(objective(), params), strict=True):
        near(grad, expected, 1e-4, 1e-6)
    with torch.no_grad():  # along the gradient, the loss changes by its norm
        norm, found = math.sqrt(sum(grad.square().sum().item() for grad in grads)), []
        for step in (0.02, -0.04):
            for p, grad in zip(params, grads, strict=True):
                p.add_(grad / norm, alpha=step)
            found.append(objective().item())
    near((found[0] - found[1]) / 0.04, norm, 0.02)


def test_the_losses_reach_only_their_own_parameters():
    """By backward(), without Agent.update, which asks for the gradients that it needs."""
    for spec in (SPEC, DISCRETE):
        agent = make_agent(spec, pcont=True)
        losses, dream = agent.actor_loss(start_of(agent))
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
    """Each optimiser moves its own module; with a rate of 0 for one, the others do not touch it."""
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
    td = with_context(make_batch())
    agent.model_loss(td)
    starts = td.select("deter", "stoch").flatten()
    loss, dream = agent.actor_loss(starts)
    with pytest.raises(RuntimeError, match="not require grad|unused|appears to not"):
        torch.autograd.grad(loss["loss_actor"], starts["deter"])
    value = agent.value_loss(dream)[0]["loss_value"]
    grads = torch.autograd.grad(value, list(agent.actor.parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)


def test_70_optimisers():
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


@pytest.mark.parametrize(("pcont", "rows"), [(False, 18), (True, 15)])
def test_pcont_starts_leave_out_the_last_row(monkeypatch, pcont, rows):
    agent = make_agent(pcont=pcont)
    seen, forward = [], agent.actor_loss.forward
    monkeypatch.setattr(
        agent.actor_loss, "forward", lambda td, noise: seen.append(td) or forward(td, noise)
    )
    agent.update(make_batch())
    assert seen[0].shape == (rows,)


# --- acting -------------------------------------------------------------------------------------


def rows_of(agent, n=2, **flags):
    td = make_batch(agent.spec, n, 1)[:, 1].exclude("action")
    for key, value in flags.items():
        td[key] = torch.full((n,), value)
    return td


def test_67_exploration():
    agent = make_agent()
    with torch.no_grad():
        agent.actor.mlp[-1].weight.zero_()
        agent.actor.mlp[-1].bias[2:] = -30.0  # a deviation of 1e-4: the noise is all
    rows, found = rows_of(agent, 2000), {}
    for training in (False, True):
        action, state = agent.act(rows, None, training)
        assert torch.equal(action, state["action"])
        found[training] = action
    assert found[False].abs().max() < 1e-3
    assert abs(found[True].std() - 0.3) < 0.01 and abs(found[True].mean()) < 0.02
    agent.actor.mlp[-1].bias.data[:2] = 100.0  # tanh(5) = 0.9999
    action, _ = agent.act(rows, None, True)
    assert action.max() == 1.0 and 0.4 < (action == 1.0).float().mean() < 0.6
    action, _ = agent.act(rows, None, True, random=True)
    assert abs(action.mean()) < 0.03 and abs(action.std() - 3**-0.5) < 0.02
    assert not agent.act(rows_of(agent, 4, is_last=True), None, True)[0].any()


def test_67_epsilon_greedy():
    agent = make_agent(DISCRETE)
    with torch.no_grad():
        agent.actor.mlp[-1].weight.zero_()
        agent.actor.mlp[-1].bias.copy_(torch.tensor([30.0, 0, 0, 30, 0]))
    rows = rows_of(agent, 5000)
    action, _ = agent.act(rows)
    assert torch.equal(action, torch.tensor([1.0, 0, 0, 1, 0]).expand(5000, 5))
    action, _ = agent.act(rows, None, True)
    both = (action[:, 0] == 1) & (action[:, 3] == 1)
    assert abs(both.float().mean() - (0.7 + 0.3 / 6)) < 0.02
    random, _ = agent.act(rows, None, True, random=True)
    expected = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    assert (random.mean(0) - expected).abs().max() < 0.03
    for drawn in (action, random):
        assert all(torch.equal(p.sum(-1), torch.ones(5000)) for p in drawn.split((2, 3), -1))


def test_the_noised_action_is_the_models_input():
    """The next latents depend on the action in the state, which is the one that was played."""
    agent = make_agent()
    rows = rows_of(agent, 2)
    _, state = agent.act(rows, None, True)
    torch.manual_seed(0)
    _, after = agent.act(rows, state)
    near(
        after["deter"],
        agent.world_model.prior.core(*(state[k] for k in ("deter", "stoch", "action"))),
    )
    first = rows_of(agent, 2, is_first=True)
    _, reset = agent.act(first, state)
    near(reset["deter"], agent.act(first, None)[1]["deter"])


def test_acting_filters_like_training():
    """Row by row with `act`, or a window at once with the loss: the same deter."""
    agent, batch = make_agent(), make_batch()
    batch["is_first"][:, 1] = True
    td = with_context(batch)
    torch.manual_seed(0)
    deter, _, mean, _ = agent.model_loss.posterior(td, torch.zeros(3, 6, 4))
    state = None
    for t in range(6):
        rows = td[:, t].exclude("previous", "action")
        if state is not None:
            state["action"] = td["previous", "action"][:, t]
        _, state = agent.act(rows, state)
        near(state["deter"], deter[:, t])
        embed = agent.world_model.encoder(rows)
        near(agent.world_model.posterior(state["deter"], embed)[0], mean[:, t])
        state["stoch"] = mean[:, t]


def test_imagination_environment():
    agent, start = make_agent(pcont=True), start_of(make_agent())
    torch.manual_seed(0)
    out = agent.env.rollout(7, agent.actor.act, start, auto_reset=False)
    assert out.shape == (4, 7)
    near(out["deter"][:, 0], start["deter"])
    near(out["next", "deter"][:, :-1], out["deter"][:, 1:])
    feat = torch.cat([out["next", "stoch"], out["next", "deter"]], -1)
    near(out["next", "reward"], agent.world_model.reward(feat)[..., 0])
    near(out["next", "continue"], agent.world_model.cont(feat)[..., 0].sigmoid())
    for t in range(7):
        inputs = (out[k][:, t] for k in ("deter", "stoch", "action"))
        near(out["next", "deter"][:, t], agent.world_model.prior.core(*inputs))
    decoded = DreamerDecoder(agent.world_model)(out)
    near(decoded["next", "position"], agent.world_model.decoder(feat)["position"])


def test_open_loop_sees_the_context_only():
    agent, batch = make_agent(), make_batch(length=9)
    dream = open_loop(agent, batch.clone(), 3)
    other = batch.clone()
    other["position"][:, 4:] += 5.0  # rows 4.. of the window are imagined
    other["reward"] += 1.0
    again = open_loop(agent, other, 3)
    near(again["position"], dream["position"])
    near(again["true", "reward"], dream["true", "reward"] + 1)
    other["position"][:, 3] += 5.0
    assert not torch.equal(open_loop(agent, other, 3)["position"][:, 3:], dream["position"][:, 3:])
    batch["action"][:, 6] += 1.0  # the action after row 6 of the window [B, T + 1]
    moved = open_loop(agent, batch, 3)["position"] != dream["position"]
    assert not moved[:, :6].any() and moved[:, 6:].all()


def test_bfloat16_losses_are_near():
    torch.manual_seed(0)
    noise = {"posterior": torch.randn(3, 6, 4)}
    found = {}
    for precision in ("float32", "bfloat16"):
        agent = make_agent(precision=precision)
        noise["dream"] = TensorDict(
            action=torch.full((18, 5, 2), 0.3), stoch=torch.full((18, 5, 4), -0.2),
            batch_size=[18, 5],
        )  # fmt: skip
        found[precision] = agent.update(make_batch(), noise)
    for name, value in found["float32"].items():
        if "loss" in name:
            assert abs(found["bfloat16"][name] - value) < 0.03 * abs(value) + 0.02, name


def test_the_recurrent_state_is_float32_under_bfloat16():
    agent = make_agent(precision="bfloat16")
    prior, (deter, stoch, action) = agent.world_model.prior, torch.randn(3, 7, 12).unbind(0)
    stoch, action = stoch[:, :4], action[:, :2]
    seen, cell = [], prior.cell.forward
    prior.cell.forward = lambda x, h: seen.append((x, h)) or cell(x, h)
    with agent.autocast():
        after = prior.core(deter, stoch, action)
    ((inputs, state),) = seen
    assert after.dtype == inputs.dtype == torch.float32 and state is deter
    assert torch.equal(after, cell(inputs, deter))  # outside of autocast


def test_pictures_under_bfloat16():
    """What goes to matplotlib and into videos is float32 and uint8."""
    spec = SPEC | {"shapes": {"eye": (64, 64, 3), "place": (3,)}}
    dream = open_loop(make_agent(spec, precision="bfloat16"), make_batch(spec), 2)
    assert dream["place"].dtype == dream["reward"].dtype == torch.float32
    assert dream["eye"].dtype == torch.uint8


def test_adam_moves_between_devices():
    """A checkpoint of a GPU says capturable=True, which a CPU refuses."""
    agent = make_agent()
    agent.update(make_batch())
    state = agent.state_dict()
    for name in agent.modules:
        state[f"{name}_optimizer"]["param_groups"][0]["capturable"] = True
    other = make_agent(seed=1)
    other.load_state_dict(state)
    noise = {"posterior": torch.zeros(3, 6, 4), "dream": agent.actor_loss.draw_noise(18)}
    found = [each.update(make_batch(), noise)["train/loss_actor"] for each in (agent, other)]
    assert found[0] == found[1]
    assert not any(o.param_groups[0]["capturable"] for o in other.optimizers.values())


@pytest.mark.parametrize("spec", [SPEC, DISCRETE])
def test_compiled_update_is_the_same(spec, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(
        dreamer.torch, "compile", lambda f, **kw: compile_(f, backend="aot_eager", **kw)
    )
    agents = [make_agent(spec), make_agent(spec, compile=True)]
    for _ in range(2):
        results = []
        for agent in agents:
            torch.manual_seed(7)
            results.append(agent.update(make_batch(spec)))
        for name, value in results[0].items():
            near(results[1][name], value, 1e-4, 1e-5)
