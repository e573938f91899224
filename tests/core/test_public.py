"""The public names: light to import, found by name, and what `load` and `generate` promise."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ditkit
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core import loading
from ditkit.core import model as core_model
from ditkit.core.errors import CheckpointError, ConfigError, ConflictError
from ditkit.core.labels import class_index, class_names, resolve_labels
from ditkit.models.dit import DiT
from ditkit.sample import ClassifierFree, Heun
from models_support import CLASSES, save_tiny, tiny_model

HEAVY = ("diffusers", "transformers", "matplotlib", "torchmetrics", "accelerate", "PIL", "tyro", "rich")


def test_importing_and_listing_loads_nothing_heavy() -> None:
    code = f"import sys, ditkit; dir(ditkit); print(*({set(HEAVY)!r} | {{'torch'}}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_generate_needs_no_picture_library() -> None:
    code = f"import sys, ditkit; ditkit.generate, ditkit.load; print(*{set(HEAVY)!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_listed_name_exists_and_no_other() -> None:
    assert sorted(dir(ditkit)) == [
        "Sampling",
        "__version__",
        "accelerate",
        "adapt",
        "compare",
        "compress",
        "errors",
        "evaluate",
        "generate",
        "harmonise",
        "load",
        "profile",
        "restore",
        "train_pipeline",
        "tune",
    ]
    assert all(getattr(ditkit, name) is not None for name in dir(ditkit))
    assert ditkit.__version__ == importlib.metadata.version("ditkit")
    assert issubclass(ditkit.errors.ShapeError, ditkit.errors.DitkitError)
    with pytest.raises(AttributeError, match="lood"):
        ditkit.lood  # noqa: B018


def test_load_reads_a_folder(tmp_path: Path) -> None:
    model = ditkit.load(save_tiny(tmp_path / "m"))
    assert isinstance(model, DiT) and not model.training
    saved = tiny_model().state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_load_finds_shipped_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_weights", lambda: tmp_path)
    save_tiny(tmp_path / "emoji")
    (tmp_path / "notes").mkdir()
    assert loading.shipped() == ("emoji",)
    assert isinstance(ditkit.load("emoji"), DiT)
    with pytest.raises(
        ConfigError, match=r"unknown model 'emojy'; did you mean 'emoji'\? \(choose from: emoji\)"
    ):
        ditkit.load("emojy")


def test_a_shipped_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "weights" / "emoji")
    tiny_model(depth=1).save(tmp_path / "here" / "emoji")
    monkeypatch.setattr(loading, "_weights", lambda: tmp_path / "weights")
    monkeypatch.chdir(tmp_path / "here")
    assert len(ditkit.load("emoji").blocks) == 2
    assert len(ditkit.load("./emoji").blocks) == 1


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repo: str, **_: object) -> str:
        asked.append(repo)
        return str(save_tiny(tmp_path / "cache"))

    monkeypatch.setattr(core_model, "snapshot_download", snapshot)
    assert isinstance(ditkit.load("someone/emoji"), DiT)
    assert asked == ["someone/emoji"]


def test_without_a_network_the_hub_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        ditkit.load("someone/nothing")
    assert str(error.value).startswith("no folder 'someone/nothing', and the hub: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_of_what_the_hub_says_the_first_sentence_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise OSError("404 Client Error. (Request ID: 1)\n\nRepository Not Found. Please check ...")

    monkeypatch.setattr(core_model, "snapshot_download", missing)
    with pytest.raises(CheckpointError) as error:
        ditkit.load("runs/typo")
    assert str(error.value) == "no folder 'runs/typo', and the hub: 404 Client Error"


@pytest.mark.parametrize("name", ["./nothing", "/nothing/there", "a/b/c", "", "..", "x y"])
def test_what_cannot_be_a_hub_id_is_never_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_model, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises((ConfigError, CheckpointError)):
        ditkit.load(name)


def test_generate_gives_a_picture_a_seed() -> None:
    model = tiny_model()
    drawn = ditkit.generate(model, label="animal-mammal", seeds=[3, 5, 4], steps=4)
    assert drawn.samples.shape == (3, 3, 16, 16) and drawn.samples.dtype == torch.float32
    assert drawn.labels == ("animal-mammal",) * 3 and drawn.seeds == (3, 5, 4)
    assert drawn.receipts == () and drawn.policy_bytes == 0 and drawn.evaluations == 4


def test_a_picture_does_not_depend_on_its_batch() -> None:
    model = tiny_model()
    together = ditkit.generate(model, "flag / other", seeds=range(5), steps=4, batch_size=5)
    apart = ditkit.generate(model, "flag / other", seeds=range(5), steps=4, batch_size=2)
    torch.testing.assert_close(together.samples, apart.samples, rtol=0, atol=1e-5)


def test_labels_and_scale_reach_the_model() -> None:
    model = tiny_model()
    bird, fruit = (ditkit.generate(model, label, seeds=[0], steps=2).samples for label in ("animal-bird", 3))
    assert not torch.equal(bird, fruit)
    mixed = ditkit.generate(model, ["food-fruit", "animal-bird"], seeds=[1, 0], steps=2, batch_size=1)
    assert torch.equal(mixed.samples[1:], bird)
    scaled = ditkit.generate(model, 0, seeds=[0], steps=2, guidance=5.0).samples
    assert not torch.equal(scaled, bird)
    assert torch.equal(
        scaled, ditkit.generate(model, 0, seeds=[0], steps=2, guidance=ClassifierFree(5.0)).samples
    )


def test_policies_and_solvers_are_used_and_leave_a_receipt() -> None:
    model = tiny_model()
    fast = ditkit.generate(model, 0, seeds=range(3), steps=8, policies=[TaylorSeer(interval=3)], batch_size=2)
    (receipt,) = fast.receipts
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0-1 4 7", "forecast": "2-3 5-6"}
    assert fast.policy_bytes > 0
    assert ditkit.generate(model, 0, seeds=[0], steps=4, solver=Heun()).evaluations == 7


def test_progress_counts_all_batches() -> None:
    seen: list[tuple[int, int]] = []
    ditkit.generate(
        tiny_model(), 0, seeds=range(3), steps=2, batch_size=2, progress=lambda *at: seen.append(at)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"label": "animal-mamal"}, "did you mean 'animal-mammal'"),
        ({"label": 4}, "class 4 should lie between 0 and 3"),
        ({"label": ["animal-bird"] * 3}, "3 labels for 2 seeds"),
        ({"seeds": [1, 1]}, "seed 1 is given twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1.5]}, "seed=1.5 should be an integer"),
        ({"seeds": [True]}, "seed=True should be an integer"),
        ({"seeds": [2**70]}, f"seed={2**70} should be at most 4294967295"),
        ({"seeds": [-1]}, "seed=-1 should be at least 0"),
        ({"seeds": 5}, "seeds=5 should be a sequence"),
        ({"label": 1.0}, "class=1.0 should be an integer"),
        ({"steps": 6.0}, "steps=6.0 should be an integer"),
        ({"batch_size": "2"}, "batch_size='2' should be an integer"),
        ({"guidance": None}, "guidance=None should be a finite number"),
        ({"guidance": "2"}, "guidance='2' should be a finite number"),
        ({"guidance": float("nan")}, "guidance=nan should be a finite number"),
        ({"solver": "huen"}, "did you mean 'heun'"),
        ({"solver": 3}, "solver: got 3, expected a Solver"),
        ({"policies": ["taylorser"]}, "did you mean 'taylorseer'"),
        ({"policies": [3]}, "got 3, expected a Policy"),
        ({"policies": None}, "got None, expected a Policy"),
        ({"max_bytes": 0}, "max_bytes=0 should be at least 1"),
        ({"max_bytes": 1e6}, "max_bytes=1000000.0 should be an integer"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 1, "policies": [TaylorSeer()]}, "warmup=2"),
        ({"steps": 9, "policies": [TaylorSeer()], "max_bytes": 10}, "max_bytes=10"),
    ],
)
def test_generate_refuses_in_one_line(options: dict[str, object], quoted: str) -> None:
    with pytest.raises(ConfigError) as error:
        ditkit.generate(tiny_model(), **{"seeds": [0, 1], **options})  # type: ignore[arg-type]
    assert quoted in str(error.value) and "\n" not in str(error.value)


def test_a_path_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"model='./tiny' should be a denoiser, such as ditkit.load gives"):
        ditkit.generate("./tiny")  # type: ignore[arg-type]


def test_components_are_taken_as_objects_or_texts() -> None:
    policy, model = TaylorSeer(interval=3), tiny_model()
    drawn = [
        ditkit.generate(model, 0, seeds=[0], steps=4, solver=solver, policies=policies).samples
        for solver, policies in (
            (Heun(), [policy]),
            ("heun", policy),
            ("heun", "taylorseer:interval=3"),
            ("heun", ["taylorseer:interval=3"]),
        )
    ]
    assert all(torch.equal(images, drawn[0]) for images in drawn)
    assert not torch.equal(ditkit.generate(model, 0, seeds=[0], steps=4, solver="heun").samples, drawn[0])


def test_two_owners_are_refused() -> None:
    with pytest.raises(ConflictError, match="both own"):
        ditkit.generate(tiny_model(), 0, seeds=[0], steps=9, policies=[TaylorSeer(), TaylorSeer(interval=2)])


def test_labels_spread_over_the_classes() -> None:
    model = tiny_model()
    assert resolve_labels(model, None, 8) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert resolve_labels(model, None, 2) == (0, 2)
    assert resolve_labels(model, ["food-fruit"], 2) == (3, 3)
    assert class_names(model) == CLASSES
    nameless = tiny_model(class_names=())
    assert class_names(nameless) == ("0", "1", "2", "3") and class_index(nameless, "2") == 2


def test_the_names_of_the_readme() -> None:
    """Policies and backbones are imported from their family's package."""
    from ditkit.caching import TaylorSeer
    from ditkit.models import DiT

    assert TaylorSeer.__module__ == "ditkit.caching.taylorseer"
    assert DiT.__module__ == "ditkit.models.dit"
