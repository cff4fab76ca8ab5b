// Lines of the last ten minutes.

import { html } from "./vendor/htm-preact.js";

const WIDTH = 240;
const HEIGHT = 40;

// `lines` are series of numbers or nulls, the first drawn solid and the second dashed. `told` is what a screen reader
// says, and `most` the least value that the height stands for.
export function Sparkline({ lines, slots, told, least = 0 }) {
  const most = Math.max(least, ...lines.flat().filter((value) => value !== null));
  return html`<svg class="spark" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label=${told}>
    <title>${told}</title>
    <line class="axis" x1="0" x2=${WIDTH} y1=${HEIGHT - 0.5} y2=${HEIGHT - 0.5} />
    <line class="axis faint" x1="0" x2=${WIDTH} y1="0.5" y2="0.5" />
    ${lines.map((line, number) => html`<path class=${`line line-${number}`} d=${pathOf(line, slots, most)} />`)}
  </svg>`;
}

// Returns a path with a gap wherever a value is not known. A value alone is a short dash.
function pathOf(line, slots, most) {
  const step = WIDTH / Math.max(1, slots - 1);
  const first = slots - line.length;
  let path = "";
  let isOpen = false;
  line.forEach((value, index) => {
    if (value === null || value === undefined) {
      isOpen = false;
      return;
    }
    const x = (first + index) * step;
    const y = most > 0 ? HEIGHT - 1.5 - (value / most) * (HEIGHT - 3) : HEIGHT - 1.5;
    path += isOpen ? `L${x.toFixed(1)} ${y.toFixed(1)}` : `M${(x - 0.8).toFixed(1)} ${y.toFixed(1)}L${x.toFixed(1)} ${y.toFixed(1)}`;
    isOpen = true;
  });
  return path;
}
