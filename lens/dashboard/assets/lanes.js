// One step as every rank lived it: phases as bars, collectives below them, waiting for the last rank hatched.

import { CanvasPanel } from "./canvas_panel.js";
import { css } from "./palette.js";
import { element, replace } from "./dom.js";
import { hatch, NAMED_ROWS } from "./map.js";
import { integer, list, quantity } from "./format.js";
import { phaseColours, phaseWords } from "./phases.js";
import { stepShown } from "./steps.js";

const LEFT = 168;
const LEFT_SHORT = 44;
const RIGHT = 14;
const TOP = 6;
const AXIS = 28;
const NS = 1e9;
const MOST_LANES = 64;
const COLLECTIVE = "#d55e00";
const WAIT = "#e69f00";

/** Adds to each collective how long its rank waited for the last one, and who that was. @param {object[]} ranks of a step */
export function withWaits(ranks, groups, world) {
  const calls = new Map();
  for (const { rank, spans } of ranks) {
    for (const span of spans) {
      if (span.kind !== "collective" || span.group === undefined || span.seq === undefined) continue;
      const key = `${span.group} ${span.seq}`;
      if (!calls.has(key)) calls.set(key, []);
      calls.get(key).push({ rank, span });
    }
  }
  for (const members of calls.values()) {
    const expected = sizeOf(members[0].span.group, groups, world) ?? members.length;
    const last = members.reduce((latest, each) => (each.span.t0_ns > latest.span.t0_ns ? each : latest));
    for (const { rank, span } of members) {
      span.last = last.rank;
      span.own = rank === last.rank;
      span.missing = Math.max(0, expected - members.length);
      const end = span.t1_ns ?? last.span.t0_ns;
      span.wait = span.missing || members.length < 2 ? null : Math.max(0, Math.min(last.span.t0_ns, end) - span.t0_ns) / NS;
    }
  }
  return ranks;
}

function sizeOf(group, groups, world) {
  const [kind, index] = group.split("/");
  return groups?.[kind]?.[Number(index)]?.length ?? (group === "world/0" ? world : null);
}

export class LanesPanel extends CanvasPanel {
  get reply() {
    return stepShown(this.app);
  }

  newestStep() {
    return this.reply?.value?.step ?? null;
  }

  render() {
    const { step, value, error } = this.reply;
    if (this.say(step === null ? "n/a: no step has ended yet." : error && !value ? `n/a: ${error.message}` : value ? null : "Loading…")) return this.legend.replaceChildren();
    if (this.known !== value) {
      this.known = value;
      this.hover = null;
      withWaits(value.ranks, this.session.meta?.groups, this.session.meta?.world_size);
    }
    if (!this.picture.hidden) this.paint();
    this.drawLegend();
    return undefined;
  }

  get ranks() {
    const chosen = this.app.address.ranks;
    const all = (this.known?.ranks ?? []).filter((each) => each.rank !== null);
    return (chosen.length ? all.filter((each) => chosen.includes(each.rank)) : all).slice(0, MOST_LANES);
  }

  paint() {
    const { ranks } = this;
    const named = ranks.length <= NAMED_ROWS;
    const lane = ranks.length <= 8 ? 56 : ranks.length <= 16 ? 36 : 16;
    const context = this.begin(TOP + ranks.length * lane + AXIS);
    const left = named ? LEFT : LEFT_SHORT;
    const width = Math.max(50, this.picture.clientWidth - left - RIGHT);
    const ends = ranks.flatMap((each) => [each.t1_ns, ...each.spans.map((span) => span.t1_ns)]).filter(Number.isFinite);
    const starts = ranks.flatMap((each) => [each.t0_ns, ...each.spans.map((span) => span.t0_ns)]).filter(Number.isFinite);
    const begin = Math.min(...starts);
    const length = Math.max(1, Math.max(...ends) - begin);
    const x = (t) => left + ((t - begin) / length) * width;
    this.boxes = [];
    this.paintTimes(context, left, width, length / NS, TOP + ranks.length * lane);
    ranks.forEach((each, index) => {
      const top = TOP + index * lane;
      this.paintName(context, each.rank, left, top + lane / 2, named);
      context.strokeStyle = css("line");
      context.lineWidth = 1;
      if (index) context.strokeRect(0, top - 0.5, this.picture.clientWidth, 0);
      const high = Math.max(6, Math.round(lane * 0.46));
      const low = Math.max(4, Math.round(lane * 0.24));
      for (const span of each.spans) {
        const collective = span.kind === "collective";
        const open = !Number.isFinite(span.t1_ns);
        const from = x(span.t0_ns);
        const box = { x: from, y: collective ? top + 4 + high + 3 : top + 4, width: Math.max(1, (open ? left + width : x(span.t1_ns)) - from), height: collective ? low : high, rank: each.rank, row: index, span, start: (span.t0_ns - begin) / NS };
        if (collective) this.paintCollective(context, box, x);
        else this.paintPhase(context, box);
        this.boxes.push(box);
      }
    });
    if (this.hover) this.point(this.boxes.find((box) => box.span === this.hover.span) ?? null);
    else this.point(null);
  }

