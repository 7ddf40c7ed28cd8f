"""Environments: any gymnasium id -> rows of TensorDict.

    envs = Envs("dm_control/walker-walk-v0", num_envs=4, seed=1)  # "ALE/Pong-v5", "CartPole-v1",
    row = envs.step(None)                                         # "my_module:MyEnv-v0"
    row = envs.step(policy(row))

A row is one time step: the observation, the reward that arrived with it, is_first, is_last and
is_terminal. An episode of n steps gives n + 1 rows, the first one being the reset.
Your own environment is a gymnasium.Env in a module that calls gymnasium.register. It observes a Box
or a (nested) Dict of them: uint8 with 2 or 3 dimensions, channels last, is an image, all else a
vector. Its actions are Box, Discrete, MultiDiscrete or MultiBinary.
"""

import contextlib
import ctypes
import difflib
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass, fields
from functools import partial

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from PIL import Image
from tensordict import TensorDict
from torch import Tensor

from common.checkpoint import EnvError, RunError

if "MUJOCO_GL" not in os.environ and sys.platform == "linux":  # read when mujoco is imported
    os.environ["MUJOCO_GL"] = "disable"  # vectors need no OpenGL
    with contextlib.suppress(OSError, TypeError):  # a library may find no device
        find = ctypes.CDLL("libEGL.so.1").eglGetProcAddress
        find.restype, devices = ctypes.c_void_p, ctypes.c_int()
        query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        query(find(b"eglQueryDevicesEXT"))(0, None, ctypes.addressof(devices))
        os.environ["MUJOCO_GL"] = "egl" if devices.value else "disable"
if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # or pygame looks for one, and complains
GL_HELP = """; to render MuJoCo: apt-get install libegl1 libgl1 (no display needed);
apt-get install libosmesa6 and MUJOCO_GL=osmesa (CPU only); MUJOCO_GL=glfw on a desktop"""
FLAGS = ("is_first", "is_last", "is_terminal")
RESERVED = ("action", "index", "previous", "encoded_obs")  # keys of a batch besides observations
LATENT = ("state", "belief")  # an observation of that name becomes observation.NAME
MODULES = {"dm_control": ("dm_control", "shimmy"), "ALE": ("ale_py",)}  # register these ids
PACKAGES = {"dm_control/": "shimmy dm-control", "ALE/": "ale-py opencv-python"}  # of these ids


@dataclass
class Options:
    """Keyword arguments of `Envs`, named like the flags of the scripts."""

    action_repeat: int = 1  # inner steps per action, rewards are summed (Atari: frame skip)
    obs: str = "auto"  # auto; vector: no images; pixels: only its image, or a rendered one; both
    image_size: int = 64  # images are resized to this square, MuJoCo renders at it
    env_workers: bool = False  # a process for each environment
    sticky: bool = False  # Atari: 25 % repeated actions and the full action set
    camera: int = -1  # of MuJoCo; -1: the usual one (dm_control: quadruped 2, rodent 4, else 0)
    render_quality: str = "fast"  # fast: MuJoCo without shadows and anti-aliasing; full: with them
    frames: int = 0  # side of the pictures for videos, 0 for none


