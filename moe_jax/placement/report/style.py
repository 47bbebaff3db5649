"""The style sheet. Colours follow the reader's light or dark setting.

Warm and cool, and the three phases, are pairs that people with any common colour vision tell apart
(after Okabe and Ito, "Color Universal Design"), and differ in lightness as well.
"""

from moe_jax.placement.report.markup import raw

STYLE = raw("""
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --text: #1b1c1e;
  --soft: #565a60; --line: #d6d7d3; --hot: #b34700; --cool: #0060a8; --compute: #0072b2;
  --exchange: #e69f00; --waiting: #8b8f96; --good: #00664b; --bad: #a83200; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --text: #e9e9e7;
  --soft: #a9adb3; --line: #3b3e43; --hot: #ff9d4d; --cool: #6fbcff; --compute: #4aa3e0;
  --exchange: #f2c14e; --waiting: #7d828a; --good: #4fd1a5; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
main { margin: 0 auto; padding: 12px; max-width: 1060px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 8px; margin: 14px 0; }
p { margin: .4rem 0; max-width: 78ch; }
.soft, figcaption, dt { color: var(--soft); font-size: .9rem; }
.answer { border-left: 5px solid var(--soft); background: var(--card); padding: .5rem .9rem;
  margin: 1rem 0; }
.answer.good { border-color: var(--good); } .answer.bad { border-color: var(--bad); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 12px 28px; }
figure { margin: .6rem 0 0; max-width: 480px; min-width: 0; }
figcaption { margin-bottom: .3rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--text); }
.hot { fill: var(--hot); }
.dot { fill: rgb(37 110 190); } .blank { fill: transparent; } .cool { fill: var(--cool); }
.frame { fill: none; stroke: var(--text); stroke-width: 1.6; }
.edge { fill: none; stroke: var(--line); }
.grid { stroke: var(--line); stroke-width: .7; } .fine { stroke: var(--line); stroke-width: .25; }
.compute { fill: var(--compute); background: var(--compute); }
.exchange { fill: var(--exchange); background: var(--exchange); }
.waiting { fill: var(--waiting); background: var(--waiting); }
polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
polyline.objective { stroke: var(--compute); } rect.objective { fill: var(--compute); }
polyline.bound { stroke: var(--hot); stroke-dasharray: 6 4; }
rect.other { fill: var(--waiting); }
.dots { image-rendering: pixelated; }
@media (prefers-color-scheme: dark) { .dots, .dot { filter: brightness(1.7); } }
.scale { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 14px; margin: .6rem 0 0;
  padding: 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
.scale svg { vertical-align: -2px; }
.key { display: inline-block; width: 18px; height: 11px; }
.key.objective { height: 0; border-top: 3px solid var(--compute); vertical-align: 4px; }
.key.bound { height: 0; border-top: 3px dashed var(--hot); vertical-align: 4px; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--soft); padding: 6px 0; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding: .3rem 0; }
th, td { padding: .25rem .55rem; text-align: right; border-top: 1px solid var(--line);
  font-weight: 400; white-space: nowrap; }
thead th { border-top: 0; font-weight: 600; }
tbody th, th:first-child { text-align: left; }
#figures table { width: 100%; font-size: .95rem; }
#figures th { white-space: normal; }
@media (max-width: 560px) { #figures table, #figures tbody, #figures thead { display: block; }
  #figures tr { display: grid; grid-template-columns: 1fr 1fr 1.2fr;
    border-top: 1px solid var(--line); }
  #figures th:first-child { grid-column: 1 / -1; padding-bottom: 0; }
  #figures th, #figures td { border: 0; padding: .2rem .3rem; } #figures br { display: none; }
  #figures td .soft { display: block; font-size: .8rem; } #figures th .soft { margin-left: .4rem; }
}
dl { margin: 0; } dd { margin: 0 0 .5rem; } code { font-size: .9em; }
@media print { section { break-inside: avoid; } }
""")
