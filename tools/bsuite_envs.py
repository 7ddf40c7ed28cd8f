"""Five experiments of bsuite (Osband et al., 2020) as gymnasium environments.

    pip install bsuite==0.3.6
    python dreamer_v3.py --env-id tools.bsuite_envs:bsuite/catch-0 --action-repeat 1 --steps 100000

The number is the configuration in bsuite's own sweep: 0 to 19, in memory_len and umbrella_length to
22. bsuite plays 10,000 episodes (discounting_chain: 1,000); here each reset is a step, too. So the
steps are 20,000 (bandit), 100,000 (catch), 101,000 (discounting_chain), 10,000 (length + 1)
(umbrella_length) and 10,000 (length + 2) (memory_len). tools/bsuite_score.py scores finished runs.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

try:
    import bsuite
    from bsuite import sweep
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pip install bsuite==0.3.6") from error

EXPERIMENTS = "bandit", "catch", "discounting_chain", "memory_len", "umbrella_length"


class Bsuite(gymnasium.Env):
    """One bsuite id, such as catch/0: a vector or matrix of float32 observed, discrete actions."""

    def __init__(self, bsuite_id):
        self.inner = bsuite.load_from_id(bsuite_id)
        shape = self.inner.observation_spec().shape
        self.observation_space = spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = spaces.Discrete(self.inner.action_spec().num_values)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # Episodes draw from it; a bandit's or a chain's rewards are fixed by its configuration.
        self.inner._rng = np.random.RandomState(self.np_random.integers(2**32))
        return self.inner.reset().observation.astype(np.float32), {}

    def step(self, action):
        step = self.inner.step(int(action))
        ended = step.last()  # every end is one of the task's, with discount 0
        return step.observation.astype(np.float32), float(step.reward), ended, False, {}


for name in sweep.SWEEP:
    if name.split("/")[0] in EXPERIMENTS:
        gymnasium.register(f"bsuite/{name.replace('/', '-')}", Bsuite, kwargs={"bsuite_id": name})
