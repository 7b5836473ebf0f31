// Hosts with their cards and network ports, and the newest reading of each, from the newest values of all series.

/** [what a reader calls it, metric, metric it is a part of or null, labels that are wanted, best first] */
const CARD = [
  ["Busy", "hw.gpu.utilization", null, {}],
  ["Power", "hw.power", "gpu.power.limit", {}],
  ["Clock", "gpu.clock.sm", "gpu.clock.sm.max", {}],
  ["Temperature", "hw.temperature", "hw.temperature.limit", { sensor: ["core", "edge", "junction", "hotspot"] }],
  ["Memory", "hw.gpu.memory.usage", "hw.gpu.memory.limit", {}],
];
const HOST = [
  ["Processors", "system.cpu.utilization", null, {}],
  ["Memory used", "system.memory.usage", "system.memory.limit", { "system.memory.state": ["used"] }],
];
const PORT = [
  ["State", "hw.network.up", null, {}],
  ["Speed", "hw.network.bandwidth.limit", null, {}],
  ["Sends", "hw.network.bandwidth.utilization", null, { "network.io.direction": ["transmit"] }],
  ["Receives", "hw.network.bandwidth.utilization", null, { "network.io.direction": ["receive"] }],
];
const SUPPORT = "lens.collector.supported";
/** Everything that an inventory is made of. */
export const METRICS = [...new Set([...[...CARD, ...HOST, ...PORT].flatMap(([, metric, limit]) => [metric, limit]), SUPPORT])].filter(Boolean);

/** @param {object[]} ranks of the run @param {Object<string, object[]>} latest newest series of each of METRICS
 *  @param {boolean} ended then a card's last readings with a rank on it count: afterwards it idles, or works for others
 *  @returns {{host: string, readings: object[], cards: object[], ports: object[]}[]} */
export function hostsOf(ranks, latest, ended) {
  const cards = cardsOf(ranks, latest);
  const ports = new Map();
  for (const [, metric] of PORT) for (const each of latest[metric]) if (each.device) ports.set(each.device, { device: each.device, host: hostOf(each), simulated: isSimulated(each) });
  const parts = [...cards.values()].map((card) => withReadings(card, CARD, latest, "card", ended));
  const doors = [...ports.values()].map((port) => withReadings(port, PORT, latest, "port", false));
  const names = [...parts, ...doors, ...ranks].map((each) => each.host).filter(Boolean);
  return sorted([...new Set(names)], (name) => name).map((host) => ({
    host,
    readings: HOST.map((row) => reading(row, latest, (each) => each.host === host && !each.device)),
    cards: sorted(parts.filter((card) => card.host === host), (card) => card.device),
    ports: sorted(doors.filter((port) => port.host === host), (port) => port.device),
  }));
}

/** The cards that the run names, and those that only report. */
function cardsOf(ranks, latest) {
  const cards = new Map();
  for (const rank of ranks) {
    if (!rank.device) continue;
    const card = cards.get(rank.device) ?? { device: rank.device, host: hostOf(rank), vendor: rank.vendor, model: rank.model, simulated: Boolean(rank.simulated), ranks: [] };
    card.ranks.push(rank.rank);
    cards.set(rank.device, card);
  }
  for (const [, metric] of CARD) for (const each of latest[metric]) if (isCard(each) && !cards.has(each.device)) cards.set(each.device, { device: each.device, host: hostOf(each), ranks: [], simulated: isSimulated(each) });
  return cards;
}

/** Some metrics, such as hw.power, are reported of other devices too. */
function isCard({ device, labels }) {
  return Boolean(device) && (labels["hw.type"] ?? "gpu") === "gpu";
}

function withReadings(part, rows, latest, what, working) {
  const own = (each) => each.device === part.device;
  const simulated = part.simulated || rows.some(([, metric]) => latest[metric].some((each) => own(each) && isSimulated(each)));
  return { ...part, simulated, readings: rows.map((row) => ({ ...reading(row, latest, own, working), reason: reasonFor(latest[SUPPORT], part.device, row[1], what) })) };
}

function reading([name, metric, limit, wanted], latest, own, working = false) {
  const all = latest[metric].filter(own);
  const used = working ? all.filter((each) => each.rank !== null) : [];
  const value = newest(used.length ? used : all, wanted);
  return { name, metric, value: numeric(value), at: value?.t_ns ?? null, limit: limit ? numeric(newest(latest[limit].filter(own), {})) : 1 };
}

/** The newest of some series, of those with the best label of each kind where any has it. */
function newest(series, wanted) {
  const named = Object.entries(wanted).reduce((left, [label, values]) => values.map((value) => left.filter((each) => each.labels[label] === value)).find((part) => part.length) ?? [], series);
  return named.reduce((best, each) => (best && best.t_ns >= each.t_ns ? best : each), null);
}

/** Why a device does not give a metric, as its collector said. */
function reasonFor(support, device, metric, what) {
  const said = newest(support.filter((each) => each.device === device && each.labels.metric === metric && each.value === 0), {});
  return said?.labels.reason ? `${said.labels.reason.replace(/_/g, " ")} by this ${what}` : "not reported";
}

function hostOf({ host, device }) {
  return host ?? device.split("/")[0];
}

function isSimulated({ labels }) {
  return labels.simulated === "true";
}

function numeric(entry) {
  return entry && Number.isFinite(entry.value) ? entry.value : null;
}

function sorted(list, name) {
  return list.sort((a, b) => name(a).localeCompare(name(b), undefined, { numeric: true }));
}
