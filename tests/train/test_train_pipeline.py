"""The transformer of a diffusers pipeline, trained: called as its pipeline calls it, saved as diffusers opens it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.adapt.lora import LoRA, Merged
from ditkit.adapt.task_routing import TaskRouting
from ditkit.api.train_pipeline import PipelineTraining, host_of
from ditkit.compress import Kept, decide
from ditkit.core.checkpoint import read_json, read_state
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.time_grid import Shift
from ditkit.hosts.denoiser import HostDenoiser, samples_of, shift_for
from ditkit.hosts.hosted import Host
from ditkit.hosts.paths import config_of_scheduler, path_of, shift_of
from ditkit.train.denoising import Denoising
from ditkit.train.parts import train_only
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Group
from ditkit.train.terms.distillation import PredictionDistillation
from ditkit.train.terms.masked_distillation import MaskedDistillation
from ditkit.train.terms.regression import Regression
from ditkit.train.timesteps import LogitNormal, Shifted
from latents_support import FAMILIES, SHORT, TEXT, file_of, folder_of, pipe_of

every_family = pytest.mark.parametrize("name", FAMILIES)
ONCE = {"num_inference_steps": 2, "output_type": "latent"}


def model_of(name: str, tmp_path: Any, **changed: Any) -> HostDenoiser:
    return PipelineTraining(source=pipe_of(name), data=file_of(name, tmp_path), **changed).base()


def first_call(name: str) -> dict[str, Any]:
    """Arguments that the pipeline calls its transformer with, at its first step."""
    pipe, (_, told) = pipe_of(name), FAMILIES[name]()
    calls: list[dict[str, Any]] = []

    def watch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append({**({"hidden_states": args[0]} if args else {}), **kwargs})

    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    scale = {} if name == "flux" else {"guidance_scale": 1.0}
    size = (
        {} if name == "dit" else {"height": 16 if name != "wan" else 32, "width": 16 if name != "wan" else 32}
    )
    try:
        pipe(**{**told, **ONCE, **size, **scale}, generator=torch.Generator().manual_seed(0))
    finally:
        handle.remove()
    return calls[0]


@every_family
def test_it_is_called_as_the_pipeline_calls_it(name: str, tmp_path: Any) -> None:
    model, given = model_of(name, tmp_path, guidance=3.5), first_call(name)
    x = given["hidden_states"]
    if name == "flux":
        side = int(len(given["img_ids"]) ** 0.5)
        x = model.inputs.prediction(model.transformer, x, (len(x), 4, 2 * side, 2 * side))
    unit = 1 if name == "flux" or not model.inputs.flow else 1000
    cond = Cond(
        text=given.get("encoder_hidden_states"),
        vector=given.get("pooled_projections"),
        text_mask=given.get("encoder_attention_mask"),
        label=given.get("class_labels"),
    )
    t = torch.as_tensor(given["timestep"]).float().expand(len(x)) / unit
    ours = model.inputs.arguments(model.transformer, x, t, cond, 3.5)
    ignored = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "encoder_hidden_states_image"}
    for key, value in given.items():
        if isinstance(value, Tensor):
            assert torch.allclose(ours[key].float(), value.float(), rtol=1e-6), key
        elif key not in ignored:
            assert key in ours or value is None, key
    assert ours.keys() <= given.keys()


@every_family
def test_the_loss_is_that_of_the_schedulers_own_noise(name: str, tmp_path: Any) -> None:
    """A twin: diffusers' scheduler mixes data and noise, and the target is what its prediction type says."""
    model = model_of(name, tmp_path, dropout=0.0)
    samples = samples_of(model.transformer, file_of(name, tmp_path))
    data, cond = samples.batch(torch.arange(3), None)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    if model.inputs.flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        steps = scheduler.timesteps[[100, 500, 900]]
        x, target, t = scheduler.scale_noise(data, steps, noise), noise - data, steps / 1000
        fed = t
    else:
        scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02)
        t = torch.tensor([100, 500, 900])
        x, target, fed = scheduler.add_noise(data, noise, t), noise, t.float()
    with torch.no_grad():
        out = model(x, fed, cond)[:, : data.shape[1]]
        path = model.config.convention.make_path()
        losses = Denoising((Regression(),)).at(
            model, model, path=path, data=data, noise=noise, t=t, cond=cond
        )
    assert torch.allclose(losses["loss"], (out - target).square().mean(), rtol=1e-5)


