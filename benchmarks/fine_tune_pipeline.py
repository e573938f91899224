"""A FLUX pipeline fine-tuned, adapted and pruned from latents and embedded prompts: `fashion`, on negatives.

python benchmarks/fine_tune_pipeline.py        writes benchmarks/results/fine_tune_pipeline.json

The pipeline learned white garments on black. Latents of the negative pictures, black on white, are written to the file
that `ditkit train FOLDER --data FILE` takes; losses are judged on the same draws of 128 held-out negatives.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file

import ditkit
from ditkit.bench.origin import origin
from ditkit.bench.paired import Draws, paired_loss
from ditkit.core.checkpoint import write_json
from ditkit.data.loading import load_images
from ditkit.hosts.denoiser import HostDenoiser, samples_of
from ditkit.hosts.hosted import Host
from ditkit.hosts.paths import config_of_scheduler
from ditkit.nn.toy_text_encoder import encode_letters, pooled
from ditkit.train.ema import Power
from ditkit.train.settings import Settings

RESULT = Path(__file__).parent / "results" / "fine_tune_pipeline.json"
LETTERS = 16
HELD_OUT = 128


def write_latents(path: Path, split: str, count: int) -> Path:
    """Write negatives of the first pictures of a split, as the pipeline's VAE and text encoder have them."""
    images = load_images("fashion", 32, split=split)
    pictures = -images.images_float(torch.arange(count))
    letters = encode_letters([images.captions[i] for i in range(count)], LETTERS)
    tensors = {
        "latents": F.pixel_unshuffle(pictures, 2),
        "prompt_embeds": letters,
        "pooled_prompt_embeds": pooled(letters),
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def main(steps: int = 30, batch: int = 8, count: int = 256) -> None:
    """Train the arms and judge them.

    Args:
        steps: of each. batch: samples a step. count: pictures in the file.
    """
    torch.set_num_threads(1)
    pipe = ditkit.load("fashion").pipeline()
    settings = Settings(
        steps=steps,
        batch=batch,
        learning_rate=1e-3,
        warmup=min(10, steps),
        cosine=True,
        clip=1.0,
        trained="auto",
        averages=(Power(0.1),),
        save_every=0,
        sheet_every=0,
    )
    arms: dict[str, tuple[str, ...]] = {
        "fine-tuned": (),
        "lora:rank=8": ("lora:rank=8,layers=all",),
        "4 of 6 single blocks": ("kept:blocks=0+2+4+5,stack=single",),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_latents(folder / "negatives.safetensors", "train", count)
        held = write_latents(folder / "held.safetensors", "test", HELD_OUT)
        pipe.transformer.save_pretrained(folder / "fashion" / "transformer")
        pipe.scheduler.save_pretrained(folder / "fashion" / "scheduler")
        (folder / "fashion" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        base = Host.load(folder / "fashion" / "transformer")
        samples, scheduler = samples_of(base.transformer, held), config_of_scheduler(pipe.scheduler)
        models = {"as it ships": HostDenoiser.of(base, samples, scheduler)}
        rows: dict[str, dict[str, Any]] = {"as it ships": {}}
        for arm, transforms in arms.items():
            began, out = time.process_time(), folder / arm
            trained = ditkit.train_pipeline(folder / "fashion", file, *transforms, out=out, settings=settings)
            models[arm] = HostDenoiser.of(trained, samples, scheduler).eval()
            is_plain = "_class_name" in (out / "model" / "config.json").read_text()
            rows[arm] = {
                "core_seconds": round(time.process_time() - began, 1),
                "opens_in": "diffusers" if is_plain else "ditkit",
            }
        judged = paired_loss(models, samples, Draws(count=HELD_OUT))
    for arm, model in models.items():
        rows[arm]["held_out_loss"] = round(judged.mean(arm), 4)
        rows[arm]["parameters"] = sum(p.numel() for p in model.transformer.parameters())
        if arm != "as it ships":
            difference = judged.difference(arm, "as it ships")
            rows[arm]["less_than_shipped"] = [round(-v, 4) for v in reversed(difference.interval)]
    write_json(
        RESULT, {**origin(("torch", "ditkit", "diffusers")), "steps": steps, "batch": batch, "rows": rows}
    )
    for arm, row in rows.items():
        print(f"{arm:24}", row)


if __name__ == "__main__":
    tyro.cli(main)
