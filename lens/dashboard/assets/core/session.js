// Everything the open pages know of one run: what the server said of it, its live feed, and the sources that panels draw.

import { getDiagnosis, getHeatmap, getLedger, getRun, getSeries, ApiError } from "./api.js";
import { splitMetric } from "./address.js";
import { Feed } from "./feed.js";
import { Matrix } from "./matrix.js";

const POINTS = 1000;
const POLL_MS = 5000;
const QUIET_S = 10;
/** Metrics of the run as a whole: a line of their own, not a row a rank. */
const WHOLE_RUN = /^train\.(loss|lr|grad_norm)$/;

/** One metric over the visible steps: history from the server, then what the feed adds. */
export class Source {
  constructor(session, name) {
    this.session = session;
    this.name = name;
    Object.assign(this, splitMetric(name));
    this.state = "loading";
    this.reason = "";
    this.unit = null;
    this.matrix = null;
    this.waiting = [];
  }

  async load() {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    const range = this.session.range;
    this.busy = true;
    try {
      const matrix = await (WHOLE_RUN.test(this.metric) ? this.loadSeries(range, abort.signal) : this.loadMap(range, abort.signal));
      this.matrix = matrix;
      this.state = matrix.rows.length ? "ready" : "empty";
      this.reason = "";
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.state = "error";
      this.reason = error.message;
      this.matrix ??= new Matrix({ from: range ? range[0] : 0, to: range ? range[1] : null });
    }
    this.busy = false;
    const waiting = this.waiting;
    this.waiting = [];
    for (const block of waiting) this.take(block);
    this.session.changed();
  }

  async loadMap(range, signal) {
    const ask = (pool) => getHeatmap(this.session.run, this.metric, this.labels, range, POINTS, pool, signal);
    const highest = await ask("max");
    if (highest.axis === "time") throw new ApiError(404, `${this.metric} is reported by time, not by step.`);
    const mean = highest.width > 1 ? await ask("mean") : highest;
    this.unit = highest.unit;
    return highest.rows.length ? Matrix.fromHeatmap(highest, mean, range ? range[1] : null) : new Matrix({ from: range ? range[0] : 0, to: range ? range[1] : null });
  }

  async loadSeries(range, signal) {
    const reply = await getSeries(this.session.run, this.metric, this.labels, range, POINTS, signal);
    this.unit = reply.unit;
    return Matrix.fromSeries(numbersOf(reply), range, POINTS);
  }

  /** Cells that the feed brought; kept back while the history is on its way. */
  take(block) {
    if (this.busy || !this.matrix) {
      this.waiting.push(block);
      return;
    }
    if (!this.matrix.rows.length && !this.session.range && block.steps.length) this.matrix.from = Math.min(...block.steps);
    for (let index = 0; index < block.steps.length; index += 1) this.matrix.put(block.steps[index], block.ranks[index], block.values[index]);
    if (this.matrix.rows.length) this.state = "ready";
  }

  matches(block) {
    return block.metric === this.metric && (this.labels?.phase ?? null) === (block.labels?.phase ?? null);
  }
}

function numbersOf(reply) {
  const real = (values) => values.map((value) => (typeof value === "string" ? Number(value) : value));
  return { ...reply, series: reply.series.map((s) => ({ ...s, min: real(s.min), max: real(s.max), mean: real(s.mean) })) };
}

export class Session {
  /** @param {string} run @param {[number, number]|null} range visible steps, null = all */
  constructor(run, range) {
    this.run = run;
    this.range = range;
    /** Called when something should be drawn again. */
    this.changed = () => {};
    this.sources = new Map();
    this.replies = new Map();
    this.meta = null;
    this.error = null;
    this.diagnosis = null;
    this.ledger = null;
    this.asking = new Set();
    this.live = { age: null, at: performance.now(), reporting: null, lastStep: null };
    this.connected = false;
    this.feed = new Feed(run, (frame) => this.onFrame(frame), (connected) => this.onConnection(connected));
  }

  /** Asks whether there is such a run, then for everything else. */
  async start() {
    await this.refresh();
    if (this.error?.status === 404 || this.error?.status === 401 || this.closed) return;
    this.feed.open();
    this.reload();
    this.askForVerdict();
    this.poll = setInterval(() => this.refresh().then(() => this.knowsVerdict || this.askForVerdict()), POLL_MS);
  }

  /** Later verdicts come with the feed: to ask for them would have the server compare all ranks for each open page. */
  get knowsVerdict() {
    return this.connected && this.diagnosis !== null && this.ledger !== null;
  }

  /** Verdict and ledger as they are now. */
  askForVerdict() {
    this.ask(getDiagnosis, "diagnosis");
    this.ask(getLedger, "ledger");
  }

  async refresh() {
    try {
      this.meta = await getRun(this.run);
      this.metaAt = performance.now();
      this.error = null;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.error = error;
    }
    this.changed();
  }

  async ask(get, field) {
    if (this[field] || this.asking.has(field)) return;
    this.asking.add(field);
    try {
      const reply = await get(this.run);
      this[field] ??= reply;
      this.changed();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
    } finally {
      this.asking.delete(field);
    }
  }

