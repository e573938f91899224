"""`ditkit.profile`: where the time of a call goes, by part and operator class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ditkit
import pipelines_support
from ditkit.bench.macs import count_macs
from ditkit.bench.operations import CLASSES, class_of
from ditkit.bench.parts import parts_of
from ditkit.bench.profile import DENOISER, Account, account, count_parts, query_lengths, settled_parts
from ditkit.bench.roofline import Roofs
from ditkit.bench.scaling import scaling, slope
from ditkit.cli.main import main
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.run import DIRECT, Site, watching
from ditkit.models.dico import DiCo, DiCoConfig
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.sample import Sampling, Unguided

DIT = DiTConfig(size=16, patch=2, channels=3, width=32, depth=2, heads=2, classes=4)
VDT_CONFIG = VDTConfig(size=16, frames=8, patch=4, channels=1, width=32, depth=2, heads=2)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    return DiT(DIT).eval()


@pytest.fixture(scope="module")
def vdt() -> VDT:
    torch.manual_seed(0)
    return VDT(VDT_CONFIG).eval()


def profiled(model: Any, **changes: Any) -> Any:
    settings = {"steps": 3, "seeds": (0, 1), "guidance": Unguided()} | changes
    return ditkit.profile(model, **settings)


def macs_of(found: Account, kind: str, parts: dict[str, str], part: str) -> int:
    return sum(n for key, n in found.macs.items() if key.kind == kind and parts.get(key.site) == part)


def test_dit_xl_costs_what_the_closed_forms_say() -> None:
    """DiT-XL/2 at 256 pixels: 118.380 GMACs of blocks, 0.2230 of their modulation, 0.0047 patches, 0.0121 head."""
    with torch.device("meta"):
        model = DiT.preset("XL/2")
        x, t = torch.empty(1, 4, 32, 32), torch.empty(1)
        cond = Cond(label=torch.zeros(1, dtype=torch.int64))
    sites = model.sites()
    with torch.no_grad():
        found = count_parts(lambda: model(x, t, cond), [(model, sites)])
    parts = settled_parts(found, sites)
    by_part: dict[str, int] = {}
    for key, count in found.macs.items():
        name = parts.get(key.site, "outside")
        by_part[name] = by_part.get(name, 0) + count
    assert sum(found.macs.values()) == pytest.approx(118.621e9, rel=5e-3)
    L, D, depth = 256, 1152, 28
    assert macs_of(found, "attention", parts, "self attention") == depth * 2 * L * L * D
    modulation = depth * D * D  # of each of the six vectors; a branch makes its own shift and scale
    assert macs_of(found, "linear", parts, "self attention") == depth * 4 * L * D * D + 2 * modulation
    assert macs_of(found, "linear", parts, "MLP") == depth * 8 * L * D * D + 2 * modulation
    assert macs_of(found, "linear", parts, "between branches") == 2 * modulation
    blocks = by_part["self attention"] + by_part["MLP"] + by_part["between branches"]
    assert blocks == pytest.approx(118.380e9 + 0.2230e9, rel=1e-5)


def test_temporal_over_spatial_macs_is_frames_over_places(vdt: VDT) -> None:
    frames, places = VDT_CONFIG.frames, (VDT_CONFIG.size // VDT_CONFIG.patch) ** 2
    found = profiled(vdt)
    macs = {
        part: sum(e.macs for e in found.entries if (e.part, e.kind) == (part, "attention"))
        for part in ("temporal attention", "spatial attention")
    }
    assert macs["spatial attention"] > 0
    assert macs["temporal attention"] * places == macs["spatial attention"] * frames
    assert {(part, q, k) for _, part, q, k, _ in found.lengths} == {
        ("temporal attention", frames, frames),
        ("spatial attention", places, places),
    }


@pytest.mark.parametrize("policies", [(), ("taylorseer:interval=3",)])
def test_shares_sum_to_the_wall_clock_and_macs_to_the_counters(dit: DiT, policies: tuple[str, ...]) -> None:
    found = profiled(dit, steps=6, policies=policies)
    assert sum(e.seconds for e in found.entries) == pytest.approx(found.wall_seconds, rel=0.02)
    assert {e.kind for e in found.entries} <= set(CLASSES)
    work = {"steps": 6, "seeds": (0, 1), "guidance": Unguided(), "policies": policies}
    assert found.macs == count_macs(lambda: ditkit.generate(dit, sampling=Sampling(**work))).total
    assert sum(found.share(kind=kind) for kind in CLASSES) == pytest.approx(1, rel=0.02)
    assert len(found.evaluations) == 6


def test_a_cache_shows_by_what_did_not_run(dit: DiT) -> None:
    exact, fast = profiled(dit, steps=6), profiled(dit, steps=6, policies="taylorseer:interval=3")
    assert exact.macs > 1.9 * fast.macs
    core = "blocks.0.attn.core"
    assert (exact.sites[core].calls, exact.sites[core].ran) == (6, 6)
    assert fast.sites["blocks.0.attn"].calls == 6 and fast.sites["blocks.0.attn"].ran < 4
    assert any("did not run their function" in line for line in fast.remarks())
    assert not any("did not run their function" in line for line in exact.remarks())


def test_profiling_changes_no_bit_and_leaves_nothing_behind(dit: DiT) -> None:
    sampling = Sampling(steps=3, seeds=(0, 1), guidance=Unguided())
    before = ditkit.generate(dit, sampling=sampling).samples
    drawn: list[Any] = []
    account(lambda: drawn.append(ditkit.generate(dit, sampling=sampling).samples), [(dit, dit.sites())])
    assert all(samples.equal(before) for samples in drawn) and len(drawn) == 3
    assert hooks(dit) == 0
    assert ditkit.generate(dit, sampling=sampling).samples.equal(before)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_interrupted_profile_leaves_nothing_behind(dit: DiT) -> None:
    def stop() -> None:
        dit(torch.zeros(1, 3, 16, 16), torch.zeros(1), Cond(label=torch.zeros(1, dtype=torch.int64)))
        raise KeyboardInterrupt

    runs = iter((lambda: None, stop))

    def call() -> None:
        next(runs)()

    with pytest.raises(KeyboardInterrupt):
        account(call, [(dit, dit.sites())])  # the second run, under the counter, is stopped
    assert hooks(dit) == 0
    profiled(dit, steps=1, seeds=(0,))  # nobody watches any more


def test_lengths_follow_the_stages_of_a_network() -> None:
    """A U-shaped network has the lengths of its levels, down and up again; here 64, 16, 4, 16, 64 rows."""
    sites = [Site(f"levels.{i}.core", "core", stage=min(i, 4 - i)) for i in range(5)]

    class Levels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for site, side in zip(sites, (8, 4, 2, 4, 8), strict=True):
                q = x.new_ones(1, 1, side * side, 4)
                DIRECT.site(site.name, lambda q, k, v: q @ k.mT @ v, q, q, q)
            return x

    net = Levels()
    found = account(lambda: net(torch.ones(1)), [(net, sites)])
    assert [q for (_, _, q, _) in sorted(found.lengths, key=lambda row: row[1])] == [64, 16, 4, 16, 64]
    assert query_lengths(found) == {4: 1, 16: 2, 64: 2}


def test_macs_grow_as_the_closed_forms_say(dit: DiT, vdt: VDT) -> None:
    sides = (8, 16, 32)
    by_size = scaling(dit, "size", sides)
    assert slope(sides, [row.macs["attention"] for row in by_size]) == pytest.approx(4.0, abs=0.1)
    dico = DiCo(DiCoConfig(size=8, channels=1, width=32, depth=(1, 1, 1, 1, 1), classes=2)).eval()
    convolved = [row.macs["convolution"] for row in scaling(dico, "size", (16, 32, 64))]
    assert slope((16, 32, 64), convolved) == pytest.approx(2.0, abs=0.1)
    frames = (4, 8, 16)
    rows = scaling(vdt, "frames", frames)
    for part, power in {"temporal attention": 2.0, "spatial attention": 1.0}.items():
        assert slope(frames, [row.attention[part] for row in rows]) == pytest.approx(power, abs=0.1)
    linear = [row.macs["linear"] for row in rows]
    assert slope(frames, linear) == pytest.approx(1.0, abs=0.1)


def test_a_pipeline_has_its_stages_and_is_as_before() -> None:
    pipe = pipelines_support.pipeline()
    kind, options = type(pipe.transformer), pipelines_support.asked(steps=4)
    before = pipe(**pipelines_support.asked(steps=4)).images
    found = ditkit.profile(pipe, **{**options, "output_type": "pt"})
    assert type(pipe.transformer) is kind and hooks(pipe.transformer) == 0
    assert {DENOISER, "vae", "sampler"} <= set(found.by("stage"))
    assert found.by("stage")["vae"].macs > 0
    assert {"joint attention", "MLP"} <= set(found.by("part"))
    after = pipe(**pipelines_support.asked(steps=4)).images
    assert torch.as_tensor(after).equal(torch.as_tensor(before))
    fast = ditkit.accelerate(pipe, "taylorseer:interval=3")
    quick = ditkit.profile(fast, **{**options, "output_type": "pt"})
    assert quick.by("stage")[DENOISER].macs < found.by("stage")[DENOISER].macs
    assert quick.by("stage")["vae"].macs == found.by("stage")["vae"].macs


def test_compiled_blocks_are_a_class_of_their_own_and_macs_stay(dit: DiT) -> None:
    torch.manual_seed(0)
    model = DiT(DIT).eval()
    exact = profiled(model, steps=1, seeds=(0,))
    for block in model.blocks:
        block.compile(backend="eager")
    found = profiled(model, steps=1, seeds=(0,))
    assert found.macs == exact.macs
    assert "compiled" in found.by("kind")


def test_it_prints_and_saves(dit: DiT, tmp_path: Path) -> None:
    found = profiled(dit)
    files = found.save(tmp_path / "new")
    assert [file.name for file in files] == ["profile.json", "profile.png"]
    saved = json.loads(files[0].read_text())
    assert saved["model"] == "DiT" and {"date", "device", "versions", "roofs"} <= set(saved)
    assert sum(entry["macs"] for entry in saved["entries"]) == found.macs
    from rich.console import Console

    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    for table in found.tables():
        console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and any(line.startswith("operator class") for line in lines)


def test_an_intensity_is_under_one_of_two_roofs() -> None:
    roofs = Roofs(flops=100.0, bandwidth=10.0, dtype="float32", threads=1)
    assert roofs.ridge == 10
    assert (roofs.side(5), roofs.attainable(5)) == ("memory", 50)
    assert (roofs.side(20), roofs.attainable(20)) == ("compute", 100)


def test_every_operation_has_one_class() -> None:
    names = {"aten::addmm": "linear", "aten::conv3d": "convolution", "aten::gelu": "elementwise"}
    names |= {"aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::copy_": "movement"}
    names |= {"aten::native_layer_norm": "normalisation", "aten::index_select.out": "movement"}
    assert {name: class_of(name) for name in names} == names


def test_parts_follow_kinds_streams_and_axes() -> None:
    sites = [
        Site("b", "block"),
        Site("b.x", "branch"),
        Site("b.x.kv", "kv"),
        Site("b.x.core", "core", "image", over=("text",)),
        Site("b.m", "branch"),
        Site("b.m.inner", "inner"),
        Site("t", "block"),
        Site("t.a", "branch"),
        Site("t.a.core", "core", attention="axial", axis="time"),
        Site("s", "block", "joint"),
        Site("s.fused", "branch", "joint"),
        Site("s.fused.core", "core", "joint"),
    ]
    assert parts_of(sites) == {
        "b": "between branches",
        "b.x": "cross attention",
        "b.x.kv": "cross attention",
        "b.x.core": "cross attention",
        "b.m": "MLP",
        "b.m.inner": "MLP",
        "t": "temporal attention",
        "t.a": "temporal attention and MLP",
        "t.a.core": "temporal attention",
        "s": "between branches",
        "s.fused": "joint attention and MLP",
        "s.fused.core": "joint attention",
    }


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("emoji", {}, r"got the name 'emoji', expected a model; ditkit.load\('emoji'\)"),
        (nn.Linear(2, 2), {}, "got Linear, expected a model of ditkit or a pipeline"),
    ],
)
def test_no_model_is_one_line(model: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ditkit.profile(model, **words)


def test_a_compiled_whole_an_idle_call_and_a_second_profile_are_refused(dit: DiT) -> None:
    with pytest.raises(ConfigError, match="compiled as a whole"):
        ditkit.profile(torch.compile(dit))
    with pytest.raises(ConfigError, match="ran no denoiser"):
        account(lambda: None, [(dit, dit.sites())])
    with (
        watching(lambda name, fn, handler, args: fn(*args)),
        pytest.raises(ConfigError, match="one profile at a time"),
    ):
        profiled(dit, steps=1)


def test_the_command(tmp_path: Path, capsys: Capture, dit: DiT) -> None:
    dit.save(tmp_path / "model")
    words = ["profile", str(tmp_path / "model")]
    assert main([*words, "--steps", "2", "--seeds", "0", "--out", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert "operator class" in text and "under the profiler" in text and "profile.json, profile.png" in text
    assert main([*words, "--scale", "size=8,16"]) == 0
    assert "n^4.0" in capsys.readouterr().out
    assert main([*words, "--scale", "size=8"]) == 2
    assert "expected a field and two numbers or more" in capsys.readouterr().err
    assert main([*words, "--scale", "sizes=8,16"]) == 2
    assert "unknown field 'sizes'; did you mean 'size'?" in capsys.readouterr().err
