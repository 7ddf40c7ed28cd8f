"""A script for test_sweep.py: writes a line of metrics.jsonl per step up to --steps; it resumes."""

import argparse
import fcntl
import json
import signal
import sys
import time
from pathlib import Path


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-id", default="Good")
    for name, default in (("seed", 0), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--run", default="")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--saving", type=float, default=0.0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise ValueError("--steps must be at least 1")
    return args


def main():
    args = parse_args()
    folder = Path(args.run or f"runs/counting/{args.env_id}/seed{args.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(args.saving), sys.exit("told to stop")))
    path = folder / "metrics.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    print(f"starts at {done}", flush=True)
    for step in range(done + 1, args.steps + 1):
        if args.env_id == "Bad" and step == 3:
            raise ValueError("three is too many")
        time.sleep(args.pause)
        row = {"step": step, "episode/return": 10.0 * step, "time/wall": 2.0 * step}
        if step == args.steps:
            row |= {"eval/return": 7.0, "eval/return_std": 1.0}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
