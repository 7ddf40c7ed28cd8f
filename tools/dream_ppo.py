"""Train Stable-Baselines3's PPO in the dreams of a saved run and, to compare, in its environment.

    pip install -r requirements-extra.txt
    python -m tools.dream_ppo runs/dreamer_v3/Pendulum-v1/seed0 [--horizon 50] [--out PATH]
    python -m tools.dream_ppo runs/pilco/PILCO-Pendulum-v0/seed0 --script pilco.py

Both policies are evaluated in the real environment, by their mode. The first trains for --actions
in dreams of --horizon actions each; the second for as many real actions as the run took, rounded up
to PPO's rollouts of 512. The run must have one observed vector and continuous actions. Writes
OUT.csv and OUT.png, by default results/dreams/<script>.csv and .png.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium import spaces

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv, VecMonitor
except ImportError:
    sys.exit("error: this needs Stable-Baselines3: pip install -r requirements-extra.txt")

from common.checkpoint import RunError
from common.envs import make_envs
from common.logger import read_metrics
from common.run import launch
from tools.dream_env import DEFAULT_SCRIPT, dream_env, load_run

RESULTS = Path(__file__).parents[1] / "results"
EPISODES, SAME_STEP = 10, gymnasium.vector.AutoresetMode.SAME_STEP
SETTINGS = dict(  # of RL Baselines3 Zoo for Pendulum-v1, except n_steps and batch_size
    gamma=0.9, gae_lambda=0.95, n_epochs=10, ent_coef=0.0, learning_rate=1e-3, clip_range=0.2,
    use_sde=True, sde_sample_freq=4, policy_kwargs=dict(net_arch=[64, 64]), device="cpu",
)  # fmt: skip


class RealEnv(gymnasium.Env):
    """The environment of a run as its agent sees it: with action repeat and actions in [-1, 1]."""

    def __init__(self, args, env_spaces, seed: int):
        self.envs, self.rows = make_envs(args, num_envs=1, seed=seed), None
        (self.key,) = self.envs.spec["shapes"]
        self.observation_space, self.action_space = env_spaces

    def reset(self, *, seed=None, options=None):
        no_action = torch.zeros(1, self.envs.action_dim)
        while self.rows is None or not self.rows["is_first"].item():
            self.rows = self.envs.step(None if self.rows is None else no_action)
        return self.observe(), {}

    def step(self, action):
        self.rows = self.envs.step(torch.as_tensor(action).view(1, -1))
        last, terminal = self.rows["is_last"].item(), self.rows["is_terminal"].item()
        return self.observe(), self.rows["reward"].item(), terminal, last and not terminal, {}

    def observe(self):
        return self.rows[self.key][0].numpy().reshape(self.observation_space.shape)


class SB3VecEnv(VecEnv):
    """Adapts a gymnasium vector environment with SAME_STEP resets to Stable-Baselines3."""

    def __init__(self, envs: gymnasium.vector.VectorEnv, seed: int):
        assert envs.metadata["autoreset_mode"] == SAME_STEP
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.envs, self.first_seed = envs, seed

    def reset(self):
        return self.envs.reset(seed=self.first_seed)[0]

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        observation, reward, terminated, truncated, infos = self.envs.step(self.actions)
        done, info_list = terminated | truncated, [{} for _ in reward]
        for i in np.flatnonzero(done):
            info_list[i]["terminal_observation"] = infos["final_obs"][i]
            info_list[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observation, reward.astype(np.float32), done, info_list

    def close(self):
        self.envs.close()

    def get_attr(self, name, indices=None):
        return [None] * self.num_envs  # VecEnv asks for `render_mode`

    def set_attr(self, name, value, indices=None):
        raise NotImplementedError

    def env_method(self, name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * self.num_envs


class Evaluate(BaseCallback):
    """Plays the policy's mode in the real environment: `scores` [(actions, mean return)].

    It does so before rollouts and at the end, when PPO has learned from all past actions:
    `_on_rollout_end` would come before PPO learns from that rollout.
    """

    def __init__(self, real: gymnasium.Env, every: int):
        super().__init__()
        self.real, self.every, self.scores = real, every, []

    def _on_rollout_start(self):
        if not self.scores or self.num_timesteps - self.scores[-1][0] >= self.every:
            self.play()

    def _on_training_end(self):
        self.play()

    def _on_step(self):
        return True

    def play(self):
        returns = []
        for _ in range(EPISODES):
            observation, total, ended = self.real.reset()[0], 0.0, False
            while not ended:
                action = self.model.predict(observation, deterministic=True)[0]
                observation, reward, terminated, truncated, _ = self.real.step(action)
                total, ended = total + reward, terminated or truncated
            returns.append(total)
        self.scores.append((self.num_timesteps, float(np.mean(returns))))
        print(f"{self.num_timesteps:9,} actions: {self.scores[-1][1]:.1f}", flush=True)


def train(envs, real: RealEnv, actions: int, seed: int, **settings) -> list[tuple[int, float]]:
    """Train PPO for that many actions in `envs`; return its scores in the real environment."""
    callback = Evaluate(real, actions // 10)
    model = PPO("MlpPolicy", VecMonitor(SB3VecEnv(envs, seed)), seed=seed, **SETTINGS, **settings)
    model.learn(actions, callback)
    return callback.scores


def draw(scores: dict, run_return: float, path: Path):
    """Plot the real return over PPO's actions, one line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    titles = {"real": "PPO in the real environment", "dream": "PPO in the dream of the run"}
    styles = [("-", "black", "o"), ("--", "0.3", "s"), (":", "0.5", "^")]
    for axes, (trained_in, title) in zip(panels, titles.items(), strict=True):
        for seed in sorted(seed for kind, seed in scores if kind == trained_in):
            style, color, marker = styles[seed % 3]
            x, y = np.array(scores[trained_in, seed]).T
            options = dict(color=color, marker=marker, ms=4, lw=1.2, label=f"seed {seed}")
            axes.plot(x / 1000, y, style, **options)
        axes.axhline(run_return, color="#c8641a", lw=1.5, label="the run's own policy")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("actions, thousands")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"return in the real environment,\nmean of {EPISODES} episodes")
    panels[1].legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=150)


