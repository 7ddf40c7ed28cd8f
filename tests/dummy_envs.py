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
            "unlimited": spaces.Box(
                np.array([-1e10, -np.finfo(np.float32).max, 0.5, -9e5], np.float32),
                np.array([1e10, np.finfo(np.float32).max, 1e6, 9e5], np.float32),
            ),
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


class Picture(Base):
    """Observes one image."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def observe(self):
        return np.full((64, 64, 3), self.count, np.uint8)


class Film(Base):
    """Renders `frames`, or raises them, one a step; its constructor takes no render_mode."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    frames = (np.full((8, 12, 3), 9, np.uint8), OSError("the graphics are gone"))
    length = 20

    def render(self):
        frame = self.frames[self.count % len(self.frames)]
        if isinstance(frame, Exception):
            raise frame
        return frame


class Bug(Base):
    """Cannot be made, because of a mistake of its author's."""

    def __init__(self):
        self.turn = self.angle


class SameBuffer(Base):
    """Returns the same array every time."""

    def __init__(self):
        self.buffer = np.zeros(2)

    def observe(self):
        self.buffer[:] = self.count
        return self.buffer


class Varying(Base):
    """Has an observation whose size is not fixed."""

    observation_space = spaces.Dict(
        {"place": Base.observation_space, "seen": spaces.Sequence(Base.observation_space)}
    )


class Categories(Base):
    """Categories of every kind, nested; a text in a Tuple does not change the others' keys."""

    observation_space = spaces.Tuple(
        [
            spaces.Text(9),
            spaces.Discrete(4, start=-1),
            spaces.Dict({"bits": spaces.Tuple([spaces.MultiBinary((2, 2))])}),
            spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [0, -2]]),
        ]
    )

    def observe(self):
        bits = np.array([[0, 1], [1, self.count % 2]], np.int8)
        board = np.array([[1, 3], [self.count % 4, -2]])
        return "go", self.count % 4 - 1, {"bits": (bits,)}, board


class MissionSpace(spaces.Space):
    """As MiniGrid has it."""

    def __init__(self):
        super().__init__(dtype=str)


class Grid(Base):
    """Observes what MiniGrid's environments do."""

    observation_space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "direction": spaces.Discrete(4),
            "mission": MissionSpace(),
        }
    )

    def observe(self):
        image = np.full((7, 7, 3), self.count, np.uint8)
        return {"image": image, "direction": np.int64(3), "mission": "get to the green goal"}


class Given(Base):
    """Declares this space, and gives these values one after the other."""

    def __init__(self, space, values):
        self.observation_space, self.values = space, values

    def observe(self):
        return self.values[self.count]


class OldStep(Base):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or truncated, info


class OldReset(Base):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class OldSeed(Base):
    def reset(self):
        return super().reset()


class RewardArray(Base):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


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


for kind in ("box", "whole", "unlimited", "discrete", "multi", "bits", "tuple"):
    add(f"Echo{kind.title()}", cls="Echo", kind=kind)
for cls in (Base, Terminal, Nested, Mission, Slash, Picture, SameBuffer, Varying, Random, Raises):
    add(cls.__name__)
for cls in (Categories, Grid, OldStep, OldReset, OldSeed, RewardArray, Film, Bug):
    add(cls.__name__)
picture = Picture.observation_space
add("FloatPicture", cls="Given", space=picture, values=[np.zeros((64, 64, 3), np.float32)])
gymnasium.register("OldStepLimit-v0", "dummy_envs:OldStep", max_episode_steps=9)
add("RaisesLater", cls="Raises", episode=1)
add("RaisesInReset", cls="Raises", in_reset=True)
add("RaisesInResetLater", cls="Raises", in_reset=True, episode=1)
add("NotFinite")
add("NotFiniteReward", cls="NotFinite", where="reward")
gymnasium.register("NoModule-v0", "a_module_that_is_not_here:Env")
gymnasium.register("NoRender-v0", "dummy_envs:Base")