  paintName(context, rank, left, y, named) {
    const device = named ? this.session.about(rank)?.device : null;
    const blamed = (this.session.diagnosis?.hypotheses ?? []).some((each) => each.ranks?.includes(rank));
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillStyle = css(blamed ? "text" : "muted");
    context.font = `${blamed ? 700 : 400} 12px system-ui, sans-serif`;
    context.fillText(`${blamed ? "▲ " : ""}${named ? `rank ${rank}` : rank}${device ? ` · ${device}` : ""}`, left - 10, y);
  }

  paintTimes(context, left, width, seconds, bottom) {
    const rough = seconds / Math.max(2, Math.floor(width / 110));
    const power = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "top";
    for (let at = 0; at <= seconds; at += size) {
      const x = left + (at / seconds) * width;
      context.fillStyle = css("grid");
      context.fillRect(x, TOP, 1, bottom - TOP);
      context.fillStyle = css("muted");
      context.fillText(quantity(Number(at.toPrecision(6)), "s", 3), Math.min(x, left + width - 16), bottom + 8);
    }
  }

  paintPhase(context, { x, y, width, height, span }) {
    const [ground, ink] = phaseColours(span.name);
    context.fillStyle = ground;
    context.fillRect(x, y, Math.max(1, width - 1), height);
    context.font = "12px system-ui, sans-serif";
    const words = phaseWords(span.name);
    if (height < 13 || context.measureText(words).width > width - 10) return;
    context.fillStyle = ink;
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillText(words, x + 6, y + height / 2 + 0.5);
  }

  /** Until the last rank came: hatched; after it: solid; where nobody can tell: an outline. */
  paintCollective(context, box, scale) {
    const { x, y, width, height, span } = box;
    const known = span.wait !== null && span.wait !== undefined;
    const waited = known ? Math.min(width, scale(span.t0_ns + span.wait * NS) - x) : 0;
    if (known) {
      context.fillStyle = COLLECTIVE;
      context.fillRect(x + waited, y, Math.max(1, width - waited - 0.5), height);
    } else hatch(context, x, y, width, height);
    if (waited > 0.5) stripes(context, x, y, waited, height);
  }

  at(x, y) {
    return (this.boxes ?? []).find((box) => x >= box.x - 2 && x <= box.x + box.width + 2 && y >= box.y && y <= box.y + box.height) ?? null;
  }

  moved(rows, columns) {
    const boxes = this.boxes ?? [];
    if (!this.hover) return boxes[0] ?? null;
    if (columns) return boxes[Math.max(0, Math.min(boxes.length - 1, boxes.indexOf(this.hover) + columns))];
    const row = boxes.filter((box) => box.row === this.hover.row + rows);
    return row.reduce((best, box) => (best && Math.abs(best.x - this.hover.x) <= Math.abs(box.x - this.hover.x) ? best : box), null) ?? this.hover;
  }

  describe(box, context) {
    const { span } = box;
    context.strokeStyle = css("text");
    context.lineWidth = 2;
    context.strokeRect(box.x, box.y, box.width, box.height);
    const length = Number.isFinite(span.t1_ns) ? quantity((span.t1_ns - span.t0_ns) / NS, "s") : "not left yet";
    const lines = [`rank ${box.rank} · ${span.kind === "collective" ? span.name.replace(/_/g, "-") : phaseWords(span.name)}`, element("span", { class: "lens-tip-value" }, length), `begins ${quantity(box.start, "s")} into the step`];
    if (span.kind !== "collective") return { box, lines };
    lines.push(waitWords(span, box.rank));
    if (span.bytes !== undefined) lines.push(`${quantity(span.bytes, "By")} given by this rank`);
    if (span.group !== undefined) lines.push(element("small", {}, `group ${span.group}, number ${span.seq}`));
    return { box, lines };
  }

