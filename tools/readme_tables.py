"""Fill the README's tables from benchmarks/results/*.json, so that no figure is typed by hand.

python tools/readme_tables.py            # rewrite README.md
python tools/readme_tables.py --check    # exit 1 if it would change
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "demo": {
        "name": "method",
        "seconds": "seconds",
        "speedup": "speed-up",
        "macs_ratio": "MACs",
        "psnr_db": "PSNR dB",
        "control_psnr_db": "control dB",
        "psnr_converged_db": "converged dB",
        "control_psnr_converged_db": "control, converged dB",
    },
    "race_caching": {
        "library": "by",
        "contestant": "28 steps",
        "speedup": "speed-up",
        "fewer_macs": "times fewer MACs",
        "exact_db": "PSNR dB",
        "control_exact_db": "control dB",
        "converged_db": "converged dB",
        "held_bytes": "bytes held",
        "set_up_lines": "lines",
    },
    "digits_compare": {
        "name": "method",
        "speedup": "speed-up",
        "macs_ratio": "MACs",
        "psnr_db": "PSNR dB",
        "temporal_psnr_db": "motion dB",
        "control_psnr_db": "control dB",
    },
    "attention_error": {
        "pattern": "pattern",
        "attention_share": "attention",
        "macs_share": "MACs",
        "psnr_db": "PSNR dB",
        "tuned_psnr_db": "tuned",
        "random_psnr_db": "random blocks",
        "diagonal_psnr_db": "diagonal",
        "best_psnr_db": "best blocks",
        "reuse_psnr_db": "reuse",
        "fewer_steps_psnr_db": "fewer steps",
    },
    "block_sparse_attention": {
        "type": "type",
        "block": "block",
        "density": "density",
        "speedup": "forward, times dense",
        "flex_speedup": "FlexAttention",
        "backward_speedup": "backward",
        "deviation": "deviation",
    },
    "forecasting": {
        "forecast": "forecast",
        "parameters": "parameters",
        "training_seconds": "training s",
        "mse": "MSE",
        "mae": "MAE",
        "psnr_db": "PSNR dB",
        "ssim": "SSIM",
        "clips_per_second": "clips/s",
    },
    "video": {
        "network": "network",
        "mask": "mask",
        "made_by": "made by",
        "guidance": "guidance",
        "psnr_db": "PSNR dB",
        "ssim": "SSIM",
    },
    "video_masks": {
        "made_by": "made by",
        "steps": "steps",
        "predict_psnr_db": "prediction dB",
        "interpolate_psnr_db": "interpolation dB",
        "after_bounce_px": "wrong after a bounce, px",
        "frechet": "Frechet",
    },
    "layouts": {
        "network": "network",
        "layout": "layout",
        "parameters": "parameters",
        "mse": "MSE",
        "mse_deviation": "of seeds",
    },
    "fields": {
        "data": "data",
        "forecast": "forecast",
        "observed": "seen",
        "horizon": "said",
        "windows": "windows",
        "mae": "MAE",
        "mse": "MSE",
    },
    "skipped_step": {
        "batch": "batch",
        "interval": "interval",
        "skipped_share": "skipped / dense step",
        "skipped_share_at_best": "at best",
        "recording_share": "recording adds",
        "macs_ratio": "MACs ratio",
        "speedup": "speed-up",
        "share_of_macs_ratio": "share of ratio",
    },
    "taylorseer_orders": {
        "solver": "solver",
        "interval": "interval",
        "full": "full steps",
        "mse_O0": "O=0",
        "mse_O1": "O=1",
        "mse_O2": "O=2",
        "mse_O3": "O=3",
        "mse_fewer_steps": "fewer exact steps",
    },
}
"""For each table, the keys of its rows and their headings."""
SHOWN = {
    "race_caching": lambda row: row["steps"] == 28 and not row["neutral"] and row["fewer_macs"] > 1.3,
}
"""Of a long table, the rows that are shown."""


def filled(text: str) -> str:
    """The README with every table made from its results."""
    return re.sub(
        r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", lambda m: m[1] + table(m[2]) + m[3], text, flags=re.S
    )


def table(name: str) -> str:
    """A Markdown table of benchmarks/results/`name`.json, with its origin under it."""
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf8"))
    origin = result.get("settings", result)
    columns = COLUMNS[name]
    rows = [row for row in result["rows"] if set(columns) <= set(row) and SHOWN.get(name, bool)(row)]
    lines = [_line(list(columns.values())), _line(["---:"] * len(columns))]
    lines += [_line([_cell(row[key]) for key in columns]) for row in rows]
    versions = ", ".join(f"{k} {v}" for k, v in origin["versions"].items())
    lines += [
        "",
        f"*{origin['date'][:10]}, {origin['device']}, {origin['threads']} threads, {versions}; `{origin['command']}`*",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.2f}"
    return str(value)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    if "--check" in sys.argv[1:]:
        sys.exit(
            0
            if filled(text) == text
            else "README.md: its tables are not those of benchmarks/results; run this tool"
        )
    readme.write_text(filled(text), encoding="utf8")


if __name__ == "__main__":
    main()
