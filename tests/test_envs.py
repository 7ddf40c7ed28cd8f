"""Rows of environments against hand-stepped gymnasium environments and known numbers."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import dummy_envs
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from common.checkpoint import EnvError, RunError
from common.envs import GL_ERROR, RESERVED, Envs, action_width, example_rows, make_envs

HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])


def needs(*modules):
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


def gl_works():
    """Checked in a separate process, which a broken driver may crash."""
    code = "import mujoco, shimmy; mujoco.GLContext(8, 8).make_current()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return process.returncode == 0


needs_gl = pytest.mark.skipif(not gl_works(), reason="MuJoCo cannot render here")
needs_dmc = needs("dm_control", "shimmy")


def dummy(name, n=1, **options):
    return Envs(f"dummy_envs:{name}-v0", n, **options)


def made(cls, obs="auto", **kwargs):
    """One environment of a class that is registered here, with these arguments."""
    gymnasium.registry.pop("Made-v0", None)
    gymnasium.register("Made-v0", cls, kwargs=kwargs)
    return Envs("Made-v0", obs=obs)


def given(space, *values):
    return made(dummy_envs.Given, space=space, values=values)


def episode_seed(seed, index, episode):
    """The documented derivation, repeated here so that a change shows."""
    sequence = np.random.SeedSequence(seed, spawn_key=(index, episode))
    return int(sequence.generate_state(1)[0]) >> 1


def same(a, b):
    return set(a.keys()) == set(b.keys()) and all(torch.equal(v, b[k]) for k, v in a.items())


# --- rows -------------------------------------------------------------------------------------


def test_rows_of_two_episodes():
    envs = dummy("Base", 2, seed=3)
    assert (envs.num_envs, envs.action_dim, envs.action_classes) == (2, 2, ())
    zeros = example_rows(envs.spec)[0]
    example = {k: (tuple(v.shape), v.dtype) for k, v in zeros.items()}
    flag = ((), torch.bool)
    assert example == {
        "observation": ((2,), torch.float32),
        "reward": ((), torch.float32),
        "is_first": flag,
        "is_last": flag,
        "is_terminal": flag,
    }
    rows = [envs.step(None)] + [envs.step(torch.zeros(2, 2)) for _ in range(11)]
    assert all(row.batch_size == torch.Size([2]) for row in rows)
    assert rows[0].keys() == zeros.keys()
    for i in range(2):  # 5 steps are 6 rows; the 7th is the next episode's reset
        assert [r["reward"][i].item() for r in rows] == [0, 1, 2, 3, 4, 5] * 2
        assert [r["observation"][i, 0].item() for r in rows] == [0, 1, 2, 3, 4, 5] * 2
        assert [r["is_first"][i].item() for r in rows] == [True] + [False] * 5 + [True] + [
            False
        ] * 5
        assert [r["is_last"][i].item() for r in rows] == ([False] * 5 + [True]) * 2
        assert not any(r["is_terminal"][i] for r in rows)
        for k, episode in ((0, 0), (6, 1)):
            luck = np.random.default_rng(episode_seed(3, i, episode)).random()
            assert rows[k]["observation"][i, 1].item() == np.float32(luck)
    with pytest.raises(AssertionError, match=r"first"):
        envs.step(None)
    with pytest.raises(AssertionError):
        envs.step(torch.zeros(2, 3))
    with pytest.raises(RunError, match=r"policy.*not finite"):
        envs.step(torch.full((2, 2), torch.nan))
    other = dummy("Base", 2, seed=3)  # an action before the first row is ignored
    assert same(other.step(torch.full((2, 2), torch.nan)), rows[0])
    assert same(other.step(torch.zeros(2, 2)), rows[1])


def test_real_termination_is_terminal():
    envs = dummy("Terminal")
    rows = [envs.step(None)] + [envs.step(torch.zeros(1, 2)) for _ in range(5)]
    assert [r["is_terminal"].item() for r in rows] == [False] * 5 + [True]
    assert [r["is_last"].item() for r in rows] == [False] * 5 + [True]


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    envs = dummy("Base", action_repeat=2)
    rows = [envs.step(None)] + [envs.step(torch.zeros(1, 2)) for _ in range(4)]
    assert [r["reward"].item() for r in rows] == [0, 1 + 2, 3 + 4, 5, 0]
    assert [r["observation"][0, 0].item() for r in rows] == [0, 2, 4, 5, 0]
    assert [r["is_last"].item() for r in rows] == [False, False, False, True, False]


@pytest.mark.parametrize("env_workers", [False, True])
def test_rows_do_not_alias(env_workers):
    envs = dummy("SameBuffer", 2, env_workers=env_workers)
    rows = [envs.step(None)] + [envs.step(torch.zeros(2, 2)) for _ in range(3)]
    assert [r["observation"][1, 1].item() for r in rows] == [0, 1, 2, 3]
    rows[-1]["observation"].zero_()
    assert envs.state_dict()["row"]["observation"][0, 0] == 3
    envs.close()


def test_equals_gymnasium_by_hand():
    """CartPole and Pendulum, several episodes, against gymnasium.make and the seeds."""
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        envs, generator = Envs(env_id, 2, seed=5), torch.Generator().manual_seed(0)
        gyms, episodes, over = [gymnasium.make(env_id) for _ in range(2)], [-1, -1], [True, True]
        for _ in range(450):
            action = torch.rand(2, envs.action_dim, generator=generator) * 2 - 1
            row = envs.step(action)
            for i, gym in enumerate(gyms):
                reward, terminal, truncated = 0.0, False, False
                if over[i]:
                    episodes[i] += 1
                    obs, _ = gym.reset(seed=episode_seed(5, i, episodes[i]))
                else:
                    native = int(action[i].argmax()) if env_id[0] == "C" else action[i].numpy() * 2
                    obs, reward, terminal, truncated, _ = gym.step(native)
                assert row["is_first"][i].item() == over[i]
                over[i] = terminal or truncated
                np.testing.assert_array_equal(row["observation"][i].numpy(), obs)
                assert row["reward"][i].item() == np.float32(reward)
                assert row["is_last"][i].item() == over[i]
                assert row["is_terminal"][i].item() == terminal
        assert min(episodes) >= 2


# --- actions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, dim, classes, cases",
    [
        (  # bounds [-2, 2], [0, 10], [-2, inf), (-inf, 10]: the last two are only clipped
            "Box",
            4,
            (),
            {
                (0.5, -0.5, 0.25, -0.75): (1, 2.5, 0.25, -0.75),
                (3, -3, 3, 3): (2, 0, 1, 1),
                (-1, 1, -9, -9): (-2, 10, -1, -1),
            },
        ),
        ("Whole", 4, (), {(-1, 1, 0.5, -0.26): (0, 10, 8, 4), (9, -9, 0, 0): (10, 0, 5, 5)}),
        (  # bounds +-1e10, +-3e38, [0.5, 1e6], +-9e5: only the last are bounds
            "Unlimited",
            4,
            (),
            {
                (0.5, 0.5, 0.75, 0.5): (0.5, 0.5, 0.75, 450_000),
                (-3, 3, -1, -3): (-1, 1, 0.5, -900_000),
            },
        ),
        ("Discrete", 3, (3,), {(1, 0, 0): (1, 0, 0, 0), (0, 0, 1): (3, 0, 0, 0)}),
        ("Multi", 5, (2, 3), {(0, 1, 0, 0, 1): (1, 7, 0, 0), (1, 0, 1, 0, 0): (0, 5, 0, 0)}),
        ("Bits", 6, (2, 2, 2), {(0, 1, 1, 0, 0, 1): (1, 0, 1, 0)}),
    ],
)
def test_actions_that_the_environment_sees(kind, dim, classes, cases):
    envs = dummy(f"Echo{kind}")
    assert (envs.action_dim, envs.action_classes) == (dim, classes)
    space = gymnasium.make(f"dummy_envs:Echo{kind}-v0", disable_env_checker=True).action_space
    assert action_width(space) == action_width(dim) == action_width(torch.zeros(7, dim)) == dim
    envs.step(None)
    for action, received in cases.items():
        row = envs.step(torch.tensor([action], dtype=torch.float32))
        assert row["observation"][0].tolist() == list(received), action


def test_unlimited_actions_are_named():
    text = "actions 0, 1, 2: unlimited (bounds of 1e6 or more count as none), in [-1, 1]"
    assert text in dummy("EchoUnlimited", 2).notes
    notes = [note for name in ("Whole", "Discrete") for note in dummy(f"Echo{name}").notes]
    assert not any("unlimited" in note for note in notes)


# --- observations -----------------------------------------------------------------------------


def test_nested_observations_and_images():
    envs = dummy("Nested", image_size=16)
    row = envs.step(None)
    row = envs.step(torch.zeros(1, 2))
    shapes = {k: tuple(v.shape[1:]) for k, v in row.items() if v.ndim > 1}
    assert shapes == {
        "body.place": (4,),
        "body.alone": (1,),
        "eye": (16, 16, 3),
        "depth": (16, 16, 1),
        "bytes": (7,),
    }
    assert row["body.place"].tolist() == [[0.5, 1, 2, 1]]
    assert row["body.alone"].tolist() == [[1]]
    assert row["bytes"].tolist() == [[0, 1, 2, 3, 4, 5, 6]] and row["bytes"].dtype == torch.float32
    assert row["eye"].dtype == torch.uint8 and (row["depth"] == 7).all()
    assert (row["eye"][0, :, :7] == 0).all()  # resized: the left stays black, the right colored
    assert (row["eye"][0, :, 9:] == torch.tensor([10, 20, 30], dtype=torch.uint8)).all()


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1"])
def test_categories_of_gymnasium(env_id):
    """Rows of the toy-text environments against gymnasium.make, with the same seeds and actions."""
    envs, gym = Envs(env_id, seed=5), gymnasium.make(env_id)
    blackjack = env_id == "Blackjack-v1"  # a Tuple of the player's sum, the dealer's card, an ace
    size = {"FrozenLake-v1": 16, "Taxi-v4": 500, "CliffWalking-v1": 48}.get(env_id)
    sizes = {"0": [32], "1": [11], "2": [2]} if blackjack else {"observation": [size]}
    assert envs.spec["categories"] == sizes
    assert envs.spec["shapes"] == {key: [1] for key in sizes}
    example = example_rows(envs.spec)
    episode, over, generator = -1, True, torch.Generator().manual_seed(0)
    for _ in range(60):
        action = torch.rand(1, envs.action_dim, generator=generator)
        row = envs.step(action)
        assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
            k: (v.shape, v.dtype) for k, v in example.items()
        }
        episode += over
        if over:
            obs, over = gym.reset(seed=episode_seed(5, 0, episode))[0], False
        else:
            obs, reward, terminal, truncated, _ = gym.step(int(action.argmax()))
            over = terminal or truncated
            assert row["reward"].item() == np.float32(reward)
        numbers = dict(zip("012", obs, strict=True)) if blackjack else {"observation": obs}
        assert {key: row[key].tolist() for key in sizes} == {k: [[n]] for k, n in numbers.items()}
        assert all(row[key].dtype == torch.int32 for key in sizes)


@pytest.mark.parametrize("env_workers", [False, True])
def test_categories_of_every_kind(env_workers):
    """Values count from 0, whatever their `start`; Tuples are Dicts whose keys are numbers."""
    envs = dummy("Categories", env_workers=env_workers)
    sizes = {"1": [4], "2.bits.0": [2] * 4, "3": [2, 3, 4, 5]}
    assert envs.spec["categories"] == sizes
    assert envs.spec["shapes"] == {key: [len(n)] for key, n in sizes.items()}
    assert envs.notes == [
        "1: categories, 4 in all", "2.bits.0: categories, 8 in all",
        "3: categories, 14 in all", "0: text, left out",
    ]  # fmt: skip
    for count in range(3):
        row = envs.step(torch.zeros(1, 2))
        assert row["1"].tolist() == [[count]]
        assert row["2.bits.0"].tolist() == [[0, 1, 1, count % 2]]
        assert row["3"].tolist() == [[1, 2, count, 0]]
    envs.close()


def test_what_minigrid_observes():
    envs = dummy("Grid")
    assert envs.notes == [
        "direction: categories, 4 in all", "image: vector of 147", "mission: text, left out"
    ]  # fmt: skip
    envs.step(None)
    row = envs.step(torch.zeros(1, 2))
    assert row["image"].shape == (1, 147) and (row["image"] == 1).all()
    assert row["direction"].tolist() == [[3]] and "mission" not in row.keys()


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((64, 48, 3), "uint8", "picture 64 x 64 x 3"),
        ((16, 16), "uint8", "picture 64 x 64 x 1"),
        ((20, 20, 4), "uint8", "picture 64 x 64 x 4"),
        ((15, 40, 3), "uint8", "vector of 1,800; warning"),
        ((8, 8, 12), "uint8", "vector of 768"),
        ((32, 32), "uint16", "vector of 1,024"),
        ((32, 33), "float32", "vector of 1,056; warning"),
        ((3, 64, 64), "uint8", "vector of 12,288; warning"),
        ((2, 20, 20, 3), "uint8", "vector of 2,400; warning"),
    ],
)
def test_what_counts_as_a_picture(shape, dtype, kind):
    values = np.full(shape, 7, dtype)
    envs = given(spaces.Box(0, 255, shape, dtype), values)
    (note,) = envs.notes
    assert note.partition(": many")[0] == f"observation: {kind}"
    row, picture = envs.step(None)["observation"], kind.startswith("picture")
    assert row.dtype == (torch.uint8 if picture else torch.float32) and (row == 7).all()
    channels = (*shape, 1)[2]
    assert row.shape == ((1, 64, 64, channels) if picture else (1, values.size))


def test_unused_observations_may_be_anything():
    """Text beside an image; a slash in a key, as in DM Control's locomotion tasks."""
    envs = dummy("Mission", obs="pixels")
    assert set(envs.step(None).keys()) == {
        *("reward", "is_first", "is_last", "is_terminal", "pixels")
    }
    with pytest.raises(RunError, match=r"'seen' of .*Varying-v0, Sequence.* is not supported"):
        dummy("Varying")
    with pytest.raises(RunError, match=r"observes nothing but images or text: observation"):
        given(spaces.Text(9))
    envs = dummy("Slash")
    assert envs.step(None)["walker.joints"].shape == (1, 2)


