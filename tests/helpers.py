"""What several test files share."""

import copy
import os

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule

import dreamer_v3

DEVICE = os.environ.get("PLAINDREAM_DEVICE", "cpu")  # of the comparisons with the authors' code
torch.backends.cudnn.allow_tf32 = False  # else convolutions on CUDA round to ten bits
V3_TINY = dict(deter=32, hidden=8, stoch=4, classes=4, depth=2, units=16, imagination_horizon=4)
V3_SPEC = {
    "shapes": {"position": (3,), "velocity": (2,)},
    "categories": {},
    "action_dim": 2,
    "classes": (),
}


def near(actual, expected, rtol=1e-5, atol=1e-6):
    """Assert that two arrays agree: same shape, |actual - expected| <= atol + rtol |expected|."""
    actual, expected = (
        torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (actual, expected)
    )
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def replayed_update(agent, *inputs):
    """agent.update(*inputs) by a replay of its CUDA graph; without a GPU, a call like any other."""
    saved = copy.deepcopy(agent.state_dict())
    update = CudaGraphModule(agent.update, warmup=3)  # the third call records
    for _ in range(3):
        update(*inputs)
    restore(agent.state_dict(), saved)
    return update(*inputs)


def restore(state: dict, saved: dict):
    """Copy `saved` into the tensors of `state`; those that it lacks become 0, as Adam's first."""
    for key, value in state.items():
        if isinstance(value, dict):
            restore(value, saved.get(key, {}))
        elif isinstance(value, torch.Tensor):
            value.copy_(saved.get(key, torch.zeros(())))


# --- dreamer_v3.py ---


def perturb(*modules, scale=0.3):
    """Add random numbers to every parameter: no zero bias, no scale of 1, no zero head."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.add_(scale * torch.randn_like(p))


def v3_agent(spec=V3_SPEC, seed=0, random=True, **args):
    """A tiny agent; `random` perturbs every parameter, so that no zero hides a mistake."""
    torch.manual_seed(seed)
    agent = dreamer_v3.Agent(spec, dreamer_v3.Args(**{**V3_TINY, **args}))
    if random:
        perturb(*agent.modules.values(), agent.slow_value)
        far = (torch.arange(255) - 127).abs() > 25  # keeps rewards and values below 100
        for head in (agent.world_model.reward, agent.value, agent.slow_value):
            head[-1].bias.data[far] -= 40
    return agent


def v3_latents(args, *shape):
    """Random latents of that batch shape: belief (*shape, D), state (*shape, S * C)."""
    state = F.one_hot(torch.randint(args.classes, (*shape, args.stoch)), args.classes).float()
    belief = torch.rand(*shape, args.deter) * 2 - 1
    return TensorDict(belief=belief, state=state.flatten(-2), batch_size=list(shape))
