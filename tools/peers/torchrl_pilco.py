"""How soon TorchRL's PILCO script balances InvertedPendulum-v5, for the README.

    pip install torchrl==0.14.1 tensordict==0.14.3 torch==2.13.0 botorch hydra-core
    pip install "gymnasium[mujoco]" "mujoco<4"
    git clone https://github.com/pytorch/rl && git -C rl checkout ae9719f
    python tools/peers/torchrl_pilco.py rl/sota-implementations/pilco SEED

Runs that script with its own configuration, on one thread, without video and W&B. The script takes
200 random steps first, then evaluates the policy every 10 gradient steps for up to 100 steps. This
file prints one line per evaluation and ends once the pole is balanced for all 100 steps (the
script counts from 0, so it logs 99).
"""

import sys
import time


def main(folder: str, seed: str):
    sys.path.insert(0, folder)
    import torch
    from omegaconf import OmegaConf
    from utils import make_env

    import pilco

    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    config = OmegaConf.load(f"{folder}/config.yaml")
    config.logger.video = False
    env = make_env(config.env.env_name, torch.device("cpu"), from_pixels=False)
    env.set_seed(int(seed))
    rollout, start = env.rollout, time.monotonic()

    def first_rollout(*args, **kwargs):
        data = rollout(*args, **kwargs)
        print(f"random: {len(data)} steps, {int(data['next', 'done'].sum())} episodes", flush=True)
        env.rollout = rollout
        return data

    class StepLogger:
        def log_scalar(self, name: str, value: float, step: int):
            if name == "eval/steps":
                seconds = time.monotonic() - start
                print(
                    f"seed {seed}, {step} updates, {value + 1} steps, {seconds:.0f} s", flush=True
                )
                if value + 1 >= config.pilco.eval_horizon:
                    sys.exit()

    env.rollout = first_rollout
    pilco.pilco_loop(config, env, logger=StepLogger())


if __name__ == "__main__":
    main(*sys.argv[1:])
