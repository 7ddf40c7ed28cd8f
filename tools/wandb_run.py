"""Train as a script does, mirrored to Weights & Biases (pip install wandb).

    python -m tools.wandb_run dreamer_v3.py --preset dmc_proprio --run runs/mirrored

W&B gets the flags, what the script writes for TensorBoard and, at the end, curve and video. The run
folder keeps the id of the W&B run, so that a resumed run goes on there; --fresh starts a new one.
"""

import sys
from pathlib import Path

from common.checkpoint import RunError
from common.run import args_dict, launch, run_folder
from tools import import_script


def parse_args(argv: list[str]) -> tuple:
    """SCRIPT and its flags -> the module of the script, its args."""
    path, *flags = argv or [""]
    script = import_script(path)
    args = script.parse_args(flags)
    if args.eval or args.benchmark or not args.tensorboard:
        text = "tools.wandb_run mirrors what training writes for TensorBoard"
        raise RunError(f"{text}: leave out --eval, --benchmark and --no-tensorboard")
    return script, args


def main(argv: list[str] | None = None):
    sys.argv = argv = sys.argv[1:] if argv is None else argv  # so args.json has SCRIPT
    script, args = parse_args(argv)
    folder = run_folder(script.SCRIPT, args)
    file, saved = folder / "wandb_id", (folder / "checkpoint.pt").exists() and not args.fresh
    options = {"id": (saved and file.exists() and file.read_text()) or None, "resume": "allow"}
    options |= {"project": script.SCRIPT, "name": str(folder), "sync_tensorboard": True}
    try:  # before script.main, since --fresh deletes a run
        from wandb import Error, Image, Video, init  # a mere folder named wandb has none of them
    except ImportError as error:
        raise RunError("tools.wandb_run needs a package: pip install wandb") from error
    try:
        mirror = init(**options)
    except Error as error:
        text = f"Weights & Biases did not start: {error}"
        raise RunError(f"{text} (WANDB_MODE=offline needs no account)") from error

    class MirroredRun(script.Run):
        def __enter__(self):
            (self.folder / file.name).write_text(mirror.id)
            mirror.config.update(args_dict(self.args), allow_val_change=True)
            return super().__enter__()

    script.Run = MirroredRun
    script.main(argv[1:])
    kinds = {"learning_curve.png": Image, "policy.mp4": Video, "policy.gif": Video}
    for path in filter(Path.exists, (folder / name for name in kinds)):
        mirror.log({path.stem: kinds[path.name](str(path))})
    mirror.finish()


if __name__ == "__main__":
    launch(main)
