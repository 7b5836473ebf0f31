// A panel with one line chart: its legend, crosshair, table and what it says when there is nothing to draw.

import { Chart } from "./chart.js";
import { Panel } from "./panel.js";
import { element, replace } from "../core/dom.js";
import { integer, quantity } from "../core/format.js";
import { onsetMarks } from "../core/causes.js";

/** A panel with one chart; a subclass gives `names`, `columns()` and `style()`. */
export class ChartPanel extends Panel {
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
      series: () => this.style().map(({ color, dash, fill, width, gaps, paths }) => ({ paths, stroke: color, dash, fill, width: width ?? 1.8, spanGaps: gaps ?? false, points: { show: () => this.data[0].length < 2 } })),
      bands: () => this.bands(),
      left: this.left,
      bars: this.bars && (() => this.bars()),
      onCursor: (index) => {
        this.cursor = index;
        // The hook also fires when new data slides under a crosshair that another picture has set.
        if (this.picture.matches(":hover")) this.app.point(index === null ? null : this.data[0][index] ?? null, this);
        this.drawLegend();
      },
      onClick: this.onClick ? (index) => this.onClick(this.data[0][index]) : null,
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
    if (!this.picture.hidden) this.chart.set(this.data, this.unit(), this.marks());
    this.drawLegend();
  }

  /** Steps that are marked: where a trouble began. */
  marks() {
    return onsetMarks(this.session.diagnosis);
  }

  unit() {
    return this.session.source(this.sources()[0]).unit;
  }

  /** Steps in one column. */
  columnWidth() {
    return this.session.source(this.sources()[0]).matrix?.width ?? 1;
  }

  /** The column whose values the legend shows when nothing is pointed at. */
  newestColumn() {
    return this.session.source(this.sources()[0]).matrix.newest();
  }

  /** Why there is no picture, or null. */
  silence(names = this.sources()) {
    for (const name of names) {
      const source = this.session.source(name);
      if (source.state === "loading") return "Loading…";
      if (source.state === "error") return `n/a: ${source.reason}`;
      if (source.state === "empty") return `n/a: ${this.nothing(name)}`;
    }
    return null;
  }

  nothing(name) {
    if (this.session.range) return `no ${name} in steps ${this.session.range.join("–")}. Press 0 for all steps.`;
    return this.session.lastStep === null ? `${this.session.noStep}.` : `this run has not reported ${name}.`;
  }

  drawLegend() {
    const [x, ...values] = this.data;
    if (!x.length || this.say(this.silence())) return;
    const index = this.cursor !== null && this.cursor < x.length ? this.cursor : this.latestIndex(values[0]);
    const width = this.columnWidth();
    const step = x[index] === undefined ? "" : width > 1 ? `steps ${integer(x[index])}–${integer(Math.min(x[index] + width - 1, Math.max(x[index], this.session.lastStep ?? Infinity)))}` : `step ${integer(x[index])}`;
    const entries = this.style().filter((each) => each.label);
    const signature = JSON.stringify([step, entries.map((each) => [each.label, values[each.line]?.[index], each.color]), this.note(), this.remark()]);
    replace(this.legend, signature, () => [
      ...entries.map(({ label, color, ink, dash, line }) =>
        element("span", { class: "lens-key" }, swatchOf(ink ?? color, dash), `${label} `, element("b", {}, quantity(values[line]?.[index], this.unit()))),
      ),
      element("span", { class: "lens-key lens-quiet" }, this.cursor === null ? `latest, ${step}` : step),
      ...(this.remark() ? [element("span", { class: "lens-key lens-quiet" }, this.remark())] : []),
      ...(this.note() ? [element("span", { class: "lens-key lens-note" }, this.note())] : []),
    ]);
  }

  latestIndex(line) {
    const newest = this.newestColumn();
    if (newest >= 0 && Number.isFinite(line?.[newest])) return newest;
    for (let index = (line?.length ?? 0) - 1; index >= 0; index -= 1) if (line[index] !== null && line[index] !== undefined) return index;
    return 0;
  }

  /** What else a reader may want to know. */
  remark() {
    return "";
  }

  /** What the picture cannot show, in words. */
  note() {
    const above = this.chart.offScale;
    return above.length ? `▲ ${above.length === 1 ? "1 value" : `${above.length} values`} above the scale, up to ${quantity(Math.max(...above.map((each) => each.value)), this.unit())}` : "";
  }

  rows() {
    const width = this.columnWidth();
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

export function tableNumber(value) {
  return value === null || value === undefined ? "n/a" : Number(value.toPrecision(6));
}

export function swatchOf(color, dash) {
  const node = element("i", { class: "lens-swatch" });
  node.style.setProperty("--swatch", color);
  if (dash?.length) node.classList.add("lens-swatch-dashed");
  return node;
}
