"""Environments: any gymnasium id -> rows of TensorDict.

    envs = Envs("dm_control/walker-walk-v0", num_envs=4, seed=1)  # or "ALE/Pong-v5", "CartPole-v1"
    row = envs.step(None)
    row = envs.step(policy(row))

A row is one time step: the observation, the reward that arrived with it, is_first, is_last and
is_terminal. An episode of n steps gives n + 1 rows, the first one being the reset.
Your own is "my_module:MyEnv-v0", a gymnasium.Env that my_module registers. It observes Box,
Discrete, MultiDiscrete, MultiBinary or a (nested) Dict or Tuple of them; text is left out. A uint8
Box [H, W] or [H, W, C] with 1 to 4 channels and sides of at least 16 is an image (stored as uint8),
any other Box a vector (float32); the others are categories (int32), counted from 0. Its actions are
Box, Discrete, MultiDiscrete or MultiBinary.
"""

import contextlib
import ctypes
import difflib
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass, fields
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from textwrap import shorten

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from PIL import Image
from tensordict import TensorDict
from torch import Tensor

from common.checkpoint import EnvError, RunError

if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:  # read when mujoco is imported
    devices = ctypes.c_int()
    with contextlib.suppress(OSError):  # there may be no library, or one without a device
        find = ctypes.CDLL("libEGL.so.1").eglGetProcAddress
        find.restype = ctypes.CFUNCTYPE(ctypes.c_uint)
        if query := find(b"eglQueryDevicesEXT"):
            query(0, None, ctypes.byref(devices))
    os.environ["MUJOCO_GL"] = "egl" if devices.value else "disable"  # vectors need no OpenGL
if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else pygame complains about the display
GL_HELP = """; to render MuJoCo: apt-get install libegl1 libgl1 (no display needed);
apt-get install libosmesa6 and MUJOCO_GL=osmesa (CPU only); MUJOCO_GL=glfw on a desktop"""
GL_ERROR = re.compile(r"OpenGL|MUJOCO_GL|OSMesa|GLFW|GLError|\bEGL|\blibGL|\b(gl|egl|glad)[A-Z]")
UNLIMITED = 1e6  # an action's bound of this size says that there is none (DM Control: 1e10)
FLAGS = ("is_first", "is_last", "is_terminal")
LATENTS = ("belief", "state")
RESERVED = (  # what rows, batches, latents and dreams hold besides observations
    *FLAGS, *LATENTS, "_episode", "action", "continue", "done", "encoded_obs", "index", "next",
    "posterior_logits", "posterior_mean", "posterior_std", "previous",
    "prior_logits", "prior_mean", "prior_std", "reward", "true",
)  # fmt: skip
NUMBERS = "biuf"  # numpy's kinds of bool, int, unsigned int, float
RENDERED = ("pixels", None, spaces.Box(0, 255, (64, 64, 3), np.uint8))  # path None: render it
OLD_API = re.compile("expected 5, got 4|keyword argument 'seed'")  # of gymnasium's wrappers
NEW_API = (
    "is it written for the old gym? gymnasium's reset returns (observation, info), its step "
    "(observation, reward, terminated, truncated, info), the reward a plain number"
)
PACKAGES = {  # namespace of an id: the modules that register it, and what to install for them
    "dm_control": (("dm_control", "shimmy"), "shimmy dm-control (Python 3.12 or older)"),
    "ALE": (("ale_py",), "ale-py opencv-python"),
}


@dataclass
class Options:
    """Keyword arguments of `Envs`, named like the flags of the scripts."""

    env_kwargs: str = ""  # arguments of the environment's constructor, a JSON object
    action_repeat: int = 1  # inner steps per action, rewards are summed (Atari: frame skip)
    obs: str = "auto"  # auto: all; vector: no image; pixels: sole image/render; both: all + render
    image_size: int = 64  # images are resized to this square, MuJoCo renders at it
    env_workers: bool = False  # a process for each environment
    sticky: bool = False  # Atari: 25 % repeated actions and the full action set
    camera: int = -1  # of MuJoCo; -1: the default (dm_control: quadruped 2, rodent 4, else 0)
    render_quality: str = "fast"  # fast: MuJoCo without shadows and anti-aliasing; full: with them
    video_size: int = 0  # pixels per side of a video; 0: no video


