// The verdict: one sentence, its cost, what to do, why it is so and why it is nothing else.

import { causeName, metricName, sentence, troubles, unitOf } from "../core/causes.js";
import { element, replace } from "../core/dom.js";
import { integer, list, number, percent, quantity } from "../core/format.js";

const STATUS = {
  healthy: ["✓", "Healthy"],
  degraded: ["▲", "Degraded"],
  failed: ["✖", "Failed"],
  hung: ["■", "Hung"],
  insufficient: ["…", "Not enough data"],
  unknown: ["…", "No verdict yet"],
};

/** Draws the verdict of a session into `place`. */
export function drawVerdict(place, session) {
  const { diagnosis, meta, lastStep } = session;
  replace(place, JSON.stringify([diagnosis, lastStep === null, Boolean(meta), session.observed]), () => {
    const known = diagnosis?.status ?? "unknown";
    const status = known === "insufficient" && lastStep === null ? "unknown" : known;
    place.dataset.status = status;
    const [first] = troubles(diagnosis);
    const head = [badge(status), ...(first ? [confidence(first.best)] : [])];
    return [
      element("div", { class: "lens-verdict-head" }, ...head),
      ...(first ? finding(first, meta) : [calm(status, session)]),
      coverage(diagnosis),
    ].filter(Boolean);
  });
}

function badge(status) {
  const [sign, name] = STATUS[status] ?? STATUS.unknown;
  return element("span", { class: "lens-badge" }, element("span", { "aria-hidden": "true" }, sign), ` ${name}`);
}

function confidence(hypothesis) {
  const value = hypothesis.confidence;
  if (value === null || value === undefined) return null;
  const meter = element("span", { class: "lens-meter", "aria-hidden": "true" }, element("i", {}));
  meter.firstChild.style.width = `${Math.round(value * 100)}%`;
  return element("span", { class: "lens-confidence", title: "The probability that both the cause and the ranks are right." }, "confidence ", meter, element("b", {}, percent(value)));
}

function calm(status, { diagnosis, meta, lastStep, observed }) {
  const unnamed = "No cause could be named from what was recorded.";
  const words = {
    healthy: ["Nothing holds this run back.", `Steps 0 to ${integer(diagnosis?.upto_step)} were compared across ranks and with their own past; no rank, host or loader stands out.`],
    insufficient: ["Too little has been seen for a verdict.", "lens needs some steps of every rank before it compares them. This fills by itself while the run goes on."],
    unknown: !meta
      ? ["Opening the run …", "The server is being asked for it."]
      : observed
        ? ["Observed from outside: no phases.", "Hosts, processes and cards are measured; steps, phases and collectives are known only from within: lens attach PID, or lens run from the next start on."]
      : lastStep === null
        ? ["Waiting for the first step.", "A verdict appears once steps have ended. In a script: lens.watch(model, optimizer), then with lens.step(): …"]
        : ["The ranks are being compared.", "The first verdict after a start of the server takes a few seconds; then it is renewed while records arrive."],
    failed: ["The run has failed.", unnamed],
    hung: ["The run does not move.", unnamed],
    degraded: ["Something slows this run down.", unnamed],
  }[status];
  return element("div", {}, element("h2", {}, words[0]), element("p", { class: "lens-cost" }, words[1]));
}

function finding({ best, rivals }, meta) {
  return [
    element("h2", {}, `${sentence(best)}${when(best)}.`),
    element("p", { class: "lens-cost" }, ...cost(best, meta)),
    element("div", { class: "lens-do" }, element("h3", {}, "What to do"), element("p", {}, best.recommendation || "n/a: no recommendation is known for this cause.")),
    element(
      "div",
      { class: "lens-reasons" },
      reason("Why", evidence(best, meta), "no single measurement moved; see the Ranks page"),
      reason("Why nothing else", [...against(best), ...rivals.map(lessLikely)], "the signals that could rule out others were not reported"),
    ),
  ];
}

/** " since step 71", or from when to when if it is over. */
export function when({ onset_step: onset, end_step: end }) {
  if (!Number.isInteger(onset)) return "";
  return Number.isInteger(end) ? `, from step ${integer(onset)} to ${integer(end)}; it is over` : ` since step ${integer(onset)}`;
}

function known(value) {
  return value !== null && value !== undefined;
}

function cost({ slowdown_pct: slowdown, lost_seconds_per_step: perStep, lost_device_hours: hours, what_if: whatIf }, meta) {
  const parts = [];
  if (known(slowdown)) parts.push("It makes each step ", element("b", {}, `${number(slowdown, 3)}\u00a0% longer`), known(perStep) ? ` (${quantity(perStep, "s")} lost per step)` : "", ".");
  else if (known(perStep)) parts.push("It costs ", element("b", {}, quantity(perStep, "s")), " per step.");
  else parts.push("What it costs could not be measured.");
  if (known(whatIf?.step_seconds_now) && known(whatIf?.step_seconds_if_fixed)) {
    parts.push(" Fixed, a step would take ", element("b", {}, quantity(whatIf.step_seconds_if_fixed, "s")), ` instead of ${quantity(whatIf.step_seconds_now, "s")}.`);
  }
  if (known(hours) && hours > 0) parts.push(` So far it has cost ${hours >= 0.1 ? `${number(hours, 2)} device hours` : `${number(hours * 3600, 2)} device seconds`}${money(hours, meta)}.`);
  return parts.filter((part) => part !== "");
}

/** " (12.40 USD)" where the server knows what an hour of these cards costs. */
function money(hours, meta) {
  const price = meta?.device_hour_price;
  if (!price) return "";
  const amount = hours * price.amount;
  return ` (${amount >= 0.01 ? amount.toFixed(2) : "less than 0.01"}\u00a0${price.currency})`;
}

function evidence({ evidence: measured = [] }, meta) {
  return measured.map((each) => {
    const unit = unitOf(each.metric, meta);
    const ranks = each.ranks?.length ? ` of rank${each.ranks.length > 1 ? "s" : ""} ${list(each.ranks)}` : "";
    const both = typeof each.observed === "number" && typeof each.baseline === "number";
    return [
      element("b", {}, `${metricName(each.metric)}${ranks}`),
      ` ${quantity(each.observed, unit)}`,
      both ? ` instead of ${quantity(each.baseline, unit)}` : "",
      typeof each.effect === "number" && both && each.baseline !== 0 ? ` (${each.effect > 0 ? "+" : "−"}${percent(Math.abs(each.effect))})` : "",
    ].filter((part) => part !== "");
  });
}

function against({ against: others = [] }) {
  return others.map((each) => [element("b", {}, `${each.cause === "unexplained" ? "Something unknown" : causeName(each.cause)}: `), each.because]);
}

/** A rival explanation that could not be ruled out. */
function lessLikely(rival) {
  return [element("b", {}, `${causeName(rival.cause)}: `), `less likely, confidence ${percent(rival.confidence)}`];
}

function reason(title, items, otherwise) {
  return element("div", {}, element("h3", {}, title), items.length ? element("ul", {}, ...items.map((parts) => element("li", {}, ...parts))) : element("p", { class: "lens-quiet" }, `n/a: ${otherwise}`));
}

function coverage(diagnosis) {
  const missing = diagnosis?.coverage?.signals_missing ?? [];
  if (!missing.length) return null;
  const shown = missing.slice(0, 6).map(metricName).join(", ");
  return element("p", { class: "lens-coverage" }, element("b", {}, "Judged without: "), shown, missing.length > 6 ? ` and ${missing.length - 6} more` : "", ". These signals were not reported.");
}
