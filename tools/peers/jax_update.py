"""Time of one update of the authors' JAX code: a row of tools/peers/table.py.

    git clone https://github.com/danijar/dreamerv3 && git -C dreamerv3 checkout e3f0224
    pip install jax==0.4.33 "numpy<2" ruamel.yaml ninjax elements einops optax chex jaxtyping
    pip install portal granular
    python tools/peers/jax_update.py dreamerv3 [updates]

The setting is that of `python dreamer_v3.py --preset dmc_proprio --benchmark`: size 1m, 24 observed
numbers, 6 actions, batch 16 x 64, horizon 15, float32, on the CPU; the batch is already in memory.
"""

import itertools
import pathlib
import sys

from timing import report


def main(repository: str, updates: str = "10"):
    sys.path.insert(0, repository)
    import elements
    import jax
    import jax.numpy as jnp
    import ninjax
    import numpy as np
    import ruamel.yaml
    from dreamerv3.agent import Agent
    from embodied.jax import internal

    text = pathlib.Path(repository, "dreamerv3", "configs.yaml").read_text()
    presets = ruamel.yaml.YAML(typ="safe").load(text)
    config = elements.Config(presets["defaults"]).update(presets["dmc_proprio"])
    internal.setup("cpu", jnp.float32, transfer_guard=False, gpuflags=False)
    sizes = {"orientations": 14, "height": 1, "velocity": 9}
    space = {key: elements.Space(np.float32, (size,)) for key, size in sizes.items()}
    space["reward"] = elements.Space(np.float32, ())
    space |= {key: elements.Space(bool) for key in ("is_first", "is_last", "is_terminal")}
    action = {"action": elements.Space(np.float32, (6,), -1, 1)}
    agent = object.__new__(Agent)  # without the outer class, which starts threads and devices
    Agent.__init__(agent, space, action, elements.Config(**config.agent, replay_context=1))

    rng, shape = np.random.default_rng(0), (16, 65)
    batch = {k: rng.normal(size=(*shape, n)) for k, n in {**sizes, "action": 6}.items()}
    batch = {"reward": rng.random(shape), **batch}
    batch |= {"dyn/deter": np.zeros((*shape, 512)), "dyn/stoch": np.zeros((*shape, 32, 4))}
    batch = {key: jnp.asarray(value, jnp.float32) for key, value in batch.items()}
    batch |= {key: jnp.zeros(shape, bool) for key in ("is_first", "is_last", "is_terminal")}
    batch |= {"consec": jnp.zeros(shape, int), "stepid": jnp.zeros((*shape, 20), jnp.uint8)}

    _, carry = ninjax.pure(agent.init_train)({}, 16, seed=0)
    params = jax.jit(ninjax.init(agent.train))({}, carry, batch, seed=0)
    train, seeds = jax.jit(ninjax.pure(agent.train), donate_argnums=(0,)), itertools.count()

    def update():
        nonlocal params, carry
        result = train(params, carry, batch, seed=next(seeds))
        params, (carry, *_) = jax.block_until_ready(result)

    weights = (x for key, x in params.items() if x.ndim and not key.startswith(("opt", "slow")))
    count = sum(x.size for x in weights)
    report("update", update, updates, f"{count:,} parameters, jax {jax.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
