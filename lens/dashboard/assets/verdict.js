// The verdict: one sentence, its cost, why it is so, why it is nothing else, and what to do.

import { causeName, metricName, sentence, unitOf } from "./causes.js";
import { element, replace } from "./dom.js";
import { integer, list, number, percent, quantity } from "./format.js";

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
  const { diagnosis, meta, ledger } = session;
  const signature = JSON.stringify([diagnosis, session.lastStep === null, Boolean(meta), ledger?.to_step === undefined]);
  replace(place, signature, () => {
    const known = diagnosis?.status ?? "unknown";
    const status = known === "insufficient" && session.lastStep === null ? "unknown" : known;
    place.dataset.status = status;
    const found = (diagnosis?.hypotheses ?? []).filter((each) => each.severity !== "info");
    const body = found.length ? finding(found[0], diagnosis, meta) : [calm(status, diagnosis, session)];
    const rest = (diagnosis?.hypotheses ?? []).filter((each) => each !== found[0]);
    return [
      element("div", { class: "lens-verdict-head" }, badge(status), ...(found.length ? [confidence(found[0])] : [])),
      ...body,
      ...(rest.length ? [others(rest)] : []),
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
  const meter = element("span", { class: "lens-meter", role: "img", "aria-label": `confidence ${percent(value)}` }, element("i", {}));
  meter.firstChild.style.width = `${Math.round(value * 100)}%`;
  return element("span", { class: "lens-confidence", title: "The probability that both the cause and the ranks are right." }, "confidence ", meter, element("b", {}, percent(value)));
}

function calm(status, diagnosis, session) {
  const words = {
    healthy: ["Nothing holds this run back.", `Steps 0 to ${integer(diagnosis?.upto_step)} were compared across ranks and with their own past; no rank, host or loader stands out.`],
    insufficient: ["Too little has been seen for a verdict.", "lens needs some steps of every rank before it compares them. This fills by itself while the run goes on."],
    unknown: session.lastStep === null
      ? ["Waiting for the first step.", "A verdict appears once steps have ended. In a script: lens.watch(model, optimizer), then with lens.step(): …"]
      : ["The ranks are being compared.", "The first verdict after a start of the server takes a few seconds; then it is renewed while records arrive."],
    failed: ["The run has failed.", "No cause could be named from what was recorded."],
    hung: ["The run does not move.", "No cause could be named from what was recorded."],
    degraded: ["Something slows this run down.", "No cause could be named from what was recorded."],
  }[status];
  return element("div", {}, element("h2", {}, words[0]), element("p", { class: "lens-cost" }, words[1]));
}

function finding(hypothesis, diagnosis, meta) {
  const since = hypothesis.onset_step === null || hypothesis.onset_step === undefined ? "" : hypothesis.end_step === null || hypothesis.end_step === undefined
    ? ` since step ${integer(hypothesis.onset_step)}`
    : `, steps ${integer(hypothesis.onset_step)} to ${integer(hypothesis.end_step)}`;
  return [
    element("h2", {}, `${sentence(hypothesis)}${since}.`),
    element("p", { class: "lens-cost" }, ...cost(hypothesis)),
    element(
      "div",
      { class: "lens-reasons" },
      reason("Why", evidence(hypothesis, meta), "no single measurement moved; see the Ranks page"),
      reason("Why nothing else", (hypothesis.against ?? []).map((each) => [element("b", {}, `${causeName(each.cause)}: `), each.because]), "the signals that could rule out others were not reported"),
      reason("What to do", hypothesis.recommendation ? [[hypothesis.recommendation]] : [], "no recommendation is known"),
    ),
  ];
}

function cost({ slowdown_pct: slowdown, lost_seconds_per_step: perStep, lost_device_hours: hours, what_if: whatIf }) {
  const known = (value) => value !== null && value !== undefined;
  const parts = [];
  if (known(slowdown)) parts.push("It makes each step ", element("b", {}, `${number(slowdown, 3)} % longer`), known(perStep) ? ` (${quantity(perStep, "s")} lost per step)` : "", ".");
  else if (known(perStep)) parts.push("It costs ", element("b", {}, quantity(perStep, "s")), " per step.");
  else parts.push("What it costs could not be measured.");
  if (known(whatIf?.step_seconds_now) && known(whatIf?.step_seconds_if_fixed)) {
    parts.push(" Fixed, a step would take ", element("b", {}, quantity(whatIf.step_seconds_if_fixed, "s")), ` instead of ${quantity(whatIf.step_seconds_now, "s")}.`);
  }
  if (known(hours) && hours > 0) parts.push(` So far it has cost ${hours >= 0.1 ? `${number(hours, 2)} device hours` : `${number(hours * 3600, 2)} device seconds`}.`);
  return parts.filter((part) => part !== "");
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

function reason(title, items, otherwise) {
  return element("div", {}, element("h3", {}, title), items.length ? element("ul", {}, ...items.map((parts) => element("li", {}, ...parts))) : element("p", { class: "lens-quiet" }, `n/a: ${otherwise}`));
}

function others(hypotheses) {
  const items = hypotheses.map((each) =>
    element(
      "li",
      {},
      element("b", {}, causeName(each.cause)),
      ` ${sentence(each)}.`,
      element("span", { class: "lens-quiet" }, ` ${each.severity === "info" ? "information" : each.severity}, confidence ${percent(each.confidence)}${each.slowdown_pct ? `, ${number(each.slowdown_pct, 3)} % per step` : ""}`),
    ),
  );
  return element("details", { class: "lens-others" }, element("summary", {}, `${items.length === 1 ? "1 more possibility or note" : `${items.length} more possibilities and notes`}`), element("ul", {}, ...items));
}

function coverage(diagnosis) {
  const missing = diagnosis?.coverage?.signals_missing ?? [];
  if (!missing.length) return null;
  const shown = missing.slice(0, 6).join(", ");
  return element("p", { class: "lens-coverage" }, element("b", {}, "Judged without: "), shown, missing.length > 6 ? ` and ${missing.length - 6} more` : "", ". These signals were not reported.");
}
