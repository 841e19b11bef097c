"""Makes the tables of docs/eventlog.md from vtpm.eventlog's own. With --check: fails if the committed page is not current."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vtpm.eventlog.bootpath import LOADERS
from vtpm.eventlog.findings import KINDS
from vtpm.eventlog.ima import TEMPLATES

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "eventlog.md"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows as a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def tables() -> dict[str, str]:
    """Return the page's tables by the name that their marks have."""
    findings = ((f"`{kind.name}`", str(kind.severity), kind.meaning, kind.sample) for kind in KINDS)
    templates = ((f"`{name}`", ", ".join(f"`{field}`" for field in fields)) for name, fields in TEMPLATES.items())
    return {
        "findings": table(("Finding", "How grave", "What it means", "Seen in"), findings),
        "loaders": "".join(f"- {name}\n" for name in dict.fromkeys(name for name, _ in LOADERS)),
        "templates": table(("Template", "Fields"), templates),
    }


def made(page: str) -> str:
    """Return the page with its tables made anew."""
    for name, text in tables().items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end of table: {name} -->\n"
        head, mark, rest = page.partition(begin)
        _, close, tail = rest.partition(end)
        if not mark or not close:
            raise SystemExit(f"{PAGE}: there are no marks for the table {name}")
        page = f"{head}{begin}\n{text}\n{end}{tail}"
    return page


def main() -> int:
    """Write the page, or check that it is current."""
    page = PAGE.read_text()
    new = made(page)
    if "--check" in sys.argv[1:]:
        if new != page:
            sys.stderr.write(f"{PAGE} is not current: run ./script/docs\n")
            return 1
        return 0
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
