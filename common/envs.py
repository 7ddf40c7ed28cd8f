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
from importlib.machinery import PathFinder
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
WRAPPERS = ("gymnasium.core", "gymnasium.wrappers")  # modules of those around an environment
NEW_API = (
    "is it written for the old gym? gymnasium's reset(seed=..., options=...) returns (observation, "
    "info), its step (observation, reward, terminated, truncated, info), the reward a plain number"
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
    to two bounds below UNLIMITED) or one-hots of `action_classes` choices. `spec` is what the
    networks need to know, `notes` say what each observation is taken for, `options` are the fields
    of Options. RunError: unknown id, missing package, unsupported space, or no rendering. EnvError:
    an environment raised, or returned NaN, infinity or what it has not declared.
    """

    def __init__(self, env_id: str, num_envs: int = 1, seed: int = 0, **options):
        self.env_id, self.num_envs, self.options = env_id, num_envs, Options(**options)
        if self.options.obs not in ("auto", "vector", "pixels", "both"):
            raise RunError(f"obs={self.options.obs!r} is not auto, vector, pixels or both")
        makers = [partial(_Rows, env_id, i, seed, self.options) for i in range(num_envs)]
        make = gymnasium.vector.SyncVectorEnv
        if self.options.env_workers:
            # Never a plain fork: it would copy threads, CUDA and EGL state.
            context = "forkserver" if hasattr(os, "fork") else "spawn"
            multiprocessing.set_forkserver_preload(["torch", "tensordict"])  # once for all workers
            make = partial(gymnasium.vector.AsyncVectorEnv, context=context)
            # gymnasium warns, too, with a color code before ERROR; the error is raised here.
            warnings.filterwarnings("ignore", ".{0,9}ERROR: ")
        self._vector = make(makers)  # its autoreset is not used: `play` resets
        self.spec = self._vector.get_attr("row_spec")[0]
        self.notes = self._vector.get_attr("notes")[0]
        self.can_render = self._vector.get_attr("can_render")[0]
        self.action_dim, self.action_classes = self.spec["action_dim"], tuple(self.spec["classes"])
        self._episodes = [0] * num_envs  # those of _row, in case a worker dies
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

    def frame(self) -> np.ndarray:
        """A picture of environment 0, uint8 [video_size, video_size, 3]; RunError if that fails."""
        frame = self._vector.call("film", self.options.video_size)[0]
        if isinstance(frame, str):
            raise RunError(frame)
        return frame

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
        self._vector.set_attr("done", True)
        self._play([[None, *actions] for actions in past])  # None begins the episode
        other = torch.tensor(self._episodes) != torch.tensor(state["episodes"])  # ended earlier
        over = self._row["is_last"] | state["row"]["is_last"] | other  # if not deterministic
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
        except (EOFError, ConnectionError):
            pass  # of a worker that was killed
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
        obs, size = options.obs, options.image_size
        paths = [*_paths(self.observation_space)]
        keys = [".".join(map(str, path)).replace("/", ".") or "observation" for path, _ in paths]
        self.tree = dict(zip(keys, paths, strict=True))  # {key: (path, space)}
        leaves = {key: space for key, (_, space) in self.tree.items() if not _is_text(space)}
        images = [key for key in leaves if _is_image(leaves[key])]
        self.names = {key: key for key in leaves}
        if obs == "vector":
            self.names = {key: key for key in leaves if key not in images}
        elif obs == "pixels":  # the one image observed, else a rendered one
            self.names = dict.fromkeys(images, "pixels") if len(images) == 1 else {}
        self.renders_pixels = obs == "both" or (obs == "pixels" and not self.names)
        names = [self.names[key] for key in keys if key in self.names]
        _check_names(names + ["pixels"] * self.renders_pixels, env_id)
        shapes = {name: _shape(key, leaves[key], size, env_id) for key, name in self.names.items()}
        if self.renders_pixels:
            shapes["pixels"] = [size, size, 3]
        if not shapes:
            why = "no numbers, only images: dreamer.py and dreamer_v3.py learn from them"
            why = f"{why} with --obs auto" if leaves else "only text"
            raise RunError(f"{env_id} observes {', '.join(self.tree)}, {why}")
        shapes = dict(sorted(shapes.items()))
        width, classes, self.decode = _action_decoder(self.action_space, env_id)
        discrete = [key for key in self.names if _categories(leaves[key])]
        sizes = {self.names[key]: _categories(leaves[key])[0].tolist() for key in discrete}
        self.row_spec = dict(shapes=shapes, categories=sizes)
        self.row_spec |= dict(action_dim=width, classes=list(classes))
        self.notes = [_note(name, shape, sizes.get(name)) for name, shape in shapes.items()]
        self.notes += [f"{key}: text, left out" for key in self.tree if key not in leaves]
        if not classes and not (limited := _bounds(self.action_space)[2]).all():
            text = ", ".join(map(str, np.flatnonzero(~limited)))
            text = f"actions {text}: unlimited (a bound of 1e6 or more counts as none)"
            self.notes += [f"{text}, they stay in [-1, 1]"]
        self.observation_space = self.action_space = spaces.Discrete(1)  # unused: see `play`
        self.can_render = (self.renders_pixels or options.video_size > 0) and self._probe()

    def _probe(self):
        """Render once, so that a missing library shows now; a video is optional."""
        try:
            self.env.reset(seed=0)
            self.picture(self.options.image_size)
            return True
        except Exception as error:
            text = _explain(error, f"{self.env_id} cannot be rendered")
            if self.renders_pixels:
                raise RunError(text) from error
            if not isinstance(error, RunError):  # which only says that it never renders
                warnings.warn(text, stacklevel=2)
            return False

    def film(self, size):
        """`picture`, or a text that says why there is none: an error would end a worker."""
        try:
            return self.picture(size)
        except Exception as error:
            return _explain(error, f"{self.env_id} cannot be rendered")

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
        if self.env.render_mode != "rgb_array":
            raise RunError("it has no render_mode rgb_array")
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
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            wrapper = frame.f_globals.get("__name__", "").startswith(WRAPPERS)
            old = wrapper and isinstance(error, (TypeError, ValueError))  # a call that does not fit
            raise EnvError(f"{error!r} was raised at {place}{f': {NEW_API}' * old}") from error
        for key in (key for key, value in row.items() if not np.isfinite(value).all()):
            kind = "reward" if key == "reward" else f"observation {key!r}"
            raise EnvError(f"{kind} of {self.env_id} is not finite at {place}")
        row |= {"is_first": first, "is_last": self.done, "is_terminal": bool(terminated)}
        return row | {"_episode": self.episode}

    def _observe(self, obs):
        row, size = {}, self.options.image_size
        for key, name in self.names.items():
            path, space = self.tree[key]
            try:
                given = np.asarray(reduce(getitem, path, obs))
            except (LookupError, TypeError, ValueError):  # no such entry, or ragged lists
                given = np.asarray(None)
            value = _stored(given, space)
            if value is None:
                received = "no array of numbers"
                if given.dtype.kind in NUMBERS:
                    extent = f" from {given.min()} to {given.max()}" if given.size else ""
                    received = f"{given.dtype} of shape {given.shape}{extent}"
                name = f"observation {key!r} of {self.env_id}"
                raise EnvError(f"{name} is declared {shorten(str(space), 99)}, but is {received}")
            row[name] = _resize(value, size) if _is_image(space) else value
        if self.renders_pixels:
            row["pixels"] = self.picture(size)
        return row


def _make(env_id, options):
    """gymnasium.make; errors name the missing package, or ids similar to an unknown one."""
    module, colon, name = env_id.rpartition(":")
    modules, packages = PACKAGES.get(name.split("/")[0], ((), ""))
    own, kwargs = _json_object(options.env_kwargs), {"disable_env_checker": True}
    if colon:
        _check_module(env_id, module)
    if atari := name.startswith("ALE/"):
        kwargs |= dict(frameskip=1, full_action_space=options.sticky)
        kwargs["repeat_action_probability"] = 0.25 if options.sticky else 0.0
    try:
        make = partial(gymnasium.make, env_id, **kwargs, **own)
        with warnings.catch_warnings():  # importing dm_control turns on deprecation warnings
            for needed in modules:
                importlib.import_module(needed)
        env = _with_pictures(make(), make, options)
        if atari:
            skip = {"frame_skip": options.action_repeat, "screen_size": options.image_size}
            env = gymnasium.wrappers.AtariPreprocessing(env, grayscale_obs=False, **skip)
    except (ModuleNotFoundError, gymnasium.error.DependencyNotInstalled) as error:
        fix = f"; pip install {packages}" if packages else ""
        raise RunError(f"{env_id} needs a package: {error}{fix}") from error
    except Exception as error:
        if isinstance(error, gymnasium.error.Error) and name not in gymnasium.registry:
            near = [module + colon + similar for similar in _similar(name)]
            near = f" Similar: {', '.join(near)}" if near else ""
            raise RunError(f"unknown environment {env_id!r}: {error}{near}") from error
        text = r"takes no arguments|(?:unexpected|multiple values for)[a-z ]* '(\w+)'"
        if own and (wrong := re.search(text, str(error))) and wrong[1] in (None, *own):
            raise RunError(f"--env-kwargs: {env_id} does not take {wrong[1] or 'any'}") from error
        given = f" with --env-kwargs {options.env_kwargs}" if own else ""
        raise RunError(_explain(error, f"{env_id}{given} cannot be made")) from error
    cameras = getattr(_model(env), "ncam", None)
    if cameras is not None and not -1 <= options.camera < cameras:  # MuJoCo would end the process
        text = f"--camera {options.camera}: {env_id} has no such camera"
        raise RunError(f"{text} (it has {cameras}, counted from 0; -1 is the default)")
    return env


def _json_object(text):
    """The value of --env-kwargs."""
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text or "{}"), dict):
            return value
    raise RunError(f"--env-kwargs {text} must be a JSON object, like '{{\"size\": 8}}'")


def _check_module(env_id, module):
    """Let the module lie in the current folder; RunError if it lies in a run folder.

    A run may come from anybody: its checkpoint names a module, which must not be among its files.
    """
    if not module or module[0] == "." or ":" in module:
        raise RunError(f"--env-id {env_id} is not like my_module:MyEnv-v0")
    here, path = os.getcwd(), None
    if here not in sys.path and not _in_run_folder(here):
        sys.path.append(here)
    for part in module.split("."):  # without importing the packages above it
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return  # the import will say so
        path = list(spec.submodule_search_locations or ())
        if inside := [place for place in (spec.origin, *path) if place and _in_run_folder(place)]:
            raise RunError(f"{env_id} is not imported from {inside[0]}: that is in a run folder")


def _in_run_folder(path):
    path = Path(path).resolve()
    return any((folder / "checkpoint.pt").is_file() for folder in (path, *path.parents))


def _with_pictures(env, make, options):
    """`env`, made again with render_mode rgb_array if pictures are wanted and it has that mode."""
    pixels = options.obs in ("pixels", "both")
    direct = hasattr(getattr(env.unwrapped, "physics", None), "render")  # see `picture`
    modes = env.metadata.get("render_modes") or ()
    if direct or not (pixels or options.video_size > 0) or "rgb_array" not in modes:
        return env
    env.close()
    try:
        env = make(render_mode="rgb_array")
    except Exception as error:
        if pixels and not isinstance(error, TypeError):  # of a constructor without this argument
            raise
        env = make()
    if env.render_mode is None:
        env.unwrapped.render_mode = "rgb_array"
    return env


def _model(env):
    """The model of a MuJoCo environment, else None (or a model of another kind)."""
    base = env.unwrapped
    return getattr(getattr(base, "physics", base), "model", None)


def _explain(error, what):
    """What failed and why: with advice if it was OpenGL, else with the traceback on stderr."""
    if GL_ERROR.search(str(error)):
        return f"{what}: {error}{GL_HELP}"
    if isinstance(error, RunError):
        return f"{what}: {error}"
    traceback.print_exception(error)
    return f"{what}: {error!r}"


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


def _paths(space, path=()):
    """(keys from the outside to it, space) for each leaf of nested Dicts and Tuples."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        yield path, space
        return
    for key, branch in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
        yield from _paths(branch, (*path, key))


