"""Environments whose transitions come from a model: step and roll out without the real world.

The data convention is TorchRL's: `step` takes a TensorDict with the state and an `action` and
returns it with the result under "next"; `rollout` stacks such steps along a new time axis after
the batch axes. The scripts derive their own environment (DreamerEnv, ImaginedEnv) from
`ModelBasedEnvBase`; `WorldModelEnv` wraps a model that is a plain callable.
"""

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn


class ModelBasedEnvBase(nn.Module):
    """Base of the imagination environments: derive, implement `_step` and, if needed, `_reset`.

    `world_model` is held, not copied: the environment and the training share its parameters.
    `state_keys` name the entries that the next step starts from.
    """

    def __init__(self, world_model: Callable, state_keys: tuple[str, ...]):
        super().__init__()
        self.world_model, self.state_keys = world_model, tuple(state_keys)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """State and `action` [*B] -> next state [*B], with `reward` and, if it can end, `done`."""
        raise NotImplementedError

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDictBase:
        if tensordict is None:
            raise ValueError(
                f"{type(self).__name__}.reset needs a TensorDict with the latent state to start "
                f"from ({', '.join(self.state_keys)}): a model has no start of its own"
            )
        return tensordict.select(*self.state_keys)

    def reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """The state to start from, [*B]; raises ValueError if it lacks a state key."""
        state = self._reset(tensordict)
        missing = [k for k in self.state_keys if k not in state.keys(True)]
        if missing:
            raise ValueError(f"the start state lacks {missing}; it has {sorted(state.keys())}")
        return state

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
        if tensordict is None and not auto_reset:
            raise ValueError("rollout with auto_reset=False needs the tensordict to start from")
        state, steps = self.reset(tensordict) if auto_reset else tensordict, []
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
        missing = [k for k in self.state_keys if k not in out.keys(True)]
        if missing:
            raise ValueError(f"the world model returned no {missing}, which the next step needs")
        zeros = torch.zeros(tensordict.batch_size, device=tensordict.device)
        predicted = {"reward": out.get("reward", zeros), "done": out.get("done", zeros.bool())}
        return TensorDict(
            {k: out[k] for k in out.keys() if k != "action"} | predicted, tensordict.batch_size
        )
