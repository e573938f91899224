"""A family written by the page on extension alone keeps the contract, and touches three places."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_view_contract as contract
import test_view_policies as policies
import torch

import hosts_support
from ditkit import hosts
from ditkit.hosts.family import families
from ditkit.hosts.view import VIEWS

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "host.md"
FENCES = dict(re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE.read_text("utf8"), flags=re.S | re.M))
LIBRARY, VIEW, ROW, SITES = FENCES


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's files, in folders of their own; what they made known is forgotten afterwards."""
    folder = tmp_path_factory.mktemp("toy")
    for title in (LIBRARY, VIEW):
        (folder / Path(title).name).write_text(FENCES[title], "utf8")
    known, before = set(VIEWS), [*hosts.__path__]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(hosts, "__path__", [*before, str(folder)])
        families.cache_clear()
        import toy_library

        exec(FENCES[ROW], {**vars(hosts_support), "toy_library": toy_library})
        families()
        hosts_support.EVERY["toy"] = hosts_support.FAMILIES["toy"]
        yield "toy"
    del hosts_support.FAMILIES["toy"], hosts_support.EVERY["toy"]
    for host in set(VIEWS) - known:
        del VIEWS[host]
    for name in ("toy_library", "ditkit.hosts.toy"):
        sys.modules.pop(name, None)
    hosts_support.shared.cache_clear()
    families.cache_clear()


def test_three_places_are_touched() -> None:
    """The library that the view is of is not ours."""
    assert {VIEW, ROW, SITES} == {
        "src/ditkit/hosts/toy.py",
        "tests/support/hosts_support.py",
        "tests/hosts/sites.txt",
    }
    listed = re.findall(r"^\d\. `(.+?)`", PAGE.read_text("utf8"), flags=re.M)
    assert [place.replace("NAME", "toy") for place in listed] == [VIEW, ROW, SITES]


def test_the_toys_sites_are_the_pages(toy: str) -> None:
    assert policies.described(hosts_support.shared(toy)[0]) == FENCES[SITES].strip().splitlines()[1:]


def test_the_toy_keeps_the_contract_of_views(toy: str, tmp_path: Path) -> None:
    contract.test_without_policies_it_is_diffusers_to_the_bit(toy, torch.float32)
    contract.test_without_policies_it_is_diffusers_to_the_bit(toy, torch.bfloat16)
    contract.test_return_types_and_the_order_of_parameters(toy)
    contract.test_lora_before_and_after_the_swap(toy, torch.float32)
    contract.test_gradients(toy)
    contract.test_saved_and_restored_it_is_diffusers_own(toy, tmp_path)
    contract.test_hooks_of_blocks_attention_and_leaves_fire(toy)
    contract.test_offload_before_and_after_the_swap(toy)
    contract.test_group_offloading(toy, "leaf_level")
    contract.test_a_processor_of_ones_own_and_fused_layers_have_no_sites_inside(toy)
    contract.test_blocks_compile_without_a_break_and_as_often_as_diffusers_own(toy)


def test_policies_act_on_the_toy(toy: str) -> None:
    policies.test_the_layout_is_of_the_rows_that_the_sites_see(toy)
    for cache in policies.CACHES:
        policies.test_a_cache_that_never_skips_changes_nothing_and_one_that_does_saves(
            toy, torch.float32, cache
        )
    policies.test_a_gate_cuts_the_stack(toy)
    for policy in (policies.RowSelector(0.5, 1), policies.RAS(warmup=1)):
        policies.test_selected_rows_equal_the_dense_run(toy, policy)
    policies.test_branches_run_on_some_rows(toy)
    policies.test_keys_bring_their_positions(toy)
    policies.test_a_pattern_is_exact_when_neutral_and_where_it_sees_all(toy)
