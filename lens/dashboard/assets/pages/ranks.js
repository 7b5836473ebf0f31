// The controls of the Ranks page: which metric, which ranks.

import { element, replace } from "../core/dom.js";
import { PHASE_NAMES } from "../core/phases.js";
import { sourceName } from "../core/causes.js";

/** Not one value a rank and step, or drawn elsewhere. */
const NOT_BY_RANK = /^(hw\.|gpu\.|system\.|host\.|net\.|container\.|process\.|lens\.|moe\.)/;
const OWN_AND_WHOLE = ["step.self", "step.duration"];

export class Ranks {
  constructor(root, app) {
    this.app = app;
    this.select = element("select", { id: "metric", onchange: () => app.setMetric(this.select.value) });
    this.filter = element("input", { id: "rank-filter", type: "text", inputmode: "numeric", placeholder: "e.g. 17,40", autocomplete: "off", onchange: () => app.setRanks(this.filter.value) });
    this.chips = element("div", { class: "lens-chips" });
    root.querySelector("#ranks-controls").replaceChildren(
      element("label", {}, element("span", {}, "Metric"), this.select),
      element("label", {}, element("span", {}, "Ranks"), this.filter),
      this.chips,
    );
  }

  sources() {
    return [this.app.metric];
  }

  draw() {
    const { session, address, metric } = this.app;
    const groups = metricGroups(session.meta, metric);
    if (document.activeElement !== this.select || this.select.value !== metric) {
      replace(this.select, JSON.stringify(groups), () => groups.map(([name, items]) => element("optgroup", { label: name }, ...items.map((item) => element("option", { value: item }, sourceName(item))))));
      this.select.value = metric;
    }
    if (document.activeElement !== this.filter) this.filter.value = address.ranks.join(",");
    replace(this.chips, address.ranks.join(), () =>
      address.ranks.map((rank) => element("button", { type: "button", class: "lens-chip", "aria-label": `Hide rank ${rank}`, onclick: () => this.app.toggleRank(rank) }, `rank ${rank} ×`)),
    );
  }
}

function metricGroups(meta, chosen) {
  const known = (meta?.metrics ?? []).map(({ metric }) => metric);
  const times = [...OWN_AND_WHOLE.filter((name) => name === "step.duration" || known.includes(name)), ...PHASE_NAMES.map((phase) => `phase.duration:${phase}`)];
  const reported = known.filter((name) => !NOT_BY_RANK.test(name) && !OWN_AND_WHOLE.includes(name) && name !== "phase.duration");
  const groups = [["Time of each step", times]];
  if (reported.length) groups.push(["Reported by the run", [...new Set(reported)].sort()]);
  if (!groups.some(([, items]) => items.includes(chosen))) groups.push(["From the address", [chosen]]);
  return groups;
}
