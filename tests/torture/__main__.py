"""`./script/torture [--hostile] [--seconds N] [--seed S] [--instances N]`: exit status 1 if anything was lost."""

from __future__ import annotations

import argparse
import secrets
import sys

from tests.hostile.run import hostile
from tests.torture.run import torture


def main() -> int:
    """Run it and print what happened."""
    parser = argparse.ArgumentParser(prog="script/torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--hostile", action="store_true", help="workers turn on the daemon beside two that must not notice")
    arguments = parser.parse_args()
    sys.stderr.write(f"seed {arguments.seed}\n")
    if arguments.hostile:
        found = hostile(arguments.seconds, arguments.seed)
        sys.stdout.write(f"{found}\n")
        return 1 if found.violations else 0
    report = torture(arguments.seconds, arguments.seed, arguments.instances)
    sys.stdout.write(f"{report}\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
