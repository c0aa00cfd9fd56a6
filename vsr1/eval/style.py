"""How the report's page looks: its colours by day and by night, which the figures share, and its type."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --soft: #f3f5f8; --ink: #1f2430; --muted: #5d6879;
  --line: #e4e7ec; --grid: #e6e8ec; --axis: #c9ced6; --sft: #2f6db5; --grpo: #bb5614; --control: #a9b2bf;
  --gain: #21734c; --loss: #b3372f; --bad: #fdeceb; --good: #e4f4ec; --near: #fdf3dc; --near-ink: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1218; --card: #171c25; --soft: #1f2631; --ink: #e7eaf0;
  --muted: #9ca7b8; --line: #2b3340; --grid: #29313d; --axis: #465162; --sft: #6caef3; --grpo: #f2985b;
  --control: #66728a; --gain: #52c391; --loss: #f27c73; --bad: #40221f; --good: #17382a; --near: #3c3014;
  --near-ink: #edc266; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, Ubuntu,
  Cantarell, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 14px; } h3 { font-size: 15px; margin: 22px 0 8px; }
.facts { color: var(--muted); margin: 0 0 28px; } .facts span { margin-right: 20px; white-space: nowrap; }
.facts b, .note b, figcaption b, article header b { color: var(--ink); font-weight: 600; }
nav { font-size: 14px; margin: -18px 0 22px; } nav a { margin-right: 16px; white-space: nowrap; }
a { color: var(--sft); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 24px 28px;
  margin: 0 0 20px; }
.note, figcaption { color: var(--muted); font-size: 14px; margin: 12px 0 0; max-width: 84ch; }
h2 + .note { margin: 0 0 16px; }
figure { margin: 0; } section > figure + figure, .pair + figure { margin-top: 32px; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 36px; } .pair h3 { margin-top: 0; }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 20px; }
.tile h3 { margin: 0; font-size: 13px; color: var(--muted); font-weight: 600; }
.tile p { margin: 4px 0 0; font-size: 13px; line-height: 1.35; color: var(--muted); }
.big { font-size: 36px; font-weight: 650; line-height: 1.25; letter-spacing: -.02em; }
.big small { font-size: 18px; font-weight: 500; color: var(--muted); margin-left: 2px; }
.interval { color: var(--muted); font-size: .8em; white-space: nowrap; } .none, .arrow { color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody th { font-weight: 400; } th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: 13px; }
tr.group th { font-weight: 600; padding-top: 18px; }
.paper th, .paper td { padding: 5px 9px; vertical-align: top; border-bottom: 0; }
.paper .interval { display: block; font-size: 11px; line-height: 1.2; }
.paper th:first-child { padding-left: 0; }
.paper thead tr:first-child th { text-align: center; padding-bottom: 0; }
.paper thead tr:last-child th { border-bottom: 1px solid var(--axis); }
.paper tbody tr.ours:not(:first-child) > * { border-top: 1px solid var(--line); }
.paper tr.ours th { font-weight: 600; }
.paper tr.published > *, .paper tr.points > * { padding-top: 0; font-size: 13px; color: var(--muted); }
.paper tr.published th, .paper tr.points th { padding-left: 14px; }
.paper .above { color: var(--gain); } .paper .below { color: var(--loss); }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--sft); font-size: 14px; }
pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--soft); border-radius: 8px; padding: 10px 14px; margin: 10px 0 0; }
pre b { font-weight: 600; color: var(--sft); }
.broken { background: var(--bad); color: var(--loss); padding: 10px 14px; border-radius: 8px; margin: 0; }
.warning { background: var(--near); color: var(--near-ink); padding: 8px 14px; border-radius: 8px; font-size: 14px; }
.shares { display: flex; gap: 2px; height: 12px; border-radius: 6px; overflow: hidden; margin: 0 0 14px; }
.shares i { min-width: 3px; } .failure { background: var(--loss); } .near { background: var(--near-ink); }
.success { background: var(--gain); } .shares .failure:nth-of-type(even) { opacity: .72; }
.gallery > input { position: absolute; opacity: 0; pointer-events: none; }
.gallery > label { display: inline-block; font-size: 13px; padding: 3px 12px; margin: 0 6px 8px 0; cursor: pointer;
  border: 1px solid var(--axis); border-radius: 99px; color: var(--muted); }
.gallery > label b { color: var(--ink); font-weight: 600; }
.gallery > input:checked + label { background: var(--ink); border-color: var(--ink); color: var(--card); }
.gallery > input:checked + label b { color: var(--card); }
.gallery > input:focus-visible + label { outline: 2px solid var(--sft); outline-offset: 2px; }
article { border-top: 1px solid var(--line); padding: 22px 0 8px; margin-top: 8px; }
article header h3 { font-size: 18px; line-height: 1.35; margin: 8px 0 2px; overflow-wrap: anywhere; }
article header p { margin: 0; font-size: 14px; color: var(--muted); overflow-wrap: anywhere; }
.kind { font-size: 12px; font-weight: 600; padding: 2px 10px; border-radius: 99px; }
.kind.failure { background: var(--bad); color: var(--loss); } .kind.success { background: var(--good);
  color: var(--gain); } .kind.near { background: var(--near); color: var(--near-ink); }
.turn { display: grid; grid-template-columns: 200px minmax(0, 1fr); gap: 20px; margin: 18px 0; font-size: 14px; }
.turn p { margin: 0 0 6px; overflow-wrap: anywhere; } .answer { font-weight: 600; } .yes { color: var(--gain); }
.no { color: var(--loss); }
.turn dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 6px 0; font-size: 13px; }
.turn dt { color: var(--muted); } .turn dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.meter { grid-column: 1 / 3; height: 4px; border-radius: 2px; background: var(--line); margin: 1px 0 4px; }
.meter i { display: block; height: 4px; border-radius: 2px; background: var(--sft); }
.strip { display: grid; grid-template-columns: repeat(6, 1fr); gap: 6px; }
.strip img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--soft); }
.strip img.small { image-rendering: pixelated; }
.strip figcaption { font-size: 11px; margin: 1px 0 0; text-align: center; }
.strip .in { display: flex; flex-direction: column; gap: 1px; height: 7px; margin-top: 2px; }
.strip .in i { height: 3px; border-radius: 1px; } .strip .in .true { background: var(--gain); }
.strip .in .said { background: var(--grpo); order: 2; }
.line { display: block; width: 100%; height: 40px; margin-top: 8px; overflow: visible; }
.line text { font-size: 11px; fill: var(--muted); } .line .axis { stroke: var(--axis); } .line .true { fill: var(--gain); }
.line .said { fill: var(--grpo); } .line .frame { fill: var(--muted); }
i.true, i.said { font-style: normal; font-weight: 600; } p i.true { color: var(--gain); } p i.said { color: var(--grpo); }
@media (max-width: 760px) { main { padding: 24px 12px; } section { padding: 18px 16px; } .pair { grid-template-columns:
  1fr; } .tiles { grid-template-columns: 1fr 1fr; } .turn { grid-template-columns: minmax(0, 1fr); } }
@media print { section { break-inside: avoid-page; border: 0; } .gallery > label { display: none; } }
"""
