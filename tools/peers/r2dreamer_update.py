"""Time of one update of r2dreamer's DreamerV3 (PyTorch): a row of tools/peers/table.py.

    git clone https://github.com/NM512/r2dreamer && git -C r2dreamer checkout 546e4fa
    pip install torch==2.13.0 tensordict==0.14.3 hydra-core tensorboard gymnasium
    python tools/peers/r2dreamer_update.py r2dreamer [updates] [compile: no or yes]

The setting is that of jax_update.py. They have no size 1m: it is their 12m with a quarter of its
widths. Their autocast to float16 is left out.
"""

import contextlib
import sys
from pathlib import Path

from timing import report

SIZE = "deter=512 hidden=64 discrete=4 depth=4 units=64 rep_loss=dreamer"


def main(repository: str, updates: str = "10", compiled: str = "no"):
    sys.path.insert(0, repository)
    import hydra
    import numpy as np
    import torch
    from gymnasium.spaces import Box, Dict
    from tensordict import TensorDict

    import dreamer

    dreamer.autocast = lambda **_: contextlib.nullcontext()
    dreamer.GradScaler = lambda: torch.amp.GradScaler(enabled=False)
    torch.set_flush_denormal(True)  # as XLA does
    flags = ["env=dmc_proprio", "device=cpu", *(f"model.{flag}" for flag in SIZE.split())]
    flags += [f"model.compile={compiled == 'yes'}"]
    with hydra.initialize_config_dir(str(Path(repository, "configs").resolve()), version_base=None):
        config = hydra.compose("configs", flags)
    sizes = {"orientations": 14, "height": 1, "velocity": 9}
    observation, action = (
        {key: Box(-np.inf, np.inf, (n,), np.float32) for key, n in space.items()}
        for space in (sizes, {"action": 6})
    )
    agent = dreamer.Dreamer(config.model, Dict(observation), action["action"])

    batch = TensorDict(reward=torch.rand(16, 64, 1), batch_size=[16, 64])
    for key, n in {**sizes, "action": 6}.items():
        batch[key] = torch.randn(16, 64, n)
    for key in ("is_first", "is_last", "is_terminal"):
        batch[key] = torch.zeros(16, 64, 1, dtype=torch.bool)

    class Replay:  # the batch is already in memory
        def sample(self):
            return batch.clone(), None, agent.rssm.initial(16)

        def update(self, index, stoch, deter):
            pass

    count = sum(p.numel() for p in agent._named_params.values())
    notes = f"{count:,} parameters, torch {torch.__version__}"
    report("update", lambda: agent.update(Replay()), updates, notes)


if __name__ == "__main__":
    main(*sys.argv[1:])