class Envs:
    """`num_envs` environments stepped together; every episode has its own seed.

    `action_dim` is the width of an action: float32, continuous in [-1, 1] (clipped, then scaled
    to its bounds, if it has both) or one-hots of `action_classes` choices. `spec` is what the
    networks need to know, `notes` say what each observation is taken for, `options` are the fields
    of Options. RunError: unknown id, missing package, unsupported space, or no rendering. EnvError:
    an environment raised, or returned NaN, infinity or what it has not declared.
    """

    def __init__(self, env_id: str, num_envs: int = 1, seed: int = 0, **options):
        self.env_id, self.num_envs, self.options = env_id, num_envs, Options(**options)
        makers = [partial(_Rows, env_id, i, seed, self.options) for i in range(num_envs)]
        make = gymnasium.vector.SyncVectorEnv
        if self.options.env_workers:
            if _in_run_folder(os.getcwd()):
                raise RunError(
                    "--env-workers imports from the current folder, a run folder: leave it"
                )
            # Never a plain fork: it would copy threads, CUDA and EGL state.
            context = "forkserver" if hasattr(os, "fork") else "spawn"
            multiprocessing.set_forkserver_preload(["torch", "tensordict"])  # once for all workers
            make = partial(gymnasium.vector.AsyncVectorEnv, context=context)
            # gymnasium warns, too, with a color code before ERROR; the error is raised here.
            warnings.filterwarnings("ignore", ".{0,9}ERROR: ")
        try:
            self._vector = make(makers)  # its autoreset is not used: `play` resets
            specs = self._vector.get_attr("row_spec")
        except (EOFError, ConnectionError) as error:
            raise RunError(f"a worker of {env_id} ended while it made its environment") from error
        if any(spec != specs[0] for spec in specs):
            raise RunError(f"the environments of {env_id} differ in their spaces: {specs}")
        self.spec = specs[0]
        self.notes = self._vector.get_attr("notes")[0]
        self.can_render = self._vector.get_attr("can_render")[0]
        self.action_dim, self.action_classes = self.spec["action_dim"], tuple(self.spec["classes"])
        self._episodes = [0] * num_envs  # of _row, kept as a worker may die
        self._actions = [bytearray() for _ in makers]  # float32, since the episode began
        self._row = None

    def step(self, action: Tensor | None) -> TensorDict:
        """Actions [N, A] -> the next rows [N]. The first call ignores them; they may be None.

        After an is_last row the action is ignored and a new episode begins.
        """
        if self._row is None:
            action = torch.zeros(self.num_envs, self.action_dim)
        assert action is not None, "only the first step goes without an action"
        action = action.detach().to("cpu", torch.float32).numpy()
        assert action.shape == (self.num_envs, self.action_dim), action.shape
        if not np.isfinite(action).all():
            raise RunError(f"the policy's action for {self.env_id} is not finite: {action}")
        self._play(action[:, None])
        for past, taken, first in zip(self._actions, action, self._row["is_first"], strict=True):
            if first:
                past.clear()
            else:
                past.extend(taken.tobytes())
        return self._row.clone()

    def _play(self, actions):
        """Step environment i through actions[i] [K, A]; keep the rows after the last action."""
        try:
            rows = self._vector.call("play", actions)
        except (EOFError, ConnectionError) as error:
            raise EnvError(f"a worker of {self.env_id} was killed (out of memory?)") from error
        batch = {key: np.stack([row[key] for row in rows]) for key in sorted(rows[0])}
        self._row = TensorDict(batch, [self.num_envs])
        self._episodes = self._row.pop("_episode").tolist()

    def end_episodes(self) -> None:
        """Let the next step begin new episodes."""
        self._vector.set_attr("done", True)

    def frame(self) -> np.ndarray:
        """A picture of environment 0, uint8 [video_size, video_size, 3]; RunError if that fails."""
        try:
            return self._vector.call("picture", self.options.video_size)[0]
        except Exception as error:
            raise RunError(_explain(error, f"{self.env_id} cannot be rendered")) from error

    def state_dict(self) -> dict:
        """The episode of each environment, its actions so far, and the last rows."""
        past = [np.frombuffer(past, np.float32) for past in self._actions]
        return {
            "episodes": self._episodes,
            "actions": [torch.tensor(actions).view(-1, self.action_dim) for actions in past],
            "row": None if self._row is None else self._row.clone().to_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Replay each environment's episode up to the saved row; warn where that fails."""
        if len(state["actions"]) != self.num_envs:
            raise RunError(f"saved with num_envs={len(state['actions'])}, not {self.num_envs}")
        if state["row"] is None:
            return
        past = [actions.numpy() for actions in state["actions"]]
        self._vector.set_attr("episode", [episode - 1 for episode in state["episodes"]])
        self.end_episodes()
        self._play([[None, *actions] for actions in past])  # None begins the episode
        other = torch.tensor(self._episodes) != torch.tensor(state["episodes"])  # ended earlier
        over = self._row["is_last"] | state["row"]["is_last"] | other  # then begin a new one
        self._vector.set_attr("done", over.tolist())
        self._actions = [bytearray(actions.tobytes()) for actions in past]
        for i, row in enumerate(self._row):
            if not all(torch.equal(value, state["row"][key][i]) for key, value in row.items()):
                text = f"environment {i} of {self.env_id} is not deterministic"
                warnings.warn(f"{text}: its episode goes on from another state", stacklevel=2)

    def close(self) -> None:
        """Free the environments, their renderers and processes."""
        try:
            self._vector.close(terminate=True)
        except Exception as error:  # costs nothing
            warnings.warn(f"{self.env_id} cannot be closed: {error!r}", stacklevel=2)


def example_rows(spec: dict) -> TensorDict:
    """A row [1] of zeros, with the keys, shapes and dtypes that this spec describes."""
    rows = {key: torch.zeros(1).bool() for key in FLAGS}
    for key, shape in spec["shapes"].items():
        number = torch.int32 if key in spec["categories"] else torch.float32
        rows[key] = torch.zeros(1, *shape, dtype=torch.uint8 if len(shape) == 3 else number)
    return TensorDict({**rows, "reward": torch.zeros(1)}, [1])


def make_envs(args, **changes) -> Envs:
    """The environments that a script's Args describe; `changes` override arguments of `Envs`."""
    known = ["num_envs", "seed", *(field.name for field in fields(Options))]
    options = {name: getattr(args, name) for name in known if hasattr(args, name)}
    return Envs(args.env_id, **{"obs": "vector"} | options | changes)  # pilco.py has no --obs


class _Rows(gymnasium.Wrapper):
    """One environment that gives rows, and resets itself when an episode is over."""

    def __init__(self, env_id, index, seed, options):
        if options.env_workers and multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if hasattr(os, "setpgrp"):
                os.setpgrp()  # Ctrl-C, or a signal to the group, is for the parent, which saves
        super().__init__(_make(env_id, options))
        self.env_id, self.index, self.seed, self.options = env_id, index, seed, options
        self.episode, self.count, self.done = -1, 0, True
        chosen, texts = _observed(self.observation_space, options.obs, env_id)
        self.parts, shapes, categories, self.notes = {}, {}, {}, []
        for name, path, space in chosen:
            what = f"observation {name!r} of {env_id}"
            shapes[name], sizes, store, note = _storage(space, options.image_size, what)
            categories |= {name: sizes} if sizes else {}
            self.parts[name] = path, space, store
            self.notes.append(f"{name}: {note}")
        width, classes, self.decode, unlimited = _action_decoder(self.action_space, env_id)
        self.row_spec = dict(shapes=shapes, categories=categories)
        self.row_spec |= dict(action_dim=width, classes=list(classes))
        self.notes += [f"{key}: text, left out" for key in texts] + unlimited
        self.observation_space = self.action_space = spaces.Discrete(1)  # not used by `play`
        needed, renders = RENDERED in chosen, self.env.render_mode is not None
        if needed and not renders:
            raise RunError(f"{env_id} cannot be rendered: it has no render_mode rgb_array")
        self.can_render = renders and (needed or options.video_size > 0) and self._probe(needed)

    def _probe(self, needed):
        """Render once, so that a missing library shows now; a video is optional."""
        try:
            self.env.reset(seed=0)
            self.picture(self.options.image_size)
            return True
        except Exception as error:
            text = _explain(error, f"{self.env_id} cannot be rendered")
            if needed:
                raise RunError(text) from error
            warnings.warn(text, stacklevel=2)
            return False

    def picture(self, size):
        """The present state as uint8 [size, size, 3]."""
        options, base, camera = self.options, self.env.unwrapped, self.options.camera
        model = _model(self.env)
        if hasattr(model, "vis"):  # MuJoCo reads these when the first picture makes its context
            side = max(options.video_size, options.image_size, model.vis.global_.offwidth)
            model.vis.global_.offwidth = model.vis.global_.offheight = side
            if options.render_quality == "fast":
                model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        if hasattr(getattr(base, "physics", None), "render"):  # dm_control
            name = self.env_id.lower()  # the cameras of the authors' code
            default = 2 if "quadruped" in name else 4 if "rodent" in name else 0
            camera = camera if camera >= 0 else min(default, model.ncam - 1)
            return base.physics.render(size, size, camera_id=camera)
        if (renderer := getattr(base, "mujoco_renderer", None)) is not None:
            renderer.width = renderer.height = size
            renderer.camera_id = camera if camera >= 0 else renderer.camera_id
            if renderer.viewer is not None:
                renderer.viewer.viewport.width = renderer.viewer.viewport.height = size
        return _resize(_rgb(self.env.render()), size)

    def play(self, actions):
        """Take this environment's actions; the row after the last one. EnvError if one fails.

        After the end of an episode the next action is ignored: it begins a new episode.
        """
        repeat = 1 if "ALE/" in self.env_id else self.options.action_repeat  # its wrapper repeats
        try:
            for action in actions[self.index]:
                first, total, terminated, truncated = self.done, 0.0, False, False
                self.episode += first
                self.count = 0 if first else self.count + 1
                place = f"step {self.count} of environment {self.index} (episode {self.episode})"
                if first:
                    seed = np.random.SeedSequence(self.seed, spawn_key=(self.index, self.episode))
                    result = self.env.reset(seed=int(seed.generate_state(1)[0]) >> 1)  # 31 bits
                    obs, _ = _expect(result, 2)
                for _ in range(0 if first else repeat):
                    result = self.env.step(self.decode(action))
                    obs, reward, terminated, truncated, _ = _expect(result, 5)
                    total += float(reward)
                    if terminated or truncated:
                        break
                self.done = bool(terminated or truncated)
            row = self._observe(obs) | {"reward": np.float32(total)}
        except EnvError as error:
            raise EnvError(f"{error} (at {place})") from None
        except (Exception, SystemExit) as error:
            traceback.print_exception(error)  # here, because no traceback leaves a worker
            hint = f": {NEW_API}" if OLD_API.search(str(error)) else ""
            raise EnvError(f"{error!r} was raised at {place}{hint}") from error
        for key in (key for key, value in row.items() if not np.isfinite(value).all()):
            kind = "reward" if key == "reward" else f"observation {key!r}"
            raise EnvError(f"{kind} of {self.env_id} is not finite at {place}")
        row |= {"is_first": first, "is_last": self.done, "is_terminal": bool(terminated)}
        return row | {"_episode": self.episode}

    def _observe(self, obs):
        row = {}
        for name, (path, space, store) in self.parts.items():
            if path is None:
                row[name] = self.picture(self.options.image_size)
                continue
            try:
                given = np.asarray(reduce(getitem, path, obs))
            except (LookupError, TypeError, ValueError):  # no such entry, or ragged lists
                given = np.asarray(None)
            fits = given.shape == space.shape and given.dtype.kind in NUMBERS
            row[name] = store(given) if fits else None
            if row[name] is None:
                declared = f"is declared {shorten(str(space), 99)}"
                received = f"{given.dtype} of shape {given.shape}: {shorten(str(given), 60)}"
                what = f"observation {name!r} of {self.env_id}"
                raise EnvError(f"{what} {declared}, but is {received}")
        return row


def _make(env_id, options):
    """gymnasium.make; errors name the missing package, or ids similar to an unknown one."""
    module, colon, name = env_id.rpartition(":")
    modules, packages = PACKAGES.get(name.split("/")[0], ((), ""))
    if colon:
        _check_module(env_id, module)
    try:
        own = dict(json.loads(options.env_kwargs or "{}"))
    except (TypeError, ValueError):
        raise RunError(f"--env-kwargs {options.env_kwargs} must be a JSON object") from None
    kwargs = {"disable_env_checker": True}
    if atari := name.startswith("ALE/"):
        kwargs |= dict(frameskip=1, full_action_space=options.sticky)
        kwargs["repeat_action_probability"] = 0.25 if options.sticky else 0.0
    try:
        make = partial(gymnasium.make, env_id, **kwargs, **own)
        pictures = options.video_size > 0 or options.obs in ("pixels", "both")
        with warnings.catch_warnings():  # importing dm_control turns on deprecation warnings
            warnings.filterwarnings("ignore", ".*not in the possible render_modes")
            for needed in modules:
                importlib.import_module(needed)
            env = _with_pictures(make) if pictures else make()
        if atari:
            skip = {"frame_skip": options.action_repeat, "screen_size": options.image_size}
            env = gymnasium.wrappers.AtariPreprocessing(env, grayscale_obs=False, **skip)
    except (ModuleNotFoundError, gymnasium.error.DependencyNotInstalled) as error:
        fix = f"; pip install {packages}" if packages else ""
        raise RunError(f"{env_id} needs a package: {error}{fix}") from error
    except Exception as error:
        if isinstance(error, gymnasium.error.Error) and name not in gymnasium.registry:
            near = ", ".join(module + colon + similar for similar in _similar(name)) or "none"
            raise RunError(f"unknown environment {env_id!r}: {error} Similar: {near}") from error
        given = f" with --env-kwargs {options.env_kwargs}" if own else ""
        raise RunError(_explain(error, f"{env_id}{given} cannot be made")) from error
    cameras = getattr(_model(env), "ncam", None)
    if cameras is not None and not -1 <= options.camera < cameras:  # MuJoCo would end the process
        text = f"--camera {options.camera}: {env_id} has no such camera"
        raise RunError(f"{text} (it has {cameras}, counted from 0; -1 is the default)")
    return env


def _check_module(env_id, module):
    """Let the module lie in the current folder; RunError if Python would look in a run folder.

    A run may come from anybody: its checkpoint names a module, which must not be among its files.
    """
    if (here := os.getcwd()) not in sys.path and not _in_run_folder(here):
        sys.path.append(here)
    for place in (Path(folder, *module.split(".")) for folder in sys.path):
        if _in_run_folder(place):
            raise RunError(f"{env_id} is not imported: {place} would lie in a run folder")


def _in_run_folder(path):
    path = Path(path).resolve()
    return any((folder / "checkpoint.pt").is_file() for folder in (path, *path.parents))


def _with_pictures(make):
    """make(), with render_mode rgb_array where the environment can have it."""
    try:
        env = make(render_mode="rgb_array")
    except Exception:  # its constructor does not take it, or fails in any case
        env = make()
    if env.render_mode is None and "rgb_array" in (env.metadata.get("render_modes") or ()):
        env.unwrapped.render_mode = "rgb_array"
    return env


def _model(env):
    """The model of a MuJoCo environment, else None (or a model of another kind)."""
    base = env.unwrapped
    return getattr(getattr(base, "physics", base), "model", None)


def _explain(error, what):
    """What failed and why, with advice if it was OpenGL; the traceback goes to stderr."""
    traceback.print_exception(error)
    return f"{what}: {error!r}{GL_HELP if GL_ERROR.search(str(error)) else ''}"


def _similar(name):
    """Registered ids whose last part is like that of `name`, whatever their namespace."""
    for module in (module for modules, _ in PACKAGES.values() for module in modules):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            importlib.import_module(module)  # registers its ids
    ids = {env_id.split("/")[-1].lower(): env_id for env_id in reversed(gymnasium.registry)}
    near = difflib.get_close_matches(name.split("/")[-1].lower(), ids, 3, 0.4)
    return [ids[similar] for similar in near]


def _expect(result, size):
    """What reset or step returned; EnvError unless its form is that of gymnasium's."""
    form = isinstance(result, tuple) and len(result) == size and isinstance(result[-1], dict)
    if not form or (size == 5 and np.ndim(result[1])):
        raise EnvError(f"an environment returned {shorten(repr(result), 200)}: {NEW_API}")
    return result


def _leaves(space, path=()):
    """(key, path, space) of each leaf of nested Dicts and Tuples; path: its keys from outside."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        yield ".".join(map(str, path)).replace("/", ".") or "observation", path, space
        return
    for key, branch in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
        yield from _leaves(branch, (*path, key))


def _observed(space, obs, env_id):
    """The (name, path, space) that rows hold, sorted, and the keys of text, which they do not."""
    leaves = [*_leaves(space)]
    texts = [leaf for leaf in leaves if np.dtype(getattr(leaf[2], "dtype", None)).kind == "U"]
    numbers = [leaf for leaf in leaves if leaf not in texts]
    images = [leaf for leaf in numbers if _is_image(leaf[2])]
    chosen = {
        "auto": numbers,
        "vector": [leaf for leaf in numbers if leaf not in images],
        "pixels": [("pixels", *images[0][1:])] if len(images) == 1 else [RENDERED],
        "both": [*numbers, RENDERED],
    }[obs]
    if not chosen:
        keys = ", ".join(key for key, *_ in leaves)
        raise RunError(f"{env_id} observes nothing but images or text: {keys}")
    every = [key for key, *_ in leaves] + ["pixels"] * (RENDERED in chosen)
    for name, *_ in chosen:
        legal = name.isprintable() and all(name.split(".")) and not set(name) & set('\\:*?"<>|')
        if every.count(name) > 1 or name in RESERVED or not legal or len(name.encode()) > 200:
            why = "two observations have it, rows or dreams use it, or it cannot be a file's name"
            fix = f"rename it ({why}), with gymnasium.wrappers.TransformObservation"
            raise RunError(f"{env_id} has an observation named {name[:60]!r}: {fix}")
    return sorted(chosen), [key for key, *_ in texts]


def _is_image(space):
    shape = space.shape if isinstance(space, spaces.Box) and space.dtype == np.uint8 else ()
    return len(shape) in (2, 3) and min(shape[:2]) >= 16 and all(1 <= c <= 4 for c in shape[2:])


def _categories(space, what):
    """How many values each number of a discrete space takes, and the lowest of each."""
    match space:
        case spaces.Discrete():
            return np.array([space.n]), space.start
        case spaces.MultiDiscrete():
            return space.nvec.ravel(), space.start.ravel()
        case spaces.MultiBinary():
            return np.full(space.shape, 2).ravel(), 0
    fix = "change it with gymnasium.wrappers.TransformObservation or TransformAction"
    raise RunError(f"{what}, {space}, is not supported: {fix}")


def _storage(space, size, what):
    """Shape in the row, sizes of its categories, a function from value to row, and a note.

    The function gives None if a number is no byte or category. Another dtype, or numbers
    outside the bounds of a vector, are no fault (environments of gymnasium have both).
    """
    if _is_image(space):
        shape = [size, size, (*space.shape, 1)[2]]

        def store(value):
            fits = value.dtype.kind in "iu" and not ((value < 0) | (value > 255)).any()
            return _resize(value.astype(np.uint8), size) if fits else None

        return shape, [], store, f"picture {' x '.join(map(str, shape))}"
    if isinstance(space, spaces.Box) and (count := int(np.prod(space.shape))):
        wide = "; warning: many for an MLP. A picture would be uint8, its channels (1 to 4) last"
        note = f"vector of {count:,}{wide * (count > 1024)}"
        return [count], [], lambda value: value.astype(np.float32).ravel(), note
    sizes, lowest = _categories(space, what)

    def store(value):
        number = value.ravel().astype(float) - lowest
        fits = (number == number.round()) & (number >= 0) & (number < sizes)
        return number.astype(np.int32) if fits.all() else None

    return [sizes.size], sizes.tolist(), store, f"categories, {sizes.sum():,} in all"


def _rgb(frame):
    """What render() gave -> uint8 [H, W, 3]; gray, alpha, and floats up to 1 or 255 are known."""
    image = np.asarray(frame)
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or image.dtype.kind not in NUMBERS:
        raise ValueError(f"render() gave {image.dtype} of shape {image.shape}, not [H, W, 3]")
    if image.dtype != np.uint8:
        image = np.nan_to_num(image)
        scale = 255 if image.dtype.kind in "bf" and image.max() <= 1 else 1
        image = (image * scale).round().clip(0, 255).astype(np.uint8)
    return np.broadcast_to(image[..., :3], (*image.shape[:2], 3))


def _resize(image, size):
    """uint8 [H, W] or [H, W, C] -> [size, size, C], bilinear."""
    planes = np.moveaxis(np.atleast_3d(image), -1, 0)
    pictures = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    return np.stack([p.resize((size, size), Image.Resampling.BILINEAR) for p in pictures], -1)


def action_width(spec) -> int:
    """The width of an action, given a space, anything whose shape ends in it, or the width."""
    if isinstance(spec, spaces.Space):
        return _action_decoder(spec, "the environment")[0]
    return spec if isinstance(spec, int) else spec.shape[-1]


def _action_decoder(space, env_id):
    """Width of an action, sizes of its one-hots, a function to the environment's action, notes."""
    if isinstance(space, spaces.Box) and space.low.size:
        low, high = space.low.astype(float).ravel(), space.high.astype(float).ravel()
        limited = (abs(low) < UNLIMITED) & (abs(high) < UNLIMITED)
        numbers = ", ".join(map(str, np.flatnonzero(~limited)))
        note = f"actions {numbers}: unlimited (bounds of 1e6 or more count as none), in [-1, 1]"
        bottom, top = np.where(limited, low, -1), np.where(limited, high, 1)

        def scale(action):
            action = action.astype(float).clip(-1, 1) * (top - bottom) / 2 + (top + bottom) / 2
            action = action.round() if space.dtype.kind in "iu" else action
            return action.clip(low, high).astype(space.dtype).reshape(space.shape)

        return low.size, (), scale, [note] if numbers else []
    sizes, start = _categories(space, f"actions of {env_id}")

    def choose(action):
        choice = np.stack([part.argmax() for part in np.split(action, sizes.cumsum()[:-1])])
        return (choice + start).astype(space.dtype).reshape(space.shape)[()]  # scalar if Discrete

    return int(sizes.sum()), tuple(sizes.tolist()), choose, []
