"""Print as a Markdown table how long other code takes for the same work as the scripts, on the CPU.

    python -m tools.peers.table --jax jaxenv/bin/python dreamerv3 --matlab octave-cli pilco-matlab

docs/comparing.md says what is timed and where to get each source. A source's flag takes two words:
a Python (or Octave) that has its packages, and the folder of its repository. The programs take
turns, a process each, round by round. Each may use --threads CPUs, the first ones that `taskset`
allows this program. What has no source or fails is "not run", with the reason.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tyro

from common.checkpoint import RunError
from common.run import Count, check_flags, launch, origin

REPO = Path(__file__).resolve().parents[2]
UPDATE, POLICY = ("update",), ("100 points", "300 points")
LINE = rf"(?m)^ *([\d.]+) ms +({'|'.join(UPDATE + POLICY)})\W+(.*?)\)?$"


@dataclass
class Args:
    """Flags."""

    jax: tuple[str, str] | None = None  # danijar/dreamerv3, by DreamerV3's authors
    torchrl: tuple[str, str] | None = None  # pytorch/rl: DreamerV3 and PILCO
    r2dreamer: tuple[str, str] | None = None  # NM512/r2dreamer: DreamerV3
    matlab: tuple[str, str] | None = None  # UCL-SML/pilco-matlab, by PILCO's authors
    nrontsis: tuple[str, str] | None = None  # nrontsis/PILCO
    rounds: Count = 3  # processes of each program
    threads: Count = 2  # CPUs of each process
    timeout: Count = 900  # seconds that a process may take


class Row(NamedTuple):
    """A program and what it times: it prints a line "<number> ms <work>: <notes>" for each work."""

    name: str
    source: str  # the flag with its source; empty: this repository
    command: str
    works: tuple[str, ...]


DREAMER = "dreamer_v3.py --preset dmc_proprio --benchmark --compile"
PEERS = "tools/peers/"
ROWS = (  # the ratios of each work are to its first row
    Row("authors (JAX)", "jax", f"{PEERS}jax_update.py 10", UPDATE),
    Row("PlainDream, eager", "", f"{DREAMER} no", UPDATE),
    Row("PlainDream, compiled", "", f"{DREAMER} yes", UPDATE),
    Row("TorchRL, eager", "torchrl", f"{PEERS}torchrl_update.py 10 no", UPDATE),
    Row("TorchRL, compiled", "torchrl", f"{PEERS}torchrl_update.py 10 yes", UPDATE),
    Row("r2dreamer, eager", "r2dreamer", f"{PEERS}r2dreamer_update.py 10 no", UPDATE),
    Row("r2dreamer, compiled", "r2dreamer", f"{PEERS}r2dreamer_update.py 10 yes", UPDATE),
    Row("authors (MATLAB)", "matlab", f"{PEERS}matlab_policy.m 10", POLICY),
    Row("PlainDream", "", "pilco.py --benchmark", POLICY),
    Row("TorchRL", "torchrl", f"{PEERS}torchrl_policy.py 3", POLICY),
    Row("nrontsis/PILCO", "nrontsis", f"{PEERS}nrontsis_policy.py 10", POLICY),
)


def source(row: Row, args: Args) -> tuple[str, str] | None:
    """Program and folder of a row, None if its flag is not given; RunError if they do not exist."""
    if not row.source:
        return sys.executable, str(REPO)
    program, folder = getattr(args, row.source) or (None, None)
    if program and not shutil.which(program):
        raise RunError(f"--{row.source}: there is no program {program}")
    if folder and not Path(folder).is_dir():
        raise RunError(f"--{row.source}: there is no folder {folder}")
    return program and (program, folder)


def measure(row: Row, program: str, folder: str, args: Args) -> dict[str, tuple[float, str]]:
    """Run a program -> {work: (milliseconds, notes)}; RunError says why there is no result."""
    script, *words = row.command.split()
    words = [folder, *words] if row.source else [*words, "--threads", str(args.threads)]
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]  # every library counts them
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(args.threads)}
    try:
        done = subprocess.run(
            [program, str(REPO / script), *words], capture_output=True, text=True,
            timeout=args.timeout, env=env, preexec_fn=partial(os.sched_setaffinity, 0, cpus),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError(f"takes more than {args.timeout} s") from None
    found = {work: (float(ms), notes) for ms, work, notes in re.findall(LINE, done.stdout)}
    if done.returncode or found.keys() != {*row.works}:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise RunError(f"exit status {done.returncode}: {lines[-1][:200]}")
    return found


def commit(folder: str) -> str:
    """The commit of a repository, with -dirty if it has changes."""
    git = ["git", "-C", folder, "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def table(results: dict[Row, list[dict] | str], commits: dict[Row, str]) -> str:
    """Markdown; results of a row: what `measure` found in each round, or why it did not run."""
    lines = ["| work | code | commit | ms, median | ratio | each round | notes |", "|---" * 7 + "|"]
    for work in UPDATE + POLICY:
        medians = []  # 0: not run
        for row in (row for row in results if work in row.works):
            cells, found = ["not run", "", "", results[row]], results[row]
            medians.append(0)
            if not isinstance(found, str):
                values = [each[work][0] for each in found]
                medians[-1] = statistics.median(values)
                ratio = f"{medians[-1] / medians[0]:.2f}" if medians[0] else ""
                each = ", ".join(f"{ms:.0f}" for ms in values)
                cells = [f"{medians[-1]:.0f}", ratio, each, found[0][work][1]]
            task = f"{'DreamerV3' if work in UPDATE else 'PILCO'}, {work}"
            lines.append(f"| {' | '.join([task, row.name, commits[row], *cells])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    check_flags(args)
    cpus = len(os.sched_getaffinity(0))
    if args.threads > cpus:
        raise RunError(f"--threads {args.threads}: this program may use {cpus} CPUs")
    sources = {row: source(row, args) for row in ROWS}
    commits = {row: commit(sources[row][1]) if sources[row] else "" for row in ROWS}
    results = {row: [] if sources[row] else f"no --{row.source}" for row in ROWS}
    for number in range(args.rounds):
        for row in (row for row in ROWS if isinstance(results[row], list)):
            print(f"round {number + 1} of {args.rounds}: {row.name}", file=sys.stderr)
            try:
                results[row].append(measure(row, *sources[row], args))
            except RunError as error:
                results[row] = str(error)
    hardware, versions = (origin()[key] for key in ("hardware", "versions"))
    print(f"{args.threads} of {hardware}; {versions}; {args.rounds} rounds, alternating\n")
    print(table(results, commits))


if __name__ == "__main__":
    launch(main)
