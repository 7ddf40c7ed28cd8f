"""The world model of a saved run as a gymnasium.vector.VectorEnv, for agents of other libraries.

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
from tools import import_script

DEFAULT_SCRIPT = Path(__file__).parents[1] / "dreamer_v3.py"  # of --script


def dream_env(agent, num_envs: int = 1, *, horizon: int = 0, latent: bool = False):
    """A DreamVectorEnv for an agent that the script's `load` returned.

    An episode starts from a posterior of the run's replay (rank 0's if there were several) or, in
    pilco.py, from the start distribution. It terminates where the model predicts a probability of
    going on, or a discount, below one half (pilco.py: never). It is truncated after `horizon`
    actions (0: the run's own imagination horizon) and the next one starts in the same step. Actions
    are discrete or in [-1, 1]. Observations are decoded; with `latent` they are flat latents.

    RunError if the replay is missing.
    """
    if num_envs < 1 or horizon < 0:
        raise RunError("num_envs must be at least 1, horizon not negative")
    args = vars(agent.args)
    horizon = horizon or args.get("imagination_horizon") or args["horizon"]  # pilco.py
    if hasattr(agent, "actor"):
        env, draw, decoder = agent.env, posterior_sampler(agent), partial(decode, agent)
    else:  # pilco.py
        env, draw, decoder = pilco_dream(agent)
    return DreamVectorEnv(env, draw, decoder, agent.spec, num_envs, horizon, latent)


def posterior_sampler(agent, windows: int = 16) -> Callable[[int], TensorDict]:
    """draw(seed) -> posterior latents [K] of replayed rows, except those that end an episode."""
    folder, example = agent.folder, agent.stored_rows(example_rows(agent.spec), agent.initial(1))[0]
    if not Path(folder, "replay").is_dir():
        text = "an exported agent never had one" if agent.exported else "restore it"
        raise RunError(f"{folder} has no replay to start dreams from: {text}")
    state = checkpoint.load(folder)["replay"]
    replay = saved_replay(folder, state["layout"], example)
    replay.load_state_dict(state)
    if not len(replay):
        raise RunError(f"{folder} has only {replay.rows} rows so far: no window of {replay.length}")

    @torch.no_grad()
    def draw(seed: int) -> TensorDict:
        replay.generator.manual_seed(seed)
        with autocast(agent):
            td = agent.world_model(replay.sample(windows).to(agent.device))
        return td.select(*agent.env.shapes)[~td["is_last"]].detach()

    return draw


def saved_replay(folder, layout: dict, example: TensorDict) -> Replay:
    """The replay in a run folder, read-only and without its state: the keys that `example` has."""
    rows, slack = layout["capacity"] * layout["num_envs"], layout["allocated"] - layout["capacity"]
    args = rows, layout["num_envs"], layout["length"], Path(folder, "replay")
    return Replay(example, *args, slack=slack, readonly=True)


@torch.no_grad()
def decode(agent, latents: TensorDict) -> TensorDict:
    """Add to latents [*B] the observations and the `reward` that the model decodes from them."""
    script, model = script_of(agent), agent.world_model
    latents["reward"] = model.predict_reward(script.features(latents))
    return script.DreamerDecoder(model)(latents)


def pilco_dream(agent) -> tuple[ModelBasedEnvBase, Callable, Callable]:
    """For an agent of pilco.py: its SampledEnv, draw(seed) -> first states [K], decode(states)."""
    mean, cov = agent.start()
    std = cov[0].diagonal().sqrt()  # cov is diagonal

    def draw(seed: int) -> TensorDict:
        states = mean + std * torch.randn(1000, len(std), dtype=torch.float64)
        return TensorDict(state=states, batch_size=len(states))

    def decode(states: TensorDict) -> TensorDict:
        widths = [math.prod(agent.spec["shapes"][key]) for key in agent.keys]
        observations = states["state"].float().split(widths, -1)
        return states.update(dict(zip(agent.keys, observations, strict=True)))

    return SampledEnv(agent.world_model, agent.cost, noise=agent.args.noise), draw, decode


def load_run(run, script: Path):
    """The agent of a run folder, loaded by the script at that path; RunError if that fails.

    The user names the script: what a run folder says must not decide what is imported.
    """
    return import_script(script).load(run)


def script_of(instance):
    """The module that defines the class of `instance`: a script, or a fork with any name."""
    return sys.modules[type(instance).__module__]


def predict(x: Tensor, factors, hyper: tuple) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, E) of the GPs at deterministic inputs x (N, I): PILCO, eq. 7-8."""
    k = script_of(factors).kernel(x, factors.inputs, *hyper[:2])  # (E, N, n)
    variance = factors.variance[:, None] - ((k @ factors.inverse) * k).sum(-1)
    return (k @ factors.beta[..., None])[..., 0].mT, variance.clamp(min=0).mT


class SampledEnv(ModelBasedEnvBase):
    """Steps from a state (N, D) to a sample of the next one from the GPs' prediction.

    With noise="observed" the sample includes the GPs' observation noise. Every step draws anew, so
    a rollout does not follow one sampled function.
    """

    def __init__(self, world_model, cost, *, noise: str = "latent"):
        super().__init__(world_model, {"state": (world_model.obs_dim,)})
        self.cost, self.noise = cost, noise

    def _step(self, td: TensorDict) -> TensorDict:
        model, state = self.world_model, td["state"]
        script = script_of(model)
        inputs = script.append_sin_cos(*script.known(state), model.angles)[0][:, model.state_inputs]
        inputs = torch.cat([inputs, td["action"]], -1)
        mean, variance = predict(inputs, model.posterior, model.hyper)
        if self.noise == "observed":
            variance = variance + torch.exp(2 * model.hyper[2])
        state = state + mean + variance.sqrt() * torch.randn_like(mean)
        return TensorDict(state=state, reward=-self.cost.at(state), batch_size=td.batch_size)


class DreamVectorEnv(gymnasium.vector.VectorEnv):
    """N dreams in one world model, stepped as a batch; see `dream_env`.

    env: its step gives a `reward` (N) and may give a `continue` (N), the probability of going on;
    draw(seed): states [K] to start from; decode(states): adds the observations of spec["shapes"].
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, env: ModelBasedEnvBase, draw: Callable, decode: Callable, spec: dict,
                 num_envs: int, horizon: int, latent: bool):  # fmt: skip
        self.env, self.draw, self.decode = env, draw, decode
        self.num_envs, self.horizon, self.latent = num_envs, horizon, latent
        self.classes, self.pool, self.state = list(spec["classes"]), [], None
        self.spaces = {key: _box(shape) for key, shape in spec["shapes"].items()}
        self.spaces |= {k: _choices(sizes) for k, sizes in spec["categories"].items()}
        several = len(self.spaces) > 1
        observation = spaces.Dict(self.spaces) if several else next(iter(self.spaces.values()))
        if latent:
            with torch.random.fork_rng():
                observation = _box(self.observe(draw(0)[:1]).shape[1:])
        box = spaces.Box(-1.0, 1.0, (spec["action_dim"],))
        action = _choices(self.classes) if self.classes else box
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space = gymnasium.vector.utils.batch_space(observation, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(action, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start N new episodes: observations (N, ...), {}."""
        super().reset(seed=seed)
        if seed is not None:
            self.pool = []  # the same seed gives the same starts
        with torch.no_grad(), torch.random.fork_rng():
            self.state = self.starts(self.num_envs)
            self.elapsed = np.zeros(self.num_envs, int)
            return self.observe(self.state), {}

    def step(self, actions):
        """Actions (N, ...) -> observations, rewards (N), terminated (N), truncated (N), infos.

        Where an episode ends, the observation is the first one of the next episode, and the last
        one is in infos["final_obs"].
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
            observation, ended = self.observe(self.state), terminated | truncated
            if ended.any():
                rows = list(gymnasium.vector.utils.iterate(self.observation_space, observation))
                for i in np.flatnonzero(ended):
                    infos = self._add_info(infos, {"final_obs": rows[i], "final_info": {}}, i)
                self.state[torch.from_numpy(ended)] = self.starts(int(ended.sum()))
                self.elapsed[ended] = 0
                observation = self.observe(self.state)
        return observation, reward, terminated, truncated, infos

    def seed(self) -> int:
        return int(self.np_random.integers(2**62))

    def starts(self, count: int) -> TensorDict:
        """Take `count` states to start from; each drawn state is used once."""
        while len(self.pool) < count:
            seed = self.seed()
            torch.manual_seed(seed)
            drawn = self.draw(seed)
            drawn = drawn[torch.randperm(len(drawn))]
            self.pool = torch.cat([self.pool, drawn]) if len(self.pool) else drawn
        states, self.pool = self.pool[:count], self.pool[count:]
        return states.clone()

    def encode(self, actions) -> Tensor:
        """Actions of the action space -> (N, A) for the model: clipped, or one-hots."""
        actions, space = np.asarray(actions), self.action_space
        valid = space.contains(actions) if self.classes else np.isfinite(actions).all()
        if actions.shape != space.shape or not valid:
            raise gymnasium.error.InvalidAction(f"{actions} is not in the space {space}")
        if not self.classes:
            return torch.as_tensor(actions).to(self.state[next(iter(self.env.shapes))]).clamp(-1, 1)
        index = torch.as_tensor(actions).long().view(self.num_envs, -1)
        choices = zip(index.unbind(1), self.classes, strict=True)
        one_hots = torch.cat([F.one_hot(choice, count) for choice, count in choices], -1)
        return one_hots.float().to(self.state[next(iter(self.env.shapes))].device)

    def observe(self, states: TensorDict):
        """States [N] -> observations: an array (N, ...), or a dict if there are several."""
        if self.latent:
            latents = [states[key].flatten(1) for key in self.env.shapes]
            return torch.cat(latents, -1).float().cpu().numpy()
        decoded = self.decode(states.copy())
        arrays = {key: decoded[key].cpu().numpy() for key in self.spaces}
        for key, space in self.spaces.items():  # Discrete has no dimension
            arrays[key] = arrays[key].reshape(-1, *space.shape).astype(space.dtype)
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _choices(sizes) -> spaces.Space:
    """The space of a whole number below each of `sizes`; Discrete if there is only one."""
    return spaces.Discrete(*sizes) if len(sizes) == 1 else spaces.MultiDiscrete(sizes)


def _box(shape) -> spaces.Box:
    """The space of an image (three dimensions) or of a vector, whose predictions have no bounds."""
    if len(shape) == 3:
        return spaces.Box(0, 255, tuple(shape), np.uint8)
    return spaces.Box(-np.inf, np.inf, tuple(shape), np.float32)
