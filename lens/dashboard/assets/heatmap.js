// Rank × step map on a canvas: one pixel is never less than the highest of the cells it covers.

import { Panel } from "./panel.js";
import { cividis, cividisGradient, css } from "./palette.js";
import { element, replace } from "./dom.js";
import { integer, number, quantity, rankName, scaleFor } from "./format.js";
import { domainOf, hatch, mapLeft, NAMED_ROWS, niceSteps, pool } from "./map.js";
import { onsetMarks, sourceName } from "./causes.js";

const BOTTOM = 26;
const TOP = 16;
const RIGHT = 12;
const TALLEST = 520;
export class HeatmapPanel extends Panel {
  constructor(root, session, app) {
    super(root, session, app);
    this.base = element("canvas", { class: "lens-map" });
    this.over = element("canvas", { class: "lens-map-over", tabindex: "0", role: "img" });
    this.tip = element("div", { class: "lens-tip", hidden: true });
    this.picture.classList.add("lens-map-place");
    this.picture.append(this.base, this.over, this.tip);
    this.canvases = () => [this.base];
    this.makeTools();
    this.cells = document.createElement("canvas");
    this.hover = null;
    this.watcher = new ResizeObserver(() => this.draw());
    this.watcher.observe(this.picture);
    this.listen();
  }

  sources() {
    return [this.app.metric];
  }

  get source() {
    return this.session.source(this.app.metric);
  }

  recolor() {
    this.draw();
  }

  listen() {
    const on = (name, handle) => this.over.addEventListener(name, handle);
    on("pointermove", (event) => {
      this.setHover(this.cellAt(event.offsetX, event.offsetY));
      if (this.dragFrom !== undefined) this.dragTo = event.offsetX;
      this.drawOver();
    });
    on("pointerleave", () => this.setHover(null));
    on("pointerdown", (event) => {
      this.over.setPointerCapture(event.pointerId);
      this.dragFrom = this.dragTo = event.offsetX;
    });
    on("pointerup", (event) => {
      const [from, to] = [Math.min(this.dragFrom, event.offsetX), Math.max(this.dragFrom, event.offsetX)];
      this.dragFrom = this.dragTo = undefined;
      const cell = this.cellAt(event.offsetX, event.offsetY);
      if (to - from > 8) this.app.zoomTo([this.stepAt(from), this.stepAt(to)]);
      else if (cell) this.app.toggleRank(cell.rank);
    });
    on("dblclick", () => this.app.zoomTo(null));
    on("keydown", (event) => this.onKey(event));
    on("blur", () => this.setHover(null));
  }

  onKey(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const { matrix } = this.source;
    if (move && matrix?.rows.length) {
      event.preventDefault();
      const row = Math.max(0, Math.min(matrix.rows.length - 1, (this.hover?.row ?? 0) + move[0]));
      const column = Math.max(0, Math.min(matrix.columns - 1, (this.hover?.column ?? matrix.columns - 1) + move[1]));
      this.setHover({ row, column, rank: matrix.rows[row].rank });
    } else if (event.key === "Enter" && this.hover) this.app.toggleRank(this.hover.rank);
  }

  silence() {
    const { state, reason, name, matrix } = this.source;
    if (state === "loading" && !matrix) return "Loading…";
    if (state === "error") return `n/a: ${reason}`;
    if (state === "empty") return this.session.range ? `n/a: no ${name} in steps ${this.session.range.join("–")}. Press 0 for all steps.` : `n/a: this run has not reported ${name} by rank and step.`;
    return null;
  }

  render() {
    if (this.say(this.silence())) {
      this.legend.replaceChildren();
      return;
    }
    if (this.picture.hidden) return;
    this.place();
    this.paint();
    this.setHover(this.hover);
    this.drawLegend();
  }

