"""Other models in a comparison: drawn on the same seeds, held against the exact run of the first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ditkit
from ditkit.adapt.lora import LoRA
from ditkit.adapt.task_routing import TaskRouting
from ditkit.api.compare import compare
from ditkit.bench.bench import pooled_psnr_db
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.cli.main import main
from ditkit.compress import Kept
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.errors import ConfigError
from ditkit.models.dit import DiT
from ditkit.sample import sample
from rig import TINY, tiny_dit

QUICK = {"steps": 6, "converged_steps": 12, "rounds": 1, "memory": False, "label": [0, 1], "seeds": (0, 1)}
KEPT = Kept(blocks=(0, 2))


def drawn(model, steps=6):
    return sample(model, Cond(label=torch.tensor([0, 1])), (0, 1), steps=steps, guidance=2.0).samples


@pytest.fixture(scope="module")
def report():
    model = tiny_dit()
    rivals = {"pruned": ditkit.compress(model, KEPT), "adapted": ditkit.adapt(model, LoRA(rank=2))}
    return compare(model, policies=[TaylorSeer(interval=3)], rivals=rivals, **QUICK)


def test_a_rival_is_held_against_the_exact_run_of_the_first(report):
    rows = {row.name: row for row in report.rows}
    assert [row.kind for row in report.rows] == ["exact", "policy", "rival", "rival"]
    model, pruned = tiny_dit(), ditkit.compress(tiny_dit(), KEPT)
    exact, own = drawn(model), drawn(pruned)
    row = rows["pruned"]
    assert row.psnr_db == pooled_psnr_db(own, exact) and not row.identical
    assert row.psnr_converged_db == pooled_psnr_db(own, drawn(model, 12))
    # the control is the first model in as many steps as cost the same
    assert row.control_steps in (4, 5) and row.control_psnr_db == pooled_psnr_db(
        drawn(model, row.control_steps), exact
    )
    assert rows["adapted"].identical  # its B is 0
    assert (
        rows["adapted"].macs > rows["exact"].macs > row.macs
        and row.macs_ratio == row.macs / rows["exact"].macs
    )


def test_size_stands_beside_speed(report, tmp_path):
    rows = {row.name: row for row in report.rows}
    count = sum(p.numel() for p in tiny_dit().parameters())
    block = sum(p.numel() for p in tiny_dit().blocks[1].parameters())
    assert rows["exact"].parameters == rows["TaylorSeer interval=3"].parameters == count
    assert rows["pruned"].parameters == count - block
    assert rows["exact"].weight_bytes - rows["pruned"].weight_bytes == 4 * block
    assert rows["adapted"].parameters > count
    assert "weights" in report.table().columns[1].header
    assert report.as_dict()["settings"]["rivals"]["pruned"]["history"][-1]["transform"]["name"] == "Kept"
    html = next(path for path in report.save(tmp_path) if path.suffix == ".html").read_text()
    assert "pruned" in html and "weights" in html


def test_a_rival_runs_under_its_own_inherent_policies():
    routed = tiny_dit().adopt([TaskRouting(path="linear", share=0.5)])
    rows = {row.name: row for row in compare(tiny_dit(), rivals={"routed": routed}, **QUICK).rows}
    assert not rows["routed"].identical
    assert rows["routed"].receipt[0]["inherent"] is True
    # and the other way round: the exact run is under those of the first model
    assert not {r.name: r for r in compare(routed, rivals={"plain": tiny_dit()}, **QUICK).rows}[
        "plain"
    ].identical


@pytest.mark.parametrize(
    ("rival", "message"),
    [
        (DiT(replace(TINY, size=16)), r"rival other: samples \[3, 16, 16\], expected \[3, 8, 8\]"),
        (DiT(replace(TINY, classes=5)), "rival other: classes"),
        (DiT(replace(TINY, convention=DDPM)), "rival other: path 'ddpm', expected 'linear'"),
    ],
)
def test_a_rival_that_cannot_be_compared_is_refused(rival, message):
    with pytest.raises(ConfigError, match=message):
        compare(tiny_dit(), rivals={"other": rival.eval()}, **QUICK)
    with pytest.raises(ConfigError, match="rival 'exact' is the name of another row"):
        compare(tiny_dit(), rivals={"exact": tiny_dit()}, **QUICK)


def test_memory_of_a_rival_is_its_own(monkeypatch):
    from ditkit.bench import memory

    models = []

    def peak(self, policies, steps):
        models.append(memory.revive(self.described["fields"]["model"]))
        return memory.PeakMemory("cpu", 0, 1)

    monkeypatch.setattr(memory.Isolated, "peak", peak)
    compare(tiny_dit(), rivals={"pruned": ditkit.compress(tiny_dit(), KEPT)}, **QUICK | {"memory": True})
    assert [len(model.blocks) for model in models] == [3, 2]


def test_the_shell_takes_rivals(tmp_path, capsys):
    first, second = tiny_dit().save(tmp_path / "a"), ditkit.compress(tiny_dit(), KEPT).save(tmp_path / "b")
    words = [
        "compare",
        str(first),
        "--rival",
        f"cut={second}",
        "--no-memory",
        "--rounds",
        "1",
        "--steps",
        "3",
    ]
    words += ["--converged-steps", "4", "--seeds", "0", "--out", str(tmp_path / "out")]
    assert main(words) == 0, capsys.readouterr().err
    assert "cut" in capsys.readouterr().out
    for flags, message in (
        (["--rival", f"={second}"], "expected FOLDER or NAME=FOLDER"),
        (["--rival", f"a={second}", "--rival", f"a={first}"], "'a' is given twice"),
        (["--rival", str(tmp_path / "none")], "unknown model|no folder"),
        ([], "got no --policy and no --rival"),
    ):
        assert main(["compare", str(first), *flags, "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert any(part in error for part in message.split("|")) and error.count("\n") == 1, error
    assert not (tmp_path / "no").exists()
