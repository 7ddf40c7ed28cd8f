"""How the programs beside this one time a call, and what tools/peers/table.py reads."""

import statistics
import time


def report(work: str, call, repeats: str | int, notes: str):
    """Print the median milliseconds of a call; the first three calls do not count."""
    seconds = []
    for _ in range(int(repeats) + 3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    print(f"{1e3 * statistics.median(seconds[3:]):10.1f} ms      {work}: {notes}", flush=True)
