"""The look and the behaviour of the HTML report: its style sheet and its script."""

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #d9dee4; --tint: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: var(--ink); background: #fff; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; padding-top: .6rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 0; }
p { margin: .3rem 0; max-width: 75ch; }
small { display: block; color: var(--soft); font-weight: 400; font-size: .78rem;
  line-height: 1.35; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0;
  font-size: .9rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.1rem 0 0; break-inside: avoid; min-width: 0; }
figcaption p { color: var(--soft); font-size: .88rem; }
.chart { width: 100%; }
[hidden] { display: none !important; }
.choice { display: block; margin: .5rem 0; font-weight: 600; }
.choice select { font: inherit; padding: 6px 8px; max-width: 100%; border: 1px solid #9aa5b1;
  border-radius: 6px; background: #fff; color: inherit; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin-top: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; vertical-align: top;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--tint); vertical-align: bottom; }
tr > :first-child { text-align: left; }
.wide th:first-child { position: sticky; left: 0; background: #fff; }
.wide thead th:first-child, tr.load > * { background: var(--tint) !important; }
tr.load th { white-space: nowrap; max-width: 0; overflow: visible; }
.all th:first-child { min-width: 190px; width: 46%; }
.part > * { border-top: 0; padding-top: 0; }
.part th { font-weight: 400; padding-left: 28px; }
.wide td, .wide td small { white-space: nowrap; }
.glance tbody th { white-space: nowrap; }
td.words { white-space: normal; text-align: left; }
tbody th { font-weight: 600; }
td b { color: #00664a; }
@media (max-width: 600px) {
  main { padding: 12px 10px 40px; }
  .all th:first-child { min-width: 160px; width: auto; }
  th, td { padding: 4px 7px; }
}
@media print {
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  .choice select { border: 0; appearance: none; }
  .wide { overflow: visible; border: 0; }
  .wide th:first-child { position: static; }
  table { font-size: 9px; }
  small { font-size: 7.5px; }
  figcaption p { font-size: 10px; }
  th, td { padding: 2px 5px; }
  .modebar { display: none !important; }
  h2, .choice, section > p { break-after: avoid; }
  tr { break-inside: avoid; }
}
"""

SCRIPT = """
(() => {
  const PRINT_WIDTH = 680;
  const config = { responsive: true, displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const draw = (box) => {
    if (box.dataset.drawn || box.closest("[hidden]")) return;
    box.dataset.drawn = "1";
    const figure = JSON.parse(box.querySelector("script").textContent);
    box.querySelector("script").remove();
    Plotly.newPlot(box, figure.data, figure.layout, config);
  };
  const boxes = [...document.querySelectorAll(".chart")];
  // One after the other, so that the page can be scrolled meanwhile.
  const drawNext = (at) => {
    if (at >= boxes.length) return;
    draw(boxes[at]);
    setTimeout(() => drawNext(at + 1));
  };
  drawNext(0);
  for (const section of document.querySelectorAll(".choosing")) {
    const list = section.querySelector("select");
    if (!list) continue;
    const show = () => {
      for (const panel of section.querySelectorAll(".panel"))
        panel.hidden = panel.dataset.option !== list.value;
      section.querySelectorAll(".panel:not([hidden]) .chart").forEach((box) => {
        draw(box);
        Plotly.Plots.resize(box);
      });
    };
    list.addEventListener("change", show);
  }
  addEventListener("beforeprint", () => {
    boxes.forEach(draw);
    for (const box of boxes) if (box.dataset.drawn && !box.closest("[hidden]"))
      Plotly.relayout(box, { width: PRINT_WIDTH });
  });
  addEventListener("afterprint", () => {
    for (const box of boxes) if (box.dataset.drawn)
      Plotly.relayout(box, { width: null, autosize: true });
  });
})();
"""
