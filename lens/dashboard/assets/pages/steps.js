// The controls of the Steps page: which step the lanes show.

import { element, replace } from "../core/dom.js";
import { integer } from "../core/format.js";
import { stepShown } from "../core/shown_step.js";

export class Steps {
  constructor(root, app) {
    this.app = app;
    this.place = root.querySelector("#steps-controls");
    this.input = element("input", { id: "step-number", type: "text", inputmode: "numeric", autocomplete: "off", onchange: () => this.typed() });
    const button = (label, words, action) => element("button", { type: "button", class: "lens-chip", "aria-label": words, title: words, onclick: action }, label);
    this.follow = button("Follow the newest", "Follow the newest step", () => app.update({ step: null }));
    this.place.replaceChildren(
      element("label", {}, element("span", {}, "Step"), this.input),
      element("div", { class: "lens-chips" }, button("◀", "One step back", () => this.move(-1)), button("▶", "One step on", () => this.move(1)), button("Slowest visible step", "The step of the visible range that took longest", () => this.slowest()), this.follow),
      (this.words = element("span", { class: "lens-quiet" })),
    );
  }

  sources() {
    return [];
  }

  typed() {
    const number = /\d+/.exec(this.input.value);
    this.app.update({ step: number ? Number(number[0]) : null });
  }

  move(by) {
    const { step } = stepShown(this.app);
    if (step !== null) this.app.update({ step: Math.max(0, step + by) });
  }

  slowest() {
    const { session } = this.app;
    const { matrix } = session.source("step.duration");
    const [first, last] = session.visible();
    if (!matrix) return;
    const { x, max } = matrix.reduce();
    let worst = null;
    x.forEach((step, index) => {
      if (step + matrix.width > first && step <= last && max[index] !== null && (worst === null || max[index] > max[worst])) worst = index;
    });
    if (worst === null) return;
    if (matrix.width > 1) this.app.update({ x: [x[worst], x[worst] + matrix.width - 1], step: x[worst] });
    else this.app.update({ step: x[worst] });
  }

  draw() {
    const fixed = this.app.address.step !== null;
    const { step: wanted, value } = stepShown(this.app);
    // While the newest is followed, the step that is drawn: the next may take the server a while.
    const step = fixed ? wanted : value?.step ?? wanted;
    if (document.activeElement !== this.input) this.input.value = step === null ? "" : String(step);
    this.follow.hidden = !fixed;
    replace(this.words, `${fixed} ${step}`, () => [fixed || step === null ? "" : `no step chosen: showing one of the newest, step ${integer(step)}`]);
  }
}
