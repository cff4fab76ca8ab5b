// Chats with one model, or with two beside each other.

import { Component, html } from "./vendor/htm-preact.js";
import { asCurl, asPython, emptyAnswer, messagesOf, requestOf, speedOf, stream } from "./chat.js";
import { milliseconds, number, plural } from "./format.js";
import { stateOf } from "./state.js";
import { Choice, Copy, Dialog, Problem, isHandheld } from "./widgets.js";

const FIELDS = [
  ["temperature", "Temperature", "0 to 2"],
  ["max_tokens", "Max tokens", "whole number"],
  ["top_p", "Top p", "0 to 1"],
  ["seed", "Seed", "whole number"],
];
const TEXTS = [
  ["system", "System prompt", ""],
  ["tools", "Tools (JSON)", '[{"type": "function", "function": {"name": "…", "parameters": {…}}}]'],
  ["response_format", "Response format (JSON)", '{"type": "json_object"}'],
  ["more", "More fields of the request (JSON)", '{"top_k": 20}'],
];

function newPane(number) {
  const parameters = { model: "", system: "", temperature: "", max_tokens: "", top_p: "", seed: "", tools: "", response_format: "", more: "" };
  return { number, parameters, turns: [], sent: null, controller: null, problem: "" };
}

export class Playground extends Component {
  constructor(props) {
    super(props);
    this.state = { count: 1, draft: "", code: null };
    this.panes = [newPane(0), newPane(1)];
    this.frame = null;
  }

  componentWillUnmount() {
    this.stop();
    cancelAnimationFrame(this.frame);
  }

  // Draws once per frame, however many pieces of answers have come.
  changed() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.setState({});
    });
  }

  shown() {
    return this.panes.slice(0, this.state.count);
  }

  stop(panes = this.panes) {
    for (const pane of panes) pane.controller?.abort();
  }

  send(event) {
    event?.preventDefault();
    const question = this.state.draft.trim();
    if (!question || this.shown().some((pane) => pane.controller)) return;
    if (!this.shown().map((pane) => this.check(pane)).every(Boolean)) return;
    this.setState({ draft: "" });
    for (const pane of this.shown()) this.run(pane, question);
  }

  check(pane) {
    pane.problem = this.whyNot(pane.parameters.model) || requestOf(pane.parameters, []).problem;
    this.changed();
    return pane.problem === "";
  }

  // Returns why this model cannot be asked, or nothing.
  whyNot(model) {
    if (!model) return "Choose a model first.";
    return this.props.state.models.some(({ name }) => name === model) ? "" : `${model} is gone from this server. Choose another model.`;
  }

  async run(pane, question) {
    const turn = { question, answer: emptyAnswer(), model: pane.parameters.model };
    const messages = [...pane.turns.flatMap(messagesOf), ...(question === null ? [] : [{ role: "user", content: question }])];
    const { body } = requestOf(pane.parameters, messages);
    turn.isJson = "response_format" in body;
    pane.sent = body;
    pane.turns.push(turn);
    pane.controller = new AbortController();
    this.changed();
    await stream(body, turn.answer, pane.controller.signal, () => this.changed());
    pane.controller = null;
    this.changed();
  }

  // Shows the request that sending would make now, or the last one if nothing is to be sent.
  showCode(pane) {
    const draft = this.state.draft.trim();
    if (!draft && pane.sent) {
      this.setState({ code: { body: pane.sent, isSent: true } });
    } else if (this.check(pane)) {
      const messages = [...pane.turns.flatMap(messagesOf), { role: "user", content: draft || "Hello" }];
      this.setState({ code: { body: requestOf(pane.parameters, messages).body, isSent: false } });
    }
  }

  render({ state }, { count, draft, code }) {
    const names = state.models.map((model) => [model.name, stateOf(model)]);
    const panes = this.shown();
    for (const pane of panes) pane.parameters.model ||= firstOf(names, pane.number);
    const isBusy = panes.some((pane) => pane.controller);
    return html`<div class="bar-row">
        <h2>Playground</h2>
        <${Choice} label="Panes" value=${count} options=${[[1, "One model"], [2, "Two side by side"]]}
          onChange=${(to) => {
            this.stop(this.panes.slice(to));
            this.setState({ count: to });
          }} />
      </div>
      <div class=${count === 2 ? "panes two" : "panes"}>
        ${panes.map((pane) => html`<${Pane} key=${pane.number} pane=${pane} names=${names} owner=${this} />`)}
      </div>
      <form class="panel composer" onSubmit=${(event) => this.send(event)}>
        <label for="draft" class="hidden">Message</label>
        <textarea id="draft" rows="2" placeholder=${isHandheld() ? "Write a message." : "Write a message. Enter sends it, and Shift+Enter begins a new line."} value=${draft}
          onInput=${(event) => this.setState({ draft: event.target.value })}
          onKeyDown=${(event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && this.send(event)}></textarea>
        <button type="submit" class="primary" disabled=${isBusy || !draft.trim()}>${count === 2 ? "Send to both" : "Send"}</button>
        <button type="button" disabled=${!isBusy} onClick=${() => this.stop()}>Stop</button>
      </form>
      ${code !== null && html`<${Code} ...${code} onClose=${() => this.setState({ code: null })} />`}`;
  }
}

