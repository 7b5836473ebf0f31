// The line charts and the ledger: each turns sources into the columns of a chart, a legend and a table.

import { Chart } from "./chart.js";
import { HeatmapPanel } from "./heatmap.js";
import { LedgerPanel } from "./ledger.js";
import { Panel } from "./panel.js";
import { DASHES, lines, transparent } from "./palette.js";
import { element, replace } from "./dom.js";
import { integer, quantity, rankName } from "./format.js";
import { mapLeft } from "./map.js";
import { middle, trend } from "./matrix.js";
import { onsetMarks } from "./causes.js";

/** How strongly raw values are drawn beneath their trend. */
const FAINT = 0.45;

/** A panel with one chart; a subclass gives `names`, `columns()` and `style()`. */
class ChartPanel extends Panel {
  constructor(root, session, app) {
    super(root, session, app);
    this.canvases = () => [...this.picture.querySelectorAll("canvas")];
    this.makeTools();
    this.cursor = null;
    this.data = [[]];
    this.makeChart();
  }

  makeChart() {
    this.chart?.close();
    this.chart = new Chart(this.picture, {
      height: this.height,
      app: this.app,
      label: this.title,
      zero: () => this.zero,
      series: () => this.style().map(({ color, dash, fill, width, gaps }) => ({ stroke: color, dash, fill, width: width ?? 1.8, spanGaps: gaps ?? false, points: { show: () => this.data[0].length < 2 } })),
      bands: () => this.bands(),
      left: this.left,
      onCursor: (index) => {
        this.cursor = index;
        // The hook also fires when new data slides under a crosshair that another picture has set.
        if (this.picture.matches(":hover")) this.app.point(index === null ? null : this.data[0][index] ?? null, this);
        this.drawLegend();
      },
      onDrawn: () => this.chart && this.drawLegend(), // only now it is known what lies above the scale
    });
  }

  /** Shows the step that another picture points at. */
  pointAt(step) {
    const { plot } = this.chart;
    plot.setCursor({ left: step === null ? -10 : plot.valToPos(step, "x"), top: step === null ? -10 : 1 });
  }

  /** Whether the y axis begins at zero. */
  get zero() {
    return false;
  }

  bands() {
    return [];
  }

  recolor() {
    this.makeChart();
    this.draw();
  }

  render() {
    const silent = this.silence();
    if (this.say(silent)) {
      this.legend.replaceChildren();
      return;
    }
    this.data = this.columns();
    if (!this.picture.hidden) this.chart.set(this.data, this.unit(), onsetMarks(this.session.diagnosis));
    this.drawLegend();
  }

  unit() {
    return this.session.source(this.sources()[0]).unit;
  }

  /** Why there is no picture, or null. */
  silence() {
    for (const name of this.sources()) {
      const source = this.session.source(name);
      if (source.state === "loading") return "Loading…";
      if (source.state === "error") return `n/a: ${source.reason}`;
      if (source.state === "empty") return `n/a: ${this.nothing(name)}`;
    }
    return null;
  }

  nothing(name) {
    if (this.session.range) return `no ${name} in steps ${this.session.range.join("–")}. Press 0 for all steps.`;
    return this.session.lastStep === null ? "no step has ended yet." : `this run has not reported ${name}.`;
  }

  drawLegend() {
    const [x, ...values] = this.data;
    if (!x.length || this.say(this.silence())) return;
    const index = this.cursor !== null && this.cursor < x.length ? this.cursor : this.latestIndex(values[0]);
    const width = this.session.source(this.sources()[0]).matrix.width;
    const step = x[index] === undefined ? "" : width > 1 ? `steps ${integer(x[index])}–${integer(x[index] + width - 1)}` : `step ${integer(x[index])}`;
    const entries = this.style().filter((each) => each.label);
    const signature = JSON.stringify([step, entries.map((each) => [each.label, values[each.line]?.[index], each.color]), this.note()]);
    replace(this.legend, signature, () => [
      ...entries.map(({ label, color, ink, dash, line }) =>
        element("span", { class: "lens-key" }, swatchOf(ink ?? color, dash), `${label} `, element("b", {}, quantity(values[line]?.[index], this.unit()))),
      ),
      element("span", { class: "lens-key lens-quiet" }, this.cursor === null ? `latest, ${step}` : step),
      ...(this.note() ? [element("span", { class: "lens-key lens-note" }, this.note())] : []),
    ]);
  }

