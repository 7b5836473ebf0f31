// A panel drawn on a canvas of its own: one canvas for the picture, one above it for what is pointed at, and a tip.

import { Panel } from "./panel.js";
import { element } from "./dom.js";

export class CanvasPanel extends Panel {
  constructor(root, session, app) {
    super(root, session, app);
    this.base = element("canvas", { class: "lens-map" });
    this.over = element("canvas", { class: "lens-map-over", tabindex: "0", role: "img" });
    this.tip = element("div", { class: "lens-tip", hidden: true });
    this.picture.classList.add("lens-map-place");
    this.picture.append(this.base, this.over, this.tip);
    this.canvases = () => [this.base];
    this.makeTools();
    this.hover = null;
    this.watcher = new ResizeObserver(() => this.draw());
    this.watcher.observe(this.picture);
    this.over.addEventListener("pointermove", (event) => this.point(this.at(event.offsetX, event.offsetY)));
    this.over.addEventListener("pointerleave", () => this.point(null));
    this.over.addEventListener("blur", () => this.point(null));
    this.over.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move) return;
      event.preventDefault();
      this.point(this.moved(...move));
    });
  }

  recolor() {
    this.draw();
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

  /** What is pointed at: a subclass finds it `at` a place or `moved` from there, outlines it and describes it. */
  point(target) {
    this.hover = target;
    const context = this.clear(this.over);
    this.tip.hidden = !target;
    this.over.setAttribute("aria-label", `${this.title}. Arrow keys read it piece by piece; the button “Table” shows the same as text.`);
    if (!target) return;
    const { box, lines } = this.describe(target, context);
    this.tip.replaceChildren(...lines.map((line, index) => (typeof line === "string" ? element(index ? "span" : "b", {}, line) : line)));
    this.over.setAttribute("aria-label", `${this.title}. ${[...this.tip.children].map((line) => line.textContent).join(", ")}`);
    const right = box.x > this.picture.clientWidth * 0.6;
    this.tip.style.left = right ? "" : `${box.x + Math.min(box.width, 40) + 10}px`;
    this.tip.style.right = right ? `${this.picture.clientWidth - box.x + 10}px` : "";
    const low = box.y + box.height > this.picture.clientHeight * 0.55;
    this.tip.style.top = low ? "" : `${box.y + box.height + 6}px`;
    this.tip.style.bottom = low ? `${this.picture.clientHeight - box.y + 6}px` : "";
  }

  close() {
    this.watcher.disconnect();
  }
}
