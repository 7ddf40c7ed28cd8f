"""Small gymnasium environments for the tests, with every number known."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Base(gymnasium.Env):
    """Counts: the observation is [steps since the reset, a number drawn from the seed].

    The reward of step k is k. `action` is that of the last step.
    """

    action_space = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    length, terminal = 5, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.luck, self.action, self.seed = 0, self.np_random.random(), None, seed
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        self.action = action
        over = self.count == self.length
        reward, terminal = float(self.count), self.terminal
        return self.observe(), reward, over and terminal, over and not terminal, {}

    def observe(self):
        return np.array([self.count, self.luck])


class Echo(Base):
    """Observes the action that it received, so that a test sees what the wrapper passed on."""

    length = 100

    def __init__(self, kind="box"):
        low, high = np.array([[-2.0, 0.0]] * 2), np.array([[2.0, 10.0]] * 2)
        low[1, 1], high[1, 0] = -np.inf, np.inf
        self.action_space = {
            "box": spaces.Box(low.astype(np.float32), high.astype(np.float32)),
            "whole": spaces.Box(0, 10, (4,), np.int64),
            "discrete": spaces.Discrete(3, start=1),
            "multi": spaces.MultiDiscrete([2, 3], start=[0, 5]),
            "bits": spaces.MultiBinary(3),
            "tuple": spaces.Tuple([spaces.Discrete(2)]),
        }[kind]
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def observe(self):
        observation = np.zeros(4)
        if self.action is not None:
            assert self.action_space.contains(self.action), self.action
            observation[: np.size(self.action)] = np.ravel(self.action)
        return observation


class Nested(Base):
    """A nested Dict with vectors of several types and shapes, and images."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = spaces.Dict(
        {
            "body": spaces.Dict(
                {
                    "place": spaces.Box(-9, 9, (2, 2), np.float64),
                    "alone": spaces.Box(-9, 9, (), np.int32),
                }
            ),
            "eye": spaces.Box(0, 255, (32, 48, 3), np.uint8),
            "depth": spaces.Box(0, 255, (20, 16), np.uint8),
            "bytes": spaces.Box(0, 255, (7,), np.uint8),
        }
    )

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observe(self):
        eye = np.zeros((32, 48, 3), np.uint8)
        eye[:, 24:] = (10, 20, 30)
        place, alone = np.array([[0.5, 1], [2, self.count]]), np.int32(self.count)
        depth, raw = np.full((20, 16), 7, np.uint8), np.arange(7, dtype=np.uint8)
        return {"body": {"place": place, "alone": alone}, "eye": eye, "depth": depth, "bytes": raw}

    def render(self):
        return np.full((10, 30, 3), self.count, np.uint8)


class Mission(Nested):
    """An image, and a text that no network here reads."""

    observation_space = spaces.Dict(
        {"eye": Nested.observation_space["eye"], "mission": spaces.Text(9)}
    )

    def observe(self):
        return {"eye": super().observe()["eye"], "mission": "go"}


class Slash(Base):
    """Observes a key that cannot be the name of a file."""

    observation_space = spaces.Dict({"walker/joints": Base.observation_space})

    def observe(self):
        return {"walker/joints": super().observe()}


class Latent(Nested):
    """Observes two keys that rows use for latents, one an image, and `body.state`."""

    observation_space = spaces.Dict(
        {
            "state": Base.observation_space,
            "belief": Nested.observation_space["eye"],
            "body": spaces.Dict({"state": spaces.Box(-9, 9, (), np.float64)}),
        }
    )

    def observe(self):
        image = np.full((32, 48, 3), self.count, np.uint8)
        state = np.array([self.count, self.luck])
        return {"state": state, "belief": image, "body": {"state": np.float64(-self.count)}}


class Picture(Base):
    """Observes one image."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def observe(self):
        return np.full((64, 64, 3), self.count, np.uint8)


class SameBuffer(Base):
    """Returns the same array every time."""

    def __init__(self):
        self.buffer = np.zeros(2)

    def observe(self):
        self.buffer[:] = self.count
        return self.buffer


class Worded(Base):
    """Has an observation that no network reads."""

    observation_space = spaces.Dict({"place": Base.observation_space, "order": spaces.Text(9)})


class Reserved(Base):
    """Has an observation named like a key of the rows."""

    def __init__(self, key="reward"):
        self.observation_space = spaces.Dict({key: Base.observation_space})


class ChannelsFirst(Base):
    """Has an image as PyTorch wants it."""

    observation_space = spaces.Box(0, 255, (3, 64, 64), np.uint8)


class Raises(Base):
    """Raises at the third step, or in the reset, of one episode; episodes count from 0."""

    broken = True

    def __init__(self, episode=0, in_reset=False):
        self.raises_in, self.in_reset, self.episode = episode, in_reset, -1

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        if self.broken and self.in_reset and self.episode == self.raises_in:
            raise OSError("no simulator")
        return super().reset(seed=seed)

    def step(self, action):
        if self.broken and not self.in_reset and self.episode == self.raises_in and self.count == 2:
            raise OSError("the simulator is gone")
        return super().step(action)


class NotFinite(Base):
    """One of its observations is NaN at step 3, or its reward is infinite."""

    observation_space = spaces.Dict(
        {"place": Base.observation_space, "velocity": Base.observation_space}
    )

    def __init__(self, where="velocity"):
        self.where = where

    def observe(self):
        bad = np.nan if self.where == "velocity" and self.count == 3 else 0.0
        return {"place": np.zeros(2), "velocity": np.array([0.0, bad])}

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.inf if self.where == "reward" and self.count == 3 else reward, *rest


class Random(Base):
    """Ignores its seed."""

    def observe(self):
        return np.random.default_rng().random(2)


def add(name, **kwargs):
    gymnasium.register(f"{name}-v0", f"dummy_envs:{kwargs.pop('cls', name)}", kwargs=kwargs)


class Terminal(Base):
    """Ends by itself, not by a time limit."""

    terminal = True


for kind in ("box", "whole", "discrete", "multi", "bits", "tuple"):
    add(f"Echo{kind.title()}", cls="Echo", kind=kind)
for cls in (Base, Terminal, Nested, Mission, Slash, Latent, Picture, SameBuffer, Worded, Reserved):
    add(cls.__name__)
for cls in (ChannelsFirst, Random, Raises):
    add(cls.__name__)
for key in ("action", "index", "previous", "encoded_obs", "is_first", "_episode"):
    add(f"Reserved-{key}", cls="Reserved", key=key)
add("RaisesLater", cls="Raises", episode=1)
add("RaisesInReset", cls="Raises", in_reset=True)
add("RaisesInResetLater", cls="Raises", in_reset=True, episode=1)
add("NotFinite")
add("NotFiniteReward", cls="NotFinite", where="reward")
gymnasium.register("NoModule-v0", "a_module_that_is_not_here:Env")
gymnasium.register("NoRender-v0", "dummy_envs:Base")
