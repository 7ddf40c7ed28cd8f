"""World models as gymnasium environments: hand-made dynamics, and runs of the scripts."""

import importlib
import json
import shutil
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from tensordict import TensorDict

import dreamer
import dreamer_v3
import pilco
from common.checkpoint import RunError
from common.imagination import ModelBasedEnvBase
from tools.dream_env import (
    DreamVectorEnv,
    dream_env,
    load_run,
    pilco_dream,
    posterior_sampler,
    predict,
)  # fmt: skip

SCRIPTS = {"dreamer": dreamer, "dreamer_v3": dreamer_v3, "pilco": pilco}
SHORT = {
    "dreamer": "--steps 200 --prefill 120 --train-steps 2 --pretrain 2",
    "dreamer_v3": "--steps 100",
    "pilco": "--trials 1",
}


class Line(ModelBasedEnvBase):
    """x' = x + action, reward -x'^2, and the episode goes on while |x'| < 2."""

    def __init__(self):
        super().__init__(lambda td: td, {"x": (1,)})

    def _step(self, td):
        x = td["x"] + td["action"]
        goes_on = (x.abs() < 2).float()[:, 0]
        noise = torch.randn_like(x)
        return TensorDict(
            x=x, noise=noise, reward=-x.square()[:, 0], batch_size=len(x), **{"continue": goes_on}
        )


def line(num_envs=2, horizon=5, latent=False, classes=()):
    """Starts are 0, 0.001, 0.002, ... in an order set by the seed; the observation is 10 x."""

    def draw(seed):
        return TensorDict(x=torch.arange(8)[:, None] / 1000, batch_size=8)

    spec = dict(
        shapes={"observation": [1]}, categories={}, action_dim=sum(classes) or 1, classes=classes
    )
    decode = lambda states: states.set("observation", 10 * states["x"])  # noqa: E731
    return DreamVectorEnv(Line(), draw, decode, spec, num_envs, horizon, latent)


def test_rewards_ends_and_final_observations():
    envs = line()
    first, _ = envs.reset(seed=0)
    assert first.shape == (2, 1) and first.dtype == np.float32
    x, infos = first / 10, {}
    for _ in range(3):  # the first one leaves [-2, 2] at the third step, the second stays
        x += np.array([[0.9], [0.1]])
        assert not infos
        observation, reward, terminated, truncated, infos = envs.step(np.float32([[0.9], [0.1]]))
        np.testing.assert_allclose(reward, -np.square(x[:, 0]), rtol=1e-5)
        assert not truncated.any()
    assert terminated.tolist() == [True, False]
    np.testing.assert_allclose(infos["final_obs"][0], 10 * x[0], rtol=1e-6)
    assert infos["_final_obs"].tolist() == [True, False] and infos["final_obs"][1] is None
    assert abs(observation[0]) < 0.1  # a new start
    np.testing.assert_allclose(observation[1], 10 * x[1], rtol=1e-6)
    still, ends = np.zeros((2, 1), np.float32), []
    for _ in range(6):
        _, _, terminated, truncated, _ = envs.step(still)
        ends.append(truncated.tolist())
        assert not terminated.any()
    # five actions per episode: environment 1 began its episode three steps before environment 0
    no = [False, False]
    assert ends == [no, [False, True], no, no, [True, False], no]


def test_every_start_is_used_once_before_new_ones_are_drawn():
    envs = line(num_envs=4, horizon=1)
    rows = [envs.reset(seed=3)[0]]
    for _ in range(3):
        rows.append(envs.step(np.zeros((4, 1), np.float32))[0])
    rows = np.round(np.concatenate(rows)[:, 0] * 100).astype(int)
    assert sorted(rows[:8]) == list(range(8)) == sorted(rows[8:])
    assert rows[:8].tolist() != rows[8:].tolist() != sorted(rows[8:])


def test_a_seed_repeats_everything_and_the_global_generator_is_left_alone():
    envs, record = line(horizon=2), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed + len(record))
        before, state = torch.get_rng_state(), [envs.reset(seed=seed)[0]]
        for _ in range(7):
            state.append(envs.step(np.float32([[0.5], [0.5]]))[0])
        assert torch.equal(torch.get_rng_state(), before)
        record.append(np.stack(state))
    assert np.array_equal(record[0], record[1])
    assert not np.array_equal(record[0], record[2])


