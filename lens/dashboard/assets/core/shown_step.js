// Which step the lanes show: the one chosen, or one of the newest, followed while the run goes on.

import { getStep } from "./api.js";

const FOLLOW_MS = 4000;
const KEPT_MS = 60000;

/** The step of the address, else one that has just ended, looked for again every few seconds. */
export function stepShown(app) {
  const { session } = app;
  const chosen = app.address.step;
  const now = performance.now();
  // A busy server answers slower than steps end: the next is followed only once the one before has come.
  const coming = session.replies.get("step")?.busy;
  if (chosen === null && !coming && (session.followed === undefined || now - session.followedAt > FOLLOW_MS)) {
    const newest = session.range ? Math.min(session.range[1], session.lastStep ?? -1) : session.lastStep;
    // The newest step may not have arrived from all ranks.
    session.followed = newest === null || newest < 0 ? undefined : Math.max(0, session.state === "ended" || session.range ? newest : newest - 2);
    session.followedAt = now;
  }
  const step = chosen ?? session.followed ?? null;
  if (step === null) return { step, value: null, error: null };
  const entry = session.reply("step", `step ${step}`, KEPT_MS, () => getStep(session.run, step));
  const current = entry.key === `step ${step}`;
  return { step, value: current || !entry.error ? entry.value : null, error: current ? entry.error : null };
}