def main(
    run: tyro.conf.Positional[Path],  # folder of a finished run
    horizon: int = 50,  # of the dreams
    actions: int = 200_000,  # in the dreams
    seeds: int = 3,
    out: Path | None = None,  # path of the results, without .csv or .png
    script: Path = DEFAULT_SCRIPT,  # that trained the run
):
    if min(actions, seeds) < 1:
        raise RunError("--actions and --seeds must be at least 1")
    torch.set_num_threads(1)
    if not Path(run, "args.json").exists():
        raise RunError(f"{run} is not a run folder: it has no args.json")
    args = json.loads(Path(run, "args.json").read_text())
    out = (out or RESULTS / "dreams" / script.stem).absolute()  # environments may change directory
    agent = load_run(run, script)
    dreams = dream_env(agent, 16, horizon=horizon)
    env_spaces = dreams.single_observation_space, dreams.single_action_space
    if not all(isinstance(space, spaces.Box) and len(space.shape) == 1 for space in env_spaces):
        raise RunError(f"{run}: PPO here needs one vector and continuous actions, not {env_spaces}")
    rows = list(read_metrics(Path(run, "metrics.jsonl")))
    real_actions = rows[-1]["step"] // args["action_repeat"]
    if not (evaluations := [row["eval/return"] for row in rows if "eval/return" in row]):
        raise RunError(f"{run} is not finished: it has no evaluation")
    run_args, scores = argparse.Namespace(**args), {}
    for seed in range(seeds):
        test_env = RealEnv(run_args, env_spaces, 10_000 + seed)
        print(f"seed {seed}, in the dream")
        settings = dict(n_steps=256, batch_size=256)
        scores["dream", seed] = train(dreams, test_env, actions, seed, **settings)
        print(f"seed {seed}, {real_actions:,} real actions")
        real = gymnasium.vector.SyncVectorEnv(
            [partial(RealEnv, run_args, env_spaces, seed)], autoreset_mode=SAME_STEP
        )
        settings = dict(n_steps=512, batch_size=64)
        scores["real", seed] = train(real, test_env, real_actions, seed, **settings)
    lines = [f"# {k}: {v}" for origin in args["origin"] for k, v in origin.items()]
    lines += [f"# real actions of the run: {real_actions}"]
    lines += [f"# its own return: {evaluations[-1]:.1f}", "trained in,seed,actions,real return"]
    lines += [f"{k},{s},{x},{y:.1f}" for (k, s), curve in scores.items() for x, y in curve]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.csv").write_text("\n".join(lines) + "\n")
    draw(scores, evaluations[-1], out.with_name(f"{out.name}.png"))


if __name__ == "__main__":
    launch(lambda: tyro.cli(main, prog="python -m tools.dream_ppo", description=__doc__))
