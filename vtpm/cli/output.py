"""What the CLI prints: tables for people, JSON and YAML for programs."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from vtpm.api.v1 import instance_pb2 as pb

_NO_LIMIT: Final = 10_000


class Format(enum.StrEnum):
    """`-o`."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def instance_dict(instance: pb.Instance) -> dict[str, Any]:
    """Return an instance as JSON and YAML show it."""
    return {
        "id": instance.id,
        "name": instance.name,
        "state": pb.State.Name(instance.state),
        "failure": _failure(instance),
        "labels": dict(sorted(instance.labels.items())),
        "profile": {
            "ek_algorithms": [pb.KeyAlgorithm.Name(item) for item in instance.profile.ek_algorithms],
            "ak_algorithm": pb.KeyAlgorithm.Name(instance.profile.ak_algorithm),
            "pcr_banks": [pb.PcrBank.Name(item).lower() for item in instance.profile.pcr_banks],
            "nv_layout": pb.NvLayout.Name(instance.profile.nv_layout).lower(),
        },
        "keys": [
            {
                "role": pb.KeyRole.Name(key.role),
                "algorithm": pb.KeyAlgorithm.Name(key.algorithm),
                # Null: not persistent, as after TPM2_Clear; its template makes it again.
                "handle": f"0x{key.handle:08x}" if key.handle else None,
                "public_pem": key.public_pem,
            }
            for key in instance.keys
        ],
        "identity": pb.Identity.Name(instance.identity),
        "platform": {
            "manufacturer": instance.platform.manufacturer,
            "model": instance.platform.model,
            "version": instance.platform.version,
        },
        "engine": instance.engine,
        "epoch": instance.epoch,
        "hibernated": instance.hibernated,
        "etag": instance.etag,
        "tpm_socket": instance.tpm_socket,
        "guest_socket": instance.guest_socket,
        "control_socket": instance.control_socket,
        "create_time": instance.create_time.ToJsonString(),
        "update_time": instance.update_time.ToJsonString(),
    }


def _failure(instance: pb.Instance) -> dict[str, str] | None:
    if not instance.HasField("failure"):
        return None
    failure = instance.failure
    return {
        "reason": failure.reason,
        "message": failure.message,
        "remedy": failure.remedy,
        "time": failure.time.ToJsonString(),
    }


def emit(value: Any, form: Format) -> None:
    """Print `value` as JSON or YAML."""
    if form is Format.JSON:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    else:
        import yaml

        sys.stdout.write(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def result(value: dict[str, Any], form: Format) -> None:
    """Print names and values."""
    if form is Format.TABLE:
        mapping(value)
    else:
        emit(value, form)


def instances(found: Sequence[pb.Instance], form: Format) -> None:
    """Print a list of instances."""
    if form is not Format.TABLE:
        emit([instance_dict(instance) for instance in found], form)
        return
    rows = (
        (
            instance.name,
            pb.State.Name(instance.state),
            instance.id,
            ",".join(f"{key}={value}" for key, value in sorted(instance.labels.items())),
            instance.create_time.ToJsonString()[:19].replace("T", " "),
        )
        for instance in found
    )
    table(("NAME", "STATE", "ID", "LABELS", "CREATED"), rows)


def instance(found: pb.Instance, form: Format) -> None:
    """Print one instance."""
    value = instance_dict(found)
    if form is not Format.TABLE:
        emit(value, form)
        return
    value["labels"] = ", ".join(f"{key}={text}" for key, text in value["labels"].items())
    profile = value.pop("profile")
    value["pcr_banks"] = ", ".join(profile["pcr_banks"])
    value["nv_layout"] = profile["nv_layout"]
    value["platform"] = " / ".join(filter(None, value["platform"].values()))
    value["keys"] = ", ".join(f"{key['role']} {key['algorithm']} {key['handle'] or 'not persistent'}" for key in value["keys"])
    failure = value.pop("failure")
    if failure:
        value |= {"failure": f"{failure['reason']}: {failure['message']}", "remedy": failure["remedy"]}
    mapping(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a head; on a pipe without decoration and without cutting."""
    from rich.console import Console
    from rich.table import Table

    # Without a terminal Rich assumes 80 columns and cuts what is longer.
    # Text of guests is shown as it is: a name between colons is no emoji.
    console = Console(width=None if sys.stdout.isatty() else _NO_LIMIT, emoji=False)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        grid.add_column(name, overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in rows:
        grid.add_row(*row)
    console.print(grid, markup=False)


def mapping(value: Mapping[str, Any]) -> None:
    """Print names and values, a line each."""
    width = max(map(len, value), default=0)
    for name, item in value.items():
        sys.stdout.write(f"{name:<{width}}  {item}\n".rstrip() + "\n")
