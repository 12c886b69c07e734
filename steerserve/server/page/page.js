// The playground: one request, its stream of events, and a picture of what it did. No library, no state on the server.

const at = (id) => document.getElementById(id);
const POINTS = 9; // of a schedule that is drawn
const EXAMPLE = "topic/sports"; // the attribute of a new push, where it is served: its effect is easy to see

let running = null; // the AbortController of the stream
let run = null; // what the last stream has told
let attributes = [];
let schedules = [];

async function ask(path, options = {}) {
  const key = at("key").value.trim();
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    const { error } = await answer.json();
    // Of a body, the message begins with the field.
    const named = !error.param || error.message.startsWith(error.param);
    throw new Error(named ? error.message : `${error.param}: ${error.message}`);
  }
  return answer;
}

function say(text, error = false) {
  at("status").textContent = text;
  at("status").className = error ? "error" : "";
}

function element(tag, fields = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

// The first option is the one selected: `own`, where it is given, of which the value is empty and nothing is sent.
function fill(select, names, own) {
  const first = own === undefined ? [] : [element("option", { value: "", textContent: own })];
  select.replaceChildren(...first, ...names.map((name) => element("option", { value: name, textContent: name })));
}

const named = (choice) => (typeof choice === "string" ? choice : choice.type); // a name, or an object with options

async function load() {
  const [models, told, found] = await Promise.all(
    ["v1/models", "capabilities", "v1/attributes"].map(async (path) => (await ask(path)).json()),
  );
  const [model] = models.data;
  at("model").textContent = `${model.id} on ${told.device}`;
  at("model").dataset.id = model.id;
  at("tokens").max = model.max_model_len;
  const own = model.sampler_defaults;
  at("temperature").placeholder = `own: ${own.temperature}`;
  fill(at("order"), told.orders, `model's own: ${named(own.order)}`);
  attributes = found.data;
  schedules = told.schedules;
  if (!at("pushes").children.length && attributes.length) addPush();
  at("add").disabled = !attributes.length;
  say(attributes.length ? "" : "no attribute is loaded: nothing to push by name");
}

// One push: which attribute, how hard, and when. A drawn schedule is sent as `piecewise`.
function addPush() {
  const which = element("select", { ariaLabel: "attribute" });
  const known = attributes.map((one) => one.name);
  fill(which, known);
  if (known.includes(EXAMPLE)) which.value = EXAMPLE;
  const strength = element("input", { type: "range", min: -3, max: 3, step: 0.05, value: 1, ariaLabel: "strength" });
  const shown = element("output");
  const schedule = element("select", { ariaLabel: "schedule" });
  fill(schedule, [...schedules.filter((name) => !["window", "piecewise"].includes(name)), "drawn"], "own");
  const curve = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  curve.setAttribute("viewBox", "0 0 100 100");
  curve.setAttribute("preserveAspectRatio", "none");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  curve.append(line);
  const gains = Array(POINTS).fill(1);
  const box = element("div", { className: "push" });
  const remove = element("button", { type: "button", textContent: "Remove", onclick: () => box.remove() });
  const own = () => attributes.find((one) => one.name === which.value);
  const value = () => Number((own().strength * Number(strength.value)).toPrecision(4));
  const draw = () => {
    shown.textContent = `${value()} ${own().unit}`;
    curve.style.display = schedule.value === "drawn" ? "" : "none";
    line.setAttribute("points", gains.map((gain, i) => `${(100 * i) / (POINTS - 1)},${100 - 50 * gain}`).join(" "));
  };
  curve.onpointermove = curve.onpointerdown = (event) => {
    if (!event.buttons) return;
    const area = curve.getBoundingClientRect();
    const share = (event.clientX - area.left) / area.width;
    const place = Math.min(POINTS - 1, Math.max(0, Math.round(share * (POINTS - 1))));
    gains[place] = Math.min(2, Math.max(0, 2 * (1 - (event.clientY - area.top) / area.height)));
    draw();
  };
  which.onchange = strength.oninput = schedule.onchange = draw;
  box.intervention = () => {
    const push = { attribute: which.value, strength: value() };
    if (schedule.value === "drawn") {
      push.schedule = { type: "piecewise", points: gains.map((gain, i) => [i / (POINTS - 1), Number(gain.toFixed(3))]) };
    } else if (schedule.value !== "") {
      push.schedule = schedule.value;
    }
    return push;
  };
  box.append(which, element("label", {}, "times its own strength ", strength), shown, schedule, curve, remove);
  at("pushes").append(box);
  draw();
}

function body() {
  const interventions = [...at("pushes").children].map((box) => box.intervention());
  const names = [...new Set(interventions.map((one) => one.attribute))];
  const steering = { interventions, baseline: true };
  if (names.length) steering.trace = { attributes: names, positions: true };
  return {
    model: at("model").dataset.id,
    prompt: at("prompt").value || undefined, // an empty one is none, and JSON leaves it out
    max_tokens: Number(at("tokens").value),
    temperature: at("temperature").value ? Number(at("temperature").value) : undefined,
    seed: Number(at("seed").value),
    diffusion: { steps: Number(at("steps").value), order: at("order").value || undefined, ignore_eos: true },
    ...(names.length ? { steering } : {}),
  };
}

async function generate(event) {
  event.preventDefault();
  const asked = body();
  asked.stream = true;
  asked.diffusion.stream_mode = "events";
  if (asked.steering) asked.steering.receipt = "full"; // the picture shows the strength of every step
  running = new AbortController();
  run = { tokens: asked.max_tokens, steps: asked.diffusion.steps, commits: new Map(), readings: [], receipt: null };
  at("run").disabled = true;
  at("stop").disabled = false;
  at("receipt").hidden = true;
  at("canvas").hidden = !asked.steering;
  at("steered").textContent = at("baseline").textContent = "";
  fill(at("reading"), asked.steering?.trace.attributes ?? []);
  say("");
  try {
    const answer = await ask("v1/completions", {
      method: "POST",
      body: JSON.stringify(asked),
      signal: running.signal,
    });
    for await (const frame of frames(answer.body)) take(frame);
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    at("run").disabled = false;
    at("stop").disabled = true;
  }
}

// Server-sent events; each is one line of JSON, and [DONE] ends them.
async function* frames(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function take(frame) {
  if (frame.error) throw new Error(frame.error.message);
  if (frame.text !== undefined) at(frame.baseline ? "baseline" : "steered").textContent = frame.text;
  if (frame.baseline) return;
  if (frame.type === "committed") for (const place of frame.positions) run.commits.set(place, frame.step);
  if (frame.type === "revised") for (const place of frame.positions) run.commits.delete(place);
  if (frame.type === "trace") run.readings.push(frame);
  if (frame.type === "done") say(`${frame.denoising_steps} steps, ${frame.forward_passes} forward passes`);
  if (frame.type === "receipt") showReceipt(frame.steering);
  picture();
}

function showReceipt(receipt) {
  run.receipt = receipt;
  const head = ["push", "strength", "schedule", "rho", "layer", "touched", "mean |delta|/|h|", "largest", "notes"];
  const rows = receipt.interventions.flatMap((one) =>
    one.sites.map((site) => [
      one.name,
      `${one.strength} ${one.unit}`,
      one.schedule.type,
      one.rho?.toFixed(2) ?? "",
      site.layer,
      site.positions_touched,
      site.delta_ratio_mean.toFixed(3),
      site.delta_ratio_max.toFixed(3),
      one.notes.join("; "),
    ]),
  );
  at("applied").replaceChildren(
    element("tr", {}, ...head.map((text) => element("th", { textContent: text }))),
    ...rows.map((row) => element("tr", {}, ...row.map((text) => element("td", { textContent: text })))),
  );
  at("json").textContent = JSON.stringify(receipt, null, 1);
  at("receipt").hidden = false;
}

const CURVE = 90; // width of the strength curve at the right

function picture() {
  const name = at("reading").value;
  if (!name) return;
  const grid = at("grid");
  const width = grid.parentElement.clientWidth;
  const row = Math.max(6, Math.min(18, 420 / run.steps));
  const scale = window.devicePixelRatio || 1;
  grid.style.height = `${row * run.steps}px`;
  grid.width = width * scale;
  grid.height = row * run.steps * scale;
  const pen = grid.getContext("2d");
  pen.scale(scale, scale);
  const cell = (width - CURVE) / run.tokens;
  let most = 1e-9; // in a loop: a long run has more readings than a call may have arguments
  for (const one of run.readings) for (const value of one.positions[name]) most = Math.max(most, Math.abs(value));
  for (const one of run.readings) {
    one.positions[name].forEach((value, place) => {
      const [hue, share] = [value < 0 ? 215 : 22, Math.abs(value) / most];
      pen.fillStyle = `hsl(${hue} 85% 50% / ${share.toFixed(3)})`;
      pen.fillRect(place * cell, one.step * row, cell, row);
    });
  }
  pen.strokeStyle = "#777";
  for (const [place, step] of run.commits) pen.strokeRect(place * cell + 0.5, step * row + 0.5, cell - 1, row - 1);
  const push = run.receipt?.interventions.find((one) => one.name === name);
  if (!push) return;
  const largest = Math.max(1e-9, ...push.strength_per_step.map(Math.abs));
  pen.fillStyle = "#c2571a";
  push.strength_per_step.forEach((value, step) =>
    pen.fillRect(width - CURVE + 8, step * row + 1, ((CURVE - 10) * Math.abs(value)) / largest, row - 2),
  );
}

function point(event) {
  if (!run || !run.readings.length) return;
  const area = at("grid").getBoundingClientRect();
  const place = Math.floor((event.clientX - area.left) / ((area.width - CURVE) / run.tokens));
  const step = Math.floor(((event.clientY - area.top) / area.height) * run.steps);
  const value = run.readings.find((one) => one.step === step)?.positions[at("reading").value][place];
  const commit = run.commits.has(place) ? `, commits at step ${run.commits.get(place)}` : "";
  at("hover").textContent = value === undefined ? "" : `position ${place}, step ${step}: ${value.toFixed(3)}${commit}`;
}

async function copy() {
  const quoted = JSON.stringify(body()).replaceAll("'", "'\\''");
  const url = new URL("v1/completions", location.href);
  await navigator.clipboard.writeText(`curl -s ${url} -H 'Content-Type: application/json' -d '${quoted}'`);
  say("copied");
}

at("form").onsubmit = generate;
at("add").onclick = addPush;
at("stop").onclick = () => running?.abort();
at("copy").onclick = () => copy().catch((error) => say(error.message, true));
at("key").onchange = () => load().catch((error) => say(error.message, true));
at("reading").onchange = picture;
at("grid").onpointermove = point;
window.onresize = () => run && picture();
load().catch((error) => say(error.message, true));
