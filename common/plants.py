"""PILCO's physical systems, gymnasium ids PILCO/<name>-v0 for each name in PLANTS."""

import math
from collections.abc import Callable

import gymnasium
import numpy as np
from PIL import Image, ImageDraw


def pendulum(z, u, g=9.82, m=1.0, length=1.0, b=0.01):
    """State (dtheta, theta), theta = 0 hangs; torque u (N m)."""
    dtheta, theta = z
    return np.array(
        [(u[0] - b * dtheta - m * g * length * np.sin(theta) / 2) * 3 / (m * length**2), dtheta]
    )


def cart_pole(z, u, g=9.82, m=0.5, cart=0.5, length=0.5, b=0.1):
    """State (x, dx, dtheta, theta), theta = 0 hangs; force u (N) on the cart."""
    _, dx, dtheta, theta = z
    sin, cos, force = np.sin(theta), np.cos(theta), u[0] - b * dx
    pull = m * length * dtheta**2 * sin
    ddx = (2 * pull + 3 * m * g * sin * cos + 4 * force) / (4 * (cart + m) - 3 * m * cos**2)
    ddtheta = -3 * pull * cos - 6 * (cart + m) * g * sin - 6 * force * cos
    return np.array([dx, ddx, ddtheta / (length * (4 * (m + cart) - 3 * m * cos**2)), dtheta])


def double_pendulum(z, u, g=9.82, m=0.5, length=0.5):
    """State (dtheta1, dtheta2, theta1, theta2), 0 is upright; a torque (N m) at each joint."""
    dtheta1, dtheta2, theta1, theta2 = z
    inertia, m12 = m * length**2 / 12, 0.5 * m * length**2  # mass matrix: m11, m12 * cos, m22
    cos, sin = np.cos(theta1 - theta2), np.sin(theta1 - theta2)
    m11, m22 = 1.25 * m * length**2 + inertia, 0.25 * m * length**2 + inertia
    force1 = 1.5 * m * g * length * np.sin(theta1) - m12 * dtheta2**2 * sin + u[0]
    force2 = 0.5 * m * g * length * np.sin(theta2) + m12 * dtheta1**2 * sin + u[1]
    determinant = m11 * m22 - (m12 * cos) ** 2
    ddtheta1 = (m22 * force1 - m12 * cos * force2) / determinant
    ddtheta2 = (m11 * force2 - m12 * cos * force1) / determinant
    return np.array([ddtheta1, ddtheta2, dtheta1, dtheta2])


def cart_double_pendulum(z, u, g=9.82, m=0.5, cart=0.5, length=0.6, b=0.1):
    """State (x, dx, dtheta1, dtheta2, theta1, theta2), 0 is upright; force u (N) on the cart."""
    _, dx, dtheta1, dtheta2, theta1, theta2 = z
    sin1, sin2, sin12 = np.sin([theta1, theta2, theta1 - theta2])
    cos1, cos2, cos12 = np.cos([theta1, theta2, theta1 - theta2])
    arm, m23 = m * length / 2, m * length**2 / 2  # 3 arm and arm: of links 1 and 2
    mass = [
        [cart + 2 * m, -3 * arm * cos1, -arm * cos2],
        [-3 * arm * cos1, 4 / 3 * m * length**2, m23 * cos12],
        [-arm * cos2, m23 * cos12, m * length**2 / 3],
    ]
    force = [
        u[0] - b * dx - 3 * arm * dtheta1**2 * sin1 - arm * dtheta2**2 * sin2,
        3 * arm * g * sin1 - m23 * dtheta2**2 * sin12,
        arm * g * sin2 + m23 * dtheta1**2 * sin12,
    ]
    return np.array([dx, *np.linalg.solve(mass, force), dtheta1, dtheta2])


