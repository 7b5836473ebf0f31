// Rank × step map on a canvas: one pixel is never less than the highest of the cells it covers.

import { CanvasPanel, outline } from "./canvas_panel.js";
import { cividis, cividisGradient, css } from "../core/palette.js";
import { domainOf, hatch, mapLeft, NAMED_ROWS, niceSteps, paintRowName, pool } from "./map.js";
import { element, replace } from "../core/dom.js";
import { integer, number, quantity, rankName, scaleFor } from "../core/format.js";
import { blamedRanks, onsetMarks, sourceName } from "../core/causes.js";

const BOTTOM = 26;
const TOP = 16;
const RIGHT = 12;
const TALLEST = 520;
/** Pixels after which a press is a drag. */
const DRAG = 8;

export class HeatmapPanel extends CanvasPanel {
  constructor(root, session, app) {
    super(root, session, app);
    this.cells = document.createElement("canvas");
    this.listen();
  }

  sources() {
    return [this.app.metric];
  }

  get source() {
    return this.session.source(this.app.metric);
  }

  label() {
    const { matrix } = this.source;
    const of = matrix?.rows.length ? `: ${sourceName(this.source.name)} of ${matrix.rows.length} ranks` : "";
    return `${this.title}${of}. Arrow keys read cells, Enter shows a rank's line; the button “Table” shows the numbers as text.`;
  }

  listen() {
    this.on("pointermove", (event) => {
      if (this.dragFrom === undefined) return;
      this.dragTo = event.offsetX;
      this.drawOver();
    });
    this.on("pointerdown", (event) => {
      this.over.setPointerCapture(event.pointerId);
      this.dragFrom = this.dragTo = event.offsetX;
    });
    this.on("pointerup", (event) => {
      const [from, to] = [Math.min(this.dragFrom, event.offsetX), Math.max(this.dragFrom, event.offsetX)];
      this.dragFrom = this.dragTo = undefined;
      const cell = this.at(event.offsetX, event.offsetY);
      if (to - from > DRAG) this.app.zoomTo([this.stepAt(from), this.stepAt(to)]);
      else if (cell) this.app.toggleRank(cell.rank);
    });
    this.on("dblclick", () => this.app.zoomTo(null));
  }

  onKey(event) {
    if (event.key === "Enter" && this.hover) this.app.toggleRank(this.hover.rank);
    else super.onKey(event);
  }

  moved(rows, columns) {
    const { matrix } = this.source;
    if (!matrix?.rows.length) return null;
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    const row = within((this.hover?.row ?? 0) + rows, matrix.rows.length);
    const column = within((this.hover?.column ?? matrix.columns - 1) + columns, matrix.columns);
    return { row, column, rank: matrix.rows[row].rank };
  }

  silence() {
    const { state, reason, name, matrix } = this.source;
    if (state === "loading" && !matrix) return "Loading…";
    if (state === "error") return `n/a: ${reason}`;
    if (state === "empty" && this.session.observed) return `n/a: ${this.session.noStep}.`;
    if (state === "empty") return this.session.range ? `n/a: no ${name} in steps ${this.session.range.join("–")}. Press 0 for all steps.` : `n/a: this run has not reported ${name} by rank and step.`;
    return null;
  }

  render() {
    if (this.say(this.silence())) {
      this.legend.replaceChildren();
      return;
    }
    if (this.picture.hidden) return;
    const context = this.place();
    this.paint(context);
    this.point(this.hover);
    this.drawLegend();
  }

  /** Sizes of everything, from the number of ranks and the room there is. */
  place() {
    const count = this.source.matrix.rows.length;
    const rowHeight = count <= 8 ? 34 : count <= 16 ? 24 : count <= 32 ? 15 : Math.max(1, Math.floor(TALLEST / count));
    const height = Math.min(TALLEST, count * rowHeight);
    const left = mapLeft(count);
    const width = Math.max(50, this.picture.clientWidth - left - RIGHT);
    this.box = { left, width, height, rowHeight: height / count, named: count <= NAMED_ROWS };
    return this.begin(height + TOP + BOTTOM);
  }

  /** Columns of the matrix that are visible. */
  span() {
    const { matrix } = this.source;
    const [first, last] = this.session.visible();
    return [Math.max(0, Math.floor((first - matrix.from) / matrix.width)), Math.floor((last - matrix.from) / matrix.width) + 1];
  }

