"""Parts of a network by its sites: which attention, MLP or embedding a site belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from ditkit.core.run import Site, named

BETWEEN = "between branches"
"""Residual sums, gates, and what else a block does outside its branches."""
OUTSIDE = "outside blocks"
SAMPLER = "sampler"
BRANCH = "branch"
"""A branch that does not name its attention: `settled` decides by what ran in it."""


def parts_of(sites: Sequence[Site]) -> dict[str, str]:
    """Return the part of each site, by its name.

    A copy that only the attention along time needs is of that part if it runs in a block or branch with no other
    attention.
    """
    kinds = {"tokens": "embedding", "time": "time embedding", "modulation": "modulation", "head": "head"}
    parts = {site.name: kinds.get(site.kind, OUTSIDE) for site in sites}
    cores = {site.name: attention_of(site) for site in sites if site.kind == "core"}
    for site in sites:
        inside = {part for name, part in cores.items() if name.startswith(site.name + ".")}
        if site.kind == "core":
            parts[site.name] = cores[site.name]
        elif site.kind == "kv":
            parts[site.name] = cores.get(site.name.removesuffix(".kv") + ".core", BRANCH)
        elif site.kind == "inner":
            parts[site.name] = "MLP"
        elif site.kind == "branch":
            parts[site.name] = " and ".join(sorted(inside)) or _without_core(site, sites)
            if inside and _is_alone(site, sites):
                parts[site.name] += " and MLP"  # FLUX's single blocks
        elif site.kind == "block":
            along = {
                core.axis for core in sites if core.name in cores and core.name.startswith(site.name + ".")
            }
            parts[site.name] = next(iter(inside)) if len(inside) == 1 and along != {""} else BETWEEN
    return parts


def attention_of(core: Site) -> str:
    """Name the attention of a `core` site by its queries and keys."""
    if core.over and core.stream not in core.over:
        return "cross attention"
    if core.axis:
        return {"time": "temporal attention", "space": "spatial attention"}[core.axis]
    return "joint attention" if core.stream == "joint" or len(core.over) > 1 else "self attention"


def _without_core(branch: Site, sites: Sequence[Site]) -> str:
    inside = [site for site in sites if site.name.startswith(branch.name + ".")]
    return "MLP" if named(inside, "inner") else BRANCH


def _is_alone(branch: Site, sites: Sequence[Site]) -> bool:
    """Return whether a block has no other branch."""
    block = branch.name.rpartition(".")[0] + "."
    return [s.name for s in sites if s.kind == "branch" and s.name.startswith(block)] == [branch.name]
