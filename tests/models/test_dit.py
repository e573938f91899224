"""DiT and SiT against the figures of the papers and a slow twin in the original naming."""

import math
import os
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ditkit.bench.macs import count_macs
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.models.dit import SIZES, DiT, DiTConfig
from models_support import perturbed

SMALL = DiTConfig(size=8, patch=2, channels=4, width=32, depth=3, heads=4, classes=5)
TOLD = Cond(label=torch.tensor([0]))

# Trainable parameters at patch 2, GMAC at 256 x 256 for patch 2, 4, 8 (00-baselines)
TABLE = {
    "S": (32_865_056, (6.06, 1.41, 0.36)),
    "B": (130_315_808, (23.01, 5.57, 1.42)),
    "L": (457_840_672, (80.70, 19.70, 5.01)),
    "XL": (674_834_720, (118.62, 29.04, 7.39)),
}
PRESETS = [(size, patch) for size in SIZES for patch in (2, 4, 8)]


def parameters_of(depth: int, d: int, p: int) -> int:
    blocks = depth * (18 * d**2 + 15 * d)
    embeddings = (256 * d + d + d**2 + d) + 1001 * d + (4 * p**2 * d + d)
    return blocks + embeddings + (8 * p**2 * d + 8 * p**2 + 2 * d**2 + 2 * d)


def macs_of(depth: int, d: int, p: int, side: int) -> int:
    N = (side // p) ** 2
    blocks = depth * (12 * N * d**2 + 2 * N**2 * d + 6 * d**2)
    edges = 4 * p**2 * N * d + (256 * d + d**2) + 2 * d**2 + 8 * p**2 * N * d
    return blocks + edges


def macs_run(model: DiT, side: int) -> int:
    with torch.device("meta"):
        x, t, label = torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    count = count_macs(model.eval(), x, t, Cond(label=label))
    assert count.uncounted == ()
    return count.total


@pytest.mark.parametrize(("size", "patch"), PRESETS)
def test_parameters_and_macs_equal_the_papers(size, patch):
    depth, width, _ = SIZES[size]
    parameters, gmacs = TABLE[size]
    with torch.device("meta"):
        model = DiT.preset(f"{size}/{patch}")
    assert parameter_count(model) == parameters_of(depth, width, patch)
    if patch == 2:
        assert parameter_count(model) == parameters
    macs = macs_run(model, 32)
    assert macs == macs_of(depth, width, patch, 32)
    printed = gmacs[(2, 4, 8).index(patch)]
    half_a_digit = 0.005  # S/8 is printed as 0.36, which is rounder than 0.3 %
    assert macs / 1e9 == pytest.approx(printed, rel=0.003, abs=half_a_digit)


def test_macs_of_the_largest_at_512():
    with torch.device("meta"):
        model = DiT.preset("XL/2")
    macs = macs_run(model, 64)
    assert macs == macs_of(28, 1152, 2, 64)
    assert macs / 1e9 == pytest.approx(524.5, rel=0.003)


def test_the_frozen_table_is_not_trained():
    with torch.device("meta"):
        model = DiT.preset("XL/2", SIT)
    assert parameter_count(model) + 256 * 1152 == 675_129_632
    assert all(p.requires_grad for p in model.parameters())


def test_an_unknown_preset_quotes_the_nearest():
    with pytest.raises(ConfigError, match="unknown DiT preset 'XL/3'; did you mean 'XL/"):
        DiT.preset("XL/3")


def batch(config: DiTConfig = SMALL, size: int = 3) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    x = torch.randn(size, config.channels, config.size, config.size)
    return x, torch.rand(size) * 999, Cond(label=torch.arange(size) % config.classes)


def awake(config: DiTConfig = SMALL) -> DiT:
    return perturbed(DiT(config), 0.1)


@pytest.mark.parametrize("convention", [DDPM, SIT, Convention()])
def test_a_fresh_model_outputs_zero_and_its_blocks_are_the_identity(convention):
    model = DiT(replace(SMALL, convention=convention))
    x, t, cond = batch()
    out = model(x, t, cond)
    assert out.shape == (3, 4 if convention.extra == "none" else 8, 8, 8)
    assert torch.equal(out, torch.zeros_like(out))
    tokens = torch.randn(2, 16, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, torch.randn(2, 32)), tokens)


