"""Time of the selective scan of LaMamba-Diff-XL on a GPU, at each stage, with its error against the loop over tokens.

python benchmarks/selective_scan.py      prints a row for each stage; not run yet, for want of a GPU
"""

from __future__ import annotations

import sys

import torch

from ditkit.bench.timing import alternated
from ditkit.ops.selective_scan import scan_reference, selective_scan

WIDTH, SAMPLES, PATHS = 320, 8, 4
"""Of XL; the inner width of a stage is twice its own."""


def main() -> None:
    """Print milliseconds of forward, and of forward and backward, at 256, 512 and 1024 pixels."""
    if not torch.cuda.is_available():
        sys.exit("selective_scan: no GPU")
    for latent in (32, 64, 128):
        for stage in range(3):
            tokens, inner = (latent >> stage) ** 2, 2 * (WIDTH << stage)
            of_tokens, of_channels = (SAMPLES, PATHS, tokens), (PATHS, inner)
            x, delta = torch.randn(2, *of_tokens, inner, device="cuda").bfloat16()
            B, C = torch.randn(2, *of_tokens, 1, device="cuda").bfloat16()
            D, bias = torch.randn(2, *of_channels, device="cuda")
            A = -torch.rand(*of_channels, 1, device="cuda")
            inputs = [v.requires_grad_() for v in (x, delta, A, B, C, D, bias)]

            def forward(given: tuple[torch.Tensor, ...] = tuple(inputs)) -> None:
                with torch.no_grad():
                    selective_scan(*given)
                torch.cuda.synchronize()

            def both(given: tuple[torch.Tensor, ...] = tuple(inputs)) -> None:
                selective_scan(*given).sum().backward()
                torch.cuda.synchronize()

            exact = scan_reference(*(v.detach()[:1] if v.ndim == 4 else v.detach() for v in inputs))
            with torch.no_grad():
                error = (selective_scan(*inputs)[:1] - exact).norm() / exact.norm()
            seconds = alternated({"forward": forward, "with backward": both}, 21)
            shown = "  ".join(
                f"{name} {1e3 * torch.tensor(s).median():.3f} ms" for name, s in seconds.items()
            )
            print(f"{8 * latent} pixels, stage {stage}, {tokens} tokens  {shown}  error {error:.1e}")


if __name__ == "__main__":
    main()
