// Where the time went: one bar that sums to the whole, and the same as a table, unknown parts named.

import { Panel } from "./panel.js";
import { element, replace } from "../core/dom.js";
import { percent, quantity } from "../core/format.js";

const PARTS = {
  compute: ["Compute", "forward, backward, optimizer"],
  exposed_communication: ["Communication", "transfers that nothing hides"],
  straggler_wait: ["Waiting for the slowest rank", "idle inside a collective until the last rank joins"],
  data: ["Data loading", "waiting for the next batch"],
  checkpoint: ["Checkpoints", "blocking saves"],
  gc: ["Garbage collection", "Python's collector"],
  bubble: ["Pipeline bubble", "waiting for another stage"],
  restart: ["Restarts", "time lost to restarts"],
  other: ["Other", "not attributed"],
};

export class LedgerPanel extends Panel {
  known() {
    const ledger = this.session.ledger;
    const parts = Object.keys(PARTS).filter((name) => ledger?.parts && name in ledger.parts);
    return {
      ledger,
      measured: parts.filter((name) => typeof ledger.parts[name] === "number"),
      unknown: parts.filter((name) => typeof ledger.parts[name] !== "number"),
    };
  }

  render() {
    const { ledger, measured, unknown } = this.known();
    if (!ledger || !measured.length) {
      this.say(!ledger && (!this.session.meta || this.session.lastStep !== null) ? "Loading…" : this.session.observed ? `n/a: ${this.session.noStep}.` : "n/a: no step with known parts yet. Time appears here once steps with their phases have ended.");
      this.legend.replaceChildren();
      return;
    }
    this.say(null);
    replace(this.legend, JSON.stringify([ledger.from_step, ledger.to_step]), () => [
      element("span", { class: "lens-key lens-quiet" }, `steps ${ledger.from_step}–${ledger.to_step}: ${quantity(ledger.wall_s, "s")} of the mean rank`),
    ]);
    replace(this.picture, JSON.stringify(ledger), () => this.bar(ledger, measured, unknown));
  }

  bar(ledger, measured, unknown) {
    const whole = ledger.wall_s || measured.reduce((sum, name) => sum + ledger.parts[name], 0);
    const shown = measured.filter((name) => ledger.parts[name] > 0);
    const words = shown.map((name) => `${PARTS[name][0]} ${percent(ledger.parts[name] / whole)}`).join(", ");
    const bar = element("div", { class: "lens-ledger-bar", role: "img", "aria-label": words });
    for (const name of shown) {
      const share = ledger.parts[name] / whole;
      const segment = element("span", { "data-part": name, title: `${PARTS[name][0]}: ${percent(share)}` }, share > 0.09 ? element("b", {}, percent(share)) : null);
      segment.style.flexGrow = String(share);
      bar.append(segment);
    }
    const items = measured.map((name) =>
      element(
        "li",
        { "data-part": name },
        element("i", { class: "lens-part" }),
        element("span", {}, element("b", {}, PARTS[name][0]), element("small", {}, PARTS[name][1])),
        element("span", { class: "lens-amount" }, element("b", {}, percent(ledger.parts[name] / whole)), element("small", {}, quantity(ledger.parts[name], "s"))),
      ),
    );
    const missing = unknown.length
      ? element("p", { class: "lens-unknown" }, element("b", {}, "Not measured in this run: "), unknown.map((name) => PARTS[name][0].toLowerCase()).join(", "), ". What they took is inside the parts above.")
      : null;
    const idle = ledger.pipeline ? element("p", { class: "lens-unknown" }, element("b", {}, "Pipeline: "), pipelineWords(ledger.pipeline)) : null;
    return [bar, element("ul", { class: "lens-ledger-list" }, ...items), idle, missing].filter(Boolean);
  }

  rows() {
    const { ledger, measured, unknown } = this.known();
    const whole = ledger?.wall_s || 1;
    return {
      columns: ["part", "seconds", "share"],
      rows: [
        ...measured.map((name) => [PARTS[name][0], Number(ledger.parts[name].toPrecision(6)), percent(ledger.parts[name] / whole)]),
        ...unknown.map((name) => [PARTS[name][0], "n/a: not measured", "n/a"]),
      ],
    };
  }
}

/** The measured bubble beside what the schedule makes of it, or why one of them is not known. */
function pipelineWords({ stages, micro_batches: batches, bubble_share: measured, theory_share: theory, reason }) {
  const first = measured === null ? `${stages} stages` : `ranks idle ${percent(measured)} of their passes for other stages`;
  return theory === null || measured === null ? `${first}; n/a: ${reason}.` : `${first}; ${stages} equal stages with ${batches} micro-batches idle ${percent(theory)} (1F1B).`;
}