def test_initialisation_is_the_papers():
    model = DiT(replace(SMALL, width=256, depth=1, classes=1000))
    block = model.blocks[0]
    for linear in (model.embed, block.attn.qkv, block.attn.out, block.mlp.inner, block.mlp.outer):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not linear.bias.any()
    for table in (model.label.weight, model.time.inner.weight, model.time.outer.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
    for zero in (block.modulation, model.head.modulation, model.head.out):
        assert not zero.weight.any() and not zero.bias.any()


def original_state(config: DiTConfig, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Random weights under the names of the DiT repository."""
    d, p, C = config.width, config.patch, config.channels
    out = 2 * C * p * p
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (d, C, p, p),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
        "final_layer.linear": (out, d),
    }
    for i in range(config.depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * d, d),
            f"blocks.{i}.attn.proj": (d, d),
            f"blocks.{i}.mlp.fc1": (4 * d, d),
            f"blocks.{i}.mlp.fc2": (d, 4 * d),
            f"blocks.{i}.adaLN_modulation.1": (6 * d, d),
        }
    state = {f"{name}.weight": scale * torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": scale * torch.randn(shape[0]) for name, shape in shapes.items()}
    state["y_embedder.embedding_table.weight"] = scale * torch.randn(config.classes + 1, d)
    return state


def reference(
    state: dict[str, torch.Tensor], config: DiTConfig, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The forward pass as 00-baselines writes it, in float64, one sample, head and token at a time."""
    w = {name: tensor.double() for name, tensor in state.items()}
    d, p, heads = config.width, config.patch, config.heads
    side, K = config.size // p, d // heads

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(value: torch.Tensor) -> torch.Tensor:
        return value / (1 + (-value).exp())

    def gelu(value: torch.Tensor) -> torch.Tensor:
        return value / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    def attend(i: int, value: torch.Tensor) -> torch.Tensor:
        qkv = linear(f"blocks.{i}.attn.qkv", value)
        q, k, v = qkv[:, :d], qkv[:, d : 2 * d], qkv[:, 2 * d :]
        joined = []
        for head in range(heads):
            part = slice(head * K, (head + 1) * K)
            weight = (q[:, part] @ k[:, part].T / math.sqrt(K)).exp()
            joined.append(weight / weight.sum(1, keepdim=True) @ v[:, part])
        return linear(f"blocks.{i}.attn.proj", torch.cat(joined, 1))

    outputs = []
    for sample, time, label in zip(x.double(), t.double(), y, strict=True):
        patches = F.conv2d(sample[None], w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
        h = patches[0].flatten(1).T + table_of(side, d)
        angle = time * torch.exp(-math.log(1e4) * torch.arange(128).double() / 128)
        wave = torch.cat([angle.cos(), angle.sin()])
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", wave)))
        c = silu(c + w["y_embedder.embedding_table.weight"][label])
        for i in range(config.depth):
            b1, g1, a1, b2, g2, a2 = linear(f"blocks.{i}.adaLN_modulation.1", c).split(d)
            h = h + a1 * attend(i, norm(h) * (1 + g1) + b1)
            inner = gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + g2) + b2))
            h = h + a2 * linear(f"blocks.{i}.mlp.fc2", inner)
        shift, scale = linear("final_layer.adaLN_modulation.1", c).split(d)
        tokens = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
        image = tokens.reshape(side, side, p, p, -1)
        outputs.append(torch.einsum("hwpqc->chpwq", image).reshape(-1, config.size, config.size))
    return torch.stack(outputs)


