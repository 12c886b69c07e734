// The server's routes: one way to ask, one to read a stream. The key is kept for this tab alone.

const ROOT = new URL("../", import.meta.url);
const KEY = "steerserve.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const address = (path) => new URL(path, ROOT).href;

export async function ask(path, body, { method, signal } = {}) {
  const headers = { "content-type": "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const sent = body === undefined ? undefined : JSON.stringify(body);
  const answer = await fetch(address(path), { method: method ?? (sent ? "POST" : "GET"), headers, body: sent, signal });
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({ error: { message: `the server answered ${answer.status}` } }));
  // Of a body, the message begins with the field.
  const named = !error.param || error.message.startsWith(error.param);
  throw new Refused(answer.status, named ? error.message : `${error.param}: ${error.message}`);
}

export const json = async (path, body, how) => (await ask(path, body, how)).json();

// Server-sent events; each is one line of JSON, and [DONE] ends them.
export async function* frames(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
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

const featurePath = (sae, index) => `v1/features/${encodeURIComponent(sae)}/${index}`;
const known = new Map(); // features that were looked up, by path

export function feature(sae, index) {
  const path = featurePath(sae, index);
  if (!known.has(path)) {
    const found = json(path);
    found.catch(() => known.delete(path));
    known.set(path, found);
  }
  return known.get(path);
}

export const search = (words, limit = 8, sae = "") =>
  json(`v1/features?q=${encodeURIComponent(words)}&limit=${limit}${sae ? `&sae=${encodeURIComponent(sae)}` : ""}`);

const attributes = new Map();

export function attribute(name) {
  if (!attributes.has(name)) {
    const found = json(`v1/attributes/${name.split("/").map(encodeURIComponent).join("/")}`);
    found.catch(() => attributes.delete(name));
    attributes.set(name, found);
  }
  return attributes.get(name);
}
