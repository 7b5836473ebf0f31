// One step as every rank lived it: phases as bars, collectives below them, waiting for the last rank hatched.

import { blamedRanks } from "../core/causes.js";
import { CanvasPanel, outline } from "./canvas_panel.js";
import { css } from "../core/palette.js";
import { element, replace } from "../core/dom.js";
import { hatch, NAMED_ROWS, paintRowName, stripes } from "./map.js";
import { integer, list, plain, quantity, scaleFor } from "../core/format.js";
import { phaseColours, phaseWords } from "../core/phases.js";
import { stepShown } from "../core/shown_step.js";
import { waitedFor, withWaits } from "../core/waits.js";

const LEFT = 168;
const LEFT_SHORT = 44;
const RIGHT = 14;
const TOP = 6;
const AXIS = 28;
const NS = 1e9;
const MOST_LANES = 64;
const COLLECTIVE = "#d55e00";
const WAIT = "#e69f00";

export class LanesPanel extends CanvasPanel {
  get reply() {
    return stepShown(this.app);
  }

  newestStep() {
    return this.reply?.value?.step ?? null;
  }

  render() {
    const { step, value, error } = this.reply;
    // Who waits is not known before the run's groups are: one of their ranks may be missing.
    const { meta } = this.session;
    if (this.say(step === null ? `n/a: ${this.session.noStep}.` : error && !value ? `n/a: ${error.message}` : value && meta ? null : "Loading…")) return this.legend.replaceChildren();
    if (this.known !== value || this.groupsOf !== meta) withWaits(value.ranks, meta.groups, meta.world_size);
    if (this.known !== value) this.hover = null;
    this.known = value;
    this.groupsOf = meta;
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
    const [begin, length] = extent(ranks);
    const x = (t) => left + ((t - begin) / length) * width;
    this.boxes = [];
    this.paintTimes(context, left, width, length / NS, TOP + ranks.length * lane);
    const high = Math.max(6, Math.round(lane * 0.46));
    const low = Math.max(4, Math.round(lane * 0.24));
    const blamed = blamedRanks(this.session.diagnosis);
    ranks.forEach((each, index) => {
      const top = TOP + index * lane;
      paintRowName(context, this.session, { rank: each.rank, x: left - 10, y: top + lane / 2, named, blamed: blamed.has(each.rank) });
      context.fillStyle = css("line");
      if (index) context.fillRect(0, top - 1, this.picture.clientWidth, 1);
      for (const span of each.spans) {
        const collective = span.kind === "collective";
        const from = x(span.t0_ns);
        const to = x(Number.isFinite(span.t1_ns) ? span.t1_ns : begin + length);
        const box = { x: from, y: collective ? top + 4 + high + 3 : top + 4, width: Math.max(1, to - from), height: collective ? low : high, rank: each.rank, row: index, span, start: (span.t0_ns - begin) / NS };
        if (collective) paintCollective(context, box, x);
        else paintPhase(context, box);
        this.boxes.push(box);
      }
    });
    this.point(this.hover ? this.boxes.find((box) => box.span === this.hover.span) ?? null : null);
  }

  paintTimes(context, left, width, seconds, bottom) {
    const rough = seconds / Math.max(2, Math.floor(width / 110));
    const power = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
    const { divide, name } = scaleFor("s", seconds);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "top";
    for (let at = 0; at <= seconds; at += size) {
      const x = left + (at / seconds) * width;
      context.fillStyle = css("grid");
      context.fillRect(x, TOP, 1, bottom - TOP);
      context.fillStyle = css("muted");
      context.textAlign = x > left + width - 30 ? "right" : "center";
      context.fillText(`${plain(at / divide)} ${name}`, x, bottom + 8);
    }
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
    outline(context, box, css("text"));
    const length = Number.isFinite(span.t1_ns) ? quantity((span.t1_ns - span.t0_ns) / NS, "s") : "not left yet";
    const collective = span.kind === "collective";
    const lines = [`rank ${box.rank} · ${collective ? span.name.replace(/_/g, "-") : phaseWords(span.name)}`, element("span", { class: "lens-tip-value" }, length), `begins ${quantity(box.start, "s")} into the step`];
    if (!collective) return { box, lines };
    if (span.async) lines.push(besideWords(span));
    lines.push(waitWords(span, box.rank));
    if (span.bytes !== undefined) lines.push(`${quantity(span.bytes, "By")} given by this rank`);
    if (span.group !== undefined) lines.push(element("small", {}, `group ${span.group}, number ${span.seq}`));
    return { box, lines };
  }