@pytest.mark.parametrize("name", ["observation_space", "action_space"])
@pytest.mark.parametrize("space", [None, spaces.Box(-1, 1, (0,))])
def test_missing_and_empty_spaces_are_refused(name, space):
    kind = type("Odd", (dummy_envs.Base,), {name: space})
    text = f"^{name[:6]}.* of Made-v0, {re.escape(str(space))}, is not supported"
    with pytest.raises(RunError, match=text):
        made(kind)


@pytest.mark.parametrize(
    "key", [*RESERVED, ".saves", "../../../x", "a//b", "a\\b", "x" * 201, "é" * 101]
)
def test_names_of_observations(key):
    name = re.escape(repr(key[:60].replace("/", ".")))
    with pytest.raises(RunError, match=f"Made-v0 has an observation named {name}: rename it"):
        given(spaces.Dict({key: spaces.Box(0, 1, (2,))}))


def test_two_observations_of_one_name():
    box = spaces.Box(0, 1, (2,))
    with pytest.raises(RunError, match=r"named 'a\.b': rename it \(two observations have it,"):
        given(spaces.Dict({"a": spaces.Dict({"b": box}), "a.b": box}))
    with pytest.raises(RunError, match=r"named 'pixels': rename it \(two observations have it,"):
        made(dummy_envs.Given, obs="both", space=spaces.Dict({"pixels": box}), values=())
    for other in (spaces.Text(9), spaces.Box(0, 255, (16, 16, 3), np.uint8)):  # left out
        with pytest.raises(RunError, match=r"named 'a\.b': rename it"):
            both = spaces.Dict({"a": spaces.Dict({"b": box}), "a.b": other})
            made(dummy_envs.Given, obs="vector", space=both, values=())
    names = ["next step", "state.x", "θ", "hand-1(x)", "x" * 200]
    envs = given(spaces.Dict(dict.fromkeys(names, box)), dict.fromkeys(names, np.ones(2)))
    row = envs.step(None)
    assert all(row[name].tolist() == [[1, 1]] for name in names)


