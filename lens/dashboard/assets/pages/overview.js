// The overview's numbers of now, above its charts.

import { drawVerdict } from "../panels/verdict.js";
import { replace } from "../core/dom.js";
import { integer, percent, quantity, rankName } from "../core/format.js";
import { tile } from "../panels/tile.js";
import { tokenRate } from "../panels/lines.js";

/** Over all ranks; each rank's own, which is read where a run reports none. */
const LOSSES = ["train.loss", "train.loss.local"];

export class Overview {
  constructor(root, app) {
    this.root = root;
    this.app = app;
  }

  sources() {
    return ["step.duration", "step.tokens", ...this.app.session.tried(LOSSES), "train.mfu"];
  }

  draw() {
    const { session } = this.app;
    drawVerdict(this.root.querySelector("#verdict"), session);
    const tiles = [stepTime(session), throughput(session), loss(session), ...utilisation(session), progress(session)];
    replace(this.root.querySelector("#numbers"), JSON.stringify(tiles), () => tiles.map(tile));
  }
}

/** A tile without a value: still on its way, or missing for a reason. */
function without(label, session, source, reason) {
  if (!session.meta || source.state === "loading") return { label, value: "…", detail: "loading", missing: true };
  return { label, value: "n/a", detail: source.reason || reason, missing: true };
}

function stepTime(session) {
  const label = "Step time";
  const source = session.source("step.duration");
  const { matrix, unit } = source;
  const column = matrix ? matrix.newest() : -1;
  if (column < 0) return without(label, session, source, session.noStep);
  const { median } = matrix.reduce();
  const slowest = matrix.rows.reduce((worst, row) => (row.mean[column] > (worst?.mean[column] ?? -Infinity) ? row : worst), null);
  return { label, value: quantity(median[column], unit ?? "s"), detail: `${zoomed(session, matrix, column)}slowest: ${rankName(slowest.rank)}, ${quantity(slowest.max[column], unit ?? "s")}` };
}

function throughput(session) {
  const label = "Throughput";
  const [tokens, durations] = [session.source("step.tokens"), session.source("step.duration")];
  if (!tokens.matrix?.rows.length || !durations.matrix) return without(label, session, tokens, session.observed ? session.noStep : "no token counts reported");
  const [, rates] = tokenRate(tokens.matrix, durations.matrix);
  const known = rates.filter((rate) => rate !== null).slice(-20);
  if (!known.length) return without(label, session, tokens, "no complete step yet");
  const mean = known.reduce((sum, rate) => sum + rate, 0) / known.length;
  return { label, value: quantity(mean, "{token}/s"), detail: `mean of the last${session.range ? " visible" : ""} ${known.length === 1 ? "step" : `${known.length} steps`}` };
}

/** Model FLOPs utilisation; a run whose cards have no known peak has no such tile. */
function utilisation(session) {
  const { matrix } = session.source("train.mfu");
  const column = matrix ? matrix.newest() : -1;
  if (column < 0) return [];
  const { median } = matrix.reduce();
  return [{ label: "MFU", value: percent(median[column], 3), detail: "median rank, of the card's dense peak" }];
}

function loss(session) {
  const label = "Training loss";
  const source = session.source(session.reported(LOSSES));
  const { matrix } = source;
  if (matrix?.notFinite !== null && matrix?.notFinite !== undefined) return { label, value: "NaN", detail: `not finite since step ${integer(matrix.notFinite)}` };
  const column = matrix ? matrix.newest() : -1;
  if (column < 0) return without(label, session, source, session.observed ? session.noStep : "no loss reported");
  const { median } = matrix.reduce();
  const first = median.find((value) => value !== null);
  return { label, value: quantity(median[column], "", 4), detail: `${zoomed(session, matrix, column)}from ${quantity(first, "", 4)} at the first visible step` };
}

/** When zoomed, numbers are those of the last visible step: say so. */
function zoomed(session, matrix, column) {
  return session.range ? `at step ${integer(matrix.stepOf(column))}, ` : "";
}

function progress(session) {
  const { meta, lastStep } = session;
  if (!meta) return without("Last step", session, {}, "");
  const [reporting, all] = [session.reporting, meta.world_size];
  const whole = all === null || all === undefined ? "" : ` of ${all}`;
  const detail = session.state === "ended" ? `run ended · ${all ?? "n/a"} ranks` : reporting === null ? "no rank reports" : `${reporting}${whole} ranks reporting`;
  return { label: "Last step", value: lastStep === null ? "n/a" : integer(lastStep), detail, missing: lastStep === null };
}
