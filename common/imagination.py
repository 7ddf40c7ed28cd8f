"""Environments whose transitions come from a model: step and roll out without the real world.

The data convention is TorchRL's: `step` takes a TensorDict with the state and an `action` and
returns it with the result under "next"; `rollout` stacks such steps along a new time axis after
the batch axes. The scripts derive their own environment (DreamerEnv, ImaginedEnv) from
`ModelBasedEnvBase`; `WorldModelEnv` wraps a model that is a plain callable. `dream_env` gives the
world model of a saved run to agents from elsewhere.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torch.nn import functional as F

from common.checkpoint import RunError


class ModelBasedEnvBase(nn.Module):
    """Base of the imagination environments: derive and implement `_step`.

    `world_model` is held, not copied: the environment and the training share its parameters.
    `state_keys` name the entries that the next step starts from.
    """

    def __init__(self, world_model: Callable, state_keys: tuple[str, ...]):
        super().__init__()
        self.world_model, self.state_keys = world_model, tuple(state_keys)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """State and `action` [*B] -> next state [*B], with `reward` and, if it can end, `done`."""
        raise NotImplementedError

    def reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """The state to start from, [*B]; raises ValueError if it lacks a state key."""
        given = [] if tensordict is None else tensordict.keys(True)
        if missing := [k for k in self.state_keys if k not in given]:
            text = "needs a TensorDict to start from, a model has no start of its own: it lacks"
            raise ValueError(f"{type(self).__name__} {text} {missing}")
        return tensordict.select(*self.state_keys)

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """State and `action` [*B] -> the same with the outcome under "next"."""
        if "action" not in tensordict.keys():
            raise ValueError(f"step needs an 'action'; it got {sorted(tensordict.keys())}")
        return tensordict.copy().set("next", self._step(tensordict))

    def rollout(
        self,
        max_steps: int,
        policy: Callable[[TensorDictBase], TensorDictBase],
        tensordict: TensorDictBase | None = None,
        auto_reset: bool = True,
    ) -> TensorDictBase:
        """`max_steps` imagined steps -> [*B, max_steps] with state, `action` and "next".

        `policy` takes the state and returns it with an `action`. With `auto_reset=False`,
        `tensordict` is used as it is, as the first state; otherwise it goes through `reset`.
        Stops early only if the model says `done` in every element of the batch.
        """
        given = tensordict is not None and not auto_reset
        state, steps = tensordict if given else self.reset(tensordict), []
        for _ in range(max_steps):
            step = self.step(policy(state.copy()))
            steps.append(step)
            state = step["next"].select(*self.state_keys)
            done = step.get(("next", "done"), None)
            if done is not None and done.all():
                break
        return torch.stack(steps, dim=len(state.batch_size))


class WorldModelEnv(ModelBasedEnvBase):
    """Wraps any callable `world_model(tensordict) -> tensordict` as an environment.

    It is called with the state and the `action`, and returns the next state and what else it
    predicts; a missing `reward` becomes 0 and a missing `done` False, both of shape [*B].
    """

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = self.world_model(tensordict.copy())
        if missing := [k for k in self.state_keys if k not in out.keys(True)]:
            raise ValueError(f"the world model returned no {missing}, which the next step needs")
        zeros = torch.zeros(tensordict.batch_size, device=tensordict.device)
        predicted = {"reward": out.get("reward", zeros), "done": out.get("done", zeros.bool())}
        return TensorDict(out.exclude("action"), tensordict.batch_size).update(predicted)


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
            self.state = after.select(*self.env.state_keys)
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
            return torch.as_tensor(actions).to(self.state[self.env.state_keys[0]]).clamp(-1, 1)
        index = torch.as_tensor(actions).long().view(self.num_envs, -1)
        parts = zip(index.unbind(1), self.classes, strict=True)
        hots = torch.cat([F.one_hot(part, size) for part, size in parts], -1)
        return hots.float().to(self.state.device)

    def observe(self, states: TensorDict):
        """States [N] -> what the observation space says: an array (N, ...) or a dict of them."""
        if self.latent:  # side by side
            parts = [states[key].flatten(1) for key in self.env.state_keys]
            return torch.cat(parts, -1).float().cpu().numpy()
        decoded = self.decode(states.copy())
        arrays = {key: decoded[key].cpu().numpy() for key in self.shapes}
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _box(shape) -> spaces.Box:
    """Three dimensions are an image; predicted vectors have no bounds."""
    if len(shape) == 3:
        return spaces.Box(0, 255, tuple(shape), np.uint8)
    return spaces.Box(-np.inf, np.inf, tuple(shape), np.float32)


def dream_env(run, num_envs: int = 1, *, horizon: int = 0, latent: bool = False, **options):
    """The world model of the run in that folder as a gymnasium.vector.VectorEnv.

    An episode starts from a posterior of the run's replay (dreamer.py, dreamer_v3.py; of several
    ranks: the first one's) or from the run's start distribution (pilco.py); it terminates where the
    model gives what follows a probability, or discount, below one half, and is truncated after
    `horizon` actions (0: the length that the run itself dreams). Actions are Boxes in [-1, 1], or
    discrete. Observations are decoded, or with `latent` the state itself, flat. An ended episode is
    replaced in the same step.
    `options` go to the script's `load` (of the Dreamers: device="cuda").

    RunError where the run, its script, its checkpoint or its replay is missing.
    """
    path = Path(run, "args.json")
    if not path.is_file():
        raise RunError(f"{run} is not a run folder: it has no args.json")
    if num_envs < 1 or horizon < 0:
        raise RunError("num_envs must be at least 1, horizon not negative")
    try:
        load = importlib.import_module(json.loads(path.read_text())["script"]).load
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise RunError(f"{path} names no script that can be imported here: {error!r}") from error
    with torch.random.fork_rng():  # it draws the networks before it reads them
        agent = load(run, **options)
    env, draw = agent.dreams(run)
    own = vars(agent.args).get("imagination_horizon") or agent.args.horizon  # of pilco.py
    return DreamVectorEnv(env, draw, agent.decode, agent.spec, num_envs, horizon or own, latent)
