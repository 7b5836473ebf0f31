// What is shown, kept in the address: /run/ID/ranks?x=3000-4200&rank=17,40&m=phase.duration:forward

/** @typedef {{run: string|null, path: string, x: [number, number]|null, ranks: number[], metric: string|null, step: number|null, layer: number|null}} Address */

/** @returns {Address} */
export function parse(location) {
  const match = /^\/run\/([^/]+)\/?(.*?)\/?$/.exec(location.pathname);
  const query = new URLSearchParams(location.search);
  const range = /^(\d+)-(\d+)$/.exec(query.get("x") ?? "");
  const ranks = (query.get("rank") ?? "").split(",").filter((part) => /^\d+$/.test(part)).map(Number);
  return {
    run: match ? decodeURIComponent(match[1]) : null,
    path: match ? match[2] : location.pathname === "/" ? "" : location.pathname,
    x: range && Number(range[1]) <= Number(range[2]) ? [Number(range[1]), Number(range[2])] : null,
    ranks: [...new Set(ranks)],
    metric: query.get("m"),
    step: whole(query.get("step")),
    layer: whole(query.get("layer")),
  };
}

function whole(text) {
  return /^\d{1,15}$/.test(text ?? "") ? Number(text) : null;
}

/** The address of a page of a run; commas and colons stay readable. @param {Address} address */
export function format(address) {
  if (address.run === null) return "/";
  const parts = [];
  if (address.x) parts.push(`x=${address.x[0]}-${address.x[1]}`);
  if (address.ranks.length) parts.push(`rank=${address.ranks.join(",")}`);
  if (address.metric) parts.push(`m=${encodeURIComponent(address.metric).replace(/%3A/g, ":").replace(/%2F/g, "/")}`);
  for (const name of ["step", "layer"]) if (Number.isInteger(address[name])) parts.push(`${name}=${address[name]}`);
  const path = address.path ? `/${address.path}` : "";
  return `/run/${encodeURIComponent(address.run)}${path}${parts.length ? `?${parts.join("&")}` : ""}`;
}

/** "phase.duration:forward" → metric and labels; a plain metric has no labels. */
export function splitMetric(text) {
  const [metric, phase] = text.split(":");
  return { metric, labels: phase ? { phase } : null };
}
