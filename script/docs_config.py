"""Makes docs/configuration.md from vtpm.config.Settings. With --check: fails if the committed page is not current."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vtpm.config import Settings

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_HEAD: Final = """\
# Configuration

This page is made from `vtpm.config.Settings` by `script/docs_config.py`. Do not edit it.

A setting is taken from the first of these places that has it:

1. a flag of the daemon, such as `--state-dir /srv/vtpm`;
2. an environment variable, such as `VTPM_STATE_DIR=/srv/vtpm`;
3. the TOML file, such as `state_dir = "/srv/vtpm"`;
4. the default.

The TOML file is the one that `VTPM_CONFIG_FILE` names; that one must exist. Without the variable it is `/etc/vtpm/vtpm.toml`
for root and `$XDG_CONFIG_HOME/vtpm/vtpm.toml` for other users, if it exists. An unknown key is an error.

`vtpm config check` reads the settings as the daemon would and says what is wrong. `vtpm config show` prints every setting in
force. Both take `--config-file` to read another file. A change takes effect when the daemon is started again.

The `vtpm` command uses the directories alone, to find the operators' socket: `--state-dir`, `--runtime-dir`, or the variables.
"""

_BOUNDS: Final = ((Gt, "gt", "above"), (Ge, "ge", "from"), (Lt, "lt", "below"), (Le, "le", "to"))
_TYPE_NAMES: Final = {Path: "path", str: "string", int: "integer", float: "number", bool: "boolean"}


def type_text(field: FieldInfo) -> str:
    """Return the type of a setting with its bounds, for people."""
    kind: Any = field.annotation
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_TYPE_NAMES.get(part, "nothing") for part in typing.get_args(kind))
    if origin is dict:
        return "table of " + " to ".join(_TYPE_NAMES.get(part, str(part)) for part in typing.get_args(kind))
    bounds = [
        f"{word} {getattr(item, attribute):g}"
        for item in field.metadata
        for bound, attribute, word in _BOUNDS
        if isinstance(item, bound)
    ]
    return " ".join([_TYPE_NAMES.get(kind, str(kind)), *bounds])


def default_text(field: FieldInfo) -> str:
    """Return the default; a factory says in its docstring, behind the colon, what it makes."""
    factory: Any = field.default_factory
    if factory is dict:
        return "empty"
    if factory is not None:
        return " ".join((factory.__doc__ or "").partition(": ")[2].split()).rstrip(".")
    if field.default is PydanticUndefined:
        return "none; required"
    if field.default == "":
        return "empty"
    return f"`{field.default}`"


def section(name: str, field: FieldInfo) -> str:
    """Return what is to be said about one setting."""
    rows = (
        ("TOML key", f"`{name}`"),
        ("Environment variable", f"`VTPM_{name.upper()}`"),
        ("Flag", f"`--{name.replace('_', '-')}`"),
        ("Type", type_text(field)),
        ("Default", default_text(field)),
    )
    table = "\n".join(f"| {label} | {text.replace('|', chr(92) + '|')} |" for label, text in rows)
    return f"### {name}\n\n{field.description or ''}\n\n| | |\n| --- | --- |\n{table}\n"


def make() -> str:
    """Return the page: an overview, then a section for each setting."""
    fields = Settings.model_fields
    overview = "\n".join(
        f"| [`{name}`](#{name}) | {default_text(field)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        for name, field in fields.items()
    )
    sections = "\n".join(section(name, field) for name, field in fields.items())
    return (
        f"{_HEAD}\n## Overview\n\n| Setting | Default | Meaning |\n| --- | --- | --- |\n{overview}\n\n## Settings\n\n{sections}"
    )


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it with what is committed."""
    made = make()
    if "--check" not in arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    print("script/docs_config.py: docs/configuration.md is not current: run ./script/docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
