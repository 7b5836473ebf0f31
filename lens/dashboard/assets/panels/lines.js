// The line charts over steps: each turns sources into the columns of a chart, a legend and a table.

import { ChartPanel } from "./chart_panel.js";
import { DASHES, lines, transparent } from "../core/palette.js";
import { integer, rankName } from "../core/format.js";
import { mapLeft } from "./map.js";
import { trend } from "../core/matrix.js";

/** How strongly raw values are drawn beneath their trend. */
const FAINT = 0.45;

/** Median rank as a line, a band up to the slowest. */
export class BandPanel extends ChartPanel {
  get zero() {
    return true;
  }

  sources() {
    return [this.root.dataset.metric];
  }

  style() {
    const [first, second] = lines();
    return [
      { label: "slowest rank", color: second, width: 1, line: 0 },
      { label: "median rank", color: transparent(first, FAINT), width: 1, line: 1 },
      { label: "trend", color: first, width: 2.4, line: 2, derived: true, gaps: true },
    ];
  }

  bands() {
    return [{ series: [1, 2], fill: transparent(lines()[1], 0.16) }];
  }

  columns() {
    const { x, max, median } = this.session.source(this.root.dataset.metric).matrix.reduce();
    return [x, max, median, trend(median)];
  }
}

/** Sum over the ranks of one metric, divided by the time of the slowest. */
export class RatePanel extends ChartPanel {
  get zero() {
    return true;
  }

  sources() {
    return [this.root.dataset.metric, "step.duration"];
  }

  unit() {
    return "{token}/s";
  }

  nothing(name) {
    return name === "step.duration" ? super.nothing(name) : "no token counts. Give them with lens.step(tokens=…).";
  }

  style() {
    const color = lines()[2];
    return [
      { label: "all ranks", color: transparent(color, FAINT), width: 1, line: 0 },
      { label: "trend", color, width: 2.4, line: 1, derived: true, gaps: true },
    ];
  }

  columns() {
    const [x, rates] = tokenRate(this.session.source(this.root.dataset.metric).matrix, this.session.source("step.duration").matrix);
    return [x, rates, trend(rates)];
  }
}

/** [steps, tokens a second]; null where a rank's count or the time is missing, since a part is not the whole. */
export function tokenRate(tokens, durations) {
  const { x } = tokens.reduce();
  durations.reduce();
  const rates = x.map((step, column) => {
    const other = durations.columnOf(step);
    if (other < 0) return null;
    let [sum, slowest] = [0, 0];
    for (const row of durations.rows) {
      const [time, count] = [row.mean[other], tokens.rowOf.get(row.rank)?.mean[column]];
      if (time !== time || count === undefined || count !== count) return null;
      sum += count;
      slowest = Math.max(slowest, time);
    }
    return slowest > 0 ? sum / slowest : null;
  });
  return [x, rates];
}

/** A metric of the run as a whole. */
export class LinePanel extends ChartPanel {
  /** Its metric, and what stands for it in a run that reports none. */
  get metrics() {
    const { metric, instead } = this.root.dataset;
    return instead ? [metric, instead] : [metric];
  }

  get metric() {
    return this.session.reported(this.metrics);
  }

  sources() {
    return [...new Set([this.metric, ...this.session.tried(this.metrics)])];
  }

  newestStep() {
    return super.newestStep([this.metric]);
  }

  style() {
    const [color] = lines();
    return [
      { label: "value", color: transparent(color, FAINT), width: 1, line: 0, gaps: true },
      { label: "trend", color, width: 2.4, line: 1, derived: true, gaps: true },
    ];
  }

  columns() {
    const { x, median } = this.session.source(this.metric).matrix.reduce();
    return [x, median, trend(median)];
  }

  note() {
    const step = this.session.source(this.metric).matrix.notFinite;
    if (step === null && this.metric !== this.root.dataset.metric) return `${this.metric}, median rank: the run reports no ${this.root.dataset.metric}`;
    return step === null ? super.note() : `✖ not a finite number since step ${integer(step)}`;
  }

  silence() {
    const matrix = this.session.source(this.metric).matrix;
    if (matrix && matrix.notFinite !== null && !matrix.rows.some((row) => row.count.some(Boolean))) return `n/a: every value since step ${matrix.notFinite} is not a finite number.`;
    return super.silence([this.metric]);
  }

  nothing(name) {
    return this.session.range ? super.nothing(name) : `no ${this.root.dataset.metric} yet. Report it: lens.log({"${this.root.dataset.metric}": …}).`;
  }
}

/** The chosen ranks, each a line, beside the median of all. */
export class RanksPanel extends ChartPanel {
  sources() {
    return [this.app.metric];
  }

  get zero() {
    return this.session.source(this.app.metric).unit === "s";
  }

  get chosen() {
    return this.app.chosenRanks().ranks.slice(0, DASHES.length);
  }

  style() {
    const colors = lines();
    const all = [["median of all", colors[5], [3, 4]], ...this.chosen.map((rank, index) => [rankName(rank), colors[index % 5], DASHES[index]])];
    return [
      ...all.map(([label, color, dash], line) => ({ label, color: transparent(color, FAINT), ink: color, dash, width: 1, line })),
      ...all.map(([, color, dash]) => ({ color, dash, width: 2.2, derived: true, gaps: true })),
    ];
  }

  columns() {
    const { matrix } = this.session.source(this.app.metric);
    const { x, median } = matrix.reduce();
    const cells = (row) => x.map((_, column) => (row && row.max[column] === row.max[column] ? row.max[column] : null));
    const raw = [median, ...this.chosen.map((rank) => cells(matrix.rowOf.get(rank)))];
    return [x, ...raw, ...raw.map(trend)];
  }

  render() {
    this.left = mapLeft(this.session.source(this.app.metric).matrix?.rows.length ?? 0);
    const signature = `${this.app.metric} ${this.chosen} ${this.left}`;
    if (this.signature !== signature) {
      this.signature = signature;
      this.cursor = null;
      this.data = [[], ...this.style().map(() => [])];
      this.makeChart();
    }
    super.render();
  }

  remark() {
    const { why } = this.app.chosenRanks();
    return why ? `no rank chosen: ${why}` : "";
  }
}