def table_of(side: int, d: int) -> torch.Tensor:
    rows = []
    for row in range(side):
        for column in range(side):
            halves = []
            for place in (column, row):
                angles = [place / 10000 ** (2 * i / (d / 2)) for i in range(d // 4)]
                halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(halves)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("with_table", [True, False], ids=["pos_embed", "no pos_embed"])
@pytest.mark.parametrize("convention", [DDPM, SIT], ids=["DiT", "SiT"])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_original_weights_give_the_original_output(patch, convention, with_table):
    config = replace(SMALL, patch=patch, convention=convention)
    state = original_state(config)
    x, t, cond = batch(config)
    if convention is SIT:
        t = t / 999
    expected = reference(state, config, x, t, cond.label)
    if with_table:
        state["pos_embed"] = table_of(config.size // patch, config.width).float()[None]
    out = DiT.from_original(state, config)(x, t, cond)
    assert out.std() > 0.1
    assert torch.allclose(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_original_weights_load_from_either_file(tmp_path, suffix):
    state = original_state(SMALL)
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    given, read = DiT.from_original(state, SMALL).state_dict(), DiT.from_original(path, SMALL).state_dict()
    assert all(torch.equal(read[name], value) for name, value in given.items())


def test_the_model_does_not_share_memory_with_the_weights_it_was_given():
    state = original_state(SMALL)
    model = DiT.from_original(state, SMALL)
    before = model.head.out.weight.clone()
    state["final_layer.linear.weight"].zero_()
    assert torch.equal(model.head.out.weight, before)


class Payload:
    def __init__(self, path: object) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickle_is_refused_and_its_code_does_not_run(tmp_path):
    state = {**original_state(SMALL), "payload": Payload(tmp_path / "ran")}
    torch.save(state, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read as plain tensors \(weights_only"):
            DiT.from_original(tmp_path / name, SMALL)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload is harmless: this test would prove nothing"


def test_a_missing_original_tensor_is_named():
    state = original_state(SMALL)
    state["blocks.1.attn.projj.weight"] = state.pop("blocks.1.attn.proj.weight")
    with pytest.raises(CheckpointError) as caught:
        DiT.from_original(state, SMALL)
    assert "missing tensor 'blocks.1.attn.out.weight'" in str(caught.value)
    assert "unexpected such as 'blocks.1.attn.projj.weight'" in str(caught.value)


def test_labels_drop_in_training_only_and_at_the_stated_rate():
    model = awake(replace(SMALL, label_dropout=0.3))
    n = 4000
    t, cond = torch.zeros(n), Cond(label=torch.arange(n) % 5)
    told, untold = model.condition(t, cond), model.condition(t, model.unconditional(cond))
    assert torch.equal(model.condition(t, cond), told)
    model.train()
    dropped = (model.condition(t, cond) == untold).all(1)
    assert torch.equal(model.condition(t, replace(cond, drop=dropped))[dropped], untold[dropped])
    five_sigma = 5 * math.sqrt(0.3 * 0.7 / n)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=five_sigma)
    again = (model.condition(t, cond) == untold).all(1)
    assert not torch.equal(again, dropped)


@pytest.mark.parametrize("training", [True, False])
def test_a_given_drop_is_honoured_in_any_mode(training):
    model = awake().train(training)
    x, t, cond = batch()
    drop = torch.tensor([False, True, False])
    out = model(x, t, replace(cond, drop=drop))
    null = model(x, t, Cond(label=torch.full((3,), SMALL.classes), drop=torch.zeros(3, dtype=torch.bool)))
    told = model(x, t, replace(cond, drop=torch.zeros(3, dtype=torch.bool)))
    assert torch.equal(out[1], null[1]) and torch.equal(out[[0, 2]], told[[0, 2]])
    assert not torch.allclose(null, told)


def test_without_dropout_training_draws_no_random_numbers():
    model = awake(replace(SMALL, label_dropout=0.0)).train()
    before = torch.get_rng_state()
    model(torch.zeros(2, 4, 8, 8), torch.zeros(2), Cond(label=torch.zeros(2, dtype=torch.long)))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_size_than_the_configs_is_placed_by_its_own_grid():
    model = awake()
    x = torch.randn(1, 4, 4, 12)
    assert model(x, torch.zeros(1), Cond(label=torch.tensor([1]))).shape == (1, 8, 4, 12)
    assert model.layout((4, 4, 12))[0].grid == Grid(1, 2, 6)


def test_site_names_are_public():
    sites = DiT(replace(SMALL, depth=1)).sites()
    names = [(site.name, site.kind) for site in sites]
    assert names == [
        ("time", "time"),
        ("time.embedding", "timestep"),
        ("tokens", "tokens"),
        ("blocks", "stack"),
        ("blocks.0", "block"),
        ("blocks.0.modulation", "modulation"),
        ("blocks.0.attn", "branch"),
        ("blocks.0.attn.route", "choice"),
        ("blocks.0.attn.kv", "kv"),
        ("blocks.0.attn.core", "core"),
        ("blocks.0.mlp", "branch"),
        ("blocks.0.mlp.route", "choice"),
        ("blocks.0.mlp.inner", "inner"),
        ("head", "head"),
        ("head.modulation", "modulation"),
    ]
    assert {site.width for site in sites if site.kind != "inner"} == {SMALL.width}
    assert [site.width for site in sites if site.kind == "inner"] == [4 * SMALL.width]
    assert [site.heads for site in sites if site.heads] == [SMALL.heads] * 3
    assert {(site.stage, site.attention, site.ordered, site.over) for site in sites} == {
        (0, "full", False, ())
    }


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        ({"width": 30}, ShapeError, "width=30 does not divide into heads=4"),
        ({"width": 6, "heads": 2}, ShapeError, "width=6 should divide by 4"),
        ({"size": 9}, ShapeError, "size=9 does not divide into patches of 2"),
        ({"depth": 0}, ConfigError, "depth=0 should be at least 1"),
        ({"depth": 10**9}, ConfigError, "depth=1000000000 should be at most 1000"),
        ({"label_dropout": 1.0}, ConfigError, "label_dropout=1.0 should lie in [0, 1)"),
        ({"label_dropout": math.nan}, ConfigError, "label_dropout=nan should lie in [0, 1)"),
        ({"class_names": ("a",)}, ConfigError, "1 class names for 5 classes"),
    ],
)
def test_sizes_that_make_no_model_are_refused_in_one_line(change, kind, expected):
    with pytest.raises(kind) as caught:
        replace(SMALL, **change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "cond", "kind", "expected"),
    [
        (torch.zeros(1, 3, 8, 8), TOLD, ShapeError, r"\[1, 3, 8, 8\] should be \[B, 4, H, W\]"),
        (torch.zeros(4, 8, 8), TOLD, ShapeError, r"should be \[B, 4, H, W\]"),
        (torch.zeros(1, 4, 7, 8), TOLD, ShapeError, "height=7 does not divide"),
        (torch.zeros(1, 4, 8, 8), Cond(), ConfigError, "a class label is needed"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, cond, kind, expected):
    with pytest.raises(kind, match=expected):
        DiT(SMALL)(x, torch.zeros(1), cond)


def test_nothing_told_needs_a_label_to_replace():
    with pytest.raises(ConfigError, match="a class label is needed"):
        DiT(SMALL).unconditional(Cond())
