// The playground: what is on the page, joined. No library, no build, no state on the server.

import { ask, frames, json, key } from "./api.js";
import { at, h, later, options } from "./dom.js";
import { drawPresets } from "./presets.js";
import { drawPushes, showPlan } from "./pushes.js";
import { showReceipt } from "./receipt.js";
import { Run } from "./run.js";
import { openSearch } from "./search.js";
import { Stage } from "./stage.js";
import { add, addRead, body, changed, dropRead, linked, link, pushOfFeature, pushes, replace, served, state, unsteered, watch, wished } from "./state.js";
import { openSweep } from "./sweep.js";

const stage = new Stage();
let running = null; // {stop: AbortController, id of the steered generation}
let plan = null;

function say(text, error = false) {
  at("status").textContent = text;
  at("status").className = error ? "error" : "";
}

function fail(error) {
  if (error.name === "AbortError") return say("stopped");
  if (error.status === 401) at("access").open = true;
  say(error.message, true);
}

const named = (choice) => (typeof choice === "string" ? choice : choice?.type ?? ""); // a name, or an object with options

// The fields with a control of their own: where each stands in the request.
const FIELDS = {
  prompt: [(r) => r.prompt ?? "", (r, text) => (r.prompt = text)],
  tokens: [(r) => r.max_tokens ?? "", (r, text) => put(r, "max_tokens", text)],
  seed: [(r) => r.seed ?? "", (r, text) => put(r, "seed", text)],
  temperature: [(r) => r.temperature ?? "", (r, text) => put(r, "temperature", text)],
  steps: [(r) => r.diffusion.steps ?? "", (r, text) => put(r.diffusion, "steps", text)],
  order: [(r) => named(r.diffusion.order), (r, text) => put(r.diffusion, "order", text, String)],
  transfer: [(r) => named(r.diffusion.transfer), (r, text) => put(r.diffusion, "transfer", text, String)],
  control: [(r) => r.steering.control ?? "", (r, text) => put(r.steering, "control", text, String)],
  "max-kl": [(r) => r.steering.limits?.max_kl ?? "", (r, text) => {
    const limits = { ...r.steering.limits };
    put(limits, "max_kl", text);
    const holds = ["max_kl", "max_predicted_kl", "max_delta"].some((name) => name in limits);
    put(r.steering, "limits", holds ? limits : "", (value) => value);
  }],
};

// What is empty is left out: it is the model's own.
function put(where, name, value, of = Number) {
  if (value === "") delete where[name];
  else where[name] = of(value);
}

function drawFields() {
  for (const [id, [read]] of Object.entries(FIELDS)) if (document.activeElement !== at(id)) at(id).value = read(state.request);
  at("measure").checked = Boolean(state.request.steering.measure_kl);
  const { trace } = state.request.steering;
  const reads = [
    ...(trace?.attributes ?? []).map((name) => [name, { attribute: name }]),
    ...(trace?.features ?? []).map((one) => [`${one.sae}:${one.index}`, { feature: one }]),
  ];
  at("reads").replaceChildren(...reads.map(([name, push]) =>
    h("button", { type: "button", class: "chip", "aria-label": `${name} ✕, stop reading`, onclick: () => {
      dropRead(push);
      changed("all");
    } }, name, " ✕")));
}

function drawRequest() {
  if (document.activeElement !== at("request")) at("request").value = JSON.stringify(body(), null, 1);
}

const preview = later(async () => {
  const asked = JSON.stringify(body());
  try {
    const { plans } = await json("v1/steering/preview", JSON.parse(asked));
    if (asked !== JSON.stringify(body())) return;
    plan = plans[0];
    at("plan").className = "";
    showPlan(plan);
  } catch (error) {
    plan = null;
    at("plan").textContent = error.message;
    at("plan").className = "error";
  }
}, 200);

async function tell(run, sent, stop) {
  const answer = await ask("v1/completions", sent, { signal: stop.signal });
  if (run === stage.runs.steered) running.id = answer.headers.get("x-generation-id");
  for await (const frame of frames(answer)) {
    run.take(frame);
    stage.soon();
  }
}

async function generate() {
  running?.stop.abort();
  const stop = new AbortController();
  const mine = (running = { stop, id: null });
  const sent = body();
  const streamed = (one) => ({ ...one, stream: true, diffusion: { ...one.diffusion, stream_mode: "events" } });
  if (sent.steering?.interventions?.length) sent.steering.receipt = "full"; // the chart shows the strength of every step
  const steps = plan?.steps ?? sent.diffusion.steps ?? 1;
  const length = plan?.canvas.response ?? sent.max_tokens ?? 64;
  const runs = { steered: new Run(length, steps), unsteered: new Run(length, steps) };
  at("run").textContent = "Restart";
  at("stop").disabled = false;
  at("receipt").hidden = true;
  say("");
  stage.begin(runs, sent.steering?.trace);
  stage.pushed(plan?.interventions.map((one) => ({ name: one.name, steps: one.strength_per_step })));
  const begun = performance.now();
  try {
    await Promise.all([tell(runs.steered, streamed(sent), stop), tell(runs.unsteered, streamed(unsteered()), stop)]);
    say(`${((performance.now() - begun) / 1000).toFixed(1)} s for both texts`);
    showReceipt(runs.steered);
    // A key may steer every request that it comes with.
    const bound = runs.unsteered.receipt?.interventions.some((one) => one.applied);
    at("unsteered-name").textContent = bound ? "Without your steering; the key's own applies" : "Unsteered, same noise";
    stage.pushed(runs.steered.receipt?.interventions.map((one) => ({ name: one.name, from: one.from_step, steps: one.strength_per_step })));
  } catch (error) {
    stop.abort();
    if (running === mine) fail(error);
  } finally {
    if (running === mine) {
      running = null;
      at("run").textContent = "Generate";
      at("stop").disabled = true;
    }
  }
}

