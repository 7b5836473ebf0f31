// The card around every picture: its tools (table, CSV, PNG), its legend, and what it says when there is nothing to draw.

import { css } from "../core/palette.js";
import { download, element, replace, table } from "../core/dom.js";

const TABLE_ROWS = 200;
const TABLE_EVERY_MS = 1000;

export class Panel {
  /** @param {HTMLElement} root a section made by lens.dashboard.components.panel */
  constructor(root, session, app) {
    this.root = root;
    this.session = session;
    this.app = app;
    this.title = root.dataset.title;
    this.height = Number(root.dataset.height);
    this.body = root.querySelector(".lens-panel-body");
    this.legend = root.querySelector(".lens-panel-legend");
    this.body.replaceChildren();
    this.legend.replaceChildren();
    this.picture = element("div", { class: "lens-picture" });
    this.message = element("div", { class: "lens-message", hidden: true });
    this.twin = element("div", { class: "lens-table", hidden: true, tabindex: "0", role: "region", "aria-label": `${this.title}, as a table` });
    this.body.append(this.picture, this.message, this.twin);
    this.makeTools();
  }

  makeTools() {
    const tools = this.root.querySelector(".lens-panel-tools");
    this.tableButton = element("button", { type: "button", "aria-pressed": "false", onclick: () => this.toggleTable() }, "Table");
    tools.replaceChildren(
      this.tableButton,
      element("button", { type: "button", "aria-label": `${this.title}: download CSV`, onclick: () => this.saveCsv() }, "CSV"),
    );
    if (this.canvases) tools.append(element("button", { type: "button", "aria-label": `${this.title}: download PNG`, onclick: () => this.savePng() }, "PNG"));
  }

  /** Names of the sources this panel needs; a subclass says. */
  sources() {
    return [];
  }

  toggleTable() {
    const shown = this.twin.hidden;
    this.twin.hidden = !shown;
    this.picture.hidden = shown;
    this.tableButton.setAttribute("aria-pressed", String(shown));
    this.tableAt = 0;
    this.draw();
  }

  /** Shows words instead of the picture; null shows the picture again. */
  say(text) {
    this.message.hidden = text === null;
    this.root.toggleAttribute("data-empty", text !== null);
    if (text !== null) replace(this.message, text, () => [element("p", {}, text)]);
    return text !== null;
  }

  draw() {
    if (!this.root.isConnected) return;
    if (!this.twin.hidden) this.drawTable();
    this.render();
    this.root.dataset.drawnStep = this.newestStep() ?? "";
  }

  /** The last step that this picture holds. */
  newestStep(names = this.sources()) {
    const steps = names.map((name) => this.session.source(name).matrix?.lastStep ?? -1);
    return steps.length && Math.min(...steps) >= 0 ? Math.min(...steps) : null;
  }

  drawTable() {
    const now = performance.now();
    if (now - (this.tableAt || -Infinity) < TABLE_EVERY_MS) return;
    this.tableAt = now;
    const { columns, rows } = this.rows(true);
    const shown = rows.slice(-TABLE_ROWS).reverse();
    const caption = rows.length > shown.length ? `${this.title}: the newest ${shown.length} of ${rows.length} rows` : `${this.title}: ${rows.length} rows`;
    this.twin.replaceChildren(table(caption, columns, shown));
  }

  get fileName() {
    return `${this.session.run}-${this.root.id}`.replace(/[^\w.-]+/g, "_");
  }

  saveCsv() {
    const { columns, rows } = this.rows(false);
    const quote = (cell) => (cell === null || cell === undefined ? "" : /[",\n]/.test(String(cell)) ? `"${String(cell).replace(/"/g, '""')}"` : String(cell));
    const text = [columns, ...rows].map((row) => row.map(quote).join(",")).join("\n");
    download(`${this.fileName}.csv`, new Blob([text, "\n"], { type: "text/csv" }));
  }

  savePng() {
    const canvases = this.canvases();
    if (!canvases.length) return;
    const ratio = window.devicePixelRatio || 1;
    const head = 56 * ratio;
    const [width, height] = [canvases[0].width, canvases[0].height];
    const sheet = document.createElement("canvas");
    sheet.width = width;
    sheet.height = height + head;
    const context = sheet.getContext("2d");
    context.fillStyle = css("card");
    context.fillRect(0, 0, sheet.width, sheet.height);
    context.fillStyle = css("text");
    context.font = `600 ${15 * ratio}px system-ui, sans-serif`;
    context.fillText(this.title, 12 * ratio, 22 * ratio);
    context.fillStyle = css("muted");
    context.font = `${12 * ratio}px system-ui, sans-serif`;
    context.fillText(`${this.session.meta?.name ?? this.session.run} · ${this.legend.innerText.replace(/\s+/g, " ")}`, 12 * ratio, 42 * ratio);
    for (const canvas of canvases) context.drawImage(canvas, 0, head);
    sheet.toBlob((blob) => download(`${this.fileName}.png`, blob), "image/png");
  }

  close() {}
}
