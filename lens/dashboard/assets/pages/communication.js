// Communication: who sends to whom, who waits for whom, how fast each group is, and what of it training feels.

import { CellMapPanel } from "../panels/cell_map.js";
import { Panel } from "../panels/panel.js";
import { element, replace } from "../core/dom.js";
import { getCommunication } from "../core/api.js";
import { integer, list, percent, quantity } from "../core/format.js";
import { tile } from "../panels/tile.js";

const EVERY_MS = 5000;

/** The reply for the visible steps, asked for again every few seconds while the run goes on. */
export function communicationOf(session) {
  const every = session.state === "ended" ? Infinity : EVERY_MS;
  return session.reply("communication", String(session.range), every, () => getCommunication(session.run, session.range));
}

/** Why there is nothing to show, or null. */
function silence(session) {
  const { value, error } = communicationOf(session);
  if (error && !value) return `n/a: ${error.message}`;
  if (!value) return "Loading…";
  if (value.groups.length) return null;
  if (session.observed) return `n/a: ${session.noStep}.`;
  return session.range ? `n/a: no collective in steps ${session.range.join("–")}. Press 0 for all steps.` : "n/a: this run has not recorded a collective. One rank alone sends to nobody.";
}

function stepsWords(value) {
  return `${value.steps === 1 ? "1 step" : `mean of ${integer(value.steps)} steps`} (${integer(value.from)}–${integer(value.to)})`;
}

export class Communication {
  constructor(root, app) {
    this.app = app;
    this.place = root.querySelector("#communication-numbers");
  }

  sources() {
    return ["step.duration"];
  }

  draw() {
    const { session } = this.app;
    const { value } = communicationOf(session);
    const tiles = silence(session) ? [] : [exposed(value), waiting(value), given(value), blamed(value)];
    replace(this.place, JSON.stringify(tiles), () => tiles.map(tile));
  }
}

function exposed(value) {
  const label = "Exposed communication";
  if (value.exposed_share === null) return { label, value: "n/a", detail: "no step with a known duration", missing: true };
  return { label, value: percent(value.exposed_share), detail: "of the mean rank's time: transfers that nothing hides" };
}

function waiting(value) {
  const label = "Waiting for others";
  if (value.wait_share === null) return { label, value: "n/a", detail: "no step with a known duration", missing: true };
  return { label, value: percent(value.wait_share), detail: "of the mean rank's time: in a collective, before the last rank came" };
}

function given(value) {
  const known = value.groups.filter((each) => each.bytes !== null);
  if (!known.length) return { label: "Bytes given to collectives", value: "n/a", detail: "no collective says its size", missing: true };
  const sum = known.reduce((total, each) => total + each.bytes, 0);
  return { label: "Bytes given to collectives", value: quantity(sum / Math.max(1, value.steps), "By"), detail: "a step, all ranks together" };
}

/** The rank that cost the others most. */
function blamed(value) {
  const label = "Most waited for";
  const sums = value.ranks.map((rank, column) => [rank, value.wait_s.reduce((sum, row) => sum + (row[column] ?? 0), 0)]);
  const [rank, seconds] = sums.reduce((worst, each) => (each[1] > worst[1] ? each : worst), [null, 0]);
  if (rank === null) return { label, value: "n/a", detail: "no rank waited for another", missing: true };
  return { label, value: `rank ${rank}`, detail: `the others wait ${quantity(seconds / Math.max(1, value.steps), "s")} for it in a step, added up` };
}

/** Rank × rank bytes or waiting. */
export class PairsPanel extends CellMapPanel {
  newestStep() {
    return communicationOf(this.session).value?.to ?? null;
  }

