"""ConvLSTM (Shi et al. 2015, arXiv 1506.04214): the recurrent forecaster that others are measured against."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import MinLen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditkit.core.config import FROM_DATA, Count, ModelConfig
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid, Segment
from ditkit.core.model import Model
from ditkit.core.run import DIRECT, Run, Site

State = tuple[Tensor, Tensor]
"""Hidden state H and cell C, [B, D, h, w] each."""


@dataclass(frozen=True)
class ConvLSTMConfig(ModelConfig):
    """An encoder and a forecaster of the same layers; the defaults are the paper's best for Moving MNIST.

    Args:
        channels: of a frame.
        frames: observed, and forecast at once.
        size: height and width of a frame, one number for both; fields keep their own grid, padded to whole patches.
        patch: side of the squares of pixels that become channels.
        states: channels of each layer's state, from the input up.
        input_kernel: side of the convolutions of a layer's input; odd.
        state_kernel: side of the convolutions of a layer's state; odd.
    """

    task: ClassVar[str] = "forecast"

    channels: Count = field(default=1, metadata=FROM_DATA)
    frames: Count = 10
    size: tuple[Count, Count] = (64, 64)
    patch: Count = 4
    states: Annotated[tuple[Count, ...], MinLen(1)] = (128, 64, 64)
    input_kernel: Count = 5
    state_kernel: Count = 5

    def __post_init__(self) -> None:
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        super().__post_init__()
        for name in ("input_kernel", "state_kernel"):
            if getattr(self, name) % 2 == 0:
                raise ConfigError(f"ConvLSTM: {name}={getattr(self, name)} should be odd")
        height, width = self.size
        if height % self.patch or width % self.patch:
            raise ShapeError(f"ConvLSTM: size={height}x{width} does not divide into patches of {self.patch}")

    @classmethod
    def tiny(cls) -> Self:
        return cls(channels=3, frames=4, size=(8, 8), patch=2, states=(8, 8))


class ConvLSTM(Model):
    """An encoder reads the frames; a forecaster starts from its states, is given nothing, and says as many.

    A recurrent network has no transformer blocks: its sites are where it reads and where it says.
    """

    Config = ConvLSTMConfig
    task = "forecast"
    config: ConvLSTMConfig

    def __init__(self, config: ConvLSTMConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.patch**2
        cell = partial(Cell, input_kernel=config.input_kernel, state_kernel=config.state_kernel)
        self.encoder = nn.ModuleList(map(cell, (pixels, *config.states), config.states))
        self.forecaster = nn.ModuleList(map(cell, (0, *config.states), config.states))
        self.out = nn.Conv2d(sum(config.states), pixels, 1)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        return (self.config.channels, self.config.frames, *self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-3:]), self.config.patch)
        return (Segment("image", grid, grid.length),)

    def sites(self) -> tuple[Site, ...]:
        return (Site("tokens", "tokens"), Site("head", "head"))

    def forward(self, x: Tensor, run: Run = DIRECT) -> Tensor:
        """Predict the frames that follow.

        Args:
            x: [B, C, T, H, W] observed frames.

        Returns:
            [B, C, T, H, W].

        Raises:
            ShapeError: channels differ from the config's, or the sides do not divide by the patch.
        """
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ShapeError(
                f"ConvLSTM: input {list(x.shape)} should be [B, {self.config.channels}, T, H, W]"
            )
        Grid.of(tuple(x.shape[2:]), self.config.patch)
        frames: list[Tensor] = list(run.site("tokens", self.tokenize, x).unbind(1))
        states: list[State] = []
        for cell, hidden in zip(self.encoder, self.config.states, strict=True):
            frames, state = cell(frames, zero_state(frames[0], hidden), self.recomputes)
            states.append(state)
        levels: list[Tensor] = []
        outputs: list[Any] = [None] * x.shape[2]
        for cell, state in zip(self.forecaster, states, strict=True):
            outputs, _ = cell(outputs, state, self.recomputes)
            levels.append(torch.stack(outputs, 1))
        return run.site("head", self.head, torch.cat(levels, 2))

    def tokenize(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, T, C p p, H / p, W / p]."""
        return nn.functional.pixel_unshuffle(x.transpose(1, 2), self.config.patch)

    def head(self, h: Tensor) -> Tensor:
        """Map the states of all layers, [B, T, D, h, w], to frames [B, C, T, H, W]."""
        outputs = self.out(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        return nn.functional.pixel_shuffle(outputs, self.config.patch).transpose(1, 2)


class Cell(nn.Module):
    """One layer (equation 3), with one peephole weight a channel: other sizes than the trained one run too.

    i, f = sigmoid(W_x X + W_h H + w C); C' = f C + i tanh(W_x X + W_h H); o sees C'; H' = o tanh(C').

    Args:
        inputs: channels of X; 0 for a layer that is given nothing.
    """

    def __init__(self, inputs: int, hidden: int, input_kernel: int, state_kernel: int) -> None:
        super().__init__()
        self.input = (
            nn.Conv2d(inputs, 4 * hidden, input_kernel, padding=input_kernel // 2, bias=False)
            if inputs
            else None
        )
        self.state = nn.Conv2d(hidden, 4 * hidden, state_kernel, padding=state_kernel // 2)
        self.peephole = nn.Parameter(torch.zeros(3, hidden, 1, 1))

    def forward(
        self, frames: list[Tensor] | list[Tensor | None], state: State, checkpointing: bool = False
    ) -> tuple[list[Tensor], State]:
        """Hidden states after each of `frames` ([B, inputs, h, w], or None), and the last state."""
        step = partial(checkpoint, self.step, use_reentrant=False) if checkpointing else self.step
        outputs = []
        for frame in frames:
            state = step(frame, *state)
            outputs.append(state[0])
        return outputs, state

    def step(self, x: Tensor | None, h: Tensor, c: Tensor) -> State:
        gates = self.state(h)
        if self.input is not None and x is not None:
            gates = gates + self.input(x)
        i, f, g, o = gates.chunk(4, 1)
        wi, wf, wo = self.peephole
        c = torch.sigmoid(f + wf * c) * c + torch.sigmoid(i + wi * c) * g.tanh()
        return torch.sigmoid(o + wo * c) * c.tanh(), c


def zero_state(frame: Tensor, hidden: int) -> State:
    zero = frame.new_zeros(frame.shape[0], hidden, *frame.shape[2:])
    return zero, zero
