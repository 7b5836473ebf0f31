// Numbers for people: seconds, bytes and ratios inside become ms, GiB and % here, and nowhere else.

export const MISSING = "n/a";

const SCALES = {
  s: [[1e-6, "µs", 1e-6], [1e-3, "ms", 1e-3], [1, "s", 1], [60, "min", 60], [3600, "h", 3600]],
  By: [[1, "B", 1], [2 ** 10, "KiB", 2 ** 10], [2 ** 20, "MiB", 2 ** 20], [2 ** 30, "GiB", 2 ** 30], [2 ** 40, "TiB", 2 ** 40]],
  "By/s": [[1, "B/s", 1], [1e3, "kB/s", 1e3], [1e6, "MB/s", 1e6], [1e9, "GB/s", 1e9]],
  "{token}/s": [[1, "tok/s", 1], [1e3, "k tok/s", 1e3], [1e6, "M tok/s", 1e6]],
};
const ZERO = { s: "s", By: "B" };
const PLAIN = { Cel: "°C", "{token}": "tokens", "{FLOP}": "FLOP", "{error}": "errors" };

/** Picks the scale that suits numbers as large as `size`: how to divide, and what to write behind. */
export function scaleFor(unit, size) {
  const steps = SCALES[unit];
  if (!steps) {
    const name = unit === "1" || !unit ? "" : PLAIN[unit] ?? unit.replace(/[{}]/g, "");
    return { divide: 1, name };
  }
  let chosen = steps[0];
  for (const step of steps) if (Math.abs(size) >= step[0]) chosen = step;
  return { divide: chosen[2], name: chosen[1] };
}

/** Between thousands: thin, and no place to break a line. */
const THIN = "\u202f";

/** Digits that matter, with thin spaces between thousands. */
export function number(value, digits = 3) {
  if (!Number.isFinite(value)) return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-4) return value.toExponential(2).replace("e+", "e");
  const decimals = Math.max(0, Math.min(6, digits - 1 - Math.floor(Math.log10(size))));
  const [whole, fraction] = value.toFixed(decimals).split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+(?!\d))/g, THIN);
  return fraction ? `${grouped}.${fraction}` : grouped;
}

/** A round number, as on an axis: no digits beyond those it needs. */
export function plain(value) {
  const [whole, fraction] = String(Number(value.toPrecision(6))).split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+(?!\d))/g, THIN);
  return fraction ? `${grouped}.${fraction}` : grouped;
}

/** A value with its unit; null, undefined: "n/a". NaN and infinities are values of a run and are written out. */
export function quantity(value, unit, digits = 3) {
  if (value === null || value === undefined) return MISSING;
  if (!Number.isFinite(value)) return String(value);
  const { divide, name } = value === 0 ? { divide: 1, name: ZERO[unit] ?? scaleFor(unit, 0).name } : scaleFor(unit, value);
  return name ? `${number(value / divide, digits)}\u00a0${name}` : number(value / divide, digits);
}

export function integer(value) {
  return value === null || value === undefined ? MISSING : String(Math.round(value)).replace(/\B(?=(\d{3})+(?!\d))/g, THIN);
}

export function percent(ratio, digits = 2) {
  return ratio === null || ratio === undefined || !Number.isFinite(ratio) ? MISSING : ratio > 0 && ratio < 0.001 ? `<${THIN}0.1\u00a0%` : `${number(ratio * 100, digits)}\u00a0%`;
}

/** How long ago, in the coarsest unit that is still useful. */
export function age(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** How long something took, in two units at most: "2 h 5 min". */
export function lasting(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  let left = Math.max(0, Math.round(seconds));
  const parts = [];
  for (const [size, name] of units) {
    const count = Math.floor(left / size);
    left -= count * size;
    if (count) parts.push(`${count}\u00a0${name}`);
  }
  return parts.slice(0, 2).join(" ") || "0\u00a0s";
}

/** Rank -1 stands for values of the run as a whole. */
export function rankName(rank) {
  return rank < 0 ? "all ranks" : `rank ${rank}`;
}

/** "2", "2 and 5", "2, 5 and 6", "0–63". */
export function list(ranks) {
  if (ranks.length <= 1) return String(ranks[0] ?? "");
  const consecutive = ranks.length > 3 && ranks.every((rank, index) => index === 0 || rank === ranks[index - 1] + 1);
  if (consecutive) return `${ranks[0]}–${ranks[ranks.length - 1]}`;
  if (ranks.length > 8) return `${ranks.slice(0, 6).join(", ")} and ${ranks.length - 6} more`;
  return `${ranks.slice(0, -1).join(", ")} and ${ranks[ranks.length - 1]}`;
}

const MAKERS = { nvidia: "NVIDIA", amd: "AMD", intel: "Intel" };

/** "NVIDIA H200"; a model that names its maker already stays as it is. Null where neither is known. */
export function cardName(vendor, model) {
  const maker = MAKERS[vendor] ?? vendor;
  if (!maker || !model) return maker ?? model ?? null;
  return model.toLowerCase().startsWith(maker.toLowerCase()) ? model : `${maker} ${model}`;
}

/** A moment on this machine's clock, year first: reads the same to everyone. */
export function moment(nanoseconds) {
  const at = new Date(nanoseconds / 1e6);
  const two = (number) => String(number).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
}
