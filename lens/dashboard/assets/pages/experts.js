// Experts: who gets how many tokens, how even that is, and how many tokens find no room.

import { CellMapPanel } from "../panels/cell_map.js";
import { communicationOf } from "./communication.js";
import { element, replace } from "../core/dom.js";
import { freshFor, once, onGrid, ReplyChart } from "../panels/grid.js";
import { getExperts, getSeries } from "../core/api.js";
import { integer, number, percent, quantity } from "../core/format.js";
import { tile } from "../panels/tile.js";

const MOST_CELLS = 150000;
const POINTS = 300;
const MOST_LINES = 5;
const NO_VECTOR = "n/a: this run has not reported moe.expert.tokens. Mixture-of-experts routers are found by themselves; others say lens.expert_tokens(layer, counts).";

function ask(session, kind, columns) {
  return session.reply(kind, String(session.range), freshFor(session), () => getExperts(session.run, session.range, columns));
}

/** Mean tokens a step of each layer and expert over the visible steps: {from, to, layers, experts, at(layer, expert)}. */
export function loadOf(session) {
  const { value, error } = ask(session, "experts", 1);
  return { load: value?.rows.length ? once(value, "shape", shaped) : null, error, asked: value !== null };
}

function shaped(reply) {
  const cells = reply.rows.map((name) => /^layer(-?\d+)\/expert(\d+)$/.exec(name).slice(1).map(Number));
  const layers = [...new Set(cells.map(([layer]) => layer))];
  const experts = 1 + Math.max(...cells.map(([, expert]) => expert));
  const rows = new Map(cells.map(([layer, expert], row) => [`${layer} ${expert}`, reply.values[row]]));
  return { ...reply, layers, experts, row: (layer, expert) => rows.get(`${layer} ${expert}`) ?? null };
}

function silence(session) {
  const { load, error, asked } = loadOf(session);
  if (load) return null;
  if (error) return `n/a: ${error.message}`;
  if (!asked) return "Loading…";
  if (session.observed) return `n/a: ${session.noStep}.`;
  return session.range ? `n/a: no expert has tokens in steps ${session.range.join("–")}. Press 0 for all steps.` : NO_VECTOR;
}

function layerLoads(load, layer) {
  return Array.from({ length: load.experts }, (_, expert) => load.row(layer, expert)?.[0] ?? null);
}

function imbalance(values) {
  const known = values.filter((value) => value !== null);
  const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
  return known.length && mean > 0 ? Math.max(...known) / mean : null;
}

/** Entropy of the load by that of an even one: 1 when all experts get the same. */
function evenness(values) {
  const known = values.filter((value) => value !== null);
  const sum = known.reduce((total, value) => total + value, 0);
  if (known.length < 2 || !(sum > 0)) return null;
  const entropy = known.reduce((total, value) => (value > 0 ? total - (value / sum) * Math.log(value / sum) : total), 0);
  return entropy / Math.log(known.length);
}

export class Experts {
  constructor(root, app) {
    this.app = app;
    this.place = root.querySelector("#experts-numbers");
  }

  sources() {
    return ["step.duration"];
  }

  draw() {
    const { session } = this.app;
    const { load } = loadOf(session);
    const tiles = load ? [busiest(load), unevenness(load), costTile(session), dropTile(session), routing(session, load)] : [];
    replace(this.place, JSON.stringify(tiles), () => tiles.map(tile));
  }
}

function busiest(load) {
  let best = null;
  for (const layer of load.layers) {
    layerLoads(load, layer).forEach((value, expert) => {
      if (value !== null && value > (best?.value ?? -1)) best = { layer, expert, value, share: value / (mean(layerLoads(load, layer)) || 1) };
    });
  }
  return { label: "Busiest expert", value: `layer ${best.layer}, expert ${best.expert}`, detail: `${quantity(best.value, "{token}")} a step, ${number(best.share)} × the even share` };
}

function mean(values) {
  const known = values.filter((value) => value !== null);
  return known.reduce((sum, value) => sum + value, 0) / Math.max(1, known.length);
}

