// The page of one feature: where it is strong, how often, when in denoising, what it writes, what is near.

import { feature, json, key } from "./api.js";
import { chart } from "./charts.js";
import { at, h, number, percent } from "./dom.js";

const asked = new URLSearchParams(location.search);
const [sae, index] = [asked.get("sae") ?? "", Number(asked.get("index") ?? 0)];

// The width that a chart has in a box, which has one only when it is shown.
function wide(id) {
  at(id).hidden = false;
  return Math.max(200, at(id).clientWidth - 34);
}

const here = (name, at) => `feature?sae=${encodeURIComponent(name)}&index=${at}`;

function put(id, ...nodes) {
  const box = at(id);
  box.hidden = nodes.length === 0;
  box.replaceChildren(...box.querySelectorAll("h2"), ...nodes);
}

function context({ tokens, at: place, masked, activation, mask_ratio: ratio }, most) {
  const cells = tokens.map((token, i) => {
    const cell = h("span", { class: `cell${masked[i] ? " hidden-token" : ""}${i === place ? " warm chosen" : ""}`, title: masked[i] ? "masked when the feature was read" : "" }, token.replaceAll("\n", "↵"));
    if (i === place) cell.style.setProperty("--p", String(Math.round((100 * activation) / most)));
    return cell;
  });
  return h("li", {}, h("p", { class: "cells" }, cells), h("small", {}, `${number(activation)} · ${percent(ratio)} masked`));
}

function bars(list, field, unit) {
  const most = Math.max(...list.map((one) => Math.abs(one[field])), 1e-9);
  return h("ol", { class: "tokens" }, list.map((one) => {
    const bar = h("i", { class: one[field] < 0 ? "cold" : "warm" });
    bar.style.width = `${(100 * Math.abs(one[field])) / most}%`;
    return h("li", {}, h("code", {}, one.token.replaceAll("\n", "↵")), h("span", { class: "track" }, bar), h("span", { class: "value" }, `${number(one[field])} ${unit}`));
  }));
}

const fieldOf = (one) => Object.keys(one).find((name) => name !== "token");

function show(found) {
  document.title = `${found.label ?? `feature ${index}`} · steerserve`;
  at("name").textContent = found.label ?? "without a name";
  at("where").textContent = `${sae} ${index} · layer ${found.layer}, ${found.policy} tokens`;
  at("push").href = `../playground#push=${encodeURIComponent(sae)}:${index}`;
  const facts = [];
  if (found.density !== null) facts.push(`Active on ${percent(found.density)} of tokens`);
  if (found.max_act !== null) facts.push(`largest activation ${number(found.max_act)}`);
  if (found.mean_act !== null) facts.push(`mean where active ${number(found.mean_act)}`);
  const by = { contexts: "The name is made of the words of its contexts, by no other model.", labels: "The name comes from a file of labels." }[found.named_by] ?? (found.named_by ? `Named by ${found.named_by}.` : "");
  const score = found.detection ? ` Its words find held-out contexts with AUC ${number(found.detection.auc)}; another feature's name ${number(found.detection.random_auc)}.` : "";
  at("facts").textContent = `${facts.join(", ")}. ${by}${score}`;
  const { contexts = [], histogram = [], density_by_noise: noise = [], curve } = found;
  const most = Math.max(...contexts.map((one) => one.activation), 1e-9);
  const source = found.contexts_from === "samples" ? "Texts that the model wrote. " : found.contexts_from ? "Real texts. " : "";
  if (contexts.length) put("contexts", h("p", { class: "dim" }, `${source}Dotted: masked when it was read.`), h("ul", { class: "contexts" }, contexts.map((one) => context(one, most))));
  if (histogram.length) {
    put("histogram", chart({
      width: wide("histogram"), x: [0, histogram.length], y: [0, Math.max(...histogram.map((one) => one.tokens)) * 1.08], xLabel: "activation", yLabel: "tokens",
      label: `tokens by activation, from ${number(histogram[0].from)} to ${number(histogram.at(-1).to)}`,
      xTicks: [...histogram.entries()].filter(([i]) => i % Math.ceil(histogram.length / 5) === 0).map(([i, one]) => [i, number(one.from, 2)]),
      layers: [{ kind: "bars", data: histogram.map((one, i) => [i, one.tokens, i + 1, `${one.tokens} tokens from ${number(one.from)} to ${number(one.to)}`]) }],
    }));
  }
  if (noise.length) {
    put("noise", chart({
      width: wide("noise"), x: [0, 1], y: [0, Math.max(...noise.map((one) => one.density), 1e-6) * 1.08], xLabel: "mask ratio", yLabel: "share of tokens", label: "density by mask ratio",
      layers: [{ kind: "bars", data: noise.map((one) => [one.mask_ratio - 0.5 / noise.length, one.density, one.mask_ratio + 0.5 / noise.length, `${percent(one.density)} at mask ratio ${number(one.mask_ratio)}`]) }],
    }));
  }
  if (curve) {
    const data = curve.progress.map((one, i) => [one, curve.mean_activation[i]]);
    const when = curve.forms_at === null || curve.committed_at === null ? "" : `Forms at progress ${number(curve.forms_at)}, has committed at ${number(curve.committed_at)}.`;
    put("forms", chart({ width: wide("forms"), x: [0, 1], y: [0, Math.max(...curve.mean_activation, 1e-6) * 1.08], xLabel: "progress", yLabel: "mean activation", label: `mean activation over denoising. ${when}`, layers: [{ kind: "area", name: "commit", data }, { kind: "line", data }] }), h("p", { class: "dim" }, when));
  }
  for (const [id, list, unit] of [["promoted", found.promoted, ""], ["suppressed", found.suppressed, ""], ["pushed-up", found.pushed_up, "nats"], ["pushed-down", found.pushed_down, "nats"]]) {
    if (list?.length) put(id, bars(list, fieldOf(list[0]), unit));
  }
  if (found.neighbours?.length) {
    put("neighbours", h("ul", { class: "plain" }, found.neighbours.map((one) => h("li", {}, h("a", { href: here(sae, one.index) }, one.label ?? `feature ${one.index}`), h("small", {}, ` cosine ${number(one.cosine)}`)))));
  }
  if (found.attributes?.length) {
    put("attributes", h("table", {}, h("thead", {}, h("tr", {}, ["attribute", "cosine", "contrast d"].map((one) => h("th", { scope: "col" }, one)))), h("tbody", {}, found.attributes.map((one) =>
      h("tr", {}, h("td", {}, one.name), h("td", {}, number(one.cosine)), h("td", {}, number(one.d)))))));
  }
}

async function load() {
  at("status").textContent = "";
  try {
    const { data } = await json("v1/saes");
    const count = data.find((one) => one.name === sae)?.features;
    at("before").hidden = index === 0;
    at("before").href = here(sae, index - 1);
    at("after").hidden = count === undefined || index + 1 >= count;
    at("after").href = here(sae, index + 1);
    show(await feature(sae, index));
  } catch (error) {
    at("status").textContent = error.message;
    if (error.status === 401) at("access").open = true;
  }
}

at("key").value = key.get();
at("key-form").onsubmit = (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  load();
};
load();
