"""Time of one update of TorchRL's DreamerV3: a row of tools/peers/table.py.

    git clone https://github.com/pytorch/rl && git -C rl checkout ae9719f
    pip install torchrl==0.14.1 tensordict==0.14.3 torch==2.13.0 botorch hydra-core gymnasium
    python tools/peers/torchrl_update.py rl [updates] [compile: no or yes]

The setting is that of jax_update.py. The networks are those of TorchRL's script with its config for
DM Control, whose encoder has one more linear layer. Losses, optimizer and update are those of
TorchRL's trainer, as they include the replay loss.
"""

import sys
from pathlib import Path

from timing import report


def main(repository: str, updates: str = "10", compiled: str = "no"):
    folder = Path(repository, "sota-implementations", "dreamer_v3")
    sys.path.insert(0, str(folder))
    import torch
    import torchrl
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from torchrl import objectives
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs.model_based.dreamer import DreamerEnv
    from torchrl.objectives.utils import SoftUpdate, ValueEstimators
    from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

    import dreamer_v3 as script

    torch.set_flush_denormal(True)  # as XLA does
    files = (folder / name for name in ("config.yaml", "config_dmc_walker.yaml"))
    config = OmegaConf.merge(*map(OmegaConf.load, files))
    nets, options = config.networks, config.optimization
    state, belief = nets.num_categoricals * nets.num_classes, nets.rnn_hidden_dim
    world_model, _, prior, _, reward, bins, discount = script.build_world_model(
        cfg=config, obs_dim=24, action_dim=6
    )
    actor, value = script.build_actor(cfg=config, action_dim=6), script.build_value(cfg=config)
    dream = script.build_imagination_model(prior_net=prior, reward_net=reward, reward_decoder=bins)
    env = DreamerEnv(dream, prior_shape=(state,), belief_shape=(belief,))
    env.observation_spec = Composite(state=Unbounded(state), belief=Unbounded(belief))
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = Bounded(-1, 1, (6,)), Unbounded((1,))

    model_loss = objectives.DreamerV3ModelLoss(
        world_model, kl_mode="separate", unimix=nets.unimix, lambda_continue=1.0,
        continue_target_scale=1 - 1 / options.continuation_horizon, detach_output=False,
    )  # fmt: skip
    model_loss.set_keys(pixels="observation")
    actor_loss = objectives.DreamerV3ActorLoss(
        actor, value, env, imagination_horizon=15, use_reinforce=True,
        continuation_model=script.build_continuation_model(continuation_net=discount),
    )  # fmt: skip
    actor_loss.make_value_estimator(ValueEstimators.TDLambda, gamma=1.0, lmbda=0.95)
    value_loss = objectives.DreamerV3ValueLoss(
        value, value_loss="two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0
    )
    loss = objectives.DreamerV3Loss(model_loss, actor_loss, value_loss)
    optimizer, target = DreamerV3Optimizer(loss.parameters()), SoftUpdate(value_loss, tau=0.02)
    compiles = dict(compile_train_step=compiled == "yes", cudagraph=False, warmup_steps=1)
    stepper = DreamerV3OptimizationStepper(loss, optimizer, target, **compiles)

    shape = 16, 64
    after = TensorDict(observation=torch.randn(*shape, 24), reward=torch.rand(*shape, 1))
    after["done"] = after["terminated"] = torch.zeros(*shape, 1, dtype=torch.bool)
    batch = TensorDict(action=torch.rand(*shape, 6), state=torch.zeros(*shape, state))
    batch["belief"], batch["is_init"] = torch.zeros(*shape, belief), after["done"].clone()
    batch["next"], batch.batch_size = after, shape
    if compiled == "yes":
        stepper.warmup(batch)
    count = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    notes = f"{count:,} parameters, torchrl {torchrl.__version__}"
    report("update", lambda: stepper.step(None, batch.copy()), updates, notes)


if __name__ == "__main__":
    main(*sys.argv[1:])
