"""`./script/bench [--write] [socket … boot]`: print a table, keep it in docs/performance.md."""

from __future__ import annotations

import argparse
import datetime as dt
import subprocess
import sys

from tests.bench.measure import Row, machine
from tests.bench.rows import ROWS
from tests.support.daemon import ROOT

_HEAD = ("what", "vtpm", "peer", "ratio", "reach", "")
_MARK = "<!-- table: ./script/bench --write -->"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    cells = [_HEAD, ("---",) * len(_HEAD)]
    cells += [(row.what, row.ours, row.peer, row.ratio, row.reach, "reached" if row.within else "missed") for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which; all without a name")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.rows or ROWS:
        sys.stderr.write(f"measuring {name} …\n")
        rows += ROWS[name]()
    text = table(rows)
    sys.stdout.write(f"{machine()}\n{text}\n")
    if arguments.write:
        page = ROOT / "docs" / "performance.md"
        head, _, _ = page.read_text().partition(_MARK)
        version = subprocess.run(["swtpm", "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
        peer = f"Peer: {version[0]}. " if version else ""
        day = dt.datetime.now(dt.UTC).date()
        page.write_text(f"{head}{_MARK}\n\nMeasured on {day}: {machine()}. {peer}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
