"""Environments whose transitions come from a model: step and roll out without the real world.

The data convention is TorchRL's: `step` takes a TensorDict with the state and an `action` and
returns it with the result under "next"; `rollout` stacks such steps along a new time axis after
the batch axes. The scripts derive their own environment (DreamerEnv, ImaginedEnv) from
`ModelBasedEnvBase`; `WorldModelEnv` wraps a model that is a plain callable.
"""

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn


def spec_shapes(spec, name: str) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a spec: a width, a shape, anything with a shape, or a flat dict of these.

    A spec that is not a dict describes the entry `name`.
    """
    entries = getattr(spec, "spaces", spec)  # of a gymnasium Dict
    if isinstance(entries, Mapping | TensorDictBase):
        return {key: spec_shapes(part, key)[key] for key, part in entries.items()}
    shape = getattr(spec, "shape", spec)
    return {name: (shape,) if isinstance(shape, int) else tuple(shape)}


class ModelBasedEnvBase(nn.Module):
    """Base of the imagination environments: derive and implement `_step`.

    `world_model` is held, not copied: the environment and the training share its parameters.
    `shapes` {key: shape} are the entries of the state, without the batch dimensions.
    """

    dtype = torch.float32  # of the state that `reset` makes

    def __init__(self, world_model: Callable, shapes: Mapping, device=None, batch_size=()):
        super().__init__()
        self.world_model, self.shapes = world_model, dict(shapes)
        self.device, self.batch_size = device, torch.Size(batch_size)
        if isinstance(world_model, nn.Module) and device is not None:
            world_model.to(device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """State and `action` [*B] -> next state [*B], with `reward` and, if it can end, `done`."""
        raise NotImplementedError

    def reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """The first state [*B]: the one in `tensordict`, or zeros [*batch_size].

        Raises ValueError if `tensordict` lacks a part of the state.
        """
        if tensordict is None:
            size, options = self.batch_size, dict(device=self.device, dtype=self.dtype)
            zeros = {k: torch.zeros(*size, *s, **options) for k, s in self.shapes.items()}
            return TensorDict(zeros, size)
        if missing := [key for key in self.shapes if key not in tensordict.keys(True)]:
            raise ValueError(f"{type(self).__name__} cannot start: the TensorDict lacks {missing}")
        return tensordict.select(*self.shapes)

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
            state = step["next"].select(*self.shapes)
            done = step.get(("next", "done"), None)
            if done is not None and done.all():
                break
        return torch.stack(steps, dim=len(state.batch_size))


class WorldModelEnv(ModelBasedEnvBase):
    """Wraps any callable `world_model(tensordict) -> tensordict` as an environment.

    It is called with the state and the `action`; it returns the next state and anything else it
    predicts. A missing `reward` or `done` becomes zeros. For the specs see `spec_shapes`: the
    entries of `observation_spec` are the state; `action_spec` is kept for policies.
    """

    def __init__(self, world_model: Callable, observation_spec, action_spec=None, reward_spec=(),
                 device=None, batch_size=()):  # fmt: skip
        state = spec_shapes(observation_spec, "observation")
        super().__init__(world_model, state, device, batch_size)
        self.action_spec = action_spec
        self.reward_shape = spec_shapes(reward_spec, "reward")["reward"]

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out, size = self.world_model(tensordict.copy()), tensordict.batch_size
        if missing := [key for key in self.shapes if key not in out.keys(True)]:
            raise ValueError(f"the world model did not return {missing}: the next step needs it")
        zeros = torch.zeros(*size, *self.reward_shape, device=tensordict.device)
        predicted = {"reward": out.get("reward", zeros), "done": out.get("done", zeros.bool())}
        return TensorDict(out.exclude("action"), size).update(predicted)
