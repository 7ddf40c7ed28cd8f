"""Mean return of uniformly random actions: the reference for the start of a learning curve.

python -m tools.random_policy Pendulum-v1 [episodes] [action repeat]
"""

import sys

import torch
import torch.nn.functional as F

from common.envs import Envs


def main(env_id: str, episodes: str = "100", action_repeat: str = "1"):
    torch.manual_seed(0)
    envs, returns = Envs(env_id, 1, seed=0, action_repeat=int(action_repeat)), []
    action, total = None, 0.0
    while len(returns) < int(episodes):
        row = envs.step(action)
        total += row["reward"].item()
        if row["is_last"].item():
            returns.append(total)
            total = 0.0
        action = torch.rand(1, envs.action_dim) * 2 - 1
        if envs.action_classes:
            one_hots = [F.one_hot(torch.randint(n, (1,)), n) for n in envs.action_classes]
            action = torch.cat(one_hots, -1)
    returns = torch.tensor(returns)
    print(f"{returns.mean():.1f} +- {returns.std(correction=0):.1f} over {episodes} episodes")


if __name__ == "__main__":
    main(*sys.argv[1:])
