// The request that the page edits. It is a body of /v1/completions as the server takes it, so that a link or a paste holds
// all of it; what the page has no control for stays as it is.

export const served = { model: null, told: null, attributes: [], saes: [], vectors: [] };

export const state = { request: empty() };

const watchers = [];

export const watch = (act) => watchers.push(act);

// `how` says who changed it, so that an editor need not draw itself anew under the hand that moves it.
export const changed = (how = "") => watchers.forEach((act) => act(how));

export function empty() {
  return { prompt: "the", max_tokens: 48, seed: 1, diffusion: { steps: 48, ignore_eos: true }, steering: { interventions: [] } };
}

export function replace(request) {
  state.request = { ...request, diffusion: { ...request.diffusion }, steering: { ...request.steering } };
  state.request.steering.interventions ??= [];
  changed("all");
}

export const pushes = () => state.request.steering.interventions;

export function nameOf(push) {
  if (push.attribute) return push.attribute.split("@")[0];
  if (push.feature) return `${push.feature.sae}:${push.feature.index}`;
  return push.vector?.name ?? `vector at layer ${push.vector?.layer}`;
}

// Reads of what is pushed come and go with it; a reading of its own stays until it is taken off.
export function addRead(push) {
  const trace = (state.request.steering.trace ??= { positions: true });
  trace.positions = true;
  if (push.attribute) {
    const name = push.attribute.split("@")[0];
    trace.attributes = [...new Set([...(trace.attributes ?? []), name])];
  } else if (push.feature && !trace.features?.some((one) => same(one, push.feature))) {
    trace.features = [...(trace.features ?? []), { ...push.feature }];
  }
  if (!push.attribute && !push.feature && !trace.attributes?.length && !trace.features?.length) {
    delete state.request.steering.trace;
  }
}

const same = (a, b) => a.sae === b.sae && a.index === b.index;

export function dropRead(push) {
  const { trace } = state.request.steering;
  if (!trace) return;
  if (push.attribute) trace.attributes = trace.attributes?.filter((one) => one !== push.attribute.split("@")[0]);
  if (push.feature) trace.features = trace.features?.filter((one) => !same(one, push.feature));
  if (!trace.attributes?.length && !trace.features?.length) delete state.request.steering.trace;
}

export function add(push) {
  pushes().push(push);
  addRead(push);
  changed("all");
}

export function remove(push) {
  state.request.steering.interventions = pushes().filter((one) => one !== push);
  if (!pushes().some((one) => nameOf(one) === nameOf(push))) dropRead(push);
  changed("all");
}

// What is sent: the model named, nothing that is empty.
export function body() {
  const { steering, prompt, ...rest } = structuredClone(state.request);
  const sent = { model: served.model?.id, ...rest };
  if (prompt !== "" && prompt !== undefined) sent.prompt = prompt;
  if (steering.interventions.length || Object.keys(steering).length > 1) sent.steering = steering;
  return sent;
}

// The same request without what steers it: the same seed draws the same noise.
export function unsteered() {
  const sent = body();
  const trace = sent.steering?.trace;
  delete sent.steering;
  for (const name of ["n", "best_of"]) delete sent[name];
  if (trace) sent.steering = { trace };
  return sent;
}

const encode = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text))).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
const decode = (text) => new TextDecoder().decode(Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (one) => one.charCodeAt(0)));

// The fragment never leaves the browser, so that a server's log has no prompt from it.
export function link() {
  const here = new URL(location.href);
  here.hash = `r=${encode(JSON.stringify(state.request))}`;
  return here.href;
}

export function linked() {
  const found = location.hash.match(/^#r=(.+)$/);
  if (!found) return null;
  try {
    return JSON.parse(decode(found[1]));
  } catch {
    throw new Error("the link holds no request: it may have been cut");
  }
}

// An attribute or feature that another page asks to be pushed.
export function wished() {
  const found = location.hash.match(/^#push=(.+):(\d+)$/);
  return found ? { sae: decodeURIComponent(found[1]), index: Number(found[2]) } : null;
}

export function pushOfFeature(sae, index) {
  const about = served.saes.find((one) => one.name === sae);
  const scope = { mask: "masked", visible: "committed" }[about?.policy] ?? "all";
  const unit = about && !about.units.includes("max_act") ? "residual" : "max_act";
  return { feature: { sae, index }, strength: unit === "max_act" ? 1.5 : 0.2, unit, scope };
}

export function pushOfAttribute(name, factor = 1) {
  const own = served.attributes.find((one) => one.name === name);
  return { attribute: name, strength: Number((own.strength * factor).toPrecision(4)) };
}
