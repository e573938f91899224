"""`ditkit policies`: what acts on a model without training, or is trained into it, and how each is set."""

from __future__ import annotations

from dataclasses import MISSING, fields
from inspect import getdoc
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditkit.core.catalog import every, find
from ditkit.core.policy import Policy
from ditkit.core.spec import as_text
from ditkit.core.transform import Transform

PolicyName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
GROUPS = {
    "caching": "caches: reuse or forecast instead of computing",
    "attention": "sparse attention",
    "adapt": "adapters: trained into a model",
    "compress": "compression",
}
"""The packages of policies and transforms, with their headings."""
FLAGS: dict[type[Any], str] = {Policy: "--policy", Transform: "--transform"}


def policies(policy: PolicyName = "") -> None:
    """List the policies and transforms: caches, sparse attention, adapters, compression; or the fields of one.

    A policy acts while a model samples and can be switched off; a transform changes its weights.

    Examples:
        ditkit policies
        ditkit policies taylorseer

    Args:
        policy: Name of one: show its fields with their defaults, and an example.
    """
    if policy:
        base = next((base for base in FLAGS if policy.lower() in _names(base)), Policy)
        described(find(base, policy), FLAGS[base])
        return
    for package, heading in GROUPS.items():
        table = Table(box=None, pad_edge=False, show_header=False, title_justify="left", title=heading)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        kinds = [kind for base in FLAGS for kind in every(base) if kind.__module__.split(".")[1] == package]
        for kind in kinds:
            table.add_row(kind.__name__.lower(), escape(sentence(kind)))
        if kinds:
            Console(highlight=False).print(table, "")
    print("ditkit policies NAME shows the fields of one and the flag that takes it: --policy")
    print("for what acts while sampling, --transform for what changes the weights.")


def described(kind: type, flag: str) -> None:
    """Print the sentence, fields and an example of one."""
    console = Console(highlight=False)
    console.print(escape(getdoc(kind) or ""), "")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("field", "type", "default"):
        table.add_column(head, overflow="fold")
    known = [f for f in fields(kind) if f.init]
    for field in known:
        table.add_row(field.name, escape(str(field.type)), escape(default_of(field)))
    console.print(table)
    needed = [f.name for f in known if not default_of(f)]
    chosen = [f"{name}=..." for name in needed] or [f"{f.name}={default_of(f)}" for f in known[:1]]
    print(f"\n{flag} {kind.__name__.lower()}" + (":" + ",".join(chosen) if chosen else ""))


def sentence(kind: type) -> str:
    """Return the first sentence that a class says of itself."""
    paragraph = (getdoc(kind) or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def default_of(field: Any) -> str:
    """Return a field's default as the text that is typed for it; empty where there is none."""
    if field.default is not MISSING:
        return as_text(field.default)
    return "" if field.default_factory is MISSING else as_text(field.default_factory())


def _names(base: type[Any]) -> set[str]:
    return {kind.__name__.lower() for kind in every(base)}
