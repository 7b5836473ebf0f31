// A panel drawn on a canvas of its own: one canvas for the picture, one above it for what is pointed at, and a tip.

import { element } from "../core/dom.js";
import { Panel } from "./panel.js";

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

/** A subclass says what lies `at` a place or is `moved` to from what is pointed at, and describes it. */
export class CanvasPanel extends Panel {
  constructor(root, session, app) {
    super(root, session, app);
    this.base = element("canvas", { class: "lens-map" });
    this.over = element("canvas", { class: "lens-map-over", tabindex: "0", role: "img", "aria-label": this.label() });
    this.tip = element("div", { class: "lens-tip", hidden: true });
    this.picture.classList.add("lens-map-place");
    this.picture.append(this.base, this.over, this.tip);
    this.canvases = () => [this.base];
    this.makeTools();
    this.hover = null;
    this.watcher = new ResizeObserver(() => this.draw());
    this.watcher.observe(this.picture);
    this.on("pointermove", (event) => this.point(this.at(event.offsetX, event.offsetY)));
    this.on("pointerleave", () => this.point(null));
    this.on("blur", () => this.point(null));
    this.on("keydown", (event) => this.onKey(event));
  }

  on(name, handle) {
    this.over.addEventListener(name, handle);
  }

  onKey(event) {
    const move = ARROWS[event.key];
    if (!move) return;
    event.preventDefault();
    this.point(this.moved(...move));
  }

  recolor() {
    this.draw();
  }

  /** What a screen reader says of the picture as a whole. */
  label() {
    return `${this.title}. Arrow keys read it piece by piece; the button “Table” shows the same as text.`;
  }

  /** Sizes both canvases and gives the context of the picture, in CSS pixels. */
  begin(height) {
    const width = this.picture.clientWidth;
    const ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.base, this.over]) {
      const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    this.picture.style.height = `${height}px`;
    return this.clear(this.base);
  }

  clear(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    return context;
  }

  point(target) {
    this.hover = target;
    this.drawOver();
  }

  /** What else lies above the picture. */
  paintOver() {}

  drawOver() {
    const context = this.clear(this.over);
    this.paintOver(context);
    this.tip.hidden = !this.hover;
    if (!this.hover) {
      this.over.setAttribute("aria-label", this.label());
      return;
    }
    const { box, lines } = this.describe(this.hover, context);
    this.tip.replaceChildren(...lines.map((line, index) => (typeof line === "string" ? element(index ? "span" : "b", {}, line) : line)));
    this.over.setAttribute("aria-label", `${this.title}. ${[...this.tip.children].map((line) => line.textContent).join(", ")}`);
    this.placeTip(box);
  }

  /** Beside what is described, on the side where there is room. */
  placeTip(box) {
    const { clientWidth: width, clientHeight: height } = this.picture;
    const right = box.x > width * 0.6;
    this.tip.style.left = right ? "" : `${box.x + Math.min(box.width, 40) + 10}px`;
    this.tip.style.right = right ? `${width - box.x + 10}px` : "";
    const low = box.y + box.height > height * 0.55;
    this.tip.style.top = low ? "" : `${box.y + box.height + 6}px`;
    this.tip.style.bottom = low ? `${height - box.y + 6}px` : "";
  }

  close() {
    this.watcher.disconnect();
  }
}

/** Draws a line around what is pointed at. */
export function outline(context, { x, y, width, height }, ink, thickness = 2) {
  context.strokeStyle = ink;
  context.lineWidth = thickness;
  context.strokeRect(x, y, width, height);
}
