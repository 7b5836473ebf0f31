// A uPlot line chart with what all of ours share: the page's step range, one crosshair, zoom by dragging, marks.
/* global uPlot */

import { css } from "../core/palette.js";
import { integer, plain, scaleFor } from "../core/format.js";

/** Values above this many times the usual are drawn as a mark at the upper edge, so that one spike hides nothing. */
const OFF_SCALE = 3;
/** Distances between ticks: bytes are counted in powers of two. */
const BINARY = Array.from({ length: 60 }, (_, power) => 2 ** power);
const DECIMAL = Array.from({ length: 30 }, (_, power) => [1, 2, 2.5, 5].map((factor) => Number(`${factor}e${power - 14}`))).flat();
const sync = () => uPlot.sync("lens");

export class Chart {
  /**
   * @param {HTMLElement} place
   * @param {{height: number, series: () => object[], bands?: object[], zero: () => boolean, app: object,
   *          onCursor: (index: number|null) => void, onDrawn: () => void, label: string, left?: number, bars?: () => number}} options
   *   `left`: width of the y axis; `bars`: steps that a bar is wide, where bars are drawn
   */
  constructor(place, options) {
    this.place = place;
    this.options = options;
    this.data = [[]];
    this.unit = null;
    this.marks = [];
    this.offScale = [];
    this.watcher = new ResizeObserver(() => this.resize());
    this.watcher.observe(place);
    this.build();
  }

  build() {
    this.plot?.destroy();
    const { height, app, zero, label } = this.options;
    const axis = { stroke: css("muted"), grid: { stroke: css("grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    this.plot = new uPlot(
      {
        width: Math.max(100, this.place.clientWidth),
        height,
        padding: [14, 12, 0, 0],
        // Only the crosshair is shared: with the buttons too, every chart would zoom by its own rounding.
        cursor: { y: false, sync: { key: sync().key, filters: { pub: (type) => !/^mouse(down|up)$/.test(type) } }, drag: { x: true, y: false, setScale: false }, points: { size: 7 } },
        legend: { show: false },
        scales: {
          x: { time: false, range: () => this.xRange() },
          y: { range: (_, low, high) => this.yRange(low, high, zero()) },
        },
        axes: [
          { ...axis, size: 30, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? integer(tick) : "")) },
          { ...axis, size: this.options.left ?? 62, incrs: () => (this.unit === "By" ? BINARY : DECIMAL), values: (_, ticks) => this.tickNames(ticks) },
        ],
        series: [{}, ...this.options.series()],
        bands: this.options.bands?.() ?? [],
        hooks: {
          setSelect: [(plot) => this.zoom(plot)],
          setCursor: [(plot) => this.options.onCursor(plot.cursor.idx ?? null)],
          draw: [(plot) => this.drawMarks(plot), () => this.options.onDrawn()],
        },
      },
      this.data,
      this.place,
    );
    this.plot.root.setAttribute("role", "img");
    this.plot.root.setAttribute("aria-label", `${label}. The button “Table” shows the same numbers as text.`);
    if (this.options.onClick) {
      this.plot.over.style.cursor = "pointer";
      let pressed = 0;
      this.plot.over.addEventListener("mousedown", (event) => (pressed = event.clientX));
      this.plot.over.addEventListener("click", (event) => {
        const index = this.plot.posToIdx(event.offsetX);
        if (Math.abs(event.clientX - pressed) < 5 && this.data[0].length) this.options.onClick(index);
      });
    }
    this.plot.over.addEventListener("dblclick", () => app.zoomTo(null));
  }

  /** @param {Array[]} data x, then one array a line @param {string|null} unit @param {{step: number, text: string}[]} marks */
  set(data, unit, marks) {
    this.data = data;
    this.unit = unit;
    this.marks = marks;
    this.plot.setData(data);
  }

