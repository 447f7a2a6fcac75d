// SPDX-License-Identifier: Apache-2.0
// Draws the charts in the page's own colours, anew when its width or its scheme of colours changes.
"use strict";
(() => {
  const BESIDE = 80; // px of axis and margins beside a plot
  const root = document.documentElement;
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  let views = [];
  let drawing = Promise.resolve();

  // Names in a legend: as many in a row as there is room for.
  function longest(spec) {
    let most = 0;
    JSON.stringify(spec, (key, value) => {
      if (key === "domain" && Array.isArray(value))
        for (const each of value) if (typeof each === "string") most = Math.max(most, each.length);
      return value;
    });
    return most;
  }

  function config(names, width) {
    const ink = colour("--ink"), soft = colour("--soft"), line = colour("--line");
    const ramp = [colour("--few"), colour("--many")];
    return {
      background: "transparent", font: "system-ui, sans-serif", padding: 4,
      view: { stroke: line }, mark: { aria: false }, // the table beneath says it in order
      range: { heatmap: ramp, ramp },
      axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", gridOpacity: 0.6 },
      legend: { labelColor: ink, titleColor: soft, labelFontSize: 12, titleFontWeight: "normal", symbolStrokeWidth: 3,
        labelLimit: width - 30, columns: Math.max(Math.floor(width / (names * 7 + 30)), 1) },
      title: { color: ink }, text: { color: ink },
    };
  }

  const fitted = (spec, width) => JSON.parse(JSON.stringify(spec), (key, value) =>
    key === "width" && value === "container" ? width : value);

  async function draw() {
    delete root.dataset.drawn;
    views.forEach((view) => view.finalize());
    views = [];
    const options = { actions: false, ast: true, renderer: "svg", defaultStyle: false,
      tooltip: { disableDefaultStyle: true, theme: "page" } };
    for (const [id, spec] of Object.entries(charts)) {
      const place = document.getElementById(id);
      if (place.closest("[hidden]")) continue; // of another VM: drawn when that is chosen
      const width = Math.max(place.clientWidth - BESIDE, 120);
      try {
        views.push(await vegaEmbed(place, fitted(spec, width), { ...options, config: config(longest(spec), width) }));
      } catch (error) {
        place.textContent = "This picture could not be drawn; its figures are below.";
        console.error(id, error);
      }
    }
    root.dataset.drawn = String(views.length);
  }

  // Two stand beside each other: one that is left over takes the whole width.
  function fill(section) {
    let beside = [];
    for (const figure of section ? [...section.children, null] : []) {
      if (figure?.hidden) continue;
      figure?.classList.remove("filled");
      if (figure && !figure.matches(".broad")) beside.push(figure);
      else {
        if (beside.length % 2) beside.at(-1).classList.add("filled");
        beside = [];
      }
    }
  }

  // Of the chosen VM the pictures and the rows of tables; of none the pictures of the worst, which come first.
  function choose(select) {
    const article = select.closest("article"), vm = select.value;
    const figures = [...article.querySelectorAll("figure[data-vm]")];
    const shown = vm || figures[0]?.dataset.vm;
    for (const figure of figures) figure.hidden = figure.dataset.vm !== shown;
    for (const row of article.querySelectorAll("tr[data-vm]")) row.hidden = Boolean(vm) && row.dataset.vm !== vm;
    fill(figures[0]?.parentElement);
    article.querySelector(".undrawn").hidden = figures.some((figure) => !figure.hidden) || !figures.length;
    again();
  }

  const again = () => { drawing = drawing.then(draw); };
  for (const select of document.querySelectorAll(".vms")) select.addEventListener("change", () => choose(select));
  let seen = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (innerWidth !== seen) { seen = innerWidth; again(); } }, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  again();
})();
