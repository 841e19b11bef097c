"""vtpm-swtpm whose n-th call of a system function fails: `python -m tests.support.failing_files FUNCTION N ARMED …`.

Calls count from the moment on when the file ARMED is there, in this process alone: not in the worker that it forks. The file is
emptied once a call was made to fail, so that who watches knows that there was an n-th.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
from typing import Any

from vtpm.cli import dropin


def main() -> None:
    """Fail what is asked for, and run the drop-in with what follows."""
    function, number, armed, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    module: Any = fcntl if function == "lockf" else os
    real, real_stat, real_truncate = getattr(module, function), os.stat, os.truncate
    process, lock = os.getpid(), threading.Lock()
    left = int(number)

    def fails(*given: Any, **named: Any) -> Any:
        nonlocal left
        if os.getpid() == process and left:
            try:
                real_stat(armed)
            except FileNotFoundError:
                return real(*given, **named)
            with lock:
                left -= 1
                if not left:
                    real_truncate(armed, 0)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given, **named)

    setattr(module, function, fails)
    dropin.main()


if __name__ == "__main__":
    main()