  onFrame({ header, blocks }) {
    this.live = { age: header.age_s, at: performance.now(), reporting: header.ranks_reporting, lastStep: header.last_step };
    if (header.diagnosis) this.diagnosis = header.diagnosis;
    if (header.ledger) this.ledger = header.ledger;
    if (header.reset) this.reload();
    for (const block of blocks) for (const source of this.sources.values()) if (source.matches(block)) source.take(block);
    if (blocks.length || header.diagnosis || header.reset) this.changed();
  }

  onConnection(connected) {
    this.connected = connected;
    this.changed();
  }

  /** The source of a metric, loaded when first asked for. */
  source(name) {
    let source = this.sources.get(name);
    if (!source) {
      source = new Source(this, name);
      this.sources.set(name, source);
      this.feed.subscribe([...this.sources.values()].map((each) => each.metric));
      if (this.meta) source.load();
    }
    return source;
  }

  /** Of some metrics that can stand for one another, best first, those up to the first that the run reports. */
  tried(names) {
    const first = names.findIndex((name) => this.source(name).state !== "empty");
    return first < 0 ? names : names.slice(0, first + 1);
  }

  /** The one of them that the run reports; the best where it reports none. */
  reported(names) {
    const tried = this.tried(names);
    const last = tried[tried.length - 1];
    return this.source(last).state === "empty" ? names[0] : last;
  }

  /** A reply that is asked for when a picture wants it, and again once it is `every` ms old or `key` changed.
   *  What was known is shown meanwhile. @returns {{value: object|null, error: ApiError|null}} */
  reply(kind, key, every, load) {
    let entry = this.replies.get(kind);
    if (!entry) this.replies.set(kind, (entry = { key: null, value: null, error: null, at: -Infinity, busy: null }));
    if (entry.busy !== key && (entry.key !== key || performance.now() - entry.at > every)) this.load(entry, key, load);
    return entry;
  }

  async load(entry, key, load) {
    entry.busy = key;
    let [value, error] = [null, null];
    try {
      value = await load();
    } catch (caught) {
      if (!(caught instanceof ApiError)) throw caught;
      error = caught;
    }
    if (entry.busy !== key || this.closed) return;
    Object.assign(entry, { key, value: value ?? (entry.key === key ? entry.value : null), error, at: performance.now(), busy: null });
    this.changed();
  }

  /** Forgets the sources that no open panel names. */
  keep(names) {
    for (const name of [...this.sources.keys()]) if (!names.has(name)) this.sources.delete(name);
    this.feed.subscribe([...this.sources.values()].map((each) => each.metric));
  }

  /** Shows steps [from, to], or everything for null. */
  setRange(range) {
    if (String(range) === String(this.range)) return;
    this.range = range;
    clearTimeout(this.reloading);
    this.reloading = setTimeout(() => this.reload(), 80);
    this.changed();
  }

  reload() {
    if (!this.meta) return;
    for (const source of this.sources.values()) source.load();
  }

  /** First and last visible step. While no map of all steps has come, those that the run itself speaks of. */
  visible() {
    if (this.range) return this.range;
    let [first, last] = [Infinity, -Infinity];
    for (const { matrix } of this.sources.values()) {
      if (!matrix || matrix.lastStep === null) continue;
      first = Math.min(first, matrix.from);
      last = Math.max(last, matrix.lastStep);
    }
    return last >= first ? [first, Math.max(last, first + 1)] : [0, Math.max(1, this.lastStep ?? 1)];
  }

  get lastStep() {
    const known = [this.live.lastStep, this.meta?.last_step].filter((step) => step !== null && step !== undefined);
    return known.length ? Math.max(...known) : null;
  }

  /** Whether its processes are only looked at from outside: no step of it is known, and none will be. */
  get observed() {
    return Boolean(this.meta?.config?.observed) && this.lastStep === null;
  }

  /** Why there is no step to show. */
  get noStep() {
    return this.observed ? "observed from outside: no phases" : "no step has ended yet";
  }

  /** Whether the feed has seen records of this run; after a restart of the server only the store has. */
  get fed() {
    return this.connected && this.live.age !== null;
  }

  /** Seconds since the newest record came; null if none ever has. */
  get age() {
    const [known, at] = this.fed ? [this.live.age, this.live.at] : [this.meta?.age_s ?? null, this.metaAt];
    return known === null ? null : known + (performance.now() - at) / 1000;
  }

  /** "live", "stale", "ended", "waiting" (no data yet) or "offline" (no connection). */
  get state() {
    if (this.meta?.state === "ended") return "ended";
    if (!this.connected) return "offline";
    if (this.age === null) return "waiting";
    return this.age > QUIET_S ? "stale" : "live";
  }

  /** Ranks heard of in the last seconds; of a run that is over, those that ever were. */
  get reporting() {
    const { state } = this;
    if (state === "ended" || (!this.fed && state === "live")) return this.meta?.ranks_reporting ?? null;
    return this.fed ? this.live.reporting : 0;
  }

  /** What is known of a rank: host, device, vendor, model. */
  about(rank) {
    return this.meta?.ranks?.find((each) => each.rank === rank) ?? null;
  }

  close() {
    this.closed = true;
    clearInterval(this.poll);
    this.feed.close();
  }
}
