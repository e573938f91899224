"""One window of a large graph through Todyformer, forward and backward: its time, and the shares of its parts.

python benchmarks/graph_window.py      for a GPU: 262,144 events of 20,000 nodes, 32 patches, width 100, six blocks
"""

from __future__ import annotations

from functools import partial

import torch
import tyro
from torch import Tensor

from common import device, record, show
from ditkit.bench.timing import alternated, medians
from ditkit.models.todyformer import GlobalBlock, Todyformer, TodyformerConfig
from ditkit.nn.edge_attention import scattered_sum, sorted_sum
from ditkit.nn.patches import patchify


def backward(loss: Tensor) -> None:
    loss.sum().backward()


def main(
    events: int = 262_144, nodes: int = 20_000, patches: int = 32, width: int = 100, rounds: int = 10
) -> None:
    """Print one table, and keep it in results/graph_window.json.

    Args:
        events, nodes: of the window, at random. patches, width: of the model. rounds: of each timing.
    """
    where = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    ends = torch.randint(nodes, (2, events), generator=draw)
    age = torch.arange(events - 1, -1, -1).float()
    cut = patchify(*ends, age, torch.zeros(events, 0), torch.zeros(nodes, 0), patches).to(where)
    config = TodyformerConfig(width=width, window=events, patches=patches)
    model = Todyformer(config).to(where)
    pairs = torch.randint(nodes, (400, 2), generator=draw).to(where)
    tokens = torch.randn(len(cut.node), width, device=where, requires_grad=True)
    block = next(module for module in model.modules() if isinstance(module, GlobalBlock))
    values = torch.randn(len(cut.receiver), width, device=where, requires_grad=True)
    runs = {
        "window": lambda: backward(model(cut, pairs)),
        "global_blocks": lambda: [backward(block(tokens, cut)) for kind in model.kinds if kind == "G"],
        **{
            add.__name__: partial(lambda f: backward(f(values, cut.receiver, len(cut.node))), add)
            for add in (sorted_sum, scattered_sum)
        },
    }
    found = medians(alternated(runs, rounds, warmup=2))
    rows = [{"part": name, "milliseconds": 1e3 * seconds} for name, seconds in found.items()]
    show(f"{events} events, {len(cut.node)} tokens, forward and backward; {device()}", rows)
    record("graph_window", rows)


if __name__ == "__main__":
    tyro.cli(main)
