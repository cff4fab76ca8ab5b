// Where the blocks of a device lie, in bytes from its beginning. Every function here is pure.

// The order in which parts are drawn and listed.
export const PARTS = ["weights", "kv_cache", "adapters", "activations", "context"];
export const PART_NAMES = {
  weights: "weights",
  kv_cache: "KV cache",
  adapters: "adapters",
  activations: "activations",
  context: "context",
  rest: "not divided",
};

export function isGpu(device) {
  return device.device !== "cpu";
}

export function deviceName(device) {
  return isGpu(device) ? `GPU ${device.index ?? device.device}` : "memory";
}

export function modelName(block) {
  return block.model ?? "other models";
}

// Members of a pool in these states have left its memory, or are leaving it, to others. Their plans do not hold now.
const AWAY = new Set(["parked", "draining", "stopped"]);

export function isAway(block) {
  return AWAY.has(block.residency);
}

// Returns the words for what nothing of the cluster explains. The memory that replicas on GPUs hold of their node is not
// reported, so it is not that of other processes alone.
export function foreignName(device) {
  return isGpu(device) ? "Other processes" : "Not held by models on the CPU";
}

// Returns {blocks, foreign, end} of a device. Each of `blocks` has {block, start, planned, held, size, fills}, and a fill
// is {part, start, size}. A block is as long as the larger of what it holds and what was planned for it, so that the
// outline of the plan and the fill can be compared. One that is away is as long as what it holds.
// In a plan, what is in use already lies before the blocks, and otherwise what other processes hold lies after them.
export function layoutOf(device, isPlan = false) {
  const others = device.foreign ?? 0;
  let at = isPlan ? others : 0;
  const blocks = device.blocks.map((block) => {
    const planned = isAway(block) ? 0 : (block.planned ?? 0);
    const held = block.held ?? 0;
    const size = Math.max(planned, held);
    const placed = { block, start: at, planned, held, size, fills: fillsOf(block, isPlan) };
    at += size;
    return placed;
  });
  const foreign = { start: isPlan ? 0 : at, size: others };
  return { blocks, foreign, end: isPlan ? at : at + others };
}

// Returns what fills a block, one part after the other. What the parts do not explain comes last.
function fillsOf(block, isPlan) {
  const field = isPlan ? "planned" : "held";
  const whole = block[field] ?? 0;
  const fills = [];
  let at = 0;
  for (const name of PARTS) {
    const part = (block.parts || []).find((each) => each.name === name);
    const size = Math.min(part?.[field] ?? 0, whole - at);
    if (size > 0) fills.push({ part: name, start: at, size });
    at += Math.max(0, size);
  }
  if (whole > at) fills.push({ part: "rest", start: at, size: whole - at });
  return fills;
}

// Returns the bytes that the longest bar of these devices has: the larger of its total and of what lies on it.
export function scaleOf(devices) {
  return Math.max(1, ...devices.map((device) => Math.max(device.total ?? 0, layoutOf(device).end)));
}

// Returns rectangles in pixels, {x, width}, for sizes in bytes that follow each other. What is too small to be seen is
// drawn `least` pixels wide, and what follows moves to the right for it.
export function pixels(items, perByte, least) {
  let end = 0;
  return items.map(({ start, size, block }) => {
    const x = Math.max(end, start * perByte);
    const width = size > 0 || (block && isAway(block)) ? Math.max(least, size * perByte) : 0;
    end = x + width;
    return { x, width };
  });
}

// Returns the sums of devices. `away` is what was planned for blocks that are away, which is no part of `planned`. What
// others hold is not known (null) if it is not known of one device that was measured.
export function totals(devices) {
  const blocks = devices.flatMap((device) => device.blocks);
  const measured = devices.filter((device) => device.used !== null);
  const sum = { ...sumsOf(blocks), total: 0, used: 0, free: 0 };
  for (const name of ["total", "used", "free"]) for (const device of devices) sum[name] += device[name] ?? 0;
  sum.foreign = measured.every((device) => device.foreign !== null) ? known(measured.map((device) => device.foreign)) : null;
  return sum;
}

// Returns the sums of blocks: {planned, away, held, peak}.
export function sumsOf(blocks) {
  const add = (found) => found.reduce((sum, block) => sum + (block.planned ?? 0), 0);
  return {
    planned: add(blocks.filter((block) => !isAway(block))),
    away: add(blocks.filter(isAway)),
    held: known(blocks.map((block) => block.held)),
    peak: known(blocks.map((block) => block.peak)),
  };
}

// Returns the sum of the figures that are known, or null if none of several is.
function known(values) {
  const found = values.filter((value) => value !== null && value !== undefined);
  return values.length && !found.length ? null : found.reduce((sum, value) => sum + value, 0);
}
