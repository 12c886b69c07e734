// A canvas of tokens: one cell a position, coloured by a reading or by the step at which it was committed.

import { at, h, number } from "./dom.js";

export const COMMITS = "commit step";

const visible = (text) => (text === "" ? "⏹" : text.replaceAll("\n", "↵"));

export class Cells {
  constructor(id, pick) {
    this.box = at(id);
    this.pick = pick;
    this.cells = [];
    this.box.onclick = (event) => {
      const place = Number(event.target.dataset?.place ?? -1);
      if (place >= 0) pick(place, this);
    };
    this.box.onkeydown = (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -1e9, End: 1e9 }[event.key];
      if (move === undefined || !this.cells.length) return;
      event.preventDefault();
      pick(Math.min(this.cells.length - 1, Math.max(0, (this.chosen ?? -1) + move)), this);
    };
  }

  // `scale`: {name, most}; a reading is coloured from 0, both ways.
  show(run, time, scale) {
    if (this.cells.length !== run.length) {
      this.cells = Array.from({ length: run.length }, (_, place) => h("span", { class: "cell", "data-place": String(place) }));
      this.box.replaceChildren(...this.cells);
    }
    const tokens = run.tokens(time);
    const reading = scale.name === COMMITS ? null : run.reading(scale.name, time);
    this.cells.forEach((cell, place) => {
      const token = tokens.get(place);
      const text = token ? visible(token.text) : "▯";
      if (cell.textContent !== text) cell.textContent = text;
      let value = null;
      if (scale.name === COMMITS) value = token ? (token.step + 1) / scale.most : null;
      else if (reading) value = reading.values[place] / scale.most;
      const kind = value === null ? "" : scale.name === COMMITS ? " time" : value < 0 ? " cold" : " warm";
      const fresh = token && token.step === time - 1 ? " fresh" : "";
      cell.className = `cell${token ? "" : " mask"}${kind}${fresh}${place === this.chosen ? " chosen" : ""}`;
      cell.style.setProperty("--p", value === null ? "0" : String(Math.round(100 * Math.min(1, Math.abs(value)))));
    });
  }

  choose(place) {
    this.cells[this.chosen]?.classList.remove("chosen");
    this.chosen = place;
    this.cells[place]?.classList.add("chosen");
  }

  clear(length) {
    this.cells = Array.from({ length }, (_, place) => h("span", { class: "cell mask", "data-place": String(place) }, "▯"));
    this.box.replaceChildren(...this.cells);
    this.chosen = undefined;
  }
}

export function scaleLegend(scale, step) {
  if (scale.name === COMMITS) {
    return h("div", { class: "scale" }, "committed at step 1", h("i", { class: "ramp time" }), String(scale.most));
  }
  const most = number(scale.most, 2);
  return h("div", { class: "scale" }, `${scale.name}  −${most}`, h("i", { class: "ramp both" }), `+${most}`, step);
}

// The whole run as a picture: positions across, steps down, the same colours as the cells.
export function heat(canvas, run, scale, time) {
  const width = canvas.parentElement.clientWidth;
  const rows = Math.max(1, run.planned, run.steps);
  const row = Math.max(2, Math.min(9, 180 / rows));
  const dots = window.devicePixelRatio || 1;
  canvas.style.height = `${row * rows}px`;
  canvas.width = width * dots;
  canvas.height = row * rows * dots;
  const pen = canvas.getContext("2d");
  pen.scale(dots, dots);
  const cell = width / run.length;
  const look = getComputedStyle(document.documentElement);
  const paint = { warm: look.getPropertyValue("--warm"), cold: look.getPropertyValue("--cold"), time: look.getPropertyValue("--time") };
  const traces = scale.name === COMMITS ? [] : run.traces.filter((one) => one.positions?.[scale.name]);
  traces.forEach((one, i) => {
    const to = traces[i + 1]?.step ?? Math.max(one.step + 1, run.steps);
    one.positions[scale.name].forEach((value, place) => {
      pen.globalAlpha = Math.min(1, Math.abs(value) / scale.most);
      pen.fillStyle = value < 0 ? paint.cold : paint.warm;
      pen.fillRect(place * cell, one.step * row, cell + 0.3, (to - one.step) * row + 0.3);
    });
  });
  pen.globalAlpha = 1;
  pen.fillStyle = scale.name === COMMITS ? paint.time : look.getPropertyValue("--ink");
  for (const [place, token] of run.tokens(Infinity)) {
    if (scale.name === COMMITS) pen.fillRect(place * cell, token.step * row, cell, row * (rows - token.step));
    else pen.fillRect(place * cell + 1, token.step * row, cell - 2, Math.max(1, row / 3));
  }
  pen.fillRect(0, Math.min(rows * row - 1, time * row), width, 1);
}
