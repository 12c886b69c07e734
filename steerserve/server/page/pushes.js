// The list of pushes: what each pushes, how hard, by which operator, where and when.

import { address, feature } from "./api.js";
import { at, h, number, options } from "./dom.js";
import { ScheduleEditor } from "./schedule.js";
import { changed, nameOf, pushes, pushOfAttribute, pushOfFeature, remove, served } from "./state.js";

const OPERATORS = {
  add: "add", boost: "boost (DLM-Scope)", multiply: "multiply", clamp: "clamp to", project_out: "project out", cap: "cap at",
};
const FACTORS = ["boost", "multiply", "project_out"]; // of which the strength has no unit
const SCOPES = { "": "own scope", all: "everywhere", prompt: "prompt", response: "response", masked: "still masked", committed: "committed", positions: "positions…" };

let editors = [];

function unitsOf(push) {
  if (push.attribute) return served.told.units.filter((one) => ["residual", "raw", "kl"].includes(one));
  if (push.feature) return served.saes.find((one) => one.name === push.feature.sae)?.units.filter((one) => one !== "stored") ?? ["residual", "raw"];
  return push.vector.name ? ["stored", "residual", "raw"] : ["residual", "raw"];
}

function unitOf(push) {
  if (FACTORS.includes(push.op)) return "";
  if (push.unit) return push.unit;
  if (push.attribute) return served.attributes.find((one) => one.name === push.attribute.split("@")[0])?.unit ?? "";
  return push.vector?.name ? "stored" : "residual";
}

// How far the slider goes each way: some times what is usual of this push.
function reach(push) {
  if (push.op === "project_out") return [0, 1];
  if (push.op === "multiply") return [0, 4];
  const own = push.attribute && served.attributes.find((one) => one.name === push.attribute.split("@")[0]);
  const usual = own && unitOf(push) === own.unit ? own.strength : { max_act: 1.5, residual: 0.3, raw: 5, kl: 0.3, stored: 1 }[unitOf(push)] ?? 1;
  const most = Math.max(4 * usual, Math.abs(push.strength ?? 0));
  return [-most, most];
}

function strength(push) {
  const [low, high] = reach(push);
  const label = `strength of ${nameOf(push)}`;
  const slider = h("input", { type: "range", min: low, max: high, step: (high - low) / 160, value: push.strength ?? 0, "aria-label": label });
  const exact = h("input", { type: "number", step: "any", value: push.strength ?? 0, "aria-label": `${label}, exact` });
  slider.oninput = () => {
    push.strength = Number(Number(slider.value).toPrecision(3));
    exact.value = push.strength;
    changed("strength");
  };
  exact.oninput = () => {
    if (exact.value === "") return;
    push.strength = Number(exact.value);
    slider.value = push.strength;
    changed("strength");
  };
  const unit = FACTORS.includes(push.op)
    ? h("span", {}, "times")
    : h("select", { "aria-label": "unit", onchange: (event) => {
        push.unit = event.target.value || undefined;
        changed("all");
      } }, options([["", "own unit"], ...unitsOf(push)], push.unit ?? ""));
  return h("div", { class: "dial" }, slider, exact, unit);
}

function scope(push) {
  const value = typeof push.scope === "object" ? "positions" : push.scope ?? "";
  const from = h("input", { type: "number", min: 0, value: push.scope?.positions?.[0] ?? 0, "aria-label": "first position" });
  const to = h("input", { type: "number", min: 1, value: push.scope?.positions?.[1] ?? 8, "aria-label": "end of positions" });
  const span = h("span", { class: "span", hidden: value !== "positions" }, from, " to ", to);
  const set = () => {
    if (select.value === "") delete push.scope;
    else push.scope = select.value === "positions" ? { positions: [Number(from.value), Number(to.value)] } : select.value;
    span.hidden = select.value !== "positions";
    changed("scope");
  };
  const select = h("select", { onchange: set }, options(Object.entries(SCOPES), value));
  from.oninput = to.oninput = set;
  return h("span", {}, h("label", {}, "Where ", select), " ", span);
}

// The strength that a push of this kind begins with.
function usual(push) {
  const { strength, unit } = push.attribute
    ? pushOfAttribute(push.attribute.split("@")[0])
    : push.feature ? pushOfFeature(push.feature.sae, push.feature.index) : { strength: 1 };
  return { strength, unit };
}

function operator(push) {
  const known = served.told.operators.filter((one) => push.feature || !["boost", "multiply"].includes(one));
  return h("label", {}, "How ", h("select", {
    onchange: (event) => {
      const before = push.op;
      push.op = event.target.value;
      if (FACTORS.includes(push.op)) {
        delete push.unit;
        push.strength = { multiply: 2, boost: 0.5, project_out: 1 }[push.op];
      } else if (FACTORS.includes(before)) Object.assign(push, usual(push));
      if (push.op === "add") delete push.op;
      changed("all");
    },
  }, options(known.map((one) => [one, OPERATORS[one] ?? one]), push.op ?? "add")));
}

function card(push, index) {
  const title = h("h3", {}, nameOf(push));
  if (push.feature) {
    const { sae, index: number } = push.feature;
    const page = h("a", { href: address(`playground/feature?sae=${encodeURIComponent(sae)}&index=${number}`) }, nameOf(push));
    title.replaceChildren(page);
    feature(sae, number).then(({ label }) => label && title.replaceChildren(label, " ", h("small", {}, page)), () => {});
  }
  const schedule = new ScheduleEditor(push);
  editors[index] = schedule;
  const off = h("button", { type: "button", class: "quiet", "aria-label": `remove ${nameOf(push)}`, onclick: () => remove(push) }, "✕");
  return h("li", { class: "push" }, h("div", { class: "head" }, title, off), strength(push), h("div", { class: "row" }, operator(push), scope(push)), schedule.box);
}

export function drawPushes() {
  editors = [];
  const list = pushes().map(card);
  at("pushes").replaceChildren(...(list.length ? list : [h("li", { class: "hint" }, "Nothing is pushed. Find something below, or take an example above.")]));
}

// What the preview says: the plan of each push, and the sum.
export function showPlan(plan) {
  plan.interventions.forEach((one, i) => editors[i]?.planned(one));
  const cost = plan.predicted_kl === null ? "" : `, predicted cost ${number(plan.predicted_kl)} nats per token in all`;
  const rows = plan.rows_per_step === 1 ? "" : ` of ${plan.rows_per_step} rows`;
  at("plan").textContent = `${plan.max_steps} steps${rows}${cost}.`;
}