def _check_names(names, env_id):
    """RunError unless all can be keys of rows beside `RESERVED`, and parts of file names."""
    for name in names:
        why = "two observations have it" if names.count(name) > 1 else ""
        why = why or ("rows or dreams use it" if name in RESERVED else "")
        legal = name.isprintable() and all(name.split(".")) and not set(name) & set('\\:*?"<>|')
        why = why or ("" if legal and len(name.encode()) <= 200 else "it cannot be a file's name")
        if why:
            fix = f"rename it ({why}), with gymnasium.wrappers.TransformObservation"
            raise RunError(f"{env_id} has an observation named {name[:60]!r}: {fix}")


def _is_text(space):
    return space.dtype is not None and space.dtype.kind == "U"  # Text, or MiniGrid's MissionSpace


def _is_image(space):
    shape = space.shape if isinstance(space, spaces.Box) else ()
    if space.dtype != np.uint8 or len(shape) not in (2, 3):
        return False
    return min(shape[:2]) >= 16 and 1 <= (*shape, 1)[2] <= 4


def _categories(space):
    """Of a discrete space: how many values each of its numbers takes, and the lowest of each."""
    match space:
        case spaces.Discrete():
            return np.array([space.n]), space.start
        case spaces.MultiDiscrete():
            return space.nvec.ravel(), space.start.ravel()
        case spaces.MultiBinary():
            return np.full(space.shape, 2).ravel(), 0


