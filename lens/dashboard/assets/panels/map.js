// What a heat map is computed and painted with: pooling, colour range, axis steps, the hatched ground.

import { css } from "../core/palette.js";
import { rankName } from "../core/format.js";

/** Room for row names: rank and device where rows are high enough, else the rank alone. */
const LEFT = 64;
const LEFT_NAMED = 168;
export const NAMED_ROWS = 16;
/** Brightest is at least this many times the median, so that ordinary noise stays dark. */
const NOTABLE = 1.5;
/** Cells from which the range of colours is taken. */
const SAMPLED = 4096;

/** Where the cells begin for so many rows: a chart below starts its axis there too. */
export function mapLeft(rows) {
  return rows <= NAMED_ROWS ? LEFT_NAMED : LEFT;
}

/** Highest value of the cells under each of wide × high pixels; NaN where there is none. */
export function pool(matrix, start, end, wide, high) {
  const result = new Float32Array(wide * high).fill(NaN);
  const perRow = matrix.rows.length / high;
  const perColumn = (end - start) / wide;
  matrix.rows.forEach((row, index) => {
    const base = Math.min(high - 1, Math.floor(index / perRow)) * wide;
    for (let column = Math.max(0, start); column < Math.min(end, matrix.columns); column += 1) {
      const value = row.max[column];
      if (value !== value) continue;
      const at = base + Math.min(wide - 1, Math.floor((column - start) / perColumn));
      if (!(result[at] >= value)) result[at] = value;
    }
  });
  return result;
}

/** Lowest and highest colour: without the outermost 2 %, and at least up to 1.5 × the median for durations. */
export function domainOf(values, unit) {
  const stride = Math.max(1, Math.floor(values.length / SAMPLED));
  const known = values.filter((value, index) => value === value && index % stride === 0).sort();
  if (!known.length) return [0, 1];
  const at = (share) => known[Math.min(known.length - 1, Math.floor(known.length * share))];
  const low = at(0.02);
  let high = at(0.98);
  if (unit === "s") high = Math.max(high, at(0.5) * NOTABLE);
  if (high <= low) high = low + (Math.abs(low) * 0.1 || 1);
  const domain = [low, high];
  domain.clipped = values.some((value) => value > high);
  return domain;
}

/** Round steps between two, about `count` of them. */
export function niceSteps(first, last, count) {
  const rough = Math.max(1, (last - first) / Math.max(1, count));
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = Math.max(1, [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough));
  const steps = [];
  for (let step = Math.ceil(first / size) * size; step <= last; step += size) steps.push(step);
  return steps;
}

/** The ground on which cells lie: diagonal lines say "nothing here" without any colour. */
export function hatch(context, x, y, width, height) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = css("nodata");
  context.fillRect(x, y, width, height);
  context.strokeStyle = css("grid");
  context.lineWidth = 1;
  context.beginPath();
  for (let at = x - height; at < x + width; at += 7) {
    context.moveTo(at, y + height);
    context.lineTo(at + height, y);
  }
  context.stroke();
  context.restore();
}

/** The name of a row, right of which its cells begin: a triangle and bold letters where the verdict names the rank. */
export function paintRowName(context, session, { rank, x, y, named, blamed, chosen = false }) {
  const device = named ? session.about(rank)?.device : null;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillStyle = css(blamed || chosen ? "text" : "muted");
  context.font = `${blamed || chosen ? 700 : 400} 12px system-ui, sans-serif`;
  context.fillText(`${blamed ? "▲ " : ""}${named || rank < 0 ? rankName(rank) : rank}${device ? ` · ${device}` : ""}`, x, y);
}

/** Diagonal lines in a colour of their own: time spent waiting. */
export function stripes(context, x, y, width, height, colour) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = context.strokeStyle = colour;
  context.globalAlpha = 0.35;
  context.fillRect(x, y, width, height);
  context.globalAlpha = 1;
  context.lineWidth = 2;
  context.beginPath();
  for (let at = x - height; at < x + width + height; at += 6) {
    context.moveTo(at, y + height);
    context.lineTo(at + height, y);
  }
  context.stroke();
  context.restore();
}
