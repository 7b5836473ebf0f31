// Shows the page that the address names, keeps the address true to what is shown, and draws at most once a frame.

import { blamedRanks } from "./core/causes.js";
import { Communication } from "./pages/communication.js";
import { Experts } from "./pages/experts.js";
import { format, parse } from "./core/address.js";
import { Hardware } from "./pages/hardware.js";
import { Memory } from "./pages/memory.js";
import { PANELS } from "./panels/index.js";
import { Overview } from "./pages/overview.js";
import { Ranks } from "./pages/ranks.js";
import { Runs } from "./pages/runs.js";
import { Session } from "./core/session.js";
import { Steps } from "./pages/steps.js";
import { drawStatus } from "./core/status.js";
import { element, replace } from "./core/dom.js";
import { help } from "./core/help.js";
import { listen } from "./core/keyboard.js";
import { scheme } from "./core/palette.js";
import { slowestRank } from "./core/matrix.js";

const PAGES = { runs: Runs, overview: Overview, ranks: Ranks, steps: Steps, communication: Communication, experts: Experts, hardware: Hardware, memory: Memory };
const OWN_TIME = "step.self";
const SCHEME_KEY = "mantine-color-scheme-value";
const TICK_MS = 500;
const SLOWEST_MS = 3000;

class App {
  /** @param {HTMLElement} content @param {Session|null} session begun while the shell was still being built */
  constructor(content, session) {
    this.pages = JSON.parse(content.dataset.pages);
    this.session = session;
    if (session) session.changed = () => this.changed();
    this.open = null;
    this.panels = [];
    this.address = parse(location);
    addEventListener("popstate", () => this.follow());
    document.addEventListener("click", (event) => this.onClick(event));
    document.getElementById("theme-toggle").addEventListener("click", () => this.toggleScheme());
    document.getElementById("help-open").addEventListener("click", () => help(this));
    new MutationObserver(() => this.recolor()).observe(document.documentElement, { attributeFilter: ["data-mantine-color-scheme"] });
    listen(this);
    setInterval(() => drawStatus(this), TICK_MS); // data grows older even when nothing arrives
    this.follow();
  }

  /** The metric of the Ranks page: own time if it is known, since ranks that wait for a slow one take as long as it does. */
  get metric() {
    return this.address.metric ?? this.usualMetric;
  }

  get usualMetric() {
    return this.session?.meta?.metrics?.some(({ metric }) => metric === OWN_TIME) ? OWN_TIME : "step.duration";
  }

  /** Opens what the address bar says. */
  follow() {
    this.address = parse(location);
    if (this.session && this.session.run !== this.address.run) {
      this.session.close();
      this.session = null;
    }
    if (this.address.run !== null && !this.session) {
      this.session = begin(this.address);
      this.session.changed = () => this.changed();
    }
    this.session?.setRange(this.address.x);
    this.show();
  }

