// Elements made and numbers written.

const SVG = "http://www.w3.org/2000/svg";

// Fields that begin with "on" are listeners; those that an element has as properties are set as such, others are attributes.
function dress(made, fields, children) {
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.setAttribute("class", value);
    else if (name in made && made.namespaceURI !== SVG && !name.includes("-")) made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((one) => one !== null && one !== undefined && one !== false));
  return made;
}

export const h = (tag, fields = {}, ...children) => dress(document.createElement(tag), fields, children);
export const s = (tag, fields = {}, ...children) => dress(document.createElementNS(SVG, tag), fields, children);
export const at = (id) => document.getElementById(id);

export const options = (names, chosen) =>
  names.map((one) => {
    const [value, text] = Array.isArray(one) ? one : [one, one];
    return h("option", { value, textContent: text, selected: value === chosen });
  });

// Three digits that count, without an exponent for what a person reads.
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

export const percent = (value) => `${number(100 * value, 2)} %`;

export const listed = (words) =>
  words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words[words.length - 1]}`;

// Calls `act` once the calls have paused.
export function later(act, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), milliseconds);
  };
}