def runge_kutta(rate: Callable, z: np.ndarray, u: np.ndarray, dt: float, steps: int = 20):
    """z after dt seconds of constant u."""
    h = dt / steps
    for _ in range(steps):
        k1 = rate(z, u)
        k2 = rate(z + h / 2 * k1, u)
        k3 = rate(z + h / 2 * k2, u)
        k4 = rate(z + h * k3, u)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


class Plant(gymnasium.Env):
    """A scenario of the authors: an ODE, held actions, noisy observations.

    `joints(z)` (K, 2), in meters, is what `render` draws; the last one is the tip. The reward is
    minus the saturating cost of the true tip's distance d to `goal`, -1 + exp(-(d / width)^2 / 2).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self, rate, joints, goal, width, start, std, noise, limit, dt=0.1, render_mode=None
    ):
        self.rate, self.joints, self.goal, self.width, self.dt = rate, joints, goal, width, dt
        self.start, self.std, self.noise, self.limit = map(np.array, (start, std, noise, limit))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self.start.shape)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, self.limit.shape)
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.z = self.np_random.normal(self.start, self.std)
        return self.observe(), {}

    def step(self, action):
        u = np.clip(np.asarray(action, float), -1, 1) * self.limit
        self.z = runge_kutta(self.rate, self.z, u, self.dt)
        distance2 = np.square(self.joints(self.z)[-1] - np.array(self.goal)).sum()
        return self.observe(), np.exp(-0.5 * distance2 / self.width**2) - 1, False, False, {}

    def observe(self):
        return self.np_random.normal(self.z, self.noise).astype(np.float32)

    def render(self):
        picture = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(picture)
        pixels = [tuple(128 + 90 * np.array([x, -y])) for x, y in self.joints(self.z)]
        x, y = (128 + 90 * self.goal[0], 128 - 90 * self.goal[1])
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), outline="red", width=2)
        draw.line((0, 128, 256, 128), fill="lightgray")
        draw.line(pixels, fill="black", width=5)
        draw.rectangle((pixels[0][0] - 12, 122, pixels[0][0] + 12, 134), fill="steelblue")
        return np.asarray(picture)


def chain(base: float, *angles: float, length: float) -> np.ndarray:
    """Joints (K, 2) of a chain of links that begins at (base, 0); angles are from upright."""
    links = [(length * np.sin(angle), length * np.cos(angle)) for angle in angles]
    return np.cumsum([(base, 0.0), *links], 0)


PLANTS = {
    "Pendulum": (40, dict(
        rate=pendulum, joints=lambda z: chain(0, math.pi - z[1], length=1.0), goal=(0, 1),
        width=0.5, start=(0, 0), std=(0.1, 0.1), noise=(0.1, 0.01), limit=(2.5,))),
    "CartPole": (40, dict(
        rate=cart_pole, joints=lambda z: chain(z[0], math.pi - z[3], length=0.5), goal=(0, 0.5),
        width=0.25, start=(0,) * 4, std=(0.1,) * 4, noise=(0.01,) * 4, limit=(10,))),
    "DoublePendulum": (30, dict(
        rate=double_pendulum, joints=lambda z: chain(0, z[2], z[3], length=0.5), goal=(0, 1),
        width=0.5, start=(0, 0, math.pi, math.pi), std=(0.1, 0.1, 0.01, 0.01), noise=(0.01,) * 4,
        limit=(2, 2))),
    "CartDoublePendulum": (100, dict(  # 0.6 x: the authors' cost has links of 1 m instead of 0.6
        rate=cart_double_pendulum, goal=(0, 1.2), width=0.3,
        joints=lambda z: chain(0.6 * z[0], -z[4], -z[5], length=0.6),
        start=(0,) * 4 + (math.pi,) * 2, std=(0.1,) * 4 + (0.01,) * 2, noise=(0.01,) * 6,
        limit=(20,), dt=0.05)),
}  # fmt: skip
for name, (steps, kwargs) in PLANTS.items():
    gymnasium.register(f"PILCO/{name}-v0", Plant, max_episode_steps=steps, kwargs=kwargs)
