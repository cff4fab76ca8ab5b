// What has happened, the newest first.

import { Component, html } from "./vendor/htm-preact.js";
import { clock, date, plural } from "./format.js";
import { Badge, Empty, Filter } from "./widgets.js";

export class Events extends Component {
  constructor(props) {
    super(props);
    this.state = { kind: "", model: "" };
  }

  render({ state }, { kind, model }) {
    const kinds = [...new Set(state.events.map((event) => event.kind))].sort();
    const names = [...new Set(state.events.map((event) => event.model).filter(Boolean))].sort();
    const shown = state.events
      .filter((event) => (!kind || event.kind === kind) && (!model || event.model === model))
      .reverse();
    return html`<div class="bar-row">
        <h2>Events</h2>
        <${Filter} label="Kind" value=${kind} options=${kinds} onChange=${(chosen) => this.setState({ kind: chosen })} />
        <${Filter} label="Model" value=${model} options=${names} onChange=${(chosen) => this.setState({ model: chosen })} />
        <span class="dim">${shown.length} of ${plural(state.events.length, "event")}</span>
      </div>
      ${shown.length === 0
        ? html`<${Empty}>${state.events.length ? "No event is like this." : "Nothing has happened since the router started."}<//>`
        : html`<ol class="panel events">${shown.map((event) => html`<${Line} key=${event.id} event=${event} />`)}</ol>`}`;
  }
}

export function Line({ event }) {
  return html`<li>
    <time class="num dim" datetime=${new Date(1000 * event.time).toISOString()} title=${date(event.time)}>${clock(event.time)}</time>
    <${Badge} state=${event.kind} />
    <span class="name" title=${event.model}>${event.model}</span>
    <span class="text">${event.text}</span>
  </li>`;
}