def test_times_are_moved_as_the_scheduler_moves_its_steps(tmp_path: Any) -> None:
    even = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert shift_of(config_of_scheduler(static), 16) == 3.0
    assert torch.allclose(Shift(3.0).warp(even).float(), static.sigmas[:1000], atol=1e-6)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(1024)
    dynamic.set_timesteps(sigmas=even[::100].tolist(), mu=mu)
    a = shift_of(config_of_scheduler(dynamic), 1024)
    assert torch.allclose(Shift(a).warp(even[::100]).float(), dynamic.sigmas[:10], atol=1e-6)
    wan = config_of_scheduler(pipe_of("wan").scheduler)
    assert shift_of(wan, 16) == wan["flow_shift"] == 3.0
    model = model_of("wan", tmp_path)
    training = PipelineTraining(source=pipe_of("wan"), data=file_of("wan", tmp_path))
    assert training.objective(model).timesteps == Shifted(3.0, LogitNormal()) and shift_for(model, wan) == 3.0
    assert model_of("sd3", tmp_path).config.convention == Convention()
    alone = path_of(None, flow=False, learns_variance=True, rows=4).convention
    assert alone == Convention("ddpm", "noise", "index", "variance")


@pytest.mark.parametrize(
    ("scheduler", "flow", "message"),
    [
        (
            diffusers.DDPMScheduler(beta_end=0.03),
            False,
            "are \\('linear', 0.0001, 0.03\\).*expected 1000 steps of one",
        ),
        (
            diffusers.DDPMScheduler(prediction_type="v_prediction"),
            False,
            "unknown prediction_type 'v_prediction'",
        ),
        (diffusers.DDPMScheduler(), True, "is of discrete steps \\(DDPM\\), expected one of flow matching"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), False, "is of flow matching, expected one of discrete"),
    ],
)
def test_a_scheduler_of_another_path_is_refused(scheduler: Any, flow: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        path_of(config_of_scheduler(scheduler), flow, True, 4)


@every_family
def test_a_fine_tuned_transformer_opens_in_plain_diffusers(name: str, tmp_path: Any) -> None:
    folder, file = folder_of(name, tmp_path), file_of(name, tmp_path)
    trained = ditkit.train_pipeline(folder, file, out=tmp_path / "run", settings=SHORT)
    kind = type(pipe_of(name).transformer)
    plain = kind.from_pretrained(tmp_path / "run" / "model")
    before, after = pipe_of(name).transformer.state_dict(), plain.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in trained.transformer.state_dict().items())
    moved = [k for k, v in after.items() if not torch.equal(v, before[k])]
    assert len(moved) > len(after) / 2
    state = read_state(tmp_path / "run" / "state.safetensors")
    ditkit.train_pipeline(folder, file, out=tmp_path / "two", settings=replace(SHORT, steps=1))
    ditkit.train_pipeline(folder, file, out=tmp_path / "two", settings=SHORT, resume=True)
    again = read_state(tmp_path / "two" / "state.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(v, again[k]) for k, v in state.items())


@every_family
def test_low_rank_layers_alone_are_trained_and_merge(name: str, tmp_path: Any) -> None:
    file, before = file_of(name, tmp_path), pipe_of(name).transformer.state_dict()
    trained = ditkit.train_pipeline(pipe_of(name), file, "lora:rank=2", out=tmp_path / "run", settings=SHORT)
    state = {k.replace(".base_layer", ""): v for k, v in trained.transformer.state_dict().items()}
    assert all(torch.equal(v, state[k]) for k, v in before.items())
    added = [v for k, v in state.items() if ".lora_B" in k]
    assert added and all(v.abs().sum() > 0 for v in added[:1])
    again = ditkit.load(tmp_path / "run" / "model")
    assert type(again) is Host and again.transforms == (LoRA(rank=2),)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in trained.state_dict().items())
    ditkit.compress(again, Merged()).save(tmp_path / "merged")
    kind = type(pipe_of(name).transformer)
    assert kind.from_pretrained(tmp_path / "merged").state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "kept", "term"),
    [
        (
            "flux",
            Kept(blocks=(0, 2), stack="single"),
            MaskedDistillation(stack="single", pairs=((0, 0), (1, 2))),
        ),
        ("dit", Kept(blocks=(0,)), MaskedDistillation(every=1)),
        ("sd3", Kept(blocks=(1,)), PredictionDistillation()),
        ("pixart", Kept(blocks=(1,)), PredictionDistillation()),
    ],
)
def test_a_pruned_transformer_learns_from_what_it_was(
    name: str, kept: Kept, term: Any, tmp_path: Any
) -> None:
    file = file_of(name, tmp_path)
    seen = []

    class Spied(type(term)):
        def loss(self, batch: Any) -> Tensor:
            seen.append(batch.taught.out.shape)
            return super().loss(batch)

    spied = Spied(**vars(term))
    terms = (Regression(0.1), spied)
    trained = ditkit.train_pipeline(
        pipe_of(name), file, kept, out=tmp_path / "run", terms=terms, settings=replace(SHORT, steps=1)
    )
    assert seen == [(2, *PipelineTraining(source=pipe_of(name), data=file).base().sample_shape)]
    plain = type(pipe_of(name).transformer).from_pretrained(tmp_path / "run" / "model")
    assert plain.state_dict().keys() == trained.transformer.state_dict().keys()
    stack = trained.stacks()[kept.stack]
    assert len(trained.get_submodule(stack.path)) == len(kept.blocks) == plain.config[stack.field]


