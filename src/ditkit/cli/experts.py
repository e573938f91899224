"""`ditkit experts`: which experts a routed model uses over noise-time, as a table and a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ditkit.bench.expert_use import use_of
from ditkit.cli.options import ModelName, writable
from ditkit.cli.placing import on_device
from ditkit.core.checkpoint import replacing
from ditkit.core.errors import ConfigError
from ditkit.core.loading import load
from ditkit.report.expert_picture import expert_page


@on_device
def experts(model: ModelName, *, alpha: float = 4.0, out: Path = Path("outputs/experts.png")) -> None:
    """Show which experts a model uses at each noise-time, and draw how many two noise-times share (Switch-DiT).

    Examples:
        ditkit experts runs/switch-dit/model
        ditkit experts runs/switch-dit/model --out outputs/experts.png

    Args:
        model: A shipped model, a folder, or owner/name on the Hugging Face hub.
        alpha: Parameter of the diffusion prior compared with: the higher, the later in noise-time its experts change.
        out: Picture to write.
    """
    if out.suffix != ".png":
        raise ConfigError(f"--out {out}, expected a name that ends in .png")
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"--alpha {alpha}, expected a positive number")
    use = use_of(load(model), alpha)
    page = expert_page(
        use, f"{model}: {use.active} of {use.p.shape[2]} experts in each of {use.p.shape[1]} blocks"
    )
    with writable(out.parent), replacing(out) as draft:
        draft.write_bytes(page)
    Console().print(use.table())
    print("\n".join(use.remarks()))
    print(f"wrote {out}")
