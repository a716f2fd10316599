"""A page that plays the frames of a denoising (see `live_view.py`).

It is one file: styles, script and frames are inside, and it asks the network for nothing.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

from pipelines.live_view import KINDS, Frame, counts


def write_page(path: Path, samples: Sequence[Sequence[Frame]], title: str, settings: str) -> None:
    """Write a self-contained page that steps through and plays each sample's frames.

    Args:
        samples: one list of frames per text, all of one length.
        title, settings: shown at its head.
    """
    data = [[[f.title, f.pieces, f.kinds, f.heat, counts(f)] for f in frames] for frames in samples]
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = Template(_PAGE).substitute(
        title=html.escape(title), settings=html.escape(settings), data=packed,
        legend="".join(f'<span class="{k}">{name}</span>' for k, (name, _) in KINDS.items()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --back: #fbfaf8; --ink: #24211d; --faint: #8b857c; --line: #ded9d0; --p: #1f6f8b; --m: #c9c3b8; --n: #1a7f37;
  --r: #c02626; --heat: 235, 140, 40; }
@media (prefers-color-scheme: dark) { :root { --back: #17181b; --ink: #e6e3dd; --faint: #8d8a84; --line: #34363b;
  --p: #62b6d4; --m: #4b4d53; --n: #56c271; --r: #f26d6d; --heat: 215, 105, 20; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0; }
.faint { color: var(--faint); font-size: .875rem; }
#text { font: 1.05rem/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .5rem; padding: 1rem 1.25rem; margin: .75rem 0;
  min-height: 12rem; }
#text span { border-radius: .15rem; transition: color .15s, background-color .15s; }
.p { color: var(--p); } .m { color: var(--m); } .n { color: var(--n); font-weight: 700; }
.r { color: var(--r); text-decoration: line-through; }
.row { display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: center; margin: .75rem 0; }
.legend { gap: .25rem 1.25rem; font-size: .875rem; }
button, select { font: inherit; color: inherit; background: transparent; border: 1px solid var(--line);
  border-radius: .375rem; padding: .2rem .7rem; cursor: pointer; min-width: 2.5rem; }
select { background: var(--back); }
button:hover, select:hover { border-color: var(--faint); }
input[type=range] { flex: 1; min-width: 10rem; accent-color: var(--p); }
.scale { display: inline-block; width: 6rem; height: .8rem; border-radius: .2rem; vertical-align: -1px; margin: 0 .4rem;
  background: linear-gradient(to right, rgba(var(--heat), 0), rgba(var(--heat), .9)); border: 1px solid var(--line); }
#title { font-weight: 600; min-width: 11rem; font-variant-numeric: tabular-nums; }
</style>
<h1>$title</h1>
<div class="faint">$settings</div>
<div class="row">
  <label class="faint">sample <select id="sample"></select></label>
  <button id="first" aria-label="first frame">&#171;</button><button id="back" aria-label="one back">&#8249;</button>
  <button id="play">play</button>
  <button id="next" aria-label="one on">&#8250;</button><button id="last" aria-label="last frame">&#187;</button>
  <input id="at" type="range" min="0" value="0" aria-label="frame">
  <label class="faint">speed <select id="speed"><option value="1600">slow</option>
    <option value="800" selected>normal</option><option value="300">fast</option></select></label>
</div>
<div class="row"><span id="title"></span><span id="counts" class="faint"></span></div>
<div class="row legend">$legend
  <label id="scale"><input id="heat" type="checkbox" checked> P(wrong) 0<i class="scale"></i>100 %</label></div>
<div id="text"></div>
<div class="faint">Left and right arrow: step. Space: play or pause. Hover over a token: its P(wrong).</div>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const samples = JSON.parse(document.getElementById("data").textContent);
const $$ = id => document.getElementById(id);
let sample = 0, frame = 0, timer = null;
const hasHeat = samples.some(s => s.some(f => f[3].some(h => h >= 0)));
$$("scale").style.display = hasHeat ? "" : "none";
samples.forEach((_, i) => $$("sample").add(new Option(i + 1, i)));
function show() {
  const frames = samples[sample], [title, pieces, kinds, heat, counts] = frames[frame];
  $$("at").max = frames.length - 1;
  $$("at").value = frame;
  $$("title").textContent = title;
  $$("counts").textContent = counts;
  const spans = pieces.map((piece, i) => {
    const span = document.createElement("span");
    span.className = kinds[i];
    span.textContent = piece;
    if (heat[i] >= 0) {
      span.title = "P(wrong) " + heat[i] + " %";
      if ($$("heat").checked) span.style.backgroundColor = "rgba(var(--heat), " + (heat[i] * 0.009) + ")";
    }
    return span;
  });
  $$("text").replaceChildren(...spans);
}
function go(to) { frame = Math.max(0, Math.min(samples[sample].length - 1, to)); show(); }
function pause() { clearTimeout(timer); timer = null; $$("play").textContent = "play"; }
function tick() {
  if (frame + 1 >= samples[sample].length) return pause();
  go(frame + 1);
  timer = setTimeout(tick, Number($$("speed").value));
}
function toggle() {
  if (timer !== null) return pause();
  if (frame + 1 >= samples[sample].length) go(0);
  $$("play").textContent = "pause";
  timer = setTimeout(tick, Number($$("speed").value) / 2);
}
const step = by => { pause(); go(frame + by); };
$$("first").onclick = () => step(-frame);
$$("back").onclick = () => step(-1);
$$("next").onclick = () => step(1);
$$("last").onclick = () => step(samples[sample].length);
$$("play").onclick = toggle;
$$("heat").onchange = show;
$$("at").oninput = () => step($$("at").value - frame);
$$("sample").onchange = () => { sample = Number($$("sample").value); go(frame); };
document.addEventListener("keydown", event => {
  if (["SELECT", "INPUT", "BUTTON"].includes(event.target.tagName) && event.key === " ") return;
  if (event.target.tagName === "SELECT" || event.target.type === "range") return;
  const action = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), " ": toggle }[event.key];
  if (action) { event.preventDefault(); action(); }
});
const wanted = location.hash.match(/^#(\\d+)(?:\\.(\\d+))?$$/);
if (wanted && samples[wanted[1] - 1]) {
  sample = Number(wanted[1]) - 1;
  $$("sample").value = sample;
  frame = Math.min(samples[sample].length - 1, Number(wanted[2] || 1) - 1);
}
show();
</script>
</html>
"""
