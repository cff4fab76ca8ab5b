// The page as a whole: who is signed in, the connection, the tabs, and the line of sums above them.

import { Component, html, render } from "./vendor/htm-preact.js";
import { setKey, hasKey } from "./api.js";
import { Patterns } from "./bar.js";
import { Events } from "./events.js";
import { bytes, clock, number } from "./format.js";
import { isGpu, totals } from "./layout.js";
import { Live } from "./live.js";
import { Memory, keyed } from "./memory.js";
import { Models } from "./models.js";
import { Playground } from "./playground.js";
import { Requests } from "./requests.js";
import { stateOf, withDelta } from "./state.js";
import { WhatIf } from "./what_if.js";

const TABS = [
  ["memory", "Memory", Memory],
  ["models", "Models", Models],
  ["playground", "Playground", Playground],
  ["what-if", "What if", WhatIf],
  ["requests", "Requests", Requests],
  ["events", "Events", Events],
];
// What was typed into these stays while another tab is open.
const KEPT = new Set(["playground", "what-if"]);
const THEMES = { system: "System colours", light: "Light", dark: "Dark" };
const THEME = "serve-app-theme";
// Events that are read out at one time.
const READ_OUT = 3;

class App extends Component {
  constructor(props) {
    super(props);
    const theme = remembered();
    setTheme(theme);
    this.state = { tab: tabOfUrl(), seen: null, link: { isUp: false, since: null, error: null }, refusal: null, note: "", news: "", theme };
    this.live = new Live({
      onState: (seen) => this.start(seen),
      onDelta: (delta) => this.take(delta),
      onLink: (link) => this.setState({ link }),
      onRefused: (refusal) => this.refused(refusal),
    });
    this.onHash = () => this.setState({ tab: tabOfUrl() });
  }

  componentDidMount() {
    window.addEventListener("hashchange", this.onHash);
    this.live.start();
  }

  componentWillUnmount() {
    window.removeEventListener("hashchange", this.onHash);
    this.live.stop();
  }

  // The scripts of this page are those of the first server that it has seen.
  start(seen) {
    this.version ??= seen.version;
    const isStale = seen.version !== this.version;
    this.setState({ seen: { ...seen, nodes: keyed(seen.nodes) }, refusal: null, note: "", isStale });
  }

  // What the server has told is dropped. What a person has typed or asked stays for after the sign-in.
  refused(refusal) {
    const { seen } = this.state;
    const wasIn = seen !== null && !seen.isEmptied;
    const isOfKey = refusal.status === 401 && hasKey();
    const note = !isOfKey ? "" : wasIn ? "This key is not valid any more." : "The server does not accept this key.";
    if (isOfKey) setKey(null);
    this.setState({ refusal, note, seen: seen && emptied(seen), news: "" });
  }

  take(delta) {
    if (this.state.seen === null || this.state.seen.isEmptied) return;
    if (delta.nodes) keyed(delta.nodes);
    const known = Math.max(0, ...this.state.seen.events.map((event) => event.id));
    const news = (delta.events || []).filter((event) => event.id > known).map((event) => event.text);
    this.setState({ seen: withDelta(this.state.seen, delta) });
    if (!news.length) return;
    const more = news.length > READ_OUT ? [`There are ${news.length - READ_OUT} more events.`] : [];
    this.setState({ news: [...news.slice(-READ_OUT), ...more].join(" ") });
  }

  signIn(key) {
    setKey(key);
    this.retry();
  }

  retry() {
    this.live.stop();
    this.setState({ refusal: null, link: { isUp: false, since: null, error: null } });
    this.live.start();
  }

  signOut() {
    setKey(null);
    this.setState({ seen: null, note: "", news: "" });
    this.retry();
  }

