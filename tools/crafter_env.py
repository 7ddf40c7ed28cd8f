"""Crafter (Hafner, 2022) as a gymnasium environment; the package is older than gymnasium.

python dreamer_v3.py --preset crafter        # env_id tools.crafter_env:crafter/Reward-v0
"""

import gymnasium
import numpy as np
from gymnasium import spaces


class Crafter(gymnasium.Env):
    """64 x 64 images, 17 actions; rewards for achievements, or always 0 if not `reward`."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, reward, render_mode=None):
        try:
            import crafter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; pip install crafter") from error

        def sorted_chunks(world):  # the package's sets have another order in every process
            return {k: sorted(v, key=lambda o: tuple(o.pos)) for k, v in world._chunks.items()}

        crafter.engine.World.chunks = property(sorted_chunks)
        self.observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = spaces.Discrete(17)
        self.inner, self.render_mode = crafter.Env(reward=reward), render_mode

    def reset(self, *, seed=None, options=None):
        self.inner._seed, self.inner._episode = seed, 0  # they seed the world
        return self.inner.reset(), {}

    def step(self, action):
        obs, reward, done, info = self.inner.step(action)
        return obs, reward, info["discount"] == 0, done and info["discount"] > 0, info

    def render(self):
        return self.inner.render()


gymnasium.register("crafter/Reward-v0", Crafter, kwargs={"reward": True})
gymnasium.register("crafter/NoReward-v0", Crafter, kwargs={"reward": False})
