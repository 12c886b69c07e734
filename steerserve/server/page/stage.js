// The steered and the unsteered text side by side: their cells, the slider over the steps, the reading over time.

import { COMMITS, Cells, heat, scaleLegend } from "./canvas.js";
import { chart, legend, range } from "./charts.js";
import { at, h, number, options } from "./dom.js";

const SIDES = ["steered", "unsteered"];

export class Stage {
  constructor() {
    this.runs = {};
    this.time = 0;
    this.follow = true;
    this.cells = Object.fromEntries(SIDES.map((side) => [side, new Cells(side, (place) => this.choose(place))]));
    at("time").oninput = () => this.go(Number(at("time").value));
    at("play").onclick = () => (this.playing ? this.pause() : this.play());
    at("reading").onchange = () => this.draw();
    at("map").onpointerdown = (event) => {
      const run = this.runs.steered;
      const box = at("map").getBoundingClientRect();
      this.go(Math.ceil(((event.clientY - box.top) / box.height) * Math.max(run.planned, run.steps)));
      this.choose(Math.floor(((event.clientX - box.left) / box.width) * run.length));
    };
    addEventListener("resize", () => this.runs.steered && this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.runs.steered && this.draw());
  }

  // Two runs that are about to be told; what can be read of them is known from what was asked.
  begin(runs, trace) {
    this.pause();
    this.runs = runs;
    this.follow = true;
    this.time = 0;
    this.chosen = undefined;
    this.strengths = null;
    const before = at("reading").value;
    const names = [...(trace?.attributes ?? []), ...(trace?.features ?? []).map((one) => `${one.sae}:${one.index}`), COMMITS];
    at("reading").replaceChildren(...options(names, names.includes(before) ? before : names[0]));
    for (const side of SIDES) this.cells[side].clear(runs[side].length);
    at("detail").textContent = "";
    at("replay").hidden = false;
    this.draw();
  }

  soon() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      if (this.follow) this.time = this.steps();
      this.draw();
    });
  }

  steps() {
    return Math.max(...SIDES.map((side) => this.runs[side].steps));
  }

  go(time) {
    this.pause();
    this.time = Math.min(this.steps(), Math.max(0, time));
    this.follow = this.time === this.steps();
    this.draw();
  }

  play() {
    if (this.time >= this.steps()) this.time = 0;
    this.follow = false;
    at("play").textContent = "Pause";
    this.playing = setInterval(() => {
      if (this.time >= this.steps()) return this.pause();
      this.time += 1;
      this.draw();
    }, Math.max(40, Math.min(160, 5000 / Math.max(1, this.steps()))));
  }

  pause() {
    clearInterval(this.playing);
    this.playing = undefined;
    at("play").textContent = "Replay";
  }

  scale() {
    const name = at("reading").value;
    if (name === COMMITS) return { name, most: Math.max(1, this.steps()) };
    return { name, most: Math.max(1e-6, ...SIDES.map((side) => this.runs[side].largest(name))) };
  }

  choose(place) {
    this.chosen = place;
    for (const side of SIDES) this.cells[side].choose(place);
    this.describe();
  }

  describe() {
    if (this.chosen === undefined) return;
    const name = at("reading").value;
    const parts = SIDES.map((side) => {
      const run = this.runs[side];
      const token = run.tokens(this.time).get(this.chosen);
      const reading = run.reading(name, this.time);
      const text = token ? `“${token.text}”, committed at step ${token.step + 1}` : "masked";
      return `${side}: ${text}${reading ? `, ${name} ${number(reading.values[this.chosen])}` : ""}`;
    });
    at("detail").textContent = `Position ${this.chosen}. ${parts.join(". ")}.`;
  }

  draw() {
    const scale = this.scale();
    for (const side of SIDES) this.cells[side].show(this.runs[side], this.time, scale);
    at("time").max = Math.max(this.runs.steered.planned, this.steps());
    at("time").value = this.time;
    at("time").setAttribute("aria-valuetext", `after step ${this.time} of ${this.steps()}`);
    at("when").textContent = `after step ${this.time} of ${this.steps()}`;
    const reading = scale.name === COMMITS ? null : this.runs.steered.reading(scale.name, this.time);
    at("scale").replaceChildren(scaleLegend(scale, reading ? h("span", { class: "dim" }, `read at step ${reading.step + 1}`) : ""));
    heat(at("map"), this.runs.steered, scale, this.time);
    this.curves(scale);
    this.describe();
  }

  curves(scale) {
    const box = at("curve");
    if (scale.name === COMMITS) return box.replaceChildren();
    const [steered, plain] = SIDES.map((side) => this.runs[side].curve(scale.name).map(([step, value]) => [step + 1, value]));
    if (!steered.length) return box.replaceChildren();
    const y = range([...steered, ...plain].map((one) => one[1]));
    const layers = [];
    // More than one of a name where it was changed while the text was written.
    const push = this.strengths?.find((one) => one.name === scale.name) ?? this.strengths?.[0];
    const bars = (this.strengths ?? []).filter((one) => one.name === push.name).flatMap(({ from, steps }) => steps.map((one, i) => [(from ?? 0) + i, one]));
    const most = Math.max(1e-9, ...bars.map((one) => Math.abs(one[1])));
    layers.push({ kind: "bars", name: "strength", data: bars.map(([i, one]) => [i + 0.5, (y[1] * 0.55 * Math.abs(one)) / most, i + 1.5, `strength ${number(one)} at step ${i + 1}`]) });
    layers.push({ kind: "line", name: "b", data: plain }, { kind: "line", name: "a", data: steered });
    const picture = chart({
      width: Math.max(260, box.clientWidth), x: [0, Math.max(this.runs.steered.planned, this.steps())], y, layers, xLabel: "step", yLabel: `mean ${scale.name}`,
      label: `mean reading of ${scale.name} by step: steered ends at ${number(steered.at(-1)[1])}, unsteered at ${number(plain.at(-1)?.[1])}`,
    });
    picture.mark(this.time);
    picture.onpointerdown = (event) => this.go(Math.round(picture.place(event)[0]));
    const names = [["a", "steered"], ["b", "unsteered"]];
    if (push) names.push(["strength", `size of the strength of ${push.name}, at most ${number(most)}`]);
    box.replaceChildren(picture, legend(...names));
  }

  // The strength of each push at each step: as planned, then as the full receipt says it was.
  pushed(strengths) {
    this.strengths = strengths?.filter((one) => one.steps?.length);
    if (this.runs.steered) this.soon();
  }
}
