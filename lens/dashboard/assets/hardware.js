// Hardware: every host with its cards, whoever made them, and what each reports now.

import { Panel } from "./panel.js";
import { element, replace } from "./dom.js";
import { freshFor } from "./grid.js";
import { getLatest } from "./api.js";
import { percent, quantity } from "./format.js";

const NS = 1e9;
const OLD_S = 15;

/** [what a reader calls it, metric, metric it is a part of or null, label that is wanted] */
const READINGS = [
  ["Busy", "hw.gpu.utilization", null, null],
  ["Power", "hw.power", "gpu.power.limit", null],
  ["Clock", "gpu.clock.sm", "gpu.clock.sm.max", null],
  ["Temperature", "hw.temperature", "hw.temperature.limit", { sensor: ["core", "edge", "junction", "hotspot"] }],
  ["Memory", "hw.gpu.memory.usage", "hw.gpu.memory.limit", null],
];
const HOST = [
  ["Processors", "system.cpu.utilization", {}],
  ["Memory used", "system.memory.usage", { "system.memory.state": ["used"] }],
];
const SUPPORT = "lens.collector.supported";
const METRICS = [...new Set([...READINGS.flatMap(([, metric, limit]) => [metric, limit]), ...HOST.map(([, metric]) => metric), "system.memory.limit", SUPPORT])].filter(Boolean);

function latestOf(session) {
  return session.reply("hardware", "", freshFor(session), async () => Object.fromEntries(await Promise.all(METRICS.map(async (metric) => [metric, await getLatest(session.run, metric)]))));
}

/** The newest of the series that fit. */
function newest(series, fits, wanted) {
  const found = series.filter(fits);
  const named = wanted ? Object.entries(wanted).flatMap(([label, values]) => values.map((value) => found.filter((each) => each.labels[label] === value)).find((part) => part.length) ?? []) : found;
  return named.reduce((best, each) => (best && best.t_ns >= each.t_ns ? best : each), null);
}

