"""Train the authors' JAX code with the README's small recipe; writes a run folder.

    git clone https://github.com/danijar/dreamerv3 && git -C dreamerv3 checkout e3f0224
    pip install jax==0.4.33 "numpy<2" ruamel.yaml ninjax elements einops optax chex jaxtyping
    pip install portal granular dm-control==1.0.50 mujoco==3.17.0
    python tools/peers/jax_train.py dreamerv3 cartpole-swingup 0 [environment steps]
    python -m tools.collect runs/jax/dm_control-cartpole-swingup-v0/seed* --tag small

Their main runs their training loop, replay, agent and environment with the flags below, in float32
on one CPU thread. This file replaces two things: the logger, by one that keeps the training
episodes, and the rendering, which their environment does at every step and only their videos use.
Their DM Control tasks are seeded differently in each process, whatever the seed.
"""

import json
import os
import pathlib
import platform
import re
import sys
import time

RECIPE = """--configs dmc_proprio --batch_length 16 --report_length 16 --agent.dyn.rssm.deter 256
    --agent.opt.lr 1e-3 --agent.opt.warmup 200 --env.dmc.repeat 2 --run.envs 1 --run.train_ratio 24
    --jax.platform cpu --jax.compute_dtype float32 --run.log_every 10 --run.report_every 1e9
    --run.save_every 1e9 --run.usage.psutil False --run.usage.nvsmi False"""


def main(repository: str, task: str, seed: str, steps: str = "50000"):
    one_thread = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = one_thread
    sys.path.insert(0, repository)
    import elements
    import jax
    import numpy as np
    from dm_control.mujoco import Physics
    from dreamerv3 import main as authors

    folder = pathlib.Path("runs", "jax", f"dm_control-{task}-v0", f"seed{seed}")
    folder.mkdir(parents=True)
    cpu = re.findall("model name\\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[0]
    origin = {
        "command": f"python tools/peers/jax_train.py {repository} {task} {seed} {steps}",
        "commit": "danijar/dreamerv3 e3f0224",
        "versions": f"python {platform.python_version()}, jax {jax.__version__}",
        "hardware": f"{os.cpu_count()} cores of {cpu}, no GPU",
    }
    args = {"script": "jax", "env_id": f"dm_control/{task}-v0", "seed": int(seed)}
    args |= {"action_repeat": 2, "steps": int(steps), "flags": " ".join(RECIPE.split())}
    (folder / "args.json").write_text(json.dumps({**args, "origin": [origin]}, indent=1))

    start, agents, make_agent = time.monotonic(), [], authors.make_agent

    def keep_agent(config):
        agents.append(make_agent(config))
        return agents[-1]

    def keep_episodes(metrics):
        with (folder / "metrics.jsonl").open("a") as file:
            for step, name, value in metrics:
                if name == "episode/score":
                    row = {"step": step, "episode/return": float(value)}
                    row |= {"updates": int(agents[0].n_updates)}
                    print(json.dumps(row | {"time/wall": time.monotonic() - start}), file=file)

    authors.make_agent = keep_agent
    authors.make_logger = lambda _: elements.Logger(elements.Counter(), [keep_episodes], 2)
    Physics.render = lambda self, height, width, **_: np.zeros((height, width, 3), np.uint8)
    flags = f"--task dmc_{task.replace('-', '_')} --seed {seed} --run.steps {int(steps) // 2}"
    authors.main([*RECIPE.split(), *flags.split(), "--logdir", str(folder / "authors")])


if __name__ == "__main__":
    main(*sys.argv[1:])
