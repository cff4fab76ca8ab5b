// The memory map: every device to scale, what each model was planned to take of it, and what it holds.

import { Component, html } from "./vendor/htm-preact.js";
import { Bar, Legend, Swatch, isOver } from "./bar.js";
import { Line } from "./events.js";
import { age, bytes, clock, plural } from "./format.js";
import { PARTS, PART_NAMES, deviceName, foreignName, isAway, isGpu, layoutOf, modelName, scaleOf, sumsOf, totals } from "./layout.js";
import { stateOf } from "./state.js";
import { Badge, Choice, Empty, Memo, isHandheld } from "./widgets.js";

// A measurement that is older than this is told to be old, in seconds.
const OLD_S = 30;
// Models that take less than this share of the width are drawn a second time, closer.
const CLOSER = 0.2;
const LAST_EVENTS = 5;
const GROWTH =
  "Of a node's memory, a model holds what its process has grown by since before the load. That includes what the C library and others keep for themselves, which no plan counts, so a small model may hold several times its plan.";

export class Memory extends Component {
  constructor(props) {
    super(props);
    this.state = { view: "map", dim: "", oneScale: false, width: 0, chosen: null, pinned: null };
    this.measure = () => {
      const cell = this.box?.querySelector(".device .cell");
      const width = cell ? Math.floor(cell.clientWidth) : 0;
      if (width && width !== this.state.width) this.setState({ width });
    };
    this.look = (device, number) => this.setState({ chosen: { device, number } });
    this.press = (device, number) =>
      this.setState(({ pinned }) => ({
        chosen: { device, number },
        pinned: pinned?.device === device && pinned.number === number ? null : { device, number },
      }));
  }

  componentDidMount() {
    this.observer = new ResizeObserver(this.measure);
    if (this.box) this.observer.observe(this.box);
    this.measure();
  }

  componentDidUpdate() {
    this.measure();
  }

  componentWillUnmount() {
    this.observer.disconnect();
  }

