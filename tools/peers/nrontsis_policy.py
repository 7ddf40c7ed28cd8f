"""Time of a policy's expected cost and gradient in nrontsis/PILCO: two rows of table.py.

    git clone https://github.com/nrontsis/PILCO && git -C PILCO checkout a89c36a
    pip install tensorflow-cpu==2.21.0 gpflow==2.11.2 pandas "numpy<2"
    python tools/peers/nrontsis_policy.py PILCO [repeats]

The setting is that of `python pilco.py --benchmark`: 4 states, 1 action, 40 steps, 10 centers, 100
and 300 points, one policy. As in their training, TensorFlow compiles the whole rollout to a graph,
which factorizes the GPs at every step; a plain sine bounds the actions.
"""

import sys

from timing import report


def main(repository: str, repeats: str = "10"):
    sys.path.insert(0, repository)
    import numpy as np
    import tensorflow as tf
    from pilco.controllers import RbfController
    from pilco.models import PILCO
    from pilco.rewards import ExponentialReward

    rng = np.random.default_rng(0)
    for points in (100, 300):
        x = rng.normal(size=(points, 5))
        y = 0.1 * np.sin(x @ rng.normal(size=(5, 4))) + 0.002 * rng.normal(size=(points, 4))
        start = dict(m_init=np.zeros((1, 4)), S_init=0.01 * np.eye(4))
        parts = dict(controller=RbfController(4, 1, 10), reward=ExponentialReward(4))
        agent = PILCO((x, y), horizon=40, **parts, **start)
        for model in agent.mgpr.models:
            model.kernel.lengthscales.assign(rng.random(5) + 1.5)
            model.kernel.variance.assign(np.exp(-1.6) ** 2)
            model.likelihood.variance.assign(np.exp(-5.3) ** 2)
        variables = agent.controller.trainable_variables

        @tf.function
        def gradient(agent=agent, variables=variables):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(variables)
                loss = agent.training_loss()
            return tape.gradient(loss, variables)

        report(f"{points} points", gradient, repeats, f"tensorflow {tf.__version__}")
        assert all(np.isfinite(value).all() for value in gradient())


if __name__ == "__main__":
    main(*sys.argv[1:])
