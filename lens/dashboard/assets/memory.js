// Memory: how much is used, step by step, below the line that it must not cross.

import { getSeries } from "./api.js";
import { freshFor, onGrid, ReplyChart } from "./grid.js";
import { css, lines as colours, transparent } from "./palette.js";
import { quantity } from "./format.js";

const POINTS = 400;

export class Memory {
  sources() {
    return ["step.duration"];
  }

  draw() {}
}

/** A limit so many times above the peak is told in words: drawn, it would press the lines to the ground. */
const FAR = 8;

/** The highest and the median of all ranks or cards, and the lowest limit among them. */
export class EnvelopePanel extends ReplyChart {
  constructor(root, session, app) {
    super(root, session, app);
    this.limits = (root.dataset.limit ?? "").split(" ").filter(Boolean);
  }

  get metric() {
    return this.root.dataset.metric;
  }

  unit() {
    return "By";
  }

  ask(metric) {
    const { session } = this;
    return session.reply(metric, String(session.range), freshFor(session), () => getSeries(session.run, metric, null, session.range, POINTS));
  }

  lines() {
    const { value, error } = this.ask(this.metric);
    if (!value) return error ? `n/a: ${error.message}` : "Loading…";
    const limits = this.limits.map((metric) => this.ask(metric));
    if (limits.some((each) => !each.value && !each.error)) return "Loading…";
    const used = value.series.filter((each) => !each.labels["system.memory.state"] || each.labels["system.memory.state"] === "used");
    if (!used.length) return this.session.range ? `n/a: no ${this.metric} in steps ${this.session.range.join("–")}. Press 0 for all steps.` : `n/a: ${this.root.dataset.nothing}`;
    const highest = onGrid({ ...value, series: used }, "max");
    const usual = onGrid({ ...value, series: used }, "mean");
    const column = (grid, index) => grid.series.map((each) => each.values[index]).filter((each) => each !== null).sort((a, b) => a - b);
    const peak = highest.x.map((_, index) => column(highest, index).pop() ?? null);
    const median = usual.x.map((_, index) => {
      const known = column(usual, index);
      return known.length ? known[known.length >> 1] : null;
    });
    const shown = [["highest", peak], ["median", median]];
    const limit = this.limit();
    const worst = highest.series.map((each) => [each.rank === null || each.rank === undefined ? each.device ?? each.host ?? "the host" : `rank ${each.rank}`, Math.max(...each.values.filter((v) => v !== null), -Infinity)]).reduce((a, b) => (b[1] > a[1] ? b : a));
    const near = limit !== null && worst[1] * FAR > limit;
    if (near) shown.push(["limit", highest.x.map(() => limit)]);
    const room = limit === null ? "limit n/a: not reported" : near ? `${quantity(limit - worst[1], "By")} below the limit` : `the limit, ${quantity(limit, "By")}, is far above this scale`;
    const left = `peak ${quantity(worst[1], "By")} on ${worst[0]}; ${room}`;
    return { x: highest.x, width: highest.width, lines: shown, note: left };
  }

  limit() {
    for (const metric of this.limits) {
      const { value } = this.ask(metric);
      const known = (value?.series ?? []).flatMap((each) => each.min).filter((each) => Number.isFinite(each) && each > 0);
      if (known.length) return Math.min(...known);
    }
    return null;
  }

  style() {
    const [first, second] = colours();
    const looks = { highest: [second, [], 2], median: [first, [8, 4], 2], limit: [css("bad"), [3, 3], 1.5] };
    const names = typeof this.shown === "object" ? this.shown.lines.map(([name]) => name) : [];
    return names.map((name, line) => ({ label: name, color: looks[name][0], dash: looks[name][1], width: looks[name][2], gaps: true, line }));
  }

  bands() {
    return typeof this.shown === "object" ? [{ series: [1, 2], fill: transparent(colours()[1], 0.14) }] : [];
  }
}
