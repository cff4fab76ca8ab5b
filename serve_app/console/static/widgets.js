// Small parts that several sections use.

import { Component, html, useEffect, useRef, useState } from "./vendor/htm-preact.js";

// Draws its child again only if one of its properties is another object.
export class Memo extends Component {
  shouldComponentUpdate(next) {
    const names = Object.keys(next).filter((name) => name !== "children" && name !== "draw");
    return names.some((name) => next[name] !== this.props[name]);
  }
  render() {
    return this.props.draw(this.props);
  }
}

// The shapes tell states apart without colours.
const SHAPES = {
  good: html`<circle cx="6" cy="6" r="5" />`,
  busy: html`<path d="M6 1a5 5 0 0 1 0 10z" /><circle class="line" cx="6" cy="6" r="4.3" />`,
  idle: html`<circle class="line" cx="6" cy="6" r="4.3" />`,
  warn: html`<path d="M6 .8 11.500 11H.5z" />`,
  bad: html`<path d="m2 2 8 8m0-8-8 8" class="line thick" />`,
};

export const TONES = {
  ready: "good",
  loading: "busy",
  stopping: "busy",
  asleep: "idle",
  failed: "bad",
  ok: "good",
  running: "busy",
  refused: "warn",
  left: "idle",
  lost: "bad",
  gone: "bad",
  resumed: "warn",
  retried: "warn",
  RUNNING: "good",
  STARTING: "busy",
  UPDATING: "busy",
  STOPPING: "busy",
  resident: "good",
  parked: "idle",
  waking: "busy",
  draining: "busy",
};

export function Badge({ state, tone }) {
  const shape = tone || TONES[state] || "idle";
  return html`<span class=${`badge ${shape}`}>
    <svg width="12" height="12" viewBox="0 0 12 12" aria-hidden="true">${SHAPES[shape]}</svg>${state}
  </span>`;
}

// A group of buttons of which one is chosen.
export function Choice({ label, value, options, onChange }) {
  return html`<div class="choice" role="group" aria-label=${label}>
    ${options.map(
      ([key, text]) =>
        html`<button type="button" aria-pressed=${String(key === value)} onClick=${() => onChange(key)}>${text}</button>`,
    )}
  </div>`;
}

// Asks which of some values entries must have, or all of them for an empty text.
export function Filter({ label, value, options, onChange }) {
  return html`<label class="inline">${label}
    <select value=${value} onChange=${(event) => onChange(event.target.value)}>
      <option value="">all</option>
      ${options.map((name) => html`<option value=${name}>${name}</option>`)}
    </select>
  </label>`;
}

export function Copy({ text, label = "Copy" }) {
  const [told, setTold] = useState("");
  const copy = async () => {
    setTold((await copied(text)) ? "Copied" : "Not copied");
    setTimeout(() => setTold(""), 2000);
  };
  return html`<button type="button" class="small" onClick=${copy}><span aria-live="polite">${told || label}</span></button>`;
}

// Returns whether the clipboard has the text. Browsers offer their clipboard to pages of https and localhost only, so
// other pages select the text and copy that.
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const isDone = document.execCommand("copy");
    area.remove();
    return isDone;
  }
}

// A dialog of the browser's own, which keeps the focus and closes by Escape.
export function Dialog({ title, onClose, children }) {
  const box = useRef(null);
  useEffect(() => {
    const before = document.activeElement;
    box.current.showModal();
    return () => before?.focus?.();
  }, []);
  return html`<dialog ref=${box} aria-labelledby="dialog-title" onClose=${onClose}>
    <h2 id="dialog-title">${title}</h2>
    ${children}
  </dialog>`;
}

// Asks before something is done. `onDone(true)` is called if it shall be.
export function Confirm({ title, text, action, onDone }) {
  return html`<${Dialog} title=${title} onClose=${() => onDone(false)}>
    ${text.map((each) => html`<p>${each}</p>`)}
    <div class="row end">
      <button type="button" onClick=${() => onDone(false)}>Cancel</button>
      <button type="button" class="primary" onClick=${() => onDone(true)}>${action}</button>
    </div>
  <//>`;
}

export function Problem({ error }) {
  if (!error) return null;
  const which = [error.status, error.code].filter(Boolean).join(", ");
  return html`<div class="problem" role="alert">
    <strong>${which ? `Error ${which}` : "Error"}</strong>
    <p class="pre">${error.message}</p>
  </div>`;
}

export function Empty({ children }) {
  return html`<p class="empty">${children}</p>`;
}

// Returns whether the reader has a small or a touched screen rather than a keyboard and a pointer.
export function isHandheld() {
  return matchMedia("(max-width: 720px), (hover: none)").matches;
}

// Offers a text as a file.
export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
