"""The world model of a saved run as a gymnasium.vector.VectorEnv, for agents from elsewhere.

from dreamer_v3 import load
envs = dream_env(load("runs/dreamer_v3/Pendulum-v1/seed0"), num_envs=16)
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from common import checkpoint
from common.checkpoint import RunError
from common.envs import example_rows
from common.imagination import ModelBasedEnvBase
from common.replay import Replay
from common.run import autocast


def dream_env(agent, num_envs: int = 1, *, horizon: int = 0, latent: bool = False):
    """A DreamVectorEnv of the agent that the script's `load` returned.

    An episode starts from a posterior of the run's replay (dreamer.py, dreamer_v3.py; of several
    ranks: the first one's) or from the run's start distribution (pilco.py); it terminates where the
    model gives what follows a probability, or discount, below one half, and is truncated after
    `horizon` actions (0: the length that the run itself dreams). Actions are Boxes in [-1, 1], or
    discrete. Observations are decoded, or with `latent` the state itself, flat. An ended episode is
    replaced in the same step.

    RunError where the replay is missing.
    """
    if num_envs < 1 or horizon < 0:
        raise RunError("num_envs must be at least 1, horizon not negative")
    args = vars(agent.args)
    horizon = horizon or args.get("imagination_horizon") or args["horizon"]  # of pilco.py
    if hasattr(agent, "actor"):
        parts = agent.env, posteriors(agent), partial(decode, agent)
    else:  # of pilco.py: a belief, to draw states from
        parts = gaussian_dreams(agent)
    return DreamVectorEnv(*parts, agent.spec, num_envs, horizon, latent)


def posteriors(agent, windows: int = 16) -> Callable[[int], TensorDict]:
    """draw(seed) -> latents [K] of rows of the run's replay, except the last ones of episodes."""
    folder, example = agent.folder, agent.row(example_rows(agent.spec), agent.initial(1))[0]
    state = checkpoint.load(folder)["replay"]
    if not Path(folder, "replay").is_dir():
        raise RunError(f"{folder}/replay is gone: put it back")
    layout = state["layout"]
    rows, slack = layout["capacity"] * layout["num_envs"], layout["allocated"] - layout["capacity"]
    shape = rows, layout["num_envs"], layout["length"], Path(folder, "replay")
    replay = Replay(example, *shape, slack=slack)
    replay.load_state_dict(state)
    if not len(replay):
        raise RunError(f"{folder} has only {replay.rows} rows, no window of {replay.length} so far")

    @torch.no_grad()
    def draw(seed: int) -> TensorDict:
        replay.generator.manual_seed(seed)
        with autocast(agent):
            td = agent.world_model(replay.sample(windows).to(agent.device))
        return td.select(*agent.env.shapes)[~td["is_last"]].detach()

    return draw


@torch.no_grad()
def decode(agent, latents: TensorDict) -> TensorDict:
    """Latents [*B] -> with the observations and the `reward` that the model sees in them."""
    script, model = script_of(agent), agent.world_model
    latents["reward"] = model.predict_reward(script.features(latents))
    return script.DreamerDecoder(model)(latents)


def gaussian_dreams(agent) -> tuple[ModelBasedEnvBase, Callable, Callable]:
    """Of an agent of pilco.py: what steps, draw(seed) -> first states [K], decode(states)."""
    mean, cov = agent.start()
    root = cov[0].diagonal().sqrt()  # independent numbers

    def draw(seed: int) -> TensorDict:
        states = mean + root * torch.randn(1000, len(root), dtype=torch.float64)
        return TensorDict(state=states, batch_size=len(states))

    def decode(states: TensorDict) -> TensorDict:
        widths = [math.prod(agent.spec["shapes"][key]) for key in agent.keys]
        parts = states["state"].float().split(widths, -1)
        return states.update(dict(zip(agent.keys, parts, strict=True)))

    return SampledEnv(agent.world_model, agent.cost, noise=agent.args.noise), draw, decode


def script_of(thing):
    """The module that a part of an agent comes from: pilco.py, or a fork under any name."""
    return sys.modules[type(thing).__module__]


def prediction(x: Tensor, f, hyper: tuple) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, E) of GPs at inputs that are known, x (N, I): PILCO's eq. 7-8."""
    k = script_of(f).kernel(x, f.inputs, *hyper[:2])  # (E, N, n)
    variance = f.variance[:, None] - ((k @ f.inverse) * k).sum(-1)
    return (k @ f.beta[..., None])[..., 0].mT, variance.clamp(min=0).mT


class SampledEnv(ModelBasedEnvBase):
    """Steps from a state (N, D) that is known to a sample of what the GPs predict.

    With noise="observed" the sample has the GPs' noise as well. Every step is drawn anew, so a
    rollout does not follow one function.
    """

    def __init__(self, world_model, cost, *, noise: str = "latent"):
        super().__init__(world_model, {"state": (world_model.obs_dim,)})
        self.cost, self.noise = cost, noise

    def _step(self, td: TensorDict) -> TensorDict:
        model, state = self.world_model, td["state"]
        script = script_of(model)
        inputs = script.with_angles(*script.certain(state), model.angles)[0][:, model.features]
        inputs = torch.cat([inputs, td["action"]], -1)
        mean, variance = prediction(inputs, model.factors, model.hyper)
        if self.noise == "observed":
            variance = variance + torch.exp(2 * model.hyper[2])
        state = state + mean + variance.sqrt() * torch.randn_like(mean)
        return TensorDict(state=state, reward=-self.cost.of(state), batch_size=td.batch_size)


