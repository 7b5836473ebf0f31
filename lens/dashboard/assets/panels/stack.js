// Steps as stacked phases: how long the median rank spends in each, step by step. A click chooses a step.
/* global uPlot */

import { BETWEEN, PHASE_NAMES, phaseColours, phaseWords } from "../core/phases.js";
import { ChartPanel } from "./chart_panel.js";
import { element, replace } from "../core/dom.js";
import { integer, quantity } from "../core/format.js";
import { stepShown } from "../core/shown_step.js";

const SHORT = 0.002;

export class StackPanel extends ChartPanel {
  get zero() {
    return true;
  }

  sources() {
    return ["step.duration", ...PHASE_NAMES.map((name) => `phase.duration:${name}`)];
  }

  onClick(step) {
    this.app.update({ step });
  }

  marks() {
    const { step } = stepShown(this.app);
    return [...super.marks(), ...(step === null ? [] : [{ step, text: "shown below", quiet: true }])];
  }

  silence() {
    const { state, reason } = this.session.source("step.duration");
    if (state === "loading") return "Loading…";
    if (state === "error") return `n/a: ${reason}`;
    return state === "empty" ? `n/a: ${this.nothing("step.duration")}` : null;
  }

  newestStep() {
    return this.session.source("step.duration").matrix?.lastStep ?? null;
  }

  /** Phases that this run has had, from the ground up, and above them what lies between. */
  get layers() {
    const known = PHASE_NAMES.filter((name) => this.session.source(`phase.duration:${name}`).matrix?.rows.length);
    return [...known, BETWEEN];
  }

  /** The pile is drawn from its top: each bar reaches down to the ground, and the next covers it. */
  style() {
    const paths = uPlot.paths.bars({ size: [1, Infinity] });
    return [...this.layers].reverse().map((name, line) => ({ name, label: phaseWords(name), color: phaseColours(name)[0], fill: phaseColours(name)[0], width: 0, paths, line }));
  }

  /** A bar is as wide as the steps it stands for. */
  bars() {
    return this.columnWidth();
  }

  columns() {
    const { matrix } = this.session.source("step.duration");
    const { x, median } = matrix.reduce();
    const layers = this.layers;
    const parts = layers.slice(0, -1).map((name) => {
      const own = this.session.source(`phase.duration:${name}`).matrix;
      const values = own.reduce().median;
      return x.map((step) => values[own.columnOf(step)] ?? null);
    });
    const sums = x.map((_, index) => parts.reduce((sum, values) => sum + (values[index] ?? 0), 0));
    // Medians of parts need not add up to the median of the whole; what is missing lies between phases.
    this.parts = [...parts, x.map((_, index) => (median[index] === null ? null : Math.max(0, median[index] - sums[index])))];
    const pile = [];
    let below = x.map(() => 0);
    for (const values of this.parts) {
      below = below.map((base, index) => (median[index] === null ? null : base + (values[index] ?? 0)));
      pile.push(below);
    }
    return [x, ...pile.reverse()];
  }

  render() {
    const signature = this.layers.join();
    if (this.signature !== signature) {
      this.signature = signature;
      this.cursor = null;
      this.data = [[], ...this.layers.map(() => [])];
      this.makeChart();
    }
    super.render();
  }

  drawLegend() {
    const [x] = this.data;
    if (!x.length || !this.parts || this.say(this.silence())) return;
    const index = this.cursor !== null && this.cursor < x.length ? this.cursor : this.latestIndex(this.data[1]);
    const width = this.columnWidth();
    const step = width > 1 ? `steps ${integer(x[index])}–${integer(x[index] + width - 1)}` : `step ${integer(x[index])}`;
    const whole = this.data[1]?.[index] ?? null;
    const entries = this.layers.map((name, layer) => [name, this.parts[layer]?.[index] ?? null]).filter(([name, value]) => name !== BETWEEN || (value ?? 0) > SHORT * (whole ?? 0));
    replace(this.legend, JSON.stringify([step, entries, this.cursor === null, phaseColours(BETWEEN), this.note()]), () => [
      ...entries.map(([name, value]) => {
        const square = element("i", { class: "lens-square" });
        [square.style.background] = phaseColours(name);
        return element("span", { class: "lens-key" }, square, `${phaseWords(name)} `, value === null ? element("span", { class: "lens-quiet" }, "none") : element("b", {}, quantity(value, "s")));
      }),
      element("span", { class: "lens-key lens-quiet" }, `${this.cursor === null ? "latest, " : ""}${step}`),
      ...(this.note() ? [element("span", { class: "lens-key lens-note" }, this.note())] : []),
    ]);
  }

  note() {
    const shared = this.columnWidth() > 1 ? `each column: the mean of ${this.columnWidth()} steps; a rare phase at the length it has when it comes` : "";
    return [super.note(), shared].filter(Boolean).join(" · ");
  }

  rows() {
    const [x] = this.data;
    const [first, last] = this.session.visible();
    const width = this.columnWidth();
    const rows = [];
    x.forEach((step, index) => {
      if (step + width - 1 < first || step > last) return;
      rows.push([step, ...(width > 1 ? [step + width - 1] : []), ...this.parts.map((values) => (values[index] === null ? "none" : Number(values[index].toPrecision(6))))]);
    });
    return { columns: [width > 1 ? "first step" : "step", ...(width > 1 ? ["last step"] : []), ...this.layers.map((name) => `${phaseWords(name)} (s)`)], rows };
  }
}
