// Reading from the server: JSON, and heat maps in their binary form.

export class ApiError extends Error {
  constructor(status, message, hint) {
    super(message);
    this.status = status;
    this.hint = hint ?? "";
  }
}

async function request(path, params, signal) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(params ?? {})) if (value !== null && value !== undefined) query.set(key, value);
  const text = query.toString();
  let response;
  try {
    response = await fetch(`/api/v1${path}${text ? `?${text}` : ""}`, { signal, headers: { accept: "*/*" } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.", "Is `lens serve` still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  if (response.status === 401) throw new ApiError(401, "This browser is not signed in.", "Open the address that `lens serve` printed; it holds the token.");
  throw new ApiError(response.status, told.error ?? `The server answered ${response.status}.`, told.hint);
}

/** JSON has no NaN: the API writes such numbers as text. */
export function numberOf(value) {
  if (value === "NaN") return NaN;
  if (value === "Infinity") return Infinity;
  if (value === "-Infinity") return -Infinity;
  return value;
}

export async function getRuns(signal) {
  return (await (await request("/runs", null, signal)).json()).runs;
}

export async function getRun(run, signal) {
  return (await request(`/runs/${encodeURIComponent(run)}`, null, signal)).json();
}

export async function getDiagnosis(run, signal) {
  return (await request(`/runs/${encodeURIComponent(run)}/diagnosis`, null, signal)).json();
}

export async function getLedger(run, signal) {
  return (await request(`/runs/${encodeURIComponent(run)}/ledger`, null, signal)).json();
}

/** Every rank's spans of one step. */
export async function getStep(run, step, signal) {
  return (await request(`/runs/${encodeURIComponent(run)}/steps/${step}`, null, signal)).json();
}

/** Rank × rank bytes and waiting, and each group's bandwidth, in a range of steps. */
export async function getCommunication(run, range, signal) {
  return (await request(`/runs/${encodeURIComponent(run)}/communication`, range ? { from: range[0], to: range[1] } : null, signal)).json();
}

/** The newest value of every series of some metrics: {metric: [series]}. */
export async function getLatest(run, metrics, signal) {
  const reply = await (await request(`/runs/${encodeURIComponent(run)}/latest`, { metric: metrics.join(",") }, signal)).json();
  const found = Object.fromEntries(metrics.map((metric) => [metric, []]));
  for (const each of reply.series) found[each.metric].push(each);
  return found;
}

function selection(metric, labels, range, more) {
  const params = { metric, ...more };
  for (const [key, value] of Object.entries(labels ?? {})) params[`label.${key}`] = value;
  if (range) [params.from, params.to] = range;
  return params;
}

/** Envelope of a metric, one series a rank: x, min, max, mean, count. */
export async function getSeries(run, metric, labels, range, points, signal) {
  const params = selection(metric, labels, range, { axis: "step", points });
  return (await request(`/runs/${encodeURIComponent(run)}/series`, params, signal)).json();
}

/** Layer × expert rows over steps; null where nothing was reported. */
export async function getExperts(run, range, columns, signal) {
  const params = selection("moe.expert.tokens", null, range, { rows: "expert", columns, pool: "mean" });
  return (await request(`/runs/${encodeURIComponent(run)}/heatmap`, params, signal)).json();
}

/** Rank × step map; `values` is row-major with NaN where there is nothing. */
export async function getHeatmap(run, metric, labels, range, columns, pool, signal) {
  const params = selection(metric, labels, range, { rows: "rank", columns, pool, format: "binary" });
  const buffer = await (await request(`/runs/${encodeURIComponent(run)}/heatmap`, params, signal)).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const values = new Float32Array(buffer.slice(4 + length));
  return { ...header, values, columns: header.rows.length ? values.length / header.rows.length : 0 };
}