  open(tab) {
    history.replaceState(null, "", `#${tab}`);
    this.setState({ tab });
    document.getElementById(`tab-${tab}`).scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  render(_, { tab, seen, link, refusal, note, news, theme, isStale }) {
    const isIn = seen !== null && !seen.isEmptied;
    return html`<${Patterns} />
      <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
      <header class="top">
        <h1>serve-app <span class="dim">${isIn ? seen.version : "console"}</span></h1>
        ${isIn && html`<${Sums} state=${seen} />`}
        <span class="grow"></span>
        ${refusal === null && html`<${Link} link=${link} isIn=${isIn} />`}
        ${isIn && seen.access.keys && html`<span class="dim who">${seen.access.key}${seen.access.is_admin ? " (admin)" : ""}</span>`}
        ${hasKey() && isIn && html`<button type="button" class="small" onClick=${() => this.signOut()}>Sign out</button>`}
        <label class="inline theme"><span class="hidden">Colours</span>
          <select value=${theme} onChange=${(event) => this.paint(event.target.value)}>
            ${Object.entries(THEMES).map(([name, title]) => html`<option value=${name}>${title}</option>`)}
          </select></label>
      </header>
      <div class="hidden" role="log" aria-live="polite" aria-label="New events">${news}</div>
      ${isIn && html`<${Tabs} tab=${tab} open=${(name) => this.open(name)} state=${seen} />`}
      <main id="main" tabindex="-1">
        ${refusal && html`<${Refused} refusal=${refusal} note=${note} hasDrafts=${seen !== null} signIn=${(key) => this.signIn(key)}
          retry=${() => this.retry()} forget=${() => this.signOut()} />`}
        ${isIn && isStale && html`<${Stale} />`}
        ${!refusal && !isIn && link.since === null && html`<p class="empty">The page is connecting.</p>`}
        ${!refusal && !link.isUp && (isIn || link.since !== null) && html`<${Down} link=${link} />`}
        ${seen && TABS.map(([name, , Section]) => html`<div key=${name} id=${`panel-${name}`} role="tabpanel" aria-labelledby=${`tab-${name}`} hidden=${!isIn || name !== tab}>
          ${((isIn && name === tab) || KEPT.has(name)) && html`<${Section} state=${seen} />`}</div>`)}
      </main>`;
  }

  paint(theme) {
    setTheme(theme);
    this.setState({ theme });
  }
}

// Returns a state without what the server has told, for sections that keep what was typed into them.
function emptied(seen) {
  return { ...seen, isEmptied: true, nodes: [], models: [], events: [], requests: [], traffic: { ...seen.traffic, models: {} } };
}

// The address keeps naming the tab, so the link moves the focus itself.
function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

function tabOfUrl() {
  const name = location.hash.slice(1);
  return TABS.some(([each]) => each === name) ? name : TABS[0][0];
}

// Only the colours are remembered in the browser. A browser may refuse to.
function remembered() {
  try {
    const theme = localStorage.getItem(THEME);
    return theme !== null && theme in THEMES ? theme : "system";
  } catch {
    return "system";
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(THEME, theme);
  } catch {
    // The choice lasts as long as the page.
  }
}

function Tabs({ tab, open, state }) {
  const failed = state.models.filter((model) => model.state === "failed").length;
  const move = (event) => {
    const at = TABS.findIndex(([name]) => name === tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1 + TABS.length, Home: 0, End: TABS.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const [name] = TABS[to % TABS.length];
    open(name);
    document.getElementById(`tab-${name}`).focus();
  };
  return html`<nav class="sections" aria-label="Sections"><div class="tabs" role="tablist" aria-label="Sections" onKeyDown=${move}>
    ${TABS.map(([name, title]) => html`<button type="button" role="tab" id=${`tab-${name}`} aria-controls=${`panel-${name}`}
      aria-selected=${String(name === tab)} tabindex=${name === tab ? 0 : -1} onClick=${() => open(name)}>${title}
      ${name === "models" && failed > 0 && html`<span class="tag warn">${failed} failed</span>`}</button>`)}
  </div></nav>`;
}

// What matters of the whole cluster, in one line.
function Sums({ state }) {
  const devices = state.nodes.flatMap((node) => node.devices);
  const gpus = devices.filter(isGpu);
  const sum = totals(gpus.length ? gpus : devices);
  const ready = state.models.filter((model) => stateOf(model) === "ready").length;
  const add = (name) => Object.values(state.traffic.models).reduce((all, series) => all + ((series[name] || []).slice(-2)[0] ?? 0), 0);
  const waiting = state.models.reduce((all, model) => all + (model.waiting || 0) + (model.held || 0), 0);
  const facts = [
    ["Models ready", `${ready}/${state.models.length}`],
    [gpus.length ? "GPU memory used" : "Memory used", `${bytes(sum.used)} of ${bytes(sum.total)}`],
    ["Requests/s", number(add("requests") / state.traffic.interval_s)],
    ["Tokens/s", number(add("tokens_per_s"))],
    ["Waiting", number(waiting)],
  ];
  return html`<dl class="sums">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd class="num">${value}</dd></div>`)}</dl>`;
}

function Link({ link, isIn }) {
  if (link.isUp && isIn) return html`<span class="link good" role="status">Live</span>`;
  return html`<span class="link bad" role="status">${link.since === null ? "Connecting" : `Not connected since ${clock(link.since / 1000)}`}</span>`;
}

function Down({ link }) {
  return html`<div class="problem"><strong>Not connected${link.since === null ? "" : ` since ${clock(link.since / 1000)}`}.</strong>
    <p>${whyDown(link.error)} The page tries again by itself, and shows what it knew last.</p></div>`;
}

// An error without a code is not the console's own, but that of a proxy before it.
function whyDown(error) {
  if (!error?.status) return "The server does not answer.";
  if (error.status === 404 && error.code === null) return "The server has no console at this address now. Its router may be restarting.";
  return error.message;
}

function Stale() {
  return html`<div class="problem" role="alert"><strong>The server was updated. Reload this page.</strong>
    <p>Until then, figures may be missing or wrong. Conversations of the playground end with a reload.</p>
    <button type="button" onClick=${() => location.reload()}>Reload</button></div>`;
}

// The form for a key, or why there is nothing to see.
class Refused extends Component {
  send(event) {
    event.preventDefault();
    const field = event.target.elements.key;
    const key = field.value.trim();
    field.value = "";
    if (key) this.props.signIn(key);
  }

  render({ refusal, note, hasDrafts, retry, forget }) {
    if (refusal.status !== 401) {
      return html`<section class="panel sign-in"><h2>${refusal.code === "console_off" ? "The console is off" : "The server refuses this page"}</h2>
        <p class="pre">${refusal.message}</p><button type="button" onClick=${retry}>Try again</button></section>`;
    }
    return html`<section class="panel sign-in">
      <h2>Sign in</h2>
      <p>This server needs an API key. The page keeps it in memory until you sign out, reload or close it.</p>
      ${note && html`<p class="problem" role="alert">${note}</p>`}
      <form onSubmit=${(event) => this.send(event)}>
        <label class="wide">API key<input name="key" type="password" autocomplete="off" required /></label>
        <button type="submit" class="primary">Sign in</button>
      </form>
      ${hasDrafts && html`<p class="note">What you have typed and your conversations stay in this tab for after the sign-in.</p>
        <button type="button" onClick=${forget}>Forget them</button>`}
    </section>`;
  }
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
