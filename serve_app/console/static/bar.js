// The bar of one device to scale: its blocks, other processes, and what is free.

import { html } from "./vendor/htm-preact.js";
import { bytes } from "./format.js";
import { PARTS, PART_NAMES, deviceName, foreignName, isAway, isGpu, layoutOf, modelName, pixels } from "./layout.js";

const LABELS = 13;
const HEIGHT = 18;
const LEAST = 3;
// The line of what is in use, where it is not known who holds it.
const LINE = 5;
// Wide enough for a letter of a label, in pixels.
const LETTER = 6.6;
// Shorter pieces of names tell nothing.
const SHORTEST = 5;

// The patterns of parts, once for the page. Other drawings refer to them.
export function Patterns() {
  const stripes = (id, size, turn, marks) => html`<pattern
    id=${id} class=${id} width=${size} height=${size} patternUnits="userSpaceOnUse" patternTransform=${`rotate(${turn})`}
  ><rect class="ground" width=${size} height=${size} />${marks}</pattern>`;
  return html`<svg class="patterns" width="0" height="0" aria-hidden="true" focusable="false">
    <defs>
      ${stripes("part-weights", 8, 0, null)}
      ${stripes("part-kv_cache", 6, 45, html`<rect class="mark" width="2" height="6" />`)}
      ${stripes("part-adapters", 6, 0, html`<circle class="mark" cx="3" cy="3" r="1.3" />`)}
      ${stripes("part-activations", 5, 0, html`<rect class="mark" width="1.5" height="5" />`)}
      ${stripes("part-context", 5, 90, html`<rect class="mark" width="1.5" height="5" />`)}
      ${stripes("part-rest", 6, 135, html`<rect class="mark" width="1" height="6" />`)}
      ${stripes("part-foreign", 7, 45, html`<path class="mark" d="M0 0h7v1H1v6H0z" />`)}
    </defs>
  </svg>`;
}