  drawLegend() {
    const waits = waitedFor(this.ranks);
    const [worst] = waits;
    const shown = this.known.ranks.filter((each) => each.rank !== null).length;
    const names = [...new Set(this.ranks.flatMap((each) => each.spans.filter((span) => span.kind !== "collective").map((span) => span.name)))];
    const words = worst && worst[1] > 0 ? `most waited for: rank ${worst[0]}, ${quantity(worst[1], "s")} in all by ${list(worst[2])}` : "";
    replace(this.legend, JSON.stringify([this.known.step, this.ranks.length, names, words, css("text")]), () => [
      ...names.map((name) => key(phaseWords(name), phaseColours(name)[0])),
      key("collective", COLLECTIVE),
      element("span", { class: "lens-key" }, element("i", { class: "lens-square lens-wait" }), "waiting for the last rank to come"),
      element("span", { class: "lens-key lens-quiet" }, `step ${integer(this.known.step)}, ${this.ranks.length === shown ? `${shown} ranks` : `${this.ranks.length} of ${shown} ranks`}`),
      ...(words ? [element("span", { class: "lens-key lens-note" }, words)] : []),
    ]);
  }

  rows() {
    const rows = [];
    const begin = Math.min(...(this.known?.ranks ?? []).flatMap((each) => each.spans.map((span) => span.t0_ns)));
    for (const { rank, spans } of this.known?.ranks ?? []) {
      for (const span of spans) {
        const length = Number.isFinite(span.t1_ns) ? micro((span.t1_ns - span.t0_ns) / NS) : "n/a: not left yet";
        const collective = span.kind === "collective";
        rows.push([rank ?? "all", span.kind, span.name, micro((span.t0_ns - begin) / NS), length, collective ? micro(span.wait) : "", collective ? span.last ?? "n/a" : "", span.group ?? "", span.seq ?? "", span.bytes ?? ""]);
      }
    }
    return { columns: ["rank", "kind", "name", "begins (s)", "takes (s)", "of it waiting (s)", "last to come", "group", "number", "bytes"], rows };
  }
}

function key(words, colour) {
  const square = element("i", { class: "lens-square" });
  square.style.background = colour;
  return element("span", { class: "lens-key" }, square, words);
}

/** Unix nanoseconds do not fit a double to the last digit: microseconds do. */
function micro(seconds) {
  return seconds === null || seconds === undefined ? "n/a" : Math.round(seconds * 1e6) / 1e6;
}

function waitWords(span, rank) {
  if (span.wait === null || span.wait === undefined) return span.missing ? `waiting n/a: ${span.missing === 1 ? "one rank" : `${span.missing} ranks`} of the group not recorded` : "waiting n/a: no other rank recorded";
  return rank === span.last ? "the last to come: the others waited for it" : `waited ${quantity(span.wait, "s")} for rank ${span.last}`;
}

/** [rank, seconds, who waited] of the ranks that others waited for, the worst first. */
function waitedFor(ranks) {
  const sums = new Map();
  for (const { rank, spans } of ranks) {
    for (const span of spans) {
      if (!span.wait || span.last === rank) continue;
      const [seconds, who] = sums.get(span.last) ?? [0, new Set()];
      sums.set(span.last, [seconds + span.wait, who.add(rank)]);
    }
  }
  return [...sums].map(([rank, [seconds, who]]) => [rank, seconds, [...who].sort((a, b) => a - b)]).sort((a, b) => b[1] - a[1]);
}

function stripes(context, x, y, width, height) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = WAIT;
  context.globalAlpha = 0.35;
  context.fillRect(x, y, width, height);
  context.globalAlpha = 1;
  context.strokeStyle = WAIT;
  context.lineWidth = 2;
  context.beginPath();
  for (let at = x - height; at < x + width + height; at += 6) {
    context.moveTo(at, y + height);
    context.lineTo(at + height, y);
  }
  context.stroke();
  context.restore();
}
