"""The vTPM daemon: `python server.py --help`, or `./script/run`."""

from __future__ import annotations

import sys

from vtpm.daemon import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
