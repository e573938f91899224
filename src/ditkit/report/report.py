"""The result of a comparison: rows, what they depend on, and the files that show it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ditkit.bench.rows import (
    DEFINITIONS,
    NOTHING,
    Row,
    caption,
    converged_caption,
    decibels,
    headline,
    megabytes,
    to_exact,
)
from ditkit.core.checkpoint import json_bytes, replacing, to_disk
from ditkit.core.task import Task
from ditkit.report.html import page
from ditkit.report.legend import with_legend
from ditkit.report.sheet import MARGIN, png, sheet
from ditkit.report.strips import chosen, side_by_side

if TYPE_CHECKING:
    from PIL import Image

    from ditkit.core.terminal import Table

WEIGHTS = "weights\nMB"
COST = ("time\ns", "speed\n-up", "\nMACs", "peak\nMB")
TO_EXACT, MOTION, TO_CONVERGED, CONTROL = "to\nexact", "\nmotion", "to con-\nverged", "same\nMACs"
SHOWN = 16  # columns of pictures, beyond which a sheet is no longer looked at
CLIPS_SHOWN, FRAMES_SHOWN = 2, 14  # clips, and frames of all of them together


@dataclass(frozen=True)
class Report:
    """A comparison, the exact sampler first.

    Args:
        settings: all that the numbers depend on, as JSON.
        pictures: uint8 [n, 1 or 3, H, W], of clips [n, T, 1 or 3, H, W], for each row's name, then for
            "converged", the run of many steps.
        generated: bool [n, 1, T, H, W], false where content was given; None where nothing was.
    """

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    pictures: Mapping[str, Tensor]
    task: Task
    generated: Tensor | None = None

    def __str__(self) -> str:
        return str(self.table())

    @property
    def headline(self) -> str:
        """The result in one or two sentences."""
        return headline(self.rows, self.task.noun)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without infinities: a PSNR of identical samples is None."""
        rows = [row.as_dict() for row in self.rows]
        used = {key: text for key, text in DEFINITIONS.items() if any(key in row for row in rows)}
        return {"headline": self.headline, "rows": rows, "settings": dict(self.settings), "definitions": used}

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.html (one file, nothing fetched) and sheet.png; all of them or none.

        Raises:
            ConfigError: the folder cannot be written; an earlier file stays as it was.
        """
        folder = Path(folder)
        paths = [folder / name for name in ("report.json", "report.html", "sheet.png")]
        captions, heads, shown = self.captions(), self.heads(), self.shown()
        html = page(
            self.rows, self.settings, self.headline, self.task, pictures=shown, captions=captions, heads=heads
        )
        picture = png(self._sheet(shown, captions, heads))
        contents = [json_bytes(self.as_dict()), html.encode(), picture]
        with ExitStack() as stack:  # none takes its place before all are on the disk
            for path, content in zip(paths, contents, strict=True):
                draft = stack.enter_context(replacing(path))
                draft.write_bytes(content)
                to_disk(draft)
        return paths

    def captions(self) -> dict[str, list[str]]:
        """Lines beside each row of pictures."""
        lines = {row.name: caption(row) for row in self.rows}
        return lines | {"converged": converged_caption(self.settings["converged_steps"])}

    def heads(self) -> list[str]:
        """Return the head of each column, one for each seed that is shown."""
        frames, seeds = self._frames(), self.settings["seeds"]
        labels = self.settings["labels"] or self.settings.get("prompts") or [""] * len(seeds)
        if frames and len(set(labels)) == 1:  # most models of clips have one class, which has no name
            labels = [""] * len(seeds)
        heads = [f"{seed} {label}".strip() for seed, label in zip(seeds, labels, strict=True)]
        if not frames:
            return heads[:SHOWN]
        return [f"seed {head}, frames {' '.join(map(str, frames))}" for head in heads[:CLIPS_SHOWN]]

    def shown(self) -> Mapping[str, Tensor]:
        """Pick the pictures under each head: uint8 [n, 1 or 3, H, W]; of clips the chosen frames in a line."""
        frames, first = self._frames(), slice(CLIPS_SHOWN)
        if not frames:
            return self.pictures
        generated = None if self.generated is None else self.generated[first]
        return {name: side_by_side(clips[first], frames, generated) for name, clips in self.pictures.items()}

    def table(self) -> Table:
        """For a terminal of 80 columns."""
        from rich import box

        from ditkit.core.terminal import Table

        count = len(self.settings["seeds"])
        table = Table(
            title=f"{count} samples in {self.settings['steps']} steps; distances are PSNR in dB",
            caption="\n".join(
                [self.headline, *(f"No row: {why}" for why in self.settings.get("left_out", ()))]
            ),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("method", max_width=18)
        motion = [MOTION] if self._frames() else []
        rivals = any(row.kind == "rival" for row in self.rows)
        for head in [
            *([WEIGHTS] if rivals else []),
            *COST,
            TO_EXACT,
            *motion,
            CONTROL,
            TO_CONVERGED,
            CONTROL,
        ]:
            table.add_column(head, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row, rivals))
        return table

    def _frames(self) -> list[int]:
        """Choose the frames of a clip that are shown; none of a picture."""
        clips = self.pictures[self.rows[0].name]
        if not self.task.has_frames:
            return []
        return chosen(clips.shape[1], FRAMES_SHOWN // min(CLIPS_SHOWN, len(clips)))

    def _sheet(
        self, shown: Mapping[str, Tensor], captions: Mapping[str, list[str]], heads: list[str]
    ) -> Image.Image:
        if not self._frames():
            return sheet(shown, captions, heads)
        height, width = shown[self.rows[0].name].shape[-2:]
        page = sheet(shown, captions, heads, (width, height), MARGIN)
        return with_legend(page, self.generated is not None)


def _cells(row: Row, rivals: bool = False) -> list[str]:
    control = row.control_steps is not None
    motion = [] if row.clip is None else [decibels(row.temporal_psnr_db)]
    return [
        row.name,
        *([megabytes(row.weight_bytes)] if rivals else []),
        f"{row.seconds:.2f}",
        f"{row.speedup:.2f}x",
        f"{row.macs_ratio:.1%}" if row.macs_ratio < 1 else "100%",
        megabytes(row.peak_bytes),
        to_exact(row, row.psnr_db),
        *motion,
        decibels(row.control_psnr_db, row.control_identical) if control else NOTHING,
        decibels(row.psnr_converged_db),
        decibels(row.control_psnr_converged_db) if control else NOTHING,
    ]
