// Memory: how much is used, step by step, below the line that it must not cross.

import { css, lines as colours, transparent } from "../core/palette.js";
import { freshFor, once, onGrid, ReplyChart } from "../panels/grid.js";
import { getSeries } from "../core/api.js";
import { percent, quantity } from "../core/format.js";

const POINTS = 400;
/** A limit so many times above the peak is told in words: drawn, it would press the lines to the ground. */
const FAR = 3;

export class Memory {
  sources() {
    return ["step.duration"];
  }

  draw() {}
}

/** The highest and the median of all cards, processes or hosts, and the limit of the one that is fullest. */
export class EnvelopePanel extends ReplyChart {
  get metric() {
    return this.root.dataset.metric;
  }

  /** Metrics of the limit, the first that is reported holds. */
  get limits() {
    return (this.root.dataset.limit ?? "").split(" ").filter(Boolean);
  }

  unit() {
    return "By";
  }

  ask(metric) {
    const { session } = this;
    return session.reply(metric, String(session.range), freshFor(session), () => getSeries(session.run, metric, null, session.range, POINTS));
  }

  lines() {
    const { value, error } = this.ask(this.metric);
    if (!value) return error ? `n/a: ${error.message}` : "Loading…";
    const others = [...this.limits, ...(this.root.dataset.part ? [this.root.dataset.part] : [])].map((metric) => this.ask(metric));
    if (others.some((each) => !each.value && !each.error)) return "Loading…";
    const used = once(value, "used", (reply) => ({ ...reply, series: reply.series.filter(isUsed) }));
    if (!used.series.length) return this.session.range ? `n/a: no ${this.metric} in steps ${this.session.range.join("–")}. Press 0 for all steps.` : `n/a: ${this.root.dataset.nothing}`;
    const { highest, peaks, medians } = once(used, "envelope", envelope);
    const [limit] = this.limits;
    const fullest = once((limit && this.ask(limit).value) || used, `fullest of ${this.metric} ${value.to}`, () => this.fullest(highest.series));
    const shown = [["highest", peaks], ["median", medians]];
    const part = this.part(highest.x);
    if (part) shown.push(["of it in use, highest", part]);
    const near = fullest.limit !== null && fullest.peak * FAR > fullest.limit;
    if (near) shown.push(["limit", highest.x.map(() => fullest.limit)]);
    return { x: highest.x, width: highest.width, lines: shown, note: roomWords(fullest, near) };
  }

  /** What comes nearest to its own limit, or without limits the highest: {name, peak, limit}. */
  fullest(series) {
    const all = series.map((each) => ({ name: nameOf(each), peak: Math.max(...each.values.filter((value) => value !== null), -Infinity), limit: this.limitOf(each) }));
    const share = ({ peak, limit }) => (limit === null ? 0 : peak / limit);
    return all.reduce((worst, each) => (share(each) > share(worst) || (share(each) === share(worst) && each.peak > worst.peak) ? each : worst));
  }

  /** The limit of a card, process or host; of several, the lowest. */
  limitOf({ rank, device, host }) {
    const about = this.session.about(rank);
    const own = (each) => (each.device ? each.device === (device ?? about?.device) : each.rank !== null ? each.rank === rank : !each.host || each.host === (host ?? about?.host));
    for (const metric of this.limits) {
      const known = (this.ask(metric).value?.series ?? []).filter(own).flatMap((each) => each.min).filter((each) => Number.isFinite(each) && each > 0);
      if (known.length) return Math.min(...known);
    }
    return null;
  }

  /** Of what torch has taken, what tensors use. */
  part(x) {
    const reply = this.root.dataset.part ? this.ask(this.root.dataset.part).value : null;
    if (!reply?.series.length) return null;
    const grid = onGrid(reply, "max");
    const place = new Map(grid.x.map((step, index) => [step, index]));
    return x.map((step) => (place.has(step) ? column(grid, place.get(step)).pop() ?? null : null));
  }

  style() {
    const [first, second, third] = colours();
    const looks = { highest: [second, [], 2], median: [first, [8, 4], 2], "of it in use, highest": [third, [2, 3], 2], limit: [css("bad"), [3, 3], 1.5] };
    const names = typeof this.shown === "object" ? this.shown.lines.map(([name]) => name) : [];
    return names.map((name, line) => ({ label: name, color: looks[name][0], dash: looks[name][1], width: looks[name][2], gaps: true, line }));
  }

  bands() {
    return typeof this.shown === "object" ? [{ series: [1, 2], fill: transparent(colours()[1], 0.14) }] : [];
  }
}

/** Memory of a host is reported by its states: used is what is asked for. */
function isUsed({ labels }) {
  return !labels["system.memory.state"] || labels["system.memory.state"] === "used";
}

function nameOf({ rank, device, host }) {
  const of = rank === null || rank === undefined ? null : `rank ${rank}`;
  return [device ?? (of ? null : host), of].filter(Boolean).join(", ") || "the host";
}

/** The highest and the median of all series, step by step. */
function envelope(reply) {
  const [highest, usual] = [onGrid(reply, "max"), onGrid(reply, "mean")];
  return { highest, peaks: highest.x.map((_, index) => column(highest, index).pop() ?? null), medians: usual.x.map((_, index) => middle(column(usual, index))) };
}

function column(grid, index) {
  return grid.series.map((each) => each.values[index]).filter((each) => each !== null).sort((a, b) => a - b);
}

function middle(values) {
  return values.length ? values[values.length >> 1] : null;
}

function roomWords({ name, peak, limit }, near) {
  if (limit === null) return `peak ${quantity(peak, "By")} on ${name}; limit n/a: not reported`;
  const of = `fullest: ${name}, at most ${quantity(peak, "By")} of ${quantity(limit, "By")} (${percent(peak / limit)})`;
  return near ? of : `${of}; the limit is far above this scale`;
}