def _shape(key, space, size, env_id):
    """The shape of an observation in the row: [size, size, C] of an image, else [D]."""
    name = f"observation {key!r} of {env_id}, {space},"
    if not isinstance(space, spaces.Box) and _categories(space) is None:
        fix = "wrap the environment in gymnasium.wrappers.TransformObservation to get a Box"
        raise RunError(f"{name} is not supported: {fix}")
    return [size, size, (*space.shape, 1)[2]] if _is_image(space) else [int(np.prod(space.shape))]


def _stored(value, space):
    """An array received for `space` as the row holds it; None if that would change it.

    So another dtype, or numbers outside the bounds of a vector, are no fault (environments of
    gymnasium have both); another shape is one, or a picture of floats.
    """
    if value.shape != space.shape or value.dtype.kind not in NUMBERS:
        return None
    if _is_image(space):
        fits = value.dtype.kind in "iu" and not ((value < 0) | (value > 255)).any()
        return value.astype(np.uint8) if fits else None
    if isinstance(space, spaces.Box):
        return value.astype(np.float32).ravel()
    sizes, lowest = _categories(space)
    number = value.ravel() - lowest
    fits = (number == number.round()) & (number >= 0) & (number < sizes)
    return number.astype(np.int32) if fits.all() else None


def _note(name, shape, sizes):
    """What an observation of the row is taken for."""
    if len(shape) == 3:
        return f"{name}: picture {' x '.join(map(str, shape))}"
    numbers = sum(sizes) if sizes else shape[0]
    of = f" of {len(sizes):,} numbers" if sizes and len(sizes) > 1 else ""
    kind = f"{numbers:,} categories{of}" if sizes else f"vector of {numbers:,}"
    wide = "; warning: many for an MLP. A picture would be uint8, its channels (1 to 4) last"
    return f"{name}: {kind}{wide * (numbers > 1024)}"


