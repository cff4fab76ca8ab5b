// What the page knows: the whole state, and what deltas change of it. Every function here is pure.

const SLOTS = 120;
const KEPT = 200;
const AWAY = new Set(["parked", "stopped"]);

// Returns the state with what a delta brings. Parts that are equal to the old ones stay the same objects, so that only
// what has changed is drawn again.
export function withDelta(state, delta) {
  return {
    ...state,
    time: delta.time ?? state.time,
    nodes: withChanged(state.nodes, delta.nodes, delta.gone_nodes, "id"),
    models: withChanged(state.models, delta.models, delta.gone_models, "name"),
    traffic: delta.traffic ? withTraffic(state.traffic, delta.traffic) : state.traffic,
    events: merged(state.events, delta.events),
    requests: merged(withoutGone(state.requests, delta.gone_requests), delta.requests),
    requests_left_out: (state.requests_left_out || 0) + (delta.requests_left_out || 0),
  };
}

// Returns the state to show of a model. It is ready for the server while all its replicas are parked, because a request
// brings it back.
export function stateOf(model) {
  const isParked = model.state === "ready" && model.replicas.length > 0 && model.replicas.every(({ residency }) => AWAY.has(residency?.state));
  return isParked ? "parked" : model.state;
}

// Returns the entries without those that are gone and with the changed ones in their old places. New ones come last.
function withChanged(old, changed = [], gone = [], key) {
  if (!changed.length && !gone.length) return old;
  const isGone = new Set(gone);
  const found = new Map(old.filter((entry) => !isGone.has(entry[key])).map((entry) => [entry[key], entry]));
  for (const entry of changed) found.set(entry[key], same(found.get(entry[key]), entry));
  const entries = [...found.values()];
  return entries.length === old.length && entries.every((entry, at) => entry === old[at]) ? old : entries;
}

// Returns `next`, in which every part that is equal to one of `old` is the old one.
export function same(old, next) {
  if (old === next || typeof old !== "object" || typeof next !== "object" || old === null || next === null) return next;
  if (Array.isArray(old) !== Array.isArray(next)) return next;
  const keys = Object.keys(next);
  let isSame = keys.length === Object.keys(old).length;
  const made = Array.isArray(next) ? [] : {};
  for (const key of keys) {
    made[key] = same(old[key], next[key]);
    if (made[key] !== old[key]) isSame = false;
  }
  return isSame ? old : made;
}

// Returns the series with the values of one slot, which may be an earlier one. Slots in between, of which no value is
// known, are empty.
function withTraffic(traffic, delta) {
  const [steps, back] = [Math.max(0, delta.slot - traffic.slot), Math.max(0, traffic.slot - delta.slot)];
  const models = {};
  for (const name of new Set([...Object.keys(traffic.models), ...Object.keys(delta.models || {})])) {
    const [series, values] = [traffic.models[name], delta.models?.[name] || {}];
    models[name] = series && steps === 0 && has(series, values, back) ? series : withSlot(series || {}, values, steps, back);
  }
  return { ...traffic, slot: Math.max(traffic.slot, delta.slot), models };
}

// Returns whether these series have the values already, `back` entries before their last ones, so that nothing is drawn
// again.
function has(series, values, back) {
  return Object.entries(values).every(([name, value]) => series[name]?.length > back && series[name][series[name].length - 1 - back] === value);
}

function withSlot(series, values, steps, back) {
  const made = {};
  for (const name of new Set([...Object.keys(series), ...Object.keys(values)])) {
    const old = series[name] || [];
    const empty = name.startsWith("ttft") ? null : 0;
    const kept = steps ? [...old, ...Array(Math.min(steps, SLOTS)).fill(empty)] : [...old];
    if (name in values) {
      while (kept.length <= back) kept.unshift(empty);
      kept[kept.length - 1 - back] = values[name];
    }
    made[name] = kept.slice(-SLOTS);
  }
  return made;
}

function withoutGone(old, gone) {
  if (!gone?.length) return old;
  const isGone = new Set(gone);
  return old.filter((entry) => !isGone.has(entry.id));
}

// Returns the entries by id, with new and changed ones, the last KEPT of them.
function merged(old, changed) {
  if (!changed?.length) return old;
  const found = new Map(old.map((entry) => [entry.id, entry]));
  for (const entry of changed) found.set(entry.id, entry);
  return [...found.values()].sort((a, b) => a.id - b.id).slice(-KEPT);
}
