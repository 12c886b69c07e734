// What was done, as sentences; the JSON behind them on demand.

import { at, h, listed, number, percent } from "./dom.js";

const DOES = {
  add: "was added", boost: "was boosted", multiply: "was multiplied", clamp: "was clamped", project_out: "was projected out", cap: "was capped",
};
const WHERE = { all: "at all positions", prompt: "in the prompt", response: "in the response", masked: "at masked positions", committed: "at committed positions" };

function where(scope) {
  if (typeof scope === "string") return WHERE[scope] ?? `at ${scope} positions`;
  return scope?.positions ? `at positions ${scope.positions[0]} to ${scope.positions[1] - 1}` : "";
}

// When it held, of one that came or went while the text was written.
function held({ from_step: from, until_step: until }) {
  if (until !== undefined) return ` in steps ${(from ?? 0) + 1} to ${until}`;
  return from ? ` from step ${from + 1} on` : "";
}

function sentence(one) {
  if (!one.applied) return `${one.name} did not push${held(one)}${one.notes.length ? `: ${one.notes.join("; ")}` : ""}.`;
  const layers = one.sites.map((site) => site.layer);
  const touched = one.sites.reduce((sum, site) => sum + site.positions_touched, 0);
  const mean = touched ? one.sites.reduce((sum, site) => sum + site.positions_touched * site.delta_ratio_mean, 0) / touched : 0;
  const most = Math.max(0, ...one.sites.map((site) => site.delta_ratio_max));
  const steps = one.strength_per_step ?? [one.strength];
  const [low, high] = one.strength_range ?? [Math.min(...steps), Math.max(...steps)];
  const used = low === high ? number(high) : `${number(low)} to ${number(high)}`;
  const notes = one.notes.length ? ` ${one.notes.join("; ")}.` : "";
  return (
    `${one.name} ${DOES[one.operator] ?? one.operator} ${where(one.scope)} of ${layers.length > 1 ? "layers" : "layer"} ${listed(layers)}${held(one)}, at strength ${used} ${one.unit ?? ""} ` +
    `(${one.schedule.type}). It changed ${touched.toLocaleString("en")} states by ${percent(mean)} of their norm on average, ${percent(most)} at most.${notes}`
  );
}

export function sentences(receipt) {
  const cost = [];
  if (receipt.measured_kl !== null && receipt.measured_kl !== undefined) cost.push(`measured ${number(receipt.measured_kl)}`);
  if (receipt.predicted_kl !== null && receipt.predicted_kl !== undefined) cost.push(`predicted ${number(receipt.predicted_kl)}`);
  const told = receipt.interventions.map(sentence);
  if (cost.length) told.push(`KL from the unsteered model, in nats per token: ${listed(cost)}.`);
  if (receipt.approximate?.length) told.push(`Approximate methods: ${listed(receipt.approximate)}.`);
  for (const [name, value] of Object.entries(receipt.verdicts ?? {})) told.push(`The probe finds ${name} with probability ${number(value, 2)}.`);
  told.push(`${receipt.steps} steps, ${receipt.forward_passes} forward passes.`);
  return told;
}

export function showReceipt(run) {
  const { receipt } = run;
  at("receipt").hidden = !receipt && !run.done;
  if (receipt) at("said").replaceChildren(...sentences(receipt).map((text) => h("p", {}, text)));
  else if (run.done) at("said").replaceChildren(h("p", {}, `Nothing was pushed. ${run.done.denoising_steps} steps, ${run.done.forward_passes} forward passes.`));
  at("json").textContent = receipt ? JSON.stringify(receipt, null, 1) : "";
  at("as-json").hidden = !receipt;
}