function unevenness(load) {
  const worst = load.layers.map((layer) => [layer, imbalance(layerLoads(load, layer))]).reduce((a, b) => ((b[1] ?? 0) > (a[1] ?? 0) ? b : a));
  return { label: "Load imbalance", value: worst[1] === null ? "n/a" : `${number(worst[1])} ×`, detail: `busiest expert by the mean, layer ${worst[0]}: the worst of ${load.layers.length} ${load.layers.length === 1 ? "layer" : "layers"}`, missing: worst[1] === null };
}

/** What waiting for the busiest costs at most: ranks also wait in an exchange for reasons that are not its experts'. */
function costTile(session) {
  const label = "Waiting in exchanges";
  const { value, error } = communicationOf(session);
  if (!value) return { label, value: error ? "n/a" : "…", detail: error?.message ?? "loading", missing: true };
  const exchanges = value.groups.filter((each) => each.op === "all_to_all" && each.wait_s !== null);
  if (!exchanges.length) return { label, value: "n/a", detail: "no all-to-all was recorded", missing: true };
  const mean = exchanges.reduce((sum, each) => sum + each.wait_s, 0) / Math.max(1, value.ranks.length * value.steps);
  return { label, value: quantity(mean, "s"), detail: "a step, for the mean rank in its all-to-alls: the most that uneven experts can cost" };
}

function dropTile(session) {
  const label = "Tokens dropped";
  const drops = dropsOf(session);
  if (typeof drops === "string") return { label, value: "n/a", detail: drops.replace(/^n\/a: /, ""), missing: true };
  return { label, value: percent(drops.total), detail: `of the routed tokens, steps ${integer(drops.x[0])}–${integer(Math.min(drops.x[drops.x.length - 1] + drops.width - 1, session.lastStep ?? Infinity))}` };
}

function routing(session, load) {
  const about = session.meta?.experts ?? {};
  const top = about.top_k ? `each token goes to ${about.top_k}` : "top k n/a: not said by the run";
  const room = about.capacity_factor ? `; room for ${about.capacity_factor} × the even share` : "";
  return { label: "Experts", value: `${load.experts} in ${load.layers.length} ${load.layers.length === 1 ? "layer" : "layers"}`, detail: `${top}${room}` };
}

export class ExpertMapPanel extends CellMapPanel {
  newestStep() {
    return loadOf(this.session).load?.to ?? null;
  }

  content() {
    const quiet = silence(this.session);
    if (quiet) return quiet;
    const { load } = loadOf(this.session);
    const values = load.layers.map((layer) => layerLoads(load, layer));
    return {
      rows: load.layers.map((layer) => (layer < 0 ? "layer n/a" : `layer ${layer}`)),
      columns: Array.from({ length: load.experts }, (_, expert) => String(expert)),
      values,
      unit: "{token}",
      fromZero: true,
      rowTitle: "layer",
      columnTitle: "expert",
      measure: "tokens a step",
      gapWords: "nothing reported",
      notes: [`mean of steps ${integer(load.from)}–${integer(load.to)}`],
      gap: () => "nothing reported",
      name: (row, column) => `layer ${load.layers[row]}, expert ${column}`,
      more: (row, column) => [element("span", {}, `${number(values[row][column] / (mean(values[row]) || 1))} × the even share of its layer`), ...ownerWords(this.session, column)],
    };
  }
}

function ownerWords(session, expert) {
  const place = session.meta?.experts?.owner?.[expert];
  return Number.isInteger(place) ? [element("small", {}, `lives on place ${place} of each expert group`)] : [];
}

/** A line a layer, the worst first where there are many. */
class LayersChart extends ReplyChart {
  chosen(perLayer, worstIsLow) {
    const score = ([, values]) => mean(values) * (worstIsLow ? 1 : -1);
    const sorted = [...perLayer].sort((a, b) => score(a) - score(b)).slice(0, MOST_LINES);
    const shown = sorted.sort((a, b) => a[0] - b[0]).map(([layer, values]) => [`layer ${layer}`, values]);
    return { lines: shown, note: shown.length < perLayer.length ? `the worst ${shown.length} of ${perLayer.length} layers` : "" };
  }
}

