// What one stream of events has told, kept so that every step of it can be shown again.

export class Run {
  constructor(length, steps) {
    this.length = length; // positions of the response
    this.planned = steps;
    this.events = [];
    this.traces = []; // in the order of their steps
    this.steps = 0; // that have ended
    this.text = null;
    this.receipt = null;
    this.done = null;
  }

  take(frame) {
    if (frame.error) throw new Error(frame.error.message);
    if (frame.index > 0 || frame.baseline) return;
    if (frame.type === "committed" || frame.type === "revised") {
      this.events.push(frame);
      this.steps = Math.max(this.steps, frame.step + 1);
    }
    if (frame.type === "trace") this.traces.push(frame);
    if (frame.type === "steered") this.steered = [...(this.steered ?? []), frame];
    if (frame.type === "receipt") this.receipt = frame.steering;
    if (frame.type === "done") {
      this.done = frame;
      this.text = frame.text;
      this.steps = Math.max(this.steps, frame.denoising_steps);
    }
  }

  // The tokens after `time` steps: by position, the text and the step at which it came.
  tokens(time) {
    const found = new Map();
    for (const { type, step, positions, token_texts: texts } of this.events) {
      if (step >= time) continue;
      positions.forEach((place, i) => (type === "committed" ? found.set(place, { text: texts[i], step }) : found.delete(place)));
    }
    return found;
  }

  // What the last reading up to that time says of each position; null where none was made.
  reading(name, time) {
    let found = null;
    for (const one of this.traces) {
      if (one.step > time) break;
      if (one.positions?.[name]) found = one;
    }
    return found && { step: found.step, values: found.positions[name] };
  }

  // The mean over the response at each step: points of step and value.
  curve(name) {
    return this.traces.filter((one) => name in one.values).map((one) => [one.step, one.values[name]]);
  }

  largest(name) {
    let most = 0;
    for (const one of this.traces) for (const value of one.positions?.[name] ?? []) most = Math.max(most, Math.abs(value));
    return most;
  }
}