def test_an_average_teaches_and_a_folder_does(tmp_path: Any) -> None:
    from ditkit.train.teacher import EmaTeacher, GivenTeacher

    folder, file = folder_of("wan", tmp_path), file_of("wan", tmp_path)
    for i, teacher in enumerate((EmaTeacher(), GivenTeacher(str(folder / "transformer")))):
        term = MaskedDistillation(teacher=teacher, every=1)
        out = tmp_path / str(i)
        ditkit.train_pipeline(
            folder, file, out=out, terms=(Regression(), term), settings=replace(SHORT, steps=1)
        )
    other = GivenTeacher(str(folder_of("dit", tmp_path) / "transformer"))
    with pytest.raises(
        ConfigError, match="a teacher is a DiTTransformer2DModel, expected a WanTransformer3DModel"
    ):
        ditkit.train_pipeline(
            folder, file, out=tmp_path / "x", terms=(MaskedDistillation(teacher=other),), settings=SHORT
        )


@every_family
def test_dropout_belongs_to_the_sample(name: str, tmp_path: Any) -> None:
    model = model_of(name, tmp_path)
    assert model.config.label_dropout == 0.1
    samples = samples_of(model.transformer, file_of(name, tmp_path))
    x, cond = samples.batch(torch.arange(2), None)
    t = torch.full((2,), 0.5 if model.inputs.flow else 500.0)
    model.train()
    before = torch.get_rng_state()
    with torch.no_grad():
        half = model(x, t, replace(cond, drop=torch.tensor([False, True])))
        whole, none = model(x, t, cond), model(x, t, model.unconditional(cond))
    assert torch.equal(torch.get_rng_state(), before)  # the transformer drops nothing by itself
    assert torch.equal(half[0], whole[0]) and torch.allclose(half[1], none[1], atol=1e-6)
    assert not torch.allclose(whole[1], none[1], atol=1e-4)