/** Hosts in order, each with its cards: {host, devices: [{device, ranks, vendor, model, simulated, readings}], readings}. */
function hostsOf(session, latest) {
  const cards = new Map();
  for (const rank of session.meta?.ranks ?? []) {
    if (!rank.device) continue;
    const card = cards.get(rank.device) ?? { device: rank.device, host: rank.host ?? rank.device.split("/")[0], vendor: rank.vendor, model: rank.model, simulated: Boolean(rank.simulated), ranks: [] };
    card.ranks.push(rank.rank);
    cards.set(rank.device, card);
  }
  for (const [, metric] of READINGS) {
    for (const each of latest[metric]) if (each.device && !cards.has(each.device)) cards.set(each.device, { device: each.device, host: each.host ?? each.device.split("/")[0], ranks: [], simulated: false });
  }
  const sorted = [...cards.values()].sort((a, b) => a.device.localeCompare(b.device, undefined, { numeric: true }));
  for (const card of sorted) {
    const own = (each) => each.device === card.device;
    card.readings = READINGS.map(([name, metric, limit, wanted]) => {
      const value = newest(latest[metric], own, wanted);
      if (value?.labels.simulated === "true") card.simulated = true;
      return { name, metric, value: numeric(value), at: value?.t_ns ?? null, limit: limit ? numeric(newest(latest[limit], own)) : 1, reason: reasonFor(latest[SUPPORT], card.device, metric) };
    });
  }
  const names = [...new Set([...sorted.map((card) => card.host), ...(session.meta?.ranks ?? []).map((rank) => rank.host)].filter(Boolean))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  return names.map((host) => ({ host, devices: sorted.filter((card) => card.host === host), readings: HOST.map(([name, metric, wanted]) => hostReading(latest, host, name, metric, wanted)) }));
}

function hostReading(latest, host, name, metric, wanted) {
  const own = (each) => each.host === host && !each.device;
  const value = numeric(newest(latest[metric], own, Object.keys(wanted).length ? wanted : null));
  const limit = metric === "system.memory.usage" ? numeric(newest(latest["system.memory.limit"], own)) : 1;
  return { name, metric, value, limit };
}

function numeric(entry) {
  return entry && Number.isFinite(entry.value) ? entry.value : null;
}

/** Why a card does not give a metric, as its collector said. */
function reasonFor(support, device, metric) {
  const said = newest(support.filter((each) => each.labels.metric === metric && each.value === 0), (each) => each.device === device);
  return said?.labels.reason ? `${said.labels.reason.replace(/_/g, " ")} by this card` : "not reported";
}

const UNITS = { "hw.gpu.utilization": "1", "hw.power": "W", "gpu.clock.sm": "MHz", "hw.temperature": "Cel", "hw.gpu.memory.usage": "By", "system.cpu.utilization": "1", "system.memory.usage": "By" };

function shown(metric, value) {
  return UNITS[metric] === "1" ? percent(value) : quantity(value, UNITS[metric]);
}

export class Hardware {
  sources() {
    return [];
  }

  draw() {}
}

export class HardwarePanel extends Panel {
  silence() {
    const { value, error } = latestOf(this.session);
    if (error && !value) return `n/a: ${error.message}`;
    if (!value) return "Loading…";
    this.hosts = hostsOf(this.session, value);
    return this.hosts.length ? null : "n/a: no host or card has reported. The agent of each host reports them: lens agent.";
  }

  render() {
    if (this.say(this.silence())) return this.legend.replaceChildren();
    const cards = this.hosts.flatMap((host) => host.devices);
    const now = Math.max(...cards.flatMap((card) => card.readings.map((reading) => reading.at ?? 0)));
    const models = [...new Set(cards.map((card) => [card.vendor, card.model].filter(Boolean).join(" ")).filter(Boolean))];
    const words = `${this.hosts.length} ${this.hosts.length === 1 ? "host" : "hosts"}, ${cards.length} ${cards.length === 1 ? "card" : "cards"}${models.length ? `: ${models.join(", ")}` : ""}`;
    replace(this.legend, words, () => [element("span", { class: "lens-key lens-quiet" }, words), element("span", { class: "lens-key lens-quiet" }, "bars: of the card's own limit")]);
    replace(this.picture, JSON.stringify(this.hosts), () => this.hosts.map((host) => hostBox(host, now, this.blamed())));
    return undefined;
  }

  blamed() {
    return new Set((this.session.diagnosis?.hypotheses ?? []).flatMap((each) => each.ranks ?? []));
  }

  rows() {
    const rows = (this.hosts ?? []).flatMap((host) => [
      ...host.readings.map((reading) => [host.host, "", "", reading.metric, reading.value ?? "n/a: not reported", reading.limit ?? "n/a"]),
      ...host.devices.flatMap((card) => card.readings.map((reading) => [host.host, card.device, card.simulated ? "simulated" : "measured", reading.metric, reading.value ?? `n/a: ${reading.reason}`, reading.limit ?? "n/a"])),
    ]);
    return { columns: ["host", "card", "source", "metric", "value", "limit"], rows: rows.reverse() };
  }
}

function hostBox({ host, devices, readings }, now, blamed) {
  const words = readings.map(({ name, metric, value, limit }) => element("span", {}, `${name} `, element("b", {}, shown(metric, value)), limit && limit !== 1 && value !== null ? ` of ${shown(metric, limit)}` : ""));
  const cards = devices.length ? devices.map((card) => cardBox(card, now, blamed)) : [element("p", { class: "lens-quiet" }, "n/a: no card of this host has reported.")];
  return element("section", { class: "lens-host", "aria-label": host }, element("header", {}, element("h3", {}, host), ...words), element("div", { class: "lens-cards" }, ...cards));
}

function cardBox(card, now, blamed) {
  const old = card.readings.every((reading) => reading.at === null || now - reading.at > OLD_S * NS);
  const suspect = card.ranks.some((rank) => blamed.has(rank));
  const ranks = card.ranks.length ? `${card.ranks.length === 1 ? "rank" : "ranks"} ${card.ranks.join(", ")}` : "no rank";
  return element(
    "article",
    { class: "lens-card", "data-device": card.device, "data-old": old, "data-suspect": suspect },
    element("header", {}, element("b", {}, `${suspect ? "▲ " : ""}${card.device.split("/").slice(1).join("/") || card.device}`), element("span", { class: "lens-quiet" }, ranks), card.simulated ? element("span", { class: "lens-simulated" }, "simulated") : null),
    element("p", { class: "lens-quiet" }, [card.vendor, card.model].filter(Boolean).join(" · ") || "model n/a"),
    element("dl", {}, ...card.readings.flatMap(readingRow)),
  );
}

function readingRow({ name, metric, value, limit, reason }) {
  if (value === null) return [element("dt", {}, name), element("dd", { class: "lens-quiet" }, `n/a: ${reason}`)];
  const bar = element("span", { class: "lens-bar", "aria-hidden": "true", "data-unknown": limit === null }, element("i"));
  if (limit) bar.firstChild.style.width = `${Math.max(0, Math.min(100, (value / limit) * 100))}%`;
  const of = limit && metric !== "hw.gpu.utilization" ? element("small", {}, ` of ${shown(metric, limit)}`) : null;
  return [element("dt", {}, name), element("dd", {}, bar, element("span", {}, element("b", {}, shown(metric, value)), of))];
}
