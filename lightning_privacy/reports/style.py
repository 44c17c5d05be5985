"""How the report looks: one column on a phone, two on a desk, light or dark as the reader likes."""

from __future__ import annotations

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f5f6fa; --ink: #1b1d26; --soft: #565b6e; --line: #d4d7e2;
  --accent: #3446a8; --tag-ink: #7a3b00; --tag: #fdeccd; --warning: #a3161b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14151c; --card: #1e202a; --ink: #e8e9f0; --soft: #a9adbd; --line: #383b49;
    --accent: #9fb0ff; --tag-ink: #ffd9a0; --tag: #4a3413; --warning: #ff9a94;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.75rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .5rem 0; }
ul { margin: .5rem 0; padding-left: 1.25rem; }
li { margin: .25rem 0; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.5rem; }
footer { color: var(--soft); border-top: 1px solid var(--line); margin-top: 2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem;
  margin: 0 0 1rem; }
.cards div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.cards dt { color: var(--soft); font-size: .875rem; }
.cards dd { margin: 0; font-size: 1.375rem; font-weight: 600; }
.columns { display: grid; gap: 0 2rem; }
.columns h3 { margin-top: .25rem; }
.tag { background: var(--tag); color: var(--tag-ink); border-radius: .25rem; padding: .1rem .4rem;
  font-size: .8125rem; font-weight: 600; white-space: nowrap; }
.warning { color: var(--warning); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0;
  border-bottom: 1px solid var(--line); }
.facts th { width: 16rem; font-weight: 500; color: var(--soft); }
.facts td { overflow-wrap: anywhere; }
.grid-table { font-variant-numeric: tabular-nums; }
.grid-table th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); }
details { margin-top: .75rem; }
summary { cursor: pointer; color: var(--accent); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem; margin-top: 1rem; }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .75rem; }
figcaption { font-weight: 600; font-size: .9375rem; margin-bottom: .25rem; }
svg { display: block; width: 100%; max-width: 32rem; height: auto; margin: 0 auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg text.strong { fill: var(--ink); font-weight: 600; }
.curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.dot, .mark { fill: var(--accent); }
.mark { stroke: var(--card); stroke-width: 2; }
.grid { fill: none; stroke: var(--line); stroke-width: 1; }
.axis { fill: none; stroke: var(--soft); stroke-width: 1; }
@media (min-width: 44rem) { .columns { grid-template-columns: 1fr 1.4fr; } }
@media (max-width: 40rem) {
  .facts th, .facts td { display: block; width: auto; }
  .facts th { border-bottom: 0; padding-bottom: 0; }
  .facts td { padding-top: 0; }
  .grid-table thead { position: absolute; clip-path: inset(50%); }
  .grid-table tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .grid-table td { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: .1rem 0; text-align: right; overflow-wrap: anywhere; }
  .grid-table td::before { content: attr(data-column); color: var(--soft); text-align: left; }
}
@media print { section { break-inside: avoid; } body { max-width: none; } }
"""