# --- what an environment gives against what it declared ---------------------------------------

PICTURE = spaces.Box(0, 255, (16, 16, 3), np.uint8)
PLACE = spaces.Box(-1, 1, (3,), np.float32)
BEYOND = np.zeros((16, 16, 3), np.int64)
BEYOND[3, 2, 1] = 300


@pytest.mark.parametrize(
    ("space", "value", "received"),
    [
        (PICTURE, np.full((16, 16, 3), 0.5), r"float64 of shape \(16, 16, 3\): .*0.5 0.5"),
        (PICTURE, np.ones((16, 16, 3)), r"float64 of shape \(16, 16, 3\): .*1. 1."),
        (PICTURE, BEYOND, r"int64 of shape \(16, 16, 3\): .*0 0"),
        (PICTURE, -BEYOND, r"int64 of shape \(16, 16, 3\): .*0 0"),
        (PICTURE, np.zeros((3, 16, 16), np.uint8), r"uint8 of shape \(3, 16, 16\): .*0 0"),
        (PLACE, np.zeros(1), r"float64 of shape \(1,\): \[0.\]"),
        (PLACE, np.zeros((3, 1), np.float32), r"float32 of shape \(3, 1\): \[\[0.\]"),
        (PLACE, [[1], [2, 3]], r"object of shape \(\): None"),
        (PLACE, ["1", "2", "3"], r"<U1 of shape \(3,\): \['1' '2' '3'\]"),
        (PLACE, None, r"object of shape \(\): None"),
        (spaces.Discrete(3), 3, r"int64 of shape \(\): 3"),
        (spaces.Discrete(3, start=5), 4, r"int64 of shape \(\): 4"),
        (spaces.Discrete(3), 0.5, r"float64 of shape \(\): 0.5"),
        (spaces.Discrete(3), np.nan, r"float64 of shape \(\): nan"),
        (spaces.MultiDiscrete([2, 3]), [2, 1], r"int64 of shape \(2,\): \[2 1\]"),
        (spaces.MultiBinary(2), [0, -1], r"int64 of shape \(2,\): \[ ?0 -1\]"),
    ],
)
def test_an_environment_gives_what_it_has_not_declared(space, value, received):
    """At the step where it happens; the error names key, declared, received."""
    for key, tree in (("observation", space), ("a.b", spaces.Dict(a=spaces.Dict(b=space)))):
        good, bad = ({"a": {"b": x}} if key == "a.b" else x for x in (space.sample(), value))
        envs = given(tree, good, bad)
        envs.step(None)
        declared = re.escape(str(space)[:20])
        text = f"observation '{key}' of Made-v0 is declared {declared}.*, but is {received}"
        with pytest.raises(EnvError, match=f"{text}.*step 1 of environment 0 .episode 0"):
            envs.step(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("space", "value", "stored"),
    [
        (PLACE, np.array([1e9, 0.1, -2]), [1e9, np.float32(0.1), -2]),  # of a well-known fault
        (PLACE, [1, 2, 3], [1, 2, 3]),
        (PICTURE, np.full((16, 16, 3), 255), [[[255] * 3] * 64] * 64),
        (spaces.Discrete(3, start=5), np.float64(7), [2]),
        (spaces.MultiBinary(2), [True, False], [1, 0]),
    ],
)
def test_what_storing_does_not_change_is_no_fault(space, value, stored):
    assert given(space, value).step(None)["observation"][0].tolist() == stored


