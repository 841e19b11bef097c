"""Makes docs/api.md from proto/vtpm/v1/*.proto. With --check: fails if the committed page is not current."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT: Final = Path(__file__).resolve().parent.parent
PROTOS: Final = ROOT / "proto"
PAGE: Final = ROOT / "docs" / "api.md"

# Field numbers of descriptor.proto, as SourceCodeInfo paths use them.
_MESSAGE, _ENUM, _SERVICE, _SYNTAX = 4, 5, 6, 12
_FIELD, _NESTED_MESSAGE, _NESTED_ENUM, _METHOD, _VALUE = 2, 3, 4, 2, 2

_SCALARS: Final = {
    FieldDescriptorProto.TYPE_BOOL: "bool",
    FieldDescriptorProto.TYPE_BYTES: "bytes",
    FieldDescriptorProto.TYPE_DOUBLE: "double",
    FieldDescriptorProto.TYPE_FLOAT: "float",
    FieldDescriptorProto.TYPE_INT32: "int32",
    FieldDescriptorProto.TYPE_INT64: "int64",
    FieldDescriptorProto.TYPE_STRING: "string",
    FieldDescriptorProto.TYPE_UINT32: "uint32",
    FieldDescriptorProto.TYPE_UINT64: "uint64",
}

_HEAD: Final = """\
# API reference

This page is made from `proto/vtpm/v1/` by `script/docs_api.py`. Do not edit it.

The operators' socket, `operator.sock` in the runtime directory, serves every service below. An instance's guest socket,
`guest.sock`, serves `TpmService` for that instance alone. Both also serve `grpc.health.v1.Health` and server reflection. What
a guest may have under way at once, and how large and how late it may be, is in [operations](operations.md#limits).

An error carries a `google.rpc.ErrorInfo` with the domain `vtpm`: a stable reason, and the subject and the remedy as metadata.
"""

_Location = tuple[int, ...]


class Page:
    """The page of one file after another; `package` is left out of type names."""

    def __init__(self, package: str) -> None:
        self._prefix = f".{package}."
        self._comments: Mapping[_Location, str] = {}
        self._lines: list[str] = []

    def text(self) -> str:
        """Return what was written so far."""
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).strip() + "\n"

    def file(self, proto: FileDescriptorProto) -> None:
        """Write one file: services, messages, enumerations."""
        self._comments = {tuple(item.path): _comment(item.leading_comments) for item in proto.source_code_info.location}
        self._add(f"## {proto.name}", self._comments.get((_SYNTAX,), ""))
        for index, service in enumerate(proto.service):
            self._service(service, (_SERVICE, index))
        for index, message in enumerate(proto.message_type):
            self._message(message, message.name, (_MESSAGE, index))
        for index, enumeration in enumerate(proto.enum_type):
            self._enumeration(enumeration, enumeration.name, (_ENUM, index))

    def _add(self, *paragraphs: str) -> None:
        for paragraph in paragraphs:
            self._lines += [paragraph, ""]

    def _about(self, path: _Location) -> str:
        return self._comments.get(path, "")

    def _table(self, head: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
        written = list(rows)
        if not written:
            self._add("No fields.")
            return
        lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in written)]
        self._add("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def _service(self, service: ServiceDescriptorProto, path: _Location) -> None:
        self._add(f"### {service.name}", self._about(path))
        rows = (
            (
                f"`{method.name}`",
                ("stream of " if method.client_streaming else "") + self._link(method.input_type),
                ("stream of " if method.server_streaming else "") + self._link(method.output_type),
                self._about((*path, _METHOD, index)),
            )
            for index, method in enumerate(service.method)
        )
        self._table(("Method", "Request", "Response", "Meaning"), rows)

    def _message(self, message: DescriptorProto, name: str, path: _Location) -> None:
        self._add(f"### {name}", self._about(path))
        entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        rows = (
            (str(field.number), f"`{field.name}`", self._type(field, entries), self._about((*path, _FIELD, index)))
            for index, field in enumerate(message.field)
        )
        self._table(("Number", "Field", "Type", "Meaning"), rows)
        for index, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                self._message(nested, f"{name}.{nested.name}", (*path, _NESTED_MESSAGE, index))
        for index, enumeration in enumerate(message.enum_type):
            self._enumeration(enumeration, f"{name}.{enumeration.name}", (*path, _NESTED_ENUM, index))

    def _enumeration(self, enumeration: EnumDescriptorProto, name: str, path: _Location) -> None:
        self._add(f"### {name}", self._about(path))
        rows = (
            (str(value.number), f"`{value.name}`", self._about((*path, _VALUE, index)))
            for index, value in enumerate(enumeration.value)
        )
        self._table(("Number", "Value", "Meaning"), rows)

    def _type(self, field: FieldDescriptorProto, entries: Mapping[str, DescriptorProto]) -> str:
        entry = entries.get(field.type_name.rpartition(".")[2])
        if entry is not None:
            key, value = entry.field
            return f"map of {self._type(key, {})} to {self._type(value, {})}"
        text = _SCALARS[field.type] if field.type in _SCALARS else self._link(field.type_name)
        return f"repeated {text}" if field.label == FieldDescriptorProto.LABEL_REPEATED else text

    def _link(self, type_name: str) -> str:
        if not type_name.startswith(self._prefix):
            return f"`{type_name.removeprefix('.')}`"
        name = type_name.removeprefix(self._prefix)
        return f"[{name}](#{name.lower().replace('.', '')})"


def _comment(text: str) -> str:
    return "\n".join(line.removeprefix(" ").rstrip() for line in text.strip().splitlines())


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def descriptors(protos: Path) -> FileDescriptorSet:
    """Compile every public proto, comments included."""
    names = sorted(str(path.relative_to(protos)) for path in (protos / "vtpm" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "descriptors"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", f"--descriptor_set_out={out}"]
        subprocess.run([*command, "--include_source_info", *names], check=True)
        return FileDescriptorSet.FromString(out.read_bytes())


def make() -> str:
    """Return the page."""
    files = descriptors(PROTOS).file
    page = Page(files[0].package)
    for proto in files:
        page.file(proto)
    return f"{_HEAD}\n{page.text()}"


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it with what is committed."""
    made = make()
    if "--check" not in arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    print("script/docs_api.py: docs/api.md is not current: run ./script/docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
