"""The code blocks of TorchRL's page on model-based RL, in order, with the modules of this project.

The blocks are verbatim; only imports and the device are replaced, by IMPORTS and DEVICE. What a
block takes for granted (a batch, specs, optimizers) is made between the blocks.
"""

import ast
import re

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict

import dreamer
import dreamer_v3
import pilco
from common.envs import example_rows, make_envs
from common.replay import make_replay

IMPORTS = {
    "torchrl.modules.models.model_based": "dreamer",
    "torchrl.objectives.dreamer": "dreamer",
    "torchrl.objectives.dreamer_v3": "dreamer_v3",
    "torchrl.modules.models.gp": "pilco",
    "torchrl.objectives.pilco": "pilco",
    "torchrl.envs.model_based": {
        "ModelBasedEnvBase": "common.imagination",
        "WorldModelEnv": "common.imagination",
        "DreamerEnv": "dreamer",
        "DreamerDecoder": "dreamer",
        "ImaginedEnv": "pilco",
    },
}
DEVICE = "cpu"  # the page has cuda

RSSM = """
from torchrl.modules.models.model_based import RSSMPrior, RSSMPosterior, RSSMRollout
from tensordict.nn import TensorDictModule

# Prior: p(s_{t+1} | s_t, a_t, h_t)
rssm_prior = TensorDictModule(
    RSSMPrior(action_spec=action_spec, hidden_dim=200, rnn_hidden_dim=200, state_dim=30),
    in_keys=["state", "belief", "action"],
    out_keys=["prior_mean", "prior_std", "state", "belief"],
)

# Posterior: q(s_t | h_t, o_t)
rssm_posterior = TensorDictModule(
    RSSMPosterior(hidden_dim=200, state_dim=30),
    in_keys=["belief", "encoded_obs"],
    out_keys=["posterior_mean", "posterior_std", "state"],
)

# RSSMRollout chains prior and posterior over a time dimension
rssm_rollout = RSSMRollout(rssm_prior=rssm_prior, rssm_posterior=rssm_posterior)
"""
MODEL_LOSS = """
from torchrl.objectives.dreamer import DreamerModelLoss

world_model_loss = DreamerModelLoss(
    world_model=world_model,        # TensorDictModule wrapping encoder + RSSM + decoder
    lambda_kl=1.0,                  # weight for KL divergence term
    lambda_reco=1.0,                # weight for reconstruction term
    lambda_reward=1.0,              # weight for reward prediction term
    free_nats=3,                    # KL clamping floor (nats)
    reco_loss="l2",
    reward_loss="l2",
    delayed_clamp=False,            # clamp before (False) or after (True) averaging
)

# Forward returns (loss_td, updated_tensordict)
loss_td, _ = world_model_loss(batch)
# loss_td has keys: "loss_model_kl", "loss_model_reco", "loss_model_reward"
total_model_loss = loss_td["loss_model_kl"] + loss_td["loss_model_reco"] + loss_td["loss_model_reward"]
total_model_loss.backward()
"""  # noqa: E501
ACTOR_LOSS = """
from torchrl.objectives.dreamer import DreamerActorLoss, DreamerValueLoss
from torchrl.envs.model_based import DreamerEnv

model_env = DreamerEnv(
    world_model=world_model,
    prior_shape=(30,),
    belief_shape=(200,),
    device="cuda",
)

actor_loss = DreamerActorLoss(
    actor_model=actor,
    value_model=value_net,
    model_based_env=model_env,
    imagination_horizon=15,   # rollout length in latent space
    discount_loss=True,       # discount lambda targets by gamma^t
)

value_loss = DreamerValueLoss(
    value_model=value_net,
)
"""
V3_IMPORTS = """
from torchrl.objectives.dreamer_v3 import (
    DreamerV3ModelLoss,
    DreamerV3ActorLoss,
    DreamerV3ValueLoss,
    symlog,
    symexp,
    two_hot_encode,
    two_hot_decode,
)
"""
SYMLOG = """
import torch
from torchrl.objectives.dreamer_v3 import symlog, symexp

x = torch.tensor([-100.0, 0.0, 100.0])
compressed = symlog(x)        # sign(x) * log(|x| + 1)
restored = symexp(compressed) # inverse transform
"""
DREAMER_ENV = """
from torchrl.envs.model_based import ModelBasedEnvBase, DreamerEnv, WorldModelEnv

# DreamerEnv is pre-wired for Dreamer-style imagination
env = DreamerEnv(
    world_model=world_model,
    prior_shape=(30,),
    belief_shape=(200,),
    device="cuda",
    batch_size=[32],
)

# A rollout inside latent space — no real simulator calls
fake_data = env.rollout(
    max_steps=15,
    policy=actor,
    tensordict=initial_latent_state,
    auto_reset=False,
)
"""
GENERIC_ENV = """
from torchrl.envs.model_based import WorldModelEnv

generic_env = WorldModelEnv(
    world_model=my_world_model,
    observation_spec=obs_spec,
    action_spec=action_spec,
    reward_spec=reward_spec,
    device="cuda",
)
"""
COLLECT = """
from torchrl.collectors import Collector

collector = Collector(
    env=real_env,
    policy=actor,
    frames_per_batch=1000,
)
real_batch = next(iter(collector))
replay_buffer.extend(real_batch)
"""
TRAIN_MODEL = """
# Sample from replay buffer
batch = replay_buffer.sample(batch_size=32)

# Encode observations
encoded = obs_encoder(batch)

# Unroll RSSM over the trajectory time dimension
latent_batch = rssm_rollout(encoded)

# Compute world model losses
loss_td, _ = world_model_loss(latent_batch)
wm_optimizer.zero_grad()
(loss_td["loss_model_kl"] + loss_td["loss_model_reco"] + loss_td["loss_model_reward"]).backward()
wm_optimizer.step()
"""
TRAIN_ACTOR = """
# Start from posterior states obtained during world-model training
posterior_states = latent_batch.select("state", "belief")

# DreamerActorLoss internally rolls out imagination_horizon steps
actor_loss_td, fake_data = actor_loss(posterior_states)
value_loss_td, _ = value_loss(fake_data)

actor_optimizer.zero_grad()
actor_loss_td["loss_actor"].backward()
actor_optimizer.step()

value_optimizer.zero_grad()
value_loss_td["loss_value"].backward()
value_optimizer.step()
"""
PILCO = """
from torchrl.modules.models.gp import GPWorldModel
from torchrl.objectives.pilco import ExponentialQuadraticCost

# Requires botorch and gpytorch
gp_model = GPWorldModel(obs_dim=4, action_dim=1)
gp_model.fit(dataset)   # dataset is a TensorDict with obs/action/next_obs keys

# Smooth saturating cost for analytic policy gradients
cost = ExponentialQuadraticCost(
    target=torch.zeros(4),
    weights=torch.eye(4),
)
"""
KEY_IMPORTS = """
# Loss modules
from torchrl.objectives.dreamer import (
    DreamerModelLoss,
    DreamerActorLoss,
    DreamerValueLoss,
)
from torchrl.objectives.dreamer_v3 import (
    DreamerV3ModelLoss,
    DreamerV3ActorLoss,
    DreamerV3ValueLoss,
    symlog, symexp,
    two_hot_encode, two_hot_decode,
)
from torchrl.objectives.pilco import ExponentialQuadraticCost

# Environment API
from torchrl.envs.model_based import (
    ModelBasedEnvBase,
    DreamerEnv,
    DreamerDecoder,
    ImaginedEnv,
    WorldModelEnv,
)

# Network building blocks
from torchrl.modules.models.model_based import (
    DreamerActor,
    ObsEncoder,
    RSSMPrior,
    RSSMPosterior,
    RSSMRollout,
)
from torchrl.modules.models.gp import GPWorldModel
"""
NOT_RUN = [COLLECT]  # `envs.step` and `replay.append` take its place, see `collect`


