// The last requests, with their timings and how they ended.

import { Component, html } from "./vendor/htm-preact.js";
import { clock, date, milliseconds, number, plural } from "./format.js";
import { Badge, Empty, Filter } from "./widgets.js";

const OUTCOMES = ["running", "ok", "refused", "failed", "left"];

export class Requests extends Component {
  constructor(props) {
    super(props);
    this.state = { model: "", outcome: "" };
  }

  render({ state }, { model, outcome }) {
    const names = [...new Set(state.requests.map((request) => request.model))].sort();
    const shown = state.requests
      .filter((request) => (!model || request.model === model) && (!outcome || request.outcome === outcome))
      .reverse();
    return html`<div class="bar-row">
        <h2>Requests</h2>
        <${Filter} label="Model" value=${model} options=${names} onChange=${(chosen) => this.setState({ model: chosen })} />
        <${Filter} label="Outcome" value=${outcome} options=${OUTCOMES} onChange=${(chosen) => this.setState({ outcome: chosen })} />
        <span class="dim">${shown.length} of ${plural(state.requests.length, "request")}</span>
      </div>
      <p class="note">${state.access.keeps_prompts ? "Prompts are kept, because console_keeps_prompts is on." : "Prompts are not kept."} ${leftOut(state.requests_left_out)}</p>
      ${shown.length === 0
        ? html`<${Empty}>${state.requests.length ? "No request is like this." : "No request has come since the router started."}<//>`
        : html`<div class="panel scroll" tabindex="0" role="region" aria-label="Requests">
            <table class="grid">
              <thead><tr>
                <th scope="col" class="num">Time</th><th scope="col">Model</th><th scope="col">Outcome</th><th scope="col" class="num">Status</th>
                <th scope="col">Path</th><th scope="col">Key</th><th scope="col" class="num">Queue</th>
                <th scope="col" class="num">First token</th><th scope="col" class="num">Total</th><th scope="col" class="num">Prompt</th>
                <th scope="col" class="num">Answer</th><th scope="col">Taken up again</th><th scope="col">Id</th>
              </tr></thead>
              <tbody>${shown.map((request) => html`<${Row} key=${request.id} request=${request} />`)}</tbody>
            </table>
          </div>`}`;
  }
}

function Row({ request }) {
  return html`<tr>
    <td class="num" title=${date(request.time)}>${clock(request.time)}</td>
    <th scope="row" title=${request.model}>${request.model}</th>
    <td><${Badge} state=${request.outcome} tone=${request.outcome === "failed" ? "bad" : ""} />${request.error_code ? html` <span class="dim">${request.error_code}</span>` : ""}</td>
    <td class="num">${request.status ?? "–"}</td>
    <td class="path">${request.path}${request.streamed ? html` <span class="tag">stream</span>` : ""}
      ${request.prompt !== undefined && request.prompt !== null && html`<details><summary>prompt</summary><p class="pre prompt">${request.prompt}</p></details>`}</td>
    <td>${request.key ?? "–"}</td>
    <td class="num">${milliseconds(request.queue_ms)}</td>
    <td class="num">${milliseconds(request.first_ms)}</td>
    <td class="num">${milliseconds(request.total_ms)}</td>
    <td class="num">${number(request.prompt_tokens)}</td>
    <td class="num">${number(request.completion_tokens)}</td>
    <td>${again(request)}</td>
    <td class="id" title=${request.request_id}>${request.request_id}</td>
  </tr>`;
}

// Says that more requests came than the page was told of.
function leftOut(count) {
  if (!count) return "";
  return `${plural(count, "request")} came faster than a page is told of them, and ${count === 1 ? "is" : "are"} not shown.`;
}

function again({ retries, resumes }) {
  const texts = [];
  if (retries) texts.push(html`<span class="tag warn">retried ${retries}×</span>`);
  if (resumes) texts.push(html`<span class="tag warn">resumed ${resumes}×</span>`);
  return texts.length ? texts : "–";
}
