"""Claims of the characterisation that two cores can try: shares of time and of work by part, and sequence lengths.

python benchmarks/claims/03_multimodal_characterisation.py

Weights do not matter for any of these: networks are drawn at random, in the shapes of a DiT and a
space-time transformer. A time is a median over rounds, its interval a bootstrap of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditkit.api.profile import profile
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.bench.timing import alternated
from ditkit.core.model import Denoiser
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.report.profile import Profile
from ditkit.sample import Unguided
from ditkit.systems.claims import Claim

IMAGE = DiTConfig(size=32, patch=2, channels=4, width=256, depth=4, heads=4, classes=10)
CLIP = VDTConfig(size=32, frames=16, patch=2, channels=4, width=128, depth=4, heads=4)
ROUNDS = 7
PROMPT, STEPS, HEADS, WIDTH = 1024, 64, 4, 64
"""Queries of one denoising step, and decoding steps of one query each, which do as many of them in a row."""


def profiles(model: Denoiser, rounds: int = ROUNDS) -> list[Profile]:
    """Return the profiles of one forward pass, the first left out: it warms up."""
    work = {"steps": 1, "seeds": (0,), "guidance": Unguided()}
    return [profile(model.eval(), **work) for _ in range(rounds + 1)][1:]


def shares(found: list[Profile], **fields: str) -> torch.Tensor:
    return torch.tensor([one.share(**fields) for one in found]).double()


def of_transformers() -> Iterator[Claim]:
    """Yield the claim on the classes of an image transformer."""
    torch.manual_seed(0)
    found = profiles(DiT(IMAGE))
    linear = shares(found, kind="linear")
    others = ", ".join(
        f"{kind} {100 * shares(found, kind=kind).mean():.0f} %"
        for kind in ("attention", "elementwise", "host")
    )
    yield Claim.tried(
        "After fused attention, linear layers are the largest class of an image transformer: share of the time",
        paper="up to 49 % for transformer text-to-image models on an A100",
        ours=linear.mean().item(),
        interval=bootstrap(linear),
        claimed=(0.4, 1.0),
        unit="of the time",
        against=f"DiT of width 256 on 256 tokens, one thread, {ROUNDS} rounds; {others}",
    )


def of_clips() -> Iterator[Claim]:
    """Yield the claims on temporal attention in a factorised space-time transformer."""
    torch.manual_seed(0)
    found = profiles(VDT(CLIP))

    def of(one: Profile, part: str, what: str) -> float:
        return sum(
            getattr(e, what) for e in one.entries if e.part == part and e.kind in ("attention", "movement")
        )

    time, macs = [], []
    for one in found:
        spent = [of(one, f"{axis} attention", "seconds") for axis in ("temporal", "spatial")]
        work = [of(one, f"{axis} attention", "macs") for axis in ("temporal", "spatial")]
        time.append(spent[0] / sum(spent))
        macs.append(work[0] / sum(work))
    share = torch.tensor(time).double()
    setting = f"16 frames of 256 tokens, width 128, one thread, {ROUNDS} rounds; softmax(q k) v and the copies for it"
    yield Claim.tried(
        "Temporal attention's share of attention time is above its share of attention MACs: ratio of the two",
        paper="about 2 times the time of spatial attention at about 9 times fewer FLOPs",
        ours=(share / macs[0]).mean().item(),
        interval=bootstrap(share / macs[0]),
        claimed=(1.0, None),
        against=f"{setting}; share of MACs {macs[0]:.3f}, of time {share.mean():.3f}",
    )
    yield Claim.tried(
        "Temporal attention takes more than 60 % of attention time in a video model",
        paper="over 60 % for text-to-video models on an A100",
        ours=share.mean().item(),
        interval=bootstrap(share),
        claimed=(0.6, None),
        unit="of attention time",
        against=setting,
    )


def of_fused_attention() -> Iterator[Claim]:
    """Yield the claim on fused attention of many queries at once and of one at a time."""
    many = [torch.randn(1, HEADS, PROMPT, WIDTH) for _ in range(3)]
    one = torch.randn(1, HEADS, 1, WIDTH)

    def denoise(backend: SDPBackend) -> None:
        with sdpa_kernel(backend), torch.inference_mode():
            F.scaled_dot_product_attention(*many)

    def decode(backend: SDPBackend) -> None:
        with sdpa_kernel(backend), torch.inference_mode():
            for _ in range(STEPS):
                F.scaled_dot_product_attention(one, many[1], many[2])

    kinds = {"math": SDPBackend.MATH, "fused": SDPBackend.FLASH_ATTENTION}
    calls = {
        f"{name} {how.__name__}": partial(how, backend)
        for name, backend in kinds.items()
        for how in (denoise, decode)
    }
    seconds = {name: torch.tensor(s).double() for name, s in alternated(calls, 21, warmup=2).items()}
    gain = {how: seconds[f"math {how}"] / seconds[f"fused {how}"] for how in ("denoise", "decode")}
    extra = (gain["denoise"] / gain["decode"]).log2()
    yield Claim.tried(
        "Fused attention helps a denoising step more than token-by-token generation: log2 of the extra gain",
        paper="1.1 to 2.5 times more on an A100",
        ours=extra.mean().item(),
        interval=bootstrap(extra),
        claimed=(0.0, None),
        against=f"{PROMPT} queries at once: {gain['denoise'].mean():.2f} times; {STEPS} steps of one query on as many "
        f"keys: {gain['decode'].mean():.2f} times; 21 rounds in turns, one thread",
    )


def untried() -> Iterator[Claim]:
    """Yield the claims that this machine cannot try."""
    yield Claim.untried(
        "Convolution takes up to 44 % of the time of diffusion text-to-image models after fused attention",
        paper="44 %, Stable Diffusion's U-Net on an A100",
        reason="takes a U-Net of convolutions and attention, which ditkit does not host, and a GPU",
    )
    yield Claim.untried(
        "Sequence length varies up to 4 times during inference of a diffusion model",
        paper="4 times, a U-Net with attention at several levels",
        reason="no network here has self-attention at several resolutions: finer branches of DiMR convolve; that "
        "`ditkit profile` reports lengths by level is a test",
    )
    yield Claim.untried(
        "Temporal attention has much lower hit rates in the first cache than spatial attention",
        paper="a figure, from Nsight Compute on an A100",
        reason="takes the hardware counters of a GPU",
    )


def main() -> None:
    """Try the claims."""
    torch.set_num_threads(1)
    write(
        "03-multimodal-characterisation",
        [*of_transformers(), *of_clips(), *of_fused_attention(), *untried()],
    )


if __name__ == "__main__":
    tyro.cli(main)
