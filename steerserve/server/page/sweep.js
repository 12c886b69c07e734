// One push at several strengths, each the same request and seed: the texts as small multiples, and what is gained in
// verdict against what is lost in likelihood. The loss is the unsteered model's, each token of the text masked in turn.

import { json } from "./api.js";
import { chart, range } from "./charts.js";
import { at, h, number, options, percent } from "./dom.js";
import { body, changed, nameOf, pushes, served, state, watch } from "./state.js";

const AT_ONCE = 3;
let stopped = null;

// Nats per token of the response; null where there is nothing to score.
async function loss(prompt, text, signal) {
  if (typeof prompt !== "string" || !text.trim()) return null;
  const sent = { model: served.model.id, prompt: prompt + text, max_tokens: 0, echo: true, logprobs: 0 };
  const { choices } = await json("v1/completions", sent, { signal });
  const { token_logprobs: values, text_offset: offsets } = choices[0].logprobs;
  const own = values.filter((value, i) => value !== null && offsets[i] >= prompt.length);
  return own.length ? -own.reduce((sum, one) => sum + one, 0) / own.length : null;
}

async function one(strength, index, judge, signal) {
  const sent = body();
  for (const name of ["stream", "n", "best_of"]) delete sent[name];
  delete sent.steering.trace;
  sent.steering.interventions[index].strength = strength;
  if (judge) sent.steering.rank = [judge];
  const { choices } = await json("v1/completions", sent, { signal });
  const { text, steering } = choices[0];
  return { strength, text, verdict: judge ? steering?.verdicts?.[judge] ?? null : null, loss: await loss(sent.prompt ?? "", text, signal), kl: steering?.predicted_kl ?? null };
}

function show(results, judge, index) {
  const done = results.filter(Boolean);
  at("sweep-cards").replaceChildren(...done.map((result) => {
    const facts = [result.loss === null ? null : `loss ${number(result.loss)}`, result.verdict === null ? null : `${judge} ${percent(result.verdict)}`].filter(Boolean).join(" · ");
    const meter = result.verdict === null ? null : h("meter", { min: 0, max: 1, value: result.verdict, "aria-label": `${judge} by its probe` });
    const use = h("button", { type: "button", class: "quiet", "aria-label": `use strength ${result.strength}`, onclick: () => {
      pushes()[index].strength = result.strength;
      changed("all");
    } }, "Use");
    return h("li", { class: "multiple" }, h("div", { class: "head" }, h("strong", {}, number(result.strength)), use), meter, h("p", {}, result.text.trim()), h("small", {}, facts));
  }));
  const points = done.filter((result) => result.loss !== null && result.verdict !== null).map((result) => [result.loss, result.verdict, number(result.strength)]);
  if (points.length < 2) return at("sweep-chart").replaceChildren();
  at("sweep-chart").replaceChildren(chart({
    width: Math.max(260, Math.min(640, at("sweep-chart").clientWidth)), height: 230, x: range(points.map((point) => point[0]), false), y: [0, 1.08],
    xLabel: "loss under the unsteered model, nats per token", yLabel: `probability of ${judge}`,
    label: `verdict against loss: ${points.map(([a, b, name]) => `strength ${name}: ${percent(b)} at ${number(a)} nats`).join("; ")}`,
    layers: [{ kind: "line", name: "thin", data: points }, { kind: "points", data: points }],
  }));
}

async function sweep(event) {
  event.preventDefault();
  const index = Number(at("sweep-push").value);
  const [low, high, count] = ["sweep-from", "sweep-to", "sweep-count"].map((id) => Number(at(id).value));
  const judge = at("sweep-judge").value;
  const strengths = Array.from({ length: count }, (_, i) => Number((low + ((high - low) * i) / Math.max(1, count - 1)).toPrecision(4)));
  const results = strengths.map(() => null);
  stopped = new AbortController();
  at("sweep-go").disabled = true;
  at("sweep-stop").disabled = false;
  at("sweep-said").className = "";
  const waiting = strengths.map((strength, i) => [strength, i]);
  const work = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) {
      results[next[1]] = await one(next[0], index, judge, stopped.signal);
      at("sweep-said").textContent = `${results.filter(Boolean).length} of ${strengths.length}`;
      show(results, judge, index);
    }
  };
  try {
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    at("sweep-said").textContent = `${strengths.length} strengths, one seed (${state.request.seed})`;
  } catch (error) {
    stopped.abort();
    at("sweep-said").textContent = error.name === "AbortError" ? "stopped" : error.message;
    at("sweep-said").className = error.name === "AbortError" ? "" : "error";
  } finally {
    at("sweep-go").disabled = !pushes().length;
    at("sweep-stop").disabled = true;
  }
}

function fill() {
  const list = pushes();
  const chosen = Math.min(Number(at("sweep-push").value || 0), Math.max(0, list.length - 1));
  at("sweep-push").replaceChildren(...options(list.map((push, i) => [String(i), nameOf(push)]), String(chosen)));
  const { probes } = served.told;
  const push = list[chosen];
  const before = at("sweep-judge").value;
  const own = push?.attribute?.split("@")[0];
  const judge = probes.includes(own) ? own : before || probes[0];
  at("sweep-judge").replaceChildren(...options([...probes, ["", "no probe"]], judge ?? ""));
  if (push) {
    const own = served.attributes.find((one) => one.name === push.attribute)?.strength ?? push.strength ?? 1;
    at("sweep-from").value = 0;
    at("sweep-to").value = Number((Math.sign(push.strength ?? 1) * 4 * Math.abs(own)).toPrecision(3)) || 1;
  }
  at("sweep-go").disabled = !list.length;
}

export function openSweep() {
  at("sweep-form").onsubmit = sweep;
  at("sweep-stop").onclick = () => stopped?.abort();
  at("sweep-push").onchange = fill;
  watch((how) => how === "all" && fill());
  fill();
}
