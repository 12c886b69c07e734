// Small charts in SVG: axes with labels and ticks, and layers of lines, steps, areas, bars and points.

import { h, number, s } from "./dom.js";

const EDGE = { left: 44, right: 12, top: 24, bottom: 34 };

function ticks([from, to], about) {
  const raw = (to - from) / about;
  const ten = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * ten).find((one) => one >= raw * 0.999);
  const found = [];
  for (let one = Math.ceil(from / step - 1e-9) * step; one <= to + step * 1e-9; one += step) found.push(Number(one.toPrecision(6)));
  return found;
}

export function range(values, zero = true) {
  const known = values.filter((one) => Number.isFinite(one));
  let [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
  if (zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) high = low + 1;
  const room = (high - low) * 0.06;
  return [zero && low === 0 ? 0 : low - room, zero && high === 0 ? 0 : high + room];
}

// `xTicks`: places and texts of the ticks, where these are not the numbers. Returns the figure, with `place`, from a pixel to the axes' numbers, and `mark(x)`, which moves a vertical line.
export function chart({ width, height = 170, x, y, xLabel, yLabel, layers, label, bare = false, xTicks }) {
  const edge = bare ? { left: 30, right: 10, top: 8, bottom: 28 } : EDGE;
  const across = (value) => edge.left + ((value - x[0]) / (x[1] - x[0])) * (width - edge.left - edge.right);
  const up = (value) => height - edge.bottom - ((value - y[0]) / (y[1] - y[0])) * (height - edge.top - edge.bottom);
  const base = up(Math.min(Math.max(0, y[0]), y[1]));
  const drawn = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label, class: "chart" });
  for (const value of ticks(y, Math.max(2, height / 45))) {
    drawn.append(
      s("line", { class: value === 0 ? "axis" : "grid", x1: edge.left, x2: width - edge.right, y1: up(value), y2: up(value) }),
      s("text", { x: edge.left - 6, y: up(value) + 4, "text-anchor": "end" }, number(value)),
    );
  }
  for (const [value, text] of xTicks ?? ticks(x, Math.max(2, width / 90)).map((one) => [one, number(one)])) {
    drawn.append(s("text", { x: across(value), y: height - edge.bottom + 14, "text-anchor": "middle" }, text));
  }
  if (xLabel) drawn.append(s("text", { class: "title", x: (edge.left + width - edge.right) / 2, y: height - 3, "text-anchor": "middle" }, xLabel));
  if (yLabel) drawn.append(s("text", { class: "title", x: 2, y: 11 }, yLabel));
  for (const layer of layers) drawn.append(...draw(layer, across, up, base));
  const line = s("line", { class: "cursor", y1: edge.top, y2: height - edge.bottom, visibility: "hidden" });
  drawn.append(line);
  drawn.mark = (value) => {
    line.setAttribute("x1", across(value));
    line.setAttribute("x2", across(value));
    line.setAttribute("visibility", "visible");
  };
  drawn.spot = (a, b) => [across(a), up(b)];
  drawn.place = (event) => {
    const box = drawn.getBoundingClientRect();
    const [a, b] = [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
    return [
      x[0] + ((a - edge.left) / (width - edge.left - edge.right)) * (x[1] - x[0]),
      y[0] + ((height - edge.bottom - b) / (height - edge.top - edge.bottom)) * (y[1] - y[0]),
    ];
  };
  return drawn;
}

function draw({ kind, data, name = "a" }, across, up, base) {
  const spots = data.map(([a, b]) => `${across(a).toFixed(1)},${up(b).toFixed(1)}`);
  if (kind === "line") return [s("polyline", { class: `line ${name}`, points: spots.join(" ") })];
  if (kind === "area" && data.length) {
    const ends = [across(data[0][0]), across(data[data.length - 1][0])];
    return [s("polygon", { class: `area ${name}`, points: `${ends[0]},${base} ${spots.join(" ")} ${ends[1]},${base}` })];
  }
  if (kind === "steps") {
    // Each value holds from its x to the next one's; the third number is where it ends.
    const path = data.map(([a, b, to], i) => `${i ? "L" : "M"}${across(a)},${up(b)} L${across(to)},${up(b)}`);
    return [s("path", { class: `line ${name}`, d: path.join(" ") })];
  }
  if (kind === "bars") {
    return data.map(([a, b, to, title]) =>
      s(
        "rect",
        { class: `bar ${name}`, x: across(a), width: Math.max(1, across(to) - across(a) - 1), y: Math.min(up(b), base), height: Math.abs(up(b) - base) },
        title && s("title", {}, title),
      ),
    );
  }
  if (kind === "points") {
    return data.flatMap(([a, b, text]) => [
      s("circle", { class: `point ${name}`, cx: across(a), cy: up(b), r: 4.5 }, text && s("title", {}, text)),
      ...(text ? [s("text", { x: across(a) + 8, y: up(b) - 6 }, text)] : []),
    ]);
  }
  return [];
}

export const legend = (...names) =>
  h("p", { class: "legend" }, names.map(([name, text]) => h("span", {}, h("i", { class: `swatch ${name}` }), text)));