class Envs:
    """`num_envs` environments stepped together; each of their episodes has its own seed.

    `action_dim` is the width of an action: float32, continuous in [-1, 1] (clipped, then scaled
    to finite bounds) or one-hots of `action_classes` choices. `spec` is what a network has to know,
    `options` are the fields of Options. Raises RunError for an unknown id, a missing package, an
    unsupported space, or if it cannot render, EnvError if an environment raises or gives NaN.
    """

    def __init__(self, env_id: str, num_envs: int = 1, seed: int = 0, **options):
        self.env_id, self.num_envs, options = env_id, num_envs, Options(**options)
        if options.obs not in ("auto", "vector", "pixels", "both"):
            raise RunError(f"obs={options.obs!r} is not auto, vector, pixels or both")
        makers = [partial(_Rows, env_id, i, seed, options) for i in range(num_envs)]
        make = gymnasium.vector.SyncVectorEnv
        if options.env_workers:  # never a plain fork: it would copy threads, CUDA and EGL state
            forks = "forkserver" in multiprocessing.get_all_start_methods()
            multiprocessing.set_forkserver_preload(["torch", "tensordict"])  # once for all workers
            context = "forkserver" if forks else "spawn"
            make = partial(gymnasium.vector.AsyncVectorEnv, context=context)
            # gymnasium shows a worker's traceback as a warning; the error itself is raised here.
            warnings.filterwarnings("ignore", ".{0,9}ERROR: ")
        self._vector = make(makers, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)
        self.action_dim = self._vector.single_action_space.shape[0]
        self.action_classes = classes = self._vector.get_attr("action_classes")[0]
        self.can_render = self._vector.get_attr("can_render")[0]
        boxes = sorted(self._vector.get_attr("boxes")[0].items())
        shapes = {key: list(box.shape) for key, box in boxes}
        self.spec = dict(shapes=shapes, action_dim=self.action_dim, classes=list(classes))
        self._episodes = torch.zeros(num_envs, dtype=torch.int64)
        self._actions = [bytearray() for _ in makers]  # of the episode, float32
        self._row = None

    def step(self, action: Tensor | None) -> TensorDict:
        """The next rows [N] for actions [N, A]; before the first row they are ignored, or None.

        After an is_last row the action is ignored and a new episode begins.
        """
        if action is None or self._row is None:
            assert self._row is None, "only the first step goes without an action"
            action = torch.zeros(self.num_envs, self.action_dim)
        action = action.detach().to("cpu", torch.float32).contiguous().numpy()
        assert action.shape == (self.num_envs, self.action_dim), action.shape
        if not np.isfinite(action).all():
            raise RunError(f"the policy's action for {self.env_id} is not finite: {action}")
        try:
            self._receive(self._vector.step(action)[0])
        except (EOFError, ConnectionError) as error:
            raise EnvError(f"a worker of {self.env_id} was killed: memory?") from error
        for past, taken, first in zip(self._actions, action, self._row["is_first"], strict=True):
            if first:
                past.clear()
            else:
                past.extend(taken.tobytes())
        return self._row.clone()

    def _receive(self, row):
        self._row = TensorDict(row, batch_size=[self.num_envs])
        self._episodes = self._row.pop("_episode")

    def frame(self) -> np.ndarray:
        """A picture of environment 0, uint8 [frames, frames, 3]; needs `can_render`."""
        return self._vector.call("frame")[0]

    def state_dict(self) -> dict:
        """Where every environment is: its episode and the actions since that began."""
        past = [np.frombuffer(past, np.float32) for past in self._actions]
        return {
            "episodes": self._episodes.tolist(),
            "actions": [torch.tensor(actions).view(-1, self.action_dim) for actions in past],
            "row": None if self._row is None else self._row.clone().to_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Bring every environment back by repeating its episode; warns where that fails."""
        if len(state["actions"]) != self.num_envs:
            raise RunError(f"saved with num_envs={len(state['actions'])}, not {self.num_envs}")
        if state["row"] is None:
            return
        past = [actions.numpy() for actions in state["actions"]]
        ends = state["row"]["is_last"].tolist()
        rows = self._vector.call("repeat", state["episodes"], past, ends)
        self._receive({key: np.stack([row[key] for row in rows]) for key in rows[0]})
        for i, row in enumerate(self._row):
            self._actions[i][:] = b"" if row["is_first"] else past[i].tobytes()
            if not all(torch.equal(value, state["row"][key][i]) for key, value in row.items()):
                text = f"environment {i} of {self.env_id} is not deterministic: repeating its "
                text += "episode did not lead to the saved row; it goes on from where it is"
                warnings.warn(text, stacklevel=2)

    def close(self) -> None:
        """Free the environments, their renderers and processes."""
        with contextlib.suppress(EOFError, ConnectionError):  # of a worker that was killed
            self._vector.close(terminate=True)


def example_rows(spec: dict) -> TensorDict:
    """Rows [1] of zeros as environments of this spec give them, without making one."""
    shapes = spec["shapes"].items()
    rows = {k: torch.zeros(1, *s, dtype=torch.uint8 if len(s) == 3 else None) for k, s in shapes}
    rows |= {key: torch.zeros(1).bool() for key in FLAGS}
    return TensorDict({**rows, "reward": torch.zeros(1)}, [1])


def make_envs(args, **changes) -> Envs:
    """The environments that a script's Args describe, with the changes: arguments of `Envs`."""
    known = ["num_envs", "seed", *(field.name for field in fields(Options))]
    options = {name: getattr(args, name) for name in known if hasattr(args, name)}
    return Envs(args.env_id, **{"obs": "vector"} | options | changes)


class _Rows(gymnasium.Env):
    """One environment whose observation is the whole row, and which resets itself."""

    def __init__(self, env_id, index, seed, options):
        if options.env_workers and multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if hasattr(os, "setpgrp"):
                os.setpgrp()  # Ctrl-C, or a signal to the group, is for the parent, which saves
        self.env_id, self.index, self.seed, self.options = env_id, index, seed, options
        self.episode, self.count, self.done = -1, 0, True
        self.drawn = options.obs in ("pixels", "both")
        self.filmed = options.frames > 0 and index == 0
        self.env = self._build()
        size, leaves = options.image_size, _flatten(self.env.observation_space)
        self.names = {  # key of the environment: key of the row
            key: f"observation.{key}" if key in LATENT else key for key in leaves
        }
        if options.obs == "vector":
            self.names = {k: self.names[k] for k, space in leaves.items() if not _is_image(space)}
        elif options.obs == "pixels":
            self.drawn = len(leaves) > 1 or not _is_image(*leaves.values())
            self.names = {} if self.drawn else dict.fromkeys(leaves, "pixels")
        self.boxes = {name: _row_box(k, leaves[k], size, env_id) for k, name in self.names.items()}
        if self.drawn:
            self.boxes["pixels"] = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.can_render = (self.drawn or self.filmed) and self._probe()
        row = {key: spaces.Box(0, 1, (), bool) for key in FLAGS}
        row["reward"] = spaces.Box(-np.inf, np.inf, (), np.float32)
        row["_episode"] = spaces.Box(0, 2**62, (), np.int64)
        twice = {name for name in self.boxes if [*self.names.values()].count(name) > 1}
        if taken := twice | self.boxes.keys() & {*row, *RESERVED}:
            raise RunError(f"{env_id} has an observation named {min(taken)!r}: rename it")
        if not self.boxes:
            raise RunError(f"{env_id} observes {list(leaves)}: no use for obs={options.obs!r}")
        self.observation_space = spaces.Dict(self.boxes | row)
        width, self.action_classes, self.decode = _actions(self.env.action_space, env_id)
        self.action_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)

    def _build(self):
        """gymnasium.make; errors name the missing package, or ids that are like an unknown one."""
        options, name, kwargs = self.options, self.env_id.split(":")[-1], {}
        if atari := name.startswith("ALE/"):
            kwargs["repeat_action_probability"] = 0.25 if options.sticky else 0.0
            kwargs |= {"frameskip": 1, "full_action_space": options.sticky}
        make = partial(gymnasium.make, self.env_id, disable_env_checker=True, **kwargs)
        try:
            with warnings.catch_warnings():  # dm_control's import shows all deprecations
                for module in MODULES.get(name.split("/")[0], ()):
                    importlib.import_module(module)
            env = make()
            dm_control = hasattr(getattr(env.unwrapped, "physics", None), "render")  # has no mode
            can = "rgb_array" in (env.metadata.get("render_modes") or ()) and not dm_control
            if can and (self.drawn or self.filmed):
                env.close()
                env = make(render_mode="rgb_array")
            if atari:
                skip = {"frame_skip": options.action_repeat, "screen_size": options.image_size}
                env = gymnasium.wrappers.AtariPreprocessing(env, grayscale_obs=False, **skip)
            return env
        except (ModuleNotFoundError, gymnasium.error.DependencyNotInstalled) as error:
            fix = [f"; pip install {p}" for start, p in PACKAGES.items() if name.startswith(start)]
            raise RunError(f"{self.env_id} needs a package: {error}{''.join(fix)}") from error
        except (AttributeError, OSError, ImportError) as error:  # of MuJoCo without its library
            if "gl" in str(error).lower():
                raise RunError(f"{self.env_id} cannot be made: {error}{GL_HELP}") from error
            raise
        except gymnasium.error.Error as error:
            if name in gymnasium.registry:
                raise
            with contextlib.suppress(Exception):
                importlib.import_module("shimmy")  # its ids are among the similar ones
            near = ", ".join(difflib.get_close_matches(name, gymnasium.registry, 3, 0.4))
            text = f"unknown environment {self.env_id!r}: {error} Similar: {near}"
            raise RunError(text) from error

    def _probe(self):
        """Render once, so that a missing library shows now; without a video one can live."""
        try:
            self.env.reset(seed=0)
            return self._picture(self.options.image_size) is not None
        except Exception as error:
            fix = GL_HELP if self._model() is not None else ""
            text = f"{self.env_id} cannot be rendered: {error}{fix}"
            if self.drawn:
                raise RunError(text) from error
            if not isinstance(error, RunError):  # it has no pictures at all
                warnings.warn(text, stacklevel=2)
            return False

    def _model(self):
        """MuJoCo's model in an environment of dm_control or gymnasium, else None."""
        base = self.env.unwrapped
        model = getattr(getattr(base, "physics", base), "model", None)
        return model if hasattr(model, "vis") else None

    def _picture(self, size):
        """The present state as uint8 [size, size, 3]."""
        options, base = self.options, self.env.unwrapped
        camera, physics, model = options.camera, getattr(base, "physics", None), self._model()
        if model is not None:  # read by the first picture, which makes the context
            side = max(options.frames, options.image_size, model.vis.global_.offwidth)
            model.vis.global_.offwidth = model.vis.global_.offheight = side
            if options.render_quality == "fast":
                model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        if hasattr(physics, "render"):
            name = self.env_id.lower()  # the cameras of the authors' code
            usual = 2 if "quadruped" in name else 4 if "rodent" in name else 0
            camera = camera if camera >= 0 else min(usual, model.ncam - 1)
            return physics.render(size, size, camera_id=camera)
        if (renderer := getattr(base, "mujoco_renderer", None)) is not None:
            renderer.width = renderer.height = size
            renderer.camera_id = camera if camera >= 0 else renderer.camera_id
            if renderer.viewer is not None:
                renderer.viewer.viewport.width = renderer.viewer.viewport.height = size
        if self.env.render_mode != "rgb_array":
            raise RunError("it has no render_mode rgb_array")
        return np.ascontiguousarray(_resize(np.asarray(self.env.render()), size))

    def frame(self):
        return self._picture(self.options.frames) if self.filmed else None

    def step(self, action):
        return self._next(action), 0.0, False, False, {}

    def _next(self, action, draw=True):
        """One step, or a reset after the last row of an episode; EnvError if that fails."""
        first, reward, terminated, truncated = self.done, 0.0, False, False
        self.episode += first
        self.count = 0 if first else self.count + 1
        try:
            if first:
                seed = np.random.SeedSequence(self.seed, spawn_key=(self.index, self.episode))
                obs, _ = self.env.reset(seed=int(seed.generate_state(1)[0]) >> 1)  # fits an int32
            repeat = 1 if "ALE/" in self.env_id else self.options.action_repeat
            for _ in range(0 if first else repeat):
                obs, r, terminated, truncated, _ = self.env.step(self.decode(action))
                reward += float(r)
                if terminated or truncated:
                    break
            row = self._observe(obs, draw) | {"reward": np.float32(reward)}
        except Exception as error:
            traceback.print_exception(error)  # here, because no traceback leaves a worker
            raise EnvError(f"{error!r} was raised {self._where()}") from error
        for key in (key for key, value in row.items() if not np.isfinite(value).all()):
            kind = "reward" if key == "reward" else f"observation {key!r}"
            raise EnvError(f"{kind} of {self.env_id} is not finite {self._where()}")
        self.done = bool(terminated or truncated)
        row |= {"is_first": np.bool_(first), "is_terminal": np.bool_(terminated)}
        return row | {"is_last": np.bool_(self.done), "_episode": np.int64(self.episode)}

    def _where(self):
        return f"at step {self.count} of environment {self.index} (episode {self.episode})"

    def _observe(self, obs, draw):
        found, row, size = _flatten(obs), {}, self.options.image_size
        for key, name in self.names.items():
            image, value = self.boxes[name].dtype == np.uint8, np.asarray(found[key])
            row[name] = _resize(value, size) if image else value.astype(np.float32).ravel()
        if self.drawn:
            row["pixels"] = self._picture(size) if draw else np.zeros((size, size, 3), np.uint8)
        return row

    def repeat(self, episodes, actions, ends):
        """Repeat the actions of a saved episode and return its last row."""
        self.episode, self.done = episodes[self.index] - 1, True
        actions = actions[self.index]
        row = self._next(None, draw=len(actions) == 0)
        for k, action in enumerate(actions):
            if self.done:  # over too early
                break
            row = self._next(action, draw=k == len(actions) - 1)
        self.done |= ends[self.index]
        return row

    def close(self):
        self.env.close()