  resize() {
    const width = this.place.clientWidth;
    if (width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.options.height });
  }

  zoom(plot) {
    const { left, width } = plot.select;
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    if (width < 8) return;
    this.options.app.zoomTo([Math.round(plot.posToVal(left, "x")), Math.round(plot.posToVal(left + width, "x"))]);
  }

  /** Bars stand around their step: half of one more fits at each end. */
  xRange() {
    const [first, last] = this.options.app.session?.visible() ?? [0, 1];
    const half = (this.options.bars?.() ?? 0) / 2;
    return [first - half, last + half];
  }

  yRange(low, high, zero) {
    this.offScale = [];
    if (low === null || high === null || !Number.isFinite(low) || !Number.isFinite(high)) return [0, 1];
    const top = this.usualTop(high);
    if (zero) return [0, top * 1.08 || 1];
    const room = (top - low) * 0.1 || Math.abs(top) * 0.05 || 1;
    return [low - room, top + room];
  }

  /** The highest visible value, unless it is far above nearly all others: then the rest sets the scale. */
  usualTop(high) {
    const [first, last] = this.options.app.session.visible();
    const [x, ...lines] = this.data;
    const visible = [];
    for (const line of lines) for (let i = 0; i < x.length; i += 1) if (x[i] >= first && x[i] <= last && Number.isFinite(line[i])) visible.push(line[i]);
    if (visible.length < 20) return high;
    visible.sort((a, b) => a - b);
    const usual = visible[Math.floor(visible.length * 0.97)];
    if (usual <= 0 || high <= OFF_SCALE * usual) return high;
    const top = usual * 1.6;
    for (let i = 0; i < x.length; i += 1) {
      const highest = Math.max(...lines.map((line) => line[i] ?? -Infinity));
      if (highest > top && x[i] >= first && x[i] <= last) this.offScale.push({ step: x[i], value: highest });
    }
    return top;
  }

  tickNames(ticks) {
    const largest = Math.max(...ticks.map(Math.abs));
    const { divide, name } = scaleFor(this.unit, largest);
    const behind = name.length > 3 ? name.split(" ")[0] : name; // "k tok/s" is "k" here: the legend has the rest
    return ticks.map((tick) => `${plain(tick / divide)}${tick && behind ? ` ${behind}` : ""}`);
  }

  /** Dashed lines where something began; arrows for values above the scale; what the x axis counts. */
  drawMarks(plot) {
    const { ctx, bbox } = plot;
    const ratio = window.devicePixelRatio || 1;
    ctx.save();
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.fillStyle = css("muted");
    ctx.textAlign = "right";
    ctx.textBaseline = "top";
    ctx.fillText("step", bbox.left - 30 * ratio, bbox.top + bbox.height + 6 * ratio);
    ctx.textBaseline = "alphabetic";
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    this.marks.forEach((mark, line) => {
      const at = plot.valToPos(mark.step, "x", true);
      if (at < bbox.left || at > bbox.left + bbox.width) return;
      ctx.strokeStyle = ctx.fillStyle = css(mark.quiet ? "text" : "mark");
      ctx.setLineDash([5 * ratio, 4 * ratio]);
      ctx.lineWidth = ratio;
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      const left = at + ctx.measureText(mark.text).width + 12 * ratio > bbox.left + bbox.width;
      ctx.textAlign = left ? "right" : "left";
      ctx.fillText(mark.text, at + (left ? -5 : 5) * ratio, bbox.top + (10 + 13 * line) * ratio);
    });
    ctx.fillStyle = css("mark");
    for (const { step } of this.offScale) {
      const at = plot.valToPos(step, "x", true);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top - 9 * ratio);
      ctx.lineTo(at - 5 * ratio, bbox.top - 1 * ratio);
      ctx.lineTo(at + 5 * ratio, bbox.top - 1 * ratio);
      ctx.fill();
    }
    ctx.restore();
  }

  close() {
    this.watcher.disconnect();
    this.plot.destroy();
  }
}