def run(block: str, names: dict):
    """Execute a block of the page in `names`, with its imports from this project."""
    tree = ast.parse(re.sub('"cuda"', f'"{DEVICE}"', block))
    body = []
    for node in tree.body:
        source = IMPORTS.get(getattr(node, "module", None))
        if source is None:
            body.append(node)
            continue
        for alias in node.names:
            module = source if isinstance(source, str) else source[alias.name]
            body.append(ast.ImportFrom(module, [alias], 0, lineno=1, col_offset=0))
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), "the page", "exec"), names)


class Circle(gymnasium.Env):
    """A point on a circle; the action turns it, the reward is its height."""

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.angle, self.count = self.np_random.uniform(0, 6), 0
        return self.observe(), {}

    def step(self, action):
        self.angle, self.count = self.angle + 0.3 * float(action[0]), self.count + 1
        return self.observe(), float(np.sin(self.angle)), False, self.count == 40, {}

    def observe(self):
        angles = self.angle, self.angle / 2
        return np.array([f(x) for x in angles for f in (np.sin, np.cos)], np.float32)


gymnasium.register("Circle-v0", "test_page:Circle")


def collect(args, folder):
    """An agent and a replay of 300 random rows, in place of the page's Collector."""
    envs = make_envs(args)
    agent = dreamer.Agent(envs.spec, args)
    example = agent.stored_rows(example_rows(agent.spec), agent.initial(1))[0]
    replay = make_replay(args, example, folder, episodes=True)
    latent = agent.initial(1)
    for _ in range(300):
        rows = envs.step(latent["action"])
        latent = agent.act(rows, latent, random=True)
        replay.append(agent.stored_rows(rows, latent))
    envs.close()
    return agent, replay