def test_without_negative_prompts_nothing_is_dropped(tmp_path: Any) -> None:
    file = file_of("sd3", tmp_path, negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    assert PipelineTraining(source=pipe_of("sd3"), data=file).base().config.label_dropout == 0
    with pytest.raises(
        ConfigError, match=r"dropout=0.1 needs what stands.*'negative_prompt_embeds', expected it"
    ):
        PipelineTraining(source=pipe_of("sd3"), data=file, dropout=0.1).base()


def test_the_network_of_a_given_size_and_of_checkpoints(tmp_path: Any) -> None:
    """Blocks computed again give the same gradient, and the loop turns it on."""
    grads = []
    for again in (False, True):
        model = model_of("flux", tmp_path).train()
        model.gradient_checkpointing = again
        rng = SampleRNG(0, 0, range(2))
        data, cond = samples_of(model.transformer, file_of("flux", tmp_path)).batch(torch.arange(2), rng)
        Denoising()(model, model, data, cond, rng)["loss"].backward()
        assert model.transformer.gradient_checkpointing is again
        grads.append(model.transformer.x_embedder.weight.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


@every_family
def test_attention_alone_can_be_trained(name: str, tmp_path: Any) -> None:
    model = model_of(name, tmp_path)
    train_only(model, "attention")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".attn" in n and "norm" not in n for n in trained)
    blocks = sum(site.kind == "core" for site in model.sites())
    assert sum(n.endswith("to_q.weight") for n in trained) >= blocks


BAD = {
    "pooled missing": (
        "flux",
        {"pooled_prompt_embeds": None},
        "no tensor 'pooled_prompt_embeds'; it has latents",
    ),
    "text width": (
        "flux",
        {"prompt_embeds": torch.zeros(6, TEXT, 16)},
        r"'prompt_embeds' is \[6, 5, 16\], expected \[6, S, 32\]",
    ),
    "rows": ("sd3", {"pooled_prompt_embeds": torch.zeros(4, 24)}, r"is \[4, 24\], expected \[6, 24\]"),
    "channels": ("sd3", {"latents": torch.zeros(6, 4, 8, 8)}, r"is \[6, 4, 8, 8\], expected \[N, 16, H, W\]"),
    "odd": ("flux", {"latents": torch.zeros(6, 4, 7, 8)}, "expected .* with H a multiple of 2"),
    "frames": ("wan", {"latents": torch.zeros(6, 16, 8, 8)}, r"expected \[N, 16, T, H, W\]"),
    "nan": (
        "dit",
        {"latents": torch.full((6, 4, 8, 8), torch.nan)},
        "'latents' holds NaN or infinity in row 0",
    ),
    "class": ("dit", {"class_labels": torch.full((6,), 1000)}, "goes from 1000 to 1000, expected 0 to 999"),
    "fractions": ("dit", {"class_labels": torch.zeros(6)}, "holds torch.float32, expected whole numbers"),
    "unknown": (
        "dit",
        {"prompt_embeds": torch.zeros(6, 5, 32)},
        "unknown tensor 'prompt_embeds'.*, class_labels",
    ),
    "half a negative": (
        "flux",
        {"negative_pooled_prompt_embeds": None},
        "got 'negative_prompt_embeds' without 'negative_pooled_prompt_embeds', expected both",
    ),
    "negative rows": (
        "wan",
        {"negative_prompt_embeds": torch.zeros(2, 32)},
        r"'negative_prompt_embeds' is \[1, 2, 32\], expected \[1, 5, 32\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_is_refused(case: str, tmp_path: Any) -> None:
    name, changed, message = BAD[case]
    file = file_of(name, tmp_path, **changed)
    with pytest.raises(DataError, match=message) as caught:
        ditkit.train_pipeline(pipe_of(name), file, out=tmp_path / "run")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_no_transformer_is_refused(tmp_path: Any) -> None:
    from family_pipelines_support import latte, wan_two_experts

    file = file_of("wan", tmp_path)
    for source, message in (
        (tmp_path, "neither a pipeline of diffusers with a transformer nor a transformer"),
        (object(), "got object, expected a pipeline of diffusers with a transformer"),
        (wan_two_experts()[0], "has two experts, transformer and transformer_2"),
    ):
        with pytest.raises(ConfigError, match=message):
            host_of(source)
    with pytest.raises(
        ConfigError, match="unknown family of transformers to train 'LatteTransformer3DModel'"
    ):
        ditkit.train_pipeline(latte()[0], file, out=tmp_path / "run")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="cannot be read as a complete safetensors file"):
        ditkit.train_pipeline(pipe_of("wan"), tmp_path / "torn.safetensors", out=tmp_path / "run")
    with pytest.raises(ConfigError, match="holds no run to resume"):
        ditkit.train_pipeline(pipe_of("wan"), file, out=tmp_path / "run", resume=True)
    filled = FAMILIES["flux"](out_channels=8)[0].transformer
    with pytest.raises(ConfigError, match="in_channels=16 are more than its latents"):
        samples_of(filled, file)


def test_trained_under_an_inherent_policy_it_is_not_run_without(tmp_path: Any) -> None:
    routed, file = TaskRouting(path="linear"), file_of("flux", tmp_path)
    trained = ditkit.train_pipeline(
        pipe_of("flux"), file, out=tmp_path / "run", policies=[routed], settings=SHORT
    )
    again = ditkit.load(tmp_path / "run" / "model")
    assert again.policies == trained.policies == (routed,)
    with pytest.raises(ConfigError, match=r"was trained under TaskRouting\(.*, which plain diffusers"):
        again.transformer.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    given = first_call("flux")
    with pytest.raises(ConfigError, match=r"was trained under TaskRouting\(.*; expected a call through"):
        again.transformer(**{**given, "return_dict": False})
    pipe = FAMILIES["flux"]()[0]
    pipe.set_progress_bar_config(disable=True)
    told = {**FAMILIES["flux"]()[1], "num_inference_steps": 8}
    pipe.transformer = again.transformer

    def drawn(*policies: Any) -> tuple[Tensor, Any]:
        with ditkit.accelerate(pipe, *policies) as fast:
            return fast(**told, generator=torch.Generator().manual_seed(0))[0], fast.report()

    fast, report = drawn("taylorseer:interval=1")
    assert "taskrouting" in str(report).lower()
    without, _ = drawn("taylorseer:interval=1", routed.exact())
    assert not torch.allclose(fast, without, atol=1e-3)
    model = HostDenoiser.of(again, samples_of(again.transformer, file), None)
    assert model.policies == (routed,)
    with pytest.raises(ConfigError, match="expected a call through ditkit"):
        pipe(**told)


def test_a_search_for_the_blocks_to_keep_runs_on_a_pipeline(tmp_path: Any) -> None:
    """TinyFusion on FLUX: low-rank layers and logits are trained, and the choice prunes the transformer as it was."""
    search = replace(SHORT, groups=(Group("learneddepth", 10.0),))
    found = ditkit.train_pipeline(
        pipe_of("flux"),
        file_of("flux", tmp_path),
        LoRA(rank=2, layers="all"),
        out=tmp_path / "run",
        policies=["learneddepth:steps=2"],
        settings=search,
    )
    record = read_json(tmp_path / "run" / "recipe.json")
    assert record["settings"]["trained"] == "lora+learneddepth"
    decision = decide(ditkit.load(tmp_path / "run" / "model"))
    assert decision == decide(found) and len(decision.kept.blocks) == 1
    pipe = FAMILIES["flux"]()[0]
    ditkit.compress(pipe, decision.kept).transformer.save_pretrained(tmp_path / "cut")
    plain = type(pipe.transformer).from_pretrained(tmp_path / "cut")
    kept, block = decision.kept.blocks[0], "transformer_blocks.{}.attn.to_q.weight"
    before = FAMILIES["flux"]()[0].transformer.state_dict()
    assert torch.equal(plain.state_dict()[block.format(0)], before[block.format(kept)])
