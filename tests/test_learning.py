"""Each script learns a small task in a minute; a broken link from rows to policy prevents it."""

import json
import os

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import dreamer
import dreamer_v3
from common.envs import example_rows
from common.replay import with_previous

FLAGS = (  # of dreamer_v3.py
    "--env-id test_learning:Reach-v0 --steps 1600 --threads 1 --no-tensorboard --eval-episodes 50"
    " --num-envs 1 --action-repeat 1 --obs auto --train-ratio 32 --batch-size 16 --batch-length 8"
    " --lr 3e-3 --warmup 50 --deter 64 --hidden 32 --units 32 --stoch 4 --classes 4"
    " --imagination-horizon 5 --horizon 20 --entropy-bonus 3e-3"
    " --log-every 500 --save-every 10000"
)
DREAMER_FLAGS = (
    "--env-id test_learning:Reach-v0 --steps 2000 --threads 1 --no-tensorboard --eval-episodes 50"
    " --num-envs 1 --action-repeat 1 --prefill 200 --train-every 8 --train-steps 4 --pretrain 50"
    " --batch-size 16 --batch-length 8 --deter 64 --hidden 32 --units 32 --stoch 8"
    " --model-lr 3e-3 --actor-lr 5e-4 --value-lr 2e-3 --free-nats 0.5 --gamma 0.9"
    " --imagination-horizon 5 --expl-amount 0.2"
    " --log-every 500 --save-every 10000 --eval-every 0"
)


class Reach(gymnasium.Env):
    """Go to the goal, one of three places in a row, and stay: reward 1 per step there, 15 steps."""

    action_space = spaces.Discrete(3)  # left, stay, right
    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.place, self.goal = self.np_random.choice(3, 2, replace=False)
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        self.place = int(np.clip(self.place + action - 1, 0, 2))
        return self.observe(), float(self.place == self.goal), False, self.count == 15, {}

    def observe(self):
        return np.array([self.place, self.goal], np.float32) - 1


class Press(gymnasium.Env):
    """Press the lit one of three buttons: reward 1 if right, 15 steps, a new light after each.

    An agent whose actions are off by one row can only guess.
    """

    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.light = 0, self.np_random.integers(3)
        return np.array([self.light - 1], np.float32), {}

    def step(self, action):
        reward = float(action == self.light)
        self.count, self.light = self.count + 1, self.np_random.integers(3)
        return np.array([self.light - 1], np.float32), reward, False, self.count == 15, {}


class Dial(gymnasium.Env):
    """Turn to the light in [-1, 1]: reward 1 minus the distance, 15 steps, a new light for each."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)
    observation_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.light = 0, self.np_random.uniform(-1, 1, 1)
        return self.light.astype(np.float32), {}

    def step(self, action):
        reward = 1 - abs(action.item() - self.light.item())
        self.count, self.light = self.count + 1, self.np_random.uniform(-1, 1, 1)
        return self.light.astype(np.float32), reward, False, self.count == 15, {}


gymnasium.register("Reach-v0", "test_learning:Reach")
gymnasium.register("Dial-v0", "test_learning:Dial")
gymnasium.register("Press-v0", "test_learning:Press")


def play(policy, episodes):
    """Mean return of policy(place, goal) -> action."""
    env, total = Reach(), 0.0
    for seed in range(episodes):
        (place, goal), over = env.reset(seed=seed)[0], False
        while not over:
            (place, goal), reward, _, over, _ = env.step(policy(place, goal))
            total += reward
    return total / episodes


def train(folder, seed, script=dreamer_v3, flags=FLAGS):
    """Mean return of 50 episodes with the policy of a run."""
    script.main([*flags.split(), "--run", str(folder), "--seed", str(seed)])
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["eval/return"]


@pytest.mark.parametrize("script", [dreamer, dreamer_v3])
def test_a_world_model_learns_a_cycle_of_categories(script):
    """From ln 5 to 0 nats, and the dream goes around the circle: 0, 1, 2, 3, 4, 0, ..."""
    torch.manual_seed(0)
    spec = {"shapes": {"place": [1]}, "categories": {"place": [5]}, "action_dim": 1, "classes": []}
    agent = script.Agent(spec, script.Args(deter=32, hidden=32, units=32, stoch=8, free_nats=0.5))
    model, rows = agent.world_model, example_rows(spec).expand(10, 7)
    rows = torch.stack([agent.stored_rows(row, agent.initial(10)) for row in rows.unbind(1)], 1)
    rows["place"] = ((torch.arange(10)[:, None] + torch.arange(7)) % 5)[..., None].int()
    rows["is_first"][:, 1] = True
    batch, losses = with_previous(rows), []
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(120):
        loss, td = agent.model_loss(batch.copy())
        losses.append(loss["loss_model_reco"].item())
        optimizer.zero_grad()
        sum(loss.values()).backward()
        optimizer.step()
    assert losses[0] == pytest.approx(np.log(5), abs=0.3) and np.mean(losses[-20:]) < 0.3
    with torch.no_grad():
        latent, dreamed = td[:, -1].select("belief", "state"), []
        for _ in range(6):
            latent = agent.env.step(latent.set("action", torch.zeros(10, 1)))["next"]
            latent = latent.select("belief", "state")
            dreamed.append(script.DreamerDecoder(model)(latent.copy())["place"][:, 0])
    right = (torch.stack(dreamed, 1) - rows["place"][:, -1]) % 5 == torch.arange(1, 7) % 5
    assert right.float().mean() > 0.5  # 0.2 by chance


def test_dreamer_v3_learns(tmp_path):
    rng = np.random.default_rng(0)
    assert play(lambda *_: int(rng.integers(3)), 500) < 6
    assert all(play(lambda *_, action=action: action, 500) < 7.5 for action in range(3))
    assert play(lambda place, goal: int(np.sign(goal - place)) + 1, 500) > 14
    assert train(tmp_path / "run", seed=0) > 9


def test_dreamer_learns(tmp_path):
    assert train(tmp_path / "run", 0, dreamer, DREAMER_FLAGS) > 9


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="half a minute longer: set SLOW=1")
def test_dreamer_learns_continuous_actions(tmp_path):
    """Seeds 0-2 got 11.2, 11.3, 11.7 of 15; without seeing the light, 7.5 is the best."""
    flags = f"{DREAMER_FLAGS} --env-id test_learning:Dial-v0 --steps 1000"
    assert train(tmp_path / "run", 0, dreamer, flags) > 9


def test_dreamer_learns_what_the_action_of_each_row_does(tmp_path):
    """Seeds 0 and 1 got 14.4 and 14.1; with every action shifted by one row, 5.1 and 5.8."""
    flags = f"{DREAMER_FLAGS} --env-id test_learning:Press-v0 --steps 1000"
    assert train(tmp_path / "run", 0, dreamer, flags) > 9