// While a text is written the strength goes to it; a finished one is written anew from the same seed.
const live = later(async () => {
  if (!at("live").checked || !stage.runs.steered) return;
  if (running?.id) {
    const { steering } = body();
    try {
      const told = await json(`v1/generations/${running.id}`, { steering: { interventions: steering?.interventions ?? [] } }, { method: "PATCH" });
      if (told.rows.length) say(`changed from step ${told.rows[0].from_step + 1}`);
      return;
    } catch (error) {
      if (error.status !== 404) return fail(error);
    }
  }
  generate();
}, 150);

async function load() {
  const [models, told, attributes, saes, vectors] = await Promise.all(
    ["v1/models", "capabilities", "v1/attributes", "v1/saes", "v1/vectors"].map((path) => json(path)),
  );
  Object.assign(served, { model: models.data[0], told, attributes: attributes.data, saes: saes.data, vectors: vectors.data });
  const own = served.model.sampler_defaults;
  at("model").textContent = `${served.model.id} · ${told.device}`;
  at("tokens").max = served.model.max_model_len;
  at("temperature").placeholder = `own: ${own.temperature}`;
  for (const id of ["order", "transfer"]) {
    at(id).replaceChildren(...options([["", `own: ${named(own[id])}`], ...told[`${id}s`]]));
  }
  at("control").replaceChildren(...options([["", "none"], ...told.controls]));
  drawPresets(generate, fail);
  openSearch();
  openSweep();
  say("");
  at("run").disabled = false;
  const wish = wished();
  const from = linked();
  if (from) replace(from);
  else if (!pushes().length && !wish) {
    const name = served.attributes.find((one) => one.name === "topic/sports")?.name ?? served.attributes[0]?.name;
    if (name) pushes().push({ attribute: name, strength: served.attributes.find((one) => one.name === name).strength });
    pushes().forEach(addRead);
    if (served.model.max_model_len < 80) state.request.max_tokens = Math.max(1, served.model.max_model_len - 16);
    changed("all");
  } else changed("all");
  if (wish) add(pushOfFeature(wish.sae, wish.index));
}

watch((how) => {
  if (how === "all") drawPushes();
  drawFields();
  drawRequest();
  preview();
  if (["strength", "schedule", "scope"].includes(how)) live();
});

for (const [id, [, write]] of Object.entries(FIELDS)) {
  at(id).oninput = () => {
    write(state.request, at(id).value);
    changed("field");
  };
}
at("measure").onchange = () => {
  put(state.request.steering, "measure_kl", at("measure").checked || "", Boolean);
  changed("field");
};
at("dice").onclick = () => {
  state.request.seed = Math.floor(Math.random() * 1e6);
  changed("field");
  generate();
};
at("form").onsubmit = (event) => {
  event.preventDefault();
  generate();
};
at("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
};
at("stop").onclick = () => running?.stop.abort();
at("apply").onclick = () => {
  try {
    const { model: _, stream: __, ...request } = JSON.parse(at("request").value);
    replace(request);
    say("taken over");
  } catch (error) {
    fail(error);
  }
};

// Browsers let a page copy only over TLS or from this machine.
async function copy(text, done, otherwise) {
  try {
    await navigator.clipboard.writeText(text);
    say(done);
  } catch {
    say(otherwise);
  }
}

at("share").onclick = async () => {
  history.replaceState(null, "", link());
  await copy(location.href, "link copied", "the link is in the address bar");
};
at("curl").onclick = async () => {
  const sent = body();
  sent.steering = { ...sent.steering, baseline: true };
  const quoted = JSON.stringify(sent).replaceAll("'", "'\\''");
  const text = `curl -s ${new URL("v1/completions", location.href)} -H 'Content-Type: application/json' -d '${quoted}'`;
  await copy(text, "copied", text);
};
at("key").value = key.get();
at("key-form").onsubmit = (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  load().then(() => (at("access").open = false), fail);
};
addEventListener("hashchange", () => {
  try {
    const from = linked();
    if (from) replace(from);
  } catch (error) {
    fail(error);
  }
});
stage.cells.steered.clear(48);
stage.cells.unsteered.clear(48);
load().catch(fail);
