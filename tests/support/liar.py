"""A real engine host whose workers lie when they are told to: Python starts this as its `sitecustomize`.

What a worker says of its keys, which template it makes an AK from, and what it says that its TPM has opened, is as the file
`lie.json` beside it says when the worker is forked; without one it is honest.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("lie.json")


class Liar:
    """The test's hand on such an engine host: `path` is for PYTHONPATH."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shutil.copy(__file__, path / "sitecustomize.py")

    def says(self, **lie: object) -> None:
        """Tell workers that are forked from now on what to say; nothing: the truth."""
        (self.path / "lie.json").write_text(json.dumps(lie))


def _become_one() -> None:
    from vtpm.engine import duties, provisioning

    operations: Any = import_module("vtpm.engine.operations")

    lie: dict[str, Any] = {}

    def learn() -> None:
        lie.clear()
        if _FILE.exists():
            lie.update(json.loads(_FILE.read_text()))

    # Behind the wall nobody can read a file.
    os.register_at_fork(after_in_child=learn)
    honest_keys, honest_template = duties._add_keys, operations.ak_template
    honest_activate = provisioning.Provisioning._activate

    def add_keys(reply: Any, keys: Any) -> None:
        honest_keys(reply, keys)
        for key in reply.keys:
            if key.role in lie.get("publics", {}):
                key.tpmt_public = bytes.fromhex(lie["publics"][key.role])

    def template(algorithm: Any) -> bytes:
        public = bytes(honest_template(algorithm))
        attributes: int = int.from_bytes(public[4:8], "big") & ~int(lie.get("without", 0))
        return public[:4] + attributes.to_bytes(4, "big") + public[8:]

    def activate(self: Any, item: Any) -> bytes:
        honest: bytes = b"" if "secret" in lie else honest_activate(self, item)
        return bytes.fromhex(lie["secret"]) if "secret" in lie else honest

    duties._add_keys = add_keys
    operations.ak_template = template
    provisioning.Provisioning._activate = activate  # type: ignore[method-assign]


if __name__ == "sitecustomize" and "vtpm.engine.host" in sys.orig_argv:
    _become_one()
