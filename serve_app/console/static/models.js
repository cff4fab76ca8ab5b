// The models: their state and why, replicas, load, what waits, and the last ten minutes.

import { Component, html } from "./vendor/htm-preact.js";
import { ask } from "./api.js";
import { number, plural, seconds } from "./format.js";
import { Sparkline } from "./sparkline.js";
import { stateOf } from "./state.js";
import { Badge, Confirm, Empty, Memo, Problem } from "./widgets.js";

const SLOTS = 120;

const ACTIONS = {
  wake: { label: "Wake", path: (name) => `api/models/${encodeURIComponent(name)}/wake`, done: "is waking up" },
  park: {
    label: "Park",
    path: (name) => `api/models/${encodeURIComponent(name)}/park`,
    done: "is leaving its memory",
    ask: (name) => [
      `${name} leaves its memory once its running requests have ended, so that another model of its pool can have it.`,
      "The next request for it waits until it is back.",
    ],
  },
};

export class Models extends Component {
  constructor(props) {
    super(props);
    this.state = { asked: null, told: "", error: null, busy: "" };
    this.onPress = (action, name) => this.press(action, name);
  }

  async act(action, name) {
    this.setState({ asked: null, busy: `${action} ${name}`, error: null, told: "" });
    const path = action === "reload" ? "api/reload" : ACTIONS[action].path(name);
    try {
      const answer = await (await ask(path, { method: "POST" })).json().catch(() => ({}));
      this.setState({ told: action === "reload" ? reloaded(answer) : answer.message || `${name} ${ACTIONS[action].done}.` });
    } catch (error) {
      this.setState({ error });
    }
    this.setState({ busy: "" });
  }

  press(action, name) {
    if (action === "reload" || ACTIONS[action].ask) this.setState({ asked: { action, name } });
    else this.act(action, name);
  }