def _flatten(tree, prefix=""):
    """The leaves of nested dicts by their keys joined with "."; a lone leaf is "observation".

    A "/" in a key becomes a "." too: keys name files of the replay.
    """
    if not isinstance(tree, (dict, spaces.Dict)):
        return {prefix or "observation": tree}
    dot = f"{prefix}." if prefix else ""
    parts = [_flatten(branch, f"{dot}{key}") for key, branch in tree.items()]
    return {key.replace("/", "."): leaf for part in parts for key, leaf in part.items()}


def _is_image(space):
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 3 or (len(space.shape) == 2 and min(space.shape) >= 16)


def _row_box(key, space, size, env_id):
    """The Box of an observation in the row: uint8 [size, size, C] or float32 [D]."""
    shape, name = space.shape, f"observation {key!r} of {env_id}, {space},"
    if not isinstance(space, spaces.Box):
        fix = "wrap the environment in gymnasium.wrappers.FlattenObservation"
        raise RunError(f"{name} is neither a Box nor a Dict of them: {fix}")
    if not _is_image(space):
        return spaces.Box(-np.inf, np.inf, (int(np.prod(shape)),), np.float32)
    channels = 1 if len(shape) == 2 else shape[2]
    if channels > min(shape[:2]):
        raise RunError(f"{name} has to have its channels last")
    return spaces.Box(0, 255, (size, size, channels), np.uint8)