  render({ state }, { view, dim, oneScale, width, chosen, pinned }) {
    const nodes = state.nodes;
    const devices = nodes.flatMap((node) => node.devices);
    const names = [...new Set(devices.flatMap((device) => device.blocks.map((block) => block.model)))]
      .filter((name) => name !== null)
      .sort();
    const hasBoth = devices.some(isGpu) && devices.some((device) => !isGpu(device));
    const scales = scalesOf(devices, oneScale);
    const shown = pinned || chosen;
    const reached = this.reached(devices);
    return html`<div class="bar-row">
        <h2>Memory</h2>
        <${Choice} label="View" value=${view} options=${[["map", "Map"], ["table", "Table"]]} onChange=${(to) => this.setState({ view: to })} />
        <label class="inline">Highlight
          <select value=${dim} onChange=${(event) => this.setState({ dim: event.target.value })}>
            <option value="">all models</option>
            ${names.map((name) => html`<option value=${name}>${name}</option>`)}
          </select>
        </label>
        ${hasBoth &&
        html`<label class="inline"><input type="checkbox" checked=${oneScale}
          onChange=${(event) => this.setState({ oneScale: event.target.checked })} /> One scale for GPUs and memory</label>`}
      </div>
      ${devices.length === 0 && html`<${Empty}>No node has told its devices yet. A replica tells them once it runs.<//>`}
      ${view === "table"
        ? html`<${Table} nodes=${nodes} dim=${dim} />`
        : html`<div class="split">
            <div class="map" ref=${(box) => (this.box = box)} onKeyDown=${(event) => this.move(event)}>
              <${Legend} devices=${devices} />
              <p class="note">${scaleText(scales)}</p>
              <div class=${nodes.length > 3 ? "nodes many" : "nodes"}>
                ${nodes.map((node) => html`<${Memo} key=${node.id} node=${node} gpuScale=${scales.gpu} memoryScale=${scales.memory}
                  width=${width} dim=${dim} ...${placeOn(node, reached, "focus")} ...${placeOn(node, pinned, "chosen")}
                  old=${oldOf(node, state.time)} look=${this.look} press=${this.press} draw=${NodeCard} />`)}
              </div>
              <${Memo} nodes=${nodes} models=${state.models} draw=${Holders} />
              <${LastEvents} events=${state.events} />
            </div>
            <${Detail} nodes=${nodes} shown=${shown} isPinned=${pinned !== null} now=${state.time}
              unpin=${() => this.setState({ pinned: null })} />
          </div>`}`;
  }

  // Returns the block that the Tab key reaches: the one looked at last, or the first of all.
  reached(devices) {
    const chosen = this.state.chosen;
    const found = chosen && devices.find((device) => keyOf(device) === chosen.device);
    if (found && found.blocks.length > chosen.number) return chosen;
    const first = devices.find((device) => device.blocks.length);
    return first ? { device: keyOf(first), number: 0 } : null;
  }

  // Arrow keys go from block to block of a device, and to the devices above and below.
  move(event) {
    const block = event.target.closest?.("[data-block]");
    if (!block) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      block.dispatchEvent(new MouseEvent("click", { bubbles: true }));
      return;
    }
    if (event.key === "Escape") this.setState({ pinned: null });
    const bars = [...this.box.querySelectorAll("svg.bar")].filter((bar) => bar.querySelector("[data-block]"));
    const bar = bars.indexOf(block.closest("svg.bar"));
    const number = Number(block.dataset.block);
    const to = {
      ArrowLeft: [bar, number - 1],
      ArrowRight: [bar, number + 1],
      ArrowUp: [bar - 1, number],
      ArrowDown: [bar + 1, number],
      Home: [bar, 0],
      End: [bar, Infinity],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const blocks = bars[to[0]]?.querySelectorAll("[data-block]");
    const next = blocks?.[Math.min(Math.max(0, to[1]), blocks.length - 1)];
    next?.focus();
  }
}

function keyOf(device) {
  return device.key;
}

// Gives every device a key of its own, which is that of its node and its name there.
export function keyed(nodes) {
  for (const node of nodes) for (const device of node.devices) device.key = `${node.id}/${device.device}`;
  return nodes;
}

// Returns the bytes of a whole bar, for GPUs and for memory. A node has ten times as much memory as a GPU, often, so that
// GPUs are small beside it on one scale.
function scalesOf(devices, oneScale) {
  const gpu = scaleOf(devices.filter(isGpu));
  const memory = scaleOf(devices.filter((device) => !isGpu(device)));
  return oneScale ? { gpu: Math.max(gpu, memory), memory: Math.max(gpu, memory) } : { gpu, memory };
}

function scaleText({ gpu, memory }) {
  const texts = [];
  if (gpu > 1) texts.push(`${bytes(gpu)} for GPUs`);
  if (memory > 1) texts.push(`${bytes(memory)} for the memory of nodes`);
  return texts.length ? `All lengths are to scale. The full width is ${texts.join(", and ")}.` : "";
}

// Returns which block of this node is meant, as properties that are equal while it is the same one.
function placeOn(node, place, name) {
  const isHere = place !== null && node.devices.some((device) => keyOf(device) === place.device);
  return { [`${name}Device`]: isHere ? place.device : "", [`${name}At`]: isHere ? place.number : -1 };
}

// Returns the keys of the devices whose figures are old, as a text that is equal while they are the same ones.
function oldOf(node, now) {
  return node.devices.filter((device) => isOld(device, now)).map(keyOf).join("\n");
}

function NodeCard({ node, gpuScale, memoryScale, width, dim, focusDevice, focusAt, chosenDevice, chosenAt, old, look, press }) {
  const olds = old.split("\n");
  const gpus = node.devices.filter(isGpu).length;
  return html`<article class=${`panel node${node.alive ? "" : " gone"}`}>
    <header>
      <h3>${node.address}</h3>
      ${node.is_head && html`<span class="tag">head</span>`}
      ${!node.alive && html`<${Badge} state="gone" />`}
      <span class="dim">${node.name && `${node.name} in plans, `}${gpus ? `${plural(gpus, "GPU")}, ` : ""}${plural(node.cpus, "CPU")}</span>
    </header>
    ${node.note && html`<p class="note pre">${node.note}</p>`}
    ${node.devices.map((device) => html`<${Memo} key=${device.key} device=${device} scale=${isGpu(device) ? gpuScale : memoryScale}
      width=${width} dim=${dim} focusAt=${focusDevice === device.key ? focusAt : -1} isOld=${olds.includes(device.key)}
      chosen=${chosenDevice === device.key ? chosenAt : -1} look=${look} press=${press} draw=${DeviceRow} />`)}
  </article>`;
}

function DeviceRow({ device, scale, width, dim, focusAt, chosen, isOld: old, look, press }) {
  const on = { look: (number) => look(device.key, number), press: (number) => press(device.key, number) };
  const part = closeUp(device, scale);
  return html`<div class="device">
    <div class="what"><strong>${deviceName(device)}</strong> <span class="dim">${isGpu(device) && device.name !== "GPU" ? device.name : ""}</span></div>
    <div class="cell">
      ${width > 0 && html`<${Bar} device=${device} scale=${scale} width=${width} dim=${dim} focusAt=${part ? -1 : focusAt} chosen=${chosen} on=${on} />`}
    </div>
    <div class="figures num">
      ${device.total === null || device.used === null
        ? html`<span class="dim">${device.total === null ? "size not known" : `${bytes(device.total)}, not measured`}</span>`
        : html`${bytes(device.used)} <span class="dim">of ${bytes(device.total)}</span>`}
      ${old && html`<span class="tag warn">old</span>`}
    </div>
    ${part > 0 && width > 0 && html`<div class="closer"><${Bar} device=${closer(device, part)} scale=${part} width=${width} dim=${dim} focusAt=${focusAt} chosen=${chosen} on=${on} /></div>
      <div class="closer-note figures note">closer: ${bytes(part)}</div>`}
  </div>`;
}

// Returns the bytes of what a second bar shows closer, or 0 if the first one shows the models well enough.
function closeUp(device, scale) {
  const { foreign } = layoutOf(device);
  return foreign.start < CLOSER * scale ? foreign.start : 0;
}

function closer(device, part) {
  return { ...device, total: part, used: part, foreign: 0 };
}

function isOld(device, now) {
  return device.measured_at !== null && now - device.measured_at > OLD_S;
}

// What is known of the block that the pointer or the focus is on.
function Detail({ nodes, shown, isPinned, now, unpin }) {
  const found = shown && find(nodes, shown);
  return html`<aside class=${`panel detail${isPinned ? " pinned" : ""}`} aria-label="Details">
    ${found ? html`<${BlockDetail} ...${found} isPinned=${isPinned} unpin=${unpin} now=${now} />` : html`<${Overall} nodes=${nodes} />`}
  </aside>`;
}

function find(nodes, { device: key, number }) {
  for (const node of nodes) {
    const device = node.devices.find((each) => each.key === key);
    if (device?.blocks[number]) return { node, device, block: device.blocks[number] };
  }
  return null;
}

function Overall({ nodes }) {
  const devices = nodes.flatMap((node) => node.devices);
  const groups = [["GPUs", devices.filter(isGpu)], ["Memory of nodes", devices.filter((device) => !isGpu(device))]];
  return html`<h3>All devices</h3>
    ${groups
      .filter(([, group]) => group.length)
      .map(([title, group]) => {
        const sum = totals(group);
        return html`<table class="facts">
          <caption>${title} (${group.length})</caption>
          <tbody>
            ${[["total", "Total"], ["planned", "Planned for models"], ["held", "Held by models"], ["foreign", foreignName(group[0])], ["free", "Free"]].map(
              ([name, text]) => html`<tr><th scope="row">${text}</th><td class="num">${bytes(sum[name])}</td></tr>`,
            )}
          </tbody>
        </table>
        ${sum.away > 0 && html`<p class="note">The plans of parked and leaving models (${bytes(sum.away)}) are not counted. They share memory with models that have it now.</p>`}`;
      })}
    <p class="note">${isHandheld() ? "Touch a block of the map, and its figures are shown here." : "Point at a block of the map, or go to it with the Tab and arrow keys, and its figures are shown here. Enter keeps them."}</p>`;
}

function BlockDetail({ node, device, block, isPinned, unpin, now }) {
  const most = Math.max(1, ...(block.parts || []).map((part) => Math.max(part.planned ?? 0, part.held ?? 0)));
  return html`<header class="row">
      <h3 class="grow">${modelName(block)}</h3>
      ${isPinned && html`<button type="button" class="small" onClick=${unpin}>Unpin</button>`}
    </header>
    <p class="dim">${deviceName(device)} of ${node.address}${block.replica ? `, replica ${block.replica}` : ""}${block.rank ? `, rank ${block.rank}` : ""}</p>
    <p>${block.state && html`<${Badge} state=${block.state} />`} ${block.residency && html`<${Badge} state=${block.residency} />`}</p>
    <table class="facts">
      <tbody>
        <tr><th scope="row">${isAway(block) ? "Planned when resident" : "Planned"}</th><td class="num">${bytes(block.planned)}</td><td><${Certainty} of=${block.certainty} /></td></tr>
        <tr><th scope="row">Held</th><td class="num">${bytes(block.held)}</td><td>${isOver(block) ? html`<span class="tag warn">over plan</span>` : ""}</td></tr>
        <tr><th scope="row">Peak</th><td class="num">${bytes(block.peak)}</td><td></td></tr>
      </tbody>
    </table>
    ${block.parts?.length > 0 &&
    html`<table class="parts">
      <thead><tr><th scope="col">Part</th><th scope="col" class="num">Planned</th><th scope="col" class="num">Held</th></tr></thead>
      <tbody>
        ${ordered(block.parts).map(
          (part) => html`<tr>
              <th scope="row"><${Swatch} part=${part.name} />${PART_NAMES[part.name] || part.name}</th>
              <td class="num">${bytes(part.planned)}</td>
              <td class="num">${bytes(part.held)}</td>
            </tr>
            <tr class="strip">
              <td colspan="2"><${Strip} part=${part} most=${most} /></td>
              <td class="num"><${Certainty} of=${part.certainty} /></td>
            </tr>`,
        )}
      </tbody>
    </table>`}
    ${!isGpu(device) && isOver(block) && html`<p class="note">${GROWTH}</p>`}
    <p class="note">${device.measured_at === null ? "No replica has measured this device." : `Measured ${age(device.measured_at, now)} ago, at ${clock(device.measured_at)}.`}</p>`;
}

function ordered(parts) {
  const place = (part) => (PARTS.includes(part.name) ? PARTS.indexOf(part.name) : PARTS.length);
  return [...parts].sort((a, b) => place(a) - place(b));
}

function Certainty({ of }) {
  return of ? html`<span class=${`tag ${of}`}>${of}</span>` : null;
}

// A part beside the largest part of the same block.
function Strip({ part, most }) {
  const percent = (size) => `${(100 * (size ?? 0)) / most}%`;
  return html`<svg class="bar" width="100%" height="10" aria-hidden="true">
    <rect class="fill" x="0" y="2" width=${percent(part.held)} height="6" fill=${`url(#part-${part.name})`} />
    ${part.planned !== null && html`<rect class="outline" x="0.75" y="0.75" width=${percent(part.planned)} height="8.500" />`}
  </svg>`;
}

// The same figures as a table.
function Table({ nodes, dim }) {
  const rows = nodes.flatMap((node) =>
    node.devices.flatMap((device) => device.blocks.map((block) => ({ node, device, block }))),
  );
  const shown = dim ? rows.filter((row) => row.block.model === dim) : rows;
  return html`<p class="note" id="memory-table">Planned and held memory of each model on each device. Where two figures stand in a cell, the first is held and the second planned.</p>
  <div class="scroll" tabindex="0" role="region" aria-label="Memory as a table">
    <table class="grid" aria-describedby="memory-table">
      <thead>
        <tr>
          ${["Node", "Device", "Model", "Replica", "State"].map((text) => html`<th scope="col">${text}</th>`)}
          ${["Held", "Planned", "Peak"].map((text) => html`<th scope="col" class="num">${text}</th>`)}
          <th scope="col">Certainty</th>
          ${PARTS.map((part) => html`<th scope="col" class="num">${PART_NAMES[part]}</th>`)}
        </tr>
      </thead>
      <tbody>
        ${shown.map(
          ({ node, device, block }) => html`<tr>
            <td>${node.address}</td>
            <td>${deviceName(device)}</td>
            <th scope="row">${modelName(block)}</th>
            <td>${block.replica}${block.rank ? `, rank ${block.rank}` : ""}</td>
            <td>${block.residency || block.state}</td>
            <td class="num">${bytes(block.held)}</td>
            <td class="num">${bytes(block.planned)}</td>
            <td class="num">${bytes(block.peak)}</td>
            <td>${block.certainty}</td>
            ${PARTS.map((name) => {
              const part = (block.parts || []).find((each) => each.name === name);
              return html`<td class="num">${part ? html`${bytes(part.held)}<br /><span class="dim">${bytes(part.planned)}, ${part.certainty}</span>` : "–"}</td>`;
            })}
          </tr>`,
        )}
      </tbody>
      <tfoot>
        ${nodes.flatMap((node) =>
          node.devices.map(
            (device) => html`<tr>
              <td>${node.address}</td><td>${deviceName(device)}</td>
              <td colspan=${7 + PARTS.length}>${bytes(device.used)} of ${bytes(device.total)} used; ${foreignText(device)}; ${bytes(device.free)} free</td>
            </tr>`,
          ),
        )}
      </tfoot>
    </table>
  </div>`;
}

function foreignText(device) {
  if (device.foreign === null) return `${foreignName(device).toLowerCase().replace("cpu", "CPU")}: not known`;
  return isGpu(device) ? `other processes have ${bytes(device.foreign)}` : `${bytes(device.foreign)} are not held by models on the CPU`;
}

function LastEvents({ events }) {
  if (!events.length) return null;
  return html`<section class="panel" aria-labelledby="last-events">
    <h3 id="last-events">Last events</h3>
    <ol class="events">${events.slice(-LAST_EVENTS).reverse().map((event) => html`<${Line} key=${event.id} event=${event} />`)}</ol>
  </section>`;
}

// The sums of each model over all devices.
function Holders({ nodes, models: there }) {
  const blocks = new Map();
  for (const node of nodes) {
    for (const device of node.devices) {
      for (const block of device.blocks) {
        if (!blocks.has(block.model)) blocks.set(block.model, []);
        blocks.get(block.model).push(block);
      }
    }
  }
  if (!blocks.size) return null;
  const hasGrown = nodes.some((node) => node.devices.some((device) => !isGpu(device) && device.blocks.some(isOver)));
  const models = new Map(there.map((model) => [model.name, model]));
  return html`<section class="panel" aria-labelledby="holders">
    <h3 id="holders">Memory by model</h3>
    <div class="scroll" tabindex="0" role="region" aria-label="Table of memory by model">
      <table class="grid">
        <thead><tr>
          <th scope="col">Model</th><th scope="col">State</th><th scope="col">Backend</th><th scope="col" class="num">Replicas</th>
          <th scope="col" class="num">Blocks</th><th scope="col" class="num">Planned</th><th scope="col" class="num">Held</th>
          <th scope="col" class="num">Of plan</th><th scope="col" class="num">Peak</th><th scope="col">Certainty of the plan</th>
        </tr></thead>
        <tbody>
          ${[...blocks].map(([name, own]) => {
            const sum = sumsOf(own);
            const certainties = new Set(own.map((block) => block.certainty));
            const model = models.get(name);
            return html`<tr>
              <th scope="row">${name ?? "other models"}</th>
              <td>${model ? html`<${Badge} state=${stateOf(model)} />` : ""}</td>
              <td>${model?.backend ?? ""}</td>
              <td class="num">${model ? `${model.running}/${model.wanted}` : ""}</td>
              <td class="num">${own.length}</td>
              <td class="num">${sum.planned || !sum.away ? bytes(sum.planned) : ""}${sum.away > 0 && html` <span class="dim">${bytes(sum.away)} when resident</span>`}</td>
              <td class="num">${bytes(sum.held)}</td>
              <td class="num">${sum.planned && !sum.away && sum.held !== null ? `${Math.round((100 * sum.held) / sum.planned)} %` : "–"}</td>
              <td class="num">${bytes(sum.peak)}</td>
              <td>${[...certainties].sort().map((each) => html`<${Certainty} of=${each} /> `)}</td>
            </tr>`;
          })}
        </tbody>
      </table>
    </div>
    ${hasGrown && html`<p class="note">${GROWTH}</p>`}
  </section>`;
}
