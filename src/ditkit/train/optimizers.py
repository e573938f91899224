"""The optimisers of a run: AdamW for every weight, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.train.parts import PART, part_of
from ditkit.train.settings import Group, Settings

MOMENTS: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("exp_avg", "exp_avg_sq", "step"),
    Muon: ("momentum_buffer",),
}
"""The state that each keeps of a weight from step to step, by name."""
MUON_MOMENTUM = 0.95
NONE: Mapping[str, float] = MappingProxyType({})


def optimizers_of(
    model: Model,
    settings: Settings,
    modules: nn.ModuleDict | None = None,
    opponents: Mapping[str, float] = NONE,
) -> tuple[Optimizer, ...]:
    """Make the optimisers of the weights of the model and of terms' modules; no weight belongs to two.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) gives a matrix's momentum singular values near 1.
    Its step is scaled to the size of AdamW's (Moonlight, arXiv 2502.16982, eq. 4), so that one learning rate serves
    both; embeddings, heads, norms and biases are AdamW's, as in both sources. Queries, keys and values that are one
    layer are one matrix here.

    Args:
        modules: of terms, by their names. opponents: of those that an optimiser of their own steps, last and in this
            order, its rate as a multiple of the run's.

    Raises:
        ConfigError: Muon is asked for and the model has no matrix in a stack of blocks.
    """
    modules = nn.ModuleDict() if modules is None else modules
    of_muon = set(matrices(model)) if settings.optimizer == "muon" else set()
    if settings.optimizer == "muon" and not of_muon:
        raise ConfigError(
            f"training: optimizer='muon' is for linear layers in blocks; a {type(model).__name__} has none"
        )
    apart = {weight for name in opponents for weight in modules[name].parameters()}
    rest = {n: w for n, w in named_weights(model, modules).items() if w not in apart}
    grouped = partial(_grouped, model, modules, settings)
    adamw = partial(
        AdamW,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,  # torch's default is 0.01
    )
    steppers: list[Optimizer] = [adamw(grouped({n: w for n, w in rest.items() if w not in of_muon}))]
    if of_muon:
        muon = Muon(
            grouped({n: w for n, w in rest.items() if w in of_muon}),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        steppers.insert(0, muon)
    own = [
        adamw([{"params": list(modules[name].parameters()), "factor": factor}])
        for name, factor in opponents.items()
    ]
    return (*steppers, *own)


def named_weights(model: nn.Module, modules: nn.ModuleDict) -> dict[str, nn.Parameter]:
    """All that is trained, or could be, by the names that a state has."""
    parts = {f"{PART}{name}": weight for name, weight in modules.named_parameters()}
    return {**dict(model.named_parameters()), **parts}


def _grouped(
    model: Model, modules: nn.ModuleDict, settings: Settings, named: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """Group the weights by the first group that has them; what is in none has the run's own rate.

    What a module's class names in `undecayed` stands apart and does not decay.
    """
    spared = undecayed(model)
    owned: dict[str, Group] = {}
    for group in settings.groups:
        for name in part_of(model, group.part, modules):
            owned.setdefault(name, group)
    found: dict[tuple[Group | None, bool], list[nn.Parameter]] = {}
    for name, weight in named.items():
        found.setdefault((owned.get(name), weight in spared), []).append(weight)
    return [
        {
            "params": weights,
            "factor": 1.0 if group is None else group.rate,
            **({} if group is None or group.decay is None else {"weight_decay": group.decay}),
            **({"weight_decay": 0.0} if is_spared else {}),
        }
        for (group, is_spared), weights in found.items()
    ]


def undecayed(model: nn.Module) -> set[Tensor]:
    """Weights that weight decay leaves out: those that a module's class names in `undecayed`."""
    of_class = ((module, getattr(type(module), "undecayed", ())) for module in model.modules())
    return {getattr(module, name) for module, names in of_class for name in names}


def matrices(model: Model) -> list[Tensor]:
    """Trained weights of the linear layers in a list of blocks, each once; not those that a transform added."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = (layer for blocks in lists for layer in blocks.modules() if isinstance(layer, nn.Linear))
    added = {name for transform in model.transforms for name in transform.trains(model)}
    apart = {weight for name, weight in model.named_parameters() if name in added}
    found = dict.fromkeys(layer.weight for layer in layers)
    return [weight for weight in found if weight.requires_grad and weight not in apart]


def moments_of(optimizers: Sequence[Optimizer]) -> int:
    """Numbers that are kept of the weights that are trained: two of each for AdamW, one for Muon."""
    each = {kind: sum(name != "step" for name in names) for kind, names in MOMENTS.items()}
    return sum(
        each[type(optimizer)] * weight.numel()
        for weight, optimizer in owners(optimizers).items()
        if weight.requires_grad
    )


def owners(optimizers: Sequence[Optimizer]) -> dict[Tensor, Optimizer]:
    """Map each weight to the optimiser that steps it."""
    return {
        weight: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    }