def _resize(image, size):
    """uint8 [H, W] or [H, W, C] -> [size, size, C], bilinear."""
    image = image[..., None] if image.ndim == 2 else image
    if image.shape[:2] == (size, size):
        return image
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([p.resize((size, size), Image.Resampling.BILINEAR) for p in planes], -1)


def action_width(spec) -> int:
    """Width of the action vector of an action space, of anything with a shape, or the number."""
    if isinstance(spec, spaces.Space):
        return _actions(spec, "the environment")[0]
    return spec if isinstance(spec, int) else spec.shape[-1]


def _actions(space, env_id):
    """Width of the action vector, sizes of its one-hots, function to the environment's action."""
    match space:
        case spaces.Box():
            low, high = space.low.astype(float).ravel(), space.high.astype(float).ravel()
            finite = np.isfinite(low) & np.isfinite(high)
            bottom, top = np.where(finite, low, -1), np.where(finite, high, 1)
            whole = np.issubdtype(space.dtype, np.integer)

            def scale(action):
                action = action.astype(float).clip(-1, 1) * (top - bottom) / 2 + (top + bottom) / 2
                action = (action.round() if whole else action).clip(low, high)
                return action.astype(space.dtype).reshape(space.shape)

            return low.size, (), scale
        case spaces.Discrete():
            sizes, start = np.array([space.n]), space.start
        case spaces.MultiDiscrete():
            sizes, start = space.nvec.ravel(), space.start.ravel()
        case spaces.MultiBinary():
            sizes, start = np.full(space.shape, 2).ravel(), 0
        case _:
            fix = "wrap it in gymnasium.wrappers.TransformAction to get a Box or a MultiDiscrete"
            raise RunError(f"actions of {env_id} are {space}, which is not supported: {fix}")

    def choose(action):
        choice = np.stack([part.argmax() for part in np.split(action, sizes.cumsum()[:-1])])
        return (choice + start).astype(space.dtype).reshape(space.shape)[()]  # scalar if Discrete

    return int(sizes.sum()), tuple(sizes.tolist()), choose