  content() {
    const quiet = silence(this.session);
    if (quiet) return quiet;
    const { value } = communicationOf(this.session);
    const waits = this.root.dataset.metric === "wait";
    const steps = Math.max(1, value.steps);
    const matrix = waits ? value.wait_s : value.bytes;
    if (matrix.every((row) => row.every((cell) => cell === null))) return waits ? "n/a: no collective was recorded by all ranks of its group." : "n/a: no collective says its size and its receivers.";
    const rank = (index) => `rank ${value.ranks[index]}`;
    const device = (index) => this.session.about(value.ranks[index])?.device;
    const unplaced = !waits && value.unplaced_bytes ? [`not placed: ${quantity(value.unplaced_bytes / steps, "By")} of broadcasts, whose root is not recorded`] : [];
    return {
      rows: value.ranks.map((each) => `rank ${each}`),
      columns: value.ranks.map((each) => `rank ${each}`),
      values: matrix.map((row) => row.map((cell) => (cell === null ? null : cell / steps))),
      unit: waits ? "s" : "By",
      fromZero: true,
      rowTitle: waits ? "who waits" : "from",
      columnTitle: waits ? "for whom" : "to",
      measure: waits ? "waiting a step" : "bytes a step",
      gapWords: "no common group",
      notes: [stepsWords(value), ...unplaced],
      gap: (row, column) => (row === column ? "a rank with itself" : "these ranks share no group"),
      name: (row, column) => (waits ? `${rank(row)} waits for ${rank(column)}` : `${rank(row)} to ${rank(column)}`),
      more: (row, column) => [element("span", {}, "a step, on average"), element("small", {}, [device(row), device(column)].filter(Boolean).join(" → "))],
    };
  }
}

/** Bus bandwidth of each group and operation, as bars beside their numbers. */
export class GroupsPanel extends Panel {
  newestStep() {
    return communicationOf(this.session).value?.to ?? null;
  }

  render() {
    const quiet = silence(this.session);
    if (this.say(quiet)) return this.legend.replaceChildren();
    const { value } = communicationOf(this.session);
    replace(this.legend, stepsWords(value), () => [element("span", { class: "lens-key lens-quiet" }, stepsWords(value))]);
    replace(this.picture, JSON.stringify([value.from, value.to, value.groups]), () => [this.table(value)]);
    return undefined;
  }

  table(value) {
    const fastest = Math.max(...value.groups.map((each) => each.bus_bandwidth ?? 0), 1);
    const steps = Math.max(1, value.steps);
    const heads = ["Group", "Ranks", "Operation", "Calls a step", "Bytes a call", "Bus bandwidth", "Waiting a step, all ranks"];
    const rows = value.groups.map((each) => {
      const bar = element("span", { class: "lens-bar", "aria-hidden": "true" }, element("i"));
      bar.firstChild.style.width = `${Math.max(0.5, ((each.bus_bandwidth ?? 0) / fastest) * 100)}%`;
      const bandwidth = each.bus_bandwidth === null ? [element("span", { class: "lens-quiet" }, `n/a: ${noBandwidth(each)}`)] : [bar, element("b", {}, quantity(each.bus_bandwidth, "By/s"))];
      const cells = [list(each.ranks), each.op.replace(/_/g, "-"), callsWords(each, steps), each.bytes === null ? "n/a" : quantity(each.bytes / (each.calls * each.ranks.length), "By"), element("span", { class: "lens-bar-cell" }, ...bandwidth), each.wait_s === null ? "n/a" : quantity(each.wait_s / steps, "s")];
      return element("tr", {}, element("th", { scope: "row" }, each.group), ...cells.map((cell) => element("td", {}, cell)));
    });
    return element("table", { class: "lens-plain-table" }, element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))), element("tbody", {}, ...rows));
  }

  rows() {
    const groups = communicationOf(this.session).value?.groups ?? [];
    const columns = ["group", "ranks", "operation", "calls", "of them not recorded by all", "bytes", "transfer (s)", "bus bandwidth (By/s)", "waiting (s)"];
    return { columns, rows: groups.map((each) => [each.group, each.ranks.join(" "), each.op, each.calls, each.incomplete, each.bytes ?? "n/a", each.transfer_s ?? "n/a", each.bus_bandwidth ?? "n/a", each.wait_s ?? "n/a"]) };
  }
}

function callsWords(each, steps) {
  return each.calls % steps === 0 ? integer(each.calls / steps) : (each.calls / steps).toFixed(1);
}

function noBandwidth(each) {
  if (each.op === "barrier") return "a barrier moves no bytes";
  if (each.bytes === null) return "no size recorded";
  return each.incomplete ? "not recorded by all ranks" : "nothing to correct it by";
}