  latestIndex(line) {
    const newest = this.session.source(this.sources()[0]).matrix.newest();
    if (newest >= 0 && Number.isFinite(line?.[newest])) return newest;
    for (let index = (line?.length ?? 0) - 1; index >= 0; index -= 1) if (line[index] !== null && line[index] !== undefined) return index;
    return 0;
  }

  /** What the picture cannot show, in words. */
  note() {
    const above = this.chart.offScale;
    return above.length ? `▲ ${above.length === 1 ? "1 value" : `${above.length} values`} above the scale, up to ${quantity(Math.max(...above.map((each) => each.value)), this.unit())}` : "";
  }

  rows() {
    const width = this.session.source(this.sources()[0]).matrix?.width ?? 1;
    const unit = this.unit();
    const raw = this.style().flatMap((each, index) => (each.derived ? [] : [{ head: each.name ?? each.label, index }]));
    const heads = raw.map(({ head }) => `${head}${unit && unit !== "1" ? ` (${unit})` : ""}`);
    const [x, ...lines] = this.data;
    const values = raw.map(({ index }) => lines[index]);
    const [first, last] = this.session.visible();
    const rows = [];
    x.forEach((step, index) => {
      if (step + width - 1 < first || step > last) return;
      rows.push([step, ...(width > 1 ? [step + width - 1] : []), ...values.map((line) => tableNumber(line[index]))]);
    });
    return { columns: [width > 1 ? "first step" : "step", ...(width > 1 ? ["last step"] : []), ...heads], rows };
  }

  close() {
    this.chart.close();
  }
}

function tableNumber(value) {
  return value === null || value === undefined ? "n/a" : Number(value.toPrecision(6));
}

function swatchOf(color, dash) {
  const node = element("i", { class: "lens-swatch" });
  node.style.setProperty("--swatch", color);
  if (dash?.length) node.classList.add("lens-swatch-dashed");
  return node;
}

/** Median rank as a line, a band up to the slowest. */
class BandPanel extends ChartPanel {
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
class RatePanel extends ChartPanel {
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
class LinePanel extends ChartPanel {
  sources() {
    return [this.root.dataset.metric];
  }

  style() {
    const [color] = lines();
    return [
      { label: "value", color: transparent(color, FAINT), width: 1, line: 0, gaps: true },
      { label: "trend", color, width: 2.4, line: 1, derived: true, gaps: true },
    ];
  }

  columns() {
    const { x, median } = this.session.source(this.root.dataset.metric).matrix.reduce();
    return [x, median, trend(median)];
  }

  note() {
    const step = this.session.source(this.root.dataset.metric).matrix.notFinite;
    return step === null ? super.note() : `✖ not a finite number since step ${integer(step)}`;
  }

  silence() {
    const matrix = this.session.source(this.root.dataset.metric).matrix;
    if (matrix && matrix.notFinite !== null && !matrix.rows.some((row) => row.count.some(Boolean))) return `n/a: every value since step ${matrix.notFinite} is not a finite number.`;
    return super.silence();
  }

  nothing(name) {
    return this.session.range ? super.nothing(name) : `no ${name} yet. Report it with lens.log(loss=…).`;
  }
}

/** The chosen ranks, each a line, beside the median of all. */
class RanksPanel extends ChartPanel {
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

  note() {
    const { why } = this.app.chosenRanks();
    return [why ? `no rank chosen: ${why}` : "", super.note()].filter(Boolean).join(" · ");
  }
}

/** Highest median of a matrix's rows: the rank to look at first. */
export function slowestRank(matrix) {
  let [slowest, highest] = [null, -Infinity];
  for (const row of matrix.rows) {
    const values = [...row.mean.subarray(0, matrix.columns)].filter((value) => value === value).sort((a, b) => a - b);
    if (values.length && middle(values) > highest) [slowest, highest] = [row.rank, middle(values)];
  }
  return slowest;
}

/** What draws each kind of panel that lens.dashboard.components.panel names. */
export const PANELS = { band: BandPanel, rate: RatePanel, line: LinePanel, ranks: RanksPanel, heatmap: HeatmapPanel, ledger: LedgerPanel };
