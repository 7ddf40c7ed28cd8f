"""The table of peers: its programs, what it reads from their output, medians and ratios."""

import re
import sys
import time

import pytest

from common.checkpoint import RunError
from tools.peers import table
from tools.peers.table import POLICY, UPDATE, Row

AUTHORS = """
import os, sys
folder, repeats = sys.argv[1:]
with open(folder + "/rounds", "a+") as file:  # one letter a round
    file.write("x")
    file.seek(0)
    ms = {1: 100, 2: 900, 3: 200}[len(file.read())]
print("a line of their own: 5.0 ms      update of something")
print(f"{ms:10.1f} ms      update: {repeats} repeats on {len(os.sched_getaffinity(0))} CPU")
"""
OURS = """
import sys
import time
assert sys.argv[1:] == ["--benchmark", "--threads", "1"]
print("      50.0 ms      update (median of 10; the first took 1.2 s)")
print("      12.0 ms      aten::mm, while profiled")
"""
PROGRAMS = {
    "authors.py": AUTHORS,
    "ours.py": OURS,
    "fails.py": "print('1.0 ms update: x')\nraise SystemExit('first line\\nno module named y')",
    "half.py": "print('       7.0 ms      100 points: x')",
    "sleeps.py": "import time; time.sleep(60)",
    "policy.py": "print('  30.0 ms  100 points, 1 GB at peak')\nprint('  60.4 ms  300 points: y')",
}
ROWS = (
    Row("authors", "jax", "authors.py 10", UPDATE),
    Row("ours", "", "ours.py --benchmark", UPDATE),
    Row("left out", "r2dreamer", "authors.py 10", UPDATE),
    Row("fails", "jax", "fails.py", UPDATE),
    Row("half", "jax", "half.py", POLICY),
    Row("policy", "jax", "policy.py", POLICY),
    Row("sleeps", "jax", "sleeps.py", POLICY),
)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_rounds_medians_ratios_and_reasons(tmp_path, monkeypatch, capsys):
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(table, "REPO", tmp_path)
    monkeypatch.setattr(table, "ROWS", ROWS)
    monkeypatch.setattr(table, "commit", lambda folder: "c0ffee" if folder else "none")
    flags = ["--threads", "1", "--timeout", "1", "--jax", sys.executable, str(tmp_path)]
    table.main(flags)
    out, err = capsys.readouterr()
    assert out.startswith("1 of ") and "3 rounds, alternating" in out.splitlines()[0]
    assert re.findall(r"round (\d) of 3: (\w+)", err) == [
        *(("1", name) for name in ("authors", "ours", "fails", "half", "policy", "sleeps")),
        *((number, name) for number in "23" for name in ("authors", "ours", "policy")),
    ]
    head, line, *rows = cells(out.split("\n\n")[1])
    assert len(head) == 7 and set(line) == {"---"}
    update, points = "DreamerV3, update", ["PILCO, 100 points", "PILCO, 300 points"]
    slow = "takes more than 1 s"
    lost = "exit status 0: 7.0 ms      100 points: x"
    assert rows == [
        [update, "authors", "c0ffee", "200", "1.00", "100, 900, 200", "10 repeats on 1 CPU"],
        [
            update,
            "ours",
            "c0ffee",
            "50",
            "0.25",
            "50, 50, 50",
            "median of 10; the first took 1.2 s",
        ],
        [update, "left out", "", "not run", "", "", "no --r2dreamer"],
        [update, "fails", "c0ffee", "not run", "", "", "exit status 1: no module named y"],
        [points[0], "half", "c0ffee", "not run", "", "", lost],
        [points[0], "policy", "c0ffee", "30", "", "30, 30, 30", "1 GB at peak"],
        [points[0], "sleeps", "c0ffee", "not run", "", "", slow],
        [points[1], "half", "c0ffee", "not run", "", "", lost],
        [points[1], "policy", "c0ffee", "60", "", "60, 60, 60", "y"],
        [points[1], "sleeps", "c0ffee", "not run", "", "", slow],
    ]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--jax", "no/python", "."], "--jax: there is no program no/python"),
        (["--matlab", sys.executable, "no/folder"], "--matlab: there is no folder no/folder"),
        (["--threads", "4096"], "--threads 4096: this program may use "),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_flags(flags, error):
    with pytest.raises(RunError, match=re.escape(error)):
        table.main(flags)


def test_every_program_exists_and_ratios_are_to_the_authors():
    assert all((table.REPO / row.command.split()[0]).is_file() for row in table.ROWS)
    for works in (UPDATE, POLICY):
        names = [row.name for row in table.ROWS if row.works == works]
        assert "authors" in names[0] and len(names) == len(set(names))


def test_what_a_peer_prints_is_read(capsys, monkeypatch):
    monkeypatch.syspath_prepend(table.REPO / "tools" / "peers")
    from timing import report

    calls = []
    report("300 points", lambda: calls.append(time.sleep(0.02)), "2", "1,000 parameters")
    assert len(calls) == 5  # three do not count
    [(ms, work, notes)] = re.findall(table.LINE, capsys.readouterr().out)
    assert work == "300 points" and notes == "1,000 parameters" and 20 <= float(ms) < 200
