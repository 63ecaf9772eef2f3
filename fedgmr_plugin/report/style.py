"""The page's style sheet. Series colours are those of Okabe and Ito, without their yellow."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2329; --muted: #5d6874; --rule: #d9dee3; --grid: #e9ecef; --soft: #f5f7f8;
  --accent: #0b5c8f; --faded: #c9d0d6;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #e69f00; --s5: #56b4e9; --s6: #3c4650;
  --t0: #00659e; --t1: #b04e00; --t2: #007a59; --t3: #a24f7d; --t4: #8f6300; --t5: #1f77ab; --t6: #3c4650;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --ink: #e3e8ec; --muted: #9aa6b1; --rule: #333c45; --grid: #262d34; --soft: #1b2127;
    --accent: #6db8ea; --faded: #46515c;
    --s0: #3d9ede; --s1: #f07a1f; --s2: #1fb88c; --s3: #dc93bb; --s4: #e6a91e; --s5: #7cc7f2; --s6: #c3ccd4;
    --t0: #62b2e8; --t1: #f5924a; --t2: #3cc9a0; --t3: #e2a5c6; --t4: #e6b23c; --t5: #8fd0f5; --t6: #c3ccd4;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans",
    "Liberation Sans", Arial, sans-serif;
}
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 44px; }
h1 { font-size: 28px; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; margin: 0 0 6px; }
h2 {
  font-size: 19px; font-weight: 650; margin: 52px 0 14px; padding-top: 18px;
  border-top: 1px solid var(--rule);
}
h3 { font-size: 15px; font-weight: 650; margin: 0; }
h1, h2, h3, th, td, .legend, summary { overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 78ch; }
header p, figcaption p, .quiet, caption { color: var(--muted); }
header p { font-size: 16px; margin: 0; }
.quiet { font-size: 13.5px; margin: 0 0 4px; max-width: 100ch; }
.lede { font-size: 17px; margin: 0 0 22px; max-width: 84ch; }
.grid {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr)); gap: 34px 44px;
}
figure { margin: 0; min-width: 0; break-inside: avoid; display: flex; flex-direction: column; }
figcaption p { font-size: 13.5px; line-height: 1.45; margin: 2px 0 8px; max-width: 64ch; }
.plot { overflow-x: auto; margin-top: auto; }
.chart { display: block; width: 100%; min-width: 430px; max-width: 620px; height: auto; }
.chart text { font-size: 12.5px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.chart .label { fill: var(--ink); }
.chart .end {
  font-weight: 500; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round;
}
.chart .rule { stroke: var(--grid); }
.chart .base, .chart .tick { stroke: var(--muted); }
.chart .mark { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 1 3; opacity: 0.75; }
.chart .leader { fill: none; stroke: var(--rule); }
.chart .note { fill: transparent; }
.chart .context { stroke: var(--faded); stroke-width: 1.1; }
.l { fill: none; stroke-linejoin: round; }
.b { fill-opacity: 0.15; }
.p { stroke: var(--paper); stroke-width: 1; }
.raster .row { fill: transparent; }
.raster .lane { stroke: var(--grid); }
.raster .cut { stroke: var(--muted); }
.panels {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 18px 30px;
}
.panels .panel { display: flex; flex-direction: column; min-width: 0; break-inside: avoid; }
.panels .chart { min-width: 0; }
.panels h4 { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
section > figure + figure, .grid + figure, .grid + .grid, figure + details, .grid + details {
  margin-top: 34px;
}
.dots .lane { stroke: var(--grid); }
.dots .span { stroke-width: 1.6; }
.dots .seed { stroke-width: 1.4; opacity: 0.75; }
.empty {
  padding: 40px 0; color: var(--muted); border: 1px dashed var(--rule); text-align: center;
  max-width: none;
}
.legend {
  list-style: none; margin: 0 0 6px; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 20px;
  font-size: 13.5px;
}
.legend li { display: flex; align-items: center; gap: 8px; }
.swatch { flex: none; vertical-align: -1px; }
th .swatch { margin-right: 10px; }
.table { overflow-x: auto; margin: 0 0 18px; }
table {
  border-collapse: collapse; min-width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums lining-nums;
}
table.narrow { min-width: min(100%, 420px); }
caption { text-align: left; font-size: 13.5px; padding: 0 0 8px; }
th, td {
  padding: 7px 14px; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--rule);
}
th:first-child, td:first-child { padding-left: 2px; }
th:last-child, td:last-child { padding-right: 2px; }
thead th {
  font-weight: 600; vertical-align: bottom; line-height: 1.3; border-bottom-color: var(--muted);
  overflow-wrap: normal;
}
tbody th { font-weight: 500; min-width: 11em; }
thead small { display: block; font-size: 12px; font-weight: 400; color: var(--muted); }
.word { white-space: nowrap; }
.n { text-align: right; white-space: nowrap; min-width: 0; }
tbody th.n { min-width: 4em; }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: 12.5px;
}
pre {
  background: var(--soft); padding: 16px 18px; overflow-x: auto; border-radius: 6px; line-height: 1.5;
  margin: 0;
}
.badge {
  font-size: 12px; color: var(--muted); border: 1px solid var(--rule); border-radius: 9px;
  padding: 1px 8px; white-space: nowrap;
}
details { margin: 0 0 2px; }
.quiet + details, .quiet + div, .quiet + .table { margin-top: 22px; }
summary { cursor: pointer; padding: 4px 0; color: var(--accent); }
details .table { margin-top: 8px; }
section:first-child h2 { margin-top: 30px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
footer { margin-top: 56px; padding-top: 16px; padding-bottom: 40px; color: var(--muted); font-size: 13px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 26px; }
  h1 { font-size: 23px; }
  h2 { margin-top: 38px; }
  th, td { padding: 6px 9px; }
  .chart { min-width: 0; }
  .chart text { font-size: 15px; }
  .panels .chart text { font-size: 12px; }
  .chart .end, .chart .leader { display: none; }
}
@media print {
  :root {
    --paper: #ffffff; --ink: #000000; --muted: #444444; --rule: #bbbbbb; --grid: #e4e4e4;
    --soft: #ffffff; --accent: #000000; --faded: #c4c4c4;
    --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #e69f00; --s5: #56b4e9; --s6: #3c4650;
    --t0: #00659e; --t1: #b04e00; --t2: #007a59; --t3: #a24f7d; --t4: #8f6300; --t5: #1f77ab; --t6: #3c4650;
  }
  body { font-size: 10pt; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  h2 { break-after: avoid; margin-top: 24pt; }
  .grid { grid-template-columns: 1fr 1fr; gap: 16pt; }
  .panels { grid-template-columns: 1fr 1fr 1fr; gap: 10pt; }
  .chart { min-width: 0; }
  figcaption p, .legend, .quiet, caption { font-size: 8pt; line-height: 1.35; }
  .table, .plot, pre { overflow: visible; }
  th, td { padding: 3pt 5pt; font-size: 8.5pt; }
  tr { break-inside: avoid; }
  pre { white-space: pre-wrap; padding: 0; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def _series_rules() -> str:
    """One rule for strokes, fills and label texts of each series colour."""
    return "".join(
        f".l.s{i},.f.s{i}{{stroke:var(--s{i})}}.f.s{i},.p.s{i},.b.s{i}{{fill:var(--s{i})}}"
        f".chart .t{i}{{fill:var(--t{i})}}"
        for i in range(7)
    )


STYLE += _series_rules() + "\n"
