// Lays a board out as Grafana does, and has each panel drawn from its answers.
"use strict";

const UNIT_PX = 38, GAP_PX = 8;

function element(tag, name, into, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  into.append(made);
  return made;
}

function drawBoard(board) {
  const bar = document.getElementById("bar"), main = document.getElementById("board");
  element("h1", "", bar, board.title);
  for (const [name, value] of board.variables) {
    const choice = element("div", "choice", bar);
    element("b", "", choice, name);
    element("span", "", choice, value);
  }
  const day = new Date(board.from * 1000).toISOString().slice(0, 10);
  element("span", "time", bar, `${day} ${clock(board.from)} to ${clock(board.to)} UTC`);
  const column = (main.clientWidth + GAP_PX) / 24;
  let bottom = 0;
  for (const panel of board.panels) {
    const { x, y, w, h } = panel.gridPos;
    const section = element("section", panel.type, main);
    section.style.left = `${x * column}px`;
    section.style.top = `${y * UNIT_PX}px`;
    section.style.width = `${w * column - GAP_PX}px`;
    section.style.height = `${h * UNIT_PX - GAP_PX}px`;
    bottom = Math.max(bottom, (y + h) * UNIT_PX);
    const title = element("h2", "", section, panel.title);
    if (panel.type === "row") continue;
    element("span", "about", title, "i").title = panel.description;
    drawPanel(section, board, panel);
  }
  main.style.height = `${bottom}px`;
}

function drawPanel(section, board, panel) {
  const byName = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });
  const series = panel.answers.flatMap((answer) => [...answer.series].sort(byName))
    .filter((one) => one.values.some(([, v]) => v != null));
  const content = element("div", "content", section);
  if (!series.length) return void element("span", "none", content, "No data");
  const exemplars = thinned(panel.answers.flatMap((answer) => answer.exemplars), board);
  if (panel.type === "stat") return drawFigure(element("div", "figure", content), board, panel, series);
  if (panel.type === "bargauge") return drawBars(element("div", "bars", content), panel, series);
  const plot = element("div", "plot", content);
  if (panel.type === "heatmap") return drawHeat(plot, board, panel, series, exemplars);
  drawLegend(content, panel, series);
  drawLines(plot, board, panel, series, exemplars);
}

function drawLegend(content, panel, series) {
  const { placement, calcs } = panel.options.legend, { unit } = panel.fieldConfig.defaults;
  content.classList.add(placement === "right" ? "beside" : "below");
  const legend = element("div", "legend", content);
  const colors = colorsOf(panel, series);
  const rows = series.map((one, i) => {
    const values = one.values.map(([, v]) => v).filter((v) => v != null);
    return {
      name: one.name, color: colors[i], max: Math.max(...values),
      mean: values.reduce((a, b) => a + b, 0) / values.length,
    };
  });
  if (!calcs?.length) {
    for (const row of rows) {
      const entry = element("span", "", legend, row.name);
      entry.insertAdjacentHTML("afterbegin", `<i style="background:${row.color}"></i>`);
    }
    return;
  }
  const table = element("table", "", legend);
  table.innerHTML = "<tr><th></th><th>Mean</th><th>Max</th></tr>";
  for (const row of rows.sort((a, b) => b.max - a.max)) {
    const line = element("tr", "", table), name = element("td", "", line, row.name);
    name.insertAdjacentHTML("afterbegin", `<i style="background:${row.color}"></i>`);
    element("td", "", line, written(row.mean, unit));
    element("td", "", line, written(row.max, unit));
  }
}
