// Requests that show something at the first click; of these only what the server has.

import { search } from "./api.js";
import { at, h } from "./dom.js";
import { addRead, empty, pushes, pushOfAttribute, pushOfFeature, replace, served, state } from "./state.js";

const has = (...names) => names.every((name) => served.attributes.some((one) => one.name === name));
const during = (name, start, stop) => ({ ...pushOfAttribute(name), schedule: { type: "window", start, stop } });

const EXAMPLES = [
  ["Sports", "the text turns to sports", ["topic/sports"], () => [pushOfAttribute("topic/sports")]],
  ["Business", "the text turns to business", ["topic/business"], () => [pushOfAttribute("topic/business")]],
  ["Archaic", "the words of an old book", ["register/archaic"], () => [pushOfAttribute("register/archaic")]],
  ["Early only", "sports, in the first third of denoising alone", ["topic/sports"], () => [during("topic/sports", 0, 0.33)]],
  ["One, then another", "sports in the first half, business in the second", ["topic/sports", "topic/business"], () => [during("topic/sports", 0, 0.5), during("topic/business", 0.5, 1)]],
  ["Less of it", "sports pushed away, after a prompt that asks for it", ["topic/sports"], () => [pushOfAttribute("topic/sports", -1.5)], "the team won the"],
];

async function oneFeature() {
  const sae = served.saes.find((one) => one.policy === "mask")?.name ?? served.saes[0].name;
  const { data } = await search("football", 1, sae);
  return data.map((one) => pushOfFeature(one.sae, one.index));
}

async function take(make, prompt, run) {
  const interventions = await make();
  const next = empty();
  next.max_tokens = Math.min(next.max_tokens, served.model.max_model_len - 16);
  if (prompt) next.prompt = prompt;
  next.seed = state.request.seed;
  next.steering.interventions = interventions;
  replace(next);
  pushes().forEach(addRead);
  replace(state.request);
  run();
}

export function drawPresets(run, fail) {
  const fit = EXAMPLES.filter(([, , names]) => has(...names));
  if (served.saes.length && served.model.id === "bundled") fit.push(["One feature", "a single SAE feature about football", [], oneFeature]);
  const list = fit.length ? fit : served.attributes.slice(0, 6).map(({ name }) => [name, `push ${name}`, [name], () => [pushOfAttribute(name)]]);
  at("presets").replaceChildren(
    ...list.map(([name, title, , make, prompt]) =>
      h("button", { type: "button", class: "chip", title, onclick: () => take(make, prompt, run).catch(fail) }, name)),
  );
}
