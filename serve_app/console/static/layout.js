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

// Returns {blocks, foreign, end} of a device. Each of `blocks` has {block, start, planned, held, size, fills}, and a fill
// is {part, start, size}. A block is as long as the larger of what it holds and what was planned for it, so that the
// outline of the plan and the fill can be compared.
// In a plan, what is in use already lies before the blocks, and otherwise what other processes hold lies after them.
export function layoutOf(device, isPlan = false) {
  const others = device.foreign ?? 0;
  let at = isPlan ? others : 0;
  const blocks = device.blocks.map((block) => {
    const planned = block.planned ?? 0;
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
  return items.map(({ start, size }) => {
    const x = Math.max(end, start * perByte);
    const width = size > 0 ? Math.max(least, size * perByte) : 0;
    end = x + width;
    return { x, width };
  });
}

export function totals(devices) {
  const sum = { total: 0, used: 0, planned: 0, held: 0, foreign: 0, free: 0 };
  for (const device of devices) {
    for (const name of ["total", "used", "foreign", "free"]) sum[name] += device[name] ?? 0;
    for (const block of device.blocks) {
      sum.planned += block.planned ?? 0;
      sum.held += block.held ?? 0;
    }
  }
  return sum;
}