  drawLegend() {
    const { ranks } = this;
    const [worst] = waitedFor(ranks);
    const shown = this.known.ranks.filter((each) => each.rank !== null).length;
    const spans = ranks.flatMap((each) => each.spans);
    const collectives = spans.filter((span) => span.kind === "collective");
    const names = [...new Set(spans.filter((span) => span.kind !== "collective").map((span) => span.name))];
    const kinds = { beside: collectives.some((span) => span.async), unknown: collectives.some((span) => span.wait === null || span.wait === undefined) };
    const words = worst && worst[1] > 0 ? `most waited for: rank ${worst[0]}, ${quantity(worst[1], "s")} in all by ${worst[2].length === 1 ? "rank" : "ranks"} ${list(worst[2])}` : "";
    replace(this.legend, JSON.stringify([this.known.step, ranks.length, names, kinds, words, css("text")]), () => [
      ...names.map((name) => key(phaseWords(name), phaseColours(name)[0])),
      key("collective", COLLECTIVE),
      sample("lens-wait", "waiting for the last rank to come"),
      ...(kinds.beside ? [sample("lens-beside", "in flight beside other work")] : []),
      ...(kinds.unknown ? [sample("lens-unknown-wait", "waiting not known: a rank is not recorded")] : []),
      element("span", { class: "lens-key lens-quiet" }, `step ${integer(this.known.step)}, ${ranks.length === shown ? `${shown} ranks` : `${ranks.length} of ${shown} ranks`}`),
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
        const held = !collective ? "" : span.begin === null ? 0 : Number.isFinite(span.t1_ns) ? micro((span.t1_ns - span.begin) / NS) : "n/a: not left yet";
        rows.push([rank ?? "all", span.kind, span.name, micro((span.t0_ns - begin) / NS), length, held, collective ? micro(span.wait) : "", collective ? span.last ?? "n/a" : "", span.group ?? "", span.seq ?? "", span.bytes ?? ""]);
      }
    }
    return { columns: ["rank", "kind", "name", "begins (s)", "takes (s)", "of it held up (s)", "of that waiting (s)", "last to come", "group", "number", "bytes"], rows };
  }
}

/** First ns and length of what these ranks did. */
function extent(ranks) {
  const all = ranks.flatMap((each) => [each, ...each.spans]);
  const begin = Math.min(...all.map((each) => each.t0_ns).filter(Number.isFinite));
  const end = Math.max(...all.map((each) => each.t1_ns).filter(Number.isFinite));
  return [begin, Math.max(1, end - begin)];
}

function paintPhase(context, { x, y, width, height, span }) {
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

/** In flight beside other work: a line; until the last rank came: hatched; after it: solid; where nobody can tell: grey. */
function paintCollective(context, box, scale) {
  const { x, y, width, height, span } = box;
  const end = x + width;
  const begin = span.begin === null ? end : Math.max(x, scale(span.begin));
  if (begin > x) {
    context.fillStyle = COLLECTIVE;
    context.fillRect(x, y + height / 2 - 1, begin - x, 2);
    context.fillRect(x, y, 1.5, height);
  }
  if (begin >= end) return;
  if (span.wait === null || span.wait === undefined) return hatch(context, begin, y, end - begin, height);
  const waited = Math.min(end - begin, scale(span.begin + span.wait * NS) - begin);
  context.fillStyle = COLLECTIVE;
  context.fillRect(begin + waited, y, Math.max(1, end - begin - waited - 0.5), height);
  if (waited > 0.5) stripes(context, begin, y, waited, height, WAIT);
  return undefined;
}

function key(words, colour) {
  const square = element("i", { class: "lens-square" });
  square.style.background = colour;
  return element("span", { class: "lens-key" }, square, words);
}

function sample(name, words) {
  return element("span", { class: "lens-key" }, element("i", { class: `lens-square ${name}` }), words);
}

/** Unix nanoseconds do not fit a double to the last digit: microseconds do. */
function micro(seconds) {
  return seconds === null || seconds === undefined ? "n/a" : Math.round(seconds * 1e6) / 1e6;
}

function besideWords(span) {
  if (span.begin === null) return "beside other work: its rank never waited for it";
  return `beside other work for ${quantity((span.begin - span.t0_ns) / NS, "s")}, then its rank waited for it`;
}

function waitWords(span, rank) {
  if (span.wait === null || span.wait === undefined) return span.missing ? `waiting n/a: ${span.missing === 1 ? "one rank" : `${span.missing} ranks`} of the group not recorded` : "waiting n/a: no other rank recorded";
  if (rank === span.last) return "the last to come: the others waited for it";
  return span.wait > 0 ? `waited ${quantity(span.wait, "s")} for rank ${span.last}` : `rank ${span.last} came last; nobody was held up here`;
}
