// When a push acts: the kind of schedule, the gains that the server makes of it, and behind them when the attribute or
// feature commits by itself.

import { attribute, feature } from "./api.js";
import { chart, legend } from "./charts.js";
import { h, number, options, percent } from "./dom.js";
import { changed, served } from "./state.js";

const POINTS = 7; // of a schedule that is drawn
const PRESETS = ["ramp_up", "ramp_down", "cosine_up", "cosine_down"];

const typeOf = (push) => {
  if (!push.schedule) return "";
  if (typeof push.schedule === "string") return push.schedule;
  if (push.schedule.type === "piecewise" && push.schedule.preset) return push.schedule.preset;
  return push.schedule.type;
};

function named(type) {
  if (type === "") return undefined;
  if (type === "window") return { type, start: 0, stop: 0.5 };
  if (PRESETS.includes(type)) return { type: "piecewise", preset: type };
  if (type === "piecewise") return { type, points: Array.from({ length: POINTS }, (_, i) => [i / (POINTS - 1), 1]) };
  return type;
}

// As high as the chart; the legend says what its top stands for.
function scaled(text, points) {
  const most = Math.max(...points.map((one) => one[1]), 1e-9);
  return { text: `${text}, up to ${number(most)}`, data: points.map(([a, b]) => [a, Math.max(0, b) / most]) };
}

// Points of progress and value, the largest 1; null where nothing is known.
async function behind(push) {
  if (push.attribute) {
    const { profile } = await attribute(push.attribute.split("@")[0]);
    if (!profile?.curve) return null;
    const last = profile.curve.length - 1;
    return scaled("share of the attribute that has committed", profile.curve.map((value, i) => [i / last, value]));
  }
  if (push.feature) {
    const { curve } = await feature(push.feature.sae, push.feature.index);
    if (!curve) return null;
    return scaled("the feature's mean activation while text is written", curve.progress.map((one, i) => [one, curve.mean_activation[i]]));
  }
  return null;
}

export class ScheduleEditor {
  constructor(push) {
    this.push = push;
    this.plan = null;
    this.curve = null;
    const known = served.told.schedules.filter((one) => push.attribute || !["commitment", "optimal", "feedback"].includes(one));
    const labels = { window: "window", piecewise: "drawn by hand" };
    const kinds = [["", "own"], ...known.flatMap((one) => [[one, labels[one] ?? one], ...(one === "piecewise" ? PRESETS.map((name) => [name, name.replace("_", " ")]) : [])])];
    this.kind = h("select", { "aria-label": "schedule", onchange: () => this.choose(this.kind.value) }, options(kinds, typeOf(push)));
    this.span = h("span", { class: "span" });
    this.figure = h("div", { class: "schedule" });
    this.said = h("p", { class: "cost" });
    this.box = h("div", {}, h("label", {}, "When ", this.kind), this.span, this.figure, this.said);
    this.spanInputs();
    behind(push).then((curve) => {
      this.curve = curve;
      this.draw();
    }, () => {});
  }

  choose(type) {
    this.push.schedule = named(type);
    if (this.push.schedule === undefined) delete this.push.schedule;
    this.spanInputs();
    changed("schedule");
  }

  spanInputs() {
    if (typeOf(this.push) !== "window") return this.span.replaceChildren();
    const field = (name) =>
      h("label", {}, ` ${name} `, h("input", {
        type: "number", min: 0, max: 1, step: 0.05, value: this.push.schedule[name],
        oninput: (event) => {
          this.push.schedule[name] = Number(event.target.value);
          changed("schedule");
        },
      }));
    this.span.replaceChildren(field("start"), field("stop"));
  }

  // `plan`: what /v1/steering/preview says of this push.
  planned(plan) {
    this.plan = plan;
    this.draw();
  }

  draw() {
    const drawn = typeOf(this.push) === "piecewise" ? this.push.schedule.points : null;
    const gains = this.plan?.schedule?.gains ?? [];
    const top = Math.max(1, ...gains, ...(drawn ?? []).map((one) => one[1]));
    const layers = [];
    if (this.curve) layers.push({ kind: "area", name: "commit", data: this.curve.data.map(([a, b]) => [a, b * top]) });
    layers.push({ kind: "steps", name: "gain", data: gains.map((gain, i) => [i / gains.length, gain, (i + 1) / gains.length]) });
    const picture = chart({
      width: Math.max(220, this.figure.clientWidth || 320), height: 130, bare: true, x: [0, 1], y: [0, drawn ? Math.max(2, top) : top * 1.08],
      xLabel: "progress", label: `gain over progress${this.curve ? `, over ${this.curve.text}` : ""}`, layers,
    });
    this.figure.replaceChildren(picture, legend(["gain", "gain"], ...(this.curve ? [["commit", this.curve.text]] : [])));
    if (drawn) this.handles(picture, drawn);
    if (!this.plan) return this.said.replaceChildren();
    const rho = this.plan.rho ? `; by its profile a schedule can gain ${percent(this.plan.rho - 1)} over uniform` : "";
    const cost = this.plan.predicted_kl === null || this.plan.predicted_kl === undefined ? "no forecast of its cost" : `predicted cost ${number(this.plan.predicted_kl)} nats per token`;
    const peak = this.plan.peak === null ? "" : `Peak ${number(this.plan.peak)} ${this.plan.unit ?? ""}; `;
    this.said.textContent = `${peak}${cost}${rho}.${this.plan.notes?.length ? ` ${this.plan.notes.join("; ")}` : ""}`;
  }

  // One handle a point: dragged, or moved by the arrow keys.
  handles(picture, points) {
    const dots = points.map(([progress, gain], i) => {
      const [cx, cy] = picture.spot(progress, gain);
      const dot = document.createElementNS(picture.namespaceURI, "circle");
      for (const [name, value] of Object.entries({
        cx, cy, r: 7, class: "handle", tabindex: 0, role: "slider", "aria-label": `gain at progress ${number(progress, 2)}`,
        "aria-valuemin": 0, "aria-valuemax": 2, "aria-valuenow": number(gain),
      })) dot.setAttribute(name, value);
      const set = (value) => {
        points[i] = [points[i][0], Math.min(2, Math.max(0, Number(value.toFixed(3))))];
        dot.setAttribute("cy", picture.spot(points[i][0], points[i][1])[1]);
        dot.setAttribute("aria-valuenow", points[i][1]);
        changed("schedule");
      };
      dot.addEventListener("keydown", (event) => {
        const move = { ArrowUp: 0.1, ArrowRight: 0.1, ArrowDown: -0.1, ArrowLeft: -0.1, Home: -2, End: 2 }[event.key];
        if (move === undefined) return;
        event.preventDefault();
        this.focused = i;
        set(points[i][1] + move);
      });
      dot.addEventListener("pointerdown", (event) => {
        dot.setPointerCapture(event.pointerId);
        dot.onpointermove = (moved) => set(picture.place(moved)[1]);
        dot.onpointerup = dot.onpointercancel = () => (dot.onpointermove = null);
        this.held = true;
      });
      return dot;
    });
    picture.removeAttribute("role"); // its handles are to be reached
    picture.setAttribute("role", "group");
    picture.append(...dots);
    if (this.focused !== undefined) dots[this.focused]?.focus();
  }
}
