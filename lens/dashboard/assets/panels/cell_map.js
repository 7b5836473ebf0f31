// A small map of named rows and columns: each cell has its colour and, where there is room, its number.

import { CanvasPanel, outline } from "./canvas_panel.js";
import { cividis, cividisGradient, css } from "../core/palette.js";
import { element, replace } from "../core/dom.js";
import { hatch } from "./map.js";
import { number, quantity, scaleFor } from "../core/format.js";

const TOP = 46;
const RIGHT = 12;
const TALLEST = 560;
const WIDEST_CELL = 150;

export class CellMapPanel extends CanvasPanel {
  /** A subclass gives {rows, columns, values, unit, rowTitle, columnTitle, gap} (names as text, null: no value), or text that says why not. */
  content() {
    return "Loading…";
  }

  render() {
    const content = this.content();
    if (this.say(typeof content === "string" ? content : null)) return this.legend.replaceChildren();
    this.shown = content;
    const known = content.values.flat().filter((value) => value !== null);
    this.low = content.fromZero ? 0 : Math.min(...known, Infinity);
    this.high = Math.max(...known, this.low === Infinity ? 1 : this.low);
    if (!this.picture.hidden) this.paint();
    this.drawLegend();
    return undefined;
  }

  paint() {
    const { rows, columns, values, unit } = this.shown;
    const measure = this.base.getContext("2d");
    measure.font = "12px system-ui, sans-serif";
    const left = Math.ceil(Math.max(...rows.map((name) => measure.measureText(name).width))) + 22;
    const room = this.picture.clientWidth - left - RIGHT;
    const wide = Math.min(WIDEST_CELL, room / columns.length);
    const high = Math.max(2, Math.min(40, wide, TALLEST / rows.length));
    this.box = { left, wide, high };
    const context = this.begin(TOP + high * rows.length + 8);
    const { divide } = scaleFor(unit, this.high);
    rows.forEach((_, row) => columns.forEach((__, column) => this.paintCell(context, row, column, values[row][column], divide)));
    this.paintNames(context, rows, columns);
    this.point(this.hover && values[this.hover.row]?.[this.hover.column] !== undefined ? this.hover : null);
  }

  paintCell(context, row, column, value, divide) {
    const { left, wide, high } = this.box;
    const gap = wide > 8 && high > 8 ? 1.5 : 0;
    const [x, y] = [left + column * wide, TOP + row * high];
    if (value === null) return hatch(context, x, y, wide - gap, high - gap);
    const share = this.high > this.low ? (value - this.low) / (this.high - this.low) : 0;
    const word = cividis[Math.max(0, Math.min(255, Math.round(share * 255)))];
    context.fillStyle = `rgb(${word & 255}, ${(word >> 8) & 255}, ${(word >> 16) & 255})`;
    context.fillRect(x, y, wide - gap, high - gap);
    if (wide < 46 || high < 18) return undefined;
    context.fillStyle = share > 0.5 ? "#101418" : "#ffffff";
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(number(value / divide, 3), x + (wide - gap) / 2, y + (high - gap) / 2);
    return undefined;
  }

  paintNames(context, rows, columns) {
    const { left, wide, high } = this.box;
    const { rowTitle, columnTitle } = this.shown;
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = css("muted");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(15 / high));
    rows.forEach((name, row) => row % every === 0 && context.fillText(name, left - 8, TOP + (row + 0.5) * high));
    context.textAlign = "center";
    const widest = Math.max(...columns.map((name) => context.measureText(name).width)) + 8;
    const each = Math.max(1, Math.ceil(widest / wide));
    columns.forEach((name, column) => column % each === 0 && context.fillText(name, left + (column + 0.5) * wide, TOP - 12));
    context.font = "600 12px system-ui, sans-serif";
    context.textAlign = "left";
    context.fillText(`${columnTitle} →`, left, 12);
    context.textAlign = "right";
    context.fillText(`${rowTitle} ↓`, left - 8, 12);
  }

  at(x, y) {
    if (!this.box || !this.shown) return null;
    const [row, column] = [Math.floor((y - TOP) / this.box.high), Math.floor((x - this.box.left) / this.box.wide)];
    return row >= 0 && column >= 0 && row < this.shown.rows.length && column < this.shown.columns.length ? { row, column } : null;
  }

  moved(rows, columns) {
    if (!this.shown) return null;
    if (!this.hover) return { row: 0, column: 0 };
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    return { row: within(this.hover.row + rows, this.shown.rows.length), column: within(this.hover.column + columns, this.shown.columns.length) };
  }

  describe({ row, column }, context) {
    const { left, wide, high } = this.box;
    const box = { x: left + column * wide, y: TOP + row * high, width: wide, height: high };
    outline(context, box, css("text"));
    const value = this.shown.values[row][column];
    const shown = element("span", { class: "lens-tip-value" }, value === null ? `n/a: ${this.shown.gap(row, column)}` : quantity(value, this.shown.unit));
    return { box, lines: [this.shown.name(row, column), shown, ...(value === null ? [] : this.shown.more?.(row, column) ?? [])] };
  }

  drawLegend() {
    const { unit, measure, notes } = this.shown;
    const { divide, name } = scaleFor(unit, this.high);
    const text = (value) => number(value / divide, 3);
    replace(this.legend, JSON.stringify([measure, this.low, this.high, notes]), () => {
      const bar = element("i", { class: "lens-colorbar" });
      bar.style.background = cividisGradient;
      return [
        element("span", { class: "lens-key" }, `${measure} `, element("span", {}, text(this.low)), bar, element("b", {}, `${text(this.high)} ${name}`)),
        element("span", { class: "lens-key" }, element("i", { class: "lens-nodata" }), this.shown.gapWords),
        ...notes.map((note) => element("span", { class: "lens-key lens-quiet" }, note)),
      ];
    });
  }

  rows() {
    const { rows, columns, values, unit, rowTitle, columnTitle } = this.shown ?? { rows: [], columns: [], values: [] };
    const table = rows.flatMap((name, row) => columns.map((other, column) => [name, other, values[row][column] ?? "n/a"]));
    return { columns: [rowTitle, columnTitle, unit && unit !== "1" ? `value (${unit})` : "value"], rows: table };
  }
}
