// The list of runs, and what to type when there is none.

import { ApiError, getRuns } from "../core/api.js";
import { element, replace } from "../core/dom.js";
import { age, integer, lasting, moment } from "../core/format.js";

const EVERY_MS = 3000;
const STATES = { live: "● live", stale: "◐ stale", ended: "○ ended" };

export class Runs {
  constructor(root) {
    this.place = root.querySelector("#runs-list");
    this.load();
    this.timer = setInterval(() => this.load(), EVERY_MS);
  }

  async load() {
    try {
      this.runs = await getRuns();
      this.error = null;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.error = error;
    }
    this.draw();
  }

  sources() {
    return [];
  }

  draw() {
    if (this.error) {
      replace(this.place, this.error.message, () => [element("div", { class: "lens-empty" }, element("h2", {}, this.error.message), element("p", {}, this.error.hint))]);
      return;
    }
    if (!this.runs) return;
    replace(this.place, JSON.stringify(this.runs), () => (this.runs.length ? list(this.runs) : empty()));
  }

  close() {
    clearInterval(this.timer);
  }
}

function list(runs) {
  const [newest] = runs;
  return [
    element("p", {}, element("a", { class: "lens-button", href: `/run/${encodeURIComponent(newest.run)}`, "data-go": `/run/${encodeURIComponent(newest.run)}` }, `Open the newest run, ${newest.name ?? newest.run}`)),
    element(
      "table",
      { class: "lens-run-table" },
      element("thead", {}, element("tr", {}, ...["Run", "State", "Last step", "Ranks heard", "Newest record", "Started", "Lasted"].map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...runs.map(row)),
    ),
  ];
}

function row(run) {
  const path = `/run/${encodeURIComponent(run.run)}`;
  const ranks = run.world_size === null || run.world_size === undefined ? "n/a" : `${run.ranks_reporting ?? "n/a"} of ${run.world_size}`;
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, element("div", { class: "lens-run-names" }, element("a", { href: path, "data-go": path }, run.name ?? run.run), run.simulated ? element("span", { class: "lens-simulated" }, "simulated cards") : null, run.name && run.name !== run.run ? element("small", {}, run.run) : null)),
    element("td", {}, element("span", { class: "lens-chip-plain lens-state", "data-state": run.state }, STATES[run.state] ?? run.state)),
    element("td", {}, run.last_step === null ? "n/a: none yet" : integer(run.last_step)),
    element("td", {}, ranks),
    element("td", {}, run.age_s === null ? "n/a: none yet" : `${age(run.age_s)} ago`),
    element("td", {}, run.started_ns ? moment(run.started_ns) : "n/a"),
    element("td", {}, run.started_ns && run.last_t_ns ? lasting((run.last_t_ns - run.started_ns) / 1e9) : "n/a"),
  );
}

function empty() {
  const command = (text, what) => element("div", { class: "lens-command" }, element("code", {}, text), element("span", {}, what));
  return [
    element(
      "div",
      { class: "lens-empty" },
      element("h2", {}, "No run here yet"),
      element("p", {}, "This page fills by itself as soon as a training process reports. Type one of these in a terminal:"),
      command("lens demo", "a small mixture-of-experts training with simulated cards, alive in under a minute"),
      command("lens run -- torchrun train.py", "your own training, without a change in its code"),
    ),
  ];
}
