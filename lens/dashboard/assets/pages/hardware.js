// Hardware: every host with its cards and network ports, whoever made them, and what each reports now.

import { blamedRanks } from "../core/causes.js";
import { cardName, percent, quantity } from "../core/format.js";
import { element, replace } from "../core/dom.js";
import { freshFor } from "../panels/grid.js";
import { hostsOf, METRICS } from "../core/inventory.js";
import { getLatest } from "../core/api.js";
import { Panel } from "../panels/panel.js";

const NS = 1e9;
const OLD_S = 15;
const UNITS = { "hw.power": "W", "gpu.clock.sm": "MHz", "hw.temperature": "Cel", "hw.gpu.memory.usage": "By", "system.memory.usage": "By" };

export class Hardware {
  sources() {
    return [];
  }

  draw() {}
}

function latestOf(session) {
  return session.reply("hardware", "", freshFor(session), () => getLatest(session.run, METRICS));
}

export class HardwarePanel extends Panel {
  silence() {
    const { value, error } = latestOf(this.session);
    if (error && !value) return `n/a: ${error.message}`;
    if (!value) return "Loading…";
    this.hosts = hostsOf(this.session.meta?.ranks ?? [], value, this.session.state === "ended");
    return this.hosts.length ? null : "n/a: no host or card has reported. The agent of each host reports them: lens agent.";
  }

  render() {
    if (this.say(this.silence())) return this.legend.replaceChildren();
    const { hosts } = this;
    const cards = hosts.flatMap((host) => host.cards);
    const now = Math.max(...cards.flatMap((card) => card.readings.map((reading) => reading.at ?? 0)));
    const blamed = blamedRanks(this.session.diagnosis);
    this.drawLegend(hosts, cards);
    replace(this.picture, JSON.stringify([hosts, [...blamed]]), () => [element("div", { class: "lens-hosts" }, ...hosts.map((host) => hostBox(host, now, blamed)))]);
    return undefined;
  }

  drawLegend(hosts, cards) {
    const models = new Map();
    for (const card of cards) models.set(nameOf(card), (models.get(nameOf(card)) ?? 0) + 1);
    const simulated = cards.filter((card) => card.simulated).length;
    const words = `${count(hosts.length, "host")}, ${count(cards.length, "card")}${cards.length ? `: ${[...models].map(([name, many]) => `${many} × ${name}`).join(", ")}` : ""}`;
    const warning = simulated ? `${simulated === cards.length ? "All" : simulated} of these cards are simulated: a model driven by the run's real work stands in for them. No number on them was measured on hardware.` : "";
    replace(this.legend, JSON.stringify([words, warning, this.session.state]), () => [
      element("span", { class: "lens-key" }, element("b", {}, words)),
      element("span", { class: "lens-key lens-quiet" }, `bars: of the card's own limit${this.session.state === "ended" ? "; cards as they were last read while the run went on" : ""}`),
      ...(warning ? [element("p", { class: "lens-simulated-note" }, element("span", { class: "lens-simulated" }, "simulated"), warning)] : []),
    ]);
  }

  rows() {
    const source = (part) => (part.simulated ? "simulated" : "measured");
    const rows = (this.hosts ?? []).flatMap((host) => [
      ...host.readings.map((reading) => [host.host, "", "", reading.metric, reading.value ?? "n/a: not reported", reading.limit ?? "n/a"]),
      ...[...host.cards, ...host.ports].flatMap((part) => part.readings.map((reading) => [host.host, part.device, source(part), reading.metric, reading.value ?? `n/a: ${reading.reason}`, reading.limit ?? "n/a"])),
    ]);
    return { columns: ["host", "device", "source", "metric", "value", "limit"], rows: rows.reverse() };
  }
}

function count(number, what) {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

function nameOf({ vendor, model }) {
  return cardName(vendor, model) ?? "model n/a";
}

function shortName(device) {
  return device.split("/").slice(1).join("/") || device;
}

function shown(metric, value) {
  return UNITS[metric] ? quantity(value, UNITS[metric]) : percent(value);
}

function simulatedTag({ simulated }) {
  return simulated ? element("span", { class: "lens-simulated" }, "simulated") : null;
}

function hostBox({ host, cards, ports, readings }, now, blamed) {
  const words = readings.map(({ name, metric, value, limit }) => element("span", {}, `${name} `, element("b", {}, shown(metric, value)), limit && limit !== 1 && value !== null ? ` of ${shown(metric, limit)}` : ""));
  const boxes = cards.length ? cards.map((card) => cardBox(card, now, blamed)) : [element("p", { class: "lens-quiet" }, "n/a: no card of this host has reported.")];
  return element(
    "section",
    { class: "lens-host", "aria-label": host },
    element("header", {}, element("h3", {}, host), ...words),
    element("div", { class: "lens-cards" }, ...boxes),
    ports.length ? portTable(host, ports) : null,
  );
}

function cardBox(card, now, blamed) {
  const old = card.readings.every((reading) => reading.at === null || now - reading.at > OLD_S * NS);
  const suspect = card.ranks.some((rank) => blamed.has(rank));
  const ranks = card.ranks.length ? `${card.ranks.length === 1 ? "rank" : "ranks"} ${card.ranks.join(", ")}` : "no rank";
  return element(
    "article",
    { class: "lens-card", "data-device": card.device, "data-old": old, "data-suspect": suspect },
    element("header", {}, element("b", {}, `${suspect ? "▲ " : ""}${shortName(card.device)}`), element("span", { class: "lens-quiet" }, ranks), simulatedTag(card)),
    element("p", { class: "lens-quiet" }, nameOf(card), old ? " · old readings" : ""),
    element("dl", {}, ...card.readings.map(readingRow)),
  );
}

function readingRow({ name, metric, value, limit, reason }) {
  if (value === null) return element("div", {}, element("dt", {}, name), element("dd", { class: "lens-quiet" }, `n/a: ${reason}`));
  const of = limit && metric !== "hw.gpu.utilization" ? element("small", {}, ` of ${shown(metric, limit)}`) : null;
  return element("div", {}, element("dt", {}, name), element("dd", {}, element("b", {}, shown(metric, value)), of, limit ? bar(value / limit) : null));
}

function bar(share) {
  const track = element("span", { class: "lens-bar", "aria-hidden": "true" }, element("i"));
  track.firstChild.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return track;
}

function portTable(host, ports) {
  const heads = ["Network port", "State", "Speed", "Sends", "Receives"];
  const rate = (reading, speed) => (reading.value === null ? `n/a: ${reading.reason}` : speed.value === null ? percent(reading.value) : `${quantity(reading.value * speed.value, "By/s")} (${percent(reading.value)})`);
  const rows = ports.map((port) => {
    const [up, speed, sends, receives] = port.readings;
    const state = up.value === null ? `n/a: ${up.reason}` : up.value ? "● up" : "▲ down";
    const cells = [state, speed.value === null ? `n/a: ${speed.reason}` : quantity(speed.value, "By/s"), rate(sends, speed), rate(receives, speed)];
    return element("tr", { "data-device": port.device }, element("th", { scope: "row" }, shortName(port.device), " ", simulatedTag(port)), ...cells.map((cell) => element("td", {}, cell)));
  });
  return element("table", { class: "lens-plain-table lens-ports", "aria-label": `Network ports of ${host}` }, element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))), element("tbody", {}, ...rows));
}
