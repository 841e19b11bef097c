"""pyseccomp, imported without `ctypes.util`, which loads half of the library to ask another process where libseccomp is.

That is most of what the import takes, and a program that takes swtpm's place is waited for.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType
from typing import Any, Final

# By the names that the dynamic linker knows them by, on every Linux with glibc.
_LIBRARIES: Final = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}
_UTIL: Final = "ctypes.util"


def _there() -> bool:
    try:
        for name in _LIBRARIES.values():
            ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _import() -> Any:
    if _UTIL in sys.modules or not _there():
        import pyseccomp

        return pyseccomp
    stand_in: Any = ModuleType(_UTIL)
    stand_in.find_library = _LIBRARIES.get
    module: Any = ctypes
    sys.modules[_UTIL] = module.util = stand_in
    try:
        import pyseccomp
    finally:
        # Whoever wants the real one imports it.
        del sys.modules[_UTIL], module.util
    return pyseccomp


pyseccomp: Final = _import()
