"""Time of a policy's expected cost and gradient in TorchRL's PILCO: two rows of table.py.

    pip install torchrl==0.14.1 tensordict==0.14.3 torch==2.13.0 botorch
    python tools/peers/torchrl_policy.py rl [repeats]

The setting is that of `python pilco.py --benchmark`: 4 states, 1 action, 40 steps, 10 centers, 100
and 300 points, one policy. The call is a training step of their sota-implementations/pilco/pilco.py
without the optimizer. The GPs keep their initial hyperparameters.
"""

import sys
from types import SimpleNamespace

from timing import report


def main(repository: str, repeats: str = "10"):
    import botorch.fit
    import torch
    import torchrl
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs.model_based import ImaginedEnv
    from torchrl.modules.models import GPWorldModel, RBFController
    from torchrl.objectives import ExponentialQuadraticCost

    botorch.fit.fit_gpytorch_mll = lambda mll: mll
    real = SimpleNamespace(device=torch.device("cpu"), batch_size=torch.Size([]))
    real.observation_spec = Composite(observation=Unbounded(4, dtype=torch.float64))
    real.action_spec, real.reward_spec = Bounded(-1, 1, (1,)), Unbounded(1)
    real.done_spec = Unbounded(1, dtype=torch.bool)
    controller = RBFController(input_dim=4, output_dim=1, n_basis=10, max_action=1.0).double()
    actions = [("action", key) for key in ("mean", "var", "cross_covariance")]
    beliefs = [("observation", key) for key in ("mean", "var")]
    policy = TensorDictModule(controller, in_keys=beliefs, out_keys=actions)
    cost = ExponentialQuadraticCost(reduction="none")
    for points in (100, 300):
        x, weights = torch.randn(points, 5).double(), torch.randn(5, 4).double()
        y = 0.1 * torch.sin(x @ weights) + 0.002 * torch.randn(points, 4)
        data = TensorDict(observation=x[:, :4], action=x[:, 4:], batch_size=points)
        data["next", "observation"] = x[:, :4] + y
        model = GPWorldModel(obs_dim=4, action_dim=1)
        model.fit(data)
        env = ImaginedEnv(world_model_module=model.eval(), base_env=real)
        start = TensorDict({beliefs[0]: torch.zeros(1, 4).double()}, batch_size=1)
        start[beliefs[1]] = 0.01 * torch.eye(4).double()[None]

        def gradient(env=env, start=start):
            controller.zero_grad()
            dream = env.rollout(max_steps=40, policy=policy, tensordict=start)
            cost(dream)["loss_cost"].sum(-1).mean().backward()

        report(f"{points} points", gradient, repeats, f"torchrl {torchrl.__version__}")
        assert all(p.grad.isfinite().all() for p in controller.parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])