@pytest.fixture
def names(tmp_path):
    """The names that the page takes for granted, and those that its first block makes."""
    torch.manual_seed(0)
    flags = "--preset debug --env-id test_page:Circle-v0 --num-envs 1 --action-repeat 1"
    flags += " --deter 200 --hidden 200 --stoch 30 --units 32 --batch-length 10"
    args = dreamer.parse_args(flags.split())
    agent, replay = collect(args, tmp_path)
    scope = {
        "torch": torch, "action_spec": Circle.action_space, "replay_buffer": replay,
        "world_model": agent.world_model, "actor": agent.actor, "value_net": agent.value,
        "obs_encoder": agent.world_model.encoder, "batch": replay.sample(4),
    }  # fmt: skip
    run(RSSM, scope)
    rollout = scope["rssm_rollout"]
    rollout(scope["obs_encoder"](replay.sample(2)))  # finds the width that the page leaves out
    model = scope["world_model"]
    model.prior, model.posterior, model.rollout = rollout.prior, rollout.posterior, rollout
    return scope


def test_the_rssm_of_the_page(names):
    """The wrapped modules run on a TensorDict, and the rollout is their loop."""
    latent = TensorDict(
        state=torch.zeros(3, 30), belief=torch.zeros(3, 200), action=torch.zeros(3, 1), batch_size=3
    )
    names["rssm_prior"](latent)
    assert (
        latent["prior_mean"].shape == latent["prior_std"].shape == latent["state"].shape == (3, 30)
    )
    latent["encoded_obs"] = torch.randn(3, names["world_model"].encoder.encoded_size)
    before = latent["state"].clone()
    names["rssm_posterior"](latent)
    assert latent["posterior_mean"].shape == (3, 30) and not torch.equal(latent["state"], before)
    batch = names["obs_encoder"](names["batch"]).exclude("is_first")
    noise = torch.randn(*batch.shape, 30)
    rolled = names["rssm_rollout"](batch.copy(), noise)
    state, belief = torch.zeros(4, 30), torch.zeros(4, 200)
    for t in range(batch.shape[1]):
        action = batch["previous", "action"][:, t]
        mean, std, _, belief = names["rssm_rollout"].prior(state, belief, action)
        torch.testing.assert_close(rolled["prior_mean"][:, t], mean)
        torch.testing.assert_close(rolled["prior_std"][:, t], std)
        mean, std, state = names["rssm_rollout"].posterior(
            belief, batch["encoded_obs"][:, t], noise[:, t]
        )
        torch.testing.assert_close(rolled["posterior_mean"][:, t], mean)
        torch.testing.assert_close(rolled["state"][:, t], state)
        torch.testing.assert_close(rolled["belief"][:, t], belief)


