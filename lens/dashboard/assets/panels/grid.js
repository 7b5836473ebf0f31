// Series of a reply on one common row of steps, and charts that draw them.

import { ChartPanel } from "./chart_panel.js";
import { DASHES, lines } from "../core/palette.js";

const EVERY_MS = 4000;

/** How long a reply stays new. */
export function freshFor(session) {
  return session.state === "ended" ? Infinity : EVERY_MS;
}

const results = new WeakMap();

/** What `compute` makes of a reply, made once for each reply and name: pictures are drawn far more often than replies come. */
export function once(reply, name, compute) {
  if (!results.has(reply)) results.set(reply, new Map());
  const known = results.get(reply);
  if (!known.has(name)) known.set(name, compute(reply));
  return known.get(name);
}

/** One x for all series of a reply; `pick` names the value of a bucket, null where a series has none. */
export function onGrid(reply, pick) {
  const x = [...new Set(reply.series.flatMap((series) => series.x))].sort((a, b) => a - b);
  const place = new Map(x.map((step, index) => [step, index]));
  const series = reply.series.map((each) => {
    const values = new Array(x.length).fill(null);
    each.x.forEach((step, index) => {
      const value = each[pick][index];
      values[place.get(step)] = Number.isFinite(value) ? value : null;
    });
    return { rank: each.rank, device: each.device, host: each.host, labels: each.labels, values };
  });
  return { x, series, width: reply.width ?? 1 };
}

/** A chart of lines that come from replies: a subclass gives `lines()` = {x, width, lines: [[name, values]]} or text. */
export class ReplyChart extends ChartPanel {
  sources() {
    return ["step.duration"]; // which steps are visible
  }

  get zero() {
    return true;
  }

  silence() {
    return typeof this.shown === "string" ? this.shown : null;
  }

  newestStep() {
    const { x, width } = this.shown ?? {};
    return x?.length ? x[x.length - 1] + width - 1 : null;
  }

  columnWidth() {
    return this.shown?.width ?? 1;
  }

  newestColumn() {
    return (this.shown?.x?.length ?? 0) - 1;
  }

  colours() {
    return lines();
  }

  style() {
    const names = typeof this.shown === "object" ? this.shown.lines.map(([name]) => name) : [];
    const colours = this.colours();
    return names.map((name, line) => ({ label: name, color: colours[line % colours.length], dash: DASHES[line % DASHES.length], width: 2, gaps: true, line }));
  }

  columns() {
    return [this.shown.x, ...this.shown.lines.map(([, values]) => values)];
  }

  render() {
    this.session.source("step.duration");
    this.shown = this.lines();
    const signature = typeof this.shown === "object" ? this.shown.lines.map(([name]) => name).join("\n") : "";
    if (this.signature !== signature) {
      this.signature = signature;
      this.cursor = null;
      this.data = [[], ...this.style().map(() => [])];
      this.makeChart();
    }
    super.render();
  }

  remark() {
    return this.shown?.note ?? "";
  }
}