  show() {
    const found = this.pages.find((page) => (this.address.run === null ? page.path === null && this.address.path === "" : page.path === this.address.path));
    for (const section of document.querySelectorAll("[data-page]")) section.hidden = section.dataset.page !== found?.name;
    if (this.open?.name !== found?.name || this.open?.run !== this.address.run) this.openPage(found);
    document.title = [found?.title, this.address.run, "lens"].filter(Boolean).join(" · ");
    for (const link of document.querySelectorAll("[data-nav]")) {
      if (link.dataset.nav === found?.name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
      link.href = format({ ...this.address, path: link.dataset.path });
    }
    this.changed();
  }

  openPage(page) {
    for (const panel of this.panels) panel.close();
    this.open?.view.close?.();
    this.panels = [];
    this.open = null;
    if (!page) return;
    const root = document.getElementById(`page-${page.name}`);
    this.open = { name: page.name, run: this.address.run, root, view: new PAGES[page.name](root, this) };
    if (!this.session) return;
    this.panels = [...root.querySelectorAll("[data-panel]")].map((section) => new PANELS[section.dataset.panel](section, this.session, this));
  }

  /** One crosshair for all pictures. */
  point(step, origin) {
    this.pointed = step === null ? null : { step, origin };
    for (const panel of this.panels) if (panel !== origin) panel.pointAt?.(step);
  }

  /** Draws soon, once, however often it is called. */
  changed() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
    });
  }

  draw() {
    this.chosen = null; // found once a picture: it looks through all values
    drawStatus(this);
    const blocked = this.drawNotice();
    if (!this.open || blocked) return;
    this.open.view.draw();
    if (!this.session) return;
    for (const panel of this.panels) panel.draw();
    // New data moved the steps under the crosshair; charts take their new scales when this task ends.
    if (this.pointed) queueMicrotask(() => this.pointed && this.point(this.pointed.step, this.pointed.origin));
    this.session.keep(new Set([...this.open.view.sources(), ...this.panels.flatMap((panel) => panel.sources())]));
  }

  /** Says what keeps the page from being shown; true when there is nothing else to draw. */
  drawNotice() {
    const notice = document.getElementById("notice");
    const error = this.session?.error;
    const unknownPage = !this.open;
    const fatal = unknownPage || error?.status === 404 || error?.status === 401;
    const words = unknownPage ? ["There is no such page.", "All runs are listed on the first page."] : error ? [error.status === 404 ? `This store has no run “${this.session.run}”.` : error.message, error.status === 404 ? "It may be in another data folder, or its address is mistyped." : error.hint] : null;
    notice.hidden = !words;
    document.getElementById("navigation").hidden = !this.session?.meta;
    if (this.open) this.open.root.hidden = fatal;
    replace(notice, JSON.stringify(words), () => (words ? [element("h2", {}, words[0]), element("p", {}, words[1] ?? ""), element("a", { href: "/", "data-go": "/" }, "All runs")] : []));
    return fatal;
  }

  recolor() {
    for (const panel of this.panels) panel.recolor?.();
    this.changed();
  }

  toggleScheme() {
    const next = scheme() === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(SCHEME_KEY, next);
    } catch {
      // A browser that keeps nothing still shows the colours until the page is left.
    }
    document.documentElement.setAttribute("data-mantine-color-scheme", next);
  }

  /** Follows a link inside the app without loading the document again. */
  onClick(event) {
    const link = event.target.closest?.("a[data-nav], a[data-go]");
    if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    this.go(link.getAttribute("href"));
  }

  go(path) {
    if (path !== location.pathname + location.search) history.pushState(null, "", path);
    this.follow();
    scrollTo(0, 0);
  }

  goByKey(key) {
    const page = this.pages.find((each) => each.key === key);
    if (!page || (page.path !== null && this.address.run === null)) return false;
    this.go(page.path === null ? "/" : format({ ...this.address, path: page.path }));
    return true;
  }

  /** Takes a change of what is shown into the address. */
  update(change) {
    this.address = { ...this.address, ...change };
    this.chosen = null;
    history.replaceState(null, "", format(this.address));
    this.session?.setRange(this.address.x);
    this.show();
  }

  zoomTo(range) {
    if (!range) return this.update({ x: null });
    const [first, last] = [Math.max(0, range[0]), Math.max(range[1], range[0] + 1)];
    return this.update({ x: [first, last] });
  }

  zoomBy(factor) {
    if (!this.session) return;
    const [first, last] = this.session.visible();
    const half = Math.max(1, ((last - first) * factor) / 2);
    const centre = (first + last) / 2;
    const newest = this.session.lastStep ?? last;
    const range = [Math.max(0, Math.round(centre - half)), Math.min(newest, Math.round(centre + half))];
    this.zoomTo(range[0] <= 0 && range[1] >= newest ? null : range);
  }

  setMetric(metric) {
    this.update({ metric: metric === this.usualMetric ? null : metric });
  }

  setRanks(text) {
    this.update({ ranks: [...new Set((text.match(/\d+/g) ?? []).map(Number))] });
  }

  toggleRank(rank) {
    const { ranks } = this.address;
    this.update({ ranks: ranks.includes(rank) ? ranks.filter((each) => each !== rank) : [...ranks, rank] });
  }

  /** The ranks of the address, else those of the verdict, else the one that stands out; `why` says which. */
  chosenRanks() {
    this.chosen ??= this.findRanks();
    return this.chosen;
  }

  /** The rank with the highest median, looked for again every few seconds. */
  slowestOf(matrix) {
    const now = performance.now();
    if (this.slowest?.matrix !== matrix || now - this.slowest.at > SLOWEST_MS) this.slowest = { matrix, at: now, rank: slowestRank(matrix) };
    return this.slowest.rank;
  }

  findRanks() {
    if (this.address.ranks.length) return { ranks: this.address.ranks, why: "" };
    const { matrix } = this.session.source(this.metric);
    if (!matrix?.rows.length) return { ranks: [], why: "" };
    const blamed = [...blamedRanks(this.session.diagnosis)].filter((rank) => matrix.rowOf.has(rank));
    if (blamed.length) return { ranks: blamed, why: "shown is what the verdict names" };
    const slowest = this.slowestOf(matrix);
    return { ranks: slowest === null ? [] : [slowest], why: "shown is the one with the highest median" };
  }
}

/** Dash builds the shell; the app starts as soon as it stands. */
function whenReady(start) {
  const content = () => document.querySelector("#content[data-pages]");
  if (content()) return start(content());
  const observer = new MutationObserver(() => {
    if (!content()) return;
    observer.disconnect();
    start(content());
  });
  return observer.observe(document.body, { childList: true, subtree: true });
}

function begin(address) {
  const session = new Session(address.run, address.x);
  session.start();
  return session;
}

const first = parse(location);
const early = first.run === null ? null : begin(first);
whenReady((content) => {
  new App(content, early);
});