  /** Sizes of everything, from the number of ranks and the room there is. */
  place() {
    const { matrix } = this.source;
    const count = matrix.rows.length;
    const rowHeight = count <= 8 ? 34 : count <= 16 ? 24 : count <= 32 ? 15 : Math.max(1, Math.floor(TALLEST / count));
    const named = count <= NAMED_ROWS;
    const height = count * rowHeight > TALLEST ? TALLEST : count * rowHeight;
    const width = this.picture.clientWidth;
    const ratio = window.devicePixelRatio || 1;
    const left = mapLeft(count);
    this.box = { left, width: Math.max(50, width - left - RIGHT), height, rowHeight: height / count, named };
    for (const canvas of [this.base, this.over]) {
      const [w, h] = [Math.round(width * ratio), Math.round((height + TOP + BOTTOM) * ratio)];
      if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height + TOP + BOTTOM}px`;
    }
    this.picture.style.height = `${height + TOP + BOTTOM}px`;
  }

  /** Columns of the matrix that are visible. */
  span() {
    const { matrix } = this.source;
    const [first, last] = this.session.visible();
    return [Math.max(0, Math.floor((first - matrix.from) / matrix.width)), Math.floor((last - matrix.from) / matrix.width) + 1];
  }

  paint() {
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

    const context = this.base.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.base.width, this.base.height);
    const { left, width, height } = this.box;
    hatch(context, left, TOP, width, height);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.cells, left, TOP, width, height);
    this.paintAxes(context);
  }

  paintAxes(context) {
    const { matrix } = this.source;
    const { left, width, height, rowHeight, named } = this.box;
    const blamed = new Set((this.session.diagnosis?.hypotheses ?? []).flatMap((each) => each.ranks ?? []));
    const chosen = new Set(this.app.address.ranks);
    const every = Math.max(1, Math.ceil(15 / rowHeight));
    context.textBaseline = "middle";
    context.textAlign = "right";
    matrix.rows.forEach(({ rank }, index) => {
      if (index && rowHeight >= 12) {
        context.fillStyle = css("card");
        context.fillRect(left, TOP + index * rowHeight - 0.5, width, 1);
      }
      const special = blamed.has(rank) || chosen.has(rank);
      if (!special && index % every) return;
      const middle = TOP + (index + 0.5) * rowHeight;
      context.fillStyle = special ? css("text") : css("muted");
      context.font = `${special ? 700 : 400} 12px system-ui, sans-serif`;
      const device = named ? this.session.about(rank)?.device : null;
      const sign = blamed.has(rank) ? "▲ " : "";
      context.fillText(`${sign}${named || rank < 0 ? rankName(rank) : rank}${device ? ` · ${device}` : ""}`, left - 10, middle);
    });
    context.textAlign = "center";
    context.textBaseline = "top";
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = css("muted");
    const [first, last] = this.session.visible();
    context.textAlign = "right";
    context.fillText("step", left - 30, TOP + height + 8);
    context.textAlign = "center";
    for (const step of niceSteps(first, last, Math.floor(width / 110))) context.fillText(integer(step), this.xOf(step + 0.5), TOP + height + 8);
    for (const mark of onsetMarks(this.session.diagnosis)) {
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
      context.fillText(mark.text, at + (right ? -4 : 4), TOP - 5);
      context.textAlign = "center";
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

  cellAt(x, y) {
    if (!this.box || !this.source.matrix) return null;
    const { left, width, height, rowHeight } = this.box;
    if (x < 0 || x > left + width || y < TOP || y > TOP + height) return null;
    const row = Math.min(this.source.matrix.rows.length - 1, Math.floor((y - TOP) / rowHeight));
    const column = x < left ? null : this.source.matrix.columnOf(this.stepAt(x));
    return { row, column, rank: this.source.matrix.rows[row].rank };
  }

  setHover(cell) {
    this.hover = cell;
    const { matrix } = this.source;
    const pointed = cell && cell.column !== null && cell.column >= 0;
    this.app.point(pointed ? matrix.stepOf(cell.column) : null, this);
    this.drawOver();
  }

  /** Shows the step that another picture points at. */
  pointAt(step) {
    this.pointed = step;
    this.drawOver();
  }

  drawOver() {
    if (!this.box) return;
    const ratio = window.devicePixelRatio || 1;
    const context = this.over.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.over.width, this.over.height);
    const { left, width, height, rowHeight } = this.box;
    const { matrix } = this.source;
    context.lineWidth = 2;
    context.strokeStyle = css("text");
    matrix?.rows.forEach(({ rank }, index) => {
      if (this.app.address.ranks.includes(rank)) context.strokeRect(left, TOP + index * rowHeight, width, rowHeight);
    });
    if (this.dragFrom !== undefined && Math.abs(this.dragTo - this.dragFrom) > 3) {
      context.fillStyle = css("select");
      context.fillRect(Math.min(this.dragFrom, this.dragTo), TOP, Math.abs(this.dragTo - this.dragFrom), height);
    }
    if (this.pointed !== null && this.pointed !== undefined && !this.hover && matrix) {
      context.fillStyle = css("text");
      context.fillRect(this.xOf(this.pointed + matrix.width / 2), TOP, 1, height);
    }
    this.drawTip(context);
  }

  drawTip(context) {
    const { matrix, unit } = this.source;
    const cell = this.hover;
    this.tip.hidden = !cell;
    if (!cell || !matrix) return;
    const { left, width, rowHeight, height } = this.box;
    const about = this.session.about(cell.rank);
    const lines = [element("b", {}, `${rankName(cell.rank)}${about?.device ? ` · ${about.device}` : ""}`)];
    let at = left;
    if (cell.column !== null && cell.column >= 0) {
      const first = matrix.stepOf(cell.column);
      at = this.xOf(first);
      const wide = Math.max(2, this.xOf(first + matrix.width) - at);
      context.strokeStyle = css("text");
      context.lineWidth = 1.5;
      context.strokeRect(at, TOP + cell.row * rowHeight, wide, Math.max(2, rowHeight));
      const value = matrix.rows[cell.row].max[cell.column];
      lines.push(element("span", { class: "lens-tip-value" }, value === value ? quantity(value, unit) : "n/a: nothing reported"));
      lines.push(element("span", {}, matrix.width > 1 ? `highest of steps ${integer(first)}–${integer(first + matrix.width - 1)}` : `step ${integer(first)}`));
      const median = matrix.reduce().median[cell.column];
      if (median !== null && value === value && median > 0) lines.push(element("span", {}, `${number(value / median, 3)} × the median of all ranks (${quantity(median, unit)})`));
    }
    lines.push(element("small", {}, this.app.address.ranks.includes(cell.rank) ? "click: hide its line" : "click: show its line"));
    this.tip.replaceChildren(...lines);
    this.over.setAttribute("aria-label", `${this.title}. ${lines.map((line) => line.textContent).join(", ")}`);
    const right = at > left + width * 0.6;
    this.tip.style.left = right ? "" : `${at + 16}px`;
    this.tip.style.right = right ? `${this.picture.clientWidth - at + 8}px` : "";
    const y = TOP + cell.row * rowHeight + rowHeight + 6;
    this.tip.style.top = y > height * 0.7 ? `${Math.max(0, y - rowHeight - 108)}px` : `${y}px`;
  }

  drawLegend() {
    const { unit, name, matrix } = this.source;
    const [low, high] = this.domain;
    const { divide, name: shownUnit } = scaleFor(unit, high);
    const text = (value) => number(value / divide, 3);
    const clipped = this.domain.clipped;
    if (!this.hover) this.over.setAttribute("aria-label", `${this.title}: ${sourceName(name)} of ${matrix.rows.length} ranks. Arrow keys read cells, Enter shows a rank's line; the button “Table” shows the numbers as text.`);
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

  close() {
    this.watcher.disconnect();
  }
}