  paint(context) {
    const { matrix } = this.source;
    const [start, end] = this.span();
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.max(1, Math.min(end - start, Math.round(this.box.width * ratio)));
    const high = Math.max(1, Math.min(matrix.rows.length, Math.round(this.box.height * ratio)));
    const pooled = pool(matrix, start, end, wide, high);
    this.domain = domainOf(pooled, this.source.unit);
    const [low, top] = this.domain;
    Object.assign(this.cells, { width: wide, height: high });
    const cells = this.cells.getContext("2d");
    const image = cells.createImageData(wide, high);
    const words = new Uint32Array(image.data.buffer);
    const factor = 255 / (top - low || 1);
    for (let index = 0; index < words.length; index += 1) {
      const value = pooled[index];
      if (value === value) words[index] = cividis[Math.max(0, Math.min(255, Math.round((value - low) * factor)))];
    }
    cells.putImageData(image, 0, 0);

    const { left, width, height } = this.box;
    hatch(context, left, TOP, width, height);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.cells, left, TOP, width, height);
    this.paintAxes(context);
  }

  paintAxes(context) {
    const { matrix } = this.source;
    const { left, width, height, rowHeight, named } = this.box;
    const blamed = blamedRanks(this.session.diagnosis);
    const chosen = new Set(this.app.address.ranks);
    const every = Math.max(1, Math.ceil(15 / rowHeight));
    matrix.rows.forEach(({ rank }, index) => {
      if (index && rowHeight >= 12) {
        context.fillStyle = css("card");
        context.fillRect(left, TOP + index * rowHeight - 0.5, width, 1);
      }
      if (!blamed.has(rank) && !chosen.has(rank) && index % every) return;
      paintRowName(context, this.session, { rank, x: left - 10, y: TOP + (index + 0.5) * rowHeight, named, blamed: blamed.has(rank), chosen: chosen.has(rank) });
    });
    this.paintSteps(context);
    this.paintMarks(context);
  }

  paintSteps(context) {
    const { left, width, height } = this.box;
    const [first, last] = this.session.visible();
    context.textBaseline = "top";
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = css("muted");
    context.textAlign = "right";
    context.fillText("step", left - 30, TOP + height + 8);
    context.textAlign = "center";
    for (const step of niceSteps(first, last, Math.floor(width / 110))) context.fillText(integer(step), this.xOf(step + 0.5), TOP + height + 8);
  }

  /** Where a trouble began; of marks that stand close together, the first is named. */
  paintMarks(context) {
    const { left, width, height } = this.box;
    const [first, last] = this.session.visible();
    let named = -Infinity;
    for (const mark of onsetMarks(this.session.diagnosis).sort((a, b) => a.step - b.step)) {
      if (mark.step < first || mark.step > last) continue;
      const at = this.xOf(mark.step);
      context.fillStyle = css("card");
      context.fillRect(at - 2, TOP, 4, height); // a ground of its own: cells may have any colour
      context.fillStyle = css("mark");
      for (let y = TOP - 2; y < TOP + height; y += 7) context.fillRect(at - 0.75, y, 1.5, 4);
      const right = at > left + width - 120;
      context.textAlign = right ? "right" : "left";
      context.textBaseline = "alphabetic";
      context.font = "11px system-ui, sans-serif";
      if (at > named) context.fillText(mark.text, at + (right ? -4 : 4), TOP - 5);
      named = Math.max(named, at + context.measureText(mark.text).width + 12);
    }
  }

  xOf(step) {
    const [start, end] = this.span();
    const { matrix } = this.source;
    return this.box.left + ((step - matrix.from) / matrix.width - start) / (end - start) * this.box.width;
  }

  stepAt(x) {
    const [start, end] = this.span();
    const { matrix } = this.source;
    const column = start + Math.max(0, Math.min(0.9999, (x - this.box.left) / this.box.width)) * (end - start);
    return Math.floor(matrix.from + column * matrix.width);
  }

  at(x, y) {
    const { matrix } = this.source;
    if (!this.box || !matrix?.rows.length) return null;
    const { left, width, height, rowHeight } = this.box;
    if (x < 0 || x > left + width || y < TOP || y > TOP + height) return null;
    const row = Math.min(matrix.rows.length - 1, Math.floor((y - TOP) / rowHeight));
    return { row, column: x < left ? null : matrix.columnOf(this.stepAt(x)), rank: matrix.rows[row].rank };
  }

  point(cell) {
    const { matrix } = this.source;
    const pointed = cell && cell.column !== null && cell.column >= 0;
    this.app.point(pointed && matrix ? matrix.stepOf(cell.column) : null, this);
    super.point(cell);
  }

  /** Shows the step that another picture points at. */
  pointAt(step) {
    this.pointed = step;
    if (this.box) this.drawOver();
  }

  paintOver(context) {
    if (!this.box) return;
    const { left, width, height, rowHeight } = this.box;
    const { matrix } = this.source;
    matrix?.rows.forEach(({ rank }, index) => {
      if (this.app.address.ranks.includes(rank)) outline(context, { x: left, y: TOP + index * rowHeight, width, height: rowHeight }, css("text"));
    });
    if (this.dragFrom !== undefined && Math.abs(this.dragTo - this.dragFrom) > 3) {
      context.fillStyle = css("select");
      context.fillRect(Math.min(this.dragFrom, this.dragTo), TOP, Math.abs(this.dragTo - this.dragFrom), height);
    }
    if (this.pointed !== null && this.pointed !== undefined && !this.hover && matrix) {
      context.fillStyle = css("text");
      context.fillRect(this.xOf(this.pointed + matrix.width / 2), TOP, 1, height);
    }
  }

  describe({ row, column, rank }, context) {
    const { matrix, unit } = this.source;
    const { left, rowHeight } = this.box;
    const about = this.session.about(rank);
    const box = { x: left, y: TOP + row * rowHeight, width: 0, height: Math.max(2, rowHeight) };
    const lines = [`${rankName(rank)}${about?.device ? ` · ${about.device}` : ""}`];
    if (column !== null && column >= 0) {
      const first = matrix.stepOf(column);
      box.x = this.xOf(first);
      box.width = Math.max(2, this.xOf(first + matrix.width) - box.x);
      outline(context, box, css("text"), 1.5);
      const value = matrix.rows[row].max[column];
      lines.push(element("span", { class: "lens-tip-value" }, value === value ? quantity(value, unit) : "n/a: nothing reported"));
      lines.push(matrix.width > 1 ? `highest of steps ${integer(first)}–${integer(first + matrix.width - 1)}` : `step ${integer(first)}`);
      const median = matrix.reduce().median[column];
      if (median !== null && value === value && median > 0) lines.push(`${number(value / median, 3)} × the median of all ranks (${quantity(median, unit)})`);
    }
    lines.push(element("small", {}, this.app.address.ranks.includes(rank) ? "click: hide its line" : "click: show its line"));
    return { box, lines };
  }

  drawLegend() {
    const { unit, name, matrix } = this.source;
    const [low, high] = this.domain;
    const { divide, name: shownUnit } = scaleFor(unit, high);
    const text = (value) => number(value / divide, 3);
    const clipped = this.domain.clipped;
    replace(this.legend, [name, text(low), text(high), clipped, matrix.width].join(), () => {
      const bar = element("i", { class: "lens-colorbar" });
      bar.style.background = cividisGradient;
      return [
        element("span", { class: "lens-key" }, `${sourceName(name)} `, element("span", {}, text(low)), bar, element("b", {}, `${clipped ? "≥ " : ""}${text(high)} ${shownUnit}`)),
        element("span", { class: "lens-key" }, element("i", { class: "lens-nodata" }), "nothing reported"),
        ...(matrix.width > 1 ? [element("span", { class: "lens-key lens-quiet" }, `each column: the highest of ${matrix.width} steps`)] : []),
      ];
    });
  }

  /** On the page one row a rank; in the file one row a cell. */
  rows(forPage) {
    const { matrix, unit } = this.source;
    const named = unit && unit !== "1" ? ` (${unit})` : "";
    if (!matrix) return { columns: ["rank"], rows: [] };
    const [first, last] = this.session.visible();
    const columns = [];
    for (let column = 0; column < matrix.columns; column += 1) {
      const step = matrix.stepOf(column);
      if (step + matrix.width - 1 >= first && step <= last) columns.push(column);
    }
    if (forPage) {
      const rows = matrix.rows.map((row) => {
        const known = columns.filter((column) => row.max[column] === row.max[column]);
        const means = known.map((column) => row.mean[column]).sort((a, b) => a - b);
        const worst = known.reduce((best, column) => (best === null || row.max[column] > row.max[best] ? column : best), null);
        const latest = known.length ? quantity(row.mean[known[known.length - 1]], unit) : "n/a";
        const median = means.length ? quantity(means[means.length >> 1], unit) : "n/a";
        return [row.rank < 0 ? "all" : row.rank, this.session.about(row.rank)?.device ?? "n/a", latest, median, worst === null ? "n/a" : quantity(row.max[worst], unit), worst === null ? "n/a" : matrix.stepOf(worst)];
      });
      return { columns: ["rank", "device", "latest", "median", "highest", "at step"], rows: rows.reverse() };
    }
    const pooled = matrix.width > 1;
    const rows = [];
    for (const column of columns) {
      for (const row of matrix.rows) {
        const value = row.max[column];
        if (value === value) rows.push([matrix.stepOf(column), ...(pooled ? [matrix.stepOf(column) + matrix.width - 1] : []), row.rank, value, ...(pooled ? [row.mean[column]] : [])]);
      }
    }
    return { columns: pooled ? ["first step", "last step", "rank", `highest${named}`, `mean${named}`] : ["step", "rank", `${this.source.name}${named}`], rows };
  }
}
