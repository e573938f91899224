"""Narrower blocks of two streams against the slow way, folders of diffusers, and depth and width in one training."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ditkit
import family_pipelines_support as pipelines
import hosts_support as hosts
from contiguous_support import COND, TWO_STREAMS, Pictures, T, drawn, on_host, out, same, settings
from ditkit.api.train_pipeline import train_pipeline
from ditkit.caching import TaylorSeer
from ditkit.compress import Calibration, Contiguous, Kept, plug
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.run import Run
from ditkit.hosts import qwen_image
from ditkit.hosts.hosted import Host
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from ditkit.train.terms.span_distillation import SpanDistillation
from latents_support import SHORT
from rig import noise, tiny_dit


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_a_text_that_is_read_is_projected_and_goes_on_at_the_end(name):
    """Against the slow way: the whole network, whose attentions are handed P z + z, and whose text is replaced."""
    narrow, inputs = on_host(name, Contiguous(text=("0-2",)), depth=4)
    whole = hosts.FAMILIES[name].transformer(num_layers=4)
    blocks = narrow.transformer_blocks
    model = Host.around(whole)
    kept: dict[str, Any] = {}

    def keep(key: str, fn: Any, *args: Any) -> Any:
        kept[key] = fn(*args)
        return kept[key]

    def projected(i: int, fn: Any, *args: Any) -> Tensor:
        return kept["z"] + blocks[i].text_proj(kept["z"])

    def resumed(fn: Any, *args: Any) -> Any:
        state = kept["h"].text
        return fn(*args)._replace(text=state + blocks[2].text_resume(state))

    handlers = {
        "blocks.0.attn.text": partial(keep, "z"),
        "blocks.0": partial(keep, "h"),
        "blocks.1.attn.text": partial(projected, 1),
        "blocks.2.attn.text": partial(projected, 2),
        "blocks.2": resumed,
    }
    assert torch.equal(hosts.call(narrow, inputs), hosts.call(model.transformer, inputs, Run(handlers)))
    assert [block.text_role for block in blocks] == ["handed", "read", "resumed", "own"]
    assert not any(
        n.startswith(("txt", "norm1_context", "ff_context")) for n, _ in blocks[1].named_parameters()
    )
    assert hosts.same_in_both(narrow, inputs, hosts.call(narrow, inputs))


@pytest.mark.parametrize("name", [*TWO_STREAMS, "tiny"])
def test_an_mlp_becomes_a_layer_on_the_state_after_the_attention(name):
    """Against the slow way: the whole network, whose block gives h + F h."""
    kept: dict[str, Any] = {}

    def before(stream: str, fn: Any, x: Tensor, *args: Any) -> Tensor:
        kept[stream] = x
        return fn(x, *args)

    if name == "tiny":
        model = tiny_dit()
        given = [
            {"x": noise(4, seed), "t": torch.full((4,), seed / 9), "cond": Cond(label=torch.arange(4))}
            for seed in range(9)
        ]
        narrow = ditkit.compress(model, Contiguous(linear=(1,)), calibration=Calibration(tuple(given)))
        layer = narrow.blocks[1].linear

        def replaced(fn: Any, *args: Any) -> Tensor:
            fn(*args)
            return kept["image"] + layer(kept["image"])

        run = Run({"blocks.1": replaced, "blocks.1.mlp": partial(before, "image")})
        with torch.no_grad():
            assert torch.equal(out(narrow), model(noise(), T, COND, run=run))
        return
    transformer, inputs = on_host(name, Contiguous(linear=(1,)), depth=3)
    whole = hosts.FAMILIES[name].transformer(num_layers=3)
    image, text = (
        transformer.transformer_blocks[1].get_submodule(part)
        for part in (("img_mlp", "txt_mlp") if name == "qwen-image" else ("ff", "ff_context"))
    )

    def replaced_pair(fn: Any, *args: Any) -> Any:
        return fn(*args)._replace(
            image=kept["image"] + image(kept["image"]), text=kept["text"] + text(kept["text"])
        )

    run = Run(
        {
            "blocks.1": replaced_pair,
            "blocks.1.mlp": partial(before, "image"),
            "blocks.1.text.mlp": partial(before, "text"),
        }
    )
    expected = hosts.call(Host.around(whole).transformer, inputs, run)
    assert torch.allclose(hosts.call(transformer, inputs), expected, atol=1e-6)


def small_flux() -> SmallFlux:
    config = SmallFluxConfig(
        size=8, channels=1, width=32, heads=4, depth=4, single_depth=3, classes=4, letters=8
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = SmallFlux(config).eval()
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.05)
    return model


NARROW = ("contiguous:text=0-3,spans=1-2,linear=0,samples=8,steps=3", "contiguous:stack=single,spans=0-1")


def test_depth_and_width_are_trained_in_one_phase_and_plugged_back(tmp_path):
    pruned = ditkit.compress(small_flux(), *NARROW)
    begun = {name: value.clone() for name, value in pruned.state_dict().items()}
    objective = Denoising((SpanDistillation(),))
    done = train(
        pruned,
        Pictures(),
        objective,
        settings(steps=6, save_every=0, trained="contiguous", gradient_checkpointing=True),
        tmp_path / "run",
        start=small_flux,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    changed = {
        ".".join(name.split(".")[1:3])
        for name, value in begun.items()
        if not torch.equal(value, done.state_dict()[name])
    }
    assert changed == {f"transformer_blocks.{n}" for n in (0, 1, 2)} | {"single_transformer_blocks.0"}
    loaded = ditkit.load(tmp_path / "run" / "model")
    assert same(loaded, done) and loaded.transforms == done.transforms
    policies = [TaylorSeer(interval=3, order=1)]
    exact, cached = (
        ditkit.generate(loaded, [0, 1], seeds=(0, 1), steps=5, policies=p).samples for p in ((), policies)
    )
    assert exact.isfinite().all() and 0 < (exact - cached).norm() < exact.norm()
    single = plug(small_flux(), done, stack="single")
    assert (
        len(single.transformer.single_transformer_blocks) == 2
        and len(single.transformer.transformer_blocks) == 4
    )
    assert same(plug(small_flux(), done, (), (), (), "single"), small_flux())
    with pytest.raises(ConfigError, match="is not in the pruned model, where it is narrower"):
        plug(small_flux(), done, text=())
    back = plug(small_flux(), done, spans=())
    assert len(back.transformer.transformer_blocks) == 4
    assert [(t.spans, t.text, t.linear) for t in back.transforms] == [((), (), (0,))]
    for what in ({"text": ("0-3",)}, {"text": ("0-3",), "linear": ()}):
        with pytest.raises(ConfigError, match="text=0-3 of the pruned model was trained for other blocks"):
            plug(small_flux(), done, spans=(), **what)


def test_a_width_goes_with_the_span_that_it_was_trained_for():
    pruned = ditkit.compress(small_flux(), "contiguous:linear=0+1,spans=1-2,samples=8,steps=3")
    back = plug(small_flux(), pruned, spans=())
    assert [(t.spans, t.linear) for t in back.transforms] == [((), (0,))]
    blocks, ours = pruned.transformer.transformer_blocks, back.transformer.transformer_blocks
    assert torch.equal(ours[0].ff.weight, blocks[0].ff.weight) and len(ours) == 4
    with pytest.raises(ConfigError, match="linear=1 of the pruned model was trained for other blocks"):
        plug(small_flux(), pruned, spans=(), linear=(1,))
    with pytest.raises(ConfigError, match="student of 1-2 is not in the pruned model, where it is narrower"):
        plug(small_flux(), pruned, linear=(0,))


def test_a_refusal_leaves_a_transformer_as_it_was(tmp_path):
    narrow, _ = on_host("flux", Contiguous(spans=("1-2",), linear=(1,)), depth=4)
    Host.around(narrow).save(tmp_path)
    whole = hosts.FAMILIES["flux"].transformer(num_layers=4)
    with pytest.raises(ConfigError, match="is not in the pruned model, where it is narrower"):
        ditkit.compress(whole, Contiguous(spans=("1-2",), students=str(tmp_path)))
    before = hosts.FAMILIES["flux"].transformer(num_layers=4)
    assert len(whole.transformer_blocks) == 4 and same(whole, before)
    taken = Contiguous(spans=("1-2",), linear=(1,), students=str(tmp_path))
    ditkit.compress(whole, taken)
    assert same(whole, narrow) and Host.around(whole).transforms[-1].students == ""


def test_lengths_of_text_are_set_right_where_a_student_only_reads_it(tmp_path):
    folder = small_flux().save(tmp_path / "original")
    pruned = ditkit.compress(small_flux(), "contiguous:text=0-2,spans=1-2,samples=8,steps=3")
    assert [t.text for t in ditkit.compress(pruned, f"rescaled:original={folder}").transforms[-1:]] == [()]


# folders of diffusers, the shell, pipelines


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_without_spans_a_transformer_is_an_ordinary_folder_and_both_numberings_open(name, tmp_path):
    transformer, inputs = on_host(name, Contiguous(spans=("0-2",)), depth=5, calls=0)
    expected = hosts.call(transformer, inputs)
    transformer.save_pretrained(tmp_path / "new")
    plain = getattr(diffusers, type(transformer).__name__).from_pretrained(tmp_path / "new")
    assert len(plain.transformer_blocks) == 3 and torch.equal(hosts.call(plain, inputs), expected)
    file = next((tmp_path / "new").glob("*.safetensors"))
    old = {"0": "0", "1": "3", "2": "4"}

    def with_gaps(key: str) -> str:
        stack, _, rest = key.partition(".")
        number, _, inner = rest.partition(".")
        return f"{stack}.{old[number]}.{inner}" if stack == "transformer_blocks" else key

    save_file({with_gaps(k): v for k, v in load_file(file).items()}, file)
    assert torch.equal(hosts.call(ditkit.load(tmp_path / "new").transformer, inputs), expected)


def test_spans_of_qwen_image_are_trained_on_latents_as_its_pipeline_calls_it(tmp_path):
    pipe, given = pipelines.qwen_image(num_layers=4)
    calls: list[dict[str, Any]] = []

    def watch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    pipe(**{**given, "num_inference_steps": 1, "true_cfg_scale": 1.0}, generator=drawn(0))
    hook.remove()
    call, inputs = calls[0], qwen_image.INPUTS
    x = inputs.prediction(pipe.transformer, call["hidden_states"], (1, 16, 8, 8))
    cond = Cond(text=call["encoder_hidden_states"], text_mask=call["encoder_hidden_states_mask"])
    ours = inputs.arguments(pipe.transformer, x, call["timestep"].float(), cond, 1.0)
    for name, value in ours.items():
        assert torch.equal(value, call[name].to(value)) if isinstance(value, Tensor) else value == call[name]
    file = tmp_path / "latents.safetensors"
    texts = {"prompt_embeds": torch.randn(6, 5, 20), "prompt_embeds_mask": torch.ones(6, 5).long()}
    save_file({"latents": torch.randn(6, 16, 8, 8), **texts}, file)
    before = pipe.transformer.state_dict()["transformer_blocks.3.img_mlp.net.2.weight"].clone()
    spans = {"terms": ["spandistillation:masked=true"], "settings": SHORT, "out": tmp_path / "run"}
    trained = train_pipeline(pipe, file, "contiguous:spans=1-2", **spans)
    blocks = trained.transformer.transformer_blocks
    assert len(blocks) == 3 and torch.equal(blocks[2].img_mlp.net[2].weight, before)
    plain = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path / "run" / "model")
    assert len(plain.transformer_blocks) == 3


def test_a_narrower_transformer_is_a_folder_of_ours(tmp_path):
    transformer, inputs = on_host("flux", Contiguous(text=("0-2",), linear=(1,)), depth=4)
    expected = hosts.call(transformer, inputs)
    with pytest.raises(ConfigError, match="Contiguous has no form that plain diffusers opens"):
        transformer.save_pretrained(tmp_path)
    Host.around(transformer).save(tmp_path / "ours")
    assert torch.equal(hosts.call(ditkit.load(tmp_path / "ours").transformer, inputs), expected)


def test_groups_of_text_lie_beside_spans_and_calibration_is_asked_for():
    model = hosts.FAMILIES["flux"].transformer(num_layers=6)
    for text in ("0-2", "1-4"):
        with pytest.raises(ConfigError, match=f"text={text} begins or ends inside the span 1-3"):
            Contiguous(spans=("1-3",), text=(text,)).check(Host.around(model))
    with pytest.raises(ConfigError, match="spans and projections are fitted from calibration, and got none"):
        ditkit.compress(model, Contiguous(text=("0-2",)))
    calls = ({"hidden_states": torch.zeros(1, 3, 4, 4), "timestep": torch.zeros(1)},) * 2
    other = ({**calls[0], "hidden_states": torch.zeros(1, 3, 2, 2)},)
    with pytest.raises(ShapeError, match="calibration has samples of"):
        ditkit.compress(model, Contiguous(text=("0-2",)), calibration=Calibration((*calls, *other)))
    sd3 = Host.around(hosts.FAMILIES["sd3.5"].transformer(num_layers=4))
    with pytest.raises(ConfigError, match="takes in block 3 of 'blocks', which other parts"):
        Contiguous(text=("1-3",)).check(sd3)
    narrow, _ = on_host("flux", Contiguous(text=("0-2",)), depth=4)
    with pytest.raises(ConfigError, match="leave out block 2, which hands a text on or reads one"):
        ditkit.compress(narrow, Kept(blocks=(0, 1, 3)))
