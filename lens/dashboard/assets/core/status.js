// The header: which run, is it alive, how old is what we see, how many ranks report.

import { element, replace } from "./dom.js";
import { age, integer } from "./format.js";

const STATES = {
  live: ["●", "live", "Records arrive now."],
  stale: ["◐", "stale", "Nothing has arrived for a while. The run may have stopped, or its agent cannot reach this server."],
  ended: ["○", "ended", "The run is over; this is all of it."],
  offline: ["◌", "reconnecting", "The connection to the server is gone; the page resumes by itself."],
  waiting: ["…", "waiting", "No record has arrived yet."],
};

export function drawStatus(app) {
  const { session } = app;
  const place = document.getElementById("status");
  const name = document.getElementById("run-name");
  if (!session?.meta) {
    replace(place, "none", () => []);
    replace(name, session?.run ?? "", () => (session ? [session.run] : []));
    return;
  }
  const { meta, state } = session;
  document.documentElement.dataset.lensState = state;
  replace(name, `${meta.name} ${meta.run}`, () => [element("b", { title: meta.run }, meta.name ?? meta.run)]);
  const [sign, word, explanation] = STATES[state];
  const shownAge = state === "ended" || session.age === null ? null : age(session.age);
  const reporting = session.reporting;
  const whole = meta.world_size ?? null;
  const few = state !== "ended" && reporting !== null && whole !== null && reporting < whole;
  const ranks = state === "ended" ? `${whole ?? "n/a"} ranks` : `${reporting ?? "n/a"} of ${whole ?? "n/a"} ranks`;
  const step = session.lastStep;
  const chip = (attributes, ...children) => element("span", { class: "lens-chip-plain", ...attributes }, ...children);
  const { x } = app.address;
  const missing = missingRecords(meta.drops);
  replace(place, JSON.stringify([state, shownAge, ranks, step, meta.simulated, x, missing]), () => [
    ...(x ? [element("button", { type: "button", class: "lens-chip", title: "Show all steps (0)", onclick: () => app.zoomTo(null) }, `only steps ${integer(x[0])}–${integer(x[1])} ×`)] : []),
    chip({ class: "lens-state", "data-state": state, title: explanation }, `${sign} ${word}`),
    ...(shownAge ? [chip({ title: "Age of the newest record" }, "data ", element("b", {}, shownAge), " old")] : []),
    chip({ "data-few": few, title: few ? "Some ranks have not been heard of for 10 seconds." : "Ranks heard of in the last 10 seconds" }, few ? "▲ " : "", element("b", {}, ranks)),
    chip({}, "step ", element("b", {}, integer(step))),
    ...(missing ? [chip({ class: "lens-chip-plain lens-missing-records", "data-few": true, title: missing.title }, "▲ ", element("b", {}, missing.text))] : []),
    ...(meta.simulated ? [chip({ class: "lens-simulated", title: "The cards' numbers come from a model driven by the real run, not from hardware." }, "simulated cards")] : []),
  ]);
}

/** What of the run never came to the store, counted by those who had to leave it out; null where nothing is missing. */
function missingRecords(drops) {
  const [overwritten, givenUp, refused] = [drops?.lost_slots ?? 0, drops?.given_up ?? 0, drops?.rejected ?? 0];
  const count = overwritten + givenUp + refused;
  if (!count) return null;
  const reasons = [
    [overwritten, "overwritten in the rings before an agent had read them (no agent, or it could not keep up)"],
    [givenUp, "given up because the agent's spool was full or damaged"],
    [refused, "refused by the store because it could not read them"],
  ];
  return {
    text: `${integer(count)} record${count === 1 ? "" : "s"} missing`,
    title: reasons.filter(([count]) => count).map(([count, why]) => `${integer(count)} ${why}.`).join(" "),
  };
}
