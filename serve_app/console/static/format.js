// Figures as a person reads them.

const KIB = 1024;

export function bytes(count) {
  if (count === null || count === undefined) return "not known";
  if (Math.abs(count) >= KIB ** 4) return `${(count / KIB ** 4).toFixed(2)} TiB`;
  if (Math.abs(count) >= KIB ** 3) return `${(count / KIB ** 3).toFixed(count >= 100 * KIB ** 3 ? 1 : 2)} GiB`;
  if (Math.abs(count) >= KIB ** 2) return `${(count / KIB ** 2).toFixed(1)} MiB`;
  return count === 0 ? "0" : `${(count / KIB).toFixed(1)} KiB`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : seconds(value / 1000);
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 10000) return `${(value / 1000).toFixed(1)}k`;
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? String(Math.round(value)) : value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}

export function clock(time) {
  return new Date(1000 * time).toLocaleTimeString([], { hour12: false });
}

export function date(time) {
  return new Date(1000 * time).toLocaleString();
}

export function age(then, now) {
  const s = Math.max(0, Math.round(now - then));
  if (s < 60) return `${s} s`;
  return s < 3600 ? `${Math.floor(s / 60)} min` : `${Math.floor(s / 3600)} h`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}