/** Imbalance or evenness of the load, step by step. */
export class ExpertShapePanel extends LayersChart {
  get even() {
    return this.root.dataset.metric === "evenness";
  }

  get zero() {
    return false;
  }

  unit() {
    return "1";
  }

  lines() {
    const quiet = silence(this.session);
    if (quiet) return quiet;
    const { load } = loadOf(this.session);
    const columns = Math.max(1, Math.min(POINTS, Math.floor(MOST_CELLS / (load.layers.length * load.experts))));
    const { value, error } = ask(this.session, "experts over steps", columns);
    if (!value) return error ? `n/a: ${error.message}` : "Loading…";
    const name = this.even ? "evenness" : "imbalance";
    return once(value, name, () => this.overSteps(value));
  }

  overSteps(reply) {
    const over = once(reply, "shape", shaped);
    const x = Array.from({ length: reply.columns }, (_, column) => reply.from + column * reply.width);
    const measure = this.even ? evenness : imbalance;
    const perLayer = over.layers.map((layer) => [layer, x.map((_, column) => measure(Array.from({ length: over.experts }, (__, expert) => over.row(layer, expert)?.[column] ?? null)))]);
    return { x, width: reply.width, ...this.chosen(perLayer, this.even) };
  }
}

/** Share of the routed tokens that were dropped, from two counters: {x, width, perLayer, total} or text. */
function dropsOf(session) {
  const get = (metric) => session.reply(metric, String(session.range), freshFor(session), () => getSeries(session.run, metric, null, session.range, POINTS));
  const [dropped, routed] = [get("moe.tokens.dropped"), get("moe.tokens.routed")];
  for (const { value, error } of [dropped, routed]) if (!value) return error ? `n/a: ${error.message}` : "Loading…";
  if (session.observed) return `n/a: ${session.noStep}.`;
  if (!dropped.value.series.length || !routed.value.series.length) return "n/a: this run has not reported moe.tokens.dropped. A router without a capacity drops nothing and reports nothing.";
  const [lost, all] = [onGrid(dropped.value, "max"), onGrid(routed.value, "max")];
  if (lost.width !== all.width || lost.x.length !== all.x.length || lost.x[0] !== all.x[0] || lost.x.length < 2) return lost.x.length < 2 ? "n/a: a share needs two readings of the counters." : "Loading…";
  const layers = [...new Set(lost.series.map((each) => Number(each.labels.layer)))].sort((a, b) => a - b);
  const added = (grid, layer) => grid.x.slice(1).map((_, index) => growth(grid.series.filter((each) => Number(each.labels.layer) === layer), index));
  const [sums, perLayer] = [[0, 0], []];
  for (const layer of layers) {
    const [gone, sent] = [added(lost, layer), added(all, layer)];
    gone.forEach((value, index) => {
      if (value === null || sent[index] === null) return;
      sums[0] += value;
      sums[1] += sent[index];
    });
    perLayer.push([layer, gone.map((value, index) => (value === null || !sent[index] ? null : value / sent[index]))]);
  }
  return { x: lost.x.slice(1), width: lost.width, perLayer, total: sums[1] ? sums[0] / sums[1] : null };
}

/** Sum of what counters grew by; null where one has no value, or was reset. */
function growth(series, index) {
  let sum = 0;
  for (const { values } of series) {
    const [before, after] = [values[index], values[index + 1]];
    if (before === null || after === null || after < before) return null;
    sum += after - before;
  }
  return series.length ? sum : null;
}

export class ExpertDropsPanel extends LayersChart {
  unit() {
    return "%";
  }

  lines() {
    const drops = dropsOf(this.session);
    if (typeof drops === "string") return drops;
    const shares = drops.perLayer.map(([layer, values]) => [layer, values.map((value) => (value === null ? null : value * 100))]);
    return { x: drops.x, width: drops.width, ...this.chosen(shares, false) };
  }
}