def test_without_previous_the_rollout_shifts_the_actions(names):
    """A bare TensorDict: the action of a row reaches the rows after it, not the row itself."""
    batch = names["obs_encoder"](names["batch"]).select("encoded_obs", "action")
    noise = torch.randn(*batch.shape, 30)
    rolled = names["rssm_rollout"](batch.copy(), noise)
    other = batch.copy()
    other["action"] = other["action"].clone()
    other["action"][:, 4] += 0.5
    moved = names["rssm_rollout"](other, noise)["belief"] != rolled["belief"]
    assert not moved[:, :5].any() and moved[:, 5:].any(-1).all()
    previous = torch.cat([torch.zeros(4, 1, 1), batch["action"][:, :-1]], 1)
    batch["previous"] = TensorDict(action=previous, batch_size=batch.shape)
    torch.testing.assert_close(names["rssm_rollout"](batch, noise)["belief"], rolled["belief"])


def test_the_three_phases_of_training(names):
    """Model loss, then actor and value in imagination: each moves only its own parameters."""
    run(MODEL_LOSS, names)
    assert set(names["loss_td"].keys()) == {f"loss_model_{k}" for k in ("kl", "reco", "reward")}
    assert names["total_model_loss"].isfinite() and names["loss_td"]["loss_model_kl"] >= 3
    assert all(p.grad is not None for p in names["world_model"].parameters())
    run(ACTOR_LOSS, names)
    for key, module in (("wm", "world_model"), ("actor", "actor"), ("value", "value_net")):
        names[f"{key}_optimizer"] = torch.optim.Adam(names[module].parameters(), lr=1e-2)

    def moved(block):
        modules = "world_model", "actor", "value_net"
        before = {k: [p.detach().clone() for p in names[k].parameters()] for k in modules}
        run(block, names)
        pairs = {k: zip(before[k], names[k].parameters(), strict=True) for k in modules}
        return {k for k in modules if any(not torch.equal(*pair) for pair in pairs[k])}

    losses = []
    for _ in range(12):
        assert moved(TRAIN_MODEL) == {"world_model"}
        losses.append(names["loss_td"]["loss_model_reco"].item())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses  # it learns
    assert moved(TRAIN_ACTOR) == {"actor", "value_net"}
    assert set(names["posterior_states"].keys()) == {"state", "belief"}
    assert names["fake_data"].shape == (32 * 10, 15)


def test_imagination(names):
    latent = dict(state=torch.randn(32, 30), belief=torch.randn(32, 200))
    names["initial_latent_state"] = TensorDict(latent, 32)
    run(DREAMER_ENV, names)
    data, env = names["fake_data"], names["env"]
    assert data.shape == (32, 15) and isinstance(env, names["ModelBasedEnvBase"])
    for key in ("state", "belief"):
        assert torch.equal(data[key][:, 0], latent[key])
        assert torch.equal(data[key][:, 1:], data["next", key][:, :-1])
    assert data["action"].shape == (32, 15, 1) and data["action"].abs().max() <= 1
    feat = dreamer.features(data["next"])
    torch.testing.assert_close(data["next", "reward"], names["world_model"].predict_reward(feat))
    start = env.reset()
    assert {key: (*x.shape,) for key, x in start.items()} == {
        "state": (32, 30),
        "belief": (32, 200),
    }
    assert not start["state"].any() and not start["belief"].any()