export function Swatch({ part }) {
  if (part === "unexplained") {
    return html`<svg class="swatch" width="16" height="12" aria-hidden="true"><rect class="unexplained" x="1" y="3.5" width="14" height=${LINE} /></svg>`;
  }
  return html`<svg class="swatch" width="16" height="12" aria-hidden="true">
    <rect class=${{ planned: "outline", away: "outline away" }[part] || "edge"} x="1" y="1" width="14" height="10"
      fill=${["free", "planned", "away"].includes(part) ? "none" : `url(#part-${part})`} />
  </svg>`;
}

// Of which devices there are some decides the words.
export function Legend({ isPlan, devices = [] }) {
  const gpus = devices.filter(isGpu);
  const others = [gpus, devices.filter((device) => !isGpu(device))].filter((group) => group.length).map(([first]) => foreignName(first));
  const items = [
    ...PARTS.map((part) => [part, PART_NAMES[part]]),
    ["rest", "not divided into parts"],
    ["foreign", isPlan ? "in use, or kept for what runs" : others.join("; ").toLowerCase().replace("cpu", "CPU") || "other processes"],
    ["free", "free"],
  ];
  if (devices.some((device) => device.blocks.some(isAway))) items.push(["away", "parked or leaving: what it still holds"]);
  if (devices.some(isUnexplained)) items.push(["unexplained", "in use, and it is not known by whom"]);
  if (!isPlan) items.unshift(["planned", "planned (outline); the fill is held"]);
  return html`<ul class="legend" aria-label="Legend">
    ${items.map(([part, text]) => html`<li><${Swatch} part=${part} />${text}</li>`)}
  </ul>`;
}

// Returns what a block is, as a sentence for screen readers and titles.
export function told(block) {
  const rank = block.rank ? `, rank ${block.rank}` : "";
  const over = isOver(block) ? ", which is more than planned" : "";
  if (isAway(block)) {
    const plan = `planned ${bytes(block.planned)} (${block.certainty}) when resident`;
    return `${modelName(block)}${rank}: ${block.residency}, holds ${bytes(block.held)}, ${plan}`;
  }
  return (
    `${modelName(block)}${rank}: planned ${bytes(block.planned)} (${block.certainty}), holds ${bytes(block.held)}${over}`
  );
}

export function isOver(block) {
  return block.planned !== null && block.held !== null && block.held > block.planned;
}

// Inside of a container, NVML does not tell what a process holds.
function isUnexplained(device) {
  return device.foreign === null && device.used !== null;
}

// `width` is that of the whole scale in pixels. `dim` is a model beside which others are faint. `focusAt` is the number of
// the block that the Tab key reaches, or -1.
export function Bar({ device, scale, width, isPlan = false, dim = "", focusAt = -1, chosen = -1, on = {} }) {
  const layout = layoutOf(device, isPlan);
  const perByte = width / scale;
  const order = isPlan ? [layout.foreign, ...layout.blocks] : [...layout.blocks, layout.foreign];
  const placed = pixels(order, perByte, LEAST);
  const foreign = placed[isPlan ? 0 : placed.length - 1];
  const places = isPlan ? placed.slice(1) : placed.slice(0, -1);
  const total = (device.total ?? 0) * perByte;
  // Where the label of a block must end: at the next block, or at what others hold.
  const endOf = (number) => places[number + 1]?.x ?? (!isPlan && foreign.width ? foreign.x : width);
  return html`<svg class="bar" width=${width} height=${LABELS + HEIGHT + 2} role="group"
    aria-label=${`${deviceName(device)}, ${device.name}: ${bytes(device.used)} of ${bytes(device.total)} used`}>
    <rect class="track" x="0.5" y=${LABELS + 0.5} width=${Math.max(1, total - 1)} height=${HEIGHT} />
    ${foreign.width > 0 &&
    html`<rect class="foreign" x=${foreign.x} y=${LABELS + 1} width=${foreign.width} height=${HEIGHT - 1}
      fill="url(#part-foreign)"><title>${isPlan ? "In use, or kept for what runs" : foreignName(device)}: ${bytes(device.foreign)}</title></rect>`}
    ${layout.blocks.map((placed, number) =>
      html`<${Block} placed=${placed} place=${places[number]} perByte=${perByte} isPlan=${isPlan}
        isFaint=${dim !== "" && placed.block.model !== dim} isReached=${number === focusAt}
        isChosen=${number === chosen} number=${number} on=${on}
        room=${endOf(number) - places[number].x} />`,
    )}
    ${isUnexplained(device) &&
    html`<rect class="unexplained" x="0" y=${LABELS + (HEIGHT - LINE + 1) / 2} width=${device.used * perByte} height=${LINE} />`}
    <line class="end" x1=${total} x2=${total} y1=${LABELS - 3} y2=${LABELS + HEIGHT + 2} />
  </svg>`;
}

function Block({ placed, place, perByte, isPlan, isFaint, isReached, isChosen, number, room, on }) {
  const { block } = placed;
  const name = modelName(block);
  const label = name.length * LETTER <= room ? name : name.slice(0, Math.max(0, Math.floor(room / LETTER) - 2));
  const away = isAway(block);
  const outline = away ? place.width : Math.max(LEAST, placed.planned * perByte);
  const filled = placed.held || isPlan ? place.width : 0;
  const parts = pixels(placed.fills, perByte, filled <= LEAST ? LEAST : 0);
  const button = on.press
    ? {
        role: "button",
        tabIndex: isReached ? 0 : -1,
        "aria-pressed": String(isChosen),
        "data-block": number,
        onClick: () => on.press(number),
        onFocus: () => on.look(number),
        onMouseEnter: () => on.look(number),
      }
    : { role: "img" };
  return html`<g ...${button} class=${`block${isFaint ? " faint" : ""}${isChosen ? " chosen" : ""}`} aria-label=${told(block)}>
    <title>${told(block)}</title>
    <rect class="hit" x=${place.x} y="0" width=${Math.max(place.width, 6)} height=${LABELS + HEIGHT} />
    ${(label === name || label.length >= SHORTEST) && html`<text x=${place.x + 1} y=${LABELS - 3} aria-hidden="true">${label}${label === name ? "" : "…"}</text>`}
    ${placed.fills.map((fill, index) =>
      html`<rect class=${`fill${isPlan ? " plan" : ""}`} x=${place.x + parts[index].x} y=${LABELS + 3} width=${parts[index].width}
        height=${HEIGHT - 5} fill=${`url(#part-${fill.part})`} />`,
    )}
    ${block.planned !== null &&
    html`<rect class=${`outline${away ? " away" : isOver(block) ? " over" : ""}`} x=${place.x + 0.75} y=${LABELS + 1.250}
      width=${Math.max(1, outline - 1.5)} height=${HEIGHT - 1.5} />`}
    <rect class="ring" x=${place.x - 1.5} y=${LABELS - 1.5} width=${place.width + 3} height=${HEIGHT + 4} />
  </g>`;
}