  render({ state }, { asked, told, error, busy }) {
    return html`<div class="bar-row">
        <h2>Models</h2>
        <span class="dim grow">${plural(state.models.length, "model")}; each line shows ten minutes</span>
        ${state.access.is_admin && !mayReload(state.access) && html`<span class="dim">Only an admin of all models may reload the config.</span>`}
        ${mayReload(state.access) &&
        html`<button type="button" disabled=${busy !== ""} onClick=${() => this.press("reload", "")}>Reload the config</button>`}
      </div>
      <p role="status" class=${told ? "told pre" : "told none"}>${told}</p>
      <${Problem} error=${error} />
      ${state.models.length === 0 && html`<${Empty}>No model is deployed.<//>`}
      <div class="models">
        ${state.models.map((model) => html`<${Memo} key=${model.name} model=${model} series=${state.traffic.models[model.name]}
          interval=${state.traffic.interval_s} busy=${busy} press=${this.onPress} draw=${Model} />`)}
      </div>
      ${asked && html`<${Question} ...${asked} onDone=${(yes) => (yes ? this.act(asked.action, asked.name) : this.setState({ asked: null }))} />`}`;
  }
}

// Older servers tell the role alone.
function mayReload({ may_reload: may, is_admin: isAdmin }) {
  return may ?? isAdmin;
}

function reloaded({ file, node, changes = [] }) {
  const where = file ? ` ${file}${node ? ` on ${node}` : ""}` : "";
  const ending = changes.length ? `, and this changes:\n${changes.join("\n")}` : ", and nothing changes.";
  return `The config file${where} was read again${ending}`;
}

function Question({ action, name, onDone }) {
  if (action === "reload") {
    return html`<${Confirm} title="Reload the config?" action="Reload" onDone=${onDone} text=${[
      "The config file that the server was started with is read again, checked, and deployed.",
      "Models whose part of the file has changed are replaced, new ones start, and those that the file does not name any more stop. All others keep running.",
      "A file with a mistake changes nothing, and its mistakes are shown here.",
    ]} />`;
  }
  return html`<${Confirm} title=${`Park ${name}?`} action="Park" text=${ACTIONS[action].ask(name)} onDone=${onDone} />`;
}

function Model({ model, series = {}, interval, busy, press }) {
  const actions = (model.can || []).filter((action) => action in ACTIONS);
  return html`<article class="panel model" aria-label=${model.name}>
    <div class="identity">
      <header class="row">
        <h3>${model.name}</h3>
        <${Badge} state=${stateOf(model)} />
        ${actions.map((action) => html`<button type="button" class="small" disabled=${busy !== ""}
          aria-label=${`${ACTIONS[action].label} ${model.name}`} onClick=${() => press(action, model.name)}>${ACTIONS[action].label}</button>`)}
      </header>
      <p class="dim">${[model.backend, model.model, model.parent && `an adapter of ${model.parent}`].filter(Boolean).join(", ")}</p>
      ${model.message && html`<p class="why">${model.message}</p>`}
      ${model.missing && html`<p class="why">${model.missing}</p>`}
      ${wait(model) && html`<p class="note">${wait(model)}</p>`}
      <dl class="facts-row">
        ${fact("Replicas", `${model.running}/${model.wanted}`)}
        ${fact("Load", model.load === null ? "–" : model.load.toFixed(2))}
        ${fact("Active", number(model.active))}
        ${fact("Waiting", number(model.waiting))}
        ${fact("Held", number(model.held))}
      </dl>
    </div>
    <div class="charts">${charts(series, interval)}</div>
    ${model.replicas.length > 0 && html`<${Replicas} model=${model} />`}
  </article>`;
}

// Returns when a model can answer, as far as that is known.
function wait(model) {
  const left = model.ready_in_s ?? null;
  if (left === null) return model.state === "loading" ? "It takes longer than was estimated." : "";
  return stateOf(model) === "parked" ? `It can answer about ${seconds(left)} after a request has come.` : `It will be ready in about ${seconds(left)}.`;
}

function fact(name, value) {
  return html`<div><dt>${name}</dt><dd class="num">${value}</dd></div>`;
}

// The last slot is not over, so rates leave it out, but counts of what is there now have it.
function charts(series, interval) {
  const over = (name) => (series[name] || []).slice(0, -1);
  const requests = over("requests").map((count) => count / interval);
  const errors = over("errors");
  const tokens = over("tokens_per_s");
  const [p50, p95] = [over("ttft_p50_s"), over("ttft_p95_s")];
  const [waiting, active] = [series.waiting || [], series.active || []];
  const all = over("requests").reduce((sum, count) => sum + count, 0);
  const failed = errors.reduce((sum, count) => sum + count, 0);
  const share = all ? `${((100 * failed) / all).toFixed(failed && failed < all / 10 ? 1 : 0)} %` : "–";
  return [
    chart("Requests/s", number(last(requests)), [requests], `highest ${number(highest(requests))}`, 1),
    chart("Errors", String(failed), [errors], `${share} of requests`, 1),
    chart("Tokens/s", number(last(tokens)), [tokens], `highest ${number(highest(tokens))}`, 1),
    chart("First token", seconds(lastKnown(p50)), [p50, p95], `95 %: ${seconds(lastKnown(p95))}`, 0),
    chart("Active", number(last(active)), [active, waiting], `waiting ${number(last(waiting))}`, 1),
  ];
}

function chart(title, value, lines, note, least) {
  const told = `${title} over ten minutes: ${value} now, ${note}.`;
  return html`<figure>
    <figcaption><span class="dim">${title}</span><strong class="num">${value}</strong></figcaption>
    <${Sparkline} lines=${lines} slots=${SLOTS} told=${told} least=${least} />
    <span class="note num">${note}</span>
  </figure>`;
}

function last(line) {
  return line.length ? (line[line.length - 1] ?? null) : null;
}

function lastKnown(line) {
  const known = line.filter((value) => value !== null && value !== undefined);
  return known.length ? known[known.length - 1] : null;
}

function highest(line) {
  return line.length ? Math.max(0, ...line.filter((value) => value !== null)) : null;
}

function Replicas({ model }) {
  return html`<details>
    <summary>${plural(model.replicas.length, "replica")}</summary>
    <div class="scroll" tabindex="0" role="region" aria-label=${`Replicas of ${model.name}`}>
      <table class="grid">
        <thead><tr>
          <th scope="col">Replica</th><th scope="col">State</th><th scope="col">Node</th><th scope="col" class="num">Process</th>
          <th scope="col" class="num">Load</th><th scope="col">Residency</th>
        </tr></thead>
        <tbody>
          ${model.replicas.map(
            (replica) => html`<tr>
              <th scope="row">${replica.replica}</th>
              <td><${Badge} state=${replica.state} /></td>
              <td>${replica.node}</td>
              <td class="num">${replica.pid ?? "–"}</td>
              <td class="num">${replica.load === null ? "–" : replica.load.toFixed(2)}</td>
              <td>${residency(replica.residency)}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
  </details>`;
}

function residency(found) {
  if (!found) return "–";
  const back = found.ready_in_s ? `, back in about ${seconds(found.ready_in_s)}${found.is_guess ? " (a guess)" : ""}` : "";
  return `${found.state} in pool ${found.pool}${back}`;
}
