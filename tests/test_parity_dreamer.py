"""Three updates of the authors' TF2 code (danijar/dreamer at 56d4d44) against `Agent.update`.

dreamer_tf.npz holds their parameters, a batch of pixels, and what their code computed in float32
with sampling replaced by fixed rules: a latent is mean + std * 0.5 (-1)^k over its numbers k, an
action tanh(mean + std * 0.1 (-1)^k). Such noise does the same here.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DEVICE, near, replayed_update
from tensordict import TensorDict
from torch import nn

from common.replay import with_previous
from dreamer import Agent, Args, features, gaussian_kl

SPEC = {"shapes": {"image": (64, 64, 3)}, "categories": {}, "action_dim": 2, "classes": ()}
B, T, H = 3, 6, 5


@pytest.fixture(scope="module")
def reference():
    return dict(np.load(Path(__file__).with_name("dreamer_tf.npz")))


def linears(layers):
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def gates(x, axis):
    """Keras' gate order z, r, h <-> torch's r, z, n."""
    update, reset, new = np.split(x, 3, axis)
    return np.concatenate([reset, update, new], axis)


def parameters(agent, values):
    """[(authors' name, our tensor, the authors' values in our layout)]."""
    model, triples = agent.world_model, []

    def add(name, tensor, change=lambda x: x):
        triples.append((name, tensor, torch.from_numpy(np.ascontiguousarray(change(values[name])))))

    def dense(name, layer, change=lambda x: x):
        add(f"{name}/kernel", layer.weight, lambda x: change(x).T)
        add(f"{name}/bias", layer.bias)

    def conv(name, layer):  # [h, w, in, out] -> [out, in, h, w], transposed ones in <-> out
        add(f"{name}/kernel", layer.weight, lambda x: x.transpose(3, 2, 0, 1))
        add(f"{name}/bias", layer.bias)

    def tokens(x):  # rows: belief, then the embedding flattened as [h, w, c]; ours as [c, h, w]
        embed = x[16:].reshape(2, 2, 16, -1).transpose(2, 0, 1, 3).reshape(64, -1)
        return np.concatenate([x[:16], embed])

    for i, layer in enumerate(model.encoder.convs[::2]):
        conv(f"encode/h{i + 1}", layer)
    dense("decode/h1", model.decoder.inputs)
    for i, layer in enumerate(model.decoder.deconvs[::2]):
        conv(f"decode/h{i + 2}", layer)
    dense("dynamics/img1", model.prior.inputs[0])
    dense("dynamics/img2", model.prior.head[0])
    dense("dynamics/img3", model.prior.head[2])
    dense("dynamics/obs1", model.posterior.head[0], tokens)
    dense("dynamics/obs2", model.posterior.head[2])
    cell = model.prior.cell
    add("dynamics/gru/kernel", cell.weight_ih, lambda x: gates(x, 1).T)
    add("dynamics/gru/recurrent_kernel", cell.weight_hh, lambda x: gates(x, 1).T)
    add("dynamics/gru/bias", cell.bias_ih, lambda x: gates(x, 1)[0])
    add("dynamics/gru/bias", cell.bias_hh, lambda x: gates(x, 1)[1])
    for name, layers in (
        ("reward", model.reward),
        ("value", agent.value),
        ("actor", agent.actor.mlp),
    ):
        *hidden, last = linears(layers)
        for i, layer in enumerate(hidden):
            dense(f"{name}/h{i}", layer)
        dense(f"{name}/hout", last)
    return triples


def params_at(reference, step):
    return {k.split("/", 1)[1]: v for k, v in reference.items() if k.startswith(f"params{step}/")}


def authors_agent(reference):
    args = Args(
        deter=16, hidden=16, stoch=6, units=20, depth=2, imagination_horizon=H, free_nats=0.5,
        precision="float32",
    )  # fmt: skip
    agent = Agent(SPEC, args, DEVICE)
    pairs = parameters(agent, params_at(reference, 0))
    assert {name for name, *_ in pairs} == set(params_at(reference, 0))
    ours = {id(p) for module in agent.modules.values() for p in module.parameters()}
    assert {id(tensor) for _, tensor, _ in pairs} == ours
    for name, tensor, value in pairs:
        assert tensor.shape == value.shape, name
        tensor.data.copy_(value)
    return agent


def make_batch(reference):
    """[3, 6] rows of the authors, each with the action that led to it."""
    image, reward, action = (
        torch.from_numpy(reference[f"batch/{k}"]) for k in ("image", "reward", "action")
    )
    td = TensorDict(batch_size=[B, T + 1])
    td["image"] = torch.cat([image[:, :1], image], 1)
    td["reward"] = torch.cat([reward[:, :1] * np.nan, reward], 1)
    td["action"] = torch.cat([action, action[:, :1] * np.nan], 1)
    for key in ("is_first", "is_last", "is_terminal"):
        td[key] = torch.zeros(B, T + 1, dtype=torch.bool)
    return with_previous(td).to(DEVICE)


def alternating(scale, *shape):
    sign = torch.ones(shape, device=DEVICE)
    sign[..., 1::2] = -1
    return scale * sign


def make_noise():
    dream = TensorDict(
        action=alternating(0.1, B * T, H, 2), state=alternating(0.5, B * T, H, 6),
        batch_size=[B * T, H],
    )  # fmt: skip
    return {"posterior": alternating(0.5, B, T, 6), "dream": dream}


@pytest.fixture(scope="module")
def forward(reference):
    agent, noise = authors_agent(reference), make_noise()
    losses, td = agent.model_loss(make_batch(reference), noise["posterior"])
    actor_losses, dream = agent.actor_loss(td.select("belief", "state").flatten(), noise["dream"])
    losses.update(actor_losses).update(agent.value_loss(dream)[0])
    return agent, losses, td, dream


def test_embedding_and_latents(reference, forward):
    agent, _, td, _ = forward
    embed = (
        agent.world_model.encoder.embed(td)
        .unflatten(-1, (16, 2, 2))
        .permute(0, 1, 3, 4, 2)
        .flatten(2)
    )
    near(embed, reference["out/embed"])
    for name in ("mean", "std"):
        near(td[f"posterior_{name}"], reference[f"out/post/{name}"])
        near(td[f"prior_{name}"], reference[f"out/prior/{name}"])
    near(td["state"], reference["out/post/stoch"])
    near(td["belief"], reference["out/post/deter"])
    near(td["belief"], reference["out/prior/deter"])


def test_predictions_and_likelihoods(reference, forward):
    agent, losses, td, _ = forward
    feat = features(td)
    moments = (td[k] for k in ("posterior_mean", "posterior_std", "prior_mean", "prior_std"))
    near(gaussian_kl(*moments), reference["out/kl"])
    near(agent.world_model.predict_reward(feat), reference["out/reward_mean"])
    image = agent.world_model.decoder(feat)["image"]
    near(image.sum((-3, -2, -1)), reference["out/image_mean_sum"], 1e-5, 1e-3)
    near(-losses["loss_model_reco"], reference["out/like_image"])
    near(-losses["loss_model_reward"], reference["out/like_reward"])


def test_dreams_and_returns(reference, forward):
    dream = forward[3]
    for ours, theirs in (("feat", "feat"), ("reward", "reward"), ("value", "value")):
        near(dream[ours].transpose(0, 1), reference[f"out/imag_{theirs}"])
    near(dream["continue"].T, reference["out/imag_pcont"])
    near(dream["lambda_target"][:, :-1].T, reference["out/returns"])
    near(dream["weight"][:, :-1].T, reference["out/discount"])
    assert not dream["lambda_target"][:, -1].any() and not dream["weight"][:, -1].any()


def test_losses(reference, forward):
    losses = forward[1]
    model = sum(value for name, value in losses.items() if "model" in name)
    near(model, reference["step1/model_loss"])
    near(losses["loss_actor"], reference["step1/actor_loss"])
    near(losses["loss_value"], reference["step1/value_loss"])


@pytest.mark.filterwarnings("ignore:This module is instantiated on a machine without CUDA")
@pytest.mark.parametrize("update", [Agent.update, replayed_update], ids=["eager", "graph"])
def test_three_updates(reference, update):
    agent, batch, noise = authors_agent(reference), make_batch(reference), make_noise()
    for step in (1, 2, 3):
        for optimizer in agent.optimizers.values():  # TensorFlow adds eps before correcting
            optimizer.param_groups[0]["eps"] = 1e-7 / (1 - 0.999**step) ** 0.5
        metrics = update(agent, batch.clone(), noise)
        model = sum(value for name, value in metrics.items() if "loss_model" in name)
        losses = {
            "model": model,
            "actor": metrics["train/loss_actor"],
            "value": metrics["train/loss_value"],
        }
        for name, loss in losses.items():
            near(loss, reference[f"step{step}/{name}_loss"], 1e-5)
            ours = metrics[f"train/grad_norm_{'world_model' if name == 'model' else name}"]
            near(ours, reference[f"step{step}/{name}_grad_norm"], 1e-5)
        if step != 2:
            start = params_at(reference, 0)
            for (name, tensor, value), (_, _, old) in zip(
                parameters(agent, params_at(reference, step)), parameters(agent, start), strict=True
            ):
                near(tensor, value, 1e-5, 1e-6)
                assert (value != old).any(), name
