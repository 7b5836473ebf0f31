// Small help for building elements; text is always set as text.

/** element("p", {class: "x", onclick: f}, "text", child) */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Puts `children` where others were, but only if `signature` is new: a page that stands still is left alone. */
export function replace(node, signature, build) {
  if (node.lensSignature === signature) return false;
  node.lensSignature = signature;
  node.replaceChildren(...[build()].flat());
  return true;
}

export function table(caption, columns, rows) {
  return element(
    "table",
    {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...columns.map((column) => element("th", { scope: "col" }, column)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell, index) => element(index ? "td" : "th", index ? {} : { scope: "row" }, String(cell)))))),
  );
}

export function download(name, blob) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
