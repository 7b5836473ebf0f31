// Who waits for whom in one step: what each collective held its rank up for, and until whom.

const NS = 1e9;

/** Adds to each collective of a step:
 *  `begin`: when it began to hold its rank (ns; null: it never did, it ran beside other work),
 *  `wait`: seconds of that until the last rank came (null: nobody can tell), `last`: that rank, `missing`: how many
 *  ranks of its group were not recorded.
 *  @param {object[]} ranks of a step reply @param {object} groups of the run @param {number|null} world */
export function withWaits(ranks, groups, world) {
  for (const members of calls(ranks)) {
    const expected = sizeOf(members[0].span.group, groups, world) ?? members.length;
    const last = members.reduce((latest, each) => (each.span.t0_ns > latest.span.t0_ns ? each : latest));
    for (const { span } of members) {
      span.last = last.rank;
      span.missing = Math.max(0, expected - members.length);
      span.begin = held(span);
      span.wait = span.missing || members.length < 2 ? null : waited(span, last.span.t0_ns);
    }
  }
  return ranks;
}

/** The collectives of a step by their group and number: the same one on each of its ranks. */
function calls(ranks) {
  const found = new Map();
  for (const { rank, spans } of ranks) {
    for (const span of spans) {
      if (span.kind !== "collective") continue;
      span.begin = held(span);
      if (span.group === undefined || span.seq === undefined) continue;
      const key = `${span.group} ${span.seq}`;
      if (!found.has(key)) found.set(key, []);
      found.get(key).push({ rank, span });
    }
  }
  return found.values();
}

/** A blocking collective holds its rank from its start; another one from when its rank began to wait for it. */
function held(span) {
  return span.async ? span.t_wait_ns ?? null : span.t0_ns;
}

function waited(span, lastEntry) {
  if (span.begin === null) return 0;
  return Math.max(0, Math.min(lastEntry, span.t1_ns ?? lastEntry) - span.begin) / NS;
}

function sizeOf(group, groups, world) {
  const [kind, index] = group.split("/");
  return groups?.[kind]?.[Number(index)]?.length ?? (group === "world/0" ? world : null);
}

/** [rank, seconds, who waited] of the ranks that others waited for, the worst first. */
export function waitedFor(ranks) {
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