def test_missing_parts_of_an_observation():
    pair = spaces.Dict({"a": PLACE, "b": spaces.Tuple([PLACE, PLACE])})
    for value in ({"a": np.zeros(3)}, {"a": np.zeros(3), "b": (np.zeros(3),)}, np.zeros(3)):
        with pytest.raises(
            EnvError, match=r"'(a|b.[01])' .* is declared Box.*, but is object of shape"
        ):
            given(pair, value).step(None)
    assert given(pair, {"a": PLACE.sample(), "b": [np.ones(3)] * 2, "c": None}).step(None)[
        "b.1"
    ].tolist() == [[1, 1, 1]]


def test_workers_check_what_an_environment_gives(capfd):
    """The same error as without workers, and no traceback of ours."""
    messages = []
    for env_workers in (False, True):
        envs = dummy("FloatPicture", env_workers=env_workers)
        with pytest.raises(EnvError, match=r"(?s)uint8.*float32 of shape \(64, 64, 3\)") as caught:
            envs.step(None)
        messages.append(str(caught.value))
        envs.close()
    assert messages[0] == messages[1] and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "step", "received"),
    [
        ("OldStep", 1, r"returned \(array.*, 1.0, False, {}\)"),
        ("OldStepLimit", 1, "not enough values to unpack"),  # in gymnasium's TimeLimit
        ("OldReset", 0, r"returned array\("),
        ("OldSeed", 0, "unexpected keyword argument 'seed'"),
        ("RewardArray", 1, r"returned \(array.*, array\(\[1.\]\), False, False, {}\)"),
    ],
)
def test_the_old_api_of_gym_is_named(name, step, received):
    envs = dummy(name)
    with pytest.raises(
        EnvError, match=f"(?s){received}.*old gym.*gymnasium's reset.*info.*step"
    ) as caught:
        [envs.step(torch.zeros(1, 2)) for _ in range(2)]
    assert f"at step {step} of environment 0 (episode 0)" in str(caught.value)


def test_an_error_of_the_environment_is_not_taken_for_the_old_api():
    class Unpacks(dummy_envs.Base):
        def step(self, action):
            one, two, three = action
            return one, two, three

    envs = made(Unpacks)
    envs.step(None)
    with pytest.raises(EnvError, match="not enough values") as caught:
        envs.step(torch.zeros(1, 2))
    assert "gymnasium's" not in str(caught.value)


def test_obs_modes():
    def keys(name, obs):
        row = dummy(name, obs=obs, image_size=16).step(None)
        return {k for k, _ in row.items() if k != "reward" and k[:3] != "is_"}

    vectors = {"body.place", "body.alone", "bytes"}
    assert keys("Nested", "vector") == vectors
    assert keys("Nested", "pixels") == {"pixels"}
    assert keys("Nested", "both") == vectors | {"eye", "depth", "pixels"}
    assert keys("Picture", "pixels") == {"pixels"} and keys("Picture", "auto") == {"observation"}
    seen = dummy("Mission", obs="pixels", image_size=16).step(None)["pixels"]
    assert (seen[0, :, 9:] == torch.tensor([10, 20, 30])).all()  # its one image, not its render()
    envs = dummy("Nested", 2, obs="pixels", image_size=16, video_size=24)
    envs.step(None)
    row = envs.step(torch.zeros(2, 2))
    assert envs.can_render and (row["pixels"] == 1).all() and row["pixels"].shape == (2, 16, 16, 3)
    frame = envs.frame()
    assert frame.shape == (24, 24, 3) and frame.dtype == np.uint8 and (frame == 1).all()


def test_videos_are_optional():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        envs = dummy("Base", video_size=32)
    assert not envs.can_render and envs.step(None)["is_first"].all()
    assert not any("egl" in str(w.message) for w in caught)  # MuJoCo is not the problem
    with pytest.raises(RunError, match=r"Base-v0 cannot be rendered.*rgb_array"):
        dummy("Base", obs="pixels")


@pytest.mark.parametrize(
    "frame, color",
    [
        (np.full((9, 7, 4), (10, 20, 30, 99), np.uint8), (10, 20, 30)),
        (np.full((9, 7), 40, np.uint8), (40, 40, 40)),
        (np.full((9, 7, 1), 50, np.uint8), (50, 50, 50)),
        (np.full((9, 7, 3), (0.2, 1, 0)), (51, 255, 0)),
        (np.full((9, 7, 3), (0.2, 60.4, 300), np.float32), (0, 60, 255)),
        (np.full((9, 7, 3), (np.nan, 0, 1)), (0, 0, 255)),
        (np.full((9, 7, 3), (-1, 70, 256)), (0, 70, 255)),
        (np.full((9, 7), True), (255, 255, 255)),
    ],
)
def test_pictures_of_every_kind(frame, color, monkeypatch):
    """In a video and as an observation; the size may change at each step."""
    small, large = frame, np.repeat(np.repeat(frame, 2, 0), 3, 1)
    monkeypatch.setattr(dummy_envs.Film, "frames", [small, large])
    envs = dummy("Film", obs="pixels", image_size=16, video_size=24)
    for action in (None, torch.zeros(1, 2)):
        row, film = envs.step(action), envs.frame()
        assert row["pixels"].shape == (1, 16, 16, 3) and row["pixels"].dtype == torch.uint8
        assert (row["pixels"] == torch.tensor(color)).all()
        assert film.shape == (24, 24, 3) and film.dtype == np.uint8 and (film == color).all()


@pytest.mark.parametrize("frame", [None, np.zeros((3, 9, 7)), np.zeros(9), np.array([["a"]])])
def test_what_is_no_picture(frame, monkeypatch):
    monkeypatch.setattr(dummy_envs.Film, "frames", [frame])
    with pytest.raises(RunError, match=r"Film-v0 cannot be rendered.*render\(\) gave .*shape"):
        dummy("Film", obs="pixels")
    with pytest.warns(UserWarning, match=r"Film-v0 cannot be rendered.*render\(\) gave"):
        assert not dummy("Film", video_size=8).can_render


def test_a_render_that_fails(capfd):
    """A film goes without the frame; where the frame is the observation, it is an error."""
    envs = dummy("Film", video_size=8)
    assert envs.can_render and envs.step(None)["reward"].tolist() == [0]
    assert (envs.frame() == 9).all()
    assert envs.step(torch.zeros(1, 2))["reward"].tolist() == [1]
    with pytest.raises(RunError, match=r"Film-v0 cannot be rendered: OSError.*graphics are gone"):
        envs.frame()
    assert envs.step(torch.zeros(1, 2))["reward"].tolist() == [2]
    assert (envs.frame() == 9).all()
    text = capfd.readouterr().err
    assert "in render\n" in text and "OSError: the graphics are gone" in text
    envs = dummy("Film", obs="pixels")
    assert (envs.step(None)["pixels"] == 9).all()
    with pytest.raises(EnvError, match=error_pattern(1, 0, 0, "OSError('the graphics are gone')")):
        envs.step(torch.zeros(1, 2))