class DreamVectorEnv(gymnasium.vector.VectorEnv):
    """N copies of a world model that are stepped as one batch; see `dream_env`.

    env: a ModelBasedEnvBase, whose step gives a `reward` (N) and may give `continue` (N);
    draw(seed): states [K] to start from; decode(states): adds the observations of `shapes`.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, env: ModelBasedEnvBase, draw: Callable, decode: Callable, spec: dict,
                 num_envs: int, horizon: int, latent: bool):  # fmt: skip
        self.env, self.draw, self.decode, self.shapes = env, draw, decode, spec["shapes"]
        self.num_envs, self.horizon, self.latent = num_envs, horizon, latent
        self.classes, self.pool, self.state = list(spec["classes"]), [], None
        boxes = {key: _box(shape) for key, shape in self.shapes.items()}
        single = next(iter(boxes.values())) if len(boxes) == 1 else spaces.Dict(boxes)
        if latent:
            with torch.random.fork_rng():
                single = _box(self.observe(draw(0)[:1]).shape[1:])
        action = spaces.Box(-1.0, 1.0, (spec["action_dim"],))
        if self.classes:
            many = len(self.classes) > 1
            action = spaces.MultiDiscrete(self.classes) if many else spaces.Discrete(*self.classes)
        self.single_observation_space, self.single_action_space = single, action
        self.observation_space = gymnasium.vector.utils.batch_space(single, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(action, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """New starts for all: observations (N, ...), {}."""
        super().reset(seed=seed)
        if seed is not None:
            self.pool = []  # the same seed, the same starts
        with torch.no_grad(), torch.random.fork_rng():
            self.state = self.starts(self.num_envs)
            self.elapsed = np.zeros(self.num_envs, int)
            return self.observe(self.state), {}

    def step(self, actions):
        """Actions (N, ...) -> observations, rewards (N), terminated (N), truncated (N), infos.

        Where an episode ends, the observation is the next one's first; infos["final_obs"] has
        this one's last.
        """
        if self.state is None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed())
            after = self.env.step(self.state.copy().set("action", self.encode(actions)))["next"]
            reward = after["reward"].double().cpu().numpy()
            goes_on = after["continue"] if "continue" in after.keys() else torch.ones(len(after))
            terminated = (goes_on < 0.5).cpu().numpy()
            self.elapsed += 1
            truncated, infos = self.elapsed >= self.horizon, {}
            self.state = after.select(*self.env.shapes)
            observation, over = self.observe(self.state), terminated | truncated
            if over.any():
                rows = list(gymnasium.vector.utils.iterate(self.observation_space, observation))
                for i in np.flatnonzero(over):
                    infos = self._add_info(infos, {"final_obs": rows[i], "final_info": {}}, i)
                self.state[torch.from_numpy(over)] = self.starts(int(over.sum()))
                self.elapsed[over] = 0
                observation = self.observe(self.state)
        return observation, reward, terminated, truncated, infos

    def seed(self) -> int:
        return int(self.np_random.integers(2**62))

    def starts(self, count: int) -> TensorDict:
        """The next states [count] of those drawn, each used once."""
        while len(self.pool) < count:
            seed = self.seed()
            torch.manual_seed(seed)
            drawn = self.draw(seed)
            drawn = drawn[torch.randperm(len(drawn))]
            self.pool = torch.cat([self.pool, drawn]) if len(self.pool) else drawn
        taken, self.pool = self.pool[:count], self.pool[count:]
        return taken.clone()

    def encode(self, actions) -> torch.Tensor:
        """Actions of the space -> (N, A) as the model knows them: clipped, or one-hots."""
        actions, space = np.asarray(actions), self.action_space
        known = space.contains(actions) if self.classes else np.isfinite(actions).all()
        if actions.shape != space.shape or not known:
            raise gymnasium.error.InvalidAction(f"{actions} is not of the space {space}")
        if not self.classes:
            return torch.as_tensor(actions).to(self.state[next(iter(self.env.shapes))]).clamp(-1, 1)
        index = torch.as_tensor(actions).long().view(self.num_envs, -1)
        parts = zip(index.unbind(1), self.classes, strict=True)
        hots = torch.cat([F.one_hot(part, size) for part, size in parts], -1)
        return hots.float().to(self.state[next(iter(self.env.shapes))].device)

    def observe(self, states: TensorDict):
        """States [N] -> what the observation space says: an array (N, ...) or a dict of them."""
        if self.latent:  # side by side
            parts = [states[key].flatten(1) for key in self.env.shapes]
            return torch.cat(parts, -1).float().cpu().numpy()
        decoded = self.decode(states.copy())
        arrays = {key: decoded[key].cpu().numpy() for key in self.shapes}
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _box(shape) -> spaces.Box:
    """Three dimensions are an image; predicted vectors have no bounds."""
    if len(shape) == 3:
        return spaces.Box(0, 255, tuple(shape), np.uint8)
    return spaces.Box(-np.inf, np.inf, tuple(shape), np.float32)
