"""The report's style sheet, by day and by night, on a desk and on a telephone."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT = {
    "ink": "#1b1f24",
    "pale": "#5b6573",
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "edge": "#d9dde3",
    "control": "#6b7280",
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#cc79a7",
    "c4": "#b58900",
    "c5": "#56b4e9",
}
"""The page's colours by day; in CSS each is a variable, `--ink` and so on.

Series have those of Okabe and Ito (2008), which readers of every colour vision tell apart; its yellow is darker here.
"""
DARK = {
    "ink": "#e8eaed",
    "pale": "#a2abb8",
    "paper": "#14171b",
    "panel": "#1c2026",
    "edge": "#363c45",
    "control": "#9aa4b2",
    "c0": "#4c9fd4",
    "c1": "#ff8a3d",
    "c2": "#2fc79f",
    "c3": "#e6a8cb",
    "c4": "#e6c229",
    "c5": "#8fd0f5",
}


def variables(colours: Mapping[str, str]) -> str:
    """As declarations of CSS."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 17px; font-weight: 600; color: var(--pale); margin: 0 0 8px; }
h2 { font-size: 19px; margin: 36px 0 10px; }
section p { max-width: 75ch; }
.headline {
  font-size: clamp(20px, 2.4vw, 27px); line-height: 1.3; font-weight: 600; margin: 0 0 10px;
  max-width: 46em; text-wrap: pretty;
}
.context { margin: 0; font-size: 14px; }
.context, small, .head, .caption span { color: var(--pale); }
.scroll { overflow-x: auto; }

.grid {
  display: grid; gap: 6px; align-items: center; width: max-content;
  grid-template-columns: 236px repeat(var(--n), clamp(64px, calc(944px / var(--n) - 6px), 128px));
}
.grid img {
  width: 100%; display: block; image-rendering: pixelated; border-radius: 4px; background: var(--panel);
}
.grid.films { width: 100%; grid-template-columns: 236px repeat(var(--n), minmax(calc(840px / var(--n)), 1fr)); }
.grid.films img { width: auto; max-width: 100%; image-rendering: auto; }
.head { font-size: 11px; line-height: 1.25; align-self: end; overflow-wrap: anywhere; }
.corner, .caption { position: sticky; left: 0; z-index: 1; background: var(--paper); align-self: stretch; }
.caption {
  font-size: 13px; line-height: 1.35; padding-right: 10px; font-variant-numeric: tabular-nums;
  display: flex; flex-direction: column; justify-content: center;
}

.panels {
  display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
}
svg {
  width: 100%; height: auto; background: var(--panel); border-radius: 8px;
  font-size: 12.5px; fill: var(--ink);
}
svg .title { font-size: 15px; font-weight: 600; }
svg .unit, svg .tick { fill: var(--pale); font-size: 12px; }
svg .tag { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; stroke-linejoin: round; }
svg .rule { stroke: var(--edge); }
svg .leader { stroke: var(--pale); stroke-width: .8; }
svg .series { fill: none; stroke: var(--c); stroke-width: 1.5; opacity: .55; }
svg .stem { stroke: var(--control); stroke-dasharray: 2 3; }
svg .filled { fill: var(--c); stroke: var(--panel); stroke-width: 1.5; }
svg .hollow { fill: var(--panel); stroke: var(--c); stroke-width: 2; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 10px 0 0; padding: 0;
  font-size: 14px;
}
.legend svg { width: 34px; height: 14px; margin-right: 7px; background: none; vertical-align: -2px; }

table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--edge); }
thead th { font-weight: 600; vertical-align: bottom; }
thead small { display: block; font-weight: 400; }
thead th.group { text-align: left; color: var(--pale); font-weight: 400; white-space: normal; }
th.group, .first { border-left: 1px solid var(--edge); }
tbody th, thead tr:first-child th:first-child {
  text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--paper);
  white-space: normal; min-width: 150px; max-width: 190px;
}
tr.exact, tr.exact th { background: var(--panel); font-weight: 600; }
tr.control { color: var(--pale); }

details { margin-top: 14px; border-top: 1px solid var(--edge); padding-top: 12px; font-size: 14px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: 12.5px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; }
dt { font-weight: 600; }
dd { margin: 0; }

@media (max-width: 560px) {
  main { padding: 18px 14px 40px; }
  .grid { grid-template-columns: 132px repeat(var(--n), 72px); }
  .grid.films { grid-template-columns: 132px repeat(var(--n), calc(840px / var(--n))); }
  .caption { font-size: 12px; }
  .panels { display: block; overflow-x: auto; }
  .panels svg { min-width: 540px; }
  tbody th, thead tr:first-child th:first-child { min-width: 118px; max-width: 118px; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 8px; }
}
"""
)