function firstOf(names, place) {
  const ready = names.filter(([, state]) => state === "ready" || state === "parked" || state === "asleep");
  return (ready[place] || ready[0] || names[place] || names[0] || [""])[0];
}

function Pane({ pane, names, owner }) {
  const { parameters } = pane;
  const set = (name, value) => {
    parameters[name] = value;
    pane.problem = "";
    owner.changed();
  };
  const id = (name) => `pane-${pane.number}-${name}`;
  const letter = "AB"[pane.number];
  const stays = names.some(([name]) => name === parameters.model);
  return html`<section class="panel pane" aria-label=${`Pane ${letter}`}>
    <header class="row">
      <label for=${id("model")}>Model ${letter}</label>
      <select id=${id("model")} class="grow" value=${parameters.model} onChange=${(event) => set("model", event.target.value)}>
        ${!stays && html`<option value=${parameters.model}>${parameters.model ? `${parameters.model} (gone)` : "no model"}</option>`}
        ${names.map(([name, state]) => html`<option value=${name}>${state === "ready" ? name : `${name} (${state})`}</option>`)}
      </select>
      <button type="button" class="small" onClick=${() => owner.showCode(pane)}>Code</button>
      <button type="button" class="small" disabled=${pane.turns.length === 0 || pane.controller !== null}
        onClick=${() => { pane.turns = []; pane.sent = null; owner.changed(); }}>Clear</button>
    </header>
    <details class="parameters">
      <summary>Parameters${summary(parameters)}</summary>
      <div class="fields">
        ${FIELDS.map(([name, label, hint]) => html`<label>${label}
          <input type="text" inputmode="decimal" placeholder=${hint} value=${parameters[name]} onInput=${(event) => set(name, event.target.value)} /></label>`)}
      </div>
      ${TEXTS.map(([name, label, hint]) => html`<label class="wide">${label}
        <textarea rows="2" class=${name === "system" ? "" : "mono"} placeholder=${hint} value=${parameters[name]}
          spellcheck=${name === "system"} onInput=${(event) => set(name, event.target.value)}></textarea></label>`)}
    </details>
    ${pane.problem && html`<p class="problem" role="alert">${pane.problem}</p>`}
    <${Transcript} pane=${pane} owner=${owner} letter=${letter} />
  </section>`;
}

function summary(parameters) {
  const set = Object.keys(parameters).filter((name) => name !== "model" && String(parameters[name]).trim() !== "");
  return set.length ? ` (${set.join(", ")})` : "";
}

// Follows the answer to its end, unless the reader has scrolled up.
class Transcript extends Component {
  getSnapshotBeforeUpdate() {
    const box = this.box;
    return box === null || box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  }

  componentDidUpdate(_, __, isAtEnd) {
    if (isAtEnd && this.box) this.box.scrollTop = this.box.scrollHeight;
  }

  render({ pane, owner, letter }) {
    const last = pane.turns[pane.turns.length - 1];
    return html`<div class="transcript" tabindex="0" role="region" aria-label=${`Conversation ${letter}`} ref=${(box) => (this.box = box)}>
        ${pane.turns.length === 0 && html`<p class="empty">Nothing has been said yet. The conversation is kept in this tab only.</p>`}
        ${pane.turns.map((turn, index) => html`<${Turn} key=${index} turn=${turn} pane=${pane} owner=${owner} isLast=${turn === last} />`)}
      </div>
      <p class="hidden" role="status">${last?.answer.ended ? ended(last) : ""}</p>`;
  }
}

function ended({ model, answer }) {
  if (answer.error) return `${model} answered with an error.`;
  return answer.wasStopped ? `The answer of ${model} was stopped.` : `${model} has answered.`;
}

