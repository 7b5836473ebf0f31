// Everything that the diagnosis found, one line each: where, since when, what it costs, and where to look.

import { causeName, findingsOf, placeOf, sentence, sourceName } from "../core/causes.js";
import { element, replace } from "../core/dom.js";
import { format } from "../core/address.js";
import { integer, number, percent, quantity } from "../core/format.js";
import { Panel } from "./panel.js";

const SEVERITIES = { error: ["✖", "error"], warning: ["▲", "warning"], info: ["ⓘ", "note"] };
const HEADS = ["Kind", "What was found", "Since step", "Seen at step", "Over at step", "Costs a step", "Confidence", "Where to look"];

export class FindingsPanel extends Panel {
  get found() {
    return findingsOf(this.session.diagnosis);
  }

  newestStep() {
    return this.session.diagnosis?.upto_step ?? null;
  }

  /** A run in which nothing was found needs no list to say so: the verdict does. */
  render() {
    const { found } = this;
    this.root.hidden = !found.length;
    const { pages, address } = this.app;
    replace(this.picture, JSON.stringify([found, address]), () => [
      element(
        "table",
        { class: "lens-plain-table lens-findings" },
        element("thead", {}, element("tr", {}, ...HEADS.map((head) => element("th", { scope: "col" }, head)))),
        element("tbody", {}, ...found.map((finding) => row(finding, pages, address))),
      ),
    ]);
  }

  rows() {
    const rows = this.found.flatMap(({ best, rivals }) => [best, ...rivals]).map((each) => [
      each.finding, each.severity, each.cause, (each.ranks ?? []).join(" "), each.component ?? "", each.onset_step ?? "n/a", each.detected_step ?? "n/a", each.end_step ?? "", each.lost_seconds_per_step ?? "n/a", each.confidence ?? "n/a",
    ]);
    return { columns: ["finding", "severity", "cause", "ranks", "component", "since step", "seen at step", "over at step", "lost a step (s)", "confidence"], rows: rows.reverse() };
  }
}

function row({ best, rivals }, pages, address) {
  const [sign, word] = SEVERITIES[best.severity] ?? SEVERITIES.warning;
  const others = rivals.map((rival) => `${causeName(rival.cause)} (${percent(rival.confidence)})`).join(", ");
  const step = (value, missing) => (Number.isInteger(value) ? integer(value) : missing);
  const cells = [
    element("div", {}, `${sentence(best)}.`, others ? element("small", {}, `or, less likely: ${others}`) : null),
    step(best.onset_step, "n/a"),
    step(best.detected_step, "n/a"),
    step(best.end_step, "not over"),
    costWords(best),
    percent(best.confidence),
    lookAt(best, pages, address),
  ];
  return element("tr", { "data-severity": best.severity }, element("th", { scope: "row" }, element("span", { class: "lens-severity" }, element("span", { "aria-hidden": "true" }, sign), ` ${word}`)), ...cells.map((cell) => element("td", {}, cell)));
}

function costWords({ lost_seconds_per_step: lost, slowdown_pct: slowdown }) {
  if (lost === null || lost === undefined) return "n/a";
  return `${quantity(lost, "s")}${slowdown === null || slowdown === undefined ? "" : ` (${number(slowdown, 3)}\u00a0%)`}`;
}

/** A link to the picture that shows the cause: the page, with its metric and the ranks it sits in. */
function lookAt({ cause, ranks }, pages, address) {
  const { page, metric } = placeOf(cause);
  const known = pages.find((each) => each.name === page);
  const path = format({ ...address, path: known.path, metric: metric ?? address.metric, ranks: page === "ranks" ? ranks ?? [] : address.ranks });
  return element("a", { href: path, "data-go": path }, metric ? `${known.title}: ${sourceName(metric)}` : known.title);
}