@pytest.mark.parametrize(
    "name, words",
    [
        ("Varying", ["'seen'", "Varying-v0", "Sequence", "TransformObservation"]),
        ("EchoTuple", ["EchoTuple-v0", "Tuple", "TransformAction"]),
    ],
)
def test_unsupported_spaces(name, words):
    with pytest.raises(RunError) as caught:
        dummy(name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_options_are_checked():
    with pytest.raises(KeyError, match="images"):
        dummy("Base", obs="images")
    with pytest.raises(RunError, match="Picture-v0 observes nothing but images or text: observat"):
        dummy("Picture", obs="vector")
    with pytest.raises(TypeError, match=r"repeat"):
        dummy("Base", repeat=2)


def test_environments_of_a_script():
    """Flags set the options of the same name; keywords override; no --obs, no images."""
    flags = dict(env_id="dummy_envs:Nested-v0", num_envs=2, seed=3, action_repeat=2, lr=1.0)
    args = SimpleNamespace(**flags)
    envs, expected_envs = make_envs(args), dummy("Nested", 2, seed=3, obs="vector", action_repeat=2)
    assert (envs.num_envs, set(envs.spec["shapes"])) == (2, {"body.place", "body.alone", "bytes"})
    assert same(envs.step(None), expected_envs.step(None)) and not envs.can_render
    row = envs.step(torch.zeros(2, 2))
    assert row["reward"].tolist() == [3, 3]
    changed = make_envs(
        args, num_envs=1, action_repeat=1, obs="pixels", image_size=16, video_size=8
    )
    changed.step(None)
    row = changed.step(torch.zeros(1, 2))
    assert row["reward"].tolist() == [1] and row["pixels"].shape == (1, 16, 16, 3)
    assert changed.can_render and changed.frame().shape == (8, 8, 3)
    args.obs, args.image_size = "both", 24
    assert make_envs(args).step(None)["eye"].shape == (2, 24, 24, 3)
    base = SimpleNamespace(env_id="dummy_envs:Base-v0", seed=8)
    luck = np.random.default_rng(episode_seed(8, 0, 0)).random()
    assert make_envs(base).step(None)["observation"].tolist() == [[0, np.float32(luck)]]
    luck = np.random.default_rng(episode_seed(9, 0, 0)).random()
    assert make_envs(base, seed=9).step(None)["observation"].tolist() == [[0, np.float32(luck)]]


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("env_workers", [False, True])
def test_not_finite(env_workers):
    envs = dummy("NotFinite", env_workers=env_workers)
    for _ in range(3):
        envs.step(torch.zeros(1, 2))
    message = "observation 'velocity' of .*NotFinite-v0 is not finite at step 3 of environment 0"
    with pytest.raises(EnvError, match=message):
        envs.step(torch.zeros(1, 2))
    envs.close()


def test_reward_not_finite():
    envs = dummy("NotFiniteReward")
    with pytest.raises(EnvError, match=r"reward of .*NotFiniteReward-v0 is not finite at step 3"):
        [envs.step(torch.zeros(1, 2)) for _ in range(4)]


def error_pattern(step, env, episode, error="OSError('the simulator is gone')"):
    """The pattern of an EnvError's whole message; `env` may be a pattern, too."""
    error, where = re.escape(error), rf"of environment {env} \(episode {episode}\)"
    return f"^{error} was raised at step {step} {where}$"


@pytest.mark.parametrize("env_workers", [False, True])
def test_an_environment_that_raises(env_workers, monkeypatch, capfd):
    """It is not rebuilt; the state before the error can be saved, and a run resumes there."""
    envs = dummy("Raises", 2, env_workers=env_workers, seed=1)
    rows = [envs.step(None)] + [envs.step(torch.zeros(2, 2)) for _ in range(2)]
    assert [r["observation"][0, 0].item() for r in rows] == [0, 1, 2]
    before = envs.state_dict()
    raising = "[01]" if env_workers else 0  # gymnasium raises the error that arrives last
    with pytest.raises(EnvError, match=error_pattern(3, raising, 0)):
        envs.step(torch.ones(2, 2))
    state = envs.state_dict()
    assert state["episodes"] == before["episodes"] == [0, 0]
    for saved, expected in zip(state["actions"], before["actions"], strict=True):
        assert torch.equal(saved, expected) and saved.shape == (2, 2) and not saved.any()
    assert all(torch.equal(state["row"][key], before["row"][key]) for key in before["row"])
    envs.close()
    resumed = dummy("Raises", 2, env_workers=env_workers, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
    with pytest.raises(EnvError, match=error_pattern(3, raising, 0)):  # the same seed raises again
        resumed.step(torch.ones(2, 2))
    resumed.close()
    if not env_workers:
        stderr = capfd.readouterr().err
        assert stderr.count("OSError: the simulator is gone") == 2
        monkeypatch.setattr(dummy_envs.Raises, "broken", False)
        mended = dummy("Raises", 2, seed=1)
        mended.load_state_dict(state)
        row = mended.step(torch.zeros(2, 2))
        assert row["reward"].tolist() == [3, 3] and not row["is_first"].any()
        assert torch.equal(row["observation"][:, 1], rows[0]["observation"][:, 1])


RAISE = """
import sys, torch
from common.checkpoint import RunError
from common.envs import Envs
if __name__ == "__main__":
    envs = Envs("dummy_envs:Raises-v0", 2, env_workers=sys.argv[1] == "True")
    try:
        for _ in range(4):
            envs.step(torch.zeros(2, 2))
    except Exception as error:
        print(type(error).__module__, type(error).__name__, error)
    envs.close()
"""


@pytest.mark.parametrize("env_workers", [False, True])
def test_the_traceback_of_an_environment_is_shown(env_workers, tmp_path):
    """The process that ran the environment prints it, once for each that raised."""
    (tmp_path / "script.py").write_text(RAISE)
    command = [sys.executable, tmp_path / "script.py", str(env_workers)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    kind, _, text = process.stdout.rstrip("\n").partition(" EnvError ")
    assert kind == "common.checkpoint", process.stderr
    assert re.search(error_pattern(3, "[01]" if env_workers else 0, 0), text), process.stdout
    stderr = process.stderr
    count = 2 if env_workers else 1  # a lone process stops at the first
    assert stderr.count('raise OSError("the simulator is gone")') == count, stderr
    assert stderr.count("Traceback (most recent call last)") == count, stderr
    assert "dummy_envs.py" in stderr and "in step" in stderr


@pytest.mark.parametrize("env_workers", [False, True])
@pytest.mark.parametrize(
    ("name", "rows", "place"),  # an episode has 6 rows
    [
        ("RaisesLater", 9, (3, 0, 1)),
        ("RaisesInReset", 0, (0, 0, 0, "OSError('no simulator')")),
        ("RaisesInResetLater", 6, (0, 0, 1, "OSError('no simulator')")),
    ],
)
def test_errors_name_the_episode_and_its_step(name, rows, place, env_workers):
    """Also in a reset; the state to save is that of the last good row."""
    envs = dummy(name, env_workers=env_workers)
    for _ in range(rows):
        envs.step(torch.zeros(1, 2))
    with pytest.raises(EnvError, match=error_pattern(*place)):
        envs.step(torch.zeros(1, 2))
    saved = envs.state_dict()
    assert saved["episodes"] == [1 if rows > 6 else 0]
    assert (saved["row"] is None) == (rows == 0)
    assert saved["actions"][0].shape == (max(0, rows - 1) % 6, 2)
    envs.close()


def test_errors_name_the_environment():
    envs = dummy("Raises", 3)
    for env in envs._vector.envs[:2]:
        env.env.unwrapped.broken = False
    with pytest.raises(EnvError, match=error_pattern(3, 2, 0)):
        [envs.step(torch.zeros(3, 2)) for _ in range(4)]


def test_a_killed_worker_is_named():
    envs = dummy("Base", 2, env_workers=True)
    envs.step(None)
    envs._vector.processes[1].kill()
    envs._vector.processes[1].join()
    with pytest.raises(RunError, match=r"worker of dummy_envs:Base-v0 was killed"):
        envs.step(torch.zeros(2, 2))
    assert len(envs.state_dict()["actions"]) == 2  # the parent can still save
    envs.close()


def test_unknown_ids_and_missing_packages(monkeypatch):
    with pytest.raises(RunError, match=r"unknown environment 'CartPol-v1'.*CartPole-v1"):
        Envs("CartPol-v1")
    with pytest.raises(RunError, match=r"Similar: .*dummy_envs:Base-v0"):
        Envs("dummy_envs:Bas-v0")
    with pytest.raises(RunError, match=r"no_module_of_mine"):
        Envs("no_module_of_mine:Some-v0")
    with pytest.raises(RunError, match=r"NoModule-v0 needs a package.*a_module_that_is_not_here"):
        dummy("NoModule")

    def missing(*modules):
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)

    missing("dm_control")
    with pytest.raises(RunError, match=r"walker-walk-v0 needs.*shimmy dm-control .*3\.12 or"):
        Envs("dm_control/walker-walk-v0")
    missing("ale_py", "crafter")
    with pytest.raises(RunError, match=r"ALE/Pong-v5 needs.*pip install ale-py"):
        Envs("ALE/Pong-v5")
    with pytest.raises(RunError, match=r"crafter/Reward-v0 needs.*pip install crafter"):
        Envs("tools.crafter_env:crafter/Reward-v0")
    for name in [name for name in sys.modules if "gymnasium.envs.mujoco" in name]:
        monkeypatch.delitem(sys.modules, name)
    missing("mujoco")
    with pytest.raises(RunError, match=r'Ant-v5 needs.*pip install "gymnasium\[mujoco\]"'):
        Envs("Ant-v5")
    missing("Box2D")
    with pytest.raises(RunError, match=r'LunarLander-v3 needs.*pip install "gymnasium\[box2d\]"'):
        Envs("LunarLander-v3")


@needs_dmc
def test_unknown_dm_control_task():
    for name in ("dm_control/walker-wlak-v0", "walker_walk", "dmc/Walker-Walk-v0"):
        with pytest.raises(RunError, match=f"'{name}'.*dm_control/walker-walk-v0"):
            Envs(name)


@needs("ale_py")
def test_similar_ids_of_other_namespaces():
    for name in ("Pong-v5", "pong-v5", "ale/Pong-v5"):
        with pytest.raises(RunError, match=f"'{name}'.*Similar: ALE/Pong-v5"):
            Envs(name)
    with pytest.raises(RunError, match=r"doesn't exist\. Similar: none"):
        Envs("zzz")


def test_arguments_of_the_constructor():
    envs = dummy("EchoBox", env_kwargs='{"kind": "multi", "max_episode_steps": 3}')
    assert envs.action_classes == (2, 3)
    rows = [envs.step(torch.zeros(1, 5)) for _ in range(4)]
    assert [row["is_last"].item() for row in rows] == [False, False, False, True]
    for text in ("[1]", "8", "{kind", "null"):
        pattern = re.escape(f"--env-kwargs {text} must be a JSON object")
        with pytest.raises(RunError, match=pattern):
            dummy("EchoBox", env_kwargs=text)
    for key in ("size", "id", "disable_env_checker"):
        pattern = rf"with --env-kwargs .*made: TypeError.*argument \\?'{key}\\?'"
        with pytest.raises(RunError, match=pattern):
            dummy("EchoBox", env_kwargs=f'{{"{key}": 8}}')
    with pytest.raises(RunError, match=r"with --env-kwargs .*Base\(\) takes no arguments"):
        dummy("Base", env_kwargs='{"size": 8}')  # a class without __init__
    with pytest.raises(RunError, match=r"""with --env-kwargs {"kind": "x"} .*made: KeyError"""):
        dummy("EchoBox", env_kwargs='{"kind": "x"}')


OWN = """
import gymnasium, sys
sys.imported = sys.imported + [__name__] if hasattr(sys, "imported") else [__name__]
gymnasium.register("Own-v0", "dummy_envs:Base")
"""


def test_workers_do_not_start_in_a_run_folder(tmp_path, monkeypatch):
    """Python imports modules of the current folder into them."""
    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="--env-workers imports from the current folder"):
        Envs("CartPole-v1", env_workers=True)
    Envs("CartPole-v1").close()


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    """It is found, but never in a run folder, of which the module's packages know nothing."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "imported", [], raising=False)
    run = tmp_path / "runs" / "seed0"
    for folder in (tmp_path, run, run / "deep", run / "package"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"own_{folder.name.split('_')[0]}.py").write_text(OWN)
    (run / "package" / "__init__.py").write_text(OWN)
    (run / "checkpoint.pt").touch()
    monkeypatch.chdir(tmp_path)
    name = next(tmp_path.glob("own_*.py")).stem
    assert Envs(f"{name}:Own-v0").step(None)["observation"].shape == (1, 2)
    assert sys.imported == [name]
    refused = "is not imported: .*seed0.* would lie in a run folder"
    for module in ("runs.seed0.own_seed0", "runs.seed0.package.own_package"):
        with pytest.raises(RunError, match=refused):
            Envs(f"{module}:Own-v0")
    for folder, module in ((run, "own_seed0"), (run / "deep", "own_deep")):
        monkeypatch.chdir(folder)
        with pytest.raises(RunError, match=f"needs a package: No module named '{module}'"):
            Envs(f"{module}:Own-v0")
        assert str(folder) not in sys.path
        with monkeypatch.context() as context, pytest.raises(RunError, match=refused):
            context.syspath_prepend(folder)
            Envs(f"{module}:Own-v0")
    assert sys.imported == [name]
    for env_id in (":Own-v0", ".own:Own-v0", "a:b:Own-v0"):
        with pytest.raises(RunError, match=f"{env_id} (cannot be made|needs a package)"):
            Envs(env_id)


def test_mistakes_in_an_environment_are_not_opengl(monkeypatch, capfd):
    """ "angle" contains "gl"; the author needs the traceback."""
    monkeypatch.setitem(sys.modules, "mujoco", sys)  # as if it were imported
    error = AttributeError("'Bug' object has no attribute 'angle'")
    with pytest.raises(RunError) as caught:
        dummy("Bug")
    assert str(caught.value) == f"dummy_envs:Bug-v0 cannot be made: {error!r}"
    text = capfd.readouterr().err
    assert "in __init__\n    self.turn = self.angle\n" in text and "dummy_envs.py" in text
    monkeypatch.setattr(dummy_envs.Film, "frames", [error])
    with pytest.warns(UserWarning) as caught:
        dummy("Film", video_size=8)
    expected = f"dummy_envs:Film-v0 cannot be rendered: {error!r}"
    assert [str(warning.message) for warning in caught] == [expected]
    assert "in render\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text",  # as MuJoCo, DM Control and PyOpenGL have them
    [
        "'NoneType' object has no attribute 'glGetError'",
        "'NoneType' object has no attribute 'eglQueryString'",
        "Cannot initialize a headless EGL display.",
        "No OpenGL rendering backend is available.",
        "an OpenGL platform library has not been loaded into this process",
        "gladLoadGL error",
        "invalid value for environment variable MUJOCO_GL: nonsense",
        "libGL.so.1: cannot open shared object file",
    ],
)
def test_errors_of_opengl(text):
    assert GL_ERROR.search(text)
    assert not GL_ERROR.search("a single global toggle of GLOBAL, 'glue', eagle, ugly and Google")


# --- resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("env_workers", [False, True])
@pytest.mark.parametrize(
    "env_id",
    ["CartPole-v1", "Pendulum-v1", pytest.param("dm_control/walker-walk-v0", marks=needs_dmc)],
)
def test_resume_continues_bit_identically(env_id, env_workers, tmp_path):
    generator = torch.Generator().manual_seed(1)
    envs = Envs(env_id, 2, seed=2, env_workers=env_workers)
    actions = torch.rand(280, 2, envs.action_dim, generator=generator) * 3 - 1.5
    for t in range(230):  # the second episode of Pendulum, one of many of CartPole
        envs.step(actions[t])
    torch.save(envs.state_dict(), tmp_path / "state.pt")
    expected = [envs.step(actions[t]) for t in range(230, 280)]
    envs.close()
    envs = Envs(env_id, 2, seed=2, env_workers=env_workers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(same(row, envs.step(actions[t + 230])) for t, row in enumerate(expected))
    envs.close()


@pytest.mark.parametrize("rows", [0, 1, 4, 6, 7])
def test_resume_at_every_kind_of_row(rows):
    """Before the first row, after a reset, in the middle, after is_last, after the next reset."""
    options = {"seed": 4, "obs": "both", "image_size": 16}
    envs, other = dummy("Nested", 2, **options), dummy("Nested", 2, **options)
    for _ in range(rows):
        envs.step(torch.zeros(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(envs.state_dict())
    for _ in range(8):
        assert same(envs.step(torch.ones(2, 2)), other.step(torch.ones(2, 2)))
    actions, other_actions = (e.state_dict()["actions"] for e in (envs, other))
    assert all(torch.equal(a, b) for a, b in zip(actions, other_actions, strict=True))
    with pytest.raises(RunError, match=r"num_envs=2, not 1"):
        dummy("Nested").load_state_dict(envs.state_dict())


def test_non_deterministic_environment_warns_and_goes_on():
    envs, other = dummy("Random"), dummy("Random")
    for _ in range(6):
        row = envs.step(torch.zeros(1, 2))
    assert row["is_last"].all()
    with pytest.warns(
        UserWarning, match=r"environment 0 of dummy_envs:Random-v0 is not determinist"
    ):
        other.load_state_dict(envs.state_dict())
    assert other.step(torch.zeros(1, 2))["is_first"].all()


# --- DM Control, MuJoCo, Atari, Crafter -------------------------------------------------------


@needs_dmc
def test_dm_control_episode_is_1001_rows():
    from dm_control import suite

    envs = Envs("dm_control/walker-walk-v0", seed=6)
    assert (envs.action_dim, envs.action_classes) == (6, ())
    dmc_env = suite.load("walker", "walk", task_kwargs={"random": episode_seed(6, 0, 0)})
    low, high = dmc_env.action_spec().minimum, dmc_env.action_spec().maximum
    assert (low == -1).all() and (high == 1).all()
    generator, step = np.random.default_rng(0), dmc_env.reset()
    row, total = envs.step(None), 0
    for t in range(1001):
        assert row["is_first"].item() == (t == 0) and row["is_last"].item() == (t == 1000)
        assert not row["is_terminal"].item() and row["reward"].item() == np.float32(
            step.reward or 0
        )
        for key, value in step.observation.items():
            np.testing.assert_array_equal(row[key][0], np.float32(value).ravel())
        total += row["reward"].item()
        action = generator.uniform(-1, 1, 6).astype(np.float32)
        row = envs.step(torch.from_numpy(action)[None])
        step = dmc_env.step(action.astype(np.float64)) if t < 1000 else step
    assert row["is_first"].item() and row["reward"].item() == 0 and total > 0
    assert row["height"].shape == (1, 1)  # a scalar in DM Control


@needs_dmc
def test_vectors_make_no_renderer(monkeypatch):
    import mujoco
    import shimmy  # noqa: F401
    from dm_control import _render

    def fail(*args, **kwargs):
        raise AssertionError("an OpenGL renderer was made")

    monkeypatch.setattr(_render, "Renderer", fail)
    monkeypatch.setattr(mujoco, "MjrContext", fail)
    for env_id in ("dm_control/quadruped-walk-v0", "InvertedPendulum-v5"):
        envs = Envs(env_id)
        envs.step(None)
        envs.step(torch.zeros(1, envs.action_dim))
        with pytest.raises(RunError, match=r"renderer was made.*libegl1.*\n.*osmesa.*glfw"):
            Envs(env_id, obs="pixels")


@needs_gl
def test_pixels_of_dm_control():
    options = {"obs": "pixels", "seed": 1, "video_size": 100}
    envs, other = (Envs("dm_control/walker-walk-v0", **options) for _ in range(2))
    first = envs.step(None)
    assert set(first.keys()) == {"pixels", "reward", "is_first", "is_last", "is_terminal"}
    assert first["pixels"].shape == (1, 64, 64, 3) and first["pixels"].float().std() > 10
    for _ in range(5):
        row = envs.step(torch.ones(1, 6))
    assert not torch.equal(row["pixels"], first["pixels"])
    assert envs.can_render and envs.frame().shape == (100, 100, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(envs.state_dict())
    assert same(envs.step(torch.zeros(1, 6)), other.step(torch.zeros(1, 6)))
    envs.close()
    other.close()


@needs_gl
def test_cameras_and_quality():
    def pixels(**options):
        envs = Envs("dm_control/quadruped-walk-v0", obs="pixels", seed=1, **options)
        image = envs.step(None)["pixels"]
        envs.close()
        return image

    assert torch.equal(pixels(), pixels(camera=2)) and not torch.equal(pixels(), pixels(camera=0))
    full, fast = pixels(render_quality="full").float(), pixels(render_quality="fast").float()
    assert 0 < (full - fast).abs().mean() < 30


@needs_dmc
def test_a_camera_that_is_missing():
    """Found before anything is rendered: MuJoCo would end the process."""
    for env_id, count in (("dm_control/walker-walk-v0", 2), ("InvertedPendulum-v5", 0)):
        for camera in (count, -2):
            text = f"--camera {camera}: {env_id} has no such camera (it has {count}, counted"
            with pytest.raises(RunError, match=re.escape(text)):
                Envs(env_id, camera=camera)
        Envs(env_id, camera=count - 1).close()


@needs_gl
def test_gymnasium_mujoco_pixels_and_videos():
    envs = Envs("InvertedPendulum-v5", obs="both", video_size=96, image_size=48)
    row = envs.step(None)
    assert row["pixels"].shape == (1, 48, 48, 3) and row["observation"].shape == (1, 4)
    small, big = row["pixels"][0].float(), torch.tensor(envs.frame()).float()
    assert big.shape == (96, 96, 3) and big.std() > 10
    halves = big.view(48, 2, 48, 2, 3).mean((1, 3))
    assert (halves - small).abs().mean() < 12  # the same picture, larger
    envs.step(torch.ones(1, 1))
    envs.close()


PIXELS_AND_VECTORS = """
import warnings
from common.checkpoint import RunError
from common.envs import Envs
try:
    Envs("dm_control/walker-walk-v0", obs="pixels")
except RunError as error:
    assert all(fix in str(error) for fix in ("libegl1", "osmesa", "glfw")), error
else:
    raise SystemExit("it rendered")
warnings.simplefilter("ignore")
envs = Envs("dm_control/walker-walk-v0", video_size=32)
assert not envs.can_render and envs.step(None)["is_first"].all()
"""


def without_gl_choice():
    """The environment variables except those that choose MuJoCo's OpenGL."""
    return {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}


def in_process(code, environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_dmc
def test_without_opengl_libraries():
    """The error for pixels names the fixes; vectors need no OpenGL."""
    code = """
import ctypes
load = ctypes.CDLL.__init__
def fail(self, name=None, *args, **kwargs):
    if any(library in str(name) for library in ("EGL", "OSMesa")):
        raise OSError("no such library")
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = fail
"""
    process = in_process(code + PIXELS_AND_VECTORS, without_gl_choice())
    assert process.returncode == 0, process.stderr


@needs_gl
@needs_dmc
def test_opengl_without_a_device():
    """The same where a container has the library but no device."""
    environment = without_gl_choice() | {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    process = in_process(PIXELS_AND_VECTORS, environment)
    assert process.returncode == 0, process.stderr
    process = in_process(PIXELS_AND_VECTORS, environment | {"MUJOCO_GL": "egl"})  # set by the user
    assert "cannot be made" in process.stderr and "libegl1" in process.stderr, process.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has DISPLAY")
def test_pygame_without_a_display():
    """Pictures need no display; the search for one prints an error that looks like the run's."""
    code = "import os, common.envs; print(os.environ.get('SDL_VIDEODRIVER'))"
    names = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    without = {name: value for name, value in os.environ.items() if name not in names}
    for more, driver in (({}, "dummy"), ({"DISPLAY": ":0"}, "None")):
        assert in_process(code, without | more).stdout.split() == [driver]


@needs("ale_py", "cv2")
def test_atari():
    import ale_py

    envs = Envs("ALE/Pong-v5", action_repeat=4, video_size=120)
    assert envs.action_classes == (6,) and envs.can_render
    row = envs.step(None)
    assert row["observation"].shape == (1, 64, 64, 3) and row["observation"].dtype == torch.uint8
    for _ in range(30):
        row = envs.step(torch.eye(6)[2:3])
    assert envs.frame().shape == (120, 120, 3)
    other = Envs("ALE/Pong-v5", action_repeat=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(envs.state_dict())
    assert same(envs.step(torch.eye(6)[:1]), other.step(torch.eye(6)[:1]))
    gymnasium.register_envs(ale_py)
    assert Envs("ALE/Pong-v5", sticky=True, obs="pixels").action_classes == (18,)


@needs("crafter")
def test_crafter():
    import crafter

    envs = Envs("tools.crafter_env:crafter/Reward-v0", seed=1)
    assert envs.action_classes == (17,)
    row = envs.step(None)
    crafter_env = crafter.Env(seed=episode_seed(1, 0, 0))
    np.testing.assert_array_equal(row["observation"][0], crafter_env.reset())
    for _ in range(20):
        row = envs.step(torch.eye(17)[1:2])
        obs, reward, *_ = crafter_env.step(1)
        np.testing.assert_array_equal(row["observation"][0], obs)
        assert row["reward"].item() == np.float32(reward)
    envs._vector.envs[0].env.unwrapped.inner._player.health = 0
    row = envs.step(torch.eye(17)[:1])
    assert row["is_terminal"].all() and row["is_last"].all()
