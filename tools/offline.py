"""Train a new agent on the replay of another run, without stepping an environment.

    python -m tools.offline runs/dreamer_v3/Pendulum-v1/seed0 dreamer_v3.py --steps 20000 \\
        --run runs/offline

After the other run come a script (dreamer_v3.py, dreamer.py or a fork of them) and its flags. The
other run, of any of these, is only read: its rows are copied as if just collected, with latents of
zero. A step adds no row, but brings the updates that it would bring in the script: --steps sets how
many there are. Folder, log, resume and evaluation are those of any run.
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from tensordict import TensorDict

from common import checkpoint
from common.checkpoint import RunError
from common.envs import LATENTS, Options, example_rows, make_envs
from common.replay import Replay, check_room, make_replay
from common.run import Run, args_dict, check_same_args, launch, open_folder, prepare
from tools import import_script
from tools.dream_env import saved_replay


class OfflineRun(Run):
    """A Run whose args.json names the run that has collected its rows."""

    def __init__(self, source: str, *args):
        self.source = source
        super().__init__(*args)

    def open(self):
        requested = {"script": self.script, **args_dict(self.args), "offline": self.source}
        return open_folder(self.script, self.args, requested)


def parse_args(argv: list[str]) -> tuple:
    """RUN SCRIPT and the script's flags -> the run folder, the module of the script, its args."""
    if len(argv) < 2:
        sys.exit(__doc__)
    source, path, *flags = argv
    script = import_script(path)
    args = script.parse_args(flags)
    if args.eval or args.benchmark or not hasattr(args, "num_envs"):
        text = "tools.offline trains agents of dreamer_v3.py or dreamer.py"
        raise RunError(f"{text}: for pilco.py, --eval and --benchmark start the script itself")
    return source, script, args


def check_source(folder: Path, state: dict, args, spec: dict):
    """RunError unless the run with this checkpoint has collected rows as one of `args` would."""
    if folder.resolve() == Path(args.run).resolve():
        raise RunError(f"{folder} is this run's own folder: choose another --run")
    if not (folder / "replay").is_dir():
        raise RunError(f"there is no replay in {folder}")
    num_envs = state["replay"]["layout"]["num_envs"]  # of one rank
    saved = state["agent"]["args"] | {"num_envs": num_envs, "spec": state["agent"]["spec"]}
    now = args_dict(args) | {"spec": spec}
    same = {"spec", "env_id", "num_envs"} | {x.name for x in fields(Options)} - {"env_workers"}
    free = (saved.keys() - same) | (saved.keys() ^ now.keys())  # scripts differ in --image-size
    check_same_args(folder, saved, now, free, "tools.offline needs the same ones here")


def copy_rows(source: Replay, replay: Replay):
    """Append all rows that `source` can draw, with latents of zero; RunError if they are few."""
    n = source.num_envs
    latents = {key: torch.zeros(n, *replay.storage[key].shape[1:]) for key in replay.updatable}
    for row in range(source.oldest, source.total):
        where = row % source.allocated * n + torch.arange(n)
        rows = {key: leaf[where] for key, leaf in source.storage.items()}
        rows["is_first"] |= row == source.oldest  # what came before it is gone
        replay.append(TensorDict(rows | latents, [n]))
    print(f"{source.rows:14,} rows from {source.directory}")
    if not replay.ready:
        text = "these rows are too few, or their episodes too short"
        raise RunError(f"{text}: choose a smaller --batch-length or --batch-size")


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    source, script, args = parse_args(argv)
    sys.argv = ["-m", "tools.offline", *argv]  # the command that args.json records
    folder = Path(source).absolute()  # since environments may change the working directory
    v3 = hasattr(script, "Ratio")  # else it is dreamer.py; what follows is as in their main
    if v3:
        updates_per_row = args.train_ratio / (args.batch_size * args.batch_length)
    else:
        updates_per_row = args.train_steps * args.action_repeat / args.train_every
    device = prepare(script.SCRIPT, args, args.steps / args.action_repeat * updates_per_row)
    state = checkpoint.load(folder)
    envs = make_envs(args, num_envs=1, env_workers=False)  # only for their spec
    envs.close()
    check_source(folder, state, args, envs.spec)
    agent = script.Agent(envs.spec, args, device)
    example = agent.stored_rows(example_rows(agent.spec), agent.initial(1))[0]
    stored = saved_replay(folder, state["replay"]["layout"], example.exclude(*LATENTS))
    stored.total = state["replay"]["total"]
    sized = replace(args, steps=stored.rows * args.action_repeat)  # for a replay of these rows
    check_room(sized, example, Path(args.run))
    options = dict(online=True) if v3 else dict(episodes=True, last_window=args.pcont)
    schedule = {"ratio": script.Ratio(updates_per_row)} if v3 else {}
    with OfflineRun(str(folder), script.SCRIPT, args, agent) as run:
        replay = make_replay(sized, example, run.folder, **options)
        if not run.saved:  # before the first save: if the rows are too few, no run is left
            copy_rows(stored, replay)
        latent = run.resume(agent.initial(args.num_envs), replay=replay, **schedule)

        while run.training(latent):
            if not run.owed:  # resumed runs first do owed updates
                run.step = run.done = run.step + args.num_envs * args.action_repeat
                if v3:
                    run.owe(schedule["ratio"](run.step // args.action_repeat))
                else:
                    run.owe(script.updates_owed(args, run, replay))
            for batch in run.batches(replay):
                metrics = agent.update(batch)
                if v3:
                    metrics, latents = metrics
                    replay.write_back(batch, latents)
                run.add(metrics)
        run.finish()


if __name__ == "__main__":
    launch(main)