def test_actions_are_clipped_or_become_one_hots():
    envs = line(1)
    x = envs.reset(seed=0)[0] / 10
    assert envs.step(np.float32([[7.0]]))[0] == pytest.approx(10 * (x + 1), rel=1e-5)
    for classes, space, action, hots in (
        ([3], spaces.Discrete(3), [2, 0], ["001", "100"]),
        ([2, 3], spaces.MultiDiscrete([2, 3]), [[1, 0], [0, 2]], ["01100", "10001"]),
    ):
        envs = line(classes=classes)
        assert envs.single_action_space == space
        envs.reset(seed=0)
        assert envs.encode(np.array(action)).tolist() == [list(map(float, row)) for row in hots]
    with pytest.raises(gymnasium.error.ResetNeeded):
        line().step(np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("sizes", "space"), [([8], spaces.Discrete(8)), ([8, 2], spaces.MultiDiscrete([8, 2]))]
)
def test_categories_are_discrete_observations(sizes, space):
    """Alone or beside a vector, and where an episode ends."""

    def decode(states):
        number = (states["x"] * 1000).round().int() % 8
        door = torch.cat([number, number % 2], -1)[:, : len(sizes)]
        return states.set("door", door).set("place", 10 * states["x"])

    def dream(num_envs, shapes, horizon=1):
        draw = lambda _: TensorDict(x=torch.arange(8)[:, None] / 1000, batch_size=8)  # noqa: E731
        spec = dict(shapes=shapes, categories={"door": sizes}, action_dim=1, classes=())
        return DreamVectorEnv(Line(), draw, decode, spec, num_envs, horizon, False)

    alone, both = {"door": [len(sizes)]}, {"door": [len(sizes)], "place": [1]}
    assert dream(8, alone).single_observation_space == space
    doors = dream(8, alone).reset(seed=0)[0]
    expected = range(8) if len(sizes) == 1 else [[i, i % 2] for i in range(8)]
    assert sorted(doors.tolist()) == list(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*not having a spec.*")
        check_env(One(dream(1, alone, horizon=2)))
    envs = dream(4, both)
    assert envs.single_observation_space == spaces.Dict(
        door=space, place=spaces.Box(-np.inf, np.inf, (1,), np.float32)
    )
    before, _ = envs.reset(seed=0)
    after, *_, infos = envs.step(np.zeros((4, 1), np.float32))
    assert envs.observation_space.contains(before) and envs.observation_space.contains(after)
    final = [x["door"].tolist() for x in infos["final_obs"]]  # a step of 0 leads nowhere
    assert final == before["door"].tolist() != after["door"].tolist()


@pytest.mark.parametrize(
    ("classes", "action"),
    [((), [[np.nan], [0]]), ((), [[0], [np.inf]]), ((), [0, 0]), ((), [[0]]), ([3], [0, 3]),
     ([3], [-1, 0]), ([3], [0.5, 0]), ([3], [[0], [1]]), ([2, 3], [[0, 3], [0, 0]])],
)  # fmt: skip
def test_actions_outside_the_space(classes, action):
    envs = line(classes=classes)
    envs.reset(seed=0)
    before = envs.state.clone()
    with pytest.raises(gymnasium.error.InvalidAction, match="is not in the space"):
        envs.step(np.array(action))
    assert (envs.state == before).all()


def test_ppo_is_evaluated_after_it_has_learned_from_all_its_actions(monkeypatch):
    reason = "Stable-Baselines3 is not installed (requirements-extra.txt)"
    pytest.importorskip("stable_baselines3", reason=reason)
    from tools import dream_ppo

    params = []

    class Watch(dream_ppo.Evaluate):
        def play(self):
            params.append(torch.cat([p.detach().flatten() for p in self.model.policy.parameters()]))
            super().play()

    monkeypatch.setattr(dream_ppo, "Evaluate", Watch)
    settings = dict(n_steps=16, batch_size=16)
    scores = dream_ppo.train(line(2), One(line(1)), actions=64, seed=0, **settings)
    assert [actions for actions, _ in scores] == [0, 32, 64]
    assert not torch.equal(params[0], params[1]) and not torch.equal(params[1], params[2])
    assert all(-4 * 5 < value < 0 for _, value in scores)


def test_ppo_without_stable_baselines3(monkeypatch):
    monkeypatch.delitem(sys.modules, "tools.dream_ppo", raising=False)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-extra\.txt"):
        import tools.dream_ppo  # noqa: F401


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished tiny run of each script."""
    folder = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, script in SCRIPTS.items():
            argv = f"--preset debug --no-tensorboard --run {folder / name} {SHORT[name]}"
            script.main(argv.split())
    return folder


@pytest.fixture
def dream(runs):
    """dream(script, ...): a dream_env of a newly loaded agent."""
    return lambda script, *args, **options: dream_env(
        SCRIPTS[script].load(runs / script), *args, **options
    )


class One(gymnasium.Env):
    """A vector environment of one as a single one, which gymnasium's checker needs."""

    def __init__(self, envs):
        self.envs, self.action_space = envs, envs.single_action_space
        self.observation_space = envs.single_observation_space

    def reset(self, *, seed=None, options=None):
        observation, infos = self.envs.reset(seed=seed, options=options)
        self._np_random = self.envs._np_random
        return observation[0], infos

    def step(self, action):
        observation, reward, terminated, truncated, infos = self.envs.step(np.array([action]))
        ended = terminated[0] or truncated[0]
        observation = infos["final_obs"] if ended else observation
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_gymnasium_env_checker(dream, script, latent):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(infinity|not having a spec).*")
        check_env(One(dream(script, horizon=4, latent=latent)))
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(
        dream(script, 3, horizon=4, latent=latent)
    )
    envs.reset(seed=0)
    lengths = []
    for _ in range(9):
        observation, *_, infos = envs.step(envs.action_space.sample())
        assert envs.observation_space.contains(observation)
        lengths += infos["episode"]["l"][infos["_episode"]].tolist() if "episode" in infos else []
    assert len(lengths) >= 6 and set(lengths) <= {1, 2, 3, 4}


@pytest.mark.parametrize("script", ["dreamer", "dreamer_v3"])
def test_rewards_and_terminations_are_those_of_the_heads(runs, dream, script):
    envs = dream(script, 4, horizon=50, latent=True)
    agent = SCRIPTS[script].load(runs / script)
    model, belief_dim = agent.world_model, agent.args.deter
    observation, _ = envs.reset(seed=1)
    if script == "dreamer_v3":  # make ending as likely as going on
        bias = envs.env.world_model.cont[-1].bias
        with torch.no_grad():
            feat = torch.as_tensor(observation)
            bias -= torch.logit(envs.env.world_model.predict_continue(feat)).median()
        model.cont[-1].bias.data.copy_(bias.data)
    ended = 0
    for _ in range(12):
        action = envs.action_space.sample()
        observation, reward, terminated, truncated, infos = envs.step(action)
        for i in np.flatnonzero(terminated):
            observation[i] = infos["final_obs"][i]
        latents = torch.as_tensor(observation)
        feat = latents if script == "dreamer_v3" else latents.roll(-belief_dim, -1)  # state first
        with torch.no_grad():
            np.testing.assert_allclose(reward, model.predict_reward(feat), rtol=1e-5, atol=1e-6)
            goes_on = model.predict_continue(feat)
        assert terminated.tolist() == (goes_on < 0.5).tolist()
        assert not truncated.any()
        ended += terminated.sum()
    assert 0 < ended < 48 if script == "dreamer_v3" else ended == 0  # no --pcont, no end


@pytest.mark.parametrize("script", SCRIPTS)
def test_making_a_dream_env_leaves_the_global_generator_alone(runs, script):
    agent = SCRIPTS[script].load(runs / script)
    before = torch.get_rng_state()
    dream_env(agent, latent=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("script", ["dreamer", "dreamer_v3"])
def test_observations_are_those_of_the_decoder(runs, dream, script):
    latents = dream(script, 3, latent=True).reset(seed=2)[0]
    observation = dream(script, 3).reset(seed=2)[0]
    agent = SCRIPTS[script].load(runs / script)
    belief, state = torch.as_tensor(latents).split(
        [agent.args.deter, latents.shape[1] - agent.args.deter], -1
    )
    if script == "dreamer_v3":
        one_hots = state.unflatten(-1, (agent.args.stoch, -1))
        assert (one_hots.sum(-1) == 1).all()  # posteriors, not zeros
    with torch.no_grad():
        td = TensorDict(belief=belief, state=state, batch_size=3)
        expected = SCRIPTS[script].DreamerDecoder(agent.world_model)(td)["observation"]
    np.testing.assert_allclose(observation, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", ["dreamer", "dreamer_v3"])
def test_starts_are_posteriors_of_rows_that_end_no_episode(runs, script):
    agent = SCRIPTS[script].load(runs / script)
    outputs = []
    agent.world_model.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    draw = posterior_sampler(agent)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        starts = draw(seed)
        td = outputs[-1]
        expected = td["belief"].flatten(0, 1)[~td["is_last"].flatten()]
        assert torch.equal(starts["belief"], expected) and len(expected)
    assert script == "dreamer" or len(expected) < td.numel()  # CartPole's episodes are short
    assert torch.equal(outputs[0]["observation"], outputs[1]["observation"])
    assert not torch.equal(outputs[0]["observation"], outputs[2]["observation"])
    raw = torch.load(runs / script / "checkpoint.pt", weights_only=True)["replay"]
    assert outputs[0]["index"][..., 1].max() < raw["total"]


def test_pilcos_prediction_is_moment_matching_without_uncertainty(runs):
    agent = pilco.load(runs / "pilco")
    model, x = agent.world_model, torch.randn(6, 4, dtype=torch.float64)
    mean, variance = predict(x, model.posterior, model.hyper)
    matched, cov, _ = model(*pilco.known(x))
    torch.testing.assert_close(mean, matched)
    torch.testing.assert_close(variance, cov.diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("noise", ["latent", "observed"])
def test_pilcos_samples_have_the_moments_of_the_imagined_environment(runs, noise):
    agent = pilco.load(runs / "pilco")
    agent.args.noise = noise
    agent.env.noise = noise
    envs, *_ = pilco_dream(agent)
    state, action = torch.tensor([[0.3, 2.0]]).double(), torch.tensor([[0.4]]).double()
    torch.manual_seed(0)
    many = TensorDict(
        state=state.expand(40_000, -1), action=action.expand(40_000, -1), batch_size=40_000
    )
    after = envs.step(many)["next"]
    belief = agent.env.belief(*pilco.known(state)).set("action", action)
    belief["action_covariance"] = torch.zeros(1, 1, 1).double()
    belief["action_gain"] = torch.zeros(1, 3, 1).double()
    exact = agent.env.step(belief)["next"]
    deviation = exact["covariance"][0, :2, :2].diagonal().sqrt()
    error = after["state"].mean(0) - exact["mean"][0, :2]
    assert (error.abs() < 5 * deviation / 200).all()
    torch.testing.assert_close(after["state"].std(0), deviation, rtol=0.03, atol=0)
    torch.testing.assert_close(after["reward"], -agent.cost.at(after["state"]))


def test_a_renamed_fork_of_pilco_can_dream(runs, tmp_path, monkeypatch):
    shutil.copy(pilco.__file__, tmp_path / "my_pilco.py")
    monkeypatch.syspath_prepend(tmp_path)
    fork = importlib.import_module("my_pilco")
    monkeypatch.setattr(fork, "SCRIPT", "pilco")  # to load the original's run
    agent = fork.load(runs / "pilco")
    steps = []
    for one in (pilco.load(runs / "pilco"), agent):
        dream = dream_env(one, 3)
        dream.reset(seed=4)
        steps.append(dream.step(np.full(dream.action_space.shape, 0.5, np.float32))[:2])
        monkeypatch.setitem(sys.modules, "pilco", None)  # not beside the fork
    for one, other in zip(*steps, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pilcos_starts_are_its_start_distribution(runs):
    agent = pilco.load(runs / "pilco")
    torch.manual_seed(0)
    _, draw, _ = pilco_dream(agent)
    states = torch.cat([draw(0)["state"] for _ in range(20)])
    mean, cov = agent.start()
    torch.testing.assert_close(states.mean(0), mean[0], rtol=0, atol=0.005)
    torch.testing.assert_close(states.T.cov(), cov[0], rtol=0, atol=0.0005)


def test_errors_name_what_is_missing(runs, tmp_path):
    for script in SCRIPTS.values():
        with pytest.raises(RunError, match="no checkpoint in .*not been saved yet, or is gone"):
            script.load(tmp_path)
        with pytest.raises(RunError, match="there is no such folder"):
            script.load(tmp_path / "nothing")
    for text in ("{", "3", "{}", '{"script": "no_such_fork"}', '{"script": "math"}'):
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(RunError, match="no checkpoint in"):
            dreamer.load(tmp_path)
    with pytest.raises(RunError, match=r"was written by dreamer\.py, not by dreamer_v3\.py"):
        dreamer_v3.load(runs / "dreamer")
    for number, options in ((0, {}), (1, {"horizon": -1})):
        with pytest.raises(RunError, match="num_envs must be at least 1, horizon not negative"):
            dream_env(pilco.load(runs / "pilco"), number, **options)
    for script in ("dreamer", "dreamer_v3"):
        with pytest.raises(RunError, match="--device gpu cannot be used"):
            SCRIPTS[script].load(runs / script, device="gpu")
    early = tmp_path / "early"  # as after the random rollout
    shutil.copytree(runs / "pilco", early)
    state = torch.load(early / "checkpoint.pt", weights_only=True)
    state["agent"] |= {"drawn": False, "hyper": None}
    torch.save(state, early / "checkpoint.pt")
    with pytest.raises(RunError, match="no policy yet: its first trial is not finished"):
        pilco.load(early)
    copy = tmp_path / "copy"
    shutil.copytree(runs / "dreamer_v3", copy)
    agent = dreamer_v3.load(copy)
    shutil.rmtree(copy / "replay")
    with pytest.raises(RunError, match="no replay to start dreams from: restore it"):
        dream_env(agent)
    assert not (copy / "replay").exists()
    shutil.copytree(runs / "dreamer_v3" / "replay", copy / "replay")
    (copy / "replay" / "reward").unlink()
    for _ in range(2):
        with pytest.raises(RunError, match="lacks reward"):
            dream_env(agent)
    (copy / "checkpoint.pt").unlink()
    with pytest.raises(RunError, match="no checkpoint"):
        dream_env(agent)


def test_a_run_names_no_script_to_import(runs, tmp_path, monkeypatch):
    """What its files say imports nothing: the user names the script."""
    run = tmp_path / "run"
    shutil.copytree(runs / "dreamer", run)
    for folder in (run, tmp_path):
        (folder / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for script, path in (("dreamer", dreamer.__file__), ("evil", dreamer.__file__)):
        state["header"]["script"] = script
        torch.save(state, run / "checkpoint.pt")
        (run / "args.json").write_text(f'{{"script": "{script}"}}')
        if script == "evil":
            with pytest.raises(RunError, match=r"was written by evil.py, not by dreamer.py"):
                load_run(run, Path(path))
        else:
            assert load_run(run, Path(path)).folder == run
    with pytest.raises(RunError, match="there is no script .*dreamer4.py"):
        load_run(run, Path("dreamer4.py"))


def test_a_run_is_left_as_it_was(runs, dream, read_only):
    before = {p: p.read_bytes() for p in (runs / "dreamer_v3").rglob("*") if p.is_file()}
    read_only(runs)
    envs = dream("dreamer_v3", 4, horizon=3)
    envs.reset(seed=0)
    for _ in range(10):
        envs.step(envs.action_space.sample())
    assert {p: p.read_bytes() for p in (runs / "dreamer_v3").rglob("*") if p.is_file()} == before
    assert json.loads((runs / "dreamer_v3" / "args.json").read_text())["script"] == "dreamer_v3"