def _rgb(frame):
    """What render() gave -> uint8 [H, W, 3]; gray, alpha, and floats up to 1 or 255 are known."""
    image = np.asarray(frame)
    planes = np.atleast_3d(image)
    if image.ndim not in (2, 3) or image.dtype.kind not in "buif" or not 0 < planes.shape[2] < 5:
        raise ValueError(f"render() gave {image.dtype} of shape {image.shape}, not [H, W, 3]")
    if planes.dtype != np.uint8:
        planes = np.nan_to_num(planes.astype(np.float32))
        scale = 255 if image.dtype.kind in "bf" and planes.max() <= 1 else 1
        planes = (planes * scale).clip(0, 255).round().astype(np.uint8)
    return planes[..., :3] if planes.shape[2] > 2 else planes[..., :1].repeat(3, -1)


def _resize(image, size):
    """uint8 [H, W] or [H, W, C] -> [size, size, C], bilinear."""
    planes = np.moveaxis(np.atleast_3d(image), -1, 0)
    pictures = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    return np.stack([p.resize((size, size), Image.Resampling.BILINEAR) for p in pictures], -1)


def action_width(spec) -> int:
    """The width of an action: of a space, of anything whose shape ends in it, or the int itself."""
    if isinstance(spec, spaces.Space):
        return _action_decoder(spec, "the environment")[0]
    return spec if isinstance(spec, int) else spec.shape[-1]


def _bounds(space):
    """Lowest and highest numbers of a Box, and which have two bounds that mean something."""
    low, high = space.low.astype(float).ravel(), space.high.astype(float).ravel()
    return low, high, (abs(low) < UNLIMITED) & (abs(high) < UNLIMITED)


def _action_decoder(space, env_id):
    """Width of an action, sizes of its one-hots, and a function to the environment's action."""
    if isinstance(space, spaces.Box):
        low, high, limited = _bounds(space)
        bottom, top = np.where(limited, low, -1), np.where(limited, high, 1)

        def scale(action):
            action = action.astype(float).clip(-1, 1) * (top - bottom) / 2 + (top + bottom) / 2
            action = action.round() if space.dtype.kind in "iu" else action
            return action.clip(low, high).astype(space.dtype).reshape(space.shape)

        return low.size, (), scale
    if (discrete := _categories(space)) is None:
        fix = "wrap it in gymnasium.wrappers.TransformAction to get a Box or a MultiDiscrete"
        raise RunError(f"actions of {env_id} are {space}, which is not supported: {fix}")
    sizes, start = discrete

    def choose(action):
        choice = np.stack([part.argmax() for part in np.split(action, sizes.cumsum()[:-1])])
        return (choice + start).astype(space.dtype).reshape(space.shape)[()]  # scalar if Discrete

    return int(sizes.sum()), tuple(sizes.tolist()), choose