def test_a_generic_world_model(names):
    names |= {
        "obs_spec": spaces.Dict(
            {"place": spaces.Box(-9, 9, (2,)), "speed": spaces.Box(-9, 9, (2,))}
        ),
        "action_spec": spaces.Box(-1, 1, (2,)),
        "reward_spec": spaces.Box(-np.inf, np.inf, (1,)),
        "my_world_model": lambda td: TensorDict(
            place=td["place"] + td["speed"], speed=td["speed"] + td["action"], batch_size=td.shape
        ),
    }
    run(GENERIC_ENV, names)
    env = names["generic_env"]
    policy = lambda td: td.set("action", torch.ones(*td.shape, 2))  # noqa: E731
    data = env.rollout(4, policy)
    assert data.shape == (4,) and data["next", "place"][:, 0].tolist() == [0, 1, 3, 6]
    assert data["next", "reward"].shape == (4, 1) and not data["next", "done"].any()


def test_dreamer_v3_functions(names):
    run(V3_IMPORTS, names)
    run(SYMLOG, names)
    torch.testing.assert_close(names["restored"], names["x"])
    expected = torch.tensor([-1, 0, 1]) * np.log(101)
    torch.testing.assert_close(names["compressed"], expected.float())
    bins = dreamer_v3.two_hot_bins()
    code = names["two_hot_encode"](names["x"], bins)
    torch.testing.assert_close(names["two_hot_decode"](code.log(), bins), names["x"])


def test_pilco(names):
    x, u = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    after = x + 0.1 * torch.sin(x) + 0.2 * u
    names["dataset"] = TensorDict(observation=x, action=u, batch_size=20)
    names["dataset"]["next", "observation"] = after
    run(PILCO, names)
    inputs = torch.cat([x, u], -1)[:3]
    change, *_ = names["gp_model"](inputs, torch.zeros(3, 5, 5, dtype=torch.float64))
    torch.testing.assert_close(change, (after - x)[:3], atol=0.02, rtol=0)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    value, _ = names["cost"](zero, torch.zeros(1, 4, 4, dtype=torch.float64))
    assert value.item() == pytest.approx(0.0, abs=1e-6)


def test_every_import_of_the_page(names):
    run(KEY_IMPORTS, names)
    assert names["ImaginedEnv"] is pilco.ImaginedEnv and names["ObsEncoder"] is dreamer.ObsEncoder
    assert names["DreamerV3ActorLoss"] is dreamer_v3.DreamerV3ActorLoss


def test_dreamer_v3_takes_the_same_calls():
    """The page's vocabulary on the categorical modules: flat states, logits for moments."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=16, rnn_hidden_dim=32, state_dim=6, classes=5)
    prior = dreamer_v3.RSSMPrior(action_spec=spaces.Box(-1, 1, (2,)), **sizes)
    posterior = dreamer_v3.RSSMPosterior(**sizes, obs_dim=7)
    rollout = dreamer_v3.RSSMRollout(rssm_prior=prior, rssm_posterior=posterior)
    td = TensorDict(encoded_obs=torch.randn(3, 4, 7), action=torch.rand(3, 4, 2), batch_size=(3, 4))
    out = rollout(td)
    assert out["state"].shape == (3, 4, 30) and out["belief"].shape == (3, 4, 32)
    assert out["prior_logits"].shape == out["posterior_logits"].shape == (3, 4, 6, 5)
    assert torch.equal(out["state"].unflatten(-1, (6, 5)).sum(-1), torch.ones(3, 4, 6))
    actor = dreamer_v3.DreamerActor(62, spaces.Box(-1, 1, (2,)))
    latent = out.select("state", "belief")[:, 0]
    assert set(actor(latent.copy()).keys()) == {"state", "belief", "action"}


def test_the_blocks_that_do_not_run_name_the_collector():
    assert NOT_RUN == [COLLECT] and "Collector" in COLLECT and len(ast.parse(COLLECT).body) == 4
