// Find what can be pushed: attributes and vectors by name, features by what they stand for.

import { address, search } from "./api.js";
import { at, h, later, number } from "./dom.js";
import { add, addRead, changed, pushOfAttribute, pushOfFeature, served } from "./state.js";

let asked = 0;

function found(name, about, push, link) {
  const title = link ? h("a", { href: link }, name) : h("span", {}, name);
  const read = push.vector ? null : h("button", { type: "button", class: "quiet", "aria-label": `read ${name}`, onclick: () => {
    addRead(push);
    changed("all");
  } }, "Read");
  const button = h("button", { type: "button", class: "small", "aria-label": `push ${name}`, onclick: () => add(push) }, "Push");
  return h("li", {}, h("div", {}, title, h("small", {}, about)), read, button);
}

function named(words) {
  const fits = ({ name }) => words.toLowerCase().split(/\s+/).every((one) => name.toLowerCase().includes(one));
  return [
    ...served.attributes.filter(fits).map((one) => found(one.name, `attribute · ${number(one.strength)} ${one.unit}`, pushOfAttribute(one.name))),
    ...served.vectors.filter(fits).map((one) => found(one.name, "vector", { vector: { name: one.name }, strength: 1 })),
  ];
}

const features = later(async (words) => {
  const mine = ++asked;
  try {
    const { data, total } = await search(words);
    if (mine !== asked) return;
    at("found").replaceChildren(
      ...named(words),
      ...data.map(({ sae, index, label, density }) =>
        found(label ?? `feature ${index}`, `${sae} ${index} · active on ${number(100 * (density ?? 0), 2)} % of tokens`, pushOfFeature(sae, index),
          address(`playground/feature?sae=${encodeURIComponent(sae)}&index=${index}`))),
    );
    at("found-count").textContent = total ? `${total} features` : "no feature";
  } catch (error) {
    at("found-count").textContent = error.message;
  }
}, 180);

export function openSearch() {
  at("find").oninput = () => {
    const words = at("find").value.trim();
    asked += 1;
    at("found").replaceChildren(...named(words));
    at("found-count").textContent = "";
    if (words && served.saes.length) features(words);
  };
  at("found").replaceChildren(...named(""));
}