function Turn({ turn, pane, owner, isLast }) {
  const { question, answer, model } = turn;
  const calls = answer.toolCalls.filter(Boolean);
  return html`<div class="turn">
    ${question !== null && html`<div class="said asked"><h3>You</h3><p class="pre">${question}</p></div>`}
    <div class="said">
      <h3>${model}</h3>
      ${answer.reasoning && html`<details class="reasoning" open=${!answer.content}><summary>Reasoning</summary><p class="pre">${answer.reasoning}</p></details>`}
      ${answer.content && html`<${Content} turn=${turn} />`}
      ${answer.ended === null && !answer.content && html`<p class="dim">The answer has not begun yet.</p>`}
      ${calls.map((call) => html`<${ToolCall} call=${call} isOpen=${isLast && answer.ended !== null && !pane.controller} owner=${owner} />`)}
      ${isLast && calls.length > 0 && answer.ended !== null && !pane.controller && !answer.error &&
      html`<button type="button" class="small" onClick=${() => owner.check(pane) && owner.run(pane, null)}>Send the results</button>`}
      <${Problem} error=${answer.error} />
      <${Figures} answer=${answer} />
    </div>
  </div>`;
}

// Structured output is set with line breaks once it is whole.
function Content({ turn }) {
  const { content, ended: end } = turn.answer;
  const text = turn.isJson && end !== null ? pretty(content) : null;
  return text === null ? html`<p class="pre answer">${content}</p>` : html`<pre class="answer json">${text}</pre>`;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return null;
  }
}

function ToolCall({ call, isOpen, owner }) {
  return html`<div class="tool">
    <p><span class="tag">tool call</span> <strong>${call.name}</strong></p>
    <pre>${pretty(call.arguments) ?? call.arguments}</pre>
    ${isOpen && html`<label class="wide">Result of ${call.name}
      <textarea rows="1" class="mono" value=${call.result} onInput=${(event) => { call.result = event.target.value; owner.changed(); }}></textarea></label>`}
    ${!isOpen && call.result && html`<p class="dim pre">Result: ${call.result}</p>`}
  </div>`;
}

function Figures({ answer }) {
  const { usage, timing, first, began, ended: end, finish, wasStopped } = answer;
  const speed = speedOf(answer);
  const texts = [];
  if (first !== null) texts.push(`first token after ${milliseconds(first - began)}`);
  if (end !== null) texts.push(`${milliseconds(end - began)} in all`);
  if (usage) texts.push(`${plural(usage.prompt_tokens ?? 0, "token")} of prompt, ${usage.completion_tokens ?? 0} of answer`);
  if (speed !== null) texts.push(`${number(speed)} tokens/s`);
  if (finish && finish !== "stop") texts.push(`ended by ${finish}`);
  if (wasStopped) texts.push("stopped");
  return html`${timing && html`<${Timing} timing=${timing} />`}
    ${texts.length > 0 && html`<p class="note num">${texts.join("; ")}</p>`}`;
}

const STEPS = [["router", "router"], ["queue", "queue"], ["engine", "engine until the first byte"]];

// The header `server-timing` to scale: where the time until the first byte went.
function Timing({ timing }) {
  const sum = STEPS.reduce((total, [name]) => total + (timing[name] || 0), 0);
  const text = STEPS.map(([name, label]) => `${label} ${milliseconds(timing[name] ?? null)}`).join(", ");
  let at = 0;
  return html`<div class="timing">
    <svg width="100%" height="8" role="img" aria-label=${`Time until the first byte: ${text}`}>
      <title>${text}</title>
      ${STEPS.map(([name]) => {
        const from = at;
        const share = sum ? (100 * (timing[name] || 0)) / sum : 0;
        at += share;
        return html`<rect class=${`step ${name}`} x=${`${from}%`} width=${`${share}%`} y="0" height="8" />`;
      })}
    </svg>
    <span class="note num">${STEPS.map(([name, label]) => html`<span><i class=${`key ${name}`}></i>${label} ${milliseconds(timing[name] ?? null)}</span>`)}</span>
  </div>`;
}

class Code extends Component {
  constructor(props) {
    super(props);
    this.state = { form: "curl" };
  }

  render({ body, isSent, onClose }, { form }) {
    const text = form === "curl" ? asCurl(body) : asPython(body);
    return html`<${Dialog} title="The same request as code" onClose=${onClose}>
      <div class="row">
        <${Choice} label="Form" value=${form} options=${[["curl", "curl"], ["python", "Python (openai)"]]} onChange=${(to) => this.setState({ form: to })} />
        <span class="grow"></span>
        <${Copy} text=${text} />
        <button type="button" class="small" onClick=${onClose}>Close</button>
      </div>
      <pre class="code" tabindex="0" role="region" aria-label="Code">${text}</pre>
      ${isSent && html`<p class="note">This is the request that was sent last. Write a message to see the next one.</p>`}
      <p class="note">KEY stands for your API key. A server without keys takes any.</p>
    <//>`;
  }
}
